//! Reads and fills.

use super::evict::For;
use super::{Core, Entry, Key, OutcomeKind, Place};
use crate::types::{BlockIndex, PageMask, PageRange, StorageId};
use std::time::Duration;

/// What to do for the pages of one block that a read wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockPlan {
    pub block: BlockIndex,
    pub wanted: PageMask,
    /// Where the block lives or will live; `None`: no slot can be had, read past the cache.
    pub slot: Option<u32>,
    /// Valid now.
    pub hit: PageMask,
    /// Being filled by somebody else: wait, then plan again.
    pub wait: PageMask,
    /// Of those, prefetches that come too late.
    pub late: PageMask,
    /// The caller fills these, and reports with [`Core::finish_fill`].
    pub fill: PageMask,
}

/// Blocks that [`Core::read_hit`] looks at.
pub const HIT_BLOCKS: usize = 16;

impl Core {
    /// The fast path: if every page of `range` is valid, counts the use and passes each slot to `pin`.
    /// Returns whether it did; nothing is counted otherwise. A range of more than [`HIT_BLOCKS`] blocks takes the other way.
    pub fn read_hit(
        &mut self,
        storage: StorageId,
        range: PageRange,
        now: Duration,
        mut pin: impl FnMut(BlockIndex, u32),
    ) -> bool {
        let blocks = || range.blocks_of(self.config.block_pages);
        let mut all = blocks();
        // Most reads are of one block.
        if let (Some((block, mask)), None) = (all.next(), all.next()) {
            let Some(slot) = self.valid_slot(storage, block, mask) else { return false };
            self.demand(slot, mask, now);
            pin(block, slot);
            return true;
        }
        let (mut slots, mut found) = ([0; HIT_BLOCKS], 0);
        for (block, mask) in blocks() {
            let (Some(place), Some(slot)) = (slots.get_mut(found), self.valid_slot(storage, block, mask)) else {
                return false;
            };
            *place = slot;
            found += 1;
        }
        for ((block, mask), slot) in blocks().zip(slots) {
            self.demand(slot, mask, now);
            pin(block, slot);
        }
        true
    }

    /// The slot of a block, if these pages of it are valid.
    fn valid_slot(&self, storage: StorageId, block: BlockIndex, mask: PageMask) -> Option<u32> {
        self.find(Key::new(storage, block)).filter(|slot| self.entries[*slot as usize].valid.contains(mask))
    }

    /// Demand wants these pages of a resident block: counts the use, settles prefetches.
    pub(super) fn demand(&mut self, slot: u32, mask: PageMask, now: Duration) {
        let entry = &mut self.entries[slot as usize];
        let used = entry.unused & mask;
        // A use is a *second* read of a page: going through a block page by page is one use, not sixteen.
        let again = !(entry.valid & mask).minus(used).is_empty();
        self.touch(slot, again);
        let entry = &mut self.entries[slot as usize];
        if !used.is_empty() {
            entry.unused = entry.unused.minus(mask);
            let late = used & entry.filling;
            self.report(slot, used.minus(late), OutcomeKind::Used);
            self.report(slot, late, OutcomeKind::Late);
        }
        self.queue_destage(slot, now);
    }

    /// Plans a read of pages of one block. Pages in `fill` are claimed for the caller; the slot must be pinned before
    /// the lock is released.
    ///
    /// A request for several blocks plans those that have a slot ([`Core::valid`]) before those that need one, or pins
    /// them first: a slot for one block may be another's that is planned later.
    pub fn plan_read(&mut self, storage: StorageId, block: BlockIndex, wanted: PageMask, now: Duration) -> BlockPlan {
        let key = Key::new(storage, block);
        self.overtaken(storage, block, wanted);
        let slot = match self.find(key) {
            Some(slot) => Some(slot),
            None => self.allocate(key, For::Demand, now),
        };
        let Some(slot) = slot else {
            return BlockPlan {
                block,
                wanted,
                slot: None,
                hit: PageMask::NONE,
                wait: PageMask::NONE,
                late: PageMask::NONE,
                fill: PageMask::NONE,
            };
        };
        let entry = &self.entries[slot as usize];
        let hit = entry.valid & wanted;
        let wait = entry.filling & wanted;
        let fill = wanted.minus(hit | wait);
        let late = wait & entry.unused;
        self.begin_fill(slot, fill);
        self.demand(slot, hit | wait, now);
        BlockPlan { block, wanted, slot: Some(slot), hit, wait, late, fill }
    }

    /// Marks pages as filling; those under a write in flight will not be kept.
    pub(super) fn begin_fill(&mut self, slot: u32, fill: PageMask) {
        let key = self.entries[slot as usize].key;
        let written = self.pages_under_write(key.storage(), key.block());
        let entry = &mut self.entries[slot as usize];
        entry.filling |= fill;
        entry.cancelled = entry.cancelled.minus(fill) | (fill & written);
    }

    /// Pages of `slot` that are filling and that a write has overtaken: they will not become valid.
    pub fn cancelled(&self, slot: u32) -> PageMask {
        self.entries.get(slot as usize).map_or(PageMask::NONE, |entry| entry.cancelled)
    }

    /// The caller's fill of `mask` ended; its claims on the pages are dropped already. Returns the pages that are
    /// valid now.
    pub fn finish_fill(&mut self, slot: u32, mask: PageMask, ok: bool) -> PageMask {
        let Some(entry) = self.entries.get_mut(slot as usize) else { return PageMask::NONE };
        let mask = mask & entry.filling;
        let good = if ok { mask.minus(entry.cancelled) } else { PageMask::NONE };
        entry.filling = entry.filling.minus(mask);
        entry.cancelled = entry.cancelled.minus(mask);
        entry.valid |= good;
        self.valid_pages += good.count();
        let lost = entry.unused & mask.minus(good);
        entry.unused = entry.unused.minus(lost);
        self.report(slot, lost, OutcomeKind::Evicted);
        self.free_if_empty(slot);
        good
    }

    /// Pages that came along for free with a fill (an SSD slot is read whole): valid if nothing else claims them.
    /// Returns those the caller may write into the slot; it reports them with [`Core::finish_fill`].
    pub fn extend_fill(&mut self, slot: u32, mask: PageMask) -> PageMask {
        let Some(entry) = self.entries.get(slot as usize) else { return PageMask::NONE };
        let extra = mask.minus(entry.valid | entry.filling);
        self.begin_fill(slot, extra);
        extra
    }

    /// Whether any of these pages of the block in `slot` is still being filled.
    pub fn is_filling(&self, slot: u32, block: BlockIndex, mask: PageMask) -> bool {
        self.entries
            .get(slot as usize)
            .is_some_and(|entry| entry.key.block() == block && !(entry.filling & mask).is_empty())
    }

    /// Frees a slot that a read left empty (failed or cancelled fill), once its pins are gone.
    pub fn settle(&mut self, slot: u32) {
        if (slot as usize) < self.entries.len() {
            self.free_if_empty(slot);
        }
    }

    /// Tells the core which pages of a resident block the SSD tier holds.
    pub fn note_on_ssd(&mut self, slot: u32, mask: PageMask) {
        if let Some(entry) = self.entries.get_mut(slot as usize) {
            entry.on_ssd |= mask;
        }
    }

    /// The SSD tier has lost what it held, of one storage or of all.
    pub fn ssd_emptied(&mut self, storage: Option<StorageId>) {
        for entry in &mut self.entries {
            if storage.is_none_or(|id| entry.key.storage() == id) {
                entry.on_ssd = PageMask::NONE;
            }
        }
    }

    /// Whether there is an SSD tier now. What waited for one that is gone is forgotten.
    pub fn set_destage(&mut self, destage: bool) {
        self.config.destage = destage;
        if !destage {
            self.storages.iter_mut().flatten().for_each(|storage| storage.destage.clear());
            self.entries.iter_mut().for_each(|entry| entry.destage_queued = false);
        }
    }

    /// Valid pages of a block now, and its slot.
    pub fn valid(&self, storage: StorageId, block: BlockIndex) -> Option<(u32, PageMask)> {
        let slot = self.find(Key::new(storage, block))?;
        Some((slot, self.entries[slot as usize].valid))
    }

    /// Notes that a block has pages for the SSD tier, once.
    pub(super) fn queue_destage(&mut self, slot: u32, now: Duration) {
        let entry = &mut self.entries[slot as usize];
        let kept = (entry.valid | entry.filling).minus(entry.unused);
        if !self.config.destage || entry.destage_queued || entry.on_ssd.contains(kept) {
            return;
        }
        let key = entry.key;
        if let Some(state) = self.storages.get_mut(key.storage().0 as usize).and_then(Option::as_mut) {
            self.entries[slot as usize].destage_queued = true;
            state.destage.push_back((slot, key.block(), now));
        }
    }

    /// The next block of a storage whose used pages the SSD tier does not hold yet and that was queued before
    /// `before`: more pages of a block tend to follow the first. `(block, slot, pages, version)`; the caller copies the
    /// pages out before it lets go of the lock, and reports with [`Core::finish_destage`].
    pub fn next_destage(&mut self, storage: StorageId, before: Duration) -> Option<(BlockIndex, u32, PageMask, u32)> {
        loop {
            let state = self.storages.get_mut(storage.0 as usize)?.as_mut()?;
            let (slot, block, _) = *state.destage.front().filter(|(_, _, queued)| *queued <= before)?;
            state.destage.pop_front();
            let key = Key::new(storage, block);
            let here = |entry: &Entry| entry.place != Place::Free && entry.key == key;
            let slot = match self.entries.get(slot as usize).is_some_and(here) {
                true => slot,
                // It has moved, or left.
                false => match self.find(key) {
                    Some(slot) if self.entries[slot as usize].destage_queued => slot,
                    _ => continue,
                },
            };
            let entry = &mut self.entries[slot as usize];
            entry.destage_queued = false;
            // The whole block goes, so that a slot of the SSD tier is written once and never patched.
            let (kept, version) = (entry.valid.minus(entry.unused), entry.version);
            if entry.on_ssd.contains(kept) || !(self.pages_under_write(storage, block) & kept).is_empty() {
                // A write queues the block again when it ends.
                continue;
            }
            return Some((block, slot, kept, version));
        }
    }

    /// Blocks of a storage that wait to be written to the SSD tier.
    pub fn destage_backlog(&self, storage: StorageId) -> usize {
        self.storages.get(storage.0 as usize).and_then(Option::as_ref).map_or(0, |state| state.destage.len())
    }

    /// Whether the block still is what was copied at `version`, and if so takes note that the SSD tier has `mask`.
    pub fn finish_destage(&mut self, storage: StorageId, block: BlockIndex, version: u32, mask: PageMask) -> bool {
        match self.find(Key::new(storage, block)) {
            // Evicted meanwhile: the copy is right unless a write came, and a write invalidates the SSD tier itself.
            None => true,
            Some(slot) => {
                let entry = &mut self.entries[slot as usize];
                if entry.version != version {
                    return false;
                }
                entry.on_ssd = mask;
                true
            }
        }
    }
}
