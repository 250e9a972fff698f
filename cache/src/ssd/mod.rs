//! The SSD tier: format and index (signatures; bodies follow).
#![allow(unused_variables, clippy::todo)]
use crate::types::{BlockIndex, PageMask};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What tells whether a store changed behind the tier's back. All zero where a field is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stamp {
    pub size_bytes: u64,
    pub mtime_ns: i64,
    pub ctime_ns: i64,
    pub inode: u64,
    pub device: u64,
}

/// A storage registered with the tier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SsdStorage {
    index: u16,
    incarnation: u32,
}

/// Monotonic time since some fixed point.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

#[derive(Clone)]
pub struct SsdOptions {
    pub preallocate: bool,
    pub direct: bool,
    pub clock: Clock,
}
impl std::fmt::Debug for SsdOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SsdOptions")
    }
}
impl Default for SsdOptions {
    fn default() -> Self {
        todo!()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    Created,
    Clean,
    Unclean,
    Damaged,
}
#[derive(Clone, Debug)]
pub struct OpenReport {
    pub found: Found,
    pub slots: u64,
    pub kept_slots: u64,
    pub kept_pages: u64,
    pub damaged_records: u64,
    pub dropped_by_size: u64,
    pub resized_from_slots: Option<u64>,
    pub block_device: bool,
    pub direct: bool,
    pub preallocated: bool,
}

#[derive(thiserror::Error, Debug)]
pub enum SsdError {
    #[error("{what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("no space")]
    NoSpace { path: PathBuf, needed_bytes: u64, free_bytes: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Good,
    BadChecksum,
    IoError,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SsdState {
    Ok,
    Degraded { reason: String, since: Duration, retry_at: Duration },
    Closed,
}

#[derive(Clone, Debug)]
pub struct SsdStats {
    pub slots: u64,
    pub used_slots: u64,
    pub valid_pages: u64,
    pub inserts: u64,
    pub evictions: u64,
    pub bad_checksums: u64,
    pub io_errors: u64,
    pub retired_slots: u64,
    pub dropped_changed_store: u64,
    pub index_bytes: u64,
    pub state: SsdState,
}

/// A read of a slot under way; keeps the slot from being reused until ended or dropped.
#[derive(Debug)]
pub struct SlotRead(());
impl SlotRead {
    pub fn slot(&self) -> u32 {
        todo!()
    }
    pub fn generation(&self) -> u32 {
        todo!()
    }
    /// Byte offset of the slot's 64 KiB in the file; page `p` is at `offset + p * 4096`.
    pub fn offset(&self) -> u64 {
        todo!()
    }
    /// Pages that may be served.
    pub fn mask(&self) -> PageMask {
        todo!()
    }
    /// Pages the checksum covers: all of them must have been read to verify.
    pub fn written_mask(&self) -> PageMask {
        todo!()
    }
    pub fn checksum(&self) -> u32 {
        todo!()
    }
    /// `block_bytes`: 64 KiB, page `p` at `p * 4096`.
    pub fn verify(&self, block_bytes: &[u8]) -> bool {
        todo!()
    }
}

/// A write of a slot under way; keep it until the I/O has ended.
#[derive(Debug)]
pub struct SlotWrite(());
impl SlotWrite {
    pub fn slot(&self) -> u32 {
        todo!()
    }
    pub fn offset(&self) -> u64 {
        todo!()
    }
    pub fn mask(&self) -> PageMask {
        todo!()
    }
    /// To be passed to `finish_insert`. `block_bytes`: 64 KiB, page `p` at `p * 4096`.
    pub fn checksum(&self, block_bytes: &[u8]) -> u32 {
        todo!()
    }
}

#[derive(Debug)]
pub struct SsdTier(());
impl SsdTier {
    pub fn open(path: &Path, size_bytes: u64) -> Result<(SsdTier, OpenReport), SsdError> {
        todo!()
    }
    pub fn open_with(path: &Path, size_bytes: u64, options: SsdOptions) -> Result<(SsdTier, OpenReport), SsdError> {
        todo!()
    }
    pub fn data_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
    pub fn storage(&self, identity: &str, stamp: Option<Stamp>) -> Result<SsdStorage, SsdError> {
        todo!()
    }
    /// The counterpart of `storage`: its last user is gone; `stamp` as of now.
    pub fn release_storage(&self, s: SsdStorage, stamp: Option<Stamp>) {
        todo!()
    }
    pub fn set_stamp(&self, s: SsdStorage, stamp: Option<Stamp>) {
        todo!()
    }
    pub fn lookup(&self, s: SsdStorage, block: BlockIndex) -> PageMask {
        todo!()
    }
    pub fn begin_read(&self, s: SsdStorage, block: BlockIndex) -> Option<SlotRead> {
        todo!()
    }
    /// Pages of the read that are still valid now (none unless `Good`).
    pub fn end_read(&self, read: SlotRead, outcome: Outcome) -> PageMask {
        todo!()
    }
    pub fn begin_insert(&self, s: SsdStorage, block: BlockIndex, mask: PageMask) -> Option<SlotWrite> {
        todo!()
    }
    pub fn finish_insert(&self, write: SlotWrite, checksum: u32, ok: bool) -> bool {
        todo!()
    }
    pub fn invalidate(&self, s: SsdStorage, first_page: u64, pages: u64) {
        todo!()
    }
    pub fn note_io_error(&self, what: &str) {
        todo!()
    }
    pub fn drop_storage(&self, s: SsdStorage) {
        todo!()
    }
    pub fn drop_all(&self) {
        todo!()
    }
    pub fn close(&self) -> Result<(), SsdError> {
        todo!()
    }
    pub fn stats(&self) -> SsdStats {
        todo!()
    }
}
