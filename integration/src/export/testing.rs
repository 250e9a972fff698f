//! A guest for tests: memory in memfds, and a virtio driver that writes a split ring into it, well-formed or not.
//!
//! Three regions: `LOW` and `NEXT` touch each other in guest-physical addresses (their files are apart), `HIGH` lies
//! above 4 GiB. The ring is at the start of `LOW`; buffers are for the tests to place.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed assumption of a test is a failed test"
)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::config::DiskConfig;
use super::events::EventSlot;
use super::inflight::InflightRegion;
use super::memory::{GuestMemory, MemoryCell, RegionSpec};
use super::queue::{DiskState, Queue, QueueParts, QueueStartError};
use super::ring::RingAddresses;

pub(super) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

pub(super) const REGION_BYTES: u64 = 1 << 20;
pub(super) const LOW: u64 = 0x10_0000;
pub(super) const ADJACENT: u64 = LOW + REGION_BYTES;
pub(super) const HIGH: u64 = 1 << 32;
/// Free for buffers from here on, in `LOW`.
pub(super) const BUFFERS: u64 = LOW + 0x1_0000;

/// Front-end addresses: somewhere else, in another order.
const REGIONS: [(u64, u64); 3] = [(LOW, 0x7f00_0000_0000), (ADJACENT, 0x7e00_0000_0000), (HIGH, 0x7f00_0010_0000)];

const DESCRIPTORS: u64 = LOW;
pub(super) const AVAILABLE: u64 = LOW + 0x5000;
const USED: u64 = LOW + 0x6000;

/// One descriptor as the driver writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Desc {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) fn memory_file(bytes: u64) -> File {
    let file = File::from(memfd_create(c"test-guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    file
}

pub(super) fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

fn fd(event: &EventFd) -> OwnedFd {
    use std::os::fd::AsFd;
    event.as_fd().try_clone_to_owned().unwrap()
}

#[derive(Debug)]
pub(super) struct Driver {
    files: Vec<File>,
    pub(super) memory: Arc<MemoryCell>,
    pub(super) disk: Arc<DiskState>,
    pub(super) size: u16,
    pub(super) features: u64,
    pub(super) inflight: Option<Arc<InflightRegion>>,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) err: EventFd,
    available: u16,
    used: u16,
}

impl Driver {
    pub(super) fn new(size: u16, config: DiskConfig) -> Self {
        let files: Vec<File> = REGIONS.iter().map(|_| memory_file(REGION_BYTES)).collect();
        let driver = Self {
            memory: Arc::default(),
            size,
            features: config.features(),
            disk: Arc::new(DiskState {
                name: "test".into(),
                capacity_bytes: AtomicU64::new(config.capacity_bytes),
                config,
            }),
            inflight: None,
            kick: event(),
            call: event(),
            err: event(),
            available: 0,
            used: 0,
            files,
        };
        driver.memory.set(driver.map());
        driver
    }

    /// The regions, as a front-end shares them.
    pub(super) fn table(&self) -> Vec<(RegionSpec, File)> {
        let regions = REGIONS.iter().zip(&self.files).map(|((guest_addr, user_addr), file)| {
            let spec = RegionSpec { guest_addr: *guest_addr, len: REGION_BYTES, user_addr: *user_addr, file_offset: 0 };
            (spec, file.try_clone().unwrap())
        });
        regions.collect()
    }

    /// The regions, mapped anew.
    pub(super) fn map(&self) -> GuestMemory {
        GuestMemory::from_table(self.table()).unwrap()
    }

    pub(super) fn track_inflight(&mut self) {
        let (file, bytes) = InflightRegion::create(1, self.size).unwrap();
        self.inflight = Some(Arc::new(InflightRegion::map(file, 0, bytes, 1, self.size).unwrap()));
    }

    pub(super) fn addresses() -> RingAddresses {
        let user = |guest: u64| guest - REGIONS[0].0 + REGIONS[0].1;
        RingAddresses { descriptors: user(DESCRIPTORS), available: user(AVAILABLE), used: user(USED) }
    }

    pub(super) fn try_queue(&self, base: u16, addresses: RingAddresses) -> Result<Queue, QueueStartError> {
        let slot = |event: &EventFd| {
            let slot = EventSlot::default();
            slot.set(Some(fd(event)));
            Arc::new(slot)
        };
        Queue::new(QueueParts {
            index: 0,
            size: self.size,
            addresses,
            base,
            features: self.features,
            memory: Arc::clone(&self.memory),
            disk: Arc::clone(&self.disk),
            kick: Arc::new(fd(&self.kick)),
            call: slot(&self.call),
            err: slot(&self.err),
            inflight: self.inflight.as_ref().map(|region| region.queue(0, self.size).unwrap()),
        })
    }

    pub(super) fn queue(&self) -> Queue {
        self.try_queue(0, Self::addresses()).unwrap()
    }

    fn place(&self, addr: u64) -> (&File, u64) {
        let at = REGIONS.iter().position(|(start, _)| (*start..*start + REGION_BYTES).contains(&addr)).unwrap();
        (&self.files[at], addr - REGIONS[at].0)
    }

    /// Is every byte of the range guest memory?
    pub(super) fn holds(addr: u64, len: u64) -> bool {
        let inside = |start: u64, bytes: u64| addr >= start && addr - start <= bytes && len <= bytes - (addr - start);
        len == 0 || inside(LOW, 2 * REGION_BYTES) || inside(HIGH, REGION_BYTES)
    }

    /// Writes bytes, over the edge of a region if need be.
    pub(super) fn write(&self, addr: u64, bytes: &[u8]) {
        let first = usize::try_from(ADJACENT.saturating_sub(addr)).unwrap().min(bytes.len());
        let (first, rest) = if addr < ADJACENT { bytes.split_at(first) } else { (bytes, &[][..]) };
        self.write_in_region(addr, first);
        if !rest.is_empty() {
            self.write_in_region(ADJACENT, rest);
        }
    }

    /// Reads bytes, over the edge of a region if need be.
    pub(super) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let first = usize::try_from(ADJACENT.saturating_sub(addr)).unwrap().min(len);
        if addr >= ADJACENT || first == len {
            return self.read_in_region(addr, len);
        }
        [self.read_in_region(addr, first), self.read_in_region(ADJACENT, len - first)].concat()
    }

    fn read_in_region(&self, addr: u64, len: usize) -> Vec<u8> {
        let (file, offset) = self.place(addr);
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn read_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.read_in_region(addr, 2).try_into().unwrap())
    }

    fn write_in_region(&self, addr: u64, bytes: &[u8]) {
        let (file, offset) = self.place(addr);
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Writes a descriptor of the table at `table`.
    pub(super) fn describe_at(&self, table: u64, index: u16, desc: Desc) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&desc.addr.to_le_bytes());
        raw[8..12].copy_from_slice(&desc.len.to_le_bytes());
        raw[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        raw[14..].copy_from_slice(&desc.next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &raw);
    }

    /// Writes a descriptor of the ring.
    pub(super) fn describe(&self, index: u16, desc: Desc) {
        self.describe_at(DESCRIPTORS, index, desc);
    }

    pub(super) fn make_available(&mut self, head: u16) {
        self.set_available_head(head);
        self.advance_available(1);
    }

    /// The head of the chain that is available next, without making it so.
    pub(super) fn set_available_head(&self, head: u16) {
        self.write_in_region(AVAILABLE + 4 + 2 * u64::from(self.available % self.size), &head.to_le_bytes());
    }

    pub(super) fn available_index(&self) -> u16 {
        self.available
    }

    /// Somebody else has made chains available, up to this index.
    pub(super) fn count_available(&mut self, index: u16) {
        self.available = index;
    }

    pub(super) fn advance_available(&mut self, by: u16) {
        self.available = self.available.wrapping_add(by);
        self.write_in_region(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    pub(super) fn set_available_flags(&self, flags: u16) {
        self.write_in_region(AVAILABLE, &flags.to_le_bytes());
    }

    pub(super) fn set_used_event(&self, index: u16) {
        self.write_in_region(AVAILABLE + 4 + 2 * u64::from(self.size), &index.to_le_bytes());
    }

    pub(super) fn available_event(&self) -> u16 {
        self.read_u16(USED + 4 + 8 * u64::from(self.size))
    }

    pub(super) fn used_flags(&self) -> u16 {
        self.read_u16(USED)
    }

    /// How many chains the device has given back, modulo 2^16.
    pub(super) fn used_index(&self) -> u16 {
        self.read_u16(USED + 2)
    }

    /// Takes what the device has given back since the last time: (head, bytes written).
    pub(super) fn take_used(&mut self) -> Vec<(u16, u32)> {
        let index = self.used_index();
        let mut taken = Vec::new();
        while self.used != index {
            let raw = self.read_in_region(USED + 4 + 8 * u64::from(self.used % self.size), 8);
            let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
            taken.push((u16::try_from(word(0)).unwrap(), word(4)));
            self.used = self.used.wrapping_add(1);
        }
        taken
    }

    /// The usual layout of a read or write of `sectors` at `sector`: header, one buffer, status. Uses descriptors
    /// `head` to `head + 2` and memory of its own for each head. Returns the buffer's and the status's addresses.
    pub(super) fn request(&mut self, head: u16, kind: u32, sector: u64, sectors: u32) -> (u64, u64) {
        let buffer = BUFFERS + u64::from(head) * 0x2000;
        let (header, status) = (buffer + 0x1800, buffer + 0x1900);
        self.write_in_region(header, &header_bytes(kind, sector));
        self.write_in_region(status, &[0xFF]);
        let data_flags = if kind == 0 { WRITE | NEXT } else { NEXT };
        self.describe(head, Desc { addr: header, len: 16, flags: NEXT, next: head + 1 });
        self.describe(head + 1, Desc { addr: buffer, len: 512 * sectors, flags: data_flags, next: head + 2 });
        self.describe(head + 2, Desc { addr: status, len: 1, flags: WRITE, next: 0 });
        self.make_available(head);
        (buffer, status)
    }
}

pub(super) fn header_bytes(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Has the event been raised since the last call?
pub(super) fn raised(event: &EventFd) -> bool {
    event.read().is_ok()
}
