//! Sizes and durations as people write them, both ways.

use std::time::Duration;

const BINARY: [(&str, u64); 5] =
    [("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Parses `512MiB`, `1.5 GiB`, `64K` (binary, as QEMU has it), `10GB` (decimal), `4096`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let refuse = || format!("`{text}` is not a size; write it like \"512MiB\" or \"20GiB\"");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "p" | "pib" => 1 << 50,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(refuse()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(|| format!("`{text}` is more than 2^64 bytes"));
    }
    let fraction: f64 = number.parse().map_err(|_| refuse())?;
    let bytes = fraction * factor as f64;
    // 2^64 as f64; a fraction of a byte is cut off.
    if bytes.is_finite() && bytes < 18_446_744_073_709_551_616.0 { Ok(bytes as u64) } else { Err(refuse()) }
}

/// Exact text that [`parse_bytes`] reads back: the largest binary unit that divides it.
#[must_use]
pub fn exact_bytes(bytes: u64) -> String {
    for (unit, factor) in BINARY {
        if bytes != 0 && bytes.is_multiple_of(factor) {
            return format!("{}{unit}", bytes / factor);
        }
    }
    format!("{bytes}B")
}

/// Text for people, three digits or so: `1.5 GiB`, `640 KiB`, `0 B`.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    human_with(bytes, 0)
}

/// The same of sizes that stand beside each other, with as many more digits as it takes for those that differ to look different: of a tier of
/// 1 GiB that has room for another block nobody is to read "1.0 GiB of 1.0 GiB".
#[must_use]
pub fn human_sizes<const N: usize>(sizes: [u64; N]) -> [String; N] {
    let clear = |texts: &[String; N]| {
        let mut pairs = (0..N).flat_map(|one| (one + 1..N).map(move |other| (one, other)));
        pairs.all(|(one, other)| sizes[one] == sizes[other] || texts[one] != texts[other])
    };
    let mut rounded = (0..=MORE_DIGITS).map(|more| sizes.map(|bytes| human_with(bytes, more)));
    rounded.find(clear).unwrap_or_else(|| sizes.map(exact_bytes))
}

/// Beyond these the exact numbers are shorter.
const MORE_DIGITS: usize = 3;

fn human_with(bytes: u64, more_digits: usize) -> String {
    for (unit, factor) in BINARY {
        let value = bytes as f64 / factor as f64;
        let digits = more_digits + usize::from(value < 9.95);
        // What is rounded up to 1024 of a unit is one of the next.
        let rounds_to_one = value >= 1.0 - 0.5 / 1024.0 / 10_f64.powi(i32::try_from(more_digits).unwrap_or(i32::MAX));
        if rounds_to_one {
            return format!("{value:.digits$} {unit}");
        }
    }
    format!("{bytes} B")
}

const DURATIONS: [(&str, u64); 6] =
    [("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1000), ("us", 1)];

/// Parses `5s`, `500ms`, `1h30m`, `7d`. A bare number is refused: its unit would be a guess.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let refuse = || format!("`{text}` is not a duration; write it like \"5s\", \"500ms\", \"10m\", \"2h\" or \"7d\"");
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(refuse());
    }
    let mut total_us: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(refuse)?;
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, after) = tail.split_at(letters);
        let (_, factor) = DURATIONS.iter().find(|(name, _)| *name == unit).ok_or_else(refuse)?;
        let number: u64 = number.parse().map_err(|_| refuse())?;
        total_us = number
            .checked_mul(*factor)
            .and_then(|part| part.checked_add(total_us))
            .ok_or_else(|| format!("`{text}` is too long"))?;
        rest = after.trim_start();
    }
    Ok(Duration::from_micros(total_us))
}

/// Exact text that [`parse_duration`] reads back: the largest unit that divides it.
#[must_use]
pub fn exact_duration(duration: Duration) -> String {
    let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    for (unit, factor) in DURATIONS {
        if us != 0 && us.is_multiple_of(factor) {
            return format!("{}{unit}", us / factor);
        }
    }
    "0s".to_owned()
}

/// Text for people, two units: `3 d 4 h`, `12 min 5 s`, `8 s`.
#[must_use]
pub fn human_duration(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("512MiB", 512 << 20),
            ("1.5 GiB", 3 << 29),
            ("64K", 65536),
            ("64k", 65536),
            ("10GB", 10_000_000_000),
            ("4096", 4096),
            ("0", 0),
            ("1tib", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "MiB", "-1MiB", "1..5G", "12 apples", "NaN", "99999999PiB", "1e3"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        for text in ["", "5", "s", "5 apples", "-5s", "1.5s", "99999999999999999999s", "18446744073709551615d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn people_get_short_numbers() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(10 << 30), "10 GiB");
        assert_eq!(human_bytes(640 << 10), "640 KiB");
        assert_eq!(human_duration(Duration::from_secs(3725)), "1 h 2 min");
    }

    #[test]
    fn sizes_beside_each_other_do_not_look_the_same_unless_they_are() {
        const GIB: u64 = 1 << 30;
        assert_eq!(human_sizes([GIB, GIB]), ["1.0 GiB", "1.0 GiB"]);
        assert_eq!(human_sizes([GIB - (3 << 20), GIB]), ["1021 MiB", "1.0 GiB"]);
        assert_eq!(human_sizes([20 * GIB - (64 << 20), 20 * GIB]), ["19.9 GiB", "20.0 GiB"]);
        assert_eq!(human_sizes([GIB, GIB + (1 << 20)]), ["1.000 GiB", "1.001 GiB"]);
        assert_eq!(human_sizes([GIB + 1, GIB]), ["1073741825B", "1GiB"]);
        // No unit has 1024 of the one below it.
        assert_eq!(human_bytes(GIB - 1), "1.0 GiB");
        assert_eq!(human_bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(human_bytes(1023), "1023 B");
    }

    proptest! {
        #[test]
        fn sizes_that_differ_look_different(one: u64, apart in 0_u64..1 << 24, shift in 0_u32..64) {
            let one = one >> shift;
            let other = one.saturating_add(apart);
            let [first, second] = human_sizes([one, other]);
            prop_assert_eq!(first == second, one == other);
        }

        #[test]
        fn exact_text_reads_back(bytes: u64, us in 0..u64::MAX / 2) {
            prop_assert_eq!(parse_bytes(&exact_bytes(bytes)), Ok(bytes));
            let duration = Duration::from_micros(us);
            prop_assert_eq!(parse_duration(&exact_duration(duration)), Ok(duration));
        }

        #[test]
        fn any_text_is_an_answer_not_a_panic(text in "\\PC{0,24}") {
            let _ = parse_bytes(&text);
            let _ = parse_duration(&text);
        }
    }
}
