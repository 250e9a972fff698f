//! How well the next access is foretold, in bits and first guesses.
//!
//! What is coded is the 64 KiB block in which each read starts. Before each read the predictor's slate
//! ([`prestage_predictor::ordinals`]) says which block each symbol means; of it a policy may use the symbols of its experts:
//!
//! - streams: runs (0–15); Markov: the log and the chain of blocks (16–35); sets: the next 64 blocks of the learned set of
//!   the phase that runs (symbols of their own, 64–127); all: these, and neighbours and blocks read lately (36–55)
//! - whatever is not on offer is the escape: it may be any of the trace's distinct blocks, D, with equal probability.
//!
//! A read is the first symbol that means its block, or the escape. The probability of the next symbol comes from counts by
//! the symbols before (orders 0, 1, 2: [`Counts`]), mixed geometrically with weights learned online; with the LSTM its
//! distribution is mixed in as a fourth, and the LSTM alone has its distribution as it is. So
//!
//! `bits = −log2(Σ P(symbols that mean the block) + P(escape) / D)`, and `top 1` is the share of reads whose block was the
//! one of most probability among those on offer. Everything is known before the read that is coded.

use prestage_predictor::lstm::{Lead, SYMBOLS, State, Token, Weights};
use prestage_predictor::ordinals::{Counts, OFFERED, Slate};

/// Symbols of the slate, and those of a learned set.
const ALL: usize = SYMBOLS + SET;
/// Blocks of a learned set on offer.
pub(crate) const SET: usize = 64;
const ESCAPE: u8 = SYMBOLS as u8 - 1;
/// Distributions that are mixed: three orders and the LSTM's.
const SOURCES: usize = 4;
/// Step of the mixing weights.
const RATE: f32 = 0.005;

/// What a policy may use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Voices {
    pub(crate) streams: bool,
    pub(crate) markov: bool,
    /// Neighbours and what was read lately.
    pub(crate) near: bool,
    pub(crate) sets: bool,
    pub(crate) counts: bool,
    pub(crate) lstm: bool,
}

/// How well the next access was foretold.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Foretold {
    /// Mean of −log2 of the probability given to the block that was read next.
    pub(crate) bits_per_access: f64,
    /// Share of the accesses whose block was the first guess.
    pub(crate) top1: f64,
}

/// One policy on one stream.
#[derive(Debug)]
pub(crate) struct Foreteller<'a> {
    voices: Voices,
    /// −log2 of an escape's share.
    distinct: f32,
    counts: Counts<ALL>,
    /// By the kind of the last symbol.
    weights: Vec<[f32; SOURCES]>,
    last: usize,
    model: Option<&'a Weights>,
    state: State,
    bits: f64,
    first: u64,
    reads: u64,
}

impl<'a> Foreteller<'a> {
    pub(crate) fn new(voices: Voices, distinct_blocks: usize, model: Option<&'a Weights>) -> Self {
        let model = model.filter(|_| voices.lstm);
        let start = if model.is_some() { [0.05, 0.15, 0.4, 0.4] } else { [0.1, 0.2, 0.7, 0.0] };
        Self {
            voices,
            distinct: 1.0 / distinct_blocks.max(1) as f32,
            counts: Counts::new(),
            weights: vec![start; ALL],
            last: 0,
            model,
            state: State::default(),
            bits: 0.0,
            first: 0,
            reads: 0,
        }
    }

    fn allowed(&self, symbol: usize) -> bool {
        match symbol {
            0..16 => self.voices.streams,
            16..36 => self.voices.markov,
            36..OFFERED => self.voices.near,
            OFFERED..SYMBOLS => false,
            _ => self.voices.sets,
        }
    }

    /// A read of `block`, of which `slate` and `set` were on offer; `token` is what the LSTM reads of it. Only `counted` ones
    /// are in the result, the others are learned from.
    pub(crate) fn read(&mut self, slate: &Slate, set: &[u64], block: u64, token: Token, counted: bool) {
        let offered = |symbol: usize| match symbol.checked_sub(SYMBOLS) {
            None => slate.block(symbol as u8),
            Some(place) => set.get(place).copied(),
        };
        let sources = self.sources();
        let mixed = self.mixed(&sources);
        let (mut right, mut on_offer, mut blocks) = (0f32, 0f32, Vec::<(u64, f32)>::with_capacity(ALL));
        let mut symbol = None;
        for (at, p) in mixed.iter().enumerate().filter(|(at, _)| self.allowed(*at)) {
            let Some(named) = offered(at) else { continue };
            on_offer += p;
            if named == block {
                right += p;
                symbol = symbol.or(Some(at));
            }
            match blocks.iter_mut().find(|(known, _)| *known == named) {
                Some((_, sum)) => *sum += p,
                None => blocks.push((named, *p)),
            }
        }
        if counted {
            self.reads += 1;
            // What is on no offer now has its share in the escape.
            self.bits -= f64::from((right + (1.0 - on_offer).max(1e-6) * self.distinct).log2());
            let best = blocks.iter().copied().reduce(|best, one| if one.1 > best.1 { one } else { best });
            self.first += u64::from(best.is_some_and(|(best, _)| best == block));
        }
        // Of what is not on offer, how far off it was tells what comes next.
        let far = if usize::from(token.symbol()) >= OFFERED { token.symbol() } else { ESCAPE };
        let symbol = symbol.map_or(usize::from(far), |symbol| symbol);
        if self.voices.counts {
            self.learn(&sources, &mixed, symbol);
        }
        self.counts.push(symbol as u8);
        self.last = symbol;
        if let Some(model) = self.model {
            model.step(&mut self.state, token);
        }
    }

    /// The distributions there are, in logarithms.
    fn sources(&self) -> Vec<[f32; ALL]> {
        let counts = self.counts.predict();
        let Some(model) = self.model else { return counts.map(|order| order.map(f32::ln)).to_vec() };
        let mut logits = [0f32; SYMBOLS];
        model.logits(&self.state, Lead::Next, &mut logits);
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let total: f32 = logits.iter().map(|logit| (logit - largest).exp()).sum();
        // The LSTM knows nothing of sets: what they share is theirs by their count.
        let sets: f32 = if self.voices.counts { counts[0][SYMBOLS..].iter().sum() } else { 1e-6 };
        let lstm = std::array::from_fn(|symbol| match logits.get(symbol) {
            Some(logit) => (1.0 - sets).ln() + logit - largest - total.ln(),
            None if self.voices.counts => counts[0][symbol].ln(),
            None => (sets / SET as f32).ln(),
        });
        if !self.voices.counts {
            return vec![lstm];
        }
        let [none, one, two] = counts.map(|order| order.map(f32::ln));
        vec![none, one, two, lstm]
    }

    fn mixed(&self, sources: &[[f32; ALL]]) -> [f32; ALL] {
        let single = [1.0; SOURCES];
        let weights = if sources.len() == 1 { &single } else { &self.weights[self.last] };
        let mut scores: [f32; ALL] = std::array::from_fn(|symbol| {
            sources.iter().zip(weights).map(|(source, weight)| source[symbol] * weight).sum()
        });
        let largest = scores.iter().copied().fold(f32::MIN, f32::max);
        scores.iter_mut().for_each(|score| *score = (*score - largest).exp());
        let total: f32 = scores.iter().sum();
        scores.map(|score| score / total)
    }

    /// Gradient of the code length (Mattern 2012).
    fn learn(&mut self, sources: &[[f32; ALL]], mixed: &[f32; ALL], symbol: usize) {
        for (source, weight) in sources.iter().zip(&mut self.weights[self.last]) {
            let mean: f32 = source.iter().zip(mixed).map(|(source, p)| source * p).sum();
            *weight = (*weight + RATE * (source[symbol] - mean)).clamp(0.0, 2.0);
        }
    }

    /// `None` before anything was counted.
    pub(crate) fn foretold(&self) -> Option<Foretold> {
        let reads = self.reads as f64;
        (self.reads > 0).then(|| Foretold { bits_per_access: self.bits / reads, top1: self.first as f64 / reads })
    }
}
