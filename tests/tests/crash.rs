//! prestaged is killed while a guest boots from it, and started again: the guest must not notice but by waiting.

use std::time::Duration;

use prestage_tests::guest::GuestDisk;
use prestage_tests::process::wait_until;
use prestage_tests::rig::Rig;

#[test]
fn a_guest_survives_sigkill_of_prestaged_in_mid_boot() {
    let rig = Rig::new().unwrap();
    let mut daemon = rig.prestaged().unwrap();
    daemon.ctl(&["disk", "add", "vm-disk", &rig.nbd.store().spec()]).unwrap();
    let socket = daemon.disk_socket("vm-disk").unwrap();
    let guest = rig.guest("crash", GuestDisk::VhostUser(socket), &["prestage.checksums"]).unwrap();
    let mut run = guest.start().unwrap();

    // a boot reads about 1100 times: twice within it, while reads are in flight
    for reads in [200, 300] {
        wait_until("reads of the guest", Duration::from_secs(300), || Ok(daemon.counters()?.reads >= reads)).unwrap();
        daemon.crash().unwrap();
        daemon.resume().unwrap();
    }
    let (_, figures) = run.wait_ready().unwrap();
    assert!(figures.reads > 500, "it was killed before the end of the boot: {figures:?}");
    let (sums, last) = run.wait_sums().unwrap();
    run.wait_off().unwrap();
    println!("{last:?}");
    assert_eq!(sums, rig.image.sums, "every file is what was built");
    daemon.stop().unwrap();
}
