//! Paths, handlers and the OpenAPI document.
//!
//! Every failure leaves as a [`Problem`](super::Problem), also those made by the router itself (no such path, wrong method, body too large).
//! Handlers that change something run in a task of their own: a client that hangs up cannot leave a change half done. `body` takes
//! requests' bodies apart.

mod body;
mod demand;
mod models;
mod templates;
mod tiers;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tracing::{info, warn};
use utoipa::openapi::{Info, License, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use body::{Body, Raw};

use super::types::{
    AttachRequest, Attached, CacheStat, CacheTiers, Detached, Disk, DiskAdd, DiskList, DiskResize, DiskResized,
    DropRequest, Dropped, Profile, ProfileList, Saved, Status, Vm, VmList, WarmRequest, Warmed, validate_name,
};
use super::{ApiError, Control, ErrorCode, Peer, Problem, explain, rows};

/// Bounds on one request.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest body. Default 1 MiB: a warm request of the most ranges in JSON is a quarter of it.
    pub body_bytes: usize,
    /// Longest time to answer. Default 120 s: an attach waits for libvirt and opens a store that may be reconnecting for 60 s.
    pub request: Duration,
    /// Longest time to send a request's head. Default 10 s.
    pub head: Duration,
    /// Most connections at once; further ones wait in the listen queue. Default 128.
    pub connections: usize,
    /// Longest wait for requests under way at shutdown. Default 5 s.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            request: Duration::from_secs(120),
            head: Duration::from_secs(10),
            connections: 128,
            drain: Duration::from_secs(5),
        }
    }
}

pub(super) type Shared = Arc<dyn Control>;

/// All routes with their layers, independent of the transport they are served over.
pub fn router(control: Arc<dyn Control>, limits: Limits) -> Router {
    let (routes, document) = described().split_for_parts();
    let document = Bytes::from(document.to_json().unwrap_or_default());
    let serve_document = move || {
        let document = document.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], document) }
    };
    routes
        .route("/v1/openapi.json", axum::routing::get(serve_document))
        .fallback(
            |request: Request| async move { ApiError::not_found(format!("there is no `{}`", request.uri().path())) },
        )
        .method_not_allowed_fallback(|request: Request| async move {
            ApiError::new(
                ErrorCode::MethodNotAllowed,
                format!("`{}` does not take {}", request.uri().path(), request.method()),
            )
        })
        .with_state(control)
        .layer(DefaultBodyLimit::max(limits.body_bytes))
        .layer(middleware::from_fn(move |request: Request, next: Next| around(limits.request, request, next)))
}

/// The OpenAPI 3.1 document.
#[must_use]
pub fn openapi() -> OpenApi {
    described().into_openapi()
}

fn described() -> OpenApiRouter<Shared> {
    let mut info = Info::new("Prestage", env!("CARGO_PKG_VERSION"));
    info.description =
        Some("Control of prestaged, the host agent that pre-stages disks of virtual machines.".to_owned());
    let mut license = License::new("Apache-2.0");
    license.identifier = Some("Apache-2.0".to_owned());
    info.license = Some(license);
    OpenApiRouter::with_openapi(OpenApiBuilder::new().info(info).build())
        .routes(routes!(status))
        .routes(routes!(disks, disk_add))
        .routes(routes!(disk, disk_remove))
        .routes(routes!(disk_resize))
        .routes(routes!(rows::disk_trace))
        .routes(routes!(rows::disk_history))
        .routes(routes!(explain::disk_explain))
        .routes(routes!(vms))
        .routes(routes!(vm))
        .routes(routes!(vm_attach))
        .routes(routes!(vm_detach))
        .routes(routes!(cache_tiers))
        .routes(routes!(cache_stat))
        .routes(routes!(cache_warm))
        .routes(routes!(cache_drop))
        .routes(routes!(profiles))
        .routes(routes!(profile, profile_remove))
        .routes(routes!(profiles_save))
        .routes(routes!(super::history::history))
        .routes(routes!(super::history::history_runs))
        .routes(routes!(super::history::history_hot))
        .routes(routes!(super::history::history_near))
        .merge(models::described())
        .merge(demand::described())
        .merge(templates::described())
        .merge(tiers::described())
}

/// Around every request: the time limit, the path in problems, and one line of log for each change with who asked for it.
async fn around(limit: Duration, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let peer = request.extensions().get::<Peer>().copied();
    let response = match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::new(
            ErrorCode::Timeout,
            format!("no answer within {} s; a change may still complete", limit.as_secs()),
        )
        .into_response(),
    };
    let failure = response.extensions().get::<ApiError>().cloned();
    if method != Method::GET && method != Method::HEAD {
        let status = response.status().as_u16();
        let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let peer = peer.map_or_else(|| "unknown peer".to_owned(), |peer| peer.to_string());
        match &failure {
            None => info!(%method, path, status, elapsed_ms, peer, "change"),
            // The client's own mistakes are told to the client; an operator acts on the daemon's failures.
            Some(error) if status < 500 => {
                info!(%method, path, status, elapsed_ms, peer, error = %error, "change refused")
            }
            Some(error) => warn!(%method, path, status, elapsed_ms, peer, error = %error, "change refused"),
        }
    }
    match failure {
        Some(error) => {
            let mut answer = error.to_problem(Some(path)).into_response();
            for (name, value) in response.headers() {
                if name == header::ALLOW {
                    answer.headers_mut().insert(name, value.clone());
                }
            }
            answer
        }
        None => response,
    }
}

/// Runs a change to its end whether or not the client still listens.
async fn change<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::internal(format!("the change failed half way ({error}); see the daemon's log"))),
    }
}

/// Parts of the path, decoded.
pub(super) struct At<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for At<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(value)) => Ok(At(value)),
            Err(rejection) => Err(ApiError::invalid(format!("the path does not fit: {}", rejection.body_text()))),
        }
    }
}

/// The query.
pub(super) struct Asked<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Asked(value)),
            Err(rejection) => Err(ApiError::invalid(format!("the query does not fit: {}", rejection.body_text()))),
        }
    }
}

pub(super) type Answer<T> = Result<Json<T>, ApiError>;

/// Health of the daemon and of its parts.
#[utoipa::path(get, path = "/v1/status", tag = "status",
    responses((status = 200, body = Status), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn status(State(control): State<Shared>) -> Answer<Status> {
    control.status().await.map(Json)
}

/// All disks, by name.
#[utoipa::path(get, path = "/v1/disks", tag = "disks",
    responses((status = 200, body = DiskList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn disks(State(control): State<Shared>) -> Answer<DiskList> {
    control.disks().await.map(Json)
}

/// Serves a further disk, also after a restart.
#[utoipa::path(post, path = "/v1/disks", tag = "disks", request_body = DiskAdd,
    responses((status = 201, body = Disk), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn disk_add(State(control): State<Shared>, Body(request): Body<DiskAdd>) -> Result<Response, ApiError> {
    request.validate().map_err(ApiError::invalid)?;
    let disk = change(async move { control.disk_add(request).await }).await?;
    let location = format!("/v1/disks/{}", disk.name);
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(disk)).into_response())
}

/// One disk.
#[utoipa::path(get, path = "/v1/disks/{name}", tag = "disks", params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = Disk), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn disk(State(control): State<Shared>, At(name): At<String>) -> Answer<Disk> {
    validate_name(&name).map_err(ApiError::invalid)?;
    control.disk(name).await.map(Json)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Force {
    #[serde(default)]
    force: bool,
}

/// Stops serving a disk. Its data stays where it is.
#[utoipa::path(delete, path = "/v1/disks/{name}", tag = "disks",
    params(("name" = String, Path, description = "Name of the disk"),
        ("force" = Option<bool>, Query, description = "Also while a hypervisor is connected: its guest then waits for the disk")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn disk_remove(
    State(control): State<Shared>,
    At(name): At<String>,
    Asked(query): Asked<Force>,
) -> Result<StatusCode, ApiError> {
    validate_name(&name).map_err(ApiError::invalid)?;
    change(async move { control.disk_remove(name, query.force).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a disk larger, or looks whether its store has become larger, and tells its guest.
#[utoipa::path(post, path = "/v1/disks/{name}/resize", tag = "disks", request_body = DiskResize,
    params(("name" = String, Path, description = "Name of the disk")),
    responses((status = 200, body = DiskResized), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn disk_resize(
    State(control): State<Shared>,
    At(name): At<String>,
    Body(request): Body<DiskResize>,
) -> Answer<DiskResized> {
    validate_name(&name).map_err(ApiError::invalid)?;
    request.validate().map_err(ApiError::invalid)?;
    change(async move { control.disk_resize(name, request).await }).await.map(Json)
}

/// Machines known to libvirt.
#[utoipa::path(get, path = "/v1/vms", tag = "machines",
    responses((status = 200, body = VmList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn vms(State(control): State<Shared>) -> Answer<VmList> {
    control.vms().await.map(Json)
}

/// One machine, by name or UUID.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "machines", params(("vm" = String, Path, description = "Name or UUID")),
    responses((status = 200, body = Vm), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn vm(State(control): State<Shared>, At(vm): At<String>) -> Answer<Vm> {
    control.vm(vm).await.map(Json)
}

/// Has a machine's disk served by prestaged.
#[utoipa::path(post, path = "/v1/vms/{vm}/disks/{target}/attach", tag = "machines", request_body = AttachRequest,
    params(("vm" = String, Path, description = "Name or UUID"), ("target" = String, Path, description = "Device name, such as vda")),
    responses((status = 200, body = Attached), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn vm_attach(
    State(control): State<Shared>,
    At((vm, target)): At<(String, String)>,
    Body(request): Body<AttachRequest>,
) -> Answer<Attached> {
    if let Some(name) = &request.name {
        validate_name(name).map_err(ApiError::invalid)?;
    }
    change(async move { control.vm_attach(vm, target, request).await }).await.map(Json)
}

/// Gives a machine's disk its original source back.
#[utoipa::path(post, path = "/v1/vms/{vm}/disks/{target}/detach", tag = "machines",
    params(("vm" = String, Path, description = "Name or UUID"), ("target" = String, Path, description = "Device name, such as vda")),
    responses((status = 200, body = Detached), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn vm_detach(State(control): State<Shared>, At((vm, target)): At<(String, String)>) -> Answer<Detached> {
    change(async move { control.vm_detach(vm, target).await }).await.map(Json)
}

/// Size, use and health of the tiers.
#[utoipa::path(get, path = "/v1/cache", tag = "cache",
    responses((status = 200, body = CacheTiers), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_tiers(State(control): State<Shared>) -> Answer<CacheTiers> {
    control.cache_tiers().await.map(Json)
}

/// Counters since the daemon started, total and by disk.
#[utoipa::path(get, path = "/v1/cache/stat", tag = "cache",
    responses((status = 200, body = CacheStat), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_stat(State(control): State<Shared>) -> Answer<CacheStat> {
    control.cache_stat().await.map(Json)
}

/// Brings ranges, or what a profile learned, into the cache.
#[utoipa::path(post, path = "/v1/cache/warm", tag = "cache", request_body = WarmRequest,
    responses((status = 202, body = Warmed), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_warm(State(control): State<Shared>, Body(request): Body<WarmRequest>) -> Result<Response, ApiError> {
    request.validate().map_err(ApiError::invalid)?;
    let warmed = change(async move { control.cache_warm(request).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(warmed)).into_response())
}

/// Takes blocks out of the cache; guest data is not touched.
#[utoipa::path(post, path = "/v1/cache/drop", tag = "cache", request_body = DropRequest,
    responses((status = 200, body = Dropped), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn cache_drop(State(control): State<Shared>, Body(request): Body<DropRequest>) -> Answer<Dropped> {
    if let Some(disk) = &request.disk {
        validate_name(disk).map_err(ApiError::invalid)?;
    }
    change(async move { control.cache_drop(request).await }).await.map(Json)
}

/// What was learned, by storage.
#[utoipa::path(get, path = "/v1/profiles", tag = "profiles",
    responses((status = 200, body = ProfileList), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn profiles(State(control): State<Shared>) -> Answer<ProfileList> {
    control.profiles().await.map(Json)
}

/// One profile.
#[utoipa::path(get, path = "/v1/profiles/{id}", tag = "profiles", params(("id" = String, Path, description = "Id of the profile")),
    responses((status = 200, body = Profile), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn profile(State(control): State<Shared>, At(id): At<String>) -> Answer<Profile> {
    control.profile(id).await.map(Json)
}

/// Forgets what was learned of a storage.
#[utoipa::path(delete, path = "/v1/profiles/{id}", tag = "profiles", params(("id" = String, Path, description = "Id of the profile")),
    responses((status = 204), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn profile_remove(State(control): State<Shared>, At(id): At<String>) -> Result<StatusCode, ApiError> {
    change(async move { control.profile_remove(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Writes what was learned to the store now.
#[utoipa::path(post, path = "/v1/profiles/save", tag = "profiles",
    responses((status = 200, body = Saved), (status = "default", body = Problem, content_type = "application/problem+json")))]
async fn profiles_save(State(control): State<Shared>) -> Answer<Saved> {
    change(async move { control.profiles_save().await }).await.map(Json)
}
