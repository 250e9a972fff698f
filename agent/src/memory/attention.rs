//! How many of a guest's faults are told.
//!
//! A fault that is told costs the guest one to two microseconds (facts: the perf event and its sample). So a guest pays
//! for being watched from a purse: one per cent of a processor's time flows in, what staging has saved it comes on top, and
//! every fault that is told is paid for. While there is enough, each is told; else every `n`th, `n` a power of two. A program
//! that runs for the first time is watched in full, up to a number of faults: that is what the next run is to gain from.

/// What the guest pays for a fault that is told, in microseconds.
const PRICE_US: f64 = 1.5;
/// Share of its time.
const SHARE: f64 = 0.01;
/// Faults that the purse holds, at most: the beginning of a burst is told in full, and costs .4 ms.
const PURSE: f64 = 256.0;
/// What a page that was staged and used saves at least, in faults told: 3 of 4.5 µs on zram.
const SAVED: f64 = 2.0;
/// Faults of a program's first run that are told in full.
const FIRST_RUN: u64 = 1 << 18;
/// The period changes no sooner after the last change, unless the purse is empty.
const PATIENCE_US: u64 = 100_000;
/// Coarsest period.
const COARSEST: u32 = 1 << 14;

/// See the module's head. Times are microseconds of one clock.
#[derive(Debug)]
pub(super) struct Attention {
    period: u32,
    purse: f64,
    filled_us: u64,
    changed_us: u64,
    /// Faults told since the last change.
    heard: u64,
    /// Faults of the running program's first run that may still be told in full.
    first_run: u64,
}

impl Attention {
    pub(super) fn new(now_us: u64) -> Self {
        Self { period: 1, purse: PURSE, filled_us: now_us, changed_us: now_us, heard: 0, first_run: 0 }
    }

    /// Every so many faults are told.
    pub(super) fn period(&self) -> u32 {
        self.period
    }

    /// A program begins of which nothing is known.
    pub(super) fn first_run(&mut self) {
        self.first_run = FIRST_RUN;
    }

    /// It has ended.
    pub(super) fn run_ended(&mut self) {
        self.first_run = 0;
    }

    /// So many staged pages were of use.
    pub(super) fn saved(&mut self, pages: u64) {
        self.purse = (self.purse + pages as f64 * SAVED).min(PURSE);
    }

    /// So many faults were told since the last call. Returns the new period if it changes.
    pub(super) fn heard(&mut self, faults: u64, now_us: u64) -> Option<u32> {
        let passed = now_us.saturating_sub(std::mem::replace(&mut self.filled_us, now_us)) as f64;
        let income = SHARE / PRICE_US; // faults a microsecond
        self.purse = (self.purse + passed * income).min(PURSE);
        self.heard += faults;
        let free = faults.min(self.first_run);
        self.first_run -= free;
        self.purse -= (faults - free) as f64;
        let since = now_us.saturating_sub(self.changed_us);
        let rate = self.heard as f64 * f64::from(self.period) / (since.max(1_000) as f64);
        let wanted = if self.first_run > 0 {
            1
        } else if self.purse < 0.0 {
            // What was told since the last change may lie in an instant: at least twice as coarse.
            pow2(rate / income).max(self.period.saturating_mul(2))
        } else if since >= PATIENCE_US && self.purse > PURSE / 2.0 {
            pow2(rate / income).min(self.period)
        } else {
            self.period
        };
        let wanted = wanted.min(COARSEST);
        if since >= PATIENCE_US {
            // A rate of now, not of long ago.
            (self.heard, self.changed_us) = (0, now_us);
        }
        if wanted == self.period {
            return None;
        }
        (self.period, self.heard, self.changed_us) = (wanted, 0, now_us);
        self.purse = self.purse.max(0.0);
        Some(wanted)
    }
}

fn pow2(value: f64) -> u32 {
    (value.ceil().clamp(1.0, f64::from(COARSEST)) as u32).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest with a fault every `every_us`, told every millisecond: faults told, and the period at the end.
    fn watch(attention: &mut Attention, from_us: u64, ms: u64, every_us: f64) -> (u64, u32) {
        let (mut told, mut left) = (0, 0.0);
        for at in 1..=ms {
            left += 1000.0 / every_us / f64::from(attention.period());
            let now = left as u64;
            left -= now as f64;
            told += now;
            attention.heard(now, from_us + at * 1000);
        }
        (told, attention.period())
    }

    #[test]
    fn a_guest_that_faults_all_the_time_pays_little_more_than_a_per_cent() {
        for every_us in [4.5, 9.0, 80.0] {
            let mut attention = Attention::new(0);
            let (told, period) = watch(&mut attention, 0, 400, every_us);
            let share = told as f64 * PRICE_US / 400_000.0;
            assert!(share < 0.018, "{every_us}: {told} told, {share}");
            assert!(period >= 2 || every_us > 50.0, "{every_us}: {period}");
            let (told, _) = watch(&mut attention, 400_000, 10_000, every_us);
            let share = told as f64 * PRICE_US / 1e7;
            assert!((0.002..0.0115).contains(&share), "{every_us}: {share}");
        }
    }

    #[test]
    fn few_faults_are_all_told_and_so_are_those_of_a_first_run() {
        let mut attention = Attention::new(0);
        assert_eq!(watch(&mut attention, 0, 5000, 200.0), (25_000, 1));
        attention.first_run();
        assert_eq!(watch(&mut attention, 5_000_000, 500, 5.0), (100_000, 1));
        attention.run_ended();
        assert!(watch(&mut attention, 5_500_000, 500, 5.0).1 > 1);
        // Quiet again: all are told again.
        assert_eq!(watch(&mut attention, 6_000_000, 3000, 300.0).1, 1);
    }

    #[test]
    fn a_first_run_without_end_is_watched_in_full_only_so_far() {
        let mut attention = Attention::new(0);
        attention.first_run();
        let (told, period) = watch(&mut attention, 0, 10_000, 5.0);
        assert!(period > 1 && (FIRST_RUN..FIRST_RUN + 120_000).contains(&told), "{told} {period}");
    }

    #[test]
    fn what_staging_saves_pays_for_watching() {
        let mut attention = Attention::new(0);
        let mut period = 1;
        for ms in 0..2000 {
            attention.heard(100, ms * 1000);
            attention.saved(60);
            period = attention.period();
        }
        assert_eq!(period, 1);
    }
}
