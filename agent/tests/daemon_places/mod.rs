//! Stores that are deleted, replaced or moved under their guests.

use super::front::{Guest, LIMIT};
use super::host::Host;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;
use std::time::Instant;

const MIB: u64 = 1 << 20;

fn shown(host: &Host, disk: &str) -> serde_json::Value {
    serde_json::from_str(&host.does(&["--json", "disk", "show", disk])).unwrap()
}

/// What is said of a disk's store.
fn reason(host: &Host, disk: &str) -> String {
    shown(host, disk)["state"]["store_reason"].as_str().unwrap_or_default().to_owned()
}

fn wait(host: &Host, disk: &str, says: &str) {
    let deadline = Instant::now() + LIMIT;
    let said = |said: &str| if says.is_empty() { said.is_empty() } else { said.contains(says) };
    while !said(&reason(host, disk)) {
        assert!(Instant::now() < deadline, "no {says:?} of {disk}, but {:?}:\n{}", reason(host, disk), host.log());
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

fn lines(host: &Host, level: &str, says: &str) -> usize {
    host.log().lines().filter(|line| line.contains(level) && line.contains(says)).count()
}

/// The log says something so many times. It is written after the state has changed.
fn logged(host: &Host, level: &str, says: &str, times: usize) {
    let deadline = Instant::now() + LIMIT;
    while lines(host, level, says) < times && Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(lines(host, level, says), times, "{says}:\n{}", host.log());
}

#[test]
fn a_store_that_is_deleted_under_its_guest_is_told_of_and_can_be_saved() {
    let mut host = Host::new();
    host.start("");
    let (store, other) = (host.store("store", MIB), host.store("other", MIB));
    host.does(&["disk", "add", "d", &store]);
    host.does(&["disk", "add", "e", &other]);
    let mut guest = Guest::start(&host, "d");
    std::fs::remove_file(&store).unwrap();
    wait(&host, "d", "was deleted while it is served");
    // The guest goes on, and what it writes is in no file that has a name.
    guest.write_all(4096, &[7; 4096]);
    guest.write_all(8192, &[8; 4096]);
    assert_eq!(shown(&host, "d")["state"]["store_state"], "degraded");
    let status = host.does(&["status"]);
    assert!(
        status.contains("disk d: ") && status.contains("was deleted while") && !status.contains("disk e: "),
        "{status}"
    );
    for words in [["disk", "list"].as_slice(), &["disk", "show", "d"]] {
        assert!(host.does(words).contains("DEGRADED: "), "{words:?}");
    }
    // What the operator is told to do saves it.
    let said = reason(&host, "d");
    let copy = said.split('`').find(|part| part.starts_with("cp ")).unwrap_or_else(|| panic!("no command in {said}"));
    assert!(Command::new("sh").args(["-c", copy]).status().unwrap().success(), "{copy}");
    let saved = std::fs::read(format!("{store}.saved")).unwrap();
    assert_eq!(saved.len() as u64, MIB);
    assert!(saved[4096..8192].iter().all(|byte| *byte == 7) && saved[8192..12288].iter().all(|byte| *byte == 8));
    logged(&host, " WARN ", "was deleted while", 1);
    logged(&host, " WARN ", "other", 0);
    drop(guest);
    // Neither an order nor a reload throws it away by the way.
    let parted = || shown(&host, "d")["state"]["connected"] == false;
    while !parted() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    host.refuses(&["disk", "remove", "d"], 1, &["nowhere else", "was deleted while", "`cp ", "--force"]);
    // In the place of the deleted one it is another file still; a restart serves it.
    std::fs::rename(format!("{store}.saved"), &store).unwrap();
    wait(&host, "d", "was replaced by another file");
    host.stop();
    assert!(lines(&host, " ERROR ", "what nobody has saved") == 1, "{}", host.log());
    host.start("");
    assert_eq!(reason(&host, "d"), "");
    assert!(Guest::start(&host, "d").read(4096, 4096).iter().all(|byte| *byte == 7));
    host.stop();
}

#[test]
fn a_store_that_another_file_is_renamed_over_is_told_of_and_one_that_comes_back_is_right_again() {
    let mut host = Host::new();
    host.start("");
    let (store, new, away) = (host.store("store", MIB), host.store("new", MIB), host.path("away"));
    // The same store read by two: one word in the log.
    host.does(&["disk", "add", "d", &store, "--read-only"]);
    host.does(&["disk", "add", "e", &store, "--read-only"]);
    std::fs::rename(&store, &away).unwrap();
    wait(&host, "d", "was moved to ");
    assert!(reason(&host, "e").contains("its next start does not find it; move it back"), "{}", reason(&host, "e"));
    std::fs::rename(&new, &store).unwrap();
    wait(&host, "d", "serves what is there now");
    std::fs::rename(&away, &store).unwrap();
    wait(&host, "d", "");
    assert!(host.does(&["status"]).contains("health:     ok"));
    logged(&host, " INFO ", "where it was opened again", 1);
    logged(&host, " WARN ", "was moved to", 2);
    // Over it, as a backup's tool puts a file back.
    let restored = host.store("restored", MIB);
    std::fs::rename(&restored, &store).unwrap();
    wait(&host, "d", "was replaced by another file");
    logged(&host, " WARN ", "was replaced by", 1);
    host.stop();
}

#[test]
fn images_and_what_they_stand_on_are_looked_for_too() {
    let qemu = |words: &[&str]| Command::new("qemu-img").args(words).output().is_ok_and(|out| out.status.success());
    let mut host = Host::new();
    let at = |name: &str| host.path(name).display().to_string();
    let (base, top, packed) = (at("base.qcow2"), at("top.qcow2"), at("packed.qcow2"));
    let made = qemu(&["create", "-q", "-f", "qcow2", &base, "1M"])
        && qemu(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top])
        && qemu(&["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", &packed, "1M"]);
    if !made {
        println!("SKIPPED: no qemu-img here");
        return;
    }
    host.start("");
    host.does(&["disk", "add", "d", &format!("qcow2:{top}?backing=qcow2:{base}")]);
    std::fs::rename(&base, host.path("moved.qcow2")).unwrap();
    wait(&host, "d", "base.qcow2 was moved to ");
    std::fs::rename(host.path("moved.qcow2"), &base).unwrap();
    wait(&host, "d", "");
    std::fs::remove_file(&top).unwrap();
    wait(&host, "d", "top.qcow2 was deleted");
    // Of each of them.
    std::fs::remove_file(&base).unwrap();
    wait(&host, "d", "base.qcow2 was deleted");
    assert!(reason(&host, "d").contains("top.qcow2 was deleted"), "{}", reason(&host, "d"));
    host.does(&["disk", "add", "f", &host.store("given up", MIB)]);
    std::fs::remove_file(host.path("given up")).unwrap();
    wait(&host, "f", "was deleted");
    host.does(&["disk", "remove", "f", "--force"]);
    logged(&host, " ERROR ", "what nobody has saved of it is gone now", 1);
    // One that a qemu-storage-daemon has open.
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        println!("SKIPPED in part: no qemu-storage-daemon here");
        host.stop();
        return;
    }
    host.does(&["disk", "add", "q", &format!("qcow2:{packed}")]);
    let through = shown(&host, "q")["through_qemu"].as_str().unwrap().to_owned();
    let pid = through.split("(process ").nth(1).unwrap().split(')').next().unwrap();
    std::fs::remove_file(&packed).unwrap();
    wait(&host, "q", "packed.qcow2 was deleted");
    assert!(reason(&host, "q").contains(&format!("`ls -l /proc/{pid}/fd`")), "{} {through}", reason(&host, "q"));
    host.stop();
}

#[test]
fn a_store_that_the_daemon_cannot_see_by_its_path_is_no_alarm_until_it_is_gone() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: not root, no folder can be given to another user");
        return;
    }
    let mut host = Host::new();
    let folder = host.path("theirs");
    std::fs::create_dir(&folder).unwrap();
    let store = host.store("theirs/store", MIB);
    // Whoever has no capabilities may not look in here: stores are opened by the broker.
    chown(&folder, Some(12345), Some(12345)).unwrap();
    chown(&store, Some(12345), Some(12345)).unwrap();
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
    host.start("");
    let canary = host.store("canary", MIB);
    host.does(&["disk", "add", "a", &store]);
    host.does(&["disk", "add", "z", &canary]);
    std::fs::remove_file(&canary).unwrap();
    // In one round with it, and before it.
    wait(&host, "z", "was deleted");
    assert_eq!(reason(&host, "a"), "", "{}", host.log());
    // That it is not there any more is the broker's to find out: by the file itself it cannot be told.
    std::fs::rename(&store, folder.join("moved")).unwrap();
    wait(&host, "a", "/theirs/moved while it is served");
    std::fs::rename(folder.join("moved"), &store).unwrap();
    wait(&host, "a", "");
    host.stop();
}

#[test]
fn a_reload_does_not_take_out_a_disk_whose_store_is_gone() {
    let mut host = Host::new();
    let store = host.store("store", MIB);
    host.start(&format!("[[disk]]\nname = \"d\"\nstore = \"{store}\"\n"));
    std::fs::remove_file(&store).unwrap();
    wait(&host, "d", "was deleted while");
    host.config("");
    host.reload();
    logged(&host, " WARN ", "goes on until prestaged ends", 1);
    assert!(Guest::start(&host, "d").read(0, 4096).iter().all(|byte| *byte == 0));
    host.stop();
}

#[test]
fn a_template_is_not_named_with_dots() {
    let mut host = Host::new();
    host.start("");
    for name in ["/var/lib/../etc", "..", "../web"] {
        host.refuses(&["template", "remove", name], 1, &[name]);
    }
    host.refuses(&["template", "remove", "/var/lib/../etc"], 1, &["has `..`"]);
    host.stop();
}
