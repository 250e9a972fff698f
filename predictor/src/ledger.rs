//! What was touched and what was proposed lately, by 64 KiB block. It serves three ends:
//!
//! - no page is proposed twice, unless a better probability is found, time passes, or an outcome says it was lost;
//! - proposals are *labelled* without asking the cache: [`LABEL_AFTER_S`] after the first proposal in a block, the
//!   share of its proposed pages that a guest read goes into the calibration of the proposal's class. This also holds
//!   for candidates that nobody prefetched because their probability was too low, so a class can earn its way up;
//! - the spatial expert: each time the number of touched pages in a block enters a new bucket, it guesses that the
//!   block's other pages are read too, unless another expert proposed them already. The guess belongs to the class of
//!   that moment (pages touched so far, how full the two neighbour blocks are, single-page request or not) and is
//!   labelled like a proposal.
//!
//! The table is set-associative with a fixed size: [`WAYS`] entries of 48 bytes a set, the least recently active
//! leaves.

use crate::access::Expert;
use crate::odds::{Calibration, Class};
use std::collections::VecDeque;

const WAYS: usize = 4;
/// Proposals and spatial states are labelled this long after they were made. A readahead page not used by then was
/// not worth fetching from a small cache.
const LABEL_AFTER_S: u32 = 20;
/// Blocks waiting for their label; beyond it the oldest is labelled early, so that a busy guest that changes its ways
/// is followed within some hundred requests.
const LABEL_QUEUE: usize = 512;
/// Touched and proposed pages count as new again after this long without activity in their block.
const FORGET_AFTER_S: u32 = 300;
/// A page is proposed again only if its probability rose by at least this much.
const BETTER_BY: f32 = 0.08;
const VACANT: u32 = u32::MAX;

/// Buckets of "pages of the block touched so far": 1, 2, 3–4, 5–8, 9–15.
const COUNT_BUCKETS: usize = 5;
/// Classes of the spatial expert: count bucket × neighbours' fill (4) × single-page request (2).
pub(crate) const SPATIAL_CLASSES: usize = COUNT_BUCKETS * 4 * 2;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// By count bucket: the pages guessed by the spatial expert when the bucket was entered; 0 if it was not.
    guessed: [u16; COUNT_BUCKETS],
    /// By count bucket, three bits each: the rest of the guess's class.
    guess_class: u16,
    /// [`VACANT`], or the block's index.
    block: u32,
    /// Second of the last activity.
    at_s: u32,
    touched: u16,
    proposed: u16,
    /// Part of `proposed`: by another expert than the spatial one.
    foreign: u16,
    /// Proposed pages that still wait for their label, all of class `class`.
    pending: u16,
    class: Class,
    /// Probability at which the proposed pages were proposed.
    probability: f32,
    queued: bool,
}

impl Entry {
    const EMPTY: Self = Self {
        guessed: [0; COUNT_BUCKETS],
        guess_class: 0,
        block: VACANT,
        at_s: 0,
        touched: 0,
        proposed: 0,
        foreign: 0,
        pending: 0,
        class: Class::NONE,
        probability: 0.0,
        queued: false,
    };
}

/// A guess of the spatial expert: these pages of the touched block are read too.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RestOfBlock {
    pub(crate) mask: u16,
    pub(crate) probability: f32,
}

/// What is remembered of a block: page masks, the probability of the proposed pages, the second of its last activity.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noted {
    pub(crate) touched: u16,
    pub(crate) proposed: u16,
    pub(crate) probability: f32,
    pub(crate) at_s: u32,
}

#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Vec<Entry>,
    set_mask: usize,
    queue: VecDeque<(u32, u32)>,
    now_s: u32,
}

impl Ledger {
    /// A table for about `blocks` blocks (rounded up to a power of two, at least 256).
    pub(crate) fn new(blocks: usize) -> Self {
        let sets = blocks.clamp(256, 1 << 24).next_power_of_two() / WAYS;
        Self {
            entries: vec![Entry::EMPTY; sets * WAYS],
            set_mask: sets - 1,
            queue: VecDeque::with_capacity(LABEL_QUEUE + 1),
            now_s: 0,
        }
    }

    /// Moves time on and labels what is due.
    pub(crate) fn advance(&mut self, at_us: u64, calibration: &mut Calibration) {
        self.now_s = self.now_s.max(u32::try_from(at_us / 1_000_000).unwrap_or(u32::MAX));
        while let Some(&(block, since_s)) = self.queue.front() {
            if since_s.saturating_add(LABEL_AFTER_S) > self.now_s && self.queue.len() <= LABEL_QUEUE {
                break;
            }
            self.queue.pop_front();
            if let Some(index) = self.find(block) {
                settle(&mut self.entries[index], calibration);
            }
        }
    }

    /// Records a guest's read of `mask` in `block`; true if some of it is new.
    pub(crate) fn read(&mut self, block: u64, mask: u16, calibration: &mut Calibration) -> bool {
        let index = self.entry(block as u32, calibration);
        let entry = &mut self.entries[index];
        let fresh = mask & !entry.touched;
        entry.touched |= mask;
        fresh != 0
    }

    /// What the spatial expert makes of a read of new pages in `block` by a request of `request_pages` pages. Ask it
    /// after the other experts have proposed.
    pub(crate) fn rest_of_block(
        &mut self,
        block: u64,
        request_pages: u32,
        calibration: &mut Calibration,
    ) -> Option<RestOfBlock> {
        let index = self.entry(block as u32, calibration);
        let entry = &self.entries[index];
        let mask = !entry.touched & !entry.foreign;
        let bucket = count_bucket(entry.touched.count_ones());
        if mask == 0 || entry.guessed[bucket] != 0 {
            return None;
        }
        let around = self.touched(block.wrapping_sub(1)).count_ones() + self.touched(block + 1).count_ones();
        let fill = match around {
            0 => 0u16,
            1..=6 => 1,
            7..=20 => 2,
            _ => 3,
        };
        let state = fill << 1 | u16::from(request_pages == 1);
        self.enqueue(index);
        let entry = &mut self.entries[index];
        entry.guessed[bucket] = mask;
        entry.guess_class &= !(7 << (3 * bucket));
        entry.guess_class |= state << (3 * bucket);
        // Prior: the fuller the block and its neighbourhood, the likelier the rest; corrected by labels within seconds.
        let prior = 0.08 + 0.06 * bucket as f32 + 0.08 * f32::from(fill);
        let odds = calibration.spatial[bucket * 8 + usize::from(state)];
        Some(RestOfBlock { mask, probability: odds.probability(prior) })
    }

    /// Records that a guest overwrote `mask` in `block`: nothing is left to fetch there, and what was proposed was
    /// wrong.
    pub(crate) fn written(&mut self, block: u64, mask: u16, calibration: &mut Calibration) {
        let index = self.entry(block as u32, calibration);
        let entry = &mut self.entries[index];
        let wrong = entry.pending & mask & !entry.touched;
        calibration.label(entry.class, 0, wrong.count_ones());
        entry.pending &= !wrong;
        // Written pages are neither hits nor misses of the spatial expert.
        entry.guessed.iter_mut().for_each(|guessed| *guessed &= !(mask & !entry.touched));
        entry.touched |= mask;
    }

    /// Which pages of `mask` are worth proposing at `probability`: not touched, and not proposed about as likely.
    /// Those are recorded as proposed.
    pub(crate) fn propose(
        &mut self,
        block: u64,
        mask: u16,
        probability: f32,
        (expert, class): (Expert, Class),
        calibration: &mut Calibration,
    ) -> u16 {
        let index = self.entry(block as u32, calibration);
        let entry = &mut self.entries[index];
        let better = probability >= entry.probability + BETTER_BY;
        let fresh = mask & !entry.touched & if better { u16::MAX } else { !entry.proposed };
        if fresh == 0 {
            return 0;
        }
        // One probability stands for all proposed pages of the block; the lower one, so that none is held back.
        entry.probability = if entry.proposed & !fresh == 0 { probability } else { entry.probability.min(probability) };
        entry.proposed |= fresh;
        if expert == Expert::Spatial {
            entry.foreign &= !fresh;
        } else {
            entry.foreign |= fresh;
        }
        if class != Class::NONE && (entry.pending == 0 || entry.class == class) {
            entry.class = class;
            entry.pending |= fresh;
            self.enqueue(index);
        }
        fresh
    }

    /// Pages of the range may be proposed again: a proposal was lost, or the cache dropped them.
    pub(crate) fn forget(&mut self, block: u64, mask: u16, calibration: &mut Calibration) {
        if let Some(index) = self.find(block as u32) {
            let entry = &mut self.entries[index];
            let unread = entry.pending & mask & !entry.touched;
            calibration.label(entry.class, 0, unread.count_ones());
            entry.pending &= !unread;
            entry.proposed &= !mask;
            entry.foreign &= !mask;
            entry.touched &= !mask;
        }
    }

    /// Forgets every touch and proposal; what was learned from them stays.
    pub(crate) fn clear(&mut self, calibration: &mut Calibration) {
        for entry in &mut self.entries {
            settle(entry, calibration);
            *entry = Entry::EMPTY;
        }
        self.queue.clear();
    }

    /// What is remembered of `block` at `at_us`.
    pub(crate) fn noted(&self, block: u64, at_us: u64) -> Option<Noted> {
        let entry = &self.entries[u32::try_from(block).ok().and_then(|block| self.find(block))?];
        let now_s = self.now_s.max(u32::try_from(at_us / 1_000_000).unwrap_or(u32::MAX));
        (now_s.saturating_sub(entry.at_s) <= FORGET_AFTER_S).then_some(Noted {
            touched: entry.touched,
            proposed: entry.proposed,
            probability: entry.probability,
            at_s: entry.at_s,
        })
    }

    /// Pages of `block` touched lately.
    pub(crate) fn touched(&self, block: u64) -> u16 {
        u32::try_from(block).ok().and_then(|block| self.find(block)).map_or(0, |index| {
            let entry = &self.entries[index];
            if self.is_stale(entry) { 0 } else { entry.touched }
        })
    }

    /// Makes the pages of `mask` that were last touched, or proposed about as likely, more than `seconds` ago new
    /// again, without judging what was proposed; returns the others.
    pub(crate) fn renew(&mut self, block: u64, mask: u16, probability: f32, seconds: u32) -> u16 {
        let Some(index) = self.find(block as u32) else { return 0 };
        let recent = self.now_s.saturating_sub(self.entries[index].at_s) <= seconds;
        let entry = &mut self.entries[index];
        let proposed = if probability >= entry.probability + BETTER_BY { 0 } else { entry.proposed };
        let handled = if recent { mask & (entry.touched | proposed) } else { 0 };
        let new = mask & !handled;
        entry.touched &= !new;
        entry.proposed &= !new;
        entry.foreign &= !new;
        entry.pending &= !new;
        entry.guessed.iter_mut().for_each(|guessed| *guessed &= !new);
        handled
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>() + self.queue.capacity() * size_of::<(u32, u32)>()
    }

    fn set_of(&self, block: u32) -> usize {
        // Fibonacci hashing: neighbouring blocks fall into different sets.
        ((u64::from(block).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & self.set_mask) * WAYS
    }

    fn find(&self, block: u32) -> Option<usize> {
        if block == VACANT {
            return None;
        }
        let set = self.set_of(block);
        (set..set + WAYS).find(|&index| self.entries[index].block == block)
    }

    fn is_stale(&self, entry: &Entry) -> bool {
        self.now_s.saturating_sub(entry.at_s) > FORGET_AFTER_S
    }

    /// The entry of `block`, made if need be, marked as active now.
    fn entry(&mut self, block: u32, calibration: &mut Calibration) -> usize {
        let set = self.set_of(block);
        let mut victim = set;
        for index in set..set + WAYS {
            let entry = &self.entries[index];
            if entry.block == block {
                if self.is_stale(entry) {
                    victim = index;
                    break;
                }
                self.entries[index].at_s = self.now_s;
                return index;
            }
            let oldest = &self.entries[victim];
            if entry.block == VACANT && oldest.block != VACANT
                || (entry.block == VACANT) == (oldest.block == VACANT) && entry.at_s < oldest.at_s
            {
                victim = index;
            }
        }
        settle(&mut self.entries[victim], calibration);
        self.entries[victim] = Entry { block, at_s: self.now_s, ..Entry::EMPTY };
        victim
    }

    fn enqueue(&mut self, index: usize) {
        let entry = &mut self.entries[index];
        if !entry.queued {
            entry.queued = true;
            self.queue.push_back((entry.block, self.now_s));
        }
    }
}

/// Labels what an entry waits for.
fn settle(entry: &mut Entry, calibration: &mut Calibration) {
    if entry.pending != 0 {
        calibration.label(entry.class, (entry.pending & entry.touched).count_ones(), entry.pending.count_ones());
        entry.pending = 0;
    }
    for (bucket, guessed) in entry.guessed.iter_mut().enumerate().filter(|(_, guessed)| **guessed != 0) {
        let class = bucket * 8 + usize::from(entry.guess_class >> (3 * bucket) & 7);
        calibration.spatial[class].add((*guessed & entry.touched).count_ones(), guessed.count_ones());
        *guessed = 0;
    }
    entry.queued = false;
}

fn count_bucket(count: u32) -> usize {
    match count {
        0..=1 => 0,
        2 => 1,
        3..=4 => 2,
        5..=8 => 3,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> (Ledger, Calibration) {
        (Ledger::new(1024), Calibration::new())
    }

    #[test]
    fn a_page_is_proposed_once_until_it_is_lost_or_likelier() {
        let (mut ledger, mut calibration) = fixture();
        let class = Class::stream(3);
        assert_eq!(ledger.propose(7, 0b1111, 0.5, (Expert::Sequential, class), &mut calibration), 0b1111);
        assert_eq!(ledger.propose(7, 0b1111, 0.5, (Expert::Sequential, class), &mut calibration), 0);
        assert_eq!(ledger.propose(7, 0b1111, 0.9, (Expert::Sequential, class), &mut calibration), 0b1111);
        ledger.forget(7, 0b0011, &mut calibration);
        assert_eq!(ledger.propose(7, 0b1111, 0.9, (Expert::Sequential, class), &mut calibration), 0b0011);
        ledger.advance((u64::from(FORGET_AFTER_S) + 2) * 1_000_000, &mut calibration);
        assert_eq!(ledger.propose(7, 0b1111, 0.5, (Expert::Sequential, class), &mut calibration), 0b1111);
    }

    #[test]
    fn renewed_pages_are_proposed_again_except_recent_ones() {
        let (mut ledger, mut calibration) = fixture();
        ledger.read(7, 0b0001, &mut calibration);
        ledger.propose(7, 0b0110, 0.3, (Expert::Sequential, Class::stream(3)), &mut calibration);
        assert_eq!(ledger.renew(7, 0b1111, 0.35, 30), 0b0111);
        assert_eq!(ledger.renew(7, 0b1111, 0.95, 30), 0b0001, "proposed before, but far less likely");
        ledger.advance(40_000_000, &mut calibration);
        assert_eq!(ledger.renew(7, 0b1111, 0.95, 30), 0);
        assert_eq!(ledger.propose(7, 0b1111, 0.3, (Expert::Phase, Class::NONE), &mut calibration), 0b1111);
        assert_eq!(calibration.classes[3].total, 0.0);
    }

    #[test]
    fn a_touched_page_is_not_proposed() {
        let (mut ledger, mut calibration) = fixture();
        ledger.read(7, 0b0101, &mut calibration);
        ledger.written(7, 0b1000, &mut calibration);
        assert_eq!(ledger.propose(7, 0b1111, 1.0, (Expert::Phase, Class::NONE), &mut calibration), 0b0010);
    }

    #[test]
    fn proposals_are_labelled_with_the_share_that_was_read() {
        let (mut ledger, mut calibration) = fixture();
        let class = Class::stream(3);
        ledger.propose(7, 0b1111, 0.5, (Expert::Sequential, class), &mut calibration);
        ledger.read(7, 0b0011, &mut calibration);
        ledger.written(7, 0b0100, &mut calibration);
        assert_eq!(calibration.classes[3].total, 1.0); // the written page: known to be wrong at once
        ledger.advance(u64::from(LABEL_AFTER_S) * 1_000_000, &mut calibration);
        assert_eq!((calibration.classes[3].used, calibration.classes[3].total), (2.0, 4.0));
    }

    #[test]
    fn evicted_entries_are_labelled_too() {
        let (mut ledger, mut calibration) = fixture();
        for block in 0..10_000 {
            ledger.propose(block, 0b11, 0.5, (Expert::Sequential, Class::stream(3)), &mut calibration);
            ledger.read(block, 0b1, &mut calibration);
        }
        ledger.clear(&mut calibration);
        let odds = calibration.classes[3];
        assert!((odds.used / odds.total - 0.5).abs() < 1e-3, "{odds:?}");
        assert!(ledger.entries.iter().all(|entry| entry.block == VACANT));
    }

    #[test]
    fn the_spatial_expert_learns_that_blocks_are_read_whole() {
        let (mut ledger, mut calibration) = fixture();
        let mut at_us = 0;
        let mut last = 0.0;
        for block in (0..2000).step_by(3) {
            assert!(ledger.read(block, 0b1, &mut calibration));
            let rest = ledger.rest_of_block(block, 1, &mut calibration).expect("first touch");
            assert_eq!(rest.mask, !0b1);
            assert_eq!(ledger.rest_of_block(block, 1, &mut calibration), None);
            last = rest.probability;
            ledger.read(block, !0b1, &mut calibration);
            at_us += 1_000_000;
            ledger.advance(at_us, &mut calibration);
        }
        assert!(last > 0.9, "{last}");
    }

    #[test]
    fn the_spatial_expert_is_not_credited_for_what_others_proposed() {
        let (mut ledger, mut calibration) = fixture();
        for block in (0..300).step_by(3) {
            ledger.read(block, 0b1, &mut calibration);
            ledger.propose(block, 0b1110, 0.9, (Expert::Sequential, Class::stream(3)), &mut calibration);
            let rest = ledger.rest_of_block(block, 1, &mut calibration).expect("first touch");
            assert_eq!(rest.mask, !0b1111);
            ledger.read(block, 0b1110, &mut calibration);
        }
        ledger.clear(&mut calibration);
        assert!(calibration.spatial.iter().all(|odds| odds.used == 0.0));
        assert_eq!(calibration.spatial.iter().map(|odds| odds.total).sum::<f32>(), 1200.0);
    }
}
