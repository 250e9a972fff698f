//! The thread that owns the connection to libvirt.
//!
//! ```text
//!            queue (bounded)                open, calls
//!  handle ──────────────────▶ worker thread ────────────▶ libvirtd
//!     ▲                        │  │   ▲ wake on close        │
//!     │ replies (oneshot)      │  │   └──────────────┐       │ events
//!     └────────────────────────┘  └─ state, resync   event thread ◀──┘
//! ```
//!
//! The connection is found dead by libvirt's close callback (end of file, failed keep-alive), by a failed call, or by a
//! look every few seconds. Then everything of it is dropped and opened anew, at growing intervals; a caller's job tries
//! at once. After each opening events are registered before the VMs are listed, so that nothing falls between the two,
//! and the list goes out as a resync.
//!
//! One wait has no end on this side: opening a connection to a daemon that accepts but does not answer, since keep-alive
//! starts only after it. It lasts until that daemon is continued or restarted; callers get their timeouts meanwhile.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};

use super::error::HypervisorError;
use super::hypervisor::{HypervisorConfig, list_vms};
use super::link::{KeepAlive, Link, Sink};
use super::queue::{Next, Queue, Queued};
use super::vm::{ConnectionState, HypervisorEvent, VmEvent};

/// How often the worker looks at an idle connection. The close callback usually comes first.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// What the worker tells the world.
#[derive(Debug)]
pub(super) struct Outlets {
    pub(super) events: broadcast::Sender<HypervisorEvent>,
    pub(super) state: watch::Sender<ConnectionState>,
}

/// The receiver of one connection's callbacks.
struct LinkSink {
    events: broadcast::Sender<HypervisorEvent>,
    /// Why the connection ended, once it has.
    closed: Mutex<Option<String>>,
    queue: Arc<Queue>,
}

impl Sink for LinkSink {
    fn vm_event(&self, event: VmEvent) {
        // No receiver is fine; a slow one loses the oldest events and is told so.
        let _ = self.events.send(HypervisorEvent::Vm(event));
    }

    fn closed(&self, reason: &str) {
        *self.closed.lock() = Some(reason.to_owned());
        self.queue.wake();
    }
}

/// The state of the thread.
pub(super) struct Worker {
    config: HypervisorConfig,
    outlets: Arc<Outlets>,
    queue: Arc<Queue>,
    link: Option<(Arc<Link>, Arc<LinkSink>)>,
    /// When the last attempt to connect began.
    tried: Option<Instant>,
    /// When to try again unasked.
    next_try: Instant,
    backoff: Duration,
    connections: u64,
}

impl Worker {
    pub(super) fn new(config: HypervisorConfig, outlets: Arc<Outlets>, queue: Arc<Queue>) -> Self {
        let (backoff, next_try) = (Duration::ZERO, Instant::now());
        Self { config, outlets, queue, link: None, tried: None, next_try, backoff, connections: 0 }
    }

    /// Runs until the last handle is gone. A panic below (the bindings have some) costs the connection and the job at
    /// hand, whose caller is told; it must not end all control of VMs.
    pub(super) fn run(mut self) {
        while catch_unwind(AssertUnwindSafe(|| self.serve())).is_err() {
            tracing::error!(uri = self.config.uri, "a call to libvirt panicked; connecting anew");
            self.lose("a call to libvirt panicked".to_owned());
        }
    }

    fn serve(&mut self) {
        loop {
            self.tend();
            match self.queue.next(self.patience()) {
                Next::Job(queued) => self.work(queued),
                Next::Look => {}
                Next::Closed => return,
            }
        }
    }

    /// How long to wait for something to do.
    fn patience(&self) -> Duration {
        match &self.link {
            Some(_) => CHECK_INTERVAL,
            None => self.next_try.saturating_duration_since(Instant::now()),
        }
    }

    /// Drops a dead connection, and opens one if none is there and it is time to try.
    fn tend(&mut self) {
        self.drop_dead();
        if self.link.is_none() && Instant::now() >= self.next_try {
            self.open();
        }
    }

    fn drop_dead(&mut self) {
        let Some((link, sink)) = &self.link else { return };
        let reason = sink.closed.lock().take();
        if reason.is_none() && link.is_alive() {
            return;
        }
        let reason = reason.unwrap_or_else(|| "the connection broke".to_owned());
        tracing::warn!(uri = self.config.uri, reason, "lost the connection to libvirt");
        self.lose(reason);
    }

    fn lose(&mut self, reason: String) {
        self.link = None;
        self.tried = None;
        self.next_try = Instant::now();
        self.backoff = Duration::ZERO;
        self.outlets.state.send_modify(|s| {
            s.connected = false;
            s.since = SystemTime::now();
            s.last_error = Some(reason.clone());
        });
        let _ = self.outlets.events.send(HypervisorEvent::Disconnected { reason });
    }

    fn open(&mut self) {
        self.tried = Some(Instant::now());
        let sink = Arc::new(LinkSink {
            events: self.outlets.events.clone(),
            closed: Mutex::new(None),
            queue: self.queue.clone(),
        });
        let keep_alive =
            KeepAlive { interval_secs: self.config.keep_alive_interval_secs, count: self.config.keep_alive_count };
        let opened = Link::open(&self.config.uri, keep_alive, sink.clone())
            .map_err(|e| e.message().to_owned())
            .and_then(|link| match list_vms(&link) {
                Ok(vms) => Ok((link, vms)),
                Err(e) => Err(e.to_string()),
            });
        match opened {
            Ok((link, vms)) => {
                let version = link.connect().get_lib_version().ok().map(version_text);
                tracing::info!(uri = self.config.uri, version, vms = vms.len(), "connected to libvirt");
                self.link = Some((Arc::new(link), sink));
                self.backoff = Duration::ZERO;
                self.connections += 1;
                self.outlets.state.send_modify(|s| {
                    s.connected = true;
                    s.since = SystemTime::now();
                    s.reconnects = self.connections - 1;
                    s.libvirt_version = version;
                });
                let _ = self.outlets.events.send(HypervisorEvent::Resync(vms.into()));
            }
            Err(reason) => {
                // Said once per outage, not per attempt.
                let new = self.outlets.state.borrow().last_error.as_ref() != Some(&reason);
                if new {
                    tracing::warn!(uri = self.config.uri, reason, "can't connect to libvirt, will keep trying");
                }
                self.backoff = (self.backoff * 2).clamp(FIRST_BACKOFF, MAX_BACKOFF);
                self.next_try = Instant::now() + self.backoff;
                self.outlets.state.send_modify(|s| s.last_error = Some(reason));
            }
        }
    }

    fn work(&mut self, Queued { mut job, submitted }: Queued) {
        self.drop_dead(); // it may have died while this waited
        // Once on the connection there is, and once more on a new one if it turned out to be dead.
        for _ in 0..2 {
            // An attempt that began after the job was submitted answers for all jobs submitted before it.
            if self.link.is_none() && self.tried.is_none_or(|tried| tried < submitted) {
                self.open();
            }
            let Some((link, _)) = &self.link else {
                job.run(Err(self.unreachable()));
                return;
            };
            if !job.run(Ok(link)) {
                return;
            }
            self.drop_dead();
        }
        job.run(Err(self.unreachable()));
    }

    fn unreachable(&self) -> HypervisorError {
        let reason = self.outlets.state.borrow().last_error.clone();
        HypervisorError::Unreachable {
            uri: self.config.uri.clone(),
            reason: reason.unwrap_or_else(|| "not connected yet".to_owned()),
        }
    }
}

/// libvirt's version number (major × 1,000,000 + minor × 1,000 + release) as text.
fn version_text(version: u32) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1_000 % 1_000, version % 1_000)
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions_read_as_libvirt_writes_them() {
        assert_eq!(super::version_text(11_003_000), "11.3.0");
        assert_eq!(super::version_text(6_000_001), "6.0.1");
    }
}
