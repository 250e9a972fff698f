//! prestaged is killed again and again under a guest that keeps every queue of its disk full and checks every answer. The guest
//! must not notice but by waiting: no failed request, no wrong byte, no word of it in its kernel's log.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::time::Duration;

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::process::wait_until;
use prestage_tests::throttled::Throttled;
use prestage_tests::verifier::VerifierRig;

const DISK_BYTES: u64 = 32 << 20;
const QUEUES: u32 = 4;
const DEPTH: u32 = 32;
/// So that requests wait for the store, and hits overtake them.
const REQUESTS_PER_SECOND: u32 = 6000;

/// Lives that end by SIGKILL; QEMU takes a second to come back from each.
fn rounds() -> u64 {
    std::env::var("PRESTAGE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6)
}

#[test]
fn a_guest_at_full_depth_survives_every_sigkill() {
    let rig = VerifierRig::new().unwrap();
    let scratch = Scratch::large().unwrap();
    let file = scratch.join("disk.raw");
    std::fs::File::create_new(&file).unwrap().set_len(DISK_BYTES).unwrap();
    let store = Throttled::start(&scratch, "store", &file, REQUESTS_PER_SECOND).unwrap();
    let options = DaemonOptions { ram_size: "16MiB".to_owned(), ssd_size: "64MiB".to_owned(), ..Default::default() };
    let mut daemon = Prestaged::start(&options).unwrap();
    daemon.ctl(&["disk", "add", "guest", &store.store().spec()]).unwrap();
    let socket = daemon.disk_socket("guest").unwrap();
    let guest = rig.guest("crash-load", &socket, QUEUES, DEPTH).unwrap();
    let mut run = guest.start().unwrap();
    run.wait_load().unwrap();

    let rounds = rounds();
    for round in 0..rounds {
        // a daemon counts from its start: this one serves, and dies at another moment each time
        let enough = 100 + round * 7919 % 400;
        let served =
            wait_until("reads of the guest", Duration::from_secs(300), || Ok(daemon.counters()?.reads >= enough));
        served.unwrap_or_else(|error| panic!("round {round}: {error}\n{}\n{}", run.transcript(), daemon.last_words()));
        daemon.crash().unwrap();
        daemon.resume().unwrap();
    }
    let all = run.end_load().unwrap();
    println!("{rounds} kills: {all:?}");
    run.wait_off().unwrap();
    assert!(all.reads > rounds * 100 && all.writes > rounds * 50, "it was killed under load: {all:?}");
    assert_eq!(all.errors, 0, "the guest's kernel tells of errors: {all:?}");
    daemon.stop().unwrap();
}
