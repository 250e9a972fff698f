//! How often two blocks of a storage are read within a moment of each other, by the same machine.
//!
//! The index says which chunks read which of the two. Only a chunk that reads one of them and whose time, widened by the moment, meets
//! that of a chunk that reads the other can hold a pair; those are decoded, newest first, up to a limit of chunks and of time. For two
//! blocks that every chunk reads that is all of history, which no index shortens: the answer then says from when on it is complete.

use std::collections::BTreeMap;
use std::time::Instant;

use rusqlite::{Connection, OptionalExtension, params};

use super::index::{self, blocks_read};
use super::ingest::decode_times;
use super::{Chunks, decoder, storage_number};
use crate::store::records::unsigned;
use crate::store::segment::{AccessRecord, Decoder};
use crate::store::writer::WorkError;
use crate::store::{Store, StoreError};

/// How much may be decoded for an answer.
#[derive(Debug, Clone, Copy)]
pub struct NearLimit {
    /// Chunks of 4,096 accesses.
    pub chunks: usize,
    /// No segment is begun after this.
    pub until: Option<Instant>,
}

/// Without a limit of time: the decoding of two million accesses.
pub const NEAR_LIMIT: NearLimit = NearLimit { chunks: 512, until: None };

impl NearLimit {
    /// The same, ending at a time.
    #[must_use]
    pub fn until(self, until: Instant) -> Self {
        Self { until: Some(until), ..self }
    }
}

/// How often two blocks are read within a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Near {
    /// Reads of each in all history that is indexed.
    pub reads_a: u64,
    pub reads_b: u64,
    /// Reads of A with one of B at most the moment before or after.
    pub near: u64,
    /// Reads of A with one of B at the same time or at most the moment after.
    pub then: u64,
    /// `near` and `then` are of reads of A after this, Unix µs; 0: of all history.
    pub after_us: u64,
    /// Chunks decoded.
    pub chunks: u64,
}

/// A chunk that reads A, B or both.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    segment: i64,
    index: usize,
    from_us: u64,
    to_us: u64,
    a: bool,
    b: bool,
}

impl Store {
    /// How often blocks `a` and `b` (64 KiB, not the same) of a storage are read within `within_us` of each other by the same machine.
    /// Errors: `NotFound`, `Segment` when the index is damaged.
    pub fn near(
        &self,
        storage: &str,
        (a, b): (u64, u64),
        within_us: u64,
        limit: NearLimit,
    ) -> Result<Near, StoreError> {
        self.ask(|connection| {
            let storage = storage_number(connection, storage)?;
            let mut answer = Near::default();
            let streams = candidates(connection, storage, (a, b), &mut answer)?;
            let mut wanted: BTreeMap<i64, Vec<(usize, Chunk)>> = BTreeMap::new();
            for (stream, chunks) in streams.values().enumerate() {
                for chunk in meeting(chunks, within_us) {
                    wanted.entry(chunk.segment).or_default().push((stream, chunk));
                }
            }
            let mut wanted: Vec<Vec<(usize, Chunk)>> = wanted.into_values().collect();
            wanted.sort_by_key(|chunks| std::cmp::Reverse(chunks.iter().map(|(_, chunk)| chunk.to_us).max()));

            let mut times: Vec<(Vec<u64>, Vec<u64>)> = vec![Default::default(); streams.len()];
            // Beyond this time something was not looked at.
            let mut missing_us = unindexed(connection, storage)?;
            let mut decoder = decoder()?;
            let mut over = false;
            for chunks in &wanted {
                over |= answer.chunks as usize + chunks.len() > limit.chunks
                    || limit.until.is_some_and(|until| Instant::now() >= until);
                if over {
                    missing_us = missing_us.max(chunks.iter().map(|(_, chunk)| chunk.to_us).max());
                    continue;
                }
                answer.chunks += chunks.len() as u64;
                match collect(connection, chunks, (a, b), &mut decoder, &mut times) {
                    Err(WorkError::Request(error)) => {
                        tracing::warn!(%error, "a segment of history is left out of an answer");
                    }
                    collected => collected?,
                }
            }
            answer.after_us = missing_us.map_or(0, |missing| missing.saturating_add(within_us));
            for (of_a, of_b) in &mut times {
                count(of_a, of_b, within_us, &mut answer);
            }
            Ok(answer)
        })
    }
}

/// Chunks of each machine that read one of the blocks, and how often these were read.
fn candidates(
    connection: &Connection,
    storage: i64,
    (a, b): (u64, u64),
    answer: &mut Near,
) -> Result<BTreeMap<String, Vec<Chunk>>, WorkError> {
    // By segment: its group, chunks and reads of A, of B.
    let mut segments: BTreeMap<i64, (i64, [(u16, u32); 2])> = BTreeMap::new();
    for (which, block) in [a, b].into_iter().enumerate() {
        for (group, touch) in index::find(connection, storage, block)? {
            let (_, both) = segments.entry(touch.segment).or_insert((group, Default::default()));
            if let Some(of) = both.get_mut(which) {
                *of = (touch.chunks, touch.reads);
            }
        }
    }
    // The group is asked for again: the index may still know of a segment that is gone, whose number another has now.
    let sql =
        "SELECT vm, from_us, times FROM chunks JOIN segments ON id = segment_id WHERE segment_id = ? AND group_id = ?";
    let mut statement = connection.prepare(sql)?;
    let mut streams: BTreeMap<String, Vec<Chunk>> = BTreeMap::new();
    for (segment, (group, [(chunks_a, reads_a), (chunks_b, reads_b)])) in segments {
        let row: Option<(String, u64, Vec<u8>)> = statement
            .query_row(params![segment, group], |row| Ok((row.get(0)?, unsigned(row, 1)?, row.get(2)?)))
            .optional()?;
        let Some((vm, from_us, times)) = row else { continue };
        answer.reads_a += u64::from(reads_a);
        answer.reads_b += u64::from(reads_b);
        let stream = streams.entry(vm).or_default();
        for (index, times) in decode_times(from_us, &times).map_err(StoreError::from)?.iter().enumerate() {
            let has = |chunks: u16| index < 16 && chunks & (1 << index) != 0;
            let (a, b) = (has(chunks_a), has(chunks_b));
            if a || b {
                stream.push(Chunk { segment, index, from_us: times.from_us, to_us: times.to_us, a, b });
            }
        }
    }
    Ok(streams)
}

/// Those of a stream's chunks that read one of the blocks within reach of a chunk that reads the other.
fn meeting(chunks: &[Chunk], within_us: u64) -> impl Iterator<Item = Chunk> {
    // Spans by their beginning, with the latest end up to each.
    let spans = |of: fn(&Chunk) -> bool| {
        let mut spans: Vec<(u64, u64)> =
            chunks.iter().filter(|chunk| of(chunk)).map(|chunk| (chunk.from_us, chunk.to_us)).collect();
        spans.sort_unstable();
        let mut latest = 0;
        for (_, to) in &mut spans {
            latest = latest.max(*to);
            *to = latest;
        }
        spans
    };
    let (of_a, of_b) = (spans(|chunk| chunk.a), spans(|chunk| chunk.b));
    let meets = move |spans: &[(u64, u64)], chunk: &Chunk| {
        let begun = spans.partition_point(|(from, _)| *from <= chunk.to_us.saturating_add(within_us));
        begun
            .checked_sub(1)
            .and_then(|last| spans.get(last))
            .is_some_and(|(_, latest)| latest.saturating_add(within_us) >= chunk.from_us)
    };
    chunks.iter().copied().filter(move |chunk| (chunk.a && meets(&of_b, chunk)) || (chunk.b && meets(&of_a, chunk)))
}

/// Latest access of the segments that are not in the index.
fn unindexed(connection: &Connection, storage: i64) -> rusqlite::Result<Option<u64>> {
    let sql = "SELECT max(to_us) FROM segments LEFT JOIN chunks ON segment_id = id WHERE storage_id = ? AND segment_id IS NULL";
    let latest: Option<i64> = connection.query_row(sql, [storage], |row| row.get(0))?;
    Ok(latest.and_then(|latest| u64::try_from(latest).ok()))
}

/// Adds the times of a segment's reads of A and of B to its stream's.
fn collect(
    connection: &Connection,
    chunks: &[(usize, Chunk)],
    (a, b): (u64, u64),
    decoder: &mut Decoder,
    times: &mut [(Vec<u64>, Vec<u64>)],
) -> Result<(), WorkError> {
    let Some((_, first)) = chunks.first() else { return Ok(()) };
    let mut segment = Chunks::open(connection, first.segment)?;
    let mut records: Vec<AccessRecord> = Vec::new();
    for (stream, chunk) in chunks {
        records.clear();
        segment.read(chunk.index, decoder, &mut records)?;
        let Some((of_a, of_b)) = times.get_mut(*stream) else { continue };
        for access in &records {
            let Some(blocks) = blocks_read(access) else { continue };
            if blocks.contains(&a) {
                of_a.push(access.at_us);
            }
            if blocks.contains(&b) {
                of_b.push(access.at_us);
            }
        }
    }
    Ok(())
}

/// Counts one machine's reads of A that have one of B close by.
fn count(of_a: &mut [u64], of_b: &mut [u64], within_us: u64, answer: &mut Near) {
    of_a.sort_unstable();
    of_b.sort_unstable();
    let (mut before, mut at) = (0, 0);
    for time in of_a.iter().filter(|time| answer.after_us == 0 || **time > answer.after_us) {
        while of_b.get(before).is_some_and(|b| b.saturating_add(within_us) < *time) {
            before += 1;
        }
        while of_b.get(at).is_some_and(|b| b < time) {
            at += 1;
        }
        let reach = time.saturating_add(within_us);
        answer.near += u64::from(of_b.get(before).is_some_and(|b| *b <= reach));
        answer.then += u64::from(of_b.get(at).is_some_and(|b| *b <= reach));
    }
}
