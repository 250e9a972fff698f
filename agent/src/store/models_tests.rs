//! The registry against a naive one, over random commands and restarts.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::models::{AuditRow, Change, ImportedModel, KEPT, ModelRow, ModelState, NewModel};
use super::{Store, StoreError};

const LONG: Duration = Duration::from_secs(60);
const SCOPES: [&str; 2] = ["global", "file:/a"];

fn change(actor: &'static str, at_unix_ms: u64) -> Change {
    Change { actor, reason: format!("step {at_unix_ms}"), at_unix_ms }
}

fn start(store: &Store, scope: &str, at: u64) -> i64 {
    let new = NewModel { kind: "lstm".to_owned(), scope: scope.to_owned(), parent: None, seed: at };
    store.start_model(new, change("trainer", at)).wait().unwrap();
    store.models().unwrap().last().unwrap().id
}

fn train(store: &Store, scope: &str, at: u64) -> i64 {
    let id = start(store, scope, at);
    store.finish_model(id, vec![id as u8; 100], "{}".to_owned(), change("trainer", at)).wait().unwrap();
    id
}

fn state(store: &Store, id: i64) -> Option<ModelState> {
    store.models().unwrap().into_iter().find(|row| row.id == id).map(|row| row.state)
}

#[derive(Debug, Clone)]
enum Step {
    Start(usize),
    Import(usize),
    Checkpoint(i64),
    Finish(i64),
    Promote(i64),
    Reject(i64),
    Rollback(usize),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let id = 1..24_i64;
    prop_oneof![
        4 => (0..2_usize).prop_map(Step::Start),
        1 => (0..2_usize).prop_map(Step::Import),
        1 => id.clone().prop_map(Step::Checkpoint),
        4 => id.clone().prop_map(Step::Finish),
        5 => id.clone().prop_map(Step::Promote),
        1 => id.prop_map(Step::Reject),
        4 => (0..2_usize).prop_map(Step::Rollback),
        1 => Just(Step::Restart),
    ]
}

/// A model as the naive registry has it.
#[derive(Debug, Clone, PartialEq)]
struct Naive {
    scope: usize,
    state: ModelState,
    weights: bool,
    changed: u64,
}

#[derive(Debug, Default)]
struct Registry {
    models: BTreeMap<i64, Naive>,
    /// Champions of each scope, the present one last.
    reigns: [Vec<i64>; 2],
    next: i64,
    /// Changes of state: model, from, to.
    audit: Vec<(i64, Option<ModelState>, ModelState)>,
}

impl Registry {
    fn holder(&self, scope: usize, state: ModelState) -> Option<i64> {
        self.models.iter().find(|(_, model)| model.scope == scope && model.state == state).map(|(id, _)| *id)
    }

    fn set(&mut self, id: i64, to: ModelState, at: u64) {
        let model = self.models.get_mut(&id).unwrap();
        self.audit.push((id, Some(model.state), to));
        (model.state, model.changed) = (to, at);
    }

    fn prune(&mut self, scope: usize) {
        let mut idle: Vec<(u64, i64)> = self
            .models
            .iter()
            .filter(|(_, model)| model.scope == scope)
            .filter(|(_, model)| matches!(model.state, ModelState::Retired | ModelState::Rejected))
            .map(|(id, model)| (model.changed, *id))
            .collect();
        idle.sort_unstable();
        for (_, id) in idle.iter().rev().skip(KEPT as usize) {
            self.models.remove(id);
            self.reigns[scope].retain(|reign| reign != id);
        }
    }

    /// Whether the step is allowed; carried out if so.
    fn apply(&mut self, step: &Step, at: u64) -> bool {
        use ModelState::{Champion, Rejected, Retired, Shadow, Training};
        match *step {
            Step::Start(scope) => {
                if let Some(unfinished) = self.holder(scope, Training) {
                    self.set(unfinished, Rejected, at);
                }
                self.next += 1;
                self.models.insert(self.next, Naive { scope, state: Training, weights: false, changed: at });
                self.audit.push((self.next, None, Training));
                self.prune(scope);
            }
            Step::Import(scope) => {
                if let Some(before) = self.holder(scope, Shadow) {
                    self.set(before, Rejected, at);
                }
                self.next += 1;
                self.models.insert(self.next, Naive { scope, state: Shadow, weights: true, changed: at });
                self.audit.push((self.next, None, Shadow));
                self.prune(scope);
            }
            Step::Checkpoint(_) | Step::Restart => {}
            Step::Finish(id) => {
                let Some(model) = self.models.get(&id).filter(|model| model.state == Training) else { return false };
                let scope = model.scope;
                if let Some(before) = self.holder(scope, Shadow) {
                    self.set(before, Rejected, at);
                }
                self.models.get_mut(&id).unwrap().weights = true;
                self.set(id, Shadow, at);
                self.prune(scope);
            }
            Step::Promote(id) => {
                let Some(model) = self.models.get(&id) else { return false };
                let scope = model.scope;
                if !model.weights || model.state == Champion {
                    return false;
                }
                if let Some(before) = self.holder(scope, Champion) {
                    self.set(before, Retired, at);
                }
                self.set(id, Champion, at);
                self.reigns[scope].push(id);
                self.prune(scope);
            }
            Step::Reject(id) => {
                let Some(model) = self.models.get(&id) else { return false };
                let scope = model.scope;
                if !matches!(model.state, Training | Shadow) {
                    return false;
                }
                self.set(id, Rejected, at);
                self.prune(scope);
            }
            Step::Rollback(scope) => {
                let Some(champion) = self.holder(scope, Champion) else { return false };
                self.set(champion, Retired, at);
                while self.reigns[scope].last() == Some(&champion) {
                    self.reigns[scope].pop();
                }
                if let Some(before) = self.reigns[scope].last().copied() {
                    self.set(before, Champion, at);
                }
                self.prune(scope);
            }
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_order_of_commands_is_as_a_naive_registry_would_have_it(steps in prop::collection::vec(step(), 1..70)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let mut store = Store::open(&path).unwrap();
        let mut naive = Registry::default();
        for (at, step) in (1..).zip(&steps) {
            let outcome = match *step {
                Step::Start(scope) => { start(&store, SCOPES[scope], at); Ok(()) }
                Step::Import(scope) => {
                    let (kind, scope, weights) = ("lstm".to_owned(), SCOPES[scope].to_owned(), vec![9; 100]);
                    let model = ImportedModel { kind, scope, seed: 1, tokens: 2, from_us: 3, to_us: 4, metrics: None, weights };
                    store.import_model(model, change("operator", at)).wait()
                }
                Step::Checkpoint(id) => store.save_checkpoint(id, vec![7; 9]).wait(),
                Step::Finish(id) => store.finish_model(id, vec![id as u8; 100], "{}".to_owned(), change("trainer", at)).wait(),
                Step::Promote(id) => store.promote_model(id, change("operator", at)).wait(),
                Step::Reject(id) => store.reject_model(id, change("contest", at)).wait(),
                Step::Rollback(scope) => store.rollback_model(SCOPES[scope], change("operator", at)).wait(),
                Step::Restart => {
                    prop_assert!(store.close(LONG));
                    store = Store::open(&path).unwrap();
                    Ok(())
                }
            };
            let allowed = naive.apply(step, at);
            prop_assert_eq!(outcome.is_ok(), allowed, "{:?}: {:?}", step, outcome);
            if let Err(error) = outcome {
                prop_assert!(matches!(error, StoreError::WrongState(_) | StoreError::NotFound { .. }), "{:?}", error);
            }
            let rows = store.models().unwrap();
            let held: BTreeMap<i64, Naive> = rows.iter().map(|row: &ModelRow| {
                let scope = SCOPES.iter().position(|scope| *scope == row.scope).unwrap();
                (row.id, Naive { scope, state: row.state, weights: row.weights_bytes > 0, changed: row.changed_unix_ms })
            }).collect();
            prop_assert_eq!(&held, &naive.models);
            for (scope, reigns) in naive.reigns.iter().enumerate() {
                let champions: Vec<i64> = rows.iter()
                    .filter(|row| row.scope == SCOPES[scope] && row.state == ModelState::Champion).map(|row| row.id).collect();
                // Exactly one once there was a promotion that stands, and it is the last.
                prop_assert_eq!(champions, reigns.last().copied().into_iter().collect::<Vec<_>>());
            }
            for row in &rows {
                prop_assert!(row.checkpoint_bytes == 0 || row.state == ModelState::Training);
            }
        }
        let audit: Vec<_> = store.model_audit(None).unwrap().into_iter().map(|row: AuditRow| (row.model, row.from, row.to)).collect();
        prop_assert_eq!(audit, naive.audit);
    }
}

#[test]
fn rollback_undoes_promotions_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("db")).unwrap();
    let ids = [1, 2, 3].map(|at| {
        let id = train(&store, "global", at);
        store.promote_model(id, change("operator", at)).wait().unwrap();
        id
    });
    let other = train(&store, "file:/a", 4);
    store.promote_model(other, change("contest", 4)).wait().unwrap();
    for (back, expected) in [(5, Some(ids[1])), (6, Some(ids[0])), (7, None)] {
        store.rollback_model("global", change("operator", back)).wait().unwrap();
        let champion =
            store.models().unwrap().into_iter().find(|row| row.scope == "global" && row.state == ModelState::Champion);
        assert_eq!(champion.map(|row| row.id), expected);
        assert_eq!(state(&store, other), Some(ModelState::Champion), "another scope is not concerned");
    }
    let error = store.rollback_model("global", change("operator", 8)).wait().unwrap_err();
    assert!(error.to_string().contains("no champion of global"), "{error}");
    assert_eq!(store.condition().degraded, None, "a refusal is no fault of the database");
}

#[test]
fn the_database_itself_refuses_a_second_champion() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    let first = train(&store, "global", 1);
    store.promote_model(first, change("operator", 1)).wait().unwrap();
    let second = train(&store, "global", 2);
    let raw = rusqlite::Connection::open(&path).unwrap();
    let error = raw.execute("UPDATE models SET state = 'champion' WHERE id = ?", [second]).unwrap_err();
    assert!(error.to_string().contains("UNIQUE"), "{error}");
}

#[test]
fn blobs_and_thresholds_survive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    let done = train(&store, "global", 1);
    let training = start(&store, "global", 2);
    store.describe_model(training, 5000, 10, 20).wait().unwrap();
    store.save_checkpoint(training, vec![1; 4000]).wait().unwrap();
    store.save_checkpoint(training, vec![2; 4000]).wait().unwrap();
    store.save_contest(done, vec![3; 32]).wait().unwrap();
    store.set_threshold(None, Some(0.6)).wait().unwrap();
    store.set_threshold(Some("file:/a"), Some(0.9)).wait().unwrap();
    store.set_threshold(Some("file:/b"), Some(0.9)).wait().unwrap();
    store.set_threshold(Some("file:/b"), None).wait().unwrap();
    assert!(store.close(LONG));
    let store = Store::open(&path).unwrap();
    assert_eq!(store.model_checkpoint(training).unwrap(), Some(vec![2; 4000]));
    assert_eq!(store.model_weights(done).unwrap(), Some(vec![done as u8; 100]));
    assert_eq!(store.model_weights(training).unwrap(), None);
    assert_eq!(store.model_weights(99).unwrap(), None);
    let rows = store.models().unwrap();
    assert_eq!((rows[1].tokens, rows[1].from_us, rows[1].to_us), (5000, 10, 20));
    assert_eq!(rows[0].contest, Some(vec![3; 32]));
    assert_eq!(store.thresholds().unwrap(), [(None, 0.6), (Some("file:/a".to_owned()), 0.9)]);
}

#[test]
fn what_is_no_probability_is_not_obeyed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    for storage in ["below", "beyond", "endless", "text"] {
        store.set_threshold(Some(storage), Some(0.5)).wait().unwrap();
    }
    store.set_threshold(Some("none"), Some(0.0)).wait().unwrap();
    store.set_threshold(Some("sure"), Some(1.0)).wait().unwrap();
    let raw = rusqlite::Connection::open(&path).unwrap();
    for (storage, value) in [("below", "-0.1"), ("beyond", "1.1"), ("endless", "9e999"), ("text", "'x'")] {
        raw.execute(&format!("UPDATE thresholds SET probability = {value} WHERE scope = ?"), [storage]).unwrap();
    }
    assert_eq!(store.thresholds().unwrap(), [(Some("none".to_owned()), 0.0), (Some("sure".to_owned()), 1.0)]);
}
