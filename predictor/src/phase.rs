//! First-touch sets: what a phase (a boot, a program) reads for the first time, in order and with times, over its runs.
//!
//! Boots of one image repeat their set (99.9 % of its pages), not their transitions (61 % of them), so the set is what
//! is worth keeping. Every extent carries the history of the last [`HISTORY_RUNS`] runs: touched or not. The
//! probability that it is touched again is the observed share of extents of equal history, starting from a Beta prior
//! around 0.95.
//!
//! A run that ends early (the VM or the agent was stopped) says nothing about what it did not reach: extents behind
//! the furthest point that the run robustly matched keep their history.

use crate::odds::Odds;
use crate::pageset::PageSet;
use crate::record::{MAX_EXTENT_PAGES, Recording};
use crate::wire::{Reader, WireError, put, put_signed};
use std::sync::Arc;

/// Runs remembered for an extent.
const HISTORY_RUNS: u32 = 4;
/// Histories: a leading one, then up to [`HISTORY_RUNS`] bits, the latest run lowest.
const HISTORIES: usize = 2 << HISTORY_RUNS;
const TOUCHED_ONCE: u8 = 0b11;
const NEVER_TOUCHED: u8 = 0b10000;
/// Extents of a set, at most; the latest touches go first. 128 Ki × 24 B = 3 MiB.
pub(crate) const MAX_EXTENTS: usize = 1 << 17;
/// A match this many matches before the furthest counts as how far a run got: a few early touches of late extents do
/// not move it.
const ROBUST_RANK: usize = 4;
/// An extent is missed, too, if the run went on for this many times its usual time and a minute.
const OVERDUE_FACTOR: u64 = 2;
const OVERDUE_SLACK_MS: u64 = 60_000;
/// Evidence of one run about one history is worth at most this much against a prior of [`PRIOR_WEIGHT`]: what one run
/// skips it skips together.
const RUN_WEIGHT: f32 = 3.0;
const PRIOR_WEIGHT: f32 = 2.0;
/// Pages of a history that a run must have had to weigh fully.
const FULL_EVIDENCE_PAGES: f32 = 256.0;
/// Older runs' evidence fades by this a run.
const FADING: f32 = 0.8;

/// Pages of a set with one history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SetExtent {
    pub(crate) first: u64,
    /// 1 ..= [`MAX_EXTENT_PAGES`].
    pub(crate) pages: u32,
    /// Time of first touch since the phase's start, of the latest run that touched it.
    pub(crate) at_ms: u32,
    history: u8,
}

impl SetExtent {
    pub(crate) fn end(&self) -> u64 {
        self.first + u64::from(self.pages)
    }
}

/// Share of pages touched again, by history.
#[derive(Clone, Debug, PartialEq)]
struct HistoryOdds([Odds; HISTORIES]);

impl HistoryOdds {
    fn probability(&self, history: u8) -> f32 {
        let odds = self.0[usize::from(history) % HISTORIES];
        (odds.used + prior(history) * PRIOR_WEIGHT) / (odds.total + PRIOR_WEIGHT)
    }
}

/// Prior of a history: 0.95 as one run's worth of evidence, later runs weighing more.
fn prior(history: u8) -> f32 {
    let runs = u32::from(history | 1).ilog2();
    let (mut touched, mut all, mut weight) = (0.95, 1.0, 1.0);
    for run in 0..runs {
        touched += if history >> run & 1 == 1 { weight } else { 0.0 };
        all += weight;
        weight *= 0.7;
    }
    touched / all
}

fn extend(history: u8, touched: bool) -> u8 {
    let longer = u32::from(history) << 1 | u32::from(touched);
    let full = 1 << HISTORY_RUNS;
    if longer >= full * 2 { (full | longer & (full - 1)) as u8 } else { longer as u8 }
}

/// The extents of a set in order of time, disjoint. Shared with replays; a new run makes a new plan.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    extents: Vec<SetExtent>,
    /// Positions in `extents` by ascending first page.
    by_page: Vec<u32>,
    odds: HistoryOdds,
}

impl Plan {
    fn new(extents: Vec<SetExtent>, odds: HistoryOdds) -> Self {
        let mut by_page: Vec<u32> = (0..extents.len() as u32).collect();
        by_page.sort_unstable_by_key(|&position| extents[position as usize].first);
        Self { extents, by_page, odds }
    }

    pub(crate) fn extents(&self) -> &[SetExtent] {
        &self.extents
    }

    pub(crate) fn probability(&self, extent: &SetExtent) -> f32 {
        self.odds.probability(extent.history)
    }

    /// Extents that overlap the range, ascending by page: (position, first page and pages of the overlap).
    pub(crate) fn overlaps(&self, first: u64, pages: u32) -> impl Iterator<Item = (usize, u64, u32)> {
        let end = first.saturating_add(u64::from(pages));
        let start = self.by_page.partition_point(|&position| self.extents[position as usize].end() <= first);
        self.by_page[start..].iter().map_while(move |&position| {
            let extent = &self.extents[position as usize];
            let (from, to) = (extent.first.max(first), extent.end().min(end));
            (from < to).then(|| (position as usize, from, (to - from) as u32))
        })
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.extents.capacity() * size_of::<SetExtent>() + self.by_page.capacity() * 4
    }
}

/// What is known of one phase.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PhaseSet {
    plan: Arc<Plan>,
    runs: u32,
    /// Length of the longest run.
    span_ms: u32,
}

impl PhaseSet {
    pub(crate) fn new() -> Self {
        let plan = Plan::new(Vec::new(), HistoryOdds([Odds::default(); HISTORIES]));
        Self { plan: Arc::new(plan), runs: 0, span_ms: 0 }
    }

    pub(crate) fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    pub(crate) fn runs(&self) -> u32 {
        self.runs
    }

    pub(crate) fn extents(&self) -> usize {
        self.plan.extents.len()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.plan.extents.iter().map(|extent| u64::from(extent.pages)).sum()
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.plan.memory_bytes() + size_of::<Self>()
    }

    /// Takes in a run. Order and times become the run's; what it did not touch stays near what used to precede it.
    pub(crate) fn merge(&mut self, run: &Recording) {
        if run.order().is_empty() {
            return;
        }
        let old = Arc::clone(&self.plan);
        let matched = Matched::of(&old, run);
        let mut odds = old.odds.clone();
        let mut extents = self.touched_extents(&old, run);
        let mut counts = RunCounts([(0, 0); HISTORIES]);

        // What the run left out. `anchor` is the last extent before it that the run did touch.
        let mut anchor: Option<(u32, u32)> = None;
        for (position, extent) in old.extents.iter().enumerate() {
            let touched_pages = matched.pages[position];
            if touched_pages > 0 {
                anchor = Some((extent.at_ms, matched.at_ms[position]));
            }
            let at_ms = match anchor {
                Some((then, now)) => now.saturating_add(extent.at_ms.saturating_sub(then)),
                None => extent.at_ms,
            };
            let overdue = u64::from(run.span_ms()) > u64::from(extent.at_ms) * OVERDUE_FACTOR + OVERDUE_SLACK_MS;
            let reached = touched_pages > 0 || matched.reached.is_some_and(|reached| position <= reached) || overdue;
            let reached = reached && !run.is_blind(extent.first, extent.pages);
            if reached {
                counts.add(extent.history, touched_pages, extent.pages);
            }
            let history = if reached { extend(extent.history, false) } else { extent.history };
            if history == NEVER_TOUCHED || touched_pages == extent.pages {
                continue;
            }
            run.pages().runs(extent.first, extent.pages, false, |first, pages| {
                extents.push(SetExtent { first, pages, at_ms, history });
            });
        }
        counts.fold_into(&mut odds);
        extents.sort_by_key(|extent| extent.at_ms);
        extents.truncate(MAX_EXTENTS);
        self.plan = Arc::new(Plan::new(extents, odds));
        self.runs = self.runs.saturating_add(1);
        self.span_ms = self.span_ms.max(run.span_ms());
    }

    /// The run's touches, cut where their history changes.
    fn touched_extents(&self, old: &Plan, run: &Recording) -> Vec<SetExtent> {
        // Seen now, absent in the runs before; or later than those lasted, so that nothing is known about them.
        let mut absent = 1u8;
        for _ in 0..self.runs {
            absent = extend(absent, false);
        }
        let newly = extend(absent, true);
        let mut extents: Vec<SetExtent> = Vec::with_capacity(run.order().len());
        for touched in run.order() {
            let unseen = if touched.at_ms > self.span_ms { TOUCHED_ONCE } else { newly };
            let mut push = |first: u64, end: u64, history: u8| match extents.last_mut() {
                _ if first >= end => {}
                Some(last)
                    if (last.end(), last.history, last.at_ms) == (first, history, touched.at_ms)
                        && end - last.first <= u64::from(MAX_EXTENT_PAGES) =>
                {
                    last.pages += (end - first) as u32;
                }
                _ => extents.push(SetExtent { first, pages: (end - first) as u32, at_ms: touched.at_ms, history }),
            };
            let mut at = touched.first;
            for (position, first, pages) in old.overlaps(touched.first, touched.pages) {
                push(at, first, unseen);
                at = first + u64::from(pages);
                push(first, at, extend(old.extents[position].history, true));
            }
            push(at, touched.first + u64::from(touched.pages), unseen);
        }
        extents
    }

    /// Layout: runs, span (ms), odds of all histories (two floats each), extents; an extent is: distance of its first
    /// page from the previous extent's end (signed), pages, time since the previous extent (ms), history.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        put(out, u64::from(self.runs));
        put(out, u64::from(self.span_ms));
        for odds in self.plan.odds.0 {
            odds.write(out);
        }
        put(out, self.plan.extents.len() as u64);
        let (mut end, mut at_ms) = (0u64, 0);
        for extent in &self.plan.extents {
            put_signed(out, extent.first as i64 - end as i64);
            put(out, u64::from(extent.pages));
            put(out, u64::from(extent.at_ms - at_ms));
            out.push(extent.history);
            (end, at_ms) = (extent.end(), extent.at_ms);
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let runs = reader.at_most(u64::from(u32::MAX), "runs of a phase")? as u32;
        let span_ms = reader.at_most(u64::from(u32::MAX), "length of a phase")? as u32;
        let mut odds = HistoryOdds([Odds::default(); HISTORIES]);
        for odds in &mut odds.0 {
            *odds = Odds::read(reader)?;
        }
        let count = reader.count(4, "extents of a phase")?.min(MAX_EXTENTS);
        let mut extents = Vec::with_capacity(count);
        let (mut end, mut at_ms) = (0u64, 0u32);
        let mut pages_seen = PageSet::default();
        for _ in 0..count {
            let first = end.checked_add_signed(reader.signed()?).ok_or(WireError::Invalid("page of an extent"))?;
            let pages = reader.at_most(u64::from(MAX_EXTENT_PAGES), "pages of an extent")? as u32;
            let later = reader.at_most(u64::from(u32::MAX), "time of an extent")? as u32;
            at_ms = at_ms.checked_add(later).ok_or(WireError::Invalid("time of an extent"))?;
            let history = reader.byte()?;
            if pages == 0 || first >= crate::access::MAX_PAGES || !(2..HISTORIES as u8).contains(&history) {
                return Err(WireError::Invalid("extent"));
            }
            let before = pages_seen.len();
            pages_seen.insert(first, pages, |_, _| {});
            if pages_seen.len() != before + u64::from(pages) {
                return Err(WireError::Invalid("overlapping extents"));
            }
            let extent = SetExtent { first, pages, at_ms, history };
            end = extent.end();
            extents.push(extent);
        }
        Ok(Self { plan: Arc::new(Plan::new(extents, odds)), runs, span_ms })
    }
}

/// Where an old plan and a run meet.
struct Matched {
    /// By position in the plan: pages the run touched, and when it touched the first of them.
    pages: Vec<u32>,
    at_ms: Vec<u32>,
    /// Furthest position robustly matched: only [`ROBUST_RANK`] − 1 matches lie behind it.
    reached: Option<usize>,
}

impl Matched {
    fn of(plan: &Plan, run: &Recording) -> Self {
        let extents = plan.extents.len();
        let mut matched = Self { pages: vec![0; extents], at_ms: vec![u32::MAX; extents], reached: None };
        for touched in run.order() {
            for (position, _, pages) in plan.overlaps(touched.first, touched.pages) {
                matched.pages[position] += pages;
                matched.at_ms[position] = matched.at_ms[position].min(touched.at_ms);
            }
        }
        let mut latest = matched.pages.iter().enumerate().rev().filter(|(_, pages)| **pages > 0);
        matched.reached = latest.nth(ROBUST_RANK - 1).map(|(position, _)| position);
        matched
    }
}

/// Pages of one run by the history they had: touched again, and in all.
struct RunCounts([(u64, u64); HISTORIES]);

impl RunCounts {
    fn add(&mut self, history: u8, touched: u32, pages: u32) {
        let (sum_touched, sum_pages) = &mut self.0[usize::from(history) % HISTORIES];
        *sum_touched += u64::from(touched);
        *sum_pages += u64::from(pages);
    }

    /// Fades older runs in `odds` and adds this one's evidence.
    fn fold_into(&self, odds: &mut HistoryOdds) {
        for (odds, &(touched, pages)) in odds.0.iter_mut().zip(&self.0) {
            if pages > 0 {
                let weight = RUN_WEIGHT * (pages as f32 / FULL_EVIDENCE_PAGES).min(1.0);
                odds.total = odds.total * FADING + weight;
                odds.used = (odds.used * FADING + weight * (touched as f32 / pages as f32)).min(odds.total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::MAX_PAGES;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn recorded(reads: &[(u64, u32, u32)]) -> Recording {
        let mut run = Recording::new(0, 1 << 20);
        for &(first, pages, at_ms) in reads {
            run.read(first, pages, u64::from(at_ms) * 1000);
        }
        run
    }

    /// 200 extents of 4 pages, 10 pages apart, one every 100 ms.
    fn boot() -> Vec<(u64, u32, u32)> {
        (0..200).map(|i| (1000 + u64::from(i) * 10, 4, i * 100)).collect()
    }

    fn probability(set: &PhaseSet, page: u64) -> Option<f32> {
        let (position, _, _) = set.plan.overlaps(page, 1).next()?;
        Some(set.plan.probability(&set.plan.extents[position]))
    }

    #[test]
    fn one_run_makes_a_strong_prior_and_repeats_make_it_stronger() {
        let mut set = PhaseSet::new();
        set.merge(&recorded(&boot()));
        let once = probability(&set, 1000).expect("known page");
        assert!(once > 0.95);
        assert_eq!(probability(&set, 1004), None);
        for _ in 0..5 {
            set.merge(&recorded(&boot()));
        }
        assert!(probability(&set, 1000).expect("known page") > 0.98);
        assert_eq!((set.runs(), set.extents(), set.pages()), (6, 200, 800));
    }

    #[test]
    fn extents_that_stay_away_fade_and_are_dropped() {
        let mut set = PhaseSet::new();
        set.merge(&recorded(&boot()));
        let mut without = boot();
        without.drain(20..40);
        let mut last = 1.0;
        for _ in 0..3 {
            set.merge(&recorded(&without));
            let now = probability(&set, 1000 + 300).expect("still known");
            assert!(now < last);
            last = now;
        }
        assert!(last < 0.5, "{last}");
        set.merge(&recorded(&without));
        set.merge(&recorded(&without));
        assert_eq!(probability(&set, 1000 + 300), None);
        assert_eq!(set.extents(), 180);
    }

    #[test]
    fn a_run_cut_short_does_not_count_against_what_it_did_not_reach() {
        let mut set = PhaseSet::new();
        set.merge(&recorded(&boot()));
        let before = probability(&set, 1000 + 1500).expect("known page");
        set.merge(&recorded(&boot()[..50]));
        assert_eq!(set.extents(), 200);
        assert!(probability(&set, 1000 + 1500).expect("known page") >= before - 1e-6);
    }

    #[test]
    fn what_a_long_run_never_touched_is_missed() {
        let mut set = PhaseSet::new();
        set.merge(&recorded(&boot()));
        let before = probability(&set, 1000 + 1500).expect("known page");
        let mut run = recorded(&boot()[..50]);
        run.extend_to(600_000_000);
        set.merge(&run);
        assert!(probability(&set, 1000 + 1500).expect("known page") < before);
    }

    #[test]
    fn a_new_extent_takes_its_place_in_the_order() {
        let mut set = PhaseSet::new();
        set.merge(&recorded(&boot()));
        let mut with = boot();
        with.insert(100, (500_000, 8, 9_950));
        set.merge(&recorded(&with));
        let position = set.plan.extents.iter().position(|extent| extent.first == 500_000).expect("new extent");
        assert_eq!(position, 100);
        let new = probability(&set, 500_000).expect("new page");
        assert!(new > 0.5 && new < 0.9, "seen in one of two runs: {new}");
    }

    #[test]
    fn pages_after_the_end_of_earlier_runs_are_as_new_as_a_first_run() {
        let mut set = PhaseSet::new();
        set.merge(&recorded(&boot()[..50]));
        set.merge(&recorded(&boot()));
        assert!(probability(&set, 1000 + 1500).expect("later page") > 0.95);
    }

    proptest! {
        #[test]
        fn a_set_holds_each_page_once_with_its_own_history(
            runs in prop::collection::vec(prop::collection::vec((0u64..800, 1u32..100), 1..30), 1..6),
        ) {
            let (mut set, mut plain): (_, BTreeMap<u64, u8>) = (PhaseSet::new(), BTreeMap::new());
            for (count, reads) in runs.iter().enumerate() {
                let timed: Vec<_> =
                    reads.iter().enumerate().map(|(i, &(first, pages))| (first, pages, i as u32 * 7)).collect();
                let mut run = recorded(&timed);
                run.extend_to(10_000_000_000); // everything is overdue: absence always counts
                let newly = (0..count.min(8)).fold(1u8, |history, _| extend(history, false));
                for history in plain.values_mut() {
                    *history = extend(*history, false);
                }
                for &(first, pages, _) in &timed {
                    for page in first..first + u64::from(pages) {
                        let history = plain.entry(page).or_insert_with(|| extend(newly, false));
                        *history |= 1;
                    }
                }
                plain.retain(|_, history| *history != NEVER_TOUCHED);
                set.merge(&run);
                let mut held = BTreeMap::new();
                for extent in set.plan.extents() {
                    prop_assert!(extent.pages >= 1 && extent.pages <= MAX_EXTENT_PAGES);
                    for page in extent.first..extent.end() {
                        prop_assert_eq!(held.insert(page, extent.history), None);
                    }
                }
                prop_assert_eq!(&held, &plain);
                prop_assert!(set.plan.extents().is_sorted_by_key(|extent| extent.at_ms));
                let mut bytes = Vec::new();
                set.write(&mut bytes);
                prop_assert_eq!(PhaseSet::read(&mut Reader::new(&bytes)), Ok(set.clone()));
            }
        }

        #[test]
        fn overlaps_agree_with_a_scan(
            reads in prop::collection::vec((0u64..500, 1u32..40), 1..30), first in 0u64..520, pages in 1u32..90,
        ) {
            let timed: Vec<_> = reads.iter().enumerate().map(|(i, &(a, n))| (a, n, i as u32 * 9000)).collect();
            let mut set = PhaseSet::new();
            set.merge(&recorded(&timed));
            let mut want: Vec<_> = (0..set.extents())
                .filter_map(|position| {
                    let extent = set.plan.extents[position];
                    let (from, to) = (extent.first.max(first), extent.end().min(first + u64::from(pages)));
                    (from < to).then(|| (position, from, (to - from) as u32))
                })
                .collect();
            want.sort_by_key(|overlap| overlap.1);
            prop_assert_eq!(set.plan.overlaps(first, pages).collect::<Vec<_>>(), want);
        }
    }

    #[test]
    fn a_hostile_extent_is_refused() {
        let mut bytes = Vec::new();
        PhaseSet::new().write(&mut bytes);
        bytes.pop();
        put(&mut bytes, 1);
        put_signed(&mut bytes, MAX_PAGES as i64);
        bytes.extend([1, 0, TOUCHED_ONCE]);
        assert_eq!(PhaseSet::read(&mut Reader::new(&bytes)), Err(WireError::Invalid("extent")));
    }
}
