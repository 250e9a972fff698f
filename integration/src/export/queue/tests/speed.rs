//! What a request costs, apart from its data and the store. By hand:
//! `cargo test --release -p prestage-integration --lib speed -- --ignored --nocapture`

use std::time::{Duration, Instant};

use super::*;

const SIZE: u16 = 256;

/// A ring full of 4 KiB reads, as Linux lays them out: an indirect table of three each.
fn full_ring(inflight: bool) -> Driver {
    let mut driver = Driver::new(SIZE, DiskConfig::new(1 << 30));
    if inflight {
        driver.track_inflight();
    }
    for head in 0..SIZE {
        let table = BUFFERS + u64::from(head) * 0x80;
        let (header, status) = (table + 0x30, table + 0x40);
        driver.write(header, &header_bytes(VIRTIO_BLK_T_IN, u64::from(head) * 8));
        let buffer = HIGH + u64::from(head) * 4096;
        driver.describe_at(table, 0, Desc { addr: header, len: 16, flags: NEXT, next: 1 });
        driver.describe_at(table, 1, Desc { addr: buffer, len: 4096, flags: NEXT | WRITE, next: 2 });
        driver.describe_at(table, 2, Desc { addr: status, len: 1, flags: WRITE, next: 0 });
        driver.describe(head, Desc { addr: table, len: 48, flags: INDIRECT, next: 0 });
        driver.make_available(head);
    }
    driver
}

fn nanoseconds_per_request(inflight: bool, data: Option<&[u8]>) -> f64 {
    const ROUNDS: u32 = 4000;
    let mut driver = full_ring(inflight);
    let mut queue = driver.queue();
    let mut spent = Duration::ZERO;
    let mut batch = Vec::with_capacity(32);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        for _ in 0..usize::from(SIZE) / 32 {
            while batch.len() < 32 {
                batch.push(queue.pop().unwrap().unwrap());
            }
            for request in batch.drain(..) {
                if let Some(data) = data {
                    request.copy_to_guest(0, data).unwrap();
                }
                queue.complete(request, Status::Ok);
            }
        }
        spent += began.elapsed();
        // The same heads in the same places again.
        driver.advance_available(SIZE);
    }
    spent.as_nanos() as f64 / f64::from(ROUNDS) / f64::from(SIZE)
}

#[test]
#[ignore = "a measurement, in release"]
fn cost_of_a_request() {
    let page = [7; 4096];
    for inflight in [false, true] {
        let bare = nanoseconds_per_request(inflight, None);
        let copied = nanoseconds_per_request(inflight, Some(&page));
        println!("in-flight tracking {inflight}: pop + complete {bare:.0} ns, with a copy of 4 KiB {copied:.0} ns");
    }
}
