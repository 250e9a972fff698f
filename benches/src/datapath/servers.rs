//! The servers, each on the servers' processor, with sockets in a folder of ours.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use prestage_tests::daemon::{Counters, DaemonOptions, Prestaged};
use prestage_tests::paths::{Scratch, program};
use prestage_tests::process::{Process, run, tail, wait_until};
use serde::Serialize;

use super::cpu::Places;
use super::load::Device;
use super::{nbd, vhost};

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Who {
    /// This project's daemon over vhost-user-blk
    Prestaged,
    /// qemu-storage-daemon as its manual starts it
    Qsd,
    /// qemu-storage-daemon with a polling I/O thread and io_uring
    QsdTuned,
    /// A server that answers at once and has no data: the client's own ceiling
    Ceiling,
    /// This project's daemon over NBD
    PrestagedNbd,
    /// nbdkit's file plugin
    Nbdkit,
    /// qemu-nbd
    QemuNbd,
    /// The ceiling of the NBD client
    CeilingNbd,
}

impl Who {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prestaged => "prestaged",
            Self::Qsd => "qemu-storage-daemon",
            Self::QsdTuned => "qemu-storage-daemon, tuned",
            Self::Ceiling | Self::CeilingNbd => "(client alone)",
            Self::PrestagedNbd => "prestaged",
            Self::Nbdkit => "nbdkit",
            Self::QemuNbd => "qemu-nbd",
        }
    }

    pub(super) fn is_vhost(self) -> bool {
        matches!(self, Self::Prestaged | Self::Qsd | Self::QsdTuned | Self::Ceiling)
    }

    /// Whether it is this project's daemon.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Prestaged | Self::PrestagedNbd)
    }

    /// Whether this build has it.
    pub(super) fn is_there(self) -> Result<bool> {
        if self != Self::PrestagedNbd {
            return Ok(true);
        }
        let mut command = Command::new(program("prestagectl")?);
        Ok(run(command.args(["disk", "add", "--help"]))?.contains("--nbd"))
    }

    /// Whether what it answers is compared.
    pub(super) fn has_data(self) -> bool {
        !matches!(self, Self::Ceiling | Self::CeilingNbd)
    }
}

/// How the disk is served.
#[derive(Debug, Clone, Copy)]
pub(super) struct Serving {
    pub(super) read_only: bool,
    /// Past the page cache; of this project's daemon, past its RAM tier.
    pub(super) direct: bool,
    /// Of the disk.
    pub(super) size_bytes: u64,
}

/// A running server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) who: Who,
    socket: PathBuf,
    read_only: bool,
    size_bytes: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Daemon(Box<Prestaged>),
    Other(Process),
}

/// Name of the disk.
const DISK: &str = "disk";
/// A model is trained once a day, at idle priority and on any core. With all threads on one core, a minute after the start, it
/// would be most of what is measured.
pub(super) const NO_TRAINING: &str = "[model]\ntraining = false\n";
/// The smallest RAM tier: misses are measured with a disk many times as large.
const LEAST_RAM: &str = "16MiB";

impl Server {
    /// Starts a server of `disk`.
    pub(super) fn start(who: Who, disk: &Path, serving: Serving, scratch: &Scratch, places: Places) -> Result<Self> {
        let Serving { read_only, direct, size_bytes } = serving;
        if who.is_ours() {
            return Self::under(who, disk, serving, places.on_server().to_vec());
        }
        let name = format!("{who:?}").to_lowercase();
        let (socket, log) = (scratch.join(format!("{name}.sock")), scratch.join(format!("{name}.log")));
        let [taskset, words @ ..] = &places.on_server();
        let mut command = Command::new(taskset);
        command.args(words);
        let on = |yes: bool| if yes { "on" } else { "off" };
        match who {
            Who::Prestaged | Who::PrestagedNbd => bail!("prestaged is started in another way"),
            Who::Qsd | Who::QsdTuned => {
                let (aio, thread) = if who == Who::Qsd { ("threads", "") } else { ("io_uring", ",iothread=t") };
                command.arg("qemu-storage-daemon");
                if who == Who::QsdTuned {
                    command.args(["--object", "iothread,id=t"]);
                }
                command.arg("--blockdev").arg(format!(
                    "driver=file,node-name=f,filename={},aio={aio},locking=off,read-only={},cache.direct={}",
                    disk.display(),
                    on(read_only),
                    on(direct)
                ));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable={}{thread}",
                    socket.display(),
                    on(!read_only)
                ));
            }
            Who::Nbdkit => {
                command.args(["nbdkit", "--foreground", "--unix"]).arg(&socket);
                command.args(read_only.then_some("--readonly")).arg("file").arg(disk);
            }
            Who::QemuNbd => {
                command.args(["qemu-nbd", "--persistent", "--format=raw", "--socket"]).arg(&socket);
                command.args(read_only.then_some("--read-only")).arg(disk);
            }
            Who::Ceiling | Who::CeilingNbd => {
                command.arg(std::env::current_exe()?).args(["datapath", "--answer-only"]).arg(&socket);
                command.arg("--size-mib").arg((size_bytes >> 20).to_string());
            }
        }
        let process = Process::start(who.name(), &command, &log, Duration::from_secs(5))?;
        let socket = if who == Who::CeilingNbd { super::ceiling::nbd_socket(&socket) } else { socket };
        wait_until(&format!("the start of {}", who.name()), Duration::from_secs(20), || {
            process.check_alive()?;
            Ok(socket.exists())
        })
        .with_context(|| tail(&log, 10))?;
        Ok(Self { who, socket, read_only, size_bytes, kind: Kind::Other(process) })
    }

    /// Starts this project's daemon behind other words.
    pub(super) fn under(who: Who, disk: &Path, serving: Serving, under: Vec<String>) -> Result<Self> {
        let Serving { read_only, direct, size_bytes } = serving;
        let ram = if direct { LEAST_RAM.to_owned() } else { format!("{}MiB", (size_bytes >> 20) * 2) };
        let daemon = Prestaged::start(&DaemonOptions {
            ram_size: ram,
            // Blocks that were read once would be found there.
            ssd_size: String::new(),
            under,
            more: format!(
                "{NO_TRAINING}[[disk]]\nname = \"{DISK}\"\nstore = \"{}\"\nread_only = {read_only}\n{}",
                disk.display(),
                if who == Who::PrestagedNbd { "nbd = true\n" } else { "" }
            ),
            ..DaemonOptions::default()
        })?;
        let mut socket = daemon.disk_socket(DISK)?;
        if who == Who::PrestagedNbd {
            // `run_dir`/vm/NAME.sock, and `run_dir`/nbd/NAME.sock
            let run = socket.parent().and_then(Path::parent).context("the disk's socket is in no folder")?;
            socket = run.join("nbd").join(format!("{DISK}.sock"));
        }
        Ok(Self { who, socket, read_only, size_bytes, kind: Kind::Daemon(Box::new(daemon)) })
    }

    /// Reads of this project's daemon that its learner never saw.
    pub(super) fn unseen(&self) -> Result<Option<u64>> {
        let Kind::Daemon(daemon) = &self.kind else { return Ok(None) };
        let stat = daemon.ctl(&["cache", "stat"])?;
        let dropped = stat.pointer("/total/accesses_dropped").and_then(serde_json::Value::as_u64);
        dropped.map(Some).with_context(|| format!("`cache stat` has no `accesses_dropped`: {stat}"))
    }

    pub(super) fn pid(&self) -> Result<i32> {
        match &self.kind {
            Kind::Daemon(daemon) => daemon.pid().context("prestaged does not run"),
            Kind::Other(process) => Ok(process.pid()),
        }
    }

    /// The daemon's counters, of a daemon of this project.
    pub(super) fn counters(&self) -> Result<Option<Counters>> {
        match &self.kind {
            Kind::Daemon(daemon) => daemon.counters().map(Some),
            Kind::Other(_) => Ok(None),
        }
    }

    /// A client with buffers for `depth` requests of `len_bytes`.
    pub(super) fn connect(&self, depth: usize, len_bytes: usize) -> Result<Box<dyn Device>> {
        if !self.who.is_vhost() {
            // The others have one export, the default one.
            let export = if self.who == Who::PrestagedNbd { DISK } else { "" };
            let device = nbd::Nbd::connect(&self.socket, export, depth, len_bytes)?;
            let (size, wanted) = (device.size_bytes, self.size_bytes);
            ensure!(size == wanted, "{} exports {size} bytes in place of {wanted}", self.who.name());
            return Ok(Box::new(device));
        }
        let shape = vhost::Shape { queues: 1, depth, len_bytes, read_only: self.read_only };
        let mut queues = vhost::connect(&self.socket, shape)?;
        ensure!(queues.len() == 1, "one queue was asked for");
        Ok(Box::new(queues.remove(0)))
    }
}
