//! The loop: measures, plans, acts, writes down.
//!
//! A turn measures all machines, plans, and sends off what is to be changed; changes run beside the loop, one a machine at a
//! time. A machine whose memory changes has its turn at once, and guests that may run short are looked at twice a second. Every ten
//! turns or so the measurements go into the database, in one transaction. A libvirt that does not answer costs a turn its machines'
//! figures and nothing else.

use super::flow::{Covariates, Found};
use super::gather::{Gathered, recall, retain, settle_pending};
use super::machine::Machine;
use super::order::{NotDone, Result as ActResult};
use super::training::Training;
use super::{HostSettings, Order, State};
use crate::calendar::rfc3339;
use crate::config::{Config, RateLimit};
use crate::learner::run::unix_ms;
use crate::memory::MemoryHandle;
use crate::notify::events::{Amount, Anomaly as AnomalyEvent, Change, Event, Reserved, unit};
use crate::planner::{Kind, Reason};
use crate::store::demand::{self as ledger, Completion, DecisionKind, NewEvent, Outcome};
use crate::store::{Store, StoreError};
use parking_lot::Mutex;
use prestage_integration::api::demand::{Mode, Reservation, Resource, VmPolicy};
use prestage_integration::libvirt::act::Pace;
use prestage_integration::libvirt::stats::{CollectConfig, Collector};
use prestage_integration::libvirt::{Hypervisor, HypervisorEvent, Uuid, VmEventKind};
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, broadcast};

/// Measurements wait so long for their transaction.
const FLUSH: Duration = Duration::from_secs(10);
/// What the database did not take is offered again so often.
pub(super) const AGAIN: Duration = Duration::from_secs(2);
/// What can be done to a machine is asked for anew so often.
const ABILITIES: Duration = Duration::from_secs(60);
/// Old rows are removed so often.
const RETAIN: Duration = Duration::from_secs(600);
/// Machines whose abilities are asked for in one turn.
const ASKED_A_TURN: usize = 4;
/// A turn between two beats comes so long after the one before: twice a second, whatever guests do.
const APART: Duration = Duration::from_millis(500);
/// Names the host's boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What measures, plans and acts, shared with the API.
#[derive(Clone)]
pub(crate) struct Demand {
    pub(crate) state: Arc<Mutex<State>>,
    pub(crate) store: Store,
    pub(crate) hypervisor: Hypervisor,
    /// This host's name, for those who are told.
    host: Arc<str>,
    /// Most bytes of measurements, whatever the configuration says.
    most: u64,
    /// Rung when there is something to tell.
    pub(crate) told: Arc<Notify>,
    /// Rung when a change is over.
    free: Arc<Notify>,
    /// Told which programs run.
    memory: Arc<OnceLock<MemoryHandle>>,
}

impl Demand {
    /// Reads policies and reservations back. Nothing is measured before [`Demand::run`].
    ///
    /// # Errors
    /// The database cannot be read.
    pub(crate) fn new(
        store: Store,
        hypervisor: Hypervisor,
        config: &Config,
        host: &str,
        most: u64,
    ) -> Result<Self, StoreError> {
        let mut state = State::new(settings(config, most));
        state.set_rules(config.demand.risk, config.demand.idle, config.demand.cool_down);
        for row in store.policies()? {
            match (Uuid::parse_str(&row.vm), serde_json::from_str::<VmPolicy>(&row.data)) {
                (Ok(uuid), Ok(policy)) if policy.validate().is_ok() => drop(state.policies.insert(uuid, policy)),
                _ => tracing::warn!(vm = row.vm, "a policy in the database is damaged; the default holds"),
            }
        }
        state.restore_reservations(&store, unix_ms() / 1000)?;
        match std::fs::read_to_string(BOOT_ID) {
            Ok(boot) => state.boot = boot.trim().into(),
            Err(error) => tracing::warn!(path = BOOT_ID, %error, "whether the host was started anew is not known"),
        }
        let demand = Self {
            state: Arc::new(Mutex::new(state)),
            store,
            hypervisor,
            host: host.into(),
            most,
            told: Arc::default(),
            free: Arc::default(),
            memory: Arc::default(),
        };
        demand.restore_executions()?;
        demand.restore_events()?;
        settle_pending(&demand.store)?;
        Ok(demand)
    }

    /// Tells it from now on which programs run, and what is to be done for machines.
    pub(crate) fn tell_memory(&self, memory: &MemoryHandle) {
        for (uuid, policy) in &self.state.lock().policies {
            memory.policy(*uuid, policy.pages, policy.pages_floor);
        }
        // Once, at the start.
        let _ = self.memory.set(memory.clone());
    }

    pub(super) fn memory(&self) -> Option<&MemoryHandle> {
        self.memory.get()
    }

    /// Settings that hold from the next turn on.
    pub(crate) fn set(&self, config: &Config) {
        let mut state = self.state.lock();
        state.settings = settings(config, self.most);
        state.set_rules(config.demand.risk, config.demand.idle, config.demand.cool_down);
    }

    /// Runs until it is dropped.
    pub(crate) async fn run(self, config: Config, training: Option<Training>) {
        let mut collector = Collector::new(self.hypervisor.clone(), CollectConfig::default());
        let mut beat = tokio::time::interval(config.demand.every);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut gathered = Gathered::default();
        let (mut flushed, mut retained) = (Instant::now(), None::<Instant>);
        let (mut asked, mut due) = (HashMap::new(), HashMap::new());
        let mut events = self.hypervisor.events();
        let mut began = Instant::now();
        loop {
            let tight = self.state.lock().is_tight(unix_ms() / 1000);
            tokio::select! {
                _ = beat.tick() => {}
                () = async { tokio::select! { () = stirred(&mut events) => {}, () = self.free.notified() => {} } } => {
                    tokio::time::sleep(APART.saturating_sub(began.elapsed())).await;
                    beat.reset();
                }
                () = tokio::time::sleep(APART), if tight => beat.reset(),
            }
            began = Instant::now();
            let turn = collector.turn().await;
            let now_s = unix_ms() / 1000;
            gathered.take(&turn, now_s);
            let known: Vec<Uuid> = self.state.lock().machines.keys().copied().collect();
            let answered = turn.vms.is_ok();
            let learned = {
                let mut state = self.state.lock();
                state.take(turn, now_s);
                gathered.told(&state, now_s);
                state.turns.last_unix_ms = Some(unix_ms());
                state.occur(now_s)
            };
            if !learned.is_empty() {
                drop(self.store.learn_programs(learned));
            }
            if answered {
                self.settle(now_s).await;
                self.tell_memory_due(&mut due, now_s);
            }
            let orders = {
                let mut state = self.state.lock();
                // Without measurements there is nothing new to decide.
                if answered { state.plan(now_s) } else { Vec::new() }
            };
            let found = std::mem::take(&mut self.state.lock().found);
            if found.iter().any(|(_, found)| found.name() == "drift")
                && let Some(training) = &training
            {
                training.drifted();
            }
            self.tell_anomalies(found);
            self.meet(&known, now_s).await;
            for order in orders {
                self.carry_out(order);
            }
            // One that does not answer would be waited for again and again.
            if answered {
                self.ask_abilities(&mut asked).await;
            }
            if flushed.elapsed() >= FLUSH {
                flushed = Instant::now();
                gathered.flush(&self.store);
            }
            if retained.is_none_or(|at| at.elapsed() >= RETAIN) {
                retained = Some(Instant::now());
                let settings = self.state.lock().settings;
                retain(&self.store, &settings, now_s);
                self.forget_activities();
            }
            self.state.lock().turns.last_took = began.elapsed();
        }
    }

    /// Plans between two turns, when something has changed that measurements do not show.
    pub(super) fn plan_now(&self) {
        let orders = self.state.lock().plan(unix_ms() / 1000);
        orders.into_iter().for_each(|order| self.carry_out(order));
    }

    /// Machines that were not known before get back what is remembered of them.
    async fn meet(&self, known: &[Uuid], now_s: u64) {
        let new: Vec<Uuid> = {
            let state = self.state.lock();
            state.machines.keys().filter(|uuid| !known.contains(uuid)).copied().collect()
        };
        for uuid in new {
            let store = self.store.clone();
            let recalled = tokio::task::spawn_blocking(move || recall(&store, uuid, now_s)).await;
            let mut state = self.state.lock();
            let (Ok(recalled), Some(machine)) = (recalled, state.machines.get_mut(&uuid)) else { continue };
            for (resource, points) in recalled {
                let none = Covariates::default();
                points.into_iter().for_each(|(at_s, most)| machine.flow(resource).recall(at_s, most, &none));
            }
        }
    }

    pub(super) async fn ask_abilities(&self, asked: &mut HashMap<Uuid, Instant>) {
        let due: Vec<Uuid> = {
            let state = self.state.lock();
            asked.retain(|uuid, _| state.machines.contains_key(uuid));
            let old = |machine: &&Machine| {
                machine.abilities.is_none()
                    || machine.has_woken()
                    || asked.get(&machine.uuid).is_none_or(|at| at.elapsed() >= ABILITIES)
            };
            let present = state.machines.values().filter(|machine| machine.sample.is_some());
            // Not again and again for one that cannot be asked.
            let patient = |machine: &&Machine| asked.get(&machine.uuid).is_none_or(|at| at.elapsed() >= FLUSH);
            present.filter(old).filter(patient).map(|machine| machine.uuid).take(ASKED_A_TURN).collect()
        };
        for uuid in due {
            asked.insert(uuid, Instant::now());
            match self.hypervisor.abilities(uuid).await {
                Ok(abilities) => {
                    if let Some(machine) = self.state.lock().machines.get_mut(&uuid) {
                        machine.abilities = Some(abilities);
                    }
                }
                Err(error) => tracing::debug!(vm = %uuid, %error, "what can be done to a machine is not known"),
            }
        }
    }

    /// Writes a decision down and, where the mode says so, does it.
    pub(super) fn carry_out(&self, order: Order) {
        if order.decision.kind == Kind::Hold {
            return;
        }
        let changes = {
            let mut state = self.state.lock();
            // What is half-way there is not refused.
            if order.decision.kind == Kind::Refuse && state.is_busy(&order) {
                return;
            }
            if order.decision.kind == Kind::Raise && order.mode == Mode::Act && state.is_busy(&order) {
                // What takes from it stops, and is followed by this as soon as it has.
                self.hypervisor.break_off(order.uuid);
            }
            state.changes(&order, Instant::now())
        };
        let (at_us, asked) = (unix_ms() * 1000, Instant::now());
        let (pending, why) = match &changes {
            Ok(_) => (true, order.decision.to_string()),
            Err(NotDone::Mode) => (false, order.decision.to_string()),
            // Said before, or nothing to say.
            Err(NotDone::Said) => return,
            Err(NotDone::Nothing) if order.decision.kind != Kind::Refuse => return,
            Err(NotDone::Nothing) => (false, order.decision.to_string()),
            Err(NotDone::Later(reason)) => (false, format!("{}; not now: {reason}", order.decision)),
        };
        let event = self.told(&order, at_us, &why);
        let row = ledger::Decision {
            at_us,
            vm: order.uuid.to_string(),
            resource: resource_of(order.resource),
            mode: mode_of(order.mode),
            kind: kind_of(order.decision.kind),
            before: Some(order.decision.before),
            asked: Some(order.decision.to),
            pending,
            why,
            forecast: order
                .outlook
                .map(|[p05, p50, p90, p95]| json!({ "p05": p05, "p50": p50, "p90": p90, "p95": p95 }).to_string()),
        };
        let recorded = self.store.record_decision(row, event);
        let demand = self.clone();
        tokio::spawn(async move {
            let recorded = recorded.await;
            demand.on_record(&order, changes.is_ok(), &recorded);
            demand.told.notify_one();
            let Ok(changes) = changes else { return };
            if recorded.is_err() {
                // What is not on record is not done: nobody could tell afterwards why.
                return;
            }
            let turn = demand.state.lock().turn_of(order.uuid);
            let result = {
                let _turn = turn.lock().await;
                let mut results = Vec::with_capacity(changes.len());
                for change in changes {
                    results.push(demand.hypervisor.apply(change, Pace::default()).await);
                }
                demand.state.lock().done(&order, &results, Instant::now())
            };
            demand.free.notify_one();
            let took_ms = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
            demand.finish(&order, at_us, took_ms, result).await;
        });
    }

    /// Notes whether a decision is on record; one that is not and was to be carried out is not waited for either.
    fn on_record(&self, order: &Order, acts: bool, recorded: &Result<(), StoreError>) {
        let mut state = self.state.lock();
        match recorded {
            Ok(()) => state.unrecorded.recorded(),
            Err(error) => {
                if acts {
                    state.withdraw(order);
                }
                if state.unrecorded.failed(error.to_string()) {
                    tracing::error!(%error, vm = order.name, "decisions are not on record, and not carried out");
                }
            }
        }
    }

    /// What keeps it from its work, for people.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.state.lock().unrecorded.trouble()
    }

    /// `took_ms`: from the order to what was read back, its wait for other changes of the machine included.
    async fn finish(&self, order: &Order, at_us: u64, took_ms: u64, result: ActResult) {
        let (name, resource, outcome) = (&order.name, order.resource.name(), result.outcome);
        match outcome {
            "done" => {
                tracing::info!(vm = name, resource, got = result.got, took_ms, "{}", order.decision)
            }
            _ => tracing::warn!(vm = name, resource, outcome, why = result.why, "{}", order.decision),
        }
        let verified = outcome == "done" && result.got.is_some();
        let mut change = Change { took_ms: Some(took_ms), ..self.change(order, result.got, verified) };
        if !result.why.is_empty() {
            change.reason = format!("{}; {}", change.reason, result.why);
        }
        let event = match (outcome, order.decision.kind, order.decision.reason) {
            ("done" | "partial", Kind::Lower, _) => Event::Released(change),
            ("done" | "partial", Kind::Raise, Reason::Foreseen) => Event::Prestaged(change),
            ("done" | "partial", ..) => Event::Changed(change),
            _ => Event::Refused(change),
        };
        let event = event.told(&self.host, unix_ms() * 1000);
        let completion = Completion {
            outcome: match outcome {
                "done" => Outcome::Done,
                "partial" => Outcome::Partial,
                _ => Outcome::Failed,
            },
            got: result.got,
            verified,
            took_ms: Some(took_ms),
            why: result.why,
        };
        let key = (order.uuid.to_string(), resource_of(order.resource));
        // The machine was changed: that goes on record however long the database cannot take it.
        let mut said = false;
        loop {
            let finished =
                self.store.finish_decision((&key.0, key.1, at_us), completion.clone(), Some(event.clone())).await;
            match finished {
                Err(error) if error.may_pass() => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(%error, vm = name, "what came of a decision is not on record yet");
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return tracing::warn!(%error, vm = name, "what came of a decision is not on record"),
                Ok(()) => return self.told.notify_one(),
            }
        }
    }

    /// The event of a decision that is not carried out, where somebody is to be told.
    fn told(&self, order: &Order, at_us: u64, why: &str) -> Option<NewEvent> {
        if order.mode == Mode::Observe || order.decision.kind != Kind::Refuse && order.mode != Mode::Recommend {
            return None;
        }
        let mut change = self.change(order, None, false);
        change.reason = why.to_owned();
        let event = match order.decision.kind {
            Kind::Refuse => Event::Refused(change),
            _ => Event::Recommended(change),
        };
        Some(event.told(&self.host, at_us))
    }

    fn change(&self, order: &Order, got: Option<f64>, verified: bool) -> Change {
        let resource = resource_of(order.resource);
        Change {
            vm: order.uuid.to_string(),
            resource: resource.name(),
            unit: unit(resource),
            before: Some(order.decision.before),
            asked: Some(order.decision.to),
            got,
            verified,
            took_ms: None,
            mode: order.mode.name(),
            reason: order.decision.to_string(),
        }
    }

    /// The event of a promise that was made or not.
    pub(crate) fn promise_event(&self, vm: Option<Uuid>, reservation: &Reservation, admitted: bool) -> NewEvent {
        let request = &reservation.request;
        let amounts = [
            (Resource::Cpu, request.vcpus),
            (Resource::Memory, request.memory_bytes as f64),
            (Resource::Disk, request.disk_bytes_per_s),
            (Resource::Network, request.network_bytes_per_s),
        ];
        let amounts = amounts.into_iter().filter(|(_, amount)| *amount > 0.0).map(|(resource, amount)| {
            let resource = resource_of(resource);
            Amount { resource: resource.name(), unit: unit(resource), amount }
        });
        let reserved = Reserved {
            reservation: if admitted { reservation.id.to_string() } else { String::new() },
            vm: vm.map(|vm| vm.to_string()).unwrap_or_default(),
            from: rfc3339(request.from_unix_ms.saturating_mul(1000)),
            to: rfc3339(request.until_unix_ms.saturating_mul(1000)),
            resources: amounts.collect(),
            reason: reservation.why.clone(),
        };
        let event = if admitted { Event::ReservationAdmitted(reserved) } else { Event::ReservationRefused(reserved) };
        event.told(&self.host, unix_ms() * 1000)
    }

    /// Tells of what is unusual; it is on nobody's account.
    fn tell_anomalies(&self, found: Vec<(Uuid, Found)>) {
        for (uuid, found) in found {
            let reason = found.evidence();
            tracing::warn!(vm = %uuid, resource = found.resource.name(), "unusual: {reason}");
            let resource = resource_of(found.resource);
            let event = Event::Anomaly(AnomalyEvent {
                vm: Some(uuid.to_string()),
                metric: resource.name().to_owned(),
                unit: unit(resource).to_owned(),
                value: found.measured,
                low: Some(found.expected.0),
                high: Some(found.expected.1),
                since: rfc3339(found.since_s.saturating_mul(1_000_000)),
                reason,
            });
            drop(self.store.record_event(event.told(&self.host, unix_ms() * 1000)));
        }
    }
}

/// Until something happens to a machine that its memory depends on. May be dropped and called anew without missing anything.
pub(super) async fn stirred(events: &mut broadcast::Receiver<HypervisorEvent>) {
    use VmEventKind::{BalloonChanged, MemoryDeviceResized, Rebooted, Resumed, Started};
    loop {
        match events.recv().await {
            Ok(HypervisorEvent::Vm(event)) => match event.kind {
                BalloonChanged { .. } | MemoryDeviceResized { .. } | Rebooted | Resumed | Started => return,
                _ => {}
            },
            Ok(_) => {}
            Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

fn settings(config: &Config, most: u64) -> HostSettings {
    let rate = |limit: &RateLimit| match limit {
        RateLimit::Unlimited => 0.0,
        RateLimit::BytesPerSecond(bytes) => *bytes as f64,
    };
    HostSettings {
        cpu_overcommit: config.demand.cpu_overcommit,
        memory_reserve: config.demand.host_memory,
        disk_bps: rate(&config.demand.disk_rate),
        network_bps: rate(&config.demand.network_rate),
        series_bytes: config.demand.series_bytes.0.min(most),
        decision_days: config.demand.decision_days,
    }
}

pub(crate) fn resource_of(resource: Resource) -> ledger::Resource {
    match resource {
        Resource::Cpu => ledger::Resource::Cpu,
        Resource::Memory => ledger::Resource::Memory,
        Resource::Disk => ledger::Resource::Disk,
        Resource::Network => ledger::Resource::Network,
    }
}

fn mode_of(mode: Mode) -> ledger::Mode {
    match mode {
        Mode::Observe => ledger::Mode::Observe,
        Mode::Recommend => ledger::Mode::Recommend,
        Mode::Act => ledger::Mode::Act,
    }
}

fn kind_of(kind: Kind) -> DecisionKind {
    match kind {
        Kind::Raise => DecisionKind::Raise,
        Kind::Lower => DecisionKind::Lower,
        Kind::Hold => DecisionKind::Hold,
        Kind::Refuse => DecisionKind::Refuse,
    }
}
