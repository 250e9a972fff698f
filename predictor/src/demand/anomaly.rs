//! Unusual use for this program and hour, with the evidence; what to do about it is somebody else's to decide.
//!
//! | kind | when |
//! | --- | --- |
//! | [`Kind::UnusualHour`] | for a quarter of an hour more than twice what is usual at this hour, though others reach it |
//! | [`Kind::Runaway`] | for an hour more than 1.5 times what this program usually has at most at any hour |
//! | [`Kind::Leak`] | memory whose lows have risen for three hours, beyond what is usual |
//! | [`Kind::Drift`] | the share of values above the hour's .95 quantile has changed: the profile is of other times |
//!
//! What is usual is a [`Profile`]: none of this speaks before that does. An anomaly is reported when it begins, and lasts
//! until the use was usual for a quarter of an hour.

use super::{Metric, Profile};
use crate::drift::Adwin;

/// Seconds of unusual use, and of usual use afterwards, that count.
const UNUSUAL_S: u64 = 900;
const RUNAWAY_S: u64 = 3600;
/// Beyond the .95 quantile of the hour and of all hours.
const UNUSUAL_FACTOR: f64 = 2.0;
const RUNAWAY_FACTOR: f64 = 1.5;
/// A low is the least of so many seconds; so many of them are compared.
const LOW_S: u64 = 600;
const LOWS: usize = 18;
/// Share of the pairs of lows that rise (Mann–Kendall), and by how much they do in all.
const RISING: f64 = 0.8;
const GROWTH: f64 = 0.1;
/// Chance of a false alarm a look at drift.
const DRIFT_CONFIDENCE: f64 = 1e-4;
/// An hour's range is no narrower than this share of the largest usual value: idle hours are not judged by their noise.
const NOISE: f64 = 0.05;

/// What is unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    UnusualHour,
    Runaway,
    Leak,
    Drift,
}

/// Evidence of unusual use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Anomaly {
    pub kind: Kind,
    pub metric: Metric,
    /// What was measured when it was found; of [`Kind::Drift`] the share of values above the hour's .95 quantile.
    pub measured: f64,
    /// .05 and .95 quantile of what is usual, in the same unit.
    pub expected: (f64, f64),
    /// Unix time at which it began.
    pub since_s: u64,
}

/// Watches one series; less than 2 KiB.
#[derive(Clone, Debug)]
pub struct Detector {
    metric: Metric,
    last_s: u64,
    /// Since when values have been unusual, beyond all hours, or usual.
    unusual: Option<u64>,
    runaway: Option<u64>,
    usual: Option<u64>,
    /// Lows of the last [`LOWS`] spans, oldest first, and of the one under way.
    lows: Vec<(u64, f64)>,
    low: Option<(u64, f64)>,
    drift: Adwin,
    current: Option<Anomaly>,
}

impl Detector {
    #[must_use]
    pub fn new(metric: Metric) -> Self {
        Self {
            metric,
            last_s: 0,
            unusual: None,
            runaway: None,
            usual: None,
            lows: Vec::new(),
            low: None,
            drift: Adwin::new(DRIFT_CONFIDENCE),
            current: None,
        }
    }

    /// What is unusual now.
    #[must_use]
    pub fn current(&self) -> Option<&Anomaly> {
        self.current.as_ref()
    }

    /// Takes in a value of unix time `at_s`, no earlier than the last; `profile` is what was usual before this execution.
    /// Returns an anomaly when it begins, or becomes another.
    pub fn observe(&mut self, at_s: u64, value: f64, profile: &Profile) -> Option<Anomaly> {
        if !(0.0..=1e30).contains(&value) || at_s < self.last_s {
            return None;
        }
        self.last_s = at_s;
        let (hour, overall) = (profile.quantiles(at_s)?, profile.overall()?);
        let most = overall.0[3];
        let high = hour.0[3].max(NOISE * most);
        let since = |since: &mut Option<u64>, is: bool| {
            *since = if is { Some(since.unwrap_or(at_s)) } else { None };
            since.map_or(0, |since| at_s - since)
        };
        let unusual = since(&mut self.unusual, value > UNUSUAL_FACTOR * high) >= UNUSUAL_S;
        let runaway = since(&mut self.runaway, value > RUNAWAY_FACTOR * most) >= RUNAWAY_S;
        let usual = since(&mut self.usual, value <= high) >= UNUSUAL_S;
        let leak = self.metric == Metric::Memory && self.rises(at_s, value, overall.0[1]) && value > most;
        let drifted = self.drift.add(f64::from(u8::from(value > high)));

        let found = if leak {
            Some((Kind::Leak, value, (overall.0[0], most), self.lows.first().map_or(at_s, |low| low.0)))
        } else if runaway {
            Some((Kind::Runaway, value, (overall.0[0], most), self.runaway.unwrap_or(at_s)))
        } else if unusual && value <= RUNAWAY_FACTOR * most {
            Some((Kind::UnusualHour, value, (hour.0[0], hour.0[3]), self.unusual.unwrap_or(at_s)))
        } else if drifted && self.drift.mean() > 0.05 {
            Some((Kind::Drift, self.drift.mean(), (0.0, 0.05), at_s))
        } else {
            None
        };
        let found = found.map(|(kind, measured, expected, since_s)| Anomaly {
            kind,
            metric: self.metric,
            measured,
            expected,
            since_s,
        });
        match (found, &self.current) {
            (Some(found), Some(current)) if current.kind == found.kind => None,
            // what rises is not less of a leak for being within the range of a runaway
            (Some(found), Some(current)) if current.kind == Kind::Leak && found.kind != Kind::Leak && !usual => None,
            (Some(found), _) => {
                self.current = Some(found);
                Some(found)
            }
            (None, Some(_)) if usual => {
                self.current = None;
                None
            }
            (None, _) => None,
        }
    }

    /// Whether the lows have been rising.
    fn rises(&mut self, at_s: u64, value: f64, usual: f64) -> bool {
        let span = at_s / LOW_S;
        match &mut self.low {
            Some((of, low)) if *of == span => *low = low.min(value),
            other => {
                if let Some((of, low)) = other.replace((span, value)) {
                    // what was before a gap is no part of the same rise
                    if self.lows.last().is_some_and(|(before, _)| before / LOW_S + 2 < of) {
                        self.lows.clear();
                    }
                    if self.lows.len() == LOWS {
                        self.lows.remove(0);
                    }
                    self.lows.push((of * LOW_S, low));
                }
            }
        }
        let (Some(first), Some(last)) = (self.lows.first(), self.lows.last()) else { return false };
        if self.lows.len() < LOWS || last.1 - first.1 < GROWTH * usual.max(first.1) {
            return false;
        }
        let pairs = LOWS * (LOWS - 1) / 2;
        let rising: usize =
            (1..LOWS).map(|at| self.lows[..at].iter().filter(|before| before.1 < self.lows[at].1).count()).sum();
        rising as f64 >= RISING * pairs as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP_S: u64 = 300;

    /// Busy by day, idle by night, for a fortnight; and the time behind it.
    fn profile(day: f64, night: f64) -> (Profile, u64) {
        let mut profile = Profile::default();
        for at in 0..14 * 288 {
            let at_s = at * STEP_S;
            let wave = 1.0 + 0.1 * ((at % 7) as f64 / 7.0 - 0.5);
            profile.observe(at_s, wave * if (8..18).contains(&(at_s / 3600 % 24)) { day } else { night });
        }
        (profile, 14 * 86_400)
    }

    /// What is found while `value(step)` is measured from `start_s` on, and the step at which it was.
    fn found(
        metric: Metric,
        profile: &Profile,
        start_s: u64,
        steps: u64,
        value: impl Fn(u64) -> f64,
    ) -> Vec<(u64, Anomaly)> {
        let mut detector = Detector::new(metric);
        (0..steps).filter_map(|at| Some((at, detector.observe(start_s + at * STEP_S, value(at), profile)?))).collect()
    }

    #[test]
    fn what_is_usual_by_day_is_unusual_by_night() {
        let (profile, start_s) = profile(2.0, 0.2);
        let night = found(Metric::Cpu, &profile, start_s, 24, |at| if at < 6 { 0.2 } else { 2.0 });
        assert_eq!(night.len(), 1, "{night:?}");
        let (at, anomaly) = night[0];
        assert_eq!((anomaly.kind, anomaly.measured), (Kind::UnusualHour, 2.0));
        assert_eq!((at, anomaly.since_s), (9, start_s + 6 * STEP_S));
        assert!(anomaly.expected.1 < 0.25, "{anomaly:?}");
        let day = found(Metric::Cpu, &profile, start_s + 9 * 3600, 24, |_| 2.0);
        assert_eq!(day, []);
    }

    #[test]
    fn what_no_hour_has_is_a_runaway_and_ends_with_it() {
        let (profile, start_s) = profile(2.0, 0.2);
        let mut detector = Detector::new(Metric::Cpu);
        let mut kinds = Vec::new();
        for at in 0..48 {
            let value = if at < 24 { 4.0 } else { 0.2 };
            kinds.extend(detector.observe(start_s + at * STEP_S, value, &profile).map(|found| (at, found.kind)));
        }
        assert_eq!(kinds, [(12, Kind::Runaway)]);
        assert_eq!(detector.current(), None);
    }

    #[test]
    fn memory_that_only_rises_is_a_leak_and_a_saw_is_none() {
        let (profile, start_s) = profile(1e9, 1e9);
        let leak = found(Metric::Memory, &profile, start_s, 100, |at| 1e9 + 1e7 * at as f64);
        assert_eq!(leak.first().map(|found| found.1.kind), Some(Kind::Leak), "{leak:?}");
        assert!(leak[0].1.since_s < start_s + 3600 * 6 && leak[0].1.measured > leak[0].1.expected.1);
        let saw = found(Metric::Memory, &profile, start_s, 400, |at| 0.9e9 + 2e7 * (at % 10) as f64);
        assert_eq!(saw, []);
        assert_eq!(found(Metric::Cpu, &profile, start_s, 30, |at| 1e9 + 1e7 * at as f64), []);
    }

    #[test]
    fn a_lasting_change_is_drift() {
        let (profile, start_s) = profile(1.0, 1.0);
        let drift = found(Metric::Disk, &profile, start_s, 3000, |at| if at < 1500 { 1.0 } else { 1.3 });
        assert_eq!(drift.first().map(|found| found.1.kind), Some(Kind::Drift), "{drift:?}");
        assert!(drift[0].0 >= 1500 && drift[0].0 < 1700);
    }

    #[test]
    fn nothing_is_said_without_a_profile_or_of_what_is_no_number() {
        assert_eq!(found(Metric::Cpu, &Profile::default(), 0, 500, |_| 1e9), []);
        let (profile, start_s) = profile(1.0, 1.0);
        assert_eq!(found(Metric::Cpu, &profile, start_s, 500, |at| if at % 2 == 0 { f64::NAN } else { -1.0 }), []);
    }
}
