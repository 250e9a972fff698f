//! One storage's predictor, and which event of a disk is the start of a boot.

use super::DiskEvent;
use super::journal::Journal;
use super::minds::Minds;
use super::threshold::Thresholds;
use prestage_cache::StorageHandle;
use prestage_predictor::{AccessConfig, AccessPredictor, PAGE_BYTES, Phase, ProfileError};
use std::collections::HashMap;
use std::time::Duration;

/// A front-end that has connected and started no ring for this long belongs to a machine that is starting: firmware and
/// kernel come first. One that reconnects to a running guest starts its rings at once.
const FRESH_AFTER: Duration = Duration::from_millis(50);
/// Rings that start anew this soon after the machine's start are the same boot: firmware hands over to the boot loader,
/// and that to the kernel, each with a driver of its own.
const SAME_BOOT: Duration = Duration::from_secs(120);

/// A disk's connection, as far as boots are concerned.
#[derive(Debug, Default)]
struct Life {
    /// Connected and nothing known yet, since when.
    undecided: Option<Duration>,
    booted: Option<Duration>,
}

/// What the learner holds of one storage.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) handle: StorageHandle,
    pub(super) predictor: AccessPredictor,
    /// The saved profile could not be read and must not be overwritten unasked.
    pub(super) refused: Option<ProfileError>,
    /// Something was learned since the last save.
    pub(super) dirty: bool,
    pub(super) journal: Journal,
    /// Something was observed since the last call of `predict`.
    pub(super) stirred: bool,
    /// Something was observed that the LSTM has not read.
    pub(super) unheard: bool,
    /// The LSTM that speaks in the predictor, and those on trial beside it.
    pub(super) minds: Minds,
    /// 1 for a read that the cache had, 0 for one that it had not, since they were last handed on.
    pub(super) hits: Vec<f32>,
    lives: HashMap<u32, Life>,
}

/// Settings of a storage's predictor: nothing beyond the store's end, and no more ahead than the RAM tier can hold.
fn config(handle: &StorageHandle, ram_bytes: u64) -> AccessConfig {
    let defaults = AccessConfig::default();
    AccessConfig {
        size_pages: handle.pages(),
        // Probation is half of the tier at least; a window that exceeds it would wait in the queue instead.
        phase_window_bytes: defaults.phase_window_bytes.min(ram_bytes / 2),
        cache_pages: ram_bytes / PAGE_BYTES,
        ..defaults
    }
}

impl Model {
    pub(super) fn new(handle: StorageHandle, saved: Option<&[u8]>, ram_bytes: u64) -> Model {
        let config = config(&handle, ram_bytes);
        let (predictor, refused) = match saved.map(|bytes| AccessPredictor::from_bytes(bytes, config.clone())) {
            None => (AccessPredictor::new(config), None),
            Some(Ok(predictor)) => (predictor, None),
            Some(Err(error)) => {
                tracing::warn!(
                    storage = handle.identity(),
                    %error,
                    "saved profile not used; prestage learns this storage anew and does not save until it is removed"
                );
                (AccessPredictor::new(config), Some(error))
            }
        };
        Model {
            handle,
            predictor,
            refused,
            dirty: false,
            journal: Journal::default(),
            stirred: false,
            unheard: false,
            minds: Minds::default(),
            hits: Vec::new(),
            lives: HashMap::new(),
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.predictor.memory_bytes() + self.journal.memory_bytes() + self.minds.memory_bytes()
    }

    /// The threshold that holds for the storage, which the predictor is told.
    pub(super) fn obey(&mut self, thresholds: &Thresholds, configured: f64) -> f32 {
        let threshold = thresholds.of(self.handle.identity(), configured);
        // Nothing is handed out that would then not be loaded: the predictor takes it for on its way.
        self.predictor.set_min_probability(threshold as f32);
        threshold as f32
    }

    /// Forgets everything learned.
    pub(super) fn forget(&mut self, ram_bytes: u64) {
        self.predictor = AccessPredictor::new(config(&self.handle, ram_bytes));
        self.minds.install(&mut self.predictor);
        self.refused = None;
        self.dirty = false;
    }

    pub(super) fn event(&mut self, disk: u32, event: DiskEvent, at: Duration) {
        let life = self.lives.entry(disk).or_default();
        match event {
            DiskEvent::Connected => *life = Life { undecided: Some(at), booted: None },
            DiskEvent::RingStarted { resumed: true } => life.undecided = None,
            DiskEvent::RingStarted { resumed: false } => {
                let recent = life.booted.is_some_and(|boot| at.saturating_sub(boot) < SAME_BOOT);
                if !recent {
                    self.boot(disk, at);
                }
            }
            DiskEvent::Disconnected => {
                *life = Life::default();
                self.predictor.phase_end(u64::from(disk), micros(at));
                self.dirty = true;
            }
        }
    }

    /// Decides about connections that have been silent long enough. Returns when to look again.
    pub(super) fn decide(&mut self, now: Duration) -> Option<Duration> {
        let due: Vec<u32> = self
            .lives
            .iter()
            .filter(|(_, life)| life.undecided.is_some_and(|since| now.saturating_sub(since) >= FRESH_AFTER))
            .map(|(disk, _)| *disk)
            .collect();
        for disk in due {
            self.boot(disk, now);
        }
        self.lives.values().filter_map(|life| life.undecided).map(|since| since + FRESH_AFTER).min()
    }

    fn boot(&mut self, disk: u32, at: Duration) {
        tracing::info!(disk, storage = self.handle.identity(), "machine starts");
        self.lives.insert(disk, Life { undecided: None, booted: Some(at) });
        self.predictor.phase_start(u64::from(disk), Phase::Boot, micros(at));
        self.stirred = true;
        self.dirty = true;
    }

    pub(super) fn remove_disk(&mut self, disk: u32) {
        self.lives.remove(&disk);
        self.predictor.vm_forget(u64::from(disk));
        self.minds.forget(u64::from(disk));
    }
}

/// On the predictor's clock.
pub(super) fn micros(at: Duration) -> u64 {
    u64::try_from(at.as_micros()).unwrap_or(u64::MAX)
}
