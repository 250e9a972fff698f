//! Demand over the socket: what is refused before the daemon hears of it, and how answers look.

use serde_json::json;

use super::*;

impl demand::DemandControl for Fake {
    fn demand(&self) -> Reply<'_, demand::DemandStatus> {
        no()
    }
    fn policy(&self, _: String) -> Reply<'_, demand::VmPolicyShown> {
        no()
    }
    fn policy_set(&self, name: String, policy: demand::VmPolicy) -> Reply<'_, demand::VmPolicyShown> {
        Box::pin(async { Ok(demand::VmPolicyShown { name, set: true, policy, ..Default::default() }) })
    }
    fn policy_remove(&self, _: String) -> Reply<'_, ()> {
        Box::pin(async { Ok(()) })
    }
    fn forecast(&self, _: String, _: demand::ForecastQuery) -> Reply<'_, demand::Forecast> {
        no()
    }
    fn recommendations(&self, _: Option<String>) -> Reply<'_, demand::AdviceList> {
        no()
    }
    fn decisions(&self, query: demand::DecisionsQuery) -> Reply<'_, demand::DecisionList> {
        Box::pin(async move { Ok(demand::DecisionList { next: query.before, ..Default::default() }) })
    }
    fn reservations(&self) -> Reply<'_, demand::ReservationList> {
        no()
    }
    fn reservation_add(&self, request: demand::ReservationRequest) -> Reply<'_, demand::Reservation> {
        Box::pin(async { Ok(demand::Reservation { id: 7, request, ..Default::default() }) })
    }
    fn reservation_cancel(&self, _: i64) -> Reply<'_, ()> {
        no()
    }
    fn executions(&self, query: demand::ExecutionsQuery) -> Reply<'_, demand::ExecutionList> {
        Box::pin(async move { Ok(demand::ExecutionList { next: query.after, ..Default::default() }) })
    }
    fn execution_profiles(&self, query: demand::ProfilesQuery) -> Reply<'_, demand::ProfileList> {
        Box::pin(async move { Ok(demand::ProfileList { next: query.after, ..Default::default() }) })
    }
    fn execution_start(&self, start: demand::ExecutionStart) -> Reply<'_, demand::Execution> {
        Box::pin(async { Ok(demand::Execution { start, ..Default::default() }) })
    }
    fn execution_end(&self, _: i64) -> Reply<'_, demand::Execution> {
        no()
    }
    fn events(&self) -> Reply<'_, demand::EventList> {
        no()
    }
    fn event_add(&self, request: demand::EventRequest) -> Reply<'_, demand::Event> {
        Box::pin(async { Ok(demand::Event { request, ..Default::default() }) })
    }
    fn event_remove(&self, _: i64) -> Reply<'_, ()> {
        no()
    }
    fn activity(&self, _: String) -> Reply<'_, demand::VmActivity> {
        no()
    }
    fn activity_set(&self, name: String, request: demand::ActivityRequest) -> Reply<'_, demand::VmActivity> {
        Box::pin(async move { Ok(demand::VmActivity { name, activity: request.activity, ..Default::default() }) })
    }
    fn webhooks(&self) -> Reply<'_, demand::WebhookList> {
        no()
    }
}

#[test]
fn a_policy_is_checked_before_the_daemon_sees_it() {
    let server = Server::start(Limits::default());
    let (status, _, reply) = server.request("PUT", "/v1/vms/web/policy", r#"{"mode":"act","priority":80}"#);
    assert_eq!((status, &reply["policy"]["mode"], &reply["policy"]["priority"]), (200, &json!("act"), &json!(80)));
    for bad in [r#"{"mode":"perhaps"}"#, r#"{"priority":101}"#, r#"{"resources":{"gpu":{}}}"#] {
        let (status, _, reply) = server.request("PUT", "/v1/vms/web/policy", bad);
        assert_eq!((status, &reply["code"]), (400, &json!("invalid_request")), "{bad}");
    }
    assert_eq!(server.request("DELETE", "/v1/vms/web/policy", "").0, 204);
}

#[test]
fn a_reservation_tells_where_it_is_and_nonsense_is_refused() {
    let server = Server::start(Limits::default());
    let body = r#"{"vcpus":2,"memory_bytes":1073741824,"from_unix_ms":1,"until_unix_ms":2}"#;
    let (status, head, reply) = server.request("POST", "/v1/reservations", body);
    assert_eq!((status, &reply["id"]), (201, &json!(7)));
    assert!(head.to_ascii_lowercase().contains("location: /v1/reservations/7"), "{head}");
    for bad in [
        r#"{"from_unix_ms":1,"until_unix_ms":2}"#,
        r#"{"vcpus":2,"from_unix_ms":2,"until_unix_ms":2}"#,
        r#"{"vcpus":-1,"from_unix_ms":1,"until_unix_ms":2}"#,
    ] {
        assert_eq!(server.request("POST", "/v1/reservations", bad).0, 400, "{bad}");
    }
}

#[test]
fn horizons_pages_and_events_have_bounds() {
    let server = Server::start(Limits::default());
    for bad in ["/v1/vms/web/forecast?horizon_s=59", "/v1/vms/web/forecast?resource=gpu", "/v1/decisions?limit=0"] {
        assert_eq!(server.request("GET", bad, "").0, 400, "{bad}");
    }
    assert_eq!(server.request("GET", "/v1/decisions?before=12", "").2["next"], json!(12));
    let (status, _, _) = server.request("POST", "/v1/events", r#"{"name":"backup","cron":"0 3 * * *"}"#);
    assert_eq!(status, 201);
    assert_eq!(server.request("POST", "/v1/events", r#"{"name":"backup"}"#).0, 400);
    assert_eq!(server.request("POST", "/v1/executions", r#"{"vm":"web","program":""}"#).0, 400);
}

#[test]
fn activity_is_a_number_of_at_least_nothing() {
    let server = Server::start(Limits::default());
    let (status, _, reply) = server.request("POST", "/v1/vms/web/activity", r#"{"activity":12.5}"#);
    assert_eq!((status, &reply["activity"]), (200, &json!(12.5)));
    for bad in [r#"{"activity":-1}"#, r#"{"activity":1e300}"#, r#"{}"#, r#"{"activity":1,"duration_s":0}"#] {
        assert_eq!(server.request("POST", "/v1/vms/web/activity", bad).0, 400, "{bad}");
    }
}

#[test]
fn executions_and_profiles_come_in_pages() {
    let server = Server::start(Limits::default());
    assert_eq!(server.request("GET", "/v1/executions?after=12", "").2["next"], json!(12));
    assert_eq!(server.request("GET", "/v1/executions/profiles?after=p%1Eq", "").2["next"], json!("p\u{1e}q"));
    for bad in ["/v1/executions?limit=0", "/v1/executions/profiles?limit=1001"] {
        assert_eq!(server.request("GET", bad, "").0, 400, "{bad}");
    }
}
