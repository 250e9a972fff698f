//! A round of planning: all machines, resource by resource.

use super::decision::{Decision, Kind, Numbers, Reason};
use super::settings::{round, sound_capacity};
use super::share::{Claim, share};
use super::track::Track;
use super::want::{Common, Want, want};
use super::{Input, RESOURCES, Resource, Rule, Settings, Vm, VmId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Seconds after which a machine that is no longer there is forgotten: a restart or a migration to and fro is not the
/// end.
const FORGET_S: u64 = 86_400;

/// A clock that was set back by more than this is followed; by less, it stands still for so long.
const SET_BACK_S: u64 = 60;

/// What is remembered between rounds. Serialisable: cool-downs and regrets outlive a restart.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Planner {
    settings: Settings,
    memory: BTreeMap<VmId, Remembered>,
    now_s: u64,
    #[serde(skip)]
    scratch: Scratch,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Remembered {
    seen_s: u64,
    tracks: [Track; 4],
}

#[derive(Debug, Clone, Default)]
struct Scratch {
    wants: Vec<Want>,
    claims: Vec<Claim>,
    given: Vec<f64>,
}

/// One round without a past: what would be decided for machines never seen before. Nothing is lowered, since nothing
/// was watched for long enough.
#[must_use]
pub fn plan(input: &Input<'_>, settings: &Settings) -> Vec<Decision> {
    Planner::new(*settings).plan(input)
}

impl Planner {
    /// Plans by `settings`, which [`Settings::check`] has passed.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// From the next round on. What was learned of the machines stays.
    pub fn set_settings(&mut self, settings: Settings) {
        self.settings = settings;
    }

    /// A change that was decided is not made: nothing of it is to be waited for.
    pub fn withdraw(&mut self, vm: VmId, resource: Resource) {
        if let Some(remembered) = self.memory.get_mut(&vm) {
            remembered.tracks[resource as usize].withdraw();
        }
    }

    /// Decides a round. What is held or refused is told once, and again when it changes or after
    /// [`Settings::repeat_s`]; what is recommended or observed likewise.
    ///
    /// Raises of machines in [`super::Mode::Act`] never exceed what is free now: room that lowerings make is given out
    /// in a later round, once it is read back; for what takes effect at once (all but memory) in the same. The caller
    /// carries out lowerings first.
    pub fn plan(&mut self, input: &Input<'_>) -> Vec<Decision> {
        if input.now_s.saturating_add(SET_BACK_S) < self.now_s {
            // All times that are remembered are to come, and nothing would change until they have: it is learned anew.
            self.memory.clear();
            self.now_s = input.now_s;
        }
        self.now_s = self.now_s.max(input.now_s);
        let now_s = self.now_s;
        for vm in input.vms {
            self.memory.entry(vm.id).or_default().seen_s = now_s;
        }
        self.memory.retain(|_, remembered| now_s - remembered.seen_s <= FORGET_S);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut decisions = Vec::new();
        for resource in RESOURCES {
            self.resource(input, resource, &mut scratch, &mut decisions);
        }
        self.scratch = scratch;
        decisions
    }

    fn resource(&mut self, input: &Input<'_>, resource: Resource, scratch: &mut Scratch, out: &mut Vec<Decision>) {
        let Scratch { wants, claims, given } = scratch;
        let (now_s, settings) = (self.now_s, self.settings);
        let promised = input.reservations;
        let managed = sound_capacity(&input.host.capacity, resource);
        if managed <= 0.0 {
            return;
        }
        let present = |vm| self.memory.get(&vm).is_some_and(|remembered| remembered.seen_s == now_s);
        let mut capacity = managed - promised.unclaimed(resource, now_s, settings.lead_s, present);
        // Others than memory are shared anew every moment: that the host waits for them is what sharing means.
        let pressure = input.host.pressure[resource as usize].some;
        let host_waits = !resource.compressible() && pressure >= settings.rule(resource).pressure;
        wants.clear();
        for (index, vm) in input.vms.iter().enumerate() {
            let floor = vm.policy.min[resource].max(promised.guaranteed(vm.id, resource, now_s, settings.lead_s));
            let floor = if floor.is_finite() { floor.max(0.0) } else { 0.0 };
            let Some(reading) = &vm.readings[resource as usize] else {
                // What it has is not known; what it was promised is not given away.
                capacity -= floor;
                continue;
            };
            let Some(remembered) = self.memory.get_mut(&vm.id) else { continue };
            let common = Common { now_s, settings: &settings, resource, host_waits };
            wants.push(want(common, index, vm, reading, floor, &mut remembered.tracks[resource as usize]));
        }
        let capacity = capacity.max(0.0);
        let rule = settings.rule(resource);
        let spare = rule.spare * capacity;
        let pool = (rule.pool * capacity).max(spare);
        cap_runaways(wants, input.vms, capacity);

        // First what each should end up with, if all changes were done at once …
        let wanted: f64 = wants.iter().map(|want| want.goal.max(want.hold)).sum();
        let short = wanted > capacity - pool;
        if short {
            claims.clear();
            claims.extend(wants.iter().map(|want| want.claim(&input.vms[want.vm])));
            share(capacity, spare, pool, claims, given);
        } else {
            given.clear();
            given.extend(wants.iter().map(|want| want.goal.max(want.hold.min(want.before))));
        }
        for (want, to) in wants.iter().zip(given.iter_mut()) {
            if *to < want.before && want.before - *to < least(want, *to, rule) {
                *to = want.before;
            }
        }
        // … then what can be raised now: only what nobody has, or may still have, is free.
        let lowers = |want: &Want, to: f64| {
            want.act && !want.frozen && want.missing.is_none() && to < want.before && resource.compressible()
        };
        let base = |want: &Want, to: f64| if lowers(want, to) { to } else { want.taken };
        let free = capacity - wants.iter().zip(given.iter()).map(|(want, to)| base(want, *to)).sum::<f64>();
        let raises: f64 = wants.iter().zip(given.iter()).map(|(want, to)| (to - base(want, *to)).max(0.0)).sum();
        if raises > free - pool {
            claims.clear();
            claims.extend(wants.iter().zip(given.iter()).map(|(want, to)| {
                let base = base(want, *to);
                let goal = if want.act && !want.frozen { to.max(base) } else { base };
                Claim { base, need: want.need.clamp(base, goal), goal, ..want.claim(&input.vms[want.vm]) }
            }));
            let lowered: Vec<f64> = given.clone();
            share(capacity, spare, pool, claims, given);
            for ((want, to), lowered) in wants.iter().zip(given.iter_mut()).zip(lowered) {
                // Memory that is to be taken away still counts as had above.
                if lowered < want.before {
                    *to = lowered;
                } else if *to > want.before {
                    *to = round(*to, rule.grain, false).max(want.before);
                }
            }
        }
        for (want, to) in wants.iter().zip(given.iter()) {
            let vm = &input.vms[want.vm];
            let Some(remembered) = self.memory.get_mut(&vm.id) else { continue };
            let track = &mut remembered.tracks[resource as usize];
            let numbers = Numbers {
                used: vm.readings[resource as usize].map_or(0.0, |reading| reading.used),
                window_peak: track.peak(),
                foreseen: want.foreseen,
                floor: want.floor,
                cap: want.cap,
                wanted: want.goal,
                free: free.max(0.0),
                pressure: vm.readings[resource as usize].map_or(0.0, |reading| reading.pressure.some),
                again_s: want.again_s,
            };
            if want.missing.is_some() && !vm.abilities.known {
                continue;
            }
            // What cannot or is not to be done counts as had above, and is told all the same.
            let told = want.goal < want.before && (!want.act || want.missing.is_some());
            let to = if told { want.goal } else { *to };
            let (kind, reason, to) = outcome(want, to, rule);
            let change = matches!(kind, Kind::Raise | Kind::Lower);
            if change && want.act {
                track.changed(now_s, want.before, to, matches!(reason, Reason::Pressure | Reason::Oom));
            } else {
                // That all is well is no news.
                let quiet = kind == Kind::Hold && reason == Reason::Use;
                if quiet || !track.news(now_s, kind, reason, to, settings.repeat_s) {
                    continue;
                }
            }
            out.push(Decision {
                vm: vm.id,
                resource,
                kind,
                reason,
                before: want.before,
                to,
                mode: vm.policy.mode[resource as usize],
                numbers,
                runaway: want.runaway,
                missing: if reason == Reason::Unable { want.missing } else { None },
            });
        }
    }
}

/// The smallest change worth making: who goes short gets what there is, however little.
fn least(want: &Want, to: f64, rule: &Rule) -> f64 {
    let urgent = if to > want.before {
        want.reason != Reason::Foreseen
    } else {
        (want.precise && want.goal >= want.before) || want.reason == Reason::Maximum
    };
    if urgent { 0.5 * rule.grain } else { (rule.dead * want.before).max(0.5 * rule.grain) }
}

/// What a wish and what there is for it come to.
fn outcome(want: &Want, to: f64, rule: &Rule) -> (Kind, Reason, f64) {
    let before = want.before;
    let wished_up = want.goal > before + 0.5 * rule.grain;
    let moved = (to - before).abs() >= least(want, to, rule);
    if want.frozen {
        let kind = if wished_up { Kind::Refuse } else { Kind::Hold };
        return (kind, want.reason, before);
    }
    if !moved {
        return match () {
            () if wished_up => (Kind::Refuse, Reason::Shortage, before),
            () => (Kind::Hold, want.reason, before),
        };
    }
    if want.missing.is_some() {
        // What the policy forbids is to go, and whoever wrote it is to know that it does not.
        let needed = wished_up || want.reason == Reason::Maximum;
        return (if needed { Kind::Refuse } else { Kind::Hold }, Reason::Unable, before);
    }
    if to > before {
        (Kind::Raise, want.reason, to)
    } else {
        let reason = if want.goal < before { want.reason } else { Reason::Shortage };
        (Kind::Lower, reason, to)
    }
}

/// While the host is short, a machine that grows without end is held to its share by weight, its floor and what it
/// holds.
fn cap_runaways(wants: &mut [Want], vms: &[Vm], capacity: f64) {
    if !wants.iter().any(|want| want.runaway) || wants.iter().map(|want| want.goal).sum::<f64>() <= capacity {
        return;
    }
    let weight = |want: &Want| vms[want.vm].policy.weight.clamp(1e-6, 1e6);
    let all: f64 = wants.iter().map(weight).sum();
    for want in wants.iter_mut().filter(|want| want.runaway) {
        let share = (capacity * weight(want) / all).max(want.floor).max(want.hold);
        want.goal = want.goal.min(share);
        want.need = want.need.min(share);
    }
}
