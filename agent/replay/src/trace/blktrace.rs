//! What `blkparse` prints by default, a line an event:
//!
//! ```text
//!   8,0    3        1     0.000000000   697  Q  WS 223490 + 8 [kjournald]
//! device cpu  sequence  seconds         pid action rwbs sector + sectors [process]
//! ```
//!
//! A request has several events (queued, merged, issued to the driver, completed); one kind of them is taken.

use super::{Expected, Raw, RowFormat};
use prestage_predictor::Op;

const SECTOR: u64 = 512;
const EXPECTED: &str = "blkparse's default output, as in 8,0 3 1 0.000000000 697 Q R 223490 + 8 [dd]";

/// The event that stands for a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlktraceAction {
    /// As it was queued by the file system or hypervisor: before merging, and in the order of asking.
    #[default]
    Queued,
    /// As it was issued to the driver.
    Issued,
}

pub(super) struct Blktrace {
    action: &'static str,
    device: Option<String>,
    summary: bool,
}

pub(super) fn sniff(line: &str) -> bool {
    let mut fields = line.split_ascii_whitespace();
    let device = fields.next().is_some_and(is_device);
    device && fields.nth(2).is_some_and(|time| micros(time).is_some())
}

fn is_device(text: &str) -> bool {
    text.split_once(',').is_some_and(|(major, minor)| major.parse::<u32>().is_ok() && minor.parse::<u32>().is_ok())
}

/// Seconds with a fraction.
fn micros(text: &str) -> Option<u64> {
    let (seconds, fraction) = text.split_once('.')?;
    let digits = fraction.get(..fraction.len().min(6))?;
    let scale = 10u64.checked_pow(6 - u32::try_from(digits.len()).ok()?)?;
    let fraction = digits.parse::<u32>().ok()?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(u64::from(fraction) * scale)
}

impl Blktrace {
    pub(super) fn new(action: BlktraceAction) -> Self {
        let action = match action {
            BlktraceAction::Queued => "Q",
            BlktraceAction::Issued => "D",
        };
        Self { action, device: None, summary: false }
    }
}

impl RowFormat for Blktrace {
    fn parse(&mut self, _row: u64, text: &str) -> Result<Option<Raw>, Expected> {
        let mut fields = text.split_ascii_whitespace();
        let device = fields.next().unwrap_or_default();
        // Totals by CPU and device follow the events.
        self.summary |= ["CPU", "Total", "Throughput", "Events"].iter().any(|head| device.starts_with(head));
        if self.summary {
            return Ok(None);
        }
        let mut field = || fields.next().ok_or(EXPECTED);
        let (_cpu, _sequence) = (field()?, field()?);
        let at_us = micros(field()?).filter(|_| is_device(device)).ok_or(EXPECTED)?;
        let (_pid, action) = (field()?, field()?);
        if action != self.action {
            return Ok(None);
        }
        let rwbs = field()?;
        // Barriers and flushes carry no range.
        let op = if rwbs.contains('D') {
            Op::Discard
        } else if rwbs.contains('W') {
            Op::Write
        } else if rwbs.contains('R') {
            Op::Read
        } else {
            return Ok(None);
        };
        let Ok(sector) = field().and_then(|sector| sector.parse::<u64>().map_err(|_| EXPECTED)) else {
            return Ok(None);
        };
        if field().ok() != Some("+") {
            return Ok(None);
        }
        let sectors: u64 = field()?.parse().map_err(|_| EXPECTED)?;
        let known = self.device.get_or_insert_with(|| device.to_owned());
        if known != device {
            return Err(format!("events of one device, {known}; keep one with grep"));
        }
        Ok(Some(Raw { at_us, op, offset: sector.saturating_mul(SECTOR), len: sectors.saturating_mul(SECTOR) }))
    }
}
