//! A disk's size, changed while its guest runs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Another size for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskResize {
    /// Makes a raw file so large, a multiple of 512. Without it the store is only looked at: somebody else has made it larger.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
}

impl DiskResize {
    /// Checks what can be checked without the disk.
    ///
    /// # Errors
    /// What is wrong, for the one who asks.
    pub fn validate(&self) -> Result<(), String> {
        match self.size_bytes {
            Some(0) => Err("a disk has 512 bytes at least".to_owned()),
            Some(bytes) if !bytes.is_multiple_of(512) => {
                let below = bytes - bytes % 512;
                let above = below.saturating_add(512);
                Err(format!(
                    "a disk's size is a multiple of 512 bytes, which {bytes} bytes are not; {below} and {above} are"
                ))
            }
            _ => Ok(()),
        }
    }
}

/// The size that a disk has now.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct DiskResized {
    pub disk: String,
    /// What its guest was told before.
    pub before_bytes: u64,
    pub after_bytes: u64,
    /// A hypervisor is connected and was told just now.
    pub told: bool,
    /// What else should be known.
    #[serde(default)]
    pub notes: Vec<String>,
}
