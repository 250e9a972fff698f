//! Version 1 of the format, which databases of the first release hold until they are rewritten: read, not written.
//!
//! ```text
//! offset size
//!      0    4  magic "PSEG"
//!      4    2  version, 1
//!      6    2  columns, 3
//!      8    4  accesses
//!     12    4  CRC-32C of all other bytes
//!     16    8  time of the first access, Unix µs
//!     24   12  length of each column before compression: time, place, shape
//!     36    …  one zstd frame: the columns one after the other
//! ```
//!
//! Columns are LEB128 varints, signed ones zigzag-coded: time, the difference to the access before; place, the distance from one of the
//! last 16 ends shifted left by 4, with the number of the end in the low bits; shape, pages × 4 + operation.

use super::coding::{Ends, get, unzigzag};
use super::{AccessRecord, SEGMENT_ACCESSES_MAX, SegmentError, operation};

const COLUMNS: u16 = 3;
const HEADER_BYTES: usize = 36;
const VARINT_MAX: usize = 10;

/// Decodes a segment whose magic and version have been seen. Unpacks at most 2 MiB whatever the bytes claim.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<AccessRecord>, SegmentError> {
    if bytes.len() < HEADER_BYTES {
        return Err(SegmentError::Damaged("cut short"));
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if u16::from_le_bytes([bytes[6], bytes[7]]) != COLUMNS {
        return Err(SegmentError::Damaged("number of columns"));
    }
    if crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..]) != word(12) {
        return Err(SegmentError::Damaged("checksum"));
    }
    let count = word(8) as usize;
    if count == 0 || count > SEGMENT_ACCESSES_MAX {
        return Err(SegmentError::Damaged("number of accesses"));
    }
    let mut last_us = u64::from(word(16)) | (u64::from(word(20)) << 32);
    let mut total = 0;
    let mut cursors = [(0, 0); 3];
    for (index, cursor) in cursors.iter_mut().enumerate() {
        let length = word(24 + 4 * index) as usize;
        if length < count || length > count * VARINT_MAX {
            return Err(SegmentError::Damaged("length of a column"));
        }
        *cursor = (total, total + length);
        total += length;
    }
    let columns =
        zstd::bulk::decompress(&bytes[HEADER_BYTES..], total).map_err(|_| SegmentError::Damaged("compressed part"))?;
    if columns.len() != total {
        return Err(SegmentError::Damaged("size of the columns"));
    }
    let mut take = |column: usize| {
        let (at, end) = &mut cursors[column];
        get(&columns[..*end], at)
    };
    let mut ends = Ends::default();
    let mut records = Vec::with_capacity(count);
    for _ in 0..count {
        let (time, place, shape) = (unzigzag(take(0)?), take(1)?, take(2)?);
        last_us = last_us.wrapping_add(time as u64);
        let (slot, distance) = ((place & 15) as usize, unzigzag(place >> 4));
        let page = ends.at(slot, distance).ok_or(SegmentError::Damaged("page"))?;
        let (op, pages) = operation(shape)?;
        ends.replace(slot, distance, page + u64::from(pages));
        records.push(AccessRecord { at_us: last_us, op, page, pages });
    }
    if cursors.iter().any(|(at, end)| at != end) {
        return Err(SegmentError::Damaged("bytes left over"));
    }
    Ok(records)
}
