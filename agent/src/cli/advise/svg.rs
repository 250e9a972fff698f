//! The advice as a chart: hit ratio over the size of the RAM tier, without prefetch and with it.
//!
//! Drawn in the colour of the text around it, on no ground of its own, so that it can be read on light and dark pages; the
//! two curves differ in dash and mark as well as in colour.

use super::Answer;
use super::text::by_ram;
use crate::config::units::human_bytes;
use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
/// Left, right, top, bottom.
const MARGINS: [f64; 4] = [64.0, 24.0, 48.0, 64.0];

pub(super) fn chart(answer: &Answer) -> String {
    let rows = by_ram(answer);
    let [left, right, top, bottom] = MARGINS;
    let logs: Vec<f64> = rows.iter().map(|(_, tried)| (tried.ram_bytes as f64).log2()).collect();
    let (low, high) = (logs.first().copied().unwrap_or(0.0), logs.last().copied().unwrap_or(1.0));
    let x = |log: f64| left + (log - low) / (high - low).max(1e-9) * (WIDTH - left - right);
    let y = |ratio: f64| HEIGHT - bottom - ratio * (HEIGHT - top - bottom);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <style>svg{{color:#222;background:#fff}}.a{{color:#666}}.b{{color:#0a58ca}}\
         @media(prefers-color-scheme:dark){{svg{{color:#ddd;background:#16181c}}.a{{color:#aaa}}.b{{color:#6ea8fe}}}}</style>\n"
    );
    // Text cannot fail to be written to.
    let mut put = |text: std::fmt::Arguments<'_>| {
        let _ = svg.write_fmt(text);
        svg.push('\n');
    };
    put(format_args!(
        "<text x=\"{left}\" y=\"20\" font-size=\"14\" fill=\"currentColor\">Reads served from RAM, machine {}</text>",
        escaped(&answer.vm)
    ));
    for percent in [0, 20, 40, 60, 80, 100] {
        let at = y(f64::from(percent) / 100.0);
        put(format_args!(
            "<line x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"currentColor\" stroke-opacity=\".2\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"currentColor\">{percent} %</text>",
            WIDTH - right,
            left - 8.0,
            at + 4.0
        ));
    }
    let mut free = f64::NEG_INFINITY;
    for ((_, tried), log) in rows.iter().zip(&logs) {
        let at = x(*log);
        put(format_args!(
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{}\" y2=\"{}\" stroke=\"currentColor\"/>",
            HEIGHT - bottom,
            HEIGHT - bottom + 5.0
        ));
        // A label needs some 60 units.
        if at >= free {
            free = at + 60.0;
            put(format_args!(
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\" fill=\"currentColor\">{}</text>",
                HEIGHT - bottom + 20.0,
                human_bytes(tried.ram_bytes)
            ));
        }
    }
    put(format_args!(
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"currentColor\">RAM (log scale)</text>",
        (left + WIDTH - right) / 2.0,
        HEIGHT - 20.0
    ));
    let curves: [(&str, &str, Vec<f64>, &str); 2] = [
        ("a", "no prefetch", rows.iter().map(|(plain, _)| plain.ram_hit_ratio).collect(), " stroke-dasharray=\"6 4\""),
        ("b", "prestage", rows.iter().map(|(_, with)| with.ram_hit_ratio).collect(), ""),
    ];
    for (index, (class, name, ratios, dash)) in curves.iter().enumerate() {
        let points: Vec<String> =
            logs.iter().zip(ratios).map(|(log, ratio)| format!("{:.1},{:.1}", x(*log), y(*ratio))).collect();
        put(format_args!(
            "<g class=\"{class}\"><polyline points=\"{}\" fill=\"none\" stroke=\"currentColor\" stroke-width=\"2\"{dash}/>",
            points.join(" ")
        ));
        for (log, ratio) in logs.iter().zip(ratios) {
            let (x, y) = (x(*log), y(*ratio));
            match index {
                0 => put(format_args!(
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"6\" height=\"6\" fill=\"currentColor\"/>",
                    x - 3.0,
                    y - 3.0
                )),
                _ => put(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"currentColor\"/>")),
            }
        }
        let legend = left + 130.0 * index as f64;
        put(format_args!(
            "<line x1=\"{legend}\" x2=\"{}\" y1=\"36\" y2=\"36\" stroke=\"currentColor\" stroke-width=\"2\"{dash}/>\
             <text x=\"{}\" y=\"40\" fill=\"currentColor\">{name}</text></g>",
            legend + 28.0,
            legend + 34.0
        ));
    }
    let recommended = &answer.advice.recommended;
    let at = x((recommended.ram_bytes as f64).log2());
    put(format_args!(
        "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{}\" stroke=\"currentColor\" stroke-dasharray=\"2 3\"/>",
        HEIGHT - bottom
    ));
    put(format_args!(
        "<text x=\"{}\" y=\"40\" text-anchor=\"end\" fill=\"currentColor\">dotted: recommended, {}</text>\n</svg>",
        WIDTH - right,
        human_bytes(recommended.ram_bytes)
    ));
    svg
}

fn escaped(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            c if c.is_control() => " ".to_owned(),
            c => c.to_string(),
        })
        .collect()
}
