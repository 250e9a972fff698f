//! The figures as text, no line longer than 80 characters.

use super::row::Row;
use crate::trace::Trace;

/// One column: its head and what a row shows in it.
type Column = (&'static str, fn(&Row) -> String);

const UNTIMED: [Column; 7] = [
    ("hit", |row| share(Some(row.read_hit_ratio))),
    ("page", |row| share(Some(row.page_hit_ratio))),
    ("prec", |row| share((row.prefetched_pages > 0).then_some(row.precision))),
    ("cover", |row| share((row.prefetched_pages > 0).then_some(row.coverage))),
    ("waste", |row| share(row.wasted())),
    ("demand", |row| row.demand_pages.to_string()),
    ("store", |row| row.store_pages.to_string()),
];

/// Of the methods that state probabilities.
const CALIBRATION: [Column; 4] = [
    ("ECE issued", |row| fraction(row.ece)),
    ("ECE all", |row| fraction(row.ece_all)),
    ("Brier issued", |row| fraction(row.brier)),
    ("Brier all", |row| fraction(row.brier_all)),
];

/// What the columns mean, once below all tables.
pub(super) const LEGEND: &str = "\
hit: read requests with all pages cached; page: the same by page. Of the pages
prefetched, prec: used, waste: evicted unused. cover: share of the pages fetched
for use that came by prefetch. demand, store: 4 KiB pages the guest waited for,
and all that left the store. mean, p99: read latency in us with that store.
time: used prefetches that were there in time. ns: the method alone, an access.
lcs: libcachesim. our: the policy core and predictor of this project.
ECE: expected calibration error, 20 bins; Brier: mean squared error. issued: of
each page prefetched, its probability against whether it was used before it left
the cache. all: of each prediction, issued or not, against whether it was read
within its window (a fifth of the cache's pages in reads, 64 to 2048).
";

/// With four places: a calibration error is small.
fn fraction(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".to_owned() };
    let text = format!("{value:.4}");
    text.strip_prefix("0.").map_or(text.clone(), |fraction| format!(".{fraction}"))
}

/// A ratio without its leading zero; `-` where there is none.
pub(super) fn share(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".to_owned() };
    let text = format!("{value:.3}");
    text.strip_prefix("0.").map_or(text.clone(), |fraction| format!(".{fraction}"))
}

/// A column's cells to the right, the first column's to the left.
pub(super) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            line += &if column == 0 { format!("{cell:<width$}") } else { format!(" {cell:>width$}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// How well probabilities were kept on a trace, at every size; nothing where none was stated.
pub(super) fn calibration(trace: &Trace, sizes: &[f64], rows: &[Row]) -> String {
    let head = ["", "cache"].into_iter().chain(CALIBRATION.map(|(head, _)| head));
    let mut table: Vec<Vec<String>> = vec![head.map(str::to_owned).collect()];
    let untimed = |row: &&Row| row.trace == trace.name && row.latency_us.is_none();
    for size in sizes {
        let stated = |row: &&Row| row.cache == *size && (row.ece.is_some() || row.ece_all.is_some());
        for row in rows.iter().filter(untimed).filter(stated) {
            let cells = CALIBRATION.map(|(_, cell)| cell(row));
            table.push([row.label(), format!("{} %", size * 100.0)].into_iter().chain(cells).collect());
        }
    }
    if table.len() == 1 {
        return String::new();
    }
    format!("\n{}, calibration\n{}", trace.name, aligned(&table))
}

/// Both tables of a trace at one size: what was hit, and how long reads took.
pub(super) fn size(trace: &Trace, share_of_pages: f64, rows: &[Row]) -> String {
    let here = |row: &&Row| row.trace == trace.name && row.cache == share_of_pages;
    let mut text = String::new();
    let mut table = vec![[String::new()].into_iter().chain(UNTIMED.map(|(head, _)| head.to_owned())).collect()];
    for row in rows.iter().filter(here).filter(|row| row.latency_us.is_none()) {
        table.push([row.label()].into_iter().chain(UNTIMED.map(|(_, cell)| cell(row))).collect());
    }
    text += &format!(
        "\n{}, {} requests, cache of {} % ({} pages)\n{}",
        trace.name,
        trace.requests.len(),
        share_of_pages * 100.0,
        trace.capacity(share_of_pages),
        aligned(&table)
    );

    let mut latencies: Vec<f64> = rows.iter().filter(here).filter_map(|row| row.latency_us).collect();
    latencies.sort_by(f64::total_cmp);
    latencies.dedup();
    if latencies.is_empty() {
        return text;
    }
    let mut head = vec![String::new()];
    for latency_us in &latencies {
        head.extend([format!("{}ms mean", latency_us / 1e3), "p99".to_owned(), "time".to_owned()]);
    }
    head.push("ns".to_owned());
    let mut table = vec![head];
    for row in rows.iter().filter(here).filter(|row| row.latency_us == latencies.first().copied()) {
        let mut cells = vec![row.label()];
        for latency_us in &latencies {
            let timed = rows.iter().filter(here).find(|other| {
                other.latency_us == Some(*latency_us) && other.policy == row.policy && other.by == row.by
            });
            let us = |of: fn(&crate::peers::Latency) -> f64| {
                let latency = timed.and_then(|row| row.read_latency_us);
                latency.map_or("-".to_owned(), |latency| format!("{:.0}", of(&latency)))
            };
            cells.extend([us(|latency| latency.mean), us(|latency| latency.p99)]);
            cells.push(share(timed.and_then(|row| row.timeliness)));
        }
        cells.push(row.ns_per_access.map_or("-".to_owned(), |ns| format!("{ns:.0}")));
        table.push(cells);
    }
    text + &aligned(&table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::Latency;
    use crate::predict::row::By;
    use crate::trace::Request;

    #[test]
    fn no_line_is_longer_than_a_terminal() {
        let requests = vec![Request { at_us: 0, read: true, first: 0, last: 0 }];
        let trace = Trace::new("cloudphysics_cpio", requests);
        let row = |by, policy: &str, latency_us: Option<f64>| Row {
            trace: trace.name.clone(),
            policy: policy.to_owned(),
            by,
            cache: 0.05,
            read_hit_ratio: 1.0,
            precision: 1.0,
            prefetched_pages: 1,
            demand_pages: 1_234_567,
            store_pages: 12_345_678,
            ece: Some(0.5),
            brier: Some(0.5),
            ece_all: Some(0.01),
            latency_us,
            read_latency_us: latency_us.map(|us| Latency { mean: us, p50: us, p99: 22_352_585.0 }),
            timeliness: latency_us.map(|_| 1.0),
            ns_per_access: Some(12_345.0),
            ..Row::default()
        };
        let stores = [None, Some(1000.0), Some(5000.0)];
        let rows: Vec<Row> = [(By::Peers, "markov+readahead"), (By::Libcachesim, "s3-fifo")]
            .into_iter()
            .flat_map(|(by, policy)| stores.map(|latency_us| row(by, policy, latency_us)))
            .collect();
        let text = size(&trace, 0.05, &rows) + &calibration(&trace, &[0.05], &rows) + LEGEND;
        assert!(text.contains("1ms mean") && text.contains("lcs s3-fifo") && text.contains("ECE all"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}
