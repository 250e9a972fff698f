//! Calibration: counts of "of the pages predicted in this class, how many were used" turn a score into a probability.
//!
//! A class starts from a prior worth [`PRIOR_PAGES`] observations and is aged by halving at [`CAP_PAGES`], so that a
//! change in the workload shows within some thousand pages.

use crate::wire::{Reader, WireError, put_f32};
use crate::{ledger, markov, streams};

/// Weight of the prior, in pages. Pages of one request are not independent, hence not a handful.
const PRIOR_PAGES: f32 = 48.0;
/// Counts are halved beyond this many pages.
const CAP_PAGES: f32 = 2048.0;

/// Used and predicted pages of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Odds {
    pub(crate) used: f32,
    pub(crate) total: f32,
}

impl Odds {
    pub(crate) fn add(&mut self, used: u32, total: u32) {
        self.used += used as f32;
        self.total += total as f32;
        if self.total > CAP_PAGES {
            self.used *= 0.5;
            self.total *= 0.5;
        }
    }

    pub(crate) fn probability(self, prior: f32) -> f32 {
        (self.used + prior * PRIOR_PAGES) / (self.total + PRIOR_PAGES)
    }

    /// Eight bytes: used and predicted, as floats.
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        put_f32(out, self.used);
        put_f32(out, self.total);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let odds = Self { used: reader.f32()?, total: reader.f32()? };
        if odds.is_plausible() { Ok(odds) } else { Err(WireError::Invalid("calibration count")) }
    }

    /// What [`Odds::add`] can produce; anything else did not come from here.
    fn is_plausible(self) -> bool {
        self.used.is_finite()
            && self.total.is_finite()
            && self.used >= 0.0
            && self.used <= self.total
            && self.total <= CAP_PAGES
    }
}

/// A class of predictions that share one count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class(pub(crate) u16);

impl Class {
    /// Not labelled here: the expert keeps its own record.
    pub(crate) const NONE: Self = Self(u16::MAX);

    pub(crate) fn stream(index: usize) -> Self {
        debug_assert!(index < streams::CLASSES);
        Self(index as u16)
    }

    pub(crate) fn markov(index: usize) -> Self {
        debug_assert!(index < markov::CLASSES);
        Self((streams::CLASSES + index) as u16)
    }
}

/// All classes of a storage.
#[derive(Clone, Debug)]
pub(crate) struct Calibration {
    /// By [`Class`]: streams, then Markov.
    pub(crate) classes: Vec<Odds>,
    /// By spatial class, see `ledger`.
    pub(crate) spatial: Vec<Odds>,
}

impl Calibration {
    pub(crate) const CLASSES: usize = streams::CLASSES + markov::CLASSES;

    pub(crate) fn new() -> Self {
        Self { classes: vec![Odds::default(); Self::CLASSES], spatial: vec![Odds::default(); ledger::SPATIAL_CLASSES] }
    }

    pub(crate) fn label(&mut self, class: Class, used: u32, total: u32) {
        if total > 0
            && let Some(odds) = self.classes.get_mut(usize::from(class.0))
        {
            odds.add(used, total);
        }
    }

    pub(crate) fn probability(&self, class: Class, prior: f32) -> f32 {
        self.classes.get(usize::from(class.0)).map_or(prior, |odds| odds.probability(prior))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probability_moves_from_the_prior_to_the_observed_share() {
        let mut odds = Odds::default();
        assert!((odds.probability(0.3) - 0.3).abs() < 1e-6);
        for _ in 0..1000 {
            odds.add(9, 10);
        }
        assert!((odds.probability(0.3) - 0.9).abs() < 0.02);
        assert!(odds.is_plausible());
    }

    #[test]
    fn a_changed_workload_is_learned_anew() {
        let mut odds = Odds::default();
        for _ in 0..10_000 {
            odds.add(16, 16);
        }
        for _ in 0..2000 {
            odds.add(0, 16);
        }
        assert!(odds.probability(0.5) < 0.1, "{odds:?}");
    }

    #[test]
    fn unlabelled_class_is_ignored() {
        let mut calibration = Calibration::new();
        calibration.label(Class::NONE, 5, 10);
        assert!(calibration.classes.iter().all(|odds| odds.total == 0.0));
    }
}
