//! A perf event of one thread and the ring it writes samples to (perf_event_open(2)).
//!
//! Samples are of `PERF_SAMPLE_TIME`, then `PERF_SAMPLE_ADDR` or `PERF_SAMPLE_RAW`; records of lost ones are counted.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use perf_event_open_sys::bindings;

/// Bytes for samples: 21,000 faults, more than a guest makes between two looks.
const RING_BYTES: usize = 512 << 10;
const PAGE: usize = 4096;

/// What is counted.
#[derive(Debug, Clone, Copy)]
pub(super) enum Counts {
    MajorFaults,
    /// A tracepoint by its number.
    Tracepoint(u64),
}

/// One thread's ring.
#[derive(Debug)]
pub(super) struct Ring {
    event: OwnedFd,
    map: MmapRaw,
    on: bool,
}

/// A sample: its time, and its address or raw bytes.
pub(super) struct Sample<'a> {
    pub(super) at_ns: u64,
    pub(super) rest: &'a [u8],
}

impl Ring {
    /// Counts nothing until it is set going.
    pub(super) fn open(thread: u32, counts: Counts) -> io::Result<Self> {
        let mut attr = bindings::perf_event_attr::default();
        attr.size = size_of::<bindings::perf_event_attr>() as u32;
        let payload = match counts {
            Counts::MajorFaults => {
                attr.type_ = bindings::PERF_TYPE_SOFTWARE;
                attr.config = u64::from(bindings::PERF_COUNT_SW_PAGE_FAULTS_MAJ);
                bindings::PERF_SAMPLE_ADDR
            }
            Counts::Tracepoint(number) => {
                attr.type_ = bindings::PERF_TYPE_TRACEPOINT;
                attr.config = number;
                bindings::PERF_SAMPLE_RAW
            }
        };
        attr.sample_type = u64::from(bindings::PERF_SAMPLE_TIME) | u64::from(payload);
        attr.__bindgen_anon_1.sample_period = 1;
        // rings are looked at, they wake nobody: see the helper's server
        attr.set_watermark(1);
        attr.__bindgen_anon_2.wakeup_watermark = RING_BYTES as u32;
        attr.clockid = libc::CLOCK_MONOTONIC;
        attr.set_use_clockid(1);
        attr.set_disabled(1);
        let thread = i32::try_from(thread).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
        let flags = u64::from(bindings::PERF_FLAG_FD_CLOEXEC);
        // SAFETY: the attributes live through the call and state their size.
        let fd = unsafe { perf_event_open_sys::perf_event_open(&raw mut attr, thread, -1, -1, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made for us.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        let map = MmapOptions::new().len(PAGE + RING_BYTES).map_raw(event.as_raw_fd())?;
        Ok(Self { event, map, on: false })
    }

    /// Every `period`th from now on; 0: none.
    pub(super) fn listen(&mut self, period: u32) {
        let fd = self.event.as_raw_fd();
        if period > 0 {
            let mut period = u64::from(period);
            // SAFETY: the period lives through the call.
            unsafe { perf_event_open_sys::ioctls::PERIOD(fd, &raw mut period as u64) };
        }
        let on = period > 0;
        if on != self.on {
            self.on = on;
            if on {
                // SAFETY: takes numbers only.
                unsafe { perf_event_open_sys::ioctls::ENABLE(fd, 0) };
            } else {
                // SAFETY: as above.
                unsafe { perf_event_open_sys::ioctls::DISABLE(fd, 0) };
            }
        }
    }

    /// Tells of each sample since the last call. Returns how many did not fit.
    pub(super) fn take(&mut self, mut tell: impl FnMut(Sample<'_>)) -> u64 {
        let page = self.map.as_mut_ptr().cast::<bindings::perf_event_mmap_page>();
        let (head, tail) = (
            std::mem::offset_of!(bindings::perf_event_mmap_page, data_head),
            std::mem::offset_of!(bindings::perf_event_mmap_page, data_tail),
        );
        let field = |offset: usize| page.wrapping_byte_add(offset).cast::<u64>();
        // SAFETY: the mapping begins with this page; both ends reach these fields by atomic accesses of their size.
        let head = unsafe { AtomicU64::from_ptr(field(head)) };
        // SAFETY: as above.
        let tail = unsafe { AtomicU64::from_ptr(field(tail)) };
        let until = head.load(Ordering::Acquire);
        let mut at = tail.load(Ordering::Relaxed);
        let mut lost = 0;
        let mut record = [0_u8; 256];
        while at < until {
            let mut header = [0; 8];
            self.copy(at, &mut header);
            let kind = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
            let size = u16::from_ne_bytes([header[6], header[7]]);
            if size < 8 {
                // no record is that short: the ring is not what it was taken for
                at = until;
                break;
            }
            let body = usize::from(size) - 8;
            let kept = body.min(record.len());
            self.copy(at + 8, &mut record[..kept]);
            at += u64::from(size);
            let number = |from: usize| record[..kept].get(from..from + 8).and_then(|bytes| bytes.try_into().ok());
            match (kind, number(0).map(u64::from_ne_bytes)) {
                (bindings::PERF_RECORD_SAMPLE, Some(at_ns)) => tell(Sample { at_ns, rest: &record[8..kept] }),
                // id, lost
                (bindings::PERF_RECORD_LOST, _) => lost += number(8).map_or(0, u64::from_ne_bytes),
                _ => {}
            }
        }
        tail.store(at, Ordering::Release);
        lost
    }

    /// Copies from the ring, around its end.
    fn copy(&self, at: u64, to: &mut [u8]) {
        let data = self.map.as_ptr().wrapping_add(PAGE);
        let from = (at % RING_BYTES as u64) as usize;
        let first = to.len().min(RING_BYTES - from);
        let (before, after) = to.split_at_mut(first);
        let source = data.wrapping_add(from);
        // SAFETY: `from + first` is within the mapping; the kernel does not write there before the tail has passed.
        unsafe { std::ptr::copy_nonoverlapping(source, before.as_mut_ptr(), before.len()) };
        // SAFETY: the rest begins at the ring's start and is shorter than a record, so shorter than the ring.
        unsafe { std::ptr::copy_nonoverlapping(data, after.as_mut_ptr(), after.len()) };
    }
}
