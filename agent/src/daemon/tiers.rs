//! The tiers' upkeep as the API has it, and other sizes for them while guests are served. Out of service and back: `service.rs`.

use super::Shared;
use super::control::{Handle, blocking};
use super::drained::Drained;
use super::service::{Leaving, alone, drain, each, resume};
use crate::config::units::{exact_bytes, human_bytes, human_sizes};
use crate::config::{Config, host_ram_bytes};
use parking_lot::Mutex;
use prestage_cache::ssd::SsdError;
use prestage_cache::{Cache, ResizeError};
use prestage_integration::api::tiers::{ResizeRequest, Resized, Service, ServiceRequest, TierControl, TierResized};
use prestage_integration::api::types::TierName;
use prestage_integration::api::{ApiError, ErrorCode, Reply};
use std::path::Path;
use std::sync::Weak;

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
        Box::pin(async move { blocking(move || each(request, |tier| resume(&shared, tier, request.force))).await? })
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
    pub(super) changing: Mutex<()>,
    pub(super) now: Mutex<Upkeep>,
}

#[derive(Clone, Default, Debug)]
pub(super) struct Upkeep {
    /// Out of service, as it is on record.
    pub(super) drained: Drained,
    /// The file of the SSD tier that was taken out of service; none if that was before the start.
    pub(super) leaving: Option<Leaving>,
    /// Somebody opens an SSD tier, and may have to wait for its device.
    pub(super) opening: Weak<()>,
    /// The SSD tier's file, which somebody has deleted while it is in use.
    pub(super) gone: Option<String>,
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
    pub(super) fn note(&self, state_dir: &Path, change: impl FnOnce(&mut Drained)) -> Result<(), ApiError> {
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
    pub(super) fn by_hand(&self) -> Sizes {
        self.by_hand
    }

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

pub(super) fn unavailable(detail: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, detail)
}

pub(super) fn name(tier: TierName) -> &'static str {
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
        let _alone = alone(&shared)?;
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

pub(super) fn problem(error: &ResizeError) -> ApiError {
    let code = match error {
        ResizeError::TooLarge { .. } | ResizeError::Ssd(SsdError::SizeOutOfRange { .. }) => ErrorCode::InvalidRequest,
        ResizeError::Memory { .. } | ResizeError::Ssd(SsdError::NoSpace { .. }) => ErrorCode::NoSpace,
        ResizeError::Held { .. } | ResizeError::Ssd(SsdError::StillInUse { .. }) => ErrorCode::InUse,
        ResizeError::Registered(_) | ResizeError::Thread(_) | ResizeError::NoSsd | ResizeError::Ssd(_) => {
            ErrorCode::Unavailable
        }
    };
    ApiError::new(code, worded(error))
}

/// Sizes as people write them.
fn worded(error: &ResizeError) -> String {
    match error {
        ResizeError::TooLarge { asked_bytes, most_bytes } => {
            let [most, asked] = human_sizes([*most_bytes, *asked_bytes]);
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
            let [needed, free] = human_sizes([*needed_bytes, *free_bytes]);
            format!(
                "{} needs {needed} and only {free} are free; configure a smaller size, or free space there",
                path.display()
            )
        }
        SsdError::SizeOutOfRange { path, size_bytes, min_bytes, max_bytes } => {
            let [size, min, max] = human_sizes([*size_bytes, *min_bytes, *max_bytes]);
            format!("{size} for {} are out of range; it takes {min} to {max}", path.display())
        }
        other => {
            let text = other.to_string();
            text.strip_prefix("SSD tier: ").map_or_else(|| text.clone(), str::to_owned)
        }
    }
}
