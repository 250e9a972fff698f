//! A machine's book: what it uses, what runs in it, what it may have and what can be done to it. Sans-I/O.

use super::Ahead;
use super::course::Rise;
use super::flow::{Covariates, Flow, Found};
use super::foreseen::{Base, Foreseen, Window};
use crate::planner;
use prestage_integration::api::demand::{Mode, Resource, ResourcePolicy, VmPolicy};
use prestage_integration::libvirt::Uuid;
use prestage_integration::libvirt::act::{Abilities, Ability};
use prestage_integration::libvirt::stats::VmSample;
use prestage_predictor::demand::{Forecast, Quantiles};
use std::time::Duration;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    pub(crate) policy: VmPolicy,
    /// The policy was set, and is not the default.
    pub(crate) own_policy: bool,
    pub(crate) abilities: Option<Abilities>,
    pub(crate) sample: Option<VmSample>,
    pub(crate) seen_s: u64,
    /// When this start of it was seen first.
    began_s: u64,
    pub(crate) foreseen: Foreseen,
    /// Limits of disk and network as last applied.
    pub(crate) limits: [Option<f64>; 4],
    flows: [Flow; 4],
}

pub(crate) const fn index(resource: Resource) -> usize {
    resource as usize
}

/// The planner's word for it.
pub(crate) const fn planned(resource: Resource) -> planner::Resource {
    match resource {
        Resource::Cpu => planner::Resource::Cpu,
        Resource::Memory => planner::Resource::Memory,
        Resource::Disk => planner::Resource::Disk,
        Resource::Network => planner::Resource::Network,
    }
}

impl Machine {
    pub(crate) fn new(uuid: Uuid, name: String) -> Self {
        Self {
            uuid,
            name,
            policy: VmPolicy::default(),
            own_policy: false,
            abilities: None,
            sample: None,
            seen_s: 0,
            began_s: 0,
            foreseen: Foreseen::default(),
            limits: [None; 4],
            flows: Resource::ALL.map(Flow::new),
        }
    }

    pub(crate) fn flow(&mut self, resource: Resource) -> &mut Flow {
        &mut self.flows[index(resource)]
    }

    /// What it has of a resource; `None`: not limited, or not known.
    pub(crate) fn allocated(&self, resource: Resource) -> Option<f64> {
        let sample = self.sample.as_ref()?;
        match resource {
            Resource::Cpu => sample.cpu.vcpus.map(f64::from),
            Resource::Memory => sample.memory.current_bytes.map(|bytes| bytes as f64),
            // Limits are ours where the policy has a maximum; elsewhere there are none.
            _ => self.limits[index(resource)].or(self.bounds(resource).max),
        }
    }

    pub(crate) fn bounds(&self, resource: Resource) -> ResourcePolicy {
        self.policy.resources.get(&resource).copied().unwrap_or_default()
    }

    /// Takes in a second's sample; `covariates`: what else is known from a time on. Says what has become unusual.
    pub(crate) fn observe(
        &mut self,
        sample: VmSample,
        now_s: u64,
        covariates: &dyn Fn(u64) -> Covariates,
    ) -> Vec<Found> {
        let mut found = Vec::new();
        self.name.clone_from(&sample.vm.name);
        let restarted = self.sample.as_ref().is_some_and(|before| before.instance != sample.instance);
        if restarted {
            // What ran is gone, and limits with it.
            self.foreseen.clear();
            self.limits = [None; 4];
            self.abilities = None;
        }
        if restarted || self.sample.is_none() {
            self.began_s = now_s;
        }
        let saturated =
            sample.cpu.vcpus.zip(sample.cpu.used_cores).is_some_and(|(has, uses)| uses >= BUSY * f64::from(has));
        for (resource, value) in used(&sample) {
            let Some(value) = value else { continue };
            found.extend(self.flows[index(resource)].observe(now_s, value, covariates));
            let wanted = if saturated && resource == Resource::Cpu { SATURATED * value } else { value };
            self.foreseen.observe(resource, now_s, value, wanted);
        }
        self.seen_s = now_s;
        self.sample = Some(sample);
        found
    }

    /// Whether it was measured just now, by whatever the clock says.
    pub(crate) fn is_here(&self, now_s: u64) -> bool {
        now_s.abs_diff(self.seen_s) <= super::GONE_S
    }

    /// What is unusual now.
    pub(crate) fn unusual(&self) -> impl Iterator<Item = Found> {
        self.flows.iter().filter_map(Flow::unusual)
    }

    /// What it uses now, by resource.
    pub(crate) fn base(&self) -> Base {
        std::array::from_fn(|at| self.flows[at].used().map(|(_, used)| used))
    }

    /// What is known to be used at most within `horizon_s`; 0 in quantiles of which nothing is known.
    fn rise(&self, resource: Resource, now_s: u64, horizon_s: u32, ahead: &Ahead<'_>) -> Option<Rise> {
        let window = Window { now_s, from_s: now_s, length_s: horizon_s };
        let used = self.flows[index(resource)].used().map(|(_, used)| used);
        let rise = self.foreseen.rise(resource, window, used, &ahead.upcoming)?;
        Some(self.with_margin(rise))
    }

    /// What is known to come is kept free of others as what is in use would be.
    fn with_margin(&self, rise: Rise) -> Rise {
        rise.map(|value| value * (1.0 + self.policy.margin))
    }

    /// Whether what is known of its means is no longer so: its guest, which did not answer, does.
    pub(crate) fn has_woken(&self) -> bool {
        let answers = self.sample.as_ref().is_some_and(|sample| sample.memory.guest.is_some());
        answers && self.abilities.as_ref().is_some_and(|abilities| !abilities.balloon.is_yes())
    }

    /// Quantiles of the most it is to use within the minutes to come.
    pub(crate) fn outlook(
        &mut self,
        resource: Resource,
        now_s: u64,
        horizon_s: u32,
        ahead: &Ahead<'_>,
    ) -> Option<[f64; 4]> {
        let flow = self.flows[index(resource)].outlook(now_s, &ahead.covariates);
        match (flow, self.rise(resource, now_s, horizon_s, ahead)) {
            (Some(flow), Some(rise)) => Some(std::array::from_fn(|q| f64::max(flow[q], rise[q]))),
            // Where nothing is known to come it stays as it is.
            (None, Some(rise)) => {
                let used = self.flows[index(resource)].used().map_or(0.0, |(_, used)| used);
                Some(rise.map(|value| value.max(used)))
            }
            (flow, None) => flow,
        }
    }

    /// A forecast for people, with what is known to run, to follow and to come. `None`: too little was measured.
    pub(crate) fn forecast(
        &self,
        resource: Resource,
        now_s: u64,
        horizon_s: u32,
        ahead: &Ahead<'_>,
    ) -> Option<Forecast> {
        let flow = &self.flows[index(resource)];
        let mut forecast = flow.forecast(horizon_s, &ahead.covariates)?;
        let used = flow.used().map(|(_, used)| used);
        let lift = |from_s: u64, length_s: u32, quantiles: &mut Quantiles| {
            let window = Window { now_s, from_s, length_s };
            if let Some(rise) = self.foreseen.rise(resource, window, used, &ahead.upcoming) {
                quantiles.0 = std::array::from_fn(|q| quantiles.0[q].max(rise[q]));
            }
        };
        let (mut from_s, step_s) = (forecast.origin_s, forecast.step_s);
        for step in &mut forecast.steps {
            from_s += u64::from(step_s);
            lift(from_s, step_s, step);
        }
        let length_s = u32::try_from(from_s.saturating_sub(now_s)).unwrap_or(u32::MAX).saturating_add(step_s);
        lift(now_s, length_s, &mut forecast.peak);
        Some(forecast)
    }

    /// The machine as the planner sees it, and why a resource is left out.
    pub(crate) fn planned(
        &mut self,
        now_s: u64,
        horizon_s: u32,
        ahead: &Ahead<'_>,
    ) -> (planner::Vm, [Option<&'static str>; 4]) {
        let mut left_out = [None; 4];
        let readings = std::array::from_fn(|at| {
            let resource = Resource::ALL[at];
            let outlook = self.outlook(resource, now_s, horizon_s, ahead);
            match self.reading(resource, now_s, outlook) {
                Ok(reading) => Some(reading),
                Err(reason) => {
                    left_out[at] = Some(reason);
                    None
                }
            }
        });
        let vm = planner::Vm {
            id: planner::VmId(self.uuid.as_u128()),
            policy: self.planner_policy(),
            abilities: self.planner_abilities(now_s),
            readings,
        };
        (vm, left_out)
    }

    fn reading(
        &self,
        resource: Resource,
        now_s: u64,
        outlook: Option<[f64; 4]>,
    ) -> Result<planner::Reading, &'static str> {
        let sample = self.sample.as_ref().ok_or("not measured yet")?;
        if !matches!(resource, Resource::Cpu | Resource::Memory) && self.bounds(resource).max.is_none() {
            return Err("not limited: its policy has no maximum for it");
        }
        let allocated = self.allocated(resource).ok_or("libvirt does not say what it has")?;
        let (at_s, used) = self.flows[index(resource)].used().ok_or(match resource {
            Resource::Memory => "its guest does not tell what memory it needs",
            _ => "libvirt does not say what it uses",
        })?;
        // What was measured before the clock was set back is old, too.
        let mut age_s = u32::try_from(now_s.abs_diff(at_s)).unwrap_or(u32::MAX);
        if resource == Resource::Memory
            && let Some(guest) = &sample.memory.guest
        {
            age_s = age_s.saturating_add(u32::try_from(guest.age.as_secs()).unwrap_or(u32::MAX));
        }
        let mut pressure = pressure(sample, resource);
        if resource == Resource::Memory && self.room().is_some_and(|room| room < SHORT) {
            pressure.some = pressure.some.max(GUEST_SHORT);
        }
        let outlook = outlook.map(|[_, p50, p90, p95]| planner::Outlook { p50, p90, p95 });
        let rest = self.foreseen.rest(resource, now_s).map(|rest| {
            let [_, p50, p90, p95] = self.with_margin(rest);
            planner::Outlook { p50, p90, p95 }
        });
        Ok(planner::Reading { allocated, used, age_s, pressure, oom: false, outlook, rest })
    }

    /// What a guest that its balloon does not save has to spare, by what it is to be left with. `None`: its balloon gives back by itself,
    /// it has none, or what it says is old.
    fn room(&self) -> Option<f64> {
        let abilities =
            self.abilities.as_ref().filter(|abilities| abilities.balloon.is_yes() && !abilities.autodeflate)?;
        let memory = &self.sample.as_ref()?.memory;
        let guest = memory.guest.filter(|guest| guest.is_fresh(memory.period.or(abilities.period).unwrap_or(ASKED)))?;
        let kept = self.policy.margin.max(LEAST_MARGIN) * guest.used_bytes() as f64;
        (kept > 0.0).then(|| guest.spare_bytes() as f64 / kept)
    }

    /// It may run short before the next second is over.
    pub(crate) fn is_tight(&self) -> bool {
        self.policy.mode_of(Resource::Memory) == Mode::Act && self.room().is_some_and(|room| room < TIGHT)
    }

    fn planner_policy(&self) -> planner::Policy {
        let sample = self.sample.as_ref();
        let most = |resource: Resource| match resource {
            Resource::Cpu => sample.and_then(|sample| sample.cpu.vcpus_max).map(f64::from),
            Resource::Memory => sample.and_then(|sample| sample.memory.maximum_bytes).map(|bytes| bytes as f64),
            _ => None,
        };
        let max = Resource::ALL.map(|resource| {
            let own = self.bounds(resource).max.unwrap_or(f64::INFINITY);
            let least = own.min(most(resource).unwrap_or(f64::INFINITY));
            // Where nobody says what it may have, it may have what it has.
            if least.is_finite() { least } else { self.allocated(resource).unwrap_or(0.0) }
        });
        let min = Resource::ALL.map(|resource| self.bounds(resource).min.unwrap_or(0.0));
        planner::Policy {
            min: planner::Amounts(min),
            max: planner::Amounts(max),
            priority: self.policy.priority,
            weight: f64::from(self.policy.weight),
            mode: Resource::ALL.map(|resource| match self.policy.mode_of(resource) {
                Mode::Observe => planner::Mode::Observe,
                Mode::Recommend => planner::Mode::Recommend,
                Mode::Act => planner::Mode::Act,
            }),
            never_lower: Resource::ALL.map(|resource| self.bounds(resource).never_lower),
            margin: [Some(self.policy.margin); 4],
        }
    }

    fn planner_abilities(&self, now_s: u64) -> planner::Abilities {
        let Some(abilities) = &self.abilities else { return planner::Abilities::default() };
        let yes = Ability::is_yes;
        // A guest that boots does not answer yet.
        let boots = !yes(&abilities.balloon) && now_s.abs_diff(self.began_s) < BOOTS_S;
        planner::Abilities {
            known: !boots,
            balloon: yes(&abilities.balloon),
            virtio_mem: !abilities.devices.is_empty(),
            vcpu_add: yes(&abilities.vcpus.add),
            vcpu_remove: yes(&abilities.vcpus.remove),
            agent: yes(&abilities.agent) || yes(&abilities.vcpus.add),
            // Whole vCPUs are given and taken; a quota would hide them from the guest.
            cpu_quota: false,
            disk_limit: abilities.disks.iter().any(|disk| yes(&disk.limits)),
            network_limit: abilities.nics.iter().any(|nic| yes(&nic.limits)),
        }
    }

    /// Below which memory it is not taken, whatever was decided: what it uses and its margin.
    pub(crate) fn not_below(&self) -> u64 {
        let used = self.flows[index(Resource::Memory)].used().map_or(0.0, |(_, used)| used);
        let floor = used * (1.0 + self.policy.margin);
        floor.max(self.bounds(Resource::Memory).min.unwrap_or(0.0)) as u64
    }
}

/// What a sample says of each resource.
pub(crate) fn used(sample: &VmSample) -> [(Resource, Option<f64>); 4] {
    let memory = sample.memory.guest.as_ref().filter(|guest| {
        // Figures that nobody renews tell of another time.
        guest.is_fresh(sample.memory.period.unwrap_or(ASKED))
    });
    // A guest may say anything; it cannot use what it does not have.
    let most = sample.memory.maximum_bytes.or(sample.memory.current_bytes).unwrap_or(u64::MAX);
    [
        (Resource::Cpu, sample.cpu.used_cores.or(sample.cpu.total_cores)),
        (Resource::Memory, memory.map(|guest| guest.used_bytes().min(most) as f64)),
        (Resource::Disk, sample.disk_bps()),
        (Resource::Network, sample.net_bps()),
    ]
}

/// How long work in the machine waits, as shares of time.
fn pressure(sample: &VmSample, resource: Resource) -> planner::Pressure {
    let group = sample.pressure.as_ref();
    let stall = match resource {
        Resource::Cpu => group.and_then(|group| group.cpu.as_ref()),
        Resource::Memory => group.and_then(|group| group.memory.as_ref()),
        Resource::Disk => group.and_then(|group| group.io.as_ref()),
        Resource::Network => None,
    };
    let mut pressure = stall.map_or(planner::Pressure::default(), |stall| planner::Pressure {
        some: stall.some.avg10,
        full: stall.full.as_ref().map_or(0.0, |full| full.avg10),
    });
    if resource == Resource::Memory
        && let Some(guest) = &sample.memory.guest
        && (guest.swap_out_bps.unwrap_or(0.0) > 0.0 || guest.major_faults.unwrap_or(0.0) >= FAULTS)
    {
        // Inside the guest programs wait for memory, which no group of the host shows.
        pressure.some = pressure.some.max(GUEST_SHORT);
    }
    pressure
}

/// From this share of its vCPUs on a machine would use more if it had more; how much more nobody knows: half as much again.
const BUSY: f64 = 0.8;
const SATURATED: f64 = 1.5;
/// Page faults a second that wait for a disk, from which on a guest counts as short of memory.
const FAULTS: f64 = 100.0;
/// Pressure that a guest which is short of memory counts as.
const GUEST_SHORT: f64 = 0.2;
/// Seconds within which a guest that was started should answer.
const BOOTS_S: u64 = 120;
/// How often a guest is asked for its memory where nothing is known of that.
const ASKED: Duration = Duration::from_secs(2);
/// Least share of what a guest uses that it is to have to spare, whatever its policy says.
const LEAST_MARGIN: f64 = 0.05;
/// Shares of that margin: below the first a guest without autodeflate is short, and is not to wait for its use to be averaged; below
/// the second it is looked at more often. At the margin itself are all guests of a host that is full.
const SHORT: f64 = 0.5;
const TIGHT: f64 = 2.0;
