//! What the state and the loop promise, on libvirt's test driver.

use super::flow::Covariates;
use super::gather::settle_pending;
use super::order::NotDone;
use super::run::{Demand, stirred};
use super::{HostSettings, Order, State};
use crate::config::Config;
use crate::planner::{self, Numbers, Reason, VmId};
use crate::store::demand::{self as ledger, DecisionKind, Outcome};
use crate::store::executions::ExecutionState;
use crate::store::{Store, StoreOptions};
use prestage_integration::api::demand::{
    ExecutionStart, ExecutionsQuery, Mode, ReservationRequest, Resource, ResourcePolicy, VmPolicy,
};
use prestage_integration::libvirt::act::{Ability, ActError};
use prestage_integration::libvirt::stats::{CollectConfig, Collector, GuestMemory, HostSample, Turn, VmSample};
use prestage_integration::libvirt::{
    Hypervisor, HypervisorConfig, HypervisorEvent, Uuid, VmEvent, VmEventKind, VmId as Named,
};
use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::broadcast;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const NOW_S: u64 = 1_800_000_000;

/// A host of its own with one running machine of 2 of 8 GiB.
struct Bed {
    folder: tempfile::TempDir,
    hypervisor: Hypervisor,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let node = folder.path().join("node.xml");
        let domain = "<domain type='test'><name>test</name><memory>8388608</memory><currentMemory>2097152</currentMemory>\
            <vcpu>2</vcpu><os><type>hvm</type></os><devices><memballoon model='virtio'/></devices></domain>";
        std::fs::write(&node, format!("<node>{domain}</node>")).unwrap();
        let uri = format!("test://{}", node.display());
        let hypervisor = Hypervisor::start(HypervisorConfig { uri, ..HypervisorConfig::default() }).unwrap();
        Self { folder, hypervisor }
    }

    fn config(&self) -> Config {
        let file = self.folder.path().join("prestaged.toml");
        std::fs::write(&file, "").unwrap();
        Config::load(&file, &[]).unwrap()
    }

    fn store(&self) -> Store {
        Store::open(&self.folder.path().join("prestage.db")).unwrap()
    }

    async fn sample(&self) -> VmSample {
        Collector::new(self.hypervisor.clone(), CollectConfig::default()).turn().await.vms.unwrap().remove(0)
    }

    /// With the machine measured, its abilities known, to be changed.
    async fn demand(&self, store: &Store) -> (Demand, Uuid) {
        let demand = Demand::new(store.clone(), self.hypervisor.clone(), &self.config(), "host", u64::MAX).unwrap();
        let sample = self.sample().await;
        let uuid = sample.vm.uuid;
        let policy = VmPolicy { mode: Mode::Act, ..VmPolicy::default() };
        demand.state.lock().set_policy(uuid, Some(policy));
        demand.state.lock().take(Turn { host: HostSample::default(), vms: Ok(vec![sample]) }, NOW_S);
        demand.ask_abilities(&mut HashMap::new()).await;
        if let Some(abilities) = demand.state.lock().machines.get_mut(&uuid).and_then(|it| it.abilities.as_mut()) {
            // The driver takes what no hypervisor would.
            abilities.vcpus.fewest = 1;
        }
        (demand, uuid)
    }

    async fn vcpus(&self) -> u32 {
        self.hypervisor.list().await.unwrap()[0].vcpus
    }
}

/// One vCPU in place of two.
fn order(uuid: Uuid) -> Order {
    let decision = planner::Decision {
        vm: VmId(uuid.as_u128()),
        resource: planner::Resource::Cpu,
        kind: planner::Kind::Lower,
        reason: Reason::Idle,
        before: 2.0,
        to: 1.0,
        mode: planner::Mode::Act,
        numbers: Numbers::default(),
        runaway: false,
        missing: None,
    };
    Order { decision, uuid, name: "test".into(), resource: Resource::Cpu, mode: Mode::Act, outlook: None }
}

/// Waits for what a task brings about.
async fn until(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 30 s: {what}");
}

fn old_decision(at_us: u64, why: String) -> ledger::Decision {
    ledger::Decision {
        at_us,
        vm: Uuid::from_u128(1).to_string(),
        resource: ledger::Resource::Memory,
        mode: ledger::Mode::Act,
        kind: DecisionKind::Raise,
        before: Some(1.0),
        asked: Some(2.0),
        pending: true,
        why,
        forecast: None,
    }
}

fn decisions(store: &Store) -> Vec<(DecisionKind, Outcome)> {
    let all = ledger::Decisions { limit: 100, ..ledger::Decisions::default() };
    store.decisions(&all).unwrap().into_iter().map(|row| (row.decision.kind, row.outcome)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_full_disk_nothing_is_done_and_with_room_it_goes_on() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    store.leave_room(0).await.unwrap();
    // Until the last half-filled page of decisions is full, too.
    let mut at_us = 0;
    for why in [2000, 1] {
        while store.record_decision(old_decision(at_us, "w".repeat(why)), None).await.is_ok() {
            at_us += 1;
        }
    }
    let had = decisions(&store);
    for _ in 0..3 {
        demand.carry_out(order(uuid));
        until("the refusal", || !demand.state.lock().is_busy(&order(uuid))).await;
    }
    until("the count", || demand.trouble().is_some_and(|trouble| trouble.starts_with("3 decisions"))).await;
    let trouble = demand.trouble().unwrap();
    assert!(trouble.contains("not carried out") && trouble.contains("no space left"), "{trouble}");
    assert_eq!((decisions(&store), bed.vcpus().await), (had, 2), "not on record and not done");
    assert!(store.condition().degraded.is_some());

    store.leave_room(1000).await.unwrap();
    demand.carry_out(order(uuid));
    until("the change", || decisions(&store).first() == Some(&(DecisionKind::Lower, Outcome::Done))).await;
    assert_eq!((bed.vcpus().await, demand.trouble(), store.condition().degraded), (1, None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_goes_on_record_once_the_database_takes_it() {
    let bed = Bed::new();
    let path = bed.folder.path().join("prestage.db");
    let options = StoreOptions { busy_timeout: Duration::from_millis(10), ..StoreOptions::default() };
    let store = Store::open_with(&path, options).unwrap();
    let (demand, uuid) = bed.demand(&store).await;
    let turn = demand.state.lock().turn_of(uuid);
    let held = turn.lock().await;
    demand.carry_out(order(uuid));
    until("the record", || !decisions(&store).is_empty()).await;
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    drop(held);
    until("the refusal", || store.condition().degraded.is_some()).await;
    assert_eq!((bed.vcpus().await, decisions(&store)), (1, vec![(DecisionKind::Lower, Outcome::Pending)]));
    other.execute_batch("ROLLBACK").unwrap();
    until("the outcome", || decisions(&store) == [(DecisionKind::Lower, Outcome::Done)]).await;
}

#[tokio::test]
async fn demand_tables_that_make_no_sense_are_begun_anew() {
    let bed = Bed::new();
    drop(bed.store());
    let raw = rusqlite::Connection::open(bed.folder.path().join("prestage.db")).unwrap();
    let uuid = Uuid::from_u128(7).to_string();
    let policy = "{\"mode\":\"act\"}";
    raw.execute("INSERT INTO policies VALUES (?, ?, 1)", [&uuid, policy]).unwrap();
    for (vm, data) in [("no uuid", policy), ("00000000-0000-0000-0000-000000000008", "{\"margin\":-5}")] {
        raw.execute("INSERT INTO policies VALUES (?, ?, 1)", [vm, data]).unwrap();
    }
    raw.execute("INSERT INTO policies VALUES (x'ff00', x'00', 'x')", []).unwrap();
    raw.execute("INSERT INTO reservations VALUES ('1', 2.5, x'00', 'a', 'admitted', 3, 'y')", []).unwrap();
    raw.execute("INSERT INTO kept VALUES ('event:x', 5), (6, 'y'), ('course:p', x'0102'), ('event:1', '{}')", [])
        .unwrap();
    let sql = "INSERT INTO programs VALUES ('p', 1, '{', x''), ('q', 1, '{}', x'0102'), (x'ff', 'x', 2, 3)";
    raw.execute(sql, []).unwrap();
    raw.execute("INSERT INTO executions VALUES (1, 'no uuid', '', 'x', NULL, 'running', '{}')", []).unwrap();
    raw.execute("INSERT INTO executions VALUES (2, ?, '', 1, NULL, 'running', '{}')", [&uuid]).unwrap();
    drop(raw);
    let store = bed.store();
    let demand = Demand::new(store, bed.hypervisor.clone(), &bed.config(), "host", u64::MAX).unwrap();
    let state = demand.state.lock();
    assert_eq!(state.policies.keys().map(Uuid::to_string).collect::<Vec<_>>(), [uuid]);
    assert!(state.promised(0).is_empty() && state.calendar.list(0).is_empty());
    assert!(state.catalogue().list(None, None, 9).0.is_empty());
    assert!(state.executions(&ExecutionsQuery::default(), None).executions.is_empty());
}

/// A machine of 1 GiB whose guest says that it has so much to spare.
async fn plan_with(spare: u64, autodeflate: bool) -> (State, Vec<Order>) {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let mut sample = bed.sample().await;
    sample.memory.current_bytes = Some(GIB);
    sample.memory.maximum_bytes = Some(8 * GIB);
    sample.memory.period = Some(Duration::from_secs(1));
    sample.memory.guest = Some(GuestMemory {
        total_bytes: GIB,
        free_bytes: 0,
        available_bytes: Some(spare),
        cache_bytes: None,
        swap_in_bps: None,
        swap_out_bps: None,
        major_faults: None,
        age: Duration::ZERO,
    });
    let settings = demand.state.lock().settings;
    let mut state = std::mem::replace(&mut *demand.state.lock(), State::new(settings));
    let machine = state.machines.get_mut(&uuid).unwrap();
    let abilities = machine.abilities.as_mut().unwrap();
    (abilities.autodeflate, abilities.balloon) = (autodeflate, Ability::Yes);
    let host = HostSample { cpus: 4, memory_bytes: 64 * GIB, ..HostSample::default() };
    state.take(Turn { host, vms: Ok(vec![sample]) }, NOW_S + 1);
    let orders = state.plan(NOW_S + 1);
    (state, orders.into_iter().filter(|order| order.resource == Resource::Memory).collect())
}

#[tokio::test]
async fn a_guest_that_its_balloon_does_not_save_gets_much_at_once() {
    let (state, orders) = plan_with(20 * MIB, false).await;
    assert!(state.is_tight(NOW_S + 1) && !state.is_tight(NOW_S + 60), "looked at more often while it is there");
    let decision = &orders[0].decision;
    assert_eq!((decision.kind, decision.reason), (planner::Kind::Raise, Reason::Pressure), "{decision}");
    assert!(decision.to >= (2 * GIB) as f64, "{decision}");

    let (state, orders) = plan_with(20 * MIB, true).await;
    assert!(!state.is_tight(NOW_S + 1));
    assert_eq!((orders[0].decision.reason, orders[0].decision.kind), (Reason::Use, planner::Kind::Raise));

    let (state, orders) = plan_with(130 * MIB, false).await;
    assert!(state.is_tight(NOW_S + 1), "looked at, as it may soon be short");
    assert!(orders.iter().all(|order| order.decision.reason != Reason::Pressure), "{:?}", orders.first());
    assert!(!plan_with(500 * MIB, false).await.0.is_tight(NOW_S + 1));
}

#[tokio::test]
async fn a_raise_that_meets_a_lowering_is_said_once_and_carried_out_when_that_is_over() {
    let (mut state, orders) = plan_with(20 * MIB, false).await;
    let raise = orders[0].clone();
    let mut lower = raise.clone();
    lower.decision.kind = planner::Kind::Lower;
    let now = Instant::now();
    assert_eq!(state.changes(&lower, now).unwrap().len(), 1);
    assert_eq!(state.changes(&raise, now), Err(NotDone::Later("a change of it is under way".to_owned())));
    for at in 2..8 {
        let orders = state.plan(NOW_S + at);
        let again = orders.iter().find(|order| order.resource == Resource::Memory).unwrap();
        assert_eq!((again.decision.kind, again.decision.to), (raise.decision.kind, raise.decision.to));
        assert_eq!(state.changes(again, now), Err(NotDone::Said));
    }
    // That the guest gave nothing says nothing of what it takes.
    let error = ActError::Refused { vm: "test".into(), reason: "it has nothing to spare".into() };
    state.done(&lower, &[Err(error)], now);
    assert!(state.changes(&raise, now).is_ok());
    state.done(&raise, &[], now);
    let Err(NotDone::Later(words)) = state.changes(&lower, now) else { panic!("a lowering that failed waits") };
    assert!(words.starts_with("it failed 1 times; tried again in "), "{words}");
}

#[tokio::test]
async fn vcpus_that_cannot_go_are_said_once_and_what_it_has_is_what_was_measured() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let mut state = demand.state.lock();
    let now = Instant::now();
    // What can be done to it was asked before it had 2.
    let vcpus = &mut state.machines.get_mut(&uuid).unwrap().abilities.as_mut().unwrap().vcpus;
    (vcpus.current, vcpus.maximum) = (1, 2);
    assert!(state.changes(&order(uuid), now).is_ok());
    state.done(&order(uuid), &[], now);
    state.machines.get_mut(&uuid).unwrap().abilities.as_mut().unwrap().vcpus.fewest = 2;
    let words = "it can have 2 to 2 vCPUs while it runs".to_owned();
    assert_eq!(state.changes(&order(uuid), now), Err(NotDone::Later(words)));
    assert_eq!(state.changes(&order(uuid), now), Err(NotDone::Said));
}

#[tokio::test]
async fn a_guest_that_boots_is_not_said_to_lack_a_balloon() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let mut sample = bed.sample().await;
    (sample.memory.current_bytes, sample.memory.maximum_bytes) = (Some(2 * GIB), Some(8 * GIB));
    let mut state = demand.state.lock();
    let none = Ability::No("its guest does not answer".into());
    let mut abilities = state.machines[&uuid].abilities.clone().unwrap();
    abilities.balloon = none;
    let mut refused = |from_s: u64, until_s: u64| {
        let mut refused = Vec::new();
        for now_s in from_s..until_s {
            let machine = state.machines.get_mut(&uuid).unwrap();
            machine.flow(Resource::Memory).observe(now_s, (2 * GIB) as f64, &|_| Covariates::default());
            let host = HostSample { cpus: 4, memory_bytes: 64 * GIB, ..HostSample::default() };
            state.take(Turn { host, vms: Ok(vec![sample.clone()]) }, now_s);
            state.machines.get_mut(&uuid).unwrap().abilities = Some(abilities.clone());
            refused.extend(state.plan(now_s).into_iter().filter(|it| it.decision.reason == Reason::Unable));
        }
        refused.retain(|it| it.resource == Resource::Memory);
        refused
    };
    assert!(refused(NOW_S, NOW_S + 100).is_empty());
    assert_eq!(refused(NOW_S + 100, NOW_S + 200).len(), 1);
}

#[tokio::test]
async fn a_machine_whose_most_is_not_known_keeps_what_it_has() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let mut sample = bed.sample().await;
    (sample.memory.maximum_bytes, sample.cpu.vcpus_max) = (None, None);
    let host = HostSample { cpus: 4, memory_bytes: 64 * GIB, ..HostSample::default() };
    let mut state = demand.state.lock();
    state
        .machines
        .get_mut(&uuid)
        .unwrap()
        .flow(Resource::Memory)
        .observe(NOW_S, GIB as f64, &|_| Covariates::default());
    state.take(Turn { host, vms: Ok(vec![sample]) }, NOW_S + 1);
    let orders = state.plan(NOW_S + 1);
    assert!(orders.iter().all(|order| order.decision.kind != planner::Kind::Lower), "{}", orders[0].decision);
}

#[tokio::test]
async fn what_a_guest_says_is_no_more_than_it_can_have() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let mut sample = bed.sample().await;
    sample.memory.maximum_bytes = Some(8 * GIB);
    let mut state = demand.state.lock();
    let lies = [(u64::MAX, 0), (0, u64::MAX), (u64::MAX, u64::MAX), (GIB, 2 * GIB), (1, 0)];
    for at in 0..600u64 {
        let (total_bytes, spare) = lies[at as usize % lies.len()];
        sample.memory.guest = Some(GuestMemory {
            total_bytes,
            free_bytes: spare,
            available_bytes: (at % 2 == 0).then_some(spare),
            cache_bytes: Some(u64::MAX),
            swap_in_bps: Some(f64::MAX),
            swap_out_bps: Some(if at % 3 == 0 { f64::NAN } else { f64::INFINITY }),
            major_faults: Some(-1.0),
            age: Duration::ZERO,
        });
        sample.memory.current_bytes = Some(if at % 50 == 0 { u64::MAX } else { 2 * GIB });
        let host = HostSample { cpus: 4, memory_bytes: 16 * GIB, ..HostSample::default() };
        state.take(Turn { host, vms: Ok(vec![sample.clone()]) }, NOW_S + at);
        for order in state.plan(NOW_S + at) {
            let to = order.decision.to;
            assert!(to.is_finite() && (0.0..=(8 * GIB) as f64).contains(&to), "{}", order.decision);
        }
        let machine = state.machines.get_mut(&uuid).unwrap();
        assert!(machine.flow(Resource::Memory).used().unwrap().1 <= (8 * GIB) as f64);
    }
    let machine = state.machines.get_mut(&uuid).unwrap();
    let peak = machine.flow(Resource::Memory).forecast(600, &Covariates::default()).unwrap().peak.0;
    assert!(peak.iter().all(|q| q.is_finite() && *q <= 1e12), "{peak:?}");
}

#[tokio::test]
async fn a_clock_that_is_set_back_leaves_nobody_here_who_is_gone() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, _) = bed.demand(&store).await;
    let sample = bed.sample().await;
    let mut state = demand.state.lock();
    let earlier = NOW_S - 3600;
    assert!(!state.machines.values().any(|machine| machine.is_here(earlier)));
    assert!(state.plan(earlier).is_empty());
    state.take(Turn { host: HostSample::default(), vms: Ok(vec![sample]) }, earlier);
    assert!(state.machines.values().all(|machine| machine.is_here(earlier)), "the next turn finds it again");
}

#[tokio::test]
async fn what_happens_to_a_guests_memory_wakes_the_loop() {
    let (sender, mut events) = broadcast::channel(4);
    let vm = || Named { uuid: Uuid::nil(), name: "a".into() };
    let event = |kind| HypervisorEvent::Vm(VmEvent { vm: vm(), kind, at: SystemTime::UNIX_EPOCH });
    let woken = async |events: &mut broadcast::Receiver<HypervisorEvent>| {
        tokio::time::timeout(Duration::from_millis(50), stirred(events)).await.is_ok()
    };
    for kind in [VmEventKind::Defined, VmEventKind::AgentConnected, VmEventKind::Shutdown] {
        sender.send(event(kind)).unwrap();
    }
    assert!(!woken(&mut events).await);
    for kind in [VmEventKind::BalloonChanged { bytes: 1 }, VmEventKind::Rebooted, VmEventKind::Started] {
        sender.send(event(kind)).unwrap();
        assert!(woken(&mut events).await);
    }
    (0..9).for_each(|_| drop(sender.send(event(VmEventKind::Defined))));
    assert!(woken(&mut events).await, "what was missed may have been one");
    drop(sender);
    assert!(!woken(&mut events).await, "libvirt is gone for good: the beat goes on");
}

#[tokio::test]
async fn what_a_killed_daemon_was_about_is_not_under_way_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("prestage.db")).unwrap();
    let decision = old_decision(5, "foreseen".to_owned());
    store.record_decision(decision, None).await.unwrap();
    assert_eq!(store.pending_decisions().unwrap().len(), 1);
    settle_pending(&store).unwrap();
    // Writes are done in order: this one comes after.
    store.keep("after".to_owned(), Vec::new()).await.unwrap();
    assert!(store.pending_decisions().unwrap().is_empty());
    let rows = store.decisions(&ledger::Decisions { limit: 10, ..ledger::Decisions::default() }).unwrap();
    assert_eq!(rows[0].outcome, Outcome::Failed);
    assert!(rows[0].decision.why.contains("ended while"), "{:?}", rows[0]);
}

#[tokio::test]
async fn a_program_that_runs_is_taken_up_by_the_next_daemon_and_told_of_its_end() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let start = ExecutionStart { vm: "test".into(), program: "report".into(), ..ExecutionStart::default() };
    let (execution, row, learned) = demand.state.lock().begin(uuid, start, NOW_S * 1000).unwrap();
    assert!(row.instance.len() > 36, "the host's boot and the machine's number: {}", row.instance);
    store.start_execution(row, learned).await.unwrap();
    let (again, _) = bed.demand(&store).await;
    again.settle(NOW_S).await;
    let listed = again.state.lock().executions(&ExecutionsQuery::default(), Some(uuid)).executions;
    assert_eq!(listed, std::slice::from_ref(&execution));
    again.execution_end(execution.id).await.unwrap();
    assert!(again.execution_end(execution.id).await.is_err());
    let catalogue = again.store.programs().unwrap();
    assert_eq!(catalogue.iter().map(|row| row.last_s).collect::<Vec<_>>(), [NOW_S; 3], "under each of its keys");

    // Its machine was started anew while the next but one was away.
    let start = ExecutionStart { vm: "test".into(), program: "other".into(), ..ExecutionStart::default() };
    let (execution, mut row, learned) = again.state.lock().begin(uuid, start, NOW_S * 1000).unwrap();
    row.instance.push('0');
    store.start_execution(row, learned).await.unwrap();
    let (last, _) = bed.demand(&store).await;
    last.settle(NOW_S).await;
    assert!(last.execution_end(execution.id).await.is_err());
    // Writes are done in order: this one comes after.
    store.keep("after".to_owned(), Vec::new()).await.unwrap();
    assert!(store.executions(u64::MAX).unwrap().is_empty());
}

#[test]
fn promises_that_are_over_or_odd_cost_those_that_hold_nothing() {
    let bed = tempfile::tempdir().unwrap();
    let path = bed.path().join("prestage.db");
    let store = Store::open(&path).unwrap();
    let row = |id: u64, from_s: u64, to_s: u64, cores: f64| {
        let amounts = planner::Amounts::of(cores, 0.0);
        let promise = planner::Promise {
            vm: None,
            from_s,
            to_s,
            guaranteed: amounts,
            oversubscribed: planner::Amounts::of(0.0, 0.0),
            likely: None,
        };
        let booking = planner::Booking { id: planner::BookingId(id), promise };
        let request = prestage_integration::api::demand::ReservationRequest::default();
        ledger::Reservation {
            id: id.to_string(),
            vm: String::new(),
            from_s,
            to_s,
            state: ledger::ReservationState::Admitted,
            data: serde_json::json!({ "request": request, "booking": booking }).to_string(),
            changed_unix_ms: 1,
        }
    };
    // More that are over than there may be at once, one that cannot be, and two that hold.
    for id in 0..4200 {
        drop(store.set_reservation(row(id, 5, 6, 1.0), None));
        if id % 500 == 0 {
            store.keep("wait".to_owned(), Vec::new()).wait().unwrap();
        }
    }
    for odd in
        [row(4200, NOW_S, NOW_S + 60, -1.0), row(4201, NOW_S, NOW_S + 60, 1.0), row(4202, NOW_S + 60, NOW_S + 90, 2.0)]
    {
        store.set_reservation(odd, None).wait().unwrap();
    }
    let mut state = State::new(HostSettings::plain());
    state.restore_reservations(&store, NOW_S).unwrap();
    let held: Vec<u64> = state.reservations.bookings().iter().map(|booking| booking.id.0).collect();
    assert_eq!(held, [4201, 4202]);
    let json = serde_json::to_value(&state.reservations).unwrap();
    assert_eq!(json["next"], 4203, "no number is used again");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_machine_can_never_have_is_neither_promised_nor_its_minimum() {
    let bed = Bed::new();
    let store = bed.store();
    let (demand, uuid) = bed.demand(&store).await;
    let mut state = demand.state.lock();
    // What the driver does not tell.
    let sample = state.machines.get_mut(&uuid).and_then(|machine| machine.sample.as_mut()).unwrap();
    (sample.cpu.vcpus, sample.cpu.vcpus_max) = (Some(2), Some(2));
    (sample.memory.current_bytes, sample.memory.maximum_bytes) = (Some(2 * GIB), Some(8 * GIB));
    state.host.cpus = 64;
    state.host.memory_bytes = 256 * GIB;
    let ask = |vcpus, memory_bytes| ReservationRequest {
        vcpus,
        memory_bytes,
        from_unix_ms: NOW_S * 1000,
        until_unix_ms: (NOW_S + 3600) * 1000,
        ..ReservationRequest::default()
    };
    let refused = |state: &mut State, request| state.reserve(request, Some(uuid), NOW_S).unwrap_err().to_string();
    assert_eq!(
        refused(&mut state, ask(0.0, 9 * GIB)),
        "memory: 9.0 GiB asked for, but the machine's definition allows 8.0 GiB at most; ask for less, or raise that first"
    );
    assert!(refused(&mut state, ask(4.0, 0)).contains("definition allows 2.00 cores"));
    assert!(state.reserve(ask(4.0, 9 * GIB), None, NOW_S).is_ok(), "a machine that is to come may be larger");
    state.reserve(ask(0.0, 6 * GIB), Some(uuid), NOW_S).unwrap();
    assert!(refused(&mut state, ask(0.0, 6 * GIB)).contains("beside 6.0 GiB promised to it already"));
    // By its policy.
    let memory = |min, max| {
        let of = ResourcePolicy { min, max, ..ResourcePolicy::default() };
        VmPolicy { mode: Mode::Act, resources: [(Resource::Memory, of)].into(), ..VmPolicy::default() }
    };
    state.set_policy(uuid, Some(memory(None, Some(7.0 * GIB as f64))));
    assert!(refused(&mut state, ask(0.0, 2 * GIB)).contains("its policy allows 7.0 GiB"));
    let most = state.check_policy(uuid, &memory(Some(9.0 * GIB as f64), None), NOW_S).unwrap_err();
    assert_eq!(most, "`memory.min` of 9.0 GiB is more than `test` can have: its definition allows 8.0 GiB at most");
    state.set_policy(uuid, Some(memory(None, Some(9.0 * GIB as f64))));
    let odd = state.machines[&uuid].odd_bounds();
    assert_eq!(odd, ["memory: max of 9.0 GiB has no effect: its definition allows 8.0 GiB"]);
    // Room is kept where nothing can be changed, and that is said.
    state.set_policy(uuid, None);
    let listed: Vec<Vec<String>> = state.promised(NOW_S).into_iter().map(|promise| promise.notes).collect();
    assert_eq!(listed, [vec![], vec!["memory: nothing is changed: mode observe; the room is kept".to_owned()]]);
    state.set_policy(uuid, Some(VmPolicy { mode: Mode::Act, ..VmPolicy::default() }));
    let abilities = state.machines.get_mut(&uuid).unwrap().abilities.as_mut().unwrap();
    abilities.balloon = Ability::No("no balloon".into());
    assert!(state.promised(NOW_S)[1].notes[0].contains("no balloon"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_a_locked_database_refuses_is_on_record_once_it_can_be() {
    let bed = Bed::new();
    let path = bed.folder.path().join("prestage.db");
    let options = StoreOptions { busy_timeout: Duration::from_millis(20), ..StoreOptions::default() };
    let store = Store::open_with(&path, options).unwrap();
    let (demand, uuid) = bed.demand(&store).await;
    // The state's own clock is that of the test; the API's is the host's.
    demand.state.lock().machines.get_mut(&uuid).unwrap().seen_s = crate::learner::run::unix_ms() / 1000;
    let start = ExecutionStart { vm: "test".into(), program: "report".into(), ..ExecutionStart::default() };
    let id = demand.execution_start(uuid, start).await.unwrap().id;
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(demand.execution_end(id).await.unwrap().ended_unix_ms.is_some());
    let runs = || store.executions(0).unwrap().iter().any(|row| row.state == ExecutionState::Running);
    assert!(runs(), "it could not be written down");
    other.execute_batch("COMMIT").unwrap();
    until("its end is on record", || !runs()).await;
}
