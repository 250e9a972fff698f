//! What the predictor holds for one VM: its runs and place in the log, and its phase.

use super::StoredSet;
use crate::access::Phase;
use crate::hybrid::Trail;
use crate::phase::PhaseSet;
use crate::record::Recording;
use crate::replay::Replay;

/// A phase that runs: recorded, and replayed if it is known.
#[derive(Debug)]
pub(super) struct ActivePhase {
    pub(super) phase: Phase,
    pub(super) recording: Recording,
    pub(super) replay: Option<Replay>,
    /// Whether its end teaches anything.
    pub(super) learned: bool,
}

#[derive(Debug)]
pub(super) struct Vm {
    pub(super) trail: Trail,
    pub(super) phase: Option<ActivePhase>,
}

impl Vm {
    pub(super) fn new(trail: Trail) -> Self {
        Self { trail, phase: None }
    }

    pub(super) fn phase_is_over(&self, at_us: u64, duration_us: u64) -> bool {
        self.phase.as_ref().is_some_and(|active| {
            active.recording.is_full() || at_us.saturating_sub(active.recording.start_us()) >= duration_us
        })
    }

    pub(super) fn running_phase(&self) -> Option<(Phase, u64)> {
        self.phase.as_ref().map(|active| (active.phase, active.recording.start_us()))
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let phase = self.phase.as_ref().map_or(0, |active| {
            active.recording.memory_bytes() + active.replay.as_ref().map_or(0, Replay::memory_bytes)
        });
        size_of::<Self>() + phase
    }
}

/// Ends the VM's phase, if one runs, and learns from it.
pub(super) fn close_phase(vm: &mut Vm, phases: &mut Vec<StoredSet>, uses: &mut u64, limit: usize, at_us: u64) {
    if let Some(mut active) = vm.phase.take() {
        active.recording.extend_to(at_us);
        learn_phase(&active, phases, uses, limit);
    }
}

/// Merges a phase's recording into its set; a set too many drives out the one unused for longest.
pub(super) fn learn_phase(active: &ActivePhase, phases: &mut Vec<StoredSet>, uses: &mut u64, limit: usize) {
    if !active.learned || active.recording.order().is_empty() {
        return;
    }
    *uses += 1;
    let position = phases.iter().position(|stored| stored.phase == active.phase).unwrap_or_else(|| {
        phases.push(StoredSet { phase: active.phase, set: PhaseSet::new(), used: *uses });
        phases.len() - 1
    });
    phases[position].set.merge(&active.recording);
    phases[position].used = *uses;
    if phases.len() > limit.max(1)
        && let Some(oldest) = (0..phases.len()).min_by_key(|&index| phases[index].used)
    {
        phases.remove(oldest);
    }
}
