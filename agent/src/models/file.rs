//! A model as a file, to carry it to another host.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | [`MAGIC`] |
//! | 4 | [`VERSION`], little endian as all numbers |
//! | 4 | length of the header |
//! | … | header: [`Header`] as JSON |
//! | … | weights, in the trainer's own format |
//! | 4 | CRC-32C of everything before |

use prestage_integration::api::models::ModelMetrics;
use serde::{Deserialize, Serialize};

/// First bytes of every such file.
pub const MAGIC: [u8; 8] = *b"PSTGMODL";
/// Files of another version are refused.
pub const VERSION: u32 = 1;
/// Magic, version, length of the header.
const FRONT: usize = 16;
const CHECKSUM: usize = 4;

/// Where a model comes from and what it was trained on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Header {
    /// `lstm`.
    pub kind: String,
    /// `global` or the identity of a storage, on the host it comes from.
    pub scope: String,
    /// Name of that host, and the model's number there.
    pub host: String,
    pub id: i64,
    pub seed: u64,
    /// Accesses it was trained on, and when they were (Unix µs).
    pub tokens: u64,
    pub from_us: u64,
    pub to_us: u64,
    /// Measured there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<ModelMetrics>,
}

/// Why bytes are no model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    #[error("this is no model: it does not begin as what `prestagectl model export` writes does")]
    Foreign,
    #[error(
        "the model was exported by another version of prestage (format {found}, this one reads {VERSION}); export it anew there, or upgrade"
    )]
    Version { found: u32 },
    #[error("the model is damaged or cut short: its checksum does not fit; copy the file anew")]
    Damaged,
    #[error("the model's header cannot be read: {0}; export it anew")]
    Header(String),
}

/// The file's bytes.
#[must_use]
pub fn encode(header: &Header, weights: &[u8]) -> Vec<u8> {
    // Strings and finite numbers are always JSON.
    let json = serde_json::to_vec(header).unwrap_or_default();
    let length = u32::try_from(json.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(FRONT + json.len() + weights.len() + CHECKSUM);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(json);
    bytes.extend(weights);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Header and weights of a file; the weights are for the trainer to check.
///
/// # Errors
/// See [`FileError`].
pub fn decode(bytes: &[u8]) -> Result<(Header, &[u8]), FileError> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(FileError::Foreign)?;
    let (version, _) = rest.split_first_chunk().ok_or(FileError::Damaged)?;
    // Before the checksum, which another version may keep elsewhere.
    match u32::from_le_bytes(*version) {
        VERSION => {}
        found => return Err(FileError::Version { found }),
    }
    let (body, sum) = bytes.split_last_chunk::<CHECKSUM>().ok_or(FileError::Damaged)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
        return Err(FileError::Damaged);
    }
    let (length, rest) = body.get(FRONT - 4..).and_then(|rest| rest.split_first_chunk()).ok_or(FileError::Damaged)?;
    let (header, weights) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(FileError::Damaged)?;
    let header = serde_json::from_slice(header).map_err(|error| FileError::Header(error.to_string()))?;
    Ok((header, weights))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            kind: "lstm".into(),
            scope: "file:/srv/ü".into(),
            host: "hv1".into(),
            id: 7,
            seed: u64::MAX,
            tokens: 3,
            from_us: 1,
            to_us: 2,
            metrics: Some(ModelMetrics::default()),
        }
    }

    #[test]
    fn other_files_and_other_versions_are_told_from_damage() {
        let file = encode(&header(), b"weights");
        assert_eq!(decode(b""), Err(FileError::Foreign));
        assert_eq!(decode(b"PSTGLSTM and more"), Err(FileError::Foreign));
        assert_eq!(decode(&MAGIC), Err(FileError::Damaged));
        let mut newer = file.clone();
        newer[8] = 2;
        assert_eq!(decode(&newer), Err(FileError::Version { found: 2 }));
        // Whole, and still nonsense: a header longer than the file, and one that is none.
        for (at, value) in [(12, 0xff), (16, b'x')] {
            let mut odd = file.clone();
            odd[at] = value;
            let end = odd.len() - CHECKSUM;
            let sum = crc32c::crc32c(&odd[..end]).to_le_bytes();
            odd[end..].copy_from_slice(&sum);
            assert!(matches!(decode(&odd), Err(FileError::Damaged | FileError::Header(_))), "{at}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_any_damage_is_noticed(
            weights in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            bit in 0..8u8,
        ) {
            let file = encode(&header(), &weights);
            prop_assert_eq!(decode(&file), Ok((header(), weights.as_slice())));
            prop_assert!(decode(&file[..at.index(file.len())]).is_err());
            let mut damaged = file;
            let at = at.index(damaged.len());
            damaged[at] ^= 1 << bit;
            prop_assert!(decode(&damaged).is_err());
        }

        #[test]
        fn any_bytes_are_a_model_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode(&[&MAGIC[..], &bytes].concat()).is_err());
        }
    }
}
