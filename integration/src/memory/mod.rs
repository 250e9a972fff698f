//! Guest memory, seen and moved from the host, without a change in the guest.
//!
//! A VM's memory is a mapping of its QEMU process. Which of its pages wait in swap, which of them the guest faults on, and
//! bringing them back before it does, are matters of that process; the guest knows nothing of it.
//!
//! - [`helper`]: the process that holds the privileges, its protocol, and the daemon's end of it
//! - [`layout`]: guest frame ↔ host address, from QEMU's monitor
//! - [`process`]: that a process is the one that was meant, and stays it
//! - [`pagemap`]: which pages are there, which in swap
//! - [`capture`]: what the guest faults on, in order
//! - [`advise`]: bringing in and pushing out
//! - [`swap`]: what this host swaps to
//! - [`template`]: machines started from the memory of another
//!
//! Pages are of 4 KiB; a *frame* is the index of a page in the guest's physical memory.

pub mod advise;
pub mod capture;
pub mod helper;
pub mod layout;
pub mod pagemap;
pub mod process;
pub mod swap;
pub mod template;

use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// When it started, in clock ticks since the host's start: field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
    pub started: u64,
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.pid)
    }
}

/// A stretch of guest memory that lies in one piece of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Region {
    /// First guest frame.
    pub frame: u64,
    pub pages: u64,
    /// Address in the process, a multiple of [`PAGE_BYTES`].
    pub host: u64,
}

/// Neighbouring guest frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    pub frame: u64,
    pub pages: u32,
}

/// How faults are seen, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signal {
    /// Tracepoint `kvmmmu:kvm_mmu_spte_requested`: every guest fault, in order, with its frame.
    KvmSpte,
    /// Tracepoint `kvm:kvm_page_fault`: the same, of processors with two-dimensional paging.
    KvmFault,
    /// Software event of major faults, with addresses, a thread each: in order; sees what QEMU itself touches (TCG, devices).
    PerfMajor,
    /// `PAGEMAP_SCAN` (Linux 6.7): what has come in since the last look, in no order.
    PagemapScan,
    /// `/proc/PID/pagemap`: the same, five times slower.
    Pagemap,
}

impl Signal {
    /// All, best first.
    pub const ALL: [Self; 5] = [Self::KvmSpte, Self::KvmFault, Self::PerfMajor, Self::PagemapScan, Self::Pagemap];

    /// Whether faults come one by one, as they happen.
    #[must_use]
    pub fn is_ordered(self) -> bool {
        matches!(self, Self::KvmSpte | Self::KvmFault | Self::PerfMajor)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::KvmSpte => "kvm_mmu_spte_requested",
            Self::KvmFault => "kvm_page_fault",
            Self::PerfMajor => "perf major faults",
            Self::PagemapScan => "PAGEMAP_SCAN",
            Self::Pagemap => "pagemap",
        })
    }
}

/// A guest's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// `CLOCK_MONOTONIC`, in microseconds.
    pub at_us: u64,
    pub frame: u64,
}

/// State of a page as [`pagemap`] tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PageState {
    /// Never touched, or dropped: reading it would make a page of zeroes.
    Absent,
    Present,
    /// In swap, or (private memory) brought back from there and not touched since.
    Swapped,
    /// Shared memory that is there, and not in the process's page table: not touched since it came.
    Cached,
}

/// Pages by state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Residency {
    pub present: u64,
    pub swapped: u64,
    pub cached: u64,
    pub absent: u64,
}

/// How pages are pushed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Push {
    /// `MADV_COLD`: first to go when memory is needed.
    Cold,
    /// `MADV_PAGEOUT`: to swap at once.
    PageOut,
}

/// Why guest memory cannot be watched or moved. Callers match on the kind; the text is for people.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum MemoryError {
    #[error("{process} is gone")]
    Gone { process: ProcessId },
    #[error("process {pid} is another one than was meant: it started at tick {found}, not {meant}")]
    Reused { pid: u32, meant: u64, found: u64 },
    #[error("process {pid} runs {exe}, which is no hypervisor this helper may touch")]
    Foreign { pid: u32, exe: String },
    #[error("not permitted: {what}; {remedy}")]
    NotPermitted { what: String, remedy: String },
    #[error("this kernel cannot: {what}")]
    Unsupported { what: String },
    #[error("prestage-memory speaks version {helper} and prestaged {daemon}: install both from one package")]
    Version { helper: u32, daemon: u32 },
    #[error("guest frames {frame} to {} are no memory of this machine", .frame + u64::from(*.pages))]
    NoSuchMemory { frame: u64, pages: u32 },
    #[error("this host has no swap")]
    NoSwap,
    #[error("{what}: {error}")]
    Os { what: String, error: String },
    #[error("the helper is not told of machine {0}")]
    Unknown(u32),
    #[error("the helper has too much to do")]
    Busy,
    #[error("the helper has ended ({0}); it is started anew")]
    HelperGone(String),
    #[error("QEMU's monitor: {0}")]
    Layout(String),
}
