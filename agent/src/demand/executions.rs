//! Programs that run in machines: announced at start and end, learned from, and told beforehand what they will need.
//!
//! What is learned of a program lies under three keys, looked up from the narrow to the wide: with its tags and the size of
//! its input (in powers of two), with its tags, and alone. Each execution teaches all three.

use super::State;
use super::calendar::{Entry, Kept};
use super::course::{Course, Run};
use super::run::Demand;
use crate::learner::run::unix_ms;
use prestage_integration::api::demand::{Event, EventRequest, Execution, ExecutionStart};
use prestage_integration::api::{ApiError, ErrorCode};
use prestage_integration::libvirt::Uuid;
use std::collections::HashMap;

/// Executions that run at once, in all machines.
const MOST: usize = 4096;
/// Programs that are known at most, by key.
const KNOWN: usize = 20_000;
/// An execution that nobody ends is forgotten after a week.
const FORGET_S: u64 = 7 * 86_400;

/// What is to be written down of a program: its key, and its courses as bytes.
type Learned = (String, Vec<u8>);

/// What is known of programs, and which run.
#[derive(Debug, Default)]
pub(crate) struct Executions {
    /// By key: courses by resource.
    known: HashMap<String, [Course; 4]>,
    running: HashMap<i64, (Uuid, Execution)>,
    next: i64,
}

/// Keys of an execution, narrow first.
pub(crate) fn keys(start: &ExecutionStart) -> [String; 3] {
    let mut tags = start.tags.clone();
    tags.sort_unstable();
    tags.dedup();
    // Unit separators cannot be in a name: control characters are refused.
    let (program, tags) = (&start.program, tags.join("\u{1f}"));
    let class =
        start.input_bytes.map_or_else(|| "-".to_owned(), |bytes| bytes.checked_ilog2().unwrap_or(0).to_string());
    [format!("{program}\u{1e}{tags}\u{1e}{class}"), format!("{program}\u{1e}{tags}"), program.clone()]
}

impl Executions {
    /// What earlier executions of the like did, and how many they were.
    fn courses(&self, start: &ExecutionStart) -> ([Course; 4], usize) {
        let known = keys(start).into_iter().find_map(|key| self.known.get(&key));
        known.map_or_else(Default::default, |courses| {
            (courses.clone(), courses.iter().map(Course::runs).max().unwrap_or(0))
        })
    }

    /// Adds an execution; the courses to be written down by key.
    fn learn(&mut self, start: &ExecutionStart, runs: &[Run; 4]) -> Vec<Learned> {
        let mut changed = Vec::new();
        for key in keys(start) {
            if self.known.len() >= KNOWN && !self.known.contains_key(&key) {
                continue;
            }
            let courses = self.known.entry(key.clone()).or_default();
            for (course, run) in courses.iter_mut().zip(runs) {
                course.learn(run.clone());
            }
            changed.push((key, write(courses)));
        }
        changed
    }

    /// Takes back what was written down.
    pub(crate) fn restore(&mut self, key: String, bytes: &[u8]) -> bool {
        match read(bytes) {
            Some(courses) if self.known.len() < KNOWN => {
                self.known.insert(key, courses);
                true
            }
            _ => false,
        }
    }
}

/// Length and bytes of each course.
fn write(courses: &[Course; 4]) -> Vec<u8> {
    let mut out = Vec::new();
    for course in courses {
        let bytes = course.write();
        out.extend((bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
    }
    out
}

fn read(mut bytes: &[u8]) -> Option<[Course; 4]> {
    let mut courses: [Course; 4] = Default::default();
    for course in &mut courses {
        let (length, rest) = bytes.split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        *course = Course::read(rest.get(..length)?)?;
        bytes = &rest[length..];
    }
    bytes.is_empty().then_some(courses)
}

impl State {
    pub(crate) fn executions(&self) -> Vec<Execution> {
        let mut list: Vec<Execution> =
            self.executions.running.values().map(|(_, execution)| execution.clone()).collect();
        list.sort_by_key(|execution| execution.id);
        list
    }

    /// A program begins in a machine that runs.
    pub(crate) fn begin(&mut self, uuid: Uuid, start: ExecutionStart, now_ms: u64) -> Result<Execution, ApiError> {
        let now_s = now_ms / 1000;
        let executions = &mut self.executions;
        // Nobody ended them: their machine stopped, or whoever announced them went away.
        let machines = &self.machines;
        executions.running.retain(|_, (uuid, execution)| {
            let here = machines.get(uuid).is_some_and(|machine| machine.is_here(now_s));
            here && now_s.saturating_sub(execution.started_unix_ms / 1000) <= FORGET_S
        });
        if executions.running.len() >= MOST {
            return Err(ApiError::new(ErrorCode::Busy, format!("{MOST} executions run already; end some")));
        }
        let gone = |name: &str| ApiError::new(ErrorCode::NotPossible, format!("machine `{name}` does not run"));
        let machine = self.machines.get_mut(&uuid).filter(|machine| machine.is_here(now_s));
        let machine = machine.ok_or_else(|| gone(&start.vm))?;
        let (courses, runs) = executions.courses(&start);
        // Not one that was given out before a restart: its end may still be announced.
        executions.next = (executions.next + 1).max(i64::try_from(now_s).unwrap_or(i64::MAX));
        let id = executions.next;
        machine.start(id, now_s, courses);
        let known_runs = u32::try_from(runs).unwrap_or(u32::MAX);
        let execution = Execution { id, start, started_unix_ms: now_ms, ended_unix_ms: None, known_runs };
        executions.running.insert(id, (uuid, execution.clone()));
        Ok(execution)
    }

    /// A program has ended: it, and what is to be written down.
    pub(crate) fn end(&mut self, id: i64, now_ms: u64) -> Option<(Execution, Vec<Learned>)> {
        let (uuid, mut execution) = self.executions.running.remove(&id)?;
        execution.ended_unix_ms = Some(now_ms);
        let runs = self.machines.get_mut(&uuid).and_then(|machine| machine.end(id));
        let changed = runs.map(|runs| self.executions.learn(&execution.start, &runs));
        Some((execution, changed.unwrap_or_default()))
    }
}

/// Where courses lie in the database.
const COURSE: &str = "course:";
/// Where events do.
const EVENT: &str = "event:";

impl Demand {
    /// Reads courses and events back.
    pub(super) fn restore(&self) -> Result<(), crate::store::StoreError> {
        let mut state = self.state.lock();
        for (key, bytes) in self.store.kept(COURSE)? {
            let name = key.strip_prefix(COURSE).unwrap_or(&key).to_owned();
            if !state.executions.restore(name, &bytes) {
                tracing::warn!(key, "what was known of a program is damaged; it is learned anew");
            }
        }
        for (key, bytes) in self.store.kept(EVENT)? {
            let id = key.strip_prefix(EVENT).and_then(|id| id.parse::<i64>().ok());
            let entry = serde_json::from_slice::<Kept>(&bytes).ok().and_then(Entry::from_kept);
            match (id, entry) {
                (Some(id), Some(entry)) => state.calendar.set(id, entry),
                _ => tracing::warn!(key, "an event in the database is damaged and left out"),
            }
        }
        Ok(())
    }

    pub(crate) async fn execution_start(&self, uuid: Uuid, start: ExecutionStart) -> Result<Execution, ApiError> {
        let execution = self.state.lock().begin(uuid, start, unix_ms())?;
        // What it needs is planned for at once, not with the next turn.
        self.plan_now();
        Ok(execution)
    }

    pub(crate) async fn execution_end(&self, id: i64) -> Result<Execution, ApiError> {
        let ended = self.state.lock().end(id, unix_ms());
        let (execution, changed) =
            ended.ok_or_else(|| ApiError::not_found(format!("there is no execution {id}, or it has ended")))?;
        for (key, bytes) in changed {
            if let Err(error) = self.store.keep(format!("{COURSE}{key}"), bytes).await {
                tracing::warn!(%error, "what was learned of a program is not on record");
            }
        }
        Ok(execution)
    }

    pub(crate) async fn event_add(&self, request: EventRequest, vm: Option<Uuid>) -> Result<Event, ApiError> {
        let entry = Entry::new(request, vm).map_err(ApiError::invalid)?;
        let now_s = unix_ms() / 1000;
        let (id, over) = {
            let mut state = self.state.lock();
            let over = state.calendar.over(now_s);
            for id in &over {
                state.calendar.remove(*id);
            }
            if state.calendar.is_full() {
                return Err(ApiError::new(ErrorCode::NoSpace, "there are 1000 events already; remove some"));
            }
            let id = state.calendar.next_id();
            state.calendar.set(id, entry.clone());
            (id, over)
        };
        for id in over {
            drop(self.store.unkeep(format!("{EVENT}{id}")));
        }
        let bytes = serde_json::to_vec(&entry.kept()).map_err(|error| ApiError::internal(error.to_string()))?;
        if let Err(error) = self.store.keep(format!("{EVENT}{id}"), bytes).await {
            self.state.lock().calendar.remove(id);
            return Err(ApiError::new(ErrorCode::Unavailable, error.to_string()));
        }
        let event = self.state.lock().calendar.get(id, now_s);
        event.ok_or_else(|| ApiError::not_found(format!("event {id} was removed meanwhile")))
    }

    pub(crate) async fn event_remove(&self, id: i64) -> Result<(), ApiError> {
        if !self.state.lock().calendar.remove(id) {
            return Err(ApiError::not_found(format!("there is no event {id}")));
        }
        let gone = self.store.unkeep(format!("{EVENT}{id}")).await;
        gone.map_err(|error| ApiError::new(ErrorCode::Unavailable, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(tags: &[&str], input_bytes: Option<u64>) -> ExecutionStart {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        ExecutionStart { vm: "web".into(), program: "report".into(), tags, input_bytes }
    }

    fn runs(above: f64) -> [Run; 4] {
        std::array::from_fn(|_| {
            let mut run = Run::new();
            (0..10).for_each(|at| run.observe(at, above));
            run
        })
    }

    #[test]
    fn the_narrowest_that_is_known_counts() {
        let mut executions = Executions::default();
        assert_eq!(executions.courses(&start(&[], None)).1, 0);
        executions.learn(&start(&["night"], Some(1 << 20)), &runs(1.0));
        executions.learn(&start(&["day"], Some(1 << 30)), &runs(9.0));
        let most = |start: &ExecutionStart| executions.courses(start).0[1].expect(0, 1).map(|rise| rise[3]);
        assert_eq!(most(&start(&["night"], Some(1 << 20))), Some(1.0));
        assert_eq!(most(&start(&["night"], Some((1 << 20) + 5))), Some(1.0), "inputs of like size");
        assert_eq!(most(&start(&["night"], Some(1 << 40))), Some(1.0), "by tags");
        assert_eq!(most(&start(&["other"], None)), Some(9.0), "by program, the greatest");
        assert_eq!(most(&ExecutionStart { program: "else".into(), ..start(&[], None) }), None);
    }

    #[test]
    fn tags_have_no_order_and_what_is_written_is_read() {
        assert_eq!(keys(&start(&["b", "a", "a"], None)), keys(&start(&["a", "b"], None)));
        let mut executions = Executions::default();
        let changed = executions.learn(&start(&[], None), &runs(2.0));
        assert_eq!(changed.len(), 3);
        let mut other = Executions::default();
        for (key, bytes) in &changed {
            assert!(other.restore(key.clone(), bytes));
            assert!(!other.restore(key.clone(), &bytes[..bytes.len() - 1]));
        }
        assert_eq!(other.courses(&start(&[], None)), executions.courses(&start(&[], None)));
    }
}
