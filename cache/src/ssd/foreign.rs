//! Telling an unused file or device from one that holds something: the tier never overwrites what it did not write.

use super::device::{AlignedBuf, Device};
use super::format::SECTOR_BYTES;
use super::{SsdError, format};

/// Signatures at the start. Where they are: util-linux `libblkid/src/superblocks`, and each format's own specification.
const AT_START: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"XFSB", "an XFS file system"),
    (512, b"LABELONE", "an LVM physical volume"),
    (512, b"EFI PART", "a GPT partition table"),
    (1080, b"\x53\xef", "an ext2/3/4 file system"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an md array"),
    (4096, b"EFI PART", "a GPT partition table"),
    (4086, b"SWAPSPACE2", "swap space"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    // Last: other formats leave room for a boot sector too.
    (510, b"\x55\xaa", "a partition table or boot sector"),
];

/// Signatures at the end: distance of the last possible place from the end is a multiple of the step.
const AT_END: &[(usize, &[u8], &str)] = &[
    (512, b"EFI PART", "a GPT partition table's backup"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an md array"),
    (1024, b"\x0c\xb1\xba\x00\x00\x00\x00\x00", "a member of a ZFS pool"),
];

/// What is looked at: beyond every file system's first superblock, and the two last ZFS labels.
const START_BYTES: usize = 2 << 20;
const END_BYTES: u64 = 1 << 20;

/// `Ok` if a file or device without a superblock of ours may be overwritten.
pub(super) fn require_blank(device: &Device, len: u64) -> Result<(), SsdError> {
    let foreign = |found: &str| {
        let (path, remedy) = (device.path.clone(), device.remedy());
        Err(SsdError::Foreign { path, found: found.to_owned(), remedy })
    };
    if len == 0 || !device.has_data() {
        return Ok(());
    }
    let mut buf = AlignedBuf::zeroed(START_BYTES);
    device.read(0, buf.get_mut()).map_err(|e| device.error("read the start of", e))?;
    let start = buf.get();
    if start.iter().any(|b| *b != 0) {
        return foreign(name_of(start));
    }
    if !device.is_block_device {
        // All of it was looked at: what is left when a crash cut off the making of a slab.
        return if len <= START_BYTES as u64 { Ok(()) } else { foreign("data after leading zeros") };
    }
    // A device keeps old data slots of ours when its start is erased: at its end only signatures count.
    let from = len.saturating_sub(END_BYTES) / SECTOR_BYTES as u64 * SECTOR_BYTES as u64;
    let mut buf = AlignedBuf::zeroed(((len - from) as usize).next_multiple_of(SECTOR_BYTES));
    let read = device.read(from, buf.get_mut()).map_err(|e| device.error("read the end of", e))?;
    let end = &buf.get()[..read];
    for (step, signature, name) in AT_END {
        if end.chunks(*step).any(|place| place.starts_with(signature)) {
            return foreign(name);
        }
    }
    Ok(())
}

/// `Ok` if the gaps around the superblocks are as they were left: other formats put their own superblocks there, and
/// not all of them erase ours.
pub(super) fn require_gaps(device: &Device) -> Result<(), SsdError> {
    let mut buf = AlignedBuf::zeroed(format::TABLE_OFFSET as usize);
    device.read_what_can_be(0, buf.get_mut());
    let sectors = buf.get().chunks(SECTOR_BYTES).enumerate();
    let mut gaps = sectors.filter(|(i, _)| !format::SUPER_OFFSETS.contains(&((i * SECTOR_BYTES) as u64)));
    // A sector of ones is one that cannot be read.
    if gaps.any(|(_, sector)| sector != [0; SECTOR_BYTES] && sector != [0xff; SECTOR_BYTES]) {
        let found = format!("{}, written over an SSD tier", name_of(buf.get()));
        return Err(SsdError::Foreign { path: device.path.clone(), found, remedy: device.remedy() });
    }
    Ok(())
}

/// What the start of a file or device looks like.
pub(super) fn name_of(start: &[u8]) -> &'static str {
    let mut known =
        AT_START.iter().filter(|(at, signature, _)| start.get(*at..).is_some_and(|s| s.starts_with(signature)));
    known.next().map_or("unknown data", |(_, _, name)| name)
}
