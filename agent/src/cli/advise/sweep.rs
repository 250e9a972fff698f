//! The replays: a machine's history at several sizes and thresholds, and which of them to recommend.
//!
//! The model of a read's latency: a RAM hit takes [`RAM_US`], a prefetch under way is waited for, everything else waits for
//! the store with its measured latency behind a link of [`MBPS`] (the replay's model of a store); a read that the SSD tier
//! serves takes [`SSD_US`] in place of the store's latency. RAM starts empty and the predictor knows nothing, so that first
//! reads count as they do after a restart on a machine that was never seen. Writes bring nothing into RAM.

use super::ssd::Tiered;
use prestage_cache::policy::Eviction;
use prestage_cache::types::{BLOCK_BYTES, PAGE_BYTES, PAGES_PER_BLOCK};
use prestage_predictor::Op;
use prestage_replay::predictive::PolicyKind;
use prestage_replay::{DeviceConfig, Nothing, Predictive, Prefetcher, ReplayConfig, Request, replay};
use serde::Serialize;
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a read from RAM takes in the replay, µs.
pub(super) const RAM_US: f64 = 10.0;
/// What a read from the SSD tier takes, µs: a flash drive's random read with its queueing.
pub(super) const SSD_US: f64 = 100.0;
/// Bandwidth of the store, MB/s.
const MBPS: f64 = 500.0;
/// The smallest RAM tier that is tried: the daemon's own least.
const RAM_MIN: u64 = 16 * BLOCK_BYTES as u64;
/// Thresholds tried at the size recommended.
const THRESHOLDS: [f64; 5] = [0.05, 0.125, 0.25, 0.5, 0.75];
/// Threshold of the other replays: the configuration's default.
pub(super) const THRESHOLD: f64 = 0.125;
/// A recommendation may be so many points of hit ratio slower than the best that was tried …
const POINTS: f64 = 2.0;
/// … and a threshold that loads less from the store this many.
const THRESHOLD_POINTS: f64 = 0.5;

/// What the history holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Extent {
    pub(super) requests: u64,
    pub(super) reads: u64,
    pub(super) span_us: u64,
    /// Distinct blocks of 64 KiB that were read, in bytes.
    pub(super) set_bytes: u64,
    #[serde(skip)]
    end_page: u64,
}

impl Extent {
    pub(super) fn of(requests: &[Request]) -> Self {
        let mut blocks = HashSet::new();
        let mut extent = Self { requests: requests.len() as u64, ..Self::default() };
        for request in requests.iter().filter(|request| request.op != Op::Discard) {
            extent.end_page = extent.end_page.max(request.pages().end() + 1);
            if request.op == Op::Write {
                continue;
            }
            extent.reads += 1;
            let (first, last) = request.pages().into_inner();
            blocks.extend(first / PAGES_PER_BLOCK..=last / PAGES_PER_BLOCK);
        }
        if let [first, .., last] = requests {
            extent.span_us = last.at_us - first.at_us;
        }
        extent.set_bytes = blocks.len() as u64 * BLOCK_BYTES as u64;
        extent
    }
}

/// One replay's result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Tried {
    pub(super) ram_bytes: u64,
    pub(super) ssd_bytes: u64,
    /// `null`: without prefetch.
    pub(super) threshold: Option<f64>,
    pub(super) reads: u64,
    pub(super) ram_hit_ratio: f64,
    pub(super) ssd_hit_ratio: f64,
    /// Of prefetched pages, those that were used.
    pub(super) precision: f64,
    /// Bytes read from the store.
    pub(super) store_bytes: u64,
    /// Mean of all reads.
    pub(super) latency_us: f64,
}

/// Everything that was tried, and what to take.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Advice {
    /// Without an SSD tier.
    pub(super) recommended: Tried,
    /// With one; absent if it saves no RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) with_ssd: Option<Tried>,
    /// The fastest without an SSD tier.
    pub(super) best: Tried,
    /// By RAM, SSD and threshold, the ones without prefetch first.
    pub(super) tried: Vec<Tried>,
}

fn whole_blocks(bytes: f64) -> u64 {
    ((bytes / BLOCK_BYTES as f64).ceil() as u64 * BLOCK_BYTES as u64).max(RAM_MIN)
}

/// Sizes of the RAM tier: shares of the working set, and the powers of two among them.
fn ram_sizes(set_bytes: u64) -> Vec<u64> {
    let shares = [0.05, 0.1, 0.2, 0.5, 1.0].map(|share| whole_blocks(set_bytes as f64 * share));
    let mut sizes: Vec<u64> =
        (20..48).map(|bits| 1 << bits).filter(|size| (shares[0]..set_bytes).contains(size)).collect();
    for share in shares {
        // A power of two next to it says the same; the whole set is always tried.
        if share == shares[4] || !sizes.iter().any(|size| share.abs_diff(*size) * 5 < share) {
            sizes.push(share);
        }
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// Replays `requests` (in order of time) at each size. `store_us` is the store's latency; `progress` is told how many of how
/// many replays are done.
///
/// # Errors
/// What a replay says: a size that cannot be indexed.
pub(super) fn sweep(
    requests: &[Request],
    extent: &Extent,
    store_us: f64,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Advice, String> {
    let (writes, served): (Vec<Request>, Vec<Request>) = requests.iter().partition(|request| request.op == Op::Write);
    let history = Split { served, writes, end_page: extent.end_page, store_us };
    let ssd_sizes: Vec<u64> = [0.0, 0.25, 0.5, 1.0]
        .map(|share| if share == 0.0 { 0 } else { whole_blocks(extent.set_bytes as f64 * share) })
        .to_vec();
    let mut jobs = Vec::new();
    for ram in ram_sizes(extent.set_bytes) {
        jobs.push((ram, 0, None));
        jobs.extend(ssd_sizes.iter().map(|ssd| (ram, *ssd, Some(THRESHOLD))));
    }
    let all = jobs.len() + THRESHOLDS.len() - 1;
    let run = |jobs: &[Job], before: usize| run_all(&history, jobs, &|n| progress(before + n, all));
    let mut tried = run(&jobs, 0)?;
    let point_us = store_us / 100.0;
    let prefetching = |tried: &&Tried| tried.threshold.is_some();
    let without: Vec<&Tried> = tried.iter().filter(prefetching).filter(|tried| tried.ssd_bytes == 0).collect();
    let (best, chosen) = choose(&without, point_us).ok_or("nothing was replayed")?;
    let (best, chosen) = (best.clone(), chosen.clone());
    let any: Vec<&Tried> = tried.iter().filter(prefetching).collect();
    let with_ssd =
        any.iter().filter(|tried| tried.ssd_bytes > 0 && tried.latency_us <= best.latency_us + POINTS * point_us);
    let with_ssd = with_ssd.min_by_key(|tried| (tried.ram_bytes, tried.ssd_bytes)).copied();
    let with_ssd = with_ssd.filter(|tried| tried.ram_bytes < chosen.ram_bytes).cloned();
    let more: Vec<Job> = THRESHOLDS
        .iter()
        .filter(|threshold| **threshold != THRESHOLD)
        .map(|threshold| (chosen.ram_bytes, 0, Some(*threshold)))
        .collect();
    let more = run(&more, jobs.len())?;
    let by_threshold: Vec<&Tried> = more.iter().chain([&chosen]).collect();
    let fastest = by_threshold.iter().map(|tried| tried.latency_us).fold(f64::INFINITY, f64::min);
    let near = by_threshold.into_iter().filter(|tried| tried.latency_us <= fastest + THRESHOLD_POINTS * point_us);
    let recommended = near.min_by_key(|tried| tried.store_bytes).unwrap_or(&chosen).clone();
    tried.extend(more);
    let plain = tried.iter().filter(prefetching).filter(|tried| tried.ssd_bytes == 0);
    let best = plain.min_by(|a, b| a.latency_us.total_cmp(&b.latency_us)).unwrap_or(&best).clone();
    Ok(Advice { recommended, with_ssd, best, tried })
}

/// The fastest, and the smallest that is nearly as fast.
fn choose<'a>(tried: &[&'a Tried], point_us: f64) -> Option<(&'a Tried, &'a Tried)> {
    let best = tried.iter().min_by(|a, b| a.latency_us.total_cmp(&b.latency_us))?;
    let near = tried.iter().filter(|tried| tried.latency_us <= best.latency_us + POINTS * point_us);
    Some((best, near.min_by_key(|tried| (tried.ram_bytes, tried.ssd_bytes))?))
}

/// What every replay replays.
struct Split {
    /// Reads and discards.
    served: Vec<Request>,
    writes: Vec<Request>,
    end_page: u64,
    store_us: f64,
}

/// RAM and SSD bytes, threshold.
type Job = (u64, u64, Option<f64>);

/// Runs replays on all cores; results are in the order of the jobs.
fn run_all(history: &Split, jobs: &[Job], progress: &(dyn Fn(usize) + Sync)) -> Result<Vec<Tried>, String> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len().max(1));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let index = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(job) = jobs.get(index)
                {
                    let tried = run_one(history, *job);
                    let mut done = done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    done.push((index, tried));
                    progress(done.len());
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, tried)| tried).collect()
}

fn run_one(history: &Split, job: Job) -> Result<Tried, String> {
    let Split { end_page, store_us, .. } = *history;
    let (ram_bytes, ssd_bytes, threshold) = job;
    let capacity_pages = ram_bytes / PAGE_BYTES as u64;
    let config = ReplayConfig {
        trace: String::new(),
        cache: 0.0,
        threshold,
        capacity_pages,
        end_page,
        block_pages: PAGES_PER_BLOCK,
        eviction: Eviction::S3Fifo,
        device: Some(DeviceConfig { latency_us: store_us, mbps: MBPS }),
        marks: Vec::new(),
        cost: false,
    };
    let (mut nothing, mut predictive);
    let policy: &mut dyn Prefetcher = match threshold {
        None => {
            nothing = Nothing;
            &mut nothing
        }
        Some(threshold) => {
            predictive = Predictive::new(PolicyKind::Prestage, threshold as f32, capacity_pages);
            predictive.resize(end_page);
            &mut predictive
        }
    };
    let mut tiered = Tiered::new(policy, &history.writes, ssd_bytes / BLOCK_BYTES as u64);
    let report =
        replay(&config, history.served.iter().copied().map(Ok), &mut tiered, |_| true).map_err(|e| e.to_string())?;
    let reads = report.reads.max(1) as f64;
    let ssd_hit_ratio = tiered.ssd_hits as f64 / reads;
    // In the replay those reads waited for the store.
    let saved_us = ssd_hit_ratio * (store_us - SSD_US).max(0.0);
    let mean_us = report.read_latency_us.map_or(0.0, |latency| latency.mean);
    let page_bytes = PAGE_BYTES as u64;
    let ssd_share = ssd_hit_ratio / (1.0 - report.read_hit_ratio).max(f64::MIN_POSITIVE);
    let demand_bytes = (report.demand_pages * page_bytes) as f64 * (1.0 - ssd_share.min(1.0));
    Ok(Tried {
        ram_bytes,
        ssd_bytes,
        threshold,
        reads: report.reads,
        ram_hit_ratio: report.read_hit_ratio,
        ssd_hit_ratio,
        precision: report.precision,
        store_bytes: demand_bytes as u64 + report.prefetched_pages * page_bytes,
        latency_us: (mean_us - saved_us).max(RAM_US),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(at_us: u64, page: u64, pages: u32) -> Request {
        Request { at_us, op: Op::Read, offset: page * 4096, len: pages * 4096 }
    }

    /// Scattered blocks in a loop: LRU-like caches below the loop's length are of little use, the whole of it is.
    fn looping(blocks: u64, rounds: u64) -> Vec<Request> {
        let at = |i: u64| read(i * 20_000, (i % blocks * 7919 % blocks) * 48, 4);
        (0..blocks * rounds).map(at).collect()
    }

    #[test]
    fn sizes_cover_the_working_set_and_are_distinct() {
        for set in [BLOCK_BYTES as u64, 3 << 20, 100 << 20, 1 << 30, 5 << 40] {
            let sizes = ram_sizes(set);
            assert!(sizes.is_sorted_by(|a, b| a < b) && sizes.len() <= 12, "{set}: {sizes:?}");
            assert!(sizes.iter().all(|size| size % BLOCK_BYTES as u64 == 0 && *size >= RAM_MIN), "{set}: {sizes:?}");
            assert_eq!(*sizes.last().unwrap(), set.max(RAM_MIN));
        }
    }

    #[test]
    fn a_loop_needs_no_more_ram_than_is_worth_it() {
        let requests = looping(600, 12);
        let extent = Extent::of(&requests);
        assert_eq!((extent.set_bytes, extent.reads), (600 * 65536, 7200));
        let advice = sweep(&requests, &extent, 5000.0, &|_, _| {}).unwrap();
        let point = 50.0;
        assert!(advice.recommended.latency_us <= advice.best.latency_us + 2.5 * point, "{advice:?}");
        let smaller = advice.tried.iter().filter(|tried| {
            tried.threshold == Some(THRESHOLD) && tried.ssd_bytes == 0 && tried.ram_bytes < advice.recommended.ram_bytes
        });
        for tried in smaller {
            assert!(tried.latency_us > advice.best.latency_us + 2.0 * point, "{tried:?}");
        }
        // An SSD of the whole set serves every repeat that RAM does not.
        let small = |ssd: u64| {
            let whole = advice.tried.iter().find(|tried| {
                tried.ram_bytes < extent.set_bytes && tried.ssd_bytes == ssd && tried.threshold == Some(THRESHOLD)
            });
            whole.unwrap().clone()
        };
        let (with, without) = (small(extent.set_bytes), small(0));
        assert!(with.ram_hit_ratio + with.ssd_hit_ratio > 0.9, "{with:?}");
        assert!(with.latency_us < without.latency_us);
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        let requests = looping(100, 5);
        let extent = Extent::of(&requests);
        let run = || sweep(&requests, &extent, 1000.0, &|_, _| {}).unwrap();
        assert_eq!(run(), run());
    }
}
