//! Buffers that can be handed to the kernel.
//!
//! - [`IoBuf`]: what operations take: heap memory, or a claimed part of the RAM tier's arena
//! - [`AlignedBuf`]: page-aligned heap memory, recycled per thread
//! - [`total_len`], [`slices`]: a list of buffers seen as one run of bytes
//!
//! This is a leaf module: allocation and raw pointers stay here.

use crate::arena::ArenaBuf;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

/// Direct I/O wants the memory aligned to the device's logical block; a page satisfies every device.
const ALIGN_BYTES: usize = 4096;
/// Larger buffers go back to the allocator: they are rare, and holding them would only cost memory.
const POOLED_MAX_BYTES: usize = 1 << 20;
/// What one thread keeps for reuse: 128 blocks, more than a shard has on its way to tiers at a time.
const POOL_MAX_BYTES: usize = 8 << 20;
const CLASSES: usize = (POOLED_MAX_BYTES / ALIGN_BYTES).ilog2() as usize + 1;

/// Heap memory aligned to 4096 bytes, always initialised. Freed buffers of up to 1 MiB are kept by the thread that drops
/// them (8 MiB at most), so that steady I/O neither allocates nor faults pages in.
pub struct AlignedBuf {
    pointer: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: the memory is owned by this value alone and not tied to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

#[derive(Default)]
struct Pool {
    classes: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.classes.iter_mut().enumerate() {
            for pointer in list.drain(..) {
                release(pointer, ALIGN_BYTES << class);
            }
        }
    }
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

fn layout(capacity: usize) -> Layout {
    // `capacity` came from `capacity_for`, which keeps it non-zero and below `isize::MAX` rounded to the alignment.
    Layout::from_size_align(capacity, ALIGN_BYTES).unwrap_or(Layout::new::<u8>())
}

fn release(pointer: NonNull<u8>, capacity: usize) {
    // SAFETY: the pointer was allocated by `AlignedBuf::new` with this very capacity, hence this layout.
    unsafe { dealloc(pointer.as_ptr(), layout(capacity)) }
}

fn capacity_for(len: usize) -> usize {
    assert!(len <= isize::MAX as usize - ALIGN_BYTES, "buffer of {len} bytes is beyond the address space");
    let rounded = len.max(1).next_multiple_of(ALIGN_BYTES);
    if rounded <= POOLED_MAX_BYTES { rounded.next_power_of_two() } else { rounded }
}

fn class_of(capacity: usize) -> Option<usize> {
    (capacity <= POOLED_MAX_BYTES).then(|| (capacity / ALIGN_BYTES).ilog2() as usize)
}

impl AlignedBuf {
    /// `len` bytes of unspecified content: what an earlier user of the memory left there, or zeroes.
    ///
    /// # Panics
    /// If `len` is beyond the address space. Aborts when the host is out of memory.
    pub fn new(len: usize) -> AlignedBuf {
        let capacity = capacity_for(len);
        let recycled = class_of(capacity).and_then(|class| {
            POOL.try_with(|pool| {
                let mut pool = pool.borrow_mut();
                let pointer = pool.classes[class].pop()?;
                pool.bytes -= capacity;
                Some(pointer)
            })
            .ok()
            .flatten()
        });
        let pointer = recycled.unwrap_or_else(|| {
            let layout = layout(capacity);
            // SAFETY: the layout's size is not zero (`capacity_for` rounds up to at least a page).
            let fresh = unsafe { alloc_zeroed(layout) };
            NonNull::new(fresh).unwrap_or_else(|| handle_alloc_error(layout))
        });
        AlignedBuf { pointer, len, capacity }
    }

    /// `len` zero bytes.
    ///
    /// # Panics
    /// As [`AlignedBuf::new`].
    pub fn zeroed(len: usize) -> AlignedBuf {
        let mut buf = AlignedBuf::new(len);
        buf.fill(0);
        buf
    }

    /// A copy of `data`.
    ///
    /// # Panics
    /// As [`AlignedBuf::new`].
    pub fn copy_of(data: &[u8]) -> AlignedBuf {
        let mut buf = AlignedBuf::new(data.len());
        buf.copy_from_slice(data);
        buf
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let (pointer, capacity) = (self.pointer, self.capacity);
        let kept = class_of(capacity).is_some_and(|class| {
            POOL.try_with(|pool| {
                let mut pool = pool.borrow_mut();
                let room = pool.bytes + capacity <= POOL_MAX_BYTES;
                if room {
                    pool.bytes += capacity;
                    pool.classes[class].push(pointer);
                }
                room
            })
            .unwrap_or(false)
        });
        if !kept {
            release(pointer, capacity);
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` ≤ capacity bytes are allocated and initialised (allocated zeroed), owned by `self`.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// A buffer that an operation owns while it is in flight.
#[derive(Debug)]
pub enum IoBuf {
    /// Page-aligned heap memory: fit for direct I/O.
    Heap(AlignedBuf),
    /// Pages of the RAM tier's arena: fit for direct I/O, and for registered reads where the ring has the arena.
    Arena(ArenaBuf),
    /// Ordinary heap memory of any length: for sockets and small control messages.
    Bytes(Vec<u8>),
}

impl IoBuf {
    /// [`AlignedBuf::new`] as an `IoBuf`.
    pub fn heap(len: usize) -> IoBuf {
        IoBuf::Heap(AlignedBuf::new(len))
    }

    pub fn len(&self) -> usize {
        match self {
            IoBuf::Heap(buf) => buf.len(),
            IoBuf::Arena(buf) => buf.len(),
            IoBuf::Bytes(buf) => buf.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            IoBuf::Heap(buf) => buf,
            IoBuf::Arena(buf) => buf.as_slice(),
            IoBuf::Bytes(buf) => buf,
        }
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            IoBuf::Heap(buf) => buf,
            IoBuf::Arena(buf) => buf.as_mut_slice(),
            IoBuf::Bytes(buf) => buf,
        }
    }

    /// Whether the start lies on a multiple of `bytes` (a power of two).
    pub fn is_aligned(&self, bytes: usize) -> bool {
        match self {
            IoBuf::Bytes(buf) => (buf.as_ptr() as usize).is_multiple_of(bytes),
            IoBuf::Heap(_) | IoBuf::Arena(_) => bytes <= ALIGN_BYTES,
        }
    }
}

impl From<AlignedBuf> for IoBuf {
    fn from(buf: AlignedBuf) -> IoBuf {
        IoBuf::Heap(buf)
    }
}

impl From<ArenaBuf> for IoBuf {
    fn from(buf: ArenaBuf) -> IoBuf {
        IoBuf::Arena(buf)
    }
}

impl From<Vec<u8>> for IoBuf {
    fn from(buf: Vec<u8>) -> IoBuf {
        IoBuf::Bytes(buf)
    }
}

/// Sum of the lengths. Saturates: lengths of live buffers cannot really exceed the address space.
pub(crate) fn total_len(bufs: &[IoBuf]) -> usize {
    bufs.iter().fold(0usize, |sum, buf| sum.saturating_add(buf.len()))
}

/// The parts of `bufs`, seen as one run of bytes, that lie within `range`; empty parts are left out.
pub(crate) fn parts(bufs: &mut [IoBuf], range: Range<usize>) -> impl Iterator<Item = &mut [u8]> {
    let mut at = 0usize;
    bufs.iter_mut().filter_map(move |buf| {
        let start = at;
        at = at.saturating_add(buf.len());
        let from = range.start.max(start);
        let to = range.end.min(at);
        (from < to).then(|| &mut buf.as_mut_slice()[from - start..to - start])
    })
}

/// Zeroes bytes `range` of `bufs` seen as one run.
pub(crate) fn zero(bufs: &mut [IoBuf], range: Range<usize>) {
    for part in parts(bufs, range) {
        part.fill(0);
    }
}

/// Copies `data` to byte `at` of `bufs` seen as one run; what does not fit is left out. Returns the bytes copied.
pub(crate) fn copy_in(bufs: &mut [IoBuf], at: usize, data: &[u8]) -> usize {
    let mut done = 0;
    for part in parts(bufs, at..at.saturating_add(data.len())) {
        part.copy_from_slice(&data[done..done + part.len()]);
        done += part.len();
    }
    done
}

/// Copies from byte `at` of `bufs` seen as one run into `out`. Returns the bytes copied.
pub(crate) fn copy_out(bufs: &[IoBuf], at: usize, out: &mut [u8]) -> usize {
    let (mut start, mut done) = (0usize, 0usize);
    for buf in bufs {
        let end = start.saturating_add(buf.len());
        let from = (at + done).max(start);
        if from < end && done < out.len() && from == at + done {
            let take = (end - from).min(out.len() - done);
            out[done..done + take].copy_from_slice(&buf.as_slice()[from - start..from - start + take]);
            done += take;
        }
        start = end;
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_recycled() {
        let first = AlignedBuf::new(65536);
        let address = first.as_ptr() as usize;
        assert_eq!(address % ALIGN_BYTES, 0);
        drop(first);
        let second = AlignedBuf::new(65536 - 512);
        assert_eq!(second.as_ptr() as usize, address, "a buffer of the same class must be reused");
        assert_eq!(second.len(), 65536 - 512);
        assert!(AlignedBuf::zeroed(65536).iter().all(|b| *b == 0));
    }

    #[test]
    fn a_thread_keeps_a_bounded_amount() {
        let many: Vec<_> = (0..64).map(|_| AlignedBuf::new(1 << 20)).collect();
        drop(many);
        POOL.with(|pool| assert!(pool.borrow().bytes <= POOL_MAX_BYTES));
        drop(AlignedBuf::new(3 << 20));
        POOL.with(|pool| assert!(pool.borrow().bytes <= POOL_MAX_BYTES));
    }

    #[test]
    fn a_list_of_buffers_reads_as_one_run() {
        let mut bufs: Vec<IoBuf> = vec![vec![0u8; 3].into(), Vec::new().into(), vec![0u8; 5].into()];
        assert_eq!(total_len(&bufs), 8);
        assert_eq!(copy_in(&mut bufs, 2, &[1, 2, 3, 4]), 4);
        assert_eq!(bufs[0].as_slice(), [0, 0, 1]);
        assert_eq!(bufs[2].as_slice(), [2, 3, 4, 0, 0]);
        let mut out = [9; 5];
        assert_eq!(copy_out(&bufs, 1, &mut out), 5);
        assert_eq!(out, [0, 1, 2, 3, 4]);
        assert_eq!(copy_out(&bufs, 6, &mut out), 2);
        assert_eq!(copy_in(&mut bufs, 7, &[7, 8]), 1);
        zero(&mut bufs, 1..4);
        assert_eq!(bufs[2].as_slice(), [0, 3, 4, 0, 7]);
        let lens: Vec<_> = parts(&mut bufs, 0..8).map(|p| p.len()).collect();
        assert_eq!(lens, [3, 5]);
    }
}
