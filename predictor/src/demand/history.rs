//! What was measured, on a grid of steps.
//!
//! A value goes to the nearest step, half up; the last of a step wins; gaps are filled forward and marked. Two rings: the
//! last [`FINE`] steps, and, where these are shorter than a fortnight, means of [`COARSE_S`] seconds for the same time.

/// Steps that are kept, at least; a fortnight of 5 minutes.
pub const FINE: usize = 4032;
/// Steps by which a ring outgrows this before its oldest are dropped together: keeps it one slice.
pub(super) const SLACK: usize = 504;
/// Step of the coarse ring in seconds.
pub(super) const COARSE_S: u32 = 300;
/// Larger values are no measurements.
const LARGEST: f64 = 1e30;

/// Values on a grid, the last at the end.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Ring {
    pub(super) values: Vec<f32>,
    pub(super) measured: Vec<bool>,
}

impl Ring {
    /// Most steps that are held.
    pub(super) const MOST: usize = FINE + SLACK;

    fn push(&mut self, value: f32, measured: bool) {
        if self.values.len() >= Self::MOST {
            self.values.drain(..SLACK);
            self.measured.drain(..SLACK);
        }
        // doubling, as a vector does it, would end with room for nearly twice what is ever held
        let len = self.values.len();
        let more = len.max(64).min(Self::MOST.saturating_sub(len));
        if len == self.values.capacity() {
            self.values.reserve_exact(more);
        }
        if len == self.measured.capacity() {
            self.measured.reserve_exact(more);
        }
        self.values.push(value);
        self.measured.push(measured);
    }

    fn memory_bytes(&self) -> usize {
        4 * self.values.capacity() + self.measured.capacity()
    }
}

/// One series at one step: at most 45 KiB.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    pub(super) step_s: u32,
    /// Unix time of the last step.
    pub(super) last_s: u64,
    /// Steps since the first, including those that were dropped.
    pub(super) count: u64,
    /// The largest value ever.
    pub(super) largest: f32,
    pub(super) fine: Ring,
    pub(super) coarse: Ring,
    /// Mean under way in the coarse ring's last place: its slot (unix time / [`COARSE_S`]), sum and number.
    pub(super) slot: u64,
    pub(super) sum: f64,
    pub(super) number: u32,
}

impl Series {
    /// `step_s`: seconds between values; 0 is taken for 1.
    #[must_use]
    pub fn new(step_s: u32) -> Self {
        Self {
            step_s: step_s.max(1),
            last_s: 0,
            count: 0,
            largest: 0.0,
            fine: Ring::default(),
            coarse: Ring::default(),
            slot: 0,
            sum: 0.0,
            number: 0,
        }
    }

    /// Takes in a value of unix time `at_s`. Returns the steps that have passed: 0 if the value belongs to the last step,
    /// `None` if it is no measurement (negative, not a number, beyond 1e30) or older than the last step.
    pub fn push(&mut self, at_s: u64, value: f64) -> Option<u64> {
        if !(0.0..=LARGEST).contains(&value) {
            return None;
        }
        let value = value as f32;
        let step = u64::from(self.step_s);
        if self.count == 0 {
            self.last_s = at_s;
            self.append(value, true);
            return Some(1);
        }
        let half = step / 2;
        let passed = if at_s >= self.last_s {
            (at_s - self.last_s).saturating_add(half) / step
        } else if self.last_s - at_s <= half {
            0
        } else {
            return None;
        };
        self.largest = self.largest.max(value);
        if passed == 0 {
            if let (Some(last), Some(measured)) = (self.fine.values.last_mut(), self.fine.measured.last_mut()) {
                *last = value;
                *measured = true;
            }
            return Some(0);
        }
        let before = self.fine.values.last().copied().unwrap_or(value);
        // what is longer than the ring leaves nothing of what was before it
        let gap = (passed - 1).min(self.gap_most());
        self.last_s = self.last_s.saturating_add((passed - 1 - gap).saturating_mul(step));
        for _ in 0..gap {
            self.last_s = self.last_s.saturating_add(step);
            self.append(before, false);
        }
        self.last_s = self.last_s.saturating_add(step);
        self.append(value, true);
        Some(passed)
    }

    /// Steps after which both rings hold nothing older.
    fn gap_most(&self) -> u64 {
        let coarse = (FINE as u64 * u64::from(COARSE_S)).div_ceil(u64::from(self.step_s));
        (FINE as u64).max(coarse)
    }

    fn append(&mut self, value: f32, measured: bool) {
        self.count += 1;
        self.largest = self.largest.max(value);
        self.fine.push(value, measured);
        if self.step_s >= COARSE_S {
            return;
        }
        let slot = self.last_s / u64::from(COARSE_S);
        if self.coarse.values.is_empty() || slot > self.slot {
            self.slot = slot;
            (self.sum, self.number) = (0.0, 0);
            self.coarse.push(value, measured);
        }
        self.sum += f64::from(value);
        self.number += 1;
        if let (Some(last), Some(known)) = (self.coarse.values.last_mut(), self.coarse.measured.last_mut()) {
            *last = (self.sum / f64::from(self.number)) as f32;
            *known |= measured;
        }
    }

    /// What is kept, as the features read it.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        View {
            step_s: self.step_s,
            last_s: self.last_s,
            fine: &self.fine.values,
            measured: &self.fine.measured,
            coarse: &self.coarse.values,
        }
    }

    /// Steps since the first.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.fine.memory_bytes() + self.coarse.memory_bytes()
    }
}

/// A series up to an origin: its last value.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub step_s: u32,
    /// Unix time of the last value.
    pub last_s: u64,
    /// One value a step, at most [`FINE`] + 504 of them; not empty.
    pub fine: &'a [f32],
    /// Which of them were measured.
    pub measured: &'a [bool],
    /// Means of 300 s, or empty where the step is no shorter.
    pub coarse: &'a [f32],
}

impl<'a> View<'a> {
    /// Steps of a day.
    pub(super) fn day(&self) -> usize {
        ((86_400 + self.step_s / 2) / self.step_s).max(1) as usize
    }

    /// The value `back` steps before the last; the oldest known where the series is younger, 0 of an empty one.
    #[inline]
    pub(super) fn ago(&self, back: usize) -> f32 {
        let fine = self.fine.len();
        if back < fine {
            return self.fine[fine - 1 - back];
        }
        if self.coarse.is_empty() {
            return self.fine.first().copied().unwrap_or(0.0);
        }
        let slot = self.last_s / u64::from(COARSE_S);
        let then = self.last_s.saturating_sub(back as u64 * u64::from(self.step_s)) / u64::from(COARSE_S);
        let back = usize::try_from(slot - then).unwrap_or(usize::MAX);
        self.coarse[self.coarse.len().saturating_sub(1).saturating_sub(back)]
    }

    pub(super) fn last(&self) -> f32 {
        self.ago(0)
    }

    /// The last `steps` values, or as many as there are.
    pub(super) fn recent(&self, steps: usize) -> &'a [f32] {
        &self.fine[self.fine.len().saturating_sub(steps)..]
    }

    /// Values of the last `seconds`: from the coarse ring if the fine one is too short.
    pub(super) fn since(&self, seconds: u32) -> &'a [f32] {
        let steps = (seconds / self.step_s).max(1) as usize;
        if steps <= FINE || self.coarse.is_empty() {
            return self.recent(steps);
        }
        &self.coarse[self.coarse.len().saturating_sub((seconds / COARSE_S) as usize)..]
    }
}
