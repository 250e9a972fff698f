//! What the daemon tells of a guest's requests: recordings, history, explanations. The guest is a vhost-user-blk front-end.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use super::Host;
use super::front::{Guest, LIMIT};

mod crash;

/// A recording that has begun: its first line is in the pipe.
fn record(host: &Host, words: &[&str]) -> (Child, std::process::ChildStdout) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prestagectl"));
    command
        .arg("--socket")
        .arg(host.path("run/prestaged.sock"))
        .args(["trace", "record", "d", "--out", "-"])
        .args(words);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut header = [0; 20];
    out.read_exact(&mut header).unwrap();
    assert_eq!(&header, b"ts_us,op,offset,len\n");
    (child, out)
}

fn rest(child: Child, mut out: impl Read) -> (Option<i32>, Vec<String>, String) {
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    let rows = text.lines().map(|row| row.split_once(',').unwrap().1.to_owned()).collect();
    (output.status.code(), rows, String::from_utf8_lossy(&output.stderr).into_owned())
}

fn disk(extra: &str) -> Host {
    let mut host = Host::new();
    let store = host.store("store", 64 << 20);
    host.start(&format!("{extra}\n[[disk]]\nname = \"d\"\nstore = \"{store}\"\n"));
    host
}

#[test]
fn a_recording_is_exact_and_several_run_at_once() {
    let mut host = disk("");
    let (first, first_out) = record(&host, &["--requests", "4"]);
    let (second, second_out) = record(&host, &[]);
    let mut guest = Guest::start(&host, "d");
    guest.read(512, 1024);
    guest.write(8192, 4096, 1);
    guest.read(1 << 20, 65536);
    guest.read(0, 512);
    guest.read(4096, 512);
    let expected = ["R,512,1024", "W,8192,4096", "R,1048576,65536", "R,0,512"];
    let (code, rows, text) = rest(first, first_out);
    assert_eq!((code, rows.as_slice()), (Some(0), expected.map(str::to_owned).as_slice()), "{text}");
    assert!(
        text.contains("4 requests of disk d") && text.contains("0 missing") && text.contains("as many as asked"),
        "{text}"
    );
    // A daemon that stops ends the other one: nothing of it is lost.
    drop(guest);
    host.stop();
    let (code, rows, text) = rest(second, second_out);
    assert_eq!((code, rows.len(), rows[4].as_str()), (Some(0), 5, "R,4096,512"), "{text}");
    assert!(text.contains("no longer served"), "{text}");
}

#[test]
fn an_interrupted_recording_is_a_whole_file() {
    let mut host = disk("");
    let file = host.path("d.csv.gz");
    let mut command = Command::new(env!("CARGO_BIN_EXE_prestagectl"));
    command
        .arg("--socket")
        .arg(host.path("run/prestaged.sock"))
        .args(["trace", "record", "d", "--json", "--out"])
        .arg(&file);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    while !file.exists() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut guest = Guest::start(&host, "d");
    (0..100).for_each(|i| _ = guest.read(i * 8192, 4096));
    // A second recording sees what comes later: the first has what came before.
    let (later, later_out) = record(&host, &["--requests", "1"]);
    guest.read(0, 512);
    assert_eq!(rest(later, later_out).1, ["R,0,512"]);
    kill(nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((answer["missing"].as_u64(), answer["ended"].as_str()), (Some(0), Some("stopped")), "{answer}");
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(&file).unwrap()).read_to_string(&mut text).unwrap();
    let offsets: Vec<u64> = text.lines().skip(1).map(|row| row.split(',').nth(2).unwrap().parse().unwrap()).collect();
    assert_eq!(offsets.len() as u64, answer["requests"].as_u64().unwrap());
    assert!(offsets.len() >= 100 && offsets[..100].iter().copied().eq((0..100).map(|i| i * 8192)), "{text}");
    host.refuses(&["trace", "record", "d", "--out", file.to_str().unwrap()], 1, &["exists", "--out"]);
    host.refuses(&["trace", "record", "e"], 1, &["no disk `e`"]);
    drop(guest);
    host.stop();
}

#[test]
fn a_page_is_explained_from_its_proposal_to_its_use() {
    let mut host = disk("[prefetch]\nthreshold = 0.3\n");
    let mut guest = Guest::start(&host, "d");
    (0..64).for_each(|i| _ = guest.read(i * 16384, 16384));
    let wait_for = |words: &[&str], expect: &str| {
        let deadline = Instant::now() + LIMIT;
        loop {
            let text = host.does(words);
            if text.contains(expect) {
                return text;
            }
            assert!(Instant::now() < deadline, "no {expect:?} in {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let ahead = (64 * 16384).to_string();
    let text = wait_for(&["explain", "d", &ahead], "in RAM, not read yet");
    assert!(text.contains("(sequential, 0."), "{text}");
    assert!(text.contains("in RAM, not read yet") && text.contains("expected now:"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    guest.read(64 * 16384, 16384);
    wait_for(&["explain", "d", &ahead], "read in time");
    let json: serde_json::Value = serde_json::from_str(&host.does(&["--json", "explain", "d", &ahead])).unwrap();
    assert_eq!((json["attempts"][0]["fate"].as_str(), json["place"]["ram"].as_bool()), (Some("used"), Some(true)));
    let text = host.does(&["explain", "d", "48MiB"]);
    assert!(text.contains("not prefetched: no expert expects it to be read"), "{text}");
    host.refuses(&["explain", "d", "64MiB"], 1, &["beyond disk `d`"]);
    host.refuses(&["explain", "d", "ten"], 2, &["ten"]);
    drop(guest);
    host.stop();
}

#[test]
fn what_is_below_the_threshold_is_explained_as_such() {
    let mut host = disk("[prefetch]\nthreshold = 0.99\n");
    let mut guest = Guest::start(&host, "d");
    (0..16).for_each(|i| _ = guest.read(i * 16384, 16384));
    let deadline = Instant::now() + LIMIT;
    loop {
        let text = host.does(&["explain", "d", &(16 * 16384).to_string()]);
        // Where a line ends depends on the words before.
        if text.split_whitespace().collect::<Vec<_>>().join(" ").contains("below the threshold of 0.99") {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(guest);
    host.stop();
}

#[test]
fn the_history_of_a_disk_outlives_the_daemon() {
    let mut host = disk("");
    let mut guest = Guest::start(&host, "d");
    (0..50).for_each(|i| _ = guest.read(i * 8192 + 512, 512));
    drop(guest);
    host.stop();
    let config = std::fs::read_to_string(host.path("prestaged.toml")).unwrap();
    host.start(config.split_once("\n\n").unwrap().1);
    let answer = ask(&host, "/v1/disks/d/history");
    let rows: Vec<&str> = answer.lines().filter(|line| line.contains(",R,")).collect();
    assert_eq!(rows.len(), 50, "{answer}");
    assert!(rows[49].ends_with(",R,401408,4096") && answer.contains("# end: so far the history"), "{answer}");
    let last: u64 = rows[49].split(',').next().unwrap().parse().unwrap();
    let answer = ask(&host, &format!("/v1/disks/d/history?since_us={}", last + 1));
    assert!(!answer.contains(",R,") && answer.contains("# end:"), "{answer}");
    host.stop();
}

/// The body of an answer, chunk sizes and all.
fn ask(host: &Host, path: &str) -> String {
    use std::io::Write;
    let mut stream = std::os::unix::net::UnixStream::connect(host.path("run/prestaged.sock")).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn what_the_ssd_holds_is_listed_and_counts_as_cached() {
    let mut host = Host::new();
    let (store, ssd) = (host.store("store", 64 << 20), host.path("ssd"));
    host.start(&format!(
        "ssd_path = \"{}\"\nssd_size = \"64MiB\"\n[prefetch]\nenabled = false\n[[disk]]\nname = \"d\"\nstore = \"{store}\"\n",
        ssd.display()
    ));
    assert!(host.does(&["status"]).contains("\nhits:       no reads yet\n"));
    let mut guest = Guest::start(&host, "d");
    (0..16).for_each(|i| _ = guest.read(i << 16, 1 << 16));
    let deadline = Instant::now() + LIMIT;
    let line = format!("ssd   1.0 MiB  d      file:{store}\n");
    loop {
        let tiers = host.does(&["cache", "tiers"]);
        if tiers.contains(&line) {
            break;
        }
        assert!(Instant::now() < deadline, "no {line} in {tiers}");
        std::thread::sleep(Duration::from_millis(50));
    }
    host.does(&["cache", "drop", "--tier", "ram"]);
    let warmed = host.does(&["cache", "warm", "d", "--ranges", "512KiB+1MiB"]);
    assert_eq!(warmed, "d: 512 KiB to bring, 512 KiB in RAM or on the SSD already\n");
    guest.read(0, 4096);
    let status = host.does(&["status"]);
    let says = ["cache:      RAM ", " of 16 MiB, SSD 1.", "hits:       5.9 % of 17 reads (0.0 % RAM, 5.9 % SSD)\n"];
    assert!(says.iter().all(|says| status.contains(says)), "{status}");
    drop(guest);
    host.stop();
}
