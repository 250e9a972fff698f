//! The host agent: serves virtual machines' disks from the cache, learns what they read and has it there next time.

use clap::Parser;
use prestage_agent::config::{Config, DEFAULT_PATH};
use prestage_agent::daemon::{self, Options};
use prestage_agent::privilege;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt, reload};

/// Serves VM disks from a RAM and SSD cache in front of slow storage, and prefetches what guests read next.
#[derive(Parser, Debug)]
#[command(name = "prestaged", version)]
struct Arguments {
    /// Configuration file; FILE.d/*.toml are read after it
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Sets a key over the files, such as cache.ram_size="2GiB"; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Checks the configuration and what it names (secrets, certificates, groups, sizes, stores), says what this host can confine
    /// prestaged with, and ends; `prestagectl config check` says the same
    #[arg(long)]
    check: bool,
    /// Takes over from the prestaged that runs: its guests see no more than a pause. SIGUSR2 has a running one start its
    /// successor by itself
    #[arg(long)]
    take_over: bool,
    /// Serves as the broker of the prestaged that starts it, which becomes this user
    #[arg(long, hide = true, value_name = "NUMBER")]
    broker: Option<u32>,
    /// Confines itself as the daemon does, tries what is forbidden, and ends with 10 where it is
    #[arg(long, hide = true, value_name = "ACT", num_args = 1.., allow_hyphen_values = true)]
    self_test: Option<Vec<String>>,
}

/// Exit code of an act that was refused.
const REFUSED: u8 = 10;

/// Shows whether the confinement holds; see `prestage_integration::privilege::probe`.
fn self_test(act: &[String]) -> ExitCode {
    match prestage_integration::privilege::probe::attempt(act) {
        Ok(()) => {
            println!("{}: done", act.join(" "));
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{}: {error}", act.join(" "));
            ExitCode::from(REFUSED)
        }
    }
}

/// What a start would run into.
fn check(arguments: &Arguments) -> ExitCode {
    match daemon::check_file(&arguments.config, &arguments.overrides) {
        Ok(checked) => {
            checked.notes.iter().for_each(|note| eprintln!("{note}"));
            checked.sandbox.iter().for_each(|line| println!("{line}"));
            println!("{}: ok", arguments.config.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    // The broker is asked by this name, and reads the same wherever it is started.
    if let Ok(path) = std::path::absolute(&arguments.config) {
        arguments.config = path;
    }
    if arguments.check {
        return check(&arguments);
    }
    let config = match Config::load(&arguments.config, &arguments.overrides) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    // Checked with the configuration.
    let filter = EnvFilter::try_new(&config.daemon.log).unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, handle) = reload::Layer::new(filter);
    // The journal writes times of its own.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_target(false);
    let layer = if journal { layer.without_time().boxed() } else { layer.boxed() };
    tracing_subscriber::registry().with(filter).with(layer).init();
    let set_log = Box::new(move |text: &str| {
        if let Ok(filter) = EnvFilter::try_new(text) {
            // Fails only when the subscriber is gone, which is never before the process.
            let _ = handle.reload(filter);
        }
    });
    if let Some(user) = arguments.broker {
        return match privilege::serve_broker(arguments.config, arguments.overrides, user) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("prestaged's broker: {error}");
                ExitCode::FAILURE
            }
        };
    }
    // First of all: what is not given up while there is one thread each thread would have to give up.
    let sandbox = match privilege::enter(&arguments.config, &arguments.overrides, &config, arguments.take_over) {
        Ok(sandbox) => Arc::new(sandbox),
        Err(error) => {
            eprintln!("prestaged: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Some(act) = &arguments.self_test {
        sandbox.seal();
        return self_test(act);
    }
    // The control plane is light; the data path has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let options =
        Options { config: arguments.config, overrides: arguments.overrides, take_over: arguments.take_over, sandbox };
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(daemon::run(options, config, set_log));
            // Threads that still wait for a store or a socket that does not answer end with the process.
            runtime.shutdown_timeout(Duration::from_secs(2));
            result
        }
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("prestaged: {error}");
            ExitCode::from(1)
        }
    }
}
