//! A trace's precision-hit curves as SVG: one curve a cache size, every peer's points in the colour of their size.
//!
//! What prefetches stands at its precision; what only caches has none and stands in columns beside the plot, on the same
//! scale. Drawn for light and dark pages (`prefers-color-scheme`) on a ground of its own. No text stands inside the plot, so
//! that nothing can overlap, whatever the figures are.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::ours::DEFAULT_THRESHOLD;
use super::row::{By, Row};
use super::{Options, sweep};
use crate::trace::Trace;

const WIDTH: f64 = 860.0;
/// Edges of the plot, and of the columns beside it.
const LEFT: f64 = 70.0;
const PLOT_WIDTH: f64 = 560.0;
const COLUMNS: (f64, f64) = (664.0, 176.0);
const PLOT_HEIGHT: f64 = 400.0;
/// Entries of the legend in a line, and the room of each.
const ENTRIES: usize = 6;
const ENTRY: f64 = 140.0;
const LINE: f64 = 24.0;

/// Inks of a page: ground, text, lesser text, grid, axis, and the curves' by size in turn. Each is legible on its ground
/// (contrast of at least 4.5 for text and curves), and neighbours differ in more than hue.
struct Inks {
    ground: &'static str,
    text: &'static str,
    soft: &'static str,
    grid: &'static str,
    axis: &'static str,
    sizes: [&'static str; 6],
}

const LIGHT: Inks = Inks {
    ground: "#fff",
    text: "#1f2328",
    soft: "#59636e",
    grid: "#e4e7eb",
    axis: "#818b98",
    sizes: ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#7d6000"],
};
const DARK: Inks = Inks {
    ground: "#0d1117",
    text: "#e6edf3",
    soft: "#9198a1",
    grid: "#262c36",
    axis: "#6e7681",
    sizes: ["#58a6ff", "#ff9a4d", "#3fb950", "#bc8cff", "#ff7eb6", "#d9b84a"],
};

impl Inks {
    fn style(&self) -> String {
        let Self { ground, text, soft, grid, axis, sizes } = self;
        let mut style = format!(
            ".ground,.ring{{fill:{ground}}}text{{fill:{text}}}.key{{stroke:{text}}}.soft{{fill:{soft}}}\
             .grid{{stroke:{grid}}}.axis{{stroke:{axis}}}\n"
        );
        for (size, ink) in sizes.iter().enumerate() {
            let _ = write!(style, ".s{size}{{stroke:{ink}}}.f{size}{{fill:{ink}}}");
        }
        style
    }
}

/// The class of a size's lines (`s`) or dots (`f`).
fn class(kind: char, size: usize) -> String {
    format!("{kind}{}", size % LIGHT.sizes.len())
}

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
    let untimed: Vec<&Row> = rows.iter().filter(|row| row.trace == trace && row.latency_us.is_none()).collect();
    let mut body = String::new();
    let top = legend(&mut body, sizes) + 46.0;
    let most = untimed
        .iter()
        .copied()
        .filter(|row| row.by != By::Prestage && sizes.contains(&row.cache))
        .chain(swept.iter().filter(|row| row.trace == trace && sizes.contains(&row.cache)))
        .map(|row| row.read_hit_ratio)
        .fold(0.05, f64::max);
    let scale = Scale::up_to(most, top);
    scale.axes(&mut body);
    columns(&mut body, &scale, sizes, &untimed);
    for (index, &size) in sizes.iter().enumerate() {
        curve(&mut body, &scale, index, &sweep::curve(swept, trace, size));
        for row in sweep::peers(rows, trace, size).iter().filter(|row| row.prefetched_pages > 0) {
            mark(&mut body, &class('s', index), &row.policy, scale.at(row.precision, row.read_hit_ratio));
        }
    }
    let height = top + PLOT_HEIGHT + 84.0;
    let (trace, [least, most]) =
        (escaped(trace), [sweep::THRESHOLDS[0], sweep::THRESHOLDS[sweep::THRESHOLDS.len() - 1]]);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">
<title>{trace}: hit ratio against precision of prefetch</title>
<style>text{{font:13px system-ui,-apple-system,"Segoe UI",sans-serif}}.title{{font-size:17px;font-weight:600}}.small{{font-size:12px}}
path,circle{{fill:none;stroke-width:2;stroke-linejoin:round}}.grid,.axis{{stroke-width:1}}
{}
@media(prefers-color-scheme:dark){{{}}}</style>
<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>
<text class="title" x="20" y="32">{trace}: hit ratio against precision of prefetch</text>
<text class="soft" x="20" y="56">Curves: prestage, its threshold swept from {least} to {most}. Points: its peers, in the colour of their cache size.</text>
{body}</svg>
"#,
        LIGHT.style(),
        DARK.style()
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Sizes, then methods; returns the last line's height.
fn legend(svg: &mut String, sizes: &[f64]) -> f64 {
    let mut y = 84.0;
    let place = |index: usize, y: f64| (20.0 + ENTRY * (index % ENTRIES) as f64, y + LINE * (index / ENTRIES) as f64);
    for (index, size) in sizes.iter().enumerate() {
        let (x, y) = place(index, y);
        // writing to a string cannot fail
        let _ = write!(svg, r#"<path class="{}" d="M{x} {}h22"/>"#, class('s', index), y - 4.0);
        let _ = write!(svg, r#"<circle class="{}" cx="{}" cy="{}" r="3"/>"#, class('f', index), x + 11.0, y - 4.0);
        let _ = writeln!(svg, r#"<text x="{}" y="{y}">cache of {} %</text>"#, x + 29.0, hundredths(*size));
    }
    y += LINE * sizes.len().div_ceil(ENTRIES).max(1) as f64;
    for (index, name) in ["prestage", "readahead", "leap", "markov", "markov+readahead"].into_iter().enumerate() {
        let (x, y) = place(index, y);
        let at = (x + 11.0, y - 4.0);
        let text = if index == 0 {
            let _ = write!(svg, r#"<circle class="key" cx="{}" cy="{}" r="6"/>"#, at.0, at.1);
            "by default"
        } else {
            mark(svg, "key", name, at);
            name
        };
        let _ = writeln!(svg, r#"<text x="{}" y="{y}">{text}</text>"#, x + 29.0);
    }
    y
}

/// A share in percent, without the noise of floating point.
fn hundredths(share: f64) -> f64 {
    (share * 1e6).round() / 1e4
}

/// A peer's point: a shape of its own, so that it is told apart without colour.
fn mark(svg: &mut String, class: &str, peer: &str, (x, y): (f64, f64)) {
    let shape = match peer {
        "readahead" => "m-5 -5h10v10h-10z",
        "leap" => "m-6 4.5l6 -10.5l6 10.5z",
        "markov" => "m-5 -5l10 10m0 -10l-10 10",
        _ => "m-6.5 0l6.5 -6.5l6.5 6.5l-6.5 6.5z",
    };
    let _ = writeln!(svg, r#"<path class="{class}" d="M{x:.1} {y:.1}{shape}"/>"#);
}

/// Where figures lie.
#[derive(Debug, Clone, Copy)]
struct Scale {
    top: f64,
    tick: f64,
    ticks: u32,
}

impl Scale {
    fn up_to(most: f64, top: f64) -> Self {
        let tick = match most {
            most if most > 0.5 => 0.2,
            most if most > 0.2 => 0.1,
            _ => 0.05,
        };
        Self { top, tick, ticks: (most / tick - 1e-9).ceil().max(1.0) as u32 }
    }

    fn at(&self, precision: f64, hit: f64) -> (f64, f64) {
        let most = self.tick * f64::from(self.ticks);
        (LEFT + PLOT_WIDTH * precision, self.top + PLOT_HEIGHT * (1.0 - hit / most))
    }

    fn axes(&self, svg: &mut String) {
        let (top, bottom, (beside, width)) = (self.top, self.top + PLOT_HEIGHT, COLUMNS);
        let decimals = if self.tick < 0.1 { 2 } else { 1 };
        for step in 0..=self.ticks {
            let hit = self.tick * f64::from(step);
            let (y, before) = (self.at(0.0, hit).1, LEFT - 10.0);
            let _ = write!(svg, r#"<path class="grid" d="M{LEFT} {y:.1}h{PLOT_WIDTH}M{beside} {y:.1}h{width}"/>"#);
            let _ = writeln!(
                svg,
                r#"<text class="soft" x="{before}" y="{:.1}" text-anchor="end">{hit:.decimals$}</text>"#,
                y + 4.0
            );
        }
        for step in 0..=5 {
            let precision = f64::from(step) / 5.0;
            let (x, below) = (self.at(precision, 0.0).0, bottom + 20.0);
            let _ = write!(svg, r#"<path class="grid" d="M{x:.1} {top}v{PLOT_HEIGHT}"/>"#);
            let _ = writeln!(
                svg,
                r#"<text class="soft" x="{x:.1}" y="{below}" text-anchor="middle">{precision:.1}</text>"#
            );
        }
        let axis = format!("M{LEFT} {top}v{PLOT_HEIGHT}h{PLOT_WIDTH}M{beside} {bottom}h{width}");
        let _ = writeln!(svg, r#"<path class="axis" d="{axis}"/>"#);
        let (middle, below) = (LEFT + PLOT_WIDTH / 2.0, bottom + 46.0);
        let text = "precision: share of the prefetched pages that were used";
        let _ = writeln!(svg, r#"<text x="{middle}" y="{below}" text-anchor="middle">{text}</text>"#);
        let (x, y) = (24.0, top + PLOT_HEIGHT / 2.0);
        let text = "hit ratio: share of the reads with all pages cached";
        let _ = writeln!(
            svg,
            r#"<text x="{x}" y="{y}" text-anchor="middle" transform="rotate(-90 {x} {y})">{text}</text>"#
        );
    }
}

/// What caches and does not prefetch: by whom, under which name, and what it is called here.
const CACHING: [(By, &str, &str); 6] = [
    (By::Peers, "none", "LRU"),
    (By::Libcachesim, "s3-fifo", "S3-FIFO"),
    (By::Libcachesim, "sieve", "SIEVE"),
    (By::Libcachesim, "arc", "ARC"),
    (By::Peers, "opt", "optimum"),
    (By::Prestage, "none", "prestage"),
];

fn columns(svg: &mut String, scale: &Scale, sizes: &[f64], untimed: &[&Row]) {
    let rows_of = |by: By, policy: &str| -> Vec<&Row> {
        untimed.iter().copied().filter(|row| row.by == by && row.policy == policy).collect()
    };
    let columns: Vec<(&str, Vec<&Row>)> = CACHING
        .into_iter()
        .map(|(by, policy, name)| (name, rows_of(by, policy)))
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let (left, width) = COLUMNS;
    let (middle, above, below) = (left + width / 2.0, scale.top - 12.0, scale.top + PLOT_HEIGHT + 16.0);
    let _ =
        writeln!(svg, r#"<text class="soft small" x="{middle}" y="{above}" text-anchor="middle">no prefetch</text>"#);
    for (column, (name, rows)) in columns.iter().enumerate() {
        let x = left + width * (column as f64 + 0.5) / columns.len() as f64;
        let _ = writeln!(
            svg,
            r#"<text class="soft small" x="{x:.1}" y="{below}" text-anchor="end" transform="rotate(-45 {x:.1} {below})">{name}</text>"#
        );
        for (index, size) in sizes.iter().enumerate() {
            for row in rows.iter().filter(|row| row.cache == *size) {
                let y = scale.at(0.0, row.read_hit_ratio).1;
                let _ = writeln!(svg, r#"<path class="{}" d="M{:.1} {y:.1}h16"/>"#, class('s', index), x - 8.0);
            }
        }
    }
}

/// A dot a threshold, a ring at the default.
fn curve(svg: &mut String, scale: &Scale, index: usize, curve: &[&Row]) {
    let prefetches: Vec<&Row> = curve.iter().copied().filter(|row| row.prefetched_pages > 0).collect();
    let (line, dot) = (class('s', index), class('f', index));
    let at = |row: &Row| scale.at(row.precision, row.read_hit_ratio);
    let points: Vec<String> = prefetches.iter().map(|row| at(row)).map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
    if !points.is_empty() {
        let _ = writeln!(svg, r#"<path class="{line}" d="M{}"/>"#, points.join("L"));
    }
    for row in &prefetches {
        let (x, y) = at(row);
        let (class, radius) =
            if row.threshold == Some(DEFAULT_THRESHOLD) { (format!("{line} ring"), 6) } else { (dot.clone(), 3) };
        let _ = writeln!(svg, r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{radius}"/>"#);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(by: By, policy: &str, precision: f64, hit: f64) -> Row {
        Row {
            trace: "a<b&c".to_owned(),
            policy: policy.to_owned(),
            by,
            cache: 0.05,
            precision,
            read_hit_ratio: hit,
            prefetched_pages: 1,
            threshold: Some(precision),
            ..Row::default()
        }
    }

    #[test]
    fn a_chart_is_well_formed_and_everything_lies_on_it() {
        let caching = CACHING.map(|(by, policy, _)| Row { prefetched_pages: 0, ..row(by, policy, 0.0, 0.3) });
        let rows: Vec<Row> = [row(By::Peers, "leap", 1.0, 1.0)].into_iter().chain(caching).collect();
        let ours = |precision, hit| row(By::Prestage, "prestage", precision, hit);
        let swept = [ours(0.0, 0.9), ours(DEFAULT_THRESHOLD, 0.5), ours(0.5, 0.0)];
        let text = draw("a<b&c", &[0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5], &rows, &swept);
        let document = roxmltree::Document::parse(&text).unwrap();
        let bounds: Vec<f64> =
            document.root_element().attribute("viewBox").unwrap().split(' ').flat_map(str::parse).collect();
        for node in document.descendants() {
            for (name, most) in [("x", bounds[2]), ("cx", bounds[2]), ("y", bounds[3]), ("cy", bounds[3])] {
                let value = node.attribute(name).map(|value| value.parse::<f64>().unwrap());
                assert!(value.is_none_or(|value| (10.0..most - 5.0).contains(&value)), "{name} of {node:?}");
            }
        }
        let of_class = |class: &str| {
            let named = |node: &roxmltree::Node<'_, '_>| node.attribute("class") == Some(class);
            document.descendants().filter(named).count()
        };
        // The second size's: an entry of the legend and two dots; a ring; an entry, the curve, a peer and the columns.
        assert_eq!((of_class("f1"), of_class("s1 ring"), of_class("s1")), (3, 1, 3 + CACHING.len()));
    }

    #[test]
    fn the_scale_ends_at_the_tick_above_the_best() {
        let ends = |most| {
            let Scale { tick, ticks, .. } = Scale::up_to(most, 0.0);
            tick * f64::from(ticks)
        };
        for (most, end) in [(0.05, 0.05), (0.17, 0.2), (0.31, 0.4), (0.6, 0.6), (0.81, 1.0), (1.0, 1.0)] {
            assert!((ends(most) - end).abs() < 1e-9, "{most}: {}", ends(most));
        }
    }
}
