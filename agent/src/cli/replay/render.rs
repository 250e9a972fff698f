//! Reports as text.

use super::Replayed;
use super::args::ReplayArgs;
use crate::cli::render::count;
use crate::cli::table::{Align, Table};
use crate::config::units::human_bytes;
use prestage_predictor::PAGE_BYTES;
use prestage_replay::Report;
use prestage_replay::report::ratio;

const NAME_WIDTH: usize = 20;

/// A table of hits, one of costs, and one of phases where there are marks.
pub(super) fn reports(args: &ReplayArgs, replayed: &[Replayed]) -> String {
    let Some(first) = replayed.first() else { return String::new() };
    let mut text = conditions(args, &first.report);
    text.push_str(&hits(replayed));
    text.push('\n');
    text.push_str(&costs(replayed));
    for Replayed { report, .. } in replayed.iter().filter(|one| !one.report.phases.is_empty()) {
        text.push('\n');
        text.push_str(&phases(report));
    }
    for Replayed { report, skipped_rows, clamped_rows, .. } in replayed {
        let name = short(&report.trace, NAME_WIDTH);
        if *skipped_rows > 0 {
            text.push_str(&format!("\n{name}: {} left out\n", count(*skipped_rows, "bad row", "bad rows")));
        }
        if *clamped_rows > 0 {
            let requests = count(*clamped_rows, "request", "requests");
            text.push_str(&format!(
                "\n{name}: {requests} out of order in time, taken as simultaneous\nwith the one before\n"
            ));
        }
    }
    text
}

fn conditions(args: &ReplayArgs, report: &Report) -> String {
    let threshold = report.threshold.map_or(String::new(), |threshold| format!(" at p >= {threshold}"));
    let store = args
        .device()
        .map_or("none, all at once".to_owned(), |device| format!("{} us, {} MB/s", device.latency_us, device.mbps));
    let (policy, eviction, block) = (&report.policy, &report.eviction, human_bytes(report.block_bytes));
    format!("policy {policy}{threshold}, {eviction}, {block} blocks, store: {store}\n\n")
}

fn hits(replayed: &[Replayed]) -> String {
    let mut table = Table::new(&[
        ("TRACE", Align::Left),
        ("CACHE", Align::Right),
        ("READS", Align::Right),
        ("HIT %", Align::Right),
        ("PAGE %", Align::Right),
        ("COVER %", Align::Right),
        ("PREC %", Align::Right),
        ("LATE %", Align::Right),
    ]);
    for Replayed { report, .. } in replayed {
        table.row([
            short(&report.trace, NAME_WIDTH),
            human_bytes(report.capacity_pages * PAGE_BYTES),
            report.reads.to_string(),
            percent(report.read_hit_ratio),
            percent(report.page_hit_ratio),
            of_prefetch(report, report.coverage),
            of_prefetch(report, report.precision),
            of_prefetch(report, ratio(report.late_pages, report.useful_pages)),
        ]);
    }
    table.render()
}

fn costs(replayed: &[Replayed]) -> String {
    let timed = replayed.iter().any(|one| one.report.read_latency_us.is_some());
    let measured = replayed.iter().any(|one| one.report.cost.predictor_ns_per_access.is_some());
    let mut columns = vec![
        ("TRACE", Align::Left),
        ("DEMAND", Align::Right),
        ("AHEAD", Align::Right),
        ("UNUSED", Align::Right),
        ("ECE", Align::Right),
    ];
    if timed {
        columns.extend([("MEAN US", Align::Right), ("P99 US", Align::Right)]);
    }
    if measured {
        columns.push(("NS/REQ", Align::Right));
    }
    let mut table = Table::new(&columns);
    for Replayed { report, .. } in replayed {
        let bytes = |pages: u64| human_bytes(pages * PAGE_BYTES);
        let mut row = vec![
            short(&report.trace, NAME_WIDTH),
            bytes(report.demand_pages),
            bytes(report.prefetched_pages),
            bytes(report.evicted_unused),
            report.ece.map_or("-".to_owned(), |ece| format!("{ece:.3}")),
        ];
        if let Some(latency) = report.read_latency_us {
            row.extend([latency.mean, latency.p99].map(|us| format!("{us:.0}")));
        }
        row.extend(report.cost.predictor_ns_per_access.map(|ns| format!("{ns:.0}")));
        table.row(row);
    }
    table.render()
}

fn phases(report: &Report) -> String {
    let mut table = Table::new(&[
        ("PHASE", Align::Left),
        ("FROM S", Align::Right),
        ("READS", Align::Right),
        ("HIT %", Align::Right),
        ("AHEAD", Align::Right),
        ("PREC %", Align::Right),
        ("LATE", Align::Right),
    ]);
    for phase in &report.phases {
        let precision = if phase.prefetched_pages == 0 { "-".to_owned() } else { percent(phase.precision) };
        table.row([
            short(&phase.name, NAME_WIDTH),
            format!("{:.1}", phase.start_us as f64 / 1e6),
            phase.reads.to_string(),
            percent(phase.read_hit_ratio),
            human_bytes(phase.prefetched_pages * PAGE_BYTES),
            precision,
            human_bytes(phase.late_pages * PAGE_BYTES),
        ]);
    }
    format!("{}, from mark to mark:\n{}", short(&report.trace, 40), table.render())
}

fn percent(ratio: f64) -> String {
    format!("{:.1}", ratio * 100.0)
}

/// Nothing was prefetched: there is no share of it.
fn of_prefetch(report: &Report, ratio: f64) -> String {
    if report.prefetched_pages == 0 { "-".to_owned() } else { percent(ratio) }
}

/// A name cut to `width` characters; its end tells more than its middle.
pub(super) fn short(name: &str, width: usize) -> String {
    let count = name.chars().count();
    if count <= width {
        return name.to_owned();
    }
    let head: String = name.chars().take(width / 2).collect();
    let tail: String = name.chars().skip(count - (width - width / 2 - 1)).collect();
    format!("{head}…{tail}")
}
