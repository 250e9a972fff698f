//! What a program used in the course of its earlier executions, and from that what a running one is going to use.
//!
//! Of each of the last [`RUNS`] executions the course is kept: the most that was used above what its machine used before, in each of
//! up to [`CELLS`] cells of equal length since its start. The maximum over the time to come is taken run by run and
//! the quantiles over the runs: this is the distribution of the maximum itself, which cells one by one do not give.

/// Executions remembered.
const RUNS: usize = 16;
/// Cells of one execution; of a longer one they become twice as long.
const CELLS: usize = 128;
/// A program is up to this much faster or slower than before.
pub(crate) const PACE: f64 = 1.25;
/// And starts this much earlier or later than announced, seconds.
pub(crate) const JITTER_S: f64 = 2.0;
/// Format of [`Course::write`].
const VERSION: u8 = 1;
/// Cells longer than this are of no use.
const WIDTH_MAX: u32 = 1 << 20;

/// .05, .5, .9 and .95 quantiles of the most that is to be used above what the machine used before.
pub(crate) type Rise = [f64; 4];

const LEVELS: Rise = [0.05, 0.5, 0.9, 0.95];

/// One execution: cells of `width_s` seconds, the most used in each above what was used before.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Run {
    width_s: u32,
    cells: Vec<f32>,
}

impl Run {
    pub(crate) fn new() -> Self {
        Self { width_s: 1, cells: Vec::new() }
    }

    /// So much was used so long after the start. What is no number is left out.
    pub(crate) fn observe(&mut self, elapsed_s: u32, above: f64) {
        let above = above as f32;
        if !above.is_finite() {
            return;
        }
        while (elapsed_s / self.width_s) as usize >= CELLS {
            if self.width_s >= WIDTH_MAX {
                return;
            }
            self.widen();
        }
        let cell = (elapsed_s / self.width_s) as usize;
        if self.cells.len() <= cell {
            // Between two measurements it used what it used at the first.
            let last = self.cells.last().copied().unwrap_or(0.0);
            self.cells.resize(cell, last);
            self.cells.push(above);
        } else {
            self.cells[cell] = self.cells[cell].max(above);
        }
    }

    fn widen(&mut self) {
        self.cells = self.cells.chunks(2).map(|pair| pair.iter().copied().fold(f32::NEG_INFINITY, f32::max)).collect();
        self.width_s *= 2;
    }

    /// Whether nothing was measured.
    pub(crate) fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// The most used between two times since the start; `None`: it had ended.
    fn most(&self, from_s: f64, to_s: f64) -> Option<f64> {
        let width = f64::from(self.width_s);
        let from = (from_s.max(0.0) / width) as usize;
        let to = ((to_s.max(0.0) / width) as usize).min(self.cells.len().saturating_sub(1));
        let cells = self.cells.get(from..=to)?;
        cells.iter().copied().reduce(f32::max).map(f64::from)
    }
}

/// Quantiles of values with weights. The next greater rank: of few values the high quantiles are the greatest. 0 without any.
pub(crate) fn quantiles(weighted: &mut [(f64, f64)]) -> Rise {
    weighted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    let at = |q: f64| {
        let mut sum = 0.0;
        let reached = weighted.iter().find(|(_, weight)| {
            sum += weight;
            // Sums of shares are a little off.
            sum >= q * total - 1e-9 * total
        });
        reached.or(weighted.last()).map_or(0.0, |(value, _)| *value)
    };
    LEVELS.map(at)
}

/// What is known of a program's use of one resource.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Course {
    runs: Vec<Run>,
}

impl Course {
    pub(crate) fn runs(&self) -> usize {
        self.runs.len()
    }

    /// An execution has ended.
    pub(crate) fn learn(&mut self, run: Run) {
        if run.cells.is_empty() {
            return;
        }
        if self.runs.len() == RUNS {
            self.runs.remove(0);
        }
        self.runs.push(run);
    }

    /// What each known execution used at most within `horizon_s` from `elapsed_s` after its start (negative: before it); 0 of one
    /// that had ended, or not begun. `None`: none had begun and not ended, or there are none.
    pub(crate) fn most(&self, elapsed_s: i64, horizon_s: u32) -> Option<Vec<f64>> {
        let (now, then) = (elapsed_s as f64, elapsed_s as f64 + f64::from(horizon_s));
        let (from, to) = (now / PACE - JITTER_S, then.max(then * PACE) + JITTER_S);
        if to < 0.0 {
            return None;
        }
        let mut most: Vec<f64> = self.runs.iter().filter_map(|run| run.most(from, to)).collect();
        // One that had ended used nothing more.
        let some = !most.is_empty();
        most.resize(self.runs.len(), 0.0);
        some.then_some(most)
    }

    /// What an execution that began `elapsed_s` ago (negative: is to begin) is going to use at most within the next `horizon_s`.
    /// `None`: all known ones had ended by then or not begun, or there are none.
    pub(crate) fn expect(&self, elapsed_s: i64, horizon_s: u32) -> Option<Rise> {
        let most = self.most(elapsed_s, horizon_s)?;
        Some(quantiles(&mut most.into_iter().map(|value| (value, 1.0)).collect::<Vec<_>>()))
    }

    /// Bytes of memory.
    pub(crate) fn size(&self) -> usize {
        self.runs.iter().map(|run| size_of::<Run>() + run.cells.len() * size_of::<f32>()).sum()
    }

    /// Version, runs, and of each width, cells and their values.
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut out = vec![VERSION, self.runs.len() as u8];
        for run in &self.runs {
            out.extend(run.width_s.to_le_bytes());
            out.push(run.cells.len() as u8);
            run.cells.iter().for_each(|cell| out.extend(cell.to_le_bytes()));
        }
        out
    }

    /// What [`Course::write`] wrote; `None` of anything else.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let (&[version, runs], mut rest) = bytes.split_first_chunk()?;
        if version != VERSION || usize::from(runs) > RUNS {
            return None;
        }
        let mut course = Self::default();
        for _ in 0..runs {
            let (width, tail) = rest.split_first_chunk()?;
            let (cells, tail) = tail.split_first()?;
            let width_s = u32::from_le_bytes(*width);
            let length = usize::from(*cells);
            if !width_s.is_power_of_two() || width_s > WIDTH_MAX || length == 0 || length > CELLS {
                return None;
            }
            let values = tail.get(..4 * length)?;
            rest = &tail[4 * length..];
            let (values, _) = values.as_chunks();
            let cells: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
            if !cells.iter().all(|cell| cell.is_finite()) {
                return None;
            }
            course.runs.push(Run { width_s, cells });
        }
        rest.is_empty().then_some(course)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Nothing for 20 s, then 100 for 20 s.
    fn step() -> Run {
        let mut run = Run::new();
        (0..40).for_each(|at| run.observe(at, if at < 20 { 0.0 } else { 100.0 }));
        run
    }

    #[test]
    fn a_rise_is_expected_before_it_comes_and_not_long_before() {
        let mut course = Course::default();
        assert_eq!(course.expect(0, 60), None);
        (0..3).for_each(|_| course.learn(step()));
        assert_eq!(course.expect(0, 5), Some([0.0; 4]));
        assert_eq!(course.expect(10, 10), Some([100.0; 4]), "a faster run may have risen by then");
        assert_eq!(course.expect(30, 5), Some([100.0; 4]));
        assert_eq!(course.expect(100, 5), None, "they had all ended");
        assert_eq!(course.expect(-60, 30), None, "it has not begun by then");
        assert_eq!(course.expect(-10, 40), Some([100.0; 4]));
    }

    #[test]
    fn of_few_executions_the_greatest_counts_and_old_ones_are_forgotten() {
        let mut course = Course::default();
        let flat = |value: f64| {
            let mut run = Run::new();
            run.observe(0, value);
            run
        };
        (1..=4).for_each(|value| course.learn(flat(f64::from(value))));
        assert_eq!(course.expect(0, 1), Some([1.0, 2.0, 4.0, 4.0]));
        (0..RUNS).for_each(|_| course.learn(flat(7.0)));
        assert_eq!((course.runs(), course.expect(0, 1)), (RUNS, Some([7.0; 4])));
        course.learn(Run::new());
        assert_eq!(course.runs(), RUNS, "an execution that was never measured teaches nothing");
    }

    #[test]
    fn a_long_execution_takes_no_more_room() {
        let mut run = Run::new();
        (0..100_000).for_each(|at| run.observe(at, f64::from(at)));
        assert!(run.cells.len() <= CELLS);
        assert_eq!(run.most(0.0, 1e9), Some(99_999.0));
        run.observe(u32::MAX, 1.0);
        run.observe(3, f64::NAN);
        assert!(run.cells.len() <= CELLS && run.cells.iter().all(|cell| cell.is_finite()));
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_and_nothing_else_panics(
            marks in prop::collection::vec((0u32..4000, -1e9f64..1e12), 1..60),
            junk in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut course = Course::default();
            for part in marks.chunks(20) {
                let mut run = Run::new();
                part.iter().for_each(|(elapsed, above)| run.observe(*elapsed, *above));
                course.learn(run);
            }
            let mut bytes = course.write();
            prop_assert_eq!(Course::read(&bytes), Some(course.clone()));
            let rise = course.expect(10, 100);
            prop_assert!(rise.is_none_or(|rise| rise.is_sorted() && rise.iter().all(|value| value.is_finite())));
            let _ = Course::read(&junk);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Some(read) = Course::read(&bytes) {
                let _ = (read.expect(0, u32::MAX), read.expect(i64::MIN, 1), read.expect(i64::MAX, u32::MAX));
            }
            prop_assert_eq!(Course::read(&bytes[..bytes.len() - 1]), None);
        }
    }
}
