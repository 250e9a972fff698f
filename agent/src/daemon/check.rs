//! What `prestaged --check` looks at beyond the configuration's own words: files that it names.

use super::webhooks;
use crate::config::Config;
use prestage_integration::export::nbd::TlsServer;

/// Looks at secrets of webhooks and at certificates. What cannot be looked at from here.
///
/// # Errors
/// What is wrong, a line each.
pub fn check(config: &Config) -> Result<Vec<String>, Vec<String>> {
    let nbd = &config.nbd;
    let wrong = match (nbd.listen, &nbd.tls_cert, &nbd.tls_key, &nbd.tls_client_ca) {
        (Some(_), Some(certificate), Some(key), Some(authority)) => TlsServer::load(certificate, key, authority).err(),
        _ => None,
    };
    let wrong: Vec<String> = wrong.map(|error| format!("nbd: {error}")).into_iter().collect();
    match webhooks::check(config) {
        Ok(unseen) if wrong.is_empty() => Ok(unseen),
        Ok(_) => Err(wrong),
        Err(more) => Err([more, wrong].concat()),
    }
}
