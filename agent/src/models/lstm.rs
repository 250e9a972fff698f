//! The trainer there is: the LSTM over ordinals of [`prestage_predictor::lstm`], trained by `prestage-train`.

use prestage_integration::api::models::{LeadMetrics, ModelMetrics};
use prestage_predictor::lstm::Weights;
use prestage_train::corpus::MINIMUM_TOKENS;
use prestage_train::{
    Backend, Corpus, CorpusError, Pause, ResumeError, TrainConfig, Trainer as Lstm, evaluate, markov,
};

use super::train::{ShouldStop, Tokens, TrainError, Trainer, Training};

/// Steps between looks at the clock: 2048 tokens each, a fraction of a second in all.
const STEPS: u64 = 8;

/// Trains and measures LSTMs.
#[derive(Debug, Clone, Copy)]
pub struct LstmTrainer;

fn corpus(tokens: Tokens) -> Result<Corpus, TrainError> {
    Corpus::new(tokens.sequences)
        .map_err(|CorpusError { found, needed }| TrainError::TooLittle { tokens: found as u64, needed: needed as u64 })
}

fn metrics(weights: &Weights, corpus: &Corpus) -> ModelMetrics {
    let [model, baseline] = [evaluate(weights, corpus), markov(corpus)];
    let tokens = model.first().map_or(0, |lead| lead.predictions);
    let leads = model.into_iter().zip(baseline).map(|(model, baseline)| LeadMetrics {
        lead: model.lead.accesses() as u32,
        bits: model.bits,
        top1: model.top1,
        baseline_bits: baseline.bits,
        baseline_top1: baseline.top1,
    });
    ModelMetrics { tokens, leads: leads.collect() }
}

fn load(weights: &[u8]) -> Result<Weights, TrainError> {
    Weights::from_bytes(weights).map_err(|error| TrainError::Damaged(error.to_string()))
}

impl Trainer for LstmTrainer {
    fn kind(&self) -> &'static str {
        "lstm"
    }

    fn least_tokens(&self) -> u64 {
        MINIMUM_TOKENS as u64
    }

    fn begin(&self, tokens: Tokens, seed: u64) -> Result<Box<dyn Training>, TrainError> {
        let config = TrainConfig { seed, ..TrainConfig::default() };
        Ok(Box::new(Lstm::new(config, corpus(tokens)?)))
    }

    fn resume(&self, tokens: Tokens, checkpoint: &[u8]) -> Result<Box<dyn Training>, TrainError> {
        match Lstm::resume(checkpoint, corpus(tokens)?, Backend::default()) {
            Ok(training) => Ok(Box::new(training)),
            Err(ResumeError::OtherTokens { .. }) => Err(TrainError::OtherTokens),
            Err(error) => Err(TrainError::Damaged(error.to_string())),
        }
    }

    fn check(&self, weights: &[u8]) -> Result<(), TrainError> {
        load(weights).map(drop)
    }

    fn evaluate(&self, weights: &[u8], tokens: Tokens) -> Result<ModelMetrics, TrainError> {
        Ok(metrics(&load(weights)?, &corpus(tokens)?))
    }
}

impl Training for Lstm {
    fn advance(&mut self, stop: ShouldStop<'_>) -> Result<bool, TrainError> {
        let pause = self.train(STEPS, stop).map_err(|error| TrainError::Failed(error.to_string()))?;
        Ok(pause == Pause::Converged)
    }

    fn trained(&self) -> u64 {
        self.progress().tokens
    }

    fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        Ok(Lstm::checkpoint(self))
    }

    fn finish(self: Box<Self>) -> Result<(Vec<u8>, ModelMetrics), TrainError> {
        let weights =
            self.export().ok_or_else(|| TrainError::Failed("no model came out of the training".to_owned()))?;
        Ok((weights.to_bytes(), metrics(weights, self.corpus())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_predictor::lstm::Token;

    /// Runs of one symbol and its successor, which an LSTM learns within few steps.
    fn tokens(count: u16) -> Tokens {
        let sequence = (0..count).filter_map(|n| Token::from_bits(n % 7)).collect();
        Tokens { sequences: vec![sequence], from_us: 1, to_us: 2 }
    }

    #[test]
    fn a_training_interrupted_and_resumed_gives_the_same_model() {
        let never = || false;
        let trainer = LstmTrainer;
        let too_little = trainer.begin(tokens(1000), 1).err();
        assert_eq!(too_little, Some(TrainError::TooLittle { tokens: 1000, needed: trainer.least_tokens() }));

        let mut whole = trainer.begin(tokens(10_000), 1).unwrap();
        // Not to the end: that is for the trainer's own tests, and long without optimisation.
        for _ in 0..4 {
            whole.advance(&never).unwrap();
        }
        let (weights, measured) = whole.finish().unwrap();
        trainer.check(&weights).unwrap();
        assert_eq!(measured.leads.iter().map(|lead| lead.lead).collect::<Vec<_>>(), [1, 4, 8]);
        assert!(measured.leads[0].bits < 6.0, "worse than knowing nothing of 64 symbols: {measured:?}");
        assert_eq!(trainer.evaluate(&weights, tokens(10_000)).unwrap(), measured);

        let mut part = trainer.begin(tokens(10_000), 1).unwrap();
        assert!(!part.advance(&|| true).unwrap(), "stopped before its first step");
        part.advance(&never).unwrap();
        part.advance(&never).unwrap();
        let checkpoint = part.checkpoint().unwrap();
        assert_eq!(trainer.resume(tokens(10_001), &checkpoint).err(), Some(TrainError::OtherTokens));
        assert!(matches!(trainer.resume(tokens(10_000), &checkpoint[1..]).err(), Some(TrainError::Damaged(_))));
        let mut rest = trainer.resume(tokens(10_000), &checkpoint).unwrap();
        for _ in 0..2 {
            rest.advance(&never).unwrap();
        }
        assert_eq!(rest.finish().unwrap().0, weights);
    }

    #[test]
    fn damaged_weights_are_refused() {
        for bytes in [&b""[..], b"PSTGLSTM", &[0; 200_000]] {
            assert!(matches!(LstmTrainer.check(bytes), Err(TrainError::Damaged(_))));
        }
    }
}
