//! What each part of the predictor contributes: the parts alone, all together, and all but the LSTM.

use anyhow::Result;
use serde::Serialize;

use super::ours::{self, Foretold, Policy, Setup};
use super::pool;
use super::row::Row;
use super::tables::{aligned, share};
use super::verdict::Claim;
use crate::trace::Trace;

/// Cache, as a share of the trace's pages.
const CACHE: f64 = 0.05;
const PARTS: [Policy; 6] =
    [Policy::Readahead, Policy::Markov, Policy::Sets, Policy::Lstm, Policy::WithoutLstm, Policy::Prestage];
/// What the whole is to save of Markov's bits, and may lose of its first guesses.
const BITS: f64 = 0.9;
const TOP1: f64 = 0.005;

/// One set of parts on one trace.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Part {
    pub(crate) trace: String,
    /// The trace with marks before it, if both have any: phase sets have to be learned somewhere.
    pub(crate) trained_on: Option<String>,
    pub(crate) parts: &'static str,
    pub(crate) read_hit_ratio: f64,
    pub(crate) precision: f64,
    #[serde(flatten)]
    pub(crate) foretold: Option<Foretold>,
    /// Hit ratio of everything beyond that of everything but the LSTM.
    pub(crate) lstm_adds: Option<f64>,
}

pub(super) fn run(traces: &[Trace]) -> Result<Vec<Part>> {
    let marked: Vec<&Trace> = traces.iter().filter(|trace| !trace.marks.is_empty()).collect();
    let before = |trace: &Trace| {
        let at = marked.iter().position(|other| other.name == trace.name)?;
        at.checked_sub(1).map(|at| marked[at])
    };
    let jobs: Vec<(&Trace, Policy)> = traces.iter().flat_map(|trace| PARTS.map(|policy| (trace, policy))).collect();
    let rows = pool::each(&jobs, |&(trace, policy)| {
        let setup = Setup { trained_on: before(trace), ..Setup::new(policy, trace.capacity(CACHE)) };
        let Some(report) = ours::replay(trace, &setup)? else { return Ok(None) };
        let row = Row::ours(trace, CACHE, &setup, &report);
        Ok(Some((row, before(trace).map(|trace| trace.name.clone()), policy, ours::foretell(trace, &setup))))
    })?;
    let rows: Vec<_> = rows.into_iter().flatten().collect();
    let without = |trace: &str| {
        let same = rows.iter().find(|(row, _, policy, _)| row.trace == trace && *policy == Policy::WithoutLstm);
        same.map(|(row, ..)| row.read_hit_ratio)
    };
    let part = |(row, trained_on, policy, foretold): &(Row, Option<String>, Policy, Option<Foretold>)| Part {
        trace: row.trace.clone(),
        trained_on: trained_on.clone(),
        parts: policy.name(),
        read_hit_ratio: row.read_hit_ratio,
        precision: row.precision,
        foretold: *foretold,
        lstm_adds: without(&row.trace).filter(|_| *policy == Policy::Prestage).map(|hit| row.read_hit_ratio - hit),
    };
    Ok(rows.iter().map(part).collect())
}

pub(super) fn table(parts: &[Part]) -> String {
    let heads = ["", "", "hit", "prec", "bits", "top 1", "LSTM adds"].map(str::to_owned).to_vec();
    let mut rows = vec![heads];
    for part in parts {
        rows.push(vec![
            part.trace.clone(),
            part.parts.to_owned(),
            share(Some(part.read_hit_ratio)),
            share(Some(part.precision)),
            part.foretold.map_or("-".to_owned(), |foretold| format!("{:.2}", foretold.bits_per_access)),
            share(part.foretold.map(|foretold| foretold.top1)),
            part.lstm_adds.map_or("-".to_owned(), |adds| format!("{adds:+.4}")),
        ]);
    }
    let size = CACHE * 100.0;
    format!("\nParts alone, cache of {size} %; a trace with marks after the one before it\n{}", aligned(&rows))
}

pub(super) fn claims(parts: &[Part]) -> Vec<Claim> {
    let of = |trace: &str, policy: Policy| {
        parts.iter().find(|part| part.trace == trace && part.parts == policy.name()).and_then(|part| part.foretold)
    };
    let pairs: Vec<(&str, Foretold, Foretold)> = parts
        .iter()
        .filter(|part| part.parts == Policy::Prestage.name())
        .filter_map(|part| Some((part.trace.as_str(), part.foretold?, of(&part.trace, Policy::Markov)?)))
        .collect();
    let bits = pairs.iter().map(|(trace, all, markov)| {
        let fails = all.bits_per_access > BITS * markov.bits_per_access;
        fails.then(|| format!("{trace}: {:.2} bits, markov {:.2}", all.bits_per_access, markov.bits_per_access))
    });
    let top1 = pairs.iter().map(|(trace, all, markov)| {
        let fails = all.top1 < markov.top1 - TOP1;
        fails.then(|| format!("{trace}: {}, markov {}", share(Some(all.top1)), share(Some(markov.top1))))
    });
    vec![
        Claim::new("Ablation: >= 10 % fewer bits an access than Markov alone", bits),
        Claim::new("Ablation: top-1 no more than .005 below Markov's", top1),
    ]
}
