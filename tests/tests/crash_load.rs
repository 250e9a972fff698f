//! prestaged is killed again and again under a full load: several queues, 32 requests on each, answers out of order. Every
//! request is answered once, none fails, no acknowledged write is lost and none comes back after a later one.

#![allow(clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::Scratch;
use prestage_tests::process::wait_until;
use prestage_tests::throttled::Throttled;
use prestage_tests::vhost::{Load, LoadOptions, Model, SECTOR};

const SECTORS: usize = 64 << 10;
const QUEUES: u16 = 4;
const DEPTH: u16 = 32;
/// Of the remote store: so that requests wait for it, and hits overtake them.
const REQUESTS_PER_SECOND: u32 = 6000;

/// Lives that end by SIGKILL.
fn rounds() -> u64 {
    std::env::var("PRESTAGE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

/// Kills and starts the daemon under load on the store `spec`, whose bytes are in `file`.
fn kill_under_load(name: &str, spec: &str, file: &Path, seed: u64) {
    let rounds = rounds();
    let options = DaemonOptions { ram_size: "16MiB".to_owned(), ssd_size: "64MiB".to_owned(), ..Default::default() };
    let mut daemon = Prestaged::start(&options).unwrap();
    daemon.ctl(&["disk", "add", name, spec]).unwrap();
    let socket = daemon.disk_socket(name).unwrap();
    let load = Load::start(&socket, SECTORS, LoadOptions { queues: QUEUES, depth: DEPTH, seed }).unwrap();
    for round in 1..=rounds {
        let before = load.answers();
        // at another moment each time, and never before the new daemon has served
        let enough = before + 300 + round * 7919 % 1500;
        let went = wait_until("answers under load", Duration::from_secs(120), || {
            Ok(!load.runs() || (load.connections() == round && load.answers() >= enough))
        });
        if !load.runs() || went.is_err() {
            panic!("round {round}: {:?}, {:?}\n{}", load.finish().err(), went, daemon.last_words());
        }
        daemon.crash().unwrap();
        daemon.resume().unwrap();
    }
    let (report, model) = load.finish().unwrap_or_else(|error| panic!("{error:?}\n{}", daemon.last_words()));
    println!("{name}: {rounds} kills, {report:?}");
    assert_eq!(report.deaths, rounds);
    assert!(report.unanswered >= rounds * u64::from(DEPTH), "it was killed under load");
    assert!(report.out_of_order > report.reads / 20, "answers overtook each other");
    daemon.stop().unwrap();

    // the cache can hide nothing: the store itself has the newest version of every sector
    let bytes = std::fs::read(file).unwrap();
    let mut model = model;
    let newest = model.begin_read(0, SECTORS);
    model.end_read(0, &newest, &bytes).unwrap();
}

/// A file of version 0.
fn blank(scratch: &Scratch) -> std::path::PathBuf {
    let file = scratch.join("disk.raw");
    std::fs::write(&file, Model::blank(SECTORS)).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), (SECTORS * SECTOR) as u64);
    file
}

#[test]
fn on_a_remote_store_nothing_is_lost_or_done_twice() {
    let scratch = Scratch::large().unwrap();
    let file = blank(&scratch);
    let store = Throttled::start(&scratch, "store", &file, REQUESTS_PER_SECOND).unwrap();
    kill_under_load("remote", &store.store().spec(), &file, 1);
}

#[test]
fn on_a_local_file_nothing_is_lost_or_done_twice() {
    let scratch = Scratch::large().unwrap();
    let file = blank(&scratch);
    kill_under_load("local", &file.display().to_string(), &file, 2);
}
