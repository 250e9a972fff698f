//! Disks over NBD: the programs that people use (nbdinfo, nbdcopy, qemu-img, fio), libnbd over every command and edge of the
//! protocol (`nbd/client.py`), TLS, and clients that mean no good.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::paths::{Scratch, source};
use prestage_tests::process::{run, wait_until};
use prestage_tests::store::{Nbd, NbdOptions};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// A daemon with room, and a folder on a file system with holes.
struct Bench {
    daemon: Prestaged,
    scratch: Scratch,
    large: Scratch,
}

impl Bench {
    fn new(more: &str) -> Bench {
        let options = DaemonOptions { more: more.to_owned(), ..DaemonOptions::default() };
        Bench {
            daemon: Prestaged::start(&options).unwrap(),
            scratch: Scratch::new().unwrap(),
            large: Scratch::large().unwrap(),
        }
    }

    /// An empty file.
    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.large.join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// A file of `size` bytes with every eighth MiB full of its own number.
    fn sparse(&self, name: &str, size: u64) -> PathBuf {
        let path = self.file(name, size);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for at in (0..size / MIB).step_by(8) {
            file.write_all_at(&[at as u8 + 1; MIB as usize], at * MIB).unwrap();
        }
        path
    }

    /// Serves a store over NBD; its URI.
    fn serve(&self, name: &str, store: &str, more: &[&str]) -> String {
        let words = [&["disk", "add", name, store, "--nbd"][..], more].concat();
        self.daemon.ctl(&words).unwrap();
        self.nbd(name)["uri"].as_str().unwrap().to_owned()
    }

    fn nbd(&self, name: &str) -> Value {
        self.daemon.ctl(&["disk", "show", name]).unwrap()["nbd"].clone()
    }

    fn clients(&self, name: &str) -> usize {
        self.nbd(name)["clients"].as_array().unwrap().len()
    }
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Debian's own Python: the one that its libnbd belongs to.
fn client(words: &[&str]) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    command.arg(source().join("tests/tests/nbd/client.py")).args(words);
    command
}

fn python(words: &[&str]) -> String {
    let said = run(&mut client(words)).unwrap();
    println!("{said}");
    said
}

fn same(left: &str, right: &str) {
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", left, right])).unwrap();
}

#[test]
fn nbdinfo_is_told_what_a_disk_can_do() {
    let bench = Bench::new("");
    let uri = bench.serve("web.1", name(&bench.sparse("d", 64 * MIB)), &[]);
    let text = run(Command::new("nbdinfo").args(["--json", &uri])).unwrap();
    let info: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!((export["export-name"].as_str(), export["export-size"].as_u64()), (Some("web.1"), Some(64 * MIB)));
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for can in ["can_multi_conn", "can_fua", "can_flush", "can_trim", "can_zero", "can_cache", "can_df"] {
        assert_eq!(export[can], true, "{can} in {export}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(
        (export["block_size_minimum"].as_u64(), export["block_size_maximum"].as_u64()),
        (Some(1), Some(32 * MIB))
    );
    // The default export is the same disk.
    let default = uri.replacen("web.1", "", 1);
    assert_eq!(run(Command::new("nbdinfo").args(["--size", &default])).unwrap().trim(), (64 * MIB).to_string());
    let listed = run(Command::new("nbdinfo").args(["--list", "--json", &uri])).unwrap();
    assert!(listed.contains("\"web.1\""), "{listed}");
    let other = uri.replacen("web.1", "web.2", 1);
    assert!(run(Command::new("nbdinfo").arg(&other)).is_err(), "there is no such export");
    // base:allocation: every eighth MiB is there, whole.
    let map = run(Command::new("nbdinfo").args(["--map", "--json", &uri])).unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let data: u64 = map.iter().filter(|e| e["type"] == 0).map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!(data, 8 * MIB);
    assert_eq!(map.len(), 16);
}

#[test]
fn copies_there_and_back_are_equal_and_keep_their_holes() {
    let bench = Bench::new("");
    let size = 256 * MIB;
    let image = bench.sparse("image", size);
    let from = bench.serve("from", name(&image), &["--read-only"]);
    let copy = bench.large.join("copy");
    run(Command::new("nbdcopy").args([&from, name(&copy)])).unwrap();
    same(name(&image), name(&copy));
    let there = std::fs::metadata(&copy).unwrap().blocks() * 512;
    assert!(there <= 40 * MIB, "32 MiB of data became {there} bytes");

    let target = bench.file("target", size);
    let to = bench.serve("to", name(&target), &[]);
    run(Command::new("nbdcopy").args(["--flush", &from, &to])).unwrap();
    same(&from, &to);
    same(name(&image), name(&target));
    let there = std::fs::metadata(&target).unwrap().blocks() * 512;
    assert!(there <= 40 * MIB, "32 MiB of data became {there} bytes");

    // With everything allocated: zeroes are written over what was there, and no holes are made.
    std::fs::File::options().write(true).open(&target).unwrap().write_all_at(&[9; MIB as usize], MIB).unwrap();
    bench.daemon.ctl(&["cache", "drop", "--tier", "all"]).unwrap();
    run(Command::new("nbdcopy").args(["--allocated", "--flush", &from, &to])).unwrap();
    same(&from, &to);
    let there = std::fs::metadata(&target).unwrap().blocks() * 512;
    assert!(there >= size, "only {there} bytes are allocated");
    let counters = bench.daemon.counters().unwrap();
    assert_eq!(counters.read_errors, 0);
}

#[test]
fn holes_of_a_store_over_nbd_are_passed_on() {
    let mut bench = Bench::new("");
    let image = bench.sparse("image", 64 * MIB);
    let server =
        Nbd::start(&bench.scratch, "s", &image, &NbdOptions { read_delay: Duration::ZERO, keep_writes: true }).unwrap();
    let uri = bench.serve("d", &server.store().spec(), &[]);
    let map = run(Command::new("nbdinfo").args(["--map", "--totals", "--json", &uri])).unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let of = |kind: u64| map.iter().find(|e| e["type"] == kind).map(|e| e["size"].as_u64().unwrap());
    assert_eq!((of(0), of(3)), (Some(8 * MIB), Some(56 * MIB)), "{map:?}");
    let copy = bench.large.join("copy");
    run(Command::new("nbdcopy").args(["--allocated", &uri, name(&copy)])).unwrap();
    same(name(&image), name(&copy));
    bench.daemon.stop().unwrap();
}

/// Loads a range ahead, by the client's word, and reads it: from memory.
fn stage(bench: &Bench, uri: &str) {
    let counters = bench.daemon.counters().unwrap();
    let python = |command: &str| {
        let script = format!("import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); {command}");
        run(Command::new("/usr/bin/python3").args(["-c", &script, uri])).unwrap();
    };
    python("h.cache(4 << 20, 8 << 20)");
    wait_until("4 MiB of prefetch", LIMIT, || {
        let now = bench.daemon.counters()?.since(&counters);
        Ok(now.prefetch_completed_bytes >= 4 * MIB && now.reads == 0)
    })
    .unwrap();
    let counters = bench.daemon.counters().unwrap();
    python("assert h.pread(4 << 20, 8 << 20)[0] == 9");
    let now = bench.daemon.counters().unwrap().since(&counters);
    assert_eq!((now.reads, now.served_ram), (1, 1), "{now:?}");
}

#[test]
fn a_chain_of_qcow2_images_is_a_disk_like_any_other() {
    let bench = Bench::new("");
    let base = bench.sparse("base", 64 * MIB);
    let top = bench.large.join("top.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", name(&base), name(&top), "96M"]);
    run(&mut create).unwrap();
    let uri = bench.serve("d", &format!("qcow2:{}?backing={}", name(&top), name(&base)), &[]);
    let map = run(Command::new("nbdinfo").args(["--map", "--totals", "--json", &uri])).unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let of = |kind: u64| map.iter().find(|e| e["type"] == kind).map(|e| e["size"].as_u64().unwrap());
    assert_eq!((of(0), of(3)), (Some(8 * MIB), Some(88 * MIB)), "{map:?}");
    // What the base has is loaded where all disks on it find it.
    stage(&bench, &uri);

    let copy = bench.large.join("copy");
    run(Command::new("nbdcopy").args([&uri, name(&copy)])).unwrap();
    run(Command::new("qemu-img").args(["compare", "-U", "-f", "raw", "-F", "qcow2", name(&copy), name(&top)])).unwrap();
    python(&["readwrite", &uri]);
    python(&["durable", &uri]);
    verify(&uri, "randrw", "512-128k");
    run(Command::new("nbdcopy").args(["--flush", &uri, name(&copy)])).unwrap();
    wait_until("the end of all clients", LIMIT, || Ok(bench.clients("d") == 0)).unwrap();
    bench.daemon.ctl(&["disk", "remove", "d"]).unwrap();
    run(Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", name(&top)])).unwrap();
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2", name(&copy), name(&top)])).unwrap();
}

/// fio writes at random and finds every block as it wrote it.
fn verify(uri: &str, mode: &str, sizes: &str) {
    let mut fio = Command::new("fio");
    fio.args(["--name=v", "--ioengine=nbd", "--iodepth=32", "--size=64m", "--verify=crc32c", "--verify_fatal=1"]);
    fio.args([&format!("--uri={uri}"), &format!("--rw={mode}"), &format!("--bsrange={sizes}")]);
    fio.args(["--do_verify=1", "--verify_state_save=0", "--randrepeat=1", "--output-format=json"]);
    let said = run(&mut fio).unwrap();
    let report: Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{said}");
    let (read, written) = (job["read"]["io_bytes"].as_u64().unwrap(), job["write"]["io_bytes"].as_u64().unwrap());
    println!("{mode} {sizes}: {read} bytes read, {written} written");
    assert!(written >= 20 * MIB && read >= written, "fio read back what it wrote: {read} of {written}");
}

#[test]
fn fio_finds_every_block_as_it_wrote_it() {
    let bench = Bench::new("");
    let uri = bench.serve("d", name(&bench.file("d", 64 * MIB)), &[]);
    verify(&uri, "randwrite", "4k-4k");
    verify(&uri, "randrw", "512-128k");
}

#[test]
fn every_command_and_every_edge_is_as_the_protocol_says() {
    for engine in ["io_uring", "thread_pool"] {
        let mut bench = Bench::new("");
        if engine == "thread_pool" {
            let config = bench.daemon.config().to_owned();
            let text =
                std::fs::read_to_string(&config).unwrap().replace("[cache]\n", "[cache]\nengine = \"thread_pool\"\n");
            std::fs::write(&config, text).unwrap();
            bench.daemon.stop().unwrap();
            bench.daemon.resume().unwrap();
        }
        let uri = bench.serve("d", name(&bench.file("d", 64 * MIB)), &[]);
        let said = python(&["commands", &uri]);
        for step in ["zero length", "write of 33 MiB: EINVAL", "block status", "256 reads at a time"] {
            assert!(said.contains(step), "no {step} in {said}");
        }
        let socket = bench.nbd("d")["socket"].as_str().unwrap().to_owned();
        let said = python(&["raw", &socket, "d"]);
        for step in ["unknown commands", "half-sent header", "not read from"] {
            assert!(said.contains(step), "no {step} in {said}");
        }
        wait_until("the end of all clients", LIMIT, || Ok(bench.clients("d") == 0)).unwrap();
        let fixed = bench.serve("fixed", name(&bench.file("fixed", 64 * MIB)), &["--read-only"]);
        python(&["readonly", &fixed]);
        bench.daemon.stop().unwrap();
    }
}

#[test]
fn a_client_that_goes_with_64_requests_under_way_leaves_nothing_behind() {
    let mut bench = Bench::new("");
    let image = bench.sparse("image", 64 * MIB);
    let slow = NbdOptions { read_delay: Duration::from_millis(300), keep_writes: true };
    let server = Nbd::start(&bench.scratch, "s", &image, &slow).unwrap();
    let uri = bench.serve("d", &server.store().spec(), &[]);
    for _ in 0..3 {
        assert_eq!(python(&["leave", &uri]).trim(), "64", "all are under way");
        // Pages that nobody has asked for yet.
        bench.daemon.ctl(&["cache", "drop", "--tier", "all"]).unwrap();
    }
    wait_until("the end of all clients", LIMIT, || Ok(bench.clients("d") == 0)).unwrap();
    assert_eq!(python(&["read", &uri]).trim(), "4096", "the first MiB is full of ones");
    assert_eq!(bench.daemon.counters().unwrap().read_errors, 0);
    bench.daemon.stop().unwrap();
}

#[test]
fn a_daemon_stops_whatever_its_clients_do() {
    let mut bench = Bench::new("");
    let uri = bench.serve("d", name(&bench.file("d", 64 * MIB)), &[]);
    let socket = bench.nbd("d")["socket"].as_str().unwrap().to_owned();
    // Silent; after the greeting; in the middle of a write; one that asks and does not read.
    let silent = UnixStream::connect(&socket).unwrap();
    let enter = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        stream
    };
    let header = |kind: u8, len: u32| {
        let mut header = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, kind];
        header.extend_from_slice(&[0; 16]);
        header.extend_from_slice(&len.to_be_bytes());
        header
    };
    let (mut writing, mut greedy) = (enter(), enter());
    writing.write_all(&header(1, 1 << 20)).unwrap();
    for _ in 0..64 {
        greedy.write_all(&header(0, 1 << 20)).unwrap();
    }
    wait_until("three clients", LIMIT, || Ok(bench.clients("d") == 3)).unwrap();
    let listed = bench.nbd("d")["clients"].to_string();
    assert!(listed.contains(&format!("process {} of user", std::process::id())), "{listed}");
    let refused = bench.daemon.ctl(&["disk", "remove", "d"]).unwrap_err().to_string();
    assert!(refused.contains("NBD clients are connected"), "{refused}");
    bench.daemon.stop().unwrap();
    drop((silent, writing, greedy));
    assert!(!Path::new(&socket).exists(), "the socket goes with the daemon");
    bench.daemon.resume().unwrap();
    // the daemon answers before its disks are open
    wait_until("the disk", LIMIT, || Ok(bench.nbd("d").is_object() && Path::new(&socket).exists())).unwrap();
    assert_eq!(bench.nbd("d")["uri"], uri.as_str(), "a disk's export is remembered");
    python(&["read", &uri]);
}

#[test]
fn clients_that_ask_for_all_and_read_nothing_cost_little_and_are_cut_off() {
    const CLIENTS: usize = 8;
    let bench = Bench::new("");
    bench.serve("d", name(&bench.sparse("d", 64 * MIB)), &[]);
    let socket = bench.nbd("d")["socket"].as_str().unwrap().to_owned();
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", bench.daemon.pid().unwrap())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    // What the cache holds of the disk is no cost of the connections.
    run(Command::new("nbdcopy").args([bench.nbd("d")["uri"].as_str().unwrap(), "null:"])).unwrap();
    let before = resident();
    let greedy: Vec<UnixStream> = (0..CLIENTS)
        .map(|_| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
            // Until nothing more is taken; 100 GB at most.
            for at in 0..100_000u64 {
                let mut header = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
                header.extend_from_slice(&at.to_be_bytes());
                header.extend_from_slice(&(at % 64 * MIB).to_be_bytes());
                header.extend_from_slice(&(MIB as u32).to_be_bytes());
                if stream.write_all(&header).is_err() {
                    return stream;
                }
            }
            panic!("100 GB of requests were taken from a client that reads nothing");
        })
        .collect();
    let grown = resident().saturating_sub(before);
    println!("{CLIENTS} clients cost {} MiB", grown / MIB);
    assert!(grown <= CLIENTS as u64 * 40 * MIB, "{grown} bytes for {CLIENTS} clients");
    // They are never read from again; after half a minute they are sent away.
    wait_until("the end of all clients", 2 * LIMIT, || Ok(bench.clients("d") == 0)).unwrap();
    drop(greedy);
    python(&["read", bench.nbd("d")["uri"].as_str().unwrap()]);
}

#[test]
fn a_client_more_than_allowed_is_sent_away_and_the_others_stay() {
    let bench = Bench::new("[nbd]\nmax_clients = 2\n");
    let uri = bench.serve("d", name(&bench.file("d", 64 * MIB)), &[]);
    let hold = || {
        let mut child = client(&["hold", &uri]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), (64 * MIB).to_string());
        child
    };
    let (mut first, mut second) = (hold(), hold());
    assert!(run(Command::new("nbdinfo").args(["--size", &uri])).is_err(), "the third is refused");
    end(&mut first);
    wait_until("room", LIMIT, || Ok(bench.clients("d") == 1)).unwrap();
    run(Command::new("nbdinfo").args(["--size", &uri])).unwrap();
    end(&mut second);
}

fn end(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_grown_disk_is_larger_for_whom_connects_then() {
    let bench = Bench::new("");
    let file = bench.file("d", 64 * MIB);
    let uri = bench.serve("d", name(&file), &[]);
    let mut child = client(&["hold", &uri]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line.trim(), (64 * MIB).to_string());
    std::fs::File::options().write(true).open(&file).unwrap().set_len(96 * MIB).unwrap();
    wait_until("the new size", LIMIT, || {
        Ok(bench.daemon.ctl(&["disk", "show", "d"])?["state"]["capacity_bytes"] == 96 * MIB)
    })
    .unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let rest: Vec<String> = said.lines().map(Result::unwrap).collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
    let grown = (96 * MIB).to_string();
    assert_eq!(rest, ["read behind the size that was told: EINVAL", grown.as_str()]);
}

#[test]
fn a_store_that_is_gone_is_an_error_of_the_request_and_of_nothing_else() {
    let mut bench = Bench::new("[store]\nretry_for = \"1s\"\n");
    let image = bench.sparse("image", 64 * MIB);
    let server =
        Nbd::start(&bench.scratch, "s", &image, &NbdOptions { read_delay: Duration::ZERO, keep_writes: true }).unwrap();
    let uri = bench.serve("d", &server.store().spec(), &[]);
    assert_eq!(python(&["read", &uri]).trim(), "4096");
    drop(server);
    bench.daemon.ctl(&["cache", "drop", "--tier", "all"]).unwrap();
    assert_eq!(python(&["read", &uri]).trim(), "EIO");
    bench.daemon.stop().unwrap();
}

#[test]
fn flush_and_fua_reach_the_store_from_any_connection_and_cache_is_a_prefetch() {
    let mut bench = Bench::new("");
    let image = bench.sparse("image", 64 * MIB);
    let slow = NbdOptions { read_delay: Duration::from_millis(20), keep_writes: true };
    let server = Nbd::start(&bench.scratch, "s", &image, &slow).unwrap();
    let uri = bench.serve("d", &server.store().spec(), &[]);
    let before = server.traffic().unwrap();
    python(&["durable", &uri]);
    let after = server.traffic().unwrap().since(&before);
    assert_eq!((after.writes, after.flushes), (2, 1), "two writes, one flush; FUA goes with its write: {after:?}");
    let requests = std::fs::read_to_string(bench.scratch.join("nbd-s.requests")).unwrap();
    assert!(requests.lines().any(|line| line.contains(" Write ") && line.contains("fua=1")), "{requests}");
    stage(&bench, &uri);
    bench.daemon.stop().unwrap();
}

/// Certificates by openssl: authorities, the server's, and clients'.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    fn new(scratch: &Scratch) -> Certificates {
        let made = Certificates { folder: scratch.join("pki") };
        std::fs::create_dir(&made.folder).unwrap();
        for authority in ["ca", "other"] {
            let (key, certificate) = (made.file(authority, "key"), made.file(authority, "crt"));
            made.openssl(&[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
                "-subj",
                &format!("/CN={authority}"),
                "-keyout",
                &key,
                "-out",
                &certificate,
            ]);
        }
        made.issue("ca", "server");
        made.issue("ca", "friend");
        made.issue("other", "stranger");
        made
    }

    fn file(&self, name: &str, kind: &str) -> String {
        self.folder.join(format!("{name}.{kind}")).display().to_string()
    }

    fn openssl(&self, words: &[&str]) {
        run(Command::new("openssl").args(words)).unwrap();
    }

    fn issue(&self, authority: &str, name: &str) {
        let [key, request, certificate] = ["key", "csr", "crt"].map(|kind| self.file(name, kind));
        let names = self.file(name, "cnf");
        std::fs::write(&names, "subjectAltName=IP:127.0.0.1\n").unwrap();
        self.openssl(&[
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            &format!("/CN={name}"),
            "-keyout",
            &key,
            "-out",
            &request,
        ]);
        self.openssl(&[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &self.file(authority, "crt"),
            "-CAkey",
            &self.file(authority, "key"),
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &names,
            "-out",
            &certificate,
        ]);
    }

    /// A folder as libnbd wants it, for a client that trusts the server's authority.
    fn client(&self, name: Option<&str>) -> String {
        let folder = self.folder.join(format!("as-{}", name.unwrap_or("nobody")));
        std::fs::create_dir(&folder).unwrap();
        std::fs::copy(self.file("ca", "crt"), folder.join("ca-cert.pem")).unwrap();
        if let Some(name) = name {
            std::fs::copy(self.file(name, "crt"), folder.join("client-cert.pem")).unwrap();
            std::fs::copy(self.file(name, "key"), folder.join("client-key.pem")).unwrap();
        }
        folder.display().to_string()
    }
}

#[test]
fn over_tcp_only_clients_with_a_certificate_of_ours_get_in() {
    let scratch = Scratch::new().unwrap();
    let pki = Certificates::new(&scratch);
    let bench = Bench::new(&format!(
        "[nbd]\nlisten = \"127.0.0.1:0\"\ntls_cert = \"{}\"\ntls_key = \"{}\"\ntls_client_ca = \"{}\"\n",
        pki.file("server", "crt"),
        pki.file("server", "key"),
        pki.file("ca", "crt")
    ));
    let image = bench.sparse("image", 64 * MIB);
    let plain = bench.serve("d", name(&image), &[]);
    bench.serve("e", name(&bench.file("e", MIB)), &[]);
    bench.daemon.ctl(&["disk", "add", "private", name(&bench.file("private", MIB))]).unwrap();
    let tcp = bench.nbd("d")["tcp"].as_str().unwrap().to_owned();
    assert!(tcp.starts_with("nbds://127.0.0.1:"), "{tcp}");
    let ours = pki.client(Some("friend"));
    let secure = |uri: &str, folder: &str| format!("{uri}?tls-certificates={folder}");
    let friend = secure(&tcp, &ours);

    let info = run(Command::new("nbdinfo").args(["--json", &friend])).unwrap();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["TLS"], info["exports"][0]["export-size"].as_u64()), (&Value::Bool(true), Some(64 * MIB)));
    let listed = run(Command::new("nbdinfo").args(["--list", "--json", &friend])).unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let names: Vec<_> = listed["exports"].as_array().unwrap().iter().map(|e| e["export-name"].clone()).collect();
    assert_eq!(names, ["d", "e"], "what is not exported is not told of");
    let private = tcp.replacen("/d", "/private", 1);
    assert!(run(Command::new("nbdinfo").arg(secure(&private, &ours))).is_err());

    // Many connections, large requests, holes: what the unix socket gives, TLS gives.
    let copy = bench.large.join("copy");
    run(Command::new("nbdcopy").args([&friend, name(&copy)])).unwrap();
    same(name(&image), name(&copy));
    python(&["durable", &friend]);
    python(&["leave", &friend]);
    let seen = bench.file("s", 64 * MIB);
    let commands = bench.serve("s", name(&seen), &[]);
    assert!(commands.starts_with("nbd+unix"));
    python(&["readwrite", &secure(&tcp.replacen("/d", "/s", 1), &ours)]);

    for (who, uri) in [
        ("no TLS", tcp.replacen("nbds", "nbd", 1)),
        ("no certificate", secure(&tcp, &pki.client(None))),
        ("another authority's certificate", secure(&tcp, &pki.client(Some("stranger")))),
    ] {
        let refused = run(Command::new("nbdinfo").arg(&uri)).unwrap_err().to_string();
        println!("{who}: {refused}");
    }
    // Noise on the port.
    let address = tcp.trim_start_matches("nbds://").trim_end_matches("/d");
    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0not TLS at all, not at all"] {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(words).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut said = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut said);
        assert!(said.starts_with(b"NBDMAGIC"));
    }
    run(Command::new("nbdinfo").args(["--size", &friend])).unwrap();
    run(Command::new("nbdinfo").args(["--size", &plain])).unwrap();
}
