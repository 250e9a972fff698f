//! What the SSD tier's index takes a block of 64 KiB, from real fills, by an allocator that counts. And how long a tier
//! of a tebibyte takes to open.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

use counted::Counted;
use prestage_cache::ssd::{SsdOptions, SsdTier, Step};
use prestage_cache::types::{BlockIndex, PageMask};
use std::time::Instant;

/// The system's allocator with a balance of bytes before it.
mod counted {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::sync::atomic::{AtomicI64, Ordering};

    static BYTES: AtomicI64 = AtomicI64::new(0);

    #[derive(Debug)]
    pub(crate) struct Counted;

    impl Counted {
        /// Bytes allocated and not freed.
        pub(crate) fn held() -> i64 {
            BYTES.load(Ordering::Relaxed)
        }

        fn add(bytes: usize) {
            BYTES.fetch_add(bytes as i64, Ordering::Relaxed);
        }

        fn take(bytes: usize) {
            BYTES.fetch_sub(bytes as i64, Ordering::Relaxed);
        }
    }

    // SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
    unsafe impl GlobalAlloc for Counted {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            Self::add(layout.size());
            // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of the system's.
            unsafe { System.alloc(layout) }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            Self::add(layout.size());
            // SAFETY: as in `alloc`.
            unsafe { System.alloc_zeroed(layout) }
        }

        unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
            Self::take(layout.size());
            Self::add(new_size);
            // SAFETY: as in `alloc`.
            unsafe { System.realloc(at, layout, new_size) }
        }

        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            Self::take(layout.size());
            // SAFETY: as in `alloc`.
            unsafe { System.dealloc(at, layout) };
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counted = Counted;
}

/// 16 GiB, and the sizes at which tables have just doubled or are about to.
const BLOCKS: [u32; 3] = [1 << 18, 200_000, (1 << 18) / 8 * 7];
const LIMIT: f64 = 64.0;

fn sparse() -> SsdOptions {
    SsdOptions { preallocate: false, ..SsdOptions::default() }
}

fn slab_bytes(slots: u64) -> u64 {
    (4 << 20) + slots.div_ceil(4096) * (256 << 10) + slots * 65536
}

fn tier(dir: &tempfile::TempDir, slots: u64) -> SsdTier {
    SsdTier::open_with(&dir.path().join("slab"), slab_bytes(slots), sparse()).unwrap().0
}

#[test]
fn the_index_takes_at_most_64_bytes_a_block_held() {
    for blocks in BLOCKS {
        let dir = tempfile::tempdir().unwrap();
        let before = Counted::held();
        let tier = tier(&dir, u64::from(blocks));
        let s = tier.storage("file:/a", None).unwrap();
        for block in 0..u64::from(blocks) {
            let write = tier.begin_insert(s, BlockIndex(block), PageMask::ALL).unwrap();
            assert!(tier.finish_insert(write, 0, true));
        }
        let used = tier.stats().used_slots;
        let ssd = (Counted::held() - before) as f64 / used as f64;
        println!("{used} blocks on the SSD: {ssd:.1} bytes of index a block");
        assert_eq!(used, u64::from(blocks));
        assert!(ssd <= LIMIT, "{ssd}");
        assert!(ssd > 16.0, "the allocator does not count");
    }
}

/// Time is printed, not judged: the host's load is nobody's promise. Run by itself in a release build it is a measurement.
#[test]
fn a_tier_of_a_tebibyte_opens() {
    let dir = tempfile::tempdir().unwrap();
    let slots = (1u64 << 40) / 65536;
    let begun = Instant::now();
    drop(tier(&dir, slots));
    println!("a new slab of 1 TiB: {:?}", begun.elapsed());
    let share: u64 = std::env::var("PRESTAGE_SLAB_BLOCKS").ok().and_then(|text| text.parse().ok()).unwrap_or(1 << 20);
    let tier_before = tier(&dir, slots);
    let s = tier_before.storage("file:/a", None).unwrap();
    for block in 0..share {
        let write = tier_before.begin_insert(s, BlockIndex(block), PageMask::ALL).unwrap();
        assert!(tier_before.finish_insert(write, 0, true));
    }
    let begun = Instant::now();
    let mut checkpoint = tier_before.begin_checkpoint().unwrap();
    while checkpoint.step().unwrap() == Step::More {}
    drop(checkpoint);
    println!("a checkpoint of {share} blocks: {:?}", begun.elapsed());
    drop(tier_before);
    let begun = Instant::now();
    let (again, report) = SsdTier::open_with(&dir.path().join("slab"), slab_bytes(slots), sparse()).unwrap();
    println!("{} blocks of {slots} recovered in {:?}", report.kept_slots, begun.elapsed());
    assert_eq!(report.kept_slots, share);
    drop(again);
}
