//! A phase that nobody announced is recognised by its touches.
//!
//! For every known set the log likelihood ratio of "its phase runs" against "something else touches memory at random" is summed
//! over the touches, never below nothing: the CUSUM test (Page, Biometrika 1954), which finds a change soon after it, and is
//! wrong once in `e^ENOUGH` touches of something else at most. A touch says the more, the smaller the part of memory is
//! that the set covers; of nested sets the smallest speaks up first.

use super::AccessPredictor;
use crate::access::Phase;

/// Part of a phase's touches that lie in its set.
const INSIDE: f64 = 0.9;
/// Sets that cover more than this say nothing by being touched.
const MOST_SHARE: f64 = 0.75;
/// One in a million touches of something else.
const ENOUGH: f64 = 13.8;
/// Touches in a set, beyond those beside it: what every phase touches (a kernel, a library) lies in any set, and is few pages.
const LEAST_TOUCHES: u64 = 16;
const MOST_TOUCHES: u64 = 128;
const PART_TOUCHED: u64 = 256;
/// Smaller sets are not worth it.
const LEAST_PAGES: u64 = 256;

/// What speaks for one set.
#[derive(Clone, Debug)]
pub(super) struct Suspicion {
    phase: Phase,
    sum: f64,
    touches: u64,
}

impl AccessPredictor {
    /// Takes a page that was touched while no phase ran, one of `pages` that could have been. Names the phase whose set the touches
    /// since the last name clearly lie in. Some .2 µs for each set that is known.
    pub fn recognise(&mut self, page: u64, pages: u64) -> Option<Phase> {
        let suspicions = &mut self.suspicions;
        suspicions.retain(|suspicion| self.phases.iter().any(|stored| stored.phase == suspicion.phase));
        let mut best: Option<(f64, Phase)> = None;
        for stored in &self.phases {
            let held = stored.set.pages();
            let share = held as f64 / pages.max(1) as f64;
            if held < LEAST_PAGES || share > MOST_SHARE {
                continue;
            }
            let inside = stored.set.plan().overlaps(page, 1).next().is_some();
            let position = suspicions.iter().position(|suspicion| suspicion.phase == stored.phase);
            let Some(position) = position.or_else(|| {
                inside.then(|| {
                    suspicions.push(Suspicion { phase: stored.phase, sum: 0.0, touches: 0 });
                    suspicions.len() - 1
                })
            }) else {
                continue;
            };
            let suspicion = &mut suspicions[position];
            if inside {
                suspicion.sum += (INSIDE / share).ln();
                suspicion.touches += 1;
            } else {
                suspicion.sum += ((1.0 - INSIDE) / (1.0 - share)).ln();
                if suspicion.sum <= 0.0 {
                    suspicions.swap_remove(position);
                    continue;
                }
            }
            let enough = (held / PART_TOUCHED).clamp(LEAST_TOUCHES, MOST_TOUCHES);
            if suspicion.sum >= ENOUGH && suspicion.touches >= enough && best.is_none_or(|(sum, _)| suspicion.sum > sum)
            {
                best = Some((suspicion.sum, stored.phase));
            }
        }
        let (_, phase) = best?;
        self.suspicions.clear();
        Some(phase)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AccessConfig, AccessPredictor};
    use crate::access::{Access, Op, Phase};

    const MEMORY: u64 = 1 << 17;

    /// Knows each program's pages.
    fn taught(programs: &[(u64, &[u64])]) -> AccessPredictor {
        let mut predictor = AccessPredictor::new(AccessConfig { size_pages: MEMORY, ..AccessConfig::default() });
        for (program, pages) in programs {
            predictor.phase_start(0, Phase::Program(*program), 0);
            for (at, page) in pages.iter().enumerate() {
                predictor.observe(&Access { at_us: at as u64, vm: 0, op: Op::Read, first: *page, pages: 1 });
            }
            predictor.phase_end(0, pages.len() as u64);
        }
        predictor
    }

    /// Pages all over memory, in no order, none twice.
    fn some(seed: u64, count: u64) -> Vec<u64> {
        (0..count).map(|i| ((i + seed * 7919) * 40_503) % MEMORY).collect()
    }

    /// After how many touches which phase is named.
    fn named(predictor: &mut AccessPredictor, touches: &[u64]) -> Option<(usize, Phase)> {
        touches
            .iter()
            .enumerate()
            .find_map(|(at, page)| predictor.recognise(*page, MEMORY).map(|phase| (at + 1, phase)))
    }

    fn shuffled(pages: &[u64]) -> Vec<u64> {
        let mut pages = pages.to_vec();
        pages.sort_unstable_by_key(|page| page.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        pages
    }

    #[test]
    fn a_program_is_known_by_a_few_of_its_pages_in_any_order() {
        let (small, large) = (some(1, 2000), (0..MEMORY / 2).collect::<Vec<_>>());
        let mut predictor = taught(&[(1, &small), (2, &large)]);
        let (touches, phase) = named(&mut predictor, &shuffled(&small)).unwrap();
        assert!(phase == Phase::Program(1) && touches <= 40, "{phase:?} after {touches}");
        let upper: Vec<u64> = shuffled(&large).into_iter().filter(|page| !small.contains(page)).collect();
        let (touches, phase) = named(&mut predictor, &upper).unwrap();
        assert!(phase == Phase::Program(2) && touches <= 200, "{phase:?} after {touches}");
    }

    #[test]
    fn random_touches_and_the_few_pages_that_everything_touches_are_no_program() {
        let kernel: Vec<u64> = (1000..1012).collect();
        let mut program = some(1, 4000);
        program.extend(&kernel);
        let half: Vec<u64> = (0..MEMORY / 2).collect();
        let mut predictor = taught(&[(1, &program), (2, &half)]);
        assert_eq!(named(&mut predictor, &shuffled(&(0..MEMORY).collect::<Vec<_>>())), None);
        let mut idle = some(3, 3000).into_iter().filter(|page| !program.contains(page) && *page >= MEMORY / 2);
        let touches: Vec<u64> =
            (0..200).flat_map(|at| [idle.next(), idle.next(), Some(kernel[at % kernel.len()])]).flatten().collect();
        assert_eq!(named(&mut predictor, &touches), None);
    }

    #[test]
    fn what_is_recalled_is_raised_and_teaches_nothing() {
        let pages = some(1, 2000);
        let mut predictor = taught(&[(1, &pages)]);
        let before = predictor.to_bytes();
        predictor.recall(0, Phase::Program(1), 1 << 40);
        let mut candidates = Vec::new();
        predictor.predict(1 << 40, &mut candidates);
        let raised: u64 = candidates.iter().map(|candidate| u64::from(candidate.pages)).sum();
        assert!(raised >= 1900, "{raised}");
        predictor.found(0, pages[0], 1, (1 << 40) + 5);
        predictor.phase_end(0, (1 << 40) + 10);
        assert_eq!(predictor.summary().phases[0].runs, 1);
        // but for when it was last used
        assert_eq!(predictor.to_bytes().len(), before.len());
    }

    #[test]
    fn a_program_that_is_forgotten_is_not_named() {
        let pages = some(1, 2000);
        let mut predictor = taught(&[(1, &pages)]);
        assert_eq!(named(&mut predictor, &pages[..8]), None);
        predictor.phases.clear();
        assert_eq!(named(&mut predictor, &pages[8..]), None);
        assert!(predictor.suspicions.is_empty());
    }
}
