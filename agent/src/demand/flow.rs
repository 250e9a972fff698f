//! One machine's use of one resource: from samples to what is to be expected. Sans-I/O.
//!
//! Samples become means of 10 s, and these the greatest of 5 minutes: the first tell what comes within the next minutes, the
//! second what comes within the next day. Peaks are what an allocation must hold, so the roll-up keeps peaks.

use prestage_predictor::demand::{Context, Forecast, Forecaster, Metric, Weights};

/// Steps of the two forecasters, seconds.
pub(crate) const FINE_S: u32 = 10;
pub(crate) const COARSE_S: u32 = 300;
/// Steps of a forecaster before it is asked: a minute, and half an hour.
const FINE_LEAST: u32 = 6;
const COARSE_LEAST: u32 = 6;
/// Steps that are looked ahead for the planner: two minutes, and ten.
const FINE_AHEAD: usize = 12;
const COARSE_AHEAD: usize = 2;

/// A step in the making.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    step: u64,
    sum: f64,
    count: u32,
    most: f64,
}

impl Bucket {
    /// Adds a value; gives back the step before once it is over: when it began, mean and maximum.
    fn add(&mut self, at_s: u64, step_s: u32, value: f64) -> Option<(u64, f64, f64)> {
        let step = at_s / u64::from(step_s);
        let over = (self.count > 0 && step != self.step)
            .then(|| (self.step * u64::from(step_s), self.sum / f64::from(self.count), self.most));
        if over.is_some() || self.count == 0 {
            *self = Self { step, ..Self::default() };
        }
        self.sum += value;
        self.count += 1;
        self.most = self.most.max(value);
        over
    }
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Flow {
    fine: Forecaster,
    coarse: Forecaster,
    ten: Bucket,
    five: Bucket,
    /// Steps told to each.
    told: [u32; 2],
    used: Option<(u64, f64)>,
    /// Quantiles of the maximum within the next minutes, and the fine step it was made at.
    outlook: Option<(u64, [f64; 4])>,
}

impl Flow {
    pub(crate) fn new(metric: Metric) -> Self {
        Self {
            fine: Forecaster::new(metric, FINE_S),
            coarse: Forecaster::new(metric, COARSE_S),
            ten: Bucket::default(),
            five: Bucket::default(),
            told: [0; 2],
            used: None,
            outlook: None,
        }
    }

    /// A sample; what is no number or negative is none.
    pub(crate) fn observe(&mut self, at_s: u64, value: f64) {
        if !(value.is_finite() && value >= 0.0) {
            return;
        }
        self.used = Some((at_s, value));
        if let Some((began_s, mean, _)) = self.ten.add(at_s, FINE_S, value) {
            self.fine.observe(began_s, mean);
            self.told[0] = self.told[0].saturating_add(1);
            if let Some((began_s, _, most)) = self.five.add(began_s, COARSE_S, mean) {
                self.recall(began_s, most);
            }
        }
    }

    /// The most used within 5 minutes that began then: from the roll-ups, oldest first, or just measured.
    pub(crate) fn recall(&mut self, began_s: u64, most: f64) {
        self.coarse.observe(began_s, most);
        self.told[1] = self.told[1].saturating_add(1);
    }

    /// The last sample and when it was taken.
    pub(crate) fn used(&self) -> Option<(u64, f64)> {
        self.used
    }

    /// Quantiles of the maximum within the minutes to come, made anew with each fine step.
    pub(crate) fn outlook(&mut self, now_s: u64, model: Option<&Weights>) -> Option<[f64; 4]> {
        let step = now_s / u64::from(FINE_S);
        if let Some((made, outlook)) = self.outlook
            && made == step
        {
            return Some(outlook);
        }
        let peak = |forecaster: &mut Forecaster, known: bool, steps: usize, model| {
            known.then(|| forecaster.forecast(steps, &Context::default(), model).peak.0)
        };
        let fine = peak(&mut self.fine, self.told[0] >= FINE_LEAST, FINE_AHEAD, None);
        let coarse = peak(&mut self.coarse, self.told[1] >= COARSE_LEAST, COARSE_AHEAD, model);
        let outlook = match (fine, coarse) {
            (Some(fine), Some(coarse)) => Some(std::array::from_fn(|at| f64::max(fine[at], coarse[at]))),
            (fine, coarse) => fine.or(coarse),
        };
        self.outlook = outlook.map(|outlook| (step, outlook));
        outlook
    }

    /// Steps of a forecast: of 10 s for the next minutes, or where there is nothing else yet; else of 5 minutes.
    pub(crate) fn step_s(&self, horizon_s: u32) -> u32 {
        let fine = horizon_s <= 60 * FINE_S && self.told[0] >= FINE_LEAST || self.told[1] < COARSE_LEAST;
        if fine { FINE_S } else { COARSE_S }
    }

    /// A forecast for people, in steps of [`Flow::step_s`]. `None`: too little was measured.
    pub(crate) fn forecast(
        &mut self,
        horizon_s: u32,
        context: &Context<'_>,
        model: Option<&Weights>,
    ) -> Option<Forecast> {
        let step_s = self.step_s(horizon_s);
        let (forecaster, known, model) = match step_s == FINE_S {
            true => (&mut self.fine, self.told[0] >= FINE_LEAST, None),
            false => (&mut self.coarse, true, model),
        };
        let steps = horizon_s.div_ceil(step_s).clamp(1, prestage_predictor::demand::MAX_STEPS as u32);
        known.then(|| forecaster.forecast(steps as usize, context, model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_become_means_and_these_the_greatest() {
        let mut bucket = Bucket::default();
        let over: Vec<_> = (0..25u64).filter_map(|at| bucket.add(at, 10, at as f64)).collect();
        assert_eq!(over, [(0, 4.5, 9.0), (10, 14.5, 19.0)]);
    }

    #[test]
    fn nothing_is_said_before_a_minute_was_measured() {
        let mut flow = Flow::new(Metric::Cpu);
        flow.observe(1000, f64::NAN);
        flow.observe(1000, -1.0);
        assert!(flow.used().is_none() && flow.outlook(1000, None).is_none());
        (0..50).for_each(|at| flow.observe(1000 + at, 2.0));
        assert!(flow.forecast(3600, &Context::default(), None).is_none());
        (50..100).for_each(|at| flow.observe(1000 + at, 2.0));
        let outlook = flow.outlook(1100, None).unwrap();
        assert!(outlook.is_sorted() && (1.0..4.0).contains(&outlook[3]), "{outlook:?}");
        let forecast = flow.forecast(60, &Context::default(), None).unwrap();
        assert_eq!((forecast.step_s, forecast.steps.len()), (10, 6));
    }
}
