//! Executions of a phase, and what was read in them, in order.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::ingest::decode_times;
use super::{Chunks, data, decoder};
use crate::store::records::{int, storage_id, unsigned};
use crate::store::segment::{AccessOp, AccessRecord, Decoder};
use crate::store::writer::{Pending, WorkError};
use crate::store::{Store, StoreError};

/// One execution of a phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunRow {
    pub id: i64,
    /// Identity of the storage.
    pub storage: String,
    /// Machine, or empty.
    pub vm: String,
    /// `boot`, or a program.
    pub program: String,
    pub started_us: u64,
    /// Absent while it runs.
    pub ended_us: Option<u64>,
}

/// Whose runs: of a storage, of a machine, of both.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunsOf<'a> {
    pub storage: Option<&'a str>,
    pub vm: Option<&'a str>,
    pub program: Option<&'a str>,
}

/// Pages read one after the other without a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// When the first of the reads was, Unix µs.
    pub at_us: u64,
    /// First page, and how many.
    pub page: u64,
    pub pages: u64,
    pub reads: u32,
}

/// What was read in a run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunReads {
    /// In the order of the reads.
    pub extents: Vec<Extent>,
    /// There are more than were asked for.
    pub more: bool,
}

impl Store {
    /// Runs that a daemon left open when it was killed end with the last access that is known of them. To be called before any starts.
    pub fn cut_runs(&self) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            connection.execute(
                "UPDATE runs SET ended_us = max(started_us, ifnull((SELECT max(to_us) FROM segments
                    WHERE segments.storage_id = runs.storage_id AND segments.vm = runs.vm), 0)) WHERE ended_us IS NULL",
                [],
            )?;
            Ok(())
        })
    }

    /// A phase of a machine on a storage begins.
    pub fn start_run(&self, storage: &str, vm: &str, program: &str, started_us: u64) -> Pending {
        let (storage, vm, program) = (storage.to_owned(), vm.to_owned(), program.to_owned());
        self.inner.writer.submit(0, false, move |connection| {
            let id = storage_id(connection, &storage)?;
            let sql = "INSERT INTO runs (storage_id, vm, program, started_us) VALUES (?, ?, ?, ?)";
            connection.execute(sql, params![id, vm, program, int(started_us)])?;
            Ok(())
        })
    }

    /// The phase ends, if it runs.
    pub fn end_run(&self, storage: &str, vm: &str, program: &str, ended_us: u64) -> Pending {
        let (storage, vm, program) = (storage.to_owned(), vm.to_owned(), program.to_owned());
        self.inner.writer.submit(0, false, move |connection| {
            let id = storage_id(connection, &storage)?;
            connection.execute(
                "UPDATE runs SET ended_us = max(started_us, ?4)
                WHERE storage_id = ?1 AND vm = ?2 AND program = ?3 AND ended_us IS NULL",
                params![id, vm, program, int(ended_us)],
            )?;
            Ok(())
        })
    }

    /// The last runs, latest first.
    pub fn runs(&self, of: RunsOf<'_>, last: usize) -> Result<Vec<RunRow>, StoreError> {
        self.ask(|connection| {
            let mut storage = None;
            if let Some(identity) = of.storage {
                let mut known = connection.prepare("SELECT id FROM storages WHERE identity = ?")?;
                storage = known.query_row([identity], |row| row.get::<_, i64>(0)).optional()?;
                if storage.is_none() {
                    return Ok(Vec::new());
                }
            }
            // Each combination has its index; one statement with conditions that may be absent would use none.
            let given: [(&str, Option<Value>); 3] = [
                ("storage_id = ?", storage.map(Value::from)),
                ("vm = ?", of.vm.map(|vm| vm.to_owned().into())),
                ("program = ?", of.program.map(|program| program.to_owned().into())),
            ];
            let (conditions, mut values): (Vec<&str>, Vec<Value>) =
                given.into_iter().filter_map(|(condition, value)| Some((condition, value?))).unzip();
            values.push(int(last as u64).into());
            let sql = format!(
                "SELECT runs.id, identity, vm, program, started_us, ended_us FROM runs JOIN storages ON storages.id = storage_id
                {} {} ORDER BY started_us DESC, runs.id DESC LIMIT ?",
                if conditions.is_empty() { "" } else { "WHERE" },
                conditions.join(" AND ")
            );
            let row = |row: &Row<'_>| {
                Ok(RunRow {
                    id: row.get(0)?,
                    storage: row.get(1)?,
                    vm: row.get(2)?,
                    program: row.get(3)?,
                    started_us: unsigned(row, 4)?,
                    ended_us: row.get::<_, Option<i64>>(5)?.map(|at| u64::try_from(at).unwrap_or(0)),
                })
            };
            let mut statement = connection.prepare(&sql)?;
            let rows = statement.query_map(params_from_iter(values), row)?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
    }

    /// What was read in a run, in order, up to `limit` extents. Decodes only the chunks of the run's time, and stops with the limit.
    pub fn run_reads(&self, run: &RunRow, limit: usize) -> Result<RunReads, StoreError> {
        let (from_us, to_us) = (run.started_us, run.ended_us.unwrap_or(u64::MAX));
        self.ask(|connection| {
            let sql = "SELECT segments.id, from_us, to_us, times FROM segments LEFT JOIN chunks ON segment_id = segments.id
                WHERE storage_id = (SELECT id FROM storages WHERE identity = ?) AND vm = ? AND from_us <= ? AND to_us >= ?
                ORDER BY from_us, segments.id";
            let mut statement = connection.prepare(sql)?;
            let mut parts = Vec::new();
            let mut rows = statement.query(params![run.storage, run.vm, int(to_us), int(from_us)])?;
            while let Some(row) = rows.next()? {
                let (segment, begins): (i64, u64) = (row.get(0)?, unsigned(row, 1)?);
                match row.get::<_, Option<Vec<u8>>>(3)? {
                    Some(times) => match decode_times(begins, &times) {
                        Ok(chunks) if !chunks.is_empty() => {
                            for (index, times) in chunks.iter().enumerate() {
                                if times.from_us <= to_us && times.to_us >= from_us {
                                    parts.push(Part { from_us: times.from_us, segment, chunk: Some(index) });
                                }
                            }
                        }
                        damaged => {
                            let error = damaged.err().map(|error| error.to_string()).unwrap_or_default();
                            tracing::warn!(segment, error, "the index of a segment is damaged; all of it is read");
                            parts.push(Part { from_us: begins, segment, chunk: None });
                        }
                    },
                    None => parts.push(Part { from_us: begins, segment, chunk: None }),
                }
            }
            parts.sort_by_key(|part| part.from_us);
            let mut collector = Collector { limit, reads: RunReads::default() };
            let mut held: Option<(i64, Chunks<'_>)> = None;
            let mut decoder = decoder()?;
            let mut waiting: Vec<AccessRecord> = Vec::new();
            for (at, part) in parts.iter().enumerate() {
                match part.read(connection, &mut held, &mut decoder, &mut waiting) {
                    Err(WorkError::Request(error)) => {
                        tracing::warn!(segment = part.segment, %error, "a part of a run's history is left out");
                    }
                    read => read?,
                }
                waiting.retain(|access| access.op == AccessOp::Read && (from_us..=to_us).contains(&access.at_us));
                // What may still come before the next part's first waits for it.
                waiting.sort_by_key(|access| access.at_us);
                let next = parts.get(at + 1).map_or(u64::MAX, |next| next.from_us);
                let ready = waiting.partition_point(|access| access.at_us < next || at + 1 == parts.len());
                for access in waiting.drain(..ready) {
                    if !collector.push(&access) {
                        return Ok(collector.reads);
                    }
                }
            }
            Ok(collector.reads)
        })
    }
}

/// A chunk of a segment, or all of one of the version before.
struct Part {
    from_us: u64,
    segment: i64,
    chunk: Option<usize>,
}

impl Part {
    /// Adds its accesses to `into`; `held` is the segment that was read last.
    fn read<'a>(
        &self,
        connection: &'a Connection,
        held: &mut Option<(i64, Chunks<'a>)>,
        decoder: &mut Decoder,
        into: &mut Vec<AccessRecord>,
    ) -> Result<(), WorkError> {
        let Some(index) = self.chunk else {
            let bytes = data(connection, self.segment)?.unwrap_or_default();
            into.append(&mut decoder.decode(&bytes).map_err(StoreError::from)?);
            return Ok(());
        };
        let chunks = match held.take() {
            Some((segment, chunks)) if segment == self.segment => chunks,
            _ => Chunks::open(connection, self.segment)?,
        };
        let (_, chunks) = held.insert((self.segment, chunks));
        chunks.read(index, decoder, into)
    }
}

struct Collector {
    limit: usize,
    reads: RunReads,
}

impl Collector {
    /// Whether there is room for more.
    fn push(&mut self, access: &AccessRecord) -> bool {
        let extents = &mut self.reads.extents;
        let full = extents.len() >= self.limit;
        match extents.last_mut() {
            Some(last) if last.page + last.pages == access.page => {
                last.pages += u64::from(access.pages);
                last.reads += 1;
            }
            _ if full => {
                self.reads.more = true;
                return false;
            }
            _ => extents.push(Extent {
                at_us: access.at_us,
                page: access.page,
                pages: u64::from(access.pages),
                reads: 1,
            }),
        }
        true
    }
}
