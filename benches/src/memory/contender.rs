//! What is compared: who does something, or nothing, when a touch is coming.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use prestage_tests::pages::{Memory, thread_cpu};

/// One that takes its turn in every round.
pub(super) trait Contender {
    fn name(&self) -> String;

    /// How long before the order to touch it is told; `None` when it is never told.
    fn lead(&self) -> Option<Duration> {
        None
    }

    /// What `vm.page-cluster` is in its rounds. By default nothing is read ahead, the kernel's best choice for zram.
    fn page_cluster(&self) -> u8 {
        0
    }

    /// Whether the guest is swapped out at all.
    fn swapped(&self) -> bool {
        true
    }

    /// A round begins. The guest is in RAM as yet.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// What comes now is measured; who has a lead is told. Returns at once, whatever it starts.
    fn start(&mut self, memory: &Arc<Memory>) -> Result<()> {
        let _ = memory;
        Ok(())
    }

    /// The touch is over: waits for what was started and says what processor time it took outside of QEMU.
    fn settle(&mut self) -> Result<Duration> {
        Ok(Duration::ZERO)
    }
}

/// The kernel alone.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) page_cluster: u8,
}

impl Contender for Kernel {
    fn name(&self) -> String {
        format!("kernel, page-cluster {}", self.page_cluster)
    }

    fn page_cluster(&self) -> u8 {
        self.page_cluster
    }
}

/// The bound: nothing was swapped out.
#[derive(Debug)]
pub(super) struct Resident;

impl Contender for Resident {
    fn name(&self) -> String {
        "everything resident".to_owned()
    }

    fn swapped(&self) -> bool {
        false
    }
}

/// How all of the guest's memory is brought in, by address, in one go.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    /// MADV_WILLNEED: into the swap cache, where a first touch is a minor fault.
    WillNeed,
    /// The same, then a byte of every page read, which maps it: a first touch is no fault.
    WillNeedRead,
}

/// Everything, as soon as it is told.
#[derive(Debug)]
pub(super) struct Everything {
    way: Way,
    lead: Duration,
    working: Option<JoinHandle<Result<Duration>>>,
}

impl Everything {
    pub(super) fn new(way: Way, lead: Duration) -> Self {
        Self { way, lead, working: None }
    }
}

impl Contender for Everything {
    fn name(&self) -> String {
        match self.way {
            Way::WillNeed => "all, WILLNEED",
            Way::WillNeedRead => "all, WILLNEED, read",
        }
        .to_owned()
    }

    fn lead(&self) -> Option<Duration> {
        Some(self.lead)
    }

    fn start(&mut self, memory: &Arc<Memory>) -> Result<()> {
        let (way, memory) = (self.way, Arc::clone(memory));
        self.working = Some(std::thread::spawn(move || {
            memory.bring_in()?;
            if matches!(way, Way::WillNeedRead) {
                memory.read()?;
            }
            // a thread of its own, so that all it has used is this
            thread_cpu()
        }));
        Ok(())
    }

    fn settle(&mut self) -> Result<Duration> {
        match self.working.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the thread that brings memory in has ended"))?,
            None => Ok(Duration::ZERO),
        }
    }
}
