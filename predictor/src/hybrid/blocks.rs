//! What is known of each 64 KiB block: which pages are cached, predicted, ever touched; how often and when it was visited.
//!
//! A four-way set-associative table of 28-byte records. A block that is driven out is forgotten: its pages count as neither
//! cached nor touched, which costs a needless candidate that the cache turns down.

use super::pending::NO_PREDICTION;

const WAYS: usize = 4;
/// Accesses after which a return to a block is a new visit.
const VISIT_GAP: u32 = 8;
const FREE: u32 = u32::MAX;

/// One block. Masks hold one bit a page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    number: u32,
    /// Clock of the last touch or prediction.
    pub(crate) at: u32,
    /// Believed to be in the cache.
    pub(crate) cached: u16,
    /// Touched at any time.
    pub(crate) ever: u16,
    /// In a prediction that is not settled.
    pub(crate) predicted: u16,
    /// Handed out as candidates, and since then neither touched nor lost.
    pub(crate) issued: u16,
    /// First of the block's unsettled predictions.
    pub(crate) predictions: u16,
    pub(crate) visits: u8,
    /// Time of the last touch or handing out, in tenths of a second.
    pub(crate) seen_ds: u32,
}

const BLANK: Block = Block {
    number: FREE,
    at: 0,
    cached: 0,
    ever: 0,
    predicted: 0,
    issued: 0,
    predictions: NO_PREDICTION,
    visits: 0,
    seen_ds: 0,
};

#[derive(Debug)]
pub(crate) struct Blocks {
    entries: Vec<Block>,
    sets: usize,
    /// Pages ever touched by 1 MiB of storage, folded.
    density: Vec<u16>,
}

impl Blocks {
    /// Room for `blocks` blocks, rounded up to a power of two.
    pub(crate) fn new(blocks: usize) -> Self {
        let sets = blocks.div_ceil(WAYS).next_power_of_two().max(16);
        Self { entries: vec![BLANK; sets * WAYS], sets, density: vec![0; sets.next_power_of_two()] }
    }

    fn set(&self, number: u32) -> usize {
        (number.wrapping_mul(0x9E37_79B1) >> 8) as usize % self.sets * WAYS
    }

    pub(crate) fn find(&self, block: u64) -> Option<&Block> {
        let number = u32::try_from(block).ok()?;
        let set = self.set(number);
        self.entries[set..set + WAYS].iter().find(|entry| entry.number == number)
    }

    pub(crate) fn find_mut(&mut self, block: u64) -> Option<&mut Block> {
        let number = u32::try_from(block).ok()?;
        let set = self.set(number);
        self.entries[set..set + WAYS].iter_mut().find(|entry| entry.number == number)
    }

    /// The block's record, made if need be. What is driven out by that is passed to `lost`.
    pub(crate) fn get(&mut self, block: u64, clock: u32, mut lost: impl FnMut(&Block)) -> &mut Block {
        let number = block as u32; // below MAX_PAGES / BLOCK_PAGES, see access
        let set = self.set(number);
        let ways = &mut self.entries[set..set + WAYS];
        let way = ways.iter().position(|entry| entry.number == number).unwrap_or_else(|| {
            let age = |entry: &Block| if entry.number == FREE { u32::MAX } else { clock.wrapping_sub(entry.at) };
            let oldest = (0..WAYS).max_by_key(|way| age(&ways[*way])).unwrap_or(0);
            if ways[oldest].number != FREE {
                lost(&ways[oldest]);
            }
            ways[oldest] = Block { number, at: clock, ..BLANK };
            oldest
        });
        &mut ways[way]
    }

    /// A guest touched these pages; if that brings them into the cache, they are `cached` now.
    pub(crate) fn touch(
        &mut self,
        block: u64,
        mask: u16,
        cached: bool,
        clock: u32,
        now_ds: u32,
        lost: impl FnMut(&Block),
    ) {
        let entry = self.get(block, clock, lost);
        if entry.ever == 0 || clock.wrapping_sub(entry.at) > VISIT_GAP {
            entry.visits = entry.visits.saturating_add(1);
        }
        let new = mask & !entry.ever;
        entry.ever |= mask;
        if cached {
            entry.cached |= mask;
        }
        entry.issued &= !mask;
        entry.at = clock;
        entry.seen_ds = now_ds;
        if new != 0 {
            let place = self.region(block);
            self.density[place] = self.density[place].saturating_add(new.count_ones() as u16);
        }
    }

    fn region(&self, block: u64) -> usize {
        ((block >> 4).wrapping_mul(0x9E37_79B9) >> 7) as usize % self.density.len()
    }

    /// Pages ever touched in the 1 MiB around a block.
    pub(crate) fn density(&self, block: u64) -> u32 {
        u32::from(self.density[self.region(block)])
    }

    /// The cache is empty again.
    pub(crate) fn clear_cached(&mut self) {
        for entry in &mut self.entries {
            (entry.cached, entry.issued) = (0, 0);
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Block>() + self.density.capacity() * 2
    }
}

const _: () = assert!(size_of::<Block>() <= 32);
