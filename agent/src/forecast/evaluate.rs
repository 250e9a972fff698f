//! Trains the demand network on the allowed part of recorded series, and forecasts at given points with the same code as the
//! daemon: every step is observed in order, nothing behind an origin is known at it.

use std::io::Write;
use std::time::{Duration, Instant};

use prestage_predictor::demand::{Context, EXPERTS, Forecaster, Weights};
use prestage_train::demand::{DemandConfig, DemandCorpus, DemandError, DemandSeries, DemandTrainer};

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
}

/// Steps of a series that may be trained on: the rule of the recorded data sets (31 days of Bitbrains, `bb-…`, 14 of Azure,
/// `az-…`); of others what is before the first point of their data set, named up to the first dash.
#[must_use]
pub fn trainable(points: &Points, series: &str) -> usize {
    let kind = |series: &str| series.split('-').next().unwrap_or_default().to_owned();
    let same = points.iter().filter(|(key, _)| kind(&key.series) == kind(series));
    let first = same.flat_map(|(_, origins)| origins).map(|(origin, _)| *origin).min().unwrap_or(0);
    match kind(series).as_str() {
        "bb" => first.min(31 * DAY),
        "az" => first.min(14 * DAY),
        _ => first,
    }
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
