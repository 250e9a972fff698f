//! A running ring: [`Queue`] pops checked requests, completes them and signals the guest. Split virtqueue with indirect
//! descriptors and EVENT_IDX (VIRTIO 1.3, 2.7). Belongs to one thread; needs no locks.
//!
//! The runner's loop:
//!
//! ```text
//! on start and on kick:  clear_kick();
//!   loop { disable_notification(); while let Some(request) = pop()? { begin it } ; signal();
//!          while polling: if has_available() { again }
//!          if !enable_notification() { break } }
//! on each completion:    complete(request, status); after a round of them: signal()
//! on an error of pop():  stop looking at the kick descriptor, keep the queue until it is stopped
//! ```

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};

use super::config::{DiskConfig, QUEUE_SIZE_MAX};
use super::events::{EventSlot, EventSource, drain};
use super::inflight::{InflightError, InflightQueue};
use super::memory::{GuestBuffer, MemoryCell, MemoryError, SegmentStore};
use super::request::{Chain, Limits, Parsed, Request, Status, parse};
use super::ring::{Ring, RingAddressError, RingAddresses};

/// A ring whose driver broke the protocol. Nothing more is taken from it until the front-end starts it anew.
#[derive(Debug, Error)]
pub enum QueueError {
    #[error("the driver made {claimed} chains available in a ring of {size}")]
    AvailableIndex { claimed: u16, size: u16 },
    #[error("available entry names descriptor {head} of {size}")]
    Head { head: u16, size: u16 },
    #[error("descriptor {head} was made available while its request is in flight")]
    HeadInFlight { head: u16 },
    #[error("chain at {head} goes on at a descriptor past its table's end")]
    Next { head: u16 },
    #[error("chain at {head} is a loop or longer than allowed")]
    Loop { head: u16 },
    #[error("chain at {head} has an indirect table where none may be, or one outside of guest memory")]
    Indirect { head: u16 },
    #[error("chain at {head} has a readable descriptor after a writable one")]
    Order { head: u16 },
    #[error("chain at {head}: {source}")]
    Memory { head: u16, source: MemoryError },
    #[error("chain at {head} has no writable byte for the status")]
    NoStatus { head: u16 },
    #[error("the ring is no longer in guest memory: {0}")]
    RingMoved(#[source] RingAddressError),
    #[error("the ring was broken before")]
    Broken,
}

/// A ring that cannot be started.
#[derive(Debug, Error)]
pub enum QueueStartError {
    #[error(transparent)]
    Ring(#[from] RingAddressError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
}

/// What is shared by the rings of a disk and its export.
#[derive(Debug)]
pub(super) struct DiskState {
    /// For logs: the socket's path.
    pub(super) name: String,
    pub(super) config: DiskConfig,
    /// As of the last resize.
    pub(super) capacity_bytes: AtomicU64,
}

/// Everything that a ring is started from.
#[derive(Debug)]
pub(super) struct QueueParts {
    pub(super) index: u16,
    pub(super) size: u16,
    pub(super) addresses: RingAddresses,
    /// Next available entry, as the front-end says.
    pub(super) base: u16,
    /// Virtio features agreed on.
    pub(super) features: u64,
    pub(super) memory: Arc<MemoryCell>,
    pub(super) disk: Arc<DiskState>,
    pub(super) kick: Arc<OwnedFd>,
    pub(super) call: Arc<EventSlot>,
    pub(super) err: Arc<EventSlot>,
    pub(super) inflight: Option<InflightQueue>,
}

/// A stopped ring: the proof that nothing runs on it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStopped {
    /// Which ring.
    pub index: u16,
    /// The available entry to go on from (the answer to GET_VRING_BASE).
    pub next_available: u16,
}

/// A running ring. `Send`, not `Sync`: hand it to the thread that runs it.
#[derive(Debug)]
pub struct Queue {
    /// Tells the requests of this run of the ring from any other's.
    id: u64,
    index: u16,
    size: u16,
    addresses: RingAddresses,
    ring: Ring,
    memory: Arc<MemoryCell>,
    memory_generation: u64,
    /// Region of guest memory found last.
    hint: usize,
    disk: Arc<DiskState>,
    limits: Limits,
    event_idx: bool,
    indirect: bool,
    next_available: u16,
    /// The driver's index as last read: entries before it may be taken without looking again.
    available_seen: u16,
    used_index: u16,
    /// Used index when the guest was last signalled; None until the first time.
    signalled: Option<u16>,
    kick: Arc<OwnedFd>,
    call: EventSource,
    err: EventSource,
    inflight: Option<InflightQueue>,
    /// Requests of a run before this one, to be taken first.
    resubmit: VecDeque<u16>,
    resumed: bool,
    /// By head: taken and not answered.
    taken: Box<[bool]>,
    in_flight: u16,
    stores: Vec<SegmentStore>,
    broken: bool,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A guest that keeps the ring full of requests to be refused cannot hold `pop` longer than this many.
const ANSWERS_PER_POP: u32 = 64;

impl Queue {
    pub(super) fn new(parts: QueueParts) -> Result<Self, QueueStartError> {
        let QueueParts { index, size, addresses, base, features, memory, disk, kick, call, err, mut inflight } = parts;
        let (regions, memory_generation) = memory.get();
        let ring = Ring::new(regions, size, addresses)?;
        let used_index = ring.used_index();
        let mut taken = vec![false; usize::from(size)].into_boxed_slice();
        let (next_available, resubmit) = match &mut inflight {
            Some(area) => {
                let heads = area.recover(used_index)?;
                for head in &heads {
                    taken[usize::from(*head)] = true;
                }
                // At most `size` heads. The front-end cannot know how far we had read, so its base does not count.
                (used_index.wrapping_add(heads.len() as u16), heads)
            }
            None => (base, Vec::new()),
        };
        let limits = Limits {
            capacity_bytes: disk.capacity_bytes.load(Ordering::Relaxed),
            features: disk.config.features(),
            seg_max: disk.config.seg_max,
            serial: disk.config.serial_bytes(),
        };
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            index,
            size,
            addresses,
            ring,
            memory,
            memory_generation,
            hint: 0,
            disk,
            limits,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            indirect: features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0,
            next_available,
            available_seen: next_available,
            used_index,
            signalled: None,
            kick,
            call: EventSource::new(call),
            err: EventSource::new(err),
            inflight,
            resumed: next_available != 0 || !resubmit.is_empty(),
            resubmit: resubmit.into(),
            taken,
            in_flight: 0,
            stores: Vec::new(),
            broken: false,
        })
    }

    /// Which ring of the disk.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries: as many requests at most are in flight.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The ring ran before: the guest goes on over a restart of the agent, a reconnection or a pause. False when the
    /// driver has just begun (a boot).
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Requests popped and not completed.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Becomes readable when the guest has made requests available: an eventfd, non-blocking.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// Takes the events off the kick descriptor. Do it before looking for requests, not after.
    pub fn clear_kick(&self) {
        drain(&self.kick);
    }

    /// The next request. Requests that cannot be done (outside of the disk, unaligned, unknown, writes to a read-only
    /// disk) and GET_ID are answered here and not returned. None: nothing more for now.
    ///
    /// # Errors
    /// The driver broke the protocol. Logged, and told to the front-end, by the first call that finds it; every later
    /// call fails too.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Request>, QueueError> {
        match self.try_pop() {
            Ok(request) => Ok(request),
            Err(error) => {
                self.break_down(&error);
                Err(error)
            }
        }
    }

    #[inline]
    fn try_pop(&mut self) -> Result<Option<Request>, QueueError> {
        if self.broken {
            return Err(QueueError::Broken);
        }
        for _ in 0..ANSWERS_PER_POP {
            let head = self.next_head()?;
            // After the look for requests, not before: a request may be there for memory, or beyond an end, that the front-end was
            // told of while this looked.
            self.try_refresh()?;
            self.limits.capacity_bytes = self.disk.capacity_bytes.load(Ordering::Relaxed);
            let Some(head) = head else { return Ok(None) };
            let chain = self.read_chain(head)?;
            match parse(chain, &self.limits) {
                Parsed::Request(kind, data, device_writes) => {
                    self.in_flight += 1;
                    return Ok(Some(Request { kind, data, head, device_writes, queue_id: self.id }));
                }
                Parsed::Answer(status, data, written) => self.answer(head, data, status, written),
                Parsed::NoStatus => return Err(QueueError::NoStatus { head }),
            }
        }
        Ok(None)
    }

    /// Head of the next chain, marked as in flight.
    #[inline]
    fn next_head(&mut self) -> Result<Option<u16>, QueueError> {
        if let Some(head) = self.resubmit.pop_front() {
            return Ok(Some(head));
        }
        if self.next_available == self.available_seen {
            self.available_seen = self.ring.available_index();
            let claimed = self.available_seen.wrapping_sub(self.next_available);
            if claimed > self.size {
                return Err(QueueError::AvailableIndex { claimed, size: self.size });
            }
            if claimed == 0 {
                return Ok(None);
            }
        }
        let head = self.ring.available_head(self.next_available);
        match self.taken.get_mut(usize::from(head)) {
            None => return Err(QueueError::Head { head, size: self.size }),
            Some(true) => return Err(QueueError::HeadInFlight { head }),
            Some(taken) => *taken = true,
        }
        self.next_available = self.next_available.wrapping_add(1);
        self.track(head, || true);
        Ok(Some(head))
    }

    /// Marks a chain as in flight for a successor. `alive` as in [`publish`](Self::publish).
    #[inline]
    fn track(&mut self, head: u16, mut alive: impl FnMut() -> bool) -> Option<()> {
        let mut step = || alive().then_some(());
        if let Some(area) = &mut self.inflight {
            step()?;
            area.set_counter(head);
            step()?;
            area.set_inflight(head);
        }
        Some(())
    }

    /// Gathers the bytes of a chain.
    #[inline]
    fn read_chain(&mut self, head: u16) -> Result<Chain, QueueError> {
        let mut data = GuestBuffer::new(Arc::clone(self.ring.memory()), self.stores.pop().unwrap_or_default());
        let mut table = self.ring.table();
        let (mut at, mut limit, mut inside_indirect) = (head, u32::from(self.size), false);
        let (mut descriptors, mut readable, mut writing) = (0, 0, false);
        loop {
            let descriptor = table.get(at).ok_or(QueueError::Next { head })?;
            let flag = |bit: u32| u32::from(descriptor.flags) & bit != 0;
            if flag(VRING_DESC_F_INDIRECT) {
                if inside_indirect || !self.indirect || flag(VRING_DESC_F_NEXT) {
                    return Err(QueueError::Indirect { head });
                }
                table = self
                    .ring
                    .indirect_table(descriptor.addr, descriptor.len, &mut self.hint)
                    .ok_or(QueueError::Indirect { head })?;
                (at, limit, inside_indirect) = (0, u32::from(QUEUE_SIZE_MAX).min(table.entries()), true);
                limit += descriptors;
                continue;
            }
            descriptors += 1;
            if descriptors > limit {
                return Err(QueueError::Loop { head });
            }
            let writable = flag(VRING_DESC_F_WRITE);
            if writing && !writable {
                return Err(QueueError::Order { head });
            }
            writing = writable;
            data.push(descriptor.addr, descriptor.len, &mut self.hint)
                .map_err(|source| QueueError::Memory { head, source })?;
            if !writable {
                readable += u64::from(descriptor.len);
            }
            if !flag(VRING_DESC_F_NEXT) {
                return Ok(Chain { data, readable, descriptors });
            }
            at = descriptor.next;
        }
    }

    /// Answers a request; the guest hears of it at the next [`signal`](Self::signal). A request of another queue, or
    /// of an earlier run of this one, is dropped: its ring is gone.
    #[inline]
    pub fn complete(&mut self, request: Request, status: Status) {
        let Request { data, head, device_writes, queue_id, .. } = request;
        if queue_id != self.id {
            tracing::error!(socket = %self.disk.name, ring = self.index, head, "request of another ring dropped");
            return;
        }
        // One of this run's requests, so it was counted.
        self.in_flight -= 1;
        self.answer(head, data, status, if status == Status::Ok { device_writes } else { 0 });
    }

    #[inline]
    fn answer(&mut self, head: u16, data: GuestBuffer, status: Status, data_written: u32) {
        if self.broken {
            return;
        }
        data.write_status(status.byte());
        // The status byte counts; data is at most REQUEST_MAX_BYTES.
        self.publish(head, data_written + 1, || true);
        self.stores.push(data.recycle());
    }

    /// Gives a chain back, in the order that lets a successor tell answered requests from unanswered ones (see
    /// `inflight`). `alive` is asked before every store; tests end the agent's life there.
    #[inline]
    fn publish(&mut self, head: u16, written: u32, mut alive: impl FnMut() -> bool) -> Option<()> {
        let mut step = || alive().then_some(());
        step()?;
        self.ring.set_used_element(self.used_index, head, written);
        if let Some(area) = &self.inflight {
            step()?;
            area.link(head);
            step()?;
            area.set_last_batch_head(head);
        }
        self.used_index = self.used_index.wrapping_add(1);
        // The guest may use the head again as soon as it sees the index.
        self.taken[usize::from(head)] = false;
        step()?;
        self.ring.set_used_index(self.used_index);
        if let Some(area) = &self.inflight {
            step()?;
            area.clear_inflight(head);
            step()?;
            area.set_used_idx(self.used_index);
        }
        Some(())
    }

    /// Interrupts the guest if it wants to hear of what was completed since the last call. Cheap when there is nothing.
    #[inline]
    pub fn signal(&mut self) {
        if self.signalled == Some(self.used_index) || self.broken {
            return;
        }
        let wanted = match self.signalled {
            // The guest's wish may date from before this run.
            None => true,
            Some(before) if self.event_idx => {
                let passed = self.used_index.wrapping_sub(before);
                self.used_index.wrapping_sub(self.ring.used_event()).wrapping_sub(1) < passed
            }
            Some(_) => !self.ring.interrupts_suppressed(),
        };
        self.signalled = Some(self.used_index);
        if wanted {
            self.call.notify();
        }
    }

    /// Tells the guest that kicks are not needed while requests are being popped anyway.
    #[inline]
    pub fn disable_notification(&mut self) {
        // With EVENT_IDX the guest kicks when it passes one index, which it has.
        if !self.event_idx && !self.broken {
            self.ring.suppress_kicks(true);
        }
    }

    /// Whether the guest has made requests available, or there are some of a run before. Two loads, for those who look often
    /// instead of waiting for a kick. A broken ring has none.
    #[inline]
    pub fn has_available(&self) -> bool {
        !self.broken && (!self.resubmit.is_empty() || self.ring.available_index() != self.next_available)
    }

    /// Tells the guest to kick at its next request. True if requests have come in meanwhile: pop them, the guest does
    /// not kick for those.
    #[inline]
    pub fn enable_notification(&mut self) -> bool {
        if self.broken || self.try_refresh().is_err() {
            // The next pop says why.
            return !self.broken;
        }
        if self.event_idx {
            self.ring.set_available_event(self.next_available);
        } else {
            self.ring.suppress_kicks(false);
        }
        !self.resubmit.is_empty() || self.ring.available_index() != self.next_available
    }

    /// Lets go of memory that the front-end has taken away. `pop` does it by itself; this is for rings that are idle.
    pub fn refresh_memory(&mut self) {
        if self.broken {
            return;
        }
        if let Err(error) = self.try_refresh() {
            self.break_down(&error);
        }
    }

    #[inline]
    fn try_refresh(&mut self) -> Result<(), QueueError> {
        if self.memory_generation == self.memory.generation() {
            return Ok(());
        }
        let (regions, generation) = self.memory.get();
        self.hint = 0;
        self.ring = Ring::new(regions, self.size, self.addresses).map_err(QueueError::RingMoved)?;
        self.memory_generation = generation;
        Ok(())
    }

    #[cold]
    fn break_down(&mut self, error: &QueueError) {
        if !self.broken {
            self.broken = true;
            tracing::warn!(
                socket = %self.disk.name, ring = self.index, %error,
                "ring stopped: the guest's driver broke the virtio protocol; reset the guest"
            );
            self.err.notify();
        }
    }

    /// Ends this run. Complete the requests in flight first: without in-flight tracking a dropped request is lost.
    pub fn stop(self) -> QueueStopped {
        QueueStopped { index: self.index, next_available: self.next_available }
    }
}

#[cfg(test)]
mod tests;
