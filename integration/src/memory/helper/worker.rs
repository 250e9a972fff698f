//! Moving and looking take time, in which faults must be heard: they have threads of their own.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use nix::time::{ClockId, clock_gettime};

use super::protocol::{MAX_STATES, Message, Moved, Said, pack};
use crate::memory::advise::{Advice, Memory, advise, touch};
use crate::memory::capture::Places;
use crate::memory::pagemap::Pagemap;
use crate::memory::process::{Process, of_process};
use crate::memory::{MemoryError, PAGE_BYTES, PageState, Residency, Span};

/// Orders that wait, at most.
const QUEUE: usize = 128;

/// A machine as the workers see it; never changes, a new layout makes a new one.
#[derive(Debug)]
pub(super) struct View {
    pub(super) process: Arc<Process>,
    pub(super) pagemap: Pagemap,
    pub(super) memory: Memory,
    pub(super) places: Places,
}

#[derive(Debug)]
pub(super) enum Work {
    Advise(Advice, Vec<Span>),
    Map(Vec<Span>),
    States(Vec<Span>),
    Residency,
}

/// A thread and its queue.
#[derive(Debug)]
pub(super) struct Worker(SyncSender<(u64, Arc<View>, Work)>);

impl Worker {
    pub(super) fn start(name: &str, socket: Arc<OwnedFd>) -> std::io::Result<Self> {
        let (sender, orders) = sync_channel(QUEUE);
        thread::Builder::new().name(name.into()).spawn(move || run(&orders, &socket))?;
        Ok(Self(sender))
    }

    /// # Errors
    /// `Busy`.
    pub(super) fn give(&self, ticket: u64, view: Arc<View>, work: Work) -> Result<(), MemoryError> {
        self.0.try_send((ticket, view, work)).map_err(|error| match error {
            TrySendError::Full(_) | TrySendError::Disconnected(_) => MemoryError::Busy,
        })
    }
}

fn run(orders: &Receiver<(u64, Arc<View>, Work)>, socket: &OwnedFd) {
    while let Ok((ticket, view, work)) = orders.recv() {
        let body = match work {
            Work::Advise(advice, spans) => view.advise(advice, &spans).map(Said::Moved),
            Work::Map(spans) => view.map(&spans).map(Said::Moved),
            Work::States(spans) => view.states(&spans).map(Said::States),
            Work::Residency => view.residency().map(Said::Residency),
        };
        // a daemon that is gone ends the other thread, and with it this process
        let _ = say(socket, &Message::Answer { ticket, body }, MsgFlags::empty());
    }
}

/// Sends a message, whole.
///
/// # Errors
/// Of send(2); `EAGAIN` if `flags` forbid to wait.
pub(super) fn say(socket: &OwnedFd, message: &Message, flags: MsgFlags) -> Result<(), Errno> {
    let packet = postcard::to_allocvec(message).map_err(|_| Errno::EMSGSIZE)?;
    loop {
        match send(socket.as_raw_fd(), &packet, flags | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

impl View {
    fn advise(&self, advice: Advice, spans: &[Span]) -> Result<Moved, MemoryError> {
        let wanted = |state| match advice {
            // the kernel itself passes over what is not in swap (mm/madvise.c), and looks once instead of twice
            Advice::WillNeed => true,
            Advice::Push(_) => matches!(state, PageState::Present | PageState::Cached),
        };
        let looks = advice != Advice::WillNeed;
        self.do_with(spans, looks, wanted, |ranges| advise(&self.process, ranges, advice).map(drop))
    }

    fn map(&self, spans: &[Span]) -> Result<Moved, MemoryError> {
        let wanted = |state| matches!(state, PageState::Swapped | PageState::Cached);
        self.do_with(spans, true, wanted, |ranges| touch(&self.process, &self.memory, ranges))
    }

    /// Does something with the pages of the spans whose state is wanted, and says how much of it there was. Without a look
    /// all are taken.
    fn do_with(
        &self,
        spans: &[Span],
        looks: bool,
        wanted: impl Fn(PageState) -> bool,
        act: impl FnOnce(&[(u64, u64)]) -> Result<(), MemoryError>,
    ) -> Result<Moved, MemoryError> {
        let (started, cpu) = (Instant::now(), thread_cpu_us());
        let mut moved = Moved { asked: spans.iter().map(|span| u64::from(span.pages)).sum(), ..Moved::default() };
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut take = |host, pages| {
            match ranges.last_mut() {
                Some((start, count)) if *start + *count * PAGE_BYTES == host => *count += pages,
                _ => ranges.push((host, pages)),
            }
            moved.eligible += pages;
        };
        if looks {
            self.look(spans, |state, host, pages| {
                if wanted(state) {
                    take(host, pages);
                }
            })?;
        } else {
            for span in spans {
                self.places.host(span.frame, span.pages, &mut take)?;
            }
        }
        act(&ranges)?;
        moved.cpu_us = thread_cpu_us().saturating_sub(cpu);
        moved.wall_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(moved)
    }

    fn states(&self, spans: &[Span]) -> Result<Vec<u8>, MemoryError> {
        if spans.iter().map(|span| u64::from(span.pages)).sum::<u64>() > MAX_STATES {
            return Err(MemoryError::Busy);
        }
        let mut states = Vec::new();
        self.look(spans, |state, _, pages| states.extend(std::iter::repeat_n(state, pages as usize)))?;
        Ok(pack(states))
    }

    fn residency(&self) -> Result<Residency, MemoryError> {
        let mut residency = Residency::default();
        for region in self.places.regions() {
            self.stretch(region.host, region.pages, &mut |state, _, pages| match state {
                PageState::Present => residency.present += pages,
                PageState::Swapped => residency.swapped += pages,
                PageState::Cached => residency.cached += pages,
                PageState::Absent => residency.absent += pages,
            })?;
        }
        self.process.check()?;
        Ok(residency)
    }

    fn look(&self, spans: &[Span], mut tell: impl FnMut(PageState, u64, u64)) -> Result<(), MemoryError> {
        let mut ranges = Vec::new();
        for span in spans {
            self.places.host(span.frame, span.pages, |host, pages| ranges.push((host, pages)))?;
            for (host, pages) in ranges.drain(..) {
                self.stretch(host, pages, &mut tell)?;
            }
        }
        self.process.check()
    }

    fn stretch(&self, host: u64, pages: u64, tell: &mut dyn FnMut(PageState, u64, u64)) -> Result<(), MemoryError> {
        let told = self.pagemap.states(host, pages, tell);
        told.map_err(|error| of_process(self.process.id(), "cannot read its page table", &error))
    }
}

/// CPU time of this thread.
fn thread_cpu_us() -> u64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(0, |time| {
        let (s, ns) = (u64::try_from(time.tv_sec()).unwrap_or(0), u64::try_from(time.tv_nsec()).unwrap_or(0));
        s * 1_000_000 + ns / 1000
    })
}
