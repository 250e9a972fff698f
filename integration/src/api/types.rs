//! The words of the API: what goes over the wire, as plain data.
//!
//! Requests refuse unknown fields, so that a misspelt one is an error and not silently ignored; replies may gain fields within v1.
//! Sizes are bytes (`_bytes`), times are microseconds or milliseconds by suffix, points in time are Unix milliseconds (`_unix_ms`).
//!
//! - status: [`Status`], [`Problem`](super::Problem) is in `error.rs`
//! - disks: [`Disk`], [`DiskList`], [`DiskAdd`]; their size: [`DiskResize`], [`DiskResized`] in `types/resize.rs`; over NBD: [`DiskNbd`] in
//!   `types/nbd.rs`
//! - machines: [`Vm`], [`VmDisk`], [`VmList`], [`AttachRequest`], [`Attached`], [`Detached`] in `types/machines.rs`
//! - cache: [`CacheTiers`], [`CacheStat`], [`WarmRequest`], [`Warmed`], [`DropRequest`], [`Dropped`] in `types/cache.rs`
//! - profiles: [`Profile`], [`ProfileList`], [`Saved`]
//! - explanations: [`Explained`] in `types/explained.rs`
//! - a machine's memory: [`VmPages`] in `types/pages.rs`
//! - [`Counters`] are in `counters.rs`

mod cache;
mod explained;
mod machines;
mod nbd;
mod pages;
mod resize;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use super::counters::Counters;
pub use cache::{
    ByteRange, CacheStat, CacheTiers, DiskStat, DropRequest, DropTier, Dropped, RANGES_MAX, StorageUse, Tier, TierName,
    WarmRequest, Warmed,
};
pub use explained::{Attempt, BudgetUse, Explained, Fate, Governor, Place, Touch, Vote};
pub use machines::{AttachRequest, Attached, Detached, TakesEffect, Vm, VmDisk, VmList};
pub use nbd::{DiskNbd, NbdClient};
pub use pages::{MemoryStatus, PagesSet, PassedOver, VmPages};
pub use resize::{DiskResize, DiskResized};

/// Whether a part works as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Works.
    #[default]
    Ok,
    /// Works less well than configured; a reason stands beside it.
    Degraded,
    /// Switched off by configuration.
    Off,
}

/// One thing an operator should look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Trouble {
    /// What it concerns: `disk web1`, `libvirt`, `ssd tier`, `store`.
    pub subject: String,
    /// What is wrong and what to do.
    pub detail: String,
}

/// The daemon as a whole.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Version of prestaged.
    pub version: String,
    /// Host name.
    pub host: String,
    pub pid: u32,
    /// When this process started.
    pub started_unix_ms: u64,
    pub uptime_ms: u64,
    /// `degraded` when `troubles` is not empty.
    pub health: Health,
    /// What an operator should look at; empty when all is well.
    #[serde(default)]
    pub troubles: Vec<Trouble>,
    /// What is as somebody ordered it, for the time being: drained tiers, sizes unlike the configuration,
    /// settings that wait for a restart. Of no effect on `health`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notices: Vec<Trouble>,
    /// What the daemon gave up at its start.
    #[serde(default)]
    pub sandbox: Sandbox,
    pub engine: EngineStatus,
    #[serde(default)]
    pub cache: CacheUse,
    pub disks: DiskCounts,
    pub libvirt: LibvirtStatus,
    pub learner: LearnerStatus,
    /// Guests' memory.
    #[serde(default)]
    pub memory: MemoryStatus,
    pub store: StoreStatus,
}

/// What the daemon gave up at its start, and what it could not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Sandbox {
    /// `full` or `off`.
    pub mode: String,
    #[serde(default)]
    pub layers: Vec<SandboxLayer>,
}

/// One kind of confinement.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct SandboxLayer {
    /// `user`, `capabilities`, `files` or `system calls`.
    pub name: String,
    pub holds: bool,
    /// How far it holds, or why it does not.
    pub detail: String,
}

/// What moves the bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct EngineStatus {
    /// `io_uring` or `thread_pool`.
    pub mode: String,
    /// Event-loop threads.
    pub shards: u32,
}

/// How full the tiers are and what they are good for; more in `/v1/cache`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct CacheUse {
    pub ram_capacity_bytes: u64,
    pub ram_used_bytes: u64,
    /// 0 without an SSD tier.
    pub ssd_capacity_bytes: u64,
    pub ssd_used_bytes: u64,
    /// Guest read requests since the daemon started, by where they were served from.
    pub served_ram: u64,
    pub served_ssd: u64,
    pub served_store: u64,
    /// What the SSD tier had from before the daemon started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssd_recovery: Option<Recovery>,
}

/// What the SSD tier kept over the start of the daemon, and what of it was dropped and why. In blocks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Recovery {
    pub found: SlabFound,
    pub kept_blocks: u64,
    /// In regions (64 MiB) that were being written to when the daemon was cut off.
    pub dropped_written: u64,
    /// Of stores that were changed while the daemon was down.
    pub dropped_changed_store: u64,
    /// Of NBD stores and block devices, because the daemon's last run did not have this tier.
    pub dropped_unvouched: u64,
    /// Overwritten by others before the daemon was cut off; told by their checksum when they are read.
    pub dropped_overtaken: u64,
    /// Records that were damaged or named nobody, second copies, and what lay beyond the end of a slab cut short.
    pub dropped_damaged: u64,
    /// Data that did not match its checksum although the device had said that it was written.
    pub bad_checksums: u64,
    /// Regions whose blocks would be dropped if the power failed now.
    pub marked_regions: u64,
    /// Blocks that the file may have and that are not in use yet: their records are still being read.
    #[serde(default)]
    pub unread_blocks: u64,
}

/// How the SSD tier's file was found at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SlabFound {
    /// There was none.
    #[default]
    Created,
    /// Closed by a clean stop.
    Clean,
    /// Cut off by a crash or a loss of power.
    Recovered,
    /// It says that nothing in it counts: taken out of service, written to after it was closed, or left by a program that keeps no
    /// records while it runs.
    Unclean,
    /// Its device had failed when it mattered: dropped.
    Vetoed,
    /// Both superblocks damaged: dropped.
    Damaged,
}

/// How many disks there are and how they fare.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct DiskCounts {
    pub total: u32,
    /// Disks with a hypervisor connected.
    pub connected: u32,
    /// Disks whose store is not healthy.
    pub degraded: u32,
}

/// The connection to libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct LibvirtStatus {
    pub health: Health,
    pub uri: String,
    pub connected: bool,
    /// Times the connection was lost and made again.
    pub reconnects: u64,
    /// Why it is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The learner: takes accesses off the queue, learns, predicts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct LearnerStatus {
    pub health: Health,
    /// Accesses learned from since the start.
    pub accesses: u64,
    /// Accesses lost because the queue was full.
    pub accesses_dropped: u64,
    /// Predictions handed to the prefetcher.
    pub predictions: u64,
    /// Profiles held in memory.
    pub profiles: u32,
    /// Memory of all profiles held.
    pub memory_bytes: u64,
    /// Prefetching is on.
    pub prefetch: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The database of profiles, accesses and outcomes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct StoreStatus {
    pub health: Health,
    pub path: String,
    /// Size of the database and its write-ahead log.
    pub size_bytes: u64,
    /// Writes waiting for the writer thread.
    pub queued: u64,
    /// Writes lost because the queue was full or the database refused them.
    pub writes_dropped: u64,
    /// Why it is degraded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Where a disk was defined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskOrigin {
    /// `[[disk]]` in the configuration; can only be removed there.
    Config,
    /// `disk add`.
    #[default]
    Api,
    /// `vm attach`; removed by `vm detach`.
    Attach,
}

/// State of a disk's backing store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StoreState {
    #[default]
    Ok,
    Degraded,
}

/// One served disk.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    pub name: String,
    /// Where its bytes live, as given: path or NBD URI.
    pub store: String,
    /// Identity of the storage: disks with the same one share cache and profile.
    pub storage: String,
    pub origin: DiskOrigin,
    pub read_only: bool,
    /// Socket of the vhost-user-blk export.
    pub socket: String,
    /// Machine and target (such as `vda`) it is attached to, when known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Its NBD export, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<DiskNbd>,
    /// Storages of images that stand on each other, from the top down: what is below is shared with other disks. Empty
    /// where there is but one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<String>,
    /// Served through a qemu-storage-daemon, with its process and the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through_qemu: Option<String>,
    pub state: DiskState,
    pub counters: Counters,
}

/// How a disk fares right now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct DiskState {
    /// A hypervisor is connected to the socket.
    pub connected: bool,
    /// Queues running.
    pub queues: u32,
    pub capacity_bytes: u64,
    /// Where its bytes live, as given.
    pub store: String,
    pub store_state: StoreState,
    /// Why the store is degraded, or what an `ok` one waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_reason: Option<String>,
}

/// All disks, by name.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct DiskList {
    pub disks: Vec<Disk>,
}

/// A disk to serve.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskAdd {
    /// 1–64 letters, digits, `.`, `_`, `-`; starts with a letter or digit.
    pub name: String,
    /// `/path`, `qcow2:/path[?backing=store]`, `nbd://host[:port]/export` or `nbd+unix:///export?socket=/path`.
    pub store: String,
    #[serde(default)]
    pub read_only: bool,
    /// Socket of the export; default `<run_dir>/vm/<name>.sock`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Also over NBD.
    #[serde(default)]
    pub nbd: bool,
}

impl DiskAdd {
    /// Checks what can be checked without opening anything.
    pub fn validate(&self) -> Result<(), String> {
        validate_name(&self.name)?;
        if self.store.is_empty() {
            return Err("`store` is empty; give a path or an NBD URI".to_owned());
        }
        match &self.socket {
            Some(socket) if !socket.starts_with('/') => {
                Err(format!("`socket` is `{socket}`; it must be an absolute path"))
            }
            _ => Ok(()),
        }
    }
}

/// Longest disk name: it becomes a file name with a suffix inside a socket path of at most 107 bytes.
pub const NAME_MAX: usize = 64;

/// Checks a disk name: it becomes part of file names and URLs.
pub fn validate_name(name: &str) -> Result<(), String> {
    let mut bytes = name.bytes();
    let starts_well = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    if starts_well && name.len() <= NAME_MAX && bytes.all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        return Ok(());
    }
    Err(format!(
        "`{}` is not a disk name: 1 to {NAME_MAX} letters, digits, `.`, `_` or `-`, starting with a letter or digit",
        name.escape_debug()
    ))
}

/// What was learned of one storage.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Profile {
    /// Stable id; safe in a path.
    pub id: String,
    /// Identity of the storage.
    pub storage: String,
    /// Disks on that storage now.
    #[serde(default)]
    pub disks: Vec<String>,
    pub health: Health,
    /// Why it cannot be used, such as another version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// When it was last saved; absent when it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_unix_ms: Option<u64>,
    /// Runs recorded, of all phases.
    pub runs: u64,
    /// Size as saved.
    pub size_bytes: u64,
    /// Memory when held; 0 when not.
    pub memory_bytes: u64,
    /// Contexts of the Markov tables.
    pub contexts: u64,
    #[serde(default)]
    pub phases: Vec<ProfilePhase>,
}

/// One phase of a profile: the set of blocks first touched in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ProfilePhase {
    /// `boot`, or a program's name.
    pub kind: String,
    pub extents: u64,
    pub size_bytes: u64,
    pub runs: u64,
}

/// All profiles.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ProfileList {
    pub profiles: Vec<Profile>,
}

/// What was written to the store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Saved {
    pub profiles: u32,
    pub size_bytes: u64,
}
