//! Tables of the database and the way from each version to the next.
//!
//! `application_id` is "PRST" and `user_version` the number of migrations applied. A migration is never edited once released: a change
//! is a further one at the end.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

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
