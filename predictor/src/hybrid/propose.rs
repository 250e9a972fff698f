//! What the experts name: pages that may follow a read, with all the evidence for them.
//!
//! - [`Evidence`]: what each expert says of some pages
//! - [`Proposals`]: pages of blocks with their evidence; what several experts name is one proposal

use super::blocks::Blocks;
use super::granules::Successor;
use super::runs::{Course, Run};
use super::temporal::Cursor;
use crate::access::{BLOCK_PAGES, Expert, MAX_PAGES};
use crate::experts::ExpertSet;
use crate::ordinals;
use crate::ordinals::mind::Word;
use crate::pageset::block_masks;

/// Proposals kept of one read.
const MAX_PROPOSALS: usize = 128;
/// Bits of [`Evidence::set`].
pub(super) const NEAR: usize = 2;
pub(super) const CHAIN: usize = 3;
/// Pages beyond a request whose neighbourhood is considered.
pub(super) const AROUND: u64 = 16;

/// What the experts say of a candidate; zero: nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Evidence {
    /// Length of the run and distance within it.
    pub(super) run: u8,
    /// How long the cursor has been right, and how far ahead.
    pub(super) temporal: u8,
    pub(super) closeness: u8,
    /// Place around the request.
    pub(super) near: u8,
    /// Count, steps and rank in the chain of blocks.
    pub(super) chain: u8,
    pub(super) course: u8,
    /// How long the cursor has been right that does not name the candidate.
    pub(super) unnamed: u8,
    /// How likely the LSTM holds what the evidence says; 0: it says nothing.
    pub(super) model: u8,
    pub(super) distance: u16,
}

impl Evidence {
    /// The best of both.
    pub(super) fn join(&mut self, other: &Evidence) {
        if other.run > self.run {
            (self.run, self.course) = (other.run, other.course);
        }
        if other.temporal > self.temporal {
            (self.temporal, self.closeness) = (other.temporal, other.closeness);
        }
        if self.near == 0 {
            self.near = other.near;
        }
        self.chain = self.chain.max(other.chain);
        self.distance = self.distance.min(other.distance);
    }

    /// What the LSTM says of it: its word for the surest of the symbols that this evidence stands for (see [`ordinals`]).
    /// `block` lies so many blocks beyond the read's.
    pub(super) fn heard(&self, word: &Word, block: i64) -> u8 {
        let mut level = 0;
        let mut hear = |symbol: usize| level = level.max(word[symbol]);
        if self.run > 0 {
            hear(0);
        }
        if self.temporal > 0 {
            hear(ordinals::LOG + usize::from(self.distance).clamp(1, ordinals::AHEAD) - 1);
        }
        if self.chain > 0 {
            let place = usize::from((self.chain - 1) / 8);
            // Further along the chain the first step has to be right before.
            hear(ordinals::CHAIN + if place >= 12 { 15 - place } else { 0 });
        }
        match block {
            0 => hear(ordinals::RECENT),
            1 => hear(ordinals::NEAR),
            -1 => hear(ordinals::NEAR + 1),
            _ => {}
        }
        level
    }

    /// Which experts speak: selects the mixer's weights.
    pub(super) fn set(&self) -> u8 {
        u8::from(self.run > 0)
            | u8::from(self.temporal > 0) << 1
            | u8::from(self.near > 0) << NEAR
            | u8::from(self.chain > 0) << CHAIN
    }

    pub(super) fn expert(&self) -> Expert {
        if self.run > 0 {
            return match self.course {
                1 => Expert::Backward,
                2 => Expert::Stride,
                _ => Expert::Sequential,
            };
        }
        if self.temporal > 0 {
            Expert::Log
        } else if self.chain > 0 {
            Expert::Markov
        } else {
            Expert::Spatial
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Proposal {
    pub(super) block: u64,
    pub(super) mask: u16,
    pub(super) evidence: Evidence,
}

/// What the experts name after one read.
#[derive(Debug)]
pub(super) struct Proposals {
    list: Vec<Proposal>,
}

/// What holds for all of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Pages a run is read ahead, at most.
    pub(super) window_pages: u64,
    pub(super) experts: ExpertSet,
}

impl Proposals {
    pub(super) fn new() -> Self {
        Self { list: Vec::with_capacity(MAX_PROPOSALS) }
    }

    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn get(&self, index: usize) -> Proposal {
        self.list[index]
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.list.capacity() * size_of::<Proposal>()
    }

    fn add(&mut self, blocks: &Blocks, first: u64, pages: u64, evidence: Evidence) {
        for (block, mask) in block_masks(first, pages as u32) {
            self.add_mask(blocks, block, mask, evidence);
        }
    }

    /// Adds a proposal; where it overlaps an earlier one, both experts speak for the pages.
    fn add_mask(&mut self, blocks: &Blocks, block: u64, mask: u16, evidence: Evidence) {
        if block >= MAX_PAGES / BLOCK_PAGES {
            return;
        }
        let mut mask = match blocks.find(block) {
            Some(entry) => mask & !entry.cached & !entry.issued,
            None => mask,
        };
        for index in 0..self.list.len() {
            if mask == 0 {
                return;
            }
            let proposal = &mut self.list[index];
            let both = proposal.mask & mask;
            if proposal.block != block || both == 0 {
                continue;
            }
            mask &= !both;
            if both == proposal.mask {
                proposal.evidence.join(&evidence);
            } else {
                proposal.mask &= !both;
                let mut joined = Proposal { mask: both, ..*proposal };
                joined.evidence.join(&evidence);
                if self.list.len() < MAX_PROPOSALS {
                    self.list.push(joined);
                }
            }
        }
        if mask != 0 && self.list.len() < MAX_PROPOSALS {
            self.list.push(Proposal { block, mask, evidence });
        }
    }

    pub(super) fn run(&mut self, blocks: &Blocks, limits: &Limits, run: &Run, (first, pages): (u64, u32)) {
        let n = u64::from(pages);
        let window = (n.max(2) << run.length.min(6)).min(limits.window_pages);
        let evidence = |distance: u64, course: u8| Evidence {
            run: run_evidence(run.length, (distance / n) as u32),
            course,
            distance: (distance / n).min(1000) as u16,
            ..Evidence::default()
        };
        let experts = limits.experts;
        match run.course {
            Course::Forward if experts.contains(Expert::Sequential) => {
                let (mut at, end) = (first + n, first + n + window);
                while at < end {
                    let to = ((at / BLOCK_PAGES + 1) * BLOCK_PAGES).min(end);
                    self.add(blocks, at, to - at, evidence(at - first - n, 0));
                    at = to;
                }
            }
            Course::Backward if experts.contains(Expert::Backward) => {
                let from = first.saturating_sub(window);
                let mut to = first;
                while to > from {
                    let at = ((to - 1) / BLOCK_PAGES * BLOCK_PAGES).max(from);
                    self.add(blocks, at, to - at, evidence(first - to, 1));
                    to = at;
                }
            }
            Course::Stride if experts.contains(Expert::Stride) => {
                for step in 1..=i64::from(run.length.min(8)) {
                    let Some(at) = first.checked_add_signed(run.stride * step) else { break };
                    self.add(blocks, at, n, evidence(step as u64 * n - n, 2));
                }
            }
            _ => {}
        }
    }

    /// The reads `ahead` of a cursor in the log, `(distance, first page, pages)` each.
    pub(super) fn log(&mut self, blocks: &Blocks, cursor: &Cursor, ahead: &[(u32, u64, u32)]) {
        let closeness = 1 + ((cursor.closeness * 8.0) as u8).min(7);
        for (distance, first, pages) in ahead {
            let evidence = Evidence {
                temporal: temporal_evidence(cursor.hits, *distance),
                closeness,
                distance: *distance as u16,
                ..Evidence::default()
            };
            self.add(blocks, *first, u64::from(*pages), evidence);
        }
    }

    /// A block of the chain.
    pub(super) fn chain(&mut self, blocks: &Blocks, successor: &Successor) {
        let place = (3 - successor.step.min(3)) * 4 + 3 - successor.rank;
        let evidence = Evidence {
            chain: 1 + place * 8 + successor.count.min(7),
            distance: u16::from(successor.step) + 1,
            ..Evidence::default()
        };
        self.add_mask(blocks, successor.block, u16::MAX, evidence);
    }

    /// What lies around the request.
    pub(super) fn near(&mut self, blocks: &Blocks, first: u64, pages: u32) {
        let near = Evidence { near: 1, distance: 1, ..Evidence::default() };
        self.add(blocks, first + u64::from(pages), AROUND, near);
        let at = first.saturating_sub(AROUND);
        self.add(blocks, at, first - at, near);
    }
}

/// Pages of a block's mask that lie about equally far from the request as the lowest of them.
pub(super) fn near_group(start: u64, mask: u16, (first, pages): (u64, u32)) -> u16 {
    let bit = mask.trailing_zeros();
    let page = start + u64::from(bit);
    let end = first + u64::from(pages);
    let span = if page >= end {
        match page - end {
            0..4 => 1,
            4..8 => 2,
            _ => 4,
        }
    } else {
        match first - page {
            0..=2 => 1,
            3..=8 => 2,
            _ => 8,
        }
    };
    let within = ((1u32 << span) - 1) << bit;
    mask & within as u16
}

/// A run's length and how far ahead of it a page lies, in requests: 1 to 64.
pub(super) fn run_evidence(length: u32, distance: u32) -> u8 {
    1 + log2(length).min(7) * 8 + (7 - log2(distance).min(7))
}

/// How long a cursor has been right and how far ahead of it a read lies: 1 to 64.
pub(super) fn temporal_evidence(hits: u32, distance: u32) -> u8 {
    1 + log2(hits).min(7) * 8 + (7 - log2(distance).min(7))
}

/// Bits needed to write a number: 0 for 0, 1 for 1, 2 for 2 and 3, …
pub(super) fn log2(value: u32) -> u8 {
    (u32::BITS - value.leading_zeros()) as u8
}
