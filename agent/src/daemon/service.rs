//! Tiers out of service and back, while guests are served; and what is looked after meanwhile.
//!
//! - [`drain`], [`resume`]: by an operator
//! - [`try_again`]: an SSD tier that could not be opened
//! - [`look_for_file`]: one whose file is deleted
//!
//! A device or a server that does not answer holds up none of it: whatever asks one does so on a thread of its own, with a limit, and
//! at most one such thread at a time is left behind.

use super::check::tier_is_store;
use super::control::blocking;
use super::drained::{Drained, DrainedSsd};
use super::mounts::Mounts;
use super::run::open_empty_ssd;
use super::tiers::{Upkeep, name, problem, ssd_words, unavailable};
use super::{Daemon, Shared};
use crate::config::Config;
use crate::learner::run::unix_ms;
use nix::sys::stat::fstat;
use parking_lot::MutexGuard;
use prestage_cache::engine::within;
use prestage_cache::ssd::{Abandoned, SsdTier, SsdWatch};
use prestage_cache::{DrainedTier, ResizeError};
use prestage_integration::api::ApiError;
use prestage_integration::api::tiers::{Service, ServiceRequest, TierService};
use prestage_integration::api::types::TierName;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How long is waited for another change of the tiers, which has limits of its own.
const CHANGING: Duration = Duration::from_secs(15);
/// How long a file system may take to say what lies at a path. One that takes longer hangs.
const ANSWER: Duration = Duration::from_secs(5);
/// How long the opening of a tier may take: its file's blocks are allocated.
const OPENING: Duration = Duration::from_secs(60);
/// How long a reload waits for a tier that is tried again.
const TRYING: Duration = Duration::from_secs(10);

/// The file of an SSD tier that was taken out of service.
#[derive(Clone, Debug)]
pub(super) struct Leaving {
    file: SsdWatch,
    /// Its device did not answer when it was to take note of that.
    hangs: bool,
}

/// Why the file of a tier that is out of service is not closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Open {
    Hangs,
    /// Or a store does, to which a write is under way.
    MayHang,
    /// It was to be opened anew.
    Opening,
}

impl Open {
    pub(super) fn words(self) -> &'static str {
        match self {
            Open::Hangs => "its device does not answer, and so its file is not closed yet: do not unmount or remove it",
            Open::MayHang => {
                "its file is not closed yet, since its device, or a store with a write under way, has not answered: do not unmount or remove it"
            }
            Open::Opening => {
                "its file is being opened, and its device has not answered yet: do not unmount or remove it"
            }
        }
    }
}

impl Upkeep {
    /// Whether somebody has the file of an SSD tier open that is out of service, and why.
    pub(super) fn still_open(&self) -> Option<Open> {
        let leaving = self.leaving.as_ref().filter(|leaving| !leaving.file.is_gone());
        let leaving = leaving.map(|leaving| if leaving.hangs { Open::Hangs } else { Open::MayHang });
        leaving.or_else(|| self.opening.upgrade().map(|_| Open::Opening))
    }
}

pub(super) fn each(
    request: ServiceRequest,
    mut one: impl FnMut(TierName) -> Result<TierService, ApiError>,
) -> Result<Service, ApiError> {
    let named = [(request.ram, TierName::Ram), (request.ssd, TierName::Ssd)];
    let tiers = named.into_iter().filter(|(named, _)| *named).map(|(_, tier)| one(tier));
    Ok(Service { tiers: tiers.collect::<Result<_, _>>()? })
}

/// Nobody else changes a tier for as long as it is held.
pub(super) fn alone(daemon: &Daemon) -> Result<MutexGuard<'_, ()>, ApiError> {
    daemon.tiers.changing.try_lock_for(CHANGING).ok_or_else(|| {
        unavailable("another change of the tiers is under way, and a device may not answer it; `prestagectl cache tiers` says more, try again")
    })
}

/// Takes a tier out of service, until it is brought back. One that is out already stays so.
pub(super) fn drain(daemon: &Daemon, tier: TierName) -> Result<TierService, ApiError> {
    let _alone = alone(daemon)?;
    let config = daemon.config.lock().clone();
    let (before, now_unix_ms) = (daemon.tiers.now(), unix_ms());
    let note = |change: &dyn Fn(&mut Drained)| daemon.tiers.note(&config.daemon.state_dir, |drained| change(drained));
    // A tier that stays in service is not to be missing after the next start.
    let undo = || {
        if let Err(error) = note(&|drained| *drained = before.drained.clone()) {
            tracing::error!(%error, "the next start leaves out a tier that is in service");
        }
    };
    let mut service = TierService { tier, ..TierService::default() };
    match tier {
        TierName::Ram => {
            service.size_bytes = ram_to_have(&before, &config)?;
            if before.drained.ram.is_none() {
                note(&|drained| drained.ram = Some(now_unix_ms))?;
                let resized = daemon.cache.resize_ram(0).inspect_err(|_| undo()).map_err(|error| problem(&error))?;
                service.size_bytes = resized.before;
                tracing::warn!(bytes = resized.before, "RAM tier taken out of service");
            }
        }
        TierName::Ssd => {
            let path = config.cache.ssd_path.clone().ok_or_else(|| problem(&ResizeError::NoSsd))?;
            service.path = Some(path.display().to_string());
            let in_use = daemon.cache.ssd();
            service.size_bytes = in_use.as_ref().map_or(0, SsdTier::size_bytes);
            // One that is not in use, since its disk is sick, is left out by the next start too.
            if before.drained.ssd.is_none() {
                let was_failing = daemon.ssd_reason().map(|why| without_ways(&why).to_owned());
                let mount = in_use.as_ref().and_then(mount_point);
                drop(in_use);
                let ssd = DrainedSsd { since_unix_ms: now_unix_ms, path, mount, was_failing };
                note(&|drained| drained.ssd = Some(ssd.clone()))?;
                let drained = daemon.cache.drain_ssd().inspect_err(|_| undo());
                if let Some(DrainedTier { abandoned, file }) =
                    drained.map_err(|error| unavailable(error.to_string()))?
                {
                    let leaving = Leaving { file, hangs: abandoned == Abandoned::Hangs };
                    daemon.tiers.now.lock().leaving = Some(leaving);
                }
                daemon.tiers.now.lock().gone = None;
                tracing::warn!(path = service.path, "SSD tier taken out of service; what it had is forgotten");
            }
            let open = daemon.tiers.now().still_open();
            service.closed = Some(open.is_none());
            service.hangs = matches!(open, Some(Open::Hangs | Open::Opening));
            if let Some(open) = open {
                tracing::warn!(path = service.path, "SSD tier: out of service, but {}", open.words());
            }
        }
    }
    Ok(service)
}

/// What the RAM tier has when it is in service.
fn ram_to_have(now: &Upkeep, config: &Config) -> Result<u64, ApiError> {
    let unknown = |error| {
        unavailable(format!(
            "cannot find out how much memory this host has: {error}; give it a size by `cache resize --ram`"
        ))
    };
    now.by_hand().ram_bytes.map_or_else(|| config.ram_bytes().map_err(unknown), Ok)
}

/// What the kernel calls the tier's file. Asks no file system, which may hang.
fn name_of(tier: &SsdTier) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", tier.data_fd().as_raw_fd())).unwrap_or_default()
}

/// What its name ends with when it is deleted.
const DELETED: &[u8] = b" (deleted)";

/// The mount point that the tier's file lies on; a device lies on none.
fn mount_point(tier: &SsdTier) -> Option<PathBuf> {
    if tier.stats().opened.block_device {
        return None;
    }
    let mounts =
        Mounts::now().inspect_err(|error| tracing::warn!(%error, "it is not known where the SSD tier is mounted"));
    mounts.ok()?.point(&name_of(tier)).map(Path::to_owned)
}

/// Whether a tier's file, were it opened now, would lie where it lay when it was taken out. Asks file systems.
fn is_mounted(path: &Path, ssd: &DrainedSsd) -> Result<(), String> {
    let Some(was) = &ssd.mount else { return Ok(()) };
    let mounts = Mounts::now().map_err(|error| format!("it cannot be found out what is mounted: {error}"))?;
    // The nearest that is there of it, without links.
    let real = path.ancestors().find_map(|part| Some(part.canonicalize().ok()?.join(path.strip_prefix(part).ok()?)));
    let now = mounts.point(real.as_deref().unwrap_or(path)).unwrap_or(Path::new("/"));
    if was == now || !was.starts_with(now) {
        return Ok(());
    }
    Err(format!(
        "{} lay on what was mounted at {}, and nothing is mounted there now: it would be made anew on {}. Mount it first, or say --force",
        path.display(),
        was.display(),
        now.display()
    ))
}

/// Opens an SSD tier that could not be opened before: what was in its way may have changed.
pub(super) async fn try_again(daemon: &Shared) {
    let shared = daemon.clone();
    let tried = blocking(move || {
        let wanted = shared.tiers.now().drained.ssd.is_none() && shared.cache.ssd().is_none();
        if !wanted || shared.ssd_trouble.lock().is_none() {
            return;
        }
        if let Err(error) = resume(&shared, TierName::Ssd, false) {
            let reason = error.detail.strip_prefix("SSD tier: ").unwrap_or(&error.detail);
            tracing::warn!(reason, "still no SSD tier");
            *shared.ssd_trouble.lock() = Some(with_ways(reason));
        }
    });
    match tokio::time::timeout(TRYING, tried).await {
        Ok(Err(error)) => tracing::error!(%error, "SSD tier not tried again"),
        Ok(Ok(())) => {}
        Err(_) => tracing::info!("the SSD tier is still being opened; `prestagectl status` says what becomes of it"),
    }
}

const WAYS: &str = "; it is set by cache.ssd_path and cache.ssd_size and opened at the next start or reload, or by `prestagectl cache resume --ssd`";

/// Why there is no SSD tier, and what brings it back.
pub(super) fn with_ways(reason: &str) -> String {
    format!("{reason}{WAYS}")
}

fn without_ways(reason: &str) -> &str {
    reason.strip_suffix(WAYS).unwrap_or(reason)
}

/// Looks whether the SSD tier's file still has a name. Without one it goes on until prestaged ends, and all of it is lost then.
pub(super) fn look_for_file(daemon: &Shared) {
    /// Somebody is at it, and may have to wait.
    static LOOKING: AtomicBool = AtomicBool::new(false);
    let Some(tier) = daemon.cache.ssd() else { return };
    let found = name_of(&tier);
    // The file system itself is asked only when the kernel says so. A device whose node is gone says so by its errors.
    let Some(path) = found.as_os_str().as_encoded_bytes().strip_suffix(DELETED) else {
        daemon.tiers.now.lock().gone = None;
        return;
    };
    let path = String::from_utf8_lossy(path).into_owned();
    if LOOKING.swap(true, Ordering::AcqRel) {
        return;
    }
    let shared = daemon.clone();
    let look = move || {
        // It may have another name, or be called so.
        let is_file = !tier.stats().opened.block_device;
        let gone = (is_file && fstat(tier.data_fd()).is_ok_and(|stat| stat.st_nlink == 0)).then(|| path.clone());
        let before = std::mem::replace(&mut shared.tiers.now.lock().gone, gone.clone());
        if gone.is_some() && before != gone {
            tracing::warn!(path, "somebody has deleted the SSD tier's file; `prestagectl status` says what to do");
        }
        LOOKING.store(false, Ordering::Release);
    };
    if let Err(error) = std::thread::Builder::new().name("ssd-look".to_owned()).spawn(look) {
        LOOKING.store(false, Ordering::Release);
        tracing::error!(%error, "SSD tier's file not looked for");
    }
}

/// A tier that is opened and not in use yet. One that nobody waits for any more holds nothing that the next run may believe.
struct Fresh(Option<SsdTier>);

impl Drop for Fresh {
    fn drop(&mut self) {
        if let Some(tier) = self.0.take()
            && let Err(error) = tier.abandon()
        {
            tracing::error!(%error, "an SSD tier that was opened too late");
        }
    }
}

/// Opens an SSD tier, empty, on a thread of its own. `size_bytes`: of the whole slab.
fn open(daemon: &Daemon, config: &Config, path: &Path, size_bytes: u64, force: bool) -> Result<SsdTier, String> {
    let now = daemon.tiers.now();
    let silent = || format!("{} does not answer; try again when it does", path.display());
    match now.still_open() {
        None => {}
        Some(Open::Opening) => return Err(silent()),
        Some(open) => {
            return Err(format!(
                "it was taken out of service, and {}; try again when `prestagectl cache tiers` does not say so any more",
                open.words()
            ));
        }
    }
    let running = Arc::new(());
    daemon.tiers.now.lock().opening = Arc::downgrade(&running);
    let (drained, to_look, at) = (now.drained.ssd.filter(|_| !force), config.clone(), path.to_owned());
    let looking = Arc::clone(&running);
    let looked = within("ssd-look", ANSWER, move || {
        let _looking = looking;
        drained.map_or(Ok(()), |ssd| is_mounted(&at, &ssd))?;
        // It must answer, whatever it says.
        let _ = at.metadata();
        tier_is_store(&to_look).map_or(Ok(()), Err)
    });
    looked.map_err(|error| error.to_string())?.ok_or_else(silent)??;
    let config = config.clone();
    let opened = within("ssd-open", OPENING, move || {
        let _opening = running;
        open_empty_ssd(&config, size_bytes).map(|tier| Fresh(Some(tier)))
    });
    let mut fresh =
        opened.map_err(|error| error.to_string())?.ok_or_else(silent)?.map_err(|error| ssd_words(&error))?;
    fresh.0.take().ok_or_else(silent)
}

/// Brings a tier back into service, empty, with the size that it had. `force`: also where nothing is mounted that was.
pub(super) fn resume(daemon: &Daemon, tier: TierName, force: bool) -> Result<TierService, ApiError> {
    let _alone = alone(daemon)?;
    let config = daemon.config.lock().clone();
    let now = daemon.tiers.now();
    let mut service = TierService { tier, in_service: true, ..TierService::default() };
    match tier {
        TierName::Ram => {
            if now.drained.ram.is_some() {
                let bytes = ram_to_have(&now, &config)?;
                daemon.cache.resize_ram(bytes).map_err(|error| problem(&error))?;
                tracing::info!(bytes, "RAM tier in service again");
            }
            service.size_bytes = daemon.cache.ram_bytes();
        }
        TierName::Ssd => {
            let Some(path) = &config.cache.ssd_path else {
                return Err(unavailable("no SSD tier is configured; set cache.ssd_path and restart prestaged"));
            };
            service.path = Some(path.display().to_string());
            if let (Some(_), Some(gone)) = (daemon.cache.ssd(), &now.gone) {
                return Err(unavailable(format!(
                    "SSD tier: it is in service, on {gone}, which was deleted; `prestagectl cache drain --ssd` first"
                )));
            }
            if daemon.cache.ssd().is_none() {
                if let Some(change) = daemon.reloads.lock().waits("cache.ssd_path") {
                    return Err(unavailable(format!(
                        "SSD tier: {change}, which a restart takes in, and the tier with it; or set it back and reload"
                    )));
                }
                let size = now.by_hand().ssd_bytes.unwrap_or(config.cache.ssd_size.0);
                let tier =
                    open(daemon, &config, path, size, force).map_err(|why| unavailable(format!("SSD tier: {why}")))?;
                daemon.cache.resume_ssd(tier).map_err(|error| unavailable(error.to_string()))?;
                *daemon.ssd_trouble.lock() = None;
                tracing::info!(path = service.path, "SSD tier in service again, empty");
            }
            service.size_bytes = daemon.cache.ssd().map_or(0, |tier| tier.size_bytes());
        }
    }
    let noted = daemon.tiers.note(&config.daemon.state_dir, |drained| match tier {
        TierName::Ram => drained.ram = None,
        TierName::Ssd => drained.ssd = None,
    });
    if let Err(error) = noted {
        // It is in service, whatever the record says.
        let mut now = daemon.tiers.now.lock();
        match tier {
            TierName::Ram => now.drained.ram = None,
            TierName::Ssd => now.drained.ssd = None,
        }
        return Err(unavailable(format!(
            "the {} is in service again, but the next start leaves it out: {error}",
            name(tier)
        )));
    }
    Ok(service)
}
