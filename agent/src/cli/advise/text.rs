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
    let write = &mut text;
    let (ram, mean) = (human_bytes(recommended.ram_bytes), short_us(recommended.latency_us));
    // Text cannot fail to be written to.
    let _ = writeln!(write, "Recommended for {}: {ram} of RAM, {}.", printable(&answer.vm), prefetch(recommended));
    let other = match recommended.threshold {
        Some(_) => without(answer, recommended.ram_bytes).map(|tried| (tried, "without prefetch")),
        None => with(answer, recommended.ram_bytes).map(|tried| (tried, "with prefetch")),
    };
    let other = other.map_or_else(String::new, |(tried, how)| format!(" ({} {how})", percent(tried.ram_hit_ratio)));
    let _ = writeln!(
        write,
        "{} of reads from RAM{other};\nmean read {mean}, the best tried {} at {}.",
        percent(recommended.ram_hit_ratio),
        short_us(advice.best.latency_us),
        human_bytes(advice.best.ram_bytes)
    );
    if let Some(tried) = &advice.with_ssd {
        let (ram, ssd) = (human_bytes(tried.ram_bytes), human_bytes(tried.ssd_bytes));
        let (mean, prefetch) = (short_us(tried.latency_us), prefetch(tried));
        let _ = writeln!(write, "With an SSD tier of {ssd}: {ram} of RAM, {prefetch}, mean read {mean}.");
    }
    if recommended.threshold.is_none() {
        let disk = printable(answer.disks.first().map_or("DISK", String::as_str));
        if let Some(tried) = with(answer, recommended.ram_bytes) {
            let (more, less) = (human_bytes(tried.store_bytes), human_bytes(recommended.store_bytes));
            let _ = writeln!(
                write,
                "Prefetch gains nothing here: at threshold {THRESHOLD} {more} are read from the\nstore, without it {less}."
            );
        }
        let _ = writeln!(
            write,
            "It is off for a disk with a threshold of 1:\n  prestagectl model threshold {disk} 1\nand for all with prefetch.enabled = false."
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

fn prefetch(tried: &Tried) -> String {
    tried.threshold.map_or_else(|| "no prefetch".to_owned(), |threshold| format!("threshold {threshold}"))
}

/// At the usual threshold.
fn with(answer: &Answer, ram_bytes: u64) -> Option<&Tried> {
    let mut usual = answer.advice.tried.iter().filter(|tried| tried.threshold == Some(THRESHOLD));
    usual.find(|tried| tried.ram_bytes == ram_bytes && tried.ssd_bytes == 0)
}

fn without(answer: &Answer, ram_bytes: u64) -> Option<&Tried> {
    answer.advice.tried.iter().find(|tried| (tried.ram_bytes, tried.ssd_bytes, tried.threshold) == (ram_bytes, 0, None))
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

#[cfg(test)]
mod tests {
    use super::super::sweep::{Advice, Extent};
    use super::super::{LatencySource, StoreLatency};
    use super::*;

    #[test]
    fn without_prefetch_it_says_what_prefetch_would_cost_and_how_to_end_it() {
        let tried = |threshold: Option<f64>, store_mib: u64| Tried {
            ram_bytes: 64 << 20,
            ssd_bytes: 0,
            threshold,
            reads: 20_000,
            ram_hit_ratio: 0.9,
            ssd_hit_ratio: 0.0,
            precision: 0.1,
            store_bytes: store_mib << 20,
            latency_us: 400.0,
        };
        let plain = tried(None, 100);
        let advice = Advice {
            recommended: plain.clone(),
            with_ssd: None,
            best: plain.clone(),
            tried: vec![plain, tried(Some(THRESHOLD), 300)],
        };
        let answer = Answer {
            vm: "web1".into(),
            disks: vec!["web1-vda".into()],
            history: Extent::default(),
            left_out: 0,
            missing: 0,
            store_latency: StoreLatency { us: 1000.0, source: LatencySource::Given },
            advice,
        };
        let text = super::answer(&answer);
        let expected = "\
Recommended for web1: 64 MiB of RAM, no prefetch.
90.0 % of reads from RAM (90.0 % with prefetch);
mean read 400 us, the best tried 400 us at 64 MiB.
Prefetch gains nothing here: at threshold 0.125 300 MiB are read from the
store, without it 100 MiB.
It is off for a disk with a threshold of 1:
  prestagectl model threshold web1-vda 1
and for all with prefetch.enabled = false.
";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}
