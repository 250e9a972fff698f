//! What the network reads of one series at one origin.
//!
//! All values are asinh(value / scale), the scale being the series' own .99 quantile: it tames series that are silent for days
//! and then burst to a thousand times that, and leaves nothing of the unit.

use super::history::View;
use super::summary::{Summary, moments, quantile};
use super::{Context, Metric};

/// Steps that the LSTM reads.
pub const RECENT: usize = 24;
/// Of each: the value, the same time the day and the week before, whether it was measured.
pub const CHANNELS: usize = 4;
/// Features of the origin.
pub const FIXED: usize = 72;
/// Features of each step ahead.
pub const STEP: usize = 40;
/// Features of the maximum.
pub const PEAK: usize = 16;
/// Days that are compared.
const DAYS: usize = 7;
/// Steps before and after the same time of another day that count as near.
const NEAR: usize = 3;

/// Inputs of the network for one forecast.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Features {
    /// [`RECENT`] × [`CHANNELS`], oldest first.
    pub recent: Vec<f32>,
    /// [`FIXED`] values.
    pub fixed: Vec<f32>,
    /// [`STEP`] values for each step asked for.
    pub steps: Vec<f32>,
    /// [`PEAK`] values for each horizon asked for.
    pub peaks: Vec<f32>,
    /// asinh(last value / scale): what the network's changes are added to.
    pub last: f32,
    pub scale: f32,
}

impl Features {
    /// Features at `view`'s last value for the steps `ahead` (1: the next) and for the maxima over the horizons `over`.
    #[must_use]
    pub fn of(
        view: &View<'_>,
        summary: &Summary,
        metric: Metric,
        context: &Context<'_>,
        ahead: &[usize],
        over: &[usize],
    ) -> Self {
        let mut features = Self::default();
        features.fill(view, summary, metric, context, ahead, over);
        features
    }

    /// The same in place, without allocations once the vectors are large enough.
    pub fn fill(
        &mut self,
        view: &View<'_>,
        summary: &Summary,
        metric: Metric,
        context: &Context<'_>,
        ahead: &[usize],
        over: &[usize],
    ) {
        let look = Look { view, summary, day: view.day() };
        self.scale = summary.scale;
        self.last = look.z(view.last());
        self.recent.clear();
        for back in (0..RECENT).rev() {
            self.recent.extend([look.ago(back), look.ago(back + look.day), look.ago(back + 7 * look.day)]);
            let known = view.measured.len() > back && view.measured[view.measured.len() - 1 - back];
            self.recent.push(f32::from(u8::from(known)));
        }
        self.fixed.clear();
        look.fixed(&mut self.fixed, metric, context);
        self.steps.clear();
        for &h in ahead {
            look.step(&mut self.steps, h, context);
        }
        self.peaks.clear();
        for &n in over {
            look.peak(&mut self.peaks, n, context);
        }
    }
}

struct Look<'a> {
    view: &'a View<'a>,
    summary: &'a Summary,
    /// Steps of a day.
    day: usize,
}

impl Look<'_> {
    fn z(&self, value: f32) -> f32 {
        // what is beyond came after the summary was made, and is cut before a float overflows
        (value / self.summary.scale).min(1e20).asinh()
    }

    fn ago(&self, back: usize) -> f32 {
        self.z(self.view.ago(back))
    }

    /// Steps from the origin back to the same time as `h` ahead, `days` whole days before the first that is not ahead.
    fn same_time(&self, h: usize, days: usize) -> usize {
        (h.div_ceil(self.day) + days) * self.day - h
    }

    fn fixed(&self, out: &mut Vec<f32>, metric: Metric, context: &Context<'_>) {
        let (view, summary) = (self.view, self.summary);
        out.push(self.z(view.last()));
        let mut day = view.since(86_400).to_vec();
        let ([mean, largest, deviation], median) = (moments(&day), quantile(&mut day, 0.5));
        let high = quantile(&mut day, 0.95);
        out.extend([median, high, mean, largest, deviation].map(|value| self.z(value)));
        out.extend(summary.week);
        for window in [12, 72] {
            out.extend(moments(view.recent(window)).map(|value| self.z(value)));
        }
        out.extend((1..12).map(|back| self.ago(back)));
        for h in [1, 3, 6, 12] {
            out.extend(summary.change(h));
        }
        out.extend(summary.rise(12));
        out.extend(summary.levels);
        out.push(summary.likeness);
        let since = view.recent(self.day).iter().rev().position(|value| *value >= high).unwrap_or(self.day);
        out.push((1.0 + since as f32).ln() / 5.0);
        out.extend(clock(view.last_s));
        let weekday = (view.last_s / 86_400 + 3) % 7; // 1 January 1970 was a Thursday; Monday is 0
        out.push(f32::from(u8::from(weekday >= 5)));
        let turn = std::f32::consts::TAU * (weekday as f32 + (view.last_s % 86_400) as f32 / 86_400.0) / 7.0;
        out.extend([turn.sin(), turn.cos()]);
        out.extend(Metric::ALL.map(|known| f32::from(u8::from(known == metric))));
        out.extend([context.activity(0), context.event(0)]);
        out.push((view.fine.len() as f32 / 4032.0).min(1.0));
    }

    fn step(&self, out: &mut Vec<f32>, h: usize, context: &Context<'_>) {
        let (view, summary) = (self.view, self.summary);
        out.extend([(h as f32).ln() / 2.5, (h as f32 / 12.0).min(1.0)]);
        let (mean, largest) = self.near(self.same_time(h, 0), Some(out));
        out.extend([mean, largest]);
        let week = self.same_time(h, 6);
        out.push(self.ago(week));
        let (mean, largest) = self.near(week, None);
        out.extend([mean, largest]);
        let (mut days, mut around) = ([0.0; DAYS], [0.0; DAYS]);
        for (i, (day, around)) in days.iter_mut().zip(&mut around).enumerate() {
            let back = self.same_time(h, i);
            *day = view.ago(back);
            *around = day.max(view.ago(back + 1)).max(view.ago(back.saturating_sub(1)));
        }
        let [mean, largest, _] = moments(&days);
        days.sort_unstable_by(f32::total_cmp);
        let [around_mean, around_largest, _] = moments(&around);
        out.extend([mean, days[DAYS / 2], largest, around_mean, around_largest].map(|value| self.z(value)));
        for repeat in 0..2 {
            let back = self.one_period(h) + repeat * self.period();
            let value = view.ago(back);
            let around = value.max(view.ago(back + 1)).max(view.ago(back.saturating_sub(1)));
            out.extend([self.z(value), self.z(around)]);
            if repeat == 0 {
                out.push(self.z(value) * summary.likeness);
            }
        }
        out.extend(summary.change(h));
        out.extend(summary.rise(h));
        let then = view.last_s.saturating_add(h as u64 * u64::from(view.step_s));
        out.extend(&clock(then)[..2]);
        out.extend(&clock(then)[4..]);
        out.extend([context.activity(h), context.event(h)]);
    }

    /// Mean and maximum of what is near, which goes to `out` too; nothing after the origin is.
    fn near(&self, back: usize, out: Option<&mut Vec<f32>>) -> (f32, f32) {
        let values: [f32; 2 * NEAR + 1] = std::array::from_fn(|i| self.view.ago((back + NEAR).saturating_sub(i)));
        if let Some(out) = out {
            out.extend(values.map(|value| self.z(value)));
        }
        let [mean, largest, _] = moments(&values);
        (self.z(mean), self.z(largest))
    }

    /// The period, a day where there is none.
    fn period(&self) -> usize {
        if self.summary.period > 0 { self.summary.period } else { self.day }
    }

    /// Steps from the origin back to the last whole period before `h` ahead.
    fn one_period(&self, h: usize) -> usize {
        h.div_ceil(self.period()) * self.period() - h
    }

    fn peak(&self, out: &mut Vec<f32>, n: usize, context: &Context<'_>) {
        let view = self.view;
        out.push((n as f32).ln() / 2.5);
        // the first and the last value of the same window, days before
        let window = |days: usize, wider: usize| {
            let first = self.same_time(1, days) + wider;
            let last = (first + 1).saturating_sub(n + 2 * wider);
            let (mut largest, mut sum) = (0.0_f32, 0.0_f32);
            for back in last..=first {
                let value = view.ago(back);
                largest = largest.max(value);
                sum += value;
            }
            (largest, sum / (first + 1 - last) as f32)
        };
        for days in [0, 6] {
            let ((largest, mean), (wider, _)) = (window(days, 0), window(days, NEAR));
            out.extend([largest, wider, mean].map(|value| self.z(value)));
        }
        let mut largest: [f32; DAYS] = std::array::from_fn(|days| window(days, 0).0);
        largest.sort_unstable_by(f32::total_cmp);
        let [mean, most, _] = moments(&largest);
        out.extend([mean, most, largest[DAYS / 2]].map(|value| self.z(value)));
        let again = (1..=n.min(self.period())).map(|h| view.ago(self.one_period(h))).fold(0.0, f32::max);
        out.push(self.z(again));
        out.extend(self.summary.rise(n));
        let activity = (1..=n).map(|h| context.activity(h)).fold(0.0, f32::max);
        let event = (1..=n).map(|h| context.event(h)).fold(0.0, f32::max);
        out.push(activity.max(event));
    }
}

/// Time of day and of the hour on two circles each.
fn clock(at_s: u64) -> [f32; 8] {
    let day = std::f32::consts::TAU * (at_s % 86_400) as f32 / 86_400.0;
    let hour = std::f32::consts::TAU * (at_s % 3600) as f32 / 3600.0;
    [
        day.sin(),
        day.cos(),
        (2.0 * day).sin(),
        (2.0 * day).cos(),
        hour.sin(),
        hour.cos(),
        (2.0 * hour).sin(),
        (2.0 * hour).cos(),
    ]
}
