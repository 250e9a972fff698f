//! What a daemon costs that serves many disks and is asked for nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use prestage_tests::daemon::{DaemonOptions, Prestaged};

use super::load::{Device, Op};
use super::report::Figure;
use super::vhost;
use super::{Bench, content, cpu};

pub(super) const FIGURE: &str = "idle with 50 disks";
const DISKS: usize = 50;
/// Profiles are saved and figures taken every few seconds: what comes now and then is to be in it.
const WATCHED: Duration = Duration::from_secs(30);
const SETTLING: Duration = Duration::from_secs(5);
const PAGE_BYTES: usize = 4096;

/// Every disk has a guest, which has read something and reads no more.
pub(super) fn run(bench: &Bench<'_>) -> Result<Figure> {
    let mut more = String::new();
    for disk in 0..DISKS {
        let path = bench.scratch.join(format!("idle-{disk}.raw"));
        content::make(&path, 64 << 20, &[(0, PAGE_BYTES as u64)])?;
        more += &format!("[[disk]]\nname = \"d{disk}\"\nstore = \"{}\"\n", path.display());
    }
    let daemon = Prestaged::start(&DaemonOptions {
        under: bench.places.on_server().to_vec(),
        more,
        ..DaemonOptions::default()
    })?;
    let mut guests = Vec::new();
    for disk in 0..DISKS {
        let shape = vhost::Shape { queues: 1, depth: 1, len_bytes: PAGE_BYTES, read_only: false };
        let mut guest = vhost::connect(&daemon.disk_socket(&format!("d{disk}"))?, shape)?.remove(0);
        guest.submit(0, Op::Read, 0, PAGE_BYTES)?;
        guest.wait(&mut Vec::new())?;
        guests.push(guest);
    }
    std::thread::sleep(SETTLING);
    bench.progress.step(&format!("{DISKS} disks, {} guests: idle from now on", guests.len()));
    let pid = daemon.pid().context("prestaged has ended")?;
    let (used, began) = (cpu::used(pid)?, Instant::now());
    std::thread::sleep(WATCHED);
    let used = cpu::used(pid)?.saturating_sub(used);
    let share = used.as_secs_f64() / began.elapsed().as_secs_f64();
    Ok(Figure { name: FIGURE.to_owned(), value: share * 100.0, unit: "% of a core" })
}
