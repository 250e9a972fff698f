//! The outcome as text.

use crate::cli::render::count;
use crate::cli::table::{Align, Table};
use crate::config::units::human_bytes;
use crate::simulate::{Between, CRITERIA, MemoryBy, Report};
use std::fmt::Write;

const LEGEND: &str = "\
VIOL CPU MEM  minutes a machine-day in which demand exceeded what was there: either, each
CORE-H GIB-H  allocated and not used, of what the host has
CHG/H         changes a machine-hour
OOM           times that demand for memory exceeded what was given by over a tenth for 10 s: without swap, an OOM kill
SHORT         of these, while all machines together wanted more memory than the host has
FAR           of the others, those that lacked more from the start than can come within 10 s
HIGH LOW      VIOL of the machines of the highest and of the lowest of three priorities
";

pub(super) fn report(report: &Report) -> String {
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let mut text = format!(
        "{}, {:.1} days after {:.1} days of training; provisioned: {:.0} cores, {}\n\
         host: {:.0} cores, {}; all together want more {} of the time (cpu), {} (memory)\n\
         demand {} between samples; memory by {}; forecasts {}\n\n",
        count(report.vms as u64, "machine", "machines"),
        report.days,
        report.train_days,
        report.provisioned_cores,
        human_bytes(report.provisioned_memory_bytes as u64),
        report.host_cores,
        human_bytes(report.host_memory_bytes as u64),
        percent(report.cpu_short_share),
        percent(report.memory_short_share),
        match report.between {
            Between::Held => "held",
            Between::Linear => "in a straight line",
        },
        match report.memory_by {
            MemoryBy::Balloon => "balloon",
            MemoryBy::VirtioMem => "virtio-mem",
        },
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
        right("SHORT"),
        right("FAR"),
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
            s.oom_like_host_short.to_string(),
            s.oom_like_out_of_reach.to_string(),
            format!("{:.2}", row.high_priority_violation_min),
            format!("{:.2}", row.low_priority_violation_min),
        ]);
    }
    text.push_str(&table.render());
    text.push('\n');
    text.push_str(LEGEND);
    text.push('\n');
    for peer in report.rows.iter().filter(|row| !row.ours) {
        let verdicts: Vec<String> = report
            .rows
            .iter()
            .filter(|row| row.ours)
            .map(|row| format!("{}: {}", row.policy.trim_start_matches("prestage, "), verdict(row.better(peer))))
            .collect();
        // Text cannot fail to be written to.
        let _ = writeln!(text, "against {}, better in: {}", peer.policy, verdicts.join("; "));
    }
    for note in &report.notes {
        let _ = writeln!(text, "{note}");
    }
    text
}

/// In what one is better, and in what not.
fn verdict(better: [bool; 6]) -> String {
    let names = |wanted: bool| {
        let some: Vec<&str> =
            CRITERIA.iter().zip(better).filter(|(_, is)| *is == wanted).map(|(name, _)| *name).collect();
        some.join(" ")
    };
    match better.iter().filter(|is| **is).count() {
        6 => "all".to_owned(),
        0 => "nothing".to_owned(),
        4 | 5 => format!("all but {}", names(false)),
        _ => names(true),
    }
}

#[cfg(test)]
mod tests {
    use super::verdict;

    #[test]
    fn verdicts_name_what_is_better() {
        assert_eq!(verdict([true; 6]), "all");
        assert_eq!(verdict([false; 6]), "nothing");
        assert_eq!(verdict([true, true, true, true, true, false]), "all but OOM");
        assert_eq!(verdict([false, true, false, true, true, false]), "CPU CORE-H GIB-H");
    }
}
