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
    /// Clock at which it is settled.
    pub(crate) due: u32,
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

    /// The oldest prediction, taken out together with its index, if it is due or `force`d.
    pub(crate) fn pop(&mut self, clock: u32, force: bool) -> Option<(u16, Prediction)> {
        if self.len == 0 {
            return None;
        }
        let index = self.head;
        let oldest = self.ring[index];
        // The clock wraps: "due" lies less than half a turn back.
        if oldest.live && !force && clock.wrapping_sub(oldest.due) >= u32::MAX / 2 {
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
