//! Which pages of a process are there and which wait in swap.
//!
//! By `PAGEMAP_SCAN` where the kernel has it, else by reading `/proc/PID/pagemap` entry by entry (Linux
//! Documentation/admin-guide/mm/pagemap.rst). Shared memory that is swapped out has no entry there: its file is asked
//! (mincore(2), and holes by lseek(2)).

mod shared;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::process::{Process, of_process};
use super::{MemoryError, PAGE_BYTES, PageState};
use shared::Shared;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Entries read at once without `PAGEMAP_SCAN`.
const CHUNK: usize = 4096;
/// Regions taken from one `PAGEMAP_SCAN`.
const FOUND: usize = 512;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// The page table of a process, open.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    scans: bool,
    shared: Vec<Shared>,
}

impl Pagemap {
    /// Opens it. What stands at the time is held: a later process with the same number cannot be seen through it.
    ///
    /// # Errors
    /// `Gone`, `NotPermitted`.
    pub fn open(process: &Process) -> Result<Self, MemoryError> {
        let file = File::open(process.proc("pagemap"))
            .map_err(|error| of_process(process.id(), "cannot open its page table", &error))?;
        let mut pagemap = Self { file, scans: true, shared: Vec::new() };
        let mut nothing = [Found::default()];
        let probe = pagemap.scan_once(PAGE_BYTES, 2 * PAGE_BYTES, &mut nothing);
        pagemap.scans = probe.is_ok();
        process.check()?;
        Ok(pagemap)
    }

    /// Whether `PAGEMAP_SCAN` works here.
    #[must_use]
    pub fn scans(&self) -> bool {
        self.scans
    }

    /// Looks for the files behind what the process maps shared at these addresses; to be called anew when it maps others.
    ///
    /// # Errors
    /// `Gone`, `NotPermitted`.
    pub fn find_shared(&mut self, process: &Process, ranges: &[(u64, u64)]) -> Result<(), MemoryError> {
        self.shared = Shared::find(process, ranges)?;
        Ok(())
    }

    /// Tells the state of `pages` pages from address `host` on, in stretches: state, first address, pages.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn states(&self, host: u64, pages: u64, mut tell: impl FnMut(PageState, u64, u64)) -> io::Result<()> {
        let end = host + pages * PAGE_BYTES;
        let mut from = host;
        // stretches of one kind: shared memory has to be asked for twice
        while from < end {
            let shared = self.shared.iter().find(|shared| shared.start <= from && from < shared.end);
            let until = match shared {
                Some(shared) => shared.end.min(end),
                None => {
                    let next = self.shared.iter().map(|shared| shared.start).filter(|&start| start > from).min();
                    next.unwrap_or(end).min(end)
                }
            };
            match shared {
                Some(shared) => {
                    let mut mapped = Vec::new();
                    self.private(from, until, &mut |state, at, pages| {
                        if state == PageState::Present {
                            mapped.push((at, pages));
                        }
                    })?;
                    shared.states(from, until, &mapped, &mut tell)?;
                }
                None => self.private(from, until, &mut tell)?,
            }
            from = until;
        }
        Ok(())
    }

    fn private(&self, start: u64, end: u64, tell: &mut dyn FnMut(PageState, u64, u64)) -> io::Result<()> {
        if self.scans { self.by_scan(start, end, tell) } else { self.by_entry(start, end, tell) }
    }

    fn by_scan(&self, start: u64, end: u64, tell: &mut dyn FnMut(PageState, u64, u64)) -> io::Result<()> {
        let mut found = [Found::default(); FOUND];
        let mut at = start;
        while at < end {
            let (count, walked) = self.scan_once(at, end, &mut found)?;
            for region in &found[..count] {
                if region.start > at {
                    tell(PageState::Absent, at, (region.start - at) / PAGE_BYTES);
                }
                let present = region.categories & PAGE_IS_PRESENT != 0;
                let state = if present { PageState::Present } else { PageState::Swapped };
                tell(state, region.start, (region.end - region.start) / PAGE_BYTES);
                at = region.end;
            }
            let walked = if walked > at {
                walked
            } else if count == 0 {
                end
            } else {
                at
            };
            if walked > at {
                tell(PageState::Absent, at, (walked - at) / PAGE_BYTES);
                at = walked;
            }
        }
        Ok(())
    }

    /// Returns how many regions were found and where the walk ended.
    fn scan_once(&self, start: u64, end: u64, found: &mut [Found]) -> io::Result<(usize, u64)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start,
            end,
            vec: found.as_mut_ptr() as u64,
            vec_len: found.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            ..ScanArg::default()
        };
        // _IOWR('f', 16, struct pm_scan_arg)
        let request = 3 << 30 | (size_of::<ScanArg>() as u64) << 16 | u64::from(b'f') << 8 | 16;
        // SAFETY: the argument and the list it points to live through the call and have the sizes they state.
        let count = unsafe { libc::ioctl(self.file.as_raw_fd(), request as _, &raw mut arg) };
        match usize::try_from(count) {
            Ok(count) => Ok((count.min(found.len()), arg.walk_end)),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn by_entry(&self, start: u64, end: u64, tell: &mut dyn FnMut(PageState, u64, u64)) -> io::Result<()> {
        let mut buffer = vec![0; 8 * CHUNK];
        let mut run: Option<(PageState, u64, u64)> = None;
        let mut page = start / PAGE_BYTES;
        while page < end / PAGE_BYTES {
            let count = (end / PAGE_BYTES - page).min(CHUNK as u64) as usize;
            self.file.read_exact_at(&mut buffer[..8 * count], 8 * page)?;
            for entry in buffer[..8 * count].as_chunks::<8>().0 {
                let entry = u64::from_ne_bytes(*entry);
                let state = if entry & PRESENT != 0 {
                    PageState::Present
                } else if entry & SWAPPED != 0 {
                    PageState::Swapped
                } else {
                    PageState::Absent
                };
                match &mut run {
                    Some((of, _, pages)) if *of == state => *pages += 1,
                    _ => {
                        if let Some((state, at, pages)) = run.replace((state, page * PAGE_BYTES, 1)) {
                            tell(state, at, pages);
                        }
                    }
                }
                page += 1;
            }
        }
        if let Some((state, at, pages)) = run {
            tell(state, at, pages);
        }
        Ok(())
    }

    /// Reads entry by entry from now on, as on a kernel before 6.7.
    #[cfg(test)]
    fn without_scan(&mut self) {
        self.scans = false;
    }
}

#[cfg(test)]
mod tests {
    use super::super::process::identify;
    use super::*;
    use memmap2::MmapMut;
    use std::os::fd::AsFd;

    fn own() -> Process {
        Process::open(identify(std::process::id()).unwrap(), &[std::env::current_exe().unwrap()]).unwrap()
    }

    fn all(pagemap: &Pagemap, host: u64, pages: u64) -> Vec<PageState> {
        let mut states = Vec::new();
        pagemap
            .states(host, pages, |state, at, count| {
                assert_eq!(at, host + states.len() as u64 * PAGE_BYTES, "in order and without gaps");
                states.extend(std::iter::repeat_n(state, count as usize));
            })
            .unwrap();
        assert_eq!(states.len() as u64, pages);
        states
    }

    #[test]
    fn both_ways_tell_the_same_of_touched_and_untouched_pages() {
        const PAGES: usize = 5000;
        let mut map = MmapMut::map_anon(PAGES * 4096).unwrap();
        let _ = map.advise(memmap2::Advice::NoHugePage);
        let touched = |page: usize| page % 7 == 3 || (4100..4300).contains(&page);
        for page in (0..PAGES).filter(|page| touched(*page)) {
            map[page * 4096] = 1;
        }
        let host = map.as_ptr() as u64;
        let mut pagemap = Pagemap::open(&own()).unwrap();
        if !pagemap.scans() {
            eprintln!("skipped: PAGEMAP_SCAN, which this kernel lacks");
        }
        for _ in 0..2 {
            let states = all(&pagemap, host, PAGES as u64);
            for (page, state) in states.iter().enumerate() {
                let expected = if touched(page) { PageState::Present } else { PageState::Absent };
                assert_eq!(*state, expected, "page {page}");
            }
            assert_eq!(all(&pagemap, host + 3 * 4096, 1), [PageState::Present]);
            pagemap.without_scan();
        }
    }

    #[test]
    fn shared_memory_that_nobody_maps_is_cached() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(64 * 4096).unwrap();
        file.write_all_at(&[7; 4096 * 10], 4096 * 20).unwrap();
        // SAFETY: nobody shortens the file.
        let map = unsafe { MmapMut::map_mut(file.as_fd().as_raw_fd()) }.unwrap();
        let host = map.as_ptr() as u64;
        assert_eq!(map[4096 * 25], 7); // maps this and, by fault-around, some near it
        let process = own();
        let mut pagemap = Pagemap::open(&process).unwrap();
        pagemap.find_shared(&process, &[(host, 64 * 4096)]).unwrap();
        let states = all(&pagemap, host, 64);
        assert!(states[..20].iter().chain(&states[30..]).all(|state| *state == PageState::Absent), "{states:?}");
        assert!(
            states[20..30].iter().all(|state| matches!(state, PageState::Cached | PageState::Present)),
            "{states:?}"
        );
        assert_eq!(states[25], PageState::Present);
    }
}
