//! `bench memory`: a guest whose memory is swapped out touches it again.
//!
//! One guest under QEMU runs one program that touches a working set, a byte a page, in the order it is told
//! (`tests/src/toucher`). A round of a contender:
//!
//! 1. the swap area is switched off and on, so that all of the guest is in RAM and the area is empty and unfragmented;
//! 2. all of the guest's memory is pushed out, which is checked, on a disk down to the swap cache;
//! 3. the guest draws the order, which brings its kernel and the program back;
//! 4. a contender with a lead is told that the touch is coming, and the lead passes;
//! 5. the guest touches, and says how long it took by its own clock.
//!
//! Faults are QEMU's, from the announcement to the answer. Contenders take turns round by round; rows are medians. At the end clones are
//! started from a template.
//!
//! - [`contender`]: what is compared
//! - [`project`]: this project among them
//! - [`replay`]: a recording replayed, the peer that learns nothing
//! - [`round`]: one round, and what it is measured by
//! - [`watching`]: what it costs to hear of faults
//! - [`pushing`]: idle memory pushed out
//! - [`template`]: `bench template`, machines started from templates
//! - [`report`]: medians, table, JSON

mod contender;
mod project;
mod pushing;
mod replay;
mod report;
mod round;
pub(crate) mod template;
mod watching;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use prestage_integration::libvirt::{Hypervisor, HypervisorConfig};
use prestage_integration::memory::Region;
use prestage_tests::daemon::DaemonOptions;
use prestage_tests::libvirt::Libvirt;
use prestage_tests::paths::{Scratch, program};
use prestage_tests::swap::Swap;
use prestage_tests::toucher::{Backing, MemoryRig};
use serde::Serialize;

use crate::host::Host;
use crate::progress::Progress;
use crate::record::write_json;
use contender::{Contender, Everything, Kernel, Resident, Way};
use project::{Knowledge, Project};
use replay::{Replay, Role};
use report::{Report, Row};
use round::{Subject, Trial};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds of every contender; the one before them is not counted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The guest's memory
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    memory: u64,
    /// What its program touches
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    working_set: u64,
    /// Where it is swapped to
    #[arg(long, value_delimiter = ',', default_values_t = [Area::Zram, Area::Disk])]
    swap: Vec<Area>,
    /// A file on the disk that is swapped to, made and removed [default: in the cache's folder]
    #[arg(long, value_name = "PATH")]
    swap_file: Option<PathBuf>,
    /// The orders it is touched in
    #[arg(long, value_delimiter = ',', default_values_t = [Order::Recorded, Order::New, Order::Random])]
    order: Vec<Order>,
    /// What the program computes after each touch
    #[arg(long, default_value_t = 0, value_name = "NS")]
    compute_ns: u64,
    /// How long before the first touch those are told that can be told
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1000], value_name = "MS")]
    lead_ms: Vec<u64>,
    /// The others alone
    #[arg(long)]
    without_prestage: bool,
    /// Further sections of prestaged's configuration
    #[arg(long, default_value = "", value_name = "TOML")]
    config: String,
    /// The guest's memory in QEMU is a memfd, as for vhost-user devices; else it is private
    #[arg(long)]
    shared: bool,
    /// Only what hearing of faults costs
    #[arg(long)]
    watching: bool,
    /// Without machines started from templates (`bench template`), which come last
    #[arg(long)]
    without_template: bool,
    /// Only pushing idle memory out: for so many minutes of the default pace, each in two seconds
    #[arg(long, value_name = "MINUTES", num_args = 0..=1, default_missing_value = "30", value_parser = clap::value_parser!(u32).range(1..))]
    pushing: Option<u32>,
    /// Where the figures are written
    #[arg(long, default_value = "target/memory.json")]
    json: PathBuf,
}

/// Where memory is swapped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Area {
    /// A zram device with the kernel's default compressor
    Zram,
    /// A file
    Disk,
}

/// The order the working set is touched in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// By address, the same every round
    Ascending,
    /// Shuffled, the same every round
    Recorded,
    /// Shuffled anew every round
    New,
    /// As many pages as there are, drawn at random with repetition anew every round
    Random,
}

macro_rules! named {
    ($($name:ident),*) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let value = clap::ValueEnum::to_possible_value(self);
                f.write_str(value.as_ref().map_or("", |value| value.get_name()))
            }
        }
    )*};
}
named!(Area, Order);

/// Name of the guest.
const GUEST: &str = "prestage-memory";

/// Seed of [`Order::Recorded`]; those of new orders count up from above it.
const RECORDED: u64 = 1;

impl Order {
    fn seed(self, round: u32) -> u64 {
        match self {
            Self::Ascending => 0,
            Self::Recorded => RECORDED,
            Self::New | Self::Random => RECORDED + 1 + u64::from(round),
        }
    }
}

/// What contenders are made of.
struct Place {
    daemon: DaemonOptions,
    helper: PathBuf,
    qemu: i32,
    regions: Vec<Region>,
}

/// Where the guest's memory lies in its QEMU.
fn regions(libvirt: &Libvirt) -> Result<Vec<Region>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let hypervisor =
        Hypervisor::start(HypervisorConfig { uri: libvirt.uri().to_owned(), ..HypervisorConfig::default() })?;
    runtime.block_on(async {
        hypervisor.state().wait_for(|state| state.connected).await.context("libvirt")?;
        hypervisor.memory_layout(GUEST).await?.context("the guest's memory has no place in QEMU")
    })
}

/// The contenders of one swap area and order, in the order they take their turns.
fn contenders(options: &Options, order: Order, place: &Place) -> Result<Vec<Box<dyn Contender>>> {
    let project = |knowledge, lead| Box::new(Project::new(GUEST, &place.daemon, knowledge, lead));
    let replay = |role| Replay::new(role, &place.helper, place.qemu, &place.regions).map(Box::new);
    let mut all: Vec<Box<dyn Contender>> = vec![Box::new(Kernel { page_cluster: 0 })];
    // nothing can be foreseen there: what is asked is what trying costs
    if order == Order::Random {
        all.push(replay(Role::Hear)?);
        if !options.without_prestage {
            all.push(project(Knowledge::Nothing, None));
        }
        return Ok(all);
    }
    all.push(Box::new(Kernel { page_cluster: 3 }));
    for &lead in &options.lead_ms {
        let lead = Duration::from_millis(lead);
        all.push(Box::new(Everything::new(Way::WillNeed, lead)));
        // reading fills what was never touched where memory is shared
        if !options.shared {
            all.push(Box::new(Everything::new(Way::WillNeedRead, lead)));
        }
        all.push(replay(Role::Replay(lead))?);
        if !options.without_prestage {
            all.push(project(Knowledge::Kept, Some(lead)));
        }
    }
    if !options.without_prestage {
        all.push(project(Knowledge::Kept, None));
    }
    all.push(Box::new(Resident));
    Ok(all)
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let can = if options.swap.contains(&Area::Zram) { Swap::zram_available() } else { Swap::available() };
    if let Err(why) = can {
        bail!("nothing can be swapped out on this host: {why}");
    }
    if options.shared && options.swap.contains(&Area::Disk) {
        bail!("shared memory on a disk cannot be driven out of the swap cache: --shared goes with --swap zram");
    }
    let progress = Progress::new();
    if options.watching {
        progress.now("faults are heard");
        println!("{}", watching::measure(options.rounds)?);
        return Ok(());
    }
    if let Some(minutes) = options.pushing {
        let found = pushing::measure(minutes, &progress)?;
        write_json(&found, &options.json)?;
        println!("\n{found}\nfigures: {}", options.json.display());
        return Ok(());
    }
    let mut report = swapped(options, &progress)?;
    if !options.without_template {
        report.template = Some(template::measure(&template::Options::of(options.rounds))?);
        write_json(&report, &options.json)?;
    }
    println!("\n{}\nfigures: {}", report.render(), options.json.display());
    Ok(())
}

/// Everything about swapped-out memory. The guest has ended when it returns: the next has the machine alone.
fn swapped(options: &Options, progress: &Progress) -> Result<Report> {
    progress.now("guest image");
    let rig = MemoryRig::new()?;
    let backing = if options.shared { Backing::Shared } else { Backing::Anonymous };
    let guest = rig.guest(GUEST, options.memory, backing)?;
    let mut run = guest.start()?;
    run.wait_alive()?;
    run.fill(options.working_set)?;
    progress.step(&format!("a guest runs under {} and has filled {} MiB", rig.accelerator, options.working_set));

    let place = Place {
        daemon: DaemonOptions {
            libvirt_uri: Some(rig.libvirt.uri().to_owned()),
            more: options.config.clone(),
            // no disk is served here, and what laying out its cache costs is none of what is asked
            ram_size: "16MiB".to_owned(),
            ssd_size: "64MiB".to_owned(),
            ..DaemonOptions::default()
        },
        helper: program("prestage-memory")?,
        qemu: guest.pid()?,
        regions: regions(&rig.libvirt)?,
    };
    let mut subject = Subject::new(run, place.qemu, options)?;
    let mut report = Report {
        host: Host::find(),
        accelerator: rig.accelerator,
        options: report::settings(options),
        rows: vec![],
        watching: None,
        template: None,
    };
    // as large that the kernel keeps what was read from it: it frees slots of an area that is half full
    let bytes = 4 * (options.memory << 20);
    for &area in &options.swap {
        let folder = Scratch::large()?;
        let mut swap = match (area, &options.swap_file) {
            (Area::Zram, _) => Swap::zram(bytes)?,
            (Area::Disk, Some(path)) => Swap::file(path, bytes)?,
            (Area::Disk, None) => Swap::file(&folder.join("swap"), bytes)?,
        };
        progress.step(&format!("{} MiB of swap on {}", bytes >> 20, swap.device().display()));
        for &order in &options.order {
            let mut contenders = contenders(options, order, &place)?;
            let mut samples = vec![Vec::new(); contenders.len()];
            // the first round finds the guest's memory in huge pages, the caches cold and the recorded order unheard of
            for round in 0..=options.rounds {
                for (contender, samples) in contenders.iter_mut().zip(&mut samples) {
                    progress.now(&format!(
                        "{area}, {order}: round {round} of {}, {}",
                        options.rounds,
                        contender.name()
                    ));
                    let trial =
                        Trial { order, seed: order.seed(round), compute: Duration::from_nanos(options.compute_ns) };
                    let sample = subject
                        .round(&mut swap, contender.as_mut(), &trial)
                        .with_context(|| format!("{area}, {order}, {}", contender.name()))?;
                    if round > 0 {
                        samples.push(sample);
                    }
                }
            }
            for (contender, samples) in contenders.iter().zip(samples) {
                report.rows.push(Row::new(area, order, contender.as_ref(), samples));
            }
            write_json(&report, &options.json)?;
            progress.step(&format!("{area}, {order}: {} rounds", options.rounds));
        }
    }
    if options.swap.contains(&Area::Zram) {
        progress.now("faults are heard");
        report.watching = Some(watching::measure(options.rounds)?);
        write_json(&report, &options.json)?;
    }
    Ok(report)
}
