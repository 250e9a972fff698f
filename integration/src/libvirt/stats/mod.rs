//! What virtual machines and their host use, as plain samples.
//!
//! | module | holds |
//! | --- | --- |
//! | `sample` | the plain types: [`VmSample`], [`HostSample`] and their parts, with units |
//! | `reading` | one VM's figures as libvirt has them: counters and levels |
//! | [`Meter`] (`meter`) | readings → samples: what happened between two of them |
//! | `host` | `/proc/stat` and `/proc/meminfo` |
//! | [`Collector`] (`collect`) | all of it once a turn: one bulk call to libvirt, a few files |
//!
//! A turn asks libvirt once for all running VMs and waits for no VM whose hypervisor is busy. What could not be had is
//! `None`, never zero.

mod collect;
mod host;
mod meter;
mod reading;
mod sample;

pub use collect::{CollectConfig, Collector, Turn};
pub(super) use collect::{now_us, period_of};
pub use meter::Meter;
pub(super) use meter::guest_memory_of;
pub use reading::{Block, Cpu, Guest, Memory, Net, Reading};
pub use sample::{
    CpuSample, DiskRates, DiskSample, GuestMemory, HostSample, MemorySample, NetRates, NetSample, VmSample,
};
