//! Every method on every trace at every size, untimed and with stores of the given latencies.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use super::libcachesim::Environment;
use super::ours::{self, Policy, Setup};
use super::row::{By, Row};
use super::{Options, pool};
use crate::peers::{Method, Peer, simulate};
use crate::trace::Trace;

pub(super) fn run(traces: &[Trace], options: &Options, skipped: &mut Vec<String>) -> Result<Vec<Row>> {
    let mut jobs = Vec::new();
    for trace in traces {
        for &share in &options.sizes {
            jobs.extend(options.stores().map(|latency_us| (trace, share, latency_us)));
        }
    }
    let mut rows = pool::each(&jobs, |&(trace, share, latency_us)| one(trace, share, latency_us))?.concat();
    if options.libcachesim {
        rows.extend(eviction_peers(traces, options, skipped));
    }
    for trace in traces {
        costs(trace, options.sizes.first().copied().unwrap_or(0.0), &mut rows)?;
    }
    Ok(rows)
}

/// All methods of one trace, size and store.
fn one(trace: &Trace, share: f64, latency_us: Option<f64>) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for peer in Peer::ALL {
        let (counts, latency) = simulate(trace, peer, trace.capacity(share), latency_us, |_, _| ());
        let (trace, policy) = (trace.name.clone(), peer.name().to_owned());
        rows.push(Row { trace, policy, cache: share, latency_us, ..Row::of(&counts, latency) });
    }
    for policy in Policy::ALL {
        let setup = Setup { latency_us, ..Setup::new(policy, trace.capacity(share)) };
        rows.push(Row::ours(trace, share, &setup, &ours::replay(trace, &setup)?));
    }
    Ok(rows)
}

/// Rows of the package, or the reason why there are none: the other figures are worth having without them.
fn eviction_peers(traces: &[Trace], options: &Options, skipped: &mut Vec<String>) -> Vec<Row> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let results = Environment::find_or_make(&target.join("libcachesim"))
        .and_then(|environment| pool::each(traces, |trace| environment.run(trace, &options.sizes)));
    match results {
        Ok(results) => {
            if let Some((_, version)) = results.first() {
                println!("libcachesim {version}: LRU, S3-FIFO, SIEVE, ARC");
            }
            results.into_iter().flat_map(|(rows, _)| rows).collect()
        }
        Err(error) => {
            skipped.push(format!("libcachesim: {error:#}"));
            Vec::new()
        }
    }
}

/// Times the methods themselves, one after the other with nothing beside them: what a peer takes for an access of the trace
/// does not depend on a cache, and what the predictor takes hardly does.
#[allow(clippy::cast_precision_loss)] // shown in whole nanoseconds
fn costs(trace: &Trace, share: f64, rows: &mut [Row]) -> Result<()> {
    let mut set = |by: By, policy: &str, ns: f64| {
        let same = |row: &&mut Row| row.by == by && row.policy == policy && row.trace == trace.name;
        rows.iter_mut().filter(same).for_each(|row| row.ns_per_access = Some(ns));
    };
    for peer in [Peer::Readahead, Peer::Leap, Peer::Markov, Peer::MarkovReadahead] {
        let mut method = Method::new(peer);
        let mut wished = 0u64;
        let begin = Instant::now();
        for request in &trace.requests {
            method.observe(request, &mut |page| wished ^= page);
        }
        let spent = begin.elapsed();
        std::hint::black_box(wished);
        set(By::Peers, peer.name(), spent.as_nanos() as f64 / trace.requests.len().max(1) as f64);
    }
    for policy in Policy::ALL.into_iter().filter(|policy| *policy != Policy::None) {
        let setup = Setup { cost: true, ..Setup::new(policy, trace.capacity(share)) };
        let report = ours::replay(trace, &setup)?;
        if let Some(ns) = report.cost.predictor_ns_per_access {
            set(By::Prestage, policy.name(), ns);
        }
    }
    Ok(())
}
