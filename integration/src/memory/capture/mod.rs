//! What a guest faults on.
//!
//! - [`Capture`]: a machine's, by the best signal that works for it
//! - `perf`: counters of the kernel with a ring a thread: major faults, and KVM's tracepoints
//! - `ring`: the ring itself
//! - `diff`: where nothing tells of single faults: what came in between two looks
//!
//! Signals were compared on real hosts: counters of faults do not see what a guest does under KVM, KVM's tracepoints do;
//! under TCG, and of what QEMU touches itself, it is the other way around.

mod diff;
mod perf;
mod ring;

use super::pagemap::Pagemap;
use super::process::Process;
use super::{MemoryError, PAGE_BYTES, Region, Signal};
use diff::Diff;
use perf::Perf;

/// Faults of one machine's process, as addresses or frames.
#[derive(Debug)]
pub struct Capture {
    signal: Signal,
    source: Source,
    passed_over: Vec<(Signal, String)>,
    period: u32,
    /// Whether anything was caught since it listens.
    heard: bool,
}

/// Major faults, times the period, that a signal may leave untold before it counts as deaf to this process. KVM has been met
/// whose tracepoints exist and never fire.
const DEAF: u64 = 64;

#[derive(Debug)]
enum Source {
    Perf(Perf),
    Diff(Diff),
}

/// Where something was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the process.
    Host(u64),
    /// In the guest's physical memory.
    Guest(u64),
}

/// A fault as it was caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caught {
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub at_ns: u64,
    pub place: Place,
}

impl Capture {
    /// Tries the signals, best first, and takes the first that works for this process. Nothing is caught before
    /// [`listen`](Self::listen).
    ///
    /// # Errors
    /// `Gone`; not for want of a signal: reading the page table always works once it is open.
    pub fn open(process: &Process, pagemap: &Pagemap) -> Result<Self, MemoryError> {
        let mut passed_over = Vec::new();
        let (signal, source) = best(process, pagemap, &mut passed_over)?;
        Ok(Self { signal, source, passed_over, period: 0, heard: false })
    }

    /// Whether another signal was taken because this one tells nothing of what happens. To be called now and then.
    ///
    /// # Errors
    /// `Gone`.
    pub fn judge(&mut self, process: &Process, pagemap: &Pagemap) -> Result<bool, MemoryError> {
        let Source::Perf(perf) = &self.source else { return Ok(false) };
        if self.period == 0 || self.heard {
            return Ok(false);
        }
        let untold = perf.majors(process);
        if untold < DEAF * u64::from(self.period) {
            return Ok(false);
        }
        self.passed_over.push((self.signal, format!("it told nothing of {untold} major faults")));
        (self.signal, self.source) = best(process, pagemap, &mut self.passed_over)?;
        self.listen(process, self.period);
        Ok(true)
    }

    pub fn signal(&self) -> Signal {
        self.signal
    }

    /// Better signals, and why it is none of them.
    pub fn passed_over(&self) -> &[(Signal, String)] {
        &self.passed_over
    }

    /// Catches every `period`th fault of a thread from now on; 0: none. Without single faults: looks every `period` ms.
    pub fn listen(&mut self, process: &Process, period: u32) {
        self.period = period;
        self.heard = false;
        match &mut self.source {
            Source::Perf(perf) => perf.listen(process, period),
            Source::Diff(diff) => diff.listen(period),
        }
    }

    /// Threads come and go; to be called now and then.
    pub fn follow_threads(&mut self, process: &Process) {
        if let Source::Perf(perf) = &mut self.source {
            perf.follow_threads(process);
        }
    }

    /// How long the caller may sleep at most, in milliseconds; `None` for as long as it likes.
    pub fn look_within_ms(&self) -> Option<u64> {
        match &self.source {
            Source::Perf(_) => None,
            Source::Diff(diff) => diff.look_within_ms(),
        }
    }

    /// Adds what was caught since the last call, in order of time. Returns how many more there were and are lost.
    pub fn take(&mut self, pagemap: &Pagemap, places: &Places, caught: &mut Vec<Caught>) -> u64 {
        let before = caught.len();
        let lost = match &mut self.source {
            Source::Perf(perf) => perf.take(caught),
            Source::Diff(diff) => diff.take(pagemap, places, caught),
        };
        self.heard |= caught.len() > before || lost > 0;
        lost
    }
}

/// The best signal that was not passed over yet.
fn best(
    process: &Process,
    pagemap: &Pagemap,
    passed_over: &mut Vec<(Signal, String)>,
) -> Result<(Signal, Source), MemoryError> {
    for signal in [Signal::KvmSpte, Signal::KvmFault, Signal::PerfMajor] {
        if passed_over.iter().any(|(over, _)| *over == signal) {
            continue;
        }
        match Perf::open(process, signal) {
            Ok(perf) => return Ok((signal, Source::Perf(perf))),
            Err(why) => {
                process.check()?;
                passed_over.push((signal, why));
            }
        }
    }
    let scans = pagemap.scans();
    if !scans {
        passed_over.push((Signal::PagemapScan, "this kernel is older than 6.7".into()));
    }
    Ok((if scans { Signal::PagemapScan } else { Signal::Pagemap }, Source::Diff(Diff::default())))
}

/// Where a machine's memory lies, both ways.
#[derive(Debug, Default)]
pub struct Places {
    by_frame: Vec<Region>,
    by_host: Vec<Region>,
}

impl Places {
    /// # Errors
    /// [`MemoryError::Layout`] for regions that overlap or run over.
    pub fn new(regions: Vec<Region>) -> Result<Self, MemoryError> {
        let fits = |region: &Region| {
            let most = u64::MAX / PAGE_BYTES / 2;
            region.pages > 0
                && region.pages <= most
                && region.frame <= most
                && region.host.is_multiple_of(PAGE_BYTES)
                && region.host.checked_add(region.pages * PAGE_BYTES).is_some()
        };
        let (mut by_frame, mut by_host) = (regions.clone(), regions);
        by_frame.sort_by_key(|region| region.frame);
        by_host.sort_by_key(|region| region.host);
        let apart = by_frame.iter().all(fits)
            && by_frame.windows(2).all(|pair| pair[0].frame + pair[0].pages <= pair[1].frame)
            && by_host.windows(2).all(|pair| pair[0].host + pair[0].pages * PAGE_BYTES <= pair[1].host);
        if !apart {
            return Err(MemoryError::Layout("regions that overlap or have no extent".into()));
        }
        Ok(Self { by_frame, by_host })
    }

    pub fn regions(&self) -> &[Region] {
        &self.by_frame
    }

    /// The frame of a place; `None` where it is not the guest's memory.
    pub fn frame(&self, place: Place) -> Option<u64> {
        match place {
            Place::Host(host) => {
                let at = self.by_host.partition_point(|region| region.host <= host).checked_sub(1)?;
                let region = self.by_host[at];
                let page = (host - region.host) / PAGE_BYTES;
                (page < region.pages).then_some(region.frame + page)
            }
            Place::Guest(frame) => {
                let at = self.by_frame.partition_point(|region| region.frame <= frame).checked_sub(1)?;
                (frame - self.by_frame[at].frame < self.by_frame[at].pages).then_some(frame)
            }
        }
    }

    /// The host ranges (address, pages) of `pages` frames from `frame` on.
    ///
    /// # Errors
    /// `NoSuchMemory` if not all of them are.
    pub fn host(&self, frame: u64, pages: u32, mut tell: impl FnMut(u64, u64)) -> Result<(), MemoryError> {
        let none = MemoryError::NoSuchMemory { frame, pages };
        let end = frame.checked_add(u64::from(pages)).ok_or(none.clone())?;
        let mut from = frame;
        let mut at =
            self.by_frame.partition_point(|region| region.frame <= frame).checked_sub(1).ok_or(none.clone())?;
        while from < end {
            let region = self.by_frame.get(at).filter(|region| region.frame <= from).ok_or(none.clone())?;
            let until = end.min(region.frame + region.pages);
            if until <= from {
                return Err(none);
            }
            tell(region.host + (from - region.frame) * PAGE_BYTES, until - from);
            from = until;
            at += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_and_addresses_belong_together() {
        let low = Region { frame: 0, pages: 0xa0, host: 0x7000_0000 };
        let high = Region { frame: 0x100, pages: 0x100, host: 0x7010_0000 };
        let above = Region { frame: 0x200, pages: 0x10, host: 0x1000 };
        let places = Places::new(vec![above, high, low]).unwrap();
        assert_eq!(places.frame(Place::Host(0x7000_0fff)), Some(0));
        assert_eq!(places.frame(Place::Host(0x7000_0000 + 0xa0 * 4096)), None);
        assert_eq!(places.frame(Place::Host(0x2000)), Some(0x201));
        assert_eq!(places.frame(Place::Guest(0x1ff)), Some(0x1ff));
        assert_eq!(places.frame(Place::Guest(0xa0)), None);
        let host = |frame, pages| {
            let mut ranges = Vec::new();
            places.host(frame, pages, |host, pages| ranges.push((host, pages))).map(|()| ranges)
        };
        assert_eq!(host(0x1ff, 3).unwrap(), [(0x7010_0000 + 0xff * 4096, 1), (0x1000, 2)]);
        for (frame, pages) in [(0x9f, 2), (0xa0, 1), (0x20f, 2), (u64::MAX, 1), (u64::MAX - 1, u32::MAX)] {
            assert_eq!(host(frame, pages), Err(MemoryError::NoSuchMemory { frame, pages }));
        }
        assert!(Places::new(vec![low, Region { frame: 0x9f, ..high }]).is_err());
        assert!(Places::new(vec![low, Region { host: low.host, ..high }]).is_err());
        assert!(Places::new(vec![Region { pages: u64::MAX, ..low }]).is_err());
        assert!(Places::default().host(0, 1, |_, _| ()).is_err());
    }
}
