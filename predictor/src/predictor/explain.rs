//! What the predictor knows of one page, put into words for an operator. Not on the hot path: it asks every expert of
//! every machine anew and changes nothing.

use super::{AccessPredictor, MAX_READ_PAGES};
use crate::access::{BLOCK_PAGES, Expert};
use crate::explain::{Decision, Explanation, Vote};
use crate::streams::Proposal;

impl AccessPredictor {
    /// Who expects `page` to be read, how likely, and what follows from it at `at_us`.
    ///
    /// The votes are those of this moment: an expert that proposed the page a while ago and whose stream has moved on has
    /// none any more. The spatial expert votes only while it observes and never appears here.
    #[must_use]
    pub fn explain(&self, page: u64, at_us: u64) -> Explanation {
        let mut votes = Vec::new();
        for (&id, vm) in &self.vms {
            let mut proposals = Vec::new();
            let max_window = (self.config.max_window_bytes / crate::PAGE_BYTES).clamp(1, u64::from(MAX_READ_PAGES));
            vm.streams.expected(max_window, &mut proposals);
            self.markov.predict(&vm.markov, &mut proposals);
            votes.extend(proposals.iter().filter(|proposal| holds(proposal, page)).map(|proposal| Vote {
                expert: proposal.expert,
                vm: id,
                raw: proposal.prior,
                calibrated: self.calibration.probability(proposal.class, proposal.prior),
                weight: None,
                due_us: proposal.due_us,
            }));
            let phase =
                vm.phase.iter().filter_map(|active| active.replay.as_ref()).map(|replay| (Expert::Phase, replay));
            let bursts = vm.burst.running().map(|replay| (Expert::Burst, replay));
            for (expert, replay) in phase.chain(bursts) {
                if let Some((raw, calibrated, due_us)) = replay.expects(page) {
                    votes.push(Vote { expert, vm: id, raw, calibrated, weight: None, due_us: Some(due_us) });
                }
            }
        }
        votes.retain(|vote| self.config.experts.contains(vote.expert));
        votes.sort_by(|a, b| b.calibrated.total_cmp(&a.calibrated));
        let noted = self.ledger.noted(page / BLOCK_PAGES, at_us);
        let bit = 1u16 << (page % BLOCK_PAGES);
        let probability = votes.first().map(|vote| vote.calibrated);
        let floor = self.config.min_probability;
        let decision = match (noted, probability) {
            (Some(noted), _) if noted.touched & bit != 0 => Decision::Touched,
            (Some(noted), _) if noted.proposed & bit != 0 && noted.probability >= floor => {
                Decision::Proposed { probability: noted.probability }
            }
            (_, None) => Decision::Unforeseen,
            (_, Some(probability)) if probability < floor => Decision::Unlikely,
            _ => Decision::Propose,
        };
        let active_us = noted.map(|noted| u64::from(noted.at_s) * 1_000_000);
        Explanation { page, votes, probability, floor, decision, active_us }
    }
}

fn holds(proposal: &Proposal, page: u64) -> bool {
    (proposal.first..proposal.first.saturating_add(u64::from(proposal.pages))).contains(&page)
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
        let ahead = predictor.explain(66, 8000);
        assert_eq!((ahead.votes[0].expert, ahead.votes[0].vm), (Expert::Sequential, 7));
        assert!(ahead.probability.unwrap() > 0.5 && ahead.votes[0].due_us.unwrap() > 7000, "{ahead:?}");
        assert!(matches!(ahead.decision, Decision::Proposed { probability } if probability > 0.5), "{ahead:?}");
        assert_eq!(predictor.explain(10, 8000).decision, Decision::Touched);
        let nowhere = predictor.explain(1 << 20, 8000);
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
        let explained = predictor.explain(20_000, 1_000_000_000);
        let vote = explained.votes.iter().find(|vote| vote.expert == Expert::Phase).unwrap();
        assert_eq!(vote.due_us, Some(1_000_200_000));
        assert_eq!(explained.decision, Decision::Propose);
    }

    #[test]
    fn explaining_changes_nothing() {
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        for i in 0..100 {
            read(&mut predictor, i * 37 % 50 * 16, 16, i * 1000);
        }
        let before = predictor.to_bytes();
        let first = predictor.explain(5 * 16, 100_000);
        assert_eq!(predictor.explain(5 * 16, 100_000), first);
        assert_eq!(predictor.to_bytes(), before);
        let votes = first.votes.iter().chain(&predictor.explain(u64::MAX, u64::MAX).votes).copied().collect::<Vec<_>>();
        assert!(votes.iter().all(|vote| (0.0..=1.0).contains(&vote.raw) && (0.0..=1.0).contains(&vote.calibrated)));
    }
}
