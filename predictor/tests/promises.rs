//! What the predictor promises its caller, on small made-up guests.

use prestage_predictor::{
    Access, AccessConfig, AccessPredictor, Candidate, DEFAULT_THRESHOLD, Expert, Op, Outcome, Phase,
};

const SECOND_US: u64 = 1_000_000;

fn read(vm: u64, first: u64, pages: u32, at_us: u64) -> Access {
    Access { at_us, vm, op: Op::Read, first, pages }
}

fn drain(predictor: &mut AccessPredictor, at_us: u64) -> Vec<Candidate> {
    let mut out = Vec::new();
    predictor.predict(at_us, &mut out);
    out
}

fn pages(candidates: &[Candidate]) -> Vec<u64> {
    let mut pages: Vec<u64> = candidates.iter().flat_map(|c| c.first..c.first + u64::from(c.pages)).collect();
    pages.sort_unstable();
    pages
}

/// The pages of a made-up boot: 100 extents of 3 pages, scattered.
fn boot_pages() -> Vec<u64> {
    (0..100u64).map(|i| i * 7919 % 10_007 * 20).collect()
}

/// A predictor taught by one boot of VM 1 that began at zero, and the end of that boot.
fn taught() -> (AccessPredictor, u64) {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    predictor.phase_start(1, Phase::Boot, 0);
    for (i, &first) in boot_pages().iter().enumerate() {
        predictor.observe(&read(1, first, 3, i as u64 * 10_000));
    }
    predictor.phase_end(1, 2 * SECOND_US);
    drain(&mut predictor, 2 * SECOND_US);
    (predictor, 1000 * SECOND_US)
}

#[test]
fn a_known_phase_is_proposed_at_once_in_order_and_with_times() {
    let (mut predictor, now) = taught();
    predictor.phase_start(2, Phase::Boot, now);
    let candidates = drain(&mut predictor, now);
    let firsts: Vec<u64> = candidates.iter().map(|candidate| candidate.first).collect();
    assert_eq!(firsts, boot_pages());
    assert!(candidates.iter().all(|c| c.pages == 3 && c.expert == Expert::Phase && c.probability > 0.9));
    assert!(candidates.is_sorted_by_key(|candidate| candidate.due_us));
    assert_eq!(candidates[0].due_us, Some(now));
    assert_eq!(candidates[99].due_us, Some(now + 990_000));
}

#[test]
fn another_vm_starting_at_the_same_time_is_not_prefetched_twice() {
    let (mut predictor, now) = taught();
    predictor.phase_start(2, Phase::Boot, now);
    assert_eq!(drain(&mut predictor, now).len(), 100);
    predictor.phase_start(3, Phase::Boot, now + SECOND_US);
    assert!(drain(&mut predictor, now + SECOND_US).is_empty());
    // Much later it is, since the cache may have dropped it; at once if the cache says it lost everything.
    predictor.phase_start(4, Phase::Boot, now + 100 * SECOND_US);
    assert_eq!(drain(&mut predictor, now + 100 * SECOND_US).len(), 100);
    predictor.forget_resident();
    predictor.phase_start(5, Phase::Boot, now + 101 * SECOND_US);
    assert_eq!(drain(&mut predictor, now + 101 * SECOND_US).len(), 100);
}

#[test]
fn a_lost_prefetch_is_proposed_again() {
    let (mut predictor, now) = taught();
    predictor.phase_start(2, Phase::Boot, now);
    let candidates = drain(&mut predictor, now);
    let lost = candidates[40];
    predictor.outcome(&Outcome { first: lost.first, pages: lost.pages, expert: lost.expert, used: false, late: false });
    assert_eq!(pages(&drain(&mut predictor, now)), pages(&[lost]));
    let used = candidates[0];
    predictor.outcome(&Outcome { first: used.first, pages: used.pages, expert: used.expert, used: true, late: true });
    assert!(drain(&mut predictor, now).is_empty());
    let (stats, phase) = (predictor.stats(), Expert::Phase.index());
    assert_eq!((stats.used_pages[phase], stats.late_pages[phase], stats.unused_pages[phase]), (3, 3, 3));
}

#[test]
fn phases_are_told_apart() {
    let (mut predictor, now) = taught();
    predictor.phase_start(2, Phase::Program(7), now);
    assert!(drain(&mut predictor, now).is_empty());
    for i in 0..50 {
        predictor.observe(&read(2, 900_000 + i * 33, 2, now + i * 1000));
    }
    predictor.phase_start(2, Phase::Program(8), now + SECOND_US);
    drain(&mut predictor, now + SECOND_US);
    predictor.phase_start(2, Phase::Program(7), now + 500 * SECOND_US);
    let again = pages(&drain(&mut predictor, now + 500 * SECOND_US));
    assert_eq!(again, (0..50).flat_map(|i| [900_000 + i * 33, 900_001 + i * 33]).collect::<Vec<_>>());
    let phases: Vec<Phase> = predictor.summary().phases.iter().map(|summary| summary.phase).collect();
    assert_eq!(phases, [Phase::Boot, Phase::Program(7)]);
}

#[test]
fn what_a_guest_wrote_first_is_not_fetched_for_the_next() {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    predictor.phase_start(1, Phase::Boot, 0);
    for i in 0..40u64 {
        let op = if i % 2 == 0 { Op::Write } else { Op::Discard };
        predictor.observe(&Access { at_us: i, vm: 1, op, first: i * 100, pages: 8 });
        predictor.observe(&read(1, i * 100, 10, i));
    }
    predictor.phase_end(1, SECOND_US);
    predictor.forget_resident();
    drain(&mut predictor, SECOND_US);
    predictor.phase_start(1, Phase::Boot, 100 * SECOND_US);
    let proposed = pages(&drain(&mut predictor, 100 * SECOND_US));
    assert_eq!(proposed, (0..40).flat_map(|i| [i * 100 + 8, i * 100 + 9]).collect::<Vec<_>>());
}

#[test]
fn nothing_beyond_a_shrunk_storage_is_proposed() {
    let (mut predictor, now) = taught();
    predictor.resize(50_000);
    predictor.phase_start(2, Phase::Boot, now);
    let proposed = pages(&drain(&mut predictor, now));
    assert!(!proposed.is_empty() && proposed.iter().all(|page| *page < 50_000));
    predictor.observe(&read(2, 49_990, 8, now));
    predictor.observe(&read(2, 49_998, 8, now));
    assert!(pages(&drain(&mut predictor, now)).iter().all(|page| *page < 50_000));
}

#[test]
fn a_phase_that_nobody_ends_is_learned_after_its_time() {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    predictor.phase_start(1, Phase::Boot, 0);
    predictor.observe(&read(1, 0, 8, SECOND_US));
    predictor.observe(&read(1, 800_000, 8, 16 * 60 * SECOND_US));
    let summary = predictor.summary();
    assert_eq!((summary.phases[0].runs, summary.phases[0].bytes), (1, 8 * 4096));
}

#[test]
fn a_guest_that_discards_its_whole_disk_costs_little() {
    let (mut predictor, now) = taught();
    predictor.phase_start(2, Phase::Boot, now);
    let before = predictor.memory_bytes();
    predictor.observe(&Access { at_us: now, vm: 2, op: Op::Discard, first: 0, pages: u32::MAX });
    assert!(predictor.memory_bytes() < before + (1 << 20));
    drain(&mut predictor, now);
    // What was learned of other places still holds.
    assert_eq!(predictor.summary().phases[0].extents, 100);
}

#[test]
fn an_interrupted_stream_of_one_vm_does_not_disturb_another() {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    let (mut foreseen, mut known) = (0, std::collections::BTreeSet::new());
    for i in 0..400u64 {
        let (vm, base) = (i % 8, i % 8 * 1_000_000);
        let first = base + i / 8 * 16;
        foreseen += usize::from(known.contains(&(vm, first)));
        predictor.observe(&read(vm, first, 16, i * 1000));
        for candidate in
            drain(&mut predictor, i * 1000).iter().filter(|candidate| candidate.probability >= DEFAULT_THRESHOLD)
        {
            known.extend((candidate.first..candidate.first + u64::from(candidate.pages)).map(|page| (vm, page)));
        }
    }
    assert!(foreseen >= 360, "{foreseen}");
}

#[test]
fn a_predictor_can_move_to_the_learner_thread() {
    fn require_send<T: Send>() {}
    require_send::<AccessPredictor>();
}

#[test]
fn what_a_guest_wrote_is_proposed_unless_the_cache_took_it_in() {
    let proposed = |writes_cached: bool| {
        let mut predictor = AccessPredictor::new(AccessConfig { writes_cached, ..AccessConfig::default() });
        predictor.observe(&Access { at_us: 0, vm: 1, op: Op::Write, first: 320, pages: 16 });
        let mut proposed = Vec::new();
        for i in 0..20u64 {
            predictor.observe(&read(1, i * 16, 16, 1000 + i * 1000));
            proposed.extend(pages(&drain(&mut predictor, 1000 + i * 1000)));
        }
        (proposed.contains(&320), proposed.contains(&310))
    };
    assert_eq!(proposed(false), (true, true));
    assert_eq!(proposed(true), (false, true));
}

#[test]
fn a_clock_that_leaps_to_its_end_overflows_nothing() {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    for (i, at_us) in [0, 1, u64::MAX / 2, u64::MAX - 1, u64::MAX].into_iter().cycle().take(40).enumerate() {
        predictor.observe(&read(1, i as u64 * 8, 8, at_us));
        drain(&mut predictor, at_us);
    }
}

#[test]
fn a_storage_takes_two_mebibytes_by_default() {
    let predictor = AccessPredictor::new(AccessConfig::default());
    assert!(predictor.memory_bytes() <= 2 << 20, "{}", predictor.memory_bytes());
}

#[test]
fn what_was_in_place_neither_shrinks_a_set_nor_stops_its_replay() {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    let page = |i: u64| 1000 + i * 37 % 4096 * 4;
    let touch = |predictor: &mut AccessPredictor, i: u64, at_us: u64| predictor.observe(&read(1, page(i), 1, at_us));
    predictor.phase_start(1, Phase::Program(7), 0);
    (0..4096).for_each(|i| touch(&mut predictor, i, i * 100));
    predictor.phase_end(1, SECOND_US);
    let learned = |predictor: &AccessPredictor| predictor.summary().phases[0].bytes / 4096;
    assert_eq!(learned(&predictor), 4096);
    for run in 1..5 {
        let now = run * 100 * SECOND_US;
        drain(&mut predictor, now);
        predictor.forget_resident();
        predictor.phase_start(1, Phase::Program(7), now);
        assert_eq!(pages(&drain(&mut predictor, now)).len(), 4096, "run {run}");
        // Three quarters lie in memory: their use is not seen.
        (0..4096).filter(|i| i % 4 != 0).for_each(|i| predictor.in_place(1, page(i), 1));
        (0..4096).step_by(4).for_each(|i| touch(&mut predictor, i, now + i * 100));
        predictor.phase_end(1, now + SECOND_US);
        assert_eq!(learned(&predictor), 4096, "run {run}");
    }
    // Not in place and not read: those leave.
    for run in 5..9 {
        let now = run * 100 * SECOND_US;
        predictor.forget_resident();
        predictor.phase_start(1, Phase::Program(7), now);
        (0..4096).step_by(4).for_each(|i| touch(&mut predictor, i, now + i * 100));
        predictor.phase_end(1, now + SECOND_US);
    }
    assert!(learned(&predictor) < 4096);
}
