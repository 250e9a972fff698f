//! The slots' state in memory: 24 bytes a slot, allocated only up to the highest slot ever used, and never moved.

use crate::types::PageMask;

/// No slot.
pub(super) const NO_SLOT: u32 = u32::MAX;

/// Growth is by whole segments: a slab that fills up never copies hundreds of megabytes under the lock.
const SEGMENT_SLOTS: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SlotState {
    /// On the free list.
    Free,
    /// Being written; not in the index.
    Pending,
    /// In the index.
    Live,
    /// Out of the index while a read of it is still under way; freed with the last of them.
    Leaving,
    /// Failed an I/O: not used again until the slab is opened the next time.
    Retired,
    /// Beyond the end of a slab that is about to shrink: neither in use nor free.
    Gone,
}

/// Was read since the clock's hand passed.
pub(super) const REFERENCED: u8 = 1;
/// A pending write whose pages were invalidated meanwhile.
pub(super) const ABORTED: u8 = 2;
/// Failed an I/O: retire it once it is free.
pub(super) const FAILED: u8 = 4;
/// Known from a crash, and not read since: its data may have been overwritten after its record was written.
pub(super) const RECOVERED: u8 = 8;

#[derive(Debug)]
pub(super) struct Slot {
    /// Storage index and block, see [`super::index::Key`]; on the free list, the next free slot.
    pub(super) key: u64,
    pub(super) checksum: u32,
    /// Counts the slot's uses.
    pub(super) generation: u32,
    /// What the checksum covers.
    pub(super) written: PageMask,
    /// What may be served: what was written and not invalidated since.
    pub(super) valid: PageMask,
    pub(super) readers: u16,
    pub(super) state: SlotState,
    pub(super) flags: u8,
}

const _: () = assert!(size_of::<Slot>() == 24, "the index's size is promised");

impl Slot {
    pub(super) fn free() -> Slot {
        Slot {
            key: u64::from(NO_SLOT),
            checksum: 0,
            generation: 0,
            written: PageMask::NONE,
            valid: PageMask::NONE,
            readers: 0,
            state: SlotState::Free,
            flags: 0,
        }
    }

    pub(super) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// What has become of slots beyond the end of a slab that is about to shrink.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Beyond {
    /// Still read or written.
    pub(super) held: u32,
    pub(super) retired: u32,
}

/// A vector of slots that grows without moving them.
#[derive(Debug)]
pub(super) struct Slots {
    segments: Vec<Vec<Slot>>,
    len: u32,
    /// It never grows beyond this.
    limit: u32,
}

impl Slots {
    pub(super) fn new(limit: u32) -> Slots {
        Slots { segments: Vec::new(), len: 0, limit }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn limit(&self) -> u32 {
        self.limit
    }

    /// From now on it grows up to this. Slots beyond stay until [`Slots::truncate`].
    pub(super) fn set_limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// Forgets slots beyond the limit.
    pub(super) fn truncate(&mut self) {
        if self.len <= self.limit {
            return;
        }
        self.len = self.limit;
        self.segments.truncate((self.len as usize).div_ceil(SEGMENT_SLOTS));
        let within = self.len as usize % SEGMENT_SLOTS;
        if let Some(last) = self.segments.last_mut().filter(|_| within > 0) {
            last.truncate(within);
        }
        self.segments.shrink_to_fit();
    }

    /// Adds a slot and returns its number, unless the slab has no more.
    pub(super) fn push(&mut self, slot: Slot) -> Option<u32> {
        if self.len >= self.limit {
            return None;
        }
        let number = self.len;
        if (number as usize).is_multiple_of(SEGMENT_SLOTS) {
            let size = SEGMENT_SLOTS.min((self.limit - number) as usize);
            self.segments.push(Vec::with_capacity(size));
        }
        self.segments[number as usize / SEGMENT_SLOTS].push(slot);
        self.len += 1;
        Some(number)
    }

    pub(super) fn get(&self, slot: u32) -> &Slot {
        &self.segments[slot as usize / SEGMENT_SLOTS][slot as usize % SEGMENT_SLOTS]
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> &mut Slot {
        &mut self.segments[slot as usize / SEGMENT_SLOTS][slot as usize % SEGMENT_SLOTS]
    }

    pub(super) fn bytes(&self) -> u64 {
        let slots: usize = self.segments.iter().map(Vec::capacity).sum();
        (slots * size_of::<Slot>() + self.segments.capacity() * size_of::<Vec<Slot>>()) as u64
    }
}
