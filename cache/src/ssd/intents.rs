//! The write-intent bitmap in memory: which regions of which stores have been written to since the slab last vouched for
//! them, and what of that is on the disk. Sans-I/O.
//!
//! The method is that of md's bitmap (Linux, `Documentation/admin-guide/md.rst`): a bit goes to the disk before the first
//! write of its region, writes that find it there pay nothing, and it is cleared later, in bulk. Sets of bits are
//! written in numbered batches, one at a time; who needs a bit that is not there waits for the batch that has it.
//!
//! Three bits a region: *wanted* (it must be set on the disk), *there* (it surely is), *seen* (a write began or was under
//! way since the checkpoint in progress began). Memory is taken by sectors of 2 TiB of a disk, when they are first
//! used.

use super::format::{
    self, CHUNK_WORDS, CHUNKS_A_SECTOR, INTENT_CHUNKS, INTENT_OFFSET, REGION_PAGES, SECTOR_BYTES, SlabId,
};
use crate::types::PageRange;
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;

const WORDS: usize = CHUNK_WORDS * CHUNKS_A_SECTOR;
pub(super) const SECTORS: usize = INTENT_CHUNKS / CHUNKS_A_SECTOR;
const SECTOR_BITS: u64 = WORDS as u64 * 64;
const BITS: u64 = SECTOR_BITS * SECTORS as u64;
/// A write that spans more regions (a discard of 64 GiB) isn't counted region by region: while it is under way
/// nothing is cleared.
const WIDE: u64 = 1 << 10;

#[derive(Debug)]
struct Sector {
    wanted: [u64; WORDS],
    there: [u64; WORDS],
    seen: [u64; WORDS],
    /// The batch that brings what is wanted to the disk.
    batch: u64,
}

impl Sector {
    fn new() -> Box<Sector> {
        Box::new(Sector { wanted: [0; WORDS], there: [0; WORDS], seen: [0; WORDS], batch: 0 })
    }
    fn is_idle(&self) -> bool {
        self.wanted.iter().chain(&self.there).all(|word| *word == 0)
    }
}

/// Regions of one write, as bits of the bitmap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Regions {
    first: u64,
    count: u64,
}

impl Regions {
    /// The regions that pages of a storage lie in. `first_bit`: see [`format::first_region_bit`].
    pub(super) fn of(first_bit: u64, range: PageRange) -> Regions {
        if range.count == 0 {
            return Regions { first: 0, count: 0 };
        }
        let (first, last) = (range.first / REGION_PAGES, (range.end() - 1) / REGION_PAGES);
        Regions { first: (first_bit % BITS + first % BITS) % BITS, count: (last - first + 1).min(BITS) }
    }

    /// As runs within sectors: `(sector, first bit, bits)`.
    fn runs(self) -> impl Iterator<Item = (usize, u64, u64)> {
        let (mut at, mut left) = (self.first, self.count);
        std::iter::from_fn(move || {
            let (sector, within) = (at / SECTOR_BITS, at % SECTOR_BITS);
            let take = left.min(SECTOR_BITS - within);
            at = (at + take) % BITS;
            left -= take;
            (take > 0).then_some((sector as usize, within, take))
        })
    }
}

/// The words that bits `first..first + count` of a sector touch, and which of their bits.
fn masks(first: u64, count: u64) -> impl Iterator<Item = (usize, u64)> {
    let end = first + count;
    (first / 64..end.div_ceil(64)).map(move |word| {
        let from = first.max(word * 64) - word * 64;
        let to = end.min(word * 64 + 64) - word * 64;
        let ones = if to - from == 64 { u64::MAX } else { ((1 << (to - from)) - 1) << from };
        (word as usize, ones)
    })
}

#[derive(Debug)]
pub(super) struct Intents {
    sectors: Vec<Option<Box<Sector>>>,
    /// Sectors whose bytes on the disk are to change.
    queue: BTreeSet<usize>,
    /// Writes under way, by bit.
    under_way: FxHashMap<u64, u32>,
    wide_under_way: u32,
    /// The batch that takes the queue next, and the last one that is on the disk.
    next_batch: u64,
    done_batch: u64,
}

/// What a batch writes: sectors with the bits that they will have.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) number: u64,
    sectors: Vec<(usize, Vec<u64>)>,
}

impl Batch {
    /// Offset and content of every sector to write.
    pub(super) fn encoded(&self, slab_id: &SlabId) -> impl Iterator<Item = (u64, [u8; SECTOR_BYTES])> {
        self.sectors.iter().map(move |(sector, bits)| (offset_of(*sector), encode(slab_id, *sector, bits)))
    }
}

pub(super) fn offset_of(sector: usize) -> u64 {
    INTENT_OFFSET + (sector * SECTOR_BYTES) as u64
}

fn encode(slab_id: &SlabId, sector: usize, bits: &[u64]) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    let chunks = bytes.chunks_mut(format::CHUNK_BYTES).zip(bits.chunks(CHUNK_WORDS)).enumerate();
    chunks.for_each(|(i, (to, bits))| format::encode_chunk(slab_id, sector * CHUNKS_A_SECTOR + i, bits, to));
    bytes
}

impl Intents {
    pub(super) fn new() -> Intents {
        Intents {
            sectors: (0..SECTORS).map(|_| None).collect(),
            queue: BTreeSet::new(),
            under_way: FxHashMap::default(),
            wide_under_way: 0,
            next_batch: 1,
            done_batch: 0,
        }
    }

    /// A write is about to begin. Returns the batch to wait for; 0 if nothing is to be waited for. To be ended by
    /// [`Intents::end`].
    pub(super) fn begin(&mut self, regions: Regions) -> u64 {
        let mut wait = 0;
        for (sector, first, count) in regions.runs() {
            let at = self.sectors[sector].get_or_insert_with(Sector::new);
            let mut missing = false;
            for (word, ones) in masks(first, count) {
                missing |= at.there[word] & ones != ones;
                at.wanted[word] |= ones;
                at.seen[word] |= ones;
            }
            // What is under way may have left before these bits were wanted.
            if missing {
                self.queue.insert(sector);
                at.batch = self.next_batch;
                wait = self.next_batch;
            }
        }
        match regions.count > WIDE {
            true => self.wide_under_way += 1,
            false => {
                for i in 0..regions.count {
                    *self.under_way.entry((regions.first + i) % BITS).or_default() += 1;
                }
            }
        }
        wait
    }

    /// The write has ended, whichever way.
    pub(super) fn end(&mut self, regions: Regions) {
        if regions.count > WIDE {
            self.wide_under_way = self.wide_under_way.saturating_sub(1);
            return;
        }
        for i in 0..regions.count {
            if let std::collections::hash_map::Entry::Occupied(mut entry) =
                self.under_way.entry((regions.first + i) % BITS)
            {
                *entry.get_mut() -= 1;
                if *entry.get() == 0 {
                    entry.remove();
                }
            }
        }
    }

    /// Whether a region is marked, or about to be.
    pub(super) fn is_wanted(&self, regions: Regions) -> bool {
        regions.runs().any(|(sector, first, count)| {
            let at = self.sectors[sector].as_ref();
            at.is_some_and(|at| masks(first, count).any(|(word, ones)| at.wanted[word] & ones != 0))
        })
    }

    pub(super) fn done_batch(&self) -> u64 {
        self.done_batch
    }

    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Regions wanted now.
    pub(super) fn marked(&self) -> u64 {
        let words = self.sectors.iter().flatten().flat_map(|sector| &sector.wanted);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Takes the queue. One batch at a time: [`Intents::finish_batch`] or [`Intents::fail_batch`] comes next.
    pub(super) fn take_batch(&mut self) -> Batch {
        let number = self.next_batch;
        self.next_batch += 1;
        let take = |sector: usize| Some((sector, self.sectors.get(sector)?.as_ref()?.wanted.to_vec()));
        Batch { number, sectors: std::mem::take(&mut self.queue).into_iter().filter_map(take).collect() }
    }

    /// The batch is on the disk.
    pub(super) fn finish_batch(&mut self, batch: &Batch) {
        self.done_batch = self.done_batch.max(batch.number);
        for (sector, bits) in &batch.sectors {
            let Some(at) = self.sectors.get_mut(*sector).and_then(Option::as_mut) else { continue };
            at.there.iter_mut().zip(bits).zip(&at.wanted).for_each(|((there, bit), wanted)| *there = bit & wanted);
            if at.is_idle() && !self.queue.contains(sector) {
                self.sectors[*sector] = None;
            }
        }
    }

    /// What the disk has of the batch's sectors is not known.
    pub(super) fn fail_batch(&mut self, batch: &Batch) {
        for (sector, _) in &batch.sectors {
            if let Some(at) = self.sectors.get_mut(*sector).and_then(Option::as_mut) {
                at.there = [0; WORDS];
                self.queue.insert(*sector);
            }
        }
    }

    /// A checkpoint begins: what is written to from here on, or is being written to, it will not clear.
    pub(super) fn begin_checkpoint(&mut self) {
        self.sectors.iter_mut().flatten().for_each(|sector| sector.seen = [0; WORDS]);
        let Intents { sectors, under_way, .. } = self;
        for bit in under_way.keys() {
            if let Some(sector) = sectors[(bit / SECTOR_BITS) as usize].as_mut() {
                sector.seen[(bit % SECTOR_BITS / 64) as usize] |= 1 << (bit % 64);
            }
        }
    }

    /// The regions must not be cleared by the checkpoint in progress.
    pub(super) fn keep(&mut self, regions: Regions) {
        for (sector, first, count) in regions.runs() {
            if let Some(at) = self.sectors[sector].as_mut() {
                masks(first, count).for_each(|(word, ones)| at.seen[word] |= ones);
            }
        }
    }

    /// Unsets every bit that no write has seen since the checkpoint began, and queues it for the disk. Returns how many.
    pub(super) fn clear_unseen(&mut self) -> u64 {
        if self.wide_under_way > 0 {
            return 0;
        }
        let mut cleared = 0;
        for (number, sector) in self.sectors.iter_mut().enumerate() {
            let Some(at) = sector else { continue };
            let mut changed = 0;
            for word in 0..WORDS {
                let gone = at.wanted[word] & !at.seen[word];
                at.wanted[word] &= !gone;
                // From here on a write to the region waits again, whatever is on the disk.
                at.there[word] &= !gone;
                changed += u64::from(gone.count_ones());
            }
            if changed > 0 {
                self.queue.insert(number);
                at.batch = self.next_batch;
                cleared += changed;
            }
        }
        cleared
    }

    /// The disk has none of it any more: everything wanted is queued.
    pub(super) fn forget_disk(&mut self) {
        for (number, sector) in self.sectors.iter_mut().enumerate() {
            if let Some(at) = sector {
                at.there = [0; WORDS];
                self.queue.insert(number);
            }
        }
    }

    /// The whole bitmap as bytes, with what is wanted now, and the batch that stands for having it written.
    pub(super) fn whole(&mut self, slab_id: &SlabId) -> (Batch, Vec<u8>) {
        self.queue.extend(self.sectors.iter().enumerate().filter(|(_, at)| at.is_some()).map(|(number, _)| number));
        let batch = self.take_batch();
        let mut bytes = Vec::with_capacity(SECTORS * SECTOR_BYTES);
        for (number, sector) in self.sectors.iter().enumerate() {
            let bits = sector.as_ref().map_or(&[0; WORDS], |at| &at.wanted);
            bytes.extend_from_slice(&encode(slab_id, number, bits));
        }
        (batch, bytes)
    }

    /// Takes over what recovery found in a sector of the bitmap. Returns how many chunks were damaged: all of their
    /// regions count as written to.
    pub(super) fn restore(&mut self, slab_id: &SlabId, sector: usize, bytes: &[u8]) -> u64 {
        let (mut bits, mut damaged) = ([0u64; WORDS], 0);
        for (i, chunk) in bytes.chunks(format::CHUNK_BYTES).take(CHUNKS_A_SECTOR).enumerate() {
            let found = format::decode_chunk(slab_id, sector * CHUNKS_A_SECTOR + i, chunk).unwrap_or_else(|| {
                damaged += 1;
                [u64::MAX; CHUNK_WORDS]
            });
            bits[i * CHUNK_WORDS..][..CHUNK_WORDS].copy_from_slice(&found);
        }
        if bits != [0; WORDS] {
            let mut at = Sector::new();
            (at.wanted, at.there) = (bits, bits);
            // A damaged chunk counts as set today; one that rots further must not count as anything else.
            if damaged > 0 {
                at.there = [0; WORDS];
                self.queue.insert(sector);
            }
            self.sectors[sector] = Some(at);
        }
        damaged
    }

    pub(super) fn bytes(&self) -> u64 {
        let sectors = self.sectors.iter().flatten().count() * size_of::<Sector>();
        let table = self.sectors.capacity() * size_of::<Option<Box<Sector>>>();
        (sectors + table + self.under_way.capacity() * size_of::<(u64, u32)>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ID: SlabId = *b"0123456789abcdef";

    fn at(region: u64, count: u64) -> Regions {
        Regions::of(7, PageRange { first: region * REGION_PAGES, count: count * REGION_PAGES })
    }

    #[test]
    fn a_write_waits_for_the_batch_that_has_its_bit_and_the_next_one_for_none() {
        let mut intents = Intents::new();
        assert_eq!(intents.begin(at(3, 1)), 1);
        let batch = intents.take_batch();
        assert_eq!(intents.begin(at(3, 1)), 2, "the first batch may fail, or be on its way: only a later one is sure");
        assert_eq!(intents.begin(at(4, 1)), 2);
        intents.finish_batch(&batch);
        assert_eq!(intents.begin(at(3, 1)), 0, "now it is there");
        let batch = intents.take_batch();
        intents.fail_batch(&batch);
        assert!(intents.has_work());
        assert_eq!(
            intents.begin(at(3, 1)),
            3,
            "a failed write leaves anything: even what was there must be written again"
        );
    }

    #[test]
    fn a_bit_is_cleared_only_if_no_write_was_under_way_or_came_since() {
        let mut intents = Intents::new();
        let flush = |intents: &mut Intents| {
            let batch = intents.take_batch();
            intents.finish_batch(&batch);
        };
        (1..5).for_each(|region| {
            intents.begin(at(region, 1));
        });
        (2..5).for_each(|region| intents.end(at(region, 1)));
        flush(&mut intents);
        intents.begin_checkpoint();
        assert_eq!(intents.begin(at(3, 1)), 0);
        intents.end(at(3, 1));
        intents.keep(at(4, 1));
        assert_eq!(intents.clear_unseen(), 1);
        assert_eq!([1, 2, 3, 4].map(|region| intents.is_wanted(at(region, 1))), [true, false, true, true]);
        assert_ne!(intents.begin(at(2, 1)), 0, "a cleared bit must be set again, though the disk still has it");
    }

    #[test]
    fn what_is_encoded_is_restored_and_a_damaged_chunk_is_all_ones() {
        let mut intents = Intents::new();
        let mut set = HashSet::new();
        for region in [0, 1, 63, 64, 5000, 31_743, 31_744, 8_000_000, 9_000_000_000] {
            intents.begin(at(region, 1));
            set.insert(region);
        }
        let (_, mut bytes) = intents.whole(&ID);
        let load = |bytes: &[u8]| {
            let mut other = Intents::new();
            let sectors = bytes.chunks(SECTOR_BYTES).enumerate();
            let damaged: u64 = sectors.map(|(number, sector)| other.restore(&ID, number, sector)).sum();
            (other, damaged)
        };
        let (other, damaged) = load(&bytes);
        assert_eq!((damaged, other.marked()), (0, 9));
        assert!(set.iter().all(|region| other.is_wanted(at(*region, 1))));
        assert!(!other.is_wanted(at(65, 1)) && other.is_wanted(at(60, 10)));
        for bit in [0, 7, 130, 511 * 8] {
            bytes[bit / 8] ^= 1 << (bit % 8);
            let (other, damaged) = load(&bytes);
            assert_eq!((damaged, other.marked() > 3968), (1, true), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        let (other, damaged) = load(&vec![0; SECTORS * SECTOR_BYTES]);
        assert_eq!((damaged, other.marked()), (INTENT_CHUNKS as u64, BITS), "zeroes are no bitmap");
    }

    #[test]
    fn a_discard_of_everything_is_bounded_and_holds_back_clearing() {
        let mut intents = Intents::new();
        let all = Regions::of(5, PageRange { first: 3, count: u64::MAX });
        intents.begin(all);
        assert_eq!(intents.marked(), BITS);
        assert!(intents.under_way.is_empty());
        let batch = intents.take_batch();
        intents.finish_batch(&batch);
        intents.begin_checkpoint();
        assert_eq!(intents.clear_unseen(), 0);
        intents.end(all);
        assert_eq!(intents.clear_unseen(), BITS);
    }
}
