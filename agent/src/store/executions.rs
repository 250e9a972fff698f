//! Execution profiles in the database, and the latest executions they were learned from. Profiles are opaque here
//! (`executions/mod.rs`: version, numbers, checksum); one that is damaged is learned anew.

use rusqlite::{Row, params};

use super::records::{int, unsigned};
use super::writer::Pending;
use super::{Store, StoreError};
use crate::executions::{Catalogue, Execution, Kept, Key, Profile};

/// Executions kept, of all programs: the latest.
const EXECUTIONS_MAX: u64 = 100_000;

pub(super) const TABLES: &str = "
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

/// Latest start (Unix s) and bytes of a profile.
type Data = (u64, Vec<u8>);

fn tags_text(key: &Key) -> String {
    key.tags.iter().map(|tag| format!("{}\n", tag.replace('\n', " "))).collect()
}

fn class(key: &Key) -> i64 {
    key.size_class.map_or(-1, i64::from)
}

fn key(row: &Row<'_>, column: usize) -> rusqlite::Result<Key> {
    let tags: String = row.get(column + 1)?;
    let class: i64 = row.get(column + 2)?;
    Ok(Key {
        program: row.get(column)?,
        tags: tags.lines().map(str::to_owned).collect(),
        size_class: u8::try_from(class).ok(),
    })
}

impl Store {
    /// Adds an execution on a machine, and writes what it has changed in the catalogue, in one transaction. Beyond 100,000 executions
    /// the oldest go.
    pub fn add_execution(&self, vm: &str, execution: Execution, catalogue: &mut Catalogue) -> Pending {
        let vm = vm.to_owned();
        let changes: Vec<(Kept, Option<Data>)> = catalogue
            .changes()
            .into_iter()
            .map(|change| match &change {
                Kept::Changed(key) => {
                    let data = catalogue.get(key).map(|profile| (profile.last_s, profile.to_bytes()));
                    (change, data)
                }
                Kept::Gone(_) => (change, None),
            })
            .collect();
        let size = changes.iter().filter_map(|(_, data)| data.as_ref()).map(|(_, data)| data.len() as u64).sum();
        self.inner.writer.submit(size, false, move |connection| {
            let Execution { key, started_s, duration_s, cpu_peak, cpu_mean, memory_peak, disk_peak, network_peak } = &execution;
            let sql = "INSERT INTO executions (vm, program, tags, size_class, started_s, duration_s, cpu_peak, cpu_mean,
                memory_peak, disk_peak, network_peak) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
            connection.prepare_cached(sql)?.execute(params![
                vm,
                key.program,
                tags_text(key),
                class(key),
                int(*started_s),
                duration_s,
                cpu_peak,
                cpu_mean,
                memory_peak,
                disk_peak,
                network_peak
            ])?;
            let newest = connection.last_insert_rowid();
            connection
                .prepare_cached("DELETE FROM executions WHERE id <= ?")?
                .execute([newest.saturating_sub(int(EXECUTIONS_MAX))])?;
            for (change, data) in &changes {
                match (change, data) {
                    (Kept::Changed(key), Some((last_s, data))) => {
                        let sql = "REPLACE INTO execution_profiles (program, tags, size_class, last_s, data) VALUES (?, ?, ?, ?, ?)";
                        let values = params![key.program, tags_text(key), class(key), int(*last_s), data];
                        connection.prepare_cached(sql)?.execute(values)?;
                    }
                    (Kept::Changed(key) | Kept::Gone(key), _) => {
                        let sql = "DELETE FROM execution_profiles WHERE program = ? AND tags = ? AND size_class = ?";
                        connection.prepare_cached(sql)?.execute(params![key.program, tags_text(key), class(key)])?;
                    }
                }
            }
            Ok(())
        })
    }

    /// The catalogue as it was written, and how many profiles were damaged and are learned anew.
    pub fn catalogue(&self) -> Result<(Catalogue, u64), StoreError> {
        self.read("read execution profiles from", |connection| {
            let mut damaged = 0;
            let mut profiles = Vec::new();
            let mut statement = connection.prepare("SELECT program, tags, size_class, data FROM execution_profiles")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                match Profile::from_bytes(row.get_ref(3)?.as_blob()?) {
                    Some(profile) => profiles.push((key(row, 0)?, profile)),
                    None => damaged += 1,
                }
            }
            Ok((Catalogue::new(profiles), damaged))
        })
    }

    /// The latest executions of a program or on a machine, or of all; newest first, each with its machine.
    pub fn executions(
        &self,
        program: Option<&str>,
        vm: Option<&str>,
        limit: u32,
    ) -> Result<Vec<(String, Execution)>, StoreError> {
        self.read("read executions from", |connection| {
            let sql = "SELECT vm, program, tags, size_class, started_s, duration_s, cpu_peak, cpu_mean, memory_peak, disk_peak,
                network_peak FROM executions WHERE (?1 IS NULL OR program = ?1) AND (?2 IS NULL OR vm = ?2)
                ORDER BY started_s DESC, id DESC LIMIT ?3";
            let row = |row: &Row<'_>| {
                let execution = Execution {
                    key: key(row, 1)?,
                    started_s: unsigned(row, 4)?,
                    duration_s: row.get(5)?,
                    cpu_peak: row.get(6)?,
                    cpu_mean: row.get(7)?,
                    memory_peak: row.get(8)?,
                    disk_peak: row.get(9)?,
                    network_peak: row.get(10)?,
                };
                Ok((row.get(0)?, execution))
            };
            connection.prepare_cached(sql)?.query_map(params![program, vm, limit], row)?.collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn profiles_and_executions_are_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let store = Store::open(&path).unwrap();
        let (mut catalogue, _) = store.catalogue().unwrap();
        let execution = |n: u64| Execution {
            key: Key::new("p", &["a".to_owned(), "b c".to_owned()], Some(n * 1000)),
            started_s: n * 60,
            duration_s: 5.5,
            cpu_peak: 1.0,
            cpu_mean: 0.5,
            memory_peak: 1e9,
            disk_peak: 2.0,
            network_peak: 3.0,
        };
        for n in 0..5 {
            catalogue.learn("vm", &execution(n));
            store.add_execution("vm", execution(n), &mut catalogue).wait().unwrap();
        }
        assert!(store.close(Duration::from_secs(60)));
        let store = Store::open(&path).unwrap();
        let (back, damaged) = store.catalogue().unwrap();
        assert_eq!((back.iter().count(), damaged), (catalogue.iter().count(), 0));
        for ((key, profile), (key_back, profile_back)) in catalogue.iter().zip(back.iter()) {
            assert_eq!((key, profile.count, profile.last_s), (key_back, profile_back.count, profile_back.last_s));
        }
        let latest = store.executions(Some("p"), None, 2).unwrap();
        assert_eq!(latest, [("vm".to_owned(), execution(4)), ("vm".to_owned(), execution(3))]);
        assert_eq!(store.executions(None, Some("other"), 10).unwrap(), []);
        let raw = rusqlite::Connection::open(&path).unwrap();
        raw.execute("UPDATE execution_profiles SET data = x'01' WHERE size_class = -1 AND program = 'p'", []).unwrap();
        let (left, damaged) = store.catalogue().unwrap();
        assert_eq!((left.iter().count(), damaged), (catalogue.iter().count() - 1, 1));
    }
}
