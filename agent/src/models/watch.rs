//! What the learner reports and what follows from it: contests of shadows with champions, and drift.
//!
//! The learner's side takes a lock for the length of a batch; the only other taker is the manager's thread, for as long.

use std::collections::BTreeMap;

use prestage_predictor::contest::{Contest, ContestConfig, Verdict};
use prestage_predictor::drift::{Adwin, PageHinkley, PageHinkleyConfig};

use super::ModelSettings;
use super::scope::Scope;

/// Chance of a false alarm of ADWIN at each of its looks: one alarm in some 30 million values.
const ADWIN_CONFIDENCE: f64 = 1e-6;

/// What is watched for drift, by storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    /// Outcome (1 or 0) minus the probability that was predicted for it: 0 on average while calibrated.
    Calibration,
    /// 1 for a read that the cache had, 0 for one that it had not.
    Hit,
}

impl Signal {
    /// Into 0 to 1, as the detectors want it.
    fn scaled(self, value: f32) -> f64 {
        match self {
            Self::Calibration => f64::from(value).mul_add(0.5, 0.5),
            Self::Hit => f64::from(value),
        }
    }
}

/// Both detectors on one signal.
#[derive(Debug)]
struct Drift {
    quick: PageHinkley,
    fine: Adwin,
}

impl Drift {
    fn new() -> Self {
        Self { quick: PageHinkley::new(PageHinkleyConfig::default()), fine: Adwin::new(ADWIN_CONFIDENCE) }
    }

    /// Mean before and after, when it has moved.
    fn add(&mut self, value: f64) -> Option<(f64, f64)> {
        let before = self.fine.mean();
        // Both are fed, whichever finds it.
        let (quick, fine) = (self.quick.add(value), self.fine.add(value));
        (quick || fine).then(|| (before, self.fine.mean()))
    }
}

/// The two models of a contest. Without a champion the shadow is compared with prediction without a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    pub champion: Option<i64>,
    pub shadow: i64,
}

#[derive(Debug)]
pub(super) struct Trial {
    pub(super) pair: Pair,
    pub(super) contest: Contest,
    /// The manager has been told.
    over: bool,
}

/// A contest has come to its end.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Decision {
    pub(super) scope: Scope,
    pub(super) pair: Pair,
    pub(super) promote: bool,
    pub(super) reason: String,
}

#[derive(Debug)]
pub(super) struct Watch {
    settings: ModelSettings,
    trials: BTreeMap<Scope, Trial>,
    drifts: BTreeMap<(String, Signal), Drift>,
}

pub(super) fn contest_config(settings: &ModelSettings) -> ContestConfig {
    ContestConfig { margin_bits: settings.margin_bits, ..ContestConfig::default() }
}

impl Watch {
    pub(super) fn new(settings: ModelSettings) -> Self {
        Self { settings, trials: BTreeMap::new(), drifts: BTreeMap::new() }
    }

    pub(super) fn settings(&mut self, settings: ModelSettings) {
        self.settings = settings;
    }

    pub(super) fn current(&self) -> ModelSettings {
        self.settings
    }

    /// The contests there are to be from now on; one whose pair is the same goes on.
    pub(super) fn set_trials(&mut self, wanted: impl IntoIterator<Item = (Scope, Pair, Option<Vec<u8>>)>) {
        let config = contest_config(&self.settings);
        let mut before = std::mem::take(&mut self.trials);
        for (scope, pair, saved) in wanted {
            let trial = match before.remove(&scope) {
                Some(trial) if trial.pair == pair => trial,
                _ => {
                    let saved = saved.and_then(|bytes| Contest::from_bytes(&bytes, config));
                    Trial { pair, contest: saved.unwrap_or_else(|| Contest::new(config)), over: false }
                }
            };
            self.trials.insert(scope, trial);
        }
    }

    pub(super) fn trials(&self) -> impl Iterator<Item = (&Scope, &Trial)> {
        self.trials.iter()
    }

    pub(super) fn trial(&self, scope: &Scope) -> Option<&Trial> {
        self.trials.get(scope)
    }

    /// Costs in bits of the same accesses to champion and shadow. Those of another pair are out of date and ignored.
    pub(super) fn losses(&mut self, scope: &Scope, pair: Pair, losses: &[(f32, f32)]) -> Option<Decision> {
        let trial = self.trials.get_mut(scope).filter(|trial| trial.pair == pair && !trial.over)?;
        for (champion, shadow) in losses {
            trial.contest.add(f64::from(*champion), f64::from(*shadow));
        }
        let (verdict, accesses, margin) =
            (trial.contest.verdict(), trial.contest.accesses(), self.settings.margin_bits);
        if verdict == Verdict::Undecided && accesses < self.settings.trial_accesses {
            return None;
        }
        trial.over = true;
        let [least, mean, most] = trial.contest.saved_bits();
        let found = format!("saves {mean:.3} bits an access ({least:.3} to {most:.3} with 99 % confidence)");
        let reason = match verdict {
            Verdict::ShadowBetter => format!("{found} over {accesses} accesses, more than {margin}"),
            Verdict::ShadowNotBetter => format!("{found} over {accesses} accesses, less than {margin}"),
            Verdict::Undecided => format!("{found}: not known to be more than {margin} after {accesses} accesses"),
        };
        Some(Decision { scope: scope.clone(), pair, promote: verdict == Verdict::ShadowBetter, reason })
    }

    /// Returns what has moved, in words.
    pub(super) fn drift(&mut self, storage: &str, signal: Signal, values: &[f32]) -> Option<String> {
        let key = (storage.to_owned(), signal);
        let drift = self.drifts.entry(key).or_insert_with(Drift::new);
        let mut moved: Option<(f64, f64)> = None;
        for value in values {
            if let Some((before, after)) = drift.add(signal.scaled(*value)) {
                // The window gives way step by step: from what it was at first to what it is at last.
                moved = Some((moved.map_or(before, |(first, _)| first), after));
            }
        }
        moved.map(|(before, after)| match signal {
            Signal::Calibration => {
                format!("calibration error moved from {:.3} to {:.3}", 2.0 * before - 1.0, 2.0 * after - 1.0)
            }
            Signal::Hit => format!("hit ratio moved from {before:.3} to {after:.3}"),
        })
    }

    /// A storage is closed: what was watched of it is forgotten.
    pub(super) fn forget(&mut self, storage: &str) {
        self.drifts.retain(|(watched, _), _| watched != storage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Pair = Pair { champion: Some(1), shadow: 2 };

    fn watch(trial_accesses: u64) -> Watch {
        let mut watch = Watch::new(ModelSettings { trial_accesses, ..ModelSettings::default() });
        watch.set_trials([(Scope::Global, PAIR, None)]);
        watch
    }

    #[test]
    fn a_better_shadow_is_decided_for_once_and_a_worse_one_against() {
        let mut better = watch(1_000_000);
        let decision = better.losses(&Scope::Global, PAIR, &[(2.0, 1.0); 5000]).unwrap();
        assert!(decision.promote && decision.reason.starts_with("saves 1.000 bits"), "{decision:?}");
        assert_eq!(better.losses(&Scope::Global, PAIR, &[(2.0, 1.0); 5000]), None);
        let worse = watch(1_000_000).losses(&Scope::Global, PAIR, &[(1.0, 2.0); 5000]).unwrap();
        assert!(!worse.promote, "{worse:?}");
    }

    #[test]
    fn what_stays_undecided_is_rejected_after_the_stated_accesses_and_a_stale_pair_counts_nothing() {
        let mut watch = watch(500);
        let stale = Pair { champion: None, shadow: 2 };
        assert_eq!(watch.losses(&Scope::Global, stale, &[(9.0, 1.0); 5000]), None);
        let even: Vec<(f32, f32)> = (0..500).map(|n| if n % 2 == 0 { (3.0, 1.0) } else { (1.0, 2.9) }).collect();
        assert_eq!(watch.losses(&Scope::Global, PAIR, &even[..499]), None);
        let decision = watch.losses(&Scope::Global, PAIR, &even[499..]).unwrap();
        assert!(!decision.promote && decision.reason.contains("after 500 accesses"), "{decision:?}");
    }

    #[test]
    fn a_contest_goes_on_after_a_restart() {
        let mut before = watch(500);
        assert_eq!(before.losses(&Scope::Global, PAIR, &[(1.0, 0.9); 300]), None);
        let saved = before.trial(&Scope::Global).map(|trial| trial.contest.to_bytes());
        let mut after = Watch::new(ModelSettings { trial_accesses: 500, ..ModelSettings::default() });
        after.set_trials([(Scope::Global, PAIR, saved)]);
        assert_eq!(after.losses(&Scope::Global, PAIR, &[(1.0, 0.9); 199]), None);
        assert!(after.losses(&Scope::Global, PAIR, &[(1.0, 0.9)]).is_some());
    }

    #[test]
    fn drift_is_told_by_storage_and_signal() {
        let mut watch = watch(500);
        let flat: Vec<f32> = (0..8000).map(|n| if n % 10 == 0 { 0.0 } else { 1.0 }).collect();
        let worse: Vec<f32> = (0..8000).map(|n| if n % 2 == 0 { 0.0 } else { 1.0 }).collect();
        assert_eq!(watch.drift("a", Signal::Hit, &flat), None);
        assert_eq!(watch.drift("b", Signal::Hit, &worse), None);
        let told = watch.drift("a", Signal::Hit, &worse).unwrap();
        assert!(told.starts_with("hit ratio moved from 0.8") || told.starts_with("hit ratio moved from 0.9"), "{told}");
        assert_eq!(watch.drift("a", Signal::Calibration, &[0.05, -0.05].repeat(4000)), None);
        assert!(watch.drift("a", Signal::Calibration, &[0.4; 4000]).unwrap().contains("calibration error moved from"));
        watch.forget("a");
        assert_eq!(watch.drifts.len(), 1);
    }
}
