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
/// … and a threshold, or none, that loads less from the store this many.
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
    /// Without an SSD tier; without prefetch (`threshold` is `null`) where that is as good and loads less.
    pub(super) recommended: Tried,
    /// With one, again with or without prefetch; absent if it saves no RAM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) with_ssd: Option<Tried>,
    /// The fastest without an SSD tier, with or without prefetch.
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
    // The other thresholds, and an SSD tier without prefetch.
    let all = jobs.len() + THRESHOLDS.len();
    let run = |jobs: &[Job], before: usize| run_all(&history, jobs, &|n| progress(before + n, all));
    let mut tried = run(&jobs, 0)?;
    let point_us = store_us / 100.0;
    let of_ram: Vec<&Tried> = tried.iter().filter(|tried| tried.ssd_bytes == 0).collect();
    let chosen = smallest(&of_ram, fastest(&of_ram)?.latency_us + POINTS * point_us)?.clone();
    let more: Vec<Job> = THRESHOLDS
        .iter()
        .filter(|threshold| **threshold != THRESHOLD)
        .map(|threshold| (chosen.ram_bytes, 0, Some(*threshold)))
        .collect();
    let more = run(&more, jobs.len())?;
    let before = jobs.len() + more.len();
    tried.extend(more);
    let of_ram: Vec<&Tried> = tried.iter().filter(|tried| tried.ssd_bytes == 0).collect();
    let best = fastest(&of_ram)?.clone();
    // No prefetch is one of them: it has to be as good, and loads least.
    let at_size: Vec<&Tried> = of_ram.into_iter().filter(|tried| tried.ram_bytes == chosen.ram_bytes).collect();
    let recommended = lightest(&at_size, point_us)?.clone();

    let of_ssd: Vec<&Tried> =
        tried.iter().filter(|tried| tried.ssd_bytes > 0 && tried.ram_bytes < chosen.ram_bytes).collect();
    let with_ssd = match smallest(&of_ssd, best.latency_us + POINTS * point_us) {
        Err(_) => None,
        Ok(with) => {
            let with = with.clone();
            let plain = run(&[(with.ram_bytes, with.ssd_bytes, None)], before)?;
            let chosen = lightest(&plain.iter().chain([&with]).collect::<Vec<_>>(), point_us)?.clone();
            tried.extend(plain);
            Some(chosen)
        }
    };
    Ok(Advice { recommended, with_ssd, best, tried })
}

fn fastest<'a>(tried: &[&'a Tried]) -> Result<&'a Tried, String> {
    let fastest = tried.iter().min_by(|a, b| a.latency_us.total_cmp(&b.latency_us));
    fastest.copied().ok_or_else(|| "nothing was replayed".to_owned())
}

/// The smallest that is not slower than `most_us`.
fn smallest<'a>(tried: &[&'a Tried], most_us: f64) -> Result<&'a Tried, String> {
    let near = tried.iter().filter(|tried| tried.latency_us <= most_us);
    near.min_by_key(|tried| (tried.ram_bytes, tried.ssd_bytes)).copied().ok_or_else(|| "none is as fast".to_owned())
}

/// Of one size: what loads least from the store of those that are as fast as the fastest.
fn lightest<'a>(tried: &[&'a Tried], point_us: f64) -> Result<&'a Tried, String> {
    let most_us = fastest(tried)?.latency_us + THRESHOLD_POINTS * point_us;
    let near = tried.iter().filter(|tried| tried.latency_us <= most_us);
    near.min_by_key(|tried| tried.store_bytes).copied().ok_or_else(|| "none is as fast".to_owned())
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
    fn no_prefetch_is_recommended_where_it_is_as_good_and_loads_less() {
        // Few blocks in an order that never comes back, far apart in time: nothing can be foretold, and RAM holds them all.
        let mut state = 7_u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % 400
        };
        let requests: Vec<Request> = (0..12_000).map(|i| read(i * 20_000, random() * 48, 4)).collect();
        let advice = sweep(&requests, &Extent::of(&requests), 5000.0, &|_, _| {}).unwrap();
        let taken = &advice.recommended;
        assert_eq!(taken.threshold, None, "{advice:?}");
        let rivals = advice.tried.iter().filter(|tried| tried.ram_bytes == taken.ram_bytes && tried.ssd_bytes == 0);
        assert_eq!(rivals.clone().count(), 1 + THRESHOLDS.len());
        for rival in rivals {
            assert!(
                taken.latency_us <= rival.latency_us + 0.5 * 50.0 && taken.store_bytes <= rival.store_bytes,
                "{rival:?}"
            );
        }
        // A sequential reader is another matter.
        let requests: Vec<Request> = (0..12_000).map(|i| read(i * 20_000, i * 4, 4)).collect();
        let advice = sweep(&requests, &Extent::of(&requests), 5000.0, &|_, _| {}).unwrap();
        assert!(advice.recommended.threshold.is_some(), "{advice:?}");
    }

    #[test]
    fn results_do_not_depend_on_threads() {
        let requests = looping(100, 5);
        let extent = Extent::of(&requests);
        let run = || sweep(&requests, &extent, 1000.0, &|_, _| {}).unwrap();
        assert_eq!(run(), run());
    }
}
