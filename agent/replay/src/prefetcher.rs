//! What a prefetch policy is to a replay.

use crate::marks::Mark;
use crate::trace::Request;
use prestage_predictor::CalibrationStats;

/// Pages that a policy wants in the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wish {
    /// 4 KiB page.
    pub first: u64,
    pub pages: u64,
    /// That the pages are read before they leave the cache, 0 ..= 1; `NAN` from a policy that does not say, which then
    /// has no calibration error.
    pub probability: f32,
    /// When it is expected to be read, on the trace's clock; `None`: at once. Earlier goes first.
    pub due_us: Option<u64>,
    /// Comes back with the outcome.
    pub tag: u8,
}

/// What became of prefetched pages, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub first: u64,
    pub pages: u64,
    pub tag: u8,
    /// Used by a request; otherwise evicted before any.
    pub used: bool,
    /// Used, but the request had to wait for it.
    pub late: bool,
}

/// A prefetch policy. The driver calls, for each request of the trace, `outcome` for what it settled and then `observe`;
/// wishes go to the queue in the order they are pushed.
pub trait Prefetcher {
    /// The policy's name in the report.
    fn name(&self) -> &str;

    /// A request that the cache has served: `hit` if all its pages were there or on their way when it came. `resident`
    /// tells whether a page is cached now.
    fn observe(
        &mut self,
        request: &Request,
        hit: bool,
        now_us: u64,
        resident: &dyn Fn(u64) -> bool,
        out: &mut Vec<Wish>,
    );

    /// Prefetched pages were used or lost.
    fn outcome(&mut self, _outcome: &Outcome) {}

    /// Pages left the cache after they had been used.
    fn left(&mut self, _first: u64, _pages: u64) {}

    /// The guest began or ended something.
    fn mark(&mut self, _mark: &Mark, _now_us: u64, _out: &mut Vec<Wish>) {}

    /// Nothing was asked for since a while: called each second of a pause, for the first minutes of it.
    fn idle(&mut self, _now_us: u64, _out: &mut Vec<Wish>) {}

    /// How well everything was foretold that the policy said, wished for or not, since it was made; `None` if it does not
    /// keep account.
    fn calibration(&self) -> Option<CalibrationStats> {
        None
    }
}

/// The policy that never prefetches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nothing;

impl Prefetcher for Nothing {
    fn name(&self) -> &str {
        "none"
    }

    fn observe(&mut self, _: &Request, _: bool, _: u64, _: &dyn Fn(u64) -> bool, _: &mut Vec<Wish>) {}
}
