//! Writes: acknowledged when the store has them.

use super::storage::Running;
use super::storage::SsdPart;
use super::{Disk, Storage};
use crate::access::AccessOp;
use crate::backend::{Extent, StoreError};
use crate::counters::add;
use crate::engine::{AlignedBuf, IoBuf, Shard};
use crate::policy::{WriteEnd, WriteId};
use crate::ssd::GuestWrite;
use crate::types::{BLOCK_BYTES, PAGE_BYTES, PageRange};
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

/// A healthy SSD marks a region in a fraction of a millisecond, a busy one in some tens. One that takes longer than this is
/// given up: a guest must not wait for a cache.
const MARK_WAIT: Duration = Duration::from_secs(1);
/// How long to wait until it is on record elsewhere that the SSD tier must not be believed.
const VETO_WAIT: Duration = Duration::from_secs(1);

impl Disk {
    /// Writes `data` at `offset`. The bytes are the caller's copy: a guest that changes its buffer meanwhile changes
    /// neither the store nor the cache.
    ///
    /// # Errors
    /// The store failed; what it holds of the range is unknown, and the cache has forgotten it.
    pub async fn write(&self, offset: u64, data: AlignedBuf) -> Result<(), StoreError> {
        self.write_with(offset, data, false).await
    }

    /// [`Disk::write`] that is on stable storage when it succeeds.
    ///
    /// # Errors
    /// The store failed.
    pub async fn write_durable(&self, offset: u64, data: AlignedBuf) -> Result<(), StoreError> {
        self.write_with(offset, data, true).await
    }

    async fn write_with(&self, offset: u64, data: AlignedBuf, fua: bool) -> Result<(), StoreError> {
        let _running = Running::new(&self.storage);
        let len = data.len() as u64;
        self.note(AccessOp::Write, offset, len, false);
        let result = self.storage.write(offset, data, fua).await;
        self.count_write(len, result.is_ok());
        result
    }

    /// Makes every acknowledged write durable on the store.
    ///
    /// # Errors
    /// The store failed.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let _running = Running::new(&self.storage);
        add(&self.counters.flushes, 1);
        let result = self.storage.flush_store().await;
        self.storage.counters.health.note(&result);
        result
    }

    /// Tells the store that the range is not needed any more. Its content is undefined afterwards.
    ///
    /// # Errors
    /// The store failed.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let _running = Running::new(&self.storage);
        self.note(AccessOp::Discard, offset, len, false);
        add(&self.counters.discards, 1);
        self.storage.changing(offset, len, || self.storage.backend.discard(offset, len)).await
    }

    /// Zeroes the range, with `may_unmap` perhaps by unmapping it.
    ///
    /// # Errors
    /// The store failed.
    pub async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), StoreError> {
        let _running = Running::new(&self.storage);
        self.note(AccessOp::Discard, offset, len, false);
        let change = || self.storage.backend.write_zeroes(offset, len, may_unmap);
        let result = self.storage.changing(offset, len, change).await;
        self.count_write(len, result.is_ok());
        result
    }

    /// What the store knows of where it holds data; see [`crate::backend::Backend::extents`].
    ///
    /// # Errors
    /// The store failed.
    pub async fn extents(&self, offset: u64, len: u64, most: usize) -> Result<Vec<Extent>, StoreError> {
        let _running = Running::new(&self.storage);
        self.storage.backend.extents(offset, len, most).await
    }
}

/// Ends a write with the core even if the task that runs it is dropped.
struct Write<'a> {
    storage: &'a Storage,
    id: Option<WriteId>,
    /// With the SSD tier. Left behind if the task is dropped: then nobody knows whether the store still takes the write.
    ssd: Option<(GuestWrite, Rc<SsdPart>)>,
    /// Whether a tier knows of it. Of one that is dropped before the store has answered nobody knows when it is over.
    announced: bool,
}

impl Write<'_> {
    fn begin(storage: &Storage, offset: u64, len: u64) -> Write<'_> {
        let id = storage.shared.core().begin_write(storage.id, offset, len);
        let range = PageRange::covering(offset, len);
        let ssd = storage.ssd().map(|part| {
            let write = part.tier.begin_write(part.storage, range.first, range.count);
            (write, part)
        });
        if ssd.is_none() {
            storage.unannounced.set(storage.unannounced.get() + 1);
        }
        Write { storage, id, announced: ssd.is_some(), ssd }
    }

    /// Waits until the store may be written to: a crash must not bring back what the SSD tier had of the range.
    async fn permitted(&mut self) {
        let Some((write, part)) = &mut self.ssd else { return };
        if write.must_wait() {
            add(&self.storage.counters.ssd_marks, 1);
            let shard = &self.storage.shard;
            if !ready_within(shard, write, MARK_WAIT).await {
                part.tier.distrust("marking what guests write to took longer than a second");
                ready_within(shard, write, VETO_WAIT).await;
            }
        }
        write.submit();
    }

    /// The store has answered.
    fn answered(&mut self) {
        match self.ssd.take() {
            Some((write, _)) => write.end(),
            None if !self.announced => self.storage.unannounced.set(self.storage.unannounced.get() - 1),
            None => {}
        }
        self.announced = true;
    }

    /// The store has `data` at `offset`: the RAM tier follows.
    fn written(mut self, offset: u64, data: &[u8]) {
        let Some(id) = self.id.take() else { return };
        let shared = &self.storage.shared;
        let arena = shared.arena();
        shared.core().end_write(self.storage.id, id, WriteEnd::Written, shared.now(), |block, slot, pages| {
            let Some(pinned) = arena.pin_under_lock(slot) else { return };
            let base = block.0 * BLOCK_BYTES as u64;
            for (first, count) in pages.runs() {
                let from = (base + first * PAGE_BYTES as u64).max(offset);
                let to = (base + (first + count) * PAGE_BYTES as u64).min(offset + data.len() as u64);
                if from < to {
                    pinned.write((from - base) as usize, &data[(from - offset) as usize..(to - offset) as usize]);
                }
            }
        });
    }
}

/// Whether a write may go on before `limit` is over.
async fn ready_within(shard: &Shard, write: &GuestWrite, limit: Duration) -> bool {
    let mut patience = pin!(shard.sleep(limit));
    poll_fn(|context| match write.poll_ready(context) {
        Poll::Ready(()) => Poll::Ready(true),
        Poll::Pending => patience.as_mut().poll(context).map(|()| false),
    })
    .await
}

impl Drop for Write<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            let shared = &self.storage.shared;
            shared.core().end_write(self.storage.id, id, WriteEnd::Changed, shared.now(), |_, _, _| {});
        }
    }
}

impl Storage {
    async fn write(self: &Rc<Self>, offset: u64, data: AlignedBuf, fua: bool) -> Result<(), StoreError> {
        let len = data.len() as u64;
        let mut write = Write::begin(self, offset, len);
        write.permitted().await;
        add(&self.counters.store_writes, 1);
        add(&self.counters.store_write_bytes, len);
        let (result, bufs) = self.backend.write(offset, vec![IoBuf::Heap(data)], fua).await;
        write.answered();
        self.counters.health.note(&result);
        match (result, bufs.first()) {
            (Ok(()), Some(data)) => {
                write.written(offset, data.as_slice());
                Ok(())
            }
            (result, _) => {
                add(&self.counters.store_write_errors, 1);
                result
            }
        }
    }

    /// Runs something that changes the store's content in a way that the cache does not follow byte by byte.
    async fn changing<F>(&self, offset: u64, len: u64, change: impl FnOnce() -> F) -> Result<(), StoreError>
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let mut write = Write::begin(self, offset, len);
        write.permitted().await;
        add(&self.counters.store_writes, 1);
        let result = change().await;
        write.answered();
        result.inspect_err(|_| add(&self.counters.store_write_errors, 1))
    }
}
