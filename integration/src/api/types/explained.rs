//! Why a page was or was not prefetched, as data. Pages are 4 KiB, probabilities 0 to 1.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What is known of one page of a disk: where it is, who expects it, what was done about it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Explained {
    pub disk: String,
    /// Start of the page.
    pub offset_bytes: u64,
    pub place: Place,
    /// Whether predictions are handed to the cache at all.
    pub prefetch: bool,
    /// The operator's least probability.
    pub threshold: f32,
    /// Least probability that the predictor hands out.
    pub floor: f32,
    /// What each expert says at this moment, likeliest first.
    pub votes: Vec<Vote>,
    /// The guest read or wrote the page within the last minutes, this long ago (to the second).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub touched: Option<Touch>,
    /// Proposals of the page on record, newest first.
    pub attempts: Vec<Attempt>,
    /// How far back the record goes; the newest proposals of the storage are kept.
    pub record_us: u64,
    /// Mean time of this disk's reads that RAM did not serve: what a hit saves. Absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub miss_us: Option<f64>,
    /// What a page loaded in vain counts for in reads that miss, by the threshold: at threshold t, t / (1 - t). Absent at 1: nothing
    /// is worth it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vain_cost: Option<f32>,
    pub governor: Governor,
    pub budget: BudgetUse,
}

/// What the governor lets predictions cost at this moment. Learned sets do not ask it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Governor {
    /// Least probability that it lets through; absent: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<f32>,
    /// Bytes that may still be loaded and not read; below zero: the last went beyond.
    pub budget_bytes: i64,
    /// The most that it can grow to.
    pub most_bytes: u64,
    /// The page is likely enough by the threshold, and not for the governor.
    pub withholds: bool,
}

/// Where a page is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// The RAM tier has it.
    pub ram: bool,
    /// It came by prefetch and nobody has read it since.
    pub unread: bool,
    /// It is on its way into the RAM tier.
    pub loading: bool,
    /// It waits in the prefetch queue.
    pub queued: bool,
    /// The SSD tier has it: it is not prefetched into RAM.
    pub ssd: bool,
}

/// One expert's opinion of a page.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Vote {
    /// `sequential`, `backward`, `stride`, `spatial`, `markov`, `delta`, `phase`, `burst`.
    pub expert: String,
    /// The expert's own score.
    pub raw: f32,
    /// Probability by the record of such predictions.
    pub calibrated: f32,
    /// Share in the combination; absent where the likeliest vote alone decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f32>,
    /// Expected to be read this far from now; negative when it should have been. Absent when the expert does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_us: Option<i64>,
}

/// A guest's touch of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Touch {
    /// Since the block's last activity.
    pub ago_us: u64,
}

/// A proposal of a page, and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Attempt {
    pub ago_us: u64,
    pub expert: String,
    pub probability: f32,
    /// The operator's least probability at that time.
    pub threshold: f32,
    pub fate: Fate,
}

/// What became of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Its probability was below the operator's threshold.
    BelowThreshold,
    /// Prefetching was switched off.
    SwitchedOff,
    /// The prefetch queue was full.
    Refused,
    /// It waits for budget.
    Queued,
    /// It is being loaded.
    Loading,
    /// It is in RAM and nobody has read it yet.
    Unread,
    /// A guest read it.
    Used,
    /// A guest read it and had to wait for the rest of the transfer.
    Late,
    /// It left RAM, or was overwritten, before anybody read it.
    Evicted,
    /// It was not loaded: a guest asked first, or a tier had it already, or it was proposed again before its turn.
    Overtaken,
}

/// State of the storage's prefetch budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct BudgetUse {
    /// Bytes that may be under way.
    pub window_bytes: u64,
    /// Bytes under way.
    pub in_flight_bytes: u64,
    /// Bytes that wait in the queue.
    pub queued_bytes: u64,
}
