//! How well symbols are predicted that were held out of training.

use crate::corpus::Corpus;
use prestage_predictor::lstm::{Lead, SYMBOLS, State, Token, Weights};

/// Tokens before the held-out ones that a model sees without being judged, so that it does not start from nothing.
const WARM_UP: usize = 256;
/// Weight of the shorter context in a longer one, in observations.
const BACK_OFF: f64 = 4.0;

/// Predictions at one lead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LeadScore {
    pub lead: Lead,
    /// Symbols that were predicted.
    pub predictions: u64,
    /// Mean of -log₂ of the probability that the right symbol was given.
    pub bits: f64,
    /// Share of predictions whose most likely symbol was the right one.
    pub top1: f64,
}

/// Sums of one lead.
#[derive(Clone, Copy, Default)]
struct Sums {
    predictions: u64,
    bits: f64,
    first: u64,
}

impl Sums {
    fn score(self, lead: Lead) -> LeadScore {
        let all = self.predictions.max(1) as f64;
        LeadScore { lead, predictions: self.predictions, bits: self.bits / all, top1: self.first as f64 / all }
    }
}

/// The model on the held-out tokens, by the kernels that production runs.
#[must_use]
pub fn evaluate(weights: &Weights, corpus: &Corpus) -> [LeadScore; 3] {
    let mut sums = [Sums::default(); 3];
    for (tokens, split) in corpus.splits() {
        let mut state = State::default();
        for (at, token) in tokens.iter().enumerate().skip(split.saturating_sub(WARM_UP)) {
            weights.step(&mut state, *token);
            if at < split {
                continue;
            }
            for (lead, sums) in Lead::ALL.into_iter().zip(&mut sums) {
                let Some(target) = tokens.get(at + lead.accesses()) else { continue };
                let mut logits = [0.0; SYMBOLS];
                weights.logits(&state, lead, &mut logits);
                let mut score = [0.0];
                weights.score(&state, lead, &[target.symbol()], &mut score);
                let right = logits[usize::from(target.symbol())];
                sums.predictions += 1;
                sums.bits -= f64::from(score[0]) * std::f64::consts::LOG2_E;
                // a tie is no hit
                sums.first += u64::from(logits.iter().filter(|logit| **logit >= right).count() == 1);
            }
        }
    }
    std::array::from_fn(|lead| sums[lead].score(Lead::ALL[lead]))
}

/// The peer: a Markov model over symbols of order 2 that backs off to orders 1 and 0, one for each lead. Unlike the
/// LSTM, whose weights stand still, it goes on counting through the held-out tokens, as an online model does.
#[must_use]
pub fn markov(corpus: &Corpus) -> [LeadScore; 3] {
    Lead::ALL.map(|lead| {
        let mut model = Markov::new();
        let mut sums = Sums::default();
        let symbol = |token: &Token| usize::from(token.symbol());
        // all training parts first: the held-out parts of all sequences come after them
        for (tokens, split) in corpus.splits() {
            for at in 1..split.saturating_sub(lead.accesses()) {
                model.count(symbol(&tokens[at - 1]), symbol(&tokens[at]), symbol(&tokens[at + lead.accesses()]));
            }
        }
        for (tokens, split) in corpus.splits() {
            for at in split.max(1)..tokens.len().saturating_sub(lead.accesses()) {
                let (before, now, target) =
                    (symbol(&tokens[at - 1]), symbol(&tokens[at]), symbol(&tokens[at + lead.accesses()]));
                let odds = model.predict(before, now);
                sums.predictions += 1;
                sums.bits -= odds[target].log2();
                sums.first += u64::from(odds.iter().filter(|p| **p >= odds[target]).count() == 1);
                model.count(before, now, target);
            }
        }
        sums.score(lead)
    })
}

/// Counts of the symbol that follows each context of two, one and no symbols.
struct Markov {
    two: Vec<[u32; SYMBOLS]>,
    one: Vec<[u32; SYMBOLS]>,
    none: [u32; SYMBOLS],
}

impl Markov {
    fn new() -> Self {
        Self { two: vec![[0; SYMBOLS]; SYMBOLS * SYMBOLS], one: vec![[0; SYMBOLS]; SYMBOLS], none: [0; SYMBOLS] }
    }

    fn count(&mut self, before: usize, now: usize, target: usize) {
        for counts in [&mut self.two[before * SYMBOLS + now], &mut self.one[now], &mut self.none] {
            counts[target] = counts[target].saturating_add(1);
        }
    }

    fn predict(&self, before: usize, now: usize) -> [f64; SYMBOLS] {
        [&self.none, &self.one[now], &self.two[before * SYMBOLS + now]].into_iter().fold(
            [1.0 / SYMBOLS as f64; SYMBOLS],
            |shorter, counts| {
                let total = counts.iter().map(|count| f64::from(*count)).sum::<f64>() + BACK_OFF;
                std::array::from_fn(|symbol| (f64::from(counts[symbol]) + BACK_OFF * shorter[symbol]) / total)
            },
        )
    }
}
