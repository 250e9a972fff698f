//! The end of a slab's use while guests are served: it is taken out of service, and perhaps out of the host.
//!
//! What guests write from then on is marked nowhere, so it must be on record before the first of these writes that nothing on the
//! slab counts: in the veto, which lies on another device and takes the word of a slab that answers no more; and on the slab, which
//! then says so wherever it goes. That the last run had this slab is taken back too ([`super::lineage`]): of an older copy of it nobody
//! could tell what it has missed.

use super::open::{self, Mark};
use super::tier::Shared;
use super::{SsdError, SsdTier, lineage, veto};
use crate::engine::aside::OpenMark;
use crate::engine::within;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long a device may take over what it is to write or to end. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// How far it is on record that nothing of a slab counts, see [`SsdTier::abandon`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Abandoned {
    /// On the slab itself, wherever it goes.
    Marked,
    /// In the veto alone, which this host's next run reads: the device fails.
    Vetoed,
    /// In the veto alone: the device does not answer.
    Hangs,
}

enum Unmarked {
    Hangs,
    Failed(String),
}

impl Shared {
    pub(super) fn abandon(&self) -> Result<Abandoned, SsdError> {
        let (slab_id, closed) = {
            let state = self.state.lock();
            (state.superblock.slab_id, state.closed)
        };
        if closed {
            return Ok(Abandoned::Marked);
        }
        let vetoed = self.veto.as_ref().is_some_and(|path| {
            let written = veto::write(path, &slab_id);
            if let Err(error) = &written {
                tracing::warn!(path = %path.display(), %error, "SSD tier: no veto against its slab could be written");
            }
            written.is_ok()
        });
        let abandoned = match self.mark_dropped() {
            Ok(()) => Abandoned::Marked,
            Err(Unmarked::Hangs) if vetoed => Abandoned::Hangs,
            Err(Unmarked::Failed(_)) if vetoed => Abandoned::Vetoed,
            Err(unmarked) => {
                let why = match unmarked {
                    Unmarked::Hangs => "it does not answer".to_owned(),
                    Unmarked::Failed(why) => why,
                };
                return Err(self.device.error("take out of service", io::Error::other(why)));
            }
        };
        self.closed.store(true, Ordering::Release);
        let mut state = self.state.lock();
        state.closed = true;
        state.wake();
        drop(state);
        if abandoned == Abandoned::Marked
            && let Some(Err(error)) = self.veto.as_ref().map(|path| veto::lift(path))
        {
            tracing::debug!(%error, "SSD tier: its veto stays beside what the slab says itself");
        }
        self.work.notify_all();
        if let Some(Err(error)) = self.lineage.as_ref().map(|path| lineage::run_without(path)) {
            tracing::warn!(%error, "SSD tier: it could not be noted that prestaged runs without one");
        }
        Ok(abandoned)
    }

    /// Marks the slab as one whose content does not count, both copies, unless that takes too long: twice [`PATIENCE`], once
    /// for whoever writes now.
    fn mark_dropped(&self) -> Result<(), Unmarked> {
        let Some(this) = self.me.upgrade() else { return Err(Unmarked::Failed("it is gone".to_owned())) };
        let deadline = Instant::now() + PATIENCE;
        let mark = move || {
            let (Some(_alone), Some(_writing)) =
                (this.keeping.try_lock_until(deadline), this.intents_io.try_lock_until(deadline))
            else {
                return Err(Unmarked::Hangs);
            };
            let mut superblock = this.state.lock().superblock.clone();
            let marked = open::mark(&this.device, &mut superblock, Mark::Dropped);
            let mut state = this.state.lock();
            // Whatever is written later is not taken for older.
            state.superblock.generation = superblock.generation;
            // Before anybody else has the locks: a checkpoint would say that the slab counts.
            state.closed |= marked.is_ok();
            drop(state);
            marked.map_err(|error| Unmarked::Failed(error.to_string()))
        };
        match within("ssd-abandon", 2 * PATIENCE, mark) {
            Ok(Some(marked)) => marked,
            Ok(None) => Err(Unmarked::Hangs),
            Err(error) => Err(Unmarked::Failed(error.to_string())),
        }
    }
}

/// Tells whether anybody still has a tier's file open, see [`SsdTier::watch`].
#[derive(Clone, Debug)]
pub struct SsdWatch(Weak<()>);

impl SsdWatch {
    /// Nobody has: no transfer is under way there, and `close(2)` has returned.
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }

    /// Waits until nobody has, for at most until `deadline`. Returns whether that is so.
    pub fn wait(&self, deadline: Instant) -> bool {
        while !self.is_gone() && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
        self.is_gone()
    }
}

/// How often it is looked whether a file is closed.
const LOOK: Duration = Duration::from_millis(2);

impl SsdTier {
    pub fn watch(&self) -> SsdWatch {
        SsdWatch(Arc::downgrade(&self.shared.device.open))
    }

    /// For whoever has a descriptor of the tier's file.
    pub(crate) fn open_mark(&self) -> OpenMark {
        self.shared.device.open.clone()
    }

    /// Operations on the tier's metadata that the device has ended since it was opened: as long as that grows it answers.
    pub fn answers(&self) -> u64 {
        self.shared.device.ended.load(Ordering::Relaxed)
    }

    /// Whether it was closed or abandoned.
    pub fn is_closed(&self) -> bool {
        self.shared.state.lock().closed
    }
}
