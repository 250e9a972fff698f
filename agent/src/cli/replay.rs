//! `trace replay`: the policy core and the predictor that the daemon runs, on recorded traces. Runs in this process.
//!
//! - `args`: options
//! - `model`: the LSTM it listens to
//! - `render`: text for people
//! - `progress`: the line on standard error

mod args;
mod model;
mod progress;
mod render;

pub(super) use args::{ABOUT, ReplayArgs};

use super::{Failure, print_json_line};
use args::{Input, PolicyArg};
use prestage_replay::{
    Footprint, Interrupted, Mark, Nothing, Predictive, Prefetcher, ReplayConfig, ReplayError, Report, TraceReader,
    marks, replay,
};
use progress::Progress;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long work that was told to stop may take to look.
const PATIENCE: Duration = Duration::from_millis(500);

/// What a replay has found, and what the reader had to mend for it.
#[derive(serde::Serialize)]
struct Replayed {
    #[serde(flatten)]
    report: Report,
    /// Distinct pages of the trace.
    footprint_pages: u64,
    /// The cache as a share of them; more than was asked for where that is less than the smallest cache.
    cache_share: f64,
    #[serde(skip)]
    skipped_rows: u64,
    #[serde(skip)]
    clamped_rows: u64,
}

pub(super) async fn run(args: ReplayArgs, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    args.check().map_err(Failure::Usage)?;
    let args = Arc::new(args);
    let stop = Arc::new(AtomicBool::new(false));
    let mut replayed = Vec::new();
    let mut failed = None;
    for file in &args.files {
        let (args, file, asked) = (Arc::clone(&args), file.clone(), Arc::clone(&stop));
        let mut work = tokio::task::spawn_blocking(move || one(&args, &file, &asked));
        let done = tokio::select! {
            done = &mut work => done,
            // The work looks at the flag and ends; what it was about is then known to be over. Requests of gigabytes, rows
            // that hold none, or a file server that does not answer can keep it from looking: then it is left alone.
            _ = tokio::signal::ctrl_c() => {
                stop.store(true, Ordering::Relaxed);
                tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| Ok(Err(interrupted())))
            }
        };
        match done.map_err(|error| Failure::Failed(error.to_string())).and_then(|done| done) {
            Ok(one) if json => print_json_line(out, &one)?,
            Ok(one) => replayed.push(one),
            Err(failure) => {
                failed = Some(failure);
                break;
            }
        }
    }
    // What is done stays worth reading when a later trace is bad.
    if !replayed.is_empty() {
        out.write_all(render::reports(&args, &replayed).as_bytes())?;
    }
    failed.map_or(Ok(()), Err)
}

/// Replays one trace.
fn one(args: &ReplayArgs, file: &Path, stop: &AtomicBool) -> Result<Replayed, Failure> {
    let open = |path: &Path| TraceReader::open(path, args.read_options()).map_err(failed);
    let marks = |path: Option<&Path>| path.map_or(Ok(Vec::new()), marks::read).map_err(failed);
    let programs: Vec<Mark> = marks(args.programs.as_deref())?;

    let reader = open(file)?;
    let mut progress = Progress::new("scanning", file, &reader, stop);
    let footprint = Footprint::of(reader, |requests| progress.step(requests)).map_err(failed)?;
    drop(progress);
    if stop.load(Ordering::Relaxed) {
        return Err(interrupted());
    }
    if footprint.requests == 0 {
        return Err(Failure::Failed(format!("{} has no requests", file.display())));
    }
    let capacity_pages = footprint.capacity_pages(args.cache);

    let mut policy: Box<dyn Prefetcher> = match args.policy.kind() {
        None => Box::new(Nothing),
        Some(kind) => {
            let mut policy = Predictive::new(kind, args.threshold as f32, capacity_pages);
            if let Some(model) = model::of(args, stop)? {
                policy.set_model(model);
            }
            for Input { path, marks: programs } in &args.train {
                let reader = open(path)?;
                let mut progress = Progress::new("training on", path, &reader, stop);
                policy
                    .train(reader, &marks(programs.as_deref())?, |requests| progress.step(requests))
                    .map_err(failed)?;
                if stop.load(Ordering::Relaxed) {
                    return Err(interrupted());
                }
            }
            policy.resize(footprint.end_page);
            Box::new(policy)
        }
    };

    let config = ReplayConfig {
        trace: file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned(),
        cache: footprint.fraction(args.cache),
        threshold: (args.policy != PolicyArg::None).then_some(args.threshold),
        capacity_pages,
        end_page: footprint.end_page,
        block_pages: args.block_pages,
        eviction: args.eviction.into(),
        device: args.device(),
        marks: programs,
        cost: args.cost,
    };
    let mut reader = open(file)?;
    let mut progress = Progress::new("replaying", file, &reader, stop);
    let replayed = replay(&config, reader.by_ref(), policy.as_mut(), |requests| progress.step(requests));
    drop(progress);
    let report = replayed.map_err(|error: ReplayError| failed(error))?;
    let footprint_pages = footprint.distinct_pages;
    Ok(Replayed {
        report,
        footprint_pages,
        cache_share: capacity_pages as f64 / footprint_pages.max(1) as f64,
        skipped_rows: reader.skipped_rows(),
        clamped_rows: reader.clamped_rows(),
    })
}

fn interrupted() -> Failure {
    failed(Interrupted)
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::Failed(error.to_string())
}
