//! A disk in front of a real file, with tiers so small that everything is evicted all the time, against a model of what
//! the guest wrote.
//!
//! Several guests' worth of tasks run at once. Each owns some sectors, dealt out in runs of three, so that pages and
//! blocks are always shared between owners: one task's write runs beside its neighbours' reads, fills, prefetches and
//! writes of the same page. A task knows what its own sectors must hold.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

use prestage_cache::backend::StoreSpec;
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{AlignedBuf, EngineMode};
use prestage_cache::policy::{CoreConfig, PrefetchRequest};
use prestage_cache::ssd::SsdTier;
use prestage_cache::types::PageRange;
use prestage_cache::{Cache, CacheConfig, Closing, StorageHandle, arena::HugePages};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const SECTOR: u64 = 512;
const SECTORS: u64 = 6000;
const RUN: u64 = 3;

fn cache(ram_bytes: u64, ssd: Option<&Path>, engine: EngineMode) -> Cache {
    let ssd = ssd.map(|path| SsdTier::open(path, 96 << 20).unwrap().0);
    let config =
        CacheConfig { ram_bytes, huge_pages: HugePages::No, shards: 1, engine, policy: CoreConfig::with_slots(0) };
    Cache::new(config, ssd).unwrap()
}

fn closing(parted: bool) -> Closing {
    Closing { drain: Duration::from_secs(20), parted }
}

fn open(cache: &Cache, path: &Path) -> StorageHandle {
    let spec: StoreSpec = path.display().to_string().parse().unwrap();
    cache.open(&spec, Default::default()).unwrap()
}

/// xorshift64*, Vigna 2016: tests must repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
}

fn fill(sector: u64, version: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(sector << 32 ^ version << 8 ^ i as u64).to_le_bytes());
    }
    bytes
}

async fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    if !disk.try_read(offset, len, |at, bytes| out[at..at + bytes.len()].copy_from_slice(bytes)) {
        let data = disk.read(offset, len).await.unwrap();
        data.copy_to(|at, bytes| out[at..at + bytes.len()].copy_from_slice(bytes));
    }
    out
}

/// One owner's random reads and writes, checked against what it wrote.
async fn owner(disk: Disk, me: u64, owners: u64, steps: u64) -> Vec<(u64, Option<u64>)> {
    let mut random = Random(0x9e37_79b9 + me * 7919);
    // Version of each own sector; None: zeroes.
    let mut model: Vec<Option<u64>> = vec![Some(0); SECTORS as usize];
    let mine = |sector: u64| sector / RUN % owners == me;
    for step in 1..=steps {
        let run = random.below(SECTORS / RUN / owners) * owners + me;
        let first = run * RUN + random.below(RUN);
        let count = 1 + random.below(RUN - first % RUN);
        match random.below(10) {
            0..=2 => {
                let mut data = AlignedBuf::new((count * SECTOR) as usize);
                for i in 0..count {
                    let at = (i * SECTOR) as usize;
                    data[at..at + SECTOR as usize].copy_from_slice(&fill(first + i, step));
                    model[(first + i) as usize] = Some(step);
                }
                disk.write(first * SECTOR, data).await.unwrap();
            }
            3 => {
                disk.write_zeroes(first * SECTOR, count * SECTOR, step % 2 == 0).await.unwrap();
                (first..first + count).for_each(|sector| model[sector as usize] = None);
            }
            4 => disk.flush().await.unwrap(),
            _ => {
                // Reads cross into neighbours' sectors; only our own are compared.
                let first = random.below(SECTORS - 200);
                let count = 1 + random.below(200);
                let bytes = read(&disk, first * SECTOR, (count * SECTOR) as usize).await;
                for (i, found) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                    let sector = first + i as u64;
                    if mine(sector) {
                        let expected = model[sector as usize].map_or([0; 512], |version| fill(sector, version));
                        assert!(found == expected, "owner {me}, step {step}: sector {sector} is not what was written");
                    }
                }
            }
        }
    }
    (0..SECTORS).filter(|sector| mine(*sector)).map(|sector| (sector, model[sector as usize])).collect()
}

fn make_store(path: &Path) {
    let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| fill(sector, 0)).collect();
    std::fs::write(path, bytes).unwrap();
}

fn run(engine: EngineMode, ram_bytes: u64, with_ssd: bool) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = folder.path().join("store");
    make_store(&store);
    let spec = store.display().to_string();
    run_on(&spec, &store, folder.path(), engine, ram_bytes, with_ssd, 700);
}

/// `spec` names the store, `store` is the file behind it.
fn run_on(spec: &str, store: &Path, folder: &Path, engine: EngineMode, ram_bytes: u64, with_ssd: bool, steps: u64) {
    const OWNERS: u64 = 5;
    let ssd = folder.join("ssd");
    let cache = cache(ram_bytes, with_ssd.then_some(ssd.as_path()), engine);
    let spec: StoreSpec = spec.parse().unwrap();
    let storage = cache.open(&spec, Default::default()).unwrap();
    let counters = Arc::new(DiskCounters::default());
    let (id, guest) = (storage.id(), Arc::clone(&counters));
    let call = storage.shard().call(move |shard| async move {
        let disk = Disk::new(local(id).unwrap(), 1, guest);
        let owners: Vec<_> = (0..OWNERS).map(|me| shard.spawn(owner(disk.clone(), me, OWNERS, steps))).collect();
        let mut models = Vec::new();
        for owner in owners {
            models.extend(owner.await.expect("an owner's check failed"));
        }
        models
    });
    // Prefetches of anything at any time, as a predictor gone mad would ask for them.
    let mut random = Random(42);
    let pages = SECTORS * SECTOR / 4096;
    for _ in 0..300 {
        let range = PageRange { first: random.below(pages), count: 1 + random.below(40) };
        let request = PrefetchRequest { range, due: cache.now(), probability: 1.0, tag: 0 };
        cache.prefetch(&storage, &[request]);
        if random.below(40) == 0 {
            cache.drop_ram(None);
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    let models = call.wait().unwrap();
    let stats = counters.snapshot();
    assert_eq!(stats.reads, stats.served_ram + stats.served_ssd + stats.served_store);
    assert_eq!((stats.read_errors, stats.write_errors), (0, 0));
    let prefetch = cache.prefetch_counters(storage.id());
    assert!(prefetch.issued > 0 && stats.served_store > 0, "{prefetch:?} {stats:?}");
    cache.close(&storage, closing(false));
    cache.shutdown();
    // Write-through: whatever was acknowledged is in the file itself.
    let file = std::fs::File::open(store).unwrap();
    for (sector, version) in models {
        let mut found = [0; SECTOR as usize];
        file.read_exact_at(&mut found, sector * SECTOR).unwrap();
        let expected = version.map_or([0; 512], |version| fill(sector, version));
        assert!(found == expected, "sector {sector} of the store");
    }
}

#[test]
fn neighbours_in_one_page_never_see_each_other_lose_a_write() {
    run(EngineMode::IoUring, 1 << 20, false);
}

/// Writes that reach the store 3 ms after they were sent, and reads that take no time: fills run under writes.
#[test]
fn nor_when_fills_run_under_writes() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = folder.path().join("store");
    make_store(&store);
    let server = Server::start(&store);
    run_on(&server.spec, &store, folder.path(), EngineMode::Auto, 1 << 20, false, 150);
}

/// nbdkit on a file, writes delayed by 3 ms, for as long as this lives.
struct Server {
    process: std::process::Child,
    spec: String,
    _sockets: tempfile::TempDir,
}

impl Server {
    fn start(store: &Path) -> Server {
        // Socket paths are short; the target folder's may not be.
        let sockets = tempfile::tempdir().unwrap();
        let socket = sockets.path().join("s");
        let process = std::process::Command::new("nbdkit")
            .args(["--foreground", "--threads", "16", "--filter", "delay", "-U"])
            .arg(&socket)
            .arg("file")
            .arg(store)
            .arg("delay-write=3ms")
            .spawn()
            .expect("nbdkit is needed: run scripts/setup.sh");
        for _ in 0..1000 {
            if socket.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let spec = format!("nbd+unix:///?socket={}", socket.display());
        Server { process, spec, _sockets: sockets }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A machine is detached, writes to its NBD disk by itself, and is attached again: an export has no version to compare.
#[test]
fn a_store_that_was_out_of_our_hands_is_not_served_from_what_was_cached_before() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd) = (folder.path().join("store"), folder.path().join("ssd"));
    make_store(&store);
    let server = Server::start(&store);
    let spec: StoreSpec = server.spec.parse().unwrap();
    let cache = cache(64 << 20, Some(&ssd), EngineMode::Auto);
    let pages = SECTORS / 8;
    let storage = cache.open(&spec, Default::default()).unwrap();
    assert_eq!(read_all(&cache, &storage), (0, 0, pages));
    cache.close(&storage, closing(false));
    // Closed for a while and never out of our hands: kept.
    let storage = cache.open(&spec, Default::default()).unwrap();
    assert_eq!(read_all(&cache, &storage).2, 0);
    cache.close(&storage, closing(true));
    let storage = cache.open(&spec, Default::default()).unwrap();
    assert_eq!(read_all(&cache, &storage), (0, 0, pages), "others may have written meanwhile");
    cache.close(&storage, closing(false));
    cache.shutdown();
}

#[test]
fn nor_with_an_ssd_tier() {
    run(EngineMode::IoUring, 1 << 20, true);
}

#[test]
fn nor_on_threads() {
    run(EngineMode::ThreadPool, 1 << 20, true);
}

#[test]
fn nor_with_room_for_everything() {
    run(EngineMode::Auto, 64 << 20, true);
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange { first, count }
}

/// Reads a page through the cache and says where it came from: (ram, ssd, store) reads.
fn read_all(cache: &Cache, storage: &StorageHandle) -> (u64, u64, u64) {
    let counters = Arc::new(DiskCounters::default());
    let (id, guest) = (storage.id(), Arc::clone(&counters));
    let read = storage.shard().call(move |_| async move {
        let disk = Disk::new(local(id).unwrap(), 1, guest);
        for page in 0..SECTORS / 8 {
            let found = read(&disk, page * 4096, 4096).await;
            let expected: Vec<u8> = (page * 8..page * 8 + 8).flat_map(|sector| fill(sector, 0)).collect();
            assert!(found == expected, "page {page}");
        }
    });
    read.wait().unwrap();
    let _ = cache;
    let stats = counters.snapshot();
    (stats.served_ram, stats.served_ssd, stats.served_store)
}

#[test]
fn what_was_read_once_comes_from_ram_then_from_ssd_after_a_restart() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd) = (folder.path().join("store"), folder.path().join("ssd"));
    make_store(&store);
    let pages = SECTORS / 8;
    {
        let cache = cache(64 << 20, Some(&ssd), EngineMode::Auto);
        let storage = open(&cache, &store);
        assert_eq!(read_all(&cache, &storage), (0, 0, pages));
        assert_eq!(read_all(&cache, &storage), (pages, 0, 0));
        assert_eq!(cache.cached_pages(&storage, range(0, u64::MAX)), pages);
        cache.close(&storage, closing(false));
        assert_eq!(cache.ssd().unwrap().usage(), [(storage.identity().to_owned(), pages.div_ceil(16))]);
        cache.shutdown();
    }
    {
        let cache = cache(64 << 20, Some(&ssd), EngineMode::Auto);
        let storage = open(&cache, &store);
        // All of it on the SSD: counted block by block, and over the whole index; and once where both tiers have it.
        assert_eq!(cache.resident_pages(storage.id(), range(0, pages)), 0);
        assert_eq!(cache.cached_pages(&storage, range(0, pages)), pages);
        assert_eq!(cache.cached_pages(&storage, range(5, 20)), 20);
        assert_eq!(cache.cached_pages(&storage, range(5, u64::MAX)), pages - 5);
        assert_eq!(cache.cached_pages(&storage, range(pages, 1000)), 0);
        let (ram, ssd, from_store) = read_all(&cache, &storage);
        assert_eq!(from_store, 0);
        // A slot is read whole: one read in sixteen goes to the tier.
        assert_eq!((ram, ssd), (pages - pages.div_ceil(16), pages.div_ceil(16)));
        assert_eq!(cache.cached_pages(&storage, range(0, pages)), pages);
        cache.close(&storage, closing(false));
        cache.shutdown();
    }
    // A store that changed while nobody looked takes its slots along.
    std::fs::File::options().write(true).open(&store).unwrap().write_all_at(&fill(0, 0), 0).unwrap();
    let cache = cache(64 << 20, Some(&ssd), EngineMode::Auto);
    let storage = open(&cache, &store);
    assert_eq!(read_all(&cache, &storage), (0, 0, pages));
    assert!(cache.ssd_stats().unwrap().dropped_changed_store > 0);
    cache.close(&storage, closing(false));
    cache.shutdown();
}

#[test]
fn a_block_that_grows_page_by_page_keeps_its_earlier_pages_on_the_ssd() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd) = (folder.path().join("store"), folder.path().join("ssd"));
    make_store(&store);
    // One page of each block a life of the daemon, so that RAM never holds more than that one; all
    // blocks fit, or some would leave before they are written.
    for page in 0..4 {
        let cache = cache(2 << 20, Some(&ssd), EngineMode::Auto);
        let storage = open(&cache, &store);
        let id = storage.id();
        let reading = storage.shard().call(move |_| async move {
            let disk = Disk::new(local(id).unwrap(), 1, Arc::default());
            for block in 0..20 {
                read(&disk, block * 65536 + page * 4096, 4096).await;
            }
        });
        reading.wait().unwrap();
        cache.close(&storage, closing(false));
        assert_eq!(cache.ssd_stats().unwrap().valid_pages, 20 * (page + 1));
        cache.shutdown();
    }
    let cache = cache(1 << 20, Some(&ssd), EngineMode::Auto);
    let storage = open(&cache, &store);
    let (_, _, from_store) = read_all(&cache, &storage);
    assert_eq!(from_store, SECTORS / 8 - 80);
    assert_eq!(cache.ssd_stats().unwrap().bad_checksums, 0);
    cache.close(&storage, closing(false));
    cache.shutdown();
}

#[test]
fn prefetched_pages_are_hits_and_counted_as_used() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = folder.path().join("store");
    make_store(&store);
    let cache = cache(64 << 20, None, EngineMode::Auto);
    let storage = open(&cache, &store);
    let pages = SECTORS / 8;
    let all =
        PrefetchRequest { range: PageRange { first: 0, count: pages }, due: Duration::ZERO, probability: 1.0, tag: 3 };
    cache.prefetch(&storage, &[all]);
    while cache.prefetch_counters(storage.id()).completed < pages {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read_all(&cache, &storage), (pages, 0, 0));
    assert_eq!(cache.prefetch_counters(storage.id()).used, pages);
    assert_eq!(storage.stats().store_read_bytes, pages * 4096, "nothing is read twice");
    cache.close(&storage, closing(false));
    cache.shutdown();
}

#[test]
fn a_read_does_not_evict_a_block_that_it_wants_itself() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = folder.path().join("store");
    make_store(&store);
    // 16 slots: blocks 1 to 16 fill them, and block 1 is the next to leave.
    let cache = cache(1 << 20, None, EngineMode::Auto);
    let storage = open(&cache, &store);
    let id = storage.id();
    let reading = storage.shard().call(move |_| async move {
        let disk = Disk::new(local(id).unwrap(), 1, Arc::default());
        for block in 1..17 {
            read(&disk, block * 65536, 65536).await;
        }
        read(&disk, 0, 2 * 65536).await;
    });
    reading.wait().unwrap();
    assert_eq!(storage.stats().store_read_bytes, 17 * 65536, "each block is read once");
    cache.close(&storage, closing(false));
    cache.shutdown();
}

#[test]
fn one_store_is_not_served_writable_twice() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, link) = (folder.path().join("store"), folder.path().join("link"));
    make_store(&store);
    std::os::unix::fs::symlink(&store, &link).unwrap();
    let cache = cache(1 << 20, None, EngineMode::Auto);
    let first = open(&cache, &store);
    let spec: StoreSpec = link.display().to_string().parse().unwrap();
    let error = cache.open(&spec, Default::default()).unwrap_err().to_string();
    assert!(error.contains("one of the two is to write"), "{error}");
    assert!(cache.close(&first, closing(false)));
    let again = cache.open(&spec, Default::default()).unwrap();
    cache.close(&again, closing(false));
    cache.shutdown();
}
