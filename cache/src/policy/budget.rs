//! How much prefetch a store may carry at once: demand first.
//!
//! A window of bytes in flight, sized like a congestion window: it grows while demand reads take no longer than the
//! store's base latency and halves when they do (the delay-based idea of TCP Vegas, Brakmo et al. 1994), plus a token
//! bucket for an operator's hard limit. Without demand to measure, the prefetches' own latency stands in.

use std::time::Duration;

/// Limits of prefetch on one store.
#[derive(Clone, Copy, Debug)]
pub struct BudgetConfig {
    /// Upper end of the window, bytes in flight.
    pub max_bytes_in_flight: u64,
    /// Requests in flight, whatever their size.
    pub max_requests: u32,
    /// Hard limit in bytes a second; `None`: unlimited.
    pub bytes_per_second: Option<u64>,
}

impl Default for BudgetConfig {
    fn default() -> BudgetConfig {
        BudgetConfig { max_bytes_in_flight: 16 << 20, max_requests: 48, bytes_per_second: None }
    }
}

/// The smallest window: one merged request, so that prefetch never stops for good and latency is measured again.
const MIN_WINDOW: u64 = 256 << 10;
/// First window; doubled every round trip until demand feels it.
const START_WINDOW: u64 = 2 << 20;
/// Demand latency above this multiple of the base means that prefetch is in demand's way.
const CROWDED: f64 = 2.0;
/// Noise below this is no queueing: scheduling and interrupt delays of a busy host.
const SLACK_US: f64 = 500.0;
/// The base latency is the least seen in the last one to two of these.
const BASE_EPOCH: Duration = Duration::from_secs(10);

/// Prefetch budget of one store. Time is monotonic and comes in as an argument.
#[derive(Debug)]
pub struct Budget {
    config: BudgetConfig,
    window: u64,
    in_flight: u64,
    requests: u32,
    tokens: f64,
    refilled: Duration,
    base: [f64; 2],
    epoch: Duration,
    smoothed_demand_us: f64,
    crowded_until: Duration,
    slow_start: bool,
}

impl Budget {
    pub fn new(config: BudgetConfig) -> Budget {
        Budget {
            config,
            window: START_WINDOW.min(config.max_bytes_in_flight).max(MIN_WINDOW),
            in_flight: 0,
            requests: 0,
            tokens: config.bytes_per_second.map_or(0.0, |rate| rate as f64 / 10.0),
            refilled: Duration::ZERO,
            base: [f64::INFINITY; 2],
            epoch: Duration::ZERO,
            smoothed_demand_us: 0.0,
            crowded_until: Duration::ZERO,
            slow_start: true,
        }
    }

    /// Takes new limits; what is in flight stays.
    pub fn configure(&mut self, config: BudgetConfig) {
        self.config = config;
        self.window = self.window.min(config.max_bytes_in_flight).max(MIN_WINDOW);
    }

    pub fn window_bytes(&self) -> u64 {
        self.window
    }
    pub fn bytes_in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Whether a request of `bytes` may go out now. A request larger than the whole window goes alone.
    pub fn admits(&mut self, now: Duration, bytes: u64) -> bool {
        if self.requests >= self.config.max_requests {
            return false;
        }
        if self.requests > 0 && self.in_flight + bytes > self.window {
            return false;
        }
        let Some(rate) = self.config.bytes_per_second else { return true };
        let elapsed = now.saturating_sub(self.refilled);
        self.refilled = now;
        // A tenth of a second of burst, and always room for one request.
        let burst = (rate as f64 / 10.0).max(bytes as f64);
        self.tokens = (self.tokens + elapsed.as_secs_f64() * rate as f64).min(burst);
        self.tokens >= bytes as f64
    }

    pub fn issued(&mut self, bytes: u64) {
        self.in_flight += bytes;
        self.requests += 1;
        if self.config.bytes_per_second.is_some() {
            self.tokens -= bytes as f64;
        }
    }

    /// A prefetch came back.
    pub fn completed(&mut self, now: Duration, bytes: u64, latency: Duration) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.requests = self.requests.saturating_sub(1);
        self.note_base(now, latency);
        if now < self.crowded_until {
            return;
        }
        // Doubling every round trip at first, then a page for every request.
        let step = if self.slow_start { bytes } else { 4096 };
        self.window = (self.window + step).min(self.config.max_bytes_in_flight.max(MIN_WINDOW));
    }

    /// A demand read of the store took `latency`.
    pub fn demand_completed(&mut self, now: Duration, latency: Duration) {
        self.note_base(now, latency);
        let us = latency.as_secs_f64() * 1e6;
        // An eighth, as in TCP's smoothed round trip (RFC 6298).
        self.smoothed_demand_us = if self.smoothed_demand_us == 0.0 {
            us
        } else {
            self.smoothed_demand_us + (us - self.smoothed_demand_us) / 8.0
        };
        let base = self.base[0].min(self.base[1]);
        if self.in_flight > 0 && self.smoothed_demand_us > base * CROWDED + SLACK_US && now >= self.crowded_until {
            self.window = (self.window / 2).max(MIN_WINDOW);
            self.slow_start = false;
            // One step a round trip: what is in flight still shows the old window.
            self.crowded_until = now + latency;
            // The estimate must be earned again under the smaller window.
            self.smoothed_demand_us = 0.0;
        }
    }

    fn note_base(&mut self, now: Duration, latency: Duration) {
        if now.saturating_sub(self.epoch) > BASE_EPOCH {
            self.epoch = now;
            self.base = [f64::INFINITY, self.base[0]];
        }
        self.base[0] = self.base[0].min(latency.as_secs_f64() * 1e6);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_window_opens_while_demand_is_fast_and_halves_when_it_is_slow() {
        let mut budget = Budget::new(BudgetConfig::default());
        for i in 0..200 {
            assert!(budget.admits(ms(i), 256 << 10));
            budget.issued(256 << 10);
            budget.completed(ms(i), 256 << 10, ms(5));
        }
        assert_eq!(budget.window_bytes(), 16 << 20);
        budget.issued(1 << 20);
        for i in 200..230 {
            budget.demand_completed(ms(i), ms(20));
        }
        let shrunk = budget.window_bytes();
        assert!(shrunk < 8 << 20, "{shrunk}");
        assert!(shrunk >= MIN_WINDOW);
        for i in 300..4000 {
            budget.demand_completed(ms(i), ms(5));
            budget.completed(ms(i), 0, ms(5));
        }
        assert!(budget.window_bytes() > shrunk);
    }

    #[test]
    fn the_rate_limit_holds_over_time() {
        let mut budget = Budget::new(BudgetConfig { bytes_per_second: Some(1 << 20), ..BudgetConfig::default() });
        let mut sent = 0;
        for i in 0..10_000 {
            if budget.admits(ms(i), 65536) {
                budget.issued(65536);
                budget.completed(ms(i), 65536, ms(1));
                sent += 65536;
            }
        }
        assert!(sent <= 10 * (1 << 20) + (1 << 20) / 10 + 65536, "{sent}");
        assert!(sent >= 9 * (1 << 20), "{sent}");
    }

    #[test]
    fn a_request_larger_than_the_window_goes_alone() {
        let mut budget = Budget::new(BudgetConfig { max_bytes_in_flight: 65536, ..BudgetConfig::default() });
        assert!(budget.admits(ms(0), 64 << 20));
        budget.issued(64 << 20);
        assert!(!budget.admits(ms(0), 4096));
    }
}
