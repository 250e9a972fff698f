//! A month on one host, contestant by contestant.

use super::fixed::{Provisioned, Quantile, quantile};
use super::forecasts::Forecasts;
use super::host::{Kind, MemoryBy, Pool};
use super::ours::Ours;
use super::policy::{HostSeen, Policy, Resource, Seen, Target};
use super::reactive::{Mom, Proxmox};
use super::score::{Moment, Score, Tally};
use super::trace::{STEP_S, Sample, Trace, VmTrace};
use super::vpa::Vpa;
use crate::planner::Settings;
use prestage_predictor::demand::Weights;
use serde::Serialize;
use std::sync::Arc;

/// Steps of a day.
const DAY: usize = (86_400 / STEP_S) as usize;
/// Seconds after which who can be woken is, once a machine goes short: PSI triggers fire within a window of a second or
/// two.
const WAKE_S: u64 = 2;
/// Loops look this long after a step begins, as ones that know nothing of steps do on average.
const PHASE_S: u64 = 5;
/// Demand that moves in a straight line stays as it is for so many seconds.
const STRETCH_S: u64 = 30;

/// What demand does between two samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Between {
    /// Stays as it was sampled: every rise comes at once, the worst case.
    #[default]
    Held,
    /// Goes to the next sample in a straight line, in stretches of 30 s.
    Linear,
}

/// What to simulate.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Machines at most; more are drawn by `seed`.
    pub vms: usize,
    /// Days that are counted, after the training part.
    pub days: usize,
    /// Days of the training part at most; of a shorter trace, half.
    pub train_days: usize,
    /// Days to leave out before the training part.
    pub skip_days: usize,
    /// `None`: the .99 quantile of what all used together in the training part.
    pub host_cores: Option<f64>,
    /// Bytes; `None`: likewise.
    pub host_memory: Option<f64>,
    pub seed: u64,
    pub between: Between,
    pub memory_by: MemoryBy,
    /// Risks at which the planner runs.
    pub risks: Vec<f64>,
    /// The planner's; the risk is replaced.
    pub settings: Settings,
    /// Steps that forecasts look ahead.
    pub horizon: usize,
    /// A trained network, which has a say in forecasts.
    pub model: Option<Arc<Weights>>,
    /// Only these contestants (part of a name), all if empty.
    pub only: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            vms: 30,
            days: 31,
            train_days: 31,
            skip_days: 0,
            host_cores: None,
            host_memory: None,
            seed: 1,
            between: Between::Held,
            memory_by: MemoryBy::Balloon,
            risks: vec![0.3, 0.2, 0.1, 0.05],
            settings: Settings::default(),
            // As the daemon does.
            horizon: 2,
            model: None,
            only: Vec::new(),
        }
    }
}

/// What counts: less of each is better.
pub const CRITERIA: [&str; 6] = ["VIOL", "CPU", "MEM", "CORE-H", "GIB-H", "OOM"];

/// One contestant's line.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub policy: String,
    /// Of this project; with which risk.
    pub ours: bool,
    pub risk: Option<f64>,
    #[serde(flatten)]
    pub score: Score,
    /// Violation minutes a machine-day of machines of the highest and of the lowest priority.
    pub high_priority_violation_min: f64,
    pub low_priority_violation_min: f64,
}

impl Row {
    /// By [`CRITERIA`]: whether this is better than another.
    #[must_use]
    pub fn better(&self, other: &Self) -> [bool; 6] {
        let of = |row: &Self| {
            let s = &row.score;
            let minutes = [s.violation_min, s.cpu_violation_min, s.memory_violation_min];
            let [either, cpu, memory] = minutes;
            [either, cpu, memory, s.core_hours_unused, s.gib_hours_unused, s.oom_like as f64]
        };
        let (own, theirs) = (of(self), of(other));
        std::array::from_fn(|at| own[at] < theirs[at])
    }
}

/// What was simulated, and what came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub vms: usize,
    pub days: f64,
    pub train_days: f64,
    pub host_cores: f64,
    pub host_memory_bytes: f64,
    /// Provisioned on it at most.
    pub provisioned_cores: f64,
    pub provisioned_memory_bytes: f64,
    /// Share of the counted time in which all together want more than the host has.
    pub cpu_short_share: f64,
    pub memory_short_share: f64,
    pub between: Between,
    pub memory_by: MemoryBy,
    pub forecasts: String,
    pub rows: Vec<Row>,
    pub notes: Vec<String>,
}

/// Runs all contestants on `trace`.
///
/// # Errors
/// The trace is too short, or has no machines that run.
pub fn run(trace: &Trace, setup: &Setup, progress: &mut dyn FnMut(&str)) -> Result<Report, String> {
    let machines = drawn(trace, setup);
    let steps = machines.iter().map(|vm| vm.samples.len()).max().unwrap_or(0).saturating_sub(setup.skip_days * DAY);
    let train = (setup.train_days * DAY).min(steps / 2);
    let counted = (setup.days * DAY).min(steps - train);
    if counted < 12 || train < 12 || machines.is_empty() {
        return Err(format!("{} machines with {steps} steps of 5 minutes are too few: 24 at least", machines.len()));
    }
    let first = setup.skip_days * DAY;
    let sample = |vm: usize, step: usize| machines[vm].samples.get(first + step).copied().filter(Sample::on);
    let sums = |from: usize, to: usize, of: &dyn Fn(&Sample) -> f64| -> Vec<f64> {
        let measured =
            |step: &usize| machines.iter().any(|vm| vm.samples.get(first + step).is_some_and(|s| s.measured));
        let sum = |step| (0..machines.len()).filter_map(|vm| sample(vm, step)).map(|s| of(&s)).sum();
        (from..to).filter(measured).map(sum).collect()
    };
    let trained = |of: &dyn Fn(&Sample) -> f64| quantile(sums(0, train, of), 0.99);
    let host_cores = setup.host_cores.unwrap_or_else(|| trained(&|s| s.cpu).ceil().max(1.0));
    let gib = 1073741824.0;
    let host_memory = setup.host_memory.unwrap_or_else(|| (trained(&|s| s.memory) / gib).ceil().max(1.0) * gib);
    let share =
        |all: Vec<f64>, most: f64| all.iter().filter(|sum| **sum > most).count() as f64 / all.len().max(1) as f64;
    let most = |of: &dyn Fn(&Sample) -> f64| sums(0, train + counted, of).into_iter().fold(0.0, f64::max);
    // The hour matters to forecasts; 0 stands for "never" here and there.
    let start_s = (trace.start_s / STEP_S).max(1) * STEP_S + first as u64 * STEP_S;
    let world = World {
        machines: &machines,
        start_s,
        between: setup.between,
        memory_by: setup.memory_by,
        first,
        train,
        counted,
        host_cores,
        host_memory,
    };
    let priorities: Vec<u8> =
        (0..machines.len()).map(|vm| (mixed(setup.seed ^ (vm as u64 + 1) << 20) % 3) as u8).collect();

    let mut contestants: Vec<(Box<dyn Policy>, Option<f64>)> = vec![
        (Box::new(Provisioned), None),
        (Box::new(Quantile::default()), None),
        (Box::new(Mom), None),
        (Box::new(Proxmox), None),
        (Box::new(Vpa::new(0.9)), None),
        (Box::new(Vpa::new(0.95)), None),
    ];
    let ours = |name: String, risk: f64, source| {
        let settings = Settings { risk, ..setup.settings };
        Box::new(Ours::new(name, settings, source, priorities.clone()))
    };
    contestants.push((ours("prestage, no forecast".to_owned(), 0.5, None), Some(0.5)));
    for risk in &setup.risks {
        let forecasts = Forecasts::new(setup.horizon, setup.model.clone());
        contestants.push((ours(format!("prestage, risk {risk}"), *risk, Some(forecasts)), Some(*risk)));
    }
    let mut rows = Vec::new();
    for (mut contestant, risk) in contestants {
        let policy = contestant.name();
        if !setup.only.is_empty() && !setup.only.iter().any(|part| policy.contains(part.as_str())) {
            continue;
        }
        progress(&policy);
        let tally = world.play(contestant.as_mut());
        let by_priority = |wanted: u8| {
            let of =
                |all: &[f64]| all.iter().zip(&priorities).filter(|(_, p)| **p == wanted).map(|(s, _)| *s).sum::<f64>();
            1440.0 * of(&tally.by_vm_s) / of(&tally.counted_s).max(1.0)
        };
        rows.push(Row {
            ours: risk.is_some(),
            policy,
            risk,
            score: tally.score(),
            high_priority_violation_min: by_priority(2),
            low_priority_violation_min: by_priority(0),
        });
    }
    Ok(Report {
        vms: machines.len(),
        days: counted as f64 / DAY as f64,
        train_days: train as f64 / DAY as f64,
        host_cores,
        host_memory_bytes: host_memory,
        provisioned_cores: most(&|s| s.cores),
        provisioned_memory_bytes: most(&|s| s.capacity),
        cpu_short_share: share(sums(train, train + counted, &|s| s.cpu), host_cores),
        memory_short_share: share(sums(train, train + counted, &|s| s.memory), host_memory),
        between: setup.between,
        memory_by: setup.memory_by,
        forecasts: format!(
            "{}, {} min ahead",
            if setup.model.is_some() { "with a trained network" } else { "without a network" },
            setup.horizon as u64 * STEP_S / 60
        ),
        rows,
        notes: trace.notes.clone(),
    })
}

/// Machines to simulate: all, or as many as asked, drawn by the seed.
fn drawn(trace: &Trace, setup: &Setup) -> Vec<VmTrace> {
    let mut order: Vec<(u64, usize)> =
        (0..trace.vms.len()).map(|at| (mixed(setup.seed.wrapping_add((at as u64) << 32)), at)).collect();
    order.sort_unstable();
    let mut chosen: Vec<usize> = order.into_iter().take(setup.vms).map(|(_, at)| at).collect();
    chosen.sort_unstable();
    chosen.into_iter().map(|at| trace.vms[at].clone()).collect()
}

/// Splitmix64: a number that looks random.
fn mixed(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct World<'a> {
    machines: &'a [VmTrace],
    /// Unix seconds at which the training part begins.
    start_s: u64,
    between: Between,
    memory_by: MemoryBy,
    first: usize,
    train: usize,
    counted: usize,
    host_cores: f64,
    host_memory: f64,
}

impl World<'_> {
    fn sample(&self, vm: usize, step: usize) -> Option<Sample> {
        self.machines[vm].samples.get(self.first + step).copied().filter(Sample::on)
    }

    /// A sample, or what demand is at that part (0 to 1) of the way to the next.
    fn between(&self, vm: usize, step: usize, part: f64) -> Option<Sample> {
        let now = self.sample(vm, step)?;
        let Some(next) = self.sample(vm, step + 1).filter(|_| self.between == Between::Linear) else {
            return Some(now);
        };
        let cpu = (now.cpu + part * (next.cpu - now.cpu)).min(now.cores);
        Some(Sample { cpu, memory: (now.memory + part * (next.memory - now.memory)).min(now.capacity), ..now })
    }

    fn play(&self, policy: &mut dyn Policy) -> Tally {
        let machines = self.machines.len();
        let mut tally = Tally::new(machines, self.memory_by);
        let mut pools = [
            Pool::new(Kind::Cpu, self.memory_by, self.host_cores, machines),
            Pool::new(Kind::Memory, self.memory_by, self.host_memory, machines),
        ];
        let mut state = State {
            seen: vec![Seen::default(); machines],
            targets: vec![Target::default(); machines],
            stalled: vec![[0.0; 2]; machines],
            short: false,
        };
        let start_s = self.start_s;
        for step in 0..self.train {
            for vm in 0..machines {
                if let Some(sample) = self.sample(vm, step).filter(|sample| sample.measured) {
                    policy.observe(vm, start_s + (step as u64 + 1) * STEP_S, sample.cpu, sample.memory);
                }
            }
        }
        let stretch_s = if self.between == Between::Held { STEP_S } else { STRETCH_S };
        let mut most = vec![[0.0_f64; 2]; machines];
        for step in self.train..self.train + self.counted {
            most.fill([0.0; 2]);
            for stretch in 0..STEP_S / stretch_s {
                let part = stretch as f64 * stretch_s as f64 / STEP_S as f64;
                for vm in 0..machines {
                    let (on, sample) = match self.between(vm, step, part) {
                        Some(sample) => (true, sample),
                        None => (false, Sample { cores: 0.0, cpu: 0.0, capacity: 0.0, memory: 0.0, measured: false }),
                    };
                    pools[0].demand(vm, on, sample.cpu, sample.cores);
                    pools[1].demand(vm, on, sample.memory, sample.capacity);
                    let seen = &mut state.seen[vm];
                    (seen.on, seen.cpu.provisioned, seen.memory.provisioned) = (on, sample.cores, sample.capacity);
                }
                let begin_s = start_s + step as u64 * STEP_S + stretch * stretch_s;
                self.stretch(step, begin_s, stretch_s, policy, &mut pools, &mut state, &mut tally);
                for (most, seen) in most.iter_mut().zip(&state.seen) {
                    *most = [most[0].max(seen.cpu.used), most[1].max(seen.memory.used)];
                }
            }
            for (vm, [cpu, memory]) in most.iter().enumerate() {
                if self.sample(vm, step).is_some_and(|sample| sample.measured) {
                    policy.observe(vm, start_s + (step as u64 + 1) * STEP_S, *cpu, *memory);
                }
            }
        }
        tally
    }

    /// So many seconds of a step, from `begin_s` on, in which demand stays as it is.
    #[allow(clippy::too_many_arguments)]
    fn stretch(
        &self,
        step: usize,
        begin_s: u64,
        length_s: u64,
        policy: &mut dyn Policy,
        pools: &mut [Pool; 2],
        state: &mut State,
        tally: &mut Tally,
    ) {
        let every_s = policy.loop_s();
        let mut at_s = 0;
        let mut wake_s = None;
        // Whether the last look changed anything.
        let mut changed = true;
        while at_s < length_s {
            // Looks are at PHASE_S, PHASE_S + every_s, …
            let since = (begin_s + at_s + every_s - PHASE_S % every_s) % every_s;
            let look = since == 0;
            if look || wake_s == Some(at_s) {
                state.look(pools);
                let [cpu, memory] = &*pools;
                let cpu_used: f64 = cpu.shares.iter().map(|share| share.used()).sum();
                let host = HostSeen {
                    cores: self.host_cores,
                    memory: self.host_memory,
                    cpu_free: (1.0 - cpu_used / self.host_cores).max(0.0),
                    memory_free: memory.free() / self.host_memory,
                };
                changed = false;
                state.targets.fill(Target::default());
                policy.decide(begin_s + at_s, &host, &state.seen, &mut state.targets);
                for (vm, target) in state.targets.iter().enumerate() {
                    for (pool, wanted) in pools.iter_mut().zip([target.cpu, target.memory]) {
                        if wanted.is_some_and(|wanted| pool.ask(vm, wanted)) {
                            tally.changed();
                            changed = true;
                        }
                    }
                }
                wake_s = None;
            }
            for pool in pools.iter_mut() {
                pool.pass(0.0);
            }
            let moving = pools.iter().any(Pool::moving);
            let to_look = every_s - (begin_s + at_s + every_s - PHASE_S % every_s) % every_s;
            // Demand changes at the start: who goes short then is seen at once.
            let mut seconds = if moving || at_s == 0 { 1 } else { to_look.min(length_s - at_s) };
            if let Some(wake_s) = wake_s {
                seconds = seconds.min(wake_s - at_s);
            }
            let short = self.count(step, seconds as f64, pools, state, tally);
            for pool in pools.iter_mut() {
                pool.pass(seconds as f64);
            }
            if short && policy.woken() && wake_s.is_none() && (changed || !state.short) {
                // Who went short at the end of a longer stretch did so at its start: seconds is 1 whenever anything moves.
                wake_s = Some(at_s + WAKE_S.max(seconds));
            }
            state.short = short;
            at_s += seconds;
        }
        state.look(pools);
    }

    /// Counts so many seconds as they are; whether anybody goes short.
    fn count(&self, step: usize, seconds: f64, pools: &[Pool; 2], state: &mut State, tally: &mut Tally) -> bool {
        state.look(pools);
        let [cpu, memory] = pools;
        let mut any = false;
        let mut measured = false;
        let wanted: f64 = memory.shares.iter().map(|share| share.demand).sum();
        for vm in 0..self.machines.len() {
            let (c, m) = (&cpu.shares[vm], &memory.shares[vm]);
            let short = [c.short(), m.short()];
            for (stalled, short) in state.stalled[vm].iter_mut().zip(short) {
                // The average of ten seconds, as PSI has it.
                let keep = (-seconds / 10.0_f64).exp();
                *stalled = *stalled * keep + if short { 1.0 - keep } else { 0.0 };
            }
            any |= short[0] || short[1];
            if self.sample(vm, step).is_some_and(|sample| sample.measured) {
                measured = true;
                let moment = Moment {
                    seconds,
                    cpu_short: short[0],
                    memory_short: short[1],
                    cpu_missing: c.demand - c.used(),
                    memory_missing: m.demand - m.used(),
                    memory_demand: m.demand,
                    host_short: wanted > memory.capacity,
                };
                tally.machine(vm, &moment, &state.seen[vm]);
            }
        }
        if measured {
            tally.host(seconds, cpu.unused(), memory.unused());
        }
        any
    }
}

struct State {
    seen: Vec<Seen>,
    targets: Vec<Target>,
    stalled: Vec<[f64; 2]>,
    /// Somebody went short a moment ago.
    short: bool,
}

impl State {
    /// What can be seen now.
    fn look(&mut self, pools: &[Pool; 2]) {
        for (vm, seen) in self.seen.iter_mut().enumerate() {
            let stalled = self.stalled[vm];
            for (at, resource) in [&mut seen.cpu, &mut seen.memory].into_iter().enumerate() {
                let share = &pools[at].shares[vm];
                *resource = Resource {
                    used: share.used(),
                    have: share.have,
                    provisioned: resource.provisioned,
                    // Whoever goes short now has work waiting, whatever the average says yet.
                    stalled: if share.short() { stalled[at].max(0.2) } else { 0.0 },
                };
            }
        }
    }
}
