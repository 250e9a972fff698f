//! What is known to come: events that come once or by a schedule, and how much of each step of a forecast they fill.

use crate::schedule::Schedule;
use prestage_integration::api::demand::{Event, EventRequest};
use prestage_integration::libvirt::Uuid;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Events at most.
const MOST: usize = 1000;
/// Unless said otherwise an event lasts an hour.
const DURATION_S: u64 = 3600;
/// Beginnings of one schedule that are looked at for one forecast: each minute of a day, and before.
const BEGINNINGS: usize = 2000;
/// An occurrence that is noticed later than this was missed: what the machine used before is not known.
const LATE_S: u64 = 10;
/// Occurrences of one event that are foreseen at once.
const FORESEEN: usize = 64;

/// An event as it lies in the database.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Kept {
    request: EventRequest,
    /// UUID.
    vm: Option<String>,
}

/// An event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) request: EventRequest,
    /// `None`: of all machines.
    pub(crate) vm: Option<Uuid>,
    schedule: Option<Schedule>,
    /// Its next beginning, Unix s; `None`: not looked for yet.
    next_s: Option<u64>,
}

/// An occurrence that begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Begins {
    pub(crate) name: String,
    /// `None`: in all machines.
    pub(crate) vm: Option<Uuid>,
    pub(crate) began_s: u64,
    pub(crate) until_s: u64,
}

impl Entry {
    /// # Errors
    /// The schedule cannot be read, or never comes.
    pub(crate) fn new(request: EventRequest, vm: Option<Uuid>) -> Result<Self, String> {
        let schedule =
            request.cron.as_deref().map(str::parse::<Schedule>).transpose().map_err(|error| error.to_string())?;
        Ok(Self { request, vm, schedule, next_s: None })
    }

    pub(crate) fn kept(&self) -> Kept {
        Kept { request: self.request.clone(), vm: self.vm.map(|vm| vm.to_string()) }
    }

    /// What was kept; `None` where it is damaged.
    pub(crate) fn from_kept(kept: Kept) -> Option<Self> {
        let vm = kept.vm.map(|vm| Uuid::parse_str(&vm)).transpose().ok()?;
        Self::new(kept.request, vm).ok()
    }

    fn lasts_s(&self) -> u64 {
        self.request.duration_s.map_or(DURATION_S, u64::from)
    }

    /// When it begins next, or began if it is not over.
    pub(crate) fn next(&self, now_s: u64) -> Option<u64> {
        let earliest = now_s.saturating_sub(self.lasts_s());
        match (&self.schedule, self.request.at_unix_ms) {
            (Some(schedule), _) => schedule.next(earliest),
            (None, Some(at_ms)) => Some(at_ms / 1000).filter(|at_s| *at_s > earliest),
            (None, None) => None,
        }
    }

    /// Its first beginning after a time; `u64::MAX`: never again.
    fn first_after(&self, after_s: u64) -> u64 {
        let first = match &self.schedule {
            Some(schedule) => schedule.next(after_s),
            None => self.request.at_unix_ms.map(|at_ms| at_ms / 1000).filter(|at_s| *at_s > after_s),
        };
        first.unwrap_or(u64::MAX)
    }

    /// Adds how much of each step it fills, up to 1. Beginnings that overlap fill a step once, and no more are looked at than matter.
    fn fill(&self, shares: &mut [f32], origin_s: u64, step_s: u64) {
        let end_s = origin_s.saturating_add((shares.len() as u64).saturating_mul(step_s));
        let lasts_s = self.lasts_s();
        let from_s = origin_s.saturating_sub(lasts_s);
        let once = self.request.at_unix_ms.map(|at_ms| at_ms / 1000).filter(|at_s| (from_s..end_s).contains(at_s));
        let scheduled = self.schedule.iter().flat_map(|schedule| schedule.within(from_s, end_s, BEGINNINGS));
        let mut filled_s = origin_s;
        for begins_s in scheduled.chain(once.filter(|_| self.schedule.is_none())) {
            let to_s = begins_s.saturating_add(lasts_s).min(end_s);
            let mut at_s = begins_s.max(filled_s);
            while at_s < to_s {
                let step = (at_s - origin_s) / step_s;
                let until_s = (origin_s + (step + 1) * step_s).min(to_s);
                if let Some(share) = shares.get_mut(step as usize) {
                    *share = (*share + (until_s - at_s) as f32 / step_s as f32).min(1.0);
                }
                at_s = until_s;
            }
            filled_s = filled_s.max(to_s);
            if filled_s >= end_s {
                return;
            }
        }
    }
}

/// All events.
#[derive(Debug, Clone, Default)]
pub(crate) struct Calendar {
    entries: BTreeMap<i64, Entry>,
    /// The last id that was given out: whoever removes a number means the event that had it.
    last: i64,
    /// When it was last looked what begins, Unix s.
    looked_s: u64,
}

impl Calendar {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() >= MOST
    }

    pub(crate) fn next_id(&self) -> i64 {
        self.last.saturating_add(1)
    }

    /// Numbers up to this were given out before a restart.
    pub(crate) fn given_out(&mut self, last: i64) {
        self.last = self.last.max(last);
    }

    pub(crate) fn set(&mut self, id: i64, entry: Entry) {
        self.last = self.last.max(id);
        self.entries.insert(id, entry);
    }

    pub(crate) fn remove(&mut self, id: i64) -> bool {
        self.entries.remove(&id).is_some()
    }

    pub(crate) fn get(&self, id: i64, now_s: u64) -> Option<Event> {
        self.entries.get(&id).map(|entry| event(id, entry, now_s))
    }

    /// Those that last or are to come.
    pub(crate) fn list(&self, now_s: u64) -> Vec<Event> {
        let all = self.entries.iter().map(|(id, entry)| event(*id, entry, now_s));
        all.filter(|event| event.next_unix_ms.is_some()).collect()
    }

    /// One of the same name and machine, whose times are those of the other or cannot be told from them. Single dates of one name are one
    /// event that comes again.
    pub(crate) fn same(&self, new: &Entry) -> Option<i64> {
        let once = |entry: &Entry| entry.request.at_unix_ms.filter(|_| entry.schedule.is_none());
        let same = |entry: &Entry| {
            let apart = once(entry).zip(once(new)).is_some_and(|(one, other)| one != other);
            entry.request.name == new.request.name && entry.vm == new.vm && !apart
        };
        self.entries.iter().find(|(_, entry)| same(entry)).map(|(id, _)| *id)
    }

    /// Events that never come again.
    pub(crate) fn over(&self, now_s: u64) -> Vec<i64> {
        self.entries.iter().filter(|(_, entry)| entry.next(now_s).is_none()).map(|(id, _)| *id).collect()
    }

    /// What begins now, or did since it was asked last.
    pub(crate) fn due(&mut self, now_s: u64) -> Vec<Begins> {
        let mut due = Vec::new();
        // A clock that was set back: what was to come next is to come again.
        let back = now_s < std::mem::replace(&mut self.looked_s, now_s);
        for entry in self.entries.values_mut() {
            entry.next_s = entry.next_s.filter(|_| !back);
            let next_s = entry.next_s.unwrap_or_else(|| entry.first_after(now_s.saturating_sub(1)));
            entry.next_s = Some(next_s);
            if next_s > now_s {
                continue;
            }
            if now_s - next_s <= LATE_S {
                let (name, until_s) = (entry.request.name.clone(), next_s.saturating_add(entry.lasts_s()));
                due.push(Begins { name, vm: entry.vm, began_s: next_s, until_s });
            }
            entry.next_s = Some(entry.first_after(now_s));
        }
        due
    }

    /// Events of a machine that are to begin within a time, and when.
    pub(crate) fn upcoming(&self, vm: Uuid, now_s: u64, horizon_s: u32) -> Vec<(&str, u64)> {
        // A little more: one that begins just after may come early.
        let end_s = now_s.saturating_add(horizon_s.into()).saturating_add(LATE_S);
        let mut upcoming = Vec::new();
        for entry in self.entries.values().filter(|entry| entry.vm.is_none_or(|of| of == vm)) {
            let Some(next_s) = entry.next_s.filter(|next_s| *next_s <= end_s) else { continue };
            let all = std::iter::successors(Some(next_s), |at_s| Some(entry.first_after(*at_s)));
            let within = all.take_while(|at_s| *at_s <= end_s).take(FORESEEN);
            upcoming.extend(within.map(|at_s| (entry.request.name.as_str(), at_s)));
        }
        upcoming
    }

    /// How much of each step is filled by events of a machine, 0 to 1: at the origin, then of each step ahead.
    pub(crate) fn shares(&self, vm: Uuid, origin_s: u64, step_s: u32, horizon_s: u32) -> Vec<f32> {
        self.with_own(self.of_all(origin_s, step_s, horizon_s), vm, origin_s, step_s)
    }

    /// The same, of events that all machines have: what a turn works out once.
    pub(crate) fn of_all(&self, origin_s: u64, step_s: u32, horizon_s: u32) -> Vec<f32> {
        let step_s = step_s.max(1);
        let steps = horizon_s.div_ceil(step_s) as usize + 1;
        self.filled(vec![0f32; steps], None, origin_s, step_s)
    }

    /// And of those that one has besides.
    pub(crate) fn with_own(&self, of_all: Vec<f32>, vm: Uuid, origin_s: u64, step_s: u32) -> Vec<f32> {
        self.filled(of_all, Some(vm), origin_s, step_s.max(1))
    }

    fn filled(&self, mut shares: Vec<f32>, vm: Option<Uuid>, origin_s: u64, step_s: u32) -> Vec<f32> {
        for entry in self.entries.values().filter(|entry| entry.vm == vm) {
            if shares.iter().all(|share| *share >= 1.0) {
                break;
            }
            entry.fill(&mut shares, origin_s, u64::from(step_s));
        }
        shares
    }
}

fn event(id: i64, entry: &Entry, now_s: u64) -> Event {
    Event { id, request: entry.request.clone(), next_unix_ms: entry.next(now_s).map(|at_s| at_s * 1000) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hourly(duration_s: u32) -> Entry {
        let request = EventRequest {
            name: "hourly".into(),
            cron: Some("0 * * * *".into()),
            duration_s: Some(duration_s),
            ..EventRequest::default()
        };
        Entry::new(request, None).unwrap()
    }

    #[test]
    fn steps_are_filled_by_as_much_as_events_last_in_them() {
        let mut calendar = Calendar::default();
        calendar.set(1, hourly(450));
        // From half an hour before the hour on, by five minutes.
        let shares = calendar.shares(Uuid::nil(), 1800, 300, 3600);
        assert_eq!(shares.len(), 13);
        assert_eq!((shares[5], shares[6], shares[7], shares[8]), (0.0, 1.0, 0.5, 0.0));
        // One that began before still lasts.
        assert_eq!(calendar.shares(Uuid::nil(), 3600 + 300, 300, 300), [0.5, 0.0]);
    }

    #[test]
    fn a_calendar_that_is_full_of_endless_events_costs_next_to_nothing() {
        let mut calendar = Calendar::default();
        for id in 0..MOST as i64 {
            let request = EventRequest {
                name: "again".into(),
                cron: Some("* * * * *".into()),
                // The first never let anybody stop early: a second of each minute.
                duration_s: Some(if id < 500 { 1 } else { 604_800 }),
                ..EventRequest::default()
            };
            calendar.set(id, Entry::new(request, None).unwrap());
        }
        let all = calendar.of_all(1_800_000_000, 300, 600);
        assert_eq!(all, [1.0; 3]);
        // 10,080 beginnings each: none but those of the day are looked at, and each fills what is not full yet.
        let day = calendar.shares(Uuid::nil(), 1_800_000_007, 300, 86_400);
        assert!(day.len() == 289 && day.iter().all(|share| *share == 1.0));
        let mut sparse = Calendar::default();
        sparse.set(1, calendar.entries[&1].clone());
        let day = sparse.shares(Uuid::nil(), 1_800_000_000, 300, 86_400);
        assert!(day.iter().all(|share| (share - 5.0 / 300.0).abs() < 1e-6), "{day:?}");
    }

    #[test]
    fn an_event_of_one_machine_is_not_anothers_and_one_that_was_is_over() {
        let mut calendar = Calendar::default();
        let once = EventRequest { name: "once".into(), at_unix_ms: Some(10_000_000), ..EventRequest::default() };
        calendar.set(4, Entry::new(once, Some(Uuid::from_u128(1))).unwrap());
        assert_eq!(calendar.shares(Uuid::from_u128(2), 10_000, 300, 300), [0.0, 0.0]);
        assert_eq!(calendar.shares(Uuid::from_u128(1), 10_000, 300, 300), [1.0, 1.0]);
        assert_eq!(calendar.list(9_000)[0].next_unix_ms, Some(10_000_000));
        assert!(calendar.over(10_000 + 3599).is_empty());
        assert_eq!((calendar.list(10_000 + 3599).len(), calendar.list(10_000 + 3600)), (1, vec![]));
        assert_eq!((calendar.over(10_000 + 3600), calendar.next_id()), (vec![4], 5));
        calendar.remove(4);
        assert_eq!(calendar.next_id(), 5, "whoever removes 4 again removes nobody else's");
        let mut next = Calendar::default();
        next.given_out(4);
        assert_eq!(next.next_id(), 5, "nor after a restart");
    }

    #[test]
    fn an_event_is_told_once_for_a_machine_and_may_have_many_dates() {
        let mut calendar = Calendar::default();
        let date = |at_unix_ms, vm| {
            let once = EventRequest { name: "hourly".into(), at_unix_ms: Some(at_unix_ms), ..EventRequest::default() };
            Entry::new(once, vm).unwrap()
        };
        calendar.set(1, date(1000, None));
        assert_eq!((calendar.same(&date(1000, None)), calendar.same(&date(2000, None))), (Some(1), None));
        assert_eq!(calendar.same(&date(1000, Some(Uuid::nil()))), None, "of one machine alone");
        assert_eq!(calendar.same(&hourly(60)), Some(1));
    }

    #[test]
    fn what_begins_is_told_once_and_what_was_missed_is_not() {
        let mut calendar = Calendar::default();
        let hourly = EventRequest { name: "hourly".into(), cron: Some("0 * * * *".into()), ..EventRequest::default() };
        calendar.set(1, Entry::new(hourly, None).unwrap());
        assert!(calendar.upcoming(Uuid::nil(), 3000, 3600).is_empty(), "nobody has looked yet");
        assert!(calendar.due(3000).is_empty());
        assert_eq!(calendar.upcoming(Uuid::nil(), 3000, 4200), [("hourly", 3600), ("hourly", 7200)]);
        assert_eq!(calendar.upcoming(Uuid::nil(), 3000, 60), []);
        let begins = Begins { name: "hourly".into(), vm: None, began_s: 3600, until_s: 7200 };
        assert_eq!((calendar.due(3601), calendar.due(3602)), (vec![begins], vec![]));
        assert!(calendar.due(7300).is_empty(), "too late to know what was used before");
        assert_eq!(calendar.upcoming(Uuid::nil(), 7300, 86_400).len(), 24);
        assert_eq!((calendar.due(3599).len(), calendar.due(3600).len()), (0, 1), "the clock was set back");
    }

    #[test]
    fn a_schedule_that_cannot_be_read_is_refused() {
        let bad = |cron: &str| Entry::new(EventRequest { cron: Some(cron.into()), ..EventRequest::default() }, None);
        assert!(bad("61 * * * *").is_err() && bad("0 0 30 2 *").is_err() && bad("").is_err());
    }
}
