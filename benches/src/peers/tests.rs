//! The peers' counts on a recorded boot, held to those of an independent simulator of the same rules.

use std::path::Path;

use super::{Peer, simulate};
use crate::trace::Trace;

/// Peer; cache; capacity, read hits, demand, prefetched and useful pages, evicted unused; page hit ratio; late pages untimed
/// and with a store of 1 ms; then the latency's mean, median and 99th percentile in µs. A prefetch can be late without
/// device times because some of the trace's times run backwards.
type Expected = (Peer, f64, [u64; 6], f64, [u64; 2], [f64; 3]);

const EXPECTED: [Expected; 12] = [
    (Peer::None, 0.01, [454, 9, 45129, 0, 0, 0], 0.000421, [0, 0], [1034.3, 1008.2, 1262.1]),
    (Peer::None, 0.2, [9091, 55, 44870, 0, 0, 0], 0.006158, [0, 0], [1029.9, 1008.2, 1262.1]),
    (Peer::Readahead, 0.01, [454, 1927, 35824, 32629, 9322, 23251], 0.206521, [2, 2738], [907.7, 1008.2, 1262.1]),
    (Peer::Readahead, 0.2, [9091, 3636, 30636, 22424, 14255, 5746], 0.321432, [2, 2017], [723.4, 1008.2, 1262.1]),
    (Peer::Leap, 0.01, [454, 39, 45039, 154, 90, 64], 0.002414, [0, 1], [1031.6, 1008.2, 1262.1]),
    (Peer::Leap, 0.2, [9091, 89, 44770, 152, 100, 46], 0.008372, [0, 1], [1026.8, 1008.2, 1262.1]),
    (Peer::Markov, 0.01, [454, 1631, 42390, 53399, 2744, 50655], 0.061088, [0, 1558], [944.1, 1008.2, 1270.3]),
    (Peer::Markov, 0.2, [9091, 2424, 41082, 4350, 3794, 165], 0.090059, [0, 265], [817.9, 1008.2, 1262.1]),
    (
        Peer::MarkovReadahead,
        0.01,
        [454, 2974, 34222, 81088, 10922, 70110],
        0.242004,
        [0, 3560],
        [846.7, 1008.2, 1280.7],
    ),
    (Peer::MarkovReadahead, 0.2, [9091, 4472, 29458, 23967, 15436, 5862], 0.347524, [0, 1718], [634.7, 1008.2, 1262.1]),
    (Peer::Opt, 0.01, [454, 57, 44868, 0, 0, 0], 0.006202, [0, 0], [1029.7, 1008.2, 1262.1]),
    (Peer::Opt, 0.2, [9091, 57, 44868, 0, 0, 0], 0.006202, [0, 0], [1029.7, 1008.2, 1262.1]),
];

fn boot() -> Trace {
    Trace::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("traces/vm_boot1.csv.gz")).unwrap()
}

#[test]
fn every_peer_counts_as_the_reference_does() {
    let trace = boot();
    for (peer, share, counts, page_hit_ratio, late, latency) in EXPECTED {
        for (latency_us, late) in [None, Some(1000.0)].into_iter().zip(late) {
            let told = format!("{} at {share}, {latency_us:?}", peer.name());
            let (got, times) = simulate(&trace, peer, trace.capacity(share), latency_us, |_, _| ());
            assert_eq!((got.requests, got.reads), (11_639, 10_826), "{told}");
            let all = [
                got.capacity_pages as u64,
                got.read_hits,
                got.demand_pages,
                got.prefetched_pages,
                got.useful_pages,
                got.evicted_unused,
            ];
            assert_eq!(all, counts, "{told}");
            assert_eq!(got.late_pages, late, "{told}");
            let ratio = got.page_hits as f64 / got.read_pages as f64;
            assert!((ratio - page_hit_ratio).abs() < 1e-6, "{told}: {ratio}");
            let times = times.map(|times| [times.mean, times.p50, times.p99]);
            assert_eq!(times.is_some(), latency_us.is_some());
            for (got, expected) in times.into_iter().flatten().zip(latency) {
                assert!((got - expected).abs() < 0.051, "{told}: {got} instead of {expected}");
            }
        }
    }
}
