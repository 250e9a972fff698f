//! Another size for a slab in use: guests are served and checkpoints are written meanwhile.
//!
//! In steps, so that tests can cut it off anywhere and let other things happen in between.
//!
//! *Growing*: 1. the file is made longer, its blocks allocated where that is wanted; 2. the superblock with the new number of
//! slots, twice; 3. the slots are given out. A crash leaves a slab whose file is longer than it says, which opening takes as it
//! takes any other length. Records of the new slots lie beyond `used end` until a checkpoint has written all of them
//! ([`super::checkpoint`], step 4): what an earlier, larger slab left there never counts.
//!
//! *Shrinking*: 1. slots beyond the new end are given out no more, what they hold is dropped; 2. reads and writes of them that
//! are under way end; 3. the superblock, twice, with `used end` no higher than the new number of slots: from here on their
//! records are gone for good, since nothing beyond `used end` is ever read; 4. the slots are forgotten, and with them what
//! checkpoints would have written of them; 5. the file is cut. 3 to 4 exclude checkpoints, which are what clears regions: as long
//! as a record counts, the region that makes it untrue stays marked. A crash before 3 leaves records of slots that were dropped,
//! which is what any crash after a drop leaves; one after it a file that is longer than need be.
//!
//! What does not come to an end is taken back: the slots that were dropped are free again.

use super::format::{self, MAX_SLOTS, Superblock};
use super::health::Work;
use super::open::{self, Mark};
use super::slots::Beyond;
use super::tier::{Shared, Trust};
use super::{SsdError, SsdTier};
use parking_lot::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Slots looked at before the mutex is given up for others.
const CHUNK: u32 = 2048;

/// Whether a change of size goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResizeStep {
    More,
    /// So many slots beyond the new end are being read or written: to be tried again in a moment.
    Held {
        slots: u32,
    },
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Lengthen,
    Name,
    Drop { from: u32 },
    Sift,
    Wait { from: u32, seen: Beyond },
    Lower { retired: u32 },
    Cut,
    Done,
}

/// A change of size under way, see [`SsdTier::begin_resize`]. Dropped before it is done it is taken back.
#[derive(Debug)]
pub struct Resize<'a> {
    shared: &'a Shared,
    _alone: MutexGuard<'a, ()>,
    before: u32,
    after: u32,
    phase: Phase,
}

impl SsdTier {
    /// Begins to give the slab another size: `size_bytes` with its metadata; 0 for all of a block device. Waits for a change
    /// that is under way.
    ///
    /// # Errors
    /// The size is out of range or beyond the device, or the tier is closed, bypassed or [loading](SsdTier::is_loading).
    pub fn begin_resize(&self, size_bytes: u64) -> Result<Resize<'_>, SsdError> {
        let shared = &*self.shared;
        let alone = shared.resizing.lock();
        let left = shared.unread.load(Ordering::Relaxed);
        if shared.is_loading.load(Ordering::Acquire) {
            return Err(SsdError::StillReading { path: shared.device.path.clone(), left });
        }
        let len = shared.device.len()?;
        let after = open::wanted_slots(&shared.device, size_bytes, len)?;
        shared.fit_to_resize()?;
        let before = shared.state.lock().index.limit();
        let phase = match after.cmp(&before) {
            std::cmp::Ordering::Greater => Phase::Lengthen,
            std::cmp::Ordering::Equal => Phase::Done,
            std::cmp::Ordering::Less => {
                shared.state.lock().index.set_limit(after);
                Phase::Drop { from: after }
            }
        };
        Ok(Resize { shared, _alone: alone, before, after, phase })
    }

    /// Size of the slab in bytes, metadata included.
    pub fn size_bytes(&self) -> u64 {
        format::slab_bytes(u64::from(self.shared.state.lock().index.limit()))
    }

    /// What to say when the device does not answer.
    pub fn not_answering(&self) -> SsdError {
        SsdError::NotAnswering { path: self.shared.device.path.clone() }
    }

    /// What to say when a shrink has been held up for too long.
    pub fn still_in_use(&self, slots: u32) -> SsdError {
        SsdError::StillInUse { path: self.shared.device.path.clone(), slots }
    }
}

impl Shared {
    fn fit_to_resize(&self) -> Result<(), SsdError> {
        let state = self.state.lock();
        if state.closed {
            return Err(SsdError::Closed);
        }
        match state.trust {
            Trust::Ok => Ok(()),
            Trust::Vetoing | Trust::Vetoed => Err(SsdError::Bypassed { path: self.device.path.clone() }),
        }
    }

    /// Writes the superblock with another number of slots. Its caller keeps checkpoints away.
    fn name_slots(&self, slots: u32) -> Result<(), SsdError> {
        self.fit_to_resize()?;
        let slots = u64::from(slots).min(MAX_SLOTS);
        let mut superblock = {
            let state = self.state.lock();
            let found = state.superblock.clone();
            Superblock { slots, used_end: found.used_end.min(slots), hand: u64::from(state.index.hand()), ..found }
        };
        let marked = open::mark(&self.device, &mut superblock, Mark::Kept);
        let mut state = self.state.lock();
        state.superblock.generation = state.superblock.generation.max(superblock.generation);
        if let Err(error) = marked {
            // The disk may have it or not. What lies beyond is written anew before it counts again.
            state.superblock.used_end = superblock.used_end;
            drop(state);
            let what = format!("writing its superblock failed: {error}");
            self.note_failure(Work::Write, &what, |state| state.io_errors += 1);
            return Err(self.device.error("write the superblock of", error));
        }
        state.superblock = superblock;
        Ok(())
    }
}

impl Resize<'_> {
    /// Size of the slab before, in bytes.
    pub fn before_bytes(&self) -> u64 {
        format::slab_bytes(u64::from(self.before))
    }

    /// Size of the slab when it is done.
    pub fn after_bytes(&self) -> u64 {
        format::slab_bytes(u64::from(self.after))
    }

    /// How long the next part may take on a device that answers: allocating the blocks of a file may be a long way.
    pub fn patience(&self) -> Duration {
        match self.phase {
            Phase::Lengthen => Duration::from_secs(60),
            _ => Duration::from_secs(5),
        }
    }

    /// Does a part of the work. Blocking I/O.
    ///
    /// # Errors
    /// There is no room, the device failed, or the tier was closed or bypassed meanwhile. The slab has the size it had, but what
    /// lay beyond the new end is dropped.
    pub fn step(&mut self) -> Result<ResizeStep, SsdError> {
        let (shared, after) = (self.shared, self.after);
        self.phase = match self.phase {
            Phase::Lengthen => {
                if !shared.device.is_block_device {
                    shared.device.set_len(self.after_bytes(), shared.preallocate)?;
                }
                Phase::Name
            }
            Phase::Name => {
                let _keeping = shared.keeping.lock();
                shared.name_slots(after)?;
                shared.state.lock().index.set_limit(after);
                Phase::Done
            }
            Phase::Drop { from } => match shared.state.lock().index.drop_beyond(from, CHUNK) {
                Some(from) => Phase::Drop { from },
                None => Phase::Sift,
            },
            Phase::Sift => match shared.state.lock().index.sift(CHUNK) {
                true => Phase::Wait { from: after, seen: Beyond::default() },
                false => Phase::Sift,
            },
            Phase::Wait { from, mut seen } => {
                let next = shared.state.lock().index.look_beyond(from, CHUNK, &mut seen);
                match next {
                    Some(from) => Phase::Wait { from, seen },
                    None if seen.held == 0 => Phase::Lower { retired: seen.retired },
                    None => {
                        self.phase = Phase::Wait { from: after, seen: Beyond::default() };
                        return Ok(ResizeStep::Held { slots: seen.held });
                    }
                }
            }
            Phase::Lower { retired } => {
                let _keeping = shared.keeping.lock();
                shared.name_slots(after)?;
                shared.state.lock().index.end_shrink(retired);
                Phase::Cut
            }
            Phase::Cut => {
                self.phase = Phase::Done;
                if !shared.device.is_block_device
                    && let Err(error) = shared.device.set_len(self.after_bytes(), false)
                {
                    let path = shared.device.path.display();
                    tracing::warn!(%path, %error, "SSD tier: it is smaller, but its file is not");
                }
                Phase::Done
            }
            Phase::Done => Phase::Done,
        };
        Ok(if self.phase == Phase::Done { ResizeStep::Done } else { ResizeStep::More })
    }
}

impl Drop for Resize<'_> {
    /// Cut off: slots that were to go are free again; a file that was made longer stays so until the next change or start.
    fn drop(&mut self) {
        match self.phase {
            Phase::Name if !self.shared.device.is_block_device => {
                let _ = self.shared.device.set_len(self.before_bytes(), false);
            }
            Phase::Drop { .. } | Phase::Sift | Phase::Wait { .. } | Phase::Lower { .. } => {
                let mut next = Some(self.after);
                self.shared.state.lock().index.set_limit(self.before);
                // The list that was being sorted is one again.
                while !self.shared.state.lock().index.sift(CHUNK) {}
                while let Some(from) = next {
                    next = self.shared.state.lock().index.take_back(from, CHUNK);
                }
            }
            _ => {}
        }
    }
}
