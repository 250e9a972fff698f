//! What of a series changes slowly: its scale, the changes seen over each distance, its period.

use super::QUANTILES;
use super::history::View;

/// Steps between one summary and the next, of a series that has more than [`YOUNG`].
pub(super) const EVERY: u64 = 12;
/// Below this every step has its own.
pub(super) const YOUNG: u64 = 48;
/// Steps ahead whose changes are counted; between them they are interpolated.
pub(super) const DISTANCES: [usize; 13] = [1, 2, 3, 4, 6, 8, 12, 24, 48, 96, 192, 288, 1440];
/// Steps that changes are counted in, at most.
const CHANGES_IN: usize = 2016;
/// Steps that a period is looked for in.
const PERIOD_IN: usize = 1152;
const PERIODS: std::ops::Range<usize> = 12..300;
/// Changes that are believed before any was seen, in units of asinh(value / scale), worth [`BELIEF`] changes seen.
const PRIOR: [f32; 4] = [-0.6, 0.0, 0.4, 0.6];
const BELIEF: f32 = 8.0;

/// A forecast's slow inputs. Values are asinh(value / `scale`).
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// .99 quantile of the values kept, or a thousandth of the largest if that is more; 1 for a series of zeros.
    pub(super) scale: f32,
    /// Quantiles of value(t + h) − value(t), for h of [`DISTANCES`].
    pub(super) changes: [[f32; 4]; DISTANCES.len()],
    /// Quantiles of max(value(t + 1 ..= t + h)) − value(t).
    pub(super) rises: [[f32; 4]; DISTANCES.len()],
    /// Median, .9 quantile, largest and smallest of what is kept.
    pub(super) levels: [f32; 4],
    /// Median and .95 quantile, mean, largest and standard deviation of the last week.
    pub(super) week: [f32; 5],
    /// Quantiles of the difference to a day and to a week before, once two of them were seen.
    pub(super) daily: Option<[f32; 4]>,
    pub(super) weekly: Option<[f32; 4]>,
    /// Quantiles of the values, a day ago half as often as now; and of the maximum of some steps.
    pub(super) histogram: [f32; 4],
    pub(super) histogram_peak: [f32; 4],
    /// Steps after which the series repeats itself best, 0 if there is too little to say, and the correlation.
    pub(super) period: usize,
    pub(super) likeness: f32,
}

impl Summary {
    /// Of a series that may be empty.
    #[must_use]
    pub fn of(view: &View<'_>) -> Self {
        let mut work = view.fine.to_vec();
        let top = work.iter().copied().fold(0.0_f32, f32::max);
        let scale = quantile(&mut work, 0.99).max(1e-3 * top);
        let scale = if scale > f32::MIN_POSITIVE { scale } else { 1.0 };
        let asinh = |value: f32| (value / scale).asinh();
        let low = work.iter().copied().fold(top, f32::min);
        let levels = [asinh(quantile(&mut work, 0.5)), asinh(quantile(&mut work, 0.9)), asinh(top), asinh(low)];
        let week = view.since(7 * 86_400);
        let [mean, largest, deviation] = moments(week);
        let mut work = week.to_vec();
        let week = [quantile(&mut work, 0.5), quantile(&mut work, 0.95), mean, largest, deviation].map(asinh);
        let recent: Vec<f32> = view.recent(CHANGES_IN).iter().copied().map(asinh).collect();
        let (changes, rises) = distances(&recent);
        let (period, likeness) = period(&recent[recent.len().saturating_sub(PERIOD_IN)..]);
        let (daily, weekly) = (seasonal(view, scale, view.day()), seasonal(view, scale, 7 * view.day()));
        let [histogram, histogram_peak] = decayed(view.recent(CHANGES_IN), view.day(), scale);
        Self { scale, changes, rises, levels, week, daily, weekly, histogram, histogram_peak, period, likeness }
    }

    /// Quantiles of the change over `steps`, interpolated.
    pub(super) fn change(&self, steps: usize) -> [f32; 4] {
        between(&self.changes, steps)
    }

    /// Quantiles of the rise to the maximum of the next `steps`.
    pub(super) fn rise(&self, steps: usize) -> [f32; 4] {
        between(&self.rises, steps)
    }
}

fn between(table: &[[f32; 4]; DISTANCES.len()], steps: usize) -> [f32; 4] {
    let above = DISTANCES.partition_point(|distance| *distance < steps).min(DISTANCES.len() - 1);
    if above == 0 || DISTANCES[above] <= steps {
        return table[above];
    }
    let (low, high) = (DISTANCES[above - 1], DISTANCES[above]);
    let share = (steps - low) as f32 / (high - low) as f32;
    std::array::from_fn(|q| table[above - 1][q] + share * (table[above][q] - table[above - 1][q]))
}

/// Changes and rises over each of [`DISTANCES`]. What is longer than the series is taken from the longest that is not.
fn distances(z: &[f32]) -> ([[f32; 4]; DISTANCES.len()], [[f32; 4]; DISTANCES.len()]) {
    let (mut changes, mut rises) = ([PRIOR; DISTANCES.len()], [PRIOR; DISTANCES.len()]);
    let mut highest: Vec<f32> = z.to_vec();
    let mut reach = 0;
    let mut work = Vec::with_capacity(z.len());
    for (i, &distance) in DISTANCES.iter().enumerate() {
        if z.len() <= distance + distance / 4 {
            if i > 0 {
                (changes[i], rises[i]) = (changes[i - 1], rises[i - 1]);
            }
            continue;
        }
        let starts = z.len() - distance;
        let believed = |seen: [f32; 4]| {
            let share = BELIEF / (BELIEF + starts as f32 / distance.min(12) as f32);
            std::array::from_fn(|q| seen[q] + share * (PRIOR[q] - seen[q]))
        };
        work.clear();
        work.extend((0..starts).map(|t| z[t + distance] - z[t]));
        changes[i] = believed(quantiles(&mut work));
        // highest[t] = max(z[t + 1 ..= t + reach]); two windows that overlap make the longer one
        if reach == 0 {
            highest.rotate_left(1);
            reach = 1;
        }
        while reach < distance {
            let by = reach.min(distance - reach);
            for t in 0..z.len() - reach - by {
                highest[t] = highest[t].max(highest[t + by]);
            }
            reach += by;
        }
        work.clear();
        work.extend((0..starts).map(|t| highest[t] - z[t]));
        rises[i] = believed(quantiles(&mut work));
    }
    (changes, rises)
}

/// Quantiles of the difference to what was `season` steps before.
fn seasonal(view: &View<'_>, scale: f32, season: usize) -> Option<[f32; 4]> {
    let pairs = view.fine.len().saturating_sub(season);
    if pairs < (season / 4).max(12) {
        return None;
    }
    let z = |value: f32| (value / scale).min(1e20).asinh();
    let from = pairs.saturating_sub(CHANGES_IN);
    let mut differences: Vec<f32> = (from..pairs).map(|at| z(view.fine[at + season]) - z(view.fine[at])).collect();
    Some(quantiles(&mut differences))
}

/// Steps that count as independent when the maximum of some of them is asked for.
const INDEPENDENT: f64 = 3.0;

/// Weighted quantiles of `values`, and of a maximum, as asinh(value / scale); half the weight each `half_life` steps.
fn decayed(values: &[f32], half_life: usize, scale: f32) -> [[f32; 4]; 2] {
    let mut weighted: Vec<(f32, f64)> = values
        .iter()
        .rev()
        .enumerate()
        .map(|(age, value)| (*value, 0.5_f64.powf(age as f64 / half_life as f64)))
        .collect();
    weighted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    let at = |probability: f64| {
        let mut sum = 0.0;
        let reached = weighted.iter().find(|(_, weight)| {
            sum += weight;
            sum >= probability * total
        });
        reached.or(weighted.last()).map_or(0.0, |(value, _)| (value / scale).asinh())
    };
    let of = |power: f64| QUANTILES.map(|probability| at(f64::from(probability).powf(power)));
    [of(1.0), of(1.0 / INDEPENDENT)]
}

/// The lag within [`PERIODS`] at which the values correlate best, and that correlation.
fn period(z: &[f32]) -> (usize, f32) {
    if z.len() < 2 * PERIODS.end {
        return (0, 0.0);
    }
    let mean = z.iter().sum::<f32>() / z.len() as f32;
    let centred: Vec<f32> = z.iter().map(|value| value - mean).collect();
    let power = product(&centred, &centred);
    if power < 1e-6 {
        return (0, 0.0);
    }
    let mut best = (0, f32::MIN);
    for lag in PERIODS {
        let pairs = centred.len() - lag;
        let likeness = product(&centred[lag..], &centred[..pairs]) / power * (centred.len() as f32 / pairs as f32);
        if likeness > best.1 {
            best = (lag, likeness);
        }
    }
    best
}

/// Sum of products, in eight partial sums so that it becomes vector instructions.
fn product(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0_f32; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// Mean, largest value and standard deviation; zeros of nothing.
pub(super) fn moments(values: &[f32]) -> [f32; 3] {
    if values.is_empty() {
        return [0.0; 3];
    }
    let (mut sum, mut squares, mut largest) = (0.0_f64, 0.0_f64, 0.0_f32);
    for &value in values {
        sum += f64::from(value);
        squares += f64::from(value) * f64::from(value);
        largest = largest.max(value);
    }
    let count = values.len() as f64;
    let mean = sum / count;
    [mean as f32, largest, (squares / count - mean * mean).max(0.0).sqrt() as f32]
}

/// The value that `probability` of the others are below, to the nearest rank; 0 of nothing. Reorders `values`.
pub(super) fn quantile(values: &mut [f32], probability: f32) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let rank = ((values.len() - 1) as f32 * probability).round() as usize;
    *values.select_nth_unstable_by(rank.min(values.len() - 1), f32::total_cmp).1
}

pub(super) fn quantiles(values: &mut [f32]) -> [f32; 4] {
    // the highest first: the others are then to its left
    let mut out = [0.0; 4];
    let mut end = values.len();
    for (slot, probability) in out.iter_mut().zip(QUANTILES).rev() {
        let rank = ((values.len().max(1) - 1) as f32 * probability).round() as usize;
        if end > rank {
            *slot = *values[..end].select_nth_unstable_by(rank, f32::total_cmp).1;
            end = rank + 1;
        }
    }
    out
}
