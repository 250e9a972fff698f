//! A trace's precision-hit curves as SVG: one panel a cache size, the peers as points, caching alone as lines.
//!
//! Drawn for light and dark pages (`prefers-color-scheme`), on the page's own ground. No text stands inside a panel, so that
//! nothing can overlap, whatever the figures are.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::ours::DEFAULT_THRESHOLD;
use super::row::{By, Row};
use super::{Options, sweep};
use crate::trace::Trace;

const WIDTH: f64 = 760.0;
/// Of a panel's plot.
const PLOT: (f64, f64) = (290.0, 200.0);
/// Left edges of the two columns of panels.
const COLUMNS: [f64; 2] = [70.0, 440.0];
const TOP: f64 = 120.0;
const ROW: f64 = 290.0;

const STYLE: &str = "\
text{font:12px system-ui,sans-serif;fill:#222}.title{font-size:15px;font-weight:600}
.axis{stroke:#777;fill:none}.grid{stroke:#ddd;fill:none}.curve{stroke:#0b62c4;stroke-width:2;fill:none}
.dot{fill:#0b62c4}.peer{stroke:#b3400f;stroke-width:2;fill:none}.none{stroke:#777;stroke-dasharray:2 3}
.opt{stroke:#1c7a3e;stroke-dasharray:7 4}
@media(prefers-color-scheme:dark){text{fill:#ddd}.axis,.none{stroke:#999}.grid{stroke:#444}
.curve{stroke:#6cb0ff}.dot{fill:#6cb0ff}.peer{stroke:#ff9d66}.opt{stroke:#6fd08c}}
";

/// Writes `predict-TRACE.svg` for every trace.
pub(super) fn write(
    folder: &Path,
    traces: &[Trace],
    rows: &[Row],
    swept: &[Row],
    options: &Options,
) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut paths = Vec::new();
    for trace in traces {
        let path = folder.join(format!("predict-{}.svg", trace.name));
        let text = draw(&trace.name, &options.sizes, rows, swept);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        paths.push(path);
    }
    Ok(paths)
}

fn draw(trace: &str, sizes: &[f64], rows: &[Row], swept: &[Row]) -> String {
    let height = TOP + ROW * sizes.len().div_ceil(2) as f64 - 35.0;
    let mut svg = String::new();
    // writing to a string cannot fail
    let _ = writeln!(svg, r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">"#);
    let trace_text = escaped(trace);
    let _ = writeln!(svg, "<title>{trace_text}: precision and hit ratio</title>\n<style>{STYLE}</style>");
    let _ = writeln!(svg, r#"<text class="title" x="20" y="28">{trace_text}: hit ratio against precision</text>"#);
    legend(&mut svg);
    for (index, &size) in sizes.iter().enumerate() {
        let origin = (COLUMNS[index % 2], TOP + ROW * (index / 2) as f64);
        panel(&mut svg, origin, trace, size, rows, swept);
    }
    svg + "</svg>\n"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Two lines of four entries above the panels.
fn legend(svg: &mut String) {
    let lines = [("curve", "prestage, swept"), ("opt", "opt (no prefetch)"), ("none", "none (LRU)")];
    let points = ["readahead", "leap", "markov", "markov+readahead"];
    let place = |index: usize| (20.0 + 185.0 * (index % 4) as f64, 50.0 + 22.0 * (index / 4) as f64);
    for (index, (class, text)) in lines.into_iter().enumerate() {
        let (x, y) = place(index);
        let _ = writeln!(
            svg,
            r#"<path class="{class}" d="M{x} {y}h18"/><text x="{}" y="{}">{text}</text>"#,
            x + 24.0,
            y + 4.0
        );
    }
    let (x, y) = place(3);
    let _ = writeln!(svg, r#"<circle class="dot" cx="{}" cy="{y}" r="5"/>"#, x + 9.0);
    let _ = writeln!(svg, r#"<text x="{}" y="{}">prestage, default</text>"#, x + 24.0, y + 4.0);
    for (index, name) in points.into_iter().enumerate() {
        let (x, y) = place(index + 4);
        mark(svg, name, (x + 9.0, y));
        let _ = writeln!(svg, r#"<text x="{}" y="{}">{name}</text>"#, x + 24.0, y + 4.0);
    }
}

/// A peer's point: a shape of its own, so that it is told apart without colour.
fn mark(svg: &mut String, peer: &str, (x, y): (f64, f64)) {
    let shape = match peer {
        "readahead" => "m-5 -5h10v10h-10z",
        "leap" => "m-6 4l6 -10l6 10z",
        "markov" => "m-5 -5l10 10m0 -10l-10 10",
        _ => "m-6 0l6 -6l6 6l-6 6z",
    };
    let _ = writeln!(svg, r#"<path class="peer" d="M{x:.1} {y:.1}{shape}"/>"#);
}

fn panel(svg: &mut String, (left, top): (f64, f64), trace: &str, size: f64, rows: &[Row], swept: &[Row]) {
    let (width, height) = PLOT;
    let curve = sweep::curve(swept, trace, size);
    let peers = sweep::peers(rows, trace, size);
    let optimum = rows.iter().find(|row| {
        row.by == By::Peers
            && row.policy == "opt"
            && row.trace == trace
            && row.cache == size
            && row.latency_us.is_none()
    });
    let shown = curve.iter().chain(&peers).copied().chain(optimum);
    let most = shown.map(|row| row.read_hit_ratio).fold(0.05, f64::max);
    let tick = if most > 0.5 { 0.2 } else { 0.1 };
    let ticks = (most / tick + 0.1).ceil().min(1.0 / tick);
    let most = tick * ticks;
    let at = |precision: f64, hit: f64| (left + width * precision, top + height * (1.0 - hit / most));

    let _ = writeln!(svg, r#"<text x="{left}" y="{}">cache of {} % of the pages</text>"#, top - 10.0, size * 100.0);
    for step in 0..=5 {
        let precision = f64::from(step) / 5.0;
        let (x, below) = (at(precision, 0.0).0, top + height + 18.0);
        let _ = writeln!(svg, r#"<path class="grid" d="M{x:.1} {top}v{height}"/>"#);
        let _ = writeln!(svg, r#"<text x="{x:.1}" y="{below}" text-anchor="middle">{precision:.1}</text>"#);
    }
    for step in 0..=ticks as u32 {
        let hit = tick * f64::from(step);
        let (y, before) = (at(0.0, hit).1, left - 8.0);
        let _ = writeln!(svg, r#"<path class="grid" d="M{left} {y:.1}h{width}"/>"#);
        let _ = writeln!(svg, r#"<text x="{before}" y="{:.1}" text-anchor="end">{hit:.1}</text>"#, y + 4.0);
    }
    let _ = writeln!(svg, r#"<path class="axis" d="M{left} {top}v{height}h{width}"/>"#);
    let (middle, below) = (left + width / 2.0, top + height + 36.0);
    let _ = writeln!(svg, r#"<text x="{middle}" y="{below}" text-anchor="middle">precision</text>"#);
    let (x, y) = (left - 50.0, top + height / 2.0);
    let _ = writeln!(
        svg,
        r#"<text x="{x}" y="{y}" text-anchor="middle" transform="rotate(-90 {x} {y})">read hit ratio</text>"#
    );

    let caching = peers.iter().find(|row| row.policy == "none").copied().map(|row| ("none", row));
    for (class, row) in caching.into_iter().chain(optimum.map(|row| ("opt", row))) {
        let _ = writeln!(svg, r#"<path class="{class}" d="M{left} {:.1}h{width}"/>"#, at(0.0, row.read_hit_ratio).1);
    }
    let points: Vec<String> = curve
        .iter()
        .filter(|row| row.prefetched_pages > 0)
        .map(|row| at(row.precision, row.read_hit_ratio))
        .map(|(x, y)| format!("{x:.1} {y:.1}"))
        .collect();
    if !points.is_empty() {
        let _ = writeln!(svg, r#"<path class="curve" d="M{}"/>"#, points.join("L"));
    }
    for row in curve.iter().filter(|row| row.prefetched_pages > 0) {
        let (x, y) = at(row.precision, row.read_hit_ratio);
        let radius = if row.threshold == Some(DEFAULT_THRESHOLD) { 5.0 } else { 2.5 };
        let _ = writeln!(svg, r#"<circle class="dot" cx="{x:.1}" cy="{y:.1}" r="{radius}"/>"#);
    }
    for row in peers.iter().filter(|row| row.prefetched_pages > 0) {
        mark(svg, &row.policy, at(row.precision, row.read_hit_ratio));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_well_formed_and_everything_lies_on_it() {
        let row = |by, policy: &str, precision, hit| Row {
            trace: "a<b&c".to_owned(),
            policy: policy.to_owned(),
            by,
            cache: 0.05,
            precision,
            read_hit_ratio: hit,
            prefetched_pages: 1,
            threshold: Some(precision),
            ..Row::default()
        };
        let rows =
            [row(By::Peers, "leap", 1.0, 1.0), row(By::Peers, "none", 0.0, 0.0), row(By::Peers, "opt", 0.0, 0.3)];
        let swept = [row(By::Prestage, "prestage", 0.0, 0.9), row(By::Prestage, "prestage", 0.5, 0.0)];
        let text = draw("a<b&c", &[0.05, 0.1, 0.2], &rows, &swept);
        let document = roxmltree::Document::parse(&text).unwrap();
        let bounds: Vec<f64> =
            document.root_element().attribute("viewBox").unwrap().split(' ').flat_map(str::parse).collect();
        for node in document.descendants() {
            for (name, most) in [("x", bounds[2]), ("cx", bounds[2]), ("y", bounds[3]), ("cy", bounds[3])] {
                let value = node.attribute(name).map(|value| value.parse::<f64>().unwrap());
                assert!(value.is_none_or(|value| (10.0..most - 5.0).contains(&value)), "{name} of {node:?}");
            }
        }
        let dots = document.descendants().filter(|node| node.attribute("class") == Some("dot")).count();
        assert_eq!(dots, 1 + swept.len());
    }
}
