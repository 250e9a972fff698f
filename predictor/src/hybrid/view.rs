//! The contexts in which a candidate appears: what is known of its block and of the pages around it.

use super::blocks::Blocks;
use super::mixer::{Contexts, INPUTS, MODEL, NOWHERE, OWN, Places, SHARED};
use super::propose::{AROUND, Evidence, log2, run_evidence, temporal_evidence};
use crate::ordinals::mind::LEVELS;

/// Predictions that the expectations of [`expected`] are worth.
const EXPECTED: u16 = 8;

/// Contexts before anything was seen: a run goes on and a log repeats itself the likelier the longer
/// it has done so, and what a log that proved right does not name is not read. Shares
/// as any readahead takes them for granted, soon outweighed by what is seen.
pub(super) fn expected() -> Contexts {
    let mut contexts = Contexts::new();
    let (goes_on, repeats) =
        ([0.3, 0.5, 0.65, 0.75, 0.85, 0.9, 0.93, 0.95], [0.2, 0.4, 0.55, 0.7, 0.8, 0.85, 0.9, 0.9]);
    for (follows, probability) in [0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.03, 0.03].into_iter().enumerate() {
        contexts.expect(Contexts::place(1, unnamed(1 + follows as u32)), EXPECTED, probability);
    }
    for length in 0..8u32 {
        for distance in 0..8u32 {
            let far = 1.0 - 0.05 * distance as f32;
            let of = |value: u32| 1u32.checked_shl(value.wrapping_sub(1)).unwrap_or(0);
            let run = u32::from(run_evidence(of(length), of(distance)));
            let temporal = u32::from(temporal_evidence(of(length), of(distance)));
            for detail in 0..32 {
                contexts.expect(Contexts::place(0, run * 32 + detail), EXPECTED, goes_on[length as usize] * far);
            }
            for close in 0..16 {
                contexts.expect(Contexts::place(1, temporal * 16 + close), EXPECTED, repeats[length as usize] * far);
            }
        }
    }
    contexts
}

/// Value of the log's context for a candidate that a cursor does not name.
fn unnamed(follows: u32) -> u32 {
    (80 + follows) * 16
}

/// A block and the edges of its neighbours.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    /// Two pages of the block before, the block's 16, two of the block after: touched at any time, and cached.
    ever: u32,
    cached: u32,
    visits: u32,
    age: u32,
    filled: u32,
    region: u32,
}

impl View {
    pub(super) fn of(blocks: &Blocks, block: u64, clock: u32) -> Self {
        let masks = |block: Option<u64>| {
            block.and_then(|block| blocks.find(block)).map_or((0, 0), |entry| (entry.ever, entry.cached))
        };
        let (before, after) = (masks(block.checked_sub(1)), masks(Some(block + 1)));
        let entry = blocks.find(block);
        let (ever, cached) = entry.map_or((0, 0), |entry| (entry.ever, entry.cached));
        let join = |before: u16, own: u16, after: u16| {
            u32::from(before >> 14) | u32::from(own) << 2 | (u32::from(after) & 3) << 18
        };
        Self {
            ever: join(before.0, ever, after.0),
            cached: join(before.1, cached, after.1),
            visits: entry.map_or(0, |entry| u32::from(entry.visits.min(7))),
            age: entry.map_or(0, |entry| 1 + u32::from(log2(clock.wrapping_sub(entry.at)).min(15)) / 2),
            filled: ever.count_ones().div_ceil(2),
            region: u32::from(log2(blocks.density(block)).min(9)),
        }
    }

    /// Contexts that all pages of the block have in common.
    pub(super) fn shared(&self, evidence: &Evidence, size: u32, mask: u16, yields: u32) -> Places {
        let (run, temporal, close) =
            (u32::from(evidence.run), u32::from(evidence.temporal), u32::from(evidence.closeness));
        let chain = u32::from(evidence.chain);
        let known = u32::from(mask) & self.ever >> 2;
        let known = if known == 0 {
            0
        } else if known == u32::from(mask) {
            2
        } else {
            1
        };
        let mut places = [NOWHERE; INPUTS];
        if run > 0 {
            places[0] = Contexts::place(0, (run * 8 + size) * 4 + u32::from(evidence.course));
        }
        if temporal > 0 {
            places[1] = Contexts::place(1, temporal * 16 + close);
            places[2] = Contexts::place(2, (temporal * 4 + known) * 16 + self.age);
        } else if evidence.unnamed > 0 {
            places[1] = Contexts::place(1, unnamed(u32::from(evidence.unnamed)));
        }
        places[3] = Contexts::place(3, run * 80 + temporal);
        if chain > 0 {
            places[4] = Contexts::place(4, (chain * 16 + self.filled) * 4 + known);
        }
        places[5] = Contexts::place(5, (self.visits * 16 + self.filled) * 16 + self.region);
        places[6] = Contexts::place(6, yields * 16 + u32::from(evidence.set()));
        if evidence.model > 0 {
            let far = u32::from(log2(u32::from(evidence.distance)).min(7));
            let said = (u32::from(evidence.set()) * 8 + far) * LEVELS + u32::from(evidence.model);
            places[MODEL] = Contexts::place(MODEL, said);
        }
        places
    }

    /// Contexts of some pages of the block, which starts at page `start`.
    pub(super) fn own(
        &self,
        evidence: &Evidence,
        start: u64,
        group: u16,
        (first, pages): (u64, u32),
        size: u32,
    ) -> [u16; OWN] {
        let (low, high) = (group.trailing_zeros(), 15 - group.leading_zeros());
        let (end, page) = (first + u64::from(pages), start + u64::from(low));
        let near = if evidence.near == 0 {
            0
        } else if page >= end {
            (page - end).min(AROUND) as u32 + 1
        } else {
            24 + u32::from(log2(first.saturating_sub(start + u64::from(high)) as u32).min(6))
        };
        // Neighbours: 2 cached, 1 touched once, 0 never.
        let state = |at: u32| (self.ever >> at & 1) + (self.cached >> at & 1);
        let around = state(low + 1) * 9 + state(high + 3) * 3 + state(low);
        let known = u32::from(group) & self.ever >> 2;
        let known = if known == 0 {
            0
        } else if known == u32::from(group) {
            2
        } else {
            1
        };
        let span = u32::from(log2(group.count_ones()));
        let speaks = u32::from(evidence.set() & 11);
        let mut places = [NOWHERE; OWN];
        if near > 0 {
            places[0] = Contexts::place(SHARED, ((near * 16 + self.filled) * 8 + size) * 8 + span);
            places[1] = Contexts::place(SHARED + 1, (near * 32 + around) * 4 + known);
        }
        places[2] = Contexts::place(SHARED + 2, around * 16 + self.age);
        places[3] = Contexts::place(SHARED + 3, ((self.age * 4 + known) * 16 + speaks) * 8 + span);
        places[4] = Contexts::place(
            SHARED + 4,
            ((near * 16 + self.filled) * 16 + self.region) * 2 + u32::from(evidence.chain > 0),
        );
        places
    }
}
