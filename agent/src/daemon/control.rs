//! The API's questions and orders.

use super::disks::{Definition, DiskError, Served, TAG_ASKED};
use super::{Daemon, Shared};
use crate::config::units::exact_bytes;
use crate::learner::run::unix_ms;
use crate::store::{DiskRow, StoreError};
use prestage_cache::StorageHandle;
use prestage_cache::disk::spread;
use prestage_cache::policy::PrefetchRequest;
use prestage_cache::types::PageRange;
use prestage_integration::api::history::{HistoryStatus, HotList, HotQuery, Near, NearQuery, RunList, RunsQuery};
use prestage_integration::api::types::{
    AttachRequest, Attached, ByteRange, CacheStat, CacheTiers, Detached, Disk, DiskAdd, DiskList, DiskOrigin,
    DiskResize, DiskResized, DropRequest, DropTier, Dropped, Explained, Profile, ProfileList, Saved, Status, Vm,
    VmList, WarmRequest, Warmed,
};
use prestage_integration::api::{ApiError, Control, ErrorCode, Reply, Rows};
use std::sync::Arc;

/// The daemon behind the API.
pub(super) struct Handle(pub(super) Shared);

/// Runs what blocks on a thread for such things.
pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(f)
        .await
        .map_err(|error| ApiError::internal(format!("the request failed inside prestaged: {error}; see its log")))
}

pub(super) fn store_error(error: &StoreError) -> ApiError {
    let code = match error {
        StoreError::Full { .. } => ErrorCode::NoSpace,
        StoreError::NotFound { .. } => ErrorCode::NotFound,
        StoreError::AlreadyExists { .. } => ErrorCode::AlreadyExists,
        _ => ErrorCode::Unavailable,
    };
    ApiError::new(code, error.to_string())
}

impl Control for Handle {
    fn status(&self) -> Reply<'_, Status> {
        Box::pin(async { Ok(self.0.status_report()) })
    }

    fn disks(&self) -> Reply<'_, DiskList> {
        Box::pin(async {
            Ok(DiskList { disks: self.0.disks.list().iter().map(|entry| self.0.disk_report(entry)).collect() })
        })
    }

    fn disk(&self, name: String) -> Reply<'_, Disk> {
        Box::pin(async move { Ok(self.0.disk_report(&self.0.disks.get(&name)?)) })
    }

    fn disk_add(&self, request: DiskAdd) -> Reply<'_, Disk> {
        Box::pin(async move {
            let mut definition = self.0.define(&request.name, &request.store, DiskOrigin::Api);
            definition.read_only = request.read_only;
            definition.nbd = request.nbd;
            if let Some(socket) = request.socket {
                definition.socket = socket.into();
                may_listen(&self.0, &definition.socket)?;
            }
            add_disk(&self.0, definition, Opening::Now).await?;
            Ok(self.0.disk_report(&self.0.disks.get(&request.name)?))
        })
    }

    fn disk_remove(&self, name: String, force: bool) -> Reply<'_, ()> {
        Box::pin(async move {
            let entry = self.0.disks.get(&name)?;
            let in_use = |detail: String| Err(ApiError::new(ErrorCode::InUse, detail));
            match (entry.definition.origin, &entry.definition.vm, &entry.definition.target) {
                (DiskOrigin::Config, _, _) => {
                    return in_use(format!(
                        "disk `{name}` stands in the configuration; take its [[disk]] entry out and reload"
                    ));
                }
                (DiskOrigin::Attach, Some(vm), Some(target)) if !force => {
                    let vm = self.0.machine_names.lock().get(vm).unwrap_or(vm).clone();
                    return in_use(format!(
                        "disk `{name}` serves {target} of machine {vm}; `prestagectl vm detach {vm} {target}` gives it back"
                    ));
                }
                _ => {}
            }
            if entry.is_connected() && !force {
                return in_use(format!(
                    "a hypervisor is connected to disk `{name}`; stop the machine first, or remove it with --force and \
                     let the guest wait for its disk"
                ));
            }
            if entry.is_used() && !force {
                return in_use(format!(
                    "NBD clients are connected to disk `{name}`, see `prestagectl disk show {name}`; end them first, or \
                     remove it with --force"
                ));
            }
            if let Some(lost) = entry.lost_if_closed().filter(|_| !force) {
                return in_use(format!(
                    "disk `{name}` has what is nowhere else: {lost}. `--force` removes it, and that with it"
                ));
            }
            remove_disk(&self.0, &name).await
        })
    }

    fn disk_resize(&self, name: String, request: DiskResize) -> Reply<'_, DiskResized> {
        Box::pin(async move {
            // Not reserved: a store that does not answer is not to keep its disk from being removed.
            let shared = self.0.clone();
            blocking(move || shared.disks.resize(&shared.host(), &name, request.size_bytes)).await?
        })
    }

    fn disk_trace(&self, name: String) -> Reply<'_, Rows> {
        Box::pin(async move { super::rows::trace(&self.0, &name).await })
    }

    fn disk_history(&self, name: String, since_us: u64) -> Reply<'_, Rows> {
        Box::pin(async move { super::rows::history(&self.0, &name, since_us).await })
    }

    fn disk_explain(&self, name: String, offset_bytes: u64) -> Reply<'_, Explained> {
        Box::pin(async move { super::rows::explain(&self.0, &name, offset_bytes).await })
    }

    fn vms(&self) -> Reply<'_, VmList> {
        Box::pin(async { super::machines::list(&self.0).await })
    }

    fn vm(&self, vm: String) -> Reply<'_, Vm> {
        Box::pin(async move { super::machines::get(&self.0, &vm).await })
    }

    fn vm_attach(&self, vm: String, target: String, request: AttachRequest) -> Reply<'_, Attached> {
        Box::pin(async move { super::machines::attach(&self.0, &vm, &target, &request).await })
    }

    fn vm_detach(&self, vm: String, target: String) -> Reply<'_, Detached> {
        Box::pin(async move { super::machines::detach(&self.0, &vm, &target).await })
    }

    fn cache_tiers(&self) -> Reply<'_, CacheTiers> {
        Box::pin(async { Ok(self.0.tiers_report()) })
    }

    fn cache_stat(&self) -> Reply<'_, CacheStat> {
        Box::pin(async { Ok(self.0.stat_report()) })
    }

    fn cache_warm(&self, request: WarmRequest) -> Reply<'_, Warmed> {
        Box::pin(async move { warm(&self.0, request).await })
    }

    fn cache_drop(&self, request: DropRequest) -> Reply<'_, Dropped> {
        Box::pin(async move {
            let ram = matches!(request.tier, DropTier::Ram | DropTier::All);
            let ssd = matches!(request.tier, DropTier::Ssd | DropTier::All);
            let mut dropped = Dropped::default();
            let mut drop_of = |storage: Option<&StorageHandle>| {
                dropped.ram_bytes += if ram { self.0.cache.drop_ram(storage) } else { 0 };
                dropped.ssd_bytes += if ssd { self.0.cache.drop_ssd(storage) } else { 0 };
                self.0.learner.emptied(storage.map(StorageHandle::id));
            };
            match &request.disk {
                // With what its images stand on, or it would not be cold.
                Some(name) => served(&self.0, name)?.storage.chain().for_each(|storage| drop_of(Some(storage))),
                None => drop_of(None),
            }
            Ok(dropped)
        })
    }

    fn profiles(&self) -> Reply<'_, ProfileList> {
        Box::pin(async { Ok(ProfileList { profiles: profiles(&self.0).await? }) })
    }

    fn profile(&self, id: String) -> Reply<'_, Profile> {
        Box::pin(async move { find_profile(&self.0, &id).await })
    }

    fn profile_remove(&self, id: String) -> Reply<'_, ()> {
        Box::pin(async move {
            let profile = find_profile(&self.0, &id).await?;
            self.0.learner.forget(profile.storage.clone()).await;
            if let Some(memory) = &self.0.memory {
                memory.forget(profile.storage.clone()).await;
            }
            match self.0.store.remove_profile(&profile.storage).await {
                // Held and never saved: forgetting it was all there was to do.
                Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
                Err(error) => Err(store_error(&error)),
            }
        })
    }

    fn profiles_save(&self) -> Reply<'_, Saved> {
        Box::pin(async {
            if let Some(memory) = &self.0.memory {
                memory.save().await;
            }
            let saved = self.0.learner.save().await.map_err(|error| ApiError::new(ErrorCode::Unavailable, error))?;
            Ok(Saved { profiles: saved.profiles, size_bytes: saved.bytes })
        })
    }

    fn history(&self) -> Reply<'_, HistoryStatus> {
        Box::pin(async { super::history::status(&self.0).await })
    }

    fn history_runs(&self, query: RunsQuery) -> Reply<'_, RunList> {
        Box::pin(async move { super::history::runs(&self.0, query).await })
    }

    fn history_hot(&self, disk: String, query: HotQuery) -> Reply<'_, HotList> {
        Box::pin(async move { super::history::hot(&self.0, disk, query).await })
    }

    fn history_near(&self, disk: String, query: NearQuery) -> Reply<'_, Near> {
        Box::pin(async move { super::history::near(&self.0, disk, query).await })
    }
}

/// When a new disk's store is to be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Opening {
    /// At once; if that fails there is no disk.
    Now,
    /// When it can be; until then the disk is on the list with the reason.
    WhenFree,
}

/// Opens and exports a disk and remembers it over restarts.
pub(super) async fn add_disk(daemon: &Shared, definition: Definition, opening: Opening) -> Result<(), ApiError> {
    if let (true, Some(trouble)) = (daemon.stand_in, &daemon.store_trouble) {
        // Served but forgotten at the next restart would be a trap.
        let detail = format!("disk `{}` would be forgotten at the next restart: {trouble}", definition.name);
        return Err(ApiError::new(ErrorCode::Unavailable, detail));
    }
    let _reserved = daemon.disks.reserve(&definition.name)?;
    let row = DiskRow {
        name: definition.name.clone(),
        store: definition.store.clone(),
        read_only: definition.read_only,
        socket: Some(definition.socket.display().to_string()),
        vm: definition.vm.clone(),
        target: definition.target.clone(),
        serial: definition.serial.clone(),
        added_unix_ms: unix_ms(),
        nbd: definition.nbd,
    };
    let (shared, name) = (daemon.clone(), definition.name.clone());
    blocking(move || -> Result<(), DiskError> {
        match opening {
            Opening::Now => shared.disks.add(&shared.host(), definition),
            Opening::WhenFree => shared.disks.expect(definition),
        }
    })
    .await??;
    if let Err(error) = daemon.store.add_disk(row).await {
        // Served but forgotten at the next restart would be a trap: all or nothing.
        let (shared, name) = (daemon.clone(), name);
        blocking(move || shared.disks.remove(&shared.host(), &name, true)).await?;
        return Err(store_error(&error));
    }
    Ok(())
}

/// Whether the daemon's confinement lets it listen there. What is there already is judged by whoever listens.
fn may_listen(daemon: &Shared, socket: &std::path::Path) -> Result<(), ApiError> {
    if socket.exists() || socket.parent().is_none_or(|folder| daemon.sandbox.may_write(folder)) {
        return Ok(());
    }
    let detail = format!(
        "prestaged may not make sockets in the folder of {}; add it to `export.socket_dirs` and restart prestaged",
        socket.display()
    );
    Err(ApiError::new(ErrorCode::NotPossible, detail))
}

/// Ends a disk and forgets it.
pub(super) async fn remove_disk(daemon: &Shared, name: &str) -> Result<(), ApiError> {
    let _reserved = daemon.disks.reserve(name)?;
    match daemon.store.remove_disk(name).await {
        Ok(()) | Err(StoreError::NotFound { .. }) => {}
        Err(error) => return Err(store_error(&error)),
    }
    let (shared, name) = (daemon.clone(), name.to_owned());
    blocking(move || shared.disks.remove(&shared.host(), &name, true)).await?;
    Ok(())
}

pub(super) fn served(daemon: &Daemon, name: &str) -> Result<Arc<Served>, ApiError> {
    let refused = |reason| ApiError::new(ErrorCode::StoreFailed, format!("disk `{name}` is not served: {reason}"));
    daemon.disks.get(name)?.state.map_err(refused)
}

async fn warm(daemon: &Shared, request: WarmRequest) -> Result<Warmed, ApiError> {
    let storage = served(daemon, &request.disk)?.storage.clone();
    if let Some(id) = &request.profile {
        let profile = find_profile(daemon, id).await?;
        if storage.chain().all(|storage| profile.storage != storage.identity()) {
            return Err(ApiError::invalid(format!(
                "profile {id} is of {}, disk `{}` is on {}",
                profile.storage,
                request.disk,
                storage.identity()
            )));
        }
    }
    let mut sets = Vec::new();
    match &request.ranges {
        None => {
            for storage in storage.chain() {
                sets.push((storage.clone(), daemon.learner.boot_set(storage.id()).await));
            }
        }
        Some(ranges) => {
            let requests = named(daemon, &request.disk, storage.info().size_bytes, ranges)?;
            let spread = blocking(move || spread(&storage, &requests)).await?;
            sets = spread.map_err(|error| ApiError::new(ErrorCode::StoreFailed, error.to_string()))?;
        }
    }
    let cache = daemon.cache.clone();
    blocking(move || {
        let mut warmed = Warmed::default();
        for (storage, requests) in sets {
            let bytes = |count| PageRange { first: 0, count }.bytes();
            let asked = requests.iter().fold(0_u64, |sum, request| sum.saturating_add(request.range.bytes()));
            let cached = bytes(requests.iter().map(|request| cache.cached_pages(&storage, request.range)).sum());
            // Some of what is refused may be cached: it is not missed then.
            let refused = bytes(cache.prefetch(&storage, &requests)).min(asked.saturating_sub(cached));
            warmed.queued_bytes += asked.saturating_sub(cached.saturating_add(refused));
            warmed.already_cached_bytes += cached;
            warmed.refused_bytes += refused;
        }
        warmed
    })
    .await
}

/// Prefetches of ranges that an operator names, on a disk of `size` bytes.
fn named(daemon: &Daemon, disk: &str, size: u64, ranges: &[ByteRange]) -> Result<Vec<PrefetchRequest>, ApiError> {
    let due = daemon.cache.now();
    let request = |range: &ByteRange| {
        if range.offset_bytes.saturating_add(range.length_bytes) > size {
            return Err(ApiError::invalid(format!(
                "the range {}+{} ends beyond disk `{disk}`, which has {}",
                exact_bytes(range.offset_bytes),
                exact_bytes(range.length_bytes),
                exact_bytes(size)
            )));
        }
        let pages = PageRange::covering(range.offset_bytes, range.length_bytes);
        Ok(PrefetchRequest { range: pages, due, probability: 1.0, tag: TAG_ASKED })
    };
    ranges.iter().map(request).collect()
}

async fn profiles(daemon: &Shared) -> Result<Vec<Profile>, ApiError> {
    let mut held = daemon.learner.profiles().await;
    if let Some(memory) = &daemon.memory {
        held.extend(memory.profiles().await);
    }
    let shared = daemon.clone();
    blocking(move || {
        let saved = shared.store.profiles().map_err(|error| store_error(&error))?;
        Ok(shared.profile_reports(saved, held))
    })
    .await?
}

async fn find_profile(daemon: &Shared, id: &str) -> Result<Profile, ApiError> {
    let all = profiles(daemon).await?;
    all.into_iter()
        .find(|profile| profile.id == id || profile.storage == id || profile.disks.iter().any(|disk| disk == id))
        .ok_or_else(|| ApiError::not_found(format!("there is no profile `{id}`; `prestagectl profile list` shows all")))
}
