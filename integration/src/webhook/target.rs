//! Addresses that webhooks may be sent to.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use hyper::Uri;

/// Longest address taken.
const URL_MAX: usize = 2048;

/// Why an address is not sent to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The text may hold a password and is not shown.
    #[error("not an address such as https://manager.example/hooks/prestage: {0}")]
    Malformed(&'static str),
    #[error(
        "http:// to {host} would show everyone on the way what machines do; use https://, or set `allow_http = true`"
    )]
    Plain { host: String },
}

/// An address: `https`, or `http` where that was allowed.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    pub(super) tls: bool,
    /// Name or address, without brackets.
    pub(super) host: String,
    pub(super) port: u16,
    /// Value of the header `host`.
    pub(super) authority: String,
    /// Path and query.
    pub(super) path: String,
}

impl Target {
    /// Checks an address. Plain HTTP goes to this host only, unless `allow_http`. Errors: `Malformed`, `Plain`.
    pub fn parse(url: &str, allow_http: bool) -> Result<Self, TargetError> {
        let malformed = TargetError::Malformed;
        if url.len() > URL_MAX {
            return Err(malformed("it is too long"));
        }
        if url.contains('#') {
            return Err(malformed("`#` is for browsers"));
        }
        let uri: Uri = url.parse().map_err(|_| malformed("it cannot be read"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(malformed("it begins with neither `https://` nor `http://`")),
        };
        let authority = uri.authority().ok_or(malformed("there is no host in it"))?;
        if authority.as_str().contains('@') {
            return Err(malformed("a user or password does not belong there; messages are signed"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(malformed("there is no host in it"));
        }
        let port = authority.port_u16();
        if port.is_none() && authority.as_str() != authority.host() || port == Some(0) {
            return Err(malformed("its port is none"));
        }
        let port = port.unwrap_or(if tls { 443 } else { 80 });
        if !tls && !allow_http && !loopback(&host) {
            return Err(TargetError::Plain { host });
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { tls, host, port, authority: authority.as_str().to_owned(), path })
    }

    /// What may be logged: paths and queries often hold a key.
    #[must_use]
    pub fn origin(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.authority)
    }
}

fn loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || IpAddr::from_str(host).is_ok_and(|address| address.is_loopback())
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin())
    }
}
