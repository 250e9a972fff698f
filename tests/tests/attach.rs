//! The main job: a machine of libvirt's is attached, boots cold, boots learned, and is detached.

use prestage_tests::guest::GuestDisk;
use prestage_tests::report::Line;
use prestage_tests::rig::Rig;
use serde_json::Value;

/// Canonical form of a definition: libvirt itself orders attributes and blanks.
fn without_indent(xml: &str) -> Vec<&str> {
    xml.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

#[test]
fn an_attached_machine_boots_cold_then_learned_and_finds_its_files_whole() {
    let rig = Rig::new().unwrap();
    let disk = GuestDisk::Straight(rig.nbd.store());
    let guest = rig.guest("web", disk, &["prestage.go", "prestage.program", "prestage.checksums"]).unwrap();
    let original = guest.xml().unwrap();

    let mut daemon = rig.prestaged().unwrap();
    let attached = daemon.ctl(&["vm", "attach", "web", "vda"]).unwrap();
    assert_eq!(attached["store"], rig.nbd.store().spec(), "{attached}");
    assert!(guest.xml().unwrap().contains("type='vhostuser'"), "{}", guest.xml().unwrap());
    let again = daemon.ctl(&["vm", "attach", "web", "vda"]).unwrap_err().to_string();
    assert!(again.contains("attached"), "a second attach is refused and says why: {again}");

    // boot, program and checksums: counted to the end, since what is learned of one is learned of all
    let boot = |daemon: &prestage_tests::daemon::Prestaged| {
        let before = daemon.counters().unwrap();
        let mut run = guest.start().unwrap();
        run.wait_ready().unwrap();
        run.go().unwrap();
        run.wait_program().unwrap();
        run.go().unwrap();
        let (sums, last) = run.wait_sums().unwrap();
        let counters = daemon.counters().unwrap().since(&before);
        run.go().unwrap();
        run.wait_off().unwrap();
        println!("{counters:?}\n{last:?}");
        assert_eq!(sums, rig.image.sums, "every file is what was built");
        assert_eq!(counters.read_errors, 0);
        counters
    };

    let cold = boot(&daemon);
    assert!(cold.served_store > 0, "nothing was known and nothing cached");

    daemon.stop().unwrap();
    std::fs::remove_file(daemon.ssd()).unwrap();
    daemon.resume().unwrap();
    daemon.ctl(&["cache", "drop", "--tier", "all"]).unwrap();
    let profiles = daemon.ctl(&["profile", "list"]).unwrap();
    assert_eq!(profiles["profiles"].as_array().map(Vec::len), Some(1), "one storage, one profile: {profiles}");

    let learned = boot(&daemon);
    let served = learned.served_ram + learned.served_ssd + learned.served_store;
    let ready = learned.served_ram + learned.served_ssd;
    assert!(ready * 100 >= served * 95, "95 % of the reads do not wait for the store: {learned:?}");
    assert!(
        learned.prefetch_used_bytes * 100 >= learned.prefetch_completed_bytes * 90,
        "90 % of what is read ahead is used: {learned:?}"
    );

    let detached = daemon.ctl(&["vm", "detach", "web", "vda"]).unwrap();
    assert_eq!(detached["vm"], Value::from("web"), "{detached}");
    assert_eq!(without_indent(&guest.xml().unwrap()), without_indent(&original), "the definition is what it was");
    daemon.stop().unwrap();

    // the machine runs without prestaged again
    let mut run = guest.start().unwrap();
    run.wait_ready().unwrap();
    run.go().unwrap();
    run.wait("the program's end", prestage_tests::guest::STEP_LIMIT, |line| {
        matches!(line, Line::Done { status: 0, .. }).then_some(())
    })
    .unwrap();
}
