//! A trainer as bytes, from which the same training goes on.
//!
//! ```text
//! offset  bytes  content, all little-endian
//!      0      8  magic "PSTGTRNG"
//!      8      4  version
//!     12      4  CRC-32C of everything behind it
//!     16      …  digest of the tokens u32, seed u64, learning rate f64,
//!                steps u64, epoch u64, pieces taken u64, bits trained and held out f64, failed and halvings u32,
//!                each lane: sequence u64, token u64, windows u64
//!                f32: hidden and cell values of the lanes, weights,
//!                     Adam's first and second moments (if steps > 0), best weights (if bits held out are finite)
//! ```
//!
//! The tokens are not kept: they come from the history, and the digest tells whether they are the same. A file is
//! written whole by its owner, hence no order of writes here.

use crate::corpus::{Corpus, LANES, Lanes, Piece, Place};
use crate::network::Backend;
use crate::trainer::{FlatMoments, Standing, TrainConfig, Trainer};
use prestage_predictor::lstm::weights::COUNT;
use prestage_predictor::lstm::{HIDDEN, Weights, WeightsError};
use thiserror::Error;

const MAGIC: [u8; 8] = *b"PSTGTRNG";
/// Version of the format; raised whenever the meaning of the bytes, or the order of training, changes.
const VERSION: u32 = 1;
const CHECKED_FROM: usize = 16;

/// Why a training cannot be taken up again.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum ResumeError {
    #[error("not a prestage checkpoint: it does not begin with PSTGTRNG; start the training anew")]
    NotACheckpoint,
    #[error(
        "the checkpoint has format version {found}, this program reads version {expected}; start the training anew"
    )]
    OtherVersion { found: u32, expected: u32 },
    #[error("the checkpoint's checksum is {found:#010x}, not {expected:#010x}: it is damaged; start the training anew")]
    Checksum { found: u32, expected: u32 },
    #[error("the checkpoint is of other tokens (digest {found:#010x}, not {expected:#010x}); start the training anew")]
    OtherTokens { found: u32, expected: u32 },
    #[error("the checkpoint is damaged (bad {0}) although its checksum is right; start the training anew")]
    Damaged(&'static str),
    #[error("the checkpoint's weights are of no use")]
    Weights(#[from] WeightsError),
}

impl Trainer {
    /// Serialises the training. Deterministic.
    #[must_use]
    pub fn checkpoint(&self) -> Vec<u8> {
        let Standing { steps, trained_bits, best_bits, failed, halvings, hidden, cell } = &self.standing;
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.corpus.digest().to_le_bytes());
        bytes.extend(self.config.seed.to_le_bytes());
        bytes.extend(self.config.learning_rate.to_le_bytes());
        for number in [*steps, self.lanes.epoch, self.lanes.taken as u64] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(trained_bits.to_le_bytes());
        bytes.extend(best_bits.to_le_bytes());
        bytes.extend(failed.to_le_bytes());
        bytes.extend(halvings.to_le_bytes());
        for Piece { at: Place { sequence, token }, windows } in &self.lanes.lanes {
            bytes.extend([*sequence, *token, *windows].iter().flat_map(|number| (*number as u64).to_le_bytes()));
        }
        let mut floats = |values: &[f32]| bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        floats(hidden);
        floats(cell);
        floats(&self.flat_weights());
        if let Some(FlatMoments { first, second }) = self.flat_moments() {
            floats(&first);
            floats(&second);
        }
        if let Some(best) = &self.best {
            floats(best.flat());
        }
        let checksum = crc32c::crc32c(&bytes[CHECKED_FROM..]);
        bytes[CHECKED_FROM - 4..CHECKED_FROM].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Takes up the training that [`Trainer::checkpoint`] kept. On the same backend it goes on as if it had never been
    /// interrupted.
    ///
    /// # Errors
    /// See [`ResumeError`]. Any bytes are refused or accepted without panic.
    pub fn resume(bytes: &[u8], corpus: Corpus, backend: Backend) -> Result<Self, ResumeError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(ResumeError::NotACheckpoint)?;
        let mut header = Reader(rest);
        let version = u32::from_le_bytes(header.take("version")?);
        if version != VERSION {
            return Err(ResumeError::OtherVersion { found: version, expected: VERSION });
        }
        let expected = u32::from_le_bytes(header.take("checksum")?);
        let found = crc32c::crc32c(header.0);
        if found != expected {
            return Err(ResumeError::Checksum { found, expected });
        }
        let mut reader = header;
        let found = u32::from_le_bytes(reader.take("digest")?);
        let expected = corpus.digest();
        if found != expected {
            return Err(ResumeError::OtherTokens { found, expected });
        }
        let seed = reader.number("seed")?;
        let learning_rate = reader.float("learning rate")?;
        if !(learning_rate > 0.0 && learning_rate.is_finite()) {
            return Err(ResumeError::Damaged("learning rate"));
        }
        let steps = reader.number("steps")?;
        // what Adam counts with
        i32::try_from(steps).map_err(|_| ResumeError::Damaged("steps"))?;
        let epoch = reader.number("epoch")?;
        let taken = reader.index("pieces")?;
        let (trained_bits, best_bits) = (reader.float("bits")?, reader.float("bits")?);
        let failed = u32::from_le_bytes(reader.take("evaluations")?);
        let halvings = u32::from_le_bytes(reader.take("evaluations")?);
        // no training halves a rate more often: it has converged long before
        if halvings > 1 << 20 {
            return Err(ResumeError::Damaged("evaluations"));
        }
        let mut lanes = Vec::with_capacity(LANES);
        for _ in 0..LANES {
            let at = Place { sequence: reader.index("lane")?, token: reader.index("lane")? };
            lanes.push(Piece { at, windows: reader.index("lane")? });
        }
        let lanes = Lanes::restore(&corpus, seed, epoch, taken, lanes).ok_or(ResumeError::Damaged("lane"))?;
        let hidden = reader.floats(LANES * HIDDEN, "state")?;
        let cell = reader.floats(LANES * HIDDEN, "state")?;
        let weights = Weights::new(reader.floats(COUNT, "weights")?)?;
        let moments = (steps > 0)
            .then(|| {
                let first = reader.floats(COUNT, "moments")?;
                let second = reader.floats(COUNT, "moments")?;
                let sound = second.iter().all(|value| *value >= 0.0);
                sound.then_some(FlatMoments { first, second }).ok_or(ResumeError::Damaged("moments"))
            })
            .transpose()?;
        let best = best_bits
            .is_finite()
            .then(|| Ok::<_, ResumeError>(Weights::new(reader.floats(COUNT, "weights")?)?))
            .transpose()?;
        if !reader.0.is_empty() {
            return Err(ResumeError::Damaged("length"));
        }
        let standing = Standing { steps, trained_bits, best_bits, failed, halvings, hidden, cell };
        let config = TrainConfig { seed, learning_rate, backend };
        Ok(Self::assemble(config, corpus, lanes, standing, best, weights.flat(), moments))
    }
}

/// What is left of the bytes.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ResumeError> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(ResumeError::Damaged(what))?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn number(&mut self, what: &'static str) -> Result<u64, ResumeError> {
        self.take(what).map(u64::from_le_bytes)
    }

    fn index(&mut self, what: &'static str) -> Result<usize, ResumeError> {
        usize::try_from(self.number(what)?).map_err(|_| ResumeError::Damaged(what))
    }

    fn float(&mut self, what: &'static str) -> Result<f64, ResumeError> {
        self.take(what).map(f64::from_le_bytes)
    }

    /// `count` finite floats.
    fn floats(&mut self, count: usize, what: &'static str) -> Result<Vec<f32>, ResumeError> {
        let (bytes, rest) = self.0.split_at_checked(4 * count).ok_or(ResumeError::Damaged(what))?;
        self.0 = rest;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect();
        if values.iter().all(|value| value.is_finite()) { Ok(values) } else { Err(ResumeError::Damaged(what)) }
    }
}
