//! `advise`: how much RAM a machine's disks are worth, from its own history.
//!
//! - `sweep.rs`: the replays and the choice
//! - `ssd.rs`: a model of the SSD tier
//! - `text.rs`, `svg.rs`: the answer on a terminal, and as a chart

mod ssd;
mod svg;
mod sweep;
mod text;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use prestage_integration::api::types::{Disk, DiskList};
use prestage_predictor::Op;
use prestage_replay::Request;
use prestage_replay::trace::{MAX_OFFSET, MAX_REQUEST_BYTES};
use serde::Serialize;

use super::render::{count, now_unix_ms};
use super::{Failure, print_json};
use crate::client::{Client, encode};
use crate::config::units::{human_duration, parse_duration};
use crate::models::priority::become_idle;
use sweep::{Advice, Extent, SSD_US};

/// Reads below which the answer would be about first reads and chance.
const READS_MIN: u64 = 10_000;
/// The newest requests of a machine that are replayed: 48 MiB of memory, minutes of two cores.
const REQUESTS_MAX: usize = 2_000_000;
/// Reads that waited for the store from which on their mean counts as measured.
const MEASURED: u64 = 100;
/// The store's latency where it is neither measured nor given, µs.
const STORE_US: f64 = 1000.0;

#[derive(Debug, Args)]
#[command(long_about = "Replay a machine's recorded history at several sizes of the RAM and SSD tiers and at several \
    thresholds, and recommend the smallest that is within 2 points of the fastest; a point is what one percent of hits is \
    worth, a hundredth of the store's latency. No prefetch is recommended where it is as fast, within half a point, and loads \
    less from the store.\n\nThe replay runs here, at the lowest priority, with the policy and the \
    predictor that prestaged runs. Model of a read: from RAM 10 us; from the SSD tier 100 us; otherwise the store's latency, \
    as measured by prestaged for these disks since it started, behind a link of 500 MB/s. RAM starts empty and nothing is \
    learned yet; writes bring nothing in. Blocks that were read are on the SSD at once, the clock algorithm decides which leave; what is there is not \
    prefetched. Several disks share the tiers, as they do in prestaged; other machines are left out.\n\nThe newest 2 million \
    requests are replayed. The last minute's may not be in the database yet.")]
pub struct AdviseArgs {
    /// Name or UUID of the machine, or name of one disk
    pub vm: String,
    /// History of so long, such as 36h or 7d [default: all there is]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub since: Option<Duration>,
    /// Latency of the store in microseconds [default: as measured]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub store_us: Option<u64>,
    /// Write a chart of hit ratio over RAM size
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// How long the store takes, and how that is known.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct StoreLatency {
    us: f64,
    source: LatencySource,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum LatencySource {
    Measured,
    Given,
    Assumed,
}

/// The whole answer.
#[derive(Debug, Serialize)]
struct Answer {
    vm: String,
    disks: Vec<String>,
    history: Extent,
    /// Older requests that were left out.
    left_out: u64,
    /// Requests that are missing from the history.
    missing: u64,
    store_latency: StoreLatency,
    #[serde(flatten)]
    advice: Advice,
}

pub(super) async fn run(client: &Client, args: AdviseArgs, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let disks = disks_of(client, &args.vm).await?;
    let since_us = args.since.map_or(0, |since| {
        let since_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
        now_unix_ms().saturating_mul(1000).saturating_sub(since_us)
    });
    let mut history = History::default();
    let mut base = 0;
    for disk in &disks {
        history.read(client, &disk.name, since_us, base).await?;
        // Disks lie one behind the other, as if they were one storage.
        base += disk.state.capacity_bytes.next_multiple_of(1 << 28);
    }
    let (requests, left_out, missing) = history.finish();
    let extent = Extent::of(&requests);
    enough(&args.vm, &extent)?;
    let store_latency = store_latency(&disks, args.store_us);
    let watched = io::stderr().is_terminal();
    let progress = move |done: usize, all: usize| {
        if watched {
            eprint!("\r\x1b[K{done} of {all} replays");
        }
    };
    let names = disks.iter().map(|disk| disk.name.clone()).collect();
    let replay = move || {
        // The guests and the daemon come first. Refused: then it runs as it is.
        let _ = become_idle();
        (sweep::sweep(&requests, &extent, store_latency.us, &progress), extent)
    };
    let (advice, extent) = tokio::task::spawn_blocking(replay)
        .await
        .map_err(|error| Failure::Failed(format!("the replay failed: {error}")))?;
    if watched {
        eprint!("\r\x1b[K");
    }
    let advice = advice.map_err(Failure::Failed)?;
    let answer = Answer { vm: args.vm, disks: names, history: extent, left_out, missing, store_latency, advice };
    if let Some(path) = &args.svg {
        std::fs::write(path, svg::chart(&answer))
            .map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))?;
    }
    if json {
        return print_json(out, &answer);
    }
    Ok(out.write_all(text::answer(&answer).as_bytes())?)
}

/// Disks of a machine, or the one of that name.
async fn disks_of(client: &Client, vm: &str) -> Result<Vec<Disk>, Failure> {
    let all = client.get::<DiskList>("/v1/disks").await?.disks;
    let of_vm: Vec<Disk> = all.iter().filter(|disk| disk.vm.as_deref() == Some(vm)).cloned().collect();
    let found = if of_vm.is_empty() { all.into_iter().filter(|disk| disk.name == vm).collect() } else { of_vm };
    if found.is_empty() {
        let hint = "`prestagectl disk list` shows both";
        return Err(Failure::Failed(format!(
            "no disk that prestaged serves belongs to `{vm}` or has that name; {hint}"
        )));
    }
    Ok(found)
}

fn enough(vm: &str, extent: &Extent) -> Result<(), Failure> {
    if extent.reads >= READS_MIN {
        return Ok(());
    }
    let reads = count(extent.reads, "read", "reads");
    let wait = match extent.reads {
        0 => "it is recorded while the machine runs, unless learner.history is off".to_owned(),
        reads => {
            let left_us = extent.span_us as f64 / reads as f64 * (READS_MIN - reads) as f64;
            format!("at that rate in about {} more", human_duration(Duration::from_secs_f64(left_us / 1e6)))
        }
    };
    let span = human_duration(Duration::from_micros(extent.span_us));
    Err(Failure::Failed(format!(
        "the history of {vm} is too short to advise on: {reads} within {span}, {READS_MIN} are needed; {wait}"
    )))
}

/// Mean of the reads that waited for the store, from all that RAM did not serve.
fn store_latency(disks: &[Disk], given: Option<u64>) -> StoreLatency {
    if let Some(us) = given {
        return StoreLatency { us: us as f64, source: LatencySource::Given };
    }
    let sum = |of: fn(&Disk) -> u64| disks.iter().map(of).sum::<u64>();
    let store = sum(|disk| disk.counters.served_store);
    if store < MEASURED {
        return StoreLatency { us: STORE_US, source: LatencySource::Assumed };
    }
    let ssd_us = sum(|disk| disk.counters.served_ssd) as f64 * SSD_US;
    let us = (sum(|disk| disk.counters.read_wait_us) as f64 - ssd_us) / store as f64;
    StoreLatency { us: us.max(SSD_US), source: LatencySource::Measured }
}

/// The newest requests of several disks.
#[derive(Debug, Default)]
struct History {
    requests: Vec<Request>,
    left_out: u64,
    missing: u64,
}

impl History {
    /// Adds a disk's; its offsets begin at `base`.
    async fn read(&mut self, client: &Client, disk: &str, since_us: u64, base: u64) -> Result<(), Failure> {
        let path = format!("/v1/disks/{}/history?since_us={since_us}", encode(disk));
        let mut rows = client.rows(&path).await?;
        let mut newest = VecDeque::new();
        let broken = |why: String| Failure::Failed(format!("the history of disk `{disk}` cannot be read: {why}"));
        loop {
            match rows.next().await.map_err(|error| broken(error.to_string()))? {
                None => return Err(broken("prestaged closed the connection".to_owned())),
                Some(line) if line.starts_with("# end:") => break,
                Some(line) => {
                    if let Some(missing) = line.strip_prefix("# missing ") {
                        self.missing += super::record::leading_number(missing);
                    } else if let Some(request) = request(&line, base) {
                        if newest.len() == REQUESTS_MAX {
                            newest.pop_front();
                            self.left_out += 1;
                        }
                        newest.push_back(request);
                    } else if line.starts_with(|c: char| c.is_ascii_digit()) {
                        return Err(broken(format!("`{line}` is not ts_us,op,offset,len")));
                    }
                }
            }
        }
        self.requests.extend(newest);
        Ok(())
    }

    /// All in order of time, what was left out as too old, what is missing.
    fn finish(mut self) -> (Vec<Request>, u64, u64) {
        self.requests.sort_by_key(|request| request.at_us);
        let old = self.requests.len().saturating_sub(REQUESTS_MAX);
        self.requests.drain(..old);
        (self.requests, self.left_out + old as u64, self.missing)
    }
}

/// A row's request; `None` if it is none, or beyond what can be replayed.
fn request(row: &str, base: u64) -> Option<Request> {
    let mut fields = row.split(',');
    let mut field = || fields.next();
    let at_us = field()?.parse().ok()?;
    let op = match field()? {
        "R" => Op::Read,
        "W" => Op::Write,
        "D" => Op::Discard,
        _ => return None,
    };
    let offset: u64 = field()?.parse().ok()?;
    let len = field()?.parse().ok()?;
    let offset = offset.checked_add(base)?;
    (len > 0 && u64::from(len) <= MAX_REQUEST_BYTES && offset <= MAX_OFFSET - MAX_REQUEST_BYTES).then_some(Request {
        at_us,
        op,
        offset,
        len,
    })
}
