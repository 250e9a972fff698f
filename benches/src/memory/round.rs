//! One round: the guest swapped out, a contender told, the guest's touch measured.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use prestage_tests::guest::Run;
use prestage_tests::pages::{Memory, Usage};
use prestage_tests::swap::Swap;
use serde::Serialize;

use super::contender::Contender;
use super::{Options, Order};

/// How a round touches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial {
    pub(super) order: Order,
    pub(super) seed: u64,
    /// After each page.
    pub(super) compute: Duration,
}

/// What a round measured.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Sample {
    /// All touches, by the guest's clock.
    pub(super) seconds: f64,
    /// From the announcement, or where it would be, to the order to touch, by the host's clock.
    pub(super) lead_seconds: f64,
    /// QEMU's faults from the announcement to the answer.
    pub(super) major_faults: u64,
    pub(super) minor_faults: u64,
    /// Processor time of QEMU in the same stretch: emulation, and the kernel's work on its faults.
    pub(super) qemu_cpu_seconds: f64,
    /// Processor time of the contender.
    pub(super) own_cpu_seconds: f64,
    /// What was swapped out of the guest before it drew its order.
    pub(super) swapped_bytes: u64,
}

/// The guest.
pub(super) struct Subject<'a> {
    run: Run<'a>,
    pid: i32,
    memory: Arc<Memory>,
    pages: u64,
    /// What each order was answered with: the same in every round, whoever brought the pages in.
    sums: HashMap<(bool, u64), u64>,
}

impl<'a> Subject<'a> {
    /// A guest that has filled its memory, and its QEMU.
    pub(super) fn new(run: Run<'a>, pid: i32, options: &Options) -> Result<Self> {
        let memory = Arc::new(Memory::of(pid, options.memory << 20)?);
        let pages = options.working_set << 8;
        Ok(Self { run, pid, memory, pages, sums: HashMap::new() })
    }

    pub(super) fn round(&mut self, swap: &mut Swap, contender: &mut dyn Contender, trial: &Trial) -> Result<Sample> {
        contender.prepare()?;
        swap.renew()?;
        swap.set_page_cluster(contender.page_cluster())?;
        if contender.swapped() {
            self.memory.push_out()?;
        }
        let swapped_bytes = self.memory.residency()?.swapped_bytes;
        let enough = !contender.swapped() || swapped_bytes >= self.pages << 12;
        ensure!(enough, "only {} MiB of the guest are swapped out", swapped_bytes >> 20);
        match trial.order {
            Order::Random => self.run.random_pages(self.pages, trial.seed)?,
            _ => self.run.order_pages(trial.seed)?,
        }

        let before = Usage::of(self.pid)?;
        let announced = Instant::now();
        contender.start(&self.memory)?;
        std::thread::sleep(contender.lead().unwrap_or_default().saturating_sub(announced.elapsed()));
        let lead_seconds = announced.elapsed().as_secs_f64();
        let touched = self.run.touch(trial.compute)?;
        let used = Usage::of(self.pid)?.since(&before);
        let own = contender.settle()?;

        ensure!(touched.pages == self.pages, "the guest touched {} of {} pages", touched.pages, self.pages);
        let sum = *self.sums.entry((trial.order == Order::Random, trial.seed)).or_insert(touched.sum);
        ensure!(sum == touched.sum, "the guest read something else than before: its memory is corrupt");
        Ok(Sample {
            seconds: touched.time.as_secs_f64(),
            lead_seconds,
            major_faults: used.major_faults,
            minor_faults: used.minor_faults,
            qemu_cpu_seconds: used.cpu.as_secs_f64(),
            own_cpu_seconds: own.as_secs_f64(),
            swapped_bytes,
        })
    }
}
