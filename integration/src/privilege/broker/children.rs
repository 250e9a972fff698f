//! Programs that the broker starts for the daemon.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::open;
use crate::privilege::channel;
use crate::privilege::images::{bounds, open_key, spawn};
use crate::privilege::protocol::{Chain, Encryption, Image, Program, Refusal};
use crate::privilege::rules::Rules;

/// At once, at most: memory helpers, one for all machines and one for each first clone, and a `qemu-storage-daemon` for each image
/// that needs one.
const MAX_CHILDREN: usize = 4096;
/// Where programs are found that are named without a folder.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// At once, at most.
const MAX_SUCCESSORS: usize = 8;
/// The program that runs, whatever has become of its file.
const OURSELVES: &str = "/proc/self/exe";

#[derive(Debug, Default)]
pub(super) struct Children {
    running: HashMap<u64, Running>,
    last: u64,
    /// One holder for each that runs, beside this.
    successors: Arc<()>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// How it is ended when the daemon has gone.
    last_word: Signal,
}

impl Children {
    /// Starts a program with a socket as standard input. Returns its number, its process and our end.
    pub(super) fn start(&mut self, program: Program, rules: &Rules) -> Result<(u64, u32, OwnedFd), Refusal> {
        self.has_room()?;
        let path = match program {
            Program::Memory => &rules.helper,
        };
        let failed = |error: io::Error| Refusal::os(&format!("start {}", path.display()), &error);
        let (ours, theirs) = channel::pair().map_err(failed)?;
        let child = Command::new(path)
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let (number, pid) = self.add(child, Signal::SIGKILL);
        Ok((number, pid, ours))
    }

    /// Starts a `qemu-storage-daemon` that listens on the socket. Returns its number, its process and its standard error.
    pub(super) fn start_images(
        children: &Mutex<Self>,
        chain: &Chain,
        listener: &OwnedFd,
        rules: &Rules,
    ) -> Result<(u64, u32, OwnedFd), Refusal> {
        children.lock().has_room()?;
        let handles = open::images(rules, chain)?;
        let encrypted =
            |image: &Image| matches!(image, Image::Qcow2 { encryption: Some(Encryption::Aes | Encryption::Luks), .. });
        let key = chain.images.iter().any(encrypted).then(|| open_key(&rules.key(&chain.disk)?)).transpose()?;
        let failed = |error: io::Error| Refusal::os("start qemu-storage-daemon", &error);
        let bounds = bounds(chain, &handles)?;
        let mut child = spawn(chain, &handles, listener, key, Some(bounds), PATH).map_err(failed)?;
        let errors = child.stderr.take().ok_or_else(|| Refusal::rule("no standard error"));
        let (number, pid) = children.lock().add(child, Signal::SIGTERM);
        Ok((number, pid, errors?.into()))
    }

    /// Starts another prestaged, which lives on when this process has ended. Returns its process.
    pub(super) fn start_successor(&self, anew: bool, rules: &Rules) -> Result<u32, Refusal> {
        // Each that is to take over while another does is told that it is too late, and ends.
        if Arc::strong_count(&self.successors) > MAX_SUCCESSORS {
            return Err(Refusal {
                errno: libc::EAGAIN,
                reason: format!("{MAX_SUCCESSORS} are about to take over already"),
            });
        }
        let (installed, words) = &rules.successor;
        let program = if anew { Path::new(OURSELVES) } else { installed };
        let failed = |error: io::Error| Refusal::os(&format!("start {}", program.display()), &error);
        let child = Command::new(program).args(words).stdin(Stdio::null()).spawn().map_err(failed)?;
        let pid = child.id();
        let counted = Arc::clone(&self.successors);
        let wait = move || {
            await_end(child);
            drop(counted);
        };
        thread::Builder::new().name("successor".into()).spawn(wait).map_err(failed)?;
        Ok(pid)
    }

    fn has_room(&self) -> Result<(), Refusal> {
        match self.running.len() < MAX_CHILDREN {
            true => Ok(()),
            false => Err(Refusal { errno: libc::EAGAIN, reason: format!("{MAX_CHILDREN} programs run already") }),
        }
    }

    fn add(&mut self, child: Child, last_word: Signal) -> (u64, u32) {
        self.last += 1;
        let pid = child.id();
        self.running.insert(self.last, Running { child, last_word });
        (self.last, pid)
    }

    /// Forgets those that have ended.
    pub(super) fn reap(&mut self) {
        self.running.retain(|_, running| matches!(running.child.try_wait(), Ok(None)));
    }

    /// Ends one; nothing happens if it has ended.
    pub(super) fn end(&mut self, child: u64, gently: bool) {
        if let Some(running) = self.running.get_mut(&child) {
            running.tell(if gently { Signal::SIGTERM } else { Signal::SIGKILL });
        }
    }
}

impl Running {
    fn tell(&mut self, signal: Signal) {
        // One that was not waited for keeps its number.
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), i32::try_from(self.child.id())) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
}

/// A child that has ended must be collected, and its failure told.
fn await_end(mut child: Child) {
    match child.wait() {
        Ok(status) if !status.success() => tracing::warn!(%status, "the prestaged that was to take over ended"),
        _ => {}
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for running in self.running.values_mut() {
            running.tell(running.last_word);
        }
    }
}
