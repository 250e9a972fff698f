//! Predictions that wait for their label: read within the window, or not.
//!
//! A ring in the order they were made. Those of one block are chained, so that a read finds them.

use super::mixer::{INPUTS, Places};

/// End of a block's chain.
pub(crate) const NO_PREDICTION: u16 = u16::MAX;

/// What was said of some pages of a block, and why.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prediction {
    pub(crate) block: u32,
    /// When it is settled, see [`Lifetime`], and the low bits of the clock when it was made.
    pub(crate) due: u16,
    pub(crate) at: u16,
    pub(crate) pages: u16,
    pub(crate) read: u16,
    pub(super) next: u16,
    pub(crate) set: u8,
    pub(super) live: bool,
    pub(crate) score: f32,
    pub(crate) probability: f32,
    pub(crate) places: Places,
    /// Inputs of the mixer in sixteenths of a nat.
    pub(crate) inputs: [i8; INPUTS],
}

/// How long a prediction may take to come true: as long as its pages would stay in the cache if they were prefetched, which
/// is so many insertions later and no number of reads; and at most a number of reads, so that nothing waits for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lifetime {
    reads: u16,
    /// Insertions in units of 2 to the power of `shift`, so that they fit.
    insertions: u16,
    shift: u32,
}

/// Share of the cache's pages that come in while an unread one stays: probation takes half to nine tenths.
const STAY: f64 = 0.6;

impl Lifetime {
    /// At most `reads` (below 32,768) in a cache of `cache_pages`.
    pub(crate) fn new(reads: u32, cache_pages: u64) -> Self {
        let stay = (cache_pages as f64 * STAY) as u64;
        let shift = (u64::BITS - stay.leading_zeros()).saturating_sub(14);
        let insertions = if shift < u32::BITS { (stay >> shift).max(1) as u16 } else { u16::MAX / 2 };
        Self { reads: reads.min(32_767) as u16, insertions, shift: shift.min(u32::BITS - 1) }
    }

    /// When a prediction is due that is made after so many insertions.
    pub(crate) fn due(&self, inserted: u32) -> u16 {
        ((inserted >> self.shift) as u16).wrapping_add(self.insertions)
    }

    /// Whether a prediction's time has passed. Both clocks wrap: what has passed lies less than half a turn back.
    pub(crate) fn is_over(&self, prediction: &Prediction, clock: u32, inserted: u32) -> bool {
        let past = ((inserted >> self.shift) as u16).wrapping_sub(prediction.due);
        past <= u16::MAX / 2 || (clock as u16).wrapping_sub(prediction.at) >= self.reads
    }
}

#[derive(Debug)]
pub(crate) struct Pending {
    ring: Vec<Prediction>,
    head: usize,
    len: usize,
}

impl Pending {
    /// Room for `predictions` of them, at most 65,534.
    pub(crate) fn new(predictions: usize) -> Self {
        let blank = Prediction { live: false, ..Prediction::blank() };
        Self { ring: vec![blank; predictions.clamp(16, usize::from(NO_PREDICTION) - 1)], head: 0, len: 0 }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len == self.ring.len()
    }

    /// The oldest prediction, taken out together with its index, if it is `over` or was taken back.
    pub(crate) fn pop(&mut self, over: impl Fn(&Prediction) -> bool) -> Option<(u16, Prediction)> {
        if self.len == 0 {
            return None;
        }
        let index = self.head;
        let oldest = self.ring[index];
        if oldest.live && !over(&oldest) {
            return None;
        }
        self.head = (self.head + 1) % self.ring.len();
        self.len -= 1;
        Some((index as u16, oldest))
    }

    /// Adds a prediction and puts it at the head of its block's chain. The ring must not be full.
    pub(crate) fn push(&mut self, prediction: Prediction, chain: &mut u16) {
        let index = (self.head + self.len) % self.ring.len();
        self.ring[index] = Prediction { next: *chain, live: true, ..prediction };
        self.len += 1;
        *chain = index as u16;
    }

    pub(crate) fn get(&self, index: u16) -> Option<&Prediction> {
        self.ring.get(usize::from(index))
    }

    pub(crate) fn get_mut(&mut self, index: u16) -> Option<&mut Prediction> {
        self.ring.get_mut(usize::from(index))
    }

    /// Takes a prediction out of its block's chain.
    pub(crate) fn unchain(&mut self, chain: &mut u16, index: u16) {
        if *chain == index {
            *chain = self.ring[usize::from(index)].next;
            return;
        }
        let mut at = *chain;
        while let Some(prediction) = self.ring.get(usize::from(at)) {
            if prediction.next == index {
                let next = self.ring[usize::from(index)].next;
                self.ring[usize::from(at)].next = next;
                return;
            }
            at = prediction.next;
        }
    }

    /// Takes a prediction back: it will not be settled.
    pub(crate) fn kill(&mut self, chain: &mut u16, index: u16) {
        self.unchain(chain, index);
        if let Some(prediction) = self.get_mut(index) {
            prediction.live = false;
        }
    }

    /// The chain that starts at `index`.
    pub(crate) fn chain(&self, index: u16) -> impl Iterator<Item = (u16, &Prediction)> {
        let mut at = index;
        std::iter::from_fn(move || {
            let prediction = self.ring.get(usize::from(at))?;
            let here = at;
            at = prediction.next;
            Some((here, prediction))
        })
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.ring.capacity() * size_of::<Prediction>()
    }
}

impl Prediction {
    pub(crate) fn next(&self) -> u16 {
        self.next
    }

    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    pub(crate) fn blank() -> Self {
        Self {
            block: 0,
            due: 0,
            at: 0,
            pages: 0,
            read: 0,
            next: NO_PREDICTION,
            set: 0,
            live: true,
            score: 0.0,
            probability: 0.0,
            places: [0; INPUTS],
            inputs: [0; INPUTS],
        }
    }
}

const _: () = assert!(size_of::<Prediction>() <= 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_is_over_by_insertions_or_by_reads_whichever_comes_first() {
        for (pages, stays) in [(1000u64, 600u32), (1 << 20, 629_000), (1 << 40, u32::MAX)] {
            let lifetime = Lifetime::new(2048, pages);
            for start in [0u32, 1 << 20, u32::MAX - 100] {
                let made = Prediction { due: lifetime.due(start), at: start as u16, ..Prediction::blank() };
                let over = |reads: u32, inserted: u32| {
                    lifetime.is_over(&made, start.wrapping_add(reads), start.wrapping_add(inserted))
                };
                assert!(!over(0, 0) && !over(2047, 0) && over(2048, 0), "{pages} {start}");
                assert!(!over(1, stays / 100 * 97), "{pages} {start}");
                assert!(pages == 1 << 40 || start == u32::MAX - 100 || over(1, stays / 100 * 103), "{pages} {start}");
            }
        }
    }
}
