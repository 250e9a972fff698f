//! The RAM tier's memory: one anonymous mapping cut into 64 KiB slots.
//!
//! - [`Arena`]: the mapping; huge pages where the host allows them
//! - [`Pinned`]: keeps a slot's content where it is while somebody reads it
//! - [`ArenaBuf`]: the exclusive right to write some pages of a slot, handed to the kernel as an I/O buffer
//!
//! This is a leaf module: it holds the raw pointers, its users hold tokens. Two rules make that sound:
//! 1. Pages under an [`ArenaBuf`] are claimed in an atomic mask per slot; a second claim of the same page is refused.
//! 2. Bytes are only *read* through [`Pinned::bytes`], and only where the policy core says that the pages are valid,
//!    which pages under a claim never are. A slot with a pin or a claim is never given to another block.
//!
//! Guest writes update valid pages in place ([`Pinned::write`]). All I/O of one storage runs on one thread and neither
//! `bytes` nor `write` is held across a suspension point, so the two cannot overlap. A storage below another one is only
//! read: its valid pages may be read on any thread, and what a new fill may put there are the same bytes.

use crate::types::{BLOCK_BYTES, PAGE_BYTES, PageMask};
use memmap2::{MmapOptions, MmapRaw};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::{fmt, io};

/// How the arena asks for huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// hugetlbfs pages if enough are reserved, else transparent huge pages, else small ones.
    #[default]
    Try,
    /// Small pages only.
    No,
    /// hugetlbfs pages or an error.
    Require,
}

/// What the arena got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageKind {
    HugeTlb,
    Transparent,
    Small,
}

/// So many may hold a slot; who comes then goes past the cache. A guest has at most some thousand requests under way.
const PINS_MAX: u16 = u16::MAX - 256;

/// The RAM tier's memory. Shared by all shards.
pub struct Arena {
    map: MmapRaw,
    slots: u32,
    kind: PageKind,
    claims: Box<[AtomicU16]>,
    pins: Box<[AtomicU16]>,
}

impl Arena {
    /// Maps `slots` × 64 KiB. The memory is reserved here and taken from the host page by page as it is first used.
    ///
    /// # Errors
    /// The mapping fails (address space or overcommit limit), or `HugePages::Require` and the host has too few.
    pub fn new(slots: u32, huge: HugePages) -> io::Result<Arc<Arena>> {
        let len = (slots as usize).max(1).checked_mul(BLOCK_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let two_mib = 2 << 20;
        let mut mapped = None;
        if huge != HugePages::No {
            match MmapOptions::new().len(len.next_multiple_of(two_mib)).huge(Some(21)).map_anon() {
                Ok(map) => mapped = Some((map, PageKind::HugeTlb)),
                Err(error) if huge == HugePages::Require => {
                    let pages = len.div_ceil(two_mib);
                    return Err(io::Error::new(
                        error.kind(),
                        format!(
                            "{pages} huge pages of 2 MiB are not free: {error}; raise vm.nr_hugepages or set cache.huge_pages = \"try\""
                        ),
                    ));
                }
                Err(_) => {}
            }
        }
        let (map, kind) = match mapped {
            Some(done) => done,
            None => {
                let map = MmapOptions::new().len(len).map_anon()?;
                let advised = huge != HugePages::No && map.advise(memmap2::Advice::HugePage).is_ok();
                (map, if advised { PageKind::Transparent } else { PageKind::Small })
            }
        };
        // A core dump must not contain what guests read.
        let _ = map.advise(memmap2::Advice::DontDump);
        Ok(Arc::new(Arena {
            map: MmapRaw::from(map),
            slots,
            kind,
            claims: (0..slots).map(|_| AtomicU16::new(0)).collect(),
            pins: (0..slots).map(|_| AtomicU16::new(0)).collect(),
        }))
    }

    pub fn slots(&self) -> u32 {
        self.slots
    }

    pub fn page_kind(&self) -> PageKind {
        self.kind
    }

    /// Start and length of the whole mapping, for registration with io_uring.
    pub fn raw_parts(&self) -> (*mut u8, usize) {
        (self.map.as_mut_ptr(), self.map.len())
    }

    /// Gives the memory back to the host although the arena lives on: for a successor in another process, which may want as
    /// many huge pages. To be called when all threads that read or fill slots have ended; one that has not is ended by
    /// SIGSEGV.
    ///
    /// # Errors
    /// The kernel keeps the mapping as it is.
    pub fn vacate(&self) -> io::Result<()> {
        let (start, len) = self.raw_parts();
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: replaces exactly this arena's mapping by one that nobody can read or write, and which is unmapped with the
        // arena as the first one would have been; no address becomes another's.
        let mapped = unsafe { libc::mmap(start.cast(), len, libc::PROT_NONE, flags, -1, 0) };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Claims pages `first..first + count` of `slot` for writing.
    ///
    /// `None` if the slot or the pages don't exist or any of the pages is claimed already.
    pub fn claim(self: &Arc<Self>, slot: u32, first: u64, count: u64) -> Option<ArenaBuf> {
        let mask = PageMask::run(first, count);
        if count == 0 || mask.count() != count {
            return None;
        }
        let claims = self.claims.get(slot as usize)?;
        let before = claims.fetch_or(mask.0, Ordering::Acquire);
        if before & mask.0 != 0 {
            // Give back only what this call took.
            claims.fetch_and(!(mask.0 & !before), Ordering::Release);
            return None;
        }
        let offset = slot as usize * BLOCK_BYTES + first as usize * PAGE_BYTES;
        Some(ArenaBuf { arena: Arc::clone(self), slot, mask, offset, len: count as usize * PAGE_BYTES })
    }

    /// Keeps `slot` from being given to another block. The caller must hold the policy core's lock, under which
    /// victims are chosen; `None` if there is no such slot, or [`PINS_MAX`] hold it already.
    pub fn pin(self: &Arc<Self>, slot: u32) -> Option<Pinned> {
        let pins = self.pins.get(slot as usize)?;
        if pins.load(Ordering::Relaxed) >= PINS_MAX {
            return None;
        }
        pins.fetch_add(1, Ordering::Acquire);
        Some(Pinned { arena: Arc::clone(self), slot })
    }

    /// [`Arena::pin`] for a moment in which the core's lock is held: there is one of these at a time, and it is never
    /// refused for the number of others.
    pub fn pin_under_lock(self: &Arc<Self>, slot: u32) -> Option<Pinned> {
        self.pins.get(slot as usize)?.fetch_add(1, Ordering::Acquire);
        Some(Pinned { arena: Arc::clone(self), slot })
    }

    /// Memory that is kept beside the slots.
    pub fn index_bytes(&self) -> usize {
        size_of_val(&*self.pins) + size_of_val(&*self.claims)
    }

    /// Whether anything still reads or fills `slot`.
    pub fn busy(&self, slot: u32) -> bool {
        let at = slot as usize;
        self.pins.get(at).is_some_and(|p| p.load(Ordering::Acquire) != 0)
            || self.claims.get(at).is_some_and(|c| c.load(Ordering::Acquire) != 0)
    }

    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.map.len()), "arena range out of bounds");
        // SAFETY: the range was just checked to lie within the mapping, which lives as long as `self`.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("slots", &self.slots).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// A slot that stays with its block while this lives.
pub struct Pinned {
    arena: Arc<Arena>,
    slot: u32,
}

impl Pinned {
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Bytes `at..at + len` of the slot. Only pages that the policy core called valid may be asked for, and the slice
    /// must be dropped before the task next suspends.
    ///
    /// # Panics
    /// If the range does not lie within the slot.
    pub fn bytes(&self, at: usize, len: usize) -> &[u8] {
        assert!(at.checked_add(len).is_some_and(|end| end <= BLOCK_BYTES), "range beyond the slot");
        let pointer = self.arena.pointer(self.slot as usize * BLOCK_BYTES + at, len);
        // SAFETY: the range lies within the mapping (checked in `pointer`), the pin keeps the slot with its block, and
        // by the module's rules valid pages are written only on this thread and never while this slice lives, or, of a
        // storage that is only read, nowhere.
        unsafe { std::slice::from_raw_parts(pointer, len) }
    }

    /// Replaces bytes `at..at + data.len()` of valid, unclaimed pages: the write-through update of a guest write.
    ///
    /// # Panics
    /// If the range does not lie within the slot.
    pub fn write(&self, at: usize, data: &[u8]) {
        assert!(at.checked_add(data.len()).is_some_and(|end| end <= BLOCK_BYTES), "range beyond the slot");
        let pointer = self.arena.pointer(self.slot as usize * BLOCK_BYTES + at, data.len());
        // SAFETY: the range lies within the mapping; `data` is an ordinary slice outside of the arena or of another
        // slot; no `bytes` slice of this slot is alive on this thread and other threads don't touch this storage.
        unsafe { std::ptr::copy(data.as_ptr(), pointer, data.len()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(pins) = self.arena.pins.get(self.slot as usize) {
            pins.fetch_sub(1, Ordering::Release);
        }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({})", self.slot)
    }
}

/// The exclusive right to write some consecutive pages of a slot. Dropping it gives the right back.
pub struct ArenaBuf {
    arena: Arc<Arena>,
    slot: u32,
    mask: PageMask,
    offset: usize,
    len: usize,
}

impl ArenaBuf {
    /// Address of the first byte; valid for `len()` bytes while this lives.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.arena.pointer(self.offset, self.len)
    }
    pub fn as_ptr(&self) -> *const u8 {
        self.arena.pointer(self.offset, self.len)
    }
    #[expect(clippy::len_without_is_empty, reason = "a claim has at least one page")]
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn slot(&self) -> u32 {
        self.slot
    }
    pub fn mask(&self) -> PageMask {
        self.mask
    }
    /// The claimed bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let (pointer, len) = (self.as_mut_ptr(), self.len);
        // SAFETY: in bounds (checked in `pointer`), and the claim makes this the only access to these pages.
        unsafe { std::slice::from_raw_parts_mut(pointer, len) }
    }
    /// The claimed bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: in bounds (checked in `pointer`), and the claim keeps writers out while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl Drop for ArenaBuf {
    fn drop(&mut self) {
        if let Some(claims) = self.arena.claims.get(self.slot as usize) {
            claims.fetch_and(!self.mask.0, Ordering::Release);
        }
    }
}

impl fmt::Debug for ArenaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArenaBuf(slot {}, {:?})", self.slot, self.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vacated_arena_holds_no_memory() {
        let access = |arena: &Arena| {
            let at = arena.raw_parts().0 as usize;
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let of = |line: &str| {
                let (range, rest) = line.split_once(' ')?;
                let (from, to) = range.split_once('-')?;
                let number = |text| usize::from_str_radix(text, 16).ok();
                (number(from)? <= at && at < number(to)?).then(|| rest[..4].to_owned())
            };
            maps.lines().find_map(of).unwrap()
        };
        let arena = Arena::new(64, HugePages::No).unwrap();
        arena.claim(3, 0, 16).unwrap().as_mut_slice().fill(1);
        assert_eq!(access(&arena), "rw-p");
        arena.vacate().unwrap();
        assert_eq!(access(&arena), "---p");
    }

    #[test]
    fn a_page_is_claimed_once_at_a_time() {
        let arena = Arena::new(2, HugePages::No).unwrap();
        let mut first = arena.claim(1, 2, 4).unwrap();
        assert!(arena.claim(1, 5, 1).is_none());
        assert!(arena.claim(1, 5, 3).is_none());
        assert!(arena.claim(1, 6, 2).is_some(), "a refused claim must not keep what it could have had");
        assert!(arena.claim(0, 5, 1).is_some());
        assert!(arena.claim(2, 0, 1).is_none());
        assert!(arena.claim(1, 10, 7).is_none());
        first.as_mut_slice().fill(7);
        assert!(arena.busy(1));
        drop(first);
        assert!(!arena.busy(1));
        let pin = arena.pin(1).unwrap();
        assert_eq!(pin.bytes(2 * PAGE_BYTES, 4 * PAGE_BYTES), vec![7; 4 * PAGE_BYTES]);
        assert!(arena.busy(1));
    }
}
