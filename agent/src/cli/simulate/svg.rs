//! The outcome as two charts: violations over what is allocated and not used, of CPU and of memory.
//!
//! Both axes are logarithmic: contestants differ by orders of magnitude. Lower left is better. Colours follow the
//! page's scheme; the planner's runs are joined by a line and filled, the others hollow, so that no colour is needed to
//! tell them apart.

use crate::simulate::{Report, Row};
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 520.0;
const TOP: f64 = 78.0;
const BOTTOM: f64 = 70.0;
const LEFT: f64 = 64.0;
const GAP: f64 = 76.0;
/// Least minutes a day that are told from none.
const LEAST: f64 = 0.05;

struct Panel<'a> {
    title: &'a str,
    unit: &'a str,
    at: f64,
    point: fn(&Row) -> (f64, f64),
}

pub(super) fn chart(report: &Report) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\">\n\
         <title>Violations against what is allocated and not used</title>\n\
         <style>text{{font:12px system-ui,-apple-system,\"Segoe UI\",sans-serif;fill:#1f2328}}.title{{font-size:17px;font-weight:600}}\
         .soft{{fill:#59636e}}.ground{{fill:#fff}}.grid{{stroke:#e4e7eb}}.axis{{stroke:#818b98}}.peer{{fill:none;stroke:#bc4c00;stroke-width:2}}\
         .ours{{fill:#0969da;stroke:#0969da;stroke-width:2}}.line{{fill:none;stroke:#0969da;stroke-width:2}}\
         @media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.soft{{fill:#9198a1}}.ground{{fill:#0d1117}}.grid{{stroke:#262c36}}.axis{{stroke:#656c76}}\
         .peer{{stroke:#f0883e}}.ours{{fill:#58a6ff;stroke:#58a6ff}}.line{{stroke:#58a6ff}}}}</style>\n\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    // Text cannot fail to be written to.
    let mut put = |text: String| {
        let _ = writeln!(svg, "{text}");
    };
    put(format!(
        "<text class=\"title\" x=\"24\" y=\"30\">Violations against what is allocated and not used</text>\
         <text class=\"soft\" x=\"24\" y=\"50\">{} machines, {:.0} days, a host of {:.0} cores and {:.0} GiB; lower left is better; filled: prestage</text>",
        report.vms,
        report.days,
        report.host_cores,
        report.host_memory_bytes / 1073741824.0
    ));
    let panels = [
        Panel {
            title: "CPU",
            unit: "core-hours unused",
            at: LEFT,
            point: |row| (row.score.core_hours_unused, row.score.cpu_violation_min),
        },
        Panel {
            title: "Memory",
            unit: "GiB-hours unused",
            at: LEFT + (WIDTH - LEFT - GAP) / 2.0 + GAP / 2.0,
            point: |row| (row.score.gib_hours_unused, row.score.memory_violation_min),
        },
    ];
    for panel in &panels {
        draw(panel, report, &mut put);
    }
    // Numbers instead of names at the points: these lie close together.
    let mut names = String::new();
    for (number, row) in report.rows.iter().enumerate() {
        let (column, line) = (number % 4, number / 4);
        let _ = write!(
            names,
            "<text x=\"{}\" y=\"{}\">{} {}</text>",
            24 + 210 * column,
            HEIGHT - 38.0 + 15.0 * line as f64,
            number + 1,
            escaped(&row.policy)
        );
    }
    put(names);
    put("</svg>".to_owned());
    svg
}

fn draw(panel: &Panel<'_>, report: &Report, put: &mut impl FnMut(String)) {
    let width = (WIDTH - LEFT - GAP) / 2.0 - GAP / 2.0;
    let (bottom, top) = (HEIGHT - BOTTOM - 40.0, TOP);
    let points: Vec<(f64, f64)> =
        report.rows.iter().map(panel.point).map(|(x, y)| (x.max(1e-3).log10(), y.max(LEAST).log10())).collect();
    let range = |of: fn(&(f64, f64)) -> f64| {
        let low = points.iter().map(of).fold(f64::INFINITY, f64::min);
        let high = points.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
        if low.is_finite() && high.is_finite() { (low - 0.1, (high + 0.1).max(low + 0.3)) } else { (0.0, 1.0) }
    };
    let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
    let x = |log: f64| panel.at + (log - x0) / (x1 - x0) * width;
    let y = |log: f64| bottom - (log - y0) / (y1 - y0) * (bottom - top);
    put(format!(
        "<text x=\"{}\" y=\"{}\" font-weight=\"600\">{}: violation minutes a machine-day</text>\
         <text class=\"soft\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{} (log scale)</text>",
        panel.at,
        top - 8.0,
        panel.title,
        panel.at + width / 2.0,
        bottom + 34.0,
        panel.unit
    ));
    for (value, log) in ticks(y0, y1) {
        let at = y(log);
        put(format!(
            "<path class=\"grid\" d=\"M{} {at:.1}h{width:.1}\"/><text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            panel.at,
            panel.at - 8.0,
            at + 4.0
        ));
    }
    for (value, log) in ticks(x0, x1) {
        let at = x(log);
        put(format!(
            "<path class=\"grid\" d=\"M{at:.1} {top}V{bottom}\"/><text class=\"soft\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{value}</text>",
            bottom + 16.0
        ));
    }
    put(format!("<path class=\"axis\" fill=\"none\" d=\"M{} {top}V{bottom}h{width:.1}\"/>", panel.at));
    let joined: Vec<String> = report
        .rows
        .iter()
        .zip(&points)
        .filter(|(row, _)| row.ours)
        .map(|(_, p)| format!("{:.1},{:.1}", x(p.0), y(p.1)))
        .collect();
    put(format!("<polyline class=\"line\" points=\"{}\"/>", joined.join(" ")));
    for (number, (row, point)) in report.rows.iter().zip(&points).enumerate() {
        let (x, y) = (x(point.0), y(point.1));
        let class = if row.ours { "ours" } else { "peer" };
        put(format!(
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x + 7.0,
            y - 5.0,
            number + 1
        ));
    }
}

/// 1, 2 and 5 times powers of ten, and their logarithms.
fn ticks(low: f64, high: f64) -> Vec<(f64, f64)> {
    let mut ticks = Vec::new();
    for power in low.floor() as i32..=high.ceil() as i32 {
        for digit in [1.0, 2.0, 5.0] {
            // Powers below one by division: 0.05, not 0.05000000000000001.
            let value = if power < 0 { digit / 10_f64.powi(-power) } else { digit * 10_f64.powi(power) };
            if (low..=high).contains(&value.log10()) {
                ticks.push((value, value.log10()));
            }
        }
    }
    ticks
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
