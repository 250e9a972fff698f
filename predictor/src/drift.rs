//! Change detection: has the mean of a bounded signal moved? Signals are values in `0 ..= 1`, such as 1 for a hit and 0 for a
//! miss; others are clamped to it, and what is not a number is ignored. Constant time and memory, no clock, no randomness.
//!
//! - [`PageHinkley`]: one counter up and one down; quick on large changes
//! - [`Adwin`]: a window of its own length; finds small changes, and how far back the present goes

/// Settings of [`PageHinkley`].
///
/// The defaults bound false alarms: on `n` independent values of one mean the chance of any alarm is at most
/// `2n·exp(−8(δ−ε)λ) + 2·exp(−2·m·ε²)` for every `ε < δ`, with `m` the warm-up: by Hoeffding's lemma `exp(8(δ−ε)·sum)` is a
/// supermartingale while the running mean is within `ε` of the true one, which it leaves with the second term's chance.
/// With `ε = 0.055`: below 0.01 for a million values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageHinkleyConfig {
    /// Change of the mean that is tolerated. Default 0.1.
    pub delta: f64,
    /// Excess, summed up, that raises the alarm: a jump by `d` is found after some `lambda / (d - delta)` values. Default 60.
    pub lambda: f64,
    /// Values before the first alarm can be. Default 1000.
    pub warm_up: u64,
}

impl Default for PageHinkleyConfig {
    fn default() -> Self {
        Self { delta: 0.1, lambda: 60.0, warm_up: 1000 }
    }
}

/// Page–Hinkley test, both ways (E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954; H. Mouss et al., "Test of
/// Page-Hinkley, an approach for fault detection in an agro-alimentary production system", ASCC 2004).
#[derive(Clone, Debug)]
pub struct PageHinkley {
    config: PageHinkleyConfig,
    count: u64,
    mean: f64,
    /// Excess over, and below, the mean; never less than 0.
    up: f64,
    down: f64,
}

impl PageHinkley {
    #[must_use]
    pub fn new(config: PageHinkleyConfig) -> Self {
        Self { config, count: 0, mean: 0.0, up: 0.0, down: 0.0 }
    }

    /// Takes in a value. Returns whether the mean has moved; the detector then starts anew from what comes.
    pub fn add(&mut self, value: f64) -> bool {
        let Some(value) = bounded(value) else { return false };
        if self.count >= self.config.warm_up {
            // The mean of what came before: the value itself must not pull its own reference along.
            self.up = (self.up + value - self.mean - self.config.delta).max(0.0);
            self.down = (self.down + self.mean - value - self.config.delta).max(0.0);
            if self.up.max(self.down) > self.config.lambda {
                *self = Self::new(self.config);
                return true;
            }
        }
        self.count += 1;
        self.mean += (value - self.mean) / self.count as f64;
        false
    }

    /// Mean since the start or the last alarm.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.mean
    }
}

fn bounded(value: f64) -> Option<f64> {
    (!value.is_nan()).then(|| value.clamp(0.0, 1.0))
}

/// Buckets of one size; one more, and the two oldest are united (the paper's M).
const ROW: usize = 5;
/// Sizes of buckets: the largest holds 2^23 values. Beyond, the window's oldest leave it.
const ROWS: usize = 24;
/// Values between looks at the cuts.
const STRIDE: u64 = 32;
/// Values on each side of a cut, at least.
const SIDE_MIN: u64 = 16;

/// Sums of values; a bucket in row `r` holds `2^r` of them.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// Oldest first.
    sums: [f64; ROW + 1],
    len: usize,
}

impl Row {
    fn push(&mut self, sum: f64) {
        self.sums[self.len] = sum;
        self.len += 1;
    }

    /// Takes the `count` oldest out and returns their sum.
    fn take(&mut self, count: usize) -> f64 {
        let sum = self.sums[..count].iter().sum();
        self.sums.copy_within(count..self.len, 0);
        self.len -= count;
        sum
    }
}

/// Adaptive window (A. Bifet, R. Gavaldà, "Learning from time-changing data with adaptive windowing", SDM 2007): keeps the
/// longest window within which no two parts differ in mean by more than chance allows, as an exponential histogram of 1.2 KiB.
///
/// On values of one mean, the chance that a look (one in 32 values) raises an alarm is at most `confidence` (the paper's
/// theorem 1): its cut is Hoeffding's, with the confidence divided by the window's length, and not the tighter normal
/// approximation, for which there is no such promise.
#[derive(Clone, Debug)]
pub struct Adwin {
    confidence: f64,
    rows: [Row; ROWS],
    count: u64,
    sum: f64,
    seen: u64,
}

impl Adwin {
    /// `confidence`: chance of a false alarm a look, such as 1e-5.
    #[must_use]
    pub fn new(confidence: f64) -> Self {
        Self { confidence, rows: [Row::default(); ROWS], count: 0, sum: 0.0, seen: 0 }
    }

    /// Takes in a value. Returns whether the mean has moved; the window then holds what came after the change.
    pub fn add(&mut self, value: f64) -> bool {
        let Some(value) = bounded(value) else { return false };
        self.rows[0].push(value);
        self.count += 1;
        self.sum += value;
        self.seen += 1;
        self.unite();
        self.seen.is_multiple_of(STRIDE) && self.shrink()
    }

    /// Values in the window.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Mean of the window, 0 of an empty one.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    fn unite(&mut self) {
        for row in 0..ROWS {
            if self.rows[row].len <= ROW {
                return;
            }
            match row + 1 {
                ROWS => self.drop_oldest(row),
                above => {
                    let sum = self.rows[row].take(2);
                    self.rows[above].push(sum);
                }
            }
        }
    }

    fn drop_oldest(&mut self, row: usize) {
        self.sum -= self.rows[row].take(1);
        self.count -= 1 << row;
    }

    /// Drops the oldest bucket while some cut tells the older part from the newer.
    fn shrink(&mut self) -> bool {
        let mut moved = false;
        while self.is_cut() {
            moved = true;
            let Some(oldest) = self.rows.iter().rposition(|row| row.len > 0) else { break };
            self.drop_oldest(oldest);
        }
        moved
    }

    fn is_cut(&self) -> bool {
        let (mut older, mut older_sum) = (0_u64, 0.0);
        let log = (4.0 * self.count as f64 / self.confidence).ln();
        for (row, buckets) in self.rows.iter().enumerate().rev() {
            for sum in &buckets.sums[..buckets.len] {
                older += 1 << row;
                older_sum += sum;
                let newer = self.count - older;
                if older < SIDE_MIN || newer < SIDE_MIN {
                    continue;
                }
                let (a, b) = (older as f64, newer as f64);
                let apart = (older_sum / a - (self.sum - older_sum) / b).abs();
                // 1/(2m), m the harmonic mean of the parts' lengths as the paper has it.
                if apart > (0.5 * (1.0 / a + 1.0 / b) * log).sqrt() {
                    return true;
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// SplitMix64 (Steele, Lea, Flood 2014).
    struct Random(u64);

    impl Random {
        fn unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        }

        fn coin(&mut self, chance: f64) -> f64 {
            f64::from(u8::from(self.unit() < chance))
        }
    }

    fn page_hinkley() -> PageHinkley {
        PageHinkley::new(PageHinkleyConfig::default())
    }

    /// Values until the alarm after a change from one chance to another.
    fn delay(mut add: impl FnMut(f64) -> bool, seed: u64, from: f64, to: f64) -> Option<u64> {
        let mut random = Random(seed);
        for _ in 0..5000 {
            assert!(!add(random.coin(from)), "alarm before the change, seed {seed}");
        }
        (1..=20_000).find(|_| add(random.coin(to)))
    }

    #[test]
    fn page_hinkley_finds_a_jump_either_way_within_twice_the_stated_delay() {
        for seed in 0..200 {
            for (from, to) in [(0.8_f64, 0.4_f64), (0.1, 0.5), (0.9, 0.1)] {
                let mut detector = page_hinkley();
                let stated = 60.0 / ((from - to).abs() - 0.1);
                let found = delay(|value| detector.add(value), seed, from, to);
                assert!(
                    found.is_some_and(|after| (after as f64) < 2.0 * stated),
                    "{from} to {to}: {found:?}, seed {seed}"
                );
            }
        }
    }

    #[test]
    fn page_hinkley_is_silent_on_stationary_streams() {
        // The stated bound is 0.01 a million values; these are 20 million: 0.2 alarms expected at most, 3 all but impossible.
        let alarms: usize = (0..200)
            .map(|seed| {
                let (mut random, mut detector) = (Random(seed), page_hinkley());
                let chance = 0.05 + 0.9 * random.unit();
                (0..100_000).filter(|_| detector.add(random.coin(chance))).count()
            })
            .sum();
        assert!(alarms <= 2, "{alarms}");
    }

    #[test]
    fn adwin_finds_small_changes_and_forgets_what_was_before() {
        for seed in 0..100 {
            for (from, to, within) in [(0.8, 0.4, 600), (0.5, 0.4, 6000), (0.2, 0.3, 6000)] {
                let mut detector = Adwin::new(1e-4);
                let found = delay(|value| detector.add(value), seed, from, to);
                assert!(found.is_some_and(|after| after <= within), "{from} to {to}: {found:?}, seed {seed}");
                let mut random = Random(!seed);
                for _ in 0..20_000 {
                    detector.add(random.coin(to));
                }
                assert!((detector.mean() - to).abs() < 0.03, "{}", detector.mean());
                assert!(detector.len() <= 20_000 + within);
            }
        }
    }

    #[test]
    fn adwin_keeps_to_its_confidence_on_stationary_streams() {
        let confidence = 0.01;
        let (mut alarms, mut looks) = (0, 0);
        for seed in 0..100 {
            let (mut random, mut detector) = (Random(seed), Adwin::new(confidence));
            let chance = random.unit();
            for _ in 0..20_000 {
                alarms += u64::from(detector.add(random.coin(chance)));
            }
            looks += 20_000 / STRIDE;
        }
        assert!((alarms as f64) < confidence * looks as f64, "{alarms} of {looks}");
    }

    #[test]
    fn adwin_stays_bounded_when_its_last_row_overflows() {
        let mut detector = Adwin::new(1e-5);
        // As if 2^23 values a bucket had come.
        detector.rows[ROWS - 1] = Row { sums: [0.5 * f64::from(1 << (ROWS - 1)); ROW + 1], len: ROW };
        detector.count = (ROW as u64) << (ROWS - 1);
        detector.sum = 0.5 * detector.count as f64;
        detector.rows[ROWS - 1].len = ROW + 1;
        detector.count += 1 << (ROWS - 1);
        detector.sum = 0.5 * detector.count as f64;
        detector.drop_oldest(ROWS - 1);
        assert_eq!(detector.len(), (ROW as u64) << (ROWS - 1));
        assert!((detector.mean() - 0.5).abs() < 1e-9);
        assert!(size_of::<Adwin>() < 2048);
    }

    proptest! {
        /// The histogram's sums and lengths are those of the last values, whatever came, numbers or not.
        #[test]
        fn adwin_holds_a_suffix_of_the_stream(values in prop::collection::vec(prop_oneof![9 => 0.0..1.0, 1 => -5.0..5.0, 1 => Just(f64::NAN)], 0..2000)) {
            let mut detector = Adwin::new(0.05);
            let mut taken: Vec<f64> = Vec::new();
            for value in values {
                detector.add(value);
                taken.extend(bounded(value));
                let window = &taken[taken.len() - usize::try_from(detector.len()).unwrap()..];
                prop_assert!((window.iter().sum::<f64>() - detector.sum).abs() < 1e-6);
            }
        }
    }
}
