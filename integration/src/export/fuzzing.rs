//! A hostile guest and its front-end, made of bytes: [`guest`] is the body of the fuzz target `virtqueue` and replays its
//! corpus as a test.
//!
//! The bytes become a series of moves, most of them such as a sound driver and front-end would make: well-formed requests,
//! direct and through indirect tables, answered in any order, rings stopped and started with and without in-flight memory,
//! memory shared anew. Between them come the others: descriptors that point anywhere, loops, tables outside of memory, ring
//! indices that jump, bytes thrown into rings and in-flight areas, regions that vanish, rings that move.
//!
//! What must hold, whatever comes: nothing panics (the build checks arithmetic and, with a sanitizer, memory); a request
//! that is handed out lies inside the disk, on whole sectors, has as many bytes as it says, and is not a write to a disk
//! that is read-only; its guest memory cannot be left by a copy; a ring has at most its size of requests in flight; one
//! that was broken hands out nothing more; and while nobody tampered with a ring, an answered request is given back once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed assumption of a test is a failed test"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::{Result, Unstructured};
use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserMemoryRegion, VhostUserSingleMemoryRegion,
    VhostUserVringAddrFlags,
};

use super::QueueRunner;
use super::config::{DiskConfig, SECTOR_BYTES};
use super::handler::{Device, FrontendChannel};
use super::memory::RegionSpec;
use super::queue::{Queue, QueueStopped};
use super::request::{ByteRange, REQUEST_MAX_BYTES, Request, RequestKind, Status};
use super::testing::{ADJACENT, BUFFERS, Desc, Driver, HIGH, INDIRECT, LOW, NEXT, REGION_BYTES, WRITE, header_bytes};

const RINGS: u16 = 2;
const SIZE: u16 = 16;
const DISK_BYTES: u64 = 1 << 20;
/// A guest that makes more moves than this is no different from two guests.
const MOVES_MAX: usize = 512;

/// The rings that run, and what was popped and not answered.
#[derive(Default)]
struct Running {
    queues: BTreeMap<u16, Queue>,
    held: Vec<(u16, Request)>,
    /// A ring that stops now drops its requests, as an agent that dies does.
    dies: bool,
}

#[derive(Default)]
struct Runner(Mutex<Running>);

impl QueueRunner for Runner {
    fn start(&self, queue: Queue) {
        let started = self.0.lock().queues.insert(queue.index(), queue);
        assert!(started.is_none(), "a ring was started twice");
    }

    fn stop(&self, index: u16) -> QueueStopped {
        let mut running = self.0.lock();
        let mut queue = running.queues.remove(&index).expect("a ring was stopped that does not run");
        let (own, others) = std::mem::take(&mut running.held).into_iter().partition(|(ring, _)| *ring == index);
        running.held = others;
        for (_, request) in own {
            if !running.dies {
                queue.complete(request, Status::Ok);
            }
        }
        assert!(running.dies || queue.in_flight() == 0, "a request in flight is held by nobody");
        queue.stop()
    }

    fn memory_changed(&self) {
        for queue in self.0.lock().queues.values_mut() {
            queue.refresh_memory();
        }
    }
}

struct Guest<'a> {
    bytes: Unstructured<'a>,
    driver: Driver,
    device: Device,
    runner: Arc<Runner>,
    config: DiskConfig,
    /// The in-flight file that the front-end keeps, with its size in bytes.
    inflight: Option<(File, u64)>,
    /// Nobody has written to rings or in-flight areas but by their rules, nor taken memory away.
    sound: bool,
}

/// Plays the guest that `data` describes, to its end or to the first thing that must not be.
///
/// # Panics
/// When one of the promises in the module's head is broken.
pub fn guest(data: &[u8]) {
    let Some((choices, rest)) = data.split_first() else { return };
    Guest::new(*choices, rest).play();
}

impl<'a> Guest<'a> {
    fn new(choices: u8, bytes: &'a [u8]) -> Self {
        let config = DiskConfig {
            num_queues: RINGS,
            queue_size: SIZE,
            read_only: choices & 1 != 0,
            discard: choices & 2 != 0,
            write_zeroes: choices & 4 != 0,
            serial: "fuzz".into(),
            ..DiskConfig::new(DISK_BYTES)
        };
        let driver = Driver::new(SIZE, config.clone());
        let runner = Arc::new(Runner::default());
        let device = Device::new(
            Arc::clone(&driver.disk),
            Arc::clone(&runner) as Arc<dyn QueueRunner>,
            Arc::new(FrontendChannel::default()),
        );
        let bytes = Unstructured::new(bytes);
        Self { bytes, driver, device, runner, config, inflight: None, sound: true }
    }

    fn play(mut self) {
        // As a front-end begins; later moves may undo any of it.
        let _ = self.device.set_features(self.config.features());
        self.share_all();
        self.start_ring(0);
        for _ in 0..MOVES_MAX {
            // The bytes have run out: so has the guest.
            if self.bytes.is_empty() || self.act().is_err() {
                break;
            }
        }
        self.device.stop_all();
        assert!(self.runner.0.lock().queues.is_empty(), "a ring runs on without its connection");
    }

    fn act(&mut self) -> Result<()> {
        match self.bytes.int_in_range(0..=31_u8)? {
            0..=5 => self.request()?,
            6..=8 => self.indirect_request()?,
            9..=12 => self.pop()?,
            13..=15 => self.complete()?,
            16 => self.notifications()?,
            17 | 18 => self.descriptor()?,
            19 => self.make_available()?,
            20 => self.scribble()?,
            21 => self.change_memory()?,
            22 => self.stop_or_start()?,
            23 => self.die()?,
            24 => self.share_inflight()?,
            25 => self.odd_message()?,
            26 => self.resize()?,
            27 => self.share_all(),
            28 => {
                let ring = self.ring()?;
                self.start_ring(ring);
            }
            29 => self.answer_all(),
            30 => {
                self.driver.set_available_flags(self.bytes.int_in_range(0..=1)?);
                self.driver.set_used_event(self.bytes.arbitrary()?);
            }
            _ => self.scribble_inflight()?,
        }
        Ok(())
    }

    fn ring(&mut self) -> Result<u16> {
        // Both rings share one driver's memory: the second is a front-end that gives two rings the same place.
        Ok(u16::from(self.bytes.ratio(1, 8)?))
    }

    fn fd(event: &EventFd) -> Option<File> {
        event.as_fd().try_clone_to_owned().ok().map(|fd: OwnedFd| File::from(fd))
    }

    fn share_all(&mut self) {
        let (regions, files) = self.driver.table().into_iter().map(|(spec, file)| (message(spec), file)).unzip();
        let regions: Vec<VhostUserMemoryRegion> = regions;
        let _ = self.device.set_mem_table(&regions, files, None);
    }

    fn start_ring(&mut self, ring: u16) {
        let (index, small) = (u32::from(ring), ring as u8);
        let addresses = Driver::addresses();
        if ring != 0 {
            self.sound = false;
        }
        let _ = self.device.set_vring_num(index, u32::from(SIZE));
        let _ = self.device.set_vring_addr(
            index,
            VhostUserVringAddrFlags::empty(),
            addresses.descriptors,
            addresses.used,
            addresses.available,
            0,
        );
        let _ = self.device.set_vring_call(small, Self::fd(&self.driver.call));
        let _ = self.device.set_vring_err(small, Self::fd(&self.driver.err));
        let _ = self.device.set_vring_kick(small, Self::fd(&self.driver.kick));
        let _ = self.device.set_vring_enable(index, true);
    }

    /// An address: mostly inside of memory, sometimes at an edge of it, sometimes anywhere.
    fn address(&mut self) -> Result<u64> {
        let near = u64::from(self.bytes.arbitrary::<u16>()?);
        Ok(match self.bytes.int_in_range(0..=9_u8)? {
            0..=4 => BUFFERS + near,
            5 => ADJACENT - near % 4096,
            6 => HIGH + near % 8192,
            7 => HIGH + REGION_BYTES - near % 8192,
            8 => ADJACENT + REGION_BYTES - near % 64,
            _ => {
                // May be a ring.
                self.sound = false;
                self.bytes.arbitrary()?
            }
        })
    }

    fn length(&mut self) -> Result<u32> {
        Ok(match self.bytes.int_in_range(0..=7_u8)? {
            0..=3 => 512 * self.bytes.int_in_range(0..=16_u32)?,
            4 | 5 => self.bytes.int_in_range(0..=64_u32)?,
            6 => u32::from(self.bytes.arbitrary::<u16>()?),
            _ => self.bytes.arbitrary()?,
        })
    }

    fn sector(&mut self) -> Result<u64> {
        let sectors = DISK_BYTES / SECTOR_BYTES;
        Ok(match self.bytes.int_in_range(0..=7_u8)? {
            0..=5 => self.bytes.int_in_range(0..=sectors)?,
            6 => sectors - self.bytes.int_in_range(0..=9_u64)?,
            _ => self.bytes.arbitrary()?,
        })
    }

    fn kind(&mut self) -> Result<u32> {
        Ok(match self.bytes.int_in_range(0..=9_u8)? {
            0..=3 => 0,
            4 | 5 => 1,
            6 => *self.bytes.choose(&[4, 8])?,
            7 | 8 => *self.bytes.choose(&[11, 13])?,
            _ => self.bytes.arbitrary()?,
        })
    }

    /// A head that three descriptors from here on may belong to.
    fn head(&mut self) -> Result<u16> {
        Ok(3 * self.bytes.int_in_range(0..=4_u16)?)
    }

    fn request(&mut self) -> Result<()> {
        let (head, kind, sector) = (self.head()?, self.kind()?, self.sector()?);
        let sectors = self.bytes.int_in_range(0..=9)?;
        let (buffer, _) = self.driver.request(head, kind, sector, sectors);
        if kind == 11 || kind == 13 {
            self.ranges(buffer, sectors)?;
        }
        Ok(())
    }

    /// The ranges of a discard or of zeroes, as many as `sectors` sectors hold.
    fn ranges(&mut self, buffer: u64, sectors: u32) -> Result<()> {
        for at in 0..u64::from(sectors.min(2)) {
            let (sector, sectors) = (self.sector()?, self.length()?);
            let flags = u32::from(self.bytes.int_in_range(0..=3_u8)?);
            let bytes = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
            self.driver.write(buffer + 16 * at, &bytes);
        }
        Ok(())
    }

    /// Header, pieces of data and status behind an indirect table.
    fn indirect_request(&mut self) -> Result<()> {
        let (head, kind, sector) = (self.head()?, self.kind()?, self.sector()?);
        let table =
            if self.bytes.ratio(1, 16)? { self.address()? } else { BUFFERS + 0x4_0000 + u64::from(head) * 0x1000 };
        let pieces = self.bytes.int_in_range(0..=6_u16)?;
        let inside = Driver::holds(table, 16 * u64::from(pieces + 2));
        let header = BUFFERS + 0x8_0000 + u64::from(head) * 64;
        self.driver.write(header, &header_bytes(kind, sector));
        if inside {
            let data_flags = if kind == 0 { WRITE | NEXT } else { NEXT };
            self.driver.describe_at(table, 0, Desc { addr: header, len: 16, flags: NEXT, next: 1 });
            for piece in 1..=pieces {
                let desc = Desc { addr: self.address()?, len: self.length()?, flags: data_flags, next: piece + 1 };
                self.driver.describe_at(table, piece, desc);
            }
            let status = Desc { addr: header + 32, len: 1, flags: WRITE, next: 0 };
            self.driver.describe_at(table, pieces + 1, status);
        }
        let len = if self.bytes.ratio(1, 16)? { self.length()? } else { 16 * u32::from(pieces + 2) };
        let next = if self.bytes.ratio(1, 32)? { NEXT } else { 0 };
        self.driver.describe(head, Desc { addr: table, len, flags: INDIRECT | next, next: 0 });
        self.driver.make_available(head);
        Ok(())
    }

    /// One descriptor, of the ring or of what may be an indirect table, with anything in it.
    fn descriptor(&mut self) -> Result<()> {
        let index = self.bytes.int_in_range(0..=SIZE - 1)?;
        let flags = if self.bytes.ratio(7, 8)? { self.bytes.int_in_range(0..=7)? } else { self.bytes.arbitrary()? };
        let next = if self.bytes.ratio(7, 8)? { self.bytes.int_in_range(0..=SIZE)? } else { self.bytes.arbitrary()? };
        let desc = Desc { addr: self.address()?, len: self.length()?, flags, next };
        if self.bytes.ratio(1, 3)? {
            self.driver.describe_at(BUFFERS + 0x4_0000, index, desc);
        } else {
            self.driver.describe(index, desc);
        }
        Ok(())
    }

    fn make_available(&mut self) -> Result<()> {
        if self.bytes.ratio(1, 4)? {
            // Entries that nobody wrote.
            self.driver.advance_available(self.bytes.arbitrary()?);
        } else {
            self.driver.make_available(self.bytes.int_in_range(0..=SIZE)?);
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<()> {
        let ring = self.ring()?;
        let capacity = self.driver.disk.capacity_bytes.load(Ordering::Relaxed);
        let mut running = self.runner.0.lock();
        let Some(queue) = running.queues.get_mut(&ring) else { return Ok(()) };
        queue.clear_kick();
        let before = queue.in_flight();
        match queue.pop() {
            Ok(Some(request)) => {
                assert_eq!(queue.in_flight(), before + 1);
                assert!(queue.in_flight() <= queue.size(), "more requests than the ring holds");
                check(&request, capacity, &self.config);
                running.held.push((ring, request));
            }
            Ok(None) => assert_eq!(queue.in_flight(), before),
            Err(_) => {
                self.sound = false;
                assert!(!queue.has_available(), "a broken ring offers requests");
                assert!(queue.pop().is_err(), "a broken ring went on");
                assert_eq!(queue.in_flight(), before);
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        let mut running = self.runner.0.lock();
        if running.held.is_empty() {
            return Ok(());
        }
        let at = self.bytes.choose_index(running.held.len())?;
        let (ring, request) = running.held.swap_remove(at);
        let status = *self.bytes.choose(&[Status::Ok, Status::IoError, Status::Unsupported])?;
        let Some(queue) = running.queues.get_mut(&ring) else { return Ok(()) };
        let before = self.driver.used_index();
        queue.complete(request, status);
        if self.sound {
            assert_eq!(self.driver.used_index(), before.wrapping_add(1), "an answer was given back once");
        }
        queue.signal();
        Ok(())
    }

    fn answer_all(&mut self) {
        let mut running = self.runner.0.lock();
        for (ring, request) in std::mem::take(&mut running.held) {
            if let Some(queue) = running.queues.get_mut(&ring) {
                queue.complete(request, Status::Ok);
                queue.signal();
            }
        }
        for queue in running.queues.values() {
            assert_eq!(queue.in_flight(), 0, "a request in flight is held by nobody");
        }
    }

    fn notifications(&mut self) -> Result<()> {
        let ring = self.ring()?;
        let mut running = self.runner.0.lock();
        if let Some(queue) = running.queues.get_mut(&ring) {
            queue.disable_notification();
            queue.enable_notification();
            queue.signal();
        }
        Ok(())
    }

    /// Bytes thrown into the rings.
    fn scribble(&mut self) -> Result<()> {
        self.sound = false;
        let at = LOW + u64::from(self.bytes.int_in_range(0..=0x7000_u16)?);
        let len = self.bytes.int_in_range(1..=8_usize)?;
        let bytes = self.bytes.bytes(len)?.to_vec();
        self.driver.write(at, &bytes);
        Ok(())
    }

    fn change_memory(&mut self) -> Result<()> {
        self.sound = false;
        let table = self.driver.table();
        let at = self.bytes.choose_index(table.len())?;
        let Some((mut spec, file)) = table.into_iter().nth(at) else { return Ok(()) };
        match self.bytes.int_in_range(0..=7_u8)? {
            0 => spec.guest_addr = self.bytes.arbitrary()?,
            1 => spec.len = self.bytes.arbitrary()?,
            2 => spec.user_addr = self.bytes.arbitrary()?,
            3 => spec.file_offset = self.bytes.arbitrary()?,
            4 => {
                let cut = self.bytes.int_in_range(0..=REGION_BYTES)?;
                (spec.len, spec.file_offset) = (REGION_BYTES - cut, cut);
            }
            _ => {}
        }
        let single = VhostUserSingleMemoryRegion::new(spec.guest_addr, spec.len, spec.user_addr, spec.file_offset);
        match self.bytes.int_in_range(0..=2_u8)? {
            0 => drop(self.device.remove_mem_region(&single)),
            1 => drop(self.device.add_mem_region(&single, file, None)),
            _ => drop(self.device.set_mem_table(&[message(spec)], vec![file], None)),
        }
        Ok(())
    }

    fn stop_or_start(&mut self) -> Result<()> {
        let ring = u32::from(self.ring()?);
        match self.bytes.int_in_range(0..=4_u8)? {
            0 => {
                let _ = self.device.get_vring_base(ring);
                self.start_ring(ring as u16);
            }
            1 => drop(self.device.set_vring_enable(ring, self.bytes.arbitrary()?)),
            2 => {
                // Takes the in-flight area away, and ring 0 begins again while the driver goes on.
                (self.sound, self.inflight) = (false, None);
                let _ = self.device.reset_device();
            }
            3 => drop(self.device.reset_owner()),
            _ => drop(self.device.set_vring_kick(ring as u8, Self::fd(&self.driver.kick))),
        }
        self.start_ring(ring as u16);
        Ok(())
    }

    /// The agent dies with its requests, and a new one takes the rings over. Without in-flight memory the front-end's base
    /// tells how far it was, and requests are lost: not sound any more.
    fn die(&mut self) -> Result<()> {
        self.runner.0.lock().dies = true;
        self.device.stop_all();
        self.runner.0.lock().dies = false;
        self.device = Device::new(
            Arc::clone(&self.driver.disk),
            Arc::clone(&self.runner) as Arc<dyn QueueRunner>,
            Arc::new(FrontendChannel::default()),
        );
        let features = if self.bytes.ratio(7, 8)? { self.config.features() } else { self.bytes.arbitrary()? };
        let _ = self.device.set_features(features);
        self.share_all();
        match &self.inflight {
            Some((file, bytes)) => {
                if let Ok(file) = file.try_clone() {
                    let _ = self.device.set_inflight_fd(&VhostUserInflight::new(*bytes, 0, RINGS, SIZE), file);
                }
            }
            None => self.sound = false,
        }
        if self.bytes.ratio(1, 2)? {
            let _ = self.device.set_vring_base(0, u32::from(self.bytes.arbitrary::<u16>()?));
        }
        self.start_ring(0);
        Ok(())
    }

    fn share_inflight(&mut self) -> Result<()> {
        let (rings, size) = if self.bytes.ratio(7, 8)? {
            (RINGS, SIZE)
        } else {
            (self.bytes.int_in_range(0..=3)?, self.bytes.int_in_range(0..=2048)?)
        };
        let asked = VhostUserInflight::new(0, 0, rings, size);
        let Ok((made, file)) = self.device.get_inflight_fd(&asked) else { return Ok(()) };
        self.device.stop_all();
        let told = if self.bytes.ratio(7, 8)? {
            made
        } else {
            VhostUserInflight::new(self.bytes.arbitrary()?, self.bytes.arbitrary()?, rings, self.bytes.arbitrary()?)
        };
        if let Ok(copy) = file.try_clone() {
            // A fresh area knows nothing of what the ring has had: as a front-end that swaps it under a running guest.
            self.sound &= self.inflight.is_none() && self.driver.used_index() == 0;
            if self.device.set_inflight_fd(&told, copy).is_ok() && (rings, size) == (RINGS, SIZE) {
                self.inflight = Some((file, made.mmap_size));
            }
        }
        self.start_ring(0);
        Ok(())
    }

    fn scribble_inflight(&mut self) -> Result<()> {
        use std::os::unix::fs::FileExt;
        let Some((file, bytes)) = &self.inflight else { return Ok(()) };
        self.sound = false;
        let at = self.bytes.int_in_range(0..=bytes.saturating_sub(8))?;
        let len = self.bytes.int_in_range(1..=8_usize)?;
        // The file is ours and as long as its area: a write that fails is a host without memory.
        let _ = file.write_all_at(self.bytes.bytes(len)?, at);
        Ok(())
    }

    /// One message with anything in it.
    fn odd_message(&mut self) -> Result<()> {
        self.sound = false;
        let (index, value): (u32, u64) = (self.bytes.int_in_range(0..=3)?, self.bytes.arbitrary()?);
        let near = Driver::addresses().descriptors.wrapping_add(value % 0x12_0000);
        match self.bytes.int_in_range(0..=8_u8)? {
            0 => drop(self.device.set_features(value)),
            1 => drop(self.device.set_vring_num(index, value as u32)),
            2 => drop(self.device.set_vring_base(index, value as u32)),
            3 => {
                let (descriptors, used, available) = (near, self.bytes.arbitrary()?, near ^ 0x5000);
                let used = if self.bytes.arbitrary()? { used } else { near ^ 0x6000 };
                let flags = VhostUserVringAddrFlags::empty();
                let _ = self.device.set_vring_addr(index, flags, descriptors, used, available, 0);
            }
            4 => drop(self.device.get_config(value as u32, (value >> 32) as u32, VhostUserConfigFlags::empty())),
            5 => drop(self.device.set_vring_kick(index as u8, None)),
            6 => {
                let file = self.driver.table().into_iter().next().map(|(_, file)| file);
                let _ = self.device.set_vring_call(index as u8, file);
            }
            7 => drop(self.device.get_vring_base(index)),
            _ => drop(self.device.set_config(value as u32, &[0; 4], VhostUserConfigFlags::empty())),
        }
        Ok(())
    }

    fn resize(&mut self) -> Result<()> {
        let sectors = self.bytes.int_in_range(0..=2 * DISK_BYTES / SECTOR_BYTES)?;
        self.driver.disk.capacity_bytes.store(sectors * SECTOR_BYTES, Ordering::Relaxed);
        Ok(())
    }
}

fn message(spec: RegionSpec) -> VhostUserMemoryRegion {
    VhostUserMemoryRegion::new(spec.guest_addr, spec.len, spec.user_addr, spec.file_offset)
}

/// A request as it is handed out, against a disk of `capacity` bytes.
fn check(request: &Request, capacity: u64, config: &DiskConfig) {
    let inside = |range: &ByteRange| {
        assert!(range.offset_bytes.is_multiple_of(SECTOR_BYTES) && range.len_bytes.is_multiple_of(SECTOR_BYTES));
        assert!(range.len_bytes > 0 && range.offset_bytes + range.len_bytes <= capacity, "{range:?} of {capacity}");
    };
    match request.kind() {
        RequestKind::Read { offset_bytes, len_bytes } | RequestKind::Write { offset_bytes, len_bytes } => {
            inside(&ByteRange { offset_bytes: *offset_bytes, len_bytes: u64::from(*len_bytes) });
            assert!(u64::from(*len_bytes) <= REQUEST_MAX_BYTES && request.data_len() == u64::from(*len_bytes));
        }
        RequestKind::Flush => assert_eq!(request.data_len(), 0),
        RequestKind::Discard { ranges } => {
            assert!(config.discard && !config.read_only);
            ranges.iter().for_each(inside);
        }
        RequestKind::WriteZeroes { ranges, .. } => {
            assert!(config.write_zeroes && !config.read_only);
            ranges.iter().for_each(inside);
        }
    }
    let len = request.data_len();
    match request.kind() {
        RequestKind::Read { .. } => {
            let bytes = vec![0xA5; len.min(1 << 16) as usize];
            assert!(request.copy_to_guest(len - bytes.len() as u64, &bytes).is_ok());
            assert!(request.copy_to_guest(len, &[1]).is_err(), "a copy left the guest's memory");
            assert!(request.zero_guest(0, len).is_ok() && request.zero_guest(1, len).is_err());
        }
        RequestKind::Write { .. } => {
            assert!(!config.read_only, "a write to a read-only disk");
            let mut bytes = vec![0; len.min(1 << 16) as usize];
            assert!(request.copy_from_guest(len - bytes.len() as u64, &mut bytes).is_ok());
            assert!(request.copy_from_guest(len, &mut [0]).is_err() && request.copy_to_guest(0, &[1]).is_err());
        }
        _ => assert!(request.copy_to_guest(0, &[1]).is_err()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    /// What the fuzzer has found worth keeping, and what once broke.
    #[test]
    fn no_guest_of_the_corpus_breaks_a_promise() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/virtqueue");
        let mut played = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            guest(&std::fs::read(entry.unwrap().path()).unwrap());
            played += 1;
        }
        assert!(played > 0, "{} is empty", folder.display());
    }

    proptest! {
        #[test]
        fn no_guest_breaks_a_promise(data in proptest::collection::vec(any::<u8>(), 0..2048)) {
            guest(&data);
        }
    }
}
