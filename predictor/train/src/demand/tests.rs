use super::corpus::Batch;
use super::network::DemandNetwork;
use super::*;
use crate::{Backend, Random};
use prestage_predictor::demand::features::{CHANNELS, FIXED, Features, PEAK, RECENT, STEP};
use prestage_predictor::demand::weights::{COUNT, OFFSETS, PARTS};
use prestage_predictor::demand::{Metric, Weights};

/// A day's wave with noise; `gaps` are not measured.
fn series(seed: u64, steps: usize, gaps: std::ops::Range<usize>) -> DemandSeries {
    let mut random = Random(seed);
    let values = (0..steps)
        .map(|at| 10.0 + 5.0 * (at as f32 / 288.0 * std::f32::consts::TAU).sin() + random.symmetric())
        .collect();
    DemandSeries {
        metric: Metric::ALL[seed as usize % 4],
        step_s: 300,
        start_s: 1_372_629_804,
        values,
        measured: (0..steps).map(|at| !gaps.contains(&at)).collect(),
        activity: Vec::new(),
        event: Vec::new(),
    }
}

fn small() -> DemandConfig {
    DemandConfig { steps: 12, windows: 16, members: 2, ..DemandConfig::default() }
}

#[test]
fn the_kernel_says_what_burn_says() {
    let mut random = Random(6);
    let mut flat: Vec<f32> = (0..COUNT).map(|_| 0.3 * random.symmetric()).collect();
    for (part, from) in PARTS.iter().zip(OFFSETS).filter(|(part, _)| part.name.ends_with("_scale")) {
        flat[from..from + part.len()].fill(0.7);
    }
    let mut some = |count: usize| (0..count).map(|_| 2.0 * random.symmetric()).collect::<Vec<f32>>();
    let batch = Batch {
        windows: 3,
        recent: some(3 * RECENT * CHANNELS),
        fixed: some(3 * FIXED),
        steps: some(3 * 5 * STEP),
        peaks: some(3 * 2 * PEAK),
        last: some(3),
        ..Batch::default()
    };
    let network = DemandNetwork::new(&flat, &trainer::device(Backend::default()));
    let said = network.forward(&batch, 5, 2);
    assert_eq!(network.flat(), flat);
    let rows = |tensor: burn::tensor::Tensor<2>| {
        let mut values: Vec<f32> = tensor.into_data().iter::<f32>().collect();
        values.chunks_exact_mut(4).for_each(|row| row.sort_unstable_by(f32::total_cmp));
        values
    };
    let (steps, peaks) = (rows(said.steps), rows(said.peaks));
    let weights = Weights::new(flat).unwrap();
    for window in 0..3 {
        let part = |values: &[f32], each: usize| values[window * each..(window + 1) * each].to_vec();
        let features = Features {
            recent: part(&batch.recent, RECENT * CHANNELS),
            fixed: part(&batch.fixed, FIXED),
            steps: part(&batch.steps, 5 * STEP),
            peaks: part(&batch.peaks, 2 * PEAK),
            last: batch.last[window],
            scale: 1.0,
        };
        let output = weights.quantiles(&features);
        let ours = output.steps.as_flattened().iter().zip(&steps[window * 20..]);
        let ours = ours.chain(output.peaks.as_flattened().iter().zip(&peaks[window * 8..]));
        for (ours, burn) in ours {
            assert!((ours - burn).abs() < 1e-4, "window {window}: {ours} {burn}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_model_and_it_learns() {
    let train = |seed: u64| {
        let corpus = DemandCorpus::new((0..4).map(|seed| series(seed, 1200, 500..520)).collect());
        let mut trainer = DemandTrainer::new(DemandConfig { seed, ..small() }, corpus).unwrap();
        let mut losses = Vec::new();
        while let Some(loss) = trainer.train(5).unwrap() {
            losses.push(loss);
        }
        (trainer.export().unwrap().to_bytes(), losses)
    };
    let (first, losses) = train(1);
    assert_eq!(train(1).0, first);
    assert_ne!(train(2).0, first);
    assert_eq!(Weights::from_bytes(&first).unwrap().members().count(), 2);
    assert!(losses.iter().all(|loss| loss.is_finite()) && losses[1] < losses[0], "{losses:?}");
}

#[test]
fn what_was_not_measured_is_no_target() {
    let whole = DemandCorpus::new(vec![series(1, 1000, 0..0)]);
    let holed = DemandCorpus::new(vec![series(1, 1000, 600..700)]);
    // a day before the first; an hour behind the last
    assert_eq!(whole.windows(), 1000 - 288 - 12);
    assert_eq!(holed.windows(), whole.windows() - 100 - 12);
}

#[test]
fn too_little_and_unfit_series_are_refused() {
    let few = DemandCorpus::new(vec![series(1, 600, 0..0)]);
    assert!(matches!(DemandTrainer::new(small(), few), Err(DemandError::TooLittle { found: 300, .. })));
    let mut short = series(1, 600, 0..0);
    short.measured.pop();
    let mut wrong = series(2, 600, 0..0);
    wrong.values[3] = f32::NAN;
    assert_eq!(DemandCorpus::new(vec![short, wrong]).windows(), 0);
}
