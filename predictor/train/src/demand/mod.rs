//! Trains the demand network over all series at once, and checks nothing but the training part of them.
//!
//! | module | holds |
//! | --- | --- |
//! | [`corpus`] | series, the origins that may be trained on, and batches of them |
//! | [`network`] | the network as a Burn module; its forward pass is what the kernel is tested against |
//! | [`trainer`] | Adam with weight decay on the pinball loss, one cycle of the learning rate |

pub mod corpus;
pub mod network;
pub mod trainer;

#[cfg(test)]
mod tests;

pub use corpus::{DemandCorpus, DemandSeries};
pub use network::DemandNetwork;
pub use trainer::{DemandConfig, DemandError, DemandTrainer};
