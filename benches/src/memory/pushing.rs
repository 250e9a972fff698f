//! Pushing out: how much of a guest's idle memory goes, and what its busy memory pays for that.
//!
//! A guest has filled memory of which its program goes on touching a part, pass after pass. prestaged first watches only, then
//! pushes, with steps that come thirty times as fast as by default: what is told by the minute is told by ten steps, and
//! what a guest pays in a second is thirty times what it would be.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::guest::Run;
use prestage_tests::pages::Usage;
use prestage_tests::process::wait_until;
use prestage_tests::swap::Swap;
use prestage_tests::toucher::{Backing, MemoryRig};
use serde::Serialize;
use serde_json::Value;

use super::GUEST;
use crate::progress::Progress;
use crate::table::median;

const MEMORY_MIB: u64 = 512;
const FILLED_MIB: u64 = 384;
const BUSY_MIB: u64 = 64;
const FLOOR: f64 = 0.2;
/// Default of `memory.push_every`, and what it is here.
const STEP: Duration = Duration::from_secs(6);
const FAST_STEP: Duration = Duration::from_millis(200);
/// A minute of the default.
const MINUTE: Duration = FAST_STEP.saturating_mul(10);
/// Minutes that are watched only.
const BEFORE: u32 = 5;
/// What the program computes after each page.
const COMPUTE: Duration = Duration::from_micros(2);

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Pushing {
    memory_mib: u64,
    filled_mib: u64,
    busy_mib: u64,
    floor: f64,
    minutes: Vec<Minute>,
    /// Medians of a pass over the busy part, in seconds of the guest: watched, and pushed.
    pass_seconds: [f64; 2],
    /// The mean, which has the passes that waited.
    mean_seconds: [f64; 2],
    /// Processor time of the daemon and its helper that pushing took, and that as a share of a core at the default pace.
    cpu_seconds: f64,
    core_percent: f64,
}

/// As of its end.
#[derive(Debug, Clone, Serialize)]
struct Minute {
    pushed_mib: u64,
    present_mib: u64,
    /// QEMU's major faults in it.
    major_faults: u64,
    /// The same as a share of what was in memory.
    share_percent: f64,
    /// Whether it was pushed on, or why not.
    state: String,
}

struct Subject<'a> {
    run: Run<'a>,
    qemu: i32,
    daemon: Prestaged,
}

impl Subject<'_> {
    fn pages(&self) -> Result<Value> {
        Ok(self.daemon.ctl(&["vm", "show", GUEST])?["pages"].clone())
    }

    fn daemon_cpu(&self) -> Result<Duration> {
        Ok(Usage::of_family(self.daemon.pid().context("prestaged does not run")?)?.cpu)
    }

    /// Passes over the busy part for a minute: their times.
    fn minute(&mut self, times: &mut Vec<f64>) -> Result<Minute> {
        let (before, until) = (Usage::of(self.qemu)?, Instant::now() + MINUTE);
        while Instant::now() < until {
            times.push(self.run.touch(COMPUTE)?.time.as_secs_f64());
        }
        let major_faults = Usage::of(self.qemu)?.since(&before).major_faults;
        let pages = self.pages()?;
        let mib =
            |name: &str| pages[name].as_u64().map(|bytes| bytes >> 20).with_context(|| format!("no {name}: {pages}"));
        let (pushed_mib, present_mib) = (mib("pushed_bytes")?, mib("present_bytes")?);
        // counts of pages, far below 2^53
        #[allow(clippy::cast_precision_loss)]
        let share_percent = 100.0 * major_faults as f64 / (present_mib << 8) as f64;
        let state = pages["push_state"].as_str().unwrap_or_default().to_owned();
        Ok(Minute { pushed_mib, present_mib, major_faults, share_percent, state })
    }
}

/// Measures for so many minutes of the default pace.
pub(super) fn measure(minutes: u32, progress: &Progress) -> Result<Pushing> {
    progress.now("guest image");
    let rig = MemoryRig::new()?;
    let guest = rig.guest(GUEST, MEMORY_MIB, Backing::Anonymous)?;
    let mut run = guest.start()?;
    run.wait_alive()?;
    run.fill(FILLED_MIB)?;
    let qemu = guest.pid()?;
    let mut swap = Swap::zram(2 * (MEMORY_MIB << 20))?;
    swap.set_page_cluster(0)?;
    let daemon = Prestaged::start(&DaemonOptions {
        libvirt_uri: Some(rig.libvirt.uri().to_owned()),
        more: format!("[memory]\npush_out = true\npush_every = \"{}ms\"\npush_floor = {FLOOR}", FAST_STEP.as_millis()),
        ram_size: "16MiB".to_owned(),
        ssd_size: "64MiB".to_owned(),
        ..DaemonOptions::default()
    })?;
    daemon.ctl(&["vm", "policy", GUEST, "--pages", "observe"])?;
    run.order_part(0, BUSY_MIB << 8, 1)?;
    let mut subject = Subject { run, qemu, daemon };
    wait_until("prestaged's watch over the guest's memory", Duration::from_secs(60), || {
        Ok(subject.pages()?["signal"].is_string())
    })
    .with_context(|| subject.daemon.last_words())?;

    let (mut watched, mut pushed, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let cpu = subject.daemon_cpu()?;
    for minute in 0..BEFORE {
        progress.now(&format!("watched: minute {minute} of {BEFORE}"));
        let seen = subject.minute(&mut watched)?;
        ensure!(seen.pushed_mib == 0, "pages are pushed out against the policy");
    }
    let before = subject.daemon_cpu()?;
    let idle = before.saturating_sub(cpu) * minutes / BEFORE;
    subject.daemon.ctl(&["vm", "policy", GUEST, "--pages", "act"])?;
    for minute in 0..minutes {
        progress.now(&format!("pushed: minute {minute} of {minutes}"));
        all.push(subject.minute(&mut pushed)?);
    }
    let cpu = subject.daemon_cpu()?.saturating_sub(before).saturating_sub(idle);
    // counts of passes, far below 2^53
    #[allow(clippy::cast_precision_loss)]
    let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len() as f64;
    let steps = f64::from(minutes) * MINUTE.as_secs_f64() / FAST_STEP.as_secs_f64();
    Ok(Pushing {
        memory_mib: MEMORY_MIB,
        filled_mib: FILLED_MIB,
        busy_mib: BUSY_MIB,
        floor: FLOOR,
        minutes: all,
        pass_seconds: [median(watched.iter().copied()), median(pushed.iter().copied())],
        mean_seconds: [mean(&watched), mean(&pushed)],
        cpu_seconds: cpu.as_secs_f64(),
        core_percent: 100.0 * cpu.as_secs_f64() / (steps * STEP.as_secs_f64()),
    })
}

impl std::fmt::Display for Pushing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "pushing out: a guest of {} MiB has filled {}, and touches {} of it; steps of {} ms stand for {} s",
            self.memory_mib,
            self.filled_mib,
            self.busy_mib,
            FAST_STEP.as_millis(),
            STEP.as_secs()
        )?;
        writeln!(
            f,
            "{:>7} {:>8} {:>8} {:>6} {:>16}  at its end",
            "minute", "out MiB", "in MiB", "major", "% of what is in"
        )?;
        let last = self.minutes.len();
        let told = |at: usize| at == 1 || at == last || at.is_multiple_of(5);
        for (at, minute) in self.minutes.iter().enumerate().filter(|(at, _)| told(at + 1)) {
            writeln!(
                f,
                "{:>7} {:>8} {:>8} {:>6} {:>16.3}  {}",
                at + 1,
                minute.pushed_mib,
                minute.present_mib,
                minute.major_faults,
                minute.share_percent,
                minute.state
            )?;
        }
        let worst = self.minutes.iter().map(|minute| minute.share_percent).fold(0.0, f64::max);
        let [watched, pushed] = self.pass_seconds;
        let [mean_watched, mean_pushed] = self.mean_seconds;
        writeln!(f, "worst minute: {worst:.3} % came back")?;
        writeln!(
            f,
            "a pass over what is touched takes {:.2} ms watched and {:.2} ms pushed (medians; means {:.2} and {:.2})",
            1e3 * watched,
            1e3 * pushed,
            1e3 * mean_watched,
            1e3 * mean_pushed
        )?;
        write!(
            f,
            "prestaged and its helper take {:.2} s of CPU for it: {:.3} % of a core at the default pace",
            self.cpu_seconds, self.core_percent
        )
    }
}
