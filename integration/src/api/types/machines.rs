//! Machines and their disks, as libvirt knows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::VmPages;
use crate::api::templates::CloneProgress;

/// One virtual machine known to libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    pub uuid: String,
    pub name: String,
    /// `running`, `paused`, `shut off`, `crashed`, ….
    pub state: String,
    pub persistent: bool,
    /// Guest memory is shared, as vhost-user disks need.
    pub shared_memory: bool,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub disks: Vec<VmDisk>,
    /// What is read for it, if it was started from a template by this run of the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone: Option<CloneProgress>,
    /// How its memory fares; absent in lists, and where memory is not watched at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<VmPages>,
}

/// One disk of a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Device name in the domain, such as `vda`.
    pub target: String,
    pub bus: String,
    /// `file`, `block`, `network`, `vhostuser`, ….
    pub kind: String,
    /// Path, URI or socket; absent for an empty drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    pub format: String,
    pub read_only: bool,
    /// Name of the prestaged disk that serves it, when attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached: Option<String>,
}

/// All machines, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmList {
    pub vms: Vec<Vm>,
}

/// How to attach a machine's disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Add shared memory backing to the domain where it lacks it.
    #[serde(default)]
    pub enable_shared_memory: bool,
    /// Queues of the disk; default: one per vCPU, at most 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Name of the disk made; default `<vm>-<target>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// When a change of a domain takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TakesEffect {
    Now,
    /// The machine is running: with its next start (a reboot inside the guest is not enough).
    #[default]
    NextStart,
}

/// A machine's disk is now served by prestaged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Attached {
    pub vm: String,
    pub target: String,
    /// Name of the disk made.
    pub disk: String,
    pub store: String,
    pub socket: String,
    pub takes_effect: TakesEffect,
    /// What else was changed or should be known.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A machine's disk has its original source again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Detached {
    pub vm: String,
    pub target: String,
    /// Name of the disk that served it.
    pub disk: String,
    /// The source it has again.
    pub store: String,
    pub takes_effect: TakesEffect,
    #[serde(default)]
    pub notes: Vec<String>,
}
