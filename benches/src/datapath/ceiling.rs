//! What the client itself can do: servers that answer at once and have no data. They run as a process of their own on the
//! servers' processor (`bench datapath --answer-only`), and look for requests all the time.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::Result;
use prestage_integration::export::{DiskConfig, Export, ExportOptions, Queue, QueueRunner, QueueStopped, Status};

use super::nbd;

/// Where the NBD server of [`serve`] listens.
pub(super) fn nbd_socket(vhost: &Path) -> PathBuf {
    vhost.with_extension("nbd")
}

/// Serves a vhost-user-blk socket and an NBD socket until the process is ended.
pub(super) fn serve(vhost: &Path, size_bytes: u64) -> Result<()> {
    let config = DiskConfig { num_queues: 1, read_only: true, ..DiskConfig::new(size_bytes) };
    let _export = Export::start(vhost, config, Arc::new(AnswerOnly::default()), &ExportOptions::default())?;
    let listener = UnixListener::bind(nbd_socket(vhost))?;
    loop {
        // One client after the other; one that goes away has had what it wanted.
        let _ = nbd::answer_only(listener.accept()?.0, size_bytes);
    }
}

#[derive(Default)]
struct AnswerOnly {
    rings: Mutex<Vec<Spinning>>,
}

/// A ring's number, whether it is to end, and its thread.
type Spinning = (u16, Arc<AtomicBool>, JoinHandle<QueueStopped>);

impl QueueRunner for AnswerOnly {
    fn start(&self, queue: Queue) {
        let (index, ended) = (queue.index(), Arc::new(AtomicBool::new(false)));
        let stop = Arc::clone(&ended);
        let thread = std::thread::spawn(move || spin(queue, &stop));
        self.rings.lock().unwrap_or_else(PoisonError::into_inner).push((index, ended, thread));
    }

    fn stop(&self, index: u16) -> QueueStopped {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let at = rings.iter().position(|(ring, _, _)| *ring == index);
        let stopped = at.map(|at| rings.swap_remove(at)).and_then(|(_, ended, thread)| {
            ended.store(true, Ordering::Relaxed);
            thread.join().ok()
        });
        stopped.unwrap_or(QueueStopped { index, next_available: 0 })
    }
}

/// Answers everything until told to stop. Asks for no kicks after the first.
fn spin(mut queue: Queue, stop: &AtomicBool) -> QueueStopped {
    while !stop.load(Ordering::Relaxed) {
        let mut answered = false;
        while let Ok(Some(request)) = queue.pop() {
            queue.complete(request, Status::Ok);
            answered = true;
        }
        if answered {
            queue.signal();
        } else {
            std::hint::spin_loop();
        }
    }
    queue.stop()
}
