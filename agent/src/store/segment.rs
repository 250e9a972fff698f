//! Access segments: up to 65,536 accesses of one stream as compressed columns.
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
//! All numbers are little-endian. Columns are LEB128 varints, signed ones zigzag-coded:
//! - time: difference to the access before, signed (accesses of several queues may be out of order), in µs
//! - place: first page minus the page after the nearest of the last 16 accesses, signed and shifted left by 4, with the number of that
//!   access in the low bits: interleaved sequential streams become small repeating numbers
//! - shape: pages × 4 + operation
//!
//! A segment is one row of the database, which writes it whole or not at all; the checksum is for what the disk does to it later.

/// Most accesses of a segment.
pub const SEGMENT_ACCESSES_MAX: usize = 65_536;

const MAGIC: [u8; 4] = *b"PSEG";
const VERSION: u16 = 1;
const COLUMNS: u16 = 3;
const HEADER_BYTES: usize = 36;
/// LEB128 of 64 bits takes at most ten bytes; place has 68 bits at most and is kept to ten by [`PAGE_MAX`].
const VARINT_MAX: usize = 10;
/// Accesses whose end the place may refer to: 16 numbers fill the low four bits.
const ENDS: usize = 16;
/// Highest page: 2^58 pages of 4 KiB are beyond any disk, and a signed difference of them fits 64 bits with four to spare.
pub const PAGE_MAX: u64 = 1 << 58;
/// Level 3 is zstd's default: higher ones took 5 × the time for 4 % less on the recorded boots.
const LEVEL: i32 = 3;

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

/// Collects accesses of one stream and encodes them.
#[derive(Debug, Default)]
pub struct SegmentWriter {
    count: usize,
    first_us: u64,
    last_us: u64,
    ends: Ends,
    time: Vec<u8>,
    place: Vec<u8>,
    shape: Vec<u8>,
}

impl SegmentWriter {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Accesses collected.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    #[must_use]
    pub fn is_full(&self) -> bool {
        self.count == SEGMENT_ACCESSES_MAX
    }

    /// Adds an access. Errors: `Count` when full, `OutOfRange`.
    pub fn push(&mut self, access: AccessRecord) -> Result<(), SegmentError> {
        if self.is_full() {
            return Err(SegmentError::Count(self.count + 1));
        }
        if access.page >= PAGE_MAX || access.pages >= 1 << 29 {
            return Err(SegmentError::OutOfRange { page: access.page, pages: access.pages });
        }
        if self.count == 0 {
            self.first_us = access.at_us;
            self.last_us = access.at_us;
        }
        put(&mut self.time, zigzag(access.at_us.wrapping_sub(self.last_us) as i64));
        let (slot, distance) = self.ends.nearest(access.page);
        put(&mut self.place, (zigzag(distance) << 4) | slot as u64);
        let op = match access.op {
            AccessOp::Read => 0,
            AccessOp::Write => 1,
            AccessOp::Discard => 2,
        };
        put(&mut self.shape, (u64::from(access.pages) << 2) | op);
        self.ends.replace(slot, distance, access.page + u64::from(access.pages));
        self.last_us = access.at_us;
        self.count += 1;
        Ok(())
    }

    /// The segment. Errors: `Count` when empty.
    pub fn finish(self) -> Result<Vec<u8>, SegmentError> {
        if self.is_empty() {
            return Err(SegmentError::Count(0));
        }
        let mut columns = Vec::with_capacity(self.time.len() + self.place.len() + self.shape.len());
        let lengths = [self.time.len(), self.place.len(), self.shape.len()];
        columns.extend_from_slice(&self.time);
        columns.extend_from_slice(&self.place);
        columns.extend_from_slice(&self.shape);
        let packed = zstd::bulk::compress(&columns, LEVEL).map_err(|_| SegmentError::Compression)?;
        let mut body = Vec::with_capacity(HEADER_BYTES + packed.len());
        body.extend_from_slice(&MAGIC);
        body.extend_from_slice(&VERSION.to_le_bytes());
        body.extend_from_slice(&COLUMNS.to_le_bytes());
        // At most 65,536 accesses and ten bytes each: all lengths fit 32 bits.
        body.extend_from_slice(&(self.count as u32).to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&self.first_us.to_le_bytes());
        for length in lengths {
            body.extend_from_slice(&(length as u32).to_le_bytes());
        }
        body.extend_from_slice(&packed);
        let crc = checksum(&body);
        body[12..16].copy_from_slice(&crc.to_le_bytes());
        Ok(body)
    }
}

/// Decodes a segment, access by access.
#[derive(Debug)]
pub struct SegmentReader {
    columns: Vec<u8>,
    /// Position and end of each column.
    cursors: [(usize, usize); 3],
    left: usize,
    last_us: u64,
    ends: Ends,
}

impl SegmentReader {
    /// Checks header, checksum and sizes, and unpacks the columns: at most 2 MiB whatever the bytes claim.
    pub fn new(bytes: &[u8]) -> Result<Self, SegmentError> {
        if bytes.len() < 8 || bytes[..4] != MAGIC {
            return Err(SegmentError::NotASegment);
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(SegmentError::OtherVersion { found: version });
        }
        if bytes.len() < HEADER_BYTES {
            return Err(SegmentError::Damaged("cut short"));
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u16::from_le_bytes([bytes[6], bytes[7]]) != COLUMNS {
            return Err(SegmentError::Damaged("number of columns"));
        }
        if checksum(bytes) != word(12) {
            return Err(SegmentError::Damaged("checksum"));
        }
        let count = word(8) as usize;
        if count == 0 || count > SEGMENT_ACCESSES_MAX {
            return Err(SegmentError::Damaged("number of accesses"));
        }
        let first_us = u64::from(word(16)) | (u64::from(word(20)) << 32);
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
        let columns = zstd::bulk::decompress(&bytes[HEADER_BYTES..], total)
            .map_err(|_| SegmentError::Damaged("compressed part"))?;
        if columns.len() != total {
            return Err(SegmentError::Damaged("size of the columns"));
        }
        Ok(Self { columns, cursors, left: count, last_us: first_us, ends: Ends::default() })
    }

    /// Accesses not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.left
    }

    fn take(&mut self, column: usize) -> Result<u64, SegmentError> {
        let (at, end) = &mut self.cursors[column];
        get(&self.columns[..*end], at)
    }

    fn read(&mut self) -> Result<AccessRecord, SegmentError> {
        let time = unzigzag(self.take(0)?);
        let place = self.take(1)?;
        let shape = self.take(2)?;
        self.last_us = self.last_us.wrapping_add(time as u64);
        let (slot, distance) = ((place & 15) as usize, unzigzag(place >> 4));
        let page = self.ends.at(slot, distance).ok_or(SegmentError::Damaged("page"))?;
        let op = match shape & 3 {
            0 => AccessOp::Read,
            1 => AccessOp::Write,
            2 => AccessOp::Discard,
            _ => return Err(SegmentError::Damaged("operation")),
        };
        let pages = u32::try_from(shape >> 2).ok().filter(|pages| *pages < 1 << 29);
        let pages = pages.ok_or(SegmentError::Damaged("number of pages"))?;
        self.ends.replace(slot, distance, page + u64::from(pages));
        Ok(AccessRecord { at_us: self.last_us, op, page, pages })
    }
}

impl Iterator for SegmentReader {
    type Item = Result<AccessRecord, SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let access = self.read();
        let over = self.left == 0 && self.cursors.iter().any(|(at, end)| at != end);
        if access.is_err() || over {
            self.left = 0;
        }
        Some(if over && access.is_ok() { Err(SegmentError::Damaged("bytes left over")) } else { access })
    }
}

/// Encodes accesses. Errors: `Count` unless 1 to 65,536, `OutOfRange`.
pub fn encode(accesses: &[AccessRecord]) -> Result<Vec<u8>, SegmentError> {
    let mut writer = SegmentWriter::new();
    for access in accesses {
        writer.push(*access)?;
    }
    writer.finish()
}

/// Decodes a whole segment.
pub fn decode(bytes: &[u8]) -> Result<Vec<AccessRecord>, SegmentError> {
    SegmentReader::new(bytes)?.collect()
}

/// Ends of the last accesses that began elsewhere, most recent first: what a place refers to. Reader and writer keep the same.
#[derive(Debug, Clone, Default)]
struct Ends([u64; ENDS]);

impl Ends {
    /// The end nearest to `page`, the more recent of equals, and the distance from it.
    fn nearest(&self, page: u64) -> (usize, i64) {
        let mut best = (0, i64::MAX);
        for (slot, end) in self.0.iter().enumerate() {
            let distance = page.wrapping_sub(*end) as i64;
            if distance.unsigned_abs() < best.1.unsigned_abs() {
                best = (slot, distance);
            }
        }
        best
    }

    fn at(&self, slot: usize, distance: i64) -> Option<u64> {
        self.0[slot].checked_add_signed(distance).filter(|page| *page < PAGE_MAX)
    }

    /// Moves `end` to the front, in place of the one it continues (or lies near to), else of the oldest.
    fn replace(&mut self, slot: usize, distance: i64, end: u64) {
        // 64 pages, a quarter of a mebibyte: within it, an access continues its stream rather than begins one.
        let last = if distance.unsigned_abs() <= 64 { slot } else { ENDS - 1 };
        self.0.copy_within(0..last, 1);
        self.0[0] = end;
    }
}

/// Of a segment of at least a header.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..])
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    ((value >> 1) as i64) ^ -((value & 1) as i64)
}

fn put(column: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        column.push(value as u8 | 0x80);
        value >>= 7;
    }
    column.push(value as u8);
}

fn get(column: &[u8], at: &mut usize) -> Result<u64, SegmentError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *column.get(*at).ok_or(SegmentError::Damaged("end of a column"))?;
        *at += 1;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            break;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(SegmentError::Damaged("number too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        fn bytes_of_a_stranger_are_an_error_not_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), columns in prop::collection::vec(any::<u8>(), 0..200), count in 0..80u32) {
            prop_assert!(decode(&bytes).is_err());
            // With all that is checked up front put right, so that the columns themselves are reached.
            let third = columns.len() / 3;
            let mut forged = Vec::from(MAGIC);
            forged.extend_from_slice(&[1, 0, 3, 0]);
            forged.extend_from_slice(&count.to_le_bytes());
            forged.extend_from_slice(&[0; 12]);
            for length in [third, third, columns.len() - 2 * third] {
                forged.extend_from_slice(&(length as u32).to_le_bytes());
            }
            forged.append(&mut zstd::bulk::compress(&columns, 1).unwrap());
            let crc = checksum(&forged);
            forged[12..16].copy_from_slice(&crc.to_le_bytes());
            let _ = decode(&forged);
            bytes.splice(0..bytes.len().min(6), *b"PSEG\x01\x00");
            prop_assert!(decode(&bytes).is_err());
        }
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
        assert!(bytes.len() < 400, "{} bytes for {} accesses", bytes.len(), accesses.len());
    }

    /// Guards the size on disk: retention limits are chosen with it in mind. The excerpt is the start of a recorded boot.
    #[test]
    fn a_recorded_boot_takes_at_most_four_bytes_an_access() {
        let accesses = read_trace(include_str!("testdata/boot_excerpt.csv"));
        assert!(accesses.len() >= 2000);
        let bytes = encode(&accesses).unwrap();
        let each = bytes.len() as f64 / accesses.len() as f64;
        assert!(each <= 4.0, "{each:.2} bytes an access");
        assert_eq!(decode(&bytes).unwrap(), accesses);
    }

    /// Prints the size for any trace: `PRESTAGE_TRACE=boot.csv cargo test -p prestage-agent size_of_a_trace -- --ignored --nocapture`.
    #[test]
    #[ignore = "a measurement of a file of one's own"]
    fn size_of_a_trace() {
        let path = std::env::var("PRESTAGE_TRACE").expect("PRESTAGE_TRACE names a file of ts_us,op,offset,len");
        let accesses = read_trace(&std::fs::read_to_string(path).unwrap());
        let mut size = 0;
        let mut columns = [0; 3];
        for part in accesses.chunks(SEGMENT_ACCESSES_MAX) {
            let bytes = encode(part).unwrap();
            assert_eq!(decode(&bytes).unwrap(), part);
            size += bytes.len();
            let mut writer = SegmentWriter::new();
            part.iter().for_each(|access| writer.push(*access).unwrap());
            for (sum, column) in columns.iter_mut().zip([&writer.time, &writer.place, &writer.shape]) {
                *sum += zstd::bulk::compress(column, LEVEL).unwrap().len();
            }
        }
        let each = |bytes: usize| bytes as f64 / accesses.len() as f64;
        println!(
            "{} accesses, {:.2} bytes each; time, place, shape: {:.2?}",
            accesses.len(),
            each(size),
            columns.map(each)
        );
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
