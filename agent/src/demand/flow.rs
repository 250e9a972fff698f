//! One machine's use of one resource: from samples to what is to be expected. Sans-I/O.
//!
//! Samples become means of 10 s, and these the greatest of 5 minutes: the first tell what comes within the next minutes, the
//! second what comes within the next day. Peaks are what an allocation must hold, so the roll-up keeps peaks.

use prestage_integration::api::demand::Resource;
use prestage_predictor::demand::anomaly::{Anomaly, Detector, Kind};
use prestage_predictor::demand::{Context, Forecast, Forecaster, Metric, Profile, Weights};
use std::sync::Arc;

/// Steps of the two forecasters, seconds.
pub(crate) const FINE_S: u32 = 10;
pub(crate) const COARSE_S: u32 = 300;
/// Steps of a forecaster before it is asked: a minute, and half an hour.
const FINE_LEAST: u32 = 6;
const COARSE_LEAST: u32 = 6;
/// Steps that are looked ahead for the planner: two minutes, and ten.
const FINE_AHEAD: usize = 12;
const COARSE_AHEAD: usize = 2;
pub(crate) const COARSE_AHEAD_S: u32 = COARSE_S * COARSE_AHEAD as u32;

/// Steps of 5 minutes that a forecast is rehearsed over, and more.
pub(crate) const REHEARSED_S: u32 = 3600;

/// What is known of the time to come besides the series, at the origin and then at each step ahead: the share of it in which an event
/// is expected, and users' activity as a share of the most there was.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Covariates {
    pub(crate) event: Vec<f32>,
    pub(crate) activity: Vec<f32>,
}

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
    /// What is usual at each hour, and whether what is measured is.
    usual: Profile,
    detector: Detector,
    resource: Resource,
    model: Option<Arc<Weights>>,
    /// Steps told to each.
    told: [u32; 2],
    used: Option<(u64, f64)>,
    /// Quantiles of the maximum within the next minutes, and the fine step it was made at.
    outlook: Option<(u64, [f64; 4])>,
}

impl Flow {
    pub(crate) fn new(resource: Resource) -> Self {
        let metric = match resource {
            Resource::Cpu => Metric::Cpu,
            Resource::Memory => Metric::Memory,
            Resource::Disk => Metric::Disk,
            Resource::Network => Metric::Network,
        };
        Self {
            usual: Profile::default(),
            detector: Detector::new(metric),
            resource,
            model: None,
            fine: Forecaster::new(metric, FINE_S),
            coarse: Forecaster::new(metric, COARSE_S),
            ten: Bucket::default(),
            five: Bucket::default(),
            told: [0; 2],
            used: None,
            outlook: None,
        }
    }

    /// A sample; what is no number or negative is none. Says what has become unusual.
    pub(crate) fn observe(&mut self, at_s: u64, value: f64, covariates: &dyn Fn(u64) -> Covariates) -> Option<Found> {
        if !(value.is_finite() && value >= 0.0) {
            return None;
        }
        self.used = Some((at_s, value));
        let (began_s, mean, _) = self.ten.add(at_s, FINE_S, value)?;
        self.fine.observe(began_s, mean);
        self.fine.rehearse(&Context::default(), None);
        self.told[0] = self.told[0].saturating_add(1);
        let (began_s, _, most) = self.five.add(began_s, COARSE_S, mean)?;
        let found = self.detector.observe(began_s, most, &self.usual);
        self.recall(began_s, most, &covariates(began_s));
        found.map(|found| Found::of(self.resource, &found))
    }

    /// The most used within 5 minutes that began then: from the roll-ups, oldest first, or just measured.
    pub(crate) fn recall(&mut self, began_s: u64, most: f64, covariates: &Covariates) {
        self.usual.observe(began_s, most);
        self.coarse.observe(began_s, most);
        let Covariates { event, activity } = covariates;
        self.coarse.rehearse(&Context { activity, event, profile: Some(&self.usual) }, self.model.as_deref());
        self.told[1] = self.told[1].saturating_add(1);
    }

    /// The model that forecasts of 5 minutes rest on, beside the simple ones.
    pub(crate) fn set_model(&mut self, model: Option<Arc<Weights>>) {
        self.model = model;
        self.outlook = None;
    }

    /// What is unusual now.
    pub(crate) fn unusual(&self) -> Option<Found> {
        self.detector.current().map(|found| Found::of(self.resource, found))
    }

    /// The last sample and when it was taken.
    pub(crate) fn used(&self) -> Option<(u64, f64)> {
        self.used
    }

    /// Quantiles of the maximum within the minutes to come, made anew with each fine step.
    pub(crate) fn outlook(&mut self, now_s: u64, covariates: &Covariates) -> Option<[f64; 4]> {
        let step = now_s / u64::from(FINE_S);
        if let Some((made, outlook)) = self.outlook
            && made == step
        {
            return Some(outlook);
        }
        let fine =
            (self.told[0] >= FINE_LEAST).then(|| self.fine.forecast(FINE_AHEAD, &Context::default(), None).peak.0);
        let Covariates { event, activity } = covariates;
        let context = Context { activity, event, profile: Some(&self.usual) };
        let coarse = (self.told[1] >= COARSE_LEAST)
            .then(|| self.coarse.forecast(COARSE_AHEAD, &context, self.model.as_deref()).peak.0);
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

    /// A forecast for people, in steps of [`Flow::step_s`], which those of `covariates` are too. `None`: too little was measured.
    pub(crate) fn forecast(&self, horizon_s: u32, covariates: &Covariates) -> Option<Forecast> {
        let step_s = self.step_s(horizon_s);
        let (forecaster, known, model) = match step_s == FINE_S {
            true => (&self.fine, self.told[0] >= FINE_LEAST, None),
            false => (&self.coarse, true, self.model.as_deref()),
        };
        let steps = horizon_s.div_ceil(step_s).clamp(1, prestage_predictor::demand::MAX_STEPS as u32);
        let Covariates { event, activity } = covariates;
        let context = Context { activity, event, profile: Some(&self.usual) };
        known.then(|| forecaster.forecast(steps as usize, &context, model))
    }
}

/// Something unusual, with the evidence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Found {
    pub(crate) kind: Kind,
    pub(crate) resource: Resource,
    pub(crate) measured: f64,
    /// .05 and .95 quantile of what is usual.
    pub(crate) expected: (f64, f64),
    pub(crate) since_s: u64,
}

impl Found {
    fn of(resource: Resource, found: &Anomaly) -> Self {
        let Anomaly { kind, measured, expected, since_s, .. } = *found;
        Self { kind, resource, measured, expected, since_s }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self.kind {
            Kind::UnusualHour => "unusual",
            Kind::Runaway => "runaway",
            Kind::Leak => "leak",
            Kind::Drift => "drift",
        }
    }

    pub(crate) fn evidence(&self) -> String {
        let (low, high) = self.expected;
        let of = |amount: f64| super::machine::planned(self.resource).human(amount);
        match self.kind {
            Kind::UnusualHour => {
                format!(
                    "{} for a quarter of an hour, at this hour {} to {} are usual",
                    of(self.measured),
                    of(low),
                    of(high)
                )
            }
            Kind::Runaway => format!("{} for an hour, {} are usual at most", of(self.measured), of(high)),
            Kind::Leak => {
                format!("lows have risen for three hours, to {}, {} are usual at most", of(self.measured), of(high))
            }
            Kind::Drift => format!(
                "{:.0} % of the time above what 5 % are usually above: the machine has changed its ways",
                100.0 * self.measured
            ),
        }
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
        let none = |_: u64| Covariates::default();
        let mut flow = Flow::new(Resource::Cpu);
        flow.observe(1000, f64::NAN, &none);
        flow.observe(1000, -1.0, &none);
        assert!(flow.used().is_none() && flow.outlook(1000, &none(0)).is_none());
        (0..50).for_each(|at| assert!(flow.observe(1000 + at, 2.0, &none).is_none()));
        assert!(flow.forecast(3600, &none(0)).is_none());
        (50..100).for_each(|at| assert!(flow.observe(1000 + at, 2.0, &none).is_none()));
        let outlook = flow.outlook(1100, &none(0)).unwrap();
        assert!(outlook.is_sorted() && (1.0..4.0).contains(&outlook[3]), "{outlook:?}");
        let forecast = flow.forecast(60, &none(0)).unwrap();
        assert_eq!((forecast.step_s, forecast.steps.len()), (10, 6));
    }
}
