//! Promises of resources for a time: asked for, admitted or refused, kept over restarts.

use super::State;
use crate::planner::{self, Amounts, Booking, BookingId, Foreseen, Outlook, Promise, Refusal, Standing, VmId};
use crate::store::demand::{self as ledger, ReservationState};
use crate::store::{Store, StoreError};
use prestage_integration::api::demand::{Reservation, ReservationRequest, Resource};
use prestage_integration::libvirt::Uuid;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// Seconds for which machines' use is foreseen when a promise is weighed.
const FORESEEN_S: u32 = 86_400;

/// A reservation as it lies in the database.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    request: ReservationRequest,
    booking: Booking,
}

impl State {
    /// Reads back promises that hold or are to come. A row that is damaged is told and left alone; it costs no other.
    pub(crate) fn restore_reservations(&mut self, store: &Store, now_s: u64) -> Result<(), StoreError> {
        let (mut bookings, mut next) = (Vec::new(), 0u64);
        for row in store.reservations(&ledger::Reservations::default())? {
            // Numbers are never used twice, also those of promises that are over.
            next = next.max(row.id.parse::<u64>().map_or(0, |id| id.saturating_add(1)));
            if !matches!(row.state, ReservationState::Admitted | ReservationState::Active) {
                continue;
            }
            match serde_json::from_str::<Kept>(&row.data) {
                Ok(kept)
                    if kept.booking.promise.to_s <= now_s
                        && kept.booking.promise.from_s < kept.booking.promise.to_s => {}
                Ok(kept) if kept.booking.id.0.to_string() == row.id && kept.booking.promise.sound() => {
                    self.asked.insert(kept.booking.id.0, kept.request);
                    bookings.push(kept.booking);
                }
                _ => tracing::error!(id = row.id, "a reservation in the database is damaged and does not hold"),
            }
        }
        let over = self.reservations.restore(bookings, next);
        if over > 0 {
            tracing::error!(over, "more reservations hold than there can be; the last of them do not");
        }
        Ok(())
    }

    /// Admits a promise if it fits.
    ///
    /// # Errors
    /// Where and by how much it does not.
    pub(crate) fn reserve(
        &mut self,
        request: ReservationRequest,
        vm: Option<Uuid>,
        now_s: u64,
    ) -> Result<(Reservation, ledger::Reservation), Refusal> {
        let amounts = Amounts([
            request.vcpus,
            request.memory_bytes as f64,
            request.disk_bytes_per_s,
            request.network_bytes_per_s,
        ]);
        let promise = Promise {
            vm: vm.map(|vm| VmId(vm.as_u128())),
            from_s: request.from_unix_ms / 1000,
            to_s: request.until_unix_ms.div_ceil(1000),
            guaranteed: amounts,
            oversubscribed: Amounts::default(),
            likely: None,
        };
        if let Some(vm) = vm {
            self.can_have(vm, &promise, now_s)?;
        }
        let foreseen = self.foreseen(now_s);
        let floors: Vec<(VmId, Amounts)> = self
            .policies
            .iter()
            .map(|(uuid, policy)| {
                let least = |resource| policy.resources.get(&resource).and_then(|of| of.min).unwrap_or(0.0);
                (VmId(uuid.as_u128()), Amounts(Resource::ALL.map(least)))
            })
            .collect();
        let capacity = self.capacity();
        let standing = Standing { capacity, floors: &floors, foreseen: &foreseen };
        let risk = self.planner.settings().risk;
        let id = self.reservations.admit(now_s, promise, risk, &standing)?;
        let booking = Booking { id, promise };
        let of = |resource: planner::Resource| resource.human(capacity[resource]);
        let why = format!(
            "fits beside what is promised and foreseen: machines may have {} and {} of this host together",
            of(planner::Resource::Cpu),
            of(planner::Resource::Memory)
        );
        self.asked.insert(id.0, request.clone());
        let data = json!({ "request": request, "booking": booking }).to_string();
        let row = ledger::Reservation {
            id: id.0.to_string(),
            vm: vm.map(|vm| vm.to_string()).unwrap_or_default(),
            from_s: promise.from_s,
            to_s: promise.to_s,
            state: ReservationState::Admitted,
            data,
            changed_unix_ms: now_s * 1000,
        };
        let state = if promise.from_s <= now_s { "running" } else { "waiting" };
        let notes = vm.map(|vm| self.without_effect(vm, &promise.guaranteed, now_s)).unwrap_or_default();
        Ok((Reservation { id: id.0 as i64, request, state: state.to_owned(), why, notes }, row))
    }

    /// What each machine is to use at most within a day.
    fn foreseen(&mut self, now_s: u64) -> Vec<Foreseen> {
        let machines = self.machines.values_mut().map(|machine| {
            let peak = Resource::ALL.map(|resource| {
                let allocated = machine.allocated(resource).unwrap_or(0.0);
                let flow = machine.flow(resource);
                let used = flow.used().map_or(0.0, |(_, used)| used);
                let forecast = flow.forecast(FORESEEN_S, &super::flow::Covariates::default());
                // Of what nothing is known, all it has may be used.
                let [_, p50, p90, p95] =
                    forecast.map_or([0.0, used.max(allocated), allocated, allocated], |forecast| forecast.peak.0);
                Outlook { p50, p90: p90.max(p50), p95: p95.max(p90).max(p50) }
            });
            let vm = VmId(machine.uuid.as_u128());
            Foreseen { vm, from_s: now_s, to_s: now_s + u64::from(FORESEEN_S), peak }
        });
        machines.collect()
    }

    /// Takes a promise back; its row as it is to lie in the database.
    pub(crate) fn unreserve(&mut self, id: i64, now_s: u64) -> Option<ledger::Reservation> {
        let id = u64::try_from(id).ok()?;
        let booking = *self.reservations.bookings().iter().find(|booking| booking.id == BookingId(id))?;
        self.reservations.cancel(booking.id);
        let request = self.asked.remove(&id).unwrap_or_default();
        Some(ledger::Reservation {
            id: id.to_string(),
            vm: booking.promise.vm.map(|vm| Uuid::from_u128(vm.0).to_string()).unwrap_or_default(),
            from_s: booking.promise.from_s,
            to_s: booking.promise.to_s,
            state: ReservationState::Cancelled,
            data: json!({ "request": request, "booking": booking }).to_string(),
            changed_unix_ms: now_s * 1000,
        })
    }

    /// Promises that hold or are to come.
    pub(crate) fn promised(&self, now_s: u64) -> Vec<Reservation> {
        let bookings = self.reservations.bookings().iter().filter(|booking| booking.promise.to_s > now_s);
        bookings
            .map(|booking| Reservation {
                id: booking.id.0 as i64,
                request: self.asked.get(&booking.id.0).cloned().unwrap_or_default(),
                state: if booking.promise.from_s <= now_s { "running" } else { "waiting" }.to_owned(),
                why: String::new(),
                notes: booking
                    .promise
                    .vm
                    .map(|vm| self.without_effect(Uuid::from_u128(vm.0), &booking.promise.guaranteed, now_s))
                    .unwrap_or_default(),
            })
            .collect()
    }
}
