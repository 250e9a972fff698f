//! What both versions of the format share: variable-length numbers, and the ends that a place refers to.

use super::{PAGE_MAX, SegmentError};

/// Accesses whose end the place may refer to: 16 numbers fill four bits.
const ENDS: usize = 16;

/// Ends of the last accesses that began elsewhere, most recent first: what a place refers to. Reader and writer keep the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Ends([u64; ENDS]);

impl Ends {
    /// The end nearest to `page`, the more recent of equals, and the distance from it.
    pub(super) fn nearest(&self, page: u64) -> (usize, i64) {
        let mut best = (0, i64::MAX);
        for (slot, end) in self.0.iter().enumerate() {
            let distance = page.wrapping_sub(*end) as i64;
            if distance.unsigned_abs() < best.1.unsigned_abs() {
                best = (slot, distance);
            }
        }
        best
    }

    pub(super) fn at(&self, slot: usize, distance: i64) -> Option<u64> {
        self.0[slot].checked_add_signed(distance).filter(|page| *page < PAGE_MAX)
    }

    /// Moves `end` to the front, in place of the one it continues (or lies near to), else of the oldest.
    pub(super) fn replace(&mut self, slot: usize, distance: i64, end: u64) {
        // 64 pages, a quarter of a mebibyte: within it, an access continues its stream rather than begins one.
        let last = if distance.unsigned_abs() <= 64 { slot } else { ENDS - 1 };
        self.0.copy_within(0..last, 1);
        self.0[0] = end;
    }
}

pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

pub(crate) fn unzigzag(value: u64) -> i64 {
    ((value >> 1) as i64) ^ -((value & 1) as i64)
}

/// Appends a number as LEB128.
pub(crate) fn put(column: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        column.push(value as u8 | 0x80);
        value >>= 7;
    }
    column.push(value as u8);
}

/// Takes a number off the front of what is left. Errors: `Damaged`.
pub(crate) fn get(column: &[u8], at: &mut usize) -> Result<u64, SegmentError> {
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
