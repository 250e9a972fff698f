//! The log of nbdkit's log filter (`nbdkit --filter=log … logfile=FILE`), a line a call and one for its return:
//!
//! ```text
//! 2020-08-06 02:07:23.080415 connection=1 Read id=1 offset=0x0 count=0x10000 ...
//! 2020-08-06 02:07:23.080502 connection=1 ...Read id=1 return=0 (Success)
//! ```

use super::{Expected, Raw, RowFormat};
use prestage_predictor::Op;

const EXPECTED: &str = "a line of nbdkit's log filter, as in 2020-08-06 02:07:23.080415 connection=1 Read id=1 offset=0x0 count=0x1000 ...";

pub(super) struct Nbdkit;

pub(super) fn sniff(line: &str) -> bool {
    let mut fields = line.split_ascii_whitespace();
    matches!((fields.next(), fields.next()), (Some(date), Some(time)) if micros(date, time).is_some())
}

impl RowFormat for Nbdkit {
    fn parse(&mut self, _row: u64, text: &str) -> Result<Option<Raw>, Expected> {
        let mut fields = text.split_ascii_whitespace();
        let (date, time) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let at_us = micros(date, time).ok_or(EXPECTED)?;
        let call = fields.find(|field| !field.starts_with("connection=")).ok_or(EXPECTED)?;
        let op = match call {
            "Read" => Op::Read,
            "Write" => Op::Write,
            "Trim" | "Zero" => Op::Discard,
            // Connections, flushes, queries and returns.
            _ => return Ok(None),
        };
        let (mut offset, mut len) = (None, None);
        for field in fields {
            match field.split_once('=') {
                Some(("offset", value)) => offset = number(value),
                Some(("count", value)) => len = number(value),
                _ => {}
            }
        }
        let (offset, len) = offset.zip(len).ok_or(EXPECTED)?;
        Ok(Some(Raw { at_us, op, offset, len }))
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Microseconds since some day long ago, of `YYYY-MM-DD` and `HH:MM:SS.ffffff`.
fn micros(date: &str, time: &str) -> Option<u64> {
    let mut parts = date.splitn(3, '-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let (clock, fraction) = time.split_once('.')?;
    let mut parts = clock.splitn(3, ':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    if !(1..=9999).contains(&year)
        || !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
        || fraction.len() != 6
    {
        return None;
    }
    // Days of the proleptic Gregorian calendar with years that begin in March, so that a leap day is a year's last.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day;
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second;
    Some(seconds * 1_000_000 + fraction.parse::<u64>().ok()?)
}
