//! Models and thresholds: the API's questions and orders, and how they are started.

use super::control::{Handle, blocking, store_error};
use super::run::RunError;
use super::{Daemon, Shared};
use crate::config::Config;
use crate::models::file::{Header, decode};
use crate::models::lstm::LstmTrainer;
use crate::models::tokens::{HistoryTokens, Tokeniser};
use crate::models::{ModelError, ModelSettings, ModelsHandle, Scope};
use crate::store::Store;
use prestage_integration::api::models::{
    ChampionChanged, ModelControl, ModelDetail, ModelImported, ModelList, ModelMetrics, RollbackRequest,
    StorageThreshold, ThresholdRequest, Thresholds, TrainRequest, TrainStarted,
};
use prestage_integration::api::{ApiError, Bytes, ErrorCode, Reply};
use prestage_predictor::ordinals::Tokeniser as Ordinals;
use std::sync::Arc;
use std::thread::JoinHandle;

pub(super) fn settings(config: &Config) -> ModelSettings {
    ModelSettings {
        training: config.model.training,
        interval: config.model.interval,
        max_tokens: config.model.max_accesses.into(),
        margin_bits: config.model.margin_bits,
        trial_accesses: config.model.trial_accesses.into(),
        ..ModelSettings::default()
    }
}

/// What turns accesses into what a model reads.
fn tokeniser() -> Box<dyn Tokeniser> {
    Box::new(Ordinals::new())
}

/// # Errors
/// The database cannot be opened once more, or a thread not be started.
pub(super) fn start(store: &Store, config: &Config) -> Result<(ModelsHandle, JoinHandle<()>), RunError> {
    let source = HistoryTokens::new(store, tokeniser)?;
    Ok(ModelsHandle::start(store.clone(), Arc::new(LstmTrainer), Arc::new(source), settings(config))?)
}

fn api_error(error: ModelError) -> ApiError {
    let code = match &error {
        ModelError::NotFound(_) => ErrorCode::NotFound,
        ModelError::NotPossible(_) => ErrorCode::NotPossible,
        ModelError::Busy => ErrorCode::InUse,
        ModelError::Store(error) => return store_error(error),
        ModelError::Stopped => ErrorCode::Unavailable,
    };
    ApiError::new(code, error.to_string())
}

/// Identity of a storage, named by a disk on it or by itself.
async fn identity(daemon: &Shared, name: &str) -> Result<String, ApiError> {
    if let Ok(entry) = daemon.disks.get(name) {
        return match entry.state {
            Ok(served) => Ok(served.storage.identity().to_owned()),
            Err(reason) => Err(ApiError::new(ErrorCode::StoreFailed, format!("disk `{name}` is not served: {reason}"))),
        };
    }
    let (shared, storage) = (daemon.clone(), name.to_owned());
    match blocking(move || shared.store.storage_id(&storage)).await? {
        Ok(Some(_)) => Ok(name.to_owned()),
        Ok(None) => Err(ApiError::not_found(format!(
            "there is no disk or storage `{name}`; `prestagectl disk list` and `prestagectl profile list` show them"
        ))),
        Err(error) => Err(store_error(&error)),
    }
}

async fn scope(daemon: &Shared, name: Option<&str>) -> Result<Scope, ApiError> {
    match name {
        None | Some("global") => Ok(Scope::Global),
        Some(name) => identity(daemon, name).await.map(Scope::Storage),
    }
}

/// What an imported model is for, by its own account.
async fn own_scope(daemon: &Shared, header: &Header) -> Result<Scope, ApiError> {
    let Header { scope, host, .. } = header;
    let (shared, storage) = (daemon.clone(), scope.clone());
    let known = scope == Scope::Global.key()
        || blocking(move || shared.store.storage_id(&storage)).await?.map_err(|error| store_error(&error))?.is_some();
    known.then(|| Scope::of(scope)).ok_or_else(|| {
        ApiError::not_found(format!(
            "the model is of storage {scope} on host {host}, which is not known here; name one with --storage, or --all"
        ))
    })
}

fn thresholds(daemon: &Daemon) -> Result<Thresholds, ApiError> {
    let rows = daemon.store.thresholds().map_err(|error| store_error(&error))?;
    let mut reply = Thresholds { configured: daemon.config.lock().prefetch.threshold, ..Thresholds::default() };
    for (storage, probability) in rows {
        match storage {
            None => reply.default = Some(probability),
            Some(storage) => {
                let disks = daemon.disks.on_storage(&storage);
                reply.storages.push(StorageThreshold { storage, disks, probability });
            }
        }
    }
    Ok(reply)
}

impl ModelControl for Handle {
    fn models(&self) -> Reply<'_, ModelList> {
        Box::pin(async {
            let models = self.0.models.clone();
            blocking(move || models.list()).await?.map_err(api_error)
        })
    }

    fn model(&self, id: i64) -> Reply<'_, ModelDetail> {
        Box::pin(async move {
            let models = self.0.models.clone();
            blocking(move || models.show(id)).await?.map_err(api_error)
        })
    }

    fn model_train(&self, request: TrainRequest) -> Reply<'_, TrainStarted> {
        Box::pin(async move {
            let scope = scope(&self.0, request.storage.as_deref()).await?;
            self.0.models.train(scope, request.resume).await.map_err(api_error)
        })
    }

    fn model_evaluate(&self, id: i64) -> Reply<'_, ModelMetrics> {
        Box::pin(async move { self.0.models.evaluate(id).await.map_err(api_error) })
    }

    fn model_promote(&self, id: i64) -> Reply<'_, ChampionChanged> {
        Box::pin(async move { self.0.models.promote(id).await.map_err(api_error) })
    }

    fn model_rollback(&self, request: RollbackRequest) -> Reply<'_, ChampionChanged> {
        Box::pin(async move {
            let scope = scope(&self.0, request.scope.as_deref()).await?;
            self.0.models.rollback(scope).await.map_err(api_error)
        })
    }

    fn model_export(&self, id: i64) -> Reply<'_, Bytes> {
        Box::pin(async move {
            let models = self.0.models.clone();
            let exported = blocking(move || models.export(id, &super::report::host_name())).await?;
            exported.map(Bytes::from).map_err(api_error)
        })
    }

    fn model_import(&self, file: Bytes, scope: Option<String>) -> Reply<'_, ModelImported> {
        Box::pin(async move {
            let (header, weights) = decode(&file).map_err(|error| ApiError::invalid(error.to_string()))?;
            let scope = match scope {
                Some(name) => self::scope(&self.0, Some(&name)).await?,
                None => own_scope(&self.0, &header).await?,
            };
            self.0.models.import(header, weights.to_vec(), scope).await.map_err(api_error)
        })
    }

    fn thresholds(&self) -> Reply<'_, Thresholds> {
        Box::pin(async {
            let shared = self.0.clone();
            blocking(move || thresholds(&shared)).await?
        })
    }

    fn threshold_set(&self, request: ThresholdRequest) -> Reply<'_, Thresholds> {
        Box::pin(async move {
            let storage = match &request.storage {
                None => None,
                Some(name) => Some(identity(&self.0, name).await?),
            };
            let set = self.0.store.set_threshold(storage.as_deref(), request.probability).await;
            set.map_err(|error| store_error(&error))?;
            let shared = self.0.clone();
            blocking(move || {
                let rows = shared.store.thresholds().map_err(|error| store_error(&error))?;
                shared.learner.thresholds(rows.into_iter().collect());
                thresholds(&shared)
            })
            .await?
        })
    }
}
