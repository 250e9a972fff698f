//! Samples in: a batch becomes a row of the journal, ten minutes of journal become chunks.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension, params};
use tracing::warn;

use super::codec::{self, Bucket, Damaged, Row, Sample, TIME_MAX_S, VALUE_MAX};
use super::{LEVELS, Level, SERIES_MAX, Samples};
use crate::store::records::{int, unsigned};
use crate::store::writer::Pending;
use crate::store::{Store, StoreError};

/// Series that are decoded at once: ten minutes of them take 40 MB.
const TOGETHER: usize = 4096;
/// Batches in the journal at most. Ten minutes of one a second are fewer; a clock that stands still has no tenth minute.
const BATCHES_MAX: u64 = 1200;

impl Store {
    /// Adds samples of any number of series in one transaction; encoded on the writer's thread. Beyond [`SERIES_MAX`] series new ones
    /// are left out, which the log says once.
    pub fn append_series(&self, batch: Vec<Samples>) -> Pending {
        let readings: usize = batch.iter().map(|samples| samples.readings.len()).sum();
        let size = (readings * size_of::<Sample>() + batch.len() * size_of::<Samples>()) as u64;
        self.inner.writer.submit(size, false, move |connection| Ok(append(connection, &batch)?))
    }

    /// Removes the series of a subject, such as a machine that is gone. Errors: `NotFound`.
    pub fn forget_series(&self, subject: &str) -> Pending {
        let subject = subject.to_owned();
        self.inner.writer.submit(0, true, move |connection| match super::retain::forget(connection, &subject)? {
            0 => Err(StoreError::NotFound { what: "series of", name: subject.clone() }.into()),
            _ => Ok(()),
        })
    }
}

/// In whole units and in order, one a second, without what no series can hold.
fn sorted(samples: &Samples, resolution: f64) -> Vec<Sample> {
    let mut rows: Vec<Sample> = Vec::with_capacity(samples.readings.len());
    for reading in &samples.readings {
        let units = (reading.value / resolution).round();
        if units.abs() <= VALUE_MAX as f64 && reading.at_s < TIME_MAX_S {
            rows.push(Sample { at_s: reading.at_s, value: units as i64 });
        }
    }
    in_order(&mut rows);
    rows
}

/// Sorts rows; of several of a second the last counts.
fn in_order(rows: &mut Vec<Sample>) {
    rows.sort_by_key(|row| row.at_s);
    let mut kept = 0;
    for at in 0..rows.len() {
        if kept > 0 && rows[kept - 1].at_s == rows[at].at_s {
            rows[kept - 1] = rows[at];
        } else {
            rows[kept] = rows[at];
            kept += 1;
        }
    }
    rows.truncate(kept);
}

fn append(connection: &Connection, batch: &[Samples]) -> rusqlite::Result<()> {
    let mut series: Vec<(i64, Vec<Sample>)> = Vec::with_capacity(batch.len());
    for samples in batch {
        if !(samples.resolution > 0.0 && samples.resolution.is_finite()) || samples.readings.is_empty() {
            continue;
        }
        if let Some((id, resolution)) = number(connection, samples)? {
            let rows = sorted(samples, resolution);
            if !rows.is_empty() {
                series.push((id, rows));
            }
        }
    }
    let times = || series.iter().flat_map(|(_, rows)| rows.iter().map(|row| row.at_s));
    let (Some(from_s), Some(to_s)) = (times().min(), times().max()) else { return Ok(()) };
    series.sort_by_key(|(id, _)| *id);
    write_batch(connection, from_s, to_s, &series)?;
    let sql = "SELECT min(from_s), count(*) FROM series_journal";
    let (oldest, batches) =
        connection.prepare_cached(sql)?.query_row([], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?;
    let begun = to_s - to_s % LEVELS[0].span_s;
    if batches > BATCHES_MAX {
        roll(connection, TIME_MAX_S)?;
    } else if oldest < begun {
        roll(connection, begun)?;
    }
    Ok(())
}

fn write_batch(connection: &Connection, from_s: u64, to_s: u64, series: &[(i64, Vec<Sample>)]) -> rusqlite::Result<()> {
    let data = codec::encode_frame(series.iter().map(|(id, rows)| (*id, rows.as_slice())));
    connection.prepare_cached("INSERT INTO series_journal (from_s, to_s, data) VALUES (?, ?, ?)")?.execute(params![
        int(from_s),
        int(to_s),
        data
    ])?;
    Ok(())
}

/// Number and resolution of a series, made on first use; `None`: there are too many.
fn number(connection: &Connection, samples: &Samples) -> rusqlite::Result<Option<(i64, f64)>> {
    let known = connection
        .prepare_cached("SELECT id, resolution FROM series WHERE subject = ? AND metric = ?")?
        .query_row([&samples.subject, &samples.metric], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    if known.is_some() {
        return Ok(known);
    }
    let there = connection.query_row("SELECT count(*) FROM series", [], |row| unsigned(row, 0))?;
    if there >= SERIES_MAX as u64 {
        return Ok(None);
    }
    if there + 1 == SERIES_MAX as u64 {
        warn!(
            series = SERIES_MAX,
            subject = samples.subject,
            "no room for further series: samples of others are not kept until some are forgotten or end"
        );
    }
    connection
        .prepare_cached("INSERT INTO series (subject, metric, resolution, last_s) VALUES (?, ?, ?, 0)")?
        .execute(params![samples.subject, samples.metric, samples.resolution])?;
    Ok(Some((connection.last_insert_rowid(), samples.resolution)))
}

/// Makes chunks of what is in the journal from before `before_s`.
fn roll(connection: &Connection, before_s: u64) -> rusqlite::Result<()> {
    let batches: Vec<i64> = connection
        .prepare_cached("SELECT id FROM series_journal WHERE from_s < ? ORDER BY id")?
        .query_map([int(before_s)], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let known: BTreeSet<i64> = connection
        .prepare_cached("SELECT id FROM series")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let ids: Vec<i64> = known.iter().copied().collect();
    let mut levels = Totals::default();
    let mut later = Vec::new();
    for (part, ids) in ids.chunks(TOGETHER).enumerate() {
        let (Some(first), Some(last)) = (ids.first(), ids.last()) else { continue };
        let mut rows: BTreeMap<i64, Vec<Sample>> = BTreeMap::new();
        for batch in &batches {
            let data: Vec<u8> = connection
                .prepare_cached("SELECT data FROM series_journal WHERE id = ?")?
                .query_row([batch], |row| row.get(0))?;
            let within = |id: i64| (*first..=*last).contains(&id) && known.contains(&id);
            let read = codec::decode_frame(&data, within, |id, samples| rows.entry(id).or_default().extend(samples));
            if read.is_err() && part == 0 {
                warn!(batch, "a batch of samples in the database is damaged; what is left of it is kept");
            }
        }
        for (id, mut samples) in rows {
            in_order(&mut samples);
            let rest = samples.split_off(samples.partition_point(|sample| sample.at_s < before_s));
            if !rest.is_empty() {
                later.push((id, rest));
            }
            let Some(newest) = samples.last().map(|sample| sample.at_s) else { continue };
            levels.file(connection, id, &samples)?;
            connection
                .prepare_cached("UPDATE series SET last_s = max(last_s, ?) WHERE id = ?")?
                .execute(params![int(newest), id])?;
        }
    }
    connection.prepare_cached("DELETE FROM series_journal WHERE from_s < ?")?.execute([int(before_s)])?;
    let times = || later.iter().flat_map(|(_, rows)| rows.iter().map(|row| row.at_s));
    if let (Some(from_s), Some(to_s)) = (times().min(), times().max()) {
        write_batch(connection, from_s, to_s, &later)?;
    }
    levels.write(connection)
}

/// What chunks have come to more than before, by level.
#[derive(Debug, Default)]
pub(super) struct Totals {
    chunks: [i64; LEVELS.len()],
    bytes: [i64; LEVELS.len()],
}

impl Totals {
    /// Files samples of one series and their roll-ups.
    fn file(&mut self, connection: &Connection, id: i64, samples: &[Sample]) -> rusqlite::Result<()> {
        let [level, roll_ups @ ..] = LEVELS;
        for part in samples.chunk_by(|a, b| level.slot(a.at_s) == level.slot(b.at_s)) {
            self.put(connection, level, id, part, |old, new| *old = *new)?;
        }
        let mut buckets: Vec<Bucket> = samples.iter().map(|sample| Bucket::of(*sample, 1)).collect();
        for level in roll_ups {
            buckets = rolled_up(&buckets, level.step_s);
            for part in buckets.chunk_by(|a, b| level.slot(a.at_s) == level.slot(b.at_s)) {
                self.put(connection, level, id, part, |old, new| old.add(new))?;
            }
        }
        Ok(())
    }

    /// Adds rows of one slot to its chunk.
    fn put<R: Row>(
        &mut self,
        connection: &Connection,
        level: Level,
        id: i64,
        new: &[R],
        join: impl Fn(&mut R, &R),
    ) -> rusqlite::Result<()> {
        let Some(first) = new.first() else { return Ok(()) };
        let key = level.key(level.slot(first.at_s())) | id;
        let old: Option<Vec<u8>> = connection
            .prepare_cached("SELECT data FROM series_chunks WHERE id = ?")?
            .query_row([key], |row| row.get(0))
            .optional()?;
        let there = match old.as_deref().map(codec::decode::<R>) {
            None => Vec::new(),
            Some(Ok(rows)) => rows,
            Some(Err(Damaged)) => {
                warn!(
                    level = level.number,
                    series = id,
                    "a chunk of samples in the database was damaged; it begins anew"
                );
                Vec::new()
            }
        };
        let data = codec::encode(&joined(there, new, join));
        self.chunks[level.number] += i64::from(old.is_none());
        self.bytes[level.number] += data.len() as i64 - old.map_or(0, |old| old.len() as i64);
        connection
            .prepare_cached("REPLACE INTO series_chunks (id, data) VALUES (?, ?)")?
            .execute(params![key, data])?;
        Ok(())
    }

    pub(super) fn gone(&mut self, level: Level, chunks: i64, bytes: i64) {
        self.chunks[level.number] -= chunks;
        self.bytes[level.number] -= bytes;
    }

    pub(super) fn write(&self, connection: &Connection) -> rusqlite::Result<()> {
        let sql = "UPDATE series_levels SET chunks = max(0, chunks + ?), bytes = max(0, bytes + ?) WHERE level = ?";
        for (level, (chunks, bytes)) in (0i64..).zip(self.chunks.iter().zip(&self.bytes)) {
            if (*chunks, *bytes) != (0, 0) {
                connection.prepare_cached(sql)?.execute([*chunks, *bytes, level])?;
            }
        }
        Ok(())
    }
}

/// Rows in order of time, each time once.
fn joined<R: Row>(there: Vec<R>, new: &[R], join: impl Fn(&mut R, &R)) -> Vec<R> {
    if there.last().is_none_or(|last| new.first().is_none_or(|first| last.at_s() < first.at_s())) {
        return [&there, new].concat();
    }
    let mut rows: BTreeMap<u64, R> = there.into_iter().map(|row| (row.at_s(), row)).collect();
    for row in new {
        rows.entry(row.at_s()).and_modify(|old| join(old, row)).or_insert(*row);
    }
    rows.into_values().collect()
}

/// Buckets of a longer step, in order.
pub(super) fn rolled_up(buckets: &[Bucket], step_s: u64) -> Vec<Bucket> {
    let mut out: Vec<Bucket> = Vec::new();
    for bucket in buckets {
        let at_s = bucket.at_s - bucket.at_s % step_s;
        match out.last_mut() {
            Some(last) if last.at_s == at_s => last.add(bucket),
            _ => out.push(Bucket { at_s, ..*bucket }),
        }
    }
    out
}
