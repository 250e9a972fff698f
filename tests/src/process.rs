//! Child processes that end with us.
//!
//! Each runs in a process group of its own, so that a terminal's Ctrl-C reaches only us and they end in our order, and has
//! the parent-death signal set by `setpriv`, so that even SIGKILL on us ends them. That signal fires when the *thread*
//! that started the child ends (prctl(2), PR_SET_PDEATHSIG), hence one thread that starts all of them and never ends.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::clean::{self, Guard};

type Job = (Command, Sender<std::io::Result<Child>>);

/// Starts `command` in the thread that never ends.
fn spawn(command: Command) -> Result<Child> {
    static STARTER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, reply) in jobs {
                // a caller that has gone away has no use for the child either; it ends with us
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let program = command.get_program().to_string_lossy().into_owned();
    let (reply, answer) = mpsc::channel();
    starter
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_| anyhow!("the thread that starts processes has ended"))?;
    answer
        .recv()
        .context("the thread that starts processes has ended")?
        .with_context(|| format!("cannot start {program}; is it installed? (scripts/setup.sh)"))
}

#[derive(Debug, Default)]
struct Life {
    status: Mutex<Option<ExitStatus>>,
    ended: Condvar,
}

impl Life {
    fn status(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Signals the process unless it has been reaped: its number may belong to another by then.
    fn signal(&self, pid: Pid, signal: Signal) -> Result<()> {
        let status = self.status();
        if status.is_none() {
            kill(pid, signal).with_context(|| format!("cannot send {signal} to process {pid}"))?;
        }
        Ok(())
    }

    fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        let mut status = self.status();
        while status.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            status = self.ended.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *status
    }

    fn end(&self, pid: Pid, grace: Duration) {
        let _ = self.signal(pid, Signal::SIGTERM);
        if self.wait(grace).is_none() {
            let _ = self.signal(pid, Signal::SIGKILL);
            self.wait(Duration::from_secs(10));
        }
    }
}

/// A running child process; ends when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    life: Arc<Life>,
    /// Standard input of the child, when it was asked for.
    pub stdin: Option<std::process::ChildStdin>,
    _guard: Guard,
}

impl Process {
    /// Starts `command` with its output appended to `log`. It is asked to end by SIGTERM and killed `grace` later.
    pub fn start(name: &str, command: &Command, log: &Path, grace: Duration) -> Result<Self> {
        Self::start_with(name, command, log, grace, Stdio::null())
    }

    /// Like [`Process::start`], with standard input, such as `Stdio::piped()`.
    pub fn start_with(name: &str, command: &Command, log: &Path, grace: Duration, stdin: Stdio) -> Result<Self> {
        let output = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut bound = Command::new("setpriv");
        bound.args(["--pdeathsig", "KILL"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => bound.env(key, value),
                None => bound.env_remove(key),
            };
        }
        bound.stdin(stdin).stdout(output.try_clone()?).stderr(output).process_group(0);
        let mut child = spawn(bound)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
        let stdin = child.stdin.take();
        Ok(Self { stdin, ..Self::watch(name, pid, grace, move || child.wait().ok()) })
    }

    /// A child that we have not started ourselves: one that lost its parent (prctl(2), PR_SET_CHILD_SUBREAPER).
    #[must_use]
    pub fn adopt(name: &str, pid: i32, grace: Duration) -> Self {
        let pid = Pid::from_raw(pid);
        // It is a child of ours once its parent has ended, which is about to.
        let until = Instant::now() + grace;
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        while waitid(Id::Pid(pid), look) == Err(nix::errno::Errno::ECHILD) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        Self::watch(name, pid, grace, move || match waitpid(pid, None) {
            Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::from_raw(code << 8)),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::from_raw(signal as i32)),
            _ => None,
        })
    }

    fn watch(
        name: &str,
        pid: Pid,
        grace: Duration,
        reap: impl FnOnce() -> Option<ExitStatus> + Send + 'static,
    ) -> Self {
        let life = Arc::new(Life::default());
        let watched = Arc::clone(&life);
        std::thread::spawn(move || {
            // not reaped by this wait, so that the number stays ours until the lock is held
            while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::errno::Errno::EINTR) {}
            let mut status = watched.status();
            *status = Some(reap().unwrap_or_else(|| ExitStatus::from_raw(0)));
            watched.ended.notify_all();
        });
        let undone = Arc::clone(&life);
        let guard = clean::on_exit(move || undone.end(pid, grace));
        Self { name: name.to_owned(), pid, life, stdin: None, _guard: guard }
    }

    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Sends a signal; nothing happens when the process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.life.signal(self.pid, signal)
    }

    /// The exit status once the process has ended, `None` when it still runs after `limit`.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        self.life.wait(limit)
    }

    /// Fails when the process has ended, naming its exit status.
    pub fn check_alive(&self) -> Result<()> {
        match *self.life.status() {
            Some(status) => bail!("{} ended early: {status}", self.name),
            None => Ok(()),
        }
    }
}

/// Runs `command` to its end and returns its standard output; an error holds its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).process_group(0);
    let output =
        command.output().with_context(|| format!("cannot start {program}; is it installed? (scripts/setup.sh)"))?;
    if !output.status.success() {
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        bail!("{program} {}: {}: {}", words.join(" "), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks `ready` every 20 ms until it says yes, at most for `limit`; `what` names what is waited for.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !ready()? {
        if Instant::now() > deadline {
            bail!("{what}: nothing within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The last lines of a log, for an error message.
#[must_use]
pub fn tail(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
