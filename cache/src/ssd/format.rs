//! What the slab looks like on disk: layout, records, checksums. Pure functions over bytes.
//!
//! ```text
//! offset          length      what
//! 0               4 KiB       superblock, copy A
//! 4 KiB           60 KiB      zero
//! 64 KiB          4 KiB       superblock, copy B
//! 68 KiB          60 KiB      zero
//! 128 KiB         2 MiB       storage table: 4096 entries of 512 bytes
//! 2 MiB+128 KiB   1 MiB       write-intent bitmap: 2048 chunks of 512 bytes
//! 3 MiB+128 KiB   896 KiB     zero
//! 4 MiB           …           groups
//!
//! a group:
//! 0               256 KiB     slot metadata: 4096 records of 64 bytes
//! 256 KiB         256 MiB     data: 4096 slots of 64 KiB, page p of a block at p * 4096
//! ```
//! The last group has its whole metadata area and as many data slots as fit. Groups rather than one metadata region for
//! the slab let it grow and shrink in place: slot `n` lies at the same offset whatever the slab's size.
//!
//! All integers are little-endian. Reserved bytes are zero. Every structure has a CRC-32C (Castagnoli, RFC 3720 B.4)
//! over all its bytes with the CRC field as zero; those of table entries, slot records and bitmap chunks are seeded with
//! the slab's random identity and their own position, so that leftovers of an earlier slab and misdirected writes are not
//! taken for records.
//!
//! ```text
//! superblock (4096)                    table entry (512)               slot record (64)
//!   0 [16] magic                         0 u32 CRC                       0 u32 CRC
//!  16 u32  version                       4 u16 own index                 4 u16 storage index
//!  20 u32  CRC                           6 u16 identity length           6 u16 pages written
//!  24 u64  generation                    8 u32 1: has a stamp            8 u16 pages valid (a subset)
//!  32 [16] slab identity                12 u32 reserved                 10 u16 1: referenced
//!  48 u32  block bytes                  16 u64 store: size in bytes     12 u32 CRC of the data
//!  52 u32  page bytes                   24 i64 store: mtime in ns       16 u64 block
//!  56 u32  record bytes                 32 i64 store: ctime in ns       24 u64 sequence
//!  60 u32  slots a group                40 u64 store: inode             32 u64 checkpoint
//!  64 u64  slots                        48 u64 store: device            40 u64 the entry's epoch
//!  72 u64  used end                     56 u64 epoch                    48 [16] reserved
//!  80 u64  table offset                 64 [448] identity, UTF-8
//!  88 u64  write-intent offset
//!  96 u64  groups offset                                                bitmap chunk (512)
//! 104 u32  table end                                                      0 u32 CRC
//! 108 u32  flags: 1 clean, 2 kept                                         4 [12] reserved
//! 112 u64  hand of the clock                                             16 [496] 3968 bits
//! 120 u64  next sequence
//! 128 u64  checkpoint
//! ```
//! An all-zero table entry or slot record is a free one. Records at or beyond `used end` and entries at or beyond
//! `table end` are never read. A chunk of the bitmap that is damaged, or all zero, has all of its bits set.
//!
//! **Three states.** *Clean*: closed; records and table are complete. *Kept* (flag 2): in use by a program that keeps
//! records and bitmap as below; recovery takes what they vouch for. *Neither*: in use by a program that does not; all it
//! holds is dropped. Programs before flag 2 take a kept slab for one of the last kind, and leave such a one behind.
//!
//! **What a record promises.** Its data is what the store held, unless the data's CRC says that the slot was used for
//! something else since, or the block's region (64 MiB of a storage) has its bit set. Hence:
//!
//! 1. Before a guest's write goes to a store, the region's bit is on the disk ([`super::intents`]).
//! 2. A bit is cleared by a checkpoint alone ([`super::checkpoint`]): no write to the region was under way when it began,
//!    none has come since, what was written before is durable *on the store* (else the store's loss of power would take
//!    back what the cache has), and every record that changed before has been rewritten and synced.
//! 3. A record belongs to an entry by index *and epoch*, a random number: an entry that is given to another storage, or
//!    whose storage changed behind our back, gets a new one, and no record of the old one counts any more. Regions are
//!    hashed from the identity and not from the index, so that a storage that moves to another index has the same bits.
//!
//! So any mixture of old and new records is true, in whatever order and however torn they reach the disk, and two
//! records of one block are both true. Records may be older than the data (the CRC tells) or newer; nothing orders
//! them but the sync before bits are cleared. What is not on record is lost, at the price of reading it again.
//!
//! **Order of writes.** Opening: table and bitmap are made valid, sync, superblock A as *kept*, sync, B the same, sync;
//! only then is the slab used. `used end` and `table end` are raised after all records and entries below them have been
//! written and synced. Closing: records and table of a new checkpoint (its number is the generation of the superblock that
//! will name it), sync (this also flushes the data slots), superblock A with the clean flag on, sync, B the same, sync.
//! Closing quickly, for a successor, writes the records that have changed, and the superblock keeps the checkpoint that it named.
//! The valid copy with the higher generation counts. Recovery itself writes a superblock that says the same as before;
//! slots that it drops are rewritten by the next checkpoint, which is also the first that may clear a bit.
//! A record whose checkpoint is below the superblock's is one that a device promised to write and did not: its slot
//! is dropped.
//!
//! **A slab that is given up** (its device failed an intent, an older program had it) goes on under a new random identity,
//! for which no record counts.

use super::Stamp;
use crate::types::{BLOCK_BYTES, PAGE_BYTES, PageMask};

pub(super) const MAGIC: [u8; 16] = *b"PRESTAGE-SSD\r\n\x1a\n";
pub(super) const VERSION: u32 = 1;

/// Unit of metadata I/O: the largest logical sector of today's drives, so direct I/O always accepts it.
pub(super) const SECTOR_BYTES: usize = 4096;
pub(super) const SUPER_OFFSETS: [u64; 2] = [0, 64 << 10];
pub(super) const TABLE_OFFSET: u64 = 128 << 10;
pub(super) const TABLE_ENTRIES: usize = 4096;
pub(super) const ENTRY_BYTES: usize = 512;
pub(super) const IDENTITY_BYTES: usize = 448;
pub(super) const INTENT_OFFSET: u64 = TABLE_OFFSET + (TABLE_ENTRIES * ENTRY_BYTES) as u64;
pub(super) const CHUNK_BYTES: usize = 512;
const CHUNK_HEADER_BYTES: usize = 16;
/// Bits of a chunk, in words of 64.
pub(super) const CHUNK_WORDS: usize = (CHUNK_BYTES - CHUNK_HEADER_BYTES) / 8;
pub(super) const INTENT_CHUNKS: usize = 2048;
pub(super) const CHUNKS_A_SECTOR: usize = SECTOR_BYTES / CHUNK_BYTES;
/// Pages of a region: 64 MiB. Smaller ones would cost more syncs, larger ones more blocks after a crash.
pub(super) const REGION_PAGES: u64 = (64 << 20) / PAGE_BYTES as u64;
pub(super) const GROUPS_OFFSET: u64 = 4 << 20;
pub(super) const GROUP_SLOTS: u32 = 4096;
pub(super) const RECORD_BYTES: usize = 64;
pub(super) const GROUP_META_BYTES: u64 = GROUP_SLOTS as u64 * RECORD_BYTES as u64;
pub(super) const GROUP_BYTES: u64 = GROUP_META_BYTES + GROUP_SLOTS as u64 * BLOCK_BYTES as u64;
/// Slot numbers are 32 bits wide with the last one as "none": 256 TiB of data.
pub(super) const MAX_SLOTS: u64 = u32::MAX as u64;
/// A block index and a storage index share 64 bits in the index. 2^48 blocks of 64 KiB are 16 EiB, all a 64-bit byte
/// offset can name.
pub(super) const MAX_BLOCK: u64 = (1 << 48) - 1;

/// Slots that fit into a slab of `size_bytes`.
pub(super) fn slots_in(size_bytes: u64) -> u64 {
    let room = size_bytes.saturating_sub(GROUPS_OFFSET);
    let rest = (room % GROUP_BYTES).saturating_sub(GROUP_META_BYTES) / BLOCK_BYTES as u64;
    ((room / GROUP_BYTES) * u64::from(GROUP_SLOTS) + rest).min(MAX_SLOTS)
}

/// Length of a slab with `slots` slots.
pub(super) fn slab_bytes(slots: u64) -> u64 {
    let slots = slots.min(MAX_SLOTS);
    GROUPS_OFFSET + slots.div_ceil(u64::from(GROUP_SLOTS)) * GROUP_META_BYTES + slots * BLOCK_BYTES as u64
}

pub(super) fn slot_offset(slot: u32) -> u64 {
    let group = u64::from(slot / GROUP_SLOTS);
    GROUPS_OFFSET + group * GROUP_BYTES + GROUP_META_BYTES + u64::from(slot % GROUP_SLOTS) * BLOCK_BYTES as u64
}

/// Where the metadata area of a group starts.
pub(super) fn group_meta_offset(group: u32) -> u64 {
    GROUPS_OFFSET + u64::from(group) * GROUP_BYTES
}

/// Sixteen random bytes that tell one incarnation of a slab from another.
pub(super) type SlabId = [u8; 16];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) generation: u64,
    pub(super) slab_id: SlabId,
    pub(super) slots: u64,
    pub(super) used_end: u64,
    pub(super) table_end: u32,
    pub(super) clean: bool,
    /// Records and bitmap are kept up to date while the slab is in use.
    pub(super) kept: bool,
    pub(super) hand: u64,
    pub(super) next_sequence: u64,
    pub(super) checkpoint: u64,
}

/// What one of the two places of a superblock holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Copy {
    Valid(Superblock),
    /// Ours (its magic is there, give or take a bit) but damaged.
    Damaged,
    Blank,
    OtherVersion(u32),
    Foreign,
}

/// A magic with at most this many bits wrong is still ours, damaged. Random bytes come this close once in 10^30.
const MAGIC_BITS_OFF: u32 = 4;

fn put<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    to[at..at + N].copy_from_slice(&bytes);
}

fn get<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&from[at..at + N]);
    bytes
}

fn get_u16(from: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(get(from, at))
}

fn get_u32(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(from, at))
}

fn get_u64(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(from, at))
}

/// CRC-32C of `bytes` with the four bytes at `at` taken as zero.
fn crc_without(bytes: &[u8], at: usize) -> u32 {
    let crc = crc32c::crc32c(&bytes[..at]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[at + 4..])
}

/// CRC-32C of a structure that begins with it: of the slab's identity, the structure's kind and position, and its bytes
/// with the first four taken as zero. Millions of them are checked at a start: two calls, not one for every part.
fn crc_of(slab_id: &SlabId, kind: u8, position: u64, bytes: &[u8]) -> u32 {
    let mut head = [0; 16 + 1 + 8 + 4];
    put(&mut head, 0, *slab_id);
    put(&mut head, 16, [kind]);
    put(&mut head, 17, position.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&head), &bytes[4..])
}

impl Superblock {
    pub(super) fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut to = [0; SECTOR_BYTES];
        put(&mut to, 0, MAGIC);
        put(&mut to, 16, VERSION.to_le_bytes());
        put(&mut to, 24, self.generation.to_le_bytes());
        put(&mut to, 32, self.slab_id);
        put(&mut to, 48, (BLOCK_BYTES as u32).to_le_bytes());
        put(&mut to, 52, (PAGE_BYTES as u32).to_le_bytes());
        put(&mut to, 56, (RECORD_BYTES as u32).to_le_bytes());
        put(&mut to, 60, GROUP_SLOTS.to_le_bytes());
        put(&mut to, 64, self.slots.to_le_bytes());
        put(&mut to, 72, self.used_end.to_le_bytes());
        put(&mut to, 80, TABLE_OFFSET.to_le_bytes());
        put(&mut to, 88, INTENT_OFFSET.to_le_bytes());
        put(&mut to, 96, GROUPS_OFFSET.to_le_bytes());
        put(&mut to, 104, self.table_end.to_le_bytes());
        put(&mut to, 108, (u32::from(self.clean) | u32::from(self.kept) << 1).to_le_bytes());
        put(&mut to, 112, self.hand.to_le_bytes());
        put(&mut to, 120, self.next_sequence.to_le_bytes());
        put(&mut to, 128, self.checkpoint.to_le_bytes());
        let crc = crc_without(&to, 20);
        put(&mut to, 20, crc.to_le_bytes());
        to
    }

    /// `sector`: 4096 bytes, or fewer where the file ends early.
    pub(super) fn decode(sector: &[u8]) -> Copy {
        if sector.iter().all(|b| *b == 0) {
            return Copy::Blank;
        }
        if sector.len() < SECTOR_BYTES {
            // The first write to a new slab, cut off.
            return if sector.starts_with(&MAGIC) { Copy::Damaged } else { Copy::Foreign };
        }
        let sector = &sector[..SECTOR_BYTES];
        let bits_off: u32 = sector.iter().zip(MAGIC).map(|(a, b)| (a ^ b).count_ones()).sum();
        if bits_off > MAGIC_BITS_OFF {
            return Copy::Foreign;
        }
        let version = get_u32(sector, 16);
        if bits_off == 0 && crc_without(sector, 20) == get_u32(sector, 20) && version == VERSION {
            return Superblock::decode_valid(sector).map_or(Copy::Damaged, Copy::Valid);
        }
        let mut as_ours = [0; SECTOR_BYTES];
        as_ours.copy_from_slice(sector);
        put(&mut as_ours, 0, MAGIC);
        put(&mut as_ours, 16, VERSION.to_le_bytes());
        // Another version may well have its CRC elsewhere, so its number is believed without one, unless it is the
        // number itself that rotted.
        let rotted = version == VERSION || crc_without(&as_ours, 20) == get_u32(sector, 20);
        if rotted { Copy::Damaged } else { Copy::OtherVersion(version) }
    }

    fn decode_valid(sector: &[u8]) -> Option<Superblock> {
        let geometry = [
            (u64::from(get_u32(sector, 48)), BLOCK_BYTES as u64),
            (u64::from(get_u32(sector, 52)), PAGE_BYTES as u64),
            (u64::from(get_u32(sector, 56)), RECORD_BYTES as u64),
            (u64::from(get_u32(sector, 60)), u64::from(GROUP_SLOTS)),
            (get_u64(sector, 80), TABLE_OFFSET),
            (get_u64(sector, 88), INTENT_OFFSET),
            (get_u64(sector, 96), GROUPS_OFFSET),
        ];
        if geometry.iter().any(|(found, expected)| found != expected) {
            return None;
        }
        let found = Superblock {
            generation: get_u64(sector, 24),
            slab_id: get(sector, 32),
            slots: get_u64(sector, 64),
            used_end: get_u64(sector, 72),
            table_end: get_u32(sector, 104),
            clean: get_u32(sector, 108) & 1 == 1,
            kept: get_u32(sector, 108) & 2 == 2,
            hand: get_u64(sector, 112),
            next_sequence: get_u64(sector, 120),
            checkpoint: get_u64(sector, 128),
        };
        let sane = found.slots <= MAX_SLOTS
            && found.used_end <= found.slots
            && found.table_end as usize <= TABLE_ENTRIES
            && found.checkpoint <= found.generation
            // Room for more generations than any machine will write: adding to it cannot overflow.
            && found.generation < u64::MAX / 2;
        sane.then_some(found)
    }
}

/// A table entry or a slot record as found on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found<T> {
    Free,
    Valid(T),
    Damaged,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TableEntry {
    pub(super) identity: String,
    pub(super) stamp: Option<Stamp>,
    /// Records of another one are not this storage's.
    pub(super) epoch: u64,
}

impl TableEntry {
    /// `to`: 512 zero bytes. The identity has been checked to fit.
    pub(super) fn encode(&self, slab_id: &SlabId, index: u16, to: &mut [u8]) {
        let identity = self.identity.as_bytes();
        let len = identity.len().min(IDENTITY_BYTES);
        put(to, 4, index.to_le_bytes());
        put(to, 6, (len as u16).to_le_bytes());
        put(to, 8, u32::from(self.stamp.is_some()).to_le_bytes());
        let stamp = self.stamp.unwrap_or_default();
        put(to, 16, stamp.size_bytes.to_le_bytes());
        put(to, 24, stamp.mtime_ns.to_le_bytes());
        put(to, 32, stamp.ctime_ns.to_le_bytes());
        put(to, 40, stamp.inode.to_le_bytes());
        put(to, 48, stamp.device.to_le_bytes());
        put(to, 56, self.epoch.to_le_bytes());
        to[64..64 + len].copy_from_slice(&identity[..len]);
        let crc = crc_of(slab_id, b'T', u64::from(index), &to[..ENTRY_BYTES]);
        put(to, 0, crc.to_le_bytes());
    }

    /// `from`: 512 bytes.
    pub(super) fn decode(slab_id: &SlabId, index: u16, from: &[u8]) -> Found<TableEntry> {
        let from = &from[..ENTRY_BYTES];
        if from.iter().all(|b| *b == 0) {
            return Found::Free;
        }
        let len = usize::from(get_u16(from, 6));
        let crc = crc_of(slab_id, b'T', u64::from(index), from);
        if crc != get_u32(from, 0) || get_u16(from, 4) != index || len == 0 || len > IDENTITY_BYTES {
            return Found::Damaged;
        }
        let Ok(identity) = std::str::from_utf8(&from[64..64 + len]) else {
            return Found::Damaged;
        };
        let stamp = (get_u32(from, 8) & 1 == 1).then(|| Stamp {
            size_bytes: get_u64(from, 16),
            mtime_ns: i64::from_le_bytes(get(from, 24)),
            ctime_ns: i64::from_le_bytes(get(from, 32)),
            inode: get_u64(from, 40),
            device: get_u64(from, 48),
        });
        Found::Valid(TableEntry { identity: identity.to_owned(), stamp, epoch: get_u64(from, 56) })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlotRecord {
    pub(super) storage: u16,
    pub(super) block: u64,
    pub(super) written: PageMask,
    pub(super) valid: PageMask,
    pub(super) referenced: bool,
    pub(super) checksum: u32,
    pub(super) sequence: u64,
    pub(super) checkpoint: u64,
    pub(super) epoch: u64,
}

impl SlotRecord {
    /// `to`: 64 zero bytes.
    pub(super) fn encode(&self, slab_id: &SlabId, slot: u32, to: &mut [u8]) {
        put(to, 4, self.storage.to_le_bytes());
        put(to, 6, self.written.0.to_le_bytes());
        put(to, 8, self.valid.0.to_le_bytes());
        put(to, 10, u16::from(self.referenced).to_le_bytes());
        put(to, 12, self.checksum.to_le_bytes());
        put(to, 16, self.block.to_le_bytes());
        put(to, 24, self.sequence.to_le_bytes());
        put(to, 32, self.checkpoint.to_le_bytes());
        put(to, 40, self.epoch.to_le_bytes());
        let crc = crc_of(slab_id, b'S', u64::from(slot), &to[..RECORD_BYTES]);
        put(to, 0, crc.to_le_bytes());
    }

    /// `from`: 64 bytes.
    pub(super) fn decode(slab_id: &SlabId, slot: u32, from: &[u8]) -> Found<SlotRecord> {
        let from = &from[..RECORD_BYTES];
        if from.iter().all(|b| *b == 0) {
            return Found::Free;
        }
        if crc_of(slab_id, b'S', u64::from(slot), from) != get_u32(from, 0) {
            return Found::Damaged;
        }
        let found = SlotRecord {
            storage: get_u16(from, 4),
            written: PageMask(get_u16(from, 6)),
            valid: PageMask(get_u16(from, 8)),
            referenced: get_u16(from, 10) & 1 == 1,
            checksum: get_u32(from, 12),
            block: get_u64(from, 16),
            sequence: get_u64(from, 24),
            checkpoint: get_u64(from, 32),
            epoch: get_u64(from, 40),
        };
        let sane = !found.valid.is_empty() && found.written.contains(found.valid) && found.block <= MAX_BLOCK;
        if sane { Found::Valid(found) } else { Found::Damaged }
    }
}

/// Bits of one chunk of the write-intent bitmap.
pub(super) type ChunkBits = [u64; CHUNK_WORDS];

/// `to`: 512 zero bytes.
pub(super) fn encode_chunk(slab_id: &SlabId, chunk: usize, bits: &[u64], to: &mut [u8]) {
    let (words, _) = to[CHUNK_HEADER_BYTES..CHUNK_BYTES].as_chunks_mut();
    words.iter_mut().zip(bits).for_each(|(to, word)| *to = word.to_le_bytes());
    let crc = crc_of(slab_id, b'I', chunk as u64, &to[..CHUNK_BYTES]);
    put(to, 0, crc.to_le_bytes());
}

/// `from`: 512 bytes. `None`: damaged, or never written.
pub(super) fn decode_chunk(slab_id: &SlabId, chunk: usize, from: &[u8]) -> Option<ChunkBits> {
    let from = &from[..CHUNK_BYTES];
    if crc_of(slab_id, b'I', chunk as u64, from) != get_u32(from, 0) {
        return None;
    }
    let mut bits = [0; CHUNK_WORDS];
    let (words, _) = from[CHUNK_HEADER_BYTES..].as_chunks();
    bits.iter_mut().zip(words).for_each(|(word, from)| *word = u64::from_le_bytes(*from));
    Some(bits)
}

/// Where the regions of a storage begin in the bitmap: region `r` has the bit that lies `r` further on, round the end.
/// Neighbours share a chunk, so that a guest that writes much sets many bits with one write.
pub(super) fn first_region_bit(identity: &str) -> u64 {
    u64::from(crc32c::crc32c(identity.as_bytes()))
}

/// CRC-32C of a slot's data: of (storage index, block, mask), so that the right bytes in the wrong slot do not pass,
/// then of the pages of `mask` in ascending order.
///
/// `block_bytes`: 64 KiB with page `p` at `p * 4096`.
pub(super) fn data_checksum(storage: u16, block: u64, mask: PageMask, block_bytes: &[u8]) -> u32 {
    let mut key = [0; 12];
    put(&mut key, 0, storage.to_le_bytes());
    put(&mut key, 2, mask.0.to_le_bytes());
    put(&mut key, 4, block.to_le_bytes());
    mask.runs().fold(crc32c::crc32c(&key), |crc, (first, count)| {
        let start = first as usize * PAGE_BYTES;
        let pages = block_bytes.get(start..start + count as usize * PAGE_BYTES);
        debug_assert!(pages.is_some(), "a block is 64 KiB");
        crc32c::crc32c_append(crc, pages.unwrap_or_default())
    })
}
