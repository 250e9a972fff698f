//! What goes into the database and comes out, by table: profiles, outcomes, disks. Accesses are in `history/`.

use prestage_integration::api::Counters;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::writer::Pending;
use super::{Store, StoreError, readable};

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
    /// Also over NBD.
    pub nbd: bool,
}

/// Disks over NBD.
pub(super) const NBD_COLUMN: &str = "ALTER TABLE disks ADD COLUMN nbd INTEGER NOT NULL DEFAULT 0;";

/// SQLite's integers are signed; nothing counted here gets near the end of them.
pub(super) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
}

pub(super) fn storage_id(connection: &Connection, identity: &str) -> rusqlite::Result<i64> {
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
            let sql = "INSERT INTO disks (name, store, read_only, socket, vm, target, serial, added_unix_ms, nbd)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT DO NOTHING";
            let DiskRow { name, store, read_only, socket, vm, target, serial, added_unix_ms, nbd } = &disk;
            match connection.prepare(sql)?.execute(params![
                name,
                store,
                read_only,
                socket,
                vm,
                target,
                serial,
                int(*added_unix_ms),
                nbd
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
        self.read("read disks from", disks)
    }
}

fn disks(connection: &Connection) -> rusqlite::Result<Vec<DiskRow>> {
    let sql = "SELECT name, store, read_only, socket, vm, target, serial, added_unix_ms, nbd FROM disks ORDER BY name";
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
            nbd: row.get(8)?,
        })
    };
    readable("disks", connection.prepare(sql)?.query_map([], row)?)
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
