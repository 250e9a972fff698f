//! A store that takes so many requests a second and no more: qemu-nbd behind QEMU's throttle. Beyond that requests wait their
//! turn, in order, so that a client which keeps many under way has all of them wait for milliseconds. Unlike nbdkit
//! 1.32 it puts up with clients that die with requests under way.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::paths::Scratch;
use crate::process::{Process, tail, wait_until};
use crate::store::Store;

/// A running qemu-nbd on a unix socket, which writes to its file.
#[derive(Debug)]
pub struct Throttled {
    socket: PathBuf,
    process: Process,
}

impl Throttled {
    /// Serves `disk` (raw, its path without commas) from a socket in `scratch`; `name` tells several apart.
    pub fn start(scratch: &Scratch, name: &str, disk: &Path, requests_per_second: u32) -> Result<Self> {
        let [socket, log] = ["sock", "log"].map(|ending| scratch.join(format!("{name}.{ending}")));
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--shared=0", "--cache=writeback", "--socket"]).arg(&socket);
        command.args(["--object", &format!("throttle-group,id=slow,x-iops-total={requests_per_second}")]);
        command
            .arg("--image-opts")
            .arg(format!("driver=throttle,throttle-group=slow,file.driver=file,file.filename={}", disk.display()));
        let process = Process::start("qemu-nbd", &command, &log, Duration::from_secs(5))?;
        wait_until("qemu-nbd's start", Duration::from_secs(20), || {
            process.check_alive()?;
            Ok(socket.exists())
        })
        .with_context(|| tail(&log, 10))?;
        Ok(Self { socket, process })
    }

    #[must_use]
    pub fn store(&self) -> Store {
        Store::NbdUnix { socket: self.socket.clone(), export: String::new() }
    }

    /// Has it answer nothing until it is told to go on.
    pub fn hang(&self) -> Result<()> {
        self.process.signal(Signal::SIGSTOP)
    }

    /// Ends a [`hang`](Self::hang).
    pub fn go_on(&self) -> Result<()> {
        self.process.signal(Signal::SIGCONT)
    }
}
