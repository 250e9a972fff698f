//! How far a pass over a trace is, on standard error if that is a terminal.

use prestage_replay::TraceReader;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(200);
/// A shorter pass shows nothing.
const PATIENCE: Duration = Duration::from_millis(500);
/// Of the 80 columns.
const NAME_WIDTH: usize = 24;

/// Wipes its line when dropped.
pub(super) struct Progress<'a> {
    label: String,
    consumed: Arc<AtomicU64>,
    total_bytes: u64,
    stop: &'a AtomicBool,
    begun: Instant,
    /// `None`: nobody looks.
    next: Option<Instant>,
    shown: bool,
}

impl<'a> Progress<'a> {
    pub(super) fn new(what: &str, file: &Path, reader: &TraceReader, stop: &'a AtomicBool) -> Self {
        let begun = Instant::now();
        let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
        Self {
            label: format!("{what} {}", super::render::short(&name, NAME_WIDTH)),
            consumed: reader.consumed(),
            total_bytes: reader.total_bytes(),
            stop,
            begun,
            next: io::stderr().is_terminal().then(|| begun + PATIENCE),
            shown: false,
        }
    }

    /// Takes note of the requests so far. Returns whether to go on.
    pub(super) fn step(&mut self, requests: u64) -> bool {
        if let Some(next) = self.next {
            let now = Instant::now();
            if now >= next {
                self.next = Some(now + INTERVAL);
                let consumed = self.consumed.load(Ordering::Relaxed);
                let line = line(&self.label, requests, consumed, self.total_bytes, now - self.begun);
                self.shown = true;
                let _ = write!(io::stderr(), "\r{line}\x1b[K");
            }
        }
        !self.stop.load(Ordering::Relaxed)
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(label: &str, requests: u64, consumed: u64, total: u64, elapsed: Duration) -> String {
    let rate = consumed as f64 / elapsed.as_secs_f64().max(1e-3);
    let share = if total == 0 { 0.0 } else { consumed as f64 / total as f64 };
    let left_s = total.saturating_sub(consumed) as f64 / rate.max(1.0);
    let (millions, mb_s) = (requests as f64 / 1e6, rate / 1e6);
    format!("{label}  {:.0} %  {millions:.1} M requests  {mb_s:.1} MB/s  {} left", share * 100.0, time(left_s))
}

fn time(seconds: f64) -> String {
    let seconds = seconds as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_and_says_what_is_left() {
        let label = format!("training on {}", super::super::render::short(&"x".repeat(90), NAME_WIDTH));
        let text = line(&label, 43_210_000, 250_000_000, 1_000_000_000, Duration::from_secs(100));
        assert!(text.ends_with("  25 %  43.2 M requests  2.5 MB/s  5 min 0 s left"), "{text}");
        assert!(text.chars().count() <= 80 + 12, "{text}");
        assert!(line("a", 1, 0, 0, Duration::ZERO).contains("0 %"));
    }
}
