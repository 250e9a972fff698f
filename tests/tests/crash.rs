//! prestaged is killed while a guest boots from it, and started again: the guest must not notice but by waiting.
//!
//! `PRESTAGE_ROUNDS` says how many boots are made (1), each with kills at other moments.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::time::Duration;

use prestage_tests::daemon::Prestaged;
use prestage_tests::guest::{GuestDisk, Run};
use prestage_tests::process::wait_until;
use prestage_tests::rig::Rig;
use prestage_tests::throttled::Throttled;

/// In reads since the daemon's start; a boot makes about 1100.
const KILLS: [u64; 2] = [200, 300];

/// So that some are under way at any time. The rig's own server does not outlive a client that dies with requests under way.
const REQUESTS_PER_SECOND: u32 = 400;

fn boots() -> u64 {
    std::env::var("PRESTAGE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn crash_at(daemon: &mut Prestaged, run: &Run<'_>, reads: u64) {
    let mut last = None;
    let served = wait_until("reads of the guest", Duration::from_secs(300), || {
        let counters = daemon.counters()?;
        let enough = counters.reads >= reads;
        last = Some(counters);
        Ok(enough)
    });
    served.unwrap_or_else(|error| {
        let disk = daemon.ctl(&["disk", "show", "vm-disk"]);
        panic!("{reads} {error:#}: {last:?}\n{disk:?}\n{}\n{}", run.transcript(), daemon.last_words())
    });
    daemon.crash().unwrap();
    daemon.resume().unwrap();
}

#[test]
fn a_guest_survives_sigkill_of_prestaged_in_mid_boot() {
    let rig = Rig::writable().unwrap();
    let store = Throttled::start(&rig.scratch, "throttled", &rig.disk, REQUESTS_PER_SECOND).unwrap();
    let mut daemon = rig.prestaged().unwrap();
    daemon.ctl(&["disk", "add", "vm-disk", &store.store().spec()]).unwrap();
    let socket = daemon.disk_socket("vm-disk").unwrap();
    // boots that are killed at many moments, before the one whose every file is looked at
    for boot in 1..boots() {
        let guest = rig.guest("crash", GuestDisk::VhostUser(socket.clone()), &[]).unwrap();
        let mut run = guest.start().unwrap();
        for kill in 0..8 {
            crash_at(&mut daemon, &run, 1 + (boot * 7919 + kill * 104_729) % 130);
        }
        run.wait_ready().unwrap();
        run.wait_off().unwrap();
        println!("boot {boot}");
    }
    let guest = rig.guest("crash", GuestDisk::VhostUser(socket), &["prestage.checksums"]).unwrap();
    let mut run = guest.start().unwrap();
    // twice within it, while reads are in flight
    for reads in KILLS {
        crash_at(&mut daemon, &run, reads);
    }
    let (_, figures) = run.wait_ready().unwrap();
    assert!(figures.reads > 500, "it was killed before the end of the boot: {figures:?}");
    let (sums, last) = run.wait_sums().unwrap();
    run.wait_off().unwrap();
    println!("{last:?}");
    assert_eq!(sums, rig.image.sums, "every file is what was built");
    daemon.stop().unwrap();
}
