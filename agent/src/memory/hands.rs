//! What of the helper process is used, as a trait: tests have a guest of their own behind it.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use prestage_integration::memory::helper::client::{Event, Helper};
use prestage_integration::memory::helper::protocol::{MAX_SPANS, MAX_STATES, Watching};
use prestage_integration::memory::{MemoryError, PageState, ProcessId, Push, Region, Residency, Span};

/// See [`Helper`], whose methods these are.
pub(super) trait Hands: Send {
    fn watch(&mut self, vm: u32, process: ProcessId, regions: Vec<Region>) -> Result<Watching, MemoryError>;
    fn layout(&mut self, vm: u32, regions: Vec<Region>) -> Result<(), MemoryError>;
    fn listen(&mut self, vm: u32, period: u32) -> Result<(), MemoryError>;
    fn forget(&mut self, vm: u32) -> Result<(), MemoryError>;
    fn bring_in(&mut self, vm: u32, spans: Vec<Span>) -> Result<u64, MemoryError>;
    fn map(&mut self, vm: u32, spans: Vec<Span>) -> Result<u64, MemoryError>;
    fn push_out(&mut self, vm: u32, how: Push, spans: Vec<Span>) -> Result<u64, MemoryError>;
    fn states(&mut self, vm: u32, spans: Vec<Span>) -> Result<Vec<PageState>, MemoryError>;
    fn residency(&mut self, vm: u32) -> Result<Residency, MemoryError>;
    fn next_event(&mut self, wait: Duration) -> Result<Option<Event>, MemoryError>;
    /// Readable when something was said.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// What it may not do here, and why.
    fn missing(&self) -> &[String];
}

/// Pages between two spans that are asked for as well: a look into the page tables costs more than some pages that nobody wanted.
const GAP: u64 = 32;

/// The states of the spans' pages, in the order of the spans, whatever that is.
///
/// # Errors
/// Those of [`Helper::states`].
pub(super) fn states(hands: &mut dyn Hands, vm: u32, spans: &[Span]) -> Result<Vec<PageState>, MemoryError> {
    match states_by(hands, vm, spans, GAP) {
        // A gap that is no memory: the first MiB of a PC has such.
        Err(MemoryError::NoSuchMemory { .. }) => states_by(hands, vm, spans, 1),
        states => states,
    }
}

fn states_by(hands: &mut dyn Hands, vm: u32, spans: &[Span], gap: u64) -> Result<Vec<PageState>, MemoryError> {
    let frames = spans.iter().flat_map(|span| span.frame..span.frame.saturating_add(u64::from(span.pages)));
    let mut order: Vec<(u64, usize)> = frames.enumerate().map(|(at, frame)| (frame, at)).collect();
    order.sort_unstable();
    let mut states = vec![PageState::Absent; order.len()];
    let mut rest = &order[..];
    while !rest.is_empty() {
        let (mut cover, mut pages, mut taken) = (Vec::<Span>::new(), 0, 0);
        for (frame, _) in rest {
            let full = cover.len() == MAX_SPANS;
            match cover.last_mut() {
                Some(last) if *frame < last.frame + u64::from(last.pages) + gap => {
                    let wider = (frame - last.frame + 1).max(u64::from(last.pages));
                    pages += wider - u64::from(last.pages);
                    last.pages = wider as u32;
                }
                _ if full => break,
                _ => {
                    cover.push(Span { frame: *frame, pages: 1 });
                    pages += 1;
                }
            }
            taken += 1;
            if pages >= MAX_STATES / 2 {
                break;
            }
        }
        let (now, later) = rest.split_at(taken);
        rest = later;
        let found = hands.states(vm, cover.clone())?;
        let (mut span, mut before) = (0, 0);
        for (frame, at) in now {
            while let Some(cover) = cover.get(span)
                && *frame >= cover.frame + u64::from(cover.pages)
            {
                before += u64::from(cover.pages);
                span += 1;
            }
            let within = cover.get(span).map_or(0, |cover| frame - cover.frame);
            if let (Some(state), Some(found)) = (states.get_mut(*at), found.get((before + within) as usize)) {
                *state = *found;
            }
        }
    }
    Ok(states)
}

impl Hands for Helper {
    fn watch(&mut self, vm: u32, process: ProcessId, regions: Vec<Region>) -> Result<Watching, MemoryError> {
        self.watch(vm, process, regions)
    }
    fn layout(&mut self, vm: u32, regions: Vec<Region>) -> Result<(), MemoryError> {
        self.layout(vm, regions)
    }
    fn listen(&mut self, vm: u32, period: u32) -> Result<(), MemoryError> {
        self.listen(vm, period)
    }
    fn forget(&mut self, vm: u32) -> Result<(), MemoryError> {
        self.forget(vm)
    }
    fn bring_in(&mut self, vm: u32, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.bring_in(vm, spans)
    }
    fn map(&mut self, vm: u32, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.map(vm, spans)
    }
    fn push_out(&mut self, vm: u32, how: Push, spans: Vec<Span>) -> Result<u64, MemoryError> {
        self.push_out(vm, how, spans)
    }
    fn states(&mut self, vm: u32, spans: Vec<Span>) -> Result<Vec<PageState>, MemoryError> {
        self.states(vm, spans)
    }
    fn residency(&mut self, vm: u32) -> Result<Residency, MemoryError> {
        self.residency(vm)
    }
    fn next_event(&mut self, wait: Duration) -> Result<Option<Event>, MemoryError> {
        self.next_event(wait)
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.fd())
    }
    fn missing(&self) -> &[String] {
        &self.abilities().missing
    }
}
