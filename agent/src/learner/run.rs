//! The learner's loop.

use super::history::HistoryBuffer;
use super::journal::Verdict;
use super::model::{Model, micros};
use super::tap::Taps;
use super::threshold::Thresholds;
use super::{HeldProfile, LearnerCounters, LearnerSettings, Message, SavedProfiles};
use crate::models::{ModelsHandle, Signal};
use crate::store::{Pending, Retention, Store};
use prestage_cache::access::{Access, AccessOp};
use prestage_cache::policy::{OutcomeKind, PrefetchRequest};
use prestage_cache::types::{PAGES_PER_BLOCK, PageRange, StorageId};
use prestage_cache::{Cache, StorageHandle};
use prestage_predictor::{Access as Observed, Candidate, Expert, Op, Outcome, Phase};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Accesses observed before the predictors are asked: small, so that a prediction is not late by the batch's length.
const BATCH: usize = 256;
/// Pause between looks while guests are active. Reads that miss wake the learner at once; this bounds how late a
/// prediction from hits can be, and costs a twentieth of a percent of a core.
const ACTIVE_PAUSE: Duration = Duration::from_millis(2);
/// Many storages at once take longer to predict for than one. What is foreseen from hits may be later then, so that serving
/// them has the processor: the pause is so many times as long as the work before it was, up to [`LONG_PAUSE`].
const PAUSE_FOR_WORK: u32 = 16;
const LONG_PAUSE: Duration = Duration::from_millis(10);
/// How often all storages are looked at, those included that nothing has happened to.
const ROUND: Duration = Duration::from_millis(10);
/// Without accesses for this long, guests count as idle and the learner sleeps until it is woken.
const IDLE_AFTER: Duration = Duration::from_millis(100);
/// Longest sleep: timers are looked at this often.
const IDLE_PAUSE: Duration = Duration::from_secs(1);
const RETENTION_INTERVAL: Duration = Duration::from_secs(600);

pub(super) struct Learner {
    cache: Cache,
    store: Store,
    /// Told what tells of drift.
    watch: ModelsHandle,
    settings: LearnerSettings,
    /// Of the models in use that the predictors have.
    generation: u64,
    thresholds: Thresholds,
    counters: Arc<LearnerCounters>,
    models: HashMap<StorageId, Model>,
    /// Storages of each disk, from the top down.
    disks: HashMap<u32, Vec<StorageId>>,
    history: HistoryBuffer,
    taps: Taps,
    /// Accesses that never came here, as last seen.
    dropped: u64,
    candidates: Vec<Candidate>,
    last_access: Duration,
    /// When all storages are looked at next, and when a connection's silence is to be decided about.
    next_round: Duration,
    decide_at: Option<Duration>,
    last_save: Duration,
    last_retention: Option<Duration>,
}

impl Learner {
    pub(super) fn new(
        cache: Cache,
        store: Store,
        watch: ModelsHandle,
        settings: LearnerSettings,
        counters: Arc<LearnerCounters>,
    ) -> Learner {
        let now = cache.now();
        drop(store.cut_runs());
        Learner {
            history: HistoryBuffer::new(now),
            taps: Taps::default(),
            dropped: 0,
            cache,
            store,
            watch,
            settings,
            generation: 0,
            thresholds: Thresholds::default(),
            counters,
            models: HashMap::new(),
            disks: HashMap::new(),
            candidates: Vec::new(),
            last_access: Duration::ZERO,
            next_round: now,
            decide_at: None,
            last_save: now,
            last_retention: None,
        }
    }

    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        self.cache.accesses().consume_here();
        loop {
            loop {
                match messages.try_recv() {
                    Ok(Message::Stop) | Err(TryRecvError::Disconnected) => return self.stop(),
                    Ok(message) => {
                        self.handle(message);
                        self.next_round = Duration::ZERO;
                    }
                    Err(TryRecvError::Empty) => break,
                }
            }
            let began = self.cache.now();
            let taken = self.observe();
            let now = self.cache.now();
            let round = now >= self.next_round || self.decide_at.is_some_and(|at| at <= now);
            if round {
                self.next_round = now + ROUND;
                self.decide_at = self.models.values_mut().filter_map(|model| model.decide(now)).min();
                self.runs(now);
            }
            self.outcomes();
            self.predict(now);
            // What was foreseen is on its way: now there is time for the LSTM.
            self.foretell();
            if round {
                self.housekeeping(now);
            }
            if taken == BATCH {
                continue;
            }
            let idle = now.saturating_sub(self.last_access) > IDLE_AFTER;
            if idle {
                // The window of a learned set moves on with time, not with accesses alone.
                self.models.values_mut().for_each(|model| model.stirred = true);
            }
            let worked = self.cache.now().saturating_sub(began);
            let pause = if idle { IDLE_PAUSE } else { (worked * PAUSE_FOR_WORK).clamp(ACTIVE_PAUSE, LONG_PAUSE) };
            let pause = self.decide_at.map_or(pause, |at| pause.min(at.saturating_sub(now)));
            self.cache.accesses().wait(pause, idle);
        }
    }

    /// Takes a batch of accesses off the queue. Returns how many there were.
    fn observe(&mut self) -> usize {
        let mut taken = 0;
        while taken < BATCH {
            let Some(access) = self.cache.accesses().pop() else { break };
            taken += 1;
            self.last_access = access.at;
            self.taps.push(&access);
            if self.settings.history {
                self.history.push(&access, &self.store);
            }
            if let Some(model) = self.models.get_mut(&access.storage) {
                model.predictor.observe(&observed(&access));
                model.stirred = true;
                model.unheard = true;
                model.dirty = true;
                if access.op == AccessOp::Read {
                    model.hits.push(if access.waits { 0.0 } else { 1.0 });
                }
            }
        }
        let dropped = self.cache.accesses().dropped();
        for model in self.models.values_mut().filter(|model| !model.hits.is_empty()) {
            // Where hits are left out their share says nothing.
            if dropped == self.dropped {
                self.watch.observe(model.handle.identity(), Signal::Hit, &model.hits);
            }
            model.hits.clear();
        }
        self.dropped = dropped;
        self.taps.flush(dropped);
        self.cache.accesses().take_all(!self.taps.is_empty());
        self.counters.accesses.fetch_add(taken as u64, Ordering::Relaxed);
        taken
    }

    /// Keeps which phase each disk's machine is in.
    fn runs(&mut self, now: Duration) {
        if !self.settings.history {
            return;
        }
        for (disk, storages) in &self.disks {
            let top = storages.first().and_then(|storage| self.models.get(storage));
            let phase = top.and_then(|model| model.predictor.running_phase(u64::from(*disk)));
            let phase = phase.map(|(phase, since_us)| (phase, Duration::from_micros(since_us)));
            self.history.phase(*disk, phase, now, &self.store);
        }
    }

    /// Tells the predictors what became of their proposals.
    fn outcomes(&mut self) {
        let (outcomes, lost) = self.cache.take_outcomes();
        let now = micros(self.cache.now());
        if lost > 0 {
            tracing::debug!(lost, "outcomes of prefetches not taken in time");
        }
        for outcome in outcomes {
            let Some(model) = self.models.get_mut(&outcome.storage) else { continue };
            if outcome.kind != OutcomeKind::Left {
                model.journal.settled(&outcome, now);
            }
            if outcome.kind == OutcomeKind::Left {
                for (first, pages) in outcome.pages.runs() {
                    model.predictor.evicted(outcome.block.0 * PAGES_PER_BLOCK + first, pages as u32);
                }
                continue;
            }
            let Some(expert) = Expert::ALL.get(usize::from(outcome.tag)) else { continue };
            for (first, pages) in outcome.pages.runs() {
                model.predictor.outcome(&Outcome {
                    first: outcome.block.0 * PAGES_PER_BLOCK + first,
                    pages: pages as u32,
                    expert: *expert,
                    used: outcome.kind != OutcomeKind::Evicted,
                    late: outcome.kind == OutcomeKind::Late,
                });
            }
        }
    }

    /// Asks the predictors that have seen something and hands over what passes the threshold.
    fn predict(&mut self, now: Duration) {
        for model in self.models.values_mut().filter(|model| model.stirred) {
            model.stirred = false;
            self.candidates.clear();
            let threshold = model.obey(&self.thresholds, self.settings.threshold);
            model.predictor.predict(micros(now), &mut self.candidates);
            let mut requests: Vec<PrefetchRequest> = Vec::new();
            for candidate in &self.candidates {
                let verdict = if !self.settings.prefetch {
                    Verdict::SwitchedOff
                } else if candidate.probability >= threshold {
                    requests.push(request(candidate, now));
                    Verdict::Handed
                } else {
                    Verdict::BelowThreshold
                };
                model.journal.proposed(candidate, threshold, verdict, micros(now));
            }
            self.counters.predictions.fetch_add(requests.len() as u64, Ordering::Relaxed);
            model.journal.refused(self.cache.prefetch(&model.handle, &requests));
        }
    }

    /// Lets the models read what the guests did, and tells what they were worth.
    fn foretell(&mut self) {
        let generation = self.watch.generation();
        let changed = (generation != self.generation).then(|| self.watch.active());
        self.generation = generation;
        for model in self.models.values_mut().filter(|model| model.unheard || changed.is_some()) {
            model.unheard = false;
            if let Some(active) = &changed {
                model.minds.follow(model.handle.identity(), active, &mut model.predictor);
            }
            model.minds.foretell(model.handle.identity(), &mut model.predictor, &self.watch);
        }
    }

    fn handle(&mut self, message: Message) {
        let ram = self.ram_bytes();
        match message {
            Message::AddStorage(handle) => self.add_storage(handle),
            Message::RemoveStorage(id, reply) => {
                if let Some(mut model) = self.models.remove(&id) {
                    self.watch.forget(model.handle.identity());
                    if let Some(pending) = save(&self.store, &mut model)
                        && let Err(error) = pending.1.wait()
                    {
                        tracing::warn!(storage = model.handle.identity(), %error, "profile not saved");
                    }
                }
                let _ = reply.send(());
            }
            Message::AddDisk { disk, storages, vm } => {
                if let Some(model) = storages.first().and_then(|storage| self.models.get(storage)) {
                    self.history.name(disk, model.handle.identity(), &vm);
                }
                self.disks.insert(disk, storages);
            }
            Message::RemoveDisk { disk } => {
                // What the guest did last belongs to it.
                while self.observe() == BATCH {}
                self.taps.end(disk);
                self.history.remove(disk, self.cache.now(), &self.store);
                for id in self.disks.remove(&disk).unwrap_or_default() {
                    if let Some(model) = self.models.get_mut(&id) {
                        model.remove_disk(disk);
                    }
                }
            }
            Message::Event { disk, event, at } => {
                // What the guest did before comes before.
                while self.observe() == BATCH {}
                for id in self.disks.get(&disk).into_iter().flatten() {
                    if let Some(model) = self.models.get_mut(id) {
                        model.event(disk, event, at);
                    }
                }
            }
            Message::Save(reply) => {
                let saved = self.save_all();
                self.history.flush(self.cache.now(), true, &self.store);
                let _ = reply.send(saved);
            }
            Message::Profiles(reply) => {
                let held = self.models.values().map(|model| HeldProfile {
                    storage: model.handle.identity().to_owned(),
                    summary: model.predictor.summary(),
                    refused: model.refused.clone(),
                });
                let _ = reply.send(held.collect());
            }
            Message::Forget(storage, reply) => {
                for model in self.models.values_mut().filter(|model| model.handle.identity() == storage) {
                    model.forget(ram);
                }
                self.gauges();
                let _ = reply.send(());
            }
            Message::Emptied(storage) => {
                for (id, model) in &mut self.models {
                    if storage.is_none_or(|emptied| emptied == *id) {
                        model.predictor.forget_resident();
                    }
                }
            }
            Message::Warm(storage, reply) => {
                let _ = reply.send(self.boot_set(storage));
            }
            Message::Trace(disk, reply) => {
                // What the guest did before is not in it.
                while self.observe() == BATCH {}
                self.cache.accesses().take_all(true);
                let reader = self.taps.add(disk, self.cache.accesses().dropped());
                let _ = reply.send(reader);
            }
            Message::EndTraces => {
                while self.observe() == BATCH {}
                self.taps.end_all();
            }
            Message::Explain(storage, page, reply) => {
                // What is said of the page is of this moment.
                while self.observe() == BATCH {}
                self.outcomes();
                let explained = self.models.get_mut(&storage).map(|model| {
                    let threshold = model.obey(&self.thresholds, self.settings.threshold);
                    model.explain(page, &self.cache, self.settings.prefetch, threshold)
                });
                let _ = reply.send(explained);
            }
            Message::Settings(settings) => self.settings = settings,
            Message::Thresholds(thresholds) => self.thresholds = thresholds,
            // Seen by the loop.
            Message::Stop => {}
        }
    }

    fn ram_bytes(&self) -> u64 {
        u64::from(self.cache.occupancy().slots) * prestage_cache::types::BLOCK_BYTES as u64
    }

    fn add_storage(&mut self, handle: StorageHandle) {
        if let Some(model) = self.models.get_mut(&handle.id()) {
            model.predictor.resize(handle.pages());
            return;
        }
        let saved = self.store.profile(handle.identity()).unwrap_or_else(|error| {
            tracing::warn!(storage = handle.identity(), %error, "saved profile cannot be read; learning anew");
            None
        });
        // The profile's number, which the operator names it by, is there before the first save.
        drop(self.store.add_storage(handle.identity()));
        let mut model = Model::new(handle, saved.as_ref().map(|(_, bytes)| bytes.as_slice()), self.ram_bytes());
        model.minds.follow(model.handle.identity(), &self.watch.active(), &mut model.predictor);
        self.models.insert(model.handle.id(), model);
        self.gauges();
    }

    /// The boot set of a storage without a machine: a copy of the predictor pretends that one starts.
    fn boot_set(&mut self, storage: StorageId) -> Vec<PrefetchRequest> {
        let ram = self.ram_bytes();
        let now = self.cache.now();
        let Some(model) = self.models.get(&storage) else { return Vec::new() };
        let mut pretend = Model::new(model.handle.clone(), Some(&model.predictor.to_bytes()), ram);
        pretend.predictor.phase_start(u64::MAX, Phase::Boot, micros(now));
        let mut candidates = Vec::new();
        pretend.predictor.predict(micros(now), &mut candidates);
        candidates.iter().map(|candidate| request(candidate, now)).collect()
    }

    fn housekeeping(&mut self, now: Duration) {
        self.history.flush(now, false, &self.store);
        if now.saturating_sub(self.last_save) >= self.settings.save_interval {
            self.last_save = now;
            for model in self.models.values_mut() {
                // The store counts a failure and reports itself degraded.
                drop(save(&self.store, model));
            }
            self.gauges();
        }
        if self.last_retention.is_none_or(|last| now.saturating_sub(last) >= RETENTION_INTERVAL) {
            self.last_retention = Some(now);
            let retention = Retention { age: self.settings.retention_age, bytes: self.settings.retention_bytes };
            drop(self.store.retain(retention, unix_ms()));
        }
    }

    fn gauges(&self) {
        self.counters.profiles.store(self.models.len() as u64, Ordering::Relaxed);
        let refused = self.models.values().filter(|model| model.refused.is_some()).count();
        self.counters.refused.store(refused as u64, Ordering::Relaxed);
        let bytes: usize = self.models.values().map(|model| model.memory_bytes()).sum();
        self.counters.memory_bytes.store(bytes as u64, Ordering::Relaxed);
    }

    fn save_all(&mut self) -> Result<SavedProfiles, String> {
        while self.observe() == BATCH {}
        let mut saved = SavedProfiles::default();
        let pending: Vec<_> = self.models.values_mut().filter_map(|model| save(&self.store, model)).collect();
        for (bytes, pending) in pending {
            pending.wait().map_err(|error| error.to_string())?;
            saved.profiles += 1;
            saved.bytes += bytes;
        }
        Ok(saved)
    }

    fn stop(mut self) {
        while self.observe() == BATCH {}
        let now = self.cache.now();
        self.history.flush(now, true, &self.store);
        if let Err(error) = self.save_all() {
            tracing::warn!(error, "profiles not saved");
        }
    }
}

/// Queues a changed profile for saving.
fn save(store: &Store, model: &mut Model) -> Option<(u64, Pending)> {
    if !model.dirty || model.refused.is_some() {
        return None;
    }
    model.dirty = false;
    let bytes = model.predictor.to_bytes();
    let runs = model.predictor.summary().phases.iter().map(|phase| u64::from(phase.runs)).sum();
    let len = bytes.len() as u64;
    Some((len, store.save_profile(model.handle.identity(), bytes, runs, unix_ms())))
}

fn request(candidate: &Candidate, now: Duration) -> PrefetchRequest {
    PrefetchRequest {
        range: PageRange { first: candidate.first, count: u64::from(candidate.pages) },
        due: candidate.due_us.map_or(now, Duration::from_micros),
        probability: candidate.probability,
        tag: candidate.expert.index() as u8,
    }
}

fn observed(access: &Access) -> Observed {
    let range = PageRange::covering(access.offset, u64::from(access.len));
    Observed {
        at_us: micros(access.at),
        vm: u64::from(access.disk),
        op: match access.op {
            AccessOp::Read => Op::Read,
            AccessOp::Write => Op::Write,
            AccessOp::Discard => Op::Discard,
        },
        first: range.first,
        pages: u32::try_from(range.count).unwrap_or(u32::MAX),
    }
}

pub(crate) fn unix_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
