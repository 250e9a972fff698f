//! An image in qcow2 format as a store.
//!
//! - [`Qcow2Backend`]: the store: the whole disk that the image describes, with what lies below it
//! - [`follow`]: the images that images name below them, where they may be opened
//! - [`Need`]: why an image needs QEMU
//!
//! | module | holds |
//! | --- | --- |
//! | `header` | the header, checked: the bytes may be a tenant's |
//! | `follow` | which of the names in images are followed |
//! | `container` | the image's file, and imago's view of it |
//! | `order` | what must be durable before what |
//! | `counts` | new tables are counted before they are pointed to |
//! | `read` | where content is; reading it |
//! | `extents` | which parts hold data |
//! | `write` | writes, allocation, zeroes, discards |
//! | `commit` | tables are written before a guest is answered; who may be at a cluster at a time |
//!
//! imago says where a guest offset lies and allocates; bytes are moved by the engine. An image is opened without what is
//! below it: what it does not hold is asked of [`Below`], so that imago never opens a file that an image names.
//!
//! **Acknowledged means written.** QEMU keeps changed tables in its memory until a flush. Here the hypervisor outlives the
//! daemon and goes on with the next one, so a guest never learns that a daemon was killed: before a write that allocates is
//! answered, the tables are in the file. Writes that wait share one such turn.
//!
//! Whatever changes the image runs as a task of its own to its end, whoever still waits for it.

mod commit;
mod container;
mod counts;
#[cfg(test)]
mod crash;
mod extents;
mod follow;
mod header;
mod order;
mod read;
mod write;

pub use follow::{follow, needs};
pub use header::Need;

use super::file::FileBackend;
use super::gate::{Drain, Gate, UnderWay};
use super::layer::LayerMap;
use super::{Backend, Below, Extent, OpenFile, StoreError, StoreInfo, StoreOptions, Transfer};
use crate::engine::{AlignedBuf, IoBuf, LocalBoxFuture, Semaphore, Shard};
use crate::opener;
use commit::{Commits, Ranges};
use container::{Container, Tables};
use futures_util::FutureExt;
use header::{HEAD_BYTES, Header};
use imago::qcow2::Qcow2;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// Requests are split above this.
const MAX_IO_BYTES: u32 = 1 << 30;

/// Allocations, and decompressions, under way at a time. Each holds on to a table for that long; imago keeps 128 tables
/// and fails a request that finds them all held.
const TABLES_IN_USE: usize = 32;

/// A qcow2 image with what is below it.
#[derive(Debug)]
pub(super) struct Qcow2Backend {
    inner: Rc<Inner>,
}

struct Inner {
    shard: Shard,
    identity: String,
    header: Header,
    read_only: bool,
    image: Qcow2<Tables>,
    container: Rc<Container>,
    below: Option<Below>,
    map: Arc<LayerMap>,
    gate: Rc<Gate>,
    drain: Rc<Drain>,
    ranges: Ranges,
    commits: Rc<Commits>,
    /// Allocations side by side; alone, those that give up what was there before.
    taking: Rc<Gate>,
    /// Clusters being counted; alone, tables being written.
    preparing: Rc<Gate>,
    allocations: Rc<Semaphore>,
    inflations: Rc<Semaphore>,
    /// Counts changes of the mapping, so that a look at the tables knows whether it is out of date.
    changes: Cell<u64>,
    /// Decompressed clusters, the newest last.
    inflated: RefCell<VecDeque<(u64, Rc<AlignedBuf>)>>,
    /// imago has panicked: what it holds in memory is not to be trusted.
    broken: Cell<bool>,
}

impl Qcow2Backend {
    /// Opens an image. `below` is what the operator says it stands on.
    ///
    /// # Errors
    /// `NeedsQemu` for what only QEMU understands; `Unsupported` where the header is damaged, or says something else about
    /// what is below; otherwise what opening a file may meet.
    pub(super) async fn open(
        shard: &Shard,
        path: &Path,
        below: Option<Below>,
        options: &StoreOptions,
    ) -> Result<Qcow2Backend, StoreError> {
        let file = FileBackend::open_image(shard, path, options).await?;
        let info = file.info();
        let identity = identity(&info.identity);
        let unsupported = |what: String| StoreError::Unsupported { store: identity.clone(), what };
        let header = read_header(&file, !options.read_only).await?.map_err(|error| unsupported(error.to_string()))?;
        if !header.needs.is_empty() {
            let why: Vec<_> = header.needs.iter().map(ToString::to_string).collect();
            return Err(StoreError::NeedsQemu { store: identity, why: why.join(", ") });
        }
        check_below(shard, path, &header, below.as_ref()).await.map_err(unsupported)?;
        let container = Container::open(file, &header, options.read_only).await?;
        let opening = Qcow2::<Tables>::open_image(Tables::of(&container), !options.read_only);
        let opened = AssertUnwindSafe(opening).catch_unwind().await;
        let mut image = match opened {
            Ok(Ok(image)) => image,
            Ok(Err(error)) => return Err(unsupported(error.to_string())),
            Err(_) => return Err(unsupported("its tables make no sense; see `qemu-img check`".to_owned())),
        };
        // Said, or imago would want to open what the header names.
        image.set_backing(None);
        image.set_data_file(None);
        let inner = Inner {
            shard: shard.clone(),
            map: Arc::new(LayerMap::new(header.size_bytes, header.cluster_bytes)),
            identity,
            header,
            read_only: options.read_only,
            image,
            container,
            below,
            gate: Rc::default(),
            drain: Rc::default(),
            ranges: Ranges::default(),
            commits: Rc::default(),
            taking: Rc::default(),
            preparing: Rc::default(),
            allocations: Semaphore::new(TABLES_IN_USE),
            inflations: Semaphore::new(TABLES_IN_USE),
            changes: Cell::new(0),
            inflated: RefCell::default(),
            broken: Cell::new(false),
        };
        Ok(Qcow2Backend { inner: Rc::new(inner) })
    }
}

/// The identity of an image by that of its file.
fn identity(file: &str) -> String {
    format!("qcow2:{}", file.strip_prefix("file:").unwrap_or(file))
}

async fn read_header(file: &FileBackend, writable: bool) -> Result<Result<Header, header::HeaderError>, StoreError> {
    let file_bytes = file.info().size_bytes;
    let len = file_bytes.next_multiple_of(512).min(HEAD_BYTES as u64) as usize;
    let (result, bufs) = file.read(0, vec![IoBuf::heap(len)]).await;
    result?;
    let head = bufs.first().map(IoBuf::as_slice).unwrap_or_default();
    Ok(Header::parse(head, file_bytes, writable))
}

/// Holds what the image says of the image below it against what the operator has named. The operator's word counts, but a
/// slip would show the guest a wrong disk, and its writes would make that last.
async fn check_below(shard: &Shard, path: &Path, header: &Header, below: Option<&Below>) -> Result<(), String> {
    match (&header.backing, below) {
        (None, None) => Ok(()),
        (None, Some(below)) => Err(format!("it stands on no other image, but {} is named below it", below.name)),
        (Some(says), None) => {
            let here = path.display();
            Err(format!("it stands on `{says}`, which is not opened unasked; write qcow2:{here}?backing=… to name it"))
        }
        (Some(says), Some(below)) => {
            let Some(named) = below.path.clone() else { return Ok(()) };
            let (folder, said, image) = (path.to_owned(), says.clone(), named.clone());
            let same = shard.blocking(move || is_same(&folder, &said, &image)).await;
            match same {
                Ok(true) | Err(_) => Ok(()),
                Ok(false) => Err(format!(
                    "it stands on `{says}`, but {} is named below it; name the right one, or tell the image with `qemu-img \
                     rebase -u`",
                    named.display()
                )),
            }
        }
    }
}

/// Whether the name in an image, if it is a path to something that is there, leads to `named`.
fn is_same(image: &Path, says: &str, named: &Path) -> bool {
    let plain = says.strip_prefix("file:").unwrap_or(says);
    let first = plain.split('/').next().unwrap_or_default();
    if first.contains(':') {
        // A protocol or a JSON description: whatever it leads to is not a plain path.
        return true;
    }
    let folder =
        opener::canonicalize(image).ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or_default();
    let told: PathBuf = folder.join(plain);
    match (opener::canonicalize(&told), opener::canonicalize(named)) {
        (Ok(told), Ok(named)) => told == named,
        _ => true,
    }
}

impl Inner {
    fn begin(&self) -> Result<UnderWay, StoreError> {
        match self.drain.enter() {
            Some(_) if self.broken.get() => Err(self.damaged("its tables make no sense; see `qemu-img check`")),
            Some(under_way) => Ok(under_way),
            None => Err(StoreError::Closed { store: self.identity.clone() }),
        }
    }

    fn begin_change(&self, offset: u64, len: u64) -> Result<UnderWay, StoreError> {
        if self.read_only {
            return Err(StoreError::ReadOnly { store: self.identity.clone() });
        }
        super::check_range(offset, len, self.header.size_bytes)?;
        self.begin()
    }

    fn damaged(&self, what: impl Into<String>) -> StoreError {
        StoreError::Unsupported { store: self.identity.clone(), what: what.into() }
    }

    /// An error of imago's. Those of the file below come back as they went in.
    fn failed(&self, what: &'static str, error: std::io::Error) -> StoreError {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<StoreError>()) {
            Some(inner) => inner.clone(),
            None if error.raw_os_error().is_some() => StoreError::from_io(&self.identity, what, &error),
            None => self.damaged(format!("{what} failed: {error}; see `qemu-img check`")),
        }
    }

    fn cluster_bytes(&self) -> u64 {
        self.header.cluster_bytes
    }

    /// Runs a change as a task of its own.
    async fn run<T: 'static>(
        self: &Rc<Self>,
        change: impl Future<Output = Result<T, StoreError>> + 'static,
    ) -> Result<T, StoreError> {
        match self.shard.spawn(change).await {
            Ok(result) => result,
            Err(_) => {
                self.broken.set(true);
                Err(self.damaged("its tables make no sense; see `qemu-img check`"))
            }
        }
    }

    async fn flush(self: &Rc<Self>) -> Result<(), StoreError> {
        let _under_way = self.begin()?;
        if self.read_only {
            return Ok(());
        }
        self.commit().await?;
        self.container.sync().await
    }
}

impl Backend for Qcow2Backend {
    fn info(&self) -> StoreInfo {
        let inner = &self.inner;
        let file = inner.container.file().info();
        let zero_clusters = !inner.read_only && inner.header.version >= 3;
        StoreInfo {
            identity: inner.identity.clone(),
            size_bytes: inner.header.size_bytes,
            read_only: inner.read_only,
            min_io_bytes: file.min_io_bytes,
            max_io_bytes: MAX_IO_BYTES,
            can_flush: true,
            can_fua: false,
            can_discard: zero_clusters,
            can_write_zeroes: zero_clusters,
            version_stamp: file.version_stamp,
        }
    }

    fn read(&self, offset: u64, bufs: Vec<IoBuf>) -> Transfer {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let reading = AssertUnwindSafe(inner.read(offset, bufs)).catch_unwind().await;
            reading.unwrap_or_else(|_| {
                inner.broken.set(true);
                (Err(inner.damaged("its tables make no sense; see `qemu-img check`")), Vec::new())
            })
        })
    }

    fn write(&self, offset: u64, bufs: Vec<IoBuf>, fua: bool) -> Transfer {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let task = Rc::clone(&inner);
            match inner.run(async move { Ok(task.write(offset, bufs, fua).await) }).await {
                Ok((result, bufs)) => (result, bufs),
                Err(error) => (Err(error), Vec::new()),
            }
        })
    }

    fn flush(&self) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let task = Rc::clone(&inner);
            inner.run(async move { task.flush().await }).await
        })
    }

    fn harden(&self) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.container.file().harden().await })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let task = Rc::clone(&inner);
            inner.run(async move { task.discard(offset, len).await }).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let task = Rc::clone(&inner);
            inner.run(async move { task.write_zeroes(offset, len, may_unmap).await }).await
        })
    }

    fn extents(&self, offset: u64, len: u64, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let looking = AssertUnwindSafe(inner.extents(offset, len, most)).catch_unwind().await;
            looking.unwrap_or_else(|_| {
                inner.broken.set(true);
                Err(inner.damaged("its tables make no sense; see `qemu-img check`"))
            })
        })
    }

    fn refresh_size(&self) -> LocalBoxFuture<Result<u64, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            // For the stamp: the disk's size stands in the header, and the file is locked against those who would change it.
            inner.container.file().refresh_size().await?;
            Ok(inner.header.size_bytes)
        })
    }

    fn file(&self) -> Option<OpenFile> {
        self.inner.container.file().file()
    }

    fn who_grows(&self) -> &'static str {
        "an image is resized while nobody has it open: take the disk away (`disk remove`, `vm detach`), `qemu-img resize`, and add it again"
    }

    fn close(&self) -> LocalBoxFuture<()> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            inner.drain.close().await;
            if !inner.read_only && !inner.broken.get() {
                let task = Rc::clone(&inner);
                let ended = inner.run(async move {
                    task.commit().await?;
                    task.container.sync().await
                });
                if let Err(error) = ended.await {
                    tracing::error!(store = inner.identity, %error, "the image was not closed cleanly");
                }
            }
            inner.container.file().close().await;
        })
    }

    fn map(&self) -> Option<Arc<LayerMap>> {
        Some(Arc::clone(&self.inner.map))
    }

    fn locate(&self, offset: u64, len: u64) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move {
            let looking = AssertUnwindSafe(inner.locate(offset, len)).catch_unwind().await;
            looking.unwrap_or_else(|_| {
                inner.broken.set(true);
                Err(inner.damaged("its tables make no sense; see `qemu-img check`"))
            })
        })
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2").field("identity", &self.identity).finish_non_exhaustive()
    }
}
