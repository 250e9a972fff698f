//! Which machines run, and where their memory lies: follows libvirt's events and tells the thread.
//!
//! A machine's monitor is asked for that, which libvirt notes as a taint of the machine (`custom-monitor`); so it is asked only
//! where there is swap, and a machine that starts is looked at when its memory may have begun to be used.

use super::{MemoryHandle, Place};
use prestage_integration::libvirt::{Hypervisor, HypervisorEvent, Uuid, VmEventKind};
use prestage_integration::memory::{process, swap};
use prestage_integration::processes::Processes;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::UnboundedReceiver;

/// All machines are looked at anew so often (memory that was plugged in raises no event in every libvirt), and sooner where one was
/// not found.
const AGAIN: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(5);
/// Whether there is swap is looked at so often.
const BEAT: Duration = Duration::from_secs(1);
/// So long after an event the layout is asked for: a device's memory is mapped a little later, and events come in bursts.
const SETTLE: Duration = Duration::from_millis(300);

/// Runs until the thread or libvirt's connection is given up.
pub(crate) async fn follow(hypervisor: Hypervisor, memory: MemoryHandle, mut moves: UnboundedReceiver<Uuid>) {
    let mut processes = Processes::default();
    let mut events = hypervisor.events();
    let mut known: HashMap<Uuid, String> = HashMap::new();
    let mut beat = tokio::time::interval(BEAT);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut again, mut swapping) = (Instant::now(), false);
    loop {
        let mut stirred = HashSet::new();
        let mut all = false;
        tokio::select! {
            _ = beat.tick() => {
                let swaps = !swap::areas().is_empty();
                all = Instant::now() >= again || std::mem::replace(&mut swapping, swaps) != swaps;
            }
            moved = moves.recv() => match moved {
                Some(vm) => drop(stirred.insert(vm)),
                None => return,
            },
            event = events.recv() => match event {
                Ok(event) => all = take(event, &mut known, &mut stirred, &memory),
                Err(RecvError::Lagged(_)) => all = true,
                Err(RecvError::Closed) => return,
            },
        }
        if !all && stirred.is_empty() {
            continue;
        }
        if !all {
            tokio::time::sleep(SETTLE).await;
        }
        if all && let Ok(vms) = hypervisor.list().await {
            let running: HashMap<Uuid, String> =
                vms.into_iter().filter(|vm| vm.is_running()).map(|vm| (vm.id.uuid, vm.id.name)).collect();
            known.keys().filter(|vm| !running.contains_key(vm)).for_each(|vm| memory.stopped(*vm));
            stirred.extend(running.keys().copied());
            known = running;
        }
        if all {
            again = Instant::now() + AGAIN;
        }
        for vm in stirred {
            let Some(name) = known.get(&vm).cloned() else { continue };
            let place = find(&hypervisor, &mut processes, vm, &name).await;
            if place.is_err() && swapping {
                again = again.min(Instant::now() + SOON);
            }
            memory.runs(vm, name, place);
        }
    }
}

/// Notes which machines run and whose memory may have changed. Whether all are to be looked at.
fn take(
    event: HypervisorEvent,
    known: &mut HashMap<Uuid, String>,
    stirred: &mut HashSet<Uuid>,
    memory: &MemoryHandle,
) -> bool {
    match event {
        HypervisorEvent::Resync(_) => return true,
        HypervisorEvent::Disconnected { .. } => {}
        HypervisorEvent::Vm(event) => match event.kind {
            VmEventKind::Started => {
                known.insert(event.vm.uuid, event.vm.name);
                stirred.insert(event.vm.uuid);
            }
            VmEventKind::DeviceAdded { .. }
            | VmEventKind::DeviceRemoved { .. }
            | VmEventKind::MemoryDeviceResized { .. } => drop(stirred.insert(event.vm.uuid)),
            VmEventKind::Stopped(_) => {
                known.remove(&event.vm.uuid);
                memory.stopped(event.vm.uuid);
            }
            // A balloon takes pages, not places.
            _ => {}
        },
    }
    false
}

/// Why no machine is watched then.
pub(super) const NO_SWAP: &str = "this host has no swap: nothing to learn or to bring in";

async fn find(hypervisor: &Hypervisor, processes: &mut Processes, vm: Uuid, name: &str) -> Result<Place, String> {
    if swap::areas().is_empty() {
        return Err(NO_SWAP.to_owned());
    }
    let Some(pid) = processes.pid(vm, name, Instant::now()) else {
        return Err("its QEMU process is not found".to_owned());
    };
    // The number may be another process's by the time it is used: the start tells.
    let process = process::identify(pid).map_err(|error| format!("QEMU is gone (process {pid}): {error}"))?;
    match hypervisor.memory_layout(&vm.to_string()).await {
        Ok(Ok(regions)) => Ok(Place { process, regions }),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(format!("where its memory lies is not known: {error}")),
    }
}
