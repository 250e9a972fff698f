//! What watching costs: the helper's processor time a fault, and what a fault takes longer for who makes it.
//!
//! A plain process, the toucher, stands in for QEMU: its memory is pushed out to zram and touched in an order that is drawn
//! anew, with nobody listening and with every fault, or every 16th, told. Once more it is touched at a pace of 10,000 a
//! second, as the budget is stated.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use prestage_integration::memory::helper::client::{Event, Helper};
use prestage_integration::memory::process::identify;
use prestage_integration::memory::{Region, Signal};
use prestage_tests::pages::{Memory, Usage};
use prestage_tests::paths::{Scratch, program};
use prestage_tests::report::Line;
use prestage_tests::swap::Swap;
use prestage_tests::toucher::build;
use serde::Serialize;

use crate::table::median;

const MIB: u64 = 64;
const PAGES: u64 = MIB << 8;
const VM: u32 = 1;
/// Nobody listens, each is told, every 16th is.
const PERIODS: [u32; 3] = [0, 1, 16];
/// Computed after each page, so that with the fault itself some 10,000 come a second.
const PACE: Duration = Duration::from_micros(90);

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Watching {
    signal: Signal,
    faults: u64,
    /// By how many faults one is told of (0: none): microseconds a touch.
    touch_us: BTreeMap<u32, f64>,
    /// Told, and how many were lost, over all rounds.
    told: u64,
    lost: u64,
    /// The helper's processor time a fault that it told of, at full speed.
    helper_us: f64,
    /// At the pace: faults a second, and the helper's share of a core.
    paced_per_second: f64,
    paced_core_percent: f64,
}

struct StandIn {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl StandIn {
    fn start(program: &Path) -> Result<Self> {
        let mut child =
            Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("toucher")?;
        let orders = child.stdin.take().context("no pipe to the toucher")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe from the toucher")?);
        let mut stand_in = Self { child, orders, answers };
        stand_in.answer()?;
        stand_in.tell(&format!("fill {MIB}"))?;
        Ok(stand_in)
    }

    fn tell(&mut self, order: &str) -> Result<Line> {
        writeln!(self.orders, "{order}").with_context(|| format!("toucher: {order}"))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Line> {
        let mut text = String::new();
        loop {
            text.clear();
            ensure!(self.answers.read_line(&mut text)? > 0, "the toucher has ended");
            match Line::parse(&text) {
                Some(line) => return Ok(line),
                None if text.contains("PRESTAGE failed") => bail!("the toucher: {text}"),
                None => {}
            }
        }
    }

    /// Seconds of all touches.
    fn touch(&mut self, seed: u64, pace: Duration) -> Result<f64> {
        self.tell(&format!("order {seed}"))?;
        match self.tell(&format!("touch {}", pace.as_nanos()))? {
            Line::Touched(touched) => Ok(touched.time.as_secs_f64()),
            other => bail!("the toucher answers {other:?}"),
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hears all that was caught: how many, and how many were lost.
fn hear(helper: &mut Helper) -> Result<(u64, u64)> {
    let (mut told, mut all_lost) = (0, 0);
    while let Some(event) = helper.next_event(Duration::from_millis(100))? {
        if let Event::Faults { lost, faults, .. } = event {
            told += faults.len() as u64;
            all_lost += lost;
        }
    }
    Ok((told, all_lost))
}

/// Measures; some seconds a round.
pub(super) fn measure(rounds: u32) -> Result<Watching> {
    let scratch = Scratch::new()?;
    let toucher = std::fs::canonicalize(build(scratch.path())?)?;
    let mut stand_in = StandIn::start(&toucher)?;
    let pid = i32::try_from(stand_in.child.id())?;
    let memory = Memory::of(pid, MIB << 20)?;
    let mut helper = Helper::start(&program("prestage-memory")?, &[&toucher])?;
    let region = Region { frame: 0, pages: PAGES, host: memory.address() };
    let watching = helper.watch(VM, identify(stand_in.child.id())?, vec![region])?;
    let of_helper = i32::try_from(helper.abilities().pid)?;
    let mut swap = Swap::zram(4 * (MIB << 20))?;
    swap.set_page_cluster(0)?;

    let (mut touches, mut helper_us) = (BTreeMap::<u32, Vec<f64>>::new(), Vec::new());
    let (mut paced, mut share) = (Vec::new(), Vec::new());
    let (mut told, mut lost) = (0, 0);
    for round in 0..=rounds {
        for (period, pace) in PERIODS.map(|period| (period, Duration::ZERO)).into_iter().chain([(1, PACE)]) {
            swap.renew()?;
            memory.push_out()?;
            helper.listen(VM, period)?;
            let before = Usage::of(of_helper)?;
            let seconds = stand_in.touch(1 + u64::from(round), pace)?;
            let (heard, missed) = hear(&mut helper)?;
            let cpu = Usage::of(of_helper)?.since(&before).cpu.as_secs_f64();
            helper.listen(VM, 0)?;
            (told, lost) = (told + heard, lost + missed);
            if round == 0 {
                continue;
            }
            // counts of pages, far below 2^53
            #[allow(clippy::cast_precision_loss)]
            let (pages, heard) = (PAGES as f64, heard as f64);
            if pace.is_zero() {
                touches.entry(period).or_default().push(seconds * 1e6 / pages);
                if period == 1 {
                    helper_us.push(cpu * 1e6 / heard);
                }
            } else {
                paced.push(heard / seconds);
                share.push(100.0 * cpu / seconds);
            }
        }
    }
    Ok(Watching {
        signal: watching.signal,
        faults: PAGES,
        touch_us: touches.into_iter().map(|(period, us)| (period, median(us.into_iter()))).collect(),
        told,
        lost,
        helper_us: median(helper_us.into_iter()),
        paced_per_second: median(paced.into_iter()),
        paced_core_percent: median(share.into_iter()),
    })
}

impl std::fmt::Display for Watching {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |period| self.touch_us.get(&period).copied().unwrap_or(f64::NAN);
        writeln!(
            f,
            "watching by {}: a touch of a page in zram takes {:.2} us unwatched, {:.2} with each fault told, {:.2} with each 16th",
            self.signal,
            us(0),
            us(1),
            us(16)
        )?;
        write!(
            f,
            "the helper takes {:.2} us a fault at full speed; at {:.0} faults a second {:.2} % of a core; {} told, {} lost",
            self.helper_us, self.paced_per_second, self.paced_core_percent, self.told, self.lost
        )
    }
}
