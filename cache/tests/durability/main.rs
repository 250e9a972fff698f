//! A write is acknowledged when the store has it, and FLUSH and FUA reach the store: a cache on a store that loses what
//! was not flushed.
//!
//! - `store`: the store, an NBD server that records and loses power
//! - this file: tasks that write, flush and read at once, what they may rely on, and what is left after the loss
//!
//! The model keeps for each sector what a flush or FUA has made durable, and everything written to it since. It is told by
//! acknowledgements alone; the store says at each acknowledgement whether it had the data. After a loss of power each
//! sector holds one of these, whichever the store chose to keep, and a new cache, over the same SSD tier or none, shows
//! exactly what the store holds.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

#[path = "../nbd_common/mod.rs"]
mod nbd_common;
mod store;

use nbd_common::Random;
use prestage_cache::arena::HugePages;
use prestage_cache::backend::{NbdOptions, StoreOptions};
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{AlignedBuf, EngineMode};
use prestage_cache::policy::CoreConfig;
use prestage_cache::ssd::{SsdOptions, SsdTier};
use prestage_cache::{Cache, CacheConfig, Closing};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use store::{Abilities, SECTOR, SECTORS, Store, bytes, shown, version};

const TASKS: u64 = 6;
/// Sectors are dealt out in runs, so that pages are shared by tasks.
const RUN: u64 = 3;

/// What is known of one sector. Versions are written in order, by one task.
#[derive(Clone, Debug)]
struct Known {
    /// Kept whatever happens.
    durable: u64,
    /// Written since, oldest first, and whether that was acknowledged.
    since: Vec<(u64, bool)>,
}

impl Known {
    /// The last version acknowledged.
    fn acknowledged(&self) -> u64 {
        self.since.iter().rev().find(|(_, acknowledged)| *acknowledged).map_or(self.durable, |(version, _)| *version)
    }

    /// What may be found after a loss of power, or be durable: any of these from `version` on.
    fn may_be(&self, version: u64, found: u64) -> bool {
        let since = self.since.iter().map(|(version, _)| *version);
        since.chain([self.durable]).any(|known| known >= version && shown(known) == found)
    }

    /// A version is durable, and with it everything before is over.
    fn keep(&mut self, version: u64) {
        if version > self.durable {
            self.durable = version;
            self.since.retain(|(v, _)| *v > version);
        }
    }
}

type Model = Rc<RefCell<Vec<Known>>>;

/// One task's work until the store is gone.
async fn work(disk: Disk, store: Arc<Store>, model: Model, me: u64, seed: u64, next: Rc<RefCell<u64>>) {
    let mut random = Random(seed ^ (me + 1) << 32 | 1);
    while !store.is_off() {
        let run = random.below(SECTORS / RUN / TASKS) * TASKS + me;
        let first = run * RUN + random.below(RUN);
        let count = 1 + random.below(RUN - first % RUN);
        let sectors = first..first + count;
        let (at, len) = (first * SECTOR as u64, count as usize * SECTOR);
        match random.below(12) {
            kind @ 0..=5 => {
                let version = *next.borrow();
                *next.borrow_mut() += 1;
                let durable = kind == 5;
                // Possible from now on: the store may have it before we hear of it.
                for sector in sectors.clone() {
                    model.borrow_mut()[sector as usize].since.push((version, false));
                }
                let result = if shown(version) == 0 && !durable {
                    disk.write_zeroes(at, len as u64, random.below(2) == 0).await
                } else {
                    let mut data = AlignedBuf::new(len);
                    for (sector, part) in sectors.clone().zip(data.chunks_exact_mut(SECTOR)) {
                        part.copy_from_slice(&bytes(sector, shown(version)));
                    }
                    if durable { disk.write_durable(at, data).await } else { disk.write(at, data).await }
                };
                if result.is_err() {
                    continue;
                }
                for sector in sectors {
                    assert_eq!(store.latest(sector), shown(version), "sector {sector} acknowledged, not in the store");
                    let known = &mut model.borrow_mut()[sector as usize];
                    known.since.last_mut().unwrap().1 = true;
                    if durable {
                        assert_eq!(store.durable(sector), shown(version), "FUA of sector {sector}: not durable");
                        known.keep(version);
                    }
                }
            }
            6 => {
                let before: Vec<u64> = model.borrow().iter().map(Known::acknowledged).collect();
                if disk.flush().await.is_err() {
                    continue;
                }
                for (sector, version) in (0..).zip(before) {
                    let known = &mut model.borrow_mut()[sector as usize];
                    let durable = store.durable(sector);
                    assert!(known.may_be(version, durable), "flush: sector {sector} keeps {durable}, of {known:?}");
                    known.keep(version);
                }
            }
            _ => {
                let first = random.below(SECTORS - 40);
                let count = 1 + random.below(40);
                let Ok(data) = disk.read(first * SECTOR as u64, count as usize * SECTOR).await else { continue };
                let mut found = vec![0; count as usize * SECTOR];
                data.copy_to(|at, part| found[at..at + part.len()].copy_from_slice(part));
                for (sector, found) in (first..).zip(found.chunks_exact(SECTOR)) {
                    if sector / RUN % TASKS == me {
                        let (found, known) = (version(sector, found), &model.borrow()[sector as usize]);
                        // The last one acknowledged, or one that failed after it.
                        assert!(known.may_be(known.acknowledged(), found), "sector {sector} shows {found}: {known:?}");
                    }
                }
            }
        }
    }
}

fn cache(ssd: Option<&Path>, engine: EngineMode) -> Cache {
    let ssd = ssd.map(|path| {
        let options = SsdOptions { preallocate: false, ..SsdOptions::default() };
        SsdTier::open_with(path, 24 << 20, options).unwrap().0
    });
    let policy = CoreConfig::with_slots(0);
    let config = CacheConfig { ram_bytes: 1 << 20, huge_pages: HugePages::No, shards: 1, engine, policy };
    Cache::new(config, ssd).unwrap()
}

fn options(connections: usize) -> StoreOptions {
    // Who has lost power does not come back for the one who asked.
    let nbd = NbdOptions { connections, retry_for: Duration::ZERO, ..NbdOptions::default() };
    StoreOptions { nbd, ..StoreOptions::default() }
}

/// Lives of a store, each ended by a loss of power.
fn lives(abilities: Abilities, with_ssd: bool, engine: EngineMode, seed: u64, rounds: u64) {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut ssd = with_ssd.then(|| folder.path().join("0/slab"));
    ssd.iter().for_each(|slab| std::fs::create_dir(slab.parent().unwrap()).unwrap());
    // Socket paths are short; a temporary folder's may not be.
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("s");
    let mut random = Random(seed | 1);
    let mut content = vec![0; SECTORS as usize];
    let mut version = 1;
    let (mut lost, mut kept, mut from_ssd) = (0, 0, 0);
    for round in 0..rounds {
        let what = format!("seed {seed}, life {round}, {abilities:?}, SSD tier: {with_ssd}");
        let store = Arc::new(Store::start(&socket, abilities, &content, 100 + random.below(400), random.next()));
        let cache = cache(ssd.as_deref(), engine);
        let storage = cache.open(&store.uri().parse().unwrap(), options(3)).unwrap();
        let (id, seed, server, held) = (storage.id(), random.next(), Arc::clone(&store), content.clone());
        let call = storage.shard().call(move |shard| async move {
            let disk = Disk::new(local(id).unwrap(), 1, Arc::new(DiskCounters::default()));
            let known = held.iter().map(|durable| Known { durable: *durable, since: Vec::new() }).collect();
            let model: Model = Rc::new(RefCell::new(known));
            let next = Rc::new(RefCell::new(version));
            let tasks: Vec<_> = (0..TASKS)
                .map(|me| {
                    let (server, model, next) = (Arc::clone(&server), Rc::clone(&model), Rc::clone(&next));
                    shard.spawn(work(disk.clone(), server, model, me, seed, next))
                })
                .collect();
            for task in tasks {
                task.await.expect("a task's check failed");
            }
            (model.take(), next.take())
        });
        let model;
        (model, version) = call.wait().unwrap_or_else(|_| panic!("{what}: see above"));
        // Or the agent has died alone, and the store lives on.
        let alone = random.below(3) == 0;
        content = if alone { store.all() } else { store.left() };
        for (sector, (known, left)) in model.iter().zip(&content).enumerate() {
            assert!(known.may_be(known.durable, *left), "{what}: sector {sector} has {left}, of {known:?}");
            let last = shown(known.acknowledged());
            lost += u64::from(last != *left);
            kept += u64::from(last == *left && !known.since.is_empty());
        }
        // Killed: its successor has the tier's files as they are now, whatever the agent does to its own.
        let killed = random.below(2) == 0;
        if let Some(slab) = ssd.as_mut().filter(|_| killed) {
            let later = folder.path().join(format!("{}", round + 1));
            copy_files(slab.parent().unwrap(), &later);
            *slab = later.join("slab");
        }
        cache.close(&storage, Closing { drain: Duration::ZERO, parted: false });
        from_ssd += cache.ssd_stats().map_or(0, |stats| stats.reads);
        cache.shutdown();
        drop((storage, cache));
        from_ssd +=
            look(&socket, &content, ssd.as_deref(), engine, &format!("{what}, killed: {killed}"), random.next());
    }
    // Otherwise the store was a good one and nothing has been tested.
    assert!(lost > 0 && kept > 0, "{lost} sectors lost, {kept} kept in {rounds} lives");
    assert!(!with_ssd || from_ssd > 0, "{from_ssd} reads of the SSD tier");
}

/// Copies files of one moment: what was read twice in a row without a difference was so in between.
fn copy_files(from: &Path, to: &Path) {
    let read = || -> BTreeMap<OsString, Vec<u8>> {
        let files = std::fs::read_dir(from).unwrap().map(Result::unwrap);
        files.filter_map(|file| Some((file.file_name(), std::fs::read(file.path()).ok()?))).collect()
    };
    let mut files = read();
    loop {
        let again = read();
        if again == files {
            break;
        }
        files = again;
    }
    std::fs::create_dir(to).unwrap();
    for (name, content) in files {
        std::fs::write(to.join(name), content).unwrap();
    }
}

/// A new agent, on the SSD tier of the one before, shows what the store holds. Returns how often it read the tier.
fn look(socket: &Path, content: &[u64], ssd: Option<&Path>, engine: EngineMode, what: &str, seed: u64) -> u64 {
    let store = Store::start(socket, PLAIN, content, u64::MAX, seed);
    let cache = cache(ssd, engine);
    let storage = cache.open(&store.uri().parse().unwrap(), options(1)).unwrap();
    let (id, held) = (storage.id(), content.to_vec());
    let call = storage.shard().call(move |_| async move {
        let disk = Disk::new(local(id).unwrap(), 1, Arc::new(DiskCounters::default()));
        for pass in 0..2 {
            for (sector, expected) in (0..).zip(&held) {
                let data = disk.read(sector * SECTOR as u64, SECTOR).await.unwrap();
                let mut found = [0; SECTOR];
                data.copy_to(|at, part| found[at..at + part.len()].copy_from_slice(part));
                assert_eq!(version(sector, &found), *expected, "sector {sector} in pass {pass}: the store has another");
            }
        }
    });
    call.wait().unwrap_or_else(|_| panic!("{what}: see above"));
    let reads = cache.ssd_stats().map_or(0, |stats| stats.reads);
    cache.close(&storage, Closing { drain: Duration::from_secs(5), parted: false });
    cache.shutdown();
    reads
}

const PLAIN: Abilities = Abilities { multi: false, fua: false, zeroes: false, fails: false };
const RICH: Abilities = Abilities { multi: true, fua: true, zeroes: true, fails: false };

#[test]
fn what_was_flushed_is_there_after_a_loss_of_power() {
    lives(PLAIN, false, EngineMode::Auto, 11, 8);
}

#[test]
fn also_with_fua_and_zeroes_over_several_connections() {
    lives(RICH, false, EngineMode::Auto, 12, 8);
}

#[test]
fn also_where_requests_fail() {
    lives(Abilities { fails: true, ..RICH }, false, EngineMode::Auto, 13, 8);
    lives(Abilities { fails: true, ..PLAIN }, false, EngineMode::ThreadPool, 14, 8);
}

#[test]
fn and_an_ssd_tier_never_shows_what_the_store_has_lost() {
    lives(Abilities { fails: true, ..RICH }, true, EngineMode::Auto, 15, 8);
    lives(PLAIN, true, EngineMode::Auto, 16, 8);
}
