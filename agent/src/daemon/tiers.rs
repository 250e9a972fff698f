//! The tiers' upkeep: other sizes, out of service and back, while guests are served.

use super::check::tier_is_store;
use super::control::{Handle, blocking};
use super::drained::{Drained, DrainedSsd};
use super::run::open_empty_ssd;
use super::{Daemon, Shared};
use crate::config::units::{exact_bytes, human_bytes};
use crate::config::{Config, host_ram_bytes};
use crate::learner::run::unix_ms;
use nix::sys::stat::{SFlag, fstat};
use parking_lot::Mutex;
use prestage_cache::ssd::{SsdError, SsdTier};
use prestage_cache::{Cache, ResizeError};
use prestage_integration::api::tiers::{
    ResizeRequest, Resized, Service, ServiceRequest, TierControl, TierResized, TierService,
};
use prestage_integration::api::types::TierName;
use prestage_integration::api::{ApiError, ErrorCode, Reply};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

impl TierControl for Handle {
    fn cache_resize(&self, request: ResizeRequest) -> Reply<'_, Resized> {
        Box::pin(async move {
            let sizes = Sizes { ram_bytes: request.ram_bytes, ssd_bytes: request.ssd_bytes };
            if let Some(asked) = sizes.ram_bytes.filter(|_| !request.force) {
                within_host(asked, host_ram_bytes().unwrap_or(u64::MAX))?;
            }
            let changes = change(&self.0, sizes, Wanted::Now).await?;
            let config = self.0.config.lock().clone();
            Ok(Resized { tiers: changes.into_iter().map(|change| told(change, &config)).collect() })
        })
    }

    fn cache_drain(&self, request: ServiceRequest) -> Reply<'_, Service> {
        let shared = self.0.clone();
        Box::pin(async move { blocking(move || each(request, |tier| drain(&shared, tier))).await? })
    }

    fn cache_resume(&self, request: ServiceRequest) -> Reply<'_, Service> {
        let shared = self.0.clone();
        Box::pin(async move { blocking(move || each(request, |tier| resume(&shared, tier))).await? })
    }
}

/// Share of the host's memory, in per cent, beyond which a RAM tier leaves too little for the host and its machines. The most that the
/// configuration takes as a share.
pub(super) const MOST_OF_HOST: u64 = 90;

/// Whether a RAM tier of so many bytes leaves something to a host with so many.
fn within_host(asked: u64, host: u64) -> Result<(), ApiError> {
    if asked <= host / 100 * MOST_OF_HOST {
        return Ok(());
    }
    Err(ApiError::invalid(format!(
        "a RAM tier of {} is more than {MOST_OF_HOST} % of this host's {}: the host and its machines would have to do with the rest. Ask \
         for less, or say --force",
        human_bytes(asked),
        human_bytes(host)
    )))
}

/// What an operator has made of the tiers.
#[derive(Default, Debug)]
pub(super) struct Tiers {
    /// Held by whoever changes a tier, for as long as that takes.
    changing: Mutex<()>,
    now: Mutex<Upkeep>,
}

#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Upkeep {
    /// Out of service, as it is on record.
    pub(super) drained: Drained,
    /// The file of the SSD tier that was taken out of service, as the kernel names it; none if that was before the start.
    ssd_file: Option<PathBuf>,
    /// The SSD tier's file, which somebody has deleted while it is in use.
    gone: Option<String>,
    /// Asked for by `cache resize`, in place of the configuration's, until the next start.
    by_hand: Sizes,
}

impl Tiers {
    pub(super) fn new(drained: Drained) -> Tiers {
        Tiers { changing: Mutex::default(), now: Mutex::new(Upkeep { drained, ..Upkeep::default() }) }
    }

    pub(super) fn now(&self) -> Upkeep {
        self.now.lock().clone()
    }

    /// Puts on record what is out of service.
    fn note(&self, state_dir: &Path, change: impl FnOnce(&mut Drained)) -> Result<(), ApiError> {
        let mut drained = self.now.lock().drained.clone();
        change(&mut drained);
        drained.save(state_dir).map_err(|error| {
            let record = Drained::path(state_dir);
            unavailable(format!("it cannot be noted in {} what is out of service: {error}", record.display()))
        })?;
        self.now.lock().drained = drained;
        Ok(())
    }
}

impl Upkeep {
    /// What is said of a tier whose file was deleted.
    pub(super) fn gone(&self) -> Option<String> {
        let path = self.gone.as_ref()?;
        Some(format!(
            "{path} was deleted while it is in use: it goes on, its space stays taken, and what is cached there is lost when prestaged ends; \
             `prestagectl cache drain --ssd` and `cache resume --ssd` make it anew"
        ))
    }

    /// What is said of a size that is not the configuration's.
    pub(super) fn size_note(&self, tier: TierName, config: &Config) -> Option<String> {
        let (key, asked, configured) = match tier {
            TierName::Ram => ("cache.ram_size", self.by_hand.ram_bytes?, config.ram_bytes().ok()?),
            TierName::Ssd => ("cache.ssd_size", self.by_hand.ssd_bytes?, config.cache.ssd_size.0),
        };
        (asked != configured).then(|| {
            format!(
                "{} by `cache resize`, {} configured, which the next start takes; set {key} = \"{}\" to keep it",
                human_bytes(asked),
                human_bytes(configured),
                exact_bytes(asked)
            )
        })
    }
}

/// What the kernel calls the tier's file. Asks no file system, which may hang.
fn name_of(tier: &SsdTier) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", tier.data_fd().as_raw_fd())).unwrap_or_default()
}

/// Whether this process has a file open.
fn is_open(name: &Path) -> bool {
    let deleted = PathBuf::from(format!("{} (deleted)", name.display()));
    let files = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    files.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|open| open == name || open == deleted)
}

fn each(
    request: ServiceRequest,
    mut one: impl FnMut(TierName) -> Result<TierService, ApiError>,
) -> Result<Service, ApiError> {
    let named = [(request.ram, TierName::Ram), (request.ssd, TierName::Ssd)];
    let tiers = named.into_iter().filter(|(named, _)| *named).map(|(_, tier)| one(tier));
    Ok(Service { tiers: tiers.collect::<Result<_, _>>()? })
}

fn unavailable(detail: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, detail)
}

/// Takes a tier out of service, until it is brought back. One that is out already stays so.
fn drain(daemon: &Daemon, tier: TierName) -> Result<TierService, ApiError> {
    let _alone = daemon.tiers.changing.lock();
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
            service.size_bytes = daemon.cache.ssd().map_or(0, |tier| tier.size_bytes());
            // One that is not in use, since its disk is sick, is left out by the next start too.
            if before.drained.ssd.is_none() {
                note(&|drained| drained.ssd = Some(DrainedSsd { since_unix_ms: now_unix_ms, path: path.clone() }))?;
                daemon.tiers.now.lock().ssd_file = daemon.cache.ssd().as_ref().map(name_of);
                daemon.cache.drain_ssd().inspect_err(|_| undo()).map_err(|error| unavailable(error.to_string()))?;
                daemon.tiers.now.lock().gone = None;
                tracing::warn!(path = service.path, "SSD tier taken out of service; what it had is forgotten");
            }
            service.closed = Some(!daemon.tiers.now().ssd_file.is_some_and(|name| is_open(&name)));
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
    now.by_hand.ram_bytes.map_or_else(|| config.ram_bytes().map_err(unknown), Ok)
}

/// Opens an SSD tier that could not be opened before: what was in its way may have changed.
pub(super) async fn try_again(daemon: &Shared) {
    let shared = daemon.clone();
    let tried = blocking(move || {
        let wanted = shared.tiers.now().drained.ssd.is_none() && shared.cache.ssd().is_none();
        if !wanted || shared.ssd_trouble.lock().is_none() {
            return;
        }
        if let Err(error) = resume(&shared, TierName::Ssd) {
            let reason = error.detail.strip_prefix("SSD tier: ").unwrap_or(&error.detail);
            tracing::warn!(reason, "still no SSD tier");
            *shared.ssd_trouble.lock() = Some(with_ways(reason));
        }
    });
    if let Err(error) = tried.await {
        tracing::error!(%error, "SSD tier not tried again");
    }
}

/// Why there is no SSD tier, and what brings it back.
pub(super) fn with_ways(reason: &str) -> String {
    format!(
        "{reason}; it is set by cache.ssd_path and cache.ssd_size and opened at the next start or reload, or by `prestagectl cache resume --ssd`"
    )
}

/// Looks whether the SSD tier's file still has a name. Without one it goes on until prestaged ends, and all of it is lost then.
pub(super) async fn look_for_file(daemon: &Shared) {
    let shared = daemon.clone();
    let looked = blocking(move || {
        let Some(tier) = shared.cache.ssd() else { return };
        // A device whose node is gone says so by its errors.
        let is_file = |mode| SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        let nameless = fstat(tier.data_fd()).is_ok_and(|stat| stat.st_nlink == 0 && is_file(stat.st_mode));
        let gone = nameless
            .then(|| name_of(&tier))
            .map(|name| name.to_string_lossy().trim_end_matches(" (deleted)").to_owned());
        let before = std::mem::replace(&mut shared.tiers.now.lock().gone, gone.clone());
        if let Some(path) = gone.filter(|gone| before.as_ref() != Some(gone)) {
            tracing::warn!(path, "somebody has deleted the SSD tier's file; `prestagectl status` says what to do");
        }
    });
    if let Err(error) = looked.await {
        tracing::error!(%error, "SSD tier's file not looked for");
    }
}

/// Brings a tier back into service, empty, with the size that it had.
fn resume(daemon: &Daemon, tier: TierName) -> Result<TierService, ApiError> {
    let _alone = daemon.tiers.changing.lock();
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
            if daemon.cache.ssd().is_none() {
                if let Some(why) = tier_is_store(&config) {
                    return Err(unavailable(format!("SSD tier: {why}")));
                }
                let size = now.by_hand.ssd_bytes.unwrap_or(config.cache.ssd_size.0);
                let tier = open_empty_ssd(&config, size)
                    .map_err(|error| unavailable(format!("SSD tier: {}", ssd_words(&error))))?;
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

fn name(tier: TierName) -> &'static str {
    match tier {
        TierName::Ram => "RAM tier",
        TierName::Ssd => "SSD tier",
    }
}

/// Sizes to be had; `None`: as it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Sizes {
    pub(super) ram_bytes: Option<u64>,
    pub(super) ssd_bytes: Option<u64>,
}

impl Sizes {
    /// What a new configuration changes.
    pub(super) fn changed(old: &Config, new: &Config) -> std::io::Result<Sizes> {
        let ram_bytes = (old.cache.ram_size != new.cache.ram_size).then(|| new.ram_bytes()).transpose()?;
        // With another path, or none, the size is that of a tier which a restart opens.
        let same = old.cache.ssd_path == new.cache.ssd_path;
        let ssd = same && old.cache.ssd_size != new.cache.ssd_size;
        Ok(Sizes { ram_bytes, ssd_bytes: ssd.then_some(new.cache.ssd_size.0) })
    }
}

/// When a tier that is out of service is to have its size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Now,
    WhenInService,
}

/// A tier that has another size now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Change {
    tier: TierName,
    asked: u64,
    before: u64,
    after: u64,
}

fn told(change: Change, config: &Config) -> TierResized {
    let Change { tier, asked, before, after } = change;
    let (key, configured) = match tier {
        TierName::Ram => ("cache.ram_size", config.ram_bytes().ok()),
        TierName::Ssd => ("cache.ssd_size", Some(config.cache.ssd_size.0)),
    };
    let to_keep = (configured != Some(asked)).then(|| format!("{key} = \"{}\"", exact_bytes(asked)));
    TierResized { tier, before_bytes: before, after_bytes: after, to_keep }
}

/// Gives the tiers other sizes: all that is asked for, or none.
pub(super) async fn change_sizes(daemon: &Shared, sizes: Sizes) -> Result<(), ApiError> {
    change(daemon, sizes, Wanted::WhenInService).await.map(drop)
}

async fn change(daemon: &Shared, asked: Sizes, wanted: Wanted) -> Result<Vec<Change>, ApiError> {
    let shared = daemon.clone();
    blocking(move || {
        let _alone = shared.tiers.changing.lock();
        let drained = shared.tiers.now().drained;
        if asked.ram_bytes.is_some() && drained.ram.is_some() && wanted == Wanted::Now {
            return Err(unavailable("the RAM tier is out of service; `prestagectl cache resume --ram` first"));
        }
        // One that is out of service takes its size when it comes back.
        let there = wanted == Wanted::Now || shared.cache.ssd().is_some();
        let sizes = Sizes {
            ram_bytes: asked.ram_bytes.filter(|_| drained.ram.is_none()),
            ssd_bytes: asked.ssd_bytes.filter(|_| there),
        };
        let changes = all_or_none(&shared.cache, sizes)?;
        let by_hand = &mut shared.tiers.now.lock().by_hand;
        for (of, asked) in [(&mut by_hand.ram_bytes, asked.ram_bytes), (&mut by_hand.ssd_bytes, asked.ssd_bytes)] {
            if asked.is_some() {
                // What a reload asks for is the configuration's.
                *of = asked.filter(|_| wanted == Wanted::Now);
            }
        }
        for Change { tier, before, after, .. } in &changes {
            tracing::info!(?tier, before, after, "tier has a new size");
        }
        Ok(changes)
    })
    .await?
}

fn resize(cache: &Cache, tier: TierName, to: u64) -> Result<Change, ResizeError> {
    let resized = match tier {
        TierName::Ram => cache.resize_ram(to)?,
        TierName::Ssd => cache.resize_ssd(to)?,
    };
    Ok(Change { tier, asked: to, before: resized.before, after: resized.after })
}

/// What can be undone for certain comes first: a tier that has grown can always shrink again. The SSD tier shrinks last: nothing
/// that may fail comes after what it drops.
fn all_or_none(cache: &Cache, sizes: Sizes) -> Result<Vec<Change>, ApiError> {
    let (ram_now, ssd_now) = (cache.ram_bytes(), cache.ssd().map_or(0, |tier| tier.size_bytes()));
    let wanted = [(TierName::Ram, sizes.ram_bytes, ram_now), (TierName::Ssd, sizes.ssd_bytes, ssd_now)];
    let mut wanted: Vec<_> = wanted.into_iter().filter_map(|(tier, to, now)| Some((tier, to?, now))).collect();
    wanted.sort_by_key(|(_, to, now)| to < now);
    let mut done: Vec<Change> = Vec::new();
    for (tier, to, _) in wanted {
        match resize(cache, tier, to) {
            Ok(change) => done.push(change),
            Err(error) => {
                let mut error = problem(&error);
                for Change { tier, before, .. } in done.into_iter().rev() {
                    if let Err(stuck) = resize(cache, tier, before) {
                        error.detail =
                            format!("{}; and the {tier:?} tier did not get its size back: {stuck}", error.detail);
                    }
                }
                return Err(error);
            }
        }
    }
    // As they were asked for.
    done.sort_by_key(|change| change.tier == TierName::Ssd);
    Ok(done)
}

fn problem(error: &ResizeError) -> ApiError {
    let code = match error {
        ResizeError::TooLarge { .. } | ResizeError::Ssd(SsdError::SizeOutOfRange { .. }) => ErrorCode::InvalidRequest,
        ResizeError::Memory { .. } | ResizeError::Ssd(SsdError::NoSpace { .. }) => ErrorCode::NoSpace,
        ResizeError::Held { .. } | ResizeError::Ssd(SsdError::StillInUse { .. }) => ErrorCode::InUse,
        ResizeError::Registered(_) | ResizeError::NoSsd | ResizeError::Ssd(_) => ErrorCode::Unavailable,
    };
    ApiError::new(code, worded(error))
}

/// Sizes as people write them.
fn worded(error: &ResizeError) -> String {
    match error {
        ResizeError::TooLarge { asked_bytes, most_bytes } => {
            let [most, asked] = [most_bytes, asked_bytes].map(|bytes| human_bytes(*bytes));
            format!("RAM tier: {most} at most on this host; {asked} were asked for")
        }
        ResizeError::Memory { bytes, source } => {
            format!(
                "RAM tier: the host does not give it {}: {source}; ask for less, or free memory",
                human_bytes(*bytes)
            )
        }
        ResizeError::Ssd(error) => format!("SSD tier: {}", ssd_words(error)),
        other => other.to_string(),
    }
}

/// The same of the SSD tier's errors, without its name: whoever prints them has said whose they are.
pub(super) fn ssd_words(error: &SsdError) -> String {
    match error {
        SsdError::NoSpace { path, needed_bytes, free_bytes } => {
            let [needed, free] = [needed_bytes, free_bytes].map(|bytes| human_bytes(*bytes));
            format!(
                "{} needs {needed} and only {free} are free; configure a smaller size, or free space there",
                path.display()
            )
        }
        SsdError::SizeOutOfRange { path, size_bytes, min_bytes, max_bytes } => {
            let [size, min, max] = [size_bytes, min_bytes, max_bytes].map(|bytes| human_bytes(*bytes));
            format!("{size} for {} are out of range; it takes {min} to {max}", path.display())
        }
        other => {
            let text = other.to_string();
            text.strip_prefix("SSD tier: ").map_or_else(|| text.clone(), str::to_owned)
        }
    }
}
