//! Accesses on their way to the database: gathered by disk, written as segments; and the runs of phases.

use crate::store::segment::{AccessOp as StoredOp, AccessRecord, SEGMENT_ACCESSES_MAX};
use crate::store::{Accesses, Store};
use prestage_cache::access::{Access, AccessOp};
use prestage_cache::types::PageRange;
use prestage_predictor::Phase;
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// An incomplete segment waits this long for more; a daemon that is killed loses at most so much history.
const FLUSH_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Gathered {
    storage: String,
    vm: String,
    since: Duration,
    records: Vec<AccessRecord>,
    /// The phase that runs, and since when (cache clock).
    run: Option<(Phase, Duration)>,
}

/// What the database calls a phase: `boot`, or the program's id in hexadecimal digits.
#[must_use]
pub fn program_name(phase: Phase) -> String {
    match phase {
        Phase::Boot => "boot".to_owned(),
        Phase::Program(id) => format!("{id:016x}"),
    }
}

/// Accesses not yet handed to the database, by disk.
#[derive(Debug)]
pub struct HistoryBuffer {
    by_disk: HashMap<u32, Gathered>,
    /// Unix time of the cache clock's zero, microseconds.
    epoch_us: u64,
}

impl HistoryBuffer {
    /// `now` on the cache's clock, whose zero is placed in Unix time by it.
    #[must_use]
    pub fn new(now: Duration) -> HistoryBuffer {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        HistoryBuffer { by_disk: HashMap::new(), epoch_us: super::model::micros(unix.saturating_sub(now)) }
    }

    /// A disk's accesses are kept under these names from now on.
    pub fn name(&mut self, disk: u32, storage: &str, vm: &str) {
        let (storage, vm) = (storage.to_owned(), vm.to_owned());
        let gathered = Gathered { storage, vm, since: Duration::ZERO, records: Vec::new(), run: None };
        self.by_disk.insert(disk, gathered);
    }

    /// Takes an access; one of a disk without a name is not kept.
    pub fn push(&mut self, access: &Access, store: &Store) {
        let Some(gathered) = self.by_disk.get_mut(&access.disk) else { return };
        if gathered.records.is_empty() {
            gathered.since = access.at;
        }
        let range = PageRange::covering(access.offset, u64::from(access.len));
        gathered.records.push(AccessRecord {
            at_us: self.epoch_us.saturating_add(super::model::micros(access.at)),
            op: match access.op {
                AccessOp::Read => StoredOp::Read,
                AccessOp::Write => StoredOp::Write,
                AccessOp::Discard => StoredOp::Discard,
            },
            page: range.first,
            pages: u32::try_from(range.count).unwrap_or(u32::MAX),
        });
        if gathered.records.len() >= SEGMENT_ACCESSES_MAX {
            gathered.write(store);
        }
    }

    /// The phase that a disk's machine is in as of `now`, and since when. A change ends one run and begins the next; what a run that has
    /// ended read is handed over.
    pub fn phase(&mut self, disk: u32, phase: Option<(Phase, Duration)>, now: Duration, store: &Store) {
        let Some(gathered) = self.by_disk.get_mut(&disk) else { return };
        if gathered.run == phase {
            return;
        }
        let unix_us = |at: Duration| self.epoch_us.saturating_add(super::model::micros(at));
        gathered.end_run(unix_us(phase.map_or(now, |(_, since)| since)), store);
        if let Some((phase, since)) = phase {
            drop(store.start_run(&gathered.storage, &gathered.vm, &program_name(phase), unix_us(since)));
        }
        gathered.run = phase;
    }

    /// Hands over what has waited long enough, or everything.
    pub fn flush(&mut self, now: Duration, everything: bool, store: &Store) {
        for gathered in self.by_disk.values_mut() {
            let due = now.saturating_sub(gathered.since) >= FLUSH_AFTER;
            if !gathered.records.is_empty() && (everything || due) {
                gathered.write(store);
            }
        }
    }

    /// A disk is gone: hands over what is left of it and ends its run.
    pub fn remove(&mut self, disk: u32, now: Duration, store: &Store) {
        if let Some(mut gathered) = self.by_disk.remove(&disk) {
            gathered.end_run(self.epoch_us.saturating_add(super::model::micros(now)), store);
            if !gathered.records.is_empty() {
                gathered.write(store);
            }
        }
    }
}

impl Gathered {
    fn end_run(&mut self, at_us: u64, store: &Store) {
        let Some((phase, _)) = self.run.take() else { return };
        if !self.records.is_empty() {
            self.write(store);
        }
        drop(store.end_run(&self.storage, &self.vm, &program_name(phase), at_us));
    }

    fn write(&mut self, store: &Store) {
        // The store counts what it cannot take; history is no reason to hold anything up.
        drop(store.append_accesses(Accesses {
            storage: self.storage.clone(),
            vm: self.vm.clone(),
            program: String::new(),
            records: std::mem::take(&mut self.records),
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::RunsOf;
    use prestage_cache::types::StorageId;

    #[test]
    fn phases_become_runs_with_what_was_read_in_them() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("db")).unwrap();
        let at = Duration::from_secs;
        let mut buffer = HistoryBuffer::new(at(1000));
        buffer.name(1, "file:/a", "web1");
        let read = |buffer: &mut HistoryBuffer, second, offset| {
            let op = AccessOp::Read;
            let access = Access { at: at(second), disk: 1, storage: StorageId(0), op, offset, len: 4096, waits: false };
            buffer.push(&access, &store);
        };
        let program = Phase::Program(7);
        buffer.phase(1, Some((Phase::Boot, at(1000))), at(1001), &store);
        read(&mut buffer, 1002, 0);
        // Told again and again while it lasts.
        buffer.phase(1, Some((Phase::Boot, at(1000))), at(1003), &store);
        buffer.phase(1, Some((program, at(1010))), at(1011), &store);
        read(&mut buffer, 1012, 8192);
        buffer.phase(1, None, at(1020), &store);
        read(&mut buffer, 1021, 65_536);
        buffer.phase(1, Some((Phase::Boot, at(1030))), at(1030), &store);
        buffer.remove(1, at(1040), &store);
        assert!(store.close(Duration::from_secs(60)));

        let runs = store.runs(RunsOf { storage: Some("file:/a"), vm: Some("web1"), program: None }, 9).unwrap();
        let told: Vec<_> = runs
            .iter()
            .map(|run| (run.program.as_str(), (run.ended_us.unwrap() - run.started_us) / 1_000_000))
            .collect();
        assert_eq!(told, [("boot", 10), ("0000000000000007", 10), ("boot", 10)]);
        let pages = |run| store.run_reads(run, 9).unwrap().extents.iter().map(|extent| extent.page).collect::<Vec<_>>();
        assert_eq!([pages(&runs[2]), pages(&runs[1]), pages(&runs[0])], [vec![0], vec![2], vec![]]);
    }
}
