//! Reads of one stream to tokens, without predicting anything.

use super::Slate;
use crate::access::{Access, MAX_PAGES, Op};
use crate::hybrid::{Hybrid, Moment, Trail};
use crate::lstm::Token;
use crate::predictor::AccessConfig;

/// Turns the accesses of one stream (a VM on a storage) into the tokens that [`AccessPredictor`](crate::AccessPredictor)
/// makes of them, by the same code. Where several VMs share a storage, the predictor's also come from the other VMs' log
/// and chain. Memory as of a predictor's tables: about a megabyte.
#[derive(Debug)]
pub struct Tokeniser {
    hybrid: Hybrid,
    trail: Trail,
}

impl Default for Tokeniser {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokeniser {
    /// For a stream that begins.
    #[must_use]
    pub fn new() -> Self {
        // Nothing is predicted: what predictions need is as small as can be.
        let config = AccessConfig { recent_blocks: 0, predictions: 0, ..AccessConfig::default() };
        let mut hybrid = Hybrid::new(config.hybrid());
        let trail = hybrid.trail();
        Self { hybrid, trail }
    }

    /// The token of a read; `None` for anything else. What [`Tokeniser::slate`] said before was about this read.
    pub fn push(&mut self, access: &Access) -> Option<Token> {
        let left = MAX_PAGES.saturating_sub(access.first);
        let pages = access.read_pages().min(u32::try_from(left).unwrap_or(u32::MAX));
        if access.op != Op::Read || pages == 0 {
            return None;
        }
        let moment = Moment { at_us: access.at_us, size_pages: MAX_PAGES, floor: 1.0, silent: true, tokens: true };
        self.hybrid.read(&mut self.trail, access.first, pages, &moment, &mut Vec::new());
        self.trail.mind.pop()
    }

    /// What each symbol means for the next read.
    #[must_use]
    pub fn slate(&self) -> &Slate {
        &self.trail.slate
    }
}
