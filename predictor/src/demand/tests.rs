//! Properties of forecasts on any input, and of the whole on series that are known.

use super::features::{CHANNELS, FIXED, Features, PEAK, RECENT, STEP};
use super::weights::{COUNT, OFFSETS, PARTS};
use super::*;
use crate::lstm::Path;
use proptest::prelude::*;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Sum of twelve: near enough to normal.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

fn any_weights(seed: u64, members: usize, bound: f32) -> Weights {
    let mut random = Random(seed);
    let mut flat: Vec<f32> = (0..COUNT * members).map(|_| bound * (2.0 * random.unit() as f32 - 1.0)).collect();
    for member in flat.chunks_exact_mut(COUNT) {
        for (part, from) in PARTS.iter().zip(OFFSETS).filter(|(part, _)| part.name.ends_with("_scale")) {
            member[from..from + part.len()].fill(1.0);
        }
    }
    Weights::new(flat).unwrap()
}

fn check(forecast: &Forecast, steps: usize, largest: f64) -> Result<(), TestCaseError> {
    prop_assert_eq!(forecast.steps.len(), steps);
    for quantiles in forecast.steps.iter().chain([&forecast.peak]) {
        prop_assert!(quantiles.0.iter().all(|value| value.is_finite() && *value >= 0.0), "{:?}", quantiles);
        prop_assert!(quantiles.0.is_sorted(), "{:?}", quantiles);
        prop_assert!(quantiles.0[3] <= 10.0 * largest, "{:?} beyond 10 × {}", quantiles, largest);
    }
    let share: f32 = forecast.basis.shares.iter().sum();
    prop_assert!((share - 1.0).abs() < 1e-4 || forecast.basis.history == 0, "{share}");
    Ok(())
}

/// What may come: steps passed since the last value, and a value.
fn values() -> impl Strategy<Value = Vec<(u64, f64)>> {
    let value = prop_oneof![
        4 => 0.0..100.0_f64,
        2 => Just(0.0),
        2 => Just(7.0),
        1 => 1e-30..1e-20_f64,
        1 => 1e20..1e30_f64,
        1 => prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), Just(1e31)],
    ];
    let gap = prop_oneof![20 => Just(1_u64), 2 => 0..4_u64, 1 => 5..20_000_u64];
    prop::collection::vec((gap, value), 0..150)
}

/// At a step that fills both rings alike, grown value by value and read from what was written.
#[test]
fn a_forecaster_never_outgrows_its_bound() {
    let (start, step_s) = (1_372_629_804, 299);
    let mut forecaster = Forecaster::new(Metric::Disk, 299);
    let grow = |forecaster: &mut Forecaster, steps: std::ops::Range<u64>| {
        for at in steps {
            forecaster.observe(start + at * step_s, 1.0);
            let bytes = forecaster.memory_bytes();
            assert!(bytes <= 72 * 1024, "{bytes} bytes after {at}");
        }
    };
    grow(&mut forecaster, 0..4_300);
    let mut read = Forecaster::read(&forecaster.write()).unwrap();
    grow(&mut forecaster, 4_300..5_200);
    grow(&mut read, 4_300..5_200);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was measured, with any network and covariates: finite, not negative, ascending, bounded; and the same again.
    #[test]
    fn forecasts_are_sound(values in values(), step_s in prop_oneof![Just(1_u32), Just(10), Just(300), Just(3600), Just(200_000)], seed in any::<u64>(), steps in 1..40_usize, model in any::<bool>()) {
        let model = model.then(|| any_weights(seed, 1, if seed % 2 == 0 { 0.3 } else { 100.0 }));
        let wild = [f32::NAN, -3.0, 0.5, f32::INFINITY];
        let context = Context { activity: &wild, event: &wild, profile: None };
        let (mut a, mut at_s) = (Forecaster::new(Metric::Disk, step_s), 1_372_629_804_u64);
        for (gap, value) in values {
            at_s += gap * u64::from(step_s);
            a.observe(at_s, value);
            a.rehearse(&context, model.as_ref());
        }
        let forecast = a.forecast(steps, &context, model.as_ref());
        check(&forecast, steps, a.largest())?;
        prop_assert_eq!(&a.forecast(steps, &context, model.as_ref()), &forecast);
        // and as if there had been no break, but for the summary
        let bytes = a.write();
        prop_assert!(bytes.len() <= super::state::BYTES_MOST, "{} bytes", bytes.len());
        let b = Forecaster::read(&bytes).unwrap();
        prop_assert_eq!(b.write(), bytes);
        check(&b.forecast(steps, &context, model.as_ref()), steps, b.largest())?;
        prop_assert!(a.memory_bytes() <= 72 * 1024);
    }

    /// Damaged bytes are refused; with a checksum that is right they are read or refused, and what was read forecasts soundly.
    #[test]
    fn damaged_states_do_no_harm(seed in any::<u64>(), flips in prop::collection::vec((16_usize..40_000, any::<u8>()), 1..6), cut in prop::option::of(0_usize..20_000)) {
        let mut random = Random(seed);
        let mut forecaster = Forecaster::new(Metric::Cpu, 300);
        for at in 0..60 {
            forecaster.observe(at * 300, random.unit());
            forecaster.rehearse(&Context::default(), None);
        }
        let sound = forecaster.write();
        let mut bytes = sound.clone();
        for (at, value) in flips {
            let at = 16 + (at - 16) % (bytes.len() - 16);
            bytes[at] ^= value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.max(16));
        }
        if bytes != sound {
            prop_assert!(Forecaster::read(&bytes).is_err());
        }
        let checksum = crc32c::crc32c(&bytes[16..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        if let Ok(mut read) = Forecaster::read(&bytes) {
            let forecast = read.forecast(12, &Context::default(), None);
            check(&forecast, 12, f64::MAX / 20.0)?;
            read.observe(forecast.origin_s.saturating_add(300), 1.0);
            read.rehearse(&Context::default(), None);
        }
    }

    /// A profile's bytes come back, and any others are read or refused.
    #[test]
    fn profiles_survive(values in prop::collection::vec((0..2_000_000_u64, 0.0..1e12_f64), 0..300), noise in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut profile = Profile::default();
        for (at_s, value) in values {
            profile.observe(at_s, value);
        }
        let mut bytes = Vec::new();
        profile.write(&mut bytes);
        prop_assert_eq!(Profile::read(&bytes), Some(profile));
        let _ = Profile::read(&noise);
        if let Some(at) = noise.first().map(|at| usize::from(*at) % bytes.len()) {
            bytes[at] ^= 0x55;
            let _ = Profile::read(&bytes);
        }
    }
}

#[test]
fn what_is_too_small_or_too_large_for_any_float_is_bounded_and_said() {
    let mut forecaster = Forecaster::new(Metric::Network, 10);
    for at in 0..40 {
        forecaster.observe(at * 10, if at % 20 == 19 { 1e30 } else { 1e-30 });
    }
    // a network that says the most a network can
    let mut flat = any_weights(1, 1, 0.0).members().next().unwrap().to_vec();
    let bias = PARTS.iter().position(|part| part.name == "out_bias").unwrap();
    flat[OFFSETS[bias]..OFFSETS[bias + 1]].fill(9e3);
    let model = Weights::new(flat).unwrap();
    let forecast = forecaster.forecast(3, &Context::default(), Some(&model));
    assert!(forecast.capped);
    assert_eq!(forecast.steps[0].0[3], 10.0 * forecaster.largest());
    let calm = Forecaster::new(Metric::Network, 10).forecast(3, &Context::default(), None);
    assert!(!calm.capped && calm.steps.len() == 3 && calm.peak == Quantiles::default());
}

#[test]
fn a_constant_series_is_foretold_exactly_once_it_is_known_to_be_one() {
    let mut forecaster = Forecaster::new(Metric::Memory, 300);
    for at in 0..2000 {
        forecaster.observe(at * 300, 5e9);
        forecaster.rehearse(&Context::default(), None);
    }
    let forecast = forecaster.forecast(12, &Context::default(), None);
    assert!(!forecast.capped);
    for quantiles in forecast.steps.iter().chain([&forecast.peak]) {
        assert!(quantiles.0.iter().all(|value| (value / 5e9 - 1.0).abs() < 0.05), "{quantiles:?}");
    }
}

/// Shares of steps within .05 and .95, and of maxima below their .95, over forecasts of a series.
fn coverage(step_s: u32, count: u64, warm: u64, mut value: impl FnMut(u64) -> f64) -> (f64, f64) {
    let mut forecaster = Forecaster::new(Metric::Cpu, step_s);
    let values: Vec<f64> = (0..count).map(&mut value).collect();
    let (mut inside, mut steps, mut below, mut peaks) = (0, 0, 0, 0);
    for at in 0..count {
        forecaster.observe(at * u64::from(step_s), values[at as usize]);
        forecaster.rehearse(&Context::default(), None);
        if at < warm || at % 5 != 0 || at + 12 >= count {
            continue;
        }
        let forecast = forecaster.forecast(12, &Context::default(), None);
        let came = &values[at as usize + 1..at as usize + 13];
        inside += forecast.steps.iter().zip(came).filter(|(q, y)| (q.0[0]..=q.0[3]).contains(*y)).count();
        steps += 12;
        below += usize::from(came.iter().all(|y| *y <= forecast.peak.0[3]));
        peaks += 1;
    }
    (inside as f64 / steps as f64, below as f64 / peaks as f64)
}

#[test]
fn intervals_keep_their_promise_while_the_series_changes() {
    // noise whose width doubles and halves every two days; a level that jumps every day
    for (name, seed, kind) in [("width", 1, 0), ("level", 2, 1), ("walk", 3, 2)] {
        let mut random = Random(seed);
        let mut walk = 50.0_f64;
        let (inside, below) = coverage(300, 6000, 1000, |at| {
            let noise = random.normal();
            walk = (walk + 0.5 * noise).clamp(5.0, 200.0);
            match kind {
                0 => 50.0 + noise * if at / 576 % 2 == 0 { 2.0 } else { 4.0 },
                1 => 20.0 + 15.0 * (at / 288 % 3) as f64 + noise,
                _ => walk,
            }
        });
        assert!((inside - 0.9).abs() < 0.035, "{name}: {inside:.3} of the steps inside");
        assert!((below - 0.95).abs() < 0.035, "{name}: {below:.3} of the maxima below");
    }
}

#[test]
fn a_day_ahead_is_covered_too() {
    // swings of some days: what the last days show of a day's change is too little in some, too much in others
    let mut random = Random(11);
    let (mut level, mut values) = (50.0_f64, Vec::new());
    for at in 0..9000_u32 {
        let width = if at / 1440 % 2 == 0 { 0.3 } else { 1.2 };
        level = (level + width * random.normal()).clamp(5.0, 400.0);
        values.push(level);
    }
    let mut forecaster = Forecaster::new(Metric::Cpu, 300);
    let (mut inside, mut below, mut of) = (0, 0, 0);
    for (at, value) in values.iter().enumerate() {
        forecaster.observe(at as u64 * 300, *value);
        forecaster.rehearse(&Context::default(), None);
        if at > 1500 && at % 20 == 0 && at + 288 < values.len() {
            let forecast = forecaster.forecast(288, &Context::default(), None);
            let q = forecast.steps[287].0;
            let highest = values[at + 1..=at + 288].iter().copied().fold(0.0, f64::max);
            inside += usize::from((q[0]..=q[3]).contains(&values[at + 288]));
            below += usize::from(highest <= forecast.peak.0[3]);
            of += 1;
        }
    }
    let (inside, below) = (inside as f64 / of as f64, below as f64 / of as f64);
    assert!((inside - 0.9).abs() < 0.08, "{inside:.3} of the last steps inside");
    assert!((below - 0.95).abs() < 0.06, "{below:.3} of the maxima below");
}

#[test]
fn a_shift_does_not_go_beyond_what_was_seen() {
    let mut random = Random(12);
    let mut forecaster = Forecaster::new(Metric::Network, 300);
    // silent, with bursts that quantiles of the changes miss at first
    for at in 0..4000 {
        let burst = random.unit() < 0.04;
        forecaster.observe(at * 300, if burst { 1000.0 + 100.0 * random.unit() } else { 0.01 * random.unit() });
        forecaster.rehearse(&Context::default(), None);
        let forecast = forecaster.forecast(12, &Context::default(), None);
        let last = forecaster.series().view().last();
        if at > 100 && f64::from(last) < 1.0 {
            assert!(forecast.peak.0[3] <= 1.001 * forecaster.largest(), "{at}: {:?}", forecast.peak);
        }
    }
}

#[test]
fn a_day_that_repeats_is_believed() {
    let mut random = Random(5);
    let mut forecaster = Forecaster::new(Metric::Cpu, 300);
    // an hour's burst at the same time every day
    let mut value = |at: u64| if at % 288 / 12 == 9 { 80.0 } else { 5.0 } + random.unit();
    for at in 0..12 * 288 + 107 {
        forecaster.observe(at * 300, value(at));
        forecaster.rehearse(&Context::default(), None);
    }
    let forecast = forecaster.forecast(12, &Context::default(), None);
    assert!(forecast.peak.0[3] > 60.0, "{:?} a step before the burst", forecast.peak);
    assert!(forecast.basis.shares[2] + forecast.basis.shares[3] > 0.5, "{:?}", forecast.basis);
}

#[test]
fn the_scale_is_of_no_consequence() {
    let forecast = |unit: f64| {
        let mut random = Random(8);
        let mut forecaster = Forecaster::new(Metric::Disk, 60);
        for at in 0..500 {
            forecaster.observe(at * 60, unit * random.unit());
            forecaster.rehearse(&Context::default(), None);
        }
        forecaster.forecast(12, &Context::default(), None)
    };
    let (one, large) = (forecast(1.0), forecast(1e9));
    for (a, b) in one.steps.iter().zip(&large.steps) {
        assert!(a.0.iter().zip(b.0).all(|(a, b)| (b / 1e9 - a).abs() < 1e-3), "{a:?} {b:?}");
    }
}

#[test]
fn a_profile_speaks_for_a_series_that_has_just_begun() {
    let mut profile = Profile::default();
    for at in 0..2000 {
        profile.observe(at * 300, 40.0);
    }
    let mut forecaster = Forecaster::new(Metric::Cpu, 300);
    forecaster.observe(0, 10.0);
    let context = Context { profile: Some(&profile), ..Context::default() };
    let with = forecaster.forecast(1, &context, None);
    assert!(with.steps[0].0[1] > forecaster.forecast(1, &Context::default(), None).steps[0].0[1] + 5.0, "{with:?}");
    assert!(!with.capped && with.basis.shares[5] > 0.2);
}

#[test]
fn a_day_of_hours_and_a_minute_of_seconds_are_forecast() {
    for (step_s, steps) in [(3600, 24), (300, 288), (1, 60), (10, MAX_STEPS + 1)] {
        let mut random = Random(u64::from(step_s));
        let mut forecaster = Forecaster::new(Metric::Cpu, step_s);
        for at in 0..400 {
            forecaster.observe(at * u64::from(step_s), 10.0 + random.unit());
        }
        let model = any_weights(3, 2, 0.05);
        let forecast = forecaster.forecast(steps, &Context::default(), Some(&model));
        assert_eq!(forecast.steps.len(), steps.min(MAX_STEPS));
        assert_eq!(forecast.origin_s, 399 * u64::from(step_s));
    }
}

#[test]
fn values_go_to_the_nearest_step_and_the_last_of_a_step_wins() {
    let mut series = Series::new(300);
    for (at_s, value) in [(1000, 1.0), (1149, 2.0), (1150, 3.0), (2051, 4.0), (1500, 9.0), (2051, f64::NAN)] {
        series.push(at_s, value);
    }
    let view = series.view();
    assert_eq!(view.fine, [2.0, 3.0, 3.0, 3.0, 4.0]);
    assert_eq!(view.measured, [true, true, false, false, true]);
    assert_eq!((view.last_s, series.count()), (2200, 5));
}

fn any_features(seed: u64) -> Features {
    let mut random = Random(seed);
    let mut some = |count: usize| (0..count).map(|_| 4.0 * random.unit() as f32 - 2.0).collect::<Vec<f32>>();
    Features {
        recent: some(RECENT * CHANNELS),
        fixed: some(FIXED),
        steps: some(5 * STEP),
        peaks: some(2 * PEAK),
        last: 0.3,
        scale: 1.0,
    }
}

#[test]
fn all_instructions_say_the_same() {
    let features = any_features(4);
    let model = any_weights(9, 2, 0.2);
    let of = |path: Path| model.clone().on(path).quantiles(&features);
    let best = of(Path::best());
    for path in Path::available() {
        let said = of(path);
        let pairs = said.steps.iter().chain(&said.peaks).zip(best.steps.iter().chain(&best.peaks));
        for (a, b) in pairs.flat_map(|(a, b)| a.iter().zip(b)) {
            assert!((a - b).abs() < 1e-4, "{}: {a} {b}", path.name());
        }
    }
}

#[test]
fn the_features_have_the_lengths_that_are_stated() {
    let mut series = Series::new(300);
    series.push(0, 1.0);
    let view = series.view();
    let features = Features::of(&view, &Summary::of(&view), Metric::Cpu, &Context::default(), &[1, 2, 300], &[12, 288]);
    assert_eq!(features.recent.len(), RECENT * CHANNELS);
    assert_eq!((features.fixed.len(), features.steps.len(), features.peaks.len()), (FIXED, 3 * STEP, 2 * PEAK));
}

#[test]
fn weights_come_back_and_what_is_damaged_is_refused() {
    let model = any_weights(2, 2, 0.1);
    let bytes = model.to_bytes();
    let read = Weights::from_bytes(&bytes).unwrap();
    assert!(read.members().eq(model.members()));
    for at in [0, 9, 13, 17, 35, 40, bytes.len() - 1] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        assert!(Weights::from_bytes(&damaged).is_err(), "byte {at}");
    }
    for length in [0, 8, 15, 36, bytes.len() - 4, bytes.len() / 2] {
        assert!(Weights::from_bytes(&bytes[..length]).is_err(), "{length} bytes");
    }
    assert!(matches!(Weights::new(vec![f32::NAN; COUNT]), Err(WeightsError::Value { .. })));
    assert!(matches!(Weights::new(vec![0.0; COUNT + 1]), Err(WeightsError::Count { .. })));
}
