//! Answers about demand, as people read them.

use std::time::Duration;

use prestage_integration::api::demand::{
    AdviceList, DecisionList, DemandStatus, Event, EventList, Execution, ExecutionList, Mode, Quantiles, Reservation,
    ReservationList, Resource, VmPolicyShown, WebhookList,
};

use super::super::render::{ago, count, dash};
use super::super::table::{Align, Fields, Table, printable};
use super::super::when;
use crate::config::units::{human_bytes, human_duration};

/// An amount with its unit.
pub(super) fn amount(resource: Resource, value: f64) -> String {
    match resource {
        Resource::Cpu => format!("{value:.2}"),
        Resource::Memory => human_bytes(value.max(0.0) as u64),
        Resource::Disk | Resource::Network => format!("{}/s", human_bytes(value.max(0.0) as u64)),
    }
}

pub(super) fn policy(shown: &VmPolicyShown) -> String {
    let policy = &shown.policy;
    let mut fields = Fields::default();
    fields.add("machine", format!("{} ({})", shown.name, shown.uuid));
    fields.add("policy", if shown.set { "its own" } else { "the default" });
    fields.add("mode", policy.mode.name());
    fields.add("priority", format!("{}, weight {}", policy.priority, policy.weight));
    fields.add("margin", format!("{:.0} % above what is used", 100.0 * policy.margin));
    fields.add("swapped pages", policy.pages.map_or("as memory.prestage and memory.push_out say", Mode::name));
    if let Some(floor) = policy.pages_floor {
        fields.add("pages floor", format!("{:.0} % of the memory it uses is never pushed out", 100.0 * floor));
    }
    for (resource, of) in &policy.resources {
        let bound = |name: &str, bound: Option<f64>| bound.map(|bound| format!("{name} {}", amount(*resource, bound)));
        let parts = [
            of.mode.map(|mode| format!("mode {}", mode.name())),
            bound("min", of.min),
            bound("max", of.max),
            of.never_lower.then(|| "never lowered".to_owned()),
        ];
        fields.add(resource.name(), parts.into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
    for note in &shown.notes {
        fields.add("note", note);
    }
    for ability in &shown.abilities {
        if ability.what == "note" {
            fields.add("note", &ability.reason);
            continue;
        }
        let can = if ability.possible { "yes" } else { "no" };
        let reason = if ability.reason.is_empty() { String::new() } else { format!(": {}", ability.reason) };
        fields.add(&ability.what, format!("{can}{reason}"));
    }
    fields.render()
}

pub(super) fn advice(list: &AdviceList) -> String {
    let columns = [
        ("MACHINE", Align::Left),
        ("WHAT", Align::Left),
        ("MODE", Align::Left),
        ("DO", Align::Left),
        ("NOW", Align::Right),
        ("TO", Align::Right),
        ("USED", Align::Right),
        ("PEAK 95%", Align::Right),
        ("WHY", Align::Left),
    ];
    let mut table = Table::new(&columns);
    for advice in &list.recommendations {
        let of = |value: Option<f64>| dash(value.map(|value| amount(advice.resource, value)).as_deref());
        table.row([
            advice.name.clone(),
            advice.resource.name().to_owned(),
            advice.mode.name().to_owned(),
            advice.kind.clone(),
            amount(advice.resource, advice.now),
            amount(advice.resource, advice.to),
            of(advice.used),
            of(advice.peak.map(|peak| peak.p95)),
            advice.why.clone(),
        ]);
    }
    let mut text = match list.recommendations.is_empty() {
        true => "nothing to change\n".to_owned(),
        false => table.render(),
    };
    for left in &list.left_out {
        text.push_str(&format!("{} is left out: {}\n", printable(&left.name), printable(&left.reason)));
    }
    text
}

pub(super) fn decisions(list: &DecisionList) -> String {
    if list.decisions.is_empty() {
        return "no decisions\n".to_owned();
    }
    let columns = [
        ("ID", Align::Right),
        ("UTC", Align::Left),
        ("MACHINE", Align::Left),
        ("WHAT", Align::Left),
        ("DO", Align::Left),
        ("BEFORE", Align::Right),
        ("ASKED", Align::Right),
        ("GOT", Align::Right),
        ("OUTCOME", Align::Left),
        ("TOOK MS", Align::Right),
        ("WHY", Align::Left),
    ];
    let mut table = Table::new(&columns);
    for decision in &list.decisions {
        table.row([
            decision.id.to_string(),
            when::show_seconds(decision.at_unix_ms),
            decision.name.clone(),
            decision.resource.name().to_owned(),
            decision.kind.clone(),
            amount(decision.resource, decision.before),
            amount(decision.resource, decision.asked),
            dash(decision.got.map(|got| amount(decision.resource, got)).as_deref()),
            match decision.outcome.as_str() {
                "not_acted" => format!("not acted ({})", decision.mode.name()),
                outcome => outcome.to_owned(),
            },
            dash(decision.took_ms.map(|took_ms| took_ms.to_string()).as_deref()),
            decision.why.clone(),
        ]);
    }
    let mut text = table.render();
    if let Some(next) = list.next {
        text.push_str(&format!("older ones: --before {next}\n"));
    }
    text
}

fn promised(reservation: &Reservation) -> String {
    let request = &reservation.request;
    let parts = [
        (request.vcpus, Resource::Cpu, " vCPUs"),
        (request.memory_bytes as f64, Resource::Memory, ""),
        (request.disk_bytes_per_s, Resource::Disk, " disk"),
        (request.network_bytes_per_s, Resource::Network, " network"),
    ];
    let parts = parts.into_iter().filter(|(value, ..)| *value > 0.0);
    parts.map(|(value, resource, unit)| amount(resource, value) + unit).collect::<Vec<_>>().join(", ")
}

pub(super) fn reserved(reservation: &Reservation) -> String {
    let request = &reservation.request;
    let (from, until) = (when::show(request.from_unix_ms), when::show(request.until_unix_ms));
    let (id, what, why) = (reservation.id, promised(reservation), printable(&reservation.why));
    let mut text = format!("reservation {id}: {what} from {from} to {until} UTC\n{why}\n");
    for note in &reservation.notes {
        text.push_str(&format!("{}\n", printable(note)));
    }
    text
}

pub(super) fn reservations(list: &ReservationList) -> String {
    if list.reservations.is_empty() {
        return "no reservations\n".to_owned();
    }
    let columns = [
        ("ID", Align::Right),
        ("FROM UTC", Align::Left),
        ("UNTIL UTC", Align::Left),
        ("MACHINE", Align::Left),
        ("STATE", Align::Left),
        ("PRIO", Align::Right),
        ("WHAT", Align::Left),
        ("NOTE", Align::Left),
    ];
    let mut table = Table::new(&columns);
    for reservation in &list.reservations {
        let request = &reservation.request;
        table.row([
            reservation.id.to_string(),
            when::show(request.from_unix_ms),
            when::show(request.until_unix_ms),
            dash(request.vm.as_deref()),
            reservation.state.clone(),
            request.priority.to_string(),
            promised(reservation),
            request.note.clone(),
        ]);
    }
    let mut text = table.render();
    for reservation in &list.reservations {
        for note in &reservation.notes {
            text.push_str(&format!("{}: {}\n", reservation.id, printable(note)));
        }
    }
    text
}

pub(super) fn execution_started(execution: &Execution) -> String {
    let known = match execution.known_runs {
        0 => "nothing is known of it yet".to_owned(),
        runs => format!("known from {}", count(runs.into(), "execution", "executions")),
    };
    let (program, vm) = (printable(&execution.start.program), printable(&execution.start.vm));
    format!("execution {}: {program} in {vm}, {known}\n", execution.id)
}

pub(super) fn execution_ended(execution: &Execution) -> String {
    let ended = execution.ended_unix_ms.unwrap_or(execution.started_unix_ms);
    let lasted = Duration::from_millis(ended.saturating_sub(execution.started_unix_ms));
    format!("execution {} ended after {}\n", execution.id, human_duration(lasted))
}

pub(super) fn executions(list: &ExecutionList, now_unix_ms: u64) -> String {
    if list.executions.is_empty() {
        return "no executions\n".to_owned();
    }
    let columns = [
        ("ID", Align::Right),
        ("MACHINE", Align::Left),
        ("PROGRAM", Align::Left),
        ("TAGS", Align::Left),
        ("INPUT", Align::Right),
        ("STARTED", Align::Left),
        ("KNOWN RUNS", Align::Right),
    ];
    let mut table = Table::new(&columns);
    for execution in &list.executions {
        let start = &execution.start;
        table.row([
            execution.id.to_string(),
            start.vm.clone(),
            start.program.clone(),
            start.tags.join(","),
            dash(start.input_bytes.map(human_bytes).as_deref()),
            ago(execution.started_unix_ms, now_unix_ms),
            execution.known_runs.to_string(),
        ]);
    }
    let mut text = table.render();
    if let Some(next) = list.next {
        text.push_str(&format!("more: --after {next}\n"));
    }
    text
}

pub(super) fn event_added(event: &Event) -> String {
    let next = event.next_unix_ms.map_or_else(|| "never again".to_owned(), |at| format!("{} UTC", when::show(at)));
    format!("event {}: {}, next {next}\n", event.id, printable(&event.request.name))
}

pub(super) fn events(list: &EventList) -> String {
    if list.events.is_empty() {
        return "no events\n".to_owned();
    }
    let columns = [
        ("ID", Align::Right),
        ("NEXT UTC", Align::Left),
        ("FOR", Align::Left),
        ("CRON", Align::Left),
        ("MACHINE", Align::Left),
        ("NAME", Align::Left),
    ];
    let mut table = Table::new(&columns);
    for event in &list.events {
        let request = &event.request;
        table.row([
            event.id.to_string(),
            dash(event.next_unix_ms.map(when::show).as_deref()),
            human_duration(Duration::from_secs(request.duration_s.unwrap_or(3600).into())),
            dash(request.cron.as_deref()),
            dash(request.vm.as_deref()),
            request.name.clone(),
        ]);
    }
    table.render()
}

fn range(resource: Resource, expected: &Quantiles) -> String {
    format!("{} to {}", amount(resource, expected.p05), amount(resource, expected.p95))
}

pub(super) fn demand(status: &DemandStatus, webhooks: &WebhookList, now_unix_ms: u64) -> String {
    let mut fields = Fields::default();
    if !status.enabled {
        let why = if status.notes.is_empty() { "off (demand.enabled in the configuration)" } else { "off" };
        fields.add("demand", why);
    } else {
        let machines = count(status.machines.into(), "machine", "machines");
        fields
            .add("demand", format!("{machines}, every {}", human_duration(Duration::from_millis(status.interval_ms))));
        let last = status.last_unix_ms.map_or_else(
            || "none yet".to_owned(),
            |at| format!("{}, took {:.1} ms", ago(at, now_unix_ms), status.last_took_us as f64 / 1000.0),
        );
        fields.add("last round", last).add("missed rounds", status.missed_rounds);
        let (memory, free) = (human_bytes(status.host_memory_bytes), human_bytes(status.host_available_bytes));
        fields.add("host", format!("{} CPUs, {memory} of memory, {free} available", status.host_cpus));
        let percent = |share: Option<f64>| dash(share.map(|share| format!("{:.1} %", 100.0 * share)).as_deref());
        let (cpu, memory) = (percent(status.host_cpu_pressure), percent(status.host_memory_pressure));
        fields.add("pressure", format!("cpu {cpu}, memory {memory} of the last 10 s"));
        fields.add("series", human_bytes(status.series_bytes));
    }
    for note in &status.notes {
        fields.add("note", note);
    }
    for webhook in &webhooks.webhooks {
        let error = webhook.last_error.as_ref().map_or_else(String::new, |error| format!(", last error: {error}"));
        let oldest = webhook.oldest_unix_ms.map_or_else(String::new, |at| format!(" since {}", ago(at, now_unix_ms)));
        let (waiting, dead) = (webhook.waiting, webhook.dead);
        fields.add("webhook", format!("{}: {waiting} waiting{oldest}, {dead} given up{error}", webhook.url));
    }
    let mut text = fields.render();
    for anomaly in &status.anomalies {
        let (name, evidence) = (printable(&anomaly.name), printable(&anomaly.evidence));
        let expected = range(anomaly.resource, &anomaly.expected);
        text.push_str(&format!(
            "UNUSUAL: {name} {} ({}) since {} UTC: {}, expected {expected}\n    {evidence}\n",
            anomaly.resource.name(),
            anomaly.kind,
            when::show(anomaly.since_unix_ms),
            amount(anomaly.resource, anomaly.measured),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_integration::api::demand::{Advice, Decision, LeftOut, ReservationRequest};

    #[test]
    fn advice_and_decisions_fit_in_lines_and_hide_no_escapes() {
        let advice_of = Advice {
            uuid: String::new(),
            name: "web\u{1b}[2J".into(),
            resource: Resource::Memory,
            mode: Mode::Recommend,
            kind: "raise".into(),
            now: (1u64 << 30) as f64,
            to: (2u64 << 30) as f64,
            used: None,
            peak: None,
            why: "peak above what it has".into(),
        };
        let left_out = vec![LeftOut { name: "db".into(), reason: "measured for 3 s".into() }];
        let text = advice(&AdviceList { recommendations: vec![advice_of], left_out });
        assert!(!text.contains('\u{1b}') && text.contains("1.0 GiB") && text.contains("2.0 GiB"), "{text}");
        assert!(text.ends_with("db is left out: measured for 3 s\n"), "{text}");
        assert_eq!(advice(&AdviceList::default()), "nothing to change\n");
        let decision = Decision {
            id: 9,
            at_unix_ms: 1_795_316_645_000,
            uuid: String::new(),
            name: "web".into(),
            resource: Resource::Cpu,
            mode: Mode::Observe,
            kind: "raise".into(),
            before: 1.0,
            asked: 2.0,
            got: None,
            outcome: "not_acted".into(),
            took_ms: None,
            why: "busy".into(),
        };
        let text = decisions(&DecisionList { decisions: vec![decision], next: Some(9) });
        assert!(text.contains("2026-11-22 03:04:05") && text.contains("not acted (observe)"), "{text}");
        assert!(text.ends_with("older ones: --before 9\n"), "{text}");
    }

    #[test]
    fn a_promise_names_only_what_it_holds() {
        let request = ReservationRequest { vcpus: 2.0, memory_bytes: 1 << 30, ..ReservationRequest::default() };
        let reservation = Reservation { id: 1, request, ..Reservation::default() };
        assert_eq!(promised(&reservation), "2.00 vCPUs, 1.0 GiB");
    }
}
