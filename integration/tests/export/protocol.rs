//! Single protocol messages: what a front-end may rely on, and what a hostile one gets.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use prestage_integration::export::DiskConfig;

use crate::disk::{LIMIT, Served, export_at, pattern};
use crate::front::{FrontEnd, GUEST_BYTES, Guest, RING, code, fd, pair, wait_readable, words};

const DISK_BYTES: usize = 1 << 20;

fn served() -> Served {
    Served::new(DiskConfig { num_queues: 4, ..DiskConfig::new(DISK_BYTES as u64) }, pattern(DISK_BYTES))
}

fn sector(at: usize) -> Vec<u8> {
    pattern(DISK_BYTES)[at * 512..(at + 1) * 512].to_vec()
}

/// Size, offset, rings and ring size of an in-flight area, as its messages carry them.
fn inflight_message(mmap_size: u64, offset: u64, rings: u16, size: u16) -> Vec<u8> {
    let mut message = [words(&[mmap_size, offset]), [rings.to_ne_bytes(), size.to_ne_bytes()].concat()].concat();
    message.resize(24, 0);
    message
}

fn get_inflight(front: &mut FrontEnd) -> (Vec<u8>, OwnedFd) {
    let (answer, fd) = front.ask_for_fd(code::GET_INFLIGHT_FD, &inflight_message(0, 0, 1, RING)).unwrap();
    (answer, fd.unwrap())
}

#[test]
fn requests_are_answered_and_the_ring_tells_where_it_stopped() {
    let served = served();
    let mut front = FrontEnd::connect(&served.path());
    assert_eq!(front.capacity_bytes(), DISK_BYTES as u64);
    assert_eq!(front.ask(code::GET_QUEUE_NUM, &[]).unwrap(), words(&[4]));
    assert_eq!(front.ask(code::GET_MAX_MEM_SLOTS, &[]).unwrap(), words(&[509]));
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 5);
    guest.submit(1, 0, 6);
    assert_eq!(guest.wait_answered(2), [(0, 0), (1, 0)]);
    assert_eq!((guest.data(0).to_vec(), guest.data(1).to_vec()), (sector(5), sector(6)));

    assert_eq!(front.ask(code::GET_VRING_BASE, &pair(0, 0)).unwrap(), pair(0, 2));
    assert!(served.disk.seen().running.is_empty());
    guest.submit(2, 0, 7);
    guest.start_ring(&mut front, 2);
    assert_eq!(guest.wait_answered(1), [(2, 0)]);
    assert_eq!(served.disk.seen().resumed, 1, "the second start goes on");
}

#[test]
fn a_new_call_descriptor_is_told_of_answers_that_the_old_one_may_have_swallowed() {
    let served = served();
    let mut front = FrontEnd::connect(&served.path());
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 1);
    guest.wait_answered(1);
    guest.call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    front.set(code::SET_VRING_CALL, &words(&[0]), &[fd(&guest.call)]).unwrap();
    wait_readable(&guest.call);
    guest.submit(1, 0, 2);
    assert_eq!(guest.wait_answered(1), [(1, 0)], "and of every later one");
    // Without one the guest polls.
    front.set(code::SET_VRING_CALL, &words(&[0x100]), &[]).unwrap();
    guest.submit(2, 0, 3);
    let began = Instant::now();
    while guest.used_index() != 3 {
        assert!(began.elapsed() < LIMIT, "not answered");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disabled_ring_rests_and_goes_on_when_enabled() {
    let served = served();
    let mut front = FrontEnd::connect(&served.path());
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 1);
    guest.wait_answered(1);
    front.set(code::SET_VRING_ENABLE, &pair(0, 0), &[]).unwrap();
    assert!(served.disk.seen().running.is_empty());
    guest.submit(1, 0, 2);
    front.set(code::SET_VRING_ENABLE, &pair(0, 1), &[]).unwrap();
    assert_eq!(guest.wait_answered(1), [(1, 0)]);
}

#[test]
fn a_reset_device_stops_and_starts_over() {
    let served = served();
    let mut front = FrontEnd::connect(&served.path());
    let guest = Guest::new();
    guest.start(&mut front);
    front.set(code::RESET_DEVICE, &[], &[]).unwrap();
    assert!(served.disk.seen().running.is_empty());
    front.set(code::SET_VRING_ENABLE, &pair(0, 1), &[]).unwrap();
    assert!(served.disk.seen().running.is_empty(), "a reset ring has neither size nor addresses");
    guest.start_ring(&mut front, 0);
    served.disk.wait_for(|seen| seen.running == [0]);
}

/// Requests are in flight when the connection, or the whole agent, goes away.
#[test]
fn requests_in_flight_are_answered_once_over_a_reconnection_and_a_new_agent() {
    for agent_dies in [false, true] {
        let mut served = served();
        let mut front = FrontEnd::connect(&served.path());
        let (shape, area) = get_inflight(&mut front);
        front.set(code::SET_INFLIGHT_FD, &shape, &[area.as_raw_fd()]).unwrap();
        let mut guest = Guest::new();
        guest.start(&mut front);
        guest.submit(0, 0, 10);
        assert_eq!(guest.wait_answered(1), [(0, 0)]);

        served.disk.hold.store(true, Ordering::SeqCst);
        guest.set_data(2, &[0xAB; 512]);
        guest.submit(1, 0, 11);
        guest.submit(2, 1, 12);
        guest.submit(3, 0, 13);
        served.disk.wait_for_held(3);
        drop(front);
        served.disk.wait_for(|seen| seen.disconnected == 1);
        assert_eq!(guest.answered(), []);
        if agent_dies {
            served.export.take().unwrap().stop();
            let config = DiskConfig::new(DISK_BYTES as u64);
            served.export = Some(export_at(&served.path(), config, &served.disk));
        }
        guest.submit(0, 0, 14);
        served.disk.hold.store(false, Ordering::SeqCst);

        let mut front = FrontEnd::connect(&served.path());
        front.set(code::SET_INFLIGHT_FD, &shape, &[area.as_raw_fd()]).unwrap();
        // The front-end knows only what was answered; what was taken, the area tells.
        guest.start(&mut front);
        assert_eq!(guest.wait_answered(4), [(0, 0), (1, 0), (2, 0), (3, 0)]);
        assert_eq!(guest.data(0).to_vec(), sector(14));
        assert_eq!((guest.data(1).to_vec(), guest.data(3).to_vec()), (sector(11), sector(13)));
        assert_eq!(served.disk.bytes()[12 * 512..13 * 512], [0xAB; 512]);
        let base = front.ask(code::GET_VRING_BASE, &pair(0, 0)).unwrap();
        assert_eq!(base, pair(0, 5));
        assert_eq!(guest.used_index(), 5, "each once");
        assert_eq!(served.disk.seen().resumed, 1);
    }
}

#[test]
fn a_resize_is_told_to_the_front_end_and_its_new_sectors_served() {
    let served = served();
    assert!(!served.export().resize(DISK_BYTES as u64).unwrap(), "nobody to tell");
    let mut front = FrontEnd::connect(&served.path());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LIMIT)).unwrap();
    front.set(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]).unwrap();
    drop(theirs);
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 2048);
    assert_eq!(guest.wait_answered(1), [(0, 1)], "past the end");

    served.disk.resize(2 * DISK_BYTES);
    assert!(served.export().resize(2 * DISK_BYTES as u64).unwrap());
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(
        message.to_vec(),
        [2, 1, 0_u32].map(u32::to_ne_bytes).concat(),
        "CONFIG_CHANGE_MSG, no answer asked for"
    );
    assert_eq!(front.capacity_bytes(), 2 * DISK_BYTES as u64);
    guest.submit(0, 0, 2048);
    assert_eq!(guest.wait_answered(1), [(0, 0)]);
    assert!(served.export().resize(1000).is_err());
}

#[test]
fn memory_may_change_under_a_running_ring() {
    let served = served();
    let mut front = FrontEnd::connect(&served.path());
    let mut guest = Guest::new();
    guest.start(&mut front);
    let more = File::from(memfd_create(c"dimm", MFdFlags::MFD_CLOEXEC).unwrap());
    more.set_len(1 << 20).unwrap();
    let dimm = words(&[0, 1 << 32, 1 << 20, 1 << 40, 0]);
    front.set(code::ADD_MEM_REG, &dimm, &[more.as_raw_fd()]).unwrap();
    guest.submit(0, 0, 3);
    assert_eq!(guest.wait_answered(1), [(0, 0)]);
    front.set(code::REM_MEM_REG, &dimm, &[]).unwrap();
    guest.submit(1, 0, 4);
    assert_eq!(guest.wait_answered(1), [(1, 0)]);
    let table = [pair(1, 0), words(&Guest::region())].concat();
    front.set(code::SET_MEM_TABLE, &table, &[guest.memory.as_raw_fd()]).unwrap();
    guest.submit(2, 0, 5);
    assert_eq!(guest.wait_answered(1), [(2, 0)]);
    assert_eq!(served.disk.seen().memory_changes, 4);

    // And the ring's own memory: the ring breaks, its front-end stays.
    let [guest_addr, len, user, offset] = Guest::region();
    front.set(code::REM_MEM_REG, &words(&[0, guest_addr, len, user, offset]), &[]).unwrap();
    guest.submit(0, 0, 6);
    wait_readable(&guest.err);
    assert_eq!(front.capacity_bytes(), DISK_BYTES as u64);
    assert_eq!(served.disk.seen().running, [0], "until the front-end stops it");
    front.ask(code::GET_VRING_BASE, &pair(0, 0)).unwrap();
}

#[test]
fn a_guest_that_breaks_its_ring_is_stopped_and_may_start_over() {
    let served = served();
    let mut front = FrontEnd::connect(&served.path());
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.misbehave();
    wait_readable(&guest.err);
    front.ask(code::GET_VRING_BASE, &pair(0, 0)).unwrap();
    let mut guest = Guest::new();
    drop(front);
    let mut front = FrontEnd::connect(&served.path());
    guest.start(&mut front);
    guest.submit(0, 0, 1);
    assert_eq!(guest.wait_answered(1), [(0, 0)]);
}

#[test]
fn messages_that_make_no_sense_end_their_connection_and_nothing_else() {
    let served = served();
    let null = File::open("/dev/null").unwrap();
    let short = File::from(memfd_create(c"short", MFdFlags::MFD_CLOEXEC).unwrap());
    short.set_len(4096).unwrap();
    let (null, short) = (null.as_raw_fd(), short.as_raw_fd());
    let guest = Guest::new();
    let kick = fd(&guest.kick);
    let ring_addresses =
        |descriptors: u64, used: u64, available: u64| [pair(0, 0), words(&[descriptors, used, available, 0])].concat();
    let region = |guest: u64, len: u64, user: u64, offset: u64| words(&[0, guest, len, user, offset]);
    let config = |offset: u32, size: u32, payload: usize| {
        let mut message = [offset, size, 0].map(u32::to_ne_bytes).concat();
        message.resize(12 + payload, 0);
        message
    };
    let [guest_addr, len, user, _] = Guest::region();
    let bad: Vec<(&str, u32, Vec<u8>, Vec<i32>)> = vec![
        ("unknown message", 4711, vec![], vec![]),
        ("features not offered", code::SET_FEATURES, words(&[u64::MAX]), vec![]),
        ("protocol features not offered", code::SET_PROTOCOL_FEATURES, words(&[u64::MAX]), vec![]),
        ("payload missing", code::SET_FEATURES, vec![], vec![]),
        ("payload too long", code::SET_FEATURES, words(&[0, 0]), vec![]),
        ("ring that does not exist", code::SET_VRING_NUM, pair(4, 16), vec![]),
        ("ring far away", code::SET_VRING_ENABLE, pair(u32::MAX, 1), vec![]),
        ("base of no ring", code::GET_VRING_BASE, pair(100, 0), vec![]),
        ("ring of 0", code::SET_VRING_NUM, pair(0, 0), vec![]),
        ("ring of 3", code::SET_VRING_NUM, pair(0, 3), vec![]),
        ("ring of 2048", code::SET_VRING_NUM, pair(0, 2048), vec![]),
        ("ring of 65536", code::SET_VRING_NUM, pair(0, 65536), vec![]),
        ("base past 65535", code::SET_VRING_BASE, pair(0, 65536), vec![]),
        ("half enabled", code::SET_VRING_ENABLE, pair(0, 2), vec![]),
        ("descriptors unaligned", code::SET_VRING_ADDR, ring_addresses(8, 0, 0), vec![]),
        ("running ring moved", code::SET_VRING_ADDR, ring_addresses(user, user, user), vec![]),
        ("running ring resized", code::SET_VRING_NUM, pair(0, 8), vec![]),
        ("running ring put back", code::SET_VRING_BASE, pair(0, 0), vec![]),
        ("other features under a running ring", code::SET_FEATURES, words(&[1 << 32]), vec![]),
        ("in-flight area under a running ring", code::SET_INFLIGHT_FD, inflight_message(4096, 0, 1, 16), vec![short]),
        ("kick without descriptor", code::SET_VRING_KICK, words(&[1]), vec![]),
        ("kick by polling", code::SET_VRING_KICK, words(&[0x101]), vec![]),
        ("kick that is a device", code::SET_VRING_KICK, words(&[1]), vec![null]),
        ("kick that is memory", code::SET_VRING_KICK, words(&[1]), vec![short]),
        ("two kicks", code::SET_VRING_KICK, words(&[1]), vec![kick, kick]),
        ("kick of no ring", code::SET_VRING_KICK, words(&[77]), vec![kick]),
        ("call that is a device", code::SET_VRING_CALL, words(&[1]), vec![null]),
        ("error event that is a device", code::SET_VRING_ERR, words(&[1]), vec![null]),
        ("region without descriptor", code::ADD_MEM_REG, region(1 << 32, 4096, 1 << 40, 0), vec![]),
        ("region of nothing", code::ADD_MEM_REG, region(1 << 32, 0, 1 << 40, 0), vec![short]),
        ("region longer than its file", code::ADD_MEM_REG, region(1 << 32, 8192, 1 << 40, 0), vec![short]),
        ("region past its file", code::ADD_MEM_REG, region(1 << 32, 4096, 1 << 40, 4096), vec![short]),
        ("region that wraps", code::ADD_MEM_REG, region(u64::MAX - 4095, 4096, 1 << 40, 0), vec![short]),
        ("offset that wraps", code::ADD_MEM_REG, region(1 << 32, 4096, 1 << 40, u64::MAX), vec![short]),
        ("region over another", code::ADD_MEM_REG, region(guest_addr + len - 1, 4096, 1 << 40, 0), vec![short]),
        ("user address over another", code::ADD_MEM_REG, region(1 << 32, 4096, user, 0), vec![short]),
        ("region on a device", code::ADD_MEM_REG, region(1 << 32, 4096, 1 << 40, 0), vec![null]),
        ("region that is not there removed", code::REM_MEM_REG, region(1 << 32, 4096, 1 << 40, 0), vec![]),
        ("table without descriptors", code::SET_MEM_TABLE, [pair(1, 0), words(&Guest::region())].concat(), vec![]),
        (
            "table shorter than it says",
            code::SET_MEM_TABLE,
            [pair(9, 0), words(&Guest::region())].concat(),
            vec![short],
        ),
        ("table of nothing", code::SET_MEM_TABLE, pair(0, 0), vec![]),
        ("configuration of no length", code::GET_CONFIG, config(0, 0, 0), vec![]),
        ("configuration that wraps", code::GET_CONFIG, config(u32::MAX, 60, 60), vec![]),
        ("in-flight area of no ring", code::GET_INFLIGHT_FD, inflight_message(0, 0, 0, 16), vec![]),
        ("in-flight area of too many rings", code::GET_INFLIGHT_FD, inflight_message(0, 0, 65535, 65535), vec![]),
        ("in-flight area without descriptor", code::SET_INFLIGHT_FD, inflight_message(4096, 0, 1, 16), vec![]),
        ("in-flight area that is too small", code::SET_INFLIGHT_FD, inflight_message(16, 0, 1, 16), vec![short]),
        ("channel without descriptor", code::SET_BACKEND_REQ_FD, vec![], vec![]),
        ("channel that is a device", code::SET_BACKEND_REQ_FD, vec![], vec![null]),
        ("channel that is an event", code::SET_BACKEND_REQ_FD, vec![], vec![kick]),
        ("descriptor where none belongs", code::GET_FEATURES, vec![], vec![null]),
    ];
    for (turn, (name, code, payload, fds)) in bad.into_iter().enumerate() {
        let mut front = FrontEnd::connect(&served.path());
        let guest = Guest::new();
        guest.start(&mut front);
        front.send(code, 1 << 3, &payload, &fds).unwrap();
        assert!(front.is_cut_off(), "{name}");
        served.disk.wait_for(|seen| seen.disconnected == turn + 1);
        assert!(served.disk.seen().running.is_empty(), "{name}");
    }

    // Rings that would lie outside of the memory, when everything else is there.
    let before = served.disk.seen();
    for descriptors in [0, user + len - 16, u64::MAX - 15] {
        let mut front = FrontEnd::connect(&served.path());
        let guest = Guest::new();
        guest.start(&mut front);
        front.ask(code::GET_VRING_BASE, &pair(0, 0)).unwrap();
        let addresses = ring_addresses(descriptors, user + 0x2000, user + 0x1000);
        front.send(code::SET_VRING_ADDR, 0, &addresses, &[]).unwrap();
        front.send(code::SET_VRING_KICK, 0, &words(&[0]), &[fd(&guest.kick)]).unwrap();
        assert!(front.is_cut_off(), "{descriptors:#x}");
    }
    served.disk.wait_for(|seen| seen.disconnected == before.disconnected + 3);

    let mut front = FrontEnd::connect(&served.path());
    // An answer without payload says no; the connection stays.
    let answer = front.ask(code::GET_CONFIG, &config(250, 60, 60)).unwrap();
    assert_eq!(answer, config(250, 0, 0));
    assert!(front.set(code::SET_CONFIG, &config(32, 1, 1), &[]).is_err(), "there is nothing to write");
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 1);
    assert_eq!(guest.wait_answered(1), [(0, 0)], "after all of that the disk is served");
}

/// xorshift64, below `n`.
fn random(state: &mut u64, n: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state % n
}

#[test]
fn random_messages_in_any_state_leave_the_export_alive() {
    let served = served();
    let guest = Guest::new();
    let null = File::open("/dev/null").unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15;
    for turn in 0..400 {
        // Silent, agreed on features, or with a running ring.
        let mut front = match random(&mut state, 3) {
            0 => FrontEnd::mute(&served.path()),
            _ => FrontEnd::connect(&served.path()),
        };
        served.disk.wait_for(|seen| seen.connected == turn + 1);
        if random(&mut state, 2) == 0 && front.agreed() {
            guest.start(&mut front);
        }
        for _ in 0..random(&mut state, 30) {
            // Some of them have answers that nobody reads; that is part of it.
            let code = random(&mut state, 45) as u32;
            let payload: Vec<u8> = match random(&mut state, 3) {
                0 => words(&[random(&mut state, 5)]),
                1 => words(&[0, 1 << 24, GUEST_BYTES, random(&mut state, u64::MAX), 0])
                    [..8 * random(&mut state, 6) as usize]
                    .to_vec(),
                _ => (0..random(&mut state, 80)).map(|_| random(&mut state, 256) as u8).collect(),
            };
            let fds: Vec<_> = [guest.memory.as_raw_fd(), fd(&guest.kick), null.as_raw_fd()]
                .into_iter()
                .take(random(&mut state, 4) as usize)
                .collect();
            let flags = 8 * random(&mut state, 2) as u32;
            if front.send(code, flags, &payload, &fds).is_err() {
                break;
            }
        }
        if random(&mut state, 4) == 0 {
            let noise: Vec<u8> = (0..random(&mut state, 100)).map(|_| random(&mut state, 256) as u8).collect();
            let _ = front.send_raw(&noise);
        }
        drop(front);
        served.disk.wait_for(|seen| seen.disconnected == turn + 1);
    }
    assert!(served.disk.seen().running.is_empty());
    let mut front = FrontEnd::connect(&served.path());
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 1);
    assert_eq!(guest.wait_answered(1), [(0, 0)]);
}
