//! NBD

use super::error::StoreError;
use super::spec::NbdAddress;
use super::{Backend, StoreOptions};
use crate::engine::Shard;
use std::time::Duration;

/// How to use an NBD export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdOptions {
    /// Connections to a server that allows several (`NBD_FLAG_CAN_MULTI_CONN`); 1 to 16. To others there is one.
    pub connections: usize,
    /// How long requests wait for a lost server to come back before they fail.
    pub retry_for: Duration,
    /// A connection on which a request has had no answer for this long is given up and the request sent on another.
    pub request_timeout: Duration,
    /// Largest request sent in one piece. Servers accept 32 MiB unless they say otherwise.
    pub max_request_bytes: u32,
}

impl Default for NbdOptions {
    fn default() -> NbdOptions {
        NbdOptions {
            connections: 4,
            retry_for: Duration::from_secs(60),
            request_timeout: Duration::from_secs(30),
            max_request_bytes: 32 << 20,
        }
    }
}

#[derive(Debug)]
pub(super) struct NbdBackend {}

impl NbdBackend {
    pub(super) async fn open(_: &Shard, _: &NbdAddress, _: &str, _: &StoreOptions) -> Result<super::file::FileBackend, StoreError> {
        Err(StoreError::Unsupported { store: String::new(), what: "not written yet".into() })
    }
}
