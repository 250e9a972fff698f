//! What training needs and gives: the words between the database, the trainer and whoever turns accesses into tokens.

use prestage_integration::api::models::ModelMetrics;

use super::Token;
use super::scope::Scope;

/// Asks whether to stop; true from the moment on that the work is no longer wanted.
pub type ShouldStop<'a> = &'a (dyn Fn() -> bool + Sync);

/// Token sequences to learn from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tokens {
    /// One for each stream, each in time order.
    pub sequences: Vec<Vec<Token>>,
    /// Unix µs of what they come from, to ask for the same again.
    pub from_us: u64,
    pub to_us: u64,
}

impl Tokens {
    #[must_use]
    pub fn count(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.len() as u64).sum()
    }
}

/// Where tokens come from.
///
/// Called on threads of idle priority: hold no lock that others wait for, and read with a connection of your own.
pub trait TokenSource: Send + Sync {
    /// Accesses there are to learn from, without reading them.
    ///
    /// # Errors
    /// Why the history cannot be read.
    fn accesses(&self, scope: &Scope) -> Result<u64, String>;

    /// The latest tokens, at most `most` in all; with `range` those that came with it before, as long as
    /// the history has not changed. Stops early, with what it has, when `stop` says so.
    ///
    /// # Errors
    /// Why the history cannot be read.
    fn tokens(
        &self,
        scope: &Scope,
        range: Option<(u64, u64)>,
        most: u64,
        stop: ShouldStop<'_>,
    ) -> Result<Tokens, String>;
}

/// Why a model cannot be trained or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrainError {
    #[error("not enough history: {tokens} accesses, at least {needed} are needed; let the guests run on")]
    TooLittle { tokens: u64, needed: u64 },
    #[error("the history has changed since the training was interrupted")]
    OtherTokens,
    #[error("{0}")]
    Damaged(String),
    #[error("{0}")]
    Failed(String),
}

/// A kind of model that can be trained and used.
pub trait Trainer: Send + Sync {
    /// Short name, such as `lstm`.
    fn kind(&self) -> &'static str;
    /// Fewest tokens that are worth training on.
    fn least_tokens(&self) -> u64;
    /// Begins a training. The same tokens and seed give the same weights.
    ///
    /// # Errors
    /// `TooLittle`, `Failed`.
    fn begin(&self, tokens: Tokens, seed: u64) -> Result<Box<dyn Training>, TrainError>;
    /// Goes on from a checkpoint, with the tokens it was made on.
    ///
    /// # Errors
    /// `OtherTokens`, `Damaged`, `Failed`.
    fn resume(&self, tokens: Tokens, checkpoint: &[u8]) -> Result<Box<dyn Training>, TrainError>;
    /// Whether these are the weights of a model that can be used.
    ///
    /// # Errors
    /// `Damaged`, with what is wrong.
    fn check(&self, weights: &[u8]) -> Result<(), TrainError>;
    /// Measures a model on tokens, beside a baseline.
    ///
    /// # Errors
    /// `TooLittle`, `Damaged`.
    fn evaluate(&self, weights: &[u8], tokens: Tokens) -> Result<ModelMetrics, TrainError>;
}

/// A training under way.
pub trait Training {
    /// Trains on for some seconds, less when `stop` says so. Returns whether it is done.
    ///
    /// # Errors
    /// `Failed`.
    fn advance(&mut self, stop: ShouldStop<'_>) -> Result<bool, TrainError>;
    /// Tokens trained on so far, each as often as it was.
    fn trained(&self) -> u64;
    /// Everything needed to go on, except the tokens.
    ///
    /// # Errors
    /// `Failed`.
    fn checkpoint(&self) -> Result<Vec<u8>, TrainError>;
    /// Weights and how good they are on tokens held out.
    ///
    /// # Errors
    /// `Failed`.
    fn finish(self: Box<Self>) -> Result<(Vec<u8>, ModelMetrics), TrainError>;
}
