//! What a round of planning is told.

use super::{Amounts, Reservations, Resource, VmId};
use serde::{Deserialize, Serialize};

/// One round's view of the host. Machines in any order, each once; of one given twice the last counts.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// Unix seconds. One that is earlier than the round's before counts as the same; if by more than a minute, the clock was set back and
    /// what is remembered of machines begins anew.
    pub now_s: u64,
    pub host: &'a Host,
    pub vms: &'a [Vm],
    pub reservations: &'a Reservations,
}

/// What there is to give.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Host {
    /// For machines, what the host itself needs taken off. 0: this resource is not managed.
    pub capacity: Amounts,
    /// Of the whole host. Once it waits for memory ([`super::Rule::pressure`]), none is given for what is foreseen, and what is idle is
    /// taken without waiting for the cool-down.
    pub pressure: [Pressure; 4],
}

/// Pressure stall information: the share of the last 10 s in which work waited (`avg10`), 0 to 1. Disk's is that of
/// `io`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pressure {
    /// Some task waited.
    pub some: f64,
    /// All of them did.
    pub full: f64,
}

/// How far a decision about a machine goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Written down only.
    #[default]
    Observe,
    /// Told to the VM manager.
    Recommend,
    /// Carried out.
    Act,
}

/// What the operator has said about a machine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Its guaranteed floor: never given less.
    pub min: Amounts,
    /// Never given more.
    pub max: Amounts,
    /// Higher ones first, above everybody's floor.
    pub priority: u8,
    /// Among machines of one priority; above 0.
    pub weight: f64,
    /// By [`Resource`].
    pub mode: [Mode; 4],
    /// Resources that only ever grow.
    pub never_lower: [bool; 4],
    /// Least that is kept free above what is in use, as a share of it; otherwise the rule's.
    pub margin: [Option<f64>; 4],
}

impl Policy {
    /// Anything between nothing and `max`, priority 0, weight 1, observed only.
    #[must_use]
    pub const fn up_to(max: Amounts) -> Self {
        Self {
            min: Amounts::all(0.0),
            max,
            priority: 0,
            weight: 1.0,
            mode: [Mode::Observe; 4],
            never_lower: [false; 4],
            margin: [None; 4],
        }
    }
}

/// By which means a machine can be given more or less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// What is not here is surely missing. Else nothing is refused, nor told, for want of it.
    pub known: bool,
    /// A balloon whose driver answers.
    pub balloon: bool,
    pub virtio_mem: bool,
    /// vCPUs can be plugged in.
    pub vcpu_add: bool,
    /// And out again.
    pub vcpu_remove: bool,
    /// The guest agent is connected: it onlines what is plugged in.
    pub agent: bool,
    /// The scheduler can be told a quota: fractions of cores, both ways, without the guest's help.
    pub cpu_quota: bool,
    pub disk_limit: bool,
    pub network_limit: bool,
}

impl Abilities {
    /// All there are.
    pub const ALL: Self = Self {
        known: true,
        balloon: true,
        virtio_mem: true,
        vcpu_add: true,
        vcpu_remove: true,
        agent: true,
        cpu_quota: true,
        disk_limit: true,
        network_limit: true,
    };

    /// What is missing for giving more, in words.
    #[must_use]
    pub const fn missing_to_raise(&self, resource: Resource) -> Option<&'static str> {
        match resource {
            Resource::Cpu if self.cpu_quota || (self.vcpu_add && self.agent) => None,
            Resource::Cpu if self.vcpu_add => Some("no guest agent to online a vCPU"),
            Resource::Cpu => Some("vCPUs cannot be plugged in and no quota is set"),
            Resource::Memory if self.balloon || self.virtio_mem => None,
            Resource::Memory => Some("neither a live balloon nor virtio-mem"),
            Resource::Disk if self.disk_limit => None,
            Resource::Disk => Some("disks cannot be throttled"),
            Resource::Network if self.network_limit => None,
            Resource::Network => Some("interfaces cannot be throttled"),
        }
    }

    /// What is missing for giving less, in words.
    #[must_use]
    pub const fn missing_to_lower(&self, resource: Resource) -> Option<&'static str> {
        match resource {
            Resource::Cpu if self.cpu_quota || self.vcpu_remove => None,
            Resource::Cpu => Some("vCPUs cannot be unplugged and no quota can be set"),
            other => self.missing_to_raise(other),
        }
    }
}

/// Quantiles of the highest demand from now until a change decided now could be corrected; ascending.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Outlook {
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
}

impl Outlook {
    /// What is exceeded with probability `risk`: between the quantiles, and beyond the last one, linear in the
    /// logarithm of the risk, which is right for exponential tails. `None` where a quantile is no number.
    #[must_use]
    pub fn at_risk(&self, risk: f64) -> Option<f64> {
        let Self { p50, p90, p95 } = *self;
        if ![p50, p90, p95].iter().all(|q| q.is_finite() && *q >= 0.0) {
            return None;
        }
        let (p90, p95) = (p90.max(p50), p95.max(p90).max(p50));
        let risk = if risk.is_finite() { risk.clamp(1e-4, 0.5) } else { 0.05 };
        let between =
            |from: f64, to: f64, low: f64, high: f64| low + (from / risk).ln() / (from / to).ln() * (high - low);
        Some(if risk >= 0.1 { between(0.5, 0.1, p50, p90) } else { between(0.1, 0.05, p90, p95) })
    }
}

/// What is known of a machine's resource now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// What it has, read back from the hypervisor. Above its policy's maximum (no limit set, say): counts as that.
    pub allocated: f64,
    /// What it uses; at most `allocated` for want of more.
    pub used: f64,
    /// Seconds since `used` was measured.
    pub age_s: u32,
    /// Of this machine.
    pub pressure: Pressure,
    /// The guest killed something for want of memory since the last round.
    pub oom: bool,
    pub outlook: Option<Outlook>,
    /// The same of what runs in it and is known, to its end, however far ahead: it is not lowered below that, nor raised for it.
    pub rest: Option<Outlook>,
}

/// A machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    pub id: VmId,
    pub policy: Policy,
    pub abilities: Abilities,
    /// By [`Resource`]; `None`: not known, or not managed.
    pub readings: [Option<Reading>; 4],
}
