//! Access segments: up to 65,536 accesses of one stream as compressed columns, in chunks that are read each by itself.
//!
//! - `coding.rs`: numbers and places
//! - `v1.rs`: the version before
//!
//! ```text
//! offset size
//!      0    4  magic "PSEG"
//!      4    2  version, 2
//!      6    2  chunks
//!      8    4  accesses
//!     12    4  CRC-32C of all other bytes of this header
//!     16  4×n  length of each chunk in bytes
//!      …    …  the chunks, each of 4,096 accesses but the last:
//!      0    4    CRC-32C of all other bytes of the chunk
//!      4    8    time of the first access, Unix µs
//!     12   20    length of each column, before and after compression, two bytes each
//!     32    …    the columns, each a zstd frame, or as it is where that is not shorter
//! ```
//!
//! All numbers are little-endian. The columns:
//! - time, low: low byte of the zigzag-coded difference to the access before in µs (accesses of several queues may be out of order)
//! - time, high: the rest of it as LEB128
//! - place: the first page is that after one of the last 16 accesses (high four bits: which) plus a zigzag-coded distance: below 8 in the
//!   low four bits; else these are 7 + the number of bytes in the next column
//! - distance: distances less 8, in as few bytes as hold them
//! - shape: pages × 4 + operation as LEB128
//!
//! Bytes that look alike stand together: noise (low bytes of times, far distances) apart from what repeats. On recorded boots and
//! workloads this takes 6 to 9 % less than whole varints in one frame a segment, although a chunk knows nothing of those before it.
//!
//! A segment is one row of the database, which writes it whole or not at all; the checksums are for what the disk does to it later.

mod coding;
mod v1;

use std::fmt;
use std::ops::Range;

use coding::Ends;
pub(crate) use coding::{get, put, unzigzag, zigzag};

/// Most accesses of a segment.
pub const SEGMENT_ACCESSES_MAX: usize = 65_536;
/// Accesses of a chunk: what a question about a moment has to decode. Smaller ones compress worse.
pub const CHUNK_ACCESSES: usize = 4096;
/// Most chunks of a segment.
pub const CHUNKS_MAX: usize = SEGMENT_ACCESSES_MAX / CHUNK_ACCESSES;
/// Highest page: 2^58 pages of 4 KiB are beyond any disk, and a signed difference of them fits 64 bits with room to spare.
pub const PAGE_MAX: u64 = 1 << 58;

const MAGIC: [u8; 4] = *b"PSEG";
const VERSION: u16 = 2;
const HEADER_BYTES: usize = 16;
const CHUNK_HEADER_BYTES: usize = 32;
const COLUMNS: usize = 5;
/// Most bytes of an access in a column: eight of a distance, or a time's 57 bits in LEB128.
const COLUMN_BYTES_MAX: usize = 9;
/// Distances that stand in the place itself.
const NEAR: u64 = 8;
/// On the recorded boots and workloads, higher levels gained under 1 % for twice the time and more; lower ones lost as much.
const LEVEL: i32 = 5;

/// What a guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessOp {
    Read,
    Write,
    /// Discard or write zeroes.
    Discard,
}

/// One access of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessRecord {
    /// Unix time in microseconds.
    pub at_us: u64,
    pub op: AccessOp,
    /// First page (4 KiB), below [`PAGE_MAX`].
    pub page: u64,
    /// Pages touched, at most 2^29.
    pub pages: u32,
}

/// Why bytes are not a segment, or an access does not fit one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    #[error("not an access segment (no magic); remove it with its row")]
    NotASegment,
    #[error(
        "access segment of version {found}, this prestaged reads version {VERSION}; use the prestaged that wrote it"
    )]
    OtherVersion { found: u16 },
    #[error("access segment is damaged ({0}); its accesses are lost, others are not concerned")]
    Damaged(&'static str),
    #[error("a segment holds 1 to {SEGMENT_ACCESSES_MAX} accesses, not {0}")]
    Count(usize),
    #[error("access at page {page} of {pages} pages is beyond any disk")]
    OutOfRange { page: u64, pages: u32 },
    #[error("compression failed")]
    Compression,
}

/// Of `shape`: operation and pages.
fn operation(shape: u64) -> Result<(AccessOp, u32), SegmentError> {
    let op = match shape & 3 {
        0 => AccessOp::Read,
        1 => AccessOp::Write,
        2 => AccessOp::Discard,
        _ => return Err(SegmentError::Damaged("operation")),
    };
    let pages = u32::try_from(shape >> 2).ok().filter(|pages| *pages < 1 << 29);
    Ok((op, pages.ok_or(SegmentError::Damaged("number of pages"))?))
}

/// Encodes accesses. Errors: `Count` unless 1 to 65,536, `OutOfRange`.
pub fn encode(accesses: &[AccessRecord]) -> Result<Vec<u8>, SegmentError> {
    if accesses.is_empty() || accesses.len() > SEGMENT_ACCESSES_MAX {
        return Err(SegmentError::Count(accesses.len()));
    }
    let mut packer = zstd::bulk::Compressor::new(LEVEL).map_err(|_| SegmentError::Compression)?;
    let chunks: Vec<Vec<u8>> =
        accesses.chunks(CHUNK_ACCESSES).map(|chunk| encode_chunk(chunk, &mut packer)).collect::<Result<_, _>>()?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + chunks.iter().map(|chunk| 4 + chunk.len()).sum::<usize>());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    // At most 16 chunks of 65,536 accesses, ten bytes each: all lengths fit.
    bytes.extend_from_slice(&(chunks.len() as u16).to_le_bytes());
    bytes.extend_from_slice(&(accesses.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    for chunk in &chunks {
        bytes.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    for chunk in &chunks {
        bytes.extend_from_slice(chunk);
    }
    Ok(bytes)
}

fn encode_chunk(accesses: &[AccessRecord], packer: &mut zstd::bulk::Compressor<'_>) -> Result<Vec<u8>, SegmentError> {
    let mut columns: [Vec<u8>; COLUMNS] = Default::default();
    let [low, high, place, distances, shape] = &mut columns;
    let first_us = accesses.first().map_or(0, |access| access.at_us);
    let mut last_us = first_us;
    let mut ends = Ends::default();
    for access in accesses {
        if access.page >= PAGE_MAX || access.pages >= 1 << 29 {
            return Err(SegmentError::OutOfRange { page: access.page, pages: access.pages });
        }
        let time = zigzag(access.at_us.wrapping_sub(last_us) as i64);
        low.push(time as u8);
        put(high, time >> 8);
        let (slot, distance) = ends.nearest(access.page);
        let far = zigzag(distance);
        if far < NEAR {
            place.push((slot as u8) << 4 | far as u8);
        } else {
            let rest = far - NEAR;
            let bytes = (8 - rest.leading_zeros() as usize / 8).max(1);
            place.push((slot as u8) << 4 | (7 + bytes as u8));
            distances.extend_from_slice(&rest.to_le_bytes()[..bytes]);
        }
        let op = match access.op {
            AccessOp::Read => 0,
            AccessOp::Write => 1,
            AccessOp::Discard => 2,
        };
        put(shape, (u64::from(access.pages) << 2) | op);
        ends.replace(slot, distance, access.page + u64::from(access.pages));
        last_us = access.at_us;
    }
    let mut bytes = vec![0; CHUNK_HEADER_BYTES];
    bytes[4..12].copy_from_slice(&first_us.to_le_bytes());
    for (index, column) in columns.iter().enumerate() {
        let packed = packer.compress(column).map_err(|_| SegmentError::Compression)?;
        let packed = if packed.len() < column.len() { &packed } else { column };
        bytes.extend_from_slice(packed);
        // 4,096 accesses of at most nine bytes.
        let at = 12 + 4 * index;
        bytes[at..at + 2].copy_from_slice(&(column.len() as u16).to_le_bytes());
        bytes[at + 2..at + 4].copy_from_slice(&(packed.len() as u16).to_le_bytes());
    }
    let crc = crc32c::crc32c(&bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

/// Decodes segments, chunk by chunk; keeps its buffers from one to the next.
pub struct Decoder {
    unpacker: zstd::bulk::Decompressor<'static>,
    columns: [Vec<u8>; COLUMNS],
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Decoder {
    /// Errors: `Compression`: no memory.
    pub fn new() -> Result<Self, SegmentError> {
        let unpacker = zstd::bulk::Decompressor::new().map_err(|_| SegmentError::Compression)?;
        Ok(Self { unpacker, columns: Default::default() })
    }

    /// Adds the accesses of a chunk, of which its segment's [`Layout`] tells place and number, to `records`. Unpacks at most 200 KiB
    /// whatever the bytes claim.
    pub fn chunk(&mut self, bytes: &[u8], count: usize, records: &mut Vec<AccessRecord>) -> Result<(), SegmentError> {
        let (header, mut packed) =
            bytes.split_at_checked(CHUNK_HEADER_BYTES).ok_or(SegmentError::Damaged("cut short"))?;
        if crc32c::crc32c(&bytes[4..]) != word(header, 0) {
            return Err(SegmentError::Damaged("checksum"));
        }
        let first_us = u64::from(word(header, 4)) | (u64::from(word(header, 8)) << 32);
        for (index, column) in self.columns.iter_mut().enumerate() {
            let lengths = word(header, 12 + 4 * index);
            let (length, packed_length) = ((lengths & 0xffff) as usize, (lengths >> 16) as usize);
            if length > count * COLUMN_BYTES_MAX {
                return Err(SegmentError::Damaged("length of a column"));
            }
            let (frame, rest) = packed.split_at_checked(packed_length).ok_or(SegmentError::Damaged("cut short"))?;
            packed = rest;
            column.clear();
            if length == packed_length {
                column.extend_from_slice(frame);
                continue;
            }
            column.resize(length, 0);
            match self.unpacker.decompress_to_buffer(frame, column.as_mut_slice()) {
                Ok(unpacked) if unpacked == length => {}
                _ => return Err(SegmentError::Damaged("compressed part")),
            }
        }
        if !packed.is_empty() {
            return Err(SegmentError::Damaged("bytes left over"));
        }
        self.read(first_us, count, records)
    }

    fn read(&self, first_us: u64, count: usize, records: &mut Vec<AccessRecord>) -> Result<(), SegmentError> {
        let [low, high, place, distances, shape] = &self.columns;
        if low.len() != count || place.len() != count {
            return Err(SegmentError::Damaged("length of a column"));
        }
        let (mut high_at, mut distance_at, mut shape_at) = (0, 0, 0);
        let mut last_us = first_us;
        let mut ends = Ends::default();
        records.reserve(count);
        for (low, place) in low.iter().zip(place) {
            let high = get(high, &mut high_at)?;
            if high >= 1 << 56 {
                return Err(SegmentError::Damaged("time"));
            }
            last_us = last_us.wrapping_add(unzigzag(high << 8 | u64::from(*low)) as u64);
            let (slot, class) = (usize::from(place >> 4), u64::from(place & 15));
            let far = if class < NEAR {
                class
            } else {
                let end = distance_at + (class - 7) as usize;
                let bytes = distances.get(distance_at..end).ok_or(SegmentError::Damaged("end of a column"))?;
                distance_at = end;
                let rest = bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
                rest.checked_add(NEAR).ok_or(SegmentError::Damaged("distance"))?
            };
            let distance = unzigzag(far);
            let page = ends.at(slot, distance).ok_or(SegmentError::Damaged("page"))?;
            let (op, pages) = operation(get(shape, &mut shape_at)?)?;
            ends.replace(slot, distance, page + u64::from(pages));
            records.push(AccessRecord { at_us: last_us, op, page, pages });
        }
        if (high_at, distance_at, shape_at) != (high.len(), distances.len(), shape.len()) {
            return Err(SegmentError::Damaged("bytes left over"));
        }
        Ok(())
    }

    /// All accesses of a segment of any version.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Vec<AccessRecord>, SegmentError> {
        if version(bytes)? == 1 {
            return v1::decode(bytes);
        }
        let layout = Layout::new(bytes)?;
        let mut records = Vec::with_capacity(layout.accesses);
        for index in 0..layout.chunks.len() {
            let chunk = layout.chunk(index)?;
            let bytes = bytes.get(chunk.bytes).ok_or(SegmentError::Damaged("cut short"))?;
            self.chunk(bytes, chunk.accesses, &mut records)?;
        }
        if layout.end != bytes.len() {
            return Err(SegmentError::Damaged("bytes left over"));
        }
        Ok(records)
    }
}

/// Where a chunk is in its segment, and how many accesses it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkPlace {
    pub bytes: Range<usize>,
    pub accesses: usize,
}

/// Where the chunks of a segment are.
#[derive(Debug)]
pub struct Layout {
    accesses: usize,
    chunks: Vec<Range<usize>>,
    /// Length of the segment.
    end: usize,
}

impl Layout {
    /// Most bytes of a segment's head.
    pub const HEAD_BYTES_MAX: usize = HEADER_BYTES + 4 * CHUNKS_MAX;

    /// Reads the head of a segment; what follows it may be missing. Errors: `NotASegment`, `OtherVersion`, `Damaged`.
    pub fn new(bytes: &[u8]) -> Result<Self, SegmentError> {
        let found = version(bytes)?;
        if found != VERSION {
            return Err(SegmentError::OtherVersion { found });
        }
        let chunks = usize::from(u16::from_le_bytes([bytes[6], bytes[7]]));
        let head = bytes.get(..HEADER_BYTES + 4 * chunks).ok_or(SegmentError::Damaged("cut short"))?;
        if crc32c::crc32c_append(crc32c::crc32c(&head[..12]), &head[16..]) != word(head, 12) {
            return Err(SegmentError::Damaged("checksum"));
        }
        let accesses = word(head, 8) as usize;
        if accesses == 0 || accesses > SEGMENT_ACCESSES_MAX || accesses.div_ceil(CHUNK_ACCESSES) != chunks {
            return Err(SegmentError::Damaged("number of accesses"));
        }
        let mut end = head.len();
        let places = (0..chunks).map(|index| {
            let begin = end;
            end += word(head, HEADER_BYTES + 4 * index) as usize;
            begin..end
        });
        Ok(Self { accesses, chunks: places.collect(), end })
    }

    /// Errors: `Damaged`: there is no such chunk.
    pub fn chunk(&self, index: usize) -> Result<ChunkPlace, SegmentError> {
        let bytes = self.chunks.get(index).cloned().ok_or(SegmentError::Damaged("number of chunks"))?;
        Ok(ChunkPlace { bytes, accesses: (self.accesses - index * CHUNK_ACCESSES).min(CHUNK_ACCESSES) })
    }
}

/// Version of a segment. Errors: `NotASegment`, `OtherVersion` of one that nobody knows.
fn version(bytes: &[u8]) -> Result<u16, SegmentError> {
    if bytes.len() < HEADER_BYTES || bytes[..4] != MAGIC {
        return Err(SegmentError::NotASegment);
    }
    match u16::from_le_bytes([bytes[4], bytes[5]]) {
        found @ 1..=VERSION => Ok(found),
        found => Err(SegmentError::OtherVersion { found }),
    }
}

/// The four bytes at `at`, which are there.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Result<Vec<AccessRecord>, SegmentError> {
        Decoder::new()?.decode(bytes)
    }

    fn op() -> impl Strategy<Value = AccessOp> {
        prop_oneof![Just(AccessOp::Read), Just(AccessOp::Write), Just(AccessOp::Discard)]
    }

    prop_compose! {
        fn access()(at_us in prop_oneof![0..1_000_000u64, any::<u64>()], op in op(),
            page in prop_oneof![0..10_000u64, 0..PAGE_MAX], pages in prop_oneof![0..64u32, 0..1u32 << 29]) -> AccessRecord {
            AccessRecord { at_us, op, page, pages }
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(accesses in prop::collection::vec(access(), 1..300)) {
            let bytes = encode(&accesses).unwrap();
            prop_assert_eq!(decode(&bytes).unwrap(), accesses);
        }

        #[test]
        fn one_flipped_bit_anywhere_is_noticed(accesses in prop::collection::vec(access(), 1..50), at: prop::sample::Index, bit in 0..8u8) {
            let mut bytes = encode(&accesses).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn bytes_of_a_stranger_are_an_error_not_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), columns in prop::collection::vec(any::<u8>(), 0..200), count in 0..80u32, lengths in prop::collection::vec(0..50u16, 5)) {
            prop_assert!(decode(&bytes).is_err());
            // With all that is checked up front put right, so that the columns themselves are reached.
            let mut chunk = vec![0; 12];
            for length in &lengths {
                chunk.extend_from_slice(&length.to_le_bytes());
                chunk.extend_from_slice(&length.to_le_bytes());
            }
            let all: usize = lengths.iter().map(|length| usize::from(*length)).sum();
            chunk.extend(columns.iter().cycle().take(if columns.is_empty() { 0 } else { all }));
            let crc = crc32c::crc32c(&chunk[4..]);
            chunk[..4].copy_from_slice(&crc.to_le_bytes());
            let mut forged = Vec::from(MAGIC);
            forged.extend_from_slice(&[2, 0, 1, 0]);
            forged.extend_from_slice(&count.to_le_bytes());
            forged.extend_from_slice(&[0; 4]);
            forged.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
            let crc = crc32c::crc32c_append(crc32c::crc32c(&forged[..12]), &forged[16..]);
            forged[12..16].copy_from_slice(&crc.to_le_bytes());
            forged.extend_from_slice(&chunk);
            let _ = decode(&forged);
            let mut headed = bytes;
            headed.splice(0..headed.len().min(6), *b"PSEG\x01\x00");
            prop_assert!(decode(&headed).is_err());
        }
    }

    #[test]
    fn a_chunk_is_read_by_itself() {
        let accesses: Vec<AccessRecord> = (0..10_000u64)
            .map(|n| AccessRecord { at_us: n * n % 977, op: AccessOp::Read, page: n * 7919 % 100_003, pages: 2 })
            .collect();
        let bytes = encode(&accesses).unwrap();
        // The head is enough to find a chunk.
        let layout = Layout::new(&bytes[..Layout::HEAD_BYTES_MAX]).unwrap();
        let chunk = layout.chunk(2).unwrap();
        let mut records = Vec::new();
        Decoder::new().unwrap().chunk(&bytes[chunk.bytes], chunk.accesses, &mut records).unwrap();
        assert_eq!(records, accesses[2 * CHUNK_ACCESSES..]);
        assert!(layout.chunk(3).is_err());
    }

    #[test]
    fn interleaved_streams_take_a_few_bits_an_access() {
        let accesses: Vec<AccessRecord> = (0..9000u64)
            .map(|n| AccessRecord {
                at_us: 1_700_000_000_000_000 + n * 100,
                op: AccessOp::Read,
                page: (n % 9) * 1_000_000 + n / 9 * 8,
                pages: 8,
            })
            .collect();
        let bytes = encode(&accesses).unwrap();
        assert!(bytes.len() < 700, "{} bytes for {} accesses", bytes.len(), accesses.len());
    }

    /// Guards the size on disk: retention limits are chosen with it in mind. The excerpt is the start of a recorded boot.
    #[test]
    fn a_recorded_boot_takes_at_most_four_bytes_an_access() {
        let accesses = read_trace(include_str!("../testdata/boot_excerpt.csv"));
        assert!(accesses.len() >= 2000);
        let bytes = encode(&accesses).unwrap();
        let each = bytes.len() as f64 / accesses.len() as f64;
        assert!(each <= 4.0, "{each:.2} bytes an access");
        assert_eq!(decode(&bytes).unwrap(), accesses);
    }

    fn read_trace(text: &str) -> Vec<AccessRecord> {
        let accesses = text.lines().skip(1).map(|line| {
            let mut fields = line.split(',');
            let mut next = || fields.next().unwrap();
            let at_us = 1_700_000_000_000_000 + next().parse::<u64>().unwrap();
            let op = if next() == "R" { AccessOp::Read } else { AccessOp::Write };
            let (offset, len): (u64, u64) = (next().parse().unwrap(), next().parse().unwrap());
            let page = offset / 4096;
            AccessRecord { at_us, op, page, pages: ((offset + len).div_ceil(4096) - page) as u32 }
        });
        accesses.collect()
    }
}
