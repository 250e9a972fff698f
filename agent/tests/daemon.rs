//! The real `prestaged`, started on wrong input and asked by the real `prestagectl`: what it says, what it keeps, and how
//! it ends. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 daemon not reachable.
#![allow(clippy::unwrap_used, reason = "a failed assumption of a test is a failed test")]

#[path = "daemon_front/mod.rs"]
mod front;
#[path = "daemon_guest/mod.rs"]
mod guest;
#[path = "daemon_host/mod.rs"]
mod host;
#[path = "daemon_places/mod.rs"]
mod places;
#[path = "daemon_sizes/mod.rs"]
mod sizes;
#[path = "daemon_tiers/mod.rs"]
mod tiers;
#[path = "daemon_unit/mod.rs"]
mod unit;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use host::Host;

#[test]
fn an_unknown_key_is_refused_with_file_line_and_key() {
    let host = Host::new();
    let config = host.config("ram_szie = \"1GiB\"\n");
    let output = Command::new(env!("CARGO_BIN_EXE_prestaged")).arg("--config").arg(&config).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains(&format!("{}:8: unknown key `cache.ram_szie`", config.display())), "{text}");
    assert!(text.contains("did you mean `ram_size`"), "{text}");
    host.refuses(&["status"], 3, &["cannot reach prestaged", "is prestaged running?"]);
    host.refuses(&["no-such-command"], 2, &["Usage"]);
}

#[test]
fn the_daemon_can_neither_look_into_other_processes_nor_move_their_memory() {
    let mut host = Host::new();
    host.start("");
    let pid = host.daemon.as_ref().unwrap().id();
    // linux/capability.h: CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_PERFMON
    let helpers = 1 << 19 | 1 << 21 | 1 << 23 | 1_u64 << 38;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        // one may have ended meanwhile
        let Ok(status) = std::fs::read_to_string(thread.path().join("status")) else { continue };
        for name in ["CapEff:", "CapPrm:"] {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            let capabilities = u64::from_str_radix(line.trim(), 16).unwrap();
            assert_eq!(capabilities & helpers, 0, "{name} of {}", thread.path().display());
        }
    }
}

#[test]
fn stores_and_sockets_that_cannot_be_used_are_refused_and_leave_nothing() {
    let mut host = Host::new();
    host.start("");
    let good = host.store("good", 1 << 20);
    let missing = host.path("missing").display().to_string();
    let (odd, empty) = (host.store("odd", 1000), host.store("empty", 0));
    host.refuses(&["disk", "add", "d", &missing], 1, &["does not exist", "check the path"]);
    host.refuses(&["disk", "add", "d", &odd], 1, &["1000 bytes", "multiple of 512"]);
    host.refuses(&["disk", "add", "d", &empty], 1, &["0 bytes"]);
    host.refuses(&["disk", "add", "d", "ftp://x/y"], 2, &["does not name a store", "nbd://host:port/export"]);
    std::fs::write(host.path("qcow"), [b"QFI\xfb".as_slice(), &[0; 65532]].concat()).unwrap();
    let qcow = host.path("qcow").display().to_string();
    host.refuses(&["disk", "add", "d", &qcow], 1, &["qcow2 image", "name it as qcow2:/path"]);
    let taken = std::os::unix::net::UnixListener::bind(host.path("taken")).unwrap();
    let socket = host.path("taken").display().to_string();
    host.refuses(&["disk", "add", "d", &good, "--export-socket", &socket], 1, &["in use by a running server"]);
    drop(taken);
    assert!(host.does(&["disk", "list"]).contains("no disks"));
    host.does(&["disk", "add", "d", &good]);
    host.refuses(&["disk", "add", "d", &good], 1, &["disk `d` already"]);
    host.refuses(&["disk", "add", "e", &good], 1, &["file:", "served by disk `d` already", "remove `d` first"]);
    // By another format it is the same file, and ours.
    let image = format!("qcow2:{good}");
    host.refuses(&["disk", "add", "e", &image], 1, &["served by disk `d` already", "remove `d` first"]);
    // Sizes are told as they are given.
    let range = ["cache", "warm", "d", "--ranges", "1MiB+4KiB"];
    host.refuses(&range, 1, &["the range 1MiB+4KiB ends beyond disk `d`, which has 1MiB"]);
    host.stop();
}

#[test]
fn a_disk_whose_store_is_gone_after_a_restart_says_so_and_comes_back_with_it() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    host.stop();
    std::fs::rename(&store, host.path("away")).unwrap();
    host.start("");
    let list = host.does(&["disk", "list"]);
    assert!(list.contains("does not exist"), "{list}");
    assert!(host.does(&["status"]).contains("degraded"));
    std::fs::rename(host.path("away"), &store).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while host.does(&["disk", "list"]).contains("does not exist") {
        assert!(Instant::now() < deadline, "the disk is not tried again:\n{}", host.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(host.path("run/vm/d.sock").exists());
    host.stop();
}

#[test]
fn a_store_that_grows_is_offered_anew_and_one_that_shrinks_is_reported() {
    let mut host = Host::new();
    host.start("");
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    let wait_for = |words: &[&str], expect: &str| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !host.does(words).contains(expect) {
            assert!(Instant::now() < deadline, "no {expect:?} in {}:\n{}", host.does(words), host.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait_for(&["--json", "disk", "show", "d"], "1048576");
    host.store("store", 3 << 20);
    wait_for(&["--json", "disk", "show", "d"], "3145728");
    host.store("store", 1 << 20);
    wait_for(&["status"], "has shrunk from 3145728 to 1048576 bytes");
    host.store("store", 3 << 20);
    wait_for(&["status"], "health:     ok");
    host.stop();
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused_and_the_first_serves_on() {
    let mut host = Host::new();
    host.start("");
    let output =
        Command::new(env!("CARGO_BIN_EXE_prestaged")).arg("--config").arg(host.path("prestaged.toml")).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("belongs to a running server"));
    host.does(&["status"]);
    host.stop();
}

#[test]
fn a_cache_disk_without_room_costs_the_tier_and_nothing_else() {
    let mut host = Host::new();
    let mount = host.path("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = Mount::tmpfs(&mount, "1m");
    if mounted.is_none() {
        println!(
            "SKIPPED in part: mounting a tmpfs is not permitted; the cache disk is a file that cannot be made instead"
        );
        std::fs::write(host.path("file"), "").unwrap();
    }
    let ssd = if mounted.is_some() { mount.join("ssd") } else { host.path("file").join("ssd") };
    host.start(&format!("ssd_path = \"{}\"\nssd_size = \"64MiB\"\n", ssd.display()));
    let store = host.store("store", 1 << 20);
    host.does(&["disk", "add", "d", &store]);
    let status = host.does(&["status"]);
    assert!(status.contains("ssd tier") && status.contains("degraded"), "{status}");
    if mounted.is_some() {
        assert!(status.contains("ssd_size"), "the operator must be told what to lower: {status}");
    }
    host.stop();
}

/// What a start would run into, or go without, is told before it: mistakes end with 2, what may come is a word.
#[test]
fn check_tells_what_the_host_does_not_have() {
    let host = Host::new();
    let check = |extra: &str| {
        let config = host.config(extra);
        let output = Command::new(env!("CARGO_BIN_EXE_prestaged")).arg("--check").arg("--config").arg(&config).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // The command line says all of it too.
        let other = host.ctl(&["config", "check", config.to_str().unwrap()]);
        let all = [other.stdout.clone(), other.stderr].concat();
        let all = String::from_utf8_lossy(&all).into_owned();
        assert_eq!(other.status.success(), output.status.success(), "{said}\n{all}");
        assert!(said.lines().all(|line| all.contains(line)), "{said}\n{all}");
        assert!(String::from_utf8_lossy(&other.stdout).contains(&*String::from_utf8_lossy(&output.stdout)), "{all}");
        (output.status.code(), said)
    };
    let ssd = host.path("ssd").display().to_string();
    let tier = |size: &str| format!("ssd_path = \"{ssd}\"\nssd_size = \"{size}\"\n");
    assert_eq!(check(&tier("64MiB")), (Some(0), String::new()));
    let wrong = |extra: &str, says: &str| {
        let (code, text) = check(extra);
        assert!(code == Some(2) && text.contains(says), "{code:?} {text}");
    };
    wrong(&tier("4000TiB"), "needs 3.9 PiB and only ");
    wrong("[export]\nsocket_group = \"nogroup-here\"\n", "export.socket_group: there is no group `nogroup-here`");
    wrong("[api]\ngroup = \"nogroup-here\"\n", "api.group: there is no group `nogroup-here`");
    let told = |extra: &str, says: &str| {
        let (code, text) = check(extra);
        assert!(code == Some(0) && text.contains(says), "{code:?} {text}");
    };
    // There already, with holes.
    std::fs::File::create(&ssd).unwrap().set_len(8 << 40).unwrap();
    told(&tier("8TiB"), "is a sparse file of 8.0 TiB on a file system of ");
    let twice = format!("{}[[disk]]\nname = \"d\"\nstore = \"{ssd}\"\n", tier("8TiB"));
    wrong(&twice, "is the store of disk `d`");
    let folder = host.path("folder").display().to_string();
    std::fs::create_dir(&folder).unwrap();
    let qcow2 = format!("[[disk]]\nname = \"d\"\nstore = \"qcow2:{ssd}?backing=/nonexistent/base\"\n");
    told(&qcow2, "disk `d`: /nonexistent/base is not there");
    wrong(&format!("ssd_path = \"{folder}\"\nssd_size = \"64MiB\"\n"), "is a folder; name a file in it");
    std::fs::write(host.path("state"), "").unwrap();
    wrong("", "daemon.state_dir: ");
    std::fs::remove_file(host.path("state")).unwrap();
    let long = format!("/run/{}", "x".repeat(103));
    wrong(&format!("[api]\nsocket = \"{long}\"\n"), "the path of a socket has 107 bytes at most, and /run/xxx");
    wrong(
        &format!("[[disk]]\nname = \"d\"\nstore = \"{ssd}\"\nsocket = \"{long}\"\n"),
        "has 108; use a shorter `socket`",
    );
    told("[store]\nimage_folder = \"/nonexistent\"\n", "store.image_folder: there is no folder /nonexistent");
    told("ssd_path = \"/nonexistent/ssd\"\nssd_size = \"64MiB\"\n", "the folder of /nonexistent/ssd is not there");
    told("[[disk]]\nname = \"d\"\nstore = \"/nonexistent/store\"\n", "disk `d`: /nonexistent/store is not there");
    let config = host.config("");
    let text = std::fs::read_to_string(&config).unwrap().replace("16MiB", "4000TiB");
    std::fs::write(&config, text).unwrap();
    for words in [&["--check"][..], &[]] {
        let output = Command::new(env!("CARGO_BIN_EXE_prestaged")).args(words).arg("--config").arg(&config).output();
        let output = output.unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("cache.ram_size: 3.9 PiB are more than the "), "{text}");
    }
}

/// A tmpfs for as long as this lives.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Option<Mount> {
        let mut command = Command::new("mount");
        let status =
            command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(at).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success()).then(|| Mount(at.to_owned()))
    }
}

impl Mount {
    fn unmount(self) {
        assert!(Command::new("umount").arg(&self.0).status().unwrap().success(), "somebody has it in use");
        std::mem::forget(self);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Of a test that failed the daemon may still run.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The database's bytes of the one profile, for a test to spoil.
fn edit_profile(host: &Host, edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let database = rusqlite::Connection::open(host.path("state/prestage.db")).unwrap();
    let mut bytes: Vec<u8> = database.query_row("SELECT data FROM profiles", [], |row| row.get(0)).unwrap();
    edit(&mut bytes);
    database.execute("UPDATE profiles SET data = ?", [&bytes]).unwrap();
    bytes
}

fn profile_bytes(host: &Host) -> Option<Vec<u8>> {
    let database = rusqlite::Connection::open(host.path("state/prestage.db")).unwrap();
    database.query_row("SELECT data FROM profiles", [], |row| row.get(0)).ok()
}

#[test]
fn a_profile_of_another_version_is_kept_until_it_is_removed() {
    let mut host = Host::new();
    let store = host.store("store", 1 << 20);
    host.start("");
    host.does(&["disk", "add", "d", &store]);
    learn(&host);
    host.does(&["profile", "save"]);
    host.stop();
    // The version follows the magic of eight bytes.
    let spoilt = edit_profile(&host, |bytes| bytes[8] = 99);
    host.start("");
    let shown = host.does(&["profile", "show", "d"]);
    assert!(shown.contains("version 99") && shown.contains("profile remove"), "{shown}");
    learn(&host);
    host.does(&["profile", "save"]);
    assert_eq!(profile_bytes(&host).as_ref(), Some(&spoilt), "what cannot be read must not be overwritten unasked");
    host.does(&["profile", "remove", "d"]);
    assert_eq!(profile_bytes(&host), None);
    learn(&host);
    host.does(&["profile", "save"]);
    host.stop();
    host.start("");
    let shown = host.does(&["profile", "show", "d"]);
    assert!(shown.contains("ok") && !shown.contains("version 99"), "{shown}");
    host.stop();
}

/// Connects to the disk's socket and goes away again, as a machine that starts and fails: a boot, if a short one.
fn learn(host: &Host) {
    let stream = std::os::unix::net::UnixStream::connect(host.path("run/vm/d.sock")).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    drop(stream);
    std::thread::sleep(Duration::from_millis(200));
}

/// Four read-only disks on one image, as clones of a golden image are.
#[test]
fn read_only_disks_of_one_image_start_side_by_side() {
    let mut host = Host::new();
    let store = host.store("golden", 1 << 20);
    let disks: String =
        (0..4).map(|i| format!("[[disk]]\nname = \"clone{i}\"\nstore = \"{store}\"\nread_only = true\n")).collect();
    host.start(&disks);
    let list = host.does(&["disk", "list"]);
    assert_eq!(list.matches(" ok").count(), 4, "{list}\n{}", host.log());
    host.stop();
}

#[test]
fn a_reload_does_not_change_the_disk_of_a_running_machine() {
    let mut host = Host::new();
    let (first, second) = (host.store("first", 1 << 20), host.store("second", 1 << 20));
    let declare = |store: &str| format!("[[disk]]\nname = \"d\"\nstore = \"{store}\"\n");
    host.start(&declare(&first));
    let machine = std::os::unix::net::UnixStream::connect(host.path("run/vm/d.sock")).unwrap();
    let wait_for = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "{what}:\n{}", host.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let list = || host.does(&["disk", "list"]);
    wait_for("the machine is not seen", &|| {
        host.does(&["--json", "disk", "show", "d"]).contains("\"connected\": true")
    });
    host.config(&declare(&second));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(host.daemon.as_ref().unwrap().id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    wait_for("no reload", &|| host.log().contains("configuration reloaded"));
    assert!(host.log().contains("changes when its machine stops"), "{}", host.log());
    assert!(list().contains("/first"), "{}", list());
    drop(machine);
    wait_for("the change is not made up for", &|| list().contains("/second") && list().contains(" ok"));
    host.stop();
}

#[test]
fn warming_a_huge_range_holds_nobody_up() {
    let mut host = Host::new();
    host.start("");
    // As large as the test's file system allows; sparse.
    let path = host.path("huge");
    let file = std::fs::File::create(&path).unwrap();
    let size = (20..=62).rev().map(|bits| 1u64 << bits).find(|size| file.set_len(*size).is_ok()).unwrap();
    host.does(&["disk", "add", "huge", &path.display().to_string()]);
    host.does(&["cache", "warm", "huge", "--ranges", &format!("0+{size}")]);
    host.does(&["status"]);
    host.does(&["disk", "remove", "huge"]);
    host.stop();
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused() {
    let mut host = Host::new();
    host.start("");
    let (config, run) = (host.path("prestaged.toml"), host.path("elsewhere"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_prestaged"));
    command.arg("--config").arg(config).arg("--set").arg(format!("daemon.run_dir=\"{}\"", run.display()));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("daemon.state_dir"), "{text}");
    host.stop();
}

#[test]
fn a_configuration_that_is_wrong_at_reload_changes_nothing() {
    let mut host = Host::new();
    let store = host.store("store", 1 << 20);
    host.start(&format!("[[disk]]\nname = \"d\"\nstore = \"{store}\"\n"));
    assert!(host.does(&["disk", "list"]).contains('d'));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(host.daemon.as_ref().unwrap().id()).unwrap());
    let reload = |text: &str, expect: &str| {
        host.config(text);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while !host.log().contains(expect) {
            assert!(Instant::now() < deadline, "no {expect:?} in the log:\n{}", host.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    reload("nonsense = 1\n", "unknown key `cache.nonsense`");
    assert!(host.does(&["--json", "disk", "list"]).contains("\"d\""));
    reload("", "configuration reloaded");
    assert!(host.does(&["disk", "list"]).contains("no disks"));
    host.stop();
}

#[test]
fn a_database_that_cannot_be_used_keeps_no_disk_from_its_guest() {
    let mut host = Host::new();
    host.start("");
    let (store, other) = (host.store("store", 1 << 20), host.store("other", 1 << 20));
    host.does(&["disk", "add", "d", &store]);
    host.stop();

    // Of a version that this program does not know: left as it is, and stood in for.
    let database = host.path("state/prestage.db");
    let version = |number: i64| {
        rusqlite::Connection::open(&database).unwrap().pragma_update(None, "user_version", number).unwrap();
    };
    let known: i64 = {
        let database = rusqlite::Connection::open(&database).unwrap();
        database.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap()
    };
    version(99);
    host.start("");
    assert!(host.does(&["disk", "list"]).contains(&store));
    let status = host.does(&["status"]);
    assert!(status.contains("is of version 99") && status.contains("stand-in.db stands in"), "{status}");
    host.refuses(&["disk", "add", "e", &other], 1, &["would be forgotten", "is of version 99"]);
    host.stop();
    version(known);

    // Damaged: set aside, and a new one begun.
    let garbage = vec![b'x'; 8192];
    std::fs::write(&database, &garbage).unwrap();
    host.start("");
    let status = host.does(&["status"]);
    assert!(status.contains("was damaged") && status.contains("must be added again"), "{status}");
    assert!(host.log().contains("ERROR database"), "{}", host.log());
    host.does(&["disk", "add", "d", &store]);
    host.stop();
    let kept = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read(entry.unwrap().path()).unwrap_or_default();
    assert!(std::fs::read_dir(host.path("state")).unwrap().map(kept).any(|bytes| bytes == garbage));
    host.start("");
    assert!(host.does(&["disk", "list"]).contains(&store));
    let status = host.does(&["status"]);
    assert!(!status.contains("damaged"), "{status}");
    host.stop();
}

#[test]
fn a_webhook_whose_secret_cannot_be_used_is_told_by_check_and_status_until_it_is_mended() {
    let mut host = Host::new();
    let secret = host.path("webhook.secret");
    let mode = |mode| std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(mode)).unwrap();
    let webhook = format!("[[webhook]]\nurl = \"https://127.0.0.1:9/hook\"\nsecret_file = \"{}\"\n", secret.display());
    let config = host.config(&webhook);
    let check = || {
        let check = Command::new(env!("CARGO_BIN_EXE_prestaged")).arg("--check").arg("--config").arg(&config).output();
        let check = check.unwrap();
        (check.status.code(), String::from_utf8_lossy(&check.stderr).into_owned())
    };
    let wrong = |says: &str| {
        let (code, text) = check();
        assert!(code == Some(2) && text.contains(says), "{code:?} {text}");
    };
    wrong("cannot be read");
    std::fs::write(&secret, "garbage\n").unwrap();
    mode(0o600);
    wrong("is no secret");
    std::fs::write(&secret, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo=\n").unwrap();
    assert_eq!(check(), (Some(0), String::new()));
    host.config(&format!("{webhook}[memory]\nhelper = \"/nonexistent/helper\"\n"));
    wrong("/nonexistent/helper is no program");
    host.config(&webhook);
    mode(0o644);
    wrong("chmod 600");

    host.start(&webhook);
    // The API answers before the daemon is ready.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !host.does(&["status"]).contains("may be read by everyone") {
        assert!(Instant::now() < deadline, "{}", host.does(&["status"]));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(host.does(&["demand"]).contains("nobody is told"), "{}", host.does(&["demand"]));
    mode(0o600);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(host.daemon.as_ref().unwrap().id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !host.log().contains("webhook: mended") {
        assert!(Instant::now() < deadline, "{}", host.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!host.does(&["status"]).contains("webhook"), "{}", host.does(&["status"]));
    assert!(!host.does(&["demand"]).contains("nobody is told"));
    host.stop();
}

#[test]
fn a_tier_that_is_a_disks_store_is_left_out_and_the_disk_served() {
    let mut host = Host::new();
    let store = host.store("store", 1 << 20);
    host.start(&format!("ssd_path = \"{store}\"\nssd_size = \"64MiB\"\n[[disk]]\nname = \"d\"\nstore = \"{store}\"\n"));
    let told = host.does(&["status"]);
    assert!(told.contains("is the store of disk `d`") && !told.contains("rm "), "{told}");
    assert_eq!(host.does(&["disk", "list"]).matches(" ok").count(), 1);
    host.stop();
    assert_eq!(std::fs::metadata(&store).unwrap().len(), 1 << 20);
}
