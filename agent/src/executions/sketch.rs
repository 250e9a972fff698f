//! Quantiles of what has been seen, the recent counting more: a histogram with bins of equal relative width whose counts fade.
//!
//! Bins as in DDSketch (Masson, Rim and Lee, VLDB 2019): bin `i` holds values above γ^(i−1) up to γ^i, so that every quantile is within
//! [`ERROR`] of a value that was seen, whatever their distribution. Counts fade with time as in Google's Autopilot (Rzadca et al., EuroSys
//! 2020): a value that is one half-life old counts half. The weight of new values grows in place of all others shrinking.

use crate::store::segment::{get, put, unzigzag, zigzag};

/// Relative error of a quantile.
pub const ERROR: f64 = 0.05;
/// Most bins: twelve decades, from a millisecond to thirty years, or from a byte to a terabyte. Beyond it the lowest are joined.
const BINS_MAX: usize = 288;
/// Half-lives after which the scale is taken back, long before a double overflows.
const RESCALE: f64 = 100.0;
/// Weights are stored as so many parts of one.
const PARTS: f64 = 1024.0;

/// A fading histogram.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sketch {
    /// Weight of values that are zero (or below the smallest bin).
    zero: f64,
    /// By number, in order; weights above zero.
    bins: Vec<(i32, f64)>,
}

fn gamma() -> f64 {
    (1.0 + ERROR) / (1.0 - ERROR)
}

/// Values below this are zero: a nanosecond, a billionth of a core.
const SMALLEST: f64 = 1e-9;

impl Sketch {
    /// Adds a value of some weight; what is negative or no number is left out.
    pub(super) fn add(&mut self, value: f64, weight: f64) {
        if !value.is_finite() || value < 0.0 || weight <= 0.0 {
            return;
        }
        if value < SMALLEST {
            self.zero += weight;
            return;
        }
        let bin = (value.ln() / gamma().ln()).ceil() as i32;
        match self.bins.binary_search_by_key(&bin, |(bin, _)| *bin) {
            Ok(at) => self.bins[at].1 += weight,
            Err(at) => self.bins.insert(at, (bin, weight)),
        }
        if self.bins.len() > BINS_MAX {
            let (_, lowest) = self.bins.remove(0);
            self.bins[0].1 += lowest;
        }
    }

    /// Multiplies all weights; what counts next to nothing goes.
    pub(super) fn scale(&mut self, factor: f64) {
        self.zero *= factor;
        self.bins.retain_mut(|(_, weight)| {
            *weight *= factor;
            *weight >= 1.0 / PARTS
        });
    }

    /// Sum of weights.
    #[must_use]
    pub fn weight(&self) -> f64 {
        self.zero + self.bins.iter().map(|(_, weight)| weight).sum::<f64>()
    }

    /// A value that a share `q` of what was seen, by weight, does not exceed; within [`ERROR`]. `None` if nothing was seen.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let wanted = self.weight() * q.clamp(0.0, 1.0);
        if self.weight() <= 0.0 {
            return None;
        }
        let mut sum = self.zero;
        if sum >= wanted && self.zero > 0.0 {
            return Some(0.0);
        }
        for (bin, weight) in &self.bins {
            sum += weight;
            if sum >= wanted * (1.0 - 1e-12) {
                return Some(2.0 * gamma().powi(*bin) / (gamma() + 1.0));
            }
        }
        self.bins.last().map(|(bin, _)| 2.0 * gamma().powi(*bin) / (gamma() + 1.0))
    }

    /// Numbers in LEB128: weights in parts of 1024, bins as differences.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let parts = |weight: f64| (weight * PARTS).round().min(u64::MAX as f64) as u64;
        put(out, parts(self.zero));
        put(out, self.bins.len() as u64);
        let mut before = 0;
        for (bin, weight) in &self.bins {
            put(out, zigzag(i64::from(bin - before)));
            put(out, parts(*weight).max(1));
            before = *bin;
        }
    }

    /// `None`: not what was written.
    pub(super) fn read(bytes: &[u8], at: &mut usize) -> Option<Self> {
        let zero = get(bytes, at).ok()? as f64 / PARTS;
        let number = usize::try_from(get(bytes, at).ok()?).ok().filter(|number| *number <= BINS_MAX)?;
        let (mut bins, mut before) = (Vec::with_capacity(number), 0i32);
        for place in 0..number {
            let step = i32::try_from(unzigzag(get(bytes, at).ok()?)).ok().filter(|step| place == 0 || *step > 0)?;
            before = before.checked_add(step).filter(|bin| bin.abs() < 10_000)?;
            bins.push((before, get(bytes, at).ok()? as f64 / PARTS));
        }
        Some(Self { zero, bins })
    }
}

/// Weight of what is seen at a time, against a time of reference that is moved up before it overflows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fading {
    pub(super) half_life_s: u64,
    pub(super) since_s: u64,
}

impl Fading {
    /// Weight of a value at `at_s`, and the factor that all before are to be multiplied with.
    pub(super) fn weight(&mut self, at_s: u64) -> (f64, f64) {
        let halves = |from: u64, to: u64| (to as f64 - from as f64) / self.half_life_s.max(1) as f64;
        let ahead = halves(self.since_s, at_s);
        if ahead < RESCALE {
            // What is older than the reference counts less, down to nothing.
            return (ahead.max(-RESCALE).exp2(), 1.0);
        }
        self.since_s = at_s;
        (1.0, (-ahead).exp2())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn quantiles_are_within_the_error_of_values_seen(mut values in prop::collection::vec(prop_oneof![0.0..1.0f64, 0.0..1e12f64, Just(0.0)], 1..300), q in 0.0..=1.0f64) {
            let mut sketch = Sketch::default();
            values.iter().for_each(|value| sketch.add(*value, 1.0));
            values.sort_by(f64::total_cmp);
            let rank = ((values.len() as f64 * q).ceil() as usize).clamp(1, values.len());
            let (got, near) = (sketch.quantile(q).unwrap(), |value: f64, got: f64| (got - value).abs() <= value * ERROR * 1.001 + SMALLEST);
            // Rounding of a rank may go either way.
            let around = &values[rank.saturating_sub(2)..values.len().min(rank + 1)];
            prop_assert!(around.iter().any(|value| near(*value, got)), "{got} {around:?}");
            let mut bytes = Vec::new();
            sketch.write(&mut bytes);
            let mut at = 0;
            prop_assert_eq!(Sketch::read(&bytes, &mut at), Some(sketch));
            prop_assert_eq!(at, bytes.len());
        }

        #[test]
        fn any_bytes_are_a_sketch_or_none(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = Sketch::read(&bytes, &mut 0);
        }
    }

    #[test]
    fn it_stays_bounded_and_leaves_out_what_is_no_value() {
        let mut sketch = Sketch::default();
        for power in -40..40 {
            for part in 0..40 {
                sketch.add(10f64.powi(power) * (1.0 + f64::from(part) / 4.0), 1.0);
            }
        }
        [f64::NAN, f64::INFINITY, -1.0].into_iter().for_each(|odd| sketch.add(odd, 1.0));
        assert!(sketch.bins.len() <= BINS_MAX && (sketch.weight() - 3200.0).abs() < 1e-6);
        assert!(sketch.quantile(1.0).unwrap() > 1e40);
        assert_eq!(Sketch::default().quantile(0.5), None);
    }
}
