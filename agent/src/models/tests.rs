//! Models with a trainer that counts instead of learning: what is trained, kept, promoted and refused, and when.

use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Condvar, Mutex as StdMutex};

use super::*;
use crate::store::models::{Change, ModelState, NewModel};
use manager::Manager;
use train::{ShouldStop, Tokens, Training};
use worker::{Job, Report};

const NEEDED: u64 = 100;
/// Slices of a training.
const SLICES: u64 = 20;
const LONG: Duration = Duration::from_secs(60);
const HOUR: u64 = 3_600_000;

/// Weights are `W`, seed, slices trained, and the sum of the tokens; a checkpoint is `C` and the same.
#[derive(Debug, Default)]
struct Counting {
    /// Slice before which a training waits until it is told to stop.
    gate: Gate,
}

#[derive(Debug, Default)]
struct Gate {
    /// Closed before this slice; 0: open.
    at: StdMutex<u64>,
    moved: Condvar,
    /// Trainings that wait at the gate.
    waits: StdMutex<bool>,
}

impl Gate {
    fn close(&self, at: u64) {
        *self.at.lock().unwrap() = at;
    }

    /// Returns when a training has come to the gate.
    fn reached(&self) {
        let waits = self.waits.lock().unwrap();
        let (_waits, timeout) = self.moved.wait_timeout_while(waits, LONG, |waits| !*waits).unwrap();
        assert!(!timeout.timed_out(), "no training came to the gate");
    }

    fn pass(&self, slice: u64, stop: ShouldStop<'_>) {
        let mut at = self.at.lock().unwrap();
        while *at != 0 && slice >= *at && !stop() {
            *self.waits.lock().unwrap() = true;
            self.moved.notify_all();
            // The stop flag has no bell of its own.
            at = self.moved.wait_timeout(at, Duration::from_millis(1)).unwrap().0;
        }
        *self.waits.lock().unwrap() = false;
    }
}

struct Count {
    trainer: Arc<Counting>,
    seed: u64,
    done: u64,
    sum: u64,
    tokens: u64,
}

fn bytes(kind: u8, seed: u64, done: u64, sum: u64) -> Vec<u8> {
    [&[kind][..], &seed.to_le_bytes(), &done.to_le_bytes(), &sum.to_le_bytes()].concat()
}

fn sum(tokens: &Tokens) -> u64 {
    tokens.sequences.iter().flatten().map(|token| u64::from(token.bits())).sum()
}

impl Trainer for Arc<Counting> {
    fn kind(&self) -> &'static str {
        "lstm"
    }
    fn least_tokens(&self) -> u64 {
        NEEDED
    }
    fn begin(&self, tokens: Tokens, seed: u64) -> Result<Box<dyn Training>, TrainError> {
        Ok(Box::new(Count { trainer: self.clone(), seed, done: 0, sum: sum(&tokens), tokens: tokens.count() }))
    }
    fn resume(&self, tokens: Tokens, checkpoint: &[u8]) -> Result<Box<dyn Training>, TrainError> {
        let (b'C', words) = checkpoint.split_first().ok_or(TrainError::Damaged("empty".into()))? else {
            return Err(TrainError::Damaged("checkpoint damaged".into()));
        };
        let (words, _) = words.as_chunks::<8>();
        let [seed, done, held] = [0, 1, 2].map(|at| u64::from_le_bytes(words[at]));
        if held != sum(&tokens) {
            return Err(TrainError::OtherTokens);
        }
        Ok(Box::new(Count { trainer: self.clone(), seed, done, sum: held, tokens: tokens.count() }))
    }
    fn check(&self, weights: &[u8]) -> Result<(), TrainError> {
        if weights.first() == Some(&b'W') { Ok(()) } else { Err(TrainError::Damaged("checksum does not fit".into())) }
    }
    fn evaluate(&self, weights: &[u8], tokens: Tokens) -> Result<ModelMetrics, TrainError> {
        self.check(weights)?;
        Ok(ModelMetrics { tokens: tokens.count(), leads: vec![] })
    }
}

impl Training for Count {
    fn advance(&mut self, stop: ShouldStop<'_>) -> Result<bool, TrainError> {
        self.trainer.gate.pass(self.done, stop);
        if !stop() {
            self.done += 1;
        }
        Ok(self.done >= SLICES)
    }
    fn trained(&self) -> u64 {
        self.done * self.tokens
    }
    fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        Ok(bytes(b'C', self.seed, self.done, self.sum))
    }
    fn finish(self: Box<Self>) -> Result<(Vec<u8>, ModelMetrics), TrainError> {
        let weights = bytes(b'W', self.seed, self.done, self.sum);
        Ok((weights, ModelMetrics { tokens: self.tokens, leads: vec![] }))
    }
}

/// The number of tokens by scope; a range is that number again.
struct Fixed(parking_lot::Mutex<u64>);

impl TokenSource for Fixed {
    fn accesses(&self, _: &Scope) -> Result<u64, String> {
        Ok(*self.0.lock())
    }
    fn tokens(&self, _: &Scope, range: Option<(u64, u64)>, most: u64, _: ShouldStop<'_>) -> Result<Tokens, String> {
        let count = range.map_or_else(|| most.min(*self.0.lock()), |(_, to)| to);
        let sequence = (0..count).filter_map(|n| Token::from_bits((n % 64) as u16)).collect();
        Ok(Tokens { sequences: vec![sequence], from_us: 1, to_us: count })
    }
}

struct Host {
    store: Store,
    trainer: Arc<Counting>,
    source: Arc<Fixed>,
    settings: ModelSettings,
}

impl Host {
    fn open(path: &Path) -> Self {
        Self {
            store: Store::open(path).unwrap(),
            trainer: Arc::default(),
            source: Arc::new(Fixed(parking_lot::Mutex::new(1000))),
            settings: ModelSettings {
                training: false,
                checkpoint_interval: Duration::ZERO,
                trial_accesses: 10_000,
                ..ModelSettings::default()
            },
        }
    }

    fn start(&self) -> (ModelsHandle, JoinHandle<()>) {
        let trainer = Arc::new(self.trainer.clone());
        ModelsHandle::start(self.store.clone(), trainer, self.source.clone(), self.settings).unwrap()
    }

    /// A manager without threads, and what it hands to the worker.
    fn manager(&self) -> (Manager, Arc<Shared>, Receiver<Job>) {
        let shared = Arc::new(Shared::new(self.settings));
        let (jobs, job) = channel();
        let trainer = Arc::new(self.trainer.clone());
        let mut manager =
            Manager::new(self.store.clone(), trainer, self.source.clone(), self.settings, Arc::clone(&shared), jobs);
        manager.start(HOUR);
        (manager, shared, job)
    }

    fn change(&self) -> Change {
        Change { actor: "operator", reason: "test".into(), at_unix_ms: 1 }
    }

    /// A shadow with these weights.
    fn shadow(&self, scope: &str, weights: &[u8]) -> i64 {
        let new = NewModel { kind: "lstm".into(), scope: scope.into(), parent: None, seed: 1 };
        self.store.start_model(new, self.change()).wait().unwrap();
        let id = self.store.models().unwrap().last().unwrap().id;
        self.store.finish_model(id, weights.to_vec(), "{}".into(), self.change()).wait().unwrap();
        id
    }

    fn champion(&self, scope: &str, weights: &[u8]) -> i64 {
        let id = self.shadow(scope, weights);
        self.store.promote_model(id, self.change()).wait().unwrap();
        id
    }

    fn state(&self, id: i64) -> ModelState {
        self.store.models().unwrap().into_iter().find(|row| row.id == id).unwrap().state
    }
}

fn block<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// Returns when the model is no longer in training, in the database and among those in use.
fn until_trained(handle: &ModelsHandle, id: i64) {
    let deadline = std::time::Instant::now() + LONG;
    while handle.show(id).unwrap().model.state == prestage_integration::api::models::ModelState::Training {
        assert!(std::time::Instant::now() < deadline, "model {id} is still in training");
        std::thread::yield_now();
    }
    // What is written is taken into use after that, and before the next order is answered.
    assert!(matches!(block(handle.promote(0)), Err(ModelError::NotFound(_))));
}

#[test]
fn a_training_ends_as_a_shadow_with_what_it_was_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let (handle, thread) = host.start();
    let started = block(handle.train(Scope::Global, false)).unwrap();
    assert_eq!((started.accesses, started.resumed), (1000, false));
    let id = started.model.unwrap();
    until_trained(&handle, id);
    let detail = handle.show(id).unwrap();
    assert_eq!((detail.model.tokens, detail.model.metrics.map(|metrics| metrics.tokens)), (1000, Some(1000)));
    assert_eq!(detail.changes.iter().map(|change| change.actor.as_str()).collect::<Vec<_>>(), ["operator", "trainer"]);
    let active = handle.active();
    assert_eq!(active.champion("file:/a"), None);
    let (scope, models) = active.shadows("file:/a").next().unwrap();
    assert_eq!((scope, models.pair()), (&Scope::Global, Some(Pair { champion: None, shadow: id })));
    assert_eq!(block(handle.evaluate(id)).unwrap().tokens, 1000);
    assert!(matches!(block(handle.evaluate(99)), Err(ModelError::NotFound(_))));
    handle.stop();
    thread.join().unwrap();
    assert_eq!(block(handle.promote(id)), Err(ModelError::Stopped));
}

#[test]
fn a_stopped_training_goes_on_after_a_restart_and_ends_as_if_it_had_never_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let mut host = Host::open(&path);
    host.trainer.gate.close(7);
    let (handle, thread) = host.start();
    let id = block(handle.train(Scope::Global, false)).unwrap().model.unwrap();
    host.trainer.gate.reached();
    assert!(handle.show(id).unwrap().model.trained_tokens.is_some());
    handle.stop();
    thread.join().unwrap();
    let row = host.store.models().unwrap().pop().unwrap();
    assert_eq!(row.state, ModelState::Training);
    assert_eq!(host.store.model_checkpoint(id).unwrap().unwrap(), bytes(b'C', row.seed, 7, row_sum(1000)));
    assert!(host.store.close(LONG));

    // More history has come; the training goes on with what it began with.
    host = Host::open(&path);
    *host.source.0.lock() = 5000;
    host.settings.training = true;
    let (handle, thread) = host.start();
    until_trained(&handle, id);
    assert_eq!(host.store.model_weights(id).unwrap().unwrap(), bytes(b'W', row.seed, SLICES, row_sum(1000)));
    assert_eq!(host.state(id), ModelState::Shadow);
    handle.stop();
    thread.join().unwrap();
}

fn row_sum(tokens: u64) -> u64 {
    (0..tokens).map(|n| n % 64).sum()
}

#[test]
fn a_killed_training_goes_on_from_its_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let host = Host::open(&path);
    host.trainer.gate.close(5);
    let (handle, thread) = host.start();
    let id = block(handle.train(Scope::Global, false)).unwrap().model.unwrap();
    host.trainer.gate.reached();
    // As a power cut leaves it: what was written so far, no orderly stop.
    let deadline = std::time::Instant::now() + LONG;
    while host.store.model_checkpoint(id).unwrap().is_none_or(|checkpoint| checkpoint[9] != 5) {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    let copy = folder.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for name in ["db", "db-wal"] {
        std::fs::copy(folder.path().join(name), copy.join(name)).unwrap();
    }
    handle.stop();
    thread.join().unwrap();

    let host = Host::open(&copy.join("db"));
    let (handle, thread) = host.start();
    assert!(block(handle.train(Scope::Global, true)).unwrap().resumed);
    until_trained(&handle, id);
    let seed = handle.show(id).unwrap().model.seed;
    assert_eq!(host.store.model_weights(id).unwrap().unwrap(), bytes(b'W', seed, SLICES, row_sum(1000)));
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn a_checkpoint_that_does_not_fit_begins_the_training_anew() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let new = NewModel { kind: "lstm".into(), scope: "global".into(), parent: None, seed: 77 };
    host.store.start_model(new, host.change()).wait().unwrap();
    host.store.describe_model(1, 1000, 1, 1000).wait().unwrap();
    host.store.save_checkpoint(1, bytes(b'C', 77, 3, 12345)).wait().unwrap();
    let (handle, thread) = host.start();
    block(handle.train(Scope::Global, true)).unwrap();
    until_trained(&handle, 1);
    assert_eq!(host.store.model_weights(1).unwrap().unwrap(), bytes(b'W', 77, SLICES, row_sum(1000)));
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn too_little_history_is_refused_with_how_much_there_is_and_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    *host.source.0.lock() = 42;
    let (mut manager, _, jobs) = host.manager();
    let error = ask(&mut manager, |reply| Message::Train { scope: Scope::Global, resume: false, reply }).unwrap_err();
    assert!(error.to_string().contains("42 accesses, at least 100 are needed"), "{error}");
    let error = ask(&mut manager, |reply| Message::Train { scope: Scope::Global, resume: true, reply }).unwrap_err();
    assert!(error.to_string().contains("no training of global was interrupted"), "{error}");
    assert!(jobs.try_recv().is_err());
    assert!(host.store.models().unwrap().is_empty());
}

fn ask<T>(manager: &mut Manager, message: impl FnOnce(manager::Answer<T>) -> Message) -> Result<T, ModelError> {
    let (reply, mut answer) = oneshot::channel();
    manager.handle(message(reply), HOUR);
    answer.try_recv().unwrap()
}

#[test]
fn one_training_at_a_time_and_each_scope_waits_once() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let (mut manager, shared, jobs) = host.manager();
    let mut train =
        |scope: &Scope| ask(&mut manager, |reply| Message::Train { scope: scope.clone(), resume: false, reply });
    let (a, b) = (Scope::Storage("file:/a".into()), Scope::Storage("file:/b".into()));
    let first = train(&a).unwrap().model.unwrap();
    assert_eq!(train(&b).unwrap().model, None);
    assert_eq!(train(&b).unwrap().model, None);
    assert!(train(&a).unwrap_err().to_string().contains("in training already"));
    assert_eq!(shared.status.lock().waiting, ["file:/b"]);
    let job = jobs.try_recv().unwrap();
    assert_eq!((job.id, &job.scope), (first, &a));
    assert!(jobs.try_recv().is_err());
    let error = TrainError::Failed("no memory".into());
    manager.handle(Message::Report(Report::Failed { id: first, error }), HOUR);
    assert_eq!(host.state(first), ModelState::Rejected);
    assert_eq!(host.store.models().unwrap()[0].reason, "no memory");
    assert_eq!(jobs.try_recv().unwrap().scope, b);
    manager.handle(Message::Stop, HOUR);
    assert!(!manager.is_over(), "the running training's last report is waited for");
    manager.handle(Message::Report(Report::Stopped { id: first + 1 }), HOUR);
    assert!(manager.is_over());
}

#[test]
fn trainings_come_with_time_and_with_drift_but_not_during_a_contest() {
    let folder = tempfile::tempdir().unwrap();
    let mut host = Host::open(&folder.path().join("db"));
    host.settings.training = true;
    let (mut manager, _, jobs) = host.manager();
    *host.source.0.lock() = 99;
    manager.tick(HOUR);
    assert!(jobs.try_recv().is_err(), "too little history");
    *host.source.0.lock() = 100;
    manager.tick(2 * HOUR);
    let first = jobs.try_recv().unwrap();
    assert_eq!(first.scope, Scope::Global);
    let done = |id| {
        let weights = bytes(b'W', 1, 1, 1);
        Message::Report(Report::Done { id, weights, metrics: ModelMetrics::default() })
    };
    manager.handle(done(first.id), 2 * HOUR);
    manager.tick(50 * HOUR);
    assert!(jobs.try_recv().is_err(), "its shadow is still being compared");
    ask(&mut manager, |reply| Message::Promote { id: first.id, reply }).unwrap();
    let drift = || Message::Drifted { storage: "file:/a".into(), reason: "hit ratio moved from 0.9 to 0.5".into() };
    manager.handle(drift(), 2 * HOUR + HOUR / 2);
    assert!(jobs.try_recv().is_err(), "too soon after the last");
    manager.handle(drift(), 4 * HOUR);
    let second = jobs.try_recv().unwrap();
    assert_eq!(second.scope, Scope::Global, "the storage has no model of its own");
    assert!(host.store.models().unwrap().last().unwrap().reason.starts_with("drift: hit ratio moved"));
    manager.handle(done(second.id), 4 * HOUR);
    ask(&mut manager, |reply| Message::Promote { id: second.id, reply }).unwrap();
    manager.tick(20 * HOUR);
    assert!(jobs.try_recv().is_err(), "a day has not passed");
    manager.tick(28 * HOUR);
    let third = jobs.try_recv().unwrap();
    let mut off = host.settings;
    off.training = false;
    manager.handle(Message::Settings(off), 28 * HOUR);
    assert!(third.stop.load(Ordering::Relaxed), "switched off, it stops");
}

#[test]
fn a_won_contest_promotes_and_a_lost_one_rejects() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let old = host.champion("global", b"W1");
    let new = host.shadow("global", b"W2");
    let (mut manager, shared, _jobs) = host.manager();
    let pair = Pair { champion: Some(old), shadow: new };
    let decide = |scope: &Scope, pair, losses: &[(f32, f32)]| {
        let decision = shared.watch.lock().losses(scope, pair, losses);
        Message::Decided(decision.unwrap())
    };
    let before = shared.generation.load(Ordering::Relaxed);
    let won = decide(&Scope::Global, pair, &[(3.0, 2.0); 5000]);
    manager.handle(won, HOUR);
    assert_eq!((host.state(new), host.state(old)), (ModelState::Champion, ModelState::Retired));
    let audit = host.store.model_audit(Some(new)).unwrap().pop().unwrap();
    assert!(audit.actor == "contest" && audit.reason.contains("saves 1.000 bits an access"), "{audit:?}");
    assert!(shared.generation.load(Ordering::Relaxed) > before);

    let own = Scope::Storage("file:/a".into());
    let worse = host.shadow(own.key(), b"W3");
    manager.start(HOUR);
    // A storage's first own model is compared with the one for all.
    let pair = Pair { champion: Some(new), shadow: worse };
    let lost = decide(&own, pair, &[(1.0, 2.0); 5000]);
    manager.handle(lost, HOUR);
    assert_eq!((host.state(worse), host.state(new)), (ModelState::Rejected, ModelState::Champion));
    let back = ask(&mut manager, |reply| Message::Rollback { scope: Scope::Global, reply }).unwrap();
    assert_eq!((back.champion, back.before), (Some(old), Some(new)));
    assert_eq!(shared.active.lock().champion("file:/a").map(|loaded| loaded.id), Some(old));
}

#[test]
fn a_verdict_on_a_champion_that_was_replaced_meanwhile_counts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let old = host.champion("global", b"W1");
    let other = host.shadow("global", b"W2");
    host.store.promote_model(other, host.change()).wait().unwrap();
    let new = host.shadow("global", b"W3");
    let (mut manager, shared, _jobs) = host.manager();
    let pair = Pair { champion: Some(other), shadow: new };
    let decision = shared.watch.lock().losses(&Scope::Global, pair, &[(3.0, 2.0); 5000]).unwrap();
    ask(&mut manager, |reply| Message::Promote { id: old, reply }).unwrap();
    manager.handle(Message::Decided(decision), HOUR);
    assert_eq!((host.state(new), host.state(old)), (ModelState::Shadow, ModelState::Champion));
}

#[test]
fn damaged_weights_are_refused_and_what_was_in_use_stays() {
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let good = host.champion("global", b"W1");
    let damaged = host.shadow("global", b"X2");
    let (mut manager, shared, _jobs) = host.manager();
    assert_eq!(host.state(damaged), ModelState::Rejected, "no shadow either");
    let error = ask(&mut manager, |reply| Message::Promote { id: damaged, reply }).unwrap_err();
    assert!(error.to_string().contains("checksum does not fit; the champion stays"), "{error}");
    assert_eq!(host.state(good), ModelState::Champion);

    // Damaged on the disk while it was champion: found at the next start, the one before it takes over.
    let second = host.champion("global", b"X3");
    assert_eq!(host.state(second), ModelState::Champion);
    let (_manager, shared_again, _jobs) = host.manager();
    assert_eq!((host.state(second), host.state(good)), (ModelState::Retired, ModelState::Champion));
    assert_eq!(shared_again.active.lock().champion("file:/a").unwrap().id, good);
    let trouble = shared_again.status.lock().troubles.values().next().cloned().unwrap();
    assert!(trouble.contains(&format!("model {second} of global cannot be used: checksum")), "{trouble}");
    assert_eq!(host.store.model_audit(Some(second)).unwrap().pop().unwrap().actor, "daemon");
    drop(shared);
}

#[test]
fn a_trainer_that_panics_costs_that_training_alone() {
    struct Panics;
    impl Trainer for Panics {
        fn kind(&self) -> &'static str {
            "lstm"
        }
        fn least_tokens(&self) -> u64 {
            1
        }
        fn begin(&self, _: Tokens, _: u64) -> Result<Box<dyn Training>, TrainError> {
            panic!("as asked")
        }
        fn resume(&self, _: Tokens, _: &[u8]) -> Result<Box<dyn Training>, TrainError> {
            panic!("as asked")
        }
        fn check(&self, _: &[u8]) -> Result<(), TrainError> {
            Ok(())
        }
        fn evaluate(&self, _: &[u8], _: Tokens) -> Result<ModelMetrics, TrainError> {
            panic!("as asked")
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let host = Host::open(&folder.path().join("db"));
    let source = host.source.clone();
    let (handle, thread) = ModelsHandle::start(host.store.clone(), Arc::new(Panics), source, host.settings).unwrap();
    for _ in 0..2 {
        let id = block(handle.train(Scope::Global, false)).unwrap().model.unwrap();
        until_trained(&handle, id);
        assert!(handle.show(id).unwrap().model.reason.contains("panicked"));
        let id = host.shadow("global", b"W");
        assert!(matches!(block(handle.evaluate(id)), Err(ModelError::NotPossible(_))));
    }
    handle.stop();
    thread.join().unwrap();
}
