//! The process that may look into hypervisors, started by prestaged. All of it is in `prestage_integration::memory::helper`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Watches and moves guests' memory on behalf of prestaged, which starts it; of no use by itself.
#[derive(Parser, Debug)]
#[command(name = "prestage-memory", version)]
struct Arguments {
    /// A program that may be looked into beside QEMU
    #[arg(long = "allow", value_name = "PATH")]
    also: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match prestage_integration::memory::helper::server::run(Arguments::parse().also) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prestage-memory: {error}");
            ExitCode::FAILURE
        }
    }
}
