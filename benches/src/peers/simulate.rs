//! One pass over a trace by rules that are the same for every method:
//!
//! - Pages are 4 KiB. The cache evicts the least recently used page; [`Peer::Opt`] the one used last.
//! - A read request hits only if *all* its pages are cached when it arrives; its own pages never count as prefetched.
//! - Then its cached pages are used and what is missing is inserted, in ascending order, for writes as for reads; then come
//!   the prefetches. Nothing beyond the trace's last page is prefetched.
//! - Timed: requests come at the trace's times, whatever happened before (open loop). A transfer takes the device's latency
//!   and its bytes over the bandwidth; demand queues behind demand, prefetches behind both. A read waits for the last of its
//!   pages, also for one whose prefetch is under way (late); a hit costs 10 µs.

use super::cache::{NEVER, PageCache};
use super::{Method, Peer};
use crate::trace::{PAGE_BYTES, Request, Trace};

/// What a hit costs.
const HIT_US: f64 = 10.0;
/// Bandwidth where no other is asked for, in bytes a microsecond (MB/s).
pub(crate) const MEGABYTES_PER_S: f64 = 500.0;

/// What was counted. Pages are 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) capacity_pages: usize,
    pub(crate) requests: usize,
    pub(crate) reads: u64,
    pub(crate) read_hits: u64,
    pub(crate) read_pages: u64,
    pub(crate) page_hits: u64,
    pub(crate) demand_pages: u64,
    pub(crate) prefetched_pages: u64,
    pub(crate) useful_pages: u64,
    pub(crate) late_pages: u64,
    pub(crate) evicted_unused: u64,
}

/// How long reads took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub(crate) struct Latency {
    pub(crate) mean: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Latency {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(crate) fn of(mut samples: Vec<f64>) -> Self {
        if samples.is_empty() {
            return Self::default();
        }
        samples.sort_by(f64::total_cmp);
        let share = |share: f64| samples[(share * (samples.len() - 1) as f64) as usize];
        Self { mean: samples.iter().sum::<f64>() / samples.len() as f64, p50: share(0.5), p99: share(0.99) }
    }
}

/// A store with one queue: a transfer occupies it for its bytes, and its latency passes beside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    latency_us: f64,
    demand_free_us: f64,
    prefetch_free_us: f64,
}

impl Device {
    pub(crate) fn new(latency_us: f64) -> Self {
        Self { latency_us, demand_free_us: 0.0, prefetch_free_us: 0.0 }
    }

    /// When `pages` that a guest waits for have arrived.
    fn demand(&mut self, now_us: f64, pages: u64) -> f64 {
        self.demand_free_us = now_us.max(self.demand_free_us) + transfer_us(pages);
        self.demand_free_us + self.latency_us
    }

    /// When prefetched `pages` have arrived.
    fn prefetch(&mut self, now_us: f64, pages: u64) -> f64 {
        self.prefetch_free_us = now_us.max(self.demand_free_us).max(self.prefetch_free_us) + transfer_us(pages);
        self.prefetch_free_us + self.latency_us
    }
}

#[allow(clippy::cast_precision_loss)] // far below 2^53
fn transfer_us(pages: u64) -> f64 {
    (pages * PAGE_BYTES) as f64 / MEGABYTES_PER_S
}

/// Takes a method's wishes: joins neighbours to one transfer and drops what is cached.
#[derive(Debug)]
pub(crate) struct Wishes<'a> {
    cache: &'a mut PageCache,
    device: &'a mut Device,
    timed: bool,
    now_us: f64,
    last_page: u64,
    /// Pages of the transfer being joined, `from..to`.
    from: u64,
    to: u64,
    issued: u64,
}

impl Wishes<'_> {
    /// Prefetch this page.
    pub(crate) fn page(&mut self, page: u64) {
        if page > self.last_page || self.cache.contains(page) || (self.from..self.to).contains(&page) {
            return;
        }
        if self.from == self.to || page != self.to {
            self.flush();
            self.from = page;
        }
        self.to = page + 1;
    }

    fn flush(&mut self) {
        if self.from == self.to {
            return;
        }
        let pages = self.to - self.from;
        let ready_us = if self.timed { self.device.prefetch(self.now_us, pages) } else { self.now_us };
        for page in self.from..self.to {
            self.cache.insert(page, true, ready_us, 0);
        }
        self.issued += pages;
        self.from = self.to;
    }
}

/// Runs a peer over a trace with a cache of `capacity` pages; `latency_us` asks for timed mode. `seen` is told of every
/// request whether all its pages were cached.
#[allow(clippy::cast_precision_loss)] // times in microseconds, far below 2^53
pub(crate) fn simulate(
    trace: &Trace,
    peer: Peer,
    capacity: usize,
    latency_us: Option<f64>,
    mut seen: impl FnMut(&Request, bool),
) -> (Counts, Option<Latency>) {
    let optimal = peer == Peer::Opt;
    let mut cache = PageCache::new(capacity, optimal);
    let mut device = Device::new(latency_us.unwrap_or(0.0));
    let mut method = Method::new(peer);
    let next_uses = if optimal { next_uses(&trace.requests) } else { Vec::new() };
    let mut upcoming = next_uses.as_slice();
    let mut counts = Counts { capacity_pages: capacity, requests: trace.requests.len(), ..Counts::default() };
    let mut latencies = Vec::new();

    for request in &trace.requests {
        let now_us = request.at_us as f64;
        let (uses, rest) = upcoming.split_at(if upcoming.is_empty() { 0 } else { request.pages() as usize });
        upcoming = rest;
        let next_use = |page: u64| uses.get((page - request.first) as usize).copied().unwrap_or(0);

        let (mut all, mut done_us, mut missing) = (true, now_us + HIT_US, 0);
        for page in request.first..=request.last {
            let Some(entry) = cache.touch(page, next_use(page)) else {
                (all, missing) = (false, missing + 1);
                continue;
            };
            if entry.prefetched {
                counts.useful_pages += 1;
                counts.late_pages += u64::from(entry.ready_us > now_us);
                entry.prefetched = false;
            }
            done_us = done_us.max(entry.ready_us);
            if request.read {
                counts.page_hits += 1;
                done_us = done_us.max(fetch(&mut counts, &mut device, now_us, missing));
            }
            missing = 0;
        }
        if request.read {
            done_us = done_us.max(fetch(&mut counts, &mut device, now_us, missing));
            counts.reads += 1;
            counts.read_hits += u64::from(all);
            counts.read_pages += request.pages();
            if latency_us.is_some() {
                latencies.push(done_us - now_us);
            }
        }
        seen(request, all);
        for page in request.first..=request.last {
            cache.insert(page, false, if request.read { done_us } else { now_us }, next_use(page));
        }

        let mut wishes = Wishes {
            cache: &mut cache,
            device: &mut device,
            timed: latency_us.is_some(),
            now_us,
            last_page: trace.last_page,
            from: 0,
            to: 0,
            issued: 0,
        };
        method.observe(request, &mut |page| wishes.page(page));
        wishes.flush();
        counts.prefetched_pages += wishes.issued;
    }
    counts.evicted_unused = cache.wasted;
    (counts, latency_us.map(|_| Latency::of(latencies)))
}

/// Fetches neighbouring missing pages as one transfer; its end, or the past if there are none.
fn fetch(counts: &mut Counts, device: &mut Device, now_us: f64, pages: u64) -> f64 {
    if pages == 0 {
        return 0.0;
    }
    counts.demand_pages += pages;
    device.demand(now_us, pages)
}

/// For each page of each request, in order, the request that uses it next; [`NEVER`] if none does.
fn next_uses(requests: &[Request]) -> Vec<usize> {
    let total: u64 = requests.iter().map(Request::pages).sum();
    let mut uses = vec![NEVER; total as usize];
    let mut seen = rustc_hash::FxHashMap::default();
    let mut end = uses.len();
    for (index, request) in requests.iter().enumerate().rev() {
        let start = end - request.pages() as usize;
        for (page, next) in (request.first..=request.last).zip(&mut uses[start..end]) {
            *next = seen.insert(page, index).unwrap_or(NEVER);
        }
        end = start;
    }
    uses
}
