//! The network of the forecasts, trained in the background on what the machines of this host used.
//!
//! One model for all machines and resources, from the 5-minute roll-ups, at idle priority: for the first time once there
//! is enough, then daily, and earlier when a machine has changed its ways. A model is one voice among the simple
//! ones and weighed by what it would have said: one that is no good falls silent by itself. Until there is one,
//! forecasts rest on the simple ones.

use super::flow::COARSE_S;
use super::gather::subject;
use super::run::Demand;
use crate::learner::run::unix_ms;
use crate::models::priority::become_idle;
use crate::store::series::Point;
use prestage_integration::api::demand::Resource;
use prestage_integration::libvirt::Uuid;
use prestage_predictor::demand::{Metric, Weights};
use prestage_train::demand::{DemandConfig, DemandCorpus, DemandError, DemandSeries, DemandTrainer};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// Looks so often whether there is enough.
const LOOK: Duration = Duration::from_secs(3600);
/// Age at which a model is trained anew, and before which drift does not ask for one.
const AGE_S: u64 = 86_400;
const DRIFT_S: u64 = 6 * 3600;
/// History a model learns from.
const HISTORY_S: u64 = 31 * 86_400;
/// Steps of a model trained here: as many as a night's idle time holds on a busy host.
const STEPS: u64 = 3000;
/// Steps between two looks whether to stop.
const PART: u64 = 20;

/// Asks for a training before its time.
#[derive(Clone, Debug)]
pub(crate) struct Training {
    drift: SyncSender<()>,
}

impl Training {
    /// A machine has changed its ways.
    pub(crate) fn drifted(&self) {
        // One waits already: that is enough.
        let _ = self.drift.try_send(());
    }
}

impl Demand {
    /// Reads the model there is, and starts the thread that trains the next. It ends with the last clone of what it
    /// gives back, in the middle of a training if need be: what is half trained is trained again.
    pub(crate) fn start_training(&self, file: PathBuf) -> std::io::Result<Training> {
        let mut trained_s = 0;
        match std::fs::read(&file) {
            Ok(bytes) => match Weights::from_bytes(&bytes) {
                Ok(weights) => {
                    self.state.lock().set_model(Some(Arc::new(weights)));
                    let modified = std::fs::metadata(&file).and_then(|meta| meta.modified()).ok();
                    let age = modified.and_then(|at| at.elapsed().ok()).unwrap_or_default();
                    trained_s = (unix_ms() / 1000).saturating_sub(age.as_secs());
                }
                Err(error) => {
                    tracing::warn!(path = %file.display(), %error, "the demand model is damaged; one is trained anew");
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %file.display(), %error, "the demand model cannot be read"),
        }
        let (drift, asked) = sync_channel(1);
        let demand = self.clone();
        let work = move || demand.train_forever(&file, &asked, trained_s);
        std::thread::Builder::new().name("demand-training".into()).spawn(work)?;
        Ok(Training { drift })
    }

    fn train_forever(&self, file: &std::path::Path, asked: &Receiver<()>, mut trained_s: u64) {
        for (what, error) in become_idle() {
            tracing::debug!(what, %error, "demand is trained less politely");
        }
        loop {
            let drifted = match asked.recv_timeout(LOOK) {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let now_s = unix_ms() / 1000;
            let age_s = now_s.saturating_sub(trained_s);
            if age_s < if drifted { DRIFT_S } else { AGE_S } {
                continue;
            }
            let stopped = || matches!(asked.try_recv(), Err(std::sync::mpsc::TryRecvError::Disconnected));
            match self.train(now_s, stopped) {
                Ok(Some(weights)) => {
                    trained_s = now_s;
                    if let Err(error) = write(file, &weights.to_bytes()) {
                        tracing::warn!(path = %file.display(), %error, "the demand model is not kept over a restart");
                    }
                    tracing::info!("demand model trained on what the machines of this host used");
                    self.state.lock().set_model(Some(Arc::new(weights)));
                }
                Ok(None) => return,
                Err(error @ DemandError::TooLittle { .. }) => tracing::debug!(%error, "no demand model yet"),
                Err(error) => tracing::warn!(%error, "no new demand model"),
            }
        }
    }

    /// `None`: stopped.
    fn train(&self, now_s: u64, stopped: impl Fn() -> bool) -> Result<Option<Weights>, DemandError> {
        let machines: Vec<Uuid> = self.state.lock().machines.keys().copied().collect();
        let series = machines.iter().flat_map(|uuid| self.recorded(*uuid, now_s)).collect();
        let config = DemandConfig { steps: STEPS, ..DemandConfig::default() };
        let mut trainer = DemandTrainer::new(config, DemandCorpus::new(series))?;
        while trainer.train(PART)?.is_some() {
            if stopped() {
                return Ok(None);
            }
        }
        trainer.export().map(Some)
    }

    /// What a machine used, a value for each 5 minutes; where it did not run the last one is filled in, and marked.
    fn recorded(&self, uuid: Uuid, now_s: u64) -> Vec<DemandSeries> {
        let step_s = u64::from(COARSE_S);
        let from_s = now_s.saturating_sub(HISTORY_S) / step_s * step_s;
        let metrics = Resource::ALL.into_iter().zip(Metric::ALL);
        let series = metrics.filter_map(|(resource, metric)| {
            let answer = self.store.series(&subject(uuid), resource.name(), from_s, now_s, step_s).ok()?;
            let start_s = answer.points.first()?.at_s;
            let (mut values, mut measured) = (Vec::new(), Vec::new());
            for point in &answer.points {
                let at = ((point.at_s - start_s) / step_s) as usize;
                let last = values.last().copied().unwrap_or(0.0);
                values.resize(at.max(values.len()), last);
                measured.resize(at.max(measured.len()), false);
                values.push(point.max as f32);
                measured.push(true);
            }
            let known = |metric: &str, most: Option<f64>| {
                let answer = self.store.series(&subject(uuid), metric, from_s, now_s, step_s).ok();
                shares(&answer?.points, most, start_s, values.len())
            };
            let activity = known("activity", None).unwrap_or_default();
            let event = known("event", Some(100.0)).unwrap_or_default();
            Some(DemandSeries { metric, step_s: COARSE_S, start_s, values, measured, activity, event })
        });
        series.collect()
    }
}

/// A value for each step from `start_s` on, as a share of `most` (default: the most there was); 0 where there is none. `None`: there
/// never was any.
fn shares(points: &[Point], most: Option<f64>, start_s: u64, count: usize) -> Option<Vec<f32>> {
    let most = most.unwrap_or_else(|| points.iter().map(|point| point.max).fold(0.0, f64::max));
    if most <= 0.0 || points.iter().all(|point| point.max <= 0.0) {
        return None;
    }
    let mut shares = vec![0.0; count];
    for point in points {
        let step_s = u64::from(COARSE_S);
        let Some(from) = point.at_s.checked_sub(start_s).map(|since_s| (since_s / step_s) as usize) else { continue };
        // What is long ago is kept by the hour.
        let to = from.saturating_add((point.step_s / step_s).max(1) as usize).min(count);
        if let Some(shares) = shares.get_mut(from..to) {
            shares.fill((point.max / most).clamp(0.0, 1.0) as f32);
        }
    }
    Some(shares)
}

/// Whole or not at all.
fn write(file: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    let new = file.with_extension("new");
    std::fs::write(&new, bytes)?;
    std::fs::rename(new, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_besides_lies_at_its_step() {
        let point = |at_s, max| Point { at_s, step_s: 300, count: 1, min: 0.0, mean: 0.0, max };
        let points = [point(0, 9.0), point(900, 5.0), point(1500, 10.0), point(9000, 1.0)];
        assert_eq!(shares(&points, None, 600, 4), Some(vec![0.0, 0.5, 0.0, 1.0]));
        assert_eq!(shares(&points, Some(100.0), 600, 2), Some(vec![0.0, 0.05]));
        assert_eq!((shares(&[], None, 0, 4), shares(&[point(0, 0.0)], Some(100.0), 0, 4)), (None, None));
    }
}
