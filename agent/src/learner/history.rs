//! Accesses on their way to the database: gathered by disk, written as segments.

use crate::store::segment::{AccessOp as StoredOp, AccessRecord, SEGMENT_ACCESSES_MAX};
use crate::store::{Accesses, Store};
use prestage_cache::access::{Access, AccessOp};
use prestage_cache::types::PageRange;
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// An incomplete segment waits this long for more; a daemon that is killed loses at most so much history.
const FLUSH_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Gathered {
    storage: String,
    vm: String,
    since: Duration,
    records: Vec<AccessRecord>,
}

/// Accesses not yet handed to the database, by disk.
#[derive(Debug)]
pub(super) struct HistoryBuffer {
    by_disk: HashMap<u32, Gathered>,
    /// Unix time of the cache clock's zero, microseconds.
    epoch_us: u64,
}

impl HistoryBuffer {
    pub(super) fn new(now: Duration) -> HistoryBuffer {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        HistoryBuffer { by_disk: HashMap::new(), epoch_us: super::model::micros(unix.saturating_sub(now)) }
    }

    /// A disk's accesses are kept under these names from now on.
    pub(super) fn name(&mut self, disk: u32, storage: &str, vm: &str) {
        let gathered =
            Gathered { storage: storage.to_owned(), vm: vm.to_owned(), since: Duration::ZERO, records: Vec::new() };
        self.by_disk.insert(disk, gathered);
    }

    pub(super) fn push(&mut self, access: &Access, store: &Store) {
        let Some(gathered) = self.by_disk.get_mut(&access.disk) else { return };
        if gathered.records.is_empty() {
            gathered.since = access.at;
        }
        let range = PageRange::covering(access.offset, u64::from(access.len));
        gathered.records.push(AccessRecord {
            at_us: self.epoch_us.saturating_add(super::model::micros(access.at)),
            op: match access.op {
                AccessOp::Read => StoredOp::Read,
                AccessOp::Write => StoredOp::Write,
                AccessOp::Discard => StoredOp::Discard,
            },
            page: range.first,
            pages: u32::try_from(range.count).unwrap_or(u32::MAX),
        });
        if gathered.records.len() >= SEGMENT_ACCESSES_MAX {
            gathered.write(store);
        }
    }

    /// Hands over what has waited long enough, or everything.
    pub(super) fn flush(&mut self, now: Duration, everything: bool, store: &Store) {
        for gathered in self.by_disk.values_mut() {
            let due = now.saturating_sub(gathered.since) >= FLUSH_AFTER;
            if !gathered.records.is_empty() && (everything || due) {
                gathered.write(store);
            }
        }
    }

    pub(super) fn remove(&mut self, disk: u32, store: &Store) {
        if let Some(mut gathered) = self.by_disk.remove(&disk)
            && !gathered.records.is_empty()
        {
            gathered.write(store);
        }
    }
}

impl Gathered {
    fn write(&mut self, store: &Store) {
        // The store counts what it cannot take; history is no reason to hold anything up.
        drop(store.append_accesses(Accesses {
            storage: self.storage.clone(),
            vm: self.vm.clone(),
            program: String::new(),
            records: std::mem::take(&mut self.records),
        }));
    }
}
