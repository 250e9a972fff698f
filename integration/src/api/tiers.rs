//! What an operator does to the tiers while they are in use.

use super::Reply;
use super::types::TierName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Least size of the RAM tier, as in the configuration.
pub const RAM_MIN_BYTES: u64 = 16 << 20;
/// Least size of the SSD tier, as in the configuration.
pub const SSD_MIN_BYTES: u64 = 64 << 20;

/// Other sizes for the tiers; at least one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// At least 16 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ram_bytes: Option<u64>,
    /// At least 64 MiB, metadata included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssd_bytes: Option<u64>,
    /// Also a RAM tier of more than 90 % of the host's memory, as the configuration never allows it by share.
    #[serde(default)]
    pub force: bool,
}

impl ResizeRequest {
    /// Checks what can be checked without the tiers.
    ///
    /// # Errors
    /// What is wrong, for the one who asks.
    pub fn validate(&self) -> Result<(), String> {
        if self.ram_bytes.is_none() && self.ssd_bytes.is_none() {
            return Err("give `ram_bytes`, `ssd_bytes` or both".to_owned());
        }
        let least = [("ram_bytes", self.ram_bytes, RAM_MIN_BYTES), ("ssd_bytes", self.ssd_bytes, SSD_MIN_BYTES)];
        match least.into_iter().find(|(_, asked, least)| asked.is_some_and(|asked| asked < *least)) {
            Some((name, _, least)) => {
                Err(format!("`{name}` is too small; at least {least} ({} MiB) is needed", least >> 20))
            }
            None => Ok(()),
        }
    }
}

/// A tier that has another size.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct TierResized {
    pub tier: TierName,
    pub before_bytes: u64,
    pub after_bytes: u64,
    /// The configuration names another size, which the next start takes: what to set to keep this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_keep: Option<String>,
}

/// The tiers whose size was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Resized {
    pub tiers: Vec<TierResized>,
}

/// Tiers to take out of service, or to bring back; at least one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceRequest {
    #[serde(default)]
    pub ram: bool,
    #[serde(default)]
    pub ssd: bool,
    /// Brought back also where nothing is mounted that the SSD tier's file lay on when it was taken out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

impl ServiceRequest {
    /// Checks what can be checked without the tiers.
    ///
    /// # Errors
    /// What is wrong, for the one who asks.
    pub fn validate(&self) -> Result<(), String> {
        match self.ram || self.ssd {
            true => Ok(()),
            false => Err("give `ram`, `ssd` or both as true".to_owned()),
        }
    }
}

/// A tier that was taken out of service or brought back.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct TierService {
    pub tier: TierName,
    pub in_service: bool,
    /// What it gave up, or has now.
    pub size_bytes: u64,
    /// File or device of the SSD tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Out of service: prestaged has it closed. If not, a device or a store with a write under way has not answered yet, and it is not
    /// to be unmounted or removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<bool>,
    /// Its device did not answer when it was to take note that what it holds counts no more. The next start knows it all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hangs: bool,
}

/// The tiers that were named.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Service {
    pub tiers: Vec<TierService>,
}

/// The daemon's tiers, as the API sees them.
pub trait TierControl {
    /// All that was asked for, or nothing.
    /// Errors: `InvalidRequest` (a size that cannot be), `NoSpace`, `InUse` (blocks that are still being read), `Unavailable`.
    fn cache_resize(&self, request: ResizeRequest) -> Reply<'_, Resized>;
    /// Takes tiers out of service until they are brought back, over restarts too; what they hold is forgotten. Answers within some
    /// seconds whatever their device does.
    /// Errors: `InUse` (blocks that are still being read), `Unavailable` (there is no such tier, or it cannot be put on record).
    fn cache_drain(&self, request: ServiceRequest) -> Reply<'_, Service>;
    /// Brings tiers back into service, empty; also an SSD tier that could not be opened at the start.
    /// Errors: `NoSpace`, `Unavailable`.
    fn cache_resume(&self, request: ServiceRequest) -> Reply<'_, Service>;
}
