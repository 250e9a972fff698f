//! The advice on a terminal of 80 columns.

use super::super::explain::short_us;
use super::super::render::count;
use super::super::table::{Align, Table, printable};
use super::sweep::{RAM_US, SSD_US, THRESHOLD, Tried};
use super::{Answer, LatencySource};
use crate::config::units::{human_bytes, human_duration};
use std::fmt::Write;
use std::time::Duration;

/// Width of the bars.
const BAR: usize = 50;

pub(super) fn answer(answer: &Answer) -> String {
    let mut text = String::new();
    let advice = &answer.advice;
    let recommended = &advice.recommended;
    let threshold = recommended.threshold.unwrap_or_default();
    let write = &mut text;
    // Text cannot fail to be written to.
    let _ = writeln!(
        write,
        "Recommended for {}: {} of RAM, threshold {threshold}.",
        printable(&answer.vm),
        human_bytes(recommended.ram_bytes)
    );
    let _ = writeln!(
        write,
        "{} of reads from RAM ({} without prefetch);\nmean read {}, the best tried with prefetch {} at {}.",
        percent(recommended.ram_hit_ratio),
        without(answer, recommended.ram_bytes).map_or_else(|| "-".to_owned(), |tried| percent(tried.ram_hit_ratio)),
        short_us(recommended.latency_us),
        short_us(advice.best.latency_us),
        human_bytes(advice.best.ram_bytes)
    );
    if let Some(tried) = &advice.with_ssd {
        let (ram, ssd) = (human_bytes(tried.ram_bytes), human_bytes(tried.ssd_bytes));
        let _ = writeln!(write, "With an SSD tier of {ssd}: {ram} of RAM, mean read {}.", short_us(tried.latency_us));
    }
    // What is recommended has prefetch, as the daemon has unless it is switched off; the reader is to know when that does harm.
    if let Some(plain) =
        without(answer, recommended.ram_bytes).filter(|tried| tried.latency_us < recommended.latency_us)
    {
        let _ = writeln!(
            write,
            "CAUTION: without prefetch the same RAM would do better on this history: mean\nread {}.",
            short_us(plain.latency_us)
        );
    }
    let history = &answer.history;
    let _ = writeln!(
        write,
        "\nhistory:      {}, {} reads, within {}, {}",
        count(history.requests, "request", "requests"),
        history.reads,
        human_duration(Duration::from_micros(history.span_us)),
        count(answer.disks.len() as u64, "disk", "disks")
    );
    if answer.left_out > 0 || answer.missing > 0 {
        let _ = writeln!(write, "not in it:    {} older, {} missing", answer.left_out, answer.missing);
    }
    let _ = writeln!(write, "working set:  {} in blocks of 64 KiB", human_bytes(history.set_bytes));
    let source = match answer.store_latency.source {
        LatencySource::Measured => "measured",
        LatencySource::Given => "as given",
        LatencySource::Assumed => "ASSUMED, not measured yet; --store-us sets it",
    };
    let _ = writeln!(write, "store:        {} a read, {source}", short_us(answer.store_latency.us));
    let _ = writeln!(write, "model:        RAM {}, SSD {}", short_us(RAM_US), short_us(SSD_US));

    if advice.best.latency_us > answer.store_latency.us {
        let _ = writeln!(
            write,
            "CAUTION:      requests came faster than the model's store serves them: its queue\n              \
             decides the latencies, do not trust them"
        );
    }
    let _ = writeln!(
        write,
        "\nreads from RAM (█ without prefetch, ▒ more with it,\n▁ lost with it; threshold {THRESHOLD}, no SSD):"
    );
    for (plain, tried) in by_ram(answer) {
        let _ =
            writeln!(write, "{:>9} {}", human_bytes(tried.ram_bytes), bar(plain.ram_hit_ratio, tried.ram_hit_ratio));
    }
    let _ = writeln!(write, "\neverything that was tried:");
    text.push_str(&table(answer));
    text
}

fn percent(ratio: f64) -> String {
    format!("{:.1} %", 100.0 * ratio)
}

fn without(answer: &Answer, ram_bytes: u64) -> Option<&Tried> {
    answer.advice.tried.iter().find(|tried| tried.threshold.is_none() && tried.ram_bytes == ram_bytes)
}

/// By RAM size: without prefetch, and with it at the usual threshold without an SSD.
pub(super) fn by_ram(answer: &Answer) -> Vec<(&Tried, &Tried)> {
    let with = answer.advice.tried.iter().filter(|tried| tried.threshold == Some(THRESHOLD) && tried.ssd_bytes == 0);
    with.filter_map(|tried| Some((without(answer, tried.ram_bytes)?, tried))).collect()
}

/// Prefetch can also do harm: then its end is marked within the bar.
fn bar(plain: f64, with: f64) -> String {
    let cells = |ratio: f64| (ratio * BAR as f64).round() as usize;
    let (plain_cells, with_cells) = (cells(plain), cells(with));
    let mut bar: String = (0..BAR)
        .map(|cell| match cell {
            _ if cell < plain_cells.min(with_cells) => '█',
            _ if cell < with_cells => '▒',
            _ if cell < plain_cells => '▁',
            _ => ' ',
        })
        .collect();
    let _ = write!(bar, " {:>5.1} > {:>5.1} %", 100.0 * plain, 100.0 * with);
    bar
}

fn table(answer: &Answer) -> String {
    let mut table = Table::new(&[
        ("RAM", Align::Right),
        ("SSD", Align::Right),
        ("THRESH", Align::Right),
        ("RAM %", Align::Right),
        ("SSD %", Align::Right),
        ("PREC %", Align::Right),
        ("FROM STORE", Align::Right),
        ("MEAN READ", Align::Right),
        ("", Align::Left),
    ]);
    let advice = &answer.advice;
    let mut tried: Vec<&Tried> = advice.tried.iter().collect();
    tried.sort_by(|a, b| {
        let key = |tried: &Tried| (tried.ram_bytes, tried.threshold.is_some(), tried.ssd_bytes);
        key(a).cmp(&key(b)).then(a.threshold.unwrap_or(0.0).total_cmp(&b.threshold.unwrap_or(0.0)))
    });
    for tried in tried {
        let prefetch = tried.threshold.is_some();
        table.row([
            human_bytes(tried.ram_bytes),
            if tried.ssd_bytes == 0 { "-".to_owned() } else { human_bytes(tried.ssd_bytes) },
            tried.threshold.map_or_else(|| "none".to_owned(), |threshold| threshold.to_string()),
            format!("{:.1}", 100.0 * tried.ram_hit_ratio),
            if tried.ssd_bytes == 0 { "-".to_owned() } else { format!("{:.1}", 100.0 * tried.ssd_hit_ratio) },
            if prefetch { format!("{:.1}", 100.0 * tried.precision) } else { "-".to_owned() },
            human_bytes(tried.store_bytes),
            short_us(tried.latency_us),
            if *tried == advice.recommended || advice.with_ssd.as_ref() == Some(tried) {
                "<".to_owned()
            } else {
                String::new()
            },
        ]);
    }
    table.render()
}
