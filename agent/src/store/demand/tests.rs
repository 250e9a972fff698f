//! What decisions, events and promises promise.

use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use rusqlite::Connection;

use super::*;
use crate::store::{Store, StoreError};

const LONG: Duration = Duration::from_secs(60);
const US: u64 = 1_700_000_000_000_000;

fn open(path: &Path) -> Store {
    Store::open(path).unwrap()
}

fn decision(vm: &str, at_us: u64, pending: bool) -> Decision {
    Decision {
        at_us,
        vm: vm.to_owned(),
        resource: Resource::Memory,
        mode: Mode::Act,
        kind: DecisionKind::Raise,
        before: Some(1e9),
        asked: Some(2e9),
        pending,
        why: "p95 of the next 10 min is 1.9 GB".to_owned(),
        forecast: Some("{\"p95\":1.9e9}".to_owned()),
    }
}

fn event(kind: &str, subject: &str) -> NewEvent {
    NewEvent {
        kind: kind.to_owned(),
        source: "/prestage/h".to_owned(),
        subject: subject.to_owned(),
        at_us: US,
        data: "{\"a\":1}".to_owned(),
    }
}

fn endpoint(name: &str, kinds: &[&str]) -> Endpoint {
    Endpoint { name: name.to_owned(), kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect() }
}

fn heads(store: &Store, name: &str) -> Vec<(String, u64)> {
    store.waiting(name).unwrap().into_iter().map(|head| (head.subject, head.seq)).collect()
}

#[test]
fn a_decision_and_its_event_are_there_together_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = open(&path);
    store.set_endpoints(vec![endpoint("m", &["*"])]).wait().unwrap();
    store.record_decision(decision("a", US, true), None).wait().unwrap();
    assert_eq!(store.pending_decisions().unwrap().len(), 1);
    let again = store.record_decision(decision("a", US, true), Some(event("x", "a"))).wait();
    assert!(matches!(again, Err(StoreError::AlreadyExists { what: "decision", .. })), "{again:?}");
    assert_eq!(heads(&store, "m"), [], "the event went with the decision");
    let done = Completion {
        outcome: Outcome::Partial,
        got: Some(1.5e9),
        verified: true,
        took_ms: Some(1200),
        why: "the balloon gave no more".into(),
    };
    let finish = |at_us, done: Completion| {
        store.finish_decision(("a", Resource::Memory, at_us), done, Some(event("x", "a"))).wait()
    };
    assert!(matches!(finish(US + 1, done.clone()), Err(StoreError::NotFound { .. })));
    assert!(matches!(
        finish(US, Completion { outcome: Outcome::Pending, ..done.clone() }),
        Err(StoreError::WrongState(_))
    ));
    assert_eq!(heads(&store, "m"), []);
    finish(US, done.clone()).unwrap();
    let twice = finish(US, done).unwrap_err().to_string();
    assert!(twice.contains("is partial already"), "{twice}");
    assert!(store.close(LONG));
    let store = open(&path);
    assert_eq!(heads(&store, "m"), [("a".to_owned(), 1)]);
    let rows = store.decisions(&Decisions { limit: 10, ..Decisions::default() }).unwrap();
    let [row] = rows.as_slice() else { panic!("{rows:?}") };
    assert_eq!(
        (row.outcome, row.got, row.verified, row.took_ms),
        (Outcome::Partial, Some(1.5e9), Some(true), Some(1200))
    );
    assert_eq!(row.decision.why, "p95 of the next 10 min is 1.9 GB; the balloon gave no more");
    assert_eq!(Decision { why: decision("a", US, false).why, ..row.decision.clone() }, decision("a", US, false));
    let told = store.event(1).unwrap().unwrap();
    assert_eq!((told.event, told.id.len()), (event("x", "a"), 32));

    let odd = Decision { forecast: Some("{".to_owned()), ..decision("b", US, false) };
    assert!(matches!(store.record_decision(odd, None).wait(), Err(StoreError::WrongState(_))));
    let long = NewEvent { data: format!("\"{}\"", "x".repeat(JSON_MAX)), ..event("x", "a") };
    assert!(matches!(store.record_event(long).wait(), Err(StoreError::WrongState(_))));
}

#[test]
fn pages_of_decisions_follow_each_other_without_gap_or_overlap() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    for n in 0..100 {
        let vm = ["a", "b", "c"][n as usize % 3];
        // Several at one time.
        store
            .record_decision(decision(vm, US + n / 6, false), None)
            .wait()
            .or_else(|error| match error {
                StoreError::AlreadyExists { .. } => {
                    let cpu = Decision { resource: Resource::Cpu, ..decision(vm, US + n / 6, false) };
                    store.record_decision(cpu, None).wait()
                }
                other => Err(other),
            })
            .unwrap();
    }
    for vm in [None, Some("b".to_owned())] {
        let which = Decisions { vm, limit: 1000, ..Decisions::default() };
        let all: Vec<i64> = store.decisions(&which).unwrap().iter().map(|row| row.id).collect();
        assert_eq!(all.len(), if which.vm.is_some() { 33 } else { 100 });
        let (mut paged, mut after) = (Vec::new(), None);
        loop {
            let page = store.decisions(&Decisions { limit: 7, after, ..which.clone() }).unwrap();
            let Some(last) = page.last() else { break };
            after = Some((last.decision.at_us, last.id));
            paged.extend(page.iter().map(|row| row.id));
        }
        assert_eq!(paged, all);
    }
    let range = Decisions {
        from_us: Some(US + 2),
        to_us: Some(US + 3),
        resource: Some(Resource::Cpu),
        limit: 100,
        ..Decisions::default()
    };
    let rows = store.decisions(&range).unwrap();
    assert!(rows.len() == 6 && rows.iter().all(|row| (US + 2..=US + 3).contains(&row.decision.at_us)));
    assert!(matches!(store.decisions(&Decisions::default()), Err(StoreError::WrongState(_))));
    store.record_decision(decision("z", 1, true), None).wait().unwrap();
    store.retain_decisions(US + 2, 50).wait().unwrap();
    let left = store.decisions(&Decisions { limit: 1000, ..Decisions::default() }).unwrap();
    assert_eq!(
        (left.len(), left.last().map(|row| row.decision.vm.as_str())),
        (50, Some("z")),
        "what is under way stays"
    );
    // Pages are found by index, not by reading all.
    let raw = Connection::open(folder.path().join("db")).unwrap();
    let plan =
        |sql: &str| -> String { raw.query_row(&format!("EXPLAIN QUERY PLAN {sql}"), [], |row| row.get(3)).unwrap() };
    let by_vm =
        plan("SELECT * FROM decisions WHERE vm = 'a' AND at_us BETWEEN 1 AND 2 ORDER BY at_us DESC, id DESC LIMIT 1");
    assert!(by_vm.contains("USING INDEX decisions_by_vm"), "{by_vm}");
}

#[test]
fn an_endpoint_gets_what_it_asked_for_in_order_for_each_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = open(&path);
    store.record_event(event("x", "nobody asked yet")).wait().unwrap();
    store.set_endpoints(vec![endpoint("all", &["*"]), endpoint("xy", &["x", "y"])]).wait().unwrap();
    for (kind, vm) in [("x", "a"), ("z", "a"), ("y", "b"), ("x", "a")] {
        store.record_event(event(kind, vm)).wait().unwrap();
    }
    let head = |vm: &str, seq| (vm.to_owned(), seq);
    assert_eq!(heads(&store, "all"), [head("a", 2), head("b", 4)]);
    assert_eq!(heads(&store, "xy"), [head("a", 2), head("b", 4)]);
    store.delivered("all", 2).wait().unwrap();
    store.undelivered("xy", 2, 77_000, false, "503").wait().unwrap();
    assert_eq!(heads(&store, "all"), [head("a", 3), head("b", 4)]);
    let waiting = store.waiting("xy").unwrap();
    assert_eq!((waiting[0].tries, waiting[0].next_unix_ms, waiting[0].since_unix_ms), (1, 77_000, US / 1000));
    // Given up, the next one's turn comes; and again, its own.
    store.undelivered("xy", 2, 77_000, true, "503").wait().unwrap();
    assert_eq!(heads(&store, "xy"), [head("b", 4), head("a", 5)]);
    assert!(store.close(LONG));
    let store = open(&path);
    let status = store.endpoints().unwrap();
    assert_eq!(
        status.iter().map(|of| (of.name.as_str(), of.waiting, of.dead)).collect::<Vec<_>>(),
        [("all", 3, 0), ("xy", 2, 1)]
    );
    assert_eq!(status[1].oldest_us, Some(US));
    store.revive("xy").wait().unwrap();
    assert!(matches!(store.revive("xy").wait(), Err(StoreError::NotFound { .. })));
    assert_eq!(heads(&store, "xy"), [head("a", 2), head("b", 4)]);
    // One that is gone from the configuration leaves nothing behind; the other keeps what waits.
    store.set_endpoints(vec![endpoint("xy", &["x"])]).wait().unwrap();
    assert_eq!((heads(&store, "all"), heads(&store, "xy").len()), (Vec::new(), 2));
    // What waits outlives retention, the rest goes.
    store.retain_events(u64::MAX, 0).wait().unwrap();
    let left: Vec<u64> = store.events_after(0, 100).unwrap().iter().map(|row| row.seq).collect();
    assert_eq!(left, [2, 4, 5]);
}

#[test]
fn the_outbox_is_bounded_and_the_oldest_are_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("db"));
    store.set_endpoints(vec![endpoint("m", &["*"])]).wait().unwrap();
    let mut last = None;
    for n in 0..WAITING_MAX + 5 {
        let pending = store.record_event(event("x", &format!("vm{}", n % 10)));
        if n % 500 == 0 {
            pending.wait().unwrap();
        } else {
            last = Some(pending);
        }
    }
    last.unwrap().wait().unwrap();
    let status = store.endpoints().unwrap();
    assert_eq!((status[0].waiting, status[0].dead), (WAITING_MAX, 5));
    assert_eq!(heads(&store, "m")[0], ("vm5".to_owned(), 6));
}

#[test]
fn policies_and_reservations_are_kept_through_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("db");
    let store = open(&path);
    store.set_endpoints(vec![endpoint("m", &["*"])]).wait().unwrap();
    let policy = PolicyRow { vm: "a".into(), data: "{\"min\":1}".into(), changed_unix_ms: 5 };
    store.set_policy(PolicyRow { data: "{}".into(), ..policy.clone() }).wait().unwrap();
    store.set_policy(policy.clone()).wait().unwrap();
    assert!(matches!(
        store.set_policy(PolicyRow { data: "min=1".into(), ..policy.clone() }).wait(),
        Err(StoreError::WrongState(_))
    ));
    let reservation = |id: &str, vm: &str, from_s, to_s, state| Reservation {
        id: id.into(),
        vm: vm.into(),
        from_s,
        to_s,
        state,
        data: "{\"cores\":2}".into(),
        changed_unix_ms: 6,
    };
    let one = reservation("r1", "a", 100, 200, ReservationState::Admitted);
    let two = reservation("r2", "b", 150, 300, ReservationState::Refused);
    store.set_reservation(one.clone(), Some(event("reservation.admitted", "a"))).wait().unwrap();
    store.set_reservation(two.clone(), None).wait().unwrap();
    let odd = reservation("r3", "b", 300, 300, ReservationState::Admitted);
    let error = store.set_reservation(odd, Some(event("x", "b"))).wait().unwrap_err().to_string();
    assert!(error.contains("`r3` ends at 300"), "{error}");
    assert!(store.close(LONG));
    let store = open(&path);
    assert_eq!(store.policies().unwrap(), [policy]);
    let all = |which: &Reservations| store.reservations(which).unwrap();
    assert_eq!(all(&Reservations::default()), [one.clone(), two.clone()]);
    assert_eq!(all(&Reservations { vm: Some("b".into()), ..Reservations::default() }), std::slice::from_ref(&two));
    assert_eq!(
        all(&Reservations { state: Some(ReservationState::Admitted), ..Reservations::default() }),
        std::slice::from_ref(&one)
    );
    assert_eq!(
        all(&Reservations { during_s: Some((200, 201)), ..Reservations::default() }),
        std::slice::from_ref(&two)
    );
    assert_eq!(all(&Reservations { during_s: Some((0, 150)), ..Reservations::default() }), std::slice::from_ref(&one));
    assert_eq!(heads(&store, "m"), [("a".to_owned(), 1)]);
    let active = Reservation { state: ReservationState::Active, ..one };
    store.set_reservation(active.clone(), None).wait().unwrap();
    store.retain_reservations(active.to_s).wait().unwrap();
    assert!(all(&Reservations::default()).contains(&active), "it ends then and not before");
    store.retain_reservations(u64::MAX).wait().unwrap();
    assert_eq!(all(&Reservations::default()), []);
    store.remove_policy("a").wait().unwrap();
    assert!(matches!(store.remove_policy("a").wait(), Err(StoreError::NotFound { .. })));
}

#[derive(Debug, Clone)]
enum Op {
    Event(u8),
    Delivered,
    Failed(bool),
    Restart,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// Whatever happens, an endpoint gets each machine's events in order, none twice and none left out but those given up.
    #[test]
    fn each_machine_is_told_in_order(ops in prop::collection::vec(
        prop_oneof![3 => (0..3u8).prop_map(Op::Event), 3 => Just(Op::Delivered), 1 => any::<bool>().prop_map(Op::Failed), 1 => Just(Op::Restart)], 1..60))
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("db");
        let mut store = open(&path);
        store.set_endpoints(vec![endpoint("m", &["*"])]).wait().unwrap();
        let mut expected: Vec<Vec<u64>> = vec![Vec::new(); 3];
        let mut seq = 0;
        for op in ops {
            let waiting = store.waiting("m").unwrap();
            let firsts: Vec<(String, u64)> = {
                let mut firsts: Vec<(u64, usize)> =
                    expected.iter().enumerate().filter_map(|(vm, seqs)| Some((*seqs.first()?, vm))).collect();
                firsts.sort_unstable();
                firsts.into_iter().map(|(seq, vm)| (vm.to_string(), seq)).collect()
            };
            prop_assert_eq!(waiting.iter().map(|head| (head.subject.clone(), head.seq)).collect::<Vec<_>>(), firsts);
            match op {
                Op::Event(vm) => {
                    seq += 1;
                    expected[usize::from(vm)].push(seq);
                    store.record_event(event("x", &vm.to_string())).wait().unwrap();
                }
                Op::Delivered => {
                    if let Some(head) = waiting.last() {
                        store.delivered("m", head.seq).wait().unwrap();
                        expected[head.subject.parse::<usize>().unwrap()].remove(0);
                    }
                }
                Op::Failed(dead) => {
                    if let Some(head) = waiting.first() {
                        store.undelivered("m", head.seq, 1, dead, "no").wait().unwrap();
                        if dead {
                            expected[head.subject.parse::<usize>().unwrap()].remove(0);
                        }
                    }
                }
                Op::Restart => {
                    prop_assert!(store.close(LONG));
                    store = open(&path);
                }
            }
        }
    }
}
