//! The helper's process: a child of this one, or of the broker, which may start what this process may not.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

use super::protocol::MAX_MESSAGE;
use crate::privilege;
use crate::privilege::protocol::Program;

/// A helper's process. Ends with this.
#[derive(Debug)]
pub(super) enum Running {
    Ours(Child),
    Brokers(privilege::Child),
}

impl Running {
    /// Starts it, and returns our end of its socket.
    pub(super) fn ours(program: &Path, also: &[&Path]) -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let _ = setsockopt(&theirs, sockopt::SndBuf, &(4 * MAX_MESSAGE));
        let mut command = Command::new(program);
        for path in also {
            command.arg("--allow").arg(path);
        }
        let child = command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .process_group(0) // Ctrl-C is for the daemon, which ends this when it is done
            .spawn()?;
        Ok((Self::Ours(child), ours))
    }

    pub(super) fn by_broker(broker: &privilege::Broker) -> io::Result<(Self, OwnedFd)> {
        broker.run(Program::Memory).map(|(child, socket)| (Self::Brokers(child), socket))
    }

    pub(super) fn kill(&mut self) {
        match self {
            Self::Ours(child) => drop(child.kill()),
            Self::Brokers(child) => child.kill(),
        }
    }

    /// How it ended, if that is known.
    pub(super) fn status(&mut self) -> Option<ExitStatus> {
        match self {
            Self::Ours(child) => child.try_wait().ok().flatten(),
            Self::Brokers(_) => None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // it holds nothing that outlives it
        self.kill();
        if let Self::Ours(child) = self {
            let _ = child.wait();
        }
    }
}
