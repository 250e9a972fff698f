//! What one machine should have of a resource, its neighbours aside.

use super::decision::Reason;
use super::settings::{Settings, round};
use super::share::Claim;
use super::track::{Change, Track};
use super::{Mode, Reading, Resource, Vm};

/// The last changes of an hour raise to the most there is, so that no more are needed.
const LAST_CHANGES: f64 = 3.0;
/// Share of an hour's changes that is kept for raises by use and pressure: forecasts and lowerings wait.
const KEPT_CHANGES: f64 = 0.4;

/// One machine's part of a round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Want {
    /// Index of the machine in the input.
    pub(super) vm: usize,
    /// What it has, as read back.
    pub(super) before: f64,
    /// What it may have by the time a change under way is done: the more of the two.
    pub(super) taken: f64,
    pub(super) floor: f64,
    pub(super) cap: f64,
    /// What must not be taken from it.
    pub(super) hold: f64,
    /// What it needs now, with its margin.
    pub(super) need: f64,
    /// And what it is likely to need within the next minute.
    pub(super) likely: f64,
    /// What it should have.
    pub(super) goal: f64,
    /// Why the goal is what it is.
    pub(super) reason: Reason,
    pub(super) foreseen: Option<f64>,
    /// Nothing may be changed in this round.
    pub(super) frozen: bool,
    /// Seconds until what is held back for now is tried again.
    pub(super) again_s: Option<u64>,
    pub(super) missing: Option<&'static str>,
    pub(super) runaway: bool,
    pub(super) act: bool,
    /// Little is taken as easily as much; a balloon is not moved for a trifle.
    pub(super) precise: bool,
}

impl Want {
    pub(super) fn claim(&self, vm: &Vm) -> Claim {
        Claim {
            base: self.hold,
            need: self.need.min(self.goal),
            likely: self.likely.min(self.before).min(self.goal),
            keep: self.before.min(self.goal),
            goal: self.goal,
            priority: vm.policy.priority,
            weight: vm.policy.weight,
        }
    }
}

/// What all machines of a round have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Common<'a> {
    pub(super) now_s: u64,
    pub(super) settings: &'a Settings,
    pub(super) resource: Resource,
    /// The host itself waits for this resource, and giving more makes it wait more.
    pub(super) host_waits: bool,
}

/// The wish of machine number `index`, which has `floor` guaranteed for now.
pub(super) fn want(
    common: Common<'_>,
    index: usize,
    vm: &Vm,
    reading: &Reading,
    floor: f64,
    track: &mut Track,
) -> Want {
    let Common { now_s, settings, resource, host_waits } = common;
    let rule = settings.rule(resource);
    let at = resource as usize;
    let policy = &vm.policy;
    let most = if policy.max[resource].is_finite() { policy.max[resource].max(0.0) } else { f64::MAX };
    let cap = most.max(if floor.is_finite() { floor } else { 0.0 });
    // An unlimited machine has all that it may have.
    let before = if reading.allocated.is_finite() { reading.allocated.max(0.0) } else { cap };
    let above = before > cap + 0.5 * rule.grain;
    let fresh = reading.age_s <= rule.stale_s && reading.used.is_finite() && reading.used >= 0.0;
    let used = if fresh { reading.used } else { 0.0 };
    let margin = policy.margin[at].filter(|m| m.is_finite() && *m >= 0.0).unwrap_or(rule.margin);
    let headroom = rule.headroom.max(margin);
    let with_room = |used: f64, part: f64| used + part * (used * headroom + rule.slack);
    let limit = |amount: f64| round(amount, rule.grain, true).clamp(floor.min(cap), cap);

    if fresh {
        track.observe(now_s, used, rule);
    }
    let pressed = reading.oom || reading.pressure.some >= rule.pressure;
    if pressed {
        track.press(now_s, rule)
    } else {
        track.calm(now_s, rule)
    }
    let change = track.settle(now_s, before, rule);
    let tokens = track.tokens(now_s, settings.changes_per_hour);
    let taken = track.asked().map_or(before, |asked| asked.max(before));
    let lowers = track.asked().is_some_and(|asked| asked < before);

    let foreseen = reading.outlook.as_ref().and_then(|outlook| outlook.at_risk(settings.risk));
    let rest = reading.rest.as_ref().and_then(|rest| rest.at_risk(settings.risk));
    let least = limit(used * (1.0 + margin));
    let likely = limit(used * (1.0 + margin) + rule.reserve * track.rise());
    let rise = if rule.reserve > 0.0 { track.rise() } else { 0.0 };
    let mut goal = before;
    let mut reason = Reason::CoolDown;
    let (mut frozen, mut again_s) = (false, None);

    // The strongest reason last.
    let mut raise = |to: f64, why: Reason| {
        // So near to the most there is, the rest is given too.
        let to = if limit(to) > (1.0 - rule.dead) * cap { cap } else { limit(to) };
        if to >= goal && to > before {
            (goal, reason) = (to, why);
        }
    };
    let kept = (KEPT_CHANGES * f64::from(settings.changes_per_hour)).max(LAST_CHANGES + 1.0);
    // What may be needed later is not given while what is needed now waits.
    if let Some(foreseen) = foreseen
        && !host_waits
        && tokens >= kept
        && foreseen > before * (1.0 + rule.dead)
    {
        raise(foreseen, Reason::Foreseen);
    }
    if fresh && with_room(used, rule.worn) > before {
        raise(with_room(used, 1.0), Reason::Use);
    }
    if pressed {
        let boosted = before.max(rule.grain) * rule.boost.powi(i32::from(track.presses) + 1);
        raise(
            boosted.max(before + rise).max(foreseen.unwrap_or(0.0)),
            if reading.oom { Reason::Oom } else { Reason::Pressure },
        );
    }
    if before + 0.5 * rule.grain < floor {
        raise(floor, Reason::Floor);
    }
    // What a machine that goes short needs is not seen: half of what it is raised by counts as that, the rest takes nothing
    // from others.
    let need = if pressed {
        let boosted = before.max(rule.grain) * 0.5 * (1.0 + rule.boost);
        limit(boosted.max(before + 0.5 * rise)).max(least)
    } else {
        least
    };
    if goal > before && tokens < LAST_CHANGES {
        goal = cap;
    }

    if above {
        (goal, reason) = (cap, Reason::Maximum);
    } else if goal <= before {
        let keep = limit(with_room(track.peak(), 1.0))
            .max(likely)
            .max(limit(f64::max(foreseen.unwrap_or(0.0), rest.unwrap_or(0.0))));
        if !fresh {
            reason = Reason::Stale;
        } else if before > keep * (1.0 + rule.dead) + rule.grain {
            reason = if policy.never_lower[at] {
                Reason::NeverLower
            } else if pressed || !track.watched(now_s, rule) || !track.cooled(now_s, rule, host_waits) {
                Reason::CoolDown
            } else if tokens < kept {
                Reason::Changes
            } else {
                goal = keep.max(limit(before * (1.0 - rule.lower_step)));
                Reason::Idle
            };
        } else {
            reason = Reason::Use;
        }
    }
    match change {
        // Use and pressure go on growing while the last raise is under way; all else waits for it. No raise waits for a lowering.
        Change::Pending if goal > taken && (pressed || reason == Reason::Use || lowers) => {}
        Change::Pending => {
            frozen = true;
            if goal > before {
                reason = Reason::UnderWay;
            }
        }
        // What could not be taken says nothing of what can be given.
        Change::Failed | Change::Waiting if goal > before && track.kept() => {}
        Change::Failed | Change::Waiting => {
            (reason, frozen, again_s) = (Reason::NoEffect, true, Some(track.retry_in_s(now_s)));
        }
        Change::Settled => {}
    }
    if tokens < 1.0 {
        let wait_s = (1.0 - tokens) * 3600.0 / f64::from(settings.changes_per_hour.max(1));
        (reason, frozen, again_s) = (Reason::Changes, true, Some(wait_s.ceil() as u64));
    }
    let raising = goal > before;
    let missing =
        if raising { vm.abilities.missing_to_raise(resource) } else { vm.abilities.missing_to_lower(resource) };
    // Whether it is there will be known in a moment.
    frozen |= missing.is_some() && !vm.abilities.known;
    let act = policy.mode[resource as usize] == Mode::Act;
    let fixed = policy.never_lower[at]
        || !act
        || !fresh
        || vm.abilities.missing_to_lower(resource).is_some()
        || change != Change::Settled
        || tokens < LAST_CHANGES + 1.0;
    let floor = floor.min(cap);
    let hold = if above {
        cap
    } else if fixed {
        before.max(floor)
    } else if resource.compressible() {
        floor
    } else {
        before.min(least).max(floor)
    };
    Want {
        vm: index,
        before,
        taken,
        floor,
        cap,
        hold,
        need,
        likely,
        goal,
        reason,
        foreseen,
        frozen,
        again_s,
        missing,
        runaway: track.grows(),
        act,
        precise: resource.compressible(),
    }
}
