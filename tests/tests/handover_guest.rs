//! A new prestaged takes over under a real guest that keeps every queue of its disk full and checks every answer: QEMU's
//! connection is never closed, and the guest sees no error.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::time::Duration;

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::store::{Nbd, NbdOptions};
use prestage_tests::verifier::VerifierRig;

const DISK_BYTES: u64 = 32 << 20;
const ROUNDS: u64 = 3;

#[test]
fn a_guest_at_full_depth_sees_a_pause_and_no_more() {
    let rig = VerifierRig::new().unwrap();
    let scratch = Scratch::large().unwrap();
    let file = scratch.join("disk.raw");
    std::fs::File::create_new(&file).unwrap().set_len(DISK_BYTES).unwrap();
    let delays =
        NbdOptions { read_delay: Duration::from_millis(5), write_delay: Duration::from_millis(2), keep_writes: true };
    let nbd = Nbd::start(&scratch, "handover", &file, &delays).unwrap();
    let uri = Some(rig.libvirt.uri().to_owned());
    let options = DaemonOptions { ram_size: "16MiB".to_owned(), libvirt_uri: uri, ..Default::default() };
    let mut daemon = Prestaged::start(&options).unwrap();
    daemon.ctl(&["disk", "add", "guest", &nbd.store().spec()]).unwrap();
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
    let log = std::fs::read_to_string(daemon.log()).unwrap();
    assert_eq!(log.matches("front-end connected").count(), 1, "QEMU connected once:\n{}", daemon.last_words());
    assert_eq!(log.matches("front-end taken over").count() as u64, ROUNDS, "{}", daemon.last_words());
    daemon.stop().unwrap();
}
