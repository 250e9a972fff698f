//! What a predictor learned, as bytes.
//!
//! ```text
//! offset  bytes  content
//!      0      8  magic "PSTGPROF"
//!      8      4  version, little-endian
//!     12      8  payload length, little-endian
//!     20      4  CRC-32C of the payload, little-endian
//!     24      …  payload
//! ```
//!
//! The payload is a sequence of variable-length integers (`wire`): phase sets (`phase`), and what the
//! hybrid learned: context counts, weights, calibration, the log of reads, chains of blocks. What belongs to the moment is
//! not saved: runs, recent touches, recordings. Phases that run are saved as if they ended now, without ending them, so that a daemon
//! that is stopped or killed keeps them and one that goes on counts them once.
//!
//! A file is written whole by its owner, hence no order of writes here: a torn file fails the length or the checksum.

use crate::access::{PAGE_BYTES, Phase};
use crate::phase::PhaseSet;
use crate::predictor::{AccessConfig, AccessPredictor, StoredSet};
use crate::wire::{Reader, WireError, put};
use thiserror::Error;

const MAGIC: [u8; 8] = *b"PSTGPROF";
/// Version of the format; raised whenever the payload's meaning changes.
pub const VERSION: u32 = 3;
const HEADER_BYTES: usize = 24;

/// Why bytes are not a profile of this program.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProfileError {
    #[error(
        "not a prestage profile: it does not begin with PSTGPROF; remove it with \
         \"prestagectl profile remove NAME\" to learn anew"
    )]
    NotAProfile,
    #[error(
        "the profile has format version {found}, this program reads version {expected}; remove it with \
         \"prestagectl profile remove NAME\" to learn anew"
    )]
    OtherVersion { found: u32, expected: u32 },
    #[error(
        "the profile is truncated: {found} bytes of {expected}; remove it with \"prestagectl profile remove NAME\" to \
         learn anew"
    )]
    Truncated { found: u64, expected: u64 },
    #[error(
        "the profile's checksum is {found:#010x}, not {expected:#010x}: it is damaged; remove it with \"prestagectl \
         profile remove NAME\" to learn anew"
    )]
    Checksum { found: u32, expected: u32 },
    #[error(
        "the profile is damaged (bad {0}) although its checksum is right; remove it with \"prestagectl profile remove \
         NAME\" to learn anew"
    )]
    Damaged(&'static str),
}

impl From<WireError> for ProfileError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::End => Self::Damaged("length"),
            WireError::Invalid(what) => Self::Damaged(what),
        }
    }
}

/// One learned phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhaseSummary {
    pub phase: Phase,
    pub runs: u32,
    pub extents: usize,
    pub bytes: u64,
}

/// What is learned, in numbers. Running phases count as if they ended now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileSummary {
    pub phases: Vec<PhaseSummary>,
    /// Reads in the log.
    pub log_reads: usize,
    pub markov_contexts: usize,
    /// Heap memory of the predictor.
    pub memory_bytes: usize,
}

impl AccessPredictor {
    /// Serialises what was learned. Deterministic.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let phases = self.learned();
        let mut payload = Vec::new();
        let mut by_use: Vec<&StoredSet> = phases.iter().collect();
        by_use.sort_by_key(|stored| stored.used);
        put(&mut payload, by_use.len() as u64);
        for stored in by_use {
            match stored.phase {
                Phase::Boot => put(&mut payload, 0),
                Phase::Program(id) => {
                    put(&mut payload, 1);
                    put(&mut payload, id);
                }
            }
            stored.set.write(&mut payload);
        }
        self.hybrid.write(&mut payload);

        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.extend(crc32c::crc32c(&payload).to_le_bytes());
        bytes.append(&mut payload);
        bytes
    }

    /// Makes a predictor that knows what `bytes` hold. `config` need not be that of the writer: smaller limits keep the
    /// most recently used.
    ///
    /// # Errors
    /// See [`ProfileError`]. Any bytes are refused or accepted without panic, in memory proportional to their length.
    pub fn from_bytes(bytes: &[u8], config: AccessConfig) -> Result<Self, ProfileError> {
        let mut predictor = Self::new(config);
        let mut reader = Reader::new(payload(bytes)?);
        let reader = &mut reader;
        let count = reader.count(16, "count of phases")?;
        for _ in 0..count {
            let phase = match reader.at_most(1, "kind of a phase")? {
                0 => Phase::Boot,
                _ => Phase::Program(reader.number()?),
            };
            let set = PhaseSet::read(reader)?;
            if predictor.phases.iter().any(|stored| stored.phase == phase) {
                return Err(ProfileError::Damaged("phase: twice"));
            }
            predictor.uses += 1;
            predictor.phases.push(StoredSet { phase, set, used: predictor.uses });
        }
        let surplus = predictor.phases.len().saturating_sub(predictor.config.phase_sets.max(1));
        predictor.phases.drain(..surplus);
        predictor.hybrid.restore(reader)?;
        if !reader.is_empty() {
            return Err(ProfileError::Damaged("length"));
        }
        Ok(predictor)
    }

    /// What is learned, in numbers.
    #[must_use]
    pub fn summary(&self) -> ProfileSummary {
        let phases = self.learned();
        let mut phases: Vec<PhaseSummary> = phases
            .iter()
            .map(|stored| PhaseSummary {
                phase: stored.phase,
                runs: stored.set.runs(),
                extents: stored.set.extents(),
                bytes: stored.set.pages() * PAGE_BYTES,
            })
            .collect();
        phases.sort_by_key(|summary| summary.phase);
        ProfileSummary {
            phases,
            log_reads: self.hybrid.log_reads(),
            markov_contexts: self.hybrid.markov_contexts(),
            memory_bytes: self.memory_bytes(),
        }
    }
}

/// The payload, if header, length and checksum are right.
fn payload(bytes: &[u8]) -> Result<&[u8], ProfileError> {
    let found = bytes.len() as u64;
    let begins = bytes.len().min(MAGIC.len());
    if bytes.is_empty() || bytes[..begins] != MAGIC[..begins] {
        return Err(ProfileError::NotAProfile);
    }
    let mut reader = bytes;
    let truncated = ProfileError::Truncated { found, expected: HEADER_BYTES as u64 };
    let mut take = |count: usize| {
        let (head, rest) = reader.split_at_checked(count)?;
        reader = rest;
        let mut number = [0u8; 8];
        number[..count].copy_from_slice(head);
        Some(u64::from_le_bytes(number))
    };
    let (Some(_), Some(version)) = (take(8), take(4)) else { return Err(truncated) };
    if version != u64::from(VERSION) {
        return Err(ProfileError::OtherVersion { found: version as u32, expected: VERSION });
    }
    let (Some(length), Some(checksum)) = (take(8), take(4)) else { return Err(truncated) };
    let body = &bytes[HEADER_BYTES..];
    if length > body.len() as u64 {
        return Err(ProfileError::Truncated { found, expected: length.saturating_add(HEADER_BYTES as u64) });
    }
    if length < body.len() as u64 {
        return Err(ProfileError::Damaged("length"));
    }
    let (found, expected) = (crc32c::crc32c(body), checksum as u32);
    if found != expected {
        return Err(ProfileError::Checksum { found, expected });
    }
    Ok(body)
}
