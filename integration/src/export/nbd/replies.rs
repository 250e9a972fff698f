//! Replies as bytes.

use super::handshake::Agreement;
use super::wire::{ALLOCATION_ID, CHUNK_MAGIC, NbdError, Put, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, chunk};

/// Part of an export and whether the store has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Not 0.
    pub len_bytes: u32,
    /// The store keeps no space for it.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

/// Writes replies of the kind that was agreed on.
#[derive(Clone, Copy, Debug)]
pub struct Replies {
    structured: bool,
}

impl Replies {
    pub fn new(agreement: &Agreement) -> Replies {
        Replies { structured: agreement.structured }
    }

    /// The head of a read's only piece. The caller appends the `len_bytes` of data, all of which it has: this promises
    /// success.
    pub fn data(self, out: &mut Vec<u8>, cookie: u64, offset_bytes: u64, len_bytes: u32) {
        if !self.structured {
            simple(out, cookie, 0);
        } else if len_bytes == 0 {
            // A piece of data has at least one byte.
            head(out, chunk::NONE, cookie, 0);
        } else {
            // A payload has at most 32 MiB.
            head(out, chunk::OFFSET_DATA, cookie, len_bytes.saturating_add(8));
            out.put_u64(offset_bytes);
        }
    }

    /// The success of anything but a read or a block status.
    pub fn done(self, out: &mut Vec<u8>, cookie: u64) {
        simple(out, cookie, 0);
    }

    /// A failure; `why` reaches clients that take structured replies.
    pub fn error(self, out: &mut Vec<u8>, cookie: u64, error: NbdError, why: &str) {
        if !self.structured {
            return simple(out, cookie, error as u32);
        }
        let mut end = why.len().min(1024);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        let why = &why.as_bytes()[..end];
        head(out, chunk::ERROR, cookie, 6 + why.len() as u32);
        out.put_u32(error as u32);
        out.put_u16(why.len() as u16);
        out.extend_from_slice(why);
    }

    /// What `base:allocation` says, beginning at the request's offset. At least one extent.
    pub fn block_status(self, out: &mut Vec<u8>, cookie: u64, extents: &[Extent]) {
        head(out, chunk::BLOCK_STATUS, cookie, 4 + 8 * extents.len() as u32);
        out.put_u32(ALLOCATION_ID);
        for extent in extents {
            let hole = if extent.hole { STATE_HOLE } else { 0 };
            let zero = if extent.zero { STATE_ZERO } else { 0 };
            out.put_u32(extent.len_bytes);
            out.put_u32(hole | zero);
        }
    }
}

fn simple(out: &mut Vec<u8>, cookie: u64, error: u32) {
    out.put_u32(SIMPLE_REPLY_MAGIC);
    out.put_u32(error);
    out.put_u64(cookie);
}

/// The head of a reply that has one chunk.
fn head(out: &mut Vec<u8>, kind: u16, cookie: u64, len: u32) {
    out.put_u32(CHUNK_MAGIC);
    out.put_u16(chunk::DONE);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(len);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structured_errors_carry_their_reason_cut_at_a_character() {
        let mut out = Vec::new();
        let why = format!("{}ö", "x".repeat(1023));
        Replies { structured: true }.error(&mut out, 7, NbdError::Io, &why);
        assert_eq!(out.len(), 20 + 6 + 1023, "`ö` has two bytes, of which one would fit");
        assert_eq!(out[16..20], (6u32 + 1023).to_be_bytes());
        assert_eq!(out[20..24], 5u32.to_be_bytes());
        assert_eq!(out[24..26], 1023u16.to_be_bytes());
    }

    #[test]
    fn a_read_of_nothing_is_answered_without_data() {
        let mut out = Vec::new();
        Replies { structured: true }.data(&mut out, 7, 4096, 0);
        assert_eq!(out.len(), 20);
        assert_eq!((&out[4..6], &out[6..8], &out[16..20]), (&[0, 1][..], &[0, 0][..], &[0, 0, 0, 0][..]));
        out.clear();
        Replies { structured: false }.data(&mut out, 7, 4096, 0);
        assert_eq!(out.len(), 16);
    }
}
