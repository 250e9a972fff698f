//! Trains the access predictor's LSTM with [Burn](https://burn.dev), and measures it on tokens it has not seen.
//!
//! A crate of its own, because Burn is large and only the background training needs it: what it makes,
//! [`prestage_predictor::lstm::Weights`], runs without it. Pure and deterministic as the predictor is: no I/O, no clock, no
//! threads; the same tokens, seed and backend give the same model, also across a checkpoint.
//!
//! | module | holds |
//! | --- | --- |
//! | [`corpus`] | token sequences, what is held out of them, and the order they are trained in |
//! | [`demand`] | the same for the network that forecasts demand |
//! | `network` | the model as a Burn module; its forward pass is what the kernels are tested against |
//! | [`trainer`] | truncated back-propagation through time with Adam; stops early |
//! | `checkpoint` | a trainer as bytes |
//! | [`evaluation`] | bits per token and top-1, beside an order-2 Markov model |

mod checkpoint;
pub mod corpus;
pub mod demand;
pub mod evaluation;
pub mod network;
pub mod trainer;

#[cfg(test)]
mod tests;

pub use checkpoint::ResumeError;
pub use corpus::{Corpus, CorpusError};
pub use evaluation::{LeadScore, evaluate, markov};
pub use network::{Backend, Network};
pub use trainer::{Diverged, Pause, Progress, TrainConfig, Trainer};

/// SplitMix64 (Steele, Lea and Flood 2014): the generator of initial weights and of the order of training.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0 .. bound` (`bound` > 0), biased by less than `bound` / 2⁶⁴.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// Uniform in -1 .. 1.
    pub(crate) fn symmetric(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}
