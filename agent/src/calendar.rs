//! Dates of Unix times, by the proleptic Gregorian calendar (Hinnant, "chrono-Compatible Low-Level Date Algorithms").

/// Seconds of a day.
pub const DAY_S: u64 = 86_400;

/// A date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date {
    pub year: u64,
    /// 1 to 12.
    pub month: u64,
    /// 1 to 31.
    pub day: u64,
}

/// The date so many days after 1970-01-01.
#[must_use]
pub fn date_of(days: u64) -> Date {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    Date { year: year + era * 400 + u64::from(month <= 2), month, day }
}

/// Day of the week so many days after 1970-01-01: 0 is Sunday.
#[must_use]
pub fn weekday_of(days: u64) -> u64 {
    (days + 4) % 7
}

/// Unix time in microseconds as RFC 3339 in UTC, to the microsecond.
#[must_use]
pub fn rfc3339(at_us: u64) -> String {
    let (at_s, us) = (at_us / 1_000_000, at_us % 1_000_000);
    let Date { year, month, day } = date_of(at_s / DAY_S);
    let (hour, minute, second) = (at_s % DAY_S / 3600, at_s % 3600 / 60, at_s % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{us:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(rfc3339(1_709_210_096_000_007), "2024-02-29T12:34:56.000007Z");
        assert_eq!(rfc3339(4_107_542_400_000_000), "2100-03-01T00:00:00.000000Z");
        assert_eq!((weekday_of(0), weekday_of(3)), (4, 0));
        // Each day is the one after the day before, over all kinds of leap years.
        let mut before = date_of(0);
        for days in 1..200_000 {
            let date = date_of(days);
            let leap =
                before.year.is_multiple_of(4) && (!before.year.is_multiple_of(100) || before.year.is_multiple_of(400));
            let length = [31, 28 + u64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][before.month as usize - 1];
            let next = match before {
                Date { day, .. } if day < length => Date { day: day + 1, ..before },
                Date { month: 12, year, .. } => Date { year: year + 1, month: 1, day: 1 },
                Date { month, year, .. } => Date { year, month: month + 1, day: 1 },
            };
            assert_eq!(date, next);
            before = date;
        }
    }
}
