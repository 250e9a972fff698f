//! What is decided about machines' resources, and who is told: decisions, policies, reservations, events and their deliveries.
//!
//! - `decisions.rs`: what was decided and what came of it
//! - `outbox.rs`: events, and which of them which endpoint has yet to get
//! - `promises.rs`: policies of machines, and reservations
//! - `kept.rs`: small things under a name
//!
//! A change and the event that tells of it are one transaction: an event is told if and only if what it tells of is on record.

mod decisions;
mod kept;
mod outbox;
mod promises;
#[cfg(test)]
mod tests;

use serde::de::IgnoredAny;

use super::StoreError;

pub use decisions::{Completion, Decision, DecisionKind, DecisionRow, Decisions, Mode, Outcome, Resource};
pub use outbox::{Endpoint, EndpointStatus, EventRow, Head, NewEvent, WAITING_MAX};
pub use promises::{PolicyRow, Reservation, ReservationState, Reservations};

/// Longest JSON text taken into a row.
pub const JSON_MAX: usize = 64 << 10;

pub(super) const TABLES: &str = "
-- What was decided of a resource of a machine, and what came of it. before, asked, got: in the resource's unit (demand/decisions.rs).
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_us INTEGER NOT NULL,
    vm TEXT NOT NULL,
    resource TEXT NOT NULL CHECK (resource IN ('cpu', 'memory', 'disk', 'network')),
    mode TEXT NOT NULL CHECK (mode IN ('observe', 'recommend', 'act')),
    kind TEXT NOT NULL CHECK (kind IN ('raise', 'lower', 'hold', 'refuse')),
    before REAL,
    asked REAL,
    got REAL,
    verified INTEGER,
    outcome TEXT NOT NULL CHECK (outcome IN ('proposed', 'pending', 'done', 'partial', 'failed', 'rolled-back')),
    why TEXT NOT NULL,
    forecast TEXT
);
CREATE UNIQUE INDEX decisions_by_vm ON decisions(vm, at_us, resource);
CREATE INDEX decisions_by_time ON decisions(at_us, id);
CREATE INDEX decisions_pending ON decisions(id) WHERE outcome = 'pending';
-- Events as they are told (CloudEvents); subject: machine, or 'host'.
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    subject TEXT NOT NULL,
    at_us INTEGER NOT NULL,
    data TEXT NOT NULL
);
-- Who is told what: '*' is all kinds. From the configuration, written anew with each start and reload.
CREATE TABLE endpoints (
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    PRIMARY KEY (name, kind)
) WITHOUT ROWID;
-- What an endpoint has yet to get, or never got (dead). A delivery that succeeded has no row.
CREATE TABLE deliveries (
    endpoint TEXT NOT NULL,
    seq INTEGER NOT NULL REFERENCES events(seq) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    tries INTEGER NOT NULL,
    next_unix_ms INTEGER NOT NULL,
    dead INTEGER NOT NULL,
    error TEXT,
    PRIMARY KEY (endpoint, seq)
) WITHOUT ROWID;
CREATE INDEX deliveries_by_event ON deliveries(seq);
CREATE INDEX deliveries_waiting ON deliveries(endpoint, subject, seq) WHERE dead = 0;
-- JSON, opaque here.
CREATE TABLE policies (
    vm TEXT PRIMARY KEY,
    data TEXT NOT NULL,
    changed_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE reservations (
    id TEXT PRIMARY KEY,
    vm TEXT NOT NULL,
    from_s INTEGER NOT NULL,
    to_s INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('admitted', 'active', 'ended', 'refused', 'cancelled')),
    data TEXT NOT NULL,
    changed_unix_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX reservations_by_vm ON reservations(vm, from_s);
CREATE INDEX reservations_by_state ON reservations(state, to_s);
-- Courses of programs (demand/executions.rs in the agent), events that are to come.
CREATE TABLE kept (
    name TEXT PRIMARY KEY,
    value BLOB NOT NULL
) WITHOUT ROWID;
";

/// JSON that fits a row. Errors: `WrongState`.
fn json(what: &str, text: &str) -> Result<(), StoreError> {
    if text.len() > JSON_MAX {
        return Err(StoreError::WrongState(format!(
            "{what} is {} bytes long, at most {JSON_MAX} are kept",
            text.len()
        )));
    }
    match serde_json::from_str::<IgnoredAny>(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(StoreError::WrongState(format!("{what} is no JSON: {error}"))),
    }
}

/// Words of an enum in the database.
macro_rules! words {
    ($Type:ident { $($Variant:ident => $word:literal),* $(,)? }) => {
        impl $Type {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$Variant),*];

            /// Its name in the database, the API and events.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$Variant => $word),* }
            }
        }

        impl rusqlite::types::FromSql for $Type {
            fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
                match value.as_str()? {
                    $($word => Ok(Self::$Variant),)*
                    _ => Err(rusqlite::types::FromSqlError::InvalidType),
                }
            }
        }

        impl rusqlite::types::ToSql for $Type {
            fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
                Ok(self.name().into())
            }
        }
    };
}
pub(super) use words;
