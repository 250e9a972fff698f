//! Programs that run in machines: announced at start and end, learned from, and told beforehand what they will need.
//!
//! One that runs is on record from its start on, with what its machine used before. After a restart of the daemon it is taken up
//! again, if its machine was not started anew meanwhile; else it ended unseen, and nothing is learned from it.

use super::State;
use super::course::Run;
use super::foreseen::Base;
use super::gather::subject;
use super::run::{AGAIN, Demand};
use crate::learner::run::unix_ms;
use crate::store::executions::{ExecutionRow, ExecutionState, Learned};
use prestage_integration::api::demand::{Execution, ExecutionList, ExecutionStart, ExecutionsQuery, Resource};
use prestage_integration::api::{ApiError, ErrorCode};
use prestage_integration::libvirt::Uuid;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Executions that run at once, in all machines.
const MOST: usize = 4096;
/// An execution that nobody ends is forgotten after a week.
const FORGET_S: u64 = 7 * 86_400;
/// After a restart a machine is waited for so long.
const RETURNS_S: u64 = 60;
/// What a program needs that is to begin within so many seconds is not pushed out of memory: it would come back within the time in
/// which that counts as wrong.
const DUE_S: u64 = 600;
/// Nothing is learned from an execution that was not measured for longer at a stretch.
const GAP_S: u64 = 120;

/// What of an execution lies in its row.
#[derive(Debug, Serialize, Deserialize)]
struct Data {
    start: ExecutionStart,
    base: Base,
}

#[derive(Debug)]
struct Running {
    uuid: Uuid,
    /// Boot of the host and number of the machine's start.
    instance: String,
    execution: Execution,
    /// Of one that ran before the daemon was started: until when its machine is waited for, and what that used before.
    interrupted: Option<(Option<u64>, Base)>,
    /// It was measured all the time.
    measured: bool,
}

/// Which programs run.
#[derive(Debug, Default)]
pub(crate) struct Executions {
    running: BTreeMap<i64, Running>,
    next: i64,
}

/// What has become of executions without an announcement.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// Ended unseen.
    pub(crate) lost: Vec<i64>,
    /// Run still: in which machine, and since when (Unix s).
    pub(crate) taken_up: Vec<(i64, Uuid, u64)>,
}

impl State {
    fn instance(&self, uuid: Uuid) -> Option<String> {
        let sample = self.machines.get(&uuid)?.sample.as_ref()?;
        Some(format!("{}:{}", self.boot, sample.instance))
    }

    fn is_here(&self, uuid: Uuid, now_s: u64) -> bool {
        self.machines.get(&uuid).is_some_and(|machine| machine.is_here(now_s))
    }

    /// A page of what runs; `vm`: only in this machine.
    pub(crate) fn executions(&self, query: &ExecutionsQuery, vm: Option<Uuid>) -> ExecutionList {
        let from = query.after.map_or(i64::MIN, |after| after.saturating_add(1));
        let all = self.executions.running.range(from..).map(|(_, running)| running);
        let mut wanted = all.filter(|running| vm.is_none_or(|vm| vm == running.uuid));
        let executions: Vec<Execution> =
            wanted.by_ref().take(query.limit()).map(|running| running.execution.clone()).collect();
        let next = wanted.next().and(executions.last()).map(|last| last.id);
        ExecutionList { executions, next }
    }

    /// A program begins in a machine that runs: it, and what is to be written down.
    pub(crate) fn begin(
        &mut self,
        uuid: Uuid,
        start: ExecutionStart,
        now_ms: u64,
    ) -> Result<(Execution, ExecutionRow, Vec<Learned>), ApiError> {
        let now_s = now_ms / 1000;
        if self.executions.running.len() >= MOST {
            return Err(ApiError::new(ErrorCode::Busy, format!("{MOST} executions run already; end some")));
        }
        let instance = self.instance(uuid).filter(|_| self.is_here(uuid, now_s));
        let (Some(instance), Some(machine)) = (instance, self.machines.get_mut(&uuid)) else {
            // Nobody knows whether it runs while libvirt does not answer.
            return Err(match &self.turns.trouble {
                Some(trouble) => ApiError::new(ErrorCode::Unavailable, format!("libvirt does not answer: {trouble}")),
                None => ApiError::new(ErrorCode::NotPossible, format!("machine `{}` does not run", start.vm)),
            });
        };
        // Not one that was given out before a restart: its end may still be announced.
        let executions = &mut self.executions;
        executions.next = (executions.next + 1).max(i64::try_from(now_s).unwrap_or(i64::MAX));
        let id = executions.next;
        let (known, base) = (self.catalogue.known(&start, now_s), machine.base());
        let known_runs = u32::try_from(known.runs).unwrap_or(u32::MAX);
        machine.foreseen.start(id, &start.program, now_s, base, known);
        let learned = self.catalogue.started(uuid, id, &start, now_s);
        let data = serde_json::to_string(&Data { start: start.clone(), base });
        let data = data.map_err(|error| ApiError::internal(error.to_string()))?;
        let row = ExecutionRow {
            id,
            vm: uuid.to_string(),
            instance: instance.clone(),
            started_ms: now_ms,
            ended_ms: None,
            state: ExecutionState::Running,
            data,
        };
        let execution = Execution { id, start, started_unix_ms: now_ms, ended_unix_ms: None, known_runs };
        let running = Running { uuid, instance, execution: execution.clone(), interrupted: None, measured: true };
        executions.running.insert(id, running);
        Ok((execution, row, learned))
    }

    /// A program has ended: it, and what is to be written down.
    pub(crate) fn end(&mut self, id: i64, now_ms: u64) -> Option<(Execution, Vec<Learned>)> {
        let running = self.executions.running.remove(&id)?;
        let mut execution = running.execution;
        execution.ended_unix_ms = Some(now_ms);
        let now_s = now_ms / 1000;
        let runs = self.machines.get_mut(&running.uuid).and_then(|machine| machine.foreseen.end(id, now_s));
        let runs = runs.filter(|_| running.measured);
        let duration_s = now_ms.saturating_sub(execution.started_unix_ms) / 1000;
        let duration_s = u32::try_from(duration_s).unwrap_or(u32::MAX);
        let learned = self.catalogue.ended(id, &execution.start, now_s, duration_s, runs.as_ref());
        Some((execution, learned))
    }

    /// Takes back what was on record before a restart. One that ran is listed at once, and settled with the turns to come.
    pub(crate) fn recall_execution(&mut self, row: &ExecutionRow) -> bool {
        let data = serde_json::from_str::<Data>(&row.data).ok();
        let (Ok(uuid), Some(Data { start, base })) = (Uuid::parse_str(&row.vm), data) else { return false };
        let ended_s = row.ended_ms.map(|at_ms| at_ms / 1000);
        self.catalogue.remember(uuid, row.id, &start.program, row.started_ms / 1000, ended_s);
        self.executions.next = self.executions.next.max(row.id);
        if row.state == ExecutionState::Running && self.executions.running.len() < MOST {
            let known_runs =
                u32::try_from(self.catalogue.known(&start, row.started_ms / 1000).runs).unwrap_or(u32::MAX);
            let (id, started_unix_ms) = (row.id, row.started_ms);
            let execution = Execution { id, start, started_unix_ms, ended_unix_ms: None, known_runs };
            let (instance, interrupted) = (row.instance.clone(), Some((None, base)));
            let running = Running { uuid, instance, execution, interrupted, measured: true };
            self.executions.running.insert(id, running);
        }
        true
    }

    /// After a turn in which libvirt answered: what has ended without an announcement, and what runs on after a restart.
    pub(crate) fn settle(&mut self, now_s: u64) -> Settled {
        let mut settled = Settled::default();
        let mut known = BTreeMap::new();
        for (id, running) in &mut self.executions.running {
            let machine = self.machines.get(&running.uuid);
            let here = machine.filter(|machine| machine.is_here(now_s));
            let sample = here.and_then(|machine| machine.sample.as_ref());
            let same = sample.map(|sample| format!("{}:{}", self.boot, sample.instance) == running.instance);
            let started_s = running.execution.started_unix_ms / 1000;
            let forgotten = now_s.abs_diff(started_s) > FORGET_S;
            if let (None, Some((until_s, _))) = (same, &mut running.interrupted)
                && now_s <= *until_s.get_or_insert(now_s + RETURNS_S)
            {
                continue;
            }
            match (same, running.interrupted) {
                (Some(true), None) if !forgotten => {}
                (Some(true), Some((_, base))) if !forgotten => {
                    known.insert(*id, (base, self.catalogue.known(&running.execution.start, now_s)));
                    running.interrupted = None;
                    settled.taken_up.push((*id, running.uuid, started_s));
                }
                _ => settled.lost.push(*id),
            }
        }
        for (id, uuid, started_s) in &settled.taken_up {
            let running = self.executions.running.get(id).map(|running| running.execution.start.program.clone());
            if let (Some(program), Some(machine), Some((base, known))) =
                (running, self.machines.get_mut(uuid), known.remove(id))
            {
                machine.foreseen.start(*id, &program, *started_s, base, known);
            }
        }
        for id in &settled.lost {
            let Some(running) = self.executions.running.remove(id) else { continue };
            if let Some(machine) = self.machines.get_mut(&running.uuid) {
                machine.foreseen.end(*id, now_s);
            }
            drop(self.catalogue.ended(*id, &running.execution.start, now_s, 0, None));
        }
        settled
    }

    /// What one that was taken up used while the daemon was away, as far as it is known: resource, time (Unix s) and amount, in order.
    pub(crate) fn fill_in(&mut self, id: i64, readings: &[(Resource, u64, f64)], now_s: u64) {
        let Some(running) = self.executions.running.get_mut(&id) else { return };
        let started_s = running.execution.started_unix_ms / 1000;
        let mut times: Vec<u64> = readings.iter().map(|(_, at_s, _)| *at_s).chain([started_s, now_s]).collect();
        times.sort_unstable();
        running.measured = times.windows(2).all(|pair| pair[1] - pair[0] <= GAP_S);
        let Some(machine) = self.machines.get_mut(&running.uuid) else { return };
        for (resource, at_s, used) in readings.iter().filter(|(_, at_s, _)| *at_s >= started_s) {
            machine.foreseen.recall(id, *resource, *at_s, *used);
        }
    }

    /// It is not on record, and does not run; that it was to begin stays counted until the next restart.
    fn undo(&mut self, id: i64, now_s: u64) {
        let Some(running) = self.executions.running.remove(&id) else { return };
        let runs: Option<[Run; 4]> =
            self.machines.get_mut(&running.uuid).and_then(|machine| machine.foreseen.end(id, now_s));
        drop(runs);
    }
}

impl Demand {
    /// Reads back what is known of programs, and which ran.
    pub(super) fn restore_executions(&self) -> Result<(), crate::store::StoreError> {
        let mut state = self.state.lock();
        for row in self.store.programs()? {
            let key = row.key.clone();
            if !state.catalogue.restore(row) {
                tracing::warn!(key, "what was known of a program is damaged; it is learned anew");
            }
        }
        let since_ms = unix_ms().saturating_sub(super::catalogue::AFTER_S * 1000);
        for row in self.store.executions(since_ms)? {
            if !state.recall_execution(&row) {
                tracing::warn!(id = row.id, "an execution in the database is damaged and left out");
                drop(self.store.end_execution(row.id, unix_ms(), ExecutionState::Unseen, Vec::new()));
            }
        }
        Ok(())
    }

    pub(crate) async fn execution_start(&self, uuid: Uuid, start: ExecutionStart) -> Result<Execution, ApiError> {
        let (execution, row, learned) = self.state.lock().begin(uuid, start, unix_ms())?;
        if let Some(memory) = self.memory() {
            memory.program(uuid, execution.id, &execution.start);
        }
        // What it needs is planned for at once, not with the next turn.
        self.plan_now();
        if let Err(error) = self.store.start_execution(row, learned).await {
            self.state.lock().undo(execution.id, unix_ms() / 1000);
            self.tell_memory_ended(execution.id);
            return Err(ApiError::new(ErrorCode::Unavailable, error.to_string()));
        }
        Ok(execution)
    }

    pub(crate) async fn execution_end(&self, id: i64) -> Result<Execution, ApiError> {
        let now_ms = unix_ms();
        let ended = self.state.lock().end(id, now_ms);
        self.tell_memory_ended(id);
        let (execution, learned) =
            ended.ok_or_else(|| ApiError::not_found(format!("there is no execution {id}, or it has ended")))?;
        if let Err(error) = self.store.end_execution(id, now_ms, ExecutionState::Ended, learned.clone()).await {
            tracing::warn!(id, %error, "the end of an execution is not on record yet");
            // It has ended, whatever the database says: after a restart it is not to run again.
            if error.may_pass() {
                let store = self.store.clone();
                tokio::spawn(async move {
                    loop {
                        tokio::time::sleep(AGAIN).await;
                        match store.end_execution(id, now_ms, ExecutionState::Ended, learned.clone()).await {
                            Err(error) if error.may_pass() => {}
                            Err(error) => return tracing::warn!(id, %error, "the end of an execution is not on record"),
                            Ok(()) => return,
                        }
                    }
                });
            }
        }
        Ok(execution)
    }

    fn tell_memory_ended(&self, id: i64) {
        if let Some(memory) = self.memory() {
            memory.program_ended(id);
        }
    }

    /// Tells which programs are due in which machines, where that has changed since `told`.
    pub(super) fn tell_memory_due(&self, told: &mut HashMap<Uuid, Vec<String>>, now_s: u64) {
        let Some(memory) = self.memory() else { return };
        let state = self.state.lock();
        told.retain(|uuid, _| state.machines.contains_key(uuid));
        for (uuid, machine) in &state.machines {
            let due: Vec<String> = machine.foreseen.due(now_s, DUE_S).map(str::to_owned).collect();
            let before = told.entry(*uuid).or_default();
            if *before != due {
                memory.due(*uuid, &due);
                *before = due;
            }
        }
    }

    /// Ends on record what ended unseen, and fills in what runs on after a restart.
    pub(super) async fn settle(&self, now_s: u64) {
        let Settled { lost, taken_up } = self.state.lock().settle(now_s);
        for id in lost {
            self.tell_memory_ended(id);
            tracing::info!(id, "an execution ended unseen: its machine stopped or was started anew");
            drop(self.store.end_execution(id, now_s * 1000, ExecutionState::Unseen, Vec::new()));
        }
        for (id, uuid, started_s) in taken_up {
            let store = self.store.clone();
            let read = tokio::task::spawn_blocking(move || {
                // By the second for an hour; of a longer one as its course is kept.
                let step_s = now_s.saturating_sub(started_s).div_ceil(3600).next_power_of_two().min(64);
                let of = |resource: Resource| {
                    let answer = store.series(&subject(uuid), resource.name(), started_s, now_s, step_s);
                    let points = answer.map(|answer| answer.points).unwrap_or_default();
                    points.into_iter().map(move |point| (resource, point.at_s, point.max))
                };
                Resource::ALL.into_iter().flat_map(of).collect::<Vec<_>>()
            });
            let readings = read.await.unwrap_or_default();
            self.state.lock().fill_in(id, &readings, now_s);
            tracing::info!(id, vm = %uuid, "an execution of before the start is taken up again");
        }
    }
}
