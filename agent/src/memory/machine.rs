//! A machine whose memory is watched, and where that lies.

use super::host::Group;
use super::idle::Idle;
use super::mind::Mind;
use super::storage_of;
use crate::learner::run::unix_ms;
use crate::store::{Pending, Store};
use prestage_integration::libvirt::Uuid;
use prestage_integration::memory::helper::protocol::Watching;
use prestage_integration::memory::{ProcessId, Region};

/// Where a machine's memory lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) process: ProcessId,
    pub(crate) regions: Vec<Region>,
}

impl Place {
    pub(super) fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages).sum()
    }

    pub(super) fn frames(&self) -> u64 {
        self.regions.iter().map(|region| region.frame.saturating_add(region.pages)).max().unwrap_or(0)
    }
}

pub(super) struct Machine {
    pub(super) uuid: Uuid,
    pub(super) name: String,
    pub(super) place: Option<Place>,
    pub(super) watching: Option<Watching>,
    /// Why it is not watched.
    pub(super) trouble: Option<String>,
    pub(super) mind: Mind,
    pub(super) idle: Idle,
    /// Every so many faults are told (or milliseconds between looks), as the helper knows; 0: none.
    pub(super) period: u32,
    pub(super) group: Group,
    pub(super) active_us: u64,
    pub(super) room_us: u64,
}

impl Machine {
    /// Whether its faults come one by one.
    pub(super) fn is_ordered(&self) -> bool {
        self.watching.as_ref().is_some_and(|watching| watching.signal.is_ordered())
    }

    /// Of one fault so many are told.
    pub(super) fn period(&self) -> u64 {
        if self.is_ordered() { self.period.max(1).into() } else { 1 }
    }

    pub(super) fn lose(&mut self, trouble: String, now_us: u64) {
        self.idle.interrupt();
        (self.watching, self.trouble, self.period) = (None, Some(trouble), 0);
        self.mind.stop(now_us);
    }

    /// Saves what was learned, if anything was since the last time: bytes, and the write under way.
    pub(super) fn save(&mut self, store: &Store) -> Option<(u64, Pending)> {
        let mind = &mut self.mind;
        if !mind.dirty || mind.refused.is_some() {
            return None;
        }
        mind.dirty = false;
        let bytes = mind.predictor.to_bytes();
        let runs = mind.summary().phases.iter().map(|phase| u64::from(phase.runs)).sum();
        let length = bytes.len() as u64;
        Some((length, store.save_profile(&storage_of(self.uuid), bytes, runs, unix_ms())))
    }
}
