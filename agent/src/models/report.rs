//! Models as the API words them.

use prestage_integration::api::models::{
    ContestStatus, Model, ModelChange, ModelDetail, ModelList, ModelState as Worded,
};

use super::scope::Scope;
use super::watch::{Pair, Watch, contest_config};
use super::{ModelError, Shared};
use crate::store::Store;
use crate::store::models::{ModelRow, ModelState};

fn worded(state: ModelState) -> Worded {
    match state {
        ModelState::Training => Worded::Training,
        ModelState::Shadow => Worded::Shadow,
        ModelState::Champion => Worded::Champion,
        ModelState::Retired => Worded::Retired,
        ModelState::Rejected => Worded::Rejected,
    }
}

fn contest(watch: &Watch, row: &ModelRow) -> Option<ContestStatus> {
    let trial = watch.trial(&Scope::of(&row.scope)).filter(|trial| trial.pair.shadow == row.id)?;
    let Pair { champion, .. } = trial.pair;
    let [saved_least, saved_bits, saved_most] = trial.contest.saved_bits();
    let settings = watch.current();
    let config = contest_config(&settings);
    Some(ContestStatus {
        champion,
        accesses: trial.contest.accesses(),
        accesses_most: settings.trial_accesses,
        saved_bits,
        saved_least,
        saved_most,
        margin_bits: config.margin_bits,
        confidence: 1.0 - config.error,
    })
}

fn model(row: ModelRow, shared: &Shared) -> Model {
    let running = shared.status.lock().running.filter(|(id, _)| *id == row.id);
    let contest = contest(&shared.watch.lock(), &row);
    Model {
        state: worded(row.state),
        contest,
        trained_tokens: running.map(|(_, trained)| trained),
        metrics: row.metrics.as_deref().and_then(|json| serde_json::from_str(json).ok()),
        id: row.id,
        kind: row.kind,
        scope: row.scope,
        parent: row.parent,
        seed: row.seed,
        tokens: row.tokens,
        trained_from_unix_ms: row.from_us / 1000,
        trained_to_unix_ms: row.to_us / 1000,
        created_unix_ms: row.created_unix_ms,
        changed_unix_ms: row.changed_unix_ms,
        weights_bytes: row.weights_bytes,
        reason: row.reason,
    }
}

pub(super) fn list(store: &Store, shared: &Shared) -> Result<ModelList, ModelError> {
    let models = store.models()?.into_iter().map(|row| model(row, shared)).collect();
    Ok(ModelList { models, waiting: shared.status.lock().waiting.clone() })
}

pub(super) fn show(store: &Store, shared: &Shared, id: i64) -> Result<ModelDetail, ModelError> {
    let row = store.models()?.into_iter().find(|row| row.id == id).ok_or_else(|| ModelError::unknown(id))?;
    let changes = store.model_audit(Some(id))?.into_iter().map(|row| ModelChange {
        at_unix_ms: row.at_unix_ms,
        from: row.from.map(worded),
        to: worded(row.to),
        actor: row.actor,
        reason: row.reason,
    });
    let changes = changes.collect();
    Ok(ModelDetail { model: model(row, shared), changes })
}
