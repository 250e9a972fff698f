//! Routes of demand: policies, forecasts, decisions, reservations, executions, events, activity, webhooks.

use super::{
    Answer, ApiError, Asked, At, Body, Json, OpenApiRouter, Problem, Response, Shared, State, StatusCode, change,
    header, routes,
};
use crate::api::demand::{
    ActivityRequest, AdviceList, DecisionList, DecisionsQuery, DemandStatus, Event, EventList, EventRequest, Execution,
    ExecutionList, ExecutionStart, ExecutionsQuery, Forecast, ForecastQuery, ProfileList, ProfilesQuery, Reservation,
    ReservationList, ReservationRequest, VmActivity, VmPolicy, VmPolicyShown, WebhookList,
};
use axum::response::IntoResponse;
use serde::Deserialize;

pub(super) fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(demand))
        .routes(routes!(policy, policy_set, policy_remove))
        .routes(routes!(forecast))
        .routes(routes!(recommendations))
        .routes(routes!(decisions))
        .routes(routes!(reservations, reservation_add))
        .routes(routes!(reservation_cancel))
        .routes(routes!(executions, execution_start))
        .routes(routes!(execution_end))
        .routes(routes!(execution_profiles))
        .routes(routes!(events, event_add))
        .routes(routes!(event_remove))
        .routes(routes!(activity, activity_set))
        .routes(routes!(webhooks))
}

/// Whether demand is measured, and what is unusual now.
#[utoipa::path(get, path = "/v1/demand", tag = "demand",
    responses((status = 200, body = DemandStatus), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn demand(State(control): State<Shared>) -> Answer<DemandStatus> {
    control.demand().await.map(Json)
}

/// What may be done to a machine, and what can be.
#[utoipa::path(get, path = "/v1/vms/{vm}/policy", tag = "demand", params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = VmPolicyShown), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn policy(State(control): State<Shared>, At(vm): At<String>) -> Answer<VmPolicyShown> {
    control.policy(vm).await.map(Json)
}

/// Sets a machine's policy; it is kept over restarts.
#[utoipa::path(put, path = "/v1/vms/{vm}/policy", tag = "demand", request_body = VmPolicy,
    params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = VmPolicyShown), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn policy_set(
    State(control): State<Shared>,
    At(vm): At<String>,
    Body(policy): Body<VmPolicy>,
) -> Answer<VmPolicyShown> {
    policy.validate().map_err(ApiError::invalid)?;
    change(async move { control.policy_set(vm, policy).await }).await.map(Json)
}

/// Gives a machine the default policy again.
#[utoipa::path(delete, path = "/v1/vms/{vm}/policy", tag = "demand", params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn policy_remove(State(control): State<Shared>, At(vm): At<String>) -> Result<StatusCode, ApiError> {
    change(async move { control.policy_remove(vm).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a machine is expected to use of a resource.
#[utoipa::path(get, path = "/v1/vms/{vm}/forecast", tag = "demand",
    params(("vm" = String, Path, description = "Name or UUID"), ForecastQuery),
    responses((status = 200, body = Forecast), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn forecast(
    State(control): State<Shared>,
    At(vm): At<String>,
    Asked(query): Asked<ForecastQuery>,
) -> Answer<Forecast> {
    query.validate().map_err(ApiError::invalid)?;
    control.forecast(vm, query).await.map(Json)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfVm {
    vm: Option<String>,
}

/// What the planner would change now, whatever the mode.
#[utoipa::path(get, path = "/v1/recommendations", tag = "demand",
    params(("vm" = Option<String>, Query, description = "Name or UUID; default: all machines")),
    responses((status = 200, body = AdviceList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn recommendations(State(control): State<Shared>, Asked(query): Asked<OfVm>) -> Answer<AdviceList> {
    control.recommendations(query.vm).await.map(Json)
}

/// What was decided, with its reason and what became of it; latest first.
#[utoipa::path(get, path = "/v1/decisions", tag = "demand", params(DecisionsQuery),
    responses((status = 200, body = DecisionList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn decisions(State(control): State<Shared>, Asked(query): Asked<DecisionsQuery>) -> Answer<DecisionList> {
    if query.limit.is_some_and(|limit| !(1..=1000).contains(&limit)) {
        return Err(ApiError::invalid("`limit` is 1 to 1000"));
    }
    control.decisions(query).await.map(Json)
}

/// Promises that hold or are to come, and those that ended lately.
#[utoipa::path(get, path = "/v1/reservations", tag = "demand",
    responses((status = 200, body = ReservationList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn reservations(State(control): State<Shared>) -> Answer<ReservationList> {
    control.reservations().await.map(Json)
}

/// Promises resources for a time window, if they fit beside what is promised and forecast.
#[utoipa::path(post, path = "/v1/reservations", tag = "demand", request_body = ReservationRequest,
    responses((status = 201, body = Reservation), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn reservation_add(
    State(control): State<Shared>,
    Body(request): Body<ReservationRequest>,
) -> Result<Response, ApiError> {
    request.validate().map_err(ApiError::invalid)?;
    let reservation = change(async move { control.reservation_add(request).await }).await?;
    let location = format!("/v1/reservations/{}", reservation.id);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(reservation)).into_response())
}

/// Takes a promise back.
#[utoipa::path(delete, path = "/v1/reservations/{id}", tag = "demand", params(("id" = i64, Path, description = "Id of the reservation")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn reservation_cancel(State(control): State<Shared>, At(id): At<i64>) -> Result<StatusCode, ApiError> {
    change(async move { control.reservation_cancel(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Programs that run in machines, as far as they were announced.
#[utoipa::path(get, path = "/v1/executions", tag = "demand", params(ExecutionsQuery),
    responses((status = 200, body = ExecutionList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn executions(State(control): State<Shared>, Asked(query): Asked<ExecutionsQuery>) -> Answer<ExecutionList> {
    query.validate().map_err(ApiError::invalid)?;
    control.executions(query).await.map(Json)
}

/// What is known of programs and events: how often and when they run, how long they take, what they use, what follows them.
#[utoipa::path(get, path = "/v1/executions/profiles", tag = "demand", params(ProfilesQuery),
    responses((status = 200, body = ProfileList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn execution_profiles(State(control): State<Shared>, Asked(query): Asked<ProfilesQuery>) -> Answer<ProfileList> {
    query.validate().map_err(ApiError::invalid)?;
    control.execution_profiles(query).await.map(Json)
}

/// Announces that a program begins in a machine: what it needed before is made ready.
#[utoipa::path(post, path = "/v1/executions", tag = "demand", request_body = ExecutionStart,
    responses((status = 201, body = Execution), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn execution_start(
    State(control): State<Shared>,
    Body(request): Body<ExecutionStart>,
) -> Result<Response, ApiError> {
    request.validate().map_err(ApiError::invalid)?;
    let execution = change(async move { control.execution_start(request).await }).await?;
    Ok((StatusCode::CREATED, Json(execution)).into_response())
}

/// Announces that a program ended; its profile learns from it.
#[utoipa::path(post, path = "/v1/executions/{id}/end", tag = "demand", params(("id" = i64, Path, description = "Id of the execution")),
    responses((status = 200, body = Execution), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn execution_end(State(control): State<Shared>, At(id): At<i64>) -> Answer<Execution> {
    change(async move { control.execution_end(id).await }).await.map(Json)
}

/// What is known to come.
#[utoipa::path(get, path = "/v1/events", tag = "demand",
    responses((status = 200, body = EventList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn events(State(control): State<Shared>) -> Answer<EventList> {
    control.events().await.map(Json)
}

/// Tells of something that demand may follow, once or by a schedule.
#[utoipa::path(post, path = "/v1/events", tag = "demand", request_body = EventRequest,
    responses((status = 201, body = Event), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn event_add(State(control): State<Shared>, Body(request): Body<EventRequest>) -> Result<Response, ApiError> {
    request.validate().map_err(ApiError::invalid)?;
    let event = change(async move { control.event_add(request).await }).await?;
    Ok((StatusCode::CREATED, Json(event)).into_response())
}

/// Forgets an event.
#[utoipa::path(delete, path = "/v1/events/{id}", tag = "demand", params(("id" = i64, Path, description = "Id of the event")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn event_remove(State(control): State<Shared>, At(id): At<i64>) -> Result<StatusCode, ApiError> {
    change(async move { control.event_remove(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What was told of users' activity in a machine.
#[utoipa::path(get, path = "/v1/vms/{vm}/activity", tag = "demand", params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = VmActivity), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn activity(State(control): State<Shared>, At(vm): At<String>) -> Answer<VmActivity> {
    control.activity(vm).await.map(Json)
}

/// Tells how much users do in a machine, now or from a time on: forecasts follow it as far as demand did before.
#[utoipa::path(post, path = "/v1/vms/{vm}/activity", tag = "demand", request_body = ActivityRequest,
    params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = VmActivity), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn activity_set(
    State(control): State<Shared>,
    At(vm): At<String>,
    Body(request): Body<ActivityRequest>,
) -> Answer<VmActivity> {
    request.validate().map_err(ApiError::invalid)?;
    change(async move { control.activity_set(vm, request).await }).await.map(Json)
}

/// Where VM managers are told, and how that goes.
#[utoipa::path(get, path = "/v1/webhooks", tag = "demand",
    responses((status = 200, body = WebhookList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn webhooks(State(control): State<Shared>) -> Answer<WebhookList> {
    control.webhooks().await.map(Json)
}
