//! What the loop writes down and reads back: measurements, retention, what a machine used before a restart.

use super::machine::used;
use super::{HostSettings, State};
use crate::store::demand::{Completion, Outcome};
use crate::store::series::{Reading, Samples, resolution};
use crate::store::{Store, StoreError};
use prestage_integration::api::demand::Resource;
use prestage_integration::libvirt::Uuid;
use prestage_integration::libvirt::stats::Turn;
use std::collections::HashMap;

/// Roll-ups of so many seconds are read back after a restart.
const RECALL_S: u64 = 14 * 86_400;
/// Most decisions and events kept.
const DECISIONS: u64 = 1_000_000;
const EVENTS: u64 = 1_000_000;
/// What events fill is recorded so often, seconds.
const TOLD_S: u64 = 10;

/// The subject and metric of a machine's series.
pub(crate) fn subject(uuid: Uuid) -> String {
    format!("vm:{uuid}")
}

/// What a machine used within 5 minutes each, from the roll-ups.
pub(super) fn recall(store: &Store, uuid: Uuid, now_s: u64) -> Vec<(Resource, Vec<(u64, f64)>)> {
    let of = |resource: Resource| {
        let step_s = u64::from(super::flow::COARSE_S);
        match store.series(&subject(uuid), resource.name(), now_s.saturating_sub(RECALL_S), now_s, step_s) {
            Ok(answer) => answer.points.iter().map(|point| (point.at_s, point.max)).collect(),
            Err(error) => {
                tracing::warn!(vm = %uuid, %error, "what the machine used before is not known");
                Vec::new()
            }
        }
    };
    Resource::ALL.map(|resource| (resource, of(resource))).into()
}

/// Decisions that were being carried out when the daemon was killed: nobody knows what came of them.
pub(super) fn settle_pending(store: &Store) -> Result<(), StoreError> {
    for row in store.pending_decisions()? {
        let why = "prestaged ended while it was carried out; what the machine has is measured anew".to_owned();
        let completion = Completion { outcome: Outcome::Failed, got: None, verified: false, took_ms: None, why };
        let made = &row.decision;
        drop(store.finish_decision((&made.vm, made.resource, made.at_us), completion, None));
    }
    Ok(())
}

pub(super) fn retain(store: &Store, settings: &HostSettings, now_s: u64) {
    let before_s = now_s.saturating_sub(u64::from(settings.decision_days) * 86_400);
    drop(store.retain_decisions(before_s * 1_000_000, DECISIONS));
    drop(store.retain_reservations(before_s));
    drop(store.retain_executions(now_s.saturating_sub(2 * super::catalogue::AFTER_S) * 1000));
    drop(store.retain_events(before_s * 1_000_000, EVENTS));
    let retention = crate::store::series::SeriesRetention {
        bytes: settings.series_bytes,
        ..crate::store::series::SeriesRetention::default()
    };
    drop(store.retain_series(retention, now_s));
}

/// Measurements that are not in the database yet.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    of: HashMap<(String, &'static str), (f64, Vec<Reading>)>,
}

impl Gathered {
    fn add(&mut self, subject: &str, metric: &'static str, resolution: f64, at_s: u64, value: Option<f64>) {
        let Some(value) = value else { return };
        let readings = self.of.entry((subject.to_owned(), metric)).or_insert_with(|| (resolution, Vec::new()));
        readings.1.push(Reading { at_s, value });
    }

    pub(super) fn take(&mut self, turn: &Turn, at_s: u64) {
        let host = &turn.host;
        self.add("host", "cpu", resolution::CORES, at_s, host.used_cores);
        let memory = host.memory_bytes.saturating_sub(host.memory_available_bytes) as f64;
        self.add("host", "memory", resolution::BYTES, at_s, Some(memory));
        let waits = |stall: Option<&prestage_integration::pressure::Stall>| stall.map(|stall| 100.0 * stall.some.avg10);
        if let Some(pressure) = &host.pressure {
            self.add("host", "cpu_pressure", resolution::PERCENT, at_s, waits(pressure.cpu.as_ref()));
            self.add("host", "memory_pressure", resolution::PERCENT, at_s, waits(pressure.memory.as_ref()));
            self.add("host", "io_pressure", resolution::PERCENT, at_s, waits(pressure.io.as_ref()));
        }
        let Ok(vms) = &turn.vms else { return };
        for vm in vms {
            let subject = subject(vm.vm.uuid);
            for (resource, value) in used(vm) {
                let resolution = match resource {
                    Resource::Cpu => resolution::CORES,
                    _ => resolution::BYTES,
                };
                self.add(&subject, resource.name(), resolution, at_s, value);
            }
            self.add(&subject, "cpu_delay", resolution::CORES, at_s, vm.cpu.delayed_cores);
            self.add(&subject, "vcpus", 1.0, at_s, vm.cpu.vcpus.map(f64::from));
            let bytes = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64);
            self.add(&subject, "balloon", resolution::BYTES, at_s, bytes(vm.memory.current_bytes));
            self.add(&subject, "resident", resolution::BYTES, at_s, bytes(vm.memory.resident_bytes));
            self.add(&subject, "disk_ops", resolution::OPERATIONS, at_s, vm.disk_ops());
            if let Some(pressure) = &vm.pressure {
                self.add(&subject, "cpu_pressure", resolution::PERCENT, at_s, waits(pressure.cpu.as_ref()));
                self.add(&subject, "memory_pressure", resolution::PERCENT, at_s, waits(pressure.memory.as_ref()));
                self.add(&subject, "io_pressure", resolution::PERCENT, at_s, waits(pressure.io.as_ref()));
            }
        }
    }

    /// What somebody told of machines that are measured, besides what is.
    pub(super) fn told(&mut self, state: &State, at_s: u64) {
        for machine in state.machines.values().filter(|machine| machine.seen_s == at_s) {
            let (activity, event) = state.told(machine.uuid, at_s);
            let subject = subject(machine.uuid);
            self.add(&subject, "activity", resolution::PERCENT, at_s, activity);
            if at_s.is_multiple_of(TOLD_S) {
                let percent = event.map(|share| 100.0 * share);
                self.add(&subject, "event", resolution::PERCENT, at_s, percent);
            }
        }
    }

    pub(super) fn flush(&mut self, store: &Store) {
        let batch = std::mem::take(&mut self.of).into_iter().map(|((subject, metric), (resolution, readings))| {
            Samples { subject, metric: metric.to_owned(), resolution, readings }
        });
        let batch: Vec<Samples> = batch.collect();
        if !batch.is_empty() {
            drop(store.append_series(batch));
        }
    }
}
