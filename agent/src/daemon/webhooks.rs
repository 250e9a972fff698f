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
use std::path::Path;

/// Starts telling the endpoints of the configuration. One that cannot be told (no secret, no certificates) keeps its events waiting, and the
/// log says why; a reload tries again.
pub(super) async fn start(store: &Store, config: &Config) -> Couriers {
    let endpoint = |webhook: &Webhook| Endpoint {
        name: webhook.name.clone(),
        kinds: webhook.events.clone().unwrap_or_else(|| vec!["*".to_owned()]),
    };
    if let Err(error) = store.set_endpoints(config.webhooks.iter().map(endpoint).collect()).await {
        tracing::error!(%error, "endpoints of webhooks not brought into line");
    }
    let mut couriers = Vec::new();
    for (seed, webhook) in (1..).zip(&config.webhooks) {
        match sender(webhook) {
            Ok(sender) => {
                couriers.push(Courier { name: webhook.name.clone(), sender, patience: Patience::default(), seed });
            }
            Err(error) => tracing::error!(webhook = webhook.name, error, "nobody is told; reload once it is mended"),
        }
    }
    Couriers::start(store, couriers)
}

fn sender(webhook: &Webhook) -> Result<Sender, String> {
    let target = Target::parse(&webhook.url, webhook.allow_http).map_err(|error| error.to_string())?;
    let secrets = read_secrets(Path::new(&webhook.secret_file)).map_err(|error| error.to_string())?;
    Sender::new(target, secrets, webhook.ca_file.as_deref()).map_err(|error| error.to_string())
}

pub(super) async fn status(daemon: &Shared) -> Result<WebhookList, ApiError> {
    let store = daemon.store.clone();
    let endpoints = blocking(move || store.endpoints()).await?.map_err(|error| store_error(&error))?;
    let config = daemon.config.lock();
    let webhooks = endpoints.into_iter().map(|endpoint| {
        let known = config.webhooks.iter().find(|webhook| webhook.name == endpoint.name);
        // The path of a URL may hold a key.
        let origin = known.and_then(|webhook| Target::parse(&webhook.url, webhook.allow_http).ok());
        WebhookStatus {
            url: origin.map_or(endpoint.name, |target| target.origin()),
            waiting: endpoint.waiting,
            dead: endpoint.dead,
            oldest_unix_ms: endpoint.oldest_us.map(|at_us| at_us / 1000),
            last_error: endpoint.error,
        }
    });
    Ok(WebhookList { webhooks: webhooks.collect() })
}
