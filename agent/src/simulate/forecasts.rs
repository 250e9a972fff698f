//! What the planner is told of the future in a simulation.

use crate::planner::Outlook;

/// Steps of a day.
const DAY: usize = 288;
/// History that is kept.
const KEPT: usize = 14 * DAY;

/// A source of outlooks: for each machine, CPU (0) and memory (1), the highest demand of the next steps.
pub trait Forecasts {
    fn name(&self) -> String;
    /// A step as it was used, 5 minutes after the one before; `at_s`: its end.
    fn observe(&mut self, vm: usize, resource: usize, at_s: u64, value: f64);
    /// `None`: too little is known.
    fn outlook(&mut self, vm: usize, resource: usize) -> Option<Outlook>;
}

/// Last value and the empirical quantiles of how far demand rose from such a value within the horizon, over the last 7
/// days: from values near the last one, and from the same time of the days before.
#[derive(Debug)]
pub struct Empirical {
    horizon: usize,
    series: Vec<[Series; 2]>,
    scratch: Vec<f64>,
}

#[derive(Debug, Clone, Default)]
struct Series {
    /// Newest last.
    values: Vec<f64>,
}

impl Empirical {
    /// Looks `horizon` steps of 5 minutes ahead.
    #[must_use]
    pub fn new(horizon: usize) -> Self {
        Self { horizon: horizon.clamp(1, DAY), series: Vec::new(), scratch: Vec::new() }
    }
}

impl Forecasts for Empirical {
    fn name(&self) -> String {
        format!("last value + empirical quantiles, {} min ahead", 5 * self.horizon)
    }

    fn observe(&mut self, vm: usize, resource: usize, _at_s: u64, value: f64) {
        self.series.resize(self.series.len().max(vm + 1), Default::default());
        let values = &mut self.series[vm][resource].values;
        if values.len() >= 2 * KEPT {
            values.drain(..KEPT);
        }
        values.push(value);
    }

    fn outlook(&mut self, vm: usize, resource: usize) -> Option<Outlook> {
        let values = &self.series.get(vm)?[resource].values;
        let (horizon, all) = (self.horizon, values.len());
        if all < 2 * horizon + 12 {
            return None;
        }
        let last = values[all - 1];
        let past = &values[all.saturating_sub(7 * DAY)..];
        let n = past.len();
        let near = |value: f64| (value - last).abs() <= 0.1 * last;
        let peaks = &mut self.scratch;
        peaks.clear();
        for at in 0..n - horizon {
            let ahead = &past[at + 1..=at + horizon];
            let peak = ahead.iter().copied().fold(0.0, f64::max);
            if near(past[at]) {
                peaks.push(last + peak - past[at]);
            }
        }
        // The same time of the days before: what came then, from where it is now.
        for day in 1..=7 {
            let Some(at) = (n - 1).checked_sub(day * DAY) else { break };
            for at in at.saturating_sub(2)..=(at + 2).min(n - 1 - horizon) {
                let peak = past[at + 1..=at + horizon].iter().copied().fold(0.0, f64::max);
                peaks.push(last.max(peak));
            }
        }
        if peaks.len() < 20 {
            for at in 0..n - horizon {
                let peak = past[at + 1..=at + horizon].iter().copied().fold(0.0, f64::max);
                peaks.push((last + peak - past[at]).max(0.0));
            }
        }
        peaks.sort_unstable_by(f64::total_cmp);
        let quantile = |q: f64| peaks[((peaks.len() - 1) as f64 * q).ceil() as usize].max(0.0);
        Some(Outlook { p50: quantile(0.5), p90: quantile(0.9), p95: quantile(0.95) })
    }
}
