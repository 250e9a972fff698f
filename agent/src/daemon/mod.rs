//! prestaged: everything put together.
//!
//! - [`run`]: from the configuration to a running daemon and back (`run.rs`); `upkeep.rs`: what is done again and again meanwhile
//! - `disks.rs`: disks on offer: open, export, remove, retry
//! - `qsd.rs`: images that only QEMU understands, through a supervised qemu-storage-daemon
//! - `control.rs`, `history.rs`: the API's questions and orders
//! - `questions.rs`: how many questions about history are answered at a time
//! - `end.rs`: the way down
//! - `handover.rs`: a new prestaged takes over from the one that runs
//! - `models.rs`: models and thresholds
//! - `demand.rs`: policies, forecasts, decisions, promises; `programs.rs`: what is known of programs
//! - `places.rs`: stores that are deleted, replaced or moved while they are served; `sizes.rs`: disks that become larger
//! - `records.rs`: the SSD tier's records are read, and what was found is said
//! - `reload.rs`: a changed configuration, applied whole or not at all
//! - `report.rs`: state as the API words it
//! - `rows.rs`: a disk's requests as CSV, and explanations
//! - [`check_file`]: what a start would run into (`check.rs`)
//! - `webhooks.rs`: who is told
//! - `templates.rs`: templates saved, clones started
//! - `tiers.rs`: other sizes for the tiers; `service.rs`: out of service and back; `drained.rs`: what is out, on record; `mounts.rs`: what is mounted where
//! - `machines.rs`: libvirt: attach, detach, and disks that nobody needs any more

mod check;
mod control;
mod demand;
mod disks;
mod drained;
mod end;
mod handover;
mod history;
mod machines;
mod models;
mod mounts;
mod places;
mod programs;
mod qsd;
mod questions;
mod records;
mod reload;
mod report;
mod rows;
mod run;
mod service;
mod sizes;
mod templates;
mod tiers;
mod upkeep;
mod webhooks;

pub use check::{Checked, check_file};
pub(crate) use handover::{Invitation, door_path};
pub(crate) use qsd::folder as qemu_folder;
pub(crate) use run::helper;
pub use run::{Options, RunError, SetLog, run};

use crate::config::Config;
use crate::demand::run::Demand;
use crate::learner::{LearnerHandle, LearnerSettings};
use crate::memory::MemoryHandle;
use crate::models::ModelsHandle;
use crate::nbd::NbdServer;
use crate::notify::Couriers;
use crate::privilege::Sandbox;
use crate::store::Store;
use disks::Disks;
use parking_lot::Mutex;
use prestage_cache::Cache;
use prestage_integration::api::Counters;
use prestage_integration::libvirt::{Hypervisor, Uuid};
use questions::Questions;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedReceiver;

/// What the parts of the daemon share.
struct Daemon {
    config: Mutex<Config>,
    /// What was given up at the start.
    sandbox: Arc<Sandbox>,
    cache: Cache,
    tiers: tiers::Tiers,
    reloads: Mutex<reload::Reloads>,
    store: Store,
    learner: LearnerHandle,
    models: ModelsHandle,
    disks: Disks,
    looking: places::Looking,
    questions: Questions,
    hypervisor: Option<Hypervisor>,
    templates: templates::Templates,
    demand: Option<Demand>,
    /// Why it is off although it is configured.
    demand_trouble: Option<String>,
    /// Watches guests' memory; `None`: it is switched off.
    memory: Option<MemoryHandle>,
    /// Machines whose memory is to be looked for anew, until somebody listens.
    memory_moves: Mutex<Option<UnboundedReceiver<Uuid>>>,
    /// NBD over TCP.
    nbd: Option<Arc<NbdServer>>,
    /// Why it is off although it is configured.
    nbd_trouble: Option<String>,
    couriers: Mutex<Option<Couriers>>,
    untold: Mutex<webhooks::Untold>,
    started: Instant,
    started_unix_ms: u64,
    /// Why there is no SSD tier although one is configured.
    ssd_trouble: Mutex<Option<String>>,
    /// Why the database is not the one of the last run.
    store_trouble: Option<String>,
    /// The database ends with the daemon.
    stand_in: bool,
    /// Names of machines by UUID, as far as libvirt has told.
    machine_names: Mutex<HashMap<String, String>>,
    /// Counters by disk that are in the database already.
    outcomes: Mutex<HashMap<String, Counters>>,
}

type Shared = Arc<Daemon>;

/// Most bytes of history in a stand-in for the database, which lies in memory as a rule.
const STAND_IN_BYTES: u64 = 16 << 20;

fn learner_settings(config: &Config, stand_in: bool) -> LearnerSettings {
    let most = if stand_in { STAND_IN_BYTES } else { u64::MAX };
    LearnerSettings {
        prefetch: config.prefetch.enabled,
        threshold: config.prefetch.threshold,
        history: config.learner.history,
        save_interval: config.learner.save_interval,
        retention_age: Duration::from_secs(u64::from(config.learner.retention_days) * 86_400),
        retention_bytes: config.learner.retention_bytes.0.min(most),
    }
}
