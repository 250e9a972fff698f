//! What users do in a machine, as somebody tells: sessions, requests a second, or whatever there is to count. Sans-I/O.
//!
//! A value holds from its time on until the next, or until it ends; where there is none it is 0. Forecasts get it as a share of the most
//! there was, which fades by half in a month: a single wrong number is not the measure for ever.

use prestage_integration::api::demand::{ActivityStep, VmActivity};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Values of one machine that hold or are to come.
const MOST: usize = 1024;
/// Time after which the most counts half.
const HALF_LIFE_S: f64 = 30.0 * 86_400.0;
/// The most is raised by what exceeds it by a hundredth: it fades a little each second.
const MORE: f64 = 1.01;
/// Written down so often, where nothing else asks for it.
const WRITTEN_S: u64 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Value {
    until_s: u64,
    activity: f64,
}

/// See the module's head.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Activity {
    /// By Unix s.
    values: BTreeMap<u64, Value>,
    most: f64,
    /// When `most` was that.
    most_s: u64,
    #[serde(skip)]
    written_s: u64,
    /// Something was told since it was written down.
    #[serde(skip)]
    unwritten: bool,
}

impl Activity {
    /// What was written down; `None` of anything else.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let activity: Self = serde_json::from_slice(bytes).ok()?;
        let number = |value: f64| value.is_finite() && value >= 0.0;
        let all = activity.values.values().all(|value| number(value.activity));
        (all && number(activity.most) && activity.values.len() <= MOST).then_some(activity)
    }

    fn forget(&mut self, now_s: u64) {
        // The one that holds is the last that has begun.
        let holds = self.values.range(..=now_s).next_back().map(|(at_s, _)| *at_s);
        self.values.retain(|at_s, value| value.until_s > now_s && holds.is_none_or(|holds| *at_s >= holds));
    }

    /// Takes in a value; whether it should be written down at once. Errors: there are too many.
    pub(crate) fn tell(&mut self, activity: f64, at_s: u64, until_s: u64, now_s: u64) -> Result<bool, String> {
        self.forget(now_s);
        if self.values.len() >= MOST && !self.values.contains_key(&at_s) {
            return Err(format!("{MOST} values are announced for the machine already; wait until some are over"));
        }
        self.values.insert(at_s, Value { until_s, activity });
        let more = activity > MORE * self.most(now_s);
        if more {
            (self.most, self.most_s) = (activity, now_s);
        }
        let due = more || at_s > now_s || now_s.saturating_sub(self.written_s) >= WRITTEN_S;
        if due {
            self.written_s = now_s;
        }
        self.unwritten = !due;
        Ok(due)
    }

    /// Whether it is still to be written down; from now on it counts as done.
    pub(crate) fn take_unwritten(&mut self) -> bool {
        std::mem::take(&mut self.unwritten)
    }

    fn most(&self, now_s: u64) -> f64 {
        self.most * (-(now_s.saturating_sub(self.most_s) as f64) / HALF_LIFE_S).exp2()
    }

    /// What holds at a time.
    pub(crate) fn at(&self, at_s: u64) -> f64 {
        self.held(at_s).map_or(0.0, |value| value.activity)
    }

    fn held(&self, at_s: u64) -> Option<&Value> {
        self.values.range(..=at_s).next_back().map(|(_, value)| value).filter(|value| at_s < value.until_s)
    }

    /// The most of each step as a share of the most there was: at the origin, then of each step ahead.
    pub(crate) fn shares(&self, origin_s: u64, step_s: u32, horizon_s: u32) -> Vec<f32> {
        let (step_s, most) = (u64::from(step_s.max(1)), self.most(origin_s));
        if most <= 0.0 || self.values.is_empty() {
            return Vec::new();
        }
        let steps = u64::from(horizon_s).div_ceil(step_s);
        let of = |step: u64| {
            let from_s = origin_s.saturating_add(step * step_s);
            let begin = self.values.range(from_s..from_s.saturating_add(step_s)).map(|(_, value)| value.activity);
            (begin.fold(self.at(from_s), f64::max) / most).clamp(0.0, 1.0) as f32
        };
        (0..=steps).map(of).collect()
    }

    /// For people.
    pub(crate) fn shown(&self, uuid: String, name: String, now_s: u64) -> VmActivity {
        let step = |(at_s, value): (&u64, &Value)| ActivityStep {
            at_unix_ms: at_s.saturating_mul(1000),
            until_unix_ms: value.until_s.saturating_mul(1000),
            activity: value.activity,
        };
        let announced = self.values.iter().filter(|(at_s, _)| **at_s > now_s).map(step).collect();
        let until_unix_ms = self.held(now_s).map(|value| value.until_s.saturating_mul(1000));
        VmActivity { uuid, name, activity: self.at(now_s), until_unix_ms, most: self.most(now_s), announced }
    }

    /// Nothing holds, and nothing is to come.
    pub(crate) fn is_over(&self, now_s: u64) -> bool {
        let holds = self.values.range(..=now_s).next_back().is_some_and(|(_, value)| now_s < value.until_s);
        !holds && self.values.range(now_s.saturating_add(1)..).next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_holds_until_the_next_or_its_end() {
        let mut activity = Activity::default();
        assert_eq!((activity.at(1000), activity.shares(1000, 300, 600)), (0.0, vec![]));
        assert_eq!(activity.tell(50.0, 1000, 4600, 1000), Ok(true));
        assert!(!activity.take_unwritten());
        assert_eq!(activity.tell(40.0, 1001, 4601, 1001), Ok(false), "not each second");
        assert!(activity.take_unwritten() && !activity.take_unwritten(), "but before long");
        assert_eq!(activity.shown(String::new(), String::new(), 1001).until_unix_ms, Some(4_601_000));
        activity.tell(100.0, 2000, 2500, 1001).unwrap();
        let at: Vec<f64> = [999, 1000, 1001, 1999, 2000, 2499, 2500].map(|at_s| activity.at(at_s)).to_vec();
        assert_eq!(at, [0.0, 0.0, 40.0, 40.0, 100.0, 100.0, 0.0], "what is over is forgotten");
        let shares = activity.shares(1700, 300, 900);
        assert_eq!(shares.iter().map(|share| (100.0 * share).round()).collect::<Vec<_>>(), [40.0, 100.0, 100.0, 0.0]);
        let back = Activity::read(&serde_json::to_vec(&activity).unwrap()).unwrap();
        assert_eq!((back.at(2100), back.most), (100.0, 100.0));
        assert!(Activity::read(b"{").is_none() && !activity.is_over(2499) && activity.is_over(2500));
    }

    #[test]
    fn any_rate_is_bounded_and_a_wrong_number_fades() {
        let mut activity = Activity::default();
        (0..10_000).for_each(|now_s| assert!(activity.tell(1.0, now_s, now_s + 3600, now_s).is_ok()));
        assert!(activity.values.len() <= 2, "those of before hold no longer");
        let told: Vec<_> = (0..2000).map(|n| activity.tell(1.0, 20_000 + n, 90_000, 10_000)).collect();
        assert!(told.last().unwrap().as_ref().unwrap_err().contains("1024") && activity.values.len() == MOST);
        let mut activity = Activity::default();
        activity.tell(1e9, 0, 10, 0).unwrap();
        activity.tell(10.0, 100 * 86_400, 101 * 86_400, 100 * 86_400).unwrap();
        assert!(activity.most(100 * 86_400) < 2e8);
        assert_eq!(activity.shares(100 * 86_400, 300, 0).len(), 1);
    }
}
