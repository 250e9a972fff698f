//! Context mixing: counts by context become one calibrated probability.
//!
//! - [`Contexts`]: for every context "of the pages predicted here, how many were read in time", as the counters of
//!   context-mixing compressors (Mahoney, PAQ, 2005), but *fail first*: a prediction counts as failed from the moment it is
//!   made until its page is read. Labels come late here (a window of accesses), and counting failures only when they are
//!   certain would make every young context look too good.
//! - [`Mixer`]: online logistic mixing of the counters' log odds (Mattern, "Mixing strategies in data compression", 2012), one
//!   weight vector for each combination of experts that stand behind a candidate; the gradient of one settled batch is
//!   averaged, since the pages of one request share their fate.
//! - [`Reliability`]: the last step, a binned map from the mixed score to the observed share, and the running calibration
//!   error.

use crate::wire::{Reader, WireError, put, put_f32};

/// Contexts looked up for one candidate; the last places may be unused.
pub(crate) const INPUTS: usize = SHARED + OWN;
/// Of these, common to the pages of a block, and a page's own.
pub(crate) const SHARED: usize = 8;
pub(crate) const OWN: usize = 5;
/// What [`Contexts::inputs`] works on at once.
const LANES: usize = 8;
const _: () = assert!(SHARED <= LANES && OWN <= LANES);
/// Of the shared ones, what the LSTM says.
pub(crate) const MODEL: usize = 7;
/// Places of one context's table.
const PLACES: usize = 4096;
/// Sets of weights: one for each combination of experts that stand behind a candidate.
pub(crate) const SETS: usize = 1 << EXPERTS;
/// Experts that may stand behind a candidate: runs, log, neighbourhood, chain.
pub(crate) const EXPERTS: usize = 4;
/// Predictions a counter remembers: beyond it both counts are halved.
const LIMIT: u16 = 400 * UNIT;
/// One candidate, in the fixed-point unit of the counters (a page of a full block is one).
const UNIT: u16 = 16;
/// Share of pages expected to be read where nothing is known.
const PRIOR: f32 = 0.3;
const LEARNING_RATE: f32 = 0.0005;
const START_WEIGHT: f32 = 0.23;
/// Scores beyond this (in nats) are as good as certain.
pub(crate) const MAX_SCORE: f32 = 9.0;

/// Predicted and read, in [`UNIT`]s a candidate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counter {
    made: u16,
    good: u16,
}

/// The counters of all contexts: `INPUTS × PLACES × 4` bytes (208 KiB).
#[derive(Clone, Debug)]
pub(crate) struct Contexts {
    counters: Vec<Counter>,
}

/// Where a candidate's counters are.
pub(crate) type Places = [u16; INPUTS];
/// No counter: the context does not apply.
pub(crate) const NOWHERE: u16 = u16::MAX;

impl Contexts {
    pub(crate) fn new() -> Self {
        Self { counters: vec![Counter::default(); INPUTS * PLACES] }
    }

    /// What a context is worth before anything was seen in it: as if `predictions` had been made.
    pub(crate) fn expect(&mut self, place: u16, predictions: u16, probability: f32) {
        if let Some(counter) = self.counters.get_mut(usize::from(place)) {
            counter.made = predictions * UNIT;
            counter.good = (f32::from(counter.made) * probability) as u16;
        }
    }

    /// The place of a context's value; values that collide share a counter.
    pub(crate) fn place(input: usize, value: u32) -> u16 {
        let hash = value.wrapping_mul(0x9E37_79B1).rotate_left(12) as usize % PLACES;
        (input * PLACES + hash) as u16
    }

    /// Log odds of each context, each drawn towards zero by how little it is known.
    pub(crate) fn inputs<const N: usize>(&self, places: &[u16]) -> [f32; N] {
        // In whole vectors, whatever N is: what is over costs nothing.
        let (mut made, mut good) = ([0f32; LANES], [0f32; LANES]);
        for (input, place) in places.iter().take(N.min(LANES)).enumerate() {
            if let Some(counter) = self.counters.get(usize::from(*place)) {
                made[input] = f32::from(counter.made);
                good[input] = f32::from(counter.good);
            }
        }
        let unit = f32::from(UNIT);
        let mut out = [0f32; LANES];
        for input in 0..LANES {
            let odds = log2(good[input] + PRIOR * unit) - log2(made[input] - good[input] + (1.0 - PRIOR) * unit);
            out[input] = odds * std::f32::consts::LN_2 * (made[input] / (made[input] + 1.5 * unit));
        }
        std::array::from_fn(|input| out[input])
    }

    /// A prediction was made: it has failed until it turns out well.
    pub(crate) fn made(&mut self, places: &Places) {
        for place in places {
            if let Some(counter) = self.counters.get_mut(usize::from(*place)) {
                counter.made += UNIT;
                if counter.made > LIMIT {
                    counter.made /= 2;
                    counter.good /= 2;
                }
            }
        }
    }

    /// `pages` of `of` predicted ones were read.
    pub(crate) fn good(&mut self, places: &Places, pages: u32, of: u32) {
        let good = (u32::from(UNIT) * pages / of.max(1)) as u16;
        for place in places {
            if let Some(counter) = self.counters.get_mut(usize::from(*place)) {
                counter.good = (counter.good + good).min(counter.made);
            }
        }
    }

    /// The prediction is taken back: nobody will know.
    pub(crate) fn retract(&mut self, places: &Places) {
        for place in places {
            if let Some(counter) = self.counters.get_mut(usize::from(*place)) {
                counter.made = counter.made.saturating_sub(UNIT).max(counter.good);
            }
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.counters.capacity() * size_of::<Counter>()
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        for counter in &self.counters {
            put(out, u64::from(counter.made));
            put(out, u64::from(counter.good));
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut contexts = Self::new();
        for counter in &mut contexts.counters {
            let made = reader.at_most(u64::from(LIMIT), "context counter")? as u16;
            *counter = Counter { made, good: reader.at_most(u64::from(made), "context counter")? as u16 };
        }
        Ok(contexts)
    }
}

/// Base-2 logarithm of a positive normal number, within 0.002: the exponent, and a cubic through the mantissa.
fn log2(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    let mantissa = f32::from_bits(bits & 0x007F_FFFF | 0x3F80_0000);
    let m = mantissa - 1.0;
    exponent as f32 + m * (1.4168 + m * (-0.5676 + m * 0.1508))
}

/// The probability of a score in nats.
pub(crate) fn logistic(score: f32) -> f32 {
    1.0 / (1.0 + (-score).exp())
}

#[derive(Clone, Copy, Debug)]
struct Gradient {
    sum: [f32; INPUTS + 1],
    count: f32,
}

impl Gradient {
    const ZERO: Self = Self { sum: [0.0; INPUTS + 1], count: 0.0 };
}

/// One weight vector a set; the last weight is the bias.
#[derive(Clone, Debug)]
pub(crate) struct Mixer {
    weights: Vec<[f32; INPUTS + 1]>,
    gradients: Vec<Gradient>,
    /// Sets with a gradient since the last step, one bit each.
    stirred: u64,
}

impl Mixer {
    /// A model that is put to experts with a record starts without weight: it is heard as far as it lowers their error. Alone
    /// it starts with the weight of the others.
    pub(crate) fn new(model_alone: bool) -> Self {
        let mut start = [START_WEIGHT; INPUTS + 1];
        start[INPUTS] = 0.0;
        if !model_alone {
            start[MODEL] = 0.0;
        }
        Self { weights: vec![start; SETS], gradients: vec![Gradient::ZERO; SETS], stirred: 0 }
    }

    /// Part of the score: `inputs` from input `from` on. The first part brings the bias.
    pub(crate) fn partial(&self, set: u8, from: usize, inputs: &[f32]) -> f32 {
        let weights = &self.weights[usize::from(set) % SETS];
        let mut sum = if from == 0 { weights[INPUTS] } else { 0.0 };
        for (weight, input) in weights[from..].iter().zip(inputs) {
            sum += weight * input;
        }
        sum
    }

    pub(crate) fn weights(&self, set: u8) -> &[f32; INPUTS + 1] {
        &self.weights[usize::from(set) % SETS]
    }

    /// A prediction is settled: `error` is what happened (0 ..= 1) less what was said.
    pub(crate) fn learn(&mut self, set: u8, inputs: impl Iterator<Item = f32>, error: f32) {
        let gradient = &mut self.gradients[usize::from(set) % SETS];
        for (sum, input) in gradient.sum.iter_mut().zip(inputs.chain(std::iter::once(0.3))) {
            *sum += error * input;
        }
        gradient.count += 1.0;
        self.stirred |= 1 << (usize::from(set) % SETS);
    }

    /// Takes the step of what was learned since the last one.
    pub(crate) fn step(&mut self) {
        while self.stirred != 0 {
            let set = self.stirred.trailing_zeros() as usize;
            self.stirred &= self.stirred - 1;
            let gradient = std::mem::replace(&mut self.gradients[set], Gradient::ZERO);
            // Between the mean (power 1) and the sum (0): the labels of a batch agree more than independent ones would.
            let rate = LEARNING_RATE / gradient.count.powf(0.7);
            for (weight, sum) in self.weights[set].iter_mut().zip(gradient.sum) {
                *weight = (*weight + rate * sum).clamp(-4.0, 4.0);
            }
        }
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        self.weights.iter().flatten().for_each(|weight| put_f32(out, *weight));
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let mut mixer = Self::new(false);
        for weight in mixer.weights.iter_mut().flatten() {
            *weight = reader.f32()?;
            if !(-4.0..=4.0).contains(weight) {
                return Err(WireError::Invalid("mixer weight"));
            }
        }
        Ok(mixer)
    }
}

/// Bins of the map, over the score in nats.
const BINS: usize = 24;
/// Observations a bin starts with, as the identity map would make them.
const BIN_PRIOR: f32 = 8.0;
const BIN_LIMIT: f32 = 600.0;

/// The map of one class of candidates, and how well the probabilities were kept.
#[derive(Clone, Debug)]
pub(crate) struct Reliability {
    bins: Vec<[(f32, f32); BINS + 1]>,
    /// By probability in twentieths: predictions, their sum, the sum of what happened.
    kept: [(f64, f64, f64); 20],
    squares: f64,
    bits: f64,
}

impl Reliability {
    pub(crate) fn new(classes: usize) -> Self {
        let mut identity = [(0.0, 0.0); BINS + 1];
        for (bin, (made, good)) in identity.iter_mut().enumerate() {
            *made = BIN_PRIOR;
            *good = BIN_PRIOR * logistic(bin_score(bin));
        }
        Self { bins: vec![identity; classes], kept: [(0.0, 0.0, 0.0); 20], squares: 0.0, bits: 0.0 }
    }

    /// The probability of a score: between the two nearest bins.
    pub(crate) fn probability(&self, class: u8, score: f32) -> f32 {
        let bins = &self.bins[usize::from(class) % self.bins.len()];
        let (bin, part) = bin_of(score);
        let share = |(made, good): (f32, f32)| good / made;
        let p = share(bins[bin]) * (1.0 - part) + share(bins[bin + 1]) * part;
        p.clamp(0.001, 0.999)
    }

    /// A prediction that said `probability` is settled.
    pub(crate) fn learn(&mut self, class: u8, score: f32, probability: f32, happened: f32) {
        let classes = self.bins.len();
        let bins = &mut self.bins[usize::from(class) % classes];
        let (bin, part) = bin_of(score);
        for (index, weight) in [(bin, (1.0 - part)), (bin + 1, part)] {
            let (made, good) = &mut bins[index];
            *made += weight;
            *good += weight * happened;
            if *made > BIN_LIMIT {
                *made *= 0.5;
                *good *= 0.5;
            }
        }
        let (p, y) = (f64::from(probability), f64::from(happened));
        let kept = &mut self.kept[((p * 20.0) as usize).min(19)];
        kept.0 += 1.0;
        kept.1 += p;
        kept.2 += y;
        self.squares += (p - y) * (p - y);
        self.bits -= f64::from(happened * log2(probability) + (1.0 - happened) * log2(1.0 - probability));
    }

    /// Settled predictions.
    pub(crate) fn settled(&self) -> f64 {
        self.kept.iter().map(|bin| bin.0).sum()
    }

    /// Expected calibration error (Naeini et al., AAAI 2015) over 20 equal bins.
    pub(crate) fn error(&self) -> f64 {
        let total = self.settled().max(1.0);
        self.kept.iter().map(|(_, said, happened)| (said - happened).abs() / total).sum()
    }

    /// What happened less what was said, over all settled predictions.
    pub(crate) fn surplus(&self) -> f64 {
        self.kept.iter().map(|(_, said, happened)| happened - said).sum()
    }

    /// Brier score: mean squared error of the probabilities.
    pub(crate) fn brier(&self) -> f64 {
        self.squares / self.settled().max(1.0)
    }

    /// Mean code length of the outcomes, bits a prediction.
    pub(crate) fn bits(&self) -> f64 {
        self.bits / self.settled().max(1.0)
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.bins.capacity() * size_of::<[(f32, f32); BINS + 1]>()
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        for (made, good) in self.bins.iter().flatten() {
            put_f32(out, *made);
            put_f32(out, *good);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>, classes: usize) -> Result<Self, WireError> {
        let mut reliability = Self::new(classes);
        for (made, good) in reliability.bins.iter_mut().flatten() {
            (*made, *good) = (reader.f32()?, reader.f32()?);
            if !(*made > 0.0 && *made <= BIN_LIMIT + 1.0 && *good >= 0.0 && *good <= *made) {
                return Err(WireError::Invalid("calibration bin"));
            }
        }
        Ok(reliability)
    }
}

fn bin_score(bin: usize) -> f32 {
    // From -6 to 6 nats: even in log odds, hence finer towards certainty than bins of equal probability.
    (bin as f32 / BINS as f32 - 0.5) * 12.0
}

fn bin_of(score: f32) -> (usize, f32) {
    let at = ((score / 12.0 + 0.5) * BINS as f32).clamp(0.0, BINS as f32 - 0.001);
    (at as usize, at.fract())
}
