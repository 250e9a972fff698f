//! The asynchronous handle to libvirt.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use tokio::sync::{broadcast, oneshot, watch};
use uuid::Uuid;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::storage_pool::StoragePool;
use virt::storage_vol::StorageVol;
use virt::sys;

use super::act::Acting;
use super::describe::describe;
use super::error::{HypervisorError, PlanError};
use super::link::{Link, no_nul, start_event_loop};
use super::plan::{AttachOptions, AttachPlan, DetachPlan, plan_attach, plan_detach};
use super::queue::{Call, Queue};
use super::store::StoreSource;
use super::vm::{ConnectionState, HypervisorEvent, Vm, VmId, VmState};
use super::worker::{Outlets, Worker};
use super::xml::{canonical, parse, same};
use crate::memory::{MemoryError, Region, layout};

/// Callers that wait for the thread. More means that libvirt does not keep up, and callers are told so.
const MAX_WAITING: usize = 64;
/// Events kept for a slow receiver.
const MAX_EVENTS: usize = 1024;
/// Starts and stops may take long, so each runs beside the worker; this many at once.
const MAX_SLOW_CALLS: usize = 16;
/// The definition as it will be at the next start, with passwords: without them a redefinition would lose them.
const XML_NEXT: sys::virDomainXMLFlags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;

/// How to reach libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HypervisorConfig {
    /// A libvirt URI. Default `qemu:///system`.
    pub uri: String,
    /// How long a caller waits for an answer. Default 20 s, longer than the keep-alive needs to find a dead libvirtd.
    pub call_timeout: Duration,
    /// How long a caller waits for a VM to start or to be destroyed. Default 120 s: huge pages take long to clear.
    pub start_timeout: Duration,
    /// Seconds between keep-alive probes. Default 5.
    pub keep_alive_interval_secs: u16,
    /// Unanswered probes after which the connection counts as dead. Default 3.
    pub keep_alive_count: u16,
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            call_timeout: Duration::from_secs(20),
            start_timeout: Duration::from_secs(120),
            keep_alive_interval_secs: 5,
            keep_alive_count: 3,
        }
    }
}

/// When a change of a definition is felt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TakesEffect {
    /// The VM is shut off: whenever it starts.
    Now,
    /// The VM runs on its old definition until it is shut down and started. A reboot inside the guest is not enough.
    NextStart,
}

/// A disk was attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub vm: VmId,
    pub takes_effect: TakesEffect,
    pub plan: AttachPlan,
}

/// A disk was detached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detached {
    pub vm: VmId,
    /// With `NextStart` the running VM may still use the export: serve it until the VM stops.
    pub takes_effect: TakesEffect,
    pub plan: DetachPlan,
}

/// A handle to libvirt; clones share one connection. With the last one the connection closes.
#[derive(Debug, Clone)]
pub struct Hypervisor {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: HypervisorConfig,
    queue: Arc<Queue>,
    outlets: Arc<Outlets>,
    slow_calls: Arc<AtomicUsize>,
    acting: Acting,
}

impl Hypervisor {
    /// Starts the threads; the connection is made and kept by them. Does not wait for it: an unreachable libvirt is no
    /// error here, calls then return [`HypervisorError::Unreachable`] until it is there.
    ///
    /// # Errors
    /// [`HypervisorError::Thread`] if a thread or libvirt's event loop can't be started.
    pub fn start(config: HypervisorConfig) -> Result<Self, HypervisorError> {
        start_event_loop().map_err(|reason| HypervisorError::Thread { reason })?;
        if !no_nul(&config.uri) {
            let reason = "the URI has a NUL character".to_owned();
            return Err(HypervisorError::Unreachable { uri: config.uri.replace('\0', "?"), reason });
        }
        let queue = Arc::new(Queue::new(MAX_WAITING));
        let state = ConnectionState {
            uri: config.uri.clone(),
            connected: false,
            since: SystemTime::now(),
            last_error: None,
            reconnects: 0,
            libvirt_version: None,
        };
        let outlets =
            Arc::new(Outlets { events: broadcast::Sender::new(MAX_EVENTS), state: watch::Sender::new(state) });
        let worker = Worker::new(config.clone(), outlets.clone(), queue.clone());
        thread::Builder::new()
            .name("libvirt".into())
            .spawn(move || worker.run())
            .map_err(|e| HypervisorError::Thread { reason: e.to_string() })?;
        let slow_calls = Arc::default();
        Ok(Self { inner: Arc::new(Inner { config, queue, outlets, slow_calls, acting: Acting::default() }) })
    }

    /// Events from now on. After every (re)connection a [`HypervisorEvent::Resync`] says how things are.
    pub fn events(&self) -> broadcast::Receiver<HypervisorEvent> {
        self.inner.outlets.events.subscribe()
    }

    /// The state of the connection, to look at or to wait on.
    pub fn state(&self) -> watch::Receiver<ConnectionState> {
        self.inner.outlets.state.subscribe()
    }

    /// All VMs, running or not.
    ///
    /// # Errors
    /// `Unreachable`, `Timeout`, `Busy`, `Libvirt`.
    pub async fn list(&self) -> Result<Vec<Vm>, HypervisorError> {
        self.call("list the VMs", true, |link| list_vms(link)).await
    }

    /// The VM with this name or UUID.
    ///
    /// # Errors
    /// `NoSuchVm`, and those of [`list`](Self::list).
    pub async fn get(&self, vm: &str) -> Result<Vm, HypervisorError> {
        let vm = vm.to_owned();
        self.call("look at the VM", true, move |link| describe_domain(&find(link, &vm)?)).await
    }

    /// Where the running VM's memory lies in its process, see [`crate::memory::layout`]. libvirt marks a VM whose monitor was
    /// asked as tainted (`custom-monitor`), once.
    ///
    /// # Errors
    /// `NoSuchVm`, `NotRunning` by libvirt, and those of [`list`](Self::list); [`MemoryError::Layout`] within.
    pub async fn memory_layout(&self, vm: &str) -> Result<Result<Vec<Region>, MemoryError>, HypervisorError> {
        let vm = vm.to_owned();
        self.call("ask where the VM's memory lies", true, move |link| {
            let [mtree, ramblock] = memory_texts(&find(link, &vm)?)?;
            Ok(layout::regions(&mtree, &ramblock))
        })
        .await
    }

    /// What [`attach`](Self::attach) would do, without doing it: tells the store to serve before the socket is used.
    ///
    /// # Errors
    /// Those of [`attach`](Self::attach).
    pub async fn preview(
        &self,
        vm: &str,
        target: &str,
        socket: &Path,
        options: &AttachOptions,
    ) -> Result<AttachPlan, HypervisorError> {
        let (vm, target, socket, options) = (vm.to_owned(), target.to_owned(), socket.to_owned(), options.clone());
        self.call("plan the attachment", true, move |link| {
            let domain = find(link, &vm)?;
            plan_on(link, &domain, &target, &socket, &options).map(|(_, plan)| plan)
        })
        .await
    }

    /// Points the VM's disk `target` at the export on `socket`, in the persistent definition. A running VM goes on as it
    /// is until its next start.
    ///
    /// # Errors
    /// `NoSuchVm`, `TransientVm`, `ManagedSave`, `Plan` with the reason, `Refused` or `NotTaken` by libvirt, and those of
    /// [`list`](Self::list).
    pub async fn attach(
        &self,
        vm: &str,
        target: &str,
        socket: &Path,
        options: &AttachOptions,
    ) -> Result<Attached, HypervisorError> {
        let (vm, target, socket, options) = (vm.to_owned(), target.to_owned(), socket.to_owned(), options.clone());
        self.call("attach the disk", false, move |link| attach_on(link, &find(link, &vm)?, &target, &socket, &options))
            .await
    }

    /// Puts the VM's disk `target` back to what it was before it was attached.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub async fn detach(&self, vm: &str, target: &str) -> Result<Detached, HypervisorError> {
        let (vm, target) = (vm.to_owned(), target.to_owned());
        self.call("detach the disk", false, move |link| detach_on(link, &find(link, &vm)?, &target)).await
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// `NoSuchVm`, `Libvirt` with libvirt's reason, and those of [`list`](Self::list).
    pub async fn start_vm(&self, vm: &str) -> Result<(), HypervisorError> {
        self.slow("start the VM", vm, |domain| domain.create().map(drop)).await
    }

    /// Asks the guest to shut down; returns when it has been asked.
    ///
    /// # Errors
    /// As [`start_vm`](Self::start_vm).
    pub async fn shutdown_vm(&self, vm: &str) -> Result<(), HypervisorError> {
        self.slow("shut the VM down", vm, |domain| domain.shutdown().map(drop)).await
    }

    /// Ends a VM at once, as pulling the plug.
    ///
    /// # Errors
    /// As [`start_vm`](Self::start_vm).
    pub async fn destroy_vm(&self, vm: &str) -> Result<(), HypervisorError> {
        self.slow("destroy the VM", vm, Domain::destroy).await
    }

    /// The VMs that a change is under way on.
    pub(super) fn acting(&self) -> &Acting {
        &self.inner.acting
    }

    /// Runs `work` on the worker thread and waits for its result. With `again`, work that failed because the connection
    /// was lost runs once more on a new one: for calls that change nothing.
    async fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        again: bool,
        work: impl FnMut(&Arc<Link>) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        self.call_within(what, self.inner.config.call_timeout, again, work).await
    }

    /// [`call`](Self::call) with a time limit of its own.
    pub(super) async fn call_within<T: Send + 'static>(
        &self,
        what: &'static str,
        limit: Duration,
        again: bool,
        work: impl FnMut(&Arc<Link>) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let (reply, answer) = oneshot::channel();
        self.inner.queue.submit(Box::new(Call { reply: Some(reply), again, work }))?;
        wait(what, limit, answer).await
    }

    /// Runs a call on a VM that may take long.
    async fn slow(
        &self,
        what: &'static str,
        vm: &str,
        work: fn(&Domain) -> Result<(), Error>,
    ) -> Result<(), HypervisorError> {
        let name = vm.to_owned();
        let work = move |domain: &Domain| work(domain).map_err(|e| failed(&format!("{what} `{name}`"), &e));
        self.beside(what, vm, self.inner.config.start_timeout, work).await
    }

    /// Runs work on a VM on a thread of its own, so that others need not wait for it. Past the limit it runs on, and counts
    /// among the slow calls until it ends.
    pub(super) async fn beside<T: Send + 'static>(
        &self,
        what: &'static str,
        vm: &str,
        limit: Duration,
        work: impl FnOnce(&Domain) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let name = vm.to_owned();
        self.aside(what, limit, move |link| find(link, &name), work).await
    }

    /// [`beside`](Self::beside) for work on what `prepare`, on the worker thread, makes of the connection.
    pub(super) async fn aside<P: Send + 'static, T: Send + 'static>(
        &self,
        what: &'static str,
        limit: Duration,
        mut prepare: impl FnMut(&Arc<Link>) -> Result<P, HypervisorError> + Send + 'static,
        work: impl FnOnce(&P) -> Result<T, HypervisorError> + Send + 'static,
    ) -> Result<T, HypervisorError> {
        let permit = SlowCall::take(&self.inner.slow_calls)?;
        let prepared = self.call(what, true, move |link| Ok((prepare(link)?, link.clone()))).await?;
        let (reply, answer) = oneshot::channel();
        let run = move || {
            let (on, link) = prepared;
            let result = work(&on);
            drop(on);
            drop(link); // after the domain: the connection closes with its last user
            drop(permit);
            let _ = reply.send(result);
        };
        thread::Builder::new()
            .name("libvirt-call".into())
            .spawn(run)
            .map_err(|e| HypervisorError::Thread { reason: e.to_string() })?;
        wait(what, limit, answer).await
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// One of the slow calls allowed at once.
struct SlowCall(Arc<AtomicUsize>);

impl SlowCall {
    fn take(count: &Arc<AtomicUsize>) -> Result<Self, HypervisorError> {
        let taken = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < MAX_SLOW_CALLS).then_some(n + 1));
        taken.map(|_| Self(count.clone())).map_err(|_| HypervisorError::Busy)
    }
}

impl Drop for SlowCall {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn wait<T>(
    what: &'static str,
    limit: Duration,
    answer: oneshot::Receiver<Result<T, HypervisorError>>,
) -> Result<T, HypervisorError> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(ended()),
        Err(_) => Err(HypervisorError::Timeout { what, after: limit }),
    }
}

fn ended() -> HypervisorError {
    HypervisorError::Thread { reason: "it ended unexpectedly; restart the daemon".to_owned() }
}

pub(super) fn failed(what: &str, error: &Error) -> HypervisorError {
    HypervisorError::Libvirt { what: what.to_owned(), reason: error.message().to_owned() }
}

pub(super) fn is_gone(error: &Error) -> bool {
    error.code() == ErrorNumber::NoDomain
}

/// The domain with this name or, failing that, UUID.
fn find(link: &Link, vm: &str) -> Result<Domain, HypervisorError> {
    let none = || HypervisorError::NoSuchVm { vm: vm.replace('\0', "?") };
    if vm.is_empty() || !no_nul(vm) {
        return Err(none());
    }
    let error = |e: Error| if is_gone(&e) { none() } else { failed("look up the VM", &e) };
    match (Domain::lookup_by_name(link.connect(), vm), Uuid::parse_str(vm)) {
        (Err(e), Ok(uuid)) if is_gone(&e) => Domain::lookup_by_uuid(link.connect(), uuid).map_err(error),
        (found, _) => found.map_err(error),
    }
}

/// What QEMU's monitor prints of a running VM's memory ([`layout::COMMANDS`]).
pub(super) fn memory_texts(domain: &Domain) -> Result<[String; 2], HypervisorError> {
    let ask = |command| {
        let hmp = sys::VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP;
        domain.qemu_monitor_command(command, hmp).map_err(|e| failed("ask QEMU's monitor", &e))
    };
    let [mtree, ramblock] = layout::COMMANDS;
    Ok([ask(mtree)?, ask(ramblock)?])
}

pub(super) fn id_of(domain: &Domain) -> Result<VmId, HypervisorError> {
    let name = domain.get_name().map_err(|e| failed("read the VM's name", &e))?;
    let uuid = domain.get_uuid().map_err(|e| failed("read the VM's UUID", &e))?;
    Ok(VmId { uuid, name })
}

pub(super) fn state_of(state: sys::virDomainState) -> VmState {
    match state {
        sys::VIR_DOMAIN_RUNNING => VmState::Running,
        sys::VIR_DOMAIN_BLOCKED => VmState::Blocked,
        sys::VIR_DOMAIN_PAUSED => VmState::Paused,
        sys::VIR_DOMAIN_SHUTDOWN => VmState::ShuttingDown,
        sys::VIR_DOMAIN_SHUTOFF => VmState::ShutOff,
        sys::VIR_DOMAIN_CRASHED => VmState::Crashed,
        sys::VIR_DOMAIN_PMSUSPENDED => VmState::PmSuspended,
        _ => VmState::Unknown,
    }
}

/// All VMs. One that vanishes meanwhile or can't be described is left out: it must not hide all others.
pub(super) fn list_vms(link: &Link) -> Result<Vec<Vm>, HypervisorError> {
    let domains = link.connect().list_all_domains(0).map_err(|e| failed("list the VMs", &e))?;
    let mut vms = Vec::with_capacity(domains.len());
    for domain in &domains {
        match describe_domain(domain) {
            Ok(vm) => vms.push(vm),
            Err(HypervisorError::NoSuchVm { .. }) => {}
            Err(e) if link.is_alive() => tracing::warn!(error = %e, "a VM is left out of the list"),
            Err(e) => return Err(e),
        }
    }
    vms.sort_by(|a, b| a.id.name.cmp(&b.id.name));
    Ok(vms)
}

fn describe_domain(domain: &Domain) -> Result<Vm, HypervisorError> {
    let id = id_of(domain)?;
    let error = |e: Error| match is_gone(&e) {
        true => HypervisorError::NoSuchVm { vm: id.name.clone() },
        false => failed(&format!("describe VM `{}`", id.name), &e),
    };
    let info = domain.get_info().map_err(error)?;
    let persistent = domain.is_persistent().map_err(error)?;
    let running = domain.is_active().map_err(error)?;
    let running_xml = if running { Some(domain.get_xml_desc(0).map_err(error)?) } else { None };
    let next_xml = if persistent { Some(domain.get_xml_desc(XML_NEXT).map_err(error)?) } else { None };
    let described = describe(running_xml.as_deref(), next_xml.as_deref())
        .map_err(|plan| HypervisorError::Plan { vm: id.name.clone(), plan })?;
    Ok(Vm {
        state: state_of(info.state),
        instance: if running { domain.get_id() } else { None },
        persistent,
        disks: described.disks,
        shared_memory: described.shared_memory,
        clone_of: described.clone_of,
        vcpus: info.nr_virt_cpu,
        memory_bytes: info.max_mem.saturating_mul(1024),
        id,
    })
}

/// A volume's path, for pools whose volumes are files or devices of this host.
fn resolve_volume(link: &Link, pool: &str, volume: &str) -> Result<StoreSource, String> {
    if !no_nul(pool) || !no_nul(volume) {
        return Err("the name has a NUL character".to_owned());
    }
    let said = |e: Error| e.message().to_owned();
    let pool = StoragePool::lookup_by_name(link.connect(), pool).map_err(said)?;
    if !pool.is_active().map_err(said)? {
        return Err("the pool is not active; start it with `virsh pool-start`".to_owned());
    }
    let volume = StorageVol::lookup_by_name(&pool, volume).map_err(said)?;
    let xml = volume.get_xml_desc(0).map_err(said)?;
    let path = volume.get_path().map_err(said)?;
    let doc = roxmltree::Document::parse(&xml).map_err(|e| e.to_string())?;
    let kind = doc.root_element().attribute("type").unwrap_or("file");
    StoreSource::path(kind, &path)
        .filter(|_| path.starts_with('/'))
        .ok_or_else(|| format!("volumes of type {kind} are no files or devices of this host"))
}

/// The definition of the next start and the attachment's plan on it.
fn plan_on(
    link: &Link,
    domain: &Domain,
    target: &str,
    socket: &Path,
    options: &AttachOptions,
) -> Result<(String, AttachPlan), HypervisorError> {
    let vm = id_of(domain)?.name;
    let xml = editable(domain, &vm)?;
    let volumes = |pool: &str, volume: &str| resolve_volume(link, pool, volume);
    let plan = plan_attach(&xml, target, socket, options, &volumes)
        .map_err(|plan| HypervisorError::Plan { vm: vm.clone(), plan })?;
    Ok((xml, plan))
}

/// The definition to edit, if there is one that the next start will follow.
fn editable(domain: &Domain, vm: &str) -> Result<String, HypervisorError> {
    let error = |e: Error| failed(&format!("read the definition of VM `{vm}`"), &e);
    if !domain.is_persistent().map_err(error)? {
        return Err(HypervisorError::TransientVm { vm: vm.to_owned() });
    }
    // Drivers without saved states answer with an error.
    if domain.has_managed_save(0).unwrap_or(false) {
        return Err(HypervisorError::ManagedSave { vm: vm.to_owned() });
    }
    domain.get_xml_desc(XML_NEXT).map_err(error)
}

fn takes_effect(domain: &Domain) -> TakesEffect {
    if domain.is_active().unwrap_or(true) { TakesEffect::NextStart } else { TakesEffect::Now }
}

fn attach_on(
    link: &Link,
    domain: &Domain,
    target: &str,
    socket: &Path,
    options: &AttachOptions,
) -> Result<Attached, HypervisorError> {
    let vm = id_of(domain)?;
    let (before, plan) = plan_on(link, domain, target, socket, options)?;
    redefine(link, domain, &vm.name, &before, &plan.new_xml, |now| {
        let described = describe(None, Some(now)).map_err(|e| e.to_string())?;
        let disk = described.disks.iter().find(|d| d.target == target).ok_or("the disk is gone")?;
        let attached = disk.attached.as_ref().ok_or("the disk is not on the export, or its record is gone")?;
        let recorded = plan_detach(now, target).map_err(|e| e.to_string())?.original;
        if attached.socket != *socket {
            return Err(format!("the disk is on {}", attached.socket.display()));
        }
        if recorded.as_ref() != Some(&plan.original) {
            return Err("the recorded original differs".to_owned());
        }
        if !described.shared_memory {
            return Err("its memory is not shared".to_owned());
        }
        Ok(())
    })?;
    tracing::info!(vm = vm.name, disk = target, socket = %socket.display(), store = %plan.store, "disk attached");
    Ok(Attached { takes_effect: takes_effect(domain), vm, plan })
}

fn detach_on(link: &Link, domain: &Domain, target: &str) -> Result<Detached, HypervisorError> {
    let vm = id_of(domain)?;
    let before = editable(domain, &vm.name)?;
    let plan = plan_detach(&before, target).map_err(|plan| HypervisorError::Plan { vm: vm.name.clone(), plan })?;
    redefine(link, domain, &vm.name, &before, &plan.new_xml, |now| {
        match plan_detach(now, target) {
            Err(PlanError::NotAttached { .. } | PlanError::NoSuchDisk { .. }) => {}
            Ok(_) => return Err("the disk is still attached".to_owned()),
            Err(e) => return Err(e.to_string()),
        }
        match &plan.original {
            Some(original) if !has_disk(now, target, original) => Err("the disk is not as it was".to_owned()),
            _ => Ok(()),
        }
    })?;
    tracing::info!(vm = vm.name, disk = target, "disk detached");
    Ok(Detached { takes_effect: takes_effect(domain), vm, plan })
}

/// Whether the domain has this very disk element, but for spelling.
fn has_disk(xml: &str, target: &str, original: &str) -> bool {
    let Ok(doc) = parse(xml) else { return false };
    super::disk::Disk::find(doc.root_element(), target).is_ok_and(|d| same(&xml[d.node.range()], original))
}

/// Replaces a definition, reads it back and checks it; what does not pass is rolled back.
fn redefine(
    link: &Link,
    domain: &Domain,
    vm: &str,
    before: &str,
    after: &str,
    check: impl Fn(&str) -> Result<(), String>,
) -> Result<(), HypervisorError> {
    let define = |xml: &str| Domain::define_xml_flags(link.connect(), xml, sys::VIR_DOMAIN_DEFINE_VALIDATE);
    if !same_definition(domain, before) {
        let reason = "someone else changed the definition meanwhile; try again".to_owned();
        return Err(HypervisorError::Refused { vm: vm.to_owned(), reason });
    }
    if !no_nul(after) {
        return Err(HypervisorError::Refused { vm: vm.to_owned(), reason: "it has a NUL character".to_owned() });
    }
    define(after)
        .map_err(|e| HypervisorError::Refused { vm: vm.to_owned(), reason: e.message().trim_end().to_owned() })?;
    let now = domain.get_xml_desc(XML_NEXT).map_err(|e| failed(&format!("read VM `{vm}` back"), &e))?;
    let Err(found) = check(&now) else { return Ok(()) };
    let rollback = match define(before) {
        Ok(_) => "the old definition was put back".to_owned(),
        Err(e) => format!("putting the old definition back failed too: {}", e.message()),
    };
    Err(HypervisorError::NotTaken { vm: vm.to_owned(), found, rollback })
}

fn same_definition(domain: &Domain, before: &str) -> bool {
    let Ok(now) = domain.get_xml_desc(XML_NEXT) else { return false };
    now == before
        || matches!((parse(&now), parse(before)), (Ok(a), Ok(b)) if canonical(a.root_element()) == canonical(b.root_element()))
}
