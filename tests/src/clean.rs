//! What must be undone, however the program ends: by a return, a panic or a signal.
//!
//! Every resource registers how to undo itself and holds the [`Guard`]. Dropping the guard undoes it; SIGINT, SIGTERM and
//! SIGHUP undo everything that is left, newest first, and end the program. SIGKILL leaves that to the kernel: child
//! processes are bound to us by a pipe or a parent-death signal (see [`crate::process`], [`crate::libvirt`]).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Undo = Box<dyn FnOnce() + Send>;

static LEFT: Mutex<BTreeMap<u64, Undo>> = Mutex::new(BTreeMap::new());
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static SIGNALS: Once = Once::new();

/// Undoes what was registered with it when dropped.
pub struct Guard(u64);

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guard({})", self.0)
    }
}

fn left() -> MutexGuard<'static, BTreeMap<u64, Undo>> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers `undo`; it runs once, on drop of the guard or on a signal.
#[must_use = "dropping the guard undoes at once"]
pub fn on_exit(undo: impl FnOnce() + Send + 'static) -> Guard {
    SIGNALS.call_once(watch_signals);
    let mut left = left();
    let id = left.last_key_value().map_or(0, |(id, _)| id + 1);
    left.insert(id, Box::new(undo));
    Guard(id)
}

impl Drop for Guard {
    fn drop(&mut self) {
        let undo = left().remove(&self.0);
        if let Some(undo) = undo {
            undo();
        }
    }
}

/// True from the moment a signal asked the program to end: errors after it are its consequence.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Never returns when a signal is ending the program, so that no error of its making is reported.
pub fn yield_to_signal() {
    while interrupted() {
        std::thread::park();
    }
}

fn watch_signals() {
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else {
        // without it a signal ends the program at once and the kernel's own bonds end the children
        return;
    };
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            eprintln!("\ninterrupted, cleaning up");
            loop {
                // taken out first: an undo drops guards of its own
                let newest = left().pop_last();
                match newest {
                    Some((_, undo)) => undo(),
                    None => break,
                }
            }
            std::process::exit(128 + signal);
        }
    });
}
