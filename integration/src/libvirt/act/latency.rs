//! How long changes took: what a forecast has to look ahead by.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use uuid::Uuid;

use super::change::{Done, Kind, Outcome, Setting};

/// Changes remembered for each VM, kind and direction. A forecast's horizon should follow how things are now.
const REMEMBERED: usize = 32;

/// The last changes' times.
#[derive(Debug, Clone, Default)]
pub struct Latency {
    last: VecDeque<Duration>,
}

impl Latency {
    pub fn record(&mut self, took: Duration) {
        if self.last.len() == REMEMBERED {
            self.last.pop_front();
        }
        self.last.push_back(took);
    }

    /// How many are remembered.
    pub fn count(&self) -> usize {
        self.last.len()
    }

    /// The smallest time that at least a share `q` of the changes did not exceed (nearest rank); `None` before the first.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let mut sorted: Vec<_> = self.last.iter().copied().collect();
        sorted.sort_unstable();
        let rank = (q.clamp(0.0, 1.0) * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }
}

/// Latencies of all VMs, learned from what was done.
#[derive(Debug, Clone, Default)]
pub struct Latencies {
    known: HashMap<(Uuid, Kind, bool), Latency>,
}

impl Latencies {
    /// Learns from a change. One that came half-way within its time counts with that time: it takes at least as long. What
    /// did nothing teaches nothing.
    pub fn learn(&mut self, done: &Done) {
        if matches!(done.outcome, Outcome::Reached | Outcome::Partial) {
            self.known.entry((done.vm, done.kind, grows(done))).or_default().record(done.took);
        }
    }

    /// The quantile `q` for a VM, a kind and a direction; `None` where nothing was learned.
    pub fn quantile(&self, vm: Uuid, kind: Kind, grows: bool, q: f64) -> Option<Duration> {
        self.known.get(&(vm, kind, grows))?.quantile(q)
    }

    /// Forgets a VM.
    pub fn forget(&mut self, vm: Uuid) {
        self.known.retain(|(uuid, ..), _| *uuid != vm);
    }
}

/// Whether the change was one to more.
fn grows(done: &Done) -> bool {
    match (&done.before, &done.got) {
        (Setting::Memory(a) | Setting::Balloon(a), Setting::Memory(b) | Setting::Balloon(b)) => b > a,
        (Setting::MemoryDevice { bytes: a, .. }, Setting::MemoryDevice { bytes: b, .. }) => b > a,
        (Setting::Vcpus(a), Setting::Vcpus(b)) => b > a,
        // The others take effect at once, either way.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_last_changes() {
        let mut latency = Latency::default();
        assert_eq!(latency.quantile(0.5), None);
        for ms in 1..=100 {
            latency.record(Duration::from_millis(ms));
        }
        assert_eq!(latency.count(), REMEMBERED);
        let quantile = |q| latency.quantile(q).unwrap().as_millis();
        assert_eq!((quantile(0.0), quantile(0.5), quantile(0.9), quantile(1.0)), (69, 84, 97, 100));
    }

    #[test]
    fn directions_and_failures_are_told_apart() {
        let done = |before, got, seconds, outcome| Done {
            vm: Uuid::from_u128(1),
            kind: Kind::Balloon,
            before: Setting::Balloon(before),
            asked: Setting::Balloon(got),
            got: Setting::Balloon(got),
            took: Duration::from_secs(seconds),
            outcome,
            verified: true,
            why: String::new(),
        };
        let mut latencies = Latencies::default();
        latencies.learn(&done(5, 9, 1, Outcome::Reached));
        latencies.learn(&done(9, 5, 7, Outcome::Partial));
        latencies.learn(&done(9, 9, 99, Outcome::Unchanged));
        let vm = Uuid::from_u128(1);
        assert_eq!(latencies.quantile(vm, Kind::Balloon, true, 0.9), Some(Duration::from_secs(1)));
        assert_eq!(latencies.quantile(vm, Kind::Balloon, false, 0.9), Some(Duration::from_secs(7)));
        assert_eq!(latencies.quantile(vm, Kind::Vcpus, true, 0.9), None);
        latencies.forget(vm);
        assert_eq!(latencies.quantile(vm, Kind::Balloon, true, 0.9), None);
    }
}
