//! When to try again what failed.

use std::time::{Duration, Instant};

/// Doubling delays between attempts. Time is passed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    failures: u32,
    not_before: Option<Instant>,
}

impl Backoff {
    /// After the first failure a wait of `first`, after each further one twice as long, at most `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
        Self { first, most: most.max(first), failures: 0, not_before: None }
    }

    /// Whether an attempt may be made.
    pub fn is_ready(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|t| now >= t)
    }

    /// How long until then.
    pub fn wait(&self, now: Instant) -> Duration {
        self.not_before.map_or(Duration::ZERO, |t| t.saturating_duration_since(now))
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// An attempt failed; returns the wait before the next one.
    pub fn failed(&mut self, now: Instant) -> Duration {
        // 2^31 times anything of use is past any limit.
        let wait = self.first.saturating_mul(1 << self.failures.min(31)).min(self.most);
        self.failures = self.failures.saturating_add(1);
        self.not_before = now.checked_add(wait);
        wait
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.not_before = None;
    }
}

impl Default for Backoff {
    /// 10 s to 30 min: a guest that cannot shrink now is not asked hundreds of times an hour.
    fn default() -> Self {
        Self::new(Duration::from_secs(10), Duration::from_secs(1800))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_limit_and_start_over_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let now = Instant::now();
        assert!(backoff.is_ready(now));
        let waits: Vec<_> = (0..5).map(|_| backoff.failed(now).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 5, 5]);
        assert!(!backoff.is_ready(now + Duration::from_millis(4999)));
        assert_eq!(backoff.wait(now + Duration::from_secs(4)), Duration::from_secs(1));
        assert!(backoff.is_ready(now + Duration::from_secs(5)));
        backoff.succeeded();
        assert!(backoff.is_ready(now));
        assert_eq!((backoff.failures(), backoff.failed(now)), (0, Duration::from_secs(1)));
        for _ in 0..100 {
            assert!(backoff.failed(now) <= Duration::from_secs(5));
        }
    }

    #[test]
    fn attempts_in_an_hour_are_few() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        let tries = (0..3600).filter(|&s| {
            let now = start + Duration::from_secs(s);
            let ready = backoff.is_ready(now);
            if ready {
                backoff.failed(now);
            }
            ready
        });
        assert_eq!(tries.count(), 9);
    }
}
