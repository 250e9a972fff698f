//! Promises of the format, and what a crash at any point of opening and closing leaves.

mod crashes;
mod loading;
mod resizing;
mod rig;
mod sim;
mod writing;

pub(super) use sim::Simulated;

use super::device::{Device, Op};
use super::format::{
    self, Copy, ENTRY_BYTES, Found as OnDisk, IDENTITY_BYTES, RECORD_BYTES, SECTOR_BYTES, SUPER_OFFSETS, SlotRecord,
    Superblock, TableEntry,
};
use super::index::{Index, Key};
use super::open::{self, Extent, Opened};
use super::{Found, Stamp};
use crate::types::{BLOCK_BYTES, BlockIndex, PageMask};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SLOTS: u64 = 70;

fn superblock() -> Superblock {
    Superblock {
        generation: 7,
        slab_id: *b"0123456789abcdef",
        slots: SLOTS,
        used_end: 3,
        table_end: 2,
        clean: true,
        kept: false,
        hand: 1,
        next_sequence: 5,
        checkpoint: 6,
    }
}

#[test]
fn regions_and_slots_do_not_overlap_and_sizes_round_down() {
    const { assert!(format::INTENT_OFFSET + (1 << 20) <= format::GROUPS_OFFSET) };
    let mut end = format::group_meta_offset(0) + format::GROUP_META_BYTES;
    for slot in 0..3 * format::GROUP_SLOTS {
        if slot > 0 && slot % format::GROUP_SLOTS == 0 {
            assert_eq!(format::group_meta_offset(slot / format::GROUP_SLOTS), end);
            end += format::GROUP_META_BYTES;
        }
        assert_eq!(format::slot_offset(slot), end);
        assert_eq!(end % BLOCK_BYTES as u64, 0);
        end += BLOCK_BYTES as u64;
    }
    for slots in [1, 2, 4095, 4096, 4097, 1 << 24, format::MAX_SLOTS - 1, format::MAX_SLOTS] {
        let bytes = format::slab_bytes(slots);
        assert_eq!(format::slots_in(bytes), slots);
        assert_eq!(format::slots_in(bytes - 1), slots - 1);
        assert_eq!(bytes, format::slot_offset((slots - 1) as u32) + BLOCK_BYTES as u64, "the last slot ends the slab");
    }
    assert_eq!(format::slots_in(0), 0);
    assert_eq!(format::slots_in(u64::MAX), format::MAX_SLOTS);
}

#[test]
fn a_superblock_with_any_bit_flipped_is_damaged_and_never_another_version() {
    let good = superblock().encode();
    assert_eq!(Superblock::decode(&good), Copy::Valid(superblock()));
    for bit in 0..good.len() * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Superblock::decode(&bad), Copy::Damaged, "bit {bit}");
    }
    let mut newer = good;
    newer[16] = 2;
    newer[200] = 1;
    assert_eq!(Superblock::decode(&newer), Copy::OtherVersion(2));
    assert_eq!(Superblock::decode(&[]), Copy::Blank);
    // Its own first write cut off, and a short file of somebody else's.
    assert_eq!(Superblock::decode(&good[..512]), Copy::Damaged);
    assert_eq!(Superblock::decode(&good[1..512]), Copy::Foreign);
}

#[test]
fn a_record_or_entry_with_any_bit_flipped_or_in_the_wrong_place_is_damaged() {
    let id = superblock().slab_id;
    let record = SlotRecord {
        storage: 3,
        block: 77,
        written: PageMask(0xff00),
        valid: PageMask(0x0f00),
        referenced: true,
        checksum: 0xdead_beef,
        sequence: 9,
        checkpoint: 6,
        epoch: 5,
    };
    let mut good = [0; RECORD_BYTES];
    record.encode(&id, 5, &mut good);
    assert_eq!(SlotRecord::decode(&id, 5, &good), OnDisk::Valid(record.clone()));
    assert_eq!(SlotRecord::decode(&id, 6, &good), OnDisk::Damaged, "a misdirected write");
    assert_eq!(SlotRecord::decode(b"another slab's..", 5, &good), OnDisk::Damaged, "an earlier slab's");
    assert_eq!(SlotRecord::decode(&id, 5, &[0; RECORD_BYTES]), OnDisk::Free);
    for bit in 0..good.len() * 8 {
        let mut bad = good;
        bad[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(SlotRecord::decode(&id, 5, &bad), OnDisk::Damaged, "bit {bit}");
    }

    let stamp = Stamp { size_bytes: 1 << 40, mtime_ns: -5, ctime_ns: i64::MAX, inode: 4, device: u64::MAX };
    for stamp in [None, Some(stamp)] {
        let entry = TableEntry { identity: "ä".repeat(IDENTITY_BYTES / 2), stamp, epoch: u64::MAX };
        let mut good = [0; ENTRY_BYTES];
        entry.encode(&id, 5, &mut good);
        assert_eq!(TableEntry::decode(&id, 5, &good), OnDisk::Valid(entry));
        assert_eq!(TableEntry::decode(&id, 4, &good), OnDisk::Damaged);
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(TableEntry::decode(&id, 5, &bad), OnDisk::Damaged, "bit {bit}");
        }
    }
}

#[test]
fn a_checksum_depends_on_the_pages_of_the_mask_and_on_where_they_belong() {
    let mut block = vec![0u8; BLOCK_BYTES];
    block.iter_mut().enumerate().for_each(|(i, b)| *b = ((i * 31) >> 7) as u8);
    let mask = PageMask(0b1000_0000_0010_0011);
    let sum = format::data_checksum(1, 2, mask, &block);
    for other in [
        format::data_checksum(2, 2, mask, &block),
        format::data_checksum(1, 3, mask, &block),
        format::data_checksum(1, 2, PageMask(0b11), &block),
    ] {
        assert_ne!(sum, other);
    }
    block[2 * 4096] ^= 1;
    assert_eq!(format::data_checksum(1, 2, mask, &block), sum, "page 2 is not in the mask");
    block[5 * 4096 + 4095] ^= 1;
    assert_ne!(format::data_checksum(1, 2, mask, &block), sum, "page 5 is");
}

/// FIFO: without reads blocks leave in the order they came; a block read since the hand passed stays one round longer.
#[test]
fn the_clock_evicts_in_order_and_gives_a_second_chance_to_what_was_read() {
    let mut index = Index::new(4);
    let key = |block| Key::new(0, BlockIndex(block)).unwrap();
    let insert = |index: &mut Index, block| {
        let (slot, _) = index.begin_insert(key(block), PageMask::ALL).unwrap();
        assert!(index.finish_insert(slot, Some(0), false));
    };
    let resident = |index: &Index| (0..20).filter(|b| !index.lookup(key(*b)).is_empty()).collect::<Vec<_>>();
    (0..4).for_each(|block| insert(&mut index, block));
    insert(&mut index, 4);
    assert_eq!(resident(&index), [1, 2, 3, 4]);
    let ticket = index.begin_read(key(1)).unwrap();
    index.end_read(&ticket, false, false);
    insert(&mut index, 5);
    assert_eq!(resident(&index), [1, 3, 4, 5], "1 was read: 2 leaves");
    (6..9).for_each(|block| insert(&mut index, block));
    assert_eq!(resident(&index), [5, 6, 7, 8], "one second chance, not two");

    let tickets: Vec<_> = (5..9).map(|b| index.begin_read(key(b)).unwrap()).collect();
    assert!(index.begin_insert(key(9), PageMask::ALL).is_none(), "slots being read are not replaced");
    index.end_read(&tickets[1], false, false);
    insert(&mut index, 9);
    assert_eq!(resident(&index), [5, 7, 8, 9]);
}

#[test]
fn a_full_index_takes_at_most_forty_bytes_a_slot_and_an_empty_one_next_to_none() {
    // The worst fill of a hash table is just after it has doubled; 16 Mi slots (a tier of 1 TiB) is one of the best.
    for (slots, limit) in [(100_000, 40), (1 << 18, 40), ((1 << 18) / 8 * 7, 40), (250_000, 45)] {
        let mut index = Index::new(slots);
        for block in 0..u64::from(slots) {
            let key = Key::new((block % 3) as u16, BlockIndex(block / 3)).unwrap();
            let (slot, _) = index.begin_insert(key, PageMask::ALL).unwrap();
            assert!(index.finish_insert(slot, Some(1), false));
        }
        let bytes = index.bytes() / u64::from(slots);
        assert!(bytes <= limit, "{bytes} bytes a slot with {slots} slots");
    }
    assert!(Index::new(u32::MAX).bytes() < 16 << 10);
}

struct Slab {
    dir: tempfile::TempDir,
    path: PathBuf,
}

impl Slab {
    fn new() -> Slab {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slab");
        Slab { dir, path }
    }
    fn copy(&self, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        std::fs::copy(&self.path, &to).unwrap();
        to
    }
}

fn open(path: &Path) -> (Device, Opened) {
    let device = Device::open(path, true).unwrap();
    let mut opened = open::open(&device, format::slab_bytes(SLOTS), false, |_| open::Standing::Ours).unwrap();
    opened.load(&device);
    (device, opened)
}

fn mask_of(block: u64) -> PageMask {
    PageMask(1 << (block % 16) | 1)
}

/// Inserts blocks `from..to` and returns all that the index holds.
fn fill(index: &mut Index, from: u64, to: u64) {
    let (s, _) = index.storages.register("file:/golden.img", None, |_, _, _| false).unwrap();
    for block in from..to {
        let key = Key::new(s.index, BlockIndex(block)).unwrap();
        let mask = mask_of(block);
        let (slot, _) = index.begin_insert(key, mask).unwrap();
        assert!(index.finish_insert(slot, Some(block as u32), false));
    }
}

fn contents(index: &Index) -> Vec<(u64, PageMask)> {
    let all = (0..300).map(|block| (block, index.lookup(Key::new(0, BlockIndex(block)).unwrap())));
    all.filter(|(_, mask)| !mask.is_empty()).collect()
}

/// Every state that a crash may leave on disk: all writes up to some sync, and any part of those after it, each whole
/// or cut short.
fn after_crash(log: &[Op]) -> Vec<Vec<(u64, Vec<u8>)>> {
    let mut states = Vec::new();
    let mut durable = Vec::new();
    for epoch in log.split(|op| matches!(op, Op::Sync)) {
        let writes: Vec<_> =
            epoch.iter().filter_map(|op| if let Op::Write(at, b) = op { Some((*at, b)) } else { None }).collect();
        assert!(writes.len() <= 8, "more writes between two syncs than can be tried");
        for choice in 0..3u32.pow(writes.len() as u32) {
            let mut state = durable.clone();
            for (i, (at, bytes)) in writes.iter().enumerate() {
                match choice / 3u32.pow(i as u32) % 3 {
                    0 => {}
                    // Smaller than any sector: even then.
                    1 => state.push((*at, bytes[..72.min(bytes.len())].to_vec())),
                    _ => state.push((*at, bytes.to_vec())),
                }
            }
            states.push(state);
        }
        durable.extend(writes.iter().map(|(at, bytes)| (*at, bytes.to_vec())));
    }
    states
}

fn apply(path: &Path, writes: &[(u64, Vec<u8>)]) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    writes.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
}

#[test]
fn a_crash_while_closing_leaves_all_or_nothing() {
    crash_while_closing(Extent::All);
}

#[test]
fn a_crash_while_closing_quickly_leaves_all_or_nothing() {
    crash_while_closing(Extent::Changed);
}

fn crash_while_closing(extent: Extent) {
    let slab = Slab::new();
    // An earlier checkpoint, so that there are old records to mistake for new ones.
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 0, SLOTS);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    drop(device);
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 100, 140);
    let expected = contents(&opened.index);
    assert_eq!(expected.len() as u64, SLOTS);
    let before = slab.copy("before");
    device.log.lock().clear();
    open::close(&device, &mut opened.superblock, &mut opened.index, extent).unwrap();
    let log = device.log.lock().clone();
    drop(device);

    let (mut kept, mut recovered) = (0, 0);
    for writes in after_crash(&log) {
        let path = slab.dir.path().join("crashed");
        std::fs::copy(&before, &path).unwrap();
        apply(&path, &writes);
        let (_device, opened) = open(&path);
        match opened.report.found {
            Found::Clean => {
                assert_eq!(contents(&opened.index), expected);
                assert_eq!(opened.report.damaged_records, 0);
                kept += 1;
            }
            // No guest wrote to anything: old records are as true as new ones.
            Found::Recovered => {
                let found = contents(&opened.index);
                assert!(found.iter().all(|(block, mask)| *mask == mask_of(*block)));
                // Where all were old or all new, as many as there are slots.
                assert!(
                    opened.report.damaged_records > 0 || found.len() as u64 + opened.report.duplicate_slots == SLOTS
                );
                recovered += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(kept >= 2 && recovered >= 9, "both ways: {kept}, {recovered}");
}

/// Where each write went, and how long it was.
fn written(device: &Device) -> Vec<(u64, usize)> {
    let log = std::mem::take(&mut *device.log.lock());
    let write = |op: &Op| if let Op::Write(at, bytes) = op { Some((*at, bytes.len())) } else { None };
    log.iter().filter_map(write).collect()
}

#[test]
fn closing_quickly_writes_what_has_changed_and_leaves_all_of_it() {
    let slab = Slab::new();
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 0, SLOTS);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    drop(device);
    let (device, mut opened) = open(&slab.path);
    let first = Key::new(0, BlockIndex(0)).unwrap();
    opened.index.invalidate(first, PageMask::ALL);
    let expected = contents(&opened.index);
    assert_eq!(expected.len() as u64, SLOTS - 1);
    written(&device);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::Changed).unwrap();
    let records: Vec<_> = written(&device).into_iter().filter(|(at, _)| *at >= format::GROUPS_OFFSET).collect();
    assert_eq!(
        records,
        [(format::group_meta_offset(0), SECTOR_BYTES)],
        "of {SLOTS} records the sector that has the one"
    );
    drop(device);
    let (device, mut opened) = open(&slab.path);
    assert_eq!((opened.report.found, opened.report.dropped_slots()), (Found::Clean, 0));
    assert_eq!(contents(&opened.index), expected);
    // A try that fails has written nobody knows what: all of it again.
    fill(&mut opened.index, 0, 1);
    let expected = contents(&opened.index);
    device.fail_writes.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(open::close(&device, &mut opened.superblock, &mut opened.index, Extent::Changed).is_err());
    device.fail_writes.store(false, std::sync::atomic::Ordering::Relaxed);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::Changed).unwrap();
    drop(device);
    assert_eq!(contents(&open(&slab.path).1.index), expected);
}

#[test]
fn a_crash_while_opening_leaves_everything() {
    let slab = Slab::new();
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 0, SLOTS);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    let expected = contents(&opened.index);
    drop(device);
    let before = slab.copy("before");
    let (device, _) = open(&slab.path);
    let log = device.log.lock().clone();
    drop(device);
    let states = after_crash(&log);
    for writes in &states {
        let path = slab.dir.path().join("crashed");
        std::fs::copy(&before, &path).unwrap();
        apply(&path, writes);
        let (_device, opened) = open(&path);
        let found = contents(&opened.index);
        assert!(matches!(opened.report.found, Found::Clean | Found::Recovered), "{:?}", opened.report);
        assert_eq!(found, expected);
    }
    // In use, both copies say so: neither alone may pass it off as closed.
    for lost in SUPER_OFFSETS {
        let path = slab.copy("in use");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, lost + 30).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], lost + 30).unwrap();
        let (_device, opened) = open(&path);
        assert_eq!(opened.report.found, Found::Recovered);
        assert_eq!(contents(&opened.index), expected);
    }
}

#[test]
fn a_slab_left_by_a_program_that_keeps_no_records_is_dropped() {
    let slab = Slab::new();
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 0, SLOTS);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    open::mark(&device, &mut opened.superblock, open::Mark::Dropped).unwrap();
    let id = opened.superblock.slab_id;
    drop(device);
    let (_device, opened) = open(&slab.path);
    assert_eq!((opened.report.found, opened.report.kept_slots), (Found::Unclean, 0));
    assert_ne!(opened.superblock.slab_id, id, "no record of the old one may count");
}

#[test]
fn a_metadata_write_that_a_device_lost_drops_its_slots() {
    let slab = Slab::new();
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 0, SLOTS);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    drop(device);
    let mut old = vec![0; SECTOR_BYTES];
    let at = format::group_meta_offset(0);
    std::fs::File::open(&slab.path).unwrap().read_exact_at(&mut old, at).unwrap();

    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 100, 110);
    let expected = contents(&opened.index);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    drop(device);
    apply(&slab.path, &[(at, old)]);
    let (_device, opened) = open(&slab.path);
    assert_eq!(opened.report.damaged_records, 64, "a sector of records");
    let found = contents(&opened.index);
    assert_eq!(found.len() as u64, SLOTS - 64);
    assert!(found.iter().all(|kept| expected.contains(kept)), "none of them is an old one");
}

#[test]
fn closing_on_a_failing_device_leaves_the_slab_dirty_and_can_be_tried_again() {
    let slab = Slab::new();
    let (device, mut opened) = open(&slab.path);
    fill(&mut opened.index, 0, 5);
    device.fail_writes.store(true, std::sync::atomic::Ordering::Relaxed);
    let generation = opened.superblock.generation;
    assert!(open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).is_err());
    assert!(opened.superblock.generation > generation, "records of this try are not mistaken for the next one's");
    let crashed = slab.copy("crashed");
    assert_eq!(open(&crashed).1.report.found, Found::Recovered);
    device.fail_writes.store(false, std::sync::atomic::Ordering::Relaxed);
    open::close(&device, &mut opened.superblock, &mut opened.index, Extent::All).unwrap();
    drop(device);
    let (_device, again) = open(&slab.path);
    assert_eq!(contents(&again.index), contents(&opened.index));
    assert_eq!(again.report.kept_slots, 5);
}
