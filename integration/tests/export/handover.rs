//! An export that one owner releases and another goes on with: the front-end's connection stays, and so does everything it
//! has said.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use prestage_integration::export::{DiskConfig, Export, ExportState};
use prestage_integration::handover::Parcel;

use crate::disk::{MemoryDisk, Served, pattern, runner};
use crate::front::{FrontEnd, Guest, RING, code, pair, words};

const DISK_BYTES: usize = 1 << 20;

fn config() -> DiskConfig {
    DiskConfig { num_queues: 4, ..DiskConfig::new(DISK_BYTES as u64) }
}

/// The state as another process gets it: through text and a parcel.
fn sent(state: ExportState<OwnedFd>) -> ExportState<OwnedFd> {
    let mut parcel = Parcel::default();
    let Ok(packed) = state.map(&mut |fd| Ok::<_, Infallible>(parcel.put(fd)));
    let text = serde_json::to_string(&packed).unwrap();
    let read: ExportState<_> = serde_json::from_str(&text).unwrap();
    read.map(&mut |place| parcel.take(place)).unwrap()
}

/// Replaces the export by one that another disk object runs, of the same bytes.
fn hand_over(served: &mut Served, config: DiskConfig) -> Arc<MemoryDisk> {
    let state = served.export.take().unwrap().release().unwrap();
    assert!(served.path().exists(), "the socket stays");
    let next = MemoryDisk::new(served.disk.bytes());
    served.export = Some(Export::adopt(served.path(), config, runner(&next), sent(state)).unwrap());
    next
}

fn sector(at: usize) -> Vec<u8> {
    pattern(DISK_BYTES)[at * 512..(at + 1) * 512].to_vec()
}

#[test]
fn a_connection_goes_on_under_a_new_owner() {
    let mut served = Served::new(config(), pattern(DISK_BYTES));
    let mut front = FrontEnd::connect(&served.path());
    let mut asked = words(&[0, 0]);
    asked.extend([1_u16.to_ne_bytes(), RING.to_ne_bytes()].concat());
    asked.resize(24, 0);
    let (inflight, file) = front.ask_for_fd(code::GET_INFLIGHT_FD, &asked).unwrap();
    front.set(code::SET_INFLIGHT_FD, &inflight, &[file.unwrap().as_raw_fd()]).unwrap();
    let mut guest = Guest::new();
    guest.start(&mut front);
    guest.submit(0, 0, 5);
    assert_eq!(guest.wait_answered(1), [(0, 0)]);

    for round in 0..3 {
        let state = served.export.take().unwrap().release().unwrap();
        assert!(state.is_connected());
        assert!(served.disk.seen().running.is_empty());
        assert_eq!(served.disk.seen().disconnected, 0, "nobody was sent away");
        // Nobody is there now. The guest asks, and its kick waits.
        guest.submit(1, 0, 6 + round);
        let next = MemoryDisk::new(served.disk.bytes());
        served.export = Some(Export::adopt(served.path(), config(), runner(&next), sent(state)).unwrap());
        served.disk = next;
        assert_eq!(guest.wait_answered(1), [(1, 0)]);
        assert_eq!(guest.data(1).to_vec(), sector(6 + round as usize));
        let seen = served.disk.seen();
        assert_eq!((seen.connected, seen.resumed, seen.running), (1, 1, vec![0]));
        // The connection understands what it did before: answers, acknowledgements, descriptors.
        assert_eq!(front.capacity_bytes(), DISK_BYTES as u64);
        assert_eq!(front.ask(code::GET_QUEUE_NUM, &[]).unwrap(), words(&[4]));
    }
    assert_eq!(front.ask(code::GET_VRING_BASE, &pair(0, 0)).unwrap(), pair(0, 4));
    guest.start_ring(&mut front, 4);
    guest.submit(2, 0, 9);
    assert_eq!(guest.wait_answered(1), [(2, 0)]);
    drop(front);
    served.disk.wait_for(|seen| seen.disconnected == 1);
    // The socket is as good as new.
    assert_eq!(FrontEnd::connect(&served.path()).capacity_bytes(), DISK_BYTES as u64);
}

#[test]
fn half_a_message_is_read_by_the_next_owner() {
    let mut served = Served::new(config(), pattern(DISK_BYTES));
    let mut front = FrontEnd::connect(&served.path());
    let message = [code::GET_QUEUE_NUM, 1, 0].map(u32::to_ne_bytes).concat();
    front.send_raw(&message[..5]).unwrap();
    served.disk = hand_over(&mut served, config());
    front.send_raw(&message[5..]).unwrap();
    let (answered, payload, _) = front.receive().unwrap();
    assert_eq!((answered, payload), (code::GET_QUEUE_NUM, words(&[4])));
}

#[test]
fn an_export_without_a_front_end_is_handed_over_too() {
    let mut served = Served::new(config(), pattern(DISK_BYTES));
    let next = hand_over(&mut served, config());
    let mut front = FrontEnd::connect(&served.path());
    assert_eq!(front.capacity_bytes(), DISK_BYTES as u64);
    next.wait_for(|seen| seen.connected == 1);
    let path = served.path();
    served.export.take().unwrap().stop();
    assert!(!path.exists(), "the last owner clears up");
}

#[test]
fn a_disk_that_has_become_another_is_not_gone_on_with() {
    let mut served = Served::new(config(), pattern(DISK_BYTES));
    let mut front = FrontEnd::connect(&served.path());
    let guest = Guest::new();
    guest.start(&mut front);
    // Fewer features than the guest's driver uses.
    let next = hand_over(&mut served, DiskConfig { read_only: true, num_queues: 1, ..config() });
    assert!(front.is_cut_off());
    next.wait_for(|seen| seen.disconnected == 1 && seen.running.is_empty());
    assert_eq!(FrontEnd::connect(&served.path()).capacity_bytes(), DISK_BYTES as u64);
}

#[test]
fn a_disk_that_has_grown_meanwhile_is_told_of() {
    let mut served = Served::new(config(), pattern(DISK_BYTES));
    let mut front = FrontEnd::connect(&served.path());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    front.set(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]).unwrap();
    drop(theirs);
    served.disk.resize(2 * DISK_BYTES);
    served.disk = hand_over(&mut served, DiskConfig { num_queues: 4, ..DiskConfig::new(2 * DISK_BYTES as u64) });
    let mut header = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut header).unwrap();
    assert_eq!(u32::from_ne_bytes([header[0], header[1], header[2], header[3]]), 2, "CONFIG_CHANGE_MSG");
    assert_eq!(front.capacity_bytes(), 2 * DISK_BYTES as u64);
}
