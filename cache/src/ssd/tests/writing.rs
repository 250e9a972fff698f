//! A guest's write and the store: the store is touched only when the slab has the mark, or is not believed any more.

use super::super::tier::Trust;
use super::super::{SsdOptions, SsdTier};
use crate::backend::StoreSpec;
use crate::counters::DiskCounters;
use crate::disk::{Disk, local};
use crate::engine::{AlignedBuf, EngineMode};
use crate::policy::CoreConfig;
use crate::types::{BlockIndex, PageMask};
use crate::{Cache, CacheConfig, Closing, arena::HugePages};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 1 << 20;

fn cache(folder: &Path) -> (Cache, SsdTier) {
    let options = SsdOptions { preallocate: false, ..SsdOptions::default() };
    let (tier, _) = SsdTier::open_with(&folder.join("slab"), 96 << 20, options).unwrap();
    let policy = CoreConfig::with_slots(0);
    let engine = EngineMode::Auto;
    let config = CacheConfig { ram_bytes: 4 << 20, huge_pages: HugePages::No, shards: 1, engine, policy };
    (Cache::new(config, Some(tier.clone())).unwrap(), tier)
}

#[test]
fn a_store_is_written_to_only_when_the_mark_is_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    std::fs::write(&path, vec![1; LEN]).unwrap();
    let (cache, tier) = cache(dir.path());
    let spec: StoreSpec = path.display().to_string().parse().unwrap();
    let store = cache.open(&spec, Default::default()).unwrap();
    let ssd = tier.storage(store.identity(), None).unwrap();
    // Only what is on record can come back.
    let insert = tier.begin_insert(ssd, BlockIndex(0), PageMask::ALL).unwrap();
    let sum = insert.checksum(&[1; 1 << 16]);
    assert!(tier.finish_insert(insert, sum, true));
    let mut checkpoint = tier.begin_checkpoint().unwrap();
    while checkpoint.step().unwrap() == super::super::Step::More {}
    drop(checkpoint);

    // Whoever writes the bitmap is kept from it.
    let held = tier.shared.intents_io.lock();
    let id = store.id();
    let write = store.shard().call(move |_| async move {
        let disk = Disk::new(local(id).unwrap(), 1, Arc::new(DiskCounters::default()));
        let mut data = AlignedBuf::new(4096);
        data.fill(2);
        disk.write(0, data).await.is_ok()
    });
    loop {
        let state = tier.shared.state.lock();
        let believed = state.trust == Trust::Ok;
        assert!(!believed || std::fs::read(&path).unwrap()[0] == 1, "the store was ahead of the mark");
        if !state.waiting.is_empty() || !believed {
            break;
        }
        drop(state);
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(held);
    assert!(write.wait().unwrap());
    assert_eq!(std::fs::read(&path).unwrap()[0], 2);
    tier.release_storage(ssd, None);
    cache.close(&store, Closing { drain: Duration::ZERO, parted: false });
    cache.shutdown();
}

#[test]
fn a_checkpoint_that_a_store_has_closed_under_takes_nothing_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let options = SsdOptions { preallocate: false, ..SsdOptions::default() };
        SsdTier::open_with(&dir.path().join("slab"), 8 << 20, options).unwrap().0
    };
    let tier = open();
    let ssd = tier.storage("file:/a", None).unwrap();
    let insert = tier.begin_insert(ssd, BlockIndex(0), PageMask::ALL).unwrap();
    assert!(tier.finish_insert(insert, 7, true));
    tier.begin_write(ssd, 16, 1).end();
    let mut checkpoint = tier.begin_checkpoint().unwrap();
    assert_eq!(checkpoint.unflushed(), [ssd]);
    // Flushed for its end; what the checkpoint asked came too late.
    tier.note_flushed(ssd);
    checkpoint.not_flushed(ssd);
    drop(checkpoint);
    tier.release_storage(ssd, None);
    tier.close_quickly().unwrap();
    drop(tier);
    let tier = open();
    let ssd = tier.storage("file:/a", None).unwrap();
    assert_eq!(tier.lookup(ssd, BlockIndex(0)), PageMask::ALL);
    // A write after it has to be flushed again.
    tier.note_flushed(ssd);
    tier.begin_write(ssd, 16, 1).end();
    let mut checkpoint = tier.begin_checkpoint().unwrap();
    checkpoint.not_flushed(ssd);
    drop(checkpoint);
    tier.close_quickly().unwrap();
    drop(tier);
    let tier = open();
    assert_eq!(tier.stats().used_slots, 0);
}
