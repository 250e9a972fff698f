//! Models and thresholds in the database: every model with its weights, who was champion when, and why anything changed.
//!
//! | from | to | by |
//! | --- | --- | --- |
//! | – | training | [`Store::start_model`] |
//! | – | shadow | [`Store::import_model`]; a shadow before it in the scope is rejected |
//! | training | shadow | [`Store::finish_model`]; a shadow before it in the scope is rejected |
//! | shadow, retired, rejected | champion | [`Store::promote_model`]; the champion before it is retired |
//! | champion | retired | [`Store::rollback_model`]; the champion before it is champion again, if there was one |
//! | training, shadow | rejected | [`Store::reject_model`] |
//!
//! A scope has at most one model in training, one shadow and one champion; the database itself refuses a second. Each change
//! and its line in the audit are one transaction. Of retired and rejected models each scope keeps the latest
//! [`KEPT`]; the audit keeps its latest [`AUDIT_KEPT`] lines.

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::records::{int, unsigned};
use super::writer::{Pending, WorkError};
use super::{Store, StoreError};

/// Retired and rejected models kept of a scope: as far back as one can roll back.
pub const KEPT: u32 = 8;
/// Lines of audit kept: years of a model a day.
const AUDIT_KEPT: i64 = 10_000;

pub(super) const TABLES: &str = "
-- scope: 'global' or the identity of a storage. weights and checkpoint: opaque, with magic, version and checksum of their own.
CREATE TABLE models (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    scope TEXT NOT NULL,
    parent INTEGER REFERENCES models(id) ON DELETE SET NULL,
    state TEXT NOT NULL CHECK (state IN ('training', 'shadow', 'champion', 'retired', 'rejected')),
    seed INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    from_us INTEGER NOT NULL,
    to_us INTEGER NOT NULL,
    metrics TEXT,
    contest BLOB,
    created_unix_ms INTEGER NOT NULL,
    changed_unix_ms INTEGER NOT NULL,
    checkpoint BLOB,
    weights BLOB
);
CREATE UNIQUE INDEX models_alone ON models(scope, state) WHERE state IN ('training', 'shadow', 'champion');
CREATE INDEX models_by_scope ON models(scope, changed_unix_ms);
-- One row for each promotion that has not been rolled back; the last of a scope is its champion.
CREATE TABLE champions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    scope TEXT NOT NULL,
    model_id INTEGER NOT NULL REFERENCES models(id) ON DELETE CASCADE
);
CREATE INDEX champions_by_model ON champions(model_id);
-- Outlives the models it tells of.
CREATE TABLE model_audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    model_id INTEGER NOT NULL,
    at_unix_ms INTEGER NOT NULL,
    from_state TEXT,
    to_state TEXT NOT NULL,
    actor TEXT NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX model_audit_by_model ON model_audit(model_id, id);
-- Set at run time, over the configuration; scope '' is the default of all storages.
CREATE TABLE thresholds (
    scope TEXT PRIMARY KEY,
    probability REAL NOT NULL
) WITHOUT ROWID;
";

/// Where a model stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ModelState {
    Training,
    /// Predicts beside the champion without effect, to be compared.
    Shadow,
    /// In use.
    Champion,
    /// Was champion.
    Retired,
    /// Not better, or not trained to its end.
    Rejected,
}

impl ModelState {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Shadow => "shadow",
            Self::Champion => "champion",
            Self::Retired => "retired",
            Self::Rejected => "rejected",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::Training, Self::Shadow, Self::Champion, Self::Retired, Self::Rejected]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

impl rusqlite::types::FromSql for ModelState {
    fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
        Self::of(value.as_str()?).ok_or(rusqlite::types::FromSqlError::InvalidType)
    }
}

impl rusqlite::types::ToSql for ModelState {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        Ok(self.name().into())
    }
}

/// Why something is changed, for the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// `operator`, `trainer`, `contest` or `daemon`.
    pub actor: &'static str,
    pub reason: String,
    pub at_unix_ms: u64,
}

/// A model about to be trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewModel {
    pub kind: String,
    /// `global` or the identity of a storage.
    pub scope: String,
    /// Whose weights it starts from.
    pub parent: Option<i64>,
    /// 0 to 2^63 − 1.
    pub seed: u64,
}

/// A model that was trained elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedModel {
    pub kind: String,
    /// `global` or the identity of a storage, here.
    pub scope: String,
    pub seed: u64,
    /// Trained on, of accesses from `from_us` to `to_us` (Unix µs).
    pub tokens: u64,
    pub from_us: u64,
    pub to_us: u64,
    /// JSON, opaque here.
    pub metrics: Option<String>,
    pub weights: Vec<u8>,
}

/// A model without its blobs.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelRow {
    pub id: i64,
    pub kind: String,
    pub scope: String,
    pub parent: Option<i64>,
    pub state: ModelState,
    pub seed: u64,
    /// Trained on, of accesses from `from_us` to `to_us` (Unix µs).
    pub tokens: u64,
    pub from_us: u64,
    pub to_us: u64,
    /// JSON, opaque here.
    pub metrics: Option<String>,
    /// State of its comparison with the champion, opaque here.
    pub contest: Option<Vec<u8>>,
    pub created_unix_ms: u64,
    pub changed_unix_ms: u64,
    pub weights_bytes: u64,
    pub checkpoint_bytes: u64,
    /// Why it came to its state.
    pub reason: String,
}

/// One line of the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    pub model: i64,
    pub at_unix_ms: u64,
    /// `None`: it was made.
    pub from: Option<ModelState>,
    pub to: ModelState,
    pub actor: String,
    pub reason: String,
}

fn not_found(id: i64) -> WorkError {
    StoreError::NotFound { what: "model", name: id.to_string() }.into()
}

fn wrong_state(detail: String) -> WorkError {
    StoreError::WrongState(detail).into()
}

fn scope_and_state(connection: &Connection, id: i64) -> Result<(String, ModelState), WorkError> {
    let mut statement = connection.prepare("SELECT scope, state FROM models WHERE id = ?")?;
    statement.query_row([id], |row| Ok((row.get(0)?, row.get(1)?))).optional()?.ok_or_else(|| not_found(id))
}

fn holder(connection: &Connection, scope: &str, state: ModelState) -> rusqlite::Result<Option<i64>> {
    let mut statement = connection.prepare("SELECT id FROM models WHERE scope = ? AND state = ?")?;
    statement.query_row(params![scope, state], |row| row.get(0)).optional()
}

fn audit(
    connection: &Connection,
    id: i64,
    from: Option<ModelState>,
    to: ModelState,
    change: &Change,
) -> rusqlite::Result<()> {
    connection
        .prepare(
            "INSERT INTO model_audit (model_id, at_unix_ms, from_state, to_state, actor, reason) VALUES (?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![id, int(change.at_unix_ms), from, to, change.actor, change.reason])?;
    let last = connection.last_insert_rowid();
    connection.prepare("DELETE FROM model_audit WHERE id <= ?")?.execute([last - AUDIT_KEPT])?;
    Ok(())
}

/// Moves a model to another state. What only training or a contest needs goes with them.
fn set(connection: &Connection, id: i64, from: ModelState, to: ModelState, change: &Change) -> rusqlite::Result<()> {
    let sql = "UPDATE models SET state = ?, changed_unix_ms = ?, checkpoint = NULL, contest = NULL WHERE id = ?";
    connection.prepare(sql)?.execute(params![to, int(change.at_unix_ms), id])?;
    audit(connection, id, Some(from), to, change)
}

fn prune(connection: &Connection, scope: &str) -> rusqlite::Result<()> {
    let sql = "DELETE FROM models WHERE id IN (
        SELECT id FROM models WHERE scope = ? AND state IN ('retired', 'rejected')
        ORDER BY changed_unix_ms DESC, id DESC LIMIT -1 OFFSET ?)";
    connection.prepare(sql)?.execute(params![scope, KEPT])?;
    Ok(())
}

fn reject(connection: &Connection, id: i64, from: ModelState, change: &Change) -> rusqlite::Result<()> {
    set(connection, id, from, ModelState::Rejected, change)
}

impl Store {
    /// Adds a model in training; an unfinished training of its scope is rejected. It is found with [`Store::models`].
    pub fn start_model(&self, new: NewModel, change: Change) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            if let Some(unfinished) = holder(connection, &new.scope, ModelState::Training)? {
                let change = Change { reason: "a new training was started in its place".to_owned(), ..change.clone() };
                reject(connection, unfinished, ModelState::Training, &change)?;
            }
            let sql = "INSERT INTO models (kind, scope, parent, state, seed, tokens, from_us, to_us, created_unix_ms, changed_unix_ms)
                VALUES (?1, ?2, ?3, 'training', ?4, 0, 0, 0, ?5, ?5)";
            let at = int(change.at_unix_ms);
            connection.prepare(sql)?.execute(params![new.kind, new.scope, new.parent, int(new.seed), at])?;
            let id = connection.last_insert_rowid();
            audit(connection, id, None, ModelState::Training, &change)?;
            Ok(prune(connection, &new.scope)?)
        })
    }

    /// Notes what a model in training is trained on.
    pub fn describe_model(&self, id: i64, tokens: u64, from_us: u64, to_us: u64) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "UPDATE models SET tokens = ?, from_us = ?, to_us = ? WHERE id = ?";
            connection.prepare(sql)?.execute(params![int(tokens), int(from_us), int(to_us), id])?;
            Ok(())
        })
    }

    /// Keeps the state of a training in place of the one before; of a model that is not in training nothing is kept.
    pub fn save_checkpoint(&self, id: i64, checkpoint: Vec<u8>) -> Pending {
        self.inner.writer.submit(checkpoint.len() as u64, false, move |connection| {
            let sql = "UPDATE models SET checkpoint = ? WHERE id = ? AND state = 'training'";
            connection.prepare(sql)?.execute(params![checkpoint, id])?;
            Ok(())
        })
    }

    /// Keeps the state of a shadow's contest.
    pub fn save_contest(&self, id: i64, contest: Vec<u8>) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            let sql = "UPDATE models SET contest = ? WHERE id = ? AND state = 'shadow'";
            connection.prepare(sql)?.execute(params![contest, id])?;
            Ok(())
        })
    }

    /// Keeps a model's metrics.
    pub fn save_metrics(&self, id: i64, metrics: String) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            connection.prepare("UPDATE models SET metrics = ? WHERE id = ?")?.execute(params![metrics, id])?;
            Ok(())
        })
    }

    /// A training is done: the model becomes its scope's shadow. Errors: `NotFound`, `WrongState`.
    pub fn finish_model(&self, id: i64, weights: Vec<u8>, metrics: String, change: Change) -> Pending {
        self.inner.writer.submit(weights.len() as u64, false, move |connection| {
            let (scope, state) = scope_and_state(connection, id)?;
            if state != ModelState::Training {
                return Err(wrong_state(format!("model {id} is {}, not in training", state.name())));
            }
            if let Some(before) = holder(connection, &scope, ModelState::Shadow)? {
                let change = Change { reason: format!("model {id} is newer"), ..change.clone() };
                reject(connection, before, ModelState::Shadow, &change)?;
            }
            let sql = "UPDATE models SET weights = ?, metrics = ? WHERE id = ?";
            connection.prepare(sql)?.execute(params![weights, metrics, id])?;
            set(connection, id, ModelState::Training, ModelState::Shadow, &change)?;
            Ok(prune(connection, &scope)?)
        })
    }

    /// Adds a model that was trained elsewhere, as its scope's shadow. It is found with [`Store::models`].
    pub fn import_model(&self, model: ImportedModel, change: Change) -> Pending {
        self.inner.writer.submit(model.weights.len() as u64, false, move |connection| {
            if let Some(before) = holder(connection, &model.scope, ModelState::Shadow)? {
                let change = Change { reason: "another model was imported".to_owned(), ..change.clone() };
                reject(connection, before, ModelState::Shadow, &change)?;
            }
            let sql = "INSERT INTO models (kind, scope, parent, state, seed, tokens, from_us, to_us, metrics, weights,
                created_unix_ms, changed_unix_ms) VALUES (?1, ?2, NULL, 'shadow', ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9)";
            let ImportedModel { kind, scope, seed, tokens, from_us, to_us, metrics, weights } = &model;
            let [seed, tokens, from, to, at] = [*seed, *tokens, *from_us, *to_us, change.at_unix_ms].map(int);
            let row = params![kind, scope, seed, tokens, from, to, metrics, weights, at];
            connection.prepare(sql)?.execute(row)?;
            audit(connection, connection.last_insert_rowid(), None, ModelState::Shadow, &change)?;
            Ok(prune(connection, scope)?)
        })
    }

    /// Makes a model its scope's champion. Errors: `NotFound`; `WrongState` if it is in training, has no weights or is
    /// champion already.
    pub fn promote_model(&self, id: i64, change: Change) -> Pending {
        self.inner.writer.submit(0, false, move |connection| {
            let (scope, state) = scope_and_state(connection, id)?;
            match state {
                ModelState::Champion => return Err(wrong_state(format!("model {id} is champion already"))),
                ModelState::Training => return Err(wrong_state(format!("model {id} is still in training"))),
                ModelState::Shadow | ModelState::Retired | ModelState::Rejected => {}
            }
            let sql = "SELECT weights IS NOT NULL FROM models WHERE id = ?";
            if !connection.prepare(sql)?.query_row([id], |row| row.get::<_, bool>(0))? {
                return Err(wrong_state(format!("model {id} has no weights: its training did not come to its end")));
            }
            if let Some(before) = holder(connection, &scope, ModelState::Champion)? {
                let change = Change { reason: format!("model {id} was promoted"), ..change.clone() };
                set(connection, before, ModelState::Champion, ModelState::Retired, &change)?;
            }
            set(connection, id, state, ModelState::Champion, &change)?;
            let sql = "INSERT INTO champions (scope, model_id) VALUES (?, ?)";
            connection.prepare(sql)?.execute(params![scope, id])?;
            Ok(prune(connection, &scope)?)
        })
    }

    /// Takes the last promotion of a scope back: its champion is retired and the one before it is champion again; without
    /// one, the scope has none. Errors: `WrongState` if the scope has no champion.
    pub fn rollback_model(&self, scope: &str, change: Change) -> Pending {
        let scope = scope.to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            let Some(champion) = holder(connection, &scope, ModelState::Champion)? else {
                return Err(wrong_state(format!("there is no champion of {scope} to roll back")));
            };
            set(connection, champion, ModelState::Champion, ModelState::Retired, &change)?;
            // Its last reign, or several in a row, where the one between was of a model that is no longer kept.
            let sql = "DELETE FROM champions WHERE scope = ?1
                AND id > ifnull((SELECT max(id) FROM champions WHERE scope = ?1 AND model_id != ?2), 0)";
            connection.prepare(sql)?.execute(params![scope, champion])?;
            let before: Option<i64> = connection
                .prepare("SELECT model_id FROM champions WHERE scope = ? ORDER BY id DESC LIMIT 1")?
                .query_row([&scope], |row| row.get(0))
                .optional()?;
            if let Some(before) = before {
                let (_, state) = scope_and_state(connection, before)?;
                let change = Change { reason: format!("model {champion} was rolled back"), ..change.clone() };
                set(connection, before, state, ModelState::Champion, &change)?;
            }
            Ok(prune(connection, &scope)?)
        })
    }

    /// Gives a model in training, or a shadow, up. Errors: `NotFound`, `WrongState`.
    pub fn reject_model(&self, id: i64, change: Change) -> Pending {
        self.inner.writer.submit(0, false, move |connection| match scope_and_state(connection, id)? {
            (scope, state @ (ModelState::Training | ModelState::Shadow)) => {
                reject(connection, id, state, &change)?;
                Ok(prune(connection, &scope)?)
            }
            (_, state) => Err(wrong_state(format!("model {id} is {}", state.name()))),
        })
    }

    /// All models, by id.
    pub fn models(&self) -> Result<Vec<ModelRow>, StoreError> {
        self.read("read models from", |connection| {
            let sql = "SELECT id, kind, scope, parent, state, seed, tokens, from_us, to_us, metrics, contest,
                created_unix_ms, changed_unix_ms, ifnull(length(weights), 0), ifnull(length(checkpoint), 0),
                ifnull((SELECT reason FROM model_audit WHERE model_id = models.id ORDER BY model_audit.id DESC LIMIT 1), '')
                FROM models ORDER BY id";
            let row = |row: &Row<'_>| {
                Ok(ModelRow {
                    id: row.get(0)?,
                    kind: row.get(1)?,
                    scope: row.get(2)?,
                    parent: row.get(3)?,
                    state: row.get(4)?,
                    seed: unsigned(row, 5)?,
                    tokens: unsigned(row, 6)?,
                    from_us: unsigned(row, 7)?,
                    to_us: unsigned(row, 8)?,
                    metrics: row.get(9)?,
                    contest: row.get(10)?,
                    created_unix_ms: unsigned(row, 11)?,
                    changed_unix_ms: unsigned(row, 12)?,
                    weights_bytes: unsigned(row, 13)?,
                    checkpoint_bytes: unsigned(row, 14)?,
                    reason: row.get(15)?,
                })
            };
            connection.prepare(sql)?.query_map([], row)?.collect()
        })
    }

    /// Weights of a model, if it has any.
    pub fn model_weights(&self, id: i64) -> Result<Option<Vec<u8>>, StoreError> {
        self.model_blob("SELECT weights FROM models WHERE id = ?", id)
    }

    /// State of a model's training, if it has any.
    pub fn model_checkpoint(&self, id: i64) -> Result<Option<Vec<u8>>, StoreError> {
        self.model_blob("SELECT checkpoint FROM models WHERE id = ?", id)
    }

    fn model_blob(&self, sql: &str, id: i64) -> Result<Option<Vec<u8>>, StoreError> {
        self.read("read models from", |connection| {
            connection.prepare(sql)?.query_row([id], |row| row.get(0)).optional()
        })
        .map(Option::flatten)
    }

    /// What became of a model and why, oldest first; of all models without `id`.
    pub fn model_audit(&self, id: Option<i64>) -> Result<Vec<AuditRow>, StoreError> {
        self.read("read models from", |connection| {
            let sql = "SELECT model_id, at_unix_ms, from_state, to_state, actor, reason FROM model_audit
                WHERE ?1 IS NULL OR model_id = ?1 ORDER BY id";
            let row = |row: &Row<'_>| {
                Ok(AuditRow {
                    model: row.get(0)?,
                    at_unix_ms: unsigned(row, 1)?,
                    from: row.get(2)?,
                    to: row.get(3)?,
                    actor: row.get(4)?,
                    reason: row.get(5)?,
                })
            };
            connection.prepare(sql)?.query_map([id], row)?.collect()
        })
    }

    /// Sets a threshold at run time, of a storage or (`None`) of all without one; without a probability it is unset.
    pub fn set_threshold(&self, storage: Option<&str>, probability: Option<f64>) -> Pending {
        let scope = storage.unwrap_or_default().to_owned();
        self.inner.writer.submit(0, false, move |connection| {
            match probability {
                Some(probability) => connection
                    .prepare("REPLACE INTO thresholds (scope, probability) VALUES (?, ?)")?
                    .execute(params![scope, probability])?,
                None => connection.prepare("DELETE FROM thresholds WHERE scope = ?")?.execute([&scope])?,
            };
            Ok(())
        })
    }

    /// Thresholds set at run time: storage (`None`: all others) and probability. What is none is left out with a warning.
    pub fn thresholds(&self) -> Result<Vec<(Option<String>, f64)>, StoreError> {
        self.read("read thresholds from", |connection| {
            let mut statement = connection.prepare("SELECT scope, probability FROM thresholds ORDER BY scope")?;
            let row = |row: &Row<'_>| {
                let scope: String = row.get(0)?;
                let value: Value = row.get(1)?;
                let Value::Real(probability @ 0.0..=1.0) = value else {
                    tracing::warn!(scope, ?value, "what stands for a threshold is no probability; it is not obeyed");
                    return Ok(None);
                };
                Ok(Some((Some(scope).filter(|scope| !scope.is_empty()), probability)))
            };
            statement.query_map([], row)?.filter_map(Result::transpose).collect()
        })
    }
}
