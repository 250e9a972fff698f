//! How well probabilities were calibrated: expected calibration error (Naeini et al., AAAI '15) over equal-width bins,
//! and the Brier score (Brier 1950).

const BINS: usize = 20;

/// What was said and what became of it. Each decided page counts once.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Scores {
    bins: [Bin; BINS],
    squares: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Bin {
    count: u64,
    used: u64,
    said: f64,
}

impl Scores {
    pub(crate) fn record(&mut self, probability: f32, used: bool) {
        let said = f64::from(probability);
        let bin = &mut self.bins[((said * BINS as f64) as usize).min(BINS - 1)];
        bin.count += 1;
        bin.used += u64::from(used);
        bin.said += said;
        self.squares += (said - f64::from(u8::from(used))).powi(2);
    }

    fn count(&self) -> u64 {
        self.bins.iter().map(|bin| bin.count).sum()
    }

    /// Mean distance of what was said from what was, weighted by bin; `None` without a decided page.
    pub(crate) fn ece(&self) -> Option<f64> {
        let distance: f64 = self.bins.iter().map(|bin| (bin.said - bin.used as f64).abs()).sum();
        (self.count() > 0).then(|| distance / self.count() as f64)
    }

    /// Mean square of (said − used); `None` without a decided page.
    pub(crate) fn brier(&self) -> Option<f64> {
        (self.count() > 0).then(|| self.squares / self.count() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfect_calibration_has_no_error_and_its_brier_score_is_the_variance() {
        let mut scores = Scores::default();
        assert_eq!((scores.ece(), scores.brier()), (None, None));
        for i in 0..100 {
            scores.record(0.75, i % 4 != 0);
            scores.record(1.0, true);
        }
        assert!(scores.ece().unwrap() < 1e-9);
        assert!((scores.brier().unwrap() - 0.75 * 0.25 / 2.0).abs() < 1e-9);
        for _ in 0..200 {
            scores.record(0.9, false);
        }
        assert!((scores.ece().unwrap() - 0.45).abs() < 1e-6, "{scores:?}");
    }
}
