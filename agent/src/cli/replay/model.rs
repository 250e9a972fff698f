//! The LSTM of a replay: read from a file, or trained on what is learned from before.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prestage_predictor::lstm::{Token, Weights};
use prestage_predictor::ordinals::Tokeniser;
use prestage_replay::{Interrupted, TraceReader};
use prestage_train::{Corpus, TrainConfig, Trainer};

use super::args::{PolicyArg, ReplayArgs};
use super::progress::Progress;
use super::{Failure, failed};

/// Largest file that is looked at: a model has a quarter of a megabyte.
const MODEL_BYTES: u64 = 4 << 20;
/// Steps of a training, 2048 tokens each: a minute of one core at most; short traces are learned in less.
const STEPS: u64 = 1000;

/// The model that the options ask for.
pub(super) fn of(args: &ReplayArgs, stop: &AtomicBool) -> Result<Option<Arc<Weights>>, Failure> {
    let weights = match &args.model {
        Some(path) => load(path)?,
        None if args.policy == PolicyArg::Lstm => train(args, stop)?,
        None => return Ok(None),
    };
    if let Some(path) = &args.save_model {
        std::fs::write(path, weights.to_bytes())
            .map_err(|error| Failure::Failed(format!("{} cannot be written: {error}", path.display())))?;
    }
    Ok(Some(Arc::new(weights)))
}

fn load(path: &Path) -> Result<Weights, Failure> {
    let refuse = |error: &dyn std::fmt::Display| Failure::Failed(format!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MODEL_BYTES).read_to_end(&mut bytes));
    read.map_err(|error| refuse(&error))?;
    Weights::from_bytes(&bytes).map_err(|error| refuse(&error))
}

/// Each trace is a sequence; the same every time.
fn train(args: &ReplayArgs, stop: &AtomicBool) -> Result<Weights, Failure> {
    let mut sequences = Vec::new();
    for input in &args.train {
        let reader = TraceReader::open(&input.path, args.read_options()).map_err(failed)?;
        let mut progress = Progress::new("reading", &input.path, &reader, stop);
        let (mut tokeniser, mut tokens) = (Tokeniser::new(), Vec::<Token>::new());
        for (row, request) in (1..).zip(reader) {
            tokens.extend(tokeniser.push(&prestage_replay::access(&request.map_err(failed)?)));
            if !progress.step(row) {
                return Err(failed(Interrupted));
            }
        }
        sequences.push(tokens);
    }
    let mut trainer = Trainer::new(TrainConfig::default(), Corpus::new(sequences).map_err(failed)?);
    trainer.train(STEPS, &|| stop.load(Ordering::Relaxed)).map_err(failed)?;
    if stop.load(Ordering::Relaxed) {
        return Err(failed(Interrupted));
    }
    trainer.export().cloned().ok_or_else(|| Failure::Failed("no model came out of the training".to_owned()))
}
