//! NBD exports as stores, against real servers: nbdkit with its filters, and qemu-nbd.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod nbd_common;

use nbd_common::{MODES, Random, compare_with_model, hammer, on, open, read, write};
use prestage_cache::backend::{Backend, Extent, NbdOptions, StoreError, StoreOptions};
use prestage_cache::engine::{AlignedBuf, EngineMode, IoBuf, Shard};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// A server process with a unix socket; killed when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// nbdkit with these arguments, listening at `folder/s`.
    fn nbdkit(folder: &Path, args: &[&str]) -> Server {
        let socket = folder.join("s");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("nbdkit");
        // The pid file appears when the server listens; the socket is there a moment before.
        command.args(["--foreground", "--unix"]).arg(&socket).arg("--pidfile").arg(folder.join("pid")).args(args);
        Server::start(command, socket, &folder.join("pid"), "nbdkit")
    }

    fn qemu_nbd(folder: &Path, args: &[&str]) -> Server {
        let socket = folder.join("s");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--socket"]).arg(&socket).arg("--pid-file").arg(folder.join("pid")).args(args);
        Server::start(command, socket, &folder.join("pid"), "qemu-nbd")
    }

    fn start(mut command: Command, socket: PathBuf, ready: &Path, name: &str) -> Server {
        let _ = std::fs::remove_file(ready);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{name} does not start ({error}): run scripts/setup.sh"));
        let limit = Instant::now() + Duration::from_secs(30);
        while !ready.exists() {
            assert!(child.try_wait().unwrap().is_none(), "{name} ended at once: {command:?}");
            assert!(Instant::now() < limit, "{name} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Server { child, socket }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn folder() -> tempfile::TempDir {
    // Short: a socket's path has at most 107 bytes.
    tempfile::tempdir().unwrap()
}

fn impatient() -> StoreOptions {
    let nbd = NbdOptions { retry_for: Duration::from_millis(300), ..NbdOptions::default() };
    StoreOptions { nbd, ..StoreOptions::default() }
}

/// Starts nbdkit and runs a task with an open store.
fn with_nbdkit<T, F, Fut>(mode: EngineMode, args: &[&str], f: F) -> T
where
    T: Send + 'static,
    F: FnOnce(Shard, Rc<dyn Backend>) -> Fut + Send + 'static,
    Fut: Future<Output = T> + 'static,
{
    let folder = folder();
    let server = Server::nbdkit(folder.path(), args);
    let uri = server.uri();
    on(mode, move |shard| async move {
        let store = open(&shard, &uri, &StoreOptions::default()).await.unwrap();
        f(shard, store).await
    })
}

#[test]
fn an_export_does_what_the_model_does() {
    let servers: [&[&str]; 6] = [
        &["memory", "1M"],
        &["--no-sr", "memory", "1M"],
        &["--filter=fua", "memory", "1M"],
        &["--filter=nozero", "memory", "1M"],
        &["--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "1M",
            "blocksize-minimum=512",
            "blocksize-maximum=4096",
            "blocksize-error-policy=error",
        ],
    ];
    for (i, args) in servers.into_iter().enumerate() {
        for mode in MODES {
            with_nbdkit(mode, args, move |_, store| async move {
                compare_with_model(&store, 100 + i as u64, 300, false).await;
                store.close().await;
                assert!(matches!(read(&store, 0, 512).await, Err(StoreError::Closed { .. })));
            });
        }
    }
}

#[test]
fn an_export_with_large_blocks_takes_requests_of_any_sector() {
    let args = [
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    ];
    for mode in MODES {
        with_nbdkit(mode, &args, |shard, store| async move {
            let info = store.info();
            assert_eq!((info.min_io_bytes, info.max_io_bytes), (4096, 65536));
            compare_with_model(&store, 7, 300, false).await;
            // Sectors of the same block written at the same time.
            let writers: Vec<_> = (0..64u64)
                .map(|i| {
                    let store = Rc::clone(&store);
                    shard.spawn(async move { write(&store, i * 512, &[i as u8 + 1; 512], false).await.unwrap() })
                })
                .collect();
            for writer in writers {
                writer.await.unwrap();
            }
            let got = read(&store, 0, 64 * 512).await.unwrap();
            assert!(got.chunks(512).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8 + 1)));
        });
    }
}

#[test]
fn many_requests_in_flight_over_several_connections_keep_apart() {
    // Delays of random length, so that replies come in any order.
    let args = ["--filter=delay", "--threads=8", "memory", "4M", "delay-read=1ms", "delay-write=2ms"];
    for mode in MODES {
        with_nbdkit(mode, &args, |shard, store| async move { hammer(&shard, &store, 9, 32, 30).await });
    }
}

#[test]
fn requests_larger_than_a_server_takes_are_split() {
    with_nbdkit(EngineMode::Auto, &["memory", "80M"], |_, store| async move {
        let mut random = Random(77);
        let pattern = random.bytes(1 << 20);
        let data: Vec<IoBuf> = (0..70)
            .map(|i| {
                let mut part = AlignedBuf::copy_of(&pattern);
                part[0] = i;
                part.into()
            })
            .collect();
        let (result, _) = store.write(512, data, true).await;
        result.unwrap();
        let got = read(&store, 512, 70 << 20).await.unwrap();
        for (i, part) in got.chunks(1 << 20).enumerate() {
            assert!(part[0] == i as u8 && part[1..] == pattern[1..], "MiB {i} differs");
        }
        store.write_zeroes(1 << 20, 60 << 20, false).await.unwrap();
        assert!(read(&store, 1 << 20, 60 << 20).await.unwrap().iter().all(|b| *b == 0));
    });
}

#[test]
fn an_export_of_whole_sectors_reads_as_whole_pages() {
    let folder = folder();
    let server = Server::nbdkit(folder.path(), &["pattern", "size=13312"]);
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let options = StoreOptions { read_only: true, ..StoreOptions::default() };
        let store = open(&shard, &uri, &options).await.unwrap();
        // The pattern plugin's content is each 8 bytes' own offset.
        let got = read(&store, 12288, 4096).await.unwrap();
        assert_eq!(got[..8], 12288u64.to_be_bytes());
        assert_eq!(got[1016..1024], 13304u64.to_be_bytes());
        assert!(got[1024..].iter().all(|b| *b == 0));
        assert!(matches!(read(&store, 16384, 512).await, Err(StoreError::OutOfRange { .. })));
    });
}

#[test]
fn a_servers_holes_are_known() {
    const MIB: u64 = 1 << 20;
    let folder = folder();
    let path = folder.path().join("disk");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(8 * MIB).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; MIB as usize], 2 * MIB).unwrap();
    let image = path.to_str().unwrap();
    let all = [Extent { len_bytes: 2 * MIB, hole: true, zero: true }, Extent::data(MIB)];
    let tail = Extent { len_bytes: 5 * MIB, hole: true, zero: true };
    for start in [
        |folder: &Path, image: &str| Server::nbdkit(folder, &["file", image]),
        |folder: &Path, image: &str| Server::qemu_nbd(folder, &["--format=raw", image]),
    ] {
        let server = start(folder.path(), image);
        let uri = server.uri();
        on(EngineMode::Auto, move |shard| async move {
            let store = open(&shard, &uri, &StoreOptions::default()).await.unwrap();
            assert_eq!(store.extents(0, 8 * MIB, 9).await.unwrap(), [&all[..], &[tail]].concat());
            assert_eq!(store.extents(0, 8 * MIB, 2).await.unwrap(), all);
            assert_eq!(store.extents(2 * MIB + 1, MIB, 1).await.unwrap(), [Extent::data(MIB - 1)]);
            assert_eq!(store.extents(2 * MIB + 1, 3, 9).await.unwrap(), [Extent::data(3)]);
        });
    }
    // One that does not tell.
    for args in [["--no-sr", "file", image], ["--filter=noextents", "file", image]] {
        with_nbdkit(EngineMode::Auto, &args, |_, store| async move {
            assert_eq!(store.extents(0, 8 * MIB, 9).await.unwrap(), [Extent::data(8 * MIB)]);
        });
    }
}

#[test]
fn a_servers_errors_are_told_apart_and_pass() {
    for structured in [true, false] {
        let folder = folder();
        let trigger = folder.path().join("trigger");
        let file = format!("error-file={}", trigger.display());
        let sr = if structured { "--exit-with-parent" } else { "--no-sr" };
        let args =
            [sr, "--filter=error", "memory", "1M", "error-pread=EIO", "error-pwrite=ENOSPC", "error-rate=100%", &file];
        let server = Server::nbdkit(folder.path(), &args);
        let uri = server.uri();
        on(EngineMode::Auto, move |shard| async move {
            let store = open(&shard, &uri, &StoreOptions::default()).await.unwrap();
            write(&store, 0, &[5; 4096], false).await.unwrap();
            std::fs::write(&trigger, "").unwrap();
            let error = read(&store, 0, 4096).await.unwrap_err();
            assert!(matches!(error, StoreError::Io { errno: libc::EIO, what: "read", .. }), "{error}");
            let error = write(&store, 0, &[6; 4096], false).await.unwrap_err();
            assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
            std::fs::remove_file(&trigger).unwrap();
            assert_eq!(read(&store, 0, 4096).await.unwrap(), [5; 4096]);
        });
    }
}

#[test]
fn a_server_that_dies_and_comes_back_costs_time_and_nothing_else() {
    for (mode, conns) in MODES.into_iter().zip(["allow", "disable"]) {
        let folder = folder();
        let disk = folder.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
        let disk = disk.to_str().unwrap().to_owned();
        let conns = if conns == "allow" { "multi-conn-mode=unsafe" } else { "multi-conn-mode=disable" };
        let args = ["--filter=multi-conn", "--filter=delay", "file", &disk, conns, "delay-write=1ms", "delay-read=1ms"];
        let mut server = Server::nbdkit(folder.path(), &args);
        let uri = server.uri();
        let shard = nbd_common::start(mode);
        let mut work = shard.call(move |shard| async move {
            let store = open(&shard, &uri, &StoreOptions::default()).await.unwrap();
            hammer(&shard, &store, 31, 16, 150).await;
            store.close().await;
        });
        let mut deaths = 0;
        while work.wait_timeout(Duration::from_millis(80)).expect("the work must succeed").is_none() {
            server.kill();
            if deaths % 2 == 0 {
                std::thread::sleep(Duration::from_millis(60));
            }
            server = Server::nbdkit(folder.path(), &args);
            deaths += 1;
            assert!(deaths < 400, "the work never ends");
        }
        assert!(deaths > 1, "the server was to be killed under load");
    }
}

#[test]
fn a_server_that_stays_away_fails_requests_after_the_agreed_time() {
    for mode in MODES {
        let folder = folder();
        let mut server = Server::nbdkit(folder.path(), &["memory", "1M"]);
        let uri = server.uri();
        let (ready, wait) = std::sync::mpsc::channel();
        let (killed, go) = std::sync::mpsc::channel();
        let shard = nbd_common::start(mode);
        let work = shard.call(move |shard| async move {
            let store = open(&shard, &uri, &impatient()).await.unwrap();
            write(&store, 0, &[1; 512], true).await.unwrap();
            ready.send(()).unwrap();
            shard.blocking(move || go.recv().unwrap()).await.unwrap();
            let begun = Instant::now();
            let requests: Vec<_> = (0..8u64)
                .map(|i| {
                    let store = Rc::clone(&store);
                    shard.spawn(async move { read(&store, i * 4096, 4096).await })
                })
                .collect();
            for request in requests {
                let error = request.await.unwrap().unwrap_err();
                assert!(matches!(error, StoreError::Disconnected { .. }) && error.is_transient(), "{error}");
            }
            assert!(begun.elapsed() >= Duration::from_millis(300), "given up too early");
            store.close().await;
        });
        wait.recv().unwrap();
        server.kill();
        killed.send(()).unwrap();
        work.wait().unwrap();
    }
}

#[test]
fn an_export_that_comes_back_smaller_is_refused_and_a_larger_one_is_taken() {
    let folder = folder();
    let mut server = Server::nbdkit(folder.path(), &["memory", "2M"]);
    let (uri, path) = (server.uri(), folder.path().to_owned());
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &StoreOptions::default()).await.unwrap();
        assert_eq!(store.refresh_size().await.unwrap(), 2 << 20);
        server.kill();
        let mut server = Server::nbdkit(&path, &["memory", "1M"]);
        let error = read(&store, 0, 4096).await.unwrap_err();
        assert!(matches!(error, StoreError::Shrunk { was_bytes: 0x20_0000, now_bytes: 0x10_0000, .. }), "{error}");
        assert!(matches!(store.refresh_size().await, Err(StoreError::Shrunk { .. })));
        server.kill();
        let _server = Server::nbdkit(&path, &["memory", "4M"]);
        let limit = Instant::now() + Duration::from_secs(30);
        while let Err(error) = read(&store, 0, 4096).await {
            assert!(matches!(error, StoreError::Shrunk { .. }) && Instant::now() < limit, "{error}");
            shard.sleep(Duration::from_millis(20)).await;
        }
        assert!(matches!(read(&store, 2 << 20, 4096).await, Err(StoreError::OutOfRange { .. })));
        assert_eq!(store.refresh_size().await.unwrap(), 4 << 20);
        read(&store, 2 << 20, 4096).await.unwrap();
        store.close().await;
    });
}

#[test]
fn an_export_that_was_more_for_a_while_may_become_what_it_was() {
    let blocks = ["--filter=blocksize-policy", "memory", "2M", "blocksize-minimum=4096"];
    let cases: [(&[&str], &[&str], bool); 3] = [
        (&["memory", "2M"], &["memory", "4M"], false),
        (&["--readonly", "memory", "2M"], &["memory", "2M"], true),
        (&blocks, &["memory", "2M"], false),
    ];
    for (usual, more, read_only) in cases {
        let folder = folder();
        let path = folder.path().to_owned();
        let start = move |args: &[&str]| Server::nbdkit(&path, args);
        let (usual, more) = (usual.iter(), more.iter());
        let [usual, more] = [usual, more].map(|args| args.map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
        on(EngineMode::Auto, move |shard| async move {
            let start = |args: &[String]| start(&args.iter().map(String::as_str).collect::<Vec<_>>());
            let mut server = start(&usual);
            let options = StoreOptions { read_only, ..StoreOptions::default() };
            let store = open(&shard, &server.uri(), &options).await.unwrap();
            let told = store.info().size_bytes;
            for args in [&more, &usual, &more, &usual] {
                server.kill();
                server = start(args);
                read(&store, 0, 4096).await.unwrap_or_else(|error| panic!("{args:?}: {error}"));
                assert_eq!(store.info().size_bytes, told, "nobody asked for a new size");
                assert!(matches!(read(&store, told, 4096).await, Err(StoreError::OutOfRange { .. })));
            }
            store.close().await;
        });
    }
}

#[test]
fn an_export_that_was_asked_for_its_size_is_held_to_it() {
    let folder = folder();
    let path = folder.path().to_owned();
    on(EngineMode::Auto, move |shard| async move {
        let mut server = Server::nbdkit(&path, &["memory", "2M"]);
        let store = open(&shard, &server.uri(), &StoreOptions::default()).await.unwrap();
        read(&store, 0, 4096).await.unwrap();
        server.kill();
        let mut server = Server::nbdkit(&path, &["memory", "4M"]);
        assert_eq!(store.refresh_size().await.unwrap(), 4 << 20);
        server.kill();
        let _server = Server::nbdkit(&path, &["memory", "2M"]);
        let error = read(&store, 0, 4096).await.unwrap_err();
        assert!(matches!(error, StoreError::Shrunk { was_bytes: 0x40_0000, now_bytes: 0x20_0000, .. }), "{error}");
    });
}

#[test]
fn a_read_only_export_can_only_be_read() {
    let folder = folder();
    let server = Server::nbdkit(folder.path(), &["--readonly", "memory", "1M"]);
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let error = open(&shard, &uri, &StoreOptions::default()).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, StoreError::ReadOnly { .. }), "{error}");
        let store = open(&shard, &uri, &StoreOptions { read_only: true, ..StoreOptions::default() }).await.unwrap();
        read(&store, 0, 4096).await.unwrap();
        assert!(matches!(write(&store, 0, &[1; 512], false).await, Err(StoreError::ReadOnly { .. })));
        store.flush().await.unwrap();
    });
}

#[test]
fn nobody_listening_is_an_error_at_once() {
    let folder = folder();
    let missing = format!("nbd+unix:///?socket={}/none", folder.path().display());
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for mode in MODES {
        for uri in [missing.clone(), format!("nbd://127.0.0.1:{port}/"), "nbd://host.invalid/".to_owned()] {
            let error = on(mode, move |shard| async move {
                open(&shard, &uri, &StoreOptions::default()).await.map(|_| ()).unwrap_err()
            });
            assert!(matches!(error, StoreError::Disconnected { .. }), "{error}");
        }
    }
}

#[test]
fn tcp_works_as_well() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    drop(listener);
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--ipaddr", "127.0.0.1", "--port", &port, "memory", "1M"]);
    let folder = folder();
    let pidfile = folder.path().join("pid");
    command.arg("--pidfile").arg(&pidfile);
    let _server = Server::start(command, PathBuf::new(), &pidfile, "nbdkit");
    for mode in MODES {
        let uri = format!("nbd://localhost:{port}/");
        on(mode, move |shard| async move {
            let store = open(&shard, &uri, &StoreOptions::default()).await.unwrap();
            store.write_zeroes(0, 1 << 20, true).await.unwrap();
            compare_with_model(&store, 3, 100, false).await;
            store.close().await;
        });
    }
}

#[test]
fn holes_of_a_sparse_image_read_as_zeroes() {
    let folder = folder();
    let disk = folder.path().join("sparse");
    let file = std::fs::File::create(&disk).unwrap();
    file.set_len(4 << 20).unwrap();
    for at in [0u64, 1 << 20, (3 << 20) + 65536] {
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 65536], at).unwrap();
    }
    let disk = disk.to_str().unwrap();
    let server = Server::qemu_nbd(folder.path(), &["--format=raw", "--export-name=sparse", disk]);
    let socket = server.socket.display().to_string();
    on(EngineMode::Auto, move |shard| async move {
        let wrong = format!("nbd+unix:///other?socket={socket}");
        let error = open(&shard, &wrong, &StoreOptions::default()).await.map(|_| ()).unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
        let right = format!("nbd:unix:{socket}:exportname=sparse");
        let store = open(&shard, &right, &StoreOptions::default()).await.unwrap();
        let (result, bufs) = store.read(0, vec![vec![0xee; 4 << 20].into()]).await;
        result.unwrap();
        let expected = |i: usize| {
            let data = [0, 1 << 20, (3 << 20) + 65536].iter().any(|at| (*at..*at + 65536).contains(&i));
            if data { 7 } else { 0 }
        };
        assert!(bufs[0].as_slice().iter().enumerate().all(|(i, b)| *b == expected(i)));
        // qemu-nbd lets one client in at a time: negotiating anew must not need a second connection.
        assert_eq!(store.refresh_size().await.unwrap(), 4 << 20);
        store.close().await;
    });
}
