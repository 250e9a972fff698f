//! A slab that shrinks and grows by more than a sector of records, under writes, and is cut off at every single point of it.
//!
//! The random worlds of `crashes` have slabs of a few slots, whose records are all in one sector; here they are not.

use super::rig::{BLOCKS, FIRST, MOST, history, open_slab, served};
use super::sim::{Crash, Disk, Image, Op, Random, Simulated, after_crash};
use crate::ssd::index::{Index, Key};
use crate::ssd::slots::Beyond;
use crate::ssd::{Outcome, ResizeStep, format};
use crate::types::BlockIndex;

#[test]
fn a_slab_that_shrank_and_grew_is_never_stale_wherever_it_is_cut_off() {
    for is_block_device in [false, true] {
        let (mut slab, before) = history(is_block_device);
        let versions = slab.versions.clone();
        slab.insert(0..200);
        slab.checkpoint();
        slab.resize(70);
        assert_eq!(served(&slab.disk, &slab.tier, slab.storage, &versions, "after a shrink"), 70);
        // Of what was dropped, of what stays.
        slab.write([90, 20, 100, 150, 190]);
        assert!(slab.checkpoints(3) > 0, "else nothing could be stale");
        if !is_block_device {
            assert_eq!(slab.disk.len(), format::slab_bytes(70), "nothing is written beyond the end");
        }
        slab.resize(MOST);
        slab.write([91, 21, 151]);
        slab.checkpoints(3);
        slab.insert(70..100);
        slab.write([92, 75, 191]);
        slab.checkpoints(3);
        slab.resize(3);
        slab.write([1, 80, 152]);
        slab.checkpoints(3);
        slab.resize(100);
        slab.insert(0..95);
        slab.checkpoints(2);
        let versions = slab.versions.clone();
        assert!(served(&slab.disk, &slab.tier, slab.storage, &versions, "at the end") > 90);

        let (log, mut random, mut kept) = (slab.disk.log(), Random(20_261_122), 0);
        // What is on the disk for good, and up to where that is: a loss of power goes back no further.
        let (mut base, mut from) = (before, 0);
        let mut versions = vec![0; BLOCKS as usize];
        for point in 0..=log.len() {
            match point.checked_sub(1).map(|last| &log[last]) {
                Some(Op::Other(block)) => versions[*block as usize] += 1,
                Some(Op::Sync) => {
                    base = after_crash(&base, &log[from..point], point - from, Crash::Killed, &mut random).0;
                    from = point;
                }
                _ => {}
            }
            for (crash, slots) in [(Crash::Killed, MOST), (Crash::PowerLoss, MOST), (Crash::PowerLoss, 70)] {
                let (image, _) = after_crash(&base, &log[from..], point - from, crash, &mut random);
                let disk = Disk::new(image);
                let (tier, storage) = open_slab(&disk, is_block_device, slots);
                let what = format!("{crash:?} at {point} of {}, opened with {slots}", log.len());
                kept += served(&disk, &tier, storage, &versions, &what);
            }
        }
        assert!(kept > 20 * log.len(), "a recovery that keeps nothing is never stale either: {kept} of {}", log.len());
    }
}

/// A slot that is being read or written when the slab is to shrink, and what becomes of a shrink that is given up.
#[test]
fn a_shrink_waits_for_slots_in_use_and_can_be_taken_back() {
    let (mut slab, _) = history(false);
    slab.insert(0..90);
    let read = slab.tier.begin_read(slab.storage, BlockIndex(79)).unwrap();
    let write = slab.tier.begin_insert(slab.storage, BlockIndex(100), FIRST).unwrap();
    assert!(read.slot() >= 70 && write.slot() >= 70);
    let tier = slab.tier.clone();
    let mut resize = tier.begin_resize(format::slab_bytes(70)).unwrap();
    let held = |resize: &mut crate::ssd::Resize<'_>| {
        (0..100).map(|_| resize.step().unwrap()).find(|step| *step != ResizeStep::More).unwrap()
    };
    assert_eq!(held(&mut resize), ResizeStep::Held { slots: 2 });
    assert!(tier.end_read(read, Outcome::Good).is_empty(), "its slot is about to go");
    assert_eq!(held(&mut resize), ResizeStep::Held { slots: 1 });
    assert_eq!(slab.disk.len(), format::slab_bytes(MOST));
    drop(resize);
    assert_eq!((tier.stats().slots, tier.stats().used_slots), (MOST, 70));
    // No slot is lost: all of them can be in use, and none twice.
    let sum = slab.fill(&write, 100);
    assert!(!tier.finish_insert(write, sum, true), "it was dropped");
    slab.insert(0..BLOCKS);
    let versions = slab.versions.clone();
    assert_eq!(served(&slab.disk, &slab.tier, slab.storage, &versions, "taken back"), BLOCKS as usize);
    slab.resize(70);
    slab.resize(MOST);
    slab.insert(0..BLOCKS);
    assert_eq!(served(&slab.disk, &slab.tier, slab.storage, &versions, "anew"), BLOCKS as usize);
}

/// What keeps a slab from being cut, and what it has no more once it is, is seen a part at a time.
#[test]
fn slots_beyond_the_end_are_counted_in_parts() {
    let mut index = Index::new(100);
    let key = |block| Key::new(0, BlockIndex(block)).unwrap();
    for block in 0..100 {
        let (slot, _) = index.begin_insert(key(block), FIRST).unwrap();
        assert!(index.finish_insert(slot, Some(0), false));
    }
    let reads = [3, 40, 77, 99].map(|block| index.begin_read(key(block)).unwrap());
    index.set_limit(30);
    assert_eq!(index.drop_beyond(30, 100), None);
    assert!(index.sift(100));
    let look = |index: &Index| {
        let (mut next, mut seen, mut parts) = (Some(30), Beyond::default(), 0);
        while let Some(from) = next {
            next = index.look_beyond(from, 7, &mut seen);
            parts += 1;
        }
        assert_eq!(parts, 10);
        (seen.held, seen.retired)
    };
    assert_eq!(look(&index), (3, 0));
    for (read, failed, seen) in [(1, false, (2, 0)), (2, true, (1, 1)), (3, true, (0, 2)), (0, true, (0, 2))] {
        index.end_read(&reads[read], failed, failed);
        assert_eq!(look(&index), seen);
    }
    assert_eq!(index.counters.retired_slots, 3);
    index.end_shrink(2);
    assert_eq!((index.counters.retired_slots, index.len()), (1, 30));
}

/// Records beyond the end have no place on the disk.
#[test]
fn a_checkpoint_after_a_shrink_writes_nothing_beyond_the_end() {
    let mut index = Index::new(300);
    for block in 0..300 {
        let key = Key::new(0, BlockIndex(block)).unwrap();
        let (slot, _) = index.begin_insert(key, FIRST).unwrap();
        assert!(index.finish_insert(slot, Some(0), false));
    }
    assert_eq!(index.next_changed(2), Some(2));
    index.set_limit(70);
    let mut next = Some(70);
    while let Some(from) = next {
        next = index.drop_beyond(from, 16);
    }
    while !index.sift(16) {}
    let (mut next, mut seen) = (Some(70), Beyond::default());
    while let Some(from) = next {
        next = index.look_beyond(from, 16, &mut seen);
        assert_eq!(next, Some(from + 16).filter(|next| *next < 300), "so many at a time");
    }
    assert_eq!(seen, Beyond::default());
    index.end_shrink(0);
    assert_eq!((index.next_changed(0), index.next_changed(2), index.len()), (Some(0), None, 70));
}

#[test]
fn a_device_that_fails_leaves_the_size_as_it_was() {
    let (mut slab, _) = history(false);
    slab.insert(0..100);
    slab.checkpoint();
    for slots in [70, MOST + 100] {
        slab.disk.failing.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut resize = slab.tier.begin_resize(format::slab_bytes(slots)).unwrap();
        assert!((0..100).any(|_| resize.step().is_err()));
        drop(resize);
        slab.disk.failing.store(false, std::sync::atomic::Ordering::Relaxed);
        assert_eq!((slab.tier.stats().slots, slab.disk.len()), (MOST, format::slab_bytes(MOST)));
        slab.insert(0..100);
        assert_eq!(slab.tier.stats().used_slots, 100);
        // What was dropped and written anew is found again by the next run.
        slab.checkpoints(3);
        let disk = Disk::new(
            after_crash(&Image::default(), &slab.disk.log(), slab.disk.log().len(), Crash::Killed, &mut Random(1)).0,
        );
        let (tier, storage) = open_slab(&disk, false, MOST);
        assert_eq!(served(&disk, &tier, storage, &slab.versions, "the next run"), 100);
    }
    slab.tier.close().unwrap();
    assert!(slab.tier.begin_resize(format::slab_bytes(80)).is_err(), "it is closed");
}
