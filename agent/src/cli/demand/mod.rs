//! Demand from the command line.
//!
//! - `vm policy`, `recommend`, `decisions`, `reservation`, `demand`: here, their text in `text.rs`
//! - `execution`, `event`, `vm activity`: in `told.rs`, what is known of programs as text in `programs.rs`
//! - `forecast show`: here, its chart in `chart.rs`

mod chart;
mod programs;
mod text;
mod told;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use prestage_integration::api::demand::{
    AdviceList, DecisionList, DemandStatus, Forecast, Mode, Reservation, ReservationList, ReservationRequest, Resource,
    ResourcePolicy, VmPolicy, VmPolicyShown, WebhookList,
};
use serde_json::json;

use super::render::now_unix_ms;
use super::{Failure, answer, when};
use crate::client::{Client, encode};
use crate::config::units::{parse_bytes, parse_duration};

pub(super) use told::{ActivityArgs, EventCommand, ExecutionCommand, activity, event, execution};

/// What columns and lines mean, below the options of each command.
pub(super) const RECOMMEND_HELP: &str = "Columns:
  NOW       what the machine has; TO: what it should have
  USED      what it uses now
  PEAK 95%  what it is to stay below in 95 of 100 cases, until changes take effect
  DO        raise, lower, hold (wanted, but not now) or refuse (not to be had)
  MODE      what would be done about it; only `act` changes anything";
pub(super) const DEMAND_HELP: &str = "Lines:
  missed rounds  measurements without an answer of libvirt
  pressure       share of 10 s in which some task of the host waited
  series         room that measurements take in the database
  note           what is not measured, and why
  webhook        events that wait and since when, those given up, the last error
  UNUSUAL        use that does not fit the machine at this hour; never acted on";
const DECISIONS_HELP: &str = "Columns:
  BEFORE   what the machine had; ASKED: what it was to have
  GOT      what was read back afterwards; - where nothing was changed
  OUTCOME  done, partial, failed, impossible, or not acted (with the mode that says so)
  TOOK MS  from the decision to what was read back";
const POLICY_HELP: &str =
    "BOUNDS are a list such as min=1GiB,max=8GiB,mode=act,never-lower=yes; `min=` without a value unsets one. \
    vCPUs are numbers, memory is a size, disk and network are sizes a second.

Lines:
  margin  kept free above what is used
  note    bounds that have no effect, and what makes changes less than they seem
  others  (balloon, shrink, vcpu_add, …) what can be done as it runs, or why not";
const RESERVATIONS_HELP: &str = "Columns:
  STATE  waiting (it is to begin) or running (its room is kept)
  PRIO   0 to 100, as given; WHAT: what is promised; NOTE: as given

Below: promises that change nothing in their machine, and why.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Measure and forecast
    Observe,
    /// Tell what should be changed
    Recommend,
    /// Change it
    Act,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PagesArg {
    /// Learn which pages a program touches
    Observe,
    /// Bring them in before it does
    Act,
    /// As the daemon is configured
    Default,
}

/// A share, or the daemon's.
#[derive(Debug, Clone, Copy)]
struct Floor(Option<f64>);

fn floor(text: &str) -> Result<Floor, String> {
    if text == "default" {
        return Ok(Floor(None));
    }
    let share = text.parse().map_err(|_| format!("`{text}` is neither `default` nor a share such as 0.5"))?;
    Ok(Floor(Some(share)))
}

impl From<PagesArg> for Option<Mode> {
    fn from(pages: PagesArg) -> Self {
        match pages {
            PagesArg::Observe => Some(Mode::Observe),
            PagesArg::Act => Some(Mode::Act),
            PagesArg::Default => None,
        }
    }
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Observe => Self::Observe,
            ModeArg::Recommend => Self::Recommend,
            ModeArg::Act => Self::Act,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ResourceArg {
    Cpu,
    Memory,
    Disk,
    Network,
}

impl From<ResourceArg> for Resource {
    fn from(resource: ResourceArg) -> Self {
        match resource {
            ResourceArg::Cpu => Self::Cpu,
            ResourceArg::Memory => Self::Memory,
            ResourceArg::Disk => Self::Disk,
            ResourceArg::Network => Self::Network,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = POLICY_HELP)]
pub struct PolicyArgs {
    /// Name or UUID
    vm: String,
    /// What is done about decisions
    #[arg(long, value_enum)]
    mode: Option<ModeArg>,
    /// Under shortage higher ones are served first, after everybody's minimum
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=100))]
    priority: Option<u8>,
    /// Share among machines of one priority
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    weight: Option<u32>,
    /// Kept free above what is used, as a share of it, 0 to 1
    #[arg(long)]
    margin: Option<f64>,
    /// What is done about pages of its memory: act brings swapped ones in and, with memory.push_out, pushes idle ones out; default: act, unless memory.prestage = false
    #[arg(long, value_enum, value_name = "MODE")]
    pages: Option<PagesArg>,
    /// Share of the memory it uses that is never pushed out, 0 to 1; default: as the daemon is configured
    #[arg(long, value_name = "SHARE", value_parser = floor)]
    pages_floor: Option<Floor>,
    /// Bounds of vCPUs
    #[arg(long, value_name = "BOUNDS", value_parser = bounds_of_numbers)]
    cpu: Option<Bounds>,
    /// Bounds of memory
    #[arg(long, value_name = "BOUNDS", value_parser = bounds_of_bytes)]
    memory: Option<Bounds>,
    /// Bounds of disk throughput
    #[arg(long, value_name = "BOUNDS", value_parser = bounds_of_bytes)]
    disk: Option<Bounds>,
    /// Bounds of network throughput
    #[arg(long, value_name = "BOUNDS", value_parser = bounds_of_bytes)]
    network: Option<Bounds>,
    /// Back to the default, before anything else that is given
    #[arg(long)]
    reset: bool,
}

/// Changes of a [`ResourcePolicy`]: the inner option is what to set.
#[derive(Debug, Clone, Default)]
struct Bounds {
    mode: Option<Option<Mode>>,
    min: Option<Option<f64>>,
    max: Option<Option<f64>>,
    never_lower: Option<bool>,
}

impl Bounds {
    fn parse(text: &str, amount: impl Fn(&str) -> Result<f64, String>) -> Result<Self, String> {
        let mut bounds = Self::default();
        for part in text.split(',') {
            let (key, value) = part.split_once('=').unwrap_or((part, "yes"));
            let amount = |value: &str| if value.is_empty() { Ok(None) } else { amount(value).map(Some) };
            match key.trim() {
                "min" => bounds.min = Some(amount(value)?),
                "max" => bounds.max = Some(amount(value)?),
                "mode" if value.is_empty() => bounds.mode = Some(None),
                "mode" => {
                    let mode = ModeArg::from_str(value, true)
                        .map_err(|_| format!("`{value}` is not a mode; it is observe, recommend or act"))?;
                    bounds.mode = Some(Some(mode.into()));
                }
                "never-lower" => {
                    bounds.never_lower = Some(match value {
                        "yes" | "true" => true,
                        "no" | "false" | "" => false,
                        _ => return Err(format!("`{value}` is neither yes nor no")),
                    });
                }
                key => return Err(format!("there is no `{key}`; it is min, max, mode or never-lower")),
            }
        }
        Ok(bounds)
    }

    fn apply(&self, policy: &mut VmPolicy, resource: Resource) {
        let of = policy.resources.entry(resource).or_default();
        of.mode = self.mode.unwrap_or(of.mode);
        of.min = self.min.unwrap_or(of.min);
        of.max = self.max.unwrap_or(of.max);
        of.never_lower = self.never_lower.unwrap_or(of.never_lower);
        if *of == ResourcePolicy::default() {
            policy.resources.remove(&resource);
        }
    }
}

fn bounds_of_bytes(text: &str) -> Result<Bounds, String> {
    Bounds::parse(text, |value| parse_bytes(value).map(|bytes| bytes as f64))
}

fn bounds_of_numbers(text: &str) -> Result<Bounds, String> {
    Bounds::parse(text, |value| match value.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err(format!("`{value}` is not a number of vCPUs")),
    })
}

impl PolicyArgs {
    fn changes(&self) -> [(Resource, &Option<Bounds>); 4] {
        [
            (Resource::Cpu, &self.cpu),
            (Resource::Memory, &self.memory),
            (Resource::Disk, &self.disk),
            (Resource::Network, &self.network),
        ]
    }

    fn asks(&self) -> bool {
        self.mode.is_none()
            && self.priority.is_none()
            && self.weight.is_none()
            && self.margin.is_none()
            && self.pages.is_none()
            && self.pages_floor.is_none()
            && self.changes().iter().all(|(_, bounds)| bounds.is_none())
    }
}

pub(super) async fn policy(args: PolicyArgs, client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let path = format!("/v1/vms/{}/policy", encode(&args.vm));
    if args.reset {
        client.delete(&path).await?;
    }
    let mut shown: VmPolicyShown = client.get(&path).await?;
    if !args.asks() {
        let policy = &mut shown.policy;
        policy.mode = args.mode.map_or(policy.mode, Mode::from);
        policy.priority = args.priority.unwrap_or(policy.priority);
        policy.weight = args.weight.unwrap_or(policy.weight);
        policy.margin = args.margin.unwrap_or(policy.margin);
        policy.pages = args.pages.map_or(policy.pages, Option::from);
        policy.pages_floor = args.pages_floor.map_or(policy.pages_floor, |Floor(share)| share);
        for (resource, bounds) in args.changes() {
            if let Some(bounds) = bounds {
                bounds.apply(policy, resource);
            }
        }
        policy.validate().map_err(Failure::Usage)?;
        shown = client.put(&path, policy).await?;
    }
    answer(out, json, &shown, text::policy)
}

#[derive(Debug, Subcommand)]
pub enum ForecastCommand {
    /// What a machine is expected to use
    #[command(long_about = "What a machine is expected to use of a resource.\n\n\
        The chart shows what was measured (█), and from now on the median (█), and what it is to stay below in 90 (▒) and \
        95 (░) of 100 cases. The peak is that of the whole time, which steps one by one do not tell.")]
    Show(ShowArgs),
    /// Forecast recorded series at given points, to compare with other forecasters
    Evaluate(super::forecast::EvaluateArgs),
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Name or UUID
    vm: String,
    /// Of what
    #[arg(long, value_enum, default_value_t = ResourceArg::Memory)]
    resource: ResourceArg,
    /// How far ahead, 1m to 24h
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = horizon)]
    horizon: Duration,
    /// Also write the chart to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn horizon(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        horizon if (60..=86_400).contains(&horizon.as_secs()) => Ok(horizon),
        _ => Err("it is 1m to 24h".to_owned()),
    }
}

pub(super) async fn forecast(
    command: ForecastCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let args = match command {
        ForecastCommand::Show(args) => args,
        ForecastCommand::Evaluate(args) => return super::forecast::evaluate(&args, json, out),
    };
    let (resource, seconds) = (Resource::from(args.resource).name(), args.horizon.as_secs());
    let path = format!("/v1/vms/{}/forecast?resource={resource}&horizon_s={seconds}", encode(&args.vm));
    let forecast: Forecast = client.get(&path).await?;
    if let Some(file) = &args.svg {
        std::fs::write(file, chart::svg(&forecast))
            .map_err(|error| Failure::Failed(format!("cannot write the chart to {}: {error}", file.display())))?;
    }
    answer(out, json, &forecast, chart::text)
}

pub(super) async fn recommend(
    vm: Option<String>,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let query = vm.map_or_else(String::new, |vm| format!("?vm={}", encode(&vm)));
    answer(out, json, &client.get::<AdviceList>(&format!("/v1/recommendations{query}")).await?, text::advice)
}

#[derive(Debug, Args)]
#[command(after_help = DECISIONS_HELP)]
pub struct DecisionsArgs {
    /// Name or UUID of a machine [default: all]
    #[arg(long)]
    vm: Option<String>,
    /// How many, latest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Only those older than this one
    #[arg(long, value_name = "ID")]
    before: Option<i64>,
}

pub(super) async fn decisions(
    args: DecisionsArgs,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let vm = args.vm.map_or_else(String::new, |vm| format!("&vm={}", encode(&vm)));
    let before = args.before.map_or_else(String::new, |id| format!("&before={id}"));
    let path = format!("/v1/decisions?limit={}{vm}{before}", args.limit);
    answer(out, json, &client.get::<DecisionList>(&path).await?, text::decisions)
}

#[derive(Debug, Subcommand)]
pub enum ReservationCommand {
    /// Promise resources for a time window, if they fit
    Add(ReservationArgs),
    /// Promises that hold or are to come
    #[command(after_help = RESERVATIONS_HELP)]
    List,
    /// Take a promise back
    Cancel {
        /// From `reservation list`
        id: i64,
    },
}

#[derive(Debug, Args)]
pub struct ReservationArgs {
    /// When it begins: now, +2h, or in UTC 2026-11-22T03:00Z
    #[arg(long, value_name = "TIME", default_value = "now")]
    from: String,
    /// How long it lasts
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration, required_unless_present = "until")]
    lasts: Option<Duration>,
    /// When it ends
    #[arg(long, value_name = "TIME", conflicts_with = "lasts")]
    until: Option<String>,
    /// Name or UUID of the machine [default: one that is to come]
    #[arg(long)]
    vm: Option<String>,
    #[arg(long, default_value_t = 0.0)]
    vcpus: f64,
    /// Such as 4GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "0")]
    memory: u64,
    /// A second, such as 100MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "0")]
    disk: u64,
    /// A second, such as 100MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "0")]
    network: u64,
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    priority: u8,
    /// Shown in the list
    #[arg(long, default_value = "")]
    note: String,
}

impl ReservationArgs {
    fn request(self, now_unix_ms: u64) -> Result<ReservationRequest, Failure> {
        let from_unix_ms = when::parse(&self.from, now_unix_ms).map_err(Failure::Usage)?;
        let until_unix_ms = match (&self.until, self.lasts) {
            (Some(until), _) => when::parse(until, now_unix_ms).map_err(Failure::Usage)?,
            (None, lasts) => {
                let lasts = u64::try_from(lasts.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
                from_unix_ms.saturating_add(lasts)
            }
        };
        let request = ReservationRequest {
            vm: self.vm,
            vcpus: self.vcpus,
            memory_bytes: self.memory,
            disk_bytes_per_s: self.disk as f64,
            network_bytes_per_s: self.network as f64,
            from_unix_ms,
            until_unix_ms,
            priority: self.priority,
            note: self.note,
        };
        request.validate().map_err(Failure::Usage)?;
        Ok(request)
    }
}

pub(super) async fn reservation(
    command: ReservationCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    match command {
        ReservationCommand::Add(args) => {
            let request = args.request(now_unix_ms())?;
            let made: Reservation = client.post("/v1/reservations", &request).await?;
            answer(out, json, &made, text::reserved)
        }
        ReservationCommand::List => {
            answer(out, json, &client.get::<ReservationList>("/v1/reservations").await?, text::reservations)
        }
        ReservationCommand::Cancel { id } => {
            client.delete(&format!("/v1/reservations/{id}")).await?;
            answer(out, json, &json!({ "cancelled": id }), |_| format!("reservation {id} is cancelled\n"))
        }
    }
}

pub(super) async fn demand(client: &Client, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let status: DemandStatus = client.get("/v1/demand").await?;
    let webhooks: WebhookList = client.get("/v1/webhooks").await?;
    let both = json!({ "demand": status, "webhooks": webhooks.webhooks });
    answer(out, json, &both, |_| text::demand(&status, &webhooks, now_unix_ms()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_set_unset_and_refuse() {
        let mut policy = VmPolicy::default();
        bounds_of_bytes("min=1GiB,max=8GiB,mode=act,never-lower").unwrap().apply(&mut policy, Resource::Memory);
        let memory = policy.resources[&Resource::Memory];
        assert_eq!((memory.min, memory.max), (Some((1u64 << 30) as f64), Some((8u64 << 30) as f64)));
        assert_eq!((memory.mode, memory.never_lower), (Some(Mode::Act), true));
        bounds_of_bytes("min=").unwrap().apply(&mut policy, Resource::Memory);
        assert_eq!(
            (policy.resources[&Resource::Memory].min, policy.resources[&Resource::Memory].never_lower),
            (None, true)
        );
        bounds_of_bytes("max=,mode=,never-lower=no").unwrap().apply(&mut policy, Resource::Memory);
        assert!(policy.resources.is_empty(), "nothing set is nothing kept");
        for bad in ["", "min", "min=x", "size=1", "mode=perhaps", "never-lower=perhaps"] {
            assert!(bounds_of_bytes(bad).is_err(), "{bad}");
        }
        assert!(bounds_of_numbers("max=nan").is_err() && bounds_of_numbers("max=-1").is_err());
        assert_eq!(bounds_of_numbers("max=1.5").unwrap().max, Some(Some(1.5)));
    }

    #[test]
    fn a_reservation_needs_an_end_and_something_to_hold() {
        let args = |lasts, until: Option<&str>, vcpus| ReservationArgs {
            from: "now".into(),
            lasts,
            until: until.map(str::to_owned),
            vm: None,
            vcpus,
            memory: 0,
            disk: 0,
            network: 0,
            priority: 50,
            note: String::new(),
        };
        let request = args(Some(Duration::from_secs(60)), None, 1.0).request(1000).unwrap();
        assert_eq!((request.from_unix_ms, request.until_unix_ms), (1000, 61_000));
        assert_eq!(args(None, Some("+1h"), 1.0).request(1000).unwrap().until_unix_ms, 3_601_000);
        assert!(args(Some(Duration::ZERO), None, 1.0).request(1000).is_err());
        assert!(args(Some(Duration::from_secs(60)), None, 0.0).request(1000).is_err());
    }
}
