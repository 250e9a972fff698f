//! A reload: what changed in the configuration takes effect without a restart, whole or not at all.
//!
//! What can fail comes first and is undone if the rest of it fails: the tiers' sizes. After that nothing can: settings are handed
//! to whom they concern. What a disk or an endpoint of the configuration names may be out of order; that is its own trouble, told in
//! `status`, and tried again.

use super::check::{self, Fits};
use super::drained::minute;
use super::run::{Options, SetLog, budget};
use super::service::try_again;
use super::tiers::{Sizes, change_sizes};
use super::upkeep::{open_missing, refresh_sizes};
use super::{Shared, learner_settings, machines, models, webhooks};
use crate::config::{Change, Config, diff, reloaded};
use crate::learner::run::unix_ms;
use crate::memory::MemorySettings;
use prestage_cache::backend::{NbdAddress, StoreSpec};
use sd_notify::NotifyState;
use std::path::PathBuf;

/// What became of the last reload.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Reloads {
    /// When it was refused, in Unix milliseconds, and why.
    refused: Option<(u64, String)>,
    /// What of it waits for a restart.
    waiting: Vec<String>,
    /// Disks that are served from where nothing may be opened any more.
    outside: Vec<(String, String)>,
}

impl Reloads {
    fn refuse(&mut self, why: String) {
        self.refused = Some((unix_ms(), why));
    }

    /// The change of a key that waits for a restart.
    pub(super) fn waits(&self, key: &str) -> Option<String> {
        self.waiting.iter().find(|change| change.split(' ').next() == Some(key)).cloned()
    }

    /// What is said of a configuration that is not in effect.
    pub(super) fn refused(&self) -> Option<String> {
        let (at_unix_ms, why) = self.refused.as_ref()?;
        Some(format!(
            "refused at the reload of {}, nothing of it is in effect: {why}; mend it and reload, or the next start may fail",
            minute(*at_unix_ms)
        ))
    }

    /// What is in effect and differs from what is configured, or holds only for the time being: a subject and a sentence each.
    pub(super) fn notices(&self) -> Vec<(String, String)> {
        let waiting = self
            .waiting
            .iter()
            .map(|change| ("configuration".to_owned(), format!("{change}: takes effect with a restart")));
        let outside = self.outside.iter().map(|(disk, store)| {
            let detail = format!(
                "{store} is no longer in a folder of `store.allowed`: served until it is opened anew, and refused then"
            );
            (format!("disk {disk}"), detail)
        });
        waiting.chain(outside).collect()
    }
}

/// Whether a store may be opened by the folders of a configuration. Links are the broker's to follow; servers reached by TCP are open to all.
fn within(store: &str, allowed: &[PathBuf]) -> bool {
    let spec: Option<StoreSpec> = store.parse().ok();
    let path = match &spec {
        Some(StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. }) => Some(path.as_path()),
        Some(StoreSpec::Nbd { address: NbdAddress::Unix(path), .. }) => Some(path.as_path()),
        _ => None,
    };
    path.is_none_or(|path| allowed.iter().any(|folder| path.starts_with(folder)))
}

/// Served disks, with their stores, that a new configuration has no folder for and the old one had. What a `[[disk]]` names is allowed anyway.
fn shut_out(daemon: &Shared, old: &Config, new: &Config) -> Vec<(String, String)> {
    let entries = daemon.disks.list().into_iter().filter(|entry| entry.state.is_ok());
    let stores = entries.map(|entry| (entry.definition.name, entry.definition.store));
    let named = |store: &str| new.disks.iter().any(|disk| disk.store == store);
    let known = daemon.reloads.lock().outside.clone();
    let lost = |disk: &(String, String)| {
        let (_, store) = disk;
        let had = within(store, &old.store.allowed) || known.contains(disk);
        had && !within(store, &new.store.allowed) && !named(store)
    };
    stores.filter(lost).collect()
}

/// Reads the configuration anew and applies what can be applied without a restart. A configuration with errors changes
/// nothing.
pub(super) async fn reload(daemon: &Shared, options: &Options, set_log: &SetLog) {
    // Under Type=notify-reload a manager tells this reload from an older one by the time.
    let now = NotifyState::monotonic_usec_now().ok();
    let reloading: Vec<_> = [NotifyState::Reloading].into_iter().chain(now).collect();
    let _ = sd_notify::notify(&reloading);
    match Config::load(&options.config, &options.overrides) {
        Err(error) => {
            let text = error.to_string();
            for line in text.lines() {
                tracing::error!("configuration not reloaded: {line}");
            }
            daemon.reloads.lock().refuse(text.lines().collect::<Vec<_>>().join("; "));
        }
        Ok(new) => {
            if let Err(error) = apply(daemon, new, set_log).await {
                tracing::error!("configuration not reloaded, nothing of it is in effect: {error}");
                daemon.reloads.lock().refuse(error);
            }
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
}

/// # Errors
/// What could not be had. All is as it was.
async fn apply(daemon: &Shared, new: Config, set_log: &SetLog) -> Result<(), String> {
    let old = daemon.config.lock().clone();
    let changes = diff(&old, &new);
    let sizes = Sizes::changed(&old, &new).map_err(|error| {
        format!("cannot find out how much memory this host has: {error}; set cache.ram_size to a size")
    })?;
    change_sizes(daemon, sizes).await.map_err(|error| error.detail)?;
    if let Fits::Hardly(why) = check::ram(&new)
        && sizes.ram_bytes.is_some()
    {
        tracing::warn!("{why}");
    }
    for Change { key, needs_restart, old, new } in &changes {
        let (old, new) = (old.as_deref().unwrap_or("unset"), new.as_deref().unwrap_or("unset"));
        if *needs_restart {
            tracing::warn!("{key} changed from {old} to {new}: takes effect with a restart of prestaged");
        } else {
            tracing::info!("{key} changed from {old} to {new}");
        }
    }
    let outside = shut_out(daemon, &old, &new);
    for (disk, store) in &outside {
        tracing::warn!(
            disk,
            store,
            "no longer in a folder of store.allowed: it is served until it is opened anew, and refused then"
        );
    }
    let waiting = changes.iter().filter(|change| change.needs_restart).map(|Change { key, old, new, .. }| {
        let [old, new] = [old, new].map(|value| value.as_deref().unwrap_or("unset"));
        format!("{key} changed from {old} to {new}")
    });
    *daemon.reloads.lock() = Reloads { refused: None, waiting: waiting.collect(), outside };
    let new = reloaded(&old, &new);
    set_log(&new.daemon.log);
    daemon.learner.settings(learner_settings(&new, daemon.stand_in));
    daemon.models.settings(models::settings(&new));
    daemon.cache.set_budget(budget(&new));
    if let Some(demand) = &daemon.demand {
        demand.set(&new);
    }
    if let Some(memory) = &daemon.memory {
        memory.settings(MemorySettings::of(&new));
    }
    *daemon.config.lock() = new;
    webhooks::tell(daemon).await;
    if let Err(error) = machines::follow_config(daemon).await {
        tracing::error!(%error, "disks of the configuration not brought into line");
    }
    open_missing(daemon).await;
    try_again(daemon).await;
    refresh_sizes(daemon).await;
    let needs_restart = changes.iter().filter(|change| change.needs_restart).count();
    tracing::info!(applied = changes.len() - needs_restart, needs_restart, "configuration reloaded");
    Ok(())
}
