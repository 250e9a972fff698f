//! What the loop does with programs, events and activity, turn by turn, with a clock and samples of the test's own.

use super::*;
use crate::store::Store;
use crate::store::executions::{ExecutionRow, ExecutionState, Learned};
use prestage_integration::api::demand::{
    ActivityRequest, EventRequest, ExecutionStart, ExecutionsQuery, ResourcePolicy,
};
use prestage_integration::libvirt::act::{Abilities, Ability, VcpuAbility};
use prestage_integration::libvirt::stats::{CpuSample, MemorySample, VmSample};
use prestage_integration::libvirt::{VmId, VmState};

const VM: Uuid = Uuid::from_u128(0x11);
/// Cores that the machine always uses.
const IDLE: f64 = 0.25;
/// Midnight.
const T0: u64 = 1_700_006_400;

struct Loop {
    state: State,
    now_s: u64,
    instance: u32,
    learned: Vec<Learned>,
}

impl Loop {
    fn new(now_s: u64) -> Self {
        let mut state = State::new(HostSettings::plain());
        state.boot = "boot".into();
        Self { state, now_s, instance: 1, learned: Vec::new() }
    }

    /// Turns of a second each, in which so many cores are used.
    fn run(&mut self, seconds: u64, cores: f64) -> &mut Self {
        for _ in 0..seconds {
            self.now_s += 1;
            let cpu = CpuSample { vcpus: Some(2), vcpus_max: Some(8), used_cores: Some(cores), ..CpuSample::default() };
            let sample = VmSample {
                vm: VmId { uuid: VM, name: "web".into() },
                instance: self.instance,
                at_us: self.now_s * 1_000_000,
                state: VmState::Running,
                cpu,
                memory: MemorySample::default(),
                disks: Vec::new(),
                nets: Vec::new(),
                pressure: None,
            };
            let host = HostSample { cpus: 16, memory_bytes: 1 << 36, ..HostSample::default() };
            self.state.take(Turn { host, vms: Ok(vec![sample]) }, self.now_s);
            self.learned.extend(self.state.occur(self.now_s));
            let settled = self.state.settle(self.now_s);
            assert!(settled.lost.is_empty() && settled.taken_up.is_empty());
        }
        self
    }

    fn begin(&mut self, program: &str) -> (i64, ExecutionRow, Vec<Learned>) {
        let start = ExecutionStart { vm: "web".into(), program: program.into(), ..ExecutionStart::default() };
        let (execution, row, learned) = self.state.begin(VM, start, self.now_s * 1000).unwrap();
        (execution.id, row, learned)
    }

    fn program(&mut self, program: &str, seconds: u64, cores: f64) {
        let (id, _, learned) = self.begin(program);
        self.learned.extend(learned);
        self.run(seconds, cores);
        self.learned.extend(self.state.end(id, self.now_s * 1000).unwrap().1);
    }

    /// What is foreseen of processors within a time, by what runs, follows and comes; 0 where that is nothing.
    fn foreseen(&self, length_s: u32) -> [f64; 4] {
        let State { machines, calendar, catalogue, .. } = &self.state;
        let ahead = ahead(calendar, Vec::new(), None, catalogue, VM, self.now_s, (flow::COARSE_S, length_s));
        let window = foreseen::Window { now_s: self.now_s, from_s: self.now_s, length_s };
        let machine = &machines[&VM];
        machine.foreseen.rise(Resource::Cpu, window, machine.base()[0], &ahead.upcoming).unwrap_or_default()
    }

    /// vCPUs that the planner would give for what is foreseen.
    fn given(&mut self) -> Option<f64> {
        let orders = self.state.weigh(self.now_s);
        let of_cpu = orders.iter().find(|order| order.resource == Resource::Cpu)?;
        of_cpu.decision.to_string().contains("foreseen").then_some(of_cpu.decision.to)
    }
}

/// vCPUs can be plugged, nothing else can be done.
fn abilities() -> Abilities {
    let no = || Ability::No(String::new());
    Abilities {
        balloon: no(),
        shrink: no(),
        autodeflate: false,
        free_page_reporting: false,
        period: None,
        guest: None,
        devices: Vec::new(),
        agent: Ability::Yes,
        vcpus: VcpuAbility { current: 2, maximum: 8, add: Ability::Yes, remove: Ability::Yes, fewest: 1 },
        disks: Vec::new(),
        nics: Vec::new(),
        notes: Vec::new(),
    }
}

#[test]
fn a_program_that_usually_follows_is_made_ready_before_it_is_announced() {
    let mut turns = Loop::new(T0);
    turns.run(60, IDLE);
    for _ in 0..3 {
        turns.program("extract", 40, 0.5);
        turns.run(20, IDLE);
        turns.program("load", 40, 1.9);
        turns.run(9000, IDLE);
    }
    let cpu = ResourcePolicy { max: Some(8.0), ..ResourcePolicy::default() };
    let policy = VmPolicy { mode: Mode::Act, resources: [(Resource::Cpu, cpu)].into(), ..VmPolicy::default() };
    turns.state.set_policy(VM, Some(policy));
    turns.state.machines.get_mut(&VM).unwrap().abilities = Some(abilities());
    turns.state.set_rules(0.1, Duration::from_secs(1800), Duration::from_secs(60));
    assert_eq!((turns.foreseen(60), turns.given()), ([0.0; 4], None), "nothing runs, nothing follows");
    turns.begin("extract");
    turns.run(1, 0.5);
    let near = turns.foreseen(20);
    assert!(near[3] < 1.0, "it does not come within 20 s: {near:?}");
    turns.run(35, 0.5);
    let far = turns.foreseen(60);
    // What it used at the limit of its processors counts as half as much again.
    assert!((far[2] - 1.5 * 1.9).abs() < 0.1 && far[0] < 1.0, "{far:?}");
    assert!(
        turns.given().is_some_and(|vcpus| vcpus >= 3.0),
        "the planner acts on it: {:?}",
        turns.state.weigh(turns.now_s)
    );
    // People see it too, and why.
    let now_s = turns.now_s;
    let (forecast, words) = turns.state.forecast(VM, Resource::Cpu, now_s, 300).unwrap();
    assert!(forecast.peak.0[3] > 2.0 && forecast.steps[0].0[3] < 2.0, "{forecast:?}");
    assert!(words.iter().any(|word| word.contains("`load` follows")), "{words:?}");
    // Of four executions the fourth is not counted yet.
    let (_, trials, probability) = turns.state.catalogue().followers("extract", now_s)[0].clone();
    assert_eq!((trials, probability), (3, 3.5 / 4.0));
}

#[test]
fn an_event_that_came_twice_is_foreseen_the_third_time() {
    let mut turns = Loop::new(T0 - 120);
    turns.run(60, IDLE);
    let event = EventRequest {
        name: "backup".into(),
        cron: Some("0 * * * *".into()),
        duration_s: Some(60),
        ..EventRequest::default()
    };
    turns.state.calendar.set(1, calendar::Entry::new(event, None).unwrap());
    for n in 0..3u64 {
        let begins_s = T0 + n * 3600;
        turns.run(begins_s - 20 - turns.now_s, IDLE);
        let foreseen = turns.foreseen(60)[3];
        assert_eq!(foreseen > 1.0, n == 2, "before occurrence {n}: {foreseen}");
        turns.run(25, IDLE).run(30, 1.5).run(30, IDLE);
        assert_eq!(turns.learned.len(), n as usize + 1);
    }
    let key = profile::event_key("backup", VM);
    let Some(Learned::Changed { key: written, courses: Some(_), .. }) = turns.learned.last() else {
        panic!("{:?}", turns.learned)
    };
    assert_eq!((written, turns.state.catalogue().event(&key).map(|courses| courses[0].runs())), (&key, Some(3)));
}

/// Another daemon on what the first has written.
fn again(store: &Store, now_s: u64) -> Loop {
    let mut turns = Loop::new(now_s);
    for row in store.programs().unwrap() {
        assert!(turns.state.catalogue.restore(row));
    }
    for row in store.executions(0).unwrap() {
        assert!(turns.state.recall_execution(&row));
    }
    turns
}

fn one_turn(turns: &mut Loop) -> executions::Settled {
    let mut other = Loop::new(turns.now_s);
    other.instance = turns.instance;
    std::mem::swap(&mut other.state.executions, &mut turns.state.executions);
    turns.run(1, 1.5);
    std::mem::swap(&mut other.state.executions, &mut turns.state.executions);
    turns.state.settle(turns.now_s)
}

#[test]
fn an_execution_outlives_the_daemon_if_its_machine_does() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("prestage.db")).unwrap();
    let mut turns = Loop::new(T0);
    turns.run(60, IDLE);
    turns.program("report", 60, 1.2);
    store.learn_programs(std::mem::take(&mut turns.learned)).wait().unwrap();
    turns.run(10, IDLE);
    let (id, row, learned) = turns.begin("report");
    store.start_execution(row, learned).wait().unwrap();
    turns.run(30, 1.2);

    let mut back = again(&store, turns.now_s + 5);
    let listed = back.state.executions(&ExecutionsQuery::default(), None);
    assert_eq!((listed.executions.len(), listed.executions[0].id), (1, id), "it is listed before its machine was seen");
    let settled = one_turn(&mut back);
    assert_eq!((settled.taken_up.as_slice(), settled.lost.len()), ([(id, VM, T0 + 130)].as_slice(), 0));
    let readings: Vec<_> = (T0 + 130..T0 + 160).map(|at_s| (Resource::Cpu, at_s, 1.2)).collect();
    let now_s = back.now_s;
    back.state.fill_in(id, &readings, now_s);
    assert!(back.foreseen(10)[3] > 1.0, "what it is known to use is foreseen at once");
    back.run(20, 1.2);
    let (ended, learned) = back.state.end(id, back.now_s * 1000).unwrap();
    assert_eq!(ended.ended_unix_ms.map(|at| at - ended.started_unix_ms), Some(56_000));
    assert!(matches!(&learned[0], Learned::Changed { courses: Some(_), .. }), "it is learned from");
    let rise = back.state.catalogue().known(&ended.start, back.now_s).courses[0].expect(0, 10).unwrap();
    assert!((rise[0] - (1.2 - IDLE)).abs() < 0.01, "from its very start on: {rise:?}");
    store.end_execution(id, back.now_s * 1000, ExecutionState::Ended, learned).wait().unwrap();
    assert_eq!(store.executions(u64::MAX).unwrap(), []);
}

#[test]
fn an_execution_whose_machine_was_started_anew_or_stays_away_ended_unseen() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("prestage.db")).unwrap();
    let mut turns = Loop::new(T0);
    turns.run(60, IDLE);
    let (id, row, learned) = turns.begin("report");
    store.start_execution(row, learned).wait().unwrap();

    let mut other_guest = again(&store, turns.now_s);
    other_guest.instance = 2;
    assert_eq!(one_turn(&mut other_guest).lost, [id]);
    assert!(other_guest.state.end(id, 0).is_none(), "nothing is learned from it");
    let mut other_boot = again(&store, turns.now_s);
    other_boot.state.boot = "another".into();
    assert_eq!(one_turn(&mut other_boot).lost, [id]);

    let mut away = again(&store, turns.now_s);
    let now_s = away.now_s;
    assert!(away.state.settle(now_s).lost.is_empty() && away.state.settle(now_s + 60).lost.is_empty());
    assert_eq!(away.state.settle(now_s + 61).lost, [id]);

    // Taken up, but not measured for too long: foreseen with, not learned from.
    let mut gap = again(&store, turns.now_s + 600);
    assert_eq!(one_turn(&mut gap).taken_up.len(), 1);
    let now_s = gap.now_s;
    gap.state.fill_in(id, &[(Resource::Cpu, T0 + 61, 1.0)], now_s);
    let (_, learned) = gap.state.end(id, now_s * 1000).unwrap();
    assert!(learned.is_empty());

    // In a daemon that runs, too.
    turns.now_s += 1 + GONE_S;
    assert_eq!(turns.state.settle(turns.now_s).lost, [id]);
}

#[test]
fn activity_is_told_announced_and_refused_when_it_is_over() {
    let mut turns = Loop::new(T0);
    turns.run(10, IDLE);
    let vm = || (VM, "web".to_owned());
    let tell = |turns: &mut Loop, activity, at_s: Option<u64>| {
        let request = ActivityRequest { activity, at_unix_ms: at_s.map(|at_s| at_s * 1000), duration_s: None };
        turns.state.tell_activity(vm(), &request, turns.now_s)
    };
    assert_eq!(turns.state.told(VM, turns.now_s), (None, None));
    let (shown, bytes) = tell(&mut turns, 30.0, None).unwrap();
    assert!(shown.activity == 30.0 && shown.announced.is_empty() && bytes.is_some());
    let (shown, bytes) = tell(&mut turns, 120.0, Some(T0 + 7200)).unwrap();
    assert_eq!((shown.activity, shown.most, shown.announced.len()), (30.0, 120.0, 1));
    let back = Activity::read(&bytes.unwrap()).unwrap();
    assert_eq!((back.at(T0 + 7200), back.at(T0 + 7200 + 3600)), (120.0, 0.0));
    assert!(tell(&mut turns, 1.0, Some(T0 - 3600)).is_err() && tell(&mut turns, 1.0, Some(u64::MAX / 1000)).is_err());
    assert_eq!(turns.state.told(VM, turns.now_s), (Some(30.0), None));
    let State { calendar, activities, .. } = &turns.state;
    let covariates = covariates(calendar, activities.get(&VM), VM, T0 + 6900, 300, 600);
    assert_eq!((covariates.activity.len(), covariates.activity[1]), (3, 1.0), "as a share of the most there was");
}

#[test]
fn while_libvirt_does_not_answer_nobody_is_said_not_to_run() {
    let mut turns = Loop::new(T0);
    turns.run(2, IDLE);
    turns.now_s += 1 + GONE_S;
    let start = ExecutionStart { vm: "web".into(), program: "report".into(), ..ExecutionStart::default() };
    let refused = |turns: &mut Loop| turns.state.begin(VM, start.clone(), turns.now_s * 1000).unwrap_err().to_string();
    assert!(refused(&mut turns).contains("does not run"));
    turns.state.turns.trouble = Some("connection refused".into());
    let error = refused(&mut turns);
    assert!(error.contains("libvirt does not answer: connection refused"), "{error}");
}
