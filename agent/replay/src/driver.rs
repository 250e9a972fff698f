//! The replay: requests in, counts out.
//!
//! The rules, the same for every policy:
//!
//! - A page is 4 KiB; a page that a request touches in part counts whole. Reads and writes bring their pages into the cache,
//!   discards take theirs out.
//! - A read hits if all its pages are cached, or on their way, when it arrives. What is resident is used first, in
//!   ascending order, then what is missing gets room, in ascending order.
//! - Then the policy sees the request and what it wishes goes to the core's queue: it is issued as its budget, the
//!   eviction and the neighbours allow, merged, and never beyond the trace's last page.
//! - Untimed, every I/O is done at once and the budget is unlimited. Timed, requests come at the trace's times whatever
//!   the store does (an open loop); a read's latency is that of its last page, a page on its way is waited for, and a hit
//!   takes 10 µs. A demand read settles in the index at once, its data is there when the model of the store says so.

use crate::device::{Device, DeviceConfig};
use crate::latency::Latencies;
use crate::marks::{Mark, MarkKind};
use crate::prefetcher::{Outcome, Prefetcher, Wish};
use crate::report::{Cost, PhaseReport, ReadLatency, Report, ratio};
use crate::scores::Scores;
use crate::trace::{Request, TraceError};
use prestage_cache::policy::{
    BudgetConfig, Core, CoreConfig, Eviction, OutcomeKind, PrefetchIo, PrefetchRequest, PrefetchStep, SlotGuard,
    WriteEnd,
};
use prestage_cache::types::{BlockIndex, PAGE_BYTES, PageMask, PageRange, StorageId, fit_block_pages};
use prestage_predictor::Op;
use rustc_hash::FxHashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests between two calls of `progress`.
pub const PROGRESS_EVERY: u64 = 4096;
/// What a read takes that waits for nothing, µs.
const HIT_US: f64 = 10.0;
/// The policy is asked this often in a pause, as the daemon's learner does.
const IDLE_US: u64 = 1_000_000;
/// For so long: no set is proposed further ahead.
const IDLE_FOR: u64 = 150;
/// Demand reads whose latency the budget has yet to be told; a store that is further behind than this is sampled.
const DEMAND_WAITING: usize = 1 << 16;
/// Pages that wait in the queue with their probability; beyond it those probabilities are forgotten, which costs nothing
/// but their part in the calibration error.
const QUEUED_PAGES: usize = 1 << 19;
/// Slots of a cache, at most: its index takes some 60 bytes for each, here 8 GB.
const MAX_SLOTS: u64 = 1 << 27;
const STORAGE: StorageId = StorageId(0);

/// What to replay on.
#[derive(Clone, Debug)]
pub struct ReplayConfig {
    /// The trace's name in the report.
    pub trace: String,
    /// Cache size as a share of the trace's distinct pages, for the report.
    pub cache: f64,
    /// Probability below which the policy is silent, for the report.
    pub threshold: Option<f64>,
    /// Capacity in 4 KiB pages; whole blocks of it are used. See [`crate::Footprint::capacity_pages`].
    pub capacity_pages: u64,
    /// Nothing is prefetched from this page on.
    pub end_page: u64,
    /// Unit of allocation: 1, 2, 4, 8 or 16 pages.
    pub block_pages: u64,
    pub eviction: Eviction,
    /// `None`: untimed.
    pub device: Option<DeviceConfig>,
    /// In order of time.
    pub marks: Vec<Mark>,
    /// Measure the policy's time.
    pub cost: bool,
}

/// Why a replay has no report.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("a cache of {pages} pages of 4 KiB is more than {MAX_SLOTS} blocks; use a smaller cache or larger blocks")]
    TooLarge { pages: u64 },
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// `progress` said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Replays a trace against an empty cache. `progress` is called every [`PROGRESS_EVERY`] requests with their number;
/// `false` ends the replay.
///
/// # Errors
/// The first error of `requests`; a cache that cannot be indexed; [`Interrupted`].
pub fn replay<P: Prefetcher + ?Sized>(
    config: &ReplayConfig,
    requests: impl IntoIterator<Item = Result<Request, TraceError>>,
    prefetcher: &mut P,
    mut progress: impl FnMut(u64) -> bool,
) -> Result<Report, ReplayError> {
    let mut driver = Driver::new(config, prefetcher)?;
    for request in requests {
        let request = request?;
        driver.advance(request.at_us);
        driver.request(&request);
        if driver.report.requests.is_multiple_of(PROGRESS_EVERY) && !progress(driver.report.requests) {
            return Err(Interrupted.into());
        }
    }
    Ok(driver.finish())
}

/// Nobody copies out of a slot: the driver has no memory.
#[derive(Debug)]
struct Unheld;

impl SlotGuard for Unheld {
    fn busy(&self, _: u32) -> bool {
        false
    }
}

/// A page that was prefetched, and is neither used nor lost.
#[derive(Clone, Copy, Debug)]
struct Prefetched {
    probability: f32,
    /// Index of the phase in which it was issued.
    phase: u32,
}

/// A prefetch under way.
#[derive(Debug)]
struct UnderWay {
    io: PrefetchIo,
    issued_us: f64,
    ready_us: f64,
}

struct Driver<'a, P: ?Sized> {
    config: &'a ReplayConfig,
    prefetcher: &'a mut P,
    core: Core,
    block_pages: u64,
    device: Option<Device>,
    report: Report,
    read_pages: u64,
    page_hits: u64,
    latencies: Latencies,
    scores: Scores,
    /// By slot and page in it: when the data is there. Only in timed mode.
    ready_us: Vec<f64>,
    /// In order of arrival: demand queues behind demand, and prefetch behind prefetch.
    demand: VecDeque<(f64, f64)>,
    prefetches: VecDeque<UnderWay>,
    /// Probability of pages that wait in the core's queue.
    queued: FxHashMap<u64, f32>,
    prefetched: FxHashMap<u64, Prefetched>,
    phases: Vec<PhaseReport>,
    next_mark: usize,
    last_us: u64,
    idle_at_us: u64,
    wishes: Vec<Wish>,
    filled: Vec<(u32, PageMask)>,
    policy_ns: u128,
}

impl<'a, P: Prefetcher + ?Sized> Driver<'a, P> {
    fn new(config: &'a ReplayConfig, prefetcher: &'a mut P) -> Result<Self, ReplayError> {
        let block_pages = fit_block_pages(config.block_pages);
        let slots = (config.capacity_pages / block_pages).max(1);
        let slots = u32::try_from(slots)
            .ok()
            .filter(|slots| u64::from(*slots) <= MAX_SLOTS)
            .ok_or(ReplayError::TooLarge { pages: config.capacity_pages })?;
        let defaults = CoreConfig::with_slots(slots);
        let unlimited = BudgetConfig { max_bytes_in_flight: u64::MAX, max_requests: u32::MAX, bytes_per_second: None };
        let mut core = Core::new(
            CoreConfig {
                block_pages,
                eviction: config.eviction,
                write_allocate: true,
                budget: if config.device.is_some() { defaults.budget } else { unlimited },
                ..defaults
            },
            Arc::new(Unheld),
        );
        core.add_storage(STORAGE, config.end_page);
        let timed_pages = if config.device.is_some() { u64::from(slots) * block_pages } else { 0 };
        let report = Report {
            trace: config.trace.clone(),
            policy: prefetcher.name().to_owned(),
            cache: config.cache,
            capacity_pages: u64::from(slots) * block_pages,
            block_bytes: block_pages * PAGE_BYTES as u64,
            eviction: match config.eviction {
                Eviction::S3Fifo => "s3-fifo",
                Eviction::Lru => "lru",
            }
            .to_owned(),
            threshold: config.threshold,
            ..Report::default()
        };
        let start = PhaseReport { name: "-".to_owned(), ..PhaseReport::default() };
        Ok(Self {
            config,
            prefetcher,
            core,
            block_pages,
            device: config.device.map(Device::new),
            report,
            read_pages: 0,
            page_hits: 0,
            latencies: Latencies::default(),
            scores: Scores::default(),
            ready_us: vec![0.0; timed_pages as usize],
            demand: VecDeque::new(),
            prefetches: VecDeque::new(),
            queued: FxHashMap::default(),
            prefetched: FxHashMap::default(),
            phases: vec![start],
            next_mark: 0,
            last_us: 0,
            idle_at_us: IDLE_US,
            wishes: Vec::new(),
            filled: Vec::new(),
            policy_ns: 0,
        })
    }

    /// Everything that happens until `now_us`, in order: completions, marks, pauses.
    fn advance(&mut self, now_us: u64) {
        loop {
            // Nothing more to come is not the end of time: a trace's clock may be there.
            let mark_us = self.config.marks.get(self.next_mark).map(|mark| mark.at_us).filter(|at_us| *at_us <= now_us);
            let idle_us = Some(self.idle_at_us).filter(|at_us| *at_us < now_us);
            match (mark_us, idle_us) {
                (None, None) => break,
                (Some(mark_us), idle_us) if idle_us.is_none_or(|idle_us| mark_us <= idle_us) => {
                    self.complete(mark_us);
                    self.mark(mark_us);
                }
                (_, Some(idle_us)) => {
                    self.complete(idle_us);
                    self.idle_at_us = self.idle_at_us.saturating_add(IDLE_US);
                    if self.idle_at_us > self.last_us.saturating_add(IDLE_FOR * IDLE_US) {
                        self.idle_at_us = u64::MAX;
                    }
                    self.ask(idle_us, |prefetcher, out| prefetcher.idle(idle_us, out));
                }
                (Some(_), None) => break,
            }
        }
        self.complete(now_us);
        self.last_us = now_us;
        self.idle_at_us = now_us.saturating_add(IDLE_US);
    }

    fn mark(&mut self, at_us: u64) {
        let config = self.config;
        let Some(mark) = config.marks.get(self.next_mark) else { return };
        self.next_mark += 1;
        let name = match &mark.kind {
            MarkKind::Start { name, .. } => name.clone(),
            MarkKind::End => "-".to_owned(),
        };
        self.phases.push(PhaseReport { name, start_us: at_us, ..PhaseReport::default() });
        self.ask(at_us, |prefetcher, out| prefetcher.mark(mark, at_us, out));
    }

    /// Ends the I/O that is done by `now_us`, and issues what that made room for.
    fn complete(&mut self, now_us: u64) {
        let now = now_us as f64;
        loop {
            let demand_us = self.demand.front().map_or(f64::INFINITY, |(ready, _)| *ready);
            let prefetch_us = self.prefetches.front().map_or(f64::INFINITY, |under_way| under_way.ready_us);
            if demand_us.min(prefetch_us) > now {
                return;
            }
            if demand_us <= prefetch_us {
                if let Some((ready, latency)) = self.demand.pop_front() {
                    self.core.demand_latency(STORAGE, duration(ready), duration(latency));
                }
            } else if let Some(UnderWay { io, issued_us, ready_us }) = self.prefetches.pop_front() {
                self.settle(&io, duration(ready_us), duration(ready_us - issued_us));
                self.pump(ready_us);
            }
        }
    }

    fn settle(&mut self, io: &PrefetchIo, now: Duration, latency: Duration) {
        for (slot, first, count) in &io.parts {
            self.core.finish_fill(*slot, PageMask::run(*first, *count), true);
        }
        self.core.finish_prefetch(STORAGE, io.pages, true, now, latency);
    }

    /// Issues prefetches until the queue is empty or budget or room is not to be had.
    fn pump(&mut self, now_us: f64) {
        let now = duration(now_us);
        while let PrefetchStep::Io(io) = self.core.next_prefetch(STORAGE, now, |_| PageMask::NONE) {
            let phase = self.phases.len() - 1;
            self.phases[phase].prefetched_pages += io.pages;
            for page in io.first..io.first + io.pages {
                let probability = self.queued.remove(&page).unwrap_or(f32::NAN);
                self.prefetched.insert(page, Prefetched { probability, phase: phase as u32 });
            }
            match &mut self.device {
                None => self.settle(&io, now, Duration::ZERO),
                Some(device) => {
                    let ready_us = device.prefetch(now_us, io.pages * PAGE_BYTES as u64);
                    for (slot, first, count) in &io.parts {
                        self.set_ready(*slot, PageMask::run(*first, *count), ready_us);
                    }
                    self.prefetches.push_back(UnderWay { io, issued_us: now_us, ready_us });
                }
            }
        }
        if self.core.prefetch_backlog(STORAGE) == 0 || self.queued.len() > QUEUED_PAGES {
            self.queued.clear();
        }
    }

    fn set_ready(&mut self, slot: u32, pages: PageMask, ready_us: f64) {
        let base = slot as usize * self.block_pages as usize;
        for (first, count) in pages.runs() {
            if let Some(pages) = self.ready_us.get_mut(base + first as usize..base + (first + count) as usize) {
                pages.fill(ready_us);
            }
        }
    }

    /// When the last of some pages of a slot is there.
    fn ready(&self, slot: u32, pages: PageMask) -> f64 {
        let base = slot as usize * self.block_pages as usize;
        let pages = pages.runs().flat_map(|(first, count)| base + first as usize..base + (first + count) as usize);
        pages.filter_map(|page| self.ready_us.get(page)).fold(0.0, |latest, ready| ready.max(latest))
    }

    fn request(&mut self, request: &Request) {
        self.report.requests += 1;
        let range = PageRange::covering(request.offset, u64::from(request.len));
        let now = Duration::from_micros(request.at_us);
        let hit = match request.op {
            Op::Read => self.read(range, now),
            Op::Write => self.write(request, now, WriteEnd::Written),
            Op::Discard => self.write(request, now, WriteEnd::Changed),
        };
        if !self.queued.is_empty() {
            for page in range.first..range.end() {
                self.queued.remove(&page);
            }
        }
        self.ask_about(request, hit);
    }

    fn ask_about(&mut self, request: &Request, hit: bool) {
        // Taken apart so that the policy can look into the core.
        let now_us = request.at_us;
        self.outcomes();
        let begun = self.config.cost.then(Instant::now);
        let (core, block_pages) = (&self.core, self.block_pages);
        let resident = |page: u64| {
            core.valid(STORAGE, BlockIndex(page / block_pages)).is_some_and(|(_, valid)| valid.has(page % block_pages))
        };
        self.prefetcher.observe(request, hit, now_us, &resident, &mut self.wishes);
        if let Some(begun) = begun {
            self.policy_ns += begun.elapsed().as_nanos();
        }
        self.push(now_us);
    }

    fn ask(&mut self, now_us: u64, question: impl FnOnce(&mut P, &mut Vec<Wish>)) {
        self.outcomes();
        let begun = self.config.cost.then(Instant::now);
        question(self.prefetcher, &mut self.wishes);
        if let Some(begun) = begun {
            self.policy_ns += begun.elapsed().as_nanos();
        }
        self.push(now_us);
    }

    /// Queues what the policy wished, and issues what may go.
    fn push(&mut self, now_us: u64) {
        for wish in self.wishes.drain(..) {
            let range = PageRange { first: wish.first, count: wish.pages };
            let request = PrefetchRequest {
                range,
                due: Duration::from_micros(wish.due_us.unwrap_or(now_us)),
                probability: wish.probability,
                tag: wish.tag,
            };
            self.core.push_prefetch(STORAGE, &[request]);
            for page in range.first..range.end().min(self.config.end_page) {
                self.queued.insert(page, wish.probability);
            }
        }
        if self.core.prefetch_backlog(STORAGE) > 0 {
            self.pump(now_us as f64);
        }
        self.outcomes();
    }

    /// Takes note of what became of prefetched pages.
    fn outcomes(&mut self) {
        for outcome in self.core.take_outcomes().0 {
            if outcome.kind == OutcomeKind::Left {
                for (first, pages) in outcome.pages.runs() {
                    self.prefetcher.left(outcome.block.0 * self.block_pages + first, pages);
                }
                continue;
            }
            let used = outcome.kind != OutcomeKind::Evicted;
            let late = outcome.kind == OutcomeKind::Late;
            for (first, pages) in outcome.pages.runs() {
                let first = outcome.block.0 * self.block_pages + first;
                for page in first..first + pages {
                    let Some(Prefetched { probability, phase }) = self.prefetched.remove(&page) else { continue };
                    if !probability.is_nan() {
                        self.scores.record(probability, used);
                    }
                    if let Some(phase) = self.phases.get_mut(phase as usize) {
                        phase.useful_pages += u64::from(used);
                        phase.late_pages += u64::from(late);
                    }
                }
                self.prefetcher.outcome(&Outcome { first, pages, tag: outcome.tag, used, late });
            }
        }
    }

    fn read(&mut self, range: PageRange, now: Duration) -> bool {
        let now_us = now.as_micros() as f64;
        let mut done_us = now_us + HIT_US;
        let (mut hits, mut missing) = (0, 0);
        let mut filled = std::mem::take(&mut self.filled);
        filled.clear();
        for (block, wanted) in range.blocks_of(self.block_pages) {
            let resident = self.core.valid(STORAGE, block).is_some();
            let have = if resident {
                let plan = self.core.plan_read(STORAGE, block, wanted, now);
                if let Some(slot) = plan.slot {
                    done_us = done_us.max(self.ready(slot, plan.hit | plan.wait));
                    self.core.finish_fill(slot, plan.fill, true);
                    filled.push((slot, plan.fill));
                }
                plan.hit | plan.wait
            } else {
                PageMask::NONE
            };
            hits += have.count();
            // Neighbouring pages that are missing are one I/O, also across blocks.
            let mut at = 0;
            for (first, count) in have.runs() {
                missing += (wanted & PageMask::run(at, first - at)).count();
                done_us = done_us.max(self.fetch(&mut missing, now_us));
                at = first + count;
            }
            missing += (wanted & PageMask::run(at, self.block_pages)).count();
        }
        done_us = done_us.max(self.fetch(&mut missing, now_us));
        for (slot, pages) in &filled {
            self.set_ready(*slot, *pages, done_us);
        }
        self.filled = filled;
        for (block, wanted) in range.blocks_of(self.block_pages) {
            if self.core.valid(STORAGE, block).is_some() {
                continue;
            }
            let plan = self.core.plan_read(STORAGE, block, wanted, now);
            if let Some(slot) = plan.slot {
                self.core.finish_fill(slot, plan.fill, true);
                self.set_ready(slot, plan.fill, done_us);
            }
        }
        let hit = hits == range.count;
        self.report.reads += 1;
        self.report.read_hits += u64::from(hit);
        self.read_pages += range.count;
        self.page_hits += hits;
        if let Some(phase) = self.phases.last_mut() {
            phase.reads += 1;
            phase.read_hits += u64::from(hit);
        }
        if self.device.is_some() {
            self.latencies.record(done_us - now_us);
        }
        hit
    }

    /// Reads a run of missing pages from the store; returns when it is there.
    fn fetch(&mut self, missing: &mut u64, now_us: f64) -> f64 {
        let pages = std::mem::take(missing);
        self.report.demand_pages += pages;
        match &mut self.device {
            Some(device) if pages > 0 => {
                let ready_us = device.demand(now_us, pages * PAGE_BYTES as u64);
                if self.demand.len() < DEMAND_WAITING {
                    self.demand.push_back((ready_us, ready_us - now_us));
                }
                ready_us
            }
            _ => 0.0,
        }
    }

    /// Returns whether all pages were cached.
    fn write(&mut self, request: &Request, now: Duration, end: WriteEnd) -> bool {
        let (offset, len) = (request.offset, u64::from(request.len));
        let range = PageRange::covering(offset, len);
        let hit = self.core.resident_pages(STORAGE, range) == range.count;
        let Some(id) = self.core.begin_write(STORAGE, offset, len) else { return hit };
        if self.device.is_none() {
            self.core.end_write(STORAGE, id, end, now, |_, _, _| {});
            return hit;
        }
        // What the write brought in is there at once; what was on its way before still is.
        let resident = |(block, _)| Some((block, self.core.valid(STORAGE, block)?.1));
        let mut before: FxHashMap<BlockIndex, PageMask> =
            range.blocks_of(self.block_pages).filter_map(resident).collect();
        let mut new = std::mem::take(&mut self.filled);
        new.clear();
        self.core.end_write(STORAGE, id, end, now, |block, slot, pages| {
            new.push((slot, pages.minus(before.remove(&block).unwrap_or(PageMask::NONE))));
        });
        for (slot, pages) in &new {
            self.set_ready(*slot, *pages, 0.0);
        }
        self.filled = new;
        hit
    }

    fn finish(mut self) -> Report {
        self.outcomes();
        let counters = self.core.prefetch_counters(STORAGE);
        let mut report = self.report;
        report.prefetched_pages = counters.issued;
        report.useful_pages = counters.used;
        report.late_pages = counters.late;
        report.evicted_unused = counters.evicted_unused;
        report.read_hit_ratio = ratio(report.read_hits, report.reads);
        report.page_hit_ratio = ratio(self.page_hits, self.read_pages);
        report.precision = ratio(counters.used, counters.issued);
        report.coverage = ratio(counters.used, counters.used + report.demand_pages);
        report.timeliness = ratio(counters.used - counters.late, counters.used);
        report.evicted_unused_ratio = ratio(counters.evicted_unused, counters.issued);
        report.ece = self.scores.ece();
        report.brier = self.scores.brier();
        let all = self.prefetcher.calibration();
        (report.ece_all, report.brier_all) = (all.map(|all| all.error), all.map(|all| all.brier));
        if self.device.is_some() {
            let [p50, p99] = self.latencies.quantiles([0.5, 0.99]);
            report.read_latency_us = Some(ReadLatency { mean: self.latencies.mean(), p50, p99 });
        }
        let store_pages = report.demand_pages + counters.issued;
        report.cost = Cost {
            store_pages,
            store_ratio: ratio(store_pages, self.read_pages),
            predictor_ns_per_access: self.config.cost.then(|| self.policy_ns as f64 / report.requests.max(1) as f64),
        };
        if !self.config.marks.is_empty() {
            for phase in &mut self.phases {
                phase.read_hit_ratio = ratio(phase.read_hits, phase.reads);
                phase.precision = ratio(phase.useful_pages, phase.prefetched_pages);
            }
            self.phases.retain(|phase| phase.reads > 0 || phase.prefetched_pages > 0);
            report.phases = self.phases;
        }
        report
    }
}

fn duration(us: f64) -> Duration {
    // Beyond 2^64 ns a float's microseconds end up at the largest duration's; negative ones do not occur.
    Duration::from_nanos((us * 1000.0) as u64)
}
