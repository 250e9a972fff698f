//! Lowest probability at which a storage's blocks are read ahead.

use std::collections::HashMap;

/// Thresholds set at run time; they take precedence over the configuration's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Thresholds {
    /// Of storages without one of their own.
    pub default: Option<f64>,
    /// By identity.
    pub storages: HashMap<String, f64>,
}

impl Thresholds {
    /// The threshold that holds for a storage.
    #[must_use]
    pub fn of(&self, storage: &str, configured: f64) -> f64 {
        self.storages.get(storage).copied().or(self.default).unwrap_or(configured)
    }
}

impl FromIterator<(Option<String>, f64)> for Thresholds {
    /// From storage (`None`: the default) and probability.
    fn from_iter<I: IntoIterator<Item = (Option<String>, f64)>>(rows: I) -> Self {
        let mut thresholds = Self::default();
        for (storage, probability) in rows {
            match storage {
                None => thresholds.default = Some(probability),
                Some(storage) => {
                    thresholds.storages.insert(storage, probability);
                }
            }
        }
        thresholds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storages_own_comes_before_the_default_and_that_before_the_configuration() {
        let none = Thresholds::default();
        let both: Thresholds = [(None, 0.6), (Some("a".to_owned()), 0.1)].into_iter().collect();
        assert_eq!((none.of("a", 0.5), both.of("b", 0.5), both.of("a", 0.5)), (0.5, 0.6, 0.1));
    }
}
