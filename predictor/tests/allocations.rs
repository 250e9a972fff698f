//! The hot path allocates nothing once it is warm.
//!
//! Allocations are counted by thread, so that what the test's own runner does meanwhile does not count.

#[path = "../benches/loads/mod.rs"]
mod loads;

use counted::Counted;
use loads::HotPath;
use prestage_predictor::Outcome;

/// The system's allocator with a counter before it.
mod counted {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    }

    #[derive(Debug)]
    pub(crate) struct Counted;

    impl Counted {
        /// Allocations of this thread so far, growth in place included.
        pub(crate) fn so_far() -> u64 {
            ALLOCATIONS.get()
        }

        fn count() {
            // The counter needs no drop, so it can be reached while the thread ends.
            ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        }
    }

    // SAFETY: every call goes to the system's allocator as it came; counting does not allocate, since the counter is
    // initialised at compile time.
    unsafe impl GlobalAlloc for Counted {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            Self::count();
            // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`, which is that of the system's.
            unsafe { System.alloc(layout) }
        }

        unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
            Self::count();
            // SAFETY: as in `alloc`.
            unsafe { System.alloc_zeroed(layout) }
        }

        unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            Self::count();
            // SAFETY: `at` came from the system's allocator, and the caller keeps its contract.
            unsafe { System.realloc(at, layout, size) }
        }

        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            // SAFETY: `at` came from the system's allocator with this layout.
            unsafe { System.dealloc(at, layout) }
        }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

#[test]
fn the_counter_counts() {
    let before = Counted::so_far();
    let mut vec: Vec<u64> = std::hint::black_box(Vec::with_capacity(1));
    vec.push(1);
    assert_eq!(Counted::so_far() - before, 1);
    vec.push(2);
    assert_eq!(Counted::so_far() - before, 2, "growth counts");
}

#[test]
fn warm_observe_and_predict_allocate_nothing() {
    for load in loads::all() {
        let mut path = HotPath::warm(&load);
        let before = Counted::so_far();
        let mut candidates = 0usize;
        for (index, access) in load.measured().iter().enumerate() {
            path.step(access);
            candidates += path.out.len();
            let allocations = Counted::so_far() - before;
            assert_eq!(allocations, 0, "{}: access {index} of {}: {access:?}", load.name, load.measured().len());
        }
        // Nothing can be foreseen of random reads, and the governor sees to it that nothing is said.
        assert!(candidates > 0 || load.name == "random", "{}: nothing was predicted", load.name);
    }
}

#[test]
fn a_whole_mixed_life_allocates_nothing_after_its_first_accesses() {
    let loads = loads::all();
    let mut path = HotPath::new();
    // One access of each VM: what is kept of a VM comes with its first.
    for load in &loads {
        load.warm_up().iter().take(64).for_each(|access| path.step(access));
    }
    let before = Counted::so_far();
    for load in &loads {
        for (index, access) in load.measured().iter().enumerate() {
            path.step(access);
            for (turn, candidate) in path.out.iter().enumerate() {
                let (first, pages, expert) = (candidate.first, candidate.pages, candidate.expert);
                match (index + turn) % 3 {
                    0 => path.predictor.outcome(&Outcome { first, pages, expert, used: false, late: false }),
                    1 => path.predictor.outcome(&Outcome { first, pages, expert, used: true, late: turn % 2 == 0 }),
                    _ => path.predictor.evicted(first, pages),
                }
            }
            assert_eq!(Counted::so_far() - before, 0, "{}: access {index}: {access:?}", load.name);
        }
    }
}
