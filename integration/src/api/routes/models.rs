//! Routes of models and thresholds.

use super::{
    Answer, ApiError, Asked, At, Body, Json, OpenApiRouter, Problem, Raw, Response, Shared, State, StatusCode, change,
    header, routes,
};
use crate::api::models::{
    ChampionChanged, ModelDetail, ModelImported, ModelList, ModelMetrics, RollbackRequest, ThresholdRequest,
    Thresholds, TrainRequest, TrainStarted,
};
use axum::response::IntoResponse;
use serde::Deserialize;

pub(super) fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(models))
        .routes(routes!(model))
        .routes(routes!(train))
        .routes(routes!(evaluate))
        .routes(routes!(promote))
        .routes(routes!(rollback))
        .routes(routes!(export))
        .routes(routes!(import))
        .routes(routes!(thresholds, threshold_set))
}

/// All models, by id.
#[utoipa::path(get, path = "/v1/models", tag = "models",
    responses((status = 200, body = ModelList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn models(State(control): State<Shared>) -> Answer<ModelList> {
    control.models().await.map(Json)
}

/// One model and what became of it.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", params(("id" = i64, Path, description = "Id of the model")),
    responses((status = 200, body = ModelDetail), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn model(State(control): State<Shared>, At(id): At<i64>) -> Answer<ModelDetail> {
    control.model(id).await.map(Json)
}

/// Trains a model in the background; done, it becomes a shadow.
#[utoipa::path(post, path = "/v1/models/train", tag = "models", request_body = TrainRequest,
    responses((status = 202, body = TrainStarted), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn train(State(control): State<Shared>, Body(request): Body<TrainRequest>) -> Result<Response, ApiError> {
    let started = change(async move { control.model_train(request).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(started)).into_response())
}

/// Measures a model on the latest history of its scope.
#[utoipa::path(post, path = "/v1/models/{id}/evaluate", tag = "models", params(("id" = i64, Path, description = "Id of the model")),
    responses((status = 200, body = ModelMetrics), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn evaluate(State(control): State<Shared>, At(id): At<i64>) -> Answer<ModelMetrics> {
    change(async move { control.model_evaluate(id).await }).await.map(Json)
}

/// Puts a model to use in its scope.
#[utoipa::path(post, path = "/v1/models/{id}/promote", tag = "models", params(("id" = i64, Path, description = "Id of the model")),
    responses((status = 200, body = ChampionChanged), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn promote(State(control): State<Shared>, At(id): At<i64>) -> Answer<ChampionChanged> {
    change(async move { control.model_promote(id).await }).await.map(Json)
}

/// Takes a scope's last promotion back.
#[utoipa::path(post, path = "/v1/models/rollback", tag = "models", request_body = RollbackRequest,
    responses((status = 200, body = ChampionChanged), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn rollback(State(control): State<Shared>, Body(request): Body<RollbackRequest>) -> Answer<ChampionChanged> {
    change(async move { control.model_rollback(request).await }).await.map(Json)
}

/// A model as a file, with a checksum, to be imported on another host.
#[utoipa::path(get, path = "/v1/models/{id}/export", tag = "models", params(("id" = i64, Path, description = "Id of the model")),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn export(State(control): State<Shared>, At(id): At<i64>) -> Result<Response, ApiError> {
    let file = control.model_export(id).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], file).into_response())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Import {
    #[serde(default)]
    scope: Option<String>,
}

/// Takes up an exported model: it predicts in shadow, and is promoted when it proves better than what is in use.
#[utoipa::path(post, path = "/v1/models/import", tag = "models",
    params(("scope" = Option<String>, Query, description = "`global`, a disk, or the identity of a storage; default: as the file says")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, body = ModelImported), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn import(
    State(control): State<Shared>,
    Asked(Import { scope }): Asked<Import>,
    Raw(file): Raw,
) -> Result<Response, ApiError> {
    let imported = change(async move { control.model_import(file, scope).await }).await?;
    let location = format!("/v1/models/{}", imported.model);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(imported)).into_response())
}

/// Lowest probabilities at which blocks are read ahead.
#[utoipa::path(get, path = "/v1/thresholds", tag = "models",
    responses((status = 200, body = Thresholds), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn thresholds(State(control): State<Shared>) -> Answer<Thresholds> {
    control.thresholds().await.map(Json)
}

/// Sets a threshold, or unsets it.
#[utoipa::path(put, path = "/v1/thresholds", tag = "models", request_body = ThresholdRequest,
    responses((status = 200, body = Thresholds), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn threshold_set(State(control): State<Shared>, Body(request): Body<ThresholdRequest>) -> Answer<Thresholds> {
    request.validate().map_err(ApiError::invalid)?;
    change(async move { control.threshold_set(request).await }).await.map(Json)
}
