//! The figures of a boot, and the JSON file they are written to.

use std::path::Path;

use anyhow::{Context, Result};
use prestage_tests::accelerator::Accelerator;
use prestage_tests::daemon::Counters;
use prestage_tests::report::Figures;
use prestage_tests::store::Traffic;
use serde::Serialize;

use crate::host::Host;

/// A whole run, as written to `run.json`.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) host: Host,
    pub(crate) accelerator: Accelerator,
    /// The store and its delay, in words.
    pub(crate) store: String,
    pub(crate) boots: Vec<Boot>,
}

impl Run {
    pub(crate) fn boot(&self, name: BootName) -> Option<&Boot> {
        self.boots.iter().find(|boot| boot.name == name)
    }
}

/// Writes a run's file anew, by renaming, so that an interrupted run leaves what it had measured before.
pub(crate) fn write_json(run: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(run)?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let half = path.with_extension("json.tmp");
    std::fs::write(&half, text + "\n").with_context(|| format!("cannot write {}", half.display()))?;
    std::fs::rename(&half, path).with_context(|| format!("cannot write {}", path.display()))
}

/// The four ways to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BootName {
    /// From the slow store, without prestaged
    Straight,
    /// Through prestaged that knows nothing
    Unlearned,
    /// With what it learned in the boot before and nothing cached
    Learned,
    /// With the SSD tier kept over a restart
    Warm,
}

impl BootName {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Straight => "straight",
            Self::Unlearned => "unlearned",
            Self::Learned => "learned",
            Self::Warm => "warm",
        }
    }
}

/// Everything known at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// The guest's own figures.
    pub(crate) guest: Figures,
    /// The daemon's counters; none in a straight boot.
    pub(crate) daemon: Option<Counters>,
    /// The store's own count; none for a store that is not ours.
    pub(crate) store: Option<Traffic>,
}

/// What happened between two samples.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Phase {
    /// Guest read requests, by the guest's count.
    pub(crate) reads: u64,
    pub(crate) served_ram: u64,
    pub(crate) served_ssd: u64,
    pub(crate) served_store: u64,
    /// Time all reads waited together, by the guest's count.
    pub(crate) read_wait_s: f64,
    /// Time during which the guest waited for at least one read.
    pub(crate) read_busy_s: f64,
    pub(crate) guest_read_bytes: u64,
    pub(crate) store_read_bytes: u64,
    pub(crate) prefetched_bytes: u64,
    pub(crate) prefetch_used_bytes: u64,
    /// Reads that waited for a prefetch in flight; part of `served_store`.
    pub(crate) prefetch_late: u64,
}

fn seconds(ms: u64) -> f64 {
    std::time::Duration::from_millis(ms).as_secs_f64()
}

impl Phase {
    pub(crate) fn between(before: &Sample, after: &Sample) -> Self {
        let guest = after.guest.since(&before.guest);
        let daemon = match (before.daemon, after.daemon) {
            (Some(before), Some(after)) => Some(after.since(&before)),
            _ => None,
        };
        let store = match (before.store, after.store) {
            (Some(before), Some(after)) => Some(after.since(&before)),
            _ => None,
        };
        // straight: whatever the guest reads, it waits for the store
        let counters = daemon.unwrap_or(Counters {
            served_store: guest.reads,
            store_read_bytes: guest.read_bytes,
            ..Counters::default()
        });
        Self {
            reads: guest.reads,
            served_ram: counters.served_ram,
            served_ssd: counters.served_ssd,
            served_store: counters.served_store,
            read_wait_s: seconds(guest.read_wait_ms),
            read_busy_s: seconds(guest.busy_ms),
            guest_read_bytes: guest.read_bytes,
            store_read_bytes: store.map_or(counters.store_read_bytes, |traffic| traffic.read_bytes),
            prefetched_bytes: counters.prefetch_completed_bytes,
            prefetch_used_bytes: counters.prefetch_used_bytes,
            prefetch_late: counters.prefetch_late,
        }
    }

    /// Share of the read requests served without waiting for the store, by the daemon's count; `None` without reads.
    pub(crate) fn without_store(&self) -> Option<f64> {
        let served = self.served_ram + self.served_ssd + self.served_store;
        ratio(self.served_ram + self.served_ssd, served)
    }

    /// Share of the prefetched bytes that the guest read; `None` where nothing was prefetched.
    pub(crate) fn precision(&self) -> Option<f64> {
        ratio(self.prefetch_used_bytes, self.prefetched_bytes)
    }
}

/// `part / whole`, `None` for an empty whole. Counts of requests and bytes stay far below 2^53.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// One boot: boot and program together, and each alone.
#[derive(Debug, Serialize)]
pub(crate) struct Boot {
    pub(crate) name: BootName,
    /// From the start of the domain to the end of the guest's boot, by the host's clock.
    pub(crate) ready_s: f64,
    /// The same by the guest's clock, from the start of its kernel.
    pub(crate) ready_uptime_s: f64,
    pub(crate) program_s: f64,
    #[serde(flatten)]
    pub(crate) total: Phase,
    /// Share of prefetched bytes that were used.
    pub(crate) precision: Option<f64>,
    /// Share of reads served without waiting for the store.
    pub(crate) without_store: Option<f64>,
    pub(crate) boot: Phase,
    pub(crate) program: Phase,
}

impl Boot {
    /// From samples at the domain's start, at the end of its boot and at the end of the program.
    pub(crate) fn new(name: BootName, ready_s: f64, program_s: f64, samples: [&Sample; 3]) -> Self {
        let [start, ready, end] = samples;
        let total = Phase::between(start, end);
        Self {
            name,
            ready_s,
            ready_uptime_s: ready.guest.uptime().as_secs_f64(),
            program_s,
            total,
            precision: total.precision(),
            without_store: total.without_store(),
            boot: Phase::between(start, ready),
            program: Phase::between(ready, end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(reads: u64, daemon: Option<Counters>, store: Option<Traffic>) -> Sample {
        let guest =
            Figures { reads, read_bytes: reads * 4096, read_wait_ms: reads * 5, uptime_ms: 1000, ..Figures::default() };
        Sample { guest, daemon, store }
    }

    #[test]
    fn a_straight_boot_waits_for_every_read() {
        let phase = Phase::between(&sample(0, None, None), &sample(10, None, None));
        assert_eq!((phase.reads, phase.served_store, phase.store_read_bytes), (10, 10, 40960));
        assert_eq!((phase.without_store(), phase.precision()), (Some(0.0), None));
    }

    #[test]
    fn the_stores_own_count_goes_before_the_daemons() {
        let counters = Counters { served_ram: 9, served_store: 1, store_read_bytes: 1, ..Counters::default() };
        let traffic = Traffic { read_bytes: 70_000, ..Traffic::default() };
        let start = sample(0, Some(Counters::default()), Some(Traffic::default()));
        let phase = Phase::between(&start, &sample(10, Some(counters), Some(traffic)));
        assert_eq!((phase.store_read_bytes, phase.without_store()), (70_000, Some(0.9)));
    }

    #[test]
    fn the_file_has_the_promised_keys() {
        let start = sample(0, None, None);
        let (ready, end) = (sample(10, None, None), sample(15, None, None));
        let boot = Boot::new(BootName::Straight, 12.0, 3.0, [&start, &ready, &end]);
        let json = serde_json::to_value(&boot).unwrap();
        for key in [
            "name",
            "ready_s",
            "program_s",
            "reads",
            "served_ram",
            "served_ssd",
            "served_store",
            "read_wait_s",
            "guest_read_bytes",
            "store_read_bytes",
            "prefetched_bytes",
            "prefetch_used_bytes",
        ] {
            assert!(json.get(key).is_some(), "{key} in {json}");
        }
        assert_eq!(json["name"], "straight");
        assert_eq!((json["reads"].as_u64(), json["boot"]["reads"].as_u64()), (Some(15), Some(10)));
    }
}
