//! The stores behind the cache: raw files, block devices, NBD exports, and images in qcow2 format on top of them.
//!
//! - [`Backend`]: what every store can do
//! - [`Below`]: what an image stands on; [`LayerMap`]: what of the disk it holds itself
//! - [`StoreInfo`], [`Stamp`]: what is known about one
//! - [`StoreSpec`]: its name, as operators write it; [`StoreOptions`], [`NbdOptions`]: how to open it
//! - [`Extent`]: which parts of a store hold data
//! - [`Astray`]: a store whose path leads elsewhere; [`OpenFile`], [`FileId`], [`look_for`]: how that is found out
//! - [`StoreError`]: what can go wrong
//! - [`open`]: the way in; [`follow`]: the images below one that names them
//!
//! A backend lives on its shard's thread and does all its I/O through that shard.

mod device;
mod error;
mod file;
mod gate;
mod layer;
mod nbd;
mod place;
mod qcow2;
mod spec;

pub use error::StoreError;
pub use layer::{LayerMap, Owner};
pub use nbd::NbdOptions;
pub use place::{Astray, FileId, OpenFile, look_for};
pub use qcow2::{Need, follow, needs};
pub use spec::{NbdAddress, SpecError, StoreSpec};

use crate::engine::{AlignedBuf, IoBuf, LocalBoxFuture, Shard};
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// Identifies the state of a file between two runs: unchanged means that what was cached from it is still true.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stamp {
    pub size_bytes: u64,
    pub mtime_ns: i128,
    pub ctime_ns: i128,
    pub inode: u64,
    pub device: u64,
    /// The times are of this host's clock, as they are on a file system of its own.
    pub local_clock: bool,
}

impl Stamp {
    /// One number for the states of several files, in order: the same only if all of them are the same.
    pub(crate) fn mixed_into(self, others: u64) -> u64 {
        let Stamp { size_bytes, mtime_ns, ctime_ns, inode, device, local_clock: _ } = self;
        // Nanoseconds since 1970 fit until 2554.
        let words = [size_bytes, mtime_ns as u64, ctime_ns as u64, inode, device];
        words.into_iter().fold(others, |mixed, word| {
            // Murmur3's 64-bit finalizer (A. Appleby, public domain).
            let mut x = mixed.rotate_left(23) ^ word ^ 0x9e37_79b9_7f4a_7c15;
            x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
            x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
            x ^ (x >> 33)
        })
    }
}

/// What is known about a store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreInfo {
    /// The same for every way of naming the same store: `file:/canonical/path`, `nbd://host:port/export`,
    /// `nbd+unix:///export?socket=/path` or `qcow2:/canonical/path`.
    pub identity: String,
    /// A positive multiple of 512.
    pub size_bytes: u64,
    pub read_only: bool,
    /// Smallest unit that the store reads and writes without reading around it. Any multiple of 512 works.
    pub min_io_bytes: u32,
    /// Largest request that goes to the store in one piece; larger ones are split here.
    pub max_io_bytes: u32,
    /// Whether [`Backend::flush`] reaches stable storage.
    pub can_flush: bool,
    /// Whether a write with `fua` is one request. Where it isn't, the backend flushes after the write.
    pub can_fua: bool,
    pub can_discard: bool,
    /// Whether zeroes can be written without sending them. [`Backend::write_zeroes`] works in any case.
    pub can_write_zeroes: bool,
    /// `None` where the store has nothing to compare (NBD but for [`NbdOptions::files`], block devices).
    pub version_stamp: Option<Stamp>,
}

/// Part of a store and whether it holds data there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Not 0.
    pub len_bytes: u64,
    /// The store keeps no space for it.
    pub hole: bool,
    /// It reads as zeroes.
    pub zero: bool,
}

impl Extent {
    /// What is said of a range of which nothing is known.
    pub fn data(len_bytes: u64) -> Extent {
        Extent { len_bytes, hole: false, zero: false }
    }
}

/// Gives the buffers back with the outcome.
pub type Transfer = LocalBoxFuture<(Result<(), StoreError>, Vec<IoBuf>)>;

/// A store. Requests may overlap in time and complete in any order; callers that need an order wait in between.
///
/// Offsets and lengths are in bytes. Any will do: what is not in whole units of the store is widened to them, and a write
/// that needs this runs alone. Dropping the future of a write does not undo it: it may happen
/// or not, and it may happen after requests that are made later. So whoever writes waits for the end, whatever it is.
pub trait Backend: fmt::Debug {
    fn info(&self) -> StoreInfo;

    /// Reads the range that begins at `offset` and is as long as the buffers together, one buffer after the other.
    /// The range may end in the store's last, incomplete page of 4096 bytes: what lies beyond the store reads as zeroes.
    ///
    /// # Errors
    /// [`StoreError`]; the content of the buffers is unspecified then.
    fn read(&self, offset: u64, bufs: Vec<IoBuf>) -> Transfer;

    /// Writes the buffers, one after the other, from `offset`. With `fua` the data is on stable storage when this
    /// succeeds; without, after the next successful [`Backend::flush`].
    ///
    /// # Errors
    /// [`StoreError`]; the range may hold old data, new data or parts of both then.
    fn write(&self, offset: u64, bufs: Vec<IoBuf>, fua: bool) -> Transfer;

    /// Puts everything whose write has completed before onto stable storage.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is known about the durability of earlier writes then.
    fn flush(&self) -> LocalBoxFuture<Result<(), StoreError>>;

    /// Puts everything that anybody has written onto stable storage: other processes too, and also where this one may only
    /// read. A store of another host that may only be read is that host's to keep.
    ///
    /// # Errors
    /// As of [`Backend::flush`].
    fn harden(&self) -> LocalBoxFuture<Result<(), StoreError>> {
        self.flush()
    }

    /// Tells the store that the range's content is no longer needed. A hint: without support it does nothing. Reads
    /// of the range are unspecified afterwards.
    ///
    /// # Errors
    /// [`StoreError`].
    fn discard(&self, offset: u64, len: u64) -> LocalBoxFuture<Result<(), StoreError>>;

    /// Makes the range read as zeroes; with `may_unmap` the store may free the space.
    ///
    /// # Errors
    /// [`StoreError`].
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> LocalBoxFuture<Result<(), StoreError>>;

    /// What the store knows of where it holds data, from `offset` on: up to `most` extents that cover the range or its
    /// beginning, at least one, unless `len` is 0. A store that knows nothing calls everything data.
    ///
    /// # Errors
    /// [`StoreError`].
    fn extents(&self, offset: u64, len: u64, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, StoreError>> {
        let _ = (offset, most);
        Box::pin(std::future::ready(Ok(vec![Extent::data(len)])))
    }

    /// Asks for the size again (a volume may have been grown) and returns it. Requests are held to the new size.
    ///
    /// # Errors
    /// [`StoreError`], `Shrunk` when it has become smaller.
    fn refresh_size(&self) -> LocalBoxFuture<Result<u64, StoreError>>;

    /// Makes the store as large as this, durably, and returns its size. What is new reads as zeroes and takes no space but for
    /// its last block. Nothing is ever cut. Only a raw file is its own to make larger.
    ///
    /// # Errors
    /// `NotGrown` with who has it to do, `Smaller`, or what the file system says.
    fn grow(&self, _size_bytes: u64) -> LocalBoxFuture<Result<u64, StoreError>> {
        let error = StoreError::NotGrown { store: self.info().identity, why: self.who_grows() };
        Box::pin(std::future::ready(Err(error)))
    }

    /// Its file, where it is one. What is found stays open for as long as it is kept, with its locks.
    fn file(&self) -> Option<OpenFile> {
        None
    }

    /// Who makes such a store larger, if it cannot itself.
    fn who_grows(&self) -> &'static str;

    /// Waits for requests under way, then lets go of files and connections. Requests that come later fail.
    fn close(&self) -> LocalBoxFuture<()>;

    /// Which parts the store holds itself, where it may stand on another.
    fn map(&self) -> Option<Arc<LayerMap>> {
        None
    }

    /// Looks up who holds the range, for [`Backend::map`].
    ///
    /// # Errors
    /// [`StoreError`].
    fn locate(&self, _offset: u64, _len: u64) -> LocalBoxFuture<Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Reads `len` bytes at an offset.
pub type ReadBelow = Box<dyn Fn(u64, usize) -> LocalBoxFuture<Result<AlignedBuf, StoreError>>>;

/// What [`Backend::extents`] says of a range: offset, length, how many extents at most.
pub type ExtentsBelow = Box<dyn Fn(u64, u64, usize) -> LocalBoxFuture<Result<Vec<Extent>, StoreError>>>;

/// What an image stands on: only read, and through the cache, where those share it who stand on the same.
pub struct Below {
    pub name: String,
    /// Where it is a file.
    pub path: Option<PathBuf>,
    pub size_bytes: u64,
    pub read: ReadBelow,
    pub extents: ExtentsBelow,
}

impl fmt::Debug for Below {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Below").field("name", &self.name).field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

/// How to open a store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreOptions {
    /// Never write. Several processes may have a store open read-only, one writable.
    pub read_only: bool,
    /// Take a file with an image format's magic number for a raw disk all the same.
    pub force_raw: bool,
    /// Bypass the host's page cache where the file system allows it. Without it every block would be cached twice.
    pub direct: bool,
    pub nbd: NbdOptions,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions { read_only: false, force_raw: false, direct: true, nbd: NbdOptions::default() }
    }
}

/// Opens a store on this shard. `below` is what an image stands on; other stores have nothing below them.
///
/// # Errors
/// [`StoreError`] when it is not there, is locked by another process, is not of the format that it is named with, has an
/// unusable size, or its server does not speak NBD's fixed newstyle; `NeedsQemu` for an image that only QEMU understands.
pub async fn open(
    shard: &Shard,
    spec: &StoreSpec,
    below: Option<Below>,
    options: &StoreOptions,
) -> Result<Rc<dyn Backend>, StoreError> {
    match spec {
        StoreSpec::Qcow2 { path, .. } => Ok(Rc::new(qcow2::Qcow2Backend::open(shard, path, below, options).await?)),
        StoreSpec::File(path) => Ok(Rc::new(file::FileBackend::open(shard, path, options).await?)),
        StoreSpec::Nbd { address, export } => {
            Ok(Rc::new(nbd::NbdBackend::open(shard, address, export, options).await?))
        }
    }
}

/// What is wrong with a range, if anything: it must lie within the store.
fn check_range(offset: u64, len: u64, limit: u64) -> Result<(), StoreError> {
    if offset.checked_add(len).is_some_and(|end| end <= limit) {
        return Ok(());
    }
    Err(StoreError::OutOfRange { offset, len, size_bytes: limit })
}

/// The unit of every disk interface; sizes are multiples of it.
const SECTOR_BYTES: u64 = 512;
/// Reads may run to the end of the store's last page.
const PAGE: u64 = crate::types::PAGE_BYTES as u64;
