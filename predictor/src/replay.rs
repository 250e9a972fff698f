//! Replays a first-touch set while its phase runs: proposes what comes next, a window ahead of the guest.
//!
//! The guest's position in the plan is the [`RANK`]-th furthest of its last [`RECENT`] new matches: runs reorder what
//! they read, and one early touch of a late extent must not move the window, while a program that skips a part does.
//! Between matches the position's time goes on with the clock, at most by the horizon.
//!
//! The window is bounded by time (horizon) and by bytes proposed and neither used nor passed. A governor shrinks the
//! bytes as soon as less than half of what was passed was used, down to nothing: a run that diverges from the plan
//! wastes little. So it does as soon as the cache loses more than half of what it is brought before it is read: a guest that
//! reads the whole plan, but here and there, gains nothing by what comes in the plan's order.

use crate::phase::{Plan, SetExtent};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

/// New matches that make up the position …
const RECENT: usize = 16;
/// … of which this many are at or behind it.
const RANK: usize = 4;
/// An extent counts as passed when all but `RECENT` − this many recent matches are further by [`PASSED_BY`] extents:
/// a guest has several threads, and what the foremost has passed the others may still read.
const PASSED_RANK: usize = 12;
const PASSED_BY: usize = 64;
/// The governor starts with the credit of this many used pages (1 MiB) …
const CREDIT_PAGES: f32 = 256.0;
/// … forgets half beyond this many (4 MiB) …
const JUDGED_MAX_PAGES: f32 = 1024.0;
/// … and counts at most so many for one move of the position: a guest that skips a program has not left the plan.
const JUDGED_AT_ONCE_PAGES: f32 = 256.0;
/// Only extents at least this likely are judged; of others nothing was promised.
const JUDGED_PROBABILITY: f32 = 0.5;
/// The window is whole from this share of used pages on, and nothing at [`SHARE_NONE`].
const SHARE_WHOLE: f32 = 0.5;
const SHARE_NONE: f32 = 0.2;
/// What was brought and read is held against what was brought and lost unread from this many pages (2 MiB) of both on …
const KEPT_CREDIT_PAGES: f32 = 512.0;
/// … and half is forgotten beyond this many (16 MiB).
const KEPT_MAX_PAGES: f32 = 4096.0;
/// Above this share the plan knows better than the other experts what follows a read that it foresaw.
const SHARE_TRUSTED: f32 = 0.7;

const PROPOSED: u8 = 1;
const USED: u8 = 2;
const PASSED: u8 = 4;
/// Was proposed, lost by the cache and may be proposed once more.
const LOST_ONCE: u8 = 8;
/// Was in place when it was to be brought: whether it is used nobody sees.
const IN_PLACE: u8 = 16;
/// Was proposed when the guest had passed it, and is neither read nor lost.
const BELATED: u8 = 32;

/// How far ahead a replay proposes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) pages: u64,
    pub(crate) horizon_ms: u32,
}

#[derive(Debug)]
pub(crate) struct Replay {
    plan: Arc<Plan>,
    window: Window,
    flags: Vec<u8>,
    started_us: u64,
    matched_us: u64,
    recent: [u32; RECENT],
    matches: usize,
    position: usize,
    /// Next extent to consider.
    cursor: usize,
    /// First of the extents before the cursor that may never have been considered: the guest jumped over them.
    skipped: usize,
    /// Extents before the cursor that the cache lost, the next to be used first. Found again without a walk through all that
    /// lies between: a window may hold a hundred thousand, and a cache under pressure loses them one by one.
    lost: BinaryHeap<Reverse<u32>>,
    /// Pages proposed, not used and not passed.
    outstanding: u64,
    /// Pages proposed when the guest had passed them, neither read nor lost. They have a bound of their own, as large as the
    /// window: where a cache keeps them unread, they must not hold up what comes next.
    belated: u64,
    /// Extents before it were judged.
    judged: usize,
    judged_pages: f32,
    judged_used: f32,
    /// Pages brought of which the cache told what became of them; and those of them that were read.
    ended_pages: f32,
    ended_used: f32,
}

impl Replay {
    pub(crate) fn new(plan: Arc<Plan>, window: Window, at_us: u64) -> Self {
        Self {
            flags: vec![0; plan.extents().len()],
            plan,
            window,
            started_us: at_us,
            matched_us: at_us,
            recent: [0; RECENT],
            matches: 0,
            position: 0,
            cursor: 0,
            skipped: usize::MAX,
            lost: BinaryHeap::new(),
            outstanding: 0,
            belated: 0,
            judged: 0,
            judged_pages: CREDIT_PAGES,
            judged_used: CREDIT_PAGES,
            ended_pages: KEPT_CREDIT_PAGES,
            ended_used: KEPT_CREDIT_PAGES,
        }
    }

    /// Takes in a read; true if the plan foresaw all its pages.
    pub(crate) fn read(&mut self, first: u64, pages: u32, at_us: u64) -> bool {
        let plan = Arc::clone(&self.plan);
        let (mut covered, mut matched) = (0, false);
        for (position, _, overlap) in plan.overlaps(first, pages) {
            covered += overlap;
            self.no_longer_belated(position);
            let flags = self.flags[position];
            if flags & USED == 0 {
                self.flags[position] |= USED;
                if flags & (PROPOSED | PASSED | IN_PLACE) == PROPOSED {
                    self.outstanding = self.outstanding.saturating_sub(u64::from(plan.extents()[position].pages));
                }
                if flags & PASSED != 0 && plan.probability(&plan.extents()[position]) >= JUDGED_PROBABILITY {
                    // Late, but used after all.
                    let used = self.judged_used + plan.extents()[position].pages as f32;
                    self.judged_used = used.min(self.judged_pages);
                }
                self.recent[self.matches % RECENT] = position as u32;
                self.matches += 1;
                matched = true;
            }
        }
        if matched {
            self.matched_us = self.matched_us.max(at_us);
            self.locate();
        }
        covered == pages
    }

    /// What became of pages that a set had the cache bring: read, or lost before that.
    pub(crate) fn ended(&mut self, first: u64, pages: u32, used: bool) {
        let proposed = self.plan.overlaps(first, pages).filter(|(at, ..)| self.flags[*at] & PROPOSED != 0);
        let pages: u32 = proposed.map(|(_, _, overlap)| overlap).sum();
        self.ended_pages += pages as f32;
        self.ended_used += if used { pages as f32 } else { 0.0 };
        if self.ended_pages > KEPT_MAX_PAGES {
            self.ended_pages *= 0.5;
            self.ended_used *= 0.5;
        }
    }

    /// The cache lost proposed pages before any use: their extents may be proposed once more.
    pub(crate) fn lost(&mut self, first: u64, pages: u32) {
        let plan = Arc::clone(&self.plan);
        for (position, _, _) in plan.overlaps(first, pages) {
            self.no_longer_belated(position);
            if self.flags[position] & (PROPOSED | USED | PASSED | LOST_ONCE | IN_PLACE) == PROPOSED {
                self.flags[position] = LOST_ONCE;
                self.outstanding = self.outstanding.saturating_sub(u64::from(plan.extents()[position].pages));
                if position < self.cursor {
                    self.lost.push(Reverse(position as u32));
                }
            }
        }
    }

    /// Pages were in place already and nobody will see them used: they are neither outstanding nor judged.
    pub(crate) fn in_place(&mut self, first: u64, pages: u32) {
        let plan = Arc::clone(&self.plan);
        for (position, _, _) in plan.overlaps(first, pages) {
            self.no_longer_belated(position);
            let flags = self.flags[position];
            if flags & (PROPOSED | USED | PASSED | IN_PLACE) == PROPOSED {
                self.outstanding = self.outstanding.saturating_sub(u64::from(plan.extents()[position].pages));
            }
            self.flags[position] |= IN_PLACE;
        }
    }

    /// Hands on what is due to be proposed, in order: extent, probability, expected time of use.
    pub(crate) fn propose(&mut self, at_us: u64, floor: f32, mut sink: impl FnMut(&SetExtent, f32, u64)) {
        let plan = Arc::clone(&self.plan);
        let extents = plan.extents();
        let Some(here) = extents.get(self.position) else { return };
        let begun = self.matches > 0;
        let idle_ms = at_us.saturating_sub(if begun { self.matched_us } else { self.started_us }) / 1000;
        let idle_ms = idle_ms.min(u64::from(self.window.horizon_ms));
        let now_ms = if begun { u64::from(here.at_ms) + idle_ms } else { idle_ms };
        let until_ms = now_ms + u64::from(self.window.horizon_ms);
        if self.cursor < self.position {
            self.skipped = self.skipped.min(self.cursor);
            self.cursor = self.position;
        } else if self.position < self.cursor && self.skipped < self.cursor {
            self.cursor = self.position.max(self.skipped);
            if self.skipped >= self.position {
                self.skipped = usize::MAX;
            }
        }
        let limit = (self.window.pages as f64 * f64::from(self.allowance())) as u64;
        // What the guest has passed is not fetched any more.
        while self.lost.peek().is_some_and(|Reverse(position)| (*position as usize) < self.position) {
            self.lost.pop();
        }
        loop {
            let lost = self.lost.peek().map(|Reverse(position)| *position as usize);
            let at = lost.map_or(self.cursor, |lost| lost.min(self.cursor));
            let Some(extent) = extents.get(at) else { break };
            if u64::from(extent.at_ms) > until_ms || self.outstanding + u64::from(extent.pages) > limit {
                break;
            }
            let flags = &mut self.flags[at];
            if lost == Some(at) {
                self.lost.pop();
            }
            if at == self.cursor {
                self.cursor += 1;
            }
            let probability = plan.probability(extent);
            if *flags & (PROPOSED | USED) != 0 || probability < floor {
                continue;
            }
            // Already passed: it counts neither as outstanding nor for what was passed unused.
            if *flags & PASSED == 0 {
                self.outstanding += u64::from(extent.pages);
            } else if self.belated + u64::from(extent.pages) <= limit {
                self.belated += u64::from(extent.pages);
                *flags |= BELATED;
            } else {
                continue;
            }
            *flags |= PROPOSED;
            let due_us = at_us.saturating_add(u64::from(extent.at_ms).saturating_sub(now_ms) * 1000);
            sink(extent, probability, due_us);
        }
    }

    /// Of the extent that holds `page`: its probability by the plan, and as the plan has proved so far, and when it is due.
    pub(crate) fn expects(&self, page: u64) -> Option<(f32, u64)> {
        let (position, _, _) = self.plan.overlaps(page, 1).next()?;
        let extents = self.plan.extents();
        let (extent, here) = (extents.get(position)?, extents.get(self.position)?);
        let (since_us, from_ms) = if self.matches > 0 { (self.matched_us, here.at_ms) } else { (self.started_us, 0) };
        let due_us = since_us.saturating_add(u64::from(extent.at_ms.saturating_sub(from_ms)) * 1000);
        Some((self.plan.probability(extent), due_us))
    }

    /// The plan proved right so far in this run.
    pub(crate) fn is_trusted(&self) -> bool {
        self.matches >= RANK && self.share() >= SHARE_TRUSTED
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.flags.capacity() + self.lost.capacity() * 4 + size_of::<Self>()
    }

    fn no_longer_belated(&mut self, position: usize) {
        if self.flags[position] & BELATED != 0 {
            self.flags[position] &= !BELATED;
            self.belated = self.belated.saturating_sub(u64::from(self.plan.extents()[position].pages));
        }
    }

    /// Share of the pages passed lately that was used.
    fn share(&self) -> f32 {
        self.judged_used / self.judged_pages
    }

    /// Part of the window that the governor allows.
    fn allowance(&self) -> f32 {
        let share = self.share().min(self.ended_used / self.ended_pages);
        ((share - SHARE_NONE) / (SHARE_WHOLE - SHARE_NONE)).clamp(0.0, 1.0)
    }

    fn locate(&mut self) {
        let held = self.matches.min(RECENT);
        if held < RANK {
            return;
        }
        let mut sorted = self.recent;
        sorted[..held].sort_unstable_by(|a, b| b.cmp(a));
        self.position = sorted[RANK - 1] as usize;
        let until = (sorted[PASSED_RANK.min(held) - 1] as usize).saturating_sub(PASSED_BY);
        let (mut passed, mut used) = (0.0, 0.0);
        while self.judged < until {
            let (flags, extent) = (self.flags[self.judged], &self.plan.extents()[self.judged]);
            self.flags[self.judged] |= PASSED;
            self.judged += 1;
            if flags & (PROPOSED | USED | IN_PLACE) == PROPOSED {
                self.outstanding = self.outstanding.saturating_sub(u64::from(extent.pages));
            }
            if flags & (USED | IN_PLACE) != IN_PLACE && self.plan.probability(extent) >= JUDGED_PROBABILITY {
                passed += extent.pages as f32;
                used += if flags & USED != 0 { extent.pages as f32 } else { 0.0 };
            }
        }
        let scale = if passed > JUDGED_AT_ONCE_PAGES { JUDGED_AT_ONCE_PAGES / passed } else { 1.0 };
        self.judged_pages += passed * scale;
        self.judged_used += used * scale;
        if self.judged_pages > JUDGED_MAX_PAGES {
            self.judged_pages *= 0.5;
            self.judged_used *= 0.5;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::PhaseSet;
    use crate::record::Recording;

    const WIDE: Window = Window { pages: 1 << 16, horizon_ms: 10_000 };

    /// `count` extents of 8 pages, 16 apart, 100 ms apart.
    fn plan(count: u64) -> Arc<Plan> {
        let mut run = Recording::new(0, 1 << 20);
        for i in 0..count {
            run.read(i * 16, 8, i * 100_000);
        }
        let mut set = PhaseSet::new();
        set.merge(&run);
        Arc::clone(set.plan())
    }

    fn proposed(replay: &mut Replay, at_us: u64) -> Vec<u64> {
        let mut firsts = Vec::new();
        replay.propose(at_us, 0.1, |extent, _, due_us| {
            assert!(due_us >= at_us);
            firsts.push(extent.first / 16);
        });
        firsts
    }

    #[test]
    fn the_window_goes_ahead_of_the_guest_and_nothing_is_proposed_twice() {
        let mut replay = Replay::new(plan(1000), WIDE, 0);
        assert_eq!(proposed(&mut replay, 0), (0..=100).collect::<Vec<_>>());
        assert!(proposed(&mut replay, 0).is_empty());
        let mut next = 101;
        for i in 0..500 {
            assert!(replay.read(i * 16, 8, i * 100_000));
            for extent in proposed(&mut replay, i * 100_000) {
                assert_eq!(extent, next);
                next += 1;
            }
        }
        assert!((590..=601).contains(&next), "{next}");
        assert!(replay.is_trusted());
    }

    #[test]
    fn outstanding_bytes_are_bounded() {
        let mut replay = Replay::new(plan(1000), Window { pages: 80, horizon_ms: 1_000_000 }, 0);
        assert_eq!(proposed(&mut replay, 0).len(), 10);
        for i in 0..4 {
            replay.read(i * 16, 8, 0);
        }
        assert_eq!(proposed(&mut replay, 0).len(), 4);
    }

    #[test]
    fn reordered_reads_do_not_throw_the_position() {
        let mut replay = Replay::new(plan(1000), WIDE, 0);
        proposed(&mut replay, 0);
        replay.read(900 * 16, 8, 1000); // one early touch of a late extent
        for i in (0..40).map(|i| i ^ 3) {
            replay.read(i * 16, 8, i * 1000);
        }
        assert!((34..=40).contains(&replay.position), "{}", replay.position);
    }

    #[test]
    fn a_run_that_skips_a_part_is_followed_and_may_come_back() {
        let mut replay = Replay::new(plan(1000), WIDE, 0);
        proposed(&mut replay, 0);
        for i in 500..520 {
            replay.read(i * 16, 8, 1000);
        }
        let ahead = proposed(&mut replay, 2000);
        assert!(ahead[0] >= 510 && ahead.contains(&600));
        for i in 200..220 {
            replay.read(i * 16, 8, 3000);
        }
        assert!(proposed(&mut replay, 4000).contains(&250));
    }

    #[test]
    fn what_a_run_jumped_over_is_proposed_when_it_comes_back_in_two_steps() {
        let mut replay = Replay::new(plan(300), Window { pages: 960, horizon_ms: 1_000_000 }, 0);
        let mut seen = proposed(&mut replay, 0);
        let mut missed = 0;
        for extent in (0..40).chain(200..260).chain(180..200).chain(130..180) {
            missed += usize::from((130..180).contains(&extent) && !seen.contains(&extent));
            replay.read(extent * 16, 8, 1000);
            seen.extend(proposed(&mut replay, 1000));
        }
        assert!(missed < 10, "{missed} of 50");
    }

    #[test]
    fn what_was_passed_is_proposed_within_a_bound() {
        // a jump over three quarters of the plan, and back in two steps
        let mut replay = Replay::new(plan(1000), Window { pages: 160, horizon_ms: 1_000_000 }, 0);
        proposed(&mut replay, 0);
        for i in (0..40).chain(760..800) {
            replay.read(i * 16, 8, 1000);
        }
        proposed(&mut replay, 2000);
        for i in 100..120 {
            replay.read(i * 16, 8, 3000);
        }
        let belated = proposed(&mut replay, 4000);
        assert!((1..=160).contains(&replay.belated) && belated.len() <= 40, "{}", belated.len());
        // what is read makes room
        for i in &belated {
            replay.read(i * 16, 8, 5000);
        }
        assert!(replay.belated == 0 && belated.iter().all(|i| replay.flags[*i as usize] & BELATED == 0));
    }

    #[test]
    fn a_run_that_diverges_is_cut_off() {
        let mut replay = Replay::new(plan(4000), WIDE, 0);
        let mut sum = proposed(&mut replay, 0).len();
        for i in (0..4000).step_by(12) {
            replay.read(i * 16, 1, i * 100_000);
            sum += proposed(&mut replay, i * 100_000).len();
        }
        assert!(sum < 600, "{sum} of 4000 although a twelfth is used");
        assert!(!replay.is_trusted());
    }

    /// Reads 4000 extents of 8 pages in the order `at`, in a cache that keeps 50 of what it is brought. How many were proposed.
    fn brought(window: u64, at: impl Fn(u64) -> u64) -> usize {
        let mut replay = Replay::new(plan(4000), Window { pages: window, horizon_ms: 1_000_000 }, 0);
        let (mut sum, mut held) = (0, std::collections::VecDeque::new());
        for i in 0..4000 {
            replay.read(at(i) * 16, 8, i * 1000);
            if let Some(position) = held.iter().position(|extent| *extent == at(i)) {
                held.remove(position);
                replay.ended(at(i) * 16, 8, true);
            }
            let proposed = proposed(&mut replay, i * 1000);
            sum += proposed.len();
            held.extend(proposed);
            while held.len() > 50 {
                let lost = held.pop_front().unwrap();
                replay.ended(lost * 16, 8, false);
                replay.lost(lost * 16, 8);
            }
        }
        sum
    }

    #[test]
    fn a_guest_that_reads_the_plan_here_and_there_is_cut_off() {
        let sum = brought(8000, |i| i * 1567 % 4000);
        assert!(sum < 1400, "{sum} of 4000 although next to none is read while it is there");
    }

    #[test]
    fn a_small_cache_cuts_nobody_off_who_reads_in_the_plans_order() {
        let sum = brought(800, |i| i ^ 3);
        assert!(sum > 3000, "{sum} of 4000");
    }

    #[test]
    fn a_lost_extent_is_proposed_once_more() {
        let mut replay = Replay::new(plan(50), WIDE, 0);
        assert_eq!(proposed(&mut replay, 0).len(), 50);
        replay.lost(20 * 16, 8);
        assert_eq!(proposed(&mut replay, 0), [20]);
        replay.lost(20 * 16, 8);
        assert!(proposed(&mut replay, 0).is_empty());
    }

    #[test]
    fn lost_extents_come_again_in_order_of_use_and_not_behind_the_guest() {
        let mut replay = Replay::new(plan(100), WIDE, 0);
        assert_eq!(proposed(&mut replay, 0).len(), 100);
        for extent in [90, 20, 50, 70, 21] {
            replay.lost(extent * 16, 8);
        }
        assert_eq!(proposed(&mut replay, 0), [20, 21, 50, 70, 90]);
        assert!(replay.lost.is_empty());
        for extent in [80, 40] {
            replay.lost(extent * 16, 8);
        }
        for extent in 41..50 {
            replay.read(extent * 16, 8, 0);
        }
        assert_eq!(proposed(&mut replay, 0), [80]);
        assert!(replay.lost.is_empty());
    }

    #[test]
    fn an_empty_plan_is_no_plan() {
        let mut replay = Replay::new(Arc::clone(PhaseSet::new().plan()), WIDE, 0);
        assert!(!replay.read(0, 1, 0));
        assert!(proposed(&mut replay, 0).is_empty());
    }
}
