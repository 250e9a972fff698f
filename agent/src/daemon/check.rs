//! What `prestaged --check` looks at beyond the configuration's own words: files that it names.

use super::{run, webhooks};
use crate::config::Config;
use nix::unistd::{AccessFlags, access};
use prestage_integration::export::nbd::TlsServer;

/// Whether what a configuration names beside itself can be used: secrets and certificates, the helper program. Returns what could not be
/// looked at.
///
/// # Errors
/// What is wrong, a line each.
pub fn check(config: &Config) -> Result<Vec<String>, Vec<String>> {
    let (mut unseen, mut wrong) = (Vec::new(), Vec::new());
    webhooks::check(config, &mut unseen, &mut wrong);
    certificates(config, &mut wrong);
    helper(config, &mut wrong);
    if wrong.is_empty() { Ok(unseen) } else { Err(wrong) }
}

fn certificates(config: &Config, wrong: &mut Vec<String>) {
    let nbd = &config.nbd;
    let (Some(_), Some(certificate), Some(key), Some(authority)) =
        (nbd.listen, &nbd.tls_cert, &nbd.tls_key, &nbd.tls_client_ca)
    else {
        return;
    };
    if let Err(error) = TlsServer::load(certificate, key, authority) {
        wrong.push(format!("nbd: {error}"));
    }
}

fn helper(config: &Config, wrong: &mut Vec<String>) {
    let helper = run::helper(config);
    // A bare name is looked for in the PATH of the service, which is another.
    let there = helper.components().count() < 2 || access(&helper, AccessFlags::X_OK).is_ok();
    if config.memory.enabled && !there {
        wrong.push(format!(
            "memory.helper: {} is no program that can be run; install it there, name another, or set memory.enabled = false",
            helper.display()
        ));
    }
}
