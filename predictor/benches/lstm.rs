//! The kernels by Criterion: a step, a batch of 64, scores of 16 candidates, on every path of the processor.

use criterion::{Criterion, criterion_group, criterion_main};
use prestage_predictor::lstm::weights::COUNT;
use prestage_predictor::lstm::{Lead, Path, SYMBOLS, State, Token, Weights};
use std::hint::black_box;

fn kernels(c: &mut Criterion) {
    let flat: Vec<f32> = (0..COUNT).map(|at| ((at * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.25).collect();
    let Ok(weights) = Weights::new(flat) else { return };
    let tokens: Vec<Token> = (0..64u16).filter_map(|at| Token::from_bits(at * 251)).collect();
    for path in Path::available() {
        let weights = weights.clone().on(path);
        let mut group = c.benchmark_group(path.name());
        let (mut state, mut out) = (State::default(), [0.0; SYMBOLS]);
        let mut next = tokens.iter().cycle();
        group.bench_function("step and one lead", |b| {
            b.iter(|| {
                next.next().into_iter().for_each(|token| weights.step(&mut state, *token));
                weights.logits(&state, Lead::Next, &mut out);
                black_box(&out);
            });
        });
        let mut states = vec![State::default(); tokens.len()];
        group.bench_function("batch of 64", |b| {
            b.iter(|| {
                let mut batch: Vec<_> = states.iter_mut().zip(tokens.iter().copied()).collect();
                weights.step_batch(black_box(&mut batch));
            });
        });
        let (symbols, mut scores): ([u8; 16], _) = (std::array::from_fn(|at| at as u8 * 4), [0.0; 16]);
        group.bench_function("score 16 candidates", |b| {
            b.iter(|| {
                weights.score(black_box(&state), Lead::Next, &symbols, &mut scores);
                black_box(&scores);
            });
        });
        group.finish();
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
