//! What is trained when, and which model is in use: one thread, woken by requests, reports and the clock.
//!
//! Time comes in as an argument, so that its tests need no clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use prestage_integration::api::models::{ChampionChanged, ModelImported, TrainStarted};
use tokio::sync::oneshot;

use super::scope::Scope;
use super::train::{TokenSource, TrainError, Trainer};
use super::watch::Decision;
use super::worker::{Job, Report};
use super::{Active, Loaded, ModelError, ModelSettings, Shared};
use crate::store::models::{Change, ImportedModel, ModelRow, ModelState, NewModel};
use crate::store::{Store, StoreError};

/// How often the manager asks whether a training is due.
const LOOK: Duration = Duration::from_secs(600);
/// Least time between trainings of one scope that drift asks for: what drifts goes on drifting while a model is trained.
const DRIFT_PAUSE: Duration = Duration::from_secs(3600);

pub(super) type Answer<T> = oneshot::Sender<Result<T, ModelError>>;

pub(super) enum Message {
    Train {
        scope: Scope,
        resume: bool,
        reply: Answer<TrainStarted>,
    },
    Promote {
        id: i64,
        reply: Answer<ChampionChanged>,
    },
    Rollback {
        scope: Scope,
        reply: Answer<ChampionChanged>,
    },
    /// Checked for its form, and not yet whether it fits.
    Import {
        model: Box<ImportedModel>,
        origin: String,
        reply: Answer<ModelImported>,
    },
    Decided(Decision),
    Drifted {
        storage: String,
        reason: String,
    },
    Report(Report),
    Settings(ModelSettings),
    Stop,
}

struct Running {
    id: i64,
    scope: Scope,
    stop: Arc<AtomicBool>,
}

/// Why a scope is to be trained, for the audit.
#[derive(Debug, Clone)]
struct Cause {
    actor: &'static str,
    reason: String,
    resume: bool,
}

pub(super) struct Manager {
    store: Store,
    trainer: Arc<dyn Trainer>,
    source: Arc<dyn TokenSource>,
    settings: ModelSettings,
    shared: Arc<Shared>,
    /// `None` once it is to end.
    jobs: Option<Sender<Job>>,
    running: Option<Running>,
    /// At most one cause a scope.
    waiting: VecDeque<(Scope, Cause)>,
    looked_ms: Option<u64>,
    contests_saved_ms: u64,
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn change(actor: &'static str, reason: impl Into<String>, at_unix_ms: u64) -> Change {
    Change { actor, reason: reason.into(), at_unix_ms }
}

fn holder<'a>(rows: &'a [ModelRow], scope: &Scope, state: ModelState) -> Option<&'a ModelRow> {
    rows.iter().find(|row| row.scope == scope.key() && row.state == state)
}

impl Manager {
    pub(super) fn new(
        store: Store,
        trainer: Arc<dyn Trainer>,
        source: Arc<dyn TokenSource>,
        settings: ModelSettings,
        shared: Arc<Shared>,
        jobs: Sender<Job>,
    ) -> Self {
        Self {
            store,
            trainer,
            source,
            settings,
            shared,
            jobs: Some(jobs),
            running: None,
            waiting: VecDeque::new(),
            looked_ms: None,
            contests_saved_ms: 0,
        }
    }

    /// Takes up what the last run left: models in use, contests, trainings interrupted.
    pub(super) fn start(&mut self, now: u64) {
        self.refresh(now);
        self.resume_interrupted(now);
    }

    /// Whether everything is done after [`Message::Stop`].
    pub(super) fn is_over(&self) -> bool {
        self.jobs.is_none() && self.running.is_none()
    }

    pub(super) fn handle(&mut self, message: Message, now: u64) {
        match message {
            Message::Train { scope, resume, reply } => {
                let _ = reply.send(self.asked_to_train(scope, resume, now));
            }
            Message::Promote { id, reply } => {
                let promoted = self.promote(id, change("operator", "promoted by hand", now), now);
                let _ = reply.send(promoted);
            }
            Message::Rollback { scope, reply } => {
                let _ = reply.send(self.roll_back(&scope, change("operator", "rolled back by hand", now), now));
            }
            Message::Import { model, origin, reply } => {
                let _ = reply.send(self.import(*model, &origin, now));
            }
            Message::Decided(decision) => self.decided(&decision, now),
            Message::Drifted { storage, reason } => self.drifted(storage, &reason, now),
            Message::Report(report) => self.report(report, now),
            Message::Settings(settings) => self.set(settings, now),
            Message::Stop => {
                self.stop_running();
                self.waiting.clear();
                self.jobs = None;
                self.save_contests();
            }
        }
        self.shared.status.lock().waiting = self.waiting.iter().map(|(scope, _)| scope.key().to_owned()).collect();
    }

    /// To be called about once a minute.
    pub(super) fn tick(&mut self, now: u64) {
        if now.saturating_sub(self.contests_saved_ms) >= millis(self.settings.checkpoint_interval) {
            self.contests_saved_ms = now;
            self.save_contests();
        }
        // A clock that was set back must not put everything off until it has caught up.
        if !self.settings.training || self.looked_ms.is_some_and(|last| now.abs_diff(last) < millis(LOOK)) {
            return;
        }
        self.looked_ms = Some(now);
        let Some(rows) = self.rows() else { return };
        // The model for all, and those of storages that have earned one of their own.
        let champions = rows.iter().filter(|row| row.state == ModelState::Champion).map(|row| Scope::of(&row.scope));
        let scopes: BTreeSet<Scope> = champions.chain([Scope::Global]).collect();
        for scope in scopes {
            let reason = match last_begun(&rows, &scope) {
                None => "there is enough history for a first model".to_owned(),
                Some(_) => "its time has come".to_owned(),
            };
            self.train_unasked(&rows, scope, reason, self.settings.interval, now);
        }
    }

    fn rows(&mut self) -> Option<Vec<ModelRow>> {
        match self.store.models() {
            Ok(rows) => Some(rows),
            Err(error) => {
                tracing::warn!(%error, "models not read");
                None
            }
        }
    }

    fn drifted(&mut self, storage: String, reason: &str, now: u64) {
        tracing::info!(storage, reason, "drift");
        if !self.settings.training {
            return;
        }
        let Some(rows) = self.rows() else { return };
        let own = Scope::Storage(storage);
        let scope = if holder(&rows, &own, ModelState::Champion).is_some() { own } else { Scope::Global };
        self.train_unasked(&rows, scope, format!("drift: {reason}"), DRIFT_PAUSE, now);
    }

    /// Unless it is too early, a shadow is still being compared, or there is too little to learn from.
    fn train_unasked(&mut self, rows: &[ModelRow], scope: Scope, reason: String, pause: Duration, now: u64) {
        let early = last_begun(rows, &scope).is_some_and(|begun| now.saturating_sub(begun) < millis(pause));
        let busy =
            [ModelState::Training, ModelState::Shadow].iter().any(|state| holder(rows, &scope, *state).is_some());
        if early || busy || self.source.accesses(&scope).is_ok_and(|found| found < self.trainer.least_tokens()) {
            return;
        }
        self.enqueue(scope, Cause { actor: "trainer", reason, resume: false }, now);
    }

    fn asked_to_train(&mut self, scope: Scope, resume: bool, now: u64) -> Result<TrainStarted, ModelError> {
        if self.jobs.is_none() {
            return Err(ModelError::Stopped);
        }
        let rows = self.store.models()?;
        if let Some(running) = self.running.as_ref().filter(|running| running.scope == scope) {
            return Err(ModelError::NotPossible(format!(
                "model {} of {scope} is in training already; `prestagectl model show {0}` shows how far it is",
                running.id
            )));
        }
        let interrupted = holder(&rows, &scope, ModelState::Training).filter(|row| row.checkpoint_bytes > 0);
        if resume && interrupted.is_none() {
            return Err(ModelError::NotPossible(format!(
                "no training of {scope} was interrupted; leave --resume out to begin one"
            )));
        }
        let accesses = self.source.accesses(&scope).map_err(ModelError::NotPossible)?;
        let needed = self.trainer.least_tokens();
        if accesses < needed && !resume {
            let error = TrainError::TooLittle { tokens: accesses, needed };
            return Err(ModelError::NotPossible(format!("{scope}: {error}")));
        }
        self.enqueue(scope.clone(), Cause { actor: "operator", reason: "asked for".to_owned(), resume }, now);
        let model = self.running.as_ref().filter(|running| running.scope == scope).map(|running| running.id);
        Ok(TrainStarted { scope: scope.key().to_owned(), model, resumed: resume, accesses })
    }

    fn resume_interrupted(&mut self, now: u64) {
        if !self.settings.training {
            return;
        }
        let Some(rows) = self.rows() else { return };
        for row in rows.iter().filter(|row| row.state == ModelState::Training) {
            let cause = Cause { actor: "daemon", reason: "was interrupted".to_owned(), resume: true };
            self.enqueue(Scope::of(&row.scope), cause, now);
        }
    }

    fn enqueue(&mut self, scope: Scope, cause: Cause, now: u64) {
        let running = self.running.as_ref().is_some_and(|running| running.scope == scope);
        if !running && self.waiting.iter().all(|(waiting, _)| *waiting != scope) {
            self.waiting.push_back((scope, cause));
        }
        self.begin_next(now);
    }

    /// Hands the next training to the worker, if it is free.
    fn begin_next(&mut self, now: u64) {
        while self.running.is_none() {
            let Some((scope, cause)) = self.waiting.pop_front() else { return };
            if let Err(error) = self.begin(&scope, &cause, now) {
                tracing::warn!(%scope, %error, "training not begun");
                self.trouble(&scope, format!("training not begun: {error}"));
            }
        }
    }

    fn begin(&mut self, scope: &Scope, cause: &Cause, now: u64) -> Result<(), StoreError> {
        let rows = self.store.models()?;
        let unfinished = holder(&rows, scope, ModelState::Training).filter(|_| cause.resume);
        let (id, seed, resume) = match unfinished {
            Some(row) => {
                let checkpoint = self.store.model_checkpoint(row.id)?;
                (row.id, row.seed, checkpoint.map(|checkpoint| (checkpoint, (row.from_us, row.to_us))))
            }
            None => {
                // Any number does, as long as it is kept.
                let seed = now;
                let parent = holder(&rows, scope, ModelState::Champion).map(|row| row.id);
                let new =
                    NewModel { kind: self.trainer.kind().to_owned(), scope: scope.key().to_owned(), parent, seed };
                self.store.start_model(new, change(cause.actor, cause.reason.clone(), now)).wait()?;
                let rows = self.store.models()?;
                let Some(row) = holder(&rows, scope, ModelState::Training) else { return Err(StoreError::Closed) };
                (row.id, seed, None)
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let job = Job {
            id,
            scope: scope.clone(),
            seed,
            resume,
            most_tokens: self.settings.max_tokens,
            stop: Arc::clone(&stop),
        };
        let resumed = job.resume.is_some();
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.send(job).map_err(|_| StoreError::Closed)?;
        tracing::info!(model = id, %scope, reason = cause.reason, resumed, "training");
        self.running = Some(Running { id, scope: scope.clone(), stop });
        self.shared.status.lock().running = Some((id, 0));
        Ok(())
    }

    fn stop_running(&self) {
        if let Some(running) = &self.running {
            running.stop.store(true, Ordering::Relaxed);
        }
    }

    fn set(&mut self, settings: ModelSettings, now: u64) {
        let before = std::mem::replace(&mut self.settings, settings);
        self.shared.watch.lock().settings(settings);
        match (before.training, settings.training) {
            (true, false) => {
                self.stop_running();
                self.waiting.clear();
            }
            (false, true) => self.resume_interrupted(now),
            _ => {}
        }
    }

    fn report(&mut self, report: Report, now: u64) {
        match report {
            Report::Began { id, tokens, from_us, to_us, afresh } => {
                if let Some(why) = afresh {
                    tracing::warn!(model = id, %why, "training not resumed, it begins anew");
                }
                self.written(id, "range", self.store.describe_model(id, tokens, from_us, to_us).wait());
            }
            Report::Checkpoint { id, checkpoint, trained } => {
                self.shared.status.lock().running = Some((id, trained));
                self.written(id, "checkpoint", self.store.save_checkpoint(id, checkpoint).wait());
            }
            Report::Done { id, weights, metrics } => {
                self.ended();
                let checked = self.trainer.check(&weights);
                let metrics = serde_json::to_string(&metrics).unwrap_or_default();
                match checked {
                    Ok(()) => {
                        let done = change("trainer", "training is done", now);
                        self.written(id, "weights", self.store.finish_model(id, weights, metrics, done).wait());
                        tracing::info!(model = id, "trained; it runs in shadow now");
                    }
                    Err(error) => self.give_up(id, &error.to_string(), now),
                }
                self.refresh(now);
            }
            Report::Failed { id, error } => {
                self.ended();
                self.give_up(id, &error.to_string(), now);
            }
            Report::Stopped { id } => {
                self.ended();
                tracing::info!(model = id, "training interrupted");
            }
        }
        self.begin_next(now);
    }

    fn ended(&mut self) {
        self.running = None;
        self.shared.status.lock().running = None;
    }

    fn give_up(&self, id: i64, reason: &str, now: u64) {
        tracing::warn!(model = id, reason, "model given up");
        self.written(id, "state", self.store.reject_model(id, change("trainer", reason, now)).wait());
    }

    /// The store reports itself degraded; here stands what was lost by it.
    fn written(&self, id: i64, what: &str, outcome: Result<(), StoreError>) {
        if let Err(error) = outcome {
            tracing::warn!(model = id, %error, "{what} of the model not saved");
        }
    }

    fn decided(&mut self, decision: &Decision, now: u64) {
        let Decision { scope, pair, promote, reason } = decision;
        let champion = self.shared.active.lock().scopes.get(scope).and_then(|active| active.pair());
        if champion != Some(*pair) {
            // Somebody changed the champion meanwhile: the comparison is with one that is no longer in use.
            return;
        }
        let change = change("contest", reason.clone(), now);
        let outcome = if *promote {
            self.promote(pair.shadow, change, now).map(drop)
        } else {
            self.store.reject_model(pair.shadow, change).wait().map_err(ModelError::from)
        };
        match outcome {
            Ok(()) if *promote => tracing::info!(model = pair.shadow, %scope, reason, "model promoted"),
            Ok(()) => tracing::info!(model = pair.shadow, %scope, reason, "model rejected"),
            Err(error) => tracing::warn!(model = pair.shadow, %scope, %error, "contest's verdict not carried out"),
        }
        self.refresh(now);
    }

    fn promote(&mut self, id: i64, change: Change, now: u64) -> Result<ChampionChanged, ModelError> {
        let rows = self.store.models()?;
        let row = rows.iter().find(|row| row.id == id).ok_or_else(|| ModelError::unknown(id))?;
        let scope = Scope::of(&row.scope);
        if let Some(weights) = self.store.model_weights(id)? {
            self.trainer.check(&weights).map_err(|error| {
                ModelError::NotPossible(format!("model {id} cannot be used: {error}; the champion stays"))
            })?;
        }
        let before = holder(&rows, &scope, ModelState::Champion).map(|row| row.id);
        self.store.promote_model(id, change).wait()?;
        self.shared.status.lock().troubles.remove(&scope);
        self.refresh(now);
        Ok(ChampionChanged { scope: scope.key().to_owned(), champion: Some(id), before })
    }

    fn roll_back(&mut self, scope: &Scope, change: Change, now: u64) -> Result<ChampionChanged, ModelError> {
        let rows = self.store.models()?;
        let before = holder(&rows, scope, ModelState::Champion).map(|row| row.id);
        self.store.rollback_model(scope.key(), change).wait()?;
        self.refresh(now);
        let rows = self.store.models()?;
        let champion = holder(&rows, scope, ModelState::Champion).map(|row| row.id);
        Ok(ChampionChanged { scope: scope.key().to_owned(), champion, before })
    }

    fn import(&mut self, model: ImportedModel, origin: &str, now: u64) -> Result<ModelImported, ModelError> {
        let own = self.trainer.kind();
        if model.kind != own {
            let kind = &model.kind;
            return Err(ModelError::NotPossible(format!("the model is of kind `{kind}`; this prestaged runs `{own}`")));
        }
        self.trainer.check(&model.weights).map_err(|error| {
            ModelError::NotPossible(format!("the model does not fit this version of prestaged: {error}"))
        })?;
        let scope = Scope::of(&model.scope);
        let active = Arc::clone(&self.shared.active.lock());
        let in_use = active.scopes.get(&scope).into_iter().flat_map(|models| [&models.champion, &models.shadow]);
        if let Some(same) = in_use.flatten().find(|loaded| *loaded.weights == *model.weights) {
            return Err(ModelError::NotPossible(format!(
                "it is model {} of {scope}, which is in use already",
                same.id
            )));
        }
        let before = holder(&self.store.models()?, &scope, ModelState::Shadow).map(|row| row.id);
        self.store.import_model(model, change("operator", format!("imported: {origin}"), now)).wait()?;
        self.refresh(now);
        let rows = self.store.models()?;
        // Only this thread makes shadows.
        let id = holder(&rows, &scope, ModelState::Shadow).map(|row| row.id).ok_or(ModelError::Stopped)?;
        tracing::info!(model = id, %scope, origin, "imported; it runs in shadow now");
        Ok(ModelImported { scope: scope.key().to_owned(), model: id, before })
    }

    fn trouble(&self, scope: &Scope, detail: String) {
        self.shared.status.lock().troubles.insert(scope.clone(), detail);
    }

    /// Reads which models are in use; damaged ones are taken out of it, and what was in use before comes back.
    fn refresh(&mut self, now: u64) {
        // Each round takes one damaged model out of use.
        while let Err(error) = self.try_refresh(now) {
            match error {
                Refresh::Again => {}
                Refresh::Failed(error) => {
                    tracing::warn!(%error, "models not read; those in use stay in use");
                    return;
                }
            }
        }
    }

    fn try_refresh(&mut self, now: u64) -> Result<(), Refresh> {
        let rows = self.store.models()?;
        let before = Arc::clone(&self.shared.active.lock());
        let mut active = Active::default();
        let mut trials = Vec::new();
        let in_use = |row: &&ModelRow| matches!(row.state, ModelState::Champion | ModelState::Shadow);
        for row in rows.iter().filter(in_use) {
            let scope = Scope::of(&row.scope);
            let weights = match before.weights(row.id) {
                Some(weights) => weights,
                None => {
                    let weights = self.store.model_weights(row.id)?.unwrap_or_default();
                    if let Err(error) = self.trainer.check(&weights) {
                        self.take_out_of_use(row, &scope, &error, now)?;
                        return Err(Refresh::Again);
                    }
                    weights.into()
                }
            };
            let pair = active.scopes.entry(scope).or_default();
            let loaded = Some(Loaded { id: row.id, weights });
            match row.state {
                ModelState::Champion => pair.champion = loaded,
                _ => pair.shadow = loaded,
            }
        }
        let global = active.scopes.get(&Scope::Global).and_then(|global| global.champion.clone());
        for (scope, models) in &mut active.scopes {
            // What a storage's first model of its own is to replace is the model for all.
            models.rival = models.champion.clone().or_else(|| global.clone());
            if let Some(pair) = models.pair() {
                let saved = rows.iter().find(|row| row.id == pair.shadow).and_then(|row| row.contest.clone());
                trials.push((scope.clone(), pair, saved));
            }
        }
        self.shared.watch.lock().set_trials(trials);
        *self.shared.active.lock() = Arc::new(active);
        self.shared.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn take_out_of_use(&self, row: &ModelRow, scope: &Scope, error: &TrainError, now: u64) -> Result<(), StoreError> {
        let (id, detail) = (row.id, format!("model {} of {scope} cannot be used: {error}", row.id));
        tracing::error!(model = id, %scope, %error, "model cannot be used");
        let change = change("daemon", format!("cannot be used: {error}"), now);
        if row.state == ModelState::Shadow {
            return self.store.reject_model(id, change).wait();
        }
        self.trouble(
            scope,
            format!("{detail}; the one before it is in use, `prestagectl model list` shows it; train a new one with `prestagectl model train`"),
        );
        self.store.rollback_model(scope.key(), change).wait()
    }

    fn save_contests(&self) {
        let states: BTreeMap<i64, Vec<u8>> =
            self.shared.watch.lock().trials().map(|(_, trial)| (trial.pair.shadow, trial.contest.to_bytes())).collect();
        for (shadow, state) in states {
            drop(self.store.save_contest(shadow, state));
        }
    }
}

enum Refresh {
    Again,
    Failed(StoreError),
}

impl From<StoreError> for Refresh {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

fn last_begun(rows: &[ModelRow], scope: &Scope) -> Option<u64> {
    rows.iter().filter(|row| row.scope == scope.key()).map(|row| row.created_unix_ms).max()
}
