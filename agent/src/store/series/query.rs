//! Questions about series.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::codec::{self, Bucket, Sample, TIME_MAX_S};
use super::ingest::rolled_up;
use super::retain::slots;
use super::{LEVELS, Level, POINTS_MAX, value};
use crate::store::records::{int, unsigned};
use crate::store::writer::WorkError;
use crate::store::{Store, StoreError};

/// What was sampled within a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Beginning of the step, Unix time in seconds; a multiple of `step_s`.
    pub at_s: u64,
    /// The step: what was asked for, or longer where only that is left.
    pub step_s: u64,
    /// Samples, at least 1.
    pub count: u64,
    pub min: f64,
    /// Exact to half a resolution each time that samples of the step came in apart.
    pub mean: f64,
    pub max: f64,
}

/// What is known of a series in a range of time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// In order of time; steps without samples have none.
    pub points: Vec<Point>,
    /// Rows of the database that could not be read; what was in them is missing.
    pub damaged: u64,
}

/// A series without its samples.
#[derive(Debug, Clone, PartialEq)]
pub struct SeriesRow {
    pub subject: String,
    pub metric: String,
    pub resolution: f64,
    /// Newest sample that is in a chunk, Unix time in seconds; 0: all are younger than ten minutes.
    pub last_s: u64,
}

impl Store {
    /// Points of a series from `from_s` up to but without `to_s` (Unix time in seconds), by steps of `step_s` or, where that is no
    /// multiple of what is kept, the next shorter that is. Where what is asked for has been removed by age, the next coarser level
    /// answers. A series nobody knows has no points. Blocks its thread.
    ///
    /// # Errors
    /// `WrongState` if the answer may have more than [`POINTS_MAX`] points; `Damaged` and others as SQLite says.
    pub fn series(
        &self,
        subject: &str,
        metric: &str,
        from_s: u64,
        to_s: u64,
        step_s: u64,
    ) -> Result<Answer, StoreError> {
        let to_s = to_s.min(TIME_MAX_S);
        let step_s = step_s.max(1);
        // One transaction: journal and chunks of one moment.
        let answer = self.ask(|connection| {
            let Some((id, resolution)) = number(connection, subject, metric)? else { return Ok(None) };
            let question = Question { id, from_s, to_s, step_s };
            let (from_s, to_s) = question.bounds(connection)?;
            let question = Question { from_s, to_s, ..question };
            match question.answer(connection)? {
                Some(joined) => Ok(Some((joined, resolution))),
                None => Err(WorkError::Request(StoreError::WrongState(format!(
                    "`{metric}` of `{subject}` has more than {POINTS_MAX} steps of {step_s} s in that time; ask for longer steps, or \
                     a shorter time"
                )))),
            }
        })?;
        let Some((joined, resolution)) = answer else { return Ok(Answer::default()) };
        let point = |(&(_, step_s), bucket): (&(u64, u64), &Bucket)| Point {
            at_s: bucket.at_s,
            step_s,
            count: bucket.count,
            min: value(bucket.min, resolution),
            mean: value(bucket.mean, resolution),
            max: value(bucket.max, resolution),
        };
        Ok(Answer { points: joined.buckets.iter().map(point).collect(), damaged: joined.damaged })
    }

    /// The newest sample of a series: its time in Unix seconds and its value.
    pub fn latest(&self, subject: &str, metric: &str) -> Result<Option<(u64, f64)>, StoreError> {
        self.read("read series from", |connection| {
            let Some((id, resolution)) = number(connection, subject, metric)? else { return Ok(None) };
            let sample = latest(connection, id)?;
            Ok(sample.map(|sample| (sample.at_s, value(sample.value, resolution))))
        })
    }

    /// Series by subject and metric: of one subject, or all.
    pub fn series_list(&self, subject: Option<&str>) -> Result<Vec<SeriesRow>, StoreError> {
        self.read("read series from", |connection| {
            let sql = "SELECT subject, metric, resolution, last_s FROM series WHERE ?1 IS NULL OR subject = ?1
                ORDER BY subject, metric";
            let row = |row: &rusqlite::Row<'_>| {
                Ok(SeriesRow {
                    subject: row.get(0)?,
                    metric: row.get(1)?,
                    resolution: row.get(2)?,
                    last_s: unsigned(row, 3)?,
                })
            };
            connection.prepare_cached(sql)?.query_map([subject], row)?.collect()
        })
    }
}

fn number(connection: &Connection, subject: &str, metric: &str) -> rusqlite::Result<Option<(i64, f64)>> {
    connection
        .prepare_cached("SELECT id, resolution FROM series WHERE subject = ? AND metric = ?")?
        .query_row([subject, metric], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

/// The newest sample: of the journal, else of the chunks.
fn latest(connection: &Connection, id: i64) -> rusqlite::Result<Option<Sample>> {
    let mut newest: Option<Sample> = None;
    let mut statement = connection.prepare_cached("SELECT data, to_s FROM series_journal ORDER BY to_s DESC")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        if newest.is_some_and(|newest| unsigned(row, 1).is_ok_and(|to_s| to_s < newest.at_s)) {
            break;
        }
        // What is damaged is passed over: an older sample is better than none.
        let _ = codec::decode_frame(
            row.get_ref(0)?.as_blob()?,
            |number| number == id,
            |_, samples| {
                newest = newest.into_iter().chain(samples).max_by_key(|sample| sample.at_s);
            },
        );
    }
    if newest.is_some() {
        return Ok(newest);
    }
    let last_s: u64 = connection.query_row("SELECT last_s FROM series WHERE id = ?", [id], |row| unsigned(row, 0))?;
    let rows: Vec<Sample> = match chunk(connection, LEVELS[0].key(LEVELS[0].slot(last_s)) | id)? {
        Some(data) => codec::decode(&data).unwrap_or_default(),
        None => Vec::new(),
    };
    Ok(rows.last().copied())
}

fn chunk(connection: &Connection, key: i64) -> rusqlite::Result<Option<Vec<u8>>> {
    let mut statement = connection.prepare_cached("SELECT data FROM series_chunks WHERE id = ?")?;
    statement.query_row([key], |row| row.get(0)).optional()
}

/// What has been found, by time and step.
#[derive(Debug, Default)]
struct Joined {
    buckets: BTreeMap<(u64, u64), Bucket>,
    damaged: u64,
}

#[derive(Debug, Clone, Copy)]
struct Question {
    id: i64,
    from_s: u64,
    to_s: u64,
    step_s: u64,
}

impl Question {
    /// The coarsest level that is no coarser than asked for.
    fn level(&self) -> Level {
        LEVELS.into_iter().rev().find(|level| level.step_s <= self.step_s).unwrap_or(LEVELS[0])
    }

    /// The step asked for, or the next shorter that is whole steps of the level.
    fn step(&self) -> u64 {
        let level = self.level().step_s;
        self.step_s - self.step_s % level
    }

    /// The range without what lies before and after everything kept.
    fn bounds(&self, connection: &Connection) -> rusqlite::Result<(u64, u64)> {
        let sql = "SELECT min(from_s), max(to_s) FROM series_journal";
        let journal: (Option<i64>, Option<i64>) =
            connection.query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let unsigned = |time: i64| u64::try_from(time).unwrap_or(0);
        let mut range = journal.0.zip(journal.1).map(|(from, to)| (unsigned(from), unsigned(to) + 1));
        for level in LEVELS {
            let Some((first, last)) = slots(connection, level)? else { continue };
            let (from, to) = (first * level.span_s, (last + 1) * level.span_s);
            range = Some(range.map_or((from, to), |(a, b)| (a.min(from), b.max(to))));
        }
        let (from, to) = range.unwrap_or((0, 0));
        let from_s = self.from_s.max(from).min(to);
        Ok((from_s, self.to_s.min(to).max(from_s)))
    }

    /// All there is in the range; `None`: too much.
    fn answer(&self, connection: &Connection) -> rusqlite::Result<Option<Joined>> {
        let mut joined = Joined::default();
        // From the level asked for to the coarsest: each answers up to where the one before begins.
        let mut end = self.to_s;
        for level in LEVELS.into_iter().skip(self.level().number) {
            let last = level.number + 1 == LEVELS.len();
            let kept = slots(connection, level)?;
            let begins = match kept {
                _ if last => self.from_s,
                Some((first, _)) => (first * level.span_s).clamp(self.from_s.min(end), end),
                None => end,
            };
            if let Some((first, newest)) = kept
                && begins < end
            {
                let range = (level.slot(begins).max(first), level.slot(end - 1).min(newest));
                self.chunks(connection, level, range, (begins, end), &mut joined)?;
            }
            if joined.buckets.len() as u64 > POINTS_MAX {
                return Ok(None);
            }
            end = begins;
        }
        let step_s = self.step();
        for bucket in rolled_up(&self.journal(connection, &mut joined.damaged)?, step_s) {
            let old = joined.buckets.entry((bucket.at_s, step_s));
            // By the second, a sample that came late takes the place of the one before.
            old.and_modify(|old| if step_s == 1 { *old = bucket } else { old.add(&bucket) }).or_insert(bucket);
        }
        Ok(Some(joined))
    }

    /// Adds a level's chunks of some slots, from one time to another. Ends early when there is too much.
    fn chunks(
        &self,
        connection: &Connection,
        level: Level,
        (first, last): (u64, u64),
        (from_s, to_s): (u64, u64),
        joined: &mut Joined,
    ) -> rusqlite::Result<()> {
        let step_s = self.step().max(level.step_s);
        for slot in first..=last {
            let Some(data) = chunk(connection, level.key(slot) | self.id)? else { continue };
            let rows = match level.number {
                0 => codec::decode::<Sample>(&data)
                    .map(|rows| rows.into_iter().map(|row| Bucket::of(row, 1)).collect::<Vec<_>>()),
                _ => codec::decode::<Bucket>(&data),
            };
            let Ok(mut buckets) = rows else {
                joined.damaged += 1;
                continue;
            };
            buckets.retain(|bucket| bucket.at_s + level.step_s > from_s && bucket.at_s < to_s);
            for bucket in rolled_up(&buckets, step_s) {
                let old = joined.buckets.entry((bucket.at_s, step_s));
                old.and_modify(|old| old.add(&bucket)).or_insert(bucket);
            }
            if joined.buckets.len() as u64 > POINTS_MAX {
                break;
            }
        }
        Ok(())
    }

    /// What is in no chunk yet, by the second.
    fn journal(&self, connection: &Connection, damaged: &mut u64) -> rusqlite::Result<Vec<Bucket>> {
        let mut samples = BTreeMap::new();
        let sql = "SELECT data FROM series_journal WHERE from_s < ? AND to_s >= ? ORDER BY id";
        let mut statement = connection.prepare_cached(sql)?;
        let mut rows = statement.query(params![int(self.to_s), int(self.from_s)])?;
        while let Some(row) = rows.next()? {
            let each = |_, new: Vec<Sample>| samples.extend(new.into_iter().map(|sample| (sample.at_s, sample)));
            if codec::decode_frame(row.get_ref(0)?.as_blob()?, |number| number == self.id, each).is_err() {
                *damaged += 1;
            }
        }
        let within = samples.range(self.from_s..self.to_s);
        Ok(within.map(|(_, sample)| Bucket::of(*sample, 1)).collect())
    }
}
