//! LSTM over ordinals: which stream slot or Markov candidate is accessed next, 4 and 8 accesses ahead.
//!
//! A [`Token`] says which of the candidates on offer an access turned out to be, not where on the disk it was, so that
//! one model serves any number of machines. Token → embeddings (symbol 24, operation + size + gap 8) → one LSTM layer of
//! 64 units (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000) → 64 logits for each
//! [`Lead`]. Training is elsewhere (`prestage-train`); this is inference alone, on the project's own kernels.
//!
//! | module | holds |
//! | --- | --- |
//! | `token` | [`Token`]: symbol, operation, size and time gap in 14 bits; [`Lead`] |
//! | [`weights`] | [`Weights`]: the parts of a model and their shapes, as bytes and as the kernels want them |
//! | `kernel` | the computation, written once: a step, a batch of steps, logits, scores; [`State`] |
//! | `math` | exponential, sigmoid and hyperbolic tangent, with their error bounds |
//! | `isa` | sixteen floats at a time: portable, AVX2 with FMA, AVX-512; chosen at run time ([`Path`]) |
//!
//! Deterministic: AVX2 and AVX-512 give the same bits, a batch gives the bits of single steps, and the portable path,
//! which rounds between multiplication and addition, differs by less than 1e-5.

pub(crate) mod isa;
mod kernel;
pub(crate) mod math;
mod token;
pub mod weights;

#[cfg(test)]
mod tests;

pub use isa::Path;
pub use kernel::State;
pub use token::{Lead, Token};
pub use weights::{Weights, WeightsError};

/// Distinct symbols, of a token and of a prediction.
pub const SYMBOLS: usize = 64;
/// Distinct operations of a token.
pub const OPS: usize = 4;
/// Size buckets of a token.
pub const SIZES: usize = 8;
/// Time-gap buckets of a token.
pub const GAPS: usize = 8;
/// Units of the LSTM layer.
pub const HIDDEN: usize = 64;
/// Width of a symbol's embedding.
pub const SYMBOL_WIDTH: usize = 24;
/// Width of the embedding that operation, size and gap add up in.
pub const CONTEXT_WIDTH: usize = 8;
/// Width of the layer's input.
pub const INPUT: usize = SYMBOL_WIDTH + CONTEXT_WIDTH;
/// Gates of a unit, in the order of the weights' columns: input, forget, cell, output.
pub const GATES: usize = 4;
