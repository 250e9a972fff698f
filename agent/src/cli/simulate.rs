//! `simulate`: a recorded month of machines on one simulated host. Runs in this process.
//!
//! - `text.rs`, `svg.rs`: the outcome on a terminal, and as a chart

mod svg;
mod text;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};

use super::{Failure, print_json};
use crate::config::units::parse_bytes;
use crate::simulate::{Between, MemoryBy, Setup, Trace, run as simulate};
use prestage_predictor::demand::Weights;

#[derive(Debug, Args)]
#[command(
    long_about = "Run a recorded month of machines on one simulated host: by the planner at several risks, by rules that \
    react (as oVirt MOM and Proxmox VE), by the Kubernetes vertical pod autoscaler's recommender, and with nothing changed.\n\n\
    Samples are 5 minutes apart. The first 31 days (of a shorter trace, half) are for training, what \
    follows is counted. The host has what all machines together used at most in 99 % of the training part, unless it is \
    given: it is short at times. Actuation takes what it was measured to take: a vCPU is online after a second, by balloon 424 MiB of memory come in 1.2 s \
    and go in 4.8 s, by virtio-mem 512 MiB in 0.3 s and 1.9 s, more in proportion. Machines that are off, and times without a sample, are not counted.\n\nDATA: comma-separated \
    with the columns ts, vm, cores, cpu_pct, mem_cap_kb, mem_kb, or files of GWA-T-12 (Bitbrains) as published; plain or .gz; a folder stands for \
    its .csv and .csv.gz files.",
    after_help = "Columns of DATA, by the names in its first line, in any order: ts (Unix seconds), vm (its name), cores (vCPUs it has), cpu_pct (use, \
    % of those), mem_cap_kb (memory it has), mem_kb (memory it uses); others are left alone."
)]
pub struct SimulateArgs {
    /// Recorded demand: files or folders
    #[arg(long, value_name = "DATA", required = true, num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// Machines at most; of more, so many are drawn
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub vms: u16,
    /// Days that are counted at most
    #[arg(long, value_name = "N", default_value_t = 31, value_parser = clap::value_parser!(u16).range(1..=3660))]
    pub days: u16,
    /// Days of the training part at most
    #[arg(long, value_name = "N", default_value_t = 31, value_parser = clap::value_parser!(u16).range(1..=3660))]
    pub train_days: u16,
    /// Cores of the host that machines may have
    #[arg(long, value_name = "N", value_parser = cores)]
    pub host_cores: Option<f64>,
    /// Memory of the host that machines may have
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub host_memory: Option<u64>,
    /// Draws the machines and their priorities
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Probabilities with which demand may exceed what is given: a run of the planner each
    #[arg(long, value_name = "P", value_delimiter = ',', default_values_t = [0.3, 0.2, 0.1, 0.05], value_parser = risk)]
    pub risk: Vec<f64>,
    /// A trained network for the forecasts (`forecast evaluate --save-model`); otherwise they do without
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// What demand does between two samples: stays (every rise comes at once, the worst case), or goes in a straight line
    #[arg(long, value_enum, default_value_t = BetweenArg::Held)]
    pub between: BetweenArg,
    /// By which means memory comes and goes
    #[arg(long, value_enum, default_value_t = MemoryArg::Balloon)]
    pub memory_by: MemoryArg,
    /// Write a chart: violations over what is allocated and not used
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BetweenArg {
    Held,
    Linear,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MemoryArg {
    Balloon,
    VirtioMem,
}

pub(super) async fn run(args: SimulateArgs, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let setup = Setup {
        vms: usize::from(args.vms),
        days: usize::from(args.days),
        train_days: usize::from(args.train_days),
        host_cores: args.host_cores,
        host_memory: args.host_memory.map(|bytes| bytes as f64),
        seed: args.seed,
        between: match args.between {
            BetweenArg::Held => Between::Held,
            BetweenArg::Linear => Between::Linear,
        },
        memory_by: match args.memory_by {
            MemoryArg::Balloon => MemoryBy::Balloon,
            MemoryArg::VirtioMem => MemoryBy::VirtioMem,
        },
        model: args.model.as_deref().map(read_model).transpose()?,
        risks: args.risk.clone(),
        ..Setup::default()
    };
    let data = args.data.clone();
    let mut work = tokio::task::spawn_blocking(move || {
        let trace = Trace::read(&data).map_err(|error| Failure::Failed(error.to_string()))?;
        let shown = io::stderr().is_terminal();
        let mut progress = |policy: &str| {
            if shown {
                // Erases the line before; what cannot be shown is not worth failing for.
                let _ = write!(io::stderr(), "\r\x1b[Ksimulating: {policy}");
            }
        };
        let report = simulate(&trace, &setup, &mut progress).map_err(Failure::Failed);
        if shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
        report
    });
    let report = tokio::select! {
        done = &mut work => done.map_err(|error| Failure::Failed(error.to_string()))??,
        _ = tokio::signal::ctrl_c() => return Err(Failure::Failed("interrupted".to_owned())),
    };
    if let Some(file) = &args.svg {
        std::fs::write(file, svg::chart(&report))
            .map_err(|error| Failure::Failed(format!("cannot write the chart {}: {error}", file.display())))?;
    }
    if json {
        return print_json(out, &report);
    }
    Ok(out.write_all(text::report(&report).as_bytes())?)
}

fn read_model(path: &Path) -> Result<Arc<Weights>, Failure> {
    let failed = |error: &dyn std::error::Error| Failure::Failed(format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| failed(&error))?;
    Weights::from_bytes(&bytes).map(Arc::new).map_err(|error| failed(&error))
}

fn cores(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.1..=100_000.0).contains(&number) => Ok(number),
        _ => Err("it is a number of cores, 0.1 to 100000".to_owned()),
    }
}

fn risk(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (1e-4..=0.5).contains(&number) => Ok(number),
        _ => Err("it is a probability, 0.0001 to 0.5".to_owned()),
    }
}
