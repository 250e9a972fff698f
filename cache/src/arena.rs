//! The RAM tier's memory: a range of addresses cut into 64 KiB slots, of which the first so many have memory.
//!
//! - [`Arena`]: the slots; huge pages where the host allows them; grows and shrinks in place
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
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::{fmt, io, ptr};

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

/// Memory comes and goes in pieces of this size, so that huge pages fit.
const PIECE: usize = 2 << 20;

/// The RAM tier's memory. Shared by all shards.
pub struct Arena {
    range: Range,
    /// Slots with memory. A claim or a pin is taken first and looks at this then; who takes memory away lowers this first and
    /// looks at claims and pins then: one of the two sees the other.
    slots: AtomicU32,
    /// Bytes of the range with memory: whole pieces. Locked by who changes it.
    mapped: Mutex<usize>,
    kind: PageKind,
    huge: HugePages,
    claims: Box<[AtomicU16]>,
    pins: Box<[AtomicU16]>,
}

impl Arena {
    /// Maps `slots` × 64 KiB. The memory is reserved here and taken from the host page by page as it is first used. Addresses
    /// are set aside for as many slots as the host has memory for, so that the arena can grow.
    ///
    /// # Errors
    /// The mapping fails (address space or overcommit limit), or `HugePages::Require` and the host has too few.
    pub fn new(slots: u32, huge: HugePages) -> io::Result<Arc<Arena>> {
        let host = u32::try_from(host_bytes() / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
        Arena::with_room(slots, slots.max(host), huge)
    }

    /// [`Arena::new`] that may grow to `room` slots.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub fn with_room(slots: u32, room: u32, huge: HugePages) -> io::Result<Arc<Arena>> {
        let room = room.max(slots).max(1);
        let range = Range::set_aside(mapped_for(room).ok_or(io::ErrorKind::InvalidInput)?)?;
        let len = mapped_for(slots.max(1)).ok_or(io::ErrorKind::InvalidInput)?;
        let kind = range.give(0, len, huge)?;
        Ok(Arc::new(Arena {
            range,
            slots: AtomicU32::new(slots),
            mapped: Mutex::new(len),
            kind,
            huge,
            claims: zeroes(room),
            pins: zeroes(room),
        }))
    }

    /// Slots with memory.
    pub fn slots(&self) -> u32 {
        self.slots.load(Ordering::Relaxed)
    }

    /// Slots that there are addresses for.
    pub fn room(&self) -> u32 {
        self.pins.len() as u32
    }

    /// Of the memory there was from the start.
    pub fn page_kind(&self) -> PageKind {
        self.kind
    }

    /// Start and length of the part that has memory, for registration with io_uring.
    pub fn raw_parts(&self) -> (*mut u8, usize) {
        (self.range.start(), *self.mapped.lock())
    }

    /// Where the first slot begins.
    pub fn start(&self) -> *mut u8 {
        self.range.start()
    }

    /// Gives memory to slots below `slots`. Those that had some keep it, content and all.
    ///
    /// # Errors
    /// `slots` is beyond [`Arena::room`], or the host gives no more memory. Nothing has changed then.
    pub fn grow(&self, slots: u32) -> io::Result<()> {
        let mut mapped = self.mapped.lock();
        let len = mapped_for(slots).filter(|_| slots <= self.room()).ok_or(io::ErrorKind::OutOfMemory)?;
        if len > *mapped {
            let kind = self.range.give(*mapped, len, self.huge)?;
            if kind != self.kind {
                tracing::info!(pages = ?kind, "RAM tier: what was added has pages of another kind");
            }
            *mapped = len;
        }
        self.slots.fetch_max(slots, Ordering::SeqCst);
        Ok(())
    }

    /// Gives the memory of the slots from `slots` on back to the host. No shard may have it registered any more
    /// ([`crate::engine::Shard::unregister_arena`]): the kernel would keep the pages, and write to them later on.
    ///
    /// # Errors
    /// `WouldBlock`: one of them is being read or filled; or the kernel keeps the mapping. Nothing has changed then.
    pub fn shrink(&self, slots: u32) -> io::Result<()> {
        let mut mapped = self.mapped.lock();
        let before = self.slots.swap(slots, Ordering::SeqCst);
        if (slots..before).any(|slot| self.busy(slot)) {
            self.slots.store(before, Ordering::SeqCst);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = mapped_for(slots).unwrap_or(*mapped);
        if len < *mapped {
            if let Err(error) = self.range.take(len, *mapped) {
                self.slots.store(before, Ordering::SeqCst);
                return Err(error);
            }
            *mapped = len;
        }
        Ok(())
    }

    /// Gives the memory back to the host although the arena lives on: for a successor in another process, which may want as
    /// many huge pages. To be called when all threads that read or fill slots have ended; one that has not is ended by
    /// SIGSEGV.
    ///
    /// # Errors
    /// The kernel keeps the mapping as it is.
    pub fn vacate(&self) -> io::Result<()> {
        let mapped = self.mapped.lock();
        // Of a tier that is out of service there is nothing, which is no range to the kernel.
        match *mapped {
            0 => Ok(()),
            all => self.range.take(0, all),
        }
    }

    /// Copies pages of a slot to the same places of another one that nothing holds. False if something does.
    pub fn copy(self: &Arc<Self>, from: u32, to: u32, pages: PageMask) -> bool {
        let Some(pinned) = self.pin_under_lock(from) else { return false };
        pages.runs().all(|(first, count)| {
            let Some(mut claim) = self.claim(to, first, count) else { return false };
            let (at, len) = (first as usize * PAGE_BYTES, count as usize * PAGE_BYTES);
            claim.as_mut_slice().copy_from_slice(pinned.bytes(at, len));
            true
        })
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
        let before = claims.fetch_or(mask.0, Ordering::SeqCst);
        if before & mask.0 != 0 || slot >= self.slots.load(Ordering::SeqCst) {
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
        pins.fetch_add(1, Ordering::SeqCst);
        self.pinned(slot)
    }

    /// Of a pin that is counted already.
    fn pinned(self: &Arc<Self>, slot: u32) -> Option<Pinned> {
        let pinned = Pinned { arena: Arc::clone(self), slot };
        (slot < self.slots.load(Ordering::SeqCst)).then_some(pinned)
    }

    /// [`Arena::pin`] for a moment in which the core's lock is held: there is one of these at a time, and it is never
    /// refused for the number of others.
    pub fn pin_under_lock(self: &Arc<Self>, slot: u32) -> Option<Pinned> {
        self.pins.get(slot as usize)?.fetch_add(1, Ordering::SeqCst);
        self.pinned(slot)
    }

    /// Memory that is kept beside the slots.
    pub fn index_bytes(&self) -> usize {
        // What lies beyond was never touched, and is no memory.
        self.slots() as usize * 2 * size_of::<AtomicU16>()
    }

    /// Whether anything still reads or fills `slot`.
    pub fn busy(&self, slot: u32) -> bool {
        let at = slot as usize;
        self.pins.get(at).is_some_and(|p| p.load(Ordering::SeqCst) != 0)
            || self.claims.get(at).is_some_and(|c| c.load(Ordering::SeqCst) != 0)
    }

    /// Of a slot with a pin or a claim: that keeps its memory where it is.
    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.range.len), "arena range out of bounds");
        // SAFETY: the range was just checked to lie within the mapping, which lives as long as `self`.
        unsafe { self.range.start().add(offset) }
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena").field("slots", &self.slots()).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// Bytes that it takes to have so many slots: whole pieces.
fn mapped_for(slots: u32) -> Option<usize> {
    (slots as usize).checked_mul(BLOCK_BYTES)?.checked_next_multiple_of(PIECE)
}

/// What the host has, in all.
fn host_bytes() -> u64 {
    let of = |name| nix::unistd::sysconf(name).ok().flatten().and_then(|number| u64::try_from(number).ok());
    let pages = of(nix::unistd::SysconfVar::_PHYS_PAGES).unwrap_or(0);
    pages.saturating_mul(of(nix::unistd::SysconfVar::PAGE_SIZE).unwrap_or(PAGE_BYTES as u64))
}

/// Counters that are memory only once they are used.
fn zeroes(count: u32) -> Box<[AtomicU16]> {
    let zeroes: *mut [u16] = Box::into_raw(vec![0u16; count as usize].into_boxed_slice());
    // SAFETY: the box was just given up, and an `AtomicU16` has size, alignment and bits of a `u16`.
    unsafe { Box::from_raw(zeroes as *mut [AtomicU16]) }
}

/// Addresses that are ours, with or without memory behind them.
struct Range {
    /// As the kernel gave it; what is used begins at the next piece.
    base: *mut u8,
    /// Of what is used; a piece more is set aside.
    len: usize,
}

// SAFETY: nothing but an address and a length; who may touch which bytes is the module's business.
unsafe impl Send for Range {}
// SAFETY: as above.
unsafe impl Sync for Range {}

impl Range {
    fn set_aside(len: usize) -> io::Result<Range> {
        let whole = len.checked_add(PIECE).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at addresses of the kernel's choice; no memory of anybody is touched.
        let base = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
        match base == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(Range { base: base.cast(), len }),
        }
    }

    fn start(&self) -> *mut u8 {
        // Less than the piece that was set aside for it.
        self.base.wrapping_add(self.base.align_offset(PIECE))
    }

    /// Puts a fresh mapping in the place of bytes `from..to`, which are whole pieces.
    fn map(&self, from: usize, to: usize, protection: i32, flags: i32) -> io::Result<()> {
        if from > to || to > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = flags | libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = self.start().wrapping_add(from);
        // SAFETY: replaces addresses of this range alone (checked above), which is ours. By the callers' rules nobody has
        // a pointer to what is taken, and what is given had no memory.
        let mapped = unsafe { libc::mmap(at.cast(), to - from, protection, flags, -1, 0) };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Puts huge pages of hugetlbfs in the place of bytes `from..to`. They are had elsewhere first, and moved: mmap(2) with
    /// `MAP_FIXED` takes away what was there before it finds that there are too few, and until something is there again another
    /// thread's stack or heap may be put into the hole.
    fn map_huge(&self, from: usize, to: usize) -> io::Result<()> {
        if from >= to || to > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (len, usable) = (to - from, libc::PROT_READ | libc::PROT_WRITE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        // SAFETY: a new mapping at addresses of the kernel's choice; no memory of anybody is touched.
        let had = unsafe { libc::mmap(ptr::null_mut(), len, usable, flags, -1, 0) };
        if had == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let (at, move_there) = (self.start().wrapping_add(from), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: moves the mapping just made, of which nobody else knows, over addresses of this range alone (checked above); what
        // is said of them in `map` holds.
        let moved = unsafe { libc::mremap(had, len, len, move_there, at.cast::<libc::c_void>()) };
        if moved == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            // SAFETY: the mapping made above, which was not moved.
            unsafe { libc::munmap(had, len) };
            // The kernel may have made room for it before it failed.
            self.take(from, to)?;
            return Err(error);
        }
        Ok(())
    }

    fn advise(&self, from: usize, to: usize, advice: i32) -> bool {
        let at = self.start().wrapping_add(from);
        // SAFETY: addresses of this range; neither kind of advice that is given here changes what is there.
        unsafe { libc::madvise(at.cast(), to - from, advice) == 0 }
    }

    /// Puts memory behind `from..to`.
    fn give(&self, from: usize, to: usize, huge: HugePages) -> io::Result<PageKind> {
        let usable = libc::PROT_READ | libc::PROT_WRITE;
        let mut kind = PageKind::Small;
        if huge != HugePages::No {
            match self.map_huge(from, to) {
                Ok(()) => kind = PageKind::HugeTlb,
                Err(error) if huge == HugePages::Require => {
                    let pages = (to - from) / PIECE;
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
        if kind == PageKind::Small {
            self.map(from, to, usable, 0)?;
            if huge != HugePages::No && self.advise(from, to, libc::MADV_HUGEPAGE) {
                kind = PageKind::Transparent;
            }
        }
        // A core dump must not contain what guests read.
        self.advise(from, to, libc::MADV_DONTDUMP);
        Ok(kind)
    }

    /// Takes the memory behind `from..to` away; the addresses stay ours.
    fn take(&self, from: usize, to: usize) -> io::Result<()> {
        self.map(from, to, libc::PROT_NONE, libc::MAP_NORESERVE)
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the mapping is this range's own, and whoever has an address of it holds the arena.
        unsafe { libc::munmap(self.base.cast(), self.len + PIECE) };
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
mod tests;
