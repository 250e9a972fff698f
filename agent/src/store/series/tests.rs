//! What series promise: against a naive store of all samples, over restarts, damage and retention.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use rusqlite::Connection;

use super::*;
use crate::store::{Pending, Store, StoreError};

const LONG: Duration = Duration::from_secs(60);
/// The beginning of an hour, a half day and eight days at once.
const T: u64 = 691_200 * 2500;

fn samples(subject: &str, metric: &str, resolution: f64, readings: &[(u64, f64)]) -> Samples {
    let reading = |&(at_s, value): &(u64, f64)| Reading { at_s, value };
    Samples {
        subject: subject.to_owned(),
        metric: metric.to_owned(),
        resolution,
        readings: readings.iter().map(reading).collect(),
    }
}

fn open(path: &Path) -> Store {
    Store::open(path).unwrap()
}

/// Ten seconds a batch from `T` on, one sample a second, of a machine's processor and memory.
fn fill(store: &Store, seconds: std::ops::Range<u64>) {
    fill_by(store, seconds, 10);
}

fn fill_by(store: &Store, seconds: std::ops::Range<u64>, batch: u64) {
    let mut last: Option<Pending> = None;
    for begin in seconds.step_by(batch as usize) {
        let readings = |f: fn(u64) -> f64| (begin..begin + batch).map(|n| (T + n, f(n))).collect::<Vec<_>>();
        let cpu = samples("vm:a", "cpu", resolution::CORES, &readings(|n| (n % 4000) as f64 / 1000.0));
        let memory = samples("vm:a", "memory", resolution::BYTES, &readings(|n| (n / 60 * 4096) as f64));
        // The queue is bounded.
        if let Some(last) = last.replace(store.append_series(vec![cpu, memory])) {
            last.wait().unwrap();
        }
    }
    last.unwrap().wait().unwrap();
}

#[test]
fn samples_are_there_at_once_rolled_up_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = open(&path);
    assert_eq!(store.series("vm:a", "cpu", 0, u64::MAX, 1).unwrap(), Answer::default());
    assert_eq!(store.latest("vm:a", "cpu").unwrap(), None);
    fill(&store, 0..10);
    assert_eq!(store.latest("vm:a", "cpu").unwrap(), Some((T + 9, 0.009)));
    fill(&store, 10..9000);
    for store in [store.clone(), {
        assert!(store.close(LONG));
        open(&path)
    }] {
        let by_second = store.series("vm:a", "cpu", T, T + 9000, 1).unwrap();
        assert_eq!((by_second.points.len(), by_second.damaged), (9000, 0));
        for (n, point) in (0u64..).zip(&by_second.points) {
            let value = (n % 4000) as f64 / 1000.0;
            let want = Point { at_s: T + n, step_s: 1, count: 1, min: value, mean: value, max: value };
            assert_eq!(*point, want);
        }
        for (step, points) in [(10, 900), (15, 900), (60, 150), (300, 30), (3600, 3), (7200, 2)] {
            let answer = store.series("vm:a", "cpu", 0, u64::MAX, step).unwrap();
            let step = step - step % if step < 300 { 10 } else { 1 };
            assert_eq!(answer.points.len(), points, "{step}");
            for point in &answer.points {
                let from = point.at_s - T;
                let values: Vec<f64> = (from..(from + step).min(9000)).map(|n| (n % 4000) as f64 / 1000.0).collect();
                let (min, max) =
                    (values.iter().copied().fold(9.0, f64::min), values.iter().copied().fold(0.0, f64::max));
                let mean = values.iter().sum::<f64>() / values.len() as f64;
                assert_eq!((point.step_s, point.count, point.min, point.max), (step, values.len() as u64, min, max));
                // A step of an hour came in by ten minutes and was rounded each time.
                assert!((point.mean - mean).abs() < 0.006, "{point:?} {mean}");
            }
        }
        let part = store.series("vm:a", "memory", T + 8000, T + 8003, 1).unwrap();
        assert_eq!(part.points.iter().map(|point| point.at_s - T).collect::<Vec<_>>(), [8000, 8001, 8002]);
        assert_eq!(store.series("vm:a", "memory", T + 9000, T + 9001, 1).unwrap().points, []);
        assert_eq!(store.series("vm:a", "memory", T + 90, T + 80, 1).unwrap().points, []);
        assert_eq!(store.latest("vm:a", "memory").unwrap(), Some((T + 8999, (8999 / 60 * 4096) as f64)));
        let names: Vec<String> =
            store.series_list(None).unwrap().into_iter().map(|row| format!("{} {}", row.subject, row.metric)).collect();
        assert_eq!(names, ["vm:a cpu", "vm:a memory"]);
    }
}

#[test]
fn what_was_committed_is_there_though_the_process_ended_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("db"), folder.path().join("copy"));
    let store = open(&path);
    fill(&store, 0..1250);
    // As a crash leaves them: database and log, not folded in.
    std::fs::copy(&path, &copy).unwrap();
    std::fs::copy(path.with_file_name("db-wal"), copy.with_file_name("copy-wal")).unwrap();
    let store = open(&copy);
    assert_eq!(store.series("vm:a", "cpu", 0, u64::MAX, 1).unwrap().points.len(), 1250);
    fill(&store, 1250..2000);
    assert_eq!(store.series("vm:a", "cpu", 0, u64::MAX, 1).unwrap().points.len(), 2000);
    assert_eq!(store.series("vm:a", "cpu", 0, u64::MAX, 300).unwrap().points.len(), 7);
}

#[test]
fn what_no_series_can_hold_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    let odd = [(T, f64::NAN), (T + 1, f64::INFINITY), (T + 2, 1e300), (u64::MAX, 1.0), (T + 3, -2.5), (T + 3, 7.25)];
    let batch = vec![
        samples("host", "x", 0.25, &odd),
        samples("host", "none", 0.25, &odd[..3]),
        samples("host", "resolution", 0.0, &[(T, 1.0)]),
        samples("host", "resolution", f64::NAN, &[(T, 1.0)]),
        samples("host", "empty", 1.0, &[]),
    ];
    store.append_series(batch).wait().unwrap();
    let points = store.series("host", "x", 0, u64::MAX, 1).unwrap().points;
    assert_eq!(points.iter().map(|point| (point.at_s, point.mean)).collect::<Vec<_>>(), [(T + 3, 7.25)]);
    // The first resolution holds for good.
    store.append_series(vec![samples("host", "x", 100.0, &[(T + 4, 8.3)])]).wait().unwrap();
    assert_eq!(store.latest("host", "x").unwrap(), Some((T + 4, 8.25)));
}

#[test]
fn a_clock_that_stands_still_or_goes_back_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    for n in 0..1300u32 {
        let pending = store.append_series(vec![samples("host", "x", 1.0, &[(T + 5, f64::from(n))])]);
        if n % 100 == 99 {
            pending.wait().unwrap();
        }
    }
    assert_eq!(store.latest("host", "x").unwrap(), Some((T + 5, 1299.0)));
    let points = store.series("host", "x", 0, u64::MAX, 1).unwrap().points;
    assert_eq!(points.iter().map(|point| (point.at_s, point.max)).collect::<Vec<_>>(), [(T + 5, 1299.0)]);
    assert!(store.series_status().unwrap().chunks[0] == 1);
    for at_s in [T + 5000, T + 100, T + 7000, T + 101] {
        store.append_series(vec![samples("host", "x", 1.0, &[(at_s, 1.0)])]).wait().unwrap();
    }
    let points = store.series("host", "x", 0, u64::MAX, 1).unwrap().points;
    assert_eq!(points.iter().map(|point| point.at_s - T).collect::<Vec<_>>(), [5, 100, 101, 5000, 7000]);
}

#[test]
fn a_damaged_row_costs_only_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = open(&path);
    fill(&store, 0..3010);
    let raw = Connection::open(&path).unwrap();
    let slot = LEVELS[0].slot(T) + 2;
    let broken =
        raw.execute("UPDATE series_chunks SET data = zeroblob(30) WHERE id = ?", [LEVELS[0].key(slot) | 1]).unwrap();
    assert_eq!(broken, 1);
    let answer = store.series("vm:a", "cpu", 0, u64::MAX, 1).unwrap();
    assert_eq!((answer.points.len(), answer.damaged), (2410, 1));
    assert_eq!(store.series("vm:a", "memory", 0, u64::MAX, 1).unwrap().points.len(), 3010);
    // A batch of the journal: ten seconds of all.
    raw.execute("UPDATE series_journal SET data = x'0102' WHERE id = (SELECT max(id) FROM series_journal)", [])
        .unwrap();
    let answer = store.series("vm:a", "memory", 0, u64::MAX, 1).unwrap();
    assert_eq!((answer.points.len(), answer.damaged), (3000, 1));
    // A roll-up that has to be written again begins anew.
    raw.execute("UPDATE series_chunks SET data = x'00' WHERE id = ?", [LEVELS[2].key(LEVELS[2].slot(T)) | 1]).unwrap();
    fill(&store, 3010..4000);
    let answer = store.series("vm:a", "cpu", 0, u64::MAX, 300).unwrap();
    assert_eq!((answer.points.len(), answer.damaged), (4, 0));
    assert_eq!(store.series("vm:a", "memory", 0, u64::MAX, 300).unwrap().points.len(), 14);
}

#[test]
fn what_is_too_old_answers_by_the_next_level_and_too_much_goes_oldest_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    fill_by(&store, 0..3 * 86_400, 600);
    let now = T + 3 * 86_400;
    let hours = |n: u64| Duration::from_secs(3600 * n);
    let ages = SeriesRetention { age: [hours(1), hours(24), hours(48), hours(9000)], bytes: u64::MAX };
    let before = store.series_status().unwrap();
    store.retain_series(ages, now).wait().unwrap();
    let after = store.series_status().unwrap();
    assert!(after.size_bytes() < before.size_bytes() / 2, "{before:?} {after:?}");
    let points = store.series("vm:a", "cpu", 0, u64::MAX, 1).unwrap().points;
    let mut by_step: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for point in &points {
        let (number, samples) = by_step.entry(point.step_s).or_default();
        *number += 1;
        *samples += point.count;
    }
    // An hour by the second, the day before by 10 s, from the half day that ends within 48 h on by 5 minutes, the rest by hours.
    let day = 86_400;
    assert_eq!(by_step[&1], (3600, 3600));
    assert_eq!(by_step[&10], ((day - 3600) / 10, day - 3600));
    assert_eq!(by_step[&300], (day / 300, day));
    assert_eq!(by_step[&3600], (24, day));
    assert!(points.windows(2).all(|pair| pair[0].at_s + pair[0].step_s <= pair[1].at_s));
    // By size: the finest first, down to a day, of which the last ten minutes are in the journal.
    fill_by(&store, 3 * 86_400..4 * 86_400, 600);
    let now = now + 86_400;
    let tight = SeriesRetention { age: [hours(9000); 4], bytes: 1 };
    let chunks = store.series_status().unwrap().chunks;
    store.retain_series(tight, now).wait().unwrap();
    let left = store.series_status().unwrap();
    assert!(left.chunks[0] == 2 * 143 && left.chunks[1] < chunks[1] && left.chunks[1] >= 48, "{left:?}");
    // Totals are those of the rows.
    let raw = Connection::open(folder.path().join("db")).unwrap();
    let bytes: i64 = raw.query_row("SELECT sum(length(data)) FROM series_chunks", [], |row| row.get(0)).unwrap();
    assert_eq!(left.chunk_bytes.iter().sum::<u64>(), bytes as u64);
    // What has ended is forgotten at last.
    store.retain_series(ages, now + 9000 * 3600 + 691_200).wait().unwrap();
    assert_eq!((store.series_list(None).unwrap(), store.series_status().unwrap().chunks), (Vec::new(), [0; 4]));
}

#[test]
fn a_subject_is_forgotten_wholly() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    fill(&store, 0..2000);
    store.append_series(vec![samples("vm:b", "cpu", 1.0, &[(T + 100, 1.0)])]).wait().unwrap();
    store.forget_series("vm:a").wait().unwrap();
    assert!(matches!(store.forget_series("vm:a").wait(), Err(StoreError::NotFound { .. })));
    assert_eq!(store.series_list(None).unwrap().len(), 1);
    fill(&store, 2000..3000);
    let points = store.series("vm:a", "cpu", 0, u64::MAX, 1).unwrap().points;
    assert_eq!(points.first().map(|point| point.at_s), Some(T + 2000), "nothing of the machine before");
    assert_eq!(store.series("vm:b", "cpu", 0, u64::MAX, 1).unwrap().points.len(), 1);
}

#[test]
fn too_much_at_once_is_refused_with_what_to_ask_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    for day in 0..3 {
        let readings: Vec<(u64, f64)> = (0..86_400).map(|n| (T + day * 86_400 + n, 1.0)).collect();
        store.append_series(vec![samples("vm:a", "x", 1.0, &readings)]).wait().unwrap();
    }
    let error = store.series("vm:a", "x", 0, u64::MAX, 1).unwrap_err().to_string();
    assert!(
        error.contains("`x` of `vm:a` has more than 200000 steps of 1 s") && error.contains("longer steps"),
        "{error}"
    );
    assert_eq!(store.series("vm:a", "x", 0, T + 100, 1).unwrap().points.len(), 100);
    assert_eq!(store.series("vm:a", "x", 0, u64::MAX, 2).unwrap().points.len(), 129_600);
}

#[test]
fn there_are_only_so_many_series() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    let batch = (0..SERIES_MAX + 3).map(|n| samples(&format!("vm:{n}"), "x", 1.0, &[(T, 1.0)])).collect();
    store.append_series(batch).wait().unwrap();
    store.append_series(vec![samples("vm:1", "x", 1.0, &[(T + 900, 2.0)])]).wait().unwrap();
    assert_eq!(store.series_status().unwrap().series, SERIES_MAX as u64);
    assert_eq!(store.series("vm:1", "x", 0, u64::MAX, 1).unwrap().points.len(), 2);
    assert_eq!(store.series("vm:16383", "x", 0, u64::MAX, 1).unwrap().points.len(), 1);
    assert_eq!(store.series("vm:16384", "x", 0, u64::MAX, 1).unwrap().points.len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Any batches, late ones too, restarts in between: each step of each level is that of a naive store.
    #[test]
    fn answers_are_those_of_a_naive_store(
        batches in prop::collection::vec((0..40_000u64, prop::collection::vec((0..900u64, -5000..5000i64), 1..40), any::<bool>()), 1..25),
        from in 0..40_000u64, length in 0..50_000u64, step in prop::sample::select(vec![1u64, 2, 10, 30, 300, 900, 3600]),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let mut store = open(&path);
        let mut oracle: BTreeMap<u64, i64> = BTreeMap::new();
        for (at, readings, restart) in batches {
            let mut new = Vec::new();
            for (after, value) in readings {
                // Each second once: roll-ups may count both of two.
                if let std::collections::btree_map::Entry::Vacant(entry) = oracle.entry(T + at + after) {
                    entry.insert(value);
                    new.push((T + at + after, value as f64));
                }
            }
            store.append_series(vec![samples("vm:z", "y", 1.0, &[(T, 0.0)]), samples("vm:a", "x", 1.0, &new)]).wait().unwrap();
            if restart {
                prop_assert!(store.close(LONG));
                store = open(&path);
            }
        }
        let (from, to) = (T + from - from % 3600, T + from + length - (from + length) % 3600);
        let mut naive: BTreeMap<u64, Vec<i64>> = BTreeMap::new();
        if from < to {
            for (at_s, value) in oracle.range(from..to) {
                naive.entry(at_s - at_s % step).or_default().push(*value);
            }
        }
        let points = store.series("vm:a", "x", from, to, step).unwrap().points;
        prop_assert_eq!(points.len(), naive.len());
        for (point, (at_s, values)) in points.iter().zip(&naive) {
            let (min, max) = (*values.iter().min().unwrap() as f64, *values.iter().max().unwrap() as f64);
            let mean = values.iter().sum::<i64>() as f64 / values.len() as f64;
            prop_assert_eq!((point.at_s, point.step_s, point.count), (*at_s, step, values.len() as u64));
            prop_assert_eq!((point.min, point.max), (min, max));
            // Rounded once a level and once a batch of its time.
            prop_assert!((point.mean - mean).abs() <= 16.0, "{} {}", point.mean, mean);
        }
    }
}
