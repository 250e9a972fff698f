//! A disk over NBD.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A disk's NBD export.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct DiskNbd {
    pub socket: String,
    /// For NBD programs on this host.
    pub uri: String,
    /// The same over TCP with TLS, where that is configured; the address is the one listened on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    /// Who is connected, the longest first.
    pub clients: Vec<NbdClient>,
}

/// A client of an NBD export.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct NbdClient {
    /// Its process, or its address.
    pub peer: String,
    pub since_unix_ms: u64,
    /// Requests so far.
    pub requests: u64,
    /// Requests under way that were not answered at once.
    pub in_flight: u32,
}
