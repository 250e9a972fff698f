//! What goes, and when: chunks by age, then the oldest of the finest level; series nobody has samples of.

use rusqlite::{Connection, params};

use super::ingest::Totals;
use super::{LEVELS, Level, SeriesRetention, SeriesStatus};
use crate::store::records::{int, unsigned};
use crate::store::writer::Pending;
use crate::store::{Store, StoreError};

/// What is kept of a level however little room there is, before the next coarser one is cut.
const FLOOR_S: u64 = 86_400;

impl Store {
    /// Removes what is older than its level's age and, where that leaves too much, the oldest of the finest levels; gives the space back.
    pub fn retain_series(&self, retention: SeriesRetention, now_s: u64) -> Pending {
        self.inner.writer.submit(0, true, move |connection| Ok(retain(connection, &retention, now_s)?))
    }

    /// How much there is of series.
    pub fn series_status(&self) -> Result<SeriesStatus, StoreError> {
        self.read("read series from", status)
    }
}

fn status(connection: &Connection) -> rusqlite::Result<SeriesStatus> {
    let mut status = SeriesStatus::default();
    let mut statement = connection.prepare_cached("SELECT level, chunks, bytes FROM series_levels")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let level = unsigned(row, 0)? as usize;
        if let (Some(chunks), Some(bytes)) = (status.chunks.get_mut(level), status.chunk_bytes.get_mut(level)) {
            (*chunks, *bytes) = (unsigned(row, 1)?, unsigned(row, 2)?);
        }
    }
    let sql = "SELECT (SELECT count(*) FROM series), (SELECT ifnull(sum(length(data)), 0) FROM series_journal)";
    (status.series, status.journal_bytes) =
        connection.prepare_cached(sql)?.query_row([], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?;
    Ok(status)
}

fn retain(connection: &Connection, retention: &SeriesRetention, now_s: u64) -> rusqlite::Result<()> {
    let mut gone = Totals::default();
    for (level, age) in LEVELS.into_iter().zip(retention.age) {
        // A chunk goes when all of it is too old.
        remove(connection, level, level.slot(now_s.saturating_sub(age.as_secs())), &mut gone)?;
    }
    gone.write(connection)?;
    let mut status = status(connection)?;
    for level in LEVELS {
        if status.size_bytes() <= retention.bytes {
            break;
        }
        let excess = status.size_bytes() - retention.bytes;
        let last = level.slot(now_s.saturating_sub(FLOOR_S));
        let end = end_of(connection, level, excess, last)?;
        let mut gone = Totals::default();
        remove(connection, level, end, &mut gone)?;
        gone.write(connection)?;
        status = self::status(connection)?;
    }
    // A series whose last hour has gone; one that is in the journal alone has just begun.
    let oldest = now_s.saturating_sub(retention.age.iter().map(|age| age.as_secs()).max().unwrap_or(0));
    connection.execute("DELETE FROM series WHERE last_s > 0 AND last_s < ?", [int(oldest)])?;
    Ok(())
}

/// Before which slot of a level there are that many bytes; at most `last`.
fn end_of(connection: &Connection, level: Level, excess: u64, last: u64) -> rusqlite::Result<u64> {
    let mut statement =
        connection.prepare_cached("SELECT id, length(data) FROM series_chunks WHERE id >= ? AND id < ? ORDER BY id")?;
    let mut rows = statement.query([level.key(0), level.key(last)])?;
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        bytes += unsigned(row, 1)?;
        if bytes >= excess {
            return Ok((Level::slot_of(row.get(0)?) + 1).min(last));
        }
    }
    Ok(last)
}

/// Removes chunks of the slots before one.
fn remove(connection: &Connection, level: Level, end: u64, gone: &mut Totals) -> rusqlite::Result<()> {
    let range = params![level.key(0), level.key(end)];
    let sql = "SELECT count(*), ifnull(sum(length(data)), 0) FROM series_chunks WHERE id >= ? AND id < ?";
    let (chunks, bytes) = connection.prepare_cached(sql)?.query_row(range, |row| Ok((row.get(0)?, row.get(1)?)))?;
    if chunks > 0 {
        connection.prepare_cached("DELETE FROM series_chunks WHERE id >= ? AND id < ?")?.execute(range)?;
        gone.gone(level, chunks, bytes);
    }
    Ok(())
}

/// First and last slot of a level that any series has chunks of.
pub(super) fn slots(connection: &Connection, level: Level) -> rusqlite::Result<Option<(u64, u64)>> {
    // min and max in one statement would read all rows.
    let end = |sql: &str| -> rusqlite::Result<Option<i64>> {
        let range = params![level.key(0), (level.number as i64 + 1) << (super::SLOT_BITS + super::SERIES_BITS)];
        connection.prepare_cached(sql)?.query_row(range, |row| row.get(0))
    };
    let first = end("SELECT min(id) FROM series_chunks WHERE id >= ? AND id < ?")?;
    let last = end("SELECT max(id) FROM series_chunks WHERE id >= ? AND id < ?")?;
    Ok(first.zip(last).map(|(first, last)| (Level::slot_of(first), Level::slot_of(last))))
}

/// Removes all series of a subject. Returns how many. What the journal holds of them is left out when it becomes chunks.
pub(super) fn forget(connection: &Connection, subject: &str) -> rusqlite::Result<usize> {
    let ids: Vec<i64> = connection
        .prepare("SELECT id FROM series WHERE subject = ?")?
        .query_map([subject], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut gone = Totals::default();
    for level in LEVELS {
        let Some((first, last)) = slots(connection, level)? else { continue };
        for slot in first..=last {
            for id in &ids {
                let mut statement =
                    connection.prepare_cached("DELETE FROM series_chunks WHERE id = ? RETURNING length(data)")?;
                let mut rows = statement.query([level.key(slot) | id])?;
                while let Some(row) = rows.next()? {
                    gone.gone(level, 1, row.get(0)?);
                }
            }
        }
    }
    gone.write(connection)?;
    connection.execute("DELETE FROM series WHERE subject = ?", [subject])
}
