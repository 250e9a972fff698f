//! Ordinals against a slate made the obvious way; the predictor's tokens against the tokeniser's; a model that speaks.

use super::*;
use crate::lstm::weights::{COUNT, PARTS};
use crate::lstm::{Lead, Weights};
use crate::{Access, AccessConfig, AccessPredictor, BLOCK_PAGES, Candidate, Expert, Op};
use std::sync::Arc;

/// One of two runs, a loop, neighbours, and now and then anywhere.
fn reads(count: u64, mut seed: u64) -> Vec<Access> {
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut runs = [0u64; 2];
    let mut last = 0;
    (0..count)
        .map(|n| {
            let first = match random() % 8 {
                0..3 => {
                    let run = (random() % 2) as usize;
                    runs[run] += 8;
                    run as u64 * 1_000_000 + runs[run]
                }
                3..6 => 5_000_000 + n % 500 * 7919 % 4096 * 16,
                6 => last + 16,
                _ => random() % 100_000_000,
            };
            last = first;
            Access { at_us: n * 300, vm: 1, op: Op::Read, first, pages: 1 + (n % 9) as u32 }
        })
        .collect()
}

#[test]
fn a_symbol_is_the_first_that_means_the_block_and_the_recent_ones_are_exact() {
    let mut tokeniser = Tokeniser::new();
    let mut recent: Vec<u64> = Vec::new();
    let mut seen = [0u32; SYMBOLS];
    for access in reads(20_000, 5) {
        let block = access.first / BLOCK_PAGES;
        let slate = tokeniser.slate().clone();
        for (place, known) in recent.iter().take(16).enumerate() {
            assert_eq!(slate.block((RECENT + place) as u8), Some(*known));
        }
        let first = (0..SYMBOLS as u8).find(|symbol| slate.block(*symbol) == Some(block));
        let symbol = tokeniser.push(&access).unwrap().symbol();
        assert_eq!(first, (usize::from(symbol) < OFFERED).then_some(symbol));
        assert!((OFFERED..SYMBOLS).all(|symbol| slate.block(symbol as u8).is_none()));
        seen[usize::from(symbol)] += 1;
        recent.retain(|known| *known != block);
        recent.insert(0, block);
    }
    // Runs, the log, what is near, and what was never seen all occur.
    assert!(seen[0] > 1000 && seen[LOG] > 500 && seen[NEAR] > 0 && seen[usize::from(NEW)] > 100, "{seen:?}");
}

#[test]
fn the_predictor_makes_the_tokens_that_the_tokeniser_makes() {
    let mut predictor = AccessPredictor::new(AccessConfig::default());
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    predictor.observe(&reads(1, 9)[0]);
    predictor.foretell(|_, _| panic!("nobody listens"));
    let (mut tokeniser, mut predictor) = (Tokeniser::new(), AccessPredictor::new(AccessConfig::default()));
    predictor.listen(true);
    for (n, access) in reads(5000, 9).into_iter().enumerate() {
        expected.extend(tokeniser.push(&access));
        predictor.observe(&access);
        predictor.predict(access.at_us, &mut Vec::new());
        if n % 100 == 99 {
            predictor.foretell(|vm, token| {
                assert_eq!(vm, 1);
                found.push(token);
            });
        }
    }
    assert_eq!((expected.len(), expected), (5000, found));
}

/// A model that always expects `symbol`.
fn expecting(symbol: usize) -> Arc<Weights> {
    let mut flat = vec![0.0; COUNT];
    let bias = COUNT - PARTS[8].len();
    for lead in 0..Lead::ALL.len() {
        flat[bias + lead * SYMBOLS + symbol] = 8.0;
    }
    Arc::new(Weights::new(flat).unwrap())
}

fn run(model: Option<Arc<Weights>>, alone: bool) -> (AccessPredictor, Vec<Candidate>) {
    let config = AccessConfig { model_alone: alone, ..AccessConfig::default() };
    let mut predictor = AccessPredictor::new(config);
    predictor.set_model(model);
    let mut out = Vec::new();
    for access in reads(5000, 3) {
        predictor.observe(&access);
        predictor.predict(access.at_us, &mut out);
        predictor.foretell(|_, _| ());
    }
    (predictor, out)
}

#[test]
fn a_model_speaks_in_the_mix_and_without_one_nothing_changes() {
    let (silent, without) = run(None, false);
    let (speaks, with) = run(Some(expecting(0)), false);
    assert!(without != with);
    assert!(run(Some(expecting(0)), false).1 == with, "deterministic");
    let votes = |predictor: &AccessPredictor| {
        let heard = |page: u64| predictor.explain(page).votes.iter().any(|vote| vote.expert == Expert::Lstm);
        (0..3_000_000).step_by(8).any(heard)
    };
    assert!(votes(&speaks) && !votes(&silent));
    // Alone, the others' contexts are worth nothing.
    assert!(run(Some(expecting(0)), true).1 != with);
}
