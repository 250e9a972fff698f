//! `bench history`: how fast accesses go into the database, how much room they take, how long questions take.
//!
//! Accesses take the daemon's own path: `HistoryBuffer`, which gathers them by disk and hands over what a minute brought, the queue, the
//! writer's thread with SQLite. Traces are laid one after the other: each tile is one more run of a machine, a minute after the last, at
//! one of 16 places of the disk. Questions are asked of a database of all traces together.

mod ask;
mod trace;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use prestage_agent::learner::history::HistoryBuffer;
use prestage_agent::store::Store;
use prestage_predictor::Phase;
use serde::Serialize;

use crate::progress::Progress;
use trace::Trace;

/// Between two tiles of a machine.
const PAUSE_US: u64 = 60_000_000;
/// Tiles begin at one of so many places of the disk, this far apart.
const PLACES: u64 = 16;
const PLACE_BYTES: u64 = 1 << 30;
/// A tile's runs: quarters of it, by time.
const PROGRAMS: u64 = 4;
/// Hand over this often by the trace's clock, as the daemon does with every look at its timers.
const LOOK_US: u64 = 1_000_000;
/// Writes waiting before the bench waits: a full queue would lose accesses.
const WAITING_MAX: u64 = 16;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Traces of `ts_us,op,offset,len`, .gz or not
    #[arg(required = true, value_name = "TRACE")]
    traces: Vec<PathBuf>,
    /// Accesses of the database that is asked
    #[arg(long, default_value_t = 100_000_000)]
    accesses: u64,
    /// Accesses of each database that is measured for its size; 0: none is
    #[arg(long, default_value_t = 2_000_000)]
    each: u64,
    /// Storages for each trace in the database that is asked; 0: one storage for all
    #[arg(long, default_value_t = 2)]
    storages: u32,
    /// Machines on each storage
    #[arg(long, default_value_t = 4)]
    vms: u32,
    /// Questions of each kind
    #[arg(long, default_value_t = 500)]
    questions: usize,
    /// Database that is asked: filled if there is none, and kept; the traces must be those that filled it
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Folder for the databases [default: the system's for temporary files]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What a database took to fill and takes on disk.
#[derive(Debug, Serialize)]
pub(crate) struct Filled {
    name: String,
    accesses: u64,
    /// Of the whole process, all threads: accesses a second of one core.
    accesses_per_cpu_second: f64,
    accesses_per_second: f64,
    /// Of the file, less that of an empty database.
    bytes_per_access: f64,
    data_bytes_per_access: f64,
    index_bytes_per_access: f64,
    hours_bytes_per_access: f64,
    segments: u64,
    dropped_writes: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    traces: Vec<Filled>,
    /// Absent of one that was there.
    all: Option<Filled>,
    questions: Vec<ask::Timed>,
}

/// A machine's disk on a storage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream<'a> {
    pub(crate) trace: &'a Trace,
    pub(crate) storage: u32,
    pub(crate) vm: u32,
}

pub(crate) fn storage_name(storage: u32) -> String {
    format!("file:/srv/storage{storage}.raw")
}

pub(crate) fn cpu_seconds() -> f64 {
    // proc(5): utime and stime are the 14th and 15th field, in ticks of 10 ms; the second may hold blanks, but ends with a bracket.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Fills a database with tiles of the streams, in turn, up to a number of accesses.
fn fill(
    path: &Path,
    name: &str,
    streams: &[Stream<'_>],
    accesses: u64,
    progress: &Progress,
) -> Result<(Filled, Store)> {
    let store = Store::open(path)?;
    ensure!(store.close(Duration::from_secs(60)), "the empty database could not be closed");
    drop(store);
    let empty = std::fs::metadata(path)?.len();
    let store = Store::open(path)?;
    let mut buffer = HistoryBuffer::new(Duration::ZERO);
    for (disk, stream) in (0u32..).zip(streams) {
        buffer.name(disk, &storage_name(stream.storage), &format!("vm{}", stream.vm));
    }
    let (began, cpu) = (Instant::now(), cpu_seconds());
    let mut pushed = 0;
    let mut tile = 0u64;
    let mut clocks = vec![0u64; streams.len()];
    while pushed < accesses {
        let disk = (tile % streams.len() as u64) as usize;
        let (stream, clock) = (&streams[disk], clocks[disk]);
        let quarter = stream.trace.span_us / PROGRAMS + 1;
        let (mut looked, mut program) = (clock, None);
        for access in stream.trace.tile(disk as u32, clock, tile / streams.len() as u64 % PLACES * PLACE_BYTES) {
            let at_us = access.at.as_micros() as u64;
            let now = (at_us - clock) / quarter;
            if program != Some(now) {
                program = Some(now);
                let since = Duration::from_micros(at_us);
                buffer.phase(disk as u32, Some((Phase::Program(now), since)), since, &store);
            }
            buffer.push(&access, &store);
            if at_us >= looked + LOOK_US {
                looked = at_us;
                buffer.flush(access.at, false, &store);
            }
            pushed += 1;
        }
        clocks[disk] += stream.trace.span_us + PAUSE_US;
        buffer.phase(disk as u32, None, Duration::from_micros(clock + stream.trace.span_us), &store);
        buffer.flush(Duration::from_micros(clocks[disk]), false, &store);
        tile += 1;
        progress.now(&format!("{name}: {} million accesses", pushed / 1_000_000));
        while store.condition().queued > WAITING_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    buffer.flush(Duration::MAX, true, &store);
    let dropped_writes = store.condition().writes_dropped;
    ensure!(store.close(Duration::from_secs(600)), "the database did not take everything in time");
    let (elapsed, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    drop(store);
    let store = Store::open(path)?;
    let status = store.history(u64::MAX)?;
    let each = |bytes: u64| bytes as f64 / status.accesses as f64;
    let size = std::fs::metadata(path)?.len();
    let filled = Filled {
        name: name.to_owned(),
        accesses: status.accesses,
        accesses_per_cpu_second: pushed as f64 / cpu,
        accesses_per_second: pushed as f64 / elapsed,
        bytes_per_access: each(size - empty),
        data_bytes_per_access: each(status.data_bytes),
        index_bytes_per_access: each(status.index_bytes),
        hours_bytes_per_access: each(status.hours_bytes),
        segments: status.segments,
        dropped_writes,
    };
    ensure!(status.accesses == pushed, "{} of {pushed} accesses are in the database", status.accesses);
    Ok((filled, store))
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let progress = Progress::new();
    let traces: Vec<Trace> = options.traces.iter().map(|path| Trace::read(path)).collect::<Result<_>>()?;
    let mut maker = tempfile::Builder::new();
    maker.prefix("prestage-history");
    let folder = match &options.dir {
        Some(dir) => maker.tempdir_in(dir),
        None => maker.tempdir(),
    };
    let folder = folder.context("cannot make a folder for the databases")?;
    let mut each = Vec::new();
    for trace in traces.iter().filter(|_| options.each > 0) {
        let path = folder.path().join(format!("{}.db", trace.name));
        let streams = [Stream { trace, storage: 0, vm: 0 }];
        let (filled, store) = fill(&path, &trace.name, &streams, options.each, &progress)?;
        drop(store);
        std::fs::remove_file(&path)?;
        progress.step(&format!("{}: {:.2} bytes an access", trace.name, filled.bytes_per_access));
        each.push(filled);
    }
    let mut streams = Vec::new();
    for vm in 0..options.vms {
        for (number, trace) in (0u32..).zip(&traces) {
            for copy in 0..options.storages.max(1) {
                let storage = if options.storages == 0 { 0 } else { number * options.storages + copy };
                streams.push(Stream { trace, storage, vm: number * options.vms + vm });
            }
        }
    }
    let path = options.keep.clone().unwrap_or_else(|| folder.path().join("all.db"));
    let (all, store) = if path.exists() {
        (None, Store::open(&path)?)
    } else {
        let (all, store) = fill(&path, "all", &streams, options.accesses, &progress)?;
        progress.step(&format!("all: {} accesses, {:.2} bytes each", all.accesses, all.bytes_per_access));
        (Some(all), store)
    };
    let questions = ask::all(&path, store, &streams, options.questions, &progress)?;
    let report = Report { traces: each, all, questions };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn print(report: &Report) {
    println!(
        "{:<18} {:>11} {:>8} {:>10} {:>6} {:>6} {:>6} {:>6}",
        "database", "accesses", "segments", "M/s (core)", "B/acc", "data", "index", "hours"
    );
    for filled in report.traces.iter().chain(&report.all) {
        println!(
            "{:<18} {:>11} {:>8} {:>10.2} {:>6.2} {:>6.2} {:>6.3} {:>6.3}",
            filled.name,
            filled.accesses,
            filled.segments,
            filled.accesses_per_cpu_second / 1e6,
            filled.bytes_per_access,
            filled.data_bytes_per_access,
            filled.index_bytes_per_access,
            filled.hours_bytes_per_access
        );
    }
    println!(
        "\n{:<34} {:>5} {:>8} {:>8} {:>8} {:>10}",
        "question, page cache", "n", "p50 ms", "p99 ms", "max ms", "complete %"
    );
    for timed in &report.questions {
        println!(
            "{:<34} {:>5} {:>8.2} {:>8.2} {:>8.2} {:>10.1}",
            format!("{}, {}", timed.question, timed.page_cache),
            timed.asked,
            timed.p50_ms,
            timed.p99_ms,
            timed.max_ms,
            timed.complete_percent
        );
    }
}
