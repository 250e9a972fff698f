//! Opening and measuring a file or block device. Everything here but [`size_now`] may block and runs off the
//! shard's thread.
//!
//! - [`Opened`] and [`open`]: descriptors, size, alignment, lock
//! - [`measure`]: size and stamp again
//! - [`size_now`]: a regular file's size, at once
//! - [`grow`]: a regular file made larger; [`most_bytes`]: how large it can be
//! - [`discard`] by `BLKDISCARD`; [`extents`] by `SEEK_DATA` and `SEEK_HOLE`
//!
//! Leaf module: `statx` and `ioctl` are called here.
//!
//! **Locks.** A writer takes `flock(LOCK_EX)`, a reader `LOCK_SH`, so that two daemons never serve one store writable. In
//! addition the bytes are locked by which QEMU marks its own images (`block/file-posix.c`: byte 100 + n says "I hold
//! permission n", byte 200 + n "I don't share permission n", writing is permission 1): QEMU then refuses an image that
//! is served here, and an image that a QEMU writes to is refused here. Locks belong to open files, and the one for direct I/O has
//! them where there is one: requests in the kernel keep it open, so a daemon that was killed has its locks until the last of its
//! direct writes has ended, and its successor waits. One that reached the disk after a guest's next write would undo that. (Through
//! the page cache the kernel writes by threads of the process, which end before it does.)

use super::error::StoreError;
use super::{Extent, SECTOR_BYTES, Stamp, StoreOptions};
use crate::engine::blocks_in_kernel;
use crate::opener::{self, How};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fcntl};
use nix::unistd::{Whence, lseek};
use std::fs::{File, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{io, thread};

/// Image formats whose raw bytes are never what an operator wants to boot from: offset, magic, name.
const FORMATS: [(usize, &[u8], &str); 6] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"conectix", "vpc"),
];
/// QEMU's lock bytes for "I write" and "nobody else may write".
const QEMU_WRITES: i64 = 101;
const QEMU_KEEPS_WRITERS_OUT: i64 = 201;
/// udev holds a lock for a moment while it looks at a block device; writes of a daemon that was killed may take longer to end.
const LOCK_TRIES: u32 = 50;
const LOCK_RETRY: Duration = Duration::from_millis(20);

pub(super) struct Opened {
    pub(super) path: PathBuf,
    /// Goes through the page cache; holds the locks if nothing else does.
    pub(super) buffered: OwnedFd,
    /// Holds the locks.
    pub(super) direct: Option<OwnedFd>,
    /// Unit of offsets and lengths for direct I/O; 512 without it.
    pub(super) align_bytes: u32,
    pub(super) is_block: bool,
    pub(super) read_only: bool,
    pub(super) stamp: Stamp,
    /// See [`blocks_in_kernel`].
    pub(super) aside: bool,
}

/// What a file is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// The bytes of a disk.
    Disk,
    /// An image in some format, of any length.
    Image,
}

/// # Errors
/// See [`super::open`].
pub(super) fn open(path: &Path, content: Content, options: &StoreOptions) -> Result<Opened, StoreError> {
    let given = format!("file:{}", path.display());
    let fail = |error: io::Error| StoreError::from_io(&given, "open", &error);
    let how = How { write: !options.read_only, ..How::default() };
    let asked = path;
    let (path, file) = match opener::open(asked, how) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTBLK) => {
            return Err(StoreError::NotADisk { store: given.clone() });
        }
        other => other.map_err(fail)?,
    };
    let store = format!("file:{}", path.display());
    let kind = file.metadata().map_err(fail)?.file_type();
    // First: an image of any length is told that it is one.
    if !options.force_raw && content == Content::Disk {
        refuse_formats(&store, &file)?;
    }
    let aside = blocks_in_kernel(&file).map_err(|error| StoreError::from_io(&store, "open", &error))?;
    let (direct, align_bytes) = match options.direct.then(|| open_direct(asked, &file, options.read_only)) {
        Some(Ok((direct, align))) => (Some(direct), align),
        Some(Err(reason)) => {
            tracing::info!("{store}: no direct I/O here ({reason}); reads go through the host's page cache as well");
            (None, SECTOR_BYTES as u32)
        }
        None => (None, SECTOR_BYTES as u32),
    };
    lock(&store, direct.as_ref().unwrap_or(&file), !options.read_only)?;
    let stamp = measure(&store, content, &file)?;
    Ok(Opened {
        path,
        buffered: file.into(),
        direct: direct.map(OwnedFd::from),
        align_bytes,
        is_block: kind.is_block_device(),
        read_only: options.read_only,
        stamp,
        aside,
    })
}

/// Size and identity of the file's present state.
///
/// # Errors
/// `BadSize`, or `Io`.
pub(super) fn measure(store: &str, content: Content, mut file: &File) -> Result<Stamp, StoreError> {
    let fail = |error: io::Error| StoreError::from_io(store, "stat", &error);
    let meta = file.metadata().map_err(fail)?;
    // Block devices have no size of their own in `stat`; seeking to the end works for both. The position that this
    // moves is used by nobody.
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(fail)?;
    let whole = content == Content::Image || size_bytes.is_multiple_of(SECTOR_BYTES);
    if size_bytes == 0 || !whole || i64::try_from(size_bytes).is_err() {
        return Err(StoreError::BadSize { store: store.to_owned(), size_bytes });
    }
    let nanos = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    Ok(Stamp {
        size_bytes,
        mtime_ns: nanos(meta.mtime(), meta.mtime_nsec()),
        ctime_ns: nanos(meta.ctime(), meta.ctime_nsec()),
        inode: meta.ino(),
        // A device node can be made anew on another file system: the device it stands for is what counts.
        device: if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() },
        local_clock: nix::sys::statfs::fstatfs(file).is_ok_and(|found| is_local(found.filesystem_type())),
    })
}

/// Whether a file system stamps its files with this host's clock. Of one that isn't listed nobody knows.
fn is_local(kind: nix::sys::statfs::FsType) -> bool {
    use nix::sys::statfs as fs;
    // XFS and ZFS: XFS_SUPER_MAGIC of <linux/magic.h>, and ZFS_SUPER_MAGIC of OpenZFS.
    const OTHERS: [i64; 2] = [0x5846_5342, 0x2fc1_2fc1];
    let listed = [fs::EXT4_SUPER_MAGIC, fs::BTRFS_SUPER_MAGIC, fs::TMPFS_MAGIC, fs::OVERLAYFS_SUPER_MAGIC];
    listed.contains(&kind) || OTHERS.contains(&kind.0)
}

/// A regular file's size in bytes as the kernel knows it. Does not block: a file system on a network is not asked
/// (`AT_STATX_DONT_SYNC`, statx(2)), so that what another host does to the file is seen only some seconds later.
///
/// # Errors
/// What the kernel says.
pub(super) fn size_now(fd: &OwnedFd) -> io::Result<u64> {
    // SAFETY: `statx` is a plain C structure for which all zeroes are valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is an empty C string, the descriptor is open, and `stat` is large enough.
    let result = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_SIZE, &raw mut stat) };
    if result == 0 { Ok(stat.stx_size) } else { Err(io::Error::last_os_error()) }
}

fn refuse_formats(store: &str, file: &File) -> Result<(), StoreError> {
    let mut head = [0; 512];
    file.read_at(&mut head, 0).map_err(|error| StoreError::from_io(store, "read", &error))?;
    match FORMATS.into_iter().find(|(at, magic, _)| head[*at..].starts_with(magic)) {
        Some((_, _, format)) => Err(StoreError::NotRaw { store: store.to_owned(), format }),
        None => Ok(()),
    }
}

fn lock(store: &str, file: &File, writer: bool) -> Result<(), StoreError> {
    let locked = |writer| StoreError::Locked { store: store.to_owned(), writer };
    let mut attempts = LOCK_TRIES;
    loop {
        match if writer { file.try_lock() } else { file.try_lock_shared() } {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if attempts > 0 => {
                attempts -= 1;
                thread::sleep(LOCK_RETRY);
            }
            // Against readers a shared lock succeeds.
            Err(TryLockError::WouldBlock) => return Err(locked(!writer || file.try_lock_shared().is_err())),
            Err(TryLockError::Error(error)) => {
                tracing::warn!("{store} cannot be locked against other daemons: {error}");
                break;
            }
        }
    }
    qemu_locks(store, file, writer)
}

fn qemu_locks(store: &str, file: &File, writer: bool) -> Result<(), StoreError> {
    let range = |kind: i32, start: i64| libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: 1,
        l_pid: 0,
    };
    let taken = |start| {
        let mut probe = range(libc::F_WRLCK, start);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).is_ok() && i32::from(probe.l_type) != libc::F_UNLCK
    };
    // Whoever writes now, or does not let us write.
    if taken(QEMU_WRITES) || (writer && taken(QEMU_KEEPS_WRITERS_OUT)) {
        return Err(StoreError::Locked { store: store.to_owned(), writer: taken(QEMU_WRITES) });
    }
    for start in [QEMU_WRITES, QEMU_KEEPS_WRITERS_OUT].into_iter().skip(usize::from(!writer)) {
        if let Err(errno) = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, start))) {
            tracing::debug!("{store}: no lock against QEMU: {errno}");
        }
    }
    Ok(())
}

/// A second descriptor for direct I/O and its alignment.
fn open_direct(path: &Path, file: &File, read_only: bool) -> io::Result<(File, u32)> {
    let (_, direct) = opener::open(path, How { write: !read_only, direct: true, ..How::default() })?;
    let (ours, theirs) = (file.metadata()?, direct.metadata()?);
    if (ours.dev(), ours.ino()) != (theirs.dev(), theirs.ino()) {
        return Err(io::Error::other("the file was replaced while it was opened"));
    }
    let align = match dio_align(&direct) {
        Some(0) => return Err(io::ErrorKind::Unsupported.into()),
        Some(align) => align,
        None => probe_align(&direct)?,
    };
    if !align.is_power_of_two() || align > super::PAGE as u32 {
        return Err(io::Error::other(format!("it would need requests aligned to {align} bytes")));
    }
    Ok((direct, align.max(SECTOR_BYTES as u32)))
}

/// What the kernel says about direct I/O on this file (`STATX_DIOALIGN`, Linux ≥ 6.1): 0 if there is none.
fn dio_align(file: &File) -> Option<u32> {
    // SAFETY: `statx` is a plain C structure for which all zeroes are valid.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, the descriptor is open, and `stat` is large enough.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    (result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0)
        // The memory's alignment is smaller on every known file system, and buffers are page-aligned.
        .then_some(stat.stx_dio_offset_align)
}

fn probe_align(file: &File) -> io::Result<u32> {
    let mut buf = crate::engine::AlignedBuf::new(super::PAGE as usize);
    let half = SECTOR_BYTES as usize;
    match file.read_at(&mut buf[..half], 0) {
        Ok(_) => Ok(SECTOR_BYTES as u32),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            file.read_at(&mut buf, 0)?;
            Ok(super::PAGE as u32)
        }
        Err(error) => Err(error),
    }
}

/// Makes a regular file end at `size` if it ends before. By fallocate(2) of its last sector, which never cuts: somebody else may make it
/// larger at the same time. Where the file system has no such call the size is looked at and set, with a moment in between.
///
/// # Errors
/// What the kernel says: `ENOSPC`, `EFBIG`.
pub(super) fn grow(fd: &OwnedFd, size: u64) -> io::Result<()> {
    let offset = |bytes: u64| libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG));
    let last = offset(size.saturating_sub(SECTOR_BYTES))?;
    match nix::fcntl::fallocate(fd, FallocateFlags::empty(), last, offset(SECTOR_BYTES)?) {
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {
            let file = File::from(fd.try_clone()?);
            if file.metadata()?.len() < size { file.set_len(size) } else { Ok(()) }
        }
        other => Ok(other?),
    }
}

/// How large a regular file can be on its file system, in whole sectors: no position beyond that is taken (lseek(2), `EINVAL`). That of the
/// descriptor is used by nobody.
pub(super) fn most_bytes(fd: &OwnedFd) -> u64 {
    let (mut least, mut beyond) = (0, 1 << 63);
    while least + 1 < beyond {
        let middle = least + (beyond - least) / 2;
        let taken = i64::try_from(middle).is_ok_and(|at| lseek(fd, at, Whence::SeekSet).is_ok());
        (least, beyond) = if taken { (middle, beyond) } else { (least, middle) };
    }
    least - least % SECTOR_BYTES
}

mod ioctl {
    // BLKDISCARD of <linux/fs.h>, with a pointer to offset and length.
    nix::ioctl_write_ptr_bad!(blk_discard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// Discards a range of a block device.
///
/// # Errors
/// What the device says; `EOPNOTSUPP` where it cannot.
pub(super) fn discard(fd: &OwnedFd, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open and the argument is the pair of numbers that this request reads.
    unsafe { ioctl::blk_discard(fd.as_raw_fd(), &[offset, len]) }?;
    Ok(())
}

/// Where a regular file holds data (lseek(2), `SEEK_DATA` and `SEEK_HOLE`): up to `most` extents from `offset` on. A file
/// system without holes says that all is data. The file's position, which this moves, is used by nobody.
///
/// # Errors
/// What the kernel says.
pub(super) fn extents(fd: &OwnedFd, offset: u64, len: u64, most: usize) -> io::Result<Vec<Extent>> {
    let end = offset.saturating_add(len);
    let seek = |at: u64, whence| match lseek(fd, i64::try_from(at).unwrap_or(i64::MAX), whence) {
        Ok(found) => Ok(u64::try_from(found).unwrap_or(end).min(end)),
        // Nothing of the kind up to the end of the file.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno),
    };
    let (mut found, mut at) = (Vec::new(), offset);
    while at < end && found.len() < most {
        let data = match seek(at, Whence::SeekData) {
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                found.push(Extent::data(end - at));
                break;
            }
            other => other?,
        };
        let (until, hole) = if data > at { (data, true) } else { (seek(at, Whence::SeekHole)?, false) };
        if until <= at {
            // The file changes under our hands; what is not known to be a hole is data.
            found.push(Extent::data(end - at));
            break;
        }
        found.push(Extent { len_bytes: until - at, hole, zero: hole });
        at = until;
    }
    Ok(found)
}
