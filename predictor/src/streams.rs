//! Expert: up to [`STREAMS`] interleaved streams of one VM: ascending, descending, and constant stride.
//!
//! Streams are kept in move-to-front order. A request that continues none starts a new one, in the place of the least
//! recently continued. As in Linux' readahead, the window doubles while a stream is continued, and the next
//! window is proposed when half of the present one is used up, so that proposals are few and large.
//!
//! The probability is not guessed: every proposal belongs to a class (kind, how often the stream was continued, request
//! size, exact or with gaps, near or far part of the window), whose share of used pages is observed by the ledger.

use crate::access::Expert;
use crate::odds::Class;

/// Streams kept for a VM.
const STREAMS: usize = 64;
/// A request may start this many pages before the expected one (overlap, reordering) …
const BEHIND_PAGES: u64 = 8;
/// … or this many after it (a gap that is skipped), more for wide windows.
const AHEAD_PAGES: u64 = 4;
/// Two requests further apart than this do not start a stride.
const MAX_STRIDE_PAGES: u64 = 4096;
/// Requests proposed ahead of a stride, at most.
const MAX_STRIDE_AHEAD: u32 = 16;
/// How many of the latest streams a new request is compared with to find a stride.
const STRIDE_PARTNERS: usize = 4;

const FORWARD_CLASSES: usize = 6 * 3 * 2 * 2;
const BACKWARD_CLASSES: usize = 6 * 2;
const STRIDE_CLASSES: usize = 6 * 2;
const SINGLE_CLASSES: usize = 4;
/// Classes of this expert's proposals.
pub(crate) const CLASSES: usize = FORWARD_CLASSES + BACKWARD_CLASSES + STRIDE_CLASSES + SINGLE_CLASSES;

/// A range that may be read next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Proposal {
    pub(crate) first: u64,
    pub(crate) pages: u32,
    pub(crate) expert: Expert,
    pub(crate) class: Class,
    /// Probability before the class has observations.
    pub(crate) prior: f32,
    pub(crate) due_us: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One request so far.
    Single,
    Forward,
    Backward,
    Stride,
}

#[derive(Clone, Debug)]
struct Stream {
    kind: Kind,
    /// Last request: pages `first .. end`.
    first: u64,
    end: u64,
    /// Forward: first page not yet proposed. Backward: lowest page proposed. Stride: first page of the last proposed.
    frontier: u64,
    window: u64,
    /// Requests so far.
    run: u32,
    exact: bool,
    /// Distance between starts, if one was seen.
    delta: i64,
    at_us: u64,
    /// Smoothed time between requests.
    gap_us: u64,
}

/// What the table makes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Continued {
    /// The request continues a stream with at least this many requests before it (0: a new stream).
    pub(crate) run: u32,
}

#[derive(Debug, Default)]
pub(crate) struct StreamTable {
    streams: Vec<Stream>,
}

impl StreamTable {
    /// Takes in a read of pages `first .. first + pages` and adds what it leads to expect.
    pub(crate) fn observe(
        &mut self,
        first: u64,
        pages: u32,
        at_us: u64,
        max_window: u64,
        out: &mut Vec<Proposal>,
    ) -> Continued {
        let end = first + u64::from(pages);
        let Some(position) = self.find(first, end, max_window) else {
            self.start(first, end, at_us, out);
            return Continued { run: 0 };
        };
        self.streams[..=position].rotate_right(1);
        let stream = &mut self.streams[0];
        let before = stream.run;
        stream.advance(first, end, at_us, max_window);
        stream.propose(max_window, at_us, out);
        Continued { run: before }
    }

    /// What every stream leads to expect, whether it was proposed before or not.
    pub(crate) fn expected(&self, max_window: u64, out: &mut Vec<Proposal>) {
        for stream in &self.streams {
            let mut stream = stream.clone();
            stream.frontier = match stream.kind {
                Kind::Single | Kind::Forward => stream.end,
                Kind::Backward | Kind::Stride => stream.first,
            };
            let at_us = stream.at_us;
            stream.propose(max_window, at_us, out);
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.streams.capacity() * size_of::<Stream>()
    }

    fn find(&self, first: u64, end: u64, max_window: u64) -> Option<usize> {
        let mut best = None;
        for (position, stream) in self.streams.iter().enumerate() {
            // The latest exact continuation wins; one with a gap only if there is no exact one.
            match stream.fits(first, end, max_window) {
                Fit::Exact => return Some(position),
                Fit::Near => best = best.or(Some(position)),
                Fit::None => {}
            }
        }
        best
    }

    fn start(&mut self, first: u64, end: u64, at_us: u64, out: &mut Vec<Proposal>) {
        let delta = self.streams.iter().take(STRIDE_PARTNERS).map(|stream| distance(stream.first, first));
        let delta =
            delta.into_iter().find(|delta| *delta != 0 && delta.unsigned_abs() <= MAX_STRIDE_PAGES).unwrap_or(0);
        self.streams.truncate(STREAMS - 1);
        let pages = end - first;
        self.streams.insert(
            0,
            Stream {
                kind: Kind::Single,
                first,
                end,
                frontier: end,
                window: pages,
                run: 1,
                exact: true,
                delta,
                at_us,
                gap_us: 0,
            },
        );
        let size = match pages {
            1 => 0,
            2..=3 => 1,
            4..=15 => 2,
            _ => 3,
        };
        out.push(Proposal {
            first: end,
            pages: pages as u32,
            expert: Expert::Sequential,
            class: Class::stream(FORWARD_CLASSES + BACKWARD_CLASSES + STRIDE_CLASSES + size),
            prior: [0.15, 0.2, 0.3, 0.4][size],
            due_us: None,
        });
    }
}

enum Fit {
    Exact,
    Near,
    None,
}

impl Stream {
    fn fits(&self, first: u64, end: u64, max_window: u64) -> Fit {
        if first == self.end && matches!(self.kind, Kind::Single | Kind::Forward) {
            return Fit::Exact;
        }
        match self.kind {
            Kind::Forward => {
                let gap = AHEAD_PAGES.max(self.window.min(max_window) / 8);
                if first + BEHIND_PAGES >= self.end && first <= self.end + gap {
                    return Fit::Near;
                }
            }
            Kind::Single => {
                if end == self.first || self.delta != 0 && distance(self.first, first) == self.delta {
                    return Fit::Exact;
                }
                if first + BEHIND_PAGES >= self.end && first <= self.end + AHEAD_PAGES {
                    return Fit::Near;
                }
            }
            Kind::Backward => {
                if end == self.first {
                    return Fit::Exact;
                }
                if end <= self.first + 1 && end + AHEAD_PAGES >= self.first {
                    return Fit::Near;
                }
            }
            Kind::Stride => {
                if distance(self.first, first) == self.delta {
                    return Fit::Exact;
                }
            }
        }
        Fit::None
    }

    fn advance(&mut self, first: u64, end: u64, at_us: u64, max_window: u64) {
        let pages = end - first;
        let moved = distance(self.first, first);
        if self.kind == Kind::Single {
            self.kind = if first + BEHIND_PAGES >= self.end && first <= self.end + AHEAD_PAGES && end > self.end {
                Kind::Forward
            } else if end == self.first {
                Kind::Backward
            } else if self.delta != 0 && moved == self.delta {
                Kind::Stride
            } else {
                Kind::Single
            };
            self.frontier = match self.kind {
                Kind::Backward | Kind::Stride => first,
                Kind::Single | Kind::Forward => end,
            };
        }
        let gap_us = at_us.saturating_sub(self.at_us);
        self.gap_us = if self.run == 1 { gap_us } else { (self.gap_us * 7 + gap_us) / 8 };
        self.at_us = at_us;
        match self.kind {
            // A repeat inside what was read says nothing new.
            Kind::Single => return,
            Kind::Forward => {
                if end <= self.end {
                    return;
                }
                self.exact &= first == self.end;
                self.frontier = self.frontier.max(end);
            }
            Kind::Backward => {
                self.exact &= end == self.first;
                self.frontier = self.frontier.min(first);
            }
            Kind::Stride => {
                let passed = if self.delta > 0 { self.frontier < first } else { self.frontier > first };
                if passed {
                    self.frontier = first;
                }
            }
        }
        self.run = self.run.saturating_add(1);
        self.window = (self.window * 2).max(pages * 2).min(max_window.max(1));
        (self.first, self.end) = (first, end);
    }

    fn propose(&mut self, max_window: u64, at_us: u64, out: &mut Vec<Proposal>) {
        let pages = self.end - self.first;
        let run = run_bucket(self.run);
        let prior = [0.4, 0.65, 0.75, 0.85, 0.9, 0.93][run];
        // Near: within reach of the next two requests of this size.
        let near = pages * 2;
        let due = |distance: u64| Some(at_us.saturating_add(self.gap_us.saturating_mul(distance / pages.max(1) + 1)));
        let mut push = |first: u64, end: u64, expert, class, prior, due_us| {
            if first < end {
                let pages = u32::try_from(end - first).unwrap_or(u32::MAX);
                out.push(Proposal { first, pages, expert, class: Class::stream(class), prior, due_us });
            }
        };
        match self.kind {
            Kind::Single => {}
            Kind::Forward => {
                let to = self.end + self.window;
                if (self.frontier - self.end) * 2 > self.window {
                    return;
                }
                let size = usize::from(pages >= 3) + usize::from(pages >= 16);
                let class = ((run * 3 + size) * 2 + usize::from(self.exact)) * 2;
                let prior = if self.exact { prior } else { prior * 0.75 };
                let split = (self.end + near).clamp(self.frontier, to.max(self.frontier));
                let (near_due, far_due) = (due(self.frontier - self.end), due(split - self.end));
                push(self.frontier, split, Expert::Sequential, class, prior, near_due);
                push(split, to, Expert::Sequential, class + 1, prior * 0.85, far_due);
                self.frontier = self.frontier.max(to);
            }
            Kind::Backward => {
                let to = self.first.saturating_sub(self.window);
                if (self.first - self.frontier) * 2 > self.window {
                    return;
                }
                let class = FORWARD_CLASSES + run * 2;
                let split = self.first.saturating_sub(near).clamp(to.min(self.frontier), self.frontier);
                push(split, self.frontier, Expert::Backward, class, prior * 0.8, due(0));
                push(to, split, Expert::Backward, class + 1, prior * 0.7, due(near));
                self.frontier = self.frontier.min(to);
            }
            Kind::Stride => {
                let most = u64::from(self.run.min(MAX_STRIDE_AHEAD)).min(max_window / pages.max(1)).max(1);
                let class = FORWARD_CLASSES + BACKWARD_CLASSES + run * 2;
                let prior = [0.2, 0.3, 0.55, 0.75, 0.85, 0.9][run];
                for step in 1..=most {
                    let Some(first) = i64::try_from(step)
                        .ok()
                        .and_then(|step| step.checked_mul(self.delta))
                        .and_then(|offset| self.first.checked_add_signed(offset))
                    else {
                        break;
                    };
                    let ahead = if self.delta > 0 { first > self.frontier } else { first < self.frontier };
                    if ahead {
                        let far = usize::from(step > 2);
                        push(first, first + pages, Expert::Stride, class + far, prior, due(step * pages));
                        self.frontier = first;
                    }
                }
            }
        }
    }
}

fn distance(from: u64, to: u64) -> i64 {
    to as i64 - from as i64 // both below 2^36, see MAX_PAGES
}

fn run_bucket(run: u32) -> usize {
    match run {
        0..=1 => 0,
        2 => 1,
        3 => 2,
        4..=7 => 3,
        8..=15 => 4,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const WINDOW: u64 = 128;

    /// Pages proposed at all for a list of reads, and the share of reads that were wholly proposed before.
    fn run(reads: &[(u64, u32)]) -> (BTreeSet<u64>, f64) {
        let (mut table, mut out, mut proposed, mut hits) = (StreamTable::default(), Vec::new(), BTreeSet::new(), 0);
        for (i, &(first, pages)) in reads.iter().enumerate() {
            hits += usize::from((first..first + u64::from(pages)).all(|page| proposed.contains(&page)));
            table.observe(first, pages, i as u64 * 1000, WINDOW, &mut out);
            for proposal in out.drain(..).filter(|proposal| proposal.prior >= 0.5) {
                proposed.extend(proposal.first..proposal.first + u64::from(proposal.pages));
            }
        }
        (proposed, hits as f64 / reads.len() as f64)
    }

    #[test]
    fn a_sequential_reader_is_ahead_after_two_requests() {
        let reads: Vec<_> = (0..100).map(|i| (1000 + i * 8, 8)).collect();
        assert!(run(&reads).1 >= 0.97);
    }

    #[test]
    fn many_interleaved_streams_are_told_apart() {
        let reads: Vec<_> = (0..6000u64).map(|i| ((i % 60) * 100_000 + i / 60 * 4, 4)).collect();
        assert!(run(&reads).1 >= 0.95);
    }

    #[test]
    fn a_backward_reader_is_followed() {
        let reads: Vec<_> = (0..100).map(|i| (10_000 - i * 8, 8)).collect();
        assert!(run(&reads).1 >= 0.95);
    }

    #[test]
    fn a_constant_stride_is_followed_without_its_gaps() {
        let reads: Vec<_> = (0..100).map(|i| (1000 + i * 50, 2)).collect();
        let (proposed, hits) = run(&reads);
        assert!(hits >= 0.9, "{hits}");
        assert!(proposed.iter().all(|page| (page - 1000) % 50 < 2));
    }

    #[test]
    fn small_gaps_and_swapped_requests_do_not_end_a_stream() {
        let mut reads: Vec<_> = (0..100u64).map(|i| (1000 + i * 8 + u64::from(i % 7 == 0), 7)).collect();
        reads.swap(50, 51);
        assert!(run(&reads).1 >= 0.9, "{}", run(&reads).1);
    }

    #[test]
    fn random_requests_raise_nothing_likely() {
        let mut state = 1u64;
        let reads: Vec<_> = (0..2000)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 33, 4)
            })
            .collect();
        assert!(run(&reads).0.len() < 100);
    }

    #[test]
    fn the_window_is_bounded() {
        let (mut table, mut out) = (StreamTable::default(), Vec::new());
        for i in 0..1000u64 {
            table.observe(i * 8, 8, i, WINDOW, &mut out);
            for proposal in out.drain(..) {
                assert!(proposal.first + u64::from(proposal.pages) <= (i + 1) * 8 + WINDOW);
            }
        }
    }

    #[test]
    fn edges_of_the_storage_do_not_overflow() {
        let (mut table, mut out) = (StreamTable::default(), Vec::new());
        for first in [0, 40, 20, 0, 0, crate::access::MAX_PAGES - 1, crate::access::MAX_PAGES - 2, 0] {
            table.observe(first, 1, 0, WINDOW, &mut out);
        }
        assert!(!out.is_empty());
    }
}
