//! The way down: of a stop, and of a hand-over, which differ in what becomes of guests' connections.

use super::handover::{self, Gate, Invitation, Legacy, Locks, Successor};
use super::run::add_outcomes;
use super::{Disks, Shared};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long disks may take to end: below the service manager's patience (TimeoutStopSec=120), with time for the rest.
const DISKS_CLOSE: Duration = Duration::from_secs(80);
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

    /// Ends what disks stand on.
    fn end(self, daemon: &Shared) {
        daemon.learner.stop();
        if self.learner.join().is_err() {
            tracing::error!("learner panicked");
        }
        daemon.cache.shutdown();
        if !daemon.store.close(DATABASE_CLOSE) {
            tracing::warn!("the database did not take everything in time");
        }
    }
}

/// Ends everything, as a stop does.
pub(super) fn shut_down(daemon: &Shared, mut threads: Threads) {
    daemon.models.stop();
    add_outcomes(daemon);
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
    let began = Instant::now();
    let mut disks = Disks::release_all(daemon, handover::DESTAGE);
    let late = disks.wait(handover::REQUESTS_END);
    let released = began.elapsed();
    threads.end(daemon);
    if !late.is_empty() {
        // Nothing runs any more that could answer a request.
        disks.wait(handover::REQUESTS_END);
        disks.released.retain(|(disk, _, export)| {
            let tracked = !late.contains(disk) || export.tracks_requests();
            if late.contains(disk) {
                tracing::warn!(
                    disk,
                    tracked,
                    "requests did not end in time; the successor takes those again that are tracked"
                );
            }
            tracked
        });
    }
    let legacy = Legacy::new(disks.released, locks);
    let closed = began.elapsed();
    let given = handover::bequeath(gate, successor, &legacy, own);
    tracing::info!(?released, ?closed, served = ?began.elapsed(), given, "handed over; times since requests were stopped");
    given
}
