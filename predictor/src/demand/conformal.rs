//! Shifts that keep the promise of a quantile while the series changes: adaptive conformal inference (Gibbs and Candès
//! 2021) on the quantile itself, in units of the forecast's own width, for steps near and far and for the maximum apart.
//!
//! The median is left alone: nothing is allocated by it, and a shift that lags behind costs it more than it gives. What is
//! above everything ever seen is the experts' to say, not a shift's: where a series bursts the width is that of the burst,
//! and in units of asinh a few widths are a thousandfold.

use super::QUANTILES;
use super::experts::Opinion;

/// What one comparison moves a shift of a step by, in half widths; and one of the maximum, of which there is one for
/// twelve steps.
const RATE: f32 = 0.01;
const PEAK_RATE: f32 = 0.03;
/// Shifts stay within this many half widths.
const MOST: f32 = 1.5;
/// Values that are no further apart than this, in units of asinh(value / scale), are the same: nothing is to be learned.
const SAME: f32 = 1e-5;
/// Where the groups of near steps end.
const GROUPS: [usize; 3] = [2, 6, NEAR];
/// Steps that are compared one by one; from there to [`FAR`] shifts go from those of the last group to those of the day.
const NEAR: usize = 12;
/// Steps ahead that stand for all that is far.
pub(super) const FAR: [usize; 2] = [144, 288];
/// Places of the shifts behind the groups': of far steps, of the maximum of [`NEAR`] steps, and of a far one.
const DAY: usize = GROUPS.len();
const PEAK: usize = DAY + 1;
const DAY_PEAK: usize = DAY + 2;
/// The median's place.
const MEDIAN: usize = 1;

/// What was said of far steps and of the maximum up to the last of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Distant {
    pub(super) steps: [[f32; 4]; FAR.len()],
    pub(super) peak: [f32; 4],
}

/// Shifts by group of steps and of the maximum, near and far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Conformal {
    pub(super) shifts: [[f32; 4]; DAY_PEAK + 1],
}

impl Conformal {
    /// Moves the quantiles of every step and of the maximum, and puts them in order. `top`: the largest value ever seen.
    pub(super) fn apply(&self, opinion: &mut Opinion, top: f32) {
        let steps = opinion.steps.len();
        for (i, step) in opinion.steps.iter_mut().enumerate() {
            shift(step, &self.between(group(i), DAY, i + 1), top);
        }
        shift(&mut opinion.peak, &self.between(PEAK, DAY_PEAK, steps), top);
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
            turn(shifts, RATE, sums.map(|sum| sum / count.max(1.0)));
        }
        let highest = truth.iter().copied().fold(f32::MIN, f32::max);
        turn(&mut self.shifts[PEAK], PEAK_RATE, pulls(&said.peak, highest));
    }

    /// The same for far steps: `truth` of those that were measured, and the maximum if it is known.
    pub(super) fn learn_far(&mut self, said: &Distant, truth: [Option<f32>; FAR.len()], highest: Option<f32>) {
        for (said, came) in said.steps.iter().zip(truth) {
            if let Some(came) = came {
                turn(&mut self.shifts[DAY], RATE, pulls(said, came));
            }
        }
        if let Some(highest) = highest {
            turn(&mut self.shifts[DAY_PEAK], PEAK_RATE, pulls(&said.peak, highest));
        }
    }

    /// Shifts at `steps` ahead, in the logarithm of the distance between those of the near and of the far.
    fn between(&self, near: usize, far: usize, steps: usize) -> [f32; 4] {
        let reach = (FAR[FAR.len() - 1] as f32 / NEAR as f32).ln();
        let share = ((steps as f32 / NEAR as f32).ln() / reach).clamp(0.0, 1.0);
        std::array::from_fn(|q| self.shifts[near][q] + share * (self.shifts[far][q] - self.shifts[near][q]))
    }
}

fn group(step: usize) -> usize {
    GROUPS.iter().position(|end| step < *end).unwrap_or(GROUPS.len() - 1)
}

fn turn(shifts: &mut [f32; 4], rate: f32, pulls: [f32; 4]) {
    for (shift, pull) in shifts.iter_mut().zip(pulls) {
        *shift = (*shift + rate * pull).clamp(-MOST, MOST);
    }
}

fn pulls(said: &[f32; 4], came: f32) -> [f32; 4] {
    std::array::from_fn(|q| pull(QUANTILES[q], said[q], came))
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

fn shift(quantiles: &mut [f32; 4], shifts: &[f32; 4], top: f32) {
    let half = 0.5 * (quantiles[3] - quantiles[0]).max(0.0);
    for (q, (quantile, shift)) in quantiles.iter_mut().zip(shifts).enumerate() {
        if q != MEDIAN {
            *quantile = (*quantile + shift * half).min(quantile.max(top));
        }
    }
    quantiles.sort_unstable_by(f32::total_cmp);
}
