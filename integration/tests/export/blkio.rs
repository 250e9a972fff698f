//! Random operations by libblkio's vhost-user driver.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, ReqFlags, iovec};
use prestage_integration::export::DiskConfig;

use crate::disk::{LIMIT, Served, pattern};

const DISK_BYTES: usize = 8 << 20;

fn connect(served: &Served, read_only: bool) -> Blkio {
    let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
    device.set_str("path", served.path().to_str().unwrap()).unwrap();
    device.set_bool("read-only", read_only).unwrap();
    device.connect().unwrap();
    device
}

/// A queue's completions: at least one, as (user data, result).
fn wait(queue: &mut Blkioq) -> Vec<(usize, i32)> {
    let mut completions: [MaybeUninit<Completion>; 32] = [const { MaybeUninit::uninit() }; 32];
    let mut timeout: Duration = LIMIT;
    let count = queue.do_io(&mut completions, 1, Some(&mut timeout), None).unwrap();
    // SAFETY: do_io has filled in the first `count`.
    completions[..count].iter().map(|c| unsafe { c.assume_init_ref() }).map(|c| (c.user_data, c.ret)).collect()
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % n
    }
}

const SLOTS: usize = 16;
const SLOT_BYTES: usize = 64 << 10;

/// One queue's random operations on its own part of the disk: `SLOTS` operations at a time, each on a part of its own.
fn exercise(queue: &mut Blkioq, buffer: usize, start: usize, rounds: usize, seed: u64, model: &mut [u8]) {
    let mut random = Random(seed);
    let part = model.len() / SLOTS;
    for round in 0..rounds {
        let mut expected: Vec<Option<(usize, Vec<u8>)>> = vec![None; SLOTS];
        let mut vectors: Vec<Vec<iovec>> = Vec::new();
        for (slot, expect) in expected.iter_mut().enumerate() {
            let sectors = 1 + random.below((SLOT_BYTES / 512) as u64) as usize;
            let len = sectors * 512;
            let at = slot * part + 512 * random.below(((part - len) / 512 + 1) as u64) as usize;
            let disk_at = (start + at) as u64;
            let memory = (buffer + slot * SLOT_BYTES) as *mut u8;
            match random.below(10) {
                0..4 => {
                    // SAFETY: this slot's bytes of the buffer.
                    unsafe { std::ptr::write_bytes(memory, 0xEE, len) };
                    *expect = Some((slot, model[at..at + len].to_vec()));
                    if random.below(2) == 0 {
                        queue.read(disk_at, memory, len, slot, ReqFlags::empty());
                    } else {
                        vectors.push(split(memory, len, &mut random));
                        let vector = vectors.last().unwrap();
                        queue.readv(disk_at, vector.as_ptr(), vector.len() as u32, slot, ReqFlags::empty());
                    }
                }
                4..8 => {
                    let data: Vec<u8> = (0..len).map(|i| (i as u64 ^ random.0 ^ round as u64) as u8).collect();
                    model[at..at + len].copy_from_slice(&data);
                    // SAFETY: this slot's bytes of the buffer.
                    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), memory, len) };
                    if random.below(2) == 0 {
                        queue.write(disk_at, memory, len, slot, ReqFlags::FUA);
                    } else {
                        vectors.push(split(memory, len, &mut random));
                        let vector = vectors.last().unwrap();
                        queue.writev(disk_at, vector.as_ptr(), vector.len() as u32, slot, ReqFlags::empty());
                    }
                }
                8 => {
                    model[at..at + len].fill(0);
                    let flags = if random.below(2) == 0 { ReqFlags::NO_UNMAP } else { ReqFlags::empty() };
                    queue.write_zeroes(disk_at, len as u64, slot, flags);
                }
                _ if random.below(2) == 0 => {
                    // The test's disk reads discarded bytes as zeroes.
                    model[at..at + len].fill(0);
                    queue.discard(disk_at, len as u64, slot, ReqFlags::empty());
                }
                _ => queue.flush(slot, ReqFlags::empty()),
            }
        }
        let mut done = 0;
        while done < SLOTS {
            for (slot, result) in wait(queue) {
                assert_eq!(result, 0, "operation {slot} of round {round}");
                done += 1;
                if let Some((slot, bytes)) = expected[slot].take() {
                    let memory = (buffer + slot * SLOT_BYTES) as *const u8;
                    // SAFETY: this slot's bytes of the buffer; the read has completed.
                    let read = unsafe { std::slice::from_raw_parts(memory, bytes.len()) };
                    assert!(read == bytes, "read of slot {slot} in round {round} differs");
                }
            }
        }
    }
}

/// Cuts a buffer into pieces of any length, down to a byte.
fn split(memory: *mut u8, len: usize, random: &mut Random) -> Vec<iovec> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < len {
        let left = len - at;
        let piece = if pieces.len() == 19 { left } else { left.min(1 + random.below(9000) as usize) };
        // SAFETY: inside the buffer.
        pieces.push(iovec { iov_base: unsafe { memory.add(at) }.cast(), iov_len: piece });
        at += piece;
    }
    pieces
}

#[test]
fn every_byte_is_as_the_model_says_after_random_operations_on_four_queues() {
    let config = DiskConfig { num_queues: 4, ..DiskConfig::new(DISK_BYTES as u64) };
    let served = Served::new(config, pattern(DISK_BYTES));
    let mut device = connect(&served, false);
    device.set_i32("num-queues", 4).unwrap();
    let mut queues = device.start().unwrap().queues;
    let memory = device.alloc_mem_region(4 * SLOTS * SLOT_BYTES).unwrap();
    device.map_mem_region(&memory).unwrap();
    served.disk.wait_for(|seen| seen.running == [0, 1, 2, 3]);

    let mut model = pattern(DISK_BYTES);
    let part = DISK_BYTES / 4;
    std::thread::scope(|scope| {
        for (index, (queue, model)) in queues.iter_mut().zip(model.chunks_mut(part)).enumerate() {
            let buffer = memory.addr + index * SLOTS * SLOT_BYTES;
            scope.spawn(move || exercise(queue, buffer, index * part, 150, index as u64 + 7, model));
        }
    });
    assert!(served.disk.bytes() == model);
    assert!(served.disk.flushes.load(Ordering::Relaxed) > 0);
    assert_eq!(served.disk.seen().broken, 0);
    drop((queues, device));
    served.disk.wait_for(|seen| seen.disconnected == 1 && seen.running.is_empty());
}

#[test]
fn a_front_end_finds_its_data_again_after_reconnecting() {
    let served = Served::new(DiskConfig::new(DISK_BYTES as u64), vec![0; DISK_BYTES]);
    let mut model = vec![0; DISK_BYTES];
    for turn in 1..=3 {
        let mut device = connect(&served, false);
        let mut queues = device.start().unwrap().queues;
        let memory = device.alloc_mem_region(SLOTS * SLOT_BYTES).unwrap();
        device.map_mem_region(&memory).unwrap();
        exercise(&mut queues[0], memory.addr, 0, 20, turn, &mut model);
        drop((queues, device));
        served.disk.wait_for(|seen| seen.disconnected == turn as usize);
    }
    assert!(served.disk.bytes() == model);
    assert_eq!(served.disk.seen().connected, 3);
}

#[test]
fn the_front_end_sees_the_disk_that_was_configured() {
    let config = DiskConfig {
        block_bytes: 4096,
        optimal_io_bytes: 1 << 20,
        num_queues: 7,
        seg_max: 33,
        ..DiskConfig::new(DISK_BYTES as u64)
    };
    let served = Served::new(config, vec![0; DISK_BYTES]);
    let device = connect(&served, false);
    assert_eq!(device.get_u64("capacity").unwrap(), DISK_BYTES as u64);
    assert_eq!(device.get_i32("max-queues").unwrap(), 7);
    assert_eq!(device.get_i32("max-segments").unwrap(), 33);
    assert_eq!(device.get_i32("request-alignment").unwrap(), 4096);
    assert_eq!(device.get_i32("optimal-io-size").unwrap(), 1 << 20);
    assert_eq!(device.get_u64("max-discard-len").unwrap(), 2 << 30);
    assert_eq!(device.get_u64("max-write-zeroes-len").unwrap(), 64 << 20);
    served.export().resize(2 * DISK_BYTES as u64).unwrap();
    assert_eq!(device.get_u64("capacity").unwrap(), 2 * DISK_BYTES as u64);
}

#[test]
fn a_read_only_disk_is_read_and_never_written() {
    let config = DiskConfig { read_only: true, ..DiskConfig::new(DISK_BYTES as u64) };
    let served = Served::new(config, pattern(DISK_BYTES));
    let writer = connect(&served, false).start().err().expect("a read-only disk is not opened for writing");
    assert_eq!(writer.errno(), blkio::Errno::ROFS);
    served.disk.wait_for(|seen| seen.disconnected == 1);

    let mut device = connect(&served, true);
    let mut queues = device.start().unwrap().queues;
    let memory = device.alloc_mem_region(64 << 10).unwrap();
    device.map_mem_region(&memory).unwrap();
    queues[0].read(4096, memory.addr as *mut u8, 64 << 10, 1, ReqFlags::empty());
    assert_eq!(wait(&mut queues[0]), [(1, 0)]);
    // SAFETY: the region is mapped, and the read into it has completed.
    let read = unsafe { std::slice::from_raw_parts(memory.addr as *const u8, 64 << 10) };
    assert!(read == &pattern(DISK_BYTES)[4096..4096 + (64 << 10)]);
    assert_eq!(served.disk.writes.load(Ordering::Relaxed), 0);
}

#[test]
fn requests_past_the_end_fail_and_the_ring_goes_on() {
    let served = Served::new(DiskConfig::new(1 << 20), vec![7; 1 << 20]);
    let mut device = connect(&served, false);
    let mut queues = device.start().unwrap().queues;
    let memory = device.alloc_mem_region(64 << 10).unwrap();
    device.map_mem_region(&memory).unwrap();
    let buffer = memory.addr as *mut u8;
    for (start, len) in [(1 << 20, 512), ((1 << 20) - 512, 1024), (0, 100), (u64::MAX << 10, 512)] {
        queues[0].read(start, buffer, len, 1, ReqFlags::empty());
        assert!(wait(&mut queues[0])[0].1 < 0, "{len} bytes at {start}");
        queues[0].write(start, buffer, len, 2, ReqFlags::empty());
        assert!(wait(&mut queues[0])[0].1 < 0, "{len} bytes at {start}");
    }
    queues[0].read((1 << 20) - 512, buffer, 512, 3, ReqFlags::empty());
    assert_eq!(wait(&mut queues[0]), [(3, 0)]);
    assert_eq!(served.disk.writes.load(Ordering::Relaxed), 0);
}
