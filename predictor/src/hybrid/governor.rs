//! The governor: what prediction may waste.
//!
//! A budget in pages. Reads that missed earn a little of it, pages that were prefetched and read earn more, every page
//! handed out costs one and gets it back when it is read. While the budget is low the floor rises, at its end nothing is
//! handed out: a guest that cannot be foreseen, or that turns against what was learned of it, costs at most [`FREE_SHARE`]
//! of its own reads in wasted ones (plus what was saved up, which is bounded).

use super::Hybrid;
use crate::explain::Spending;

/// Wasted pages that a missed page earns: the loss that is borne to find out whether prediction works.
const FREE_SHARE: f32 = 0.01;
/// Most that is saved up, as a share of the cache's pages: what is on its way or waits there unread counts against the
/// budget, past merit must not pay for long.
const MOST_SHARE: f32 = 0.5;
/// And at least so many pages (16 MiB).
const MOST_MIN: f32 = 4096.0;
/// What there is at first (4 MiB); below it the floor rises, towards [`HIGHEST_FLOOR`] at the end.
const SCARCE: f32 = 1024.0;
const HIGHEST_FLOOR: f32 = 0.9;
/// An operator's floor below this counts as this.
const LOWEST_FLOOR: f32 = 0.02;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Governor {
    budget: f32,
    most: f32,
}

impl Governor {
    pub(crate) fn new(cache_pages: u64) -> Self {
        let most = (cache_pages as f32 * MOST_SHARE).max(MOST_MIN);
        Self { budget: SCARCE, most }
    }

    /// A guest read pages that nobody had foreseen.
    pub(crate) fn missed(&mut self, pages: u32) {
        self.earn(pages as f32 * FREE_SHARE);
    }

    /// A guest read pages that were handed out: they pay for as many in vain as the operator's `floor` puts up with.
    pub(crate) fn useful(&mut self, pages: u32, floor: f32) {
        self.earn(pages as f32 / floor.max(LOWEST_FLOOR));
    }

    fn earn(&mut self, pages: f32) {
        self.budget = (self.budget + pages).min(self.most);
    }

    /// Pages are handed out.
    pub(crate) fn spent(&mut self, pages: u32) {
        self.budget -= pages as f32;
    }

    /// The floor that holds now, where the operator's is `floor`; `None`: nothing is to be handed out.
    pub(crate) fn floor(&self, floor: f32) -> Option<f32> {
        let level = self.budget / SCARCE;
        if level <= 0.0 {
            return None;
        }
        Some(floor + (HIGHEST_FLOOR - floor).max(0.0) * (1.0 - level).max(0.0))
    }
}

impl Hybrid {
    /// What may be spent now, where the operator's floor is `floor`.
    pub(crate) fn spending(&self, floor: f32) -> Spending {
        let Governor { budget, most } = self.governor;
        Spending { floor: self.governor.floor(floor), budget_pages: budget, most_pages: most }
    }

    /// As if so many pages had been handed out.
    #[cfg(test)]
    pub(crate) fn spend(&mut self, pages: u32) {
        self.governor.spent(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_can_foresee_costs_a_small_share() {
        let mut governor = Governor::new(0);
        let (mut missed, mut wasted) = (0u32, 0u32);
        for _ in 0..100_000 {
            governor.missed(1);
            missed += 1;
            if governor.floor(0.1).is_some_and(|floor| floor <= 0.95) {
                governor.spent(4);
                wasted += 4;
            }
        }
        let most = f64::from(missed) * f64::from(FREE_SHARE) + f64::from(SCARCE) + 8.0;
        assert!(f64::from(wasted) <= most, "{wasted} of {missed}");
    }

    #[test]
    fn what_is_read_often_enough_is_not_held_up() {
        let mut governor = Governor::new(0);
        for _ in 0..10_000 {
            assert!(governor.floor(0.125).is_some_and(|floor| floor < 0.5));
            governor.spent(7);
            governor.useful(1, 0.125);
        }
        for _ in 0..10_000 {
            governor.spent(if governor.floor(0.125).is_some() { 20 } else { 0 });
            governor.useful(1, 0.125);
        }
        assert!(governor.floor(0.125).is_none_or(|floor| floor > 0.3), "one in twenty is too little");
    }
}
