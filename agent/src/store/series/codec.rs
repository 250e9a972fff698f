//! Samples and buckets as bytes.
//!
//! ```text
//! chunk   version (1), CRC-32C of what follows (4), body
//! body    number of rows, first time, runs of equal differences of times (difference, how many), then the columns:
//!         samples: value; buckets: count, minimum, maximum less minimum, mean less minimum
//! column  how it is packed (1), and packed so:
//!         0  one value for all rows
//!         1  first value, unit, length of the bits, differences between neighbours in that unit
//!         2  minimum, unit, length of the bits, differences from the minimum in that unit
//!         3  the same, each after a bit that is 0 where it is the minimum: disks do nothing, or much
//! frame   version (1), CRC-32C of what follows (4), then for each series: number of the series less that of the one before,
//!         length of the body, body of samples; a series may come in pieces
//! ```
//!
//! Numbers are LEB128, those that may be negative zigzag-coded. The unit is the greatest common divisor of the differences: memory comes
//! in pages, disk traffic in sectors. Bits are Golomb–Rice codes whose parameter follows the values as in LOCO-I (Weinberger, Seroussi and
//! Sapiro, IEEE Trans. Image Processing 2000); the shortest packing is taken. Times of a steady series cost three bytes.
//!
//! On 84 minutes of a busy host by the second (14 metrics), `bench series` counts 1.00 bytes a sample; XOR of floats (Pelkonen et al.,
//! "Gorilla", VLDB 2015) takes 2.88.

use crate::store::segment::{get, put, unzigzag, zigzag};

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 5;
/// Values are whole numbers that a double holds exactly, so that no difference overflows.
pub(super) const VALUE_MAX: i64 = 1 << 53;
/// Times end before the year 36,800: differences and sums of them fit everywhere.
pub(super) const TIME_MAX_S: u64 = 1 << 40;
/// Quotients from here on are written plainly: six bits of length and the number.
const ESCAPE: u32 = 20;
/// The parameter forgets half of what it has seen after so many values.
const MEMORY: u64 = 16;
/// Rows that are all alike take no bits, so their number is bounded by itself. The longest chunk has 600; a frame has longer series in
/// pieces.
const ROWS_MAX: u64 = 8192;

/// A value in units of the series' resolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sample {
    pub(super) at_s: u64,
    pub(super) value: i64,
}

/// What was sampled from `at_s` on, for a level's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bucket {
    pub(super) at_s: u64,
    /// Samples, at least 1.
    pub(super) count: u64,
    pub(super) min: i64,
    /// Rounded.
    pub(super) mean: i64,
    pub(super) max: i64,
}

impl Bucket {
    pub(super) fn of(sample: Sample, step_s: u64) -> Self {
        let Sample { at_s, value } = sample;
        Self { at_s: at_s - at_s % step_s, count: 1, min: value, mean: value, max: value }
    }

    /// Adds what another holds; the times are the caller's.
    pub(super) fn add(&mut self, other: &Self) {
        let count = self.count.saturating_add(other.count);
        let sum = i128::from(self.mean) * i128::from(self.count) + i128::from(other.mean) * i128::from(other.count);
        let half = i128::from(count / 2);
        // Halves go up, whichever side of zero.
        let mean = (sum + half).div_euclid(i128::from(count.max(1)));
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.mean = i64::try_from(mean).unwrap_or(self.mean).clamp(self.min, self.max);
        self.count = count;
    }
}

/// The bytes are not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Damaged;

/// A row of a chunk.
pub(super) trait Row: Copy {
    fn at_s(&self) -> u64;
    fn encode(rows: &[Self], out: &mut Vec<u8>);
    fn decode(times: &[u64], bytes: &[u8], at: &mut usize) -> Result<Vec<Self>, Damaged>;
}

impl Row for Sample {
    fn at_s(&self) -> u64 {
        self.at_s
    }

    fn encode(rows: &[Self], out: &mut Vec<u8>) {
        pack(rows.iter().map(|row| row.value), out);
    }

    fn decode(times: &[u64], bytes: &[u8], at: &mut usize) -> Result<Vec<Self>, Damaged> {
        let values = unpack(times.len(), bytes, at)?;
        Ok(times.iter().zip(values).map(|(at_s, value)| Self { at_s: *at_s, value }).collect())
    }
}

impl Row for Bucket {
    fn at_s(&self) -> u64 {
        self.at_s
    }

    fn encode(rows: &[Self], out: &mut Vec<u8>) {
        pack(rows.iter().map(|row| i64::try_from(row.count).unwrap_or(VALUE_MAX)), out);
        pack(rows.iter().map(|row| row.min), out);
        pack(rows.iter().map(|row| row.max - row.min), out);
        pack(rows.iter().map(|row| row.mean - row.min), out);
    }

    fn decode(times: &[u64], bytes: &[u8], at: &mut usize) -> Result<Vec<Self>, Damaged> {
        let mut column = || unpack(times.len(), bytes, at);
        let (counts, mins, spans, means) = (column()?, column()?, column()?, column()?);
        let row = |row: usize| -> Option<Self> {
            let (min, span, above) = (*mins.get(row)?, *spans.get(row)?, *means.get(row)?);
            let count = u64::try_from(*counts.get(row)?).ok().filter(|count| *count > 0)?;
            (0 <= above && above <= span).then_some(())?;
            let (mean, max) = (min.checked_add(above)?, min.checked_add(span)?);
            Some(Self { at_s: *times.get(row)?, count, min, mean, max })
        };
        (0..times.len()).map(|at| row(at).ok_or(Damaged)).collect()
    }
}

/// A chunk of rows in order of time.
pub(super) fn encode<R: Row>(rows: &[R]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    body(rows, &mut bytes);
    sealed(bytes)
}

/// Rows of a chunk, in order of time.
pub(super) fn decode<R: Row>(bytes: &[u8]) -> Result<Vec<R>, Damaged> {
    read_body(opened(bytes)?)
}

/// A frame: samples of several series, by number.
pub(super) fn encode_frame<'a>(series: impl IntoIterator<Item = (i64, &'a [Sample])>) -> Vec<u8> {
    let (mut bytes, mut one) = (vec![0; HEADER_BYTES], Vec::new());
    let mut before = 0;
    for (number, samples) in series {
        for samples in samples.chunks(ROWS_MAX as usize) {
            one.clear();
            body(samples, &mut one);
            put(&mut bytes, zigzag(number - before));
            put(&mut bytes, one.len() as u64);
            bytes.extend_from_slice(&one);
            before = number;
        }
    }
    sealed(bytes)
}

/// Hands on the samples of each series of a frame that is wanted.
pub(super) fn decode_frame(
    bytes: &[u8],
    wanted: impl Fn(i64) -> bool,
    mut each: impl FnMut(i64, Vec<Sample>),
) -> Result<(), Damaged> {
    let bytes = opened(bytes)?;
    let (mut at, mut number) = (0, 0i64);
    while at < bytes.len() {
        number = number.checked_add(unzigzag(get(bytes, &mut at).map_err(|_| Damaged)?)).ok_or(Damaged)?;
        let length = get(bytes, &mut at).map_err(|_| Damaged)?;
        let end = usize::try_from(length).ok().and_then(|length| at.checked_add(length)).ok_or(Damaged)?;
        let one = bytes.get(at..end).ok_or(Damaged)?;
        if wanted(number) {
            each(number, read_body(one)?);
        }
        at = end;
    }
    Ok(())
}

fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = crc32c::crc32c(&bytes[HEADER_BYTES..]);
    bytes[0] = VERSION;
    bytes[1..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fn opened(bytes: &[u8]) -> Result<&[u8], Damaged> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or(Damaged)?;
    let right = header[0] == VERSION && header[1..] == crc32c::crc32c(body).to_le_bytes();
    right.then_some(body).ok_or(Damaged)
}

fn body<R: Row>(rows: &[R], out: &mut Vec<u8>) {
    put(out, rows.len() as u64);
    let Some(first) = rows.first() else { return };
    put(out, first.at_s());
    let mut run = (0, 0);
    for pair in rows.windows(2) {
        let step = pair[1].at_s() - pair[0].at_s();
        if step == run.0 {
            run.1 += 1;
            continue;
        }
        if run.1 > 0 {
            put(out, run.0);
            put(out, run.1);
        }
        run = (step, 1);
    }
    if run.1 > 0 {
        put(out, run.0);
        put(out, run.1);
    }
    R::encode(rows, out);
}

fn read_body<R: Row>(bytes: &[u8]) -> Result<Vec<R>, Damaged> {
    let mut at = 0;
    let number = |at: &mut usize| get(bytes, at).map_err(|_| Damaged);
    let rows = number(&mut at)?;
    if rows == 0 || rows > ROWS_MAX {
        return if rows == 0 { Ok(Vec::new()) } else { Err(Damaged) };
    }
    let mut time = number(&mut at)?;
    let mut times = vec![time];
    while (times.len() as u64) < rows {
        let (step, repeats) = (number(&mut at)?, number(&mut at)?);
        if repeats == 0 || repeats > rows - times.len() as u64 {
            return Err(Damaged);
        }
        for _ in 0..repeats {
            time = time.checked_add(step).filter(|time| *time < TIME_MAX_S).ok_or(Damaged)?;
            times.push(time);
        }
    }
    R::decode(&times, bytes, &mut at)
}

const ALIKE: u8 = 0;
const NEIGHBOURS: u8 = 1;
const LEVELS: u8 = 2;
const BURSTS: u8 = 3;

fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Packs a column of at least one value, each at most [`VALUE_MAX`] from zero.
fn pack(values: impl ExactSizeIterator<Item = i64> + Clone, out: &mut Vec<u8>) {
    let first = values.clone().next().unwrap_or(0);
    let lowest = values.clone().min().unwrap_or(0);
    let unit = values.clone().fold(0, |unit, value| gcd(value.abs_diff(first), unit));
    if unit == 0 {
        out.push(ALIKE);
        put(out, zigzag(first));
        return;
    }
    let [mut neighbours, mut levels, mut bursts] = [const { Bits::new() }; 3];
    let [mut near, mut level, mut burst] = [const { Parameter::new() }; 3];
    let mut before = first;
    for value in values.clone().skip(1) {
        // The unit divides it; at most 2^55, so the casts are exact.
        neighbours.rice(zigzag((value - before) / unit as i64), &mut near);
        before = value;
    }
    for value in values {
        let above = value.abs_diff(lowest) / unit;
        levels.rice(above, &mut level);
        bursts.put(u64::from(above > 0), 1);
        if above > 0 {
            bursts.rice(above - 1, &mut burst);
        }
    }
    let (mut how, mut start, mut bits) = (NEIGHBOURS, first, neighbours.finish());
    for (other, packed) in [(LEVELS, levels.finish()), (BURSTS, bursts.finish())] {
        if packed.len() < bits.len() {
            (how, start, bits) = (other, lowest, packed);
        }
    }
    out.push(how);
    put(out, zigzag(start));
    put(out, unit);
    put(out, bits.len() as u64);
    out.extend_from_slice(&bits);
}

fn unpack(rows: usize, bytes: &[u8], at: &mut usize) -> Result<Vec<i64>, Damaged> {
    let how = *bytes.get(*at).ok_or(Damaged)?;
    *at += 1;
    let number = |at: &mut usize| get(bytes, at).map_err(|_| Damaged);
    let start = unzigzag(number(at)?);
    if how == ALIKE {
        return Ok(vec![start; rows]);
    }
    let unit = i64::try_from(number(at)?).map_err(|_| Damaged)?;
    let length = usize::try_from(number(at)?).map_err(|_| Damaged)?;
    let end = at.checked_add(length).ok_or(Damaged)?;
    let mut bits = BitReader::new(bytes.get(*at..end).ok_or(Damaged)?);
    *at = end;
    let mut parameter = Parameter::new();
    let mut values = Vec::with_capacity(rows);
    let within = |value: Option<i64>| value.filter(|value| value.unsigned_abs() <= 2 << 53).ok_or(Damaged);
    let mut value = start;
    if how == NEIGHBOURS {
        values.push(value);
    }
    while values.len() < rows {
        let coded = match how {
            BURSTS if bits.get(1)? == 0 => 0,
            BURSTS => bits.rice(&mut parameter)?.checked_add(1).ok_or(Damaged)?,
            _ => bits.rice(&mut parameter)?,
        };
        value = match how {
            NEIGHBOURS => within(unzigzag(coded).checked_mul(unit).and_then(|step| value.checked_add(step)))?,
            LEVELS | BURSTS => {
                let level = i64::try_from(coded).ok().and_then(|level| level.checked_mul(unit));
                within(level.and_then(|level| start.checked_add(level)))?
            }
            _ => return Err(Damaged),
        };
        values.push(value);
    }
    Ok(values)
}

/// Sum and number of recent values, from which the length of the next code follows.
#[derive(Debug)]
struct Parameter {
    sum: u64,
    count: u64,
}

impl Parameter {
    const fn new() -> Self {
        Self { sum: 4, count: 1 }
    }

    /// Bits of the remainder: the binary logarithm of the mean, rounded up.
    fn bits(&self) -> u32 {
        let mean = self.sum / self.count;
        u64::BITS - mean.leading_zeros()
    }

    fn add(&mut self, value: u64) {
        // Values are below 2^56 and at most 16 are summed up.
        self.sum = self.sum.saturating_add(value);
        self.count += 1;
        if self.count > MEMORY {
            self.sum /= 2;
            self.count /= 2;
        }
    }
}

#[derive(Debug)]
struct Bits {
    bytes: Vec<u8>,
    /// The last `held` bits, at most 7 between two calls.
    last: u64,
    held: u32,
}

impl Bits {
    const fn new() -> Self {
        Self { bytes: Vec::new(), last: 0, held: 0 }
    }

    fn put(&mut self, value: u64, bits: u32) {
        // In pieces that fit beside the seven bits held.
        let mut left = bits;
        while left > 0 {
            let piece = left.min(32);
            left -= piece;
            self.last = self.last << piece | (value >> left & ((1 << piece) - 1));
            self.held += piece;
            while self.held >= 8 {
                self.held -= 8;
                self.bytes.push((self.last >> self.held) as u8);
            }
        }
    }

    fn rice(&mut self, value: u64, parameter: &mut Parameter) {
        let low = parameter.bits();
        let high = value >> low;
        if high < u64::from(ESCAPE) {
            let ones = high as u32;
            // That many ones and a zero.
            self.put((1u64 << (ones + 1)) - 2, ones + 1);
            self.put(value, low);
        } else {
            let length = u64::BITS - value.leading_zeros();
            self.put((1 << ESCAPE) - 1, ESCAPE);
            self.put(u64::from(length - 1), 6);
            self.put(value, length);
        }
        parameter.add(value);
    }

    fn finish(mut self) -> Vec<u8> {
        if self.held > 0 {
            self.put(0, 8 - self.held);
        }
        self.bytes
    }
}

#[derive(Debug)]
struct BitReader<'a> {
    bytes: &'a [u8],
    at: usize,
    last: u64,
    held: u32,
}

impl<'a> BitReader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, last: 0, held: 0 }
    }

    fn get(&mut self, bits: u32) -> Result<u64, Damaged> {
        let (mut value, mut left) = (0u64, bits);
        while left > 0 {
            let piece = left.min(32);
            while self.held < piece {
                let byte = *self.bytes.get(self.at).ok_or(Damaged)?;
                self.at += 1;
                self.last = self.last << 8 | u64::from(byte);
                self.held += 8;
            }
            left -= piece;
            self.held -= piece;
            value = value << piece | (self.last >> self.held & ((1 << piece) - 1));
        }
        Ok(value)
    }

    fn rice(&mut self, parameter: &mut Parameter) -> Result<u64, Damaged> {
        let mut ones = 0;
        while ones < ESCAPE && self.get(1)? == 1 {
            ones += 1;
        }
        let value = if ones < ESCAPE {
            let low = parameter.bits();
            // What was written had at most 64 bits.
            u64::from(ones).checked_shl(low).filter(|high| high >> low == u64::from(ones)).ok_or(Damaged)?
                | self.get(low)?
        } else {
            let length = self.get(6)? as u32 + 1;
            self.get(length)?
        };
        parameter.add(value);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn samples() -> impl Strategy<Value = Vec<Sample>> {
        let value = prop_oneof![
            0..1000i64,
            (0..1000i64).prop_map(|value| value * 4096),
            -VALUE_MAX..=VALUE_MAX,
            Just(0i64),
            Just(VALUE_MAX),
            Just(-VALUE_MAX),
        ];
        let step = prop_oneof![8 => Just(1u64), 1 => 1..5000u64, 1 => Just(1u64 << 24)];
        (0..TIME_MAX_S / 2, prop::collection::vec((step, value), 0..300)).prop_map(|(mut at_s, rows)| {
            let mut row = |(step, value)| {
                at_s += step;
                Sample { at_s, value }
            };
            rows.into_iter().map(&mut row).collect()
        })
    }

    proptest! {
        #[test]
        fn samples_and_buckets_come_back_as_they_were(rows in samples()) {
            prop_assert_eq!(decode::<Sample>(&encode(&rows)), Ok(rows.clone()));
            let mut buckets: Vec<Bucket> = rows.iter().map(|row| Bucket::of(*row, 1)).collect();
            let others: Vec<Bucket> = buckets.iter().rev().copied().collect();
            buckets.iter_mut().zip(&others).for_each(|(bucket, other)| bucket.add(other));
            prop_assert_eq!(decode::<Bucket>(&encode(&buckets)), Ok(buckets));
            let frame = encode_frame([(7, rows.as_slice()), (9, &rows), (8, &[])]);
            let mut back = Vec::new();
            decode_frame(&frame, |number| number != 7, |number, rows| back.push((number, rows))).unwrap();
            let whole = if rows.is_empty() { Vec::new() } else { vec![(9, rows)] };
            prop_assert_eq!(back, whole);
        }

        #[test]
        fn damage_is_noticed(rows in samples(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let mut bytes = encode(&rows);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(decode::<Sample>(&bytes), Err(Damaged));
            let rows = if rows.is_empty() { vec![Sample { at_s: 1, value: 1 }] } else { rows };
            let mut bytes = encode_frame([(7, rows.as_slice())]);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(decode_frame(&bytes, |_| true, |_, _| ()), Err(Damaged));
        }

        #[test]
        fn any_bytes_with_a_right_sum_are_rows_or_damaged(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = vec![0; HEADER_BYTES];
            bytes.extend(body);
            let bytes = sealed(bytes);
            let _ = decode::<Sample>(&bytes);
            let _ = decode::<Bucket>(&bytes);
            let _ = decode_frame(&bytes, |_| true, |_, _| ());
        }
    }

    #[test]
    fn a_frame_holds_a_day_of_a_series() {
        let rows: Vec<Sample> = (0..86_400).map(|n| Sample { at_s: n, value: n as i64 % 77 }).collect();
        let mut back = Vec::new();
        decode_frame(&encode_frame([(3, rows.as_slice())]), |_| true, |_, rows| back.extend(rows)).unwrap();
        assert_eq!(back, rows);
    }

    #[test]
    fn a_steady_series_takes_next_to_nothing() {
        let rows: Vec<Sample> = (0..600).map(|n| Sample { at_s: 1_700_000_000 + n, value: 4 << 30 }).collect();
        assert!(encode(&rows).len() <= 24, "{}", encode(&rows).len());
        let rows: Vec<Sample> = (0..600).map(|n| Sample { at_s: n, value: (n as i64 * 7919 % 3) * 4096 }).collect();
        // Three values: log2(3) bits, and at most one more for whole bits.
        assert!(encode(&rows).len() < 600 * 3 / 8 + 20, "{}", encode(&rows).len());
    }
}
