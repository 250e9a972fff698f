//! A forecast as a chart: in the terminal, and as SVG.
//!
//! What was measured on the left, what is expected on the right, over one scale that begins at 0.

use std::fmt::Write;
use std::time::Duration;

use prestage_integration::api::demand::{Forecast, Quantiles};

use super::super::table::printable;
use super::super::when;
use super::text::amount;
use crate::config::units::exact_duration;

/// Columns and lines of the chart in the terminal, without its scale.
const COLUMNS: usize = 64;
const LINES: usize = 12;
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
/// Left, right, top, bottom.
const MARGINS: [f64; 4] = [72.0, 24.0, 56.0, 56.0];

/// One column: measured, or expected.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bar {
    Measured { mean: f64, max: f64 },
    Expected(Quantiles),
}

impl Bar {
    fn top(&self) -> f64 {
        match self {
            Self::Measured { max, .. } => *max,
            Self::Expected(quantiles) => quantiles.p95,
        }
    }

    /// What is drawn at a height.
    fn at(&self, height: f64) -> char {
        let steps: &[(f64, char)] = match self {
            Self::Measured { mean, max } => &[(*mean, '█'), (*max, '▒')],
            Self::Expected(quantiles) => &[(quantiles.p50, '█'), (quantiles.p90, '▒'), (quantiles.p95, '░')],
        };
        steps.iter().find(|(value, _)| height < *value).map_or(' ', |(_, mark)| *mark)
    }
}

/// At most `most` columns of all there are: neighbours become one, with the greatest of each; of few, each takes several.
fn squeeze<T: Copy>(all: &[T], most: usize, greatest: impl Fn(T, T) -> T) -> Vec<T> {
    let each = all.len().div_ceil(most.max(1)).max(1);
    let times = (most / all.len().max(1)).max(1);
    let columns = all.chunks(each).filter_map(|chunk| chunk.iter().copied().reduce(&greatest));
    columns.flat_map(|column| std::iter::repeat_n(column, times)).collect()
}

fn bars(forecast: &Forecast, columns: usize) -> (Vec<Bar>, usize) {
    let measured: Vec<Bar> =
        forecast.measured.iter().map(|step| Bar::Measured { mean: step.mean, max: step.max }).collect();
    let expected: Vec<Bar> = forecast.steps.iter().map(|step| Bar::Expected(*step)).collect();
    let join = |a: Bar, b: Bar| match (a, b) {
        (Bar::Measured { mean: a, max: c }, Bar::Measured { mean: b, max: d }) => {
            Bar::Measured { mean: a.max(b), max: c.max(d) }
        }
        (Bar::Expected(a), Bar::Expected(b)) => Bar::Expected(Quantiles {
            p05: a.p05.max(b.p05),
            p50: a.p50.max(b.p50),
            p90: a.p90.max(b.p90),
            p95: a.p95.max(b.p95),
        }),
        (a, _) => a,
    };
    let mut bars = squeeze(&measured, columns / 2, join);
    let now = bars.len();
    bars.extend(squeeze(&expected, columns / 2, join));
    (bars, now)
}

fn scale(forecast: &Forecast, bars: &[Bar]) -> f64 {
    let most = bars.iter().map(Bar::top).chain([forecast.peak.p95]).chain(forecast.allocated).fold(0.0, f64::max);
    if most.is_finite() && most > 0.0 { most } else { 1.0 }
}

pub(super) fn text(forecast: &Forecast) -> String {
    let (bars, now) = bars(forecast, COLUMNS);
    let top = scale(forecast, &bars);
    let of = |value: f64| amount(forecast.resource, value);
    let step = Duration::from_secs(forecast.step_s.into());
    let horizon = step.saturating_mul(u32::try_from(forecast.steps.len()).unwrap_or(u32::MAX));
    let mut out = String::new();
    // Text cannot fail to be written to.
    let _ = writeln!(
        out,
        "{} of {}\n{} ahead in steps of {}, from {} UTC\n",
        forecast.resource.name(),
        printable(&forecast.name),
        exact_duration(horizon),
        exact_duration(step),
        when::show_seconds(forecast.at_unix_ms)
    );
    let limit = forecast.allocated.map(|allocated| (allocated / top * LINES as f64).ceil() as usize);
    for line in (0..LINES).rev() {
        let height = (line as f64 + 0.5) / LINES as f64 * top;
        let label = match line {
            _ if line + 1 == LINES => of(top),
            0 => of(0.0),
            _ => String::new(),
        };
        let _ = write!(out, "{label:>11} ");
        for (column, bar) in bars.iter().enumerate() {
            if column == now {
                out.push('│');
            }
            let mark = bar.at(height);
            // What the machine has, as far as nothing stands there.
            out.push(if mark == ' ' && limit == Some(line + 1) { '┄' } else { mark });
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    let _ = writeln!(out, "{:>12}{}now", "", " ".repeat(now.saturating_sub(1)));
    let row = |name: &str, quantiles: &Quantiles| {
        let [a, b, c, d] = [quantiles.p05, quantiles.p50, quantiles.p90, quantiles.p95].map(of);
        format!("{name:<12} {a:>11} {b:>11} {c:>11} {d:>11}\n")
    };
    let _ = writeln!(out, "\n{:<12} {:>11} {:>11} {:>11} {:>11}", "", "5 %", "50 %", "90 %", "95 %");
    if let Some(first) = forecast.steps.first() {
        out.push_str(&row("next step", first));
    }
    if let Some(last) = forecast.steps.last() {
        out.push_str(&row("last step", last));
    }
    out.push_str(&row("peak", &forecast.peak));
    if let Some(allocated) = forecast.allocated {
        let _ = writeln!(out, "{:<12} {:>11}", "it has (┄)", of(allocated));
    }
    let _ = writeln!(out, "rests on:    {}", printable(&forecast.basis));
    if forecast.capped {
        out.push_str("CAUTION:     cut at ten times the most that was ever seen\n");
    }
    out
}

pub(super) fn svg(forecast: &Forecast) -> String {
    let [left, right, top, bottom] = MARGINS;
    let (before, after) = (forecast.measured.len(), forecast.steps.len());
    let all: Vec<Bar> = forecast
        .measured
        .iter()
        .map(|step| Bar::Measured { mean: step.mean, max: step.max })
        .chain(forecast.steps.iter().map(|step| Bar::Expected(*step)))
        .collect();
    let most = scale(forecast, &all) * 1.05;
    let x = |at: usize| left + at as f64 / (before + after).max(1) as f64 * (WIDTH - left - right);
    let y = |value: f64| HEIGHT - bottom - (value / most).clamp(0.0, 1.0) * (HEIGHT - top - bottom);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>svg{{color:#222;background:#fff}}.b{{color:#0a58ca}}\
         @media(prefers-color-scheme:dark){{svg{{color:#ddd;background:#16181c}}.b{{color:#6ea8fe}}}}</style>\n"
    );
    let mut put = |text: std::fmt::Arguments<'_>| {
        // Text cannot fail to be written to.
        let _ = svg.write_fmt(text);
        svg.push('\n');
    };
    let name: String = forecast.name.chars().filter(|c| !c.is_control() && !"<>&\"".contains(*c)).collect();
    put(format_args!(
        "<text x=\"{left}\" y=\"20\" font-size=\"14\" fill=\"currentColor\">{} of {name}: measured, and expected from {} UTC</text>",
        forecast.resource.name(),
        when::show(forecast.at_unix_ms)
    ));
    for quarter in 0..=4 {
        let value = most * f64::from(quarter) / 4.0;
        put(format_args!(
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"currentColor\" stroke-opacity=\".2\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"currentColor\">{}</text>",
            WIDTH - right,
            left - 6.0,
            y(value) + 4.0,
            amount(forecast.resource, value),
            y = y(value)
        ));
    }
    let line =
        |points: Vec<(f64, f64)>| points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
    let steps = &forecast.steps;
    let band = |low: fn(&Quantiles) -> f64, high: fn(&Quantiles) -> f64| {
        let up = steps.iter().enumerate().map(|(at, step)| (x(before + at), y(high(step))));
        let down = steps.iter().enumerate().rev().map(|(at, step)| (x(before + at), y(low(step))));
        line(up.chain(down).collect())
    };
    for (low, high, opacity) in [
        ((|q: &Quantiles| q.p05) as fn(&Quantiles) -> f64, (|q: &Quantiles| q.p95) as fn(&Quantiles) -> f64, ".18"),
        (|q: &Quantiles| q.p50, |q: &Quantiles| q.p90, ".28"),
    ] {
        put(format_args!(
            "<polygon class=\"b\" points=\"{}\" fill=\"currentColor\" fill-opacity=\"{opacity}\"/>",
            band(low, high)
        ));
    }
    let median = line(steps.iter().enumerate().map(|(at, step)| (x(before + at), y(step.p50))).collect());
    put(format_args!(
        "<polyline class=\"b\" points=\"{median}\" fill=\"none\" stroke=\"currentColor\" stroke-width=\"2\"/>"
    ));
    let past = line(forecast.measured.iter().enumerate().map(|(at, step)| (x(at), y(step.mean))).collect());
    put(format_args!("<polyline points=\"{past}\" fill=\"none\" stroke=\"currentColor\" stroke-width=\"2\"/>"));
    let marks = [(Some(forecast.peak.p95), "maximum, 95 % sure", "6 3"), (forecast.allocated, "allocated", "2 3")];
    for (value, name, dash) in marks {
        if let Some(value) = value {
            put(format_args!(
                "<line x1=\"{left}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"currentColor\" stroke-dasharray=\"{dash}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" fill=\"currentColor\">{name}: {}</text>",
                WIDTH - right,
                left + 6.0,
                y(value) - 4.0,
                amount(forecast.resource, value),
                y = y(value)
            ));
        }
    }
    let step_s = u64::from(forecast.step_s);
    for (steps, at, sign, anchor) in [(before, 0, '-', "start"), (after, before + after, '+', "end")] {
        if steps > 0 {
            put(format_args!(
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\" fill=\"currentColor\">{sign}{}</text>",
                x(at),
                HEIGHT - bottom + 18.0,
                exact_duration(Duration::from_secs(step_s.saturating_mul(steps as u64)))
            ));
        }
    }
    put(format_args!(
        "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{}\" stroke=\"currentColor\"/>\
         <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"currentColor\">now</text>\
         <text x=\"{left}\" y=\"40\" fill=\"currentColor\">dark band: 50 to 90 %, light band: 5 to 95 %, steps of {}</text>\n</svg>",
        HEIGHT - bottom,
        HEIGHT - bottom + 18.0,
        exact_duration(Duration::from_secs(forecast.step_s.into())),
        x = x(before)
    ));
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_integration::api::demand::{Measured, Resource};

    fn forecast() -> Forecast {
        let quantiles = |scale: f64| Quantiles { p05: scale, p50: 2.0 * scale, p90: 3.0 * scale, p95: 4.0 * scale };
        Forecast {
            uuid: String::new(),
            name: "web<script>\u{1b}".into(),
            resource: Resource::Cpu,
            at_unix_ms: 1_795_316_645_000,
            step_s: 300,
            steps: (1..=12).map(|step| quantiles(f64::from(step) / 12.0)).collect(),
            peak: quantiles(1.0),
            capped: false,
            basis: "7 days".into(),
            allocated: Some(2.0),
            measured: (0..200).map(|at| Measured { at_unix_ms: at, mean: 0.5, max: 1.0 }).collect(),
        }
    }

    #[test]
    fn the_chart_shows_both_sides_of_now_within_eighty_columns() {
        let text = text(&forecast());
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains('│') && text.contains('░') && text.contains('┄') && text.contains('▒'), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
        assert!(text.contains("peak                1.00        2.00        3.00        4.00"), "{text}");
    }

    #[test]
    fn nothing_measured_and_nothing_expected_is_no_failure() {
        let empty =
            Forecast { steps: vec![], measured: vec![], peak: Quantiles::default(), allocated: None, ..forecast() };
        assert!(text(&empty).contains("now"));
        assert!(!svg(&empty).contains("NaN"));
        let drawing = svg(&forecast());
        assert!(drawing.starts_with("<svg") && drawing.ends_with("</svg>\n") && !drawing.contains("<script"));
        assert!(
            drawing.contains(">now<") && drawing.contains("text-anchor=\"end\" fill=\"currentColor\">+"),
            "{drawing}"
        );
        assert!(!drawing.contains("NaN") && !drawing.contains('\u{1b}'));
    }

    #[test]
    fn neighbours_become_one_column_with_the_greatest() {
        assert_eq!(squeeze(&[1, 5, 2, 3, 9], 2, |a: i32, b| a.max(b)), [5, 9]);
        assert_eq!(squeeze(&[1, 2], 5, |a: i32, b| a.max(b)), [1, 1, 2, 2]);
        assert!(squeeze(&[], 5, |a: i32, b| a.max(b)).is_empty());
    }
}
