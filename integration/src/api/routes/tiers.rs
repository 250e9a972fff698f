//! Routes of the tiers' upkeep.

use super::{Answer, ApiError, Body, Json, OpenApiRouter, Problem, Shared, State, change, routes};
use crate::api::tiers::{ResizeRequest, Resized, Service, ServiceRequest};

pub(super) fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(cache_resize)).routes(routes!(cache_drain)).routes(routes!(cache_resume))
}

/// Gives the tiers another size, until the next start: all that is asked for, or nothing. Guests are served meanwhile.
#[utoipa::path(post, path = "/v1/cache/resize", tag = "cache", request_body = ResizeRequest,
    responses((status = 200, body = Resized), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_resize(State(control): State<Shared>, Body(request): Body<ResizeRequest>) -> Answer<Resized> {
    request.validate().map_err(ApiError::invalid)?;
    change(async move { control.cache_resize(request).await }).await.map(Json)
}

/// Takes tiers out of service: they give their memory back, their file or device is closed, what they hold is forgotten.
#[utoipa::path(post, path = "/v1/cache/drain", tag = "cache", request_body = ServiceRequest,
    responses((status = 200, body = Service), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_drain(State(control): State<Shared>, Body(request): Body<ServiceRequest>) -> Answer<Service> {
    request.validate().map_err(ApiError::invalid)?;
    change(async move { control.cache_drain(request).await }).await.map(Json)
}

/// Brings tiers back into service, empty.
#[utoipa::path(post, path = "/v1/cache/resume", tag = "cache", request_body = ServiceRequest,
    responses((status = 200, body = Service), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_resume(State(control): State<Shared>, Body(request): Body<ServiceRequest>) -> Answer<Service> {
    request.validate().map_err(ApiError::invalid)?;
    change(async move { control.cache_resume(request).await }).await.map(Json)
}
