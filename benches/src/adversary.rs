//! Traces made to be foreseen wrongly: random reads, patterns that break just when they have earned trust, and an opponent
//! that watches what is prefetched and reads something else. Everything follows from a seed.
//!
//! A pattern never returns to where it was, except where returning is the pattern: what is prefetched beyond a break is
//! lost for good.

use std::cell::RefCell;
use std::rc::Rc;

use rustc_hash::FxHashSet;

use crate::trace::Request;

/// Requests in a trace.
const REQUESTS: usize = 40_000;
/// Pages of the storage: 16 GiB, so that jumps land on untouched ground.
pub(crate) const END_PAGE: u64 = 4 << 20;
/// Pages in a Markov state and in the predictor's blocks.
const BLOCK: u64 = 16;

/// The kinds of trace that are fixed beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Uniformly random reads of 1 to 16 pages on a part of the storage, so that some repeat.
    Random,
    /// Sequential runs that stop after this many requests.
    Runs(u64),
    /// Runs of 2 to 32 requests.
    MixedRuns,
    /// A constant stride that holds for this many requests, then changes with the place.
    Strides(u64),
    /// Places with two successors each: one is confirmed, then the other comes, and so on.
    FlippingLoop,
    /// A recorded start whose first blocks come again and are followed by a wholly new set.
    ChangedSet,
    /// Sixteen runs at once, in random order, each of which stops after 2 to 12 requests.
    Interleaved,
}

impl Pattern {
    pub(crate) const ALL: [Self; 9] = [
        Self::Random,
        Self::Runs(3),
        Self::Runs(5),
        Self::Runs(9),
        Self::MixedRuns,
        Self::Strides(4),
        Self::FlippingLoop,
        Self::ChangedSet,
        Self::Interleaved,
    ];

    pub(crate) fn name(self) -> String {
        match self {
            Self::Random => "random".to_owned(),
            Self::Runs(requests) => format!("runs of {requests}"),
            Self::MixedRuns => "mixed runs".to_owned(),
            Self::Strides(requests) => format!("strides of {requests}"),
            Self::FlippingLoop => "flipping loop".to_owned(),
            Self::ChangedSet => "changed set".to_owned(),
            Self::Interleaved => "interleaved runs".to_owned(),
        }
    }

    pub(crate) fn trace(self, seed: u64) -> Vec<Request> {
        let mut maker = Maker::new(seed);
        while maker.requests.len() < REQUESTS {
            match self {
                Self::Random => {
                    let first = maker.dice.below(END_PAGE / 64);
                    let pages = 1 + maker.dice.below(BLOCK);
                    maker.read(first, pages);
                }
                Self::Runs(requests) => maker.run(requests),
                Self::MixedRuns => {
                    let requests = 2 + maker.dice.below(31);
                    maker.run(requests);
                }
                Self::Strides(requests) => {
                    let stride = 9 + maker.dice.below(500);
                    let mut first = maker.fresh(requests * stride + BLOCK);
                    let pages = 1 + maker.dice.below(8);
                    for _ in 0..requests {
                        maker.read(first, pages);
                        first += stride;
                    }
                }
                Self::FlippingLoop => maker.flipping_loop(),
                Self::ChangedSet => maker.changed_set(),
                Self::Interleaved => maker.interleaved(),
            }
        }
        maker.requests.truncate(REQUESTS);
        maker.requests
    }
}

/// Numbers that follow from a seed: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to `end` − 1.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

struct Maker {
    dice: Dice,
    now_us: u64,
    requests: Vec<Request>,
}

impl Maker {
    fn new(seed: u64) -> Self {
        Self { dice: Dice(seed), now_us: 0, requests: Vec::with_capacity(REQUESTS) }
    }

    fn read(&mut self, first: u64, pages: u64) {
        self.now_us += 200 + self.dice.below(1800);
        self.requests.push(Request { at_us: self.now_us, read: true, first, last: first + pages - 1 });
    }

    /// A random place with room for `pages`, at the start of a block.
    fn fresh(&mut self, pages: u64) -> u64 {
        self.dice.below((END_PAGE - pages) / BLOCK) * BLOCK
    }

    fn run(&mut self, requests: u64) {
        let pages = 1 + self.dice.below(BLOCK);
        let mut first = self.fresh(requests * pages);
        for _ in 0..requests {
            self.read(first, pages);
            first += pages;
        }
    }

    /// 512 places in turn; each leads to one of two others, and changes over once that one was confirmed.
    fn flipping_loop(&mut self) {
        let places: Vec<[u64; 3]> = (0..512).map(|_| [(); 3].map(|()| self.fresh(BLOCK))).collect();
        for round in 0..8 {
            for place in &places {
                self.read(place[0], BLOCK);
                self.read(place[1 + round / 2 % 2], BLOCK);
            }
        }
    }

    /// A set of 256 reads that comes twice, after pauses; the third time only its first 8 reads do.
    fn changed_set(&mut self) {
        let set: Vec<(u64, u64)> = (0..256).map(|_| (self.fresh(BLOCK), 1 + self.dice.below(BLOCK))).collect();
        for round in 0..3 {
            self.now_us += 30_000_000;
            for (index, &(first, pages)) in set.iter().enumerate() {
                let elsewhere = self.fresh(BLOCK);
                self.read(if round == 2 && index >= 8 { elsewhere } else { first }, pages);
            }
        }
    }

    fn interleaved(&mut self) {
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for _ in 0..256 {
            while runs.len() < 16 {
                let (requests, pages) = (2 + self.dice.below(11), 1 + self.dice.below(8));
                runs.push((self.fresh(requests * pages), pages, requests));
            }
            let at = self.dice.below(16) as usize;
            let (first, pages, left) = runs[at];
            self.read(first, pages);
            runs[at] = (first + pages, pages, left - 1);
            if left == 1 {
                runs.swap_remove(at);
            }
        }
    }
}

/// Pages that were wished for, shared between whoever wishes and the opponent.
pub(crate) type Wished = Rc<RefCell<FxHashSet<u64>>>;

/// Reads on in streams, strides and loops, and leaves each of them the moment its next page was wished for: no prefetched
/// page is ever read.
#[derive(Debug)]
pub(crate) struct Opponent {
    dice: Dice,
    wished: Wished,
    now_us: u64,
    left: usize,
    /// Next page, distance to the one after, pages of a request.
    streams: [(u64, u64, u64); 4],
    turn: usize,
}

impl Opponent {
    pub(crate) fn new(seed: u64, wished: Wished) -> Self {
        let mut opponent =
            Self { dice: Dice(seed), wished, now_us: 0, left: REQUESTS, streams: [(0, 0, 0); 4], turn: 0 };
        for turn in 0..opponent.streams.len() {
            opponent.streams[turn] = opponent.stream();
        }
        opponent
    }

    /// A sequential or strided stream from a place that nobody has wished for.
    fn stream(&mut self) -> (u64, u64, u64) {
        let pages = 1 + self.dice.below(8);
        let stride = if self.dice.below(2) == 0 { pages } else { pages + self.dice.below(64) };
        loop {
            let first = self.dice.below(END_PAGE / BLOCK / 2) * BLOCK;
            if !self.is_wished(first, pages) {
                return (first, stride, pages);
            }
        }
    }

    fn is_wished(&self, first: u64, pages: u64) -> bool {
        let wished = self.wished.borrow();
        (first..first + pages).any(|page| wished.contains(&page))
    }
}

impl Iterator for Opponent {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        self.left = self.left.checked_sub(1)?;
        // stay with a stream for a while: what nobody foresees need not be left
        if self.dice.below(16) == 0 {
            self.turn = self.dice.below(self.streams.len() as u64) as usize;
        }
        let (first, stride, pages) = self.streams[self.turn];
        let ends = first + stride + pages >= END_PAGE;
        let (first, stride, pages) =
            if ends || self.is_wished(first, pages) { self.stream() } else { (first, stride, pages) };
        self.streams[self.turn] = (first + stride, stride, pages);
        self.now_us += 200 + self.dice.below(1800);
        Some(Request { at_us: self.now_us, read: true, first, last: first + pages - 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_follow_from_their_seed_and_stay_on_the_storage() {
        for pattern in Pattern::ALL {
            let trace = pattern.trace(1);
            assert_eq!(trace, pattern.trace(1));
            assert_ne!(trace, pattern.trace(2));
            assert_eq!(trace.len(), REQUESTS);
            assert!(
                trace.iter().all(|request| request.first <= request.last && request.last < END_PAGE),
                "{pattern:?}"
            );
        }
    }

    #[test]
    fn the_opponent_never_reads_what_was_wished_for() {
        let wished = Wished::default();
        let mut next = 0;
        for request in Opponent::new(7, Rc::clone(&wished)) {
            assert!((request.first..=request.last).all(|page| !wished.borrow().contains(&page)), "{request:?}");
            assert!(request.last < END_PAGE);
            // a readahead of 8 pages
            wished.borrow_mut().extend(request.last + 1..request.last + 9);
            next += u64::from(request.first == request.last + 1);
        }
        assert_eq!(next, 0);
        // left alone, it does what can be foreseen
        let alone: Vec<Request> = Opponent::new(7, Wished::default()).collect();
        let continued = alone.windows(2).filter(|pair| pair[1].first == pair[0].last + 1).count();
        assert!(continued > alone.len() / 4, "{continued}");
    }
}
