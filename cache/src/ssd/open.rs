//! Opening, but for the records ([`super::load`]), and closing. Blocking I/O.

use super::checkpoint::SECTORS_A_GROUP;
use super::device::{AlignedBuf, Device};
use super::foreign;
use super::format::{self, Copy, ENTRY_BYTES, RECORD_BYTES, SECTOR_BYTES, SlabId, Superblock, TABLE_OFFSET};
use super::index::{Index, RECORDS_A_SECTOR};
use super::intents::{self, Intents};
use super::load::Loading;
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

/// What the superblock says of records and bitmap, see [`super::format`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mark {
    Clean,
    Kept,
    Dropped,
}

/// What is known of a slab from outside of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// The last run had it.
    Ours,
    /// It may have missed a run: what it has of stores that show no changes is dropped.
    Stranger,
    /// It must not be believed.
    Vetoed,
}

/// An opened slab, marked as in use on disk.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) index: Index,
    pub(super) intents: Intents,
    pub(super) superblock: Superblock,
    pub(super) report: OpenReport,
    /// Records that are still to be read.
    pub(super) loading: Option<Loading>,
}

/// Opens what is on the device, or makes a slab there. `size_bytes` 0: the whole block device. `standing` is asked about a
/// slab that is there.
pub(super) fn open(
    device: &Device,
    size_bytes: u64,
    preallocate: bool,
    standing: impl FnOnce(&Superblock) -> Standing,
) -> Result<Opened, SsdError> {
    let len = device.len()?;
    let existing = existing(device, len)?;
    let slots = wanted_slots(device, size_bytes, len)?;

    let mut report = OpenReport::new(device, u64::from(slots));
    let mut index = Index::new(slots);
    let mut intents = Intents::new();
    let mut loading = None;
    let mut superblock = match existing {
        Existing::Blank => new_superblock(slots, 0),
        Existing::Damaged => {
            report.found = Found::Damaged;
            new_superblock(slots, 0)
        }
        Existing::Slab(mut found) => {
            report.resized_from_slots = Some(found.slots).filter(|n| *n != u64::from(slots));
            let standing = standing(&found);
            report.found = match (standing, found.clean, found.kept) {
                (Standing::Vetoed, ..) => Found::Vetoed,
                (_, true, _) => Found::Clean,
                (_, false, true) => Found::Recovered,
                (_, false, false) => Found::Unclean,
            };
            match report.found {
                Found::Clean | Found::Recovered => {
                    if report.found == Found::Recovered {
                        load_intents(device, &found, &mut intents, &mut report);
                    }
                    loading = Some(Loading::begin(device, len, &found, standing, &mut index, &mut report)?);
                    found.used_end = found.used_end.min(u64::from(slots));
                    found
                }
                // Under another identity no record of the old one counts any more.
                _ => new_superblock(slots, found.generation),
            }
        }
    };

    superblock.slots = u64::from(slots);
    if report.found == Found::Created {
        // First of all, and before the file is made longer: a crash must leave nothing that the next start takes for
        // somebody else's data.
        mark(device, &mut superblock, Mark::Dropped).map_err(|e| device.error("write the superblock of", e))?;
    }
    let slab_bytes = format::slab_bytes(u64::from(slots));
    if !device.is_block_device && device.len()? != slab_bytes {
        let made = device.set_len(slab_bytes, preallocate);
        if made.is_err() && report.found == Found::Created {
            let _ = device.set_len(len, false);
        }
        report.preallocated = made?;
    }
    if report.found != Found::Recovered {
        let failed = |e| device.error("write the bitmap of", e);
        write_bitmap(device, &superblock.slab_id, &mut intents).map_err(failed)?;
    }
    mark(device, &mut superblock, Mark::Kept).map_err(|e| device.error("write the superblock of", e))?;
    Ok(Opened { index, intents, superblock, report, loading })
}

/// Writes the whole bitmap and syncs.
pub(super) fn write_bitmap(device: &Device, slab_id: &SlabId, intents: &mut Intents) -> io::Result<()> {
    let (batch, bytes) = intents.whole(slab_id);
    let mut buf = AlignedBuf::zeroed(bytes.len());
    buf.get_mut().copy_from_slice(&bytes);
    device.write(format::INTENT_OFFSET, buf.get())?;
    device.sync()?;
    intents.finish_batch(&batch);
    Ok(())
}

fn load_intents(device: &Device, found: &Superblock, intents: &mut Intents, report: &mut OpenReport) {
    let mut buf = AlignedBuf::zeroed(intents::SECTORS * SECTOR_BYTES);
    device.read_what_can_be(format::INTENT_OFFSET, buf.get_mut());
    for (sector, bytes) in buf.get().chunks(SECTOR_BYTES).enumerate() {
        report.damaged_chunks += intents.restore(&found.slab_id, sector, bytes);
    }
}

pub(super) fn wanted_slots(device: &Device, size_bytes: u64, len: u64) -> Result<u32, SsdError> {
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

/// A superblock of a slab that nothing is known of; `generation` is that of the one before it.
pub(super) fn new_superblock(slots: u32, generation: u64) -> Superblock {
    // `RandomState` takes its keys from the kernel's random numbers; good enough to tell two slabs apart.
    let random = || RandomState::new().hash_one(std::process::id()).to_le_bytes();
    let mut slab_id = [0; 16];
    slab_id[..8].copy_from_slice(&random());
    slab_id[8..].copy_from_slice(&random());
    Superblock {
        generation,
        slab_id,
        slots: u64::from(slots),
        used_end: 0,
        table_end: 0,
        clean: false,
        kept: false,
        hand: 0,
        next_sequence: 1,
        checkpoint: 0,
    }
}

/// Writes both copies of the superblock with the next generation, each on disk before the next is touched.
pub(super) fn mark(device: &Device, superblock: &mut Superblock, mark: Mark) -> io::Result<()> {
    superblock.generation += 1;
    superblock.clean = mark == Mark::Clean;
    superblock.kept = mark == Mark::Kept;
    let mut buf = AlignedBuf::zeroed(SECTOR_BYTES);
    buf.get_mut().copy_from_slice(&superblock.encode());
    for offset in format::SUPER_OFFSETS {
        device.write(offset, buf.get())?;
        device.sync()?;
    }
    Ok(())
}

/// What closing writes of the records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Extent {
    /// All of them, under a checkpoint that the superblock names: one that the device then loses is missed.
    All,
    /// What is not on the disk as it should be. For what is opened again at once, by whoever waits for it: a few sectors
    /// after a checkpoint, where all would be 64 bytes for each block held.
    Changed,
}

/// Writes the index to the slab and marks it clean last.
pub(super) fn close(
    device: &Device,
    superblock: &mut Superblock,
    index: &mut Index,
    extent: Extent,
) -> Result<(), SsdError> {
    // A number of its own for each try, so that records of one that failed half-way are not taken for this one's.
    superblock.generation += 1;
    // Named by the superblock `mark` is about to write.
    let checkpoint = superblock.generation + 1;
    let used_end = match extent {
        Extent::All => u64::from(index.used_end()),
        // Not lowered: what lies above was written as free.
        Extent::Changed => superblock.used_end.max(u64::from(index.used_end())),
    };
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
    if extent == Extent::All || used_end > superblock.used_end {
        // What lies between the old end and the new one may be from before the slab was last opened.
        let from = if extent == Extent::All { 0 } else { superblock.used_end / u64::from(RECORDS_A_SECTOR) };
        let end = used_end.div_ceil(u64::from(RECORDS_A_SECTOR));
        (from..end).for_each(|sector| index.touch_sector(sector as u32));
    }
    let mut buf = AlignedBuf::zeroed(format::GROUP_META_BYTES as usize);
    let mut next = index.next_changed(0);
    while let Some(first) = next {
        let end = index.changed_run(first, SECTORS_A_GROUP - first % SECTORS_A_GROUP);
        let area = &mut buf.get_mut()[..(end - first) as usize * SECTOR_BYTES];
        area.fill(0);
        for (sector, to) in (first..end).zip(area.chunks_mut(SECTOR_BYTES)) {
            index.take_sector(sector, superblock.next_sequence, checkpoint, |slot, record| {
                let at = (slot % RECORDS_A_SECTOR) as usize * RECORD_BYTES;
                record.encode(&superblock.slab_id, slot, &mut to[at..at + RECORD_BYTES]);
            });
        }
        let within = u64::from(first % SECTORS_A_GROUP) * SECTOR_BYTES as u64;
        let offset = format::group_meta_offset(first / SECTORS_A_GROUP) + within;
        let written = device.write(offset, area);
        // What the device has of it is not known, and so it is for those before: they were not synced.
        written.inspect_err(|_| index.touch_all()).map_err(|e| device.error("write slot metadata of", e))?;
        next = index.next_changed(end);
    }
    device.sync().inspect_err(|_| index.touch_all()).map_err(|e| device.error("sync", e))?;

    superblock.used_end = used_end;
    superblock.table_end = table_end;
    superblock.hand = u64::from(index.hand());
    superblock.next_sequence = superblock.next_sequence.wrapping_add(1);
    if extent == Extent::All {
        superblock.checkpoint = checkpoint;
    }
    mark(device, superblock, Mark::Clean).map_err(|e| device.error("write the superblock of", e))
}
