//! What history answers, beside a scan of plain vectors; what it keeps, and what it took over from the version before.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use proptest::prelude::*;

use super::index::{MERGE_GROUPS, blocks_read};
use super::*;
use crate::store::models::{Change, NewModel};
use crate::store::segment::AccessOp;

const LONG: Duration = Duration::from_secs(60);
const ALL: NearLimit = NearLimit { chunks: usize::MAX, until: None };
const HOUR_US: u64 = 3_600_000_000;

fn open(folder: &tempfile::TempDir) -> Store {
    Store::open(&folder.path().join("db")).unwrap()
}

fn append(store: &Store, storage: &str, vm: &str, records: &[AccessRecord]) {
    let accesses =
        Accesses { storage: storage.into(), vm: vm.into(), program: String::new(), records: records.to_vec() };
    store.append_accesses(accesses).wait().unwrap();
}

fn read(at_us: u64, page: u64) -> AccessRecord {
    AccessRecord { at_us, op: AccessOp::Read, page, pages: 1 }
}

/// Streams of accesses, each cut into segments as they come.
#[derive(Debug, Clone)]
struct Stream {
    storage: String,
    vm: String,
    parts: Vec<Vec<AccessRecord>>,
}

prop_compose! {
    fn access()(step in prop_oneof![4 => 0..2000u64, 1 => 0..HOUR_US / 8], back in prop_oneof![8 => Just(0u64), 1 => 0..500u64],
        op in prop_oneof![6 => Just(AccessOp::Read), 1 => Just(AccessOp::Write), 1 => Just(AccessOp::Discard)],
        page in prop_oneof![3 => 0..200u64, 1 => 0..1_000_000u64], pages in prop_oneof![6 => 1..40u32, 1 => 0..3000u32])
        -> (u64, u64, AccessOp, u64, u32) { (step, back, op, page, pages) }
}

prop_compose! {
    fn stream()(storage in 0..2u8, vm in 0..3u8, parts in prop::collection::vec(prop::collection::vec(access(), 1..60), 1..8))
        -> Stream {
        let mut now = 1_700_000_000_000_000u64;
        let part = |part: Vec<(u64, u64, AccessOp, u64, u32)>| part.into_iter().map(|(step, back, op, page, pages)| {
            now += step;
            AccessRecord { at_us: now - back, op, page, pages }
        }).collect();
        Stream { storage: storage.to_string(), vm: vm.to_string(), parts: parts.into_iter().map(part).collect() }
    }
}

/// One stream a machine and storage: two disks of a machine on one storage are one stream.
fn distinct(streams: Vec<Stream>) -> Vec<Stream> {
    let mut seen = BTreeSet::new();
    streams.into_iter().filter(|stream| seen.insert((stream.storage.clone(), stream.vm.clone()))).collect()
}

fn fill(store: &Store, streams: &[Stream]) {
    for stream in streams {
        for part in &stream.parts {
            append(store, &stream.storage, &stream.vm, part);
        }
    }
}

/// The answer by looking at every pair.
fn naive_near(streams: &[Stream], storage: &str, (a, b): (u64, u64), within_us: u64, after_us: u64) -> Near {
    let mut answer = Near::default();
    for stream in streams.iter().filter(|stream| stream.storage == storage) {
        let times = |block: u64| -> Vec<u64> {
            let all = stream.parts.iter().flatten();
            let reads = all.filter(|access| blocks_read(access).is_some_and(|blocks| blocks.contains(&block)));
            reads.map(|access| access.at_us).collect()
        };
        let (of_a, of_b) = (times(a), times(b));
        answer.reads_a += of_a.len() as u64;
        answer.reads_b += of_b.len() as u64;
        for a in of_a.iter().filter(|a| after_us == 0 || **a > after_us) {
            answer.near += u64::from(of_b.iter().any(|b| a.abs_diff(*b) <= within_us));
            answer.then += u64::from(of_b.iter().any(|b| b >= a && b - a <= within_us));
        }
    }
    answer
}

fn naive_extents(streams: &[Stream], run: &RunRow) -> Vec<Extent> {
    let of = streams.iter().filter(|stream| stream.storage == run.storage && stream.vm == run.vm);
    let mut reads: Vec<AccessRecord> = of.flat_map(|stream| stream.parts.iter().flatten().copied()).collect();
    reads.retain(|access| access.op == AccessOp::Read);
    reads.retain(|access| access.at_us >= run.started_us && access.at_us <= run.ended_us.unwrap_or(u64::MAX));
    reads.sort_by_key(|access| access.at_us);
    let mut extents: Vec<Extent> = Vec::new();
    for access in reads {
        let pages = u64::from(access.pages);
        match extents.last_mut() {
            Some(last) if last.page + last.pages == access.page => {
                last.pages += pages;
                last.reads += 1;
            }
            _ => extents.push(Extent { at_us: access.at_us, page: access.page, pages, reads: 1 }),
        }
    }
    extents
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn answers_are_those_of_a_scan(streams in prop::collection::vec(stream(), 1..6), pairs in prop::collection::vec((0..14u64, 0..14u64), 4),
        within_us in prop_oneof![0..3000u64, Just(50_000)], run in (0..3u8, 0..HOUR_US, 0..HOUR_US), few in 1..4usize, top in 1..30usize) {
        let streams = distinct(streams);
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder);
        fill(&store, &streams);
        let storage = streams[0].storage.as_str();
        for pair in pairs.into_iter().filter(|(a, b)| a != b) {
            let answer = store.near(storage, pair, within_us, ALL).unwrap();
            prop_assert_eq!(answer.after_us, 0);
            let expected = naive_near(&streams, storage, pair, within_us, 0);
            prop_assert_eq!(Near { chunks: 0, ..answer }, expected);
            // With less decoded, the answer is that of a scan of the time it says it covers.
            let limited = store.near(storage, pair, within_us, NearLimit { chunks: few, until: None }).unwrap();
            prop_assert!(limited.chunks <= few as u64);
            let expected = naive_near(&streams, storage, pair, within_us, limited.after_us);
            prop_assert_eq!((limited.near, limited.then), (expected.near, expected.then));
            prop_assert_eq!(limited.after_us == 0, answer.chunks <= few as u64);
        }

        let (vm, from, length) = run;
        let started_us = 1_700_000_000_000_000 + from;
        let run = RunRow { id: 1, storage: storage.into(), vm: vm.to_string(), program: "boot".into(), started_us, ended_us: Some(started_us + length) };
        let expected = naive_extents(&streams, &run);
        let found = store.run_reads(&run, usize::MAX).unwrap();
        prop_assert!(!found.more);
        prop_assert_eq!(&found.extents, &expected);
        let found = store.run_reads(&run, few).unwrap();
        prop_assert_eq!(found.more, expected.len() > few);
        prop_assert_eq!(&found.extents[..], &expected[..few.min(expected.len())]);

        // Few enough blocks for every hour to be exact, or within the error it states.
        let mut hours: BTreeMap<u64, BTreeMap<u64, u64>> = BTreeMap::new();
        for access in streams.iter().filter(|stream| stream.storage == storage).flat_map(|stream| stream.parts.iter().flatten()) {
            for block in blocks_read(access).into_iter().flatten() {
                *hours.entry(access.at_us / HOUR_US).or_default().entry(block).or_default() += 1;
            }
        }
        let hot = store.hot(storage, 0, u64::MAX, top).unwrap();
        prop_assert_eq!(hot.iter().rev().map(|hour| hour.hour).collect::<Vec<_>>(), hours.keys().copied().collect::<Vec<_>>());
        for hour in hot {
            let counts = &hours[&hour.hour];
            prop_assert_eq!(hour.reads, counts.values().sum::<u64>());
            prop_assert!(hour.blocks.len() <= top);
            prop_assert!(hour.blocks.is_sorted_by_key(|hot| std::cmp::Reverse(hot.reads)));
            for hot in &hour.blocks {
                prop_assert!(hot.reads <= counts[&hot.block] && counts[&hot.block] <= hot.reads + hour.error);
            }
            if hour.error == 0 {
                let mut exact: Vec<u64> = counts.values().copied().collect();
                exact.sort_unstable_by(|a, b| b.cmp(a));
                exact.truncate(top);
                prop_assert_eq!(hour.blocks.iter().map(|hot| hot.reads).collect::<Vec<_>>(), exact);
            }
        }
    }
}

#[test]
fn small_segments_are_joined_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let start = 1_700_000_000_000_000;
    let all: Vec<AccessRecord> = (0..6000).map(|n| read(start + n * 1000, n * 37 % 5000)).collect();
    for part in all.chunks(100) {
        append(&store, "s", "vm", part);
    }
    // One of another machine in between stays what it is.
    append(&store, "s", "other", &all[..10]);
    let segments = store.segments("s", Some("vm"), 0, u64::MAX).unwrap();
    assert!(segments.len() <= 7, "{} segments of 60 appended", segments.len());
    let kept: Vec<AccessRecord> = segments.iter().flat_map(|row| store.segment(row.id).unwrap()).collect();
    assert_eq!(kept, all);
    // An hour later begins another: retention by age removes whole segments.
    append(&store, "s", "vm", &[read(start + 2 * HOUR_US, 1)]);
    let later = store.segments("s", Some("vm"), 0, u64::MAX).unwrap();
    assert_eq!(later.len(), segments.len() + 1);
    let status = store.history(start + 2 * HOUR_US).unwrap();
    assert_eq!((status.accesses, status.unindexed, status.last_hour_accesses), (6011, 0, 1));
    assert_eq!(status.oldest_us, start);
}

/// Groups of the index that hold at least so many segments.
fn group_count(store: &Store, least: usize) -> usize {
    let sql = format!("SELECT count(*) FROM groups WHERE segments >= {least}");
    let count: i64 = store.ask(|db| Ok(db.query_row(&sql, [], |row| row.get(0))?)).unwrap();
    usize::try_from(count).unwrap()
}

#[test]
fn groups_are_merged_and_answer_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let start = 1_700_000_000_000_000;
    // Far enough apart not to be joined, and enough to be merged twice.
    let segments = (MERGE_GROUPS * MERGE_GROUPS + 2 * MERGE_GROUPS) as u64;
    let parts: Vec<Vec<AccessRecord>> = (0..segments)
        .map(|n| (0..40).map(|k| read(start + n * 2 * HOUR_US + k * 10_000, (n * k * k) % 3000)).collect())
        .collect();
    let stream = Stream { storage: "s".into(), vm: "vm".into(), parts };
    fill(&store, std::slice::from_ref(&stream));
    let groups = |least: usize| group_count(&store, least);
    assert_eq!((groups(MERGE_GROUPS * MERGE_GROUPS), groups(MERGE_GROUPS)), (1, 2));
    assert!(groups(1) <= MERGE_GROUPS + 3, "{} groups", groups(1));
    let streams = [stream];
    for pair in [(0, 1), (1, 4), (9, 100), (0, 187)] {
        let answer = store.near("s", pair, 50_000, ALL).unwrap();
        assert_eq!(Near { chunks: 0, ..answer }, naive_near(&streams, "s", pair, 50_000, 0));
    }
    // What retention takes away is gone from the answers, also where the index still knows of it.
    let keep = Retention { age: Duration::from_micros(150 * 2 * HOUR_US), bytes: u64::MAX };
    let now_us = start + (segments - 1) * 2 * HOUR_US;
    store.retain(keep, now_us / 1000).wait().unwrap();
    let rest = Stream { parts: streams[0].parts[segments as usize - 151..].to_vec(), ..streams[0].clone() };
    for pair in [(0, 1), (1, 4), (9, 100)] {
        let answer = store.near("s", pair, 50_000, ALL).unwrap();
        assert_eq!(Near { chunks: 0, ..answer }, naive_near(std::slice::from_ref(&rest), "s", pair, 50_000, 0));
    }
}

#[test]
fn segments_that_may_still_be_joined_are_not_merged_with_others() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let start = 1_700_000_000_000_000;
    // A segment of each of many machines, all of one minute: joined with what comes next, though there are enough to merge.
    let machines = 2 * MERGE_GROUPS as u64;
    let part = |minute: u64| (0..30).map(|k| read(start + minute * 60_000_000 + k, k)).collect::<Vec<_>>();
    for minute in 0..2 {
        (0..machines).for_each(|vm| append(&store, "s", &vm.to_string(), &part(minute)));
    }
    let status = store.history(start).unwrap();
    assert_eq!((status.segments, status.accesses), (machines, machines * 60));
    // None will be joined with what comes hours later.
    append(&store, "s", "late", &part(120));
    assert_eq!((group_count(&store, 1), group_count(&store, MERGE_GROUPS)), (MERGE_GROUPS + 2, 1));
}

#[test]
fn an_answer_that_has_no_time_left_says_that_it_covers_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let records: Vec<_> = (0..3 * 4096u64).map(|n| read(1_000_000 + n, n % 64)).collect();
    append(&store, "s", "vm", &records);
    let late = store.near("s", (0, 1), 10, ALL.until(std::time::Instant::now())).unwrap();
    assert_eq!((late.chunks, late.near, late.after_us), (0, 0, 1_000_000 + 3 * 4096 - 1 + 10));
    // Within a segment, the newest of its chunks are looked at.
    let some = store.near("s", (0, 1), 10, NearLimit { chunks: 2, until: None }).unwrap();
    assert_eq!((some.chunks, some.after_us), (2, 1_000_000 + 4096 - 1 + 10));
    assert!(some.near > 0);
}

#[test]
fn retention_by_size_and_age_holds_for_all_of_history() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let start = 1_700_000_000_000_000;
    for n in 0..60 {
        let at = start + n * 2 * HOUR_US;
        store.start_run("s", "vm", "boot", at).wait().unwrap();
        let part: Vec<_> = (0..3000).map(|k| read(at + k * 1000, (n * 7919 + k * 104_729) % 1_000_003)).collect();
        append(&store, "s", "vm", &part);
        store.end_run("s", "vm", "boot", at + HOUR_US).wait().unwrap();
    }
    let now_us = start + 60 * 2 * HOUR_US;
    let before = store.history(now_us).unwrap();
    assert_eq!((before.segments, before.runs, before.hours), (60, 60, 60));
    let bytes = before.size_bytes() / 3;
    store.retain(Retention { age: LONG * 1_000_000, bytes }, now_us / 1000).wait().unwrap();
    let after = store.history(now_us).unwrap();
    assert!(after.size_bytes() <= bytes, "{} of {bytes} bytes", after.size_bytes());
    assert!(after.size_bytes() >= bytes / 2, "{} of {bytes} bytes", after.size_bytes());
    assert_eq!((after.runs, after.hours), (after.segments, after.segments));
    assert_eq!(after.newest_us, before.newest_us);
    let rows = |table: &str| -> i64 {
        let sql = format!("SELECT count(*) FROM {table} WHERE group_id NOT IN (SELECT id FROM groups)");
        store.ask(|db| Ok(db.query_row(&sql, [], |row| row.get(0))?)).unwrap()
    };
    assert_eq!((rows("touches"), rows("chunks")), (0, 0));

    let age = Duration::from_micros(9 * HOUR_US);
    store.retain(Retention { age, bytes }, now_us / 1000).wait().unwrap();
    let young = store.history(now_us).unwrap();
    assert_eq!((young.segments, young.runs, young.hours), (4, 4, 4));
    assert!(young.oldest_us >= now_us - 9 * HOUR_US);
    store.retain(Retention { age: Duration::ZERO, bytes }, now_us / 1000).wait().unwrap();
    assert_eq!(store.history(now_us).unwrap(), HistoryStatus::default());
}

#[test]
fn runs_are_kept_and_listed_by_whom_they_are_of() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let names = |of: RunsOf<'_>, last| -> Vec<(String, u64, Option<u64>)> {
        let runs = store.runs(of, last).unwrap();
        runs.into_iter().map(|run| (run.storage + &run.vm + &run.program, run.started_us, run.ended_us)).collect()
    };
    store.start_run("s", "a", "boot", 100).wait().unwrap();
    store.start_run("t", "a", "boot", 110).wait().unwrap();
    store.start_run("s", "b", "py", 120).wait().unwrap();
    store.end_run("s", "b", "py", 190).wait().unwrap();
    append(&store, "s", "a", &[read(150, 1), read(155, 2), read(160, 9)]);
    let of = |storage, vm, program| RunsOf { storage, vm, program };
    assert_eq!(names(of(Some("s"), None, None), 9), [("sbpy".into(), 120, Some(190)), ("saboot".into(), 100, None)]);
    assert_eq!(names(of(None, Some("a"), None), 1), [("taboot".into(), 110, None)]);
    assert_eq!(names(of(Some("s"), Some("a"), Some("py")), 9), []);
    assert_eq!(names(of(Some("nobody"), None, None), 9), []);
    // The daemon was killed and knows nothing of the first boot's end: it is the last that was heard of it.
    store.cut_runs().wait().unwrap();
    store.start_run("s", "a", "boot", 500).wait().unwrap();
    let boots = store.runs(of(Some("s"), Some("a"), Some("boot")), 9).unwrap();
    assert_eq!(boots.iter().map(|run| run.ended_us).collect::<Vec<_>>(), [None, Some(160)]);
    let reads = store.run_reads(&boots[1], 10).unwrap();
    let extent = |at_us, page, pages, reads| Extent { at_us, page, pages, reads };
    assert_eq!(reads, RunReads { extents: vec![extent(150, 1, 2, 2), extent(160, 9, 1, 1)], more: false });
}

#[test]
fn a_run_is_read_without_the_index_where_that_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    store.start_run("s", "a", "boot", 100).wait().unwrap();
    append(&store, "s", "a", &[read(150, 1), read(155, 2), read(160, 9)]);
    let runs = store.runs(RunsOf { storage: Some("s"), vm: None, program: None }, 1).unwrap();
    let whole = store.run_reads(&runs[0], 10).unwrap();
    assert_eq!(whole.extents.len(), 2);
    let raw = Connection::open(folder.path().join("db")).unwrap();
    for damaged in [&[][..], &[0x80], &[0xff; 30]] {
        raw.execute("UPDATE chunks SET times = ?", [damaged]).unwrap();
        assert_eq!(store.run_reads(&runs[0], 10).unwrap(), whole, "{damaged:?}");
    }
}

#[test]
fn a_database_of_the_version_before_keeps_its_content_and_is_indexed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/testdata/version1.db"), &path).unwrap();
    let store = Store::open(&path).unwrap();
    // The writer takes what is asked of it first, and indexes when nothing is: closed, it may not have come to it.
    let start = 1_700_000_000_000_000u64;
    let record = |at_us: u64, n: u64| read(at_us + n * 97, n * n * 7919 % 1_000_003);
    let stream: Vec<AccessRecord> =
        (0..5000).map(|n| record(start, n)).chain((0..300).map(|n| record(start + 5000 * 97, n))).collect();
    let first = store.segments("file:/a", Some("web1"), 0, u64::MAX).unwrap();
    let kept: Vec<AccessRecord> = first.iter().flat_map(|row| store.segment(row.id).unwrap()).collect();
    assert_eq!(kept, stream);
    assert_eq!(store.profile("file:/a").unwrap().unwrap().1, vec![7; 100]);
    assert_eq!(store.disks().unwrap()[0].name, "web1");
    assert_eq!(store.outcomes(Some("web1"), 7, 7).unwrap()[0].counters.reads, 5);
    // Ends by the event: each look gives the writer time to go on.
    while store.history(start).unwrap().unindexed > 0 {
        std::thread::yield_now();
    }
    let kept: Vec<AccessRecord> = first.iter().flat_map(|row| store.segment(row.id).unwrap()).collect();
    assert_eq!(kept, stream);
    let streams = [Stream { storage: "file:/a".into(), vm: "web1".into(), parts: vec![stream] }];
    let answer = store.near("file:/a", (0, 1), 50_000, ALL).unwrap();
    assert_eq!(Near { chunks: 0, ..answer }, naive_near(&streams, "file:/a", (0, 1), 50_000, 0));
    assert!(answer.reads_a > 0);
    assert_eq!(store.hot("file:/a", 0, u64::MAX, 1).unwrap()[0].reads, 5300);
    // What later versions added is there, empty and to be written.
    assert_eq!(store.storages().unwrap(), ["file:/a", "file:/b"]);
    assert_eq!((store.models().unwrap(), store.thresholds().unwrap()), (vec![], vec![]));
    let new = NewModel { kind: "lstm".into(), scope: "file:/a".into(), parent: None, seed: 1 };
    let change = Change { actor: "operator", reason: "asked".into(), at_unix_ms: 1 };
    store.start_model(new, change).wait().unwrap();
    store.set_threshold(None, Some(0.6)).wait().unwrap();
    assert_eq!((store.models().unwrap().len(), store.thresholds().unwrap()), (1, vec![(None, 0.6)]));
    assert!(store.close(LONG));
}

#[test]
fn a_question_waits_for_no_writer_and_no_other_question() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    append(&store, "s", "vm", &[read(1, 1)]);
    let lock = Connection::open(folder.path().join("db")).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    // While one question is being asked and another process writes, others are answered.
    let inner = store.ask(|_| Ok(store.history(1).unwrap().accesses)).unwrap();
    assert_eq!(inner, 1);
    assert!(store.inner.history.lock().len() >= 2);
}

#[test]
fn two_blocks_are_answered_from_what_of_the_index_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let start = 1_700_000_000_000_000;
    // Far enough apart to be three groups.
    for n in 0..3 {
        let at = start + n * 2 * HOUR_US;
        append(&store, "s", "vm", &[read(at, 0), read(at + 10, 16), read(at + 1_000_000, 0)]);
    }
    let whole = store.near("s", (0, 1), 50, ALL).unwrap();
    assert_eq!((whole.reads_a, whole.reads_b, whole.near, whole.damaged), (6, 3, 3, 0));
    let raw = Connection::open(folder.path().join("db")).unwrap();
    let one = |table: &str, column: &str| -> (i64, Vec<u8>) {
        let sql = format!("SELECT {column}, data FROM {table} ORDER BY {column} LIMIT 1 OFFSET 1");
        raw.query_row(&sql, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
    };
    let rest = Near { reads_a: 4, reads_b: 2, near: 2, then: 2, damaged: 1, ..Near::default() };
    let (group, row) = one("touches", "group_id");
    for damaged in [&[][..], &[0x80], &[0xff; 30], &row[..row.len() - 1]] {
        raw.execute("UPDATE touches SET data = ? WHERE group_id = ?", params![damaged, group]).unwrap();
        let answer = store.near("s", (0, 1), 50, ALL).unwrap();
        assert_eq!(Near { chunks: 0, ..answer }, rest, "{damaged:?}");
    }
    raw.execute("UPDATE touches SET data = ? WHERE group_id = ?", params![row, group]).unwrap();
    let counted = Near { reads_a: 6, reads_b: 3, ..rest };
    let (segment, data) = one("segments", "id");
    raw.execute("UPDATE segments SET data = ? WHERE id = ?", params![&data[..data.len() / 2], segment]).unwrap();
    assert_eq!(Near { chunks: 0, ..store.near("s", (0, 1), 50, ALL).unwrap() }, counted);
    raw.execute("UPDATE segments SET data = ? WHERE id = ?", params![data, segment]).unwrap();
    raw.execute("UPDATE chunks SET times = x'80' WHERE segment_id = ?", [segment]).unwrap();
    assert_eq!(Near { chunks: 0, ..store.near("s", (0, 1), 50, ALL).unwrap() }, counted);
}
