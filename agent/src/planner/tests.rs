//! What the planner does with one machine or two, round by round.

use super::*;

const GIB: f64 = 1073741824.0;

fn host(cores: f64, memory: f64) -> Host {
    Host { capacity: Amounts::of(cores, memory), ..Host::default() }
}

fn vm(id: u128, max: Amounts) -> Vm {
    let policy = Policy { mode: [Mode::Act; 4], ..Policy::up_to(max) };
    Vm { id: VmId(id), policy, abilities: Abilities::ALL, readings: [None; 4] }
}

fn reading(allocated: f64, used: f64) -> Reading {
    let pressure = Pressure::default();
    Reading { allocated, used, age_s: 0, pressure, oom: false, outlook: None, rest: None }
}

/// Rounds of 10 s from `from_s`, in which everything that is decided happens at once.
fn rounds(planner: &mut Planner, host: &Host, vms: &mut [Vm], from_s: u64, count: u64) -> Vec<Decision> {
    let reservations = Reservations::new();
    let mut all = Vec::new();
    for round in 0..count {
        let input = Input { now_s: from_s + 10 * round, host, vms, reservations: &reservations };
        let decisions = planner.plan(&input);
        for decision in &decisions {
            let vm = vms.iter_mut().find(|vm| vm.id == decision.vm).unwrap();
            let reading = vm.readings[decision.resource as usize].as_mut().unwrap();
            if matches!(decision.kind, Kind::Raise | Kind::Lower)
                && vm.policy.mode[decision.resource as usize] == Mode::Act
            {
                reading.allocated = decision.to;
            }
        }
        all.extend(decisions);
    }
    all
}

fn once(vms: &[Vm], host: &Host) -> Vec<Decision> {
    plan(&Input { now_s: 1_000_000, host, vms, reservations: &Reservations::new() }, &Settings::default())
}

#[test]
fn the_defaults_are_in_range_and_mistakes_are_named() {
    Settings::default().check().unwrap();
    let mut wrong = Settings::default();
    wrong.rules[1].lower_step = 2.0;
    assert_eq!(wrong.check().unwrap_err(), "lower_step of memory is 2; it is 0.001 to 1");
    assert!(Settings { risk: f64::NAN, ..Settings::default() }.check().is_err());
}

#[test]
fn a_forecast_raises_and_never_lowers() {
    let mut one = vm(1, Amounts::of(8.0, 0.0));
    one.readings[0] = Some(Reading { outlook: Some(Outlook { p50: 3.0, p90: 4.0, p95: 5.0 }), ..reading(2.0, 1.0) });
    let decisions = once(&[one.clone()], &host(16.0, 0.0));
    assert_eq!(decisions.len(), 1);
    assert_eq!((decisions[0].kind, decisions[0].reason, decisions[0].to), (Kind::Raise, Reason::Foreseen, 4.0));
    assert_eq!(decisions[0].to_string(), "cpu from 2.00 cores to 4.00 cores: 4.00 cores foreseen, 1.00 cores in use");
    // Nothing foreseen, and busy a moment ago: the window has to pass first.
    one.readings[0] = Some(Reading { outlook: Some(Outlook::default()), ..reading(8.0, 7.5) });
    let (mut planner, host) = (Planner::new(Settings::default()), host(16.0, 0.0));
    rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_000, 1);
    one.readings[0].as_mut().unwrap().used = 0.5;
    let window = u64::from(Settings::default().rules[0].window_s);
    let early = rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_010, window / 10 - 1);
    assert!(early.iter().all(|decision| decision.kind == Kind::Hold), "{early:?}");
    let late = rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_000 + window, 30);
    assert_eq!(late[0].reason, Reason::Idle, "{late:?}");
    assert_eq!(late[0].to, 4.0, "half at most at once");
}

#[test]
fn a_host_that_waits_for_memory_takes_what_is_idle_at_once_and_gives_nothing_for_later() {
    let calm = host(0.0, 64.0 * GIB);
    let mut waits = calm;
    waits.pressure[1].some = Settings::default().rules[1].pressure;
    let mut later = vm(1, Amounts::of(0.0, 16.0 * GIB));
    let foreseen = Outlook { p50: 5.0 * GIB, p90: 6.0 * GIB, p95: 7.0 * GIB };
    later.readings[1] = Some(Reading { outlook: Some(foreseen), ..reading(4.0 * GIB, 2.0 * GIB) });
    assert_eq!(once(&[later.clone()], &calm)[0].reason, Reason::Foreseen);
    assert!(once(&[later], &waits).iter().all(|decision| decision.kind != Kind::Raise));

    // Idle for a window, and lowered a moment ago.
    let second_step = |host: &Host, pressed: bool| {
        let (mut planner, calm) = (Planner::new(Settings::default()), &calm);
        let mut idle = vm(1, Amounts::of(0.0, 16.0 * GIB));
        idle.readings[1] = Some(reading(16.0 * GIB, GIB));
        if pressed {
            idle.readings[1].as_mut().unwrap().pressure.some = 1.0;
            rounds(&mut planner, calm, std::slice::from_mut(&mut idle), 1_000_000 - 10, 1);
            idle.readings[1].as_mut().unwrap().pressure.some = 0.0;
        }
        let mut from_s = 1_000_000;
        while idle.readings[1].unwrap().allocated == 16.0 * GIB {
            rounds(&mut planner, calm, std::slice::from_mut(&mut idle), from_s, 1);
            from_s += 10;
        }
        rounds(&mut planner, host, std::slice::from_mut(&mut idle), from_s, 2).iter().any(|it| it.kind == Kind::Lower)
    };
    assert!(second_step(&waits, false), "the next step does not wait for the cool-down");
    assert!(!second_step(&calm, false));
    assert!(!second_step(&waits, true), "one that was short itself is left alone");
}

#[test]
fn a_clock_that_is_set_back_stops_nothing_and_hurries_nothing() {
    let (mut planner, host) = (Planner::new(Settings::default()), host(16.0, 0.0));
    let mut one = vm(1, Amounts::of(8.0, 0.0));
    one.readings[0] = Some(reading(2.0, 2.0));
    // So many raises that none is left in this hour.
    for round in 0..100 {
        one.readings[0] = Some(Reading { pressure: Pressure { some: 1.0, full: 1.0 }, ..reading(2.0, 2.0) });
        planner.plan(&Input {
            now_s: 1_000_000 + round,
            host: &host,
            vms: &[one.clone()],
            reservations: &Reservations::new(),
        });
    }
    let back_s = 1_000_000 - 3600;
    let decisions = rounds(&mut planner, &host, std::slice::from_mut(&mut one), back_s, 1);
    assert_eq!((decisions[0].kind, decisions[0].reason), (Kind::Raise, Reason::Pressure), "{decisions:?}");
    one.readings[0] = Some(reading(8.0, 0.1));
    let window = u64::from(Settings::default().rules[0].window_s);
    let early = rounds(&mut planner, &host, std::slice::from_mut(&mut one), back_s + 10, window / 10 - 1);
    assert!(early.iter().all(|decision| decision.kind != Kind::Lower), "{early:?}");
    let later = rounds(&mut planner, &host, std::slice::from_mut(&mut one), back_s + window, 60);
    assert!(later.iter().any(|decision| decision.kind == Kind::Lower), "within the hour that was gone through twice");
}

#[test]
fn an_outlook_holds_back_a_lowering() {
    let mut one = vm(1, Amounts::of(8.0, 0.0));
    one.readings[0] = Some(Reading { outlook: Some(Outlook { p50: 7.0, p90: 7.8, p95: 7.9 }), ..reading(8.0, 0.5) });
    let decisions = rounds(&mut Planner::new(Settings::default()), &host(16.0, 0.0), &mut [one], 1_000_000, 2000);
    assert!(decisions.iter().all(|decision| decision.kind != Kind::Lower), "{decisions:?}");
}

#[test]
fn pressure_raises_at_once_and_doubles_the_cool_down() {
    let mut vms = [vm(1, Amounts::of(8.0, 0.0))];
    vms[0].readings[0] = Some(reading(4.0, 0.2));
    let (mut planner, host) = (Planner::new(Settings::default()), host(16.0, 0.0));
    let lowered_after = |decisions: &[Decision]| decisions.iter().filter(|d| d.kind == Kind::Lower).count();
    let calm = rounds(&mut planner, &host, &mut vms, 1_000_000, 211);
    assert!(lowered_after(&calm) >= 1, "{calm:?}");
    let press = |vms: &mut [Vm; 1], some| vms[0].readings[0].as_mut().unwrap().pressure.some = some;
    press(&mut vms, 0.5);
    let pressed = rounds(&mut planner, &host, &mut vms, 1_002_110, 1);
    assert_eq!((pressed[0].kind, pressed[0].reason), (Kind::Raise, Reason::Pressure));
    assert!(pressed[0].to >= 2.0 * pressed[0].before);
    press(&mut vms, 0.0);
    let cool = 10 * 30;
    let after = rounds(&mut planner, &host, &mut vms, 1_002_120, cool / 10 + 25);
    assert_eq!(lowered_after(&after), 0, "regretted: 300 s are not enough any more");
    assert!(lowered_after(&rounds(&mut planner, &host, &mut vms, 1_002_670, 60)) >= 1);
}

#[test]
fn who_goes_short_gets_the_last_bit_whatever_was_foreseen_besides() {
    let mut one = vm(1, Amounts::of(8.0, 0.0));
    let outlook = Some(Outlook { p50: 5.0, p90: 9.0, p95: 12.0 });
    let pressure = Pressure { some: 0.5, full: 0.0 };
    one.readings[0] = Some(Reading { outlook, pressure, ..reading(7.8, 7.8) });
    let decisions = once(&[one], &host(16.0, 0.0));
    assert_eq!((decisions[0].kind, decisions[0].reason, decisions[0].to), (Kind::Raise, Reason::Pressure, 8.0));
}

#[test]
fn oom_raises_memory_without_any_other_sign() {
    let mut one = vm(1, Amounts::of(0.0, 8.0 * GIB));
    one.readings[1] = Some(Reading { oom: true, age_s: 900, ..reading(2.0 * GIB, 0.5 * GIB) });
    let decisions = once(&[one], &host(0.0, 16.0 * GIB));
    assert_eq!((decisions[0].reason, decisions[0].to), (Reason::Oom, 4.0 * GIB));
}

#[test]
fn what_is_never_to_be_lowered_or_cannot_be_is_not() {
    let idle = reading(8.0, 0.1);
    let (mut never, mut unable, mut stale) =
        (vm(1, Amounts::of(8.0, 0.0)), vm(2, Amounts::of(8.0, 0.0)), vm(3, Amounts::of(8.0, 0.0)));
    never.policy.never_lower[0] = true;
    unable.abilities = Abilities { known: true, vcpu_add: true, agent: true, ..Abilities::default() };
    for one in [&mut never, &mut unable] {
        one.readings[0] = Some(idle);
    }
    stale.readings[0] = Some(Reading { age_s: 3600, ..idle });
    let mut vms = [never, unable, stale];
    let decisions = rounds(&mut Planner::new(Settings::default()), &host(30.0, 0.0), &mut vms, 1_000_000, 500);
    assert!(decisions.iter().all(|decision| decision.kind == Kind::Hold), "{decisions:?}");
    let reasons = |id: u128| decisions.iter().rfind(|d| d.vm == VmId(id)).unwrap();
    assert_eq!(reasons(1).reason, Reason::NeverLower);
    assert_eq!(
        (reasons(2).reason, reasons(2).missing),
        (Reason::Unable, Some("vCPUs cannot be unplugged and no quota can be set"))
    );
    assert_eq!(reasons(3).reason, Reason::Stale);
}

#[test]
fn a_change_without_effect_is_tried_again_ever_more_seldom() {
    let mut one = vm(1, Amounts::of(8.0, 0.0));
    one.readings[0] = Some(reading(1.0, 1.0));
    let (mut planner, host, none) = (Planner::new(Settings::default()), host(16.0, 0.0), Reservations::new());
    let mut tries = Vec::new();
    for now_s in (1_000_000..1_002_000).step_by(10) {
        let decisions = planner.plan(&Input { now_s, host: &host, vms: &[one.clone()], reservations: &none });
        tries.extend(decisions.iter().filter(|decision| decision.kind == Kind::Raise).map(|_| now_s));
    }
    let gaps: Vec<u64> = tries.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!((3..=9).contains(&tries.len()), "{tries:?}");
    assert!(gaps.windows(2).all(|pair| pair[1] >= pair[0]), "{gaps:?}");
}

#[test]
fn machines_that_are_only_observed_take_no_part() {
    let mut watched = vm(1, Amounts::of(8.0, 0.0));
    watched.policy.mode = [Mode::Observe; 4];
    watched.readings[0] = Some(reading(6.0, 0.1));
    let mut other = vm(2, Amounts::of(8.0, 0.0));
    other.readings[0] = Some(Reading { pressure: Pressure { some: 0.9, full: 0.0 }, ..reading(2.0, 2.0) });
    let mut vms = [watched, other];
    let decisions = rounds(&mut Planner::new(Settings::default()), &host(9.0, 0.0), &mut vms, 1_000_000, 200);
    assert!(vms[1].readings[0].unwrap().allocated <= 3.0, "what is observed is not taken: {vms:?}");
    let said: Vec<_> = decisions.iter().filter(|d| d.vm == VmId(1) && d.kind == Kind::Lower).collect();
    assert!(!said.is_empty() && said.len() <= 4, "told, and not every round: {}", said.len());
}

#[test]
fn a_reservation_is_provided_before_its_window_and_kept_free_for_who_is_not_there() {
    let mut reservations = Reservations::new();
    let standing = Standing { capacity: Amounts::of(16.0, 0.0), floors: &[], foreseen: &[] };
    let promise = |vm, from_s, cores| Promise {
        vm,
        from_s,
        to_s: from_s + 3600,
        guaranteed: Amounts::of(cores, 0.0),
        oversubscribed: Amounts::default(),
        likely: None,
    };
    reservations.admit(0, promise(Some(VmId(1)), 1000, 4.0), 0.05, &standing).unwrap();
    reservations.admit(0, promise(None, 1000, 6.0), 0.05, &standing).unwrap();
    let mut vms = vec![vm(1, Amounts::of(8.0, 0.0)), vm(2, Amounts::of(16.0, 0.0))];
    vms[0].readings[0] = Some(reading(1.0, 0.1));
    vms[1].readings[0] = Some(Reading { pressure: Pressure { some: 1.0, full: 1.0 }, ..reading(5.0, 5.0) });
    let host = host(16.0, 0.0);
    let to = |now_s, id| {
        let decisions =
            plan(&Input { now_s, host: &host, vms: &vms, reservations: &reservations }, &Settings::default());
        decisions.iter().find(|d| d.vm == VmId(id) && d.kind == Kind::Raise).map(|d| d.to)
    };
    assert_eq!(to(800, 1), None, "too early");
    assert_eq!(to(900, 1), Some(4.0), "two minutes ahead");
    assert_eq!(to(900, 2), Some(6.0), "16 less 6 for nobody yet, less 4");
    assert_eq!(to(5000, 1), None, "over");
}

#[test]
fn what_was_promised_is_not_promised_again_and_the_refusal_says_what_is_left() {
    let mut reservations = Reservations::new();
    let floors = [(VmId(7), Amounts::of(2.0, 0.0))];
    let peak = [Outlook { p50: 3.0, p90: 5.0, p95: 6.0 }; 4];
    let foreseen = [Foreseen { vm: VmId(7), from_s: 0, to_s: 100_000, peak }];
    let standing = Standing { capacity: Amounts::of(10.0, 0.0), floors: &floors, foreseen: &foreseen };
    let ask = |guaranteed, oversubscribed| Promise {
        vm: None,
        from_s: 1000,
        to_s: 2000,
        guaranteed: Amounts::of(guaranteed, 0.0),
        oversubscribed: Amounts::of(oversubscribed, 0.0),
        likely: None,
    };
    // Promises would allow 8; foreseen at a risk of 1 in 20 are 6 of the 10.
    let refused = reservations.admit(0, ask(5.0, 0.0), 0.05, &standing).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "cpu: 5.00 cores where 4.00 cores is likely to be left at 1970-01-01T00:16:40Z at a risk of 0.05; ask for less, another time or \
         a higher risk"
    );
    reservations.admit(0, ask(5.0, 0.0), 0.5, &standing).unwrap();
    let refused = reservations.admit(0, ask(4.0, 0.0), 0.5, &standing).unwrap_err();
    assert!(matches!(refused, Refusal::Promised { left, .. } if (left - 3.0).abs() < 1e-9), "{refused}");
    assert!(reservations.admit(0, Promise { from_s: 2000, to_s: 3000, ..ask(4.0, 0.0) }, 0.05, &standing).is_ok());
    // Half of the oversubscribed part is likely to be used.
    let half = Some(Outlook { p50: 0.5, p90: 0.5, p95: 0.5 });
    assert!(reservations.admit(0, ask(0.0, 5.0), 0.5, &standing).is_err());
    assert!(reservations.admit(0, Promise { likely: half, ..ask(0.0, 4.0) }, 0.5, &standing).is_ok());
    for bad in [ask(-1.0, 0.0), ask(f64::NAN, 0.0)] {
        assert!(reservations.admit(0, bad, 0.05, &standing).is_err());
    }
    let day = 86_400;
    let window = |from_s, to_s| Promise { from_s, to_s, ..ask(1.0, 0.0) };
    for (promise, why) in [
        (window(9 * day, 9 * day), "it ends before it begins"),
        (window(0, day), "it ended at 1970-01-02T00:00:00Z: give a time that is to come"),
        (window(400 * day, 401 * day), "it begins at 1971-02-05T00:00:00Z, more than 366 days ahead: ask again later"),
        (window(2 * day, 402 * day), "it lasts 400 days; 366 are the most"),
        (
            Promise { guaranteed: Amounts([0.0, 0.0, 1.0, 0.0]), ..window(2 * day, 3 * day) },
            "disk: how much of it there is for machines is not known: set `demand.disk_rate` in the configuration",
        ),
    ] {
        assert_eq!(reservations.admit(2 * day, promise, 0.05, &standing).unwrap_err().to_string(), why);
    }
}

#[test]
fn reservations_outlive_a_restart_and_damage_is_found() {
    let mut reservations = Reservations::new();
    let standing = Standing { capacity: Amounts::all(1e12), floors: &[], foreseen: &[] };
    for at in 0..5 {
        let promise = Promise {
            vm: (at % 2 == 0).then_some(VmId(u128::MAX - at)),
            from_s: 100 * at as u64 + 1,
            to_s: 1000,
            guaranteed: Amounts::all(0.1 + at as f64),
            oversubscribed: Amounts::all(1.0),
            likely: Some(Outlook { p50: 0.1, p90: 0.2, p95: 0.3 }),
        };
        reservations.admit(0, promise, 0.05, &standing).unwrap();
    }
    let text = serde_json::to_string(&reservations).unwrap();
    let back: Reservations = serde_json::from_str(&text).unwrap();
    assert_eq!(back, reservations);
    back.check().unwrap();
    let damaged: Reservations = serde_json::from_str(&text.replace("\"to_s\":1000", "\"to_s\":0")).unwrap();
    assert!(damaged.check().unwrap_err().contains("reservation 0"), "{damaged:?}");
    assert!(serde_json::from_str::<Reservations>("{\"bookings\":[],\"next\":0,\"more\":1}").is_err());
    let small = Standing { capacity: Amounts::all(3.0), ..standing };
    assert_eq!(reservations.broken(0, &standing), []);
    assert_eq!(reservations.broken(0, &small)[0].0, 201, "5.3 from the third on");
    reservations.expire(1000);
    assert!(reservations.bookings().is_empty());
}

#[test]
fn the_planner_outlives_a_restart() {
    let mut vms = [vm(1, Amounts::of(8.0, 0.0))];
    vms[0].readings[0] = Some(reading(8.0, 0.5));
    let (mut planner, host) = (Planner::new(Settings::default()), host(16.0, 0.0));
    rounds(&mut planner, &host, &mut vms, 1_000_000, 170);
    let mut back: Planner = serde_json::from_str(&serde_json::to_string(&planner).unwrap()).unwrap();
    let mut same = vms.clone();
    let a = rounds(&mut planner, &host, &mut vms, 1_001_700, 100);
    let b = rounds(&mut back, &host, &mut same, 1_001_700, 100);
    let changes = |all: &[Decision]| all.iter().filter(|d| d.kind == Kind::Lower).cloned().collect::<Vec<_>>();
    assert_eq!(changes(&a), changes(&b));
    assert!(!changes(&a).is_empty());
}

#[test]
fn one_that_grows_without_end_is_flagged_and_takes_nobodys_share() {
    let mut vms = [vm(1, Amounts::of(0.0, 64.0 * GIB)), vm(2, Amounts::of(0.0, 16.0 * GIB))];
    vms[0].policy.priority = 9;
    vms[1].policy.min = Amounts::of(0.0, 4.0 * GIB);
    vms[0].readings[1] = Some(reading(2.0 * GIB, GIB));
    vms[1].readings[1] = Some(reading(6.0 * GIB, 5.0 * GIB));
    let (mut planner, host, mut flagged) = (Planner::new(Settings::default()), host(0.0, 24.0 * GIB), false);
    for round in 0..1440 {
        let leak = (GIB * (1.0 + round as f64 / 60.0)).min(vms[0].readings[1].unwrap().allocated);
        vms[0].readings[1].as_mut().unwrap().used = leak;
        flagged |= rounds(&mut planner, &host, &mut vms, 1_000_000 + 10 * round, 1)
            .iter()
            .any(|d| d.vm == VmId(1) && d.runaway);
    }
    let [leaking, other] = [0, 1].map(|at: usize| vms[at].readings[1].unwrap().allocated / GIB);
    assert!(flagged && other >= 5.0 && leaking + other <= 24.0, "{leaking} {other}");
}

#[test]
fn memory_keeps_a_reserve_by_its_own_rises_and_pressure_raises_by_them() {
    let (mut planner, host) = (Planner::new(Settings::default()), host(0.0, 64.0 * GIB));
    let mut vms = [vm(1, Amounts::of(0.0, 32.0 * GIB)), vm(2, Amounts::of(0.0, 32.0 * GIB))];
    let mut now_s = 1_000_000;
    // One goes from 1 to 9 GiB and back within a minute; the other has always used the same.
    for used in [[1.0, 1.0], [9.0, 1.0], [1.0, 1.0]] {
        for (vm, used) in vms.iter_mut().zip(used) {
            let has = vm.readings[1].map_or(12.0 * GIB, |reading| reading.allocated);
            vm.readings[1] = Some(reading(has, used * GIB));
        }
        rounds(&mut planner, &host, &mut vms, now_s, 3);
        now_s += 30;
    }
    rounds(&mut planner, &host, &mut vms, now_s, 2 * 360);
    now_s += 2 * 3600;
    let has = |vms: &[Vm; 2]| [0, 1].map(|at: usize| vms[at].readings[1].unwrap().allocated / GIB);
    let [jumps, steady] = has(&vms);
    assert!((1.0..1.5).contains(&steady), "{steady}");
    assert!((2.4..2.8).contains(&jumps), "1 GiB, and a fifth of 8 GiB two hours ago: {jumps}");
    for vm in &mut vms {
        let allocated = vm.readings[1].unwrap().allocated;
        let pressure = Pressure { some: 0.5, full: 0.0 };
        vm.readings[1] = Some(Reading { pressure, ..reading(allocated, allocated) });
    }
    rounds(&mut planner, &host, &mut vms, now_s, 1);
    let [after, steady_after] = has(&vms);
    assert!(after > jumps + 7.0, "by what it once rose: {jumps} to {after}");
    assert!(steady_after < 2.5 * steady, "{steady} to {steady_after}");
}

#[test]
fn idle_memory_is_given_up_for_a_pool_that_forecasts_do_not_reach_and_pressure_does() {
    let (mut planner, host) = (Planner::new(Settings::default()), host(0.0, 32.0 * GIB));
    let mut vms = [1, 2, 3].map(|id| vm(id, Amounts::of(0.0, 32.0 * GIB)));
    for (vm, has) in vms.iter_mut().zip([14.0, 14.0, 4.0]) {
        vm.readings[1] = Some(reading(has * GIB, 3.0 * GIB));
    }
    let given = |vms: &[Vm; 3]| vms.iter().map(|vm| vm.readings[1].unwrap().allocated).sum::<f64>() / GIB;
    // No window has passed: it is taken because the host wants it.
    let decisions = rounds(&mut planner, &host, &mut vms, 1_000_000, 2);
    assert!(decisions.iter().all(|d| d.kind != Kind::Lower || d.reason == Reason::Shortage), "{decisions:?}");
    let left = given(&vms);
    assert!((28.0..=28.8).contains(&left), "a tenth of the host is free, and hardly more: {left}");
    let outlook = Some(Outlook { p50: 20.0 * GIB, p90: 20.0 * GIB, p95: 20.0 * GIB });
    vms[2].readings[1].as_mut().unwrap().outlook = outlook;
    rounds(&mut planner, &host, &mut vms, 1_000_020, 1);
    assert!(given(&vms) <= 28.8, "foreseen only: {}", given(&vms));
    let three = vms[2].readings[1].as_mut().unwrap();
    (three.used, three.pressure.some) = (three.allocated, 0.5);
    let before = three.allocated;
    rounds(&mut planner, &host, &mut vms, 1_000_030, 1);
    let more = (vms[2].readings[1].unwrap().allocated - before) / GIB;
    assert!(more >= 2.0, "in need: {more}");
}

/// One machine of 8 cores at most, whole ones, that has 2.
fn whole_cores() -> (Planner, Host, Vm) {
    let mut settings = Settings::default();
    settings.rules[0].grain = 1.0;
    let mut one = vm(1, Amounts::of(8.0, 0.0));
    one.readings[0] = Some(reading(2.0, 0.2));
    (Planner::new(settings), host(16.0, 0.0), one)
}

#[test]
fn a_maximum_of_one_core_less_is_kept_or_it_is_said_why_not() {
    let (mut planner, host, mut one) = whole_cores();
    one.policy.max = Amounts::of(1.0, 0.0);
    let mut unable = one.clone();
    let decisions = rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_000, 3);
    assert_eq!(decisions.len(), 1, "{decisions:?}");
    assert_eq!((decisions[0].kind, decisions[0].reason, decisions[0].to), (Kind::Lower, Reason::Maximum, 1.0));

    unable.abilities = Abilities { known: true, ..Abilities::default() };
    let decisions = rounds(&mut whole_cores().0, &host, std::slice::from_mut(&mut unable), 1_000_000, 30);
    assert_eq!(decisions.len(), 1, "said once: {decisions:?}");
    let words = "cpu stays at 2.00 cores instead of 1.00 cores: vCPUs cannot be unplugged and no quota can be set";
    assert_eq!((decisions[0].kind, decisions[0].to_string().as_str()), (Kind::Refuse, words));
}

#[test]
fn nothing_is_refused_for_want_of_what_is_not_known_yet() {
    let (mut planner, host, mut one) = whole_cores();
    one.readings[0] = Some(reading(2.0, 2.0));
    one.abilities = Abilities::default();
    assert!(rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_000, 3).is_empty());
    one.abilities = Abilities::ALL;
    let decisions = rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_030, 1);
    assert_eq!(decisions[0].kind, Kind::Raise, "{decisions:?}");
}

/// A machine of which memory is being taken, and what is decided `after_s` later of what it then is.
fn while_it_is_lowered(after_s: u64, then: impl FnOnce(&mut Vm)) -> Vec<Decision> {
    let (mut planner, host) = (Planner::new(Settings::default()), host(0.0, 64.0 * GIB));
    let mut one = vm(1, Amounts::of(0.0, 16.0 * GIB));
    one.readings[1] = Some(reading(8.0 * GIB, GIB));
    let mut now_s = 1_000_000;
    while one.readings[1].unwrap().allocated == 8.0 * GIB {
        assert!(now_s < 1_010_000, "nothing was taken");
        rounds(&mut planner, &host, std::slice::from_mut(&mut one), now_s, 1);
        now_s += 10;
    }
    // Nothing of it has come yet.
    one.readings[1] = Some(reading(8.0 * GIB, GIB));
    then(&mut one);
    rounds(&mut planner, &host, std::slice::from_mut(&mut one), now_s - 10 + after_s, 1)
}

#[test]
fn no_raise_waits_for_a_lowering() {
    for after_s in [10, 70] {
        let decisions = while_it_is_lowered(after_s, |vm| vm.policy.min = Amounts::of(0.0, 12.0 * GIB));
        assert_eq!((decisions[0].kind, decisions[0].reason), (Kind::Raise, Reason::Floor), "{decisions:?}");
        let decisions = while_it_is_lowered(after_s, |vm| {
            vm.readings[1] = Some(Reading {
                outlook: Some(Outlook { p50: 9.0 * GIB, p90: 9.0 * GIB, p95: 9.0 * GIB }),
                ..reading(8.0 * GIB, GIB)
            })
        });
        assert_eq!((decisions[0].kind, decisions[0].reason), (Kind::Raise, Reason::Foreseen), "{decisions:?}");
    }
}

#[test]
fn a_raise_that_was_withdrawn_did_not_fail_and_is_decided_anew_as_it_was() {
    let (mut planner, host, mut one) = whole_cores();
    one.readings[0] = Some(Reading { pressure: Pressure { some: 0.5, full: 0.0 }, ..reading(2.0, 1.0) });
    let none = Reservations::new();
    for now_s in 1_000_000..1_000_200 {
        let decisions = planner.plan(&Input { now_s, host: &host, vms: &[one.clone()], reservations: &none });
        let decided = decisions.first().map(|it| (it.kind, it.to));
        assert_eq!(decided, Some((Kind::Raise, 4.0)), "{now_s}: {decisions:?}");
        planner.withdraw(VmId(1), Resource::Cpu);
    }
}

#[test]
fn a_change_of_one_core_is_waited_for() {
    let (mut planner, host, mut one) = whole_cores();
    one.readings[0] = Some(reading(2.0, 1.9));
    let none = Reservations::new();
    let mut raises = 0;
    for now_s in 1_000_000..1_000_009 {
        let decisions = planner.plan(&Input { now_s, host: &host, vms: &[one.clone()], reservations: &none });
        raises += decisions.iter().filter(|it| it.kind == Kind::Raise).count();
    }
    assert_eq!(raises, 1);
}

#[test]
fn what_runs_keeps_what_it_is_to_need_and_gets_nothing_for_it_before() {
    let lowest = |rest: Option<f64>| {
        let (mut planner, host) = (Planner::new(Settings::default()), host(0.0, 64.0 * GIB));
        let mut one = vm(1, Amounts::of(0.0, 16.0 * GIB));
        let rest = rest.map(|most| Outlook { p50: most, p90: most, p95: most });
        one.readings[1] = Some(Reading { rest, ..reading(4.0 * GIB, GIB) });
        let decisions = rounds(&mut planner, &host, std::slice::from_mut(&mut one), 1_000_000, 1000);
        assert!(decisions.iter().all(|it| it.kind != Kind::Raise), "{decisions:?}");
        one.readings[1].unwrap().allocated
    };
    assert!(lowest(None) < 1.5 * GIB);
    assert_eq!((lowest(Some(3.0 * GIB)), lowest(Some(8.0 * GIB))), (3.0 * GIB, 4.0 * GIB));
}

#[test]
fn words_say_what_stands_in_the_way_and_until_when() {
    let (mut planner, host, mut one) = whole_cores();
    one.readings[0] = Some(reading(2.0, 2.0));
    let none = Reservations::new();
    let words: Vec<String> = (1_000_000..1_000_020)
        .flat_map(|now_s| planner.plan(&Input { now_s, host: &host, vms: &[one.clone()], reservations: &none }))
        .map(|decision| decision.to_string())
        .collect();
    let last = "cpu stays at 2.00 cores instead of 3.00 cores: the last change had no effect; tried again in 20 s";
    assert_eq!(words.last().unwrap(), last, "{words:?}");
    assert!(words.iter().any(|it| it.contains("the last change is still under way, 2.00 cores in use")), "{words:?}");
    one.policy.max = Amounts::of(3.0, 0.0);
    let most = rounds(&mut whole_cores().0, &host, std::slice::from_mut(&mut one), 1_000_000, 1);
    assert_eq!(most[0].to_string(), "cpu from 2.00 cores to 3.00 cores: 2.00 cores in use; it can have no more");
}
