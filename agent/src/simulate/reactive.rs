//! Rules that react: as oVirt's MOM and as Proxmox' auto-ballooning do by default.

use super::policy::{HostSeen, Policy, Resource, Seen, Target};

/// Both look every 10 s and aim at a fifth of the host being free.
const LOOP_S: u64 = 10;
const FREE: f64 = 0.2;

/// oVirt MOM: while less than 20 % of the host is free, machines shrink by at most 5 % a loop down to what they use and
/// a fifth of it; otherwise they grow by 5 % up to what was provisioned. MOM has this rule for balloons; here CPU
/// quotas follow it too.
#[derive(Debug)]
pub(super) struct Mom;

impl Policy for Mom {
    fn name(&self) -> String {
        "reactive, as oVirt MOM".to_owned()
    }

    fn loop_s(&self) -> u64 {
        LOOP_S
    }

    fn decide(&mut self, _: u64, host: &HostSeen, seen: &[Seen], targets: &mut [Target]) {
        let rule = |r: &Resource, free: f64| {
            if free < FREE {
                // Never grows under pressure, never shrinks below what is used and a fifth of it.
                Some((r.have * 0.95).max(r.used * 1.2).min(r.have))
            } else {
                Some((r.have * 1.05).min(r.provisioned))
            }
        };
        for (seen, target) in seen.iter().zip(targets) {
            *target = Target { cpu: rule(&seen.cpu, host.cpu_free), memory: rule(&seen.memory, host.memory_free) };
        }
    }
}

/// Proxmox VE: the host is kept at 80 % by steps of at most 100 MiB a machine and loop. What is too much is taken from
/// machines with a quarter of their memory free, in proportion to it; what is left is given first to those with less
/// free. CPU is left as provisioned. Kinder than the original in two ways: a machine's minimum, which an operator has
/// to set there, is what it uses and a tenth of it; and machines with less than a tenth free grow up to a host of 95 %.
#[derive(Debug)]
pub(super) struct Proxmox;

const STEP: f64 = 100.0 * 1048576.0;
const FULL: f64 = 0.05;

impl Policy for Proxmox {
    fn name(&self) -> String {
        "reactive, as Proxmox VE".to_owned()
    }

    fn loop_s(&self) -> u64 {
        LOOP_S
    }

    fn decide(&mut self, _: u64, host: &HostSeen, seen: &[Seen], targets: &mut [Target]) {
        let given: f64 = seen.iter().map(|seen| seen.memory.have).sum();
        let goal = (1.0 - FREE) * host.memory - given;
        let free = |r: &Resource| 1.0 - r.used / r.have.max(1.0);
        let needy = |r: &Resource| free(r) < 0.25 && r.have < r.provisioned;
        let any = seen.iter().any(|seen| needy(&seen.memory));
        let room = |r: &Resource| match goal > 0.0 {
            true if any && !needy(r) => 0.0,
            true => (r.provisioned - r.have).max(0.0),
            false if free(r) < 0.25 => 0.0,
            false => (r.have - 1.1 * r.used).max(0.0),
        };
        let all: f64 = seen.iter().map(|seen| room(&seen.memory)).sum();
        for (seen, target) in seen.iter().zip(targets) {
            let r = &seen.memory;
            let step = if all > 0.0 { (goal.abs() * room(r) / all).min(STEP).min(room(r)) } else { 0.0 };
            let urgent = free(r) < 0.1 && r.have < r.provisioned && given < (1.0 - FULL) * host.memory;
            // Less than 10 MiB are not worth a command.
            let memory = match () {
                () if urgent => Some((r.have + STEP).min(r.provisioned)),
                () if step < STEP / 10.0 => None,
                () => Some(r.have + step.copysign(goal)),
            };
            *target = Target { cpu: Some(seen.cpu.provisioned), memory };
        }
    }
}
