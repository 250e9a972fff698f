//! When an event that comes again comes next: the five fields of crontab(5), in UTC or at a fixed distance from it.
//!
//! | field | values | names |
//! | --- | --- | --- |
//! | minute | 0–59 | |
//! | hour | 0–23 | |
//! | day of the month | 1–31 | |
//! | month | 1–12 | jan–dec |
//! | day of the week | 0–7, 0 and 7 are Sunday | sun–sat |
//!
//! A field is `*`, a value, a range `a-b`, either of the last with a step (`*/15`, `8-18/2`), or a list of these. As in cron, a day has to
//! match both day fields, unless both are restricted (do not begin with `*`): then one of them. `@hourly`, `@daily`, `@weekly`, `@monthly`
//! and `@yearly` stand for what they say. Summer time is not known: a time zone with it has to be written as two schedules.
//!
//! Written here because what there is to use brings a calendar library along.

use std::fmt;
use std::str::FromStr;

use crate::calendar::{DAY_S, date_of, weekday_of};

/// The 29th of February comes again after eight years at most, and with a day of the week after forty.
const SEARCH_DAYS: u64 = 366 * 41;
/// Longest text.
const TEXT_MAX: usize = 256;

const MONTHS: &[&str] = &["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: &[&str] = &["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// What a field may hold.
#[derive(Debug)]
struct Field {
    name: &'static str,
    from: u64,
    to: u64,
    /// From `from` on.
    names: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", from: 0, to: 59, names: &[] },
    Field { name: "hour", from: 0, to: 23, names: &[] },
    Field { name: "day of the month", from: 1, to: 31, names: &[] },
    Field { name: "month", from: 1, to: 12, names: MONTHS },
    Field { name: "day of the week", from: 0, to: 7, names: DAYS },
];

/// Why a text is no schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error(
        "`{text}` is no schedule: five fields are needed, minute, hour, day of the month, month, day of the week, as in `30 8 * * mon-fri`"
    )]
    Fields { text: String },
    #[error("`{part}` is no {field}: {why}")]
    Field { part: String, field: &'static str, why: String },
    #[error("`{text}` never comes: no such day is in those months")]
    Never { text: String },
    #[error("{minutes} minutes from UTC is no time zone; they go from -14 to 14 hours")]
    Offset { minutes: i32 },
}

/// Minutes at which something comes again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    text: String,
    /// A bit for each value.
    minutes: u64,
    hours: u64,
    days: u64,
    months: u64,
    /// Sunday is 0.
    weekdays: u64,
    /// A day matches if one of the day fields does.
    either: bool,
    offset_s: i64,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    /// Reads a schedule in UTC.
    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        let no_fields = || ScheduleError::Fields { text: text.chars().take(TEXT_MAX).collect() };
        if text.len() > TEXT_MAX {
            return Err(no_fields());
        }
        let written = match text.trim() {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            other => other,
        };
        let parts: Vec<&str> = written.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = parts.as_slice() else { return Err(no_fields()) };
        let [minutes, hours, days, months, weekdays] = &FIELDS;
        let sevens = weekdays.read(weekday)?;
        let schedule = Self {
            text: text.trim().to_owned(),
            minutes: minutes.read(minute)?,
            hours: hours.read(hour)?,
            days: days.read(day)?,
            months: months.read(month)?,
            weekdays: (sevens | sevens >> 7) & 0x7f,
            either: !day.starts_with('*') && !weekday.starts_with('*'),
            offset_s: 0,
        };
        match schedule.next(0) {
            Some(_) => Ok(schedule),
            None => Err(ScheduleError::Never { text: schedule.text }),
        }
    }
}

impl Field {
    fn read(&self, text: &str) -> Result<u64, ScheduleError> {
        let mut bits = 0;
        for part in text.split(',') {
            bits |=
                self.part(part).map_err(|why| ScheduleError::Field { part: part.to_owned(), field: self.name, why })?;
        }
        Ok(bits)
    }

    fn part(&self, part: &str) -> Result<u64, String> {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, Some(step)),
            None => (part, None),
        };
        let (from, to) = match (range, range.split_once('-')) {
            ("*", _) => (self.from, self.to),
            (_, Some((from, to))) => (self.value(from)?, self.value(to)?),
            (one, None) if step.is_none() => (self.value(one)?, self.value(one)?),
            (_, None) => return Err("a step follows `*` or a range".to_owned()),
        };
        let step = match step {
            None => 1,
            Some(step) => match step.parse::<usize>() {
                Ok(step) if step > 0 => step,
                _ => return Err("a step is a number from 1 on".to_owned()),
            },
        };
        if from > to {
            return Err("its beginning comes after its end".to_owned());
        }
        Ok((from..=to).step_by(step).fold(0, |bits, value| bits | 1 << value))
    }

    fn value(&self, text: &str) -> Result<u64, String> {
        if let Some(at) = self.names.iter().position(|name| name.eq_ignore_ascii_case(text)) {
            return Ok(self.from + at as u64);
        }
        // A sign would be taken for part of a number.
        let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        number.filter(|number| (self.from..=self.to).contains(number)).ok_or_else(|| match self.names {
            [] => format!("it is {} to {}", self.from, self.to),
            [first, ..] => format!("it is {} to {}, or {first} and so on", self.from, self.to),
        })
    }
}

fn has(bits: u64, value: u64) -> bool {
    bits >> value & 1 == 1
}

impl Schedule {
    /// The same by a clock that is so many minutes ahead of UTC. Errors: `Offset` beyond 14 hours.
    pub fn at_offset(self, minutes: i32) -> Result<Self, ScheduleError> {
        match (-14 * 60..=14 * 60).contains(&minutes) {
            true => Ok(Self { offset_s: i64::from(minutes) * 60, ..self }),
            false => Err(ScheduleError::Offset { minutes }),
        }
    }

    /// The first time after `after_s`, both Unix seconds. `None` beyond the years that are searched (41), which no time of before 2060 is.
    #[must_use]
    pub fn next(&self, after_s: u64) -> Option<u64> {
        // By the schedule's own clock, from the next minute on.
        let begin = after_s.checked_add_signed(self.offset_s)?.checked_add(60)? / 60;
        let first = begin * 60 / DAY_S;
        for day in first..=first.checked_add(SEARCH_DAYS)? {
            if !self.comes_on(day) {
                continue;
            }
            let from = if day == first { begin - day * (DAY_S / 60) } else { 0 };
            let minute =
                (from..DAY_S / 60).find(|minute| has(self.hours, minute / 60) && has(self.minutes, minute % 60));
            if let Some(minute) = minute {
                return (day * DAY_S + minute * 60).checked_add_signed(-self.offset_s);
            }
        }
        None
    }

    /// Times after `from_s` up to `to_s`, at most `most`.
    pub fn within(&self, from_s: u64, to_s: u64, most: usize) -> impl Iterator<Item = u64> {
        std::iter::successors(self.next(from_s), |at_s| self.next(*at_s))
            .take_while(move |at_s| *at_s <= to_s)
            .take(most)
    }

    fn comes_on(&self, day: u64) -> bool {
        let date = date_of(day);
        let (of_month, of_week) = (has(self.days, date.day), has(self.weekdays, weekday_of(day)));
        has(self.months, date.month) && if self.either { of_month || of_week } else { of_month && of_week }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::calendar::rfc3339;

    fn next(text: &str, after: u64) -> String {
        rfc3339(text.parse::<Schedule>().unwrap().next(after).unwrap() * 1_000_000).replace(":00.000000Z", "")
    }

    /// 2024-02-28 (a Wednesday) 23:59:30.
    const WED: u64 = 1_709_164_770;

    #[test]
    fn the_next_time_is_the_one_that_a_calendar_shows() {
        for (text, expected) in [
            ("* * * * *", "2024-02-29T00:00"),
            ("*/15 * * * *", "2024-02-29T00:00"),
            ("5-59/20 8 * * *", "2024-02-29T08:05"),
            ("30 8 * * mon-fri", "2024-02-29T08:30"),
            ("30 8 * * MON", "2024-03-04T08:30"),
            ("0 0 29 feb *", "2024-02-29T00:00"),
            ("0 0 30 * *", "2024-03-30T00:00"),
            ("0 0 * * 7", "2024-03-03T00:00"),
            ("0 0 * * 5-7", "2024-03-01T00:00"),
            // Either day field, as both are restricted; both, as one begins with `*`.
            ("0 0 13 * fri", "2024-03-01T00:00"),
            ("0 0 */13 * wed", "2024-03-27T00:00"),
            ("59 23 28 2 *", "2025-02-28T23:59"),
            ("1,2,50 22,23 1,31 1-6/5 *", "2024-06-01T22:01"),
            ("@hourly", "2024-02-29T00:00"),
            ("@weekly", "2024-03-03T00:00"),
            ("@yearly", "2025-01-01T00:00"),
        ] {
            assert_eq!(next(text, WED), expected, "{text}");
        }
        // A century without a 29th of February.
        assert_eq!(next("0 0 29 2 *", 3_981_312_000), "2104-02-29T00:00");
        // A time itself is not after itself.
        assert_eq!(next("0 0 * * *", 1_709_164_800), "2024-03-01T00:00");
    }

    #[test]
    fn a_clock_ahead_of_utc_strikes_earlier() {
        let schedule: Schedule = "30 8 * * *".parse().unwrap();
        let at = |schedule: &Schedule| rfc3339(schedule.next(WED).unwrap() * 1_000_000);
        assert_eq!(at(&schedule), "2024-02-29T08:30:00.000000Z");
        assert_eq!(at(&schedule.clone().at_offset(120).unwrap()), "2024-02-29T06:30:00.000000Z");
        assert_eq!(at(&schedule.clone().at_offset(-9 * 60 - 30).unwrap()), "2024-02-29T18:00:00.000000Z");
        assert_eq!(schedule.clone().at_offset(15 * 60), Err(ScheduleError::Offset { minutes: 900 }));
        let times: Vec<u64> = schedule.within(WED, WED + 3 * DAY_S, 2).collect();
        assert_eq!(times, [WED + 30 + 30_600, WED + 30 + 30_600 + DAY_S]);
        // Before the epoch by that clock.
        assert_eq!(schedule.at_offset(-60).unwrap().next(0), None);
    }

    #[test]
    fn what_is_no_schedule_is_told_why() {
        for (text, expected) in [
            ("", "five fields"),
            ("* * * *", "five fields"),
            ("* * * * * *", "five fields"),
            ("@reboot", "five fields"),
            ("60 * * * *", "`60` is no minute: it is 0 to 59"),
            ("* 24 * * *", "no hour"),
            ("* * 0 * *", "day of the month: it is 1 to 31"),
            ("* * * foo *", "`foo` is no month: it is 1 to 12, or jan and so on"),
            ("* * * * 8", "day of the week"),
            ("9-5 * * * *", "its beginning comes after its end"),
            ("*/0 * * * *", "a step is a number from 1 on"),
            ("5/10 * * * *", "a step follows"),
            ("1,,2 * * * *", "`` is no minute"),
            ("+5 * * * *", "no minute"),
            ("0 0 31 feb,apr *", "never comes"),
        ] {
            let error = text.parse::<Schedule>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn the_next_time_matches_and_none_in_between_does(
            text in "[0-9]{1,2}|\\*/[1-9]|\\*", hour in 0..24u64, day in prop::option::of(1..29u64), weekday in prop::option::of(0..7u64), after in 0..4_000_000_000u64,
        ) {
            let field = |value: Option<u64>| value.map_or("*".to_owned(), |value| value.to_string());
            let text = format!("{text} {hour} {} * {}", field(day), field(weekday));
            let Ok(schedule) = text.parse::<Schedule>() else { return Ok(()) };
            let next = schedule.next(after).unwrap();
            prop_assert!(next > after && next.is_multiple_of(60));
            let comes = |at_s: u64| {
                let days = at_s / DAY_S;
                let day_matches = match (day, weekday) {
                    (Some(day), Some(weekday)) => date_of(days).day == day || weekday_of(days) == weekday,
                    (Some(day), None) => date_of(days).day == day,
                    (None, Some(weekday)) => weekday_of(days) == weekday,
                    (None, None) => true,
                };
                day_matches && at_s % DAY_S / 3600 == hour && has(schedule.minutes, at_s % 3600 / 60)
            };
            prop_assert!(comes(next));
            // 40 days of minutes at most: the first that comes by looking at each.
            let first = (after / 60 + 1..).map(|minute| minute * 60).find(|at_s| comes(*at_s));
            prop_assert_eq!(first, Some(next));
        }

        #[test]
        fn any_text_is_a_schedule_or_an_error(text in "\\PC{0,40}") {
            let _ = text.parse::<Schedule>();
        }
    }
}
