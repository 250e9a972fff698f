//! The plain types exchanged with the predictor. Units: pages are 4 KiB indices on the storage, times are microseconds
//! of any clock that does not run backwards.

/// Bytes in a page, the unit of prediction.
pub const PAGE_BYTES: u64 = 4096;
/// Pages in a block (64 KiB), the unit of a Markov state and of a page mask.
pub const BLOCK_PAGES: u64 = 16;
/// Largest storage the predictor reasons about, in pages (just under 256 TiB), so that a block index fits in 32 bits.
pub const MAX_PAGES: u64 = (u32::MAX as u64) * BLOCK_PAGES;

/// Pages of one read that are looked at (16 MiB); what a longer one touches beyond is not learned.
pub(crate) const MAX_READ_PAGES: u32 = 4096;

/// What a guest did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Read,
    Write,
    /// Discard or write-zeroes: the old contents need not be fetched any more.
    Discard,
}

/// One guest request, after the backing chain is resolved to this storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub at_us: u64,
    /// Owner of the access stream: which VM (and disk).
    pub vm: u64,
    pub op: Op,
    /// First 4 KiB page touched.
    pub first: u64,
    /// Pages touched; 0 is ignored.
    pub pages: u32,
}

impl Access {
    /// Pages of a read that are looked at (16 MiB at most); what a longer one touches beyond is not learned.
    pub(crate) fn read_pages(&self) -> u32 {
        self.pages.min(MAX_READ_PAGES)
    }
}

/// Who proposed a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Expert {
    /// Ascending stream.
    Sequential,
    /// Descending stream.
    Backward,
    /// Constant distance between requests.
    Stride,
    /// The rest of a 64 KiB block of which some pages were touched.
    Spatial,
    /// Successors of a block.
    Markov,
    /// What followed when the same was read before.
    Log,
    /// First-touch set of a named phase.
    Phase,
    /// The LSTM: names no pages of its own, and speaks for or against those that others name.
    Lstm,
}

impl Expert {
    /// All experts, in the order of [`Expert::index`].
    pub const ALL: [Self; 8] = [
        Self::Sequential,
        Self::Backward,
        Self::Stride,
        Self::Spatial,
        Self::Markov,
        Self::Log,
        Self::Phase,
        Self::Lstm,
    ];

    /// Position in [`Expert::ALL`], for tables by expert.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Lower-case name for metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Backward => "backward",
            Self::Stride => "stride",
            Self::Spatial => "spatial",
            Self::Markov => "markov",
            Self::Log => "log",
            Self::Phase => "phase",
            Self::Lstm => "lstm",
        }
    }
}

/// Pages that are expected to be read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub first: u64,
    /// 1 ..= 128.
    pub pages: u32,
    /// Calibrated probability that the guest reads a page of it, 0 ..= 1.
    pub probability: f32,
    /// When the first page is expected to be read, where the expert knows.
    pub due_us: Option<u64>,
    pub expert: Expert,
}

/// What became of prefetched pages. Report it when a prefetched page is first read (`used`), or leaves the cache
/// unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub first: u64,
    pub pages: u32,
    pub expert: Expert,
    /// Read by a guest; otherwise evicted, cancelled or failed before any read: it may be proposed again.
    pub used: bool,
    /// Used, but the guest had to wait for it.
    pub late: bool,
}

/// A stretch of a VM's life with a beginning that is known from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// From power-on (or reset).
    Boot,
    /// From the start of the program with this id (any stable hash of its name).
    Program(u64),
}
