//! What was proposed of a storage lately and what became of it, for an operator who asks. Bounded: the last
//! [`PROPOSALS`] proposals and as many outcomes, together at most 448 KiB a storage; neither the predictor nor the cache
//! reads it.

use prestage_cache::policy::{Outcome, OutcomeKind, Whereabouts};
use prestage_cache::types::{BlockIndex, PAGES_PER_BLOCK, PageMask};
use prestage_integration::api::types::{Attempt, Fate};
use prestage_predictor::{Candidate, Expert};
use std::collections::VecDeque;

const PROPOSALS: usize = 8192;
/// Attempts told of one page.
const TOLD: usize = 16;

/// What was done with a proposal when it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Handed,
    BelowThreshold,
    SwitchedOff,
    Refused,
}

#[derive(Clone, Copy, Debug)]
struct Proposal {
    first: u64,
    at_us: u64,
    pages: u32,
    probability: f32,
    threshold: f32,
    expert: Expert,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug)]
struct Settled {
    block: BlockIndex,
    at_us: u64,
    pages: PageMask,
    kind: OutcomeKind,
}

#[derive(Debug, Default)]
pub(super) struct Journal {
    proposals: VecDeque<Proposal>,
    settled: VecDeque<Settled>,
}

fn put<T>(ring: &mut VecDeque<T>, item: T) {
    if ring.len() == PROPOSALS {
        ring.pop_front();
    }
    ring.push_back(item);
}

impl Journal {
    pub(super) fn proposed(&mut self, candidate: &Candidate, threshold: f32, verdict: Verdict, at_us: u64) {
        let Candidate { first, pages, probability, expert, .. } = *candidate;
        put(&mut self.proposals, Proposal { first, at_us, pages, probability, threshold, expert, verdict });
    }

    /// The last proposals handed over did not fit the queue, which takes them in order: those at the end are marked.
    pub(super) fn refused(&mut self, mut pages: u64) {
        for proposal in self.proposals.iter_mut().rev().filter(|proposal| proposal.verdict == Verdict::Handed) {
            if pages == 0 {
                return;
            }
            proposal.verdict = Verdict::Refused;
            pages = pages.saturating_sub(u64::from(proposal.pages));
        }
    }

    pub(super) fn settled(&mut self, outcome: &Outcome, at_us: u64) {
        let Outcome { block, pages, kind, .. } = *outcome;
        put(&mut self.settled, Settled { block, at_us, pages, kind });
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.proposals.capacity() * size_of::<Proposal>() + self.settled.capacity() * size_of::<Settled>()
    }

    /// How far back the proposals go.
    pub(super) fn span_us(&self, at_us: u64) -> u64 {
        self.proposals.front().map_or(0, |oldest| at_us.saturating_sub(oldest.at_us))
    }

    /// Proposals of a page, newest first, and what became of each; `place` is where the page is now.
    pub(super) fn attempts(&self, page: u64, place: Whereabouts, at_us: u64) -> Vec<Attempt> {
        let mut attempts = Vec::new();
        let mut until_us = u64::MAX;
        let of_page = |proposal: &&Proposal| {
            (proposal.first..proposal.first.saturating_add(u64::from(proposal.pages))).contains(&page)
        };
        for proposal in self.proposals.iter().rev().filter(of_page).take(TOLD) {
            let fate = match proposal.verdict {
                Verdict::BelowThreshold => Fate::BelowThreshold,
                Verdict::SwitchedOff => Fate::SwitchedOff,
                Verdict::Refused => Fate::Refused,
                Verdict::Handed => {
                    let fate = match self.outcome(page, proposal.at_us, until_us) {
                        // What has left was read first, or it would have been evicted unused.
                        Some(OutcomeKind::Used | OutcomeKind::Left) => Fate::Used,
                        Some(OutcomeKind::Late) => Fate::Late,
                        Some(OutcomeKind::Evicted) => Fate::Evicted,
                        // Only the newest that was handed over can still be under way.
                        None if until_us < u64::MAX => Fate::Overtaken,
                        None if place.queued => Fate::Queued,
                        None if place.loading => Fate::Loading,
                        None if place.unread => Fate::Unread,
                        None => Fate::Overtaken,
                    };
                    until_us = proposal.at_us;
                    fate
                }
            };
            attempts.push(Attempt {
                ago_us: at_us.saturating_sub(proposal.at_us),
                expert: proposal.expert.name().to_owned(),
                probability: proposal.probability,
                threshold: proposal.threshold,
                fate,
            });
        }
        attempts
    }

    /// The first outcome of a page from `from_us` on and before `until_us`.
    fn outcome(&self, page: u64, from_us: u64, until_us: u64) -> Option<OutcomeKind> {
        let (block, within) = (BlockIndex(page / PAGES_PER_BLOCK), page % PAGES_PER_BLOCK);
        let from = self.settled.partition_point(|settled| settled.at_us < from_us);
        let after = self.settled.range(from..).take_while(|settled| settled.at_us < until_us);
        after.filter(|settled| settled.block == block && settled.pages.has(within)).map(|settled| settled.kind).next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_cache::types::StorageId;

    const NOWHERE: Whereabouts = Whereabouts { ram: false, unread: false, loading: false, queued: false, ssd: false };

    fn propose(journal: &mut Journal, first: u64, pages: u32, verdict: Verdict, at_us: u64) {
        let candidate = Candidate { first, pages, probability: 0.8, due_us: None, expert: Expert::Markov };
        journal.proposed(&candidate, 0.5, verdict, at_us);
    }

    fn settle(journal: &mut Journal, page: u64, kind: OutcomeKind, at_us: u64) {
        let (block, pages) = (BlockIndex(page / 16), PageMask::run(page % 16, 1));
        journal.settled(&Outcome { storage: StorageId(0), block, pages, tag: 4, kind }, at_us);
    }

    fn fates(journal: &Journal, page: u64, place: Whereabouts) -> Vec<Fate> {
        journal.attempts(page, place, 1000).iter().map(|attempt| attempt.fate).collect()
    }

    #[test]
    fn each_attempt_has_its_own_outcome() {
        let mut journal = Journal::default();
        propose(&mut journal, 30, 8, Verdict::Handed, 10);
        settle(&mut journal, 33, OutcomeKind::Evicted, 20);
        propose(&mut journal, 33, 1, Verdict::BelowThreshold, 30);
        propose(&mut journal, 33, 1, Verdict::Handed, 40);
        propose(&mut journal, 32, 4, Verdict::Handed, 50);
        settle(&mut journal, 34, OutcomeKind::Used, 60);
        settle(&mut journal, 33, OutcomeKind::Late, 70);
        propose(&mut journal, 33, 1, Verdict::Handed, 80);
        let unread = Whereabouts { ram: true, unread: true, ..NOWHERE };
        use Fate::*;
        assert_eq!(fates(&journal, 33, unread), [Unread, Late, Overtaken, BelowThreshold, Evicted]);
        assert_eq!(fates(&journal, 33, Whereabouts { queued: true, ..NOWHERE })[0], Queued);
        assert_eq!(fates(&journal, 33, NOWHERE)[0], Overtaken);
        assert_eq!(fates(&journal, 34, NOWHERE), [Used, Overtaken]);
        assert_eq!(fates(&journal, 38, unread), []);
        let first = &journal.attempts(33, NOWHERE, 1000)[0];
        assert_eq!((first.ago_us, first.expert.as_str(), first.threshold), (920, "markov", 0.5));
    }

    #[test]
    fn what_the_queue_refuses_is_the_end_of_what_it_was_handed() {
        let mut journal = Journal::default();
        for i in 0..4 {
            propose(&mut journal, i * 10, 10, Verdict::Handed, i);
        }
        journal.refused(15);
        let all: Vec<_> = (0..4).map(|i| fates(&journal, i * 10, NOWHERE)[0]).collect();
        assert_eq!(all, [Fate::Overtaken, Fate::Overtaken, Fate::Refused, Fate::Refused]);
    }

    #[test]
    fn the_record_is_bounded_and_keeps_the_newest() {
        let mut journal = Journal::default();
        for i in 0..3 * PROPOSALS as u64 {
            propose(&mut journal, i % 50, 1, Verdict::Handed, i);
            settle(&mut journal, i % 50, OutcomeKind::Used, i);
        }
        assert_eq!(journal.span_us(3 * PROPOSALS as u64), PROPOSALS as u64);
        assert_eq!(journal.attempts(7, NOWHERE, 3 * PROPOSALS as u64).len(), TOLD);
        let bytes = PROPOSALS * (size_of::<Proposal>() + size_of::<Settled>());
        assert!(bytes <= 448 << 10, "{bytes}");
    }
}
