//! `bench datapath`: what a request costs, beside other block servers, in one run.
//!
//! Every server runs on one core and the client on another. Servers take turns round by round, each with a connection of
//! its own; rows are medians. Answers are compared with what belongs there. RAM hits count as such only if the daemon's own
//! counters say so. The client alone, against servers that answer at once without data, is the ceiling of what is shown.
//!
//! - [`cases`]: what is measured; [`servers`]: who answers
//! - [`load`]: the closed loop of a client; [`vhost`] and [`nbd`]: its two ways to a disk; [`ceiling`]: nobody behind them
//! - [`content`]: what is on the disks; [`cpu`]: processors and what processes use of them
//! - [`scale`]: many disks; [`idle`]: nothing to do; [`fill`]: memory of the index; [`launch`]: a large SSD tier
//! - [`report`], [`verdict`]: medians, table, JSON, and what they say

mod cases;
mod ceiling;
mod content;
mod cpu;
mod fill;
mod idle;
mod launch;
mod load;
mod nbd;
mod report;
mod scale;
mod servers;
mod verdict;
mod vhost;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use prestage_tests::paths::Scratch;

use crate::host::Host;
use crate::progress::Progress;
use crate::record::write_json;
use cases::{Case, Suite};
use cpu::Places;
use load::{Job, Op};
use report::{Figure, Missing, Report, Row, Sample};
use servers::{Server, Serving, Who};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds of every server in every case
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long a round of one server in one case lasts
    #[arg(long, default_value_t = 2.0, value_name = "SECONDS")]
    seconds: f64,
    /// What is measured
    #[arg(long, value_delimiter = ',', default_values_t = [Part::Hits, Part::Nbd, Part::Direct, Part::Scale, Part::Idle, Part::Memory, Part::Launch])]
    parts: Vec<Part>,
    /// Only these servers
    #[arg(long, value_delimiter = ',')]
    servers: Vec<Who>,
    /// Only cases whose name has one of these words
    #[arg(long, value_delimiter = ',', value_name = "WORD")]
    cases: Vec<String>,
    /// Size of the disk that is read from RAM
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..))]
    size_mib: u64,
    /// Size of the disk that is read and written past the caches
    #[arg(long, default_value_t = 1024, value_name = "MIB", value_parser = clap::value_parser!(u64).range(256..))]
    direct_mib: u64,
    /// End with an error where a claim fails that was checked
    #[arg(long)]
    check: bool,
    /// Where the figures are written
    #[arg(long, default_value = "target/datapath.json")]
    json: PathBuf,
    /// Be the server that answers at once, at this socket
    #[arg(long, hide = true)]
    answer_only: Option<PathBuf>,
}

/// Kinds of measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Reads from RAM beside qemu-storage-daemon
    Hits,
    /// The same over NBD, beside nbdkit and qemu-nbd
    Nbd,
    /// Misses and writes beside qemu-storage-daemon with direct I/O
    Direct,
    /// Up to 300 disks
    Scale,
    /// 50 disks that nobody reads
    Idle,
    /// Memory of the index
    Memory,
    /// The start with an SSD tier of a TiB
    Launch,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = clap::ValueEnum::to_possible_value(self);
        f.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// What all measurements need.
struct Bench<'a> {
    options: &'a Options,
    scratch: Scratch,
    places: Places,
    progress: Progress,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if let Some(socket) = &options.answer_only {
        return ceiling::serve(socket, options.size_mib << 20);
    }
    ensure!((0.05..=600.0).contains(&options.seconds), "--seconds is .05 to 600");
    let places = Places::find()?;
    let bench = Bench { options, scratch: Scratch::large()?, places, progress: Progress::new() };
    let asked = |part| options.parts.contains(&part);
    let mut report = Report {
        host: Host::find(),
        rounds: options.rounds,
        seconds: options.seconds,
        rows: Vec::new(),
        missing: Vec::new(),
        figures: Vec::new(),
        claims: Vec::new(),
    };
    if asked(Part::Hits) || asked(Part::Nbd) {
        let rate = cpu::copy_bandwidth(places.server, 128 << 10, 8)?;
        report.figures.push(Figure {
            name: "one core copies from RAM".into(),
            value: rate / 1e6,
            unit: "MB/s, the limit",
        });
    }
    // This thread is the client; what it starts goes to the servers' core by itself.
    cpu::pin(places.client)?;
    if asked(Part::Hits) {
        bench.suite(&cases::hits(options.size_mib << 20), &mut report)?;
    }
    if asked(Part::Nbd) {
        bench.suite(&cases::nbd(options.size_mib << 20), &mut report)?;
    }
    if asked(Part::Direct) {
        bench.suite(&cases::direct(options.direct_mib << 20), &mut report)?;
    }
    if asked(Part::Scale) {
        scale::run(&bench, &mut report)?;
    }
    if asked(Part::Idle) {
        report.figures.push(idle::run(&bench)?);
    }
    if asked(Part::Memory) {
        report.figures.extend(fill::run(&bench)?);
    }
    if asked(Part::Launch) {
        report.figures.extend(launch::run(&bench)?);
    }
    let (rows, figures) = (&report.rows, &report.figures);
    let mut claims = verdict::of_rows(rows);
    claims.push(verdict::flat("Cost of a request within 20 % from 1 to 300 disks", rows, 0.2));
    claims.push(verdict::at_most("Idle: at most .5 % of a core with 50 disks", figures, idle::FIGURE, 0.5));
    claims.push(verdict::at_most("At most 64 bytes of index a block of 64 KiB", figures, fill::FIGURE, 64.0));
    claims.push(verdict::at_most("Start with an SSD tier of 1 TiB within 2 s", figures, launch::FIGURE, 2.0));
    claims.push(verdict::at_most("An upgrade takes at most 1 s from guests", figures, launch::UPGRADE, 1.0));
    report.claims = claims;
    print!("{}{}", report::render(&report), verdict::render(&report.claims));
    write_json(&report, &options.json)?;
    println!("\nfigures: {}", options.json.display());
    let failed = report.claims.iter().filter(|claim| claim.checked > 0 && !claim.holds).count();
    ensure!(!options.check || failed == 0, "{failed} claims fail, see the verdict");
    Ok(())
}

impl Bench<'_> {
    fn time(&self) -> Duration {
        Duration::from_secs_f64(self.options.seconds)
    }

    /// Measures the cases of a suite, server by server in every round.
    fn suite(&self, suite: &Suite, report: &mut Report) -> Result<()> {
        let options = self.options;
        let words = &options.cases;
        let wanted = |case: &&Case| words.is_empty() || words.iter().any(|word| case.name.contains(word.as_str()));
        let cases: Vec<Case> = suite.cases.iter().filter(wanted).copied().collect();
        let who = suite.servers.iter().filter(|who| options.servers.is_empty() || options.servers.contains(who));
        let mut who: Vec<Who> = who.copied().collect();
        for absent in who.extract_if(.., |who| !who.is_there().unwrap_or(false)) {
            let why = "not there: this build's prestaged has no NBD export";
            report.missing.extend(cases.iter().map(|case| Missing { case: case.name, server: absent.name(), why }));
        }
        if cases.is_empty() || who.is_empty() {
            return Ok(());
        }
        let writes = cases.iter().any(|case| case.job.op == Op::Write);
        let size_bytes = cases.iter().map(|case| case.job.start_bytes + case.job.span_bytes).max().unwrap_or(0);
        let serving = Serving { read_only: !writes, direct: suite.direct, size_bytes };
        let shared = self.scratch.join("shared.raw");
        if !writes {
            self.make(&shared, size_bytes, suite.direct)?;
        }
        let mut servers = Vec::new();
        for who in who {
            let own = self.scratch.join(format!("{who:?}.raw").to_lowercase());
            if writes {
                self.make(&own, size_bytes, suite.direct)?;
            }
            let disk = if writes { &own } else { &shared };
            let server = Server::start(who, disk, serving, &self.scratch, self.places)?;
            if who.is_ours() && !suite.direct {
                warm(&server, size_bytes)?;
            }
            servers.push(server);
        }
        self.progress.step("servers run, disks are made");
        let mut samples = vec![vec![Vec::new(); servers.len()]; cases.len()];
        for round in 0..options.rounds {
            for (case, samples) in cases.iter().zip(&mut samples) {
                // Another one goes first each time.
                for turn in 0..servers.len() {
                    let at = (turn + round as usize) % servers.len();
                    self.progress.now(&format!("round {}: {}: {}", round + 1, case.name, servers[at].who.name()));
                    let sample = self.measure(&servers[at], case, u64::from(round));
                    samples[at].push(sample.with_context(|| format!("{}: {}", case.name, servers[at].who.name()))?);
                }
            }
            self.progress.step(&format!("round {} of {}", round + 1, options.rounds));
        }
        for (case, samples) in cases.iter().zip(samples) {
            for (server, samples) in servers.iter().zip(samples) {
                report.rows.push(Row::new(case.name, server.who, case.job.block_bytes, samples));
            }
        }
        for server in &servers {
            if let (Some(unseen), Some(counted)) = (server.unseen()?, server.counters()?) {
                #[allow(clippy::cast_precision_loss)] // a percentage
                let value = unseen as f64 / counted.reads.max(1) as f64 * 100.0;
                let kind = suite.cases.first().map_or("", |case| case.name).split(',').next().unwrap_or_default();
                let name = format!("{kind} and the like: accesses not shown to the learner");
                report.figures.push(Figure { name, value, unit: "% of the reads" });
            }
            if let (Who::Prestaged, Ok(pid)) = (server.who, server.pid()) {
                let threads: Vec<String> = cpu::used_by_thread(pid)
                    .iter()
                    .take(5)
                    .map(|(name, used)| format!("{name} {:.2} s", used.as_secs_f64()))
                    .collect();
                self.progress.step(&format!("prestaged's processor time: {}", threads.join(", ")));
            }
        }
        Ok(())
    }

    fn make(&self, disk: &Path, size_bytes: u64, direct: bool) -> Result<()> {
        content::make(disk, size_bytes, &[(0, size_bytes)])?;
        // Into the page cache, where those want it that read through it.
        if direct { Ok(()) } else { content::read_through(disk) }
    }

    /// One round of a case with a server.
    fn measure(&self, server: &Server, case: &Case, turn: u64) -> Result<Sample> {
        let job = Job { check: case.job.check && server.who.has_data(), ..case.job };
        let mut device = server.connect(job.depth, job.block_bytes)?;
        // The connection's first requests are no measure: threads wake, memory is touched, pollers adapt.
        load::run(device.as_mut(), &job, self.time() / 8, turn + 1000)?;
        let (pid, before) = (server.pid()?, server.counters()?);
        let used = cpu::used(pid)?;
        let seen = load::run(device.as_mut(), &job, self.time(), turn)?;
        let used = cpu::used(pid)?.saturating_sub(used);
        let ram_share = match (before, server.counters()?) {
            (Some(before), Some(after)) => share(&after.since(&before)),
            _ => None,
        };
        #[allow(clippy::cast_precision_loss)] // far below 2^52 requests
        let requests = seen.requests as f64;
        Ok(Sample {
            iops: seen.iops(),
            p50_us: seen.p50_us,
            p99_us: seen.p99_us,
            cpu_us_per_request: used.as_secs_f64() * 1e6 / requests,
            ram_share,
        })
    }
}

/// Share of reads that RAM served alone.
#[allow(clippy::cast_precision_loss)] // shown with two digits
fn share(counted: &prestage_tests::daemon::Counters) -> Option<f64> {
    (counted.reads > 0).then(|| counted.served_ram as f64 / counted.reads as f64)
}

/// Reads all of a disk until the daemon says that RAM served all of it.
fn warm(server: &Server, size_bytes: u64) -> Result<()> {
    let mut device = server.connect(8, 64 << 10)?;
    for _ in 0..5 {
        let before = server.counters()?.context("no daemon of this project")?;
        let mut done = Vec::new();
        for offset in (0..size_bytes).step_by(64 << 10) {
            device.submit(0, Op::Read, offset, 64 << 10)?;
            done.clear();
            device.wait(&mut done)?;
            ensure!(
                content::is_right(device.buffer(0, 64 << 10), offset, 0),
                "the warm-up read a wrong block at {offset}"
            );
        }
        let seen = server.counters()?.context("no daemon of this project")?.since(&before);
        if seen.served_ram == seen.reads && seen.reads > 0 {
            return Ok(());
        }
    }
    anyhow::bail!("after five passes the disk is not in RAM: what is measured would be no hits")
}
