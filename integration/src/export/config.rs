//! What the guest sees of a disk: [`DiskConfig`], the feature bits that follow from it, and the virtio-blk
//! configuration space (VIRTIO 1.3, 5.2.4) as bytes.

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Unit of the virtio-blk wire format, whatever the disk's block size.
pub const SECTOR_BYTES: u64 = 512;
/// Longest serial that GET_ID can carry.
pub const SERIAL_MAX_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Largest ring accepted: QEMU's own limit (`VIRTQUEUE_MAX_SIZE`), and it bounds the work of one chain.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// SET_VRING_KICK and its kind carry the ring index in 8 bits.
pub const NUM_QUEUES_MAX: u16 = 256;

/// Ranges in one discard or write-zeroes request. Linux merges up to this many.
pub(super) const RANGES_MAX: u32 = 16;
/// 2 GiB: long enough that mkfs discards a disk in a few requests.
pub(super) const DISCARD_MAX_SECTORS: u32 = 1 << 22;
/// 64 MiB: a store without a zeroing call has to write these bytes, and other requests wait meanwhile.
pub(super) const WRITE_ZEROES_MAX_SECTORS: u32 = 1 << 17;
/// Bit 30 of the features: the front-end may negotiate protocol features (vhost-user, not virtio).
pub(super) const F_PROTOCOL_FEATURES: u32 = 30;

/// What the guest sees. FLUSH is always offered; the cache mode is write-through and not for the guest to choose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskConfig {
    /// Size of the disk: a multiple of 512, not 0.
    pub capacity_bytes: u64,
    /// Logical block: a power of two, 512 ..= 4096. Guests boot from 512; default 512.
    pub block_bytes: u32,
    /// Physical block: a power of two, `block_bytes` ..= 64 KiB. Guests align partitions to it; default 4096.
    pub physical_block_bytes: u32,
    /// Preferred size of large requests; 0 leaves it to the guest. A multiple of `block_bytes`. Default 64 KiB.
    pub optimal_io_bytes: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Answer to GET_ID, at most 20 bytes of printable ASCII; `/dev/disk/by-id/virtio-<serial>` in a Linux guest.
    pub serial: String,
    /// Rings offered, 1 ..= 256. An upper bound: QEMU asks for one a vCPU and refuses to start the VM when fewer are
    /// offered, and an unused ring costs nothing. Default 256.
    pub num_queues: u16,
    /// Largest ring accepted: a power of two, 4 ..= 1024. Default 1024 (QEMU asks for 128 unless told otherwise).
    pub queue_size: u16,
    /// Data segments in one request, 1 ..= `queue_size` - 2. Default 126, which fits QEMU's rings of 128 entries.
    pub seg_max: u32,
    /// Offer DISCARD.
    pub discard: bool,
    /// Offer WRITE_ZEROES (with unmap).
    pub write_zeroes: bool,
}

/// A disk that cannot be offered to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("disk configuration: {field} is {value}; it must be {expected}")]
pub struct ConfigError {
    /// Field of [`DiskConfig`].
    pub field: &'static str,
    /// What it holds.
    pub value: String,
    /// What it may hold.
    pub expected: &'static str,
}

impl DiskConfig {
    /// A writable disk of this size with every other field at its default and an empty serial.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            block_bytes: 512,
            physical_block_bytes: 4096,
            optimal_io_bytes: 64 << 10,
            read_only: false,
            serial: String::new(),
            num_queues: NUM_QUEUES_MAX,
            queue_size: QUEUE_SIZE_MAX,
            seg_max: 126,
            discard: true,
            write_zeroes: true,
        }
    }

    /// Checks every field against its documented range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |ok: bool, field, value: String, expected| {
            if ok { Ok(()) } else { Err(ConfigError { field, value, expected }) }
        };
        let Self { capacity_bytes, block_bytes, physical_block_bytes, optimal_io_bytes, .. } = *self;
        check_capacity(capacity_bytes)?;
        check(
            block_bytes.is_power_of_two() && (512..=4096).contains(&block_bytes),
            "block_bytes",
            block_bytes.to_string(),
            "a power of two from 512 to 4096",
        )?;
        check(
            physical_block_bytes.is_power_of_two() && (block_bytes..=64 << 10).contains(&physical_block_bytes),
            "physical_block_bytes",
            physical_block_bytes.to_string(),
            "a power of two from block_bytes to 65536",
        )?;
        check(
            optimal_io_bytes.is_multiple_of(block_bytes),
            "optimal_io_bytes",
            optimal_io_bytes.to_string(),
            "a multiple of block_bytes",
        )?;
        check(
            self.serial.len() <= SERIAL_MAX_BYTES && self.serial.bytes().all(|b| b.is_ascii_graphic()),
            "serial",
            format!("{:?}", self.serial),
            "at most 20 printable ASCII characters without spaces",
        )?;
        check(
            (1..=NUM_QUEUES_MAX).contains(&self.num_queues),
            "num_queues",
            self.num_queues.to_string(),
            "from 1 to 256",
        )?;
        check(
            self.queue_size.is_power_of_two() && (4..=QUEUE_SIZE_MAX).contains(&self.queue_size),
            "queue_size",
            self.queue_size.to_string(),
            "a power of two from 4 to 1024",
        )?;
        check(
            (1..=u32::from(self.queue_size) - 2).contains(&self.seg_max),
            "seg_max",
            self.seg_max.to_string(),
            "from 1 to queue_size - 2",
        )
    }

    /// Virtio features offered, with vhost-user's bit 30.
    pub(super) fn features(&self) -> u64 {
        let bits = [
            (VIRTIO_F_VERSION_1, true),
            (VIRTIO_RING_F_EVENT_IDX, true),
            (VIRTIO_RING_F_INDIRECT_DESC, true),
            (F_PROTOCOL_FEATURES, true),
            (VIRTIO_BLK_F_SEG_MAX, true),
            (VIRTIO_BLK_F_BLK_SIZE, true),
            (VIRTIO_BLK_F_TOPOLOGY, true),
            (VIRTIO_BLK_F_FLUSH, true),
            (VIRTIO_BLK_F_MQ, self.num_queues > 1),
            (VIRTIO_BLK_F_RO, self.read_only),
            (VIRTIO_BLK_F_DISCARD, self.discard && !self.read_only),
            (VIRTIO_BLK_F_WRITE_ZEROES, self.write_zeroes && !self.read_only),
        ];
        bits.iter().filter(|(_, on)| *on).fold(0, |all, (bit, _)| all | 1 << bit)
    }

    /// The configuration space for a disk that now holds `capacity_bytes`, little-endian, zeroes to the end.
    ///
    /// ```text
    /// 0  capacity (sectors) u64   8 size_max u32   12 seg_max u32   16 geometry u32   20 blk_size u32
    /// 24 physical_block_exp u8   25 alignment_offset u8   26 min_io_size u16   28 opt_io_size u32 (blocks)
    /// 32 writeback u8   33 unused   34 num_queues u16
    /// 36 max_discard_sectors u32   40 max_discard_seg u32   44 discard_sector_alignment u32
    /// 48 max_write_zeroes_sectors u32   52 max_write_zeroes_seg u32   56 write_zeroes_may_unmap u8
    /// ```
    pub(super) fn config_space(&self, capacity_bytes: u64) -> [u8; CONFIG_SPACE_BYTES] {
        let mut space = [0; CONFIG_SPACE_BYTES];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(capacity_bytes / SECTOR_BYTES).to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.block_bytes.to_le_bytes());
        // Both are powers of two and the physical block is the larger: validate().
        put(24, &[(self.physical_block_bytes / self.block_bytes).trailing_zeros() as u8]);
        put(26, &((self.physical_block_bytes / self.block_bytes) as u16).to_le_bytes());
        put(28, &(self.optimal_io_bytes / self.block_bytes).to_le_bytes());
        put(34, &self.num_queues.to_le_bytes());
        if self.discard && !self.read_only {
            put(36, &DISCARD_MAX_SECTORS.to_le_bytes());
            put(40, &RANGES_MAX.to_le_bytes());
            put(44, &(self.physical_block_bytes / SECTOR_BYTES as u32).to_le_bytes());
        }
        if self.write_zeroes && !self.read_only {
            put(48, &WRITE_ZEROES_MAX_SECTORS.to_le_bytes());
            put(52, &RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    /// GET_ID's answer: the serial, padded with zeroes.
    pub(super) fn serial_bytes(&self) -> [u8; SERIAL_MAX_BYTES] {
        let mut id = [0; SERIAL_MAX_BYTES];
        for (to, from) in id.iter_mut().zip(self.serial.bytes()) {
            *to = from;
        }
        id
    }
}

/// VHOST_USER_CONFIG payloads reach up to this size; the fields past the drawing are zero.
pub(super) const CONFIG_SPACE_BYTES: usize = 256;

pub(super) fn check_capacity(capacity_bytes: u64) -> Result<(), ConfigError> {
    if capacity_bytes > 0 && capacity_bytes.is_multiple_of(SECTOR_BYTES) {
        return Ok(());
    }
    Err(ConfigError {
        field: "capacity_bytes",
        value: capacity_bytes.to_string(),
        expected: "a multiple of 512 above 0",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_space_says_what_the_config_says() {
        let disk = DiskConfig { optimal_io_bytes: 1 << 20, num_queues: 3, ..DiskConfig::new(1 << 30) };
        let space = disk.config_space(disk.capacity_bytes);
        assert_eq!(u64::from_le_bytes(space[0..8].try_into().unwrap()), 1 << 21);
        assert_eq!(u32::from_le_bytes(space[12..16].try_into().unwrap()), 126);
        assert_eq!(u32::from_le_bytes(space[20..24].try_into().unwrap()), 512);
        assert_eq!(space[24], 3);
        assert_eq!(u32::from_le_bytes(space[28..32].try_into().unwrap()), 2048);
        assert_eq!(u16::from_le_bytes(space[34..36].try_into().unwrap()), 3);
        assert_eq!(u32::from_le_bytes(space[36..40].try_into().unwrap()), DISCARD_MAX_SECTORS);
        assert_eq!(space[56], 1);
        assert!(space[60..].iter().all(|b| *b == 0));
    }

    #[test]
    fn read_only_disk_offers_no_way_to_change_it() {
        let disk = DiskConfig { read_only: true, ..DiskConfig::new(4096) };
        assert_ne!(disk.features() & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(disk.features() & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert!(disk.config_space(4096)[36..60].iter().all(|b| *b == 0));
    }

    #[test]
    fn each_field_out_of_range_is_named() {
        let good = DiskConfig::new(1 << 20);
        assert_eq!(good.validate(), Ok(()));
        for (field, bad) in [
            ("capacity_bytes", DiskConfig { capacity_bytes: 0, ..good.clone() }),
            ("capacity_bytes", DiskConfig { capacity_bytes: 1000, ..good.clone() }),
            ("block_bytes", DiskConfig { block_bytes: 0, ..good.clone() }),
            ("block_bytes", DiskConfig { block_bytes: 8192, ..good.clone() }),
            ("physical_block_bytes", DiskConfig { physical_block_bytes: 256, ..good.clone() }),
            ("optimal_io_bytes", DiskConfig { optimal_io_bytes: 700, ..good.clone() }),
            ("serial", DiskConfig { serial: "123456789012345678901".into(), ..good.clone() }),
            ("serial", DiskConfig { serial: "a b".into(), ..good.clone() }),
            ("num_queues", DiskConfig { num_queues: 0, ..good.clone() }),
            ("num_queues", DiskConfig { num_queues: 257, ..good.clone() }),
            ("queue_size", DiskConfig { queue_size: 0, ..good.clone() }),
            ("queue_size", DiskConfig { queue_size: 100, ..good.clone() }),
            ("queue_size", DiskConfig { queue_size: 2048, ..good.clone() }),
            ("seg_max", DiskConfig { seg_max: 0, ..good.clone() }),
            ("seg_max", DiskConfig { seg_max: 1023, ..good.clone() }),
        ] {
            assert_eq!(bad.validate().map_err(|e| e.field), Err(field));
        }
    }
}
