//! Markov chain over 64 KiB blocks: which block follows which.
//!
//! A context is 28 bytes: its block and four successors with aged counts. A set of two ways; the one
//! confirmed less leaves. One-step predictions come late, so chains are followed, multiplying nothing: how far along the
//! chain a block lies is part of its context in the mixer, which learns what that is worth.

use crate::wire::{Reader, WireError, put};

const SUCCESSORS: usize = 4;
const FREE: u32 = u32::MAX;
/// A confirmed successor gains this, a displaced one loses one.
const GAIN: u8 = 2;

#[derive(Clone, Copy, Debug)]
struct Context {
    block: u32,
    next: [u32; SUCCESSORS],
    counts: [u8; SUCCESSORS],
    strength: u8,
}

const BLANK: Context = Context { block: FREE, next: [FREE; SUCCESSORS], counts: [0; SUCCESSORS], strength: 0 };

#[derive(Debug)]
pub(crate) struct Granules {
    contexts: Vec<Context>,
}

/// A successor: block, count, how many steps along the chain, place among the step's successors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Successor {
    pub(crate) block: u64,
    pub(crate) count: u8,
    pub(crate) step: u8,
    pub(crate) rank: u8,
}

/// Steps followed, and successors considered at the first.
const STEPS: u8 = 4;
const FIRST_STEP: usize = 3;

impl Granules {
    /// Room for `contexts`, rounded up to a power of two.
    pub(crate) fn new(contexts: usize) -> Self {
        Self { contexts: vec![BLANK; contexts.next_power_of_two().max(16)] }
    }

    fn set(&self, block: u32) -> usize {
        (block.wrapping_mul(0x9E37_79B1) >> 7) as usize & (self.contexts.len() - 1) & !1
    }

    fn find(&self, block: u32) -> Option<&Context> {
        let set = self.set(block);
        self.contexts[set..set + 2].iter().find(|context| context.block == block)
    }

    /// `to` was read after `from`.
    pub(crate) fn learn(&mut self, from: u64, to: u64) {
        let (from, to) = (from as u32, to as u32); // blocks are below 2^32, see MAX_PAGES
        let set = self.set(from);
        let ways = &mut self.contexts[set..set + 2];
        let way = match ways.iter().position(|context| context.block == from) {
            Some(way) => way,
            None => {
                let weaker = usize::from(ways[1].strength < ways[0].strength || ways[1].block == FREE);
                let weaker = if ways[0].block == FREE { 0 } else { weaker };
                if ways[weaker].strength > 0 && ways[weaker].block != FREE {
                    ways[weaker].strength -= 1;
                    // Aged before it is replaced: a context that is confirmed now and then stays.
                    if ways[weaker].strength > 0 {
                        return;
                    }
                }
                ways[weaker] = Context { block: from, ..BLANK };
                weaker
            }
        };
        let context = &mut ways[way];
        context.strength = (context.strength + 1).min(4);
        if let Some(place) = (0..SUCCESSORS).find(|place| context.counts[*place] > 0 && context.next[*place] == to) {
            context.counts[place] = context.counts[place].saturating_add(GAIN);
            return;
        }
        let weakest = (0..SUCCESSORS).min_by_key(|place| context.counts[*place]).unwrap_or(0);
        if context.counts[weakest] <= 1 {
            (context.next[weakest], context.counts[weakest]) = (to, 1);
        } else {
            context.counts[weakest] -= 1;
        }
    }

    /// A block's successors, likeliest first, [`NOTHING`](u32::MAX) where there are fewer; `None`: the block is not known.
    pub(crate) fn ranked(&self, block: u64) -> Option<[u32; SUCCESSORS]> {
        let context = self.find(block as u32)?;
        let mut next = [FREE; SUCCESSORS];
        let mut keys: [u16; SUCCESSORS] =
            std::array::from_fn(|place| u16::from(context.counts[place]) << 2 | (3 - place as u16));
        // Four numbers: a sorting network of five exchanges.
        for (a, b) in [(0, 1), (2, 3), (0, 2), (1, 3), (1, 2)] {
            if keys[a] < keys[b] {
                keys.swap(a, b);
            }
        }
        for (next, key) in next.iter_mut().zip(keys) {
            if key > 3 {
                *next = context.next[usize::from(3 - (key & 3))];
            }
        }
        Some(next)
    }

    /// The likeliest successors of a block and the chain from the first of them, handed to `sink`.
    pub(crate) fn successors(&self, block: u64, mut sink: impl FnMut(Successor)) {
        let mut at = block as u32;
        for step in 0..STEPS {
            let Some(context) = self.find(at) else { return };
            let mut order = [0usize, 1, 2, 3];
            order.sort_unstable_by_key(|place| std::cmp::Reverse(context.counts[*place]));
            for (rank, place) in order.iter().take(if step == 0 { FIRST_STEP } else { 1 }).enumerate() {
                let count = context.counts[*place];
                if count > 0 {
                    sink(Successor { block: u64::from(context.next[*place]), count, step, rank: rank as u8 });
                }
            }
            if context.counts[order[0]] == 0 {
                return;
            }
            at = context.next[order[0]];
        }
    }

    /// Contexts in use.
    pub(crate) fn len(&self) -> usize {
        self.contexts.iter().filter(|context| context.block != FREE).count()
    }

    /// Contexts in use: block, strength, successors with counts.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        put(out, self.len() as u64);
        for context in self.contexts.iter().filter(|context| context.block != FREE) {
            put(out, u64::from(context.block));
            put(out, u64::from(context.strength));
            for place in 0..SUCCESSORS {
                put(out, u64::from(context.counts[place]));
                if context.counts[place] > 0 {
                    put(out, u64::from(context.next[place]));
                }
            }
        }
    }

    /// Takes over what [`Granules::write`] wrote; where this table is smaller, the stronger context of a place stays.
    pub(crate) fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), WireError> {
        let most = u64::from(FREE - 1);
        for _ in 0..reader.count(2 + SUCCESSORS, "count of contexts")? {
            let mut context = Context { block: reader.at_most(most, "block of a context")? as u32, ..BLANK };
            context.strength = reader.at_most(u64::from(u8::MAX), "strength of a context")? as u8;
            for place in 0..SUCCESSORS {
                context.counts[place] = reader.at_most(u64::from(u8::MAX), "count of a successor")? as u8;
                if context.counts[place] > 0 {
                    context.next[place] = reader.at_most(most, "successor")? as u32;
                }
            }
            let set = self.set(context.block);
            let ways = &mut self.contexts[set..set + 2];
            let weaker =
                usize::from(ways[1].block == FREE || ways[0].block != FREE && ways[1].strength < ways[0].strength);
            let weaker = if ways[0].block == FREE { 0 } else { weaker };
            if ways[weaker].block == FREE || ways[weaker].strength < context.strength {
                ways[weaker] = context;
            }
        }
        Ok(())
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.contexts.capacity() * size_of::<Context>()
    }
}
