//! What goes into the database and comes out, by table: profiles, accesses, outcomes, disks, retention.

use std::time::Duration;

use prestage_integration::api::Counters;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::segment::{self, AccessRecord};
use super::writer::Pending;
use super::{Store, StoreError};

/// What was learned of a storage, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileRow {
    /// Stable number of the storage.
    pub id: i64,
    /// Identity of the storage.
    pub storage: String,
    pub saved_unix_ms: u64,
    /// Runs it was learned from.
    pub runs: u64,
    pub size_bytes: u64,
}

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

/// Counters of a disk within an hour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutcomeRow {
    /// Hours since the Unix epoch.
    pub hour: u64,
    pub disk: String,
    pub counters: Counters,
}

/// A disk to serve again after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskRow {
    pub name: String,
    /// Path or NBD URI, as given.
    pub store: String,
    pub read_only: bool,
    /// `None`: the default path.
    pub socket: Option<String>,
    /// Machine (UUID) and target it is attached to; both or none.
    pub vm: Option<String>,
    pub target: Option<String>,
    /// Serial that the machine's definition asked for; `None`: the disk's name.
    pub serial: Option<String>,
    pub added_unix_ms: u64,
}

/// How much history to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    pub age: Duration,
    /// Of segments as stored.
    pub bytes: u64,
}

/// How much history there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct History {
    pub segments: u64,
    pub size_bytes: u64,
}

/// Outcomes are kept for a year and a month whatever the history's age: a few thousand rows a disk, to compare with last year's.
const OUTCOME_HOURS: u64 = 24 * 400;

/// SQLite's integers are signed; nothing counted here gets near the end of them.
fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
}

fn storage_id(connection: &Connection, identity: &str) -> rusqlite::Result<i64> {
    let known =
        connection.prepare("SELECT id FROM storages WHERE identity = ?")?.query_row([identity], |row| row.get(0));
    match known.optional()? {
        Some(id) => Ok(id),
        None => {
            connection.prepare("INSERT INTO storages (identity) VALUES (?)")?.execute([identity])?;
            Ok(connection.last_insert_rowid())
        }
    }
}

impl Store {
    /// Saves a profile in place of the one before. `data` is opaque.
    pub fn save_profile(&self, storage: &str, data: Vec<u8>, runs: u64, saved_unix_ms: u64) -> Pending {
        let storage = storage.to_owned();
        self.inner.writer.submit(data.len() as u64, false, move |connection| {
            let id = storage_id(connection, &storage)?;
            let mut statement = connection
                .prepare("REPLACE INTO profiles (storage_id, saved_unix_ms, runs, data) VALUES (?, ?, ?, ?)")?;
            statement.execute(params![id, int(saved_unix_ms), int(runs), data])?;
            Ok(())
        })
    }

    /// The saved profile of a storage and its bytes.
    pub fn profile(&self, storage: &str) -> Result<Option<(ProfileRow, Vec<u8>)>, StoreError> {
        self.read("read a profile from", |connection| {
            let sql = format!("{PROFILES}, data FROM profiles JOIN storages ON id = storage_id WHERE identity = ?");
            connection.prepare(&sql)?.query_row([storage], |row| Ok((profile_row(row)?, row.get(5)?))).optional()
        })
    }

    /// All saved profiles, without their bytes.
    pub fn profiles(&self) -> Result<Vec<ProfileRow>, StoreError> {
        self.read("read profiles from", |connection| {
            let sql = format!("{PROFILES} FROM profiles JOIN storages ON id = storage_id ORDER BY identity");
            connection.prepare(&sql)?.query_map([], profile_row)?.collect()
        })
    }

    /// Number of a storage, the same for ever; made on first use.
    pub fn storage_id(&self, storage: &str) -> Result<Option<i64>, StoreError> {
        self.read("read storages from", |connection| {
            let mut statement = connection.prepare("SELECT id FROM storages WHERE identity = ?")?;
            statement.query_row([storage], |row| row.get(0)).optional()
        })
    }

    /// Makes sure that a storage has a number.
    pub fn add_storage(&self, storage: &str) -> Pending {
        let storage = storage.to_owned();
        self.inner.writer.submit(0, false, move |connection| Ok(storage_id(connection, &storage).map(drop)?))
    }

    /// Removes the saved profile of a storage. Errors: `NotFound`.
    pub fn remove_profile(&self, storage: &str) -> Pending {
        let storage = storage.to_owned();
        self.inner.writer.submit(0, true, move |connection| {
            let sql = "DELETE FROM profiles WHERE storage_id = (SELECT id FROM storages WHERE identity = ?)";
            match connection.prepare(sql)?.execute([&storage])? {
                0 => Err(StoreError::NotFound { what: "profile of storage", name: storage.clone() }.into()),
                _ => Ok(()),
            }
        })
    }

    /// Adds a segment of history; encoded on the writer's thread. Errors: `Segment` unless there are 1 to 65,536 accesses within range.
    pub fn append_accesses(&self, accesses: Accesses) -> Pending {
        let size = (accesses.records.len() * size_of::<AccessRecord>()) as u64;
        let mut encoded: Option<Vec<u8>> = None;
        self.inner.writer.submit(size, false, move |connection| {
            let Accesses { storage, vm, program, records } = &accesses;
            let data = match &encoded {
                Some(data) => data,
                None => encoded.insert(segment::encode(records).map_err(StoreError::from)?),
            };
            let (from_us, to_us) =
                records.iter().fold((u64::MAX, 0), |(from, to), access| (from.min(access.at_us), to.max(access.at_us)));
            let id = storage_id(connection, storage)?;
            let mut statement = connection.prepare(
                "INSERT INTO segments (storage_id, vm, program, from_us, to_us, accesses, size_bytes, data) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            )?;
            statement.execute(params![id, vm, program, int(from_us), int(to_us), int(records.len() as u64), int(data.len() as u64), data])?;
            Ok(())
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
        self.read("read history from", |connection| {
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
            connection.prepare(sql)?.query_map(params![storage, vm, int(from_us), int(to_us)], row)?.collect()
        })
    }

    /// Accesses of a segment. Errors: `NotFound` (retention may have taken it), `Segment` when damaged.
    pub fn segment(&self, id: i64) -> Result<Vec<AccessRecord>, StoreError> {
        let data: Option<Vec<u8>> = self.read("read history from", |connection| {
            connection.prepare("SELECT data FROM segments WHERE id = ?")?.query_row([id], |row| row.get(0)).optional()
        })?;
        match data {
            Some(data) => Ok(segment::decode(&data)?),
            None => Err(StoreError::NotFound { what: "segment", name: id.to_string() }),
        }
    }

    /// Adds counters to a disk's hour.
    pub fn add_outcome(&self, hour: u64, disk: &str, counters: Counters) -> Pending {
        let disk = disk.to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            let fields = counters.fields();
            let names: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
            let sums: Vec<String> = names.iter().map(|name| format!("{name} = {name} + excluded.{name}")).collect();
            let sql = format!(
                "INSERT INTO outcomes (hour, disk, {}) VALUES (?, ?{}) ON CONFLICT DO UPDATE SET {}",
                names.join(", "),
                ", ?".repeat(names.len()),
                sums.join(", ")
            );
            let mut values: Vec<rusqlite::types::Value> = vec![int(hour).into(), disk.clone().into()];
            values.extend(fields.iter().map(|(_, value)| int(*value).into()));
            connection.prepare(&sql)?.execute(params_from_iter(values))?;
            Ok(())
        })
    }

    /// Counters by hour from `from_hour` to `to_hour` inclusive, of one disk or of all.
    pub fn outcomes(&self, disk: Option<&str>, from_hour: u64, to_hour: u64) -> Result<Vec<OutcomeRow>, StoreError> {
        self.read("read outcomes from", |connection| {
            let sql =
                "SELECT * FROM outcomes WHERE hour BETWEEN ?1 AND ?2 AND (?3 IS NULL OR disk = ?3) ORDER BY hour, disk";
            let mut statement = connection.prepare(sql)?;
            let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
            let rows = statement.query_map(params![int(from_hour), int(to_hour), disk], |row| {
                let mut counters = serde_json::Map::new();
                for (column, name) in names.iter().enumerate().skip(2) {
                    counters.insert(name.clone(), unsigned(row, column)?.into());
                }
                // Counters take any subset of their fields, and a later version's further column is no error.
                let counters = serde_json::from_value(counters.into()).unwrap_or_default();
                Ok(OutcomeRow { hour: unsigned(row, 0)?, disk: row.get(1)?, counters })
            })?;
            rows.collect()
        })
    }

    /// Remembers a disk. Errors: `AlreadyExists`.
    pub fn add_disk(&self, disk: DiskRow) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "INSERT INTO disks (name, store, read_only, socket, vm, target, serial, added_unix_ms)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT DO NOTHING";
            let DiskRow { name, store, read_only, socket, vm, target, serial, added_unix_ms } = &disk;
            match connection.prepare(sql)?.execute(params![
                name,
                store,
                read_only,
                socket,
                vm,
                target,
                serial,
                int(*added_unix_ms)
            ])? {
                0 => Err(StoreError::AlreadyExists { what: "disk", name: name.clone() }.into()),
                _ => Ok(()),
            }
        })
    }

    /// Forgets a disk. Errors: `NotFound`.
    pub fn remove_disk(&self, name: &str) -> Pending {
        let name = name.to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            match connection.prepare("DELETE FROM disks WHERE name = ?")?.execute([&name])? {
                0 => Err(StoreError::NotFound { what: "disk", name: name.clone() }.into()),
                _ => Ok(()),
            }
        })
    }

    /// Disks remembered, by name.
    pub fn disks(&self) -> Result<Vec<DiskRow>, StoreError> {
        self.read("read disks from", |connection| {
            let sql =
                "SELECT name, store, read_only, socket, vm, target, serial, added_unix_ms FROM disks ORDER BY name";
            let row = |row: &Row<'_>| {
                Ok(DiskRow {
                    name: row.get(0)?,
                    store: row.get(1)?,
                    read_only: row.get(2)?,
                    socket: row.get(3)?,
                    vm: row.get(4)?,
                    target: row.get(5)?,
                    serial: row.get(6)?,
                    added_unix_ms: unsigned(row, 7)?,
                })
            };
            connection.prepare(sql)?.query_map([], row)?.collect()
        })
    }

    /// Removes history older than `retention.age` and, oldest first, what exceeds `retention.bytes`; gives the space back.
    pub fn retain(&self, retention: Retention, now_unix_ms: u64) -> Pending {
        let age_us = u64::try_from(retention.age.as_micros()).unwrap_or(u64::MAX);
        let oldest_us = now_unix_ms.saturating_mul(1000).saturating_sub(age_us);
        let oldest_hour = (now_unix_ms / 3_600_000).saturating_sub(OUTCOME_HOURS);
        self.inner.writer.submit(0, true, move |connection| {
            connection.execute("DELETE FROM outcomes WHERE hour < ?", [int(oldest_hour)])?;
            connection.execute("DELETE FROM segments WHERE to_us < ?", [int(oldest_us)])?;
            // Sums from the newest on; what is beyond the limit goes.
            connection.execute(
                "DELETE FROM segments WHERE id IN (SELECT id FROM (
                    SELECT id, sum(size_bytes) OVER (ORDER BY to_us DESC, id DESC) AS newer FROM segments) WHERE newer > ?)",
                [int(retention.bytes)],
            )?;
            Ok(())
        })
    }

    /// History kept: segments and their bytes.
    pub fn history(&self) -> Result<History, StoreError> {
        self.read("read history from", |connection| {
            connection.query_row("SELECT count(*), ifnull(sum(size_bytes), 0) FROM segments", [], |row| {
                Ok(History { segments: unsigned(row, 0)?, size_bytes: unsigned(row, 1)? })
            })
        })
    }
}

const PROFILES: &str = "SELECT id, identity, saved_unix_ms, runs, length(data)";

fn profile_row(row: &Row<'_>) -> rusqlite::Result<ProfileRow> {
    Ok(ProfileRow {
        id: row.get(0)?,
        storage: row.get(1)?,
        saved_unix_ms: unsigned(row, 2)?,
        runs: unsigned(row, 3)?,
        size_bytes: unsigned(row, 4)?,
    })
}
