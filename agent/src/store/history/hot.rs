//! Which blocks were read most, hour by hour.

use super::{hours, storage_number};
use crate::store::records::{int, unsigned};
use crate::store::{Store, StoreError};

/// How often a block was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HotBlock {
    /// In 64 KiB.
    pub block: u64,
    /// At least; at most this and the hour's error.
    pub reads: u64,
}

/// The hottest blocks of an hour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotHour {
    /// Since the Unix epoch.
    pub hour: u64,
    /// Blocks read, in all: a read of two blocks counts for both.
    pub reads: u64,
    /// By how much any count may be too low; 0: counts are exact.
    pub error: u64,
    /// Most read first, at most `top`.
    pub blocks: Vec<HotBlock>,
}

impl Store {
    /// The `top` hottest blocks of a storage in each hour from `from_hour` to `to_hour` inclusive, latest hour first; hours without
    /// reads are left out. Errors: `NotFound`.
    pub fn hot(&self, storage: &str, from_hour: u64, to_hour: u64, top: usize) -> Result<Vec<HotHour>, StoreError> {
        self.ask(|connection| {
            let storage = storage_number(connection, storage)?;
            let hours: Vec<u64> = connection
                .prepare("SELECT hour FROM hours WHERE storage_id = ? AND hour BETWEEN ? AND ? ORDER BY hour DESC")?
                .query_map([storage, int(from_hour), int(to_hour)], |row| unsigned(row, 0))?
                .collect::<Result<_, _>>()?;
            let mut hot = Vec::with_capacity(hours.len());
            for hour in hours {
                let Some(summary) = hours::read(connection, storage, hour)?.filter(|summary| summary.reads > 0) else {
                    continue;
                };
                let counts = summary.counts.into_iter();
                let mut blocks: Vec<HotBlock> = counts.map(|(block, reads)| HotBlock { block, reads }).collect();
                blocks.sort_unstable_by_key(|hot| (std::cmp::Reverse(hot.reads), hot.block));
                blocks.truncate(top);
                hot.push(HotHour { hour, reads: summary.reads, error: summary.error, blocks });
            }
            Ok(hot)
        })
    }
}
