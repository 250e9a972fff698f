//! The harness itself: a guest boots straight from the slow store under libvirt, and finds its files whole.

use prestage_tests::guest::GuestDisk;
use prestage_tests::rig::Rig;

#[test]
fn a_guest_boots_straight_from_the_store_and_reads_what_was_built() {
    let rig = Rig::new().unwrap();
    let disk = GuestDisk::Straight(rig.nbd.store());
    let guest = rig.guest("straight", disk, &["prestage.checksums"]).unwrap();
    let mut run = guest.start().unwrap();
    let (ready, figures) = run.wait_ready().unwrap();
    let (sums, last) = run.wait_sums().unwrap();
    run.wait_off().unwrap();
    println!("{}: ready after {:.1} s, {figures:?}; with checksums {last:?}", rig.accelerator, ready.as_secs_f64());

    assert_eq!(sums, rig.image.sums, "every file is what was built");
    assert_eq!(last.writes, 0, "an overlay keeps writes off the disk");
    let traffic = rig.nbd.traffic().unwrap();
    assert!(traffic.read_bytes >= last.read_bytes, "the server saw {traffic:?}, the guest {last:?}");
    // milliseconds are rounded down, request by request
    assert!(last.read_wait_ms >= 4 * last.reads, "each read waited for the slow store: {last:?}");
}
