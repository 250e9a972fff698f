//! Resources, and an amount of each.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Index, IndexMut};

/// What a machine can be given more or less of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Cores.
    Cpu,
    /// Bytes.
    Memory,
    /// Bytes a second, read and written.
    Disk,
    /// Bytes a second, received and sent.
    Network,
}

/// All of them, in the order of [`Amounts`].
pub const RESOURCES: [Resource; 4] = [Resource::Cpu, Resource::Memory, Resource::Disk, Resource::Network];

impl Resource {
    /// Whether giving less than is in use slows a machine down rather than killing what runs in it.
    #[must_use]
    pub const fn compressible(self) -> bool {
        !matches!(self, Self::Memory)
    }

    /// An amount with its unit, for people.
    #[must_use]
    pub fn human(self, amount: f64) -> String {
        match self {
            Self::Cpu => format!("{amount:.2} cores"),
            Self::Memory => crate::config::units::human_bytes(bytes(amount)),
            Self::Disk | Self::Network => format!("{}/s", crate::config::units::human_bytes(bytes(amount))),
        }
    }
}

/// Whole bytes; what is no amount is none.
fn bytes(amount: f64) -> u64 {
    // `as` saturates, and makes 0 of NaN.
    amount.round() as u64
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Network => "network",
        })
    }
}

/// An amount of each resource, in the units of [`Resource`]. Bytes are exact up to 2^53.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Amounts(pub [f64; 4]);

impl Amounts {
    /// The same amount of each.
    #[must_use]
    pub const fn all(amount: f64) -> Self {
        Self([amount; 4])
    }

    /// Cores and bytes, and nothing of the others.
    #[must_use]
    pub const fn of(cores: f64, memory: f64) -> Self {
        Self([cores, memory, 0.0, 0.0])
    }

    /// Whether every amount is finite and none negative.
    #[must_use]
    pub fn sound(&self) -> bool {
        self.0.iter().all(|amount| amount.is_finite() && *amount >= 0.0)
    }
}

impl Index<Resource> for Amounts {
    type Output = f64;
    fn index(&self, resource: Resource) -> &f64 {
        &self.0[resource as usize]
    }
}

impl IndexMut<Resource> for Amounts {
    fn index_mut(&mut self, resource: Resource) -> &mut f64 {
        &mut self.0[resource as usize]
    }
}

/// A machine: its UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(pub u128);
