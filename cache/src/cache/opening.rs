//! Opening a store on its shard, with its part of the SSD tier.

use super::{Shared, StorageHandle};
use crate::backend::{Below, LayerMap, Stamp, StoreError, StoreInfo, StoreOptions, StoreSpec};
use crate::counters::StorageCounters;
use crate::disk::{SsdPart, Storage, extents_of, local, read_copy};
use crate::engine::Shard;
use crate::engine::aside::AsideFile;
use crate::opener;
use crate::ssd::{SsdStorage, SsdTier, StoreClock};
use crate::types::{PageRange, StorageId};
use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How long the opening or closing of a disk waits for a cache disk that may hang.
const FORGET_WAIT: Duration = Duration::from_secs(2);

/// What names a store before it is opened: symbolic links to one file are one store.
pub(super) fn identity(spec: &StoreSpec) -> String {
    match spec {
        StoreSpec::File(path) => {
            let path = opener::canonicalize(path).unwrap_or_else(|_| path.clone());
            format!("file:{}", path.display())
        }
        StoreSpec::Nbd { .. } => spec.to_string(),
        StoreSpec::Qcow2 { path, .. } => {
            let path = opener::canonicalize(path).unwrap_or_else(|_| path.clone());
            format!("qcow2:{}", path.display())
        }
    }
}

/// What it takes to open a store on its shard.
pub(super) struct Starting {
    pub(super) id: StorageId,
    pub(super) shared: Arc<Shared>,
    pub(super) spec: StoreSpec,
    pub(super) options: StoreOptions,
    pub(super) counters: Arc<StorageCounters>,
    pub(super) identity: String,
    pub(super) below: Option<StorageHandle>,
}

pub(super) struct Started {
    pub(super) info: StoreInfo,
    pub(super) ssd: Option<(SsdTier, SsdStorage)>,
    pub(super) map: Option<Arc<LayerMap>>,
}

/// Opens the store on its shard.
pub(super) async fn start(shard: Shard, starting: Starting) -> Result<Started, StoreError> {
    let Starting { id, shared, spec, options, counters, identity, below } = starting;
    let stands_on = below.clone().zip(spec.below()).map(|(handle, spec)| stands_on(handle, spec));
    let backend = crate::backend::open(&shard, &spec, stands_on, &options).await?;
    let (info, map) = (backend.info(), backend.map());
    shared.core().add_storage(id, PageRange::covering(0, info.size_bytes).count);
    // What the tier is about to have of the store must be as durable there, whoever wrote it and in whatever run: a loss of
    // power that takes it from the store would not show in the store's times.
    let tier = shared.ssd();
    let durable = match &tier {
        Some(_) => backend.harden().await,
        None => Ok(()),
    };
    let seal = seal(below.as_ref());
    let ssd = match &tier {
        Some(tier) => with_ssd(&shard, tier, &identity, &info, seal, durable).await,
        None => None,
    };
    let number = ssd.as_ref().map(|part| (part.tier.clone(), part.storage));
    Storage::start(shard, shared, id, backend, counters, ssd, below);
    Ok(Started { info, ssd: number, map })
}

/// A storage as what an image stands on.
fn stands_on(handle: StorageHandle, spec: &StoreSpec) -> Below {
    let path = match spec {
        StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. } => Some(path.clone()),
        StoreSpec::Nbd { .. } => None,
    };
    let of = handle.clone();
    Below {
        name: handle.identity().to_owned(),
        path,
        size_bytes: handle.info().size_bytes,
        read: Box::new(move |offset, len| {
            let handle = handle.clone();
            Box::pin(async move { read_copy(&handle, offset, len).await })
        }),
        extents: Box::new(move |offset, len, most| {
            let handle = of.clone();
            Box::pin(async move { extents_of(&handle, offset, len, most).await })
        }),
    }
}

/// The storage's part of the tier; none if it must go without. Then nothing marks what is written to it, so what the tier has
/// of it from before is dropped first.
async fn with_ssd(
    shard: &Shard,
    tier: &SsdTier,
    identity: &str,
    info: &StoreInfo,
    seal: u64,
    durable: Result<(), StoreError>,
) -> Option<SsdPart> {
    let without =
        |error: &dyn fmt::Display| tracing::warn!(store = identity, %error, "this store goes without the SSD tier");
    let opened = open_ssd(shard, tier, identity, info, seal).inspect_err(|error| without(error)).ok()?;
    let Err(error) = durable else { return Some(opened) };
    without(&error);
    forget(shard, tier, opened.storage, identity).await;
    None
}

/// Has the tier drop, on record, what it holds of a storage whose store others may write to. A tier that cannot is not believed
/// any more, and holds up nobody.
pub(crate) async fn forget(shard: &Shard, tier: &SsdTier, storage: SsdStorage, identity: &str) {
    let device = tier.clone();
    match shard.timeout(FORGET_WAIT, shard.blocking(move || device.forget(storage))).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tier.distrust(&format!("what it holds of {identity} could not be dropped: {error}")),
        Err(_) => tier.distrust(&format!("dropping what it holds of {identity} took longer than two seconds")),
    }
}

fn open_ssd(
    shard: &Shard,
    tier: &SsdTier,
    identity: &str,
    info: &StoreInfo,
    seal: u64,
) -> Result<SsdPart, Box<dyn std::error::Error>> {
    let stamp = info.version_stamp;
    // Times of another host's clock say nothing of ours.
    let clock = if stamp.is_some_and(|stamp| stamp.local_clock) { StoreClock::Ours } else { StoreClock::Another };
    let storage = tier.storage_by(identity, stamp.map(|stamp| ssd_stamp(stamp, seal)), clock)?;
    let fd = AsideFile::new(shard, tier.data_fd().try_clone_to_owned()?, tier.runs_aside(), tier.open_mark());
    Ok(SsdPart { tier: tier.clone(), fd, storage, settled: Cell::new(true) })
}

/// Gives a storage that is served its part of a tier that came into use, on its shard. `None`: it goes without.
pub(super) fn join(shard: &Shard, tier: &SsdTier, handle: &StorageHandle) -> Option<SsdStorage> {
    let storage = local(handle.id())?;
    let opened = open_ssd(shard, tier, handle.identity(), &storage.info(), seal(handle.below()));
    let part = opened
        .inspect_err(|error| tracing::warn!(store = handle.identity(), %error, "this store goes without the SSD tier"))
        .ok()?;
    let number = part.storage;
    part.settled.set(false);
    storage.join_ssd(part);
    Some(number)
}

/// The store's version as the SSD tier keeps it. `seal`: see [`seal`].
pub(crate) fn ssd_stamp(stamp: Stamp, seal: u64) -> crate::ssd::Stamp {
    crate::ssd::Stamp {
        size_bytes: stamp.size_bytes,
        // Nanoseconds since 1970 fit until 2262.
        mtime_ns: stamp.mtime_ns as i64,
        ctime_ns: stamp.ctime_ns as i64,
        inode: stamp.inode ^ seal,
        device: stamp.device,
    }
}

/// The versions of all images that one stands on, as one number; 0 for none. What an image's storage has at the edges of its
/// clusters comes from below: if that changed while nobody watched, the image is another one too.
pub(crate) fn seal(below: Option<&StorageHandle>) -> u64 {
    let stamps = below.into_iter().flat_map(StorageHandle::chain).map(|handle| handle.info().version_stamp);
    stamps.fold(0, |seal, stamp| stamp.unwrap_or_default().mixed_into(seal))
}
