//! Answers that go on: rows of CSV as they come, in chunks, for as long as there are any.
//!
//! Every such answer begins with a line that names the columns and ends with a line `# end: WHY`: an answer without that
//! line was cut off. What is missing in between stands at its place, also behind a `#`.

use std::io;
use std::pin::Pin;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::Stream;
use serde::Deserialize;

pub use axum::body::Bytes;

use super::routes::{Asked, At, Shared};
use super::types::validate_name;
use super::{ApiError, Problem};
use axum::extract::State;

/// Chunks of text. It is asked for the next one when the client has taken the last, and dropped when the client leaves.
pub struct Rows(Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>);

impl Rows {
    /// An error in `chunks` cuts the connection.
    pub fn new(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Self {
        Self(Box::pin(chunks))
    }
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rows").finish_non_exhaustive()
    }
}

impl IntoResponse for Rows {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, "text/csv; charset=utf-8")], Body::from_stream(self.0)).into_response()
    }
}

/// A disk's requests from now on, until the client leaves or the disk is gone: `ts_us,op,offset,len` with Unix time in
/// microseconds, `R`, `W` or `D` (discard), and bytes. A slow reader holds nobody up: what it misses is counted in a line
/// `# missing N: WHY`.
#[utoipa::path(get, path = "/v1/disks/{name}/trace", tag = "disks", params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = String, content_type = "text/csv"),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn disk_trace(State(control): State<Shared>, At(name): At<String>) -> Result<Rows, ApiError> {
    validate_name(&name).map_err(ApiError::invalid)?;
    control.disk_trace(name).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Since {
    #[serde(default)]
    since_us: u64,
}

/// A disk's requests as far as the history goes back, oldest first, in the columns of the trace; offsets and lengths are
/// rounded to pages of 4 KiB. What lies on one storage and was done by other machines' disks is not in it.
#[utoipa::path(get, path = "/v1/disks/{name}/history", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk"),
        ("since_us" = Option<u64>, Query, description = "Nothing from before this Unix time in microseconds")),
    responses((status = 200, body = String, content_type = "text/csv"),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn disk_history(
    State(control): State<Shared>,
    At(name): At<String>,
    Asked(since): Asked<Since>,
) -> Result<Rows, ApiError> {
    validate_name(&name).map_err(ApiError::invalid)?;
    control.disk_history(name, since.since_us).await
}
