//! Reads a template's pages into the host's page cache: what a clone needs first ahead of it, the rest behind it.
//!
//! `posix_fadvise(WILLNEED)` queues reads and does not wait for them (mm/readahead.c): one thread keeps a slow store as busy as 32
//! threads that read (27 MiB in pieces of 64 KiB from a store that answers after 2 ms: .21 s either way, 1.22 s one after the
//! other), without their buffers. It needs nothing but leave to read the file.
//!
//! io_uring was measured beside it and is no faster: 80 MiB of a set from the store of `bench template` (2 ms a read) are there after .19 s
//! by fadvise, in 335 reads and 19 ms of processor time, and after .31 s by 64 reads of 128 KiB in flight in a ring, in 576 reads and
//! 37 ms (medians of 9, two cores): the kernel's own readahead splits and merges better than its caller. A clone's first answer
//! came after 1.23 and 1.21 s (medians of 5; all resident: 1.21).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// What is read behind a clone, a step at a time: small beside what a store moves in the time a guest waits for a page.
const STEP_BYTES: u64 = 1 << 20;
/// Bytes a second behind a clone: a tenth of what a plain SSD gives.
pub const REST_BYTES_PER_SEC: u64 = 50 << 20;
/// After a clone's start the store is the guest's alone for so long: most have answered by then.
pub const REST_AFTER: Duration = Duration::from_secs(5);
/// How often a pause looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// The host keeps this share of its memory free of what no guest has asked for.
const KEPT_FREE: u64 = 10;

/// Steps behind a clone that fail one after the other before the file counts as unreadable.
const MOST_ERRORS: u32 = 16;

/// How far reading is. Read and stopped from other threads.
#[derive(Debug, Default)]
pub struct Progress {
    needed: AtomicU64,
    needed_bytes: AtomicU64,
    rest: AtomicU64,
    rest_bytes: AtomicU64,
    read_errors: AtomicU64,
    stopped: AtomicBool,
    ended: OnceLock<Ended>,
}

/// Why nothing is read any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All is read, but for steps that failed.
    Whole,
    Stopped,
    /// The host has little memory left.
    NoRoom,
    /// Sixteen steps in a row could not be read, or none at all.
    Unreadable,
}

/// A look at a [`Progress`]; all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Far {
    /// Of the working set: asked for, and in all.
    pub needed: u64,
    pub needed_bytes: u64,
    /// Of the rest: read, and in all.
    pub rest: u64,
    pub rest_bytes: u64,
    /// Steps of the rest that could not be read; the clone waits for their pages, or finds the error itself.
    pub read_errors: u64,
    /// Nothing is read any more, and why.
    pub ended: Option<Ended>,
}

impl Progress {
    #[must_use]
    pub fn look(&self) -> Far {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        Far {
            needed: get(&self.needed),
            needed_bytes: get(&self.needed_bytes),
            rest: get(&self.rest),
            rest_bytes: get(&self.rest_bytes),
            read_errors: get(&self.read_errors),
            ended: self.ended.get().copied(),
        }
    }

    /// Says what the rest will be.
    pub(super) fn expect(&self, rest: &[Range<u64>]) {
        self.rest_bytes.store(length(rest), Ordering::Relaxed);
    }

    /// Has reading end at the next step.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Says that nothing is read any more. The first reason stays.
    pub fn end(&self, why: Ended) {
        let _ = self.ended.set(why);
    }
}

fn length(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end.saturating_sub(range.start)).sum()
}

fn advise(file: &File, range: &Range<u64>) -> io::Result<()> {
    let number = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let (at, bytes) = (number(range.start)?, number(range.end.saturating_sub(range.start))?);
    posix_fadvise(file.as_fd(), at, bytes, PosixFadviseAdvice::POSIX_FADV_WILLNEED).map_err(io::Error::from)
}

/// Asks for ranges in their order. Returns when the store has them in its queue, which bounds how far this is ahead.
///
/// # Errors
/// The file can't be read ahead (a pipe, say).
pub fn ahead(file: &File, ranges: &[Range<u64>], progress: &Progress) -> io::Result<()> {
    progress.needed_bytes.store(length(ranges), Ordering::Relaxed);
    for range in ranges {
        if progress.is_stopped() {
            break;
        }
        advise(file, range)?;
        progress.needed.fetch_add(range.end.saturating_sub(range.start), Ordering::Relaxed);
    }
    Ok(())
}

/// The ranges of a file's part that hold data and are not in `without`.
///
/// # Errors
/// The file can't be looked at.
pub fn rest(file: &File, part: Range<u64>, without: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    let mut without: Vec<_> = without.to_vec();
    without.sort_by_key(|range| range.start);
    let mut rest = Vec::new();
    for data in data_in(file, part)? {
        let mut at = data.start;
        let first = without.partition_point(|range| range.end <= data.start);
        for taken in without[first..].iter().take_while(|range| range.start < data.end) {
            if at < taken.start {
                rest.push(at..taken.start);
            }
            at = at.max(taken.end);
        }
        if at < data.end {
            rest.push(at..data.end);
        }
    }
    Ok(rest)
}

/// The parts of a range that are no holes. A file system that knows no holes has data throughout.
fn data_in(file: &File, part: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    use nix::errno::Errno;
    use nix::unistd::{Whence, lseek};
    let seek = |at: u64, whence| lseek(file, i64::try_from(at).unwrap_or(i64::MAX), whence);
    let (mut found, mut at) = (Vec::new(), part.start);
    while at < part.end {
        let start = match seek(at, Whence::SeekData) {
            Ok(start) => start.unsigned_abs(),
            Err(Errno::ENXIO) => break, // no data behind
            Err(_) => return Ok(vec![part]),
        };
        if start >= part.end {
            break;
        }
        let end = seek(start, Whence::SeekHole)?.unsigned_abs().min(part.end);
        found.push(start..end);
        at = end;
    }
    Ok(found)
}

/// Waits for [`REST_AFTER`], or until it is stopped.
pub fn pause(progress: &Progress) {
    let until = Instant::now() + REST_AFTER;
    while !progress.is_stopped() && Instant::now() < until {
        thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
    }
}

/// Reads ranges behind a clone at `bytes_per_sec`, until it is done, stopped, or the host has little memory left, and says which. A
/// step of a MiB that can't be read is counted and passed over. For a thread of its own at idle I/O priority, which a store that
/// several use honours.
pub fn behind(file: &File, ranges: &[Range<u64>], bytes_per_sec: u64, progress: &Progress) -> Ended {
    progress.expect(ranges);
    let pause = Duration::from_secs(1).mul_f64(STEP_BYTES as f64 / bytes_per_sec.max(1) as f64);
    let mut buffer = vec![0; 128 << 10];
    let mut due = Instant::now();
    let mut errors = 0;
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            if progress.is_stopped() {
                return Ended::Stopped;
            }
            if !has_room() {
                return Ended::NoRoom;
            }
            let end = range.end.min(at.saturating_add(STEP_BYTES));
            match step(file, at..end, &mut buffer, &progress.rest) {
                Ok(()) => errors = 0,
                Err(error) => {
                    tracing::debug!(%error, at, "a part of a template can't be read");
                    progress.read_errors.fetch_add(1, Ordering::Relaxed);
                    errors += 1;
                }
            }
            if errors == MOST_ERRORS {
                return Ended::Unreadable;
            }
            at = end;
            due = due.max(Instant::now() - pause) + pause;
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    Ended::Whole
}

/// Asked for in one piece and waited for, so that one request at most stands in a guest's way.
fn step(file: &File, part: Range<u64>, buffer: &mut [u8], read: &AtomicU64) -> io::Result<()> {
    advise(file, &part)?;
    let mut at = part.start;
    while at < part.end {
        let most = usize::try_from(part.end - at).unwrap_or(usize::MAX).min(buffer.len());
        match file.read_at(&mut buffer[..most], at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()), // cut meanwhile
            bytes => {
                at += bytes as u64;
                read.fetch_add(bytes as u64, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// Whether the host has memory for pages that nobody has asked for.
fn has_room() -> bool {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return true };
    let kib = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    match (kib("MemTotal:"), kib("MemAvailable:")) {
        (Some(total), Some(available)) => available > total / KEPT_FREE,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; usize::try_from(bytes).unwrap()], 0).unwrap();
        file
    }

    #[test]
    fn the_rest_is_what_holds_data_and_is_not_needed_first() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[7; 1 << 20], 4 << 20).unwrap();
        let k = 1024_u64;
        let needed = [(4096 + 512) * k..(4096 + 600) * k, 4100 * k..4108 * k];
        let expected = [4096 * k..4100 * k, 4108 * k..(4096 + 512) * k, (4096 + 600) * k..5120 * k];
        let found = rest(&file, 0..64 << 20, &needed).unwrap();
        if found.first().is_some_and(|range| range.start == 0) {
            eprintln!("skipped: the folder for temporary files is on a file system without holes");
            return;
        }
        assert_eq!(found, expected);
        assert_eq!(rest(&file, 0..4 << 20, &[]).unwrap(), []);
    }

    #[test]
    fn reading_counts_and_stops() {
        let file = file(3 << 20);
        let progress = Progress::default();
        ahead(&file, &[1 << 20..2 << 20, 0..4096], &progress).unwrap();
        let ended = behind(&file, &[4096..1 << 20, 2 << 20..3 << 20], u64::MAX, &progress);
        assert_eq!(ended, Ended::Whole);
        let far = progress.look();
        assert_eq!((far.needed, far.needed_bytes), ((1 << 20) + 4096, (1 << 20) + 4096));
        assert_eq!((far.rest, far.rest_bytes), ((2 << 20) - 4096, (2 << 20) - 4096));
        let stopped = Progress::default();
        stopped.stop();
        assert_eq!(behind(&file, &[0..1 << 20, 2 << 20..3 << 20], 1, &stopped), Ended::Stopped);
        assert_eq!((stopped.look().rest, stopped.look().ended), (0, None));
        stopped.end(Ended::Stopped);
        stopped.end(Ended::Whole);
        assert_eq!(stopped.look().ended, Some(Ended::Stopped));
    }

    #[test]
    fn what_can_not_be_read_is_counted_and_passed_over() {
        let file = file(2 << 20);
        // one step of three lies behind the end
        let progress = Progress::default();
        let ranges = [0..1 << 20, 8 << 20..9 << 20, 1 << 20..2 << 20];
        assert_eq!(behind(&file, &ranges, u64::MAX, &progress), Ended::Whole);
        assert_eq!((progress.look().rest, progress.look().read_errors), (2 << 20, 1));
        let progress = Progress::default();
        assert_eq!(behind(&file, &[8 << 20..108 << 20, 0..1 << 20], u64::MAX, &progress), Ended::Unreadable);
        assert_eq!((progress.look().rest, progress.look().read_errors), (0, 16));
    }
}
