//! `bench boots`: one guest, four boots, the same disk bytes in each.
//!
//! The guest mounts its disk read-only below an overlay in RAM (`scripts/guest/init`), so nothing that one boot does
//! changes what the next reads. Waiting is measured inside the guest, where all four are measured alike; what served the
//! reads is the daemon's count, and what left the store is the store's own where it is ours.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use prestage_tests::accelerator::Accelerator;
use prestage_tests::daemon::{DaemonOptions, Prestaged};
use prestage_tests::guest::{Guest, GuestDisk, GuestOptions};
use prestage_tests::image::Image;
use prestage_tests::libvirt::Libvirt;
use prestage_tests::paths::Scratch;
use prestage_tests::process;
use prestage_tests::report::Figures;
use prestage_tests::store::{Nbd, NbdOptions, Store};

use crate::host::Host;
use crate::progress::Progress;
use crate::record::{Boot, BootName, Run, Sample, write_json};
use crate::table;

/// Name of the disk in prestaged.
const DISK: &str = "guest";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Slow storage of your own: a folder, a file, a block device or an NBD URI [default: nbdkit with a delay]
    ///
    /// The guest's disk is copied to a folder or a new file. A device or an NBD export must hold it already.
    #[arg(long, value_name = "PATH|NBD-URI")]
    store: Option<String>,
    /// Where the figures are written
    #[arg(long, default_value = "target/run.json")]
    out: PathBuf,
    /// Delay of the default store, for each read
    #[arg(long, default_value_t = 5, value_name = "MS")]
    read_delay_ms: u64,
    /// Only these boots, and those they build on
    #[arg(long, value_delimiter = ',', value_name = "BOOT")]
    only: Vec<BootName>,
    /// RAM tier of prestaged
    #[arg(long, default_value = "256MiB")]
    ram_size: String,
    /// SSD tier of prestaged
    #[arg(long, default_value = "1GiB")]
    ssd_size: String,
}

/// What all boots share.
struct Bench {
    image: Image,
    accelerator: Accelerator,
    libvirt: Arc<Libvirt>,
    scratch: Scratch,
    store: Store,
    nbd: Option<Nbd>,
    progress: Progress,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let progress = Progress::new();
    let wanted = |boot: BootName| options.only.is_empty() || options.only.contains(&boot);
    let last = [BootName::Warm, BootName::Learned, BootName::Unlearned].into_iter().find(|&boot| wanted(boot));

    progress.now("guest image");
    let image = Image::build_or_find()?;
    let accelerator = Accelerator::find(&image)?;
    progress.step(&format!("guests run under {accelerator}"));
    let scratch = Scratch::new()?;
    let (store, nbd, described) = open_store(options, &scratch, &image)?;
    progress.step(&format!("store: {described}"));
    let libvirt = Arc::new(Libvirt::start()?);
    progress.step("libvirtd runs, apart from the host's own");

    let bench = Bench { image, accelerator, libvirt, scratch, store, nbd, progress };
    let mut record = Run { host: Host::find(), accelerator, store: described, boots: Vec::new() };
    if wanted(BootName::Straight) {
        let disk = GuestDisk::Straight(bench.store.clone());
        bench.boot(BootName::Straight, disk, None, &mut record, &options.out)?;
    }
    if let Some(last) = last {
        bench.prestaged_boots(last, options, &mut record)?;
    }
    drop(bench);
    println!("\n{}\nfigures: {}", table::render(&record), options.out.display());
    Ok(())
}

impl Bench {
    /// Unlearned, learned, warm, up to `last`.
    fn prestaged_boots(&self, last: BootName, options: &Options, record: &mut Run) -> Result<()> {
        let sizes = DaemonOptions {
            ram_size: options.ram_size.clone(),
            ssd_size: options.ssd_size.clone(),
            libvirt_uri: Some(self.libvirt.uri().to_owned()),
            // A store of the operator's own may be anywhere.
            more: options.store.as_ref().map_or_else(String::new, |_| "[store]\nallowed = [\"/\"]\n".to_owned()),
            ..DaemonOptions::default()
        };
        let mut daemon = Prestaged::start(&sizes)?;
        daemon.ctl(&["disk", "add", DISK, &self.store.spec()])?;
        self.progress.step("prestaged runs and knows nothing");
        let disk = GuestDisk::VhostUser(daemon.disk_socket(DISK)?);
        self.boot(BootName::Unlearned, disk.clone(), Some(&daemon), record, &options.out)?;

        if last >= BootName::Learned {
            daemon.stop()?;
            std::fs::remove_file(daemon.ssd()).context("cannot empty the SSD tier")?;
            daemon.resume()?;
            daemon.ctl(&["cache", "drop", "--tier", "all"])?;
            self.progress.step("prestaged restarted, RAM and SSD tiers emptied");
            self.boot(BootName::Learned, disk.clone(), Some(&daemon), record, &options.out)?;
        }
        if last >= BootName::Warm {
            daemon.stop()?;
            daemon.resume()?;
            self.progress.step("prestaged restarted, SSD tier kept");
            self.boot(BootName::Warm, disk, Some(&daemon), record, &options.out)?;
        }
        daemon.stop()
    }

    fn sample(&self, guest: Figures, daemon: Option<&Prestaged>) -> Result<Sample> {
        let daemon = daemon.map(Prestaged::counters).transpose()?;
        let store = self.nbd.as_ref().map(Nbd::traffic).transpose()?;
        Ok(Sample { guest, daemon, store })
    }

    /// Boots once, runs the program, and adds the figures to `record`.
    fn boot(
        &self,
        name: BootName,
        disk: GuestDisk,
        daemon: Option<&Prestaged>,
        record: &mut Run,
        out: &Path,
    ) -> Result<()> {
        let boot = self.measure(name, disk, daemon).with_context(|| {
            let words = daemon.map(Prestaged::last_words).unwrap_or_default();
            format!("{} boot {words}", name.as_str())
        })?;
        let total = &boot.total;
        self.progress.step(&format!(
            "{}: ready after {:.1} s, program {:.1} s; {} reads, {} waited for the store, {:.2} s of waiting",
            name.as_str(),
            boot.ready_s,
            boot.program_s,
            total.reads,
            total.served_store,
            total.read_wait_s
        ));
        record.boots.push(boot);
        write_json(record, out)
    }

    fn measure(&self, name: BootName, disk: GuestDisk, daemon: Option<&Prestaged>) -> Result<Boot> {
        let words = ["prestage.go", "prestage.program"];
        let options = GuestOptions::new(&format!("prestage-{}", name.as_str()), self.accelerator, disk, &words);
        let guest = Guest::define(&self.libvirt, &self.scratch, &self.image, &options)?;
        let start = self.sample(Figures::default(), daemon)?;
        let tick = |elapsed: Duration| {
            self.progress.now(&format!("{}: {} s since the guest's start", name.as_str(), elapsed.as_secs()));
        };
        let mut run = guest.start()?.on_tick(tick);
        let (ready_after, figures) = run.wait_ready()?;
        let ready = self.sample(figures, daemon)?;
        run.go()?;
        let (before, after) = run.wait_program()?;
        let last = run.wait_last()?;
        let end = self.sample(last, daemon)?;
        run.go()?;
        run.wait_off()?;

        if last.writes > 0 {
            bail!("the guest wrote {} times to a disk it mounts read-only: the boots do not compare", last.writes);
        }
        let program_s = after.since(&before).uptime().as_secs_f64();
        Ok(Boot::new(name, ready_after.as_secs_f64(), program_s, [&start, &ready, &end]))
    }
}

/// Opens the store and makes sure that it holds the guest's disk. Returns it with the server that is ours and a
/// description.
fn open_store(options: &Options, scratch: &Scratch, image: &Image) -> Result<(Store, Option<Nbd>, String)> {
    let Some(text) = &options.store else {
        let delay = NbdOptions { read_delay: Duration::from_millis(options.read_delay_ms), keep_writes: false };
        let nbd = Nbd::start(scratch, "store", &image.disk, &delay)?;
        return Ok((nbd.store(), Some(nbd), format!("nbdkit, {} ms a read", options.read_delay_ms)));
    };
    let path = Path::new(text);
    let text = if path.is_dir() { format!("{}/prestage-guest.raw", text.trim_end_matches('/')) } else { text.clone() };
    let path = Path::new(&text);
    if !text.contains("://") && !path.exists() {
        image.copy_disk(path).with_context(|| format!("cannot put the guest's disk at {text}"))?;
    }
    let store = Store::parse(&text)?;
    if !holds_image(&store, scratch, image)? {
        bail!(
            "{text} does not hold the guest's disk, and nothing that exists is overwritten. Copy it there: nbdcopy {} '{text}'",
            image.disk.display()
        );
    }
    Ok((store, None, text))
}

/// Compares the first 4 MiB, which hold the file system's own random identity.
fn holds_image(store: &Store, scratch: &Scratch, image: &Image) -> Result<bool> {
    let mut heads = Vec::new();
    for (number, source) in [store.spec(), image.disk.display().to_string()].iter().enumerate() {
        let head = scratch.join(format!("head{number}"));
        let mut command = Command::new("qemu-img");
        command.args(["dd", "-f", "raw", "-O", "raw", "bs=1M", "count=4"]);
        command.arg(format!("if={source}")).arg(format!("of={}", head.display()));
        process::run(&mut command).with_context(|| format!("cannot read {source}"))?;
        heads.push(std::fs::read(&head)?);
    }
    Ok(heads[0] == heads[1])
}
