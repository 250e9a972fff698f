//! Options of `trace replay`.

use crate::config::units::parse_bytes;
use clap::{Args, ValueEnum};
use prestage_cache::policy::Eviction;
use prestage_predictor::PAGE_BYTES;
use prestage_replay::trace::{BlktraceAction, ReadOptions, TraceFormat};
use prestage_replay::{CacheSize, DeviceConfig, PolicyKind};
use std::path::{Path, PathBuf};

pub(in crate::cli) const ABOUT: &str = "Runs the policy core and the predictor that prestaged runs on recorded block \
traces, with a virtual clock and a model of the store, and counts what would have been hit. Needs no daemon.

A trace is CSV (ts_us,op,offset,len; bytes; op R, W or D), a binary vscsi trace, what blkparse prints, or the log of \
nbdkit's log filter, each plain or compressed with gzip or zstd. A read hits if all its pages are cached, or on their \
way, when it comes.

  CACHE          its size; a share of less than 256 KiB is taken as that
  HIT % PAGE %   of the reads, and of their pages
  COVER %        of the pages that had to come from the store, those that were read ahead in time or late
  PREC %         of the pages read ahead, those that were used
  LATE %         of those, the ones that a read had to wait for
  DEMAND AHEAD   read from the store because a read missed, and ahead
  UNUSED         read ahead, and gone before anybody used it
  ECE            expected calibration error of the probabilities, 0 is best
  MEAN US P99 US   time of a read in microseconds, with --latency-us
  NS/REQ         the predictor's time for a request in nanoseconds, with --cost
  PHASE FROM S   with --programs: what ran, from which second on; `-` between programs

With --json a line of JSON for each trace; cache_share there is the cache's share of footprint_pages, the distinct pages.";

#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// Traces to replay, each on an empty cache
    #[arg(required = true, value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
    /// Trace to learn from before; MARKS as for --programs
    #[arg(long, value_name = "FILE[,MARKS]", value_parser = input)]
    pub(super) train: Vec<Input>,
    /// Size of the cache: a share of the trace's distinct pages (0.05, 5%) or a size (512MiB)
    #[arg(long, value_name = "SIZE", value_parser = cache_size)]
    pub(super) cache: CacheSize,
    /// Who proposes what to read ahead
    #[arg(long, value_enum, default_value_t = PolicyArg::Prestage)]
    pub(super) policy: PolicyArg,
    /// LSTM that speaks in it [default: lstm trains one on the traces of --train, prestage has none]
    #[arg(long, value_name = "FILE")]
    pub(super) model: Option<PathBuf>,
    /// Keep the LSTM that was trained, for --model
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub(super) save_model: Option<PathBuf>,
    /// What leaves when the cache is full
    #[arg(long, value_enum, default_value_t = EvictionArg::S3Fifo)]
    pub(super) eviction: EvictionArg,
    /// Unit of allocation: 4K, 8K, 16K, 32K or 64K, which prestaged has
    #[arg(long = "block", value_name = "SIZE", default_value = "4K", value_parser = block_pages)]
    pub(super) block_pages: u64,
    /// Latency of the store; without it everything is done at once
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(super) latency_us: Option<f64>,
    /// Bandwidth of the store in MB/s
    #[arg(long, value_name = "N", default_value = "500", value_parser = positive, requires = "latency_us")]
    pub(super) mbps: f64,
    /// Lowest probability, 0 to 1, at which a predicted block is read ahead
    #[arg(long, value_name = "P", default_value_t = f64::from(prestage_predictor::DEFAULT_THRESHOLD), value_parser = probability)]
    pub(super) threshold: f64,
    /// What the guest did when: lines `TS_US start NAME`, `TS_US end NAME`, `TS_US boot-done`, `TS_US off`
    #[arg(long, value_name = "MARKS")]
    pub(super) programs: Option<PathBuf>,
    /// Format of all traces [default: found out from the first bytes]
    #[arg(long, value_enum)]
    pub(super) format: Option<FormatArg>,
    /// Which event of a request counts in a blktrace
    #[arg(long, value_enum, default_value_t = ActionArg::Queued)]
    pub(super) blktrace_action: ActionArg,
    /// Leave out up to N bad rows of each trace
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) skip_bad: u64,
    /// Measure the predictor's time for a request
    #[arg(long)]
    pub(super) cost: bool,
}

impl ReplayArgs {
    /// What no single option can tell.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.programs.is_some() && self.files.len() > 1 {
            return Err("--programs belongs to one trace; replay the traces one by one".to_owned());
        }
        if self.policy == PolicyArg::Lstm && self.model.is_none() && self.train.is_empty() {
            return Err("--policy lstm needs a model: --model FILE, or --train FILE to train one on".to_owned());
        }
        if self.save_model.is_some() && self.policy != PolicyArg::Lstm {
            return Err("--save-model is for --policy lstm, which trains a model on --train".to_owned());
        }
        if self.model.is_some() && !matches!(self.policy, PolicyArg::Lstm | PolicyArg::Prestage) {
            return Err("--model is for --policy lstm and --policy prestage; the others listen to none".to_owned());
        }
        Ok(())
    }

    pub(super) fn read_options(&self) -> ReadOptions {
        ReadOptions {
            format: self.format.map(Into::into),
            blktrace_action: match self.blktrace_action {
                ActionArg::Queued => BlktraceAction::Queued,
                ActionArg::Issued => BlktraceAction::Issued,
            },
            skip_bad: self.skip_bad,
        }
    }

    pub(super) fn device(&self) -> Option<DeviceConfig> {
        self.latency_us.map(|latency_us| DeviceConfig { latency_us, mbps: self.mbps })
    }
}

/// A trace to train on, and its marks.
#[derive(Debug, Clone)]
pub(super) struct Input {
    pub(super) path: PathBuf,
    pub(super) marks: Option<PathBuf>,
}

fn input(text: &str) -> Result<Input, String> {
    match text.rsplit_once(',') {
        // A comma may be part of a name.
        Some((path, marks)) if !Path::new(text).exists() => Ok(Input { path: path.into(), marks: Some(marks.into()) }),
        _ => Ok(Input { path: text.into(), marks: None }),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PolicyArg {
    /// Nobody
    None,
    /// The predictor's streams alone
    Readahead,
    /// The predictor's Markov contexts alone
    Markov,
    /// Candidates ranked by the LSTM alone; needs --model or --train
    Lstm,
    /// The whole predictor, as prestaged runs it
    Prestage,
}

impl PolicyArg {
    /// `None`: nothing is proposed.
    pub(super) fn kind(self) -> Option<PolicyKind> {
        match self {
            Self::None => None,
            Self::Lstm => Some(PolicyKind::Lstm),
            Self::Readahead => Some(PolicyKind::Readahead),
            Self::Markov => Some(PolicyKind::Markov),
            Self::Prestage => Some(PolicyKind::Prestage),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum EvictionArg {
    /// S3-FIFO with probation for what was read ahead, as in prestaged
    S3Fifo,
    /// Plain LRU, to compare with
    Lru,
}

impl From<EvictionArg> for Eviction {
    fn from(eviction: EvictionArg) -> Self {
        match eviction {
            EvictionArg::S3Fifo => Self::S3Fifo,
            EvictionArg::Lru => Self::Lru,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FormatArg {
    Csv,
    Vscsi,
    Blktrace,
    Nbdkit,
}

impl From<FormatArg> for TraceFormat {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Csv => Self::Csv,
            FormatArg::Vscsi => Self::Vscsi,
            FormatArg::Blktrace => Self::Blktrace,
            FormatArg::Nbdkit => Self::Nbdkit,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ActionArg {
    Queued,
    Issued,
}

/// The smallest cache that a replay makes.
const MIN_CACHE: u64 = 256 << 10;

fn cache_size(text: &str) -> Result<CacheSize, String> {
    let refuse = || format!("`{text}` is neither a share above 0 and up to 1 (0.05, 5%) nor a size (512MiB)");
    let share = match text.strip_suffix('%') {
        Some(percent) => Some(percent.parse::<f64>().map_err(|_| refuse())? / 100.0),
        None => text.parse::<f64>().ok().filter(|number| *number <= 1.0),
    };
    match share {
        Some(share) if share > 0.0 && share <= 1.0 => Ok(CacheSize::Fraction(share)),
        Some(_) => Err(refuse()),
        None => match parse_bytes(text).map_err(|_| refuse())? {
            // `5` for `5%` is easily written, and a cache of 5 bytes never meant.
            bytes if bytes < MIN_CACHE => {
                Err(format!("`{text}` is less than 256KiB, the smallest cache; a share is written 5% or 0.05"))
            }
            bytes => Ok(CacheSize::Bytes(bytes)),
        },
    }
}

fn block_pages(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    [1, 2, 4, 8, 16]
        .into_iter()
        .find(|pages| pages * PAGE_BYTES == bytes)
        .ok_or_else(|| format!("`{text}` is not a block size; it is 4K, 8K, 16K, 32K or 64K"))
}

fn positive(text: &str) -> Result<f64, String> {
    // A nanosecond or a byte a second and less, or hours, are no store.
    match text.parse::<f64>() {
        Ok(number) if (1e-3..=1e9).contains(&number) => Ok(number),
        _ => Err("it is a number from 0.001 to 1000000000".to_owned()),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=1.0).contains(&number) => Ok(number),
        _ => Err("it is a probability, 0 to 1".to_owned()),
    }
}
