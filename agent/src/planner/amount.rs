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

/// A machine: its UUID, written as libvirt writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct VmId(pub u128);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.0;
        let (a, b, c, d) = (id >> 96, id >> 80 & 0xffff, id >> 64 & 0xffff, id >> 48 & 0xffff);
        write!(f, "{a:08x}-{b:04x}-{c:04x}-{d:04x}-{:012x}", id & 0xffff_ffff_ffff)
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for VmId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let refuse = || format!("`{}` is no UUID", text.chars().take(60).collect::<String>());
        let digits: String = text.split('-').collect();
        // `from_str_radix` takes a sign.
        if digits.len() != 32 || text.len() != 36 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refuse());
        }
        u128::from_str_radix(&digits, 16).map(VmId).map_err(|_| refuse())
    }
}
