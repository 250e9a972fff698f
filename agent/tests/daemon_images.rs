//! The real `prestaged` on qcow2 images: chains of its own reading, and images that only QEMU understands, through a
//! supervised qemu-storage-daemon. The guest is a vhost-user-blk front-end; `qemu-img` and `qemu-io` make and judge.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

#[path = "daemon_front/mod.rs"]
mod front;
#[path = "daemon_host/mod.rs"]
mod host;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use front::{Guest, LIMIT};
use host::Host;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MIB: u64 = 1 << 20;

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words:?}: {text}");
    text
}

/// False, and a word why, where the programs are missing.
fn has(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| Command::new(program).arg("--version").output().is_err());
    if let Some(missing) = missing {
        println!("SKIPPED: no {missing} here");
    }
    missing.is_none()
}

/// A raw disk of 8 MiB: each 64 KiB its number.
fn make_raw(host: &Host, name: &str) -> String {
    let bytes: Vec<u8> = (0..8 * MIB).map(|at| (at >> 16) as u8).collect();
    std::fs::write(host.path(name), bytes).unwrap();
    host.path(name).display().to_string()
}

fn show(host: &Host, disk: &str) -> serde_json::Value {
    serde_json::from_str(&host.does(&["--json", "disk", "show", disk])).unwrap()
}

#[test]
fn disks_on_one_base_share_it_and_a_killed_daemon_loses_no_write() {
    if !has(&["qemu-img"]) {
        return;
    }
    let mut host = Host::new();
    std::fs::create_dir(host.path("images")).unwrap();
    let raw = make_raw(&host, "data.raw");
    let at = |name: &str| host.path(&format!("images/{name}")).display().to_string();
    let (base, one, two) = (at("base.qcow2"), at("one.qcow2"), at("two.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &base]);
    for top in [&one, &two] {
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", top]);
    }
    let settings = format!("[store]\nimage_folder = \"{}\"\n", host.path("images").display());
    host.start("");
    host.refuses(
        &["disk", "add", "one", &format!("qcow2:{one}")],
        1,
        &["base.qcow2", "not opened unasked", "image_folder"],
    );
    host.stop();
    host.start(&settings);
    // By the image's own word, within the folder; and named in full.
    host.does(&["disk", "add", "one", &format!("qcow2:{one}")]);
    host.does(&["disk", "add", "two", &format!("qcow2:{two}?backing=qcow2:{base}")]);
    let mut guests = [Guest::start(&host, "one"), Guest::start(&host, "two")];
    for guest in &mut guests {
        for at in (0..8 * MIB).step_by(1 << 20) {
            let found = guest.read(at, 1 << 20);
            assert!(found.iter().enumerate().all(|(i, byte)| *byte == ((at + i as u64) >> 16) as u8));
        }
    }
    let (first, second) = (show(&host, "one"), show(&host, "two"));
    assert_eq!(first["images"][1], format!("qcow2:{base}"), "{first}");
    assert_eq!(first["through_qemu"], serde_json::Value::Null);
    let text = host.does(&["disk", "show", "one"]);
    assert!(text.contains(&format!("qcow2:{base}")), "{text}");
    // Both disks report their common base: read once, whoever came first.
    for disk in [&first, &second] {
        assert!(disk["counters"]["store_read_bytes"].as_u64().unwrap() <= 8 * MIB, "{disk}");
    }
    assert!(second["counters"]["served_ram"].as_u64().unwrap() >= 8, "{second}");

    // Answered, and never flushed: a killed daemon is no power cut, the guest does not know.
    guests[0].write(5 * MIB + 4096, 8192, 0xA1);
    guests[1].write(100_352, 512, 0xB2);
    let mut daemon = host.daemon.take().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    drop(guests);
    host.start(&settings);
    let mut guest = Guest::start(&host, "one");
    assert!(guest.read(5 * MIB + 4096, 8192).iter().all(|byte| *byte == 0xA1));
    assert!(guest.read(5 * MIB, 4096).iter().all(|byte| *byte == 80), "the rest of the cluster is the base's");
    drop(guest);
    let mut guest = Guest::start(&host, "two");
    assert!(guest.read(100_352, 512).iter().all(|byte| *byte == 0xB2));
    drop(guest);
    host.stop();
    for (top, offset, byte) in [(&one, 5 * MIB + 4096, 0xA1_u8), (&two, 100_352, 0xB2)] {
        run("qemu-img", &["check", "-q", top]);
        run("qemu-io", &["-f", "qcow2", "-c", &format!("read -P {byte} {offset} 512"), top]);
    }
}

#[test]
fn what_only_qemu_understands_goes_through_it_and_is_started_again() {
    if !has(&["qemu-img", "qemu-io", "qemu-storage-daemon", "setpriv"]) {
        return;
    }
    let mut host = Host::new();
    let raw = make_raw(&host, "data.raw");
    let at = |name: &str| host.path(name).display().to_string();
    let (zstd, extended, snapshot) = (at("zstd.qcow2"), at("extended.qcow2"), at("snapshot.qcow2"));
    run("qemu-img", &["convert", "-c", "-o", "compression_type=zstd", "-O", "qcow2", &raw, &zstd]);
    run("qemu-img", &["convert", "-o", "extended_l2=on,cluster_size=128k", "-O", "qcow2", &raw, &extended]);
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &snapshot]);
    run("qemu-img", &["snapshot", "-c", "first", &snapshot]);
    let keys = host.path("keys");
    std::fs::create_dir(&keys).unwrap();
    host.start(&format!("[store]\nkey_folder = \"{}\"\n", keys.display()));
    for (disk, image, why) in [
        ("zstd", &zstd, "compressed with zstd"),
        ("extended", &extended, "extended L2 entries"),
        ("snapshot", &snapshot, "1 internal snapshot"),
    ] {
        host.does(&["disk", "add", disk, &format!("qcow2:{image}")]);
        let told = show(&host, disk)["through_qemu"].as_str().unwrap().to_owned();
        assert!(told.contains("qemu-storage-daemon (process ") && told.contains(why), "{told}");
        let text = host.does(&["disk", "show", disk]);
        assert!(text.contains("qemu-storage-daemon") && text.contains(why), "{text}");
        let mut guest = Guest::start(&host, disk);
        assert!(guest.read(3 * MIB, 65536).iter().all(|byte| *byte == 48));
        guest.write(3 * MIB + 512, 1024, 0xC3);
        // Least privilege: no capability, and no other file of ours.
        let pid = process(&told);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        assert_eq!((line("NoNewPrivs:").as_str(), line("Seccomp:").as_str()), ("1", "2"));
        if nix::unistd::geteuid().is_root() {
            assert_eq!((line("CapEff:"), line("CapBnd:")), ("0".repeat(16), "0".repeat(16)));
        }
        // It dies; what it has answered is in the image, and another one takes its place.
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        let found = guest.read(3 * MIB, 4096);
        assert!(found[..512].iter().all(|byte| *byte == 48) && found[512..1536].iter().all(|byte| *byte == 0xC3));
        host.does(&["cache", "drop", "--disk", disk]);
        assert!(guest.read(3 * MIB + 512, 1024).iter().all(|byte| *byte == 0xC3), "read anew from the image");
        guest.write(4 * MIB, 4096, 0xD4);
        let again = show(&host, disk)["through_qemu"].as_str().unwrap().to_owned();
        assert!(again.contains("started 2 times") && process(&again) != pid, "{again}");
        drop(guest);
        let last = process(&again);
        host.does(&["disk", "remove", disk]);
        assert!(!alive(last), "it ends with its disk");
        run("qemu-img", &["check", "-q", image]);
        run("qemu-io", &["-f", "qcow2", "-c", "read -P 0xd4 4M 4096", "-c", "read -P 0xc3 3146240 1024", image]);
    }
    encrypted(&host, &raw);
    // A killed daemon takes its processes along, or they would keep the image locked.
    host.does(&["disk", "add", "left", &format!("qcow2:{zstd}")]);
    let left = process(show(&host, "left")["through_qemu"].as_str().unwrap());
    let mut daemon = host.daemon.take().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let deadline = Instant::now() + LIMIT;
    while alive(left) {
        assert!(Instant::now() < deadline, "qemu-storage-daemon outlives its daemon");
        std::thread::sleep(Duration::from_millis(20));
    }
    host.start("");
    assert!(show(&host, "left")["through_qemu"].is_string(), "{}", host.log());
    host.stop();
}

fn encrypted(host: &Host, raw: &str) {
    let image = host.path("luks.qcow2").display().to_string();
    let secret = ["--object", "secret,id=s,data=geheim"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &secret[..], &["-o", options, &image, "8M"]].concat());
    let target = format!("driver=qcow2,file.filename={image},encrypt.key-secret=s");
    let words = [&["convert", "-n"], &secret[..], &["--target-image-opts", raw, &target]].concat();
    run("qemu-img", &words);
    let add = ["disk", "add", "luks", &format!("qcow2:{image}")];
    host.refuses(&add, 1, &["encrypted", "keys/luks.key"]);
    let key = host.path("keys/luks.key");
    std::fs::write(&key, "geheim\n").unwrap();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    host.refuses(&add, 1, &["chmod 600"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    host.does(&add);
    let told = show(host, "luks")["through_qemu"].as_str().unwrap().to_owned();
    assert!(told.contains("encrypted (LUKS)"), "{told}");
    let mut guest = Guest::start(host, "luks");
    assert!(guest.read(2 * MIB, 65536).iter().all(|byte| *byte == 32));
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", process(&told))).unwrap();
    assert!(!line.contains("geheim"), "the passphrase is no argument: {line}");
    drop(guest);
    std::fs::write(&key, "falsch").unwrap();
    host.does(&["disk", "remove", "luks"]);
    host.refuses(&add, 1, &["qemu-storage-daemon", "could not be started"]);
}

/// The number of the process that a disk is served through.
fn process(told: &str) -> i32 {
    let (_, rest) = told.split_once("(process ").unwrap();
    rest.split(')').next().unwrap().parse().unwrap()
}

fn alive(pid: i32) -> bool {
    // One that nobody has waited for yet has no memory.
    std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}
