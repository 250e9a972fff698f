//! One turn of collecting: host, VMs, pressure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::task::JoinHandle;
use uuid::Uuid;
use virt::domain::Domain;
use virt::sys;

use super::host::Host;
use super::meter::Meter;
use super::reading::{GROUPS, Reading};
use super::sample::{HostSample, VmSample};
use crate::libvirt::error::HypervisorError;
use crate::libvirt::hypervisor::{Hypervisor, failed};
use crate::libvirt::raw::Records;
use crate::libvirt::vm::VmId;
use crate::libvirt::xml::{child, parse};
use crate::pressure::Groups;

/// New VMs whose definitions are looked at in one go; more wait for the next.
const NEW_AT_ONCE: usize = 8;

/// A guest whose balloon has no autodeflate is asked at least so often.
const UNSAVED: Duration = Duration::from_secs(1);

/// How to collect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectConfig {
    /// How often a guest whose definition says nothing of it is asked for its memory; one whose balloon has no autodeflate is asked every
    /// second. Default 2 s; libvirt counts in whole seconds.
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
    periods: Arc<Mutex<Periods>>,
    /// Looks at new VMs beside the turns: changing a period waits for a busy hypervisor.
    meeting: Option<JoinHandle<()>>,
}

/// How often the guest of a running instance is asked for its memory; `None`: never.
type Periods = HashMap<(Uuid, u32), Option<Duration>>;

impl Collector {
    pub fn new(hypervisor: Hypervisor, config: CollectConfig) -> Self {
        let (host, meter) = (Host::default(), Meter::default());
        Self { hypervisor, config, host, meter, groups: Groups::default(), periods: Arc::default(), meeting: None }
    }

    /// Takes one turn. A libvirt that does not answer costs `patience` and the VMs' part.
    ///
    /// Needs a tokio runtime with time.
    pub async fn turn(&mut self) -> Turn {
        let readings = self.hypervisor.readings(self.config.patience).await;
        let (at, at_us) = (Instant::now(), now_us());
        let host = self.host.turn(at, at_us);
        let readings = match readings {
            Ok(readings) => readings,
            Err(e) => return Turn { host, vms: Err(e) },
        };
        let mut vms = self.meter.turn(at, at_us, readings);
        self.meet_new(&vms);
        let periods = self.periods.lock();
        for vm in &mut vms {
            vm.memory.period = periods.get(&(vm.vm.uuid, vm.instance)).copied().flatten();
            vm.pressure = self.groups.pressure(vm.vm.uuid, &vm.vm.name, vm.instance, at);
        }
        drop(periods);
        self.groups.forget_unseen();
        Turn { host, vms: Ok(vms) }
    }

    /// Finds out how often new VMs' guests are asked for their memory, and has those asked that never are.
    fn meet_new(&mut self, vms: &[VmSample]) {
        let running: HashSet<_> = vms.iter().map(|vm| (vm.vm.uuid, vm.instance)).collect();
        let mut periods = self.periods.lock();
        periods.retain(|key, _| running.contains(key));
        if self.meeting.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let new: Vec<_> = running.into_iter().filter(|key| !periods.contains_key(key)).take(NEW_AT_ONCE).collect();
        drop(periods);
        if new.is_empty() {
            return;
        }
        let (hypervisor, config, periods) = (self.hypervisor.clone(), self.config.clone(), self.periods.clone());
        self.meeting = Some(tokio::spawn(async move {
            for (uuid, instance) in new {
                let wanted = config.period;
                let work = move |domain: &Domain| Ok(stats_period(domain, uuid, wanted));
                match hypervisor.beside("look at a new VM", &uuid.to_string(), config.patience, work).await {
                    Ok(period) => {
                        periods.lock().insert((uuid, instance), period);
                    }
                    // It is still unknown, so its turn comes again.
                    Err(e) => tracing::debug!(vm = %uuid, error = %e, "a new VM is looked at later"),
                }
            }
        }));
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
fn stats_period(domain: &Domain, uuid: Uuid, wanted: Duration) -> Option<Duration> {
    let xml = domain.get_xml_desc(0).ok()?;
    let document = parse(&xml).ok()?;
    let balloon = child(child(document.root_element(), "devices")?, "memballoon")?;
    if balloon.attribute("model") == Some("none") {
        return None;
    }
    if let Some(set) = period_of(balloon) {
        return Some(set);
    }
    // A balloon that does not give back by itself: what its guest lacks must be seen in time.
    let wanted = if balloon.attribute("autodeflate") == Some("on") { wanted } else { wanted.min(UNSAVED) };
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
