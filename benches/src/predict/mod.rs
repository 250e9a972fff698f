//! `bench predict`: recorded traces through this project's predictor and policy core, beside every peer, in one run.
//!
//! | module | holds |
//! | --- | --- |
//! | [`ours`] | this project's policies on a trace, by the production code |
//! | [`grid`] | every method on every trace at every size, untimed and timed |
//! | [`libcachesim`] | the eviction policies of that package |
//! | [`sweep`], [`chart`] | hit ratio against precision over the threshold |
//! | [`boot`] | a second boot after a first one, phase by phase |
//! | [`bounded`] | what is lost where nothing can be gained |
//! | [`foresight`] | the predictor alone on the misses of a cache |
//! | [`ablation`] | what each part contributes |
//! | [`split`], [`sets`], [`foretold`] | what it learns from, with a model trained on that; how well the next read is foretold |
//! | [`row`] | one replay's figures |
//! | [`tables`], [`verdict`] | what is printed: figures, and what they say |
//! | [`pool`] | jobs side by side |

mod ablation;
mod boot;
mod bounded;
mod chart;
mod foresight;
mod foretold;
mod grid;
mod libcachesim;
mod ours;
mod pool;
mod row;
mod sets;
mod split;
mod sweep;
mod tables;
pub(crate) mod verdict;

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::host::Host;
use crate::progress::Progress;
use crate::record::write_json;
use crate::trace::Trace;
use row::Row;
use verdict::Claim;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder of traces: *.csv or *.csv.gz of `ts_us,op,offset,len`, with NAME.marks.txt beside them where there are marks
    #[arg(long, default_value = "benches/traces", value_name = "DIR")]
    traces: PathBuf,
    /// Cache sizes, as shares of a trace's distinct pages
    #[arg(long, value_delimiter = ',', default_value = "0.01,0.05,0.1,0.2", value_name = "SHARE")]
    sizes: Vec<f64>,
    /// Latencies of the store in timed mode
    #[arg(long, value_delimiter = ',', default_value = "1,5", value_name = "MS")]
    latencies_ms: Vec<f64>,
    /// Where the figures are written as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the curves are drawn, predict-TRACE.svg each; needs the sections `tables` and `sweep`
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Only these sections
    #[arg(long, value_delimiter = ',', value_name = "SECTION")]
    only: Vec<Section>,
    /// Also LRU, S3-FIFO, SIEVE and ARC of the Python package libcachesim, installed below the build's folder
    #[arg(long)]
    libcachesim: bool,
}

/// The parts of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Section {
    /// Every method on every trace at every size
    Tables,
    /// Hit ratio and precision over the threshold
    Sweep,
    /// A second boot after a first one
    Boot,
    /// Random and adversarial traces
    Bounded,
    /// The predictor alone on the misses of a cache
    Foresight,
    /// The predictor's parts alone
    Ablation,
}

impl Options {
    fn wants(&self, section: Section) -> bool {
        self.only.is_empty() || self.only.contains(&section)
    }

    /// Latencies of the stores to replay with, in µs; first untimed.
    fn stores(&self) -> impl Iterator<Item = Option<f64>> {
        [None].into_iter().chain(self.latencies_ms.iter().map(|ms| Some(ms * 1e3)))
    }

    fn check(&self) -> Result<()> {
        if let Some(size) = self.sizes.iter().find(|size| !(**size > 0.0 && **size <= 1.0)) {
            bail!("--sizes {size}: a cache is more than 0 and at most 1 of the trace's pages");
        }
        if let Some(ms) = self.latencies_ms.iter().find(|ms| !(**ms >= 0.0 && ms.is_finite())) {
            bail!("--latencies-ms {ms}: a latency is 0 or more");
        }
        if self.svg.is_some() && !(self.wants(Section::Tables) && self.wants(Section::Sweep)) {
            bail!("--svg: the curves need --only tables,sweep");
        }
        Ok(())
    }
}

/// A whole run, as written to JSON.
#[derive(Debug, Serialize)]
struct Run {
    host: Host,
    /// Every method on every trace at every size: see [`Row`] for the keys.
    rows: Vec<Row>,
    /// The whole predictor at every threshold.
    sweep: Vec<Row>,
    boots: Vec<boot::Boot>,
    bounded: Vec<bounded::Loss>,
    foresight: Vec<foresight::Foresight>,
    ablation: Vec<ablation::Part>,
    verdict: Vec<Claim>,
    /// What was asked for and not measured, and why.
    skipped: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    options.check()?;
    let progress = Progress::new();
    let traces = Trace::load_all(&options.traces)?;
    progress.step(&format!("{} traces from {}", traces.len(), options.traces.display()));
    let (host, skipped) = (Host::find(), Vec::new());
    let (rows, sweep, boots, bounded) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (foresight, ablation, verdict) = (Vec::new(), Vec::new(), Vec::new());
    let mut run = Run { host, rows, sweep, boots, bounded, foresight, ablation, verdict, skipped };

    if options.wants(Section::Tables) {
        progress.now("tables");
        run.rows = grid::run(&traces, options, &mut run.skipped)?;
        for trace in &traces {
            if trace.order_only() {
                println!("\n{}: its times are row numbers; timed figures show queueing alone.", trace.name);
            }
            for share in &options.sizes {
                print!("{}", tables::size(trace, *share, &run.rows));
            }
            print!("{}", tables::calibration(trace, &options.sizes, &run.rows));
        }
        println!("\n{}", tables::LEGEND);
        run.verdict.extend(verdict::of_rows(&run.rows));
        progress.step("tables");
    }
    if options.wants(Section::Sweep) {
        progress.now("sweep");
        run.sweep = sweep::run(&traces, options)?;
        traces.iter().for_each(|trace| print!("{}", sweep::table(&run.sweep, trace, options)));
        run.verdict.push(sweep::claim(&run.sweep, &run.rows, &traces, &options.sizes));
        if let Some(folder) = &options.svg {
            for path in chart::write(folder, &traces, &run.rows, &run.sweep, options)? {
                println!("{}", path.display());
            }
        }
        progress.step("sweep");
    }
    if options.wants(Section::Boot) {
        progress.now("boot");
        run.boots = boot::run(&traces, options)?;
        run.boots.iter().for_each(|boot| print!("{}", boot::table(boot)));
        run.verdict.extend(boot::claims(&run.boots));
        progress.step("boot");
    }
    if options.wants(Section::Bounded) {
        progress.now("bounded");
        run.bounded = bounded::run()?;
        print!("{}", bounded::table(&run.bounded));
        run.verdict.extend(bounded::claims(&run.bounded));
        progress.step("bounded");
    }
    if options.wants(Section::Foresight) {
        progress.now("foresight");
        run.foresight = foresight::run(&traces)?;
        print!("{}", foresight::table(&run.foresight));
        run.verdict.extend(foresight::claims(&run.foresight));
        progress.step("foresight");
    }
    if options.wants(Section::Ablation) {
        progress.now("ablation");
        run.ablation = ablation::run(&traces, &mut run.skipped)?;
        print!("{}", ablation::table(&run.ablation));
        run.verdict.extend(ablation::claims(&run.ablation));
        progress.step("ablation");
    }
    print!("{}", verdict::render(&run.verdict));
    run.skipped.iter().for_each(|skipped| println!("not measured: {skipped}"));
    if let Some(path) = &options.json {
        write_json(&run, path)?;
    }
    Ok(())
}
