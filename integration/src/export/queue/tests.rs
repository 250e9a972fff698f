//! A ring against a driver in test memory: `chains` compares random chains with a naive parser, `crash` ends the agent
//! between any two stores, `race` changes what a ring may use beside it, and below, what a driver may do wrong.

mod chains;
mod crash;
mod race;
mod speed;

use super::*;
use crate::export::RequestKind;
use crate::export::config::DiskConfig;
use crate::export::memory::{GuestMemory, RegionSpec};
use crate::export::testing::{
    ADJACENT, AVAILABLE, BUFFERS, Desc, Driver, HIGH, INDIRECT, LOW, NEXT, REGION_BYTES, WRITE, header_bytes,
    memory_file, raised,
};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

fn driver() -> Driver {
    Driver::new(16, DiskConfig { serial: "prestage-1".into(), ..DiskConfig::new(1 << 20) })
}

fn popped(queue: &mut Queue) -> Request {
    queue.pop().unwrap().expect("a request is there")
}

#[test]
fn a_read_reaches_the_guest_and_its_status_and_length_with_it() {
    let mut driver = driver();
    let (buffer, status) = driver.request(0, VIRTIO_BLK_T_IN, 8, 8);
    let mut queue = driver.queue();
    let request = popped(&mut queue);
    assert_eq!(*request.kind(), RequestKind::Read { offset_bytes: 4096, len_bytes: 4096 });
    assert_eq!((request.data_len(), queue.in_flight()), (4096, 1));
    request.copy_to_guest(0, &[1; 4000]).unwrap();
    request.zero_guest(4000, 96).unwrap();
    assert!(driver.take_used().is_empty());
    queue.complete(request, Status::Ok);
    assert_eq!(driver.take_used(), [(0, 4097)]);
    assert_eq!(driver.read(buffer, 4096), [vec![1; 4000], vec![0; 96]].concat());
    assert_eq!(driver.read(status, 1), [0]);
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn a_failed_read_tells_the_guest_of_no_data() {
    let mut driver = driver();
    let (_, status) = driver.request(0, VIRTIO_BLK_T_IN, 0, 8);
    let mut queue = driver.queue();
    let request = popped(&mut queue);
    queue.complete(request, Status::IoError);
    assert_eq!(driver.take_used(), [(0, 1)]);
    assert_eq!(driver.read(status, 1), [1]);
}

#[test]
fn copies_stay_inside_the_request() {
    let mut driver = driver();
    driver.request(0, VIRTIO_BLK_T_IN, 0, 1);
    driver.request(3, VIRTIO_BLK_T_OUT, 0, 1);
    let mut queue = driver.queue();
    let (read, write) = (popped(&mut queue), popped(&mut queue));
    for (at, len) in [(0, 513), (512, 1), (513, 0), (u64::MAX, 1), (1, 512)] {
        assert!(read.copy_to_guest(at, &vec![0; len]).is_err(), "{len} at {at}");
        assert!(write.copy_from_guest(at, &mut vec![0; len]).is_err(), "{len} at {at}");
    }
    assert!(read.copy_to_guest(512, &[]).is_ok());
    assert!(write.copy_to_guest(0, &[1]).is_err(), "a write's memory is the guest's");
    assert!(write.zero_guest(0, 1).is_err());
}

#[test]
fn get_id_is_answered_with_the_serial() {
    let mut driver = driver();
    let (buffer, status) = driver.request(0, VIRTIO_BLK_T_GET_ID, 0, 0);
    driver.describe(1, Desc { addr: buffer, len: 20, flags: WRITE | NEXT, next: 2 });
    let mut queue = driver.queue();
    assert!(queue.pop().unwrap().is_none());
    assert_eq!(driver.take_used(), [(0, 21)]);
    assert_eq!(driver.read(buffer, 20), b"prestage-1\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.read(status, 1), [0]);
    queue.signal();
    assert!(raised(&driver.call));
}

#[test]
fn unknown_and_unoffered_requests_are_unsupported() {
    for (kind, offered) in [(2, true), (99, true), (11, false), (13, false), (14, true), (0x8000_0000, true)] {
        let config = DiskConfig { discard: offered, write_zeroes: offered, ..DiskConfig::new(1 << 20) };
        let mut driver = Driver::new(16, config);
        let (_, status) = driver.request(0, kind, 0, 1);
        let mut queue = driver.queue();
        assert!(queue.pop().unwrap().is_none());
        assert_eq!(driver.read(status, 1), [2], "type {kind}");
        assert_eq!(driver.take_used(), [(0, 1)]);
    }
}

#[test]
fn ranges_are_checked_one_by_one() {
    let capacity = 1 << 20;
    let run = |kind: u32, ranges: &[(u64, u32, u32)]| {
        let mut driver = Driver::new(16, DiskConfig::new(capacity));
        let (buffer, status) = driver.request(0, kind, 0, 0);
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        driver.write(buffer, &bytes);
        driver.describe(1, Desc { addr: buffer, len: bytes.len() as u32, flags: NEXT, next: 2 });
        let mut queue = driver.queue();
        match queue.pop().unwrap() {
            Some(request) => Ok(request.kind().clone()),
            None => Err(driver.read(status, 1)[0]),
        }
    };
    let (discard, zeroes) = (11, 13);
    let range =
        |sector: u64, sectors: u64| crate::export::ByteRange { offset_bytes: sector * 512, len_bytes: sectors * 512 };
    assert_eq!(run(discard, &[(0, 1, 0)]), Ok(RequestKind::Discard { ranges: vec![range(0, 1)] }));
    assert_eq!(
        run(zeroes, &[(0, 8, 1), (2047, 1, 1)]),
        Ok(RequestKind::WriteZeroes { ranges: vec![range(0, 8), range(2047, 1)], unmap: true })
    );
    // Some of its space must stay.
    let mixed = run(zeroes, &[(0, 8, 1), (8, 8, 0)]);
    assert_eq!(mixed, Ok(RequestKind::WriteZeroes { ranges: vec![range(0, 8), range(8, 8)], unmap: false }));
    for (ranges, status) in [
        (vec![], 1),
        (vec![(0, 0, 0)], 1),
        (vec![(0, 8, 0), (2047, 2, 0)], 1),
        (vec![(u64::MAX, 1, 0)], 1),
        (vec![(u64::MAX / 512, 1, 0)], 1),
        (vec![(0, u32::MAX, 0)], 1),
        (vec![(0, 1, 0); 17], 1),
        (vec![(0, 1, 2)], 2),
    ] {
        assert_eq!(run(discard, &ranges), Err(status), "{ranges:?}");
        assert_eq!(run(zeroes, &ranges), Err(status), "{ranges:?}");
    }
    assert_eq!(run(discard, &[(0, 1, 1)]), Err(2), "unmap means nothing to a discard");
}

#[test]
fn a_resized_disk_takes_requests_up_to_its_new_end() {
    let mut driver = driver();
    let (_, status) = driver.request(0, VIRTIO_BLK_T_IN, 2048, 1);
    let mut queue = driver.queue();
    assert!(queue.pop().unwrap().is_none());
    assert_eq!(driver.read(status, 1), [1]);
    driver.disk.capacity_bytes.store((1 << 20) + 512, Ordering::Relaxed);
    driver.request(0, VIRTIO_BLK_T_IN, 2048, 1);
    assert!(queue.pop().unwrap().is_some());
}

/// What a hostile driver does, and whether the ring breaks by it.
#[test]
fn a_driver_that_breaks_the_protocol_breaks_its_ring_and_nothing_else() {
    type Harm = fn(&mut Driver);
    const OUTSIDE: u64 = ADJACENT + REGION_BYTES;
    let harms: &[(&str, Harm)] = &[
        ("head past the ring", |d| d.make_available(16)),
        ("head 65535", |d| d.make_available(u16::MAX)),
        ("available index past the ring", |d| d.advance_available(17)),
        ("available index going back", |d| d.advance_available(u16::MAX)),
        ("chain that is a loop", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 16, flags: NEXT, next: 0 });
            d.make_available(0);
        }),
        ("chain of two that is a loop", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 0, flags: NEXT, next: 1 });
            d.describe(1, Desc { addr: BUFFERS, len: 0, flags: NEXT, next: 0 });
            d.make_available(0);
        }),
        ("next past the ring", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 16, flags: NEXT, next: 16 });
            d.make_available(0);
        }),
        ("buffer outside of memory", |d| {
            d.describe(0, Desc { addr: OUTSIDE, len: 16, flags: 0, next: 0 });
            d.make_available(0);
        }),
        ("buffer in the hole", |d| {
            d.describe(0, Desc { addr: OUTSIDE - 8, len: 16, flags: 0, next: 0 });
            d.make_available(0);
        }),
        ("buffer below memory", |d| {
            d.describe(0, Desc { addr: 0, len: 16, flags: 0, next: 0 });
            d.make_available(0);
        }),
        ("buffer that wraps around", |d| {
            d.describe(0, Desc { addr: u64::MAX - 4, len: u32::MAX, flags: 0, next: 0 });
            d.make_available(0);
        }),
        ("buffer of 4 GiB", |d| {
            d.describe(0, Desc { addr: HIGH, len: u32::MAX, flags: WRITE, next: 0 });
            d.make_available(0);
        }),
        ("no status", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 16, flags: 0, next: 0 });
            d.make_available(0);
        }),
        ("chain without a byte", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 0, flags: 0, next: 0 });
            d.make_available(0);
        }),
        ("status without a byte", |d| {
            d.request(0, VIRTIO_BLK_T_FLUSH, 0, 0);
            d.describe(2, Desc { addr: BUFFERS, len: 0, flags: WRITE, next: 0 });
        }),
        ("readable after writable", |d| {
            d.request(0, VIRTIO_BLK_T_IN, 0, 1);
            d.describe(2, Desc { addr: BUFFERS, len: 1, flags: 0, next: 0 });
        }),
        ("indirect table outside of memory", |d| {
            d.describe(0, Desc { addr: OUTSIDE - 16, len: 32, flags: INDIRECT, next: 0 });
            d.make_available(0);
        }),
        ("indirect table of no descriptor", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 0, flags: INDIRECT, next: 0 });
            d.make_available(0);
        }),
        ("indirect table of half a descriptor", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 24, flags: INDIRECT, next: 0 });
            d.make_available(0);
        }),
        ("indirect table in a chain that goes on", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 48, flags: INDIRECT | NEXT, next: 1 });
            d.make_available(0);
        }),
        ("indirect table in an indirect table", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 48, flags: INDIRECT, next: 0 });
            d.describe_at(BUFFERS, 0, Desc { addr: BUFFERS, len: 48, flags: INDIRECT, next: 0 });
            d.make_available(0);
        }),
        ("next past the indirect table", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 48, flags: INDIRECT, next: 0 });
            d.describe_at(BUFFERS, 0, Desc { addr: BUFFERS, len: 16, flags: NEXT, next: 3 });
            d.make_available(0);
        }),
        ("loop in an indirect table", |d| {
            d.describe(0, Desc { addr: BUFFERS, len: 48, flags: INDIRECT, next: 0 });
            d.describe_at(BUFFERS, 0, Desc { addr: BUFFERS, len: 16, flags: NEXT, next: 0 });
            d.make_available(0);
        }),
        ("indirect table that was not agreed on", |d| {
            d.features &= !(1 << VIRTIO_RING_F_INDIRECT_DESC);
            d.describe(0, Desc { addr: BUFFERS, len: 48, flags: INDIRECT, next: 0 });
            d.make_available(0);
        }),
        ("head twice in flight", |d| {
            d.request(0, VIRTIO_BLK_T_IN, 0, 1);
            d.make_available(0);
        }),
    ];
    for (name, harm) in harms {
        let mut driver = driver();
        harm(&mut driver);
        let mut queue = driver.queue();
        let mut requests = Vec::new();
        let error = loop {
            match queue.pop() {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => panic!("{name}: not noticed"),
                Err(error) => break error,
            }
        };
        assert!(!matches!(error, QueueError::Broken), "{name}: {error}");
        assert!(raised(&driver.err), "{name}: front-end not told");
        assert!(matches!(queue.pop(), Err(QueueError::Broken)), "{name}: goes on");
        assert!(!raised(&driver.err), "{name}: told twice");
        assert!(
            !queue.enable_notification() && !queue.has_available(),
            "{name}: a broken ring has nothing more to pop"
        );
        // Requests from before may still come to their end.
        assert_eq!(usize::from(queue.in_flight()), requests.len());
        for request in requests {
            queue.complete(request, Status::Ok);
        }
        queue.signal();
        assert_eq!((queue.in_flight(), driver.take_used()), (0, vec![]), "{name}");
        queue.stop();
    }
}

#[test]
fn a_guest_that_floods_the_ring_with_bad_requests_does_not_hold_pop() {
    let mut driver = Driver::new(256, DiskConfig::new(1 << 20));
    driver.request(0, 99, 0, 1);
    for head in 1..200 {
        // Each its own head, all the same chain after it.
        let header = BUFFERS + 0x1800;
        driver.describe(head, Desc { addr: header, len: 16, flags: NEXT, next: 255 });
        driver.describe(255, Desc { addr: header + 0x100, len: 1, flags: WRITE, next: 0 });
        driver.make_available(head);
    }
    let mut queue = driver.queue();
    assert!(queue.pop().unwrap().is_none());
    let first = driver.take_used().len();
    assert!((1..200).contains(&first), "{first}");
    assert!(queue.enable_notification(), "there is more");
    while queue.enable_notification() {
        assert!(queue.pop().unwrap().is_none());
    }
    assert_eq!(first + driver.take_used().len(), 200);
}

#[test]
fn the_guest_is_interrupted_only_when_it_asked_to_be() {
    let mut driver = driver();
    let mut queue = driver.queue();
    let mut answer = |driver: &mut Driver, heads: std::ops::Range<u16>| {
        for head in heads {
            driver.request(head * 3, VIRTIO_BLK_T_FLUSH, 0, 0);
        }
        while let Some(request) = queue.pop().unwrap() {
            queue.complete(request, Status::Ok);
        }
        queue.signal();
        queue.signal();
        let told = raised(&driver.call);
        driver.take_used();
        told
    };
    assert!(answer(&mut driver, 0..1), "the first answer of a run is always told");
    driver.set_used_event(3);
    assert!(!answer(&mut driver, 0..2), "used index 3 has not been passed");
    assert!(answer(&mut driver, 0..1));
    assert!(!answer(&mut driver, 0..4), "and is passed once");
    driver.set_used_event(9);
    assert!(answer(&mut driver, 0..5), "by a batch as well");

    driver.features &= !(1 << VIRTIO_RING_F_EVENT_IDX);
    let mut queue = driver.try_queue(13, Driver::addresses()).unwrap();
    let mut answer = |driver: &mut Driver| {
        driver.request(0, VIRTIO_BLK_T_FLUSH, 0, 0);
        let request = popped(&mut queue);
        queue.complete(request, Status::Ok);
        queue.signal();
        driver.take_used();
        raised(&driver.call)
    };
    assert!(answer(&mut driver));
    driver.set_available_flags(1);
    assert!(!answer(&mut driver));
    driver.set_available_flags(0);
    assert!(answer(&mut driver));
}

#[test]
fn the_guest_kicks_only_when_the_device_sleeps() {
    let mut driver = driver();
    let mut queue = driver.queue();
    assert!(!queue.enable_notification() && !queue.has_available());
    assert_eq!(driver.available_event(), 0);
    driver.request(0, VIRTIO_BLK_T_FLUSH, 0, 0);
    assert!(queue.has_available(), "whoever looks needs no kick");
    assert!(queue.enable_notification(), "what came before the guest was told is not kicked for");
    queue.disable_notification();
    let request = popped(&mut queue);
    assert!(!queue.has_available());
    queue.complete(request, Status::Ok);
    assert!(!queue.enable_notification());
    assert_eq!(driver.available_event(), 1);

    driver.features &= !(1 << VIRTIO_RING_F_EVENT_IDX);
    let mut queue = driver.try_queue(1, Driver::addresses()).unwrap();
    queue.disable_notification();
    assert_eq!(driver.used_flags(), 1);
    assert!(!queue.enable_notification());
    assert_eq!(driver.used_flags(), 0);
}

#[test]
fn kicks_are_taken_off_the_descriptor() {
    let driver = driver();
    let queue = driver.queue();
    driver.kick.write(1).unwrap();
    queue.clear_kick();
    queue.clear_kick();
    assert!(!raised(&driver.kick));
}

#[test]
fn rings_that_are_not_in_memory_do_not_start() {
    let driver = driver();
    let good = Driver::addresses();
    for (descriptors, available, used) in [
        (0, good.available, good.used),
        (good.descriptors + 8, good.available, good.used),
        (good.descriptors, good.available + 1, good.used),
        (good.descriptors, good.available, good.used + 2),
        (good.descriptors, u64::MAX - 1, good.used),
        // The last bytes of a region: one too few for the ring with its event field.
        (good.descriptors, good.available, 0x7e00_0010_0000 - 16 * 8 - 4),
        (0x7f00_0020_0000 - 16 * 15, good.available, good.used),
    ] {
        let addresses = RingAddresses { descriptors, available, used };
        assert!(matches!(driver.try_queue(0, addresses), Err(QueueStartError::Ring(_))), "{addresses:x?}");
    }
}

#[test]
fn a_ring_goes_on_when_its_memory_is_mapped_anew_and_breaks_when_it_goes_away() {
    let mut driver = driver();
    let (buffer, _) = driver.request(0, VIRTIO_BLK_T_IN, 0, 8);
    let mut queue = driver.queue();
    let request = popped(&mut queue);
    driver.memory.set(driver.map());
    driver.request(3, VIRTIO_BLK_T_FLUSH, 0, 0);
    let flush = popped(&mut queue);
    // The old memory serves the request that began with it.
    request.copy_to_guest(0, &[9; 4096]).unwrap();
    queue.complete(request, Status::Ok);
    queue.complete(flush, Status::Ok);
    assert_eq!(driver.read(buffer, 4096), [9; 4096]);
    assert_eq!(driver.take_used().len(), 2);

    driver.request(0, VIRTIO_BLK_T_IN, 0, 8);
    let request = popped(&mut queue);
    driver.memory.set(GuestMemory::default());
    queue.refresh_memory();
    assert!(raised(&driver.err));
    request.copy_to_guest(0, &[1; 4096]).unwrap();
    queue.complete(request, Status::Ok);
    assert_eq!(queue.in_flight(), 0);
    assert!(queue.pop().is_err());
}

#[test]
fn requests_of_another_ring_are_not_answered_here() {
    let mut driver = driver();
    driver.request(0, VIRTIO_BLK_T_IN, 0, 8);
    let (mut before, mut now) = (driver.queue(), driver.queue());
    let request = popped(&mut before);
    popped(&mut now);
    now.complete(request, Status::Ok);
    assert_eq!((now.in_flight(), driver.take_used()), (1, vec![]));
}

#[test]
fn memory_tables_that_make_no_sense_are_refused() {
    let spec = |guest_addr, len, user_addr, file_offset| RegionSpec { guest_addr, len, user_addr, file_offset };
    let page = 4096;
    let one = GuestMemory::default().with(spec(page, page, page, 0), memory_file(page)).unwrap();
    for bad in [
        spec(8 * page, 0, 8 * page, 0),
        spec(u64::MAX - page + 1, page, 8 * page, 0),
        spec(8 * page, page, u64::MAX, 0),
        spec(8 * page, page, 8 * page, u64::MAX),
        spec(8 * page, u64::MAX, 8 * page, 0),
        // Overlaps, in either address space.
        spec(page, page, 8 * page, 0),
        spec(2 * page - 1, page, 8 * page, 0),
        spec(8 * page, page, 1, 0),
        // More than the file holds.
        spec(8 * page, 2 * page, 8 * page, 0),
        spec(8 * page, page, 8 * page, page),
        spec(8 * page, 1 << 46, 8 * page, 0),
    ] {
        assert!(one.with(bad, memory_file(page)).is_err(), "{bad:x?}");
    }
    assert!(one.without(spec(page, 2 * page, page, 0)).is_err());
    assert!(one.without(spec(page, page, page, 77)).is_ok(), "the offset does not count");
    // A file offset inside a page, as hugetlbfs regions may have.
    let shifted = one.with(spec(8 * page, page, 8 * page, 512), memory_file(2 * page)).unwrap();
    assert!(shifted.contiguous(8 * page, page, &mut 0).is_some());
    assert!(shifted.contiguous(8 * page, page + 1, &mut 0).is_none());
}

#[test]
fn a_buffer_may_lie_over_the_edge_of_two_regions() {
    let mut driver = driver();
    let (_, status) = driver.request(0, VIRTIO_BLK_T_IN, 0, 1);
    driver.describe(1, Desc { addr: ADJACENT - 100, len: 512, flags: WRITE | NEXT, next: 2 });
    let mut queue = driver.queue();
    let request = popped(&mut queue);
    let bytes: Vec<u8> = (0..512).map(|i| i as u8).collect();
    request.copy_to_guest(0, &bytes).unwrap();
    queue.complete(request, Status::Ok);
    assert_eq!(driver.read(ADJACENT - 100, 512), bytes);
    assert_eq!(driver.read(status, 1), [0]);
    assert_eq!(driver.read(LOW, 1).len(), 1);
    assert_eq!(header_bytes(1, 2)[8], 2);
}
