//! The words of the API: what goes over the wire, as plain data.
//!
//! Requests refuse unknown fields, so that a misspelt one is an error and not silently ignored; replies may gain fields within v1.
//! Sizes are bytes (`_bytes`), times are microseconds or milliseconds by suffix, points in time are Unix milliseconds (`_unix_ms`).
//!
//! - status: [`Status`], [`Problem`](super::Problem) is in `error.rs`
//! - disks: [`Disk`], [`DiskList`], [`DiskAdd`]; their size: [`DiskResize`], [`DiskResized`] in `types/resize.rs`; over NBD: [`DiskNbd`] in
//!   `types/nbd.rs`
//! - machines: [`Vm`], [`VmDisk`], [`VmList`], [`AttachRequest`], [`Attached`], [`Detached`]
//! - cache: [`CacheTiers`], [`CacheStat`], [`WarmRequest`], [`Warmed`], [`DropRequest`], [`Dropped`]
//! - profiles: [`Profile`], [`ProfileList`], [`Saved`]
//! - explanations: [`Explained`] in `types/explained.rs`
//! - a machine's memory: [`VmPages`] in `types/pages.rs`
//! - [`Counters`] are in `counters.rs`

mod explained;
mod nbd;
mod pages;
mod resize;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::templates::CloneProgress;

pub use super::counters::Counters;
pub use explained::{Attempt, BudgetUse, Explained, Fate, Governor, Place, Touch, Vote};
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

/// One virtual machine known to libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    pub uuid: String,
    pub name: String,
    /// `running`, `paused`, `shut off`, `crashed`, ….
    pub state: String,
    pub persistent: bool,
    /// Guest memory is shared, as vhost-user disks need.
    pub shared_memory: bool,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub disks: Vec<VmDisk>,
    /// What is read for it, if it was started from a template by this run of the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone: Option<CloneProgress>,
    /// How its memory fares; absent in lists, and where memory is not watched at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<VmPages>,
}

/// One disk of a virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Device name in the domain, such as `vda`.
    pub target: String,
    pub bus: String,
    /// `file`, `block`, `network`, `vhostuser`, ….
    pub kind: String,
    /// Path, URI or socket; absent for an empty drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    pub format: String,
    pub read_only: bool,
    /// Name of the prestaged disk that serves it, when attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attached: Option<String>,
}

/// All machines, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmList {
    pub vms: Vec<Vm>,
}

/// How to attach a machine's disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Add shared memory backing to the domain where it lacks it.
    #[serde(default)]
    pub enable_shared_memory: bool,
    /// Queues of the disk; default: one per vCPU, at most 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Name of the disk made; default `<vm>-<target>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// When a change of a domain takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TakesEffect {
    Now,
    /// The machine is running: with its next start (a reboot inside the guest is not enough).
    #[default]
    NextStart,
}

/// A machine's disk is now served by prestaged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Attached {
    pub vm: String,
    pub target: String,
    /// Name of the disk made.
    pub disk: String,
    pub store: String,
    pub socket: String,
    pub takes_effect: TakesEffect,
    /// What else was changed or should be known.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A machine's disk has its original source again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Detached {
    pub vm: String,
    pub target: String,
    /// Name of the disk that served it.
    pub disk: String,
    /// The source it has again.
    pub store: String,
    pub takes_effect: TakesEffect,
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A level of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TierName {
    #[default]
    Ram,
    Ssd,
}

/// Size, use and health of one tier.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Tier {
    pub tier: TierName,
    pub health: Health,
    /// Why it is degraded or off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Its size is not the configuration's, and for how long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_note: Option<String>,
    /// File or device of the SSD tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    pub capacity_bytes: u64,
    /// Blocks in use × block size.
    pub used_bytes: u64,
    /// Blocks in use.
    pub blocks: u64,
    /// Bytes that hold data: a block may be partly filled.
    pub valid_bytes: u64,
    /// Prefetched and not used yet.
    pub prefetched_unused_bytes: u64,
    /// Guest read requests served from this tier.
    pub hits: u64,
    pub insertions: u64,
    pub evictions: u64,
    /// Of the SSD tier: what it had from before the daemon started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
    /// What is cached, by storage, largest first.
    #[serde(default)]
    pub storages: Vec<StorageUse>,
}

/// What a tier holds of one storage.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct StorageUse {
    pub storage: String,
    /// Disks on that storage.
    pub disks: Vec<String>,
    pub used_bytes: u64,
}

/// The tiers, fastest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct CacheTiers {
    /// Unit of allocation.
    pub block_bytes: u64,
    pub tiers: Vec<Tier>,
}

/// Counters since the daemon started, total and by disk. Two of them make a rate: divide by the difference of `at_us`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct CacheStat {
    /// Start of the daemon: another value means that the counters began again at zero.
    pub started_unix_ms: u64,
    /// Monotonic time of this reading, from the start of the daemon.
    pub at_us: u64,
    /// Sum over all disks, also of those removed since.
    pub total: Counters,
    pub disks: BTreeMap<String, DiskStat>,
}

/// One disk's counters and state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct DiskStat {
    #[serde(flatten)]
    pub counters: Counters,
    #[serde(flatten)]
    pub state: DiskState,
}

/// A range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ByteRange {
    pub offset_bytes: u64,
    pub length_bytes: u64,
}

/// Most ranges of one warm request: 16 bytes each in memory, some 50 in JSON, within the body limit.
pub const RANGES_MAX: usize = 4096;

/// What to bring into the cache: `ranges`, or what `profile` learned; neither means the disk's own profile.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    pub disk: String,
    /// At most 4096 ranges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranges: Option<Vec<ByteRange>>,
    /// Id of a profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
}

impl WarmRequest {
    /// Checks what can be checked without the disk.
    pub fn validate(&self) -> Result<(), String> {
        validate_name(&self.disk)?;
        let Some(ranges) = &self.ranges else { return Ok(()) };
        if self.profile.is_some() {
            return Err("`ranges` and `profile` exclude each other; give one".to_owned());
        }
        if ranges.is_empty() || ranges.len() > RANGES_MAX {
            return Err(format!("`ranges` has {} entries; 1 to {RANGES_MAX} are allowed", ranges.len()));
        }
        for range in ranges {
            if range.length_bytes == 0 || range.offset_bytes.checked_add(range.length_bytes).is_none() {
                return Err(format!(
                    "range at {} of {} bytes is empty or ends beyond 2^64",
                    range.offset_bytes, range.length_bytes
                ));
            }
        }
        Ok(())
    }
}

/// What warming set in motion; it goes on in the background.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Warmed {
    /// To be read from the store.
    pub queued_bytes: u64,
    /// In RAM or on the SSD tier.
    pub already_cached_bytes: u64,
    /// Neither: did not fit the queue or the cache.
    pub refused_bytes: u64,
}

/// Which tiers to empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DropTier {
    Ram,
    Ssd,
    #[default]
    All,
}

/// What to take out of the cache. No guest data is lost: the cache never holds the only copy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DropRequest {
    #[serde(default)]
    pub tier: DropTier,
    /// Only blocks of this disk's storage; default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// What was taken out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Dropped {
    pub ram_bytes: u64,
    pub ssd_bytes: u64,
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
