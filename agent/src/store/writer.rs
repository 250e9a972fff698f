//! The one thread that writes, and the bounded queue before it.
//!
//! Writes that wait together go into one transaction, each in a savepoint of its own: one that is refused (a name taken) does not undo
//! its neighbours. Where the transaction as a whole fails (disk full, locked), each write is tried once more alone, so that a small one
//! gets through where a large one does not; what still fails is counted and reported, never retried without end.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::history::upgrade;
use super::{StoreError, StoreOptions, refused, suspect};

/// Writes of one transaction: what one sync of the disk is shared by.
const BATCH: usize = 64;
/// Free pages given back to the file system after one write that deletes much: 64 MiB, a few hundred milliseconds of the writer.
const VACUUM_PAGES: u32 = 16_384;

/// Runs inside a transaction, possibly more than once.
type Work = Box<dyn FnMut(&Connection) -> Result<(), WorkError> + Send>;

/// Why a single write failed.
#[derive(Debug)]
pub(super) enum WorkError {
    /// The database did: the whole transaction is in doubt.
    Database(rusqlite::Error),
    /// The request did: its neighbours are not concerned.
    Request(StoreError),
}

impl From<rusqlite::Error> for WorkError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

impl From<StoreError> for WorkError {
    fn from(error: StoreError) -> Self {
        Self::Request(error)
    }
}

struct Job {
    work: Work,
    size_bytes: u64,
    /// Deletes much: give free pages back afterwards.
    vacuum: bool,
    done: oneshot::Sender<Result<(), StoreError>>,
}

enum Message {
    Job(Job),
    Close,
}

/// Outcome of a queued write: wait for it, await it, or drop it, which changes nothing about the write.
#[derive(Debug)]
#[must_use = "drop it deliberately when the outcome does not matter"]
pub struct Pending(oneshot::Receiver<Result<(), StoreError>>);

impl Pending {
    pub(super) fn failed(error: StoreError) -> Self {
        let (done, outcome) = oneshot::channel();
        let _ = done.send(Err(error));
        Self(outcome)
    }

    /// Blocks until the write is durable or refused. Not on an async executor's thread: await it there.
    pub fn wait(self) -> Result<(), StoreError> {
        self.0.blocking_recv().unwrap_or(Err(StoreError::Closed))
    }
}

impl IntoFuture for Pending {
    type Output = Result<(), StoreError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.0.await.unwrap_or(Err(StoreError::Closed)) })
    }
}

#[derive(Debug, Default)]
struct Gauges {
    queued: AtomicU64,
    queued_bytes: AtomicU64,
    dropped: AtomicU64,
    degraded: Mutex<Option<String>>,
}

pub(super) struct Writer {
    sender: Mutex<Option<SyncSender<Message>>>,
    finished: Mutex<Receiver<()>>,
    gauges: Arc<Gauges>,
    path: PathBuf,
    queue_bytes: u64,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).field("gauges", &self.gauges).finish_non_exhaustive()
    }
}

impl Writer {
    pub(super) fn start(connection: Connection, path: PathBuf, options: StoreOptions) -> Result<Self, StoreError> {
        let (sender, jobs) = sync_channel(options.queue);
        // Dropped with the thread, which wakes whoever waits in `close`.
        let (alive, finished) = sync_channel::<()>(0);
        let gauges = Arc::new(Gauges::default());
        let thread = Thread { connection, path: path.clone(), gauges: Arc::clone(&gauges) };
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || {
                let _alive = alive;
                thread.run(&jobs);
            })
            .map_err(|error| StoreError::Refused {
                action: "start the writer of",
                path: path.clone(),
                detail: error.to_string(),
            })?;
        Ok(Self {
            sender: Mutex::new(Some(sender)),
            finished: Mutex::new(finished),
            gauges,
            path,
            queue_bytes: options.queue_bytes,
        })
    }

    /// Queues a write; never blocks. A full queue loses it, which is counted.
    pub(super) fn submit(
        &self,
        size_bytes: u64,
        vacuum: bool,
        work: impl FnMut(&Connection) -> Result<(), WorkError> + Send + 'static,
    ) -> Pending {
        let (done, outcome) = oneshot::channel();
        let sender = self.sender.lock();
        let Some(sender) = sender.as_ref() else { return Pending::failed(StoreError::Closed) };
        let gauges = &self.gauges;
        let waiting = gauges.queued_bytes.fetch_add(size_bytes, Ordering::Relaxed);
        gauges.queued.fetch_add(1, Ordering::Relaxed);
        let job = Job { work: Box::new(work), size_bytes, vacuum, done };
        // One larger than the whole bound is let through alone: it would never fit otherwise.
        let fits = waiting == 0 || waiting.saturating_add(size_bytes) <= self.queue_bytes;
        let sent = if fits { sender.try_send(Message::Job(job)) } else { Err(TrySendError::Full(Message::Job(job))) };
        let Err(error) = sent else { return Pending(outcome) };
        gauges.queued.fetch_sub(1, Ordering::Relaxed);
        gauges.queued_bytes.fetch_sub(size_bytes, Ordering::Relaxed);
        gauges.dropped.fetch_add(1, Ordering::Relaxed);
        Pending::failed(match error {
            TrySendError::Full(_) => {
                let error = StoreError::QueueFull { path: self.path.clone() };
                gauges.degraded.lock().get_or_insert_with(|| error.to_string());
                error
            }
            TrySendError::Disconnected(_) => StoreError::Closed,
        })
    }

    pub(super) fn condition(&self) -> (u64, u64, Option<String>) {
        let gauges = &self.gauges;
        (gauges.queued.load(Ordering::Relaxed), gauges.dropped.load(Ordering::Relaxed), gauges.degraded.lock().clone())
    }

    pub(super) fn close(&self, limit: Duration) -> bool {
        if let Some(sender) = self.sender.lock().take() {
            // A full queue cannot take the message; the thread then ends when it has emptied it, as the sender is gone.
            let _ = sender.try_send(Message::Close);
        }
        matches!(self.finished.lock().recv_timeout(limit), Err(RecvTimeoutError::Disconnected))
            && self.gauges.queued.load(Ordering::Relaxed) == 0
    }
}

struct Thread {
    connection: Connection,
    path: PathBuf,
    gauges: Arc<Gauges>,
}

impl Thread {
    fn run(mut self, jobs: &Receiver<Message>) {
        let mut open = true;
        // Segments of the version before up to this one are in the index; `None`: all are.
        let mut upgraded = Some(0);
        while open {
            let first = match (jobs.try_recv(), upgraded) {
                (Err(TryRecvError::Empty), Some(after)) => {
                    upgraded = self.upgrade(after);
                    continue;
                }
                (Err(TryRecvError::Empty), None) => jobs.recv().ok(),
                (first, _) => first.ok(),
            };
            let Some(Message::Job(first)) = first else { break };
            let mut batch = vec![first];
            while batch.len() < BATCH {
                match jobs.try_recv() {
                    Ok(Message::Job(job)) => batch.push(job),
                    Err(TryRecvError::Empty) => break,
                    Ok(Message::Close) | Err(TryRecvError::Disconnected) => {
                        open = false;
                        break;
                    }
                }
            }
            self.write(batch);
        }
        // Leaves one file behind, not three, and says so early if the disk is full.
        if let Err(error) = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            warn!(path = %self.path.display(), %error, "the database's log could not be folded in; that happens at the next start");
        }
    }

    /// Takes one segment of the version before into the index, while nobody waits. Returns where to go on.
    fn upgrade(&mut self, after: i64) -> Option<i64> {
        let mut step = || -> Result<Option<i64>, WorkError> {
            let transaction = self.connection.transaction()?;
            let next = upgrade(&transaction, after)?;
            transaction.commit()?;
            Ok(next)
        };
        match step() {
            Ok(next) => next,
            Err(error) => {
                warn!(path = %self.path.display(), ?error, "history of the version before is not indexed; that goes on at the next start");
                None
            }
        }
    }

    fn write(&mut self, mut batch: Vec<Job>) {
        let vacuum = batch.iter().any(|job| job.vacuum);
        match transact(&mut self.connection, &self.path, &mut batch) {
            Ok(outcomes) => self.answer(batch, outcomes),
            Err(error) if batch.len() == 1 => self.answer(batch, vec![Err(error)]),
            Err(_) => {
                for job in batch {
                    let mut alone = [job];
                    let outcome = transact(&mut self.connection, &self.path, &mut alone);
                    let outcomes = outcome.unwrap_or_else(|error| vec![Err(error)]);
                    self.answer(alone, outcomes);
                }
            }
        }
        if vacuum && let Err(error) = give_back(&self.connection) {
            warn!(path = %self.path.display(), %error, "free space of the database could not be given back");
        }
    }

    fn answer(&self, jobs: impl IntoIterator<Item = Job>, outcomes: Vec<Result<(), StoreError>>) {
        for (job, outcome) in jobs.into_iter().zip(outcomes) {
            match &outcome {
                Ok(()) => {
                    if let Some(was) = self.gauges.degraded.lock().take() {
                        info!(path = %self.path.display(), was, "the database takes writes again");
                    }
                }
                // The request's own fault, and whoever made it is told.
                Err(StoreError::AlreadyExists { .. } | StoreError::NotFound { .. } | StoreError::WrongState(_)) => {}
                // Lost, but not for want of a healthy database.
                Err(StoreError::Segment(_)) => {
                    self.gauges.dropped.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    self.gauges.dropped.fetch_add(1, Ordering::Relaxed);
                    let text = error.to_string();
                    let mut degraded = self.gauges.degraded.lock();
                    // Once for each new reason: a full disk would fill the log's disk too.
                    if degraded.as_ref() != Some(&text) {
                        warn!(error = %text, "the database refuses writes");
                        if matches!(error, StoreError::Damaged { .. }) {
                            // The next start looks closer. Where no file can be made it does not, and this is said again.
                            let _ = std::fs::File::create(suspect(&self.path));
                        }
                        *degraded = Some(text);
                    }
                }
            }
            self.gauges.queued.fetch_sub(1, Ordering::Relaxed);
            self.gauges.queued_bytes.fetch_sub(job.size_bytes, Ordering::Relaxed);
            let _ = job.done.send(outcome);
        }
    }
}

/// One transaction of all jobs. An error is the transaction's: nothing of it was written.
fn transact(
    connection: &mut Connection,
    path: &Path,
    jobs: &mut [Job],
) -> Result<Vec<Result<(), StoreError>>, StoreError> {
    let failed = |error| refused(path, "write to", error);
    let mut transaction =
        connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(failed)?;
    let mut outcomes = Vec::with_capacity(jobs.len());
    for job in jobs {
        let savepoint = transaction.savepoint().map_err(failed)?;
        match (job.work)(&savepoint) {
            Ok(()) => {
                savepoint.commit().map_err(failed)?;
                outcomes.push(Ok(()));
            }
            // Dropped savepoints roll back.
            Err(WorkError::Request(error)) => outcomes.push(Err(error)),
            Err(WorkError::Database(error)) => return Err(failed(error)),
        }
    }
    transaction.commit().map_err(failed)?;
    Ok(outcomes)
}

/// Each step of this pragma gives one page back.
fn give_back(connection: &Connection) -> rusqlite::Result<()> {
    let mut statement = connection.prepare(&format!("PRAGMA incremental_vacuum({VACUUM_PAGES})"))?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    Ok(())
}
