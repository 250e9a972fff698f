//! A replay's memory does not grow with the trace's length. The only test of its program, so that the process's high-water
//! mark is its own.
//!
//! By hand, with any number of requests and the predictor: `REQUESTS=100000000 cargo test --release -p prestage-replay --test memory --
//! --nocapture`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use prestage_cache::policy::Eviction;
use prestage_replay::trace::ReadOptions;
use prestage_replay::{
    CacheSize, DeviceConfig, Footprint, Nothing, PolicyKind, Predictive, Prefetcher, ReplayConfig, TraceReader, replay,
};
use std::io::Read;

/// A trace that nobody stores: half of it runs, half of it random reads and writes over 16 GiB.
struct Synthetic {
    left: u64,
    at: u64,
    state: u64,
    line: Vec<u8>,
    taken: usize,
}

impl Synthetic {
    fn new(requests: u64) -> Self {
        Self { left: requests, at: 0, state: 1, line: Vec::new(), taken: 0 }
    }
}

impl Read for Synthetic {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.taken == self.line.len() {
            if self.left == 0 {
                return Ok(0);
            }
            self.left -= 1;
            self.at += 1;
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = if self.at.is_multiple_of(2) { self.at * 2 % (1 << 20) } else { self.state >> 42 };
            let op = if self.state >> 20 & 7 == 0 { 'W' } else { 'R' };
            self.line = format!("{},{op},{},16384\n", self.at * 200, page * 4096).into_bytes();
            self.taken = 0;
        }
        let part = (self.line.len() - self.taken).min(buf.len());
        buf[..part].copy_from_slice(&self.line[self.taken..self.taken + part]);
        self.taken += part;
        Ok(part)
    }
}

fn high_water_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Footprint and timed replay. Returns the high-water mark.
fn run(requests: u64, predict: bool) -> u64 {
    let trace = || TraceReader::new("synthetic", Synthetic::new(requests), ReadOptions::default()).unwrap();
    let footprint = Footprint::of(trace(), |_| true).unwrap();
    let capacity_pages = footprint.capacity_pages(CacheSize::Bytes(256 << 20));
    let config = ReplayConfig {
        trace: "synthetic".to_owned(),
        cache: 0.0,
        threshold: Some(0.5),
        capacity_pages,
        end_page: footprint.end_page,
        block_pages: 1,
        eviction: Eviction::S3Fifo,
        device: Some(DeviceConfig { latency_us: 1000.0, mbps: 500.0 }),
        marks: Vec::new(),
        cost: false,
    };
    let mut policy: Box<dyn Prefetcher> =
        if predict { Box::new(Predictive::new(PolicyKind::Prestage, 0.5, capacity_pages)) } else { Box::new(Nothing) };
    let report = replay(&config, trace(), policy.as_mut(), |_| true).unwrap();
    assert_eq!(report.requests, requests);
    high_water_bytes()
}

#[test]
fn memory_does_not_grow_with_the_trace() {
    let by_hand: Option<u64> = std::env::var("REQUESTS").ok().map(|text| text.parse().unwrap());
    let (requests, predict) = by_hand.map_or((300_000, false), |requests| (requests, true));
    // Long enough to fill the cache, the tables and the set of distinct pages.
    let short = run(100_000, predict);
    let long = run(requests, predict);
    println!("{requests} requests: {} MiB at most", long >> 20);
    if !predict {
        // Two bytes a page and 8 a read until there are a million: what is exact is exact.
        assert!(long - short < 8 << 20, "{short} bytes became {long}");
    }
    assert!(long < 64 << 20, "{long}");
}
