//! Demand of the daemon that answers with fixtures.

use prestage_integration::api::demand::*;
use prestage_integration::api::{ApiError, ErrorCode, Reply};

use super::fake::{Fake, done};

const AT: u64 = 1_795_316_645_000;
const GIB: f64 = (1u64 << 30) as f64;

fn quantiles(scale: f64) -> Quantiles {
    Quantiles { p05: scale, p50: 1.5 * scale, p90: 2.0 * scale, p95: 2.5 * scale }
}

fn shown(vm: &str, policy: VmPolicy) -> VmPolicyShown {
    let ability = |what: &str, possible, reason: &str| Ability { what: what.into(), possible, reason: reason.into() };
    let odd = if policy == VmPolicy::default() { vec![] } else { vec!["memory: max is odd".into()] };
    VmPolicyShown {
        uuid: "11111111-2222-3333-4444-555555555555".into(),
        name: vm.into(),
        set: policy != VmPolicy::default(),
        policy,
        abilities: vec![
            ability("balloon", true, ""),
            ability("vcpu_add", false, "the definition has no further vCPUs; raise <vcpu> at the next start"),
        ],
        notes: odd,
    }
}

fn decision(id: i64, outcome: &str) -> Decision {
    Decision {
        id,
        at_unix_ms: AT,
        uuid: String::new(),
        name: "web1".into(),
        resource: Resource::Memory,
        mode: if outcome == "not_acted" { Mode::Observe } else { Mode::Act },
        kind: "raise".into(),
        before: GIB,
        asked: 2.0 * GIB,
        got: (outcome != "not_acted").then_some(1.5 * GIB),
        outcome: outcome.into(),
        took_ms: (outcome != "not_acted").then_some(1200),
        why: "2.0 GiB foreseen, 900 MiB in use".into(),
    }
}

impl DemandControl for Fake {
    fn demand(&self) -> Reply<'_, DemandStatus> {
        let anomaly = Anomaly {
            uuid: String::new(),
            name: "db\u{1b}[31m".into(),
            resource: Resource::Memory,
            kind: "leak".into(),
            since_unix_ms: AT,
            measured: 7.0 * GIB,
            expected: quantiles(GIB),
            evidence: "grew by 1.0 GiB an hour for 5 hours".into(),
        };
        done(Ok(DemandStatus {
            enabled: true,
            machines: 2,
            interval_ms: 1000,
            host_cpus: 8,
            host_memory_bytes: 32 << 30,
            host_available_bytes: 20 << 30,
            host_cpu_pressure: Some(0.012),
            anomalies: vec![anomaly],
            notes: vec!["no cgroup v2: no pressure by machine".into()],
            ..DemandStatus::default()
        }))
    }

    fn policy(&self, vm: String) -> Reply<'_, VmPolicyShown> {
        done(match vm.as_str() {
            "none" => Err(ApiError::not_found("there is no machine `none`")),
            _ => Ok(shown(&vm, VmPolicy::default())),
        })
    }

    fn policy_set(&self, vm: String, policy: VmPolicy) -> Reply<'_, VmPolicyShown> {
        self.note(format!("policy {vm} {}", serde_json::to_string(&policy).unwrap()));
        done(Ok(shown(&vm, policy)))
    }

    fn policy_remove(&self, vm: String) -> Reply<'_, ()> {
        self.note(format!("default policy {vm}"));
        done(Ok(()))
    }

    fn forecast(&self, vm: String, query: ForecastQuery) -> Reply<'_, Forecast> {
        if vm == "new" {
            return done(Err(ApiError::new(
                ErrorCode::NotPossible,
                "machine `new` was measured for 3 s; wait a minute",
            )));
        }
        let steps = (1..=12).map(|step| quantiles(f64::from(step) / 12.0 * GIB)).collect();
        done(Ok(Forecast {
            uuid: String::new(),
            name: vm,
            resource: query.resource,
            at_unix_ms: AT,
            step_s: query.horizon_s / 12,
            steps,
            peak: quantiles(GIB),
            capped: true,
            basis: "3 days, empirical quantiles".into(),
            allocated: Some(2.0 * GIB),
            measured: (0..24).map(|at| Measured { at_unix_ms: at, mean: 0.5 * GIB, max: GIB }).collect(),
        }))
    }

    fn recommendations(&self, vm: Option<String>) -> Reply<'_, AdviceList> {
        let advice = Advice {
            uuid: String::new(),
            name: vm.unwrap_or_else(|| "web1".into()),
            resource: Resource::Cpu,
            mode: Mode::Recommend,
            kind: "raise".into(),
            now: 1.0,
            to: 2.0,
            used: Some(0.9),
            peak: Some(quantiles(0.7)),
            why: "1.75 cores foreseen".into(),
        };
        done(Ok(AdviceList { recommendations: vec![advice], left_out: vec![] }))
    }

    fn decisions(&self, query: DecisionsQuery) -> Reply<'_, DecisionList> {
        let next = (query.limit == Some(2)).then_some(8);
        done(Ok(DecisionList { decisions: vec![decision(9, "partial"), decision(8, "not_acted")], next }))
    }

    fn reservations(&self) -> Reply<'_, ReservationList> {
        done(Ok(ReservationList::default()))
    }

    fn reservation_add(&self, request: ReservationRequest) -> Reply<'_, Reservation> {
        if request.memory_bytes > 64 << 30 {
            let why = "64 GiB more are needed than there are on Monday from 3:00 to 4:00";
            return done(Err(ApiError::new(ErrorCode::NotPossible, why)));
        }
        let notes = vec!["memory: nothing is changed: mode observe; the room is kept".into()];
        done(Ok(Reservation { id: 3, request, state: "waiting".into(), why: "fits: 12 GiB are left".into(), notes }))
    }

    fn reservation_cancel(&self, id: i64) -> Reply<'_, ()> {
        done(if id == 3 { Ok(()) } else { Err(ApiError::not_found(format!("there is no reservation {id}"))) })
    }

    fn executions(&self, query: ExecutionsQuery) -> Reply<'_, ExecutionList> {
        let start = ExecutionStart { vm: "web1".into(), program: "report".into(), ..ExecutionStart::default() };
        let execution = Execution { id: 5, start, started_unix_ms: AT, known_runs: 3, ..Execution::default() };
        let next = (query.limit == Some(1)).then_some(5);
        let executions = if query.after == Some(5) { vec![] } else { vec![execution] };
        done(Ok(ExecutionList { executions, next }))
    }

    fn execution_profiles(&self, query: ProfilesQuery) -> Reply<'_, ProfileList> {
        self.note(format!("profiles {:?} {:?} {:?}", query.program, query.after, query.limit));
        if query.program.as_deref() == Some("none") {
            return done(Ok(ProfileList::default()));
        }
        // Two pages, whatever is asked for; the cursor is as odd as they are.
        if query.after.is_some() {
            let vm = "11111111-2222-3333-4444-555555555555".to_owned();
            let event =
                ExecutionProfile { program: "month end".into(), event_of: Some(vm), starts: 2, ..Default::default() };
            return done(Ok(ProfileList { profiles: vec![event], next: None }));
        }
        let after_s = Quantiles { p05: 20.0, p50: 30.0, p90: 60.0, p95: 90.0 };
        let load = Follower { program: "load".into(), seen: 3, of: 4, probability: 0.7, after_s, beside: false };
        let mut by_hour = vec![0; 24];
        (by_hour[3], by_hour[15]) = (3, 1);
        let report = ExecutionProfile {
            program: "report".into(),
            tags: vec!["nightly".into()],
            input: Some((1u64 << 30).to_string()),
            starts: 4,
            runs_a_day: Some(1.0),
            by_hour,
            duration_s: Some(quantiles(60.0)),
            known_runs: 3,
            rise: [(Resource::Memory, quantiles(GIB))].into(),
            followers: vec![load],
            ..Default::default()
        };
        done(Ok(ProfileList { profiles: vec![report], next: Some("report\u{1e}nightly".into()) }))
    }

    fn activity(&self, vm: String) -> Reply<'_, VmActivity> {
        done(Ok(VmActivity { name: vm, uuid: "uuid".into(), most: 100.0, ..VmActivity::default() }))
    }

    fn activity_set(&self, vm: String, request: ActivityRequest) -> Reply<'_, VmActivity> {
        self.note(format!("{vm} {request:?}"));
        let at_unix_ms = request.at_unix_ms.unwrap_or(AT);
        let until_unix_ms = at_unix_ms + 1000 * u64::from(request.duration_s.unwrap_or(0));
        let step = ActivityStep { at_unix_ms, until_unix_ms, activity: request.activity };
        let none = VmActivity::default();
        done(Ok(VmActivity { name: vm, uuid: "uuid".into(), most: 100.0, announced: vec![step], ..none }))
    }

    fn execution_start(&self, start: ExecutionStart) -> Reply<'_, Execution> {
        self.note(format!("{start:?}"));
        done(Ok(Execution { id: 5, start, started_unix_ms: AT, ended_unix_ms: None, known_runs: 3 }))
    }

    fn execution_end(&self, id: i64) -> Reply<'_, Execution> {
        done(Ok(Execution { id, started_unix_ms: AT, ended_unix_ms: Some(AT + 90_000), ..Execution::default() }))
    }

    fn events(&self) -> Reply<'_, EventList> {
        done(Ok(EventList::default()))
    }

    fn event_add(&self, request: EventRequest) -> Reply<'_, Event> {
        done(Ok(Event { id: 2, request, next_unix_ms: Some(AT) }))
    }

    fn event_remove(&self, _: i64) -> Reply<'_, ()> {
        done(Ok(()))
    }

    fn webhooks(&self) -> Reply<'_, WebhookList> {
        let webhook = WebhookStatus {
            url: "https://manager/hook".into(),
            waiting: 2,
            last_error: Some("status 503".into()),
            ..WebhookStatus::default()
        };
        done(Ok(WebhookList { webhooks: vec![webhook] }))
    }
}
