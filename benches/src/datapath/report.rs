//! Rows, medians of the rounds: as a table and as JSON.

use serde::Serialize;

use super::servers::Who;
use super::verdict::Claim;
use crate::host::Host;
use crate::table::median;

/// One round of a case with a server.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Sample {
    pub(super) iops: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    /// All threads of the server.
    pub(super) cpu_us_per_request: f64,
    /// Of this project's daemon: share of the reads that RAM served alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) ram_share: Option<f64>,
}

/// A case with a server: the median of each figure by itself.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) case: &'static str,
    pub(super) who: Who,
    pub(super) server: &'static str,
    pub(super) iops: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) cpu_us_per_request: f64,
    /// The least of the rounds.
    pub(super) ram_share: Option<f64>,
    pub(super) block_bytes: usize,
    pub(super) rounds: Vec<Sample>,
}

/// A figure that is no row of the table.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figure {
    pub(super) name: String,
    pub(super) value: f64,
    pub(super) unit: &'static str,
}

/// A case that a server cannot be measured in.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Missing {
    pub(super) case: &'static str,
    pub(super) server: &'static str,
    pub(super) why: &'static str,
}

/// A whole run, as written to `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    pub(super) rows: Vec<Row>,
    pub(super) missing: Vec<Missing>,
    pub(super) figures: Vec<Figure>,
    pub(super) claims: Vec<Claim>,
}

impl Row {
    /// Of at least one round.
    pub(super) fn new(case: &'static str, who: Who, block_bytes: usize, rounds: Vec<Sample>) -> Self {
        let of = |figure: fn(&Sample) -> f64| median(rounds.iter().map(figure));
        Self {
            case,
            who,
            server: who.name(),
            iops: of(|sample| sample.iops),
            p50_us: of(|sample| sample.p50_us),
            p99_us: of(|sample| sample.p99_us),
            cpu_us_per_request: of(|sample| sample.cpu_us_per_request),
            ram_share: rounds.iter().filter_map(|sample| sample.ram_share).min_by(f64::total_cmp),
            block_bytes,
            rounds,
        }
    }

    fn cells(&self) -> [String; 8] {
        #[allow(clippy::cast_precision_loss)] // a block of at most 128 KiB
        let rate = self.iops * self.block_bytes as f64 / 1e6;
        [
            self.case.to_owned(),
            self.server.to_owned(),
            format!("{:.0}", self.iops),
            format!("{rate:.0}"),
            format!("{:.1}", self.p50_us),
            format!("{:.1}", self.p99_us),
            format!("{:.2}", self.cpu_us_per_request),
            self.ram_share.map_or_else(|| "-".to_owned(), |share| format!("{:.2} %", share * 100.0)),
        ]
    }
}

const HEAD: [&str; 8] = ["case", "server", "iops", "MB/s", "p50 us", "p99 us", "cpu us/request", "from RAM"];

/// The table, the first two columns to the left and the others to the right.
fn aligned(rows: &[[String; 8]]) -> String {
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            match column {
                0 => text += &format!("{cell:<width$}"),
                1 => text += &format!("  {cell:<width$}"),
                _ => text += &format!("  {cell:>width$}"),
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

pub(super) fn render(report: &Report) -> String {
    let host = &report.host;
    let mut rows = vec![HEAD.map(str::to_owned)];
    rows.extend(report.rows.iter().map(Row::cells));
    for Missing { case, server, why } in &report.missing {
        let mut cells = [(); 8].map(|()| "-".to_owned());
        (cells[0], cells[1], cells[2]) = ((*case).to_owned(), (*server).to_owned(), (*why).to_owned());
        rows.push(cells);
    }
    let mut text = format!(
        "{}, {} cores, {} MB; Linux {}; {}\n{} rounds of {} s, interleaved; medians. Server and client have a core each.\n\n{}",
        host.cpu,
        host.cores,
        host.memory_bytes / 1_000_000,
        host.kernel,
        host.qemu,
        report.rounds,
        report.seconds,
        aligned(&rows)
    );
    if !report.figures.is_empty() {
        text.push('\n');
    }
    for Figure { name, value, unit } in &report.figures {
        let digits = if *value >= 100.0 { 0 } else { 2 };
        text += &format!("{name}: {value:.digits$} {unit}\n");
    }
    text
}
