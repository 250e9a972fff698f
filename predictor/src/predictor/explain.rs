//! What the predictor knows of one page, put into words for an operator. Not on the hot path, and changes nothing.

use super::AccessPredictor;
use crate::access::Expert;
use crate::explain::{Decision, Explanation, Vote};
use crate::hybrid::SPEAKERS;
use crate::hybrid::mixer::logistic;

impl AccessPredictor {
    /// Who expects `page` to be read, how likely, and what follows from it.
    ///
    /// The votes of the hybrid are those of the last prediction that is not settled: each expert's part of the mixed score
    /// as a probability of its own, and the share it has in the whole.
    #[must_use]
    pub fn explain(&self, page: u64) -> Explanation {
        let mut votes = Vec::new();
        for (&id, vm) in &self.vms {
            let replay = vm.phase.as_ref().and_then(|active| active.replay.as_ref());
            if let Some((probability, due_us)) = replay.and_then(|replay| replay.expects(page)) {
                let (raw, calibrated) = (probability, probability);
                votes.push(Vote {
                    expert: Expert::Phase,
                    vm: Some(id),
                    raw,
                    calibrated,
                    weight: None,
                    due_us: Some(due_us),
                });
            }
        }
        let knowledge = self.hybrid.explain(page);
        if let Some((probability, parts)) = knowledge.and_then(|knowledge| knowledge.said) {
            let whole: f32 = parts.iter().map(|part| part.abs()).sum();
            votes.extend(SPEAKERS.iter().zip(parts).filter(|(_, part)| *part != 0.0).map(|(expert, part)| Vote {
                expert: *expert,
                vm: None,
                raw: logistic(part),
                calibrated: probability,
                weight: Some(part.abs() / whole),
                due_us: None,
            }));
        }
        votes.retain(|vote| self.config.experts.contains(vote.expert));
        let weight = |vote: &Vote| vote.weight.unwrap_or(1.0);
        votes.sort_by(|a, b| b.calibrated.total_cmp(&a.calibrated).then(weight(b).total_cmp(&weight(a))));
        let probability = votes.first().map(|vote| vote.calibrated);
        let floor = self.config.min_probability;
        let spending = self.hybrid.spending(floor);
        // A learned set is not held back: it hands the page out whatever the others may spend.
        let goes_out = |vote: &Vote| match vote.expert {
            Expert::Phase => vote.calibrated >= floor,
            _ => spending.floor.is_some_and(|floor| vote.calibrated >= floor),
        };
        let decision = match (knowledge, probability) {
            (Some(knowledge), _) if knowledge.cached => Decision::Touched,
            (Some(knowledge), probability) if knowledge.issued => {
                Decision::Proposed { probability: probability.unwrap_or(floor) }
            }
            (_, None) => Decision::Unforeseen,
            (_, Some(probability)) if probability < floor => Decision::Unlikely,
            _ if !votes.iter().any(goes_out) => Decision::Withheld,
            _ => Decision::Propose,
        };
        let active_us = knowledge.map(|knowledge| knowledge.seen_us);
        Explanation { page, votes, probability, floor, spending, decision, active_us }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{Access, Op, Phase};
    use crate::predictor::AccessConfig;

    fn read(predictor: &mut AccessPredictor, first: u64, pages: u32, at_us: u64) {
        predictor.observe(&Access { at_us, vm: 7, op: Op::Read, first, pages });
    }

    #[test]
    fn a_stream_votes_for_what_lies_ahead_and_for_nothing_behind() {
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        for i in 0..8 {
            read(&mut predictor, i * 8, 8, i * 1000);
        }
        predictor.predict(8000, &mut Vec::new());
        let ahead = predictor.explain(85);
        assert!(ahead.votes.iter().any(|vote| vote.expert == Expert::Sequential), "{ahead:?}");
        assert!((ahead.votes.iter().filter_map(|vote| vote.weight).sum::<f32>() - 1.0).abs() < 1e-3, "{ahead:?}");
        assert!(matches!(ahead.decision, Decision::Proposed { .. }), "{ahead:?}");
        assert_eq!(predictor.explain(10).decision, Decision::Touched);
        let nowhere = predictor.explain(1 << 20);
        assert_eq!((nowhere.decision, nowhere.votes.len(), nowhere.active_us), (Decision::Unforeseen, 0, None));
    }

    #[test]
    fn a_learned_phase_votes_with_its_time() {
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        predictor.phase_start(7, Phase::Boot, 0);
        for i in 0..40 {
            read(&mut predictor, i * 1000, 16, i * 10_000);
        }
        predictor.phase_end(7, 400_000);
        predictor.forget_resident();
        predictor.phase_start(7, Phase::Boot, 1_000_000_000);
        let explained = predictor.explain(20_000);
        let vote = explained.votes.iter().find(|vote| vote.expert == Expert::Phase).unwrap();
        assert_eq!(vote.due_us, Some(1_000_200_000));
        assert_eq!(explained.decision, Decision::Propose);
    }

    #[test]
    fn what_the_governor_does_not_let_through_is_withheld() {
        let mut predictor = AccessPredictor::new(AccessConfig { cache_pages: 0, ..AccessConfig::default() });
        let fresh = predictor.explain(0);
        assert_eq!(fresh.spending.floor, Some(fresh.floor));
        assert!(fresh.spending.budget_pages > 0.0 && fresh.spending.budget_pages <= fresh.spending.most_pages);
        let stream = |predictor: &mut AccessPredictor, first: u64| {
            (0..8).for_each(|i| read(predictor, first + i * 8, 8, first + i * 1000));
            predictor.predict(first + 8000, &mut Vec::new());
            predictor.explain(first + 64)
        };
        assert!(matches!(stream(&mut predictor, 0).decision, Decision::Proposed { .. }));
        // All in vain.
        predictor.hybrid.spend(fresh.spending.most_pages as u32);
        let withheld = stream(&mut predictor, 1 << 20);
        assert_eq!((withheld.decision, withheld.spending.floor), (Decision::Withheld, None), "{withheld:?}");
        assert!(withheld.probability.is_some_and(|probability| probability >= withheld.floor), "{withheld:?}");
        assert!(withheld.spending.budget_pages < 0.0, "{withheld:?}");
    }

    #[test]
    fn explaining_changes_nothing() {
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        for i in 0..100 {
            read(&mut predictor, i * 37 % 50 * 16, 16, i * 1000);
        }
        let before = predictor.to_bytes();
        let first = predictor.explain(5 * 16);
        assert_eq!(predictor.explain(5 * 16), first);
        assert_eq!(predictor.to_bytes(), before);
        let votes = first.votes.iter().chain(&predictor.explain(u64::MAX).votes).copied().collect::<Vec<_>>();
        assert!(votes.iter().all(|vote| (0.0..=1.0).contains(&vote.raw) && (0.0..=1.0).contains(&vote.calibrated)));
    }
}
