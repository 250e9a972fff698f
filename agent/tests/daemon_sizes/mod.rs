//! Disks that become larger under their guests.

use super::front::Guest;
use super::host::Host;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const MIB: u64 = 1 << 20;

fn size(host: &Host, disk: &str) -> u64 {
    let shown: serde_json::Value = serde_json::from_str(&host.does(&["--json", "disk", "show", disk])).unwrap();
    shown["state"]["capacity_bytes"].as_u64().unwrap()
}

#[test]
fn a_disk_is_made_larger_under_its_guest_and_another_one_goes_on() {
    let mut host = Host::new();
    host.start("");
    let (store, other) = (host.store("store", MIB), host.store("other", 16 * MIB));
    host.does(&["disk", "add", "d", &store]);
    host.does(&["disk", "add", "e", &other]);
    host.does(&["disk", "add", "f", &host.store("large", MIB)]);
    let mut guest = Guest::start(&host, "d");
    guest.write(MIB - 4096, 4096, 1);
    // Another disk's guest reads all the while: none of its requests may fail.
    let stop = Arc::new(AtomicBool::new(false));
    let (ending, mut neighbour) = (Arc::clone(&stop), Guest::start(&host, "e"));
    let reading = std::thread::spawn(move || {
        let mut reads = 0_u64;
        while !ending.load(Ordering::Relaxed) {
            neighbour.read(reads * 65536 % (16 * MIB), 65536);
            reads += 1;
        }
        reads
    });
    assert!(!guest.try_read(MIB, 4096), "beyond the end");
    let said = host.does(&["disk", "resize", "d", "3MiB"]);
    assert!(said.contains("disk d: 1.0 MiB -> 3.0 MiB"), "{said}");
    assert_eq!((size(&host, "d"), std::fs::metadata(&store).unwrap().len()), (3 * MIB, 3 * MIB));
    assert!(guest.try_read(MIB, 4096), "within the new end");
    guest.write(3 * MIB - 4096, 4096, 2);
    assert!(guest.read(3 * MIB - 4096, 4096).iter().all(|byte| *byte == 2));
    assert!(!guest.try_read(3 * MIB, 512), "beyond the new end");
    assert!(guest.read(MIB - 4096, 8192)[..4096].iter().all(|byte| *byte == 1));
    // The same again changes nothing; smaller is refused, and so is what is no size.
    assert!(host.does(&["disk", "resize", "d", "3MiB"]).contains("disk d has 3.0 MiB"));
    host.refuses(
        &["disk", "resize", "d", "2MiB"],
        1,
        &["disk `d` has 3.0 MiB", "not made smaller: 2MiB would cut off"],
    );
    host.refuses(&["disk", "resize", "d", "3145729B"], 1, &["multiple of 512"]);
    host.refuses(&["disk", "resize", "d", "lots"], 2, &["lots"]);
    host.refuses(&["disk", "resize", "nosuch", "1GiB"], 1, &["no disk `nosuch`"]);
    assert_eq!(std::fs::metadata(&store).unwrap().len(), 3 * MIB);
    // Beyond what a file there can be: the request's fault, and told what can be; or, where files of any size are taken, done and told.
    let asked = host.ctl(&["disk", "resize", "f", "8388607TiB"]);
    let said = String::from_utf8_lossy(&[asked.stdout, asked.stderr].concat()).into_owned();
    let took = asked.status.success();
    assert!(
        said.contains(if took { "its file system has room for" } else { "its file system takes files of" }),
        "{said}"
    );
    // More than its file system has room for, but no more than it takes.
    let room = nix::sys::statvfs::statvfs(store.as_str()).unwrap();
    let more = room.blocks_available() * room.fragment_size() / MIB + 1024;
    if !took {
        let said = host.does(&["disk", "resize", "f", &format!("{more}MiB")]);
        assert!(
            said.contains("its file system has room for") && said.contains("writes fail once that is full"),
            "{said}"
        );
    }
    host.does(&["disk", "remove", "f"]);
    // Somebody else makes it larger.
    host.store("store", 5 * MIB);
    host.does(&["disk", "resize", "d"]);
    assert_eq!(size(&host, "d"), 5 * MIB);
    assert!(guest.try_read(5 * MIB - 512, 512));
    stop.store(true, Ordering::Relaxed);
    assert!(reading.join().unwrap() > 0);
    assert_eq!(size(&host, "e"), 16 * MIB);
    drop(guest);
    host.stop();
}

#[test]
fn what_others_make_larger_is_refused_with_a_word_on_who_and_taken_note_of() {
    let mut host = Host::new();
    host.start("");
    // An NBD server of our own: the daemon's.
    let store = host.store("store", MIB);
    host.does(&["disk", "add", "origin", &store, "--nbd"]);
    let uri = format!("nbd+unix:///origin?socket={}", host.path("run/nbd/origin.sock").display());
    host.does(&["disk", "add", "far", &uri]);
    host.refuses(
        &["disk", "resize", "far", "2MiB"],
        1,
        &["its server decides how large it is", "`prestagectl disk resize far` without a size tells the guest"],
    );
    let said = host.does(&["disk", "resize", "origin", "2MiB"]);
    assert!(
        said.contains("1.0 MiB -> 2.0 MiB") && said.contains("NBD clients see the size when they connect anew"),
        "{said}"
    );
    // Of an NBD server nobody knows before he asks.
    assert_eq!(size(&host, "far"), MIB);
    let said = host.does(&["disk", "resize", "far"]);
    assert!(said.contains("disk far: 1.0 MiB -> 2.0 MiB"), "{said}");
    assert_eq!(size(&host, "far"), 2 * MIB);
    host.does(&["disk", "remove", "far", "--force"]);
    let read_only = host.store("read-only", MIB);
    host.does(&["disk", "add", "r", &read_only, "--read-only"]);
    host.does(&["disk", "add", "s", &read_only, "--read-only"]);
    host.refuses(&["disk", "resize", "r", "2MiB"], 1, &["disk `r` is read-only", "without a size tells the guest"]);
    // All disks on one store see it.
    host.store("read-only", 2 * MIB);
    host.does(&["disk", "resize", "r"]);
    let (mut one, mut two) = (Guest::reading(&host, "r"), Guest::reading(&host, "s"));
    assert!(one.try_read(2 * MIB - 512, 512) && two.try_read(2 * MIB - 512, 512));
    drop((one, two));
    let image = host.path("image.qcow2").display().to_string();
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &image, "2M"]).status();
    if made.is_ok_and(|made| made.success()) {
        host.does(&["disk", "add", "q", &format!("qcow2:{image}")]);
        host.refuses(&["disk", "resize", "q", "4MiB"], 1, &["resized while nobody has it open", "qemu-img resize"]);
        let said = host.does(&["disk", "resize", "q"]);
        assert!(said.contains("looked at when its disk is opened"), "{said}");
    } else {
        println!("SKIPPED in part: no qemu-img");
    }
    host.stop();
}

#[test]
fn what_lies_behind_an_odd_end_is_seen_when_a_store_has_grown() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", MIB + 512);
    host.does(&["disk", "add", "d", &store]);
    let mut guest = Guest::start(&host, "d");
    // The page is kept, with zeroes where the store has nothing.
    guest.read(MIB, 512);
    let file = std::fs::File::options().write(true).open(&store).unwrap();
    file.write_all_at(&[7; 4096], MIB + 512).unwrap();
    host.does(&["disk", "resize", "d"]);
    assert_eq!(size(&host, "d"), MIB + 512 + 4096);
    assert!(guest.read(MIB + 512, 4096).iter().all(|byte| *byte == 7), "zeroes that never were on the store");
    drop(guest);
    host.stop();
}

#[test]
fn a_device_is_told_of_and_not_made_larger() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("backing");
    std::fs::File::create(&file).unwrap().set_len(MIB).unwrap();
    let Some(device) = Loop::new(&file) else {
        println!("SKIPPED: no loop device can be made here");
        return;
    };
    let mut host = Host::new();
    host.start(&format!("[[disk]]\nname = \"l\"\nstore = \"{}\"\n", device.0));
    host.refuses(
        &["disk", "resize", "l", "2MiB"],
        1,
        &["a device has the size of what it is made of", "`prestagectl disk resize l`"],
    );
    assert_eq!(size(&host, "l"), MIB);
    std::fs::File::options().write(true).open(&file).unwrap().set_len(2 * MIB).unwrap();
    assert!(Command::new("losetup").args(["-c", &device.0]).status().unwrap().success());
    host.does(&["disk", "resize", "l"]);
    assert_eq!(size(&host, "l"), 2 * MIB);
    let mut guest = Guest::start(&host, "l");
    guest.write(2 * MIB - 512, 512, 3);
    assert!(guest.read(2 * MIB - 512, 512).iter().all(|byte| *byte == 3));
    drop(guest);
    host.stop();
}

/// A loop device for as long as this lives.
struct Loop(String);

impl Loop {
    fn new(file: &std::path::Path) -> Option<Loop> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        (output.status.success() && !name.is_empty()).then_some(Loop(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}
