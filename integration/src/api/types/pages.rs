//! A machine's memory: what is seen of its pages, and what is done about them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Health;
use crate::api::demand::Mode;

/// How a machine's memory fares. Counts are since the daemon first saw the machine run; it counts pages of 4 KiB.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmPages {
    pub health: Health,
    /// In words: watched or why not.
    pub state: String,
    /// `act`: pages are brought in. `recommend` is as `observe` here.
    pub mode: Mode,
    /// How faults are seen; absent while nothing is watched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
    /// Better signals, and why it is none of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<PassedOver>,
    /// What the helper may not do on this host, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// Every so many faults are looked at (or milliseconds between two looks, where faults do not come one by one); 0: none.
    pub period: u32,
    /// Memory by where it is; absent where that cannot be seen. What was brought in and not touched counts as swapped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub present_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swapped_bytes: Option<u64>,
    /// Never touched, or given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absent_bytes: Option<u64>,
    /// Faults that were looked at.
    pub faults: u64,
    /// Faults that were to be looked at and were lost.
    pub faults_lost: u64,
    /// What programs are known to touch.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<PagesSet>,
    /// Sets that were left because the guest went elsewhere.
    pub sets_cut: u64,
    /// Times that a known program was recognised which nobody had announced.
    #[serde(default)]
    pub recognised: u64,
    /// Why pages wait to be brought in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
    /// Brought in.
    pub staged_bytes: u64,
    /// Brought in before the guest touched it.
    pub used_bytes: u64,
    /// Foreseen, but the guest was there first.
    pub late_bytes: u64,
    /// Brought in and not touched for two minutes.
    pub wasted_bytes: u64,
    /// Brought in and not touched yet.
    pub unread_bytes: u64,
    /// CPU time that bringing in took.
    pub cpu_us: u64,
    /// Pushed out as idle; and what the machine has read back since it is watched, whoever put it out.
    pub pushed_bytes: u64,
    pub refaulted_bytes: u64,
    /// Orders to push out that failed.
    pub push_failed: u64,
    /// CPU time that pushing out took.
    pub push_cpu_us: u64,
    /// In words: pages are pushed out, or why not; absent while that is switched off for all machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push_state: Option<String>,
}

/// Guests' memory as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct MemoryStatus {
    pub health: Health,
    /// Why it is degraded, or off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Machines that are watched, of those that run.
    pub watched: u32,
    pub machines: u32,
    /// Sums over machines that run, as in [`VmPages`].
    pub staged_bytes: u64,
    pub used_bytes: u64,
    pub wasted_bytes: u64,
    pub faults_lost: u64,
}

/// A signal that is not used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct PassedOver {
    pub signal: String,
    pub why: String,
}

/// Pages that a program touches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct PagesSet {
    /// `program` and the hash of its name and tags.
    pub program: String,
    /// Times it was seen.
    pub runs: u32,
    pub size_bytes: u64,
}
