//! A reload: what changed in the configuration takes effect without a restart, whole or not at all.
//!
//! What can fail comes first and is undone if the rest of it fails: the tiers' sizes. After that nothing can: settings are handed
//! to whom they concern. What a disk or an endpoint of the configuration names may be out of order; that is its own trouble, told in
//! `status`, and tried again.

use super::run::{Options, SetLog, budget, open_missing, refresh_sizes};
use super::tiers::{Sizes, change_sizes};
use super::{Shared, learner_settings, machines, models, webhooks};
use crate::config::{Change, Config, diff, reloaded};
use crate::memory::MemorySettings;
use sd_notify::NotifyState;

/// Reads the configuration anew and applies what can be applied without a restart. A configuration with errors changes
/// nothing.
pub(super) async fn reload(daemon: &Shared, options: &Options, set_log: &SetLog) {
    // Type=notify-reload tells this reload from an older one by the time.
    let now = NotifyState::monotonic_usec_now().ok();
    let reloading: Vec<_> = [NotifyState::Reloading].into_iter().chain(now).collect();
    let _ = sd_notify::notify(&reloading);
    match Config::load(&options.config, &options.overrides) {
        Err(error) => {
            for line in error.to_string().lines() {
                tracing::error!("configuration not reloaded: {line}");
            }
        }
        Ok(new) => {
            if let Err(error) = apply(daemon, new, set_log).await {
                tracing::error!("configuration not reloaded, nothing of it is in effect: {error}");
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
    for Change { key, needs_restart, old, new } in &changes {
        let (old, new) = (old.as_deref().unwrap_or("unset"), new.as_deref().unwrap_or("unset"));
        if *needs_restart {
            tracing::warn!("{key} changed from {old} to {new}: takes effect with a restart of prestaged");
        } else {
            tracing::info!("{key} changed from {old} to {new}");
        }
    }
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
    refresh_sizes(daemon, true).await;
    let needs_restart = changes.iter().filter(|change| change.needs_restart).count();
    tracing::info!(applied = changes.len() - needs_restart, needs_restart, "configuration reloaded");
    Ok(())
}
