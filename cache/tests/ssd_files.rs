//! The SSD tier on real files: what it keeps, what it drops, what it serves.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod ssd_common;

use prestage_cache::ssd::{Clock, Found, Outcome, SsdError, SsdOptions, SsdState, SsdTier, Step, run_without};
use prestage_cache::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PageMask};
use proptest::prelude::*;
use ssd_common::*;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[test]
fn a_clean_restart_keeps_exactly_the_valid_pages() {
    let place = Place::new();
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(8)).unwrap();
    assert_eq!((report.found, report.slots, report.preallocated), (Found::Created, 8, true));
    assert!(std::fs::metadata(&place.path).unwrap().blocks() * 512 >= slab_bytes(8));
    assert_eq!(std::fs::metadata(&place.path).unwrap().mode() & 0o777, 0o600, "it holds what guests read");
    let a = tier.storage("file:/a", stamp(1)).unwrap();
    let b = tier.storage("nbd:unix:/b:export", None).unwrap();
    insert(&tier, a, 0, PageMask::ALL);
    insert(&tier, a, 1 << 40, PageMask(0b1001));
    insert(&tier, b, 0, PageMask::ALL);
    insert(&tier, b, 7, PageMask(0b10));
    overwrite(&tier, a, 3, 2);
    overwrite(&tier, b, 7 * 16, 16);
    insert(&tier, a, 9, PageMask(1));
    insert(&tier, a, 9, PageMask(0b11));
    let cut = tier.begin_insert(a, BlockIndex(5), PageMask::ALL).unwrap();
    tier.close().unwrap();
    assert_eq!(tier.stats().state, SsdState::Closed);
    assert!(!tier.finish_insert(cut, 0, true), "too late to be on record");
    drop(tier);

    let (tier, report) = SsdTier::open(&place.path, slab_bytes(8)).unwrap();
    assert_eq!((report.found, report.kept_slots, report.kept_pages), (Found::Clean, 4, 14 + 2 + 16 + 2));
    assert_eq!((report.damaged_records, report.resized_from_slots, report.slots_beyond_end), (0, None, 0));
    let b = tier.storage("nbd:unix:/b:export", None).unwrap();
    let a = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!(read(&tier, a, 0), PageMask::ALL.minus(PageMask::run(3, 2)));
    assert_eq!(read(&tier, a, 1 << 40), PageMask(0b1001));
    assert_eq!(read(&tier, a, 9), PageMask(0b11));
    assert_eq!(read(&tier, b, 0), PageMask::ALL);
    assert_eq!(read(&tier, b, 7), PageMask::NONE);
    assert_eq!(read(&tier, a, 5), PageMask::NONE);
    assert_eq!(tier.stats().bad_checksums, 0);
}

#[test]
fn an_empty_file_that_others_may_read_becomes_a_tier_that_they_may_not() {
    let place = Place::new();
    let mode = || std::fs::metadata(&place.path).unwrap().mode() & 0o777;
    std::fs::write(&place.path, "").unwrap();
    std::fs::set_permissions(&place.path, std::fs::Permissions::from_mode(0o644)).unwrap();
    drop(SsdTier::open(&place.path, slab_bytes(8)).unwrap());
    assert_eq!(mode(), 0o600);
    // Of one that holds something already it was somebody's choice.
    std::fs::set_permissions(&place.path, std::fs::Permissions::from_mode(0o640)).unwrap();
    drop(SsdTier::open(&place.path, slab_bytes(8)).unwrap());
    assert_eq!(mode(), 0o640);
}

#[test]
fn after_a_crash_the_tier_has_what_its_last_checkpoint_vouches_for() {
    let place = Place::filled();
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots), (Found::Clean, 10));
    drop(tier);
    // Nothing was written: all of it is true.
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots), (Found::Recovered, 10));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    insert(&tier, s, 3000, PageMask::ALL);
    insert(&tier, s, 3001, PageMask::ALL);
    checkpoint(&tier);
    insert(&tier, s, 3002, PageMask::ALL);
    drop(tier);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots, report.dropped_slots()), (Found::Recovered, 12, 0));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!((read(&tier, s, 3001), read(&tier, s, 3002)), (PageMask::ALL, PageMask::NONE));
    // A write takes its region of 64 MiB along, and nothing else.
    overwrite(&tier, s, 3001 * 16, 1);
    assert_eq!(tier.stats().marked_regions, 1);
    drop(tier);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.kept_slots, report.marked_slots, report.dropped_slots()), (10, 2, 2));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    (0..10).for_each(|block| assert_eq!(read(&tier, s, block), PageMask(1 << block | 0x8000)));
    assert_eq!((read(&tier, s, 3000), read(&tier, s, 3001)), (PageMask::NONE, PageMask::NONE));
    // Until a checkpoint has the store flushed and the records rewritten.
    overwrite(&tier, s, 3001 * 16, 1);
    insert(&tier, s, 3000, PageMask::ALL);
    assert_eq!((checkpoint(&tier), tier.stats().marked_regions), (1, 0));
    drop(tier);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.kept_slots, report.dropped_slots()), (11, 0));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!((read(&tier, s, 3000), read(&tier, s, 3001)), (PageMask::ALL, PageMask::NONE));
}

#[test]
fn a_write_goes_on_without_a_slab_that_takes_no_marks_and_a_crash_then_finds_nothing() {
    let place = Place::new();
    let options = || SsdOptions { veto: Some(place.dir.path().join("veto")), ..sparse() };
    let (tier, _) = SsdTier::open_with(&place.path, slab_bytes(80), options()).unwrap();
    let s = tier.storage("file:/a", None).unwrap();
    (0..10).for_each(|block| insert(&tier, s, block, PageMask::ALL));
    checkpoint(&tier);
    let write = tier.begin_write(s, 0, 1);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(write.must_wait() && write.poll_ready(&mut context).is_pending());
    tier.distrust("it hangs");
    while write.poll_ready(&mut context).is_pending() {
        std::thread::sleep(Duration::from_millis(1));
    }
    write.end();
    assert!(tier.lookup(s, BlockIndex(5)).is_empty(), "bypassed");
    assert!(matches!(tier.stats().state, SsdState::Degraded { .. }));
    let write = tier.begin_write(s, 5000, 1);
    assert!(write.poll_ready(&mut context).is_ready(), "and nobody waits for it any more");
    write.end();
    drop(tier);
    let (tier, report) = SsdTier::open_with(&place.path, slab_bytes(80), options()).unwrap();
    assert_eq!((report.found, report.kept_slots), (Found::Vetoed, 0));
    drop(tier);
    // Its successor is another slab, against which nothing stands.
    let (_, report) = SsdTier::open_with(&place.path, slab_bytes(80), options()).unwrap();
    assert_eq!(report.found, Found::Recovered);
}

#[test]
fn a_slab_that_was_given_up_comes_back_empty_when_its_device_does() {
    let place = Place::new();
    let veto = place.dir.path().join("veto");
    let seconds = Arc::new(AtomicU64::new(0));
    let now = seconds.clone();
    let clock: Clock = Arc::new(move || Duration::from_secs(now.load(Ordering::Relaxed)));
    let options = || SsdOptions { veto: Some(veto.clone()), clock: clock.clone(), ..sparse() };
    let (tier, _) = SsdTier::open_with(&place.path, slab_bytes(80), options()).unwrap();
    let s = tier.storage("file:/a", None).unwrap();
    (0..10).for_each(|block| insert(&tier, s, block, PageMask::ALL));
    checkpoint(&tier);
    tier.distrust("it hangs");
    while !veto.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    tier.begin_write(s, 16 * 3, 1).end();
    assert!(!tier.try_again(), "not yet");
    seconds.store(10, Ordering::Relaxed);
    while !tier.try_again() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!veto.exists());
    assert_eq!((tier.stats().state, tier.stats().used_slots), (SsdState::Ok, 0));
    insert(&tier, s, 3, PageMask::ALL);
    insert(&tier, s, 4000, PageMask::ALL);
    // The write of before is marked still: nobody has flushed its store.
    let mut checkpoint = tier.begin_checkpoint().unwrap();
    checkpoint.unflushed().into_iter().for_each(|s| checkpoint.not_flushed(s));
    while checkpoint.step().unwrap() == Step::More {}
    drop(checkpoint);
    drop(tier);
    let (tier, report) = SsdTier::open_with(&place.path, slab_bytes(80), options()).unwrap();
    assert_eq!((report.found, report.kept_slots, report.marked_slots), (Found::Recovered, 1, 1));
    let s = tier.storage("file:/a", None).unwrap();
    assert_eq!(read(&tier, s, 4000), PageMask::ALL);
}

#[test]
fn after_a_crash_our_own_writes_are_told_from_others() {
    let place = Place::new();
    let own = place.dir.path().join("own");
    let options = || SsdOptions { own_writes: Some(own.clone()), ..sparse() };
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i64;
    let at = |ns: i64| stamp(ns).map(|stamp| prestage_cache::ssd::Stamp { ctime_ns: ns, ..stamp });
    let open = || SsdTier::open_with(&place.path, slab_bytes(80), options()).unwrap().0;
    let tier = open();
    let s = tier.storage("file:/a", at(now())).unwrap();
    (0..10).for_each(|block| insert(&tier, s, block, PageMask::ALL));
    checkpoint(&tier);
    overwrite(&tier, s, 5000 * 16, 1);
    let written = now();
    overwrite(&tier, s, 5000 * 16, 1);
    drop(tier);
    let tier = open();
    let s = tier.storage("file:/a", at(written)).unwrap();
    assert_eq!(read(&tier, s, 0), PageMask::ALL, "the change was ours");
    checkpoint(&tier);
    drop(tier);
    let tier = open();
    let s = tier.storage("file:/a", at(written)).unwrap();
    assert_eq!(read(&tier, s, 0), PageMask::ALL);
    overwrite(&tier, s, 5000 * 16, 1);
    drop(tier);
    let tier = open();
    let s = tier.storage("file:/a", at(now())).unwrap();
    assert_eq!((read(&tier, s, 0), tier.stats().dropped_changed_store), (PageMask::NONE, 10), "somebody came after us");
    // And what was dropped does not come back with the stamp that is on record now.
    let seen = at(now());
    let b = tier.storage("file:/b", None).unwrap();
    insert(&tier, b, 0, PageMask::ALL);
    tier.set_stamp(s, seen);
    drop(tier);
    let tier = open();
    let s = tier.storage("file:/a", seen).unwrap();
    assert_eq!(read(&tier, s, 0), PageMask::NONE);
}

/// What a run without this slab writes to an NBD store or a block device shows nowhere.
#[test]
fn what_a_slab_has_of_stores_that_show_no_changes_counts_only_if_the_last_run_had_it() {
    let place = Place::new();
    let other = Place::new();
    let lineage = place.dir.path().join("last");
    let open = |place: &Place| {
        let options = SsdOptions { lineage: Some(lineage.clone()), ..sparse() };
        SsdTier::open_with(&place.path, slab_bytes(80), options).unwrap()
    };
    let fill = |tier: &SsdTier| {
        for (name, stamp) in [("nbd://host/export", None), ("file:/a", stamp(1))] {
            let s = tier.storage(name, stamp).unwrap();
            (0..4)
                .filter(|block| read(tier, s, *block).is_empty())
                .for_each(|block| insert(tier, s, block, PageMask::ALL));
        }
        checkpoint(tier);
    };
    let expect = |tier: &SsdTier, nbd: PageMask| {
        let n = tier.storage("nbd://host/export", None).unwrap();
        let f = tier.storage("file:/a", stamp(1)).unwrap();
        (0..4).for_each(|block| assert_eq!((read(tier, n, block), read(tier, f, block)), (nbd, PageMask::ALL)));
    };
    fill(&open(&place).0);
    for clean in [true, false] {
        // With this one all the time, after a clean end and after a crash.
        let (tier, report) = open(&place);
        assert_eq!((report.kept_slots, report.dropped_slots()), (8, 0));
        expect(&tier, PageMask::ALL);
        if clean {
            tier.close().unwrap();
        }
        drop(tier);
    }
    let before = place.dir.path().join("before");
    let missed: [&dyn Fn(); 3] = [&|| run_without(&lineage).unwrap(), &|| drop(open(&other)), &|| {
        std::fs::copy(&place.path, &before).unwrap();
        let (tier, _) = open(&place);
        tier.close().unwrap();
        drop(tier);
        std::fs::copy(&before, &place.path).unwrap();
    }];
    for (i, miss) in missed.iter().enumerate() {
        for clean in [true, false] {
            let (tier, _) = open(&place);
            fill(&tier);
            if clean {
                tier.close().unwrap();
            }
            drop(tier);
            miss();
            let (tier, report) = open(&place);
            assert_eq!((report.kept_slots, report.unvouched_slots), (4, 4), "case {i}, clean: {clean}");
            drop(tier);
            // Cut off before its first checkpoint: what was dropped stays so.
            let (tier, report) = open(&place);
            assert_eq!((report.kept_slots, report.unvouched_slots), (4, 0), "case {i}, clean: {clean}");
            expect(&tier, PageMask::NONE);
        }
    }
}

#[test]
fn a_store_that_is_given_away_is_forgotten_for_good() {
    let place = Place::filled();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    tier.forget(s);
    tier.release_storage(s, stamp(1));
    drop(tier);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots), (Found::Recovered, 0));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!(read(&tier, s, 0), PageMask::NONE);
}

#[test]
fn a_store_that_changed_unwatched_loses_its_slots_and_only_those() {
    let place = Place::filled();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let b = tier.storage("file:/b", None).unwrap();
    insert(&tier, b, 0, PageMask::ALL);
    // A changed mtime, and a store that has lost its stamp.
    for other in [stamp(2), None] {
        let a = tier.storage("file:/a", other).unwrap();
        assert!(tier.lookup(a, BlockIndex(0)).is_empty());
        insert(&tier, a, 0, PageMask::ALL);
        assert_eq!(tier.storage("file:/a", stamp(9)).unwrap(), a, "while it is in use its stamp may move");
        assert_eq!(read(&tier, a, 0), PageMask::ALL);
        tier.release_storage(a, stamp(9));
        tier.release_storage(a, other);
    }
    assert_eq!(tier.stats().dropped_changed_store, 10 + 1);
    assert_eq!(read(&tier, b, 0), PageMask::ALL);
    let a = tier.storage("file:/a", None).unwrap();
    assert_eq!(read(&tier, a, 0), PageMask::ALL, "None is as it was");
    tier.set_stamp(a, stamp(3));
    tier.close().unwrap();
    drop(tier);
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let a = tier.storage("file:/a", stamp(3)).unwrap();
    assert_eq!(read(&tier, a, 0), PageMask::ALL);
    // A second user vouches for nothing: who changed it, a guest or somebody else, is not known.
    assert_eq!(tier.storage("file:/a", stamp(4)).unwrap(), a);
    tier.close().unwrap();
    drop(tier);
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let a = tier.storage("file:/a", stamp(4)).unwrap();
    assert_eq!(read(&tier, a, 0), PageMask::NONE);
}

#[test]
fn either_superblock_alone_is_enough_and_without_both_the_slab_is_made_anew() {
    for damaged in [&SUPERBLOCKS[..1], &SUPERBLOCKS[1..], &SUPERBLOCKS[..]] {
        for at in [3, 17, 25, 70, 4000] {
            let place = Place::filled();
            damaged.iter().for_each(|copy| place.poke(copy + at, |b| b ^ 0x20));
            let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
            if damaged.len() == 2 {
                assert_eq!((report.found, report.kept_slots), (Found::Damaged, 0), "at {at}");
                continue;
            }
            assert_eq!((report.found, report.kept_slots), (Found::Clean, 10), "at {at}");
            let s = tier.storage("file:/a", stamp(1)).unwrap();
            (0..10).for_each(|block| assert_eq!(read(&tier, s, block), PageMask(1 << block | 0x8000)));
        }
    }
}

#[test]
fn a_damaged_record_loses_its_slot_and_a_damaged_entry_its_storage() {
    let place = Place::filled();
    place.poke(META + 3 * 64 + 9, |b| b ^ 1);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots, report.damaged_records), (Found::Clean, 9, 1));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!((read(&tier, s, 3), read(&tier, s, 4)), (PageMask::NONE, PageMask(0x8010)));
    tier.close().unwrap();
    drop(tier);
    place.poke(TABLE + 70, |b| b ^ 1);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots, report.damaged_records), (Found::Clean, 0, 1 + 9));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!(read(&tier, s, 4), PageMask::NONE);
}

#[test]
fn data_that_rotted_is_never_served_and_its_slot_dropped() {
    let place = Place::filled();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    let at = tier.begin_read(s, BlockIndex(2)).unwrap().offset() + 2 * PAGE_BYTES as u64 + 100;
    place.poke(at, |b| b ^ 1);
    assert_eq!(read(&tier, s, 2), PageMask::NONE);
    assert!(tier.begin_read(s, BlockIndex(2)).is_none());
    assert_eq!((tier.stats().bad_checksums, tier.stats().used_slots), (1, 9));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever bytes of the metadata are hit: no panic, no page that was not there, and no page served with wrong
    /// data.
    #[test]
    fn a_corrupted_slab_opens_or_is_refused_and_serves_nothing_wrong(
        hits in prop::collection::vec((0..7usize, 0..1024u64, any::<u8>()), 1..12),
        size in prop_oneof![2 => Just(None), 1 => (0..slab_bytes(80)).prop_map(Some)],
    ) {
        let place = corpus();
        let region = [0, 64 << 10, TABLE, META, META, DATA, 4096];
        hits.iter().for_each(|(r, at, value)| place.poke(region[*r] + at, |_| *value));
        if let Some(size) = size {
            OpenOptions::new().write(true).open(&place.path).unwrap().set_len(size).unwrap();
        }
        if let Ok((tier, _)) = SsdTier::open_with(&place.path, slab_bytes(80), sparse()) {
            let s = tier.storage("file:/a", stamp(1)).unwrap();
            for block in 0..10 {
                prop_assert!(PageMask(1 << block | 0x8000).contains(read(&tier, s, block)));
            }
            insert(&tier, s, 50, PageMask::ALL);
            tier.close().unwrap();
            drop(tier);
            let (tier, _) = SsdTier::open_with(&place.path, slab_bytes(80), sparse()).unwrap();
            let s = tier.storage("file:/a", stamp(1)).unwrap();
            prop_assert_eq!(read(&tier, s, 50), PageMask::ALL);
        }
    }
}

/// A copy of a filled slab, in memory where there is a place for it.
fn corpus() -> Place {
    use std::sync::OnceLock;
    static FILLED: OnceLock<Vec<u8>> = OnceLock::new();
    let bytes = FILLED.get_or_init(|| std::fs::read(&Place::filled().path).unwrap());
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = dir.path().join("slab");
    std::fs::write(&path, bytes).unwrap();
    Place { dir, path }
}

#[test]
fn a_slab_cut_short_keeps_what_is_whole() {
    let place = Place::filled();
    let file = OpenOptions::new().write(true).open(&place.path).unwrap();
    file.set_len(slab_bytes(4) + 1000).unwrap();
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    assert_eq!((report.found, report.kept_slots, report.slots_beyond_end), (Found::Clean, 4, 6));
    assert_eq!(std::fs::metadata(&place.path).unwrap().len(), slab_bytes(80));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    (0..4).for_each(|block| assert_eq!(read(&tier, s, block), PageMask(1 << block | 0x8000)));
}

#[test]
fn a_slab_grows_and_shrinks_in_place() {
    let place = Place::filled();
    // Across the border of a group of 4096 slots.
    let grown = DATA + 4096 * BLOCK_BYTES as u64 + (256 << 10) + 10 * BLOCK_BYTES as u64;
    let (tier, report) = SsdTier::open_with(&place.path, grown, sparse()).unwrap();
    assert_eq!((report.slots, report.resized_from_slots, report.kept_slots), (4106, Some(80), 10));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    (10..4106).for_each(|block| {
        let write = tier.begin_insert(s, BlockIndex(block), PageMask(1)).unwrap();
        assert!(tier.finish_insert(write, 0, true));
    });
    assert_eq!((tier.stats().evictions, tier.stats().used_slots), (0, 4106));
    tier.close().unwrap();
    drop(tier);
    let (tier, report) = SsdTier::open_with(&place.path, grown, sparse()).unwrap();
    assert_eq!((report.resized_from_slots, report.kept_slots), (None, 4106));
    tier.close().unwrap();
    drop(tier);
    let (tier, report) = SsdTier::open(&place.path, slab_bytes(5)).unwrap();
    assert_eq!((report.resized_from_slots, report.kept_slots, report.slots_beyond_end), (Some(4106), 5, 4101));
    assert_eq!(std::fs::metadata(&place.path).unwrap().len(), slab_bytes(5));
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    (0..5).for_each(|block| assert_eq!(read(&tier, s, block), PageMask(1 << block | 0x8000)));
}

#[test]
fn an_identity_is_one_to_448_bytes_and_the_table_turns_over() {
    let place = Place::new();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(8)).unwrap();
    for len in [0, 449] {
        let error = tier.storage(&"x".repeat(len), None).unwrap_err();
        assert!(matches!(error, SsdError::IdentityLength { .. }), "{error}");
    }
    let handles: Vec<_> = (0..4096).map(|i| tier.storage(&format!("{i:0448}"), None).unwrap()).collect();
    let error = tier.storage("one more", None).unwrap_err();
    assert!(matches!(error, SsdError::TooManyStorages { .. }), "{error}");
    insert(&tier, handles[7], 1, PageMask::ALL);
    insert(&tier, handles[8], 1, PageMask::ALL);
    let pending = tier.begin_insert(handles[7], BlockIndex(2), PageMask::ALL).unwrap();
    tier.release_storage(handles[7], None);
    assert_eq!(tier.storage(&format!("{:0448}", 7), None).unwrap(), handles[7], "known until its place is needed");
    tier.release_storage(handles[7], None);
    let new = tier.storage("one more", None).unwrap();
    assert!(!tier.finish_insert(pending, 0, true), "of the storage before");
    for s in [new, handles[7]] {
        assert!(tier.lookup(s, BlockIndex(1)).is_empty(), "nothing of the storage before, and nothing for its handle");
    }
    assert!(tier.begin_insert(handles[7], BlockIndex(1), PageMask::ALL).is_none());
    tier.close().unwrap();
    drop(tier);
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(8)).unwrap();
    let s = tier.storage(&format!("{:0448}", 8), None).unwrap();
    assert_eq!(read(&tier, s, 1), PageMask::ALL);
    assert!(tier.storage("one more", None).is_ok(), "storages without slots do not fill the table for ever");
}

#[test]
fn a_write_after_closing_is_not_forgotten() {
    let place = Place::filled();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    tier.close().unwrap();
    overwrite(&tier, s, 100 * 16, 16);
    let clean = place.dir.path().join("clean");
    std::fs::copy(&place.path, &clean).unwrap();
    assert_eq!(SsdTier::open(&clean, slab_bytes(80)).unwrap().1.kept_slots, 10, "nothing of it was here");
    overwrite(&tier, s, 0, 1);
    let crashed = place.dir.path().join("crashed");
    std::fs::copy(&place.path, &crashed).unwrap();
    assert_eq!(SsdTier::open(&crashed, slab_bytes(80)).unwrap().1.found, Found::Unclean);
    tier.close().unwrap();
    drop(tier);
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(80)).unwrap();
    let s = tier.storage("file:/a", stamp(1)).unwrap();
    assert_eq!((read(&tier, s, 0), read(&tier, s, 1)), (PageMask(0x8000), PageMask(0x8002)));
}

#[test]
fn a_failing_device_is_bypassed_for_a_while_but_invalidation_goes_on() {
    let place = Place::new();
    let seconds = Arc::new(AtomicU64::new(0));
    let now = seconds.clone();
    let clock: Clock = Arc::new(move || Duration::from_secs(now.load(Ordering::Relaxed)));
    let options = SsdOptions { clock, ..SsdOptions::default() };
    let (tier, _) = SsdTier::open_with(&place.path, slab_bytes(20), options).unwrap();
    let s = tier.storage("file:/a", None).unwrap();
    (0..10).for_each(|block| insert(&tier, s, block, PageMask::ALL));
    for block in 0..5 {
        assert_eq!(tier.stats().state, SsdState::Ok);
        let read = tier.begin_read(s, BlockIndex(block)).unwrap();
        assert_eq!(tier.end_read(read, Outcome::IoError), PageMask::NONE);
    }
    let stats = tier.stats();
    assert!(matches!(stats.state, SsdState::Degraded { .. }), "{:?}", stats.state);
    assert_eq!((stats.io_errors, stats.retired_slots, stats.used_slots), (5, 5, 5));
    assert!(tier.lookup(s, BlockIndex(7)).is_empty());
    assert!(tier.begin_read(s, BlockIndex(7)).is_none());
    assert!(tier.begin_insert(s, BlockIndex(70), PageMask::ALL).is_none());
    overwrite(&tier, s, 7 * 16, 1);

    seconds.store(5, Ordering::Relaxed);
    assert_eq!(tier.lookup(s, BlockIndex(7)), PageMask::ALL.minus(PageMask(1)));
    assert!(matches!(tier.stats().state, SsdState::Retrying { .. }));
    assert_eq!(read(&tier, s, 7), PageMask::ALL.minus(PageMask(1)));
    assert_eq!(tier.stats().state, SsdState::Ok);
    assert!(matches!(tier.begin_insert(s, BlockIndex(70), PageMask::ALL), Some(write) if write.slot() >= 10));
}

/// Short ranges go block by block, long ones slot by slot, both in steps: the same pages go either way.
#[test]
fn a_discard_of_any_length_takes_exactly_its_pages() {
    let place = Place::new();
    let (tier, _) = SsdTier::open_with(&place.path, slab_bytes(5100) + (256 << 10), sparse()).unwrap();
    let [a, b] = ["file:/a", "file:/b"].map(|name| tier.storage(name, None).unwrap());
    let fill = |s, blocks: std::ops::Range<u64>| {
        for block in blocks {
            if let Some(write) = tier.begin_insert(s, BlockIndex(block), PageMask::ALL) {
                assert!(tier.finish_insert(write, 0, true));
            }
        }
    };
    fill(b, 0..100);
    // Blocks and slots in different orders.
    (0..7).for_each(|i| (0..700).for_each(|j| fill(a, j * 7 + i..j * 7 + i + 1)));
    assert_eq!((tier.stats().used_slots, tier.stats().evictions), (5000, 0));
    for (first, pages) in [(5, 16 * 2500), (7, 0), (16 * 10 + 3, 4), (16 * 2100 + 3, 1 << 40), (16 * 300 + 1, u64::MAX)]
    {
        fill(a, 0..4900);
        overwrite(&tier, a, first, pages);
        for block in 0..4900u64 {
            let gone = (0..16).filter(|p| (first..first.saturating_add(pages)).contains(&(block * 16 + p)));
            let gone = gone.fold(PageMask::NONE, |mask, p| mask | PageMask::run(p, 1));
            assert_eq!(tier.lookup(a, BlockIndex(block)), PageMask::ALL.minus(gone), "{block} after {first}, {pages}");
        }
    }
    assert_eq!(tier.stats().evictions, 0);
    fill(a, 0..4900);
    tier.drop_storage(a);
    assert!((0..4900).all(|block| tier.lookup(a, BlockIndex(block)).is_empty()));
    assert!((0..100).all(|block| tier.lookup(b, BlockIndex(block)) == PageMask::ALL));
    assert_eq!(tier.stats().used_slots, 100);
}

/// Storages have a thread each, and the tier is shared: whatever the interleaving, nobody reads another's data or old
/// data.
#[test]
fn threads_with_a_storage_each_never_see_wrong_data() {
    let place = Place::new();
    let (tier, _) = SsdTier::open(&place.path, slab_bytes(24)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let tier = tier.clone();
            scope.spawn(move || {
                let s = tier.storage(&format!("file:/{thread}"), None).unwrap();
                let mut random = thread + 1;
                let mut versions = [0u32; 12];
                for _ in 0..20_000 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let block = (random >> 33) % 12;
                    let version = thread as u32 * 1_000_000 + versions[block as usize];
                    match (random >> 50) % 4 {
                        0 => {
                            overwrite(&tier, s, block * 16, 16);
                            assert!(tier.lookup(s, BlockIndex(block)).is_empty());
                            versions[block as usize] += 1;
                        }
                        1 => {
                            if let Some(write) = tier.begin_insert(s, BlockIndex(block), PageMask::ALL) {
                                assert!(tier.finish_insert(write, version, true));
                            }
                        }
                        _ => {
                            if let Some(read) = tier.begin_read(s, BlockIndex(block)) {
                                assert_eq!(read.checksum(), version);
                                assert_eq!(tier.end_read(read, Outcome::Good), PageMask::ALL);
                            }
                        }
                    }
                }
            });
        }
    });
    assert!(tier.stats().evictions > 0, "48 blocks in 24 slots");
}
