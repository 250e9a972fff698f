//! Demand over the wire: policies, forecasts, what is recommended and decided, reservations, executions, events.
//!
//! - policies: [`VmPolicy`], [`ResourcePolicy`], [`Mode`]
//! - forecasts: [`Forecast`], [`ForecastQuery`]
//! - what the planner says: [`Advice`], [`Decision`]
//! - promises: [`Reservation`], [`ReservationRequest`]
//! - what is known of the future and the present, in `demand/programs.rs`: [`Event`], [`Execution`], [`ExecutionProfile`], [`VmActivity`]
//! - health: [`DemandStatus`], [`WebhookStatus`]
//!
//! Units: CPU in vCPUs (cores), memory in bytes, disk and network in bytes a second.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Reply;

mod programs;

pub use programs::{
    ActivityRequest, ActivityStep, Event, EventList, EventRequest, Execution, ExecutionList, ExecutionProfile,
    ExecutionStart, ExecutionsQuery, Follower, ProfileList, ProfilesQuery, VmActivity,
};

/// Longest name, note or tag.
const TEXT_MAX: usize = 200;
/// Longest horizon of a forecast: a day.
const HORIZON_MAX_S: u32 = 86_400;

/// What a machine can have more or less of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    Cpu,
    Memory,
    Disk,
    Network,
}

impl Resource {
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Disk, Self::Network];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Network => "network",
        }
    }
}

/// What is done about a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Measured and forecast; decisions are recorded, nobody is told.
    #[default]
    Observe,
    /// Decisions are recorded and told to the operator and the VM manager.
    Recommend,
    /// Decisions are carried out.
    Act,
}

impl Mode {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Recommend => "recommend",
            Self::Act => "act",
        }
    }
}

/// Bounds of one resource of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResourcePolicy {
    /// Absent: the machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// Never below; absent: what the machine uses and its margin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Never above; absent: what the machine's definition allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Raised and never lowered.
    #[serde(default)]
    pub never_lower: bool,
}

/// What may be done to a machine. A machine without one has the default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPolicy {
    #[serde(default)]
    pub mode: Mode,
    /// 0 to 100: under shortage a higher one is served first, after everybody's minimum. Default 50.
    #[serde(default = "priority")]
    pub priority: u8,
    /// 1 to 10,000: share among machines of one priority. Default 100.
    #[serde(default = "weight")]
    pub weight: u32,
    /// Kept free above what is used, 0 to 1 of it. Default 0.1.
    #[serde(default = "margin")]
    pub margin: f64,
    /// Swapped pages of its memory: `act` brings them in, else it is only learned which. Absent: as `memory.prestage` in the
    /// daemon's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Mode>,
    /// Share of the memory it uses that stays in memory however idle, 0 to 1. Absent: as `memory.push_floor` in the daemon's
    /// configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_floor: Option<f64>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub resources: BTreeMap<Resource, ResourcePolicy>,
}

fn priority() -> u8 {
    50
}

fn weight() -> u32 {
    100
}

fn margin() -> f64 {
    0.1
}

impl Default for VmPolicy {
    fn default() -> Self {
        Self {
            mode: Mode::Observe,
            priority: priority(),
            weight: weight(),
            margin: margin(),
            pages: None,
            pages_floor: None,
            resources: BTreeMap::new(),
        }
    }
}

impl VmPolicy {
    /// The mode of one resource.
    #[must_use]
    pub fn mode_of(&self, resource: Resource) -> Mode {
        self.resources.get(&resource).and_then(|of| of.mode).unwrap_or(self.mode)
    }

    /// # Errors
    /// Which value is out of range.
    pub fn validate(&self) -> Result<(), String> {
        if self.priority > 100 {
            return Err(format!("`priority` is 0 to 100, not {}", self.priority));
        }
        if !(1..=10_000).contains(&self.weight) {
            return Err(format!("`weight` is 1 to 10000, not {}", self.weight));
        }
        if !(0.0..=1.0).contains(&self.margin) {
            return Err(format!("`margin` is 0 to 1, not {}", self.margin));
        }
        if let Some(floor) = self.pages_floor.filter(|floor| !(0.0..=1.0).contains(floor)) {
            return Err(format!("`pages_floor` is 0 to 1, not {floor}"));
        }
        for (resource, of) in &self.resources {
            let resource = resource.name();
            for (name, bound) in [("min", of.min), ("max", of.max)] {
                if bound.is_some_and(|bound| !(bound.is_finite() && (0.0..=1e18).contains(&bound))) {
                    return Err(format!("`{resource}.{name}` is not a size of at least 0"));
                }
            }
            if let (Some(min), Some(max)) = (of.min, of.max)
                && min > max
            {
                return Err(format!("`{resource}.min` of {min} is above `{resource}.max` of {max}"));
            }
        }
        Ok(())
    }
}

/// A machine's policy and what can be done to the machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmPolicyShown {
    pub uuid: String,
    pub name: String,
    /// Absent of a machine that has the default.
    pub set: bool,
    pub policy: VmPolicy,
    pub abilities: Vec<Ability>,
    /// Bounds that have no effect or cannot be, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// Whether something can be done to a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Ability {
    /// `balloon`, `virtio_mem`, `vcpu_add`, `vcpu_remove`, `guest_agent`, ….
    pub what: String,
    pub possible: bool,
    /// Why not, or what to know.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// Four quantiles, ascending.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Quantiles {
    pub p05: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
}

/// A measured step.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Measured {
    pub at_unix_ms: u64,
    pub mean: f64,
    pub max: f64,
}

/// Which forecast.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ForecastQuery {
    #[serde(default = "memory")]
    #[param(inline)]
    pub resource: Resource,
    /// Seconds, 60 to 86,400. Default 3600.
    #[serde(default = "hour")]
    pub horizon_s: u32,
}

fn memory() -> Resource {
    Resource::Memory
}

fn hour() -> u32 {
    3600
}

impl ForecastQuery {
    /// # Errors
    /// The horizon is out of range.
    pub fn validate(&self) -> Result<(), String> {
        match (60..=HORIZON_MAX_S).contains(&self.horizon_s) {
            true => Ok(()),
            false => Err(format!("`horizon_s` is 60 to {HORIZON_MAX_S}, not {}", self.horizon_s)),
        }
    }
}

/// What a machine is expected to use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Forecast {
    pub uuid: String,
    pub name: String,
    pub resource: Resource,
    /// Of the last measurement.
    pub at_unix_ms: u64,
    pub step_s: u32,
    pub steps: Vec<Quantiles>,
    /// Of the maximum over all steps.
    pub peak: Quantiles,
    /// More was expected than ten times what was ever seen; it is cut there.
    pub capped: bool,
    /// What it rests on, in words.
    pub basis: String,
    /// What the machine has now, where that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated: Option<f64>,
    /// What was measured before, oldest first, in steps of the same length.
    pub measured: Vec<Measured>,
}

/// What the planner would do to a machine now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Advice {
    pub uuid: String,
    pub name: String,
    pub resource: Resource,
    pub mode: Mode,
    /// `raise`, `lower`, `hold` or `refuse`.
    pub kind: String,
    pub now: f64,
    pub to: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<f64>,
    /// Of the maximum until a change would take effect and for the time after that it is planned for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<Quantiles>,
    pub why: String,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct AdviceList {
    pub recommendations: Vec<Advice>,
    /// Machines that nothing can be said of yet, and why.
    pub left_out: Vec<LeftOut>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    pub name: String,
    pub reason: String,
}

/// Which decisions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DecisionsQuery {
    /// Name or UUID of a machine; default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Only those older than this one's id: for the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
    /// 1 to 1000. Default 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// What was decided and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    pub id: i64,
    pub at_unix_ms: u64,
    pub uuid: String,
    pub name: String,
    pub resource: Resource,
    pub mode: Mode,
    /// `raise`, `lower` or `refuse`.
    pub kind: String,
    pub before: f64,
    pub asked: f64,
    /// Read back afterwards; absent when nothing was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub got: Option<f64>,
    /// `not_acted`, `done`, `partial`, `failed` or `impossible`.
    pub outcome: String,
    /// From the decision to what was read back; absent where nothing was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    pub why: String,
}

/// Latest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct DecisionList {
    pub decisions: Vec<Decision>,
    /// There are older ones: ask again with `before` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
}

/// Asks for a promise: so much for a time window.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReservationRequest {
    /// Name or UUID of a machine; absent: for one that is to come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    #[serde(default)]
    pub vcpus: f64,
    #[serde(default)]
    pub memory_bytes: u64,
    #[serde(default)]
    pub disk_bytes_per_s: f64,
    #[serde(default)]
    pub network_bytes_per_s: f64,
    pub from_unix_ms: u64,
    pub until_unix_ms: u64,
    /// 0 to 100. Default 50.
    #[serde(default = "priority")]
    pub priority: u8,
    /// Shown with it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

impl ReservationRequest {
    /// # Errors
    /// What does not fit together.
    pub fn validate(&self) -> Result<(), String> {
        let rates = [self.vcpus, self.disk_bytes_per_s, self.network_bytes_per_s];
        if !rates.iter().all(|rate| rate.is_finite() && (0.0..=1e15).contains(rate)) {
            return Err("an amount is not a number of at least 0".to_owned());
        }
        if self.memory_bytes == 0 && rates.iter().all(|rate| *rate == 0.0) {
            return Err("nothing is asked for: give vcpus, memory, disk or network".to_owned());
        }
        if self.until_unix_ms <= self.from_unix_ms {
            return Err("it ends before it begins".to_owned());
        }
        if self.priority > 100 {
            return Err(format!("`priority` is 0 to 100, not {}", self.priority));
        }
        text("note", &self.note)
    }
}

/// A promise.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Reservation {
    pub id: i64,
    #[serde(flatten)]
    pub request: ReservationRequest,
    /// `waiting`, `running`, `over`, `cancelled`.
    pub state: String,
    /// What the admission rests on.
    pub why: String,
    /// Why nothing is changed in its machine although the room is kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ReservationList {
    pub reservations: Vec<Reservation>,
}

/// Whether demand is measured, and what that costs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct DemandStatus {
    pub enabled: bool,
    /// Machines in the last round.
    pub machines: u32,
    pub interval_ms: u64,
    /// Of the last round, when it began and what it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_unix_ms: Option<u64>,
    pub last_took_us: u64,
    /// Rounds that failed or were left out because libvirt did not answer.
    pub missed_rounds: u64,
    pub host_cpus: u32,
    pub host_memory_bytes: u64,
    pub host_available_bytes: u64,
    /// Share of the last 10 s in which some task waited; absent where the kernel does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_cpu_pressure: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_memory_pressure: Option<f64>,
    pub series_bytes: u64,
    /// What this hypervisor or host does not offer.
    pub notes: Vec<String>,
    /// What is unusual now.
    pub anomalies: Vec<Anomaly>,
}

/// Use that does not fit this machine at this hour. Told, never acted on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Anomaly {
    pub uuid: String,
    pub name: String,
    pub resource: Resource,
    /// `leak`, `runaway`, `unusual`.
    pub kind: String,
    pub since_unix_ms: u64,
    pub measured: f64,
    pub expected: Quantiles,
    pub evidence: String,
}

/// Where a VM manager is told, and how that goes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct WebhookStatus {
    pub url: String,
    pub waiting: u64,
    /// Given up.
    pub dead: u64,
    /// When the oldest that waits happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_unix_ms: Option<u64>,
    /// Of the oldest that waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct WebhookList {
    pub webhooks: Vec<WebhookStatus>,
}

fn text(name: &str, text: &str) -> Result<(), String> {
    if text.len() > TEXT_MAX {
        return Err(format!("`{name}` is longer than {TEXT_MAX} bytes"));
    }
    match text.chars().any(char::is_control) {
        true => Err(format!("`{name}` holds a control character")),
        false => Ok(()),
    }
}

/// The daemon's view of demand, as the API sees it. `vm` is a name or UUID everywhere.
///
/// Errors of all: `Unavailable` (demand is switched off), `NotFound` (machine or id).
pub trait DemandControl {
    fn demand(&self) -> Reply<'_, DemandStatus>;
    fn policy(&self, vm: String) -> Reply<'_, VmPolicyShown>;
    /// Errors: `InvalidRequest` (a minimum above what the machine can have at most).
    fn policy_set(&self, vm: String, policy: VmPolicy) -> Reply<'_, VmPolicyShown>;
    /// Back to the default.
    fn policy_remove(&self, vm: String) -> Reply<'_, ()>;
    /// Errors: `NotPossible` (too little was measured).
    fn forecast(&self, vm: String, query: ForecastQuery) -> Reply<'_, Forecast>;
    fn recommendations(&self, vm: Option<String>) -> Reply<'_, AdviceList>;
    fn decisions(&self, query: DecisionsQuery) -> Reply<'_, DecisionList>;
    fn reservations(&self) -> Reply<'_, ReservationList>;
    /// Errors: `NotPossible` (it does not fit, with what is missing; over already; more than the machine can have).
    fn reservation_add(&self, request: ReservationRequest) -> Reply<'_, Reservation>;
    fn reservation_cancel(&self, id: i64) -> Reply<'_, ()>;
    fn executions(&self, query: ExecutionsQuery) -> Reply<'_, ExecutionList>;
    /// What is known of programs and events.
    fn execution_profiles(&self, query: ProfilesQuery) -> Reply<'_, ProfileList>;
    /// Errors: `NotPossible` (the machine does not run).
    fn execution_start(&self, request: ExecutionStart) -> Reply<'_, Execution>;
    fn execution_end(&self, id: i64) -> Reply<'_, Execution>;
    fn events(&self) -> Reply<'_, EventList>;
    /// Errors: `InvalidRequest` (the schedule cannot be read, or never comes).
    fn event_add(&self, request: EventRequest) -> Reply<'_, Event>;
    fn event_remove(&self, id: i64) -> Reply<'_, ()>;
    fn activity(&self, vm: String) -> Reply<'_, VmActivity>;
    /// Errors: `InvalidRequest` (over already, or too far ahead), `NoSpace` (too much is announced).
    fn activity_set(&self, vm: String, request: ActivityRequest) -> Reply<'_, VmActivity>;
    fn webhooks(&self) -> Reply<'_, WebhookList>;
}

#[cfg(test)]
mod tests;
