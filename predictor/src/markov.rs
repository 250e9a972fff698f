//! Expert: Markov contexts. One bounded table holds five kinds of context:
//!
//! | kind | context | predicts |
//! | --- | --- | --- |
//! | order 1 | block left last | next block entered |
//! | order 2 | the two blocks left last | next block entered |
//! | skip-4 | block left four blocks ago | block entered now: found with a lead of four |
//! | delta 1 | last distance between request starts | next distance |
//! | delta 2 | last two distances | next distance |
//!
//! A context is one cache line: a tag and up to [`SLOTS`] successors with aged counts. A successor block carries the
//! mask of the pages that were read in it (and how many followed it in the same request), so that a prediction is as
//! precise as the visit that taught it. Lookahead follows the likeliest path for [`DEPTH`] steps and multiplies
//! probabilities along it; the product is only a score, turned into a probability by the observed share of its class.

use crate::access::{BLOCK_PAGES, Expert};
use crate::odds::Class;
use crate::pageset::{block_masks, mask_runs};
use crate::streams::Proposal;
use crate::wire::{Reader, WireError, put};

/// Successors in a context.
const SLOTS: usize = 7;
/// Contexts that compete for a place.
const WAYS: usize = 4;
/// Steps of lookahead along the likeliest path.
const DEPTH: u32 = 5;
/// Distance of the skip context, in visited blocks.
const SKIP: usize = 4;
/// Counts of a context are halved when one reaches this, so that it follows a change.
const COUNT_MAX: u8 = 200;
/// Also when its total reaches this: successors that never repeat must not outweigh one that begins to.
const TOTAL_MAX: u32 = 1600;
/// Scores below this are not proposed and not followed.
const MIN_SCORE: f32 = 0.15;
/// Successors proposed for the next step, at most.
const TOP: usize = 3;
/// A distance beyond this says nothing about another place of the disk.
const MAX_DELTA_PAGES: i64 = 1 << 20;

const KINDS: usize = 5;
/// Classes of this expert's proposals: kind × score bucket (6) × depth bucket (3).
pub(crate) const CLASSES: usize = KINDS * 6 * 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Order1,
    Order2,
    Skip,
    Delta1,
    Delta2,
}

/// `key` is a block index, or a distance in pages (two's complement) for delta contexts. For those `mask` is the
/// request's length in pages, else the pages read in the block; `tail` is the number of pages that followed the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slot {
    key: u32,
    mask: u16,
    count: u8,
    tail: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(align(64))]
struct Context {
    /// 0: vacant.
    tag: u32,
    total: u32,
    slots: [Slot; SLOTS],
}

/// Where a visit's pages are being noted.
#[derive(Clone, Copy, Debug)]
struct Noted {
    context: usize,
    tag: u32,
    block: u32,
}

/// A VM's place in the contexts.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    /// Blocks left, latest last; `seen` of them are valid.
    left: [u32; SKIP],
    seen: usize,
    /// Block of the latest request's end.
    at: Option<u32>,
    last_first: u64,
    deltas: [i64; 2],
    known_deltas: usize,
    noted: [Option<Noted>; 3],
}

#[derive(Debug)]
pub(crate) struct MarkovTable {
    contexts: Vec<Context>,
    set_mask: usize,
    used: usize,
}

impl MarkovTable {
    /// A table for about `contexts` contexts of 64 bytes (rounded up to a power of two, at least 64).
    pub(crate) fn new(contexts: usize) -> Self {
        let sets = contexts.clamp(64, 1 << 22).next_power_of_two() / WAYS;
        Self { contexts: vec![Context::default(); sets * WAYS], set_mask: sets - 1, used: 0 }
    }

    /// Contexts in use.
    pub(crate) fn len(&self) -> usize {
        self.used
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.contexts.capacity() * size_of::<Context>()
    }

    /// Learns from a read of a VM. With `learn` false the VM's place moves, but no transition is recorded: streams know
    /// it better.
    pub(crate) fn observe(&mut self, cursor: &mut Cursor, first: u64, pages: u32, learn: bool) {
        let end = first + u64::from(pages);
        let (entered, leaving) = ((first / BLOCK_PAGES) as u32, ((end - 1) / BLOCK_PAGES) as u32);
        let mask = block_masks(first, pages).next().map_or(0, |(_, mask)| mask);
        let tail = end.saturating_sub((u64::from(entered) + 1) * BLOCK_PAGES).min(255) as u8;
        match cursor.at {
            Some(at) if at == entered => {
                for noted in cursor.noted.into_iter().flatten().filter(|noted| noted.block == entered) {
                    self.note_more(noted, mask, tail);
                }
            }
            Some(at) => {
                cursor.noted = [None; 3];
                if learn {
                    let to = Slot { key: entered, mask, count: 0, tail };
                    cursor.noted[0] = Some(self.learn(tag(Kind::Order1, at, 0), to));
                    if cursor.seen >= 1 {
                        let before = cursor.left[SKIP - 1];
                        cursor.noted[1] = Some(self.learn(tag(Kind::Order2, at, before), to));
                    }
                    if cursor.seen + 1 >= SKIP {
                        // `at` is about to be pushed: the block left SKIP visits before this one.
                        cursor.noted[2] = Some(self.learn(tag(Kind::Skip, cursor.left[1], 0), to));
                    }
                }
                cursor.left.rotate_left(1);
                cursor.left[SKIP - 1] = at;
                cursor.seen = (cursor.seen + 1).min(SKIP);
            }
            None => {}
        }
        if cursor.at.is_some() {
            let delta = first as i64 - cursor.last_first as i64;
            if learn && delta.abs() <= MAX_DELTA_PAGES {
                let to =
                    Slot { key: delta as i32 as u32, mask: pages.min(u32::from(u16::MAX)) as u16, count: 0, tail: 0 };
                if let Some((one, two)) = cursor.delta_tags() {
                    self.learn(one, to);
                    if let Some(two) = two {
                        self.learn(two, to);
                    }
                }
            }
            cursor.deltas = [delta, cursor.deltas[0]];
            cursor.known_deltas = (cursor.known_deltas + 1).min(2);
        }
        cursor.last_first = first;
        cursor.at = Some(leaving);
    }

    /// What the VM's place leads to expect.
    pub(crate) fn predict(&self, cursor: &Cursor, out: &mut Vec<Proposal>) {
        let Some(at) = cursor.at else { return };
        self.follow(cursor, at, out);
        if let Some(context) = self.get(tag(Kind::Skip, at, 0)) {
            for (slot, score) in context.top().take(2) {
                propose_block(slot, score, Kind::Skip, SKIP as u32, out);
            }
        }
        self.follow_deltas(cursor, out);
    }

    /// Lookahead over blocks.
    fn follow(&self, cursor: &Cursor, mut at: u32, out: &mut Vec<Proposal>) {
        let mut before = (cursor.seen >= 1).then(|| cursor.left[SKIP - 1]);
        let mut score = 1.0;
        for depth in 1..=DEPTH {
            let order2 =
                before.and_then(|before| self.get(tag(Kind::Order2, at, before))).filter(|context| context.total >= 2);
            let (context, kind) = match (order2, self.get(tag(Kind::Order1, at, 0))) {
                (Some(context), _) => (context, Kind::Order2),
                (None, Some(context)) => (context, Kind::Order1),
                (None, None) => return,
            };
            let mut top = context.top();
            let Some((best, best_score)) = top.next() else { return };
            let others = if depth == 1 { TOP - 1 } else { 0 };
            for (slot, other) in top.take(others) {
                if score * other >= MIN_SCORE {
                    propose_block(slot, score * other, kind, depth, out);
                }
            }
            score *= best_score;
            if score < MIN_SCORE {
                return;
            }
            propose_block(best, score, kind, depth, out);
            before = Some(at);
            at = best.key.saturating_add(u32::from(best.tail).div_ceil(BLOCK_PAGES as u32));
        }
    }

    fn follow_deltas(&self, cursor: &Cursor, out: &mut Vec<Proposal>) {
        let Some((one, two)) = cursor.delta_tags() else { return };
        let found = two
            .and_then(|two| self.get(two))
            .filter(|context| context.total >= 3)
            .map(|context| (context, Kind::Delta2))
            .or_else(|| self.get(one).filter(|context| context.total >= 4).map(|context| (context, Kind::Delta1)));
        let Some((context, kind)) = found else { return };
        let Some((slot, score)) = context.top().next() else { return };
        let target = cursor.last_first.checked_add_signed(i64::from(slot.key as i32));
        if score >= MIN_SCORE
            && slot.mask > 0
            && let Some(first) = target
        {
            out.push(Proposal {
                first,
                pages: u32::from(slot.mask).min(64),
                expert: Expert::Delta,
                class: class(kind, score, 1),
                prior: score * 0.7,
                due_us: None,
            });
        }
    }

    fn set_of(&self, tag: u32) -> usize {
        (tag as usize & self.set_mask) * WAYS
    }

    fn get(&self, tag: u32) -> Option<&Context> {
        let set = self.set_of(tag);
        self.contexts[set..set + WAYS].iter().find(|context| context.tag == tag)
    }

    fn learn(&mut self, tag: u32, to: Slot) -> Noted {
        let set = self.set_of(tag);
        let ways = &mut self.contexts[set..set + WAYS];
        let way = ways.iter().position(|context| context.tag == tag).unwrap_or_else(|| {
            // The least confirmed context leaves; the others age a little, so that none stays for ever unused.
            let weakest = (0..WAYS).min_by_key(|&way| ways[way].total).unwrap_or(0);
            self.used += usize::from(ways[weakest].tag == 0);
            for (way, context) in ways.iter_mut().enumerate() {
                if way != weakest && context.total > 1 {
                    context.total -= 1;
                }
            }
            ways[weakest] = Context { tag, ..Context::default() };
            weakest
        });
        ways[way].learn(to);
        Noted { context: set + way, tag, block: to.key }
    }

    fn note_more(&mut self, noted: Noted, mask: u16, tail: u8) {
        let context = &mut self.contexts[noted.context];
        if context.tag == noted.tag
            && let Some(slot) = context.slots.iter_mut().find(|slot| slot.count > 0 && slot.key == noted.block)
        {
            slot.mask |= mask;
            slot.tail = slot.tail.max(tail);
        }
    }

    /// Layout: contexts of the table (power of two), contexts in use, then for each: index gap, tag, total, slots in
    /// use, and for each slot key, mask, count, tail; all variable-length numbers.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        put(out, self.contexts.len() as u64);
        put(out, self.used as u64);
        let mut previous = 0;
        for (index, context) in self.contexts.iter().enumerate().filter(|(_, context)| context.tag != 0) {
            put(out, (index - previous) as u64);
            previous = index;
            put(out, u64::from(context.tag));
            put(out, u64::from(context.total));
            let slots = || context.slots.iter().take_while(|slot| slot.count > 0);
            put(out, slots().count() as u64);
            for slot in slots() {
                put(out, u64::from(slot.key));
                put(out, u64::from(slot.mask));
                out.extend([slot.count, slot.tail]);
            }
        }
    }

    /// Reads what [`MarkovTable::write`] wrote into a table of `contexts` contexts. A table of another size is
    /// rehashed, the better confirmed contexts first in line.
    pub(crate) fn read(reader: &mut Reader<'_>, contexts: usize) -> Result<Self, WireError> {
        let mut table = Self::new(contexts);
        let written = reader.at_most(1 << 24, "Markov table size")? as usize;
        let count = reader.count(4, "Markov contexts")?;
        let mut index = 0usize;
        for _ in 0..count {
            index = index.saturating_add(reader.at_most(1 << 24, "Markov index")? as usize);
            let mut context = Context {
                tag: reader.at_most(u64::from(u32::MAX), "Markov tag")? as u32,
                total: reader.at_most(u64::from(TOTAL_MAX), "Markov total")? as u32,
                ..Context::default()
            };
            let slots = reader.at_most(SLOTS as u64, "Markov successors")? as usize;
            for slot in &mut context.slots[..slots] {
                slot.key = reader.at_most(u64::from(u32::MAX), "Markov successor")? as u32;
                slot.mask = reader.at_most(u64::from(u16::MAX), "Markov mask")? as u16;
                slot.count = reader.byte()?.clamp(1, COUNT_MAX);
                slot.tail = reader.byte()?;
            }
            if context.tag == 0 || index >= written {
                return Err(WireError::Invalid("Markov context"));
            }
            // Same size: the same place, so that later replacements are the same too.
            let set = table.set_of(context.tag);
            let place = if written == table.contexts.len() && index / WAYS == set / WAYS {
                index
            } else {
                (set..set + WAYS).min_by_key(|&place| table.contexts[place].total).unwrap_or(set)
            };
            let held = &mut table.contexts[place];
            if held.tag == 0 || held.total < context.total {
                table.used += usize::from(held.tag == 0);
                *held = context;
            }
        }
        Ok(table)
    }
}

impl Cursor {
    /// Tags of the delta contexts the VM is in: order 1, and order 2 if two distances are known.
    fn delta_tags(&self) -> Option<(u32, Option<u32>)> {
        let [one, two] = self.deltas;
        let near = |delta: i64| delta.abs() <= MAX_DELTA_PAGES;
        if self.known_deltas == 0 || !near(one) {
            return None;
        }
        let order2 =
            (self.known_deltas == 2 && near(two)).then(|| tag(Kind::Delta2, one as i32 as u32, two as i32 as u32));
        Some((tag(Kind::Delta1, one as i32 as u32, 0), order2))
    }
}

impl Context {
    fn learn(&mut self, to: Slot) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.count > 0 && slot.key == to.key) {
            slot.count += 1;
            (slot.mask, slot.tail) = (to.mask, to.tail);
        } else if let Some(slot) = self.slots.iter_mut().find(|slot| slot.count == 0) {
            *slot = Slot { count: 1, ..to };
        } else if let Some(weakest) = self.slots.iter_mut().min_by_key(|slot| slot.count) {
            // A newcomer must wear the weakest down first.
            if weakest.count <= 1 {
                *weakest = Slot { count: 1, ..to };
            } else {
                weakest.count -= 1;
            }
        }
        self.total += 1;
        if self.total >= TOTAL_MAX || self.slots.iter().any(|slot| slot.count >= COUNT_MAX) {
            for slot in self.slots.iter_mut().filter(|slot| slot.count > 0) {
                slot.count = (slot.count / 2).max(1);
            }
            self.total = self.total.div_ceil(2);
        }
    }

    /// Successors by falling share, at least [`MIN_SCORE`] each.
    fn top(&self) -> impl Iterator<Item = (Slot, f32)> {
        let counted: u32 = self.slots.iter().map(|slot| u32::from(slot.count)).sum();
        let total = self.total.max(counted).max(1) as f32;
        let mut taken = 0u8;
        let slots = self.slots;
        std::iter::from_fn(move || {
            let (index, slot) = slots
                .iter()
                .enumerate()
                .filter(|(index, slot)| slot.count > 0 && taken >> index & 1 == 0)
                .max_by_key(|(index, slot)| (slot.count, std::cmp::Reverse(*index)))?;
            taken |= 1 << index;
            let score = f32::from(slot.count) / (total + 0.5);
            (score >= MIN_SCORE).then_some((*slot, score))
        })
    }
}

fn propose_block(slot: Slot, score: f32, kind: Kind, depth: u32, out: &mut Vec<Proposal>) {
    let block = u64::from(slot.key) * BLOCK_PAGES;
    let class = class(kind, score, depth);
    let mut push = |first: u64, pages: u32| {
        let proposal = Proposal { first, pages, expert: Expert::Markov, class, prior: score * 0.7, due_us: None };
        out.push(proposal);
    };
    for (from, count) in mask_runs(slot.mask) {
        let reaches_end = u64::from(from + count) == BLOCK_PAGES;
        let tail = if reaches_end { u32::from(slot.tail) } else { 0 };
        push(block + u64::from(from), count + tail);
    }
}

fn class(kind: Kind, score: f32, depth: u32) -> Class {
    let score = ((score - MIN_SCORE).max(0.0) / (1.0 - MIN_SCORE) * 6.0).min(5.0) as usize;
    let depth = match depth {
        1 => 0,
        2..=3 => 1,
        _ => 2,
    };
    Class::markov((kind as usize * 6 + score) * 3 + depth)
}

/// Tag of a context, never 0; also its place in the table. Two contexts share a tag once in 2^32.
fn tag(kind: Kind, a: u32, b: u32) -> u32 {
    // Finaliser of MurmurHash3 over the three parts.
    let mut x = u64::from(a) | u64::from(b) << 32;
    x ^= (kind as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ x >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    ((x ^ x >> 33) as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Scattered blocks in a fixed, irregular order, each read of pages 2 and 3 of its block.
    fn cycle(length: u64) -> Vec<u64> {
        (0..length).map(|i| (i * 7919 + i * i * 104_729) % 1_000_003 * BLOCK_PAGES + 2).collect()
    }

    fn proposed(table: &MarkovTable, cursor: &Cursor) -> BTreeSet<u64> {
        let mut out = Vec::new();
        table.predict(cursor, &mut out);
        out.iter().flat_map(|p| p.first..p.first + u64::from(p.pages)).collect()
    }

    #[test]
    fn a_repeated_walk_is_foreseen_by_several_steps_and_to_the_page() {
        let (mut table, mut cursor) = (MarkovTable::new(4096), Cursor::default());
        let walk = cycle(200);
        for _ in 0..4 {
            for &first in &walk {
                table.observe(&mut cursor, first, 2, true);
            }
        }
        for (i, &first) in walk.iter().enumerate().take(100) {
            table.observe(&mut cursor, first, 2, true);
            let pages = proposed(&table, &cursor);
            for ahead in 1..=4 {
                assert!(pages.contains(&walk[i + ahead]) && pages.contains(&(walk[i + ahead] + 1)), "step {i}+{ahead}");
            }
            assert!(pages.iter().all(|page| matches!(page % BLOCK_PAGES, 2 | 3)));
        }
    }

    #[test]
    fn order_two_tells_shared_blocks_apart() {
        let (mut table, mut cursor) = (MarkovTable::new(4096), Cursor::default());
        let at = |block: u64| block * 1000 * BLOCK_PAGES;
        for _ in 0..20 {
            for block in [1, 5, 2, 3, 5, 4] {
                table.observe(&mut cursor, at(block), 1, true);
            }
        }
        let mut out = Vec::new();
        for block in [1, 5] {
            table.observe(&mut cursor, at(block), 1, true);
        }
        table.predict(&cursor, &mut out);
        assert_eq!((out[0].first, out[0].expert), (at(2), Expert::Markov));
        assert!(out[0].prior > 0.6);
    }

    #[test]
    fn an_irregular_pattern_of_distances_is_foreseen_at_new_places() {
        let (mut table, mut cursor) = (MarkovTable::new(4096), Cursor::default());
        let mut first = 0u64;
        let mut hits = 0;
        for i in 0..600 {
            let delta = [1000, 37, 300][i % 3];
            if proposed(&table, &cursor).contains(&(first + delta)) {
                hits += 1;
            }
            first += delta;
            table.observe(&mut cursor, first, 1, true);
        }
        assert!(hits > 570, "{hits}");
    }

    #[test]
    fn the_table_is_bounded_and_keeps_what_repeats() {
        let (mut table, mut cursor) = (MarkovTable::new(1024), Cursor::default());
        let walk = cycle(20);
        for i in 0..100_000u64 {
            table.observe(&mut cursor, i * 48_611 % 5_000_011 * BLOCK_PAGES, 1, true);
            if i % 100 == 0 {
                for &first in &walk {
                    table.observe(&mut cursor, first, 2, true);
                }
            }
        }
        assert!(table.len() <= 1024);
        assert_eq!(table.contexts.iter().filter(|context| context.tag != 0).count(), table.len());
        table.observe(&mut cursor, walk[5], 2, true);
        assert!(proposed(&table, &cursor).contains(&walk[6]));
    }

    #[test]
    fn a_written_table_reads_back_the_same() {
        let (mut table, mut cursor) = (MarkovTable::new(512), Cursor::default());
        for i in 0..5000u64 {
            table.observe(&mut cursor, i * i % 3001 * 20, (i % 40 + 1) as u32, true);
        }
        let mut bytes = Vec::new();
        table.write(&mut bytes);
        let back = MarkovTable::read(&mut Reader::new(&bytes), 512).expect("own bytes");
        assert_eq!(back.contexts, table.contexts);
        assert_eq!(back.len(), table.len());
        let larger = MarkovTable::read(&mut Reader::new(&bytes), 4096).expect("another size");
        assert_eq!(larger.len(), table.len());
        assert_eq!(proposed(&larger, &cursor), proposed(&table, &cursor));
    }

    #[test]
    fn a_context_is_one_cache_line() {
        assert_eq!(size_of::<Context>(), 64);
    }
}
