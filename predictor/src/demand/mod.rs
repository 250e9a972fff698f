//! Demand forecasting: how much processor, memory, disk and network a machine, a program or an execution will want.
//!
//! One [`Forecaster`] serves one series at one step (1 s, 10 s, 5 min, roll-ups of 1 h). It is fed with
//! [`Forecaster::observe`] and answers with quantiles of every step ahead and of the *maximum* over all of them, which is
//! what an allocation has to cover: the largest of the steps' quantiles is exceeded far more often than one time in
//! twenty. Pure and deterministic: no I/O, no clock, no threads; scale-free, so that units are the caller's affair.
//!
//! | module | holds |
//! | --- | --- |
//! | `history` | what was measured, in bounded memory; gaps are filled forward and known as such |
//! | `summary` | scale, changes seen over each distance, period: computed anew every hour's worth of steps |
//! | [`features`] | what the network reads, at one origin |
//! | [`weights`] | the network's parts and their shapes, as bytes and as the kernel wants them |
//! | `kernel` | the network: an LSTM over the last steps, then a quantile head for each step and one for the maximum |
//! | `experts` | simple forecasters: last value and the changes seen, same time of earlier days and weeks, decayed histogram |
//! | `blend` | weights of network and experts, learned from what they would have said |
//! | `conformal` | shifts that keep the quantiles' promises as the series changes |
//! | [`forecaster`] | all of it together, and its state as bytes |
//! | [`profile`] | what a program used at each hour of the day: an expert for series that are young |
//! | [`anomaly`] | unusual use, with evidence; never acts |

pub mod anomaly;
mod blend;
mod conformal;
mod experts;
pub mod features;
pub mod forecaster;
mod history;
mod kernel;
pub mod profile;
pub mod state;
mod summary;
pub mod weights;

#[cfg(test)]
mod tests;

pub use forecaster::Forecaster;
pub use history::{FINE, Series, View};
pub use profile::Profile;
pub use state::StateError;
pub use summary::Summary;
pub use weights::{Weights, WeightsError};

/// What is measured. The code treats all alike; the network is told which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Metric {
    /// Cores.
    Cpu,
    /// Bytes.
    Memory,
    /// Bytes a second, read and written.
    Disk,
    /// Bytes a second, received and sent.
    Network,
}

impl Metric {
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Disk, Self::Network];
}

/// Probabilities of the quantiles that are forecast.
pub const QUANTILES: [f32; 4] = [0.05, 0.5, 0.9, 0.95];

/// Steps ahead that one forecast has at most; longer horizons are forecast from roll-ups.
pub const MAX_STEPS: usize = 1440;

/// Values of [`QUANTILES`]: ascending, finite, not negative.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quantiles(pub [f64; 4]);

impl Quantiles {
    /// Linear between the quantiles, constant outside; `probability` in 0 ..= 1.
    #[must_use]
    pub fn at(&self, probability: f64) -> f64 {
        let levels = QUANTILES.map(f64::from);
        if probability <= levels[0] {
            return self.0[0];
        }
        for i in 1..levels.len() {
            if probability <= levels[i] {
                let share = (probability - levels[i - 1]) / (levels[i] - levels[i - 1]);
                return self.0[i - 1] + share * (self.0[i] - self.0[i - 1]);
            }
        }
        self.0[3]
    }
}

/// What a forecast rests on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Basis {
    /// Steps of history, measured or filled.
    pub history: u32,
    /// Forecasts whose outcome has been compared.
    pub rehearsed: u32,
    /// Share of network, last value, day, week, histogram and profile in the median of the first step; sum 1.
    pub shares: [f32; EXPERTS],
}

/// Network, last value, day, week, histogram, profile.
pub const EXPERTS: usize = 6;

/// What will be used: `steps[h]` at `origin_s + (h + 1) · step_s`.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Unix time of the last observation, rounded to the step.
    pub origin_s: u64,
    pub step_s: u32,
    pub steps: Vec<Quantiles>,
    /// Of the maximum over all steps.
    pub peak: Quantiles,
    /// Some value would have been beyond ten times what was ever seen, and was cut there.
    pub capped: bool,
    pub basis: Basis,
}

/// What is known of the future besides the series: user activity and events, a value a step. Time of day and week are
/// derived from the unix time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context<'a> {
    /// At the origin and then at each step ahead, 0 … 1; a missing value is 0.
    pub activity: &'a [f32],
    /// Share of the step in which a scheduled or external event is expected, likewise.
    pub event: &'a [f32],
    /// What the program that runs here used elsewhere.
    pub profile: Option<&'a Profile>,
}

impl Context<'_> {
    fn activity(&self, at: usize) -> f32 {
        bounded(self.activity, at)
    }

    fn event(&self, at: usize) -> f32 {
        bounded(self.event, at)
    }
}

fn bounded(values: &[f32], at: usize) -> f32 {
    values.get(at).filter(|value| value.is_finite()).map_or(0.0, |value| value.clamp(0.0, 1.0))
}
