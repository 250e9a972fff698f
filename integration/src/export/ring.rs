//! The split virtqueue's three areas in guest memory (VIRTIO 1.3, 2.7), and nothing else: every access to them is here,
//! with its size and its memory ordering. One of the export's modules with `unsafe`.
//!
//! ```text
//! descriptors  16 bytes each: addr u64, len u32, flags u16, next u16                     driver writes
//! available    flags u16, idx u16, ring [u16; size], used_event u16                       driver writes
//! used         flags u16, idx u16, ring [{ id u32, len u32 }; size], avail_event u16      device writes
//! ```

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::memory::{GuestMemory, MemoryError};
use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

/// Addresses of the three areas in the front-end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// A ring that cannot be used.
#[derive(Debug, Error)]
pub enum RingAddressError {
    #[error("{area} area of the ring: {source}")]
    Memory { area: &'static str, source: MemoryError },
    #[error("{area} area of the ring at {addr:#x} is not aligned to {align} bytes")]
    Misaligned { area: &'static str, addr: u64, align: usize },
}

/// One descriptor, read once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) const DESCRIPTOR_BYTES: u64 = 16;

/// The three areas, mapped.
#[derive(Debug)]
pub(super) struct Ring {
    /// Keeps the areas mapped.
    memory: Arc<GuestMemory>,
    /// Entries: a power of two.
    size: u16,
    descriptors: NonNull<u8>,
    available: NonNull<u16>,
    used: NonNull<u16>,
}

// SAFETY: the pointers are into mappings that `memory` keeps and that may be used from any thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Finds the areas of a ring of `size` entries, a power of two. Each must lie in one region.
    pub(super) fn new(memory: Arc<GuestMemory>, size: u16, addresses: RingAddresses) -> Result<Self, RingAddressError> {
        debug_assert!(size.is_power_of_two());
        let entries = u64::from(size);
        let area = |area, addr, len, align: usize| {
            let host = memory.contiguous_user(addr, len).map_err(|source| RingAddressError::Memory { area, source })?;
            if host.addr().get().is_multiple_of(align) {
                Ok(host)
            } else {
                Err(RingAddressError::Misaligned { area, addr, align })
            }
        };
        // Sizes with the event fields, which a driver lays out whether or not EVENT_IDX was agreed on.
        let descriptors = area("descriptor", addresses.descriptors, DESCRIPTOR_BYTES * entries, 16)?;
        let available = area("available", addresses.available, 6 + 2 * entries, 2)?.cast();
        let used = area("used", addresses.used, 6 + 8 * entries, 4)?.cast();
        Ok(Self { memory, size, descriptors, available, used })
    }

    #[inline]
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// A 16-bit field of the available area, counted in 16-bit words.
    #[inline]
    fn available_word(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < 3 + usize::from(self.size));
        // SAFETY: inside the area of 3 + size words.
        let word = unsafe { self.available.add(at) };
        // SAFETY: mapped as long as `self`, aligned to 2 (`new`), and only touched atomically by us.
        unsafe { AtomicU16::from_ptr(word.as_ptr()) }
    }

    /// A 16-bit field of the used area, counted in 16-bit words.
    #[inline]
    fn used_word(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at < 3 + 4 * usize::from(self.size));
        // SAFETY: inside the area of 3 + 4 * size words.
        let word = unsafe { self.used.add(at) };
        // SAFETY: mapped as long as `self`, aligned to 4 (`new`), and only touched atomically by us.
        unsafe { AtomicU16::from_ptr(word.as_ptr()) }
    }

    /// How many chains the driver has made available, modulo 2^16. Their entries may be read after this.
    #[inline]
    pub(super) fn available_index(&self) -> u16 {
        u16::from_le(self.available_word(1).load(Ordering::Acquire))
    }

    /// Head of the chain at a position, modulo the size.
    #[inline]
    pub(super) fn available_head(&self, position: u16) -> u16 {
        u16::from_le(self.available_word(2 + usize::from(position & (self.size - 1))).load(Ordering::Relaxed))
    }

    /// The driver asks for no interrupts (without EVENT_IDX).
    #[inline]
    pub(super) fn interrupts_suppressed(&self) -> bool {
        fence(Ordering::SeqCst);
        u16::from_le(self.available_word(0).load(Ordering::Relaxed)) & VRING_AVAIL_F_NO_INTERRUPT as u16 != 0
    }

    /// The used index whose passing the driver wants to hear of (with EVENT_IDX).
    #[inline]
    pub(super) fn used_event(&self) -> u16 {
        // Orders the store of the used index before this load: the driver does the reverse.
        fence(Ordering::SeqCst);
        u16::from_le(self.available_word(2 + usize::from(self.size)).load(Ordering::Relaxed))
    }

    /// How many chains the device has given back, modulo 2^16.
    pub(super) fn used_index(&self) -> u16 {
        u16::from_le(self.used_word(1).load(Ordering::Acquire))
    }

    /// Writes a used element at a position, modulo the size.
    #[inline]
    pub(super) fn set_used_element(&self, position: u16, head: u16, len: u32) {
        let element = 2 + 4 * usize::from(position & (self.size - 1));
        debug_assert!(element + 4 <= 3 + 4 * usize::from(self.size));
        // SAFETY: the element is inside the area.
        let id = unsafe { self.used.add(element).cast::<u32>() };
        // SAFETY: likewise its second half.
        let written = unsafe { id.add(1) };
        // SAFETY: mapped, and aligned to 4: the area is, and elements start at byte 4.
        unsafe { id.as_ptr().write_volatile(u32::from(head).to_le()) };
        // SAFETY: as above.
        unsafe { written.as_ptr().write_volatile(len.to_le()) };
    }

    /// Gives the elements before `index` to the driver.
    #[inline]
    pub(super) fn set_used_index(&self, index: u16) {
        self.used_word(1).store(index.to_le(), Ordering::Release);
    }

    /// Asks the driver for no kicks, or for kicks (without EVENT_IDX).
    #[inline]
    pub(super) fn suppress_kicks(&self, suppress: bool) {
        let flags = if suppress { VRING_USED_F_NO_NOTIFY as u16 } else { 0 };
        self.used_word(0).store(flags.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Asks the driver for a kick when it passes `index` (with EVENT_IDX).
    #[inline]
    pub(super) fn set_available_event(&self, index: u16) {
        self.used_word(2 + 4 * usize::from(self.size)).store(index.to_le(), Ordering::Relaxed);
        // Orders this store before the next load of the available index: the driver does the reverse.
        fence(Ordering::SeqCst);
    }

    /// The ring's descriptor table.
    #[inline]
    pub(super) fn table(&self) -> Table<'_> {
        Table { entries: u32::from(self.size), base: self.descriptors, _memory: &self.memory }
    }

    /// An indirect table of `len` bytes in guest memory; None if it is empty, no multiple of a descriptor, or outside.
    #[inline]
    pub(super) fn indirect_table(&self, addr: u64, len: u32, hint: &mut usize) -> Option<Table<'_>> {
        let bytes = u64::from(len);
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return None;
        }
        let base = self.memory.contiguous(addr, bytes, hint)?;
        Some(Table { entries: len / DESCRIPTOR_BYTES as u32, base, _memory: &self.memory })
    }
}

/// Descriptors in a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table<'a> {
    entries: u32,
    base: NonNull<u8>,
    _memory: &'a Arc<GuestMemory>,
}

impl Table<'_> {
    #[inline]
    pub(super) fn entries(&self) -> u32 {
        self.entries
    }

    /// One descriptor, or None past the end.
    #[inline]
    pub(super) fn get(&self, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.entries {
            return None;
        }
        // SAFETY: inside the table.
        let at = unsafe { self.base.add(usize::from(index) * DESCRIPTOR_BYTES as usize) };
        // Volatile: read once, then checked and used. Drivers align their tables; an indirect one may yet lie anywhere.
        let [addr, rest] = if at.cast::<[u64; 2]>().is_aligned() {
            // SAFETY: mapped as long as the memory that `self` borrows, and aligned.
            unsafe { at.cast::<[u64; 2]>().read_volatile() }
        } else {
            // SAFETY: mapped as long as the memory that `self` borrows; bytes need no alignment.
            let raw = unsafe { at.cast::<[u8; DESCRIPTOR_BYTES as usize]>().read_volatile() };
            let half = |from: usize| u64::from_ne_bytes(std::array::from_fn(|byte| raw[from + byte]));
            [half(0), half(8)]
        };
        let rest = u64::from_le(rest);
        Some(Descriptor {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }
}
