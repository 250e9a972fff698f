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
use crate::handover::Held;
use crate::privilege::channel;
use crate::privilege::images::{bounds, spawn};
use crate::privilege::protocol::{Chain, Encryption, Image, Program, Refusal};
use crate::privilege::rules::Rules;

/// At once, at most: memory helpers, one for all machines and one for each first clone, and a `qemu-storage-daemon` for each image
/// that needs one.
const MAX_CHILDREN: usize = 4096;
/// Where programs are found that are named without a folder.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// At once, at most.
const MAX_SUCCESSORS: usize = 8;
/// For who is to take over: the number of the user to become, in its environment, which a version that does not know it leaves
/// alone.
pub const USER: &str = "PRESTAGE_USER";
/// The program that runs, whatever has become of its file.
const OURSELVES: &str = "/proc/self/exe";

#[derive(Debug, Default)]
pub(super) struct Children {
    running: HashMap<u64, Running>,
    last: u64,
    successors: Arc<Mutex<HashMap<u32, Held>>>,
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
        let key = chain.images.iter().any(encrypted).then(|| open::key(rules, &chain.disk)).transpose()?;
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
        if self.successors.lock().len() >= MAX_SUCCESSORS {
            return Err(Refusal {
                errno: libc::EAGAIN,
                reason: format!("{MAX_SUCCESSORS} are about to take over already"),
            });
        }
        let (installed, words) = &rules.successor;
        let program = if anew { Path::new(OURSELVES) } else { installed };
        let failed = |error: io::Error| Refusal::os(&format!("start {}", program.display()), &error);
        let user = rules.user.to_string();
        let child = Command::new(program).args(words).env(USER, user).stdin(Stdio::null()).spawn().map_err(failed)?;
        let pid = child.id();
        // It has its number until it is waited for.
        match i32::try_from(pid).map_err(io::Error::other).and_then(Held::new) {
            Ok(held) => drop(self.successors.lock().insert(pid, held)),
            Err(error) => {
                tracing::warn!(pid, %error, "the prestaged that is to take over cannot be ended if it must be")
            }
        }
        let successors = Arc::clone(&self.successors);
        let wait = move || {
            await_end(child);
            successors.lock().remove(&pid);
        };
        thread::Builder::new().name("successor".into()).spawn(wait).map_err(failed)?;
        Ok(pid)
    }

    /// Kills one that was to take over and failed with everything in its hands: no two may serve one disk. Whom somebody else
    /// has started is not the broker's to end, whatever the daemon says of it.
    pub(super) fn end_successor(&self, pid: u32) -> Result<(), Refusal> {
        match self.successors.lock().get(&pid) {
            Some(held) => {
                held.kill();
                Ok(())
            }
            None => Err(Refusal::rule(format!(
                "process {pid} was not started by the broker to take over, or has ended; if it is a prestaged that was started \
                 by hand, kill it"
            ))),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever socket of its own it may have had somebody come to.
    #[test]
    fn nobody_is_ended_whom_the_broker_has_not_started_to_take_over() {
        let children = Children::default();
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        for pid in [stranger.id(), std::process::id(), 1, 0, u32::MAX] {
            let said = children.end_successor(pid).unwrap_err();
            assert!(said.errno == 0 && said.reason.contains("was not started by the broker"), "{said:?}");
        }
        assert!(matches!(stranger.try_wait(), Ok(None)), "it was ended");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }

    #[test]
    fn who_was_started_to_take_over_is_ended_as_long_as_it_runs() {
        let children = Children::default();
        let rules = Rules { successor: ("/bin/sleep".into(), vec!["1000".into()]), user: 7, ..Rules::default() };
        let pids: Vec<_> = (0..MAX_SUCCESSORS).map(|_| children.start_successor(false, &rules).unwrap()).collect();
        let said = children.start_successor(false, &rules).unwrap_err();
        assert_eq!(said.errno, libc::EAGAIN);
        // It is there as soon as the program runs, which the end of `spawn` says.
        let told = std::fs::read(format!("/proc/{}/environ", pids[0])).unwrap();
        assert!(told.split(|byte| *byte == 0).any(|word| word == b"PRESTAGE_USER=7"));
        for pid in pids {
            children.end_successor(pid).unwrap();
            while children.successors.lock().contains_key(&pid) {
                thread::yield_now();
            }
            assert!(children.end_successor(pid).is_err(), "its number may be another's by now");
        }
        let last = children.start_successor(false, &rules).unwrap();
        children.end_successor(last).unwrap();
    }
}
