//! Slabs with known contents, in folders that go away.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]
#![allow(dead_code, reason = "each test binary uses its part")]

use prestage_cache::ssd::{Outcome, SsdOptions, SsdStorage, SsdTier, Stamp, Step};
use prestage_cache::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PageMask};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

pub(crate) const SUPERBLOCKS: [u64; 2] = [0, 64 << 10];
pub(crate) const TABLE: u64 = 128 << 10;
pub(crate) const META: u64 = 4 << 20;
pub(crate) const DATA: u64 = META + (256 << 10);

pub(crate) fn slab_bytes(slots: u64) -> u64 {
    DATA + slots * BLOCK_BYTES as u64
}

pub(crate) fn sparse() -> SsdOptions {
    SsdOptions { preallocate: false, ..SsdOptions::default() }
}

pub(crate) fn stamp(mtime_ns: i64) -> Option<Stamp> {
    Some(Stamp { size_bytes: 1 << 30, mtime_ns, ctime_ns: 5, inode: 6, device: 7 })
}

/// 64 KiB that start at a multiple of 4096 in memory.
pub(crate) struct Buf(Vec<u8>, usize);

impl Buf {
    pub(crate) fn new() -> Buf {
        let bytes = vec![0; BLOCK_BYTES + PAGE_BYTES];
        let start = bytes.as_ptr().align_offset(PAGE_BYTES);
        Buf(bytes, start)
    }
    pub(crate) fn get(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + BLOCK_BYTES]
    }
}

/// What page `p` of block `b` holds.
pub(crate) fn page(block: u64, page: u64) -> Vec<u8> {
    let word = (block * 1000 + page + 1).to_le_bytes();
    word.iter().copied().cycle().take(PAGE_BYTES).collect()
}

pub(crate) fn data(tier: &SsdTier) -> File {
    tier.data_fd().try_clone_to_owned().unwrap().into()
}

pub(crate) fn insert(tier: &SsdTier, s: SsdStorage, block: u64, mask: PageMask) {
    let mut buf = Buf::new();
    (0..16).filter(|p| mask.has(*p)).for_each(|p| {
        buf.get()[p as usize * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(&page(block, p));
    });
    let write = tier.begin_insert(s, BlockIndex(block), mask).unwrap();
    assert_eq!(write.block(), BlockIndex(block));
    let file = data(tier);
    for (first, count) in mask.runs() {
        let (at, len) = (first as usize * PAGE_BYTES, count as usize * PAGE_BYTES);
        file.write_all_at(&buf.get()[at..at + len], write.offset() + at as u64).unwrap();
    }
    let checksum = write.checksum(buf.get());
    assert!(tier.finish_insert(write, checksum, true));
}

/// A guest's write, from begin to end, and a flush of its store.
pub(crate) fn overwrite(tier: &SsdTier, s: SsdStorage, first_page: u64, pages: u64) {
    let mut write = tier.begin_write(s, first_page, pages);
    while tier.write_intents() {}
    write.submit();
    write.end();
    tier.note_flushed(s);
}

/// A checkpoint with stores that flush at once. Returns how many regions it cleared.
pub(crate) fn checkpoint(tier: &SsdTier) -> u64 {
    let Some(mut checkpoint) = tier.begin_checkpoint() else { return 0 };
    loop {
        if let Step::Done { cleared } = checkpoint.step().unwrap() {
            return cleared;
        }
    }
}

/// Reads a block, verifies it and returns the pages served.
pub(crate) fn read(tier: &SsdTier, s: SsdStorage, block: u64) -> PageMask {
    let Some(read) = tier.begin_read(s, BlockIndex(block)) else { return PageMask::NONE };
    let mut buf = Buf::new();
    data(tier).read_exact_at(buf.get(), read.offset()).unwrap();
    let good = read.verify(buf.get());
    let mask = tier.end_read(read, if good { Outcome::Good } else { Outcome::BadChecksum });
    for p in (0..16).filter(|p| mask.has(*p)) {
        assert_eq!(buf.get()[p as usize * PAGE_BYTES..][..PAGE_BYTES], page(block, p), "page {p} of block {block}");
    }
    mask
}

pub(crate) struct Place {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slab");
        Place { dir, path }
    }
    /// Ten blocks of one storage, closed.
    pub(crate) fn filled() -> Place {
        let place = Place::new();
        let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
        let s = tier.storage("file:/a", stamp(1)).unwrap();
        (0..10).for_each(|block| insert(&tier, s, block, PageMask(1 << block | 0x8000)));
        tier.close().unwrap();
        place
    }
    pub(crate) fn poke(&self, at: u64, change: impl Fn(u8) -> u8) {
        let file = OpenOptions::new().read(true).write(true).open(&self.path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[change(byte[0])], at).unwrap();
    }
}
