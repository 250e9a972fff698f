//! Virtual processors: present in the VM, and used by its guest.
//!
//! A processor that is added appears in the guest but stays offline until udev or the guest agent brings it online. One that
//! is to be removed is taken out of use first where there is an agent. libvirt may wait 5 s and answer with an error though
//! the guest lets go of it a moment later, so what counts is the number read back.

use std::time::{Duration, Instant};

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::abilities::Abilities;
use super::change::Outcome;
use super::pace::Pace;
use super::tunable::{guest_vcpus, set_guest_vcpus};

/// What a change of the number came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) got: u32,
    pub(super) outcome: Outcome,
    pub(super) verified: bool,
    pub(super) why: String,
}

/// The number of vCPUs that the running VM has.
pub(super) fn count(domain: &Domain) -> Result<u32, Error> {
    domain.get_vcpus_flags(sys::VIR_DOMAIN_VCPU_LIVE)
}

fn set(domain: &Domain, vcpus: u32) -> Result<(), Error> {
    domain.set_vcpus_flags(vcpus, sys::VIR_DOMAIN_VCPU_LIVE).map(drop)
}

/// Waits until the VM has `to` vCPUs; returns what it has then.
fn settle(domain: &Domain, pace: &Pace, to: u32) -> Result<u32, Error> {
    let until = Instant::now() + pace.vcpus;
    loop {
        let now = count(domain)?;
        if now == to || Instant::now() >= until {
            return Ok(now);
        }
        std::thread::sleep(pace.look);
    }
}

/// Adds vCPUs and has the guest use them.
pub(super) fn add(domain: &Domain, pace: &Pace, abilities: &Abilities, to: u32) -> Result<Counted, Error> {
    let before = count(domain)?;
    set(domain, to)?;
    let got = settle(domain, pace, to)?;
    if got != to {
        let outcome = if got == before { Outcome::Unchanged } else { Outcome::Partial };
        let why = format!("libvirt agreed, yet the VM has {got}");
        return Ok(Counted { got, outcome, verified: false, why });
    }
    if let Some(reason) = abilities.agent.reason() {
        let why = format!(
            "they are there; whether the guest uses them can't be seen ({reason}), a Linux guest needs a udev rule"
        );
        return Ok(Counted { got, outcome: Outcome::Reached, verified: true, why });
    }
    match bring_online(domain, pace, to) {
        Ok(()) => Ok(Counted { got, outcome: Outcome::Reached, verified: true, why: String::new() }),
        Err(reason) => {
            let back = set(domain, before).and_then(|()| settle(domain, pace, before));
            let (got, left) = match back {
                Ok(now) if now == before => (now, "they were removed again".to_owned()),
                Ok(now) => (now, format!("removing them again left {now}")),
                Err(e) => (count(domain)?, format!("removing them again failed: {}", e.message())),
            };
            let outcome = if got == before { Outcome::RolledBack } else { Outcome::Partial };
            Ok(Counted { got, outcome, verified: false, why: format!("the guest does not use them: {reason}; {left}") })
        }
    }
}

/// Whether the guest uses as many vCPUs. One that can't be asked is taken to.
pub(super) fn all_used(domain: &Domain, vcpus: u32) -> bool {
    guest_vcpus(domain).map_or(true, |guest| guest.online.len() >= vcpus as usize)
}

/// Has the guest use all vCPUs of a VM whose number is right.
pub(super) fn use_all(domain: &Domain, pace: &Pace, vcpus: u32) -> Counted {
    match bring_online(domain, pace, vcpus) {
        Ok(()) => {
            Counted { got: vcpus, outcome: Outcome::Reached, verified: true, why: "the guest uses them now".into() }
        }
        Err(reason) => {
            let why = format!("the guest does not use them: {reason}");
            Counted { got: vcpus, outcome: Outcome::Unchanged, verified: false, why }
        }
    }
}

/// Has the guest use all of its vCPUs, and looks whether it does.
fn bring_online(domain: &Domain, pace: &Pace, to: u32) -> Result<(), String> {
    let said = |e: Error| e.message().to_owned();
    let until = Instant::now() + pace.vcpus;
    let mut last = String::new();
    loop {
        let guest = guest_vcpus(domain).map_err(said)?;
        let offline: Vec<u32> = guest.present.iter().copied().filter(|id| !guest.online.contains(id)).collect();
        let online = u32::try_from(guest.online.len()).unwrap_or(u32::MAX);
        if online >= to {
            return Ok(());
        }
        if !offline.is_empty()
            && let Err(e) = set_guest_vcpus(domain, &offline, true)
        {
            last = format!(" ({})", said(e));
        }
        if Instant::now() >= until {
            return Err(format!("{online} of {to} are online{last}"));
        }
        std::thread::sleep(pace.look.max(Duration::from_millis(100)));
    }
}

/// Removes vCPUs.
pub(super) fn remove(domain: &Domain, pace: &Pace, abilities: &Abilities, to: u32) -> Result<Counted, Error> {
    let before = count(domain)?;
    // The guest lets go more readily of what it does not use. One that can't be asked is asked by the hot-unplug itself.
    let asleep = if abilities.agent.is_yes() { take_offline(domain, to) } else { Vec::new() };
    let said = set(domain, to).err().map(|e| e.message().to_owned());
    let until = Instant::now() + pace.vcpus;
    let got = loop {
        let got = count(domain)?;
        if got == to {
            let why = said.map(|s| format!("libvirt reported an error, yet they are gone: {s}")).unwrap_or_default();
            return Ok(Counted { got, outcome: Outcome::Reached, verified: true, why });
        }
        // QEMU may keep what the guest has let go of, and libvirt then counts it for ever.
        if abilities.agent.is_yes() && guest_vcpus(domain).is_ok_and(|g| g.present.len() <= to as usize) {
            let why = format!("the guest has let go of them, libvirt still counts {got}: {}", said.unwrap_or_default());
            return Ok(Counted { got: to, outcome: Outcome::Reached, verified: true, why });
        }
        if Instant::now() >= until {
            break got;
        }
        std::thread::sleep(pace.look);
    };
    let mut why = said.unwrap_or_else(|| "the guest did not let go of them".to_owned());
    if !asleep.is_empty() {
        why += match set_guest_vcpus(domain, &asleep, true) {
            Ok(()) => "; those it kept it uses again",
            Err(_) => "; some of those it kept may be offline in the guest",
        };
    }
    let outcome = if got == before { Outcome::Unchanged } else { Outcome::Partial };
    Ok(Counted { got, outcome, verified: false, why })
}

/// Takes the last vCPUs out of the guest's use, down to `to`; returns those it did take out.
fn take_offline(domain: &Domain, to: u32) -> Vec<u32> {
    let Ok(guest) = guest_vcpus(domain) else { return Vec::new() };
    let surplus = guest.online.len().saturating_sub(to as usize);
    let mut last: Vec<u32> = guest.online.iter().copied().filter(|id| guest.offlinable.contains(id)).collect();
    last.sort_unstable();
    let last = last.split_off(last.len().saturating_sub(surplus));
    if last.is_empty() || set_guest_vcpus(domain, &last, false).is_err() { Vec::new() } else { last }
}
