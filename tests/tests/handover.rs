//! A new prestaged takes over from the one that runs, under load: no connection is closed, no request lost or done twice, and
//! whatever goes wrong on the way, somebody serves.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use prestage_integration::handover::{FromPredecessor, FromSuccessor, Parcel, Peer};
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::process::wait_until;
use prestage_tests::store::{Nbd, NbdOptions};
use prestage_tests::vhost::{Load, LoadOptions, Model};

const SECTORS: usize = 64 << 10;
const QUEUES: u16 = 4;
const DEPTH: u16 = 32;

/// Set for a process that plays a bad successor: what is wrong with it, and the socket to go to.
const BAD_SUCCESSOR: &str = "PRESTAGE_TEST_SUCCESSOR";

struct Bench {
    daemon: Prestaged,
    load: Load,
    _nbd: Nbd,
    _scratch: Scratch,
}

impl Bench {
    /// A daemon under full load on a slow store.
    fn new(seed: u64) -> Self {
        let scratch = Scratch::large().unwrap();
        let file = scratch.join("disk.raw");
        std::fs::write(&file, Model::blank(SECTORS)).unwrap();
        let delays = NbdOptions {
            read_delay: Duration::from_millis(5),
            write_delay: Duration::from_millis(2),
            keep_writes: true,
        };
        let nbd = Nbd::start(&scratch, "handover", &file, &delays).unwrap();
        let options =
            DaemonOptions { ram_size: "16MiB".to_owned(), ssd_size: "64MiB".to_owned(), ..Default::default() };
        let daemon = Prestaged::start(&options).unwrap();
        daemon.ctl(&["disk", "add", "busy", &nbd.store().spec()]).unwrap();
        let socket = daemon.disk_socket("busy").unwrap();
        let load = Load::start(&socket, SECTORS, LoadOptions { queues: QUEUES, depth: DEPTH, seed }).unwrap();
        let bench = Self { daemon, load, _nbd: nbd, _scratch: scratch };
        bench.wait_answers();
        bench
    }

    /// Waits until the load has gone on for a while.
    fn wait_answers(&self) {
        let enough = self.load.answers() + 500;
        let went = wait_until("answers under load", Duration::from_secs(120), || {
            Ok(!self.load.runs() || self.load.answers() >= enough)
        });
        went.unwrap_or_else(|error| panic!("{error}\n{}", self.daemon.last_words()));
    }

    fn door(&self) -> PathBuf {
        self.daemon.disk_socket("busy").unwrap().parent().unwrap().with_file_name("hand-over.sock")
    }

    /// Everything was answered rightly, and over so many connections.
    fn finish(self, connections: u64) {
        let Self { mut daemon, load, .. } = self;
        let (report, _) = load.finish().unwrap_or_else(|error| panic!("{error:?}\n{}", daemon.last_words()));
        println!("{report:?}");
        assert_eq!(report.deaths + 1, connections, "{}", daemon.last_words());
        daemon.stop().unwrap();
    }
}

#[test]
fn a_busy_disk_changes_hands_without_its_connection_being_closed() {
    let mut bench = Bench::new(1);
    for round in 0..4 {
        if round == 2 {
            bench.daemon.hand_over_by_signal().unwrap();
        } else {
            bench.daemon.hand_over().unwrap();
        }
        bench.wait_answers();
    }
    // learned and counted on: the disk is on the list, and the database is ours
    bench.daemon.ctl(&["disk", "add", "other", &bench._scratch.join("disk.raw").display().to_string()]).unwrap();
    bench.daemon.ctl(&["disk", "remove", "other"]).unwrap();
    bench.finish(1);
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
    let mut bench = Bench::new(3);
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let door = bench.door();
    // it is killed by who gave it everything
    assert!(!bad_successor("greedy", &door));
    bench.daemon.succeeded_by_stranger().unwrap();
    bench.wait_answers();
    bench.daemon.hand_over().unwrap();
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
        "greedy" => {
            say(hello(1, 1));
            let _: (FromPredecessor<()>, _) = peer.receive().unwrap();
            say(FromSuccessor::Ready);
            let (estate, _parcel): (FromPredecessor<serde_json::Value>, _) = peer.receive().unwrap();
            assert!(matches!(estate, FromPredecessor::Estate(_)));
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
