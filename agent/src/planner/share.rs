//! Who gets what when there is not enough.
//!
//! First everybody's base (what cannot or must not be taken). What remains goes to what is needed now, highest priority
//! first: the next gets something once all before it have what they need. Then, in the same order, to what each has already and
//! is not idle for long enough to lose, and at last, less a spare, to what is foreseen: a need comes before anybody's forecast,
//! and a forecast takes nothing from anybody. Within a priority: weighted max-min. So no machine starves below its floor, none goes
//! short for a lower priority, and among equals who asks for more never gets it at the expense of who asks for less.

/// One machine's claim; amounts in one unit, `base <= need <= keep <= goal` after [`Claim::ordered`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Claim {
    pub(super) base: f64,
    pub(super) need: f64,
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
        Self { need, keep: self.keep.clamp(need, goal), goal, weight, ..self }
    }
}

/// Writes to `given` what each claim gets of `capacity`, in their order; `spare` of it is not for what is foreseen. The sum exceeds
/// `capacity` only where the bases do; then everybody gets their base.
pub(super) fn share(capacity: f64, spare: f64, claims: &[Claim], given: &mut Vec<f64>) {
    given.clear();
    given.extend(claims.iter().map(|claim| claim.base));
    let mut rest = capacity - given.iter().sum::<f64>();
    let mut priorities: Vec<u8> = claims.iter().map(|claim| claim.priority).collect();
    priorities.sort_unstable_by(|a, b| b.cmp(a));
    priorities.dedup();
    let weights: f64 = claims.iter().map(|claim| claim.ordered().weight).sum();
    let fair = |claim: &Claim| claim.need.min(capacity * claim.weight / weights);
    let tiers: [(&dyn Fn(&Claim) -> f64, f64); 4] =
        [(&fair, 0.0), (&|claim| claim.need, spare), (&|claim| claim.keep, 0.0), (&|claim| claim.goal, 0.0)];
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
        Claim { base, need, keep: need, goal, priority, weight }
    }

    fn given(capacity: f64, claims: &[Claim]) -> Vec<f64> {
        let mut given = Vec::new();
        share(capacity, 0.0, claims, &mut given);
        given.iter().map(|amount| (amount * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn enough_gives_everybody_all() {
        assert_eq!(given(10.0, &[claim(1.0, 2.0, 4.0, 0, 1.0), claim(0.0, 1.0, 5.0, 3, 1.0)]), [4.0, 5.0]);
    }

    #[test]
    fn floors_come_before_priorities_and_priorities_before_weights() {
        // 10: bases 1 + 2, then the higher priority takes what is left of its 9.
        assert_eq!(given(10.0, &[claim(1.0, 6.0, 9.0, 0, 100.0), claim(2.0, 9.0, 9.0, 1, 1.0)]), [1.0, 9.0]);
        assert_eq!(given(10.0, &[claim(3.0, 6.0, 9.0, 0, 100.0), claim(2.0, 9.0, 9.0, 1, 1.0)]), [3.0, 7.0]);
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
