//! What makes shrinking safe, and how long each kind of change may take.

use std::time::Duration;

use super::change::Kind;

/// Limits of changes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// What a guest is left with to spare, as a share of its largest memory. Default 0.05.
    pub spare_share: f64,
    /// And at least this much. Default 64 MiB: a Linux guest's own reserves are half of it.
    pub spare_min_bytes: u64,
    /// How long memory may take to shrink. Default 120 s; what is reached by then stays.
    pub shrink: Duration,
    /// How long memory may take to grow. Default 20 s.
    pub grow: Duration,
    /// How long vCPUs may take to come or go. Default 15 s; QEMU itself waits 5 s for a guest to let go of one.
    pub vcpus: Duration,
    /// Between two looks while something is waited for. Default 100 ms.
    pub look: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            spare_share: 0.05,
            spare_min_bytes: 64 << 20,
            shrink: Duration::from_secs(120),
            grow: Duration::from_secs(20),
            vcpus: Duration::from_secs(15),
            look: Duration::from_millis(100),
        }
    }
}

impl Pace {
    /// What a guest with this largest memory is left with to spare, in bytes.
    pub fn spare_bytes(&self, maximum_bytes: u64) -> u64 {
        let share = self.spare_share.clamp(0.0, 1.0) * maximum_bytes as f64;
        (share as u64).max(self.spare_min_bytes)
    }

    /// The longest a change of this kind runs, its last look included.
    pub fn limit(&self, kind: Kind) -> Duration {
        let slack = Duration::from_secs(15);
        match kind {
            Kind::Balloon | Kind::MemoryDevice => self.shrink.max(self.grow) + slack,
            Kind::Vcpus => self.vcpus * 2 + slack,
            _ => slack,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spare_grows_with_the_guest() {
        let pace = Pace::default();
        assert_eq!(pace.spare_bytes(512 << 20), 64 << 20);
        assert_eq!(pace.spare_bytes(100 << 30), 5 << 30);
    }
}
