//! Where Prestage meets the outside: hypervisors, virtual machines' disks, operators. Reports and obeys; decides nothing.
//!
//! - [`export`]: disks for guests over vhost-user-blk
//! - [`libvirt`]: machines, their events, attaching and detaching their disks
//! - [`pressure`]: how long tasks stall, of the host and of each VM
//! - [`api`]: the HTTP API

pub mod api;
pub mod export;
pub mod libvirt;
pub mod pressure;
mod probe;
