//! Interleaved runs of one VM: ascending, descending, and at a constant distance.
//!
//! Kept as columns, so that a request is compared with all of them in a few vector instructions; the one continued longest
//! ago makes room.

use super::MAX_PACE_US;

/// Runs kept for a VM.
const RUNS: usize = 32;
/// A request may start this many pages before the expected one (overlap, reordering) or after it (a gap).
const BEHIND: u64 = 8;
const AHEAD: u64 = 16;
/// How far below the last request a descending one may end.
const BELOW: u64 = 4;
/// Two requests further apart than this (pages) are no step of a constant distance.
const MAX_STRIDE: u64 = 4096;

/// How a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    Forward,
    Backward,
    Stride,
}

/// A continued run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) course: Course,
    /// Requests before this one.
    pub(crate) length: u32,
    /// Distance of starts, pages.
    pub(crate) stride: i64,
    /// Smoothed time between requests.
    pub(crate) gap_us: u64,
    /// Place in the table: the same for as long as the run is kept.
    pub(crate) slot: u8,
}

#[derive(Clone, Debug)]
pub(crate) struct Runs {
    first: [u64; RUNS],
    end: [u64; RUNS],
    used: [u32; RUNS],
    length: [u32; RUNS],
    stride: [i64; RUNS],
    at_us: [u64; RUNS],
    gap_us: [u64; RUNS],
    clock: u32,
    latest: usize,
}

impl Default for Runs {
    fn default() -> Self {
        Self {
            // Nothing continues a run that ends where no request can start.
            first: [u64::MAX / 2; RUNS],
            end: [u64::MAX / 2; RUNS],
            used: [0; RUNS],
            length: [0; RUNS],
            stride: [0; RUNS],
            at_us: [0; RUNS],
            gap_us: [0; RUNS],
            clock: 0,
            latest: 0,
        }
    }
}

impl Runs {
    /// Takes in a read; returns the run that it continues.
    pub(crate) fn observe(&mut self, first: u64, pages: u32, at_us: u64) -> Option<Run> {
        self.clock = self.clock.wrapping_add(1);
        let end = first + u64::from(pages);
        let (mut forward, mut backward, mut strided) = (0u32, 0u32, 0u32);
        for run in 0..RUNS {
            forward |= u32::from(first.wrapping_sub(self.end[run]).wrapping_add(BEHIND) <= BEHIND + AHEAD) << run;
            backward |= u32::from(self.first[run].wrapping_sub(end).wrapping_add(1) <= BELOW + 1) << run;
            let step = first.wrapping_sub(self.first[run]) as i64;
            strided |= u32::from(step == self.stride[run] && step != 0) << run;
        }
        let (course, matching) = if forward != 0 {
            (Course::Forward, forward)
        } else if strided != 0 {
            (Course::Stride, strided)
        } else if backward != 0 {
            (Course::Backward, backward)
        } else {
            self.start(first, end, at_us);
            return None;
        };
        let run = self.latest_of(matching);
        let gap = at_us.saturating_sub(self.at_us[run]).min(MAX_PACE_US);
        self.gap_us[run] = if self.length[run] == 0 { gap } else { (self.gap_us[run] * 7 + gap) / 8 };
        self.at_us[run] = at_us;
        self.used[run] = self.clock;
        self.length[run] = self.length[run].saturating_add(1);
        self.stride[run] = first.wrapping_sub(self.first[run]) as i64;
        // A repeat inside a run says nothing of where it stands.
        self.end[run] = if course == Course::Forward { end.max(self.end[run].min(end + BEHIND)) } else { end };
        self.first[run] = first;
        self.latest = run;
        let (length, stride, gap_us) = (self.length[run], self.stride[run], self.gap_us[run]);
        Some(Run { course, length, stride, gap_us, slot: run as u8 })
    }

    fn latest_of(&self, matching: u32) -> usize {
        let mut best = matching.trailing_zeros() as usize;
        let mut rest = matching & (matching - 1);
        while rest != 0 {
            let run = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            if self.clock.wrapping_sub(self.used[run]) < self.clock.wrapping_sub(self.used[best]) {
                best = run;
            }
        }
        best
    }

    fn start(&mut self, first: u64, end: u64, at_us: u64) {
        let mut oldest = 0;
        for run in 1..RUNS {
            if self.clock.wrapping_sub(self.used[run]) > self.clock.wrapping_sub(self.used[oldest]) {
                oldest = run;
            }
        }
        // A step from the latest request may be the first of many.
        let step = first.wrapping_sub(self.first[self.latest]) as i64;
        self.stride[oldest] = if step.unsigned_abs() <= MAX_STRIDE { step } else { 0 };
        (self.first[oldest], self.end[oldest]) = (first, end);
        (self.used[oldest], self.length[oldest]) = (self.clock, 0);
        (self.at_us[oldest], self.gap_us[oldest]) = (at_us, 0);
        self.latest = oldest;
    }
}
