//! The network's weights: members of fixed shape whose quantiles are averaged, as bytes.
//!
//! ```text
//! offset  bytes  content, all little-endian
//!      0      8  magic "PSTGDMND"
//!      8      4  version
//!     12      4  CRC-32C of everything behind it
//!     16     20  shape: steps read, channels, features of origin, step and maximum, hidden, width, quantiles, gates, members; u16
//!     36      …  for each member the parts of [`PARTS`] in order, each row-major; f32
//! ```
//!
//! The length follows from the shape, and only one shape is read, with 1 to [`MEMBERS_MOST`] members. A file is written
//! whole by its owner, hence no order of writes here.

use super::QUANTILES;
use super::features::{CHANNELS, FIXED, PEAK, RECENT, STEP};
use crate::lstm::Path;
use thiserror::Error;

const MAGIC: [u8; 8] = *b"PSTGDMND";
/// Version of the format; raised whenever the meaning of the bytes, or of the features, changes.
pub const VERSION: u32 = 1;
const CHECKED_FROM: usize = 16;
const SHAPE_BYTES: usize = 20;
const HEADER_BYTES: usize = CHECKED_FROM + SHAPE_BYTES;

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

/// Name and shape of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub name: &'static str,
    pub rows: usize,
    pub columns: usize,
}

impl Part {
    #[must_use]
    pub const fn len(self) -> usize {
        self.rows * self.columns
    }

    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }
}

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

/// No weight of a trained model comes near this; beneath it no sum of the kernel can overflow.
const LARGEST: f32 = 1e4;

/// Why something is not a demand model of this program.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum WeightsError {
    #[error("not a prestage demand model: it does not begin with PSTGDMND; train a new one")]
    NotWeights,
    #[error("the demand model has format version {found}, this program reads version {expected}; train a new one")]
    OtherVersion { found: u32, expected: u32 },
    #[error("the demand model has {found} bytes, not {expected}: it is truncated or of another shape; train a new one")]
    Length { found: usize, expected: usize },
    #[error("the demand model's checksum is {found:#010x}, not {expected:#010x}: it is damaged; train a new one")]
    Checksum { found: u32, expected: u32 },
    #[error("the demand model has the shape {found:?}, this program reads {expected:?}; train a new one")]
    Shape { found: Vec<u16>, expected: Vec<u16> },
    #[error("a demand model has 1 to {MEMBERS_MOST} members of {COUNT} weights, not {found} weights; train a new one")]
    Count { found: usize },
    #[error("weight {index} of the demand model's part {part} is {value}, beyond ±{LARGEST}; train a new one")]
    Value { part: &'static str, index: usize, value: f32 },
}

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
            return Err(WeightsError::Count { found: flat.len() });
        }
        for member in flat.chunks_exact(COUNT) {
            for (part, from) in PARTS.iter().zip(OFFSETS) {
                let values = &member[from..from + part.len()];
                if let Some(index) = values.iter().position(|value| value.is_nan() || value.abs() > LARGEST) {
                    return Err(WeightsError::Value { part: part.name, index, value: values[index] });
                }
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
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 4 * self.flat.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(shape(self.flat.len() / COUNT).iter().flat_map(|size| size.to_le_bytes()));
        bytes.extend(self.flat.iter().flat_map(|value| value.to_le_bytes()));
        let checksum = crc32c::crc32c(&bytes[CHECKED_FROM..]);
        bytes[CHECKED_FROM - 4..CHECKED_FROM].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Makes a network of what [`Weights::to_bytes`] gave.
    ///
    /// # Errors
    /// See [`WeightsError`]. Any bytes are refused or accepted without panic.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WeightsError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(WeightsError::NotWeights)?;
        let truncated = WeightsError::Length { found: bytes.len(), expected: HEADER_BYTES + 4 * COUNT };
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(truncated.clone())?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(WeightsError::OtherVersion { found: version, expected: VERSION });
        }
        let (checksum, checked) = rest.split_first_chunk::<4>().ok_or(truncated.clone())?;
        let (found_shape, parts) = checked.split_at_checked(SHAPE_BYTES).ok_or(truncated)?;
        let (found, expected) = (crc32c::crc32c(checked), u32::from_le_bytes(*checksum));
        if found != expected {
            return Err(WeightsError::Checksum { found, expected });
        }
        let found: Vec<u16> = found_shape.as_chunks().0.iter().map(|size| u16::from_le_bytes(*size)).collect();
        let members = usize::from(found.last().copied().unwrap_or(0)).clamp(1, MEMBERS_MOST);
        let expected = shape(members);
        if found != expected {
            return Err(WeightsError::Shape { found, expected: expected.to_vec() });
        }
        if parts.len() != 4 * COUNT * members {
            let expected = HEADER_BYTES + 4 * COUNT * members;
            return Err(WeightsError::Length { found: bytes.len(), expected });
        }
        Self::new(parts.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }

    /// Memory of the network.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        4 * self.flat.len()
    }
}

fn shape(members: usize) -> [u16; SHAPE_BYTES / 2] {
    [RECENT, CHANNELS, FIXED, STEP, PEAK, HIDDEN, WIDTH, HEADS, GATES, members].map(|size| size as u16)
}
