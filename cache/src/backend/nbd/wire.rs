//! NBD's bytes, as in `doc/proto.md` of the NBD project. All integers are big-endian.
//!
//! - [`Request`] header, [`Command`], transmission flags
//! - [`ReplyHeader`], [`ChunkKind`]: simple and structured replies
//! - [`OptionReply`], [`ExportInfo`]: negotiation
//! - [`Coverage`]: which bytes of a read have arrived
//!
//! Pure functions over slices. Whatever a server sends is checked here before a length of it is used for anything.
//!
//! ```text
//! request          magic:4 0x25609513  flags:2  type:2  cookie:8  offset:8  length:4   [payload of a write]
//! simple reply     magic:4 0x67446698  error:4  cookie:8                               [payload of a read]
//! structured chunk magic:4 0x668e33ef  flags:2  type:2  cookie:8  length:4             [length bytes]
//! option           magic:8 "IHAVEOPT"  option:4  length:4  data
//! option reply     magic:8 0x0003e889045565a9  option:4  type:4  length:4  data
//! ```

use std::ops::Range;

pub(super) const SERVER_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// What a server of the style of before 2009 sends in place of [`OPTION_MAGIC`].
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERROR_BIT: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR_BIT | 1;
pub(super) const REP_ERR_POLICY: u32 = REP_ERROR_BIT | 2;
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR_BIT | 5;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR_BIT | 6;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Longest option reply taken: names and descriptions are at most 4096 bytes.
pub(super) const OPTION_REPLY_MAX_BYTES: u32 = 16 << 10;
/// Longest message in an error chunk.
const MESSAGE_MAX_BYTES: u32 = 4096;
pub(super) const REQUEST_BYTES: usize = 28;
pub(super) const SIMPLE_BYTES: usize = 16;
pub(super) const CHUNK_BYTES: usize = 20;

pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_FLUSH: u16 = 1 << 2;
pub(super) const EXPORT_FUA: u16 = 1 << 3;
pub(super) const EXPORT_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const EXPORT_MULTI_CONN: u16 = 1 << 8;

pub(super) const CMD_FUA: u16 = 1;
pub(super) const CMD_NO_HOLE: u16 = 2;
pub(super) const CMD_REQ_ONE: u16 = 8;

/// The context in which a server says what is allocated, and its flags.
pub(super) const ALLOCATION: &str = "base:allocation";
pub(super) const STATE_HOLE: u32 = 1;
pub(super) const STATE_ZERO: u32 = 2;
/// Extents in one reply: no server is to send more.
const EXTENTS_MAX: u32 = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub(super) enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

pub(super) fn request(command: Command, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut out = [0; REQUEST_BYTES];
    out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..28].copy_from_slice(&len.to_be_bytes());
    out
}

pub(super) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// The data of `NBD_OPT_GO`: the export's name and a request for its block sizes.
pub(super) fn go_data(export: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + export.len());
    out.extend_from_slice(&(export.len() as u32).to_be_bytes());
    out.extend_from_slice(export.as_bytes());
    out.extend_from_slice(&1u16.to_be_bytes());
    out.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    out
}

/// The data of `NBD_OPT_SET_META_CONTEXT`: the export's name and one query.
pub(super) fn context_data(export: &str, query: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(12 + export.len() + query.len());
    out.extend_from_slice(&(export.len() as u32).to_be_bytes());
    out.extend_from_slice(export.as_bytes());
    out.extend_from_slice(&1u32.to_be_bytes());
    out.extend_from_slice(&(query.len() as u32).to_be_bytes());
    out.extend_from_slice(query.as_bytes());
    out
}

/// Reads integers off the front of a slice; `None` when it is too short.
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

impl<'a> Cursor<'a> {
    pub(super) fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
    pub(super) fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }
    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }
}

/// The head of an option reply; `len` bytes of data follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct OptionReply {
    pub(super) kind: u32,
    pub(super) len: u32,
}

pub(super) const OPTION_REPLY_BYTES: usize = 20;

/// # Errors
/// What is wrong with it.
pub(super) fn option_reply(bytes: &[u8], asked: u32) -> Result<OptionReply, String> {
    let short = || "a cut-off option reply".to_owned();
    let mut cursor = Cursor(bytes);
    let magic = cursor.u64().ok_or_else(short)?;
    if magic != OPTION_REPLY_MAGIC {
        return Err(format!("an option reply begins with {magic:#x}"));
    }
    let option = cursor.u32().ok_or_else(short)?;
    if option != asked {
        return Err(format!("a reply to option {option}, asked was {asked}"));
    }
    let (kind, len) = (cursor.u32().ok_or_else(short)?, cursor.u32().ok_or_else(short)?);
    if len > OPTION_REPLY_MAX_BYTES {
        return Err(format!("an option reply of {len} bytes"));
    }
    Ok(OptionReply { kind, len })
}

/// What negotiation found out about an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ExportInfo {
    pub(super) size_bytes: u64,
    pub(super) flags: u16,
    pub(super) structured: bool,
    /// The number under which the server tells what is allocated, if it does.
    pub(super) allocation: Option<u32>,
    /// Powers of two, 512 ≤ min ≤ 65536.
    pub(super) min_block_bytes: u32,
    /// A multiple of the minimum.
    pub(super) max_payload_bytes: u32,
}

impl ExportInfo {
    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The head of a reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReplyHeader {
    Simple { cookie: u64, error: u32 },
    Chunk { cookie: u64, done: bool, kind: ChunkKind, len: u32 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ChunkKind {
    None,
    OffsetData,
    OffsetHole,
    BlockStatus,
    Error,
    ErrorOffset,
}

/// How many bytes the header has that begins with these four.
///
/// # Errors
/// Neither magic.
pub(super) fn reply_header_len(magic: &[u8]) -> Result<usize, String> {
    match Cursor(magic).u32() {
        Some(SIMPLE_MAGIC) => Ok(SIMPLE_BYTES),
        Some(CHUNK_MAGIC) => Ok(CHUNK_BYTES),
        other => Err(format!("a reply begins with {:#x}", other.unwrap_or(0))),
    }
}

/// # Errors
/// What is wrong with it.
pub(super) fn reply_header(bytes: &[u8]) -> Result<ReplyHeader, String> {
    let short = || "a cut-off reply".to_owned();
    let len = reply_header_len(bytes)?;
    let mut cursor = Cursor(bytes.get(4..len).ok_or_else(short)?);
    if len == SIMPLE_BYTES {
        let (error, cookie) = (cursor.u32().ok_or_else(short)?, cursor.u64().ok_or_else(short)?);
        return Ok(ReplyHeader::Simple { cookie, error });
    }
    let (flags, kind) = (cursor.u16().ok_or_else(short)?, cursor.u16().ok_or_else(short)?);
    let (cookie, len) = (cursor.u64().ok_or_else(short)?, cursor.u32().ok_or_else(short)?);
    let kind = match kind {
        0 if len == 0 && flags & 1 != 0 => ChunkKind::None,
        0 => return Err("an empty chunk with data, or in the middle of a reply".to_owned()),
        // At least one byte after the offset.
        1 if len > 8 => ChunkKind::OffsetData,
        2 if len == 12 => ChunkKind::OffsetHole,
        5 if len >= 12 && (len - 4).is_multiple_of(8) && len / 8 <= EXTENTS_MAX => ChunkKind::BlockStatus,
        0x8001 if (6..=6 + MESSAGE_MAX_BYTES).contains(&len) => ChunkKind::Error,
        0x8002 if (14..=14 + MESSAGE_MAX_BYTES).contains(&len) => ChunkKind::ErrorOffset,
        // Unknown errors carry error and message first, like the known ones.
        kind if kind & 0x8000 != 0 && (6..=64 + MESSAGE_MAX_BYTES).contains(&len) => ChunkKind::Error,
        kind => return Err(format!("a chunk of type {kind} with {len} bytes")),
    };
    Ok(ReplyHeader::Chunk { cookie, done: flags & 1 != 0, kind, len })
}

/// The error number at the head of an error chunk's payload.
///
/// # Errors
/// The message does not fit into the chunk, or there is no error in it.
pub(super) fn chunk_error(payload: &[u8]) -> Result<u32, String> {
    let mut cursor = Cursor(payload);
    let error = cursor.u32().ok_or("a cut-off error chunk")?;
    let message = cursor.u16().ok_or("a cut-off error chunk")?;
    cursor.take(usize::from(message)).ok_or("an error chunk whose message is longer than itself")?;
    if error == 0 { Err("an error chunk without an error".to_owned()) } else { Ok(error) }
}

/// The errno that an NBD error number stands for; numbers outside of the protocol's list mean `EINVAL`.
pub(super) fn errno(error: u32) -> i32 {
    match error {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}

/// Which bytes of a read have arrived. A server may send them in any order and in any pieces, but each byte once.
#[derive(Default, Debug)]
pub(super) struct Coverage {
    /// Disjoint, ascending, not touching.
    runs: Vec<Range<usize>>,
}

/// Separate pieces of one read kept track of; honest servers send ascending pieces, which merge into one.
const RUNS_MAX: usize = 4096;

impl Coverage {
    /// Notes an arrival.
    ///
    /// # Errors
    /// Bytes that have arrived before, or too many pieces.
    pub(super) fn add(&mut self, range: Range<usize>) -> Result<(), String> {
        if range.is_empty() {
            return Ok(());
        }
        let at = self.runs.partition_point(|run| run.end <= range.start);
        if self.runs.get(at).is_some_and(|run| run.start < range.end) {
            return Err("the same bytes twice in one reply".to_owned());
        }
        let joins_left = at > 0 && self.runs[at - 1].end == range.start;
        let joins_right = self.runs.get(at).is_some_and(|run| run.start == range.end);
        match (joins_left, joins_right) {
            (true, true) => {
                self.runs[at - 1].end = self.runs[at].end;
                self.runs.remove(at);
            }
            (true, false) => self.runs[at - 1].end = range.end,
            (false, true) => self.runs[at].start = range.start,
            (false, false) if self.runs.len() >= RUNS_MAX => return Err("a reply in too many pieces".to_owned()),
            (false, false) => self.runs.insert(at, range),
        }
        Ok(())
    }

    /// Whether exactly bytes `0..len` have arrived.
    pub(super) fn is_complete(&self, len: usize) -> bool {
        match self.runs.as_slice() {
            [] => len == 0,
            [run] => run.start == 0 && run.end == len,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn coverage_is_complete_only_without_gaps() {
        let mut coverage = Coverage::default();
        assert!(coverage.is_complete(0) && !coverage.is_complete(4));
        coverage.add(4..8).unwrap();
        coverage.add(0..2).unwrap();
        assert!(!coverage.is_complete(8));
        assert!(coverage.add(1..3).is_err() && coverage.add(7..9).is_err() && coverage.add(0..8).is_err());
        coverage.add(2..4).unwrap();
        assert!(coverage.is_complete(8));
    }

    #[test]
    fn coverage_takes_a_bounded_amount_of_memory() {
        let mut coverage = Coverage::default();
        let refused = (0..1_000_000usize).any(|i| coverage.add(i * 2..i * 2 + 1).is_err());
        assert!(refused && coverage.runs.len() <= RUNS_MAX);
    }

    proptest! {
        #[test]
        fn coverage_agrees_with_a_bitmap(pieces in prop::collection::vec((0usize..64, 1usize..16), 0..40)) {
            let (mut coverage, mut bitmap) = (Coverage::default(), [false; 80]);
            for (start, len) in pieces {
                let seen = bitmap[start..start + len].contains(&true);
                prop_assert_eq!(coverage.add(start..start + len).is_err(), seen);
                if !seen {
                    bitmap[start..start + len].fill(true);
                }
                let end = bitmap.iter().position(|b| !b).unwrap();
                let exact = !bitmap[end..].contains(&true);
                for len in 0..=80 {
                    prop_assert_eq!(coverage.is_complete(len), exact && len == end);
                }
            }
        }

        #[test]
        fn no_header_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..40), magic in 0..3) {
            let mut bytes = bytes;
            let magic = [SIMPLE_MAGIC, CHUNK_MAGIC, 7][magic as usize].to_be_bytes();
            bytes.iter_mut().zip(magic).for_each(|(b, m)| *b = m);
            if let Ok(ReplyHeader::Chunk { len, kind, .. }) = reply_header(&bytes)
                && kind != ChunkKind::OffsetData
            {
                let most = if kind == ChunkKind::BlockStatus { 4 + 8 * EXTENTS_MAX } else { 64 + MESSAGE_MAX_BYTES };
                prop_assert!(len <= most);
            }
            let _ = option_reply(&bytes, 7);
            let _ = chunk_error(&bytes);
        }
    }
}
