//! The end of a slab's use in order: its index is written, and that it is whole last of all.
//!
//! One whose records are still being read is left as one in use; a write that comes after its closing makes it dirty again.

use super::open::{self, Extent, Mark};
use super::tier::{Shared, State, Trust};
use super::{SsdError, SsdTier, lineage, veto};
use crate::engine::within;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a file that is given up may take to be closed.
const LET_GO: Duration = Duration::from_secs(1);

/// What the slab says of itself on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum OnDisk {
    Dirty,
    /// Closing failed, perhaps after the last write reached the disk.
    Unknown,
    Clean,
    /// In use, and it was closed all the same.
    Left,
}

impl SsdTier {
    /// Writes the index to the slab and marks it clean; from here on the tier finds nothing and takes nothing. To be
    /// called when guest I/O has ended: a write to a store after it still is not forgotten (the slab is marked dirty
    /// again), but at the price of all that it holds. If it fails the slab is dirty, unless all that failed was its
    /// very last write; closing may be tried again. One whose records are still being [loaded](SsdTier::load) is left as one in
    /// use.
    ///
    /// Blocking I/O: writes 64 bytes for every slot up to the highest one in use.
    pub fn close(&self) -> Result<(), SsdError> {
        self.shared.close(Extent::All)
    }

    /// [`SsdTier::close`] for a successor that opens the slab at once, while guests wait: writes only what has changed since
    /// the last checkpoint. What a device loses of it although it said that it was synced is not noticed at the next start.
    pub fn close_quickly(&self) -> Result<(), SsdError> {
        self.shared.close(Extent::Changed)
    }

    /// Lets another process open a tier that was closed, before this one ends. Ours cannot be used again.
    ///
    /// One whose closing has not come to an end is left to end by itself. Whoever runs from now on may do so without this slab,
    /// and what it says of itself later must not be taken for the last word.
    pub fn let_go(&self) {
        *self.shared.renounced.lock() = true;
        if !self.shared.closed.load(Ordering::Acquire) {
            return;
        }
        if !self.shared.device.runs_aside {
            self.shared.device.let_go();
            return;
        }
        let shared = self.shared.clone();
        if !matches!(within("ssd-let-go", LET_GO, move || shared.device.let_go()), Ok(Some(()))) {
            let path = self.shared.device.path.display();
            tracing::warn!(%path, "SSD tier not given up before the process ends: its device does not answer");
        }
    }
}

impl Shared {
    pub(super) fn close(&self, extent: Extent) -> Result<(), SsdError> {
        self.closed.store(true, Ordering::Release);
        let _alone = self.keeping.lock();
        // Of a slab that is left as it is, what guests' writes wait for must be there.
        if self.is_loading.load(Ordering::Acquire) {
            while self.write_intents() {}
        }
        let _writing = self.intents_io.lock();
        let mut state = self.state.lock();
        if matches!(state.on_disk, OnDisk::Clean | OnDisk::Left) {
            return Ok(());
        }
        state.closed = true;
        state.wake();
        if state.missed.is_some() {
            return self.leave(&mut state);
        }
        state.on_disk = OnDisk::Unknown;
        self.drop_unflushed(&mut state);
        let distrusted = state.trust != Trust::Ok;
        if distrusted {
            // All of it is written anew: under another identity the veto does not hold against it.
            state.superblock.slab_id = open::new_superblock(0, 0).slab_id;
        }
        // Under another identity nothing that is on the disk counts.
        let extent = if distrusted { Extent::All } else { extent };
        let State { superblock, index, .. } = &mut *state;
        open::close(&self.device, superblock, index, extent)?;
        state.on_disk = OnDisk::Clean;
        drop(state);
        // A copy of the slab that was made while it was in use is not it any more.
        self.note_lineage();
        if distrusted && let Some(Err(error)) = self.veto.as_ref().map(|path| veto::lift(path)) {
            tracing::debug!(%error, "SSD tier: its veto stays; it is against a slab that is no more");
        }
        Ok(())
    }

    /// Ends the use of a slab whose records are still being read. What is not known of it cannot be said to be true, and nobody
    /// should wait for it: it is left as one in use, with all marked on the disk that was written to since it was opened.
    fn leave(&self, state: &mut State) -> Result<(), SsdError> {
        let path = self.device.path.display();
        if state.trust != Trust::Ok || state.intents.has_work() {
            let State { superblock, .. } = &mut *state;
            tracing::warn!(%path, "SSD tier: closed before its index was read, and not all that was written to is marked; it will start empty");
            return open::mark(&self.device, superblock, Mark::Dropped)
                .map_err(|e| self.device.error("write the superblock of", e));
        }
        state.on_disk = OnDisk::Left;
        tracing::info!(
            %path, regions = state.intents.marked(),
            "SSD tier: left as it is, since its index was still being read; what it has of regions written to since its start is dropped"
        );
        Ok(())
    }

    /// A write has come after the slab was closed, or left as one in use: what it says on the disk is true no longer.
    pub(super) fn mark_late(&self, state: &mut State) {
        let State { superblock, on_disk, .. } = &mut *state;
        let path = self.device.path.display();
        match open::mark(&self.device, superblock, Mark::Dropped) {
            Ok(()) => {
                *on_disk = OnDisk::Dirty;
                tracing::warn!(%path, "SSD tier: a write came after it was closed; it will start empty the next time");
            }
            Err(error) => tracing::error!(
                %path, %error,
                "SSD tier: a write came after it was closed, and it could not be marked dirty; delete it before the next start"
            ),
        }
    }

    /// From here on this slab is the last that was in use. Failing costs what it has of stores that show no changes.
    pub(super) fn note_lineage(&self) {
        let Some(path) = &self.lineage else { return };
        let superblock = self.state.lock().superblock.clone();
        let renounced = self.renounced.lock();
        if *renounced {
            return;
        }
        if let Err(error) = lineage::note(path, &superblock) {
            tracing::warn!(
                path = %path.display(), %error,
                "SSD tier: after the next start NBD stores and block devices will lose what it has of them"
            );
        }
    }
}
