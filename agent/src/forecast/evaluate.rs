//! Trains the demand network on the allowed part of recorded series, and forecasts at given points with the same code as the
//! daemon: every step is observed in order, nothing behind an origin is known at it.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use prestage_predictor::demand::{Context, EXPERTS, Forecast, Forecaster, Quantiles, Weights};
use prestage_train::demand::{DemandConfig, DemandCorpus, DemandError, DemandSeries, DemandTrainer};

use serde::Serialize;

use super::table::{Line, Points, STEP_S, Table};

/// Steps ahead at each point.
pub const HORIZON: usize = 12;
/// Steps of training between reports.
const REPORT_EVERY: u64 = 50;
/// Steps of a day.
const DAY: usize = 288;

/// What the forecasts cost.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Timing {
    pub forecasts: usize,
    /// Median and largest time of one, features to quantiles.
    pub median: Duration,
    pub largest: Duration,
    /// Forecasts that were cut at ten times what was ever seen.
    pub capped: usize,
    /// Mean share of each expert in the median of the first step.
    pub shares: [f64; EXPERTS],
    /// How forecasts of a day kept their promise, by kind of series and metric.
    pub day: BTreeMap<String, DayAhead>,
}

/// Forecasts of the next day, at the points that have a day behind them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DayAhead {
    pub forecasts: u64,
    /// Steps beyond the first hour that were measured, and those of them within the .05 and .95 quantile.
    pub steps: u64,
    pub inside: u64,
    /// Forecasts whose .95 quantile of the maximum was not exceeded.
    pub covered: u64,
}

impl DayAhead {
    /// Share of the steps within the .05 and .95 quantile, and of the days below the .95 quantile of their maximum.
    #[must_use]
    pub fn shares(&self) -> [f64; 2] {
        [(self.inside, self.steps), (self.covered, self.forecasts)].map(|(part, all)| part as f64 / all.max(1) as f64)
    }

    fn learn(&mut self, forecast: &Forecast, line: &Line, origin: usize) {
        let ahead = origin + 1..origin + 1 + forecast.steps.len();
        let came = line.values[ahead.clone()].iter().zip(&line.measured[ahead]);
        let highest = came.clone().filter(|(_, known)| **known).map(|(value, _)| *value).fold(0.0, f64::max);
        for ((value, _), Quantiles([low, .., high])) in
            came.zip(&forecast.steps).skip(HORIZON).filter(|((_, known), _)| **known)
        {
            self.steps += 1;
            self.inside += u64::from(*value >= low - rounding(*value) && *value <= high + rounding(*value));
        }
        self.forecasts += 1;
        self.covered += u64::from(highest <= forecast.peak.0[3] + rounding(highest));
    }
}

/// What files round away.
fn rounding(value: f64) -> f64 {
    1e-6 * (1.0 + value)
}

/// Steps of a series that may be trained on: the rule of the recorded data sets (31 days of Bitbrains, `bb-…`, 14 of Azure,
/// `az-…`); of others what is before the first point of their data set, named up to the first dash.
#[must_use]
pub fn trainable(points: &Points, series: &str) -> usize {
    let same = points.iter().filter(|(key, _)| kind(&key.series) == kind(series));
    let first = same.flat_map(|(_, origins)| origins).map(|(origin, _)| *origin).min().unwrap_or(0);
    match kind(series) {
        "bb" => first.min(31 * DAY),
        "az" => first.min(14 * DAY),
        _ => first,
    }
}

/// The data set of a series.
fn kind(series: &str) -> &str {
    series.split('-').next().unwrap_or_default()
}

/// Trains on the steps before `limit(series)` of every series; `report` is told steps done, of how many, and the mean loss.
///
/// # Errors
/// [`DemandError`]: too little to train on, or diverged.
pub fn train(
    table: &Table,
    limit: impl Fn(&str) -> usize,
    config: DemandConfig,
    report: &mut dyn FnMut(u64, u64, f64),
) -> Result<Weights, DemandError> {
    let series = table.lines.iter().filter_map(|(key, line)| {
        let steps = limit(&key.series).min(line.values.len());
        Some(DemandSeries {
            metric: key.metric()?,
            step_s: STEP_S,
            start_s: line.start_s,
            values: line.values[..steps].iter().map(|value| *value as f32).collect(),
            measured: line.measured[..steps].to_vec(),
            activity: Vec::new(),
            event: Vec::new(),
        })
    });
    let mut trainer = DemandTrainer::new(config, DemandCorpus::new(series.collect()))?;
    let (mut done, total) = (0, trainer.total_steps());
    while let Some(loss) = trainer.train(REPORT_EVERY)? {
        done = (done + REPORT_EVERY).min(total);
        report(done, total, loss);
    }
    trainer.export()
}

/// Forecasts at every point. Rows go to `out` as `peer,series,metric,origin,step,q05,q50,q90,q95,max_q95,ms`; rehearsals are
/// made from step `limit(series)` on, behind what the model was trained on.
///
/// # Errors
/// What `out` says.
pub fn predict(
    table: &Table,
    points: &Points,
    limit: impl Fn(&str) -> usize,
    model: Option<&Weights>,
    out: &mut dyn Write,
) -> std::io::Result<Timing> {
    writeln!(out, "peer,series,metric,origin,step,q05,q50,q90,q95,max_q95,ms")?;
    let (mut timing, mut times) = (Timing::default(), Vec::new());
    for (key, origins) in points {
        let (Some(line), Some(metric)) = (table.lines.get(key), key.metric()) else { continue };
        let mut origins: Vec<usize> = origins.iter().map(|(origin, _)| *origin).collect();
        origins.sort_unstable();
        origins.dedup();
        let mut forecaster = Forecaster::new(metric, STEP_S);
        let mut next = 0;
        for &origin in origins.iter().filter(|origin| **origin < line.values.len()) {
            for at in next..=origin {
                step(&mut forecaster, line, at, limit(&key.series), model);
            }
            next = origin + 1;
            let started = Instant::now();
            let forecast = forecaster.forecast(HORIZON, &Context::default(), model);
            let took = started.elapsed();
            times.push(took);
            timing.capped += usize::from(forecast.capped);
            if origin + DAY < line.values.len() {
                let day = forecaster.forecast(DAY, &Context::default(), model);
                let group = format!("{}/{}", kind(&key.series), key.metric);
                timing.day.entry(group).or_default().learn(&day, line, origin);
            }
            for (sum, share) in timing.shares.iter_mut().zip(forecast.basis.shares) {
                *sum += f64::from(share);
            }
            for (h, quantiles) in forecast.steps.iter().enumerate() {
                let [q05, q50, q90, q95] = quantiles.0;
                let (series, metric, peak) = (&key.series, &key.metric, forecast.peak.0[3]);
                let ms = took.as_secs_f64() * 1e3;
                writeln!(
                    out,
                    "prestage,{series},{metric},{origin},{},{q05:.7},{q50:.7},{q90:.7},{q95:.7},{peak:.7},{ms:.4}",
                    h + 1
                )?;
            }
        }
    }
    times.sort_unstable();
    timing.forecasts = times.len();
    timing.median = times.get(times.len() / 2).copied().unwrap_or_default();
    timing.largest = times.last().copied().unwrap_or_default();
    timing.shares = timing.shares.map(|sum| sum / times.len().max(1) as f64);
    Ok(timing)
}

fn step(forecaster: &mut Forecaster, line: &Line, at: usize, trained: usize, model: Option<&Weights>) {
    if !line.measured[at] && at > 0 {
        return;
    }
    forecaster.observe(line.start_s + at as u64 * u64::from(STEP_S), line.values[at]);
    if at >= trained {
        forecaster.rehearse(&Context::default(), model);
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::Key;
    use super::*;

    /// A day that repeats is foretold; one that is ten times as high is not, and what was not measured is no outcome.
    #[test]
    fn a_day_ahead_is_compared_with_what_was_measured() {
        let values: Vec<f64> = (0..6 * DAY).map(|at| if at >= 5 * DAY { 100.0 } else { 10.0 }).collect();
        let mut measured = vec![true; values.len()];
        measured[5 * DAY + 100..5 * DAY + 200].fill(false);
        let key = Key { series: "xy-1".to_owned(), metric: "cpu".to_owned() };
        let lines = BTreeMap::from([(key.clone(), Line { values, measured, start_s: 0 })]);
        let points = Points::from([(key, vec![(4 * DAY - 1, 0), (5 * DAY - 1, 0), (5 * DAY + 50, 0)])]);
        let timing = predict(&Table { lines }, &points, |_| 0, None, &mut Vec::new()).unwrap();
        let day = timing.day["xy/cpu"];
        // the last point has no day behind it
        assert_eq!((timing.forecasts, day.forecasts, day.covered), (3, 2, 1));
        assert_eq!((day.steps, day.inside), ((2 * (DAY - HORIZON) - 100) as u64, (DAY - HORIZON) as u64));
    }
}
