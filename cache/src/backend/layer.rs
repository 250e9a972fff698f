//! Which parts of an image hold data of their own: what a chain's disk asks on every read.
//!
//! - [`LayerMap`]: units of an image and where their content is; filled by the image's backend, read on any thread
//! - [`Owner`]: the answer
//!
//! A unit is the image's cluster, or a page where clusters are smaller. The map is a cache: it forgets rather than grow,
//! and what it does not know the backend finds in the image's tables. It holds one byte a unit, at most [`CHUNKS_MAX`]
//! chunks of 4096 units.

use crate::types::PAGE_BYTES;
use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// 4 MiB of map: 64 GiB of a disk with clusters of 64 KiB.
const CHUNKS_MAX: usize = 1024;
const CHUNK_UNITS: u64 = 4096;

/// Where the content of a unit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Owner {
    /// Not looked up yet, or forgotten.
    Unknown = 0,
    /// In this image.
    Own = 1,
    /// Nowhere: it reads as zeroes.
    Zero = 2,
    /// In the image below, or nowhere if there is none.
    Below = 3,
}

impl Owner {
    fn of(value: u8) -> Owner {
        match value {
            1 => Owner::Own,
            2 => Owner::Zero,
            3 => Owner::Below,
            _ => Owner::Unknown,
        }
    }
}

type Chunk = Box<[AtomicU8]>;

/// Where the parts of one image are.
pub struct LayerMap {
    unit_bytes: u64,
    size_bytes: u64,
    chunks: RwLock<FxHashMap<u64, Chunk>>,
}

impl LayerMap {
    /// A map of an image of `size_bytes` with clusters of `cluster_bytes`, a power of two.
    pub(super) fn new(size_bytes: u64, cluster_bytes: u64) -> LayerMap {
        let unit_bytes = cluster_bytes.max(PAGE_BYTES as u64);
        LayerMap { unit_bytes, size_bytes, chunks: RwLock::default() }
    }

    /// Bytes of a unit, a power of two.
    pub fn unit_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Bytes of the disk that the image describes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Passes on the owners of the units that `offset..offset + len` touches: `(offset of the unit, owner)`, in order.
    pub fn each(&self, offset: u64, len: u64, mut take: impl FnMut(u64, Owner)) {
        let chunks = self.chunks.read();
        let mut unit = offset / self.unit_bytes;
        let end = offset.saturating_add(len).div_ceil(self.unit_bytes);
        while unit < end {
            let chunk = chunks.get(&(unit / CHUNK_UNITS));
            let stop = end.min((unit / CHUNK_UNITS + 1) * CHUNK_UNITS);
            for unit in unit..stop {
                let owner = chunk.map_or(0, |chunk| chunk[(unit % CHUNK_UNITS) as usize].load(Ordering::Acquire));
                take(unit * self.unit_bytes, Owner::of(owner));
            }
            unit = stop;
        }
    }

    /// Notes who owns the units that `offset..offset + len` touches.
    pub(super) fn set(&self, offset: u64, len: u64, owner: Owner) {
        self.update(offset, len, |unit| unit.store(owner as u8, Ordering::Release));
    }

    /// Notes what a look at the tables has found, where nothing newer is known.
    pub(super) fn found(&self, offset: u64, len: u64, owner: Owner) {
        self.update(offset, len, |unit| {
            let _ = unit.compare_exchange(0, owner as u8, Ordering::AcqRel, Ordering::Relaxed);
        });
    }

    fn update(&self, offset: u64, len: u64, mut change: impl FnMut(&AtomicU8)) {
        let mut unit = offset / self.unit_bytes;
        let end = offset.saturating_add(len).min(self.size_bytes).div_ceil(self.unit_bytes);
        while unit < end {
            let index = unit / CHUNK_UNITS;
            let stop = end.min((index + 1) * CHUNK_UNITS);
            let mut each = |chunk: &Chunk| (unit..stop).for_each(|unit| change(&chunk[(unit % CHUNK_UNITS) as usize]));
            let chunks = self.chunks.read();
            if let Some(chunk) = chunks.get(&index) {
                each(chunk);
            } else {
                drop(chunks);
                let mut chunks = self.chunks.write();
                // Any other: which one is seldom asked for is not known, and the tables can be asked again.
                if chunks.len() >= CHUNKS_MAX
                    && let Some(other) = chunks.keys().find(|other| **other != index).copied()
                {
                    chunks.remove(&other);
                }
                let fresh = || (0..CHUNK_UNITS).map(|_| AtomicU8::new(0)).collect();
                each(chunks.entry(index).or_insert_with(fresh));
            }
            unit = stop;
        }
    }
}

impl fmt::Debug for LayerMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerMap").field("unit_bytes", &self.unit_bytes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(map: &LayerMap, offset: u64, len: u64) -> Vec<Owner> {
        let mut found = Vec::new();
        map.each(offset, len, |_, owner| found.push(owner));
        found
    }

    #[test]
    fn a_look_does_not_undo_a_write() {
        let map = LayerMap::new(1 << 30, 65536);
        map.found(0, 200_000, Owner::Below);
        map.set(65536, 1, Owner::Own);
        map.found(0, 1 << 20, Owner::Below);
        assert_eq!(owners(&map, 0, 131_073), [Owner::Below, Owner::Own, Owner::Below]);
        assert_eq!(owners(&map, (1 << 30) - 1, 1), [Owner::Unknown]);
    }

    #[test]
    fn it_forgets_rather_than_grow() {
        let map = LayerMap::new(1 << 50, 512);
        assert_eq!(map.unit_bytes(), 4096);
        let chunk_bytes = CHUNK_UNITS * 4096;
        for i in 0..2 * CHUNKS_MAX as u64 {
            map.set(i * chunk_bytes, 1, Owner::Own);
        }
        assert_eq!(map.chunks.read().len(), CHUNKS_MAX);
        assert_eq!(owners(&map, (2 * CHUNKS_MAX as u64 - 1) * chunk_bytes, 1), [Owner::Own], "the newest stays");
    }

    #[test]
    fn a_range_may_lie_in_two_chunks() {
        let (map, border) = (LayerMap::new(1 << 40, 65536), CHUNK_UNITS * 65536);
        map.set(border - 65536, 131_072, Owner::Zero);
        map.set(border, 1, Owner::Own);
        assert_eq!(owners(&map, border - 65536, 131_073), [Owner::Zero, Owner::Own, Owner::Unknown]);
    }
}
