//! Memory of another process as the host sees it: what of it is in RAM, pushing it out, bringing it in.

use std::fs;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

const PAGE: u64 = 4096;

/// Times that memory is pushed out until it is said that it cannot be: a disk takes two.
const TRIES: u32 = 6;

/// What may stay: pages that the process uses meanwhile.
const LEFT_BYTES: u64 = 4 << 20;

/// A mapping of a process.
#[derive(Debug)]
pub struct Memory {
    pid: Pid,
    pidfd: OwnedFd,
    range: Range<u64>,
}

/// Bytes of a mapping, from `/proc/PID/smaps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Residency {
    /// Mapped and in RAM.
    pub mapped_bytes: u64,
    /// In swap; also those that are in RAM besides, not mapped yet.
    pub swapped_bytes: u64,
}

/// What a process has used since its start, all its threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub minor_faults: u64,
    pub major_faults: u64,
    /// Processor time of the threads it has now.
    pub cpu: Duration,
}

impl Usage {
    /// Of process `pid`: `/proc/PID/stat`, `/proc/PID/task/*/schedstat`.
    pub fn of(pid: i32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
        let (minor_faults, major_faults) = faults(&stat).with_context(|| format!("/proc/{pid}/stat: {stat}"))?;
        let mut nanoseconds = 0;
        for thread in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))?.flatten() {
            // one that has just ended has none
            let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            nanoseconds += text.split(' ').next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Self { minor_faults, major_faults, cpu: Duration::from_nanos(nanoseconds) })
    }

    /// Of process `pid` and those it has started.
    pub fn of_family(pid: i32) -> Result<Self> {
        let mut all = Self::of(pid)?;
        for child in children(pid)? {
            // one that has just ended counts no more
            let Ok(more) = Self::of_family(child) else { continue };
            all.minor_faults += more.minor_faults;
            all.major_faults += more.major_faults;
            all.cpu += more.cpu;
        }
        Ok(all)
    }

    /// What came after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            minor_faults: self.minor_faults.saturating_sub(earlier.minor_faults),
            major_faults: self.major_faults.saturating_sub(earlier.major_faults),
            cpu: self.cpu.saturating_sub(earlier.cpu),
        }
    }
}

/// The processes that `pid` has started and that run, and those that these have.
pub fn descendants(pid: i32) -> Result<Vec<i32>> {
    let mut all = children(pid)?;
    let mut at = 0;
    while let Some(child) = all.get(at).copied() {
        // one that has just ended has none
        all.extend(children(child).unwrap_or_default());
        at += 1;
    }
    Ok(all)
}

/// The processes that `pid` has started and that run.
pub fn children(pid: i32) -> Result<Vec<i32>> {
    let mut all = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))?.flatten() {
        // a thread that has just ended has none
        let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        all.extend(text.split_ascii_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    Ok(all)
}

/// Processor time of the calling thread.
pub fn thread_cpu() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").context("/proc/thread-self/schedstat")?;
    let number = text.split(' ').next().and_then(|number| number.parse().ok());
    number.map(Duration::from_nanos).with_context(|| format!("/proc/thread-self/schedstat: {text}"))
}

impl Memory {
    /// The guest memory of QEMU process `pid`: its smallest mapping of at least `bytes` bytes.
    pub fn of(pid: i32, bytes: u64) -> Result<Self> {
        let all = Self::all_of(pid, bytes)?;
        let smallest = all.into_iter().min_by_key(|memory| memory.range.end - memory.range.start);
        smallest.with_context(|| format!("process {pid} maps no {bytes} bytes"))
    }

    /// All mappings of process `pid` of at least `bytes` bytes.
    pub fn all_of(pid: i32, bytes: u64) -> Result<Vec<Self>> {
        // SAFETY: takes two integers and no pointer
        let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = Errno::result(number).with_context(|| format!("pidfd_open of process {pid}"))?;
        let fd = i32::try_from(fd).context("pidfd")?;
        // SAFETY: the descriptor is new and nobody else's
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).with_context(|| format!("process {pid}"))?;
        let mut all = Vec::new();
        for range in maps.lines().filter_map(mapping).filter(|range| range.end - range.start >= bytes) {
            let pidfd = pidfd.try_clone().context("pidfd")?;
            all.push(Self { pid: Pid::from_raw(pid), pidfd, range });
        }
        Ok(all)
    }

    /// Where it begins in the process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.range.start
    }

    /// What of it is where.
    pub fn residency(&self) -> Result<Residency> {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.pid)).context("smaps")?;
        residency(&text, self.range.start)
            .with_context(|| format!("process {} no longer maps {:x}", self.pid, self.range.start))
    }

    /// Asks the kernel to read all of it in from swap. It does so before it returns on zram, and begins to on a disk.
    pub fn bring_in(&self) -> Result<()> {
        self.advise(libc::MADV_WILLNEED).context("WILLNEED")
    }

    /// Swaps all of it out until no more than 4 MiB are in RAM, mapped or in the swap cache.
    ///
    /// Pages that were written to a disk stay in the swap cache, where a touch is no major fault and a further
    /// MADV_PAGEOUT does not find them. They are mapped again by reading them, which leaves them clean, and a clean page
    /// goes at once. Not so shared memory, which is dirty again when it is read: of a disk it stays in the swap cache.
    pub fn push_out(&self) -> Result<()> {
        let (before, mut cached, mut left) = (swap_cached()?, 0, Residency::default());
        for _ in 0..TRIES {
            self.advise(libc::MADV_PAGEOUT).context("PAGEOUT")?;
            let settled = Instant::now() + Duration::from_secs(20);
            while meminfo("Writeback")? > 1 << 20 && Instant::now() < settled {
                std::thread::sleep(Duration::from_millis(10));
            }
            cached = swap_cached()?.saturating_sub(before);
            left = self.residency()?;
            if left.mapped_bytes + cached <= LEFT_BYTES {
                return Ok(());
            }
            if cached > LEFT_BYTES / 2 {
                self.read()?;
            }
        }
        bail!(
            "process {} cannot be swapped out: {left:?}, {cached} bytes in the swap cache; is there room in swap?",
            self.pid
        )
    }

    /// Reads a byte of every page, which maps it; untouched ones are mapped to the page of zeros,
    /// or filled with zeros where memory is shared.
    pub fn read(&self) -> Result<()> {
        const BATCH: u64 = 512;
        let mut at = self.range.start;
        let mut bytes = [0; BATCH as usize];
        while at < self.range.end {
            let pages = BATCH.min((self.range.end - at) / PAGE);
            let mut remote = Vec::new();
            for page in 0..pages {
                remote.push(RemoteIoVec { base: usize::try_from(at + page * PAGE)?, len: 1 });
            }
            let mut local = [std::io::IoSliceMut::new(&mut bytes)];
            process_vm_readv(self.pid, &mut local, &remote)
                .with_context(|| format!("cannot read process {}", self.pid))?;
            at += pages * PAGE;
        }
        Ok(())
    }

    fn advise(&self, advice: i32) -> Result<()> {
        let mut at = self.range.start;
        while at < self.range.end {
            let vector = libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(usize::try_from(at)?),
                iov_len: usize::try_from(self.range.end - at)?,
            };
            // SAFETY: the one vector is ours and outlives the call; the addresses in it are the other process's, which the
            // kernel checks, and none of the advice used here changes what is read there
            let done = unsafe {
                libc::syscall(
                    libc::SYS_process_madvise,
                    self.pidfd.as_raw_fd(),
                    &raw const vector,
                    1usize,
                    advice,
                    0u32,
                )
            };
            match Errno::result(done) {
                Ok(0) => bail!("process_madvise of process {} does nothing", self.pid),
                Ok(done) => at += u64::try_from(done)?,
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Err(error) => return Err(error).with_context(|| format!("process_madvise of process {}", self.pid)),
            }
        }
        Ok(())
    }
}

fn meminfo(key: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    kib(&text, key).with_context(|| format!("/proc/meminfo has no {key}"))
}

fn swap_cached() -> Result<u64> {
    meminfo("SwapCached")
}

/// Bytes of the first line `KEY: N kB`.
fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Minor and major faults of `/proc/PID/stat` (proc_pid_stat(5)); a name may hold blanks and brackets.
fn faults(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let words: Vec<_> = rest.split(' ').collect();
    Some((words.get(7)?.parse().ok()?, words.get(9)?.parse().ok()?))
}

/// First and last address of a line that begins a mapping.
fn mapping(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// Figures of the mapping in `smaps` that begins at `start`.
fn residency(smaps: &str, start: u64) -> Option<Residency> {
    let at = smaps.find(&format!("{start:x}-"))?;
    let text = &smaps[at..];
    Some(Residency { mapped_bytes: kib(text, "Rss")?, swapped_bytes: kib(text, "Swap")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_behind_any_name() {
        let stat = "7 (CPU 0/TCG) x) S 1 7 7 0 -1 4194304 100 200 30 40 5 6 0 0 20 0 1 0 9";
        assert_eq!(faults(stat), Some((100, 30)));
        assert_eq!(faults("7 (x) S 1"), None);
    }

    #[test]
    fn residency_is_that_of_the_mapping_asked_for() {
        let smaps = "1000-2000 rw-p 0 00:00 0 \nRss:   1 kB\nSwap:   2 kB\n\
                     50000000-60000000 rw-p 0 00:00 0 \nSize:  262144 kB\nRss:   12 kB\nSwapPss: 9 kB\nSwap:   34 kB\n";
        let expected = Residency { mapped_bytes: 12 << 10, swapped_bytes: 34 << 10 };
        assert_eq!(residency(smaps, 0x5000_0000), Some(expected));
        assert_eq!(residency(smaps, 0x7000_0000), None);
    }
}
