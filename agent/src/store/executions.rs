//! Programs that run in machines, and what is known of programs and events. A profile is opaque here: figures as JSON and courses as bytes
//! (`demand/profile.rs` and `demand/course.rs` in the agent); one that is damaged is learned anew.
//!
//! | from | to | by |
//! | --- | --- | --- |
//! | – | running | [`Store::start_execution`] |
//! | running | ended (announced), unseen (its machine stopped, or the daemon was away) | [`Store::end_execution`] |
//!
//! What an execution teaches is written in the transaction that puts its start or end on record.

use rusqlite::{Connection, Row, params};

use super::demand::words;
use super::records::{int, unsigned};
use super::writer::{Pending, WorkError};
use super::{Store, StoreError, readable};

/// Most profiles read back: the latest.
pub const PROGRAMS_MAX: u32 = 4096;
/// Most executions that ended read back and kept: the latest.
pub const EXECUTIONS_MAX: u32 = 8192;

/// Of version 6 of the database; [`TABLES`] replaces them.
pub(super) const TABLES_6: &str = "
-- tags: in order, with a line feed after each. size_class: -1 is any.
CREATE TABLE execution_profiles (
    program TEXT NOT NULL,
    tags TEXT NOT NULL,
    size_class INTEGER NOT NULL,
    last_s INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (program, tags, size_class)
);
CREATE TABLE executions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    vm TEXT NOT NULL,
    program TEXT NOT NULL,
    tags TEXT NOT NULL,
    size_class INTEGER NOT NULL,
    started_s INTEGER NOT NULL,
    duration_s REAL NOT NULL,
    cpu_peak REAL NOT NULL,
    cpu_mean REAL NOT NULL,
    memory_peak REAL NOT NULL,
    disk_peak REAL NOT NULL,
    network_peak REAL NOT NULL
);
CREATE INDEX executions_by_program ON executions(program, started_s);
CREATE INDEX executions_by_vm ON executions(vm, started_s);
";

/// The tables before were never filled; courses lay in `kept`.
pub(super) const TABLES: &str = "
DROP TABLE execution_profiles;
DROP TABLE executions;
-- key: program, tags and class of input, or event and machine (demand/profile.rs). figures: JSON.
CREATE TABLE programs (
    key TEXT PRIMARY KEY,
    last_s INTEGER NOT NULL,
    figures TEXT NOT NULL,
    courses BLOB NOT NULL
);
CREATE INDEX programs_by_age ON programs(last_s);
INSERT INTO programs (key, last_s, figures, courses)
    SELECT substr(name, 8), 0, '{}', value FROM kept WHERE substr(name, 1, 7) = 'course:';
DELETE FROM kept WHERE substr(name, 1, 7) = 'course:';
-- Running, and for as long as another may follow. instance: host's boot and libvirt's number of the machine's start. data: JSON.
CREATE TABLE executions (
    id INTEGER PRIMARY KEY,
    vm TEXT NOT NULL,
    instance TEXT NOT NULL,
    started_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    state TEXT NOT NULL CHECK (state IN ('running', 'ended', 'unseen')),
    data TEXT NOT NULL
);
CREATE INDEX executions_by_state ON executions(state, ended_ms);
ALTER TABLE decisions ADD COLUMN took_ms INTEGER;
";

/// What has become of an execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecutionState {
    Running,
    /// Its end was announced.
    Ended,
    /// It ended while nobody looked; nothing was learned from it.
    Unseen,
}

words!(ExecutionState { Running => "running", Ended => "ended", Unseen => "unseen" });

/// An execution on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionRow {
    pub id: i64,
    /// UUID.
    pub vm: String,
    /// The same as long as the machine was not started anew.
    pub instance: String,
    /// Unix ms.
    pub started_ms: u64,
    pub ended_ms: Option<u64>,
    pub state: ExecutionState,
    /// JSON: what was announced, and what its machine used before.
    pub data: String,
}

/// What is to be written down of a program or an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Learned {
    Changed {
        key: String,
        /// Start of the latest execution, Unix s.
        last_s: u64,
        /// JSON.
        figures: String,
        /// `None`: as they were.
        courses: Option<Vec<u8>>,
    },
    /// It made room for others.
    Gone { key: String },
}

/// A profile as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramRow {
    pub key: String,
    pub last_s: u64,
    pub figures: String,
    pub courses: Vec<u8>,
}

fn write(connection: &Connection, learned: &[Learned]) -> rusqlite::Result<()> {
    for each in learned {
        match each {
            Learned::Changed { key, last_s, figures, courses } => {
                let sql = "INSERT INTO programs (key, last_s, figures, courses) VALUES (?1, ?2, ?3, ifnull(?4, x''))
                    ON CONFLICT (key) DO UPDATE SET last_s = ?2, figures = ?3, courses = ifnull(?4, courses)";
                connection.prepare_cached(sql)?.execute(params![key, int(*last_s), figures, courses])?;
            }
            Learned::Gone { key } => {
                connection.prepare_cached("DELETE FROM programs WHERE key = ?")?.execute([key])?;
            }
        }
    }
    Ok(())
}

fn size(learned: &[Learned]) -> u64 {
    let of = |each: &Learned| match each {
        Learned::Changed { figures, courses, .. } => figures.len() + courses.as_ref().map_or(0, Vec::len),
        Learned::Gone { .. } => 0,
    };
    learned.iter().map(of).sum::<usize>() as u64
}

impl Store {
    /// Puts on record that an execution runs, and what its start teaches, in one transaction.
    pub fn start_execution(&self, row: ExecutionRow, learned: Vec<Learned>) -> Pending {
        self.inner.writer.submit(size(&learned), false, move |connection| {
            let ExecutionRow { id, vm, instance, started_ms, state, data, .. } = &row;
            let sql = "INSERT INTO executions (id, vm, instance, started_ms, state, data) VALUES (?, ?, ?, ?, ?, ?)
                ON CONFLICT DO NOTHING";
            let values = params![id, vm, instance, int(*started_ms), state, data];
            if connection.prepare_cached(sql)?.execute(values)? == 0 {
                return Err(StoreError::AlreadyExists { what: "execution", name: id.to_string() }.into());
            }
            Ok(write(connection, &learned)?)
        })
    }

    /// Puts on record that it runs no longer, and what it teaches, in one transaction. Errors: `NotFound` of one that does not run.
    pub fn end_execution(&self, id: i64, ended_ms: u64, state: ExecutionState, learned: Vec<Learned>) -> Pending {
        self.inner.writer.submit(size(&learned), false, move |connection| -> Result<(), WorkError> {
            let sql = "UPDATE executions SET ended_ms = ?, state = ? WHERE id = ? AND state = 'running'";
            if connection.prepare_cached(sql)?.execute(params![int(ended_ms), state, id])? == 0 {
                return Err(StoreError::NotFound { what: "execution", name: id.to_string() }.into());
            }
            Ok(write(connection, &learned)?)
        })
    }

    /// Writes down what was learned.
    pub fn learn_programs(&self, learned: Vec<Learned>) -> Pending {
        self.inner.writer.submit(size(&learned), false, move |connection| Ok(write(connection, &learned)?))
    }

    /// What is known of programs and events: the [`PROGRAMS_MAX`] that ran last, the oldest first.
    pub fn programs(&self) -> Result<Vec<ProgramRow>, StoreError> {
        self.read("read what is known of programs from", |connection| {
            let sql = "SELECT key, last_s, figures, courses FROM
                (SELECT * FROM programs ORDER BY last_s DESC, key LIMIT ?) ORDER BY last_s, key";
            let row = |row: &Row<'_>| {
                let last_s = unsigned(row, 1)?;
                Ok(ProgramRow { key: row.get(0)?, last_s, figures: row.get(2)?, courses: row.get(3)? })
            };
            readable("programs", connection.prepare_cached(sql)?.query_map([PROGRAMS_MAX], row)?)
        })
    }

    /// Executions that run, and of those that ended since the latest [`EXECUTIONS_MAX`], in the order of their starts.
    pub fn executions(&self, since_ms: u64) -> Result<Vec<ExecutionRow>, StoreError> {
        self.read("read executions from", |connection| {
            let sql =
                "SELECT id, vm, instance, started_ms, ended_ms, state, data FROM executions WHERE state = 'running'
                OR id IN (SELECT id FROM executions WHERE ended_ms >= ? ORDER BY ended_ms DESC, id DESC LIMIT ?)
                ORDER BY started_ms, id";
            let row = |row: &Row<'_>| {
                let ended_ms = row.get::<_, Option<i64>>(4)?.and_then(|at| u64::try_from(at).ok());
                Ok(ExecutionRow {
                    id: row.get(0)?,
                    vm: row.get(1)?,
                    instance: row.get(2)?,
                    started_ms: unsigned(row, 3)?,
                    ended_ms,
                    state: row.get(5)?,
                    data: row.get(6)?,
                })
            };
            readable(
                "executions",
                connection.prepare_cached(sql)?.query_map([int(since_ms), EXECUTIONS_MAX.into()], row)?,
            )
        })
    }

    /// Removes executions that ended before (Unix ms) or are beyond the latest [`EXECUTIONS_MAX`], and profiles beyond the latest [`PROGRAMS_MAX`].
    pub fn retain_executions(&self, before_ms: u64) -> Pending {
        self.inner.writer.submit(0, true, move |connection| {
            connection.execute("DELETE FROM executions WHERE ended_ms < ?", [int(before_ms)])?;
            let sql = "DELETE FROM executions WHERE id IN (SELECT id FROM executions WHERE ended_ms IS NOT NULL
                ORDER BY ended_ms DESC, id DESC LIMIT -1 OFFSET ?)";
            connection.execute(sql, [EXECUTIONS_MAX])?;
            let sql =
                "DELETE FROM programs WHERE key NOT IN (SELECT key FROM programs ORDER BY last_s DESC, key LIMIT ?)";
            connection.execute(sql, [PROGRAMS_MAX])?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rusqlite::Connection;

    use super::*;

    fn row(id: i64) -> ExecutionRow {
        ExecutionRow {
            id,
            vm: "v".into(),
            instance: "boot:1".into(),
            started_ms: 1000 * id as u64,
            ended_ms: None,
            state: ExecutionState::Running,
            data: "{}".into(),
        }
    }

    fn changed(key: &str, last_s: u64, courses: Option<Vec<u8>>) -> Learned {
        Learned::Changed { key: key.into(), last_s, figures: format!("{{\"at\":{last_s}}}"), courses }
    }

    #[test]
    fn an_execution_and_what_it_teaches_are_there_together_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let store = Store::open(&path).unwrap();
        store.start_execution(row(7), vec![changed("p", 7, None)]).wait().unwrap();
        let again = store.start_execution(row(7), vec![changed("p", 8, None)]).wait();
        assert!(matches!(again, Err(StoreError::AlreadyExists { .. })), "{again:?}");
        store.start_execution(row(8), vec![]).wait().unwrap();
        store.end_execution(7, 9000, ExecutionState::Ended, vec![changed("p", 7, Some(vec![1, 2]))]).wait().unwrap();
        let twice = store.end_execution(7, 9500, ExecutionState::Unseen, vec![changed("q", 9, None)]).wait();
        assert!(matches!(twice, Err(StoreError::NotFound { .. })), "{twice:?}");
        store.learn_programs(vec![changed("p", 9, None), changed("old", 1, None)]).wait().unwrap();
        assert!(store.close(Duration::from_secs(60)));

        let store = Store::open(&path).unwrap();
        let programs = store.programs().unwrap();
        let found: Vec<_> = programs.iter().map(|row| (row.key.as_str(), row.last_s, row.courses.as_slice())).collect();
        assert_eq!(found, [("old", 1, [].as_slice()), ("p", 9, &[1, 2])], "courses stay where none are given");
        assert_eq!(programs[1].figures, "{\"at\":9}");
        let ended = ExecutionRow { ended_ms: Some(9000), state: ExecutionState::Ended, ..row(7) };
        assert_eq!(store.executions(9000).unwrap(), [ended, row(8)]);
        assert_eq!(store.executions(9001).unwrap(), [row(8)]);
        store.learn_programs(vec![Learned::Gone { key: "p".into() }]).wait().unwrap();
        store.retain_executions(9001).wait().unwrap();
        assert_eq!((store.programs().unwrap().len(), store.executions(0).unwrap()), (1, vec![row(8)]));
    }

    #[test]
    fn courses_of_before_are_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let store = Store::open(&path).unwrap();
        assert!(store.close(Duration::from_secs(60)));
        drop(store);
        // Back to version 6, with a course as it was kept then.
        let raw = Connection::open(&path).unwrap();
        raw.execute_batch("DROP TABLE programs; DROP TABLE executions; ALTER TABLE decisions DROP COLUMN took_ms; ALTER TABLE disks DROP COLUMN nbd")
            .unwrap();
        raw.execute_batch(TABLES_6).unwrap();
        raw.execute("INSERT INTO kept VALUES ('course:a' || char(30) || 'b', x'0001ff'), ('event:1', x'00')", [])
            .unwrap();
        raw.pragma_update(None, "user_version", 6).unwrap();
        drop(raw);
        let store = Store::open(&path).unwrap();
        let wanted = ProgramRow { key: "a\u{1e}b".into(), last_s: 0, figures: "{}".into(), courses: vec![0, 1, 255] };
        assert_eq!(store.programs().unwrap(), [wanted]);
        assert_eq!((store.kept("course:").unwrap(), store.kept("").unwrap().len()), (vec![], 1));
    }

    #[test]
    fn of_those_that_ended_the_latest_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("db")).unwrap();
        let most = i64::from(EXECUTIONS_MAX);
        let mut raw = Connection::open(folder.path().join("db")).unwrap();
        let at_once = raw.transaction().unwrap();
        let sql = "INSERT INTO executions VALUES (?1, 'v', 'i', ?1, CASE ?1 WHEN 0 THEN NULL ELSE ?1 END, CASE ?1 WHEN 0 THEN 'running' ELSE 'ended' END, '{}')";
        for id in 0..most + 50 {
            at_once.execute(sql, [id]).unwrap();
        }
        at_once.commit().unwrap();
        let ids = |store: &Store| store.executions(0).unwrap().iter().map(|row| row.id).collect::<Vec<_>>();
        let read = ids(&store);
        assert_eq!((read.len() as i64, read[0], read[1], read.last().copied()), (most + 1, 0, 50, Some(most + 49)));
        store.retain_executions(0).wait().unwrap();
        let rows: i64 = raw.query_row("SELECT count(*) FROM executions", [], |row| row.get(0)).unwrap();
        assert_eq!((rows, ids(&store)), (most + 1, read));
    }
}
