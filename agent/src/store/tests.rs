//! What the database promises, with SQLite and a real file below it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use prestage_integration::api::Counters;
use proptest::prelude::*;

use super::segment::{AccessOp, AccessRecord};
use super::*;

const MS: u64 = 1_700_000_000_000;

fn accesses(storage: &str, vm: &str, at_us: u64, count: u64) -> Accesses {
    let record =
        |n| AccessRecord { at_us: at_us + n * 97, op: AccessOp::Read, page: n * n * 7919 % 1_000_003, pages: 1 };
    Accesses {
        storage: storage.to_owned(),
        vm: vm.to_owned(),
        program: "boot".to_owned(),
        records: (0..count).map(record).collect(),
    }
}

fn disk(name: &str) -> DiskRow {
    DiskRow { name: name.to_owned(), store: format!("/srv/{name}"), added_unix_ms: MS, ..DiskRow::default() }
}

/// A long limit: tests end by the event, not by the clock.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn what_was_written_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state/prestage.db");
    let store = Store::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    store.save_profile("file:/a", vec![1; 1000], 1, MS).wait().unwrap();
    store.save_profile("file:/a", vec![2; 2000], 2, MS + 1).wait().unwrap();
    store.append_accesses(accesses("file:/a", "web1", 5_000_000, 1000)).wait().unwrap();
    store.append_accesses(accesses("file:/a", "web2", 1_000_000, 10)).wait().unwrap();
    store.append_accesses(accesses("file:/b", "web1", 5_000_000, 10)).wait().unwrap();
    let attached = DiskRow {
        vm: Some("uuid".into()),
        target: Some("vda".into()),
        serial: Some("disk-1".into()),
        socket: Some("/s".into()),
        read_only: true,
        ..disk("web1")
    };
    store.add_disk(attached.clone()).wait().unwrap();
    let half = Counters { reads: 5, accesses_dropped: 1, ..Counters::default() };
    store.add_outcome(7, "web1", half).wait().unwrap();
    store.add_outcome(7, "web1", half).wait().unwrap();
    store.add_outcome(8, "web2", half).wait().unwrap();
    assert!(store.close(LONG));
    assert_eq!(store.add_disk(disk("late")).wait(), Err(StoreError::Closed));
    drop(store);
    assert!(!path.with_file_name("prestage.db-wal").exists(), "a clean stop folds the log in");

    let store = Store::open(&path).unwrap();
    let (row, data) = store.profile("file:/a").unwrap().unwrap();
    assert_eq!((row.runs, row.saved_unix_ms, row.size_bytes), (2, MS + 1, 2000));
    assert_eq!(data, vec![2; 2000]);
    assert_eq!(store.profile("file:/b").unwrap(), None);
    assert_eq!(store.profiles().unwrap(), std::slice::from_ref(&row));
    assert_eq!(store.storage_id("file:/a").unwrap(), Some(row.id));
    assert_eq!(store.disks().unwrap(), [attached]);

    let rows = store.segments("file:/a", None, 0, u64::MAX).unwrap();
    assert_eq!(
        rows.iter().map(|row| (row.vm.as_str(), row.accesses)).collect::<Vec<_>>(),
        [("web2", 10), ("web1", 1000)]
    );
    assert_eq!(store.segments("file:/a", Some("web1"), 0, 4_999_999).unwrap(), []);
    let found = store.segments("file:/a", Some("web1"), 5_010_000, 5_020_000).unwrap();
    assert_eq!(store.segment(found[0].id).unwrap(), accesses("file:/a", "web1", 5_000_000, 1000).records);
    assert!(matches!(store.segment(999), Err(StoreError::NotFound { .. })));

    let outcomes = store.outcomes(Some("web1"), 0, 100).unwrap();
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0].counters, Counters { reads: 10, accesses_dropped: 2, ..Counters::default() });
    assert_eq!(store.outcomes(None, 7, 8).unwrap().len(), 2);

    store.remove_profile("file:/a").wait().unwrap();
    assert!(matches!(store.remove_profile("file:/a").wait(), Err(StoreError::NotFound { .. })));
    assert_eq!(store.storage_id("file:/a").unwrap(), Some(row.id), "the number outlives the profile");
    store.remove_disk("web1").wait().unwrap();
    assert!(store.disks().unwrap().is_empty());
    assert_eq!(store.condition().degraded, None);
}

#[test]
fn every_counter_has_a_column() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("db")).unwrap();
    let mut json = serde_json::Map::new();
    for (at, (name, _)) in Counters::default().fields().into_iter().enumerate() {
        json.insert(name.to_owned(), (at as u64 + 1).into());
    }
    let all: Counters = serde_json::from_value(json.into()).unwrap();
    store.add_outcome(1, "d", all).wait().unwrap();
    assert_eq!(store.outcomes(None, 1, 1).unwrap()[0].counters, all);
}

#[test]
fn a_refused_request_does_not_undo_its_neighbours() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    // Held by another process, so that all three are in the queue and one transaction takes them.
    let lock = Connection::open(&path).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    let pending = [disk("a"), disk("a"), disk("b")].map(|disk| store.add_disk(disk));
    lock.execute_batch("COMMIT").unwrap();
    let [first, second, third] = pending.map(Pending::wait);
    assert_eq!((first, third), (Ok(()), Ok(())));
    assert_eq!(second, Err(StoreError::AlreadyExists { what: "disk", name: "a".into() }));
    assert_eq!(store.disks().unwrap().len(), 2);
    assert_eq!(store.condition().writes_dropped, 0);
    let error = store.append_accesses(accesses("s", "vm", 0, 0)).wait().unwrap_err();
    assert!(matches!(error, StoreError::Segment(_)), "{error:?}");
    let condition = store.condition();
    assert_eq!((condition.writes_dropped, condition.degraded), (1, None));
}

#[test]
fn a_locked_database_stalls_no_caller_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let options = StoreOptions { queue: 4, busy_timeout: Duration::from_millis(50), ..StoreOptions::default() };
    let store = Store::open_with(&path, options).unwrap();
    let lock = Connection::open(&path).unwrap();
    lock.execute_batch("BEGIN EXCLUSIVE").unwrap();
    let pending: Vec<Pending> = (0..100).map(|n| store.add_disk(disk(&format!("d{n}")))).collect();
    let errors: Vec<StoreError> = pending.into_iter().filter_map(|pending| pending.wait().err()).collect();
    assert_eq!(errors.len(), 100);
    assert!(errors.iter().any(|error| matches!(error, StoreError::QueueFull { .. })));
    assert!(errors.iter().any(|error| matches!(error, StoreError::Locked { .. })), "{errors:?}");
    let condition = store.condition();
    assert_eq!((condition.queued, condition.writes_dropped), (0, 100));
    assert!(condition.degraded.unwrap().contains("database"));
    lock.execute_batch("COMMIT").unwrap();
    store.add_disk(disk("after")).wait().unwrap();
    assert_eq!(store.condition().degraded, None);
    assert_eq!(store.disks().unwrap().len(), 1);
}

#[test]
fn the_queue_is_bounded_in_bytes_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open_with(&path, StoreOptions { queue_bytes: 1000, ..StoreOptions::default() }).unwrap();
    let lock = Connection::open(&path).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    let first = store.save_profile("a", vec![0; 5000], 1, MS);
    let second = store.save_profile("b", vec![0; 600], 1, MS);
    lock.execute_batch("COMMIT").unwrap();
    assert_eq!(first.wait(), Ok(()), "one larger than the bound still gets through alone");
    assert_eq!(second.wait(), Err(StoreError::QueueFull { path }));
}

#[test]
fn a_full_disk_loses_the_large_write_and_keeps_the_small() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("db")).unwrap();
    store.save_profile("before", vec![7; 5000], 1, MS).wait().unwrap();
    store.leave_room(2).wait().unwrap();
    let error = store.save_profile("large", vec![7; 1_000_000], 1, MS).wait().unwrap_err();
    assert!(matches!(error, StoreError::Full { .. }), "{error:?}");
    assert!(error.to_string().contains("no space left; free some"), "{error}");
    assert!(store.condition().degraded.unwrap().contains("no space left"));
    assert_eq!(store.condition().writes_dropped, 1);
    // Together in one transaction, which fails as a whole; then each alone.
    let lock = Connection::open(folder.path().join("db")).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    let large = store.save_profile("large", vec![7; 1_000_000], 1, MS);
    let small = store.add_disk(disk("small"));
    lock.execute_batch("COMMIT").unwrap();
    assert!(large.wait().is_err());
    assert_eq!(small.wait(), Ok(()));
    assert_eq!(store.profiles().unwrap().len(), 1);
    assert_eq!(store.profile("before").unwrap().unwrap().1, vec![7; 5000]);
}

#[test]
fn retention_takes_the_oldest_and_gives_the_space_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    let hour_us = 3_600_000_000;
    let now_us = MS * 1000;
    for age in (1..=40).rev() {
        store.append_accesses(accesses("s", "vm", now_us - age * hour_us, 20_000)).wait().unwrap();
    }
    let old_hour = MS / 3_600_000 - 24 * 500;
    store.add_outcome(old_hour, "d", Counters::default()).wait().unwrap();
    let before = store.history(MS * 1000).unwrap();
    assert_eq!(before.segments, 40);
    let keep = Retention { age: Duration::from_secs(3600 * 30), bytes: u64::MAX };
    store.retain(keep, MS).wait().unwrap();
    // The thirtieth began 30 h ago and ended a little later.
    assert_eq!(store.history(MS * 1000).unwrap().segments, 30);
    assert!(store.outcomes(None, 0, u64::MAX).unwrap().is_empty());
    let all = store.segments("s", None, 0, u64::MAX).unwrap();
    let bytes = store.history(now_us).unwrap().size_bytes() / 6;
    store.retain(Retention { bytes, ..keep }, MS).wait().unwrap();
    let newest = store.segments("s", None, 0, u64::MAX).unwrap();
    assert_eq!(newest, all[all.len() - newest.len()..]);
    assert!((3..=5).contains(&newest.len()), "{} of 30", newest.len());
    assert!(store.history(now_us).unwrap().size_bytes() <= bytes);
    assert!(store.close(LONG));
    let size = std::fs::metadata(&path).unwrap().len();
    assert!(size < before.data_bytes / 2, "{size} bytes on disk for {bytes} of history, {} before", before.data_bytes);
}

#[test]
fn other_files_are_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    drop(Store::open(&path).unwrap());
    let raw = Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    drop(raw);
    let error = Store::open(&path).unwrap_err();
    assert_eq!(error, StoreError::Newer { path: path.clone(), found: 99, known: schema::VERSION });
    assert!(
        error.to_string().contains(&format!(
            "is of version 99, this prestaged knows up to {}; install the newer prestaged",
            schema::VERSION
        )),
        "{error}"
    );

    let foreign = folder.path().join("foreign");
    Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
    assert_eq!(Store::open(&foreign).unwrap_err(), StoreError::Foreign { path: foreign });

    let garbage = folder.path().join("garbage");
    std::fs::write(&garbage, vec![b'x'; 8192]).unwrap();
    let error = Store::open(&garbage).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    assert!(error.to_string().contains("move it aside with"), "{error}");

    assert!(matches!(Store::open(folder.path()), Err(StoreError::Refused { .. })));
}

#[test]
fn a_damaged_profile_table_is_found_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    for n in 0..50 {
        store.save_profile(&format!("s{n}"), vec![n; 3000], 1, MS).wait().unwrap();
    }
    assert!(store.close(LONG));
    drop(store);
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    // Everything behind the schema's page, as a disk that lost its writes would leave it.
    bytes[4096 * 8..end].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
}

const CHILD: &str = "PRESTAGE_STORE_TEST_CHILD";

/// Not a test of its own: the process that the next one kills.
#[test]
#[ignore = "writes until it is killed; started by kill_9_in_mid_write_loses_nothing_acknowledged"]
fn child_that_writes_until_killed() {
    let path = std::env::var_os(CHILD).expect("the parent sets the path");
    let store = Store::open(Path::new(&path)).unwrap();
    for n in 0.. {
        let profile = store.save_profile("s", vec![n as u8; 20_000 + n % 5000], n as u64, MS);
        let segment = store.append_accesses(accesses("s", "vm", n as u64 * 1_000_000, 3000));
        profile.wait().unwrap();
        segment.wait().unwrap();
        println!("acknowledged {n}");
    }
}

#[test]
fn kill_9_in_mid_write_loses_nothing_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let mut already = 0;
    for round in 1..=5u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["store::tests::child_that_writes_until_killed", "--exact", "--ignored", "--nocapture"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut acknowledged = 0u64;
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while acknowledged < 3 + round {
            let line = lines.next().expect("the child writes on").unwrap();
            // The test runner's own text may stand before it on the line.
            if let Some((_, number)) = line.split_once("acknowledged ") {
                acknowledged = number.parse::<u64>().unwrap() + 1;
            }
        }
        // It goes on writing while it is killed.
        child.kill().unwrap();
        child.wait().unwrap();

        let raw = Connection::open(&path).unwrap();
        let verdict: String = raw.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(verdict, "ok");
        drop(raw);
        let store = Store::open(&path).unwrap();
        let (row, data) = store.profile("s").unwrap().unwrap();
        assert!(row.runs + 1 >= acknowledged);
        assert_eq!(data, vec![row.runs as u8; 20_000 + row.runs as usize % 5000]);
        let segments = store.segments("s", None, 0, u64::MAX).unwrap();
        let accesses: usize = segments.iter().map(|row| store.segment(row.id).unwrap().len()).sum();
        assert_eq!(accesses % 3000, 0);
        assert!(accesses as u64 / 3000 >= already + acknowledged);
        already = accesses as u64 / 3000;
        assert!(store.close(LONG));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Save(u8, Vec<u8>),
    Forget(u8),
    Add(u8),
    Remove(u8),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4u8, prop::collection::vec(any::<u8>(), 0..5000)).prop_map(|(n, data)| Step::Save(n, data)),
        (0..4u8).prop_map(Step::Forget),
        (0..4u8).prop_map(Step::Add),
        (0..4u8).prop_map(Step::Remove),
        Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_order_of_writes_and_restarts_is_as_a_map_would_have_it(steps in prop::collection::vec(step(), 1..20)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let mut store = Store::open(&path).unwrap();
        let mut profiles: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut disks: BTreeMap<String, DiskRow> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Save(n, data) => {
                    store.save_profile(&n.to_string(), data.clone(), 1, MS).wait().unwrap();
                    profiles.insert(n.to_string(), data);
                }
                Step::Forget(n) => {
                    let known = profiles.remove(&n.to_string()).is_some();
                    prop_assert_eq!(store.remove_profile(&n.to_string()).wait().is_ok(), known);
                }
                Step::Add(n) => {
                    let fresh = !disks.contains_key(&n.to_string());
                    prop_assert_eq!(store.add_disk(disk(&n.to_string())).wait().is_ok(), fresh);
                    disks.insert(n.to_string(), disk(&n.to_string()));
                }
                Step::Remove(n) => {
                    let known = disks.remove(&n.to_string()).is_some();
                    prop_assert_eq!(store.remove_disk(&n.to_string()).wait().is_ok(), known);
                }
                Step::Restart => {
                    prop_assert!(store.close(LONG));
                    store = Store::open(&path).unwrap();
                }
            }
            let held: BTreeMap<String, Vec<u8>> = store.profiles().unwrap().into_iter()
                .map(|row| { let data = store.profile(&row.storage).unwrap().unwrap().1; (row.storage, data) }).collect();
            prop_assert_eq!(&held, &profiles);
            prop_assert_eq!(store.disks().unwrap(), disks.values().cloned().collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_database_that_is_removed_while_it_is_in_use_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = Store::open(&path).unwrap();
    assert_eq!(store.condition().degraded, None);
    std::fs::remove_file(&path).unwrap();
    assert!(store.condition().degraded.unwrap().contains("removed or replaced"));
    std::fs::write(&path, "another").unwrap();
    assert!(store.condition().degraded.is_some());
}
