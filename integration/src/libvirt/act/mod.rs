//! What virtual machines may use: changed while they run, read back, and put back where it went half-way.
//!
//! | module | holds |
//! | --- | --- |
//! | `change` | the plain types: [`Change`], [`Setting`], [`Done`], [`ActError`] |
//! | `apply` | [`Hypervisor::apply`](super::Hypervisor::apply) and [`abilities`](super::Hypervisor::abilities): one change at a time a VM, beside the worker |
//! | [`Abilities`] (`abilities`) | what of a VM can be changed, and in words why the rest can't |
//! | `balloon` | the guest's memory, by its balloon: in steps, with a look at the guest between them |
//! | `device` | the guest's memory, by a virtio-mem device |
//! | `vcpus` | virtual processors, and whether the guest uses them |
//! | `tune` | scheduler, disk and network: numbers that libvirt keeps |
//! | `qdisc` | what a failed network limit leaves on the host's interface |
//! | `pace` | [`Pace`]: what makes shrinking safe, and how long each kind of change may take |
//! | [`Backoff`] (`backoff`) | when to try again what failed |
//! | [`Latencies`] (`latency`) | how long changes took, by VM and kind |
//! | `tunable` | the libvirt calls below `tune` and `vcpus`; unsafe |
//!
//! libvirt says yes before anything has happened, so its answer counts for nothing: each change is read back until it is
//! there or its time is over. What was reached in part is reported as that.

mod abilities;
mod apply;
mod backoff;
mod balloon;
mod change;
mod device;
mod latency;
mod pace;
mod qdisc;
mod tunable;
mod tune;
mod vcpus;

pub use abilities::{Abilities, Ability, DiskAbility, MemoryDevice, Nic, VcpuAbility};
pub(super) use apply::Acting;
pub use backoff::Backoff;
pub use change::{ActError, Change, DiskLimits, Done, Kind, NetLimits, Outcome, Resource, Setting};
pub use latency::{Latencies, Latency};
pub use pace::Pace;
