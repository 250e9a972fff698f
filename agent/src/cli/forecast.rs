//! `forecast evaluate`: the daemon's forecasts on recorded series. Runs in this process.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use prestage_predictor::demand::Weights;
use prestage_train::demand::DemandConfig;
use serde::Serialize;

use super::{Failure, answer};
use crate::forecast::evaluate::HORIZON;
use crate::forecast::{Table, Timing, predict, train, trainable};

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// Series: CSV with the columns series,metric,step,value in steps of 5 minutes, plain or gzip
    #[arg(long, value_name = "FILE")]
    series: PathBuf,
    /// Points: CSV with the columns series,metric,origin,timestamp
    #[arg(long, value_name = "FILE")]
    points: PathBuf,
    /// Where the forecasts are written: CSV, a row for each of 12 steps
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// A trained model; without, one is trained on the first 31 days (series bb-*) or 14 (az-*),
    /// of others on what is before the first point of their data set
    #[arg(long, value_name = "FILE", conflicts_with_all = ["without_model", "save_model"])]
    model: Option<PathBuf>,
    /// The simple forecasters and their blend alone
    #[arg(long, conflicts_with = "save_model")]
    without_model: bool,
    /// Where the trained model is written
    #[arg(long, value_name = "FILE")]
    save_model: Option<PathBuf>,
    /// Train on steps below this only, of every series
    #[arg(long, value_name = "STEP")]
    train_below: Option<usize>,
}

/// What was written.
#[derive(Debug, Serialize)]
struct Evaluated {
    out: PathBuf,
    forecasts: usize,
    median_us: f64,
    longest_us: f64,
    /// Cut at ten times the largest value seen.
    capped: usize,
}

pub(super) fn evaluate(args: &EvaluateArgs, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| Failure::Failed(error.to_string());
    let mut table = Table::read(&args.series).map_err(|error| failed(&error))?;
    let points = table.points(&args.points, HORIZON).map_err(|error| failed(&error))?;
    let limit = |series: &str| args.train_below.unwrap_or_else(|| trainable(&points, series));
    let model = match (&args.model, args.without_model) {
        (Some(path), _) => {
            let bytes = std::fs::read(path).map_err(|error| at(path, &error))?;
            Some(Weights::from_bytes(&bytes).map_err(|error| at(path, &error))?)
        }
        (None, true) => None,
        (None, false) => {
            let terminal = io::stderr().is_terminal();
            let mut report = |done: u64, total: u64, loss: f64| {
                if terminal {
                    eprint!("\rtraining: step {done} of {total}, loss {loss:.4} ");
                }
            };
            let model = train(&table, limit, DemandConfig::default(), &mut report).map_err(|error| failed(&error))?;
            if terminal {
                eprintln!();
            }
            Some(model)
        }
    };
    if let (Some(path), Some(model)) = (&args.save_model, &model) {
        std::fs::write(path, model.to_bytes()).map_err(|error| at(path, &error))?;
    }
    let timing = write(&args.out, |rows| predict(&table, &points, limit, model.as_ref(), rows))
        .map_err(|error| at(&args.out, &error))?;
    let us = |time: std::time::Duration| time.as_secs_f64() * 1e6;
    let evaluated = Evaluated {
        out: args.out.clone(),
        forecasts: timing.forecasts,
        median_us: us(timing.median),
        longest_us: us(timing.largest),
        capped: timing.capped,
    };
    answer(out, json, &evaluated, |it| {
        format!(
            "{}: {} forecasts, {:.0} µs each (median; longest {:.0}), {} cut at ten times the largest value seen\n",
            it.out.display(),
            it.forecasts,
            it.median_us,
            it.longest_us,
            it.capped
        )
    })
}

fn write(path: &Path, rows: impl FnOnce(&mut dyn Write) -> io::Result<Timing>) -> io::Result<Timing> {
    let mut out = BufWriter::new(File::create(path)?);
    let timing = rows(&mut out)?;
    out.flush()?;
    Ok(timing)
}

fn at(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::Failed(format!("{}: {error}", path.display()))
}
