//! Which pages of its template a clone touches, in which order, by looking at its page table in rounds.
//!
//! A page that a clone has mapped (`/proc/PID/pagemap`, Documentation/admin-guide/mm/pagemap.rst) was touched since the last round, or
//! mapped along: the kernel maps up to 16 neighbours that lie in the page cache with a page that is read. So this errs towards
//! too many neighbours, and the order within a round is that of addresses. Faults captured one by one give
//! [`WorkingSet::of_touches`] the order itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{PAGE_BYTES, WorkingSet};

/// Between two rounds: a slow store answers some ten reads in it.
const ROUND: Duration = Duration::from_millis(20);
/// A round may take this share of the time: a page table of a large machine is long.
const MOST_LOAD: u32 = 20;
/// A guest that touches nothing new for so long has done what it was started for.
const CALM: Duration = Duration::from_secs(2);
/// Present or swapped out (pagemap.rst, bits 63 and 62).
const MAPPED: u64 = 3 << 62;

/// Where a process has a template's memory.
#[derive(Debug)]
pub struct Mapping {
    pagemap: File,
    start: u64,
    pages: u64,
}

impl Mapping {
    /// Finds the process of the machine with this UUID, and in it the mapping of `memory_bytes` from `memory_at` of the file with
    /// this inode (file systems may tell other devices in maps than elsewhere). `None` where there is none.
    ///
    /// # Errors
    /// A process's maps can't be read: another user's, without the right to trace it.
    pub fn find(vm: Uuid, inode: u64, memory_at: u64, memory_bytes: u64) -> io::Result<Option<Self>> {
        let Some(pid) = qemu_of(vm)? else { return Ok(None) };
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let Some(start) = maps.lines().find_map(|line| start_of(line, inode, memory_at, memory_bytes)) else {
            return Ok(None);
        };
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Some(Self { pagemap, start, pages: memory_bytes / PAGE_BYTES }))
    }

    /// Adds the pages that are mapped and not in `seen` to `order`. False when the process is gone.
    fn round(&self, seen: &mut [bool], order: &mut Vec<u64>) -> bool {
        let mut entries = vec![0; 8 << 15];
        let mut page = 0;
        while page < self.pages {
            let most = usize::try_from((self.pages - page) * 8).unwrap_or(usize::MAX).min(entries.len());
            let Ok(read) = self.pagemap.read_at(&mut entries[..most], (self.start / PAGE_BYTES + page) * 8) else {
                return false;
            };
            if read < 8 {
                return false;
            }
            for entry in entries[..read].chunks_exact(8) {
                let bits = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
                let index = usize::try_from(page).unwrap_or(usize::MAX);
                if bits & MAPPED != 0
                    && let Some(seen) = seen.get_mut(index)
                    && !std::mem::replace(seen, true)
                {
                    order.push(page);
                }
                page += 1;
            }
        }
        true
    }

    /// Looks in rounds until the guest is calm, `limit` has passed, the process has ended or `stopped` says so. For a thread of its
    /// own. Begins with what is mapped before the guest runs, if it is called before.
    pub fn record(&self, limit: Duration, stopped: impl Fn() -> bool) -> WorkingSet {
        let mut seen = vec![false; usize::try_from(self.pages).unwrap_or(0)];
        let mut order = Vec::new();
        let began = Instant::now();
        let mut new = began;
        while began.elapsed() < limit && new.elapsed() < CALM && !stopped() {
            let (round, before) = (Instant::now(), order.len());
            if !self.round(&mut seen, &mut order) {
                break;
            }
            if order.len() > before {
                new = Instant::now();
            }
            thread::sleep(ROUND.max(round.elapsed() * MOST_LOAD));
        }
        WorkingSet::of_touches(order)
    }
}

/// The process whose command line has `-uuid` and this UUID, as libvirt writes it.
fn qemu_of(vm: Uuid) -> io::Result<Option<u32>> {
    let wanted = vm.to_string();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let mut words = line.split(|&b| b == 0);
        if words.any(|word| word == b"-uuid") && words.next() == Some(wanted.as_bytes()) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// The address of a line of `/proc/PID/maps` if it maps all of the memory: `start-end perms offset major:minor inode path`.
fn start_of(line: &str, inode: u64, memory_at: u64, memory_bytes: u64) -> Option<u64> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let offset = hex(words.nth(1)?)?;
    let found: u64 = words.nth(1)?.parse().ok()?;
    (found == inode && offset == memory_at && end - start >= memory_bytes).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_known_by_file_and_offset() {
        let line = "7f44f3dff000-7f4503dff000 rw-p 00100000 fe:00 5669685                    /var/lib/x/state";
        let start = |at, bytes, inode| start_of(line, inode, at, bytes);
        assert_eq!(start(1 << 20, 256 << 20, 5_669_685), Some(0x7f44_f3df_f000));
        assert_eq!(start(0, 256 << 20, 5_669_685), None);
        assert_eq!(start(1 << 20, 257 << 20, 5_669_685), None);
        assert_eq!(start(1 << 20, 256 << 20, 1), None);
        assert_eq!(start_of("7f44f3dff000-7f4503dff000 rw-p", 1, 0, 1), None);
    }

    #[test]
    fn touches_of_this_process_come_in_rounds() {
        use std::sync::mpsc;
        let file = tempfile::tempfile().unwrap();
        file.set_len(256 * PAGE_BYTES).unwrap();
        let mut map = Map::new(&file, 256);
        map.write(200);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mapping = Mapping { pagemap, start: map.start(), pages: 256 };
        let (mut seen, mut order) = (vec![false; 256], Vec::new());
        assert!(mapping.round(&mut seen, &mut order));
        assert!(order.contains(&200), "{order:?}");
        let first = order.len();
        map.write(3);
        assert!(mapping.round(&mut seen, &mut order));
        assert!(order[first..].contains(&3) && !order[first..].contains(&200), "{order:?}");
        // ends when told
        let (sender, receiver) = mpsc::channel::<()>();
        drop(sender);
        let set =
            mapping.record(Duration::from_secs(3600), || receiver.try_recv() == Err(mpsc::TryRecvError::Disconnected));
        assert_eq!(set.pages(), 0);
    }

    /// A private mapping.
    struct Map(std::ptr::NonNull<std::ffi::c_void>, usize);

    impl Map {
        fn new(file: &File, pages: usize) -> Self {
            use nix::sys::mman::{MapFlags, ProtFlags, mmap};
            let length = std::num::NonZeroUsize::new(pages * 4096).unwrap();
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let map = unsafe { mmap(None, length, protection, MapFlags::MAP_PRIVATE, file, 0) };
            Self(map.unwrap(), pages)
        }

        fn start(&self) -> u64 {
            self.0.as_ptr() as u64
        }

        fn write(&mut self, page: usize) {
            assert!(page < self.1);
            // SAFETY: within the mapping, by the line above.
            let at = unsafe { self.0.as_ptr().cast::<u8>().add(page * 4096) };
            // SAFETY: as above; nobody else uses it.
            unsafe { at.write_volatile(1) };
        }
    }

    impl Drop for Map {
        fn drop(&mut self) {
            // SAFETY: the whole mapping, which nobody uses any more.
            let _ = unsafe { nix::sys::mman::munmap(self.0, self.1 * 4096) };
        }
    }
}
