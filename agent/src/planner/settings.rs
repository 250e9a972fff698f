//! How careful the planner is.

use super::{Amounts, Resource};
use serde::{Deserialize, Serialize};

/// How one resource is planned. Shares are of what is in use or allocated; amounts are in the resource's unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// Least that is kept free above what is in use, as a share of it, also while the host is short.
    pub margin: f64,
    /// Kept free otherwise, as a share of what is in use.
    pub headroom: f64,
    /// And this much on top of it, whatever is in use.
    pub slack: f64,
    /// The share of headroom and slack that is free when more is given: small growth changes nothing.
    pub worn: f64,
    /// Share of time that work waits (PSI some, avg10) from which on there is pressure.
    pub pressure: f64,
    /// Under pressure what is allocated grows by this factor, and by its square, cube, … while it lasts.
    pub boost: f64,
    /// The highest use of this many seconds counts as in use when lowering.
    pub window_s: u32,
    /// Seconds after a change before the next lowering; doubles with each one that was regretted.
    pub cool_down_s: u32,
    /// Most that is taken at once, as a share of what is allocated.
    pub lower_step: f64,
    /// Changes of less than this share of what is allocated are not worth it.
    pub dead: f64,
    /// Seconds after which a figure is too old to lower anything by it.
    pub stale_s: u32,
    /// Seconds that a change may take to be read back.
    pub settle_s: u32,
    /// Share of the host that is kept for machines that need less than their fair share of it.
    pub spare: f64,
    /// Share of the host that is kept free for what is needed at once: idle machines give up theirs for it, and
    /// forecasts do not reach it. At least `spare`.
    pub pool: f64,
    /// What a machine keeps above what it uses, as a share of the largest rise that it lately made while a change takes
    /// effect. If not 0, pressure raises by that rise at least.
    pub reserve: f64,
    /// Amounts are multiples of this.
    pub grain: f64,
}

/// How the planner plans.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Probability, 0.0001 to 0.5, with which demand may exceed what is given for what is foreseen.
    pub risk: f64,
    /// By [`Resource`].
    pub rules: [Rule; 4],
    /// Most changes of a machine's resource in any hour is twice this: so many come back in an hour, so many can be
    /// saved up.
    pub changes_per_hour: u32,
    /// Seconds before its window in which a reservation is already provided for.
    pub lead_s: u32,
    /// Seconds before a refusal or a recommendation that has not changed is repeated.
    pub repeat_s: u32,
}

const MIB: f64 = (1 << 20) as f64;

impl Settings {
    /// The rule of a resource.
    #[must_use]
    pub const fn rule(&self, resource: Resource) -> &Rule {
        &self.rules[resource as usize]
    }

    /// What is out of range, in words.
    ///
    /// # Errors
    /// The first mistake: which value, of which resource, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        if !(1e-4..=0.5).contains(&self.risk) {
            return Err(format!("risk is {}; it is 0.0001 to 0.5", self.risk));
        }
        if !(2..=3600).contains(&self.changes_per_hour) {
            return Err(format!("changes_per_hour is {}; it is 2 to 3600", self.changes_per_hour));
        }
        for (resource, rule) in super::RESOURCES.iter().zip(&self.rules) {
            let ranges = [
                ("margin", rule.margin, 0.0, 10.0),
                ("headroom", rule.headroom, 0.0, 10.0),
                ("slack", rule.slack, 0.0, f64::MAX),
                ("worn", rule.worn, 0.0, 1.0),
                ("pressure", rule.pressure, 1e-6, 1.0),
                ("boost", rule.boost, 1.01, 100.0),
                ("lower_step", rule.lower_step, 1e-3, 1.0),
                ("dead", rule.dead, 1e-3, 0.5),
                ("spare", rule.spare, 0.0, 0.9),
                ("pool", rule.pool, 0.0, 0.9),
                ("reserve", rule.reserve, 0.0, 10.0),
                ("grain", rule.grain, 1e-9, f64::MAX),
            ];
            for (name, value, low, high) in ranges {
                if !(low..=high).contains(&value) {
                    return Err(format!("{name} of {resource} is {value}; it is {low} to {high:.0}"));
                }
            }
            if rule.window_s == 0 || rule.cool_down_s == 0 || rule.settle_s == 0 {
                return Err(format!("window_s, cool_down_s and settle_s of {resource} are at least 1"));
            }
        }
        Ok(())
    }
}

impl Default for Settings {
    fn default() -> Self {
        let cpu = Rule {
            margin: 0.01,
            headroom: 0.15,
            slack: 0.1,
            worn: 0.7,
            pressure: 0.1,
            boost: 2.0,
            window_s: 1800,
            cool_down_s: 300,
            lower_step: 0.5,
            dead: 0.05,
            stale_s: 30,
            settle_s: 10,
            spare: 0.0,
            pool: 0.0,
            reserve: 0.0,
            grain: 0.01,
        };
        // A balloon takes 5 s and more to inflate: some is kept ready. Swapping costs more than waiting for a core.
        let memory = Rule {
            slack: 64.0 * MIB,
            pressure: 0.05,
            lower_step: 0.3,
            settle_s: 60,
            spare: 0.015,
            pool: 0.1,
            reserve: 0.2,
            grain: 16.0 * MIB,
            ..cpu
        };
        let rate = Rule { headroom: 0.5, slack: MIB, grain: 64.0 * 1024.0, ..cpu };
        Self { risk: 0.1, rules: [cpu, memory, rate, rate], changes_per_hour: 60, lead_s: 120, repeat_s: 600 }
    }
}

/// Rounded to grains: up where `up`, else down; never beyond what is exact.
pub(super) fn round(amount: f64, grain: f64, up: bool) -> f64 {
    // What is within a millionth of a grain is on it: sums of grains are not exact.
    let grains = amount / grain;
    let near = grains.round();
    let whole = if (grains - near).abs() < 1e-6 {
        near
    } else if up {
        grains.ceil()
    } else {
        grains.floor()
    };
    whole * grain
}

/// The whole of what may be promised of `capacity`: all of it.
pub(super) fn sound_capacity(capacity: &Amounts, resource: Resource) -> f64 {
    let capacity = capacity[resource];
    if capacity.is_finite() { capacity.max(0.0) } else { 0.0 }
}
