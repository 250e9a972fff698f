//! Medians of the rounds, as a table and as JSON.

use crate::table::median;
use prestage_tests::accelerator::Accelerator;
use serde::Serialize;

use super::contender::Contender;
use super::round::Sample;
use super::watching::Watching;
use super::{Area, Options, Order, template};
use crate::host::Host;

/// A whole run, as written to `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) accelerator: Accelerator,
    pub(super) options: Settings,
    pub(super) rows: Vec<Row>,
    pub(super) watching: Option<Watching>,
    pub(super) template: Option<template::Report>,
}

/// What was asked for.
#[derive(Debug, Serialize)]
pub(super) struct Settings {
    rounds: u32,
    memory_mib: u64,
    working_set_mib: u64,
    compute_ns: u64,
    shared: bool,
}

pub(super) fn settings(options: &Options) -> Settings {
    Settings {
        rounds: options.rounds,
        memory_mib: options.memory,
        working_set_mib: options.working_set,
        compute_ns: options.compute_ns,
        shared: options.shared,
    }
}

/// One contender on one area in one order.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    swap: Area,
    order: Order,
    contender: String,
    /// How long before the first touch it was told; none when it was not.
    lead_ms: Option<u128>,
    median: Sample,
    samples: Vec<Sample>,
}

impl Row {
    /// `samples` must not be empty.
    pub(super) fn new(swap: Area, order: Order, contender: &dyn Contender, samples: Vec<Sample>) -> Self {
        let lead_ms = contender.lead().map(|lead| lead.as_millis());
        Self { swap, order, contender: contender.name(), lead_ms, median: medians(&samples), samples }
    }

    fn seconds(&self) -> impl Iterator<Item = f64> {
        self.samples.iter().map(|sample| sample.seconds)
    }
}

/// The median of each figure by itself.
fn medians(samples: &[Sample]) -> Sample {
    let of = |figure: fn(&Sample) -> f64| median(samples.iter().map(figure));
    // counts of pages, far below 2^53
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let count = |figure: fn(&Sample) -> u64| median(samples.iter().map(|sample| figure(sample) as f64)) as u64;
    Sample {
        seconds: of(|sample| sample.seconds),
        lead_seconds: of(|sample| sample.lead_seconds),
        major_faults: count(|sample| sample.major_faults),
        minor_faults: count(|sample| sample.minor_faults),
        qemu_cpu_seconds: of(|sample| sample.qemu_cpu_seconds),
        own_cpu_seconds: of(|sample| sample.own_cpu_seconds),
        swapped_bytes: count(|sample| sample.swapped_bytes),
    }
}

impl Report {
    pub(super) fn render(&self) -> String {
        let (host, options) = (&self.host, &self.options);
        let mut text = format!(
            "{}, {} cores, {} MB; Linux {}; {}\na guest of {} MiB under {}, {} memory; {} MiB touched, a byte a page, {} ns \
             computed after each; medians of {} rounds\n\n",
            host.cpu,
            host.cores,
            host.memory_bytes / 1_000_000,
            host.kernel,
            host.qemu,
            options.memory_mib,
            self.accelerator,
            if options.shared { "shared" } else { "private" },
            options.working_set_mib,
            options.compute_ns,
            options.rounds,
        );
        text += &format!(
            "{:<5} {:<9} {:<22} {:>7} {:>7} {:>15} {:>8} {:>8} {:>8} {:>8}\n",
            "swap", "order", "contender", "lead ms", "s", "least–most", "major", "minor", "QEMU CPU", "own CPU"
        );
        for row in &self.rows {
            let figures = &row.median;
            let (least, most) = row.seconds().fold((f64::MAX, f64::MIN), |(a, b), s| (a.min(s), b.max(s)));
            text += &format!(
                "{:<5} {:<9} {:<22} {:>7} {:>7.3} {:>15} {:>8} {:>8} {:>8.3} {:>8.3}\n",
                row.swap.to_string(),
                row.order.to_string(),
                row.contender,
                row.lead_ms.map_or_else(|| "-".to_owned(), |lead| lead.to_string()),
                figures.seconds,
                format!("{least:.3}–{most:.3}"),
                figures.major_faults,
                figures.minor_faults,
                figures.qemu_cpu_seconds,
                figures.own_cpu_seconds,
            );
        }
        text += "s: all touches by the guest's clock. Faults and processor time of QEMU from the announcement to the guest's answer; own\n\
                 CPU: seconds of the contender's processor time.\n";
        if let Some(watching) = &self.watching {
            text += &format!("\n{watching}\n");
        }
        if let Some(template) = &self.template {
            text +=
                &format!("\nclones of a template, from the order to the first answer\n{}", template::table(template));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_of_what_is_there() {
        assert!(median(std::iter::empty()).is_nan());
        assert!((median([3.0, 1.0, 2.0].into_iter()) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0].into_iter()) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn orders_that_are_new_differ_round_by_round_and_from_the_recorded_one() {
        assert_eq!(Order::Recorded.seed(1), Order::Recorded.seed(2));
        assert_ne!(Order::New.seed(1), Order::New.seed(2));
        assert!(
            (0..100).all(|round| Order::New.seed(round) != Order::Recorded.seed(round) && Order::New.seed(round) != 0)
        );
    }
}
