//! Which stores are open.

use super::StorageHandle;
use crate::disk::local;
use crate::keeper::Unsettled;
use crate::ssd::SsdStorage;
use crate::types::StorageId;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use std::time::{Duration, Instant};

/// How long a checkpoint of the SSD tier waits for stores to flush.
const SETTLE: Duration = Duration::from_secs(10);

/// A store that is open.
pub(super) struct Opened {
    pub(super) handle: StorageHandle,
    pub(super) read_only: bool,
    pub(super) users: usize,
}

#[derive(Default)]
pub(super) struct Registry {
    /// `None`: being opened or closed at this moment.
    pub(super) by_identity: FxHashMap<String, Option<Opened>>,
    pub(super) ids: FxHashMap<String, StorageId>,
}

/// Asks stores to make durable what was written to them. What comes back waits and names those that did not in time: a store
/// that hangs holds up nobody else's checkpoints for longer.
pub(super) fn settle(registry: &Mutex<Registry>, unflushed: &[SsdStorage]) -> Unsettled {
    let open: Vec<_> = {
        let registry = registry.lock();
        let handles = registry.by_identity.values().flatten().map(|opened| &opened.handle);
        let asked = handles.filter_map(|handle| Some((handle.ssd()?.1, handle.id(), handle.shard().clone())));
        asked.filter(|(ssd, ..)| unflushed.contains(ssd)).collect()
    };
    let calls: Vec<_> = open
        .into_iter()
        .map(|(ssd, id, shard)| {
            let call = shard.call(move |_| async move {
                match local(id) {
                    Some(storage) => storage.settle().await,
                    None => false,
                }
            });
            (ssd, call)
        })
        .collect();
    let unflushed = unflushed.to_vec();
    Box::new(move || {
        let deadline = Instant::now() + SETTLE;
        let settled = calls.into_iter().filter_map(|(ssd, mut call)| {
            let left = deadline.saturating_duration_since(Instant::now());
            matches!(call.wait_timeout(left), Ok(Some(true))).then_some(ssd)
        });
        let settled: Vec<_> = settled.collect();
        unflushed.into_iter().filter(|ssd| !settled.contains(ssd)).collect()
    })
}
