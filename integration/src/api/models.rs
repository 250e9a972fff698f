//! Models: what goes over the wire, and what the daemon does about them.
//!
//! Units as in [`types`](super::types); costs are bits an access.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Bytes, Reply};

/// Where a model stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    #[default]
    Training,
    /// Predicts beside the champion without effect, to be compared with it.
    Shadow,
    /// In use.
    Champion,
    /// Was champion.
    Retired,
    /// Not better than the champion, or not trained to its end.
    Rejected,
}

/// How well a model predicts on accesses held out from training, by how far ahead.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelMetrics {
    /// Accesses measured on.
    pub tokens: u64,
    pub leads: Vec<LeadMetrics>,
}

/// One lead: 1 is the next access.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct LeadMetrics {
    pub lead: u32,
    /// Mean cost in bits.
    pub bits: f64,
    /// Share of accesses, 0 to 1, that the likeliest symbol was right for.
    pub top1: f64,
    /// The same of an order-2 Markov model of the symbols.
    pub baseline_bits: f64,
    pub baseline_top1: f64,
}

/// A shadow beside what it is to replace, on the guests' accesses since it was trained.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ContestStatus {
    /// Champion it is compared with; absent: prediction without a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub champion: Option<i64>,
    pub accesses: u64,
    /// Undecided after so many, it is rejected.
    pub accesses_most: u64,
    /// Bits an access that it saves; with the confidence below, at least `saved_least` and at most `saved_most`.
    pub saved_bits: f64,
    pub saved_least: f64,
    pub saved_most: f64,
    /// It is promoted when `saved_least` exceeds this.
    pub margin_bits: f64,
    /// Confidence of both bounds over all looks, 0 to 1.
    pub confidence: f64,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Model {
    pub id: i64,
    /// `lstm`.
    pub kind: String,
    /// `global`, or the identity of a storage.
    pub scope: String,
    pub state: ModelState,
    /// Champion of its scope when it was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<i64>,
    pub seed: u64,
    /// Accesses it was trained on, and when they were; 0 while unknown.
    pub tokens: u64,
    pub trained_from_unix_ms: u64,
    pub trained_to_unix_ms: u64,
    pub created_unix_ms: u64,
    /// Since when it is in its state.
    pub changed_unix_ms: u64,
    pub weights_bytes: u64,
    /// Of a training that runs now: accesses trained on so far, each as often as it was. It ends when that helps no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trained_tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<ModelMetrics>,
    /// Of a shadow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contest: Option<ContestStatus>,
    /// Why it came to its state.
    pub reason: String,
}

/// All models.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    pub models: Vec<Model>,
    /// Scopes that wait for their training.
    pub waiting: Vec<String>,
}

/// A model changed its state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelChange {
    pub at_unix_ms: u64,
    /// Absent: it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ModelState>,
    pub to: ModelState,
    /// `operator`, `trainer`, `contest` or `daemon`.
    pub actor: String,
    pub reason: String,
}

/// One model and what became of it, oldest first.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelDetail {
    #[serde(flatten)]
    pub model: Model,
    pub changes: Vec<ModelChange>,
}

/// What to train.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainRequest {
    /// Disk or identity of a storage: a model for it alone. Default: one for all storages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// Go on with the scope's interrupted training instead of beginning a new one.
    #[serde(default)]
    pub resume: bool,
}

/// A training was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct TrainStarted {
    pub scope: String,
    /// Absent while it waits for another training to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<i64>,
    pub resumed: bool,
    /// Accesses there are to learn from.
    pub accesses: u64,
}

/// Whose promotion to take back.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// `global`, a disk, or the identity of a storage. Default: `global`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
}

/// Which model is in use now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ChampionChanged {
    pub scope: String,
    /// Absent: no model of this scope is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub champion: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
}

/// A model from another host was taken up.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelImported {
    pub scope: String,
    /// Its number here.
    pub model: i64,
    /// Shadow whose place it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<i64>,
}

/// Lowest probabilities at which predicted blocks are read ahead.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Thresholds {
    /// Of the configuration (`prefetch.threshold`).
    pub configured: f64,
    /// Set at run time in its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<f64>,
    /// Storages with one of their own.
    pub storages: Vec<StorageThreshold>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct StorageThreshold {
    /// Identity of the storage.
    pub storage: String,
    /// Disks on it now.
    #[serde(default)]
    pub disks: Vec<String>,
    pub probability: f64,
}

/// Sets a threshold; it is kept over restarts.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ThresholdRequest {
    /// Disk or identity of a storage. Default: all storages without one of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// 0 to 1; absent: back to the default, or to the configuration's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probability: Option<f64>,
}

impl ThresholdRequest {
    /// Checks what can be checked without the daemon.
    ///
    /// # Errors
    /// What is wrong with the probability.
    pub fn validate(&self) -> Result<(), String> {
        match self.probability {
            Some(probability) if !(0.0..=1.0).contains(&probability) => {
                Err(format!("{probability} is not a probability; it is 0 to 1"))
            }
            _ => Ok(()),
        }
    }
}

/// The daemon's models, as the API sees them.
pub trait ModelControl {
    fn models(&self) -> Reply<'_, ModelList>;
    /// Errors: `NotFound`.
    fn model(&self, id: i64) -> Reply<'_, ModelDetail>;
    /// Begins a training in the background. Errors: `NotPossible` (not enough history, nothing to resume), `NotFound` (storage).
    fn model_train(&self, request: TrainRequest) -> Reply<'_, TrainStarted>;
    /// Measures a model on the latest history. Errors: `NotFound`, `NotPossible`, `InUse` (another one is being measured).
    fn model_evaluate(&self, id: i64) -> Reply<'_, ModelMetrics>;
    /// Puts a model to use. Errors: `NotFound`, `NotPossible` (in training, champion already, damaged).
    fn model_promote(&self, id: i64) -> Reply<'_, ChampionChanged>;
    /// Takes the last promotion back. Errors: `NotPossible` (there is none), `NotFound` (storage).
    fn model_rollback(&self, request: RollbackRequest) -> Reply<'_, ChampionChanged>;
    /// A model as a file, to be imported elsewhere. Errors: `NotFound`, `NotPossible` (no weights yet, damaged).
    fn model_export(&self, id: i64) -> Reply<'_, Bytes>;
    /// Takes up such a file as the shadow of `scope` (`global`, a disk, or the identity of a storage; `None`: as the file
    /// says). Errors: `InvalidRequest` (no model, damaged, another version), `NotPossible` (does not fit, in use already),
    /// `NotFound` (storage).
    fn model_import(&self, file: Bytes, scope: Option<String>) -> Reply<'_, ModelImported>;
    fn thresholds(&self) -> Reply<'_, Thresholds>;
    /// Errors: `NotFound` (storage).
    fn threshold_set(&self, request: ThresholdRequest) -> Reply<'_, Thresholds>;
}
