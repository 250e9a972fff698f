//! A disk in memory and a [`QueueRunner`] for it: a thread for each ring, which completes requests in a scrambled order.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use prestage_integration::export::{
    DiskConfig, Export, ExportOptions, Queue, QueueRunner, QueueStopped, Request, RequestKind, Status,
};
use tempfile::TempDir;

/// Longer than anything here takes on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// What has happened to an export's rings.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) connected: usize,
    pub(crate) disconnected: usize,
    pub(crate) running: Vec<u16>,
    pub(crate) started: usize,
    pub(crate) resumed: usize,
    pub(crate) broken: usize,
    pub(crate) memory_changes: usize,
}

#[derive(Debug)]
pub(crate) struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    /// Requests popped and not answered.
    pub(crate) held: AtomicUsize,
    /// Keep requests instead of answering them.
    pub(crate) hold: AtomicBool,
    seen: Mutex<Seen>,
    changed: Condvar,
}

impl MemoryDisk {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            hold: AtomicBool::new(false),
            seen: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    pub(crate) fn resize(&self, len: usize) {
        self.bytes.lock().unwrap().resize(len, 0);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    fn see(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until the rings' state is as asked.
    pub(crate) fn wait_for(&self, what: impl Fn(&Seen) -> bool) {
        let seen = self.seen.lock().unwrap();
        let (seen, timeout) = self.changed.wait_timeout_while(seen, LIMIT, |seen| !what(seen)).unwrap();
        assert!(!timeout.timed_out(), "not reached within {LIMIT:?}: {seen:?}");
    }

    /// Waits until so many requests are held back.
    pub(crate) fn wait_for_held(&self, count: usize) {
        self.wait_for(|_| self.held.load(Ordering::SeqCst) == count);
    }

    fn run(&self, request: &Request) -> Status {
        let mut bytes = self.bytes.lock().unwrap();
        match request.kind() {
            RequestKind::Read { offset_bytes, len_bytes } => {
                self.reads.fetch_add(1, Ordering::Relaxed);
                let (mut at, mut done, len) = (*offset_bytes as usize, 0_u64, u64::from(*len_bytes));
                assert_eq!(request.data_len(), len);
                // In pieces that fit no segment's edges.
                while done < len {
                    let piece = (len - done).min(3000) as usize;
                    request.copy_to_guest(done, &bytes[at..at + piece]).unwrap();
                    (at, done) = (at + piece, done + piece as u64);
                }
            }
            RequestKind::Write { offset_bytes, len_bytes } => {
                self.writes.fetch_add(1, Ordering::Relaxed);
                let at = *offset_bytes as usize;
                request.copy_from_guest(0, &mut bytes[at..at + *len_bytes as usize]).unwrap();
            }
            RequestKind::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
            }
            RequestKind::Discard { ranges } | RequestKind::WriteZeroes { ranges, .. } => {
                for range in ranges {
                    let at = range.offset_bytes as usize;
                    bytes[at..at + range.len_bytes as usize].fill(0);
                }
            }
        }
        Status::Ok
    }
}

#[derive(Debug)]
struct RingThread {
    stop: Arc<(AtomicBool, EventFd)>,
    thread: JoinHandle<QueueStopped>,
}

#[derive(Debug)]
pub(crate) struct Runner {
    disk: Arc<MemoryDisk>,
    rings: Mutex<HashMap<u16, RingThread>>,
}

impl QueueRunner for Runner {
    fn connected(&self) {
        self.disk.see(|seen| seen.connected += 1);
    }

    fn disconnected(&self) {
        assert!(self.rings.lock().unwrap().is_empty(), "rings are stopped before the front-end is gone");
        self.disk.see(|seen| seen.disconnected += 1);
    }

    fn start(&self, queue: Queue) {
        let (index, resumed) = (queue.index(), queue.resumed());
        let stop = Arc::new((AtomicBool::new(false), EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()));
        let (disk, stopped) = (Arc::clone(&self.disk), Arc::clone(&stop));
        let thread = std::thread::spawn(move || run_ring(queue, &disk, &stopped));
        let before = self.rings.lock().unwrap().insert(index, RingThread { stop, thread });
        assert!(before.is_none(), "a ring is started once");
        self.disk.see(|seen| {
            seen.started += 1;
            seen.resumed += usize::from(resumed);
            seen.running.push(index);
            seen.running.sort_unstable();
        });
    }

    fn stop(&self, index: u16) -> QueueStopped {
        let ring = self.rings.lock().unwrap().remove(&index).expect("only started rings are stopped");
        ring.stop.0.store(true, Ordering::SeqCst);
        ring.stop.1.write(1).unwrap();
        let stopped = ring.thread.join().unwrap();
        self.disk.see(|seen| seen.running.retain(|ring| *ring != index));
        stopped
    }

    fn memory_changed(&self) {
        self.disk.see(|seen| seen.memory_changes += 1);
    }
}

fn run_ring(mut queue: Queue, disk: &MemoryDisk, stop: &(AtomicBool, EventFd)) -> QueueStopped {
    let mut pending: Vec<Request> = Vec::new();
    let mut scramble = 12345_u32;
    let mut broken = false;
    loop {
        queue.clear_kick();
        let _ = stop.1.read();
        if stop.0.load(Ordering::SeqCst) {
            break;
        }
        while !broken {
            queue.disable_notification();
            loop {
                match queue.pop() {
                    Ok(Some(request)) => pending.push(request),
                    Ok(None) => break,
                    Err(_) => {
                        broken = true;
                        disk.see(|seen| seen.broken += 1);
                        break;
                    }
                }
            }
            if disk.hold.load(Ordering::SeqCst) {
                disk.held.store(pending.len(), Ordering::SeqCst);
                disk.see(|_| {});
            } else {
                finish(&mut queue, &mut pending, disk, &mut scramble);
            }
            queue.signal();
            if !queue.enable_notification() {
                break;
            }
        }
        let mut fds = vec![PollFd::new(stop.1.as_fd(), PollFlags::POLLIN)];
        if !broken {
            fds.push(PollFd::new(queue.kick_fd(), PollFlags::POLLIN));
        }
        poll(&mut fds, PollTimeout::NONE).unwrap();
    }
    if disk.hold.load(Ordering::SeqCst) {
        // As an agent that dies.
        drop(pending);
    } else {
        finish(&mut queue, &mut pending, disk, &mut scramble);
        queue.signal();
        assert_eq!(queue.in_flight(), 0);
    }
    queue.stop()
}

fn finish(queue: &mut Queue, pending: &mut Vec<Request>, disk: &MemoryDisk, scramble: &mut u32) {
    while !pending.is_empty() {
        *scramble = scramble.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let request = pending.swap_remove((*scramble >> 8) as usize % pending.len());
        let status = disk.run(&request);
        queue.complete(request, status);
    }
}

/// An export of a disk in memory, with its socket in a directory of its own.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) disk: Arc<MemoryDisk>,
    pub(crate) export: Option<Export>,
    pub(crate) directory: TempDir,
}

impl Served {
    pub(crate) fn new(config: DiskConfig, bytes: Vec<u8>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::new(bytes);
        let export = export_at(&directory.path().join("disk.sock"), config, &disk);
        Self { disk, export: Some(export), directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("disk.sock")
    }

    pub(crate) fn export(&self) -> &Export {
        self.export.as_ref().unwrap()
    }
}

pub(crate) fn export_at(path: &Path, config: DiskConfig, disk: &Arc<MemoryDisk>) -> Export {
    Export::start(path, config, runner(disk), &ExportOptions::default()).unwrap()
}

pub(crate) fn runner(disk: &Arc<MemoryDisk>) -> Arc<dyn QueueRunner> {
    Arc::new(Runner { disk: Arc::clone(disk), rings: Mutex::default() })
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at / 512) * 31 + at % 251) as u8).collect()
}
