//! Events that are to come, told by somebody; what machines did when they came is learned as that of programs is.

use super::State;
use super::activity::Activity;
use super::calendar::{Entry, Kept};
use super::profile::event_key;
use super::run::Demand;
use crate::learner::run::unix_ms;
use crate::store::executions::Learned;
use prestage_integration::api::demand::{ActivityRequest, Event, EventRequest, VmActivity};
use prestage_integration::api::{ApiError, ErrorCode};
use prestage_integration::libvirt::Uuid;

/// Where events and users' activity lie in the database.
const EVENT: &str = "event:";
/// The last number that an event was given.
const LAST_EVENT: &str = "last_event";
const ACTIVITY: &str = "activity:";
/// Machines whose users' activity is known.
const ACTIVITIES: usize = 4096;
/// Activity holds for an hour unless said otherwise.
const HOLDS_S: u32 = 3600;
/// It is announced no earlier than this, and told no later than an hour after it ended.
const AHEAD_S: u64 = 366 * 86_400;

impl State {
    /// Events that begin are recorded in their machines, those that are over are learned from: what is to be written down.
    pub(crate) fn occur(&mut self, now_s: u64) -> Vec<Learned> {
        let due = self.calendar.due(now_s);
        let mut learned = Vec::new();
        for machine in self.machines.values_mut() {
            let over = machine.foreseen.over(now_s);
            if !machine.is_here(now_s) {
                continue;
            }
            for event in over {
                learned.extend(self.catalogue.happened(event.key, event.began_s, event.duration_s, &event.runs));
            }
            for event in due.iter().filter(|event| event.vm.is_none_or(|of| of == machine.uuid)) {
                let (key, base) = (event_key(&event.name, machine.uuid), machine.base());
                let courses = self.catalogue.event(&key).cloned();
                machine.foreseen.begin(key, event.began_s, event.until_s, base, courses);
            }
        }
        learned
    }

    /// What a machine's users do now, and the share of now that events fill, 0 or 1; `None` where nothing is known.
    pub(crate) fn told(&self, uuid: Uuid, now_s: u64) -> (Option<f64>, Option<f64>) {
        let activity = self.activities.get(&uuid).map(|activity| activity.at(now_s));
        let share = || self.calendar.shares(uuid, now_s, 1, 0).first().copied().map(f64::from);
        (activity, if self.calendar.is_empty() { None } else { share() })
    }

    /// Takes in users' activity: how it is now, and what is to be written down.
    pub(crate) fn tell_activity(
        &mut self,
        (uuid, name): (Uuid, String),
        request: &ActivityRequest,
        now_s: u64,
    ) -> Result<(VmActivity, Option<Vec<u8>>), ApiError> {
        let at_s = request.at_unix_ms.map_or(now_s, |at_ms| at_ms / 1000);
        let until_s = at_s.saturating_add(request.duration_s.unwrap_or(HOLDS_S).into());
        if until_s <= now_s || at_s > now_s + AHEAD_S {
            let detail = "it is over already, or begins in more than a year: give a time that is to come";
            return Err(ApiError::invalid(detail));
        }
        if !self.activities.contains_key(&uuid) && self.activities.len() >= ACTIVITIES {
            let detail = format!("activity is told of {ACTIVITIES} machines already");
            return Err(ApiError::new(ErrorCode::NoSpace, detail));
        }
        let activity = self.activities.entry(uuid).or_default();
        let due = activity.tell(request.activity, at_s, until_s, now_s);
        let due = due.map_err(|detail| ApiError::new(ErrorCode::NoSpace, detail))?;
        let bytes = due.then(|| serde_json::to_vec(activity)).transpose();
        let bytes = bytes.map_err(|error| ApiError::internal(error.to_string()))?;
        Ok((activity.shown(uuid.to_string(), name, now_s), bytes))
    }

    pub(crate) fn activity(&self, uuid: Uuid, name: String, now_s: u64) -> VmActivity {
        let nothing = Activity::default();
        self.activities.get(&uuid).unwrap_or(&nothing).shown(uuid.to_string(), name, now_s)
    }
}

/// Whose activity lies under a name.
fn machine_of(key: &str) -> Option<Uuid> {
    key.strip_prefix(ACTIVITY).and_then(|uuid| Uuid::parse_str(uuid).ok())
}

impl Demand {
    /// Reads events and users' activity back.
    pub(super) fn restore_events(&self) -> Result<(), crate::store::StoreError> {
        let mut state = self.state.lock();
        for (key, bytes) in self.store.kept(EVENT)? {
            let id = key.strip_prefix(EVENT).and_then(|id| id.parse::<i64>().ok());
            let entry = serde_json::from_slice::<Kept>(&bytes).ok().and_then(Entry::from_kept);
            match (id, entry) {
                (Some(id), Some(entry)) => state.calendar.set(id, entry),
                _ => tracing::warn!(key, "an event in the database is damaged and left out"),
            }
        }
        for (_, bytes) in self.store.kept(LAST_EVENT)? {
            let last = std::str::from_utf8(&bytes).ok().and_then(|last| last.parse().ok());
            state.calendar.given_out(last.unwrap_or_default());
        }
        for (key, bytes) in self.store.kept(ACTIVITY)? {
            match (machine_of(&key), Activity::read(&bytes)) {
                (Some(uuid), Some(activity)) if state.activities.len() < ACTIVITIES => {
                    state.activities.insert(uuid, activity);
                }
                _ => tracing::warn!(key, "users' activity in the database is damaged and left out"),
            }
        }
        Ok(())
    }

    pub(crate) async fn event_add(&self, request: EventRequest, vm: Option<Uuid>) -> Result<Event, ApiError> {
        let entry = Entry::new(request, vm).map_err(ApiError::invalid)?;
        let now_s = unix_ms() / 1000;
        if entry.next(now_s).is_none() {
            return Err(ApiError::invalid("it is over, and does not come again: `at_unix_ms` is in the past"));
        }
        let (id, over) = {
            let mut state = self.state.lock();
            let over = state.calendar.over(now_s);
            for id in &over {
                state.calendar.remove(*id);
            }
            if let Some(id) = state.calendar.same(&entry) {
                let detail = format!(
                    "event {id} has this name for the same machines; remove it first (`prestagectl event remove {id}`), or give another name"
                );
                return Err(ApiError::new(ErrorCode::AlreadyExists, detail));
            }
            if state.calendar.is_full() {
                return Err(ApiError::new(ErrorCode::NoSpace, "there are 1000 events already; remove some"));
            }
            let id = state.calendar.next_id();
            if id == i64::MAX {
                return Err(ApiError::new(ErrorCode::NoSpace, "there are no numbers left for events"));
            }
            state.calendar.set(id, entry.clone());
            (id, over)
        };
        for id in over {
            drop(self.store.unkeep(format!("{EVENT}{id}")));
        }
        drop(self.store.keep(LAST_EVENT.to_owned(), id.to_string().into_bytes()));
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

    pub(crate) async fn activity_set(
        &self,
        vm: (Uuid, String),
        request: ActivityRequest,
    ) -> Result<VmActivity, ApiError> {
        let uuid = vm.0;
        let (shown, bytes) = self.state.lock().tell_activity(vm, &request, unix_ms() / 1000)?;
        if let Some(bytes) = bytes {
            let kept = self.store.keep(format!("{ACTIVITY}{uuid}"), bytes).await;
            kept.map_err(|error| ApiError::new(ErrorCode::Unavailable, error.to_string()))?;
        }
        Ok(shown)
    }

    /// Users' activity that was told since it was written down.
    pub(crate) async fn write_activities(&self) {
        let unwritten: Vec<_> = {
            let mut state = self.state.lock();
            let some = state.activities.iter_mut().filter_map(|(uuid, activity)| {
                let bytes = activity.take_unwritten().then(|| serde_json::to_vec(activity)).transpose().ok().flatten();
                Some((*uuid, bytes?))
            });
            some.collect()
        };
        for (uuid, bytes) in unwritten {
            if let Err(error) = self.store.keep(format!("{ACTIVITY}{uuid}"), bytes).await {
                tracing::warn!(vm = %uuid, %error, "users' activity is not on record");
            }
        }
    }

    /// What is on record of machines that are forgotten goes.
    pub(super) fn forget_activities(&self) {
        let Ok(kept) = self.store.kept(ACTIVITY) else { return };
        for (key, _) in kept {
            if machine_of(&key).is_none_or(|uuid| !self.state.lock().activities.contains_key(&uuid)) {
                drop(self.store.unkeep(key));
            }
        }
    }
}
