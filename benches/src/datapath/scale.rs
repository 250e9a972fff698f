//! Many disks: 64 clients, each with a request at a time, on 1 to 300 exported disks. What they read altogether is the
//! same, so that a difference is the number of disks.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use prestage_tests::daemon::{DaemonOptions, Prestaged};

use super::load::{Device, Op, Random};
use super::report::{Report, Row, Sample};
use super::servers::{NO_TRAINING, Who};
use super::vhost::{self, Vhost};
use super::{Bench, cases, content, cpu, share};

const CLIENTS: usize = 64;
const DISKS: [usize; 4] = [1, 10, 100, 300];
const PAGE_BYTES: usize = 4096;
/// What one client reads.
const PART_BYTES: u64 = 2 << 20;

/// A daemon with so many disks, and the clients' connections.
struct Place {
    daemon: Prestaged,
    /// Each with the start of its part of the disk.
    clients: Vec<(Vhost, u64)>,
}

pub(super) fn run(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    let mut samples = vec![Vec::new(); DISKS.len()];
    let mut places = Vec::new();
    for disks in DISKS {
        bench.progress.now(&format!("{CLIENTS} clients, {disks} disks: start"));
        places.push(place(bench, disks).with_context(|| format!("{disks} disks"))?);
    }
    bench.progress.step("disks are made");
    for (disks, place) in DISKS.iter().zip(&places) {
        bench
            .progress
            .step(&format!("{disks} disks: {}", huge_pages(place.daemon.pid().context("prestaged has ended")?)?));
    }
    for round in 0..bench.options.rounds {
        for (at, place) in places.iter_mut().enumerate() {
            bench.progress.now(&format!("round {}: {}", round + 1, cases::ALL_SCALES[at]));
            drive(place, bench.time() / 8, u64::from(round) + 1000)?;
            let (pid, before) = (place.daemon.pid().context("prestaged has ended")?, place.daemon.counters()?);
            let used = cpu::used(pid)?;
            let (requests, elapsed, latency) = drive(place, bench.time(), u64::from(round))?;
            let used = cpu::used(pid)?.saturating_sub(used);
            let ram_share = share(&place.daemon.counters()?.since(&before));
            samples[at].push(Sample {
                iops: requests / elapsed.as_secs_f64(),
                p50_us: latency.0,
                p99_us: latency.1,
                cpu_us_per_request: used.as_secs_f64() * 1e6 / requests,
                ram_share,
            });
        }
        bench.progress.step(&format!("round {} of {}", round + 1, bench.options.rounds));
    }
    for (case, samples) in cases::ALL_SCALES.into_iter().zip(samples) {
        report.rows.push(Row::new(case, Who::Prestaged, PAGE_BYTES, samples));
    }
    Ok(())
}

/// How much of a process's memory is in huge pages: with small ones a request takes longer, whatever the number of disks.
fn huge_pages(pid: i32) -> Result<String> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let of = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?").trim().to_owned();
    Ok(format!("{} of {} in transparent huge pages", of("AnonHugePages:"), of("Anonymous:")))
}

/// Starts a daemon of its own with `disks` disks, and reads the clients' parts until they are in RAM.
fn place(bench: &Bench<'_>, disks: usize) -> Result<Place> {
    let mut more = format!("{NO_TRAINING}[export]\nmax_queues = {CLIENTS}\n");
    let size_bytes = PART_BYTES * CLIENTS as u64;
    let mut paths = Vec::new();
    for disk in 0..disks {
        let path = bench.scratch.join(format!("scale-{disks}-{disk}.raw"));
        // A client's part is where its number says, on whichever disk it is.
        let parts: Vec<(u64, u64)> =
            (disk..CLIENTS).step_by(disks).map(|client| (client as u64 * PART_BYTES, PART_BYTES)).collect();
        content::make(&path, size_bytes, &parts)?;
        more += &format!("[[disk]]\nname = \"d{disk}\"\nstore = \"{}\"\nread_only = true\n", path.display());
        paths.push(path);
    }
    let daemon = Prestaged::start(&DaemonOptions {
        ram_size: format!("{}MiB", (size_bytes >> 20) * 2),
        ssd_size: String::new(),
        under: bench.places.on_server().to_vec(),
        more,
        ..DaemonOptions::default()
    })?;
    let mut clients = Vec::new();
    for disk in 0..disks.min(CLIENTS) {
        let socket = daemon.disk_socket(&format!("d{disk}"))?;
        let own: Vec<usize> = (disk..CLIENTS).step_by(disks).collect();
        let shape = vhost::Shape { queues: own.len(), depth: 1, len_bytes: 64 << 10, read_only: true };
        let queues = vhost::connect(&socket, shape)?;
        clients.extend(queues.into_iter().zip(own).map(|(queue, client)| (queue, client as u64 * PART_BYTES)));
    }
    ensure!(clients.len() == CLIENTS, "{} clients", clients.len());
    let mut done = Vec::new();
    for pass in 0..3 {
        let before = daemon.counters()?;
        for (queue, part) in &mut clients {
            for offset in (*part..*part + PART_BYTES).step_by(64 << 10) {
                queue.submit(0, Op::Read, offset, 64 << 10)?;
                done.clear();
                queue.wait(&mut done)?;
                ensure!(content::is_right(queue.buffer(0, 64 << 10), offset, 0), "a wrong block at {offset}");
            }
        }
        let seen = daemon.counters()?.since(&before);
        if seen.reads == seen.served_ram {
            break;
        }
        ensure!(pass < 2, "after three passes the parts are not in RAM");
    }
    Ok(Place { daemon, clients })
}

/// All clients' requests, each client's next one as soon as its last is answered. Returns how many, in which time, and the
/// median and the 99th percentile of their latencies in microseconds.
fn drive(place: &mut Place, time: Duration, turn: u64) -> Result<(f64, Duration, (f64, f64))> {
    let mut random = Random::new(turn + 1);
    let mut next = |part: u64| part + random.below(PART_BYTES / PAGE_BYTES as u64) * PAGE_BYTES as u64;
    let mut begun = Vec::with_capacity(CLIENTS);
    let mut latencies_ns: Vec<u32> = Vec::with_capacity(1 << 20);
    let start = Instant::now();
    for (queue, part) in &mut place.clients {
        let offset = next(*part);
        queue.submit(0, Op::Read, offset, PAGE_BYTES)?;
        begun.push(Some((offset, Instant::now())));
    }
    let (mut under_way, mut elapsed, mut done) = (CLIENTS, Duration::ZERO, Vec::new());
    while under_way > 0 {
        ensure!(start.elapsed() < time + Duration::from_secs(30), "a request was not answered within 30 s");
        for ((queue, part), begun) in place.clients.iter_mut().zip(&mut begun) {
            let Some((offset, at)) = *begun else { continue };
            done.clear();
            // Sends what was begun, too.
            queue.look(&mut done)?;
            if done.is_empty() {
                continue;
            }
            let now = Instant::now();
            latencies_ns.push(u32::try_from((now - at).as_nanos()).unwrap_or(u32::MAX));
            elapsed = now - start;
            let right = content::looks_right(queue.buffer(0, PAGE_BYTES), offset, 0, latencies_ns.len() as u64);
            ensure!(right, "a read at {offset} brought what does not belong there");
            if elapsed >= time {
                (*begun, under_way) = (None, under_way - 1);
                continue;
            }
            let offset = next(*part);
            queue.submit(0, Op::Read, offset, PAGE_BYTES)?;
            *begun = Some((offset, Instant::now()));
        }
    }
    latencies_ns.sort_unstable();
    let at = |hundredth: usize| {
        let index = latencies_ns.len() * hundredth / 100;
        latencies_ns.get(index).map_or(0.0, |ns| f64::from(*ns) / 1e3)
    };
    #[allow(clippy::cast_precision_loss)] // far below 2^52
    let requests = latencies_ns.len() as f64;
    Ok((requests, elapsed, (at(50), at(99))))
}
