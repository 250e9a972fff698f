//! Demand: measured, forecast, planned, and acted on through libvirt.
//!
//! - `flow.rs`: one machine's use of one resource, from samples to what is to be expected
//! - `course.rs`: what a program used in the course of its earlier executions; `profile.rs`: that, when it runs and what follows it;
//!   `catalogue.rs`: of all programs and events
//! - `machine.rs`: a machine's book; `foreseen.rs`: what runs in it, usually follows or is to come
//! - `executions.rs`: programs that run; `events.rs`, `calendar.rs`: events that are to come; `activity.rs`: what users do
//! - [`State`]: all machines, the host, what is promised and what was decided; sans-I/O
//! - `order.rs`: from a decision to a change that libvirt can make
//! - `promises.rs`: resources promised for a time; `limits.rs`: what a machine can have at most, whatever is promised or set
//! - `run.rs`: the loop that measures, plans, acts and writes down; `gather.rs`: what it writes; `training.rs`: the network of the
//!   forecasts
//!
//! Time comes in with each turn. The state is locked for a turn's arithmetic and for an answer, never across a call to libvirt or
//! the database.

mod activity;
mod calendar;
pub(crate) mod catalogue;
mod course;
mod events;
mod executions;
pub(crate) mod flow;
mod foreseen;
pub(crate) mod gather;
mod limits;
pub(crate) mod machine;
pub(crate) mod order;
pub(crate) mod profile;
#[cfg(test)]
mod programs_tests;
mod promises;
pub(crate) mod run;
#[cfg(test)]
mod tests;
mod training;

use crate::planner::{self, Amounts, Host, Input, Planner, Reservations};
use activity::Activity;
use calendar::Calendar;
use catalogue::Catalogue;
use executions::Executions;
use flow::{Covariates, Found};
use foreseen::Upcoming;
use machine::{Machine, planned};
use prestage_integration::api::demand::{Anomaly, LeftOut, Mode, Quantiles, ReservationRequest, Resource, VmPolicy};
use prestage_integration::libvirt::Uuid;
use prestage_integration::libvirt::act::{Backoff, Kind, Latencies};
use prestage_integration::libvirt::stats::{HostSample, Turn};
use prestage_predictor::demand::{Forecast, Weights};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Forgotten so long after it was seen last: a machine that is stopped overnight keeps its book.
const FORGET_S: u64 = 7 * 86_400;
/// A machine that was not measured for so long is not planned for.
const GONE_S: u64 = 10;
/// Horizon before any change was timed: a balloon gives back within seconds, a vCPU comes within one.
const HORIZON_S: u32 = 20;
/// Added to how long a change takes: a plan's turn, and what forecasts of 10 s blur.
const HORIZON_MORE_S: u32 = 20;

/// What of the host is for machines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct HostSettings {
    /// vCPUs for each CPU of the host.
    pub(crate) cpu_overcommit: f64,
    /// Share of the memory that the host keeps.
    pub(crate) memory_reserve: f64,
    /// Bytes a second of all machines together; 0: not managed.
    pub(crate) disk_bps: f64,
    pub(crate) network_bps: f64,
    /// Most of measurements, and how long decisions are kept.
    pub(crate) series_bytes: u64,
    pub(crate) decision_days: u32,
}

#[cfg(test)]
impl HostSettings {
    /// Of a host whose disks and network are not managed, for tests.
    fn plain() -> Self {
        Self {
            cpu_overcommit: 1.0,
            memory_reserve: 0.0,
            disk_bps: 0.0,
            network_bps: 0.0,
            series_bytes: 0,
            decision_days: 1,
        }
    }
}

/// How a turn went.
#[derive(Debug, Clone, Default)]
pub(crate) struct Turns {
    pub(crate) last_unix_ms: Option<u64>,
    pub(crate) last_took: Duration,
    pub(crate) missed: u64,
    pub(crate) machines: u32,
    pub(crate) trouble: Option<String>,
}

/// Decisions that could not be put on record, since the last one that could; what is not on record is not done.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unrecorded {
    count: u64,
    why: String,
}

impl Unrecorded {
    /// Whether this is another reason than the last time: said once, not with every turn.
    pub(crate) fn failed(&mut self, why: String) -> bool {
        self.count += 1;
        let new = self.why != why;
        self.why = why;
        new
    }

    pub(crate) fn recorded(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        let Self { count, why } = self;
        (*count > 0).then(|| format!("{count} decisions are not on record and were not carried out: {why}"))
    }
}

/// A decision on its way out.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) decision: planner::Decision,
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    pub(crate) resource: Resource,
    pub(crate) mode: Mode,
    pub(crate) outlook: Option<[f64; 4]>,
}

/// What is known of the time to come of a machine.
#[derive(Debug, Default)]
pub(crate) struct Ahead<'a> {
    pub(crate) covariates: Covariates,
    pub(crate) upcoming: Vec<Upcoming<'a>>,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) machines: BTreeMap<Uuid, Machine>,
    /// Policies of machines, whether they are here or not.
    pub(crate) policies: HashMap<Uuid, VmPolicy>,
    pub(crate) reservations: Reservations,
    /// What was asked for, by the number of the promise.
    pub(crate) asked: BTreeMap<u64, ReservationRequest>,
    pub(crate) calendar: Calendar,
    /// What users do, by machine.
    activities: HashMap<Uuid, Activity>,
    catalogue: Catalogue,
    executions: Executions,
    /// The host's boot: numbers of instances are of it.
    pub(crate) boot: Arc<str>,
    planner: Planner,
    pub(crate) host: HostSample,
    pub(crate) settings: HostSettings,
    pub(crate) latencies: Latencies,
    pub(crate) turns: Turns,
    pub(crate) unrecorded: Unrecorded,
    pub(crate) model: Option<Arc<Weights>>,
    /// Changes under way, and when to try again what failed.
    busy: HashSet<(Uuid, Resource)>,
    /// One change of a machine at a time: the others wait their turn.
    turns_of: HashMap<Uuid, Arc<tokio::sync::Mutex<()>>>,
    /// By whether it was raised: what cannot be taken can be given.
    backoffs: HashMap<(Uuid, Resource, bool), Backoff>,
    /// What was said last of a decision that is put off: its kind, why, and when.
    put_off: HashMap<(Uuid, Resource), (planner::Kind, String, Instant)>,
    left_out: Vec<LeftOut>,
    /// What has become unusual since it was told last.
    pub(crate) found: Vec<(Uuid, Found)>,
}

impl State {
    pub(crate) fn new(settings: HostSettings) -> Self {
        let mut rules = planner::Settings::default();
        // Guests get whole vCPUs.
        rules.rules[planner::Resource::Cpu as usize].grain = 1.0;
        Self {
            machines: BTreeMap::new(),
            policies: HashMap::new(),
            reservations: Reservations::new(),
            asked: BTreeMap::new(),
            calendar: Calendar::default(),
            activities: HashMap::new(),
            catalogue: Catalogue::default(),
            executions: Executions::default(),
            boot: "".into(),
            planner: Planner::new(rules),
            host: HostSample::default(),
            settings,
            latencies: Latencies::default(),
            turns: Turns::default(),
            unrecorded: Unrecorded::default(),
            model: None,
            busy: HashSet::new(),
            turns_of: HashMap::new(),
            backoffs: HashMap::new(),
            put_off: HashMap::new(),
            left_out: Vec::new(),
            found: Vec::new(),
        }
    }

    /// Takes in what was measured.
    pub(crate) fn take(&mut self, turn: Turn, now_s: u64) {
        self.host = turn.host;
        let samples = match turn.vms {
            Ok(samples) => samples,
            Err(error) => {
                self.turns.missed += 1;
                self.turns.trouble = Some(error.to_string());
                return;
            }
        };
        self.turns.trouble = None;
        self.turns.machines = u32::try_from(samples.len()).unwrap_or(u32::MAX);
        for sample in samples {
            let uuid = sample.vm.uuid;
            let machine = self.machines.entry(uuid).or_insert_with(|| {
                let mut machine = Machine::new(uuid, sample.vm.name.clone());
                Resource::ALL.into_iter().for_each(|resource| machine.flow(resource).set_model(self.model.clone()));
                if let Some(policy) = self.policies.get(&uuid) {
                    (machine.policy, machine.own_policy) = (policy.clone(), true);
                }
                machine
            });
            let (calendar, activity) = (&self.calendar, self.activities.get(&uuid));
            let covariates =
                |origin_s| covariates(calendar, activity, uuid, origin_s, flow::COARSE_S, flow::REHEARSED_S);
            self.found.extend(machine.observe(sample, now_s, &covariates).into_iter().map(|found| (uuid, found)));
        }
        let (latencies, turns_of) = (&mut self.latencies, &mut self.turns_of);
        self.machines.retain(|uuid, machine| {
            let keep = now_s.abs_diff(machine.seen_s) <= FORGET_S;
            if !keep {
                latencies.forget(*uuid);
                turns_of.remove(uuid);
            }
            keep
        });
        let machines = &self.machines;
        self.backoffs.retain(|(uuid, ..), _| machines.contains_key(uuid));
        self.put_off.retain(|(uuid, _), _| machines.contains_key(uuid));
        self.activities.retain(|uuid, activity| machines.contains_key(uuid) || !activity.is_over(now_s));
    }

    /// What the host has for machines.
    pub(crate) fn capacity(&self) -> Amounts {
        let cores = f64::from(self.host.cpus) * self.settings.cpu_overcommit;
        let memory = self.host.memory_bytes as f64 * (1.0 - self.settings.memory_reserve);
        Amounts([cores, memory, self.settings.disk_bps, self.settings.network_bps])
    }

    /// How far ahead a machine's changes must be decided: as long as they took, and a little.
    pub(crate) fn horizon_s(&self, uuid: Uuid) -> u32 {
        let times = [Kind::Balloon, Kind::MemoryDevice, Kind::Vcpus]
            .into_iter()
            .filter_map(|kind| self.latencies.quantile(uuid, kind, true, 0.9));
        let most = times.max().map_or(HORIZON_S, |most| u32::try_from(most.as_secs()).unwrap_or(u32::MAX) + 1);
        most.clamp(1, 600) + HORIZON_MORE_S
    }

    /// Decides.
    pub(crate) fn plan(&mut self, now_s: u64) -> Vec<Order> {
        let mut planner = std::mem::take(&mut self.planner);
        let orders = self.plan_by(&mut planner, now_s);
        self.planner = planner;
        orders
    }

    /// Why nothing can be said of any machine: none was measured. `None` where some were, or there are none.
    pub(crate) fn blind(&self, now_s: u64) -> Option<String> {
        if self.machines.values().any(|machine| machine.is_here(now_s)) {
            return None;
        }
        match (&self.turns.trouble, self.turns.last_unix_ms) {
            (Some(trouble), _) => Some(format!("no machine is measured: libvirt: {trouble}")),
            (None, None) => Some("no machine is measured yet; ask again in a moment".to_owned()),
            (None, Some(_)) => None,
        }
    }

    /// What would be decided now, without a decision.
    pub(crate) fn weigh(&mut self, now_s: u64) -> Vec<Order> {
        let mut planner = self.planner.clone();
        let settings = planner::Settings { repeat_s: 0, ..*planner.settings() };
        planner.set_settings(settings);
        self.plan_by(&mut planner, now_s)
    }

    fn plan_by(&mut self, planner: &mut Planner, now_s: u64) -> Vec<Order> {
        let mut vms = Vec::with_capacity(self.machines.len());
        let mut left_out = Vec::new();
        let horizons: HashMap<Uuid, u32> = self.machines.keys().map(|uuid| (*uuid, self.horizon_s(*uuid))).collect();
        let events = self.calendar.of_all(now_s, flow::COARSE_S, flow::COARSE_AHEAD_S);
        for machine in self.machines.values_mut() {
            if !machine.is_here(now_s) {
                continue;
            }
            let horizon_s = horizons.get(&machine.uuid).copied().unwrap_or(HORIZON_S);
            let event = self.calendar.with_own(events.clone(), machine.uuid, now_s, flow::COARSE_S);
            let activity = self.activities.get(&machine.uuid);
            let span = (flow::COARSE_S, flow::COARSE_AHEAD_S);
            let ahead = ahead(&self.calendar, event, activity, &self.catalogue, machine.uuid, now_s, span);
            let (vm, reasons) = machine.planned(now_s, horizon_s, &ahead);
            if let Some(reason) = reasons[machine::index(Resource::Memory)].or(reasons[machine::index(Resource::Cpu)]) {
                left_out.push(LeftOut { name: machine.name.clone(), reason: reason.to_owned() });
            }
            vms.push(vm);
        }
        self.left_out = left_out;
        let pressure = |resource: Resource| self.host_pressure(resource);
        let host = Host { capacity: self.capacity(), pressure: Resource::ALL.map(pressure) };
        let input = Input { now_s, host: &host, vms: &vms, reservations: &self.reservations };
        let decisions = planner.plan(&input);
        let mut orders: Vec<Order> =
            decisions.into_iter().filter_map(|decision| self.order(decision, now_s, &events)).collect();
        // Room is made before it is given away.
        orders.sort_by_key(|order| order.decision.kind != planner::Kind::Lower);
        orders
    }

    fn order(&mut self, decision: planner::Decision, now_s: u64, events: &[f32]) -> Option<Order> {
        let uuid = Uuid::from_u128(decision.vm.0);
        let resource = Resource::ALL.into_iter().find(|resource| planned(*resource) == decision.resource)?;
        let horizon_s = self.horizon_s(uuid);
        let event = self.calendar.with_own(events.to_vec(), uuid, now_s, flow::COARSE_S);
        let (activity, span) = (self.activities.get(&uuid), (flow::COARSE_S, flow::COARSE_AHEAD_S));
        let ahead = ahead(&self.calendar, event, activity, &self.catalogue, uuid, now_s, span);
        let machine = self.machines.get_mut(&uuid)?;
        let outlook = machine.outlook(resource, now_s, horizon_s, &ahead);
        let (name, mode) = (machine.name.clone(), machine.policy.mode_of(resource));
        Some(Order { decision, uuid, name, resource, mode, outlook })
    }

    /// Whether a guest may run short before the next beat.
    pub(crate) fn is_tight(&self, now_s: u64) -> bool {
        self.machines.values().any(|machine| machine.is_here(now_s) && machine.is_tight())
    }

    /// A forecast for people, and what it rests on besides what was measured. `None`: too little was measured.
    pub(crate) fn forecast(
        &mut self,
        uuid: Uuid,
        resource: Resource,
        now_s: u64,
        horizon_s: u32,
    ) -> Option<(Forecast, Vec<String>)> {
        let machine = self.machines.get_mut(&uuid)?;
        let span = (machine.flow(resource).step_s(horizon_s), horizon_s);
        let activity = self.activities.get(&uuid);
        let event = self.calendar.shares(uuid, now_s, span.0, span.1);
        let ahead = ahead(&self.calendar, event, activity, &self.catalogue, uuid, now_s, span);
        let mut words = machine.foreseen.words(now_s);
        if !ahead.upcoming.is_empty() {
            words.push("an event comes that has come before".to_owned());
        }
        let forecast = machine.forecast(resource, now_s, horizon_s, &ahead)?;
        Some((forecast, words))
    }

    fn host_pressure(&self, resource: Resource) -> planner::Pressure {
        let Some(host) = &self.host.pressure else { return planner::Pressure::default() };
        let stall = match resource {
            Resource::Cpu => host.cpu.as_ref(),
            Resource::Memory => host.memory.as_ref(),
            Resource::Disk => host.io.as_ref(),
            Resource::Network => None,
        };
        stall.map_or(planner::Pressure::default(), |stall| planner::Pressure {
            some: stall.some.avg10,
            full: stall.full.as_ref().map_or(0.0, |full| full.avg10),
        })
    }

    /// Probability with which a machine may need more than it is given for what is foreseen; how long it must have used less
    /// before something is taken, and how long after a change.
    pub(crate) fn set_rules(&mut self, risk: f64, idle: Duration, cool_down: Duration) {
        let mut settings = planner::Settings { risk, ..*self.planner.settings() };
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX).max(1);
        for rule in &mut settings.rules {
            (rule.window_s, rule.cool_down_s) = (seconds(idle), seconds(cool_down));
        }
        self.planner.set_settings(settings);
    }

    /// What is unusual now.
    pub(crate) fn anomalies(&self) -> Vec<Anomaly> {
        let of = |machine: &Machine, found: Found| Anomaly {
            uuid: machine.uuid.to_string(),
            name: machine.name.clone(),
            resource: found.resource,
            kind: found.name().to_owned(),
            since_unix_ms: found.since_s * 1000,
            measured: found.measured,
            expected: Quantiles { p05: found.expected.0, p95: found.expected.1, ..Quantiles::default() },
            evidence: found.evidence(),
        };
        self.machines.values().flat_map(|machine| machine.unusual().map(|found| of(machine, found))).collect()
    }

    /// The model that forecasts rest on from now on.
    pub(crate) fn set_model(&mut self, model: Option<Arc<Weights>>) {
        for machine in self.machines.values_mut() {
            Resource::ALL.into_iter().for_each(|resource| machine.flow(resource).set_model(model.clone()));
        }
        self.model = model;
    }

    /// Machines that nothing can be said of, and why.
    pub(crate) fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// What is known of programs and events.
    pub(crate) fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// By name or UUID.
    pub(crate) fn find(&self, vm: &str) -> Option<Uuid> {
        match Uuid::parse_str(vm) {
            Ok(uuid) if self.machines.contains_key(&uuid) => Some(uuid),
            _ => self.machines.values().find(|machine| machine.name == vm).map(|machine| machine.uuid),
        }
    }

    /// Sets or, with `None`, unsets a machine's policy.
    pub(crate) fn set_policy(&mut self, uuid: Uuid, policy: Option<VmPolicy>) {
        let own = policy.is_some();
        match &policy {
            Some(policy) => drop(self.policies.insert(uuid, policy.clone())),
            None => drop(self.policies.remove(&uuid)),
        }
        if let Some(machine) = self.machines.get_mut(&uuid) {
            (machine.policy, machine.own_policy) = (policy.unwrap_or_default(), own);
            self.backoffs.retain(|(of, ..), _| *of != uuid);
            self.put_off.retain(|(of, _), _| *of != uuid);
        }
    }
}

fn covariates(
    calendar: &Calendar,
    activity: Option<&Activity>,
    uuid: Uuid,
    origin_s: u64,
    step_s: u32,
    horizon_s: u32,
) -> Covariates {
    let event = calendar.shares(uuid, origin_s, step_s, horizon_s);
    with_activity(event, activity, origin_s, step_s, horizon_s)
}

fn with_activity(
    event: Vec<f32>,
    activity: Option<&Activity>,
    origin_s: u64,
    step_s: u32,
    horizon_s: u32,
) -> Covariates {
    let activity = activity.map(|activity| activity.shares(origin_s, step_s, horizon_s)).unwrap_or_default();
    Covariates { event, activity }
}

/// `event`: what [`Calendar::shares`] says for the span, which is step and horizon in seconds.
fn ahead<'a>(
    calendar: &Calendar,
    event: Vec<f32>,
    activity: Option<&Activity>,
    catalogue: &'a Catalogue,
    uuid: Uuid,
    now_s: u64,
    (step_s, horizon_s): (u32, u32),
) -> Ahead<'a> {
    let upcoming = calendar.upcoming(uuid, now_s, horizon_s).into_iter().filter_map(|(name, begins_s)| {
        let courses = catalogue.event(&profile::event_key(name, uuid))?;
        Some(Upcoming { begins_s, courses })
    });
    Ahead { upcoming: upcoming.collect(), covariates: with_activity(event, activity, now_s, step_s, horizon_s) }
}
