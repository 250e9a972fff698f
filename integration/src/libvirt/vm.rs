//! Plain types: what a VM is, what happens to it, and how the connection to libvirt is.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use uuid::Uuid;

use super::store::StoreSource;

/// A VM's identity. The UUID is what stays when a VM is renamed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VmId {
    pub uuid: Uuid,
    pub name: String,
}

impl VmId {
    /// A file name for this VM, for its folder of sockets: the name where that is a short plain word, else the UUID.
    pub fn file_name(&self) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let name = &self.name;
        let usable = !name.is_empty() && name.len() <= 48 && !name.starts_with('.') && name.chars().all(plain);
        if usable { name.clone() } else { self.uuid.to_string() }
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A VM as libvirt describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    pub id: VmId,
    pub state: VmState,
    /// libvirt's number of the running instance; a new one with every start.
    pub instance: Option<u32>,
    /// Whether a definition stays when the VM stops. Only then can disks be attached.
    pub persistent: bool,
    /// The disks of the running VM, or those of the definition if it is not running.
    pub disks: Vec<VmDisk>,
    /// Whether the definition has the shared memory that vhost-user needs.
    pub shared_memory: bool,
    pub vcpus: u32,
    /// The most memory the VM may have.
    pub memory_bytes: u64,
    /// Folder of the template that it was started from, if it is a clone.
    pub clone_of: Option<PathBuf>,
}

impl Vm {
    pub fn is_running(&self) -> bool {
        self.instance.is_some()
    }
}

/// A VM's state, as `virDomainState` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmState {
    Running,
    /// Waiting for a resource (Xen only).
    Blocked,
    Paused,
    /// The guest is shutting down.
    ShuttingDown,
    ShutOff,
    Crashed,
    /// Suspended by the guest's power management.
    PmSuspended,
    Unknown,
}

impl VmState {
    /// The word that `virsh list` uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Blocked => "idle",
            Self::Paused => "paused",
            Self::ShuttingDown => "in shutdown",
            Self::ShutOff => "shut off",
            Self::Crashed => "crashed",
            Self::PmSuspended => "pmsuspended",
            Self::Unknown => "no state",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDisk {
    /// The name that identifies it in the definition, such as `vda`.
    pub target: String,
    /// `virtio`, `scsi`, `sata`, …
    pub bus: String,
    /// `disk`, `cdrom`, `floppy` or `lun`.
    pub device: String,
    pub kind: DiskKind,
    /// Path, device, NBD URI, socket or `pool/volume`; `None` for an empty drive.
    pub source: Option<String>,
    /// `raw`, `qcow2`, …
    pub format: String,
    pub read_only: bool,
    pub attached: Option<AttachInfo>,
}

/// What kind of source a disk has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskKind {
    File,
    Block,
    Network,
    VhostUser,
    Volume,
    Other(String),
}

impl fmt::Display for DiskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::File => "file",
            Self::Block => "block",
            Self::Network => "network",
            Self::VhostUser => "vhostuser",
            Self::Volume => "volume",
            Self::Other(kind) => kind,
        })
    }
}

/// A disk that is served through an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachInfo {
    pub socket: PathBuf,
    /// What the disk was before, from the record in the domain's metadata; `None` for a pool volume.
    pub store: Option<StoreSource>,
    /// The export must refuse writes.
    pub read_only: bool,
    /// The serial the export must give to the guest.
    pub serial: Option<String>,
    /// The running VM uses the export: it must be served until the VM stops.
    pub in_use: bool,
    /// The next start uses the export. False after a detach while the VM still runs on it.
    pub next_start: bool,
}

/// What the hypervisor tells. A receiver that lags (`RecvError::Lagged`) should list anew.
#[derive(Debug, Clone)]
pub enum HypervisorEvent {
    Vm(VmEvent),
    /// Sent after every (re)connection: events before it may have been missed, this is how things are.
    Resync(Arc<[Vm]>),
    Disconnected {
        reason: String,
    },
}

/// Something happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmEvent {
    pub vm: VmId,
    pub kind: VmEventKind,
    /// When the event reached this process.
    pub at: SystemTime,
}

/// What happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEventKind {
    /// Defined, or its definition changed.
    Defined,
    Undefined,
    Started,
    /// vCPUs stopped: by request, by an I/O error, for migration.
    Suspended,
    Resumed,
    Stopped(StopCause),
    /// The guest has shut down, the process is still there.
    Shutdown,
    PmSuspended,
    /// The guest panicked, and the VM is kept for a look.
    Crashed,
    /// The guest rebooted within the same process: disks stay connected.
    Rebooted,
    DeviceAdded {
        alias: String,
    },
    DeviceRemoved {
        alias: String,
    },
    /// The guest's memory less its balloon is this now, in bytes. At most one a second while the balloon moves.
    BalloonChanged {
        bytes: u64,
    },
    /// A virtio-mem device holds this much memory now, in bytes.
    MemoryDeviceResized {
        alias: String,
        bytes: u64,
    },
    /// The guest agent answers or no longer answers.
    AgentConnected,
    AgentDisconnected,
    /// A lifecycle event of a libvirt newer than this list.
    Other {
        event: i32,
        detail: i32,
    },
}

/// Why a VM stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopCause {
    /// The guest shut down.
    Shutdown,
    /// By an operator's `destroy`.
    Destroyed,
    /// The hypervisor process died.
    Crashed,
    /// It runs on another host now.
    Migrated,
    /// Saved to a file.
    Saved,
    /// It failed to start.
    Failed,
    FromSnapshot,
    Other(i32),
}

/// How the connection to libvirt is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionState {
    pub uri: String,
    pub connected: bool,
    /// Since when it is connected, or not connected.
    pub since: SystemTime,
    /// The last failure, kept after a reconnection.
    pub last_error: Option<String>,
    /// How often the connection was made anew after the first time.
    pub reconnects: u64,
    /// Of the daemon, such as `11.3.0`; `None` before the first connection.
    pub libvirt_version: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_stay_within_their_folder() {
        let id = |name: &str| VmId { uuid: Uuid::from_u128(7), name: name.into() };
        assert_eq!(id("web-1.example").file_name(), "web-1.example");
        let uuid = Uuid::from_u128(7).to_string();
        for name in ["", "..", ".hidden", "a/b", "ein käse", &"x".repeat(49)] {
            assert_eq!(id(name).file_name(), uuid, "{name}");
        }
    }
}
