//! Token sequences, what is held out of them, and the order they are trained in.
//!
//! The last eighth of each sequence is held out: a model is judged on what came after its training, as it will be used.
//! The rest is cut into pieces; [`LANES`] of them are trained side by side, each from its start with an empty state, a
//! window at a time. No window crosses from one sequence into another.

use crate::Random;
use prestage_predictor::lstm::{Lead, Token};
use thiserror::Error;

/// Sequences that are trained side by side.
pub const LANES: usize = 64;
/// Tokens through which an error is propagated back.
pub const WINDOW: usize = 32;
/// Tokens that are needed to train: less than this is learned by heart within a few steps.
pub const MINIMUM_TOKENS: usize = 8192;
/// Shorter sequences have no window to train and are left out.
pub const SHORTEST: usize = 64;
/// One in so many tokens, at the end of each sequence, is held out.
const HELD_OUT: usize = 8;
/// A piece has at most so many windows, so that the order of a long sequence is mixed.
const PIECE_WINDOWS: usize = 64;
/// Tokens behind a window that its targets need.
const AHEAD: usize = Lead::Eighth.accesses();

/// Why there is nothing to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "too little to train on: {found} tokens in sequences of at least {SHORTEST}, {needed} are needed; let the machine run \
     longer, or train on more machines together"
)]
pub struct CorpusError {
    pub found: usize,
    pub needed: usize,
}

/// What is trained on: at least [`MINIMUM_TOKENS`] in sequences of at least [`SHORTEST`].
#[derive(Clone, Debug)]
pub struct Corpus {
    sequences: Vec<Vec<Token>>,
    left_out: usize,
}

impl Corpus {
    /// Each sequence is the accesses of one stream in order of time.
    ///
    /// # Errors
    /// [`CorpusError`] with how many tokens there are and how many are needed.
    pub fn new(mut sequences: Vec<Vec<Token>>) -> Result<Self, CorpusError> {
        let all: usize = sequences.iter().map(Vec::len).sum();
        sequences.retain(|sequence| sequence.len() >= SHORTEST);
        let found = sequences.iter().map(Vec::len).sum();
        if found < MINIMUM_TOKENS {
            return Err(CorpusError { found, needed: MINIMUM_TOKENS });
        }
        Ok(Self { sequences, left_out: all - found })
    }

    /// Tokens, trained on and held out.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// Tokens of sequences that were too short.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Each sequence with the index of its first token that is held out.
    pub fn splits(&self) -> impl Iterator<Item = (&[Token], usize)> {
        self.sequences.iter().map(|sequence| (sequence.as_slice(), trained(sequence)))
    }

    /// CRC-32C of all tokens and the sequences' lengths.
    #[must_use]
    pub fn digest(&self) -> u32 {
        self.sequences.iter().fold(0, |digest, sequence| {
            let bytes: Vec<u8> = sequence.iter().flat_map(|token| token.bits().to_le_bytes()).collect();
            crc32c::crc32c_append(crc32c::crc32c_append(digest, &(bytes.len() as u64).to_le_bytes()), &bytes)
        })
    }

    /// Steps until every window was trained on once.
    pub(crate) fn epoch_steps(&self) -> u64 {
        (self.windows().div_ceil(LANES)) as u64
    }

    pub(crate) fn token(&self, at: Place) -> Option<Token> {
        self.sequences.get(at.sequence)?.get(at.token).copied()
    }

    /// The pieces of one epoch in the order they are taken. A sequence is cut at another offset every time, so that
    /// windows do not always begin at the same tokens.
    pub(crate) fn pieces(&self, seed: u64, epoch: u64) -> Vec<Piece> {
        let mut random = Random(seed ^ epoch.wrapping_mul(0xd134_2543_de82_ef95));
        let most = self.windows().div_ceil(LANES).clamp(1, PIECE_WINDOWS);
        let mut pieces = Vec::new();
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let usable = trained(tokens) - AHEAD;
            let offset = random.below((usable - WINDOW + 1).min(WINDOW));
            let mut windows = (usable - offset) / WINDOW;
            let mut token = offset;
            while windows > 0 {
                let piece = windows.min(most);
                pieces.push(Piece { at: Place { sequence, token }, windows: piece });
                token += piece * WINDOW;
                windows -= piece;
            }
        }
        for last in (1..pieces.len()).rev() {
            pieces.swap(last, random.below(last + 1));
        }
        pieces
    }

    fn windows(&self) -> usize {
        self.sequences.iter().map(|sequence| (trained(sequence) - AHEAD) / WINDOW).sum()
    }
}

/// Tokens of a sequence that are trained on: at least 7/8 of [`SHORTEST`], so a window and its targets fit.
fn trained(sequence: &[Token]) -> usize {
    sequence.len() - sequence.len() / HELD_OUT
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) sequence: usize,
    pub(crate) token: usize,
}

/// Windows that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) at: Place,
    pub(crate) windows: usize,
}

/// The next window of every lane, and where the training stands.
#[derive(Clone, Debug)]
pub(crate) struct Lanes {
    pub(crate) epoch: u64,
    /// Pieces of the epoch that were taken.
    pub(crate) taken: usize,
    pub(crate) lanes: Vec<Piece>,
    pieces: Vec<Piece>,
    seed: u64,
}

/// Tokens of one step, by time and then by lane.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    pub(crate) inputs: [[Token; LANES]; WINDOW],
    /// For each input, lane and lead the symbol to predict.
    pub(crate) targets: Vec<i32>,
    /// Lanes that begin a piece: their state is empty.
    pub(crate) begins: [bool; LANES],
}

impl Lanes {
    pub(crate) fn new(corpus: &Corpus, seed: u64) -> Self {
        let none = Piece { at: Place { sequence: 0, token: 0 }, windows: 0 };
        Self { epoch: 0, taken: 0, lanes: vec![none; LANES], pieces: corpus.pieces(seed, 0), seed }
    }

    /// The lanes where a checkpoint left them. `None` if no training on `corpus` comes there.
    pub(crate) fn restore(corpus: &Corpus, seed: u64, epoch: u64, taken: usize, lanes: Vec<Piece>) -> Option<Self> {
        let pieces = corpus.pieces(seed, epoch);
        let fits = |piece: &Piece| {
            let end = piece.windows.checked_mul(WINDOW)?.checked_add(piece.at.token)?.checked_add(AHEAD)?;
            (end <= trained(corpus.sequences.get(piece.at.sequence)?)).then_some(())
        };
        let sound = taken <= pieces.len() && lanes.len() == LANES && lanes.iter().all(|piece| fits(piece).is_some());
        sound.then_some(Self { epoch, taken, lanes, pieces, seed })
    }

    pub(crate) fn next(&mut self, corpus: &Corpus) -> Option<Window> {
        let mut begins = [false; LANES];
        for (lane, begins) in self.lanes.iter_mut().zip(&mut begins) {
            if lane.windows > 0 {
                continue;
            }
            if self.taken == self.pieces.len() {
                // A forged checkpoint may stand at the last one.
                self.epoch = self.epoch.wrapping_add(1);
                self.taken = 0;
                self.pieces = corpus.pieces(self.seed, self.epoch);
            }
            *lane = *self.pieces.get(self.taken)?;
            self.taken += 1;
            *begins = true;
        }
        let first = corpus.token(self.lanes.first()?.at)?;
        let mut inputs = [[first; LANES]; WINDOW];
        let mut targets = Vec::with_capacity(WINDOW * LANES * Lead::ALL.len());
        for (time, inputs) in inputs.iter_mut().enumerate() {
            for (lane, input) in self.lanes.iter().zip(inputs) {
                let tokens = corpus.sequences.get(lane.at.sequence)?.get(lane.at.token + time..)?;
                *input = *tokens.first()?;
                for lead in Lead::ALL {
                    targets.push(i32::from(tokens.get(lead.accesses())?.symbol()));
                }
            }
        }
        for lane in &mut self.lanes {
            lane.at.token += WINDOW;
            lane.windows -= 1;
        }
        Some(Window { inputs, targets, begins })
    }
}
