//! Shared guest memory (memfd, tmpfs, a file): its pages as the file has them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use crate::memory::process::{Process, of_process};
use crate::memory::{MemoryError, PAGE_BYTES, PageState};

/// Pages asked for at once: 16 MiB.
const CHUNK: u64 = 4096;

/// A stretch of the process that maps a file shared.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) start: u64,
    pub(super) end: u64,
    offset: u64,
    file: File,
    /// mincore(2) tells the truth: to others than the owner and those who may write it says that all is in memory.
    told: bool,
}

impl Shared {
    /// The shared mappings that overlap `ranges` (address, bytes), with files of their own.
    pub(super) fn find(process: &Process, ranges: &[(u64, u64)]) -> Result<Vec<Self>, MemoryError> {
        let failed = |what: &str, error: &io::Error| of_process(process.id(), what, error);
        let maps =
            fs::read_to_string(process.proc("maps")).map_err(|error| failed("cannot read its mappings", &error))?;
        let wanted = |mapping: &Mapping| {
            ranges.iter().any(|&(start, bytes)| mapping.start < start + bytes && start < mapping.end)
        };
        let mut found = Vec::new();
        for mapping in maps.lines().filter_map(Mapping::parse).filter(|mapping| mapping.shared && wanted(mapping)) {
            // by number, not by path: a memfd has none, and a path may lead elsewhere by now
            let folder = fs::read_dir(process.proc("fd")).map_err(|error| failed("cannot list its files", &error))?;
            let of_mapping = folder.flatten().find(|entry| {
                fs::metadata(entry.path())
                    .is_ok_and(|file| (device(file.dev()), file.ino()) == (mapping.device, mapping.inode))
            });
            // QEMU keeps the file open; whoever does not has memory that only its page table tells of
            let Some(entry) = of_mapping else { continue };
            // what stands there by now may be something that an open waits for
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(entry.path());
            let file = file.map_err(|error| failed("cannot open its shared memory", &error))?;
            let same =
                file.metadata().is_ok_and(|file| (device(file.dev()), file.ino()) == (mapping.device, mapping.inode));
            if same {
                let told = is_told(&file);
                found.push(Self { start: mapping.start, end: mapping.end, offset: mapping.offset, file, told });
            }
        }
        process.check()?;
        Ok(found)
    }

    /// `mapped`: what the process has in its page table, ascending.
    pub(super) fn states(
        &self,
        start: u64,
        end: u64,
        mapped: &[(u64, u64)],
        tell: &mut dyn FnMut(PageState, u64, u64),
    ) -> io::Result<()> {
        let size = self.file.metadata()?.len();
        let mut mapped = mapped.iter().copied().peekable();
        let mut from = start;
        while from < end {
            let pages = ((end - from) / PAGE_BYTES).min(CHUNK);
            let incore = self.incore(self.offset + (from - self.start), pages, size)?;
            let mut run: Option<(PageState, u64, u64)> = None;
            for page in 0..pages {
                let at = from + page * PAGE_BYTES;
                while mapped.next_if(|&(start, count)| start + count * PAGE_BYTES <= at).is_some() {}
                let is_mapped = mapped.peek().is_some_and(|&(start, _)| start <= at);
                let state = if is_mapped { PageState::Present } else { incore[page as usize] };
                match &mut run {
                    Some((of, _, count)) if *of == state => *count += 1,
                    _ => {
                        if let Some((state, at, count)) = run.replace((state, at, 1)) {
                            tell(state, at, count);
                        }
                    }
                }
            }
            if let Some((state, at, count)) = run {
                tell(state, at, count);
            }
            from += pages * PAGE_BYTES;
        }
        Ok(())
    }

    /// What the file says: in memory, in swap (or on its disk), or a hole.
    fn incore(&self, offset: u64, pages: u64, size: u64) -> io::Result<Vec<PageState>> {
        let mut states = vec![PageState::Absent; pages as usize];
        // a file that was cut short has nothing behind its end, and a mapping of that would say nothing
        let pages = pages.min(size.saturating_sub(offset).div_ceil(PAGE_BYTES));
        if pages == 0 {
            return Ok(states);
        }
        let bytes = (pages * PAGE_BYTES) as usize;
        let mut told = vec![0_u8; pages as usize];
        // SAFETY: a new mapping anywhere; it is only asked about, never read.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED,
                self.file.as_raw_fd(),
                offset as i64,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping has `bytes` bytes and `told` a byte for each of its pages.
        let done = unsafe { libc::mincore(map, bytes, told.as_mut_ptr()) };
        let error = io::Error::last_os_error();
        // SAFETY: made above, and nothing points into it.
        unsafe { libc::munmap(map, bytes) };
        if done != 0 {
            return Err(error);
        }
        let mut at = offset;
        let end = offset + pages * PAGE_BYTES;
        while at < end {
            let Some(data) = self.seek(at, libc::SEEK_DATA)? else { break };
            let Some(hole) = self.seek(data, libc::SEEK_HOLE)? else { break };
            let first = data.max(offset).saturating_sub(offset) / PAGE_BYTES;
            let last = hole.min(end).saturating_sub(offset).div_ceil(PAGE_BYTES);
            for page in first..last {
                let page = page as usize;
                // who is not told takes it for swapped: to bring in what is there costs next to nothing
                let cached = self.told && told[page] & 1 == 1;
                states[page] = if cached { PageState::Cached } else { PageState::Swapped };
            }
            at = hole.max(at + PAGE_BYTES);
        }
        Ok(states)
    }

    fn seek(&self, from: u64, whence: i32) -> io::Result<Option<u64>> {
        // SAFETY: takes numbers only.
        let at = unsafe { libc::lseek(self.file.as_raw_fd(), from as i64, whence) };
        match u64::try_from(at) {
            Ok(at) => Ok(Some(at)),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    }
}

/// A line of `/proc/PID/maps` (proc_pid_maps(5)).
#[derive(Debug, PartialEq)]
struct Mapping {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    device: (u32, u32),
    inode: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let shared = fields.next()?.as_bytes().get(3) == Some(&b's');
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?);
        Some(Self { start: hex(start)?, end: hex(end)?, shared, offset, device, inode: fields.next()?.parse().ok()? })
    }
}

fn device(number: u64) -> (u32, u32) {
    (libc::major(number), libc::minor(number))
}

/// Whether mincore(2) tells this process what of a file is in memory (`can_do_mincore` in mm/mincore.c).
fn is_told(file: &File) -> bool {
    let owned = file.metadata().is_ok_and(|file| file.uid() == nix::unistd::geteuid().as_raw());
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    owned
        || nix::unistd::faccessat(
            nix::fcntl::AT_FDCWD,
            path.as_str(),
            nix::unistd::AccessFlags::W_OK,
            nix::fcntl::AtFlags::AT_EACCESS,
        )
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read() {
        let line = "7f1c1be00000-7f1c3be00000 rw-s 00200000 00:01 1042   /memfd:memory-backend-memfd (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.start, mapping.end), (0x7f1c_1be0_0000, 0x7f1c_3be0_0000));
        assert_eq!((mapping.shared, mapping.offset, mapping.device, mapping.inode), (true, 0x20_0000, (0, 1), 1042));
        assert!(!Mapping::parse("1000-2000 rw-p 00000000 00:00 0").unwrap().shared);
        for odd in ["", "1000", "x-y rw-p 0 0:0 0", "1000-2000 rw-p 0 0 0"] {
            assert_eq!(Mapping::parse(odd), None, "{odd}");
        }
    }

    #[test]
    fn who_is_not_told_what_is_in_memory_takes_it_for_swapped() {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), vec![1; 3 * PAGE_BYTES as usize]).unwrap();
        let file = File::open(path.path()).unwrap();
        assert!(is_told(&file), "its owner");
        let shared = |told| Shared { start: 0, end: 4 * PAGE_BYTES, offset: 0, file: file.try_clone().unwrap(), told };
        let states = |told| shared(told).incore(0, 4, 3 * PAGE_BYTES).unwrap();
        assert_eq!(states(true), [PageState::Cached, PageState::Cached, PageState::Cached, PageState::Absent]);
        assert_eq!(states(false), [PageState::Swapped, PageState::Swapped, PageState::Swapped, PageState::Absent]);
    }
}
