//! What is done again and again while the daemon runs.
//!
//! - [`keep_trying`]: stores, tiers and changes that have to wait; [`open_missing`]: disks that are not served
//! - [`keep_looking`]: stores of disks that are; [`refresh_sizes`]: how large they are, at once
//! - [`keep_outcomes`], [`add_outcomes`]: what disks did, hour by hour

use super::places::look_at_stores;
use super::service::look_for_file;
use super::{Daemon, Shared, control, machines};
use crate::learner::run::unix_ms;
use prestage_integration::api::Counters;
use std::time::Duration;

/// How often disks whose store could not be opened are tried again, and stores looked at.
const RETRY: Duration = Duration::from_secs(5);
/// How often outcomes are added to their hour in the database.
const OUTCOMES: Duration = Duration::from_secs(60);

/// Opens every disk on the list that is not served.
pub(super) async fn open_missing(daemon: &Shared) {
    let shared = daemon.clone();
    if let Err(error) = control::blocking(move || shared.disks.open_missing(&shared.host())).await {
        tracing::error!(%error, "disks not opened");
    }
}

/// Asks all stores for their size.
pub(super) async fn refresh_sizes(daemon: &Shared) {
    let shared = daemon.clone();
    if let Err(error) = control::blocking(move || shared.disks.refresh_sizes(&shared.host())).await {
        tracing::error!(%error, "sizes of the stores not asked for");
    }
}

/// Tries again what could not be had, for as long as the daemon runs. Each of these may have to wait for a store that does not answer;
/// none of them waits for another, nor for those of an earlier round, which pass over the store that somebody waits for.
pub(super) async fn keep_trying(daemon: Shared) {
    let mut trials = tokio::task::JoinSet::new();
    let mut following = None::<tokio::task::AbortHandle>;
    loop {
        tokio::time::sleep(RETRY).await;
        while trials.try_join_next().is_some() {}
        look_for_file(&daemon);
        if daemon.disks.list().iter().any(|entry| entry.state.is_err()) {
            let daemon = daemon.clone();
            trials.spawn(async move { open_missing(&daemon).await });
        }
        if following.as_ref().is_none_or(tokio::task::AbortHandle::is_finished) {
            let daemon = daemon.clone();
            following = Some(trials.spawn(async move {
                // Changes that waited for a machine to stop.
                if let Err(error) = machines::follow_config(&daemon).await {
                    tracing::debug!(%error, "disks of the configuration not brought into line");
                }
            }));
        }
    }
}

/// Looks at the stores of served disks, for as long as the daemon runs. By itself: a store that does not answer when it is opened is waited for.
pub(super) async fn keep_looking(daemon: Shared) {
    loop {
        tokio::time::sleep(RETRY).await;
        look_at_stores(&daemon);
    }
}

/// Brings what disks did into the database, hour by hour, for as long as the daemon runs.
pub(super) async fn keep_outcomes(daemon: Shared) {
    loop {
        tokio::time::sleep(OUTCOMES).await;
        add_outcomes(&daemon);
    }
}

/// Adds what disks did since the last call to the current hour.
pub(super) fn add_outcomes(daemon: &Daemon) {
    let hour = unix_ms() / 3_600_000;
    let stat = daemon.stat_report();
    let mut last = daemon.outcomes.lock();
    last.retain(|name, _| stat.disks.contains_key(name));
    for (name, disk) in stat.disks {
        let before = last.insert(name.clone(), disk.counters).unwrap_or_default();
        let new = disk.counters.since(&before);
        if new != Counters::default() {
            drop(daemon.store.add_outcome(hour, &name, new));
        }
    }
}
