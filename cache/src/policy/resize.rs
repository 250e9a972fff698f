//! Growing and shrinking of the RAM tier, in steps that each take the lock for a moment.
//!
//! Who shrinks says how many slots are to stay ([`Core::begin_shrink`]). From then on no slot beyond them is given out, and
//! [`Core::shrink_step`] goes through those: free ones are *withdrawn*; the block of another moves to a slot that stays, for
//! which the policy lets another block go where none is free. A slot that somebody reads or fills is passed over and looked at
//! again. When all are withdrawn [`Core::end_shrink`] forgets them. [`Core::grow_step`] adds slots, and takes a shrink back.

use super::evict::For;
use super::ghost::Ghost;
use super::list::Link;
use super::{Core, Entry, Place};
use crate::types::PageMask;
use std::time::Duration;

/// Slots that a step of a shrink looks at.
const LOOKS: u32 = 1024;
/// Of these, blocks that it moves: 1 MiB is copied in some 100 µs.
const MOVES: u32 = 16;
/// Blocks that leave for one that moves: each may have been in a slot that is to go itself.
const EVICTIONS: u32 = 16;
/// Slots that a step adds: half a megabyte of index.
const GROWS: u32 = 1 << 14;

/// How far one step of a shrink came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShrinkStep {
    /// Where to go on: slots from here up have been looked at. At the number of slots that stay the round is over.
    pub next: u32,
    /// Slots that were passed over because somebody reads or fills them.
    pub held: u32,
}

impl Core {
    /// Slots that there are, also while they are becoming fewer.
    pub fn slots_now(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Adds slots up to `slots` in all, a part of them. Returns whether there are so many now. The arena has them already.
    pub fn grow_step(&mut self, slots: u32) -> bool {
        if slots > self.config.slots && self.entries.len() < slots as usize {
            self.entries.reserve_exact(slots as usize - self.entries.len());
            self.links.reserve_exact(slots as usize - self.links.len());
        }
        let end = slots.min(self.config.slots.saturating_add(GROWS));
        while self.config.slots < end {
            let slot = self.config.slots;
            self.config.slots += 1;
            if slot as usize == self.entries.len() {
                self.entries.push(Entry::BLANK);
                self.links.push(Link::default());
            } else if !self.links[slot as usize].is_withdrawn() {
                // A shrink is taken back that had not come this far.
                continue;
            }
            self.free.push_head(&mut self.links, slot);
        }
        let done = self.config.slots >= slots;
        if done {
            self.forget_ghosts();
        }
        done
    }

    /// From now on no slot from `slots` on is given out.
    pub fn begin_shrink(&mut self, slots: u32) {
        self.config.slots = self.config.slots.min(slots);
    }

    /// Looks at some of the slots that are to go, below `below` and from the top. `copy` copies pages of a block from one slot to
    /// another, and says whether it could.
    pub fn shrink_step(
        &mut self,
        below: u32,
        now: Duration,
        mut copy: impl FnMut(u32, u32, PageMask) -> bool,
    ) -> ShrinkStep {
        let first = below.saturating_sub(LOOKS).max(self.config.slots);
        let (mut next, mut held, mut moves) = (below, 0, 0);
        while next > first && moves < MOVES {
            next -= 1;
            let slot = next;
            if self.links[slot as usize].is_withdrawn() {
                continue;
            }
            let entry = &self.entries[slot as usize];
            if self.guard.busy(slot) || !entry.filling.is_empty() {
                held += 1;
            } else if entry.place == Place::Free {
                self.free.remove(&mut self.links, slot);
                self.links[slot as usize] = Link::WITHDRAWN;
            } else {
                moves += 1;
                held += u32::from(!self.vacate(slot, now, &mut copy));
            }
        }
        ShrinkStep { next, held }
    }

    /// Moves the block of a slot that is to go to one that stays. False: there is none now.
    fn vacate(&mut self, slot: u32, now: Duration, copy: &mut impl FnMut(u32, u32, PageMask) -> bool) -> bool {
        if self.config.slots == 0 {
            self.discard(slot);
            return true;
        }
        let mut to = self.pop_free();
        for _ in 0..EVICTIONS {
            if to.is_some() || self.evict(For::Demand, now).is_none() {
                break;
            }
            if self.links[slot as usize].is_withdrawn() {
                // It was the one to leave.
                return true;
            }
            to = self.pop_free();
        }
        let Some(to) = to else { return false };
        let entry = self.entries[slot as usize];
        if !copy(slot, to, entry.valid) {
            self.free.push_head(&mut self.links, to);
            return false;
        }
        self.replace(slot, to);
        self.entries[to as usize] = entry;
        if let Ok(mut found) = self.table.find_entry(entry.key.hash64(), |s| *s == slot) {
            *found.get_mut() = to;
        }
        self.entries[slot as usize] = Entry::BLANK;
        self.links[slot as usize] = Link::WITHDRAWN;
        true
    }

    /// Forgets the slots that are to go. False: not all of them are withdrawn.
    pub fn end_shrink(&mut self) -> bool {
        let slots = self.config.slots as usize;
        if self.links[slots..].iter().any(|link| !link.is_withdrawn()) {
            return false;
        }
        self.entries.truncate(slots);
        self.entries.shrink_to_fit();
        self.links.truncate(slots);
        self.links.shrink_to_fit();
        let entries = &self.entries;
        self.table.shrink_to(0, |slot| entries[*slot as usize].key.hash64());
        if slots == 0 {
            // There is no room for any of it.
            for storage in self.storages.iter_mut().flatten() {
                storage.counters.cancelled += storage.queue.clear();
            }
        }
        self.forget_ghosts();
        true
    }

    /// Ghosts count in evictions from a tier of a size.
    fn forget_ghosts(&mut self) {
        self.ghost = Ghost::new(self.config.slots);
        self.lapsed = Ghost::new(self.config.slots);
    }
}
