//! The learner: takes accesses off the data path's queue, feeds the predictors, hands what they propose to the cache, and
//! keeps what was learned. One thread; the data path never waits for it.
//!
//! - [`LearnerHandle`]: messages to the thread, from anywhere
//! - `run.rs`: the thread's loop
//! - `model.rs`: one storage's predictor and the life of its disks (which start is a boot)
//! - `minds.rs`: the model in use of each storage, and those on trial beside it
//! - `threshold.rs`: lowest probability by storage
//! - [`history`]: accesses and runs on their way to the database
//! - `tap.rs`: live recordings of accesses
//! - `journal.rs`, `explain.rs`: what was proposed lately, what became of it, and why

mod explain;
pub mod history;
mod journal;
mod minds;
mod model;
pub(crate) mod run;
pub(crate) mod tap;
mod threshold;

pub use threshold::Thresholds;

use crate::models::ModelsHandle;
use crate::store::Store;
use prestage_cache::policy::PrefetchRequest;
use prestage_cache::types::StorageId;
use prestage_cache::{Cache, StorageHandle};
use prestage_integration::api::types::Explained;
use prestage_predictor::{ProfileError, ProfileSummary};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// What happened to a disk, seen by its export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskEvent {
    /// A hypervisor has connected to the socket.
    Connected,
    /// A ring runs; `resumed` if the guest goes on from before.
    RingStarted { resumed: bool },
    /// The hypervisor has gone.
    Disconnected,
}

/// Settings that may change while the learner runs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LearnerSettings {
    /// Hand predictions to the cache.
    pub prefetch: bool,
    /// Least probability.
    pub threshold: f64,
    /// Keep accesses in the database.
    pub history: bool,
    pub save_interval: Duration,
    pub retention_age: Duration,
    pub retention_bytes: u64,
}

/// Numbers of the learner, from any thread.
#[derive(Debug, Default)]
pub struct LearnerCounters {
    pub accesses: AtomicU64,
    pub predictions: AtomicU64,
    pub profiles: AtomicU64,
    pub memory_bytes: AtomicU64,
    /// Saved profiles that could not be read.
    pub refused: AtomicU64,
}

/// A profile that is held, in numbers.
#[derive(Clone, Debug)]
pub struct HeldProfile {
    pub storage: String,
    pub summary: ProfileSummary,
    /// Why the saved profile was not used: it is kept in the database until it is removed or replaced on request.
    pub refused: Option<ProfileError>,
}

/// What saving did.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct SavedProfiles {
    pub profiles: u32,
    pub bytes: u64,
}

enum Message {
    AddStorage(StorageHandle),
    /// Answers when the profile is saved.
    RemoveStorage(StorageId, oneshot::Sender<()>),
    AddDisk {
        disk: u32,
        /// From the top down, where images stand on each other.
        storages: Vec<StorageId>,
        vm: String,
    },
    RemoveDisk {
        disk: u32,
    },
    Event {
        disk: u32,
        event: DiskEvent,
        at: Duration,
    },
    Save(oneshot::Sender<Result<SavedProfiles, String>>),
    Profiles(oneshot::Sender<Vec<HeldProfile>>),
    /// Forgets what is held of a storage.
    Forget(String, oneshot::Sender<()>),
    /// The cache was emptied: what was proposed before may be proposed again.
    Emptied(Option<StorageId>),
    /// What the storage's boot set holds, as prefetches.
    Warm(StorageId, oneshot::Sender<Vec<PrefetchRequest>>),
    /// A live recording of a disk; `None` if there are too many.
    Trace(u32, oneshot::Sender<Option<tap::Reader>>),
    EndTraces,
    /// Why a page of a storage was or was not prefetched.
    Explain(StorageId, u64, oneshot::Sender<Option<Explained>>),
    Settings(LearnerSettings),
    Thresholds(Thresholds),
    Stop,
}

/// Reaches the learner.
#[derive(Clone)]
pub struct LearnerHandle(Arc<Handle>);

struct Handle {
    sender: Sender<Message>,
    cache: Cache,
    counters: Arc<LearnerCounters>,
}

impl LearnerHandle {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        cache: Cache,
        store: Store,
        watch: ModelsHandle,
        settings: LearnerSettings,
    ) -> std::io::Result<(LearnerHandle, JoinHandle<()>)> {
        let (sender, messages) = channel();
        let counters = Arc::new(LearnerCounters::default());
        let learner = run::Learner::new(cache.clone(), store, watch, settings, Arc::clone(&counters));
        let thread = std::thread::Builder::new().name("learner".into()).spawn(move || learner.run(&messages))?;
        Ok((LearnerHandle(Arc::new(Handle { sender, cache, counters })), thread))
    }

    fn send(&self, message: Message) {
        // A learner that has stopped wants to know nothing more.
        let _ = self.0.sender.send(message);
        self.0.cache.accesses().interrupt();
    }

    pub fn counters(&self) -> &LearnerCounters {
        &self.0.counters
    }
    pub fn accesses(&self) -> u64 {
        self.0.counters.accesses.load(Ordering::Relaxed)
    }
    /// A storage was opened: its saved profile is loaded. Of one that is known, the size is taken note of.
    pub fn add_storage(&self, storage: StorageHandle) {
        self.send(Message::AddStorage(storage));
    }
    /// A storage was closed; returns when its profile is with the database. Blocks.
    pub fn remove_storage_blocking(&self, storage: StorageId) {
        let (reply, done) = oneshot::channel();
        self.send(Message::RemoveStorage(storage, reply));
        let _ = done.blocking_recv();
    }
    /// `storages`: what the disk is on, from the top down where images stand on each other.
    pub fn add_disk(&self, disk: u32, storages: Vec<StorageId>, vm: String) {
        self.send(Message::AddDisk { disk, storages, vm });
    }
    pub fn remove_disk(&self, disk: u32) {
        self.send(Message::RemoveDisk { disk });
    }
    pub fn event(&self, disk: u32, event: DiskEvent) {
        self.send(Message::Event { disk, event, at: self.0.cache.now() });
    }
    pub fn emptied(&self, storage: Option<StorageId>) {
        self.send(Message::Emptied(storage));
    }
    pub fn settings(&self, settings: LearnerSettings) {
        self.send(Message::Settings(settings));
    }
    /// Thresholds set at run time; those before are forgotten.
    pub fn thresholds(&self, thresholds: Thresholds) {
        self.send(Message::Thresholds(thresholds));
    }
    /// Saves every profile that has changed and waits until the database has it.
    ///
    /// # Errors
    /// What the database says, or that the learner has stopped.
    pub async fn save(&self) -> Result<SavedProfiles, String> {
        let (reply, saved) = oneshot::channel();
        self.send(Message::Save(reply));
        saved.await.unwrap_or_else(|_| Err("the learner has stopped; restart prestaged".to_owned()))
    }
    /// Profiles held now.
    pub async fn profiles(&self) -> Vec<HeldProfile> {
        let (reply, profiles) = oneshot::channel();
        self.send(Message::Profiles(reply));
        profiles.await.unwrap_or_default()
    }
    /// Forgets what was learned of a storage; it is learned anew from here on.
    pub async fn forget(&self, storage: String) {
        let (reply, done) = oneshot::channel();
        self.send(Message::Forget(storage, reply));
        let _ = done.await;
    }
    /// What would be prefetched if a machine started now: the storage's boot set.
    pub async fn boot_set(&self, storage: StorageId) -> Vec<PrefetchRequest> {
        let (reply, requests) = oneshot::channel();
        self.send(Message::Warm(storage, reply));
        requests.await.unwrap_or_default()
    }
    /// A disk's accesses from now on. `None` if there are too many readers already, or the learner has stopped.
    pub(crate) async fn trace(&self, disk: u32) -> Option<tap::Reader> {
        let (reply, reader) = oneshot::channel();
        self.send(Message::Trace(disk, reply));
        reader.await.ok().flatten()
    }
    /// Ends all recordings: their readers get what is gathered.
    pub(crate) fn end_traces(&self) {
        self.send(Message::EndTraces);
    }
    /// Why a page of a storage was or was not prefetched, apart from what the disk knows. `None` if the learner does not
    /// know the storage.
    pub(crate) async fn explain(&self, storage: StorageId, page: u64) -> Option<Explained> {
        let (reply, explained) = oneshot::channel();
        self.send(Message::Explain(storage, page, reply));
        explained.await.ok().flatten()
    }
    /// Saves and ends the thread.
    pub fn stop(&self) {
        self.send(Message::Stop);
    }
}

impl fmt::Debug for LearnerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LearnerHandle").field("counters", &self.0.counters).finish_non_exhaustive()
    }
}
