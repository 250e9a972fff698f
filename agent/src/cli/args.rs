//! The command line of prestagectl.

use std::path::PathBuf;

use clap::{Arg, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use prestage_cache::backend::StoreSpec;
use prestage_integration::api::tiers::{RAM_MIN_BYTES, SSD_MIN_BYTES};
use prestage_integration::api::types::{ByteRange, DropTier, validate_name};

use super::demand::{
    ActivityArgs, DecisionsArgs, EventCommand, ExecutionCommand, ForecastCommand, PolicyArgs, ReservationCommand,
};
use super::history::HistoryCommand;
use super::models::ModelCommand;
use crate::config::units::{human_bytes, parse_bytes};

/// Where prestaged listens unless configured otherwise.
pub const DEFAULT_SOCKET: &str = "/run/prestage/prestaged.sock";

/// Where help lists what every command takes, apart from a command's own options.
const GLOBAL: &str = "Options of every command";

/// Controls prestaged, the host agent that pre-stages disks of virtual machines.
#[derive(Debug, Parser)]
#[command(
    name = "prestagectl",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
#[command(
    after_help = "Sizes: KiB, MiB, GiB, TiB, PiB are powers of 1024, and so are K, M, G, T, P where one is given; KB, MB, GB, TB are powers of 1000. \
    What is shown is rounded; --json has all in bytes.\nTimes: us is a microsecond, a millionth of a second; ms a thousandth.\nExit codes: 0 done, 1 failed, 2 wrong \
    usage, 3 prestaged cannot be reached."
)]
pub struct Cli {
    /// Control socket of prestaged
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "PATH", env = "PRESTAGE_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// The command line with help that offers `--socket` only where a daemon is asked.
    pub(super) fn as_shown() -> clap::Command {
        let alone = |command: clap::Command| {
            // In the place of the global option: taken, for scripts that always give it, and not shown.
            let socket = Arg::new("socket").long("socket").hide(true).value_parser(clap::value_parser!(PathBuf));
            command.arg(socket)
        };
        Self::command()
            .mut_subcommand("trace", |trace| trace.mut_subcommand("replay", alone))
            .mut_subcommand("simulate", alone)
            .mut_subcommand("forecast", |forecast| forecast.mut_subcommand("evaluate", alone))
            .mut_subcommand("config", |config| config.mut_subcommand("default", alone).mut_subcommand("check", alone))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Health of the daemon and its parts
    #[command(
        long_about = "Health of the daemon and its parts.\n\n  sandbox    what confines prestaged, and what does not and why\n  \
        cache      what is in use of each tier\n  \
        hits       share of guests' reads that a tier has served since prestaged started\n  \
        recovered  what the SSD tier had from before the start\n  \
        learner    reads and writes it was told of (accesses), those it missed (dropped), what it knows (profiles) and the memory that takes\n  \
        memory     machines whose memory is watched, what was brought in from swap, and what of it was used\n  \
        db writes  what is still to be written to the database, and what was lost\n\n\
        Below that stands what needs attention, each with what to do, and what holds for the time being."
    )]
    Status,
    /// Disks served to virtual machines
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Virtual machines known to libvirt
    #[command(subcommand)]
    Vm(VmCommand),
    /// Machines saved with their memory, for clones
    #[command(subcommand)]
    Template(super::templates::TemplateCommand),
    /// The RAM and SSD tiers
    #[command(subcommand)]
    Cache(CacheCommand),
    /// What was learned of each storage
    #[command(subcommand)]
    Profile(ProfileCommand),
    /// Recorded requests
    #[command(subcommand)]
    Trace(TraceCommand),
    /// What was read when
    #[command(subcommand)]
    History(HistoryCommand),
    /// Neural models: training, comparison, roll-back; thresholds
    #[command(subcommand)]
    Model(ModelCommand),
    /// What machines are going to use
    #[command(subcommand)]
    Forecast(ForecastCommand),
    /// What should be changed now, whatever the mode
    #[command(after_help = super::demand::RECOMMEND_HELP)]
    Recommend {
        /// Name or UUID of a machine [default: all]
        vm: Option<String>,
    },
    /// What was decided, why, and what became of it
    Decisions(DecisionsArgs),
    /// Promises of resources for a time window
    #[command(subcommand)]
    Reservation(ReservationCommand),
    /// Programs that run in machines
    #[command(subcommand)]
    Execution(ExecutionCommand),
    /// What demand may follow: schedules and single dates
    #[command(subcommand)]
    Event(EventCommand),
    /// Whether demand is measured, what is unusual, and how VM managers are told
    #[command(after_help = super::demand::DEMAND_HELP)]
    Demand,
    /// How much RAM and SSD a machine is worth, from its history
    Advise(super::advise::AdviseArgs),
    /// Why a block was or was not prefetched
    Explain(super::explain::ExplainArgs),
    /// What the planner would do with a recorded month of machines, beside others
    Simulate(super::simulate::SimulateArgs),
    /// The configuration file
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Versions of prestagectl and of the running prestaged
    Version,
}

#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Serve a disk, also after a restart
    Add(DiskAddArgs),
    /// All disks
    #[command(long_about = "All disks.\n\n  SIZE       what the guest sees\n  \
        MODE       rw, or ro for one that refuses writes\n  \
        CONNECTED  whether a hypervisor is, with how many queues\n  \
        VM         machine and device that it was attached to\n  \
        READS      of the guest, since prestaged started\n  \
        STORE      where its data is\n  \
        STATE      of the store, and what to do if it is not ok")]
    List,
    /// One disk and its counters
    #[command(
        long_about = "One disk and its counters since prestaged started.\n\n  storage           what it shares cache and profile by with other disks\n  \
        mean wait         of a read, until it was answered\n  \
        from RAM          reads that the RAM tier has served; from SSD the same\n  \
        waited for store  reads that had to wait for the store\n  \
        store reads       all of them, also of other disks on its storage and ahead of the guest\n  \
        prefetch          read ahead of the guest: asked for, used, left unused, called off\n  \
        prefetch late     reads that came while what they wanted was being read ahead\n  \
        accesses dropped  requests that the learner was not told of, since it did not keep up"
    )]
    Show {
        /// Name of the disk
        #[arg(value_parser = disk_name)]
        name: String,
    },
    /// Make a disk larger while its guest runs, or tell the guest of a store that has become larger
    #[command(
        long_about = "Make a disk larger while its guest runs. Other disks are not disturbed.\n\nWith SIZE a raw file is made so large; space is taken \
        when it is written to. Nothing is ever made smaller. Block devices, NBD exports and images are made larger where they are, and the refusal says how; \
        then, without SIZE, the store is looked at and the guest told. Files and devices are looked at every few seconds anyway.\n\nThe guest's kernel \
        says that the disk has a new size; its partition and file system are the guest's to make larger."
    )]
    Resize {
        /// Name of the disk
        #[arg(value_parser = disk_name)]
        name: String,
        /// New size, such as 20GiB [default: what the store has now]
        #[arg(value_parser = parse_bytes)]
        size: Option<u64>,
    },
    /// Stop serving a disk; its data stays where it is
    Remove {
        /// Name of the disk
        #[arg(value_parser = disk_name)]
        name: String,
        /// Also while a hypervisor is connected: its guest then waits for the disk. And although its store was deleted: it is lost then
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct DiskAddArgs {
    /// 1 to 64 letters, digits, `.`, `_`, `-`
    #[arg(value_parser = disk_name)]
    pub name: String,
    /// Path of a raw image or block device, qcow2:/path[?backing=STORE], nbd://host[:port]/export or
    /// nbd+unix:///export?socket=/path
    pub store: StoreSpec,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Socket for the hypervisor [default: <run_dir>/vm/NAME.sock]
    // Not `--socket`, which is the daemon's own and global.
    #[arg(long = "export-socket", value_name = "PATH")]
    pub export_socket: Option<PathBuf>,
    /// Also over NBD, on <run_dir>/nbd/NAME.sock
    #[arg(long)]
    pub nbd: bool,
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// All machines and their disks
    List,
    /// One machine: its disks, and how its memory fares
    Show {
        /// Name or UUID
        vm: String,
    },
    /// Have a machine's disk served by prestaged
    Attach {
        /// Name or UUID
        vm: String,
        /// Device name in the machine's definition, such as vda
        target: String,
        /// Add shared memory backing where the definition lacks it; the guest's memory is then a memfd
        #[arg(long)]
        enable_shared_memory: bool,
        /// Queues of the disk [default: one per vCPU, at most 8]
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
        queues: Option<u16>,
        /// Name of the disk made [default: VM-TARGET]
        #[arg(long, value_parser = disk_name)]
        name: Option<String>,
    },
    /// What may be done to a machine: show it, or change what is given
    Policy(Box<PolicyArgs>),
    /// What users do in a machine, now or from a time on: tell it, or show what was told
    Activity(ActivityArgs),
    /// Save a running machine as a template, for clones that share its memory; it stands still for a moment
    #[command(
        long_about = "Save a running machine as a template: its devices and its memory, from which clones start that share one \
        copy of that memory in the host's page cache. It stands still while it is written, and goes on whatever happens.\n\nRefused is what \
        clones would share or lose: writable disks, vhost-user disks, devices of the host, NUMA cells and memory devices, huge pages, UEFI \
        variables. QEMU 9.0 or newer is needed. All of the memory is read: what is in swap comes back for \
        that, which takes its time; where it is shared (memfd), what the guest never used is allocated, and stays so until the machine ends, and \
        elsewhere `vm show` counts it as in memory from then on, a page of zeros. The template holds all that was in the machine's memory, secrets included."
    )]
    SaveTemplate(super::templates::SaveArgs),
    /// Start a clone of a template: its memory is read ahead of it in the order clones touch it
    #[command(
        long_about = "Start a clone of a template. What clones touch first is read ahead of it, in their order, the rest behind it at \
        low priority. The first clone's touches are recorded for those to come.\n\nThe clone is transient (gone when it stops) and has a UUID, \
        MAC addresses and consoles of its own. Its guest does not know: its network interfaces are unplugged until it was told.\n\n`vm show` tells \
        how far its memory is read and what stands against it, and `vm list` (TEMPLATE READ) of all clones of this run of prestaged."
    )]
    StartFromTemplate(super::templates::StartArgs),
    /// Give a machine's disk its original source back
    Detach {
        /// Name or UUID
        vm: String,
        /// Device name in the machine's definition, such as vda
        target: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Size, use and health of each tier, and what is cached
    #[command(long_about = "Size, use and health of each tier, and what is cached of which storage.\n\n  \
        SIZE      room for blocks; the SSD tier's file has its metadata besides\n  \
        USED %    blocks in use, of the size\n  \
        BLOCKS    of 64 KiB, in use\n  \
        DATA      what they hold: a block may be partly filled\n  \
        UNREAD    read ahead of the guest, which has not read it yet\n  \
        HITS      read requests served from this tier since prestaged started\n  \
        EVICTED   blocks that left to make room")]
    Tiers,
    /// Where reads were served from: since the start, or a line each INTERVAL
    #[command(
        long_about = "Where reads were served from.\n\nWithout INTERVAL: totals since prestaged started, by disk. With it: a line each INTERVAL seconds, of that \
        interval alone, COUNT lines or until stopped.\n\n  \
        reads/s   guest read requests\n  \
        from      share of them served from RAM, from the SSD tier, after waiting for the store\n  \
        wait      mean time of a read in milliseconds\n  \
        read write   by the guest (MB/s is millions of bytes a second)\n  \
        ahead     read ahead of the guest\n  \
        store     all reads from the store, those ahead included\n  \
        prec      bytes read ahead that the guest used, of those that arrived\n  \
        late      reads that waited for a block being read ahead\n  \
        err       reads that failed, in the interval\n\nTime is UTC. With --json and INTERVAL: a line of the raw counters each INTERVAL."
    )]
    Stat {
        /// Seconds between lines, at least 0.1
        #[arg(value_parser = interval)]
        interval: Option<f64>,
        /// Lines to print
        #[arg(requires = "interval", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// Of one disk alone
        #[arg(long, value_name = "NAME", value_parser = disk_name)]
        disk: Option<String>,
    },
    /// Bring a disk's blocks into the cache: what its profile learned, or the ranges given
    Warm {
        /// Name of the disk
        #[arg(value_parser = disk_name)]
        disk: String,
        /// OFFSET+LENGTH[,…], such as 0+64MiB,1GiB+4MiB
        #[arg(long, value_name = "RANGES", value_delimiter = ',', value_parser = range, conflicts_with = "profile")]
        ranges: Vec<ByteRange>,
        /// What this profile learned
        #[arg(long, value_name = "ID")]
        profile: Option<String>,
    },
    /// Give the tiers other sizes while guests are served
    #[command(
        long_about = "Give the tiers other sizes while guests are served: all that is asked for, or nothing.\n\nA tier that grows keeps what it \
        has. Of the RAM tier the least useful blocks leave when it shrinks; of the SSD tier those beyond the new end. The configuration stays as \
        it is: the next start takes the size that is set there, and so does a reload after that was changed."
    )]
    Resize(ResizeArgs),
    /// Take tiers out of service while guests are served: memory is given back, the SSD tier's file or device closed
    #[command(
        long_about = "Take tiers out of service while guests are served, until `cache resume`: the RAM tier gives its memory back; the SSD \
        tier's file or device is closed, so that it can be unmounted or replaced. What they hold is forgotten; it is all in the stores too, from which guests \
        are served meanwhile. A restart leaves them out as well, unless the configuration names another file or device by then. `cache tiers` and `status` \
        say since when, and what was wrong with it; health stays ok. The answer comes within some ten seconds: where the SSD tier's device does not \
        answer, the tier is out of service and its file not closed yet, which the answer says, as do `cache tiers` and `status` until it is."
    )]
    Drain(ServiceArgs),
    /// Bring tiers back into service, empty, as large as they were; also an SSD tier that could not be opened
    #[command(
        long_about = "Bring tiers back into service, empty, as large as they were; also an SSD tier that could not be opened. Where the SSD tier's \
        file lay on a mount point of its own, and nothing is mounted there, that is refused: it would be made anew on the file system above."
    )]
    Resume(ResumeArgs),
    /// Take blocks out of the cache, of all disks unless --disk names one; no guest data is lost
    Drop {
        /// From which tier
        #[arg(long, value_enum, default_value_t = TierArg::All)]
        tier: TierArg,
        /// Only this disk's storage
        #[arg(long, value_name = "NAME", value_parser = disk_name)]
        disk: Option<String>,
    },
}

#[derive(Debug, Args)]
#[group(id = "sizes", required = true, multiple = true, args = ["ram", "ssd"])]
pub struct ResizeArgs {
    /// Size of the RAM tier, at least 16MiB, such as 2GiB
    #[arg(long, value_name = "SIZE", value_parser = ram_size)]
    pub ram: Option<u64>,
    /// Size of the SSD tier with its metadata, at least 64MiB
    #[arg(long, value_name = "SIZE", value_parser = ssd_size)]
    pub ssd: Option<u64>,
    /// Also a RAM tier of more than 90 % of the host's memory
    #[arg(long, requires = "ram")]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    pub which: ServiceArgs,
    /// Also where nothing is mounted that the SSD tier's file lay on when it was taken out: it is made there, on what is mounted above
    #[arg(long, requires = "ssd")]
    pub force: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct ServiceArgs {
    /// The RAM tier
    #[arg(long)]
    pub ram: bool,
    /// The SSD tier
    #[arg(long)]
    pub ssd: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum TierArg {
    Ram,
    Ssd,
    All,
}

impl From<TierArg> for DropTier {
    fn from(tier: TierArg) -> Self {
        match tier {
            TierArg::Ram => Self::Ram,
            TierArg::Ssd => Self::Ssd,
            TierArg::All => Self::All,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum ProfileCommand {
    /// All profiles
    List,
    /// One profile and its phases
    Show {
        /// From `profile list`
        id: String,
    },
    /// Forget what was learned; it is learned anew
    Remove {
        /// From `profile list`
        id: String,
    },
    /// Write what was learned to the database now
    Save,
}

#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Run the cache policy and the predictor on recorded traces
    #[command(long_about = super::replay::ABOUT)]
    Replay(Box<super::replay::ReplayArgs>),
    /// Record a disk's requests as they come
    Record(super::record::RecordArgs),
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration file with its drop-ins and what they name, as `prestaged --check` does: secrets, certificates, groups, sizes,
    /// folders, stores, and what this host can confine prestaged with; without touching the daemon
    Check {
        /// The file; FILE.d/*.toml are read after it
        #[arg(default_value = crate::config::DEFAULT_PATH)]
        file: PathBuf,
    },
    /// Print the reference file: every key with its default
    Default,
}

fn at_least(text: &str, least: u64) -> Result<u64, String> {
    match parse_bytes(text)? {
        bytes if bytes < least => Err(format!("at least {}", human_bytes(least))),
        bytes => Ok(bytes),
    }
}

fn ram_size(text: &str) -> Result<u64, String> {
    at_least(text, RAM_MIN_BYTES)
}

fn ssd_size(text: &str) -> Result<u64, String> {
    at_least(text, SSD_MIN_BYTES)
}

pub(super) fn disk_name(text: &str) -> Result<String, String> {
    validate_name(text).map(|()| text.to_owned())
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err("it is a number of seconds, 0.1 to 86400".to_owned()),
    }
}

fn range(text: &str) -> Result<ByteRange, String> {
    let (offset, length) = text.split_once('+').ok_or("it is OFFSET+LENGTH, such as 1GiB+4MiB")?;
    let (offset_bytes, length_bytes) = (parse_bytes(offset)?, parse_bytes(length)?);
    if length_bytes == 0 || offset_bytes.checked_add(length_bytes).is_none() {
        return Err("its length is 0 or it ends beyond 2^64".to_owned());
    }
    Ok(ByteRange { offset_bytes, length_bytes })
}
