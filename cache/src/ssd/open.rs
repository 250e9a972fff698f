//! Opening and closing: from the slab to the index and back. Blocking I/O.

use super::device::{AlignedBuf, Device};
use super::foreign;
use super::format::{
    self, Copy, ENTRY_BYTES, GROUP_SLOTS, RECORD_BYTES, SECTOR_BYTES, SlotRecord, Superblock, TABLE_OFFSET, TableEntry,
};
use super::index::Index;
use super::{Found, OpenReport, SsdError};
use std::hash::{BuildHasher, RandomState};
use std::io;

/// What the two superblocks say.
#[derive(Debug)]
enum Existing {
    /// Nothing there.
    Blank,
    /// Ours, but both copies are damaged.
    Damaged,
    Slab(Superblock),
}

/// An opened slab, marked dirty on disk.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) index: Index,
    pub(super) superblock: Superblock,
    pub(super) report: OpenReport,
}

/// Opens what is on the device, or makes a slab there. `size_bytes` 0: the whole block device.
pub(super) fn open(device: &Device, size_bytes: u64, preallocate: bool) -> Result<Opened, SsdError> {
    let len = device.len()?;
    let existing = existing(device, len)?;
    let slots = wanted_slots(device, size_bytes, len)?;

    let mut report = OpenReport {
        found: Found::Created,
        slots: u64::from(slots),
        kept_slots: 0,
        kept_pages: 0,
        damaged_records: 0,
        slots_beyond_end: 0,
        resized_from_slots: None,
        block_device: device.is_block_device,
        direct: device.is_direct,
        preallocated: false,
    };
    let mut index = Index::new(slots);
    let mut superblock = match existing {
        Existing::Blank => new_superblock(slots),
        Existing::Damaged => {
            report.found = Found::Damaged;
            new_superblock(slots)
        }
        Existing::Slab(found) => {
            report.resized_from_slots = Some(found.slots).filter(|n| *n != u64::from(slots));
            report.found = if found.clean { Found::Clean } else { Found::Unclean };
            if found.clean {
                load(device, len, &found, &mut index, &mut report);
            }
            found
        }
    };
    report.kept_slots = index.counters.used_slots;
    report.kept_pages = index.counters.valid_pages;

    let slab_bytes = format::slab_bytes(u64::from(slots));
    if !device.is_block_device && len != slab_bytes {
        report.preallocated = device.set_len(slab_bytes, preallocate)?;
    }
    superblock.slots = u64::from(slots);
    superblock.used_end = 0;
    superblock.table_end = 0;
    mark(device, &mut superblock, false).map_err(|e| device.error("write the superblock of", e))?;
    Ok(Opened { index, superblock, report })
}

fn wanted_slots(device: &Device, size_bytes: u64, len: u64) -> Result<u32, SsdError> {
    let path = || device.path.clone();
    let size_bytes = if device.is_block_device && size_bytes == 0 { len } else { size_bytes };
    if device.is_block_device && size_bytes > len {
        return Err(SsdError::NoSpace { path: path(), needed_bytes: size_bytes, free_bytes: len });
    }
    let min_bytes = format::slab_bytes(1);
    let max_bytes = format::slab_bytes(format::MAX_SLOTS);
    let slots = u32::try_from(format::slots_in(size_bytes)).ok().filter(|n| *n > 0 && size_bytes <= max_bytes);
    slots.ok_or_else(|| SsdError::SizeOutOfRange { path: path(), size_bytes, min_bytes, max_bytes })
}

fn existing(device: &Device, len: u64) -> Result<Existing, SsdError> {
    let mut buf = AlignedBuf::zeroed(SECTOR_BYTES);
    let mut copies = Vec::new();
    let mut unreadable = None;
    for offset in format::SUPER_OFFSETS {
        match device.read(offset, buf.get_mut()) {
            Ok(read) => copies.push(Superblock::decode(&buf.get()[..read])),
            // A sector gone bad is what there are two copies for.
            Err(e) => {
                unreadable = Some(e);
                copies.push(Copy::Damaged);
            }
        }
    }
    let other_version = copies.iter().find_map(|c| if let Copy::OtherVersion(v) = c { Some(*v) } else { None });
    if let Some(found) = other_version {
        let (path, remedy) = (device.path.clone(), device.remedy());
        return Err(SsdError::OtherVersion { path, found, supported: format::VERSION, remedy });
    }
    let valid = copies.iter().filter_map(|c| if let Copy::Valid(sb) = c { Some(sb) } else { None });
    let newest = valid.max_by_key(|sb| sb.generation).cloned();
    // Everything else that uses a disk writes to its start: with something foreign there the second copy does not
    // count.
    if copies.first() == Some(&Copy::Foreign) {
        foreign::require_blank(device, len)?;
    }
    if let Some(newest) = newest {
        foreign::require_gaps(device)?;
        return Ok(Existing::Slab(newest));
    }
    if let Some(source) = unreadable {
        return Err(device.error("read both superblocks of", source));
    }
    if copies.contains(&Copy::Damaged) {
        foreign::require_gaps(device)?;
        return Ok(Existing::Damaged);
    }
    foreign::require_blank(device, len)?;
    Ok(Existing::Blank)
}

fn new_superblock(slots: u32) -> Superblock {
    // `RandomState` takes its keys from the kernel's random numbers; good enough to tell two slabs apart.
    let random = || RandomState::new().hash_one(std::process::id()).to_le_bytes();
    let mut slab_id = [0; 16];
    slab_id[..8].copy_from_slice(&random());
    slab_id[8..].copy_from_slice(&random());
    Superblock {
        generation: 0,
        slab_id,
        slots: u64::from(slots),
        used_end: 0,
        table_end: 0,
        clean: false,
        hand: 0,
        next_sequence: 1,
        checkpoint: 0,
    }
}

/// Writes both copies of the superblock with the next generation, each on disk before the next is touched.
pub(super) fn mark(device: &Device, superblock: &mut Superblock, clean: bool) -> io::Result<()> {
    superblock.generation += 1;
    superblock.clean = clean;
    let mut buf = AlignedBuf::zeroed(SECTOR_BYTES);
    buf.get_mut().copy_from_slice(&superblock.encode());
    for offset in format::SUPER_OFFSETS {
        device.write(offset, buf.get())?;
        device.sync()?;
    }
    Ok(())
}

/// Fills the index from a clean slab.
fn load(device: &Device, len: u64, found: &Superblock, index: &mut Index, report: &mut OpenReport) {
    let table_bytes = (found.table_end as usize * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES);
    let mut buf = AlignedBuf::zeroed(table_bytes);
    device.read_what_can_be(TABLE_OFFSET, buf.get_mut());
    let mut has_entry = vec![false; found.table_end as usize];
    for (i, bytes) in buf.get().chunks(ENTRY_BYTES).take(found.table_end as usize).enumerate() {
        match TableEntry::decode(&found.slab_id, i as u16, bytes) {
            format::Found::Valid(entry) if !index.storages.knows(&entry.identity) => {
                index.storages.put(i as u16, entry);
                has_entry[i] = true;
            }
            format::Found::Free => {}
            format::Found::Valid(_) | format::Found::Damaged => report.damaged_records += 1,
        }
    }
    // A slab cut short, or configured smaller than it was: what lies beyond the end is lost.
    let end = found.used_end.min(format::slots_in(len)).min(u64::from(index.limit()));
    report.slots_beyond_end = found.used_end - end;

    let mut buf = AlignedBuf::zeroed(format::GROUP_META_BYTES as usize);
    let mut first = 0u32;
    while u64::from(first) < end {
        let count = (end - u64::from(first)).min(u64::from(GROUP_SLOTS)) as u32;
        let bytes = (count as usize * RECORD_BYTES).next_multiple_of(SECTOR_BYTES);
        let area = &mut buf.get_mut()[..bytes];
        device.read_what_can_be(format::group_meta_offset(first / GROUP_SLOTS), area);
        for (i, bytes) in area.chunks(RECORD_BYTES).take(count as usize).enumerate() {
            let record = match SlotRecord::decode(&found.slab_id, first + i as u32, bytes) {
                format::Found::Free => {
                    index.restore(None);
                    continue;
                }
                format::Found::Valid(record) => Some(record),
                format::Found::Damaged => None,
            };
            let record = record.filter(|r| {
                let current = r.checkpoint >= found.checkpoint && r.checkpoint <= found.generation;
                current && has_entry.get(usize::from(r.storage)).copied().unwrap_or(false)
            });
            if !index.restore(record.as_ref()) || record.is_none() {
                report.damaged_records += 1;
            }
        }
        first += count;
    }
    index.restore_hand(found.hand);
}

/// Writes the index to the slab and marks it clean last.
pub(super) fn checkpoint(device: &Device, superblock: &mut Superblock, index: &Index) -> Result<(), SsdError> {
    // A number of its own for each try, so that records of one that failed half-way are not taken for this one's.
    superblock.generation += 1;
    // Named by the superblock `mark` is about to write.
    let checkpoint = superblock.generation + 1;
    let used_end = index.used_end();
    let mut table_end = 0;
    let table: Vec<_> = index.storages.kept().collect();
    if let Some((last, _)) = table.last() {
        table_end = u32::from(*last) + 1;
        let mut buf = AlignedBuf::zeroed((table_end as usize * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES));
        for (index, entry) in &table {
            let at = usize::from(*index) * ENTRY_BYTES;
            entry.encode(&superblock.slab_id, *index, &mut buf.get_mut()[at..at + ENTRY_BYTES]);
        }
        device.write(TABLE_OFFSET, buf.get()).map_err(|e| device.error("write the storage table of", e))?;
    }
    let mut buf = AlignedBuf::zeroed(format::GROUP_META_BYTES as usize);
    for first in (0..used_end).step_by(GROUP_SLOTS as usize) {
        let count = (used_end - first).min(GROUP_SLOTS);
        let bytes = (count as usize * RECORD_BYTES).next_multiple_of(SECTOR_BYTES);
        let area = &mut buf.get_mut()[..bytes];
        area.fill(0);
        for (slot, to) in (first..first + count).zip(area.chunks_mut(RECORD_BYTES)) {
            if let Some(record) = index.record(slot, superblock.next_sequence, checkpoint) {
                record.encode(&superblock.slab_id, slot, to);
            }
        }
        let offset = format::group_meta_offset(first / GROUP_SLOTS);
        device.write(offset, area).map_err(|e| device.error("write slot metadata of", e))?;
    }
    device.sync().map_err(|e| device.error("sync", e))?;

    superblock.used_end = u64::from(used_end);
    superblock.table_end = table_end;
    superblock.hand = u64::from(index.hand());
    superblock.next_sequence = superblock.next_sequence.wrapping_add(1);
    superblock.checkpoint = checkpoint;
    mark(device, superblock, true).map_err(|e| device.error("write the superblock of", e))
}
