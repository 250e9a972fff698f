//! Which segments read a block: the index behind questions about two blocks.
//!
//! A *touch* says that a segment read a block: in which of its chunks and how often. Touches of a new segment are a group of their own.
//! 16 such groups of a storage, whose segments will not be joined with later ones, are merged into one, and 16 of these again: a block is
//! looked up in at most 15 groups of each size, those of what may still be joined, and one for 256 segments, and each touch is written
//! three times at most. A group is cut into rows of 512 touches or a few more, ordered by block.
//!
//! A row is one zstd frame with a checksum, before it the lengths of its four columns of LEB128 numbers (segment.rs), each as LEB128:
//! - block: difference to the touch before; the row's first block stands in its key
//! - segment: difference to the touch before of the same block, else to the row's lowest, which comes first
//! - chunks: the number of the one chunk, or 16 + a mask of them
//! - reads: one less

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::ops::RangeInclusive;

use rusqlite::{Connection, OptionalExtension, Statement, params, params_from_iter};

use crate::store::records::int;
use crate::store::segment::{AccessOp, AccessRecord, CHUNK_ACCESSES, CHUNKS_MAX, SegmentError, get, put};
use crate::store::writer::WorkError;

/// Pages of a block, the unit that is indexed and counted: 64 KiB.
pub const BLOCK_PAGES: u64 = 16;
/// Blocks of one read that are indexed and counted, from its first on (4 MiB): guests choose the length, and no read that a program
/// waits for is longer.
const READ_BLOCKS_MAX: u64 = 64;
/// Touches of a row: some 400 bytes, of which several fit a page of the database; beyond 1,000 a row would take a further page alone.
const ROW_TOUCHES: usize = 512;
/// Groups that are merged into one.
pub(super) const MERGE_GROUPS: usize = 16;
/// Groups of so many segments are merged a second time; larger ones would hold up the writer for long.
const MERGED_SEGMENTS: RangeInclusive<u64> = 2..=63;
/// Groups of one segment: with more, the oldest are merged although their segments may still be joined.
const FRESH_GROUPS_MAX: usize = 128;
const LEVEL: i32 = 9;

/// A segment read a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Touch {
    pub(super) block: u64,
    pub(super) segment: i64,
    /// Chunks of the segment that did, by bit.
    pub(super) chunks: u16,
    pub(super) reads: u32,
}

/// Blocks that an access counts for: those of a read.
pub(super) fn blocks_read(access: &AccessRecord) -> Option<RangeInclusive<u64>> {
    if access.op != AccessOp::Read || access.pages == 0 {
        return None;
    }
    let first = access.page / BLOCK_PAGES;
    let last = (access.page + u64::from(access.pages) - 1) / BLOCK_PAGES;
    Some(first..=last.min(first + READ_BLOCKS_MAX - 1))
}

/// Touches of a segment, by block.
pub(super) fn touches(segment: i64, records: &[AccessRecord]) -> Vec<Touch> {
    // Block and chunk in one number: blocks are below 2^54, chunks below 2^4.
    let mut all: Vec<u64> = Vec::with_capacity(records.len());
    for (chunk, part) in records.chunks(CHUNK_ACCESSES).enumerate() {
        for block in part.iter().filter_map(blocks_read).flatten() {
            all.push(block << 4 | chunk as u64);
        }
    }
    all.sort_unstable();
    let mut touches: Vec<Touch> = Vec::new();
    for one in all {
        let (block, chunk) = (one >> 4, 1 << (one & 15));
        match touches.last_mut() {
            Some(touch) if touch.block == block => {
                touch.chunks |= chunk;
                touch.reads += 1;
            }
            _ => touches.push(Touch { block, segment, chunks: chunk, reads: 1 }),
        }
    }
    touches
}

/// Encodes a row; `touches` are ordered by block and segment, and there is at least one.
fn encode(touches: &[Touch]) -> Result<Vec<u8>, SegmentError> {
    let lowest = touches.iter().map(|touch| touch.segment).min().unwrap_or(0);
    let mut columns: [Vec<u8>; 4] = Default::default();
    let [blocks, segments, chunks, reads] = &mut columns;
    let (mut block, mut segment) = (touches.first().map_or(0, |touch| touch.block), lowest);
    for touch in touches {
        if touch.block != block {
            segment = lowest;
        }
        put(blocks, touch.block - block);
        put(segments, (touch.segment - segment) as u64);
        let only = touch.chunks.is_power_of_two();
        put(chunks, if only { u64::from(touch.chunks.trailing_zeros()) } else { 16 + u64::from(touch.chunks) });
        put(reads, u64::from(touch.reads.saturating_sub(1)));
        (block, segment) = (touch.block, touch.segment);
    }
    let mut bytes = Vec::new();
    put(&mut bytes, lowest as u64);
    columns.iter().for_each(|column| put(&mut bytes, column.len() as u64));
    let mut packer = zstd::bulk::Compressor::new(LEVEL).map_err(|_| SegmentError::Compression)?;
    packer.include_checksum(true).map_err(|_| SegmentError::Compression)?;
    bytes.append(&mut packer.compress(&columns.concat()).map_err(|_| SegmentError::Compression)?);
    Ok(bytes)
}

/// Decodes rows; keeps its buffers from one to the next.
pub(super) struct RowDecoder {
    unpacker: zstd::bulk::Decompressor<'static>,
    columns: Vec<u8>,
}

impl RowDecoder {
    pub(super) fn new() -> Result<Self, SegmentError> {
        let unpacker = zstd::bulk::Decompressor::new().map_err(|_| SegmentError::Compression)?;
        Ok(Self { unpacker, columns: Vec::new() })
    }

    /// Gives each touch of a row to `found`.
    fn row(&mut self, first_block: u64, bytes: &[u8], mut found: impl FnMut(Touch)) -> Result<(), SegmentError> {
        let mut at = 0;
        let lowest = get(bytes, &mut at)? as i64;
        let mut ends = [0usize; 4];
        let mut total = 0usize;
        for end in &mut ends {
            // A row ends at the first block beyond 512 touches, and a block has one a segment: some thousands of ten bytes.
            let length = usize::try_from(get(bytes, &mut at)?).ok().filter(|length| *length < 1 << 20);
            total += length.ok_or(SegmentError::Damaged("length of a column"))?;
            *end = total;
        }
        self.columns.resize(total, 0);
        match self.unpacker.decompress_to_buffer(bytes.get(at..).unwrap_or_default(), self.columns.as_mut_slice()) {
            Ok(unpacked) if unpacked == total => {}
            _ => return Err(SegmentError::Damaged("compressed part")),
        }
        let mut cursors = [0, ends[0], ends[1], ends[2]];
        let (mut block, mut segment, mut begun) = (first_block, lowest, false);
        while cursors[0] < ends[0] {
            let mut next = |column: usize| get(&self.columns[..ends[column]], &mut cursors[column]);
            let (further, later, chunks, reads) = (next(0)?, next(1)? as i64, next(2)?, next(3)?);
            block = block.wrapping_add(further);
            segment = if further == 0 && begun { segment } else { lowest }.wrapping_add(later);
            begun = true;
            let chunks = if chunks < CHUNKS_MAX as u64 { 1 << chunks } else { chunks.saturating_sub(16) as u16 };
            found(Touch { block, segment, chunks, reads: u32::try_from(reads.saturating_add(1)).unwrap_or(u32::MAX) });
        }
        Ok(())
    }
}

/// Writes the touches of a new segment as a group of its own. Returns the group.
pub(super) fn add_group(connection: &Connection, storage: i64, touches: &[Touch]) -> Result<i64, WorkError> {
    let mut group = GroupWriter::new(connection, storage, 1)?;
    for touch in touches {
        group.push(*touch)?;
    }
    group.finish()
}

/// Removes a group.
pub(super) fn remove_group(connection: &Connection, group: i64) -> rusqlite::Result<()> {
    connection.prepare("DELETE FROM touches WHERE group_id = ?")?.execute([group])?;
    connection.prepare("DELETE FROM groups WHERE id = ?")?.execute([group])?;
    Ok(())
}

/// Collects the touches of a group into rows.
struct GroupWriter<'a> {
    connection: &'a Connection,
    group: i64,
    size_bytes: u64,
    row: Vec<Touch>,
    insert: Statement<'a>,
}

impl<'a> GroupWriter<'a> {
    fn new(connection: &'a Connection, storage: i64, segments: u64) -> rusqlite::Result<Self> {
        let sql = "INSERT INTO groups (storage_id, segments, size_bytes) VALUES (?, ?, 0)";
        connection.prepare(sql)?.execute(params![storage, int(segments)])?;
        let group = connection.last_insert_rowid();
        let insert = connection.prepare("INSERT INTO touches (group_id, first_block, data) VALUES (?, ?, ?)")?;
        Ok(Self { connection, group, size_bytes: 0, row: Vec::new(), insert })
    }

    /// Touches come ordered by block and segment.
    fn push(&mut self, touch: Touch) -> Result<(), WorkError> {
        // A block's touches stay together: one row answers for it.
        if self.row.len() >= ROW_TOUCHES && self.row.last().is_some_and(|last| last.block != touch.block) {
            self.write()?;
        }
        self.row.push(touch);
        Ok(())
    }

    fn write(&mut self) -> Result<(), WorkError> {
        let Some(first) = self.row.first() else { return Ok(()) };
        let data = encode(&self.row).map_err(crate::store::StoreError::from)?;
        self.insert.execute(params![self.group, int(first.block), data])?;
        self.size_bytes += data.len() as u64;
        self.row.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<i64, WorkError> {
        self.write()?;
        let sql = "UPDATE groups SET size_bytes = ? WHERE id = ?";
        self.connection.prepare(sql)?.execute(params![int(self.size_bytes), self.group])?;
        Ok(self.group)
    }
}

/// Reads the touches of a group in order, a row at a time.
struct GroupReader<'a> {
    group: i64,
    rows: Statement<'a>,
    /// Its segments. The index may know of others that are gone, whose numbers newer ones may get.
    segments: HashSet<i64>,
    /// Where the next row begins at the earliest.
    from_block: i64,
    row: std::vec::IntoIter<Touch>,
}

impl<'a> GroupReader<'a> {
    fn new(connection: &'a Connection, group: i64) -> rusqlite::Result<Self> {
        let segments = connection
            .prepare("SELECT segment_id FROM chunks WHERE group_id = ?")?
            .query_map([group], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let rows = connection.prepare(
            "SELECT first_block, data FROM touches WHERE group_id = ? AND first_block >= ? ORDER BY first_block LIMIT 1",
        )?;
        Ok(Self { group, rows, segments, from_block: 0, row: Vec::new().into_iter() })
    }

    fn next(&mut self, decoder: &mut RowDecoder) -> Result<Option<Touch>, WorkError> {
        loop {
            let segments = &self.segments;
            if let Some(touch) = self.row.find(|touch| segments.contains(&touch.segment)) {
                return Ok(Some(touch));
            }
            let row: Option<(i64, Vec<u8>)> =
                self.rows.query_row([self.group, self.from_block], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            let Some((first_block, data)) = row else { return Ok(None) };
            self.from_block = first_block.saturating_add(1);
            let mut touches = Vec::new();
            // A damaged row costs its own touches, not the merge.
            if let Err(error) = decoder.row(first_block as u64, &data, |touch| touches.push(touch)) {
                tracing::warn!(group = self.group, first_block, %error, "a row of the history's index is left out");
                touches.clear();
            }
            self.row = touches.into_iter();
        }
    }
}

/// Merges groups of a storage where there are enough of them. Of those of one segment, those that are *settled*: the segment holds more
/// than `most` accesses or begins before `since_us`, so that none will be joined with it.
pub(super) fn merge_groups(connection: &Connection, storage: i64, most: u64, since_us: u64) -> Result<(), WorkError> {
    let number = |sql: &str, values: &[i64]| -> rusqlite::Result<Vec<i64>> {
        connection.prepare(sql)?.query_map(params_from_iter(values), |row| row.get(0))?.collect()
    };
    let settled =
        "SELECT groups.id FROM groups JOIN chunks ON group_id = groups.id JOIN segments ON segments.id = segment_id
        WHERE groups.storage_id = ? AND groups.segments = 1 AND (segments.accesses > ? OR segments.from_us < ?)
        ORDER BY groups.id LIMIT ?";
    let fresh = "SELECT id FROM groups WHERE storage_id = ? AND segments = 1 ORDER BY id LIMIT ?";
    let merged = "SELECT id FROM groups WHERE storage_id = ? AND segments BETWEEN ? AND ? ORDER BY id LIMIT ?";
    let enough = MERGE_GROUPS as i64;
    let first = number(settled, &[storage, int(most), int(since_us), enough])?;
    if first.len() == MERGE_GROUPS {
        merge(connection, storage, &first)?;
    } else {
        let all = number(fresh, &[storage, FRESH_GROUPS_MAX as i64])?;
        if all.len() == FRESH_GROUPS_MAX {
            merge(connection, storage, &all[..MERGE_GROUPS])?;
        }
    }
    let (least, most) = (int(*MERGED_SEGMENTS.start()), int(*MERGED_SEGMENTS.end()));
    let second = number(merged, &[storage, least, most, enough])?;
    if second.len() == MERGE_GROUPS {
        merge(connection, storage, &second)?;
    }
    Ok(())
}

/// Merges groups into one. Touches of segments that are gone are left out.
fn merge(connection: &Connection, storage: i64, groups: &[i64]) -> Result<(), WorkError> {
    let mut decoder = RowDecoder::new().map_err(crate::store::StoreError::from)?;
    let mut readers =
        groups.iter().map(|group| GroupReader::new(connection, *group)).collect::<rusqlite::Result<Vec<_>>>()?;
    let mut heads = BinaryHeap::new();
    for (at, reader) in readers.iter_mut().enumerate() {
        if let Some(touch) = reader.next(&mut decoder)? {
            heads.push(Reverse((touch, at)));
        }
    }
    let segments = readers.iter().map(|reader| reader.segments.len() as u64).sum();
    let mut writer = GroupWriter::new(connection, storage, segments)?;
    while let Some(Reverse((touch, at))) = heads.pop() {
        writer.push(touch)?;
        if let Some(next) = readers[at].next(&mut decoder)? {
            heads.push(Reverse((next, at)));
        }
    }
    let group = writer.finish()?;
    for old in groups {
        connection.prepare("UPDATE chunks SET group_id = ? WHERE group_id = ?")?.execute([group, *old])?;
        remove_group(connection, *old)?;
    }
    Ok(())
}

/// Writes groups anew of which at most half the segments are left: what is known of the others would be kept until the last is gone.
pub(super) fn shrink_groups(connection: &Connection) -> Result<(), WorkError> {
    let sql = "SELECT groups.id, storage_id FROM groups JOIN chunks ON group_id = groups.id
        GROUP BY groups.id HAVING 2 * count(*) <= segments";
    let small: Vec<(i64, i64)> =
        connection.prepare(sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<Result<_, _>>()?;
    small.into_iter().try_for_each(|(group, storage)| merge(connection, storage, &[group]))
}

/// What the index has of a block.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Each with its group.
    pub(super) touches: Vec<(i64, Touch)>,
    /// Groups whose row is damaged: what their segments read of the block is not known.
    pub(super) damaged: Vec<i64>,
}

/// Touches of a block in all groups of a storage. A damaged row costs its own group's.
pub(super) fn find(connection: &Connection, storage: i64, block: u64) -> Result<Found, WorkError> {
    let groups: Vec<i64> = connection
        .prepare("SELECT id FROM groups WHERE storage_id = ? ORDER BY id")?
        .query_map([storage], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let sql = "SELECT first_block, data FROM touches WHERE group_id = ? AND first_block <= ? ORDER BY first_block DESC LIMIT 1";
    let mut statement = connection.prepare(sql)?;
    let mut decoder = RowDecoder::new().map_err(crate::store::StoreError::from)?;
    let mut found = Found::default();
    for group in groups {
        let row: Option<(i64, Vec<u8>)> =
            statement.query_row(params![group, int(block)], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let Some((first_block, data)) = row else { continue };
        let known = found.touches.len();
        let keep = |touch: Touch| {
            if touch.block == block {
                found.touches.push((group, touch));
            }
        };
        if let Err(error) = decoder.row(first_block as u64, &data, keep) {
            tracing::warn!(group, first_block, %error, "a row of the history's index is left out of an answer");
            found.touches.truncate(known);
            found.damaged.push(group);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_give_back_what_went_in_and_strangers_bytes_are_errors(
            touches in prop::collection::btree_map((0..1u64 << 54, 0..1i64 << 40), (1..=u16::MAX, 1..=u32::MAX), 1..200), at: prop::sample::Index, bit in 0..8u8) {
            let touches: Vec<Touch> = touches.into_iter()
                .map(|((block, segment), (chunks, reads))| Touch { block, segment, chunks, reads }).collect();
            let mut bytes = encode(&touches).unwrap();
            let mut decoder = RowDecoder::new().unwrap();
            let mut found = Vec::new();
            decoder.row(touches[0].block, &bytes, |touch| found.push(touch)).unwrap();
            prop_assert_eq!(&found, &touches);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let _ = decoder.row(touches[0].block, &bytes, |_| ());
        }
    }

    #[test]
    fn a_read_counts_for_its_blocks_up_to_four_mebibytes_and_a_write_for_none() {
        let access = |op, page, pages| AccessRecord { at_us: 0, op, page, pages };
        assert_eq!(blocks_read(&access(AccessOp::Read, 15, 2)), Some(0..=1));
        assert_eq!(blocks_read(&access(AccessOp::Read, 16, 16)), Some(1..=1));
        assert_eq!(blocks_read(&access(AccessOp::Read, 0, 1 << 20)), Some(0..=63));
        assert_eq!(blocks_read(&access(AccessOp::Read, 0, 0)), None);
        assert_eq!(blocks_read(&access(AccessOp::Write, 0, 1)), None);
    }
}
