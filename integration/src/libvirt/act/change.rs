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
