//! What is counted: a store of 16 MiB all of which is in RAM, and reads of 4 KiB scattered over it.

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use prestage_cache::backend::{StoreOptions, StoreSpec};
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{AlignedBuf, EngineMode};
use prestage_cache::policy::CoreConfig;
use prestage_cache::types::{BLOCK_BYTES, PAGE_BYTES};
use prestage_cache::{Cache, CacheConfig, StorageHandle, arena::HugePages};
use prestage_integration::export::{
    DiskConfig, Export, ExportOptions, Queue, QueueError, QueueRunner, QueueStopped, RequestKind, Status,
};
use std::mem::MaybeUninit;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What can be counted.
pub(crate) const NAMES: [&str; 2] = ["lookup", "ring"];
/// Reads that are counted.
pub(crate) const READS: u64 = ROUNDS as u64 * DEPTH as u64;

const ROUNDS: usize = 64;
/// Reads that a guest makes available at a time.
const DEPTH: usize = 64;
/// Completions after which a guest is signalled, as the agent does (`agent/src/serve.rs`).
const SIGNAL_EVERY: usize = 8;
const BLOCKS: u64 = 256;
const STORE_BYTES: u64 = BLOCKS * BLOCK_BYTES as u64;
/// Far more than anything takes under valgrind on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Offsets of one round: pages with a stride that meets every block before it meets one again.
fn offsets(round: usize) -> impl Iterator<Item = u64> {
    let pages = STORE_BYTES / PAGE_BYTES as u64;
    (round * DEPTH..(round + 1) * DEPTH).map(move |read| read as u64 * 2_741 % pages * PAGE_BYTES as u64)
}

/// What the store holds at a page.
fn content(offset: u64) -> u8 {
    (offset / PAGE_BYTES as u64 * 31 % 251) as u8
}

/// The cache alone. Valgrind collects while this runs, and knows it by its name. Returns the hits.
#[inline(never)]
fn lookup_hit_measured(disk: &Disk, offsets: &[u64], buffer: &mut [u8]) -> usize {
    let hit = |offset: &&u64| {
        disk.try_read(**offset, PAGE_BYTES, |at, bytes| {
            if let Some(to) = buffer.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        })
    };
    offsets.iter().filter(hit).count()
}

/// What the agent does with a ring whose requests are hits (`serve_batch` in `agent/src/serve.rs`, which cannot be linked
/// here without the models that it also serves). Valgrind collects while this runs. Returns the hits.
#[inline(never)]
fn ring_hit_measured(queue: &mut Queue, disk: &Disk) -> Result<usize, QueueError> {
    ring_hits(queue, disk)
}

#[inline(always)]
fn ring_hits(queue: &mut Queue, disk: &Disk) -> Result<usize, QueueError> {
    let mut hits = 0;
    while let Some(request) = queue.pop()? {
        let RequestKind::Read { offset_bytes, len_bytes } = *request.kind() else { break };
        let mut copied = true;
        let hit = disk.try_read(offset_bytes, len_bytes as usize, |at, bytes| {
            copied &= request.copy_to_guest(at as u64, bytes).is_ok();
        });
        let status = if hit && copied { Status::Ok } else { Status::IoError };
        queue.complete(request, status);
        hits += usize::from(hit);
        if hits % SIGNAL_EVERY == 0 {
            queue.signal();
        }
    }
    queue.signal();
    Ok(hits)
}

/// Fills the cache, warms it up and runs what is counted.
pub(crate) fn run(name: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| format!("no folder for the store: {error}"))?;
    let store = folder.path().join("store");
    let bytes: Vec<u8> = (0..STORE_BYTES).map(content).collect();
    std::fs::write(&store, bytes).map_err(|error| format!("cannot write {}: {error}", store.display()))?;
    let config = CacheConfig {
        ram_bytes: 2 * STORE_BYTES,
        huge_pages: HugePages::No,
        shards: 1,
        // A hit asks the kernel for nothing, and valgrind knows all that the threads ask for.
        engine: EngineMode::ThreadPool,
        policy: CoreConfig::with_slots(0),
    };
    let cache = Cache::new(config, None).map_err(|error| format!("no cache: {error}"))?;
    // The learner hears of every hit, and not of as many as fit into a time: the dearer way, and the same on a slow host.
    cache.accesses().take_all(true);
    let options = StoreOptions { read_only: true, direct: false, ..StoreOptions::default() };
    let storage = cache.open(&StoreSpec::File(store), options).map_err(|error| error.to_string())?;
    match name {
        "lookup" => lookup(&storage),
        "ring" => ring(&storage, &folder.path().join("disk.sock")),
        other => Err(format!("no path {other}; there are {NAMES:?}")),
    }
}

/// Runs `f` with the disk on its shard, when all of it is in RAM.
fn on_shard<T: Send + 'static>(
    storage: &StorageHandle,
    f: impl FnOnce(&Disk) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let id = storage.id();
    let call = storage.shard().call(move |_| async move {
        let storage = local(id).ok_or("the store is closed")?;
        let disk = Disk::new(storage, 0, Arc::new(DiskCounters::default()));
        let mut page = [0; PAGE_BYTES];
        for offset in (0..STORE_BYTES).step_by(BLOCK_BYTES) {
            if !disk.try_read(offset, PAGE_BYTES, |_, bytes| page.copy_from_slice(bytes)) {
                drop(disk.read(offset, BLOCK_BYTES).await.map_err(|error| error.to_string())?);
            }
        }
        f(&disk)
    });
    call.wait().map_err(|error| error.to_string())?
}

fn lookup(storage: &StorageHandle) -> Result<(), String> {
    on_shard(storage, |disk| {
        let mut buffer = AlignedBuf::new(PAGE_BYTES);
        let rounds: Vec<Vec<u64>> = (0..ROUNDS).map(|round| offsets(round).collect()).collect();
        for round in &rounds {
            // What is read for the first time after it was brought in takes another way through the policy.
            round.iter().all(|offset| disk.try_read(*offset, PAGE_BYTES, |_, _| ()));
        }
        for round in &rounds {
            let hits = lookup_hit_measured(disk, round, &mut buffer);
            let last = round.last().map_or(0, |offset| content(*offset));
            if hits != DEPTH || buffer[0] != last {
                return Err(format!("{hits} hits of {DEPTH}, bytes {} for {last}", buffer[0]));
            }
        }
        Ok(())
    })
}

/// Holds the ring until somebody runs it.
#[derive(Default)]
struct Holder {
    queue: Mutex<Option<Queue>>,
    started: Condvar,
}

impl QueueRunner for Holder {
    fn start(&self, queue: Queue) {
        *self.queue.lock().unwrap_or_else(PoisonError::into_inner) = Some(queue);
        self.started.notify_all();
    }

    fn stop(&self, index: u16) -> QueueStopped {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        queue.map_or(QueueStopped { index, next_available: 0 }, Queue::stop)
    }
}

impl Holder {
    fn wait(&self) -> Result<(), String> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.started.wait_timeout_while(queue, PATIENCE, |queue| queue.is_none());
        let waited = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.1.timed_out() { Err("the ring was not started".to_owned()) } else { Ok(()) }
    }
}

fn ring(storage: &StorageHandle, socket: &std::path::Path) -> Result<(), String> {
    let holder = Arc::new(Holder::default());
    let config = DiskConfig { read_only: true, num_queues: 1, ..DiskConfig::new(STORE_BYTES) };
    let runner = Arc::clone(&holder) as Arc<dyn QueueRunner>;
    let export = Export::start(socket, config, runner, &ExportOptions::default()).map_err(|error| error.to_string())?;
    let told = |error: blkio::Error| error.to_string();
    let mut device = Blkio::new("virtio-blk-vhost-user").map_err(told)?;
    device.set_str("path", &socket.to_string_lossy()).map_err(told)?;
    device.set_bool("read-only", true).map_err(told)?;
    device.connect().map_err(told)?;
    let mut queues = device.start().map_err(told)?.queues;
    let guest = queues.first_mut().ok_or("the front-end has no queue")?;
    let memory = device.alloc_mem_region(DEPTH * PAGE_BYTES).map_err(told)?;
    device.map_mem_region(&memory).map_err(told)?;
    holder.wait()?;
    // The first time round is not counted: the ring's buffers are made, and the policy has seen every block once.
    for (counted, round) in [false, true].into_iter().flat_map(|counted| (0..ROUNDS).map(move |round| (counted, round)))
    {
        for (slot, offset) in offsets(round).enumerate() {
            guest.read(offset, (memory.addr + slot * PAGE_BYTES) as *mut u8, PAGE_BYTES, slot, ReqFlags::empty());
        }
        submit(guest, 0)?;
        let holder = Arc::clone(&holder);
        let hits = on_shard(storage, move |disk| {
            let mut queue = holder.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let queue = queue.as_mut().ok_or("the ring was stopped")?;
            queue.clear_kick();
            let hits = if counted { ring_hit_measured(queue, disk) } else { ring_hits(queue, disk) };
            hits.map_err(|error| error.to_string())
        })?;
        let failed = submit(guest, DEPTH)?;
        if hits != DEPTH || failed > 0 {
            return Err(format!("{hits} hits of {DEPTH}, {failed} failed"));
        }
    }
    drop((queues, device, export));
    Ok(())
}

/// Sends what is queued and waits for so many completions. Returns how many of them failed.
fn submit(guest: &mut Blkioq, wait_for: usize) -> Result<usize, String> {
    let mut completions: [MaybeUninit<Completion>; DEPTH] = [const { MaybeUninit::uninit() }; DEPTH];
    let mut patience = PATIENCE;
    let done = guest.do_io(&mut completions[..wait_for], wait_for, Some(&mut patience), None);
    let done = done.map_err(|error| error.to_string())?;
    // SAFETY: do_io has filled in the first `done`.
    let failed = completions[..done].iter().filter(|one| unsafe { one.assume_init_ref() }.ret != 0).count();
    Ok(failed)
}
