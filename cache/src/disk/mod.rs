//! Storages and disks on their shard: the policy core put to work on real I/O.
//!
//! - [`Storage`]: one store with its part of the cache; lives on one shard's thread (`storage.rs`)
//! - [`Disk`]: what one export serves: a storage with its own counters
//! - reads (`read.rs`), writes (`write.rs`), prefetch (`prefetch.rs`), the way to the SSD tier (`destage.rs`)

mod destage;
mod prefetch;
mod read;
mod storage;
mod write;

pub use read::ReadData;
pub use storage::{Storage, local};

use crate::access::{Access, AccessOp};
use crate::counters::{DiskCounters, add};
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
}

impl Disk {
    pub fn new(storage: Rc<Storage>, id: u32, counters: Arc<DiskCounters>) -> Disk {
        Disk { storage, counters, id }
    }

    pub fn storage(&self) -> &Rc<Storage> {
        &self.storage
    }

    fn note(&self, op: AccessOp, offset: u64, len: u64, waits: bool) {
        self.note_at(self.storage.shared().now(), op, offset, len, waits);
    }

    fn note_at(&self, at: Duration, op: AccessOp, offset: u64, len: u64, waits: bool) {
        let shared = self.storage.shared();
        let access = Access {
            at,
            disk: self.id,
            storage: self.storage.id(),
            op,
            offset,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            waits,
        };
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
