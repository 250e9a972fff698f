//! One change at a time a VM, on a thread of its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use uuid::Uuid;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::abilities::{Abilities, Ability, MemoryDevice};
use super::balloon::Balloon;
use super::change::{ActError, Change, Done, Kind, Outcome, Setting};
use super::pace::Pace;
use super::{device, tune, vcpus};
use crate::libvirt::error::HypervisorError;
use crate::libvirt::hypervisor::{Hypervisor, failed};

/// The VMs that a change is under way on, and whether it is to be broken off.
#[derive(Debug, Clone, Default)]
pub(in crate::libvirt) struct Acting(Arc<Mutex<HashMap<Uuid, Arc<AtomicBool>>>>);

/// A VM's turn; given back when dropped, which is when the work ends, whoever still waits for it.
#[derive(Debug)]
struct Turn(Acting, Uuid, Arc<AtomicBool>);

/// Changes at once. Fewer than the slow calls allowed, so that VMs can still be started and stopped.
const MOST_AT_ONCE: usize = 8;

impl Acting {
    /// A VM's turn, or why it has none now.
    fn take(&self, vm: Uuid) -> Result<Turn, &'static str> {
        let mut acting = self.0.lock();
        if acting.contains_key(&vm) {
            return Err("it is being changed already");
        }
        if acting.len() >= MOST_AT_ONCE {
            return Err("as many other VMs as may be are being changed");
        }
        let broken_off = Arc::clone(acting.entry(vm).or_default());
        Ok(Turn(self.clone(), vm, broken_off))
    }

    fn break_off(&self, vm: Uuid) {
        if let Some(broken_off) = self.0.lock().get(&vm) {
            broken_off.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.lock().remove(&self.1);
    }
}

impl Hypervisor {
    /// What of a running VM can be changed now, and in words why the rest can't.
    ///
    /// # Errors
    /// `Hypervisor`, or `Refused` where the VM does not run.
    pub async fn abilities(&self, vm: Uuid) -> Result<Abilities, ActError> {
        let limit = Duration::from_secs(20);
        let work = move |domain: &Domain| Ok(of_running(domain, vm).and_then(|name| abilities(domain, &name)));
        self.beside("look at what can be changed", &vm.to_string(), limit, work).await?
    }

    /// Makes a change to a running VM, and waits until it is there, stuck or out of time: up to [`Pace::limit`]. A caller that
    /// gives up leaves it running; meanwhile the VM is `Busy`. Callers keep a [`Backoff`](super::Backoff): a VM that refused
    /// is not asked again at once.
    ///
    /// # Errors
    /// `Refused` where it would harm the guest now, `Unsupported` with the reason, `Busy`, `Failed` with the state it was left
    /// in, `Hypervisor`.
    pub async fn apply(&self, change: Change, pace: Pace) -> Result<Done, ActError> {
        let turn =
            self.acting().take(change.vm).map_err(|reason| ActError::Busy { vm: change.vm.to_string(), reason })?;
        let (vm, limit) = (change.vm.to_string(), pace.limit(change.to.kind()));
        let work = move |domain: &Domain| {
            let turn = turn;
            Ok(apply(domain, &change, &pace, &turn.2))
        };
        self.beside("change the VM", &vm, limit, work).await?
    }

    /// Has a change of a VM that takes memory, if one is under way, stop where it is: within a look ([`Pace::look`]). Any other change
    /// goes on.
    pub fn break_off(&self, vm: Uuid) {
        self.acting().break_off(vm);
    }
}

/// The VM's name, if it is the one meant and runs.
fn of_running(domain: &Domain, vm: Uuid) -> Result<String, ActError> {
    let name = domain.get_name().map_err(|e| failed("read the VM's name", &e))?;
    // A name may look like another VM's UUID.
    if domain.get_uuid().map_err(|e| failed("read the VM's UUID", &e))? != vm {
        return Err(HypervisorError::NoSuchVm { vm: vm.to_string() }.into());
    }
    let refused = |reason: &str| Err(ActError::Refused { vm: name.clone(), reason: reason.to_owned() });
    match domain.get_state().map_err(|e| failed("read the VM's state", &e))?.0 {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => Ok(name),
        sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED => refused("it is paused, so its guest can't take part"),
        _ => refused("it does not run"),
    }
}

fn abilities(domain: &Domain, name: &str) -> Result<Abilities, ActError> {
    let xml = domain.get_xml_desc(0).map_err(|e| failed(&format!("read the definition of VM `{name}`"), &e))?;
    let guest = super::balloon::guest_says(domain).ok();
    let guest = guest.and_then(|g| crate::libvirt::stats::guest_memory_of(&g, crate::libvirt::stats::now_us()));
    Abilities::read(&xml, guest).map_err(|reason| ActError::Refused { vm: name.to_owned(), reason })
}

/// A change under way.
struct Work<'a> {
    domain: &'a Domain,
    name: String,
    pace: &'a Pace,
    change: &'a Change,
    broken_off: &'a AtomicBool,
    abilities: Abilities,
    started: Instant,
}

fn apply(domain: &Domain, change: &Change, pace: &Pace, broken_off: &AtomicBool) -> Result<Done, ActError> {
    let started = Instant::now();
    let name = of_running(domain, change.vm)?;
    let abilities = abilities(domain, &name)?;
    let work = Work { domain, name, pace, change, broken_off, abilities, started };
    let done = match &change.to {
        Setting::Memory(bytes) => work.memory(*bytes),
        Setting::Balloon(bytes) => work.balloon(*bytes),
        Setting::MemoryDevice { alias, bytes } => work.device(alias, *bytes),
        Setting::Vcpus(count) => work.vcpus(*count),
        _ => work.numbers(),
    }?;
    tracing::info!(
        vm = work.name, kind = %done.kind, before = %done.before, asked = %done.asked, got = %done.got,
        took_ms = done.took.as_millis(), outcome = ?done.outcome, why = done.why, "changed"
    );
    Ok(done)
}

impl Work<'_> {
    fn refused(&self, reason: impl Into<String>) -> ActError {
        ActError::Refused { vm: self.name.clone(), reason: reason.into() }
    }

    fn unsupported(&self, what: Kind, reason: &str) -> ActError {
        ActError::Unsupported { vm: self.name.clone(), what, reason: reason.to_owned() }
    }

    fn failed(&self, what: Kind, reason: &str, left: &str) -> ActError {
        ActError::Failed { vm: self.name.clone(), what, reason: reason.to_owned(), left: left.to_owned() }
    }

    /// An error of libvirt's: what the driver does not have, it will not have later either.
    fn error(&self, what: Kind, error: &Error, left: &str) -> ActError {
        match error.code() {
            ErrorNumber::NoSupport | ErrorNumber::ArgumentUnsupported | ErrorNumber::ConfigUnsupported => {
                self.unsupported(what, error.message())
            }
            _ => self.failed(what, error.message(), left),
        }
    }

    fn done(&self, kind: Kind, before: Setting, got: Setting, outcome: Outcome, why: String) -> Done {
        Done {
            vm: self.change.vm,
            kind,
            before,
            asked: self.change.to.clone(),
            got,
            took: self.started.elapsed(),
            outcome,
            verified: matches!(outcome, Outcome::Reached | Outcome::Already),
            why,
        }
    }

    fn already(&self, kind: Kind, is: Setting) -> Done {
        self.done(kind, is.clone(), is, Outcome::Already, String::new())
    }

    /// Refuses to take memory below what the caller allows, or without knowing what the guest needs.
    fn may_shrink(&self, to: u64) -> Result<(), ActError> {
        if to < self.change.not_below {
            return Err(self.refused(format!(
                "{} MiB is below the {} MiB that it must keep",
                to >> 20,
                self.change.not_below >> 20
            )));
        }
        match &self.abilities.shrink {
            Ability::Yes => Ok(()),
            Ability::No(reason) => Err(self.refused(format!("its memory is not taken: {reason}"))),
        }
    }

    /// Chooses the means.
    fn memory(&self, to: u64) -> Result<Done, ActError> {
        let balloon = Balloon::new(self.domain, self.pace, self.broken_off)
            .map_err(|e| self.error(Kind::Balloon, &e, "nothing was changed"))?;
        let current = balloon.current().map_err(|e| self.error(Kind::Balloon, &e, "nothing was changed"))?;
        match choose(current, balloon.maximum(), to, &self.abilities.devices) {
            Means::Balloon(bytes) => self.balloon(bytes),
            Means::Device { alias, bytes } => {
                let mut done = self.device(&alias, bytes)?;
                let Setting::MemoryDevice { bytes: before, .. } = done.before else { return Ok(done) };
                let Setting::MemoryDevice { bytes: got, .. } = done.got else { return Ok(done) };
                done.before = Setting::Memory(current);
                done.got = Setting::Memory(current.saturating_add(got).saturating_sub(before));
                if done.outcome == Outcome::Reached && done.got != done.asked {
                    done.outcome = Outcome::Partial;
                    done.verified = false;
                    done.why =
                        format!("the memory device `{alias}` has no more to give or to take, or rounds to blocks");
                }
                Ok(done)
            }
        }
    }

    fn balloon(&self, to: u64) -> Result<Done, ActError> {
        let kind = super::balloon::KIND;
        let nothing = "nothing was changed";
        let balloon =
            Balloon::new(self.domain, self.pace, self.broken_off).map_err(|e| self.error(kind, &e, nothing))?;
        let current = balloon.current().map_err(|e| self.error(kind, &e, nothing))?;
        if to > balloon.maximum() {
            let most = balloon.maximum() >> 20;
            return Err(
                self.refused(format!("{} MiB is more than the {most} MiB it can have without a restart", to >> 20))
            );
        }
        if to.abs_diff(current) <= 1 << 20 {
            return Ok(self.already(kind, Setting::Balloon(current)));
        }
        let reached = if to > current {
            if self.abilities.guest.is_none()
                && let Ability::No(reason) = &self.abilities.balloon
            {
                return Err(self.unsupported(kind, reason));
            }
            balloon.grow(to)
        } else {
            self.may_shrink(to)?;
            let spare = self.pace.spare_bytes(balloon.maximum());
            if let Some(guest) = balloon.guest().filter(|g| g.spare_bytes() <= spare) {
                let has = guest.spare_bytes() >> 20;
                return Err(self.refused(format!("it has {has} MiB to spare and keeps at least {} MiB", spare >> 20)));
            }
            balloon.shrink(to, spare)
        };
        let reached = reached.map_err(|e| {
            let now = balloon.current().map_or_else(|_| "unknown".to_owned(), |b| format!("{} MiB", b >> 20));
            self.error(kind, &e, &format!("its memory is {now} now"))
        })?;
        let outcome = if reached.got == current && reached.outcome == Outcome::Partial {
            Outcome::Unchanged
        } else {
            reached.outcome
        };
        Ok(self.done(kind, Setting::Balloon(current), Setting::Balloon(reached.got), outcome, reached.why))
    }

    fn device(&self, alias: &str, bytes: u64) -> Result<Done, ActError> {
        let kind = Kind::MemoryDevice;
        let Some(device) = self.abilities.devices.iter().find(|d| d.alias == alias) else {
            return Err(self.unsupported(kind, &format!("it has no virtio-mem device `{alias}`")));
        };
        let setting = |bytes| Setting::MemoryDevice { alias: alias.to_owned(), bytes };
        if bytes > device.size_bytes || !bytes.is_multiple_of(device.block_bytes) {
            let (most, block) = (device.size_bytes >> 20, device.block_bytes >> 20);
            return Err(self.refused(format!("`{alias}` holds up to {most} MiB in blocks of {block} MiB")));
        }
        if bytes == device.current_bytes && bytes == device.requested_bytes {
            return Ok(self.already(kind, setting(bytes)));
        }
        if bytes < device.current_bytes {
            let all = self.domain.get_info().map_err(|e| self.error(kind, &e, "nothing was changed"))?;
            let taken = device.current_bytes - bytes;
            self.may_shrink(all.memory.saturating_mul(1024).saturating_sub(taken))?;
            let spare = self.pace.spare_bytes(all.max_mem.saturating_mul(1024));
            let has = self.abilities.guest.map_or(0, |g| g.spare_bytes());
            if has < taken.saturating_add(spare) {
                let (has, spare) = (has >> 20, spare >> 20);
                return Err(self.refused(format!("it has {has} MiB to spare and keeps at least {spare} MiB")));
            }
        }
        let resized = device::resize(self.domain, self.pace, device, bytes, self.broken_off).map_err(|reason| {
            let now = device::current(self.domain, alias).map_or_else(|e| e, |b| format!("{} MiB", b >> 20));
            self.failed(kind, &reason, &format!("the device holds {now} now"))
        })?;
        Ok(self.done(kind, setting(device.current_bytes), setting(resized.got), resized.outcome, resized.why))
    }

    fn vcpus(&self, to: u32) -> Result<Done, ActError> {
        let kind = Kind::Vcpus;
        let before = vcpus::count(self.domain).map_err(|e| self.error(kind, &e, "nothing was changed"))?;
        let able = &self.abilities.vcpus;
        let idle = || self.abilities.agent.is_yes() && !vcpus::all_used(self.domain, to);
        if to == before && !idle() {
            return Ok(self.already(kind, Setting::Vcpus(before)));
        }
        let counted = if to == before {
            Ok(vcpus::use_all(self.domain, self.pace, to))
        } else if to > before {
            if let Ability::No(reason) = &able.add {
                return Err(self.unsupported(kind, reason));
            }
            if to > able.maximum {
                return Err(self.refused(format!("{to} vCPUs are more than its maximum of {}", able.maximum)));
            }
            vcpus::add(self.domain, self.pace, &self.abilities, to)
        } else {
            // Only QEMU tells which can go; other drivers are asked.
            let listed = able.fewest < able.current;
            if let (Ability::No(reason), false, true) = (&able.remove, listed, self.is_qemu()) {
                return Err(self.unsupported(kind, reason));
            }
            if to == 0 || listed && to < able.fewest {
                return Err(self.refused(format!("it can't have fewer than {} vCPUs", able.fewest)));
            }
            vcpus::remove(self.domain, self.pace, &self.abilities, to)
        };
        let counted = counted.map_err(|e| {
            let now = vcpus::count(self.domain).map_or_else(|_| "an unknown number of".to_owned(), |n| n.to_string());
            self.error(kind, &e, &format!("it has {now} vCPUs now"))
        })?;
        let mut done =
            self.done(kind, Setting::Vcpus(before), Setting::Vcpus(counted.got), counted.outcome, counted.why);
        done.verified = counted.verified;
        Ok(done)
    }

    fn is_qemu(&self) -> bool {
        self.domain.get_connect().ok().and_then(|c| c.get_type().ok()).is_none_or(|kind| kind == "QEMU")
    }

    fn numbers(&self) -> Result<Done, ActError> {
        let kind = self.change.to.kind();
        let limits = match &self.change.to {
            Setting::Disk { target, .. } => match self.abilities.disks.iter().find(|d| d.target == *target) {
                Some(disk) => disk.limits.clone(),
                None => Ability::No(format!("it has no disk `{target}`")),
            },
            // Only an interface of this VM's: what a failure left there is removed.
            Setting::Network { device, .. } => match self.abilities.nics.iter().find(|n| n.device == *device) {
                Some(nic) => nic.limits.clone(),
                None => Ability::No(format!("it has no network interface `{device}`")),
            },
            _ => Ability::Yes,
        };
        if let Ability::No(reason) = limits {
            return Err(self.unsupported(kind, &reason));
        }
        let pair = tune::tune(self.domain, &self.change.to).map_err(|e| match e {
            tune::TuneError::Unsupported(reason) => self.unsupported(kind, &reason),
            tune::TuneError::Failed { reason, left } => self.failed(kind, &reason, &left),
        })?;
        let (outcome, why) = if tune::reached(&self.change.to, &pair.got) {
            let same = tune::reached(&self.change.to, &pair.before);
            (if same { Outcome::Already } else { Outcome::Reached }, String::new())
        } else if pair.got == pair.before {
            (Outcome::Unchanged, "libvirt agreed, yet nothing changed".to_owned())
        } else {
            (Outcome::Partial, "the host set another value: it has limits or steps of its own".to_owned())
        };
        Ok(self.done(kind, pair.before, pair.got, outcome, why))
    }
}

/// How memory is changed.
#[derive(Debug, PartialEq, Eq)]
enum Means {
    Balloon(u64),
    Device { alias: String, bytes: u64 },
}

/// Shrinks a device that holds memory, since that kills nothing; grows the balloon's part as far as it holds memory back, else
/// a device. `maximum` is what the VM started with and all that its devices could hold.
fn choose(current: u64, maximum: u64, to: u64, devices: &[MemoryDevice]) -> Means {
    if to < current {
        let full = devices.iter().filter(|d| d.current_bytes > 0).max_by_key(|d| d.current_bytes);
        let Some(device) = full else { return Means::Balloon(to) };
        let less = device.current_bytes.saturating_sub(current - to);
        // Rounded up: no more is taken than was asked for.
        return Means::Device { alias: device.alias.clone(), bytes: less.next_multiple_of(device.block_bytes) };
    }
    let empty: u64 = devices.iter().map(|d| d.size_bytes.saturating_sub(d.current_bytes)).sum();
    let without_balloon = maximum.saturating_sub(empty);
    let room = devices.iter().filter(|d| d.current_bytes < d.size_bytes).max_by_key(|d| d.size_bytes - d.current_bytes);
    match room {
        Some(device) if current.saturating_add(1 << 20) >= without_balloon => {
            let more = device.current_bytes.saturating_add(to - current).next_multiple_of(device.block_bytes);
            Means::Device { alias: device.alias.clone(), bytes: more.min(device.size_bytes) }
        }
        Some(_) => Means::Balloon(to.min(without_balloon)),
        None => Means::Balloon(to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory_device(current: u64) -> MemoryDevice {
        MemoryDevice {
            alias: "m".into(),
            size_bytes: 1000,
            block_bytes: 10,
            requested_bytes: current,
            current_bytes: current,
        }
    }

    #[test]
    fn a_device_that_holds_memory_is_shrunk_first() {
        let device = |bytes| Means::Device { alias: "m".into(), bytes };
        assert_eq!(choose(2000, 2500, 1895, &[memory_device(500)]), device(400));
        assert_eq!(choose(2000, 2500, 1000, &[memory_device(500)]), device(0));
        assert_eq!(choose(2000, 3000, 1000, &[memory_device(0)]), Means::Balloon(1000));
        assert_eq!(choose(2000, 2500, 2005, &[memory_device(500)]), device(510));
        assert_eq!(choose(2000, 2500, 9000, &[memory_device(500)]), device(1000));
        assert_eq!(choose(2000, 2000, 9000, &[memory_device(1000)]), Means::Balloon(9000));
        assert_eq!(choose(2000, 2500, 2500, &[]), Means::Balloon(2500));
        let held_back = 8 << 20;
        assert_eq!(choose(2000, held_back + 2500, u64::MAX, &[memory_device(500)]), Means::Balloon(held_back + 2000));
    }

    #[test]
    fn one_change_at_a_time() {
        let (acting, vm) = (Acting::default(), Uuid::from_u128(1));
        let turn = acting.take(vm).unwrap();
        assert!(acting.take(vm).unwrap_err().contains("already"));
        let others: Vec<_> = (2..=8).map(|id| acting.take(Uuid::from_u128(id)).unwrap()).collect();
        assert!(acting.take(Uuid::from_u128(9)).unwrap_err().contains("other VMs"));
        acting.break_off(vm);
        let broken_off = |turn: &Turn| turn.2.load(Ordering::Relaxed);
        assert!(broken_off(&turn) && !others.iter().any(broken_off));
        drop((turn, others));
        acting.break_off(vm);
        assert!(!broken_off(&acting.take(vm).unwrap()), "the next change is another");
    }
}
