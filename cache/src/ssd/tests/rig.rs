//! A slab on a simulated device with one store of a few hundred blocks, whose records fill several sectors.

use super::sim::{Disk, Image, Simulated};
use crate::ssd::checkpoint::Step;
use crate::ssd::device::Device;
use crate::ssd::open::Standing;
use crate::ssd::own::OwnWrites;
use crate::ssd::{Outcome, ResizeStep, SlotWrite, SsdOptions, SsdStorage, SsdTier, format, open};
use crate::types::{BLOCK_BYTES, BlockIndex, PAGE_BYTES, PAGES_PER_BLOCK, PageMask};
use std::sync::Arc;
use std::task::{Context, Waker};

/// Slots that the slab has at most; its records are in five sectors.
pub(super) const MOST: u64 = 260;
pub(super) const BLOCKS: u64 = 250;
/// What is cached of each block.
pub(super) const FIRST: PageMask = PageMask(1);

/// A block of the store has the next version. It is durable there at once.
pub(super) type Wrote = u64;

pub(super) struct Slab {
    pub(super) disk: Arc<Disk<Wrote>>,
    pub(super) tier: SsdTier,
    pub(super) storage: SsdStorage,
    pub(super) versions: Vec<u64>,
}

pub(super) fn device(disk: &Arc<Disk<Wrote>>, is_block_device: bool) -> Device {
    let mut device = Device::simulated(Arc::clone(disk) as _);
    device.is_block_device = is_block_device;
    device
}

pub(super) fn content(block: u64, version: u64) -> Vec<u8> {
    [block + 1, version].iter().cycle().take(PAGE_BYTES / 8).flat_map(|word| word.to_le_bytes()).collect()
}

pub(super) fn open_slab(disk: &Arc<Disk<Wrote>>, is_block_device: bool, slots: u64) -> (SsdTier, SsdStorage) {
    let (tier, storage) = open_unread(disk, is_block_device, slots);
    tier.load();
    (tier, storage)
}

/// With no record read yet.
pub(super) fn open_unread(disk: &Arc<Disk<Wrote>>, is_block_device: bool, slots: u64) -> (SsdTier, SsdStorage) {
    let device = device(disk, is_block_device);
    let opened = open::open(&device, format::slab_bytes(slots), false, |_| Standing::Ours).unwrap();
    let tier = SsdTier::made_of(device, opened, OwnWrites::saying(true), SsdOptions::default());
    let storage = tier.storage("file:/store", None).unwrap();
    (tier, storage)
}

/// Blocks that are served, each of which must be what the store has.
pub(super) fn served(disk: &Disk<Wrote>, tier: &SsdTier, storage: SsdStorage, versions: &[u64], what: &str) -> usize {
    let (mut count, mut bytes) = (0, vec![0; BLOCK_BYTES]);
    for block in 0..BLOCKS {
        let Some(read) = tier.begin_read(storage, BlockIndex(block)) else { continue };
        disk.read(read.offset(), &mut bytes[..PAGE_BYTES]).unwrap();
        let good = read.verify(&bytes);
        if tier.end_read(read, if good { Outcome::Good } else { Outcome::BadChecksum }).is_empty() {
            continue;
        }
        let found = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        assert!(
            bytes[..PAGE_BYTES] == content(block, versions[block as usize]),
            "{what}: block {block} as of version {found}"
        );
        count += 1;
    }
    count
}

impl Slab {
    pub(super) fn insert(&mut self, blocks: std::ops::Range<u64>) {
        for block in blocks {
            let Some(write) = self.tier.begin_insert(self.storage, BlockIndex(block), FIRST) else { continue };
            let sum = self.fill(&write, block);
            self.tier.finish_insert(write, sum, true);
        }
    }

    /// Writes a slot. Returns its checksum.
    pub(super) fn fill(&self, write: &SlotWrite, block: u64) -> u32 {
        let mut bytes = content(block, self.versions[block as usize]);
        self.disk.write(write.offset(), &bytes).unwrap();
        bytes.resize(BLOCK_BYTES, 0);
        write.checksum(&bytes)
    }

    /// A guest writes whole blocks.
    pub(super) fn write(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            let mut write = self.tier.begin_write(self.storage, block * PAGES_PER_BLOCK, PAGES_PER_BLOCK);
            while self.tier.write_intents() {}
            assert!(write.poll_ready(&mut Context::from_waker(Waker::noop())).is_ready());
            write.submit();
            self.versions[block as usize] += 1;
            self.disk.note(block);
            write.end();
        }
    }

    /// So many checkpoints: the first one that begins after a write is over clears its region. Returns how many regions were cleared.
    pub(super) fn checkpoints(&mut self, count: u32) -> u64 {
        (0..count).map(|_| self.checkpoint()).sum()
    }

    pub(super) fn checkpoint(&mut self) -> u64 {
        let Some(mut checkpoint) = self.tier.begin_checkpoint() else { return 0 };
        loop {
            if let Step::Done { cleared } = checkpoint.step().unwrap() {
                return cleared;
            }
        }
    }

    pub(super) fn resize(&mut self, slots: u64) {
        let mut resize = self.tier.begin_resize(format::slab_bytes(slots)).unwrap();
        for _ in 0..1000 {
            match resize.step().unwrap() {
                ResizeStep::Done => return,
                ResizeStep::More => {}
                ResizeStep::Held { slots } => panic!("{slots} slots are held by nobody"),
            }
        }
        panic!("it does not end");
    }
}

pub(super) fn history(is_block_device: bool) -> (Slab, Image) {
    let before = Image::of_len(if is_block_device { format::slab_bytes(MOST) } else { 0 });
    let disk = Disk::new(before.clone());
    let (tier, storage) = open_slab(&disk, is_block_device, MOST);
    (Slab { disk, tier, storage, versions: vec![0; BLOCKS as usize] }, before)
}
