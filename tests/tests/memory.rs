//! Memory pages: what the tests of swapped-out guests stand on is put back, however they end. Swap areas, settings, control groups.

#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use prestage_tests::group::Group;
use prestage_tests::paths::Scratch;
use prestage_tests::process::{run, wait_until};
use prestage_tests::swap::{LOCK, Swap};

/// Set for the process that is killed: the path of its swap file, or `zram`.
const VICTIM: &str = "PRESTAGE_TEST_SWAP_VICTIM";

const BYTES: u64 = 64 << 20;

fn page_cluster() -> u8 {
    std::fs::read_to_string("/proc/sys/vm/page-cluster").unwrap().trim().parse().unwrap()
}

fn is_on(device: &str) -> bool {
    std::fs::read_to_string("/proc/swaps").unwrap().lines().any(|line| line.split_whitespace().next() == Some(device))
}

/// Makes an area, says its name and what `vm.page-cluster` was, and waits to be killed.
fn be_killed(kind: &str) -> ! {
    // others wait for the area that is on, and only then is the setting what it will be put back to
    let mut swap = if kind == "zram" { Swap::zram(BYTES) } else { Swap::file(Path::new(kind), BYTES) }.unwrap();
    let before = page_cluster();
    swap.set_page_cluster(if before == 1 { 2 } else { 1 }).unwrap();
    println!("VICTIM {before} {}", swap.device().display());
    loop {
        std::thread::park();
    }
}

/// Runs the test `name` again as the process that is killed, and returns it with what it says.
fn victim(name: &str, kind: &str) -> (Child, String) {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(VICTIM, kind)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    // libtest's own words may stand before ours on the line
    let line = lines.find_map(|line| line.split_once("VICTIM ").map(|(_, rest)| rest.to_owned()));
    (victim, line.expect("the victim says what it made; its error is above"))
}

fn kill_one(name: &str, kind: &str) {
    let (mut victim, line) = victim(name, kind);
    let (before, device) = line.split_once(' ').unwrap();
    let before: u8 = before.parse().unwrap();
    assert!(is_on(device), "{device} is on");
    assert_ne!(page_cluster(), before, "the setting is changed");

    victim.kill().unwrap();
    victim.wait().unwrap();
    wait_until("the swap area's end", Duration::from_secs(60), || Ok(!is_on(device) && !Path::new(device).exists()))
        .unwrap();
    // another test may have its area on by now, but not while the lock is held here
    let after = run(Command::new("flock").args([LOCK, "cat", "/proc/sys/vm/page-cluster"])).unwrap();
    assert_eq!(after.trim().parse(), Ok(before), "the setting is put back");
}

#[test]
fn a_zram_device_is_taken_back_when_its_process_is_killed() {
    if let Ok(kind) = std::env::var(VICTIM) {
        be_killed(&kind);
    }
    if let Err(why) = Swap::zram_available() {
        println!("SKIPPED: {why}");
        return;
    }
    kill_one("a_zram_device_is_taken_back_when_its_process_is_killed", "zram");
}

#[test]
fn a_swap_file_is_taken_back_when_its_process_is_killed() {
    if let Ok(kind) = std::env::var(VICTIM) {
        be_killed(&kind);
    }
    if let Err(why) = Swap::available() {
        println!("SKIPPED: {why}");
        return;
    }
    let folder = Scratch::large().unwrap();
    let file = folder.join("swap");
    kill_one("a_swap_file_is_taken_back_when_its_process_is_killed", &file.display().to_string());
}

#[test]
fn a_control_group_is_taken_back_when_its_process_is_killed() {
    const NAME: &str = "a_control_group_is_taken_back_when_its_process_is_killed";
    if std::env::var(VICTIM).is_ok() {
        let mut child = Command::new("sleep").arg("600").stdout(Stdio::null()).spawn().unwrap();
        let group = Group::of(child.id().try_into().unwrap()).unwrap();
        group.limit(BYTES).unwrap();
        println!("VICTIM {} {}", child.id(), group.folder().display());
        child.wait().unwrap();
        return;
    }
    if let Err(why) = Group::available() {
        println!("SKIPPED: {why}");
        return;
    }
    let (mut victim, line) = victim(NAME, "group");
    let (inside, folder) = line.split_once(' ').unwrap();
    let procs = std::fs::read_to_string(Path::new(folder).join("cgroup.procs")).unwrap();
    assert!(procs.lines().any(|line| line == inside), "{inside} is in the group: {procs}");
    victim.kill().unwrap();
    victim.wait().unwrap();
    wait_until("the control group's end", Duration::from_secs(30), || Ok(!Path::new(folder).exists())).unwrap();
    run(Command::new("kill").arg(inside)).unwrap();
}
