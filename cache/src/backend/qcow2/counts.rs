//! New tables are counted before anything points to them (sans-I/O).
//!
//! - [`Counts`]: where the count of a cluster is, and which counts must not be written as zero
//!
//! imago counts a new L2 table or block of counts in memory only and then writes the pointer to it. Cut off there, the table
//! would be in use and free at once. So the count is written first, here; imago's own copy of the block, which may have been
//! made before, is put right when it passes by. Tables that were made new are not given up while the image is open.

use rustc_hash::FxHashMap;

#[derive(Debug, Default)]
pub(super) struct Counts {
    cluster_bytes: u64,
    /// Bits of a count: 1 to 64.
    bits: u64,
    /// The refcount table: where the blocks of counts are; 0 for none.
    blocks: Vec<u64>,
    /// By block of counts: entries that are in use.
    used: FxHashMap<u64, Vec<u64>>,
}

/// Where a count is: its block, and its number there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) block: u64,
    pub(super) index: u64,
}

impl Counts {
    pub(super) fn new(cluster_bytes: u64, refcount_order: u32, blocks: Vec<u64>) -> Counts {
        // At most 6, as the header was checked for.
        Counts { cluster_bytes, bits: 1 << refcount_order.min(6), blocks, used: FxHashMap::default() }
    }

    /// Takes note of a block of counts.
    pub(super) fn set_block(&mut self, at: usize, block: u64) {
        // A table is at most 8 MiB.
        if at < 1 << 20 {
            if self.blocks.len() <= at {
                self.blocks.resize(at + 1, 0);
            }
            self.blocks[at] = block;
        }
    }

    pub(super) fn set_blocks(&mut self, blocks: Vec<u64>) {
        self.blocks = blocks;
    }

    /// Where the cluster at `offset` is counted; `None` where no block covers it.
    pub(super) fn entry(&self, offset: u64) -> Option<Entry> {
        let per_block = self.cluster_bytes * 8 / self.bits.max(1);
        let cluster = offset.checked_div(self.cluster_bytes)?;
        let at = usize::try_from(cluster.checked_div(per_block)?).ok()?;
        let block = self.blocks.get(at).copied().filter(|block| *block != 0)?;
        Some(Entry { block, index: cluster % per_block })
    }

    /// Bytes of the block before that in which the entry begins.
    pub(super) fn byte(&self, entry: Entry) -> u64 {
        entry.index * self.bits / 8
    }

    /// From now on the entry is never written as zero.
    pub(super) fn keep(&mut self, entry: Entry) {
        let used = self.used.entry(entry.block).or_default();
        if !used.contains(&entry.index) {
            used.push(entry.index);
        }
    }

    /// Sets what must not be zero in bytes that go to `offset` of the file. Returns whether anything was changed.
    pub(super) fn correct(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let Some(cluster_bytes) = Some(self.cluster_bytes).filter(|bytes| *bytes > 0) else { return false };
        let block = offset - offset % cluster_bytes;
        let mut changed = false;
        for index in self.used.get(&block).into_iter().flatten() {
            let at = block + index * self.bits / 8;
            let Some(from) = at.checked_sub(offset).and_then(|from| usize::try_from(from).ok()) else { continue };
            changed |= self.set_if_zero(bytes, from, *index);
        }
        changed
    }

    fn set_if_zero(&self, bytes: &mut [u8], from: usize, index: u64) -> bool {
        if self.bits < 8 {
            let shift = index * self.bits % 8;
            let mask = ((1u16 << self.bits) - 1) as u8;
            let Some(byte) = bytes.get_mut(from) else { return false };
            let zero = *byte >> shift & mask == 0;
            if zero {
                *byte |= 1 << shift;
            }
            return zero;
        }
        let Some(count) = bytes.get_mut(from..from + self.bits as usize / 8) else { return false };
        let zero = count.iter().all(|byte| *byte == 0);
        if zero && let Some(low) = count.last_mut() {
            *low = 1;
        }
        zero
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_found_and_kept() {
        for order in 0..=6 {
            let bits = 1u64 << order;
            let per_block = 512 * 8 / bits;
            let mut counts = Counts::new(512, order, vec![0, 512 * 9]);
            assert_eq!(counts.entry(512 * 3), None, "no block covers it");
            let entry = counts.entry(512 * (per_block + 5)).unwrap();
            assert_eq!(entry, Entry { block: 512 * 9, index: 5 });
            let mut bytes = vec![0u8; 512];
            assert!(!counts.correct(512 * 9, &mut bytes));
            counts.keep(entry);
            assert!(counts.correct(512 * 9, &mut bytes));
            // As QEMU reads it: narrow ones from the low bits up, wide ones big-endian.
            let found = match bits {
                1..8 => u64::from(bytes[(5 * bits / 8) as usize] >> (5 * bits % 8)) & ((1 << bits) - 1),
                _ => {
                    bytes[(5 * bits / 8) as usize..][..bits as usize / 8].iter().fold(0, |n, b| n << 8 | u64::from(*b))
                }
            };
            assert_eq!(found, 1, "width {bits}");
            assert_eq!(bytes.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1, "and nothing else");
            assert!(!counts.correct(512 * 9, &mut bytes), "what is counted stays as it is");
            assert!(!counts.correct(512 * 10, &mut [0; 512]), "another block");
        }
    }
}
