//! The harness itself: a guest boots straight from the slow store under libvirt, and finds its files whole.

use std::sync::Arc;

use prestage_tests::accelerator::Accelerator;
use prestage_tests::guest::{Guest, GuestDisk, GuestOptions};
use prestage_tests::image::Image;
use prestage_tests::libvirt::Libvirt;
use prestage_tests::paths::Scratch;
use prestage_tests::store::{Nbd, NbdOptions};

#[test]
fn a_guest_boots_straight_from_the_store_and_reads_what_was_built() {
    let image = Image::build_or_find().unwrap();
    let accelerator = Accelerator::find(&image).unwrap();
    let scratch = Scratch::new().unwrap();
    let libvirt = Arc::new(Libvirt::start().unwrap());
    let nbd = Nbd::start(&scratch, "store", &image.disk, &NbdOptions::default()).unwrap();
    let disk = GuestDisk::Straight(nbd.store());
    let options = GuestOptions::new("straight", accelerator, disk, &["prestage.checksums"]);
    let guest = Guest::define(&libvirt, &scratch, &image, &options).unwrap();
    let mut run = guest.start().unwrap();
    let (ready, figures) = run.wait_ready().unwrap();
    let (sums, last) = run.wait_sums().unwrap();
    run.wait_off().unwrap();
    println!("{accelerator}: ready after {:.1} s, {figures:?}; with checksums {last:?}", ready.as_secs_f64());

    assert_eq!(sums, image.sums, "every file is what was built");
    assert_eq!(last.writes, 0, "an overlay keeps writes off the disk");
    let traffic = nbd.traffic().unwrap();
    assert!(traffic.read_bytes >= last.read_bytes, "the server saw {traffic:?}, the guest {last:?}");
    assert!(last.read_wait_ms >= 5 * last.reads, "each read waited for the slow store: {last:?}");
}
