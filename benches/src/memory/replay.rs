//! A recording of one touch, replayed in later rounds, as record-and-prefetch systems do for snapshots (REAP, ASPLOS 2021):
//! through the daemon's own privileged helper, without anything that learns.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use prestage_integration::memory::helper::client::{Event, Helper};
use prestage_integration::memory::process::identify;
use prestage_integration::memory::{Region, Span};
use prestage_tests::pages::{Memory, Usage, children, thread_cpu};

use super::contender::Contender;

/// The one machine the helper knows.
const VM: u32 = 1;
/// Pages an order.
const CHUNK: usize = 256;
/// Orders under way.
const OPEN: usize = 4;
/// Without a fault for so long all of them were heard.
const QUIET: Duration = Duration::from_millis(200);

/// What is done with faults that are heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Nothing: what hearing every one of them costs the guest.
    Hear,
    /// Those of the first round are replayed in their order, this long before the touch.
    Replay(Duration),
}

/// The helper and its recording.
#[derive(Debug)]
pub(super) struct Replay {
    role: Role,
    helper: Option<Helper>,
    pid: i32,
    before: Usage,
    recording: Arc<Vec<u64>>,
    enough: Arc<AtomicBool>,
    working: Option<JoinHandle<Result<(Helper, Duration)>>>,
}

impl Replay {
    /// Watches QEMU process `qemu`, whose guest's memory lies at `regions`.
    pub(super) fn new(role: Role, program: &Path, qemu: i32, regions: &[Region]) -> Result<Self> {
        let own = i32::try_from(std::process::id())?;
        let others = children(own)?;
        let mut helper = Helper::start(program, &[])?;
        let pid =
            children(own)?.into_iter().find(|child| !others.contains(child)).context("the helper has no process")?;
        helper.watch(VM, identify(qemu.try_into()?)?, regions.to_vec())?;
        Ok(Self {
            role,
            helper: Some(helper),
            pid,
            before: Usage::default(),
            recording: Arc::default(),
            enough: Arc::default(),
            working: None,
        })
    }

    /// Nothing is replayed yet, or ever.
    fn records(&self) -> bool {
        self.role == Role::Hear || self.recording.is_empty()
    }
}

/// Brings in `frames` in their order until all are in or it is `enough`. Returns the helper and the thread's processor time.
fn replay(mut helper: Helper, frames: &[u64], enough: &AtomicBool) -> Result<(Helper, Duration)> {
    let (mut chunks, mut open) = (frames.chunks(CHUNK), 0);
    loop {
        while open < OPEN && !enough.load(Ordering::Relaxed) {
            let Some(chunk) = chunks.next() else { break };
            let spans = chunk.iter().map(|&frame| Span { frame, pages: 1 }).collect();
            helper.bring_in(VM, spans)?;
            open += 1;
        }
        if open == 0 {
            return Ok((helper, thread_cpu()?));
        }
        match helper.next_event(Duration::from_secs(10))? {
            Some(Event::Moved { moved, .. }) => {
                moved?;
                open -= 1;
            }
            Some(Event::Gone { .. }) => bail!("QEMU has ended"),
            Some(Event::Faults { .. } | Event::Watching { .. }) => {}
            None => bail!("the helper has answered nothing for ten seconds"),
        }
    }
}

impl Contender for Replay {
    fn name(&self) -> String {
        match self.role {
            Role::Hear => "kernel 0, faults heard",
            Role::Replay(_) => "recording replayed",
        }
        .to_owned()
    }

    fn lead(&self) -> Option<Duration> {
        match self.role {
            Role::Hear => None,
            Role::Replay(lead) => Some(lead),
        }
    }

    fn start(&mut self, _: &Arc<Memory>) -> Result<()> {
        self.before = Usage::of(self.pid)?;
        let records = self.records();
        let mut helper = self.helper.take().context("the helper is gone")?;
        if records {
            helper.listen(VM, 1)?;
            self.helper = Some(helper);
            return Ok(());
        }
        self.enough.store(false, Ordering::Relaxed);
        let (frames, enough) = (Arc::clone(&self.recording), Arc::clone(&self.enough));
        self.working = Some(std::thread::spawn(move || replay(helper, &frames, &enough)));
        Ok(())
    }

    fn settle(&mut self) -> Result<Duration> {
        self.enough.store(true, Ordering::Relaxed);
        if let Some(thread) = self.working.take() {
            let (helper, cpu) = thread.join().map_err(|_| anyhow!("the thread that replays has ended"))??;
            self.helper = Some(helper);
            return Ok(cpu + Usage::of(self.pid)?.since(&self.before).cpu);
        }
        let helper = self.helper.as_mut().context("the helper is gone")?;
        let (mut seen, mut frames) = (HashSet::new(), Vec::new());
        while let Some(event) = helper.next_event(QUIET)? {
            if let Event::Faults { faults, .. } = event {
                frames.extend(faults.iter().map(|fault| fault.frame).filter(|&frame| seen.insert(frame)));
            }
        }
        helper.listen(VM, 0)?;
        if matches!(self.role, Role::Replay(_)) {
            if frames.is_empty() {
                bail!("no fault was heard: there is nothing to replay");
            }
            self.recording = Arc::new(frames);
        }
        Ok(Usage::of(self.pid)?.since(&self.before).cpu)
    }
}
