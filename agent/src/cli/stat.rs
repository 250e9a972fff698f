//! `cache stat`: totals by disk, or a line an interval in the manner of vmstat.

use std::io::Write;
use std::time::Duration;

use prestage_integration::api::types::{CacheStat, Counters};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::render::{now_unix_ms, percent, wait_ms};
use super::table::{Align, Table};
use super::{Failure, print_json, print_json_line};
use crate::client::Client;
use crate::config::units::human_bytes;

/// Lines between headers on a terminal of unknown height.
const SCREENFUL: u64 = 22;

/// What `cache stat` was asked.
#[derive(Debug, Clone)]
pub(super) struct StatArgs {
    pub(super) interval: Option<f64>,
    pub(super) count: Option<u64>,
    pub(super) disk: Option<String>,
    pub(super) json: bool,
    /// Lines of the terminal; `None` when the output is no terminal: the header then stands once.
    pub(super) terminal_lines: Option<u16>,
}

pub(super) async fn run(client: &Client, args: &StatArgs, out: &mut impl Write) -> Result<(), Failure> {
    let disk = args.disk.as_deref();
    let mut earlier = fetch(client, disk).await?;
    let Some(seconds) = args.interval else {
        if args.json {
            return print_json(out, &earlier);
        }
        out.write_all(totals(&earlier).as_bytes())?;
        return Ok(());
    };
    let period = Duration::from_secs_f64(seconds);
    let mut ticks = interval_at(Instant::now() + period, period);
    // Late lines are late; catching up with a burst of them would print intervals of no length.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let screenful = args.terminal_lines.map(|lines| if lines > 3 { u64::from(lines) - 2 } else { SCREENFUL });
    let mut line = 0u64;
    loop {
        if !args.json && screenful.map_or(line == 0, |lines| line.is_multiple_of(lines)) {
            writeln!(out, "{HEADER}")?;
            out.flush()?;
        }
        ticks.tick().await;
        let now = fetch(client, disk).await?;
        if args.json {
            print_json_line(out, &now)?;
        } else {
            if now.started_unix_ms != earlier.started_unix_ms {
                writeln!(out, "# prestaged was restarted; counters began again")?;
                earlier = CacheStat::default();
            }
            writeln!(out, "{}", rates(&earlier, &now, now_unix_ms()))?;
        }
        // A line is read as it comes, also through a pipe.
        out.flush()?;
        earlier = now;
        line += 1;
        if args.count.is_some_and(|count| line >= count) {
            return Ok(());
        }
    }
}

/// The counters; of one disk when asked, which then also is the total.
async fn fetch(client: &Client, disk: Option<&str>) -> Result<CacheStat, Failure> {
    let mut stat: CacheStat = client.get("/v1/cache/stat").await?;
    let Some(name) = disk else { return Ok(stat) };
    let Some(only) = stat.disks.get(name) else {
        let known: Vec<&str> = stat.disks.keys().map(String::as_str).collect();
        let known =
            if known.is_empty() { "there are none".to_owned() } else { format!("there are {}", known.join(", ")) };
        return Err(Failure::Failed(format!("there is no disk `{name}`; {known}")));
    };
    stat.total = only.counters;
    stat.disks.retain(|key, _| key == name);
    Ok(stat)
}

fn served(counters: &Counters) -> u64 {
    counters.served_ram + counters.served_ssd + counters.served_store
}

/// Used of what arrived. Within an interval more may be used than arrives, which is still all of it.
fn used(counters: &Counters) -> u64 {
    counters.prefetch_used_bytes.min(counters.prefetch_completed_bytes)
}

/// Two lines of 80 columns: what is counted, and in which unit.
const HEADER: &str = concat!(
    "                 --from, %------   wait -----------MB/s---------- prec late\n",
    "    time reads/s  ram  ssd store     ms   read write  ahead  store    %   /s err"
);

/// A share in four columns: with a decimal below 100.
fn share(part: u64, whole: u64) -> String {
    let text = percent(part, whole);
    if text == "100.0" { "100".to_owned() } else { text }
}

/// One line: what happened between two readings.
fn rates(earlier: &CacheStat, now: &CacheStat, unix_ms: u64) -> String {
    let delta = now.total.since(&earlier.total);
    let elapsed_s = now.at_us.saturating_sub(earlier.at_us).max(1) as f64 / 1e6;
    let rate = |value: u64| value as f64 / elapsed_s;
    let mb = |bytes: u64| rate(bytes) / 1e6;
    let served = served(&delta);
    let day_s = unix_ms / 1000 % 86_400;
    format!(
        "{:02}:{:02}:{:02} {:>7.0} {:>4} {:>4} {:>5} {:>6} {:>6.1} {:>5.1} {:>6.1} {:>6.1} {:>4} {:>4.0} {:>3}",
        day_s / 3600,
        day_s / 60 % 60,
        day_s % 60,
        rate(delta.reads),
        share(delta.served_ram, served),
        share(delta.served_ssd, served),
        share(delta.served_store, served),
        wait_ms(&delta),
        mb(delta.read_bytes),
        mb(delta.write_bytes),
        mb(delta.prefetch_completed_bytes),
        mb(delta.store_read_bytes),
        share(used(&delta), delta.prefetch_completed_bytes),
        rate(delta.prefetch_late),
        delta.read_errors,
    )
}

/// Totals since the start, by disk: one table of reads and one of bytes, as both do not fit a line of 80 columns.
fn totals(stat: &CacheStat) -> String {
    let mut reads = Table::new(&[
        ("DISK", Align::Left),
        ("READS", Align::Right),
        ("RAM %", Align::Right),
        ("SSD %", Align::Right),
        ("STORE %", Align::Right),
        ("WAIT MS", Align::Right),
        ("LATE", Align::Right),
        ("ERRORS", Align::Right),
    ]);
    let mut bytes = Table::new(&[
        ("DISK", Align::Left),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("FROM STORE", Align::Right),
        ("PREFETCHED", Align::Right),
        ("PRECISION %", Align::Right),
    ]);
    let mut row = |name: &str, counters: &Counters| {
        let served = served(counters);
        reads.row([
            name.to_owned(),
            counters.reads.to_string(),
            percent(counters.served_ram, served),
            percent(counters.served_ssd, served),
            percent(counters.served_store, served),
            wait_ms(counters),
            counters.prefetch_late.to_string(),
            counters.read_errors.to_string(),
        ]);
        bytes.row([
            name.to_owned(),
            human_bytes(counters.read_bytes),
            human_bytes(counters.write_bytes),
            human_bytes(counters.store_read_bytes),
            human_bytes(counters.prefetch_completed_bytes),
            percent(used(counters), counters.prefetch_completed_bytes),
        ]);
    };
    for (name, disk) in &stat.disks {
        row(name, &disk.counters);
    }
    row("total", &stat.total);
    format!("{}\n{}", reads.render(), bytes.render())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at_s: u64, reads: u64, ram: u64, wait_us: u64) -> CacheStat {
        let total = Counters {
            reads,
            served_ram: ram,
            served_store: reads - ram,
            read_wait_us: wait_us,
            read_bytes: reads * 4096,
            prefetch_completed_bytes: reads * 1000,
            prefetch_used_bytes: reads * 900,
            store_read_bytes: reads * 2000,
            ..Counters::default()
        };
        CacheStat { at_us: at_s * 1_000_000, total, ..CacheStat::default() }
    }

    #[test]
    fn a_line_is_of_its_interval_alone_and_stands_under_its_header() {
        let line = rates(&reading(10, 1000, 0, 9_000_000), &reading(12, 3000, 1500, 10_000_000), 1_700_000_000_000);
        assert_eq!(
            format!("{HEADER}\n{line}"),
            concat!(
                "                 --from, %------   wait -----------MB/s---------- prec late\n",
                "    time reads/s  ram  ssd store     ms   read write  ahead  store    %   /s err\n",
                "22:13:20    1000 75.0  0.0  25.0   0.50    4.1   0.0    1.0    2.0 90.0    0   0"
            )
        );
        assert!(HEADER.lines().chain([line.as_str()]).all(|line| line.len() <= 80));
    }

    #[test]
    fn an_idle_interval_has_dashes_not_nan() {
        let line = rates(&reading(10, 5, 5, 5), &reading(11, 5, 5, 5), 0);
        assert_eq!(line, "00:00:00       0    -    -     -      -    0.0   0.0    0.0    0.0    -    0   0");
    }
}
