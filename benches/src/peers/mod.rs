//! What the predictor is measured against: caching alone and the prefetchers that the field's systems ship.
//!
//! | module | holds |
//! | --- | --- |
//! | [`simulate`] | the rules, the same for every peer: a page cache, a device, and what is counted |
//! | [`cache`] | the page cache: least recently used, or Belady's optimum |
//! | [`methods`] | readahead, leap, markov |
//!
//! A peer is told each request after it was served and names the pages to prefetch; whether a page is there already, and
//! what has to leave for it, is the simulator's business.

mod cache;
mod methods;
mod simulate;
#[cfg(test)]
mod tests;

pub(crate) use methods::Method;
pub(crate) use simulate::{Counts, Latency, MEGABYTES_PER_S, simulate};

/// The peers, in the order they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// LRU without prefetch.
    None,
    /// Many-stream sequential readahead, as kernels do it: 64 streams, windows that double up to 128 KiB.
    Readahead,
    /// Majority vote over the last 32 distances (Maruf and Chowdhury, "Effectively Prefetching Remote Memory with
    /// Leap", USENIX ATC 2020).
    Leap,
    /// First-order Markov chain over 64 KiB granules, four successors each (Joseph and Grunwald, "Prefetching using
    /// Markov Predictors", ISCA 1997), followed four steps deep.
    Markov,
    /// Both of them.
    MarkovReadahead,
    /// Optimal eviction without prefetch (Belady, "A study of replacement algorithms for a virtual-storage computer",
    /// IBM Systems Journal 1966): the most that caching alone can do.
    Opt,
}

impl Peer {
    pub(crate) const ALL: [Self; 6] =
        [Self::None, Self::Readahead, Self::Leap, Self::Markov, Self::MarkovReadahead, Self::Opt];

    /// Name in tables and JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Readahead => "readahead",
            Self::Leap => "leap",
            Self::Markov => "markov",
            Self::MarkovReadahead => "markov+readahead",
            Self::Opt => "opt",
        }
    }
}
