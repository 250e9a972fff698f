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
use prestage_cache::ssd::{Found, SsdOptions, SsdTier};
use prestage_cache::types::PageRange;
use prestage_cache::{Cache, CacheConfig, Closing, Resized, StorageHandle, arena::HugePages};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
    owner_until(disk, me, owners, steps, Arc::default()).await
}

/// The same, which ends early when it is told to.
async fn owner_until(disk: Disk, me: u64, owners: u64, steps: u64, enough: Arc<AtomicBool>) -> Vec<(u64, Option<u64>)> {
    let mut random = Random(0x9e37_79b9 + me * 7919);
    // Version of each own sector; None: zeroes.
    let mut model: Vec<Option<u64>> = vec![Some(0); SECTORS as usize];
    let mine = |sector: u64| sector / RUN % owners == me;
    for step in 1..=steps {
        if enough.load(Ordering::Relaxed) {
            break;
        }
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

/// Both tiers get another size again and again, under reads, writes, fills and prefetches.
#[test]
fn nor_while_the_tiers_change_their_size() {
    const OWNERS: u64 = 5;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd) = (folder.path().join("store"), folder.path().join("ssd"));
    make_store(&store);
    for engine in [EngineMode::IoUring, EngineMode::ThreadPool] {
        make_store(&store);
        let cache = cache(2 << 20, Some(&ssd), engine);
        let storage = open(&cache, &store);
        let counters = Arc::new(DiskCounters::default());
        let (id, guest) = (storage.id(), Arc::clone(&counters));
        let mut call = storage.shard().call(move |shard| async move {
            let disk = Disk::new(local(id).unwrap(), 1, guest);
            let owners: Vec<_> = (0..OWNERS).map(|me| shard.spawn(owner(disk.clone(), me, OWNERS, 1500))).collect();
            for owner in owners {
                owner.await.expect("an owner's check failed");
            }
        });
        let mut random = Random(7);
        let (mut rounds, slot, slab) = (0, 65536, |slots: u64| (4 << 20) + (256 << 10) + slots * 65536);
        let done = loop {
            // From nothing at all to more than the store has.
            let (ram, ssd) = (random.below(64) * slot, slab(1 + random.below(60)));
            let resized = cache.resize_ram(ram).unwrap();
            assert_eq!((resized.after, cache.occupancy().slots), (ram, (ram / slot) as u32));
            assert_eq!(cache.resize_ssd(ssd).unwrap().after, ssd);
            assert_eq!(std::fs::metadata(folder.path().join("ssd")).unwrap().len(), ssd);
            let range = PageRange { first: random.below(700), count: 1 + random.below(40) };
            cache.prefetch(&storage, &[PrefetchRequest { range, due: cache.now(), probability: 1.0, tag: 0 }]);
            rounds += 1;
            if let Ok(Some(())) = call.wait_timeout(Duration::from_millis(2)) {
                break true;
            }
            assert!(rounds < 100_000);
        };
        assert!(done && rounds > 10, "{rounds}");
        let stats = counters.snapshot();
        assert_eq!(stats.reads, stats.served_ram + stats.served_ssd + stats.served_store);
        assert!(stats.served_ram > 0, "{stats:?}");
        assert_eq!((stats.read_errors, stats.write_errors), (0, 0));
        let tier = cache.ssd_stats().unwrap();
        assert_eq!((tier.io_errors, tier.bad_checksums), (0, 0), "{tier:?}");
        cache.close(&storage, closing(false));
        cache.shutdown();
    }
}

/// The SSD tier goes and comes back, emptied, under reads, writes, fills and prefetches; other disks are opened and closed meanwhile.
#[test]
fn nor_while_the_ssd_tier_goes_and_comes_back() {
    const OWNERS: u64 = 5;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd, other) = (folder.path().join("store"), folder.path().join("ssd"), folder.path().join("other"));
    make_store(&store);
    make_store(&other);
    let cache = cache(1 << 20, Some(&ssd), EngineMode::Auto);
    let storage = open(&cache, &store);
    let counters = Arc::new(DiskCounters::default());
    let (id, guest) = (storage.id(), Arc::clone(&counters));
    let enough = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&enough);
    let call = storage.shard().call(move |shard| async move {
        let disk = Disk::new(local(id).unwrap(), 1, guest);
        let owner = |me| owner_until(disk.clone(), me, OWNERS, u64::MAX, Arc::clone(&told));
        let owners: Vec<_> = (0..OWNERS).map(|me| shard.spawn(owner(me))).collect();
        for owner in owners {
            owner.await.expect("an owner's check failed");
        }
    });
    let is_open = || {
        let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|name| name == ssd)
    };
    let empty = || SsdOptions { empty: true, ..SsdOptions::default() };
    for _ in 0..3 {
        assert!(is_open());
        // Blocks are written to it a second after they were read.
        let deadline = Instant::now() + Duration::from_secs(60);
        while cache.ssd_stats().unwrap().used_slots == 0 {
            assert!(Instant::now() < deadline, "the tier is not in use");
            std::thread::sleep(Duration::from_millis(5));
        }
        let opener = std::thread::spawn({
            let (cache, other) = (cache.clone(), other.clone());
            move || open(&cache, &other)
        });
        assert!(cache.drain_ssd().unwrap().is_some());
        let second = opener.join().unwrap();
        assert!(cache.ssd().is_none() && !is_open(), "a disk that is being opened is no exception");
        assert!(cache.drain_ssd().unwrap().is_none());
        let (tier, report) = SsdTier::open_with(&ssd, 96 << 20, empty()).unwrap();
        assert_eq!(report.kept_slots, 0);
        cache.resume_ssd(tier).unwrap();
        assert!(cache.resume_ssd(SsdTier::open_with(&folder.path().join("b"), 96 << 20, empty()).unwrap().0).is_err());
        cache.close(&second, closing(false));
    }
    enough.store(true, Ordering::Relaxed);
    call.wait().unwrap();
    let stats = counters.snapshot();
    assert_eq!((stats.read_errors, stats.write_errors), (0, 0));
    assert_eq!(cache.ssd_stats().unwrap().bad_checksums, 0);
    cache.close(&storage, closing(false));
    cache.shutdown();
}

/// What is on the disk of a tier that was taken out of service is believed by no run, however that came about.
#[test]
fn what_a_tier_had_that_went_out_of_service_counts_for_nobody() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd, copy) = (folder.path().join("store"), folder.path().join("ssd"), folder.path().join("copy"));
    make_store(&store);
    let options = || SsdOptions {
        veto: Some(folder.path().join("veto")),
        lineage: Some(folder.path().join("last")),
        ..SsdOptions::default()
    };
    let start = |path: &Path| {
        let (tier, report) = SsdTier::open_with(path, 96 << 20, options()).unwrap();
        let config = CacheConfig {
            ram_bytes: 1 << 20,
            huge_pages: HugePages::No,
            shards: 1,
            engine: EngineMode::Auto,
            policy: CoreConfig::with_slots(0),
        };
        (Cache::new(config, Some(tier)).unwrap(), report)
    };
    let (first, _) = start(&ssd);
    let storage = open(&first, &store);
    read_all(&first, &storage);
    first.close(&storage, closing(false));
    let storage = open(&first, &store);
    assert!(first.ssd_stats().unwrap().used_slots > 0);
    first.drain_ssd().unwrap();
    assert!(!folder.path().join("last").exists(), "the run goes on without it");
    // What a kill at this moment leaves.
    std::fs::copy(&ssd, &copy).unwrap();
    assert_eq!(read_all(&first, &storage).1, 0);
    first.close(&storage, closing(false));
    first.shutdown();
    for path in [&copy, &ssd] {
        let (next, report) = start(path);
        assert_eq!((report.found, report.kept_slots), (Found::Unclean, 0));
        let storage = open(&next, &store);
        assert_eq!(read_all(&next, &storage).1, 0, "nothing comes from the SSD");
        next.close(&storage, closing(false));
        next.shutdown();
    }
}

/// What is cached stays while a tier grows, and of the SSD tier what lies below the new end while it shrinks; and the next run
/// finds it.
#[test]
fn a_tier_keeps_what_it_has_room_for_and_gives_the_rest_back() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (store, ssd) = (folder.path().join("store"), folder.path().join("ssd"));
    make_store(&store);
    let pages = SECTORS / 8;
    let first = cache(64 << 20, Some(&ssd), EngineMode::Auto);
    let storage = open(&first, &store);
    assert_eq!(read_all(&first, &storage), (0, 0, pages));
    assert_eq!(first.resize_ram(256 << 20).unwrap(), Resized { before: 64 << 20, after: 256 << 20 });
    assert_eq!(read_all(&first, &storage), (pages, 0, 0));
    // What waits for the SSD tier is written.
    first.close(&storage, closing(false));
    let storage = open(&first, &store);
    assert_eq!(read_all(&first, &storage).2, 0);
    assert_eq!(first.resize_ram(20 << 16).unwrap().after, 20 << 16);
    // The store's last block has 14 pages.
    assert!(first.occupancy().slots == 20 && (318..=320).contains(&first.occupancy().valid_pages));
    let most = first.most_ram_bytes();
    let error = first.resize_ram(most + 65536).unwrap_err().to_string();
    assert!(error.contains(&most.to_string()), "{error}");
    first.close(&storage, closing(false));
    let held = first.ssd().unwrap().usage()[0].1;
    assert_eq!(held, pages.div_ceil(16));
    assert_eq!(first.resize_ssd(200 << 20).unwrap().before, 96 << 20);
    assert_eq!(first.ssd().unwrap().usage()[0].1, held);
    first.resize_ssd((4 << 20) + (256 << 10) + (30 << 16)).unwrap();
    assert_eq!(first.ssd().unwrap().usage()[0].1, 30);
    let error = first.resize_ssd(1000).unwrap_err().to_string();
    assert!(error.contains("out of range"), "{error}");
    first.shutdown();
    assert!(first.resize_ssd(96 << 20).is_err(), "it is closed");
    drop(first);
    let second = cache(64 << 20, Some(&ssd), EngineMode::Auto);
    let storage = open(&second, &store);
    let (_, from_ssd, _) = read_all(&second, &storage);
    assert_eq!(from_ssd, 30);
    second.close(&storage, closing(false));
    second.shutdown();
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

/// The store may be ahead of the RAM tier while a guest's write is under way. Here somebody else's write stands for that.
#[test]
fn a_read_past_the_cache_shows_nothing_that_a_read_of_the_cache_then_takes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    std::fs::write(&path, vec![1; 2 << 20]).unwrap();
    let cache = cache(1 << 20, None, EngineMode::Auto);
    let store = open(&cache, &path);
    let id = store.id();
    let found = store.shard().call(move |_| async move {
        let disk = Disk::new(local(id).unwrap(), 1, Arc::new(DiskCounters::default()));
        read(&disk, 0, 4096).await;
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[2; 8192], 0).unwrap();
        // Of more blocks than the tier has slots.
        let past = read(&disk, 0, 17 << 16).await;
        (past[0], past[4096], past[8192], read(&disk, 0, 4096).await[0])
    });
    assert_eq!(found.wait().unwrap(), (1, 2, 1, 1));
    assert_eq!(store.stats().bypassed, 1);
    cache.close(&store, closing(false));
    cache.shutdown();
}
