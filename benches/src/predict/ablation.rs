//! What each part of the predictor contributes: the parts alone, all together, and all but the LSTM.
//!
//! Measured is what follows after something to learn from: a trace with marks after the one with marks before it, of any
//! other its second half after its first (see [`Split`]). The LSTM is trained on the first part alone, with a fixed seed.

use anyhow::Result;
use serde::Serialize;

use super::foretold::Foretold;
use super::ours::{self, Policy, Setup};
use super::pool;
use super::row::Row;
use super::split::Split;
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
    /// What was shown to the predictor before and the LSTM was trained on.
    pub(crate) learned_from: String,
    pub(crate) parts: &'static str,
    pub(crate) read_hit_ratio: f64,
    pub(crate) precision: f64,
    #[serde(flatten)]
    pub(crate) foretold: Option<Foretold>,
    /// Hit ratio of everything beyond that of everything but the LSTM.
    pub(crate) lstm_adds: Option<f64>,
}

pub(super) fn run(traces: &[Trace], skipped: &mut Vec<String>) -> Result<Vec<Part>> {
    let marked: Vec<&Trace> = traces.iter().filter(|trace| !trace.marks.is_empty()).collect();
    let before = |trace: &Trace| {
        let at = marked.iter().position(|other| other.name == trace.name)?;
        at.checked_sub(1).map(|at| marked[at])
    };
    let splits = pool::each(traces, |trace| Ok(Split::new(trace, before(trace))))?;
    for split in &splits {
        if let Err(reason) = &split.model {
            skipped.push(format!("the LSTM on {}: {reason}", split.name));
        }
    }
    let jobs: Vec<(&Split, Policy)> = splits.iter().flat_map(|split| PARTS.map(|policy| (split, policy))).collect();
    let rows = pool::each(&jobs, |&(split, policy)| {
        let model = split.model.as_ref().ok();
        if policy == Policy::Lstm && model.is_none() {
            return Ok(None);
        }
        let trace = &split.measured;
        let setup = Setup { trained_on: Some(&split.before), model, ..Setup::new(policy, trace.capacity(CACHE)) };
        Ok(Some(Row::ours(trace, CACHE, &setup, &ours::replay(trace, &setup)?)))
    })?;
    let foretold = pool::each(&splits, |split| ours::foretell(split, &PARTS))?.concat();
    let hit = |name: &str, policy: Policy| {
        let mut same = jobs.iter().zip(&rows).filter(|((split, of), _)| split.name == name && *of == policy);
        same.find_map(|(_, row)| Some(row.as_ref()?.read_hit_ratio))
    };
    let parts = jobs.iter().zip(&rows).zip(foretold).filter_map(|((&(split, policy), row), foretold)| {
        let row = row.as_ref()?;
        let adds = |without: f64| row.read_hit_ratio - without;
        let without =
            hit(&split.name, Policy::WithoutLstm).filter(|_| policy == Policy::Prestage && split.model.is_ok());
        Some(Part {
            trace: split.name.clone(),
            learned_from: split.learned.clone(),
            parts: policy.name(),
            read_hit_ratio: row.read_hit_ratio,
            precision: row.precision,
            foretold,
            lstm_adds: without.map(adds),
        })
    });
    Ok(parts.collect())
}

/// What the columns mean.
const LEGEND: &str = "\
bits: to say in which 64 KiB block the next read starts; top 1: that block was
the first guess (see `foretold`). LSTM adds: hit ratio of all beyond all but it.
";

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
    let mut text = format!("\nParts alone, cache of {size} %, after what came before; LSTM trained on that alone\n");
    let mut named: Vec<(&str, &str)> = Vec::new();
    for part in parts {
        let pair = (part.trace.as_str(), part.learned_from.as_str());
        if !named.contains(&pair) {
            named.push(pair);
            text += &format!("{}: learned from {}\n", pair.0, pair.1);
        }
    }
    text + &aligned(&rows) + LEGEND
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
    let adds = parts
        .iter()
        .filter_map(|part| Some((part, part.lstm_adds?)))
        .map(|(part, adds)| (adds <= 0.0).then(|| format!("{}: {adds:+.4}", part.trace)));
    vec![
        Claim::new("Ablation: the LSTM adds hits", adds),
        Claim::new("Ablation: >= 10 % fewer bits an access than Markov alone", bits),
        Claim::new("Ablation: top-1 no more than .005 below Markov's", top1),
    ]
}
