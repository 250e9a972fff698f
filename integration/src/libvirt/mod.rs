//! libvirt: what domains exist, what happens to them, and pointing a domain's disk at an export and back.
//!
//! | module | holds |
//! | --- | --- |
//! | [`Hypervisor`] (`hypervisor`) | the asynchronous handle: list, events, attach, detach, start, stop |
//! | `worker` | the thread that owns the connection: reconnects, registers events again, resynchronises |
//! | `queue` | the bounded queue of calls to that thread |
//! | `link` | one connection and its callbacks; unsafe |
//! | `raw` | statistics of all domains in one call, QEMU's monitor; unsafe |
//! | [`act`] | what VMs may use: memory, vCPUs, shares, limits; changed, read back, rolled back |
//! | [`template`] | machines saved as templates, and clones started from them |
//! | [`stats`] | what VMs and the host use, every second |
//! | `vm` | plain types: [`Vm`], [`VmDisk`], [`VmEvent`], [`HypervisorEvent`], [`ConnectionState`] |
//! | `describe` | domain XML → [`Vm`] |
//! | `plan` | [`plan_attach`] and [`plan_detach`]: pure functions from domain XML to domain XML |
//! | `disk` | one `<disk>` element: what it is, what an export cannot stand in for, its replacement |
//! | `record` | the attachment record kept in the domain's `<metadata>` |
//! | `memory` | shared guest memory, which vhost-user needs |
//! | `store` | [`StoreSource`]: what backs a disk, as a path or an NBD URI |
//! | `xml` | byte-range splicing and comparison of XML |
//! | `error` | [`HypervisorError`], [`PlanError`] |
//!
//! libvirt's calls block and may block for long. None runs on the caller's thread: the handle passes work to a thread
//! of its own and waits with a time limit, so a libvirt that hangs costs a caller an error and nothing else.

pub mod act;
pub mod stats;
pub mod template;

mod describe;
mod disk;
mod error;
mod hypervisor;
mod link;
mod memory;
mod plan;
mod queue;
mod raw;
mod record;
mod store;
mod vm;
mod worker;
mod xml;

pub use error::{HypervisorError, PlanError};
pub use hypervisor::{Attached, Detached, Hypervisor, HypervisorConfig, TakesEffect};
pub use plan::{AttachOptions, AttachPlan, DetachPlan, VolumeLookup, plan_attach, plan_detach};
pub use record::NAMESPACE;
pub use store::{NbdEndpoint, NbdUri, StoreSource, StoreSourceError};
pub use uuid::Uuid;
pub use vm::{
    AttachInfo, ConnectionState, DiskKind, HypervisorEvent, StopCause, Vm, VmDisk, VmEvent, VmEventKind, VmId, VmState,
};
