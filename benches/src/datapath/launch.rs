//! How long a daemon takes to start that has a large SSD tier: new, with what an earlier one left, and with all of it in use;
//! and how long guests wait then while another takes over.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::process::wait_until;
use prestage_tests::slab;
use prestage_tests::vhost::{Load, LoadOptions, Model};

use super::load::{Device, Op};
use super::report::Figure;
use super::vhost;
use super::{Bench, content};

pub(super) const FIGURE: &str = "start with an SSD tier of 1 TiB";
pub(super) const UPGRADE: &str = "without an answer at an upgrade, 1 TiB of the SSD tier in use";
const SSD_BYTES: u64 = 1 << 40;
const DISK_BYTES: u64 = 256 << 20;
/// Of the disk that is in use while another daemon takes over.
const SECTORS: usize = 64 << 10;
const UPGRADES: usize = 5;
const PATIENCE: Duration = Duration::from_secs(120);
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
    drop(daemon);
    let mut figures = vec![figure(&format!("{FIGURE}, new"), first), figure(&format!("{FIGURE}, again"), second)];
    figures.extend(in_use(bench)?);
    Ok(figures)
}

fn figure(name: &str, value: Duration) -> Figure {
    Figure { name: name.to_owned(), value: value.as_secs_f64(), unit: "s" }
}

/// With every slot in use.
fn in_use(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let path = bench.scratch.join("upgrade.raw");
    std::fs::write(&path, Model::blank(SECTORS)).with_context(|| format!("cannot write {}", path.display()))?;
    let options =
        DaemonOptions { ssd_size: "1TiB".to_owned(), ssd_hole_bytes: Some(SSD_BYTES), ..DaemonOptions::default() };
    let mut daemon = Prestaged::start(&options)?;
    daemon.ctl(&["disk", "add", "busy", &path.display().to_string()])?;
    daemon.stop()?;
    slab::fill(daemon.ssd(), SSD_BYTES)?;
    let began = Instant::now();
    daemon.resume()?;
    let started = began.elapsed();
    wait_read(&daemon)?;
    let read = began.elapsed();
    let load = Load::start(&daemon.disk_socket("busy")?, SECTORS, LoadOptions { queues: 4, depth: 32, seed: 1 })?;
    let mut gaps = Vec::new();
    for _ in 0..UPGRADES {
        wait_answers(&load)?;
        load.take_gap();
        daemon.hand_over()?;
        wait_answers(&load)?;
        gaps.push(load.take_gap());
        wait_read(&daemon)?;
    }
    load.finish()?;
    let kept = daemon.ctl(&["status"])?["cache"]["ssd_recovery"]["kept_blocks"].as_u64().unwrap_or(0);
    ensure!(kept > SSD_BYTES / (80 << 10), "{kept} blocks are left of what was in use");
    daemon.stop()?;
    gaps.sort_unstable();
    Ok(vec![
        figure(&format!("{FIGURE}, all of it in use"), started),
        figure("until all of it is known, guests being served", read),
        figure(&format!("{UPGRADE}, median of {UPGRADES}"), gaps[UPGRADES / 2]),
        figure(&format!("{UPGRADE}, longest"), gaps[UPGRADES - 1]),
    ])
}

/// Waits until the daemon has read what its SSD tier has.
fn wait_read(daemon: &Prestaged) -> Result<()> {
    wait_until("the SSD tier's index being read", PATIENCE, || {
        Ok(daemon.ctl(&["status"])?["cache"]["ssd_recovery"]["unread_blocks"] == 0)
    })
}

fn wait_answers(load: &Load) -> Result<()> {
    let enough = load.answers() + 500;
    wait_until("answers under load", PATIENCE, || Ok(!load.runs() || load.answers() >= enough))
}
