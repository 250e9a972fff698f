//! prestagectl, the admin command line of prestaged. All of it is in `prestage_agent::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    prestage_agent::cli::main(std::env::args_os())
}
