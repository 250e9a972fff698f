//! The tier as the engine uses it: the index behind one mutex.
//!
//! No I/O is done under the mutex but by opening and closing. Work that grows with the slab (dropping a storage, a
//! discard of a whole disk) gives the mutex up between chunks.

use super::closing::OnDisk;
use super::device::Device;
use super::format::{MAX_BLOCK, Superblock};
use super::health::{Health, Phase, Work};
use super::index::{Index, Key, ReadTicket};
use super::intents::Intents;
use super::lineage;
use super::load::Loading;
use super::missed::Missed;
use super::open::{self, Opened, Standing};
use super::own::OwnWrites;
use super::storages::Registration;
use super::veto;
use super::{
    Abandoned, Clock, Found, OpenReport, Outcome, SlotRead, SlotWrite, SsdError, SsdOptions, SsdState, SsdStats,
    SsdStorage, Stamp, StoreClock,
};
use crate::types::{BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange};
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Duration;

/// Slots or blocks handled before the mutex is given up for others: some tens of microseconds.
const CHUNK: u32 = 2048;

/// The SSD tier. Clones share it.
#[derive(Clone, Debug)]
pub struct SsdTier {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) device: Device,
    pub(super) clock: Clock,
    /// As in `State`; spares lookups the wait for a checkpoint to be written.
    pub(super) closed: AtomicBool,
    pub(super) state: Mutex<State>,
    /// Something is to be written that guests' writes wait for.
    pub(super) work: Condvar,
    /// Held by whoever writes records, table and superblock. Taken before `intents_io`, and that before `state`.
    pub(super) keeping: Mutex<()>,
    /// Held by whoever changes the slab's size. Taken before `keeping`.
    pub(super) resizing: Mutex<()>,
    pub(super) preallocate: bool,
    /// Held by whoever writes the bitmap.
    pub(super) intents_io: Mutex<()>,
    /// Held by whoever reads records. Taken before `state`.
    pub(super) loading: Mutex<Option<Loading>>,
    /// Somebody else may run by now, and with another tier or none. Held while it is noted that this slab is the last in use.
    pub(super) renounced: Mutex<bool>,
    pub(super) is_loading: AtomicBool,
    pub(super) unread: AtomicU64,
    pub(super) own: OwnWrites,
    pub(super) veto: Option<PathBuf>,
    pub(super) lineage: Option<PathBuf>,
    pub(super) found: Found,
    pub(super) me: Weak<Shared>,
}

pub(super) struct State {
    pub(super) index: Index,
    pub(super) intents: Intents,
    pub(super) health: Health,
    pub(super) superblock: Superblock,
    pub(super) trust: Trust,
    /// Guests' writes that wait for their intents.
    pub(super) waiting: Vec<Waker>,
    pub(super) closed: bool,
    pub(super) report: OpenReport,
    /// While records are being read.
    pub(super) missed: Option<Missed>,
    pub(super) on_disk: OnDisk,
    bad_checksums: u64,
    pub(super) io_errors: u64,
    pub(super) dropped_changed_store: u64,
    dropped_overtaken: u64,
    pub(super) checkpoints: u64,
}

/// Whether the slab may be believed after a crash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trust {
    Ok,
    /// No; that is being written down elsewhere.
    Vetoing,
    /// No, and that is on record as far as it could be.
    Vetoed,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SsdTier").field("path", &self.device.path).finish_non_exhaustive()
    }
}

impl SsdTier {
    /// Opens the slab at `path`, a regular file or a block device, or makes it. `size_bytes` is the length of the
    /// whole slab with its metadata (0.1 %); for a block device 0 means all of it. A slab of another size grows or
    /// shrinks in place and keeps the slots that fit. From here on it is dirty on disk until [`SsdTier::close`].
    ///
    /// Blocking I/O: reads 64 bytes for every slot up to the highest one in use.
    pub fn open(path: &Path, size_bytes: u64) -> Result<(SsdTier, OpenReport), SsdError> {
        SsdTier::open_with(path, size_bytes, SsdOptions::default())
    }

    /// [`SsdTier::open`] with options.
    pub fn open_with(path: &Path, size_bytes: u64, options: SsdOptions) -> Result<(SsdTier, OpenReport), SsdError> {
        let tier = SsdTier::open_at_once(path, size_bytes, options)?;
        let report = tier.load();
        Ok((tier, report))
    }

    /// [`SsdTier::open_with`] that leaves the slots' records to [`SsdTier::load`], during which the tier may be used: until
    /// they are read it finds less than it has, and takes nothing. Blocking I/O: a few megabytes at most.
    pub fn open_at_once(path: &Path, size_bytes: u64, options: SsdOptions) -> Result<SsdTier, SsdError> {
        let device = Device::open(path, options.direct)?;
        let standing = |found: &Superblock| match (&options.veto, &options.lineage) {
            _ if options.empty => Standing::Vetoed,
            (Some(veto), _) if veto::stands_against(veto, &found.slab_id) => Standing::Vetoed,
            (_, Some(lineage)) if !lineage::had(lineage, found) => Standing::Stranger,
            _ => Standing::Ours,
        };
        let opened =
            open::open(&device, size_bytes, options.preallocate, standing).inspect_err(|_| device.discard())?;
        if opened.report.found == Found::Vetoed
            && let Some(Err(error)) = options.veto.as_ref().map(|path| veto::lift(path))
        {
            tracing::debug!(%error, "SSD tier: its veto stays; it is against a slab that is no more");
        }
        let own = own_writes(&options, &opened);
        let tier = SsdTier::made_of(device, opened, own, options);
        tier.shared.note_lineage();
        Ok(tier)
    }

    pub(super) fn made_of(device: Device, opened: Opened, own: OwnWrites, options: SsdOptions) -> SsdTier {
        let (found, is_loading) = (opened.report.found, opened.loading.is_some());
        let unread = opened.loading.as_ref().map_or(0, Loading::unread);
        let state = State {
            index: opened.index,
            intents: opened.intents,
            health: Health::new(),
            superblock: opened.superblock,
            trust: Trust::Ok,
            waiting: Vec::new(),
            closed: false,
            report: opened.report,
            missed: is_loading.then(Missed::new),
            on_disk: OnDisk::Dirty,
            bad_checksums: 0,
            io_errors: 0,
            dropped_changed_store: 0,
            dropped_overtaken: 0,
            checkpoints: 0,
        };
        let shared = Arc::new_cyclic(|me| Shared {
            device,
            clock: options.clock,
            closed: AtomicBool::new(false),
            state: Mutex::new(state),
            work: Condvar::new(),
            keeping: Mutex::default(),
            resizing: Mutex::default(),
            preallocate: options.preallocate,
            intents_io: Mutex::default(),
            loading: Mutex::new(opened.loading),
            renounced: Mutex::new(false),
            is_loading: AtomicBool::new(is_loading),
            unread: AtomicU64::new(unread),
            own,
            veto: options.veto,
            lineage: options.lineage,
            found,
            me: me.clone(),
        });
        SsdTier { shared }
    }

    /// Whether transfers of slots must be run aside, see [`crate::engine::blocks_in_kernel`].
    pub fn runs_aside(&self) -> bool {
        self.shared.device.runs_aside
    }

    /// Where slots are read and written, at [`SlotRead::offset`] and [`SlotWrite::offset`]. If the report said
    /// `direct`, with buffers aligned to 4096 bytes.
    pub fn data_fd(&self) -> BorrowedFd<'_> {
        self.shared.device.file.as_fd()
    }

    /// Registers a storage. `identity` is 1 to 448 bytes and names it across restarts. If nobody uses it yet and
    /// `stamp` differs from the one kept (also: one of them is `None`), what the tier holds of it is dropped. `None`
    /// twice counts as unchanged: of a store that has no stamp, whoever cannot vouch for it calls
    /// [`SsdTier::drop_storage`].
    pub fn storage(&self, identity: &str, stamp: Option<Stamp>) -> Result<SsdStorage, SsdError> {
        self.storage_by(identity, stamp, StoreClock::Ours)
    }

    /// [`SsdTier::storage`] of a store whose stamp is of this or another clock.
    pub fn storage_by(&self, identity: &str, stamp: Option<Stamp>, clock: StoreClock) -> Result<SsdStorage, SsdError> {
        loop {
            let mut state = self.shared.state.lock();
            if state.closed {
                return Err(SsdError::Closed);
            }
            let own = &self.shared.own;
            let ours = |index, epoch, was| clock == StoreClock::Ours && own.explains(index, epoch, was, stamp);
            let (s, registration) = state.index.storages.register(identity, stamp, ours)?;
            match registration {
                Registration::Known => {}
                Registration::New if state.index.storages.slots(s.index) == 0 => {}
                // The index was that of a storage long out of use. Rare: thousands of storages must be known.
                Registration::New => {
                    state.index.sweep(0, u32::MAX, |key| all_if(key.storage() == s.index));
                }
                Registration::Changed if state.index.storages.slots(s.index) == 0 && state.missed.is_none() => {
                    state.index.storages.renew_epoch(s.index);
                }
                Registration::Changed => {
                    drop(state);
                    let dropped = self.shared.sweep_storage(s.index);
                    let mut state = self.shared.state.lock();
                    state.dropped_changed_store += dropped;
                    if self.is_recovered() && !own.knows() {
                        tracing::warn!(
                            store = identity,
                            dropped,
                            "SSD tier: nobody can tell who changed the store last; what was cached of it is dropped"
                        );
                    } else {
                        tracing::warn!(
                            store = identity,
                            dropped,
                            "SSD tier: the store was changed while nobody watched; what was cached of it is dropped"
                        );
                    }
                    // With the new stamp on the disk, records from before must not count.
                    state.index.storages.renew_epoch(s.index);
                    state.index.storages.set_stamp(s, stamp);
                    continue;
                }
            }
            state.index.storages.add_user(s, stamp);
            return Ok(s);
        }
    }

    /// Undoes one [`SsdTier::storage`]. What the tier holds of the storage is kept; after its last user `stamp`, as
    /// of now, tells whether it may be used again.
    pub fn release_storage(&self, s: SsdStorage, stamp: Option<Stamp>) {
        let mut state = self.shared.state.lock();
        state.index.storages.set_stamp(s, stamp);
        state.index.storages.remove_user(s);
    }

    /// The storage's stamp as of now. To be called before [`SsdTier::close`] for every storage that guests have written
    /// to: with the stamp it was registered with, it would count as changed at the next start.
    pub fn set_stamp(&self, s: SsdStorage, stamp: Option<Stamp>) {
        self.shared.state.lock().index.storages.set_stamp(s, stamp);
    }

    /// Pages of a block that the tier can serve now.
    pub fn lookup(&self, s: SsdStorage, block: BlockIndex) -> PageMask {
        let found = self.shared.usable(s).zip(Key::new(s.index, block));
        found.map_or(PageMask::NONE, |(state, key)| state.index.lookup(key))
    }

    /// Shows every block of a storage that the tier can serve now, and its valid pages, in no order. Goes through the whole
    /// index, in parts: not for an event loop.
    pub fn each_block(&self, s: SsdStorage, mut see: impl FnMut(BlockIndex, PageMask)) {
        let (mut at, mut found) = (Some(0), Vec::new());
        while let Some(from) = at {
            let Some(state) = self.shared.usable(s) else { return };
            at = state.index.look(from, CHUNK, |key, valid| {
                if key.storage() == s.index {
                    found.push((BlockIndex(key.block()), valid));
                }
            });
            // Whoever is shown them may want other locks.
            drop(state);
            found.drain(..).for_each(|(block, valid)| see(block, valid));
        }
    }

    /// Slots in use by the storages the tier knows, open or not: identity and number, most first.
    pub fn usage(&self) -> Vec<(String, u64)> {
        self.shared.state.lock().index.storages.usage()
    }

    /// Begins to read a block's slot; `None` if the tier has nothing of it. To be ended by [`SsdTier::end_read`].
    pub fn begin_read(&self, s: SsdStorage, block: BlockIndex) -> Option<SlotRead> {
        let key = Key::new(s.index, block)?;
        let ticket = self.shared.usable(s)?.index.begin_read(key)?;
        Some(SlotRead { shared: self.shared.clone(), ticket, ended: false })
    }

    /// Ends a read. Returns the pages that are valid now: those of [`SlotRead::mask`] less what was invalidated
    /// meanwhile, and none unless the outcome is good.
    pub fn end_read(&self, mut read: SlotRead, outcome: Outcome) -> PageMask {
        read.ended = true;
        read.shared.end_read(&read.ticket, outcome)
    }

    /// Begins to write pages of a block to a slot: a free one, or that of a victim (FIFO with one second chance;
    /// slots being read are passed over). The block's present slot, if any, serves until the new one is complete and
    /// then leaves, so `mask` should have its pages too. `None` if the tier has all of `mask` or is writing the block
    /// already, if nothing can be replaced, or if the tier is degraded, closed or [loading](SsdTier::is_loading).
    pub fn begin_insert(&self, s: SsdStorage, block: BlockIndex, mask: PageMask) -> Option<SlotWrite> {
        let key = Key::new(s.index, block)?;
        let mut state = self.shared.usable(s).filter(|state| state.missed.is_none())?;
        let (slot, _generation) = state.index.begin_insert(key, mask)?;
        drop(state);
        Some(SlotWrite { shared: self.shared.clone(), slot, key, mask, ended: false })
    }

    /// Ends a write whose I/O is complete; `checksum` is that of [`SlotWrite::checksum`]. With `ok` the block becomes
    /// visible, unless pages of it were invalidated meanwhile. Without, the I/O failed: the slot's place is not used
    /// again until the slab is opened the next time. (A write given up for other reasons is dropped instead.) Returns
    /// whether the block is visible.
    pub fn finish_insert(&self, mut write: SlotWrite, checksum: u32, ok: bool) -> bool {
        write.ended = true;
        write.shared.finish_insert(write.slot, checksum, ok)
    }

    /// The device answers a read so late that it is not to be used for a while.
    pub fn note_outage(&self, what: &str) {
        self.shared.note_outage(Work::Read, what);
    }

    /// The same of a write.
    pub fn note_late_write(&self, what: &str) {
        self.shared.note_outage(Work::Write, what);
    }

    /// Drops what the tier holds of a storage. Goes through the whole index (0.3 s for each million slots dropped):
    /// not for an event loop.
    pub fn drop_storage(&self, s: SsdStorage) {
        if self.shared.state.lock().index.storages.is_current(s) {
            self.shared.sweep_storage(s.index);
        }
    }

    /// Drops all that the tier holds. Goes through the whole index, as [`SsdTier::drop_storage`] does.
    pub fn drop_all(&self) {
        self.shared.sweep_all();
    }

    /// Ends the use of the slab for good, so that it may be taken away while guests go on without it: nothing of it will be
    /// believed by any run. Says so first in the veto beside the database, then on the slab itself. From here on the tier
    /// finds nothing and takes nothing; guests' writes wait for nothing.
    ///
    /// Blocking I/O, six seconds of it at most.
    ///
    /// # Errors
    /// Neither could be written. The tier is in use as before.
    pub fn abandon(&self) -> Result<Abandoned, SsdError> {
        self.shared.abandon()
    }

    pub fn stats(&self) -> SsdStats {
        self.shared.stats()
    }
}

/// What is known of an earlier run's writes.
fn own_writes(options: &SsdOptions, opened: &Opened) -> OwnWrites {
    let Some(path) = &options.own_writes else { return OwnWrites::none() };
    OwnWrites::open(path, &opened.superblock.slab_id).unwrap_or_else(|error| {
        let path = path.display();
        tracing::warn!(
            %path, %error,
            "SSD tier: after a crash stores that were written to will lose what it has of them"
        );
        OwnWrites::none()
    })
}

pub(super) fn all_if(condition: bool) -> PageMask {
    if condition { PageMask::ALL } else { PageMask::NONE }
}

impl Shared {
    /// The state, if the tier may be used for a storage now.
    fn usable(&self, s: SsdStorage) -> Option<MutexGuard<'_, State>> {
        if self.closed.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.state.lock();
        let usable = !state.closed
            && state.trust == Trust::Ok
            && state.index.storages.is_current(s)
            && state.health.usable(|| (self.clock)());
        usable.then_some(state)
    }

    pub(super) fn note_failure(&self, work: Work, what: &str, count: impl FnOnce(&mut State)) {
        self.note(what, |state, now| {
            count(state);
            state.health.note_failure(now, work, what)
        });
    }

    /// The device is not to be used for a while, after a single failure.
    pub(super) fn note_outage(&self, work: Work, what: &str) {
        self.note(what, |state, now| {
            state.io_errors += 1;
            state.health.give_up(now, work, what)
        });
    }

    fn note(&self, what: &str, change: impl FnOnce(&mut State, Duration) -> Option<u64>) {
        let now = (self.clock)();
        let mut state = self.state.lock();
        let due = change(&mut state, now);
        let degraded = matches!(state.health.phase(), Phase::Degraded { .. });
        drop(state);
        if let Some(failures) = due {
            let path = self.device.path.display();
            tracing::warn!(%path, failures, degraded, "SSD tier: {what}; reads go to the store instead");
        }
    }

    fn end_read(&self, ticket: &ReadTicket, outcome: Outcome) -> PageMask {
        let what = match outcome {
            Outcome::Good => {
                let mut state = self.state.lock();
                state.health.note_good(Work::Read);
                state.index.prove(ticket);
                return state.index.end_read(ticket, false, false) & ticket.valid;
            }
            Outcome::BadChecksum if self.state.lock().index.is_unproven(ticket) => {
                // No fault of the device's: its record was older than its data when the crash came.
                let mut state = self.state.lock();
                state.dropped_overtaken += 1;
                state.index.end_read(ticket, true, false);
                return PageMask::NONE;
            }
            Outcome::BadChecksum => "slot did not match its checksum",
            Outcome::IoError => "reading a slot failed",
        };
        let failed = outcome == Outcome::IoError;
        self.note_failure(Work::Read, what, |state| {
            state.io_errors += u64::from(failed);
            state.bad_checksums += u64::from(!failed);
            state.index.end_read(ticket, true, failed);
        });
        PageMask::NONE
    }

    pub(super) fn abandon_read(&self, ticket: &ReadTicket) {
        self.state.lock().index.end_read(ticket, false, false);
    }

    pub(super) fn cancel_insert(&self, slot: u32) {
        self.state.lock().index.finish_insert(slot, None, false);
    }

    fn finish_insert(&self, slot: u32, checksum: u32, ok: bool) -> bool {
        if ok {
            let mut state = self.state.lock();
            state.health.note_good(Work::Write);
            let checksum = Some(checksum).filter(|_| !state.closed);
            return state.index.finish_insert(slot, checksum, false);
        }
        self.note_failure(Work::Write, "writing a slot failed", |state| {
            state.io_errors += 1;
            state.index.finish_insert(slot, None, true);
        });
        false
    }

    pub(super) fn invalidate(&self, s: SsdStorage, range: PageRange) {
        if range.count == 0 {
            return;
        }
        {
            let mut state = self.state.lock();
            // Marks have come to an end with its use.
            if state.on_disk == OnDisk::Left {
                self.mark_late(&mut state);
            }
            let current = state.index.storages.is_current(s);
            if let Some(missed) = state.missed.as_mut().filter(|_| current) {
                missed.pages(s.index, range);
            }
        }
        let last = ((range.end() - 1) / PAGES_PER_BLOCK).min(MAX_BLOCK);
        let mut next = range.first / PAGES_PER_BLOCK;
        let pages_in = |block: u64| {
            let first = block * PAGES_PER_BLOCK;
            let from = range.first.max(first);
            PageMask::run(from - first, range.end().saturating_sub(from))
        };
        // A discard of a whole disk may name more blocks than there are slots.
        if last.saturating_sub(next) >= u64::from(CHUNK) {
            let slots = u64::from(self.state.lock().index.len());
            if last - next >= slots {
                self.sweep(|key| {
                    let hit = key.storage() == s.index && (next..=last).contains(&key.block());
                    if hit { pages_in(key.block()) } else { PageMask::NONE }
                });
                return;
            }
        }
        while next <= last {
            let end = next.saturating_add(u64::from(CHUNK)).min(last + 1);
            self.change(|state| {
                // Of a handle that is no longer current nothing is left.
                if !state.index.storages.is_current(s) {
                    return;
                }
                for key in (next..end).filter_map(|block| Key::new(s.index, BlockIndex(block))) {
                    state.index.invalidate(key, pages_in(key.block()));
                }
            });
            next = end;
        }
    }

    /// Drops what there is of a storage, or will be found of it on the disk. Returns how many slots went.
    pub(super) fn sweep_storage(&self, index: u16) -> u64 {
        if let Some(missed) = self.state.lock().missed.as_mut() {
            missed.storage(index);
        }
        self.sweep(|key| all_if(key.storage() == index))
    }

    /// Drops all that there is, or will be found on the disk.
    pub(super) fn sweep_all(&self) {
        if let Some(missed) = self.state.lock().missed.as_mut() {
            missed.everything();
        }
        self.sweep(|_| PageMask::ALL);
    }

    /// Invalidates what `which` names for each key. Returns how many slots went.
    fn sweep(&self, which: impl Fn(Key) -> PageMask) -> u64 {
        let (mut at, mut dropped) = (Some(0), 0);
        while let Some(from) = at {
            let (next, count) = self.change(|state| state.index.sweep(from, CHUNK, &which));
            at = next;
            dropped += count;
        }
        dropped
    }

    /// Changes the index. If that takes anything away that the slab, closed already, has on record, the slab is dirty
    /// again before this returns.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let before = state.index.counters.valid_pages;
        let changed = change(&mut state);
        if !matches!(state.on_disk, OnDisk::Dirty | OnDisk::Left) && state.index.counters.valid_pages != before {
            self.mark_late(&mut state);
        }
        changed
    }

    fn stats(&self) -> SsdStats {
        let state = self.state.lock();
        let counters = state.index.counters;
        SsdStats {
            slots: u64::from(state.index.limit()),
            used_slots: counters.used_slots,
            pending_slots: counters.pending_slots,
            retired_slots: counters.retired_slots,
            valid_pages: counters.valid_pages,
            reads: counters.reads,
            inserts: counters.inserts,
            aborted_inserts: counters.aborted_inserts,
            evictions: counters.evictions,
            bad_checksums: state.bad_checksums,
            dropped_overtaken: state.dropped_overtaken,
            io_errors: state.io_errors,
            dropped_changed_store: state.dropped_changed_store,
            index_bytes: state.index.bytes() + state.intents.bytes(),
            marked_regions: state.intents.marked(),
            checkpoints: state.checkpoints,
            unread_slots: self.unread.load(Ordering::Relaxed),
            opened: state.report.clone(),
            state: match state.health.phase() {
                _ if state.closed => SsdState::Closed,
                Phase::Ok => SsdState::Ok,
                Phase::Degraded { reason, since, retry_at, .. } => {
                    SsdState::Degraded { reason: reason.clone(), since: *since, retry_at: *retry_at }
                }
                Phase::Probing { since, .. } => SsdState::Retrying { since: *since },
            },
        }
    }
}
