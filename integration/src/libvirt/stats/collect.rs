//! One turn of collecting: host, VMs, pressure.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use virt::domain::Domain;
use virt::sys;

use super::host::Host;
use super::meter::Meter;
use super::reading::{GROUPS, Reading};
use super::sample::{HostSample, VmSample};
use crate::libvirt::error::HypervisorError;
use crate::libvirt::hypervisor::{Hypervisor, failed};
use crate::libvirt::link::Link;
use crate::libvirt::raw::Records;
use crate::libvirt::vm::VmId;
use crate::libvirt::xml::{child, parse};
use crate::pressure::Groups;

/// New VMs whose definitions are looked at in one turn; more wait for the next.
const NEW_A_TURN: usize = 8;

/// How to collect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectConfig {
    /// How often a guest whose definition says nothing of it is asked for its memory. Default 2 s; libvirt counts in whole
    /// seconds.
    pub period: Duration,
    /// How long libvirt may take for a turn. Default 5 s; a turn that takes longer gives the host's figures alone.
    pub patience: Duration,
}

impl Default for CollectConfig {
    fn default() -> Self {
        Self { period: Duration::from_secs(2), patience: Duration::from_secs(5) }
    }
}

/// What one turn found.
#[derive(Debug)]
pub struct Turn {
    pub host: HostSample,
    /// All running VMs, or why libvirt gave none.
    pub vms: Result<Vec<VmSample>, HypervisorError>,
}

/// Collects, a turn at a time. The caller keeps the beat; a second is what it is made for.
#[derive(Debug)]
pub struct Collector {
    hypervisor: Hypervisor,
    config: CollectConfig,
    host: Host,
    meter: Meter,
    groups: Groups,
    /// How often the guest of a running instance is asked for its memory; `None`: never.
    periods: HashMap<(Uuid, u32), Option<Duration>>,
}

impl Collector {
    pub fn new(hypervisor: Hypervisor, config: CollectConfig) -> Self {
        let (host, meter) = (Host::default(), Meter::default());
        Self { hypervisor, config, host, meter, groups: Groups::default(), periods: HashMap::new() }
    }

    /// Takes one turn. A libvirt that does not answer costs `patience` and the VMs' part; nothing runs on.
    pub async fn turn(&mut self) -> Turn {
        let readings = self.hypervisor.readings(self.config.patience).await;
        let (at, at_us) = (Instant::now(), now_us());
        let host = self.host.turn(at, at_us);
        let readings = match readings {
            Ok(readings) => readings,
            Err(e) => return Turn { host, vms: Err(e) },
        };
        let mut vms = self.meter.turn(at, at_us, readings);
        self.meet_new(&vms).await;
        for vm in &mut vms {
            vm.memory.period = self.periods.get(&(vm.vm.uuid, vm.instance)).copied().flatten();
            vm.pressure = self.groups.pressure(vm.vm.uuid, &vm.vm.name, vm.instance, at);
        }
        self.groups.forget_unseen();
        Turn { host, vms: Ok(vms) }
    }

    /// Finds out how often new VMs' guests are asked for their memory, and has those asked that never are.
    async fn meet_new(&mut self, vms: &[VmSample]) {
        let running: HashSet<_> = vms.iter().map(|vm| (vm.vm.uuid, vm.instance)).collect();
        self.periods.retain(|key, _| running.contains(key));
        let mut unknown = running;
        unknown.retain(|key| !self.periods.contains_key(key));
        let met: Vec<_> = unknown.into_iter().take(NEW_A_TURN).collect();
        if met.is_empty() {
            return;
        }
        let period = self.config.period;
        let asked = met.clone();
        let known = self.hypervisor.call_within("look at new VMs", self.config.patience, true, move |link| {
            Ok(asked.iter().map(|&(uuid, _)| stats_period(link, uuid, period)).collect::<Vec<_>>())
        });
        match known.await {
            Ok(periods) => self.periods.extend(met.into_iter().zip(periods)),
            Err(e) => tracing::debug!(error = %e, "new VMs are looked at later"),
        }
    }
}

impl Hypervisor {
    /// Counters and levels of all running VMs with the number of their instance, in one call to libvirt.
    ///
    /// # Errors
    /// `Unreachable`, `Timeout`, `Busy`, `Libvirt`.
    pub async fn readings(&self, patience: Duration) -> Result<Vec<(VmId, u32, Reading)>, HypervisorError> {
        self.call_within("measure the VMs", patience, true, |link| {
            let records = Records::of_running(link, GROUPS).map_err(|e| failed("measure the VMs", &e))?;
            let read = records.iter().filter_map(|record| {
                let mut reading = Reading::default();
                for (name, value) in record.parameters() {
                    reading.take(name, value);
                }
                Some((record.vm()?, record.instance()?, reading))
            });
            Ok(read.collect())
        })
        .await
    }
}

/// How often the guest is asked for its memory, set to `wanted` where it never is and has a balloon that can tell.
fn stats_period(link: &Link, uuid: Uuid, wanted: Duration) -> Option<Duration> {
    let domain = Domain::lookup_by_uuid(link.connect(), uuid).ok()?;
    let xml = domain.get_xml_desc(0).ok()?;
    let document = parse(&xml).ok()?;
    let balloon = child(child(document.root_element(), "devices")?, "memballoon")?;
    if balloon.attribute("model") == Some("none") {
        return None;
    }
    if let Some(set) = period_of(balloon) {
        return Some(set);
    }
    let seconds = wanted.as_secs().clamp(1, 3600);
    match domain.set_memory_stats_period(i32::try_from(seconds).ok()?, sys::VIR_DOMAIN_MEM_LIVE) {
        Ok(_) => Some(Duration::from_secs(seconds)),
        Err(e) => {
            tracing::info!(vm = %uuid, error = e.message(), "the guest can't be asked for its memory");
            None
        }
    }
}

/// `<stats period='5'/>` of a `<memballoon>`; `None` where there is none.
pub(in crate::libvirt) fn period_of(balloon: roxmltree::Node<'_, '_>) -> Option<Duration> {
    let seconds: u64 = child(balloon, "stats")?.attribute("period")?.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// µs since 1970.
pub(in crate::libvirt) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_micros().try_into().unwrap_or(u64::MAX)
}
