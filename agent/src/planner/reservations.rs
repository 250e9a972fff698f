//! What is promised for later: cores, memory and I/O for a window of time.
//!
//! A reservation has a guaranteed part, which is never promised twice, and an oversubscribed part on top of it,
//! admitted at the risk that the operator states (after Reidys et al., *Coach*, ASPLOS 2025). Admission looks at every
//! moment of the window at which anything changes:
//!
//! - guaranteed parts and machines' floors together never exceed the capacity;
//! - these, or what is foreseen to be used if that is more, and the oversubscribed parts as far as they are likely to
//!   be used, exceed it with at most the risk.
//!
//! Machines' demands move together (the office day, a batch run), so their quantiles are added as if all peaks came at
//! once; nothing is gained from their independence. Times for which nothing is foreseen count as the worst that is.
//!
//! The whole is serialisable; what is read back is checked by [`Reservations::check`].

use super::{Amounts, Outlook, RESOURCES, Resource, VmId};
use crate::calendar::rfc3339;
use serde::{Deserialize, Serialize};

/// Reservations at most: a bound on what a round looks at.
const MOST: usize = 4096;
/// Longest way ahead and longest window, seconds: a year.
const FARTHEST_S: u64 = 366 * 86_400;

/// Names a reservation; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BookingId(pub u64);

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Promise {
    /// The machine it is for; `None`: one that does not exist yet, for which the room is kept free.
    pub vm: Option<VmId>,
    /// Unix seconds, the first in the window and the first after it.
    pub from_s: u64,
    pub to_s: u64,
    /// Never promised to anybody else.
    pub guaranteed: Amounts,
    /// On top of it, at the stated risk.
    pub oversubscribed: Amounts,
    /// How much of the oversubscribed part will be used at most, as shares of it; all of it where nothing is known.
    pub likely: Option<Outlook>,
}

impl Promise {
    fn during(&self, at_s: u64) -> bool {
        (self.from_s..self.to_s).contains(&at_s)
    }

    /// Amounts and window are possible.
    #[must_use]
    pub fn sound(&self) -> bool {
        self.guaranteed.sound() && self.oversubscribed.sound() && self.from_s < self.to_s
    }

    /// Of the oversubscribed part, what is used with probability `risk` to be exceeded.
    fn likely(&self, risk: f64) -> f64 {
        self.likely.and_then(|likely| likely.at_risk(risk)).map_or(1.0, |share| share.clamp(0.0, 1.0))
    }
}

/// A promise that was made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Booking {
    pub id: BookingId,
    #[serde(flatten)]
    pub promise: Promise,
}

/// What the machines of the host are foreseen to use at most within a slot of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Foreseen {
    pub vm: VmId,
    pub from_s: u64,
    pub to_s: u64,
    /// By [`Resource`].
    pub peak: [Outlook; 4],
}

/// Why a reservation is not admitted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("it ends before it begins")]
    Empty,
    #[error("it ended at {}: give a time that is to come", utc(*.to_s))]
    Over { to_s: u64 },
    #[error("it begins at {}, more than {} days ahead: ask again later", utc(*.from_s), FARTHEST_S / 86_400)]
    Ahead { from_s: u64 },
    #[error("it lasts {} days; {} are the most", .lasts_s / 86_400, FARTHEST_S / 86_400)]
    Long { lasts_s: u64 },
    #[error("{resource}: how much of it there is for machines is not known: set `{}` in the configuration", key(*.resource))]
    Unmanaged { resource: Resource },
    /// By the caller: what the machine itself cannot have.
    #[error(
        "{resource}: {} asked for{}, but {by} allows {} at most; ask for less, or raise that first",
        .resource.human(*.asked), beside(*.resource, *.promised), .resource.human(*.most)
    )]
    Machine { resource: Resource, asked: f64, promised: f64, by: &'static str, most: f64 },
    #[error("an amount is negative or not a number")]
    Amount,
    #[error("the risk is {0}; it is 0.0001 to 0.5")]
    Risk(f64),
    #[error("{MOST} reservations are the most there can be; cancel some")]
    Full,
    #[error(
        "{resource}: {} guaranteed where {} is left of what may be promised at {}; ask for less or another time",
        .resource.human(*.asked), .resource.human(*.left), utc(*.at_s)
    )]
    Promised { resource: Resource, at_s: u64, asked: f64, left: f64 },
    #[error(
        "{resource}: {} where {} is likely to be left at {} at a risk of {risk}; ask for less, another time or a higher risk",
        .resource.human(*.asked), .resource.human(*.left), utc(*.at_s)
    )]
    Foreseen { resource: Resource, at_s: u64, asked: f64, left: f64, risk: f64 },
}

/// Unix seconds as people read them.
fn utc(at_s: u64) -> String {
    let text = rfc3339(at_s.saturating_mul(1_000_000));
    text.split_once('.').map_or(text.clone(), |(seconds, _)| format!("{seconds}Z"))
}

/// Where it is said how much of a resource machines may have.
const fn key(resource: Resource) -> &'static str {
    match resource {
        Resource::Cpu => "demand.cpu_overcommit",
        Resource::Memory => "demand.memory_reserve",
        Resource::Disk => "demand.disk_rate",
        Resource::Network => "demand.network_rate",
    }
}

fn beside(resource: Resource, promised: f64) -> String {
    if promised > 0.0 { format!(" beside {} promised to it already", resource.human(promised)) } else { String::new() }
}

/// What the host has, and who is promised what whatever the time.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// For machines. 0: not managed, nothing can be reserved of it.
    pub capacity: Amounts,
    /// Machines' floors (`min` of their policies).
    pub floors: &'a [(VmId, Amounts)],
    /// What is foreseen, in any order.
    pub foreseen: &'a [Foreseen],
}

/// All reservations.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reservations {
    bookings: Vec<Booking>,
    next: u64,
}

impl Reservations {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// In the order in which they were made.
    #[must_use]
    pub fn bookings(&self) -> &[Booking] {
        &self.bookings
    }

    /// Whether what was read back can be relied on.
    ///
    /// # Errors
    /// What is wrong with which reservation.
    pub fn check(&self) -> Result<(), String> {
        if self.bookings.len() > MOST {
            return Err(format!("{} reservations, more than {MOST}", self.bookings.len()));
        }
        for pair in self.bookings.windows(2) {
            if pair[0].id >= pair[1].id {
                return Err(format!("reservation {} follows {}", pair[1].id.0, pair[0].id.0));
            }
        }
        match self.bookings.iter().find(|booking| !booking.promise.sound() || booking.id.0 >= self.next) {
            Some(bad) => Err(format!("reservation {} has an amount, a window or a number that cannot be", bad.id.0)),
            None => Ok(()),
        }
    }

    /// Takes back what was on record, `next` being the first number that is free; returns how many are beyond the most there can
    /// be, and were left out. All of them are [sound](Promise::sound).
    pub fn restore(&mut self, mut bookings: Vec<Booking>, next: u64) -> usize {
        bookings.sort_unstable_by_key(|booking| booking.id);
        bookings.dedup_by_key(|booking| booking.id);
        let over = bookings.len().saturating_sub(MOST);
        bookings.truncate(MOST);
        self.next = bookings.last().map_or(next, |last| next.max(last.id.0.saturating_add(1)));
        self.bookings = bookings;
        over
    }

    /// Takes a reservation if it fits, at a risk of `risk` (0.0001 to 0.5) for what is not guaranteed.
    ///
    /// # Errors
    /// Where and by how much it does not fit; nothing is taken then.
    pub fn admit(
        &mut self,
        now_s: u64,
        asked: Promise,
        risk: f64,
        standing: &Standing<'_>,
    ) -> Result<BookingId, Refusal> {
        let Promise { from_s, to_s, .. } = asked;
        if from_s >= to_s {
            return Err(Refusal::Empty);
        }
        if to_s <= now_s {
            return Err(Refusal::Over { to_s });
        }
        if from_s.saturating_sub(now_s) > FARTHEST_S {
            return Err(Refusal::Ahead { from_s });
        }
        if to_s - from_s > FARTHEST_S {
            return Err(Refusal::Long { lasts_s: to_s - from_s });
        }
        if !asked.sound() {
            return Err(Refusal::Amount);
        }
        if !(1e-4..=0.5).contains(&risk) {
            return Err(Refusal::Risk(risk));
        }
        let wanted = |resource: &Resource| asked.guaranteed[*resource] + asked.oversubscribed[*resource] > 0.0;
        let none = |resource: &Resource| super::settings::sound_capacity(&standing.capacity, *resource) <= 0.0;
        if let Some(resource) = RESOURCES.into_iter().find(|resource| wanted(resource) && none(resource)) {
            return Err(Refusal::Unmanaged { resource });
        }
        self.expire(now_s);
        if self.bookings.len() >= MOST {
            return Err(Refusal::Full);
        }
        let mut moments = vec![from_s.max(now_s)];
        moments.extend(self.bookings.iter().map(|booking| booking.promise.from_s));
        moments.extend(standing.foreseen.iter().flat_map(|slot| [slot.from_s, slot.to_s]));
        moments.retain(|at_s| *at_s >= now_s && asked.during(*at_s));
        moments.sort_unstable();
        moments.dedup();
        for at_s in moments {
            for resource in RESOURCES.into_iter().filter(wanted) {
                self.fits(at_s, resource, &asked, risk, standing)?;
            }
        }
        let id = BookingId(self.next);
        self.next += 1;
        self.bookings.push(Booking { id, promise: asked });
        Ok(id)
    }

    fn fits(
        &self,
        at_s: u64,
        resource: Resource,
        asked: &Promise,
        risk: f64,
        standing: &Standing<'_>,
    ) -> Result<(), Refusal> {
        let capacity = super::settings::sound_capacity(&standing.capacity, resource);
        let before = self.load(at_s, resource, None, risk, standing);
        let after = self.load(at_s, resource, Some(asked), risk, standing);
        // What cannot be told from rounding is equal.
        let over = |load: f64| load > capacity * (1.0 + 1e-12);
        if over(after.0) {
            let (asked, left) = (after.0 - before.0, (capacity - before.0).max(0.0));
            return Err(Refusal::Promised { resource, at_s, asked, left });
        }
        if over(after.1) {
            let (asked, left) = (after.1 - before.1, (capacity - before.1).max(0.0));
            return Err(Refusal::Foreseen { resource, at_s, asked, left, risk });
        }
        Ok(())
    }

    /// What is guaranteed at a moment, and what is likely to be used, with a promise on top.
    fn load(
        &self,
        at_s: u64,
        resource: Resource,
        more: Option<&Promise>,
        risk: f64,
        standing: &Standing<'_>,
    ) -> (f64, f64) {
        let active: Vec<&Promise> = self
            .bookings
            .iter()
            .map(|booking| &booking.promise)
            .filter(|promise| promise.during(at_s))
            .chain(more)
            .collect();
        let (mut promised, mut likely) = (0.0, 0.0);
        for promise in active.iter().filter(|promise| promise.vm.is_none()) {
            promised += promise.guaranteed[resource];
            likely += promise.guaranteed[resource] + promise.oversubscribed[resource] * promise.likely(risk);
        }
        let mut vms: Vec<VmId> = standing.floors.iter().map(|(vm, _)| *vm).collect();
        vms.extend(standing.foreseen.iter().map(|slot| slot.vm).chain(active.iter().filter_map(|promise| promise.vm)));
        vms.sort_unstable();
        vms.dedup();
        for vm in vms {
            let floor = standing
                .floors
                .iter()
                .filter(|(of, _)| *of == vm)
                .map(|(_, floor)| floor[resource])
                .fold(0.0, f64::max);
            let own = || active.iter().filter(|promise| promise.vm == Some(vm));
            let guaranteed = floor.max(own().map(|promise| promise.guaranteed[resource]).sum());
            let extra: f64 = own().map(|promise| promise.oversubscribed[resource] * promise.likely(risk)).sum();
            let peak = |slot: &Foreseen| slot.peak[resource as usize].at_risk(risk).unwrap_or(0.0);
            let slots = || standing.foreseen.iter().filter(|slot| slot.vm == vm);
            let now = slots().filter(|slot| (slot.from_s..slot.to_s).contains(&at_s)).map(peak).reduce(f64::max);
            let foreseen = now.unwrap_or_else(|| slots().map(peak).fold(0.0, f64::max));
            promised += guaranteed;
            likely += (guaranteed + extra).max(foreseen);
        }
        (promised, likely)
    }

    /// Takes a reservation back; whether there was one.
    pub fn cancel(&mut self, id: BookingId) -> bool {
        let before = self.bookings.len();
        self.bookings.retain(|booking| booking.id != id);
        self.bookings.len() < before
    }

    /// Forgets what is over.
    pub fn expire(&mut self, now_s: u64) {
        self.bookings.retain(|booking| booking.promise.to_s > now_s);
    }

    /// Guaranteed to a machine now, or within `lead_s`: the sum of its reservations, where it is highest.
    #[must_use]
    pub fn guaranteed(&self, vm: VmId, resource: Resource, now_s: u64, lead_s: u32) -> f64 {
        self.highest(resource, now_s, lead_s, |promise| promise.vm == Some(vm))
    }

    /// Guaranteed now, or within `lead_s`, to machines that are not there: to be kept free.
    #[must_use]
    pub fn unclaimed(&self, resource: Resource, now_s: u64, lead_s: u32, present: impl Fn(VmId) -> bool) -> f64 {
        self.highest(resource, now_s, lead_s, |promise| promise.vm.is_none_or(|vm| !present(vm)))
    }

    fn highest(&self, resource: Resource, now_s: u64, lead_s: u32, of: impl Fn(&Promise) -> bool) -> f64 {
        let until_s = now_s.saturating_add(u64::from(lead_s));
        let own = || self.bookings.iter().map(|booking| &booking.promise).filter(|promise| of(promise));
        let starts = own().map(|promise| promise.from_s).filter(|at_s| (now_s..=until_s).contains(at_s));
        let at = |at_s: u64| own().filter(|p| p.during(at_s)).map(|p| p.guaranteed[resource]).sum::<f64>();
        starts.chain([now_s]).map(at).fold(0.0, f64::max)
    }

    /// Guarantees that no longer fit, since the host has less or machines' floors are higher than when they were made:
    /// when, of what, and by how much.
    #[must_use]
    pub fn broken(&self, now_s: u64, standing: &Standing<'_>) -> Vec<(u64, Resource, f64)> {
        let mut moments: Vec<u64> = self.bookings.iter().map(|booking| booking.promise.from_s.max(now_s)).collect();
        moments.sort_unstable();
        moments.dedup();
        let mut broken = Vec::new();
        for at_s in moments {
            for resource in RESOURCES {
                let capacity = super::settings::sound_capacity(&standing.capacity, resource);
                let over = self.load(at_s, resource, None, 0.5, standing).0 - capacity * (1.0 + 1e-12);
                if over > 0.0
                    && self.bookings.iter().any(|b| b.promise.during(at_s) && b.promise.guaranteed[resource] > 0.0)
                {
                    broken.push((at_s, resource, over));
                }
            }
        }
        broken
    }
}
