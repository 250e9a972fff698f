//! A vhost-user-blk front-end of our own, as strict as a guest and faster to look at: several queues kept full with reads
//! and writes whose every word can be checked. It outlives the server: when the connection ends it connects again with the
//! same rings and the same in-flight memory, as QEMU does (QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking").
//!
//! - `connection`: one connection's messages
//! - `ring`: a split virtqueue from the driver's side (VIRTIO 1.3, 2.7)
//! - [`model`]: what each sector may hold
//! - [`load`]: all of them together, in a thread of its own

mod connection;
pub mod load;
pub mod model;
mod ring;

pub use load::{Load, LoadOptions, Report};
pub use model::{Model, SECTOR};
