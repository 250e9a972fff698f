//! The learned set of the phase that runs, as a slate: which of its blocks are to come next.

use anyhow::Result;
use prestage_predictor::{Access, BLOCK_PAGES, Op, PAGE_BYTES};
use prestage_replay::{Mark, PolicyKind, Predictive, Prefetcher, Request, Wish};

use super::foretold::SET;
use super::ours::requests;
use super::split::Split;

/// The production predictor with its sets alone, learned from what came before.
#[derive(Debug)]
pub(super) struct LearnedSet {
    /// `None`: nothing was learned yet.
    sets: Option<(Predictive, Vec<Mark>)>,
    wishes: Vec<Wish>,
    /// Blocks to come, in order; and the place where the last one was read.
    blocks: Vec<u64>,
    at: usize,
}

impl LearnedSet {
    /// `learned`: the measured part of the split, else what comes before it.
    pub(super) fn of(split: &Split, learned: bool) -> Result<Self> {
        let sets = if learned && !split.measured.marks.is_empty() {
            let capacity = split.measured.requests.len().max(1) as u64 * BLOCK_PAGES;
            let mut sets = Predictive::new(PolicyKind::Sets, 0.0, capacity);
            sets.train(requests(split.before.requests.iter().copied()), &split.before.marks, |_| true)?;
            Some((sets, split.measured.marks.clone()))
        } else {
            None
        };
        Ok(Self { sets, wishes: Vec::new(), blocks: Vec::new(), at: 0 })
    }

    /// Time goes on to this access: phases begin and end.
    pub(super) fn advance(&mut self, access: &Access) {
        let Some((sets, marks)) = &mut self.sets else { return };
        let due = marks.iter().take_while(|mark| mark.at_us <= access.at_us).count();
        for mark in marks.drain(..due) {
            self.blocks.clear();
            self.at = 0;
            sets.mark(&mark, mark.at_us, &mut self.wishes);
        }
        self.take();
    }

    /// Blocks that may be read next.
    pub(super) fn offered(&self) -> Vec<u64> {
        let (passed, ahead) = self.blocks.split_at(self.at.min(self.blocks.len()));
        ahead.iter().chain(passed).take(SET).copied().collect()
    }

    /// The access itself.
    pub(super) fn read(&mut self, access: &Access) {
        let Some((sets, _)) = &mut self.sets else { return };
        if let (Op::Read, Some(at)) =
            (access.op, self.blocks.iter().position(|block| *block == access.first / BLOCK_PAGES))
        {
            self.blocks.remove(at);
            self.at = at;
        }
        let len = u32::try_from(u64::from(access.pages) * PAGE_BYTES).unwrap_or(u32::MAX);
        let request = Request { at_us: access.at_us, op: access.op, offset: access.first * PAGE_BYTES, len };
        sets.observe(&request, false, access.at_us, &|_| false, &mut self.wishes);
        self.take();
    }

    fn take(&mut self) {
        for wish in self.wishes.drain(..) {
            for block in wish.first / BLOCK_PAGES..=(wish.first + wish.pages - 1) / BLOCK_PAGES {
                if !self.blocks.contains(&block) {
                    self.blocks.push(block);
                }
            }
        }
    }
}
