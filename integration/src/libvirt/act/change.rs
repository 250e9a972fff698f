//! What to change, and what came of it.

use std::fmt;
use std::time::Duration;

use uuid::Uuid;

use crate::libvirt::error::HypervisorError;

/// What a setting is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Resource {
    Cpu,
    Memory,
    Disk,
    Network,
}

/// The means by which a change is made. Each has a latency of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Balloon,
    MemoryDevice,
    Vcpus,
    CpuWeight,
    CpuQuota,
    DiskLimits,
    DiskWeight,
    NetworkLimits,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
            Self::MemoryDevice => "memory device",
            Self::Vcpus => "vCPUs",
            Self::CpuWeight => "CPU weight",
            Self::CpuQuota => "CPU quota",
            Self::DiskLimits => "disk limits",
            Self::DiskWeight => "disk weight",
            Self::NetworkLimits => "network limits",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One setting of a running VM.
#[derive(Debug, Clone, PartialEq)]
pub enum Setting {
    /// The guest's memory in bytes, by the means that suits: to shrink, a virtio-mem device where one holds memory, else the
    /// balloon; to grow, the balloon as far as it holds memory back, else a device.
    Memory(u64),
    /// The guest's memory in bytes, by its balloon.
    Balloon(u64),
    /// What a virtio-mem device is to hold, in bytes; a multiple of its block size.
    MemoryDevice { alias: String, bytes: u64 },
    /// Virtual processors.
    Vcpus(u32),
    /// The VM's weight among others when CPU is scarce (`cpu_shares`; 1024 by default with cgroup v1, 100 with v2).
    CpuWeight(u64),
    /// The most CPU the VM may use, in cores; `None`: no limit.
    CpuQuota(Option<f64>),
    /// Limits of the disk with this target.
    Disk { target: String, limits: DiskLimits },
    /// The VM's weight among others when block I/O is scarce, 100 to 1000 (1 to 10000 with cgroup v2).
    DiskWeight(u32),
    /// Limits of the network interface with this device name on the host.
    Network { device: String, limits: NetLimits },
}

/// Limits of a disk; `None`: no limit. A total excludes limits of reads and writes of the same unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskLimits {
    /// Bytes/s.
    pub total_bps: Option<u64>,
    pub read_bps: Option<u64>,
    pub write_bps: Option<u64>,
    /// Requests/s.
    pub total_ops: Option<u64>,
    pub read_ops: Option<u64>,
    pub write_ops: Option<u64>,
}

/// Limits of a network interface in bytes/s, in steps of 1000; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetLimits {
    /// What the guest receives.
    pub received_bps: Option<u64>,
    /// What the guest sends.
    pub sent_bps: Option<u64>,
}

impl Setting {
    pub fn resource(&self) -> Resource {
        match self {
            Self::Memory(_) | Self::Balloon(_) | Self::MemoryDevice { .. } => Resource::Memory,
            Self::Vcpus(_) | Self::CpuWeight(_) | Self::CpuQuota(_) => Resource::Cpu,
            Self::Disk { .. } | Self::DiskWeight(_) => Resource::Disk,
            Self::Network { .. } => Resource::Network,
        }
    }

    /// The means; for [`Setting::Memory`] the one used where there is no choice.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Memory(_) | Self::Balloon(_) => Kind::Balloon,
            Self::MemoryDevice { .. } => Kind::MemoryDevice,
            Self::Vcpus(_) => Kind::Vcpus,
            Self::CpuWeight(_) => Kind::CpuWeight,
            Self::CpuQuota(_) => Kind::CpuQuota,
            Self::Disk { .. } => Kind::DiskLimits,
            Self::DiskWeight(_) => Kind::DiskWeight,
            Self::Network { .. } => Kind::NetworkLimits,
        }
    }
}

impl Setting {
    /// The setting as one number, for records: bytes of memory, vCPUs, cores, weights, bytes/s of a limit, both ways together.
    /// `None` where there is no limit, or one in requests/s alone.
    pub fn amount(&self) -> Option<f64> {
        let sum = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.saturating_add(b) as f64),
            _ => None, // one way is without limit, so the sum is too
        };
        match self {
            Self::Memory(bytes) | Self::Balloon(bytes) | Self::MemoryDevice { bytes, .. } => Some(*bytes as f64),
            Self::Vcpus(count) => Some(f64::from(*count)),
            Self::CpuWeight(weight) => Some(*weight as f64),
            Self::CpuQuota(cores) => *cores,
            Self::Disk { limits: l, .. } => l.total_bps.map(|b| b as f64).or_else(|| sum(l.read_bps, l.write_bps)),
            Self::DiskWeight(weight) => Some(f64::from(*weight)),
            Self::Network { limits, .. } => sum(limits.received_bps, limits.sent_bps),
        }
    }
}

/// In words, such as `352 MiB` or `vda: reads 10000000 B/s`.
impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = |f: &mut fmt::Formatter<'_>, of: &str, limits: &[(&str, Option<u64>, &str)]| {
            let set: Vec<_> = limits.iter().filter_map(|(n, v, unit)| Some(format!("{n} {} {unit}", (*v)?))).collect();
            write!(f, "{of}: {}", if set.is_empty() { "no limit".to_owned() } else { set.join(", ") })
        };
        match self {
            Self::Memory(bytes) | Self::Balloon(bytes) => write!(f, "{} MiB", bytes >> 20),
            Self::MemoryDevice { alias, bytes } => write!(f, "{alias}: {} MiB", bytes >> 20),
            Self::Vcpus(1) => f.write_str("1 vCPU"),
            Self::Vcpus(count) => write!(f, "{count} vCPUs"),
            Self::CpuWeight(weight) => write!(f, "CPU weight {weight}"),
            Self::CpuQuota(Some(cores)) => write!(f, "{cores:.2} cores"),
            Self::CpuQuota(None) => f.write_str("no CPU limit"),
            Self::DiskWeight(weight) => write!(f, "disk weight {weight}"),
            Self::Disk { target, limits: l } => limits(
                f,
                target,
                &[
                    ("total", l.total_bps, "B/s"),
                    ("reads", l.read_bps, "B/s"),
                    ("writes", l.write_bps, "B/s"),
                    ("total", l.total_ops, "/s"),
                    ("reads", l.read_ops, "/s"),
                    ("writes", l.write_ops, "/s"),
                ],
            ),
            Self::Network { device, limits: l } => {
                limits(f, device, &[("receives", l.received_bps, "B/s"), ("sends", l.sent_bps, "B/s")])
            }
        }
    }
}

/// A change to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub vm: Uuid,
    pub to: Setting,
    /// The guest's memory in bytes below which the VM is not taken, whatever `to` says: what it uses and a margin. Looked at
    /// for memory alone.
    pub not_below: u64,
}

/// How far a change came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Reached,
    /// Some of it; what was reached stays.
    Partial,
    /// It was so before.
    Already,
    /// Nothing happened within the time.
    Unchanged,
    /// It went half-way and was put back.
    RolledBack,
}

/// What came of a change.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    pub vm: Uuid,
    pub kind: Kind,
    pub before: Setting,
    pub asked: Setting,
    /// As read back at the end.
    pub got: Setting,
    pub took: Duration,
    pub outcome: Outcome,
    /// `got` was read from the hypervisor or the guest after the change, and is what was asked for.
    pub verified: bool,
    /// What an operator should know, in words; empty where all went as asked.
    pub why: String,
}

/// Why a change was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ActError {
    /// Not now; it may be right later.
    #[error("VM `{vm}`: {reason}")]
    Refused { vm: String, reason: String },
    /// Not with this VM as it is defined and on this host.
    #[error("VM `{vm}` can't have its {what} changed: {reason}")]
    Unsupported { vm: String, what: Kind, reason: String },
    #[error("VM `{vm}` can't be changed now: {reason}; try again when that is over")]
    Busy { vm: String, reason: &'static str },
    #[error("the {what} of VM `{vm}` could not be changed: {reason}; {left}")]
    Failed {
        vm: String,
        what: Kind,
        reason: String,
        /// The state that the VM was left in.
        left: String,
    },
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
}

impl ActError {
    /// Whether trying again is of no use until the VM's definition or the host changes.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Unsupported { .. } | Self::Hypervisor(HypervisorError::NoSuchVm { .. }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_read_as_words_and_as_a_number() {
        let disk = |limits| Setting::Disk { target: "vda".into(), limits };
        let read = DiskLimits { read_bps: Some(10), total_ops: Some(7), ..DiskLimits::default() };
        let both = DiskLimits { write_bps: Some(5), ..read };
        let net = NetLimits { received_bps: Some(1), sent_bps: Some(2) };
        for (setting, words, amount) in [
            (Setting::Memory(352 << 20), "352 MiB", Some(369_098_752.0)),
            (Setting::Vcpus(1), "1 vCPU", Some(1.0)),
            (Setting::CpuQuota(Some(1.5)), "1.50 cores", Some(1.5)),
            (Setting::CpuQuota(None), "no CPU limit", None),
            (disk(DiskLimits::default()), "vda: no limit", None),
            (disk(read), "vda: reads 10 B/s, total 7 /s", None),
            (disk(both), "vda: reads 10 B/s, writes 5 B/s, total 7 /s", Some(15.0)),
            (Setting::Network { device: "vnet0".into(), limits: net }, "vnet0: receives 1 B/s, sends 2 B/s", Some(3.0)),
        ] {
            assert_eq!((setting.to_string().as_str(), setting.amount()), (words, amount));
        }
    }
}
