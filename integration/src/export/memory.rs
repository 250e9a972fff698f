//! Guest memory: the regions a front-end shares, and every access to their bytes. One of the export's three modules
//! with `unsafe` (the others: `ring`, `inflight`).
//!
//! - [`GuestMemory`]: an immutable set of mapped regions, found by guest-physical or by front-end address.
//! - [`MemoryCell`]: the current set, swapped whole when the front-end changes it. Rings notice by its generation;
//!   requests in flight hold the set that they were popped from, so their bytes stay mapped until they complete.
//! - [`GuestBuffer`]: a request's bytes, scattered over guest memory, as one sequence with bounds.
//!
//! The guest may write to these bytes at any time. Nothing here makes a reference to them; they are copied.
//!
//! A front-end that truncates the file behind a region turns later accesses into SIGBUS. QEMU seals its memfd against
//! shrinking (`memory-backend-memfd`, `seal=on`, the default), which rules it out for guests; a front-end that does it
//! on purpose ends the process.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use parking_lot::Mutex;
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

/// Regions accepted in all, as many as libvhost-user takes: enough for the DIMM slots of one guest.
pub(super) const REGIONS_MAX: usize = 509;

/// Memory that cannot be shared, or an address outside of it.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error(
        "memory region at {guest_addr:#x} of {len:#x} bytes: {reason}; the front-end sent an unusable memory table"
    )]
    Region { guest_addr: u64, len: u64, reason: &'static str },
    #[error("memory region at {guest_addr:#x} of {len:#x} bytes cannot be mapped: {source}")]
    Map { guest_addr: u64, len: u64, source: vm_memory::mmap::MmapRegionError },
    #[error("no memory region at {guest_addr:#x} of {len:#x} bytes to remove")]
    NoSuchRegion { guest_addr: u64, len: u64 },
    #[error("address {addr:#x} with {len:#x} bytes is outside of guest memory")]
    Outside { addr: u64, len: u64 },
}

/// Where a region lies: in the guest, in the front-end's address space, in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegionSpec {
    pub(super) guest_addr: u64,
    pub(super) len: u64,
    pub(super) user_addr: u64,
    pub(super) file_offset: u64,
}

impl RegionSpec {
    fn error(&self, reason: &'static str) -> MemoryError {
        MemoryError::Region { guest_addr: self.guest_addr, len: self.len, reason }
    }

    fn check(&self) -> Result<(), MemoryError> {
        if self.len == 0 {
            return Err(self.error("it is empty"));
        }
        if usize::try_from(self.len).is_err()
            || [self.guest_addr, self.user_addr, self.file_offset].iter().any(|a| a.checked_add(self.len).is_none())
        {
            return Err(self.error("it wraps around the address space"));
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
struct Region {
    spec: RegionSpec,
    /// Of the region's first byte, inside `mapping`.
    host: NonNull<u8>,
    /// Keeps `host` mapped.
    mapping: Arc<MmapRegion>,
}

// SAFETY: `host` points into `mapping`, which is Send and Sync and lives as long as the region; the bytes behind it
// are only touched by volatile reads, atomics and raw copies, which need no exclusive access.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(spec: RegionSpec, file: File) -> Result<Self, MemoryError> {
        spec.check()?;
        if !holds(&file, spec.file_offset, spec.len) {
            return Err(spec.error("its file is shorter"));
        }
        let map_error = |source| MemoryError::Map { guest_addr: spec.guest_addr, len: spec.len, source };
        // Mappings of hugetlbfs must start and end on its pages, and a region need not.
        let align = match fstatfs(&file) {
            Ok(fs) if fs.filesystem_type() == HUGETLBFS_MAGIC => u64::try_from(fs.block_size()).unwrap_or(4096),
            _ => 4096,
        };
        let lead = spec.file_offset % align.max(1);
        let len = (spec.len.checked_add(lead))
            .and_then(|len| if align > 4096 { len.checked_next_multiple_of(align) } else { Some(len) })
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(|| spec.error("it wraps around the address space"))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, spec.file_offset - lead), len).map_err(map_error)?;
        let base = NonNull::new(mapping.as_ptr()).ok_or_else(|| spec.error("it was mapped at address 0"))?;
        // SAFETY: lead < len, the size of the mapping at `base`.
        let host = unsafe { base.add(lead as usize) };
        Ok(Self { spec, host, mapping: Arc::new(mapping) })
    }
}

/// Does the file reach so far? Mapping it does not need that, but touching what it lacks is SIGBUS. Devices (DAX) have no
/// length to compare with.
pub(super) fn holds(file: &File, offset: u64, len: u64) -> bool {
    file.metadata().is_ok_and(|meta| !meta.is_file() || offset.checked_add(len).is_some_and(|end| end <= meta.len()))
}

/// The regions of one moment, sorted by guest address.
#[derive(Debug, Default)]
pub(super) struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// Maps a whole table (SET_MEM_TABLE).
    pub(super) fn from_table(table: Vec<(RegionSpec, File)>) -> Result<Self, MemoryError> {
        table.into_iter().try_fold(Self::default(), |memory, (spec, file)| memory.with(spec, file))
    }

    /// These regions and one more (ADD_MEM_REG).
    pub(super) fn with(&self, spec: RegionSpec, file: File) -> Result<Self, MemoryError> {
        spec.check()?;
        if self.regions.len() >= REGIONS_MAX {
            return Err(spec.error("all memory slots are taken"));
        }
        let apart = |a: u64, b: u64, b_len: u64| a + spec.len <= b || b + b_len <= a;
        if !self.regions.iter().all(|r| apart(spec.guest_addr, r.spec.guest_addr, r.spec.len)) {
            return Err(spec.error("it overlaps another region in the guest's address space"));
        }
        if !self.regions.iter().all(|r| apart(spec.user_addr, r.spec.user_addr, r.spec.len)) {
            return Err(spec.error("it overlaps another region in the front-end's address space"));
        }
        let mut regions = self.regions.clone();
        let at = regions.partition_point(|r| r.spec.guest_addr < spec.guest_addr);
        regions.insert(at, Region::map(spec, file)?);
        Ok(Self { regions })
    }

    /// These regions without one (REM_MEM_REG). The file offset does not count: the message need not carry it.
    pub(super) fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        let same = |r: &Region| {
            (r.spec.guest_addr, r.spec.len, r.spec.user_addr) == (spec.guest_addr, spec.len, spec.user_addr)
        };
        let at = regions
            .iter()
            .position(same)
            .ok_or(MemoryError::NoSuchRegion { guest_addr: spec.guest_addr, len: spec.len })?;
        regions.remove(at);
        Ok(Self { regions })
    }

    /// Every region with its file.
    pub(super) fn files(&self) -> impl Iterator<Item = (RegionSpec, &File)> {
        self.regions.iter().filter_map(|region| Some((region.spec, region.mapping.file_offset()?.file())))
    }

    /// The bytes from `addr` on that one region holds: their place and how many. `hint` is the region found last.
    #[inline]
    fn find(&self, addr: u64, hint: &mut usize) -> Option<(NonNull<u8>, u64)> {
        let inside = |r: &Region| addr >= r.spec.guest_addr && addr - r.spec.guest_addr < r.spec.len;
        let region = match self.regions.get(*hint) {
            Some(region) if inside(region) => region,
            _ => {
                let at = self.regions.partition_point(|r| r.spec.guest_addr <= addr).checked_sub(1)?;
                *hint = at;
                self.regions.get(at).filter(|r| inside(r))?
            }
        };
        let offset = addr - region.spec.guest_addr;
        // SAFETY: offset < the region's length, all of which is mapped from `host` on.
        Some((unsafe { region.host.add(offset as usize) }, region.spec.len - offset))
    }

    /// Host address of `len` bytes that lie in one region, by guest address.
    #[inline]
    pub(super) fn contiguous(&self, addr: u64, len: u64, hint: &mut usize) -> Option<NonNull<u8>> {
        self.find(addr, hint).filter(|(_, held)| *held >= len).map(|(host, _)| host)
    }

    /// Host address of `len` bytes that lie in one region, by the front-end's address: ring addresses come this way.
    pub(super) fn contiguous_user(&self, addr: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        let region = self
            .regions
            .iter()
            .find(|r| addr >= r.spec.user_addr && addr - r.spec.user_addr < r.spec.len)
            .filter(|r| r.spec.len - (addr - r.spec.user_addr) >= len)
            .ok_or(MemoryError::Outside { addr, len })?;
        // SAFETY: the offset is inside the region, all of which is mapped from `host` on.
        Ok(unsafe { region.host.add((addr - region.spec.user_addr) as usize) })
    }
}

/// The memory that rings shall use now.
#[derive(Debug, Default)]
pub(super) struct MemoryCell {
    current: Mutex<Arc<GuestMemory>>,
    generation: AtomicU64,
}

impl MemoryCell {
    /// Swaps the regions; rings take them up at their next pop.
    pub(super) fn set(&self, memory: GuestMemory) {
        let mut current = self.current.lock();
        *current = Arc::new(memory);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The regions and their generation.
    pub(super) fn get(&self) -> (Arc<GuestMemory>, u64) {
        let current = self.current.lock();
        (Arc::clone(&current), self.generation.load(Ordering::Acquire))
    }

    #[inline]
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// Some bytes of guest memory, in one piece.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    host: NonNull<u8>,
    len: u64,
}

/// Storage of a buffer's segments, to be used again: a request then costs no allocation.
#[derive(Debug, Default)]
pub(super) struct SegmentStore(Vec<Segment>);

// SAFETY: an idle store holds no segments (see `GuestBuffer::recycle`), only their capacity.
unsafe impl Send for SegmentStore {}

/// Bytes scattered over guest memory, in order.
#[derive(Debug)]
pub(super) struct GuestBuffer {
    /// Keeps every segment mapped: all of them were found in it.
    memory: Arc<GuestMemory>,
    segments: Vec<Segment>,
    /// Segments before this one are trimmed off.
    first: usize,
    len: u64,
    /// Place of the status byte, after the data.
    status: Option<NonNull<u8>>,
}

// SAFETY: the segments point into mappings that `memory` keeps, which may be used from any thread; their bytes are
// only touched by raw copies.
unsafe impl Send for GuestBuffer {}

/// A copy that would leave the request's buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{len} bytes at {at} are outside of the request's {held} bytes of guest memory")]
pub struct OutOfBounds {
    /// Where the copy would start.
    pub at: u64,
    /// How many bytes it would move.
    pub len: u64,
    /// How many the request has.
    pub held: u64,
}

impl GuestBuffer {
    pub(super) fn new(memory: Arc<GuestMemory>, store: SegmentStore) -> Self {
        Self { memory, segments: store.0, first: 0, len: 0, status: None }
    }

    /// Lets the memory go and keeps the allocation.
    pub(super) fn recycle(mut self) -> SegmentStore {
        self.segments.clear();
        SegmentStore(self.segments)
    }

    #[inline]
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends `len` bytes at guest address `addr`. They may span regions that touch each other.
    #[inline]
    pub(super) fn push(&mut self, addr: u64, len: u32, hint: &mut usize) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { addr, len: u64::from(len) };
        let (mut addr, mut left) = (addr, u64::from(len));
        while left > 0 {
            let Some((host, held)) = self.memory.find(addr, hint) else { return Err(outside) };
            let piece = left.min(held);
            self.segments.push(Segment { host, len: piece });
            self.len += piece;
            left -= piece;
            if left > 0 {
                let Some(next) = addr.checked_add(piece) else { return Err(outside) };
                addr = next;
            }
        }
        Ok(())
    }

    /// Drops the first `n` bytes, all of them if there are fewer.
    #[inline]
    pub(super) fn trim_front(&mut self, n: u64) {
        let mut left = n.min(self.len);
        self.len -= left;
        while let Some(segment) = self.segments.get_mut(self.first).filter(|_| left > 0) {
            if segment.len <= left {
                left -= segment.len;
                self.first += 1;
            } else {
                // SAFETY: left < the segment's length.
                segment.host = unsafe { segment.host.add(left as usize) };
                segment.len -= left;
                left = 0;
            }
        }
    }

    /// Takes the last byte off the data: it is where the request's status goes. False if there is none.
    #[inline]
    pub(super) fn take_status(&mut self) -> bool {
        let Some(last) = self.segments[self.first..].last_mut().filter(|s| s.len > 0) else { return false };
        last.len -= 1;
        self.len -= 1;
        // SAFETY: the segment held one byte more than its length now says.
        self.status = Some(unsafe { last.host.add(last.len as usize) });
        if last.len == 0 {
            self.segments.pop();
        }
        true
    }

    /// Writes the status byte, if one was taken.
    #[inline]
    pub(super) fn write_status(&self, value: u8) {
        if let Some(host) = self.status {
            // SAFETY: found in `memory`, which keeps it mapped and writable.
            unsafe { host.as_ptr().write_volatile(value) };
        }
    }

    /// Drops the bytes from `len` on. The status must have been taken before.
    #[inline]
    pub(super) fn truncate(&mut self, len: u64) {
        self.len = self.len.min(len);
    }

    /// Copies `data` to the bytes from `at` on.
    #[inline]
    pub(super) fn write(&self, at: u64, data: &[u8]) -> Result<(), OutOfBounds> {
        self.each(at, data.len() as u64, |done, host, len| {
            let from = data[done..done + len].as_ptr();
            // SAFETY: `host` has `len` mapped, writable bytes (`each`); `from` is a slice of ours, which no mapping of
            // guest memory overlaps.
            unsafe { std::ptr::copy_nonoverlapping(from, host.as_ptr(), len) };
        })
    }

    /// Copies the bytes from `at` on to `data`.
    #[inline]
    pub(super) fn read(&self, at: u64, data: &mut [u8]) -> Result<(), OutOfBounds> {
        self.each(at, data.len() as u64, |done, host, len| {
            let to = data[done..done + len].as_mut_ptr();
            // SAFETY: `host` has `len` mapped bytes (`each`); `to` is a slice of ours, which no mapping overlaps.
            unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), to, len) };
        })
    }

    /// Sets `len` bytes from `at` on to zero.
    pub(super) fn zero(&self, at: u64, len: u64) -> Result<(), OutOfBounds> {
        self.each(at, len, |_, host, len| {
            // SAFETY: `host` has `len` mapped, writable bytes (`each`).
            unsafe { std::ptr::write_bytes(host.as_ptr(), 0, len) };
        })
    }

    /// Calls `f(bytes done, place, bytes)` for each piece of the range; every piece is mapped.
    #[inline]
    fn each(&self, at: u64, len: u64, mut f: impl FnMut(usize, NonNull<u8>, usize)) -> Result<(), OutOfBounds> {
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(OutOfBounds { at, len, held: self.len });
        }
        let (mut skip, mut done) = (at, 0);
        for segment in &self.segments[self.first..] {
            if done == len {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let piece = (segment.len - skip).min(len - done);
            // SAFETY: skip < the segment's length.
            let host = unsafe { segment.host.add(skip as usize) };
            f(done as usize, host, piece as usize);
            done += piece;
            skip = 0;
        }
        Ok(())
    }
}
