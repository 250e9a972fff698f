//! Counts of "of the pages predicted in this class, how many were used" turn a score into a probability.
//!
//! Counts are aged by halving at [`CAP_PAGES`], so that a change in the workload shows within some
//! thousand pages.

use crate::wire::{Reader, WireError, put_f32};

/// Counts are halved beyond this many pages.
const CAP_PAGES: f32 = 2048.0;

/// Used and predicted pages of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Odds {
    pub(crate) used: f32,
    pub(crate) total: f32,
}

impl Odds {
    /// Eight bytes: used and predicted, as floats.
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        put_f32(out, self.used);
        put_f32(out, self.total);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let odds = Self { used: reader.f32()?, total: reader.f32()? };
        if odds.is_plausible() { Ok(odds) } else { Err(WireError::Invalid("calibration count")) }
    }

    /// What counting can produce; anything else did not come from here.
    fn is_plausible(self) -> bool {
        self.used.is_finite()
            && self.total.is_finite()
            && self.used >= 0.0
            && self.used <= self.total
            && self.total <= CAP_PAGES
    }
}
