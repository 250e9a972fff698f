//! The tiers' upkeep: other sizes, out of service and back, while guests are served.

use super::control::{Handle, blocking};
use super::run::open_empty_ssd;
use super::{Daemon, Shared};
use crate::config::Config;
use crate::config::units::exact_bytes;
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

/// Tiers that an operator took out of service.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Away {
    /// What it had.
    pub(super) ram_bytes: Option<u64>,
    /// The SSD tier's file, as the kernel names it.
    pub(super) ssd: Option<PathBuf>,
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

/// Takes a tier out of service. One that is out already stays so.
fn drain(daemon: &Daemon, tier: TierName) -> Result<TierService, ApiError> {
    let mut away = daemon.tiers.lock();
    let mut service = TierService { tier, ..TierService::default() };
    match tier {
        TierName::Ram => {
            if away.ram_bytes.is_none() {
                let resized = daemon.cache.resize_ram(0).map_err(|error| problem(&error))?;
                away.ram_bytes = Some(resized.before);
                tracing::warn!(bytes = resized.before, "RAM tier taken out of service");
            }
            service.size_bytes = away.ram_bytes.unwrap_or(0);
        }
        TierName::Ssd => {
            service.path = daemon.config.lock().cache.ssd_path.as_ref().map(|path| path.display().to_string());
            service.size_bytes = daemon.cache.ssd().map_or(0, |tier| tier.size_bytes());
            let name = daemon.cache.ssd().as_ref().map(name_of);
            let drained = daemon.cache.drain_ssd().map_err(|error| unavailable(error.to_string()))?;
            if drained {
                away.ssd = Some(name.unwrap_or_default());
                tracing::warn!(path = service.path, "SSD tier taken out of service; what it had is forgotten");
            }
            let name = away.ssd.as_ref().ok_or_else(|| problem(&ResizeError::NoSsd))?;
            service.closed = Some(!is_open(name));
        }
    }
    Ok(service)
}

/// Brings a tier back into service, empty.
fn resume(daemon: &Daemon, tier: TierName) -> Result<TierService, ApiError> {
    let mut away = daemon.tiers.lock();
    let mut service = TierService { tier, in_service: true, ..TierService::default() };
    match tier {
        TierName::Ram => {
            if let Some(bytes) = away.ram_bytes {
                daemon.cache.resize_ram(bytes).map_err(|error| problem(&error))?;
                away.ram_bytes = None;
                tracing::info!(bytes, "RAM tier in service again");
            }
            service.size_bytes = daemon.cache.ram_bytes();
        }
        TierName::Ssd => {
            let config = daemon.config.lock().clone();
            let Some(path) = &config.cache.ssd_path else {
                return Err(unavailable("no SSD tier is configured; set cache.ssd_path and restart prestaged"));
            };
            service.path = Some(path.display().to_string());
            if daemon.cache.ssd().is_none() {
                let tier = open_empty_ssd(&config).map_err(|error| unavailable(error.to_string()))?;
                daemon.cache.resume_ssd(tier).map_err(|error| unavailable(error.to_string()))?;
                away.ssd = None;
                *daemon.ssd_trouble.lock() = None;
                tracing::info!(path = service.path, "SSD tier in service again, empty");
            }
            service.size_bytes = daemon.cache.ssd().map_or(0, |tier| tier.size_bytes());
        }
    }
    Ok(service)
}

/// Sizes to be had; `None`: as it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Sizes {
    pub(super) ram_bytes: Option<u64>,
    pub(super) ssd_bytes: Option<u64>,
}

impl Sizes {
    /// What a new configuration changes. An SSD tier that is not in use takes its size when it is opened.
    pub(super) fn changed(cache: &Cache, old: &Config, new: &Config) -> std::io::Result<Sizes> {
        let ram_bytes = (old.cache.ram_size != new.cache.ram_size).then(|| new.ram_bytes()).transpose()?;
        // With another path, or none, the size is that of a tier which a restart opens.
        let same = old.cache.ssd_path == new.cache.ssd_path;
        let ssd = same && old.cache.ssd_size != new.cache.ssd_size && cache.ssd().is_some();
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

async fn change(daemon: &Shared, sizes: Sizes, wanted: Wanted) -> Result<Vec<Change>, ApiError> {
    let shared = daemon.clone();
    blocking(move || {
        let mut away = shared.tiers.lock();
        // One that is out of service takes its size when it comes back.
        let later = sizes.ram_bytes.filter(|_| away.ram_bytes.is_some());
        if later.is_some() && wanted == Wanted::Now {
            return Err(unavailable("the RAM tier is out of service; `prestagectl cache resume --ram` first"));
        }
        // Looked at again with the tiers in hand: it may have gone since.
        let there = wanted == Wanted::Now || shared.cache.ssd().is_some();
        let sizes = Sizes {
            ram_bytes: sizes.ram_bytes.filter(|_| later.is_none()),
            ssd_bytes: sizes.ssd_bytes.filter(|_| there),
        };
        let changes = all_or_none(&shared.cache, sizes)?;
        away.ram_bytes = later.or(away.ram_bytes);
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
    ApiError::new(code, error.to_string())
}
