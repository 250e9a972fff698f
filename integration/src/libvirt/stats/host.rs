//! What the host uses: `/proc/stat` and `/proc/meminfo` (proc(5)).

use std::time::{Duration, Instant};

use super::sample::HostSample;
use crate::pressure::Pressure;

/// `/proc` counts CPU time in hundredths of a second on every architecture libvirt runs QEMU on (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;
/// Ticks are coarse: a rate over less than this would be mostly rounding.
const SHORTEST: Duration = Duration::from_millis(100);

/// Remembers the last counters.
#[derive(Debug, Default)]
pub(super) struct Host {
    last: Option<(Instant, Ticks)>,
}

/// CPU time since boot, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Ticks {
    used: u64,
    guest: u64,
    iowait: u64,
    stolen: u64,
    cpus: u32,
}

impl Host {
    pub(super) fn turn(&mut self, at: Instant, at_us: u64) -> HostSample {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let mut sample = self.sample(at, at_us, &read("/proc/stat"), &read("/proc/meminfo"));
        sample.pressure = Pressure::of_host();
        sample
    }

    fn sample(&mut self, at: Instant, at_us: u64, stat: &str, meminfo: &str) -> HostSample {
        let memory = |key: &str| kib(meminfo, key).map_or(0, |kib| kib.saturating_mul(1024));
        let mut sample = HostSample {
            at_us,
            memory_bytes: memory("MemTotal:"),
            memory_available_bytes: memory("MemAvailable:"),
            swap_bytes: memory("SwapTotal:"),
            swap_free_bytes: memory("SwapFree:"),
            ..HostSample::default()
        };
        let Some(now) = Ticks::parse(stat) else { return sample };
        sample.cpus = now.cpus;
        let Some((then, before)) = self.last else {
            self.last = Some((at, now));
            return sample;
        };
        let elapsed = at.saturating_duration_since(then);
        if elapsed < SHORTEST {
            return sample;
        }
        self.last = Some((at, now));
        let cores = |of: fn(&Ticks) -> u64| {
            // iowait may fall, as proc(5) says.
            of(&now).checked_sub(of(&before)).map(|ticks| ticks as f64 / TICKS_PER_S / elapsed.as_secs_f64())
        };
        sample.used_cores = cores(|t| t.used);
        sample.guest_cores = cores(|t| t.guest);
        sample.iowait_cores = cores(|t| t.iowait);
        sample.stolen_cores = cores(|t| t.stolen);
        sample
    }
}

impl Ticks {
    /// `cpu  user nice system idle iowait irq softirq steal guest guest_nice`, where user and nice have the guests' time in
    /// them.
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let mut fields = [0u64; 10];
        for (field, word) in fields.iter_mut().zip(line.split_ascii_whitespace()) {
            *field = word.parse().ok()?;
        }
        let [user, nice, system, _idle, iowait, irq, softirq, stolen, guest, guest_nice] = fields;
        let is_cpu =
            |line: &&str| line.strip_prefix("cpu").is_some_and(|l| l.starts_with(|c: char| c.is_ascii_digit()));
        let cpus = stat.lines().filter(is_cpu).count();
        Some(Self {
            used: user + nice + system + irq + softirq,
            guest: guest + guest_nice,
            iowait,
            stolen,
            cpus: cpus.try_into().ok()?,
        })
    }
}

fn kib(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim_start().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_cores() {
        let stat =
            |n: u64| format!("cpu  {} 0 {n} 5 {} 0 0 {n} {n} 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n", n * 2, 9 - n / 100);
        let meminfo = "MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\nSwapTotal: 0 kB\n";
        let (mut host, start) = (Host::default(), Instant::now());
        let first = host.sample(start, 1, &stat(0), meminfo);
        assert_eq!((first.cpus, first.used_cores), (2, None));
        assert_eq!((first.memory_bytes, first.memory_available_bytes, first.swap_bytes), (2 << 20, 1 << 20, 0));
        let soon = host.sample(start + Duration::from_millis(50), 2, &stat(100), meminfo);
        assert_eq!(soon.used_cores, None);
        let second = host.sample(start + Duration::from_secs(2), 3, &stat(100), meminfo);
        assert_eq!((second.used_cores, second.guest_cores, second.stolen_cores), (Some(1.5), Some(0.5), Some(0.5)));
        assert_eq!(second.iowait_cores, None, "it fell");
        assert_eq!(host.sample(start, 4, "", "").cpus, 0);
    }

    #[test]
    fn this_host_is_measured() {
        let sample = Host::default().turn(Instant::now(), 1);
        assert!(sample.cpus > 0 && sample.memory_bytes > 0 && sample.memory_available_bytes <= sample.memory_bytes);
    }
}
