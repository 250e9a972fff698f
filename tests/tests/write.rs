//! What a guest writes through prestaged and syncs is in the store.

use std::process::Command;

use prestage_tests::guest::{GuestDisk, STEP_LIMIT};
use prestage_tests::process::run;
use prestage_tests::report::Line;
use prestage_tests::rig::Rig;

#[test]
fn what_a_guest_writes_and_syncs_is_in_the_store() {
    let rig = Rig::writable().unwrap();
    let mut daemon = rig.prestaged().unwrap();
    daemon.ctl(&["disk", "add", "rw", &rig.nbd.store().spec()]).unwrap();
    let socket = daemon.disk_socket("rw").unwrap();
    let guest = rig.guest("rw", GuestDisk::VhostUser(socket), &["prestage.rw", "prestage.write=16"]).unwrap();

    // twice: the second boot reads what the first one wrote, partly from the cache
    for _ in 0..2 {
        let mut boot = guest.start().unwrap();
        let (_, (sum, bytes, path)) = boot
            .wait("the written file", STEP_LIMIT, |line| match line {
                Line::Wrote { sum, bytes, path } => Some((sum, bytes, path)),
                _ => None,
            })
            .unwrap();
        boot.wait_off().unwrap();
        assert_eq!(bytes, 16 << 20);

        // the orderly power-off has unmounted the disk: a clean file system with the file in it
        let check = run(Command::new("e2fsck").args(["-f", "-n"]).arg(&rig.disk)).unwrap();
        let copy = rig.scratch.join("copy");
        run(Command::new("debugfs").arg("-R").arg(format!("dump {path} {}", copy.display())).arg(&rig.disk)).unwrap();
        let found = run(Command::new("sha256sum").arg(&copy)).unwrap();
        assert_eq!(
            found.split(' ').next(),
            Some(sum.as_str()),
            "the store's file has the bytes the guest saw: {check}"
        );
    }
    let traffic = rig.nbd.traffic().unwrap();
    assert!(traffic.write_bytes >= 32 << 20 && traffic.flushes > 0, "writes and flushes reach the store: {traffic:?}");
    daemon.stop().unwrap();
}
