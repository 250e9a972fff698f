//! What has come in between two looks at the page table. In no order within a look, and costs the more the larger the guest:
//! looks are so far apart that they take a hundredth of a core.

use std::time::{Duration, Instant};

use super::{Caught, Place, Places};
use crate::memory::pagemap::Pagemap;
use crate::memory::{PAGE_BYTES, PageState};

/// A look may take this share of the time between two.
const SHARE: u32 = 100;
/// Stretches that waited in swap and are remembered, at most; a guest with more is told of in part.
const MAX_STRETCHES: usize = 1 << 20;

#[derive(Debug, Default)]
pub(super) struct Diff {
    period: Duration,
    /// When the next look is due; `None`: never.
    next: Option<Instant>,
    /// What waited in swap at the last look: address, pages; ascending in each region.
    swapped: Vec<(u64, u64)>,
}

impl Diff {
    pub(super) fn listen(&mut self, period_ms: u32) {
        self.period = Duration::from_millis(period_ms.into());
        self.next = (period_ms > 0).then(Instant::now);
        if period_ms == 0 {
            self.swapped = Vec::new();
        }
    }

    pub(super) fn look_within_ms(&self) -> Option<u64> {
        let left = self.next?.saturating_duration_since(Instant::now());
        Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1))
    }

    pub(super) fn take(&mut self, pagemap: &Pagemap, places: &Places, caught: &mut Vec<Caught>) -> u64 {
        let started = Instant::now();
        if self.next.is_none_or(|next| next > started) {
            return 0;
        }
        let (mut swapped, mut present) = (Vec::new(), Vec::new());
        let mut lost = 0;
        for region in places.regions() {
            let told = pagemap.states(region.host, region.pages, |state, at, pages| match state {
                PageState::Swapped if swapped.len() < MAX_STRETCHES => swapped.push((at, pages)),
                PageState::Swapped => lost += pages,
                PageState::Present => present.push((at, pages)),
                PageState::Absent | PageState::Cached => {}
            });
            // a region that is not there any more says nothing; the next layout leaves it out
            drop(told);
        }
        let at_ns = now_ns();
        self.swapped.sort_unstable();
        present.sort_unstable();
        both(&self.swapped, &present, |host| caught.push(Caught { at_ns, place: Place::Host(host) }));
        self.swapped = swapped;
        self.next = Some(Instant::now() + self.period.max(started.elapsed() * SHARE));
        lost
    }
}

/// Tells of each page that lies in both lists of stretches, which are in ascending order.
fn both(a: &[(u64, u64)], b: &[(u64, u64)], mut tell: impl FnMut(u64)) {
    let end = |stretch: (u64, u64)| stretch.0 + stretch.1 * PAGE_BYTES;
    let (mut i, mut j) = (0, 0);
    while let (Some(&x), Some(&y)) = (a.get(i), b.get(j)) {
        let mut at = x.0.max(y.0);
        while at < end(x).min(end(y)) {
            tell(at);
            at += PAGE_BYTES;
        }
        if end(x) <= end(y) {
            i += 1;
        } else {
            j += 1;
        }
    }
}

fn now_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        let (s, ns) = (u64::try_from(now.tv_sec()).unwrap_or(0), u64::try_from(now.tv_nsec()).unwrap_or(0));
        s * 1_000_000_000 + ns
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_both_is_told() {
        let pages = |a: &[(u64, u64)], b: &[(u64, u64)]| {
            let scale = |list: &[(u64, u64)]| list.iter().map(|&(at, n)| (at * 4096, n)).collect::<Vec<_>>();
            let mut told = Vec::new();
            both(&scale(a), &scale(b), |at| told.push(at / 4096));
            told
        };
        assert_eq!(pages(&[(0, 4), (10, 5)], &[(2, 9), (14, 9)]), [2, 3, 10, 14]);
        assert!(pages(&[], &[(2, 9)]).is_empty());
        assert_eq!(pages(&[(0, 100)], &[(2, 1), (5, 2)]), [2, 5, 6]);
    }
}
