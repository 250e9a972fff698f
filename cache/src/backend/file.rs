//! A raw file or block device as a store.
//!
//! - [`FileBackend`]: the store
//!
//! Reads and writes go past the host's page cache where the file system allows it: what is worth keeping is kept by the
//! tiers above. Guests may use 512-byte sectors on a store whose unit of direct I/O is larger; such requests are
//! widened to whole units through a buffer here. They do *not* take the page cache instead: a dirty cached page that is
//! written back later would undo a direct write to its other sectors. A widened write reads its first and last unit
//! before, so it runs alone ([`Gate`]).
//!
//! A file that somebody truncates while it is served stays an error until it has its size again: reads of the missing part
//! fail, and so does every change, since a write beyond the end would make the file grow around a hole that reads as
//! zeroes. A truncation in the instant between the look at the size and the write goes unseen.

use super::device::{self, Content, Opened};
use super::error::StoreError;
use super::gate::{Drain, Gate, UnderWay};
use super::{Backend, Extent, OpenFile, PAGE, StoreInfo, StoreOptions, Transfer, check_range};
use crate::engine::aside::{AsideFile, OpenMark};
use crate::engine::{AlignedBuf, IoBuf, LocalBoxFuture, Semaphore, Shard, bufs};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One request that zeroes a range by writing carries this much.
const ZEROES_BYTES: usize = 1 << 20;
/// The kernel moves at most 2 GiB − 4 KiB at a time; a round number below.
const MAX_IO_BYTES: u32 = 1 << 30;

/// How long the end of a store waits for its file to be closed, which a server that does not answer keeps open, and how often it looks.
const CLOSE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(1);

/// Threads that look for holes at a time.
const SEEKERS: usize = 2;

/// A raw file or block device.
#[derive(Debug)]
pub(super) struct FileBackend {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shard: Shard,
    identity: String,
    /// As it was asked for, with its links.
    asked: PathBuf,
    content: Content,
    files: RefCell<Option<Files>>,
    /// Somebody else has it for as long as the files are.
    open: OpenMark,
    align: u64,
    direct: bool,
    is_block: bool,
    read_only: bool,
    stamp: Cell<super::Stamp>,
    can_discard: Cell<bool>,
    can_punch: Cell<bool>,
    can_zero_range: Cell<bool>,
    /// A failed flush of the page cache: the kernel has dropped the data and calls the next flush a success.
    lost_writes: Cell<bool>,
    gate: Rc<Gate>,
    drain: Rc<Drain>,
    /// Who may look for holes: each takes a thread.
    seekers: Rc<Semaphore>,
}

#[derive(Clone, Debug)]
struct Files {
    buffered: Rc<AsideFile>,
    /// The same file for data: direct where that works.
    data: Rc<AsideFile>,
}

impl FileBackend {
    pub(super) async fn open(shard: &Shard, path: &Path, options: &StoreOptions) -> Result<FileBackend, StoreError> {
        FileBackend::open_as(shard, path, Content::Disk, options).await
    }

    /// The file of an image in some format: it is as long as it is, grows when it is written to behind its end, and
    /// reads as zeroes there.
    pub(super) async fn open_image(
        shard: &Shard,
        path: &Path,
        options: &StoreOptions,
    ) -> Result<FileBackend, StoreError> {
        FileBackend::open_as(shard, path, Content::Image, options).await
    }

    async fn open_as(
        shard: &Shard,
        path: &Path,
        content: Content,
        options: &StoreOptions,
    ) -> Result<FileBackend, StoreError> {
        let store = format!("file:{}", path.display());
        let (asked, path, options) = (path.to_owned(), path.to_owned(), options.clone());
        let opened = shard.blocking(move || device::open(&path, content, &options)).await;
        let Opened { path, buffered, direct, align_bytes, is_block, read_only, stamp, aside } =
            opened.map_err(|error| StoreError::from_io(&store, "open", &error))??;
        let open = OpenMark::default();
        let held = |file| Rc::new(AsideFile::new(shard, file, aside, OpenMark::clone(&open)));
        let (buffered, is_direct) = (held(buffered), direct.is_some());
        let data = direct.map_or_else(|| Rc::clone(&buffered), held);
        let inner = Inner {
            shard: shard.clone(),
            identity: format!("file:{}", path.display()),
            asked,
            content,
            files: RefCell::new(Some(Files { buffered, data })),
            open,
            align: u64::from(align_bytes),
            direct: is_direct,
            is_block,
            read_only,
            stamp: Cell::new(stamp),
            can_discard: Cell::new(!read_only),
            can_punch: Cell::new(true),
            can_zero_range: Cell::new(true),
            lost_writes: Cell::new(false),
            gate: Rc::default(),
            drain: Rc::default(),
            seekers: Semaphore::new(SEEKERS),
        };
        Ok(FileBackend { inner: Rc::new(inner) })
    }
}

/// Which requests a caller is about to make.
enum Access {
    Read,
    Write,
}

impl Inner {
    fn size(&self) -> u64 {
        self.stamp.get().size_bytes
    }

    fn failed(&self, what: &'static str, error: &io::Error) -> StoreError {
        StoreError::from_io(&self.identity, what, error)
    }

    /// Checks a request and counts it in.
    fn begin(&self, access: Access, offset: u64, len: u64) -> Result<(Files, UnderWay), StoreError> {
        let store = || self.identity.clone();
        let limit = match access {
            _ if self.content == Content::Image => i64::MAX as u64,
            Access::Read => self.size().next_multiple_of(PAGE),
            Access::Write => self.size(),
        };
        if matches!(access, Access::Write) && self.read_only {
            return Err(StoreError::ReadOnly { store: store() });
        }
        check_range(offset, len, limit)?;
        let files = self.files.borrow().clone();
        match (files, self.drain.enter()) {
            (Some(files), Some(under_way)) => Ok((files, under_way)),
            _ => Err(StoreError::Closed { store: store() }),
        }
    }

    /// Refuses to change a file that has become smaller. A block device cannot be made larger by a write.
    fn refuse_shrunk(&self, files: &Files) -> Result<(), StoreError> {
        if self.is_block || self.content == Content::Image {
            return Ok(());
        }
        let now_bytes = device::size_now(&files.buffered).map_err(|error| self.failed("stat", &error))?;
        match self.size() {
            was_bytes if now_bytes < was_bytes => {
                Err(StoreError::Shrunk { store: self.identity.clone(), was_bytes, now_bytes })
            }
            _ => Ok(()),
        }
    }

    fn is_aligned(&self, offset: u64, list: &[IoBuf]) -> bool {
        if !self.direct {
            return true;
        }
        let align = self.align as usize;
        offset.is_multiple_of(self.align)
            && list.iter().all(|buf| buf.len().is_multiple_of(align) && buf.is_aligned(align))
    }

    /// The whole units around a range, cut off at nothing: the last unit may reach beyond the store.
    fn units_around(&self, offset: u64, len: u64) -> (u64, usize) {
        let start = offset - offset % self.align;
        // Offset and length lie within a store of at most `i64::MAX` bytes.
        let end = (offset + len).next_multiple_of(self.align);
        (start, (end - start) as usize)
    }

    /// Reads aligned buffers; zeroes what lies beyond the store.
    async fn read_aligned(
        &self,
        files: &Files,
        offset: u64,
        mut list: Vec<IoBuf>,
    ) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = bufs::total_len(&list);
        let present = match self.content {
            Content::Disk => usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX).min(len),
            Content::Image => len,
        };
        let mut done = 0usize;
        while done < present {
            let at = offset + done as u64;
            // The rest of a short read may begin within a unit of direct I/O.
            let fd = if at.is_multiple_of(self.align) { &files.data } else { &files.buffered };
            let (result, back) = self.shard.read_part(fd, list, done..len, at).await;
            list = back;
            match result {
                Ok(0) if self.content == Content::Image => {
                    bufs::zero(&mut list, done..len);
                    return (Ok(()), list);
                }
                Ok(0) => {
                    let now = self.measure().await.map_or(at, |stamp| stamp.size_bytes);
                    let store = self.identity.clone();
                    return match now < offset + present as u64 {
                        true => (Err(StoreError::Shrunk { store, was_bytes: self.size(), now_bytes: now }), list),
                        // Grown back in the meantime: whoever does this must not get made-up data.
                        false => (Err(StoreError::Io { store, what: "read", errno: libc::EIO }), list),
                    };
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(self.failed("read", &error)), list),
            }
        }
        bufs::zero(&mut list, present..len);
        (Ok(()), list)
    }

    async fn read(&self, offset: u64, mut list: Vec<IoBuf>) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = bufs::total_len(&list);
        let (files, _under_way) = match self.begin(Access::Read, offset, len as u64) {
            Ok(begun) => begun,
            Err(error) => return (Err(error), list),
        };
        if self.is_aligned(offset, &list) {
            return self.read_aligned(&files, offset, list).await;
        }
        let (start, span) = self.units_around(offset, len as u64);
        let (result, bounce) = self.read_aligned(&files, start, vec![IoBuf::heap(span)]).await;
        if result.is_ok()
            && let Some(bounce) = bounce.first()
        {
            let skip = (offset - start) as usize;
            bufs::copy_in(&mut list, 0, &bounce.as_slice()[skip..skip + len]);
        }
        (result, list)
    }

    async fn write(&self, offset: u64, list: Vec<IoBuf>, fua: bool) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = bufs::total_len(&list);
        let (files, _under_way) = match self.begin(Access::Write, offset, len as u64) {
            Ok(begun) => begun,
            Err(error) => return (Err(error), list),
        };
        if self.is_aligned(offset, &list) {
            let _shared = self.gate.shared().await;
            if let Err(error) = self.refuse_shrunk(&files) {
                return (Err(error), list);
            }
            let (result, list) = self.shard.write_all_at(&files.data, list, offset, fua).await;
            return (result.map_err(|error| self.failed("write", &error)), list);
        }
        (self.write_widened(&files, offset, &list, len, fua).await, list)
    }

    async fn write_widened(
        &self,
        files: &Files,
        offset: u64,
        list: &[IoBuf],
        len: usize,
        fua: bool,
    ) -> Result<(), StoreError> {
        let (start, span) = self.units_around(offset, len as u64);
        let skip = (offset - start) as usize;
        let widened = skip != 0 || span != len;
        // Only the memory may have been unaligned.
        let (_shared, _alone) = match widened {
            true => (None, Some(self.gate.alone().await)),
            false => (Some(self.gate.shared().await), None),
        };
        let mut bounce = vec![IoBuf::heap(span)];
        if widened {
            let (result, back) = self.read_aligned(files, start, bounce).await;
            result?;
            bounce = back;
        }
        self.refuse_shrunk(files)?;
        let Some(target) = bounce.first_mut() else { return Ok(()) };
        bufs::copy_out(list, 0, &mut target.as_mut_slice()[skip..skip + len]);
        // A file's last unit may be incomplete. Writing all of it would make the file grow, which the guest must not
        // cause; the page cache takes the rest, and is flushed while nobody else writes.
        let within = match self.content {
            Content::Disk => usize::try_from(self.size() - start).unwrap_or(usize::MAX).min(span),
            Content::Image => span,
        };
        if within < span {
            let tail = IoBuf::from(AlignedBuf::copy_of(&target.as_slice()[..within]));
            let (result, _) = self.shard.write_all_at(&files.buffered, vec![tail], start, true).await;
            return result.map_err(|error| self.failed("write", &error));
        }
        let (result, _) = self.shard.write_all_at(&files.data, bounce, start, fua).await;
        result.map_err(|error| self.failed("write", &error))
    }

    async fn flush(&self) -> Result<(), StoreError> {
        if self.read_only {
            let _under_way = self.begin(Access::Read, 0, 0)?;
            return Ok(());
        }
        self.harden().await
    }

    async fn harden(&self) -> Result<(), StoreError> {
        let (files, _under_way) = self.begin(Access::Read, 0, 0)?;
        if self.lost_writes.get() {
            return Err(StoreError::Io { store: self.identity.clone(), what: "flush", errno: libc::EIO });
        }
        let result = self.shard.fdatasync(&files.buffered).await;
        if result.is_err() && !self.direct {
            self.lost_writes.set(true);
        }
        result.map_err(|error| self.failed("flush", &error))
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let (files, _under_way) = self.begin(Access::Write, offset, len)?;
        // Whole units only; it is a hint.
        let (start, end) = (offset.next_multiple_of(self.align), (offset + len) / self.align * self.align);
        if !self.can_discard.get() || start >= end {
            return Ok(());
        }
        self.refuse_shrunk(&files)?;
        let result = if self.is_block {
            let fd = files.buffered.try_clone().map_err(|error| self.failed("discard", &error))?;
            self.shard.blocking(move || device::discard(&fd, start, end - start)).await.and_then(|result| result)
        } else {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            self.shard.fallocate(&files.buffered, mode, start, end - start).await
        };
        match result {
            Ok(()) => Ok(()),
            Err(error) if unsupported(&error) => {
                self.can_discard.set(false);
                Ok(())
            }
            Err(error) => Err(self.failed("discard", &error)),
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), StoreError> {
        let (files, _under_way) = self.begin(Access::Write, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        // The edges of the range go out as ordinary writes, so that the kernel never has to zero part of a unit.
        let (start, end) = (offset.next_multiple_of(self.align), (offset + len) / self.align * self.align);
        if start >= end {
            return self.zero_by_writing(&files, offset, len).await;
        }
        self.zero_by_writing(&files, offset, start - offset).await?;
        self.zero_by_writing(&files, end, offset + len - end).await?;
        let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, &self.can_punch);
        let zero = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, &self.can_zero_range);
        for (mode, works) in may_unmap.then_some(punch).into_iter().chain([zero]) {
            if !works.get() {
                continue;
            }
            let _shared = self.gate.shared().await;
            // It would not grow, but what was zeroed would not be there.
            self.refuse_shrunk(&files)?;
            match self.shard.fallocate(&files.buffered, mode, start, end - start).await {
                Ok(()) => return Ok(()),
                Err(error) if unsupported(&error) => works.set(false),
                Err(error) => return Err(self.failed("write zeroes", &error)),
            }
        }
        self.zero_by_writing(&files, start, end - start).await
    }

    async fn zero_by_writing(&self, files: &Files, mut offset: u64, mut len: u64) -> Result<(), StoreError> {
        while len > 0 {
            let step = len.min(ZEROES_BYTES as u64) as usize;
            let list = vec![IoBuf::from(AlignedBuf::zeroed(step))];
            if self.is_aligned(offset, &list) {
                let _shared = self.gate.shared().await;
                self.refuse_shrunk(files)?;
                let (result, _) = self.shard.write_all_at(&files.data, list, offset, false).await;
                result.map_err(|error| self.failed("write zeroes", &error))?;
            } else {
                self.write_widened(files, offset, &list, step, false).await?;
            }
            (offset, len) = (offset + step as u64, len - step as u64);
        }
        Ok(())
    }

    async fn extents(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Extent>, StoreError> {
        let (files, _under_way) = self.begin(Access::Read, offset, len)?;
        // A block device does not say what it has discarded.
        if self.is_block || len == 0 {
            return Ok(vec![Extent::data(len)]);
        }
        let _permit = self.seekers.acquire().await;
        let fd = files.buffered.try_clone().map_err(|error| self.failed("look for holes", &error))?;
        let found = self.shard.blocking(move || device::extents(&fd, offset, len, most)).await;
        found.and_then(|found| found).map_err(|error| self.failed("look for holes", &error))
    }

    async fn measure(&self) -> Result<super::Stamp, StoreError> {
        let files = self.files.borrow().clone();
        let store = self.identity.clone();
        let Some(files) = files else { return Err(StoreError::Closed { store }) };
        let file = File::from(files.buffered.try_clone().map_err(|error| self.failed("stat", &error))?);
        let content = self.content;
        let measured = self.shard.blocking(move || device::measure(&store, content, &file)).await;
        measured.map_err(|error| self.failed("stat", &error))?
    }

    async fn refresh_size(&self) -> Result<u64, StoreError> {
        let (_, _under_way) = self.begin(Access::Read, 0, 0)?;
        let (was, now) = (self.stamp.get(), self.measure().await?);
        if now.size_bytes < was.size_bytes && self.content == Content::Disk {
            let store = self.identity.clone();
            return Err(StoreError::Shrunk { store, was_bytes: was.size_bytes, now_bytes: now.size_bytes });
        }
        self.stamp.set(now);
        Ok(now.size_bytes)
    }

    async fn grow(&self, size_bytes: u64) -> Result<u64, StoreError> {
        let store = || self.identity.clone();
        let (files, _under_way) = self.begin(Access::Write, 0, 0)?;
        if self.is_block {
            return Err(StoreError::NotGrown { store: store(), why: DEVICE_GROWS });
        }
        // The kernel's sizes are signed.
        let is_size =
            size_bytes != 0 && size_bytes <= i64::MAX as u64 && size_bytes.is_multiple_of(super::SECTOR_BYTES);
        if self.content == Content::Image || !is_size {
            return Err(StoreError::BadSize { store: store(), size_bytes });
        }
        let now_bytes = self.measure().await?.size_bytes;
        let was_bytes = self.size();
        if now_bytes < was_bytes {
            // Grown over, what was cut off would be zeroes in the store, and still served from what is cached of it.
            return Err(StoreError::Shrunk { store: store(), was_bytes, now_bytes });
        }
        if size_bytes < now_bytes {
            return Err(StoreError::Smaller { store: store(), now_bytes, asked_bytes: size_bytes });
        }
        if size_bytes > now_bytes {
            let fd = files.buffered.try_clone().map_err(|error| self.failed("grow", &error))?;
            let grown = self.shard.blocking(move || {
                let most_bytes = device::most_bytes(&fd);
                if most_bytes < size_bytes {
                    Ok(Some(most_bytes))
                } else {
                    device::grow(&fd, size_bytes).map(|()| None)
                }
            });
            let beyond = grown.await.and_then(|grown| grown).map_err(|error| self.failed("grow", &error))?;
            if let Some(most_bytes) = beyond {
                return Err(StoreError::TooLarge { store: store(), asked_bytes: size_bytes, most_bytes });
            }
            self.shard.fdatasync(&files.buffered).await.map_err(|error| self.failed("grow", &error))?;
        }
        self.refresh_size().await
    }
}

const DEVICE_GROWS: &str =
    "a device has the size of what it is made of (a logical volume, an RBD image, a partition): make that larger";

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL | libc::ENODEV))
}

impl Backend for FileBackend {
    fn info(&self) -> StoreInfo {
        let inner = &self.inner;
        StoreInfo {
            identity: inner.identity.clone(),
            size_bytes: inner.size(),
            read_only: inner.read_only,
            min_io_bytes: inner.align as u32,
            max_io_bytes: MAX_IO_BYTES,
            can_flush: true,
            can_fua: true,
            can_discard: inner.can_discard.get(),
            can_write_zeroes: !inner.read_only && (inner.can_punch.get() || inner.can_zero_range.get()),
            // The times of a device node say nothing of the device's content.
            version_stamp: (!inner.is_block).then(|| inner.stamp.get()),
        }
    }

    fn read(&self, offset: u64, bufs: Vec<IoBuf>) -> Transfer {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.read(offset, bufs).await })
    }

    fn write(&self, offset: u64, bufs: Vec<IoBuf>, fua: bool) -> Transfer {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.write(offset, bufs, fua).await })
    }

    fn flush(&self) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.flush().await })
    }

    fn harden(&self) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.harden().await })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.discard(offset, len).await })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.write_zeroes(offset, len, may_unmap).await })
    }

    fn extents(&self, offset: u64, len: u64, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.extents(offset, len, most).await })
    }

    fn refresh_size(&self) -> LocalBoxFuture<Result<u64, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.refresh_size().await })
    }

    fn grow(&self, size_bytes: u64) -> LocalBoxFuture<Result<u64, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.grow(size_bytes).await })
    }

    fn file(&self) -> Option<OpenFile> {
        let files = self.inner.files.borrow();
        OpenFile::new(&self.inner.asked, &files.as_ref()?.buffered).ok()
    }

    fn who_grows(&self) -> &'static str {
        DEVICE_GROWS
    }

    fn close(&self) -> LocalBoxFuture<()> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            inner.drain.close().await;
            drop(inner.files.take());
            // Whoever opens it next wants its locks.
            let deadline = Instant::now() + CLOSE;
            while Arc::strong_count(&inner.open) > 1 && Instant::now() < deadline {
                inner.shard.sleep(LOOK).await;
            }
        })
    }
}
