//! Decisions: what was decided of a machine's resource, why, and what came of it.
//!
//! | from | to | by |
//! | --- | --- | --- |
//! | – | proposed (nothing is to be done), pending (it is about to be) | [`Store::record_decision`] |
//! | pending | done, partial, failed, rolled back | [`Store::finish_decision`] |
//!
//! A decision that is carried out is on record before it is, so that after a crash it is known what was under way:
//! [`Store::pending_decisions`].

use rusqlite::{OptionalExtension, Row, params};

use super::outbox::{self, NewEvent};
use super::{json, words};
use crate::store::records::{int, unsigned};
use crate::store::writer::{Pending, WorkError};
use crate::store::{Store, StoreError, readable};

/// Most decisions of a page.
const PAGE_MAX: u32 = 1000;

/// What a machine has of the host. Units: cores, bytes, bytes a second, bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Cpu,
    Memory,
    Disk,
    Network,
}

words!(Resource { Cpu => "cpu", Memory => "memory", Disk => "disk", Network => "network" });

/// What may be done about a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing; what would be done is on record.
    Observe,
    /// Nothing; what should be done is told.
    Recommend,
    Act,
}

words!(Mode { Observe => "observe", Recommend => "recommend", Act => "act" });

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecisionKind {
    Raise,
    Lower,
    Hold,
    Refuse,
}

words!(DecisionKind { Raise => "raise", Lower => "lower", Hold => "hold", Refuse => "refuse" });

/// What came of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is to be done.
    Proposed,
    /// It is being carried out, or was when the daemon ended.
    Pending,
    Done,
    /// Less than asked for.
    Partial,
    Failed,
    /// Failed half-way, and undone.
    RolledBack,
}

words!(Outcome {
    Proposed => "proposed",
    Pending => "pending",
    Done => "done",
    Partial => "partial",
    Failed => "failed",
    RolledBack => "rolled-back",
});

/// A decision as it is made. Machine, resource and time name it.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Unix µs.
    pub at_us: u64,
    /// UUID.
    pub vm: String,
    pub resource: Resource,
    pub mode: Mode,
    pub kind: DecisionKind,
    /// In the resource's unit.
    pub before: Option<f64>,
    pub asked: Option<f64>,
    /// It is about to be carried out.
    pub pending: bool,
    /// With the figures it rests on.
    pub why: String,
    /// JSON.
    pub forecast: Option<String>,
}

/// What came of a decision that was carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// Not `Proposed`, not `Pending`.
    pub outcome: Outcome,
    /// In the resource's unit.
    pub got: Option<f64>,
    /// `got` was read back from the machine.
    pub verified: bool,
    /// From the order to what was read back last; `None`: nobody knows.
    pub took_ms: Option<u64>,
    /// Added to the decision's reasons; may be empty.
    pub why: String,
}

/// A decision on record.
#[derive(Debug, Clone, PartialEq)]
pub struct DecisionRow {
    pub id: i64,
    /// As it was made; `pending` as it is now.
    pub decision: Decision,
    pub outcome: Outcome,
    pub got: Option<f64>,
    pub verified: Option<bool>,
    /// `None`: not carried out, or not timed.
    pub took_ms: Option<u64>,
}

/// Which decisions are asked for; the newest come first.
#[derive(Debug, Clone, Default)]
pub struct Decisions {
    pub vm: Option<String>,
    pub resource: Option<Resource>,
    /// Unix µs, both inclusive.
    pub from_us: Option<u64>,
    pub to_us: Option<u64>,
    /// Only what comes after this one (time and id), which was the last of the page before.
    pub after: Option<(u64, i64)>,
    /// 1 to 1000.
    pub limit: u32,
}

impl Store {
    /// Puts a decision on record, and the event that tells of it into the outbox, in one transaction.
    ///
    /// # Errors
    /// `AlreadyExists` for a second one of the same machine, resource and time; `WrongState` where JSON is none.
    pub fn record_decision(&self, decision: Decision, event: Option<NewEvent>) -> Pending {
        let forecast = decision.forecast.as_deref().map_or(Ok(()), |text| json("a forecast", text));
        if let Err(error) = forecast.and_then(|()| event.as_ref().map_or(Ok(()), NewEvent::check)) {
            return Pending::failed(error);
        }
        self.inner.writer.submit(0, false, move |connection| {
            let Decision { at_us, vm, resource, mode, kind, before, asked, pending, why, forecast } = &decision;
            let outcome = if *pending { Outcome::Pending } else { Outcome::Proposed };
            let sql = "INSERT INTO decisions (at_us, vm, resource, mode, kind, before, asked, outcome, why, forecast)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING";
            let values = params![int(*at_us), vm, resource, mode, kind, before, asked, outcome, why, forecast];
            if connection.prepare_cached(sql)?.execute(values)? == 0 {
                let name = format!("{} {} {at_us}", vm, resource.name());
                return Err(StoreError::AlreadyExists { what: "decision", name }.into());
            }
            Ok(event.iter().try_for_each(|event| outbox::add(connection, event))?)
        })
    }

    /// Puts on record what came of a pending decision, and the event that tells of it into the outbox, in one transaction.
    ///
    /// # Errors
    /// `NotFound`; `WrongState` if it is not pending, or the outcome says it still is.
    pub fn finish_decision(
        &self,
        (vm, resource, at_us): (&str, Resource, u64),
        result: Completion,
        event: Option<NewEvent>,
    ) -> Pending {
        let name = format!("{vm} {} {at_us}", resource.name());
        if matches!(result.outcome, Outcome::Pending | Outcome::Proposed) {
            return Pending::failed(StoreError::WrongState(format!("decision {name} is not finished by that")));
        }
        if let Err(error) = event.as_ref().map_or(Ok(()), NewEvent::check) {
            return Pending::failed(error);
        }
        let vm = vm.to_owned();
        self.inner.writer.submit(0, false, move |connection| -> Result<(), WorkError> {
            let key = params![vm, int(at_us), resource];
            let found: Option<Outcome> = {
                let sql = "SELECT outcome FROM decisions WHERE vm = ? AND at_us = ? AND resource = ?";
                let mut statement = connection.prepare_cached(sql)?;
                statement.query_map(key, |row| row.get(0))?.next().transpose()?
            };
            match found {
                None => return Err(StoreError::NotFound { what: "decision", name: name.clone() }.into()),
                Some(Outcome::Pending) => {}
                Some(other) => {
                    return Err(StoreError::WrongState(format!("decision {name} is {} already", other.name())).into());
                }
            }
            let Completion { outcome, got, verified, took_ms, why } = &result;
            let sql = "UPDATE decisions SET outcome = ?, got = ?, verified = ?,
                    why = CASE ?4 WHEN '' THEN why ELSE why || '; ' || ?4 END, took_ms = ?
                WHERE vm = ? AND at_us = ? AND resource = ?";
            let took_ms = took_ms.map(int);
            let values = params![outcome, got, verified, why, took_ms, vm, int(at_us), resource];
            connection.prepare_cached(sql)?.execute(values)?;
            Ok(event.iter().try_for_each(|event| outbox::add(connection, event))?)
        })
    }

    /// Decisions, newest first. Errors: `WrongState` of a limit that is none.
    pub fn decisions(&self, which: &Decisions) -> Result<Vec<DecisionRow>, StoreError> {
        if !(1..=PAGE_MAX).contains(&which.limit) {
            let error = format!("{} decisions a page are asked for; it is 1 to {PAGE_MAX}", which.limit);
            return Err(StoreError::WrongState(error));
        }
        self.read("read decisions from", |connection| {
            // One statement for each index, so that a page costs its rows and not those before it.
            let of_vm = if which.vm.is_some() { "vm = ?1 AND" } else { "?1 IS NULL AND" };
            let sql = format!(
                "{SELECT} WHERE {of_vm} at_us BETWEEN ?2 AND ?3 AND (at_us, id) < (?4, ?5) AND (?6 IS NULL OR resource = ?6)
                ORDER BY at_us DESC, id DESC LIMIT ?7"
            );
            let (after_us, after_id) = which.after.map_or((i64::MAX, i64::MAX), |(at_us, id)| (int(at_us), id));
            let to_us = which.to_us.map_or(i64::MAX, int).min(after_us);
            let from_us = int(which.from_us.unwrap_or(0));
            let values = params![which.vm, from_us, to_us, after_us, after_id, which.resource, which.limit];
            connection.prepare_cached(&sql)?.query_map(values, decision_row)?.collect()
        })
    }

    /// When a decision was made, Unix µs; `None`: it is not on record.
    pub fn decision_time(&self, id: i64) -> Result<Option<u64>, StoreError> {
        self.read("read decisions from", |connection| {
            let sql = "SELECT at_us FROM decisions WHERE id = ?";
            connection.prepare_cached(sql)?.query_row([id], |row| unsigned(row, 0)).optional()
        })
    }

    /// Decisions that were being carried out when the daemon ended, oldest first.
    pub fn pending_decisions(&self) -> Result<Vec<DecisionRow>, StoreError> {
        self.read("read decisions from", |connection| {
            let sql = format!("{SELECT} WHERE outcome = 'pending' ORDER BY id");
            readable("decisions", connection.prepare_cached(&sql)?.query_map([], decision_row)?)
        })
    }

    /// Removes decisions from before `before_us` (Unix µs) and, oldest first, what exceeds `most`; pending ones stay.
    pub fn retain_decisions(&self, before_us: u64, most: u64) -> Pending {
        self.inner.writer.submit(0, true, move |connection| {
            let sql = "DELETE FROM decisions WHERE outcome != 'pending' AND (at_us < ?1 OR id <=
                (SELECT id FROM decisions ORDER BY id DESC LIMIT 1 OFFSET ?2))";
            connection.execute(sql, params![int(before_us), int(most)])?;
            Ok(())
        })
    }
}

const SELECT: &str = "SELECT id, at_us, vm, resource, mode, kind, before, asked, why, forecast, outcome, got, verified, took_ms FROM decisions";

fn decision_row(row: &Row<'_>) -> rusqlite::Result<DecisionRow> {
    let outcome: Outcome = row.get(10)?;
    let decision = Decision {
        at_us: unsigned(row, 1)?,
        vm: row.get(2)?,
        resource: row.get(3)?,
        mode: row.get(4)?,
        kind: row.get(5)?,
        before: row.get(6)?,
        asked: row.get(7)?,
        pending: outcome == Outcome::Pending,
        why: row.get(8)?,
        forecast: row.get(9)?,
    };
    let took_ms = row.get::<_, Option<i64>>(13)?.and_then(|took_ms| u64::try_from(took_ms).ok());
    Ok(DecisionRow { id: row.get(0)?, decision, outcome, got: row.get(11)?, verified: row.get(12)?, took_ms })
}
