//! Events and who has yet to get them.
//!
//! An event goes to every endpoint that asked for its kind when it happened. What an endpoint has not got waits as a delivery; a delivery
//! that cannot be made is *dead* in the end, and kept so for as long as its event is. Within an endpoint and a subject (a machine) one
//! waits for the one before.

use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::json;
use crate::store::records::{int, unsigned};
use crate::store::writer::Pending;
use crate::store::{Store, StoreError};

/// Most deliveries that wait for one endpoint; the oldest are dead beyond that. Days of a busy host.
pub const WAITING_MAX: u64 = 10_000;
/// Machines whose next delivery is looked at: more than a host has.
const LANES_MAX: u32 = 4096;
/// Longest reason kept of a failure.
const ERROR_MAX: usize = 500;
/// The minute in which it was last said that too many wait.
static SAID: AtomicU64 = AtomicU64::new(0);

/// Something that happened, about to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// Such as `allocation.changed`.
    pub kind: String,
    /// Who says so: a URI reference.
    pub source: String,
    /// UUID of the machine, or `host`: events of one subject are told in order.
    pub subject: String,
    /// Unix µs.
    pub at_us: u64,
    /// JSON.
    pub data: String,
}

impl NewEvent {
    pub(super) fn check(&self) -> Result<(), StoreError> {
        json("an event", &self.data)
    }
}

/// An event as it was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// In order of the events, without meaning otherwise.
    pub seq: u64,
    /// 32 hexadecimal digits that no other event has.
    pub id: String,
    pub event: NewEvent,
}

/// Who is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub name: String,
    /// Kinds of events; `*` is all.
    pub kinds: Vec<String>,
}

/// The first delivery that waits in a lane: of an endpoint, the events of one subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub subject: String,
    pub seq: u64,
    /// Tries that failed.
    pub tries: u32,
    /// Not before, Unix ms.
    pub next_unix_ms: u64,
    /// When the event happened, Unix ms.
    pub since_unix_ms: u64,
}

/// How an endpoint fares.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointStatus {
    pub name: String,
    pub waiting: u64,
    pub dead: u64,
    /// When the oldest event that waits happened, Unix µs.
    pub oldest_us: Option<u64>,
    /// Why the last try of the oldest failed.
    pub error: Option<String>,
}

/// Adds an event, and a delivery for each endpoint that asked for its kind.
pub(super) fn add(connection: &Connection, event: &NewEvent) -> rusqlite::Result<()> {
    let NewEvent { kind, source, subject, at_us, data } = event;
    connection
        .prepare_cached(
            "INSERT INTO events (id, kind, source, subject, at_us, data) VALUES (lower(hex(randomblob(16))), ?, ?, ?, ?, ?)",
        )?
        .execute(params![kind, source, subject, int(*at_us), data])?;
    let seq = connection.last_insert_rowid();
    let names: Vec<String> = connection
        .prepare_cached("SELECT DISTINCT name FROM endpoints WHERE kind = ? OR kind = '*'")?
        .query_map([kind], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    for name in names {
        connection
            .prepare_cached(
                "INSERT INTO deliveries (endpoint, seq, subject, tries, next_unix_ms, dead) VALUES (?, ?, ?, 0, 0, 0)",
            )?
            .execute(params![name, seq, subject])?;
        let waiting: u64 = connection
            .prepare_cached("SELECT count(*) FROM deliveries WHERE endpoint = ? AND dead = 0")?
            .query_row([&name], |row| unsigned(row, 0))?;
        if let Some(excess) = waiting.checked_sub(WAITING_MAX).filter(|excess| *excess > 0) {
            let sql = "UPDATE deliveries SET dead = 1, error = 'too many events wait for this endpoint'
                WHERE endpoint = ?1 AND seq IN (SELECT seq FROM deliveries WHERE endpoint = ?1 AND dead = 0 ORDER BY seq LIMIT ?2)";
            connection.prepare_cached(sql)?.execute(params![name, int(excess)])?;
            // Once a minute, not with every event.
            let minute = at_us / 60_000_000;
            if SAID.swap(minute, Ordering::Relaxed) != minute {
                tracing::error!(endpoint = name, waiting, "webhook: too many events wait, the oldest are given up");
            }
        }
    }
    Ok(())
}

impl Store {
    /// Tells an event that goes with no other change. Errors: `WrongState` where its data is no JSON.
    pub fn record_event(&self, event: NewEvent) -> Pending {
        if let Err(error) = event.check() {
            return Pending::failed(error);
        }
        self.inner.writer.submit(0, false, move |connection| Ok(add(connection, &event)?))
    }

    /// Sets who is told what from now on. What waits for an endpoint that is not among them is dropped.
    pub fn set_endpoints(&self, endpoints: Vec<Endpoint>) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            connection.execute("DELETE FROM endpoints", [])?;
            for Endpoint { name, kinds } in &endpoints {
                for kind in kinds {
                    connection
                        .prepare_cached("INSERT OR IGNORE INTO endpoints (name, kind) VALUES (?, ?)")?
                        .execute([name, kind])?;
                }
            }
            connection.execute("DELETE FROM deliveries WHERE endpoint NOT IN (SELECT name FROM endpoints)", [])?;
            Ok(())
        })
    }

    /// What is next in each lane of an endpoint, oldest events first.
    pub fn waiting(&self, endpoint: &str) -> Result<Vec<Head>, StoreError> {
        self.read("read the outbox of", |connection| {
            // SQLite takes the other columns from the row with the minimum.
            let sql = "SELECT heads.subject, first, tries, next_unix_ms, at_us FROM
                (SELECT subject, min(seq) AS first, tries, next_unix_ms FROM deliveries INDEXED BY deliveries_waiting
                 WHERE endpoint = ? AND dead = 0 GROUP BY subject ORDER BY first LIMIT ?) AS heads
                JOIN events ON seq = first ORDER BY first";
            let head = |row: &Row<'_>| {
                Ok(Head {
                    subject: row.get(0)?,
                    seq: unsigned(row, 1)?,
                    tries: row.get(2)?,
                    next_unix_ms: unsigned(row, 3)?,
                    since_unix_ms: unsigned(row, 4)? / 1000,
                })
            };
            connection.prepare_cached(sql)?.query_map(params![endpoint, LANES_MAX], head)?.collect()
        })
    }

    /// An event by its place in the order.
    pub fn event(&self, seq: u64) -> Result<Option<EventRow>, StoreError> {
        self.read("read events from", |connection| {
            connection.prepare_cached(&format!("{SELECT} WHERE seq = ?"))?.query_row([int(seq)], event_row).optional()
        })
    }

    /// Events after `seq`, oldest first, at most `limit`.
    pub fn events_after(&self, seq: u64, limit: u32) -> Result<Vec<EventRow>, StoreError> {
        self.read("read events from", |connection| {
            let sql = format!("{SELECT} WHERE seq > ? ORDER BY seq LIMIT ?");
            connection.prepare_cached(&sql)?.query_map(params![int(seq), limit], event_row)?.collect()
        })
    }

    /// An endpoint has an event.
    pub fn delivered(&self, endpoint: &str, seq: u64) -> Pending {
        let endpoint = endpoint.to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "DELETE FROM deliveries WHERE endpoint = ? AND seq = ?";
            connection.prepare_cached(sql)?.execute(params![endpoint, int(seq)])?;
            Ok(())
        })
    }

    /// A try failed; the next is not before `next_unix_ms`, or never if `dead`.
    pub fn undelivered(&self, endpoint: &str, seq: u64, next_unix_ms: u64, dead: bool, error: &str) -> Pending {
        let endpoint = endpoint.to_owned();
        let error: String = error.chars().take(ERROR_MAX).collect();
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "UPDATE deliveries SET tries = tries + 1, next_unix_ms = ?, dead = ?, error = ?
                WHERE endpoint = ? AND seq = ?";
            connection.prepare_cached(sql)?.execute(params![int(next_unix_ms), dead, error, endpoint, int(seq)])?;
            Ok(())
        })
    }

    /// Tries the dead deliveries of an endpoint again, from the beginning. They come after what was delivered meanwhile.
    /// Errors: `NotFound` if there are none.
    pub fn revive(&self, endpoint: &str) -> Pending {
        let endpoint = endpoint.to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "UPDATE deliveries SET dead = 0, tries = 0, next_unix_ms = 0 WHERE endpoint = ? AND dead = 1";
            match connection.execute(sql, [&endpoint])? {
                0 => Err(StoreError::NotFound { what: "dead delivery of endpoint", name: endpoint.clone() }.into()),
                _ => Ok(()),
            }
        })
    }

    /// How the endpoints fare, by name.
    pub fn endpoints(&self) -> Result<Vec<EndpointStatus>, StoreError> {
        self.read("read the outbox of", |connection| {
            let sql = "SELECT name, (SELECT count(*) FROM deliveries WHERE endpoint = name AND dead = 0),
                (SELECT count(*) FROM deliveries WHERE endpoint = name AND dead = 1),
                (SELECT at_us FROM events WHERE seq = first), (SELECT error FROM deliveries WHERE endpoint = name AND seq = first)
                FROM (SELECT name, (SELECT min(seq) FROM deliveries WHERE endpoint = name AND dead = 0) AS first
                    FROM (SELECT DISTINCT name FROM endpoints)) ORDER BY name";
            let status = |row: &Row<'_>| {
                let oldest: Option<i64> = row.get(3)?;
                Ok(EndpointStatus {
                    name: row.get(0)?,
                    waiting: unsigned(row, 1)?,
                    dead: unsigned(row, 2)?,
                    oldest_us: oldest.and_then(|at_us| u64::try_from(at_us).ok()),
                    error: row.get(4)?,
                })
            };
            connection.prepare_cached(sql)?.query_map([], status)?.collect()
        })
    }

    /// Removes events from before `before_us` (Unix µs) and, oldest first, what exceeds `most`, with their dead deliveries; those that
    /// somebody has yet to get stay.
    pub fn retain_events(&self, before_us: u64, most: u64) -> Pending {
        self.inner.writer.submit(0, true, move |connection| {
            let sql = "DELETE FROM events WHERE (at_us < ?1 OR seq <= (SELECT seq FROM events ORDER BY seq DESC LIMIT 1 OFFSET ?2))
                AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.seq = events.seq AND dead = 0)";
            connection.execute(sql, params![int(before_us), int(most)])?;
            Ok(())
        })
    }
}

const SELECT: &str = "SELECT seq, id, kind, source, subject, at_us, data FROM events";

fn event_row(row: &Row<'_>) -> rusqlite::Result<EventRow> {
    let event = NewEvent {
        kind: row.get(2)?,
        source: row.get(3)?,
        subject: row.get(4)?,
        at_us: unsigned(row, 5)?,
        data: row.get(6)?,
    };
    Ok(EventRow { seq: unsigned(row, 0)?, id: row.get(1)?, event })
}
