//! Temporal streams: what was read before is read again in much the same order.
//!
//! A log of the storage's reads and, for each place, where it was read last (chained back in time like the hash chains of
//! LZ77). A guest whose reads reappear in the log is followed by a *cursor*: what came next then is expected next now, the
//! further ahead the longer the cursor has been right (temporal memory streaming: Wenisch et al., ISCA 2005; Somogyi et al.,
//! ISCA 2009). A cursor tolerates reordering: a read anywhere near its place moves it on. This reaches contexts of any
//! order and any skip with one table, where a Markov chain needs one for each.
//!
//! Each VM writes to chunks of its own, so that the log of one is not torn apart by another's.

use crate::access::MAX_PAGES;
use crate::wire::{Reader, WireError, put, put_signed};
use rustc_hash::FxHashMap;

/// Reads in a chunk.
const CHUNK: usize = 64;
const NONE: u32 = u32::MAX;
/// Older occurrences of a place that are looked at.
const CHAIN: usize = 8;
/// Cursors of a VM.
const CURSORS: usize = 16;
/// A read this far behind a cursor's place, or ahead of it, belongs to it.
const BEHIND: u64 = 8;
const AHEAD: u64 = 32;
/// Reads looked ahead, at most.
pub(crate) const LOOK_AHEAD: u32 = 128;
/// The nearest of them are proposed at every step, since what is near is surer; the others once, as they come into reach.
const NEAREST: u32 = 4;
/// A cursor that was right so often, and almost without a jump, is followed word for word.
const SURE_HITS: u32 = 32;
const SURE_CLOSENESS: f32 = 0.8;
/// Reads handed on in one step, at most.
const STEP: usize = 24;

/// A read in the log: first page (36 bits), pages (6 bits, 63 at most), and where in the log a place of the same hash was
/// read before (22 bits, as a distance within the ring; 0: nowhere).
#[derive(Clone, Copy, Debug)]
struct Entry(u64);

const PAGES_BITS: u32 = 6;
const OLDER_BITS: u32 = 22;
const MAX_LOGGED_PAGES: u32 = (1 << PAGES_BITS) - 1;
/// Reads that the log can hold, at most: what a distance can span.
const MAX_READS: usize = 1 << OLDER_BITS;

impl Entry {
    fn new(first: u64, pages: u32, older: u32) -> Self {
        debug_assert!(first < MAX_PAGES && MAX_PAGES <= 1 << (64 - PAGES_BITS - OLDER_BITS));
        Self(
            first << (PAGES_BITS + OLDER_BITS)
                | u64::from(pages.min(MAX_LOGGED_PAGES)) << OLDER_BITS
                | u64::from(older),
        )
    }
    fn first(self) -> u64 {
        self.0 >> (PAGES_BITS + OLDER_BITS)
    }
    fn pages(self) -> u32 {
        (self.0 >> OLDER_BITS) as u32 & MAX_LOGGED_PAGES
    }
    fn older(self) -> u32 {
        self.0 as u32 & (MAX_READS as u32 - 1)
    }
}

#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// Chunk of the same VM that follows, and which use of this chunk it belongs to.
    next: u32,
    generation: u32,
    owner: u32,
    filled: u8,
    /// Number of the first entry, counted by its VM.
    ordinal: u64,
}

/// The log of all reads of a storage.
#[derive(Debug)]
pub(crate) struct Log {
    entries: Vec<Entry>,
    chunks: Vec<Chunk>,
    index: Vec<u32>,
    next_chunk: usize,
    generation: u32,
    owners: u32,
}

/// Where a VM writes, and what it follows.
#[derive(Clone, Debug)]
pub(crate) struct Follower {
    owner: u32,
    chunk: u32,
    generation: u32,
    written: u64,
    cursors: [Cursor; CURSORS],
    clock: u32,
}

/// A place in the log that a guest follows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    at: u32,
    generation: u32,
    /// Number of the entry among its VM's, to measure distances across chunks.
    ordinal: u64,
    pub(crate) hits: u32,
    /// How exactly reads follow the log, 0 to 1, smoothed.
    pub(crate) closeness: f32,
    used: u32,
    /// Last place that was proposed, and how far ahead it lies.
    frontier: u32,
    proposed: u32,
    /// Place among its VM's cursors: the same for as long as it is kept.
    pub(crate) slot: u8,
    /// How many reads ago the place was read that the cursor is at.
    pub(crate) age: u64,
}

const NO_CURSOR: Cursor = Cursor {
    at: NONE,
    generation: 0,
    ordinal: 0,
    hits: 0,
    closeness: 0.0,
    used: 0,
    frontier: NONE,
    proposed: 0,
    slot: 0,
    age: 0,
};

impl Follower {
    fn new(owner: u32) -> Self {
        Self { owner, chunk: NONE, generation: 0, written: 0, cursors: [NO_CURSOR; CURSORS], clock: 0 }
    }
}

impl Log {
    /// Room for `reads`, rounded up to a power of two: 8 bytes each, and 4 to find them.
    pub(crate) fn new(reads: usize) -> Self {
        let reads = reads.next_power_of_two().clamp(CHUNK * 4, MAX_READS);
        let chunks = reads / CHUNK;
        Self {
            entries: vec![Entry(0); reads],
            chunks: vec![Chunk { next: NONE, generation: 0, owner: 0, filled: 0, ordinal: 0 }; chunks],
            index: vec![NONE; reads],
            next_chunk: 0,
            generation: 0,
            owners: 0,
        }
    }

    /// Somebody new whose reads are logged.
    pub(crate) fn follower(&mut self) -> Follower {
        self.owners = self.owners.wrapping_add(1);
        Follower::new(self.owners)
    }

    fn bucket(&self, first: u64) -> usize {
        (first.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize & (self.index.len() - 1)
    }

    /// The entry at a place, unless it was overwritten since its chunk had that generation.
    fn entry(&self, at: u32) -> Option<Entry> {
        let (chunk, offset) = (at as usize / CHUNK, at as usize % CHUNK);
        (offset < usize::from(self.chunks.get(chunk)?.filled)).then(|| self.entries[at as usize])
    }

    /// The place after `at` in its VM's log.
    fn next(&self, at: u32) -> Option<u32> {
        let (chunk, offset) = (at as usize / CHUNK, at as usize % CHUNK);
        let head = self.chunks.get(chunk)?;
        if offset + 1 < CHUNK {
            return (offset + 1 < usize::from(head.filled)).then_some(at + 1);
        }
        let next = self.chunks.get(head.next as usize)?;
        // A chunk is followed by a younger one, unless that was used again for something else.
        (next.generation > head.generation && next.filled > 0 && next.ordinal == head.ordinal + CHUNK as u64)
            .then_some(head.next * CHUNK as u32)
    }

    fn ordinal(&self, at: u32) -> u64 {
        self.chunks[at as usize / CHUNK].ordinal + (at as usize % CHUNK) as u64
    }

    /// Takes in a read. If the place is known, returns the cursor that foresaw it or a new one, and hands on the reads that
    /// followed and are worth a proposal: `(distance, first page, pages)`.
    pub(crate) fn follow(
        &mut self,
        follower: &mut Follower,
        first: u64,
        pages: u32,
        ahead: &mut Vec<(u32, u64, u32)>,
    ) -> Option<Cursor> {
        follower.clock = follower.clock.wrapping_add(1);
        let bucket = self.bucket(first);
        let found = self.find(follower, bucket, first);
        self.append(follower, bucket, first, pages);
        let cursor = &mut follower.cursors[found?];
        // Of another VM's log it is a guess: their numbers run side by side.
        cursor.age = follower.written.saturating_sub(cursor.ordinal);
        self.look_ahead(cursor, ahead);
        Some(*cursor)
    }

    fn look_ahead(&self, cursor: &mut Cursor, ahead: &mut Vec<(u32, u64, u32)>) {
        let mut at = cursor.at;
        for distance in 1..=NEAREST.min(cursor.reach()) {
            let Some((next, entry)) = self.next(at).and_then(|next| Some((next, self.entry(next)?))) else { return };
            at = next;
            ahead.push((distance, entry.first(), entry.pages()));
            if distance > cursor.proposed {
                (cursor.frontier, cursor.proposed) = (at, distance);
            }
        }
        while cursor.proposed < cursor.reach() && ahead.len() < STEP {
            let next = self.next(cursor.frontier).and_then(|next| Some((next, self.entry(next)?)));
            let Some((next, entry)) = next else { return };
            (cursor.frontier, cursor.proposed) = (next, cursor.proposed + 1);
            ahead.push((cursor.proposed, entry.first(), entry.pages()));
        }
    }

    fn find(&self, follower: &mut Follower, bucket: usize, first: u64) -> Option<usize> {
        let mut at = self.index[bucket];
        let mut latest = None;
        for _ in 0..CHAIN {
            let Some(entry) = self.entry(at) else { break };
            if entry.first() == first {
                latest = latest.or(Some(at));
                if let Some(index) = self.near(follower, at) {
                    return Some(index);
                }
            }
            if entry.older() == 0 {
                break;
            }
            at = at.wrapping_sub(entry.older()) & (self.entries.len() - 1) as u32;
        }
        let at = latest?;
        // In the place of the cursor unused for longest.
        let index =
            (0..CURSORS).max_by_key(|index| follower.clock.wrapping_sub(follower.cursors[*index].used)).unwrap_or(0);
        follower.cursors[index] = Cursor {
            at,
            generation: self.chunks[at as usize / CHUNK].generation,
            ordinal: self.ordinal(at),
            hits: 0,
            closeness: 0.1,
            used: follower.clock,
            frontier: at,
            proposed: 0,
            slot: index as u8,
            age: 0,
        };
        Some(index)
    }

    /// The cursor that `at` lies near to; it moves there.
    fn near(&self, follower: &mut Follower, at: u32) -> Option<usize> {
        let (ordinal, chunk, clock) = (self.ordinal(at), self.chunks[at as usize / CHUNK], follower.clock);
        let index = follower.cursors.iter().position(|cursor| {
            ordinal + BEHIND > cursor.ordinal
                && ordinal <= cursor.ordinal + AHEAD
                && ordinal != cursor.ordinal
                // Its chunk still holds what it pointed at, and is of the same VM's log.
                && self
                    .chunks
                    .get(cursor.at as usize / CHUNK)
                    .is_some_and(|held| held.generation == cursor.generation && held.owner == chunk.owner)
        })?;
        let cursor = &mut follower.cursors[index];
        let jump = ordinal.saturating_sub(cursor.ordinal).max(1);
        cursor.closeness += 0.2 * (1.0 / jump as f32 - cursor.closeness);
        cursor.hits = cursor.hits.saturating_add(1);
        cursor.used = clock;
        if ordinal > cursor.ordinal {
            let moved = (ordinal - cursor.ordinal) as u32; // at most AHEAD
            cursor.proposed = cursor.proposed.saturating_sub(moved);
            if cursor.proposed == 0 {
                cursor.frontier = at;
            }
            (cursor.at, cursor.ordinal, cursor.generation) = (at, ordinal, chunk.generation);
        }
        Some(index)
    }

    fn append(&mut self, follower: &mut Follower, bucket: usize, first: u64, pages: u32) {
        let full = self
            .chunks
            .get(follower.chunk as usize)
            .is_none_or(|chunk| usize::from(chunk.filled) == CHUNK || chunk.generation != follower.generation);
        if full {
            let next = self.next_chunk as u32;
            self.next_chunk = (self.next_chunk + 1) % self.chunks.len();
            self.generation = self.generation.wrapping_add(1);
            if let Some(chunk) = self.chunks.get_mut(follower.chunk as usize)
                && chunk.generation == follower.generation
            {
                chunk.next = next;
            }
            self.chunks[next as usize] = Chunk {
                next: NONE,
                generation: self.generation,
                owner: follower.owner,
                filled: 0,
                ordinal: follower.written,
            };
            (follower.chunk, follower.generation) = (next, self.generation);
        }
        let chunk = &mut self.chunks[follower.chunk as usize];
        let at = follower.chunk * CHUNK as u32 + u32::from(chunk.filled);
        chunk.filled += 1;
        follower.written += 1;
        let before = self.index[bucket];
        let older = if before == NONE { 0 } else { at.wrapping_sub(before) & (self.entries.len() - 1) as u32 };
        self.entries[at as usize] = Entry::new(first, pages, older);
        self.index[bucket] = at;
    }

    /// Reads held.
    pub(crate) fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| usize::from(chunk.filled)).sum()
    }

    /// Chunks, oldest first: owner, number of the first read, and the reads as distance from the one before and pages.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let mut order: Vec<usize> = (0..self.chunks.len()).filter(|chunk| self.chunks[*chunk].filled > 0).collect();
        order.sort_unstable_by_key(|chunk| self.chunks[*chunk].generation);
        put(out, order.len() as u64);
        for chunk in order {
            let head = self.chunks[chunk];
            put(out, u64::from(head.owner));
            put(out, head.ordinal);
            put(out, u64::from(head.filled));
            let mut before = 0;
            for entry in &self.entries[chunk * CHUNK..chunk * CHUNK + usize::from(head.filled)] {
                put_signed(out, entry.first() as i64 - before as i64);
                put(out, u64::from(entry.pages()));
                before = entry.first();
            }
        }
    }

    /// Takes over what [`Log::write`] wrote; of a log larger than this one, the latest reads.
    pub(crate) fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), WireError> {
        let chunks = reader.count(5, "count of log chunks")?;
        // By owner: where the last chunk lies, so that the next can be linked to it.
        let mut followers = FxHashMap::<u32, Follower>::default();
        for _ in 0..chunks {
            let owner = reader.at_most(u64::from(u32::MAX - 1), "owner of a log chunk")? as u32;
            let ordinal = reader.at_most(1 << 48, "number of a logged read")?;
            let filled = reader.at_most(CHUNK as u64, "length of a log chunk")?;
            self.owners = self.owners.max(owner);
            let follower = followers.entry(owner).or_insert_with(|| Follower::new(owner));
            if ordinal != follower.written {
                // A gap: what was between is gone.
                (follower.chunk, follower.written) = (NONE, ordinal);
            }
            let mut before = 0i64;
            for _ in 0..filled {
                before = before.wrapping_add(reader.signed()?);
                let first = u64::try_from(before).ok().filter(|first| *first < MAX_PAGES);
                let first = first.ok_or(WireError::Invalid("page of a logged read"))?;
                let pages = reader.at_most(u64::from(MAX_LOGGED_PAGES), "pages of a logged read")? as u32;
                let bucket = self.bucket(first);
                self.append(follower, bucket, first, pages);
            }
        }
        Ok(())
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.entries.capacity() * 8 + self.index.capacity() * 4 + self.chunks.capacity() * size_of::<Chunk>()
    }
}

impl Cursor {
    /// Whether it has been followed read by read for a while.
    pub(crate) fn is_sure(&self) -> bool {
        self.hits >= SURE_HITS && self.closeness >= SURE_CLOSENESS
    }

    /// Reads worth looking ahead.
    pub(crate) fn reach(&self) -> u32 {
        match self.hits {
            0 => 3,
            1..=3 => 2 << self.hits,
            4..=31 => 24,
            _ => self.hits.saturating_mul(2).min(LOOK_AHEAD),
        }
    }
}
