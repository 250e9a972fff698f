//! This project's policies on a trace: the production policy core and predictor in the replay driver.

use std::sync::Arc;

use anyhow::{Context, Result};
use prestage_cache::policy::Eviction;
use prestage_predictor::lstm::Weights;
use prestage_predictor::ordinals::Tokeniser;
use prestage_predictor::{BLOCK_PAGES, Op, PAGE_BYTES};
use prestage_replay::{DeviceConfig, Mark, Nothing, PolicyKind, Predictive, Prefetcher, ReplayConfig, Report};

use rustc_hash::FxHashSet;

use super::foretold::{Foreteller, Foretold, Voices};
use super::row::{By, Row};
use super::sets::LearnedSet;
use super::split::{Split, accesses};
use crate::peers::{Latency, MEGABYTES_PER_S};
use crate::trace::{Request, Trace};

/// What the daemon acts on if nobody sets `prefetch.threshold`.
pub(super) const DEFAULT_THRESHOLD: f64 = prestage_predictor::DEFAULT_THRESHOLD as f64;

/// The policies, by what they may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    /// The policy core's eviction alone.
    None,
    /// Streams.
    Readahead,
    /// Markov contexts.
    Markov,
    /// First-touch sets of phases.
    Sets,
    /// Candidates ranked by the LSTM alone.
    Lstm,
    /// Everything but the LSTM.
    WithoutLstm,
    /// Everything.
    Prestage,
}

impl Policy {
    /// Those of the tables, which start knowing nothing: no model is trained yet.
    pub(super) const ALL: [Self; 4] = [Self::None, Self::Readahead, Self::Markov, Self::Prestage];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Readahead => "readahead",
            Self::Markov => "markov",
            Self::Sets => "sets",
            Self::Lstm => "lstm",
            Self::WithoutLstm => "all but lstm",
            Self::Prestage => "prestage",
        }
    }

    /// What proposes in it; `None`: nothing does.
    fn kind(self) -> Option<PolicyKind> {
        match self {
            Self::None => None,
            Self::Readahead => Some(PolicyKind::Readahead),
            Self::Markov => Some(PolicyKind::Markov),
            Self::Sets => Some(PolicyKind::Sets),
            Self::Lstm => Some(PolicyKind::Lstm),
            Self::WithoutLstm | Self::Prestage => Some(PolicyKind::Prestage),
        }
    }

    /// Whether it listens to a model.
    fn listens(self) -> bool {
        matches!(self, Self::Lstm | Self::Prestage)
    }

    /// What it may use to foretell an access; `None`: nothing.
    fn voices(self) -> Option<Voices> {
        let one = Voices { streams: false, markov: false, near: false, sets: false, counts: true, lstm: false };
        let slate = Voices { streams: true, markov: true, near: true, ..one };
        match self {
            Self::None => None,
            Self::Readahead => Some(Voices { streams: true, ..one }),
            Self::Markov => Some(Voices { markov: true, ..one }),
            Self::Sets => Some(Voices { sets: true, ..one }),
            Self::Lstm => Some(Voices { counts: false, lstm: true, ..slate }),
            Self::WithoutLstm => Some(Voices { sets: true, ..slate }),
            Self::Prestage => Some(Voices { sets: true, lstm: true, ..slate }),
        }
    }
}

/// A replay: what runs, on how much.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup<'a> {
    pub(super) policy: Policy,
    /// Cache in pages.
    pub(super) capacity: usize,
    /// Of the store; `None`: untimed.
    pub(super) latency_us: Option<f64>,
    /// Least probability that is acted on.
    pub(super) threshold: f64,
    /// Observed before, with its marks; then the cache is empty and the trace starts with its own marks.
    pub(super) trained_on: Option<&'a Trace>,
    /// For policies with an LSTM.
    pub(super) model: Option<&'a Arc<Weights>>,
    /// Time the predictor.
    pub(super) cost: bool,
}

impl Setup<'_> {
    /// Defaults, untimed and untrained.
    pub(super) fn new(policy: Policy, capacity: usize) -> Self {
        Self {
            policy,
            capacity,
            latency_us: None,
            threshold: DEFAULT_THRESHOLD,
            trained_on: None,
            model: None,
            cost: false,
        }
    }

    /// The production predictor, trained as asked for; for [`Policy::None`] one that never speaks.
    pub(super) fn prefetcher(&self) -> Result<Box<dyn Prefetcher>> {
        let Some(kind) = self.policy.kind() else { return Ok(Box::new(Nothing)) };
        let mut predictive = Predictive::new(kind, self.threshold as f32, self.capacity as u64);
        let model = self.model.filter(|_| self.policy.listens());
        // Reads that a model was trained on make it look better than it is: beside other experts it comes in after them,
        // as in a daemon. Alone it has no other place to learn what its word is worth.
        let alone = kind == PolicyKind::Lstm;
        if let Some(model) = model.filter(|_| alone) {
            predictive.set_model(Arc::clone(model));
        }
        if let Some(trace) = self.trained_on {
            predictive.train(requests(trace.requests.iter().copied()), &trace.marks, |_| true)?;
        }
        if let Some(model) = model.filter(|_| !alone) {
            predictive.set_model(Arc::clone(model));
        }
        Ok(Box::new(predictive))
    }

    /// Runs `prefetcher` over requests that end before `end_page`.
    pub(super) fn run(
        &self,
        requests: impl IntoIterator<Item = Result<prestage_replay::Request, prestage_replay::TraceError>>,
        end_page: u64,
        marks: &[Mark],
        prefetcher: &mut dyn Prefetcher,
    ) -> Result<Report> {
        let config = ReplayConfig {
            trace: String::new(),
            cache: 0.0,
            threshold: Some(self.threshold),
            capacity_pages: self.capacity as u64,
            end_page,
            block_pages: 1,
            eviction: Eviction::S3Fifo,
            device: self.latency_us.map(|latency_us| DeviceConfig { latency_us, mbps: MEGABYTES_PER_S }),
            marks: marks.to_vec(),
            cost: self.cost,
        };
        prestage_replay::replay(&config, requests, prefetcher, |_| true).context("replay")
    }
}

/// The requests as the replay driver takes them: whole pages, times that never run backwards.
pub(super) fn requests(
    requests: impl IntoIterator<Item = Request>,
) -> impl Iterator<Item = Result<prestage_replay::Request, prestage_replay::TraceError>> {
    let mut latest_us = 0;
    requests.into_iter().map(move |request| {
        latest_us = request.at_us.max(latest_us);
        Ok(prestage_replay::Request {
            at_us: latest_us,
            op: if request.read { Op::Read } else { Op::Write },
            offset: request.first * PAGE_BYTES,
            len: u32::try_from(request.pages() * PAGE_BYTES).unwrap_or(u32::MAX),
        })
    })
}

/// Runs a policy over a trace.
pub(super) fn replay(trace: &Trace, setup: &Setup) -> Result<Report> {
    let marks = if setup.trained_on.is_some() { trace.marks.as_slice() } else { &[] };
    let mut prefetcher = setup.prefetcher()?;
    let report = setup.run(requests(trace.requests.iter().copied()), trace.last_page + 1, marks, prefetcher.as_mut());
    report.with_context(|| trace.name.clone())
}

/// How well each of the policies foretells the reads of a trace, having seen what came before it; `None` where a policy has
/// nothing to foretell with.
pub(super) fn foretell(split: &Split, policies: &[Policy]) -> Result<Vec<Option<Foretold>>> {
    let model = split.model.as_deref().ok();
    let blocks: FxHashSet<u64> = split
        .measured
        .requests
        .iter()
        .flat_map(|request| request.first / BLOCK_PAGES..=request.last / BLOCK_PAGES)
        .collect();
    let voices = policies.iter().map(|policy| policy.voices().filter(|voices| !voices.lstm || model.is_some()));
    let mut tellers: Vec<_> =
        voices.map(|voices| voices.map(|voices| Foreteller::new(voices, blocks.len(), model))).collect();
    let mut tokeniser = Tokeniser::new();
    for (trace, counted) in [(&split.before, false), (&split.measured, true)] {
        let mut set = LearnedSet::of(split, counted)?;
        for access in accesses(trace) {
            let slate = tokeniser.slate().clone();
            set.advance(&access);
            if let Some(token) = tokeniser.push(&access) {
                let (offered, block) = (set.offered(), access.first / BLOCK_PAGES);
                for teller in tellers.iter_mut().flatten() {
                    teller.read(&slate, &offered, block, token, counted);
                }
            }
            set.read(&access);
        }
    }
    Ok(tellers.iter().map(|teller| teller.as_ref().and_then(Foreteller::foretold)).collect())
}

impl Row {
    /// A row of a replay with a cache of `share` of the trace's pages.
    pub(super) fn ours(trace: &Trace, share: f64, setup: &Setup, report: &Report) -> Self {
        let count = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let latency = report.read_latency_us.map(|times| Latency { mean: times.mean, p50: times.p50, p99: times.p99 });
        Self {
            trace: trace.name.clone(),
            policy: setup.policy.name().to_owned(),
            by: By::Prestage,
            cache: share,
            capacity_pages: count(report.capacity_pages),
            requests: count(report.requests),
            reads: report.reads,
            read_hits: report.read_hits,
            read_hit_ratio: report.read_hit_ratio,
            page_hit_ratio: report.page_hit_ratio,
            demand_pages: report.demand_pages,
            prefetched_pages: report.prefetched_pages,
            useful_pages: report.useful_pages,
            late_pages: report.late_pages,
            evicted_unused: report.evicted_unused,
            precision: report.precision,
            read_latency_us: latency,
            latency_us: setup.latency_us,
            threshold: (setup.policy != Policy::None).then_some(setup.threshold),
            coverage: report.coverage,
            timeliness: latency.filter(|_| report.useful_pages > 0).map(|_| report.timeliness),
            store_pages: report.cost.store_pages,
            ece: report.ece,
            brier: report.brier,
            ece_all: report.ece_all,
            brier_all: report.brier_all,
            ns_per_access: report.cost.predictor_ns_per_access,
        }
    }
}
