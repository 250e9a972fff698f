//! Measures Prestage with real guests, beside what it is to be better than.
//!
//! - [`boots`]: `bench boots`, a guest booted straight, unlearned, learned and warm
//! - [`record`]: the figures of a boot and the file they are written to
//! - [`host`]: the machine they were measured on
//! - [`progress`]: what is shown meanwhile
//! - [`table`]: what is printed at the end

mod boots;
mod host;
mod progress;
mod record;
mod table;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "bench", about = "Measures Prestage with real guests")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a guest straight from a slow store, then through prestaged: unlearned, learned, warm
    Boots(boots::Options),
}

fn main() -> ExitCode {
    let Command::Boots(options) = Cli::parse().command;
    match boots::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // what fails because Ctrl-C takes its ground away is no news
            prestage_tests::clean::yield_to_signal();
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
