//! The guest's memory, by its balloon.
//!
//! Taking memory is done in steps of half of what the guest is to keep to spare. Between two steps the guest is asked anew
//! what it could give: what it needs meanwhile is left to it, with as much again as it took since the last look, and a guest
//! that runs short gets back at once all that was taken. A balloon without autodeflate that takes more than the guest can give
//! kills its programs within seconds.
//!
//! Taking ends where it is once the VM is to have more ([`BROKEN_OFF`]).
//!
//! [`Shrink`] decides, on figures passed in; [`shrink`] and [`grow`] carry it out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::change::{Kind, Outcome};
use super::pace::Pace;
use crate::libvirt::stats::{Guest, GuestMemory, guest_memory_of, now_us};

/// The balloon moves in pages, libvirt counts KiB, and QEMU rounds: less is no difference.
const TOLERANCE: u64 = 1 << 20;
/// A balloon that has not moved for this long is stuck: the guest has nothing more to give.
const STUCK: Duration = Duration::from_secs(4);
/// While memory is taken the guest is asked every second, as often as libvirt can.
const PERIOD_S: i32 = 1;
/// The longest wait for the guest's next word: three periods, and one for the timers' phase.
const SILENCE: Duration = Duration::from_secs(4);

/// Why no more was taken of a VM that is to have more.
pub(super) const BROKEN_OFF: &str = "broken off, as it is to have more; what was reached stays";

/// What a way of changing memory came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reached {
    pub(super) got: u64,
    pub(super) outcome: Outcome,
    pub(super) why: String,
}

/// The state that a step is decided on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Now {
    /// The guest's memory less the balloon.
    pub(super) current: u64,
    /// What the guest could give up without swapping or killing.
    pub(super) spare: u64,
}

impl Now {
    /// What the guest uses.
    fn used(self) -> u64 {
        self.current.saturating_sub(self.spare)
    }
}

/// The next thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Take memory down to this.
    To(u64),
    /// Give back all that was taken: the guest runs short, or soon will.
    GiveBack,
    /// As far down as it should go.
    Reached,
    /// No further: the guest needs the rest.
    Enough,
}

/// Decides about the steps down.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shrink {
    pub(super) to: u64,
    /// What the guest had at the start.
    pub(super) from: u64,
    /// What the guest is left with to spare.
    pub(super) spare: u64,
}

impl Shrink {
    /// The next step; `before` is what the last one was decided on.
    pub(super) fn step(&self, before: Option<Now>, now: Now) -> Step {
        // It may need as much again until the next look.
        let growth = before.map_or(0, |before| now.used().saturating_sub(before.used()));
        let spare = now.spare.saturating_sub(growth);
        if spare < self.spare / 2 && now.current.saturating_add(TOLERANCE) < self.from {
            return Step::GiveBack;
        }
        if now.current <= self.to.saturating_add(TOLERANCE) {
            return Step::Reached;
        }
        let goal = self.to.max(now.current.saturating_sub(spare.saturating_sub(self.spare)));
        if now.current <= goal.saturating_add(TOLERANCE) {
            return Step::Enough;
        }
        Step::To(goal.max(now.current.saturating_sub((self.spare / 2).max(4 * TOLERANCE))))
    }
}

/// A VM whose balloon is moved.
pub(super) struct Balloon<'a> {
    domain: &'a Domain,
    pace: &'a Pace,
    /// No more is to be taken.
    broken_off: &'a AtomicBool,
    maximum: u64,
}

impl<'a> Balloon<'a> {
    pub(super) fn new(domain: &'a Domain, pace: &'a Pace, broken_off: &'a AtomicBool) -> Result<Self, Error> {
        let maximum = domain.get_info()?.max_mem.saturating_mul(1024);
        Ok(Self { domain, pace, broken_off, maximum })
    }

    pub(super) fn maximum(&self) -> u64 {
        self.maximum
    }

    /// The guest's memory less the balloon. libvirt learns it by events, so asking is cheap.
    pub(super) fn current(&self) -> Result<u64, Error> {
        Ok(self.domain.get_info()?.memory.saturating_mul(1024))
    }

    /// What the guest said last of its memory.
    pub(super) fn guest(&self) -> Option<GuestMemory> {
        guest_memory_of(&guest_says(self.domain).ok()?, now_us())
    }

    fn is_broken_off(&self) -> bool {
        self.broken_off.load(Ordering::Relaxed)
    }

    fn set(&self, bytes: u64) -> Result<(), Error> {
        self.domain.set_memory_flags(bytes.div_ceil(1024), sys::VIR_DOMAIN_MEM_LIVE).map(drop)
    }

    /// Waits until the guest's memory is `to`, while it moves; downwards, until it is broken off.
    fn settle(&self, to: u64, until: Instant) -> Result<u64, Error> {
        let mut last = self.current()?;
        let mut moved = Instant::now();
        while last.abs_diff(to) > TOLERANCE && Instant::now() < until && moved.elapsed() < STUCK {
            if last > to && self.is_broken_off() {
                break;
            }
            std::thread::sleep(self.pace.look);
            let current = self.current()?;
            if current != last {
                (last, moved) = (current, Instant::now());
            }
        }
        Ok(last)
    }

    /// Waits for a word of the guest that is younger than `since` (seconds since 1970), until it is broken off.
    fn next_word(&self, since: u64) -> Result<Option<GuestMemory>, Error> {
        let until = Instant::now() + SILENCE;
        loop {
            let said = guest_says(self.domain)?;
            if said.updated_s.is_some_and(|s| s > since) {
                return Ok(guest_memory_of(&said, now_us()));
            }
            if Instant::now() >= until || self.is_broken_off() {
                return Ok(None);
            }
            std::thread::sleep(self.pace.look);
        }
    }

    /// Gives the guest memory, and waits until it has it.
    pub(super) fn grow(&self, to: u64) -> Result<Reached, Error> {
        self.set(to)?;
        let got = self.settle(to, Instant::now() + self.pace.grow)?;
        Ok(if got.saturating_add(TOLERANCE) >= to {
            Reached { got, outcome: Outcome::Reached, why: String::new() }
        } else {
            let why = "the guest has not taken all of it yet; it may still do so".to_owned();
            Reached { got, outcome: Outcome::Partial, why }
        })
    }

    /// Takes memory down to `to` in steps, as far as the guest can give it.
    pub(super) fn shrink(&self, to: u64, spare: u64) -> Result<Reached, Error> {
        let asked = Asking::start(self.domain);
        let reached = self.current().and_then(|from| self.shrink_asked(&Shrink { to, from, spare }));
        drop(asked);
        match reached {
            Ok(reached) => Ok(reached),
            Err(e) => {
                // Wherever it stopped, the balloon must not go on by itself.
                if let Ok(current) = self.current() {
                    let _ = self.set(current);
                }
                Err(e)
            }
        }
    }

    fn shrink_asked(&self, plan: &Shrink) -> Result<Reached, Error> {
        let started = Instant::now();
        let until = started + self.pace.shrink;
        let end = |got, outcome, why: &str| Ok(Reached { got, outcome, why: why.to_owned() });
        let mut before = None;
        loop {
            // libvirt stamps the guest's words in whole seconds: a later stamp is surely after the last step.
            let word = self.next_word(now_us() / 1_000_000)?;
            if self.is_broken_off() {
                return end(self.hold()?, Outcome::Partial, BROKEN_OFF);
            }
            let Some(guest) = word else {
                let why = "the guest stopped answering, so no more was taken";
                return end(self.hold()?, Outcome::Partial, why);
            };
            let now = Now { current: self.current()?, spare: guest.spare_bytes() };
            match plan.step(before.replace(now), now) {
                Step::Reached => return end(now.current, Outcome::Reached, ""),
                Step::Enough => {
                    let why = "the guest needs the rest: it keeps what it uses and its spare";
                    return end(now.current, Outcome::Partial, why);
                }
                Step::GiveBack => {
                    self.set(plan.from)?;
                    let got = self.settle(plan.from, Instant::now() + self.pace.grow)?;
                    return end(got, Outcome::Partial, "the guest ran short meanwhile and was given its memory back");
                }
                Step::To(bytes) => {
                    self.set(bytes)?;
                    let got = self.settle(bytes, until)?;
                    if got > bytes.saturating_add(TOLERANCE) && !self.is_broken_off() {
                        let why = "the guest's balloon stopped short: it finds no more memory to give";
                        return end(self.hold()?, Outcome::Partial, why);
                    }
                }
            }
            if Instant::now() >= until {
                return end(self.hold()?, Outcome::Partial, "it took too long; what was reached stays");
            }
        }
    }

    /// Ends a movement under way where it is.
    fn hold(&self) -> Result<u64, Error> {
        let current = self.current()?;
        self.set(current)?;
        Ok(current)
    }
}

/// What the guest said last, by `virDomainMemoryStats`.
pub(super) fn guest_says(domain: &Domain) -> Result<Guest, Error> {
    let mut guest = Guest::default();
    for stat in domain.memory_stats(0)? {
        let bytes = Some(stat.val.saturating_mul(1024));
        match stat.tag {
            sys::VIR_DOMAIN_MEMORY_STAT_AVAILABLE => guest.total_bytes = bytes,
            sys::VIR_DOMAIN_MEMORY_STAT_UNUSED => guest.free_bytes = bytes,
            sys::VIR_DOMAIN_MEMORY_STAT_USABLE => guest.available_bytes = bytes,
            sys::VIR_DOMAIN_MEMORY_STAT_LAST_UPDATE => guest.updated_s = Some(stat.val),
            _ => {}
        }
    }
    Ok(guest)
}

/// Has the guest asked every second; puts the period back when dropped.
struct Asking<'a> {
    domain: &'a Domain,
    before: Option<i32>,
}

impl<'a> Asking<'a> {
    fn start(domain: &'a Domain) -> Self {
        let before = domain.get_xml_desc(0).ok().and_then(|xml| {
            let document = roxmltree::Document::parse(&xml).ok()?;
            let balloon = document.descendants().find(|n| n.has_tag_name("memballoon"))?;
            let period = crate::libvirt::stats::period_of(balloon).map_or(0, |p| p.as_secs());
            i32::try_from(period).ok()
        });
        let before = before.filter(|&p| p != PERIOD_S);
        if before.is_some() {
            let _ = domain.set_memory_stats_period(PERIOD_S, sys::VIR_DOMAIN_MEM_LIVE);
        }
        Self { domain, before }
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = self.domain.set_memory_stats_period(before, sys::VIR_DOMAIN_MEM_LIVE);
        }
    }
}

/// What this way is called.
pub(super) const KIND: Kind = Kind::Balloon;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn plan(to: u64) -> Shrink {
        Shrink { to: to * MIB, from: 1024 * MIB, spare: 64 * MIB }
    }

    fn now(current: u64, spare: u64) -> Now {
        Now { current: current * MIB, spare: spare * MIB }
    }

    #[test]
    fn steps_are_small_and_end_where_the_guest_needs_the_rest() {
        let step = |to, state| plan(to).step(None, state);
        assert_eq!(step(256, now(1024, 900)), Step::To(992 * MIB));
        assert_eq!(step(1000, now(1024, 900)), Step::To(1000 * MIB));
        assert_eq!(step(256, now(1024, 74)), Step::To(1014 * MIB), "never more than what is above its spare");
        assert_eq!(step(256, now(1024, 65)), Step::Enough);
        assert_eq!(step(256, now(1024, 10)), Step::Enough, "nothing was taken, nothing is to be given back");
        assert_eq!(step(256, now(900, 10)), Step::GiveBack);
        assert_eq!(step(256, now(257, 500)), Step::Reached);
    }

    #[test]
    fn a_guest_that_grows_is_left_room_to_grow() {
        let step = |before, state| plan(256).step(Some(before), state);
        // 32 MiB were taken, and the guest took 100 itself.
        assert_eq!(step(now(1024, 400), now(992, 268)), Step::To(960 * MIB));
        assert_eq!(step(now(1024, 300), now(992, 168)), Step::To(988 * MIB));
        assert_eq!(step(now(1024, 260), now(992, 128)), Step::GiveBack, "at this pace it has nothing at the next look");
        assert_eq!(step(now(1024, 200), now(992, 300)), Step::To(960 * MIB), "one that shrinks is no reason to hurry");
    }

    proptest! {
        /// A guest whose needs grow between two looks by less than half of its spare is never left with nothing.
        #[test]
        fn a_guest_is_never_left_with_nothing(to in 0u64..1024, used in 100u64..900, changes in prop::collection::vec(-200i64..31, 60)) {
            let plan = plan(to);
            let (mut current, mut used) = (1024 * MIB, used * MIB);
            let mut before = None;
            for change in changes {
                let state = Now { current, spare: current.saturating_sub(used) };
                match plan.step(before.replace(state), state) {
                    Step::To(bytes) => {
                        prop_assert!(bytes < current && bytes >= plan.to);
                        current = bytes;
                    }
                    Step::GiveBack => current = plan.from,
                    Step::Reached | Step::Enough => {}
                }
                used = used.saturating_add_signed(change * MIB as i64).min(960 * MIB);
                if current < plan.from {
                    prop_assert!(current > used, "{} of {}", used / MIB, current / MIB);
                }
            }
        }
    }
}
