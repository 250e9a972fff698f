//! Programs that the broker starts for the daemon.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::privilege::channel;
use crate::privilege::protocol::{Program, Refusal};
use crate::privilege::rules::Rules;

/// At once, at most: one for all machines, and one for each first clone.
const MAX_CHILDREN: usize = 64;
/// Where programs are found that are named without a folder.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, Default)]
pub(super) struct Children {
    running: HashMap<u64, Child>,
    last: u64,
}

impl Children {
    /// Starts a program with a socket as standard input. Returns its number, its process and our end.
    pub(super) fn start(&mut self, program: Program, rules: &Rules) -> Result<(u64, u32, OwnedFd), Refusal> {
        if self.running.len() >= MAX_CHILDREN {
            return Err(Refusal { errno: libc::EAGAIN, reason: format!("{MAX_CHILDREN} programs run already") });
        }
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
        self.last += 1;
        let pid = child.id();
        self.running.insert(self.last, child);
        Ok((self.last, pid, ours))
    }

    /// Forgets those that have ended.
    pub(super) fn reap(&mut self) {
        self.running.retain(|_, child| matches!(child.try_wait(), Ok(None)));
    }

    /// Kills one; nothing happens if it has ended.
    pub(super) fn end(&mut self, child: u64) {
        if let Some(running) = self.running.get_mut(&child) {
            let _ = running.kill();
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in self.running.values_mut() {
            let _ = child.kill();
        }
    }
}
