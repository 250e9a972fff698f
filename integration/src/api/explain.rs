//! The question why a page was or was not prefetched.

use axum::Json;
use axum::extract::State;
use serde::Deserialize;

use super::ApiError;
use super::Problem;
use super::routes::{Answer, Asked, At, Shared};
use super::types::{Explained, validate_name};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Where {
    offset: u64,
}

/// Where the page at an offset is, who expects it, and what was done about it.
#[utoipa::path(get, path = "/v1/disks/{name}/explain", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk"),
        ("offset" = u64, Query, description = "Byte offset; its page of 4 KiB is explained")),
    responses((status = 200, body = Explained), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn disk_explain(
    State(control): State<Shared>,
    At(name): At<String>,
    Asked(place): Asked<Where>,
) -> Answer<Explained> {
    validate_name(&name).map_err(ApiError::invalid)?;
    control.disk_explain(name, place.offset).await.map(Json)
}
