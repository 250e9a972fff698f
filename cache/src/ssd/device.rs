//! The slab's file or block device: opening it alone, its length, and aligned blocking I/O for metadata.
//!
//! Data slots are read and written elsewhere, through the same descriptor. One of the leaf modules with `unsafe`.

use super::SsdError;
use super::format::SECTOR_BYTES;
use crate::engine::aside::{OpenMark, close_aside};
use crate::engine::blocks_in_kernel;
use crate::opener::{self, How};
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use std::fs::{File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// udev holds a shared lock on a block device for moments while it probes it; so many tries, this far apart.
const LOCK_TRIES: u32 = 20;
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// What anybody but its user may do with a file.
const OTHERS: u32 = 0o077;

/// Bytes that start at a multiple of 4096 in memory, as direct I/O wants them.
pub(super) struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    pub(super) fn zeroed(len: usize) -> AlignedBuf {
        let bytes = vec![0; len + SECTOR_BYTES];
        let start = bytes.as_ptr().align_offset(SECTOR_BYTES).min(SECTOR_BYTES);
        AlignedBuf { bytes, start, len }
    }
    pub(super) fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
    pub(super) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// What tests see of the order of writes.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, Vec<u8>),
    Sync,
}

pub(super) struct Device {
    /// Taken by `drop` alone.
    pub(super) file: ManuallyDrop<File>,
    /// Whoever has a descriptor of it has a clone of this.
    pub(super) open: OpenMark,
    /// Reads, writes and syncs that have ended, well or not.
    pub(super) ended: AtomicU64,
    pub(super) path: PathBuf,
    pub(super) is_block_device: bool,
    pub(super) is_direct: bool,
    /// See [`blocks_in_kernel`].
    pub(super) runs_aside: bool,
    /// Made by this process: removed again if it cannot be used.
    created: bool,
    #[cfg(test)]
    pub(super) log: parking_lot::Mutex<Vec<Op>>,
    #[cfg(test)]
    pub(super) fail_writes: std::sync::atomic::AtomicBool,
    /// Takes the place of the file.
    #[cfg(test)]
    sim: Option<std::sync::Arc<dyn super::tests::Simulated>>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Device {
    /// Opens or creates the file, or opens the block device, and locks it against other daemons.
    pub(super) fn open(path: &Path, direct: bool) -> Result<Device, SsdError> {
        let failed = |what, source| SsdError::Io { what, path: path.to_owned(), source };
        let (found, created) = match std::fs::metadata(path) {
            Ok(found) => (found, false),
            Err(e) if e.kind() == io::ErrorKind::NotFound && may_create(path) => (create(path)?, true),
            Err(e) => return Err(failed("find", e)),
        };
        let is_block_device = found.file_type().is_block_device();
        if !is_block_device && !found.is_file() {
            return Err(SsdError::WrongFileType { path: path.to_owned() });
        }
        let (file, is_direct) = open_for(path, is_block_device, direct)?;
        let runs_aside = blocks_in_kernel(&file).map_err(|e| failed("examine", e))?;
        let device = Device {
            file: ManuallyDrop::new(file),
            open: OpenMark::default(),
            ended: AtomicU64::new(0),
            path: path.to_owned(),
            is_block_device,
            is_direct,
            runs_aside,
            created,
            #[cfg(test)]
            log: parking_lot::Mutex::default(),
            #[cfg(test)]
            fail_writes: false.into(),
            #[cfg(test)]
            sim: None,
        };
        device.lock()?;
        device.keep_to_us(&found);
        // Whoever created it may have given up and removed it between our opening and our locking it.
        let linked = device.file.metadata().map_err(|e| failed("examine", e))?.nlink() > 0;
        if !linked {
            return Err(SsdError::InUse { path: path.to_owned(), by: "it was removed just now" });
        }
        Ok(device)
    }

    /// A device of the tests' making.
    #[cfg(test)]
    pub(super) fn simulated(sim: std::sync::Arc<dyn super::tests::Simulated>) -> Device {
        Device {
            file: ManuallyDrop::new(tempfile::tempfile().unwrap()),
            open: OpenMark::default(),
            ended: AtomicU64::new(0),
            path: "/simulated".into(),
            is_block_device: false,
            is_direct: false,
            runs_aside: false,
            created: false,
            log: parking_lot::Mutex::default(),
            fail_writes: false.into(),
            sim: Some(sim),
        }
    }

    /// It will hold what guests read: nobody else's business, also if somebody else made the file for us.
    fn keep_to_us(&self, found: &Metadata) {
        if self.is_block_device || found.len() > 0 || found.mode() & OTHERS == 0 {
            return;
        }
        if let Err(error) = self.file.set_permissions(Permissions::from_mode(0o600)) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "SSD tier: others may read its file, and with it what guests read; set its mode to 600");
        }
    }

    fn lock(&self) -> Result<(), SsdError> {
        // Where closing may hang it is not waited for, and the lock goes with it.
        let tries = if self.is_block_device || self.runs_aside { LOCK_TRIES } else { 1 };
        for left in (0..tries).rev() {
            match self.file.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(source)) => return Err(self.error("lock", source)),
                Err(TryLockError::WouldBlock) if left > 0 => std::thread::sleep(LOCK_RETRY),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        Err(SsdError::InUse { path: self.path.clone(), by: "it holds a lock on it, as a running prestaged does" })
    }

    pub(super) fn error(&self, what: &'static str, source: io::Error) -> SsdError {
        SsdError::Io { what, path: self.path.clone(), source }
    }

    /// How the operator gets rid of what is there.
    pub(super) fn remedy(&self) -> String {
        let path = self.path.display();
        if self.is_block_device {
            format!("erase it with `wipefs -a {path}` and `dd if=/dev/zero of={path} bs=1M count=4 conv=fsync`")
        } else {
            format!("delete it with `rm {path}`")
        }
    }

    /// Gives up: removes the file again if this process made it.
    pub(super) fn discard(&self) {
        if self.created {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    pub(super) fn len(&self) -> Result<u64, SsdError> {
        #[cfg(test)]
        if let Some(sim) = &self.sim {
            return Ok(sim.len());
        }
        let mut file: &File = &self.file;
        file.seek(SeekFrom::End(0)).map_err(|e| self.error("find the size of", e))
    }

    /// Whether a regular file has any data at all. A file system that cannot tell has.
    pub(super) fn has_data(&self) -> bool {
        #[cfg(test)]
        if self.sim.is_some() {
            return true;
        }
        let end = nix::unistd::lseek(&*self.file, 0, nix::unistd::Whence::SeekData);
        self.is_block_device || end != Err(Errno::ENXIO)
    }

    /// Makes a regular file `bytes` long, with its blocks allocated if `preallocate`. Returns whether they are.
    pub(super) fn set_len(&self, bytes: u64, preallocate: bool) -> Result<bool, SsdError> {
        #[cfg(test)]
        if let Some(sim) = &self.sim {
            return sim.set_len(bytes).map(|()| false).map_err(|e| self.error("set the size of", e));
        }
        let found = self.file.metadata().map_err(|e| self.error("examine", e))?;
        let preallocated = preallocate && found.len() < bytes && self.allocate(&found, bytes)?;
        // Also the short cut for the fallback: extends sparsely, or cuts off.
        self.file.set_len(bytes).map_err(|e| self.error("set the size of", e))?;
        self.file.sync_all().map_err(|e| self.error("sync", e))?;
        if self.created {
            let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            match File::open(parent).and_then(|dir| dir.sync_all()) {
                // Whoever made the file for us has done it: `opener`.
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied && opener::opener().is_some() => {}
                synced => synced.map_err(|e| self.error("sync the folder of", e))?,
            }
        }
        Ok(preallocated)
    }

    /// Allocates blocks up to `bytes`. `false`: the file system cannot.
    fn allocate(&self, found: &Metadata, bytes: u64) -> Result<bool, SsdError> {
        let needed_bytes = bytes.saturating_sub(found.blocks().saturating_mul(512));
        let no_space = |free_bytes| SsdError::NoSpace { path: self.path.clone(), needed_bytes, free_bytes };
        let free_bytes = self.free_bytes();
        if let Some(free_bytes) = free_bytes.filter(|free| *free < needed_bytes) {
            return Err(no_space(free_bytes));
        }
        let len = i64::try_from(bytes).map_err(|_| self.error("allocate", Errno::EFBIG.into()))?;
        loop {
            match nix::fcntl::fallocate(&*self.file, FallocateFlags::empty(), 0, len) {
                Ok(()) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(false),
                Err(e) => {
                    // What it did allocate goes back.
                    let _ = self.file.set_len(found.len());
                    let full = matches!(e, Errno::ENOSPC | Errno::EDQUOT);
                    return Err(if full {
                        no_space(free_bytes.unwrap_or(0))
                    } else {
                        self.error("allocate", e.into())
                    });
                }
            }
        }
    }

    fn free_bytes(&self) -> Option<u64> {
        let found = nix::sys::statvfs::fstatvfs(&*self.file).ok()?;
        Some(found.blocks_available().saturating_mul(found.fragment_size()))
    }

    /// Reads whole sectors. What lies beyond the end is zero; returns how many bytes do not.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let _ended = Ended(&self.ended);
        #[cfg(test)]
        if let Some(sim) = &self.sim {
            return sim.read(offset, buf);
        }
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            // Only the end of the file cuts a sector.
            if !done.is_multiple_of(SECTOR_BYTES) {
                break;
            }
        }
        buf[done..].fill(0);
        Ok(done)
    }

    /// Reads whole sectors; those that cannot be read are filled with ones, which no structure of the format passes
    /// for.
    pub(super) fn read_what_can_be(&self, offset: u64, buf: &mut [u8]) {
        if self.read(offset, buf).is_ok() {
            return;
        }
        for (i, sector) in buf.chunks_mut(SECTOR_BYTES).enumerate() {
            if self.read(offset + (i * SECTOR_BYTES) as u64, sector).is_err() {
                sector.fill(0xff);
            }
        }
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let _ended = Ended(&self.ended);
        #[cfg(test)]
        {
            if self.fail_writes.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(Errno::EIO.into());
            }
            if let Some(sim) = &self.sim {
                return sim.write(offset, bytes);
            }
            self.log.lock().push(Op::Write(offset, bytes.to_vec()));
        }
        self.file.write_all_at(bytes, offset)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        let _ended = Ended(&self.ended);
        #[cfg(test)]
        {
            if let Some(sim) = &self.sim {
                return sim.sync();
            }
            self.log.lock().push(Op::Sync);
        }
        self.file.sync_data()
    }
}

impl Device {
    /// Lets another process open it before this one has ended: gives up the lock, and a block device itself, which only one may
    /// have open. I/O through this descriptor fails from now on.
    pub(super) fn let_go(&self) {
        let given_up = self.file.unlock().and_then(|()| {
            let nothing = OpenOptions::new().read(true).open("/dev/null")?;
            // SAFETY: no memory is touched; the number stays open and ours, `file` closes what it stands for now.
            let result = unsafe { libc::dup3(nothing.as_raw_fd(), self.file.as_raw_fd(), libc::O_CLOEXEC) };
            Errno::result(result).map(drop).map_err(io::Error::from)
        });
        if let Err(error) = given_up {
            tracing::warn!(path = %self.path.display(), %error, "SSD tier not given up before the process ends");
        }
    }
}

/// Counts an operation when it has ended.
struct Ended<'a>(&'a AtomicU64);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Device {
    /// A child that was forked and has not got to its exec shares the lock: closing alone would leave it locked so
    /// long.
    fn drop(&mut self) {
        // SAFETY: nobody has `self` any more, and nothing below looks at `file`.
        let file = unsafe { ManuallyDrop::take(&mut self.file) };
        // Locks of such files are the server's, and need its answer too.
        if self.runs_aside {
            close_aside(file, self.open.clone());
        } else {
            let _ = file.unlock();
        }
    }
}

/// A device node that is missing must not become a file in the memory of devtmpfs.
fn may_create(path: &Path) -> bool {
    !path.starts_with("/dev") || path.starts_with("/dev/shm")
}

fn create(path: &Path) -> Result<Metadata, SsdError> {
    let failed = |source| SsdError::Io { what: "create", path: path.to_owned(), source };
    // It will hold what guests read: nobody else's business.
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let made = match made {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied && opener::opener().is_some() => {
            opener::open(path, How { write: true, ..How::default() }).map(|(_, file)| file)
        }
        other => other,
    };
    made.and_then(|file| file.metadata()).map_err(failed)
}

fn open_for(path: &Path, is_block_device: bool, direct: bool) -> Result<(File, bool), SsdError> {
    // On a block device O_EXCL without O_CREAT refuses one that is mounted or part of an array, see open(2).
    let exclusive = if is_block_device { libc::O_EXCL } else { 0 };
    let open = |flags: i32| match OpenOptions::new().read(true).write(true).custom_flags(exclusive | flags).open(path) {
        // A device is no file of ours, nor is one on a disk that was mounted since: whoever opens stores may have the right.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied && opener::opener().is_some() => {
            let how = How { write: true, direct: flags & libc::O_DIRECT != 0, exclusive: is_block_device };
            opener::open(path, how).map(|(_, file)| file)
        }
        other => other,
    };
    let opened = if direct { open(libc::O_DIRECT) } else { Err(Errno::EINVAL.into()) };
    let opened = match opened {
        // The file system cannot do direct I/O; through the page cache the tier still works.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => open(0).map(|file| (file, false)),
        other => other.map(|file| (file, true)),
    };
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => {
            SsdError::InUse { path: path.to_owned(), by: "it is mounted, or part of an array or volume group" }
        }
        _ => SsdError::Io { what: "open", path: path.to_owned(), source },
    })
}
