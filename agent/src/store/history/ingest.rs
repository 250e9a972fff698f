//! Accesses in; retention; segments of the version before.
//!
//! A disk's accesses come a segment at a time: 65,536 of them, or what a minute brought. Small segments are joined with the one before of
//! the same stream while that is at most half as large again, the sum fits a segment, and all lie within an hour: a row of a few hundred
//! accesses wastes half a page of the database and an entry in each index. So a stream has a few small segments, and an access is encoded
//! again only when its segment grows by two thirds.
//!
//! Retention removes whole segments. Runs, roll-ups and index rows go when no access of their time is left.

use rusqlite::{Connection, OptionalExtension, params};

use super::index;
use super::{Accesses, Retention, data, decoder, hours};
use crate::store::records::{int, storage_id, unsigned};
use crate::store::segment::{self, AccessRecord, CHUNK_ACCESSES, SEGMENT_ACCESSES_MAX, SegmentError, get, put};
use crate::store::writer::{Pending, WorkError};
use crate::store::{Store, StoreError};

/// A joined segment spans at most this: retention by age removes whole segments.
const JOINED_US: u64 = 3_600_000_000;
/// Room of a run with its entries in the indexes.
pub(super) const RUN_BYTES: u64 = 128;
/// Outcomes are kept for a year and a month whatever the history's age: a few thousand rows a disk, to compare with last year's.
const OUTCOME_HOURS: u64 = 24 * 400;

/// Times of a chunk, Unix µs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkTimes {
    pub(super) from_us: u64,
    pub(super) to_us: u64,
}

fn span(records: &[AccessRecord]) -> ChunkTimes {
    let (from_us, to_us) =
        records.iter().fold((u64::MAX, 0), |(from, to), access| (from.min(access.at_us), to.max(access.at_us)));
    ChunkTimes { from_us, to_us }
}

/// LEB128 numbers: from when on, as difference to the segment's, and for how long.
fn encode_times(records: &[AccessRecord]) -> (ChunkTimes, Vec<u8>) {
    let all = span(records);
    let mut bytes = Vec::new();
    for chunk in records.chunks(CHUNK_ACCESSES).map(span) {
        put(&mut bytes, chunk.from_us - all.from_us);
        put(&mut bytes, chunk.to_us - chunk.from_us);
    }
    (all, bytes)
}

/// Times of the chunks of a segment that begins at `from_us`.
pub(super) fn decode_times(from_us: u64, bytes: &[u8]) -> Result<Vec<ChunkTimes>, SegmentError> {
    let (mut at, mut times) = (0, Vec::new());
    while at < bytes.len() {
        let from_us = from_us.saturating_add(get(bytes, &mut at)?);
        times.push(ChunkTimes { from_us, to_us: from_us.saturating_add(get(bytes, &mut at)?) });
    }
    Ok(times)
}

impl Store {
    /// Adds accesses to the history; encoded on the writer's thread. Errors: `Segment` unless there are 1 to 65,536 within range.
    pub fn append_accesses(&self, accesses: Accesses) -> Pending {
        let size = (accesses.records.len() * size_of::<AccessRecord>()) as u64;
        self.inner.writer.submit(size, false, move |connection| append(connection, &accesses))
    }

    /// Removes history older than `retention.age` and, oldest first, what exceeds `retention.bytes`; gives the space back.
    pub fn retain(&self, retention: Retention, now_unix_ms: u64) -> Pending {
        let age_us = u64::try_from(retention.age.as_micros()).unwrap_or(u64::MAX);
        let oldest_us = now_unix_ms.saturating_mul(1000).saturating_sub(age_us);
        let oldest_hour = (now_unix_ms / 3_600_000).saturating_sub(OUTCOME_HOURS);
        self.inner.writer.submit(0, true, move |connection| {
            connection.execute("DELETE FROM outcomes WHERE hour < ?", [int(oldest_hour)])?;
            connection.execute("DELETE FROM segments WHERE to_us < ?", [int(oldest_us)])?;
            connection.execute("DELETE FROM runs WHERE ifnull(ended_us, started_us) < ?", [int(oldest_us)])?;
            connection.execute("DELETE FROM hours WHERE (hour + 1) * 3600000000 <= ?", [int(oldest_us)])?;
            sweep(connection)?;
            // Index and roll-ups shrink with the segments, but not in step with each: the second round sees to what the first left over.
            for _ in 0..4 {
                let sql = "SELECT (SELECT ifnull(sum(size_bytes), 0) FROM segments), (SELECT ifnull(sum(size_bytes), 0) FROM groups)
                    + (SELECT ifnull(sum(length(data)), 0) FROM hours) + (SELECT count(*) FROM runs) * ?";
                let (data, rest) =
                    connection.query_row(sql, [int(RUN_BYTES)], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?;
                let all = data.saturating_add(rest);
                if all <= retention.bytes {
                    break;
                }
                let share = u128::from(retention.bytes) * u128::from(data) / u128::from(all);
                // Sums from the newest on; what is beyond the limit goes.
                connection.execute(
                    "DELETE FROM segments WHERE id IN (SELECT id FROM (
                        SELECT id, sum(size_bytes) OVER (ORDER BY to_us DESC, id DESC) AS newer FROM segments) WHERE newer > ?)",
                    [int(u64::try_from(share).unwrap_or(u64::MAX))],
                )?;
                sweep(connection)?;
            }
            Ok(())
        })
    }
}

/// Removes what belongs to segments that are gone.
fn sweep(connection: &Connection) -> Result<(), WorkError> {
    connection.execute("DELETE FROM chunks WHERE segment_id NOT IN (SELECT id FROM segments)", [])?;
    connection.execute("DELETE FROM groups WHERE id NOT IN (SELECT group_id FROM chunks)", [])?;
    connection.execute("DELETE FROM touches WHERE group_id NOT IN (SELECT id FROM groups)", [])?;
    index::shrink_groups(connection)?;
    // Of a storage without segments nothing is kept, but a run that goes on.
    connection.execute(
        "DELETE FROM runs WHERE ended_us < ifnull(
            (SELECT min(from_us) FROM segments WHERE segments.storage_id = runs.storage_id), 9223372036854775807)",
        [],
    )?;
    connection.execute(
        "DELETE FROM hours WHERE (hour + 1) * 3600000000 <= ifnull(
            (SELECT min(from_us) FROM segments WHERE segments.storage_id = hours.storage_id), 9223372036854775807)",
        [],
    )?;
    Ok(())
}

/// The newest segment of a stream, if it may be joined: its number, its group, its accesses.
fn tail(
    connection: &Connection,
    storage: i64,
    accesses: &Accesses,
    new: ChunkTimes,
) -> Result<Option<Tail>, WorkError> {
    let sql = "SELECT newest.id, group_id, accesses FROM
            (SELECT id, from_us, accesses, program FROM segments WHERE storage_id = ? AND vm = ? ORDER BY from_us DESC LIMIT 1) AS newest
        JOIN chunks ON segment_id = newest.id JOIN groups ON groups.id = group_id
        WHERE groups.segments = 1 AND program = ? AND from_us >= ? AND from_us <= ?";
    let oldest = new.to_us.saturating_sub(JOINED_US);
    let tail = connection
        .prepare(sql)?
        .query_row(params![storage, accesses.vm, accesses.program, int(oldest), int(new.to_us)], |row| {
            Ok(Tail { segment: row.get(0)?, group: row.get(1)?, accesses: unsigned(row, 2)? as usize })
        });
    Ok(tail.optional()?)
}

struct Tail {
    segment: i64,
    group: i64,
    accesses: usize,
}

/// Adds accesses as a segment, joined with the one before where that is small.
fn append(connection: &Connection, accesses: &Accesses) -> Result<(), WorkError> {
    let storage = storage_id(connection, &accesses.storage)?;
    let mut joined: Option<Vec<AccessRecord>> = None;
    loop {
        let records = joined.as_deref().unwrap_or(&accesses.records);
        if records.len() >= SEGMENT_ACCESSES_MAX {
            break;
        }
        let Some(tail) = tail(connection, storage, accesses, span(records))? else { break };
        if tail.accesses + records.len() > SEGMENT_ACCESSES_MAX || 2 * tail.accesses > 3 * records.len() {
            break;
        }
        let Some(bytes) = data(connection, tail.segment)? else { break };
        let mut before = match decoder()?.decode(&bytes) {
            Ok(before) => before,
            Err(error) => {
                tracing::warn!(segment = tail.segment, %error, "a segment of history stays by itself");
                break;
            }
        };
        before.extend_from_slice(records);
        joined = Some(before);
        connection.execute("DELETE FROM segments WHERE id = ?", [tail.segment])?;
        connection.execute("DELETE FROM chunks WHERE segment_id = ?", [tail.segment])?;
        index::remove_group(connection, tail.group)?;
    }
    let records = joined.as_deref().unwrap_or(&accesses.records);
    let data = segment::encode(records).map_err(StoreError::from)?;
    let times = span(records);
    connection
        .prepare(
            "INSERT INTO segments (storage_id, vm, program, from_us, to_us, accesses, size_bytes, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            storage,
            accesses.vm,
            accesses.program,
            int(times.from_us),
            int(times.to_us),
            int(records.len() as u64),
            int(data.len() as u64),
            data
        ])?;
    enter(connection, storage, connection.last_insert_rowid(), records)?;
    hours::add(connection, storage, &accesses.records)?;
    merge_groups(connection, storage, times.to_us)
}

/// Merges groups of the index whose segments [`append`] will not join with what comes after `now_us`.
fn merge_groups(connection: &Connection, storage: i64, now_us: u64) -> Result<(), WorkError> {
    // What is joined holds at least two thirds of the accesses of what it is joined with.
    let most = SEGMENT_ACCESSES_MAX as u64 * 3 / 5;
    index::merge_groups(connection, storage, most, now_us.saturating_sub(JOINED_US))
}

/// Enters a segment into the index.
fn enter(connection: &Connection, storage: i64, segment: i64, records: &[AccessRecord]) -> Result<(), WorkError> {
    let group = index::add_group(connection, storage, &index::touches(segment, records))?;
    let (_, times) = encode_times(records);
    connection
        .prepare("INSERT INTO chunks (segment_id, group_id, times) VALUES (?, ?, ?)")?
        .execute(params![segment, group, times])?;
    Ok(())
}

/// Brings the next segment after `after` that is not in the index to this version and enters it. Returns it, or `None` when all are.
pub(in crate::store) fn upgrade(connection: &Connection, after: i64) -> Result<Option<i64>, WorkError> {
    // Of all segments by an index that has their numbers: in the table each is on a page of its own, and this is asked at every start.
    let sql =
        "SELECT id, storage_id, data FROM segments WHERE id = (SELECT min(+id) FROM segments INDEXED BY segments_by_age
        LEFT JOIN chunks ON segment_id = id WHERE to_us >= 0 AND id > ? AND segment_id IS NULL)";
    let next: Option<(i64, i64, Vec<u8>)> =
        connection.prepare(sql)?.query_row([after], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).optional()?;
    let Some((id, storage, old)) = next else { return Ok(None) };
    match decoder()?.decode(&old) {
        Ok(records) => {
            let data = segment::encode(&records).map_err(StoreError::from)?;
            connection.prepare("UPDATE segments SET data = ?, size_bytes = ? WHERE id = ?")?.execute(params![
                data,
                int(data.len() as u64),
                id
            ])?;
            enter(connection, storage, id, &records)?;
            hours::add(connection, storage, &records)?;
            merge_groups(connection, storage, span(&records).to_us)?;
        }
        Err(error) => tracing::warn!(segment = id, %error, "a segment of history is left as it is"),
    }
    Ok(Some(id))
}
