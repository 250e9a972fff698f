//! What runs in machines, what is known of it, and what is known to come: executions and their profiles, events, users' activity.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Quantiles, Resource, text};

/// Most tags of an execution.
const TAGS_MAX: usize = 16;
/// Rows of a page, and unless asked otherwise.
const PAGE_MAX: u32 = 1000;
const PAGE: u32 = 100;
/// Greatest activity, and longest time it holds.
const ACTIVITY_MAX: f64 = 1e12;
const HOLDS_MAX_S: u32 = 604_800;

fn page(limit: Option<u32>) -> Result<(), String> {
    match limit {
        Some(limit) if !(1..=PAGE_MAX).contains(&limit) => Err(format!("`limit` is 1 to {PAGE_MAX}, not {limit}")),
        _ => Ok(()),
    }
}

/// A program begins in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecutionStart {
    /// Name or UUID of a running machine.
    pub vm: String,
    /// What tells the program from others: its name, or better the hash of its binary.
    pub program: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Size of its input: executions are compared with those of inputs of like size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_bytes: Option<u64>,
}

impl ExecutionStart {
    /// # Errors
    /// Which text is missing or too long.
    pub fn validate(&self) -> Result<(), String> {
        if self.program.is_empty() {
            return Err("`program` is empty".to_owned());
        }
        text("program", &self.program)?;
        if self.tags.len() > TAGS_MAX {
            return Err(format!("at most {TAGS_MAX} tags, not {}", self.tags.len()));
        }
        self.tags.iter().try_for_each(|tag| text("tags", tag))
    }
}

/// A program that runs in a machine, or ran.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Execution {
    pub id: i64,
    #[serde(flatten)]
    pub start: ExecutionStart,
    pub started_unix_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// Earlier executions that it is compared with.
    pub known_runs: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct ExecutionList {
    pub executions: Vec<Execution>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
}

/// Which executions; in the order of their ids.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ExecutionsQuery {
    /// Name or UUID of a machine; default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Only those after this id: for the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<i64>,
    /// 1 to 1000. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

impl ExecutionsQuery {
    /// # Errors
    /// The limit is out of range.
    pub fn validate(&self) -> Result<(), String> {
        page(self.limit)
    }

    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.unwrap_or(PAGE) as usize
    }
}

/// Which profiles; in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ProfilesQuery {
    /// Of this program or event; default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
    /// `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// 1 to 1000. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

impl ProfilesQuery {
    /// # Errors
    /// The limit is out of range.
    pub fn validate(&self) -> Result<(), String> {
        page(self.limit)
    }

    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit.unwrap_or(PAGE) as usize
    }
}

/// What is known of a program, or of an event in a machine, from its latest executions.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ExecutionProfile {
    /// Empty: of whatever has these tags. Of an event: its name.
    pub program: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Of all executions of the program, whatever their tags and input.
    #[serde(default)]
    pub whole: bool,
    /// Class of the input's size: from this number of bytes to below twice as much, or `none`; absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// UUID of the machine that it is an event of; absent of programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_of: Option<String>,
    /// That machine's name, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_of_name: Option<String>,
    pub starts: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_unix_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_unix_ms: Option<u64>,
    /// By the time between the latest starts; absent before the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs_a_day: Option<f64>,
    /// Starts in each hour of the day, UTC; halved now and then, so that recent ones count more.
    pub by_hour: Vec<u32>,
    /// Seconds; absent before the first end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_s: Option<Quantiles>,
    /// Executions whose use was measured.
    pub known_runs: u32,
    /// The most that an execution used above what its machine used before.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rise: BTreeMap<Resource, Quantiles>,
    /// Programs that began while it ran or within an hour after, the most frequent first. Of a program's widest profile only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub followers: Vec<Follower>,
}

/// A program that followed another in the same machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Follower {
    pub program: String,
    /// So many executions it followed, of so many.
    pub seen: u32,
    pub of: u32,
    /// Estimated from these; from 0.1 on, and of two executions or more, it is foreseen.
    pub probability: f64,
    /// Seconds after the end of the other, or after its start where `beside`.
    pub after_s: Quantiles,
    /// It mostly began while the other still ran.
    pub beside: bool,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ProfileList {
    pub profiles: Vec<ExecutionProfile>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Something that is going to happen, or happens again and again, and that demand may follow. What a machine used while it lasted is known
/// by its name, and foreseen at its next announced time once it was there twice.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EventRequest {
    /// What it is, such as `month end`.
    pub name: String,
    /// Name or UUID of a machine; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Five fields of cron (minute, hour, day of month, month, day of week) in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron: Option<String>,
    /// Once, at this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_unix_ms: Option<u64>,
    /// How long it lasts, 1 to 604,800. Default 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_s: Option<u32>,
}

impl EventRequest {
    /// # Errors
    /// What is missing or too much. Whether `cron` can be read is the daemon's to say.
    pub fn validate(&self) -> Result<(), String> {
        if self.name.is_empty() {
            return Err("`name` is empty".to_owned());
        }
        text("name", &self.name)?;
        if self.cron.is_some() == self.at_unix_ms.is_some() {
            return Err("give either `cron` or `at_unix_ms`".to_owned());
        }
        match self.duration_s {
            Some(duration) if !(1..=604_800).contains(&duration) => {
                Err(format!("`duration_s` is 1 to 604800, not {duration}"))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Event {
    pub id: i64,
    #[serde(flatten)]
    pub request: EventRequest,
    /// Absent: never again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_unix_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct EventList {
    pub events: Vec<Event>,
}

/// How much users do in a machine, now or in time to come: sessions, requests a second, or whatever there is to count.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ActivityRequest {
    /// 0 to 1e12. Only its share of the most there was matters.
    pub activity: f64,
    /// From when on; absent: now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_unix_ms: Option<u64>,
    /// How long it holds unless another follows, 1 to 604,800. Default 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_s: Option<u32>,
}

impl ActivityRequest {
    /// # Errors
    /// Which value is out of range.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.activity.is_finite() && (0.0..=ACTIVITY_MAX).contains(&self.activity)) {
            return Err(format!("`activity` is 0 to {ACTIVITY_MAX:e}, not {}", self.activity));
        }
        match self.duration_s {
            Some(holds) if !(1..=HOLDS_MAX_S).contains(&holds) => {
                Err(format!("`duration_s` is 1 to {HOLDS_MAX_S}, not {holds}"))
            }
            _ => Ok(()),
        }
    }
}

/// What was told of users' activity in a machine.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct VmActivity {
    pub uuid: String,
    pub name: String,
    /// What holds now; 0 where nothing was told.
    pub activity: f64,
    /// When that ends, unless what is announced begins before; absent where nothing holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_unix_ms: Option<u64>,
    /// The most there was, which fades by half in a month: what the others are compared with.
    pub most: f64,
    /// What is to come.
    pub announced: Vec<ActivityStep>,
}

/// Activity for a time.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct ActivityStep {
    pub at_unix_ms: u64,
    pub until_unix_ms: u64,
    pub activity: f64,
}
