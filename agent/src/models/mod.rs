//! Neural models: trained in the background from history, compared with what is in use on the same stream, promoted when
//! better, rolled back on request.
//!
//! - [`ModelsHandle`]: requests of the API, and what the learner asks and reports
//! - [`train`]: what a trainer and a source of tokens must offer; [`lstm`]: the trainer there is
//! - [`tokens`]: tokens from the database's history
//! - `manager.rs`: what is trained when, which model is in use; `worker.rs`: the thread that trains; `priority.rs`: idle
//! - `watch.rs`: contests and drift
//! - [`file`]: a model as a file, to carry it to another host
//! - `report.rs`: models as the API words them; `scope.rs`: all storages, or one
//!
//! Two threads: `models`, which decides and writes to the database, and `trainer`, of idle priority, which shares no lock with
//! anyone. Shutdown stops a training at its next step and keeps its checkpoint; the next start goes on from there.

pub mod file;
pub mod lstm;
mod manager;
pub(crate) mod priority;
mod report;
mod scope;
#[cfg(test)]
mod tests;
pub mod tokens;
pub mod train;
mod watch;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use prestage_integration::api::models::{
    ChampionChanged, ModelDetail, ModelImported, ModelList, ModelMetrics, TrainStarted,
};
use tokio::sync::oneshot;

pub use prestage_predictor::lstm::Token;
pub use scope::Scope;
pub use watch::{Pair, Signal};

use crate::learner::run::unix_ms;
use crate::store::models::ImportedModel;
use crate::store::{Store, StoreError};
use manager::{Manager, Message};
use train::{TokenSource, TrainError, Trainer};
use watch::Watch;
use worker::Worker;

/// Tokens that a model is measured on by request: seconds, not minutes.
const EVALUATE_TOKENS: u64 = 200_000;
/// How often the manager looks at the clock.
const TICK: Duration = Duration::from_secs(30);

/// Settings that may change while models are trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelSettings {
    /// Train by itself: periodically and on drift.
    pub training: bool,
    /// Time between trainings of a scope.
    pub interval: Duration,
    /// Most tokens of one training, which bounds its memory.
    pub max_tokens: u64,
    /// A killed daemon loses at most this much training.
    pub checkpoint_interval: Duration,
    /// Bits an access that a shadow must save.
    pub margin_bits: f64,
    /// Accesses after which an undecided shadow is rejected.
    pub trial_accesses: u64,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            training: true,
            interval: Duration::from_secs(24 * 3600),
            max_tokens: 2_000_000,
            checkpoint_interval: Duration::from_secs(60),
            margin_bits: 0.05,
            trial_accesses: 1_000_000,
        }
    }
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    NotPossible(String),
    #[error("another model is being measured; try again when that is done")]
    Busy,
    #[error(transparent)]
    Store(StoreError),
    #[error("prestaged is stopping")]
    Stopped,
}

impl ModelError {
    fn unknown(id: i64) -> Self {
        Self::NotFound(format!("there is no model {id}; `prestagectl model list` shows all"))
    }
}

impl From<StoreError> for ModelError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => Self::NotFound(error.to_string()),
            StoreError::WrongState(detail) => Self::NotPossible(detail),
            error => Self::Store(error),
        }
    }
}

impl From<TrainError> for ModelError {
    fn from(error: TrainError) -> Self {
        Self::NotPossible(error.to_string())
    }
}

/// A model in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub id: i64,
    /// Checked by the trainer.
    pub weights: Arc<[u8]>,
}

/// Models of one scope in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScopeModels {
    pub champion: Option<Loaded>,
    /// Predicts without effect.
    pub shadow: Option<Loaded>,
    /// What the shadow is compared with: the scope's champion, else the one for all; `None`: prediction without a model.
    pub rival: Option<Loaded>,
}

impl ScopeModels {
    #[must_use]
    pub fn pair(&self) -> Option<Pair> {
        let shadow = self.shadow.as_ref()?.id;
        Some(Pair { champion: self.rival.as_ref().map(|rival| rival.id), shadow })
    }
}

/// All models in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Active {
    pub scopes: BTreeMap<Scope, ScopeModels>,
}

impl Active {
    /// The model that predicts for a storage: its own, else the one for all.
    #[must_use]
    pub fn champion(&self, storage: &str) -> Option<&Loaded> {
        let own = self.scopes.get(&Scope::Storage(storage.to_owned()));
        let all = self.scopes.get(&Scope::Global);
        [own, all].into_iter().flatten().find_map(|models| models.champion.as_ref())
    }

    /// Scopes with a shadow to run on a storage's stream.
    pub fn shadows<'a>(&'a self, storage: &str) -> impl Iterator<Item = (&'a Scope, &'a ScopeModels)> {
        let own = Scope::Storage(storage.to_owned());
        self.scopes
            .iter()
            .filter(move |(scope, models)| models.shadow.is_some() && (**scope == own || **scope == Scope::Global))
    }

    fn weights(&self, id: i64) -> Option<Arc<[u8]>> {
        let models = self.scopes.values().flat_map(|models| [&models.champion, &models.shadow]);
        models.flatten().find(|loaded| loaded.id == id).map(|loaded| Arc::clone(&loaded.weights))
    }
}

#[derive(Debug, Default)]
struct Status {
    /// Model in training and the tokens trained on so far.
    running: Option<(i64, u64)>,
    waiting: Vec<String>,
    troubles: BTreeMap<Scope, String>,
}

/// What threads share.
#[derive(Debug)]
struct Shared {
    watch: Mutex<Watch>,
    active: Mutex<Arc<Active>>,
    /// Counts changes of `active`.
    generation: AtomicU64,
    status: Mutex<Status>,
}

impl Shared {
    fn new(settings: ModelSettings) -> Self {
        Self {
            watch: Mutex::new(Watch::new(settings)),
            active: Mutex::default(),
            generation: AtomicU64::new(0),
            status: Mutex::default(),
        }
    }
}

/// Reaches the models; clones share them.
#[derive(Clone)]
pub struct ModelsHandle(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    sender: Sender<Message>,
    store: Store,
    trainer: Arc<dyn Trainer>,
    source: Arc<dyn TokenSource>,
    evaluating: Arc<AtomicBool>,
}

impl fmt::Debug for ModelsHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelsHandle").field("shared", &self.0.shared).finish_non_exhaustive()
    }
}

impl ModelsHandle {
    /// Takes up what the last run left and starts both threads. The handle given back ends after [`ModelsHandle::stop`].
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(
        store: Store,
        trainer: Arc<dyn Trainer>,
        source: Arc<dyn TokenSource>,
        settings: ModelSettings,
    ) -> std::io::Result<(Self, JoinHandle<()>)> {
        let shared = Arc::new(Shared::new(settings));
        let (sender, messages) = channel();
        let (jobs, job) = channel();
        let worker = Worker {
            trainer: Arc::clone(&trainer),
            source: Arc::clone(&source),
            checkpoint_every: settings.checkpoint_interval,
        };
        let reports = sender.clone();
        let worker = std::thread::Builder::new().name("trainer".into()).spawn(move || {
            worker.run(&job, |report| {
                // The manager waits for a running training's last report before it ends.
                let _ = reports.send(Message::Report(report));
            });
        })?;
        let mut manager =
            Manager::new(store.clone(), Arc::clone(&trainer), Arc::clone(&source), settings, Arc::clone(&shared), jobs);
        let thread = std::thread::Builder::new().name("models".into()).spawn(move || {
            manager.start(unix_ms());
            while !manager.is_over() {
                match messages.recv_timeout(TICK) {
                    Ok(message) => manager.handle(message, unix_ms()),
                    Err(RecvTimeoutError::Timeout) => manager.tick(unix_ms()),
                    Err(RecvTimeoutError::Disconnected) => manager.handle(Message::Stop, unix_ms()),
                }
            }
            if worker.join().is_err() {
                tracing::error!("trainer panicked");
            }
        })?;
        let evaluating = Arc::new(AtomicBool::new(false));
        Ok((Self(Arc::new(Inner { shared, sender, store, trainer, source, evaluating })), thread))
    }

    fn send(&self, message: Message) {
        // Models that have stopped want to know nothing more.
        let _ = self.0.sender.send(message);
    }

    async fn ask<T>(&self, message: impl FnOnce(manager::Answer<T>) -> Message) -> Result<T, ModelError> {
        let (reply, answer) = oneshot::channel();
        self.send(message(reply));
        answer.await.unwrap_or(Err(ModelError::Stopped))
    }

    /// Changes whenever [`ModelsHandle::active`] does.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.0.shared.generation.load(Ordering::Acquire)
    }

    /// Models in use now.
    #[must_use]
    pub fn active(&self) -> Arc<Active> {
        Arc::clone(&self.0.shared.active.lock())
    }

    /// What the same accesses cost the two models of a scope, in bits: `(rival, shadow)` each. Without a rival the first is
    /// the cost of predicting without a model.
    pub fn losses(&self, scope: &Scope, pair: Pair, losses: &[(f32, f32)]) {
        let decision = self.0.shared.watch.lock().losses(scope, pair, losses);
        if let Some(decision) = decision {
            self.send(Message::Decided(decision));
        }
    }

    /// What is watched for drift: see [`Signal`].
    pub fn observe(&self, storage: &str, signal: Signal, values: &[f32]) {
        let moved = self.0.shared.watch.lock().drift(storage, signal, values);
        if let Some(reason) = moved {
            self.send(Message::Drifted { storage: storage.to_owned(), reason });
        }
    }

    /// A storage was closed.
    pub fn forget(&self, storage: &str) {
        self.0.shared.watch.lock().forget(storage);
    }

    pub fn settings(&self, settings: ModelSettings) {
        self.send(Message::Settings(settings));
    }

    /// Begins a training, or puts it in the queue.
    ///
    /// # Errors
    /// `NotPossible`: not enough history, in training already, or nothing to resume.
    pub async fn train(&self, scope: Scope, resume: bool) -> Result<TrainStarted, ModelError> {
        self.ask(|reply| Message::Train { scope, resume, reply }).await
    }

    /// # Errors
    /// `NotFound`; `NotPossible`: in training, champion already, or damaged.
    pub async fn promote(&self, id: i64) -> Result<ChampionChanged, ModelError> {
        self.ask(|reply| Message::Promote { id, reply }).await
    }

    /// # Errors
    /// `NotPossible`: the scope has no champion.
    pub async fn rollback(&self, scope: Scope) -> Result<ChampionChanged, ModelError> {
        self.ask(|reply| Message::Rollback { scope, reply }).await
    }

    /// A model as [`file::encode`] writes it; `host` is this one's name. Blocks on the database.
    ///
    /// # Errors
    /// `NotFound`; `NotPossible`: no weights yet, or damaged.
    pub fn export(&self, id: i64, host: &str) -> Result<Vec<u8>, ModelError> {
        let rows = self.0.store.models()?;
        let row = rows.into_iter().find(|row| row.id == id).ok_or_else(|| ModelError::unknown(id))?;
        let weights = self.0.store.model_weights(id)?;
        let weights = weights.ok_or_else(|| ModelError::NotPossible(format!("model {id} has no weights yet")))?;
        self.0.trainer.check(&weights).map_err(|error| ModelError::NotPossible(format!("model {id}: {error}")))?;
        let header = file::Header {
            kind: row.kind,
            scope: row.scope,
            host: host.to_owned(),
            id,
            seed: row.seed,
            tokens: row.tokens,
            from_us: row.from_us,
            to_us: row.to_us,
            metrics: row.metrics.and_then(|json| serde_json::from_str(&json).ok()),
        };
        Ok(file::encode(&header, &weights))
    }

    /// Takes up a model that was trained elsewhere, as the shadow of `scope`: it has to win its contest as any other.
    ///
    /// # Errors
    /// `NotPossible`: of another kind, does not fit, or in use already.
    pub async fn import(
        &self,
        header: file::Header,
        weights: Vec<u8>,
        scope: Scope,
    ) -> Result<ModelImported, ModelError> {
        let origin = format!("model {} of {} on host {}", header.id, header.scope, header.host);
        let file::Header { kind, seed, tokens, from_us, to_us, metrics, .. } = header;
        let metrics = metrics.and_then(|metrics| serde_json::to_string(&metrics).ok());
        let scope = scope.key().to_owned();
        let model = Box::new(ImportedModel { kind, scope, seed, tokens, from_us, to_us, metrics, weights });
        self.ask(|reply| Message::Import { model, origin, reply }).await
    }

    /// Measures a model on its scope's latest history, on a thread of idle priority, and keeps what comes out.
    ///
    /// # Errors
    /// `NotFound`; `NotPossible`: no weights, damaged, too little history; `Busy`.
    pub async fn evaluate(&self, id: i64) -> Result<ModelMetrics, ModelError> {
        let inner = Arc::clone(&self.0);
        if inner.evaluating.swap(true, Ordering::AcqRel) {
            return Err(ModelError::Busy);
        }
        // Cleared also when the thread cannot be started, which drops it.
        let measuring = Measuring(Arc::clone(&inner.evaluating));
        let (reply, answer) = oneshot::channel();
        let started = std::thread::Builder::new().name("evaluate".into()).spawn(move || {
            let found = catch_unwind(AssertUnwindSafe(|| inner.evaluate(id)));
            // Whoever has the answer may ask for the next one.
            drop(measuring);
            let failed =
                || ModelError::NotPossible(format!("model {id} could not be measured; see the log of prestaged"));
            let _ = reply.send(found.unwrap_or_else(|_| Err(failed())));
        });
        started.map_err(|error| ModelError::NotPossible(format!("cannot start a thread: {error}")))?;
        let metrics = answer.await.unwrap_or(Err(ModelError::Stopped))?;
        let json = serde_json::to_string(&metrics).unwrap_or_default();
        self.0.store.save_metrics(id, json).await?;
        Ok(metrics)
    }

    /// All models. Blocks on the database.
    ///
    /// # Errors
    /// What the database says.
    pub fn list(&self) -> Result<ModelList, ModelError> {
        report::list(&self.0.store, &self.0.shared)
    }

    /// One model and its audit. Blocks on the database.
    ///
    /// # Errors
    /// `NotFound`, or what the database says.
    pub fn show(&self, id: i64) -> Result<ModelDetail, ModelError> {
        report::show(&self.0.store, &self.0.shared, id)
    }

    /// What an operator should look at.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        self.0.shared.status.lock().troubles.values().cloned().collect()
    }

    /// Interrupts a training, keeps its checkpoint and ends both threads.
    pub fn stop(&self) {
        self.send(Message::Stop);
    }
}

struct Measuring(Arc<AtomicBool>);

impl Drop for Measuring {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Inner {
    fn evaluate(&self, id: i64) -> Result<ModelMetrics, ModelError> {
        // First of all: the database's lock is not to be held by a thread that hardly runs.
        let rows = self.store.models()?;
        let row = rows.iter().find(|row| row.id == id).ok_or_else(|| ModelError::unknown(id))?;
        let weights = self.store.model_weights(id)?;
        let weights = weights.ok_or_else(|| ModelError::NotPossible(format!("model {id} has no weights yet")))?;
        drop(priority::become_idle());
        let never = || false;
        let scope = Scope::of(&row.scope);
        let tokens = self.source.tokens(&scope, None, EVALUATE_TOKENS, &never).map_err(ModelError::NotPossible)?;
        Ok(self.trainer.evaluate(&weights, tokens)?)
    }
}
