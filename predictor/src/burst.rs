//! First-touch sets of unnamed activity: what a VM does outside named phases is cut into bursts by quiet gaps. A burst
//! is recognised by its first blocks: when two of them are read again, the rest is replayed.
//!
//! The number of bursts, their pages and the replays running at once are bounded; the burst unused for longest leaves.

use crate::access::BLOCK_PAGES;
use crate::odds::Odds;
use crate::phase::PhaseSet;
use crate::record::Recording;
use crate::replay::{Replay, Window};
use crate::wire::{Reader, WireError, put};
use rustc_hash::FxHashMap;

/// Blocks by which a burst is recognised: this many at its start and [`TRIGGERS_AFTER_PAUSE`] after each pause in it of
/// a quarter of the gap or more, because another run may pause there for longer and so be cut in two.
const TRIGGERS_AT_START: usize = 8;
const TRIGGERS_AFTER_PAUSE: usize = 4;
const TRIGGERS: usize = 32;
/// How many of them must be read again.
const TRIGGERED_BY: u32 = 2;
/// Blocks that already trigger this many bursts say little.
const TRIGGER_SHARED_BY: usize = 4;
/// Replays of one VM at a time.
const REPLAYS: usize = 4;
/// A replay ends when it matched nothing for this long; a pause of the burst alone does not end it.
const REPLAY_IDLE_US: u64 = 60_000_000;
/// A shorter burst is not worth a set: extents, or pages.
const MIN_EXTENTS: usize = 16;
const MIN_PAGES: u64 = 64;
/// A recorded burst is a run of a known one if they share this part of the recorded pages.
const SAME_SHARE: f64 = 0.4;

/// A burst's reliability starts from this prior, worth [`RELIABILITY_WEIGHT`] replays; older replays fade.
const RELIABILITY_PRIOR: f32 = 0.95;
const RELIABILITY_WEIGHT: f32 = 2.0;
const RELIABILITY_FADING: f32 = 0.8;

/// A burst too large for one recording goes on in so many more; then it is no burst but a steady load, which must not
/// drive out the bursts that are known.
const CONTINUED: u32 = 1;

/// Limits, see `AccessConfig`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BurstLimits {
    pub(crate) bursts: usize,
    /// Pages of one recorded burst.
    pub(crate) pages: u64,
    /// Extents of all bursts.
    pub(crate) extents: usize,
    /// Quiet time that ends a burst.
    pub(crate) gap_us: u64,
    pub(crate) window: Window,
}

#[derive(Clone, Debug)]
struct Burst {
    id: u32,
    set: PhaseSet,
    triggers: Vec<u32>,
    /// Replays and what share of their promises was used: does the trigger tell what follows?
    replays: Odds,
    /// Order of use, for eviction.
    used: u64,
}

impl Burst {
    fn reliability(&self) -> f32 {
        (self.replays.used + RELIABILITY_PRIOR * RELIABILITY_WEIGHT) / (self.replays.total + RELIABILITY_WEIGHT)
    }

    fn judge(&mut self, share_used: f32) {
        self.replays.total = self.replays.total * RELIABILITY_FADING + 1.0;
        self.replays.used = (self.replays.used * RELIABILITY_FADING + share_used).min(self.replays.total);
    }
}

/// The bursts known of a storage.
#[derive(Clone, Debug)]
pub(crate) struct BurstSets {
    limits: BurstLimits,
    bursts: Vec<Burst>,
    /// Trigger block → ids of the bursts it belongs to.
    index: FxHashMap<u32, Vec<u32>>,
    next_id: u32,
    uses: u64,
}

/// A VM's present burst.
#[derive(Debug, Default)]
pub(crate) struct BurstCursor {
    recording: Option<Recording>,
    /// Recordings since the last pause that were full.
    continued: u32,
    latest_us: u64,
    /// Trigger blocks seen by burst.
    seen: Vec<(u32, Vec<u32>)>,
    replays: Vec<(u32, Replay)>,
}

impl BurstSets {
    pub(crate) fn new(limits: BurstLimits) -> Self {
        Self { limits, bursts: Vec::new(), index: FxHashMap::default(), next_id: 0, uses: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.bursts.len()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bursts.iter().map(|burst| burst.set.pages()).sum()
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.bursts.iter().map(|burst| burst.set.memory_bytes() + size_of::<Burst>() + TRIGGERS * 4).sum::<usize>()
            + self.index.capacity() * 64
    }

    /// Takes in a read; true if a running replay foresaw all of it.
    pub(crate) fn read(&mut self, cursor: &mut BurstCursor, first: u64, pages: u32, at_us: u64) -> bool {
        if cursor.recording.is_some() && at_us.saturating_sub(cursor.latest_us) >= self.limits.gap_us {
            self.close(cursor);
            self.retire(cursor, at_us);
            cursor.continued = 0;
        } else if cursor.recording.as_ref().is_some_and(Recording::is_full) && cursor.continued < CONTINUED {
            self.close(cursor);
            cursor.continued += 1;
        }
        let limit = self.limits.pages;
        let recording = cursor.recording.get_or_insert_with(|| Recording::new(at_us, limit));
        if recording.read(first, pages, at_us) > 0 || recording.is_full() {
            cursor.latest_us = cursor.latest_us.max(at_us);
        }
        let mut foreseen = false;
        for (_, replay) in &mut cursor.replays {
            foreseen |= replay.read(first, pages, at_us);
        }
        self.trigger(cursor, first, pages, at_us);
        foreseen
    }

    pub(crate) fn write(&self, cursor: &mut BurstCursor, first: u64, pages: u32, at_us: u64) {
        if let Some(recording) = &mut cursor.recording {
            recording.write(first, pages, at_us);
        }
    }

    /// Ends the VM's present burst and learns from it.
    pub(crate) fn close(&mut self, cursor: &mut BurstCursor) {
        cursor.seen.clear();
        if let Some(recording) = cursor.recording.take() {
            self.learn(&recording);
        }
    }

    /// Ends the VM's burst and its replays: what follows is something else.
    pub(crate) fn end(&mut self, cursor: &mut BurstCursor) {
        self.close(cursor);
        self.retire(cursor, u64::MAX);
    }

    /// Ends the replays that matched nothing for long, and learns how reliable their triggers were.
    fn retire(&mut self, cursor: &mut BurstCursor, at_us: u64) {
        cursor.replays.retain(|(id, replay)| {
            if at_us.saturating_sub(replay.matched_us()) < REPLAY_IDLE_US {
                return true;
            }
            self.judge(*id, replay);
            false
        });
    }

    fn judge(&mut self, id: u32, replay: &Replay) {
        if let (Some(share), Some(burst)) = (replay.verdict(), self.bursts.iter_mut().find(|burst| burst.id == id)) {
            burst.judge(share);
        }
    }

    /// Learns what the present burst is so far, for a snapshot.
    pub(crate) fn learn_open(&mut self, cursor: &BurstCursor) {
        if let Some(recording) = &cursor.recording {
            self.learn(recording);
        }
    }

    fn learn(&mut self, recording: &Recording) {
        if recording.order().len() < MIN_EXTENTS && recording.pages().len() < MIN_PAGES {
            return;
        }
        self.uses += 1;
        let same = self.bursts.iter_mut().map(|burst| (shared_pages(&burst.set, recording), burst));
        let best = same.max_by_key(|(shared, burst)| (*shared, std::cmp::Reverse(burst.id)));
        if let Some((shared, burst)) = best
            && shared as f64 >= recording.pages().len() as f64 * SAME_SHARE
        {
            burst.set.merge(recording);
            burst.used = self.uses;
        } else {
            let triggers = self.choose_triggers(recording);
            let mut set = PhaseSet::new();
            set.merge(recording);
            self.bursts.push(Burst { id: self.next_id, set, triggers, replays: Odds::default(), used: self.uses });
            self.next_id = self.next_id.wrapping_add(1);
        }
        self.evict();
        self.rebuild_index();
    }

    fn choose_triggers(&self, recording: &Recording) -> Vec<u32> {
        let pause_ms = u32::try_from(self.limits.gap_us / 4000).unwrap_or(u32::MAX);
        let mut triggers: Vec<u32> = Vec::new();
        let (mut wanted, mut before_ms) = (TRIGGERS_AT_START, 0);
        for touched in recording.order() {
            if touched.at_ms.saturating_sub(before_ms) >= pause_ms {
                wanted = wanted.max(TRIGGERS_AFTER_PAUSE);
            }
            before_ms = touched.at_ms;
            let block = (touched.first / BLOCK_PAGES) as u32;
            let shared = self.index.get(&block).map_or(0, Vec::len);
            if wanted > 0 && shared < TRIGGER_SHARED_BY && !triggers.contains(&block) {
                triggers.push(block);
                wanted -= 1;
            }
            if triggers.len() == TRIGGERS {
                break;
            }
        }
        triggers
    }

    fn evict(&mut self) {
        let extents = |bursts: &[Burst]| bursts.iter().map(|burst| burst.set.extents()).sum::<usize>();
        while self.bursts.len() > self.limits.bursts || extents(&self.bursts) > self.limits.extents {
            let Some(oldest) = (0..self.bursts.len()).min_by_key(|&index| self.bursts[index].used) else { return };
            self.bursts.remove(oldest);
        }
    }

    fn rebuild_index(&mut self) {
        self.index.clear();
        for burst in &self.bursts {
            for &block in &burst.triggers {
                self.index.entry(block).or_default().push(burst.id);
            }
        }
    }

    fn trigger(&mut self, cursor: &mut BurstCursor, first: u64, pages: u32, at_us: u64) {
        let mut retired = Vec::new();
        let (from, to) = (first / BLOCK_PAGES, (first + u64::from(pages) - 1) / BLOCK_PAGES);
        for block in from..=to {
            let Some(ids) = self.index.get(&(block as u32)) else { continue };
            for &id in ids {
                if cursor.replays.iter().any(|(replayed, _)| *replayed == id) {
                    continue;
                }
                let position = cursor.seen.iter().position(|(seen, _)| *seen == id).unwrap_or_else(|| {
                    cursor.seen.push((id, Vec::new()));
                    cursor.seen.len() - 1
                });
                let blocks = &mut cursor.seen[position].1;
                if !blocks.contains(&(block as u32)) {
                    blocks.push(block as u32);
                }
                if (blocks.len() as u32) < TRIGGERED_BY {
                    continue;
                }
                let Some(burst) = self.bursts.iter_mut().find(|burst| burst.id == id) else { continue };
                self.uses += 1;
                burst.used = self.uses;
                if cursor.replays.len() >= REPLAYS {
                    let oldest = (0..REPLAYS).min_by_key(|&at| cursor.replays[at].1.matched_us()).unwrap_or(0);
                    retired.push(cursor.replays.swap_remove(oldest));
                }
                let plan = std::sync::Arc::clone(burst.set.plan());
                let mut replay = Replay::new(plan, self.limits.window, burst.reliability(), at_us);
                let so_far = cursor.recording.as_ref().map_or(&[][..], Recording::order);
                // The last of what was read before recognition is enough to place the replay.
                for touched in &so_far[so_far.len().saturating_sub(256)..] {
                    replay.read(touched.first, touched.pages, at_us);
                }
                cursor.replays.push((id, replay));
            }
        }
        retired.into_iter().for_each(|(id, replay)| self.judge(id, &replay));
    }

    /// Layout: count, then from the least to the most recently used: triggers (count, block
    /// indices), reliability (two floats), phase set.
    pub(crate) fn write_to(&self, out: &mut Vec<u8>) {
        let mut bursts: Vec<&Burst> = self.bursts.iter().collect();
        bursts.sort_by_key(|burst| burst.used);
        put(out, bursts.len() as u64);
        for burst in bursts {
            put(out, burst.triggers.len() as u64);
            for &block in &burst.triggers {
                put(out, u64::from(block));
            }
            burst.replays.write(out);
            burst.set.write(out);
        }
    }

    pub(crate) fn read_from(reader: &mut Reader<'_>, limits: BurstLimits) -> Result<Self, WireError> {
        let mut sets = Self::new(limits);
        let count = reader.count(16, "bursts")?;
        for _ in 0..count {
            let triggers = reader.at_most(TRIGGERS as u64, "triggers of a burst")?;
            let triggers = (0..triggers)
                .map(|_| Ok(reader.at_most(u64::from(u32::MAX), "trigger block")? as u32))
                .collect::<Result<Vec<_>, WireError>>()?;
            let replays = Odds::read(reader)?;
            let set = PhaseSet::read(reader)?;
            sets.uses += 1;
            sets.bursts.push(Burst { id: sets.next_id, set, triggers, replays, used: sets.uses });
            sets.next_id = sets.next_id.wrapping_add(1);
        }
        sets.evict();
        sets.rebuild_index();
        Ok(sets)
    }
}

impl BurstCursor {
    pub(crate) fn replays(&mut self) -> impl Iterator<Item = &mut Replay> {
        self.replays.iter_mut().map(|(_, replay)| replay)
    }

    /// The plans that are followed at this moment.
    pub(crate) fn running(&self) -> impl Iterator<Item = &Replay> {
        self.replays.iter().map(|(_, replay)| replay)
    }

    pub(crate) fn is_trusted(&self) -> bool {
        self.replays.iter().any(|(_, replay)| replay.is_trusted())
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.recording.as_ref().map_or(0, Recording::memory_bytes)
            + self.replays.iter().map(|(_, replay)| replay.memory_bytes()).sum::<usize>()
            + self.seen.capacity() * 64
    }
}

fn shared_pages(set: &PhaseSet, recording: &Recording) -> u64 {
    let plan = set.plan();
    let overlaps = recording.order().iter().flat_map(|touched| plan.overlaps(touched.first, touched.pages));
    overlaps.map(|(_, _, pages)| u64::from(pages)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BurstLimits = BurstLimits {
        bursts: 4,
        pages: 1000,
        extents: 10_000,
        gap_us: 2_000_000,
        window: Window { pages: 1 << 14, horizon_ms: 60_000, slow_start: true },
    };

    fn program(number: u64) -> impl Iterator<Item = u64> {
        (0..60).map(move |i| number * 100_000 + i * 37)
    }

    /// Runs a program; returns the pages proposed before they were read.
    fn run(sets: &mut BurstSets, cursor: &mut BurstCursor, number: u64, at_us: &mut u64) -> usize {
        let (mut proposed, mut foreseen) = (std::collections::BTreeSet::new(), 0);
        *at_us += 100_000_000;
        for page in program(number) {
            foreseen += usize::from(proposed.contains(&page));
            sets.read(cursor, page, 1, *at_us);
            for replay in cursor.replays() {
                replay.propose(*at_us, 0.3, |extent, _, _| {
                    proposed.extend(extent.first..extent.end());
                });
            }
            *at_us += 1000;
        }
        foreseen
    }

    #[test]
    fn a_program_is_recognised_by_its_first_blocks() {
        let (mut sets, mut cursor, mut at_us) = (BurstSets::new(LIMITS), BurstCursor::default(), 0);
        for number in 0..3 {
            assert_eq!(run(&mut sets, &mut cursor, number, &mut at_us), 0);
        }
        sets.end(&mut cursor);
        assert_eq!(sets.len(), 3);
        assert!(run(&mut sets, &mut cursor, 1, &mut at_us) >= 57);
        sets.end(&mut cursor);
        assert_eq!(sets.len(), 3, "a second run belongs to the known burst");
    }

    #[test]
    fn bursts_are_bounded_and_the_least_used_leaves() {
        let (mut sets, mut cursor, mut at_us) = (BurstSets::new(LIMITS), BurstCursor::default(), 0);
        for number in 0..4 {
            run(&mut sets, &mut cursor, number, &mut at_us);
        }
        run(&mut sets, &mut cursor, 0, &mut at_us);
        for number in 4..7 {
            run(&mut sets, &mut cursor, number, &mut at_us);
        }
        sets.end(&mut cursor);
        assert_eq!(sets.len(), 4);
        assert!(run(&mut sets, &mut cursor, 0, &mut at_us) > 50);
        assert_eq!(run(&mut sets, &mut cursor, 1, &mut at_us), 0);
    }

    #[test]
    fn a_few_reads_are_no_burst() {
        let (mut sets, mut cursor) = (BurstSets::new(LIMITS), BurstCursor::default());
        for page in program(0).take(10) {
            sets.read(&mut cursor, page, 1, 0);
        }
        sets.end(&mut cursor);
        assert_eq!(sets.len(), 0);
    }

    #[test]
    fn a_longer_pause_within_a_program_does_not_lose_it() {
        let (mut sets, mut cursor, mut at_us) = (BurstSets::new(LIMITS), BurstCursor::default(), 0);
        let mut proposed = std::collections::BTreeSet::new();
        // Taught with a pause of one second after 30 pages, run with one of three and other pages first.
        for (skip, pause_us) in [(0, 1_000_000), (25, 3_000_000)] {
            at_us += 100_000_000;
            for (i, page) in program(0).enumerate().skip(skip) {
                at_us += if i == 30 { pause_us } else { 1000 };
                sets.read(&mut cursor, page, 1, at_us);
                for replay in cursor.replays() {
                    replay.propose(at_us, 0.3, |extent, _, _| proposed.extend(extent.first..extent.end()));
                }
            }
            sets.end(&mut cursor);
        }
        assert!(proposed.len() >= 27, "{}", proposed.len());
        assert!(sets.bursts.iter().all(|burst| burst.triggers.len() <= TRIGGERS));
    }
}
