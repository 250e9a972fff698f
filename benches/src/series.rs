//! `bench series`: what samples of machines take in the database, what taking them in costs, and how long questions take.
//!
//! Samples are recorded ones, by the second: a CSV whose first column is Unix seconds and whose further columns are metrics. Each machine
//! plays it from another place on, around and around, in batches of ten seconds as the daemon hands them over. Beside the database's own
//! coding, the same ten-minute chunks are coded as XOR of floats (Pelkonen et al., "Gorilla", VLDB 2015), with the same rounded values.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use prestage_agent::store::Store;
use prestage_agent::store::series::{Reading, Samples, SeriesStatus, resolution};
use serde::Serialize;

use crate::history::cpu_seconds;
use crate::progress::Progress;

/// The beginning of a chunk of every level.
const BEGIN_S: u64 = 691_200 * 2500;
/// Writes waiting before the bench waits.
const WAITING_MAX: u64 = 16;
const CHUNK: usize = 600;
const DAY_S: u64 = 86_400;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Samples by the second: `t,NAME,…`; names say the resolution: `…_cores` thousandths, `psi_…` hundredths, else whole numbers
    #[arg(value_name = "CSV")]
    samples: PathBuf,
    /// Machines of the database whose cost is measured
    #[arg(long, default_value_t = 100)]
    vms: u64,
    /// Metrics of a machine, at most those recorded
    #[arg(long, default_value_t = 12)]
    metrics: usize,
    /// Hours of it
    #[arg(long, default_value_t = 4)]
    hours: u64,
    /// Days of one machine in the database that is asked
    #[arg(long, default_value_t = 90)]
    days: u64,
    /// Folder for the databases [default: the system's for temporary files]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug)]
struct Metric {
    name: String,
    resolution: f64,
    values: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    metrics: Vec<Coded>,
    filled: Filled,
    questions: Vec<Question>,
}

/// Bytes a sample of one metric.
#[derive(Debug, Serialize)]
struct Coded {
    metric: String,
    /// Of chunks of samples in a database of this metric alone.
    ours: f64,
    gorilla: f64,
}

#[derive(Debug, Serialize)]
struct Filled {
    series: u64,
    samples: u64,
    /// All threads of the process, making the samples included.
    cpu_seconds: f64,
    /// Of one core, had they come in as they would.
    cpu_share: f64,
    /// Bytes a sample: of each level's chunks, and of the file.
    levels: [f64; 4],
    file: f64,
}

#[derive(Debug, Serialize)]
struct Question {
    what: String,
    points: usize,
    /// Milliseconds, over all metrics; the file is in the page cache.
    median_ms: f64,
    max_ms: f64,
}

fn read(path: &Path, most: usize) -> Result<Vec<Metric>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut lines = text.lines();
    let names = lines.next().context("there is no first line with names")?.split(',').skip(1);
    let resolution = |name: &str| match name {
        name if name.ends_with("_cores") => resolution::CORES,
        name if name.starts_with("psi_") => resolution::PERCENT,
        _ => resolution::BYTES,
    };
    let mut metrics: Vec<Metric> = names
        .take(most)
        .map(|name| Metric { name: name.to_owned(), resolution: resolution(name), values: Vec::new() })
        .collect();
    for line in lines {
        let values: Vec<f64> = line.split(',').skip(1).filter_map(|value| value.parse().ok()).collect();
        // The last line may be half there: the recording may be going on.
        if values.len() >= metrics.len() {
            metrics.iter_mut().zip(&values).for_each(|(metric, value)| metric.values.push(*value));
        }
    }
    ensure!(!metrics.is_empty() && metrics[0].values.len() >= CHUNK, "less than ten minutes are in {}", path.display());
    Ok(metrics)
}

/// Samples of a machine from `from` (seconds after the beginning) on.
fn samples(metric: &Metric, vm: u64, from: u64, seconds: u64) -> Samples {
    let reading = |n: u64| {
        // Machines are at different places of the recording.
        let at = (n + vm * 173) as usize % metric.values.len();
        Reading { at_s: BEGIN_S + n, value: metric.values[at] }
    };
    Samples {
        subject: format!("vm:{vm}"),
        metric: metric.name.clone(),
        resolution: metric.resolution,
        readings: (from..from + seconds).map(reading).collect(),
    }
}

fn fill(store: &Store, metrics: &[&Metric], vms: u64, seconds: u64, batch: u64) {
    for from in (0..seconds).step_by(batch as usize) {
        let all = (0..vms).flat_map(|vm| metrics.iter().map(move |metric| samples(metric, vm, from, batch))).collect();
        // Losses show in the number of samples at the end.
        drop(store.append_series(all));
        while store.condition().queued > WAITING_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn close(path: &Path, store: Store) -> Result<(Store, SeriesStatus)> {
    ensure!(store.condition().writes_dropped == 0, "writes were lost");
    ensure!(store.close(Duration::from_secs(600)), "the database did not take everything in time");
    let store = Store::open(path)?;
    let status = store.series_status()?;
    Ok((store, status))
}

/// Bytes of values as XOR of floats, with a bit a sample for a steady time.
fn gorilla(values: &[f64]) -> f64 {
    let mut bits = 64 + 64 + values.len();
    let (mut last, mut window) = (values[0].to_bits(), None::<(u32, u32)>);
    for value in &values[1..] {
        let xor = last ^ value.to_bits();
        last = value.to_bits();
        if xor == 0 {
            bits += 1;
            continue;
        }
        let (lead, trail) = (xor.leading_zeros().min(31), xor.trailing_zeros());
        match window {
            Some((before, after)) if lead >= before && trail >= after => bits += 2 + (64 - before - after) as usize,
            _ => {
                bits += 2 + 5 + 6 + (64 - lead - trail) as usize;
                window = Some((lead, trail));
            }
        }
    }
    bits as f64 / 8.0
}

fn coded(folder: &Path, metric: &Metric) -> Result<Coded> {
    let path = folder.join("one.db");
    let store = Store::open(&path)?;
    let chunks = metric.values.len() / CHUNK;
    let seconds = (chunks * CHUNK) as u64;
    // A sample beyond the last chunk, so that it is made.
    fill(&store, &[metric], 1, seconds, CHUNK as u64);
    drop(store.append_series(vec![samples(metric, 0, seconds, 1)]));
    let (store, status) = close(&path, store)?;
    ensure!(store.close(Duration::from_secs(60)), "the database could not be closed");
    std::fs::remove_file(&path)?;
    let rounded: Vec<f64> =
        metric.values.iter().map(|value| (value / metric.resolution).round() * metric.resolution).collect();
    let theirs: f64 = rounded.chunks_exact(CHUNK).map(gorilla).sum();
    Ok(Coded {
        metric: metric.name.clone(),
        ours: status.chunk_bytes[0] as f64 / seconds as f64,
        gorilla: theirs / seconds as f64,
    })
}

fn ask(store: &Store, metrics: &[&Metric], days: u64) -> Result<Vec<Question>> {
    let end = BEGIN_S + days * DAY_S;
    let asked = |what: &str, from_s: u64, step_s: u64| -> Result<Question> {
        let (mut times, mut points) = (Vec::new(), 0);
        for metric in metrics {
            let began = Instant::now();
            let answer = store.series("vm:0", &metric.name, from_s, end, step_s)?;
            times.push(began.elapsed().as_secs_f64() * 1e3);
            points = answer.points.len();
        }
        times.sort_by(f64::total_cmp);
        let max_ms = times.last().copied().unwrap_or(0.0);
        Ok(Question { what: what.to_owned(), points, median_ms: times[times.len() / 2], max_ms })
    };
    let day = end.saturating_sub(DAY_S);
    Ok(vec![
        asked("last 10 minutes by 1 s", end - 600, 1)?,
        asked("a day by 1 s", day, 1)?,
        asked("a day by 10 s", day, 10)?,
        asked("a day by 5 min", day, 300)?,
        asked("all days by 5 min", BEGIN_S, 300)?,
        asked("all days by 1 h", BEGIN_S, 3600)?,
    ])
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let progress = Progress::new();
    let metrics = read(&options.samples, usize::MAX)?;
    let used: Vec<&Metric> = metrics.iter().take(options.metrics).collect();
    let mut maker = tempfile::Builder::new();
    maker.prefix("prestage-series");
    let folder = match &options.dir {
        Some(dir) => maker.tempdir_in(dir),
        None => maker.tempdir(),
    };
    let folder = folder.context("cannot make a folder for the databases")?;
    let coded: Vec<Coded> = metrics.iter().map(|metric| coded(folder.path(), metric)).collect::<Result<_>>()?;
    progress.step("bytes a sample");

    let path = folder.path().join("many.db");
    let store = Store::open(&path)?;
    let seconds = options.hours * 3600;
    let cpu = cpu_seconds();
    fill(&store, &used, options.vms, seconds, 10);
    let (store, status) = close(&path, store)?;
    let cpu = cpu_seconds() - cpu;
    let samples = options.vms * used.len() as u64 * seconds;
    let each = |bytes: u64| bytes as f64 / samples as f64;
    let filled = Filled {
        series: status.series,
        samples,
        cpu_seconds: cpu,
        cpu_share: cpu / seconds as f64,
        levels: status.chunk_bytes.map(each),
        file: each(std::fs::metadata(&path)?.len()),
    };
    drop(store);
    progress.step("what taking samples in costs");

    let path = folder.path().join("long.db");
    let store = Store::open(&path)?;
    fill(&store, &used, 1, options.days * DAY_S, 600);
    let (store, _) = close(&path, store)?;
    progress.step("a machine's days");
    let questions = ask(&store, &used, options.days)?;

    let report = Report { metrics: coded, filled, questions };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(options, &report);
    }
    Ok(())
}

fn print(options: &Options, report: &Report) {
    println!("\nbytes a sample, chunks of ten minutes\n{:<14} {:>6} {:>8}", "metric", "ours", "gorilla");
    for Coded { metric, ours, gorilla } in &report.metrics {
        println!("{metric:<14} {ours:>6.2} {gorilla:>8.2}");
    }
    let mean = |of: fn(&Coded) -> f64| report.metrics.iter().map(of).sum::<f64>() / report.metrics.len() as f64;
    println!("{:<14} {:>6.2} {:>8.2}", "mean", mean(|one| one.ours), mean(|one| one.gorilla));
    let Filled { series, samples, cpu_seconds, cpu_share, levels, file } = &report.filled;
    println!("\n{series} series by the second, {} hours: {samples} samples", options.hours);
    println!("processor: {cpu_seconds:.2} s, {:.2} % of one core", cpu_share * 100.0);
    let [samples, tens, fives, hours] = levels;
    println!("bytes a sample: {samples:.2}, 10 s {tens:.2}, 5 min {fives:.3}, 1 h {hours:.4}; the file {file:.2}");
    println!(
        "\none machine, {} days\n{:<24} {:>8} {:>10} {:>10}",
        options.days, "question", "points", "median ms", "max ms"
    );
    for Question { what, points, median_ms, max_ms } in &report.questions {
        println!("{what:<24} {points:>8} {median_ms:>10.2} {max_ms:>10.2}");
    }
}
