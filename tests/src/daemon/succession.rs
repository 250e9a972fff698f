//! One daemon taking over from another, also when one of them is killed on the way.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::Prestaged;
use crate::process::{Process, wait_until};

/// What became of a hand-over that was cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The daemon that ran before goes on.
    Kept,
    /// The one that was to take over did.
    TakenOver,
    /// The predecessor, left with everything, has started itself anew.
    Replaced,
    /// Nobody was left, and one was started, as a service manager does.
    Restarted,
}

impl Prestaged {
    /// Starts another daemon beside the running one, with more words on its command line.
    pub fn start_beside(&self, more: &[&str]) -> Result<Process> {
        Process::start("prestaged", &self.command(more)?, &self.log, Duration::from_secs(20))
    }

    /// Has a new daemon take over from the running one, which must end well.
    pub fn hand_over(&mut self) -> Result<()> {
        let next = self.start_beside(&["--take-over"])?;
        self.succeeded_by(next)
    }

    /// Has the daemon start its successor itself, by SIGUSR2.
    pub fn hand_over_by_signal(&mut self) -> Result<()> {
        // the successor loses its parent and becomes a child of ours
        nix::sys::prctl::set_child_subreaper(true).context("subreaper")?;
        let old = self.process.as_ref().context("prestaged does not run")?;
        old.signal(Signal::SIGUSR2)?;
        self.succeeded_by_stranger()
    }

    /// Waits for the end of the running daemon and goes on with the one that took over from it, which nobody here started.
    pub fn succeeded_by_stranger(&mut self) -> Result<()> {
        let old = self.process.take().context("prestaged does not run")?;
        self.wait_succeeded(&old)?;
        let [next] = self.running()?[..] else { bail!("not one prestaged runs\n{}", self.last_words()) };
        self.process = Some(Process::adopt("prestaged", next, Duration::from_secs(20)));
        self.ctl(&["status"]).map(drop)
    }

    /// The daemon has ended by itself, and well.
    pub fn ended(&mut self) -> Result<()> {
        let old = self.process.take().context("prestaged does not run")?;
        self.wait_succeeded(&old)
    }

    fn succeeded_by(&mut self, next: Process) -> Result<()> {
        let old = self.process.take().context("prestaged does not run")?;
        let ended = self.wait_succeeded(&old);
        next.check_alive().with_context(|| self.last_words())?;
        self.process = Some(next);
        ended?;
        self.ctl(&["status"]).map(drop)
    }

    fn wait_succeeded(&self, old: &Process) -> Result<()> {
        match old.wait(Duration::from_secs(120)) {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("prestaged ended with {status} on a hand-over\n{}", self.last_words()),
            None => bail!("prestaged still runs two minutes after a hand-over began\n{}", self.last_words()),
        }
    }

    /// Kills the daemon, whose end [`settle`](Self::settle) looks into.
    pub fn kill(&self) -> Result<()> {
        self.process.as_ref().context("prestaged does not run")?.signal(Signal::SIGKILL)
    }

    /// Waits until one daemon serves after a hand-over to `next` in which somebody was killed, and goes on with it.
    pub fn settle(&mut self, next: Process) -> Result<Outcome> {
        let old = self.process.take().context("prestaged does not run")?;
        let (before, wanted) = (old.pid(), next.pid());
        let mut restarted: Option<Process> = None;
        let mut serving = 0;
        let settled = wait_until("a daemon that serves", Duration::from_secs(180), || {
            match self.running()?[..] {
                // also when it has ended at once: whoever is on his way out still has his locks
                [] if restarted.as_ref().is_none_or(|process| process.check_alive().is_err()) => {
                    restarted = Some(self.start_beside(&[])?);
                }
                // while it hands over it does not answer
                [pid] if self.ctl(&["status"]).is_ok() && self.running()? == [pid] => {
                    serving = pid;
                    return Ok(true);
                }
                _ => {}
            }
            Ok(false)
        });
        settled.with_context(|| self.last_words())?;
        let (process, outcome) = match restarted {
            Some(process) => (process, Outcome::Restarted),
            None if serving == before => (old, Outcome::Kept),
            None if serving == wanted => (next, Outcome::TakenOver),
            None => (Process::adopt("prestaged", serving, Duration::from_secs(20)), Outcome::Replaced),
        };
        self.process = Some(process);
        Ok(outcome)
    }

    /// Waits until the logs of all daemons here have said something so often.
    pub fn wait_said(&self, words: &str, times: usize) -> Result<()> {
        wait_until(words, Duration::from_secs(120), || Ok(self.said(words)? >= times))
            .with_context(|| self.last_words())
    }

    /// How often the logs of all daemons here have said something.
    pub fn said(&self, words: &str) -> Result<usize> {
        let log = std::fs::read(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&log).matches(words).count())
    }

    /// Daemons of this configuration that run.
    fn running(&self) -> Result<Vec<i32>> {
        let config = self.config.display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").context("cannot read /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // one that has ended has none
            let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words).into_owned();
            let mut words = words.split('\0');
            if words.next().is_some_and(|program| program.ends_with("prestaged") || program.ends_with("/exe"))
                && words.any(|word| word == config)
            {
                found.push(pid);
            }
        }
        Ok(found)
    }
}
