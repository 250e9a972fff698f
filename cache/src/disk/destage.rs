//! The way of used blocks from the RAM tier to the SSD tier: in the background, a second after their last new page.

use super::Storage;
use crate::counters::add;
use crate::engine::{AlignedBuf, IoBuf};
use crate::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PageMask};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// More pages of a block tend to follow the first: waiting saves writing the block twice.
const SETTLE: Duration = Duration::from_secs(1);
/// Pause between looks at the queue while it is not empty.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a write may take before its device is given up for a while. Nobody waits for it but the storage's end.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Blocks written between two looks: with the pause, at most 40 MiB/s of background writes a storage.
const BATCH: usize = 64;

impl Storage {
    /// Starts the background writer if something waits and it is not running.
    pub(super) fn start_destage(self: &Rc<Self>) {
        if self.ssd().is_none() || self.closing() || self.destaging.replace(true) {
            return;
        }
        let storage = Rc::clone(self);
        self.shard.spawn(async move {
            while !storage.closing() && storage.shared.core().destage_backlog(storage.id) > 0 {
                storage.shard.sleep(PAUSE).await;
                let before = storage.shared.now().saturating_sub(SETTLE);
                for _ in 0..BATCH {
                    if !storage.destage_one(before).await {
                        break;
                    }
                }
            }
            storage.destaging.set(false);
        });
    }

    /// Writes everything that waits, for a clean stop. Gives up at `deadline`.
    pub(crate) async fn drain_destage(self: &Rc<Self>, deadline: Instant) {
        while Instant::now() < deadline && self.destage_one(Duration::MAX).await {}
    }

    /// Writes one block that has waited since before `before`; false if there is none.
    async fn destage_one(self: &Rc<Self>, before: Duration) -> bool {
        let Some(part) = self.ssd().filter(|part| part.settled.get() && !part.tier.is_loading()) else { return false };
        let (tier, storage) = (&part.tier, &part.storage);
        let Some((block, version, mask, mut copy)) = self.copy_next(before) else { return false };
        let held = tier.lookup(*storage, block);
        if held.contains(mask) {
            self.shared.core().finish_destage(self.id, block, version, held);
            return true;
        }
        // The new slot takes the old one's place, so it takes along what only the old one has.
        let old = held.minus(mask);
        // Registered before anything can come between: a write from here on aborts the insertion.
        let Some(write) = tier.begin_insert(*storage, block, mask | old) else { return true };
        if !old.is_empty() {
            match self.read_ssd(block).await {
                Some((buffer, held)) if held.contains(old) => copy_pages(&buffer, &mut copy, old),
                // Overwritten, evicted or damaged meanwhile; the block is written when it is next used.
                _ => return true,
            }
        }
        let (checksum, offset) = (write.checksum(&copy), write.offset());
        let written = self.shard.write_all_at(&part.fd, vec![IoBuf::Heap(copy)], offset, false);
        add(&self.counters.ssd_writes, 1);
        add(&self.counters.ssd_write_bytes, BLOCK_BYTES as u64);
        let storage = Rc::clone(self);
        // With the slot until the device has let go of it, also when nobody waits any more.
        let writing = self.shard.spawn({
            let part = Rc::clone(&part);
            async move {
                let ok = written.await.0.is_ok();
                if !ok {
                    add(&storage.counters.ssd_write_errors, 1);
                }
                if part.tier.finish_insert(write, checksum, ok) {
                    storage.shared.core().finish_destage(storage.id, block, version, mask | old);
                }
            }
        });
        if self.shard.timeout(WRITE_PATIENCE, writing).await.is_err() {
            tier.note_late_write("a write took longer than five seconds");
            return false;
        }
        true
    }

    /// The next block to write, copied so that a guest write cannot change it under the disk's hands.
    fn copy_next(&self, before: Duration) -> Option<(BlockIndex, u32, PageMask, AlignedBuf)> {
        let mut core = self.shared.core();
        let (block, slot, mask, version) = core.next_destage(self.id, before)?;
        let pinned = self.shared.arena().pin(slot)?;
        drop(core);
        // Zeroed: what another guest left in a recycled buffer must not reach the disk.
        let mut copy = AlignedBuf::zeroed(BLOCK_BYTES);
        // Run by run: the slot's other pages may be being filled.
        for (first, count) in mask.runs() {
            let (at, len) = (first as usize * PAGE_BYTES, count as usize * PAGE_BYTES);
            copy[at..at + len].copy_from_slice(pinned.bytes(at, len));
        }
        Some((block, version, mask, copy))
    }
}

/// Copies pages of one block to the same places of another.
fn copy_pages(from: &[u8], to: &mut [u8], pages: PageMask) {
    for (first, count) in pages.runs() {
        let range = first as usize * PAGE_BYTES..(first + count) as usize * PAGE_BYTES;
        to[range.clone()].copy_from_slice(&from[range]);
    }
}
