//! What the files of both networks have in common.
//!
//! ```text
//! offset  bytes  content, all little-endian
//!      0      8  magic
//!      8      4  version
//!     12      4  CRC-32C of everything behind it
//!     16    2 n  shape: n numbers that the length follows from; u16
//!          4 m  the parts in order, each row-major; f32
//! ```
//!
//! Only one shape is read: a model of another is of another version of this program. A file is written whole by its owner, hence no order
//! of writes here.

use thiserror::Error;

/// What is checked begins here.
const CHECKED_FROM: usize = 16;

/// No weight of a trained model comes near this; beneath it no sum of the kernels can overflow.
pub(crate) const LARGEST: f32 = 1e4;

/// A file's kind: what people call its content, its magic and version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub(crate) what: &'static str,
    pub(crate) magic: &'static str,
    pub(crate) version: u32,
}

/// Name and shape of one part of a model.
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

/// Why something is not a model of this program.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum WeightsError {
    #[error("not a prestage {what}: it does not begin with {magic}; train a new one")]
    NotWeights { what: &'static str, magic: &'static str },
    #[error("the {what} has format version {found}, this program reads version {expected}; train a new one")]
    OtherVersion { what: &'static str, found: u32, expected: u32 },
    #[error("the {what} has {found} bytes, not {expected}: it is truncated or of another shape; train a new one")]
    Length { what: &'static str, found: usize, expected: usize },
    #[error("the {what}'s checksum is {found:#010x}, not {expected:#010x}: it is damaged; train a new one")]
    Checksum { what: &'static str, found: u32, expected: u32 },
    #[error("the {what} has the shape {found:?}, this program reads {expected:?}; train a new one")]
    Shape { what: &'static str, found: Vec<u16>, expected: Vec<u16> },
    #[error("the {what} has {found} weights, not a multiple of {expected} up to {most}; train a new one")]
    Count { what: &'static str, found: usize, expected: usize, most: usize },
    #[error("weight {index} of the {what}'s part {part} is {value}, beyond ±{LARGEST}; train a new one")]
    Value { what: &'static str, part: &'static str, index: usize, value: f32 },
}

impl Format {
    /// A model as bytes. Deterministic.
    pub(crate) fn write(&self, shape: &[u16], weights: &[f32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CHECKED_FROM + 2 * shape.len() + 4 * weights.len());
        bytes.extend(self.magic.as_bytes());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(shape.iter().flat_map(|size| size.to_le_bytes()));
        bytes.extend(weights.iter().flat_map(|value| value.to_le_bytes()));
        let checksum = crc32c::crc32c(&bytes[CHECKED_FROM..]);
        bytes[CHECKED_FROM - 4..CHECKED_FROM].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The weights of what [`Format::write`] gave. `like` says of the shape that was found which one is read, and how many weights
    /// that has; both shapes are of `N` numbers.
    ///
    /// # Errors
    /// All but `Count` and `Value`. Any bytes are refused or accepted without panic.
    pub(crate) fn read<const N: usize>(
        &self,
        bytes: &[u8],
        like: impl FnOnce(&[u16]) -> ([u16; N], usize),
    ) -> Result<Vec<f32>, WeightsError> {
        let Self { what, magic, version } = *self;
        let rest = bytes.strip_prefix(magic.as_bytes()).ok_or(WeightsError::NotWeights { what, magic })?;
        let length = |weights: usize| WeightsError::Length {
            what,
            found: bytes.len(),
            expected: CHECKED_FROM + 2 * N + 4 * weights,
        };
        let (found, rest) = rest.split_first_chunk().ok_or_else(|| length(0))?;
        let found = u32::from_le_bytes(*found);
        if found != version {
            return Err(WeightsError::OtherVersion { what, found, expected: version });
        }
        let (checksum, checked) = rest.split_first_chunk().ok_or_else(|| length(0))?;
        let (shape, parts) = checked.split_at_checked(2 * N).ok_or_else(|| length(0))?;
        let (found, expected) = (crc32c::crc32c(checked), u32::from_le_bytes(*checksum));
        if found != expected {
            return Err(WeightsError::Checksum { what, found, expected });
        }
        let found: Vec<u16> = shape.as_chunks().0.iter().map(|size| u16::from_le_bytes(*size)).collect();
        let (expected, weights) = like(&found);
        if found != expected {
            return Err(WeightsError::Shape { what, found, expected: expected.to_vec() });
        }
        if parts.len() != 4 * weights {
            return Err(length(weights));
        }
        Ok(parts.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }

    /// Errors: `Value` of the first weight of a part that is no sound number.
    pub(crate) fn check(&self, part: Part, values: &[f32]) -> Result<(), WeightsError> {
        match values.iter().position(|value| value.is_nan() || value.abs() > LARGEST) {
            None => Ok(()),
            Some(index) => Err(WeightsError::Value { what: self.what, part: part.name, index, value: values[index] }),
        }
    }
}
