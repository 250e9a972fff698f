//! `bench collect`: what measuring many virtual machines once a second costs.
//!
//! The agent's own CPU time by getrusage(2), all its threads. libvirt's test driver runs in the agent's process, so its time
//! counts too, but its statistics are states alone; `--guests` starts idle QEMU guests under a libvirtd of their own, whose
//! time is read from `/proc`. Turns follow each other at `--interval-ms`, as in the agent.

use std::fmt::Write as _;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use prestage_integration::libvirt::stats::{CollectConfig, Collector};
use prestage_integration::libvirt::{Hypervisor, HypervisorConfig};
use prestage_tests::libvirt::Libvirt;
use prestage_tests::paths::Scratch;
use prestage_tests::process::run as run_command;

/// Before these the collector still meets its VMs, eight a turn.
const SETTLED_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Domains of libvirt's test driver
    #[arg(long, default_value_t = 100)]
    domains: usize,
    /// Idle QEMU guests under a libvirtd of their own in place of the test driver (needs root)
    #[arg(long, conflicts_with_all = ["domains", "uri"])]
    guests: Option<usize>,
    /// A libvirt in place of the test driver
    #[arg(long, conflicts_with = "domains")]
    uri: Option<String>,
    /// Turns to measure
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Time between two turns
    #[arg(long, default_value_t = 1000)]
    interval_ms: u64,
}

/// Where the machines are, and what has to stay alive for them.
struct Place {
    uri: String,
    what: String,
    expected: Option<usize>,
    /// Process of a libvirtd of ours, whose time is read too.
    libvirtd: Option<i32>,
    _libvirt: Option<Arc<Libvirt>>,
    _scratch: Option<Scratch>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let place = match (options.guests, &options.uri) {
        (Some(guests), _) => qemu(guests)?,
        (None, Some(uri)) => Place {
            uri: uri.clone(),
            what: uri.clone(),
            expected: None,
            libvirtd: None,
            _libvirt: None,
            _scratch: None,
        },
        (None, None) => test_driver(options.domains)?,
    };
    let hypervisor = Hypervisor::start(HypervisorConfig { uri: place.uri.clone(), ..HypervisorConfig::default() })?;
    let mut collector = Collector::new(hypervisor, CollectConfig::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;

    let begun = Instant::now();
    let mut seen = 0;
    // Until every VM was met, whose definition is then read once.
    loop {
        let turn = runtime.block_on(collector.turn());
        let vms = match turn.vms {
            Ok(vms) => vms,
            // While a hundred guests begin, libvirt may take longer over one answer than a turn waits.
            Err(_) if begun.elapsed() <= SETTLED_AFTER => continue,
            Err(error) => return Err(error.into()),
        };
        let met = vms.iter().filter(|vm| vm.memory.current_bytes.is_none() || vm.memory.period.is_some()).count();
        seen = seen.max(vms.len());
        if place.expected.is_none_or(|n| vms.len() == n) && met == vms.len() && begun.elapsed() > Duration::from_secs(3)
        {
            break;
        }
        if begun.elapsed() > SETTLED_AFTER {
            bail!("{seen} VMs within {} s, {:?} expected", SETTLED_AFTER.as_secs(), place.expected);
        }
        std::thread::sleep(Duration::from_millis(100));
    }

    let interval = Duration::from_millis(options.interval_ms);
    let (before, daemon_before) = (used()?, place.libvirtd.map(process_time).transpose()?);
    let started = Instant::now();
    let (mut waits, mut missed) = (Vec::new(), 0u32);
    let (mut disks, mut nets) = (0, 0);
    for turn in 1..=options.turns {
        let asked = Instant::now();
        let vms = runtime.block_on(collector.turn()).vms;
        waits.push(asked.elapsed());
        let Ok(vms) = vms else {
            missed += 1;
            continue;
        };
        seen = vms.len();
        (disks, nets) = vms.iter().fold((0, 0), |(d, n), vm| (d + vm.disks.len(), n + vm.nets.len()));
        std::thread::sleep((started + interval * turn).saturating_duration_since(Instant::now()));
    }
    let (elapsed, own) = (started.elapsed(), used()?.saturating_sub(before));
    waits.sort_unstable();
    let mut text = format!("{}: {seen} running VMs, {disks} disks, {nets} interfaces\n", place.what);
    let turns = f64::from(options.turns);
    let row = |text: &mut String, name: &str, time: Duration| {
        let (ms, share) = (time.as_secs_f64() * 1e3 / turns, time.as_secs_f64() / elapsed.as_secs_f64() * 100.0);
        writeln!(
            text,
            "{name}: {:.3} s of CPU in {} turns, {ms:.2} ms a turn, {share:.2} % of a core",
            time.as_secs_f64(),
            options.turns
        )
    };
    row(&mut text, "agent", own)?;
    if let (Some(pid), Some(before)) = (place.libvirtd, daemon_before) {
        row(&mut text, "libvirtd", process_time(pid)?.saturating_sub(before))?;
    }
    let at = |share: usize| waits.get((waits.len() * share / 100).min(waits.len() - 1)).copied().unwrap_or_default();
    writeln!(
        text,
        "a turn took {:.1} ms (median), {:.1} ms (longest); libvirt did not answer {missed} in time",
        at(50).as_secs_f64() * 1e3,
        at(100).as_secs_f64() * 1e3
    )?;
    print!("{text}");
    Ok(())
}

/// CPU time of this process, user and system.
fn used() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("getrusage")?;
    let time = |t: TimeVal| Duration::from_micros(u64::try_from(t.tv_sec() * 1_000_000 + t.tv_usec()).unwrap_or(0));
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

/// CPU time of another process in hundredths of a second, by proc(5).
fn process_time(pid: i32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let fields: Vec<_> = text.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<u64>().ok()).unwrap_or(0);
    Ok(Duration::from_millis((ticks(11) + ticks(12)) * 10))
}

fn domain(kind: &str, index: usize, more: &str) -> String {
    format!(
        "<domain type='{kind}'><name>vm{index:03}</name><memory unit='MiB'>64</memory><vcpu>4</vcpu>\
         <os><type arch='x86_64'>hvm</type></os><devices>{more}<memballoon model='virtio'/></devices></domain>"
    )
}

fn test_driver(domains: usize) -> Result<Place> {
    let scratch = Scratch::new()?;
    let node = scratch.join("node.xml");
    let all: String = (0..domains).map(|i| domain("test", i, "").replace(" arch='x86_64'", "")).collect();
    std::fs::write(&node, format!("<node>{all}</node>"))?;
    Ok(Place {
        uri: format!("test://{}", node.display()),
        what: "libvirt's test driver, in the agent's process".to_owned(),
        expected: Some(domains),
        libvirtd: None,
        _libvirt: None,
        _scratch: Some(scratch),
    })
}

fn qemu(guests: usize) -> Result<Place> {
    let (scratch, libvirt) = (Scratch::large()?, Arc::new(Libvirt::start()?));
    for index in 0..guests {
        let disk = scratch.join(format!("{index}.raw"));
        run_command(Command::new("truncate").args(["--size", "64M"]).arg(&disk))?;
        let devices = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>",
            disk.display()
        );
        let file = scratch.join(format!("{index}.xml"));
        libvirt.define(&domain("qemu", index, &devices), &file)?;
        // Without a system its firmware would look for one for ever.
        libvirt.virsh(&["start", "--paused", &format!("vm{index:03}")])?;
    }
    let pids = run_command(Command::new("pgrep").args(["--newest", "--exact", "libvirtd"]))?;
    Ok(Place {
        uri: libvirt.uri().to_owned(),
        what: "idle QEMU guests".to_owned(),
        expected: Some(guests),
        libvirtd: pids.trim().parse().ok(),
        _libvirt: Some(libvirt),
        _scratch: Some(scratch),
    })
}
