//! Storages and disks on their shard: the policy core put to work on real I/O.
//!
//! - [`Storage`]: one store with its part of the cache; lives on one shard's thread (`storage.rs`)
//! - [`Disk`]: what one export serves: a storage with its own counters
//! - reads (`read.rs`), reads on a chain of images (`chain.rs`), writes (`write.rs`), prefetch (`prefetch.rs`), the way to the SSD tier (`destage.rs`)

mod chain;
mod destage;
mod prefetch;
mod read;
mod storage;
mod write;

pub use chain::spread;
pub(crate) use chain::{extents_of, read_copy};
pub use read::ReadData;
pub(crate) use storage::SsdPart;
pub use storage::{Storage, local};

use crate::access::{Access, AccessOp};
use crate::counters::{DiskCounters, add};
use crate::types::StorageId;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// One export's view of a storage. Stays on the storage's shard.
#[derive(Clone, Debug)]
pub struct Disk {
    storage: Rc<Storage>,
    counters: Arc<DiskCounters>,
    /// Names the disk in the accesses that the learner sees.
    id: u32,
    /// The images that the disk stands on, if any.
    chain: Option<Rc<chain::Chain>>,
}

impl Disk {
    pub fn new(storage: Rc<Storage>, id: u32, counters: Arc<DiskCounters>) -> Disk {
        let chain = chain::Chain::of(&storage);
        Disk { storage, counters, id, chain }
    }

    pub fn storage(&self) -> &Rc<Storage> {
        &self.storage
    }

    fn note(&self, op: AccessOp, offset: u64, len: u64, waits: bool) {
        self.note_at(self.storage.shared().now(), self.storage.id(), op, offset, len, waits);
    }

    fn note_on(&self, storage: StorageId, op: AccessOp, offset: u64, len: u64, waits: bool) {
        self.note_at(self.storage.shared().now(), storage, op, offset, len, waits);
    }

    fn note_at(&self, at: Duration, storage: StorageId, op: AccessOp, offset: u64, len: u64, waits: bool) {
        let shared = self.storage.shared();
        let access =
            Access { at, disk: self.id, storage, op, offset, len: u32::try_from(len).unwrap_or(u32::MAX), waits };
        shared.accesses().push(access, waits);
    }

    fn count_write(&self, len: u64, ok: bool) {
        add(&self.counters.writes, 1);
        add(&self.counters.write_bytes, len);
        if !ok {
            add(&self.counters.write_errors, 1);
        }
    }
}
