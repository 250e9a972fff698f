//! `prestagectl history`: what was read when.

use std::io::Write;
use std::time::Duration;

use clap::Subcommand;
use prestage_integration::api::history::{HistoryStatus, HotList, Near, RunList};

use super::render::{ago, count, dash, now_unix_ms, percent};
use super::table::{Align, Fields, Table, printable};
use super::{Failure, answer, when};
use crate::client::{Client, encode};
use crate::config::units::{exact_bytes, exact_duration, human_bytes, human_duration, parse_bytes, parse_duration};

const HOUR_MS: u64 = 3_600_000;

#[derive(Debug, Subcommand)]
pub enum HistoryCommand {
    /// How much history there is and what the last hour added
    Status,
    /// What was read in the last runs of a machine or on a disk, in order
    #[command(
        long_about = "What was read in the last runs (boots and programs) of a machine or on a disk, in order.\n\n  \
        AT MS           since the start of the run\n  \
        OFFSET LENGTH   of what was read, in bytes\n  \
        READS           how often in this run"
    )]
    Runs {
        /// Name of a disk, or name or UUID of a machine
        #[arg(value_name = "VM|DISK")]
        of: String,
        /// `boot`, or a program's id [default: all]
        #[arg(long)]
        program: Option<String>,
        /// Runs to show, latest first
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
        last: u32,
        /// Extents of each run, in the order of their first read
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(0..=100_000))]
        extents: u32,
    },
    /// Which 64 KiB blocks were read most, hour by hour
    #[command(long_about = "Which 64 KiB blocks were read most, hour by hour.\n\n  \
        OFFSET      of the block, in bytes\n  \
        READS       N+M: at least N, at most M more; the counts of many blocks are kept in little memory\n  \
        % OF HOUR   of all reads of the disk in that hour, those surely of this block")]
    Hot {
        /// Name of the disk
        #[arg(value_parser = super::args::disk_name)]
        disk: String,
        /// Hours back from now
        #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=8784))]
        hours: u32,
        /// Blocks of each hour, most read first
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1024))]
        top: u32,
    },
    /// How often two 64 KiB blocks are read within a moment of each other
    Near {
        /// Name of the disk
        #[arg(value_parser = super::args::disk_name)]
        disk: String,
        /// An offset in the first block, in bytes, such as 1GiB or 65536
        #[arg(value_parser = parse_bytes)]
        offset_a: u64,
        /// An offset in the second block
        #[arg(value_parser = parse_bytes)]
        offset_b: u64,
        /// The moment, at most 1m
        #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = moment)]
        within: Duration,
    },
}

fn moment(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        moment if moment <= Duration::from_secs(60) => Ok(moment),
        _ => Err("it is at most 1m".to_owned()),
    }
}

pub(super) async fn run(
    command: HistoryCommand,
    client: &Client,
    json: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let now = now_unix_ms();
    match command {
        HistoryCommand::Status => {
            answer(out, json, &client.get::<HistoryStatus>("/v1/history").await?, |reply| status(reply, now))
        }
        HistoryCommand::Runs { of, program, last, extents } => {
            let program = program.map_or_else(String::new, |program| format!("&program={}", encode(&program)));
            let path = format!("/v1/history/runs?of={}&last={last}&extents={extents}{program}", encode(&of));
            answer(out, json, &client.get::<RunList>(&path).await?, |reply| runs(reply, now))
        }
        HistoryCommand::Hot { disk, hours, top } => {
            let path = format!("/v1/history/disks/{}/hot?hours={hours}&top={top}", encode(&disk));
            answer(out, json, &client.get::<HotList>(&path).await?, hot)
        }
        HistoryCommand::Near { disk, offset_a, offset_b, within } => {
            let within_us = u64::try_from(within.as_micros()).unwrap_or(u64::MAX);
            let disk = encode(&disk);
            let path = format!("/v1/history/disks/{disk}/near?a={offset_a}&b={offset_b}&within_us={within_us}");
            answer(out, json, &client.get::<Near>(&path).await?, |reply| near(reply, now))
        }
    }
}

fn status(status: &HistoryStatus, now_unix_ms: u64) -> String {
    let when = |at: Option<u64>| dash(at.map(|at| ago(at, now_unix_ms)).as_deref());
    let mut fields = Fields::default();
    fields.add("history", if status.enabled { "on" } else { "off (learner.history)" });
    fields.add("accesses", format!("{} in {}", status.accesses, count(status.segments, "segment", "segments")));
    fields.add("runs", status.runs);
    fields.add("oldest", when(status.oldest_unix_ms)).add("newest", when(status.newest_unix_ms));
    fields.add(
        "size",
        format!(
            "{} of {}, {} days",
            human_bytes(status.size_bytes),
            exact_bytes(status.limit_bytes),
            status.limit_days
        ),
    );
    fields.add(
        "of it",
        format!(
            "{} accesses, {} index, {} hours",
            human_bytes(status.data_bytes),
            human_bytes(status.index_bytes),
            human_bytes(status.hours_bytes)
        ),
    );
    let each = if status.accesses == 0 { 0.0 } else { status.size_bytes as f64 / status.accesses as f64 };
    fields.add("bytes an access", format!("{each:.2}"));
    fields.add(
        "last hour",
        format!(
            "{} accesses ({:.1} a second), {}",
            status.last_hour_accesses,
            status.last_hour_accesses as f64 / 3600.0,
            human_bytes(status.last_hour_bytes)
        ),
    );
    if status.unindexed > 0 {
        fields.add("not indexed yet", count(status.unindexed, "segment", "segments"));
    }
    fields.render()
}

fn runs(list: &RunList, now_unix_ms: u64) -> String {
    if list.runs.is_empty() {
        return "no runs; they are kept from the start of a machine or program on\n".to_owned();
    }
    let mut text = String::new();
    for run in &list.runs {
        if !text.is_empty() {
            text.push('\n');
        }
        let took = run.ended_unix_ms.map_or_else(
            || "still running".to_owned(),
            |end| format!("took {}", human_duration(Duration::from_millis(end.saturating_sub(run.started_unix_ms)))),
        );
        let vm = if run.vm.is_empty() { String::new() } else { format!(" of {}", run.vm) };
        let line =
            format!("{}{vm}, {}, {took}, on {}", run.program, ago(run.started_unix_ms, now_unix_ms), run.storage);
        text.push_str(&printable(&line));
        text.push('\n');
        let mut table = Table::new(&[
            ("AT MS", Align::Right),
            ("OFFSET", Align::Right),
            ("LENGTH", Align::Right),
            ("READS", Align::Right),
        ]);
        for extent in &run.extents {
            table.row([
                format!("{:.3}", extent.at_us as f64 / 1000.0),
                extent.offset_bytes.to_string(),
                extent.length_bytes.to_string(),
                extent.reads.to_string(),
            ]);
        }
        if !run.extents.is_empty() {
            text.push_str(&table.render());
        }
        if run.more {
            text.push_str("there is more: --extents N shows N of each run\n");
        }
    }
    text
}

fn hot(list: &HotList) -> String {
    if list.hours.is_empty() {
        return format!("no reads of {} in these hours\n", printable(&list.disk));
    }
    let mut table = Table::new(&[
        ("HOUR UTC", Align::Left),
        ("OFFSET", Align::Right),
        ("READS", Align::Right),
        ("% OF HOUR", Align::Right),
    ]);
    let mut inexact = false;
    for hour in &list.hours {
        inexact |= hour.error > 0;
        for (at, block) in hour.blocks.iter().enumerate() {
            let error =
                if hour.error > 0 { format!("{}+{}", block.reads, hour.error) } else { block.reads.to_string() };
            table.row([
                if at == 0 { hour_utc(hour.hour_unix_ms) } else { String::new() },
                block.offset_bytes.to_string(),
                error,
                percent(block.reads, hour.reads),
            ]);
        }
    }
    let mut text = format!("{}\n", printable(&format!("{} on {}", list.disk, list.storage)));
    text.push_str(&table.render());
    if inexact {
        text.push_str("N+M: at least N reads, at most M more\n");
    }
    text
}

fn near(near: &Near, now_unix_ms: u64) -> String {
    let mut fields = Fields::default();
    let within = exact_duration(Duration::from_micros(near.within_us));
    fields.add("disk", format!("{} on {}", near.disk, near.storage));
    fields.add("A", format!("{}, {}", near.a_offset_bytes, count(near.reads_a, "read", "reads")));
    fields.add("B", format!("{}, {}", near.b_offset_bytes, count(near.reads_b, "read", "reads")));
    let share = |part: u64| match near.complete {
        true => format!("{part} ({} % of reads of A)", percent(part, near.reads_a)),
        false => part.to_string(),
    };
    fields.add(&format!("A with B within {within}"), share(near.near));
    fields.add(&format!("A then B within {within}"), share(near.then));
    match near.after_unix_ms {
        None => fields.add("covers", "all history"),
        Some(after) => {
            fields.add("covers", format!("since {} only, older reads are too many", ago(after, now_unix_ms)))
        }
    };
    if near.damaged_segments > 0 {
        let segments = count(near.damaged_segments, "segment", "segments");
        fields.add("left out", format!("{segments} of history, damaged; the log of prestaged says more"));
    }
    fields.render()
}

/// Day and hour, in UTC.
fn hour_utc(unix_ms: u64) -> String {
    when::show(unix_ms / HOUR_MS * HOUR_MS)
}

#[cfg(test)]
mod tests {
    #[test]
    fn hours_are_told_as_a_calendar_has_them() {
        for (seconds, text) in [
            (0u64, "1970-01-01 00:00"),
            (951_782_400, "2000-02-29 00:00"),
            (1_700_000_000, "2023-11-14 22:00"),
            (4_107_542_399, "2100-02-28 23:00"),
            (4_107_542_400, "2100-03-01 00:00"),
        ] {
            assert_eq!(super::hour_utc(seconds * 1000), text);
        }
    }
}
