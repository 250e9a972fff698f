//! Bringing pages of another process in and pushing them out: process_madvise(2), and reads that map them.
//!
//! `MADV_WILLNEED` reads swapped pages into the swap cache: by zram at once, from a disk in the background. The guest's next
//! touch then only maps them. Reading a byte of a page maps it, so that the touch is no fault at all. While the guest runs into
//! the same pages that was measured three times as dear as `MADV_WILLNEED` (both want the process's mappings); while it does
//! not, it costs less than the fault that it saves. It goes by `/proc/PID/mem`, which stays the process's own; a call with a
//! number (process_vm_readv(2)) could hit another.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::process::{Process, of_process};
use super::{MemoryError, PAGE_BYTES, Push};

/// Ranges of one call (`UIO_MAXIOV`).
const MAX_RANGES: usize = 1024;

/// What to say of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    WillNeed,
    Push(Push),
}

impl Advice {
    fn number(self) -> i32 {
        match self {
            Self::WillNeed => libc::MADV_WILLNEED,
            Self::Push(Push::Cold) => libc::MADV_COLD,
            Self::Push(Push::PageOut) => libc::MADV_PAGEOUT,
        }
    }
}

/// Says it of `ranges` (address, pages). Ranges that are no memory any more are left out. Returns pages that were taken.
///
/// # Errors
/// `Gone`, `NotPermitted`, `Unsupported`.
pub fn advise(process: &Process, ranges: &[(u64, u64)], advice: Advice) -> Result<u64, MemoryError> {
    let mut taken = 0;
    for ranges in ranges.chunks(MAX_RANGES) {
        let mut rest = ranges;
        while !rest.is_empty() {
            let bytes = match once(process, rest, advice) {
                Ok(bytes) => bytes,
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR)) => continue,
                // the first range is no memory (unplugged), or not of a kind that can be moved (locked, huge pages)
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOMEM | libc::EINVAL | libc::EFAULT | libc::EIO | libc::EAGAIN)
                    ) =>
                {
                    process.check()?;
                    rest = &rest[1..];
                    continue;
                }
                Err(error) => return Err(of_process(process.id(), "cannot advise on its memory", &error)),
            };
            // it stops at a range it does not like, and says how far it came
            taken += bytes / PAGE_BYTES;
            let mut left = bytes;
            let whole = rest.iter().take_while(|(_, pages)| {
                let whole = left >= pages * PAGE_BYTES;
                left = left.saturating_sub(pages * PAGE_BYTES);
                whole
            });
            let whole = whole.count();
            rest = &rest[(whole + usize::from(whole < rest.len())).min(rest.len())..];
        }
    }
    Ok(taken)
}

/// The memory of a process, open.
#[derive(Debug)]
pub struct Memory(File);

impl Memory {
    /// Opens it. What stands at the time is held: a later process with the same number cannot be seen through it.
    ///
    /// # Errors
    /// `Gone`, `NotPermitted`.
    pub fn open(process: &Process) -> Result<Self, MemoryError> {
        let open = File::open(process.proc("mem"));
        open.map(Self).map_err(|error| of_process(process.id(), "cannot open its memory", &error))
    }
}

/// Maps the pages of `ranges` (address, pages) by reading a byte of each. What is no memory any more is left out.
///
/// # Errors
/// `Gone`, or what the kernel says.
pub fn touch(process: &Process, memory: &Memory, ranges: &[(u64, u64)]) -> Result<(), MemoryError> {
    let mut byte = [0];
    for (host, pages) in ranges {
        for page in 0..*pages {
            match memory.0.read_at(&mut byte, host + page * PAGE_BYTES) {
                // nothing: the process has no memory any more
                Ok(0) => return process.check(),
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EFAULT | libc::EINTR)) => {}
                Err(error) => return Err(of_process(process.id(), "cannot read its memory", &error)),
            }
        }
    }
    Ok(())
}

fn once(process: &Process, ranges: &[(u64, u64)], advice: Advice) -> io::Result<u64> {
    let vector: Vec<libc::iovec> = ranges
        .iter()
        .map(|&(host, pages)| libc::iovec { iov_base: host as *mut _, iov_len: (pages * PAGE_BYTES) as usize })
        .collect();
    // SAFETY: the addresses are the other process's and only looked up there; the vector lives through the call.
    let bytes = unsafe {
        libc::syscall(libc::SYS_process_madvise, process.as_raw_fd(), vector.as_ptr(), vector.len(), advice.number(), 0)
    };
    u64::try_from(bytes).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::super::process::identify;
    use super::*;
    use memmap2::MmapMut;

    #[test]
    fn memory_that_is_gone_is_left_out_and_the_rest_is_taken() {
        let process =
            Process::open(identify(std::process::id()).unwrap(), &[std::env::current_exe().unwrap()]).unwrap();
        let mut map = MmapMut::map_anon(64 * 4096).unwrap();
        map.fill(1);
        let host = map.as_ptr() as u64;
        let nowhere = 4096; // below vm.mmap_min_addr
        let ranges = [(nowhere, 1), (host, 16), (nowhere, 2), (host + 32 * 4096, 8), (nowhere, 1)];
        match advise(&process, &ranges, Advice::Push(Push::Cold)) {
            Ok(taken) => assert_eq!(taken, 24),
            Err(MemoryError::NotPermitted { .. }) => eprintln!("skipped: process_madvise is not permitted here"),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(map[17 * 4096], 1);
    }
}
