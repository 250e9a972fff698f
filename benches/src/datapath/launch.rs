//! How long a daemon takes to start that has a large SSD tier: new, and with what an earlier one left.

use std::time::Instant;

use anyhow::Result;
use prestage_tests::daemon::{DaemonOptions, Prestaged};

use super::load::{Device, Op};
use super::report::Figure;
use super::vhost;
use super::{Bench, content};

pub(super) const FIGURE: &str = "start with an SSD tier of 1 TiB";
const DISK_BYTES: u64 = 256 << 20;
const CHUNK_BYTES: usize = 64 << 10;

/// A sparse file of a TiB. The second start finds a disk's blocks in it.
pub(super) fn run(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let path = bench.scratch.join("launch.raw");
    content::make(&path, DISK_BYTES, &[(0, DISK_BYTES)])?;
    let more = format!("[[disk]]\nname = \"disk\"\nstore = \"{}\"\nread_only = true\n", path.display());
    let options =
        DaemonOptions { ssd_size: "1TiB".to_owned(), ssd_hole_bytes: Some(1 << 40), more, ..DaemonOptions::default() };
    let began = Instant::now();
    let mut daemon = Prestaged::start(&options)?;
    let first = began.elapsed();
    let shape = vhost::Shape { queues: 1, depth: 1, len_bytes: CHUNK_BYTES, read_only: true };
    let mut guest = vhost::connect(&daemon.disk_socket("disk")?, shape)?.remove(0);
    for offset in (0..DISK_BYTES).step_by(CHUNK_BYTES) {
        guest.submit(0, Op::Read, offset, CHUNK_BYTES)?;
        guest.wait(&mut Vec::new())?;
    }
    drop(guest);
    // Writes what waits for the tier.
    daemon.stop()?;
    let began = Instant::now();
    daemon.resume()?;
    let second = began.elapsed();
    let stat = daemon.ctl(&["cache", "tiers"])?;
    bench.progress.step(&format!("tiers after the second start: {stat}"));
    let figure = |what: &str, value: std::time::Duration| Figure {
        name: format!("{FIGURE}, {what}"),
        value: value.as_secs_f64(),
        unit: "s",
    };
    Ok(vec![figure("new", first), figure("again", second)])
}
