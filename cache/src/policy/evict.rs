//! Eviction, as [`Eviction`] says.
//!
//! The engine's is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP '23) with a third queue
//! in front, probation, for prefetched blocks that nobody has used.
//!
//! - a block that demand brought in enters *small* (a tenth of the slots), or *main* if it is a ghost
//! - leaving *small*: used again → *main*, else it becomes a ghost
//! - leaving *main*: used since → once more around, else out
//! - a prefetched block enters *probation*; its first use moves it to *small* as if it had just come in; unused it
//!   leaves first, as soon as it has been there for `probation_age` or probation is over its share, which adapts
//!
//! LRU is there to compare with: every block is in *main*, each use moves it to the head, and the tail leaves.

use super::list::List;
use super::{Core, Entry, Key, OutcomeKind, Place};
use crate::types::PageMask;
use std::time::Duration;

/// A use counts up to this, as in the paper: two bits.
const MAX_FREQUENCY: u8 = 3;
/// Pages of busy victims that are stepped over before the search gives up and the caller goes without a slot.
const SEARCH_PAGES: u64 = 1024;

/// A prefetch that is wanted within this time may take the place of an older one; one wanted later can wait for room,
/// unless it is twice as likely to be used.
const WANTED_NOW: Duration = Duration::from_secs(1);
/// Probation never takes more than this share of the slots, and starts with it: a guest whose reads come back takes slots
/// from it soon, one that only streams has no use for more.
pub(super) const MAX_SHARE: f64 = 0.9;

/// Which block leaves when room is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Eviction {
    /// S3-FIFO (Yang et al., SOSP '23) with probation for prefetched blocks.
    #[default]
    S3Fifo,
    /// The block that was not used for longest. A prefetched block counts as used when its load starts, and neither
    /// [`CoreConfig::probation_share`](super::CoreConfig::probation_share) nor its age applies.
    Lru,
}

/// Why a slot is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum For {
    Demand,
    /// Pages expected to be used at `due`, with a probability in 255ths.
    Prefetch {
        due: Duration,
        likely: u8,
    },
}

impl Core {
    fn list(&mut self, place: Place) -> Option<&mut List> {
        match place {
            Place::Free => None,
            Place::Probation => Some(&mut self.probation),
            Place::Small => Some(&mut self.small),
            Place::Main => Some(&mut self.main),
        }
    }

    pub(super) fn unlink(&mut self, slot: u32) {
        match self.entries[slot as usize].place {
            Place::Free => {}
            Place::Probation => self.probation.remove(&mut self.links, slot),
            Place::Small => self.small.remove(&mut self.links, slot),
            Place::Main => self.main.remove(&mut self.links, slot),
        }
        self.entries[slot as usize].place = Place::Free;
    }

    pub(super) fn link(&mut self, slot: u32, place: Place) {
        match place {
            Place::Free => {}
            Place::Probation => self.probation.push_head(&mut self.links, slot),
            Place::Small => self.small.push_head(&mut self.links, slot),
            Place::Main => self.main.push_head(&mut self.links, slot),
        }
        self.entries[slot as usize].place = place;
    }

    /// Puts `to` in a slot's place in its queue.
    pub(super) fn replace(&mut self, slot: u32, to: u32) {
        match self.entries[slot as usize].place {
            Place::Free => {}
            Place::Probation => self.probation.replace(&mut self.links, slot, to),
            Place::Small => self.small.replace(&mut self.links, slot, to),
            Place::Main => self.main.replace(&mut self.links, slot, to),
        }
    }

    /// Demand wants the block: off probation, or one more use if it read pages of it before.
    pub(super) fn touch(&mut self, slot: u32, again: bool) {
        if self.config.eviction == Eviction::Lru {
            self.unlink(slot);
            self.link(slot, Place::Main);
            return;
        }
        let entry = &mut self.entries[slot as usize];
        if entry.place == Place::Probation {
            let key = entry.key;
            self.unlink(slot);
            self.admit(slot, key);
        } else if again {
            entry.frequency = (entry.frequency + 1).min(MAX_FREQUENCY);
        }
    }

    fn admit(&mut self, slot: u32, key: Key) {
        let place = if self.ghost.take(key.hash64()) { Place::Main } else { Place::Small };
        self.entries[slot as usize].frequency = 0;
        self.link(slot, place);
    }

    /// A slot for `key`, empty and linked in its first queue. `None` if every candidate is busy, or if the slot is for
    /// a prefetch and probation is full of blocks that may still be used.
    pub(super) fn allocate(&mut self, key: Key, purpose: For, now: Duration) -> Option<u32> {
        if key == Key::NOWHERE {
            return None;
        }
        if purpose == For::Demand && self.config.eviction == Eviction::S3Fifo {
            self.learn_share(key);
        }
        let slot = match self.pop_free() {
            Some(slot) => slot,
            None => {
                self.evict(purpose, now)?;
                self.pop_free()?
            }
        };
        let version = self.entries[slot as usize].version.wrapping_add(1);
        self.entries[slot as usize] =
            Entry { key, version, entered_ds: (now.as_millis() / 100) as u32, ..Entry::BLANK };
        self.insertions += 1;
        let entries = &self.entries;
        self.table.insert_unique(key.hash64(), slot, |s| entries[*s as usize].key.hash64());
        match (self.config.eviction, purpose) {
            (Eviction::Lru, _) => self.link(slot, Place::Main),
            (Eviction::S3Fifo, For::Demand) => self.admit(slot, key),
            (Eviction::S3Fifo, For::Prefetch { .. }) => self.link(slot, Place::Probation),
        }
        Some(slot)
    }

    /// A block is missed. Had it left probation unused, probation was too small; had it left the small queue, what is in
    /// use had too little: the border moves by a slot, as ARC's does (Megiddo & Modha, FAST 2003).
    fn learn_share(&mut self, key: Key) {
        let slot = 1.0 / f64::from(self.config.slots.max(1));
        if self.lapsed.take(key.hash64()) {
            self.probation_share = (self.probation_share + slot).min(MAX_SHARE);
        } else if self.ghost.holds(key.hash64()) {
            self.probation_share = (self.probation_share - slot).max(self.config.probation_share);
        }
    }

    /// Slots to look at.
    fn search(&self) -> usize {
        (SEARCH_PAGES / self.config.block_pages) as usize
    }

    /// A free slot that nothing holds: a task may still be copying out of one that was just freed.
    pub(super) fn pop_free(&mut self) -> Option<u32> {
        let mut slot = self.free.head()?;
        for _ in 0..self.search() {
            // Those beyond are on their way out, see `resize.rs`.
            if slot < self.config.slots && !self.guard.busy(slot) {
                self.free.remove(&mut self.links, slot);
                return Some(slot);
            }
            slot = List::towards_tail(&self.links, slot)?;
        }
        None
    }

    /// Frees one slot.
    pub(super) fn evict(&mut self, purpose: For, now: Duration) -> Option<()> {
        if self.config.eviction == Eviction::Lru {
            return self.evict_tail(Place::Main).then_some(());
        }
        let cap = (f64::from(self.config.slots) * self.probation_share) as u32;
        let now_ds = (now.as_millis() / 100) as u32;
        let age_ds = (self.config.probation_age.as_millis() / 100) as u32;
        let expired = self
            .probation
            .tail()
            .is_some_and(|slot| now_ds.saturating_sub(self.entries[slot as usize].entered_ds) >= age_ds);
        let over = self.probation.len() > cap;
        if (expired || over) && self.evict_tail(Place::Probation) {
            return Some(());
        }
        if let For::Prefetch { due, likely } = purpose
            && self.probation.len() >= cap.max(1)
        {
            // Room for a guess is not made at the expense of what is in use. One that is wanted now, or far likelier, is
            // worth more than the oldest that nobody has come for; another waits.
            let oldest = self.probation.tail().map_or(0, |slot| self.entries[slot as usize].likely);
            let better = due <= now + WANTED_NOW || likely / 2 > oldest;
            return (better && self.evict_tail(Place::Probation)).then_some(());
        }
        for _ in 0..2 * self.config.slots {
            let small_target = (self.config.slots / 10).max(1);
            let from_small = self.small.len() > small_target || self.main.len() == 0;
            if from_small && self.small.len() > 0 {
                let Some(slot) = self.victim(Place::Small) else { break };
                if self.entries[slot as usize].frequency > 0 {
                    self.unlink(slot);
                    self.entries[slot as usize].frequency = 0;
                    self.link(slot, Place::Main);
                    continue;
                }
                let hash = self.entries[slot as usize].key.hash64();
                self.ghost.insert(hash);
                self.discard(slot);
                return Some(());
            }
            if self.main.len() == 0 {
                break;
            }
            let Some(slot) = self.victim(Place::Main) else { break };
            let frequency = self.entries[slot as usize].frequency;
            if frequency > 0 {
                self.unlink(slot);
                self.entries[slot as usize].frequency = frequency - 1;
                self.link(slot, Place::Main);
                continue;
            }
            self.discard(slot);
            return Some(());
        }
        // Everything else is busy or there is nothing else: probation, for demand only.
        (purpose == For::Demand && self.evict_tail(Place::Probation)).then_some(())
    }

    fn evict_tail(&mut self, place: Place) -> bool {
        match self.victim(place) {
            Some(slot) => {
                self.discard(slot);
                true
            }
            None => false,
        }
    }

    /// The oldest slot of a queue that nothing holds.
    fn victim(&mut self, place: Place) -> Option<u32> {
        let mut slot = self.list(place)?.tail()?;
        for _ in 0..self.search() {
            let entry = &self.entries[slot as usize];
            if entry.filling.is_empty() && !self.guard.busy(slot) {
                return Some(slot);
            }
            slot = List::towards_head(&self.links, slot)?;
        }
        None
    }

    /// Drops a block that nothing holds.
    pub(super) fn discard(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        let (valid, unused) = (entry.valid, entry.unused);
        entry.valid = PageMask::NONE;
        entry.unused = PageMask::NONE;
        self.valid_pages -= valid.count();
        self.evictions += 1;
        if !unused.is_empty() {
            let hash = self.entries[slot as usize].key.hash64();
            self.lapsed.insert(hash);
        }
        self.report(slot, unused, OutcomeKind::Evicted);
        self.report(slot, valid.minus(unused), OutcomeKind::Left);
        self.release(slot);
    }
}
