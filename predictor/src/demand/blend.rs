//! Which expert to believe: weights for each quantile, from what each would have said (exponentially weighted average
//! forecaster, Cesa-Bianchi and Lugosi 2006, with losses that fade).

use super::experts::{LAST, NETWORK, Opinion};
use super::{EXPERTS, QUANTILES};

/// What one comparison moves the weights; losses are in shares of the blend's own.
const RATE: f32 = 0.1;
/// What of earlier comparisons counts beside the next.
const KEEP: f32 = 0.997;
/// Log-weights before the first comparison, with a network and without: it has been trained on many series.
const WITH_NETWORK: [f32; EXPERTS] = [0.0, -4.0, -5.0, -5.0, -5.0, -3.0];
const WITHOUT: [f32; EXPERTS] = [0.0, 0.0, -1.5, -2.0, -2.0, 0.0];
/// Steps and the maximum are weighed apart.
const KINDS: usize = 2;
/// No expert is further ahead of another than this.
const MOST: f32 = 30.0;

/// Sums of faded losses by kind, quantile and expert, in shares of the blend's loss, relative to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Blend {
    pub(super) excess: [[[f32; EXPERTS]; 4]; KINDS],
    /// The blend's own mean loss, to measure others in.
    pub(super) loss: [[f32; 4]; KINDS],
    pub(super) compared: u32,
}

impl Blend {
    /// Weights of the experts for one quantile; sum 1, 0 for those that say nothing.
    pub(super) fn weights(&self, kind: usize, q: usize, there: [bool; EXPERTS]) -> [f32; EXPERTS] {
        let prior = if there[NETWORK] { WITH_NETWORK } else { WITHOUT };
        let logs: [f32; EXPERTS] =
            std::array::from_fn(|k| if there[k] { prior[k] - RATE * self.excess[kind][q][k] } else { f32::MIN });
        let most = logs.iter().copied().fold(f32::MIN, f32::max);
        let mut weights = logs.map(|log| (log - most).max(-60.0).exp());
        for (weight, there) in weights.iter_mut().zip(there) {
            *weight = if there { *weight } else { 0.0 };
        }
        let sum: f32 = weights.iter().sum();
        if sum > 0.0 {
            weights.map(|weight| weight / sum)
        } else {
            std::array::from_fn(|k| f32::from(u8::from(k == LAST)))
        }
    }

    /// The weighted mean of the quantiles of each step and of the maximum.
    pub(super) fn mix(&self, opinions: &[Option<Opinion>; EXPERTS], steps: usize) -> Opinion {
        let there = opinions.each_ref().map(Option::is_some);
        let weights: [[[f32; EXPERTS]; 4]; KINDS] =
            std::array::from_fn(|kind| std::array::from_fn(|q| self.weights(kind, q, there)));
        let mut mixed = Opinion { steps: vec![[0.0; 4]; steps], peak: [0.0; 4] };
        for (k, opinion) in opinions.iter().enumerate() {
            let Some(opinion) = opinion else { continue };
            for q in 0..4 {
                for (out, said) in mixed.steps.iter_mut().zip(&opinion.steps) {
                    out[q] += weights[0][q][k] * said[q];
                }
                mixed.peak[q] += weights[1][q][k] * opinion.peak[q];
            }
        }
        mixed
    }

    /// Compares what each said with what came: `truth` of each step, and its maximum.
    pub(super) fn learn(&mut self, opinions: &[Option<Opinion>; EXPERTS], truth: &[f32]) {
        let highest = truth.iter().copied().fold(f32::MIN, f32::max);
        let mixed = self.mix(opinions, truth.len());
        self.compared = self.compared.saturating_add(1);
        let share = (1.0 / self.compared as f32).max(0.01);
        for (q, level) in QUANTILES.into_iter().enumerate() {
            let of = |opinion: &Opinion| {
                let steps: f32 =
                    opinion.steps.iter().zip(truth).map(|(said, came)| pinball(level, came - said[q])).sum();
                [steps / truth.len().max(1) as f32, pinball(level, highest - opinion.peak[q])]
            };
            let own = of(&mixed);
            let losses = opinions.each_ref().map(|opinion| opinion.as_ref().map(of));
            for kind in 0..KINDS {
                let mean = &mut self.loss[kind][q];
                *mean += share * (own[kind] - *mean);
                let unit = mean.max(1e-4);
                for (excess, loss) in self.excess[kind][q].iter_mut().zip(losses) {
                    *excess *= KEEP;
                    if let Some(loss) = loss {
                        *excess += ((loss[kind] - own[kind]) / unit).clamp(-4.0, 4.0);
                    }
                    *excess = excess.clamp(-MOST / RATE, MOST / RATE);
                }
            }
        }
    }
}

/// The loss that a quantile minimises.
pub(super) fn pinball(level: f32, missed: f32) -> f32 {
    (level * missed).max((level - 1.0) * missed)
}
