//! A new prestaged takes over from the one that runs, under load: no connection is closed, no request lost or done twice, and
//! whatever goes wrong on the way, somebody serves.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use prestage_integration::handover::{FromPredecessor, FromSuccessor, Parcel, Peer};
use prestage_tests::daemon::{DaemonOptions, Outcome, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::process::{run, wait_until};
use prestage_tests::slab;
use prestage_tests::throttled::Throttled;
use prestage_tests::vhost::{Load, LoadOptions, Model, Report};

const SECTORS: usize = 64 << 10;
const QUEUES: u16 = 4;
const DEPTH: u16 = 32;
/// So that the load waits for the store all the time, in an order that is not that of its requests.
const REQUESTS_PER_SECOND: u32 = 4000;

/// Set for a process that plays a bad successor: what is wrong with it, and the socket to go to.
const BAD_SUCCESSOR: &str = "PRESTAGE_TEST_SUCCESSOR";

/// How often something is done again.
fn rounds(few: u64) -> u64 {
    std::env::var("PRESTAGE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(few)
}

/// A disk of blank sectors in a folder of its own.
fn blank() -> (Scratch, PathBuf) {
    let scratch = Scratch::large().unwrap();
    let file = scratch.join("disk.raw");
    std::fs::write(&file, Model::blank(SECTORS)).unwrap();
    (scratch, file)
}

struct Bench {
    daemon: Prestaged,
    load: Load,
    store: Option<Throttled>,
    scratch: Scratch,
}

impl Bench {
    /// A daemon under full load on a slow store.
    fn new(seed: u64) -> Self {
        let (scratch, file) = blank();
        let store = Throttled::start(&scratch, "store", &file, REQUESTS_PER_SECOND).unwrap();
        let spec = store.store().spec();
        Self { store: Some(store), ..Self::on(scratch, &spec, seed) }
    }

    /// A daemon under full load on the store `spec`.
    fn on(scratch: Scratch, spec: &str, seed: u64) -> Self {
        Self::with(scratch, spec, seed, DaemonOptions::default())
    }

    fn with(scratch: Scratch, spec: &str, seed: u64, options: DaemonOptions) -> Self {
        let options = DaemonOptions { ram_size: "16MiB".to_owned(), ssd_size: "64MiB".to_owned(), ..options };
        let daemon = Prestaged::start(&options).unwrap();
        daemon.ctl(&["disk", "add", "busy", spec]).unwrap();
        let load = Self::load(&daemon, "busy", seed);
        let bench = Self { daemon, load, store: None, scratch };
        bench.wait_answers();
        bench
    }

    fn load(daemon: &Prestaged, disk: &str, seed: u64) -> Load {
        let socket = daemon.disk_socket(disk).unwrap();
        Load::start(&socket, SECTORS, LoadOptions { queues: QUEUES, depth: DEPTH, seed }).unwrap()
    }

    /// Waits until the load has gone on for a while.
    fn wait_answers(&self) {
        self.wait_answers_of(&self.load);
    }

    fn wait_answers_of(&self, load: &Load) {
        let enough = load.answers() + 500;
        let went =
            wait_until("answers under load", Duration::from_secs(120), || Ok(!load.runs() || load.answers() >= enough));
        went.unwrap_or_else(|error| panic!("{error}\n{}", self.daemon.last_words()));
    }

    fn door(&self) -> PathBuf {
        self.daemon.disk_socket("busy").unwrap().parent().unwrap().with_file_name("hand-over.sock")
    }

    /// Everything was answered rightly.
    fn end(self) -> Report {
        let Self { mut daemon, load, store, scratch } = self;
        let (report, _) = load.finish().unwrap_or_else(|error| panic!("{error:?}\n{}", daemon.last_words()));
        println!("{report:?}");
        daemon.stop().unwrap();
        drop((store, scratch));
        report
    }

    /// Everything was answered rightly, and over so many connections.
    fn finish(self, connections: u64) {
        assert_eq!(self.end().deaths + 1, connections);
    }
}

#[test]
fn a_busy_disk_changes_hands_without_its_connection_being_closed() {
    let mut bench = Bench::new(1);
    let mut gaps = Vec::new();
    for round in 0..rounds(4) {
        bench.load.take_gap();
        if round % 3 == 2 {
            bench.daemon.hand_over_by_signal().unwrap();
        } else {
            bench.daemon.hand_over().unwrap();
        }
        bench.wait_answers();
        gaps.push(bench.load.take_gap());
    }
    gaps.sort_unstable();
    println!(
        "{} hand-overs; without an answer: median {:?}, longest {:?}",
        gaps.len(),
        gaps[gaps.len() / 2],
        gaps.last()
    );
    // learned and counted on: the disk is on the list, and the database is ours
    let other = bench.scratch.join("disk.raw").with_file_name("other.raw");
    std::fs::write(&other, [0; 4096]).unwrap();
    bench.daemon.ctl(&["disk", "add", "other", &other.display().to_string()]).unwrap();
    bench.daemon.ctl(&["disk", "remove", "other"]).unwrap();
    // what the SSD tier holds was passed on, and found clean
    assert_eq!(bench.daemon.said("no SSD tier").unwrap(), 0, "{}", bench.daemon.last_words());
    assert_eq!(bench.daemon.said("SSD tier starts empty").unwrap(), 0, "{}", bench.daemon.last_words());
    bench.finish(1);
}

/// The index of a large tier takes its time. Nobody waits for it, and the tier passes on with all of it.
#[test]
fn a_tier_whose_index_is_still_being_read_changes_hands() {
    let (scratch, file) = blank();
    let options = DaemonOptions {
        ram_size: "16MiB".to_owned(),
        ssd_size: "64GiB".to_owned(),
        ssd_hole_bytes: Some(64 << 30),
        ..DaemonOptions::default()
    };
    let mut daemon = Prestaged::start(&options).unwrap();
    daemon.ctl(&["disk", "add", "busy", &file.display().to_string()]).unwrap();
    daemon.stop().unwrap();
    let slots = slab::fill(daemon.ssd(), 64 << 30).unwrap();
    daemon.resume().unwrap();
    let load = Bench::load(&daemon, "busy", 9);
    let mut bench = Bench { daemon, load, store: None, scratch };
    let recovery = |bench: &Bench, key: &str| {
        bench.daemon.ctl(&["status"]).unwrap()["cache"]["ssd_recovery"][key].as_u64().unwrap_or(0)
    };
    for _ in 0..3 {
        bench.wait_answers();
        println!("{} of {slots} records to go", recovery(&bench, "unread_blocks"));
        bench.daemon.hand_over().unwrap();
    }
    bench.wait_answers();
    wait_until("the index", Duration::from_secs(120), || Ok(recovery(&bench, "unread_blocks") == 0)).unwrap();
    // All but what the busy disk itself may have had there.
    let kept = recovery(&bench, "kept_blocks");
    assert!(kept + 512 >= slots, "{kept} of {slots} are left\n{}", bench.daemon.last_words());
    assert_eq!(bench.daemon.said("no SSD tier").unwrap(), 0, "{}", bench.daemon.last_words());
    bench.finish(1);
}

/// What an operator took out stays out, whoever serves, and comes back when he says so.
#[test]
fn a_daemon_whose_ssd_tier_is_drained_changes_hands() {
    let mut bench = Bench::new(7);
    let tier = |daemon: &Prestaged| {
        let ssd = daemon.ctl(&["cache", "tiers"]).unwrap()["tiers"][1].clone();
        (ssd["capacity_bytes"].as_u64().unwrap(), ssd["detail"].as_str().unwrap_or_default().to_owned())
    };
    bench.daemon.ctl(&["cache", "drain", "--ssd"]).unwrap();
    for _ in 0..rounds(2) {
        bench.daemon.hand_over().unwrap();
        bench.wait_answers();
        let (capacity, detail) = tier(&bench.daemon);
        assert!(capacity == 0 && detail.starts_with("drained by an operator at 20"), "{detail}");
    }
    bench.daemon.ctl(&["cache", "resume", "--ssd"]).unwrap();
    bench.wait_answers();
    bench.daemon.hand_over().unwrap();
    bench.wait_answers();
    let (capacity, detail) = tier(&bench.daemon);
    assert!(capacity > 0 && detail.is_empty(), "{detail}");
    assert_eq!(bench.daemon.said("no SSD tier").unwrap(), 0, "{}", bench.daemon.last_words());
    bench.finish(1);
}

#[test]
fn a_disk_in_qcow2_format_changes_hands() {
    let (scratch, raw) = blank();
    let image = scratch.join("disk.qcow2");
    convert(&raw, &image, &[]);
    let mut bench = Bench::on(scratch, &format!("qcow2:{}", image.display()), 5);
    for _ in 0..2 {
        bench.daemon.hand_over().unwrap();
        bench.wait_answers();
    }
    bench.finish(1);
}

#[test]
fn a_disk_that_qemu_reads_for_us_changes_hands() {
    let (scratch, raw) = blank();
    let image = scratch.join("disk.qcow2");
    convert(&raw, &image, &["-o", "compression_type=zstd"]);
    let mut bench = Bench::on(scratch, &format!("qcow2:{}", image.display()), 6);
    let shown = bench.daemon.ctl(&["disk", "show", "busy"]).unwrap().to_string();
    assert!(shown.contains("qemu-storage-daemon"), "{shown}");
    for _ in 0..2 {
        bench.daemon.hand_over().unwrap();
        bench.wait_answers();
    }
    bench.finish(1);
}

/// What a package does: the program's file is replaced, and `packaging/upgrade` is run. The service manager is played.
#[test]
fn the_program_that_is_installed_takes_over_and_the_service_manager_is_told() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let (scratch, file) = blank();
    let built = prestage_tests::paths::program("prestaged").unwrap();
    // on the same file system, so that it costs nothing
    let folder = tempfile::tempdir_in(built.parent().unwrap()).unwrap();
    let program = folder.path().join("prestaged");
    std::fs::hard_link(&built, &program).unwrap();
    let manager = Manager::new(folder.path());
    let under = vec!["env".to_owned(), format!("NOTIFY_SOCKET={}", manager.socket.display())];
    let options = DaemonOptions { program: Some(program.clone()), under, ..Default::default() };
    let mut bench = Bench::with(scratch, &file.display().to_string(), 10, options);
    manager.hear_until("READY=1");
    let old = bench.daemon.pid().unwrap();
    manager.set_main(old);

    let exe = |pid: i32| std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    std::fs::remove_file(&program).unwrap();
    std::fs::hard_link(&built, &program).unwrap();
    assert_ne!(exe(old), program, "what runs is not what is installed");
    let mut upgrade = manager.upgrade(bench.door().parent().unwrap());
    let new: i32 = manager.hear("MAINPID=").parse().unwrap();
    manager.hear_until("READY=1");
    assert_eq!(exe(new), program);
    manager.set_main(new);
    assert!(upgrade.wait().unwrap().success());
    bench.daemon.succeeded_by_stranger().unwrap();
    assert_eq!(bench.daemon.pid(), Some(new));
    bench.wait_answers();
    bench.finish(1);
}

/// A service manager: its notification socket (sd_notify(3)), and a `systemctl` that knows as much as `packaging/upgrade` asks.
struct Manager {
    folder: PathBuf,
    socket: PathBuf,
    words: UnixDatagram,
}

impl Manager {
    fn new(folder: &Path) -> Self {
        let control = folder.join("systemctl");
        let script = "#!/bin/sh\ncd \"$(dirname \"$0\")\" || exit\ncase $1 in\n\
            daemon-reload | is-active) ;;\nshow) cat main ;;\nkill) kill -USR2 \"$(cat main)\" ;;\n*) exit 1 ;;\nesac\n";
        std::fs::write(&control, script).unwrap();
        std::fs::set_permissions(&control, std::fs::Permissions::from_mode(0o755)).unwrap();
        let socket = folder.join("notify.sock");
        let words = UnixDatagram::bind(&socket).unwrap();
        words.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { folder: folder.into(), socket, words }
    }

    fn set_main(&self, pid: i32) {
        std::fs::write(self.folder.join("main"), pid.to_string()).unwrap();
    }

    fn upgrade(&self, run_dir: &Path) -> std::process::Child {
        let mut command = Command::new(prestage_tests::paths::source().join("packaging/upgrade"));
        let path = format!("{}:{}", self.folder.display(), std::env::var("PATH").unwrap());
        command.env("PATH", path).env("PRESTAGE_RUN_DIR", run_dir).spawn().unwrap()
    }

    /// What follows `start` in the first line that begins so.
    fn hear(&self, start: &str) -> String {
        loop {
            let mut bytes = [0; 4096];
            let length = self.words.recv(&mut bytes).unwrap();
            let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
            if let Some(rest) = text.lines().find_map(|line| line.strip_prefix(start)) {
                return rest.to_owned();
            }
        }
    }

    fn hear_until(&self, line: &str) {
        let _ = self.hear(line);
    }
}

fn convert(raw: &Path, image: &Path, more: &[&str]) {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "qcow2"]).args(more).args([raw, image]);
    run(&mut command).unwrap();
}

/// The disk on it goes on when the store does; the other is not held up for longer than a hand-over takes.
#[test]
fn a_store_that_hangs_keeps_no_other_disk_from_changing_hands() {
    let mut bench = Bench::new(7);
    let (scratch, file) = blank();
    bench.daemon.ctl(&["disk", "add", "well", &file.display().to_string()]).unwrap();
    let well = Bench::load(&bench.daemon, "well", 8);
    bench.wait_answers_of(&well);
    let store = bench.store.as_ref().unwrap();
    store.hang().unwrap();
    let next = bench.daemon.start_beside(&["--take-over"]).unwrap();
    // the hand-over is done, and only then the store goes on
    bench.daemon.wait_said("prestaged ready", 2).unwrap();
    bench.wait_answers_of(&well);
    store.go_on().unwrap();
    assert_eq!(bench.daemon.settle(next).unwrap(), Outcome::TakenOver);
    bench.wait_answers();
    let (report, _) = well.finish().unwrap_or_else(|error| panic!("{error:?}\n{}", bench.daemon.last_words()));
    println!("beside a store that hangs: {report:?}");
    assert_eq!(report.deaths, 0, "{report:?}");
    // The daemon may not have heard yet that the client is gone.
    bench.daemon.ctl(&["disk", "remove", "--force", "well"]).unwrap();
    bench.end();
    drop(scratch);
}

/// Either of the two is killed, sooner or later after the hand-over has begun.
#[test]
fn whoever_is_killed_during_a_hand_over_the_guest_sees_a_pause() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut bench = Bench::new(9);
    let mut outcomes = Vec::new();
    for round in 0..rounds(6) {
        let begun = bench.daemon.said("handing over").unwrap();
        let next = bench.daemon.start_beside(&["--take-over"]).unwrap();
        bench.daemon.wait_said("handing over", begun + 1).unwrap();
        std::thread::sleep(Duration::from_millis(round / 2 * 97 % 400));
        if round % 2 == 0 {
            next.signal(Signal::SIGKILL).unwrap();
        } else {
            bench.daemon.kill().unwrap();
        }
        outcomes.push(bench.daemon.settle(next).unwrap());
        bench.wait_answers();
    }
    let count = |outcome| outcomes.iter().filter(|one| **one == outcome).count();
    let all = [Outcome::Kept, Outcome::TakenOver, Outcome::Replaced, Outcome::Restarted];
    println!("{:?}", all.map(|outcome| (outcome, count(outcome))));
    // nobody goes back once connections have been let go of
    assert_eq!(count(Outcome::Kept), 0, "{outcomes:?}");
    bench.end();
}

#[test]
fn a_successor_that_cannot_start_changes_nothing() {
    if let Ok(part) = std::env::var(BAD_SUCCESSOR) {
        return play(&part);
    }
    let bench = Bench::new(2);
    let pid = bench.daemon.pid();
    let bad = bench.daemon.start_beside(&["--take-over", "--set", "cache.ram_sise=1MiB"]).unwrap();
    assert!(!bad.wait(Duration::from_secs(60)).unwrap().success());
    let door = bench.door();
    for what in ["silent", "rude", "gone"] {
        assert!(!bad_successor(what, &door), "{what}");
        bench.wait_answers();
    }
    assert_eq!(bench.daemon.pid(), pid);
    bench.daemon.ctl(&["status"]).unwrap();
    bench.finish(1);
}

#[test]
fn a_successor_that_fails_with_everything_in_its_hands_is_replaced() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let mut bench = Bench::new(3);
    for what in ["weak", "blind"] {
        assert!(!bad_successor(what, &bench.door()), "{what}");
        bench.daemon.succeeded_by_stranger().unwrap();
        bench.wait_answers();
    }
    // a real one that finds out late that its configuration asks for what the host has not
    let bad = bench
        .daemon
        .start_beside(&["--take-over", "--set", "cache.huge_pages=\"require\"", "--set", "cache.ram_size=\"32TiB\""])
        .unwrap();
    bench.daemon.succeeded_by_stranger().unwrap();
    assert!(!bad.wait(Duration::from_secs(60)).unwrap().success());
    bench.wait_answers();
    bench.daemon.hand_over().unwrap();
    bench.wait_answers();
    bench.finish(1);
}

/// It does not end by itself: it is killed by who gave it everything, whose broker started it.
#[test]
fn a_successor_that_hangs_with_everything_in_its_hands_is_killed_and_replaced() {
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let (scratch, file) = blank();
    let built = prestage_tests::paths::program("prestaged").unwrap();
    let folder = tempfile::tempdir_in(built.parent().unwrap()).unwrap();
    let program = folder.path().join("prestaged");
    std::fs::hard_link(&built, &program).unwrap();
    let options = DaemonOptions { program: Some(program.clone()), ..Default::default() };
    let mut bench = Bench::with(scratch, &file.display().to_string(), 11, options);
    // What is installed is one now that hangs.
    let script = format!(
        "#!/bin/sh\necho $$ > {}\n{BAD_SUCCESSOR}='greedy {}' exec {} --exact a_successor_that_cannot_start_changes_nothing\n",
        folder.path().join("pid").display(),
        bench.door().display(),
        std::env::current_exe().unwrap().display()
    );
    std::fs::remove_file(&program).unwrap();
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    bench.daemon.hand_over_by_signal().unwrap();
    let pid = std::fs::read_to_string(folder.path().join("pid")).unwrap();
    let command = std::fs::read(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
    assert_eq!(String::from_utf8_lossy(&command), "", "it still runs");
    bench.wait_answers();
    bench.finish(1);
}

#[test]
fn a_successor_that_does_not_read_the_format_starts_plainly() {
    let mut bench = Bench::new(4);
    // waits until the daemon has ended
    assert!(bad_successor("foreign", &bench.door()));
    bench.daemon.ended().unwrap();
    bench.daemon.resume().unwrap();
    bench.wait_answers();
    bench.finish(2);
}

/// Runs a bad successor to its end. Whether it ended well.
fn bad_successor(what: &str, door: &Path) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "a_successor_that_cannot_start_changes_nothing", "--nocapture"]);
    command.env(BAD_SUCCESSOR, format!("{what} {}", door.display())).stdout(Stdio::null());
    command.status().unwrap().success()
}

/// What a bad successor does. One that fails ends here.
fn play(part: &str) {
    let (what, door) = part.split_once(' ').unwrap();
    let peer = Peer::connect(Path::new(door)).unwrap();
    let say = |message: FromSuccessor| peer.send(&message, &Parcel::default()).unwrap();
    let hello = |oldest_format, format| FromSuccessor::Hello {
        program: "test".to_owned(),
        oldest_format,
        format,
        pid: std::process::id(),
    };
    match what {
        "silent" => std::process::exit(1),
        "rude" => say(FromSuccessor::Serving),
        "gone" => {
            say(hello(1, 1));
            let _: (FromPredecessor<()>, _) = peer.receive().unwrap();
        }
        "weak" => {
            say(hello(1, 1));
            let _: (FromPredecessor<()>, _) = peer.receive().unwrap();
            say(FromSuccessor::Ready);
        }
        "blind" | "greedy" => {
            say(hello(1, 1));
            let _: (FromPredecessor<()>, _) = peer.receive().unwrap();
            say(FromSuccessor::Ready);
            let (estate, _parcel): (FromPredecessor<serde_json::Value>, _) = peer.receive().unwrap();
            assert!(matches!(estate, FromPredecessor::Estate(_)));
            if what == "blind" {
                std::process::exit(1);
            }
            say(FromSuccessor::Ready); // which is not what is due
            std::thread::sleep(Duration::from_secs(600));
        }
        "foreign" => {
            say(hello(900, 999));
            let (answer, _): (FromPredecessor<()>, _) = peer.receive().unwrap();
            assert!(matches!(answer, FromPredecessor::Restart { .. }));
            say(FromSuccessor::Ready);
            peer.wait_gone();
            return;
        }
        other => unreachable!("{other}"),
    }
    std::process::exit(1);
}
