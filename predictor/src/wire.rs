//! Byte encoding of the profile: LEB128 variable-length integers, ZigZag for signed ones, IEEE floats as little-endian.
//!
//! The reader trusts nothing: every read is checked against what is left, and a count of elements is refused if the
//! remaining bytes could not hold that many, so no length field makes it allocate more than the input's own size
//! allows.

/// Why bytes could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WireError {
    /// The bytes end inside a value.
    End,
    /// A value is out of its range; the word says which.
    Invalid(&'static str),
}

pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, ((value << 1) ^ (value >> 63)) as u64);
}

pub(crate) fn put_f32(out: &mut Vec<u8>, value: f32) {
    out.extend_from_slice(&value.to_le_bytes());
}

#[derive(Debug)]
pub(crate) struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub(crate) fn byte(&mut self) -> Result<u8, WireError> {
        let (&byte, rest) = self.left.split_first().ok_or(WireError::End)?;
        self.left = rest;
        Ok(byte)
    }

    pub(crate) fn number(&mut self) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(WireError::Invalid("number"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::Invalid("number"))
    }

    pub(crate) fn signed(&mut self) -> Result<i64, WireError> {
        let value = self.number()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A number in `0 ..= max`; `what` names it in the error.
    pub(crate) fn at_most(&mut self, max: u64, what: &'static str) -> Result<u64, WireError> {
        let value = self.number()?;
        if value > max { Err(WireError::Invalid(what)) } else { Ok(value) }
    }

    pub(crate) fn f32(&mut self) -> Result<f32, WireError> {
        let (bytes, rest) = self.left.split_first_chunk::<4>().ok_or(WireError::End)?;
        self.left = rest;
        Ok(f32::from_le_bytes(*bytes))
    }

    /// A count of elements of at least `element_bytes` each, that the remaining bytes can hold.
    pub(crate) fn count(&mut self, element_bytes: usize, what: &'static str) -> Result<usize, WireError> {
        let possible = self.left.len() / element_bytes.max(1);
        Ok(self.at_most(possible as u64, what)? as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_survive(values in prop::collection::vec((any::<u64>(), any::<i64>(), any::<f32>()), 0..20)) {
            let mut bytes = Vec::new();
            for (a, b, c) in &values {
                put(&mut bytes, *a);
                put_signed(&mut bytes, *b);
                put_f32(&mut bytes, *c);
            }
            let mut reader = Reader::new(&bytes);
            for (a, b, c) in &values {
                prop_assert_eq!(reader.number(), Ok(*a));
                prop_assert_eq!(reader.signed(), Ok(*b));
                prop_assert_eq!(reader.f32().map(f32::to_bits), Ok(c.to_bits()));
            }
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut reader = Reader::new(&bytes);
            while reader.number().is_ok() {}
        }
    }

    #[test]
    fn a_count_beyond_the_bytes_is_refused() {
        let mut bytes = Vec::new();
        put(&mut bytes, 1 << 40);
        assert_eq!(Reader::new(&bytes).count(1, "extents"), Err(WireError::Invalid("extents")));
    }
}
