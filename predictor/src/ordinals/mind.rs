//! What a model makes of one VM's reads: its state, the tokens that it has not read yet, and its latest word.
//!
//! The model runs behind the reads, whenever the predictor's owner lets it. Its word is about the reads 1, 4 and 8 after the
//! last token it had; of these only those still to come are listened to, and after eight reads nothing is.

use crate::lstm::{Lead, SYMBOLS, State, Token, Weights};

/// Tokens kept for the model; of more, the oldest are lost to it.
const QUEUE: usize = 256;
/// Log odds below and above which all are alike, in nats.
const LEAST: f32 = -7.0;
const MOST: f32 = 7.0;
/// Levels that log odds are told apart by; 0 is "nothing said".
pub(crate) const LEVELS: u32 = 16;

/// Levels by symbol.
pub(crate) type Word = [u8; SYMBOLS];

#[derive(Clone, Debug)]
pub(crate) struct Mind {
    tokens: [u16; QUEUE],
    head: u16,
    len: u16,
    /// Reads since the model spoke; more than the last lead: nothing counts.
    age: u32,
    state: State,
    /// The state has changed since the model spoke.
    heeding: bool,
    /// By the first lead that is still to come.
    words: [Word; Lead::ALL.len()],
}

impl Mind {
    pub(crate) fn new() -> Self {
        Self {
            tokens: [0; QUEUE],
            head: 0,
            len: 0,
            age: u32::MAX,
            state: State::default(),
            heeding: false,
            words: [[0; SYMBOLS]; Lead::ALL.len()],
        }
    }

    /// A read.
    pub(crate) fn push(&mut self, token: Token) {
        let at = (usize::from(self.head) + usize::from(self.len)) % QUEUE;
        self.tokens[at] = token.bits();
        if usize::from(self.len) < QUEUE {
            self.len += 1;
        } else {
            self.head = (self.head + 1) % QUEUE as u16;
        }
        self.age = self.age.saturating_add(1);
    }

    /// What the model says of the reads still to come, unless it is too long ago.
    pub(crate) fn word(&self) -> Option<&Word> {
        let lead = Lead::ALL.iter().position(|lead| self.age < lead.accesses() as u32)?;
        Some(&self.words[lead])
    }

    /// The oldest token that the model has not read.
    pub(crate) fn pop(&mut self) -> Option<Token> {
        if self.len == 0 {
            return None;
        }
        let token = Token::from_bits(self.tokens[usize::from(self.head)]);
        self.head = (self.head + 1) % QUEUE as u16;
        self.len -= 1;
        token
    }

    /// What reads the token taken out; then the model has something to say.
    pub(crate) fn heed(&mut self) -> &mut State {
        self.heeding = true;
        &mut self.state
    }

    /// Another model: nothing of the last one holds.
    pub(crate) fn forget(&mut self) {
        (self.state, self.age, self.heeding) = (State::default(), u32::MAX, false);
    }

    /// The model has read all tokens and says what it expects, unless it has read nothing since it spoke last.
    pub(crate) fn speak(&mut self, weights: &Weights) {
        if !std::mem::take(&mut self.heeding) {
            return;
        }
        let mut misses = [1f32; SYMBOLS];
        for (lead, word) in Lead::ALL.into_iter().zip(&mut self.words).rev() {
            let mut logits = [0f32; SYMBOLS];
            weights.logits(&self.state, lead, &mut logits);
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            let mut sum = 0.0;
            for logit in &mut logits {
                *logit = (*logit - largest).exp();
                sum += *logit;
            }
            for ((miss, exp), level) in misses.iter_mut().zip(logits).zip(word) {
                *miss *= 1.0 - exp / sum;
                *level = level_of(*miss);
            }
        }
        self.age = 0;
    }
}

/// Level of a symbol that fails to come with probability `miss`.
fn level_of(miss: f32) -> u8 {
    let odds = ((1.0 - miss).max(1e-6) / miss.max(1e-6)).ln().clamp(LEAST, MOST);
    1 + ((odds - LEAST) * ((LEVELS - 2) as f32 / (MOST - LEAST))).round() as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lstm::weights::COUNT;

    fn token(symbol: u8) -> Token {
        Token::new(symbol, 0, 0, 0).unwrap()
    }

    #[test]
    fn a_word_is_heard_until_its_last_lead_and_the_oldest_tokens_make_room() {
        let weights = Weights::new(vec![0.01; COUNT]).unwrap();
        let mut mind = Mind::new();
        mind.speak(&weights);
        assert!(mind.word().is_none(), "nothing was read");
        mind.heed();
        mind.speak(&weights);
        let words = mind.words;
        for heard in [0, 1, 1, 1, 2, 2, 2, 2] {
            assert_eq!(mind.word(), Some(&words[heard]));
            mind.push(token(1));
        }
        assert!(mind.word().is_none());
        let tokens: Vec<Token> = (0..QUEUE as u16).map(|bits| Token::from_bits(bits).unwrap()).collect();
        tokens.iter().for_each(|token| mind.push(*token));
        assert!(std::iter::from_fn(|| mind.pop()).eq(tokens));
        mind.heed();
        mind.speak(&weights);
        mind.forget();
        assert!(mind.word().is_none() && *mind.heed() == State::default());
    }

    #[test]
    fn levels_rise_with_the_odds_and_leave_zero_to_silence() {
        let levels: Vec<u8> = [1.0, 0.99, 0.9, 0.5, 0.1, 0.01, 0.0].map(level_of).to_vec();
        assert!(
            levels.is_sorted() && levels[0] == 1 && levels[3] == 8 && u32::from(levels[6]) == LEVELS - 1,
            "{levels:?}"
        );
    }
}
