//! prestagectl: the command line and what it prints.
//!
//! - `args.rs`: commands and options
//! - `render.rs`, `table.rs`: text for people
//! - `status.rs`: `status`; `stat.rs`: `cache stat`; `history.rs`: `history`; `models.rs`: `model`
//! - `replay.rs`, `replay/`: `trace replay`, which needs no daemon
//! - `advise/`: `advise`
//! - `simulate.rs`, `simulate/`: `simulate`, which needs no daemon
//! - `record.rs`: `trace record`
//! - `explain.rs`: `explain`
//! - `demand/`: `vm policy`, `forecast`, `recommend`, `decisions`, `reservation`, `execution`, `event`, `demand`
//! - `tiers.rs`: `cache resize`, `cache drain`, `cache resume`, `disk resize`
//! - `templates.rs`: `vm save-template`, `vm start-from-template`, `template`
//! - `when.rs`: points in time
//! - `forecast.rs`: `forecast`, which needs no daemon
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the daemon cannot be reached. Answers go to standard output, failures to standard error.

mod advise;
mod args;
mod demand;
mod explain;
mod forecast;
mod history;
mod models;
mod record;
mod render;
mod replay;
mod simulate;
mod stat;
mod status;
mod table;
mod templates;
mod tiers;
mod when;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::FromArgMatches;
use prestage_cache::backend::StoreSpec;
use prestage_integration::api::tiers::{ResizeRequest, Resized, Service, ServiceRequest};
use prestage_integration::api::types::{
    AttachRequest, Attached, CacheTiers, Detached, Disk, DiskAdd, DiskList, DiskResize, DiskResized, DropRequest,
    Dropped, Profile, ProfileList, Saved, Status, Vm, VmList, WarmRequest, Warmed,
};
use serde::Serialize;
use serde_json::json;

use args::{
    CacheCommand, Command, ConfigCommand, DiskCommand, ProfileCommand, ResizeArgs, ResumeArgs, ServiceArgs,
    TraceCommand, VmCommand,
};
pub use args::{Cli, DEFAULT_SOCKET};
use stat::StatArgs;

use crate::client::{Client, ClientError, encode};
use crate::config::Config;
use crate::daemon::{Checked, check_file};

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Failed(String),
    /// Options that are right one by one and not together.
    #[error("{0}")]
    Usage(String),
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Unreachable { .. }) => 3,
            Self::Usage(_) => 2,
            _ => 1,
        }
    }

    /// For scripts: the daemon's own problem, or something of the same shape.
    fn json(&self) -> serde_json::Value {
        match self {
            Self::Client(ClientError::Refused(problem)) => json!(problem),
            Self::Client(ClientError::Unreachable { .. }) => {
                json!({ "code": "unreachable", "detail": self.to_string() })
            }
            _ => json!({ "code": "failed", "detail": self.to_string() }),
        }
    }
}

/// The whole program: parses `arguments` (with the program's name first) and prints to the standard streams.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = Cli::as_shown().try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers and go to standard output; a reader that went away is no failure.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("prestagectl: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    let json = cli.json;
    let mut out = io::stdout().lock();
    let result = runtime.block_on(run(cli, &mut out)).and_then(|()| Ok(out.flush()?));
    // Whoever gave up on work that does not end must not wait for it here.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // `prestagectl … | head` has seen what it wanted.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            let text = if json { failure.json().to_string() } else { format!("prestagectl: {failure}") };
            // Standard error may be closed as well; there is no one left to tell.
            let _ = writeln!(io::stderr(), "{text}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn print_json(out: &mut impl Write, value: &impl Serialize) -> Result<(), Failure> {
    serde_json::to_writer_pretty(&mut *out, value).map_err(io::Error::from)?;
    Ok(out.write_all(b"\n")?)
}

fn print_json_line(out: &mut impl Write, value: &impl Serialize) -> Result<(), Failure> {
    serde_json::to_writer(&mut *out, value).map_err(io::Error::from)?;
    Ok(out.write_all(b"\n")?)
}

/// Prints an answer: as it came, or as text.
fn answer<T: Serialize>(
    out: &mut impl Write,
    json: bool,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<(), Failure> {
    if json {
        return print_json(out, value);
    }
    Ok(out.write_all(text(value).as_bytes())?)
}

async fn run(cli: Cli, out: &mut impl Write) -> Result<(), Failure> {
    let client = Client::new(&cli.socket);
    let json = cli.json;
    match cli.command {
        Command::Status => answer(out, json, &client.get::<Status>("/v1/status").await?, status::status),
        Command::Disk(command) => disk(command, &client, json, out).await,
        Command::Vm(command) => vm(command, &client, json, out).await,
        Command::Template(command) => templates::run(command, &client, json, out).await,
        Command::Cache(command) => cache(command, &client, json, out).await,
        Command::Profile(command) => profile(command, &client, json, out).await,
        Command::Trace(TraceCommand::Replay(args)) => replay::run(*args, json, out).await,
        Command::Trace(TraceCommand::Record(args)) => record::run(&client, args, json, out).await,
        Command::Advise(args) => advise::run(&client, args, json, out).await,
        Command::Simulate(args) => simulate::run(args, json, out).await,
        Command::Explain(args) => explain::run(&client, args, json, out).await,
        Command::History(command) => history::run(command, &client, json, out).await,
        Command::Model(command) => models::run(command, &client, json, out).await,
        Command::Forecast(command) => demand::forecast(command, &client, json, out).await,
        Command::Recommend { vm } => demand::recommend(vm, &client, json, out).await,
        Command::Decisions(args) => demand::decisions(args, &client, json, out).await,
        Command::Reservation(command) => demand::reservation(command, &client, json, out).await,
        Command::Execution(command) => demand::execution(command, &client, json, out).await,
        Command::Event(command) => demand::event(command, &client, json, out).await,
        Command::Demand => demand::demand(&client, json, out).await,
        Command::Config(ConfigCommand::Check { file }) => config_check(&file, json, out),
        Command::Config(ConfigCommand::Default) if json => print_json(out, &Config::default_json()),
        Command::Config(ConfigCommand::Default) => Ok(out.write_all(Config::default_toml().as_bytes())?),
        Command::Version => version(&client, json, out).await,
    }
}

async fn disk(command: DiskCommand, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    match command {
        DiskCommand::Add(args) => {
            let request = DiskAdd {
                name: args.name,
                // Parsed here, so that a relative path is below the operator's folder and not the daemon's.
                store: match args.store {
                    StoreSpec::File(path) => absolute(&path)?,
                    other @ (StoreSpec::Nbd { .. } | StoreSpec::Qcow2 { .. }) => other.to_string(),
                },
                read_only: args.read_only,
                socket: args.export_socket.as_deref().map(absolute).transpose()?,
                nbd: args.nbd,
            };
            let disk: Disk = client.post("/v1/disks", &request).await?;
            answer(out, json, &disk, |disk| {
                let (name, store, socket) = (&disk.name, table::printable(&disk.store), table::printable(&disk.socket));
                let nbd = disk.nbd.as_ref().map(|nbd| format!(", and over NBD as {}", table::printable(&nbd.uri)));
                format!("disk {name} serves {store} on {socket}{}\n", nbd.unwrap_or_default())
            })
        }
        DiskCommand::List => answer(out, json, &client.get::<DiskList>("/v1/disks").await?, render::disks),
        DiskCommand::Show { name } => {
            answer(out, json, &client.get::<Disk>(&format!("/v1/disks/{}", encode(&name))).await?, render::disk)
        }
        DiskCommand::Resize { name, size } => {
            let request = DiskResize { size_bytes: size };
            let reply: DiskResized = client.post(&format!("/v1/disks/{}/resize", encode(&name)), &request).await?;
            answer(out, json, &reply, tiers::disk_resized)
        }
        DiskCommand::Remove { name, force } => {
            let query = if force { "?force=true" } else { "" };
            client.delete(&format!("/v1/disks/{}{query}", encode(&name))).await?;
            answer(out, json, &json!({ "removed": name }), |_| {
                format!("disk {name} is no longer served; its data stays where it is\n")
            })
        }
    }
}

/// The daemon runs in another folder.
fn absolute(path: &Path) -> Result<String, Failure> {
    let path = std::path::absolute(path)?;
    path.into_os_string().into_string().map_err(|path| Failure::Failed(format!("path {} is not UTF-8", path.display())))
}

async fn vm(command: VmCommand, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let path = |vm: &str, target: &str, verb: &str| format!("/v1/vms/{}/disks/{}/{verb}", encode(vm), encode(target));
    match command {
        VmCommand::List => answer(out, json, &client.get::<VmList>("/v1/vms").await?, render::vms),
        VmCommand::Show { vm } => {
            answer(out, json, &client.get::<Vm>(&format!("/v1/vms/{}", encode(&vm))).await?, render::vm)
        }
        VmCommand::Attach { vm, target, enable_shared_memory, queues, name } => {
            let request = AttachRequest { enable_shared_memory, queues, name };
            let reply: Attached = client.post(&path(&vm, &target, "attach"), &request).await?;
            answer(out, json, &reply, render::attached)
        }
        VmCommand::Detach { vm, target } => {
            let reply: Detached = client.post(&path(&vm, &target, "detach"), &json!({})).await?;
            answer(out, json, &reply, render::detached)
        }
        VmCommand::SaveTemplate(args) => templates::save(args, client, json, out).await,
        VmCommand::StartFromTemplate(args) => templates::start(args, client, json, out).await,
        VmCommand::Activity(args) => demand::activity(args, client, json, out).await,
        VmCommand::Policy(args) => demand::policy(*args, client, json, out).await,
    }
}

async fn cache(command: CacheCommand, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    match command {
        CacheCommand::Tiers => answer(out, json, &client.get::<CacheTiers>("/v1/cache").await?, render::tiers),
        CacheCommand::Stat { interval, count, disk } => {
            let terminal_lines =
                io::stdout().is_terminal().then(|| terminal_size::terminal_size().map_or(0, |(_, height)| height.0));
            stat::run(client, &StatArgs { interval, count, disk, json, terminal_lines }, out).await
        }
        CacheCommand::Warm { disk, ranges, profile } => {
            let ranges = if ranges.is_empty() { None } else { Some(ranges) };
            let request = WarmRequest { disk, ranges, profile };
            let reply: Warmed = client.post("/v1/cache/warm", &request).await?;
            answer(out, json, &reply, |reply| render::warmed(&request.disk, reply))
        }
        CacheCommand::Resize(ResizeArgs { ram, ssd, force }) => {
            let request = ResizeRequest { ram_bytes: ram, ssd_bytes: ssd, force };
            answer(out, json, &client.post::<Resized>("/v1/cache/resize", &request).await?, tiers::resized)
        }
        CacheCommand::Drain(ServiceArgs { ram, ssd }) => {
            let request = ServiceRequest { ram, ssd, force: false };
            answer(out, json, &client.post::<Service>("/v1/cache/drain", &request).await?, tiers::service)
        }
        CacheCommand::Resume(ResumeArgs { which: ServiceArgs { ram, ssd }, force }) => {
            let request = ServiceRequest { ram, ssd, force };
            answer(out, json, &client.post::<Service>("/v1/cache/resume", &request).await?, tiers::service)
        }
        CacheCommand::Drop { tier, disk } => {
            let reply: Dropped = client.post("/v1/cache/drop", &DropRequest { tier: tier.into(), disk }).await?;
            answer(out, json, &reply, render::dropped)
        }
    }
}

async fn profile(command: ProfileCommand, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let now = render::now_unix_ms();
    match command {
        ProfileCommand::List => {
            answer(out, json, &client.get::<ProfileList>("/v1/profiles").await?, |list| render::profiles(list, now))
        }
        ProfileCommand::Show { id } => {
            let profile: Profile = client.get(&format!("/v1/profiles/{}", encode(&id))).await?;
            answer(out, json, &profile, |profile| render::profile(profile, now))
        }
        ProfileCommand::Remove { id } => {
            client.delete(&format!("/v1/profiles/{}", encode(&id))).await?;
            answer(out, json, &json!({ "removed": id }), |_| {
                format!("profile {} is forgotten\n", table::printable(&id))
            })
        }
        ProfileCommand::Save => {
            answer(out, json, &client.post::<Saved>("/v1/profiles/save", &json!({})).await?, render::saved)
        }
    }
}

fn config_check(file: &Path, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    match check_file(file, &[]) {
        Ok(Checked { files, notes, sandbox }) => {
            let value = json!({ "ok": true, "files": files, "notes": notes, "sandbox": sandbox });
            answer(out, json, &value, |_| {
                let more = match files.len() {
                    0 | 1 => String::new(),
                    all => format!(" with {}", render::count(all as u64 - 1, "drop-in file", "drop-in files")),
                };
                let said = notes.iter().chain(&sandbox).map(|line| format!("{}\n", table::printable(line)));
                said.collect::<String>() + &format!("{}{more}: ok\n", file.display())
            })
        }
        Err(error) if json => {
            let problems: Vec<serde_json::Value> = error
                .problems
                .iter()
                .map(|problem| json!({ "file": problem.file, "line": problem.line, "key": problem.key, "message": problem.message }))
                .collect();
            print_json(out, &json!({ "ok": false, "problems": problems }))?;
            let mistakes = render::count(error.problems.len() as u64, "mistake", "mistakes");
            Err(Failure::Failed(format!("{} has {mistakes}", file.display())))
        }
        Err(error) => Err(Failure::Failed(error.to_string())),
    }
}

/// Never fails for want of a daemon: it is what one asks first when nothing works.
async fn version(client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let daemon = client.get::<Status>("/v1/status").await.map(|status| status.version);
    let value = json!({ "prestagectl": own, "prestaged": daemon.as_ref().ok() });
    answer(out, json, &value, |_| match daemon {
        Ok(version) => format!("prestagectl {own}\nprestaged {version}\n"),
        Err(error) => format!("prestagectl {own}\nprestaged unknown: {error}\n"),
    })
}
