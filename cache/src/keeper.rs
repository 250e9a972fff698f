//! The threads that keep the SSD tier fit to survive a crash.
//!
//! - `ssd-intents`: writes what guests' writes wait for, as soon as something does
//! - `ssd-keeper`: checkpoints, and bringing back a tier that was given up
//!
//! Two, since a checkpoint waits for stores to flush, and no guest may wait for that. A device that hangs leaves them
//! hanging, and nobody else: whoever waits for them has a limit.

use crate::ssd::{SsdStorage, SsdTier, Step};
use parking_lot::{Condvar, Mutex};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a crash loses at most of what was cached, and how long a region that was written to stays marked. Each costs a
/// handful of writes and syncs if there was anything to do.
const EVERY: Duration = Duration::from_secs(5);
/// How often the intents' thread looks whether it is to end.
const LOOK: Duration = Duration::from_millis(500);
/// How long the end waits for a device that hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits for stores that were asked to flush, and names those that did not.
pub(crate) type Unsettled = Box<dyn FnOnce() -> Vec<SsdStorage>>;

#[derive(Debug)]
pub(crate) struct Keeper {
    tier: SsdTier,
    stopping: Arc<Stopping>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default, Debug)]
struct Stopping {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Stopping {
    /// Waits; whether the end was asked for.
    fn wait(&self, limit: Duration) -> bool {
        let mut asked = self.asked.lock();
        if !*asked {
            self.changed.wait_for(&mut asked, limit);
        }
        *asked
    }
}

impl Keeper {
    /// `settle` asks stores to make durable what was written to them.
    pub(crate) fn start(
        tier: SsdTier,
        settle: impl Fn(&[SsdStorage]) -> Unsettled + Send + 'static,
    ) -> io::Result<Keeper> {
        let stopping = Arc::new(Stopping::default());
        let (stop, device, shared) = (Arc::clone(&stopping), tier.clone(), tier.clone());
        let intents = std::thread::Builder::new().name("ssd-intents".to_owned()).spawn(move || {
            while !stop.wait(Duration::ZERO) {
                while device.write_intents() {}
                device.wait_for_intents(LOOK);
            }
        })?;
        let stop = Arc::clone(&stopping);
        let keeper = std::thread::Builder::new().name("ssd-keeper".to_owned()).spawn(move || {
            while !stop.wait(EVERY) {
                if !tier.try_again() {
                    checkpoint(&tier, &settle, || stop.wait(Duration::ZERO));
                }
            }
        })?;
        Ok(Keeper { tier: shared, stopping, threads: vec![intents, keeper] })
    }
}

impl Keeper {
    /// Has the threads of a tier that is out of use end by themselves, whenever its device lets them.
    pub(crate) fn leave(mut self) {
        *self.stopping.asked.lock() = true;
        self.threads.clear();
    }
}

impl Drop for Keeper {
    /// Ends the threads; those that hang in the device are left behind.
    fn drop(&mut self) {
        *self.stopping.asked.lock() = true;
        self.stopping.changed.notify_all();
        self.tier.wake_keepers();
        let deadline = Instant::now() + PATIENCE;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if thread.is_finished() && thread.join().is_err() {
                tracing::error!("a thread of the SSD tier panicked");
            }
        }
    }
}

/// One checkpoint from begin to end, or until it is to stop: closing the tier writes what it has not. A device that fails has
/// said so itself.
pub(crate) fn checkpoint(tier: &SsdTier, settle: &impl Fn(&[SsdStorage]) -> Unsettled, stopped: impl Fn() -> bool) {
    let Some(mut checkpoint) = tier.begin_checkpoint() else { return };
    let mut unsettled = Some(settle(&checkpoint.unflushed()));
    while !stopped() {
        if checkpoint.is_about_to_clear()
            && let Some(unsettled) = unsettled.take()
        {
            unsettled().into_iter().for_each(|storage| checkpoint.not_flushed(storage));
        }
        match checkpoint.step() {
            Ok(Step::More) => {}
            Ok(Step::Done { .. }) | Err(_) => return,
        }
    }
}
