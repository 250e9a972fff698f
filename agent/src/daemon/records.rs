//! The records of the SSD tier's slots are read at the start, and what was found is said in the log.

use prestage_cache::ssd::{Found, OpenReport, SsdTier};
use std::path::Path;

/// Of so many slots (4 GiB) the records are 4 MiB, and read while the daemon starts: some tens of milliseconds.
const FEW_SLOTS: u64 = 1 << 16;

/// Has the slots' records read: of a large tier on a thread of its own, since nobody has to wait for that.
pub(super) fn read(path: &Path, tier: &SsdTier) {
    let (path, loading) = (path.to_owned(), tier.clone());
    if tier.stats().unread_slots <= FEW_SLOTS {
        tell_found(&path, &tier.load());
        return;
    }
    let slots = tier.stats().unread_slots;
    let in_background = {
        let path = path.clone();
        move || tell_found(&path, &loading.load())
    };
    match std::thread::Builder::new().name("ssd-load".to_owned()).spawn(in_background) {
        Ok(_) => {
            tracing::info!(path = %path.display(), slots, "SSD tier: its index is being read; guests are served meanwhile")
        }
        Err(error) => {
            tracing::warn!(%error, "SSD tier: no thread to read its index; guests wait for it");
            tell_found(&path, &tier.load());
        }
    }
}

/// Says what was found in the file of the SSD tier.
fn tell_found(path: &Path, report: &OpenReport) {
    let (path, kept_bytes, dropped) = (path.display(), report.kept_pages * 4096, report.dropped_slots());
    match report.found {
        Found::Created => tracing::info!(%path, slots = report.slots, "SSD tier made"),
        Found::Clean => tracing::info!(%path, slots = report.slots, kept_bytes, "SSD tier kept"),
        Found::Recovered => tracing::warn!(
            %path, kept_bytes, kept_blocks = report.kept_slots, dropped, written = report.marked_slots,
            damaged = dropped - report.marked_slots - report.unvouched_slots,
            "SSD tier recovered: prestaged was not stopped cleanly; blocks in regions that were being written to are dropped"
        ),
        Found::Unclean => tracing::warn!(
            %path,
            "SSD tier starts empty: its file says that nothing in it counts, as after `cache drain`, a write that came after it was closed, or \
             a crash of a prestaged that keeps no records while it runs"
        ),
        Found::Vetoed => tracing::warn!(
            %path, "SSD tier starts empty: its device had failed before prestaged was cut off"
        ),
        Found::Damaged => tracing::warn!(%path, "SSD tier starts empty: its file is damaged"),
    }
    if report.unvouched_slots > 0 {
        tracing::warn!(
            %path, dropped = report.unvouched_slots,
            "SSD tier: prestaged ran without it, or with another, since it was last in use; what it has of NBD stores and \
             block devices is dropped"
        );
    }
    tracing::debug!(?report, "SSD tier opened");
}
