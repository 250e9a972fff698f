//! Hottest blocks by hour: roll-ups kept as accesses come in.
//!
//! An hour of a storage is a Misra–Gries summary, merged as in Agarwal et al., "Mergeable Summaries" (PODS 2012): counts add up; where
//! more blocks are counted than fit, the count of the largest that does not fit is taken off all and added to the hour's *error*. A
//! block was read at least as often as its count says and at most that and the error; one without a count at most as often as the
//! error, which is at most a (K+1)th of all reads. While all blocks of an hour fit, counts are exact and the error is 0.
//!
//! A row's blob is one zstd frame with a checksum, before it the number of counts as LEB128 (segment.rs); in it the counts by block: the
//! difference of the blocks, then all counts, as LEB128.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::index::blocks_read;
use crate::store::StoreError;
use crate::store::records::{int, unsigned};
use crate::store::segment::{AccessRecord, SegmentError, get, put};
use crate::store::writer::WorkError;

const HOUR_US: u64 = 3_600_000_000;
/// A count for every so many reads, so that a quiet hour takes no more room than its accesses' fraction,
const READS_A_COUNT: u64 = 32;
/// but at least and at most so many.
const COUNTS_MIN: usize = 64;
const COUNTS_MAX: usize = 1024;
const LEVEL: i32 = 9;

/// Reads by block, with what is not known of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Summary {
    /// Blocks read, in all: a read of two blocks counts for both.
    pub(super) reads: u64,
    /// By how much a count may be too low.
    pub(super) error: u64,
    pub(super) counts: BTreeMap<u64, u64>,
}

impl Summary {
    /// Adds another's and cuts down to what an hour may hold.
    fn add(&mut self, other: Summary) {
        self.reads += other.reads;
        self.error += other.error;
        for (block, count) in other.counts {
            *self.counts.entry(block).or_default() += count;
        }
        let most = usize::try_from(self.reads / READS_A_COUNT).unwrap_or(COUNTS_MAX).clamp(COUNTS_MIN, COUNTS_MAX);
        if self.counts.len() <= most {
            return;
        }
        let mut sorted: Vec<u64> = self.counts.values().copied().collect();
        let (_, &mut off, _) = sorted.select_nth_unstable_by(most, |a, b| b.cmp(a));
        self.error += off;
        self.counts.retain(|_, count| {
            *count = count.saturating_sub(off);
            *count > 0
        });
    }

    fn to_bytes(&self) -> Result<Vec<u8>, SegmentError> {
        let mut bytes = Vec::new();
        put(&mut bytes, self.counts.len() as u64);
        let mut columns = Vec::new();
        let mut last = 0;
        for block in self.counts.keys() {
            put(&mut columns, block - last);
            last = *block;
        }
        self.counts.values().for_each(|count| put(&mut columns, *count));
        let mut packer = zstd::bulk::Compressor::new(LEVEL).map_err(|_| SegmentError::Compression)?;
        packer.include_checksum(true).map_err(|_| SegmentError::Compression)?;
        bytes.append(&mut packer.compress(&columns).map_err(|_| SegmentError::Compression)?);
        Ok(bytes)
    }

    fn from_bytes(reads: u64, error: u64, bytes: &[u8]) -> Result<Self, SegmentError> {
        let mut at = 0;
        let number = usize::try_from(get(bytes, &mut at)?).unwrap_or(usize::MAX);
        if number > COUNTS_MAX {
            return Err(SegmentError::Damaged("number of counts"));
        }
        // Two numbers a count, of ten bytes at most.
        let columns = zstd::bulk::decompress(bytes.get(at..).unwrap_or_default(), number * 20)
            .map_err(|_| SegmentError::Damaged("compressed part"))?;
        let mut at = 0;
        let (mut blocks, mut last) = (Vec::with_capacity(number), 0u64);
        for _ in 0..number {
            last = last.wrapping_add(get(&columns, &mut at)?);
            blocks.push(last);
        }
        let mut counts = BTreeMap::new();
        for block in blocks {
            counts.insert(block, get(&columns, &mut at)?);
        }
        Ok(Self { reads, error, counts })
    }
}

/// Exact counts of some accesses, by hour since the Unix epoch.
fn by_hour(records: &[AccessRecord]) -> BTreeMap<u64, Summary> {
    let mut reads: Vec<(u64, u64)> = Vec::with_capacity(records.len());
    for record in records {
        let hour = record.at_us / HOUR_US;
        reads.extend(blocks_read(record).into_iter().flatten().map(|block| (hour, block)));
    }
    reads.sort_unstable();
    let mut hours: BTreeMap<u64, Summary> = BTreeMap::new();
    for same in reads.chunk_by(|a, b| a == b) {
        let Some((hour, block)) = same.first() else { continue };
        let summary = hours.entry(*hour).or_default();
        summary.reads += same.len() as u64;
        summary.counts.insert(*block, same.len() as u64);
    }
    hours
}

/// Adds accesses to the hours they fall in.
pub(super) fn add(connection: &Connection, storage: i64, records: &[AccessRecord]) -> Result<(), WorkError> {
    for (hour, new) in by_hour(records) {
        let mut summary = read(connection, storage, hour)?.unwrap_or_default();
        summary.add(new);
        let data = summary.to_bytes().map_err(StoreError::from)?;
        connection
            .prepare("REPLACE INTO hours (storage_id, hour, reads, error, data) VALUES (?, ?, ?, ?, ?)")?
            .execute(params![storage, int(hour), int(summary.reads), int(summary.error), data])?;
    }
    Ok(())
}

/// The roll-up of an hour. One that is damaged is told in the log and counts as none: it costs an hour's list, not the accesses.
pub(super) fn read(connection: &Connection, storage: i64, hour: u64) -> rusqlite::Result<Option<Summary>> {
    let sql = "SELECT reads, error, data FROM hours WHERE storage_id = ? AND hour = ?";
    let row: Option<(u64, u64, Vec<u8>)> = connection
        .prepare(sql)?
        .query_row(params![storage, int(hour)], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?, row.get(2)?)))
        .optional()?;
    let Some((reads, error, data)) = row else { return Ok(None) };
    match Summary::from_bytes(reads, error, &data) {
        Ok(summary) => Ok(Some(summary)),
        Err(error) => {
            tracing::warn!(storage, hour, %error, "an hour's roll-up is damaged; its list starts anew");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn counts_are_within_the_error_and_the_error_within_its_bound(
            parts in prop::collection::vec(prop::collection::vec(prop_oneof![0..20u64, 0..3000u64], 1..600), 1..12)) {
            let mut summary = Summary::default();
            let mut exact: BTreeMap<u64, u64> = BTreeMap::new();
            for part in parts {
                let mut new = Summary { reads: part.len() as u64, ..Summary::default() };
                for block in part {
                    *new.counts.entry(block).or_default() += 1;
                    *exact.entry(block).or_default() += 1;
                }
                summary.add(new);
                let bytes = summary.to_bytes().unwrap();
                prop_assert_eq!(&Summary::from_bytes(summary.reads, summary.error, &bytes).unwrap(), &summary);
            }
            for (block, count) in &exact {
                let least = summary.counts.get(block).copied().unwrap_or(0);
                prop_assert!(least <= *count && *count <= least + summary.error, "{} {} {}", least, count, summary.error);
            }
            prop_assert!(summary.counts.keys().all(|block| exact.contains_key(block)));
            prop_assert_eq!(summary.reads, exact.values().sum::<u64>());
            prop_assert!(summary.error <= summary.reads / (COUNTS_MIN as u64 + 1));
            prop_assert!(summary.error == 0 || exact.len() > COUNTS_MIN);
        }

        #[test]
        fn strangers_bytes_are_no_summary(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Summary::from_bytes(1, 0, &bytes);
        }
    }
}
