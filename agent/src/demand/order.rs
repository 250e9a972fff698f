//! From a decision to a change that libvirt can make, and back: what it came to.

use super::machine::Machine;
use super::{Order, State};
use crate::planner::Kind;
use prestage_integration::api::demand::{Mode, Resource};
use prestage_integration::libvirt::Uuid;
use prestage_integration::libvirt::act::{ActError, Change, DiskLimits, Done, NetLimits, Outcome, Setting};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a decision is not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NotDone {
    /// The mode says so.
    Mode,
    /// Nothing is to be done.
    Nothing,
    /// It is decided anew with every turn until it can be: another change of it is under way, one failed a moment ago, or it can't be
    /// carried out.
    Later(String),
    /// The same, and that was said before.
    Said,
}

/// What a decision came to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Result {
    /// `not_acted`, `done`, `partial`, `failed` or `impossible`.
    pub(crate) outcome: &'static str,
    pub(crate) got: Option<f64>,
    pub(crate) why: String,
}

impl State {
    /// The changes that carry out an order; the machine counts as being changed until [`State::done`].
    pub(crate) fn changes(&mut self, order: &Order, now: Instant) -> std::result::Result<Vec<Change>, NotDone> {
        if !matches!(order.decision.kind, Kind::Raise | Kind::Lower) {
            return Err(NotDone::Nothing);
        }
        if order.mode != Mode::Act {
            return Err(NotDone::Mode);
        }
        let Some(machine) = self.machines.get(&order.uuid) else { return Err(NotDone::Nothing) };
        let (settings, not_below) = (settings(machine, order), machine.not_below());
        if self.is_busy(order) {
            return Err(self.put_off(order, "a change of it is under way", None, now));
        }
        if let Some(backoff) = self.backoffs.get(&direction(order))
            && !backoff.is_ready(now)
        {
            let (what, wait) = (format!("it failed {} times", backoff.failures()), backoff.wait(now));
            return Err(self.put_off(order, &what, Some(wait), now));
        }
        let settings = match settings {
            Ok(settings) => settings,
            Err(reason) => return Err(self.put_off(order, &reason, None, now)),
        };
        self.put_off.remove(&(order.uuid, order.resource));
        self.busy.insert((order.uuid, order.resource));
        Ok(settings.into_iter().map(|to| Change { vm: order.uuid, to, not_below }).collect())
    }

    /// Nothing of it is to be waited for; said once, and again after a while.
    fn put_off(&mut self, order: &Order, what: &str, wait: Option<Duration>, now: Instant) -> NotDone {
        self.planner.withdraw(order.decision.vm, order.decision.resource);
        let (key, kind) = ((order.uuid, order.resource), order.decision.kind);
        let repeat = Duration::from_secs(self.planner.settings().repeat_s.into());
        let said = |(of, why, at): &(Kind, String, Instant)| {
            *of == kind && why == what && now.saturating_duration_since(*at) < repeat
        };
        if self.put_off.get(&key).is_some_and(said) {
            return NotDone::Said;
        }
        self.put_off.insert(key, (kind, what.to_owned(), now));
        NotDone::Later(match wait {
            Some(wait) => format!("{what}; tried again in {} s", wait.as_secs()),
            None => what.to_owned(),
        })
    }

    /// What came of them.
    pub(crate) fn done(
        &mut self,
        order: &Order,
        results: &[std::result::Result<Done, ActError>],
        now: Instant,
    ) -> Result {
        self.busy.remove(&(order.uuid, order.resource));
        let mut result = Result { outcome: "done", got: None, why: String::new() };
        let mut failed = false;
        for each in results {
            match each {
                Ok(done) => {
                    self.latencies.learn(done);
                    let got = amount(&done.got);
                    result.got = got.or(result.got);
                    if let (Some(machine), Some(got)) = (self.machines.get_mut(&order.uuid), got)
                        && matches!(order.resource, Resource::Disk | Resource::Network)
                    {
                        machine.limits[super::machine::index(order.resource)] = Some(got);
                    }
                    match done.outcome {
                        Outcome::Reached | Outcome::Already => {}
                        Outcome::Partial => result.outcome = "partial",
                        Outcome::Unchanged | Outcome::RolledBack => (result.outcome, failed) = ("failed", true),
                    }
                    say(&mut result.why, &done.why);
                }
                Err(error) => {
                    failed = true;
                    result.outcome = if error.is_permanent() { "impossible" } else { "failed" };
                    say(&mut result.why, &error.to_string());
                }
            }
        }
        if failed {
            self.backoffs.entry(direction(order)).or_default().failed(now);
        } else {
            self.backoffs.remove(&direction(order));
        }
        result
    }

    /// Whether a change of it is under way.
    pub(crate) fn is_busy(&self, order: &Order) -> bool {
        self.busy.contains(&(order.uuid, order.resource))
    }

    /// It is free again without anything done, and may be decided anew.
    pub(crate) fn withdraw(&mut self, order: &Order) {
        self.busy.remove(&(order.uuid, order.resource));
        self.planner.withdraw(order.decision.vm, order.decision.resource);
    }

    /// Held while a machine is changed.
    pub(crate) fn turn_of(&mut self, uuid: Uuid) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(self.turns_of.entry(uuid).or_default())
    }
}

fn direction(order: &Order) -> (Uuid, Resource, bool) {
    (order.uuid, order.resource, order.decision.kind == Kind::Raise)
}

fn say(why: &mut String, more: &str) {
    if !more.is_empty() && !why.contains(more) {
        if !why.is_empty() {
            why.push_str("; ");
        }
        why.push_str(more);
    }
}

/// What libvirt is to set, or why that is nothing. vCPUs are whole; a rate holds for each disk and each interface.
fn settings(machine: &Machine, order: &Order) -> std::result::Result<Vec<Setting>, String> {
    let to = order.decision.to;
    let Some(abilities) = &machine.abilities else { return Err("what can be done to it is not known yet".to_owned()) };
    let settings: Vec<Setting> = match order.resource {
        Resource::Cpu => {
            let (least, most) = (abilities.vcpus.fewest.max(1), abilities.vcpus.maximum.max(1));
            let vcpus = (to.ceil() as u32).clamp(least.min(most), most);
            if f64::from(vcpus) == order.decision.before {
                return Err(format!("it can have {least} to {most} vCPUs while it runs"));
            }
            vec![Setting::Vcpus(vcpus)]
        }
        Resource::Memory => vec![Setting::Memory(to as u64)],
        Resource::Disk => {
            let limits = DiskLimits { total_bps: Some(to as u64), ..DiskLimits::default() };
            let able = abilities.disks.iter().filter(|disk| disk.limits.is_yes());
            able.map(|disk| Setting::Disk { target: disk.target.clone(), limits }).collect()
        }
        Resource::Network => {
            let limits = NetLimits { received_bps: Some(to as u64), sent_bps: Some(to as u64) };
            let able = abilities.nics.iter().filter(|nic| nic.limits.is_yes());
            able.map(|nic| Setting::Network { device: nic.device.clone(), limits }).collect()
        }
    };
    if settings.is_empty() {
        Err(format!("nothing of its {} can be limited", order.resource.name()))
    } else {
        Ok(settings)
    }
}

/// The amount of a setting, in the unit of its resource.
fn amount(setting: &Setting) -> Option<f64> {
    match setting {
        Setting::Memory(bytes) | Setting::Balloon(bytes) => Some(*bytes as f64),
        Setting::MemoryDevice { .. } | Setting::CpuWeight(_) | Setting::DiskWeight(_) => None,
        Setting::Vcpus(vcpus) => Some(f64::from(*vcpus)),
        Setting::CpuQuota(cores) => *cores,
        Setting::Disk { limits, .. } => limits.total_bps.map(|bps| bps as f64),
        Setting::Network { limits, .. } => limits.received_bps.map(|bps| bps as f64),
    }
}
