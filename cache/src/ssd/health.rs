//! When to stop trusting a device: after a few failures in a row the tier is bypassed for a while, then tried again.
//! Sans-I/O: time comes in as an argument.

use std::time::Duration;

/// So many failures in a row are the device, not a sector.
const FAILURES_IN_A_ROW: u32 = 5;
/// Longer than a controller reset, short enough that an operator sees it come back.
const FIRST_BACK_OFF: Duration = Duration::from_secs(5);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(300);
/// So many successes in a row and the next failure starts with the first back-off again.
const TRUST_AFTER: u32 = 64;
/// A failing device fails thousands of times a second; the log gets one line of it a minute.
const LOG_EVERY: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Ok,
    Degraded {
        reason: String,
        since: Duration,
        retry_at: Duration,
    },
    /// Tried again since a back-off ended; nothing has come back yet.
    Probing {
        since: Duration,
    },
}

#[derive(Debug)]
pub(super) struct Health {
    phase: Phase,
    failures_in_a_row: u32,
    successes_in_a_row: u32,
    /// Back-offs since the device was last trusted: each doubles the next.
    level: u32,
    last_log: Option<Duration>,
    unlogged: u64,
}

impl Health {
    pub(super) fn new() -> Health {
        Health { phase: Phase::Ok, failures_in_a_row: 0, successes_in_a_row: 0, level: 0, last_log: None, unlogged: 0 }
    }

    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Whether the tier may be used now. `now` is asked only while degraded.
    pub(super) fn usable(&mut self, now: impl FnOnce() -> Duration) -> bool {
        let Phase::Degraded { since, retry_at, .. } = &self.phase else {
            return true;
        };
        if now() < *retry_at {
            return false;
        }
        self.phase = Phase::Probing { since: *since };
        true
    }

    pub(super) fn note_good(&mut self) {
        match self.phase {
            // Something that was under way when the tier was bypassed says nothing about the device after it.
            Phase::Degraded { .. } => return,
            Phase::Probing { .. } => self.phase = Phase::Ok,
            Phase::Ok => {}
        }
        self.failures_in_a_row = 0;
        self.successes_in_a_row = self.successes_in_a_row.saturating_add(1);
        if self.successes_in_a_row >= TRUST_AFTER {
            self.level = 0;
        }
    }

    /// Takes note of a failure. Returns how many failures a log line written now stands for, if one is due.
    pub(super) fn note_failure(&mut self, now: Duration, what: &str) -> Option<u64> {
        self.successes_in_a_row = 0;
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        let since = match self.phase {
            Phase::Ok if self.failures_in_a_row >= FAILURES_IN_A_ROW => Some(now),
            Phase::Probing { since } => Some(since),
            Phase::Ok | Phase::Degraded { .. } => None,
        };
        if let Some(since) = since {
            let back_off = FIRST_BACK_OFF.saturating_mul(1 << self.level.min(16)).min(LONGEST_BACK_OFF);
            self.level = self.level.saturating_add(1);
            self.failures_in_a_row = 0;
            self.phase = Phase::Degraded { reason: what.to_owned(), since, retry_at: now.saturating_add(back_off) };
        }
        self.log_due(now)
    }

    /// The device must not be used, however few its failures were.
    pub(super) fn give_up(&mut self, now: Duration, what: &str) -> Option<u64> {
        // An outage that goes on takes the next back-off, as in `note_failure`.
        self.failures_in_a_row = FAILURES_IN_A_ROW;
        if matches!(self.phase, Phase::Degraded { .. }) {
            return self.log_due(now);
        }
        self.note_failure(now, what)
    }

    fn log_due(&mut self, now: Duration) -> Option<u64> {
        self.unlogged += 1;
        if self.last_log.is_some_and(|last| now.saturating_sub(last) < LOG_EVERY) {
            return None;
        }
        self.last_log = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn fail(health: &mut Health, now: Duration, times: u32) {
        for _ in 0..times {
            health.note_failure(now, "read: I/O error");
        }
    }

    #[test]
    fn a_few_failures_in_a_row_bypass_the_tier_until_the_back_off_ends() {
        let mut health = Health::new();
        fail(&mut health, at(10), FAILURES_IN_A_ROW - 1);
        health.note_good();
        fail(&mut health, at(10), FAILURES_IN_A_ROW - 1);
        assert!(health.usable(|| at(10)), "a success in between starts the count anew");
        fail(&mut health, at(10), 1);
        assert!(!health.usable(|| at(10)));
        assert!(!health.usable(|| at(10) + FIRST_BACK_OFF - Duration::from_nanos(1)));
        assert!(health.usable(|| at(10) + FIRST_BACK_OFF));
        health.note_good();
        assert_eq!(*health.phase(), Phase::Ok);
    }

    #[test]
    fn a_failed_retry_doubles_the_back_off_up_to_the_longest() {
        let mut health = Health::new();
        let mut now = at(0);
        fail(&mut health, now, FAILURES_IN_A_ROW);
        let mut waits = Vec::new();
        for _ in 0..100 {
            let Phase::Degraded { retry_at, since, .. } = health.phase().clone() else { panic!("not degraded") };
            assert_eq!(since, at(0), "one outage, however many retries");
            waits.push((retry_at - now).as_secs());
            now = retry_at;
            assert!(health.usable(|| now));
            fail(&mut health, now, 1);
            fail(&mut health, now, 50);
        }
        assert_eq!(waits[..8], [5, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(waits[99], 300);
    }

    #[test]
    fn a_late_success_does_not_end_a_back_off() {
        let mut health = Health::new();
        fail(&mut health, at(0), FAILURES_IN_A_ROW);
        health.note_good();
        assert!(!health.usable(|| at(1)));
    }

    #[test]
    fn trust_returns_with_a_run_of_successes() {
        let mut health = Health::new();
        fail(&mut health, at(0), FAILURES_IN_A_ROW);
        assert!(health.usable(|| at(100)));
        (0..TRUST_AFTER).for_each(|_| health.note_good());
        fail(&mut health, at(200), FAILURES_IN_A_ROW);
        assert!(health.usable(|| at(200) + FIRST_BACK_OFF));
    }

    #[test]
    fn one_log_line_a_minute_stands_for_all() {
        let mut health = Health::new();
        assert_eq!(health.note_failure(at(0), "x"), Some(1));
        assert_eq!((1..1000).filter_map(|i| health.note_failure(at(i / 20), "x")).count(), 0);
        assert_eq!(health.note_failure(at(60), "x"), Some(1000));
    }
}
