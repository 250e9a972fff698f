//! Carries deliveries out: a task for each endpoint, so that a slow one holds up nobody else.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prestage_integration::webhook::{Message, SendError, Sender};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{error, info, warn};

use super::events;
use super::lanes::{Lanes, Next, Patience, Setback};
use crate::store::demand::Head;
use crate::store::{Store, StoreError};

/// Looks into the outbox at least so often, whether woken or not.
const LOOK: Duration = Duration::from_secs(10);
/// At the end, tries under way have so long.
const LAST: Duration = Duration::from_secs(2);

/// What an endpoint's task needs.
#[derive(Debug, Clone)]
pub struct Courier {
    /// The endpoint's name in the outbox.
    pub name: String,
    pub sender: Sender,
    pub patience: Patience,
    /// Of the waits between tries.
    pub seed: u64,
}

/// The tasks of all endpoints; they end when it is dropped or told to.
pub struct Couriers {
    wakers: Vec<Arc<Notify>>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Couriers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Couriers").field("tasks", &self.tasks.len()).finish_non_exhaustive()
    }
}

impl Couriers {
    /// Starts a task for each endpoint. Within a tokio runtime. The endpoints are made known to the outbox by
    /// [`Store::set_endpoints`] before.
    #[must_use]
    pub fn start(store: &Store, couriers: Vec<Courier>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (mut wakers, mut tasks) = (Vec::new(), Vec::new());
        for courier in couriers {
            let wake = Arc::new(Notify::new());
            wakers.push(Arc::clone(&wake));
            tasks.push(tokio::spawn(courier.run(store.clone(), wake, stopped.clone())));
        }
        Self { wakers, stop, tasks }
    }

    /// There may be a new event.
    pub fn wake(&self) {
        self.wakers.iter().for_each(|wake| wake.notify_one());
    }

    /// Ends all tasks. What is under way for more than two seconds is broken off and tried again at the next start.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        for task in self.tasks {
            let _ = task.await;
        }
    }
}

fn unix_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// What came of a try.
#[derive(Debug)]
enum Tried {
    Arrived,
    Refused(SendError),
    /// The database did not say what to send.
    Unknown(StoreError),
}

impl Courier {
    async fn run(self, store: Store, wake: Arc<Notify>, mut stopped: watch::Receiver<bool>) {
        let mut lanes = Lanes::new(self.patience, self.seed);
        let mut tries: JoinSet<(Head, Tried)> = JoinSet::new();
        loop {
            let until = self.begin(&store, &mut lanes, &mut tries).await;
            tokio::select! {
                _ = stopped.changed() => break,
                () = wake.notified() => {}
                () = tokio::time::sleep(until) => {}
                Some(tried) = tries.join_next() => {
                    // A task that panicked is not noted: its lane stays under way until the next start.
                    if let Ok((head, tried)) = tried {
                        self.note(&store, &mut lanes, head, tried).await;
                    }
                }
            }
        }
        // What has just arrived need not arrive again.
        let rest = async {
            while let Some(tried) = tries.join_next().await {
                if let Ok((head, tried)) = tried {
                    self.note(&store, &mut lanes, head, tried).await;
                }
            }
        };
        let _ = tokio::time::timeout(LAST, rest).await;
    }

    /// Begins what may be tried now. Returns for how long there is nothing more.
    async fn begin(&self, store: &Store, lanes: &mut Lanes, tries: &mut JoinSet<(Head, Tried)>) -> Duration {
        let (asked, name) = (store.clone(), self.name.clone());
        let heads = match tokio::task::spawn_blocking(move || asked.waiting(&name)).await {
            Ok(Ok(heads)) => heads,
            Ok(Err(error)) => {
                warn!(endpoint = self.name, %error, "webhook: the outbox cannot be read");
                return LOOK;
            }
            Err(_) => return LOOK,
        };
        loop {
            let now = unix_ms();
            match lanes.next(&heads, now) {
                Next::Try(head) => {
                    lanes.begin(&head.subject);
                    let (store, sender) = (store.clone(), self.sender.clone());
                    tries.spawn(async move {
                        let tried = attempt(&store, &sender, head.seq).await;
                        (head, tried)
                    });
                }
                Next::At(at) => return Duration::from_millis(at.saturating_sub(now)).min(LOOK),
                Next::Idle => return LOOK,
            }
        }
    }

    /// Notes what came of a try.
    async fn note(&self, store: &Store, lanes: &mut Lanes, head: Head, tried: Tried) {
        let now = unix_ms();
        let (endpoint, seq, subject) = (self.name.as_str(), head.seq, head.subject.as_str());
        let noted = match tried {
            Tried::Arrived => {
                // Noted before the lane goes on: its next look finds the next event.
                let noted = store.delivered(endpoint, seq).await;
                if lanes.arrived(subject) {
                    info!(endpoint, "webhook: the receiver takes events again");
                }
                noted
            }
            Tried::Refused(reason) => {
                let failed = lanes.failed(&head, setback(&reason), now);
                if failed.dead {
                    error!(
                        endpoint, seq, subject, tries = head.tries + 1, %reason,
                        "webhook: an event is given up; mend the receiver; `prestagectl demand` counts what was given up"
                    );
                } else if head.tries == 0 {
                    warn!(endpoint, seq, subject, %reason, "webhook: an event did not arrive, and is tried again");
                }
                store.undelivered(endpoint, seq, failed.next_unix_ms, failed.dead, &reason.to_string()).await
            }
            Tried::Unknown(error) => Err(error),
        };
        if let Err(error) = noted {
            // Without the note the same would be tried again at once.
            lanes.stalled(subject, now);
            warn!(endpoint, seq, %error, "webhook: the outbox cannot be written, and waits");
        }
    }
}

async fn attempt(store: &Store, sender: &Sender, seq: u64) -> Tried {
    let asked = store.clone();
    let row = match tokio::task::spawn_blocking(move || asked.event(seq)).await {
        Ok(Ok(Some(row))) => row,
        // Removed meanwhile, with its delivery.
        Ok(Ok(None)) | Err(_) => return Tried::Arrived,
        Ok(Err(error)) => return Tried::Unknown(error),
    };
    let message =
        Message { id: format!("evt_{}", row.id), content_type: events::CONTENT_TYPE, body: events::body(&row) };
    match sender.send(&message, SystemTime::now()).await {
        Ok(()) => Tried::Arrived,
        Err(error) => Tried::Refused(error),
    }
}

fn setback(error: &SendError) -> Setback {
    match error {
        SendError::Unreachable { .. } | SendError::TimedOut { .. } => Setback::Receiver { retry_after: None },
        // Too early, too many, and whatever its own fault is. 410 asks to be forgotten, which only the configuration can do.
        SendError::Refused { status: 408 | 410 | 425 | 429 | 500..=599, retry_after, .. } => {
            Setback::Receiver { retry_after: *retry_after }
        }
        SendError::Refused { .. } | SendError::Message { .. } => Setback::Message,
    }
}
