//! What the hot path is timed, counted and checked on: the same accesses for the benches and for the test of allocations.
//!
//! No load has phases: their recordings grow with what a guest reads, on purpose.

#![allow(dead_code, reason = "part of several programs, each of which takes what it needs")]

use prestage_predictor::{Access, AccessConfig, AccessPredictor, Candidate, Op};
use std::hint::black_box;
use std::time::Instant;

/// Candidates that a caller has room for: far more than one access leads to.
const ROOM: usize = 1024;
/// Between two accesses of a made-up load, µs.
const PACE_US: u64 = 200;

/// Accesses by name; what is measured comes after a warm-up.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) name: &'static str,
    accesses: Vec<Access>,
    warm_up: usize,
}

impl Load {
    /// The accesses before what is measured.
    pub(crate) fn warm_up(&self) -> &[Access] {
        &self.accesses[..self.warm_up]
    }

    pub(crate) fn measured(&self) -> &[Access] {
        &self.accesses[self.warm_up..]
    }

    fn half(name: &'static str, accesses: Vec<Access>) -> Self {
        Self { name, warm_up: accesses.len() / 2, accesses }
    }
}

/// Every load:
///
/// - `boot`: the second half of a recorded boot, after the first
/// - `boot again`: the whole boot after the same one, which the log of reads then knows
/// - `streams`: 64 sequential streams of 4 VMs, twice as many as are followed, in random turns
/// - `random`: reads anywhere on a disk of 1.2 TB
/// - `mixed`: see [`mixed`]
pub(crate) fn all() -> [Load; 5] {
    let boot = boot();
    let end_us = boot.last().map_or(0, |last| last.at_us);
    let later = boot.iter().map(|access| Access { at_us: access.at_us + end_us, ..*access });
    let twice = boot.iter().copied().chain(later).collect();
    [
        Load::half("boot", boot),
        Load::half("boot again", twice),
        Load::half("streams", streams(50_000)),
        Load::half("random", random(50_000)),
        Load::half("mixed", mixed(100_000)),
    ]
}

fn read(at_us: u64, first: u64, pages: u32) -> Access {
    Access { at_us, vm: 1, op: Op::Read, first, pages }
}

/// Rows `ms,op,page,pages` of the recorded boot, with differences of time; its comments and marks are left out.
fn boot() -> Vec<Access> {
    let mut at_us = 0;
    let rows = include_str!("../../testdata/vm_boot1.csv").lines().filter(|row| !row.starts_with('#'));
    rows.filter_map(|row| {
        let mut fields = row.split(',');
        at_us += fields.next()?.parse::<u64>().ok()? * 1000;
        let op = match fields.next()? {
            "R" => Op::Read,
            "W" => Op::Write,
            _ => return None,
        };
        Some(Access { at_us, vm: 1, op, first: fields.next()?.parse().ok()?, pages: fields.next()?.parse().ok()? })
    })
    .collect()
}

/// Numbers that are the same on every run (xorshift, Marsaglia 2003).
fn numbers() -> impl FnMut() -> u64 {
    let mut seed = 88_172_645_463_325_252u64;
    move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    }
}

fn streams(count: u64) -> Vec<Access> {
    let mut next = numbers();
    let mut read_so_far = [0u64; 64];
    (0..count)
        .map(|i| {
            let stream = (next() % 64) as usize;
            read_so_far[stream] += 8;
            let first = stream as u64 * 1_000_000 + read_so_far[stream];
            Access { vm: stream as u64 % 4, ..read(i * PACE_US, first, 8) }
        })
        .collect()
}

fn random(count: u64) -> Vec<Access> {
    let mut next = numbers();
    (0..count).map(|i| read(i * PACE_US, next() % 300_000_000, 1 + (next() % 8) as u32)).collect()
}

/// A quarter each: one of eight runs, a loop over 3000 places, random reads in a file, random reads anywhere.
fn mixed(count: u64) -> Vec<Access> {
    let mut next = numbers();
    let mut runs = [0u64; 8];
    (0..count)
        .map(|i| match i % 4 {
            0 => {
                let run = (next() % 8) as usize;
                runs[run] += 8;
                read(i * PACE_US, run as u64 * 10_000_000 + runs[run], 8)
            }
            1 => read(i * PACE_US, 100_000_000 + (i / 4 % 3000) * 7919 % 65_536, 2),
            2 => read(i * PACE_US, 200_000_000 + next() % 20_000, 1),
            _ => read(i * PACE_US, next() % 300_000_000, 4),
        })
        .collect()
}

/// A predictor with default settings and a caller's room for what it hands out.
#[derive(Debug)]
pub(crate) struct HotPath {
    pub(crate) predictor: AccessPredictor,
    pub(crate) out: Vec<Candidate>,
}

impl HotPath {
    pub(crate) fn new() -> Self {
        Self { predictor: AccessPredictor::new(AccessConfig::default()), out: Vec::with_capacity(ROOM) }
    }

    /// One that has gone through a load's warm-up.
    pub(crate) fn warm(load: &Load) -> Self {
        let mut path = Self::new();
        load.warm_up().iter().for_each(|access| path.step(access));
        path
    }

    /// What the daemon does for an access.
    pub(crate) fn step(&mut self, access: &Access) {
        self.predictor.observe(access);
        self.out.clear();
        self.predictor.predict(access.at_us, &mut self.out);
        black_box(&self.out);
    }
}

/// Times of single accesses in ns, less what the clock itself takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) mean: f64,
    pub(crate) p50: u64,
    pub(crate) p99: u64,
}

impl Spread {
    /// Of the measured part of a load.
    pub(crate) fn of(load: &Load) -> Self {
        let clock_ns = at(&mut (0..10_000).map(|_| spent(|| ())).collect::<Vec<u64>>(), 50);
        let mut path = HotPath::warm(load);
        let mut times: Vec<u64> =
            load.measured().iter().map(|access| spent(|| path.step(access)).saturating_sub(clock_ns)).collect();
        let mean = times.iter().sum::<u64>() as f64 / times.len().max(1) as f64;
        Self { mean, p50: at(&mut times, 50), p99: at(&mut times, 99) }
    }
}

fn spent(work: impl FnOnce()) -> u64 {
    let start = Instant::now();
    work();
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn at(times: &mut [u64], percent: usize) -> u64 {
    times.sort_unstable();
    times.get(times.len() * percent / 100).copied().unwrap_or(0)
}
