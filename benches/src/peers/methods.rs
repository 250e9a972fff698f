//! The peers' methods: each request goes in, pages to prefetch come out.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use super::Peer;
use crate::trace::Request;

/// Pages in one Markov state: 64 KiB.
const GRANULE: u64 = 16;
/// Granules that are followed ahead.
const DEPTH: usize = 4;
/// A successor is believed from this count on: it followed twice.
const BELIEVED: i32 = 2;
/// Streams that readahead tells apart.
const STREAMS: usize = 64;
/// Largest readahead window in pages: 128 KiB.
const MAX_WINDOW: u64 = 32;
/// A stream is continued by a request that starts up to this many pages before its end…
const BEHIND: u64 = 8;
/// …or up to this many behind it.
const AHEAD: u64 = MAX_WINDOW / 8;
/// Distances that leap votes on.
const VOTERS: usize = 32;
/// Requests that leap prefetches ahead.
const LEAPS: i64 = 4;

/// The parts that a peer consists of.
#[derive(Debug)]
pub(crate) struct Method {
    readahead: Option<Readahead>,
    leap: Option<Leap>,
    markov: Option<Markov>,
}

impl Method {
    pub(crate) fn new(peer: Peer) -> Self {
        Self {
            readahead: matches!(peer, Peer::Readahead | Peer::MarkovReadahead).then(Readahead::default),
            leap: (peer == Peer::Leap).then(Leap::default),
            markov: matches!(peer, Peer::Markov | Peer::MarkovReadahead).then(Markov::default),
        }
    }

    /// Learns from a request, and prefetches after a read.
    pub(crate) fn observe(&mut self, request: &Request, prefetch: &mut dyn FnMut(u64)) {
        if let Some(markov) = &mut self.markov {
            markov.learn(request.first / GRANULE);
        }
        if !request.read {
            return;
        }
        if let Some(readahead) = &mut self.readahead {
            readahead.observe(request, prefetch);
        }
        if let Some(leap) = &mut self.leap {
            leap.observe(request, prefetch);
        }
        if let Some(markov) = &self.markov {
            markov.follow(request.last / GRANULE, prefetch);
        }
    }
}

/// A sequential stream; all in pages.
#[derive(Debug, Clone, Copy)]
struct Stream {
    next: u64,
    /// First page that was not prefetched yet.
    ahead: u64,
    window: u64,
    /// Time of the last use, in reads.
    used: u64,
}

#[derive(Debug, Default)]
struct Readahead {
    streams: Vec<Stream>,
    reads: u64,
}

impl Readahead {
    fn observe(&mut self, request: &Request, prefetch: &mut dyn FnMut(u64)) {
        self.reads += 1;
        let (next, pages, used) = (request.last + 1, request.pages(), self.reads);
        let continues = |stream: &&mut Stream| {
            request.first + BEHIND >= stream.next && request.first <= stream.next.saturating_add(AHEAD)
        };
        if let Some(stream) = self.streams.iter_mut().find(continues) {
            let window = MAX_WINDOW.min((stream.window * 2).max(pages * 2));
            let (from, to) = (stream.ahead.max(next), next + window);
            *stream = Stream { next, ahead: from.max(to), window, used };
            (from..to).for_each(prefetch);
            return;
        }
        let fresh = Stream { next, ahead: next, window: pages, used };
        if self.streams.len() < STREAMS {
            self.streams.push(fresh);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = fresh;
        }
    }
}

#[derive(Debug, Default)]
struct Leap {
    distances: VecDeque<i64>,
    previous: u64,
}

impl Leap {
    fn observe(&mut self, request: &Request, prefetch: &mut dyn FnMut(u64)) {
        self.distances.push_back(request.first.wrapping_sub(self.previous).cast_signed());
        self.previous = request.first;
        if self.distances.len() > VOTERS {
            self.distances.pop_front();
        }
        let Some(distance) = self.majority().filter(|distance| *distance != 0) else { return };
        for step in 1..=LEAPS {
            let Some(first) = request.first.checked_add_signed(distance * step) else { break };
            (first..first + request.pages()).for_each(&mut *prefetch);
        }
    }

    /// The distance that more than half of the votes are for, by Boyer and Moore's vote.
    fn majority(&self) -> Option<i64> {
        let (mut candidate, mut votes) = (0, 0usize);
        for &distance in &self.distances {
            match votes {
                0 => (candidate, votes) = (distance, 1),
                _ if distance == candidate => votes += 1,
                _ => votes -= 1,
            }
        }
        let count = self.distances.iter().filter(|distance| **distance == candidate).count();
        (count * 2 > self.distances.len()).then_some(candidate)
    }
}

/// Successors of a granule and their counts; a count of 0 is a free place.
type Successors = [(u64, i32); 4];

#[derive(Debug, Default)]
struct Markov {
    successors: FxHashMap<u64, Successors>,
    previous: Option<u64>,
}

impl Markov {
    fn learn(&mut self, granule: u64) {
        let Some(previous) = self.previous.replace(granule).filter(|previous| *previous != granule) else { return };
        let places = self.successors.entry(previous).or_default();
        if let Some((_, count)) = places.iter_mut().find(|(successor, count)| *count > 0 && *successor == granule) {
            *count += 2;
        } else if let Some(weakest) = places.iter_mut().min_by_key(|(_, count)| *count) {
            if weakest.1 <= 1 {
                *weakest = (granule, 1);
            } else {
                weakest.1 -= 1;
            }
        }
    }

    fn follow(&self, from: u64, prefetch: &mut dyn FnMut(u64)) {
        let mut at = from;
        for _ in 0..DEPTH {
            let Some(places) = self.successors.get(&at) else { return };
            // the first of equals, which `max_by_key` would not give
            let mut best = places[0];
            for &place in &places[1..] {
                if place.1 > best.1 {
                    best = place;
                }
            }
            if best.1 < BELIEVED {
                return;
            }
            at = best.0;
            (at * GRANULE..(at + 1) * GRANULE).for_each(&mut *prefetch);
        }
    }
}
