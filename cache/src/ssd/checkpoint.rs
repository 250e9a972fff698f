//! A checkpoint of a slab in use: what changed goes to the disk, then the regions that nobody writes to any more are
//! cleared from the bitmap.
//!
//! In steps, so that whoever runs it can ask the stores to flush in between, and tests can cut it off anywhere:
//!
//! 1. Begin. Writes that are under way or come from now on keep their regions marked. Storages that were written to are
//!    handed out ([`Checkpoint::unflushed`]): they are to flush until step 5; those whose flush fails keep all of theirs.
//! 2. The bitmap, as far as something waits there: a record must not reach the disk before the bit that may belong to it.
//! 3. The storage table, then records, by sectors of 64 that changed. Sync.
//! 4. If slots or entries beyond the ends that the superblock names are in use: the superblock, twice.
//! 5. The bitmap without what was not written to since 1. Sync.
//!
//! A failure at any point leaves what was there, marked again as changed.

use super::device::AlignedBuf;
use super::format::{
    self, ENTRY_BYTES, GROUP_META_BYTES, GROUP_SLOTS, RECORD_BYTES, SECTOR_BYTES, TABLE_ENTRIES, TABLE_OFFSET,
};
use super::health::Work;
use super::index::RECORDS_A_SECTOR;
use super::open::{self, Mark};
use super::storages::{Displaced, Unflushed};
use super::tier::{Shared, Trust};
use super::{SsdStorage, SsdTier};
use parking_lot::MutexGuard;
use std::io;

/// Sectors of records encoded and written in one go: some 40 µs under the mutex.
const SECTORS_A_WRITE: u32 = 16;
pub(super) const SECTORS_A_GROUP: u32 = (GROUP_META_BYTES as usize / SECTOR_BYTES) as u32;

/// What is to be done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Bitmap,
    Table,
    Records { from: u32 },
    Sync,
    Raise,
    Clear,
    Done,
}

/// Whether a checkpoint goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    More,
    /// It is complete: so many regions were cleared.
    Done {
        cleared: u64,
    },
}

/// A checkpoint under way, see [`SsdTier::begin_checkpoint`].
#[derive(Debug)]
pub struct Checkpoint<'a> {
    shared: &'a Shared,
    _alone: MutexGuard<'a, ()>,
    number: u64,
    phase: Phase,
    unflushed: Vec<Unflushed>,
    /// Sectors of records that this checkpoint has written, and not yet synced.
    written: Vec<u32>,
    used_end: u64,
    table_end: u32,
    /// Storages whose entries this checkpoint takes off the disk.
    displaced: Displaced,
}

impl SsdTier {
    /// Begins a checkpoint, unless nothing would come of it. Waits for one that is under way.
    pub fn begin_checkpoint(&self) -> Option<Checkpoint<'_>> {
        self.shared.begin_checkpoint()
    }
}

impl Shared {
    fn begin_checkpoint(&self) -> Option<Checkpoint<'_>> {
        let alone = self.keeping.lock();
        self.own.tick();
        let mut state = self.state.lock();
        let idle = state.index.next_changed(0).is_none()
            && !state.index.storages.has_changed()
            && !state.index.storages.any_unflushed()
            && state.intents.marked() == 0;
        if state.closed
            || state.missed.is_some()
            || state.trust != Trust::Ok
            || idle
            || !state.health.usable(|| (self.clock)())
        {
            return None;
        }
        state.superblock.generation += 1;
        let number = state.superblock.generation;
        // Before the bitmap is written: writes that come later wait for their bits.
        let table_end = state.index.storages.put_on_disk().max(state.superblock.table_end);
        state.intents.begin_checkpoint();
        let unflushed = state.index.storages.take_unflushed();
        for storage in unflushed.iter().filter(|storage| !storage.open) {
            state.intents.keep(storage.regions);
            state.index.storages.not_flushed(storage.storage);
        }
        let unflushed = unflushed.into_iter().filter(|storage| storage.open).collect();
        let used_end = state.superblock.used_end.max(wanted_end(state.index.len(), state.index.limit()));
        // What lies between the old end and the new one may be from before the slab was last opened.
        if used_end > state.superblock.used_end {
            let first = (state.superblock.used_end / u64::from(RECORDS_A_SECTOR)) as u32;
            let end = used_end.div_ceil(u64::from(RECORDS_A_SECTOR)) as u32;
            (first..end).for_each(|sector| state.index.touch_sector(sector));
        }
        if table_end > state.superblock.table_end {
            state.index.storages.touch();
        }
        let displaced = state.index.storages.displaced();
        drop(state);
        let (phase, written) = (Phase::Bitmap, Vec::new());
        Some(Checkpoint {
            shared: self,
            _alone: alone,
            number,
            phase,
            unflushed,
            written,
            used_end,
            table_end,
            displaced,
        })
    }

    /// Writes the whole table up to the end of what is in use.
    pub(super) fn write_table(&self) -> io::Result<()> {
        let (mut buf, len) = (AlignedBuf::zeroed(TABLE_ENTRIES * ENTRY_BYTES), {
            let mut state = self.state.lock();
            state.index.storages.take_changed();
            state.superblock.table_end.max(state.index.storages.on_disk_end())
        });
        let len = (len as usize * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES);
        {
            let state = self.state.lock();
            // Of a storage whose records have not been read yet it is not known whether it has slots.
            for (index, entry) in state.index.storages.kept_on_disk(state.missed.is_some()) {
                let at = usize::from(index) * ENTRY_BYTES;
                if let Some(to) = buf.get_mut().get_mut(at..at + ENTRY_BYTES) {
                    entry.encode(&state.superblock.slab_id, index, to);
                }
            }
        }
        let written = self.device.write(TABLE_OFFSET, &buf.get()[..len]);
        if written.is_err() {
            self.state.lock().index.storages.touch();
        }
        written
    }
}

/// Slots below which all records are to be on the disk: whole groups, so that the superblock is seldom written.
fn wanted_end(len: u32, limit: u32) -> u64 {
    u64::from(len).next_multiple_of(u64::from(GROUP_SLOTS)).min(u64::from(limit))
}

impl Checkpoint<'_> {
    /// Storages in use whose stores must be flushed before their regions can be cleared, with
    /// [`Checkpoint::not_flushed`] for those that could not be.
    pub fn unflushed(&self) -> Vec<SsdStorage> {
        self.unflushed.iter().map(|storage| storage.storage).collect()
    }

    /// The store could not be flushed: its regions stay marked.
    pub fn not_flushed(&mut self, s: SsdStorage) {
        let mut state = self.shared.state.lock();
        for storage in self.unflushed.iter().filter(|storage| storage.storage == s) {
            state.intents.keep(storage.regions);
            state.index.storages.not_flushed(s);
        }
    }

    /// Whether the next step clears regions: what stores have not made durable must be known by then. Up to there they can
    /// flush while records are written.
    pub fn is_about_to_clear(&self) -> bool {
        self.phase == Phase::Clear
    }

    /// Does a part of the work, with at most one write or sync, but for superblocks and intents. Blocking I/O.
    ///
    /// # Errors
    /// The device failed; the checkpoint came to nothing.
    pub fn step(&mut self) -> io::Result<Step> {
        let result = self.advance();
        if let Err(error) = &result {
            let mut state = self.shared.state.lock();
            self.written.drain(..).for_each(|sector| state.index.touch_sector(sector));
            state.index.storages.touch();
            drop(state);
            self.phase = Phase::Done;
            let what = format!("writing a checkpoint failed: {error}");
            self.shared.note_failure(Work::Write, &what, |state| state.io_errors += 1);
        }
        result
    }

    fn advance(&mut self) -> io::Result<Step> {
        let shared = self.shared;
        self.phase = match self.phase {
            Phase::Bitmap => {
                while shared.write_intents() {}
                let state = shared.state.lock();
                if state.trust != Trust::Ok || state.closed {
                    return Err(io::Error::other("the bitmap could not be written"));
                }
                Phase::Table
            }
            Phase::Table => {
                let changed = shared.state.lock().index.storages.has_changed();
                if changed {
                    shared.write_table()?;
                }
                Phase::Records { from: 0 }
            }
            Phase::Records { from } => match self.write_records(from)? {
                Some(from) => Phase::Records { from },
                None => Phase::Sync,
            },
            Phase::Sync => {
                shared.device.sync()?;
                self.written.clear();
                let mut state = shared.state.lock();
                state.index.storages.forget_displaced(&self.displaced);
                let raise = self.used_end > state.superblock.used_end || self.table_end > state.superblock.table_end;
                if raise { Phase::Raise } else { Phase::Clear }
            }
            Phase::Raise => {
                let mut superblock = {
                    let state = shared.state.lock();
                    let mut superblock = state.superblock.clone();
                    superblock.used_end = self.used_end;
                    superblock.table_end = self.table_end;
                    superblock.hand = u64::from(state.index.hand());
                    superblock
                };
                let marked = open::mark(&shared.device, &mut superblock, Mark::Kept);
                let mut state = shared.state.lock();
                state.superblock.generation = state.superblock.generation.max(superblock.generation);
                marked?;
                state.superblock = superblock;
                Phase::Clear
            }
            Phase::Clear => {
                let cleared = shared.state.lock().intents.clear_unseen();
                while shared.write_intents() {}
                shared.state.lock().checkpoints += 1;
                self.unflushed.clear();
                self.phase = Phase::Done;
                return Ok(Step::Done { cleared });
            }
            Phase::Done => return Ok(Step::Done { cleared: 0 }),
        };
        Ok(Step::More)
    }

    /// Writes the next run of changed sectors at or after `from`. Returns where to go on.
    fn write_records(&mut self, from: u32) -> io::Result<Option<u32>> {
        let mut state = self.shared.state.lock();
        let Some(first) = state.index.next_changed(from) else { return Ok(None) };
        let end = state.index.changed_run(first, SECTORS_A_WRITE.min(SECTORS_A_GROUP - first % SECTORS_A_GROUP));
        let mut buf = AlignedBuf::zeroed((end - first) as usize * SECTOR_BYTES);
        let slab_id = state.superblock.slab_id;
        for sector in first..end {
            self.written.push(sector);
            let to = &mut buf.get_mut()[(sector - first) as usize * SECTOR_BYTES..][..SECTOR_BYTES];
            state.index.take_sector(sector, self.number, self.number, |slot, record| {
                let at = (slot % RECORDS_A_SECTOR) as usize * RECORD_BYTES;
                record.encode(&slab_id, slot, &mut to[at..at + RECORD_BYTES]);
            });
        }
        drop(state);
        let within = u64::from(first % SECTORS_A_GROUP) * SECTOR_BYTES as u64;
        let offset = format::group_meta_offset(first / SECTORS_A_GROUP) + within;
        self.shared.device.write(offset, buf.get())?;
        Ok(Some(end))
    }
}

impl Drop for Checkpoint<'_> {
    /// Cut off: what it wrote may be there or not, and what it was to have flushed is the next one's to ask for.
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        self.written.drain(..).for_each(|sector| state.index.touch_sector(sector));
        self.unflushed.drain(..).for_each(|storage| state.index.storages.not_flushed(storage.storage));
    }
}
