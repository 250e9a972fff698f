//! What is known of programs and events, and users' activity, as people read them.

use std::time::Duration;

use prestage_integration::api::demand::{ExecutionProfile, Follower, ProfileList, Quantiles, VmActivity};

use super::super::render::{ago, count, dash};
use super::super::table::{Align, Fields, Table, printable};
use super::super::when;
use super::text::amount;
use crate::config::units::{human_bytes, human_duration};

fn seconds(value: f64) -> String {
    human_duration(Duration::from_secs(value.max(0.0) as u64))
}

/// Names with what tells its executions apart.
fn name(profile: &ExecutionProfile) -> String {
    let mut name = if profile.program.is_empty() { "any".to_owned() } else { profile.program.clone() };
    if !profile.tags.is_empty() {
        name.push_str(&format!(" [{}]", profile.tags.join(", ")));
    }
    match profile.input.as_deref().map(|bytes| (bytes, bytes.parse().map(human_bytes))) {
        Some((_, Ok(size))) => name.push_str(&format!(", input from {size} on")),
        Some((other, Err(_))) => name.push_str(&format!(", input {other}")),
        None if profile.whole => name.push_str(", all executions"),
        None => {}
    }
    match profile.event_of_name.as_ref().or(profile.event_of.as_ref()) {
        Some(vm) => format!("{name}, event of {vm}"),
        None => name,
    }
}

fn a_day(profile: &ExecutionProfile) -> Option<String> {
    profile.runs_a_day.map(|runs| format!("{runs:.1}"))
}

pub(super) fn profiles(list: &ProfileList, now_unix_ms: u64) -> String {
    if list.profiles.is_empty() {
        return "nothing is known yet\n".to_owned();
    }
    let columns = [
        ("PROGRAM OR EVENT", Align::Left),
        ("STARTS", Align::Right),
        ("LAST", Align::Left),
        ("A DAY", Align::Right),
        ("TAKES", Align::Right),
        ("KNOWN", Align::Right),
    ];
    let mut table = Table::new(&columns);
    for profile in &list.profiles {
        table.row([
            name(profile),
            profile.starts.to_string(),
            dash(profile.last_unix_ms.map(|at| ago(at, now_unix_ms)).as_deref()),
            dash(a_day(profile).as_deref()),
            dash(profile.duration_s.map(|duration| seconds(duration.p50)).as_deref()),
            profile.known_runs.to_string(),
        ]);
    }
    let mut text = table.render();
    if list.next.is_some() {
        text.push_str("there are more: --limit\n");
    }
    text
}

/// Hours of the day in which it was started, with how many of the starts.
fn hours(by_hour: &[u32]) -> String {
    let all = by_hour.iter().sum::<u32>().max(1);
    let some = by_hour.iter().enumerate().filter(|(_, count)| **count > 0);
    let share = |count: u32| 100.0 * f64::from(count) / f64::from(all);
    let hours: Vec<String> = some.map(|(hour, count)| format!("{hour:02}h {:.0} %", share(*count))).collect();
    hours.join(", ")
}

fn follows(follower: &Follower) -> String {
    let Follower { seen, of, probability, after_s, beside, .. } = follower;
    let program = printable(&follower.program);
    let place = if *beside { "its start, while it runs" } else { "its end" };
    let (half, most) = (seconds(after_s.p50), seconds(after_s.p95));
    format!("{program}: {seen} of {of}, probability {probability:.2}, {half} (at most {most}) after {place}")
}

pub(super) fn detailed(list: &ProfileList, now_unix_ms: u64) -> String {
    let of = |profile: &ExecutionProfile| {
        let mut fields = Fields::default();
        fields.add("program", name(profile));
        let starts = count(profile.starts, "start", "starts");
        let last = profile.last_unix_ms.map_or_else(String::new, |at| format!(", last {}", ago(at, now_unix_ms)));
        let often = a_day(profile).map_or_else(String::new, |runs| format!(", {runs} a day"));
        fields.add("runs", format!("{starts}{last}{often}"));
        fields.add("hours (UTC)", hours(&profile.by_hour));
        let range = |quantiles: &Quantiles, of: &dyn Fn(f64) -> String| {
            format!("{} half of the time, up to {} in 95 %", of(quantiles.p50), of(quantiles.p95))
        };
        if let Some(duration) = &profile.duration_s {
            fields.add("takes", range(duration, &seconds));
        }
        fields.add("measured", count(profile.known_runs.into(), "execution", "executions"));
        for (resource, rise) in &profile.rise {
            fields.add(resource.name(), format!("{} more", range(rise, &|value| amount(*resource, value))));
        }
        for follower in &profile.followers {
            fields.add("followed by", follows(follower));
        }
        fields.render()
    };
    let mut text: String = list.profiles.iter().map(of).collect::<Vec<_>>().join("\n");
    if list.next.is_some() {
        text.push_str("there are more\n");
    }
    text
}

pub(super) fn activity(shown: &VmActivity) -> String {
    let mut fields = Fields::default();
    fields.add("machine", format!("{} ({})", shown.name, shown.uuid));
    let until = shown.until_unix_ms.map_or_else(String::new, |at| format!(" until {} UTC", when::show(at)));
    fields.add("activity", format!("{} now{until}, {:.0} at most", shown.activity, shown.most));
    for step in &shown.announced {
        let (from, until) = (when::show(step.at_unix_ms), when::show(step.until_unix_ms));
        fields.add("announced", format!("{} from {from} to {until} UTC", step.activity));
    }
    fields.render()
}
