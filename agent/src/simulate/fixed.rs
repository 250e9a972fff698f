//! Nobody changes anything: what was provisioned, or a quantile of the training part.

use super::policy::{HostSeen, Policy, Seen, Target};

/// What was provisioned.
#[derive(Debug)]
pub(super) struct Provisioned;

impl Policy for Provisioned {
    fn name(&self) -> String {
        "static, as provisioned".to_owned()
    }

    fn loop_s(&self) -> u64 {
        3600
    }

    fn decide(&mut self, _: u64, _: &HostSeen, seen: &[Seen], targets: &mut [Target]) {
        for (seen, target) in seen.iter().zip(targets) {
            // Only where the operator has provisioned anew.
            *target = Target { cpu: Some(seen.cpu.provisioned), memory: Some(seen.memory.provisioned) };
        }
    }
}

/// The .95 quantile of each machine's training part.
#[derive(Debug, Default)]
pub(super) struct Quantile {
    history: Vec<[Vec<f64>; 2]>,
    sizes: Vec<[f64; 2]>,
}

impl Policy for Quantile {
    fn name(&self) -> String {
        "static, p95 of training".to_owned()
    }

    fn loop_s(&self) -> u64 {
        3600
    }

    fn observe(&mut self, vm: usize, _: u64, cpu: f64, memory: f64) {
        if self.sizes.is_empty() {
            self.history.resize(self.history.len().max(vm + 1), [Vec::new(), Vec::new()]);
            let [cpus, memories] = &mut self.history[vm];
            cpus.push(cpu);
            memories.push(memory);
        }
    }

    fn decide(&mut self, _: u64, _: &HostSeen, seen: &[Seen], targets: &mut [Target]) {
        if self.sizes.is_empty() {
            self.sizes =
                std::mem::take(&mut self.history).into_iter().map(|both| both.map(|all| quantile(all, 0.95))).collect();
            self.sizes.resize(seen.len(), [f64::INFINITY; 2]);
        }
        for ((seen, target), [cpu, memory]) in seen.iter().zip(targets).zip(&self.sizes) {
            *target =
                Target { cpu: Some(cpu.min(seen.cpu.provisioned)), memory: Some(memory.min(seen.memory.provisioned)) };
        }
    }
}

/// The quantile `q` of values; of none, without bound.
pub(super) fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    if values.is_empty() {
        return f64::INFINITY;
    }
    let at = ((values.len() - 1) as f64 * q).round() as usize;
    *values.select_nth_unstable_by(at, f64::total_cmp).1
}
