//! The stores behind the cache: raw files, block devices and NBD exports.
//!
//! - [`Backend`]: what every store can do
//! - [`StoreInfo`], [`Stamp`]: what is known about one
//! - [`StoreSpec`]: its name, as operators write it; [`StoreOptions`], [`NbdOptions`]: how to open it
//! - [`StoreError`]: what can go wrong
//! - [`open`]: the way in
//!
//! A backend lives on its shard's thread and does all its I/O through that shard.

mod device;
mod error;
mod file;
mod gate;
mod nbd;
mod spec;

pub use error::StoreError;
pub use nbd::NbdOptions;
pub use spec::{NbdAddress, SpecError, StoreSpec};

use crate::engine::{IoBuf, LocalBoxFuture, Shard};
use std::fmt;
use std::rc::Rc;

/// Identifies the state of a file between two runs: unchanged means that what was cached from it is still true.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stamp {
    pub size_bytes: u64,
    pub mtime_ns: i128,
    pub ctime_ns: i128,
    pub inode: u64,
    pub device: u64,
    /// The times are of this host's clock, as they are on a file system of its own.
    pub local_clock: bool,
}

/// What is known about a store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreInfo {
    /// The same for every way of naming the same store: `file:/canonical/path`, `nbd://host:port/export` or
    /// `nbd+unix:///export?socket=/path`.
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
    /// `None` where the store has nothing to compare (NBD, block devices).
    pub version_stamp: Option<Stamp>,
}

/// Gives the buffers back with the outcome.
pub type Transfer = LocalBoxFuture<(Result<(), StoreError>, Vec<IoBuf>)>;

/// A store. Requests may overlap in time and complete in any order; callers that need an order wait in between.
///
/// Offsets and lengths are in bytes and multiples of 512. Dropping the future of a write does not undo it: it may happen
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

    /// Asks for the size again (a volume may have been grown) and returns it. Requests are held to the new size.
    ///
    /// # Errors
    /// [`StoreError`], `Shrunk` when it has become smaller.
    fn refresh_size(&self) -> LocalBoxFuture<Result<u64, StoreError>>;

    /// Waits for requests under way, then lets go of files and connections. Requests that come later fail.
    fn close(&self) -> LocalBoxFuture<()>;
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

/// Opens a store on this shard.
///
/// # Errors
/// [`StoreError`] when it is not there, is locked by another process, is not a raw disk, has an unusable size, or its
/// server does not speak NBD's fixed newstyle.
pub async fn open(shard: &Shard, spec: &StoreSpec, options: &StoreOptions) -> Result<Rc<dyn Backend>, StoreError> {
    match spec {
        StoreSpec::File(path) => Ok(Rc::new(file::FileBackend::open(shard, path, options).await?)),
        StoreSpec::Nbd { address, export } => {
            Ok(Rc::new(nbd::NbdBackend::open(shard, address, export, options).await?))
        }
    }
}

/// What is wrong with a range, if anything: it must be a multiple of 512 and lie within the store.
fn check_range(offset: u64, len: u64, limit: u64) -> Result<(), StoreError> {
    let end = offset.checked_add(len);
    let aligned = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
    if aligned && end.is_some_and(|end| end <= limit) {
        return Ok(());
    }
    Err(StoreError::OutOfRange { offset, len, size_bytes: limit })
}

/// The unit of every disk interface; requests and sizes are multiples of it.
const SECTOR_BYTES: u64 = 512;
/// Reads may run to the end of the store's last page.
const PAGE: u64 = crate::types::PAGE_BYTES as u64;
