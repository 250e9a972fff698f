//! The kernels against Burn; training that learns, stops, and survives its interruption.

use crate::corpus::{MINIMUM_TOKENS, SHORTEST};
use crate::network::Carry;
use crate::*;
use burn::tensor::{Device, Tensor};
use prestage_predictor::lstm::weights::COUNT;
use prestage_predictor::lstm::{HIDDEN, Lead, Path, SYMBOLS, State, Token, Weights};
use proptest::prelude::*;

fn weights(random: &mut Random, scale: f32) -> Vec<f32> {
    (0..COUNT).map(|_| scale * random.symmetric()).collect()
}

fn any_tokens(random: &mut Random, count: usize) -> Vec<Token> {
    (0..count).filter_map(|_| Token::from_bits(random.next() as u16 & 0x3fff)).collect()
}

/// Tokens whose symbol follows from that of three accesses before: an order-2 context does not see it.
fn distant(seed: u64, count: usize) -> Vec<Token> {
    let mut random = Random(seed);
    let mut symbols: Vec<u8> = (0..3).map(|_| random.below(8) as u8).collect();
    for at in 3..count {
        let noise = random.below(16) == 0;
        symbols.push(if noise { random.below(8) as u8 } else { (symbols[at - 3] + 3) % 8 });
    }
    symbols.into_iter().map(|symbol| Token::new(symbol, symbol & 3, symbol, 0).unwrap()).collect()
}

/// Burn's logits of all leads after each token.
fn burn_logits(network: &Network, tokens: &[Token], device: &Device) -> Vec<f32> {
    let empty = Tensor::zeros([1, HIDDEN], device);
    let rows: Vec<Vec<Token>> = tokens.iter().map(|token| vec![*token]).collect();
    let (hidden, _) = network.forward(&rows, Carry { hidden: empty.clone(), cell: empty });
    network.logits(Tensor::cat(hidden, 0)).into_data().iter::<f32>().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_kernels_compute_what_burn_computes(seed: u64, length in 1usize..=500, scale in 0.01f32..0.3) {
        let mut random = Random(seed);
        let (flat, tokens) = (weights(&mut random, scale), any_tokens(&mut random, length));
        for backend in Backend::ALL {
            let device = backend.device();
            let expected = burn_logits(&Network::new(&flat, &device), &tokens, &device);
            for path in Path::available() {
                let weights = Weights::new(flat.clone()).unwrap().on(path);
                let mut state = State::default();
                let mut rows = expected.chunks_exact(SYMBOLS);
                for token in &tokens {
                    weights.step(&mut state, *token);
                    for lead in Lead::ALL {
                        let mut found = [0.0; SYMBOLS];
                        weights.logits(&state, lead, &mut found);
                        for (found, expected) in found.iter().zip(rows.next().unwrap()) {
                            let distance = (found - expected).abs();
                            prop_assert!(distance <= 1e-4, "{} and {}: {distance:e}", path.name(), backend.name());
                        }
                    }
                }
                prop_assert!(rows.next().is_none());
            }
        }
    }

    #[test]
    fn damaged_checkpoints_are_refused(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let corpus = corpus();
        let bytes = Trainer::new(TrainConfig::default(), corpus.clone()).checkpoint();
        let at = at.index(bytes.len());
        let mut damaged = bytes.clone();
        damaged[at] ^= flip;
        prop_assert!(Trainer::resume(&damaged, corpus.clone(), Backend::default()).is_err());
        prop_assert!(Trainer::resume(&bytes[..at], corpus, Backend::default()).is_err());
    }
}

fn corpus() -> Corpus {
    Corpus::new(vec![distant(1, 6000), distant(2, 300), distant(3, 6000)]).unwrap()
}

#[test]
fn training_finds_what_an_order_2_context_cannot() {
    let corpus = Corpus::new(vec![distant(1, 30_000)]).unwrap();
    for backend in Backend::ALL {
        let config = TrainConfig { backend: *backend, ..TrainConfig::default() };
        let mut trainer = Trainer::new(config, corpus.clone());
        assert_eq!(trainer.train(256, &|| false), Ok(Pause::Budget));
        let weights = trainer.export().unwrap();
        let [next, ..] = evaluate(weights, &corpus);
        let [peer, ..] = markov(&corpus);
        assert_eq!(next.predictions, peer.predictions);
        assert!(next.top1 > 0.8 && peer.top1 < 0.5, "{next:?} {peer:?}");
        assert!(next.bits < 0.6 * peer.bits, "{next:?} {peer:?}");
        let sum: f64 = evaluate(weights, &corpus).iter().map(|score| score.bits).sum();
        assert_eq!(sum, trainer.progress().held_out_bits);
    }
}

#[test]
fn markov_reads_a_sequence_of_order_2() {
    let tokens = (0..10_000).map(|at| Token::new([1, 1, 2, 3, 2][at % 5], 0, 0, 0).unwrap()).collect();
    for score in markov(&Corpus::new(vec![tokens]).unwrap()) {
        assert!(score.top1 == 1.0 && score.bits < 0.05, "{score:?}");
    }
}

#[test]
fn an_interrupted_training_is_the_uninterrupted_one() {
    for backend in Backend::ALL {
        let config = TrainConfig { backend: *backend, ..TrainConfig::default() };
        let mut whole = Trainer::new(config, corpus());
        assert_eq!(whole.train(20, &|| false), Ok(Pause::Budget));
        let mut part = Trainer::new(config, corpus());
        for steps in [0, 3, 15, 2] {
            assert_eq!(part.train(steps, &|| false), Ok(Pause::Budget));
            let bytes = part.checkpoint();
            part = Trainer::resume(&bytes, corpus(), *backend).unwrap();
            assert_eq!(part.checkpoint(), bytes);
        }
        assert_eq!(part.progress(), whole.progress());
        assert_eq!(part.checkpoint(), whole.checkpoint());
        assert!(whole.progress().epoch > 0 && whole.export().is_some());
    }
}

#[test]
fn training_stops_when_asked_and_when_nothing_is_left_to_learn() {
    let mut random = Random(9);
    let noise = Corpus::new(vec![any_tokens(&mut random, MINIMUM_TOKENS)]).unwrap();
    let mut trainer = Trainer::new(TrainConfig::default(), noise);
    let asked = std::cell::Cell::new(0);
    let after_two = || asked.replace(asked.get() + 1) == 2;
    assert_eq!(trainer.train(100, &after_two), Ok(Pause::Asked));
    assert_eq!(trainer.progress().steps, 2);
    assert_eq!(trainer.train(2000, &|| false), Ok(Pause::Converged));
    let stopped = trainer.progress();
    assert!(stopped.converged && stopped.steps < 2000, "{stopped:?}");
    assert_eq!(trainer.train(10, &|| false), Ok(Pause::Converged));
    assert_eq!(trainer.progress(), stopped);
}

#[test]
fn a_rate_that_is_too_high_is_reported() {
    let config = TrainConfig { learning_rate: 1e30, ..TrainConfig::default() };
    assert!(Trainer::new(config, corpus()).train(100, &|| false).is_err());
}

#[test]
fn too_little_is_refused_with_what_there_is() {
    let sequences = vec![distant(1, MINIMUM_TOKENS - 1), distant(2, SHORTEST - 1)];
    let error = Corpus::new(sequences).unwrap_err();
    assert_eq!(error, CorpusError { found: MINIMUM_TOKENS - 1, needed: MINIMUM_TOKENS });
    let corpus = Corpus::new(vec![distant(1, SHORTEST - 1), distant(2, MINIMUM_TOKENS)]).unwrap();
    assert_eq!((corpus.tokens(), corpus.left_out()), (MINIMUM_TOKENS, SHORTEST - 1));
    // the shortest sequences of all, and each has its window
    let shortest = Corpus::new((0..200).map(|seed| distant(seed, SHORTEST)).collect()).unwrap();
    assert_eq!(Trainer::new(TrainConfig::default(), shortest).train(1, &|| false), Ok(Pause::Budget));
}

#[test]
fn a_checkpoint_of_other_tokens_is_refused() {
    let bytes = Trainer::new(TrainConfig::default(), corpus()).checkpoint();
    let other = Corpus::new(vec![distant(1, 6000), distant(2, 300), distant(4, 6000)]).unwrap();
    let error = Trainer::resume(&bytes, other, Backend::default()).unwrap_err();
    assert!(matches!(error, ResumeError::OtherTokens { .. }), "{error}");
}

#[test]
fn an_epoch_trains_each_window_once_and_nothing_that_is_held_out() {
    let corpus = corpus();
    let mut seen = std::collections::HashMap::new();
    for piece in corpus.pieces(7, 3) {
        for token in piece.at.token..piece.at.token + piece.windows * corpus::WINDOW {
            *seen.entry((piece.at.sequence, token)).or_insert(0) += 1;
        }
    }
    assert!(seen.values().all(|count| *count == 1));
    for (sequence, (tokens, split)) in corpus.splits().enumerate() {
        let last = seen.keys().filter(|place| place.0 == sequence).map(|place| place.1).max().unwrap();
        assert!(last + Lead::Eighth.accesses() < split);
        assert!(seen.keys().filter(|place| place.0 == sequence).count() + 2 * corpus::WINDOW + 8 > split);
        assert_eq!(split, tokens.len() - tokens.len() / 8);
    }
}
