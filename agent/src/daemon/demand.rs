//! The API's questions and orders about demand.

use super::Daemon;
use super::control::{Handle, blocking, store_error};
use crate::demand::gather::subject;
use crate::demand::machine::Machine;
use crate::demand::run::{Demand, resource_of};
use crate::learner::run::unix_ms;
use crate::store::StoreError;
use crate::store::demand::{DecisionRow, Decisions, Outcome, PolicyRow};
use prestage_integration::api::demand::{
    Ability, ActivityRequest, Advice, AdviceList, Decision, DecisionList, DecisionsQuery, DemandControl, DemandStatus,
    Event, EventList, EventRequest, Execution, ExecutionList, ExecutionStart, ExecutionsQuery, Forecast, ForecastQuery,
    Measured, Mode, ProfileList, ProfilesQuery, Quantiles, Reservation, ReservationList, ReservationRequest, Resource,
    VmActivity, VmPolicy, VmPolicyShown, WebhookList,
};
use prestage_integration::api::{ApiError, ErrorCode, Reply};
use prestage_integration::libvirt::Uuid;
use prestage_integration::libvirt::act::{Abilities, Ability as Can};

/// Decisions of an answer unless asked otherwise.
const DECISIONS: u32 = 50;
/// Measured steps shown beside a forecast.
const MEASURED: u64 = 96;

impl Daemon {
    fn demand(&self) -> Result<&Demand, ApiError> {
        let off = "demand is not measured: it needs demand.enabled = true and libvirt.enabled = true in the configuration, and a \
             database that can be read (see the log)";
        self.demand.as_ref().ok_or_else(|| ApiError::new(ErrorCode::Unavailable, off))
    }
}

fn unknown(vm: &str) -> ApiError {
    ApiError::not_found(format!("machine `{vm}` was not seen running in the last 7 days; see `prestagectl vm list`"))
}

/// A machine that was measured.
fn measured(demand: &Demand, vm: &str) -> Result<Uuid, ApiError> {
    demand.state.lock().find(vm).ok_or_else(|| unknown(vm))
}

pub(super) fn quantiles([p05, p50, p90, p95]: [f64; 4]) -> Quantiles {
    Quantiles { p05, p50, p90, p95 }
}

fn abilities(abilities: &Abilities) -> Vec<Ability> {
    let of = |what: &str, can: &Can| Ability {
        what: what.to_owned(),
        possible: can.is_yes(),
        reason: can.reason().unwrap_or_default().to_owned(),
    };
    let yes = |what: &str, reason: String| Ability { what: what.to_owned(), possible: true, reason };
    let mut list = vec![
        of("balloon", &abilities.balloon),
        of("shrink", &abilities.shrink),
        of("vcpu_add", &abilities.vcpus.add),
        of("vcpu_remove", &abilities.vcpus.remove),
        of("guest_agent", &abilities.agent),
    ];
    list.extend(abilities.devices.iter().map(|device| yes("virtio_mem", device.alias.clone())));
    list.extend(abilities.disks.iter().map(|disk| of(&format!("limit {}", disk.target), &disk.limits)));
    list.extend(abilities.nics.iter().map(|nic| of(&format!("limit {}", nic.device), &nic.limits)));
    list.extend(abilities.notes.iter().map(|note| yes("note", note.clone())));
    list
}

fn shown(machine: &Machine) -> VmPolicyShown {
    VmPolicyShown {
        uuid: machine.uuid.to_string(),
        name: machine.name.clone(),
        set: machine.own_policy,
        policy: machine.policy.clone(),
        abilities: machine.abilities.as_ref().map(abilities).unwrap_or_default(),
        notes: machine.odd_bounds(),
    }
}

impl Handle {
    /// What is done about a machine's swapped pages from now on.
    fn tell_pages(&self, vm: Uuid, mode: Option<Mode>, floor: Option<f64>) {
        if let Some(memory) = &self.0.memory {
            memory.policy(vm, mode, floor);
        }
    }

    /// A machine that libvirt knows, running or not.
    async fn defined(&self, vm: &str) -> Result<(Uuid, String), ApiError> {
        if let Some(demand) = &self.0.demand {
            let state = demand.state.lock();
            if let Some(machine) = state.find(vm).and_then(|uuid| state.machines.get(&uuid)) {
                return Ok((machine.uuid, machine.name.clone()));
            }
        }
        let known = super::machines::get(&self.0, vm).await?;
        let uuid =
            Uuid::parse_str(&known.uuid).map_err(|error| ApiError::internal(format!("{}: {error}", known.uuid)))?;
        Ok((uuid, known.name))
    }

    fn policy_of(&self, uuid: Uuid, name: String) -> Result<VmPolicyShown, ApiError> {
        let state = self.0.demand()?.state.lock();
        Ok(match state.machines.get(&uuid) {
            Some(machine) => shown(machine),
            None => VmPolicyShown {
                uuid: uuid.to_string(),
                name,
                set: state.policies.contains_key(&uuid),
                policy: state.policies.get(&uuid).cloned().unwrap_or_default(),
                abilities: Vec::new(),
                notes: Vec::new(),
            },
        })
    }
}

impl DemandControl for Handle {
    fn demand(&self) -> Reply<'_, DemandStatus> {
        Box::pin(async {
            let Some(demand) = &self.0.demand else {
                let mut notes: Vec<String> = self.0.demand_trouble.iter().cloned().collect();
                if self.0.hypervisor.is_none() && self.0.config.lock().demand.enabled {
                    notes.push("libvirt.enabled is false in the configuration: no machine is seen".to_owned());
                }
                return Ok(DemandStatus { notes, ..DemandStatus::default() });
            };
            let store = demand.store.clone();
            let series = blocking(move || store.series_status()).await?;
            let state = demand.state.lock();
            let (host, turns) = (&state.host, &state.turns);
            let mut notes: Vec<String> = turns.trouble.iter().map(|trouble| format!("libvirt: {trouble}")).collect();
            notes.extend(state.unrecorded.trouble());
            notes.extend(series.as_ref().err().map(|error| format!("what is kept of measurements: {error}")));
            let waits =
                |of: fn(&prestage_integration::pressure::Pressure) -> Option<f64>| host.pressure.as_ref().and_then(of);
            if host.pressure.is_none() && turns.last_unix_ms.is_some() {
                notes.push("the kernel tells no pressure (PSI): what waits is not seen".to_owned());
            }
            notes.extend(state.left_out().iter().map(|left| format!("{}: {}", left.name, left.reason)));
            Ok(DemandStatus {
                enabled: true,
                machines: turns.machines,
                interval_ms: u64::try_from(self.0.config.lock().demand.every.as_millis()).unwrap_or(u64::MAX),
                last_unix_ms: turns.last_unix_ms,
                last_took_us: u64::try_from(turns.last_took.as_micros()).unwrap_or(u64::MAX),
                missed_rounds: turns.missed,
                host_cpus: host.cpus,
                host_memory_bytes: host.memory_bytes,
                host_available_bytes: host.memory_available_bytes,
                host_cpu_pressure: waits(|pressure| pressure.cpu.map(|stall| stall.some.avg10)),
                host_memory_pressure: waits(|pressure| pressure.memory.map(|stall| stall.some.avg10)),
                series_bytes: series.map_or(0, |series| series.size_bytes()),
                notes,
                anomalies: state.anomalies(),
            })
        })
    }

    fn policy(&self, vm: String) -> Reply<'_, VmPolicyShown> {
        Box::pin(async move {
            self.0.demand()?;
            let (uuid, name) = self.defined(&vm).await?;
            self.policy_of(uuid, name)
        })
    }

    fn policy_set(&self, vm: String, policy: VmPolicy) -> Reply<'_, VmPolicyShown> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let (uuid, name) = self.defined(&vm).await?;
            let checked = demand.state.lock().check_policy(uuid, &policy, unix_ms() / 1000);
            checked.map_err(ApiError::invalid)?;
            let data = serde_json::to_string(&policy).map_err(|error| ApiError::internal(error.to_string()))?;
            let row = PolicyRow { vm: uuid.to_string(), data, changed_unix_ms: unix_ms() };
            demand.store.set_policy(row).await.map_err(|error| store_error(&error))?;
            self.tell_pages(uuid, policy.pages, policy.pages_floor);
            demand.state.lock().set_policy(uuid, Some(policy));
            self.policy_of(uuid, name)
        })
    }

    fn policy_remove(&self, vm: String) -> Reply<'_, ()> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let (uuid, _) = self.defined(&vm).await?;
            match demand.store.remove_policy(&uuid.to_string()).await {
                // It had the default.
                Ok(()) | Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(store_error(&error)),
            }
            self.tell_pages(uuid, None, None);
            demand.state.lock().set_policy(uuid, None);
            Ok(())
        })
    }

    fn forecast(&self, vm: String, query: ForecastQuery) -> Reply<'_, Forecast> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let uuid = measured(demand, &vm)?;
            let resource = query.resource;
            let mut shown = {
                let mut state = demand.state.lock();
                let forecast = state.forecast(uuid, resource, unix_ms() / 1000, query.horizon_s);
                let (forecast, foreseen) = forecast.ok_or_else(|| {
                    let detail = format!(
                        "too little was measured of the {} of `{vm}`; wait a minute, or see `prestagectl demand` for why not",
                        resource.name()
                    );
                    ApiError::new(ErrorCode::NotPossible, detail)
                })?;
                let machine = state.machines.get(&uuid).ok_or_else(|| unknown(&vm))?;
                let rests: Vec<String> =
                    std::iter::once(basis(&forecast.basis, forecast.step_s)).chain(foreseen).collect();
                Forecast {
                    uuid: uuid.to_string(),
                    name: machine.name.clone(),
                    resource,
                    at_unix_ms: forecast.origin_s * 1000,
                    step_s: forecast.step_s,
                    steps: forecast.steps.iter().map(|step| quantiles(step.0)).collect(),
                    peak: quantiles(forecast.peak.0),
                    capped: forecast.capped,
                    basis: rests.join("; "),
                    allocated: machine.allocated(resource),
                    measured: Vec::new(),
                }
            };
            let (store, step_s) = (demand.store.clone(), u64::from(shown.step_s));
            let to_s = unix_ms() / 1000;
            let before = blocking(move || {
                store.series(&subject(uuid), resource.name(), to_s.saturating_sub(MEASURED * step_s), to_s, step_s)
            });
            let before = before.await?.map_err(|error| store_error(&error))?;
            let point = |point: &crate::store::series::Point| Measured {
                at_unix_ms: point.at_s * 1000,
                mean: point.mean,
                max: point.max,
            };
            shown.measured = before.points.iter().map(point).collect();
            Ok(shown)
        })
    }

    fn recommendations(&self, vm: Option<String>) -> Reply<'_, AdviceList> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let only = vm.map(|vm| measured(demand, &vm)).transpose()?;
            let mut state = demand.state.lock();
            if let Some(why) = state.blind(unix_ms() / 1000) {
                return Err(ApiError::new(ErrorCode::Unavailable, why));
            }
            let orders = state.weigh(unix_ms() / 1000);
            let wanted = orders.into_iter().filter(|order| only.is_none_or(|only| only == order.uuid));
            let recommendations = wanted.map(|order| Advice {
                uuid: order.uuid.to_string(),
                name: order.name,
                resource: order.resource,
                mode: order.mode,
                kind: kind(order.decision.kind).to_owned(),
                now: order.decision.before,
                to: order.decision.to,
                used: Some(order.decision.numbers.used),
                peak: order.outlook.map(quantiles),
                why: order.decision.to_string(),
            });
            let recommendations = recommendations.collect();
            let left_out = match only {
                None => state.left_out().to_vec(),
                Some(only) => {
                    let name = state.machines.get(&only).map(|machine| machine.name.clone());
                    state.left_out().iter().filter(|left| Some(&left.name) == name.as_ref()).cloned().collect()
                }
            };
            Ok(AdviceList { recommendations, left_out })
        })
    }

    fn decisions(&self, query: DecisionsQuery) -> Reply<'_, DecisionList> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let vm = match &query.vm {
                // One that is gone can still be asked for by its UUID.
                Some(vm) => match Uuid::parse_str(vm) {
                    Ok(uuid) => Some(uuid),
                    Err(_) => Some(self.defined(vm).await?.0),
                },
                None => None,
            };
            let limit = query.limit.unwrap_or(DECISIONS);
            let store = demand.store.clone();
            let rows = blocking(move || {
                let after = match query.before {
                    None => None,
                    // One that retention removed meanwhile: there is nothing older.
                    Some(id) => match store.decision_time(id)? {
                        Some(at_us) => Some((at_us, id)),
                        None => return Ok(Vec::new()),
                    },
                };
                let vm = vm.map(|vm| vm.to_string());
                store.decisions(&Decisions { vm, after, limit, ..Decisions::default() })
            });
            let rows = rows.await?.map_err(|error| store_error(&error))?;
            let full = rows.len() == limit as usize;
            let next = rows.last().filter(|_| full).map(|row| row.id);
            let state = demand.state.lock();
            let name = |uuid: &str| {
                let machine = Uuid::parse_str(uuid).ok().and_then(|uuid| state.machines.get(&uuid));
                machine.map_or_else(|| uuid.to_owned(), |machine| machine.name.clone())
            };
            let decisions = rows.into_iter().map(|row| decision(&row, name(&row.decision.vm))).collect();
            Ok(DecisionList { decisions, next })
        })
    }

    fn reservations(&self) -> Reply<'_, ReservationList> {
        Box::pin(async {
            let reservations = self.0.demand()?.state.lock().promised(unix_ms() / 1000);
            Ok(ReservationList { reservations })
        })
    }

    fn reservation_add(&self, request: ReservationRequest) -> Reply<'_, Reservation> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let vm = match &request.vm {
                Some(vm) => Some(self.defined(vm).await?.0),
                None => None,
            };
            let now_s = unix_ms() / 1000;
            if demand.state.lock().host.cpus == 0 {
                let early = "what this host has is not measured yet; ask again in a moment";
                return Err(ApiError::new(ErrorCode::Unavailable, early));
            }
            let admitted = demand.state.lock().reserve(request.clone(), vm, now_s);
            match admitted {
                Ok((reservation, row)) => {
                    let event = demand.promise_event(vm, &reservation, true);
                    if let Err(error) = demand.store.set_reservation(row, Some(event)).await {
                        // Promised but forgotten at the next restart would be a trap.
                        demand.state.lock().unreserve(reservation.id, now_s);
                        return Err(store_error(&error));
                    }
                    demand.told.notify_one();
                    Ok(reservation)
                }
                Err(refusal) => {
                    let refused = Reservation { request, why: refusal.to_string(), ..Reservation::default() };
                    let event = demand.promise_event(vm, &refused, false);
                    demand.store.record_event(event).await.map_err(|error| store_error(&error))?;
                    demand.told.notify_one();
                    Err(ApiError::new(ErrorCode::NotPossible, refusal.to_string()))
                }
            }
        })
    }

    fn reservation_cancel(&self, id: i64) -> Reply<'_, ()> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let row = demand.state.lock().unreserve(id, unix_ms() / 1000);
            let row = row.ok_or_else(|| ApiError::not_found(format!("there is no reservation {id}, or it is over")))?;
            demand.store.set_reservation(row, None).await.map_err(|error| store_error(&error))
        })
    }

    fn executions(&self, query: ExecutionsQuery) -> Reply<'_, ExecutionList> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let vm = query.vm.as_deref().map(|vm| measured(demand, vm)).transpose()?;
            Ok(demand.state.lock().executions(&query, vm))
        })
    }

    fn execution_profiles(&self, query: ProfilesQuery) -> Reply<'_, ProfileList> {
        Box::pin(async move { Ok(super::programs::profiles(&self.0.demand()?.state.lock(), &query, unix_ms() / 1000)) })
    }

    fn execution_start(&self, request: ExecutionStart) -> Reply<'_, Execution> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let uuid = measured(demand, &request.vm)?;
            demand.execution_start(uuid, request).await
        })
    }

    fn execution_end(&self, id: i64) -> Reply<'_, Execution> {
        Box::pin(async move { self.0.demand()?.execution_end(id).await })
    }

    fn events(&self) -> Reply<'_, EventList> {
        Box::pin(async {
            let state = self.0.demand()?.state.lock();
            Ok(EventList { events: state.calendar.list(unix_ms() / 1000) })
        })
    }

    fn event_add(&self, request: EventRequest) -> Reply<'_, Event> {
        Box::pin(async move {
            let vm = match &request.vm {
                Some(vm) => Some(self.defined(vm).await?.0),
                None => None,
            };
            self.0.demand()?.event_add(request, vm).await
        })
    }

    fn event_remove(&self, id: i64) -> Reply<'_, ()> {
        Box::pin(async move { self.0.demand()?.event_remove(id).await })
    }

    fn activity(&self, vm: String) -> Reply<'_, VmActivity> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            let (uuid, name) = self.defined(&vm).await?;
            Ok(demand.state.lock().activity(uuid, name, unix_ms() / 1000))
        })
    }

    fn activity_set(&self, vm: String, request: ActivityRequest) -> Reply<'_, VmActivity> {
        Box::pin(async move {
            let demand = self.0.demand()?;
            demand.activity_set(self.defined(&vm).await?, request).await
        })
    }

    fn webhooks(&self) -> Reply<'_, WebhookList> {
        Box::pin(async { super::webhooks::status(&self.0).await })
    }
}

fn kind(kind: crate::planner::Kind) -> &'static str {
    use crate::planner::Kind;
    match kind {
        Kind::Raise => "raise",
        Kind::Lower => "lower",
        Kind::Hold => "hold",
        Kind::Refuse => "refuse",
    }
}

fn basis(basis: &prestage_predictor::demand::Basis, step_s: u32) -> String {
    let names = ["model", "last value", "day before", "week before", "histogram", "program"];
    let mut shares: Vec<(&str, f32)> =
        names.into_iter().zip(basis.shares).filter(|(_, share)| *share >= 0.05).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    let shares: Vec<String> = shares.iter().map(|(name, share)| format!("{name} {:.0} %", 100.0 * share)).collect();
    let history = std::time::Duration::from_secs(u64::from(basis.history) * u64::from(step_s));
    let history = crate::config::units::human_duration(history);
    format!("{history} of history, {} forecasts checked; {}", basis.rehearsed, shares.join(", "))
}

fn decision(row: &DecisionRow, name: String) -> Decision {
    let made = &row.decision;
    Decision {
        id: row.id,
        at_unix_ms: made.at_us / 1000,
        uuid: made.vm.clone(),
        name,
        resource: Resource::ALL.into_iter().find(|of| resource_of(*of) == made.resource).unwrap_or(Resource::Cpu),
        mode: match made.mode {
            crate::store::demand::Mode::Observe => Mode::Observe,
            crate::store::demand::Mode::Recommend => Mode::Recommend,
            crate::store::demand::Mode::Act => Mode::Act,
        },
        kind: made.kind.name().to_owned(),
        before: made.before.unwrap_or(0.0),
        asked: made.asked.unwrap_or(0.0),
        got: row.got,
        outcome: match row.outcome {
            Outcome::Proposed => "not_acted".to_owned(),
            other => other.name().to_owned(),
        },
        took_ms: row.took_ms,
        why: made.why.clone(),
    }
}
