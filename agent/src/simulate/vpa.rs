//! The Kubernetes vertical pod autoscaler's recommender: a quantile of a decaying histogram, and a margin.
//!
//! As in `pkg/recommender`: buckets that grow by 5 %, half-life 24 h, target 15 % above the quantile, upper edge of the
//! bucket; a machine that runs out of memory counts as having used a fifth more. Recommendations are in force within a
//! minute, without a restart, when they differ by 10 % from what is given.

use super::policy::{HostSeen, Policy, Seen, Target};

const BUCKETS: usize = 176;
const GROWTH: f64 = 1.05;
const HALF_LIFE_S: f64 = 86_400.0;
const MARGIN: f64 = 1.15;
const CHANGE: f64 = 0.1;

#[derive(Debug, Clone)]
struct Histogram {
    weights: [f64; BUCKETS],
    /// First bucket's width.
    first: f64,
    since_s: u64,
}

impl Histogram {
    fn new(first: f64) -> Self {
        Self { weights: [0.0; BUCKETS], first, since_s: 0 }
    }

    fn upper(&self, bucket: usize) -> f64 {
        self.first * (GROWTH.powi(bucket as i32 + 1) - 1.0) / (GROWTH - 1.0)
    }

    fn add(&mut self, at_s: u64, value: f64) {
        // Weights grow instead of all others decaying; rescaled before they get too large.
        if self.since_s == 0 {
            self.since_s = at_s;
        }
        let mut halves = (at_s - self.since_s) as f64 / HALF_LIFE_S;
        if halves > 100.0 {
            self.weights.iter_mut().for_each(|weight| *weight *= (-halves).exp2());
            (self.since_s, halves) = (at_s, 0.0);
        }
        let bucket = (value * (GROWTH - 1.0) / self.first + 1.0).ln() / GROWTH.ln();
        self.weights[(bucket.max(0.0) as usize).min(BUCKETS - 1)] += halves.exp2();
    }

    fn quantile(&self, q: f64) -> Option<f64> {
        let all: f64 = self.weights.iter().sum();
        let mut sum = 0.0;
        let found = self.weights.iter().position(|weight| {
            sum += weight;
            sum >= q * all && sum > 0.0
        });
        found.map(|bucket| self.upper(bucket))
    }
}

/// With the target quantile `q`.
#[derive(Debug)]
pub(super) struct Vpa {
    q: f64,
    vms: Vec<[Histogram; 2]>,
}

impl Vpa {
    pub(super) fn new(q: f64) -> Self {
        Self { q, vms: Vec::new() }
    }
}

impl Policy for Vpa {
    fn name(&self) -> String {
        format!("VPA, p{:.0} + 15 %", self.q * 100.0)
    }

    fn loop_s(&self) -> u64 {
        60
    }

    fn observe(&mut self, vm: usize, at_s: u64, cpu: f64, memory: f64) {
        // A hundredth of a core and 10 MB, as there.
        let empty = || [Histogram::new(0.01), Histogram::new(1e7)];
        self.vms.resize_with(self.vms.len().max(vm + 1), empty);
        self.vms[vm][0].add(at_s, cpu);
        self.vms[vm][1].add(at_s, memory);
    }

    fn decide(&mut self, now_s: u64, _: &HostSeen, seen: &[Seen], targets: &mut [Target]) {
        for ((seen, target), histograms) in seen.iter().zip(targets).zip(&mut self.vms) {
            let [cpu, memory] = histograms;
            if seen.memory.stalled > 0.0 {
                memory.add(now_s, (seen.memory.used * 1.2).max(seen.memory.used + 1e8));
            }
            for (histogram, resource, target) in
                [(cpu, &seen.cpu, &mut target.cpu), (memory, &seen.memory, &mut target.memory)]
            {
                let Some(to) = histogram.quantile(self.q) else { continue };
                let to = (to * MARGIN).min(resource.provisioned);
                if (to - resource.have).abs() > CHANGE * resource.have || resource.have > resource.provisioned {
                    *target = Some(to);
                }
            }
        }
    }
}
