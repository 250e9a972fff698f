//! A disk on offer: the export's rings, run on the shard of the disk's storage.
//!
//! - [`DiskRunner`]: takes started rings from the export's thread to the shard and back
//! - `run_ring`: one ring's task: pop, answer from RAM at once, or spawn what has to wait; look for more, then sleep
//!
//! Requests of a ring complete in any order; each is answered exactly once. A ring is stopped only when nothing of it is
//! under way, so that a write can never reach the store after the guest was told that its ring has ended.

use crate::learner::{DiskEvent, LearnerHandle};
use futures_util::future::{Either, select};
use prestage_cache::StorageHandle;
use prestage_cache::backend::StoreError;
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{AlignedBuf, Notify, Polled, Shard};
use prestage_integration::export::{Queue, QueueRunner, QueueStopped, Request, RequestKind, Status};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Requests taken from a ring before other tasks of the shard have their turn.
const BATCH: u32 = 64;
/// Completions after which a guest that waits is signalled while there are more to come: it can go on with these at once. A
/// guest that is awake asks for no signal, so that most of these cost a look at what it asks for.
const SIGNAL_EVERY: u32 = 8;
/// How often a ring that does not come to an end is mentioned in the log.
const STOP_NOTICE: Duration = Duration::from_secs(10);

thread_local! {
    /// Rings that run on this shard.
    static RINGS: RefCell<HashMap<(u32, u16), Rc<Ring>>> = RefCell::default();
}

/// Runs the rings of one disk.
#[derive(Debug)]
pub struct DiskRunner {
    name: String,
    disk: u32,
    storage: StorageHandle,
    counters: Arc<DiskCounters>,
    learner: LearnerHandle,
    rings: AtomicU32,
}

impl DiskRunner {
    pub fn new(
        name: String,
        disk: u32,
        storage: StorageHandle,
        counters: Arc<DiskCounters>,
        learner: LearnerHandle,
    ) -> DiskRunner {
        DiskRunner { name, disk, storage, counters, learner, rings: AtomicU32::new(0) }
    }

    /// Rings running now.
    pub fn rings(&self) -> u32 {
        self.rings.load(Ordering::Relaxed)
    }
}

impl QueueRunner for DiskRunner {
    fn connected(&self) {
        tracing::info!(disk = self.name, "hypervisor connected");
        self.learner.event(self.disk, DiskEvent::Connected);
    }

    fn disconnected(&self) {
        tracing::info!(disk = self.name, "hypervisor gone");
        self.learner.event(self.disk, DiskEvent::Disconnected);
    }

    fn start(&self, queue: Queue) {
        self.rings.fetch_add(1, Ordering::Relaxed);
        self.learner.event(self.disk, DiskEvent::RingStarted { resumed: queue.resumed() });
        let (disk, storage, counters) = (self.disk, self.storage.id(), Arc::clone(&self.counters));
        self.storage.shard().spawn(move |shard| async move {
            let index = queue.index();
            let ring = Rc::new(Ring::new(queue));
            RINGS.with_borrow_mut(|rings| rings.insert((disk, index), Rc::clone(&ring)));
            match local(storage) {
                Some(storage) => run_ring(&shard, &ring, &Disk::new(storage, disk, counters)).await,
                None => tracing::error!(disk, "ring started on a storage that is closed"),
            }
            ring.ended.set(true);
            ring.changed.notify_all();
        });
    }

    fn stop(&self, index: u16) -> QueueStopped {
        self.rings.fetch_sub(1, Ordering::Relaxed);
        let disk = self.disk;
        let mut call = self.storage.shard().call(move |_| async move {
            let ring = RINGS.with_borrow_mut(|rings| rings.remove(&(disk, index)))?;
            ring.stopping.set(true);
            ring.wake.notify_all();
            while !ring.ended.get() {
                ring.changed.notified().await;
            }
            let queue = ring.queue.borrow_mut().take()?;
            Some(queue.stop())
        });
        loop {
            match call.wait_timeout(STOP_NOTICE) {
                Ok(Some(Some(stopped))) => return stopped,
                Ok(None) => tracing::warn!(
                    disk = self.name,
                    ring = index,
                    "ring still has requests under way; the store does not answer"
                ),
                Ok(Some(None)) | Err(_) => {
                    tracing::error!(disk = self.name, ring = index, "ring was not running");
                    return QueueStopped { index, next_available: 0 };
                }
            }
        }
    }

    fn memory_changed(&self) {
        let disk = self.disk;
        self.storage.shard().spawn(move |_| async move {
            let rings: Vec<_> = RINGS.with_borrow(|rings| {
                rings.iter().filter(|((of, _), _)| *of == disk).map(|(_, ring)| Rc::clone(ring)).collect()
            });
            for ring in rings {
                ring.with(Queue::refresh_memory);
            }
        });
    }
}

/// A ring on its shard.
struct Ring {
    queue: RefCell<Option<Queue>>,
    stopping: Cell<bool>,
    ended: Cell<bool>,
    /// The ring's task should look at `stopping` or at what is in flight.
    wake: Notify,
    /// `ended` has changed.
    changed: Notify,
}

impl Ring {
    fn new(queue: Queue) -> Ring {
        Ring {
            queue: RefCell::new(Some(queue)),
            stopping: Cell::new(false),
            ended: Cell::new(false),
            wake: Notify::new(),
            changed: Notify::new(),
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut Queue) -> T) -> Option<T> {
        self.queue.borrow_mut().as_mut().map(f)
    }

    /// Answers a request that had to wait.
    fn complete(&self, request: Request, status: Status) {
        self.with(|queue| {
            queue.complete(request, status);
            queue.signal();
        });
        if self.stopping.get() {
            self.wake.notify_all();
        }
    }
}

async fn run_ring(shard: &Shard, ring: &Rc<Ring>, disk: &Disk) {
    let kick = match ring.with(|queue| queue.kick_fd().try_clone_to_owned()) {
        Some(Ok(fd)) => Rc::new(fd),
        Some(Err(error)) => return tracing::error!(%error, "ring not served: its kick descriptor cannot be duplicated"),
        None => return,
    };
    let mut kicks = shard.watch_eventfd(&kick);
    let looked_at = Rc::clone(ring);
    let mut requests = shard.poll_source(move || looked_at.with(|queue| queue.has_available()).unwrap_or(false));
    while !ring.stopping.get() {
        if !serve(shard, ring, disk).await {
            // The driver broke the protocol; the ring stays broken until the front-end stops it.
            ring.stopping.set(true);
            break;
        }
        // While requests come fast the shard looks for the next ones, and the guest need not kick.
        let (found, wake) = (pin!(requests.wait()), pin!(ring.wake.notified()));
        let asleep = matches!(select(found, wake).await, Either::Left((Polled::Sleep, _)));
        if !asleep || ring.with(Queue::enable_notification) == Some(true) {
            continue;
        }
        let wake = pin!(ring.wake.notified());
        let kicked = pin!(kicks.wait());
        if let Either::Left((Err(error), _)) = select(kicked, wake).await {
            tracing::error!(%error, "ring not served any more: its kick descriptor cannot be watched");
            ring.stopping.set(true);
        }
    }
    while ring.with(|queue| queue.in_flight()).unwrap_or(0) > 0 {
        ring.wake.notified().await;
    }
}

/// Takes what the guest has made available, until there is no more. False if the ring is broken.
async fn serve(shard: &Shard, ring: &Rc<Ring>, disk: &Disk) -> bool {
    ring.with(Queue::disable_notification);
    loop {
        match serve_batch(shard, ring, disk) {
            Batch::Full => shard.yield_now().await,
            Batch::Last => return true,
            Batch::Broken => return false,
        }
    }
}

/// How a batch ended.
enum Batch {
    /// There may be more.
    Full,
    Last,
    /// The driver broke the protocol.
    Broken,
}

/// Takes a batch of requests, and signals the guest.
#[inline(never)] // a function of its own in profiles: all that a hit costs on its shard
fn serve_batch(shard: &Shard, ring: &Rc<Ring>, disk: &Disk) -> Batch {
    let mut taken = 0;
    let end = loop {
        if ring.stopping.get() {
            break Batch::Last;
        }
        let request = match ring.with(Queue::pop) {
            Some(Ok(Some(request))) => request,
            Some(Ok(None)) => break Batch::Last,
            Some(Err(_)) | None => return Batch::Broken,
        };
        take(shard, ring, disk, request);
        taken += 1;
        if taken == BATCH {
            break Batch::Full;
        }
        if taken % SIGNAL_EVERY == 0 {
            ring.with(Queue::signal);
        }
    };
    ring.with(Queue::signal);
    end
}

/// Answers a request at once where that is possible, else starts what it takes.
fn take(shard: &Shard, ring: &Rc<Ring>, disk: &Disk, request: Request) {
    if let RequestKind::Read { offset_bytes, len_bytes } = *request.kind() {
        let mut copied = true;
        let hit = disk.try_read(offset_bytes, len_bytes as usize, |at, bytes| {
            copied &= request.copy_to_guest(at as u64, bytes).is_ok();
        });
        if hit {
            let status = if copied { Status::Ok } else { Status::IoError };
            ring.with(|queue| queue.complete(request, status));
            return;
        }
    }
    let (ring, disk) = (Rc::clone(ring), disk.clone());
    shard.spawn(async move {
        let status = match run(&disk, &request).await {
            Ok(()) => Status::Ok,
            Err(error) => {
                tracing::warn!(%error, request = ?request.kind(), "guest request failed");
                Status::IoError
            }
        };
        ring.complete(request, status);
    });
}

async fn run(disk: &Disk, request: &Request) -> Result<(), StoreError> {
    // Guest memory that is gone: the guest's own doing, and an error for it alone.
    let gone = || StoreError::Closed { store: "guest memory".to_owned() };
    match request.kind() {
        RequestKind::Read { offset_bytes, len_bytes } => {
            let data = disk.read(*offset_bytes, *len_bytes as usize).await?;
            let mut copied = true;
            data.copy_to(|at, bytes| copied &= request.copy_to_guest(at as u64, bytes).is_ok());
            if copied { Ok(()) } else { Err(gone()) }
        }
        RequestKind::Write { offset_bytes, len_bytes } => {
            let mut data = AlignedBuf::new(*len_bytes as usize);
            request.copy_from_guest(0, &mut data).map_err(|_| gone())?;
            disk.write(*offset_bytes, data).await
        }
        RequestKind::Flush => disk.flush().await,
        RequestKind::Discard { ranges } => {
            for range in ranges {
                disk.discard(range.offset_bytes, range.len_bytes).await?;
            }
            Ok(())
        }
        RequestKind::WriteZeroes { ranges, unmap } => {
            for range in ranges {
                disk.write_zeroes(range.offset_bytes, range.len_bytes, *unmap).await?;
            }
            Ok(())
        }
    }
}
