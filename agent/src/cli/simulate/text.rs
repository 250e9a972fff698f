//! The outcome as text.

use crate::cli::render::count;
use crate::cli::table::{Align, Table};
use crate::config::units::human_bytes;
use crate::simulate::Report;
use std::fmt::Write;

const LEGEND: &str = "\
VIOL CPU MEM  minutes a machine-day in which demand exceeded what was there: either, each
CORE-H GIB-H  allocated and not used, of what the host has
CHG/H         changes a machine-hour
OOM           times that demand for memory exceeded what was given by over a tenth for 10 s: without swap, an OOM kill
HIGH LOW      VIOL of the machines of the highest and of the lowest of three priorities
";

pub(super) fn report(report: &Report) -> String {
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let mut text = format!(
        "{}, {:.1} days after {:.1} days of training; provisioned: {:.0} cores, {}\n\
         host: {:.0} cores, {}; all together want more {} of the time (cpu), {} (memory)\n\
         demand held between samples; forecasts: {}\n\n",
        count(report.vms as u64, "machine", "machines"),
        report.days,
        report.train_days,
        report.provisioned_cores,
        human_bytes(report.provisioned_memory_bytes as u64),
        report.host_cores,
        human_bytes(report.host_memory_bytes as u64),
        percent(report.cpu_short_share),
        percent(report.memory_short_share),
        report.forecasts
    );
    let right = |name| (name, Align::Right);
    let mut table = Table::new(&[
        ("POLICY", Align::Left),
        right("VIOL"),
        right("CPU"),
        right("MEM"),
        right("CORE-H"),
        right("GIB-H"),
        right("CHG/H"),
        right("OOM"),
        right("HIGH"),
        right("LOW"),
    ]);
    for row in &report.rows {
        let s = &row.score;
        table.row([
            row.policy.clone(),
            format!("{:.2}", s.violation_min),
            format!("{:.2}", s.cpu_violation_min),
            format!("{:.2}", s.memory_violation_min),
            format!("{:.0}", s.core_hours_unused),
            format!("{:.0}", s.gib_hours_unused),
            format!("{:.2}", s.changes_per_vm_hour),
            s.oom_like.to_string(),
            format!("{:.2}", row.high_priority_violation_min),
            format!("{:.2}", row.low_priority_violation_min),
        ]);
    }
    text.push_str(&table.render());
    text.push('\n');
    text.push_str(LEGEND);
    text.push('\n');
    for peer in report.rows.iter().filter(|row| !row.ours) {
        let better: Vec<&str> =
            report.rows.iter().filter(|row| row.ours && row.beats(peer)).map(|row| row.policy.as_str()).collect();
        let verdict = match better.as_slice() {
            [] => "no run is better in all five (VIOL, CPU, MEM, CORE-H, GIB-H)".to_owned(),
            some => format!("better in all five: {}", some.join("; ")),
        };
        // Text cannot fail to be written to.
        let _ = writeln!(text, "against {}: {verdict}", peer.policy);
    }
    for note in &report.notes {
        let _ = writeln!(text, "{note}");
    }
    text
}
