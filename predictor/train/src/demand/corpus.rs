//! Series, the origins that may be trained on, and batches of them.
//!
//! An origin has at least [`HISTORY`] steps before it and a measured hour's worth of steps behind it: what is filled is no
//! target. Batches are drawn anew in every step, each series as often as it has origins.

use crate::Random;
use prestage_predictor::demand::features::Features;
use prestage_predictor::demand::{Context, Metric, Summary, View};

/// Steps ahead that every window trains.
pub const NEAR: usize = 12;
/// Further steps ahead, drawn at random up to a day's worth.
pub const FAR: usize = 4;
/// The furthest of them.
pub const FARTHEST: usize = 288;
/// Steps before the first origin.
pub const HISTORY: usize = 288;
/// Steps between summaries; the forecaster's are at most 12 old.
const SUMMARY_EVERY: usize = 36;
/// What is read before an origin.
const KEPT: usize = prestage_predictor::demand::FINE;

/// One series at a step of 300 s or more; nothing behind its end is ever looked at.
#[derive(Clone, Debug)]
pub struct DemandSeries {
    pub metric: Metric,
    pub step_s: u32,
    /// Unix time of the first value.
    pub start_s: u64,
    /// One a step, gaps filled forward.
    pub values: Vec<f32>,
    /// Which of them were measured; as long.
    pub measured: Vec<bool>,
    /// User activity and events, a value a step; empty or as long.
    pub activity: Vec<f32>,
    pub event: Vec<f32>,
}

impl DemandSeries {
    fn view(&self, origin: usize) -> View<'_> {
        let from = (origin + 1).saturating_sub(KEPT);
        View {
            step_s: self.step_s,
            last_s: self.start_s + origin as u64 * u64::from(self.step_s),
            fine: &self.values[from..=origin],
            measured: &self.measured[from..=origin],
            coarse: &[],
        }
    }

    fn origins(&self) -> Vec<u32> {
        let mut run = 0;
        let mut origins = Vec::new();
        // run: how many values from `at` on were measured
        for at in (0..self.values.len().min(self.measured.len())).rev() {
            run = if self.measured[at] { run + 1 } else { 0 };
            if run > NEAR && at >= HISTORY {
                origins.push(at as u32);
            }
        }
        origins.reverse();
        origins
    }
}

/// Series and the origins that may be trained on.
#[derive(Debug)]
pub struct DemandCorpus {
    series: Vec<DemandSeries>,
    origins: Vec<Vec<u32>>,
    /// Origins of the series before and with each.
    until: Vec<usize>,
    summaries: Vec<Vec<Option<Summary>>>,
}

/// Inputs and targets of one step, row by row.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub windows: usize,
    /// windows × [`RECENT`](prestage_predictor::demand::features::RECENT) × `CHANNELS`
    pub recent: Vec<f32>,
    /// windows × `FIXED`
    pub fixed: Vec<f32>,
    /// windows × ([`NEAR`] + [`FAR`]) × `STEP`
    pub steps: Vec<f32>,
    /// windows × 2 × `PEAK`: over [`NEAR`] steps, and over a number of steps drawn at random
    pub peaks: Vec<f32>,
    /// asinh of the last value, of the step's and of the maximum, in units of the scale.
    pub last: Vec<f32>,
    pub step_targets: Vec<f32>,
    pub peak_targets: Vec<f32>,
    /// 0 where a target was not measured.
    pub step_known: Vec<f32>,
    pub peak_known: Vec<f32>,
}

impl DemandCorpus {
    /// Series whose step is below 300 s, or whose parts differ in length, are left out.
    #[must_use]
    pub fn new(mut series: Vec<DemandSeries>) -> Self {
        series.retain(|series| {
            let count = series.values.len();
            let as_long = |covariate: &[f32]| covariate.is_empty() || covariate.len() == count;
            series.step_s >= 300
                && series.measured.len() == count
                && as_long(&series.activity)
                && as_long(&series.event)
                && series.values.iter().all(|value| (0.0..=1e30).contains(value))
        });
        let origins: Vec<Vec<u32>> = series.iter().map(DemandSeries::origins).collect();
        let until = origins
            .iter()
            .scan(0, |sum, origins| {
                *sum += origins.len();
                Some(*sum)
            })
            .collect();
        let summaries = series.iter().map(|series| vec![None; series.values.len() / SUMMARY_EVERY + 1]).collect();
        Self { series, origins, until, summaries }
    }

    /// Origins that may be trained on.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.until.last().copied().unwrap_or(0)
    }

    /// `count` windows, each of all origins as likely.
    pub(crate) fn draw(&mut self, count: usize, random: &mut Random, batch: &mut Batch) {
        *batch = Batch { windows: count, ..Batch::default() };
        let (mut features, all) = (Features::default(), self.windows());
        for _ in 0..count {
            let nth = random.below(all.max(1));
            let at = self.until.partition_point(|until| *until <= nth);
            let Some(origins) = self.origins.get(at) else { continue };
            let origin = origins[nth - (self.until[at] - origins.len())] as usize;
            // as likely between 1 and 2 times `from` as between 2 and 4 times
            let beyond = |random: &mut Random, from: usize| {
                let share = f64::from(random.symmetric().abs());
                (from as f64 * (FARTHEST as f64 / from as f64).powf(share)).ceil() as usize
            };
            let mut ahead: Vec<usize> = (1..=NEAR).collect();
            ahead.extend((0..FAR).map(|_| beyond(random, NEAR)));
            let over = [NEAR, beyond(random, 1)];
            self.window(at, origin, &ahead, &over, &mut features);
            self.push(at, origin, &ahead, &over, &features, batch);
        }
    }

    /// Features of one origin; the summary is of a multiple of [`SUMMARY_EVERY`] steps before it.
    fn window(&mut self, at: usize, origin: usize, ahead: &[usize], over: &[usize], features: &mut Features) {
        let series = &self.series[at];
        let slot = origin / SUMMARY_EVERY;
        let summary = self.summaries[at][slot].get_or_insert_with(|| Summary::of(&series.view(slot * SUMMARY_EVERY)));
        let covariate = |values: &'_ [f32]| values.get(origin..).map(<[f32]>::to_vec).unwrap_or_default();
        let (activity, event) = (covariate(&series.activity), covariate(&series.event));
        let context = Context { activity: &activity, event: &event, profile: None };
        features.fill(&series.view(origin), summary, series.metric, &context, ahead, over);
    }

    fn push(&self, at: usize, origin: usize, ahead: &[usize], over: &[usize], features: &Features, batch: &mut Batch) {
        let series = &self.series[at];
        let z = |value: f32| (value / features.scale).min(1e20).asinh();
        for &h in ahead {
            let known = series.measured.get(origin + h).copied().unwrap_or(false);
            batch.step_targets.push(if known { z(series.values[origin + h]) } else { 0.0 });
            batch.step_known.push(f32::from(u8::from(known)));
        }
        for &n in over {
            let known = series.measured.get(origin + n).is_some() // the end is within the series
                && series.measured[origin + 1..=origin + n].iter().filter(|known| **known).count() * 10 >= n * 9;
            let highest =
                if known { series.values[origin + 1..=origin + n].iter().copied().fold(0.0, f32::max) } else { 0.0 };
            batch.peak_targets.push(z(highest));
            batch.peak_known.push(f32::from(u8::from(known)));
        }
        batch.recent.extend(&features.recent);
        batch.fixed.extend(&features.fixed);
        batch.steps.extend(&features.steps);
        batch.peaks.extend(&features.peaks);
        batch.last.push(features.last);
    }
}
