//! Points in time as people write them, in UTC.

use std::time::Duration;

use crate::calendar::{DAY_S, Date, date_of};
use crate::config::units::parse_duration;

/// Parses `now`, `+2h` (from now) and RFC 3339 in UTC, with or without seconds: `2026-11-22T03:00Z`.
pub(super) fn parse(text: &str, now_unix_ms: u64) -> Result<u64, String> {
    let text = text.trim();
    let refuse = || format!("`{text}` is not a time; write it like \"now\", \"+2h\" or, in UTC, \"2026-11-22T03:00Z\"");
    if text == "now" {
        return Ok(now_unix_ms);
    }
    if let Some(later) = text.strip_prefix('+') {
        let later: Duration = parse_duration(later)?;
        return u64::try_from(later.as_millis()).ok().and_then(|ms| now_unix_ms.checked_add(ms)).ok_or_else(refuse);
    }
    let text = text.strip_suffix('Z').ok_or_else(refuse)?;
    let (date, time) = text.split_once(['T', ' ']).ok_or_else(refuse)?;
    let numbers = |text: &str, sign: char| -> Option<Vec<u64>> {
        let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit()) && part.len() <= 4;
        text.split(sign).map(|part| part.parse().ok().filter(|_| digits(part))).collect()
    };
    let (Some(date), Some(time)) = (numbers(date, '-'), numbers(time, ':')) else { return Err(refuse()) };
    let (&[year, month, day], (hour, minute, second)) = (
        date.as_slice(),
        match *time.as_slice() {
            [hour, minute] => (hour, minute, 0),
            [hour, minute, second] => (hour, minute, second),
            _ => return Err(refuse()),
        },
    ) else {
        return Err(refuse());
    };
    let days = days_from_civil(year, month, day).ok_or_else(refuse)?;
    if hour > 23 || minute > 59 || second > 59 {
        return Err(refuse());
    }
    Ok((days * DAY_S + hour * 3600 + minute * 60 + second) * 1000)
}

/// Minutes are enough for people: `2026-11-22 03:00`, in UTC.
pub(super) fn show(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (year, month, day) = civil_from_days(seconds / DAY_S);
    let minutes = seconds % DAY_S / 60;
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", minutes / 60, minutes % 60)
}

/// With seconds, for what follows one another quickly.
pub(super) fn show_seconds(unix_ms: u64) -> String {
    format!("{}:{:02}", show(unix_ms), unix_ms / 1000 % 60)
}

/// Days since 1970-01-01; `None` of a day that is none (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn days_from_civil(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    let shifted = year - u64::from(month <= 2);
    let (era, of_era) = (shifted / 400, shifted % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = (era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year).checked_sub(719_468)?;
    // A day beyond its month falls into the next one.
    (civil_from_days(days) == (year, month, day)).then_some(days)
}

fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let Date { year, month, day } = date_of(days);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_shown() {
        assert_eq!(parse("now", 5), Ok(5));
        assert_eq!(parse("+1h30m", 5), Ok(5_400_005));
        assert_eq!(parse("1970-01-01T00:00Z", 0), Ok(0));
        assert_eq!(parse("2026-11-22T03:04:05Z", 0), Ok(1_795_316_645_000));
        assert_eq!(show(1_795_316_645_000), "2026-11-22 03:04");
        assert_eq!(show_seconds(1_795_316_645_000), "2026-11-22 03:04:05");
        assert_eq!(parse("2024-02-29 23:59Z", 0).map(show), Ok("2024-02-29 23:59".to_owned()));
        for bad in [
            "",
            "tomorrow",
            "+",
            "+2",
            "2026-02-29T00:00Z",
            "2026-13-01T00:00Z",
            "2026-01-01T24:00Z",
            "2026-01-01T00:00",
            "2026-01-01Z",
            "2026-1--1T00:00Z",
            "1969-12-31T23:59Z",
            "99999-01-01T00:00Z",
            "+99999999999999999999d",
        ] {
            assert!(parse(bad, 0).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_day_goes_there_and_back() {
        for days in (0..200_000).step_by(7) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), Some(days), "{year}-{month}-{day}");
        }
    }
}
