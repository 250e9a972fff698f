//! A step, a batch of steps, logits and scores.
//!
//! All are sums of a vector's 64 values, each times four vectors of a panel. Every sum adds up in the same order
//! whatever computes it, so a stream's state does not depend on which others were in its batch.

// An intrinsic that is not inlined into `Isa::run` becomes a call, and so it does in closures of iterators and of
// `array::map`: loops over vectors are by index.
#![allow(clippy::needless_range_loop)]

use super::isa::{Isa, Kernel, LANES};
use super::math::{exp, sigmoid, tanh};
use super::weights::{Gates, Panel};
use super::{GATES, HIDDEN, Lead, SYMBOLS, Token, Weights};

/// Groups of units that are computed at a time.
const GROUPS: usize = HIDDEN / LANES;
/// Streams that go through a panel while it is in the first-level cache.
const TILE: usize = 16;

/// A value of each unit.
type Units = [[f32; LANES]; GROUPS];

/// What one stream's model remembers; zero at the start. 512 bytes, always finite.
#[derive(Clone, Debug, Default, PartialEq)]
#[repr(align(64))]
pub struct State {
    hidden: Units,
    cell: Units,
}

impl Weights {
    /// Lets `state` see `token`.
    #[inline]
    pub fn step(&self, state: &mut State, token: Token) {
        self.path.run(Step { weights: self, state, token });
    }

    /// Lets each state see its token; the same bits as single steps, several times faster for 16 streams and more.
    pub fn step_batch(&self, batch: &mut [(&mut State, Token)]) {
        self.path.run(Batch { weights: self, batch });
    }

    /// Logits of the symbol that comes `lead` accesses after the last token.
    #[inline]
    pub fn logits(&self, state: &State, lead: Lead, out: &mut [f32; SYMBOLS]) {
        self.path.run(Logits { weights: self, state, lead, out });
    }

    /// Log-probability (natural logarithm, over all 64 symbols) of each of `symbols` at `lead`, into the same place of
    /// `out`; what has no place there is not computed. A symbol that does not exist has probability 0.
    #[inline]
    pub fn score(&self, state: &State, lead: Lead, symbols: &[u8], out: &mut [f32]) {
        let mut logits = [0.0; SYMBOLS];
        self.logits(state, lead, &mut logits);
        let total = self.path.run(LogSum(&logits));
        for (symbol, out) in symbols.iter().zip(out) {
            *out = logits.get(usize::from(*symbol)).map_or(f32::NEG_INFINITY, |logit| logit - total);
        }
    }
}

/// For each of `P` panels and `S` vectors: `start + Σ values[unit] · panel[unit]`.
#[inline(always)]
fn accumulate<I: Isa, const P: usize, const S: usize>(
    isa: I,
    mut sums: [[[I::Vector; 4]; S]; P],
    panels: [&Panel; P],
    values: [&Units; S],
) -> [[[I::Vector; 4]; S]; P] {
    for group in 0..GROUPS {
        for lane in 0..LANES {
            for p in 0..P {
                let [a, b, c, d] = &panels[p].0[group][lane];
                let rows = [isa.load(a), isa.load(b), isa.load(c), isa.load(d)];
                for s in 0..S {
                    let value = isa.splat(values[s][group][lane]);
                    for v in 0..4 {
                        sums[p][s][v] = isa.mul_add(value, rows[v], sums[p][s][v]);
                    }
                }
            }
        }
    }
    sums
}

/// What a token adds to the gates of a group.
#[inline(always)]
fn of_token<I: Isa>(isa: I, parts: [&Gates; 4], group: usize) -> [I::Vector; GATES] {
    let mut sums = [isa.splat(0.0); GATES];
    for gate in 0..GATES {
        let [symbol, op, size, gap] = parts;
        let ordinal = isa.add(isa.load(&symbol[group][gate]), isa.load(&op[group][gate]));
        sums[gate] = isa.add(ordinal, isa.add(isa.load(&size[group][gate]), isa.load(&gap[group][gate])));
    }
    sums
}

/// Gates of a group of units → their new cell and hidden values.
#[inline(always)]
fn activate<I: Isa>(
    isa: I,
    [input, forget, new, output]: [I::Vector; GATES],
    cell: &mut [f32; LANES],
    hidden: &mut [f32; LANES],
) {
    let kept = isa.mul(sigmoid(isa, forget), isa.load(cell));
    let now = isa.mul_add(sigmoid(isa, input), tanh(isa, new), kept);
    isa.store(now, cell);
    isa.store(isa.mul(sigmoid(isa, output), tanh(isa, now)), hidden);
}

struct Step<'a> {
    weights: &'a Weights,
    state: &'a mut State,
    token: Token,
}

impl Kernel for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { weights, state, token } = self;
        let parts = weights.of_token(token);
        let mut hidden = Units::default();
        if I::WIDE {
            // two panels: eight sums under way hide the latency of the additions
            for group in (0..GROUPS).step_by(2) {
                let start = [[of_token(isa, parts, group)], [of_token(isa, parts, group + 1)]];
                let panels = [&weights.recurrent[group], &weights.recurrent[group + 1]];
                let sums = accumulate(isa, start, panels, [&state.hidden]);
                activate(isa, sums[0][0], &mut state.cell[group], &mut hidden[group]);
                activate(isa, sums[1][0], &mut state.cell[group + 1], &mut hidden[group + 1]);
            }
        } else {
            for group in 0..GROUPS {
                let start = [[of_token(isa, parts, group)]];
                let sums = accumulate(isa, start, [&weights.recurrent[group]], [&state.hidden]);
                activate(isa, sums[0][0], &mut state.cell[group], &mut hidden[group]);
            }
        }
        state.hidden = hidden;
    }
}

struct Batch<'a, 's> {
    weights: &'a Weights,
    batch: &'a mut [(&'s mut State, Token)],
}

impl Kernel for Batch<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for tile in self.batch.chunks_mut(TILE) {
            let mut hidden = [Units::default(); TILE];
            for group in 0..GROUPS {
                let panel = &self.weights.recurrent[group];
                let fours = if I::WIDE { tile.len() / 4 * 4 } else { 0 };
                let (tile_fours, tile_rest) = tile.split_at_mut(fours);
                let (hidden_fours, hidden_rest) = hidden.split_at_mut(fours);
                for (four, hidden) in tile_fours.as_chunks_mut::<4>().0.iter_mut().zip(hidden_fours.as_chunks_mut().0) {
                    streams(isa, self.weights, panel, group, four, hidden);
                }
                for (one, hidden) in tile_rest.iter_mut().zip(hidden_rest) {
                    streams(isa, self.weights, panel, group, std::array::from_mut(one), std::array::from_mut(hidden));
                }
            }
            for ((state, _), hidden) in tile.iter_mut().zip(hidden) {
                state.hidden = hidden;
            }
        }
    }
}

/// One group of units of `S` streams.
#[inline(always)]
fn streams<I: Isa, const S: usize>(
    isa: I,
    weights: &Weights,
    panel: &Panel,
    group: usize,
    batch: &mut [(&mut State, Token); S],
    hidden: &mut [Units; S],
) {
    let mut start = [[isa.splat(0.0); GATES]; S];
    for s in 0..S {
        start[s] = of_token(isa, weights.of_token(batch[s].1), group);
    }
    let values = batch.each_ref().map(|(state, _)| &state.hidden);
    let [sums] = accumulate(isa, [start], [panel], values);
    for s in 0..S {
        activate(isa, sums[s], &mut batch[s].0.cell[group], &mut hidden[s][group]);
    }
}

struct Logits<'a> {
    weights: &'a Weights,
    state: &'a State,
    lead: Lead,
    out: &'a mut [f32; SYMBOLS],
}

impl Kernel for Logits<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (panel, bias) = &self.weights.heads[self.lead as usize];
        let [a, b, c, d] = bias;
        let start = [[[isa.load(a), isa.load(b), isa.load(c), isa.load(d)]]];
        let sums = accumulate(isa, start, [panel], [&self.state.hidden]);
        for (out, sum) in self.out.as_chunks_mut().0.iter_mut().zip(sums[0][0]) {
            isa.store(sum, out);
        }
    }
}

/// ln Σ eˣ.
struct LogSum<'a>(&'a [f32; SYMBOLS]);

impl Kernel for LogSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f32 {
        let chunks = self.0.as_chunks::<LANES>().0;
        let mut lanes = [0.0; LANES];
        let largest = chunks.iter().fold(isa.splat(f32::MIN), |largest, x| isa.max(largest, isa.load(x)));
        isa.store(largest, &mut lanes);
        let largest = lanes.iter().fold(f32::MIN, |a, b| a.max(*b));
        let shift = isa.splat(largest);
        let sum = chunks.iter().fold(isa.splat(0.0), |sum, x| isa.add(sum, exp(isa, isa.sub(isa.load(x), shift))));
        isa.store(sum, &mut lanes);
        largest + lanes.iter().sum::<f32>().ln()
    }
}
