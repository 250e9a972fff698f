//! The way down: of a stop, and of a hand-over, which differ in what becomes of guests' connections.
//!
//! - [`shut_down`], [`hand_over`] and the [`Threads`] they end
//! - [`Releasing`]: disks on their way to a successor

use super::handover::{self, Gate, Invitation, Legacy, Locks, Successor};
use super::upkeep::add_outcomes;
use super::{Disks, Shared};
use prestage_cache::ssd::SsdTier;
use prestage_integration::export::ExportState;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long disks may take to end: below the service manager's patience (TimeoutStopSec=120), with time for the rest.
const DISKS_CLOSE: Duration = Duration::from_secs(80);
/// How long the cache's threads may take to end while guests wait. They wait only for what the kernel cannot cancel.
const SHARDS_END: Duration = Duration::from_millis(600);
/// How long the SSD tier may take to write down what it holds while guests are still served. A store that hangs has it wait for
/// longer; then there is more to write when they wait.
const CHECKPOINT: Duration = Duration::from_secs(2);
/// How long the cache may make no way at its end: a device or a store that hangs is left to itself then. What guests were told is in
/// the stores has been there before; the SSD tier's slab is one in use until its very last write.
const CACHE_STUCK: Duration = Duration::from_secs(12);
/// How long the database may take over its last writes.
const DATABASE_CLOSE: Duration = Duration::from_secs(10);

/// Threads that end with the daemon.
pub(super) struct Threads {
    pub(super) learner: JoinHandle<()>,
    pub(super) models: Option<JoinHandle<()>>,
    pub(super) memory: Option<JoinHandle<()>>,
}

impl Threads {
    /// Ends what guests can do without. The models have been told to stop.
    fn end_asides(&mut self, daemon: &Shared) {
        if let Some(memory) = &daemon.memory {
            memory.stop();
        }
        if self.memory.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("memory panicked");
        }
        if self.models.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("models panicked");
        }
    }

    /// Ends what disks stand on, without waiting for ever for what a store keeps in the kernel.
    fn end_within(self, daemon: &Shared, limit: Duration) {
        self.end_learner(daemon);
        let (cache, (done, ended)) = (daemon.cache.clone(), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            cache.shutdown_quickly();
            let _ = done.send(());
        });
        if ended.recv_timeout(limit).is_err() {
            tracing::warn!("a store holds on to requests in the kernel; its disks' guests wait, others go on");
            daemon.cache.let_go();
        }
        Self::close_database(daemon);
    }

    /// Ends what disks stand on.
    fn end(self, daemon: &Shared) {
        self.end_learner(daemon);
        let (cache, (done, ended)) = (daemon.cache.clone(), std::sync::mpsc::channel());
        std::thread::spawn(move || {
            cache.shutdown();
            let _ = done.send(());
        });
        let tier = daemon.cache.ssd();
        let answers = || tier.as_ref().map_or(0, SsdTier::answers);
        let mut before = answers();
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(CACHE_STUCK) {
            let now = answers();
            if now == before {
                tracing::error!(
                    "the SSD tier's device or a store does not answer, and is not waited for any longer; the next start has of the SSD tier \
                     what its last checkpoint vouches for"
                );
                break;
            }
            before = now;
        }
        Self::close_database(daemon);
    }

    fn end_learner(self, daemon: &Shared) {
        daemon.learner.stop();
        if self.learner.join().is_err() {
            tracing::error!("learner panicked");
        }
    }

    fn close_database(daemon: &Shared) {
        if !daemon.store.close(DATABASE_CLOSE) {
            tracing::warn!("the database did not take everything in time");
        }
    }
}

/// Ends everything, as a stop does.
pub(super) fn shut_down(daemon: &Shared, mut threads: Threads) {
    daemon.models.stop();
    add_outcomes(daemon);
    if let Some(nbd) = &daemon.nbd {
        nbd.stop();
    }
    let left = Disks::remove_all(daemon, Instant::now() + DISKS_CLOSE);
    if left > 0 {
        tracing::warn!(
            left,
            "disks did not end in time: their stores do not answer; their guests wait for the next start"
        );
    }
    threads.end_asides(daemon);
    threads.end(daemon);
    tracing::info!("stopped");
}

/// Shuts down with guests' connections left open, and gives them to the successor. False: nobody serves.
pub(super) fn hand_over(
    daemon: &Shared,
    mut threads: Threads,
    gate: Gate,
    successor: &Successor,
    locks: Locks,
    own: &Invitation,
) -> bool {
    add_outcomes(daemon);
    // Guests are served until these have ended.
    daemon.models.stop();
    threads.end_asides(daemon);
    if let Some(nbd) = &daemon.nbd {
        nbd.stop();
    }
    write_ahead(daemon);
    let began = Instant::now();
    let mut disks = Disks::release_all(daemon, handover::DESTAGE);
    let late = disks.wait(handover::REQUESTS_END).clone();
    let released = began.elapsed();
    threads.end_within(daemon, SHARDS_END);
    // Nothing runs any more that could answer a request.
    let left = disks.wait(handover::REQUESTS_END).clone();
    disks.released.retain(|(disk, _, export)| !late.contains(disk) || export.tracks_requests());
    for disk in late {
        let tracked = disks.released.iter().any(|(name, ..)| *name == disk);
        let stuck = left.contains(&disk);
        tracing::warn!(
            disk,
            tracked,
            stuck,
            "requests did not end in time; the successor takes those again that are tracked and not stuck in the kernel"
        );
    }
    if !disks.open().is_empty() {
        tracing::warn!(disks = ?disks.open(), "stores not closed in time; the successor opens them when this process has ended");
    }
    let legacy = Legacy::new(disks.released, locks);
    let closed = began.elapsed();
    let given = handover::bequeath(gate, successor, &legacy, own);
    tracing::info!(?released, ?closed, served = ?began.elapsed(), given, "handed over; times since requests were stopped");
    given
}

/// Writes down what the SSD tier holds, so that little is left for when guests wait.
fn write_ahead(daemon: &Shared) {
    let (cache, (done, ended)) = (daemon.cache.clone(), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        cache.checkpoint();
        let _ = done.send(());
    });
    if ended.recv_timeout(CHECKPOINT).is_err() {
        tracing::warn!("the SSD tier's index is not written ahead: its device or a store is slow");
    }
}

/// An export that has been released: its disk and its socket.
pub(super) type ReleasedDisk = (String, PathBuf, ExportState<OwnedFd>);

/// What has become of a disk on its way to a successor.
pub(super) enum Step {
    /// None of its requests is under way any more.
    Released(String, PathBuf, Option<std::io::Result<ExportState<OwnedFd>>>),
    /// Nor is its store open.
    Closed(String),
}

/// Disks on their way to a successor.
pub(super) struct Releasing {
    steps: Receiver<Step>,
    /// Whose requests have not ended.
    serving: BTreeSet<String>,
    /// Whose store is not closed.
    open: BTreeSet<String>,
    released: Vec<ReleasedDisk>,
}

impl Releasing {
    /// All of these are to be released and closed; `steps` tells how far they are.
    pub(super) fn new(disks: BTreeSet<String>, steps: Receiver<Step>) -> Self {
        Self { steps, serving: disks.clone(), open: disks, released: Vec::new() }
    }

    /// Waits until all stores are closed, at most for `limit`. Names the disks whose requests have not ended.
    fn wait(&mut self, limit: Duration) -> &BTreeSet<String> {
        let until = Instant::now() + limit;
        while !self.open.is_empty() {
            match self.steps.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Step::Released(name, socket, state)) => {
                    self.serving.remove(&name);
                    match state {
                        Some(Ok(state)) => self.released.push((name, socket, state)),
                        Some(Err(error)) => {
                            tracing::error!(disk = name, %error, "connection not handed over; its hypervisor connects again");
                        }
                        None => {}
                    }
                }
                Ok(Step::Closed(name)) => {
                    self.open.remove(&name);
                }
                // Late, or nobody is left who could tell.
                Err(_) => break,
            }
        }
        &self.serving
    }

    /// Disks whose store is still open here: the successor gets them when this process has ended.
    fn open(&self) -> &BTreeSet<String> {
        &self.open
    }
}
