//! A sick store or cache disk costs performance only: each fault that a device can have, on a file system that falls ill
//! and recovers while guests read and write.
//!
//! - `fs`: the file system
//! - this file: the faults, first of the cache disk, then of a store, each told apart by what may be lost: nothing with the
//!   first; what is asked of it with the second, while every other disk goes on
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod fs;

use fs::{Fault, SickFs};
use prestage_cache::arena::HugePages;
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{AlignedBuf, Call, EngineMode};
use prestage_cache::policy::CoreConfig;
use prestage_cache::ssd::{Abandoned, Clock, SsdError, SsdOptions, SsdState, SsdTier};
use prestage_cache::{Cache, CacheConfig, Closing, ResizeError, StorageHandle};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const BLOCK: u64 = 64 << 10;
const BLOCKS: u64 = 128;
/// A failed assumption must not hang the whole run. Nothing is measured by it.
const LIMIT: Duration = Duration::from_secs(60);

fn content(block: u64, version: u64) -> Vec<u8> {
    let word = (block << 16 | version).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK as usize).collect()
}

/// The RAM tier holds an eighth of a store.
fn cache(ssd: Option<SsdTier>) -> Cache {
    let (ram_bytes, policy) = (BLOCKS / 8 * BLOCK, CoreConfig::with_slots(0));
    let config = CacheConfig { ram_bytes, huge_pages: HugePages::No, shards: 1, engine: EngineMode::Auto, policy };
    Cache::new(config, ssd).unwrap()
}

fn make_store(path: &Path) {
    let bytes: Vec<u8> = (0..BLOCKS).flat_map(|block| content(block, 0)).collect();
    std::fs::write(path, bytes).unwrap();
}

fn open(cache: &Cache, path: &Path) -> StorageHandle {
    cache.open(&path.display().to_string().parse().unwrap(), Default::default()).unwrap()
}

/// A guest: what it wrote last to each block, and what it is told.
struct Guest {
    storage: StorageHandle,
    versions: Vec<u64>,
    last: u64,
}

impl Guest {
    fn new(storage: StorageHandle) -> Guest {
        Guest { storage, versions: vec![0; BLOCKS as usize], last: 0 }
    }

    fn call<T, F, Fut>(&self, act: F) -> Call<T>
    where
        T: Send + 'static,
        F: FnOnce(Disk) -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let id = self.storage.id();
        self.storage.shard().call(move |_| act(Disk::new(local(id).unwrap(), 1, Arc::new(DiskCounters::default()))))
    }

    fn begin_read(&self, block: u64) -> Call<Result<Vec<u8>, String>> {
        self.call(move |disk| async move {
            let data = disk.read(block * BLOCK, BLOCK as usize).await.map_err(|error| error.to_string())?;
            let mut found = vec![0; BLOCK as usize];
            data.copy_to(|at, part| found[at..at + part.len()].copy_from_slice(part));
            Ok(found)
        })
    }

    fn try_read(&self, block: u64) -> Result<(), String> {
        let found = self.begin_read(block).wait().unwrap()?;
        let version = self.versions[block as usize];
        assert!(found == content(block, version), "block {block} is not version {version}: {:x?}", &found[..16]);
        Ok(())
    }

    fn read_all(&self) {
        (0..BLOCKS).for_each(|block| self.try_read(block).unwrap());
    }

    fn begin_write(&mut self, block: u64) -> (u64, Call<Result<(), String>>) {
        self.last += 1;
        let data = AlignedBuf::copy_of(&content(block, self.last));
        let write = self
            .call(move |disk| async move { disk.write(block * BLOCK, data).await.map_err(|error| error.to_string()) });
        (self.last, write)
    }

    fn try_write(&mut self, block: u64) -> Result<(), String> {
        let (version, write) = self.begin_write(block);
        write.wait().unwrap()?;
        self.versions[block as usize] = version;
        Ok(())
    }

    fn begin_flush(&self) -> Call<Result<(), String>> {
        self.call(|disk| async move { disk.flush().await.map_err(|error| error.to_string()) })
    }

    fn flush(&self) -> Result<(), String> {
        self.begin_flush().wait().unwrap()
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < LIMIT, "{what}: not in {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A cache disk falls ill with `fault`, is read from and written to, and recovers.
fn cache_disk(fault: Fault) {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    make_store(&store);
    let sick = SickFs::mount();
    // Back-offs are over when the test says so.
    let hours = Arc::new(AtomicU64::new(1));
    let clock: Clock = {
        let (hours, begun) = (Arc::clone(&hours), Instant::now());
        Arc::new(move || begun.elapsed() + Duration::from_secs(3600 * hours.load(Ordering::Relaxed)))
    };
    let options = SsdOptions { preallocate: false, clock, ..SsdOptions::default() };
    let (tier, _) = SsdTier::open_with(&sick.path("slab"), (4 << 20) + 2 * BLOCKS * BLOCK, options).unwrap();
    let cache = cache(Some(tier));
    let mut guest = Guest::new(open(&cache, &store));
    let stats = || cache.ssd_stats().unwrap();

    guest.read_all();
    until("blocks move to the cache disk", || {
        guest.read_all();
        stats().used_slots > BLOCKS / 2
    });

    sick.fall_ill(fault);
    // What a guest asks for it gets, whatever the cache disk does, and the tier is given up.
    until("the tier is degraded", || {
        for block in 0..BLOCKS {
            guest.try_read(block).unwrap();
            if block % 7 == 0 {
                guest.try_write(block).unwrap();
                guest.try_read(block).unwrap();
            }
        }
        guest.flush().unwrap();
        matches!(stats().state, SsdState::Degraded { .. })
    });
    if let SsdState::Degraded { reason, .. } = stats().state {
        assert!(!reason.is_empty());
    }
    // Bypassed: it is left in peace, apart from what had been begun.
    let begun = sick.requests();
    guest.read_all();
    assert!(sick.requests() <= begun + 64, "{} requests to a tier that is bypassed", sick.requests() - begun);

    sick.recover();
    let reads = stats().reads;
    until("the tier is used again", || {
        hours.fetch_add(1, Ordering::Relaxed);
        guest.read_all();
        if guest.last.is_multiple_of(2) {
            guest.try_write(guest.last % BLOCKS).unwrap();
        } else {
            guest.last += 1;
        }
        let now = stats();
        now.state == SsdState::Ok && now.reads > reads + 100
    });
    guest.read_all();
    cache.close(&guest.storage, Closing { drain: Duration::from_secs(5), parted: false });
    cache.shutdown();
}

#[test]
fn a_cache_disk_whose_reads_fail_costs_no_data() {
    cache_disk(Fault::ReadError);
}

#[test]
fn nor_one_that_reads_half() {
    cache_disk(Fault::Short);
}

#[test]
fn nor_one_whose_writes_fail() {
    cache_disk(Fault::WriteError);
}

#[test]
fn nor_one_that_is_full() {
    cache_disk(Fault::Full);
}

#[test]
fn nor_one_that_was_pulled_out() {
    cache_disk(Fault::Gone);
}

#[test]
fn nor_one_that_hangs() {
    cache_disk(Fault::Hangs);
}

/// Its shard, on which two disks are, waits for nothing: neither for what is under way nor for the file to be closed.
#[test]
fn one_that_does_not_answer_is_taken_out_and_its_file_is_closed_when_it_does() {
    for fault in [Fault::Hangs, Fault::Dead] {
        let folder = tempfile::tempdir().unwrap();
        let (store, other) = (folder.path().join("store"), folder.path().join("other"));
        make_store(&store);
        make_store(&other);
        let sick = SickFs::mount();
        let options = || SsdOptions {
            preallocate: false,
            veto: Some(folder.path().join("veto")),
            lineage: Some(folder.path().join("last")),
            ..SsdOptions::default()
        };
        let (slab, size) = (sick.path("slab"), (4 << 20) + 3 * BLOCKS * BLOCK);
        let (tier, _) = SsdTier::open_with(&slab, size, options()).unwrap();
        let cache = cache(Some(tier));
        let (mut guest, mut second) = (Guest::new(open(&cache, &store)), Guest::new(open(&cache, &other)));
        until("blocks move to the cache disk", || {
            guest.read_all();
            second.read_all();
            cache.ssd_stats().unwrap().used_slots > BLOCKS
        });
        sick.fall_ill(fault);
        if fault == Fault::Dead {
            assert!(matches!(cache.resize_ssd(2 * size), Err(ResizeError::Ssd(SsdError::NotAnswering { .. }))));
        }
        // A read is under way there, or the mark that a write waits for.
        let read = guest.begin_read(1);
        let (version, write) = guest.begin_write(2);
        until("requests hang", || sick.held() > 0);
        let drained = cache.drain_ssd().unwrap().unwrap();
        assert_eq!(drained.abandoned, Abandoned::Hangs);
        assert!(cache.ssd().is_none() && !drained.file.is_gone(), "{fault:?}");
        assert!(read.wait().unwrap().unwrap() == content(1, 0));
        write.wait().unwrap().unwrap();
        guest.versions[2] = version;
        for block in 0..BLOCKS {
            guest.try_write(block).unwrap();
            second.try_write(block).unwrap();
        }
        guest.read_all();
        second.read_all();
        // A disk is closed, and another opened.
        cache.close(&second.storage, Closing { drain: Duration::ZERO, parted: true });
        second.storage = open(&cache, &other);
        second.read_all();
        assert!(!drained.file.is_gone(), "{fault:?}");

        sick.recover();
        until("the file is closed", || drained.file.is_gone());
        // Nothing of it is believed: not after a crash either.
        drop(cache.ssd());
        let (tier, report) = SsdTier::open_with(&slab, size, SsdOptions { empty: true, ..options() }).unwrap();
        assert_eq!(report.kept_slots, 0);
        cache.resume_ssd(tier).unwrap();
        until("the tier is used again", || {
            guest.read_all();
            second.read_all();
            cache.ssd_stats().unwrap().reads > 100
        });
        for guest in [&guest, &second] {
            cache.close(&guest.storage, Closing { drain: Duration::from_secs(5), parted: false });
        }
        cache.shutdown();
    }
}

/// Two disks on one shard, one of them on a store that falls ill.
struct Two {
    sick: SickFs,
    cache: Cache,
    ill: Guest,
    well: Guest,
    _folder: tempfile::TempDir,
}

impl Two {
    fn new() -> Two {
        let folder = tempfile::tempdir().unwrap();
        let sick = SickFs::mount();
        let (store, other) = (sick.path("store"), folder.path().join("other"));
        make_store(&store);
        make_store(&other);
        let cache = cache(None);
        let (ill, well) = (Guest::new(open(&cache, &store)), Guest::new(open(&cache, &other)));
        Two { sick, cache, ill, well, _folder: folder }
    }

    /// The store is well again, and so is the disk.
    fn recovered(mut self) {
        self.sick.recover();
        for block in 0..BLOCKS {
            self.ill.try_write(block).unwrap();
        }
        self.ill.flush().unwrap();
        self.ill.read_all();
        self.well.read_all();
        assert_eq!(self.ill.storage.trouble(), None, "what is over is not complained about");
        for guest in [&self.ill, &self.well] {
            self.cache.close(&guest.storage, Closing { drain: Duration::ZERO, parted: false });
        }
        self.cache.shutdown();
    }
}

#[test]
fn a_store_whose_reads_fail_fails_those_and_nothing_that_is_cached() {
    for fault in [Fault::ReadError, Fault::Short, Fault::Gone] {
        let two = Two::new();
        (0..4).for_each(|block| two.ill.try_read(block).unwrap());
        two.sick.fall_ill(fault);
        (0..4).for_each(|block| two.ill.try_read(block).unwrap());
        let error = two.ill.try_read(BLOCKS - 1).unwrap_err();
        assert!(error.contains("store"), "{fault:?}: {error}");
        assert!(two.ill.storage.trouble().is_some(), "{fault:?} is told");
        two.well.read_all();
        two.recovered();
    }
}

#[test]
fn a_store_whose_writes_fail_says_so_to_the_guest() {
    for fault in [Fault::WriteError, Fault::Full, Fault::Gone] {
        let mut two = Two::new();
        two.ill.try_read(1).unwrap();
        two.sick.fall_ill(fault);
        assert!(two.ill.try_write(1).is_err(), "{fault:?}: acknowledged without the store");
        if fault != Fault::Full {
            two.ill.flush().unwrap_err();
        }
        assert!(two.ill.storage.trouble().is_some(), "{fault:?} is told");
        two.well.try_write(1).unwrap();
        two.well.flush().unwrap();
        two.recovered();
    }
}

/// More requests hang than the kernel has threads for, of every kind.
#[test]
fn a_store_that_hangs_delays_no_other_disk() {
    let mut two = Two::new();
    two.sick.fall_ill(Fault::Hangs);
    let half = BLOCKS / 2;
    let reads: Vec<_> = (0..half).map(|block| two.ill.begin_read(block)).collect();
    let writes: Vec<_> = (half..BLOCKS).map(|block| two.ill.begin_write(block)).collect();
    let flush = two.ill.begin_flush();
    until("requests hang", || two.sick.held() > half as usize);
    for block in 0..BLOCKS {
        two.well.try_read(block).unwrap();
        two.well.try_write(block).unwrap();
    }
    two.well.flush().unwrap();
    // Two seconds or two hours later.
    two.sick.recover();
    for (block, read) in (0..).zip(reads) {
        assert!(read.wait().unwrap().unwrap() == content(block, 0));
    }
    for (block, (version, write)) in (half..).zip(writes) {
        write.wait().unwrap().unwrap();
        two.ill.versions[block as usize] = version;
    }
    flush.wait().unwrap().unwrap();
    two.ill.read_all();
    two.recovered();
}
