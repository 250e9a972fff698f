//! The network on the processor's widest vectors; the same instructions as the access predictor's LSTM.
//!
//! Every sum adds up in the same order whatever computes it; the paths that multiply and add in one rounding give the same
//! bits, the portable one differs by less than 1e-4.

// An intrinsic that is not inlined into `Isa::run` becomes a call, and so it does in closures: loops are by index.
#![allow(clippy::needless_range_loop)]

use super::features::{CHANNELS, FIXED, Features, PEAK, RECENT, STEP};
use super::weights::{CLAMP, GATES, HEADS, HIDDEN, OFFSETS, PARTS, WIDTH, Weights};
use crate::lstm::isa::{Isa, Kernel, LANES};
use crate::lstm::math::{sigmoid, tanh};

const UNITS: usize = HIDDEN / LANES;
const COLUMNS: usize = WIDTH / LANES;
/// Vectors of sums under way.
const PANEL: usize = 4;

impl Weights {
    /// Quantiles of each step and of each maximum of `features`, as asinh(value / scale): ascending, the members' mean.
    #[must_use]
    pub fn quantiles(&self, features: &Features) -> Output {
        let mut output = Output {
            steps: vec![[0.0; HEADS]; features.steps.len() / STEP],
            peaks: vec![[0.0; HEADS]; features.peaks.len() / PEAK],
        };
        let sound = features.recent.len() == RECENT * CHANNELS && features.fixed.len() == FIXED;
        if !sound {
            return output;
        }
        let count = self.members().count() as f32;
        for member in self.members() {
            self.path.run(Run { member, features, share: 1.0 / count, output: &mut output });
        }
        output
    }
}

/// What the network says, in the units of the features.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Output {
    pub steps: Vec<[f32; HEADS]>,
    pub peaks: Vec<[f32; HEADS]>,
}

struct Run<'a> {
    member: &'a [f32],
    features: &'a Features,
    share: f32,
    output: &'a mut Output,
}

/// A part of a member, by its place in [`PARTS`].
#[inline(always)]
fn part(member: &[f32], index: usize) -> &[f32] {
    &member[OFFSETS[index]..OFFSETS[index + 1]]
}

/// The place of a part in [`PARTS`].
const fn place(name: &str) -> usize {
    let mut i = 0;
    while i < PARTS.len() {
        if same(PARTS[i].name.as_bytes(), name.as_bytes()) {
            return i;
        }
        i += 1;
    }
    usize::MAX
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

macro_rules! weights {
    ($member:expr, $name:literal) => {
        part($member, const { place($name) })
    };
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { member, features, share, output } = self;
        let mut origin = [0.0; HIDDEN + FIXED];
        recent(isa, member, &features.recent, &mut origin);
        norm(&features.fixed, weights!(member, "fixed_shift"), weights!(member, "fixed_scale"), &mut origin[HIDDEN..]);

        let mut trunk = start(weights!(member, "trunk_bias"));
        dense(isa, &origin, weights!(member, "trunk"), &mut trunk);
        let mut values = [0.0; STEP];
        for (row, out) in features.steps.chunks_exact(STEP).zip(&mut output.steps) {
            norm(row, weights!(member, "step_shift"), weights!(member, "step_scale"), &mut values);
            let mut layer = trunk;
            dense(isa, &values, weights!(member, "step"), &mut layer);
            relu(isa, &mut layer);
            let mut middle = start(weights!(member, "middle_bias"));
            dense(isa, layer.as_flattened(), weights!(member, "middle"), &mut middle);
            relu(isa, &mut middle);
            let mut sums = [features.last; HEADS];
            narrow(middle.as_flattened(), weights!(member, "out"), &mut sums);
            narrow(&values, weights!(member, "step_skip"), &mut sums);
            add(sums, weights!(member, "out_bias"), share, out);
        }

        let mut trunk = start(weights!(member, "peak_trunk_bias"));
        dense(isa, &origin, weights!(member, "peak_trunk"), &mut trunk);
        let mut values = [0.0; PEAK];
        for (row, out) in features.peaks.chunks_exact(PEAK).zip(&mut output.peaks) {
            norm(row, weights!(member, "peak_shift"), weights!(member, "peak_scale"), &mut values);
            let mut layer = trunk;
            dense(isa, &values, weights!(member, "peak"), &mut layer);
            relu(isa, &mut layer);
            let mut sums = [features.last; HEADS];
            narrow(layer.as_flattened(), weights!(member, "peak_out"), &mut sums);
            narrow(&values, weights!(member, "peak_skip"), &mut sums);
            add(sums, weights!(member, "peak_out_bias"), share, out);
        }
    }
}

/// The LSTM over the last steps; its last hidden values are the first of `out`.
#[inline(always)]
fn recent<I: Isa>(isa: I, member: &[f32], rows: &[f32], out: &mut [f32; HIDDEN + FIXED]) {
    let (input, recurrent) = (weights!(member, "input"), weights!(member, "recurrent"));
    let bias = weights!(member, "bias").as_chunks::<LANES>().0;
    let mut hidden = [[0.0; LANES]; UNITS];
    let mut cell = [[0.0; LANES]; UNITS];
    for row in rows.chunks_exact(CHANNELS) {
        let mut gates = [[0.0; LANES]; GATES * UNITS];
        gates.copy_from_slice(bias);
        dense(isa, row, input, &mut gates);
        dense(isa, hidden.as_flattened(), recurrent, &mut gates);
        for unit in 0..UNITS {
            let (input, forget) = (isa.load(&gates[unit]), isa.load(&gates[UNITS + unit]));
            let (new, output) = (isa.load(&gates[2 * UNITS + unit]), isa.load(&gates[3 * UNITS + unit]));
            let kept = isa.mul(sigmoid(isa, forget), isa.load(&cell[unit]));
            let now = isa.mul_add(sigmoid(isa, input), tanh(isa, new), kept);
            isa.store(now, &mut cell[unit]);
            isa.store(isa.mul(sigmoid(isa, output), tanh(isa, now)), &mut hidden[unit]);
        }
    }
    out[..HIDDEN].copy_from_slice(hidden.as_flattened());
}

#[inline(always)]
fn start(bias: &[f32]) -> [[f32; LANES]; COLUMNS] {
    let mut out = [[0.0; LANES]; COLUMNS];
    out.copy_from_slice(bias.as_chunks().0);
    out
}

/// `out += values · weights`, the weights row-major with a row for each value.
#[inline(always)]
fn dense<I: Isa, const C: usize>(isa: I, values: &[f32], weights: &[f32], out: &mut [[f32; LANES]; C]) {
    let rows = weights.as_chunks::<LANES>().0;
    for group in (0..C).step_by(PANEL) {
        let mut sums = [isa.splat(0.0); PANEL];
        for v in 0..PANEL {
            sums[v] = isa.load(&out[group + v]);
        }
        for r in 0..values.len() {
            let value = isa.splat(values[r]);
            for v in 0..PANEL {
                sums[v] = isa.mul_add(value, isa.load(&rows[r * C + group + v]), sums[v]);
            }
        }
        for v in 0..PANEL {
            isa.store(sums[v], &mut out[group + v]);
        }
    }
}

#[inline(always)]
fn relu<I: Isa>(isa: I, layer: &mut [[f32; LANES]; COLUMNS]) {
    for column in layer {
        let positive = isa.max(isa.load(column), isa.splat(0.0));
        isa.store(positive, column);
    }
}

/// The same for the few columns of a head.
#[inline(always)]
fn narrow(values: &[f32], weights: &[f32], sums: &mut [f32; HEADS]) {
    for (value, row) in values.iter().zip(weights.as_chunks::<HEADS>().0) {
        for head in 0..HEADS {
            sums[head] += value * row[head];
        }
    }
}

/// Adds a member's share, its quantiles put in order.
#[inline(always)]
fn add(mut sums: [f32; HEADS], bias: &[f32], share: f32, out: &mut [f32; HEADS]) {
    for head in 0..HEADS {
        sums[head] += bias[head];
    }
    sums.sort_unstable_by(f32::total_cmp);
    for head in 0..HEADS {
        out[head] += share * sums[head];
    }
}

#[inline(always)]
fn norm(values: &[f32], shift: &[f32], scale: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = ((values[i] - shift[i]) * scale[i]).clamp(-CLAMP, CLAMP);
    }
}

const _: () = assert!((GATES * UNITS).is_multiple_of(PANEL) && COLUMNS.is_multiple_of(PANEL));
