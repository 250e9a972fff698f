//! Machines saved as templates, and clones started from them (the template's files: [`memory::template`](crate::memory::template)).
//!
//! - `definition.rs`: what can be a template, and the definition of a clone
//! - `monitor.rs`: QEMU's monitor
//! - this file: the two ways through libvirt, and what a crash leaves of them
//!
//! **Saving**: mark the machine, stop its processors, have QEMU write its state with `mapped-ram` to a file that it is given a
//! descriptor of, go on. Whatever fails, the machine goes on; after a crash of this process the mark says so ([`Hypervisor::recover_templates`]).
//!
//! **Starting**: a transient domain whose memory is overridden, created paused and marked; its QEMU waits for a state
//! (`-incoming defer`), gets the file, loads the devices, and goes on. It is transient because its definition is of use once only.
//! libvirt itself can restore a machine too, but copies its memory for each.

mod definition;
mod monitor;

use std::fs::File;
use std::time::{Duration, Instant};

use uuid::Uuid;
use virt::domain::Domain;
use virt::sys;

use definition::{STARTING, check, interfaces, mark};
pub use definition::{Unfit, clone_definition};
use monitor::Monitor;

use super::error::HypervisorError;
use super::hypervisor::{Hypervisor, failed, id_of, is_gone, memory_texts, state_of};
use super::link::{Link, no_nul};
use super::vm::{VmId, VmState};
use crate::memory::template::record::Place;
use crate::memory::{MemoryError, layout, process};
use crate::processes::Processes;

/// The namespace of what is noted in a machine's metadata. The number is the format's version.
pub const TEMPLATE_NAMESPACE: &str = "https://prestage.dev/xmlns/template/1";

/// What a machine is marked with while it is saved, and a clone once it runs.
const SAVING: &str = "saving";
const CLONE: &str = "clone";
/// What stands in the place of the template where the machine was paused before, and is to stay so.
const PAUSED: &str = "paused";
/// As good as no limit: QEMU's own is that of a network.
const BANDWIDTH: u64 = 1 << 40;

/// A running machine that can be saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Savable {
    pub vm: VmId,
    /// The group QEMU runs as, where libvirt tells: clones' QEMUs must read the template.
    pub group: Option<u32>,
}

/// What a machine's state was saved of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedState {
    pub vm: VmId,
    /// The definition at that time, with secrets.
    pub definition: String,
    pub machine_type: String,
    pub qemu_version: String,
    /// The name of the machine's memory in the state.
    pub memory: String,
    /// How long its processors stood still.
    pub stood: Duration,
}

/// A clone that runs, and what its start took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cloned {
    pub vm: VmId,
    /// Until QEMU stood there, paused.
    pub created: Duration,
    /// Until it had loaded the devices too.
    pub loaded: Duration,
    /// Until its processors ran.
    pub resumed: Duration,
    /// It has network interfaces, which are unplugged.
    pub unplugged: usize,
}

/// A clone that has its devices and does not run yet.
#[derive(Debug)]
pub struct Ready<'a> {
    domain: &'a Domain,
    pub vm: &'a VmId,
}

impl Ready<'_> {
    /// Where the block of memory with this name lies in the clone's QEMU.
    ///
    /// # Errors
    /// `Layout`: QEMU's monitor does not tell, or its process is not found.
    pub fn place(&self, memory: &str) -> Result<Place, MemoryError> {
        let [mtree, ramblock] = memory_texts(self.domain).map_err(|error| MemoryError::Layout(error.to_string()))?;
        let (start, bytes) = layout::block(&ramblock, memory)?;
        let regions = layout::regions(&mtree, &ramblock)?;
        let pid = Processes::default().pid(self.vm.uuid, &self.vm.name, Instant::now());
        let process = pid.and_then(|pid| process::identify(pid).ok());
        let process = process.ok_or_else(|| MemoryError::Layout("its QEMU process is not found".to_owned()))?;
        Ok(Place::new(process, regions, start, bytes))
    }
}

impl Hypervisor {
    /// Whether a machine can be saved as a template, without touching it.
    ///
    /// # Errors
    /// `Unfit` with the reason; `NoSuchVm`, `Unreachable`, `Timeout`, `Busy`, `Libvirt`.
    pub async fn savable(&self, vm: &str) -> Result<Savable, HypervisorError> {
        let work = |domain: &Domain| {
            let vm = id_of(domain)?;
            let (_, machine) = running(domain, &vm)?;
            Ok(Savable { vm, group: machine.group })
        };
        self.beside("look at the VM", vm, Duration::from_secs(20), work).await
    }

    /// Saves the state of a running machine to a file open for writing alone, and has it go on: also where that fails. A caller
    /// that gives up leaves it running.
    ///
    /// # Errors
    /// As [`savable`](Self::savable), and `Qemu` with its reason.
    pub async fn save_state(&self, vm: Uuid, file: File, limit: Duration) -> Result<SavedState, HypervisorError> {
        let work = move |domain: &Domain| save(domain, &file, limit);
        self.beside("save the VM", &vm.to_string(), limit + Duration::from_secs(30), work).await
    }

    /// Starts a clone by its definition ([`clone_definition`]) and the state of its template, open for reading alone. `ready` is
    /// called before its processors run. Nothing is left where it fails.
    ///
    /// # Errors
    /// `Libvirt` or `Qemu` with their reason; `Unreachable`, `Timeout`, `Busy`.
    pub async fn start_clone(
        &self,
        definition: String,
        state: File,
        limit: Duration,
        ready: impl FnOnce(&Ready<'_>) + Send + 'static,
    ) -> Result<Cloned, HypervisorError> {
        let what = "start the clone";
        let work = move |link: &std::sync::Arc<Link>| start(link, &definition, &state, limit, ready);
        self.aside(what, limit + Duration::from_secs(30), |link| Ok(link.clone()), work).await
    }

    /// Undoes what a crash of this process left half done: machines being saved go on, clones being started end. Those in `busy`
    /// are being worked on. Returns a line for each.
    ///
    /// # Errors
    /// `Unreachable`, `Timeout`, `Busy`, `Libvirt`.
    pub async fn recover_templates(&self, busy: Vec<String>) -> Result<Vec<String>, HypervisorError> {
        let work = move |link: &std::sync::Arc<Link>| recover(link, &busy);
        self.aside("look for unfinished templates", Duration::from_secs(60), |link| Ok(link.clone()), work).await
    }
}

fn read(domain: &Domain, vm: &VmId, flags: u32) -> Result<String, HypervisorError> {
    domain.get_xml_desc(flags).map_err(|e| failed(&format!("read the definition of VM `{vm}`"), &e))
}

/// The state of a running machine and what its definition says.
fn running(domain: &Domain, vm: &VmId) -> Result<(VmState, definition::Machine), HypervisorError> {
    let unfit = |unfit| HypervisorError::Unfit { vm: vm.name.clone(), unfit: Box::new(unfit) };
    let state = domain.get_state().map_err(|e| failed(&format!("read the state of VM `{vm}`"), &e))?.0;
    let state = state_of(state);
    if !matches!(state, VmState::Running | VmState::Blocked | VmState::Paused) {
        return Err(unfit(Unfit::NotRunning));
    }
    Ok((state, check(&read(domain, vm, 0)?).map_err(unfit)?))
}

/// Notes `word` in a running machine's metadata, or nothing.
fn note(domain: &Domain, word: Option<(&str, &str)>) -> Result<(), virt::error::Error> {
    let text = word.map(|(word, template)| mark("", "", word, template));
    domain
        .set_metadata(
            i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or(2),
            text.as_deref(),
            text.as_ref().map(|_| "prestage"),
            Some(TEMPLATE_NAMESPACE),
            sys::VIR_DOMAIN_AFFECT_LIVE,
        )
        .map(drop)
}

/// A machine that is being saved. Dropped, it is as it was.
struct Saving<'a> {
    domain: &'a Domain,
    monitor: Monitor<'a>,
    vm: &'a VmId,
    resume: bool,
    bandwidth: Option<u64>,
    migrating: bool,
}

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        let said = |what: &str, error: &dyn std::fmt::Display| {
            tracing::error!(vm = self.vm.name, %error, "a template's machine is not as it was: could not {what}");
        };
        if self.migrating
            && let Err(error) = self.monitor.break_off()
        {
            said("break off saving", &error);
        }
        undo(self.domain, self.monitor, self.bandwidth, self.resume, &said);
    }
}

/// Has a machine go on as if it had not been saved.
fn undo(
    domain: &Domain,
    monitor: Monitor<'_>,
    bandwidth: Option<u64>,
    resume: bool,
    said: &dyn Fn(&str, &dyn std::fmt::Display),
) {
    // First of all the machine; the rest only matters to its next migration.
    if resume && let Err(error) = domain.resume() {
        return said("resume it; it is tried again when libvirt is there", &error.message());
    }
    let _ = monitor.take_back(); // it may not have it any more
    if let Err(error) = monitor.set_mapped(false) {
        said("reset QEMU's mapped-ram", &error);
    }
    if let Some(Err(error)) = bandwidth.map(|before| monitor.set_bandwidth(before)) {
        said("reset QEMU's bandwidth", &error);
    }
    if let Err(error) = note(domain, None) {
        said("take the note out of its metadata", &error.message());
    }
}

fn save(domain: &Domain, file: &File, limit: Duration) -> Result<SavedState, HypervisorError> {
    let vm = id_of(domain)?;
    let (state, machine) = running(domain, &vm)?;
    let monitor = Monitor::new(domain, &vm.name);
    let qemu_version = monitor.version()?;
    let memory = monitor.memory()?;
    let paused = state == VmState::Paused;
    let was = if paused { PAUSED } else { "" };
    note(domain, Some((SAVING, was))).map_err(|e| failed(&format!("mark VM `{vm}`"), &e))?;
    let mut saving = Saving { domain, monitor, vm: &vm, resume: false, bandwidth: None, migrating: false };
    saving.bandwidth = Some(monitor.set_bandwidth(BANDWIDTH)?);
    monitor.set_mapped(true)?;
    let uri = monitor.give(file)?;
    let stopped = Instant::now();
    if !paused {
        saving.resume = true;
        domain.suspend().map_err(|e| failed(&format!("pause VM `{vm}`"), &e))?;
    }
    // as it is now: devices may have come and gone
    let definition = read(domain, &vm, sys::VIR_DOMAIN_XML_MIGRATABLE | sys::VIR_DOMAIN_XML_SECURE)?;
    let what = "save its state";
    saving.migrating = true;
    monitor.ask(what, "migrate", serde_json::json!({ "uri": uri }))?;
    monitor.finish(what, limit)?;
    saving.migrating = false;
    drop(saving);
    let stood = stopped.elapsed();
    let now = domain.get_state().map_err(|e| failed(&format!("read the state of VM `{vm}`"), &e))?.0;
    if !paused && !matches!(state_of(now), VmState::Running | VmState::Blocked) {
        let reason = format!("it was saved, and is {} now; resume it with `virsh resume {vm}`", state_of(now));
        return Err(HypervisorError::Qemu { vm: vm.name, what: "go on", reason });
    }
    Ok(SavedState { definition, machine_type: machine.machine_type, qemu_version, memory, stood, vm })
}

/// A clone that is not finished. Dropped, it is gone: it is ours and transient.
struct Starting<'a>(Option<&'a Domain>);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if let Some(domain) = self.0.take()
            && let Err(error) = domain.destroy()
            && !is_gone(&error)
        {
            tracing::error!(error = error.message(), "a clone that did not start is left behind");
        }
    }
}

fn start(
    link: &Link,
    definition: &str,
    state: &File,
    limit: Duration,
    ready: impl FnOnce(&Ready<'_>),
) -> Result<Cloned, HypervisorError> {
    let began = Instant::now();
    if !no_nul(definition) {
        let reason = "its definition has a NUL character".to_owned();
        return Err(HypervisorError::Libvirt { what: "start the clone".to_owned(), reason });
    }
    let domain = Domain::create_xml(link.connect(), definition, sys::VIR_DOMAIN_START_PAUSED)
        .map_err(|e| failed("start the clone", &e))?;
    let created = began.elapsed();
    let mut starting = Starting(Some(&domain));
    let vm = id_of(&domain)?;
    let monitor = Monitor::new(&domain, &vm.name);
    let what = "load the template's devices";
    monitor.set_mapped(true)?;
    let uri = monitor.give(state)?;
    monitor.ask(what, "migrate-incoming", serde_json::json!({ "uri": uri }))?;
    monitor.finish(what, limit)?;
    monitor.take_back()?;
    monitor.set_mapped(false)?;
    let interfaces = interfaces(&read(&domain, &vm, 0)?);
    for interface in &interfaces {
        monitor.set_link(interface, false)?; // the state says how it was
    }
    let loaded = began.elapsed();
    ready(&Ready { domain: &domain, vm: &vm });
    let template = template_of(&domain).map(|(_, template)| template).unwrap_or_default();
    domain.resume().map_err(|e| failed(&format!("resume clone `{vm}`"), &e))?;
    let resumed = began.elapsed();
    note(&domain, Some((CLONE, &template))).map_err(|e| failed(&format!("mark clone `{vm}`"), &e))?;
    starting.0 = None;
    Ok(Cloned { created, loaded, resumed, unplugged: interfaces.len(), vm })
}

/// What is noted of a machine: the word and the template's folder.
fn template_of(domain: &Domain) -> Option<(String, String)> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or(2);
    let text = domain.get_metadata(kind, Some(TEMPLATE_NAMESPACE), sys::VIR_DOMAIN_AFFECT_LIVE).ok()?;
    let doc = roxmltree::Document::parse(&text).ok()?;
    let root = doc.root_element();
    Some((root.tag_name().name().to_owned(), root.attribute("template").unwrap_or_default().to_owned()))
}

/// The template's folder that is noted in the definition of a clone that runs.
pub(super) fn noted_template<'a>(domain: roxmltree::Node<'a, '_>) -> Option<&'a str> {
    let mut notes = super::xml::child(domain, "metadata")?.children();
    let clone = notes.find(|n| n.tag_name().namespace() == Some(TEMPLATE_NAMESPACE) && n.tag_name().name() == CLONE)?;
    clone.attribute("template")
}

fn recover(link: &Link, busy: &[String]) -> Result<Vec<String>, HypervisorError> {
    let active = sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE;
    let domains = link.connect().list_all_domains(active).map_err(|e| failed("list the VMs", &e))?;
    let mut done = Vec::new();
    for domain in &domains {
        let Some((word, template)) = template_of(domain) else { continue };
        let Ok(vm) = id_of(domain) else { continue };
        if busy.contains(&vm.name) {
            continue;
        }
        let said = |what: &str, error: &dyn std::fmt::Display| {
            tracing::error!(vm = vm.name, %error, "unfinished template: could not {what}");
        };
        match word.as_str() {
            SAVING => {
                let monitor = Monitor::new(domain, &vm.name);
                let _ = monitor.break_off(); // it may have ended meanwhile
                let stands = domain.get_state().is_ok_and(|(state, _)| state_of(state) == VmState::Paused);
                undo(domain, monitor, None, stands && template != PAUSED, &said);
                done.push(format!("VM `{vm}` goes on: saving it as a template was broken off"));
            }
            STARTING => match domain.destroy() {
                Err(error) if !is_gone(&error) => said("end a clone that did not start", &error.message()),
                _ => done.push(format!("clone `{vm}` was ended: its start was broken off")),
            },
            _ => {}
        }
    }
    Ok(done)
}
