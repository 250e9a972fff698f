//! Two models on one stream: does the challenger spend fewer bits an access than the champion, by a margin and beyond chance?
//!
//! Asked after every access and answered once: the bounds hold at all times at once, so that looking often is no cheating.

/// Most bits a single access counts for, either way; keeps one surprise from deciding, and is what the bounds rest on.
const CLIP_BITS: f64 = 8.0;
/// Constants k₁ and k₂ of the stitched boundary for epochs that grow by η = 2.
const K1: f64 = 1.435_499_973;
const K2: f64 = 1.207_106_782;
/// Riemann ζ(1.4): the weights of the epochs, `1 / ((k + 1)^1.4 · ζ(1.4))`, sum to one.
const ZETA: f64 = 3.105_547_277;
const POWER: f64 = 1.4;
/// Variance, summed up in units of the range squared, from which on the boundary is tightest.
const VARIANCE_MIN: f64 = 1.0;
/// Length of [`Contest::to_bytes`].
const BYTES: usize = 32;

/// What the accesses so far say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Undecided,
    /// The shadow saves at least the margin.
    ShadowBetter,
    /// The shadow does not save the margin: it is equal, worse, or better by less.
    ShadowNotBetter,
}

/// Settings of a [`Contest`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ContestConfig {
    /// Bits an access that the shadow must save.
    pub margin_bits: f64,
    /// Chance of a wrong verdict over the contest's whole length, each way half of it.
    pub error: f64,
}

impl Default for ContestConfig {
    /// 0.05 bits, some 2 % of what a good model spends; wrong once in a hundred contests.
    fn default() -> Self {
        Self { margin_bits: 0.05, error: 0.01 }
    }
}

/// Paired comparison with an empirical-Bernstein confidence sequence (S. Howard, A. Ramdas, J. McAuliffe, J. Sekhon,
/// "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49, 2021: theorem 4 with the
/// polynomial stitched boundary). It asks nothing of the stream but bounded differences: accesses may depend on each
/// other and change with time; what is bounded is the mean of the conditional expectations so far.
#[derive(Clone, Debug, PartialEq)]
pub struct Contest {
    config: ContestConfig,
    count: u64,
    /// Of `champion − shadow`, in units of the range (16 bits).
    sum: f64,
    /// Squared distances from the mean before each.
    variance: f64,
}

impl Contest {
    #[must_use]
    pub fn new(config: ContestConfig) -> Self {
        Self { config, count: 0, sum: 0.0, variance: 0.0 }
    }

    /// Takes in what one access cost both, in bits. Costs that are not numbers are ignored.
    pub fn add(&mut self, champion_bits: f64, shadow_bits: f64) {
        let saved = champion_bits - shadow_bits;
        if saved.is_nan() {
            return;
        }
        let saved = saved.clamp(-CLIP_BITS, CLIP_BITS) / (2.0 * CLIP_BITS);
        let before = if self.count == 0 { 0.0 } else { self.sum / self.count as f64 };
        self.variance += (saved - before).powi(2);
        self.sum += saved;
        self.count += 1;
    }

    #[must_use]
    pub fn accesses(&self) -> u64 {
        self.count
    }

    /// Bits an access that the shadow saves: least, mean and most, with the configured chance of error.
    #[must_use]
    pub fn saved_bits(&self) -> [f64; 3] {
        if self.count == 0 {
            return [-CLIP_BITS, 0.0, CLIP_BITS];
        }
        let count = self.count as f64;
        let (mean, radius) = (self.sum / count, boundary(self.variance, self.config.error / 2.0) / count);
        [mean - radius, mean, mean + radius].map(|share| (share * 2.0 * CLIP_BITS).clamp(-CLIP_BITS, CLIP_BITS))
    }

    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let [least, _, most] = self.saved_bits();
        if least > self.config.margin_bits {
            Verdict::ShadowBetter
        } else if most < self.config.margin_bits {
            Verdict::ShadowNotBetter
        } else {
            Verdict::Undecided
        }
    }

    /// The state, to go on after a restart: count, sum and variance in little-endian, 8 bytes each, and their CRC-32C in 8.
    /// A contest begun anew would spend its chance of error again.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [self.count.to_le_bytes(), self.sum.to_le_bytes(), self.variance.to_le_bytes()].concat();
        bytes.extend(u64::from(crc32c::crc32c(&bytes)).to_le_bytes());
        bytes
    }

    /// Goes on from [`Contest::to_bytes`]; `None` if these are not such bytes, or of sums that no
    /// accesses give.
    #[must_use]
    pub fn from_bytes(bytes: &[u8], config: ContestConfig) -> Option<Self> {
        let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
        let (words, _) = bytes.as_chunks::<8>();
        let [count, sum, variance, crc] = *words else { return None };
        if u64::from_le_bytes(crc) != u64::from(crc32c::crc32c(&bytes[..BYTES - 8])) {
            return None;
        }
        let (count, sum, variance) = (u64::from_le_bytes(count), f64::from_le_bytes(sum), f64::from_le_bytes(variance));
        // Each access adds at most a half to the sum, and at most 1 to the variance; numbers beyond 2⁵³ are no longer counted with.
        let most = count as f64;
        let sound = count < 1 << 53 && sum.abs() <= 0.5 * most && (0.0..=most).contains(&variance);
        sound.then_some(Self { config, count, sum, variance })
    }
}

/// Stitched boundary for sums of variance `v` and range 1, crossed ever with a chance of at most `alpha` (equation 10 there).
fn boundary(v: f64, alpha: f64) -> f64 {
    let v = v.max(VARIANCE_MIN);
    let log = POWER * (1.0 + (v / VARIANCE_MIN).log2()).ln() + (ZETA / alpha).ln();
    (K1 * K1 * v * log + K2 * K2 * log * log).sqrt() + K2 * log
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Numerical Recipes' 64-bit congruential generator, upper bits.
    fn unit(state: &mut u64) -> f64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// First verdict within `most` accesses whose saving is `mean` ± `spread` bits.
    fn run(seed: u64, mean: f64, spread: f64, most: u64, config: ContestConfig) -> (Verdict, u64) {
        let (mut contest, mut state) = (Contest::new(config), seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..16 {
            unit(&mut state);
        }
        for count in 1..=most {
            let common = 6.0 * unit(&mut state);
            let saved = mean + spread * (2.0 * unit(&mut state) - 1.0);
            contest.add(common + saved, common);
            let verdict = contest.verdict();
            if verdict != Verdict::Undecided {
                return (verdict, count);
            }
        }
        (Verdict::Undecided, most)
    }

    #[test]
    fn constants_are_what_they_stand_for() {
        let head: f64 = (1..1_000_000_u32).map(|k| f64::from(k).powf(-POWER)).sum();
        // Euler–Maclaurin for the rest.
        let (n, s) = (1e6_f64, POWER);
        let tail = n.powf(1.0 - s) / (s - 1.0) + 0.5 * n.powf(-s);
        assert!((head + tail - ZETA).abs() < 1e-7, "{}", head + tail);
        let (eta, root) = (2.0_f64, std::f64::consts::SQRT_2);
        assert!(((eta.powf(0.25) + eta.powf(-0.25)) / root - K1).abs() < 1e-8);
        assert!(((eta.sqrt() + 1.0) / 2.0 - K2).abs() < 1e-8);
    }

    #[test]
    fn a_better_shadow_wins_and_an_equal_one_does_not() {
        let config = ContestConfig::default();
        for seed in 0..50 {
            let (verdict, after) = run(seed, 0.3, 2.0, 100_000, config);
            assert_eq!(verdict, Verdict::ShadowBetter);
            assert!(after < 5_000, "{after}");
            assert_eq!(run(seed, -0.2, 2.0, 100_000, config).0, Verdict::ShadowNotBetter);
        }
        assert_eq!(Contest::new(config).verdict(), Verdict::Undecided);
    }

    #[test]
    fn looking_after_every_access_keeps_to_the_error_rate_under_the_null() {
        // Saves exactly the margin: either verdict is wrong. Error 0.1 over 200 contests of 10,000 looks each.
        let config = ContestConfig { margin_bits: 0.05, error: 0.1 };
        for spread in [0.5, 3.0, 7.9] {
            let wrong =
                (0..200).filter(|seed| run(*seed, 0.05, spread, 10_000, config).0 != Verdict::Undecided).count();
            assert!(wrong <= 20, "{wrong} of 200 wrong at a spread of {spread}");
        }
    }

    #[test]
    fn rare_large_losses_are_not_overlooked() {
        // Saves 0.1 bits on 99 of 100 accesses and loses 8 on one: a mean of 0.019, below the margin.
        for seed in 1..100_u64 {
            let (mut contest, mut state) = (Contest::new(ContestConfig::default()), seed);
            for _ in 0..30_000 {
                let saved = if unit(&mut state) < 0.01 { -8.0 } else { 0.1 };
                contest.add(saved, 0.0);
                assert_ne!(contest.verdict(), Verdict::ShadowBetter, "seed {seed}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        /// The bounds hold for streams that change with time, at every look; an error of 1e-9 makes a miss a defect.
        #[test]
        fn bounds_contain_the_true_mean_at_every_look(
            seed in any::<u64>(),
            pieces in prop::collection::vec((-2.0..2.0_f64, 0.0..4.0_f64, 1..2000_u32), 1..5),
        ) {
            let mut contest = Contest::new(ContestConfig { margin_bits: 0.0, error: 1e-9 });
            let (mut state, mut expected) = (seed, 0.0);
            for (mean, spread, length) in pieces {
                for _ in 0..length {
                    expected += mean;
                    contest.add(mean + spread * (2.0 * unit(&mut state) - 1.0), 0.0);
                    let [least, _, most] = contest.saved_bits();
                    let truth = expected / contest.accesses() as f64;
                    prop_assert!(least <= truth && truth <= most, "{least} {truth} {most}");
                }
            }
        }

        #[test]
        fn bytes_bring_a_contest_back_and_nothing_else_does(costs in prop::collection::vec((any::<f64>(), any::<f64>()), 0..50), at in 0..BYTES, flip in 1..=255_u8) {
            let config = ContestConfig::default();
            let mut contest = Contest::new(config);
            costs.iter().for_each(|(champion, shadow)| contest.add(*champion, *shadow));
            let mut bytes = contest.to_bytes();
            prop_assert_eq!(Contest::from_bytes(&bytes, config), Some(contest));
            bytes[at] ^= flip;
            prop_assert_eq!(Contest::from_bytes(&bytes, config), None);
            prop_assert_eq!(Contest::from_bytes(&bytes[1..], config), None);
        }
    }

    #[test]
    fn sums_that_no_accesses_give_are_refused_whatever_their_checksum_says() {
        let config = ContestConfig::default();
        let forged = |count, sum, variance| {
            Contest::from_bytes(&Contest { config, count, sum, variance }.to_bytes(), config).is_some()
        };
        assert!(forged(10, -5.0, 10.0));
        assert!(!forged(u64::MAX, 0.0, 0.0), "the next access would have no number");
        assert!(!forged(10, 5.1, 1.0) && !forged(0, 0.1, 0.0) && !forged(10, f64::NAN, 1.0));
        assert!(!forged(10, 1.0, -0.1) && !forged(10, 1.0, 10.1) && !forged(10, 1.0, f64::INFINITY));
    }
}
