//! The host's database: profiles, access history, outcomes, disks added at run time. SQLite in WAL mode, one file.
//!
//! - `schema.rs`: tables and migrations
//! - `writer.rs`: the one thread that writes, and the bounded queue before it
//! - `records.rs`: what goes in and comes out, by table
//! - `history/`: accesses: ingest, retention, and the questions they answer
//! - `models.rs`: models, their audit, thresholds
//! - `segment/`: accesses as compressed columns
//! - `demand/`: decisions, policies, reservations, and the outbox of events
//! - `executions.rs`: programs that run, and what is known of them
//! - `series/`: what machines used, with roll-ups
//! - `rescue.rs`: what is done with a database that cannot be used; `carry.rs`: what is carried over from it
//!
//! Guests never wait for this: writes are queued, a full queue or a full disk loses history and says so in [`Store::condition`], and the
//! data path does not know the database exists. Reads use a connection of their own, which writers do not block. Reads and
//! [`Pending::wait`] block their thread; on an async executor run reads in a blocking task and await a `Pending`.
//!
//! What a crash leaves: commits are synced (`synchronous = FULL`) and atomic, so each queued write is there whole or not at all, in order.

mod carry;
pub mod demand;
pub mod executions;
mod history;
pub mod models;
#[cfg(test)]
mod models_tests;
mod records;
pub mod rescue;
mod schema;
pub mod segment;
pub mod series;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OpenFlags};

pub use history::{
    Accesses, BLOCK_PAGES, Extent, HistoryStatus, HotBlock, HotHour, NEAR_LIMIT, Near, NearLimit, Retention, RunReads,
    RunRow, RunsOf, SegmentRow,
};
pub use records::{DiskRow, OutcomeRow, ProfileRow};
pub use writer::Pending;
use writer::Writer;

/// Why the database cannot be used, or a write was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error(
        "database {path} is damaged ({detail}); stop prestaged, move it aside with `for f in '{path}'*; do mv \"$f\" \"$f.damaged\"; done`, \
         and start again: profiles are learned anew and disks added at run time must be added again; no guest data is in it"
    )]
    Damaged { path: PathBuf, detail: String },
    #[error(
        "database {path} is of version {found}, this prestaged knows up to {known}; install the newer prestaged again, or move the \
         database aside and let it learn anew"
    )]
    Newer { path: PathBuf, found: i64, known: i64 },
    #[error("database {path} belongs to another program; set another `daemon.state_dir` or move the file away")]
    Foreign { path: PathBuf },
    #[error(
        "cannot {action} database {path}: no space left; free some on its file system or lower `learner.retention_bytes`"
    )]
    Full { action: &'static str, path: PathBuf },
    #[error("cannot {action} database {path}: locked by another process; see `fuser {path}`")]
    Locked { action: &'static str, path: PathBuf },
    #[error("cannot {action} database {path}: {detail}")]
    Refused { action: &'static str, path: PathBuf, detail: String },
    #[error("{what} `{name}` exists already")]
    AlreadyExists { what: &'static str, name: String },
    #[error("there is no {what} `{name}`")]
    NotFound { what: &'static str, name: String },
    #[error("{0}")]
    WrongState(String),
    #[error("too many writes wait for database {path}; it is slow or its disk is")]
    QueueFull { path: PathBuf },
    #[error("the database is closed")]
    Closed,
    #[error(transparent)]
    Segment(#[from] segment::SegmentError),
}

impl StoreError {
    /// The same write may succeed later: there may be room then, or the lock gone.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Locked { .. } | Self::Refused { .. } | Self::QueueFull { .. })
    }
}

/// Sorts SQLite's errors by what an operator can do about them.
fn refused(path: &Path, action: &'static str, error: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Damaged { path, detail: error.to_string() }
        }
        Some(ErrorCode::DiskFull) => StoreError::Full { action, path },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked { action, path },
        _ => StoreError::Refused { action, path, detail: error.to_string() },
    }
}

/// Tables that must be whole for a start.
const SMALL: &[&str] = &[
    "storages",
    "profiles",
    "disks",
    "thresholds",
    "policies",
    "reservations",
    "kept",
    "programs",
    "executions",
    "endpoints",
    "deliveries",
    "sqlite_sequence",
];
/// Those without which nothing is decided or told; looked at once a write has met damage.
const GROWING: &[&str] = &["decisions", "events"];

/// Its file is there if a write has met damage since the last start.
fn suspect(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-suspect");
    PathBuf::from(name)
}

/// Errors: `Damaged`, or what SQLite says.
fn check(connection: &Connection, path: &Path, tables: &[&str]) -> Result<(), StoreError> {
    for table in tables {
        let sql = format!("PRAGMA quick_check({table})");
        let verdict: String =
            connection.query_row(&sql, [], |row| row.get(0)).map_err(|error| refused(path, "open", error))?;
        if verdict != "ok" {
            return Err(StoreError::Damaged { path: path.to_owned(), detail: verdict });
        }
    }
    Ok(())
}

/// Rows that can be read; one whose values are not what its columns are for is left out, which is logged once for all of them.
fn readable<T>(what: &'static str, rows: impl Iterator<Item = rusqlite::Result<T>>) -> rusqlite::Result<Vec<T>> {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    let (mut read, mut odd) = (Vec::new(), 0u64);
    for row in rows {
        match row {
            Ok(row) => read.push(row),
            Err(FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | Utf8Error(..)) => {
                odd += 1;
            }
            Err(error) => return Err(error),
        }
    }
    if odd > 0 {
        tracing::error!(rows = odd, "damaged {what} in the database are left out; set them anew");
    }
    Ok(read)
}

/// What tells a file from another of the same name.
fn file_at(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

fn reader(path: &Path, busy_timeout: Duration) -> Result<Connection, StoreError> {
    let failed = |source| refused(path, "open", source);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.busy_timeout(busy_timeout).map_err(failed)?;
    Ok(connection)
}

/// Bounds of the queue before the writer.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Most writes waiting.
    pub queue: usize,
    /// Most bytes waiting.
    pub queue_bytes: u64,
    /// How long the writer waits for another process's lock before the write counts as failed.
    pub busy_timeout: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        // 64 MiB hold the histories of some 25 disks at their largest segments: minutes of a busy host.
        Self { queue: 1024, queue_bytes: 64 << 20, busy_timeout: Duration::from_secs(5) }
    }
}

/// How the database fares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    pub path: PathBuf,
    /// Database and write-ahead log.
    pub size_bytes: u64,
    /// Writes waiting.
    pub queued: u64,
    /// Writes lost: the queue was full, or the database refused them.
    pub writes_dropped: u64,
    /// Why the last write failed; `None` after one that succeeded.
    pub degraded: Option<String>,
}

/// The open database; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Device and inode of the file that was opened.
    file: Option<(u64, u64)>,
    reader: Mutex<Connection>,
    /// Idle connections for questions about history, which may take longer than others can wait for.
    history: Mutex<Vec<Connection>>,
    busy_timeout: Duration,
    writer: Arc<Writer>,
}

impl Store {
    /// Opens or makes the database, brings it to this version, checks the small tables and starts the writer thread.
    /// Errors: `Damaged`, `Newer`, `Foreign`, `Full`, `Locked`, `Refused`.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, StoreOptions::default())
    }

    /// [`Store::open`] with other bounds.
    pub fn open_with(path: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let cannot = |action| {
            move |error: std::io::Error| StoreError::Refused {
                action,
                path: path.to_owned(),
                detail: error.to_string(),
            }
        };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(cannot("make the folder of"))?;
        }
        // What guests read and when is nobody's business but the operator's.
        OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(cannot("open"))?;
        let failed = |source| refused(path, "open", source);

        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        connection.busy_timeout(options.busy_timeout).map_err(failed)?;
        schema::migrate(&mut connection, path)?;
        schema::check(&connection, path)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        connection.pragma_update(None, "foreign_keys", true).map_err(failed)?;
        // A long reader lets the log grow; it shrinks to this afterwards.
        connection.pragma_update(None, "journal_size_limit", 64 << 20).map_err(failed)?;
        // The history may be large and damage in it costs only itself; these are small and everything else needs them.
        check(&connection, path, SMALL)?;
        let suspect = suspect(path);
        if suspect.exists() {
            // Seconds, where they have grown for years.
            check(&connection, path, GROWING)?;
            let _ = std::fs::remove_file(suspect);
        }

        let reader = reader(path, options.busy_timeout)?;
        let writer = Arc::new(Writer::start(connection, path.to_owned(), options)?);
        Ok(Self::of(path, reader, options.busy_timeout, writer))
    }

    fn of(path: &Path, reader: Connection, busy_timeout: Duration, writer: Arc<Writer>) -> Self {
        let file = file_at(path);
        let (path, reader, history) = (path.to_owned(), Mutex::new(reader), Mutex::default());
        Self { inner: Arc::new(Inner { path, file, reader, history, busy_timeout, writer }) }
    }

    /// The same database with connections of its own, so that a thread of idle priority that reads it holds no lock that
    /// others wait for. Errors: what SQLite says.
    pub fn with_own_reader(&self) -> Result<Self, StoreError> {
        let Inner { path, busy_timeout, writer, .. } = &*self.inner;
        Ok(Self::of(path, reader(path, *busy_timeout)?, *busy_timeout, Arc::clone(writer)))
    }

    /// How the database fares.
    #[must_use]
    pub fn condition(&self) -> Condition {
        let size = |suffix: &str| {
            let mut name = self.inner.path.as_os_str().to_owned();
            name.push(suffix);
            std::fs::metadata(PathBuf::from(name)).map_or(0, |meta| meta.len())
        };
        let (queued, writes_dropped, degraded) = self.inner.writer.condition();
        let path = &self.inner.path;
        let gone = (file_at(path) != self.inner.file).then(|| {
            let path = path.display();
            format!("{path} was removed or replaced while it is in use: what is written is lost with the next stop; restart prestaged")
        });
        Condition {
            path: self.inner.path.clone(),
            size_bytes: size("") + size("-wal"),
            queued,
            writes_dropped,
            degraded: gone.or(degraded),
        }
    }

    /// Writes what is queued and ends the writer thread, waiting at most `limit`. Later writes fail with `Closed`.
    /// Returns whether everything was written.
    #[must_use]
    pub fn close(&self, limit: Duration) -> bool {
        self.inner.writer.close(limit)
    }

    /// Lets the database grow by this many pages more: a disk that is full, or is not any more.
    #[cfg(test)]
    pub(crate) fn leave_room(&self, pages: i64) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            let has: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0))?;
            Ok(connection.query_row(&format!("PRAGMA max_page_count = {}", has + pages), [], |_| Ok(()))?)
        })
    }

    fn read<T>(
        &self,
        action: &'static str,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        query(&self.inner.reader.lock()).map_err(|error| refused(&self.inner.path, action, error))
    }
}
