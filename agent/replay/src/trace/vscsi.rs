//! Binary traces of VMware's vscsiStats, as in the CloudPhysics traces. Two layouts, either byte order:
//!
//! ```text
//! version 1, 32 bytes: sn u32, len u32, nSG u32, cmd u16, ver u16, lbn u64, ts u64
//! version 2, 40 bytes: cmd u16, ver u16, sn u32, len u32, nSG u32, lbn u64, ts u64, rt u64
//! ```
//!
//! `len` is in bytes, `lbn` in sectors of 512 bytes, `ts` in microseconds, `cmd` the SCSI operation code; the version is
//! the upper byte of `ver`.

use super::{Expected, Raw};
use prestage_predictor::Op;
use std::io::{self, Read};

/// Bytes of the longest record.
const MAX_RECORD: usize = 40;
const SECTOR: u64 = 512;
/// Records that must agree on the version.
const LOOK_AT: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vscsi {
    version: u8,
    big_endian: bool,
}

impl Vscsi {
    /// The layout of a file that begins with `head`.
    pub(super) fn sniff(head: &[u8]) -> Option<Self> {
        let layouts = [(2, false), (1, false), (2, true), (1, true)];
        layouts.into_iter().map(|(version, big_endian)| Self { version, big_endian }).find(|layout| {
            let mut records = head.chunks_exact(layout.record_bytes()).take(LOOK_AT).peekable();
            records.peek().is_some()
                && records.all(|record| layout.u16(record, layout.version_at()) >> 8 == u16::from(layout.version))
        })
    }

    fn record_bytes(self) -> usize {
        if self.version == 1 { 32 } else { 40 }
    }

    fn version_at(self) -> usize {
        if self.version == 1 { 14 } else { 2 }
    }

    /// The next record; `None` at the end.
    pub(super) fn read(self, source: &mut impl Read) -> io::Result<Option<Result<Option<Raw>, Expected>>> {
        let mut record = [0; MAX_RECORD];
        let record = &mut record[..self.record_bytes()];
        Ok(match super::read_up_to(source, record)? {
            0 => None,
            got if got < record.len() => {
                Some(Err(format!("a record of {} bytes; the file ends after {got}", record.len())))
            }
            _ => Some(self.parse(record)),
        })
    }

    fn parse(self, record: &[u8]) -> Result<Option<Raw>, Expected> {
        if self.u16(record, self.version_at()) >> 8 != u16::from(self.version) {
            return Err(format!("a record of version {}", self.version));
        }
        let (cmd_at, len_at) = if self.version == 1 { (12, 4) } else { (0, 8) };
        // SBC-4: READ and WRITE with 6, 10, 12 and 16 bytes, WRITE AND VERIFY.
        let op = match self.u16(record, cmd_at) & 0xff {
            0x08 | 0x28 | 0xa8 | 0x88 => Op::Read,
            0x0a | 0x2a | 0xaa | 0x8a | 0x2e | 0xae | 0x8e => Op::Write,
            _ => return Ok(None),
        };
        let len = u64::from(u32::from_le_bytes(self.bytes(record, len_at)));
        let lbn = u64::from_le_bytes(self.bytes(record, 16));
        let at_us = u64::from_le_bytes(self.bytes(record, 24));
        Ok(Some(Raw { at_us, op, offset: lbn.saturating_mul(SECTOR), len }))
    }

    fn u16(self, record: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(record, at))
    }

    /// Bytes `at .. at + N` in little-endian order; zeroes beyond the record.
    fn bytes<const N: usize>(self, record: &[u8], at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(field) = record.get(at..at + N) {
            bytes.copy_from_slice(field);
        }
        if self.big_endian {
            bytes.reverse();
        }
        bytes
    }
}
