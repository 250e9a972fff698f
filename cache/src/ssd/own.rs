//! When we last wrote to a store: kept where a killed process leaves it, so that its successor can tell our own writes
//! from somebody else's by the store's times.
//!
//! A shared mapping of a small file in the run directory. It survives SIGKILL, since the kernel has it; after a reboot it
//! says nothing (another boot identity). Leaf module: the mapping is read and written here.
//!
//! ```text
//! header (64): [16] magic  [16] slab identity  [16] boot identity  i64 CLOCK_REALTIME ns  i64 CLOCK_BOOTTIME ns
//! then for each entry of the storage table (32): u64 epoch  i64 last write, CLOCK_REALTIME ns  u64 writes under way  u64 0
//! ```
//! **What it can tell.** The kernel stamps a file with a time that is never ahead of the clock (`current_time()` in
//! `fs/inode.c`), so that every change that is ours has a time at or before the end of our last write. Any later time is
//! another's. Exceptions, all on the side of dropping what is cached: a file system whose times come from another
//! clock (on a network) is not asked; a clock that jumped while we were away makes every answer a no. While a write of
//! ours was under way when we were killed, its time may be a little later than we know: [`GRACE`].

use super::Stamp;
use super::format::{SlabId, TABLE_ENTRIES};
use memmap2::MmapRaw;
use nix::time::{ClockId, clock_gettime};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const MAGIC: [u64; 2] = [u64::from_le_bytes(*b"PRESTAGE"), u64::from_le_bytes(*b"-OWN\r\n\x1a\x01")];
const HEADER_WORDS: usize = 8;
const ENTRY_WORDS: usize = 4;
const WORDS: usize = HEADER_WORDS + TABLE_ENTRIES * ENTRY_WORDS;
/// From our look at the clock to the kernel's, for a write that was under way when we were killed. Whoever else writes
/// to the store within this time of our own write is not told from us, no more than while we serve it.
const GRACE: Duration = Duration::from_millis(50);
/// Clocks are disciplined by less than a thousandth; more than that and this is a jump.
const JUMP: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct OwnWrites {
    /// `None`: nothing outlives the process, and nothing is known of an earlier one.
    map: Option<MmapRaw>,
    /// The file is of this boot and this slab, and no clock has jumped since it was last written.
    knows: bool,
    /// Tests' stores have times of their own: whether a change of the same file is ours.
    #[cfg(test)]
    says: Option<bool>,
}

fn now_ns(clock: ClockId) -> u64 {
    // These clocks cannot fail; a time of zero makes nothing ours.
    clock_gettime(clock).map_or(0, |t| u64::try_from(Duration::from(t).as_nanos()).unwrap_or(u64::MAX))
}

fn boot_id() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| digits.get(range).and_then(|half| u64::from_str_radix(half, 16).ok()).unwrap_or(0);
    [half(0..16), half(16..32)]
}

fn words_of(slab_id: &SlabId) -> [u64; 2] {
    let mut halves = slab_id.chunks_exact(8).map(|half| half.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)));
    [halves.next().unwrap_or(0), halves.next().unwrap_or(0)]
}

impl OwnWrites {
    pub(super) fn none() -> OwnWrites {
        OwnWrites {
            map: None,
            knows: false,
            #[cfg(test)]
            says: None,
        }
    }

    /// One that calls every change of the same file ours, or none.
    #[cfg(test)]
    pub(super) fn saying(ours: bool) -> OwnWrites {
        OwnWrites { says: Some(ours), ..OwnWrites::none() }
    }

    /// Maps the file, made anew unless it is of this boot and slab.
    pub(super) fn open(path: &Path, slab_id: &SlabId) -> io::Result<OwnWrites> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let len = (WORDS * 8) as u64;
        // Allocated: a file system that runs full would otherwise kill us with SIGBUS at the first write.
        match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, len as i64) {
            Ok(()) => {}
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => file.set_len(len)?,
            Err(errno) => return Err(errno.into()),
        }
        let map = memmap2::MmapOptions::new().len(WORDS * 8).map_raw(&file)?;
        let mut own = OwnWrites { map: Some(map), ..OwnWrites::none() };
        let boot = boot_id();
        let header: Vec<u64> = (0..HEADER_WORDS).map(|at| own.load(at)).collect();
        let (real, up) = (now_ns(ClockId::CLOCK_REALTIME), now_ns(ClockId::CLOCK_BOOTTIME));
        let drift = real.saturating_sub(header[6]).abs_diff(up.saturating_sub(header[7]));
        let allowed = JUMP.as_nanos() as u64 + up.saturating_sub(header[7]) / 1000;
        let same = header[..2] == MAGIC && header[2..4] == words_of(slab_id) && header[4..6] == boot && boot != [0, 0];
        own.knows = same && real >= header[6] && drift <= allowed;
        if !own.knows {
            own.renew(slab_id);
        }
        Ok(own)
    }

    /// Whether anything is known of an earlier run.
    pub(super) fn knows(&self) -> bool {
        self.knows
    }

    /// Forgets everything; from here on it is about `slab_id`.
    pub(super) fn renew(&self, slab_id: &SlabId) {
        (0..WORDS).for_each(|at| self.store(at, 0));
        let (boot, id) = (boot_id(), words_of(slab_id));
        self.tick();
        for (at, word) in [boot[0], boot[1]].into_iter().enumerate() {
            self.store(4 + at, word);
        }
        for (at, word) in id.into_iter().enumerate() {
            self.store(2 + at, word);
        }
        // Last: with the magic number it counts.
        MAGIC.into_iter().enumerate().for_each(|(at, word)| self.store(at, word));
    }

    /// Notes how the clocks stand to each other, by which a jump is seen later.
    pub(super) fn tick(&self) {
        self.store(6, now_ns(ClockId::CLOCK_REALTIME));
        self.store(7, now_ns(ClockId::CLOCK_BOOTTIME));
    }

    fn word(&self, at: usize) -> Option<&AtomicU64> {
        let map = self.map.as_ref()?;
        if at >= WORDS {
            return None;
        }
        // SAFETY: the mapping is `WORDS * 8` bytes long and lives as long as `self`, `at` lies within, and a page-aligned
        // address plus a multiple of 8 is aligned for a u64. All access, here and in other processes, is by atomics of 64
        // bits; any bit pattern is a u64.
        Some(unsafe { &*map.as_mut_ptr().cast::<AtomicU64>().wrapping_add(at) })
    }

    fn load(&self, at: usize) -> u64 {
        self.word(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    fn entry(index: u16) -> usize {
        HEADER_WORDS + usize::from(index) * ENTRY_WORDS
    }

    /// A write to the store is about to be submitted.
    pub(super) fn begin(&self, index: u16, epoch: u64) {
        let at = OwnWrites::entry(index);
        if self.load(at) != epoch {
            self.store(at, 0);
            (1..ENTRY_WORDS).for_each(|word| self.store(at + word, 0));
            self.store(at, epoch);
        }
        if let Some(under_way) = self.word(at + 2) {
            under_way.fetch_add(1, Ordering::AcqRel);
        }
        self.raise(at + 1, now_ns(ClockId::CLOCK_REALTIME));
    }

    /// It has come back.
    pub(super) fn end(&self, index: u16, epoch: u64) {
        let at = OwnWrites::entry(index);
        if self.load(at) != epoch {
            return;
        }
        // The time before the count: a kill in between must not make the last write look like another's.
        self.raise(at + 1, now_ns(ClockId::CLOCK_REALTIME));
        if let Some(under_way) = self.word(at + 2) {
            let _ = under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        }
    }

    fn raise(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at) {
            word.fetch_max(value, Ordering::AcqRel);
        }
    }

    /// Whether a store that looked like `was` and looks like `now` was changed by nobody but an earlier run of ours.
    /// What that run had under way is over: asked once, when the store is registered.
    pub(super) fn explains(&self, index: u16, epoch: u64, was: Option<Stamp>, now: Option<Stamp>) -> bool {
        #[cfg(test)]
        if let Some(says) = self.says {
            return says && was.map(|stamp| stamp.inode) == now.map(|stamp| stamp.inode);
        }
        let at = OwnWrites::entry(index);
        let (Some(was), Some(now), true) = (was, now, self.knows && self.load(at) == epoch) else { return false };
        // An image grows by our writes; by those of others its times would be later too.
        let same = (was.inode, was.device) == (now.inode, now.device);
        let under_way = self.load(at + 2) > 0;
        let limit = self.load(at + 1).saturating_add(if under_way { GRACE.as_nanos() as u64 } else { 0 });
        let times = [now.mtime_ns, now.ctime_ns];
        let explained = same && times.iter().all(|t| u64::try_from(*t).is_ok_and(|t| t <= limit));
        if explained {
            self.store(at + 2, 0);
            times.iter().for_each(|t| self.raise(at + 1, u64::try_from(*t).unwrap_or(0)));
        }
        explained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SlabId = *b"0123456789abcdef";

    fn stamp(ns: u64) -> Option<Stamp> {
        Some(Stamp { size_bytes: 1, mtime_ns: ns as i64, ctime_ns: ns as i64, inode: 2, device: 3 })
    }

    #[test]
    fn a_successor_knows_our_writes_from_another_s() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own");
        let own = OwnWrites::open(&path, &ID).unwrap();
        let before = now_ns(ClockId::CLOCK_REALTIME);
        own.begin(5, 77);
        own.end(5, 77);
        own.begin(6, 78);
        let after = now_ns(ClockId::CLOCK_REALTIME);
        drop(own);
        let own = OwnWrites::open(&path, &ID).unwrap();
        let grace = GRACE.as_nanos() as u64;
        assert!(own.explains(5, 77, stamp(1), stamp(before)));
        let grown = stamp(before).map(|stamp| Stamp { size_bytes: 2, ..stamp });
        assert!(own.explains(5, 77, stamp(1), grown));
        assert!(!own.explains(5, 77, stamp(1), stamp(after + 1)), "somebody wrote after us");
        assert!(!own.explains(5, 76, stamp(1), stamp(before)), "of an earlier owner of the entry");
        assert!(!own.explains(4, 0, stamp(1), stamp(before)), "never written");
        assert!(!own.explains(5, 77, None, stamp(before)) && !own.explains(5, 77, stamp(1), None));
        let other = stamp(before).map(|stamp| Stamp { inode: 9, ..stamp });
        assert!(!own.explains(5, 77, stamp(1), other), "another file in its place");
        assert!(!own.explains(6, 78, stamp(1), stamp(after + grace + 1)));
        assert!(own.explains(6, 78, stamp(1), stamp(before + grace)), "under way when we were killed");
        assert!(!own.explains(6, 78, stamp(1), stamp(before + 2 * grace)), "the grace is given once");
    }

    #[test]
    fn another_slab_boot_or_clock_knows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("own");
        let write = || {
            let own = OwnWrites::open(&path, &ID).unwrap();
            own.begin(1, 5);
            own.end(1, 5);
            own
        };
        let known = |id: &SlabId| OwnWrites::open(&path, id).unwrap().explains(1, 5, stamp(1), stamp(1));
        drop(write());
        assert!(known(&ID));
        assert!(!known(b"another slab's.."));
        assert!(!known(&ID), "and it was made anew");
        for word in [0, 1, 2, 4, 5] {
            let own = write();
            own.store(word, own.load(word) ^ 1);
            assert!(!known(&ID), "word {word}");
        }
        for jump in [3_600_000_000_000i64, -3_600_000_000_000] {
            let own = write();
            own.store(6, own.load(6).wrapping_add_signed(jump));
            assert!(!known(&ID), "the clock was set by {jump} ns");
        }
        std::fs::write(&path, b"short").unwrap();
        assert!(!known(&ID));
        drop(write());
        assert!(known(&ID));
        assert!(!OwnWrites::none().explains(1, 5, stamp(1), stamp(1)));
    }
}
