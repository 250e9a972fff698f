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

/// What the device was asked to do. A device that takes no more writes, or is full, may read well for years, and the
/// other way round: what one kind says does not excuse the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    Read,
    Write,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Ok,
    Degraded {
        reason: String,
        since: Duration,
        retry_at: Duration,
        failed: Work,
    },
    /// Tried again since a back-off ended; nothing of the kind that failed has come back yet.
    Probing {
        since: Duration,
        failed: Work,
    },
}

/// Of one kind of work.
#[derive(Clone, Copy, Default, Debug)]
struct Streak {
    failures: u32,
    successes: u32,
}

#[derive(Debug)]
pub(super) struct Health {
    phase: Phase,
    reads: Streak,
    writes: Streak,
    /// Back-offs since the device was last trusted: each doubles the next.
    level: u32,
    last_log: Option<Duration>,
    unlogged: u64,
}

impl Health {
    pub(super) fn new() -> Health {
        let none = Streak::default();
        Health { phase: Phase::Ok, reads: none, writes: none, level: 0, last_log: None, unlogged: 0 }
    }

    pub(super) fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Whether the tier may be used now. `now` is asked only while degraded.
    pub(super) fn usable(&mut self, now: impl FnOnce() -> Duration) -> bool {
        let Phase::Degraded { since, retry_at, failed, .. } = &self.phase else {
            return true;
        };
        if now() < *retry_at {
            return false;
        }
        self.phase = Phase::Probing { since: *since, failed: *failed };
        true
    }

    fn streak(&mut self, work: Work) -> &mut Streak {
        match work {
            Work::Read => &mut self.reads,
            Work::Write => &mut self.writes,
        }
    }

    pub(super) fn note_good(&mut self, work: Work) {
        match self.phase {
            // Something that was under way when the tier was bypassed says nothing about the device after it.
            Phase::Degraded { .. } => return,
            Phase::Probing { failed, .. } if failed == work => self.phase = Phase::Ok,
            Phase::Ok | Phase::Probing { .. } => {}
        }
        let streak = self.streak(work);
        streak.failures = 0;
        streak.successes = streak.successes.saturating_add(1);
        // Both kinds: else a device that reads well would be trusted anew after each outage of its writes.
        if self.reads.successes.min(self.writes.successes) >= TRUST_AFTER {
            self.level = 0;
        }
    }

    /// Takes note of a failure. Returns how many failures a log line written now stands for, if one is due.
    pub(super) fn note_failure(&mut self, now: Duration, work: Work, what: &str) -> Option<u64> {
        let streak = self.streak(work);
        streak.successes = 0;
        streak.failures = streak.failures.saturating_add(1);
        let many = streak.failures >= FAILURES_IN_A_ROW;
        let since = match self.phase {
            Phase::Ok if many => Some(now),
            Phase::Probing { since, .. } => Some(since),
            Phase::Ok | Phase::Degraded { .. } => None,
        };
        if let Some(since) = since {
            let back_off = FIRST_BACK_OFF.saturating_mul(1 << self.level.min(16)).min(LONGEST_BACK_OFF);
            self.level = self.level.saturating_add(1);
            self.streak(work).failures = 0;
            let retry_at = now.saturating_add(back_off);
            self.phase = Phase::Degraded { reason: what.to_owned(), since, retry_at, failed: work };
        }
        self.log_due(now)
    }

    /// The device must not be used, however few its failures were.
    pub(super) fn give_up(&mut self, now: Duration, work: Work, what: &str) -> Option<u64> {
        // An outage that goes on takes the next back-off, as in `note_failure`.
        self.streak(work).failures = FAILURES_IN_A_ROW;
        if matches!(self.phase, Phase::Degraded { .. }) {
            return self.log_due(now);
        }
        self.note_failure(now, work, what)
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
            health.note_failure(now, Work::Read, "read: I/O error");
        }
    }

    #[test]
    fn a_few_failures_in_a_row_bypass_the_tier_until_the_back_off_ends() {
        let mut health = Health::new();
        fail(&mut health, at(10), FAILURES_IN_A_ROW - 1);
        health.note_good(Work::Read);
        fail(&mut health, at(10), FAILURES_IN_A_ROW - 1);
        assert!(health.usable(|| at(10)), "a success in between starts the count anew");
        fail(&mut health, at(10), 1);
        assert!(!health.usable(|| at(10)));
        assert!(!health.usable(|| at(10) + FIRST_BACK_OFF - Duration::from_nanos(1)));
        assert!(health.usable(|| at(10) + FIRST_BACK_OFF));
        health.note_good(Work::Read);
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
        health.note_good(Work::Read);
        assert!(!health.usable(|| at(1)));
    }

    #[test]
    fn trust_returns_with_a_run_of_successes() {
        let mut health = Health::new();
        fail(&mut health, at(0), FAILURES_IN_A_ROW);
        assert!(health.usable(|| at(100)));
        (0..TRUST_AFTER).for_each(|_| health.note_good(Work::Read));
        (0..TRUST_AFTER).for_each(|_| health.note_good(Work::Write));
        fail(&mut health, at(200), FAILURES_IN_A_ROW);
        assert!(health.usable(|| at(200) + FIRST_BACK_OFF));
    }

    #[test]
    fn one_log_line_a_minute_stands_for_all() {
        let mut health = Health::new();
        assert_eq!(health.note_failure(at(0), Work::Read, "x"), Some(1));
        assert_eq!((1..1000).filter_map(|i| health.note_failure(at(i / 20), Work::Read, "x")).count(), 0);
        assert_eq!(health.note_failure(at(60), Work::Read, "x"), Some(1000));
    }

    /// A full file system: every read is good, no write is.
    #[test]
    fn reads_that_go_well_do_not_hide_writes_that_fail() {
        let mut health = Health::new();
        let mut now = at(0);
        let mut waits = Vec::new();
        for _ in 0..6 {
            while health.usable(|| now) {
                (0..2 * TRUST_AFTER).for_each(|_| health.note_good(Work::Read));
                health.note_failure(now, Work::Write, "write: no space left");
            }
            let Phase::Degraded { retry_at, failed, .. } = health.phase().clone() else { panic!("not degraded") };
            assert_eq!(failed, Work::Write);
            waits.push((retry_at - now).as_secs());
            now = retry_at;
        }
        assert_eq!(waits, [5, 10, 20, 40, 80, 160]);
        assert!(health.usable(|| now));
        health.note_good(Work::Read);
        assert!(matches!(health.phase(), Phase::Probing { .. }), "a read says nothing about writes");
        health.note_good(Work::Write);
        assert_eq!(*health.phase(), Phase::Ok);
    }
}
