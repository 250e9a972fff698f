//! The end of a slab's use while guests are served: it is taken out of service, and perhaps out of the host.
//!
//! What guests write from then on is marked nowhere, so it must be on record before the first of these writes that nothing on the
//! slab counts: in the veto, which lies on another device and takes the word of a slab that answers no more; and on the slab, which
//! then says so wherever it goes. That the last run had this slab is taken back too ([`super::lineage`]): of an older copy of it nobody
//! could tell what it has missed.

use super::open::{self, Mark};
use super::tier::Shared;
use super::{SsdError, SsdTier, lineage, veto};
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::Duration;

/// How long a device may take over what it is to write or to end. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(3);

impl Shared {
    pub(super) fn abandon(&self) -> Result<(), SsdError> {
        let (slab_id, closed) = {
            let state = self.state.lock();
            (state.superblock.slab_id, state.closed)
        };
        if closed {
            return Ok(());
        }
        let vetoed = self.veto.as_ref().is_some_and(|path| {
            let written = veto::write(path, &slab_id);
            if let Err(error) = &written {
                tracing::warn!(path = %path.display(), %error, "SSD tier: no veto against its slab could be written");
            }
            written.is_ok()
        });
        let marked = self.mark_dropped();
        if let Err(error) = &marked
            && !vetoed
        {
            return Err(self.device.error("take out of service", std::io::Error::other(error.to_string())));
        }
        self.closed.store(true, Ordering::Release);
        let mut state = self.state.lock();
        state.closed = true;
        state.wake();
        drop(state);
        if marked.is_ok()
            && let Some(Err(error)) = self.veto.as_ref().map(|path| veto::lift(path))
        {
            tracing::debug!(%error, "SSD tier: its veto stays beside what the slab says itself");
        }
        self.work.notify_all();
        if let Some(Err(error)) = self.lineage.as_ref().map(|path| lineage::run_without(path)) {
            tracing::warn!(%error, "SSD tier: it could not be noted that prestaged runs without one");
        }
        Ok(())
    }

    /// Marks the slab as one whose content does not count, both copies, unless that takes too long.
    fn mark_dropped(&self) -> Result<(), String> {
        let Some(this) = self.me.upgrade() else { return Err("it is gone".to_owned()) };
        let (done, ended) = channel();
        let mark = move || {
            let (Some(_alone), Some(_writing)) =
                (this.keeping.try_lock_for(PATIENCE), this.intents_io.try_lock_for(PATIENCE))
            else {
                let _ = done.send(Err("its device does not answer".to_owned()));
                return;
            };
            let mut superblock = this.state.lock().superblock.clone();
            let marked = open::mark(&this.device, &mut superblock, Mark::Dropped);
            let mut state = this.state.lock();
            // Whatever is written later is not taken for older.
            state.superblock.generation = superblock.generation;
            // Before anybody else has the locks: a checkpoint would say that the slab counts.
            state.closed |= marked.is_ok();
            drop(state);
            let _ = done.send(marked.map_err(|error| error.to_string()));
        };
        std::thread::Builder::new().name("ssd-abandon".to_owned()).spawn(mark).map_err(|error| error.to_string())?;
        ended.recv_timeout(3 * PATIENCE).unwrap_or_else(|_| Err("its device does not answer".to_owned()))
    }
}

/// Tells whether anybody still has a tier open, see [`SsdTier::watch`].
#[derive(Debug)]
pub struct SsdWatch(Weak<Shared>);

impl SsdWatch {
    /// Nobody has, and its file is closed as far as the tier is concerned.
    pub fn is_gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl SsdTier {
    pub fn watch(&self) -> SsdWatch {
        SsdWatch(self.shared.me.clone())
    }

    /// Whether it was closed or abandoned.
    pub fn is_closed(&self) -> bool {
        self.shared.state.lock().closed
    }
}
