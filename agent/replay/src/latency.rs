//! Latencies of a replay: exact up to a million, then in buckets.

/// Values kept as they are (8 MB); a trace that is longer is put into buckets.
const EXACT: usize = 1_000_000;
/// Buckets of a doubling: a bucket is 1/128 of its lower end wide, so that its middle is within 0.4 % of any value in it.
const STEPS_LOG2: u32 = 7;
/// Values are counted in 1/16 µs, so that even the shortest (a hit's 10 µs) has buckets finer than 1 %.
const SCALE: f64 = 16.0;

/// A collection of latencies in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    exact: Vec<f64>,
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Latencies {
    pub(crate) fn record(&mut self, us: f64) {
        self.count += 1;
        self.sum += us;
        if self.buckets.is_empty() {
            if self.exact.len() < EXACT {
                self.exact.push(us);
                return;
            }
            for us in std::mem::take(&mut self.exact) {
                self.bucket(us);
            }
        }
        self.bucket(us);
    }

    fn bucket(&mut self, us: f64) {
        let index = index((us * SCALE) as u64);
        if self.buckets.len() <= index {
            self.buckets.resize(index + 1, 0);
        }
        self.buckets[index] += 1;
    }

    pub(crate) fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    /// The values at `quantiles` (each 0 ..= 1): the element at `floor(q × (n − 1))` of the sorted values.
    pub(crate) fn quantiles<const N: usize>(&mut self, quantiles: [f64; N]) -> [f64; N] {
        if self.count == 0 {
            return [0.0; N];
        }
        self.exact.sort_by(f64::total_cmp);
        quantiles.map(|q| {
            let rank = (q * (self.count - 1) as f64) as u64;
            match self.exact.get(rank as usize) {
                Some(us) => *us,
                None => self.bucketed(rank),
            }
        })
    }

    fn bucketed(&self, rank: u64) -> f64 {
        let mut before = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            before += count;
            if before > rank {
                return (lower(index) + lower(index + 1)) as f64 / 2.0 / SCALE;
            }
        }
        0.0
    }
}

/// Bucket of a value: linear below 2^7, then 2^7 to a doubling.
fn index(value: u64) -> usize {
    let shift = (u64::BITS - value.leading_zeros()).saturating_sub(STEPS_LOG2 + 1);
    ((u64::from(shift) << STEPS_LOG2) + (value >> shift)) as usize
}

/// Lowest value of a bucket.
fn lower(index: usize) -> u64 {
    let index = index as u64;
    let shift = (index >> STEPS_LOG2).saturating_sub(1);
    (index - (shift << STEPS_LOG2)).checked_shl(shift as u32).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_gapless_and_within_one_percent() {
        for value in (0..100_000).chain((17..63).map(|bit| (1u64 << bit) + 12_345)) {
            let (from, to) = (lower(index(value)), lower(index(value) + 1));
            assert!((from..to).contains(&value), "{value} in {from}..{to}");
            assert!(to - from <= 1 || (to - from) as f64 <= 0.01 * from as f64, "{from}..{to}");
        }
    }

    #[test]
    fn quantiles_past_the_exact_million_stay_within_one_percent() {
        let mut latencies = Latencies::default();
        let count = EXACT as u64 + 500_000;
        // A permutation of 1 ..= count, spread over five decades.
        let value = |i: u64| 10.0 + ((i * 7_919) % count) as f64;
        for i in 0..count {
            latencies.record(value(i));
        }
        let got = latencies.quantiles([0.5, 0.99, 1.0]);
        for (got, q) in got.into_iter().zip([0.5, 0.99, 1.0]) {
            let exact = 10.0 + (q * (count - 1) as f64).floor();
            assert!((got - exact).abs() <= 0.01 * exact, "q {q}: {got} for {exact}");
        }
        assert!((latencies.mean() - (10.0 + (count - 1) as f64 / 2.0)).abs() < 1e-3);
    }
}
