//! Shifts that keep the promise of a quantile while the series changes: adaptive conformal inference (Gibbs and Candès
//! 2021) on the quantile itself, in units of the forecast's own width, for steps near and far and for the maximum apart.

use super::QUANTILES;
use super::experts::Opinion;

/// What one comparison moves a shift by, in half widths.
const RATE: f32 = 0.02;
/// Shifts stay within this many half widths.
const MOST: f32 = 1.5;
/// Values that are no further apart than this, in units of asinh(value / scale), are the same: nothing is to be learned.
const SAME: f32 = 1e-5;
/// Where the groups of steps end; the last group goes on.
const GROUPS: [usize; 3] = [2, 6, usize::MAX];

/// Shifts by group of steps and, last, of the maximum.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Conformal {
    pub(super) shifts: [[f32; 4]; GROUPS.len() + 1],
}

impl Conformal {
    /// Moves the quantiles of every step and of the maximum, and puts them in order.
    pub(super) fn apply(&self, opinion: &mut Opinion) {
        for (i, step) in opinion.steps.iter_mut().enumerate() {
            shift(step, &self.shifts[group(i)]);
        }
        shift(&mut opinion.peak, &self.shifts[GROUPS.len()]);
    }

    /// `said`: what [`Conformal::apply`] made of a forecast; `truth`: what came.
    pub(super) fn learn(&mut self, said: &Opinion, truth: &[f32]) {
        let mut counts = [0.0_f32; GROUPS.len()];
        let mut sums = [[0.0_f32; 4]; GROUPS.len()];
        for (i, (said, came)) in said.steps.iter().zip(truth).enumerate() {
            counts[group(i)] += 1.0;
            for q in 0..4 {
                sums[group(i)][q] += pull(QUANTILES[q], said[q], *came);
            }
        }
        for ((shifts, sums), count) in self.shifts.iter_mut().zip(&sums).zip(counts) {
            for (shift, sum) in shifts.iter_mut().zip(sums) {
                *shift = (*shift + RATE * sum / count.max(1.0)).clamp(-MOST, MOST);
            }
        }
        let highest = truth.iter().copied().fold(f32::MIN, f32::max);
        for (q, shift) in self.shifts[GROUPS.len()].iter_mut().enumerate() {
            *shift = (*shift + RATE * pull(QUANTILES[q], said.peak[q], highest)).clamp(-MOST, MOST);
        }
    }
}

fn group(step: usize) -> usize {
    GROUPS.iter().position(|end| step < *end).unwrap_or(GROUPS.len() - 1)
}

/// Up by the level where the value was above, down by the rest where it was below.
fn pull(level: f32, said: f32, came: f32) -> f32 {
    if (came - said).abs() <= SAME {
        0.0
    } else if came > said {
        level
    } else {
        level - 1.0
    }
}

fn shift(quantiles: &mut [f32; 4], shifts: &[f32; 4]) {
    let half = 0.5 * (quantiles[3] - quantiles[0]).max(0.0);
    for (quantile, shift) in quantiles.iter_mut().zip(shifts) {
        *quantile += shift * half;
    }
    quantiles.sort_unstable_by(f32::total_cmp);
}
