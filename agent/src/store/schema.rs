//! Tables of the database and the way from each version to the next.
//!
//! `application_id` is "PRST" and `user_version` the number of migrations applied. A migration is never edited once released: a change
//! is a further one at the end.

use std::collections::BTreeSet;
use std::path::Path;

use rusqlite::{Connection, Error, TransactionBehavior};

use super::{StoreError, refused};

/// "PRST", so that another program's database is not taken for ours.
pub(super) const APPLICATION_ID: i64 = 0x5052_5354;

const MIGRATIONS: &[&str] = &[
    V1,
    V2,
    super::models::TABLES,
    super::series::TABLES,
    super::demand::TABLES,
    super::executions::TABLES_6,
    super::executions::TABLES,
    super::records::NBD_COLUMN,
];

/// Version this program writes.
pub(super) const VERSION: i64 = MIGRATIONS.len() as i64;

const V1: &str = "
CREATE TABLE storages (
    id INTEGER PRIMARY KEY,
    identity TEXT NOT NULL UNIQUE
);
-- What was learned of a storage; opaque here, with magic, version and checksum of its own.
CREATE TABLE profiles (
    storage_id INTEGER PRIMARY KEY REFERENCES storages(id),
    saved_unix_ms INTEGER NOT NULL,
    runs INTEGER NOT NULL,
    data BLOB NOT NULL
);
-- One row holds up to 65,536 accesses (segment.rs). The blob is last: the columns before it are read without its pages.
CREATE TABLE segments (
    id INTEGER PRIMARY KEY,
    storage_id INTEGER NOT NULL REFERENCES storages(id),
    vm TEXT NOT NULL,
    program TEXT NOT NULL,
    from_us INTEGER NOT NULL,
    to_us INTEGER NOT NULL,
    accesses INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX segments_by_stream ON segments(storage_id, vm, from_us, to_us);
CREATE INDEX segments_by_age ON segments(to_us, size_bytes);
-- Counters of a disk within an hour.
CREATE TABLE outcomes (
    hour INTEGER NOT NULL,
    disk TEXT NOT NULL,
    reads INTEGER NOT NULL, read_bytes INTEGER NOT NULL,
    served_ram INTEGER NOT NULL, served_ssd INTEGER NOT NULL, served_store INTEGER NOT NULL, read_errors INTEGER NOT NULL,
    writes INTEGER NOT NULL, write_bytes INTEGER NOT NULL, flushes INTEGER NOT NULL, discards INTEGER NOT NULL,
    read_wait_us INTEGER NOT NULL,
    store_reads INTEGER NOT NULL, store_read_bytes INTEGER NOT NULL,
    store_writes INTEGER NOT NULL, store_write_bytes INTEGER NOT NULL,
    prefetch_issued_bytes INTEGER NOT NULL, prefetch_completed_bytes INTEGER NOT NULL, prefetch_used_bytes INTEGER NOT NULL,
    prefetch_late INTEGER NOT NULL, prefetch_evicted_unused_bytes INTEGER NOT NULL, prefetch_cancelled_bytes INTEGER NOT NULL,
    ssd_read_bytes INTEGER NOT NULL, ssd_write_bytes INTEGER NOT NULL, accesses_dropped INTEGER NOT NULL,
    PRIMARY KEY (hour, disk)
) WITHOUT ROWID;
-- Disks added with the API, served again after a restart.
CREATE TABLE disks (
    name TEXT PRIMARY KEY,
    store TEXT NOT NULL,
    read_only INTEGER NOT NULL,
    socket TEXT,
    vm TEXT,
    target TEXT,
    serial TEXT,
    added_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;
";

/// History that is asked: runs, an index by block, roll-ups by hour. Segments of before are taken into it by the writer, one by one.
const V2: &str = "
-- Executions of a phase: a boot, or a program. Open while it runs.
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    storage_id INTEGER NOT NULL REFERENCES storages(id),
    vm TEXT NOT NULL,
    program TEXT NOT NULL,
    started_us INTEGER NOT NULL,
    ended_us INTEGER
);
CREATE INDEX runs_by_storage ON runs(storage_id, started_us);
CREATE INDEX runs_by_program ON runs(storage_id, program, started_us);
CREATE INDEX runs_by_vm ON runs(vm, started_us);
-- Segments whose touches are in the index: in which group, and when each of their chunks was (history/index.rs, history/ingest.rs).
CREATE TABLE chunks (
    segment_id INTEGER PRIMARY KEY,
    group_id INTEGER NOT NULL REFERENCES groups(id),
    times BLOB NOT NULL
);
CREATE INDEX chunks_by_group ON chunks(group_id);
-- Which segments read a block: rows of some 500 touches (history/index.rs), in groups of one segment or of many.
CREATE TABLE groups (
    id INTEGER PRIMARY KEY,
    storage_id INTEGER NOT NULL REFERENCES storages(id),
    segments INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL
);
CREATE INDEX groups_by_storage ON groups(storage_id, segments);
CREATE TABLE touches (
    group_id INTEGER NOT NULL,
    first_block INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (group_id, first_block)
) WITHOUT ROWID;
-- Hottest blocks of an hour since the Unix epoch (history/hours.rs).
CREATE TABLE hours (
    storage_id INTEGER NOT NULL REFERENCES storages(id),
    hour INTEGER NOT NULL,
    reads INTEGER NOT NULL,
    error INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (storage_id, hour)
) WITHOUT ROWID;
DROP INDEX segments_by_age;
CREATE INDEX segments_by_age ON segments(to_us, size_bytes, accesses);
";

/// Brings the database to [`VERSION`]. Errors: `Newer`, `Foreign`, `Damaged`, or what SQLite says.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source| refused(path, "open", source);
    let number = |connection: &Connection, pragma: &str| connection.query_row(pragma, [], |row| row.get::<_, i64>(0));
    let id = number(connection, "PRAGMA application_id").map_err(failed)?;
    let found = number(connection, "PRAGMA user_version").map_err(failed)?;
    let tables = number(connection, "SELECT count(*) FROM sqlite_schema").map_err(failed)?;
    if id != APPLICATION_ID && (id != 0 || found != 0 || tables != 0) {
        return Err(StoreError::Foreign { path: path.to_owned() });
    }
    if found > VERSION {
        return Err(StoreError::Newer { path: path.to_owned(), found, known: VERSION });
    }
    if tables == 0 {
        // Takes effect only while the database is empty; lets retention give space back without rewriting the file.
        connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL; VACUUM").map_err(failed)?;
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive).map_err(failed)?;
    // Read again under the lock: another process may have migrated in between.
    let found = number(&transaction, "PRAGMA user_version").map_err(failed)?;
    for step in MIGRATIONS.iter().skip(usize::try_from(found).unwrap_or(0)) {
        transaction.execute_batch(step).map_err(failed)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
    transaction.pragma_update(None, "user_version", VERSION).map_err(failed)?;
    transaction.commit().map_err(failed)
}

/// What a statement can fail on though every page is sound: columns, references and indices, one line each.
const STRUCTURE: &str = "
SELECT t.name || ' column ' || c.name || ' ' || c.type || ' ' || c.\"notnull\" || ' ' || coalesce(c.dflt_value, '') || ' ' || c.pk
FROM sqlite_schema t, pragma_table_xinfo(t.name) c WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%'
UNION ALL
SELECT t.name || ' reference ' || f.\"from\" || ' ' || f.\"table\" || ' ' || coalesce(f.\"to\", '') || ' ' || f.on_delete
FROM sqlite_schema t, pragma_foreign_key_list(t.name) f WHERE t.type = 'table'
UNION ALL
SELECT t.name || ' index ' || i.name || ' ' || i.\"unique\" || ' ' || x.seqno || ' ' || coalesce(x.name, '') || ' ' || x.\"desc\"
FROM sqlite_schema t, pragma_index_list(t.name) i, pragma_index_xinfo(i.name) x WHERE t.type = 'table'";

/// Looks whether the tables are those that the migrations make: a flipped bit in a column's name leaves a database whose every page is
/// sound and that answers nothing. Errors: `Damaged`, or what SQLite says.
pub(super) fn check(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let failed = |source| refused(path, "open", source);
    let structure = |connection: &Connection| -> rusqlite::Result<BTreeSet<String>> {
        connection.prepare(STRUCTURE)?.query_map([], |row| row.get(0))?.collect()
    };
    let made = || -> rusqlite::Result<BTreeSet<String>> {
        let fresh = Connection::open_in_memory()?;
        MIGRATIONS.iter().try_for_each(|step| fresh.execute_batch(step))?;
        structure(&fresh)
    };
    let damaged = |detail: String| StoreError::Damaged { path: path.to_owned(), detail };
    let found = match structure(connection) {
        Ok(found) => found,
        // Names that are no text any more.
        Err(error @ (Error::FromSqlConversionFailure(..) | Error::InvalidColumnType(..) | Error::Utf8Error(..))) => {
            return Err(damaged(format!("its tables' definitions cannot be read: {error}")));
        }
        Err(error) => return Err(failed(error)),
    };
    match made().map_err(failed)?.difference(&found).next() {
        None => Ok(()),
        Some(missing) => Err(damaged(format!("its tables' definitions are not as made: no {missing:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Store;
    use super::*;

    #[test]
    fn a_definition_that_is_not_as_made_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        for (n, (table, from, to)) in [
            ("policies", "vm ", "wm "),
            ("disks", "store ", "stose "),
            ("profiles", "REFERENCES storages", "REFERENCES storagds"),
            ("disks", "CREATE TABLE disks", "CREATE TABLE diskr"),
        ]
        .into_iter()
        .enumerate()
        {
            let path = folder.path().join(n.to_string());
            assert!(Store::open(&path).unwrap().close(std::time::Duration::from_secs(60)));
            let raw = Connection::open(&path).unwrap();
            raw.pragma_update(None, "writable_schema", true).unwrap();
            let name = to.strip_prefix("CREATE TABLE ").unwrap_or(table);
            let changed = raw
                .execute(
                    "UPDATE sqlite_schema SET sql = replace(sql, ?1, ?2), name = ?4, tbl_name = ?4
                     WHERE type = 'table' AND name = ?3 AND instr(sql, ?1) > 0",
                    [from, to, table, name],
                )
                .unwrap();
            assert_eq!(changed, 1, "{table} {from}");
            drop(raw);
            let error = Store::open(&path).unwrap_err();
            assert!(matches!(&error, StoreError::Damaged { .. }), "{table} {to}: {error:?}");
        }
    }
}
