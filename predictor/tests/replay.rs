//! Replays two real boots of one image: what one teaches about the other.

mod support;

use prestage_predictor::profile::VERSION;
use prestage_predictor::{Access, AccessConfig, AccessPredictor, Outcome, Phase, ProfileError};
use proptest::prelude::*;
use support::{Event, Figures, Replay, excerpt, later};

const BOOT_1: &str = include_str!("../testdata/vm_boot1.csv");
const BOOT_2: &str = include_str!("../testdata/vm_boot2.csv");
/// What the agent is expected to ask for at least.
const THRESHOLD: f32 = prestage_predictor::DEFAULT_THRESHOLD;
const HOUR_US: u64 = 3_600_000_000;

fn predictor() -> AccessPredictor {
    AccessPredictor::new(AccessConfig { size_pages: 1 << 20, ..AccessConfig::default() })
}

/// Replays a recorded boot from power-on. Without `all_boot`, the boot phase ends where the guest said it was up.
/// The cache was emptied before, and an hour has passed since the boot before.
fn boot(predictor: &mut AccessPredictor, events: &[Event], all_boot: bool) -> (Figures, Figures) {
    let start_us = (predictor.stats().reads + 1) * HOUR_US;
    let events = &later(events, start_us);
    predictor.forget_resident();
    let (mut cache, mut booting, mut after) = (Replay::new(THRESHOLD), Figures::default(), Figures::default());
    let (mut is_up, mut end_us) = (false, start_us);
    predictor.phase_start(1, Phase::Boot, start_us);
    cache.drain(predictor, start_us, &mut booting);
    for event in events {
        let figures = if is_up { &mut after } else { &mut booting };
        match event {
            Event::Access(access) => {
                cache.step(predictor, access, figures);
                end_us = access.at_us;
            }
            Event::Mark(at_us, mark) if mark == "boot-done" => {
                is_up = true;
                if !all_boot {
                    predictor.phase_end(1, *at_us);
                }
            }
            Event::Mark(..) => {}
        }
    }
    predictor.phase_end(1, end_us);
    predictor.vm_forget(1);
    (booting, after)
}

fn sum(a: &Figures, b: &Figures) -> Figures {
    let mut sum = a.clone();
    sum += b;
    sum
}

fn require_foreseen(figures: &Figures) {
    assert!(figures.coverage() >= 0.95, "coverage {:.3}: {figures:?}", figures.coverage());
    assert!(figures.precision() >= 0.9, "precision {:.3}: {figures:?}", figures.precision());
    assert!(figures.traffic() <= 1.1, "traffic {:.3}: {figures:?}", figures.traffic());
}

#[test]
fn after_one_boot_the_next_one_and_its_programs_are_foreseen() {
    for (first, second) in [(BOOT_1, BOOT_2), (BOOT_2, BOOT_1)] {
        let mut predictor = predictor();
        boot(&mut predictor, &excerpt(first), true);
        let (booting, after) = boot(&mut predictor, &excerpt(second), true);
        println!("boot {booting:?}\nprograms {after:?}");
        assert!(booting.coverage() >= 0.99 && booting.waited == 0, "{booting:?}");
        assert!(after.coverage() >= 0.95, "{after:?}");
        let all = sum(&booting, &after);
        require_foreseen(&all);
        assert!(all.wait_us * 5 <= all.plain_wait_us, "{all:?}");
    }
}

#[test]
fn what_was_learned_survives_as_bytes() {
    let mut taught = predictor();
    boot(&mut taught, &excerpt(BOOT_1), true);
    let bytes = taught.to_bytes();
    let mut restored = AccessPredictor::from_bytes(&bytes, AccessConfig { size_pages: 1 << 20, ..Default::default() })
        .expect("own bytes");
    assert_eq!(restored.to_bytes(), bytes);
    let (booting, after) = boot(&mut restored, &excerpt(BOOT_2), true);
    require_foreseen(&sum(&booting, &after));
    println!("profile {} bytes, {:?}", bytes.len(), restored.summary());
    assert!(bytes.len() < 1 << 20, "{}", bytes.len());
}

#[test]
fn programs_after_the_boot_phase_are_recognised() {
    let mut predictor = predictor();
    boot(&mut predictor, &excerpt(BOOT_1), false);
    let (booting, after) = boot(&mut predictor, &excerpt(BOOT_2), false);
    println!("boot {booting:?}\nprograms {after:?}");
    require_foreseen(&booting);
    // Nobody said that programs began: the log alone knows them, and at the default threshold the others guess along.
    assert!(after.coverage() >= 0.95, "coverage {:.3}: {after:?}", after.coverage());
    assert!(after.precision() >= 0.6, "precision {:.3}: {after:?}", after.precision());
    let (proposed, used) = after.by_expert[prestage_predictor::Expert::Log.index()];
    assert!(used as f64 >= proposed as f64 * 0.95, "log: {used} of {proposed}");
}

#[test]
fn with_nothing_learned_fewer_reads_wait_and_traffic_stays_bounded() {
    for text in [BOOT_1, BOOT_2] {
        let (booting, after) = boot(&mut predictor(), &excerpt(text), true);
        let all = sum(&booting, &after);
        println!("{:.3} {:.3} {:.3} {all:?}", all.coverage(), all.precision(), all.traffic());
        assert!(all.predicted as f64 >= all.reads as f64 * 0.6, "{all:?}");
        assert!(all.precision() >= 0.35, "{all:?}");
        assert!(all.wait_us as f64 <= all.plain_wait_us as f64 * 0.4, "{all:?}");
        assert!(all.traffic() <= 2.2, "{all:?}");
    }
}

#[test]
fn a_snapshot_in_mid_boot_keeps_what_was_seen_and_does_not_count_it_twice() {
    let events = excerpt(BOOT_1);
    let mut predictor = predictor();
    predictor.phase_start(1, Phase::Boot, 0);
    let mut out = Vec::new();
    let mut snapshots = Vec::new();
    for (i, event) in events.iter().enumerate() {
        if let Event::Access(access) = event {
            predictor.observe(access);
            predictor.predict(access.at_us, &mut out);
        }
        if i % 1000 == 999 {
            snapshots.push(predictor.to_bytes());
        }
    }
    let runs = |predictor: &AccessPredictor| predictor.summary().phases[0].runs;
    assert_eq!(runs(&predictor), 1);
    predictor.phase_end(1, 300_000_000);
    assert_eq!(runs(&predictor), 1);

    // Killed in mid-boot: the next boot begins well, and ends learned as a whole.
    let config = || AccessConfig { size_pages: 1 << 20, ..Default::default() };
    let mut killed = AccessPredictor::from_bytes(&snapshots[0], config()).expect("snapshot");
    let (booting, _) = boot(&mut killed, &excerpt(BOOT_2), true);
    assert!(booting.predicted >= 600, "{booting:?}");
    let (booting, after) = boot(&mut killed, &excerpt(BOOT_1), true);
    require_foreseen(&sum(&booting, &after));
}

#[test]
fn a_different_guest_on_a_learned_storage_wastes_little() {
    let mut predictor = predictor();
    boot(&mut predictor, &excerpt(BOOT_1), true);
    // A boot of something else: random reads that share nothing with the set, but for a few pages.
    let mut state = 7u64;
    let events: Vec<Event> = (0..5000)
        .map(|i| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let first = (state >> 33) % (1 << 20);
            Event::Access(Access { at_us: i * 10_000, vm: 1, op: prestage_predictor::Op::Read, first, pages: 2 })
        })
        .collect();
    let (figures, _) = boot(&mut predictor, &events, true);
    assert!(figures.proposed_pages * 4096 <= 256 << 20, "{figures:?}");
}

#[test]
fn the_same_accesses_raise_the_same_candidates() {
    let run = || {
        let mut predictor = predictor();
        let mut out = Vec::new();
        for event in excerpt(BOOT_1) {
            if let Event::Access(access) = event {
                predictor.observe(&access);
                predictor.predict(access.at_us, &mut out);
            }
        }
        (out, predictor.to_bytes())
    };
    assert!(run() == run());
}

#[test]
fn refusals_say_what_to_do() {
    let bytes = predictor().to_bytes();
    let read = |bytes: &[u8]| AccessPredictor::from_bytes(bytes, AccessConfig::default()).map(|_| ());
    assert_eq!(read(&bytes), Ok(()));
    assert_eq!(read(b"").unwrap_err(), ProfileError::NotAProfile);
    assert_eq!(read(b"SQLite format 3\0").unwrap_err(), ProfileError::NotAProfile);
    assert!(matches!(read(&bytes[..bytes.len() - 1]), Err(ProfileError::Truncated { .. })));
    assert!(matches!(read(&bytes[..10]), Err(ProfileError::Truncated { .. })));
    let mut other = bytes.clone();
    other[8] = 9;
    let error = read(&other).unwrap_err();
    assert_eq!(error, ProfileError::OtherVersion { found: 9, expected: VERSION });
    assert!(error.to_string().contains("version 9") && error.to_string().contains("prestagectl profile remove"));
    let mut damaged = bytes.clone();
    damaged[30] ^= 1;
    assert!(matches!(read(&damaged), Err(ProfileError::Checksum { .. })));
}

#[test]
fn memory_stays_within_its_bounds_under_any_load() {
    let mut predictor = predictor();
    let empty = predictor.memory_bytes();
    let (mut state, mut out) = (3u64, Vec::new());
    for i in 0..200_000u64 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let first = (state >> 33) % (1 << 20);
        predictor.observe(&Access { at_us: i * 100, vm: i % 3, op: prestage_predictor::Op::Read, first, pages: 8 });
        if i % 64 == 0 {
            predictor.predict(i * 100, &mut out);
            out.clear();
        }
    }
    // Three recordings of at most 256 MiB in 8-page pieces (40 bytes each), the sets kept of them, and the tables.
    assert!(empty < 3 << 20, "{empty}");
    assert!(predictor.memory_bytes() < 16 << 20, "{}", predictor.memory_bytes());
}

fn operations() -> impl Strategy<Value = Vec<(u8, u64, u64, u32, u8)>> {
    let page = prop_oneof![0u64..2000, any::<u64>()];
    let pages = prop_oneof![0u32..40, any::<u32>()];
    let pause = prop_oneof![0u64..5000, 0u64..20_000_000, Just(u64::MAX / 64)];
    prop::collection::vec((0u8..12, pause, page, pages, 0u8..3), 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn any_operations_keep_the_promises(ops in operations(), size_pages in prop_oneof![1u64..3000, Just(u64::MAX)]) {
        let config = AccessConfig { size_pages, markov_contexts: 256, recent_blocks: 512, ..Default::default() };
        let mut predictor = AccessPredictor::new(config.clone());
        let (mut at_us, mut out) = (0u64, Vec::new());
        for (op, pause_us, first, pages, vm) in ops {
            at_us = at_us.saturating_add(pause_us);
            let vm = u64::from(vm);
            match op {
                0 => predictor.phase_start(vm, Phase::Boot, at_us),
                1 => predictor.phase_start(vm, Phase::Program(first), at_us),
                2 => predictor.phase_end(vm, at_us),
                3 => predictor.vm_forget(vm),
                4 => predictor.outcome(&Outcome {
                    first, pages, expert: prestage_predictor::Expert::Phase, used: pages % 2 == 0, late: false,
                }),
                5 => predictor = AccessPredictor::from_bytes(&predictor.to_bytes(), config.clone()).expect("own bytes"),
                _ => {
                    let op = match op {
                        6 => prestage_predictor::Op::Write,
                        7 => prestage_predictor::Op::Discard,
                        _ => prestage_predictor::Op::Read,
                    };
                    predictor.observe(&Access { at_us, vm, op, first, pages });
                }
            }
            out.clear();
            predictor.predict(at_us, &mut out);
            let mut seen = std::collections::HashSet::new();
            for candidate in &out {
                prop_assert!(candidate.pages >= 1 && candidate.pages <= 128);
                prop_assert!(candidate.first + u64::from(candidate.pages) <= size_pages);
                prop_assert!((0.0..=1.0).contains(&candidate.probability));
                prop_assert!(candidate.due_us.is_none_or(|due_us| due_us >= at_us));
                for page in candidate.first..candidate.first + u64::from(candidate.pages) {
                    prop_assert!(seen.insert(page), "page {} twice", page);
                }
            }
            out.clear();
            predictor.predict(at_us, &mut out);
            prop_assert!(out.is_empty(), "proposed again: {:?}", out);
        }
    }

    #[test]
    fn serialised_knowledge_predicts_the_same(
        taught in prop::collection::vec((0u64..4000, 1u32..20, 0u64..3_000_000), 1..200),
        tried in prop::collection::vec((0u64..4000, 1u32..20, 0u64..100_000), 1..60),
    ) {
        let config = AccessConfig { size_pages: 4100, ..Default::default() };
        let mut original = AccessPredictor::new(config.clone());
        original.phase_start(1, Phase::Boot, 0);
        let (mut at_us, mut out) = (0, Vec::new());
        for (i, &(first, pages, pause_us)) in taught.iter().enumerate() {
            at_us += pause_us;
            if i == taught.len() / 2 {
                original.phase_end(1, at_us);
            }
            original.observe(&Access { at_us, vm: 1, op: prestage_predictor::Op::Read, first, pages });
            original.predict(at_us, &mut out);
        }
        original.vm_forget(1);
        let bytes = original.to_bytes();
        let restore = || AccessPredictor::from_bytes(&bytes, config.clone()).expect("own bytes");
        let (mut original, mut copy) = (restore(), restore());
        prop_assert_eq!(original.to_bytes(), bytes.clone());
        let mut outs = (Vec::new(), Vec::new());
        at_us += 1_000_000;
        for predictor in [&mut original, &mut copy] {
            predictor.phase_start(2, Phase::Boot, at_us);
        }
        for (i, (first, pages, pause_us)) in tried.into_iter().enumerate() {
            at_us += pause_us;
            let access = Access { at_us, vm: 2, op: prestage_predictor::Op::Read, first, pages };
            if i == 20 {
                original.phase_end(2, at_us);
                copy.phase_end(2, at_us);
            }
            original.observe(&access);
            original.predict(at_us, &mut outs.0);
            copy.observe(&access);
            copy.predict(at_us, &mut outs.1);
        }
        prop_assert_eq!(outs.0, outs.1);
        prop_assert_eq!(original.to_bytes(), copy.to_bytes());
    }

    #[test]
    fn any_bytes_are_refused_without_panic(noise in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(AccessPredictor::from_bytes(&noise, AccessConfig::default()).is_err());
        // The same noise behind a right header.
        let mut bytes = b"PSTGPROF".to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((noise.len() as u64).to_le_bytes());
        bytes.extend(crc32c::crc32c(&noise).to_le_bytes());
        bytes.extend(&noise);
        let read = AccessPredictor::from_bytes(&bytes, AccessConfig::default());
        prop_assert!(matches!(read, Err(ProfileError::Damaged(_))));
    }

    #[test]
    fn a_changed_byte_behind_a_right_checksum_never_panics(
        at in any::<prop::sample::Index>(), value: u8, tried in prop::collection::vec((0u64..4000, 1u32..20), 1..40),
    ) {
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        predictor.phase_start(1, Phase::Program(3), 0);
        for i in 0..300u64 {
            if i == 150 {
                predictor.phase_end(1, i * 20_000);
            }
            let first = i * i * 7 % 3989;
            predictor.observe(&Access { at_us: i * 20_000, vm: 1, op: prestage_predictor::Op::Read, first, pages: 3 });
        }
        let mut bytes = predictor.to_bytes();
        let at = 24 + at.index(bytes.len() - 24);
        bytes[at] = value;
        let sum = crc32c::crc32c(&bytes[24..]);
        bytes[20..24].copy_from_slice(&sum.to_le_bytes());
        if let Ok(mut predictor) = AccessPredictor::from_bytes(&bytes, AccessConfig::default()) {
            let mut out = Vec::new();
            predictor.phase_start(1, Phase::Program(3), 0);
            for (i, (first, pages)) in tried.into_iter().enumerate() {
                let at_us = i as u64 * 1_000_000;
                predictor.observe(&Access { at_us, vm: 1, op: prestage_predictor::Op::Read, first, pages });
                predictor.predict(at_us, &mut out);
            }
            predictor.vm_forget(1);
            prop_assert!(!predictor.to_bytes().is_empty());
        }
    }
}
