//! The demand network as a Burn module.
//!
//! As the other network here it is written for autodiff's costs: no gate is sliced out of a product, and the layers
//! behind the LSTM are one product for all steps of all windows.

use super::corpus::{Batch, FAR, NEAR};
use crate::Random;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData, activation};
use prestage_predictor::demand::QUANTILES;
use prestage_predictor::demand::features::{CHANNELS, RECENT};
use prestage_predictor::demand::weights::{CLAMP, GATES, HEADS, HIDDEN, NORMS, PARTS, WIDTH};

/// Weight of the far steps and of the maximum in the loss, beside 1 for the near steps.
const FAR_WEIGHT: f32 = 0.25;
const PEAK_WEIGHT: f32 = 0.5;
const FAR_PEAK_WEIGHT: f32 = 0.15;

/// Chance of an input to be left out in training.
const DROPPED: f32 = 0.1;

/// Parts that are trained.
pub const TRAINED: usize = PARTS.len() - NORMS;

/// The trained parts of `prestage_predictor::demand::weights::PARTS`, each a matrix, in their order; and the norms.
#[derive(Module, Debug)]
pub struct DemandNetwork {
    pub(crate) parts: [Param<Tensor<2>>; TRAINED],
    pub(crate) norms: [Param<Tensor<2>>; NORMS],
}

/// What the network says of a batch: `[windows × (NEAR + FAR), HEADS]` and `[windows × 2, HEADS]`, not put in order.
#[derive(Clone, Debug)]
pub struct Said {
    pub steps: Tensor<2>,
    pub peaks: Tensor<2>,
}

impl DemandNetwork {
    /// `flat` are a member's weights as [`Weights::members`](prestage_predictor::demand::Weights::members) gives them;
    /// its length is `prestage_predictor::demand::weights::COUNT`.
    #[must_use]
    pub fn new(flat: &[f32], device: &Device) -> Self {
        let mut rest = flat;
        let mut take = |index: usize, trained: bool| {
            let part = PARTS[index];
            let (values, behind) = rest.split_at(part.len().min(rest.len()));
            rest = behind;
            let tensor = Tensor::from_data(TensorData::new(values.to_vec(), [part.rows, part.columns]), device);
            Param::from_tensor(tensor).set_require_grad(trained)
        };
        let norms = std::array::from_fn(|index| take(index, false));
        let parts = std::array::from_fn(|index| take(NORMS + index, true));
        Self { parts, norms }
    }

    /// All weights of the member, as [`DemandNetwork::new`] takes them.
    #[must_use]
    pub fn flat(&self) -> Vec<f32> {
        let values = |part: &Param<Tensor<2>>| part.val().inner().into_data().iter::<f32>().collect::<Vec<f32>>();
        self.norms.iter().chain(&self.parts).flat_map(values).collect()
    }

    /// What it says of `windows` windows whose features stand in `batch`, with `per_window` steps and `horizons` maxima each.
    #[must_use]
    pub fn forward(&self, batch: &Batch, per_window: usize, horizons: usize) -> Said {
        self.pass(batch, per_window, horizons, &mut None)
    }

    /// The same; with a generator, each input of a layer is left out with the chance [`DROPPED`] (Srivastava et al. 2014).
    fn pass(&self, batch: &Batch, per_window: usize, horizons: usize, random: &mut Option<&mut Random>) -> Said {
        let [input, recurrent, bias, trunk, trunk_bias, step, middle, middle_bias, out, out_bias, step_skip, ..] =
            self.parts.each_ref().map(|part| part.val());
        let [.., peak_trunk, peak_trunk_bias, peak, peak_out, peak_out_bias, peak_skip] =
            self.parts.each_ref().map(|part| part.val());
        let device = input.device();
        let windows = batch.windows;
        let rows = |values: &[f32], columns: usize| {
            let count = values.len() / columns;
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), [count, columns]), &device)
        };
        let norm = |values: &[f32], index: usize| {
            let [shift, scale] = [0, 1].map(|part| self.norms[2 * index + part].val());
            ((rows(values, PARTS[2 * index].columns) - shift) * scale).clamp(-CLAMP, CLAMP)
        };

        let stacked = Tensor::cat(vec![input, recurrent], 0);
        let gates: [(Tensor<2>, Tensor<2>); GATES] = std::array::from_fn(|gate| {
            let columns = |tensor: &Tensor<2>| tensor.clone().narrow(1, gate * HIDDEN, HIDDEN);
            (columns(&stacked), columns(&bias))
        });
        let mut hidden = Tensor::<2>::zeros([windows, HIDDEN], &device);
        let mut cell = hidden.clone();
        for at in 0..RECENT {
            let row: Vec<f32> = batch
                .recent
                .chunks_exact(RECENT * CHANNELS)
                .flat_map(|window| &window[at * CHANNELS..(at + 1) * CHANNELS])
                .copied()
                .collect();
            let row = Tensor::cat(vec![rows(&row, CHANNELS), hidden], 1);
            let [input, forget, new, output] =
                gates.each_ref().map(|(weights, bias)| row.clone().matmul(weights.clone()) + bias.clone());
            cell = sigmoid(forget) * cell + sigmoid(input) * new.tanh();
            hidden = sigmoid(output) * cell.clone().tanh();
        }
        let origin = drop_some(Tensor::cat(vec![hidden, norm(&batch.fixed, 0)], 1), random);

        // what is of the origin is computed once a window and added to each of its rows
        let beside = |trunk: Tensor<2>, rows: Tensor<2>, each: usize| {
            let rows = rows.reshape([windows, each, WIDTH]) + trunk.reshape([windows, 1, WIDTH]);
            activation::relu(rows.reshape([windows * each, WIDTH]))
        };
        let values = drop_some(norm(&batch.steps, 1), random);
        let trunk = origin.clone().matmul(trunk) + trunk_bias;
        let layer = drop_some(beside(trunk, values.clone().matmul(step), per_window), random);
        let layer = activation::relu(layer.matmul(middle) + middle_bias);
        let last = rows(&batch.last, 1);
        let onto = |said: Tensor<2>, each: usize| {
            let sums = said.reshape([windows, each, HEADS]) + last.clone().reshape([windows, 1, 1]);
            sums.reshape([windows * each, HEADS])
        };
        let steps = onto(layer.matmul(out) + values.matmul(step_skip) + out_bias, per_window);

        let values = norm(&batch.peaks, 2);
        let trunk = origin.matmul(peak_trunk) + peak_trunk_bias;
        let layer = beside(trunk, values.clone().matmul(peak), horizons);
        let peaks = onto(layer.matmul(peak_out) + values.matmul(peak_skip) + peak_out_bias, horizons);
        Said { steps, peaks }
    }

    /// Pinball loss, summed over the quantiles: mean of the near steps, and weighted those of the others.
    pub(crate) fn loss(&self, batch: &Batch, random: &mut Random) -> Tensor<1> {
        let said = self.pass(batch, NEAR + FAR, 2, &mut Some(random));
        let device = said.steps.device();
        let near = 1.0 / (batch.windows * NEAR) as f32;
        let far = FAR_WEIGHT / (batch.windows * FAR) as f32;
        let peak = [PEAK_WEIGHT / batch.windows as f32, FAR_PEAK_WEIGHT / batch.windows as f32];
        let step_weights: Vec<f32> = (batch.step_known.chunks_exact(NEAR + FAR))
            .flat_map(|row| row.iter().enumerate().map(|(i, known)| known * if i < NEAR { near } else { far }))
            .collect();
        let peak_weights: Vec<f32> =
            batch.peak_known.iter().enumerate().map(|(i, known)| known * peak[i % peak.len()]).collect();
        let column =
            |values: &[f32]| Tensor::<2>::from_data(TensorData::new(values.to_vec(), [values.len(), 1]), &device);
        pinball(said.steps, column(&batch.step_targets), column(&step_weights))
            + pinball(said.peaks, column(&batch.peak_targets), column(&peak_weights))
    }
}

fn drop_some(values: Tensor<2>, random: &mut Option<&mut Random>) -> Tensor<2> {
    let Some(random) = random else { return values };
    let [rows, columns] = values.dims();
    let kept = 1.0 / (1.0 - DROPPED);
    let mask: Vec<f32> =
        (0..rows * columns).map(|_| if random.symmetric().abs() < DROPPED { 0.0 } else { kept }).collect();
    let mask = Tensor::from_data(TensorData::new(mask, [rows, columns]), &values.device());
    values * mask
}

/// By the tangent: Burn's own goes through a logarithm, and takes three times as long.
fn sigmoid(x: Tensor<2>) -> Tensor<2> {
    x.mul_scalar(0.5).tanh().mul_scalar(0.5).add_scalar(0.5)
}

/// Σ weight · max(q·e, (q − 1)·e) over rows and quantiles, e = target − said.
fn pinball(said: Tensor<2>, target: Tensor<2>, weights: Tensor<2>) -> Tensor<1> {
    let levels = Tensor::<2>::from_data(TensorData::new(QUANTILES.to_vec(), [1, HEADS]), &said.device());
    // max(q·e, (q − 1)·e) = q·e + max(−e, 0)
    let missed = target - said;
    ((missed.clone() * levels + activation::relu(missed.neg())) * weights).sum()
}
