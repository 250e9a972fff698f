//! One replay's figures: a row of the tables and of the JSON file.

use serde::Serialize;

use crate::peers::{Counts, Latency};
use crate::record::ratio;

/// A method on a trace with a cache of one size. Pages are 4 KiB; the keys up to `precision` and `read_latency_us` are those
/// of the field's trace simulators.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Row {
    pub(crate) trace: String,
    pub(crate) policy: String,
    /// Who measured it.
    pub(crate) by: By,
    /// Share of the trace's distinct pages.
    pub(crate) cache: f64,
    pub(crate) capacity_pages: usize,
    pub(crate) requests: usize,
    pub(crate) reads: u64,
    pub(crate) read_hits: u64,
    pub(crate) read_hit_ratio: f64,
    pub(crate) page_hit_ratio: f64,
    pub(crate) demand_pages: u64,
    pub(crate) prefetched_pages: u64,
    pub(crate) useful_pages: u64,
    pub(crate) late_pages: u64,
    pub(crate) evicted_unused: u64,
    /// Used pages of those prefetched; 0 where none was.
    pub(crate) precision: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) read_latency_us: Option<Latency>,
    /// Of the store, in timed mode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) latency_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) threshold: Option<f64>,
    /// Share of the pages that had to come from the store which came by prefetch.
    pub(crate) coverage: f64,
    /// Share of the used prefetched pages that were there in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) timeliness: Option<f64>,
    /// Pages that left the store, demand and prefetch.
    pub(crate) store_pages: u64,
    /// Expected calibration error and Brier score of the probabilities at issue, for methods that state any: a page counts
    /// when it was issued, and was right if it was used before it left the cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ece: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) brier: Option<f64>,
    /// The same of every prediction, issued or not: right if the page was read within the prediction's window.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ece_all: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) brier_all: Option<f64>,
    /// The method's own time for an access, without the cache; measured with nothing beside it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ns_per_access: Option<f64>,
}

/// Who measured a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum By {
    /// The peers' simulator in this program.
    #[default]
    Peers,
    /// The Python package of that name.
    Libcachesim,
    /// The policy core and predictor of this project.
    Prestage,
}

impl Row {
    /// A row of what a simulator has counted.
    pub(crate) fn of(counts: &Counts, latency: Option<Latency>) -> Self {
        let share = |part, whole| ratio(part, whole).unwrap_or(0.0);
        Self {
            capacity_pages: counts.capacity_pages,
            requests: counts.requests,
            reads: counts.reads,
            read_hits: counts.read_hits,
            read_hit_ratio: share(counts.read_hits, counts.reads),
            page_hit_ratio: share(counts.page_hits, counts.read_pages),
            demand_pages: counts.demand_pages,
            prefetched_pages: counts.prefetched_pages,
            useful_pages: counts.useful_pages,
            late_pages: counts.late_pages,
            evicted_unused: counts.evicted_unused,
            precision: share(counts.useful_pages, counts.prefetched_pages),
            read_latency_us: latency,
            coverage: share(counts.useful_pages, counts.useful_pages + counts.demand_pages),
            timeliness: latency
                .and_then(|_| ratio(counts.useful_pages.saturating_sub(counts.late_pages), counts.useful_pages)),
            store_pages: counts.demand_pages + counts.prefetched_pages,
            ..Self::default()
        }
    }

    /// Share of the prefetched pages that left unused.
    pub(crate) fn wasted(&self) -> Option<f64> {
        ratio(self.evicted_unused, self.prefetched_pages)
    }

    /// The name in tables: the same word stands for different methods of different origin.
    pub(crate) fn label(&self) -> String {
        match self.by {
            By::Peers => self.policy.clone(),
            By::Libcachesim => format!("lcs {}", self.policy),
            By::Prestage => format!("our {}", self.policy),
        }
    }
}
