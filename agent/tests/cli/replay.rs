//! `trace replay`, which needs no daemon.

use super::{Outcome, command, fails, run};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

/// Nobody listens there.
const NO_DAEMON: &str = "/nonexistent/prestaged.sock";
const HEAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/replay/tests/testdata/vm_boot1_head.csv.gz");

fn replay(arguments: &[&str]) -> Outcome {
    run(Path::new(NO_DAEMON), &[&["trace", "replay"], arguments].concat())
}

fn refused(arguments: &[&str], code: i32, expected: &str) {
    fails(Path::new(NO_DAEMON), &[&["trace", "replay"], arguments].concat(), code, expected);
}

#[test]
fn a_table_fits_a_terminal_and_names_what_was_mended() {
    let outcome = replay(&[HEAD, "--cache", "20%", "--policy", "none", "--eviction", "lru"]);
    assert_eq!((outcome.code, outcome.err.as_str()), (0, ""));
    assert_eq!(
        outcome.out,
        "\
policy none, lru, 4.0 KiB blocks, store: none, all at once

TRACE                  CACHE  READS  HIT %  PAGE %  COVER %  PREC %  LATE %
vm_boot1_head.csv.gz  23 MiB   2506    2.2     0.9        -       -       -

TRACE                  DEMAND  AHEAD  UNUSED  ECE
vm_boot1_head.csv.gz  113 MiB    0 B     0 B    -

vm_boot1_head.csv.gz: 2 requests out of order in time, taken as simultaneous
with the one before
"
    );
    let folder = tempfile::tempdir().unwrap();
    let marks = folder.path().join("marks");
    std::fs::write(&marks, "167071382 boot-done\n169029014 start py\n").unwrap();
    let (marks, train) = (marks.to_str().unwrap(), format!("{HEAD},{}", marks.display()));
    let outcome = replay(&[
        HEAD,
        "--cache",
        "64MiB",
        "--block",
        "64K",
        "--train",
        &train,
        "--programs",
        marks,
        "--latency-us",
        "5000",
        "--cost",
    ]);
    assert_eq!((outcome.code, outcome.err.as_str()), (0, ""));
    assert!(outcome.out.contains("from mark to mark:\nPHASE ") && outcome.out.contains("\nboot "), "{}", outcome.out);
    assert!(outcome.out.lines().all(|line| line.chars().count() <= 80), "{}", outcome.out);
}

#[test]
fn json_is_a_line_for_each_trace() {
    let outcome = replay(&[HEAD, HEAD, "--cache", "0.05", "--policy", "markov", "--latency-us", "1000", "--json"]);
    assert_eq!((outcome.code, outcome.err.as_str()), (0, ""));
    let lines: Vec<Value> = outcome.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0], lines[1]);
    assert_eq!(lines[0]["policy"], "markov");
    assert_eq!(lines[0]["capacity_pages"], 1469);
    let (share, footprint) = (lines[0]["cache_share"].as_f64().unwrap(), lines[0]["footprint_pages"].as_u64().unwrap());
    assert_eq!(footprint / 20, 1469);
    assert!((share - 1469.0 / footprint as f64).abs() < 1e-9, "{}", lines[0]);
    assert!(lines[0]["read_latency_us"]["p99"].is_f64() && lines[0].get("phases").is_none(), "{}", lines[0]);
}

#[test]
fn wrong_usage_and_bad_traces_say_what_to_do() {
    refused(&[HEAD], 2, "--cache <SIZE>");
    refused(&[HEAD, "--cache", "0"], 2, "`0` is neither a share");
    refused(&[HEAD, "--cache", "5%", "--block", "5K"], 2, "4K, 8K, 16K, 32K or 64K");
    refused(&[HEAD, "--cache", "5%", "--threshold", "2"], 2, "a probability, 0 to 1");
    refused(&[HEAD, HEAD, "--cache", "5%", "--programs", "m"], 2, "replay the traces one by one");
    refused(&[HEAD, "--cache", "5%", "--mbps", "100"], 2, "--latency-us <N>");
    refused(&[HEAD, "--cache", "5%", "--policy", "lstm"], 2, "or --train FILE to train one on");
    refused(&[HEAD, "--cache", "5"], 2, "`5` is less than 256KiB, the smallest cache; a share is written 5%");
    refused(&["/nonexistent.csv", "--cache", "5%"], 1, "/nonexistent.csv: No such file");
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad.csv");
    std::fs::write(&bad, "ts_us,op,offset,len\n1,R,0,4096\n2,R,zero,4096\n").unwrap();
    let bad = bad.to_str().unwrap();
    refused(&[bad, "--cache", "5%"], 1, "bad.csv:3: bad CSV row `2,R,zero,4096`: expected ts_us,op,offset,len");
    let outcome = replay(&[bad, "--cache", "5%", "--skip-bad", "1"]);
    assert!(outcome.code == 0 && outcome.out.ends_with("bad.csv: 1 bad row left out\n"), "{}", outcome.out);
    // What came before the bad trace is told.
    let outcome = replay(&[HEAD, bad, "--cache", "5%"]);
    assert!(outcome.code == 1 && outcome.out.contains("vm_boot1_head.csv.gz"), "{}", outcome.out);
}

/// Whether a process has a handler for a signal.
fn catches(process: u32, signal: nix::sys::signal::Signal) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() >> (signal as u32 - 1) & 1 == 1
}

#[test]
fn ctrl_c_ends_a_replay_in_a_line_that_has_no_end() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bomb.csv.gz");
    // 16 MB of one line, many times over: hours of reading and not one request.
    let mut part = GzEncoder::new(Vec::new(), Compression::best());
    part.write_all(&vec![b'#'; 16 << 20]).unwrap();
    std::fs::write(&file, part.finish().unwrap().repeat(4000)).unwrap();
    let file = file.to_str().unwrap();
    let mut replay = command(Path::new(NO_DAEMON), &["trace", "replay", "--cache", "5%", "--format", "csv", file])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !catches(replay.id(), nix::sys::signal::Signal::SIGINT) {
        assert!(replay.try_wait().unwrap().is_none());
        std::thread::yield_now();
    }
    let process = nix::unistd::Pid::from_raw(i32::try_from(replay.id()).unwrap());
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = replay.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), error.as_str()), (Some(1), "prestagectl: interrupted\n"));
}

#[test]
fn an_lstm_is_trained_on_what_came_before_kept_and_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let (trace, model) = (folder.path().join("loop.csv"), folder.path().join("model"));
    let mut rows = String::from("ts_us,op,offset,len\n");
    // Blocks far apart, always in the same order.
    for n in 0..9000u64 {
        rows += &format!("{},R,{},4096\n", n * 1000, n * 7919 % 3000 * 65536);
    }
    std::fs::write(&trace, rows).unwrap();
    let (trace, model) = (trace.to_str().unwrap(), model.to_str().unwrap());
    let common = [trace, "--cache", "5%", "--policy", "lstm"];
    refused(&[&common[..], &["--model", "/nonexistent"]].concat(), 1, "/nonexistent: No such file");
    refused(&[&common[..], &["--model", trace]].concat(), 1, "not a prestage model");
    refused(&[HEAD, "--cache", "5%", "--policy", "markov", "--model", "m"], 2, "--model is for --policy lstm");
    refused(&[&common[..], &["--train", HEAD]].concat(), 1, "too little to train on");
    let trained = replay(&[&common[..], &["--train", trace, "--save-model", model]].concat());
    assert_eq!((trained.code, trained.err.as_str()), (0, ""));
    // The same model, from its file: the same replay.
    let kept = replay(&[&common[..], &["--train", trace, "--model", model]].concat());
    assert_eq!((kept.code, kept.out), (0, trained.out));
}
