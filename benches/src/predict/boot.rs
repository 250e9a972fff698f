//! A second boot: trained on one trace with its marks, replaying the next one that has marks, phase by phase.

use anyhow::Result;
use prestage_replay::Report;
use serde::Serialize;

use super::ours::{self, Policy, Setup};
use super::tables::{aligned, share};
use super::verdict::Claim;
use super::{Options, pool};
use crate::record::ratio;
use crate::trace::Trace;

/// Cache, as a share of the replayed trace's pages.
const CACHE: f64 = 0.20;
/// Phases that are shown and not judged: `pgs` reads at random and does not repeat, in `idle` hardly anything is read.
const APART: [&str; 2] = ["pgs", "idle"];
/// The driver's name for what lies between programs.
const BETWEEN: &str = "-";
/// What is asked of the judged phases.
const HIT: f64 = 0.97;
const PRECISION: f64 = 0.9;

/// A phase of the replayed trace; a program that ran twice counts once.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) judged: bool,
    pub(crate) reads: u64,
    pub(crate) read_hits: u64,
    pub(crate) read_hit_ratio: f64,
    /// Issued in the phase; used whenever that was.
    pub(crate) prefetched_pages: u64,
    pub(crate) useful_pages: u64,
    pub(crate) late_pages: u64,
    pub(crate) precision: Option<f64>,
}

/// One replay after one training.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Boot {
    pub(crate) trained_on: String,
    pub(crate) trace: String,
    pub(crate) cache: f64,
    pub(crate) latency_us: Option<f64>,
    pub(crate) phases: Vec<Phase>,
}

/// Every two neighbours among the traces with marks, untimed and with each store.
pub(super) fn run(traces: &[Trace], options: &Options) -> Result<Vec<Boot>> {
    let marked: Vec<&Trace> = traces.iter().filter(|trace| !trace.marks.is_empty()).collect();
    let mut jobs = Vec::new();
    for pair in marked.windows(2) {
        jobs.extend(options.stores().map(|latency_us| (pair[0], pair[1], latency_us)));
    }
    pool::each(&jobs, |&(trained_on, trace, latency_us)| {
        let setup =
            Setup { latency_us, trained_on: Some(trained_on), ..Setup::new(Policy::Prestage, trace.capacity(CACHE)) };
        let phases = phases(&ours::replay(trace, &setup)?);
        let (trained_on, trace) = (trained_on.name.clone(), trace.name.clone());
        Ok(Boot { trained_on, trace, cache: CACHE, latency_us, phases })
    })
}

fn phases(report: &Report) -> Vec<Phase> {
    let mut phases: Vec<Phase> = Vec::new();
    for part in &report.phases {
        let known = phases.iter().position(|phase| phase.name == part.name);
        let index = known.unwrap_or_else(|| {
            let judged = part.name != BETWEEN && !APART.contains(&part.name.as_str());
            phases.push(Phase { name: part.name.clone(), judged, ..Phase::default() });
            phases.len() - 1
        });
        let phase = &mut phases[index];
        phase.reads += part.reads;
        phase.read_hits += part.read_hits;
        phase.prefetched_pages += part.prefetched_pages;
        phase.useful_pages += part.useful_pages;
        phase.late_pages += part.late_pages;
    }
    for phase in &mut phases {
        phase.read_hit_ratio = ratio(phase.read_hits, phase.reads).unwrap_or(0.0);
        phase.precision = ratio(phase.useful_pages, phase.prefetched_pages);
    }
    phases
}

fn store(latency_us: Option<f64>) -> String {
    latency_us.map_or("untimed".to_owned(), |latency_us| format!("store of {} ms", latency_us / 1e3))
}

pub(super) fn table(boot: &Boot) -> String {
    let heads = ["phase", "reads", "hit", "prefetched", "prec", "late"].map(str::to_owned).to_vec();
    let mut rows = vec![heads];
    for phase in &boot.phases {
        rows.push(vec![
            if phase.judged { phase.name.clone() } else { format!("({})", phase.name) },
            phase.reads.to_string(),
            share(ratio(phase.read_hits, phase.reads)),
            phase.prefetched_pages.to_string(),
            share(phase.precision),
            phase.late_pages.to_string(),
        ]);
    }
    let (trained_on, trace, share) = (&boot.trained_on, &boot.trace, boot.cache * 100.0);
    format!("\n{trace} after {trained_on}, cache of {share} %, {}\n{}", store(boot.latency_us), aligned(&rows))
}

pub(super) fn claims(boots: &[Boot]) -> Vec<Claim> {
    let judged = |check: fn(&Phase) -> Option<String>| {
        boots.iter().flat_map(move |boot| {
            let place = format!("{}, {}", boot.trace, store(boot.latency_us));
            let phases = boot.phases.iter().filter(|phase| phase.judged);
            phases.map(move |phase| check(phase).map(|value| format!("{place}, {}: {value}", phase.name)))
        })
    };
    let hit = |phase: &Phase| (phase.read_hit_ratio < HIT).then(|| share(Some(phase.read_hit_ratio)));
    let precision = |phase: &Phase| {
        phase.precision.filter(|precision| *precision < PRECISION).map(|precision| share(Some(precision)))
    };
    vec![
        Claim::new("Second boot: >= .97 of each judged phase's reads hit", judged(hit)),
        Claim::new("Second boot: precision >= .9 in each judged phase", judged(precision)),
    ]
}
