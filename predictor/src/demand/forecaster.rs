//! One series at one step: what was measured, what was foretold of it, and the forecast.
//!
//! [`Forecaster::rehearse`] makes a forecast every few steps and keeps it until its outcome is known. From these the
//! [blend](super::blend) learns whom to believe and the [conformal shifts](super::conformal) how wide to be. They are always
//! forecasts of what had not been measured: a network's own training data would make it look better than it is.
//!
//! Memory: at most 72 KiB (two rings of 4536 steps at 5 bytes, 4 rehearsals of 12 steps, 25 of a day, the summary); 30 KiB where the
//! step is 5 minutes or more.

use std::collections::VecDeque;

use super::blend::Blend;
use super::conformal::{Conformal, Distant, FAR};
use super::experts::{NETWORK, Opinion, ask};
use super::features::Features;
use super::history::Series;
use super::summary::{EVERY, Summary, YOUNG};
use super::weights::Weights;
use super::{Basis, Context, EXPERTS, Forecast, MAX_STEPS, Metric, Quantiles};

/// Steps of a rehearsal.
pub(super) const REHEARSED: usize = 12;
/// Steps between rehearsals.
const APART: u64 = 3;
/// Rehearsals whose outcome is not known yet.
pub(super) const PENDING: usize = REHEARSED / APART as usize + 1;
/// Steps between rehearsals of a day's worth of steps, and how many of them wait for their outcome.
const FAR_APART: u64 = 12;
const DAY: usize = FAR[FAR.len() - 1];
pub(super) const FAR_PENDING: usize = DAY / FAR_APART as usize + 1;
/// Of the steps of a maximum this share has to have been measured.
const KNOWN: f32 = 0.9;
/// A forecast goes this many times beyond what was ever seen, and no further.
const BEYOND: f64 = 10.0;

/// What was said at one origin.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Rehearsal {
    /// Steps of the series when it was made.
    pub(super) count: u64,
    pub(super) scale: f32,
    pub(super) opinions: [Option<Opinion>; EXPERTS],
    /// After blend and shifts.
    pub(super) said: Opinion,
}

/// What was said at one origin of what is far.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FarRehearsal {
    pub(super) count: u64,
    pub(super) scale: f32,
    pub(super) said: Distant,
}

/// Forecasts one series; see the module's head.
#[derive(Clone, Debug)]
pub struct Forecaster {
    pub(super) metric: Metric,
    pub(super) series: Series,
    pub(super) blend: Blend,
    pub(super) conformal: Conformal,
    pub(super) pending: VecDeque<Rehearsal>,
    pub(super) far: VecDeque<FarRehearsal>,
    /// And how many steps the series had when it was made.
    summary: Option<(Summary, u64)>,
}

impl Forecaster {
    /// `step_s`: seconds between values, at least 1.
    #[must_use]
    pub fn new(metric: Metric, step_s: u32) -> Self {
        Self::of(metric, Series::new(step_s), Blend::default(), Conformal::default(), VecDeque::new(), VecDeque::new())
    }

    pub(super) fn of(
        metric: Metric,
        series: Series,
        blend: Blend,
        conformal: Conformal,
        pending: VecDeque<Rehearsal>,
        far: VecDeque<FarRehearsal>,
    ) -> Self {
        let mut forecaster = Self { metric, series, blend, conformal, pending, far, summary: None };
        forecaster.summarise();
        forecaster
    }

    #[must_use]
    pub fn metric(&self) -> Metric {
        self.metric
    }

    #[must_use]
    pub fn step_s(&self) -> u32 {
        self.series.step_s
    }

    /// Unix time of the last step; none before the first value.
    #[must_use]
    pub fn last_s(&self) -> Option<u64> {
        (self.series.count > 0).then_some(self.series.last_s)
    }

    /// The largest value ever seen.
    #[must_use]
    pub fn largest(&self) -> f64 {
        f64::from(self.series.largest)
    }

    /// Takes in a value measured at unix time `at_s`. It goes to the nearest step; steps that were left out are filled
    /// forward and are no outcome of any forecast. Returns false, and changes nothing, for what is older than the last
    /// step, negative, not a number, or beyond 1e30.
    pub fn observe(&mut self, at_s: u64, value: f64) -> bool {
        if self.series.push(at_s, value).is_none() {
            return false;
        }
        self.compare();
        let count = self.series.count;
        let old = self.summary.as_ref().map_or(u64::MAX, |(_, made)| count - (*made).min(count));
        let due = count / EVERY != (count - old.min(count)) / EVERY;
        if due || (count <= YOUNG && old > 0) {
            self.summarise();
        }
        true
    }

    /// Makes a forecast to learn from, if one is due: of twelve steps every third step, of 288 every twelfth. `model` is
    /// what [`Forecaster::forecast`] will be given; `context` covers as many steps. Returns whether it made one.
    pub fn rehearse(&mut self, context: &Context<'_>, model: Option<&Weights>) -> bool {
        let count = self.series.count;
        let due = |last: Option<u64>, apart: u64| count > 0 && last.is_none_or(|last| count >= last + apart);
        let near = due(self.pending.back().map(|last| last.count), APART) && self.pending.len() < PENDING;
        let far = due(self.far.back().map(|last| last.count), FAR_APART) && self.far.len() < FAR_PENDING;
        let Some((summary, _)) = self.summary.as_ref().filter(|_| near || far) else { return false };
        let scale = summary.scale;
        let made_far = far.then(|| {
            let said = self.say(&self.opinions(summary, DAY, context, model), DAY, scale);
            Distant { steps: FAR.map(|step| said.steps[step - 1]), peak: said.peak }
        });
        let made_near = near.then(|| {
            let opinions = self.opinions(summary, REHEARSED, context, model);
            let said = self.say(&opinions, REHEARSED, scale);
            Rehearsal { count, scale, opinions, said }
        });
        self.far.extend(made_far.map(|said| FarRehearsal { count, scale, said }));
        self.pending.extend(made_near);
        true
    }

    /// Forecasts the next `steps` (1 ..= [`MAX_STEPS`], others are brought there). Before the first value all is 0.
    #[must_use]
    pub fn forecast(&self, steps: usize, context: &Context<'_>, model: Option<&Weights>) -> Forecast {
        let steps = steps.clamp(1, MAX_STEPS);
        let step_s = self.series.step_s;
        let Some((summary, _)) = self.summary.as_ref().filter(|_| self.series.count > 0) else {
            let steps = vec![Quantiles::default(); steps];
            let (peak, basis) = (Quantiles::default(), Basis::default());
            return Forecast { origin_s: 0, step_s, steps, peak, capped: false, basis };
        };
        let opinions = self.opinions(summary, steps, context, model);
        let said = self.say(&opinions, steps, summary.scale);
        let scale = f64::from(summary.scale);
        let most = BEYOND * f64::from(self.series.largest);
        let mut capped = false;
        let mut value = |z: f32| {
            let value = f64::from(z).sinh() * scale;
            capped |= value > most;
            // not a number only if the arithmetic above is wrong: what was ever seen is the safe side
            if value.is_nan() { f64::from(self.series.largest) } else { value.clamp(0.0, most) }
        };
        let mut quantiles = |z: &[f32; 4]| {
            let mut values = z.map(&mut value);
            values.sort_unstable_by(f64::total_cmp);
            Quantiles(values)
        };
        let per_step: Vec<Quantiles> = said.steps.iter().map(&mut quantiles).collect();
        let peak = quantiles(&said.peak);
        let there = opinions.each_ref().map(Option::is_some);
        let basis = Basis {
            history: u32::try_from(self.series.count).unwrap_or(u32::MAX),
            rehearsed: self.blend.compared,
            shares: self.blend.weights(0, 1, there),
        };
        Forecast { origin_s: self.series.last_s, step_s, steps: per_step, peak, capped, basis }
    }

    /// Memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.series.memory_bytes()
            + PENDING * REHEARSED * (EXPERTS + 2) * size_of::<[f32; 4]>()
            + FAR_PENDING * size_of::<FarRehearsal>()
    }

    /// The series as it is kept.
    #[must_use]
    pub fn series(&self) -> &Series {
        &self.series
    }

    fn opinions(
        &self,
        summary: &Summary,
        steps: usize,
        context: &Context<'_>,
        model: Option<&Weights>,
    ) -> [Option<Opinion>; EXPERTS] {
        let view = self.series.view();
        let mut opinions = ask(&view, summary, context, steps);
        if let Some(model) = model {
            let ahead: Vec<usize> = (1..=steps).collect();
            let features = Features::of(&view, summary, self.metric, context, &ahead, &[steps]);
            let output = model.quantiles(&features);
            // beyond this, in either direction, is no demand: sinh(60) is 10²⁵ times the scale
            let bounded = |quantiles: [f32; 4]| quantiles.map(|z| z.clamp(-60.0, 60.0));
            if let Some(&peak) = output.peaks.first() {
                let steps = output.steps.into_iter().map(bounded).collect();
                opinions[NETWORK] = Some(Opinion { steps, peak: bounded(peak) });
            }
        }
        opinions
    }

    fn say(&self, opinions: &[Option<Opinion>; EXPERTS], steps: usize, scale: f32) -> Opinion {
        let mut said = self.blend.mix(opinions, steps);
        self.conformal.apply(&mut said, in_units(self.series.largest, scale));
        said
    }

    /// Learns from the rehearsals whose outcome is known, in order.
    fn compare(&mut self) {
        let count = self.series.count;
        // the last step may still change
        while let Some(first) = self.pending.front().filter(|first| count > first.count + REHEARSED as u64) {
            let fine = &self.series.fine;
            let since = usize::try_from(count - first.count).unwrap_or(usize::MAX);
            let from = fine.values.len().checked_sub(since);
            if let Some(from) = from.filter(|from| fine.measured[*from..*from + REHEARSED].iter().all(|known| *known)) {
                let values = &fine.values[from..from + REHEARSED];
                let truth: Vec<f32> = values.iter().map(|value| in_units(*value, first.scale)).collect();
                self.conformal.learn(&first.said, &truth);
                self.blend.learn(&first.opinions, &truth);
            }
            self.pending.pop_front();
        }
        while let Some(first) = self.far.front().filter(|first| count > first.count + DAY as u64) {
            let fine = &self.series.fine;
            let since = usize::try_from(count - first.count).unwrap_or(usize::MAX);
            if let Some(from) = fine.values.len().checked_sub(since) {
                let (values, measured) = (&fine.values[from..from + DAY], &fine.measured[from..from + DAY]);
                let truth = FAR.map(|step| measured[step - 1].then(|| in_units(values[step - 1], first.scale)));
                let known = measured.iter().filter(|known| **known).count() as f32 >= KNOWN * DAY as f32;
                let highest = values.iter().copied().fold(0.0, f32::max);
                self.conformal.learn_far(&first.said, truth, known.then(|| in_units(highest, first.scale)));
            }
            self.far.pop_front();
        }
    }

    fn summarise(&mut self) {
        if self.series.count > 0 {
            self.summary = Some((Summary::of(&self.series.view()), self.series.count));
        }
    }
}

/// asinh(value / scale), bounded so that no float overflows.
fn in_units(value: f32, scale: f32) -> f32 {
    (value / scale).min(1e20).asinh()
}
