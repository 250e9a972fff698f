//! The LSTM over ordinals of [`prestage_predictor::lstm`].

use prestage_integration::api::models::ModelMetrics;
use prestage_predictor::lstm::Weights;

use super::train::{Tokens, TrainError, Trainer, Training};

/// Fewest tokens worth training on: less is learned by heart.
const LEAST_TOKENS: u64 = 8192;

/// Runs models; training them is not part of this build yet.
#[derive(Debug, Clone, Copy)]
pub struct LstmTrainer;

fn untrained<T>() -> Result<T, TrainError> {
    Err(TrainError::Failed("this build of prestaged cannot train models".to_owned()))
}

impl Trainer for LstmTrainer {
    fn kind(&self) -> &'static str {
        "lstm"
    }

    fn least_tokens(&self) -> u64 {
        LEAST_TOKENS
    }

    fn begin(&self, _: Tokens, _: u64) -> Result<Box<dyn Training>, TrainError> {
        untrained()
    }

    fn resume(&self, _: Tokens, _: &[u8]) -> Result<Box<dyn Training>, TrainError> {
        untrained()
    }

    fn check(&self, weights: &[u8]) -> Result<(), TrainError> {
        Weights::from_bytes(weights).map(drop).map_err(|error| TrainError::Damaged(error.to_string()))
    }

    fn evaluate(&self, _: &[u8], _: Tokens) -> Result<ModelMetrics, TrainError> {
        untrained()
    }
}
