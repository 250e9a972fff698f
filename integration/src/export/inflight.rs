//! In-flight tracking (vhost-user, "Inflight I/O tracking", split virtqueue): shared memory, kept by the front-end over
//! a restart of ours, that says which requests have been taken and not answered. With it a restarted agent answers each
//! request of its predecessor exactly once, in any order of completion. One of the export's modules with `unsafe`.
//!
//! One area a ring, each starting at a multiple of 64 bytes, native endianness:
//!
//! ```text
//! 0  features u64 (0)   8 version u16 (1)   10 desc_num u16   12 last_batch_head u16   14 used_idx u16
//! 16 desc_num entries of 16 bytes, by head descriptor: inflight u8, pad [u8; 5], next u16, counter u64
//! ```
//!
//! Order of stores, and what dying after each leaves (the ring's used index tells the cases apart):
//!
//! | taking a request | dying after it |
//! | --- | --- |
//! | 1. `counter` := next | not in flight; still in the available ring: taken again |
//! | 2. `inflight` := 1 | in flight: resubmitted |
//!
//! | answering a request | dying after it |
//! | --- | --- |
//! | 1. used element | in flight: resubmitted |
//! | 2. `next` := `last_batch_head` | likewise |
//! | 3. `last_batch_head` := its head | likewise |
//! | 4. used index of the ring + 1 | answered; `used_idx` differs, so the entry at `last_batch_head` is cleared |
//! | 5. `inflight` := 0 | likewise |
//! | 6. `used_idx` := used index | answered, and the area says so |
//!
//! We answer in batches of one. Recovery walks longer batches too: the area may come from another back-end.

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use super::config::{NUM_QUEUES_MAX, QUEUE_SIZE_MAX};
use super::memory::holds;

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
const AREA_ALIGN: usize = 64;
const VERSION: u16 = 1;

/// In-flight memory that cannot be used.
#[derive(Debug, Error)]
pub enum InflightError {
    #[error("in-flight area for {num_queues} rings of {queue_size}: rings must be 1 to 256, their size 1 to 1024")]
    Shape { num_queues: u16, queue_size: u16 },
    #[error("in-flight area of {mmap_size} bytes, or its file, is too small for {num_queues} rings of {queue_size}")]
    TooSmall { mmap_size: u64, num_queues: u16, queue_size: u16 },
    #[error("in-flight area cannot be made: {0}")]
    Create(#[source] std::io::Error),
    #[error("in-flight area cannot be mapped: {0}")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    #[error("in-flight area has no place for ring {index} of {size} entries")]
    NoSuchRing { index: u16, size: u16 },
    #[error("in-flight area of ring {index} has version {version}; this agent reads version 1")]
    Version { index: u16, version: u16 },
    #[error("in-flight area of ring {index} tracks {tracked} entries, the ring has {size}")]
    Entries { index: u16, tracked: u16, size: u16 },
    #[error("in-flight area of ring {index} names descriptor {head}, past its {size} entries")]
    Head { index: u16, head: u16, size: u16 },
}

/// Bytes from one ring's area to the next.
fn stride(queue_size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(queue_size)).next_multiple_of(AREA_ALIGN)
}

fn check_shape(num_queues: u16, queue_size: u16) -> Result<usize, InflightError> {
    if (1..=NUM_QUEUES_MAX).contains(&num_queues) && (1..=QUEUE_SIZE_MAX).contains(&queue_size) {
        Ok(stride(queue_size) * usize::from(num_queues))
    } else {
        Err(InflightError::Shape { num_queues, queue_size })
    }
}

/// Areas of all rings, mapped.
#[derive(Debug)]
pub(super) struct InflightRegion {
    mapping: MmapRegion,
    num_queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Makes a fresh region: its file, sealed against resizing, and its size.
    pub(super) fn create(num_queues: u16, queue_size: u16) -> Result<(File, u64), InflightError> {
        let bytes = check_shape(num_queues, queue_size)? as u64;
        let made = (|| {
            let file =
                File::from(memfd_create(c"prestage-inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
            file.set_len(bytes)?;
            fcntl(
                &file,
                FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL),
            )?;
            Ok(file)
        })();
        let file = made.map_err(InflightError::Create)?;
        let copy = file.try_clone().map_err(InflightError::Create)?;
        let region = Self::map(copy, 0, bytes, num_queues, queue_size)?;
        for index in 0..num_queues {
            region.word(usize::from(index) * stride(queue_size) + 8).store(VERSION, Ordering::Relaxed);
            region.word(usize::from(index) * stride(queue_size) + 10).store(queue_size, Ordering::Relaxed);
        }
        Ok((file, bytes))
    }

    /// Maps a region that the front-end kept.
    pub(super) fn map(
        file: File,
        mmap_offset: u64,
        mmap_size: u64,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let bytes = check_shape(num_queues, queue_size)?;
        if bytes as u64 > mmap_size || !holds(&file, mmap_offset, mmap_size) {
            return Err(InflightError::TooSmall { mmap_size, num_queues, queue_size });
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, mmap_offset), bytes).map_err(InflightError::Map)?;
        Ok(Self { mapping, num_queues, queue_size })
    }

    /// The region as it was mapped: file, its offset there, bytes, rings, their size.
    pub(super) fn parts(&self) -> Option<(&File, u64, u64, u16, u16)> {
        let place = self.mapping.file_offset()?;
        Some((place.file(), place.start(), self.mapping.size() as u64, self.num_queues, self.queue_size))
    }

    /// The 16-bit word at a byte offset.
    fn word(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= self.mapping.size() && at.is_multiple_of(2));
        // SAFETY: all callers stay inside an area, and the mapping holds all areas (`check_shape`).
        let word = unsafe { self.mapping.as_ptr().add(at).cast::<u16>() };
        // SAFETY: mapped as long as `self`, aligned (mappings start on a page), only touched atomically.
        unsafe { AtomicU16::from_ptr(word) }
    }

    /// The area of one ring of `size` entries.
    pub(super) fn queue(self: &Arc<Self>, index: u16, size: u16) -> Result<InflightQueue, InflightError> {
        if index >= self.num_queues || size > self.queue_size {
            return Err(InflightError::NoSuchRing { index, size });
        }
        let base = usize::from(index) * stride(self.queue_size);
        Ok(InflightQueue { region: Arc::clone(self), base, index, size, counter: 0 })
    }
}

/// One ring's area.
#[derive(Debug)]
pub(super) struct InflightQueue {
    region: Arc<InflightRegion>,
    /// Byte offset of the area.
    base: usize,
    index: u16,
    /// Entries in use: the ring's size, at most the region's.
    size: u16,
    /// Orders the requests taken.
    counter: u64,
}

/// Parts of the answer's bookkeeping, in the order of their stores (see the module's head).
impl InflightQueue {
    fn version(&self) -> &AtomicU16 {
        self.region.word(self.base + 8)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.region.word(self.base + 10)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.region.word(self.base + 12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.region.word(self.base + 14)
    }

    /// First byte of an entry. `head` must be below the ring's size.
    fn entry(&self, head: u16) -> NonNull<u8> {
        debug_assert!(head < self.size);
        let at = self.base + HEADER_BYTES + ENTRY_BYTES * usize::from(head % self.size);
        // SAFETY: head < size <= the region's queue size: inside the area.
        let entry = unsafe { self.region.mapping.as_ptr().add(at) };
        // SAFETY: an offset into a mapping is not null.
        unsafe { NonNull::new_unchecked(entry) }
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: mapped as long as `self`; only touched atomically.
        unsafe { AtomicU8::from_ptr(self.entry(head).as_ptr()) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: bytes 6 and 7 of the entry.
        let next = unsafe { self.entry(head).add(6) };
        // SAFETY: as for `inflight`; entries are aligned to 16.
        unsafe { AtomicU16::from_ptr(next.as_ptr().cast()) }
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        // SAFETY: bytes 8 to 15 of the entry.
        let counter = unsafe { self.entry(head).add(8) };
        // SAFETY: as for `inflight`; entries are aligned to 16.
        unsafe { AtomicU64::from_ptr(counter.as_ptr().cast()) }
    }

    /// Makes the area agree with the ring's used index and returns the heads of the requests that are still to be
    /// answered, in the order in which they were taken.
    pub(super) fn recover(&mut self, used_index: u16) -> Result<Vec<u16>, InflightError> {
        let (index, size) = (self.index, self.size);
        match self.version().load(Ordering::Acquire) {
            // Never used: a front-end may hand out zeroes.
            0 => {
                self.desc_num().store(size, Ordering::Relaxed);
                self.used_idx().store(used_index, Ordering::Relaxed);
                self.version().store(VERSION, Ordering::Release);
            }
            VERSION => {}
            version => return Err(InflightError::Version { index, version }),
        }
        let tracked = self.desc_num().load(Ordering::Relaxed);
        if tracked < size {
            return Err(InflightError::Entries { index, tracked, size });
        }
        // More than a ring's worth: the area is from another life of the ring (a guest reset), with nothing in flight
        // that its walk could clear wrongly; the walk is bounded by the ring's size.
        let batch = used_index.wrapping_sub(self.used_idx().load(Ordering::Acquire)).min(size);
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        for _ in 0..batch {
            if head >= size {
                return Err(InflightError::Head { index, head, size });
            }
            self.inflight(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.used_idx().store(used_index, Ordering::Release);

        let mut taken: Vec<(u64, u16)> = (0..size)
            .filter(|head| self.inflight(*head).load(Ordering::Acquire) != 0)
            .map(|head| (self.counter_of(head).load(Ordering::Relaxed), head))
            .collect();
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(taken.into_iter().map(|(_, head)| head).collect())
    }

    /// Taking, store 1.
    #[inline]
    pub(super) fn set_counter(&mut self, head: u16) {
        self.counter_of(head).store(self.counter, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
    }

    /// Taking, store 2.
    #[inline]
    pub(super) fn set_inflight(&self, head: u16) {
        self.inflight(head).store(1, Ordering::Release);
    }

    /// Answering, store 2.
    #[inline]
    pub(super) fn link(&self, head: u16) {
        self.next(head).store(self.last_batch_head().load(Ordering::Relaxed), Ordering::Release);
    }

    /// Answering, store 3.
    #[inline]
    pub(super) fn set_last_batch_head(&self, head: u16) {
        self.last_batch_head().store(head, Ordering::Release);
    }

    /// Answering, store 5. Not before the ring's used index is stored: every store here is a release.
    #[inline]
    pub(super) fn clear_inflight(&self, head: u16) {
        self.inflight(head).store(0, Ordering::Release);
    }

    /// Answering, store 6.
    #[inline]
    pub(super) fn set_used_idx(&self, used_index: u16) {
        self.used_idx().store(used_index, Ordering::Release);
    }
}
