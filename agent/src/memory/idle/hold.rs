//! Why nothing is pushed out, in words.

use std::fmt;

use prestage_integration::memory::MemoryError;

/// Why nothing is pushed out for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::memory) enum Hold {
    /// It was not watched for a minute yet.
    Young,
    NoSwap,
    SwapFull,
    Floor,
    Pressure,
    Refaults,
    /// The kernel did not push what it was told to.
    Kept,
    Failed(MemoryError),
    /// There is nothing that could be tried.
    InUse,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Young => "it is watched for a minute first",
            Self::NoSwap => "this host has no swap",
            Self::SwapFull => "a tenth of swap, or less, is free",
            Self::Floor => "what is in memory is the machine's floor (vm policy --pages-floor, memory.push_floor)",
            Self::Pressure => "tasks wait for memory (memory.push_pressure)",
            Self::Refaults => "too much of it came back",
            Self::Kept => {
                "the kernel keeps what it is told to push; its log and the control group's memory.swap.max may say why"
            }
            Self::Failed(error) => return write!(f, "it failed: {error}"),
            Self::InUse => "nothing that could be pushed looks idle",
        })
    }
}
