//! Memory of the index for a block that is held: of a cache that is filled by reads, in this process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use prestage_cache::arena::HugePages;
use prestage_cache::backend::{StoreOptions, StoreSpec};
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::EngineMode;
use prestage_cache::policy::CoreConfig;
use prestage_cache::ssd::SsdTier;
use prestage_cache::types::BLOCK_BYTES;
use prestage_cache::{Cache, CacheConfig, Closing};

use super::report::Figure;
use super::{Bench, content};

pub(super) const FIGURE: &str = "index of a block";
/// Of the RAM tier, which is filled to its last slot; not a power of two, for which tables come out smallest.
const RAM_BYTES: u64 = 600 << 20;
const DISK_BYTES: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(60);

/// Reads more than the RAM tier holds, so that every slot is in use and blocks have left, and lets all of it go to the SSD
/// tier.
pub(super) fn run(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let (disk, slab) = (bench.scratch.join("fill.raw"), bench.scratch.join("fill.ssd"));
    content::make(&disk, DISK_BYTES, &[(0, DISK_BYTES)])?;
    let (tier, _) = SsdTier::open(&slab, 2 * DISK_BYTES)?;
    let config = CacheConfig {
        ram_bytes: RAM_BYTES,
        huge_pages: HugePages::No,
        shards: 1,
        engine: EngineMode::Auto,
        policy: CoreConfig::with_slots(0),
    };
    let before = anonymous_bytes()?;
    let cache = Cache::new(config, Some(tier))?;
    let storage = cache.open(&StoreSpec::File(disk), StoreOptions { read_only: true, ..StoreOptions::default() })?;
    let id = storage.id();
    let read = storage.shard().call(move |_| async move {
        let disk = Disk::new(local(id).context("the store is closed")?, 0, Arc::new(DiskCounters::default()));
        for offset in (0..DISK_BYTES).step_by(BLOCK_BYTES) {
            let data = disk.read(offset, BLOCK_BYTES).await?;
            let mut right = true;
            data.copy_to(|at, bytes| right &= content::looks_right(bytes, offset + at as u64, 0, offset));
            ensure!(right, "a wrong block at {offset}");
        }
        Ok(())
    });
    read.wait()??;
    let filled = cache.occupancy();
    let slots = RAM_BYTES / BLOCK_BYTES as u64;
    ensure!(u64::from(filled.used_slots) == slots, "{} of {slots} slots are in use", filled.used_slots);
    let grown = anonymous_bytes()?.saturating_sub(before).saturating_sub(RAM_BYTES);
    cache.close(&storage, Closing { drain: LIMIT, parted: false });
    let ssd = cache.ssd_stats().context("no SSD tier")?;
    cache.shutdown();
    ensure!(ssd.used_slots >= slots, "{} blocks have reached the SSD tier, {slots} were to", ssd.used_slots);
    let each = |bytes: u64, blocks: u64| {
        #[allow(clippy::cast_precision_loss)] // shown with two digits
        let each = bytes as f64 / blocks as f64;
        each
    };
    let figure = |name: &str, value| Figure { name: name.to_owned(), value, unit: "bytes" };
    Ok(vec![
        figure(&format!("{FIGURE}, RAM tier"), each(filled.index_bytes, slots)),
        figure(&format!("{FIGURE}, SSD tier"), each(ssd.index_bytes, ssd.used_slots)),
        figure(
            "all else that a block of the RAM tier takes, buffers and threads of the process included",
            each(grown, slots),
        ),
    ])
}

/// Memory of this process that is no file's (`RssAnon` of proc(5)).
fn anonymous_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no RssAnon")? << 10)
}
