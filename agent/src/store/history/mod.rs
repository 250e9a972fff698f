//! History: what guests accessed and when, and the questions it answers without holding up whoever writes it.
//!
//! - `ingest.rs`: accesses in, small segments joined, retention, segments of the version before
//! - `runs.rs`: executions of a phase, and what was read in them, in order
//! - `hours.rs`, `hot.rs`: hottest blocks by hour
//! - `index.rs`, `near.rs`: which segments read a block; how often two blocks are read within a moment
//!
//! Questions are asked on read-only connections of their own, each in one transaction: they see one state of the database, and neither
//! the writer nor the learner waits for them. They block their thread.

mod hot;
mod hours;
mod index;
mod ingest;
mod near;
mod runs;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rusqlite::blob::Blob;
use rusqlite::{Connection, MAIN_DB, OptionalExtension, Row, params};

use super::records::{int, unsigned};
use super::segment::{AccessRecord, Decoder, Layout, SegmentError};
use super::writer::WorkError;
use super::{Store, StoreError, reader, refused};

pub use hot::{HotBlock, HotHour};
pub use index::BLOCK_PAGES;
pub(super) use ingest::upgrade;
pub use near::{NEAR_LIMIT, Near, NearLimit};
pub use runs::{Extent, RunReads, RunRow, RunsOf};

/// Connections for questions that are kept open between them.
const IDLE_READERS: usize = 4;

/// Accesses of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accesses {
    /// Identity of the storage.
    pub storage: String,
    /// Machine, or empty.
    pub vm: String,
    /// Program or phase, such as `boot`, or empty.
    pub program: String,
    /// 1 to 65,536 of them.
    pub records: Vec<AccessRecord>,
}

/// One segment of history, without its accesses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentRow {
    pub id: i64,
    pub storage: String,
    pub vm: String,
    pub program: String,
    /// Earliest and latest access, Unix µs.
    pub from_us: u64,
    pub to_us: u64,
    pub accesses: u64,
    pub size_bytes: u64,
}

/// How much history to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    pub age: Duration,
    /// Of segments, their index, roll-ups and runs as stored.
    pub bytes: u64,
}

/// How much history there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HistoryStatus {
    pub segments: u64,
    pub accesses: u64,
    /// Of the accesses.
    pub data_bytes: u64,
    /// Of the index by block.
    pub index_bytes: u64,
    /// Of the roll-ups by hour.
    pub hours_bytes: u64,
    pub hours: u64,
    pub runs: u64,
    /// Earliest and latest access, Unix µs; 0 of none.
    pub oldest_us: u64,
    pub newest_us: u64,
    /// Segments of the version before that are not in the index yet.
    pub unindexed: u64,
    /// Accesses and bytes of the segments that end within the last hour.
    pub last_hour_accesses: u64,
    pub last_hour_bytes: u64,
}

impl HistoryStatus {
    /// All that history takes, without SQLite's own.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.data_bytes + self.index_bytes + self.hours_bytes + self.runs * ingest::RUN_BYTES
    }
}

impl Store {
    /// Asks on a connection of its own, in one transaction.
    pub(super) fn ask<T>(&self, question: impl FnOnce(&Connection) -> Result<T, WorkError>) -> Result<T, StoreError> {
        let path = &self.inner.path;
        let failed = |error| refused(path, "read history from", error);
        let idle = self.inner.history.lock().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => reader(path, self.inner.busy_timeout)?,
        };
        let transaction = connection.unchecked_transaction().map_err(failed)?;
        let answer = question(&transaction);
        drop(transaction);
        let mut idle = self.inner.history.lock();
        if idle.len() < IDLE_READERS {
            idle.push(connection);
        }
        answer.map_err(|error| match error {
            WorkError::Database(error) => failed(error),
            WorkError::Request(error) => error,
        })
    }

    /// Identities of all storages ever seen.
    pub fn storages(&self) -> Result<Vec<String>, StoreError> {
        self.ask(|connection| {
            let mut statement = connection.prepare("SELECT identity FROM storages ORDER BY id")?;
            let rows = statement.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Segments of a storage (and machine, when given) that touch `from_us..=to_us`, in time order.
    pub fn segments(
        &self,
        storage: &str,
        vm: Option<&str>,
        from_us: u64,
        to_us: u64,
    ) -> Result<Vec<SegmentRow>, StoreError> {
        self.ask(|connection| {
            let sql = "SELECT segments.id, identity, vm, program, from_us, to_us, accesses, size_bytes FROM segments
                JOIN storages ON storages.id = storage_id
                WHERE identity = ?1 AND (?2 IS NULL OR vm = ?2) AND from_us <= ?4 AND to_us >= ?3 ORDER BY from_us, segments.id";
            let row = |row: &Row<'_>| {
                Ok(SegmentRow {
                    id: row.get(0)?,
                    storage: row.get(1)?,
                    vm: row.get(2)?,
                    program: row.get(3)?,
                    from_us: unsigned(row, 4)?,
                    to_us: unsigned(row, 5)?,
                    accesses: unsigned(row, 6)?,
                    size_bytes: unsigned(row, 7)?,
                })
            };
            let mut statement = connection.prepare(sql)?;
            let rows = statement.query_map(params![storage, vm, int(from_us), int(to_us)], row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// Accesses of a segment. Errors: `NotFound` (retention may have taken it), `Segment` when damaged.
    pub fn segment(&self, id: i64) -> Result<Vec<AccessRecord>, StoreError> {
        self.ask(|connection| {
            let data = data(connection, id)?;
            let data = data.ok_or(StoreError::NotFound { what: "segment", name: id.to_string() })?;
            Ok(decoder()?.decode(&data).map_err(StoreError::from)?)
        })
    }

    /// How much history there is as of `now_us`, Unix µs.
    pub fn history(&self, now_us: u64) -> Result<HistoryStatus, StoreError> {
        self.ask(|connection| {
            let mut status = HistoryStatus::default();
            let one = |sql: &str, into: &mut [&mut u64]| {
                connection.query_row(sql, [], |row| {
                    into.iter_mut().enumerate().try_for_each(|(at, value)| {
                        **value = unsigned(row, at)?;
                        Ok(())
                    })
                })
            };
            let HistoryStatus { segments, accesses, data_bytes, newest_us, .. } = &mut status;
            one(
                "SELECT count(*), ifnull(sum(accesses), 0), ifnull(sum(size_bytes), 0), ifnull(max(to_us), 0) FROM segments",
                &mut [segments, accesses, data_bytes, newest_us],
            )?;
            one("SELECT ifnull(min(from_us), 0) FROM segments", &mut [&mut status.oldest_us])?;
            one("SELECT ifnull(sum(size_bytes), 0) FROM groups", &mut [&mut status.index_bytes])?;
            one("SELECT count(*), ifnull(sum(length(data)), 0) FROM hours", &mut [&mut status.hours, &mut status.hours_bytes])?;
            one("SELECT count(*) FROM runs", &mut [&mut status.runs])?;
            one(
                "SELECT count(*) FROM segments LEFT JOIN chunks ON segment_id = id WHERE segment_id IS NULL",
                &mut [&mut status.unindexed],
            )?;
            let hour = now_us.saturating_sub(3_600_000_000);
            let HistoryStatus { last_hour_accesses, last_hour_bytes, .. } = &mut status;
            one(
                &format!("SELECT ifnull(sum(accesses), 0), ifnull(sum(size_bytes), 0) FROM segments WHERE to_us >= {}", int(hour)),
                &mut [last_hour_accesses, last_hour_bytes],
            )?;
            Ok(status)
        })
    }
}

/// Number of a storage. Errors: `NotFound` when nothing is known of it.
fn storage_number(connection: &Connection, identity: &str) -> Result<i64, WorkError> {
    let known =
        connection.prepare("SELECT id FROM storages WHERE identity = ?")?.query_row([identity], |row| row.get(0));
    let known: Option<i64> = known.optional()?;
    Ok(known.ok_or_else(|| StoreError::NotFound { what: "history of storage", name: identity.to_owned() })?)
}

/// Bytes of a segment.
fn data(connection: &Connection, segment: i64) -> rusqlite::Result<Option<Vec<u8>>> {
    connection.prepare("SELECT data FROM segments WHERE id = ?")?.query_row([segment], |row| row.get(0)).optional()
}

fn decoder() -> Result<Decoder, StoreError> {
    Ok(Decoder::new()?)
}

/// A segment of which single chunks are read: its other pages are not touched.
struct Chunks<'a> {
    blob: Blob<'a>,
    layout: Layout,
    buffer: Vec<u8>,
}

impl<'a> Chunks<'a> {
    fn open(connection: &'a Connection, segment: i64) -> Result<Self, WorkError> {
        let blob = connection.blob_open(MAIN_DB, "segments", "data", segment, true)?;
        let mut head = vec![0; Layout::HEAD_BYTES_MAX.min(blob.len())];
        blob.read_at_exact(&mut head, 0)?;
        Ok(Self { layout: Layout::new(&head).map_err(StoreError::from)?, blob, buffer: Vec::new() })
    }

    /// Adds a chunk's accesses to `records`.
    fn read(&mut self, index: usize, decoder: &mut Decoder, records: &mut Vec<AccessRecord>) -> Result<(), WorkError> {
        let place = self.layout.chunk(index).map_err(StoreError::from)?;
        // As long as the blob at most: a length that was never written cannot ask for more.
        if place.bytes.end > self.blob.len() {
            return Err(StoreError::from(SegmentError::Damaged("cut short")).into());
        }
        self.buffer.resize(place.bytes.len(), 0);
        self.blob.read_at_exact(&mut self.buffer, place.bytes.start)?;
        Ok(decoder.chunk(&self.buffer, place.accesses, records).map_err(StoreError::from)?)
    }
}
