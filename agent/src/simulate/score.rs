//! What is counted.

use super::host::MemoryBy;
use super::policy::Seen;
use serde::Serialize;

/// One contestant's month, summed over machines.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Score {
    /// Machine-days counted: machines on, demand measured.
    pub vm_days: f64,
    /// Minutes in which demand exceeded what was there, a machine-day.
    pub cpu_violation_min: f64,
    pub memory_violation_min: f64,
    /// Minutes in which either did.
    pub violation_min: f64,
    /// Given, in existence and not used.
    pub core_hours_unused: f64,
    pub gib_hours_unused: f64,
    /// Used.
    pub core_hours_used: f64,
    pub gib_hours_used: f64,
    /// Wanted and not had: how deep violations were.
    pub core_hours_short: f64,
    pub gib_hours_short: f64,
    /// Changes asked for, a machine-hour, of both resources.
    pub changes_per_vm_hour: f64,
    /// Times that demand for memory exceeded what was given by more than a tenth for 10 s or longer: a guest without
    /// swap would have killed something.
    pub oom_like: u64,
    /// Of these, while all machines together wanted more memory than the host has.
    pub oom_like_host_short: u64,
    /// Of the others, those that lacked more from the start than can come within that time.
    pub oom_like_out_of_reach: u64,
}

/// Seconds of violation that make an OOM.
const OOM_S: f64 = 10.0;
const OOM_MARGIN: f64 = 1.1;
const GIB: f64 = 1073741824.0;

/// Sums in seconds; [`Tally::score`] makes rates of them.
#[derive(Debug, Clone)]
pub(super) struct Tally {
    score: Score,
    vm_s: f64,
    changes: u64,
    starved_s: Vec<f64>,
    /// Whether what was lacking when this began was too much to come in time.
    far: Vec<bool>,
    within_reach: f64,
    /// Seconds of violation by machine, either resource.
    pub(super) by_vm_s: Vec<f64>,
    /// Seconds counted by machine.
    pub(super) counted_s: Vec<f64>,
}

/// A machine's second or more.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) seconds: f64,
    pub(super) cpu_short: bool,
    pub(super) memory_short: bool,
    pub(super) cpu_missing: f64,
    pub(super) memory_missing: f64,
    pub(super) memory_demand: f64,
    pub(super) host_short: bool,
}

impl Tally {
    pub(super) fn new(machines: usize, by: MemoryBy) -> Self {
        Self {
            score: Score::default(),
            vm_s: 0.0,
            changes: 0,
            starved_s: vec![0.0; machines],
            far: vec![false; machines],
            within_reach: by.comes_in(OOM_S),
            by_vm_s: vec![0.0; machines],
            counted_s: vec![0.0; machines],
        }
    }

    pub(super) fn machine(&mut self, vm: usize, moment: &Moment, seen: &Seen) {
        let Moment { seconds, cpu_short, memory_short, .. } = *moment;
        self.vm_s += seconds;
        self.counted_s[vm] += seconds;
        let minutes = seconds / 60.0;
        self.score.cpu_violation_min += if cpu_short { minutes } else { 0.0 };
        self.score.memory_violation_min += if memory_short { minutes } else { 0.0 };
        if cpu_short || memory_short {
            self.score.violation_min += minutes;
            self.by_vm_s[vm] += seconds;
        }
        self.score.core_hours_used += seen.cpu.used * seconds / 3600.0;
        self.score.gib_hours_used += seen.memory.used * seconds / 3600.0 / GIB;
        self.score.core_hours_short += moment.cpu_missing * seconds / 3600.0;
        self.score.gib_hours_short += moment.memory_missing * seconds / 3600.0 / GIB;
        let starved = &mut self.starved_s[vm];
        let lacks = moment.memory_demand / OOM_MARGIN - seen.memory.have;
        if lacks > 0.0 {
            if *starved == 0.0 {
                self.far[vm] = lacks > self.within_reach;
            }
            if *starved < OOM_S && *starved + seconds >= OOM_S {
                self.score.oom_like += 1;
                self.score.oom_like_host_short += u64::from(moment.host_short);
                self.score.oom_like_out_of_reach += u64::from(self.far[vm] && !moment.host_short);
            }
            *starved += seconds;
        } else {
            *starved = 0.0;
        }
    }

    pub(super) fn host(&mut self, seconds: f64, cores_unused: f64, bytes_unused: f64) {
        self.score.core_hours_unused += cores_unused * seconds / 3600.0;
        self.score.gib_hours_unused += bytes_unused * seconds / 3600.0 / GIB;
    }

    pub(super) fn changed(&mut self) {
        self.changes += 1;
    }

    pub(super) fn score(&self) -> Score {
        let days = (self.vm_s / 86_400.0).max(1e-9);
        let a_day = |minutes: f64| minutes / days;
        Score {
            vm_days: self.vm_s / 86_400.0,
            cpu_violation_min: a_day(self.score.cpu_violation_min),
            memory_violation_min: a_day(self.score.memory_violation_min),
            violation_min: a_day(self.score.violation_min),
            changes_per_vm_hour: self.changes as f64 / (24.0 * days),
            ..self.score
        }
    }
}
