//! Who gets what when there is not enough.
//!
//! Tier by tier, and within each the highest priority first: the next gets something once all before it have what they
//! ask for in the tier. Within a priority: weighted max-min.
//!
//! 1. Everybody's base: their floor, and what cannot or must not be taken.
//! 2. What is needed now, up to the fair share: the capacity by weights, whatever the priorities. Nobody starves.
//! 3. What is needed now beyond it, less a spare for the next who needs its fair share.
//! 4. Of what each has, what it is likely to need within the next minute.
//! 5. The rest of what each has and is not idle for long enough to lose, less a pool for what is needed at once.
//! 6. What is foreseen: a need comes before anybody's forecast, and a forecast takes nothing from anybody.

/// One machine's claim; amounts in one unit, `base <= need <= likely <= keep <= goal` after [`Claim::ordered`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Claim {
    pub(super) base: f64,
    pub(super) need: f64,
    /// Of what it has, what it is likely to need within the next minute.
    pub(super) likely: f64,
    /// What it has, unless it is to have less.
    pub(super) keep: f64,
    pub(super) goal: f64,
    pub(super) priority: u8,
    pub(super) weight: f64,
}

impl Claim {
    fn ordered(self) -> Self {
        let goal = self.goal.max(self.base);
        let weight = if self.weight.is_finite() { self.weight.clamp(1e-6, 1e6) } else { 1.0 };
        let need = self.need.clamp(self.base, goal);
        let keep = self.keep.clamp(need, goal);
        Self { need, likely: self.likely.clamp(need, keep), keep, goal, weight, ..self }
    }
}

/// Writes to `given` what each claim gets of `capacity`, in their order; `spare` of it is only for what is
/// needed within fair shares, `pool` (no less) only for what is needed or likely to be. The sum exceeds
/// `capacity` only where the bases do; then everybody gets their base.
pub(super) fn share(capacity: f64, spare: f64, pool: f64, claims: &[Claim], given: &mut Vec<f64>) {
    given.clear();
    given.extend(claims.iter().map(|claim| claim.base));
    let mut rest = capacity - given.iter().sum::<f64>();
    let mut priorities: Vec<u8> = claims.iter().map(|claim| claim.priority).collect();
    priorities.sort_unstable_by(|a, b| b.cmp(a));
    priorities.dedup();
    let weights: f64 = claims.iter().map(|claim| claim.ordered().weight).sum();
    let fair = |claim: &Claim| claim.need.min(capacity * claim.weight / weights);
    // What is asked for in each tier, and what is from then on out of reach.
    type Tier<'a> = (&'a dyn Fn(&Claim) -> f64, f64);
    let tiers: [Tier<'_>; 5] = [
        (&fair, 0.0),
        (&|claim| claim.need, spare),
        (&|claim| claim.likely, 0.0),
        (&|claim| claim.keep, (pool - spare).max(0.0)),
        (&|claim| claim.goal, 0.0),
    ];
    for (target, spare) in tiers {
        rest -= spare;
        for &priority in &priorities {
            if rest <= 0.0 {
                return;
            }
            let class =
                || claims.iter().map(|claim| claim.ordered()).enumerate().filter(|(_, c)| c.priority == priority);
            let wanted: f64 = class().map(|(at, claim)| (target(&claim) - given[at]).max(0.0)).sum();
            if wanted <= rest {
                for (at, claim) in class() {
                    given[at] = given[at].max(target(&claim));
                }
                rest -= wanted;
                continue;
            }
            // The level to which all are filled, by their weight; from below, so that never too much is given.
            let at_level = |level: f64, claim: &Claim, has: f64| (level * claim.weight).min(target(claim)).max(has);
            let cost = |level: f64| class().map(|(at, c)| at_level(level, &c, given[at]) - given[at]).sum::<f64>();
            let (mut low, mut high) = (0.0, class().map(|(_, c)| target(&c) / c.weight).fold(0.0, f64::max));
            for _ in 0..60 {
                let middle = 0.5 * (low + high);
                if cost(middle) <= rest { low = middle } else { high = middle }
            }
            let filled: Vec<(usize, f64)> = class().map(|(at, c)| (at, at_level(low, &c, given[at]))).collect();
            for (at, amount) in filled {
                given[at] = amount;
            }
            rest = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(base: f64, need: f64, goal: f64, priority: u8, weight: f64) -> Claim {
        Claim { base, need, likely: need, keep: need, goal, priority, weight }
    }

    fn given(capacity: f64, claims: &[Claim]) -> Vec<f64> {
        let mut given = Vec::new();
        share(capacity, 0.0, 0.0, claims, &mut given);
        given.iter().map(|amount| (amount * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn enough_gives_everybody_all() {
        assert_eq!(given(10.0, &[claim(1.0, 2.0, 4.0, 0, 1.0), claim(0.0, 1.0, 5.0, 3, 1.0)]), [4.0, 5.0]);
    }

    #[test]
    fn floors_come_first_then_fair_shares_then_priorities() {
        // 10 each is fair: the lower priority gets the 6 it needs, the higher one what is left of its 18.
        assert_eq!(given(20.0, &[claim(1.0, 6.0, 9.0, 0, 1.0), claim(2.0, 18.0, 18.0, 1, 1.0)]), [6.0, 14.0]);
        // Beyond the fair share, priority alone counts.
        assert_eq!(given(20.0, &[claim(1.0, 18.0, 18.0, 0, 1.0), claim(2.0, 12.0, 18.0, 1, 1.0)]), [10.0, 10.0]);
        assert_eq!(given(20.0, &[claim(15.0, 18.0, 18.0, 0, 1.0), claim(2.0, 12.0, 18.0, 1, 1.0)]), [15.0, 5.0]);
        assert_eq!(given(30.0, &[claim(0.0, 9.0, 30.0, 0, 1.0), claim(0.0, 9.0, 14.0, 1, 1.0)]), [16.0, 14.0]);
    }

    #[test]
    fn the_spare_is_for_who_is_below_the_fair_share() {
        let claims = [claim(8.0, 12.0, 12.0, 9, 1.0), claim(0.5, 0.5, 2.0, 0, 1.0)];
        let mut given = Vec::new();
        share(10.0, 1.0, 1.0, &claims, &mut given);
        assert!((given[0] - 8.5).abs() < 1e-6 && given[1] == 0.5, "{given:?}");
        share(10.0, 1.0, 1.0, &[claims[0], claim(0.5, 1.4, 2.0, 0, 1.0)], &mut given);
        assert_eq!(given, [8.0, 1.4]);
    }

    #[test]
    fn the_pool_is_for_needs_and_what_is_likely_but_neither_for_idle_nor_for_foreseen_amounts() {
        let idle = Claim { likely: 3.0, keep: 6.0, ..claim(1.0, 2.0, 9.0, 0, 1.0) };
        let mut given = Vec::new();
        share(16.0, 0.0, 4.0, &[idle, idle], &mut given);
        assert!(given.iter().all(|amount| (amount - 6.0).abs() < 1e-6), "{given:?}");
        share(14.0, 0.0, 4.0, &[idle, idle], &mut given);
        assert!(given.iter().all(|amount| (amount - 5.0).abs() < 1e-6), "{given:?}");
        share(7.0, 0.0, 4.0, &[idle, idle], &mut given);
        assert_eq!(given, [3.0, 3.0]);
    }

    #[test]
    fn among_equals_what_is_needed_comes_before_what_is_foreseen() {
        assert_eq!(given(10.0, &[claim(0.0, 4.0, 9.0, 0, 1.0), claim(0.0, 4.0, 4.0, 0, 1.0)]), [6.0, 4.0]);
        assert_eq!(given(8.0, &[claim(0.0, 1.0, 9.0, 0, 1.0), claim(0.0, 7.0, 7.0, 0, 1.0)]), [1.0, 7.0]);
    }

    #[test]
    fn who_asks_for_little_gets_it_and_weights_share_the_rest() {
        let claims = [claim(0.0, 1.0, 1.0, 0, 1.0), claim(0.0, 20.0, 20.0, 0, 1.0), claim(0.0, 20.0, 20.0, 0, 2.0)];
        assert_eq!(given(10.0, &claims), [1.0, 3.0, 6.0]);
    }

    #[test]
    fn bases_beyond_the_capacity_are_kept_and_nothing_is_added() {
        assert_eq!(given(3.0, &[claim(2.0, 5.0, 5.0, 9, 1.0), claim(2.0, 3.0, 3.0, 0, 1.0)]), [2.0, 2.0]);
    }
}
