//! From the records of a slab to the index, in steps, while guests are served.
//!
//! Of a slab of a TiB that is a gigabyte to read, and sixteen million blocks to put into a table: seconds. What must be known
//! before the first guest is served (superblock, bitmap, table of storages) is a few megabytes at most, and is read by
//! [`super::open`]. The records follow here. Until the last is read
//!
//! - a block whose record has not been read is not found: the read goes to the store;
//! - what guests overwrite, and what is dropped for other reasons, is noted ([`super::missed`]), and a record read later counts
//!   for the rest of its pages at most. One whose storage was given another epoch meanwhile does not count;
//! - nothing is inserted: the slots that are free are not known;
//! - there are no checkpoints: on the disk every record stays as it was, and every region that is written to stays marked. A crash
//!   finds the slab as one that was in use.
//!
//! Closing does not wait for it: the slab is left as one in use. A change of its size is refused until then.

use super::device::{AlignedBuf, Device};
use super::format::{
    self, ENTRY_BYTES, GROUP_META_BYTES, GROUP_SLOTS, RECORD_BYTES, SECTOR_BYTES, SlotRecord, Superblock, TABLE_OFFSET,
    TableEntry,
};
use super::index::Index;
use super::intents::Intents;
use super::missed::Missed;
use super::open::Standing;
use super::storages::Origin;
use super::tier::{Shared, State};
use super::{OpenReport, SsdError, SsdTier};
use crate::types::{BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange};
use parking_lot::MutexGuard;
use std::fmt;
use std::sync::atomic::Ordering;

/// Records put into the index before the mutex is given up for others: some tens of microseconds.
const CHUNK: u32 = 256;

/// What records are put into.
pub(super) struct Target<'a> {
    pub(super) index: &'a mut Index,
    pub(super) intents: &'a Intents,
    pub(super) report: &'a mut OpenReport,
    pub(super) missed: Option<&'a Missed>,
    /// Slots that count no more since the slab was opened.
    pub(super) outdated: &'a mut u64,
}

/// Where the reading of a slab's records is.
pub(super) struct Loading {
    found: Superblock,
    /// Slots whose records are read.
    end: u32,
    next: u32,
    /// By index in the table: the epoch that records must name; and that of entries which nobody vouches for.
    epochs: Vec<Option<u64>>,
    unvouched: Vec<Option<u64>>,
    /// The highest checkpoint that a record names.
    newest: u64,
    group: AlignedBuf,
}

impl fmt::Debug for Loading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loading").field("next", &self.next).field("end", &self.end).finish_non_exhaustive()
    }
}

impl Loading {
    /// Reads the table of a slab that was closed, or kept and not closed.
    pub(super) fn begin(
        device: &Device,
        len: u64,
        found: &Superblock,
        standing: Standing,
        index: &mut Index,
        report: &mut OpenReport,
    ) -> Result<Loading, SsdError> {
        let entries = found.table_end as usize;
        let mut buf = AlignedBuf::zeroed((entries * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES));
        device.read_what_can_be(TABLE_OFFSET, buf.get_mut());
        let (mut epochs, mut unvouched) = (vec![None; entries], vec![None; entries]);
        let origin = if found.clean { Origin::Closed } else { Origin::Recovered };
        for (i, bytes) in buf.get_mut().chunks_mut(ENTRY_BYTES).take(entries).enumerate() {
            match TableEntry::decode(&found.slab_id, i as u16, bytes) {
                format::Found::Valid(entry) if entry.stamp.is_none() && standing == Standing::Stranger => {
                    unvouched[i] = Some(entry.epoch);
                    bytes.fill(0);
                }
                format::Found::Valid(entry) if !index.storages.knows(&entry.identity) => {
                    epochs[i] = Some(entry.epoch);
                    index.storages.put(i as u16, entry, origin);
                }
                format::Found::Free => {}
                format::Found::Valid(_) | format::Found::Damaged => report.damaged_records += 1,
            }
        }
        // On the disk before the next run takes this one for the last that there was.
        if unvouched.iter().any(Option::is_some) {
            let written = device.write(TABLE_OFFSET, buf.get()).and_then(|()| device.sync());
            written.map_err(|e| device.error("write the storage table of", e))?;
        }
        // A slab cut short, or configured smaller than it was: what lies beyond the end is lost.
        let end = found.used_end.min(format::slots_in(len)).min(u64::from(index.limit()));
        report.slots_beyond_end = found.used_end - end;
        // No slab has more slots than a number of 32 bits can name, see `format::MAX_SLOTS`.
        let (end, group) = (end as u32, AlignedBuf::zeroed(GROUP_META_BYTES as usize));
        Ok(Loading { found: found.clone(), end, next: 0, epochs, unvouched, newest: 0, group })
    }

    /// Slots whose records are still to be read.
    pub(super) fn unread(&self) -> u64 {
        u64::from(self.end - self.next)
    }

    /// Reads the next group of records.
    fn read(&mut self, device: &Device) {
        let slots = (self.end - self.next).min(GROUP_SLOTS);
        let bytes = (slots as usize * RECORD_BYTES).next_multiple_of(SECTOR_BYTES);
        device.read_what_can_be(format::group_meta_offset(self.next / GROUP_SLOTS), &mut self.group.get_mut()[..bytes]);
    }

    /// Puts the next of the records that were read into the index.
    fn take(&mut self, target: &mut Target<'_>) {
        let (number, recovering) = (self.next, !self.found.clean);
        self.next += 1;
        let Target { index, intents, report, missed, outdated } = target;
        let at = (number % GROUP_SLOTS) as usize * RECORD_BYTES;
        let record = match SlotRecord::decode(&self.found.slab_id, number, &self.group.get()[at..at + RECORD_BYTES]) {
            format::Found::Free => {
                index.restore(None, recovering);
                return;
            }
            format::Found::Valid(record) => Some(record),
            format::Found::Damaged => None,
        };
        let found = &self.found;
        let record =
            record.filter(|r| r.checkpoint >= found.checkpoint && (recovering || r.checkpoint <= found.generation));
        self.newest = self.newest.max(record.as_ref().map_or(0, |r| r.checkpoint));
        let Some(mut record) = record else {
            report.damaged_records += 1;
            index.restore(None, recovering);
            index.touch(number);
            return;
        };
        let epoch = |epochs: &[Option<u64>]| epochs.get(usize::from(record.storage)).copied().flatten();
        let pages = PageRange { first: record.block * PAGES_PER_BLOCK, count: 1 };
        let taken = missed.map_or(PageMask::NONE, |m| m.of(record.storage, BlockIndex(record.block)));
        if epoch(&self.unvouched) == Some(record.epoch) {
            report.unvouched_slots += 1;
        } else if epoch(&self.epochs) != Some(record.epoch) {
            // After a crash its entry is older or newer than the record; a clean slab has them all.
            match recovering {
                true => report.orphaned_slots += 1,
                false => report.damaged_records += 1,
            }
        } else if index.storages.epoch(record.storage) != record.epoch {
            // Since the slab was opened.
            **outdated += 1;
        } else if recovering && intents.is_wanted(index.storages.regions(record.storage, pages)) {
            report.marked_slots += 1;
        } else if !taken.is_empty() && record.valid.minus(taken).is_empty() {
            // Nothing is left of it.
        } else {
            record.valid = record.valid.minus(taken);
            let restored = index.restore(Some(&record), recovering);
            if !restored || !taken.is_empty() {
                index.touch(number);
            }
            if !restored {
                match recovering {
                    true => report.duplicate_slots += 1,
                    false => report.damaged_records += 1,
                }
            }
            return;
        }
        index.restore(None, recovering);
        index.touch(number);
    }
}

impl State {
    fn target(&mut self) -> Target<'_> {
        let State { index, intents, report, missed, dropped_changed_store, .. } = self;
        Target { index, intents, report, missed: missed.as_ref(), outdated: dropped_changed_store }
    }
}

#[cfg(test)]
impl super::open::Opened {
    /// Reads the records of a slab that is not in use.
    pub(super) fn load(&mut self, device: &Device) {
        let Some(mut loading) = self.loading.take() else { return };
        while loading.next < loading.end {
            if loading.next.is_multiple_of(GROUP_SLOTS) {
                loading.read(device);
            }
            let (index, intents, report) = (&mut self.index, &self.intents, &mut self.report);
            loading.take(&mut Target { index, intents, report, missed: None, outdated: &mut 0 });
        }
        self.index.restore_hand(loading.found.hand);
        self.superblock.generation = self.superblock.generation.max(loading.newest);
        self.report.kept_slots = self.index.counters.used_slots;
        self.report.kept_pages = self.index.counters.valid_pages;
    }
}

impl SsdTier {
    /// Reads what [`SsdTier::open_at_once`] has left unread, and says what was found in all. Blocking I/O. Together with others
    /// who call it, or alone.
    pub fn load(&self) -> OpenReport {
        self.shared.load();
        self.shared.state.lock().report.clone()
    }

    /// Whether records are still to be read: what they stand for is not served yet, and nothing is inserted.
    pub fn is_loading(&self) -> bool {
        self.shared.is_loading.load(Ordering::Acquire)
    }
}

impl Shared {
    pub(super) fn load(&self) {
        while self.load_some(CHUNK) {}
    }

    /// Puts up to `most` records into the index. `false`: all are there, or nobody wants them any more.
    pub(super) fn load_some(&self, most: u32) -> bool {
        let mut loading = self.loading.lock();
        let Some(at) = loading.as_mut() else { return false };
        if at.next < at.end && at.next.is_multiple_of(GROUP_SLOTS) {
            let mut part = Some(0).filter(|_| at.next == 0);
            while let Some(now) = part {
                part = self.state.lock().index.reserve(now, u64::from(at.end));
            }
            at.read(&self.device);
        }
        let in_group = GROUP_SLOTS - at.next % GROUP_SLOTS;
        let mut state = self.state.lock();
        if !state.closed {
            let mut target = state.target();
            (0..most.min(at.end - at.next).min(in_group)).for_each(|_| at.take(&mut target));
            self.unread.store(at.unread(), Ordering::Relaxed);
            if at.next < at.end {
                let forgotten = state.missed.as_mut().map(Missed::take_forgotten);
                // To whoever waits: a guest's request does, and this thread would have it again before that wakes.
                MutexGuard::unlock_fair(state);
                drop(forgotten);
                return true;
            }
        }
        drop(state);
        let mut part = Some(0);
        while let Some(now) = part {
            part = self.state.lock().index.fit(now, u64::from(at.end));
        }
        let mut state = self.state.lock();
        let hand = at.found.hand;
        state.index.restore_hand(hand);
        // Above all that records name: the next checkpoint's number is its own.
        state.superblock.generation = state.superblock.generation.max(at.newest);
        state.report.kept_slots = state.index.counters.used_slots;
        state.report.kept_pages = state.index.counters.valid_pages;
        let missed = state.missed.take();
        *loading = None;
        self.unread.store(0, Ordering::Relaxed);
        self.is_loading.store(false, Ordering::Release);
        drop(state);
        // It may have a million runs.
        drop(missed);
        false
    }
}
