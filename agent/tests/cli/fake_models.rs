//! Models of the daemon that answers with fixtures.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prestage_integration::api::models::*;
use prestage_integration::api::{ApiError, Bytes, ErrorCode, Reply};

use super::fake::{Fake, done};

/// An hour and a half ago and some seconds, so that no test is too slow to see it so.
fn then() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from((since - Duration::from_secs(90 * 60 + 5)).as_millis()).unwrap()
}

fn metrics() -> ModelMetrics {
    let lead = |lead, bits, baseline_bits| LeadMetrics { lead, bits, top1: 0.612, baseline_bits, baseline_top1: 0.588 };
    ModelMetrics { tokens: 250_000, leads: vec![lead(1, 2.31, 2.75), lead(4, 2.9, 3.125), lead(8, 3.2, 3.2)] }
}

fn model(id: i64, state: ModelState, scope: &str) -> Model {
    Model {
        id,
        kind: "lstm".into(),
        scope: scope.into(),
        state,
        seed: 42,
        changed_unix_ms: then(),
        tokens: 2_000_000,
        weights_bytes: 147_456,
        metrics: Some(metrics()),
        ..Model::default()
    }
}

fn shadow() -> Model {
    let contest = ContestStatus {
        champion: Some(3),
        accesses: 51_200,
        accesses_most: 1_000_000,
        saved_bits: 0.123,
        saved_least: 0.031,
        saved_most: 0.214,
        margin_bits: 0.05,
        confidence: 0.99,
    };
    Model {
        contest: Some(contest),
        parent: Some(3),
        ..model(4, ModelState::Shadow, "nbd:tcp:store.example.net:10809:golden-image-debian12")
    }
}

impl ModelControl for Fake {
    fn models(&self) -> Reply<'_, ModelList> {
        let training = Model {
            metrics: None,
            tokens: 0,
            trained_tokens: Some(512_000),
            ..model(5, ModelState::Training, "global")
        };
        let interrupted = Model { trained_tokens: None, id: 6, ..training.clone() };
        let reason =
            "saves no more than 0.012 bits an access with 99 % confidence, 0.05 are needed; undecided no longer";
        let rejected = Model { reason: reason.into(), ..model(2, ModelState::Rejected, "global") };
        let models = vec![rejected, model(3, ModelState::Champion, "global"), shadow(), training, interrupted];
        done(Ok(ModelList { models, waiting: vec!["file:/srv/a\u{1b}[31m.raw".into()] }))
    }
    fn model(&self, id: i64) -> Reply<'_, ModelDetail> {
        let change = |from, to, actor: &str, reason: &str| ModelChange {
            at_unix_ms: then(),
            from,
            to,
            actor: actor.into(),
            reason: reason.into(),
        };
        done(if id == 4 {
            let changes = vec![
                change(None, ModelState::Training, "operator", "asked for"),
                change(Some(ModelState::Training), ModelState::Shadow, "trainer", "training is done"),
            ];
            Ok(ModelDetail { model: shadow(), changes })
        } else {
            Err(ApiError::not_found(format!("there is no model {id}; `prestagectl model list` shows all")))
        })
    }
    fn model_train(&self, request: TrainRequest) -> Reply<'_, TrainStarted> {
        self.note(format!("train {request:?}"));
        done(match request.storage {
            None => {
                Ok(TrainStarted { scope: "global".into(), model: Some(7), resumed: request.resume, accesses: 900_000 })
            }
            Some(storage) => Err(ApiError::new(
                ErrorCode::NotPossible,
                format!("{storage}: not enough history: 42 accesses, at least 8192 are needed; let the guests run on"),
            )),
        })
    }
    fn model_evaluate(&self, _: i64) -> Reply<'_, ModelMetrics> {
        done(Ok(metrics()))
    }
    fn model_promote(&self, id: i64) -> Reply<'_, ChampionChanged> {
        done(Ok(ChampionChanged { scope: "global".into(), champion: Some(id), before: Some(3) }))
    }
    fn model_rollback(&self, request: RollbackRequest) -> Reply<'_, ChampionChanged> {
        self.note(format!("rollback {request:?}"));
        done(Ok(ChampionChanged { scope: "global".into(), champion: None, before: Some(3) }))
    }
    fn model_export(&self, id: i64) -> Reply<'_, Bytes> {
        done(match id {
            4 => Ok(Bytes::from_static(b"PSTGMODL\xff\x00 and so on")),
            _ => Err(ApiError::new(ErrorCode::NotPossible, format!("model {id} has no weights yet"))),
        })
    }
    fn model_import(&self, file: Bytes, scope: Option<String>) -> Reply<'_, ModelImported> {
        self.note(format!("import {} bytes for {scope:?}", file.len()));
        done(match file.starts_with(b"PSTGMODL") {
            true => Ok(ModelImported { scope: scope.unwrap_or("global".into()), model: 8, before: Some(4) }),
            false => Err(ApiError::invalid("this is no model")),
        })
    }
    fn thresholds(&self) -> Reply<'_, Thresholds> {
        let own =
            StorageThreshold { storage: "file:/srv/a".into(), disks: vec!["a".into(), "b".into()], probability: 0.9 };
        done(Ok(Thresholds { configured: 0.5, default: Some(0.6), storages: vec![own] }))
    }
    fn threshold_set(&self, request: ThresholdRequest) -> Reply<'_, Thresholds> {
        self.note(format!("threshold {:?} {:?}", request.storage, request.probability));
        done(Ok(Thresholds { configured: 0.5, default: request.probability, ..Thresholds::default() }))
    }
}
