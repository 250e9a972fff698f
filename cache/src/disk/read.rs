//! Reads: RAM tier, else SSD tier, else store.

use super::chain::each_zero;
use super::storage::Running;
use super::{Disk, Storage};
use crate::access::AccessOp;
use crate::arena::{ArenaBuf, Pinned};
use crate::backend::StoreError;
use crate::counters::add;
use crate::engine::{AlignedBuf, IoBuf};
use crate::policy::BlockPlan;
use crate::ssd::Outcome as SlotOutcome;
use crate::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PAGES_PER_BLOCK, PageMask, PageRange};
use futures_util::future::join_all;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Rounds of plan, fill and wait before a read goes past the cache: each round fails only if writes keep overtaking
/// its fills or the tier is too small for what is under way.
const ROUNDS: usize = 4;
/// An SSD that takes longer than this is worse than most stores: it is bypassed for a while.
const SSD_PATIENCE: Duration = Duration::from_millis(500);
/// Blocks that the fast path takes in one go; larger reads are rare and take the other path.
const FAST_BLOCKS: usize = 9;
const _: () = assert!(FAST_BLOCKS <= crate::policy::HIT_BLOCKS);

/// The bytes of a read, where they are: pinned in the RAM tier or in a buffer of their own.
#[derive(Debug)]
pub struct ReadData {
    offset: u64,
    len: usize,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Slots(Vec<Pinned>),
    /// Starts at the page that holds `offset`.
    Buffer(AlignedBuf),
    Zeroes,
    Parts(Vec<ReadData>),
}

impl ReadData {
    /// Passes the bytes on, piece by piece and in order: `(position, bytes)`. Must be called before the task next
    /// suspends.
    pub fn copy_to(&self, mut sink: impl FnMut(usize, &[u8])) {
        self.pass(&mut sink);
    }

    fn pass(&self, sink: &mut dyn FnMut(usize, &[u8])) {
        match &self.held {
            Held::Slots(slots) => copy_slots(self.offset, self.len, slots, sink),
            Held::Buffer(buffer) => {
                let skip = (self.offset % PAGE_BYTES as u64) as usize;
                sink(0, &buffer[skip..skip + self.len]);
            }
            Held::Zeroes => each_zero(&mut 0, self.len, sink),
            Held::Parts(parts) => {
                let mut base = 0;
                for part in parts {
                    part.pass(&mut |at, bytes| sink(base + at, bytes));
                    base += part.len;
                }
            }
        }
    }

    pub(super) fn zeroes(len: usize) -> ReadData {
        ReadData { offset: 0, len, held: Held::Zeroes }
    }

    /// Several reads that follow each other.
    pub(super) fn parts(parts: Vec<ReadData>) -> ReadData {
        ReadData { offset: 0, len: parts.iter().map(|part| part.len).sum(), held: Held::Parts(parts) }
    }
}

fn copy_slots(offset: u64, len: usize, slots: &[Pinned], sink: &mut dyn FnMut(usize, &[u8])) {
    let mut at = 0;
    let mut within = (offset % BLOCK_BYTES as u64) as usize;
    for pinned in slots {
        let take = (BLOCK_BYTES - within).min(len - at);
        sink(at, pinned.bytes(within, take));
        at += take;
        within = 0;
    }
}

/// Where a read had to go, worst first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Source {
    Ram,
    Ssd,
    Store,
}

impl Disk {
    /// The fast path: if all of `offset..offset + len` is in the RAM tier, passes the bytes to `sink` as
    /// `(position, bytes)` and returns true. Otherwise nothing has happened and [`Disk::read`] is the way.
    pub fn try_read(&self, offset: u64, len: usize, sink: impl FnMut(usize, &[u8])) -> bool {
        if let Some(chain) = &self.chain {
            return self.try_read_chain(chain, offset, len, sink);
        }
        let range = PageRange::covering(offset, len as u64);
        let first = range.first / PAGES_PER_BLOCK;
        let blocks = range.end().div_ceil(PAGES_PER_BLOCK) - first;
        if len == 0 || blocks > FAST_BLOCKS as u64 {
            return false;
        }
        // Room for pins costs time: most reads are of one block.
        match blocks {
            1 => self.try_read_blocks::<1>(offset, len, range, first, sink),
            _ => self.try_read_blocks::<FAST_BLOCKS>(offset, len, range, first, sink),
        }
    }

    /// [`Disk::try_read`] of at most `N` blocks from `first` on.
    #[inline]
    fn try_read_blocks<const N: usize>(
        &self,
        offset: u64,
        len: usize,
        range: PageRange,
        first: u64,
        mut sink: impl FnMut(usize, &[u8]),
    ) -> bool {
        let shared = self.storage.shared();
        let mut slots: [Option<Pinned>; N] = [const { None }; N];
        let mut core = shared.core();
        let (now, mut held) = (shared.now(), true);
        let hit = core.read_hit(self.storage.id, range, now, |block, slot| {
            let pin = shared.arena().pin(slot);
            held &= pin.is_some();
            slots[(block.0 - first) as usize] = pin;
        });
        if !hit || !held {
            return false;
        }
        let backlog = core.destage_backlog(self.storage.id) > 0;
        drop(core);
        let mut at = 0;
        let mut within = (offset % BLOCK_BYTES as u64) as usize;
        for pinned in slots.iter().flatten() {
            let take = (BLOCK_BYTES - within).min(len - at);
            sink(at, pinned.bytes(within, take));
            at += take;
            within = 0;
        }
        add(&self.counters.reads, 1);
        add(&self.counters.read_bytes, len as u64);
        add(&self.counters.served_ram, 1);
        self.note_at(now, self.storage.id(), AccessOp::Read, offset, len as u64, false);
        if backlog {
            self.storage.start_destage();
        }
        true
    }

    /// Reads `offset..offset + len`, which must lie within the disk.
    ///
    /// # Errors
    /// The store failed or has shrunk.
    pub async fn read(&self, offset: u64, len: usize) -> Result<ReadData, StoreError> {
        let _running = Running::new(&self.storage);
        let begun = Instant::now();
        let result = match &self.chain {
            Some(chain) => self.read_chain(chain, offset, len).await,
            None => {
                self.note(AccessOp::Read, offset, len as u64, true);
                self.storage.read(offset, len).await
            }
        };
        add(&self.counters.reads, 1);
        add(&self.counters.read_bytes, len as u64);
        add(&self.counters.read_wait_us, begun.elapsed().as_micros() as u64);
        match result {
            Ok((data, source)) => {
                let served = match source {
                    Source::Ram => &self.counters.served_ram,
                    Source::Ssd => &self.counters.served_ssd,
                    Source::Store => &self.counters.served_store,
                };
                add(served, 1);
                Ok(data)
            }
            Err(error) => {
                add(&self.counters.served_store, 1);
                add(&self.counters.read_errors, 1);
                Err(error)
            }
        }
    }
}

/// A read of the store: contiguous there, in one or more slots.
struct Run {
    range: PageRange,
    slots: Vec<(u32, PageMask)>,
    bufs: Vec<IoBuf>,
}

/// Pages to bring into one slot.
struct Fill {
    slot: u32,
    block: BlockIndex,
    mask: PageMask,
}

impl Storage {
    pub(super) async fn read(self: &Rc<Self>, offset: u64, len: usize) -> Result<(ReadData, Source), StoreError> {
        let range = PageRange::covering(offset, len as u64);
        let mut source = Source::Ram;
        for _ in 0..ROUNDS {
            let Some((plans, pins, claims)) = self.plan(range) else { break };
            self.fill(plans.iter().zip(claims), &mut source).await?;
            if plans.iter().any(|plan| !plan.late.is_empty()) {
                add(&self.counters.late_reads, 1);
            }
            let waits = plans.iter().filter(|plan| !plan.wait.is_empty()).filter_map(|plan| plan.slot);
            for slot in waits.collect::<Vec<_>>() {
                source = Source::Store;
                while self.still_filling(&plans, slot) {
                    self.fill_ended(slot).await;
                }
            }
            let done = {
                let core = self.shared.core();
                plans.iter().all(|plan| {
                    core.valid(self.id, plan.block)
                        .is_some_and(|(slot, valid)| Some(slot) == plan.slot && valid.contains(plan.wanted))
                })
            };
            if done {
                return Ok((ReadData { offset, len, held: Held::Slots(pins) }, source));
            }
            drop(pins);
            let mut core = self.shared.core();
            for slot in plans.iter().filter_map(|plan| plan.slot) {
                core.settle(slot);
            }
        }
        add(&self.counters.bypassed, 1);
        let buffer = self.read_store(range, vec![IoBuf::heap(range.bytes() as usize)]).await?.pop();
        match buffer {
            Some(IoBuf::Heap(mut buffer)) => {
                self.prefer_ram(range, &mut buffer);
                Ok((ReadData { offset, len, held: Held::Buffer(buffer) }, Source::Store))
            }
            _ => Err(StoreError::Closed { store: self.backend.info().identity }),
        }
    }

    /// Puts what the RAM tier has of a range over what the store had. While a write is under way the store may be ahead of it,
    /// and whoever has seen the new bytes must not find the old ones in RAM afterwards. `buffer`: the range's pages.
    fn prefer_ram(&self, range: PageRange, buffer: &mut [u8]) {
        let core = self.shared.core();
        for (block, wanted) in range.blocks() {
            let held = core.valid(self.id, block).filter(|(_, valid)| !(*valid & wanted).is_empty());
            let Some((slot, valid)) = held else { continue };
            let Some(pinned) = self.shared.arena().pin_under_lock(slot) else { continue };
            for (first, count) in (valid & wanted).runs() {
                let at = ((block.0 * PAGES_PER_BLOCK + first - range.first) as usize) * PAGE_BYTES;
                let len = count as usize * PAGE_BYTES;
                if let Some(to) = buffer.get_mut(at..at + len) {
                    to.copy_from_slice(pinned.bytes(first as usize * PAGE_BYTES, len));
                }
            }
        }
    }

    /// Plans every block of a read and pins and claims what belongs to it. `None` if a slot is lacking; what was
    /// planned is taken back then.
    #[expect(clippy::type_complexity, reason = "three lists of one loop")]
    fn plan(&self, range: PageRange) -> Option<(Vec<BlockPlan>, Vec<Pinned>, Vec<Vec<ArenaBuf>>)> {
        let now = self.shared.now();
        let mut core = self.shared.core();
        // Held first: room for a block that is missing must not be made of one that this read wants next.
        let resident: Vec<_> =
            range.blocks().filter_map(|(block, _)| self.shared.arena().pin(core.valid(self.id, block)?.0)).collect();
        let (mut plans, mut pins, mut claims) = (Vec::new(), Vec::new(), Vec::new());
        for (block, mask) in range.blocks() {
            let plan = core.plan_read(self.id, block, mask, now);
            let held = plan.slot.and_then(|slot| {
                let pin = self.shared.arena().pin(slot)?;
                let bufs: Option<Vec<_>> =
                    plan.fill.runs().map(|(first, count)| self.shared.arena().claim(slot, first, count)).collect();
                Some((pin, bufs?))
            });
            match held {
                Some((pin, bufs)) => {
                    plans.push(plan);
                    pins.push(pin);
                    claims.push(bufs);
                }
                None => {
                    // Claims first: the core frees only what nothing holds.
                    drop(claims);
                    drop(pins);
                    drop(resident);
                    let planned = plans.iter().chain(std::iter::once(&plan));
                    for (slot, fill) in planned.filter_map(|plan| Some((plan.slot?, plan.fill))) {
                        core.finish_fill(slot, fill, false);
                        self.wake_waiters(slot);
                    }
                    return None;
                }
            }
        }
        Some((plans, pins, claims))
    }

    fn still_filling(&self, plans: &[BlockPlan], slot: u32) -> bool {
        let core = self.shared.core();
        plans.iter().any(|plan| plan.slot == Some(slot) && core.is_filling(slot, plan.block, plan.wait))
    }

    /// Fills what the plans claim, all at once, and settles it with the core.
    async fn fill(
        self: &Rc<Self>,
        work: impl Iterator<Item = (&BlockPlan, Vec<ArenaBuf>)>,
        source: &mut Source,
    ) -> Result<(), StoreError> {
        let mut runs: Vec<Run> = Vec::new();
        let mut loads = Vec::new();
        for (plan, bufs) in work {
            let Some(slot) = plan.slot.filter(|_| !plan.fill.is_empty()) else { continue };
            if self.on_ssd(plan.block).contains(plan.fill) {
                loads.push((Fill { slot, block: plan.block, mask: plan.fill }, bufs));
                continue;
            }
            for buf in bufs {
                let mask = buf.mask();
                let (first, count) = mask.runs().next().unwrap_or_default();
                let range = PageRange { first: plan.block.0 * PAGES_PER_BLOCK + first, count };
                match runs.last_mut() {
                    // What is contiguous on the store is one request, across blocks.
                    Some(last) if last.range.end() == range.first => {
                        last.range.count += count;
                        last.slots.push((slot, mask));
                        last.bufs.push(buf.into());
                    }
                    _ => runs.push(Run { range, slots: vec![(slot, mask)], bufs: vec![buf.into()] }),
                }
            }
        }
        if !runs.is_empty() {
            *source = (*source).max(Source::Store);
        }
        let from_ssd = join_all(loads.into_iter().map(|(fill, bufs)| self.load(fill, bufs)));
        let from_store = join_all(runs.into_iter().map(|run| self.fill_from_store(run)));
        let (loaded, stored) = futures_util::future::join(from_ssd, from_store).await;
        for way in loaded {
            *source = (*source).max(way?);
        }
        stored.into_iter().collect()
    }

    async fn fill_from_store(self: &Rc<Self>, Run { range, slots, bufs }: Run) -> Result<(), StoreError> {
        let begun = Instant::now();
        let result = self.read_store(range, bufs).await;
        let ok = result.is_ok();
        // The claims end here: the core frees only what nothing holds.
        let result = result.map(drop);
        let mut core = self.shared.core();
        for (slot, mask) in &slots {
            core.finish_fill(*slot, *mask, ok);
        }
        if ok {
            core.demand_latency(self.id, self.shared.now(), begun.elapsed());
        }
        drop(core);
        for (slot, _) in slots {
            self.wake_waiters(slot);
        }
        self.start_destage();
        result
    }

    /// Reads whole pages from the store; the buffers come back only on success.
    pub(super) async fn read_store(&self, range: PageRange, bufs: Vec<IoBuf>) -> Result<Vec<IoBuf>, StoreError> {
        add(&self.counters.store_reads, 1);
        add(&self.counters.store_read_bytes, range.bytes());
        let (result, bufs) = self.backend.read(range.first * PAGE_BYTES as u64, bufs).await;
        self.counters.health.note(&result);
        match result {
            Ok(()) => Ok(bufs),
            Err(error) => {
                drop(bufs);
                add(&self.counters.store_read_errors, 1);
                Err(error)
            }
        }
    }

    /// Pages of a block that the SSD tier holds.
    pub(super) fn on_ssd(&self, block: BlockIndex) -> PageMask {
        self.ssd().map_or(PageMask::NONE, |part| part.tier.lookup(part.storage, block))
    }

    /// Fills pages of a slot from the SSD tier, and takes the block's other pages along; from the store if the tier
    /// fails. Returns where the bytes came from.
    async fn load(self: &Rc<Self>, fill: Fill, mut bufs: Vec<ArenaBuf>) -> Result<Source, StoreError> {
        let Fill { slot, block, mask } = fill;
        if let Some((buffer, held)) = self.read_ssd(block).await
            && held.contains(mask)
        {
            for buf in &mut bufs {
                copy_page_runs(&buffer, buf);
            }
            drop(bufs);
            let mut core = self.shared.core();
            let extra = core.extend_fill(slot, held);
            let mut filled = mask;
            for (first, count) in extra.runs() {
                if let Some(mut claim) = self.shared.arena().claim(slot, first, count) {
                    copy_page_runs(&buffer, &mut claim);
                    filled |= PageMask::run(first, count);
                } else {
                    core.finish_fill(slot, PageMask::run(first, count), false);
                }
            }
            core.finish_fill(slot, filled, true);
            core.note_on_ssd(slot, held);
            drop(core);
            self.wake_waiters(slot);
            return Ok(Source::Ssd);
        }
        let fills = bufs.into_iter().map(|buf| {
            let (first, count) = buf.mask().runs().next().unwrap_or_default();
            let range = PageRange { first: block.0 * PAGES_PER_BLOCK + first, count };
            self.fill_from_store(Run { range, slots: vec![(slot, buf.mask())], bufs: vec![buf.into()] })
        });
        join_all(fills).await.into_iter().collect::<Result<(), _>>()?;
        Ok(Source::Store)
    }

    /// A block as the SSD tier holds it, checked.
    pub(super) async fn read_ssd(&self, block: BlockIndex) -> Option<(AlignedBuf, PageMask)> {
        let part = self.ssd()?;
        let tier = &part.tier;
        let read = tier.begin_read(part.storage, block)?;
        let io = self.shard.read_exact_at(&part.fd, vec![IoBuf::heap(BLOCK_BYTES)], read.offset());
        add(&self.counters.ssd_reads, 1);
        let Ok((result, bufs)) = self.shard.timeout(SSD_PATIENCE, io).await else {
            // The buffer stays with the operation until the device gives it back.
            add(&self.counters.ssd_read_errors, 1);
            tier.note_outage("a read took longer than half a second");
            return None;
        };
        add(&self.counters.ssd_read_bytes, BLOCK_BYTES as u64);
        let (buffer, outcome) = match (result, bufs.into_iter().next()) {
            (Ok(BLOCK_BYTES), Some(IoBuf::Heap(buffer))) => {
                let good = read.verify(&buffer);
                (Some(buffer), if good { SlotOutcome::Good } else { SlotOutcome::BadChecksum })
            }
            _ => (None, SlotOutcome::IoError),
        };
        if outcome != SlotOutcome::Good {
            add(&self.counters.ssd_read_errors, 1);
        }
        // A write may have taken pages away while the read was under way: only what is left counts.
        let held = tier.end_read(read, outcome);
        buffer.map(|buffer| (buffer, held))
    }
}

fn copy_page_runs(block: &[u8], claim: &mut ArenaBuf) {
    if let Some((first, count)) = claim.mask().runs().next() {
        let at = first as usize * PAGE_BYTES;
        claim.as_mut_slice().copy_from_slice(&block[at..at + count as usize * PAGE_BYTES]);
    }
}
