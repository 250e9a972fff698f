//! The production predictor as a policy.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use prestage_cache::policy::Eviction;
use prestage_replay::report::PhaseReport;
use prestage_replay::trace::ReadOptions;
use prestage_replay::{
    CacheSize, DeviceConfig, Footprint, Nothing, PolicyKind, Predictive, Prefetcher, ReplayConfig, Report, Request,
    TraceReader, marks, replay,
};
use std::path::Path;

const MARKS: &str = "167071382 boot-done\n169029014 start py\n191391503 end py\n";

fn head() -> Vec<Request> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testdata/vm_boot1_head.csv.gz"));
    TraceReader::open(path, ReadOptions::default()).unwrap().map(Result::unwrap).collect()
}

fn run(policy: &mut dyn Prefetcher, device: Option<DeviceConfig>) -> Report {
    let requests = head();
    let footprint = Footprint::of(requests.iter().copied().map(Ok), |_| true).unwrap();
    let config = ReplayConfig {
        trace: "head".to_owned(),
        cache: 1.0,
        threshold: Some(0.5),
        capacity_pages: footprint.capacity_pages(CacheSize::Fraction(1.0)),
        end_page: footprint.end_page,
        block_pages: 1,
        eviction: Eviction::Lru,
        device,
        marks: marks::parse("marks", MARKS).unwrap(),
        cost: false,
    };
    replay(&config, requests.into_iter().map(Ok), policy, |_| true).unwrap()
}

fn trained(kind: PolicyKind) -> Predictive {
    let mut policy = Predictive::new(kind, 0.5, 1 << 20);
    policy.train(head().into_iter().map(Ok), &marks::parse("marks", MARKS).unwrap(), |_| true).unwrap();
    policy
}

#[test]
fn what_was_trained_on_is_there_when_it_comes_again() {
    let nothing = run(&mut Nothing, None);
    let untrained = run(&mut Predictive::new(PolicyKind::Prestage, 0.5, 1 << 20), None);
    let trained = run(&mut trained(PolicyKind::Prestage), None);
    assert!(nothing.read_hit_ratio + 0.1 < untrained.read_hit_ratio, "{untrained:?}");
    assert!(trained.read_hit_ratio > 0.95 && trained.precision > 0.95, "{trained:?}");
    assert!(trained.ece.is_some_and(|ece| ece < 0.1), "{trained:?}");
    let names: Vec<&str> = trained.phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["boot", "py", "-"]);
    let sum = |of: fn(&PhaseReport) -> u64| trained.phases.iter().map(of).sum::<u64>();
    assert_eq!(sum(|phase| phase.reads), trained.reads);
    assert_eq!(sum(|phase| phase.read_hits), trained.read_hits);
    assert_eq!(sum(|phase| phase.prefetched_pages), trained.prefetched_pages);
    assert_eq!(sum(|phase| phase.useful_pages), trained.useful_pages);
}

#[test]
fn the_end_of_time_is_reached() {
    let last = u64::MAX;
    let times = [0, 1, last / 2, last - 1, last, last, last];
    let requests: Vec<Request> = times
        .into_iter()
        .enumerate()
        .map(|(i, at_us)| Request { at_us, op: prestage_predictor::Op::Read, offset: i as u64 * 4096, len: 4096 })
        .collect();
    let marks = marks::parse("m", &format!("{last} start x\n{last} end x\n{last} off\n")).unwrap();
    for marks in [Vec::new(), marks] {
        for device in [None, Some(DeviceConfig { latency_us: 1e9, mbps: 1e-3 })] {
            let config = ReplayConfig {
                trace: "end".to_owned(),
                cache: 1.0,
                threshold: Some(0.5),
                capacity_pages: 64,
                end_page: 64,
                block_pages: 1,
                eviction: Eviction::S3Fifo,
                device,
                marks: marks.clone(),
                cost: false,
            };
            let mut policy = Predictive::new(PolicyKind::Prestage, 0.5, 64);
            let report = replay(&config, requests.iter().copied().map(Ok), &mut policy, |_| true).unwrap();
            assert_eq!(report.reads, times.len() as u64);
        }
    }
}

#[test]
fn a_cache_that_no_memory_can_index_is_refused() {
    let config = |capacity_pages| ReplayConfig {
        trace: String::new(),
        cache: 1.0,
        threshold: None,
        capacity_pages,
        end_page: 64,
        block_pages: 1,
        eviction: Eviction::Lru,
        device: None,
        marks: Vec::new(),
        cost: false,
    };
    for pages in [1 << 28, u64::from(u32::MAX), 1 << 52, u64::MAX] {
        let error = replay(&config(pages), [], &mut Nothing, |_| true).unwrap_err().to_string();
        assert!(error.contains("use a smaller cache or larger blocks"), "{error}");
    }
}

#[test]
fn all_predictions_are_judged_by_the_predictors_own_account() {
    let nothing = run(&mut Nothing, None);
    assert_eq!((nothing.ece_all, nothing.brier_all), (None, None), "who says nothing is not judged");
    let mut policy = Predictive::new(PolicyKind::Prestage, 0.5, 1 << 20);
    let report = run(&mut policy, None);
    let kept = policy.predictor().calibration();
    assert!(kept.settled > 0.0, "{kept:?}");
    assert_eq!((report.ece_all, report.brier_all), (Some(kept.error), Some(kept.brier)));
    assert!(report.ece.is_some() && report.ece != report.ece_all, "pages issued are another question: {report:?}");
}

#[test]
fn a_slow_store_costs_time_and_prefetch_saves_it() {
    let store = Some(DeviceConfig { latency_us: 5000.0, mbps: 200.0 });
    let nothing = run(&mut Nothing, store).read_latency_us.unwrap();
    let report = run(&mut trained(PolicyKind::Prestage), store);
    let latency = report.read_latency_us.unwrap();
    assert!(latency.mean < nothing.mean / 2.0, "{latency:?}, without prefetch {nothing:?}");
    assert!(report.late_pages > 0 && report.timeliness > 0.5, "{report:?}");
}

#[test]
fn sets_of_a_phase_are_left_to_the_policy_that_has_them() {
    let hits = |kind| run(&mut trained(kind), None).read_hits;
    let (readahead, markov, prestage) =
        (hits(PolicyKind::Readahead), hits(PolicyKind::Markov), hits(PolicyKind::Prestage));
    assert!(readahead < prestage && markov < prestage, "{readahead} {markov} {prestage}");
    assert_ne!(readahead, markov);
}
