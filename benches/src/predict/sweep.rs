//! The threshold swept: how hit ratio and precision trade, and whether the curve passes above every peer's point.

use anyhow::Result;

use super::ours::{self, DEFAULT_THRESHOLD, Policy, Setup};
use super::row::{By, Row};
use super::tables::{aligned, share};
use super::verdict::Claim;
use super::{Options, pool};
use crate::trace::Trace;

/// Closer together at the ends, where the curve turns; the default among them.
pub(super) const THRESHOLDS: [f64; 16] =
    [0.02, 0.05, 0.1, DEFAULT_THRESHOLD, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98];

/// Rows of the whole predictor at every threshold, by trace and size.
pub(super) fn run(traces: &[Trace], options: &Options) -> Result<Vec<Row>> {
    let mut jobs = Vec::new();
    for trace in traces {
        for &share in &options.sizes {
            jobs.extend(THRESHOLDS.map(|threshold| (trace, share, threshold)));
        }
    }
    pool::each(&jobs, |&(trace, share, threshold)| {
        let setup = Setup { threshold, ..Setup::new(Policy::Prestage, trace.capacity(share)) };
        Ok(Row::ours(trace, share, &setup, &ours::replay(trace, &setup)?))
    })
}

/// The rows of one curve.
pub(super) fn curve<'a>(rows: &'a [Row], trace: &str, share: f64) -> Vec<&'a Row> {
    rows.iter().filter(|row| row.trace == trace && row.cache == share).collect()
}

/// The peers' rows at one place, the optimum aside.
pub(super) fn peers<'a>(rows: &'a [Row], trace: &str, share: f64) -> Vec<&'a Row> {
    let untimed = |row: &&Row| row.by == By::Peers && row.policy != "opt" && row.latency_us.is_none();
    rows.iter().filter(untimed).filter(|row| row.trace == trace && row.cache == share).collect()
}

/// The best hit ratio of the curve at a precision of at least `precision`: at a swept threshold, or where the line between
/// two neighbours passes. `None` where the curve never is that precise.
pub(super) fn hit_at(curve: &[&Row], precision: f64) -> Option<f64> {
    let swept = curve.iter().filter(|row| row.precision >= precision).map(|row| row.read_hit_ratio);
    // Where nothing is prefetched there is no precision, and no line to such a point.
    let precise: Vec<&Row> = curve.iter().copied().filter(|row| row.prefetched_pages > 0).collect();
    let between = precise.windows(2).filter_map(|pair| {
        let (a, b) = (pair[0], pair[1]);
        let crosses = (a.precision - precision) * (b.precision - precision) < 0.0;
        let part = (precision - a.precision) / (b.precision - a.precision);
        crosses.then_some(a.read_hit_ratio + part * (b.read_hit_ratio - a.read_hit_ratio))
    });
    swept.chain(between).max_by(f64::total_cmp)
}

/// By how much the curve passes above each peer's point.
pub(super) fn claim(swept: &[Row], rows: &[Row], traces: &[Trace], sizes: &[f64]) -> Claim {
    let mut checks = Vec::new();
    for trace in traces {
        for &size in sizes {
            let curve = curve(swept, &trace.name, size);
            for peer in peers(rows, &trace.name, size) {
                let hit = hit_at(&curve, if peer.prefetched_pages > 0 { peer.precision } else { 0.0 });
                let fails = hit.is_none_or(|hit| hit <= peer.read_hit_ratio);
                let place = format!("{} at {} %", trace.name, size * 100.0);
                let (name, precision) = (peer.label(), share(Some(peer.precision)));
                let (hit, theirs) = (share(hit), share(Some(peer.read_hit_ratio)));
                checks.push(fails.then(|| format!("{place}, precision {precision}: hit {hit}, {name} {theirs}")));
            }
        }
    }
    Claim::new("Precision-hit curve above every peer's point", checks)
}

/// A trace's curves as a table: a line a threshold, hit and precision by size.
pub(super) fn table(swept: &[Row], trace: &Trace, options: &Options) -> String {
    let mut head = vec!["threshold".to_owned()];
    for size in &options.sizes {
        head.extend([format!("{} % hit", size * 100.0), "prec".to_owned()]);
    }
    let mut lines = vec![head];
    for threshold in THRESHOLDS {
        let mut cells = vec![share(Some(threshold))];
        for &size in &options.sizes {
            let row = curve(swept, &trace.name, size).into_iter().find(|row| row.threshold == Some(threshold));
            cells.push(share(row.map(|row| row.read_hit_ratio)));
            cells.push(share(row.filter(|row| row.prefetched_pages > 0).map(|row| row.precision)));
        }
        lines.push(cells);
    }
    format!("\n{}, threshold swept\n{}", trace.name, aligned(&lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_is_read_between_its_points() {
        let point =
            |precision, read_hit_ratio| Row { precision, read_hit_ratio, prefetched_pages: 1, ..Row::default() };
        let points = [point(0.2, 0.9), point(0.4, 0.7), point(0.8, 0.3)];
        let curve: Vec<&Row> = points.iter().collect();
        let near = |precision, expected: f64| (hit_at(&curve, precision).unwrap() - expected).abs() < 1e-9;
        assert!(near(0.0, 0.9) && near(0.3, 0.8) && near(0.4, 0.7) && near(0.6, 0.5) && near(0.8, 0.3));
        assert_eq!(hit_at(&curve, 0.81), None);
    }

    #[test]
    fn a_point_above_the_curve_is_named() {
        let trace = Trace::new("t", Vec::new());
        let row = |by, policy: &str, precision, read_hit_ratio| {
            let (trace, policy) = (trace.name.clone(), policy.to_owned());
            Row { trace, policy, by, cache: 0.05, precision, read_hit_ratio, prefetched_pages: 1, ..Row::default() }
        };
        let swept = [row(By::Prestage, "prestage", 0.2, 0.9), row(By::Prestage, "prestage", 0.8, 0.3)];
        let without = Row { prefetched_pages: 0, ..row(By::Peers, "none", 0.0, 0.8) };
        let peers = [
            without,
            row(By::Peers, "readahead", 0.5, 0.5),
            row(By::Peers, "leap", 0.5, 0.7),
            row(By::Peers, "markov", 0.9, 0.1),
            row(By::Peers, "opt", 0.0, 1.0),
            Row { latency_us: Some(1e3), ..row(By::Peers, "leap", 0.5, 0.8) },
        ];
        let claim = claim(&swept, &peers, &[trace], &[0.05]);
        assert!(!claim.holds && claim.checked == 4, "{claim:?}");
        let places = ["t at 5 %, precision .500: hit .600, leap .700", "t at 5 %, precision .900: hit -, markov .100"];
        assert_eq!(claim.fails, places);
    }
}
