//! What a program used at each hour of the day, over all its executions and machines: an expert for series that are young,
//! and what unusual use is measured against.
//!
//! A histogram for each hour with buckets that grow by 9 % (eight an octave), whose entries fade with a half-life of a
//! fortnight; at most 96 buckets an hour, 14 KiB in all.

use super::{QUANTILES, Quantiles};
use crate::wire::{Reader, WireError, put, put_f32, put_signed};

const HOURS: usize = 24;
/// Buckets an octave.
const FINENESS: f64 = 8.0;
/// Bucket of values that are zero, or as good as.
const ZERO: i16 = i16::MIN;
/// Buckets of an hour.
const BUCKETS: usize = 96;
const HALF_LIFE_S: f64 = 14.0 * 86_400.0;
/// Weights are scaled down before a float overflows.
const LARGEST_WEIGHT: f64 = 1e12;
/// Observations of an hour from which on it speaks.
const ENOUGH: f32 = 12.0;

/// See the module's head.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Unix time that a weight of 1 belongs to.
    since_s: u64,
    /// Sorted by bucket.
    hours: [Vec<(i16, f32)>; HOURS],
    /// Observations of each hour, not faded, at most 2^24.
    seen: [f32; HOURS],
}

impl Default for Profile {
    fn default() -> Self {
        Self { since_s: 0, hours: std::array::from_fn(|_| Vec::new()), seen: [0.0; HOURS] }
    }
}

impl Profile {
    /// Takes in a value; what is negative or not finite is ignored.
    pub fn observe(&mut self, at_s: u64, value: f64) {
        if !(0.0..=1e30).contains(&value) {
            return;
        }
        if self.seen.iter().all(|seen| *seen == 0.0) {
            self.since_s = at_s;
        }
        let mut weight = 2.0_f64.powf((at_s as f64 - self.since_s as f64) / HALF_LIFE_S);
        if weight > LARGEST_WEIGHT {
            for (_, old) in self.hours.iter_mut().flatten() {
                *old = (f64::from(*old) / weight) as f32;
            }
            self.since_s = at_s;
            weight = 1.0;
        }
        let (hour, bucket) = (hour(at_s), bucket(value));
        self.seen[hour] = (self.seen[hour] + 1.0).min(16_777_216.0);
        let buckets = &mut self.hours[hour];
        match buckets.binary_search_by_key(&bucket, |(bucket, _)| *bucket) {
            Ok(at) => buckets[at].1 += weight as f32,
            Err(at) => buckets.insert(at, (bucket, weight as f32)),
        }
        if buckets.len() > BUCKETS {
            let lightest = (0..buckets.len()).min_by(|a, b| buckets[*a].1.total_cmp(&buckets[*b].1));
            buckets.remove(lightest.unwrap_or(0));
        }
    }

    /// Quantiles at that hour of the day; none before there is a dozen of values.
    #[must_use]
    pub fn quantiles(&self, at_s: u64) -> Option<Quantiles> {
        let hour = hour(at_s);
        (self.seen[hour] >= ENOUGH).then(|| Quantiles(QUANTILES.map(|level| at(&self.hours[hour], f64::from(level)))))
    }

    /// Quantiles over the whole day.
    #[must_use]
    pub fn overall(&self) -> Option<Quantiles> {
        if self.seen.iter().sum::<f32>() < ENOUGH {
            return None;
        }
        let mut all: Vec<(i16, f32)> = self.hours.iter().flatten().copied().collect();
        all.sort_unstable_by_key(|(bucket, _)| *bucket);
        Some(Quantiles(QUANTILES.map(|level| at(&all, f64::from(level)))))
    }

    /// Appends the profile as bytes; deterministic.
    pub fn write(&self, out: &mut Vec<u8>) {
        put(out, self.since_s);
        for (buckets, seen) in self.hours.iter().zip(self.seen) {
            put_f32(out, seen);
            put(out, buckets.len() as u64);
            for (bucket, weight) in buckets {
                put_signed(out, i64::from(*bucket));
                put_f32(out, *weight);
            }
        }
    }

    /// Reads what [`Profile::write`] wrote; `None` for anything else. Never panics.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let profile = Self::parse(&mut reader).ok()?;
        reader.is_empty().then_some(profile)
    }

    fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let invalid = |sound: bool, what| if sound { Ok(()) } else { Err(WireError::Invalid(what)) };
        let mut profile = Self { since_s: reader.number()?, ..Self::default() };
        for hour in 0..HOURS {
            let seen = reader.f32()?;
            invalid((0.0..=16_777_216.0).contains(&seen), "observations")?;
            profile.seen[hour] = seen;
            let count = reader.count(5, "buckets")?;
            invalid(count <= BUCKETS, "buckets")?;
            for _ in 0..count {
                let bucket = i16::try_from(reader.signed()?).map_err(|_| WireError::Invalid("bucket"))?;
                let weight = reader.f32()?;
                invalid(weight.is_finite() && weight >= 0.0, "weight")?;
                invalid(profile.hours[hour].last().is_none_or(|(before, _)| *before < bucket), "order")?;
                invalid(bucket == ZERO || bucket.unsigned_abs() <= 1200, "bucket")?;
                profile.hours[hour].push((bucket, weight));
            }
        }
        Ok(profile)
    }
}

fn hour(at_s: u64) -> usize {
    (at_s / 3600 % HOURS as u64) as usize
}

fn bucket(value: f64) -> i16 {
    if value < 1e-30 { ZERO } else { (value.log2() * FINENESS).floor() as i16 }
}

/// The upper edge of the bucket where `level` of the weight is reached.
fn at(buckets: &[(i16, f32)], level: f64) -> f64 {
    let total: f64 = buckets.iter().map(|(_, weight)| f64::from(*weight)).sum();
    let mut sum = 0.0;
    let reached = buckets.iter().find(|(_, weight)| {
        sum += f64::from(*weight);
        sum >= level * total
    });
    match reached.or(buckets.last()) {
        Some((bucket, _)) if *bucket != ZERO => 2.0_f64.powf((f64::from(*bucket) + 1.0) / FINENESS),
        _ => 0.0,
    }
}
