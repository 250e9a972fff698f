//! prestagectl as an operator meets it: the real program against the real API, answered by fixtures.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod demand;
mod fake;
mod fake_demand;
mod fake_models;
mod machines;
mod models;
mod replay;
mod tools;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use fake::Daemon;

struct Outcome {
    code: i32,
    out: String,
    err: String,
}

fn command(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_prestagectl"));
    command.env_remove("PRESTAGE_SOCKET").arg("--socket").arg(socket).args(arguments);
    command
}

fn run(socket: &Path, arguments: &[&str]) -> Outcome {
    let output = command(socket, arguments).output().unwrap();
    Outcome {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Succeeds with exactly this text and nothing on standard error.
#[track_caller]
fn prints(daemon: &Daemon, arguments: &[&str], expected: &str) {
    let outcome = run(&daemon.socket, arguments);
    assert_eq!((outcome.code, outcome.err.as_str()), (0, ""), "{arguments:?}");
    assert_eq!(outcome.out, expected, "\n{}", outcome.out);
}

/// Fails with this code, this text on standard error and nothing on standard output.
#[track_caller]
fn fails(socket: &Path, arguments: &[&str], code: i32, expected: &str) {
    let outcome = run(socket, arguments);
    assert_eq!((outcome.code, outcome.out.as_str()), (code, ""), "{arguments:?}: {}", outcome.err);
    assert!(outcome.err.contains(expected), "{arguments:?}: {}", outcome.err);
}

#[test]
fn status_says_what_needs_attention() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["status"],
        "\
prestaged:  9.9.9 on hv1, pid 4711
up:         1 h 2 min
health:     DEGRADED
sandbox:    user, capabilities, system calls; NOT files: not confined: this kernel has no Landlock (Linux 5.13)
engine:     io_uring, 1 shard
cache:      RAM 1.0 GiB of 2.0 GiB, SSD 3.0 GiB of 16 GiB
hits:       75.0 % of 1000 reads (65.0 % RAM, 10.0 % SSD)
recovered:  49152 blocks on the SSD after a crash; dropped: 1024 being written to, 3 overtaken
disks:      2 in all, 1 connected, 1 degraded
libvirt:    qemu:///system, NOT CONNECTED: libvirtd does not answer; see `systemctl status libvirtd`
learner:    ok, 12345 accesses since start, 0 dropped, 1 profile, 2.0 MiB
prefetch:   on
memory:     ok, 1 of 2 machines watched, 256 MiB brought in, 200 MiB of that used
database:   ok, 3.0 MiB at /var/lib/prestage/prestage.db
db writes:  0 waiting, 0 lost

needs attention:
  disk old: store shrunk;\\u{1b}[31m restore its size

for the time being:
  ram tier: drained by an operator
",
    );
}

#[test]
fn disks_are_listed_shown_added_and_removed() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["disk", "list"],
        "\
NAME         SIZE  MODE  CONNECTED      VM        READS  STORE                   STATE
old       1.0 GiB  ro    no             -             0  /srv/old.raw            DEGRADED: shrunk from 2 GiB to 1 GiB; restore its size
web1-vda   20 GiB  rw    yes, 4 queues  web1:vda   2000  nbd://store:10809/web1  ok
",
    );
    prints(
        &daemon,
        &["disk", "show", "web1-vda"],
        "\
name:         web1-vda
store:        nbd://store:10809/web1
storage:      nbd:tcp:store:10809:web1
store state:  ok
size:         20 GiB
mode:         read-write
socket:       /run/prestage/vm/web1-vda.sock
vm:           web1:vda
connected:    yes, 4 queues

reads:              2000, 64 MiB, mean wait 0.50 ms
from RAM:           1900 (95.0 %)
from SSD:           40 (2.0 %)
waited for store:   60 (3.0 %)
read errors:        0
writes:             10, 40 KiB
flushes, discards:  3, 1
store reads:        300, 70 MiB
store writes:       10, 40 KiB
prefetch:           60 MiB issued, 57 MiB used (95.0 % of what arrived), 1.0 MiB evicted unused, 0 B cancelled
prefetch late:      12 reads waited for one
ssd traffic:        2.0 MiB read, 70 MiB written
accesses dropped:   0
",
    );
    prints(
        &daemon,
        &["disk", "add", "db1", "/srv/db1.raw", "--read-only"],
        "disk db1 serves /srv/db1.raw on /run/prestage/vm/db1.sock\n",
    );
    fails(
        &daemon.socket,
        &["disk", "add", "taken", "/srv/x.raw"],
        1,
        "prestagectl: disk `taken` exists already; choose another name\n",
    );
    fails(
        &daemon.socket,
        &["disk", "show", "nosuch"],
        1,
        "prestagectl: there is no disk `nosuch`; see `prestagectl disk list`\n",
    );
    fails(&daemon.socket, &["disk", "remove", "web1-vda"], 1, "is connected; use --force");
    prints(
        &daemon,
        &["disk", "remove", "web1-vda", "--force"],
        "disk web1-vda is no longer served; its data stays where it is\n",
    );
    prints(
        &daemon,
        &["disk", "resize", "web1-vda", "30GiB"],
        "disk web1-vda: 20 GiB -> 30 GiB, and its guest is told\nNote: NBD clients see the size when they connect anew\n",
    );
    prints(&daemon, &["disk", "resize", "web1-vda"], "disk web1-vda has 20 GiB, as its guest was told before\n");
    prints(
        &daemon,
        &["disk", "resize", "web1-vda", "21474836992B"],
        "disk web1-vda: 20GiB -> 21474836992B, and its guest is told\nNote: NBD clients see the size when they connect anew\n",
    );
    let asked = daemon.control.asked.lock().clone();
    assert_eq!(
        asked[0],
        "add DiskAdd { name: \"db1\", store: \"/srv/db1.raw\", read_only: true, socket: None, nbd: false }"
    );
    assert_eq!(asked[2..4], ["remove web1-vda false", "remove web1-vda true"]);
    assert_eq!(asked[4], "resize web1-vda DiskResize { size_bytes: Some(32212254720) }");
}

#[test]
fn the_cache_is_shown_warmed_and_dropped() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["cache", "tiers"],
        "\
TIER     SIZE     USED  USED %  BLOCKS     DATA   UNREAD  HITS  EVICTED
ram   512 MiB  128 MiB    25.0    2048  120 MiB  1.0 MiB  1900        7
ssd    16 GiB      0 B     0.0       0      0 B      0 B     0        0

ram:       ok
ram size:  512 MiB by `cache resize`, 1.0 GiB configured
ssd:       DEGRADED: no space left on /var/cache; free 4 GiB

TIER   CACHED  DISKS     STORAGE
ram   128 MiB  web1-vda  nbd:tcp:store:10809:web1
",
    );
    prints(
        &daemon,
        &["cache", "warm", "web1-vda", "--ranges", "0+64MiB,1GiB+4K"],
        "web1-vda: 3.0 MiB to bring, 1.0 MiB in RAM or on the SSD already\n\
         4.0 KiB did not fit the cache or its queue\n",
    );
    prints(
        &daemon,
        &["cache", "drop", "--tier", "ram", "--disk", "web1-vda"],
        "dropped 128 MiB from RAM, 0 B from SSD\n",
    );
    prints(
        &daemon,
        &["cache", "resize", "--ram", "2GiB", "--ssd", "1GiB"],
        "ram tier: 1.0 GiB -> 2.0 GiB, until the next start; set cache.ram_size = \"2GiB\" to keep it\n\
         ssd tier has 1.0 GiB already, as configured\n",
    );
    prints(
        &daemon,
        &["cache", "drain", "--ram", "--ssd"],
        "ram tier out of service, 1.0 GiB given back\nssd tier out of service; /dev/nvme0n1 is closed\n",
    );
    prints(
        &daemon,
        &["cache", "drain", "--ssd"],
        "ssd tier out of service, and on record as that; /dev/nvme0n1 is NOT closed, since its device does not answer: do not unmount or \
         remove it before `prestagectl cache drain --ssd` says that it is closed\n",
    );
    prints(&daemon, &["cache", "resume", "--ram"], "ram tier in service, 1.0 GiB\n");
    prints(&daemon, &["cache", "resume", "--ssd", "--force"], "ram tier in service, 1.0 GiB\n");
    let asked = daemon.control.asked.lock().clone();
    assert_eq!(asked[5], "resume ServiceRequest { ram: true, ssd: false, force: false }");
    assert_eq!(asked[6], "resume ServiceRequest { ram: false, ssd: true, force: true }");
    assert_eq!(
        asked[2],
        "resize ResizeRequest { ram_bytes: Some(2147483648), ssd_bytes: Some(1073741824), force: false }"
    );
    assert!(asked[0].contains("ByteRange { offset_bytes: 1073741824, length_bytes: 4096 }"), "{}", asked[0]);
    assert_eq!(asked[1], "drop DropRequest { tier: Ram, disk: Some(\"web1-vda\") }");
}

#[test]
fn stat_prints_totals_or_a_line_an_interval() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["cache", "stat"],
        "\
DISK      READS  RAM %  SSD %  STORE %  WAIT MS  LATE  ERRORS
web1-vda   2000   95.0    2.0      3.0     0.50    12       0
total      2000   95.0    2.0      3.0     0.50    12       0

DISK        READ  WRITTEN  FROM STORE  PREFETCHED  PRECISION %
web1-vda  64 MiB   40 KiB      70 MiB      60 MiB         95.0
total     64 MiB   40 KiB      70 MiB      60 MiB         95.0
",
    );
    let outcome = run(&daemon.socket, &["cache", "stat", "0.1", "3", "--disk", "web1-vda"]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let lines: Vec<&str> = outcome.out.lines().collect();
    assert_eq!(
        lines.len(),
        5,
        "a header of two lines, once where the output is no terminal, and three lines:\n{}",
        outcome.out
    );
    assert!(lines[1].trim_start().starts_with("time reads/s  ram"), "{}", lines[1]);
    for line in &lines[2..] {
        let rest = &line[8..];
        assert_eq!(rest, "    2000 95.0  2.0   3.0   0.50   67.1   0.0   62.9   73.4 95.0   12   0");
    }
    fails(&daemon.socket, &["cache", "stat", "--disk", "nosuch"], 1, "there is no disk `nosuch`; there are web1-vda\n");
}

#[test]
fn stat_notices_a_restart_and_ends_when_the_daemon_does() {
    let mut daemon = Daemon::start();
    daemon.control.restart_at.store(2, Ordering::Relaxed);
    let mut child = command(&daemon.socket, &["cache", "stat", "0.1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line == "# prestaged was restarted; counters began again").unwrap();
    // The counters of the new start alone, not less those of the old one.
    assert!(lines.next().unwrap().contains("    2000 95.0 "));
    daemon.stop();
    assert_eq!(child.wait().unwrap().code(), Some(3));
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert!(err.contains("is prestaged running? See `systemctl status prestaged`"), "{err}");
}

#[test]
fn profiles_are_listed_shown_saved_and_removed() {
    let daemon = Daemon::start();
    prints(
        &daemon,
        &["profile", "list"],
        "\
ID  RUNS     SIZE   MEMORY  SAVED  DISKS     STORAGE                   STATE
1      3  120 KiB  2.0 MiB  never  web1-vda  nbd:tcp:store:10809:web1  ok
2      0      0 B      0 B  never  -         file:/srv/old.raw         DEGRADED: is of version 9, this prestaged reads 1; remove it with `prestagectl profile remove 2`
",
    );
    prints(
        &daemon,
        &["profile", "show", "1"],
        "\
id:        1
storage:   nbd:tcp:store:10809:web1
disks:     web1-vda
state:     ok
saved:     never
runs:      3
size:      120 KiB
memory:    2.0 MiB
contexts:  5000

PHASE  RUNS  EXTENTS    BYTES
boot      3      812  150 MiB
",
    );
    prints(&daemon, &["profile", "save"], "saved 1 profile, 120 KiB\n");
    prints(&daemon, &["profile", "remove", "1"], "profile 1 is forgotten\n");
    fails(&daemon.socket, &["profile", "show", "../status"], 1, "there is no profile `../status`");
    assert_eq!(*daemon.control.asked.lock(), ["forget 1"]);
}

#[test]
fn json_is_the_daemons_own_and_failures_too() {
    let daemon = Daemon::start();
    for arguments in [
        &["status"][..],
        &["disk", "list"],
        &["disk", "show", "web1-vda"],
        &["disk", "add", "db1", "/x"],
        &["disk", "remove", "x", "--force"],
        &["disk", "resize", "x", "1TiB"],
        &["vm", "list"],
        &["vm", "attach", "a", "b", "--enable-shared-memory"],
        &["vm", "detach", "a", "b"],
        &["vm", "save-template", "a", "--to", "t"],
        &["vm", "start-from-template", "t", "--name", "b"],
        &["cache", "tiers"],
        &["cache", "stat"],
        &["cache", "warm", "x"],
        &["cache", "drop"],
        &["cache", "resize", "--ssd", "1GiB"],
        &["cache", "drain", "--ram"],
        &["cache", "resume", "--ssd"],
        &["profile", "list"],
        &["profile", "show", "1"],
        &["profile", "remove", "1"],
        &["profile", "save"],
        &["version"],
    ] {
        let outcome = run(&daemon.socket, &[arguments, &["--json"]].concat());
        assert_eq!((outcome.code, outcome.err.as_str()), (0, ""), "{arguments:?}");
        let value: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
        assert!(value.is_object(), "{arguments:?}");
    }
    let outcome = run(&daemon.socket, &["cache", "stat", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert!(value["total"]["served_ram"].as_u64().unwrap() >= 1900);
    assert_eq!(value["disks"]["web1-vda"]["store_state"], "ok");
    assert_eq!(value["disks"]["web1-vda"]["total"], serde_json::Value::Null);

    let outcome = run(&daemon.socket, &["cache", "stat", "0.1", "2", "--json"]);
    let readings: Vec<serde_json::Value> =
        outcome.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(readings.len(), 2);
    assert!(readings[1]["at_us"].as_u64() > readings[0]["at_us"].as_u64());

    let outcome = run(&daemon.socket, &["--json", "disk", "show", "nosuch"]);
    assert_eq!((outcome.code, outcome.out.as_str()), (1, ""));
    let problem: serde_json::Value = serde_json::from_str(&outcome.err).unwrap();
    assert_eq!((problem["code"].as_str(), problem["status"].as_u64()), (Some("not_found"), Some(404)));
    assert_eq!(problem["instance"], "/v1/disks/nosuch");
}

#[test]
fn wrong_usage_is_2_and_says_what_is_right() {
    let nowhere = Path::new("/nonexistent/prestaged.sock");
    for (arguments, expected) in [
        (&[][..], "Usage: prestagectl"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        (&["disk"], "Usage: prestagectl disk"),
        (&["disk", "add", "web1"], "<STORE>"),
        (&["disk", "add", "web1", "rbd:pool/x"], "`rbd:` is not known; write /path/to/disk.img, nbd://"),
        (&["disk", "add", "../web1", "/x"], "is not a disk name: 1 to 64 letters"),
        (&["disk", "list", "extra"], "unexpected argument 'extra'"),
        (&["cache", "stat", "0"], "0.1 to 86400"),
        (&["cache", "stat", "1", "0"], "0 is not in 1.."),
        (&["cache", "warm", "x", "--ranges", "5"], "OFFSET+LENGTH, such as 1GiB+4MiB"),
        (&["history", "near", "x", "0", "0", "--within", "2m"], "it is at most 1m"),
        (&["cache", "warm", "x", "--ranges", "0+0"], "its length is 0"),
        (&["cache", "warm", "x", "--ranges", "0+1", "--profile", "1"], "cannot be used with"),
        (&["cache", "drain"], "--ram|--ssd"),
        (&["cache", "resize"], "--ram <SIZE>|--ssd <SIZE>"),
        (&["cache", "resize", "--ram", "much"], "much"),
        (&["cache", "drop", "--tier", "tape"], "[possible values: ram, ssd, all]"),
        (&["--verbose"], "unexpected argument '--verbose'"),
    ] {
        fails(nowhere, arguments, 2, expected);
    }
    let outcome = run(nowhere, &["--help"]);
    assert_eq!((outcome.code, outcome.err.as_str()), (0, ""));
    assert!(outcome.out.contains("Exit codes: 0 done, 1 failed, 2 wrong usage, 3 prestaged cannot be reached."));
}

#[test]
fn an_absent_daemon_is_3_and_says_which_socket() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("no.sock");
    for arguments in [&["status"][..], &["disk", "list"], &["cache", "stat", "1"], &["profile", "remove", "1"]] {
        let expected = format!(
            "prestagectl: cannot reach prestaged at {}: No such file or directory (os error 2); is prestaged running? ",
            nowhere.display()
        );
        fails(&nowhere, arguments, 3, &expected);
    }
    let outcome = run(&nowhere, &["--json", "status"]);
    let problem: serde_json::Value = serde_json::from_str(&outcome.err).unwrap();
    assert_eq!((outcome.code, problem["code"].as_str()), (3, Some("unreachable")));

    // A socket that a dead daemon left.
    let stale = folder.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    fails(&stale, &["status"], 3, "Connection refused");

    let by_env =
        Command::new(env!("CARGO_BIN_EXE_prestagectl")).env("PRESTAGE_SOCKET", &stale).arg("status").output().unwrap();
    assert_eq!(by_env.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&by_env.stderr).contains("stale.sock"));

    let outcome = run(&nowhere, &["version"]);
    assert_eq!(outcome.code, 0);
    assert!(
        outcome.out.starts_with(&format!("prestagectl {}\nprestaged unknown: cannot reach", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn another_programs_socket_is_a_failure_not_a_hang() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        for answer in ["220 mail.example ESMTP\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", ""] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    fails(&path, &["status"], 1, "does not answer as prestaged does");
    fails(&path, &["status"], 1, "is it another program's socket");
    fails(&path, &["status"], 3, "it closed the connection");
    server.join().unwrap();
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let daemon = Daemon::start();
    let mut child = command(&daemon.socket, &["cache", "stat", "0.1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let outcome = child.wait_with_output().unwrap();
    assert_eq!((outcome.status.code(), String::from_utf8_lossy(&outcome.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn config_check_needs_no_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("no.sock");
    let file = folder.path().join("prestaged.toml");
    let name = file.to_str().unwrap();
    let reference = run(&nowhere, &["config", "default"]);
    let json = run(&nowhere, &["config", "default", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&json["cache"]["ram_size"], &json["prefetch"]["threshold"]), (&"10%".into(), &0.125.into()));
    assert_eq!(json["cache"].get("ssd_path"), None, "it has no default");
    assert!(json["prefetch"]["enabled"] == true && json.get("disk").is_none(), "{json}");
    for (words, offered) in [(&["config", "default"][..], false), (&["trace", "replay"], false), (&["status"], true)] {
        let help = run(&nowhere, &[words, &["--help"]].concat());
        assert_eq!(help.out.contains("--socket"), offered, "{}", help.out);
        assert!(help.out.contains("--json"), "{}", help.out);
    }
    // Not offered, and still taken after the command.
    assert_eq!(run(&nowhere, &["config", "default", "--socket", "/x"]).code, 0);
    assert_eq!(reference.code, 0);
    std::fs::write(&file, &reference.out).unwrap();
    let outcome = run(&nowhere, &["config", "check", name]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    assert!(outcome.out.contains("sandbox: ") && outcome.out.ends_with(&format!("\n{name}: ok\n")), "{}", outcome.out);

    std::fs::create_dir(folder.path().join("prestaged.toml.d")).unwrap();
    let drop_in = folder.path().join("prestaged.toml.d/10-site.toml");
    std::fs::write(&drop_in, "[cache]\nram_szie = \"1GiB\"\n").unwrap();
    let expected =
        format!("prestagectl: {}:2: unknown key `cache.ram_szie`; did you mean `ram_size`?\n", drop_in.display());
    fails(&nowhere, &["config", "check", name], 1, &expected);
    let outcome = run(&nowhere, &["config", "check", name, "--json"]);
    let value: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert_eq!((outcome.code, value["problems"][0]["line"].as_u64()), (1, Some(2)));
    fails(
        &nowhere,
        &["config", "check", "/nonexistent.toml"],
        1,
        "there is no such file; `prestagectl config default` prints one",
    );
}

#[test]
fn relative_paths_are_below_the_operators_folder() {
    let daemon = Daemon::start();
    let mut command = command(&daemon.socket, &["disk", "add", "a", "x.raw", "--export-socket", "here.sock"]);
    assert!(command.current_dir(daemon.folder()).output().unwrap().status.success());
    for name in ["here.sock", "x.raw"] {
        let expected = daemon.folder().join(name);
        assert!(daemon.control.asked.lock()[0].contains(expected.to_str().unwrap()));
    }
}

#[test]
fn history_is_told_in_tables_of_eighty_columns_and_in_json() {
    let daemon = Daemon::start();
    let narrow = |arguments: &[&str]| {
        let outcome = run(&daemon.socket, arguments);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        assert!(outcome.out.lines().all(|line| line.chars().count() <= 80), "{}", outcome.out);
        outcome.out
    };
    let status = narrow(&["history", "status"]);
    for part in ["1000000 in 20 segments", "bytes an access:  3.21", "7200 accesses (2.0 a second)", "1 segment\n"] {
        assert!(status.contains(part), "{part}: {status}");
    }
    let runs = narrow(&["history", "runs", "web1", "--program", "boot", "--last", "2"]);
    for part in
        ["boot of web1, ", "took 34", "1073741824    8192      2", "there is more: --extents N", "still running"]
    {
        assert!(runs.contains(part), "{part}: {runs}");
    }
    let hot = narrow(&["history", "hot", "web1-vda", "--hours", "3"]);
    for part in ["2023-11-14 23:00          65536     50       50.0", "1099511627776    5+3", "N+M: at least N reads"] {
        assert!(hot.contains(part), "{part}: {hot}");
    }
    let near = narrow(&["history", "near", "web1-vda", "0", "1MiB"]);
    for part in ["A with B within 50ms:", "10 (25.0 % of reads of A)", "all history", "1 read\n"] {
        assert!(near.contains(part), "{part}: {near}");
    }
    assert!(
        narrow(&["history", "near", "web1-vda", "64KiB", "1MiB", "--within", "1s"])
            .contains("only, older reads are too many")
    );
    let asked = daemon.control.asked.lock().clone();
    for (asked, part) in
        asked.iter().zip(["program: Some(\"boot\"), last: 2", "hours: 3, top: 10", "b: 1048576", "within_us: 1000000"])
    {
        assert!(asked.contains(part), "{part}: {asked}");
    }
    let outcome = run(&daemon.socket, &["history", "hot", "web1-vda", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert_eq!(value["hours"][1]["error"], 3);
    fails(&daemon.socket, &["history", "hot", "web1-vda", "--hours", "0"], 2, "0 is not in 1..=8784");
}
