//! Disks over NBD, beside vhost-user-blk: for backup and copying programs, other hosts, and hypervisors without vhost-user.
//!
//! - [`NbdExport`], [`NbdDisk`] (`export.rs`): a disk's unix socket and its clients, on the shard of its storage
//! - [`NbdServer`] (`tcp.rs`): TCP with TLS, for all disks that are exported; a thread of its own until a client has chosen
//! - `negotiate.rs`: from the greeting to an export; `connection.rs`: requests and answers
//! - `wire.rs`: a socket with TLS or without
//! - [`NbdClient`]: who is connected
//!
//! The protocol itself is in [`prestage_integration::export::nbd`], without sockets.

mod connection;
mod export;
mod negotiate;
mod tcp;
mod wire;

pub use export::{NbdDisk, NbdExport};
pub use tcp::{NbdServer, NbdServerError};

/// A client of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdClient {
    /// Its process, or its address.
    pub peer: String,
    pub since_unix_ms: u64,
    /// Requests so far.
    pub requests: u64,
    /// Requests under way that were not answered at once.
    pub in_flight: u32,
}
