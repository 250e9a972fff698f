//! The kernels against a plain computation in double precision, against each other, and the bytes against damage.

use super::weights::{COUNT, PARTS};
use super::*;
use proptest::prelude::*;

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn weights(&mut self, scale: f32) -> Vec<f32> {
        (0..COUNT).map(|_| scale * ((self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0)).collect()
    }

    fn tokens(&mut self, count: usize) -> Vec<Token> {
        (0..count).filter_map(|_| Token::from_bits(self.next() as u16 & 0x3fff)).collect()
    }
}

fn part<'a>(flat: &'a [f32], name: &str) -> &'a [f32] {
    let index = PARTS.iter().position(|part| part.name == name).unwrap();
    let start = PARTS[..index].iter().map(|part| part.len()).sum::<usize>();
    &flat[start..start + PARTS[index].len()]
}

/// The model as its definition reads, in double precision: logits of every lead after the last token.
fn reference(flat: &[f32], tokens: &[Token]) -> [[f64; SYMBOLS]; 3] {
    let at = |name: &str, row: usize, column: usize| {
        let columns = PARTS.iter().find(|part| part.name == name).unwrap().columns;
        f64::from(part(flat, name)[row * columns + column])
    };
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (mut hidden, mut cell) = ([0.0; HIDDEN], [0.0; HIDDEN]);
    for token in tokens {
        let input: [f64; INPUT] = std::array::from_fn(|i| match i.checked_sub(SYMBOL_WIDTH) {
            None => at("symbol", token.symbol().into(), i),
            Some(i) => {
                at("op", token.op().into(), i) + at("size", token.size().into(), i) + at("gap", token.gap().into(), i)
            }
        });
        let gates: Vec<f64> = (0..GATES * HIDDEN)
            .map(|column| {
                at("bias", 0, column)
                    + (0..INPUT).map(|i| input[i] * at("input", i, column)).sum::<f64>()
                    + (0..HIDDEN).map(|i| hidden[i] * at("recurrent", i, column)).sum::<f64>()
            })
            .collect();
        for unit in 0..HIDDEN {
            let [i, f, g, o] = std::array::from_fn(|gate| gates[gate * HIDDEN + unit]);
            cell[unit] = sigmoid(f) * cell[unit] + sigmoid(i) * g.tanh();
            hidden[unit] = sigmoid(o) * cell[unit].tanh();
        }
    }
    std::array::from_fn(|lead| {
        std::array::from_fn(|symbol| {
            let column = lead * SYMBOLS + symbol;
            at("head_bias", 0, column) + (0..HIDDEN).map(|i| hidden[i] * at("head", i, column)).sum::<f64>()
        })
    })
}

fn logits(weights: &Weights, state: &State) -> [[f32; SYMBOLS]; 3] {
    Lead::ALL.map(|lead| {
        let mut out = [0.0; SYMBOLS];
        weights.logits(state, lead, &mut out);
        out
    })
}

fn distance(a: &[[f32; SYMBOLS]; 3], b: &[[f32; SYMBOLS]; 3]) -> f32 {
    a.as_flattened().iter().zip(b.as_flattened()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_path_computes_the_model(seed: u64, length in 1usize..40, scale in 0.01f32..0.5) {
        let mut random = Random(seed);
        let (flat, tokens) = (random.weights(scale), random.tokens(length));
        let expected = reference(&flat, &tokens);
        let weights = Weights::new(flat).unwrap();
        let mut first: Option<[[f32; SYMBOLS]; 3]> = None;
        let mut fused: Option<[[f32; SYMBOLS]; 3]> = None;
        for path in Path::available() {
            let weights = weights.clone().on(path);
            let mut state = State::default();
            for token in &tokens {
                weights.step(&mut state, *token);
            }
            let found = logits(&weights, &state);
            for (found, expected) in found.as_flattened().iter().zip(expected.as_flattened()) {
                prop_assert!((f64::from(*found) - expected).abs() <= 1e-5, "{}: {found} for {expected}", path.name());
            }
            prop_assert!(distance(first.get_or_insert(found), &found) <= 1e-5, "{} differs", path.name());
            if path.name() != "portable" {
                prop_assert_eq!(fused.get_or_insert(found), &found, "{} differs in bits", path.name());
            }
        }
    }

    #[test]
    fn a_batch_gives_the_bits_of_single_steps(seed: u64, streams in 0usize..40, rounds in 1usize..4) {
        let mut random = Random(seed);
        let weights = Weights::new(random.weights(0.3)).unwrap();
        for path in Path::available() {
            let weights = weights.clone().on(path);
            let mut single = vec![State::default(); streams];
            let mut batched = single.clone();
            for _ in 0..rounds {
                let tokens = random.tokens(streams);
                for (state, token) in single.iter_mut().zip(&tokens) {
                    weights.step(state, *token);
                }
                let mut batch: Vec<_> = batched.iter_mut().zip(tokens).collect();
                weights.step_batch(&mut batch);
            }
            prop_assert_eq!(&single, &batched);
        }
    }

    #[test]
    fn scores_are_the_logarithm_of_the_softmax(seed: u64, symbols in prop::collection::vec(any::<u8>(), 0..=16)) {
        let mut random = Random(seed);
        let weights = Weights::new(random.weights(2.0)).unwrap();
        for path in Path::available() {
            let weights = weights.clone().on(path);
            let mut state = State::default();
            for token in random.tokens(5) {
                weights.step(&mut state, token);
            }
            for (lead, logits) in Lead::ALL.into_iter().zip(logits(&weights, &state)) {
                let total = logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>();
                let mut out = vec![1.0; symbols.len()];
                weights.score(&state, lead, &symbols, &mut out);
                for (symbol, out) in symbols.iter().zip(out) {
                    match logits.get(usize::from(*symbol)) {
                        Some(x) => prop_assert!((f64::from(out) - (f64::from(*x).exp() / total).ln()).abs() <= 1e-5),
                        None => prop_assert_eq!(out, f32::NEG_INFINITY),
                    }
                }
            }
        }
    }

    #[test]
    fn damaged_bytes_are_refused(at in 0..COUNT * 4, flip in 1u8.., cut in 0..COUNT * 4) {
        let bytes = Weights::new(Random(1).weights(1.0)).unwrap().to_bytes();
        let mut damaged = bytes.clone();
        damaged[at] ^= flip;
        prop_assert!(Weights::from_bytes(&damaged).is_err());
        prop_assert!(Weights::from_bytes(&bytes[..cut]).is_err());
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        prop_assert!(Weights::from_bytes(&bytes).is_err());
        prop_assert!(Weights::from_bytes(&[b"PSTGLSTM", &1u32.to_le_bytes()[..], &bytes].concat()).is_err());
    }
}

#[test]
fn weights_survive_as_bytes() {
    let weights = Weights::new(Random(7).weights(1.0)).unwrap();
    let bytes = weights.to_bytes();
    let again = Weights::from_bytes(&bytes).unwrap();
    assert_eq!(again.flat(), weights.flat());
    assert_eq!(again.to_bytes(), bytes);
}

/// `bytes` with their checksum made right again.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = crc32c::crc32c(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn bytes_with_a_right_checksum_are_judged_too() {
    let bytes = Weights::new(Random(7).weights(1.0)).unwrap().to_bytes();
    let with = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        Weights::from_bytes(&sealed(bytes)).unwrap_err()
    };
    assert!(matches!(with(0, b"PSTGPROF"), WeightsError::NotWeights { .. }));
    assert!(matches!(with(8, &[2]), WeightsError::OtherVersion { found: 2, expected: 1, .. }));
    assert!(matches!(with(16, &[65]), WeightsError::Shape { .. }));
    for value in [f32::NAN, f32::INFINITY, -1.1e4] {
        let error = with(38 + 4 * PARTS[0].len() + 8, &value.to_le_bytes());
        assert!(matches!(error, WeightsError::Value { part: "op", index: 2, .. }), "{error}");
    }
    let longer = sealed([&bytes[..], &[0; 4]].concat());
    assert!(matches!(Weights::from_bytes(&longer), Err(WeightsError::Length { .. })));
}

#[test]
fn the_largest_weights_keep_the_state_finite() {
    let flat: Vec<f32> = Random(3).weights(1.0).into_iter().map(|x| if x < 0.0 { -1e4 } else { 1e4 }).collect();
    let weights = Weights::new(flat).unwrap();
    for path in Path::available() {
        let weights = weights.clone().on(path);
        let mut state = State::default();
        for token in Random(4).tokens(300) {
            weights.step(&mut state, token);
        }
        assert!(logits(&weights, &state).as_flattened().iter().all(|x| x.is_finite()));
    }
}
