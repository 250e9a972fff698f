//! Reads and writes of slots under way. A guard keeps its slot from being used for something else: it must live until
//! the device is done with the I/O, also if nobody waits for the result any more.

use super::format::{data_checksum, slot_offset};
use super::index::{Key, ReadTicket};
use super::tier::Shared;
use crate::types::{BLOCK_BYTES, BlockIndex, PageMask};
use std::sync::Arc;

/// A read of a slot under way, see [`super::SsdTier::begin_read`].
///
/// Dropping it ends the read without a verdict on the slot.
#[derive(Debug)]
pub struct SlotRead {
    pub(super) shared: Arc<Shared>,
    pub(super) ticket: ReadTicket,
    pub(super) ended: bool,
}

impl SlotRead {
    pub fn slot(&self) -> u32 {
        self.ticket.slot
    }
    /// Counts the slot's uses.
    pub fn generation(&self) -> u32 {
        self.ticket.generation
    }
    pub fn block(&self) -> BlockIndex {
        BlockIndex(self.ticket.key.block())
    }
    /// Byte offset of the slot's 64 KiB in the slab; page `p` is at `offset() + p * 4096`.
    pub fn offset(&self) -> u64 {
        slot_offset(self.ticket.slot)
    }
    /// Pages that could be served when the read began; [`super::SsdTier::end_read`] tells which still can be.
    pub fn mask(&self) -> PageMask {
        self.ticket.valid
    }
    /// Pages that the checksum covers, a superset of [`SlotRead::mask`]: all of them have to be read to verify any.
    pub fn written_mask(&self) -> PageMask {
        self.ticket.written
    }
    pub fn checksum(&self) -> u32 {
        self.ticket.checksum
    }
    /// Whether the pages of [`SlotRead::written_mask`] are what was written. `block_bytes`: 64 KiB, page `p` at
    /// `p * 4096`; other lengths never match.
    pub fn verify(&self, block_bytes: &[u8]) -> bool {
        block_bytes.len() == BLOCK_BYTES
            && checksum(self.ticket.key, self.ticket.written, block_bytes) == self.checksum()
    }
}

impl Drop for SlotRead {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.abandon_read(&self.ticket);
        }
    }
}

/// A write of a slot under way, see [`super::SsdTier::begin_insert`].
///
/// Dropping it cancels the insert and frees the slot.
#[derive(Debug)]
pub struct SlotWrite {
    pub(super) shared: Arc<Shared>,
    pub(super) slot: u32,
    pub(super) key: Key,
    pub(super) mask: PageMask,
    pub(super) ended: bool,
}

impl SlotWrite {
    pub fn slot(&self) -> u32 {
        self.slot
    }
    pub fn block(&self) -> BlockIndex {
        BlockIndex(self.key.block())
    }
    /// Byte offset of the slot's 64 KiB in the slab; page `p` goes to `offset() + p * 4096`.
    pub fn offset(&self) -> u64 {
        slot_offset(self.slot)
    }
    /// Pages to write. What lies between them in the slot may be overwritten.
    pub fn mask(&self) -> PageMask {
        self.mask
    }
    /// The checksum for [`super::SsdTier::finish_insert`]: CRC-32C of (storage index, mask, block) and the pages of
    /// [`SlotWrite::mask`] in ascending order, so that the right bytes in the wrong slot do not pass.
    /// `block_bytes`: 64 KiB, page `p` at `p * 4096`.
    pub fn checksum(&self, block_bytes: &[u8]) -> u32 {
        checksum(self.key, self.mask, block_bytes)
    }
}

impl Drop for SlotWrite {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.cancel_insert(self.slot);
        }
    }
}

fn checksum(key: Key, mask: PageMask, block_bytes: &[u8]) -> u32 {
    data_checksum(key.storage(), key.block(), mask, block_bytes)
}
