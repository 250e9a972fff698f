//! A guest as the daemon sees it: a vhost-user-blk front-end with one request under way.
#![allow(dead_code, reason = "no test program asks for all of it")]

use std::mem::MaybeUninit;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};

use super::host::Host;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const BUFFER: usize = 1 << 20;

pub(crate) struct Guest {
    queue: Blkioq,
    buffer: usize,
    _device: Blkio,
}

impl Guest {
    /// On the disk's socket.
    pub(crate) fn start(host: &Host, disk: &str) -> Guest {
        Guest::connect(host, disk, false)
    }

    /// On the socket of a disk that may not be written to: blkio refuses such a one unless it is told.
    pub(crate) fn reading(host: &Host, disk: &str) -> Guest {
        Guest::connect(host, disk, true)
    }

    fn connect(host: &Host, disk: &str, read_only: bool) -> Guest {
        let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
        device.set_str("path", host.path(&format!("run/vm/{disk}.sock")).to_str().unwrap()).unwrap();
        device.set_bool("read-only", read_only).unwrap();
        device.connect().unwrap();
        let queue = device.start().unwrap().queues.remove(0);
        let memory = device.alloc_mem_region(BUFFER).unwrap();
        device.map_mem_region(&memory).unwrap();
        Guest { queue, buffer: memory.addr, _device: device }
    }

    fn wait(&mut self) {
        assert_eq!(self.outcome(), 0);
    }

    /// How the request under way has ended: 0, or an errno below it.
    fn outcome(&mut self) -> i32 {
        let mut done: [MaybeUninit<Completion>; 1] = [const { MaybeUninit::uninit() }];
        let mut timeout = LIMIT;
        assert_eq!(self.queue.do_io(&mut done, 1, Some(&mut timeout), None).unwrap(), 1);
        // SAFETY: do_io has filled in the first.
        unsafe { done[0].assume_init_ref() }.ret
    }

    /// Whether a read is answered without an error.
    pub(crate) fn try_read(&mut self, offset: u64, len: usize) -> bool {
        assert!(len <= BUFFER);
        self.queue.read(offset, self.buffer as *mut u8, len, 0, ReqFlags::empty());
        self.outcome() == 0
    }

    /// The bytes at an offset.
    pub(crate) fn read(&mut self, offset: u64, len: usize) -> &[u8] {
        assert!(len <= BUFFER);
        self.queue.read(offset, self.buffer as *mut u8, len, 0, ReqFlags::empty());
        self.wait();
        // SAFETY: the region is that large, lives as long as the device, and nothing is under way on it.
        unsafe { std::slice::from_raw_parts(self.buffer as *const u8, len) }
    }

    pub(crate) fn write(&mut self, offset: u64, len: usize, byte: u8) {
        self.write_all(offset, &vec![byte; len]);
    }

    pub(crate) fn write_all(&mut self, offset: u64, bytes: &[u8]) {
        assert!(bytes.len() <= BUFFER);
        // SAFETY: as in `read`, and this is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.buffer as *mut u8, bytes.len()) }.copy_from_slice(bytes);
        self.queue.write(offset, self.buffer as *const u8, bytes.len(), 0, ReqFlags::empty());
        self.wait();
    }
}
