//! Policies of machines, and reservations: what was promised to whom. Their figures are JSON, which the planner reads.

use rusqlite::{Row, params};

use super::outbox::{self, NewEvent};
use super::{json, words};
use crate::store::records::{int, unsigned};
use crate::store::writer::Pending;
use crate::store::{Store, StoreError, readable};

/// A policy of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRow {
    /// UUID.
    pub vm: String,
    /// JSON.
    pub data: String,
    pub changed_unix_ms: u64,
}

/// Where a reservation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReservationState {
    /// Promised; its time has not come.
    Admitted,
    Active,
    Ended,
    /// Did not fit.
    Refused,
    Cancelled,
}

words!(ReservationState {
    Admitted => "admitted",
    Active => "active",
    Ended => "ended",
    Refused => "refused",
    Cancelled => "cancelled",
});

/// What is reserved for a machine, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Given by whoever makes it.
    pub id: String,
    /// UUID.
    pub vm: String,
    /// Unix s; it ends before `to_s`.
    pub from_s: u64,
    pub to_s: u64,
    pub state: ReservationState,
    /// JSON.
    pub data: String,
    pub changed_unix_ms: u64,
}

/// Which reservations are asked for.
#[derive(Debug, Clone, Default)]
pub struct Reservations {
    pub vm: Option<String>,
    pub state: Option<ReservationState>,
    /// That share a moment with this time, Unix s, its end excluded.
    pub during_s: Option<(u64, u64)>,
}

impl Store {
    /// Sets a machine's policy in place of the one before. Errors: `WrongState` where it is no JSON.
    pub fn set_policy(&self, policy: PolicyRow) -> Pending {
        if let Err(error) = json("a policy", &policy.data) {
            return Pending::failed(error);
        }
        self.inner.writer.submit(0, false, move |connection| {
            let PolicyRow { vm, data, changed_unix_ms } = &policy;
            let sql = "REPLACE INTO policies (vm, data, changed_unix_ms) VALUES (?, ?, ?)";
            connection.prepare_cached(sql)?.execute(params![vm, data, int(*changed_unix_ms)])?;
            Ok(())
        })
    }

    /// Removes a machine's policy; the default holds then. Errors: `NotFound`.
    pub fn remove_policy(&self, vm: &str) -> Pending {
        let vm = vm.to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            match connection.execute("DELETE FROM policies WHERE vm = ?", [&vm])? {
                0 => Err(StoreError::NotFound { what: "policy of machine", name: vm.clone() }.into()),
                _ => Ok(()),
            }
        })
    }

    /// Policies by machine.
    pub fn policies(&self) -> Result<Vec<PolicyRow>, StoreError> {
        self.read("read policies from", |connection| {
            let row = |row: &Row<'_>| {
                Ok(PolicyRow { vm: row.get(0)?, data: row.get(1)?, changed_unix_ms: unsigned(row, 2)? })
            };
            let sql = "SELECT vm, data, changed_unix_ms FROM policies ORDER BY vm";
            readable("policies", connection.prepare_cached(sql)?.query_map([], row)?)
        })
    }

    /// Sets a reservation in place of the one before with its id, and puts the event that tells of it into the outbox, in one
    /// transaction. Errors: `WrongState` where JSON is none, or it ends before it begins.
    pub fn set_reservation(&self, reservation: Reservation, event: Option<NewEvent>) -> Pending {
        let checked = json("a reservation", &reservation.data);
        let checked = checked.and_then(|()| event.as_ref().map_or(Ok(()), NewEvent::check));
        let checked = checked.and_then(|()| match reservation.from_s < reservation.to_s {
            true => Ok(()),
            false => {
                let Reservation { id, from_s, to_s, .. } = &reservation;
                Err(StoreError::WrongState(format!("reservation `{id}` ends at {to_s}, before it begins at {from_s}")))
            }
        });
        if let Err(error) = checked {
            return Pending::failed(error);
        }
        self.inner.writer.submit(0, false, move |connection| {
            let Reservation { id, vm, from_s, to_s, state, data, changed_unix_ms } = &reservation;
            let sql = "REPLACE INTO reservations (id, vm, from_s, to_s, state, data, changed_unix_ms) VALUES (?, ?, ?, ?, ?, ?, ?)";
            let values = params![id, vm, int(*from_s), int(*to_s), state, data, int(*changed_unix_ms)];
            connection.prepare_cached(sql)?.execute(values)?;
            Ok(event.iter().try_for_each(|event| outbox::add(connection, event))?)
        })
    }

    /// Reservations by beginning.
    pub fn reservations(&self, which: &Reservations) -> Result<Vec<Reservation>, StoreError> {
        self.read("read reservations from", |connection| {
            let sql = "SELECT id, vm, from_s, to_s, state, data, changed_unix_ms FROM reservations
                WHERE (?1 IS NULL OR vm = ?1) AND (?2 IS NULL OR state = ?2) AND from_s < ?3 AND to_s > ?4
                ORDER BY from_s, id";
            let (from_s, to_s) = which.during_s.map_or((-1, i64::MAX), |(from_s, to_s)| (int(from_s), int(to_s)));
            let row = |row: &Row<'_>| {
                Ok(Reservation {
                    id: row.get(0)?,
                    vm: row.get(1)?,
                    from_s: unsigned(row, 2)?,
                    to_s: unsigned(row, 3)?,
                    state: row.get(4)?,
                    data: row.get(5)?,
                    changed_unix_ms: unsigned(row, 6)?,
                })
            };
            let values = params![which.vm, which.state, to_s, from_s];
            readable("reservations", connection.prepare_cached(sql)?.query_map(values, row)?)
        })
    }

    /// Removes reservations, whatever became of them, that ended before `before_s` (Unix s).
    pub fn retain_reservations(&self, before_s: u64) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "DELETE FROM reservations WHERE to_s < ?";
            connection.execute(sql, [int(before_s)])?;
            Ok(())
        })
    }
}
