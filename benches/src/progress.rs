//! What is shown while a measurement runs: one line that changes on a terminal, plain lines elsewhere.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// Progress on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    started: Instant,
    terminal: bool,
    shown: Cell<bool>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), terminal: std::io::stderr().is_terminal(), shown: Cell::new(false) }
    }

    /// A step was reached: stays on the screen, with the time since the start.
    pub(crate) fn step(&self, text: &str) {
        self.clear();
        eprintln!("[{:5.1} s] {text}", self.started.elapsed().as_secs_f64());
    }

    /// Something goes on: replaced by what comes next, shown on a terminal only.
    pub(crate) fn now(&self, text: &str) {
        if self.terminal {
            // erase the line, then write it: ECMA-48 EL
            eprint!("\r\x1b[2K[{:5.1} s] {text}", self.started.elapsed().as_secs_f64());
            let _ = std::io::stderr().flush();
            self.shown.set(true);
        }
    }

    fn clear(&self) {
        if self.shown.replace(false) {
            eprint!("\r\x1b[2K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
