//! The tiers' sizes while they are in use.
//!
//! One change of size at a time; guests are served meanwhile. The RAM tier: the policy core gives up or takes slots step by
//! step ([`crate::policy`], `resize.rs`), the arena their memory. The SSD tier: [`crate::ssd::Resize`].

use super::Cache;
use crate::policy::ShrinkStep;
use crate::ssd::{ResizeStep, SsdError, SsdTier};
use crate::types::BLOCK_BYTES;
use parking_lot::{Mutex, MutexGuard};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a change of size waits for slots that are being read or filled. Longer than a store that is only slow takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at slots that were in use.
const PAUSE: Duration = Duration::from_millis(2);

/// Why a tier has the size it had.
#[derive(Debug, Error)]
pub enum ResizeError {
    #[error("the RAM tier can have {most_bytes} bytes at most on this host; {asked_bytes} were asked for")]
    TooLarge { asked_bytes: u64, most_bytes: u64 },
    #[error("the host does not give the RAM tier {bytes} bytes: {source}; ask for fewer, or free memory")]
    Memory { bytes: u64, source: io::Error },
    #[error(
        "{held} blocks of the RAM tier are still being read or filled after ten seconds; a store does not answer \
         (`prestagectl disk list` may say which): try again when it does"
    )]
    Held { held: u32 },
    #[error(
        "a thread that serves disks does not let go of the RAM tier's memory: {0}; restart prestaged with the new size"
    )]
    Registered(io::Error),
    #[error("no thread for a change of size: {0}; try again")]
    Thread(io::Error),
    #[error("there is no SSD tier in use; `prestagectl cache tiers` says why")]
    NoSsd,
    #[error(transparent)]
    Ssd(#[from] SsdError),
}

/// A tier's size in bytes, before and after it was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resized {
    pub before: u64,
    pub after: u64,
}

/// The ring takes no entries before its completions are taken.
fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN))
}

fn bytes(slots: u32) -> u64 {
    u64::from(slots) * BLOCK_BYTES as u64
}

impl Cache {
    /// Bytes of the RAM tier, in use or not.
    pub fn ram_bytes(&self) -> u64 {
        bytes(self.arena().slots())
    }

    /// Bytes that the RAM tier can be grown to.
    pub fn most_ram_bytes(&self) -> u64 {
        bytes(self.arena().room())
    }

    /// Gives the RAM tier another size, rounded down to whole blocks. Growing keeps what is cached; of what does not fit any
    /// more the policy chooses what leaves. Blocks: not for shard threads.
    ///
    /// # Errors
    /// See [`ResizeError`]. The tier has the size it had, but blocks may have left.
    pub fn resize_ram(&self, to: u64) -> Result<Resized, ResizeError> {
        let _alone = self.0.resizing.lock();
        let too_large = || ResizeError::TooLarge { asked_bytes: to, most_bytes: self.most_ram_bytes() };
        let slots = u32::try_from(to / BLOCK_BYTES as u64).ok().filter(|slots| *slots <= self.arena().room());
        let slots = slots.ok_or_else(too_large)?;
        let before = self.arena().slots();
        if slots > before {
            self.arena().grow(slots).map_err(|source| ResizeError::Memory { bytes: to, source })?;
            self.add_slots(slots);
        } else if slots < before {
            self.shrink_ram(slots).inspect_err(|_| self.add_slots(before))?;
        }
        Ok(Resized { before: bytes(before), after: bytes(slots) })
    }

    fn add_slots(&self, slots: u32) {
        loop {
            let mut core = self.0.shared.core();
            let done = core.grow_step(slots);
            MutexGuard::unlock_fair(core);
            if done {
                return;
            }
        }
    }

    fn shrink_ram(&self, slots: u32) -> Result<(), ResizeError> {
        // The kernel must not fill pages that are no longer the arena's.
        let keep = slots as usize * BLOCK_BYTES;
        for shard in &self.0.shards {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let done = shard.call(move |shard| async move { shard.unregister_arena(keep) }).wait();
                // A shard that has ended has let go of everything.
                match done.unwrap_or(Ok(())) {
                    Ok(()) => break,
                    Err(error) if is_busy(&error) && Instant::now() < deadline => std::thread::sleep(PAUSE),
                    Err(error) => return Err(ResizeError::Registered(error)),
                }
            }
        }
        let (arena, deadline) = (self.0.shared.arena(), Instant::now() + PATIENCE);
        self.0.shared.core().begin_shrink(slots);
        let mut below = self.0.shared.core().slots_now();
        let mut held = 0;
        loop {
            let mut core = self.0.shared.core();
            let step = core.shrink_step(below, self.now(), |from, to, pages| arena.copy(from, to, pages));
            let ShrinkStep { next, held: more } = step;
            held += more;
            below = next;
            if below > slots {
                MutexGuard::unlock_fair(core);
                continue;
            }
            if held == 0 && core.end_shrink() {
                break;
            }
            below = core.slots_now();
            drop(core);
            if Instant::now() >= deadline {
                return Err(ResizeError::Held { held });
            }
            held = 0;
            std::thread::sleep(PAUSE);
        }
        // Nobody is given these slots any more; who looks at one just now is done at once.
        while let Err(error) = arena.shrink(slots) {
            if error.kind() != io::ErrorKind::WouldBlock || Instant::now() >= deadline {
                return Err(ResizeError::Memory { bytes: bytes(slots), source: error });
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Gives the SSD tier another size: `to` bytes, metadata included; 0 for all of a block device. Growing keeps what is
    /// cached; when it shrinks what lies beyond the new end is dropped. Blocks, with I/O: not for shard threads. A device that does
    /// not answer is waited for some ten seconds, or two minutes while it allocates; when it does answer, the change is undone.
    ///
    /// # Errors
    /// See [`ResizeError`]. The tier has the size it had, but what lies beyond the end asked for may have been dropped.
    pub fn resize_ssd(&self, to: u64) -> Result<Resized, ResizeError> {
        let tier = self.ssd().ok_or(ResizeError::NoSsd)?;
        let (way, given_up) = (Arc::new(Way::default()), Arc::new(Mutex::new(false)));
        let (done, ended) = channel();
        let change = {
            let (tier, way, given_up) = (tier.clone(), Arc::clone(&way), Arc::clone(&given_up));
            move || {
                let changed = change_ssd(&tier, to, |next| {
                    way.steps.fetch_add(1, Ordering::Relaxed);
                    way.patience_ms.store(next.as_millis() as u64, Ordering::Relaxed);
                    *given_up.lock()
                });
                // Nobody gives it up any more once it is told.
                let given_up = given_up.lock();
                if let (true, Ok(Resized { before, after })) = (*given_up, &changed)
                    && let Err(error) = change_ssd(&tier, *before, |_| false)
                {
                    tracing::warn!(before, after, %error, "SSD tier: a change of its size that was given up has come to its end");
                }
                let _ = done.send(changed);
            }
        };
        std::thread::Builder::new().name("ssd-resize".to_owned()).spawn(change).map_err(ResizeError::Thread)?;
        let mut before = None;
        loop {
            let patience = Duration::from_millis(way.patience_ms.load(Ordering::Relaxed)).max(LEAST_PATIENCE);
            match ended.recv_timeout(patience) {
                Ok(changed) => return changed,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ResizeError::Thread(io::Error::other("it panicked")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Some((tier.answers(), way.steps.load(Ordering::Relaxed)));
            if before == now {
                let mut given_up = given_up.lock();
                // It may have ended just now.
                if let Ok(changed) = ended.try_recv() {
                    return changed;
                }
                *given_up = true;
                return Err(tier.not_answering().into());
            }
            before = now;
        }
    }
}

/// How far a change of size is.
#[derive(Default)]
struct Way {
    steps: AtomicU64,
    patience_ms: AtomicU64,
}

/// The least time that a device has for an answer.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// Changes the size of a slab, step by step. `given_up` is told how long the next may take, and says whether nobody wants it any more.
fn change_ssd(tier: &SsdTier, to: u64, given_up: impl Fn(Duration) -> bool) -> Result<Resized, ResizeError> {
    let mut resize = tier.begin_resize(to)?;
    let (before, after) = (resize.before_bytes(), resize.after_bytes());
    let deadline = Instant::now() + PATIENCE;
    loop {
        if given_up(resize.patience()) {
            return Err(tier.not_answering().into());
        }
        match resize.step()? {
            ResizeStep::Done => break,
            ResizeStep::More => {}
            ResizeStep::Held { slots } if Instant::now() >= deadline => {
                return Err(tier.still_in_use(slots).into());
            }
            ResizeStep::Held { .. } => std::thread::sleep(PAUSE),
        }
    }
    Ok(Resized { before, after })
}
