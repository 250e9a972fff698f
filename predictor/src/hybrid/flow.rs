//! What each expert's predictions yield just now.
//!
//! Labels come a window of reads late; when a guest goes over to something else, the counters go on believing for so
//! long. The yield tells at once: pages that came true over pages predicted, both decaying with the same rate. It is no
//! probability (what comes true now was predicted a while ago), but the mixer learns what it is worth.

use super::mixer::EXPERTS;

/// What is left of the past after a read: half after 43 of them.
const DECAY: f32 = 0.984;
/// A flow that is nothing yet counts as so much.
const PRIOR: (f32, f32) = (0.3, 1.0);

/// A yield below this is not worth weighing every candidate: a page in 64.
const LITTLE: f32 = 1.0 / 64.0;
const SELDOM: u32 = 8;

/// Pages predicted and pages come true of one VM, by expert.
#[derive(Clone, Debug, Default)]
pub(super) struct Flow {
    made: [f32; EXPERTS],
    came: [f32; EXPERTS],
}

impl Flow {
    /// Time passes, in reads.
    pub(super) fn read(&mut self) {
        self.made.iter_mut().chain(&mut self.came).for_each(|pages| *pages *= DECAY);
    }

    /// The experts of `set` predicted pages.
    pub(super) fn made(&mut self, set: u8, pages: u32) {
        add(&mut self.made, set, pages);
    }

    /// Pages came true that the experts of `set` had predicted.
    pub(super) fn came(&mut self, set: u8, pages: u32) {
        add(&mut self.came, set, pages);
    }

    /// Whether an expert is worth asking at this read: one whose predictions hardly ever come true is asked at every
    /// [`SELDOM`]th only, which is enough to notice when that changes.
    pub(super) fn pays(&self, expert: usize, clock: u32) -> bool {
        self.came[expert] + PRIOR.0 >= (self.made[expert] + PRIOR.1) * LITTLE || clock.is_multiple_of(SELDOM)
    }

    /// The yields of the experts of `set`, octal: 0 for one that is silent, else 1 to 7, the logarithm of its yield.
    pub(super) fn yields(&self, set: u8) -> u32 {
        let level = |expert: usize| {
            if set >> expert & 1 == 0 {
                return 0;
            }
            let share = (self.came[expert] + PRIOR.0) / (self.made[expert] + PRIOR.1);
            1 + (1 + (share * 32.0) as u32).ilog2().min(6)
        };
        (0..EXPERTS).fold(0, |levels, expert| levels * 8 + level(expert))
    }
}

fn add(flow: &mut [f32; EXPERTS], set: u8, pages: u32) {
    for (expert, flow) in flow.iter_mut().enumerate() {
        *flow += f32::from(set >> expert & 1) * pages as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_yield_follows_what_comes_true_and_forgets() {
        let mut flow = Flow::default();
        let yields = |flow: &Flow| (flow.yields(1) >> 9, flow.yields(4) >> 3 & 7);
        for _ in 0..200 {
            flow.read();
            flow.made(0b0101, 4);
            flow.came(0b0001, 4);
        }
        let (good, bad) = yields(&flow);
        assert!(good >= 6 && bad == 1, "{good} {bad}");
        assert_eq!(flow.yields(0), 0);
        for _ in 0..500 {
            flow.read();
            flow.made(0b0101, 4);
        }
        assert_eq!(yields(&flow), (1, 1));
        assert_eq!((0..64).filter(|clock| flow.pays(2, *clock)).count(), 8);
        assert!((0..64).all(|clock| flow.pays(1, clock)), "who said nothing yet is heard");
    }
}
