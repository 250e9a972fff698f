//! A front-end that tells of more memory, or of a larger disk, and whose guest makes use of it at once, beside a ring that looks for
//! requests without a pause.

use super::*;
use std::sync::atomic::{AtomicBool, AtomicU16};

const ROUNDS: usize = 50_000;
const SMALL_BYTES: u64 = 1 << 20;
const LARGE_BYTES: u64 = 2 << 20;

/// Requests at once for what was made room for; how many of them were refused. `less` takes the room away again.
fn refused(sector: u64, buffer: u64, mut less: impl FnMut(&Driver), mut more: impl FnMut(&Driver)) -> usize {
    let mut driver = driver();
    let mut queue = driver.queue();
    let (_, status) = driver.request(0, VIRTIO_BLK_T_IN, sector, 1);
    driver.describe(1, Desc { addr: buffer, len: 512, flags: WRITE | NEXT, next: 2 });
    // Whatever becomes of the first: it lays the chain out for all others.
    if let Some(request) = queue.pop().unwrap() {
        queue.complete(request, Status::Ok);
    }
    let (mapped, _) = driver.memory.get();
    let index = mapped.contiguous(AVAILABLE + 2, 2, &mut 0).unwrap().cast::<AtomicU16>();
    // SAFETY: aligned, inside of a mapping that `mapped` holds, and only ever used as an atomic, by the ring too.
    let index = unsafe { index.as_ref() };
    let over = AtomicBool::new(false);
    let mut failed = 0;
    std::thread::scope(|threads| {
        let ring = threads.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                if let Some(request) = queue.pop().unwrap() {
                    queue.complete(request, Status::Ok);
                }
            }
        });
        for _ in 0..ROUNDS {
            driver.write(status, &[0xFF]);
            less(&driver);
            let before = driver.used_index();
            driver.set_available_head(0);
            let next = driver.available_index().wrapping_add(1);
            more(&driver);
            index.store(next.to_le(), Ordering::Release);
            driver.count_available(next);
            while driver.used_index() == before && !ring.is_finished() {
                std::hint::spin_loop();
            }
            failed += usize::from(driver.read(status, 1) != [0]);
        }
        over.store(true, Ordering::Relaxed);
    });
    failed
}

#[test]
fn a_request_for_memory_that_was_just_added_finds_it() {
    let less = |driver: &Driver| {
        let all = driver.map();
        let (high, _) = driver.table().pop().unwrap();
        driver.memory.set(all.without(high).unwrap());
    };
    let more = |driver: &Driver| driver.memory.set(driver.map());
    assert_eq!(refused(0, HIGH, less, more), 0);
}

#[test]
fn a_request_beyond_the_end_that_a_disk_had_a_moment_ago_is_none() {
    let less = |driver: &Driver| driver.disk.capacity_bytes.store(SMALL_BYTES, Ordering::Relaxed);
    let more = |driver: &Driver| driver.disk.capacity_bytes.store(LARGE_BYTES, Ordering::Relaxed);
    assert_eq!(refused(SMALL_BYTES / 512, BUFFERS, less, more), 0);
}
