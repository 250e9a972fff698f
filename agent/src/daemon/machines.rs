//! libvirt: machines, attaching and detaching their disks, and letting go of disks that nobody needs any more.

use super::Shared;
use super::control::{Opening, add_disk, remove_disk};
use super::disks::{DiskError, Entry};
use crate::memory::name_programs;
use prestage_cache::backend::{StoreSpec, follow};
use prestage_integration::api::types::{
    AttachRequest, Attached, Detached, DiskOrigin, TakesEffect, Vm, VmDisk, VmList, validate_name,
};
use prestage_integration::api::{ApiError, ErrorCode};
use prestage_integration::libvirt::{
    self, AttachOptions, Hypervisor, HypervisorError, HypervisorEvent, PlanError, VmEventKind,
};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::sync::broadcast::error::RecvError;

pub(super) fn hypervisor(daemon: &Shared) -> Result<Hypervisor, ApiError> {
    daemon.hypervisor.clone().ok_or_else(|| {
        ApiError::new(
            ErrorCode::HypervisorUnavailable,
            "libvirt is switched off in the configuration; set libvirt.enabled = true and restart prestaged",
        )
    })
}

pub(super) fn api_error(error: &HypervisorError) -> ApiError {
    let code = match error {
        HypervisorError::NoSuchVm { .. } => ErrorCode::NotFound,
        HypervisorError::Plan { plan, .. } => match plan {
            PlanError::NoSuchDisk { .. } | PlanError::NotAttached { .. } => ErrorCode::NotFound,
            PlanError::AlreadyAttached { .. } => ErrorCode::AlreadyExists,
            _ => ErrorCode::NotPossible,
        },
        HypervisorError::TransientVm { .. }
        | HypervisorError::Unfit { .. }
        | HypervisorError::Qemu { .. }
        | HypervisorError::ManagedSave { .. }
        | HypervisorError::Refused { .. }
        | HypervisorError::NotTaken { .. } => ErrorCode::NotPossible,
        HypervisorError::Timeout { .. } => ErrorCode::Timeout,
        _ => ErrorCode::HypervisorUnavailable,
    };
    ApiError::new(code, error.to_string())
}

fn effect(effect: libvirt::TakesEffect) -> TakesEffect {
    match effect {
        libvirt::TakesEffect::Now => TakesEffect::Now,
        libvirt::TakesEffect::NextStart => TakesEffect::NextStart,
    }
}

fn describe(daemon: &Shared, vm: &libvirt::Vm) -> Vm {
    let ours = daemon.disks.list();
    let disks = vm.disks.iter().map(|disk| VmDisk {
        target: disk.target.clone(),
        bus: disk.bus.clone(),
        kind: disk.kind.to_string(),
        source: disk.source.clone(),
        format: disk.format.clone(),
        read_only: disk.read_only,
        attached: disk.attached.as_ref().and_then(|attached| {
            ours.iter().find(|ours| ours.definition.socket == attached.socket).map(|ours| ours.definition.name.clone())
        }),
    });
    Vm {
        uuid: vm.id.uuid.to_string(),
        name: vm.id.name.clone(),
        state: vm.state.as_str().to_owned(),
        persistent: vm.persistent,
        shared_memory: vm.shared_memory,
        vcpus: vm.vcpus,
        memory_bytes: vm.memory_bytes,
        disks: disks.collect(),
        clone: daemon.templates.progress(vm),
        pages: None,
    }
}

pub(super) async fn list(daemon: &Shared) -> Result<VmList, ApiError> {
    let vms = hypervisor(daemon)?.list().await.map_err(|error| api_error(&error))?;
    remember(daemon, &vms);
    let mut vms: Vec<Vm> = vms.iter().map(|vm| describe(daemon, vm)).collect();
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(VmList { vms })
}

pub(super) async fn get(daemon: &Shared, vm: &str) -> Result<Vm, ApiError> {
    let vm = hypervisor(daemon)?.get(vm).await.map_err(|error| api_error(&error))?;
    let mut pages = match &daemon.memory {
        Some(memory) => memory.report(vm.id.uuid).await,
        None => None,
    };
    if let (Some(pages), Some(demand)) = (&mut pages, &daemon.demand) {
        let known = demand.state.lock().catalogue().programs();
        name_programs(pages, known.iter().map(|(program, tags)| (program.as_str(), &tags[..])));
    }
    Ok(Vm { pages, ..describe(daemon, &vm) })
}

/// A disk's name made of its machine's and its target; characters that names don't have become `-`.
fn disk_name(vm: &str, target: &str) -> String {
    let clean = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let vm: String = vm.chars().map(clean).take(40).collect();
    format!("{}-{target}", vm.trim_start_matches(['.', '_', '-']))
}

/// Serves a machine's disk and points the machine at it. Nothing is left behind if either fails.
pub(super) async fn attach(
    daemon: &Shared,
    vm: &str,
    target: &str,
    request: &AttachRequest,
) -> Result<Attached, ApiError> {
    let hypervisor = hypervisor(daemon)?;
    let machine = hypervisor.get(vm).await.map_err(|error| api_error(&error))?;
    let name = request.name.clone().unwrap_or_else(|| disk_name(&machine.id.name, target));
    validate_name(&name).map_err(ApiError::invalid)?;
    let most = daemon.config.lock().export.max_queues;
    let queues = u32::from(request.queues.unwrap_or(u16::MAX)).min(most).min(machine.vcpus.max(1));
    let options = AttachOptions {
        enable_shared_memory: request.enable_shared_memory,
        queues: Some(u16::try_from(queues).unwrap_or(u16::MAX)),
        ..AttachOptions::default()
    };
    remember(daemon, std::slice::from_ref(&machine));
    let mut definition = daemon.define(&name, "", DiskOrigin::Attach);
    let socket = definition.socket.clone();
    // The plan says what to serve, and finds what stands against it before anything is opened.
    let plan = hypervisor.preview(vm, target, &socket, &options).await.map_err(|error| api_error(&error))?;
    definition.store = plan.store.to_string();
    let (store, folder) = (definition.store.clone(), daemon.config.lock().store.image_folder.clone());
    // Now, where somebody is told: a running machine's disk is opened only when it stops.
    super::control::blocking(move || store.parse::<StoreSpec>().map(|spec| follow(&spec, folder.as_deref())))
        .await?
        .map_err(|error| ApiError::invalid(error.to_string()))?
        .map_err(|error| ApiError::new(ErrorCode::StoreFailed, error.to_string()))?;
    definition.read_only = plan.read_only;
    definition.serial = plan.serial.clone();
    definition.vm = Some(machine.id.uuid.to_string());
    definition.target = Some(target.to_owned());
    let store = definition.store.clone();
    // A running machine has its disk open itself, and locked; ours is opened as soon as it lets go.
    let opening = if machine.is_running() { Opening::WhenFree } else { Opening::Now };
    add_disk(daemon, definition, opening).await?;
    match hypervisor.attach(vm, target, &socket, &options).await {
        Ok(attached) => {
            let mut notes = attached.plan.remarks;
            if machine.is_running() {
                notes.push(format!("the machine is running: disk `{name}` is opened when it stops"));
            }
            if attached.plan.shared_memory_added {
                notes.push("shared memory backing was added to the machine's definition".to_owned());
            }
            tracing::info!(vm = machine.id.name, target, disk = name, "attached");
            Ok(Attached {
                vm: machine.id.name,
                target: target.to_owned(),
                disk: name,
                store,
                socket: socket.display().to_string(),
                takes_effect: effect(attached.takes_effect),
                notes,
            })
        }
        // A call that timed out may yet succeed: the machine would start on a socket that nobody serves.
        Err(error @ HypervisorError::Timeout { .. }) => Err(api_error(&error)),
        Err(error) => {
            remove_disk(daemon, &name).await?;
            Err(api_error(&error))
        }
    }
}

/// Gives a machine's disk its original source back, and lets go of ours as soon as nothing uses it.
pub(super) async fn detach(daemon: &Shared, vm: &str, target: &str) -> Result<Detached, ApiError> {
    let hypervisor = hypervisor(daemon)?;
    let detached = hypervisor.detach(vm, target).await.map_err(|error| api_error(&error))?;
    let ours = daemon.disks.list().into_iter().find(|entry| entry.definition.socket == detached.plan.socket);
    let mut notes = detached.plan.remarks;
    if let Some(entry) = &ours {
        match detached.takes_effect {
            libvirt::TakesEffect::Now => remove_disk(daemon, &entry.definition.name).await?,
            libvirt::TakesEffect::NextStart => notes.push(format!(
                "the machine is running on disk `{}`: it is served until the machine stops",
                entry.definition.name
            )),
        }
    }
    tracing::info!(vm = detached.vm.name, target, "detached");
    Ok(Detached {
        vm: detached.vm.name,
        target: target.to_owned(),
        disk: ours.as_ref().map(|entry| entry.definition.name.clone()).unwrap_or_default(),
        store: ours.map(|entry| entry.definition.store).unwrap_or_default(),
        takes_effect: effect(detached.takes_effect),
        notes,
    })
}

/// Keeps the machines' names: disks are kept by UUID, which no operator wants to read.
fn remember(daemon: &Shared, vms: &[libvirt::Vm]) {
    let mut names = daemon.machine_names.lock();
    names.extend(vms.iter().map(|vm| (vm.id.uuid.to_string(), vm.id.name.clone())));
}

/// What a killed daemon has left under way in libvirt is done by then.
const AFTERMATH: Duration = Duration::from_secs(300);

/// Follows libvirt's events for as long as the daemon runs.
pub(super) async fn watch(daemon: Shared, hypervisor: Hypervisor) {
    let begun = Instant::now();
    let mut events = hypervisor.events();
    // The connection may have been made before this began to listen.
    if let Ok(vms) = hypervisor.list().await {
        remember(&daemon, &vms);
        release(&daemon, &hypervisor).await;
        super::templates::recover(&daemon, &hypervisor).await;
    }
    loop {
        match events.recv().await {
            Ok(HypervisorEvent::Vm(event)) => {
                tracing::debug!(vm = event.vm.name, kind = ?event.kind, "machine event");
                if matches!(event.kind, VmEventKind::Stopped(_) | VmEventKind::Undefined) {
                    daemon.templates.ended(event.vm.uuid);
                    // Disks attached while the machine ran can be opened now, and should be before its next start.
                    super::upkeep::open_missing(&daemon).await;
                    release(&daemon, &hypervisor).await;
                }
                // libvirt finishes what a killed daemon has asked it for, and may do so a while after the next is there.
                if matches!(event.kind, VmEventKind::Started) && begun.elapsed() < AFTERMATH {
                    super::templates::recover(&daemon, &hypervisor).await;
                }
            }
            Ok(HypervisorEvent::Resync(vms)) => {
                remember(&daemon, &vms);
                let running = vms.iter().filter(|vm| vm.is_running()).map(|vm| vm.id.uuid).collect();
                daemon.templates.keep(&running);
                release(&daemon, &hypervisor).await;
                super::templates::recover(&daemon, &hypervisor).await;
            }
            Ok(HypervisorEvent::Disconnected { reason }) => {
                tracing::warn!(reason, "libvirt connection lost; disks are served on, reconnecting");
            }
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "libvirt events missed");
                release(&daemon, &hypervisor).await;
            }
            Err(RecvError::Closed) => return,
        }
    }
}

/// Lets go of attached disks that their machine neither uses nor will use.
async fn release(daemon: &Shared, hypervisor: &Hypervisor) {
    let attached: Vec<Entry> =
        daemon.disks.list().into_iter().filter(|entry| entry.definition.origin == DiskOrigin::Attach).collect();
    if attached.is_empty() {
        return;
    }
    let Ok(vms) = hypervisor.list().await else { return };
    for entry in attached {
        if needed(&vms, &entry.definition.socket) {
            continue;
        }
        // Another look: an attachment that is being made is not in the definition yet.
        let age = std::time::Duration::from_secs(1);
        tokio::time::sleep(age).await;
        let Ok(vms) = hypervisor.list().await else { return };
        if needed(&vms, &entry.definition.socket) {
            continue;
        }
        let name = entry.definition.name;
        tracing::info!(disk = name, "no machine uses this disk any more");
        if let Err(error) = remove_disk(daemon, &name).await {
            tracing::warn!(disk = name, %error, "disk not removed");
        }
    }
}

fn needed(vms: &[libvirt::Vm], socket: &Path) -> bool {
    let attached = vms.iter().flat_map(|vm| &vm.disks).filter_map(|disk| disk.attached.as_ref());
    attached.filter(|attached| attached.socket == socket).any(|attached| attached.in_use || attached.next_start)
}

/// Brings disks that the configuration declares into line with it: new ones are expected, missing ones let go. A disk that a
/// hypervisor is connected to stays as it is until the machine stops: its guest must not find other bytes, or none, under
/// its feet.
pub(super) async fn follow_config(daemon: &Shared) -> Result<(), ApiError> {
    let disks = daemon.config.lock().disks.clone();
    let wanted: Vec<_> = disks
        .into_iter()
        .map(|disk| {
            let mut definition = daemon.define(&disk.name, &disk.store, DiskOrigin::Config);
            definition.read_only = disk.read_only;
            definition.vm = disk.vm;
            definition.nbd = disk.nbd;
            if let Some(socket) = disk.socket {
                definition.socket = socket;
            }
            definition
        })
        .collect();
    let present = daemon.disks.list().into_iter().filter(|entry| entry.definition.origin == DiskOrigin::Config);
    for entry in present {
        if wanted.contains(&entry.definition) {
            continue;
        }
        let name = &entry.definition.name;
        if entry.is_used() {
            if daemon.disks.defer(name) {
                tracing::warn!(
                    disk = name,
                    "changed in the configuration while in use: it changes when its machine stops, or its NBD clients go"
                );
            }
            continue;
        }
        if let Some(lost) = entry.lost_if_closed() {
            if daemon.disks.defer(name) {
                tracing::warn!(disk = name, "changed in the configuration, but goes on until prestaged ends: {lost}");
            }
            continue;
        }
        remove_disk(daemon, name).await?;
    }
    for definition in wanted {
        match daemon.disks.expect(definition) {
            Ok(()) | Err(DiskError::NameTaken(_)) => {}
            Err(error) => tracing::error!(%error, "disk of the configuration not served"),
        }
    }
    Ok(())
}
