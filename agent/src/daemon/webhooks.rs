//! Who is told: endpoints of the configuration, and how they fare.

use super::Shared;
use super::control::{blocking, store_error};
use crate::config::{Config, Webhook};
use crate::notify::{Courier, Couriers, Patience};
use crate::store::Store;
use crate::store::demand::Endpoint;
use prestage_integration::api::ApiError;
use prestage_integration::api::demand::{WebhookList, WebhookStatus};
use prestage_integration::webhook::{Sender, Target, read_secrets};
use std::collections::BTreeMap;
use std::path::Path;

/// Endpoints that cannot be told, by name, and why.
pub(super) type Untold = BTreeMap<String, String>;

/// Starts telling the endpoints of the configuration. One that cannot be told (no secret, no certificates) keeps its events waiting;
/// a reload tries again.
async fn start(store: &Store, config: &Config) -> (Couriers, Untold) {
    let endpoint = |webhook: &Webhook| Endpoint {
        name: webhook.name.clone(),
        kinds: webhook.events.clone().unwrap_or_else(|| vec!["*".to_owned()]),
    };
    if let Err(error) = store.set_endpoints(config.webhooks.iter().map(endpoint).collect()).await {
        tracing::error!(%error, "endpoints of webhooks not brought into line");
    }
    let (mut couriers, mut untold) = (Vec::new(), Untold::new());
    for (seed, webhook) in (1..).zip(&config.webhooks) {
        match sender(webhook) {
            Ok(sender) => {
                couriers.push(Courier { name: webhook.name.clone(), sender, patience: Patience::default(), seed });
            }
            Err(error) => {
                tracing::error!(webhook = webhook.name, error, "nobody is told; reload once it is mended");
                untold.insert(webhook.name.clone(), error);
            }
        }
    }
    (Couriers::start(store, couriers), untold)
}

/// Tells whoever the configuration names, in place of those before.
pub(super) async fn tell(daemon: &Shared) {
    let config = daemon.config.lock().clone();
    let (couriers, untold) = start(&daemon.store, &config).await;
    let before = std::mem::replace(&mut *daemon.untold.lock(), untold);
    for name in config.webhooks.iter().map(|webhook| &webhook.name).filter(|name| before.contains_key(*name)) {
        if !daemon.untold.lock().contains_key(name) {
            tracing::info!(webhook = name, "webhook: mended; what waits for it is told now");
        }
    }
    let before = daemon.couriers.lock().replace(couriers);
    if let Some(before) = before {
        before.stop().await;
    }
}

/// Whether the endpoints of a configuration could be told from here: their secrets and certificates. Returns what could not be looked at.
///
/// # Errors
/// What is wrong, a line an endpoint.
pub(super) fn check(config: &Config) -> Result<Vec<String>, Vec<String>> {
    let (mut unseen, mut wrong) = (Vec::new(), Vec::new());
    for webhook in &config.webhooks {
        let secret = &webhook.secret_file;
        // systemd hands those to the service alone.
        if !secret.contains('/') && std::env::var_os("CREDENTIALS_DIRECTORY").is_none() {
            unseen.push(format!(
                "webhook {}: `{secret}` is a systemd credential, which is not looked at here",
                webhook.name
            ));
        } else if let Err(error) = sender(webhook) {
            wrong.push(format!("webhook {}: {error}", webhook.name));
        }
    }
    if wrong.is_empty() { Ok(unseen) } else { Err(wrong) }
}

fn sender(webhook: &Webhook) -> Result<Sender, String> {
    let target = Target::parse(&webhook.url, webhook.allow_http).map_err(|error| error.to_string())?;
    let secrets = read_secrets(Path::new(&webhook.secret_file)).map_err(|error| error.to_string())?;
    Sender::new(target, secrets, webhook.ca_file.as_deref()).map_err(|error| error.to_string())
}

pub(super) async fn status(daemon: &Shared) -> Result<WebhookList, ApiError> {
    let store = daemon.store.clone();
    let endpoints = blocking(move || store.endpoints()).await?.map_err(|error| store_error(&error))?;
    let (config, untold) = (daemon.config.lock(), daemon.untold.lock());
    let webhooks = endpoints.into_iter().map(|endpoint| {
        let known = config.webhooks.iter().find(|webhook| webhook.name == endpoint.name);
        // The path of a URL may hold a key.
        let origin = known.and_then(|webhook| Target::parse(&webhook.url, webhook.allow_http).ok());
        let not_told = untold.get(&endpoint.name).map(|why| format!("nobody is told: {why}; reload once it is mended"));
        WebhookStatus {
            url: origin.map_or(endpoint.name, |target| target.origin()),
            waiting: endpoint.waiting,
            dead: endpoint.dead,
            oldest_unix_ms: endpoint.oldest_us.map(|at_us| at_us / 1000),
            last_error: not_told.or(endpoint.error),
        }
    });
    Ok(WebhookList { webhooks: webhooks.collect() })
}
