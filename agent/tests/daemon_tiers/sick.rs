//! A cache disk that is sick, or not there, when tiers go out of service and come back.

#[path = "../../../cache/tests/sick/fs.rs"]
mod fs;

use super::*;
use fs::{Fault, SickFs};
use std::path::Path;

fn until(host: &Host, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}:\n{}\n{}", host.does(&["status"]), host.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn on(path: &Path) -> String {
    format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", path.display())
}

/// `cache tiers`, of the SSD tier.
fn tier(host: &Host) -> serde_json::Value {
    let tiers: serde_json::Value = serde_json::from_str(&host.does(&["--json", "cache", "tiers"])).unwrap();
    tiers["tiers"][1].clone()
}

/// A guest on a disk of 400 blocks, part of which are in the SSD tier.
fn filled(host: &Host) -> Guest {
    let mut guest = disk(host, 400);
    until(host, "blocks move to the SSD tier", || {
        check(&mut guest, 0..400);
        tier(host)["used_bytes"].as_u64().unwrap() > 4 * MIB
    });
    guest
}

fn says(host: &Host, words: &[&str], parts: &[&str]) {
    let said = host.does(words);
    for part in parts {
        assert!(said.contains(part), "{words:?} should say {part:?}, says {said}");
    }
}

#[test]
fn a_tier_whose_device_does_not_answer_is_drained_within_seconds_and_said_to_be_open_until_it_does() {
    let (mut host, sick) = (Host::new(), SickFs::mount());
    host.start(&on(&sick.path("ssd")));
    let mut guest = filled(&host);
    sick.fall_ill(Fault::Dead);
    // Each of these ends while nothing at all is answered.
    host.refuses(&["cache", "resize", "--ssd", "96MiB"], 1, &["does not answer"]);
    guest.write_all(65536, &pattern(900));
    for _ in 0..2 {
        says(
            &host,
            &["cache", "drain", "--ssd"],
            &["out of service, and on record", "is NOT closed", "do not unmount"],
        );
    }
    for words in [&["cache", "tiers"][..], &["status"], &["--json", "cache", "tiers"], &["--json", "status"]] {
        says(
            &host,
            words,
            &["drained by an operator at 20", "its file is not closed yet: do not unmount or remove it"],
        );
    }
    host.refuses(&["cache", "resume", "--ssd"], 1, &["was taken out of service", "do not unmount or remove it"]);
    let said = host.reload();
    assert!(said.contains("configuration reloaded"), "{said}");
    check(&mut guest, 2..400);
    guest.write_all(2 * 65536, &pattern(901));
    assert!(guest.read(65536, 65536) == pattern(900));
    sick.recover();
    until(&host, "the file is closed", || !host.does(&["cache", "drain", "--ssd"]).contains("NOT closed"));
    assert!(!host.does(&["status"]).contains("not closed"), "{}", host.does(&["status"]));
    host.does(&["cache", "resume", "--ssd"]);
    check(&mut guest, 3..400);
    for (block, holds) in [(1, 900), (2, 901)] {
        assert!(guest.read(block * 65536, 65536) == pattern(holds));
    }
    assert!(host.does(&["status"]).contains("health:     ok"), "{}", host.does(&["status"]));
    drop(guest);
    host.stop();
}

/// One that hangs while it is brought back holds up nobody: neither the next try, nor a reload, nor the end.
#[test]
fn a_tier_whose_device_does_not_answer_is_not_brought_back_and_keeps_nobody_waiting() {
    let (mut host, sick) = (Host::new(), SickFs::mount());
    host.start(&on(&sick.path("ssd")));
    let mut guest = filled(&host);
    host.does(&["cache", "drain", "--ssd"]);
    sick.fall_ill(Fault::Dead);
    for _ in 0..2 {
        host.refuses(&["cache", "resume", "--ssd"], 1, &["does not answer"]);
        // Whoever opens it may have it open at any moment.
        says(&host, &["cache", "drain", "--ssd"], &["is NOT closed, since its device does not answer"]);
        says(&host, &["status"], &["its file is being opened", "do not unmount or remove it"]);
    }
    let said = host.reload();
    assert!(said.contains("configuration reloaded"), "{said}");
    guest.write_all(65536, &pattern(900));
    sick.recover();
    until(&host, "it is brought back", || host.ctl(&["cache", "resume", "--ssd"]).status.success());
    check(&mut guest, 2..400);
    assert!(guest.read(65536, 65536) == pattern(900));
    drop(guest);
    host.stop();
}

/// What the kernel has of the process is left then: its requests to a device that does not answer.
fn has_ended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

#[test]
fn a_stop_waits_for_no_device_that_does_not_answer_and_its_slab_is_not_taken_for_closed() {
    for drained in [false, true] {
        let (mut host, sick) = (Host::new(), SickFs::mount());
        let config = on(&sick.path("ssd"));
        host.start(&config);
        let mut guest = filled(&host);
        sick.fall_ill(Fault::Dead);
        guest.write_all(65536, &pattern(900));
        if drained {
            host.does(&["cache", "drain", "--ssd"]);
        }
        guest.write_all(2 * 65536, &pattern(901));
        drop(guest);
        let pid = host.daemon.as_ref().unwrap().id();
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()),
            nix::sys::signal::Signal::SIGTERM,
        )
        .unwrap();
        let deadline = Instant::now() + Duration::from_secs(100);
        while !has_ended(pid) {
            assert!(Instant::now() < deadline, "it has not ended:\n{}", host.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        sick.recover();
        assert!(host.daemon.take().unwrap().wait().unwrap().success(), "{}", host.log());
        assert!(drained || host.log().contains("is not waited for any longer"), "{}", host.log());
        host.start(&config);
        let said = host.does(&["status"]);
        assert!(!said.contains("after a clean stop"), "{said}");
        assert_eq!(said.contains("drained by an operator"), drained, "{said}");
        let mut guest = Guest::start(&host, "d");
        for (block, holds) in [(1, 900), (2, 901)] {
            assert!(guest.read(block * 65536, 65536) == pattern(holds));
        }
        check(&mut guest, 3..400);
        drop(guest);
        host.stop();
    }
}

/// Nothing is out of order that nobody ordered; but what was is not forgotten.
#[test]
fn why_a_tier_was_failing_is_said_for_as_long_as_it_is_drained() {
    let (mut host, sick) = (Host::new(), SickFs::mount());
    let config = on(&sick.path("ssd"));
    host.start(&config);
    let mut guest = filled(&host);
    sick.fall_ill(Fault::Gone);
    until(&host, "it is bypassed", || {
        check(&mut guest, 0..400);
        host.does(&["status"]).contains("health:     DEGRADED")
    });
    let why = tier(&host)["detail"].as_str().unwrap().to_owned();
    host.does(&["cache", "drain", "--ssd"]);
    let still = |host: &Host| {
        let was = format!("brings it back, empty; was failing: {why}");
        for words in [&["cache", "tiers"][..], &["status"], &["--json", "cache", "tiers"], &["--json", "status"]] {
            says(host, words, &[&was]);
        }
        says(host, &["status"], &["health:     ok"]);
    };
    still(&host);
    drop(guest);
    host.stop();
    host.start(&config);
    still(&host);
    sick.recover();
    host.does(&["cache", "resume", "--ssd"]);
    assert!(!host.does(&["status"]).contains("was failing"), "{}", host.does(&["status"]));
    host.stop();
}

/// The file system that was unmounted to be replaced is not there yet, or was forgotten.
#[test]
fn a_tier_is_not_made_below_a_mount_point_on_which_nothing_is_mounted() {
    let mut host = Host::new();
    let folder = host.path("cache disk");
    std::fs::create_dir(&folder).unwrap();
    let mount = || Mount::tmpfs(&folder, "80m");
    let Some(mounted) = mount() else {
        println!("SKIPPED: mounting a tmpfs is not permitted");
        return;
    };
    let path = folder.join("ssd");
    host.start(&on(&path));
    host.does(&["cache", "drain", "--ssd"]);
    mounted.unmount();
    let missing = ["nothing is mounted there now", folder.to_str().unwrap(), "Mount it first, or say --force"];
    host.refuses(&["cache", "resume", "--ssd"], 1, &missing);
    host.stop();
    host.start(&on(&path));
    host.refuses(&["cache", "resume", "--ssd"], 1, &missing);
    assert!(!path.exists());
    let mounted = mount().unwrap();
    host.does(&["cache", "resume", "--ssd"]);
    assert!(path.exists());
    host.does(&["cache", "drain", "--ssd"]);
    mounted.unmount();
    host.refuses(&["cache", "resume", "--ssd"], 1, &missing);
    host.refuses(&["cache", "resume", "--ram", "--force"], 2, &["--ssd"]);
    host.does(&["cache", "resume", "--ssd", "--force"]);
    assert!(path.exists());
    // From now on that is its place.
    host.does(&["cache", "drain", "--ssd"]);
    host.does(&["cache", "resume", "--ssd"]);
    host.stop();
}

/// The old path is not opened by a configuration that names another.
#[test]
fn a_drained_tier_with_another_path_waits_for_the_restart_that_takes_it_in() {
    let mut host = Host::new();
    host.start(&ssd(&host));
    host.does(&["cache", "drain", "--ssd"]);
    let old = std::fs::read_to_string(host.path("prestaged.toml")).unwrap();
    let new = old.replace("/ssd\"", "/other\"");
    std::fs::write(host.path("prestaged.toml"), &new).unwrap();
    assert!(host.reload().contains("configuration reloaded"));
    host.refuses(&["cache", "resume", "--ssd"], 1, &["cache.ssd_path changed from", "which a restart takes in"]);
    std::fs::write(host.path("prestaged.toml"), &old).unwrap();
    host.reload();
    host.does(&["cache", "resume", "--ssd"]);
    host.does(&["cache", "drain", "--ssd"]);
    host.stop();
    host.start(&on(&host.path("other")));
    assert!(host.path("other").exists() && sizes(&host)[1] > 0);
    host.stop();
    // The first one comes back as what it is: not as one that a crash left.
    host.start(&ssd(&host));
    assert!(sizes(&host)[1] == 0, "it was drained");
    host.stop();
}
