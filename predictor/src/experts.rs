//! Sets of experts.

use crate::access::Expert;

/// Some of the experts, a bit each by [`Expert::index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertSet(u32);

impl ExpertSet {
    pub const ALL: Self = Self(u32::MAX);

    /// The experts named.
    #[must_use]
    pub const fn of(experts: &[Expert]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < experts.len() {
            bits |= 1 << experts[at].index();
            at += 1;
        }
        Self(bits)
    }

    #[must_use]
    pub const fn contains(self, expert: Expert) -> bool {
        self.0 >> expert.index() & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, AccessConfig, AccessPredictor, Op, Phase};

    #[test]
    fn only_the_experts_of_the_set_propose() {
        let sets = [
            ExpertSet::ALL,
            ExpertSet::of(&[Expert::Sequential, Expert::Stride]),
            ExpertSet::of(&[Expert::Markov, Expert::Log]),
            ExpertSet::of(&[Expert::Phase]),
        ];
        for experts in sets {
            let config = AccessConfig { experts, min_probability: 0.0, ..AccessConfig::default() };
            let mut predictor = AccessPredictor::new(config);
            let mut raised = Vec::new();
            for round in 0..3u64 {
                predictor.phase_start(1, Phase::Boot, round * 60_000_000);
                for i in 0..300u64 {
                    let first = if i % 2 == 0 { i * 4 } else { 100_000 + i * i * 37 % 5003 * 16 };
                    let at_us = round * 60_000_000 + i * 10_000;
                    predictor.observe(&Access { at_us, vm: 1, op: Op::Read, first, pages: 4 });
                    predictor.predict(at_us, &mut raised);
                }
                predictor.vm_forget(1);
                predictor.forget_resident();
            }
            assert!(raised.iter().all(|candidate| experts.contains(candidate.expert)));
            assert!(!raised.is_empty(), "{experts:?}");
        }
    }
}
