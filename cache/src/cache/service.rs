//! The SSD tier is taken out of service while guests are served, and another, or the same one emptied, comes into it.
//!
//! *Out*: that nothing of the slab counts is on record ([`SsdTier::abandon`]) before the first write that it does not hear of; then every
//! open storage gives up its part, on its shard, and what is under way there ends. The file is closed with the last of it.
//!
//! *In*: the tier is empty. Every open storage takes its part, on its shard, and from then on tells the tier of its writes; nothing
//! is inserted before those that nobody told of are over and durable ([`crate::disk::Storage::join_ssd`]).
//!
//! A storage that is opened or closed at the same time looks again when that is done ([`Cache::bring_into_line`]).

use super::opening::join;
use super::{Cache, StorageHandle, keep};
use crate::disk::local;
use crate::ssd::{Abandoned, SsdError, SsdTier, SsdWatch};
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long is waited for what is under way in a tier that was taken out of service; and in one whose device hangs.
const PATIENCE: Duration = Duration::from_secs(5);
const LITTLE_PATIENCE: Duration = Duration::from_secs(1);

/// A tier that was taken out of service.
#[derive(Clone, Debug)]
pub struct DrainedTier {
    /// How far that is on record.
    pub abandoned: Abandoned,
    /// When its file is closed.
    pub file: SsdWatch,
}

impl Cache {
    /// Takes the SSD tier out of service: nothing is read from it or written to it any more, and what it had is forgotten. Guests are
    /// served from RAM and stores. Its file is closed then, or when the device, or a store with a write under way, has answered.
    /// `None`: there is no SSD tier in use. Blocks, with I/O, for some eleven seconds at most: not for shard threads.
    ///
    /// # Errors
    /// It could not be put on record that its content counts no more; it is in use as before.
    pub fn drain_ssd(&self) -> Result<Option<DrainedTier>, SsdError> {
        let _alone = self.0.serving.lock();
        let Some(tier) = self.ssd() else { return Ok(None) };
        let abandoned = tier.abandon()?;
        *self.0.shared.ssd.write() = None;
        self.0.tiers_changed.fetch_add(1, Ordering::AcqRel);
        if let Some(keeper) = self.0.keeper.lock().take() {
            // It has nothing to do any more, and what it is at may hang. Its file is open until then.
            keeper.leave();
        }
        {
            let mut core = self.0.shared.core();
            core.set_destage(false);
            core.ssd_emptied(None);
        }
        let deadline = Instant::now() + if abandoned == Abandoned::Hangs { LITTLE_PATIENCE } else { PATIENCE };
        let left: Vec<_> = self.open_storages().iter().map(|handle| self.leave(handle, deadline)).collect();
        for leaving in left {
            // A shard that has ended has let go of everything.
            let _ = leaving.wait();
        }
        let file = tier.watch();
        drop(tier);
        file.wait(deadline);
        Ok(Some(DrainedTier { abandoned, file }))
    }

    /// Takes an SSD tier into service that is empty ([`crate::ssd::SsdOptions::empty`]). Blocks: not for shard threads.
    ///
    /// # Errors
    /// There is one already, or its threads could not be started.
    pub fn resume_ssd(&self, tier: SsdTier) -> io::Result<()> {
        let _alone = self.0.serving.lock();
        if self.ssd().is_some() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is an SSD tier in use already"));
        }
        *self.0.keeper.lock() = Some(keep(tier.clone(), &self.0.registry)?);
        {
            let mut core = self.0.shared.core();
            core.ssd_emptied(None);
            core.set_destage(true);
        }
        *self.0.shared.ssd.write() = Some(tier);
        self.0.tiers_changed.fetch_add(1, Ordering::AcqRel);
        self.open_storages().iter().for_each(|handle| self.bring_into_line(handle));
        Ok(())
    }

    /// Storages that are open now.
    fn open_storages(&self) -> Vec<StorageHandle> {
        self.0.registry.lock().by_identity.values().flatten().map(|opened| opened.handle.clone()).collect()
    }

    /// Has a storage leave a tier that is no longer in use and join the one that is. To be called when it has been opened while that
    /// changed, and when it has changed.
    pub(super) fn bring_into_line(&self, handle: &StorageHandle) {
        // One at a time for a storage; who comes second finds it done.
        let _alone = handle.0.joining.lock();
        if handle.ssd().is_some_and(|(tier, _)| tier.is_closed()) {
            let _ = self.leave(handle, Instant::now()).wait();
        }
        let Some(tier) = self.ssd().filter(|_| handle.ssd().is_none()) else { return };
        let (joining, of) = (tier.clone(), handle.clone());
        let joined = handle.shard().call(move |shard| async move { join(&shard, &joining, &of) }).wait();
        *handle.0.ssd.lock() = joined.ok().flatten().map(|number| (tier, number));
    }

    fn leave(&self, handle: &StorageHandle, deadline: Instant) -> crate::engine::Call<()> {
        handle.0.ssd.lock().take();
        let id = handle.id();
        handle.shard().call(move |_| async move {
            if let Some(storage) = local(id) {
                storage.leave_ssd(deadline).await;
            }
        })
    }
}
