//! Model of the store: one link in front of a constant latency.
//!
//! A transfer takes its bytes over the bandwidth, then the latency. Demand queues behind demand only; a prefetch queues
//! behind everything that was asked for before it. Times are microseconds of the trace's clock.

/// The store of a timed replay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceConfig {
    /// From the end of the transfer to the answer, µs.
    pub latency_us: f64,
    /// Bandwidth in MB/s, which is bytes a microsecond.
    pub mbps: f64,
}

#[derive(Debug)]
pub(crate) struct Device {
    config: DeviceConfig,
    demand_free: f64,
    prefetch_free: f64,
}

impl Device {
    pub(crate) fn new(config: DeviceConfig) -> Self {
        Self { config, demand_free: 0.0, prefetch_free: 0.0 }
    }

    /// When a demand read of `bytes`, asked for at `now`, is there.
    pub(crate) fn demand(&mut self, now: f64, bytes: u64) -> f64 {
        let start = now.max(self.demand_free);
        self.demand_free = start + bytes as f64 / self.config.mbps;
        self.demand_free + self.config.latency_us
    }

    /// When a prefetch of `bytes`, asked for at `now`, is there.
    pub(crate) fn prefetch(&mut self, now: f64, bytes: u64) -> f64 {
        let start = now.max(self.demand_free).max(self.prefetch_free);
        self.prefetch_free = start + bytes as f64 / self.config.mbps;
        self.prefetch_free + self.config.latency_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_overtakes_prefetch_and_queues_behind_demand() {
        let mut device = Device::new(DeviceConfig { latency_us: 1000.0, mbps: 100.0 });
        assert_eq!(device.prefetch(0.0, 10_000), 1100.0);
        assert_eq!(device.demand(0.0, 10_000), 1100.0);
        assert_eq!(device.demand(50.0, 10_000), 1200.0);
        assert_eq!(device.prefetch(60.0, 10_000), 1300.0);
    }
}
