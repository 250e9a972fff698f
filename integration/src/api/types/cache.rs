//! The cache: its tiers, counters, and what is brought into it and taken out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Counters, DiskState, Health, Recovery, validate_name};

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
