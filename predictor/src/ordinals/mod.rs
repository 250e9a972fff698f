//! Ordinals: which of the things on offer a read turned out to be, as one of 64 symbols.
//!
//! A *slate* says what each symbol means now: a 64 KiB block. The first symbol that means the block of the next read is the
//! read's ordinal. It depends on the order of reads alone, not on where on the disk they lie, hence one model serves
//! any number of machines; and since the slate is made of what the hybrid has found anyway (the run, the cursor in the log,
//! the chain of blocks), training from history and the daemon run the same code.
//!
//! | symbols | mean |
//! | --- | --- |
//! | 0–15 | what continues a run, by how lately the run went on |
//! | 16–19 | what followed in the log, 1 to 4 reads ahead of the latest cursor |
//! | 20–31 | what followed the six cursors before it, by how lately they were right, 1 and 2 reads ahead each |
//! | 32–35 | successors of the block in the chain, likeliest first |
//! | 36–39 | the blocks one ahead, one behind, two ahead, two behind |
//! | 40–55 | the sixteen blocks read last, latest first |
//! | 56–61 | none of these, but a page that the log has, by how long ago |
//! | 62 | a block that was followed by another before |
//! | 63 | a block never seen, or forgotten |
//!
//! | module | holds |
//! | --- | --- |
//! | here | [`Slate`], and how a read changes it |
//! | [`tokeniser`] | reads of one stream to tokens, for training and measuring |
//! | [`counts`] | adaptive counts of symbols: prediction without a model |
//! | `mind` | what the model makes of one VM's tokens: state, tokens not read yet, and its latest word |

pub mod counts;
pub(crate) mod mind;
#[cfg(test)]
mod tests;
pub mod tokeniser;

pub use counts::Counts;
pub use tokeniser::Tokeniser;

use crate::hybrid::granules::Granules;
use crate::hybrid::runs::{Course, Run};
use crate::hybrid::temporal::Cursor;
use crate::lstm::{SYMBOLS, Token};

/// Symbols that mean a block; the others say how far from anything on offer a read was.
pub const OFFERED: usize = 56;
const RUNS: usize = 16;
pub(crate) const LOG: usize = RUNS;
/// Reads ahead of the latest cursor, and of each of the others.
pub(crate) const AHEAD: usize = 4;
const OTHERS: usize = LOG + AHEAD;
const PAIR: usize = 2;
const CURSORS: usize = 1 + 6;
pub(crate) const CHAIN: usize = OTHERS + (CURSORS - 1) * PAIR;
pub(crate) const NEAR: usize = CHAIN + 4;
pub(crate) const RECENT: usize = NEAR + 4;
const LOGGED: usize = OFFERED;
const KNOWN: u8 = 62;
const NEW: u8 = 63;
/// Means no block.
const NOTHING: u32 = u32::MAX;
const NOBODY: u8 = u8::MAX;

/// What each symbol means now, and the blocks read last. Allocates nothing.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Slate {
    blocks: [u32; SYMBOLS],
    /// Whose run and whose cursor stands at a place.
    runs: [u8; RUNS],
    cursors: [u8; CURSORS],
    at_us: u64,
}

/// A read, and what the hybrid found of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found<'a> {
    pub(crate) block: u64,
    pub(crate) first: u64,
    pub(crate) pages: u32,
    pub(crate) at_us: u64,
    pub(crate) run: Option<Run>,
    pub(crate) cursor: Option<Cursor>,
    /// Reads of the log ahead of the cursor: distance, first page, pages.
    pub(crate) ahead: &'a [(u32, u64, u32)],
}

impl Default for Slate {
    fn default() -> Self {
        Self { blocks: [NOTHING; SYMBOLS], runs: [NOBODY; RUNS], cursors: [NOBODY; CURSORS], at_us: 0 }
    }
}

impl Slate {
    /// The block that `symbol` means now, if it means one.
    #[must_use]
    pub fn block(&self, symbol: u8) -> Option<u64> {
        let block = *self.blocks.get(usize::from(symbol))?;
        (block != NOTHING).then_some(u64::from(block))
    }

    /// The first symbol that means a block.
    #[inline]
    pub(crate) fn symbol(&self, block: u32) -> Option<u8> {
        // Sixteen at a time: most reads are found among the first.
        for (part, blocks) in self.blocks[..OFFERED].chunks(16).enumerate() {
            let mut found = 0u32;
            for (place, offered) in blocks.iter().enumerate() {
                found |= u32::from(*offered == block) << place;
            }
            if found != 0 {
                return Some((part * 16) as u8 + found.trailing_zeros() as u8);
            }
        }
        None
    }

    /// Takes in a read: its token, and the slate for the next one.
    pub(crate) fn read(&mut self, found: &Found<'_>, granules: &Granules) -> Token {
        let block = found.block as u32; // below 2^32, see MAX_PAGES
        let chain = granules.ranked(found.block);
        let symbol = self.symbol(block).unwrap_or_else(|| match &found.cursor {
            Some(cursor) => LOGGED as u8 + logged(cursor.age),
            None if chain.is_some() => KNOWN,
            None => NEW,
        });
        let op = u8::from(found.run.is_some()) | u8::from(found.cursor.is_some_and(|cursor| cursor.hits > 0)) << 1;
        let gap = found.at_us.saturating_sub(self.at_us);
        self.at_us = found.at_us;
        self.advance(block, found, chain.unwrap_or([NOTHING; 4]));
        // Each is within its range by the lines above and by `bucket`.
        Token::of(symbol, op, bucket(u64::from(found.pages), 1), bucket(gap >> 5, 2))
    }

    fn advance(&mut self, block: u32, found: &Found<'_>, chain: [u32; 4]) {
        if let Some(run) = &found.run {
            let place = to_front(&mut self.runs, run.slot);
            self.blocks.copy_within(0..place, 1);
            self.blocks[0] = next_of(run, found.first, found.pages);
        }
        if let Some(cursor) = &found.cursor {
            let place = to_front(&mut self.cursors, cursor.slot);
            if place > 0 {
                // The cursors before it move down; the one that was the latest keeps two of its four.
                self.blocks.copy_within(OTHERS..OTHERS + (place - 1) * PAIR, OTHERS + PAIR);
                self.blocks.copy_within(LOG..LOG + PAIR, OTHERS);
            }
            self.blocks[LOG..OTHERS].fill(NOTHING);
            for (distance, first, _) in found.ahead.iter().take_while(|(distance, ..)| *distance <= AHEAD as u32) {
                self.blocks[LOG + *distance as usize - 1] = (first / crate::BLOCK_PAGES) as u32;
            }
        }
        self.blocks[CHAIN..NEAR].copy_from_slice(&chain);
        let recent = &mut self.blocks[RECENT..OFFERED];
        if recent[0] != block {
            let place = recent.iter().position(|known| *known == block).unwrap_or(recent.len() - 1);
            recent.copy_within(0..place, 1);
            recent[0] = block;
            let near = [block.wrapping_add(1), block.wrapping_sub(1), block.wrapping_add(2), block.wrapping_sub(2)];
            // Beyond either end lies nothing that could be read: see MAX_PAGES.
            self.blocks[NEAR..RECENT].copy_from_slice(&near);
        }
    }
}

/// Moves `who` to the front; returns the place that it (or the last, which makes room) had.
fn to_front(order: &mut [u8], who: u8) -> usize {
    if order[0] == who {
        return 0;
    }
    let place = order.iter().position(|other| *other == who).unwrap_or(order.len() - 1);
    order.copy_within(0..place, 1);
    order[0] = who;
    place
}

/// Block of the page that a run goes on with.
fn next_of(run: &Run, first: u64, pages: u32) -> u32 {
    let page = match run.course {
        Course::Forward => Some(first + u64::from(pages)),
        Course::Backward => first.checked_sub(1),
        Course::Stride => first.checked_add_signed(run.stride),
    };
    page.and_then(|page| u32::try_from(page / crate::BLOCK_PAGES).ok()).unwrap_or(NOTHING)
}

/// How long ago the log had it: 0 to 5.
fn logged(age: u64) -> u8 {
    bucket(age >> 6, 2).min(5)
}

/// 0 for 0, then one more for each `bits` bits: at most 7.
fn bucket(value: u64, bits: u32) -> u8 {
    ((u64::BITS - value.leading_zeros()).div_ceil(bits)).min(7) as u8
}
