//! Series: what machines, programs and the host used, second by second, compressed, with roll-ups for what is long ago.
//!
//! - `codec.rs`: samples and buckets as bytes
//! - `ingest.rs`: samples in, chunks and roll-ups made of them
//! - `retain.rs`: what goes, and when
//! - `query.rs`: what is asked
//!
//! A series has a *subject* (`vm:UUID`, `program:HASH`, `host`) and a *metric*. Its values are whole multiples of its resolution.
//!
//! | level | a row is | a chunk spans |
//! | --- | --- | --- |
//! | 0 | a sample, at most one a second | 10 minutes |
//! | 1 | 10 s: count, minimum, mean, maximum | 1 hour |
//! | 2 | 5 minutes: the same | 12 hours |
//! | 3 | 1 hour: the same | 8 days |
//!
//! A batch of samples of all series is one row of a journal: what is committed is there after a crash. Once a batch begins a new
//! ten minutes, the journal of those before becomes chunks, and the chunks of the roll-ups are written anew with what came in, in one
//! transaction. Questions see chunks and journal as one. A damaged row costs what is in it: a chunk its ten minutes (of a roll-up: its span),
//! a batch its seconds.
//!
//! A chunk's number is its level, its time and its series: those of a moment lie together, so that writing them touches few pages of the
//! database, and retention gives whole pages back.

mod codec;
mod ingest;
mod query;
mod retain;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use query::{Answer, Point, SeriesRow};

/// Most series; a thousand machines have some twelve each. Further ones are refused, which the batch's outcome says.
pub const SERIES_MAX: usize = 16_384;
/// Most points of an answer: 55 hours by the second.
pub const POINTS_MAX: u64 = 200_000;

/// Resolutions of what is measured here: a value is stored as so many of them.
pub mod resolution {
    /// Cores in use: a thousandth of one.
    pub const CORES: f64 = 0.001;
    /// Bytes, and bytes a second. Pages and sectors cost no more than they hold: a chunk finds its unit.
    pub const BYTES: f64 = 1.0;
    /// Operations a second.
    pub const OPERATIONS: f64 = 1.0;
    /// Shares of time, such as those of pressure stall information, in percent.
    pub const PERCENT: f64 = 0.01;
}

pub(super) const TABLES: &str = "
-- Numbers are never used twice: what is left of a series that is gone belongs to nobody.
CREATE TABLE series (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    subject TEXT NOT NULL,
    metric TEXT NOT NULL,
    resolution REAL NOT NULL,
    last_s INTEGER NOT NULL,
    UNIQUE (subject, metric)
);
-- Batches that are in no chunk yet (series/codec.rs: frame).
CREATE TABLE series_journal (
    id INTEGER PRIMARY KEY,
    from_s INTEGER NOT NULL,
    to_s INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX series_journal_by_time ON series_journal(from_s, to_s);
-- id: level, number of the time span, number of the series (series/mod.rs).
CREATE TABLE series_chunks (
    id INTEGER PRIMARY KEY,
    data BLOB NOT NULL
);
CREATE TABLE series_levels (
    level INTEGER PRIMARY KEY,
    chunks INTEGER NOT NULL,
    bytes INTEGER NOT NULL
);
INSERT INTO series_levels VALUES (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0);
";

/// A level's step and the span of its chunks. Each step divides the next, each span is whole steps of the next level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Level {
    number: usize,
    step_s: u64,
    span_s: u64,
}

const LEVELS: [Level; 4] = [
    Level { number: 0, step_s: 1, span_s: 600 },
    Level { number: 1, step_s: 10, span_s: 3600 },
    Level { number: 2, step_s: 300, span_s: 43_200 },
    Level { number: 3, step_s: 3600, span_s: 691_200 },
];

const SERIES_BITS: u32 = 24;
const SLOT_BITS: u32 = 32;

impl Level {
    fn slot(self, at_s: u64) -> u64 {
        at_s / self.span_s
    }

    /// Numbers of the chunks of a slot begin here.
    fn key(self, slot: u64) -> i64 {
        let slot = slot.min((1 << SLOT_BITS) - 1);
        ((self.number as i64) << (SLOT_BITS + SERIES_BITS)) | (slot << SERIES_BITS) as i64
    }

    fn slot_of(key: i64) -> u64 {
        (key >> SERIES_BITS) as u64 & ((1 << SLOT_BITS) - 1)
    }
}

/// A value at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Unix time in seconds. Of two in the same second the later handed over counts; roll-ups may count both.
    pub at_s: u64,
    /// In the metric's unit, finite; up to 2^53 resolutions from zero.
    pub value: f64,
}

/// New samples of one series.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    /// `vm:UUID`, `program:HASH`, `host`.
    pub subject: String,
    pub metric: String,
    /// What a value is rounded to a multiple of, above zero; that of the series' first samples holds for good. See [`resolution`].
    pub resolution: f64,
    /// In any order; what is not finite, or beyond 2^53 resolutions or 2^40 seconds, is left out.
    pub readings: Vec<Reading>,
}

/// How much is kept of series.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeriesRetention {
    /// Of the levels: samples, 10 s, 5 minutes, 1 hour.
    pub age: [Duration; 4],
    /// Of chunks and journal; the finest goes first, down to a day of it, then the next.
    pub bytes: u64,
}

impl Default for SeriesRetention {
    fn default() -> Self {
        const DAY: Duration = Duration::from_secs(86_400);
        // What forecasts learn from are weeks by the five minutes; by the second is for looking at yesterday. A hundred machines with
        // twelve metrics each take some 800 MiB so.
        Self { age: [DAY * 2, DAY * 7, DAY * 90, DAY * 730], bytes: 1 << 30 }
    }
}

/// How much there is of series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SeriesStatus {
    pub series: u64,
    /// Of the levels: samples, 10 s, 5 minutes, 1 hour.
    pub chunks: [u64; 4],
    pub chunk_bytes: [u64; 4],
    pub journal_bytes: u64,
}

impl SeriesStatus {
    /// All that series take, without SQLite's own.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.chunk_bytes.iter().sum::<u64>() + self.journal_bytes
    }
}

/// Value of a number of resolutions.
fn value(units: i64, resolution: f64) -> f64 {
    // Dividing by a whole number is exact to the last bit, multiplying by 0.001 is not.
    let parts = (1.0 / resolution).round();
    if resolution < 1.0 && (parts * resolution - 1.0).abs() < 1e-9 {
        units as f64 / parts
    } else {
        units as f64 * resolution
    }
}
