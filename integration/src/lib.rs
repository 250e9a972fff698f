//! Where Prestage meets the outside: hypervisors, virtual machines' disks, operators. Reports and obeys; decides nothing.
//!
//! - [`export`]: disks for guests over vhost-user-blk
//! - [`handover`]: from one process to the next without letting go
//! - [`libvirt`]: machines, their events, attaching and detaching their disks
//! - [`memory`]: guest memory, seen and moved from the host
//! - [`privilege`]: what needs privilege, apart from what parses; what the daemon gives up
//! - [`pressure`]: how long tasks stall, of the host and of each VM
//! - [`processes`]: which process is a VM's
//! - [`api`]: the HTTP API
//! - [`webhook`]: signed messages to whoever manages the machines

pub mod api;
pub mod export;
pub mod handover;
pub mod libvirt;
pub mod memory;
pub mod pressure;
pub mod privilege;
mod probe;
pub mod processes;
mod rights;
pub mod webhook;
