//! Promises of the engine, each kept with io_uring and with the thread pool.

use super::*;
use crate::arena::{Arena, HugePages};
use crate::types::PAGE_BYTES;
use nix::sys::eventfd::{EfdFlags, EventFd};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const MODES: [EngineMode; 2] = [EngineMode::IoUring, EngineMode::ThreadPool];

fn start(mode: EngineMode) -> ShardHandle {
    ShardHandle::start(ShardConfig { name: format!("{mode:?}"), entries: 16, mode, cpu: None }).unwrap()
}

/// Runs a task on a fresh shard of each kind.
fn on_both<T, F, Fut>(f: F) -> Vec<T>
where
    T: Send + 'static,
    F: Fn(Shard) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = T> + 'static,
{
    MODES.map(|mode| start(mode).call(f.clone()).wait().unwrap()).into_iter().collect()
}

fn eventfd() -> Rc<OwnedFd> {
    // Non-blocking, as QEMU makes its kick descriptors.
    let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
    Rc::new(fd.as_fd().try_clone_to_owned().unwrap())
}

fn kick(fd: &OwnedFd) {
    nix::unistd::write(fd, &1u64.to_ne_bytes()).unwrap();
}

async fn until(shard: &Shard, what: &str, mut done: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < limit, "waited too long until {what}");
        shard.sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn the_engine_asked_for_is_the_one_that_runs() {
    assert_eq!(start(EngineMode::IoUring).mode(), EngineKind::IoUring);
    assert_eq!(start(EngineMode::ThreadPool).mode(), EngineKind::ThreadPool);
}

#[derive(Clone, Debug)]
enum FileOp {
    Write { offset: usize, lens: Vec<usize>, seed: u8, dsync: bool },
    Read { offset: usize, lens: Vec<usize> },
    Punch { offset: usize, len: usize },
    Sync,
}

const FILE_BYTES: usize = 64 * 1024;

fn file_op() -> impl Strategy<Value = FileOp> {
    let lens = prop::collection::vec(0usize..5000, 1..5);
    prop_oneof![
        (0..FILE_BYTES, lens.clone(), any::<u8>(), any::<bool>())
            .prop_map(|(offset, lens, seed, dsync)| FileOp::Write { offset, lens, seed, dsync }),
        (0..FILE_BYTES, lens).prop_map(|(offset, lens)| FileOp::Read { offset, lens }),
        (0..FILE_BYTES, 1usize..9000).prop_map(|(offset, len)| FileOp::Punch { offset, len }),
        Just(FileOp::Sync),
    ]
}

/// Runs the operations and returns everything that was read, and the file's content.
async fn run_file_ops(shard: Shard, ops: Vec<FileOp>) -> (Vec<Vec<u8>>, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(FILE_BYTES as u64).unwrap();
    let fd = Rc::new(OwnedFd::from(file.try_clone().unwrap()));
    let mut seen = Vec::new();
    for op in ops {
        match op {
            FileOp::Write { offset, lens, seed, dsync } => {
                let bufs = lens.iter().enumerate().map(|(i, len)| vec![seed.wrapping_add(i as u8); *len].into());
                shard.write_all_at(&fd, bufs.collect(), offset as u64, dsync).await.0.unwrap();
            }
            FileOp::Read { offset, lens } => {
                let bufs = lens.iter().map(|len| AlignedBuf::zeroed(*len).into()).collect();
                let (count, bufs) = shard.read_exact_at(&fd, bufs, offset as u64).await;
                let mut data: Vec<u8> = bufs.iter().flat_map(|b| b.as_slice().to_vec()).collect();
                data.truncate(count.unwrap());
                seen.push(data);
            }
            FileOp::Punch { offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                shard.fallocate(&fd, mode, offset as u64, len as u64).await.unwrap();
            }
            FileOp::Sync => shard.fdatasync(&fd).await.unwrap(),
        }
    }
    let mut content = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    (seen, content)
}

/// The same operations on a vector.
fn model_file_ops(ops: &[FileOp]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut content = vec![0; FILE_BYTES];
    let mut seen = Vec::new();
    for op in ops {
        match op {
            FileOp::Write { offset, lens, seed, .. } => {
                let mut at = *offset;
                for (i, len) in lens.iter().enumerate() {
                    if *len > 0 && content.len() < at + len {
                        content.resize(at + len, 0);
                    }
                    content[at..at + len].fill(seed.wrapping_add(i as u8));
                    at += len;
                }
            }
            FileOp::Read { offset, lens } => {
                let end = (offset + lens.iter().sum::<usize>()).min(content.len());
                seen.push(content[(*offset).min(end)..end].to_vec());
            }
            FileOp::Punch { offset, len } => {
                let end = (offset + len).min(content.len());
                content[(*offset).min(end)..end].fill(0);
            }
            FileOp::Sync => {}
        }
    }
    (seen, content)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn both_engines_do_to_a_file_what_the_model_does(ops in prop::collection::vec(file_op(), 1..40)) {
        let expected = model_file_ops(&ops);
        for mode in MODES {
            let ops = ops.clone();
            let got = start(mode).call(move |shard| run_file_ops(shard, ops)).wait().unwrap();
            prop_assert!(got == expected, "{mode:?} differs from the model");
        }
    }
}

#[test]
fn more_operations_than_the_ring_has_entries_all_complete() {
    on_both(|shard| async move {
        let file = tempfile::tempfile().unwrap();
        let fd = Rc::new(OwnedFd::from(file.try_clone().unwrap()));
        let writes: Vec<_> = (0..500u64)
            .map(|i| shard.spawn(shard.writev(&fd, vec![vec![i as u8; 512].into()], i * 512, false)))
            .collect();
        for write in writes {
            assert_eq!(write.await.unwrap().0.unwrap(), 512);
        }
        let mut content = vec![0; 500 * 512];
        file.read_exact_at(&mut content, 0).unwrap();
        assert!(content.chunks(512).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
        assert_eq!(shard.operations_in_flight(), usize::from(shard.kind() == EngineKind::IoUring));
    });
}

#[test]
fn a_dropped_operation_keeps_its_memory_until_the_kernel_is_done() {
    on_both(|shard| async move {
        let arena = Arena::new(1, HugePages::No).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let fd = Rc::new(OwnedFd::from(ours));
        let before = shard.operations_in_flight();
        let buf = arena.claim(0, 0, 1).unwrap();
        let dropped = shard.timeout(Duration::from_millis(5), shard.recv(&fd, vec![buf.into()], 0..PAGE_BYTES)).await;
        assert!(dropped.is_err());
        assert!(arena.busy(0), "the buffer must not be free before the completion was taken");
        until(&shard, "the operation was cancelled", || !arena.busy(0)).await;
        assert_eq!(shard.operations_in_flight(), before);
        // Nothing of what comes now may go to the cancelled operation.
        theirs.write_all(b"later").unwrap();
        let (result, bufs) = shard.recv_exact(&fd, vec![vec![0; 5].into()], 0..5).await;
        result.unwrap();
        assert_eq!(bufs[0].as_slice(), b"later");
    });
}

#[test]
fn an_operation_that_is_never_polled_does_nothing() {
    on_both(|shard| async move {
        let file = tempfile::tempfile().unwrap();
        let fd = Rc::new(OwnedFd::from(file.try_clone().unwrap()));
        drop(shard.writev(&fd, vec![vec![1; 512].into()], 0, false));
        shard.fdatasync(&fd).await.unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0);
    });
}

#[test]
fn registered_memory_is_read_and_written() {
    let shard = start(EngineMode::IoUring);
    let done = shard.call(|shard| async move {
        let arena = Arena::new(4, HugePages::No).unwrap();
        shard.register_arena(Arc::clone(&arena)).unwrap();
        assert_eq!(shard.register_arena(Arc::clone(&arena)).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let file = tempfile::tempfile().unwrap();
        let fd = Rc::new(OwnedFd::from(file.try_clone().unwrap()));
        for slot in 0..4u8 {
            let mut buf = arena.claim(u32::from(slot), 1, 2).unwrap();
            buf.as_mut_slice().fill(slot + 1);
            shard.write_all_at(&fd, vec![buf.into()], u64::from(slot) * 8192, false).await.0.unwrap();
        }
        for slot in 0..4u8 {
            let buf = arena.claim(u32::from(slot), 7, 2).unwrap();
            let (count, bufs) = shard.read_exact_at(&fd, vec![buf.into()], u64::from(slot) * 8192).await;
            assert_eq!(count.unwrap(), 8192);
            assert!(bufs[0].as_slice().iter().all(|b| *b == slot + 1));
        }
    });
    done.wait().unwrap();
}

/// Transfers that are queued, more of them than the ring has entries, when the kernel is to let go of the memory they name.
#[test]
fn memory_is_let_go_of_while_transfers_into_it_are_queued() {
    let shard = start(EngineMode::IoUring);
    let done = shard.call(|shard| async move {
        let arena = Arena::new(64, HugePages::No).unwrap();
        shard.register_arena(Arc::clone(&arena)).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; PAGE_BYTES], 0).unwrap();
        let fd = Rc::new(OwnedFd::from(file));
        let reads: Vec<_> = (0..50)
            .map(|slot| {
                let (own, fd, page) = (shard.clone(), Rc::clone(&fd), arena.claim(slot, 0, 1).unwrap());
                shard.spawn(async move { own.readv(&fd, vec![page.into()], 0).await })
            })
            .collect();
        // They come first, and each queues its own.
        let own = shard.clone();
        shard.spawn(async move { own.unregister_arena(0) }).await.unwrap().unwrap();
        for read in reads {
            let (read, bufs) = read.await.unwrap();
            assert_eq!(read.unwrap(), PAGE_BYTES);
            assert!(bufs[0].as_slice().iter().all(|byte| *byte == 7));
        }
    });
    done.wait().unwrap();
}

#[test]
fn timers_fire_in_order_of_deadline_then_of_creation() {
    for order in on_both(|shard| async move {
        let order = Rc::new(RefCell::new(Vec::new()));
        let base = Instant::now() + Duration::from_millis(5);
        let tasks: Vec<_> = [(3, 30), (0, 10), (1, 10), (2, 20)]
            .map(|(id, ms)| {
                let (order, sleep) = (Rc::clone(&order), shard.sleep_until(base + Duration::from_millis(ms)));
                shard.spawn(async move {
                    sleep.await;
                    order.borrow_mut().push(id);
                })
            })
            .into();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(Instant::now() >= base + Duration::from_millis(30), "a timer must not fire early");
        order.take()
    }) {
        assert_eq!(order, [0, 1, 2, 3]);
    }
}

#[test]
fn a_shard_answers_other_threads_and_shards() {
    for mode in MODES {
        let (first, second) = (start(mode), start(mode));
        let total = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (first, second, total) = (first.clone(), second.clone(), Arc::clone(&total));
                std::thread::spawn(move || {
                    for i in 0..200usize {
                        // One shard awaits the other: the wake crosses threads both ways.
                        let second = second.clone();
                        let answer = first.call(move |_| async move { second.call(move |_| async move { i }).await });
                        total.fetch_add(answer.wait().unwrap().unwrap(), Ordering::Relaxed);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(total.load(Ordering::Relaxed), 4 * (0..200).sum::<usize>());
    }
}

#[test]
fn kicks_are_seen_and_none_is_lost() {
    on_both(|shard| async move {
        let fd = eventfd();
        kick(&fd);
        let mut watch = shard.watch_eventfd(&fd);
        watch.wait().await.unwrap();
        // Another thread kicks and waits for each kick to be seen, with and without time in between.
        let seen = Arc::new(AtomicUsize::new(0));
        let kicker = {
            let (seen, fd) = (Arc::clone(&seen), fd.try_clone().unwrap());
            std::thread::spawn(move || {
                for i in 1..=2000 {
                    kick(&fd);
                    let limit = Instant::now() + Duration::from_secs(20);
                    while seen.load(Ordering::Acquire) < i {
                        assert!(Instant::now() < limit, "kick {i} was lost");
                        std::thread::yield_now();
                    }
                }
            })
        };
        // Late edges of a kick that was already counted may show up; they must not count as another.
        while seen.load(Ordering::Acquire) < 2000 {
            watch.wait().await.unwrap();
            seen.fetch_add(1, Ordering::AcqRel);
        }
        kicker.join().unwrap();
        let before = shard.operations_in_flight();
        drop(watch);
        until(&shard, "the watch has ended", || shard.operations_in_flight() < before).await;
    });
}

#[test]
fn an_eventfd_is_signalled_and_waited_for() {
    on_both(|shard| async move {
        let fd = eventfd();
        let waiter = shard.spawn(shard.wait_eventfd(&fd));
        shard.sleep(Duration::from_millis(2)).await;
        assert!(!waiter.is_finished());
        shard.notify_eventfd(&fd);
        assert_eq!(waiter.await.unwrap().unwrap(), 1);
        shard.notify_eventfd(&fd);
        shard.notify_eventfd(&fd);
        shard.sleep(Duration::from_millis(2)).await;
        assert_eq!(shard.wait_eventfd(&fd).await.unwrap(), 2);
    });
}

#[test]
fn sockets_connect_send_and_receive() {
    on_both(|shard| async move {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let unix = UnixListener::bind(&path).unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp_address = tcp.local_addr().unwrap();
        fn echo(mut peer: impl Read + Write) {
            let mut byte = [0; 100_000];
            while let Ok(n) = peer.read(&mut byte) {
                if n == 0 || peer.write_all(&byte[..n]).is_err() {
                    return;
                }
            }
        }
        std::thread::spawn(move || echo(unix.accept().unwrap().0));
        std::thread::spawn(move || echo(tcp.accept().unwrap().0));
        for address in [SocketAddress::Unix(path), SocketAddress::Tcp(tcp_address)] {
            let fd = Rc::new(address.socket().unwrap());
            shard.connect(&fd, &address).await.unwrap();
            // More than the socket's buffers hold, in parts.
            let parts: Vec<IoBuf> = (0..40u8).map(|i| vec![i; 30_011].into()).collect();
            let send = shard.spawn(shard.send_all(&fd, parts));
            let into: Vec<IoBuf> = vec![IoBuf::heap(500_000), vec![0; 40 * 30_011 - 500_000].into()];
            let (result, got) = shard.recv_exact(&fd, into, 0..40 * 30_011).await;
            result.unwrap();
            let got: Vec<u8> = got.iter().flat_map(|b| b.as_slice().to_vec()).collect();
            assert!(got.chunks(30_011).enumerate().all(|(i, c)| c.iter().all(|b| *b == i as u8)));
            send.await.unwrap().0.unwrap();
        }
        let nobody = SocketAddress::Unix(folder.path().join("nobody"));
        let fd = Rc::new(nobody.socket().unwrap());
        assert_eq!(shard.connect(&fd, &nobody).await.unwrap_err().kind(), io::ErrorKind::NotFound);
        let long = SocketAddress::Unix("x".repeat(200).into());
        assert!(shard.connect(&fd, &long).await.is_err());
    });
}

#[test]
fn a_peer_that_hangs_up_is_an_error_not_a_signal() {
    on_both(|shard| async move {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fd = Rc::new(OwnedFd::from(ours));
        drop(theirs);
        let (result, _) = shard.send_all(&fd, vec![vec![0; 100].into()]).await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let (result, _) = shard.recv_exact(&fd, vec![vec![0; 100].into()], 0..100).await;
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_panicking_task_takes_nobody_with_it() {
    on_both(|shard| async move {
        let other = shard.spawn({
            let sleep = shard.sleep(Duration::from_millis(10));
            async move {
                sleep.await;
                7
            }
        });
        let failed = shard.spawn(async { panic!("on purpose") });
        assert_eq!(failed.await, Err(JoinError::Panicked));
        assert_eq!(other.await, Ok(7));
        assert_eq!(shard.panicked_tasks(), 1);
    });
}

#[test]
fn an_aborted_task_drops_what_it_owns_at_once() {
    on_both(|shard| async move {
        let owned = Rc::new(());
        let task = shard.spawn({
            let owned = Rc::clone(&owned);
            async move {
                std::future::pending::<()>().await;
                drop(owned);
            }
        });
        shard.yield_now().await;
        assert_eq!(Rc::strong_count(&owned), 2);
        task.abort();
        assert_eq!(Rc::strong_count(&owned), 1);
        assert_eq!(task.await, Err(JoinError::Aborted));
    });
}

#[test]
fn a_busy_task_does_not_starve_completions_and_timers() {
    on_both(|shard| async move {
        let stop = Rc::new(Cell::new(false));
        let busy: Vec<_> = (0..3 * TASKS_PER_TURN)
            .map(|_| {
                let (shard2, stop) = (shard.clone(), Rc::clone(&stop));
                shard.spawn(async move {
                    while !stop.get() {
                        shard2.yield_now().await;
                    }
                })
            })
            .collect();
        let file = tempfile::tempfile().unwrap();
        let fd = Rc::new(OwnedFd::from(file));
        for _ in 0..20 {
            shard.sleep(Duration::from_millis(1)).await;
            shard.write_all_at(&fd, vec![vec![1; 512].into()], 0, false).await.0.unwrap();
        }
        stop.set(true);
        for task in busy {
            task.await.unwrap();
        }
    });
}

#[test]
fn stopping_a_shard_drops_its_tasks_and_brings_all_memory_back() {
    struct Flag(Arc<AtomicBool>);
    impl Drop for Flag {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    for mode in MODES {
        let arena = Arena::new(2, HugePages::No).unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let dropped = Arc::new(AtomicBool::new(false));
        let shard = start(mode);
        let (flag, buf) = (Flag(Arc::clone(&dropped)), arena.claim(0, 0, 16).unwrap());
        shard.spawn(move |shard| async move {
            let _flag = flag;
            let fd = Rc::new(OwnedFd::from(ours));
            let _watch = shard.watch_eventfd(&eventfd());
            drop(shard.recv(&fd, vec![buf.into()], 0..65536).await);
        });
        // The task has reached its receive.
        while shard.call(|shard| async move { shard.operations_in_flight() }).wait().unwrap() < 2 {}
        assert!(arena.busy(0));
        shard.shutdown();
        assert!(dropped.load(Ordering::SeqCst) && !arena.busy(0));
        assert_eq!(shard.call(|_| async { 1 }).wait(), Err(ShardGone));
        shard.shutdown();
    }
}

#[test]
fn a_call_whose_task_panics_says_so() {
    for mode in MODES {
        let shard = start(mode);
        let call: Call<()> = shard.call(|_| async { panic!("on purpose") });
        assert_eq!(call.wait(), Err(ShardGone));
        assert_eq!(shard.call(|_| async { 1 }).wait(), Ok(1), "the shard itself goes on");
    }
}

#[test]
fn blocking_code_runs_off_the_shard() {
    on_both(|shard| async move {
        let (sender, receiver) = std::sync::mpsc::channel();
        let blocked = shard.spawn(shard.blocking(move || receiver.recv().unwrap()));
        // Would never be sent if the shard itself were blocked.
        shard.sleep(Duration::from_millis(1)).await;
        sender.send(5).unwrap();
        assert_eq!(blocked.await.unwrap().unwrap(), 5);
        assert!(shard.blocking(|| panic!("on purpose")).await.is_err());
    });
}

#[test]
fn permits_are_handed_on_in_order() {
    on_both(|shard| async move {
        let semaphore = Semaphore::new(1);
        let order = Rc::new(RefCell::new(Vec::new()));
        let first = semaphore.acquire().await;
        let tasks: Vec<_> = (0..5)
            .map(|i| {
                let (acquire, order) = (semaphore.acquire(), Rc::clone(&order));
                shard.spawn(async move {
                    let _permit = acquire.await;
                    order.borrow_mut().push(i);
                })
            })
            .collect();
        shard.yield_now().await;
        tasks[2].abort();
        drop(first);
        for task in tasks {
            let _ = task.await;
        }
        assert_eq!(*order.borrow(), [0, 1, 3, 4]);
        assert_eq!(semaphore.available(), 1);
    });
}
