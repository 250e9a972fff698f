//! `bench template`: a clone started from a template on a slow store, until its guest's first answer.
//!
//! A guest holds a set of data among other data (`tests/src/template.rs`) and is saved. One clone is started from a fast disk, asked
//! for the set, and recorded. Then the template lies on a slow store ([`prestage_tests::slow`]), and clones start from it: each
//! way of reading in turn, round by round, from a page cache that has nothing of the file. The clock runs from the order to the
//! answer; the answer needs the whole set. Rows are medians.
//!
//! | way | what is read |
//! | --- | --- |
//! | kernel | nothing but by the guest's faults, with the kernel's readahead |
//! | whole | the whole file, before the start |
//! | replay | the recorded pages, in their order, sixteen at a time, before the start: REAP (Ustiugov et al., ASPLOS 2021), which keeps them in a file of their own and installs them, which is not counted here |
//! | prestage | what `vm start-from-template` reads |
//! | resident | all is in the page cache before the clock runs: the bound |

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use prestage_integration::libvirt::template::{Ready, clone_definition};
use prestage_integration::libvirt::{Hypervisor, HypervisorConfig};
use prestage_integration::memory::Signal;
use prestage_integration::memory::template::preload::Progress as Reading;
use prestage_integration::memory::template::record;
use prestage_integration::memory::template::{Draft, Origin, PAGE_BYTES, Template};
use prestage_tests::accelerator::Accelerator;
use prestage_tests::paths::{Scratch, program};
use prestage_tests::process::run as run_command;
use prestage_tests::slow::{Image, SlowDisk};
use prestage_tests::template::{TemplateGuest, TemplateRig};
use serde::Serialize;

use crate::host::Host;
use crate::progress::Progress;
use crate::record::write_json;
use crate::table::median;

const LIMIT: Duration = Duration::from_secs(300);
/// Readers of a replay at a time.
const READERS: usize = 16;

/// The guest: its memory, what its answer needs, and what else it holds, in MiB.
const SIZES: TemplateGuest = TemplateGuest { memory_mib: 512, set_mib: 60, rest_mib: 300 };
const DELAY_MS: u64 = 2;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds of every way; the one before them is not counted
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The guest's memory
    #[arg(long, default_value_t = SIZES.memory_mib, value_name = "MIB")]
    memory: u64,
    /// What its answer needs
    #[arg(long, default_value_t = SIZES.set_mib, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    working_set: u64,
    /// What else it holds
    #[arg(long, default_value_t = SIZES.rest_mib, value_name = "MIB")]
    rest: u64,
    /// What the store adds to each read
    #[arg(long, default_value_t = DELAY_MS, value_name = "MS")]
    delay_ms: u64,
    /// Where the figures are written
    #[arg(long, default_value = "target/template.json")]
    json: PathBuf,
}

impl Options {
    /// As of the command line without options, but for the rounds.
    pub(super) fn of(rounds: u32) -> Self {
        let TemplateGuest { memory_mib, set_mib, rest_mib } = SIZES;
        let json = PathBuf::new(); // written by the caller
        Self { rounds, memory: memory_mib, working_set: set_mib, rest: rest_mib, delay_ms: DELAY_MS, json }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Way {
    Kernel,
    Whole,
    Replay,
    Prestage,
    Resident,
}

const WAYS: [Way; 5] = [Way::Kernel, Way::Whole, Way::Replay, Way::Prestage, Way::Resident];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Whole => "whole file",
            Self::Replay => "replay",
            Self::Prestage => "prestage",
            Self::Resident => "resident",
        }
    }
}

/// One start.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sample {
    /// From the order to the answer.
    answer_s: f64,
    /// From the order until the guest's processors ran.
    running_s: f64,
    /// From the order until all that is read ahead was asked for.
    ahead_s: Option<f64>,
    /// Read from the store from when the guest ran until it answered.
    late_reads: u64,
    /// Read from the store by then.
    store_mib: f64,
    store_reads: u64,
}

/// All starts of one way.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    way: Way,
    median: Sample,
    samples: Vec<Sample>,
}

/// A whole run, as written to `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    host: Host,
    accelerator: Accelerator,
    memory_mib: u64,
    working_set_mib: u64,
    /// What the recorded clone touched until its answer.
    recorded_mib: u64,
    /// Of its pages, those whose fault was heard, and by what.
    heard_pages: u64,
    signal: Signal,
    used_mib: u64,
    delay_ms: u64,
    rows: Vec<Row>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let report = measure(options)?;
    print!("{}", table(&report));
    write_json(&report, &options.json)
}

/// What clones are started with.
struct Bench {
    rig: TemplateRig,
    hypervisor: Hypervisor,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn connect(rig: TemplateRig) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let config = HypervisorConfig { uri: rig.libvirt.uri().to_owned(), ..HypervisorConfig::default() };
        Ok(Self { hypervisor: Hypervisor::start(config)?, rig, runtime })
    }

    /// Saves the running guest.
    fn save(&self, name: &str, target: &std::path::Path) -> Result<Template> {
        let machine = self.runtime.block_on(self.hypervisor.savable(name))?;
        let draft = Draft::begin(target, machine.group, self.rig.folder.path())?;
        let state = draft.create_state()?;
        let saved = self.runtime.block_on(self.hypervisor.save_state(machine.vm.uuid, state, LIMIT))?;
        let origin = Origin {
            name: saved.vm.name,
            uuid: saved.vm.uuid.to_string(),
            machine_type: saved.machine_type,
            qemu_version: saved.qemu_version,
        };
        Ok(draft.finish(&saved.memory, &saved.definition, origin, 0)?)
    }

    /// Starts a clone, calls `ready` before it runs and `begun` once it does, asks it for the set, and has `last` finish before it ends.
    /// Returns when it ran and when it had answered, after `ordered`, and what `last` made.
    fn start<T>(
        &self,
        template: &Template,
        ordered: Instant,
        set: &str,
        ready: impl FnOnce(&Ready<'_>) + Send + 'static,
        begun: impl FnOnce() -> Result<()>,
        last: impl FnOnce() -> Result<T>,
    ) -> Result<(Duration, Duration, T)> {
        let definition = clone_definition(template, "clone")?;
        let start = self.hypervisor.start_clone(definition, template.open_state()?, LIMIT, ready);
        self.runtime.block_on(start)?;
        let running = ordered.elapsed();
        begun()?;
        let mut clone = self.rig.console("clone")?;
        let answer = clone.ask("touch")?;
        let answered = ordered.elapsed();
        ensure!(answer == set, "the guest read {answer} of its set of {set}");
        Ok((running, answered, last()?))
    }
}

pub(super) fn measure(options: &Options) -> Result<Report> {
    let progress = Progress::new();
    let sizes = TemplateGuest { memory_mib: options.memory, set_mib: options.working_set, rest_mib: options.rest };
    let set = format!("{}M", options.working_set);
    // in this order: libvirt with its machines ends before what it has mounted is unmounted, and that before its folder goes
    let folder = Scratch::large()?;
    let mut rig = TemplateRig::new()?;
    // files and journal of the file system beside the state
    let image = Image::new(&folder, "store", options.memory + 128)?;
    rig.renew_libvirt()?; // it sees what was mounted before its start
    let bench = Bench::connect(rig)?;
    progress.step("a guest fills its memory");
    let (guest, _) = bench.rig.guest("source", sizes, "")?;
    let mut template = bench.save("source", &image.folder().join("template"))?;
    drop(guest);
    let used_mib = (template.working_set.pages() * PAGE_BYTES) >> 20;
    progress.step("a clone is recorded");
    // from a cold cache, so that there are faults to hear; readahead hides most of them
    posix_fadvise(&template.open_state()?, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let (starter, recording) = record::start(program("prestage-memory")?, Vec::new(), LIMIT, || false)?;
    let memory = template.manifest.memory_id.clone();
    let ready = move |ready: &Ready<'_>| starter.watch(ready.place(&memory));
    // it ends once the guest touches nothing new
    let last = || Ok(recording.finish()?);
    let (_, _, recorded) = bench.start(&template, Instant::now(), &set, ready, || Ok(()), last)?;
    let recorded_mib = (recorded.set.pages() * PAGE_BYTES) >> 20;
    let (heard_pages, signal) = (recorded.heard_pages, recorded.signal);
    template.learn(recorded.set)?;
    let path = template.path().to_owned();

    let Bench { rig: ready, .. } = bench;
    rig = ready;
    let disk = image.slow(&folder, Duration::from_millis(options.delay_ms))?;
    rig.renew_libvirt()?;
    let bench = Bench::connect(rig)?;
    let template = Template::open(&path)?;
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); WAYS.len()];
    for round in 0..=options.rounds {
        for (way, samples) in WAYS.into_iter().zip(&mut samples) {
            progress.now(&format!("round {round} of {}: {}", options.rounds, way.name()));
            let sample = trial(&bench, &disk, &template, way, &set).with_context(|| way.name())?;
            if round > 0 {
                samples.push(sample);
            }
        }
        progress.step(&format!("round {round} of {} done", options.rounds));
    }
    let rows = WAYS.into_iter().zip(samples).map(|(way, samples)| Row { way, median: medians(&samples), samples });
    Ok(Report {
        host: Host::find(),
        accelerator: bench.rig.accelerator(),
        memory_mib: options.memory,
        working_set_mib: options.working_set,
        recorded_mib,
        heard_pages,
        signal,
        used_mib,
        delay_ms: options.delay_ms,
        rows: rows.collect(),
    })
}

/// How much of a file is in the page cache, in bytes.
fn resident(file: &std::path::Path) -> Result<u64> {
    let text = run_command(Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(file))?;
    text.trim().parse().with_context(|| format!("fincore says {text}"))
}

fn read(file: &File, range: std::ops::Range<u64>) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let most = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
        match file.read_at(&mut buffer[..most], at)? {
            0 => bail!("the state ends at {at}"),
            read => at += read as u64,
        }
    }
    Ok(())
}

/// Reads the recorded pages as they were recorded.
fn replay(template: &Template) -> Result<()> {
    let file = template.open_state()?;
    // no more than the recorded pages
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    let at = template.manifest.memory_at;
    let (next, extents) = (AtomicUsize::new(0), &template.working_set.extents);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(extent) = extents.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let first = at + extent.first * PAGE_BYTES;
                        read(&file, first..first + extent.pages * PAGE_BYTES)?;
                    }
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|_| bail!("a reader panicked")))
    })
}

#[allow(clippy::cast_precision_loss)] // shown with one decimal
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn trial(bench: &Bench, disk: &SlowDisk, template: &Template, way: Way, set: &str) -> Result<Sample> {
    let file = template.open_state()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let left = resident(&template.state())?;
    ensure!(left < 1 << 20, "{left} bytes of the template are still in the page cache");
    let whole = 0..template.manifest.state_bytes;
    if way == Way::Resident {
        read(&file, whole.clone())?;
    }
    let before = disk.traffic()?;
    let reading = Arc::new(Reading::default());
    let ordered = Instant::now();
    let ahead = match way {
        Way::Kernel | Way::Resident => None,
        Way::Whole => {
            read(&file, whole)?;
            None
        }
        Way::Replay => {
            replay(template)?;
            None
        }
        Way::Prestage => {
            let (template, reading) = (template.clone(), Arc::clone(&reading));
            Some(std::thread::spawn(move || {
                template.read_ahead(&reading)?;
                let ahead = ordered.elapsed();
                template.read_behind(&template.needed(), &reading).map(|()| ahead)
            }))
        }
    };
    let mut at_start = before;
    let begun = || disk.traffic().map(|now| at_start = now);
    let started = bench.start(template, ordered, set, |_| (), begun, || Ok(()));
    reading.stop();
    let ahead = match ahead {
        Some(ahead) => Some(ahead.join().map_err(|_| anyhow::anyhow!("reading ahead panicked"))??),
        None => None,
    };
    let (running, answered, ()) = started?;
    let now = disk.traffic()?;
    let traffic = now.since(&before);
    Ok(Sample {
        answer_s: answered.as_secs_f64(),
        running_s: running.as_secs_f64(),
        ahead_s: ahead.map(|ahead| ahead.as_secs_f64()),
        late_reads: now.since(&at_start).reads,
        store_mib: mib(traffic.read_bytes),
        store_reads: traffic.reads,
    })
}

/// The median of each figure by itself.
fn medians(samples: &[Sample]) -> Sample {
    let of = |figure: fn(&Sample) -> f64| median(samples.iter().map(figure));
    let reads = |figure: fn(&Sample) -> u64| {
        let mut reads: Vec<u64> = samples.iter().map(figure).collect();
        reads.sort_unstable();
        reads.get(reads.len() / 2).copied().unwrap_or(0)
    };
    let ahead: Vec<f64> = samples.iter().filter_map(|sample| sample.ahead_s).collect();
    Sample {
        answer_s: of(|s| s.answer_s),
        running_s: of(|s| s.running_s),
        store_mib: of(|s| s.store_mib),
        ahead_s: (!ahead.is_empty()).then(|| median(ahead.into_iter())),
        late_reads: reads(|s| s.late_reads),
        store_reads: reads(|s| s.store_reads),
    }
}

pub(super) fn table(report: &Report) -> String {
    let mut text = format!(
        "{} MiB guest, {} MiB in use, {} MiB needed for the answer ({} MiB recorded, {} pages heard by {}); the store adds {} ms a read; {}\n\n{:<10}  {:>8}  {:>11}  {:>9}  {:>7}  {:>9}  {:>8}  {:>10}\n",
        report.memory_mib,
        report.used_mib,
        report.working_set_mib,
        report.recorded_mib,
        report.heard_pages,
        report.signal,
        report.delay_ms,
        report.accelerator,
        "",
        "answer s",
        "min-max",
        "running s",
        "ahead s",
        "store MiB",
        "reads",
        "late reads"
    );
    for row in &report.rows {
        let answers = || row.samples.iter().map(|sample| sample.answer_s);
        let (least, most) = (answers().fold(f64::INFINITY, f64::min), answers().fold(0.0, f64::max));
        let Sample { answer_s, running_s, ahead_s, late_reads, store_mib, store_reads } = row.median;
        let ahead = ahead_s.map_or_else(|| "-".to_owned(), |ahead| format!("{ahead:.2}"));
        let span = format!("{least:.2}-{most:.2}");
        text += &format!(
            "{:<10}  {answer_s:>8.2}  {span:>11}  {running_s:>9.2}  {ahead:>7}  {store_mib:>9.1}  {store_reads:>8}  {late_reads:>10}\n",
            row.way.name()
        );
    }
    text
}
