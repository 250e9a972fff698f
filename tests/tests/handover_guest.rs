//! A new prestaged takes over under a real guest that keeps every queue of its disk full and checks every answer: QEMU's
//! connection is never closed, and the guest sees no error.

#![allow(clippy::panic, clippy::unwrap_used)]

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::throttled::Throttled;
use prestage_tests::verifier::VerifierRig;

const DISK_BYTES: u64 = 32 << 20;
/// So that the load waits for the store all the time.
const REQUESTS_PER_SECOND: u32 = 3000;
const ROUNDS: u64 = 3;

#[test]
fn a_guest_at_full_depth_sees_a_pause_and_no_more() {
    let rig = VerifierRig::new().unwrap();
    let scratch = Scratch::large().unwrap();
    let file = scratch.join("disk.raw");
    std::fs::File::create_new(&file).unwrap().set_len(DISK_BYTES).unwrap();
    let store = Throttled::start(&scratch, "store", &file, REQUESTS_PER_SECOND).unwrap();
    let uri = Some(rig.libvirt.uri().to_owned());
    let options = DaemonOptions { ram_size: "16MiB".to_owned(), libvirt_uri: uri, ..Default::default() };
    let mut daemon = Prestaged::start(&options).unwrap();
    daemon.ctl(&["disk", "add", "guest", &store.store().spec()]).unwrap();
    let guest = rig.guest("handover", &daemon.disk_socket("guest").unwrap(), 4, 32).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_load().unwrap();

    let mut before = run.verified().unwrap();
    for round in 0..ROUNDS {
        daemon.hand_over().unwrap();
        let verified = run.verified().unwrap();
        println!("hand-over {round}: {verified:?}");
        assert!(verified.reads > before.reads, "it goes on: {verified:?}");
        before = verified;
    }
    let all = run.end_load().unwrap();
    run.wait_off().unwrap();
    assert_eq!(all.errors, 0, "the guest's kernel tells of errors: {all:?}");
    assert_eq!(daemon.said("front-end connected").unwrap(), 1, "QEMU connected once:\n{}", daemon.last_words());
    assert_eq!(daemon.said("front-end taken over").unwrap() as u64, ROUNDS, "{}", daemon.last_words());
    daemon.stop().unwrap();
}
