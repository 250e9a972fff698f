//! The counts of the replay are those of the reference simulator of this field's prefetch policies, to the last hit, and
//! under random load those of a naive LRU list.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use prestage_cache::policy::Eviction;
use prestage_predictor::Op;
use prestage_replay::trace::ReadOptions;
use prestage_replay::{
    CacheSize, DeviceConfig, Footprint, Nothing, Prefetcher, ReplayConfig, Report, Request, TraceReader, Wish, replay,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

fn head() -> Vec<Request> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/vm_boot1_head.csv.gz"));
    TraceReader::open(path, ReadOptions::default()).unwrap().map(Result::unwrap).collect()
}

fn config(requests: &[Request], fraction: f64, block_pages: u64, device: Option<DeviceConfig>) -> ReplayConfig {
    let footprint = Footprint::of(requests.iter().copied().map(Ok), |_| true).unwrap();
    let size = CacheSize::Fraction(fraction);
    ReplayConfig {
        trace: "head".to_owned(),
        cache: footprint.fraction(size),
        threshold: None,
        capacity_pages: footprint.capacity_pages(size),
        end_page: footprint.end_page,
        block_pages,
        eviction: Eviction::Lru,
        device,
        marks: Vec::new(),
        cost: false,
    }
}

fn run(config: &ReplayConfig, requests: &[Request], policy: &mut impl Prefetcher) -> Report {
    replay(config, requests.iter().copied().map(Ok), policy, |_| true).unwrap()
}

/// What the reference prints for the same trace, policy `none`: counts exactly, ratios to its last digit. It takes times
/// that run backwards (two of the trace do, by microseconds) as they are, which is seen in its mean's second digit.
#[test]
fn counts_and_latencies_are_those_of_the_reference() {
    let requests = head();
    // Slow enough for queues.
    let store = DeviceConfig { latency_us: 1000.0, mbps: 20.0 };
    let cases = [
        (
            0.05,
            json!({
                "policy": "none", "cache": 0.05, "capacity_pages": 1469, "requests": 3001, "reads": 2506, "read_hits": 9,
                "read_hit_ratio": 0.003591, "page_hit_ratio": 0.000649, "demand_pages": 29251, "prefetched_pages": 0,
                "useful_pages": 0, "late_pages": 0, "evicted_unused": 0, "precision": 0.0,
                "read_latency_us": {"mean": 49998.0, "p50": 4481.6, "p99": 493502.6}
            }),
        ),
        (
            0.2,
            json!({
                "policy": "none", "cache": 0.2, "capacity_pages": 5879, "requests": 3001, "reads": 2506, "read_hits": 54,
                "read_hit_ratio": 0.021548, "page_hit_ratio": 0.009464, "demand_pages": 28993, "prefetched_pages": 0,
                "useful_pages": 0, "late_pages": 0, "evicted_unused": 0, "precision": 0.0,
                "read_latency_us": {"mean": 49897.3, "p50": 4481.6, "p99": 493502.6}
            }),
        ),
    ];
    for (fraction, expected) in cases {
        for device in [None, Some(store)] {
            let report = run(&config(&requests, fraction, 1, device), &requests, &mut Nothing);
            let report: Value = serde_json::to_value(&report).unwrap();
            for (key, value) in expected.as_object().unwrap() {
                if key == "read_latency_us" {
                    for (key, value) in value.as_object().unwrap().iter().filter(|_| device.is_some()) {
                        close(key, &report["read_latency_us"][key], value, 0.1);
                    }
                } else if value.is_f64() {
                    close(key, &report[key], value, 0.51e-6);
                } else {
                    assert_eq!(&report[key], value, "{key} at {fraction}");
                }
            }
            assert_eq!(report.get("read_latency_us").is_some(), device.is_some());
        }
    }
}

fn close(key: &str, got: &Value, expected: &Value, within: f64) {
    let (got, expected) = (got.as_f64().unwrap(), expected.as_f64().unwrap());
    assert!((got - expected).abs() <= within, "{key}: {got}, expected {expected}");
}

/// Reads, read hits, hit pages, missed pages.
type Counts = (u64, u64, u64, u64);

/// An LRU list of pages, front first.
fn oracle(requests: &[Request], capacity: usize) -> Counts {
    let mut lru: Vec<u64> = Vec::new();
    let (mut reads, mut hits, mut hit_pages, mut missed_pages) = (0, 0, 0, 0);
    for request in requests {
        let pages: Vec<u64> = request.pages().collect();
        if request.op == Op::Discard {
            lru.retain(|page| !pages.contains(page));
            continue;
        }
        let there: Vec<u64> = pages.iter().copied().filter(|page| lru.contains(page)).collect();
        if request.op == Op::Read {
            reads += 1;
            hits += u64::from(there.len() == pages.len());
            hit_pages += there.len() as u64;
            missed_pages += (pages.len() - there.len()) as u64;
        }
        for page in there {
            lru.retain(|other| *other != page);
            lru.insert(0, page);
        }
        for page in pages {
            if !lru.contains(&page) {
                lru.truncate(capacity - 1);
                lru.insert(0, page);
            }
        }
    }
    (reads, hits, hit_pages, missed_pages)
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let op = prop_oneof![6 => Just(Op::Read), 3 => Just(Op::Write), 1 => Just(Op::Discard)];
    let one = (op, 0u64..1_200_000, 1u32..400_000, 0u64..3000);
    prop::collection::vec(one, 1..150).prop_map(|rows| {
        let mut at_us = 0;
        let request = |(op, offset, len, pause_us)| {
            at_us += pause_us;
            Request { at_us, op, offset, len }
        };
        rows.into_iter().map(request).collect()
    })
}

/// Wishes for anything at all.
struct Anything(u64);

impl Prefetcher for Anything {
    fn name(&self) -> &str {
        "anything"
    }

    fn observe(&mut self, _: &Request, _: bool, now_us: u64, _: &dyn Fn(u64) -> bool, out: &mut Vec<Wish>) {
        for _ in 0..2 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (first, pages) = (self.0 >> 33, self.0 >> 29 & 15);
            let due_us = Some(now_us + (self.0 >> 20 & 0xfff));
            out.push(Wish { first: first % 420, pages, probability: 0.5, due_us, tag: 3 });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn any_trace_has_the_hits_of_a_naive_lru(requests in requests(), fraction in 0.1f64..1.1, timed: bool) {
        let device = timed.then_some(DeviceConfig { latency_us: 500.0, mbps: 100.0 });
        let config = config(&requests, fraction, 1, device);
        let report = run(&config, &requests, &mut Nothing);
        let (reads, hits, hit_pages, missed_pages) = oracle(&requests, report.capacity_pages as usize);
        prop_assert_eq!((report.reads, report.read_hits, report.demand_pages), (reads, hits, missed_pages));
        let ratio = if reads == 0 { 0.0 } else { hit_pages as f64 / (hit_pages + missed_pages) as f64 };
        prop_assert!((report.page_hit_ratio - ratio).abs() < 1e-6);
    }

    #[test]
    fn prefetched_pages_are_accounted_for(
        requests in requests(), fraction in 0.1f64..1.1, lru: bool, timed: bool, block_log2 in 0u32..5, seed: u64,
    ) {
        let device = timed.then_some(DeviceConfig { latency_us: 500.0, mbps: 100.0 });
        let eviction = if lru { Eviction::Lru } else { Eviction::S3Fifo };
        let config = ReplayConfig { eviction, ..config(&requests, fraction, 1 << block_log2, device) };
        let report = run(&config, &requests, &mut Anything(seed));
        prop_assert_eq!(&report, &run(&config, &requests, &mut Anything(seed)), "not deterministic");
        prop_assert!(report.useful_pages + report.evicted_unused <= report.prefetched_pages);
        prop_assert!(report.late_pages <= report.useful_pages);
        prop_assert!(timed || report.late_pages == 0);
        let read_pages: u64 = requests.iter().filter(|r| r.op == Op::Read).map(|r| r.pages().count() as u64).sum();
        let hit_pages = (report.page_hit_ratio * read_pages as f64).round() as u64;
        prop_assert_eq!(hit_pages + report.demand_pages, read_pages);
        prop_assert_eq!(report.cost.store_pages, report.demand_pages + report.prefetched_pages);
        if let Some(latency) = report.read_latency_us {
            prop_assert!(report.reads == 0 || latency.p50 >= 10.0 && latency.p99 >= latency.p50);
        }
    }
}
