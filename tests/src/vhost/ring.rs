//! A split virtqueue from the driver's side, in memory shared with the server: a request is three descriptors (header, data,
//! status) with a buffer of its own, and completes in any order.

use std::sync::atomic::{Ordering, fence};

use anyhow::{Result, bail};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use super::model::SECTOR;

/// Entries of a ring: room for three descriptors of each request.
pub(super) const RING: u16 = 128;
/// Requests under way at most.
pub(super) const DEPTH_MAX: u16 = RING / 3;
/// Most bytes of data of a request.
pub(super) const DATA_BYTES: usize = 64 * SECTOR;

const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const BUFFERS: usize = 0x3000;
/// Header, status and data of a request.
const SLOT_BYTES: usize = 0x1000 + DATA_BYTES;
const STATUS: usize = 16;
const DATA: usize = 0x1000;
/// Bytes of a ring with its buffers.
pub(super) const RING_BYTES: usize = BUFFERS + DEPTH_MAX as usize * SLOT_BYTES;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// No status has this value: it is there until the server writes one.
const UNANSWERED: u8 = 0xff;

/// What a request does (VIRTIO 1.3, 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
}

/// One ring of the device.
#[derive(Debug)]
pub(super) struct Ring {
    /// Byte offset in the shared memory.
    at: usize,
    /// Guest address of the shared memory.
    guest: u64,
    available: u16,
    used: u16,
    /// By slot: under way.
    busy: Vec<bool>,
}

impl Ring {
    pub(super) fn new(index: u16, guest: u64) -> Self {
        let busy = vec![false; usize::from(DEPTH_MAX)];
        Self { at: usize::from(index) * RING_BYTES, guest, available: 0, used: 0, busy }
    }

    /// Offsets of descriptors, used and available area.
    pub(super) fn areas(&self) -> [usize; 3] {
        [self.at, self.at + USED, self.at + AVAILABLE]
    }

    /// The used index as the driver last saw it.
    pub(super) fn used(&self) -> u16 {
        self.used
    }

    fn slot(&self, slot: u16) -> usize {
        self.at + BUFFERS + usize::from(slot) * SLOT_BYTES
    }

    fn store(memory: &MmapRegion, at: usize, value: u16) -> Result<()> {
        Ok(memory.as_volatile_slice().store(value.to_le(), at, Ordering::Release)?)
    }

    fn load(memory: &MmapRegion, at: usize) -> Result<u16> {
        Ok(u16::from_le(memory.as_volatile_slice().load(at, Ordering::Acquire)?))
    }

    /// Makes a request available and returns its slot and whether the server wants a kick for it. `data` is what a write
    /// writes; a read's length is given by it too.
    pub(super) fn submit(
        &mut self,
        memory: &MmapRegion,
        kind: Kind,
        sector: usize,
        data: &[u8],
    ) -> Result<Option<(u16, bool)>> {
        let Some(slot) = self.busy.iter().position(|busy| !busy) else { return Ok(None) };
        self.busy[slot] = true;
        let slot = slot as u16;
        let (buffer, slice) = (self.slot(slot), memory.as_volatile_slice());
        let header = [&(kind as u32).to_le_bytes()[..], &[0; 4], &(sector as u64).to_le_bytes()].concat();
        slice.write_slice(&header, buffer)?;
        slice.write_slice(&[UNANSWERED], buffer + STATUS)?;
        if kind == Kind::Write {
            slice.write_slice(data, buffer + DATA)?;
        }
        let head = slot * 3;
        let device_writes = if kind == Kind::Read { WRITE } else { 0 };
        let mut parts = vec![(buffer, 16, NEXT)];
        if kind != Kind::Flush {
            parts.push((buffer + DATA, data.len(), NEXT | device_writes));
        }
        parts.push((buffer + STATUS, 1, WRITE));
        for (index, (at, len, flags)) in (head..).zip(parts) {
            let address = self.guest + at as u64;
            let descriptor = [
                &address.to_le_bytes()[..],
                &(len as u32).to_le_bytes(),
                &flags.to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ]
            .concat();
            slice.write_slice(&descriptor, self.at + 16 * usize::from(index))?;
        }
        let place = self.at + AVAILABLE + 4 + 2 * usize::from(self.available % RING);
        Self::store(memory, place, head)?;
        let before = self.available;
        self.available = before.wrapping_add(1);
        Self::store(memory, self.at + AVAILABLE + 2, self.available)?;
        // A driver kicks only where the server asked for it (VIRTIO 1.3, 2.7.10).
        fence(Ordering::SeqCst);
        let wanted = Self::load(memory, self.at + USED + 4 + 8 * usize::from(RING))?;
        Ok(Some((slot, self.available.wrapping_sub(wanted).wrapping_sub(1) < self.available.wrapping_sub(before))))
    }

    /// The next answer: slot and status. Says nothing of the data.
    pub(super) fn answered(&mut self, memory: &MmapRegion) -> Result<Option<(u16, u8)>> {
        if Self::load(memory, self.at + USED + 2)? == self.used {
            return Ok(None);
        }
        let mut element = [0; 8];
        let slice = memory.as_volatile_slice();
        slice.read_slice(&mut element, self.at + USED + 4 + 8 * usize::from(self.used % RING))?;
        self.used = self.used.wrapping_add(1);
        let head = u32::from_le_bytes([element[0], element[1], element[2], element[3]]);
        let slot = head / 3;
        match self.busy.get_mut(slot as usize).filter(|busy| head.is_multiple_of(3) && **busy) {
            Some(busy) => *busy = false,
            None => bail!("descriptor {head} was answered and is not under way: answered twice, or never asked"),
        }
        let mut status = [0];
        slice.read_slice(&mut status, self.slot(slot as u16) + STATUS)?;
        if status == [UNANSWERED] {
            bail!("descriptor {head} was given back without a status");
        }
        Ok(Some((slot as u16, status[0])))
    }

    /// Reads a slot's data.
    pub(super) fn data(&self, memory: &MmapRegion, slot: u16, data: &mut [u8]) -> Result<()> {
        Ok(memory.as_volatile_slice().read_slice(data, self.slot(slot) + DATA)?)
    }

    /// Asks for an event at the next answer. True if one has come already.
    pub(super) fn ask_for_event(&self, memory: &MmapRegion) -> Result<bool> {
        Self::store(memory, self.at + AVAILABLE + 4 + 2 * usize::from(RING), self.used)?;
        fence(Ordering::SeqCst);
        Ok(Self::load(memory, self.at + USED + 2)? != self.used)
    }
}
