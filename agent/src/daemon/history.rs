//! Questions about history, on a thread for what blocks.

use super::control::{served, store_error};
use super::{Daemon, Shared, learner_settings};
use crate::learner::run::unix_ms;
use crate::store::{BLOCK_PAGES, NEAR_LIMIT, RunRow, RunsOf, StoreError};
use prestage_cache::types::PAGE_BYTES;
use prestage_integration::api::history::{
    HistoryStatus, HotBlock, HotHour, HotList, HotQuery, Near, NearQuery, Run, RunExtent, RunList, RunsQuery,
};
use prestage_integration::api::{ApiError, ErrorCode};
use std::time::{Duration, Instant};

/// Bytes of a block of the history's index.
const BLOCK_BYTES: u64 = BLOCK_PAGES * PAGE_BYTES as u64;
/// How long an answer about two blocks may look: it then says which time it covers.
const NEAR_TIME: Duration = Duration::from_millis(40);
const HOUR_MS: u64 = 3_600_000;

pub(super) async fn status(daemon: &Shared) -> Result<HistoryStatus, ApiError> {
    let learner = daemon.config.lock().learner.clone();
    let shared = daemon.clone();
    let status = daemon.questions.ask(move || shared.store.history(unix_ms().saturating_mul(1000))).await?;
    let status = status.map_err(|error| store_error(&error))?;
    let at = |us: u64| (status.accesses > 0).then_some(us / 1000);
    Ok(HistoryStatus {
        enabled: learner.history,
        accesses: status.accesses,
        segments: status.segments,
        runs: status.runs,
        hours: status.hours,
        data_bytes: status.data_bytes,
        index_bytes: status.index_bytes,
        hours_bytes: status.hours_bytes,
        size_bytes: status.size_bytes(),
        limit_bytes: learner_settings(&daemon.config.lock(), daemon.stand_in).retention_bytes,
        limit_days: learner.retention_days,
        oldest_unix_ms: at(status.oldest_us),
        newest_unix_ms: at(status.newest_us),
        last_hour_accesses: status.last_hour_accesses,
        last_hour_bytes: status.last_hour_bytes,
        unindexed: status.unindexed,
    })
}

pub(super) async fn runs(daemon: &Shared, query: RunsQuery) -> Result<RunList, ApiError> {
    let (storage, vm) = whose(daemon, &query.of)?;
    let shared = daemon.clone();
    let runs = daemon.questions.ask(move || {
        let of = RunsOf { storage: storage.as_deref(), vm: Some(&vm), program: query.program.as_deref() };
        let runs = shared.store.runs(of, query.last as usize)?;
        let runs = runs.into_iter().map(|row| run(&shared, row, query.extents as usize));
        Ok(RunList { runs: runs.collect::<Result<_, _>>()? })
    });
    runs.await?.map_err(|error: StoreError| store_error(&error))
}

/// Storage and machine of a disk; or a machine, as the database names it.
fn whose(daemon: &Daemon, name: &str) -> Result<(Option<String>, String), ApiError> {
    match daemon.disks.get(name) {
        Ok(entry) => {
            let served = served(daemon, name)?;
            Ok((Some(served.storage.identity().to_owned()), entry.definition.vm.unwrap_or_default()))
        }
        Err(_) => {
            let names = daemon.machine_names.lock();
            let known = names.iter().find(|(uuid, machine)| *uuid == name || *machine == name);
            let serves = |entry: &super::disks::Entry| entry.definition.vm.as_deref() == Some(name);
            match known {
                Some((uuid, _)) => Ok((None, uuid.clone())),
                None if daemon.disks.list().iter().any(serves) => Ok((None, name.to_owned())),
                None => Err(ApiError::not_found(format!(
                    "there is no disk and no machine `{name}`; `prestagectl disk list` and `vm list` show all"
                ))),
            }
        }
    }
}

fn run(daemon: &Daemon, row: RunRow, extents: usize) -> Result<Run, StoreError> {
    let reads = daemon.store.run_reads(&row, extents)?;
    let page = PAGE_BYTES as u64;
    let extents = reads.extents.into_iter().map(|extent| RunExtent {
        at_us: extent.at_us.saturating_sub(row.started_us),
        offset_bytes: extent.page * page,
        length_bytes: extent.pages * page,
        reads: extent.reads,
    });
    Ok(Run {
        extents: extents.collect(),
        more: reads.more,
        vm: daemon.machine_names.lock().get(&row.vm).cloned().unwrap_or(row.vm),
        storage: row.storage,
        program: row.program,
        started_unix_ms: row.started_us / 1000,
        ended_unix_ms: row.ended_us.map(|at| at / 1000),
    })
}

/// What there is about a storage; nothing of one that has no history yet.
fn or_nothing<T: Default>(answer: Result<T, StoreError>) -> Result<T, ApiError> {
    match answer {
        Err(StoreError::NotFound { .. }) => Ok(T::default()),
        answer => answer.map_err(|error| store_error(&error)),
    }
}

pub(super) async fn hot(daemon: &Shared, disk: String, query: HotQuery) -> Result<HotList, ApiError> {
    let storage = served(daemon, &disk)?.storage.identity().to_owned();
    let to = unix_ms() / HOUR_MS;
    let from = to.saturating_sub(u64::from(query.hours) - 1);
    let (shared, identity) = (daemon.clone(), storage.clone());
    let hours = daemon.questions.ask(move || shared.store.hot(&identity, from, to, query.top as usize)).await?;
    let block = |hot: crate::store::HotBlock| HotBlock { offset_bytes: hot.block * BLOCK_BYTES, reads: hot.reads };
    let hours = or_nothing(hours)?.into_iter().map(|hour| HotHour {
        hour_unix_ms: hour.hour * HOUR_MS,
        reads: hour.reads,
        error: hour.error,
        blocks: hour.blocks.into_iter().map(block).collect(),
    });
    Ok(HotList { disk, storage, block_bytes: BLOCK_BYTES, hours: hours.collect() })
}

pub(super) async fn near(daemon: &Shared, disk: String, query: NearQuery) -> Result<Near, ApiError> {
    let storage = served(daemon, &disk)?.storage.clone();
    let size = storage.info().size_bytes;
    let pair = (query.a / BLOCK_BYTES, query.b / BLOCK_BYTES);
    if query.a >= size || query.b >= size {
        return Err(ApiError::invalid(format!(
            "offset {} lies beyond disk `{disk}` of {size} bytes",
            query.a.max(query.b)
        )));
    }
    if pair.0 == pair.1 {
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("offsets {} and {} lie in one block of 64 KiB; history is kept by block", query.a, query.b),
        ));
    }
    let storage = storage.identity().to_owned();
    let (shared, identity) = (daemon.clone(), storage.clone());
    let answer = daemon.questions.ask(move || {
        let limit = NEAR_LIMIT.until(Instant::now() + NEAR_TIME);
        shared.store.near(&identity, pair, query.within_us, limit)
    });
    let answer = or_nothing(answer.await?)?;
    Ok(Near {
        disk,
        storage,
        a_offset_bytes: pair.0 * BLOCK_BYTES,
        b_offset_bytes: pair.1 * BLOCK_BYTES,
        within_us: query.within_us,
        reads_a: answer.reads_a,
        reads_b: answer.reads_b,
        near: answer.near,
        then: answer.then,
        complete: answer.after_us == 0 && answer.damaged == 0,
        damaged_segments: answer.damaged,
        after_unix_ms: (answer.after_us > 0).then_some(answer.after_us / 1000),
    })
}
