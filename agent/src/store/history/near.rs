//! How often two blocks of a storage are read within a moment of each other, by the same machine.
//!
//! The index says which chunks read which of the two. Only a chunk that reads one of them and whose time, widened by the moment, meets
//! that of a chunk that reads the other can hold a pair; those are decoded, newest first, up to a limit of chunks and of time. For two
//! blocks that every chunk reads that is all of history, which no index shortens: the answer then says from when on it is complete.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use rusqlite::Connection;

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
    /// No chunk is begun after this.
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
    /// Segments that are missing from the answer, at least in part, because they or their index are damaged.
    pub damaged: u64,
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
    /// Errors: `NotFound`. What is damaged costs itself, and is counted.
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
            let mut damaged = HashSet::new();
            let (streams, unindexed_us) = candidates(connection, storage, (a, b), &mut answer, &mut damaged)?;
            let mut wanted: BTreeMap<i64, Vec<(usize, Chunk)>> = BTreeMap::new();
            for (stream, chunks) in streams.values().enumerate() {
                for chunk in meeting(chunks, within_us) {
                    wanted.entry(chunk.segment).or_default().push((stream, chunk));
                }
            }
            let mut wanted: Vec<Vec<(usize, Chunk)>> = wanted.into_values().collect();
            wanted.sort_by_key(|chunks| std::cmp::Reverse(chunks.iter().map(|(_, chunk)| chunk.to_us).max()));

            let mut search = Search {
                connection,
                blocks: (a, b),
                limit,
                decoder: decoder()?,
                records: Vec::new(),
                times: vec![Default::default(); streams.len()],
                chunks: 0,
                over: false,
                missing_us: unindexed_us,
            };
            for chunks in &wanted {
                match search.segment(chunks) {
                    Err(WorkError::Request(error)) => {
                        tracing::warn!(%error, "a segment of history is left out of an answer");
                        damaged.extend(chunks.first().map(|(_, chunk)| chunk.segment));
                    }
                    searched => searched?,
                }
            }
            let Search { mut times, chunks, missing_us, .. } = search;
            answer.chunks = chunks as u64;
            answer.damaged = damaged.len() as u64;
            answer.after_us = missing_us.map_or(0, |missing| missing.saturating_add(within_us));
            for (of_a, of_b) in &mut times {
                count(of_a, of_b, within_us, &mut answer);
            }
            Ok(answer)
        })
    }
}

/// Chunks by machine.
type Streams = BTreeMap<String, Vec<Chunk>>;

/// Chunks of each machine that read one of the blocks, and the latest access that is not in the index; how often the blocks were read goes
/// into the answer, and segments of which that is not known into `damaged`.
fn candidates(
    connection: &Connection,
    storage: i64,
    (a, b): (u64, u64),
    answer: &mut Near,
    damaged: &mut HashSet<i64>,
) -> Result<(Streams, Option<u64>), WorkError> {
    // By segment: its group, chunks and reads of A, of B.
    let mut segments: BTreeMap<i64, (i64, [(u16, u32); 2])> = BTreeMap::new();
    let mut damaged_groups = HashSet::new();
    for (which, block) in [a, b].into_iter().enumerate() {
        let found = index::find(connection, storage, block)?;
        damaged_groups.extend(found.damaged);
        for (group, touch) in found.touches {
            let (_, both) = segments.entry(touch.segment).or_insert((group, Default::default()));
            if let Some(of) = both.get_mut(which) {
                *of = (touch.chunks, touch.reads);
            }
        }
    }
    // All segments of the storage, of an index that has what is wanted of them: in the table each is on a page of its own.
    let sql = "SELECT segments.id, vm, from_us, to_us, group_id, times FROM segments LEFT JOIN chunks ON segment_id = segments.id
        WHERE storage_id = ?";
    let mut statement = connection.prepare(sql)?;
    let mut rows = statement.query([storage])?;
    let mut streams = Streams::new();
    let mut unindexed_us = None;
    while let Some(row) = rows.next()? {
        let segment: i64 = row.get(0)?;
        let Some(found_in) = row.get::<_, Option<i64>>(4)? else {
            unindexed_us = unindexed_us.max(Some(unsigned(row, 3)?));
            continue;
        };
        if damaged_groups.contains(&found_in) {
            damaged.insert(segment);
        }
        // The index may still know of a segment that is gone, whose number another has now: that one's group is another.
        let touched = segments.get(&segment).filter(|(group, _)| *group == found_in);
        let Some((_, [(chunks_a, reads_a), (chunks_b, reads_b)])) = touched else { continue };
        answer.reads_a += u64::from(*reads_a);
        answer.reads_b += u64::from(*reads_b);
        let stream = streams.entry(row.get(1)?).or_default();
        let times = match row.get_ref(5)?.as_blob() {
            Ok(bytes) => decode_times(unsigned(row, 2)?, bytes).unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        // A touched chunk whose time is not known cannot be looked at.
        if u32::from(chunks_a | chunks_b) >> times.len().min(16) != 0 {
            damaged.insert(segment);
        }
        for (index, times) in times.iter().enumerate() {
            let has = |chunks: u16| index < 16 && chunks & (1 << index) != 0;
            let (a, b) = (has(*chunks_a), has(*chunks_b));
            if a || b {
                stream.push(Chunk { segment, index, from_us: times.from_us, to_us: times.to_us, a, b });
            }
        }
    }
    Ok((streams, unindexed_us))
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

/// What is being looked for, and what has been found.
struct Search<'a> {
    connection: &'a Connection,
    blocks: (u64, u64),
    limit: NearLimit,
    decoder: Decoder,
    records: Vec<AccessRecord>,
    /// Times of the reads of A and of B, by stream.
    times: Vec<(Vec<u64>, Vec<u64>)>,
    /// Chunks decoded.
    chunks: usize,
    /// The limit is reached.
    over: bool,
    /// Up to this time something was not looked at.
    missing_us: Option<u64>,
}

impl Search<'_> {
    fn is_over(&mut self) -> bool {
        let NearLimit { chunks, until } = self.limit;
        self.over |= self.chunks >= chunks || until.is_some_and(|until| Instant::now() >= until);
        self.over
    }

    /// Adds the times of the reads in chunks of one segment, each with its stream, newest first.
    fn segment(&mut self, chunks: &[(usize, Chunk)]) -> Result<(), WorkError> {
        let mut segment = None;
        for (stream, chunk) in chunks.iter().rev() {
            if self.is_over() {
                self.missing_us = self.missing_us.max(Some(chunk.to_us));
                continue;
            }
            self.chunks += 1;
            let segment = match &mut segment {
                Some(segment) => segment,
                none => none.insert(Chunks::open(self.connection, chunk.segment)?),
            };
            self.records.clear();
            segment.read(chunk.index, &mut self.decoder, &mut self.records)?;
            let Some((of_a, of_b)) = self.times.get_mut(*stream) else { continue };
            for access in &self.records {
                let Some(blocks) = blocks_read(access) else { continue };
                if blocks.contains(&self.blocks.0) {
                    of_a.push(access.at_us);
                }
                if blocks.contains(&self.blocks.1) {
                    of_b.push(access.at_us);
                }
            }
        }
        Ok(())
    }
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
