//! Prefetch: takes what the core's queue and budget allow and brings it into the RAM tier.

use super::Storage;
use crate::engine::IoBuf;
use crate::policy::{PrefetchIo, PrefetchStep};
use crate::types::{PageMask, PageRange};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long to wait when there is room for nothing and nothing is under way that would make some.
const RETRY: Duration = Duration::from_millis(20);

impl Storage {
    /// Issues prefetches until budget or queue is exhausted. Called when something was queued and when something ended.
    pub(crate) fn pump_prefetch(self: &Rc<Self>) {
        if self.closing() {
            return;
        }
        loop {
            let now = self.shared.now();
            let mut core = self.shared.core();
            // Pages that the SSD tier holds are a tenth of a millisecond away: no reason to spend RAM on a guess.
            let step = core.next_prefetch(self.id, now, |block| self.on_ssd(block));
            match step {
                PrefetchStep::Idle => return,
                PrefetchStep::Wait => {
                    drop(core);
                    if self.prefetches.get() == 0 {
                        self.retry_prefetch();
                    }
                    return;
                }
                PrefetchStep::Io(io) => {
                    let claims: Vec<Option<IoBuf>> = io
                        .parts
                        .iter()
                        .map(|(slot, first, count)| self.shared.arena().claim(*slot, *first, *count).map(IoBuf::from))
                        .collect();
                    drop(core);
                    self.prefetches.set(self.prefetches.get() + 1);
                    let storage = Rc::clone(self);
                    self.shard.spawn(async move {
                        storage.run_prefetch(io, claims.into_iter().collect()).await;
                        storage.prefetches.set(storage.prefetches.get() - 1);
                        storage.pump_prefetch();
                    });
                }
            }
        }
    }

    async fn run_prefetch(self: &Rc<Self>, io: PrefetchIo, bufs: Option<Vec<IoBuf>>) {
        let begun = Instant::now();
        let range = PageRange { first: io.first, count: io.pages };
        let ok = match bufs {
            Some(bufs) => self.read_store(range, bufs).await.map(drop).is_ok(),
            None => false,
        };
        let now = self.shared.now();
        let mut core = self.shared.core();
        for (slot, first, count) in &io.parts {
            core.finish_fill(*slot, PageMask::run(*first, *count), ok);
        }
        core.finish_prefetch(self.id, io.pages, ok, now, begun.elapsed());
        drop(core);
        for (slot, _, _) in &io.parts {
            self.wake_waiters(*slot);
        }
    }

    fn retry_prefetch(self: &Rc<Self>) {
        if self.prefetch_retry.replace(true) {
            return;
        }
        let storage = Rc::clone(self);
        self.shard.spawn(async move {
            storage.shard.sleep(RETRY).await;
            storage.prefetch_retry.set(false);
            storage.pump_prefetch();
        });
    }
}
