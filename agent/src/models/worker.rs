//! The thread that trains, at idle priority: one job after the other, each until it is done, fails or is stopped.
//!
//! It shares no lock with anybody: jobs and reports go through channels, so that a thread that hardly ever runs keeps nobody
//! waiting.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use prestage_integration::api::models::ModelMetrics;

use super::priority::become_idle;
use super::scope::Scope;
use super::train::{TokenSource, TrainError, Trainer, Training};

/// A training to carry out.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) id: i64,
    pub(super) scope: Scope,
    pub(super) seed: u64,
    /// Checkpoint to go on from, and the range of accesses it was made on.
    pub(super) resume: Option<(Vec<u8>, (u64, u64))>,
    pub(super) most_tokens: u64,
    pub(super) stop: Arc<AtomicBool>,
}

/// What became of a job so far.
#[derive(Debug)]
pub(super) enum Report {
    /// Tokens are read. `afresh`: why it does not go on from the checkpoint.
    Began {
        id: i64,
        tokens: u64,
        from_us: u64,
        to_us: u64,
        afresh: Option<TrainError>,
    },
    Checkpoint {
        id: i64,
        checkpoint: Vec<u8>,
        trained: u64,
    },
    Done {
        id: i64,
        weights: Vec<u8>,
        metrics: ModelMetrics,
    },
    Failed {
        id: i64,
        error: TrainError,
    },
    /// Stopped; to be resumed from the last checkpoint.
    Stopped {
        id: i64,
    },
}

pub(super) struct Worker {
    pub(super) trainer: Arc<dyn Trainer>,
    pub(super) source: Arc<dyn TokenSource>,
    pub(super) checkpoint_every: Duration,
}

impl Worker {
    /// Serves jobs until their sender is gone.
    pub(super) fn run(self, jobs: &Receiver<Job>, report: impl Fn(Report)) {
        let refused = become_idle();
        if !refused.is_empty() {
            let refused: Vec<String> = refused.iter().map(|(what, error)| format!("{what}: {error}")).collect();
            tracing::warn!(refused = refused.join(", "), "training runs at a higher priority than it should");
        }
        while let Ok(job) = jobs.recv() {
            let id = job.id;
            // A defect in training must not end the daemon's ability to train.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.carry_out(&job, &report)));
            report(match outcome {
                Ok(Ok(last)) => last,
                Ok(Err(error)) => Report::Failed { id, error },
                Err(_) => {
                    Report::Failed { id, error: TrainError::Failed("the trainer panicked; see the log".to_owned()) }
                }
            });
        }
    }

    fn carry_out(&self, job: &Job, report: &impl Fn(Report)) -> Result<Report, TrainError> {
        let id = job.id;
        let stop = || job.stop.load(Ordering::Relaxed);
        let read = |range| self.source.tokens(&job.scope, range, job.most_tokens, &stop).map_err(TrainError::Failed);
        let mut afresh = None;
        let mut begun = None;
        if let Some((checkpoint, range)) = &job.resume {
            let tokens = read(Some(*range))?;
            let found = (tokens.count(), tokens.from_us, tokens.to_us);
            if stop() {
                return Ok(Report::Stopped { id });
            }
            match self.trainer.resume(tokens, checkpoint) {
                Ok(training) => begun = Some((training, found)),
                Err(error) => afresh = Some(error),
            }
        }
        let (mut training, (tokens, from_us, to_us)) = match begun {
            Some(begun) => begun,
            None => {
                let tokens = read(None)?;
                let found = (tokens.count(), tokens.from_us, tokens.to_us);
                if stop() {
                    return Ok(Report::Stopped { id });
                }
                let needed = self.trainer.least_tokens();
                if found.0 < needed {
                    return Err(TrainError::TooLittle { tokens: found.0, needed });
                }
                (self.trainer.begin(tokens, job.seed)?, found)
            }
        };
        report(Report::Began { id, tokens, from_us, to_us, afresh });
        self.train(&mut *training, job, report)?;
        if stop() {
            return Ok(Report::Stopped { id });
        }
        let (weights, metrics) = training.finish()?;
        Ok(Report::Done { id, weights, metrics })
    }

    /// Until it is done or stopped; stopped, the last report is a checkpoint.
    fn train(&self, training: &mut dyn Training, job: &Job, report: &impl Fn(Report)) -> Result<(), TrainError> {
        let stop = || job.stop.load(Ordering::Relaxed);
        let mut saved = Instant::now();
        loop {
            let done = training.advance(&stop)?;
            if done && !stop() {
                return Ok(());
            }
            if stop() || saved.elapsed() >= self.checkpoint_every {
                let checkpoint = training.checkpoint()?;
                report(Report::Checkpoint { id: job.id, checkpoint, trained: training.trained() });
                saved = Instant::now();
            }
            if stop() {
                return Ok(());
            }
        }
    }
}
