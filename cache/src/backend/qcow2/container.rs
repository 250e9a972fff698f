//! The image's file, for imago: tables are read and written through the shard, in an order that survives a power cut.
//!
//! - [`Container`]: the file with its [`Order`]; guest data goes through it as well
//! - [`Tables`]: imago's view of it. imago wants storage that any thread may have, so it gets a number, and the container is
//!   found by it on its shard
//!
//! Reads and writes of tables are copied: they are few, and imago lends its buffers where the engine must own them.

use super::counts::Counts;
use super::header::Header;
use super::order::{self, Kind, Order, Root};
use crate::backend::file::FileBackend;
use crate::backend::{Backend, StoreError};
use crate::engine::{AlignedBuf, IoBuf, Semaphore};
use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use rustc_hash::FxHashMap;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Offsets and lengths that imago has to keep to.
const ALIGN: usize = 512;
/// imago never writes zeroes in larger runs than a cluster; this is what goes out at a time.
const ZEROES_BYTES: u64 = 1 << 20;

thread_local! {
    static CONTAINERS: RefCell<FxHashMap<u64, Rc<Container>>> = RefCell::default();
}
static NEXT: AtomicU64 = AtomicU64::new(0);

/// An image's file on its shard.
#[derive(Debug)]
pub(super) struct Container {
    file: FileBackend,
    order: RefCell<Order>,
    counts: RefCell<Counts>,
    /// One barrier at a time: who comes second must not find the books cleared by one that is not through yet.
    barrier: Rc<Semaphore>,
    /// Blocks of counts are written one at a time: some are read first and written back changed.
    counting: Rc<Semaphore>,
    /// Writes to tables, and barriers.
    pub(super) table_writes: Cell<u64>,
    pub(super) barriers: Cell<u64>,
}

impl Container {
    /// Reads where the tables of a file lie, if it is to be written to.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) async fn open(file: FileBackend, header: &Header, read_only: bool) -> Result<Rc<Container>, StoreError> {
        let cluster_bytes = header.cluster_bytes;
        let roots = [
            header.l1_offset..header.l1_offset + header.l1_bytes,
            header.reftable_offset..header.reftable_offset + header.reftable_bytes,
        ];
        let (mut pointers, mut blocks) = (Vec::new(), Vec::new());
        if !read_only {
            pointers = read_table(&file, &roots[0]).await?;
            blocks = read_table(&file, &roots[1]).await?;
        }
        let set = |entries: &[u64]| entries.iter().copied().filter(|offset| *offset != 0).collect();
        let tables = order::Tables { cluster_bytes, counts: set(&blocks), pointers: set(&pointers), roots };
        Ok(Rc::new(Container {
            file,
            order: RefCell::new(Order::new(tables)),
            counts: RefCell::new(Counts::new(cluster_bytes, header.refcount_order, blocks)),
            barrier: Semaphore::new(1),
            counting: Semaphore::new(1),
            table_writes: Cell::new(0),
            barriers: Cell::new(0),
        }))
    }

    pub(super) fn file(&self) -> &FileBackend {
        &self.file
    }

    pub(super) fn epoch(&self) -> u64 {
        self.order.borrow().epoch()
    }

    pub(super) fn tables_written(&self, epoch: u64) {
        self.order.borrow_mut().tables_written(epoch);
    }

    /// Clusters are given up while this is held.
    pub(super) fn freeing(&self) -> Freeing<'_> {
        self.order.borrow_mut().begin_freeing();
        Freeing(&self.order)
    }

    /// Whether there may be pointers in the file to clusters that are free to be taken.
    pub(super) fn has_unwritten_frees(&self) -> bool {
        self.order.borrow().has_unwritten_frees()
    }

    /// Writes guest data to where the image has it, or will have it once it is there (`fresh`).
    pub(super) async fn write_data(
        &self,
        offset: u64,
        bufs: Vec<IoBuf>,
        fresh: bool,
    ) -> (Result<(), StoreError>, Vec<IoBuf>) {
        let len = crate::engine::bufs::total_len(&bufs) as u64;
        if self.order.borrow().is_metadata(offset..offset.saturating_add(len)) {
            let store = self.file.info().identity;
            let what = "a pointer in the image leads into its own tables; see `qemu-img check`".to_owned();
            return (Err(StoreError::Unsupported { store, what }), bufs);
        }
        if !fresh {
            return self.put(offset, bufs).await;
        }
        // Else data would wait for every barrier that is under way, and those behind it could not share the next.
        let freed = self.order.borrow().has_freed();
        if freed && let Err(error) = self.before(Kind::Data).await {
            return (Err(error), bufs);
        }
        let (result, bufs) = self.put(offset, bufs).await;
        self.order.borrow_mut().written(Kind::Data);
        (result, bufs)
    }

    async fn put(&self, offset: u64, bufs: Vec<IoBuf>) -> (Result<(), StoreError>, Vec<IoBuf>) {
        #[cfg(test)]
        let begun = super::crash::begin();
        let (result, bufs) = self.file.write(offset, bufs, false).await;
        #[cfg(test)]
        super::crash::written(begun, offset, &bufs);
        (result, bufs)
    }

    /// Waits until everything that must be durable before a write of this kind is.
    async fn before(&self, kind: Kind) -> Result<(), StoreError> {
        // Taken even where nothing is dirty: a barrier may be under way, and what it covers does not count as dirty.
        let _alone = self.barrier.acquire().await;
        if !self.order.borrow().waits(kind) {
            return Ok(());
        }
        self.sync_alone().await
    }

    async fn sync_alone(&self) -> Result<(), StoreError> {
        let before = self.order.borrow_mut().begin_barrier();
        self.barriers.set(self.barriers.get() + 1);
        #[cfg(test)]
        let covers = super::crash::begin();
        let result = self.file.flush().await;
        #[cfg(test)]
        super::crash::synced(covers);
        let mut order = self.order.borrow_mut();
        match result {
            Ok(()) => order.end_barrier(before),
            Err(_) => order.barrier_failed(before),
        }
        drop(order);
        result
    }

    /// Puts everything that was written before onto stable storage.
    pub(super) async fn sync(&self) -> Result<(), StoreError> {
        let _alone = self.barrier.acquire().await;
        self.sync_alone().await
    }

    async fn write_table(&self, offset: u64, mut data: AlignedBuf) -> Result<(), StoreError> {
        let (root, kind) = {
            let order = self.order.borrow();
            (order.root(offset), order.kind(offset))
        };
        if let Some(root) = root {
            self.count_new(root, offset, &data).await?;
        }
        let counting = match kind {
            Kind::Counts => Some(self.counting.acquire().await),
            _ => None,
        };
        self.counts.borrow().correct(offset, &mut data);
        let (result, data) = self.write_as(kind, offset, data).await;
        drop(counting);
        result?;
        match data {
            Some(data) if offset == 0 => self.follow_header(&data).await,
            _ => Ok(()),
        }
    }

    async fn write_as(
        &self,
        kind: Kind,
        offset: u64,
        data: AlignedBuf,
    ) -> (Result<(), StoreError>, Option<AlignedBuf>) {
        if let Err(error) = self.before(kind).await {
            return (Err(error), None);
        }
        self.table_writes.set(self.table_writes.get() + 1);
        let (result, mut bufs) = self.put(offset, vec![data.into()]).await;
        // Also after a failure: part of it may be there.
        self.order.borrow_mut().written(kind);
        let data = match bufs.pop() {
            Some(IoBuf::Heap(data)) => Some(data),
            _ => None,
        };
        (result, data)
    }

    /// Counts tables to which a piece of a root table points for the first time.
    async fn count_new(&self, root: Root, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        for (i, bytes) in data.chunks_exact(8).enumerate() {
            let table = table_offset(bytes);
            let at = offset + i as u64 * 8;
            let Some(index) = self.order.borrow_mut().add_table(root, at, table) else { continue };
            if root == Root::Counts {
                self.counts.borrow_mut().set_block(index, table);
            }
            self.count(table).await?;
        }
        Ok(())
    }

    /// Makes the count of a cluster in use one on disk, where it is zero.
    async fn count(&self, cluster: u64) -> Result<(), StoreError> {
        let entry = self.counts.borrow().entry(cluster);
        // imago has counted it, so there is a block for it.
        let Some(entry) = entry else { return Ok(()) };
        let _counting = self.counting.acquire().await;
        let byte = entry.block + self.counts.borrow().byte(entry);
        let sector = byte - byte % ALIGN as u64;
        self.counts.borrow_mut().keep(entry);
        let (result, mut bufs) = self.file.read(sector, vec![IoBuf::heap(ALIGN)]).await;
        result?;
        let Some(IoBuf::Heap(mut data)) = bufs.pop() else { return Ok(()) };
        if self.counts.borrow().correct(sector, &mut data) {
            self.write_as(Kind::Counts, sector, data).await.0?;
        }
        Ok(())
    }

    /// imago has moved the refcount table, to make it larger.
    async fn follow_header(&self, head: &[u8]) -> Result<(), StoreError> {
        let field =
            |at: usize| head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
        let clusters = field(52) & 0xffff_ffff;
        let cluster_bytes = self.order.borrow().cluster_bytes();
        let range = field(48)..field(48).saturating_add(clusters.saturating_mul(cluster_bytes));
        if !self.order.borrow_mut().move_root(Root::Counts, range.clone()) {
            return Ok(());
        }
        // The old one is given up.
        self.order.borrow_mut().freed();
        let blocks = read_table(&self.file, &range).await?;
        for block in blocks.iter().filter(|block| **block != 0) {
            self.order.borrow_mut().add_counts(*block);
        }
        self.counts.borrow_mut().set_blocks(blocks);
        Ok(())
    }
}

/// Clusters are being given up.
#[must_use]
pub(super) struct Freeing<'a>(&'a RefCell<Order>);

impl Drop for Freeing<'_> {
    fn drop(&mut self) {
        self.0.borrow_mut().end_freeing();
    }
}

/// imago's end of a container. Everything but its size works only on the container's shard.
pub(super) struct Tables {
    number: u64,
    size: AtomicU64,
    helper: CommonStorageHelper,
}

impl Tables {
    /// Lets imago at a container of this shard, until [`Tables`] is dropped here.
    pub(super) fn of(container: &Rc<Container>) -> Tables {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        CONTAINERS.with_borrow_mut(|all| all.insert(number, Rc::clone(container)));
        let size = AtomicU64::new(container.file.info().size_bytes);
        Tables { number, size, helper: CommonStorageHelper::default() }
    }

    fn container(&self) -> io::Result<Rc<Container>> {
        let found = CONTAINERS.with_borrow(|all| all.get(&self.number).cloned());
        found.ok_or_else(|| io::Error::other("the image is not open on this thread"))
    }

    async fn write(&self, offset: u64, data: AlignedBuf) -> io::Result<()> {
        let end = offset.saturating_add(data.len() as u64);
        self.container()?.write_table(offset, data).await.map_err(to_io)?;
        self.size.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        // Thread-local storage may be gone when a shard's thread ends.
        let _ = CONTAINERS.try_with(|all| all.borrow_mut().remove(&self.number));
    }
}

impl fmt::Debug for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tables({})", self.number)
    }
}

impl fmt::Display for Tables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}", self.number)
    }
}

fn to_io(error: StoreError) -> io::Error {
    io::Error::other(error)
}

impl Storage for Tables {
    fn req_align(&self) -> usize {
        ALIGN
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size.load(Ordering::Relaxed))
    }

    async unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let len = usize::try_from(bufv.len()).map_err(io::Error::other)?;
        let (result, bufs) = self.container()?.file.read(offset, vec![IoBuf::heap(len)]).await;
        result.map_err(to_io)?;
        if let Some(buf) = bufs.first() {
            bufv.copy_from_slice(buf.as_slice());
        }
        Ok(())
    }

    async unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut data = AlignedBuf::new(usize::try_from(bufv.len()).map_err(io::Error::other)?);
        bufv.copy_into_slice(&mut data);
        self.write(offset, data).await
    }

    async unsafe fn pure_write_zeroes(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        while length > 0 {
            let step = length.min(ZEROES_BYTES);
            self.write(offset, AlignedBuf::zeroed(step as usize)).await?;
            (offset, length) = (offset + step, length - step);
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        self.container()?.sync().await.map_err(to_io)
    }

    /// Everything that writes runs to its end whoever waits for it: see [`super::Qcow2Backend`].
    async fn settle_writes(&self) -> io::Result<()> {
        Ok(())
    }

    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

/// Offsets in a table of at most 32 MiB; 0 for none.
async fn read_table(file: &FileBackend, range: &Range<u64>) -> Result<Vec<u64>, StoreError> {
    const STEP_BYTES: usize = 1 << 20;
    let mut entries = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let len = ((range.end - at) as usize).min(STEP_BYTES);
        let (result, bufs) = file.read(at, vec![IoBuf::heap(len.next_multiple_of(ALIGN))]).await;
        result?;
        let bytes = bufs.first().map(IoBuf::as_slice).unwrap_or_default();
        entries.extend(bytes[..len.min(bytes.len())].chunks_exact(8).map(table_offset));
        at += len as u64;
    }
    Ok(entries)
}

/// The offset in an entry of eight bytes of an L1 or refcount table: bits 9 to 55.
fn table_offset(entry: &[u8]) -> u64 {
    entry.try_into().map_or(0, u64::from_be_bytes) & 0x00ff_ffff_ffff_fe00
}
