//! What is remembered of a machine's resource from round to round: 256 bytes or so.

use super::decision::{Kind, Reason};
use super::settings::Rule;
use serde::{Deserialize, Serialize};

/// The window in parts: a peak leaves it within an eighth of it too late, never too early.
const PARTS: usize = 9;
/// Growth is looked at so often, seconds.
const GROWTH_S: u64 = 600;
/// A rise counts half after so many seconds.
const RISE_HALF_LIFE_S: f64 = 86_400.0;
/// Highest doubling of the cool-down: 32 times.
const REGRETS_MAX: u8 = 5;

/// A change that was asked for and is not read back yet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Ask {
    from: f64,
    to: f64,
    at_s: u64,
    /// Raised under pressure.
    #[serde(default)]
    pressed: bool,
}

/// What became of the last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing is under way.
    Settled,
    /// It may still come.
    Pending,
    /// It has not come in time, just now.
    Failed,
    /// It did not come, and it is too soon to try again.
    Waiting,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Track {
    peaks: [f64; PARTS],
    /// Number of the newest part since the epoch.
    part: u64,
    /// Without a gap since, Unix seconds.
    since_s: u64,
    seen_s: u64,
    changed_s: u64,
    lowered_s: Option<u64>,
    pressed_s: Option<u64>,
    /// Raises under pressure in a row.
    pub(super) presses: u8,
    regrets: u8,
    /// Changes saved up.
    tokens: Option<f64>,
    tokens_s: u64,
    ask: Option<Ask>,
    failures: u8,
    retry_s: u64,
    /// What failed last was a lowering.
    #[serde(default)]
    kept: bool,
    /// Lowest use of this stretch of [`Rule::settle_s`] and of the one before, and this one's number.
    lows: [f64; 2],
    stretch: u64,
    rise: f64,
    growth_part: u64,
    growth_peak: f64,
    growth_last: f64,
    growth_from: f64,
    growth_rises: u8,
    #[serde(skip)]
    said: Option<(Kind, Reason, f64, u64)>,
}

impl Track {
    /// Takes in a measurement of what is in use.
    pub(super) fn observe(&mut self, now_s: u64, used: f64, rule: &Rule) {
        let length = u64::from(rule.window_s).div_ceil(PARTS as u64 - 1).max(1);
        let part = now_s / length;
        // What nobody watched was not idle.
        if self.seen_s == 0 || now_s.saturating_sub(self.seen_s) > length.max(u64::from(rule.stale_s)) {
            self.since_s = now_s;
            self.peaks = [0.0; PARTS];
        } else {
            for passed in (self.part + 1..=part).take(PARTS) {
                self.peaks[(passed % PARTS as u64) as usize] = 0.0;
            }
        }
        self.part = part;
        self.observe_rise(now_s, used, rule);
        self.seen_s = now_s;
        let newest = &mut self.peaks[(part % PARTS as u64) as usize];
        *newest = newest.max(used);

        let part = now_s / GROWTH_S;
        if part != self.growth_part {
            if part == self.growth_part + 1 && self.growth_peak > self.growth_last * 1.02 {
                self.growth_rises = self.growth_rises.saturating_add(1);
            } else {
                (self.growth_rises, self.growth_from) = (0, self.growth_peak);
            }
            (self.growth_part, self.growth_last, self.growth_peak) = (part, self.growth_peak, used);
        }
        self.growth_peak = self.growth_peak.max(used);
    }

    /// Follows the lowest use, and how far use is above it.
    fn observe_rise(&mut self, now_s: u64, used: f64, rule: &Rule) {
        let length = u64::from(rule.settle_s).max(1);
        let stretch = now_s / length;
        if stretch != self.stretch {
            let next = self.seen_s != 0 && stretch == self.stretch + 1;
            self.lows = [used, if next { self.lows[0] } else { used }];
            let passed_s = (stretch.saturating_sub(self.stretch) * length) as f64;
            self.rise *= (-passed_s / RISE_HALF_LIFE_S).exp2();
            self.stretch = stretch;
        }
        self.lows[0] = self.lows[0].min(used);
        self.rise = self.rise.max(used - self.lows[0].min(self.lows[1]));
    }

    /// The largest rise within the time that a change may take; one of a day ago counts half.
    pub(super) fn rise(&self) -> f64 {
        self.rise
    }

    /// Highest use of the window, or of as much of it as was watched.
    pub(super) fn peak(&self) -> f64 {
        self.peaks.iter().copied().fold(0.0, f64::max)
    }

    /// Whether a whole window was watched.
    pub(super) fn watched(&self, now_s: u64, rule: &Rule) -> bool {
        self.seen_s != 0 && now_s.saturating_sub(self.since_s) >= u64::from(rule.window_s)
    }

    /// An hour of new highs, each above the one before, and half as much again in all.
    pub(super) fn grows(&self) -> bool {
        self.growth_rises >= 6 && self.growth_last > 1.5 * self.growth_from
    }

    /// Work waits: whoever lowered within the window before was wrong.
    pub(super) fn press(&mut self, now_s: u64, rule: &Rule) {
        if self.lowered_s.is_some_and(|at| now_s.saturating_sub(at) <= u64::from(rule.window_s)) {
            self.regrets = (self.regrets + 1).min(REGRETS_MAX);
            self.lowered_s = None;
        }
        self.pressed_s = Some(now_s);
    }

    /// No pressure: the row of raises is over, and long calm makes up for regrets.
    pub(super) fn calm(&mut self, now_s: u64, rule: &Rule) {
        let Some(at) = self.pressed_s else { return };
        let calm_s = now_s.saturating_sub(at);
        if calm_s > u64::from(rule.settle_s) {
            self.presses = 0;
        }
        if calm_s >= 4 * u64::from(rule.window_s) {
            self.regrets = self.regrets.saturating_sub(1);
            self.pressed_s = if self.regrets > 0 { Some(now_s) } else { None };
        }
    }

    /// Whether the last change is long enough ago for a lowering. While the host waits, it is for a machine that has not been pressed
    /// and whose last lowering was not regretted.
    pub(super) fn cooled(&self, now_s: u64, rule: &Rule, host_waits: bool) -> bool {
        if host_waits && self.regrets == 0 && self.pressed_s.is_none() {
            return true;
        }
        let wait_s = u64::from(rule.cool_down_s) << self.regrets;
        now_s.saturating_sub(self.changed_s.max(self.pressed_s.unwrap_or(0))) >= wait_s
    }

    /// Compares what was asked for with what is read back.
    pub(super) fn settle(&mut self, now_s: u64, allocated: f64, rule: &Rule) -> Change {
        if let Some(ask) = self.ask {
            let tolerance = (0.01 * ask.to.abs()).max(0.5 * rule.grain);
            if (allocated - ask.to).abs() <= tolerance || (ask.from < ask.to) == (allocated > ask.to) {
                self.ask = None;
                self.failures = 0;
            } else if now_s.saturating_sub(ask.at_s) < u64::from(rule.settle_s) {
                return Change::Pending;
            } else {
                self.ask = None;
                if ask.to < ask.from {
                    // What could not be taken is in use there, whatever the figures say.
                    self.regrets = (self.regrets + 1).min(REGRETS_MAX);
                }
                // Part of it has come: that is no failure.
                if (allocated - ask.from).abs() <= tolerance {
                    self.failures = (self.failures + 1).min(6);
                    self.kept = ask.to < ask.from;
                    self.retry_s = now_s + (u64::from(rule.settle_s) << self.failures);
                    return Change::Failed;
                }
            }
        }
        if self.failures > 0 && now_s < self.retry_s { Change::Waiting } else { Change::Settled }
    }

    /// What may still come of the last change, if anything is under way.
    pub(super) fn asked(&self) -> Option<f64> {
        self.ask.map(|ask| ask.to)
    }

    /// What failed last was a lowering: it says nothing of a raise.
    pub(super) fn kept(&self) -> bool {
        self.kept
    }

    /// Seconds until what failed is tried again.
    pub(super) fn retry_in_s(&self, now_s: u64) -> u64 {
        self.retry_s.saturating_sub(now_s)
    }

    /// Changes that may still be made now.
    pub(super) fn tokens(&mut self, now_s: u64, per_hour: u32) -> f64 {
        let most = f64::from(per_hour);
        let passed_s = now_s.saturating_sub(self.tokens_s) as f64;
        self.tokens_s = now_s;
        let now = self.tokens.map_or(most, |had| (had + passed_s * most / 3600.0).min(most));
        self.tokens = Some(now);
        now
    }

    /// Remembers a change that is to be made, under pressure or not.
    pub(super) fn changed(&mut self, now_s: u64, from: f64, to: f64, pressed: bool) {
        if pressed {
            self.presses = (self.presses + 1).min(16);
        }
        self.tokens = self.tokens.map(|had| had - 1.0);
        self.ask = Some(Ask { from, to, at_s: now_s, pressed });
        self.changed_s = now_s;
        if to < from {
            self.lowered_s = Some(now_s);
        }
    }

    /// The change is not made after all.
    pub(super) fn withdraw(&mut self) {
        let Some(ask) = self.ask.take() else { return };
        self.tokens = self.tokens.map(|had| had + 1.0);
        if ask.to < ask.from {
            self.lowered_s = None;
        }
        if ask.pressed {
            self.presses = self.presses.saturating_sub(1);
        }
    }

    /// Whether this is news: not what was said last, or that long ago.
    pub(super) fn news(&mut self, now_s: u64, kind: Kind, reason: Reason, to: f64, repeat_s: u32) -> bool {
        let known = self.said.is_some_and(|(last, why, there, at)| {
            (last, why) == (kind, reason)
                && (there - to).abs() <= 0.1 * there.abs()
                && now_s.saturating_sub(at) < u64::from(repeat_s)
        });
        if !known {
            self.said = Some((kind, reason, to, now_s));
        }
        !known
    }
}
