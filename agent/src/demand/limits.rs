//! What a machine can have at most, and what keeps a promise or a policy from having an effect on it.

use super::State;
use super::machine::{Machine, planned};
use crate::planner::{Amounts, Promise, Refusal, VmId};
use prestage_integration::api::demand::{Mode, Resource, VmPolicy};
use prestage_integration::libvirt::Uuid;

impl Machine {
    /// What its definition lets it have, as libvirt said last; `None`: not limited, or not known.
    fn defined_most(&self, resource: Resource) -> Option<f64> {
        let sample = self.sample.as_ref()?;
        match resource {
            Resource::Cpu => sample.cpu.vcpus_max.map(f64::from),
            Resource::Memory => sample.memory.maximum_bytes.map(|bytes| bytes as f64),
            Resource::Disk | Resource::Network => None,
        }
    }

    /// Why nothing more can be given to it while it runs, where that is known.
    fn cannot_raise(&self, resource: Resource) -> Option<String> {
        let abilities = self.abilities.as_ref()?;
        let ability = match resource {
            Resource::Cpu => &abilities.vcpus.add,
            Resource::Memory if abilities.devices.is_empty() => &abilities.balloon,
            Resource::Memory | Resource::Disk | Resource::Network => return None,
        };
        ability.reason().filter(|_| !ability.is_yes()).map(str::to_owned)
    }

    /// What is odd about the bounds of its policy, in words.
    pub(crate) fn odd_bounds(&self) -> Vec<String> {
        let mut odd = Vec::new();
        for (resource, of) in &self.policy.resources {
            let human = |amount: f64| planned(*resource).human(amount);
            let name = resource.name();
            if let Some(most) = self.defined_most(*resource) {
                if let Some(min) = of.min.filter(|min| *min > most) {
                    let (min, most) = (human(min), human(most));
                    odd.push(format!("{name}: min of {min} is more than its definition allows: {most}"));
                }
                if let Some(max) = of.max.filter(|max| *max > most) {
                    let (max, most) = (human(max), human(most));
                    odd.push(format!("{name}: max of {max} has no effect: its definition allows {most}"));
                }
            }
            let Some(max) = of.max else { continue };
            if let Some(used) = self.base()[*resource as usize].filter(|used| max < *used) {
                let kept = if *resource == Resource::Memory { ", which is not taken from it" } else { "" };
                odd.push(format!("{name}: max of {} is below the {} in use{kept}", human(max), human(used)));
            }
            if *resource == Resource::Cpu && max < 1.0 {
                odd.push(format!("{name}: max of {}: a machine keeps one vCPU at least", human(max)));
            }
        }
        odd
    }
}

impl State {
    /// Whether a machine's policy asks for more than the machine can have.
    ///
    /// # Errors
    /// Which minimum, and what there can be at most. One that was there before is no error: it must be possible to change the rest.
    pub(crate) fn check_policy(&self, uuid: Uuid, policy: &VmPolicy, now_s: u64) -> Result<(), String> {
        let Some(machine) = self.machines.get(&uuid).filter(|machine| machine.is_here(now_s)) else { return Ok(()) };
        for (resource, of) in &policy.resources {
            let (Some(min), Some(most)) = (of.min, machine.defined_most(*resource)) else { continue };
            if min > most && machine.bounds(*resource).min != of.min {
                let human = |amount: f64| planned(*resource).human(amount);
                return Err(format!(
                    "`{}.min` of {} is more than `{}` can have: its definition allows {} at most",
                    resource.name(),
                    human(min),
                    machine.name,
                    human(most)
                ));
            }
        }
        Ok(())
    }

    /// Whether a machine can have what is to be promised to it, beside what it is promised already.
    ///
    /// # Errors
    /// What stands against it, and how much there can be.
    pub(super) fn can_have(&self, uuid: Uuid, promise: &Promise, now_s: u64) -> Result<(), Refusal> {
        // The definition of one that does not run may have changed since.
        let machine = self.machines.get(&uuid).filter(|machine| machine.is_here(now_s));
        let policy = self.policies.get(&uuid);
        let window_s = promise.to_s.saturating_sub(promise.from_s).saturating_sub(1);
        let window_s = u32::try_from(window_s).unwrap_or(u32::MAX);
        for of in Resource::ALL {
            let resource = planned(of);
            let asked = promise.guaranteed[resource];
            let promised = self.reservations.guaranteed(VmId(uuid.as_u128()), resource, promise.from_s, window_s);
            let limits = [
                ("the machine's definition", machine.and_then(|machine| machine.defined_most(of))),
                ("its policy", policy.and_then(|policy| policy.resources.get(&of)?.max)),
            ];
            for (by, most) in limits {
                if let Some(most) = most.filter(|most| asked > 0.0 && asked + promised > *most) {
                    return Err(Refusal::Machine { resource, asked, promised, by, most });
                }
            }
        }
        Ok(())
    }

    /// Why a promise changes nothing in its machine although its room is kept; empty where it does, or need not.
    pub(super) fn without_effect(&self, uuid: Uuid, guaranteed: &Amounts, now_s: u64) -> Vec<String> {
        let Some(machine) = self.machines.get(&uuid).filter(|machine| machine.is_here(now_s)) else {
            let why = match &self.turns.trouble {
                Some(_) => "libvirt does not answer",
                None => "the machine does not run",
            };
            return vec![format!("{why}; its room is kept")];
        };
        let mut notes = Vec::new();
        for of in [Resource::Cpu, Resource::Memory] {
            let asked = guaranteed[planned(of)];
            if asked <= 0.0 || machine.allocated(of).is_some_and(|has| has >= asked) {
                continue;
            }
            let why = match machine.policy.mode_of(of) {
                Mode::Act => machine.cannot_raise(of),
                mode => Some(format!("mode {}", mode.name())),
            };
            notes.extend(why.map(|why| format!("{}: nothing is changed: {why}; the room is kept", of.name())));
        }
        notes
    }
}
