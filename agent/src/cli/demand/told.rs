//! What is told of machines, from the command line: programs that begin and end, events that are to come, what users do; and what is known
//! of programs from it.

use std::io::Write;
use std::time::Duration;

use clap::{Args, Subcommand};
use prestage_integration::api::demand::{
    ActivityRequest, Event, EventList, EventRequest, Execution, ExecutionList, ExecutionStart, ProfileList, VmActivity,
};
use serde_json::json;

use super::super::render::now_unix_ms;
use super::super::{Failure, answer, when};
use super::{programs, text};
use crate::client::{Client, encode};
use crate::config::units::{parse_bytes, parse_duration};

/// What columns mean, below the options of each command.
const EXECUTIONS_HELP: &str = "Columns:
  INPUT       size of its input, as it was announced
  KNOWN RUNS  executions like it from which its use is foreseen";
const PROFILES_HELP: &str =
    "A row for executions of like tags and size of input, one for like tags, and one for all of the program.

Columns:
  STARTS  as far as they were announced; LAST: the latest
  A DAY   starts a day; - before it is known for a day
  TAKES   half of the latest executions took no longer
  KNOWN   executions whose use was measured, of the latest 16";
const EVENTS_HELP: &str = "Columns:
  NEXT UTC  when it begins next, or began if it is not over
  FOR       how long it lasts
  CRON      when it comes again; - for a single date
  MACHINE   - for all";

/// Profiles of one program that are shown at most.
const PROFILES: usize = 100;

#[derive(Debug, Subcommand)]
pub enum ExecutionCommand {
    /// Announce that a program begins in a machine: what it needed before is made ready
    Start {
        /// Name or UUID of the machine
        vm: String,
        /// Its name, or better the hash of its binary
        program: String,
        /// Tells executions of one program apart; may be given several times
        #[arg(long = "tag", value_name = "TAG")]
        tags: Vec<String>,
        /// Size of its input: it is compared with executions of like size
        #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
        input: Option<u64>,
    },
    /// Announce that it ended
    End {
        /// From `execution start`
        id: i64,
    },
    /// Programs that run, as far as they were announced
    List(ExecutionsArgs),
    /// What is known of programs and events: how often they run, how long they take, what they use
    #[command(after_help = PROFILES_HELP)]
    Profiles {
        /// At most so many
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=4096))]
        limit: u32,
    },
    /// All that is known of a program or event: also at what hours it runs, and what follows it
    Show {
        /// As it was announced
        program: String,
    },
}

#[derive(Debug, Args)]
#[command(after_help = EXECUTIONS_HELP)]
pub struct ExecutionsArgs {
    /// Name or UUID of a machine [default: all]
    #[arg(long)]
    vm: Option<String>,
    /// How many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Only those after this one
    #[arg(long, value_name = "ID")]
    after: Option<i64>,
}

/// Profiles, page by page; at most so many.
async fn profiles(client: &Client, program: Option<&str>, limit: usize) -> Result<ProfileList, Failure> {
    let program = program.map_or_else(String::new, |program| format!("&program={}", encode(program)));
    let mut list = ProfileList::default();
    loop {
        let wanted = (limit - list.profiles.len()).clamp(1, 1000);
        let after = list.next.as_ref().map_or_else(String::new, |after| format!("&after={}", encode(after)));
        let path = format!("/v1/executions/profiles?limit={wanted}{program}{after}");
        let page = client.get::<ProfileList>(&path).await?;
        let empty = page.profiles.is_empty();
        list.profiles.extend(page.profiles);
        list.next = page.next;
        if list.next.is_none() || empty || list.profiles.len() >= limit {
            return Ok(list);
        }
    }
}

pub(in crate::cli) async fn execution(
    command: ExecutionCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    match command {
        ExecutionCommand::Start { vm, program, tags, input } => {
            let request = ExecutionStart { vm, program, tags, input_bytes: input };
            request.validate().map_err(Failure::Usage)?;
            let started: Execution = client.post("/v1/executions", &request).await?;
            answer(out, json, &started, text::execution_started)
        }
        ExecutionCommand::End { id } => {
            let ended: Execution = client.post(&format!("/v1/executions/{id}/end"), &json!({})).await?;
            answer(out, json, &ended, text::execution_ended)
        }
        ExecutionCommand::List(args) => {
            let now = now_unix_ms();
            let vm = args.vm.map_or_else(String::new, |vm| format!("&vm={}", encode(&vm)));
            let after = args.after.map_or_else(String::new, |id| format!("&after={id}"));
            let path = format!("/v1/executions?limit={}{vm}{after}", args.limit);
            let list = client.get::<ExecutionList>(&path).await?;
            answer(out, json, &list, |list| text::executions(list, now))
        }
        ExecutionCommand::Profiles { limit } => {
            let now = now_unix_ms();
            let list = profiles(client, None, limit as usize).await?;
            answer(out, json, &list, |list| programs::profiles(list, now))
        }
        ExecutionCommand::Show { program } => {
            let now = now_unix_ms();
            let list = profiles(client, Some(&program), PROFILES).await?;
            if list.profiles.is_empty() {
                let detail = format!("nothing is known of `{program}`; see `prestagectl execution profiles`");
                return Err(Failure::Failed(detail));
            }
            answer(out, json, &list, |list| programs::detailed(list, now))
        }
    }
}

#[derive(Debug, Args)]
pub struct ActivityArgs {
    /// Name or UUID
    vm: String,
    /// Sessions, requests a second, or whatever there is to count [default: show what was told]
    activity: Option<f64>,
    /// From when on: now, +2h, or in UTC 2026-11-22T03:00Z
    #[arg(long, value_name = "TIME", requires = "activity")]
    at: Option<String>,
    /// How long it holds unless another follows
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, default_value = "1h")]
    lasts: Duration,
}

pub(in crate::cli) async fn activity(
    args: ActivityArgs,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let path = format!("/v1/vms/{}/activity", encode(&args.vm));
    let shown: VmActivity = match args.activity {
        None => client.get(&path).await?,
        Some(activity) => {
            let at = args.at.map(|at| when::parse(&at, now_unix_ms())).transpose().map_err(Failure::Usage)?;
            let lasts = u32::try_from(args.lasts.as_secs()).unwrap_or(u32::MAX);
            let request = ActivityRequest { activity, at_unix_ms: at, duration_s: Some(lasts) };
            request.validate().map_err(Failure::Usage)?;
            client.post(&path, &request).await?
        }
    };
    answer(out, json, &shown, programs::activity)
}

#[derive(Debug, Subcommand)]
pub enum EventCommand {
    /// Tell of something that demand may follow
    Add(EventArgs),
    /// All that is known to come
    #[command(after_help = EVENTS_HELP)]
    List,
    /// Forget one
    Remove {
        /// From `event list`
        id: i64,
    },
}

#[derive(Debug, Args)]
pub struct EventArgs {
    /// What it is, such as "month end"
    name: String,
    /// Again and again: five fields of cron, in UTC, such as "0 3 * * 1"
    #[arg(long, value_name = "FIELDS", required_unless_present = "at", conflicts_with = "at")]
    cron: Option<String>,
    /// Once: +2h, or in UTC 2026-11-22T03:00Z
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// How long it lasts
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, default_value = "1h")]
    lasts: Duration,
    /// Name or UUID of the machine that it is for [default: all]
    #[arg(long)]
    vm: Option<String>,
}

pub(in crate::cli) async fn event(
    command: EventCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    match command {
        EventCommand::Add(args) => {
            let at = args.at.map(|at| when::parse(&at, now_unix_ms())).transpose().map_err(Failure::Usage)?;
            let request = EventRequest {
                name: args.name,
                vm: args.vm,
                cron: args.cron,
                at_unix_ms: at,
                duration_s: Some(u32::try_from(args.lasts.as_secs()).unwrap_or(u32::MAX)),
            };
            request.validate().map_err(Failure::Usage)?;
            let event: Event = client.post("/v1/events", &request).await?;
            answer(out, json, &event, text::event_added)
        }
        EventCommand::List => answer(out, json, &client.get::<EventList>("/v1/events").await?, text::events),
        EventCommand::Remove { id } => {
            client.delete(&format!("/v1/events/{id}")).await?;
            answer(out, json, &json!({ "removed": id }), |_| format!("event {id} is forgotten\n"))
        }
    }
}
