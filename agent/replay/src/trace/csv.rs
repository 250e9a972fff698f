//! CSV: `ts_us,op,offset,len` in microseconds and bytes. Lines that begin with `#` are remarks.

use super::{Expected, Raw, RowFormat};
use prestage_predictor::Op;

const EXPECTED: &str = "ts_us,op,offset,len with whole numbers and op R, W or D, as in 1000,R,4096,512";

pub(super) struct Csv;

pub(super) fn sniff(line: &str) -> bool {
    line.split(',').count() == 4
}

impl RowFormat for Csv {
    fn parse(&mut self, row: u64, text: &str) -> Result<Option<Raw>, Expected> {
        // What a recording has to say of itself.
        if text.starts_with('#') {
            return Ok(None);
        }
        let mut fields = text.split(',').map(str::trim);
        let mut field = || fields.next().ok_or(EXPECTED);
        let at_us = field()?;
        // A header says what the columns are; it is the first line and none of them is a number.
        if row == 1 && sniff(text) && !text.split(',').any(|field| field.trim().parse::<f64>().is_ok()) {
            return Ok(None);
        }
        let op = op(field()?).ok_or(EXPECTED)?;
        let (offset, len) = (number(field()?)?, number(field()?)?);
        if fields.next().is_some() {
            return Err(EXPECTED.to_owned());
        }
        Ok(Some(Raw { at_us: number(at_us)?, op, offset, len }))
    }
}

fn number(text: &str) -> Result<u64, Expected> {
    text.parse().map_err(|_| EXPECTED.to_owned())
}

fn op(text: &str) -> Option<Op> {
    let is = |names: [&str; 2]| names.iter().any(|name| text.eq_ignore_ascii_case(name));
    if is(["R", "read"]) {
        Some(Op::Read)
    } else if is(["W", "write"]) {
        Some(Op::Write)
    } else if is(["D", "discard"]) {
        Some(Op::Discard)
    } else {
        None
    }
}
