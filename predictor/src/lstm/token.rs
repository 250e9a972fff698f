//! What the model reads, one token an access, and how far ahead it looks.

use super::{GAPS, OPS, SIZES, SYMBOLS};

/// One access as the model sees it, packed into 14 bits: symbol (6), operation (2), size (3), gap (3), from the low end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(u16);

impl Token {
    /// `symbol` < 64 is the ordinal that was accessed; `op` < 4; `size` < 8 and `gap` < 8 are logarithmic buckets of the
    /// request's pages and of the time since the stream's last access. `None` if one is out of its range.
    #[must_use]
    pub fn new(symbol: u8, op: u8, size: u8, gap: u8) -> Option<Self> {
        let fits = |value: u8, count: usize| usize::from(value) < count;
        (fits(symbol, SYMBOLS) && fits(op, OPS) && fits(size, SIZES) && fits(gap, GAPS))
            .then(|| Self(u16::from(symbol) | u16::from(op) << 6 | u16::from(size) << 8 | u16::from(gap) << 11))
    }

    /// [`Token::new`] of parts that are known to be in range; those that are not lose their upper bits.
    pub(crate) fn of(symbol: u8, op: u8, size: u8, gap: u8) -> Self {
        Self(u16::from(symbol & 63) | u16::from(op & 3) << 6 | u16::from(size & 7) << 8 | u16::from(gap & 7) << 11)
    }

    /// The token that [`Token::bits`] gave; `None` if `bits` are not a token's.
    #[must_use]
    pub fn from_bits(bits: u16) -> Option<Self> {
        (bits < 1 << 14).then_some(Self(bits))
    }

    #[must_use]
    pub fn bits(self) -> u16 {
        self.0
    }

    #[must_use]
    pub fn symbol(self) -> u8 {
        (self.0 & 63) as u8
    }

    #[must_use]
    pub fn op(self) -> u8 {
        (self.0 >> 6 & 3) as u8
    }

    #[must_use]
    pub fn size(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    #[must_use]
    pub fn gap(self) -> u8 {
        (self.0 >> 11 & 7) as u8
    }
}

/// How many accesses ahead a prediction looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lead {
    Next,
    Fourth,
    Eighth,
}

impl Lead {
    pub const ALL: [Self; 3] = [Self::Next, Self::Fourth, Self::Eighth];

    /// In accesses: 1 is the next one.
    #[must_use]
    pub const fn accesses(self) -> usize {
        match self {
            Self::Next => 1,
            Self::Fourth => 4,
            Self::Eighth => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_keeps_its_parts_and_refuses_others() {
        for bits in 0..=u16::MAX {
            let token = Token::from_bits(bits);
            assert_eq!(token.is_some(), bits < 1 << 14);
            if let Some(token) = token {
                assert_eq!(Token::new(token.symbol(), token.op(), token.size(), token.gap()), Some(token));
                assert_eq!(token.bits(), bits);
            }
        }
        for (symbol, op, size, gap) in [(64, 0, 0, 0), (0, 4, 0, 0), (0, 0, 8, 0), (0, 0, 0, 8)] {
            assert_eq!(Token::new(symbol, op, size, gap), None);
        }
    }
}
