//! Guests, caches and files that mean harm: whatever comes in, the predictor keeps its promises and its memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use prestage_predictor::access::MAX_PAGES;
use prestage_predictor::{Access, AccessConfig, AccessPredictor, Candidate, Expert, Op, Outcome, Phase};
use proptest::prelude::*;

const HEADER_BYTES: usize = 24;

/// Tables so small that everything is driven out all the time.
fn small() -> AccessConfig {
    AccessConfig {
        log_reads: 256,
        markov_contexts: 16,
        recent_blocks: 64,
        predictions: 64,
        phase_sets: 2,
        phase_bytes: 1 << 20,
        cache_pages: 4096,
        ..AccessConfig::default()
    }
}

/// What can happen to a predictor.
#[derive(Clone, Debug)]
enum Event {
    Access(Access),
    Start(u64, Phase, u64),
    End(u64, u64),
    Forget(u64),
    Outcome(u64, u32, usize, bool),
    Evicted(u64, u32),
    Resize(u64),
    Floor(f32),
    Lost,
    Saved,
    Explain(u64),
}

/// Places in the middle, and at every edge of what numbers can say.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0u64..300,
        2 => (0u64..40, 1u64..30).prop_map(|(a, b)| a * 65_536 + b),
        2 => (0u64..80).prop_map(|back| MAX_PAGES - back),
        1 => (0u64..80).prop_map(|ahead| MAX_PAGES + ahead),
        1 => (0u64..80).prop_map(|back| u64::MAX - back),
        1 => any::<u64>(),
    ]
}

fn pages() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0u32..40, 1 => 4000u32..5000, 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn time() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0u64..10_000_000, 1 => Just(0), 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn phase() -> impl Strategy<Value = Phase> {
    prop_oneof![Just(Phase::Boot), (0u64..3).prop_map(Phase::Program), any::<u64>().prop_map(Phase::Program)]
}

fn event() -> impl Strategy<Value = Event> {
    let vm = || 0u64..4;
    let op = prop_oneof![4 => Just(Op::Read), 1 => Just(Op::Write), 1 => Just(Op::Discard)];
    prop_oneof![
        40 => (time(), vm(), op, page(), pages())
            .prop_map(|(at_us, vm, op, first, pages)| Event::Access(Access { at_us, vm, op, first, pages })),
        3 => (vm(), phase(), time()).prop_map(|(vm, phase, at_us)| Event::Start(vm, phase, at_us)),
        2 => (vm(), time()).prop_map(|(vm, at_us)| Event::End(vm, at_us)),
        1 => vm().prop_map(Event::Forget),
        3 => (page(), pages(), 0usize..7, any::<bool>()).prop_map(|(f, p, e, used)| Event::Outcome(f, p, e, used)),
        2 => (page(), pages()).prop_map(|(first, pages)| Event::Evicted(first, pages)),
        1 => page().prop_map(Event::Resize),
        1 => prop_oneof![0f32..1.0, Just(0.0), Just(1.0), Just(f32::NAN)].prop_map(Event::Floor),
        1 => Just(Event::Lost),
        1 => Just(Event::Saved),
        1 => page().prop_map(Event::Explain),
    ]
}

fn sound(candidate: &Candidate, size_pages: u64) -> bool {
    (1..=128).contains(&candidate.pages)
        && candidate.first.checked_add(u64::from(candidate.pages)).is_some_and(|end| end <= size_pages)
        && (0.0..=1.0).contains(&candidate.probability)
}

/// Runs through `events`, and checks every candidate.
fn live(mut predictor: AccessPredictor, events: &[Event]) -> AccessPredictor {
    let (mut out, mut size_pages, mut now_us) = (Vec::new(), MAX_PAGES, 0);
    for event in events {
        match *event {
            Event::Access(access) => {
                now_us = access.at_us;
                predictor.observe(&access);
            }
            Event::Start(vm, phase, at_us) => predictor.phase_start(vm, phase, at_us),
            Event::End(vm, at_us) => predictor.phase_end(vm, at_us),
            Event::Forget(vm) => predictor.vm_forget(vm),
            Event::Outcome(first, pages, expert, used) => {
                predictor.outcome(&Outcome { first, pages, expert: Expert::ALL[expert], used, late: used });
            }
            Event::Evicted(first, pages) => predictor.evicted(first, pages),
            Event::Resize(pages) => {
                predictor.predict(now_us, &mut out);
                out.clear();
                predictor.resize(pages);
                size_pages = pages.min(MAX_PAGES);
            }
            Event::Floor(floor) => predictor.set_min_probability(floor),
            Event::Lost => predictor.forget_resident(),
            Event::Saved => {
                let bytes = predictor.to_bytes();
                let again = AccessPredictor::from_bytes(&bytes, small()).unwrap();
                assert_eq!(again.summary().phases.len(), predictor.summary().phases.len().min(2));
            }
            Event::Explain(page) => {
                let _ = predictor.explain(page);
            }
        }
        predictor.predict(now_us, &mut out);
        assert!(out.iter().all(|candidate| sound(candidate, size_pages)), "{event:?}: {out:?}");
        out.clear();
    }
    predictor
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn anything_in_any_order_keeps_every_promise(events in prop::collection::vec(event(), 1..250)) {
        live(AccessPredictor::new(small()), &events);
    }

    /// A profile whose checksum is right and whose content is not: written by a bug, or by somebody.
    #[test]
    fn a_forged_profile_is_refused_or_lived_with(
        events in prop::collection::vec(event(), 1..150),
        forged in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop_oneof![3 => Just(0usize), 1 => 1usize..2000],
        after in prop::collection::vec(event(), 1..100),
    ) {
        let mut bytes = live(AccessPredictor::new(small()), &events).to_bytes();
        bytes.truncate(bytes.len().saturating_sub(cut).max(HEADER_BYTES + 1));
        for (at, byte) in forged {
            let at = HEADER_BYTES + at.index(bytes.len() - HEADER_BYTES);
            bytes[at] = byte;
        }
        let length = (bytes.len() - HEADER_BYTES) as u64;
        let checksum = crc32c::crc32c(&bytes[HEADER_BYTES..]);
        bytes[12..20].copy_from_slice(&length.to_le_bytes());
        bytes[20..24].copy_from_slice(&checksum.to_le_bytes());
        if let Ok(predictor) = AccessPredictor::from_bytes(&bytes, small()) {
            live(predictor, &after);
        }
    }
}

#[test]
fn a_page_that_no_storage_has_is_explained_as_unexpected() {
    let mut predictor = AccessPredictor::new(small());
    predictor.phase_start(0, Phase::Boot, 0);
    predictor.observe(&Access { at_us: 0, vm: 0, op: Op::Read, first: 0, pages: 64 });
    // The set is known now, and replayed.
    predictor.phase_start(0, Phase::Boot, 0);
    for page in [MAX_PAGES, u64::MAX - 1, u64::MAX] {
        assert!(predictor.explain(page).votes.is_empty());
    }
}
