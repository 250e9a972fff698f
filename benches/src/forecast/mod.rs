//! `bench forecast`: demand of real machines, foretold by this project and by the peers of `forecast_peers.py`, in one run.
//!
//! The script prepares the series, draws the points, runs the peers and scores all alike; this program trains on the part
//! of the series that the script's rules allow, and forecasts at the same points with the daemon's code.
//!
//! | module | holds |
//! | --- | --- |
//! | [`script`] | the script and the Python it runs in |
//! | [`score`] | its figures, as a table |
//! | [`verdict`] | what the figures say, claim by claim |

mod score;
mod script;
mod verdict;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use prestage_agent::forecast::evaluate::HORIZON;
use prestage_agent::forecast::{DayAhead, Points, Table, Timing, predict, train, trainable};
use prestage_predictor::demand::Weights;
use prestage_train::demand::DemandConfig;
use serde::Serialize;

use crate::host::Host;
use crate::predict::verdict::{Claim, render};
use crate::progress::Progress;
use crate::record::write_json;
use score::Scores;
use script::Script;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder of the traces: bitbrains_*.csv.gz, azure_v1_*.csv.gz
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The script with the peers and the rules
    #[arg(long, value_name = "FILE")]
    peers: PathBuf,
    /// Python with numpy, pandas, lightgbm and statsforecast; without, an environment is made below the build's folder
    #[arg(long, value_name = "FILE")]
    python: Option<PathBuf>,
    /// Machines of each data set that are forecast, 0 for all
    #[arg(long, default_value_t = 30)]
    vms: u32,
    /// Points of each machine
    #[arg(long, default_value_t = 8)]
    origins: u32,
    /// Which machines and points are drawn
    #[arg(long, default_value_t = 7)]
    seed: u32,
    /// Forecasts of the peers from a run before, at the same points
    #[arg(long, value_name = "FILE")]
    reuse: Option<PathBuf>,
    /// A trained model, instead of training one
    #[arg(long, value_name = "FILE", conflicts_with = "without_model")]
    model: Option<PathBuf>,
    /// The simple experts and their blend alone
    #[arg(long)]
    without_model: bool,
    /// Steps of training of each member
    #[arg(long, value_name = "STEPS")]
    train_steps: Option<u64>,
    /// Where series, points, forecasts and the model are kept
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Where the figures are written as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A whole run, as written to JSON.
#[derive(Debug, Serialize)]
struct Run {
    host: Host,
    trained_s: Option<f64>,
    forecasts: usize,
    /// Of one forecast, features to quantiles.
    median_us: f64,
    largest_us: f64,
    /// Forecasts cut at ten times what was ever seen.
    capped: usize,
    /// Network, last value, day, week, histogram, profile.
    shares: Vec<f64>,
    /// Forecasts of a day, by kind of series and metric.
    day: BTreeMap<String, DayAhead>,
    scores: Scores,
    verdict: Vec<Claim>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let progress = Progress::new();
    let temporary = tempfile::tempdir().context("cannot create a temporary folder")?;
    let folder = options.keep.as_deref().unwrap_or(temporary.path());
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let script = Script::find(&options.peers, &options.data, options.python.as_deref())?;
    let file = |name: &str| folder.join(name);
    script.run("prepare", &["--out"], &[&file("series.csv.gz")])?;
    let numbers = [("--vms", options.vms), ("--origins", options.origins), ("--seed", options.seed)];
    let numbers: Vec<String> =
        numbers.iter().flat_map(|(name, value)| [(*name).to_owned(), value.to_string()]).collect();
    let mut words: Vec<&str> = numbers.iter().map(String::as_str).collect();
    words.push("--out");
    script.run("points", &words, &[&file("points.csv")])?;
    progress.step("series and points");

    let peers = options.reuse.clone().unwrap_or_else(|| file("peers.csv"));
    let running = if options.reuse.is_some() { None } else { Some(script.start_peers(&file("points.csv"), &peers)?) };

    let mut table = Table::read(&file("series.csv.gz"))?;
    let points = table.points(&file("points.csv"), HORIZON)?;
    let started = Instant::now();
    let model = model(options, &table, &points, &progress)?;
    let trained_s = (model.is_some() && options.model.is_none()).then(|| started.elapsed().as_secs_f64());
    if let (Some(model), Some(folder)) = (&model, &options.keep) {
        let path = folder.join("demand.model");
        std::fs::write(&path, model.to_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    // timed alone: the peers, too, are timed one at a time
    if let Some(running) = running {
        progress.now("peers");
        running.finish()?;
        progress.step("peers");
    }
    let timing = write(&file("ours.csv"), |out| {
        predict(&table, &points, |series| trainable(&points, series), model.as_ref(), out)
    })?;
    progress.step("forecasts");

    let scores = Scores::read(&script.score(&file("points.csv"), &[&peers, &file("ours.csv")])?)?;
    let verdict = verdict::of(&scores, &timing);
    print!("{}", scores.table());
    println!("{}", words_of(&timing, trained_s));
    print!("{}", render(&verdict));
    if let Some(path) = &options.json {
        let us = |time: std::time::Duration| time.as_secs_f64() * 1e6;
        let run = Run {
            host: Host::find(),
            trained_s,
            forecasts: timing.forecasts,
            median_us: us(timing.median),
            largest_us: us(timing.largest),
            capped: timing.capped,
            shares: timing.shares.to_vec(),
            day: timing.day.clone(),
            scores,
            verdict,
        };
        write_json(&run, path)?;
    }
    Ok(())
}

fn model(options: &Options, table: &Table, points: &Points, progress: &Progress) -> Result<Option<Weights>> {
    if options.without_model {
        return Ok(None);
    }
    if let Some(path) = &options.model {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(Some(Weights::from_bytes(&bytes).with_context(|| path.display().to_string())?));
    }
    let mut config = DemandConfig::default();
    config.steps = options.train_steps.unwrap_or(config.steps);
    let mut report = |done: u64, total: u64, loss: f64| {
        progress.now(&format!("training: step {done} of {total}, loss {loss:.4}"));
    };
    let model = train(table, |series| trainable(points, series), config, &mut report)?;
    progress.step("training");
    Ok(Some(model))
}

fn write(path: &Path, rows: impl FnOnce(&mut dyn Write) -> std::io::Result<Timing>) -> Result<Timing> {
    let wrong = || format!("cannot write {}", path.display());
    let mut out = BufWriter::new(File::create(path).with_context(wrong)?);
    let timing = rows(&mut out).with_context(wrong)?;
    out.flush().with_context(wrong)?;
    Ok(timing)
}

fn words_of(timing: &Timing, trained_s: Option<f64>) -> String {
    let shares: Vec<String> = ["network", "last", "day", "week", "histogram", "profile"]
        .iter()
        .zip(timing.shares)
        .map(|(name, share)| format!("{name} {:.0} %", share * 100.0))
        .collect();
    let training = trained_s.map_or_else(String::new, |seconds| format!("; trained in {seconds:.0} s"));
    let day: String = timing
        .day
        .iter()
        .map(|(group, day)| {
            let [inside, covered] = day.shares();
            format!("\n  {group:<12}{inside:>8.3}{covered:>8.3}{:>8}", day.forecasts)
        })
        .collect();
    format!(
        "\nprestage: {} forecasts, {:.0} µs each (median; longest {:.0}), {} cut at ten times the largest value seen{training}\n\
         medians come from: {}\n\
         a day ahead: steps within .05 and .95, days below the .95 quantile of their maximum, forecasts{day}",
        timing.forecasts,
        timing.median.as_secs_f64() * 1e6,
        timing.largest.as_secs_f64() * 1e6,
        timing.capped,
        shares.join(", ")
    )
}
