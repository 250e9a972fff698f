//! A slab whose records are read while guests write: what is served is true and nothing that is true is lost, and a crash at
//! any point leaves a slab that says nothing wrong.

use super::rig::{BLOCKS, FIRST, MOST, Slab, history, open_slab, open_unread, served};
use super::sim::{Crash, Disk, Image, Op, Random, after_crash};
use crate::ssd::{Found, SsdError, SsdStorage, SsdTier};
use crate::types::{BlockIndex, PAGES_PER_BLOCK, PageMask, PageRange};

/// Slots in use when the slab was closed.
const USED: u64 = 200;

/// A block of which the slab has two pages.
const TWO_PAGES: u64 = 77;
/// A second store, of which it has a block.
const ANOTHER: &str = "file:/another";

/// A slab that was closed for a successor, and opened with no record read.
fn closed_and_opened() -> (Slab, Image) {
    let (mut slab, before) = history(false);
    slab.insert(0..TWO_PAGES);
    let write = slab.tier.begin_insert(slab.storage, BlockIndex(TWO_PAGES), PageMask(3)).unwrap();
    let sum = slab.fill(&write, TWO_PAGES);
    assert!(slab.tier.finish_insert(write, sum, true));
    slab.insert(TWO_PAGES..USED - 1);
    let another = slab.tier.storage(ANOTHER, None).unwrap();
    let write = slab.tier.begin_insert(another, BlockIndex(0), FIRST).unwrap();
    let sum = slab.fill(&write, 0);
    assert!(slab.tier.finish_insert(write, sum, true));
    slab.insert(USED - 1..USED);
    slab.checkpoint();
    slab.write([13, 14]);
    slab.insert(13..14);
    slab.tier.note_flushed(slab.storage);
    slab.tier.close_quickly().unwrap();
    let log = slab.disk.log();
    let image = after_crash(&before, &log, log.len(), Crash::Killed, &mut Random(1)).0;
    let disk = Disk::new(image.clone());
    let (tier, storage) = open_unread(&disk, false, MOST);
    (Slab { disk, tier, storage, versions: slab.versions }, image)
}

/// What a run finds after a kill.
fn crashed(slab: &Slab, image: &Image) -> (SsdTier, SsdStorage) {
    let log = slab.disk.log();
    open_slab(&Disk::new(after_crash(image, &log, log.len(), Crash::Killed, &mut Random(1)).0), false, MOST)
}

fn pages(slab: &Slab, block: u64) -> PageMask {
    slab.tier.lookup(slab.storage, BlockIndex(block))
}

#[test]
fn what_is_written_meanwhile_is_not_found_and_all_else_is() {
    let (mut slab, image) = closed_and_opened();
    assert!(slab.tier.is_loading());
    assert!((0..BLOCKS).all(|block| pages(&slab, block).is_empty()), "no record is read");
    assert!(
        slab.tier.begin_insert(slab.storage, BlockIndex(240), FIRST).is_none(),
        "it is not known which slots are free"
    );
    assert!(slab.tier.begin_checkpoint().is_none());
    // Before their records are read, and of others pages that the slab does not have.
    slab.write([3, 90, 198]);
    let beside = PageRange { first: 91 * PAGES_PER_BLOCK + 1, count: 15 + 3 * PAGES_PER_BLOCK };
    slab.tier.begin_write(slab.storage, beside.first, beside.count).end();
    assert!(slab.tier.shared.load_some(100));
    // Some of these are found now, others are not.
    slab.write([4, 89, 150]);
    assert!(slab.tier.is_loading());
    let report = slab.tier.load();
    assert!(!slab.tier.is_loading());
    assert_eq!((report.found, report.dropped_slots()), (Found::Clean, 0));
    let gone = [14, 3, 90, 92, 93, 94, 198, 4, 89, 150];
    let kept: Vec<_> = (0..BLOCKS).filter(|block| !pages(&slab, *block).is_empty()).collect();
    let wanted: Vec<_> = (0..USED).filter(|block| !gone.contains(block)).collect();
    assert_eq!(kept, wanted, "to the block: these were not written to");
    assert_eq!(report.kept_slots, wanted.len() as u64 + 1, "and the other store's");
    let versions = slab.versions.clone();
    assert_eq!(served(&slab.disk, &slab.tier, slab.storage, &versions, "loaded"), wanted.len());
    // And it goes on as any other.
    slab.insert(0..BLOCKS);
    assert_eq!(served(&slab.disk, &slab.tier, slab.storage, &versions, "filled"), BLOCKS as usize);
    slab.checkpoints(3);
    slab.tier.note_flushed(slab.storage);
    slab.tier.close().unwrap();
    let log = slab.disk.log();
    let disk = Disk::new(after_crash(&image, &log, log.len(), Crash::Killed, &mut Random(1)).0);
    let (tier, storage) = open_slab(&disk, false, MOST);
    assert_eq!(tier.stats().opened.found, Found::Clean);
    assert_eq!(served(&disk, &tier, storage, &versions, "the next run"), BLOCKS as usize);
}

#[test]
fn a_crash_at_any_point_of_it_leaves_nothing_stale() {
    let (mut slab, before) = closed_and_opened();
    let mut versions = slab.versions.clone();
    for round in 0..8 {
        slab.write([round * 25, round * 25 + 7, 199 - round]);
        slab.tier.shared.load_some(22);
    }
    assert!(slab.tier.is_loading());
    slab.tier.load();
    slab.insert(0..60);
    slab.checkpoints(2);
    slab.write([5, 130]);
    slab.checkpoints(2);
    let (log, mut random, mut kept) = (slab.disk.log(), Random(20_261_122), 0);
    for point in 0..=log.len() {
        if let Some(Op::Other(block)) = point.checked_sub(1).map(|last| &log[last]) {
            versions[*block as usize] += 1;
        }
        for crash in [Crash::Killed, Crash::PowerLoss] {
            let disk = Disk::new(after_crash(&before, &log, point, crash, &mut random).0);
            let (tier, storage) = open_slab(&disk, false, MOST);
            kept += served(&disk, &tier, storage, &versions, &format!("{crash:?} at {point} of {}", log.len()));
        }
    }
    // All is in one region: once it is marked, a crash loses the rest.
    assert!(kept > 100 * 10, "a recovery that keeps nothing is never stale either: {kept} of {}", log.len());
}

#[test]
fn what_is_dropped_meanwhile_does_not_come_back() {
    let (slab, _) = closed_and_opened();
    slab.tier.shared.load_some(50);
    slab.tier.drop_storage(slab.storage);
    slab.tier.load();
    assert_eq!(slab.tier.usage(), [(ANOTHER.to_owned(), 1)]);

    let (slab, _) = closed_and_opened();
    slab.tier.shared.load_some(50);
    slab.tier.drop_all();
    slab.tier.load();
    assert_eq!((slab.tier.stats().used_slots, slab.tier.usage()), (0, Vec::new()));

    // Taken away under guests: nobody reads on.
    let (slab, image) = closed_and_opened();
    slab.tier.shared.load_some(50);
    slab.tier.abandon().unwrap();
    slab.tier.load();
    assert!(!slab.tier.is_loading());
    let log = slab.disk.log();
    let disk = Disk::new(after_crash(&image, &log, log.len(), Crash::Killed, &mut Random(1)).0);
    let (tier, _) = open_slab(&disk, false, MOST);
    assert_eq!((tier.stats().opened.found, tier.stats().used_slots), (Found::Unclean, 0));
}

#[test]
fn nobody_waits_for_it_and_nothing_is_lost_or_said_that_is_not_known() {
    // One was written to and not inserted again; one is another store's.
    let all = USED - 1 + 1;
    let left = |written: &[u64]| {
        let (mut slab, image) = closed_and_opened();
        slab.tier.shared.load_some(30);
        slab.write(written.iter().copied());
        slab.tier.close_quickly().unwrap();
        assert!(slab.tier.is_loading(), "nobody has read on");
        let (tier, _) = crashed(&slab, &image);
        let stats = tier.stats();
        (stats.opened.found, stats.used_slots)
    };
    assert_eq!(left(&[]), (Found::Recovered, all));
    assert_eq!(left(&[3]), (Found::Recovered, 1), "all of the store is in one region");

    // A write after the end, when nothing is marked any more.
    let (mut slab, image) = closed_and_opened();
    slab.tier.close().unwrap();
    slab.write([3]);
    let (tier, _) = crashed(&slab, &image);
    assert_eq!((tier.stats().opened.found, tier.stats().used_slots), (Found::Unclean, 0));

    // One whose mark was not on the disk at the end, of a device that fails.
    let (slab, image) = closed_and_opened();
    let write = slab.tier.begin_write(slab.storage, 0, 1);
    assert!(write.must_wait());
    slab.tier.close().unwrap();
    let (tier, storage) = crashed(&slab, &image);
    assert!(tier.lookup(storage, BlockIndex(0)).is_empty(), "the write may have gone to the store");

    let (slab, _) = closed_and_opened();
    assert!(matches!(slab.tier.begin_resize(1 << 30), Err(SsdError::StillReading { .. })));

    // Forgetting one storage writes the table, in which the other must be.
    let (slab, image) = closed_and_opened();
    let other = slab.tier.storage(ANOTHER, None).unwrap();
    slab.tier.forget(other);
    let (tier, _) = crashed(&slab, &image);
    assert_eq!((tier.stats().opened.found, tier.stats().used_slots), (Found::Recovered, all - 1));
}

/// A checkpoint clears the regions of what was written while records were read: by then the records must say so too.
#[test]
fn a_record_that_lost_pages_is_written_anew_before_its_region_is_cleared() {
    let (mut slab, image) = closed_and_opened();
    let page = TWO_PAGES * PAGES_PER_BLOCK + 1;
    let mut write = slab.tier.begin_write(slab.storage, page, 1);
    while slab.tier.write_intents() {}
    write.submit();
    write.end();
    slab.tier.load();
    assert_eq!(pages(&slab, TWO_PAGES), FIRST);
    assert!(slab.checkpoints(3) > 0, "else nothing could be stale");
    let (tier, storage) = crashed(&slab, &image);
    assert_eq!(tier.lookup(storage, BlockIndex(TWO_PAGES)), FIRST);
}

/// Checkpoints have numbers, and records name theirs. Those of a slab that crashed are ahead of what its superblock says.
#[test]
fn records_of_many_checkpoints_before_a_crash_count_after_the_next_orderly_end() {
    let (mut slab, image) = closed_and_opened();
    slab.tier.load();
    for block in 0..20 {
        slab.write([block]);
        slab.insert(block..block + 1);
        slab.checkpoints(2);
    }
    let log = slab.disk.log();
    let disk = Disk::new(after_crash(&image, &log, log.len(), Crash::Killed, &mut Random(1)).0);
    let (tier, storage) = open_unread(&disk, false, MOST);
    tier.load();
    let found = tier.stats();
    assert_eq!(found.opened.found, Found::Recovered);
    tier.note_flushed(storage);
    tier.close_quickly().unwrap();
    let last = disk.log();
    let start = after_crash(&image, &log, log.len(), Crash::Killed, &mut Random(1)).0;
    let disk = Disk::new(after_crash(&start, &last, last.len(), Crash::Killed, &mut Random(1)).0);
    let (tier, _) = open_slab(&disk, false, MOST);
    assert_eq!((tier.stats().opened.found, tier.stats().used_slots), (Found::Clean, found.used_slots));
    assert!(found.used_slots > 150, "{}", found.used_slots);
}

/// A store that changed while nobody looked, found out when some of its records are read and others are not.
#[test]
fn records_of_a_store_that_has_changed_do_not_count_when_they_are_read_later() {
    for read in [0, 50] {
        let (Slab { tier, storage, .. }, _) = closed_and_opened();
        tier.release_storage(storage, None);
        tier.shared.load_some(read);
        let stamp = crate::ssd::Stamp { size_bytes: 1, ..crate::ssd::Stamp::default() };
        let storage = tier.storage("file:/store", Some(stamp)).unwrap();
        tier.load();
        let lost = (0..BLOCKS).all(|block| tier.lookup(storage, BlockIndex(block)).is_empty());
        assert!(lost, "{read} were read");
    }
}
