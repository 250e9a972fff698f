//! What an ablation learns from and what it is measured on, and the model that is trained for it.

use std::sync::Arc;

use prestage_predictor::lstm::{Token, Weights};
use prestage_predictor::ordinals::Tokeniser;
use prestage_predictor::{Access, Op};
use prestage_train::{Corpus, TrainConfig, Trainer};

use crate::trace::{Request, Trace};

/// Steps of a training, 2048 tokens each: some 20 passes through the longest of the traces, a minute of one core.
const STEPS: u64 = 1000;

/// A trace in two parts: the one with marks before it and itself, or its own halves.
#[derive(Debug)]
pub(super) struct Split {
    /// Of the trace that is measured.
    pub(super) name: String,
    /// What was learned from, in words.
    pub(super) learned: String,
    pub(super) before: Trace,
    pub(super) measured: Trace,
    /// Trained on `before`; else why not.
    pub(super) model: Result<Arc<Weights>, String>,
}

impl Split {
    /// `after` is the trace that came before, where there is one with marks: phase sets have to be learned somewhere.
    pub(super) fn new(trace: &Trace, after: Option<&Trace>) -> Self {
        let part = |requests: &[Request], from: &Trace| {
            let mut part = Trace::new(&from.name, requests.to_vec());
            if let (Some(first), Some(last)) = (requests.first(), requests.last()) {
                let within = from.marks.iter().filter(|mark| (first.at_us..=last.at_us).contains(&mark.at_us));
                part.marks = within.cloned().collect();
            }
            part
        };
        let whole = |trace: &Trace| {
            let mut whole = Trace::new(&trace.name, trace.requests.clone());
            whole.marks.clone_from(&trace.marks);
            whole
        };
        let (learned, before, measured) = match after {
            Some(other) => (other.name.clone(), whole(other), whole(trace)),
            None => {
                let (first, second) = trace.requests.split_at(trace.requests.len() / 2);
                ("its first half".to_owned(), part(first, trace), part(second, trace))
            }
        };
        let model = train(&before).map(Arc::new);
        Self { name: trace.name.clone(), learned, before, measured, model }
    }
}

/// A model of a trace's reads; the same every time.
fn train(trace: &Trace) -> Result<Weights, String> {
    let mut tokeniser = Tokeniser::new();
    let tokens: Vec<Token> = accesses(trace).filter_map(|access| tokeniser.push(&access)).collect();
    let corpus = Corpus::new(vec![tokens]).map_err(|error| error.to_string())?;
    let mut trainer = Trainer::new(TrainConfig::default(), corpus);
    trainer.train(STEPS, &|| false).map_err(|error| error.to_string())?;
    trainer.export().cloned().ok_or_else(|| "no model came out of the training".to_owned())
}

/// The requests as the predictor takes them: times that never run backwards.
pub(super) fn accesses(trace: &Trace) -> impl Iterator<Item = Access> {
    let mut latest_us = 0;
    trace.requests.iter().map(move |request| {
        latest_us = request.at_us.max(latest_us);
        Access {
            at_us: latest_us,
            vm: 1,
            op: if request.read { Op::Read } else { Op::Write },
            first: request.first,
            pages: u32::try_from(request.pages()).unwrap_or(u32::MAX),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_without_one_before_it_is_halved_and_too_little_to_train_on_is_said() {
        let request = |at: u64| Request { at_us: at, read: true, first: at, last: at };
        let trace = Trace::new("t", (0..100).map(request).collect());
        let halves = Split::new(&trace, None);
        assert_eq!((halves.before.requests.len(), halves.measured.requests[0].at_us), (50, 50));
        assert!(halves.model.unwrap_err().contains("too little to train on"));
        let after = Split::new(&trace, Some(&Trace::new("u", vec![request(7)])));
        assert_eq!((after.learned.as_str(), after.before.requests.len(), after.measured.requests.len()), ("u", 1, 100));
    }
}
