//! What a replay found. Counts are of requests or of 4 KiB pages; ratios are 0 ..= 1.

use serde::Serialize;

/// Serialises with these names.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    pub trace: String,
    pub policy: String,
    /// Share of the trace's distinct pages.
    pub cache: f64,
    pub capacity_pages: u64,
    pub block_bytes: u64,
    pub eviction: String,
    /// `null` for policies without.
    pub threshold: Option<f64>,
    /// Reads, writes and discards.
    pub requests: u64,
    pub reads: u64,
    /// Reads all of whose pages were cached, or on their way, when they came.
    pub read_hits: u64,
    pub read_hit_ratio: f64,
    /// Of the pages of reads.
    pub page_hit_ratio: f64,
    /// Pages that reads had to fetch.
    pub demand_pages: u64,
    pub prefetched_pages: u64,
    /// Prefetched pages that a read or write touched before they left.
    pub useful_pages: u64,
    /// Of those, pages that were still on their way.
    pub late_pages: u64,
    pub evicted_unused: u64,
    /// Useful of prefetched.
    pub precision: f64,
    /// Useful of (useful + demand): the share of what had to come from the store that was there before it was asked for.
    pub coverage: f64,
    /// Share of the useful pages that were not late.
    pub timeliness: f64,
    /// Evicted unused of prefetched.
    pub evicted_unused_ratio: f64,
    /// Expected calibration error over 20 bins, of the probability at issue against "used before eviction", over the pages
    /// of which one is known; `null` if none is.
    pub ece: Option<f64>,
    pub brier: Option<f64>,
    /// The same of all the policy's predictions, issued or not, against "read within its window", since the policy was
    /// made (what it was trained on included); `null` from a policy that keeps no account.
    pub ece_all: Option<f64>,
    pub brier_all: Option<f64>,
    /// Only in timed mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_latency_us: Option<ReadLatency>,
    pub cost: Cost,
    /// From one mark to the next, in order of time; only with marks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<PhaseReport>,
}

/// From a read's arrival to its last page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ReadLatency {
    pub mean: f64,
    pub p50: f64,
    pub p99: f64,
}

/// What the hits cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Pages read from the store: on demand and ahead.
    pub store_pages: u64,
    /// Of the pages of reads.
    pub store_ratio: f64,
    /// Wall-clock time of the policy for a request; only where asked for, as it differs from run to run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predictor_ns_per_access: Option<f64>,
}

/// A stretch of the trace between two marks.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PhaseReport {
    /// `-` between programs.
    pub name: String,
    pub start_us: u64,
    pub reads: u64,
    pub read_hits: u64,
    pub read_hit_ratio: f64,
    /// Issued in this stretch.
    pub prefetched_pages: u64,
    /// Of those, used, whenever that was.
    pub useful_pages: u64,
    pub late_pages: u64,
    pub precision: f64,
}

/// `part` of `whole`; 0 for nothing of nothing.
#[must_use]
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
