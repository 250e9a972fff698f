//! Routes of templates.

use super::{
    Answer, ApiError, At, Body, Json, OpenApiRouter, Problem, Response, Shared, State, StatusCode, change, header,
    routes, validate_name,
};
use crate::api::templates::{CloneStart, CloneStarted, TemplateList, TemplateSave, TemplateSaved};
use axum::response::IntoResponse;

pub(super) fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(template_save))
        .routes(routes!(templates))
        .routes(routes!(template_remove))
        .routes(routes!(clone_start))
}

/// Saves a running machine as a template.
#[utoipa::path(post, path = "/v1/vms/{vm}/template", tag = "machines", request_body = TemplateSave,
    params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = TemplateSaved), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn template_save(
    State(control): State<Shared>,
    At(vm): At<String>,
    Body(request): Body<TemplateSave>,
) -> Answer<TemplateSaved> {
    change(async move { control.template_save(vm, request).await }).await.map(Json)
}

/// Templates that there are, also those that cannot be used.
#[utoipa::path(get, path = "/v1/templates", tag = "machines",
    responses((status = 200, body = TemplateList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn templates(State(control): State<Shared>) -> Answer<TemplateList> {
    control.templates().await.map(Json)
}

/// Removes a template that no machine runs on.
#[utoipa::path(delete, path = "/v1/templates/{name}", tag = "machines",
    params(("name" = String, Path, description = "Name, or absolute path of its folder")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn template_remove(State(control): State<Shared>, At(name): At<String>) -> Result<StatusCode, ApiError> {
    change(async move { control.template_remove(name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Starts a clone of a template.
#[utoipa::path(post, path = "/v1/clones", tag = "machines", request_body = CloneStart,
    responses((status = 201, body = CloneStarted), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn clone_start(State(control): State<Shared>, Body(request): Body<CloneStart>) -> Result<Response, ApiError> {
    validate_name(&request.name)
        .map_err(|reason| ApiError::invalid(reason.replace("disk name", "name for a clone")))?;
    let started = change(async move { control.clone_start(request).await }).await?;
    let location = format!("/v1/vms/{}", started.uuid);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(started)).into_response())
}
