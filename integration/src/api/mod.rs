//! The HTTP API of prestaged: JSON over a unix socket, described by OpenAPI 3.1 at `/v1/openapi.json`.
//!
//! - `types.rs`, `counters.rs`: what goes over the wire
//! - [`history`]: the same and the handlers for history
//! - [`models`]: models and thresholds, words and what is done about them
//! - [`demand`]: policies, forecasts, decisions, reservations, executions, events
//! - [`templates`]: templates and clones
//! - [`tiers`]: other sizes for the tiers, out of service and back
//! - `error.rs`: problems (RFC 9457) and their codes
//! - `routes.rs`: paths, handlers, the OpenAPI document
//! - `rows.rs`: answers that go on, as CSV
//! - `explain.rs`: why a block was or was not prefetched
//! - `server.rs`: the unix socket, peers, limits, shutdown
//!
//! What the daemon does is behind [`Control`]; this module only speaks HTTP.

mod counters;
pub mod demand;
mod error;
mod explain;
pub mod history;
pub mod models;
mod routes;
mod rows;
mod server;
pub mod templates;
#[cfg(test)]
mod tests;
pub mod tiers;
pub mod types;

use std::future::Future;
use std::pin::Pin;

pub use counters::Counters;
pub use error::{ApiError, ErrorCode, Problem};
pub use routes::{Limits, openapi, router};
pub use rows::{Bytes, Rows};
pub use server::{ApiListener, Heirloom, Peer, ServeError, SocketOptions, adopt, bind, serve};

use history::{HistoryStatus, HotList, HotQuery, Near, NearQuery, RunList, RunsQuery};
use types::{
    AttachRequest, Attached, CacheStat, CacheTiers, Detached, Disk, DiskAdd, DiskList, DiskResize, DiskResized,
    DropRequest, Dropped, Explained, Profile, ProfileList, Saved, Status, Vm, VmList, WarmRequest, Warmed,
};

/// What a [`Control`] method gives back; make one with `Box::pin(async move { … })`.
pub type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, ApiError>> + Send + 'a>>;

/// The daemon, as the API sees it.
///
/// Methods that change something run to their end even when the client goes away: the router spawns them. Requests arrive checked by
/// their `validate`.
pub trait Control:
    models::ModelControl + demand::DemandControl + templates::TemplateControl + tiers::TierControl + Send + Sync + 'static
{
    fn status(&self) -> Reply<'_, Status>;

    fn disks(&self) -> Reply<'_, DiskList>;
    /// Errors: `NotFound`.
    fn disk(&self, name: String) -> Reply<'_, Disk>;
    /// Opens the store, starts the export, remembers the disk over restarts.
    /// Errors: `AlreadyExists` (name, socket or writable store), `StoreFailed`, `InvalidRequest`.
    fn disk_add(&self, request: DiskAdd) -> Reply<'_, Disk>;
    /// Errors: `NotFound`; `InUse` when a hypervisor is connected and not `force`, or when the configuration or a machine owns it.
    fn disk_remove(&self, name: String, force: bool) -> Reply<'_, ()>;
    /// Looks at the size of a disk's store, or makes a raw file larger, and tells the guest. Other disks are undisturbed.
    /// Errors: `NotFound`, `InvalidRequest` (smaller than it is), `NotPossible` (with who makes such a store larger), `StoreFailed`, `NoSpace`.
    fn disk_resize(&self, name: String, request: DiskResize) -> Reply<'_, DiskResized>;
    /// The disk's requests from now on. Errors: `NotFound`, `StoreFailed` (not served), `Unavailable` (too many readers).
    fn disk_trace(&self, name: String) -> Reply<'_, Rows>;
    /// The disk's requests in the database, from `since_us` (Unix time) on. Errors: `NotFound`, `StoreFailed`, `Unavailable`.
    fn disk_history(&self, name: String, since_us: u64) -> Reply<'_, Rows>;
    /// Why the page at `offset_bytes` was or was not prefetched. Errors: `NotFound`, `StoreFailed`, `InvalidRequest` (beyond the
    /// disk), `Timeout` (the learner is busy).
    fn disk_explain(&self, name: String, offset_bytes: u64) -> Reply<'_, Explained>;

    fn vms(&self) -> Reply<'_, VmList>;
    /// `vm` is a name or UUID. Errors: `NotFound`, `HypervisorUnavailable`.
    fn vm(&self, vm: String) -> Reply<'_, Vm>;
    /// Errors: `NotFound`, `AlreadyExists` (attached before), `NotPossible` (with what to change), `HypervisorUnavailable`, `StoreFailed`.
    fn vm_attach(&self, vm: String, target: String, request: AttachRequest) -> Reply<'_, Attached>;
    /// Errors: `NotFound` (also: not attached), `HypervisorUnavailable`.
    fn vm_detach(&self, vm: String, target: String) -> Reply<'_, Detached>;

    fn cache_tiers(&self) -> Reply<'_, CacheTiers>;
    fn cache_stat(&self) -> Reply<'_, CacheStat>;
    /// Errors: `NotFound` (disk or profile), `InvalidRequest` (range beyond the disk).
    fn cache_warm(&self, request: WarmRequest) -> Reply<'_, Warmed>;
    /// Errors: `NotFound`.
    fn cache_drop(&self, request: DropRequest) -> Reply<'_, Dropped>;

    fn profiles(&self) -> Reply<'_, ProfileList>;
    /// Errors: `NotFound`.
    fn profile(&self, id: String) -> Reply<'_, Profile>;
    /// Forgets what was learned, in memory and in the store. Errors: `NotFound`.
    fn profile_remove(&self, id: String) -> Reply<'_, ()>;
    /// Writes what was learned to the store and returns when it is durable. Errors: `Unavailable`, `NoSpace`.
    fn profiles_save(&self) -> Reply<'_, Saved>;

    /// Errors of all questions about history: also `Busy`.
    fn history(&self) -> Reply<'_, HistoryStatus>;
    /// Errors: `NotFound`.
    fn history_runs(&self, query: RunsQuery) -> Reply<'_, RunList>;
    /// Errors: `NotFound`, `StoreFailed` (the disk is not served).
    fn history_hot(&self, disk: String, query: HotQuery) -> Reply<'_, HotList>;
    /// Errors: `NotFound`, `StoreFailed`, `InvalidRequest` (beyond the disk, or one block).
    fn history_near(&self, disk: String, query: NearQuery) -> Reply<'_, Near>;
}
