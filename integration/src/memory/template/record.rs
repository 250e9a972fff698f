//! Which pages of its template a clone touches, in which order.
//!
//! The privileged helper ([`helper`](crate::memory::helper)) looks into the clone's QEMU, in two ways at once. Faults are heard one by
//! one, in their order, by the best signal there is; but a signal of major faults tells nothing of pages that lie in the page cache
//! already, and a huge page hides its neighbours' faults. So the page table is looked at as well, in rounds: a page that is mapped
//! was touched since the last round, or mapped along (the kernel maps up to 16 neighbours that lie in the page cache with one that is
//! read). A page is where it was heard; one that was never heard is at the end of the round that found it, by address. This errs
//! towards too many neighbours, which cost a read of a few pages more.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use super::{PAGE_BYTES, WorkingSet};
use crate::memory::helper::client::{Event, Helper};
use crate::memory::helper::protocol::{MAX_SPANS, MAX_STATES};
use crate::memory::{MemoryError, PageState, ProcessId, Region, Signal, Span};

/// Between two rounds: a slow store answers some ten reads in it.
const ROUND: Duration = Duration::from_millis(20);
/// A round may take this share of the time: a page table of a large machine is long.
const MOST_LOAD: u32 = 20;
/// A guest that touches nothing new for so long has done what it was started for.
const CALM: Duration = Duration::from_secs(2);
/// The clone waits so long for its recorder. What it touches before that is found by looks.
const PATIENCE: Duration = Duration::from_secs(1);
/// The one machine the helper knows.
const VM: u32 = 1;

/// Where a clone has its template's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    process: ProcessId,
    /// What the guest may write to of the memory; where its firmware lies in it (256 KiB) is left out.
    regions: Vec<Region>,
    /// Address of the memory's first page in the process.
    start: u64,
}

impl Place {
    /// `regions` of the guest's memory, of which those count that lie in the block of `bytes` at address `start`.
    #[must_use]
    pub fn new(process: ProcessId, mut regions: Vec<Region>, start: u64, bytes: u64) -> Self {
        let end = start.saturating_add(bytes);
        regions.retain(|region| {
            let until = region.pages.checked_mul(PAGE_BYTES).and_then(|bytes| region.host.checked_add(bytes));
            region.host >= start && until.is_some_and(|until| until <= end)
        });
        Self { process, regions, start }
    }

    /// The page of the template's memory that a guest's frame is.
    fn page(&self, frame: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| r.frame <= frame && frame - r.frame < r.pages)?;
        Some((region.host - self.start) / PAGE_BYTES + (frame - region.frame))
    }

    /// All of it, in parts that can be asked for at once.
    fn parts(&self) -> Vec<Vec<Span>> {
        let mut parts: Vec<Vec<Span>> = Vec::new();
        let mut room = 0;
        for region in &self.regions {
            let (mut frame, end) = (region.frame, region.frame + region.pages);
            while frame < end {
                if room == 0 || parts.last().is_none_or(|part| part.len() == MAX_SPANS) {
                    parts.push(Vec::new());
                    room = MAX_STATES;
                }
                let pages = u32::try_from((end - frame).min(room)).unwrap_or(u32::MAX);
                if let Some(part) = parts.last_mut() {
                    part.push(Span { frame, pages });
                }
                frame += u64::from(pages);
                room -= u64::from(pages);
            }
        }
        parts
    }
}

/// What was recorded of a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    pub set: WorkingSet,
    /// Of the set's pages, those whose place in the order was heard.
    pub heard_pages: u64,
    /// Faults that were lost: their pages stand where a look found them.
    pub lost: u64,
    /// By what faults were heard in the end.
    pub signal: Signal,
}

/// A recording on a thread of its own.
#[derive(Debug)]
pub struct Recording(JoinHandle<Result<Recorded, MemoryError>>);

/// Tells the recording where the clone is. Dropped before that, it ends.
#[derive(Debug)]
pub struct Starter {
    place: SyncSender<Result<Place, MemoryError>>,
    listening: Receiver<()>,
}

/// Starts a recording, of a clone that is not there yet: with the helper `program`, which is to allow the programs `also` beside QEMU
/// (for tests). It ends once the guest is calm, `limit` has passed, the clone has ended or `stopped` says so.
///
/// # Errors
/// There is no thread to be had.
pub fn start(
    program: PathBuf,
    also: Vec<PathBuf>,
    limit: Duration,
    stopped: impl Fn() -> bool + Send + 'static,
) -> io::Result<(Starter, Recording)> {
    let (place, places) = sync_channel(1);
    let (ready, listening) = sync_channel(1);
    // The helper ends with the thread that started it (prctl(2), PR_SET_PDEATHSIG), so it is this one.
    let thread = thread::Builder::new().name("record".into()).spawn(move || -> Result<Recorded, MemoryError> {
        let also: Vec<_> = also.iter().map(PathBuf::as_path).collect();
        let mut helper = Helper::start(&program, &also)?;
        let never = || MemoryError::Os { what: "record a clone".into(), error: "it was not started".into() };
        let place: Place = places.recv().map_err(|_| never())??;
        let signal = helper.watch(VM, place.process, place.regions.clone())?.signal;
        helper.listen(VM, 1)?;
        let _ = ready.send(()); // it may have waited long enough
        record(&mut helper, &place, signal, limit, stopped)
    })?;
    Ok((Starter { place, listening }, Recording(thread)))
}

impl Starter {
    /// To be called while the clone does not run yet: returns when its faults are heard, or cannot be.
    pub fn watch(self, place: Result<Place, MemoryError>) {
        // a recorder that has ended has said why to whoever finishes it
        if self.place.send(place).is_ok() && self.listening.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("a clone runs before its recorder hears it: the order of its first touches is not exact");
        }
    }
}

impl Recording {
    /// Waits for its end.
    ///
    /// # Errors
    /// What keeps the helper from looking into the clone.
    pub fn finish(self) -> Result<Recorded, MemoryError> {
        let ended = || MemoryError::Os { what: "record a clone".into(), error: "its thread has ended".into() };
        self.0.join().map_err(|_| ended())?
    }
}

fn record(
    helper: &mut Helper,
    place: &Place,
    mut signal: Signal,
    limit: Duration,
    stopped: impl Fn() -> bool,
) -> Result<Recorded, MemoryError> {
    let (parts, mut touches, mut lost) = (place.parts(), Touches::default(), 0);
    let began = Instant::now();
    let (mut new, mut next) = (began, began);
    while began.elapsed() < limit && new.elapsed() < CALM && !stopped() {
        let before = touches.first.len();
        loop {
            match helper.next_event(next.saturating_duration_since(Instant::now()))? {
                Some(Event::Faults { lost: more, faults, .. }) => {
                    lost += more;
                    for fault in faults {
                        if let Some(page) = place.page(fault.frame) {
                            touches.heard(page, fault.at_us);
                        }
                    }
                }
                Some(Event::Watching { watching, .. }) => signal = watching.signal,
                Some(Event::Gone { .. }) => return Err(ended()),
                Some(Event::Moved { .. }) => {}
                None => break,
            }
            // one that faults without end must be looked at too
            if Instant::now() >= next + ROUND {
                break;
            }
        }
        let round = Instant::now();
        for part in &parts {
            let states = match helper.states(VM, part.clone()) {
                Ok(states) => states,
                Err(MemoryError::Gone { .. } | MemoryError::Unknown(_)) => return Err(ended()),
                Err(error) => return Err(error),
            };
            let at_us = now_us();
            let frames = part.iter().flat_map(|span| span.frame..span.frame + u64::from(span.pages));
            for (frame, state) in frames.zip(states) {
                if matches!(state, PageState::Present | PageState::Swapped)
                    && let Some(page) = place.page(frame)
                {
                    touches.seen(page, at_us);
                }
            }
        }
        if touches.first.len() > before {
            new = Instant::now();
        }
        next = Instant::now() + ROUND.max(round.elapsed() * MOST_LOAD);
    }
    let heard_pages = touches.first.values().filter(|touch| touch.heard).count() as u64;
    Ok(Recorded { set: WorkingSet::of_touches(touches.in_order()), heard_pages, lost, signal })
}

/// What it touched until then is not what the next clone needs.
fn ended() -> MemoryError {
    MemoryError::Os { what: "record a clone".into(), error: "it ended before it was recorded".into() }
}

/// The clock of faults: `CLOCK_MONOTONIC` in microseconds.
fn now_us() -> u64 {
    // The clock is there on every Linux.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// First touches by page.
#[derive(Debug, Default)]
struct Touches {
    first: HashMap<u64, Touch>,
}

#[derive(Debug, Clone, Copy)]
struct Touch {
    at_us: u64,
    heard: bool,
}

impl Touches {
    /// A page that a look had found before was mapped along then: it is touched now.
    fn heard(&mut self, page: u64, at_us: u64) {
        let touch = self.first.entry(page).or_insert(Touch { at_us, heard: true });
        if !touch.heard {
            *touch = Touch { at_us, heard: true };
        }
    }

    fn seen(&mut self, page: u64, at_us: u64) {
        self.first.entry(page).or_insert(Touch { at_us, heard: false });
    }

    fn in_order(self) -> impl Iterator<Item = u64> {
        let mut pages: Vec<_> = self.first.into_iter().map(|(page, touch)| (touch.at_us, !touch.heard, page)).collect();
        pages.sort_unstable();
        pages.into_iter().map(|(.., page)| page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(regions: Vec<Region>) -> Place {
        Place::new(ProcessId { pid: 1, started: 1 }, regions, 0x10_0000, 0x1000 * PAGE_BYTES)
    }

    #[test]
    fn what_was_heard_keeps_its_order_among_what_only_looks_found() {
        let mut touches = Touches::default();
        touches.heard(90, 10);
        touches.heard(7, 12);
        // a look whose answer is there before the faults that happened before it
        for page in [5, 7, 8, 40, 90] {
            touches.seen(page, 20);
        }
        touches.heard(40, 15);
        touches.heard(7, 30); // again
        // mapped along in the first round, touched in the second
        touches.heard(8, 25);
        touches.seen(3, 40);
        assert_eq!(touches.in_order().collect::<Vec<_>>(), [90, 7, 40, 5, 8, 3]);
    }

    #[test]
    fn frames_are_pages_of_the_block_and_of_nothing_else() {
        let low = Region { frame: 0, pages: 0xa0, host: 0x10_0000 };
        let high = Region { frame: 0x10_0000, pages: 0x100, host: 0x10_0000 + 0xf00 * PAGE_BYTES };
        let elsewhere = Region { frame: 0x20_0000, pages: 1, host: 0x10_0000 + 0x1000 * PAGE_BYTES };
        let place = place(vec![low, high, elsewhere]);
        assert_eq!([0, 0x9f].map(|frame| place.page(frame)), [Some(0), Some(0x9f)]);
        assert_eq!([0x10_0000, 0x10_00ff].map(|frame| place.page(frame)), [Some(0xf00), Some(0xfff)]);
        assert_eq!([0xa0, 0x20_0000, u64::MAX].map(|frame| place.page(frame)), [None; 3]);
    }

    #[test]
    fn a_large_machine_is_looked_at_in_parts() {
        let (start, pages) = (0x10_0000, 3 * MAX_STATES + 5);
        let region = Region { frame: 7, pages, host: start };
        let small = Region { frame: 1 << 40, pages: 9, host: start + pages * PAGE_BYTES };
        let place = Place::new(ProcessId { pid: 1, started: 1 }, vec![region, small], start, (pages + 9) * PAGE_BYTES);
        let parts = place.parts();
        assert_eq!(parts.len(), 4);
        let in_all = |part: &Vec<Span>| part.iter().map(|span| u64::from(span.pages)).sum::<u64>();
        assert!(parts.iter().all(|part| in_all(part) <= MAX_STATES));
        assert_eq!(parts.iter().map(in_all).sum::<u64>(), pages + 9);
        assert_eq!(parts[3].last(), Some(&Span { frame: 1 << 40, pages: 9 }));
        assert!(super::Place::new(ProcessId { pid: 1, started: 1 }, Vec::new(), 0, 0).parts().is_empty());
    }
}
