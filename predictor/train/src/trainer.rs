//! Truncated back-propagation through time (Williams and Peng 1990) with Adam (Kingma and Ba 2015).
//!
//! A step trains one window of every lane; the state is carried from window to window, the gradient is not. Gradients are
//! scaled so that their common norm is at most [`LARGEST_NORM`] (Pascanu et al. 2013). After each evaluation that is not
//! better than the best so far the learning rate is halved; after [`PATIENCE`] of them in a row training is over, and
//! the best model is the result.

use crate::corpus::{Corpus, LANES, Lanes, WINDOW};
use crate::evaluation::evaluate;
use crate::network::{Backend, Carry, Network};
use crate::{LeadScore, Random};
use burn::optim::{Adam, AdamConfig, AdamState, AdaptiveMomentumState, Optimizer};
use burn::tensor::{Device, Tensor, TensorData};
use prestage_predictor::lstm::weights::{COUNT, PARTS};
use prestage_predictor::lstm::{HIDDEN, Weights};
use thiserror::Error;

/// Common norm that all gradients of a step are scaled down to.
const LARGEST_NORM: f32 = 1.0;
/// Far below any gradient that still teaches something: Burn's default of 1e-5 is not.
const ADAM_EPSILON: f32 = 1e-8;
/// Evaluations in a row without an improvement that end the training.
const PATIENCE: u32 = 4;
/// An evaluation is an improvement if it saves this share of the bits.
const IMPROVEMENT: f64 = 0.001;
/// Steps between evaluations: an epoch, within these bounds.
const EVALUATE_EVERY: (u64, u64) = (16, 256);

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainConfig {
    /// Decides the initial weights and the order of training.
    pub seed: u64,
    /// Adam's step size at the start; default 0.008.
    pub learning_rate: f64,
    pub backend: Backend,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self { seed: 1, learning_rate: 0.008, backend: Backend::default() }
    }
}

/// Why [`Trainer::train`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// The budget of steps is used up.
    Budget,
    /// `should_stop` said so.
    Asked,
    /// The held-out tokens are predicted no better any more; there is nothing left to do.
    Converged,
}

/// The loss is not a number any more; the model that was best before can still be exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("training diverged at step {step}; train again with a lower learning rate")]
pub struct Diverged {
    pub step: u64,
}

/// Where the training stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    pub steps: u64,
    /// Tokens trained on, each counted as often as it was.
    pub tokens: u64,
    pub epoch: u64,
    /// Cross-entropy of the last step, in bits per token, all leads together.
    pub trained_bits: f64,
    /// The best on held-out tokens so far, in bits per token, all leads together; infinite before the first evaluation.
    pub held_out_bits: f64,
    /// Nothing left to do.
    pub converged: bool,
}

/// A training that can be paused, kept as bytes and taken up again.
pub struct Trainer {
    pub(crate) config: TrainConfig,
    pub(crate) corpus: Corpus,
    pub(crate) lanes: Lanes,
    pub(crate) standing: Standing,
    /// The best weights on the held-out tokens so far.
    pub(crate) best: Option<Weights>,
    network: Network,
    moments: Option<Moments>,
    device: Device,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer")
            .field("config", &self.config)
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

/// What of a training is plain values.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(crate) steps: u64,
    pub(crate) trained_bits: f64,
    pub(crate) best_bits: f64,
    /// Evaluations since the best, and in all, without improvement.
    pub(crate) failed: u32,
    pub(crate) halvings: u32,
    /// Of each lane, [`LANES`] × [`HIDDEN`].
    pub(crate) hidden: Vec<f32>,
    pub(crate) cell: Vec<f32>,
}

/// Adam's state of each part, on the device.
type Moments = [AdamState<2>; PARTS.len()];

/// The same on the host: steps, first and second moments of all weights.
#[derive(Clone, Debug)]
pub(crate) struct FlatMoments {
    pub(crate) first: Vec<f32>,
    pub(crate) second: Vec<f32>,
}

impl Trainer {
    /// Begins a training.
    #[must_use]
    pub fn new(config: TrainConfig, corpus: Corpus) -> Self {
        let lanes = Lanes::new(&corpus, config.seed);
        let standing = Standing {
            steps: 0,
            trained_bits: f64::INFINITY,
            best_bits: f64::INFINITY,
            failed: 0,
            halvings: 0,
            hidden: vec![0.0; LANES * HIDDEN],
            cell: vec![0.0; LANES * HIDDEN],
        };
        Self::assemble(config, corpus, lanes, standing, None, &initial(config.seed), None)
    }

    /// `weights` has the length of a model's.
    pub(crate) fn assemble(
        config: TrainConfig,
        corpus: Corpus,
        lanes: Lanes,
        standing: Standing,
        best: Option<Weights>,
        weights: &[f32],
        moments: Option<FlatMoments>,
    ) -> Self {
        let device = config.backend.device();
        let network = Network::new(weights, &device.clone().autodiff());
        let moments = moments.map(|moments| {
            let mut at = 0;
            PARTS.map(|part| {
                let range = at..at + part.len();
                at = range.end;
                let tensor = |flat: &[f32]| {
                    Tensor::from_data(TensorData::new(flat[range.clone()].to_vec(), [part.rows, part.columns]), &device)
                };
                let (first, second) = (tensor(&moments.first), tensor(&moments.second));
                AdamState::new(AdaptiveMomentumState::new(standing.steps as usize, first, second))
            })
        });
        Self { config, corpus, lanes, standing, best, network, moments, device }
    }

    /// Trains at most `budget` steps of [`LANES`] × [`WINDOW`] tokens; `should_stop` is asked before each.
    ///
    /// # Errors
    /// [`Diverged`]; the trainer is of no more use but for [`Trainer::export`].
    pub fn train(&mut self, budget: u64, should_stop: &dyn Fn() -> bool) -> Result<Pause, Diverged> {
        let adam = AdamConfig::new().with_epsilon(ADAM_EPSILON).build();
        let every = self.corpus.epoch_steps().clamp(EVALUATE_EVERY.0, EVALUATE_EVERY.1);
        for _ in 0..budget {
            if self.converged() {
                break;
            }
            if should_stop() {
                return Ok(Pause::Asked);
            }
            self.step(&adam)?;
            if self.standing.steps.is_multiple_of(every) {
                self.judge()?;
            }
        }
        Ok(if self.converged() { Pause::Converged } else { Pause::Budget })
    }

    /// The model that was best on the held-out tokens; none before the first evaluation.
    #[must_use]
    pub fn export(&self) -> Option<&Weights> {
        self.best.as_ref()
    }

    #[must_use]
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            steps: self.standing.steps,
            tokens: self.standing.steps * (LANES * WINDOW) as u64,
            epoch: self.lanes.epoch,
            trained_bits: self.standing.trained_bits,
            held_out_bits: self.standing.best_bits,
            converged: self.converged(),
        }
    }

    fn converged(&self) -> bool {
        self.standing.failed >= PATIENCE
    }

    fn step(&mut self, adam: &Adam) -> Result<(), Diverged> {
        let diverged = Diverged { step: self.standing.steps };
        let standing = &mut self.standing;
        let window = self.lanes.next(&self.corpus).ok_or(diverged)?;
        for (lane, begins) in window.begins.iter().enumerate() {
            if *begins {
                standing.hidden[lane * HIDDEN..(lane + 1) * HIDDEN].fill(0.0);
                standing.cell[lane * HIDDEN..(lane + 1) * HIDDEN].fill(0.0);
            }
        }
        let carried =
            |values: &[f32]| Tensor::from_data(TensorData::new(values.to_vec(), [LANES, HIDDEN]), &self.device);
        let carry = Carry { hidden: carried(&standing.hidden), cell: carried(&standing.cell) };
        let (loss, carry) = self.network.loss(&window, carry);
        let gradients = loss.backward();
        standing.trained_bits = f64::from(scalar(loss.inner())) * std::f64::consts::LOG2_E;
        standing.hidden = values(carry.hidden.inner());
        standing.cell = values(carry.cell.inner());

        let parts = self.network.parts.each_ref().map(|part| part.val());
        let gradients =
            parts.each_ref().map(|part| part.grad(&gradients).unwrap_or_else(|| part.clone().inner().zeros_like()));
        let squares = gradients.iter().map(|gradient| scalar(gradient.clone().square().sum())).sum::<f32>();
        if !(squares.is_finite() && standing.trained_bits.is_finite()) {
            return Err(diverged);
        }
        let scale = (LARGEST_NORM / squares.sqrt()).min(1.0);
        let rate = self.config.learning_rate * 0.5f64.powi(standing.halvings as i32);
        let mut states = self.moments.take().map(|moments| moments.map(Some)).unwrap_or_default().into_iter();
        let mut moments = Vec::with_capacity(PARTS.len());
        for ((part, value), gradient) in self.network.parts.iter_mut().zip(parts).zip(gradients) {
            let state = states.next().flatten();
            let (value, state) = adam.step(rate, value.inner(), gradient.mul_scalar(scale), state);
            *part = part.clone().map(|_| value.autodiff().require_grad());
            moments.extend(state);
        }
        self.moments = moments.try_into().ok();
        standing.steps += 1;
        Ok(())
    }

    /// Evaluates the weights as they are.
    fn judge(&mut self) -> Result<(), Diverged> {
        let weights = Weights::new(self.flat_weights()).map_err(|_| Diverged { step: self.standing.steps })?;
        let bits = evaluate(&weights, &self.corpus).iter().map(|score: &LeadScore| score.bits).sum::<f64>();
        if bits < self.standing.best_bits * (1.0 - IMPROVEMENT) {
            self.standing.best_bits = bits;
            self.standing.failed = 0;
            self.best = Some(weights);
        } else {
            self.standing.failed += 1;
            self.standing.halvings += 1;
        }
        Ok(())
    }

    pub(crate) fn flat_weights(&self) -> Vec<f32> {
        self.network.parts.iter().flat_map(|part| values(part.val().inner())).collect()
    }

    pub(crate) fn flat_moments(&self) -> Option<FlatMoments> {
        let moments = self.moments.as_ref()?;
        let flat =
            |of: fn(&AdamState<2>) -> &Tensor<2>| moments.iter().flat_map(|state| values(of(state).clone())).collect();
        Some(FlatMoments {
            first: flat(|state| &state.momentum.moment_1),
            second: flat(|state| &state.momentum.moment_2),
        })
    }
}

/// Embeddings uniform in ±1, so that tokens differ from the start; all else in ±1/√64, the forget gate's bias one higher
/// (Jozefowicz et al. 2015).
fn initial(seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let mut flat = Vec::with_capacity(COUNT);
    for part in PARTS {
        let embedding = matches!(part.name, "symbol" | "op" | "size" | "gap");
        let bound = if embedding { 1.0 } else { 1.0 / (HIDDEN as f32).sqrt() };
        flat.extend((0..part.len()).map(|at| {
            let forget = part.name == "bias" && at / HIDDEN == 1;
            bound * random.symmetric() + f32::from(u8::from(forget))
        }));
    }
    flat
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn scalar(tensor: Tensor<1>) -> f32 {
    tensor.into_data().iter::<f32>().next().unwrap_or(f32::NAN)
}
