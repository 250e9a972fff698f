//! Slabs of the SSD tier made without a daemon.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use prestage_cache::ssd::{SsdOptions, SsdTier, Stamp};
use prestage_cache::types::{BlockIndex, PageMask};

/// Puts all slots of a slab in use, for a store that nobody opens. What they hold is left out: only their records are read at a
/// start. Returns how many.
///
/// # Errors
/// The slab cannot be opened, is in use, or holds something.
pub fn fill(slab: &Path, size_bytes: u64) -> Result<u64> {
    let options = SsdOptions { preallocate: false, ..SsdOptions::default() };
    let (tier, _) = SsdTier::open_with(slab, size_bytes, options)?;
    let stamp = Stamp { size_bytes, ..Stamp::default() };
    let storage = tier.storage("file:/nowhere", Some(stamp))?;
    let slots = tier.stats().slots;
    for block in tier.stats().used_slots..slots {
        let write = tier.begin_insert(storage, BlockIndex(block), PageMask::ALL).context("no slot is free")?;
        tier.finish_insert(write, 0, true);
    }
    ensure!(tier.stats().used_slots == slots, "not all slots are in use");
    tier.release_storage(storage, Some(stamp));
    tier.close()?;
    Ok(slots)
}
