//! What the planner is told of the future in a simulation: the daemon's forecasts of 5-minute steps.
//!
//! As in the daemon, each series has a forecaster and a profile of its hours; with a model the network has a say too. The
//! daemon's second forecaster, of 10 s steps, has nothing to see here: demand is known every 5 minutes.

use super::trace::STEP_S;
use crate::planner::Outlook;
use prestage_predictor::demand::{Context, Forecaster, Metric, Profile, Weights};
use std::sync::Arc;

/// Steps of history below which nothing is foretold.
const LEAST: usize = 6;

/// Outlooks of all machines: for CPU (0) and memory (1) of each, quantiles of the highest demand of the next steps.
#[derive(Debug)]
pub(super) struct Forecasts {
    horizon: usize,
    model: Option<Arc<Weights>>,
    series: Vec<[Series; 2]>,
}

#[derive(Debug)]
struct Series {
    forecaster: Forecaster,
    usual: Profile,
    told: usize,
}

impl Series {
    fn new(metric: Metric) -> Self {
        Self { forecaster: Forecaster::new(metric, STEP_S as u32), usual: Profile::default(), told: 0 }
    }
}

impl Forecasts {
    /// Looks `horizon` steps of 5 minutes ahead.
    pub(super) fn new(horizon: usize, model: Option<Arc<Weights>>) -> Self {
        Self { horizon, model, series: Vec::new() }
    }

    /// A step as it was used, 5 minutes long; `at_s`: its end.
    pub(super) fn observe(&mut self, vm: usize, resource: usize, at_s: u64, value: f64) {
        let new = || [Series::new(Metric::Cpu), Series::new(Metric::Memory)];
        self.series.resize_with(self.series.len().max(vm + 1), new);
        let Series { forecaster, usual, told } = &mut self.series[vm][resource];
        let began_s = at_s.saturating_sub(STEP_S);
        usual.observe(began_s, value);
        forecaster.observe(began_s, value);
        forecaster.rehearse(&Context { profile: Some(usual), ..Context::default() }, self.model.as_deref());
        *told += 1;
    }

    /// `None`: too little is known.
    pub(super) fn outlook(&self, vm: usize, resource: usize) -> Option<Outlook> {
        let Series { forecaster, usual, told } = &self.series.get(vm)?[resource];
        let context = Context { profile: Some(usual), ..Context::default() };
        (*told >= LEAST).then(|| {
            let [_, p50, p90, p95] = forecaster.forecast(self.horizon, &context, self.model.as_deref()).peak.0;
            Outlook { p50, p90, p95 }
        })
    }
}
