//! The plain types of what is measured.
//!
//! CPU in cores (1.0 = one core busy all the time), memory in bytes, disk and network in bytes/s, requests in
//! operations/s, times in µs since 1970. Rates are the mean since the turn before; `None` where there was none, where the
//! VM was started meanwhile, or where libvirt did not say.

use std::time::Duration;

use crate::libvirt::vm::{VmId, VmState};
use crate::pressure::Pressure;

/// What one VM used.
#[derive(Debug, Clone, PartialEq)]
pub struct VmSample {
    pub vm: VmId,
    /// libvirt's number of the running instance; a new one with every start.
    pub instance: u32,
    pub at_us: u64,
    pub state: VmState,
    pub cpu: CpuSample,
    pub memory: MemorySample,
    pub disks: Vec<DiskSample>,
    pub nets: Vec<NetSample>,
    /// Of the VM's control group; `None` where it has none of its own or the host has no cgroup v2.
    pub pressure: Option<Pressure>,
}

impl VmSample {
    /// Bytes/s of all disks, read and written.
    pub fn disk_bps(&self) -> Option<f64> {
        sum(self.disks.iter().map(|d| d.rates.map(|r| r.read_bps + r.write_bps)))
    }

    /// Requests/s of all disks, reads, writes and flushes.
    pub fn disk_ops(&self) -> Option<f64> {
        sum(self.disks.iter().map(|d| d.rates.map(|r| r.read_ops + r.write_ops + r.flush_ops)))
    }

    /// Bytes/s of all network interfaces, both ways.
    pub fn net_bps(&self) -> Option<f64> {
        sum(self.nets.iter().map(|n| n.rates.map(|r| r.received_bps + r.sent_bps)))
    }
}

/// The sum of what is known; `None` if nothing is.
fn sum(parts: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    parts.flatten().fold(None, |total, part| Some(total.unwrap_or(0.0) + part))
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CpuSample {
    /// vCPUs that the VM has now, whether or not its guest uses them.
    pub vcpus: Option<u32>,
    /// vCPUs that it can have without a restart.
    pub vcpus_max: Option<u32>,
    /// Cores that the vCPUs used.
    pub used_cores: Option<f64>,
    /// Cores that the whole VM used, the hypervisor's own threads included.
    pub total_cores: Option<f64>,
    /// Mean number of vCPUs that were ready and waited in the host's run queue (`vcpu.N.delay`; the guest's steal time).
    pub delayed_cores: Option<f64>,
    /// Mean number of vCPUs that waited by the scheduler's `wait_sum` (`vcpu.N.wait`); 0 where the kernel keeps no such sum.
    pub waiting_cores: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemorySample {
    /// The most the VM can have without a restart.
    pub maximum_bytes: Option<u64>,
    /// What it has now: its memory less the balloon.
    pub current_bytes: Option<u64>,
    /// What the hypervisor's process holds of the host.
    pub resident_bytes: Option<u64>,
    /// What the guest itself says, by its balloon driver.
    pub guest: Option<GuestMemory>,
    /// How often the guest is asked; `None`: never, so that its figures age.
    pub period: Option<Duration>,
}

/// The guest's own view of its memory, by the statistics queue of the virtio balloon (virtio 1.2, section 5.5.6.3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuestMemory {
    /// All that its kernel manages (`MemTotal`, libvirt's `available`).
    pub total_bytes: u64,
    /// What nobody uses, not even as a cache (`MemFree`, libvirt's `unused`).
    pub free_bytes: u64,
    /// What a new program could get without swapping (`MemAvailable`, libvirt's `usable`); older guests don't say.
    pub available_bytes: Option<u64>,
    pub cache_bytes: Option<u64>,
    pub swap_in_bps: Option<f64>,
    pub swap_out_bps: Option<f64>,
    /// Page faults that waited for a disk, a second.
    pub major_faults: Option<f64>,
    /// How old these figures are. They stay as they were when a guest reboots, hangs or loses its driver.
    pub age: Duration,
}

impl GuestMemory {
    /// What could be taken from the guest before it must swap or kill: what is available where it says so, else what is free.
    pub fn spare_bytes(&self) -> u64 {
        self.available_bytes.unwrap_or(self.free_bytes)
    }

    /// What it needs now.
    pub fn used_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.spare_bytes())
    }

    /// Whether the figures are at most three periods old; with a period below a second, three seconds.
    pub fn is_fresh(&self, period: Duration) -> bool {
        self.age <= period.max(Duration::from_secs(1)) * 3
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct DiskSample {
    /// The name in the definition, such as `vda`.
    pub target: String,
    pub rates: Option<DiskRates>,
    pub capacity_bytes: Option<u64>,
    /// What the image takes of its storage.
    pub allocation_bytes: Option<u64>,
}

/// vhost-user disks have none of these: their requests don't pass QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DiskRates {
    pub read_bps: f64,
    pub write_bps: f64,
    pub read_ops: f64,
    pub write_ops: f64,
    pub flush_ops: f64,
    /// Mean number of requests under way (Little's law: waiting time a second).
    pub under_way: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct NetSample {
    /// The host's side of the interface, such as `vnet0`.
    pub device: String,
    pub rates: Option<NetRates>,
}

/// As the guest sees them: what it received, the host's device sent.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct NetRates {
    pub received_bps: f64,
    pub sent_bps: f64,
    /// Packets a second.
    pub received_packets: f64,
    pub sent_packets: f64,
    /// Packets dropped a second, both ways.
    pub dropped_packets: f64,
}

/// What the host used.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostSample {
    pub at_us: u64,
    /// Online CPUs.
    pub cpus: u32,
    /// Cores busy, guests included.
    pub used_cores: Option<f64>,
    /// Cores that ran guests, a part of the above.
    pub guest_cores: Option<f64>,
    /// Cores idle while a task of theirs waited for I/O.
    pub iowait_cores: Option<f64>,
    /// Cores taken by a hypervisor below this host.
    pub stolen_cores: Option<f64>,
    pub memory_bytes: u64,
    /// What new programs could get without swapping.
    pub memory_available_bytes: u64,
    pub swap_bytes: u64,
    pub swap_free_bytes: u64,
    /// `None` where the kernel has no PSI.
    pub pressure: Option<Pressure>,
}
