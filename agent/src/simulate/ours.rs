//! The planner, as prestaged runs it: every 10 s, and at once when pressure is reported.

use super::forecasts::Forecasts;
use super::policy::{HostSeen, Policy, Resource as SeenResource, Seen, Target};
use crate::planner::{
    Abilities, Amounts, Host, Input, Kind, Mode, Outlook, Planner, Policy as VmPolicy, Pressure, Reading, Reservations,
    Resource, Settings, Vm, VmId,
};

/// The planner with a forecaster, or with none.
pub(super) struct Ours {
    name: String,
    planner: Planner,
    forecasts: Option<Forecasts>,
    priorities: Vec<u8>,
    outlooks: Vec<[Option<Outlook>; 2]>,
    stale: bool,
    vms: Vec<Vm>,
    reservations: Reservations,
}

impl Ours {
    pub(super) fn new(name: String, settings: Settings, forecasts: Option<Forecasts>, priorities: Vec<u8>) -> Self {
        Self {
            name,
            planner: Planner::new(settings),
            forecasts,
            priorities,
            outlooks: Vec::new(),
            stale: true,
            vms: Vec::new(),
            reservations: Reservations::new(),
        }
    }
}

impl Policy for Ours {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn loop_s(&self) -> u64 {
        10
    }

    fn woken(&self) -> bool {
        true
    }

    fn observe(&mut self, vm: usize, at_s: u64, cpu: f64, memory: f64) {
        if let Some(forecasts) = &mut self.forecasts {
            forecasts.observe(vm, 0, at_s, cpu);
            forecasts.observe(vm, 1, at_s, memory);
            self.stale = true;
        }
    }

    fn decide(&mut self, now_s: u64, host: &HostSeen, seen: &[Seen], targets: &mut [Target]) {
        if self.stale {
            self.stale = false;
            self.outlooks.resize(seen.len(), [None; 2]);
            if let Some(forecasts) = &self.forecasts {
                for (vm, outlooks) in self.outlooks.iter_mut().enumerate() {
                    *outlooks = [forecasts.outlook(vm, 0), forecasts.outlook(vm, 1)];
                }
            }
        }
        self.vms.clear();
        for (at, seen) in seen.iter().enumerate().filter(|(_, seen)| seen.on) {
            let reading = |r: &SeenResource, outlook: Option<Outlook>| {
                Some(Reading {
                    allocated: r.have,
                    used: r.used,
                    age_s: 0,
                    pressure: Pressure { some: r.stalled, full: 0.0 },
                    oom: false,
                    outlook,
                    rest: None,
                })
            };
            let mut policy = VmPolicy::up_to(Amounts::of(seen.cpu.provisioned, seen.memory.provisioned));
            policy.mode = [Mode::Act; 4];
            policy.priority = self.priorities.get(at).copied().unwrap_or(0);
            let [cpu, memory] = self.outlooks.get(at).copied().unwrap_or_default();
            self.vms.push(Vm {
                id: VmId(at as u128),
                policy,
                abilities: Abilities::ALL,
                readings: [reading(&seen.cpu, cpu), reading(&seen.memory, memory), None, None],
            });
        }
        let host = Host { capacity: Amounts::of(host.cores, host.memory), ..Host::default() };
        let input = Input { now_s, host: &host, vms: &self.vms, reservations: &self.reservations };
        for decision in self.planner.plan(&input) {
            let Some(target) = targets.get_mut(decision.vm.0 as usize) else { continue };
            if matches!(decision.kind, Kind::Raise | Kind::Lower) {
                match decision.resource {
                    Resource::Cpu => target.cpu = Some(decision.to),
                    _ => target.memory = Some(decision.to),
                }
            }
        }
    }
}
