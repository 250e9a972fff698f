//! The hot path by Criterion, an access each: a recorded boot, and a guest that mixes runs, loops and random reads. Then the
//! spread over single accesses (p50, p99), which a mean does not show. `cargo bench -p prestage-predictor --bench access`

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use prestage_predictor::{Access, AccessConfig, AccessPredictor, Candidate, Op};
use std::hint::black_box;
use std::time::Instant;

fn read(at_us: u64, first: u64, pages: u32) -> Access {
    Access { at_us, vm: 1, op: Op::Read, first, pages }
}

/// Rows `ts_us,op,offset,len` of the recorded boot.
fn boot() -> Vec<Access> {
    let rows = include_str!("../testdata/vm_boot1.csv").lines();
    rows.filter_map(|row| {
        let mut fields = row.split(',');
        let at_us = fields.next()?.parse().ok()?;
        let op = if fields.next()? == "R" { Op::Read } else { Op::Write };
        let (offset, len): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let (first, end) = (offset / 4096, (offset + len).div_ceil(4096));
        Some(Access { at_us, vm: 1, op, first, pages: u32::try_from(end - first).ok()? })
    })
    .collect()
}

/// A quarter each: one of eight runs, a loop over 3000 places, random reads in a file, random reads anywhere.
fn mixed(count: u64) -> Vec<Access> {
    let mut seed = 88_172_645_463_325_252u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut runs = [0u64; 8];
    (0..count)
        .map(|i| match i % 4 {
            0 => {
                let run = (random() % 8) as usize;
                runs[run] += 8;
                read(i * 200, run as u64 * 10_000_000 + runs[run], 8)
            }
            1 => read(i * 200, 100_000_000 + (i / 4 % 3000) * 7919 % 65_536, 2),
            2 => read(i * 200, 200_000_000 + random() % 20_000, 1),
            _ => read(i * 200, random() % 300_000_000, 4),
        })
        .collect()
}

fn hot_path(c: &mut Criterion) {
    let mut group = c.benchmark_group("observe and predict");
    group.throughput(Throughput::Elements(1));
    for (name, accesses) in [("boot", boot()), ("mixed", mixed(200_000))] {
        let mut predictor = AccessPredictor::new(AccessConfig::default());
        let mut out: Vec<Candidate> = Vec::with_capacity(1024);
        let mut step = |access: &Access| {
            predictor.observe(access);
            out.clear();
            predictor.predict(access.at_us, &mut out);
            black_box(&out);
        };
        let mut next = accesses.iter().cycle();
        group.bench_function(name, |b| b.iter(|| next.next().into_iter().for_each(&mut step)));
        let mut times: Vec<u64> = accesses
            .iter()
            .map(|access| {
                let start = Instant::now();
                step(access);
                u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
            })
            .collect();
        times.sort_unstable();
        let at = |share: usize| times.get(times.len() * share / 1000).copied().unwrap_or(0);
        println!("{name}: p50 {} ns, p90 {} ns, p99 {} ns (with the clock's own cost)", at(500), at(900), at(990));
    }
    group.finish();
}

criterion_group!(benches, hot_path);
criterion_main!(benches);
