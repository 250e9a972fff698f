//! A simple model of the SSD tier behind a replay's RAM tier, and of writes in front of both.
//!
//! What the guest reads is copied to the SSD at once (the daemon: a second after the block's last new page), whole blocks of
//! 64 KiB with the pages that were read; the clock algorithm chooses what leaves, as in the daemon. A read that RAM cannot
//! serve and whose pages the SSD all has is an SSD hit; what the SSD has is not prefetched. Writes and discards take their
//! pages out. The SSD's own queueing and bandwidth are not modelled.
//!
//! The daemon keeps written pages current in RAM and brings none in for a write, so the replay's RAM tier is not shown writes
//! at all; the policy and the SSD are.

use prestage_predictor::{BLOCK_PAGES, Op};
use prestage_replay::prefetcher::Outcome;
use prestage_replay::{Mark, Prefetcher, Request, Wish};
use std::collections::{HashMap, VecDeque};
use std::ops::RangeInclusive;

#[derive(Debug)]
struct Slot {
    pages: u16,
    /// Read since the hand last passed.
    referenced: bool,
}

/// Blocks on the SSD.
#[derive(Debug)]
struct Ssd {
    capacity: usize,
    slots: HashMap<u64, Slot>,
    hand: VecDeque<u64>,
}

/// Blocks of a run of pages, with the pages in each.
fn blocks(pages: RangeInclusive<u64>) -> impl Iterator<Item = (u64, u16)> {
    let (first, last) = pages.into_inner();
    (first / BLOCK_PAGES..=last / BLOCK_PAGES).map(move |block| {
        let from = first.saturating_sub(block * BLOCK_PAGES).min(BLOCK_PAGES - 1);
        let to = (last - block * BLOCK_PAGES).min(BLOCK_PAGES - 1);
        // 0 ..= 15, so at most 16 bits are set.
        (block, (((1u32 << (to - from + 1)) - 1) << from) as u16)
    })
}

impl Ssd {
    fn new(blocks: u64) -> Self {
        let capacity = usize::try_from(blocks).unwrap_or(usize::MAX);
        Self { capacity, slots: HashMap::new(), hand: VecDeque::new() }
    }

    fn pages_of(&self, block: u64) -> u16 {
        self.slots.get(&block).map_or(0, |slot| slot.pages)
    }

    fn holds(&self, pages: RangeInclusive<u64>) -> bool {
        blocks(pages).all(|(block, mask)| self.pages_of(block) & mask == mask)
    }

    fn read(&mut self, pages: RangeInclusive<u64>) {
        if self.capacity == 0 {
            return;
        }
        for (block, mask) in blocks(pages) {
            if let Some(slot) = self.slots.get_mut(&block) {
                slot.pages |= mask;
                slot.referenced = true;
                continue;
            }
            while self.slots.len() >= self.capacity {
                let Some(oldest) = self.hand.pop_front() else { break };
                match self.slots.get_mut(&oldest) {
                    Some(slot) if slot.referenced && slot.pages != 0 => {
                        slot.referenced = false;
                        self.hand.push_back(oldest);
                    }
                    _ => {
                        self.slots.remove(&oldest);
                    }
                }
            }
            self.slots.insert(block, Slot { pages: mask, referenced: false });
            self.hand.push_back(block);
        }
    }

    fn changed(&mut self, pages: RangeInclusive<u64>) {
        if self.slots.is_empty() {
            return;
        }
        for (block, mask) in blocks(pages) {
            if let Some(slot) = self.slots.get_mut(&block) {
                slot.pages &= !mask;
            }
        }
    }
}

/// A prefetch policy in front of an SSD tier.
pub(super) struct Tiered<'a> {
    policy: &'a mut dyn Prefetcher,
    /// Still to come, in order of time.
    writes: &'a [Request],
    ssd: Ssd,
    wishes: Vec<Wish>,
    /// Reads that RAM could not serve and the SSD could.
    pub(super) ssd_hits: u64,
}

impl<'a> Tiered<'a> {
    /// An empty SSD tier of so many 64 KiB blocks; 0 for none. `writes` are those that the replay is not shown.
    pub(super) fn new(policy: &'a mut dyn Prefetcher, writes: &'a [Request], blocks: u64) -> Self {
        Self { policy, writes, ssd: Ssd::new(blocks), wishes: Vec::new(), ssd_hits: 0 }
    }

    /// The writes until `now_us`.
    fn write(&mut self, now_us: u64, resident: &dyn Fn(u64) -> bool) {
        while let Some((write, later)) = self.writes.split_first().filter(|(write, _)| write.at_us <= now_us) {
            self.writes = later;
            self.ssd.changed(write.pages());
            self.policy.observe(write, false, write.at_us, resident, &mut self.wishes);
        }
    }

    /// Hands on what the SSD does not have.
    fn hand_on(&mut self, out: &mut Vec<Wish>) {
        for wish in self.wishes.drain(..) {
            if self.ssd.slots.is_empty() || wish.pages == 0 {
                out.push(wish);
                continue;
            }
            for (block, mask) in blocks(wish.first..=wish.first + wish.pages - 1) {
                let mut left = mask & !self.ssd.pages_of(block);
                while left != 0 {
                    let from = left.trailing_zeros();
                    let count = (left >> from).trailing_ones();
                    left &= !((((1u32 << count) - 1) << from) as u16);
                    out.push(Wish { first: block * BLOCK_PAGES + u64::from(from), pages: u64::from(count), ..wish });
                }
            }
        }
    }
}

impl Prefetcher for Tiered<'_> {
    fn name(&self) -> &str {
        self.policy.name()
    }

    fn observe(
        &mut self,
        request: &Request,
        hit: bool,
        now_us: u64,
        resident: &dyn Fn(u64) -> bool,
        out: &mut Vec<Wish>,
    ) {
        self.write(request.at_us, resident);
        match request.op {
            Op::Read => {
                self.ssd_hits += u64::from(!hit && self.ssd.holds(request.pages()));
                self.ssd.read(request.pages());
            }
            Op::Write | Op::Discard => self.ssd.changed(request.pages()),
        }
        self.policy.observe(request, hit, now_us, resident, &mut self.wishes);
        self.hand_on(out);
    }

    fn outcome(&mut self, outcome: &Outcome) {
        self.policy.outcome(outcome);
    }

    fn mark(&mut self, mark: &Mark, now_us: u64, out: &mut Vec<Wish>) {
        self.policy.mark(mark, now_us, &mut self.wishes);
        self.hand_on(out);
    }

    fn idle(&mut self, now_us: u64, out: &mut Vec<Wish>) {
        self.policy.idle(now_us, &mut self.wishes);
        self.hand_on(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Wishes for everything around what is read.
    struct Greedy;

    impl Prefetcher for Greedy {
        fn name(&self) -> &str {
            "greedy"
        }
        fn observe(&mut self, request: &Request, _: bool, _: u64, _: &dyn Fn(u64) -> bool, out: &mut Vec<Wish>) {
            let first = request.pages().start().saturating_sub(20);
            out.push(Wish { first, pages: 50, probability: 0.5, due_us: None, tag: 0 });
        }
    }

    fn request(op: Op, page: u64, pages: u64) -> Request {
        Request { at_us: 0, op, offset: page * 4096, len: u32::try_from(pages * 4096).unwrap() }
    }

    #[test]
    fn blocks_of_a_run_are_exact_at_both_ends() {
        assert_eq!(blocks(15..=16).collect::<Vec<_>>(), [(0, 1 << 15), (1, 1)]);
        assert_eq!(blocks(0..=15).collect::<Vec<_>>(), [(0, u16::MAX)]);
        assert_eq!(blocks(18..=20).collect::<Vec<_>>(), [(1, 0b11100)]);
    }

    #[test]
    fn writes_that_are_not_shown_to_ram_change_the_ssd_in_time() {
        let at = |at_us, op, page| Request { at_us, ..request(op, page, 1) };
        let writes = [at(5, Op::Write, 0), at(20, Op::Write, 0)];
        let mut greedy = Greedy;
        let mut tiered = Tiered::new(&mut greedy, &writes, 10);
        let mut hits = Vec::new();
        for at_us in [0, 1, 10, 15, 30] {
            tiered.observe(&at(at_us, Op::Read, 0), false, at_us, &|_| false, &mut Vec::new());
            hits.push(tiered.ssd_hits);
        }
        assert_eq!(hits, [0, 1, 1, 2, 2]);
    }

    #[test]
    fn what_was_read_twice_stays_longer() {
        let mut ssd = Ssd::new(2);
        for page in [0, 16, 0, 32] {
            ssd.read(page..=page);
        }
        assert!(ssd.holds(0..=0) && ssd.holds(32..=32) && !ssd.holds(16..=16));
    }

    proptest! {
        /// With room for all blocks the SSD holds exactly the pages read and not changed since.
        #[test]
        fn the_ssd_agrees_with_a_set_of_pages(
            ops in prop::collection::vec((0..3u8, 0..400u64, 1..40u64), 1..80),
        ) {
            let (mut greedy, mut model, mut hits) = (Greedy, std::collections::BTreeSet::new(), 0);
            let mut tiered = Tiered::new(&mut greedy, &[], 1000);
            for (op, page, pages) in ops {
                let op = [Op::Read, Op::Write, Op::Discard][usize::from(op)];
                let request = request(op, page, pages);
                let mut out = Vec::new();
                if op == Op::Read {
                    hits += u64::from(request.pages().all(|page| model.contains(&page)));
                    model.extend(request.pages());
                } else {
                    model.retain(|page| !request.pages().contains(page));
                }
                tiered.observe(&request, false, 0, &|_| false, &mut out);
                prop_assert_eq!(tiered.ssd_hits, hits);
                let first = page.saturating_sub(20);
                let wished: Vec<u64> = out.iter().flat_map(|wish| wish.first..wish.first + wish.pages).collect();
                let expected: Vec<u64> = (first..first + 50).filter(|page| !model.contains(page)).collect();
                prop_assert_eq!(wished, expected);
            }
        }
    }
}
