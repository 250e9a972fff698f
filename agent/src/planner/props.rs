//! What holds on any input.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const GIB: f64 = 1073741824.0;

/// A machine with a life of its own: demand at each round.
#[derive(Debug, Clone)]
struct Life {
    vm: Vm,
    demand: Vec<[f64; 2]>,
    outlook: Vec<f64>,
}

fn life(rounds: usize) -> impl Strategy<Value = Life> {
    let amounts = (0.0..2.0f64, 1.0..16.0f64, 0u8..4, 0.1..4.0f64);
    let levels = prop::collection::vec((0.0..1.2f64, 0.0..1.2f64, 1usize..200), 1..12);
    (amounts, levels, prop::collection::vec(0.0..2.0f64, 1..8), 0.0..1.0f64, any::<[bool; 2]>()).prop_map(
        move |((min, max, priority, weight), levels, outlook, start, [never, balloon])| {
            let mut policy = Policy::up_to(Amounts::of(max, max * GIB));
            policy.min = Amounts::of(min.min(max), min.min(max) * GIB);
            (policy.priority, policy.weight, policy.mode) = (priority, weight, [Mode::Act; 4]);
            policy.never_lower[0] = never && priority == 0;
            let abilities = Abilities { balloon, virtio_mem: balloon || priority > 0, ..Abilities::ALL };
            let demand: Vec<[f64; 2]> = levels
                .iter()
                .flat_map(|(cpu, memory, length)| std::iter::repeat_n([cpu * max, memory * max * GIB], *length))
                .cycle()
                .take(rounds)
                .collect();
            let has = policy.min[Resource::Cpu].max(start * max);
            let reading = |allocated| {
                Some(Reading {
                    allocated,
                    used: 0.0,
                    age_s: 0,
                    pressure: Pressure::default(),
                    oom: false,
                    outlook: None,
                    rest: None,
                })
            };
            let vm = Vm { id: VmId(0), policy, abilities, readings: [reading(has), reading(has * GIB), None, None] };
            let outlook = outlook.iter().map(|share| share * max).collect();
            Life { vm, demand, outlook }
        },
    )
}

/// Runs a host with these machines; what is decided happens with the next round, unless `deaf`. Calls `check` with what
/// the planner saw and decided.
fn live(
    lives: &[Life],
    rounds: usize,
    capacity: f64,
    deaf: usize,
    check: impl FnMut(u64, &[Vm], &[Decision]),
) -> Planner {
    live_on(lives, rounds, capacity, deaf, |_| 0.0, check)
}

/// The same on a host that waits for memory for such a share of each round.
fn live_on(
    lives: &[Life],
    rounds: usize,
    capacity: f64,
    deaf: usize,
    waits: impl Fn(usize) -> f64,
    mut check: impl FnMut(u64, &[Vm], &[Decision]),
) -> Planner {
    let mut planner = Planner::new(Settings::default());
    let mut host = Host { capacity: Amounts::of(capacity, capacity * GIB), ..Host::default() };
    let mut vms: Vec<Vm> = lives.iter().map(|life| life.vm.clone()).collect();
    let none = Reservations::new();
    for round in 0..rounds {
        let now_s = 1_000_000 + 10 * round as u64;
        host.pressure[Resource::Memory as usize].some = waits(round);
        for (at, (vm, life)) in vms.iter_mut().zip(lives).enumerate() {
            vm.id = VmId(at as u128);
            for resource in [Resource::Cpu, Resource::Memory] {
                let demand = life.demand[round][resource as usize];
                let unit = if resource == Resource::Cpu { 1.0 } else { GIB };
                let reading = vm.readings[resource as usize].as_mut().unwrap();
                reading.used = demand.min(reading.allocated);
                reading.pressure.some = if demand > reading.allocated { 0.5 } else { 0.0 };
                let foreseen = life.outlook[round / 30 % life.outlook.len()] * unit;
                reading.outlook = Some(Outlook { p50: 0.5 * foreseen, p90: 0.9 * foreseen, p95: foreseen });
            }
        }
        let decisions = planner.plan(&Input { now_s, host: &host, vms: &vms, reservations: &none });
        check(now_s, &vms, &decisions);
        for decision in &decisions {
            let vm = &mut vms[decision.vm.0 as usize];
            // Every so often a change does not happen.
            let lost = deaf > 0 && (round + decision.vm.0 as usize).is_multiple_of(deaf);
            if matches!(decision.kind, Kind::Raise | Kind::Lower) && !lost {
                vm.readings[decision.resource as usize].as_mut().unwrap().allocated = decision.to;
            }
        }
    }
    planner
}

fn allocated(vms: &[Vm], resource: Resource) -> f64 {
    vms.iter().filter_map(|vm| vm.readings[resource as usize]).map(|reading| reading.allocated).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_more_is_given_than_there_is_and_nobody_falls_below_the_floor_or_what_it_uses(
        lives in prop::collection::vec(life(400), 1..8), capacity in 1.0..60.0f64, deaf in 0usize..5,
    ) {
        live(&lives, 400, capacity, deaf, |_, vms, decisions| {
            for (resource, unit) in [(Resource::Cpu, 1.0), (Resource::Memory, GIB)] {
                let mut after: Vec<f64> = vms.iter().map(|vm| vm.readings[resource as usize].unwrap().allocated).collect();
                let before = allocated(vms, resource);
                for decision in decisions.iter().filter(|decision| decision.resource == resource) {
                    let vm = &vms[decision.vm.0 as usize];
                    let reading = vm.readings[resource as usize].unwrap();
                    let floor = vm.policy.min[resource];
                    match decision.kind {
                        Kind::Lower => {
                            assert!(decision.to < reading.allocated);
                            assert!(decision.to >= floor * (1.0 - 1e-9), "{decision:?}");
                            assert!(!vm.policy.never_lower[resource as usize], "{decision:?}");
                            // Memory is given back later than it is asked for.
                            if resource.compressible() {
                                after[decision.vm.0 as usize] = decision.to;
                            } else {
                                assert!(decision.to >= reading.used, "{decision:?}");
                            }
                        }
                        Kind::Raise => {
                            assert!(decision.to > reading.allocated && decision.to <= vm.policy.max[resource], "{decision:?}");
                            after[decision.vm.0 as usize] = decision.to;
                        }
                        Kind::Hold | Kind::Refuse => assert_eq!(decision.to, decision.before),
                    }
                }
                let after: f64 = after.iter().sum();
                assert!(after <= before.max(capacity * unit) * (1.0 + 1e-9), "{resource}: {before} to {after} of {capacity}");
            }
        });
    }

    /// While the host waits for memory none is given for what is foreseen; what is taken is never in use.
    #[test]
    fn a_host_that_waits_for_memory_gives_only_what_is_needed(
        lives in prop::collection::vec(life(400), 1..8), capacity in 1.0..60.0f64, deaf in 0usize..5, calm in 1usize..60,
    ) {
        let waits = |round: usize| if round / calm % 2 == 1 { 0.05 } else { 0.049 };
        live_on(&lives, 400, capacity, deaf, waits, |now_s, vms, decisions| {
            let round = (now_s - 1_000_000) as usize / 10;
            for decision in decisions.iter().filter(|decision| decision.resource == Resource::Memory) {
                let vm = &vms[decision.vm.0 as usize];
                let reading = vm.readings[Resource::Memory as usize].unwrap();
                match decision.kind {
                    Kind::Raise => {
                        assert!(waits(round) < 0.05 || decision.reason != Reason::Foreseen, "{decision:?}");
                    }
                    Kind::Lower => {
                        assert!(decision.to >= reading.used.max(vm.policy.min[Resource::Memory]) * (1.0 - 1e-9), "{decision:?}");
                    }
                    Kind::Hold | Kind::Refuse => {}
                }
            }
        });
    }

    #[test]
    fn changes_are_bounded_in_any_hour(lives in prop::collection::vec(life(1440), 1..5), capacity in 1.0..30.0f64, deaf in 0usize..5) {
        let most = 2 * Settings::default().changes_per_hour as usize;
        let mut changes: BTreeMap<(VmId, Resource), Vec<u64>> = BTreeMap::new();
        live(&lives, 1440, capacity, deaf, |now_s, _, decisions| {
            for decision in decisions.iter().filter(|d| matches!(d.kind, Kind::Raise | Kind::Lower)) {
                let times = changes.entry((decision.vm, decision.resource)).or_default();
                times.push(now_s);
                let hour = times.iter().filter(|at| **at + 3600 > now_s).count();
                assert!(hour <= most, "{hour} changes within an hour: {decision:?}");
            }
        });
    }

    #[test]
    fn constant_input_comes_to_rest(mut lives in prop::collection::vec(life(1), 1..6), capacity in 2.0..60.0f64) {
        for life in &mut lives {
            life.demand = vec![life.demand[0]; 4320];
            life.outlook.truncate(1);
        }
        // The largest rise of a machine counts half after a day, and what is kept for it is given back bit by bit; nothing else
        // changes any more.
        let mut late: BTreeMap<(VmId, Resource), u32> = BTreeMap::new();
        live(&lives, 4320, capacity, 0, |now_s, _, decisions| {
            for decision in decisions.iter().filter(|_| now_s >= 1_000_000 + 10 * 3600) {
                if matches!(decision.kind, Kind::Raise | Kind::Lower) {
                    let times = late.entry((decision.vm, decision.resource)).or_default();
                    *times += 1;
                    assert!(decision.kind == Kind::Lower && *times == 1, "still changing after 10 h: {decision:?}");
                }
            }
        });
    }

    #[test]
    fn the_same_input_gives_the_same_decisions(lives in prop::collection::vec(life(120), 1..6), capacity in 1.0..40.0f64) {
        let run = || {
            let mut all = Vec::new();
            live(&lives, 120, capacity, 3, |_, _, decisions| all.extend_from_slice(decisions));
            all
        };
        prop_assert_eq!(run(), run());
    }

    #[test]
    fn nobody_goes_short_of_cpu_for_a_lower_priority(mut lives in prop::collection::vec(life(1), 2..7), capacity in 2.0..30.0f64) {
        for life in &mut lives {
            life.demand = vec![life.demand[0]; 720];
            life.outlook.truncate(1);
            life.vm.policy.never_lower = [false; 4];
        }
        let floors: f64 = lives.iter().map(|life| life.vm.policy.min[Resource::Cpu]).sum();
        let weights: f64 = lives.iter().map(|life| life.vm.policy.weight).sum();
        let mut end = Vec::new();
        live(&lives, 720, capacity, 0, |_, vms, _| end = vms.iter().map(|vm| vm.readings[0].unwrap().allocated).collect());
        for (high, has) in lives.iter().zip(&end) {
            let policy = &high.vm.policy;
            let wants = high.demand[0][0].min(policy.max[Resource::Cpu]);
            // Changes of a twentieth are not worth it.
            if wants <= 1.05 * has + 0.1 || floors > capacity {
                continue;
            }
            for (low, low_has) in lives.iter().zip(&end).filter(|(low, _)| low.vm.policy.priority < policy.priority) {
                let fair = capacity * low.vm.policy.weight / weights;
                let kept = low.vm.policy.min[Resource::Cpu].max(fair);
                prop_assert!(*low_has <= 1.06 * kept + 0.1, "{has} of {wants} for {policy:?}, but {low_has} for {:?}", low.vm.policy);
            }
        }
    }

    #[test]
    fn nonsense_is_survived(numbers in prop::collection::vec(any::<f64>(), 24), ages in any::<[u32; 2]>(), now in any::<u64>()) {
        let n = |at: usize| numbers[at];
        let pressure = Pressure { some: n(0), full: n(1) };
        let outlook = Some(Outlook { p50: n(2), p90: n(3), p95: n(4) });
        let reading = |at: usize, age_s| Some(Reading { allocated: n(at), used: n(at + 1), age_s, pressure, oom: n(5) > 0.0, outlook, rest: outlook });
        let policy = Policy {
            min: Amounts([n(6), n(7), n(8), n(9)]),
            max: Amounts([n(10), n(11), n(12), n(13)]),
            priority: 1,
            weight: n(14),
            mode: [Mode::Act; 4],
            never_lower: [false; 4],
            margin: [Some(n(15)), None, Some(n(16)), None],
        };
        let readings = [reading(17, ages[0]), reading(18, ages[1]), reading(19, 0), reading(20, 0)];
        let vms = [Vm { id: VmId(1), policy, abilities: Abilities::ALL, readings }];
        let host = Host { capacity: Amounts([n(20), n(21), n(22), n(23)]), ..Host::default() };
        let mut planner = Planner::new(Settings::default());
        for step in 0..4 {
            let input = Input { now_s: now.wrapping_add(step), host: &host, vms: &vms, reservations: &Reservations::new() };
            for decision in planner.plan(&input) {
                prop_assert!(decision.to.is_finite() && decision.to >= 0.0, "{decision:?}");
                prop_assert!(!decision.to_string().is_empty());
            }
        }
    }

    #[test]
    fn guarantees_never_exceed_the_host(
        asks in prop::collection::vec((0u64..500, 1u64..300, 0.0..12.0f64, 0.0..8.0f64, prop::option::of(0u8..4), any::<bool>()), 1..60),
        floor in 0.0..6.0f64, capacity in 4.0..32.0f64, risk in 0.001..0.5f64,
    ) {
        let floors = [(VmId(0), Amounts::of(floor.min(capacity), 0.0))];
        let peak = [Outlook { p50: 0.1 * capacity, p90: 0.3 * capacity, p95: 0.4 * capacity }; 4];
        let foreseen = [Foreseen { vm: VmId(1), from_s: 100, to_s: 400, peak }];
        let standing = Standing { capacity: Amounts::of(capacity, 0.0), floors: &floors, foreseen: &foreseen };
        let mut reservations = Reservations::new();
        for (from_s, length, guaranteed, oversubscribed, vm, cancel) in asks {
            let promise = Promise {
                vm: vm.map(|vm| VmId(u128::from(vm))),
                from_s: 1000 + from_s,
                to_s: 1000 + from_s + length,
                guaranteed: Amounts::of(guaranteed, 0.0),
                oversubscribed: Amounts::of(oversubscribed, 0.0),
                likely: None,
            };
            let before = reservations.clone();
            match reservations.admit(1000, promise, risk, &standing) {
                Ok(id) if cancel => prop_assert!(reservations.cancel(id)),
                Ok(_) => {}
                Err(_) => prop_assert_eq!(&before, &reservations),
            }
        }
        reservations.check().unwrap();
        // A slow and obvious count, second by second.
        for at_s in 1000..1800u64 {
            let of = |vm: Option<u128>| -> f64 {
                let during = |b: &&Booking| (b.promise.from_s..b.promise.to_s).contains(&at_s) && b.promise.vm == vm.map(VmId);
                reservations.bookings().iter().filter(during).map(|b| b.promise.guaranteed[Resource::Cpu]).sum()
            };
            let named: f64 = (0..4).map(|vm| of(Some(vm)).max(if vm == 0 { floors[0].1[Resource::Cpu] } else { 0.0 })).sum();
            prop_assert!(named + of(None) <= capacity * (1.0 + 1e-9), "{} at {at_s}", named + of(None));
        }
    }
}
