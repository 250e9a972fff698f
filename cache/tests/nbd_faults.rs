//! NBD servers that lie, stop in the middle, or answer in an odd but allowed way.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed assumption of a test is a failed test")]

mod nbd_common;

use nbd_common::wire::{
    DATA, ERROR, FLAG_FLUSH, FLAG_FUA, FLAG_MULTI, Got, NONE, chunk, export, handshake, option_reply, simple, take,
};
use nbd_common::{MODES, on, open, read, write};
use prestage_cache::backend::{NbdOptions, StoreError, StoreOptions};
use prestage_cache::engine::EngineMode;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
/// What to do about a request.
enum Answer {
    Send(Vec<u8>),
    SendAndHangUp(Vec<u8>),
    Nothing,
}

type Script = dyn Fn(usize, &Got) -> Answer + Send + Sync;

/// A server in this process; `script` gets the number of the connection, from 0, and the request.
struct Server {
    socket: String,
    connections: Arc<AtomicUsize>,
    seen: Arc<Mutex<Vec<Got>>>,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(flags: u16, script: impl Fn(usize, &Got) -> Answer + Send + Sync + 'static) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let (connections, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
        let script: Arc<Script> = Arc::new(script);
        {
            let (connections, seen) = (Arc::clone(&connections), Arc::clone(&seen));
            // Ends with the process: the listener's thread waits for connections that no longer come.
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let (seen, script) = (Arc::clone(&seen), Arc::clone(&script));
                    let number = connections.fetch_add(1, Ordering::SeqCst);
                    std::thread::spawn(move || drop(serve(stream.unwrap(), flags, number, &seen, &*script)));
                }
            });
        }
        Server { socket: socket.display().to_string(), connections, seen, _folder: folder }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket)
    }

    /// Everything that was asked for, once the client has said goodbye.
    fn seen_to_the_end(&self) -> Vec<Got> {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let seen = self.seen.lock().unwrap().clone();
            if seen.last().is_some_and(|got| got.command == 2) {
                return seen;
            }
            assert!(Instant::now() < limit, "a client that closes says goodbye");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn serve(mut stream: UnixStream, flags: u16, number: usize, seen: &Mutex<Vec<Got>>, script: &Script) -> io::Result<()> {
    handshake(&mut stream, SIZE, flags)?;
    loop {
        let got = Got::take(&mut stream)?;
        seen.lock().unwrap().push(got.clone());
        if got.command == 2 {
            return Ok(());
        }
        match script(number, &got) {
            Answer::Send(bytes) => stream.write_all(&bytes)?,
            Answer::Nothing => {}
            Answer::SendAndHangUp(bytes) => {
                stream.write_all(&bytes)?;
                return Ok(());
            }
        }
    }
}

fn options(retry_ms: u64, timeout_ms: u64) -> StoreOptions {
    let nbd = NbdOptions {
        retry_for: Duration::from_millis(retry_ms),
        request_timeout: Duration::from_millis(timeout_ms),
        ..NbdOptions::default()
    };
    StoreOptions { nbd, ..StoreOptions::default() }
}

fn expected(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|at| (at / 512) as u8).collect()
}

type Lie = fn(&Got) -> Answer;

/// Answers to a read of 8192 bytes that no server may give.
const LIES: [(&str, Lie); 18] = [
    ("neither magic", |_| Answer::Send(vec![0x55; 64])),
    ("half a header, then the end", |got| Answer::SendAndHangUp(got.honest()[..11].to_vec())),
    ("half the data, then the end", |got| Answer::SendAndHangUp(got.honest()[..4000].to_vec())),
    ("the end", |_| Answer::SendAndHangUp(Vec::new())),
    ("an unknown cookie", |got| Answer::Send(chunk(got.cookie ^ 99, true, NONE, 0, &[]))),
    ("the same reply twice", |got| {
        let Got { cookie, .. } = *got;
        Answer::Send([chunk(cookie, true, ERROR, 6, &[0, 0, 0, 22, 0, 0]), chunk(cookie, true, NONE, 0, &[])].concat())
    }),
    ("a chunk of 4 GiB", |got| Answer::Send(chunk(got.cookie, true, DATA, u32::MAX, &got.offset.to_be_bytes()))),
    ("a data chunk without data", |got| Answer::Send(got.chunk(true, DATA, &got.offset.to_be_bytes()))),
    ("data before what was asked for", |got| {
        Answer::Send(got.chunk(true, DATA, &[(got.offset - 512).to_be_bytes().as_slice(), &[1; 8192]].concat()))
    }),
    ("data beyond what was asked for", |got| {
        Answer::Send(got.chunk(true, DATA, &[got.offset.to_be_bytes().as_slice(), &[1; 8193]].concat()))
    }),
    ("data at the end of the number range", |got| {
        Answer::Send(got.chunk(true, DATA, &[u64::MAX.to_be_bytes().as_slice(), &[1; 512]].concat()))
    }),
    ("the same bytes twice", |got| Answer::Send([got.data(false, 0, 4096), got.data(true, 512, 8192)].concat())),
    ("bytes missing", |got| Answer::Send([got.data(false, 0, 4096), got.data(true, 4097, 8192)].concat())),
    ("nothing at all", |got| Answer::Send(got.chunk(true, NONE, &[]))),
    ("a hole of 4 GiB", |got| Answer::Send(got.hole(true, got.offset, u32::MAX))),
    ("a hole of no length", |got| Answer::Send(got.hole(true, got.offset, 0))),
    ("an error with a message longer than itself", |got| {
        Answer::Send(got.chunk(true, ERROR, &[0, 0, 0, 5, 0xff, 0xff, b'x']))
    }),
    ("a simple reply", |got| Answer::Send(simple(got.cookie, 0, &got.content()))),
];

#[test]
fn a_lie_costs_the_connection_and_the_request_is_made_again() {
    for (what, lie) in LIES {
        for mode in MODES {
            let server = Server::start(0, move |number, got| match number {
                0 => lie(got),
                _ => Answer::Send(got.honest()),
            });
            let uri = server.uri();
            on(mode, move |shard| async move {
                let store = open(&shard, &uri, &options(20_000, 20_000)).await.unwrap();
                let asked = store.read(8192, vec![vec![0xee; 8192].into()]).await;
                if what == "the same reply twice" {
                    // The first of the two was a valid answer; the second must only cost the connection.
                    assert!(matches!(asked.0, Err(StoreError::Io { errno: libc::EINVAL, .. })), "{:?}", asked.0);
                } else {
                    assert!(asked.0.is_ok(), "{what}: {:?}", asked.0);
                    assert!(asked.1[0].as_slice() == expected(8192, 8192), "{what}: wrong data");
                }
                assert_eq!(read(&store, 0, 4096).await.unwrap(), expected(0, 4096), "{what}");
                store.close().await;
            });
            assert_eq!(server.connections.load(Ordering::SeqCst), 2, "{what}: the connection was to be dropped");
        }
    }
}

#[test]
fn a_server_that_always_lies_fails_the_request_in_the_end() {
    for (what, lie) in LIES.into_iter().filter(|(what, _)| *what != "the same reply twice") {
        let server = Server::start(0, move |_, got| lie(got));
        let uri = server.uri();
        on(EngineMode::Auto, move |shard| async move {
            let store = open(&shard, &uri, &options(150, 20_000)).await.unwrap();
            let error = read(&store, 8192, 8192).await.unwrap_err();
            assert!(matches!(error, StoreError::Disconnected { .. }), "{what}: {error}");
            store.close().await;
        });
        let connections = server.connections.load(Ordering::SeqCst);
        assert!((2..40).contains(&connections), "{what}: {connections} connections, so it does not pause in between");
    }
}

#[test]
fn odd_but_allowed_answers_are_understood() {
    let answers: [(&str, Lie); 4] = [
        ("pieces in reverse order", |got| {
            let pieces: Vec<Vec<u8>> = (0..64).rev().map(|i| got.data(i == 0, i * 128, (i + 1) * 128)).collect();
            Answer::Send(pieces.concat())
        }),
        ("a last chunk without data", |got| {
            Answer::Send([got.data(false, 0, 8192), got.chunk(true, NONE, &[])].concat())
        }),
        ("an error that is not in the list", |got| Answer::Send(got.error(9999))),
        ("an error after data", |got| Answer::Send([got.data(false, 0, 512), got.error(5)].concat())),
    ];
    for (i, (what, answer)) in answers.into_iter().enumerate() {
        for mode in MODES {
            let server = Server::start(0, move |_, got| answer(got));
            let uri = server.uri();
            on(mode, move |shard| async move {
                let store = open(&shard, &uri, &options(1000, 20_000)).await.unwrap();
                let outcome = read(&store, 8192, 8192).await;
                match i {
                    0 | 1 => assert!(outcome.unwrap() == expected(8192, 8192), "{what}"),
                    2 => assert!(matches!(outcome, Err(StoreError::Io { errno: libc::EINVAL, .. })), "{what}"),
                    _ => assert!(matches!(outcome, Err(StoreError::Io { errno: libc::EIO, .. })), "{what}"),
                }
                store.close().await;
            });
            assert_eq!(server.connections.load(Ordering::SeqCst), 1, "{what}: no reason to drop the connection");
        }
    }
}

#[test]
fn replies_are_matched_in_any_order() {
    // Holds requests back until eight are there, then answers the last first.
    let held = Mutex::new(Vec::<Got>::new());
    let server = Server::start(0, move |_, got| {
        let mut held = held.lock().unwrap();
        held.push(got.clone());
        if held.len() < 8 {
            return Answer::Nothing;
        }
        Answer::Send(held.drain(..).rev().flat_map(|got| got.honest()).collect())
    });
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(20_000, 20_000)).await.unwrap();
        let reads: Vec<_> = (0..64u64)
            .map(|i| {
                let store = Rc::clone(&store);
                shard.spawn(async move { read(&store, i * 8192, 4096 + 512 * (i as usize % 9)).await })
            })
            .collect();
        for (i, task) in reads.into_iter().enumerate() {
            assert!(task.await.unwrap().unwrap() == expected(i as u64 * 8192, 4096 + 512 * (i % 9)));
        }
        store.close().await;
    });
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
}

#[test]
fn a_request_without_an_answer_is_sent_on_another_connection() {
    for mode in MODES {
        let server = Server::start(FLAG_MULTI, |number, got| match number {
            0 => Answer::Nothing,
            _ => Answer::Send(got.honest()),
        });
        let uri = server.uri();
        on(mode, move |shard| async move {
            let store = open(&shard, &uri, &options(20_000, 100)).await.unwrap();
            for i in 0..32u64 {
                assert_eq!(read(&store, i * 4096, 4096).await.unwrap(), expected(i * 4096, 4096));
            }
            store.close().await;
        });
        assert!(server.connections.load(Ordering::SeqCst) >= 4, "four connections were to be made");
    }
}

#[test]
fn a_server_that_shuts_down_gets_its_requests_again_on_the_next_connection() {
    let server = Server::start(0, |number, got| match number {
        0 => Answer::Send(got.error(108)),
        _ => Answer::Send(got.honest()),
    });
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(20_000, 20_000)).await.unwrap();
        assert_eq!(read(&store, 0, 4096).await.unwrap(), expected(0, 4096));
        write(&store, 0, &[3; 4096], false).await.unwrap();
        store.close().await;
    });
}

/// A machine that starts finds its store connected, whatever became of the server while the machine was off.
#[test]
fn a_lost_connection_is_made_again_before_anybody_asks() {
    let server = Server::start(0, |number, got| match number {
        0 => Answer::SendAndHangUp(got.honest()),
        _ => Answer::Send(got.honest()),
    });
    let (uri, connections) = (server.uri(), Arc::clone(&server.connections));
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(20_000, 20_000)).await.unwrap();
        assert_eq!(read(&store, 0, 4096).await.unwrap(), expected(0, 4096));
        let limit = Instant::now() + Duration::from_secs(30);
        while connections.load(Ordering::SeqCst) < 2 {
            assert!(Instant::now() < limit, "the connection was to be made again");
            shard.blocking(|| std::thread::sleep(Duration::from_millis(1))).await.unwrap();
        }
        assert_eq!(read(&store, 4096, 4096).await.unwrap(), expected(4096, 4096));
        store.close().await;
    });
    assert_eq!(server.connections.load(Ordering::SeqCst), 2, "the read found the connection that was there");
}

#[test]
fn a_write_that_was_lost_is_sent_again_with_the_same_data() {
    let server = Server::start(FLAG_FUA | FLAG_FLUSH, |number, got| match number {
        0 => Answer::SendAndHangUp(Vec::new()),
        _ => Answer::Send(got.honest()),
    });
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(20_000, 20_000)).await.unwrap();
        let data: Vec<u8> = (0..200 * 1024).map(|i| (i / 7) as u8).collect();
        write(&store, 512, &data, true).await.unwrap();
        store.close().await;
    });
    let seen = server.seen_to_the_end();
    let writes: Vec<&Got> = seen.iter().filter(|got| got.command == 1).collect();
    assert_eq!(writes.len(), 2);
    assert!(writes.iter().all(|got| got.offset == 512 && got.flags == 1 && got.len == 200 * 1024));
    assert!(writes[0].payload == writes[1].payload);
}

#[test]
fn a_flush_follows_a_write_with_fua_where_the_server_has_none_and_goes_before_a_close() {
    let server = Server::start(FLAG_FLUSH, |_, got| Answer::Send(got.honest()));
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(1000, 20_000)).await.unwrap();
        write(&store, 0, &[1; 512], true).await.unwrap();
        write(&store, 512, &[1; 512], false).await.unwrap();
        store.close().await;
    });
    let commands: Vec<(u16, u16)> = server.seen_to_the_end().iter().map(|got| (got.command, got.flags)).collect();
    assert_eq!(commands, [(1, 0), (3, 0), (1, 0), (3, 0), (2, 0)]);
}

#[test]
fn dropped_requests_leave_the_connection_in_order() {
    for mode in MODES {
        let held = Mutex::new(Vec::<Got>::new());
        let server = Server::start(0, move |_, got| {
            let mut held = held.lock().unwrap();
            held.push(got.clone());
            // The first is answered only together with the second, after its reader has gone.
            if held.len() == 1 {
                return Answer::Nothing;
            }
            Answer::Send(held.drain(..).flat_map(|got| got.honest()).collect())
        });
        let uri = server.uri();
        on(mode, move |shard| async move {
            let store = open(&shard, &uri, &options(20_000, 20_000)).await.unwrap();
            let gone = shard.timeout(Duration::from_millis(30), store.read(0, vec![vec![0; 65536].into()])).await;
            assert!(gone.is_err());
            assert_eq!(read(&store, 4096, 4096).await.unwrap(), expected(4096, 4096));
            store.close().await;
        });
        assert_eq!(server.connections.load(Ordering::SeqCst), 1);
    }
}

/// Listens once and lets `talk` negotiate.
fn negotiate(folder: &Path, talk: impl FnOnce(&mut UnixStream) -> io::Result<()> + Send + 'static) -> StoreError {
    let socket = folder.join("s");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // The client may hang up at any point.
        let _ = talk(&mut stream);
    });
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let error = on(EngineMode::Auto, move |shard| async move {
        open(&shard, &uri, &StoreOptions::default()).await.map(|_| ()).unwrap_err()
    });
    server.join().unwrap();
    error
}

/// Greets, takes the client's flags and refuses structured replies; then the choice of export has been read.
fn until_go(stream: &mut UnixStream) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    take::<4>(stream)?;
    take::<16>(stream)?;
    stream.write_all(&option_reply(8, 0x8000_0001, b""))?;
    // Magic, option, length, then a name of no bytes and one kind of information.
    take::<24>(stream)?;
    Ok(())
}

#[test]
fn negotiations_that_go_wrong_end_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let go = |reply: Vec<Vec<u8>>| {
        negotiate(folder, move |stream| {
            until_go(stream)?;
            stream.write_all(&reply.concat())?;
            // Waits for the client to have read it.
            let _ = stream.read(&mut [0]);
            Ok(())
        })
    };
    let protocol = |error: StoreError, part: &str| match &error {
        StoreError::Protocol { what, .. } => assert!(what.contains(part), "{error}"),
        _ => panic!("{error}"),
    };
    protocol(negotiate(folder, |stream| stream.write_all(b"HTTP/1.1 400 Bad Request\r\n")), "greeting");
    protocol(negotiate(folder, |stream| stream.write_all(b"NBDMAGICIHAVEONE\0\x03")), "greeting");
    let old = negotiate(folder, |stream| {
        stream.write_all(&[b"NBDMAGIC".as_slice(), &0x0000_4202_8186_1253u64.to_be_bytes()].concat())
    });
    assert!(matches!(&old, StoreError::Unsupported { what, .. } if what.contains("old style")), "{old}");
    let cut = negotiate(folder, |stream| stream.write_all(b"NBDMAG"));
    assert!(matches!(cut, StoreError::Disconnected { .. }), "{cut}");
    let not_fixed = negotiate(folder, |stream| stream.write_all(b"NBDMAGICIHAVEOPT\0\0"));
    assert!(matches!(not_fixed, StoreError::Unsupported { .. }), "{not_fixed}");

    let size = |size| go(vec![option_reply(7, 3, &export(size, 1)), option_reply(7, 1, &[])]);
    assert!(matches!(size(0), StoreError::BadSize { .. }));
    assert!(matches!(size(1000), StoreError::BadSize { size_bytes: 1000, .. }));
    assert!(matches!(size(!511), StoreError::BadSize { .. }));
    protocol(go(vec![option_reply(7, 1, &[])]), "without a size");
    protocol(go(vec![option_reply(7, 3, &[0]), option_reply(7, 1, &[])]), "without a size");
    protocol(go(vec![option_reply(6, 1, &[])]), "option 6");
    protocol(go(vec![option_reply(7, 77, &[])]), "type 77");
    protocol(go(vec![vec![9; 40]]), "begins with");
    let mut giant = option_reply(7, 3, &[]);
    giant[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    protocol(go(vec![giant]), "4294967295 bytes");
    protocol(go(vec![option_reply(7, 3, &[0, 1]); 100]), "endless");
    for blocks in [[3u32, 4096, 65536], [0, 1, 1], [1 << 17, 1 << 17, 1 << 20], [4096, 4096, 512]] {
        let blocks: Vec<u8> = [0, 3].into_iter().chain(blocks.into_iter().flat_map(u32::to_be_bytes)).collect();
        protocol(
            go(vec![option_reply(7, 3, &export(SIZE, 1)), option_reply(7, 3, &blocks), option_reply(7, 1, &[])]),
            "block sizes",
        );
    }
    let refused = |kind: u32| go(vec![option_reply(7, 1 << 31 | kind, b"because")]);
    assert!(matches!(refused(6), StoreError::NotFound { .. }));
    assert!(matches!(refused(2), StoreError::Denied { .. }));
    assert!(matches!(refused(5), StoreError::Unsupported { .. }));
    assert!(refused(7).to_string().contains("because"));
}

#[test]
fn a_server_without_the_go_option_is_used_in_the_old_way() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || -> io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        until_go(&mut stream)?;
        stream.write_all(&option_reply(7, 0x8000_0001, b""))?;
        take::<16>(&mut stream)?;
        // Size and flags without the zeroes, which both sides have agreed to leave out.
        stream.write_all(&[SIZE.to_be_bytes().as_slice(), &1u16.to_be_bytes()].concat())?;
        let head: [u8; 28] = take(&mut stream)?;
        stream.write_all(&simple(u64::from_be_bytes(head[8..16].try_into().unwrap()), 0, &[4; 512]))?;
        take::<28>(&mut stream)?;
        Ok(())
    });
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(1000, 20_000)).await.unwrap();
        assert_eq!(read(&store, 0, 512).await.unwrap(), [4; 512]);
        store.close().await;
    });
    server.join().unwrap().unwrap();
}

#[test]
fn closing_does_not_wait_for_a_server_that_hangs() {
    let server = Server::start(0, |_, _| Answer::Nothing);
    let uri = server.uri();
    on(EngineMode::Auto, move |shard| async move {
        let store = open(&shard, &uri, &options(20_000, 60_000)).await.unwrap();
        let gone = shard.timeout(Duration::from_millis(20), store.read(0, vec![vec![0; 512].into()])).await;
        assert!(gone.is_err());
        let begun = Instant::now();
        store.close().await;
        assert!(begun.elapsed() < Duration::from_secs(30), "closing hangs with the server");
    });
}
