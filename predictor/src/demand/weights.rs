//! The network's weights: members of fixed shape whose quantiles are averaged, as bytes.
//!
//! As bytes (`weight_file.rs`): magic "PSTGDMND"; shape: steps read, channels, features of origin, step and maximum, hidden, width,
//! quantiles, gates, members; for each of 1 to [`MEMBERS_MOST`] members the parts of [`PARTS`].

use super::QUANTILES;
use super::features::{CHANNELS, FIXED, PEAK, RECENT, STEP};
use crate::lstm::Path;
use crate::weight_file::Format;
pub use crate::weight_file::{Part, WeightsError};

/// Version of the format; raised whenever the meaning of the bytes, or of the features, changes.
pub const VERSION: u32 = 1;
const FORMAT: Format = Format { what: "demand model", magic: "PSTGDMND", version: VERSION };

/// Units of the LSTM.
pub const HIDDEN: usize = 32;
/// Input, forget, cell, output.
pub const GATES: usize = 4;
/// Units of each layer behind it.
pub const WIDTH: usize = 64;
/// Quantiles of a head.
pub const HEADS: usize = QUANTILES.len();
/// Members of one model at most: each costs as much as the first.
pub const MEMBERS_MOST: usize = 8;

const fn part(name: &'static str, rows: usize, columns: usize) -> Part {
    Part { name, rows, columns }
}

/// The parts of a member, in the order of the bytes. `*_shift` and `*_scale` are not trained: a feature enters as
/// clamp((feature − shift) · scale, ±6). The LSTM's last hidden values and the origin's features go through `trunk`, and
/// with each step's features (`step`) through `middle` to `out`; `step_skip` goes past both. `peak_*` likewise, with no
/// layer between.
pub const PARTS: [Part; 23] = [
    part("fixed_shift", 1, FIXED),
    part("fixed_scale", 1, FIXED),
    part("step_shift", 1, STEP),
    part("step_scale", 1, STEP),
    part("peak_shift", 1, PEAK),
    part("peak_scale", 1, PEAK),
    part("input", CHANNELS, GATES * HIDDEN),
    part("recurrent", HIDDEN, GATES * HIDDEN),
    part("bias", 1, GATES * HIDDEN),
    part("trunk", HIDDEN + FIXED, WIDTH),
    part("trunk_bias", 1, WIDTH),
    part("step", STEP, WIDTH),
    part("middle", WIDTH, WIDTH),
    part("middle_bias", 1, WIDTH),
    part("out", WIDTH, HEADS),
    part("out_bias", 1, HEADS),
    part("step_skip", STEP, HEADS),
    part("peak_trunk", HIDDEN + FIXED, WIDTH),
    part("peak_trunk_bias", 1, WIDTH),
    part("peak", PEAK, WIDTH),
    part("peak_out", WIDTH, HEADS),
    part("peak_out_bias", 1, HEADS),
    part("peak_skip", PEAK, HEADS),
];

/// Parts that are not trained.
pub const NORMS: usize = 6;
/// Features enter within this many of their standard deviations.
pub const CLAMP: f32 = 6.0;

/// Where each part begins in a member, and behind the last its length.
pub const OFFSETS: [usize; PARTS.len() + 1] = {
    let mut offsets = [0; PARTS.len() + 1];
    let mut i = 0;
    while i < PARTS.len() {
        offsets[i + 1] = offsets[i] + PARTS[i].len();
        i += 1;
    }
    offsets
};
/// Number of weights of a member.
pub const COUNT: usize = OFFSETS[PARTS.len()];

/// A network that is ready to run.
#[derive(Clone, Debug)]
pub struct Weights {
    pub(super) path: Path,
    /// The members, one behind the other.
    flat: Vec<f32>,
}

impl Weights {
    /// Makes a network of its members' parts, in the order and shapes of [`PARTS`].
    ///
    /// # Errors
    /// [`WeightsError::Count`] and [`WeightsError::Value`].
    pub fn new(flat: Vec<f32>) -> Result<Self, WeightsError> {
        if flat.is_empty() || !flat.len().is_multiple_of(COUNT) || flat.len() / COUNT > MEMBERS_MOST {
            let (what, found) = (FORMAT.what, flat.len());
            return Err(WeightsError::Count { what, found, expected: COUNT, most: COUNT * MEMBERS_MOST });
        }
        for member in flat.chunks_exact(COUNT) {
            for (part, from) in PARTS.iter().zip(OFFSETS) {
                FORMAT.check(*part, &member[from..from + part.len()])?;
            }
        }
        Ok(Self { path: Path::best(), flat })
    }

    /// The same network on other instructions, for tests and measurements.
    #[must_use]
    pub fn on(mut self, path: Path) -> Self {
        self.path = path;
        self
    }

    /// Each member's weights.
    pub fn members(&self) -> impl Iterator<Item = &[f32]> {
        self.flat.chunks_exact(COUNT)
    }

    /// Serialises the network, see the module's head. Deterministic.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        FORMAT.write(&shape(self.flat.len() / COUNT), &self.flat)
    }

    /// Makes a network of what [`Weights::to_bytes`] gave.
    ///
    /// # Errors
    /// See [`WeightsError`]. Any bytes are refused or accepted without panic.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WeightsError> {
        Self::new(FORMAT.read(bytes, |found| {
            let members = usize::from(found.last().copied().unwrap_or(0)).clamp(1, MEMBERS_MOST);
            (shape(members), COUNT * members)
        })?)
    }

    /// Memory of the network.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        4 * self.flat.len()
    }
}

fn shape(members: usize) -> [u16; 10] {
    [RECENT, CHANNELS, FIXED, STEP, PEAK, HIDDEN, WIDTH, HEADS, GATES, members].map(|size| size as u16)
}
