//! Files of what was learned, whose checksums are right and whose content is not: a profile that a predictor wrote and
//! somebody changed, a payload made up whole, the state of a forecaster and of a contest of models, weights of networks.
//!
//! What must hold: they are refused, or lived with: every candidate lies on the disk with a probability of 0 to 1, and what
//! is saved again can be read again.
#![no_main]

use arbitrary::{Result, Unstructured};
use prestage_predictor::access::MAX_PAGES;
use prestage_predictor::contest::{Contest, ContestConfig};
use prestage_predictor::demand::{self, Context, Forecaster, Metric};
use prestage_predictor::profile::VERSION;
use prestage_predictor::{Access, AccessConfig, AccessPredictor, Op, Phase, lstm};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // The bytes have run out: nothing more to try.
    let _ = play(&mut Unstructured::new(data));
});

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

fn play(bytes: &mut Unstructured<'_>) -> Result<()> {
    match bytes.int_in_range(0..=7_u8)? {
        0..=3 => {
            let mut predictor = AccessPredictor::new(small());
            live(&mut predictor, bytes, 64)?;
            let mut payload = predictor.to_bytes().split_off(24);
            for _ in 0..bytes.int_in_range(1..=8_u8)? {
                edit(&mut payload, bytes)?;
            }
            reopened(&profile(&payload), bytes)
        }
        4 | 5 => {
            let len = bytes.int_in_range(0..=bytes.len())?;
            let payload = bytes.bytes(len)?;
            reopened(&profile(payload), bytes)
        }
        6 => {
            let mut state = bytes.bytes(24)?.to_vec();
            state.extend(u64::from(crc32c::crc32c(&state)).to_le_bytes());
            if let Some(mut contest) = Contest::from_bytes(&state, ContestConfig::default()) {
                assert_eq!(contest.to_bytes(), state);
                contest.add(bytes.arbitrary()?, bytes.arbitrary()?);
                let [least, likely, most] = contest.saved_bits();
                assert!(!(least > most) && !likely.is_infinite(), "{least} {likely} {most}");
            }
            Ok(())
        }
        _ => forecaster(bytes),
    }
}

/// A forecaster's state that was changed after it was written, and weights of networks.
fn forecaster(bytes: &mut Unstructured<'_>) -> Result<()> {
    let mut forecaster = Forecaster::new(*bytes.choose(&[Metric::Cpu, Metric::Memory])?, 60);
    for step in 0..u64::from(bytes.int_in_range(0..=40_u8)?) {
        forecaster.observe(60 * step, f64::from(bytes.arbitrary::<u16>()?));
        forecaster.rehearse(&Context::default(), None);
    }
    let mut state = forecaster.write().split_off(16);
    for _ in 0..bytes.int_in_range(1..=8_u8)? {
        edit(&mut state, bytes)?;
    }
    let mut file = b"PSTGFCST".to_vec();
    file.extend(2_u32.to_le_bytes());
    file.extend(crc32c::crc32c(&state).to_le_bytes());
    file.extend(state);
    if let Ok(mut forecaster) = Forecaster::read(&file) {
        forecaster.observe(bytes.arbitrary()?, bytes.arbitrary()?);
        forecaster.rehearse(&Context::default(), None);
        let told = forecaster.forecast(usize::from(bytes.arbitrary::<u8>()?), &Context::default(), None);
        for quantiles in told.steps.iter().chain([&told.peak]) {
            assert!(quantiles.0.is_sorted() && quantiles.0.iter().all(|value| *value >= 0.0), "{quantiles:?}");
        }
        let saved = forecaster.write();
        let again = Forecaster::read(&saved).expect("what was saved can be read");
        assert_eq!(again.write(), saved, "a state that is read and written changes");
    }
    let rest = bytes.bytes(bytes.len())?;
    let _ = lstm::Weights::from_bytes(rest);
    let _ = demand::Weights::from_bytes(rest);
    Ok(())
}

/// One change: a byte, a piece left out, a piece put in, a piece said twice.
fn edit(payload: &mut Vec<u8>, bytes: &mut Unstructured<'_>) -> Result<()> {
    if payload.is_empty() {
        return Ok(());
    }
    let at = bytes.choose_index(payload.len())?;
    let len = bytes.int_in_range(1..=16_usize)?.min(payload.len() - at);
    match bytes.int_in_range(0..=3_u8)? {
        0 => payload[at] = bytes.arbitrary()?,
        1 => drop(payload.drain(at..at + len)),
        2 => {
            let piece = payload[at..at + len].to_vec();
            payload.splice(at..at, piece);
        }
        _ => {
            let piece = bytes.bytes(len.min(bytes.len()))?.to_vec();
            payload.splice(at..at, piece);
        }
    }
    Ok(())
}

fn profile(payload: &[u8]) -> Vec<u8> {
    let mut file = b"PSTGPROF".to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend((payload.len() as u64).to_le_bytes());
    file.extend(crc32c::crc32c(payload).to_le_bytes());
    file.extend(payload);
    file
}

fn reopened(file: &[u8], bytes: &mut Unstructured<'_>) -> Result<()> {
    let Ok(mut predictor) = AccessPredictor::from_bytes(file, small()) else { return Ok(()) };
    live(&mut predictor, bytes, 32)?;
    let saved = predictor.to_bytes();
    let again = AccessPredictor::from_bytes(&saved, small()).expect("what was saved can be read");
    assert_eq!(again.to_bytes(), saved, "a profile that is read and written changes");
    Ok(())
}

/// Some moves of a machine, every candidate checked.
fn live(predictor: &mut AccessPredictor, bytes: &mut Unstructured<'_>, most: u8) -> Result<()> {
    let (mut out, mut at_us) = (Vec::new(), 0_u64);
    for _ in 0..bytes.int_in_range(0..=most)? {
        at_us = at_us.saturating_add(u64::from(bytes.arbitrary::<u16>()?));
        let vm = u64::from(bytes.int_in_range(0..=2_u8)?);
        let place = match bytes.int_in_range(0..=7_u8)? {
            0..=5 => u64::from(bytes.arbitrary::<u16>()?),
            6 => MAX_PAGES - u64::from(bytes.arbitrary::<u8>()?),
            _ => bytes.arbitrary()?,
        };
        match bytes.int_in_range(0..=11_u8)? {
            0..=7 => {
                let op = *bytes.choose(&[Op::Read, Op::Read, Op::Read, Op::Write, Op::Discard])?;
                let pages = u32::from(bytes.int_in_range(0..=64_u8)?);
                predictor.observe(&Access { at_us, vm, op, first: place, pages });
            }
            8 => predictor.phase_start(vm, Phase::Program(place % 4), at_us),
            9 => predictor.phase_end(vm, at_us),
            10 => predictor.phase_start(vm, Phase::Boot, at_us),
            _ => drop(predictor.explain(place)),
        }
        predictor.predict(at_us, &mut out);
        for candidate in out.drain(..) {
            let end = candidate.first.checked_add(u64::from(candidate.pages));
            assert!(end.is_some_and(|end| end <= MAX_PAGES) && (1..=128).contains(&candidate.pages), "{candidate:?}");
            assert!((0.0..=1.0).contains(&candidate.probability), "{candidate:?}");
        }
    }
    Ok(())
}
