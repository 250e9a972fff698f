//! Measures Prestage with real guests and on recorded traces, beside what it is to be better than.
//!
//! - [`boots`]: `bench boots`, a guest booted straight, unlearned, learned and warm
//! - [`collect`]: `bench collect`, what measuring many machines costs
//! - [`datapath`]: `bench datapath`, what a request costs beside other block servers
//! - [`forecast`]: `bench forecast`, demand foretold beside other forecasters
//! - [`history`]: `bench history`, the database of accesses: size, ingest, questions
//! - [`memory`]: `bench memory`, a guest that is swapped out and touches its memory again; `bench template`, clones of one
//! - [`series`]: `bench series`, what machines used: size, ingest, questions
//! - [`record`]: the figures of a boot and the file they are written to
//! - [`host`]: the machine they were measured on
//! - [`adversary`]: traces made to be foreseen wrongly
//! - [`predict`]: `bench predict`, recorded traces through the predictor beside every [peer](peers)
//! - [`progress`]: what is shown meanwhile
//! - [`trace`]: recorded traces in memory
//! - [`table`]: what is printed at the end

mod adversary;
mod boots;
mod collect;
mod datapath;
mod forecast;
mod history;
mod host;
mod memory;
mod peers;
mod predict;
mod progress;
mod record;
mod series;
mod table;
mod trace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "bench", version, about = "Measures Prestage beside what it is to be better than")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a guest straight from a slow store, then through prestaged: unlearned, learned, warm
    Boots(boots::Options),
    /// Replay recorded traces through the predictor and every peer: hits, precision, latency, cost
    Predict(predict::Options),
    /// Measure many machines once a second, and what that costs
    Collect(collect::Options),
    /// Read and write disks over vhost-user-blk and NBD, beside other block servers: requests, latency, processor time
    Datapath(datapath::Options),
    /// Forecast demand of real machines, beside other forecasters: pinball loss, coverage, over-provision
    Forecast(forecast::Options),
    /// Swap a guest out and let it touch its memory again: time and faults for the kernel alone and beside it
    Memory(memory::Options),
    /// Fill a history with recorded traces, and time what is asked of it
    History(history::Options),
    /// Start clones of a template on a slow store, read ahead in several ways: time to the first answer
    Template(memory::template::Options),
    /// Fill series with recorded samples, and time what is asked of them
    Series(series::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Boots(options) => boots::run(&options),
        Command::Predict(options) => predict::run(&options),
        Command::Collect(options) => collect::run(&options),
        Command::Datapath(options) => datapath::run(&options),
        Command::Forecast(options) => forecast::run(&options),
        Command::Memory(options) => memory::run(&options),
        Command::History(options) => history::run(&options),
        Command::Template(options) => memory::template::run(&options),
        Command::Series(options) => series::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // what fails because Ctrl-C takes its ground away is no news
            prestage_tests::clean::yield_to_signal();
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
