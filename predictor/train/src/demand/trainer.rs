//! AdamW (Loshchilov and Hutter 2019) on the pinball loss of all quantiles of all steps and of the maximum.
//!
//! The learning rate rises over the first tenth of the steps and falls along a cosine to zero (Smith and Topin 2018), so that
//! the last weights are the result and nothing has to be held out to stop early. Members differ in their seed.

use super::corpus::{Batch, DemandCorpus};
use super::network::{DemandNetwork, TRAINED};
use crate::{Backend, Random};
use burn::optim::{AdamW, AdamWConfig, AdamWState, Optimizer};
use burn::tensor::{Device, Tensor};
use prestage_predictor::demand::weights::{COUNT, HIDDEN, NORMS, OFFSETS, PARTS, Weights, WeightsError};
use thiserror::Error;

/// Common norm that all gradients of a step are scaled down to.
const LARGEST_NORM: f32 = 1.0;
const ADAM_EPSILON: f32 = 1e-8;
const WARM_UP: f64 = 0.1;
/// Windows whose features' mean and deviation stand for all.
const NORM_WINDOWS: usize = 4096;
/// Added to the deviation of a feature: one that hardly varies is not blown up.
const NORM_FLOOR: f32 = 0.05;

/// How to train.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DemandConfig {
    /// Decides the initial weights and the order of training.
    pub seed: u64,
    /// Steps of each member; default 6000.
    pub steps: u64,
    /// Windows of a step; default 256.
    pub windows: usize,
    /// Largest learning rate; default 0.002.
    pub learning_rate: f64,
    /// Default 0.01.
    pub weight_decay: f32,
    /// Networks whose quantiles are averaged; default 2.
    pub members: usize,
    pub backend: Backend,
}

impl Default for DemandConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            steps: 6000,
            windows: 256,
            learning_rate: 0.002,
            weight_decay: 0.01,
            members: 2,
            backend: Backend::default(),
        }
    }
}

/// Why there is no model.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum DemandError {
    #[error(
        "too little to train on: {found} origins with a day before them and an hour behind, {needed} are needed; let the machines run longer"
    )]
    TooLittle { found: usize, needed: usize },
    #[error("training of the demand model diverged at step {step}; train again with a lower learning rate")]
    Diverged { step: u64 },
    #[error("the trained weights are of no use")]
    Weights(#[from] WeightsError),
}

/// Origins that are needed to train.
const MINIMUM_WINDOWS: usize = 2000;

/// A training, member by member.
pub struct DemandTrainer {
    config: DemandConfig,
    corpus: DemandCorpus,
    random: Random,
    norms: Vec<f32>,
    finished: Vec<f32>,
    member: Option<Member>,
}

struct Member {
    network: DemandNetwork,
    moments: Vec<AdamWState<2>>,
    steps: u64,
}

impl std::fmt::Debug for DemandTrainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DemandTrainer").field("config", &self.config).finish_non_exhaustive()
    }
}

impl DemandTrainer {
    /// Begins a training.
    ///
    /// # Errors
    /// [`DemandError::TooLittle`].
    pub fn new(config: DemandConfig, mut corpus: DemandCorpus) -> Result<Self, DemandError> {
        let found = corpus.windows();
        if found < MINIMUM_WINDOWS {
            return Err(DemandError::TooLittle { found, needed: MINIMUM_WINDOWS });
        }
        let mut random = Random(config.seed);
        let mut batch = Batch::default();
        corpus.draw(NORM_WINDOWS, &mut random, &mut batch);
        let norms = norms(&batch);
        Ok(Self { config, corpus, random, norms, finished: Vec::new(), member: None })
    }

    /// Steps of all members together.
    #[must_use]
    pub fn total_steps(&self) -> u64 {
        self.config.steps * self.config.members as u64
    }

    /// Trains at most `budget` steps. Returns the mean loss over them, `None` when all is done.
    ///
    /// # Errors
    /// [`DemandError::Diverged`].
    pub fn train(&mut self, budget: u64) -> Result<Option<f64>, DemandError> {
        let device = self.config.backend.device();
        let adam = AdamWConfig::new().with_epsilon(ADAM_EPSILON).with_weight_decay(self.config.weight_decay).build();
        let (mut sum, mut count) = (0.0, 0);
        let mut batch = Batch::default();
        while count < budget && self.finished.len() < COUNT * self.config.members {
            let mut member = match self.member.take() {
                Some(member) => member,
                None => {
                    let flat = initial(&self.norms, &mut self.random);
                    Member {
                        network: DemandNetwork::new(&flat, &device.clone().autodiff()),
                        moments: Vec::new(),
                        steps: 0,
                    }
                }
            };
            self.corpus.draw(self.config.windows, &mut self.random, &mut batch);
            sum += member.step(&self.config, &adam, &batch, &mut self.random)?;
            count += 1;
            if member.steps < self.config.steps {
                self.member = Some(member);
            } else {
                self.finished.extend(member.network.flat());
            }
        }
        Ok((count > 0).then(|| sum / count as f64))
    }

    /// The members that are finished.
    ///
    /// # Errors
    /// [`DemandError::Weights`] if there is none yet.
    pub fn export(&self) -> Result<Weights, DemandError> {
        Ok(Weights::new(self.finished.clone())?)
    }
}

impl Member {
    fn step(
        &mut self,
        config: &DemandConfig,
        adam: &AdamW,
        batch: &Batch,
        random: &mut Random,
    ) -> Result<f64, DemandError> {
        let diverged = DemandError::Diverged { step: self.steps };
        let loss = self.network.loss(batch, random);
        let gradients = loss.backward();
        let loss = f64::from(scalar(loss.inner()));
        let parts = self.network.parts.each_ref().map(|part| part.val());
        let gradients =
            parts.each_ref().map(|part| part.grad(&gradients).unwrap_or_else(|| part.clone().inner().zeros_like()));
        let squares = gradients.iter().map(|gradient| scalar(gradient.clone().square().sum())).sum::<f32>();
        if !(squares.is_finite() && loss.is_finite()) {
            return Err(diverged);
        }
        let scale = (LARGEST_NORM / squares.sqrt()).min(1.0);
        let rate = rate(config, self.steps);
        let mut states = std::mem::take(&mut self.moments).into_iter();
        for ((part, value), gradient) in self.network.parts.iter_mut().zip(parts).zip(gradients) {
            let (value, state) = adam.step(rate, value.inner(), gradient.mul_scalar(scale), states.next());
            *part = part.clone().map(|_| value.autodiff().require_grad());
            self.moments.extend(state);
        }
        debug_assert_eq!(self.moments.len(), TRAINED);
        self.steps += 1;
        Ok(loss)
    }
}

/// One cycle: linear up, a cosine down.
fn rate(config: &DemandConfig, step: u64) -> f64 {
    let at = (step as f64 + 0.5) / config.steps.max(1) as f64;
    let share = if at < WARM_UP {
        0.04 + 0.96 * at / WARM_UP
    } else {
        0.5 + 0.5 * (std::f64::consts::PI * (at - WARM_UP) / (1.0 - WARM_UP)).cos()
    };
    config.learning_rate * share
}

/// Shift and scale of each kind of features, in the order of the parts.
fn norms(batch: &Batch) -> Vec<f32> {
    let mut flat = Vec::with_capacity(OFFSETS[NORMS]);
    for (index, values) in [&batch.fixed, &batch.steps, &batch.peaks].into_iter().enumerate() {
        let columns = PARTS[2 * index].columns;
        let rows = (values.len() / columns).max(1) as f64;
        let (mut sums, mut squares) = (vec![0.0_f64; columns], vec![0.0_f64; columns]);
        for row in values.chunks_exact(columns) {
            for ((value, sum), square) in row.iter().zip(&mut sums).zip(&mut squares) {
                *sum += f64::from(*value);
                *square += f64::from(*value) * f64::from(*value);
            }
        }
        flat.extend(sums.iter().map(|sum| (sum / rows) as f32));
        flat.extend(sums.iter().zip(&squares).map(|(sum, square)| {
            let deviation = (square / rows - (sum / rows).powi(2)).max(0.0).sqrt() as f32;
            // of what never varied nothing was learned: it stays unheard, whatever comes later
            if deviation > 0.0 { 1.0 / (deviation + NORM_FLOOR) } else { 0.0 }
        }));
    }
    flat
}

/// Uniform in ±1/√inputs; what goes past the layers starts at zero.
fn initial(norms: &[f32], random: &mut Random) -> Vec<f32> {
    let mut flat = norms.to_vec();
    for part in &PARTS[NORMS..] {
        let inputs = match part.name {
            "input" | "recurrent" | "bias" => HIDDEN,
            "step" | "peak" => part.rows + PARTS[NORMS + 3].rows,
            "step_skip" | "peak_skip" => 0,
            name if name.ends_with("bias") => 64,
            _ => part.rows,
        };
        let bound = if inputs == 0 { 0.0 } else { 1.0 / (inputs as f32).sqrt() };
        flat.extend((0..part.len()).map(|_| bound * random.symmetric()));
    }
    flat
}

fn scalar(tensor: Tensor<1>) -> f32 {
    tensor.into_data().iter::<f32>().next().unwrap_or(f32::NAN)
}

/// The device that a network is tested on.
#[must_use]
pub fn device(backend: Backend) -> Device {
    backend.device()
}
