//! History over the wire: runs and what was read in them, hottest blocks by hour, blocks read together, and how much there is.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::routes::{Answer, Asked, At, Shared};
use super::types::validate_name;
use super::{ApiError, Problem};

/// How much history there is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HistoryStatus {
    /// Accesses are being kept.
    pub enabled: bool,
    pub accesses: u64,
    pub segments: u64,
    pub runs: u64,
    /// Hours with a list of hottest blocks, of all storages.
    pub hours: u64,
    /// Of the accesses, the index by block and the roll-ups by hour.
    pub data_bytes: u64,
    pub index_bytes: u64,
    pub hours_bytes: u64,
    /// All of them and the runs: what retention limits.
    pub size_bytes: u64,
    /// Where retention begins to remove the oldest.
    pub limit_bytes: u64,
    pub limit_days: u32,
    /// Earliest and latest access; absent of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_unix_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_unix_ms: Option<u64>,
    /// What the last hour added.
    pub last_hour_accesses: u64,
    pub last_hour_bytes: u64,
    /// Segments of an earlier version that are not in the index yet; it is brought up while the database is idle.
    pub unindexed: u64,
}

/// Which runs, and how much of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct RunsQuery {
    /// Name of a disk, or name or UUID of a machine.
    pub of: String,
    /// `boot`, or a program's id; default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program: Option<String>,
    /// Most runs, 1 to 1000. Default 20.
    #[serde(default = "last")]
    pub last: u32,
    /// Most extents of each run, 0 to 100,000. Default 1000.
    #[serde(default = "extents")]
    pub extents: u32,
}

fn last() -> u32 {
    20
}

fn extents() -> u32 {
    1000
}

/// Executions of a phase, latest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct RunList {
    pub runs: Vec<Run>,
}

/// One execution of a phase.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// Identity of the storage.
    pub storage: String,
    /// Machine, or empty.
    pub vm: String,
    /// `boot`, or a program's id.
    pub program: String,
    pub started_unix_ms: u64,
    /// Absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_unix_ms: Option<u64>,
    /// What was read, in order.
    pub extents: Vec<RunExtent>,
    /// There are more extents than were asked for.
    pub more: bool,
}

/// Bytes read one after the other without a gap.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct RunExtent {
    /// After the start of the run.
    pub at_us: u64,
    pub offset_bytes: u64,
    pub length_bytes: u64,
    pub reads: u32,
}

/// Which hours, and how many blocks of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct HotQuery {
    /// Hours back from now, 1 to 8784. Default 24.
    #[serde(default = "hours")]
    pub hours: u32,
    /// Most blocks of each hour, 1 to 1024. Default 10.
    #[serde(default = "top")]
    pub top: u32,
}

fn hours() -> u32 {
    24
}

fn top() -> u32 {
    10
}

/// Hottest blocks, latest hour first; hours without reads are left out.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HotList {
    pub disk: String,
    /// Identity of the storage; counts are of all disks on it.
    pub storage: String,
    pub block_bytes: u64,
    pub hours: Vec<HotHour>,
}

/// The hottest blocks of an hour.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HotHour {
    pub hour_unix_ms: u64,
    /// Blocks read, in all: a read of two blocks counts for both.
    pub reads: u64,
    /// By how much any count may be too low; 0: counts are exact.
    pub error: u64,
    pub blocks: Vec<HotBlock>,
}

/// How often a block was read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct HotBlock {
    pub offset_bytes: u64,
    /// At least; at most this and the hour's error.
    pub reads: u64,
}

/// Which two places of a disk, and how close in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct NearQuery {
    /// Offsets in bytes; the 64 KiB blocks around them are meant, which must be two.
    pub a: u64,
    pub b: u64,
    /// Up to a minute. Default 50,000.
    #[serde(default = "within")]
    pub within_us: u64,
}

fn within() -> u64 {
    50_000
}

/// How often two blocks of a storage are read by one machine within a moment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Near {
    pub disk: String,
    /// Identity of the storage; counts are of all machines on it, but both reads are of the same.
    pub storage: String,
    /// Where the blocks begin.
    pub a_offset_bytes: u64,
    pub b_offset_bytes: u64,
    pub within_us: u64,
    /// Reads of each in all history.
    pub reads_a: u64,
    pub reads_b: u64,
    /// Reads of A with one of B at most so long before or after.
    pub near: u64,
    /// Reads of A with one of B at the same time or at most so long after.
    pub then: u64,
    /// `near` and `then` are of all history, not just of the time since `after_unix_ms`, and nothing is damaged.
    pub complete: bool,
    /// Segments of the history (up to 65,536 accesses each) that are missing from the answer, at least in part: they or their
    /// index are damaged.
    #[serde(default)]
    pub damaged_segments: u64,
    /// Older reads of A were too many to look at; absent when none were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_unix_ms: Option<u64>,
}

fn between<T: PartialOrd + std::fmt::Display>(name: &str, value: T, least: T, most: T) -> Result<(), ApiError> {
    if value < least || value > most {
        return Err(ApiError::invalid(format!("`{name}` is {least} to {most}, not {value}")));
    }
    Ok(())
}

/// How much history there is.
#[utoipa::path(get, path = "/v1/history", tag = "history",
    responses((status = 200, body = HistoryStatus), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn history(State(control): State<Shared>) -> Answer<HistoryStatus> {
    control.history().await.map(Json)
}

/// The last runs of a machine or on a disk, and what was read in each, in order.
#[utoipa::path(get, path = "/v1/history/runs", tag = "history", params(RunsQuery),
    responses((status = 200, body = RunList), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn history_runs(State(control): State<Shared>, Asked(query): Asked<RunsQuery>) -> Answer<RunList> {
    between("last", query.last, 1, 1000)?;
    between("extents", query.extents, 0, 100_000)?;
    control.history_runs(query).await.map(Json)
}

/// Which blocks of a disk's storage were read most, hour by hour.
#[utoipa::path(get, path = "/v1/history/disks/{name}/hot", tag = "history",
    params(("name" = String, Path, description = "Name of the disk"), HotQuery),
    responses((status = 200, body = HotList), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn history_hot(
    State(control): State<Shared>,
    At(name): At<String>,
    Asked(query): Asked<HotQuery>,
) -> Answer<HotList> {
    validate_name(&name).map_err(ApiError::invalid)?;
    between("hours", query.hours, 1, 8784)?;
    between("top", query.top, 1, 1024)?;
    control.history_hot(name, query).await.map(Json)
}

/// How often two blocks of a disk's storage are read within a moment of each other.
#[utoipa::path(get, path = "/v1/history/disks/{name}/near", tag = "history",
    params(("name" = String, Path, description = "Name of the disk"), NearQuery),
    responses((status = 200, body = Near), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn history_near(
    State(control): State<Shared>,
    At(name): At<String>,
    Asked(query): Asked<NearQuery>,
) -> Answer<Near> {
    validate_name(&name).map_err(ApiError::invalid)?;
    between("within_us", query.within_us, 0, 60_000_000)?;
    control.history_near(name, query).await.map(Json)
}
