//! The production predictor as a replay's policy.

use crate::marks::{Mark, MarkKind};
use crate::prefetcher::{Outcome, Prefetcher, Wish};
use crate::trace::{Request, TraceError};
use prestage_cache::types::PageRange;
use prestage_predictor::lstm::Weights;
use prestage_predictor::{
    Access, AccessConfig, AccessPredictor, CalibrationStats, Candidate, Expert, ExpertSet, PAGE_BYTES,
};
use std::sync::Arc;

/// The guest of a trace.
const VM: u64 = 1;
/// Between the end of what was trained on and the replay: the machine was off.
const PAUSE_US: u64 = 3_600_000_000;

/// Requests between two turns of the LSTM. The daemon gives it a turn when it has handed on what was foreseen, which with
/// one guest at work is after each of its requests.
const FORETELL_EVERY: u32 = 1;

/// Which of the predictor's experts propose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// Streams.
    Readahead,
    /// Contexts of blocks and distances.
    Markov,
    /// First-touch sets of phases.
    Sets,
    /// All name pages, and the LSTM alone says how likely they are.
    Lstm,
    /// All.
    Prestage,
}

impl PolicyKind {
    /// As on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Readahead => "readahead",
            Self::Markov => "markov",
            Self::Sets => "sets",
            Self::Lstm => "lstm",
            Self::Prestage => "prestage",
        }
    }

    const fn experts(self) -> ExpertSet {
        match self {
            Self::Readahead => ExpertSet::of(&[Expert::Sequential, Expert::Backward, Expert::Stride]),
            Self::Markov => ExpertSet::of(&[Expert::Markov, Expert::Log]),
            Self::Sets => ExpertSet::of(&[Expert::Phase]),
            Self::Lstm => ExpertSet::of(&[
                Expert::Sequential,
                Expert::Backward,
                Expert::Stride,
                Expert::Spatial,
                Expert::Markov,
                Expert::Log,
                Expert::Lstm,
            ]),
            Self::Prestage => ExpertSet::ALL,
        }
    }
}

/// A request as the predictor takes it, all of one guest.
#[must_use]
pub fn access(request: &Request) -> Access {
    let range = PageRange::covering(request.offset, u64::from(request.len));
    let pages = u32::try_from(range.count).unwrap_or(u32::MAX);
    Access { at_us: request.at_us, vm: VM, op: request.op, first: range.first, pages }
}

/// [`AccessPredictor`] with the daemon's threshold in front of it.
#[derive(Debug)]
pub struct Predictive {
    kind: PolicyKind,
    predictor: AccessPredictor,
    threshold: f32,
    /// Added to the trace's times: the predictor's clock runs on from what it was trained on.
    shift_us: u64,
    /// Requests since the LSTM has read them.
    unread: u32,
    candidates: Vec<Candidate>,
}

impl Predictive {
    /// A predictor that knows nothing, for a cache of `capacity_pages`. Candidates below `threshold` (0 ..= 1) are left
    /// out, as the daemon does with `prefetch.threshold`.
    #[must_use]
    pub fn new(kind: PolicyKind, threshold: f32, capacity_pages: u64) -> Self {
        let defaults = AccessConfig::default();
        let config = AccessConfig {
            min_probability: threshold,
            // As in the daemon: a window that exceeds half of the tier would wait in the queue instead.
            phase_window_bytes: defaults.phase_window_bytes.min(capacity_pages * PAGE_BYTES / 2),
            cache_pages: capacity_pages,
            // As the driver has it, to compare like with like.
            writes_cached: true,
            experts: kind.experts(),
            model_alone: kind == PolicyKind::Lstm,
            ..defaults
        };
        Self {
            kind,
            predictor: AccessPredictor::new(config),
            threshold,
            shift_us: 0,
            unread: 0,
            candidates: Vec::new(),
        }
    }

    /// The LSTM that speaks from now on.
    pub fn set_model(&mut self, model: Arc<Weights>) {
        self.predictor.set_model(Some(model));
    }

    /// The predictor itself.
    #[must_use]
    pub fn predictor(&self) -> &AccessPredictor {
        &self.predictor
    }

    /// Shows the predictor a trace, and what the guest did when. Then the machine is off: what was learned stays, what
    /// is cached and where the guest was is forgotten. `progress` as in [`crate::replay`]; ended early, what was seen
    /// until then is learned.
    ///
    /// # Errors
    /// The first error of `requests`.
    pub fn train(
        &mut self,
        requests: impl IntoIterator<Item = Result<Request, TraceError>>,
        marks: &[Mark],
        mut progress: impl FnMut(u64) -> bool,
    ) -> Result<(), TraceError> {
        let (mut marks, mut count, mut latest_us) = (marks.iter().peekable(), 0u64, 0);
        for request in requests {
            let request = request?;
            latest_us = request.at_us;
            while let Some(mark) = marks.next_if(|mark| mark.at_us <= latest_us) {
                self.begin_or_end(mark);
            }
            self.predictor.observe(&self.access(&request));
            self.predictor.predict(self.clock(latest_us), &mut self.candidates);
            self.candidates.clear();
            self.foretell();
            count += 1;
            if count.is_multiple_of(crate::driver::PROGRESS_EVERY) && !progress(count) {
                break;
            }
        }
        for mark in marks {
            latest_us = latest_us.max(mark.at_us);
            self.begin_or_end(mark);
        }
        self.predictor.phase_end(VM, self.clock(latest_us));
        self.predictor.vm_forget(VM);
        self.predictor.forget_resident();
        self.shift_us = self.clock(latest_us).saturating_add(PAUSE_US);
        Ok(())
    }

    /// Nothing is proposed from this page on.
    pub fn resize(&mut self, end_page: u64) {
        self.predictor.resize(end_page);
    }

    fn clock(&self, at_us: u64) -> u64 {
        at_us.saturating_add(self.shift_us)
    }

    fn access(&self, request: &Request) -> Access {
        Access { at_us: self.clock(request.at_us), ..access(request) }
    }

    fn begin_or_end(&mut self, mark: &Mark) {
        let at_us = self.clock(mark.at_us);
        match &mark.kind {
            MarkKind::Start { phase, .. } => self.predictor.phase_start(VM, *phase, at_us),
            MarkKind::End => self.predictor.phase_end(VM, at_us),
        }
    }

    fn foretell(&mut self) {
        self.unread += 1;
        if self.unread >= FORETELL_EVERY {
            self.unread = 0;
            self.predictor.foretell(|_, _| ());
        }
    }

    fn predict(&mut self, now_us: u64, out: &mut Vec<Wish>) {
        self.predictor.predict(self.clock(now_us), &mut self.candidates);
        let (threshold, shift_us) = (self.threshold, self.shift_us);
        let passing = self.candidates.drain(..).filter(|candidate| candidate.probability >= threshold);
        out.extend(passing.map(|candidate| Wish {
            first: candidate.first,
            pages: u64::from(candidate.pages),
            probability: candidate.probability,
            due_us: candidate.due_us.map(|due_us| due_us.saturating_sub(shift_us)),
            tag: candidate.expert.index() as u8,
        }));
    }
}

impl Prefetcher for Predictive {
    fn name(&self) -> &str {
        self.kind.name()
    }

    fn observe(&mut self, request: &Request, _: bool, now_us: u64, _: &dyn Fn(u64) -> bool, out: &mut Vec<Wish>) {
        self.predictor.observe(&self.access(request));
        self.predict(now_us, out);
        self.foretell();
    }

    fn outcome(&mut self, outcome: &Outcome) {
        let Some(expert) = Expert::ALL.get(usize::from(outcome.tag)) else { return };
        self.predictor.outcome(&prestage_predictor::Outcome {
            first: outcome.first,
            pages: u32::try_from(outcome.pages).unwrap_or(u32::MAX),
            expert: *expert,
            used: outcome.used,
            late: outcome.late,
        });
    }

    fn left(&mut self, first: u64, pages: u64) {
        self.predictor.evicted(first, u32::try_from(pages).unwrap_or(u32::MAX));
    }

    fn mark(&mut self, mark: &Mark, now_us: u64, out: &mut Vec<Wish>) {
        self.begin_or_end(mark);
        self.predict(now_us, out);
    }

    fn idle(&mut self, now_us: u64, out: &mut Vec<Wish>) {
        self.predict(now_us, out);
    }

    fn calibration(&self) -> Option<CalibrationStats> {
        Some(self.predictor.calibration()).filter(|stats| stats.settled > 0.0)
    }
}
