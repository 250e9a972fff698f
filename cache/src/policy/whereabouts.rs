//! Where one page is, for whoever asks why: no part of any decision.

use super::{Core, Key};
use crate::types::{BlockIndex, PageMask, StorageId};

/// Where a page is.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Whereabouts {
    /// Valid in the RAM tier.
    pub ram: bool,
    /// Came by prefetch and was not read since.
    pub unread: bool,
    /// On its way into the RAM tier.
    pub loading: bool,
    /// Waits in the prefetch queue.
    pub queued: bool,
    /// Valid in the SSD tier.
    pub ssd: bool,
}

/// A storage's prefetch budget at one moment.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct BudgetState {
    /// Bytes that may be under way.
    pub window_bytes: u64,
    pub in_flight_bytes: u64,
    /// Pages that wait for their turn.
    pub queued_pages: u64,
}

impl Core {
    /// Where a page is, apart from the SSD tier, which the core does not know.
    pub fn place(&self, storage: StorageId, page: u64) -> Whereabouts {
        let queued =
            self.storages.get(storage.0 as usize).and_then(Option::as_ref).is_some_and(|s| s.queue.holds(page));
        let block_pages = self.block_pages();
        let (block, within) = (BlockIndex(page / block_pages), page % block_pages);
        let Some(slot) = self.find(Key::new(storage, block)) else {
            return Whereabouts { queued, ..Whereabouts::default() };
        };
        let entry = &self.entries[slot as usize];
        let loading = entry.filling.minus(entry.cancelled).has(within);
        let ram = entry.valid.has(within);
        Whereabouts { ram, unread: ram && entry.unused.has(within), loading, queued, ssd: false }
    }

    /// Pages of a block that the RAM tier holds.
    pub fn resident_mask(&self, storage: StorageId, block: BlockIndex) -> PageMask {
        self.find(Key::new(storage, block)).map_or(PageMask::NONE, |slot| self.entries[slot as usize].valid)
    }

    pub fn budget_state(&self, storage: StorageId) -> BudgetState {
        let Some(state) = self.storages.get(storage.0 as usize).and_then(Option::as_ref) else {
            return BudgetState::default();
        };
        BudgetState {
            window_bytes: state.budget.window_bytes(),
            in_flight_bytes: state.budget.bytes_in_flight(),
            queued_pages: state.queue.pages(),
        }
    }
}
