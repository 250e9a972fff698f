//! A forecaster as bytes: its series, what it learned, and what it has said and not yet compared.
//!
//! ```text
//! magic "PSTGFCST", version u32, CRC-32C of everything behind it; then
//! metric, step, last time, count, largest; both rings: length, values f32, measured as runs;
//! the coarse ring's mean under way; blend; shifts; rehearsals
//! ```
//!
//! Integers are LEB128, floats little-endian. At most [`BYTES_MOST`]. Any bytes are read or refused without panic.

use std::collections::VecDeque;

use super::blend::Blend;
use super::conformal::{Conformal, Distant};
use super::experts::Opinion;
use super::forecaster::{FAR_PENDING, FarRehearsal, Forecaster, PENDING, REHEARSED, Rehearsal};
use super::history::{FINE, Ring, SLACK, Series};
use super::{EXPERTS, Metric};
use crate::wire::{Reader, WireError, put, put_f32};
use thiserror::Error;

const MAGIC: [u8; 8] = *b"PSTGFCST";
/// Version of the format.
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 16;
/// What a forecaster's bytes are at most.
pub const BYTES_MOST: usize = 64 * 1024;

/// Why bytes are no forecaster.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StateError {
    #[error("not a forecaster's state: it does not begin with PSTGFCST; it starts anew")]
    NotState,
    #[error("the forecaster's state has format version {found}, this program reads {VERSION}; it starts anew")]
    OtherVersion { found: u32 },
    #[error(
        "the forecaster's state has the checksum {found:#010x}, not {expected:#010x}: it is damaged; it starts anew"
    )]
    Checksum { found: u32, expected: u32 },
    #[error("the forecaster's state is damaged ({0}) although its checksum is right; it starts anew")]
    Damaged(&'static str),
}

impl From<WireError> for StateError {
    fn from(error: WireError) -> Self {
        Self::Damaged(match error {
            WireError::End => "it ends early",
            WireError::Invalid(what) => what,
        })
    }
}

impl Forecaster {
    /// Serialises the forecaster, see [`Forecaster::read`]; at most 64 KiB, deterministic.
    #[must_use]
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        let series = &self.series;
        let metric = Metric::ALL.iter().position(|metric| *metric == self.metric).unwrap_or(0);
        for number in [metric as u64, u64::from(series.step_s), series.last_s, series.count] {
            put(&mut out, number);
        }
        put_f32(&mut out, series.largest);
        write_ring(&mut out, &series.fine);
        write_ring(&mut out, &series.coarse);
        put(&mut out, series.slot);
        out.extend(series.sum.to_le_bytes());
        put(&mut out, u64::from(series.number));
        put(&mut out, u64::from(self.blend.compared));
        let mut floats = |values: &[f32]| values.iter().for_each(|value| put_f32(&mut out, *value));
        floats(self.blend.excess.as_flattened().as_flattened());
        floats(self.blend.loss.as_flattened());
        floats(self.conformal.shifts.as_flattened());
        put(&mut out, self.pending.len() as u64);
        for rehearsal in &self.pending {
            put(&mut out, rehearsal.count);
            put_f32(&mut out, rehearsal.scale);
            for opinion in &rehearsal.opinions {
                out.push(u8::from(opinion.is_some()));
                opinion.iter().for_each(|opinion| write_opinion(&mut out, opinion));
            }
            write_opinion(&mut out, &rehearsal.said);
        }
        put(&mut out, self.far.len() as u64);
        for rehearsal in &self.far {
            put(&mut out, rehearsal.count);
            put_f32(&mut out, rehearsal.scale);
            let said = &rehearsal.said;
            said.steps.iter().chain([&said.peak]).flatten().for_each(|value| put_f32(&mut out, *value));
        }
        let checksum = crc32c::crc32c(&out[HEADER_BYTES..]);
        out[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Takes up what [`Forecaster::write`] gave; forecasts go on as if there had been no break, but for the summary, which
    /// is made anew.
    ///
    /// # Errors
    /// [`StateError`]. Any bytes are refused or accepted without panic.
    pub fn read(bytes: &[u8]) -> Result<Self, StateError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(StateError::NotState)?;
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(StateError::NotState)?;
        let found = u32::from_le_bytes(*version);
        if found != VERSION {
            return Err(StateError::OtherVersion { found });
        }
        let (checksum, checked) = rest.split_first_chunk::<4>().ok_or(StateError::NotState)?;
        let (found, expected) = (crc32c::crc32c(checked), u32::from_le_bytes(*checksum));
        if found != expected {
            return Err(StateError::Checksum { found, expected });
        }
        let mut reader = Reader::new(checked);
        let metric = Metric::ALL[reader.at_most(3, "metric")? as usize];
        let mut series = Series::new(reader.at_most(u64::from(u32::MAX), "step")? as u32);
        series.last_s = reader.number()?;
        series.count = reader.number()?;
        series.largest = value(&mut reader)?;
        series.fine = read_ring(&mut reader)?;
        series.coarse = read_ring(&mut reader)?;
        series.slot = reader.number()?;
        series.sum = read_sum(&mut reader)?;
        series.number = reader.at_most(u64::from(u32::MAX), "mean")? as u32;
        let kept = series.fine.values.len() as u64;
        sound(series.count >= kept && (series.count > 0) == (kept > 0), "count")?;
        let blend = Blend {
            compared: reader.at_most(u64::from(u32::MAX), "comparisons")? as u32,
            excess: read_excess(&mut reader)?,
            loss: [quantiles(&mut reader)?, quantiles(&mut reader)?],
        };
        let mut conformal = Conformal::default();
        for shifts in &mut conformal.shifts {
            *shifts = quantiles(&mut reader)?;
            sound(shifts.iter().all(|shift| shift.abs() <= 16.0), "shift")?;
        }
        let pending = reader.at_most(PENDING as u64, "rehearsals")?;
        let pending: VecDeque<Rehearsal> =
            (0..pending).map(|_| read_rehearsal(&mut reader, series.count)).collect::<Result<_, _>>()?;
        sound(pending.iter().zip(pending.iter().skip(1)).all(|(a, b)| a.count < b.count), "order of rehearsals")?;
        let far = reader.at_most(FAR_PENDING as u64, "rehearsals")?;
        let far: VecDeque<FarRehearsal> =
            (0..far).map(|_| read_far(&mut reader, series.count)).collect::<Result<_, _>>()?;
        sound(far.iter().zip(far.iter().skip(1)).all(|(a, b)| a.count < b.count), "order of rehearsals")?;
        sound(reader.is_empty(), "length")?;
        Ok(Self::of(metric, series, blend, conformal, pending, far))
    }
}

fn sound(is: bool, what: &'static str) -> Result<(), StateError> {
    if is { Ok(()) } else { Err(StateError::Damaged(what)) }
}

fn write_ring(out: &mut Vec<u8>, ring: &Ring) {
    put(out, ring.values.len() as u64);
    ring.values.iter().for_each(|value| put_f32(out, *value));
    for run in ring.measured.chunk_by(|a, b| a == b) {
        put(out, (run.len() as u64) << 1 | u64::from(run[0]));
    }
}

fn read_ring(reader: &mut Reader<'_>) -> Result<Ring, StateError> {
    let count = reader.count(4, "ring")?;
    sound(count <= FINE + SLACK, "ring")?;
    let mut values = Vec::with_capacity(count); // collecting results would leave room for up to twice as many
    for _ in 0..count {
        values.push(value(reader)?);
    }
    let mut measured = Vec::with_capacity(count);
    while measured.len() < count {
        let run = reader.number()?;
        let length = usize::try_from(run >> 1).unwrap_or(usize::MAX);
        sound(length > 0 && length <= count - measured.len(), "run")?;
        measured.resize(measured.len() + length, run & 1 == 1);
    }
    Ok(Ring { values, measured })
}

fn write_opinion(out: &mut Vec<u8>, opinion: &Opinion) {
    for quantiles in opinion.steps.iter().chain([&opinion.peak]) {
        quantiles.iter().for_each(|value| put_f32(out, *value));
    }
}

fn read_opinion(reader: &mut Reader<'_>) -> Result<Opinion, StateError> {
    let steps = (0..REHEARSED).map(|_| quantiles(reader)).collect::<Result<_, _>>()?;
    Ok(Opinion { steps, peak: quantiles(reader)? })
}

fn read_rehearsal(reader: &mut Reader<'_>, count_most: u64) -> Result<Rehearsal, StateError> {
    let count = reader.at_most(count_most, "rehearsal")?;
    let scale = value(reader)?;
    sound(scale > 0.0, "scale")?;
    let mut opinions: [Option<Opinion>; EXPERTS] = Default::default();
    for opinion in &mut opinions {
        *opinion = if reader.byte()? == 0 { None } else { Some(read_opinion(reader)?) };
    }
    Ok(Rehearsal { count, scale, opinions, said: read_opinion(reader)? })
}

fn read_far(reader: &mut Reader<'_>, count_most: u64) -> Result<FarRehearsal, StateError> {
    let count = reader.at_most(count_most, "rehearsal")?;
    let scale = value(reader)?;
    sound(scale > 0.0, "scale")?;
    let mut said = Distant::default();
    for values in said.steps.iter_mut().chain([&mut said.peak]) {
        *values = quantiles(reader)?;
    }
    Ok(FarRehearsal { count, scale, said })
}

fn read_excess(reader: &mut Reader<'_>) -> Result<[[[f32; EXPERTS]; 4]; 2], StateError> {
    let mut excess = [[[0.0; EXPERTS]; 4]; 2];
    for value in excess.as_flattened_mut().as_flattened_mut() {
        *value = finite(reader)?;
    }
    Ok(excess)
}

fn read_sum(reader: &mut Reader<'_>) -> Result<f64, StateError> {
    let mut bytes = [0; 8];
    for byte in &mut bytes {
        *byte = reader.byte()?;
    }
    let sum = f64::from_le_bytes(bytes);
    sound(sum.is_finite() && sum >= 0.0, "mean")?;
    Ok(sum)
}

fn quantiles(reader: &mut Reader<'_>) -> Result<[f32; 4], StateError> {
    Ok([finite(reader)?, finite(reader)?, finite(reader)?, finite(reader)?])
}

/// Within what features and forecasts can be.
fn finite(reader: &mut Reader<'_>) -> Result<f32, StateError> {
    let value = reader.f32()?;
    sound(value.abs() <= 1e6, "number")?;
    Ok(value)
}

/// A measured value.
fn value(reader: &mut Reader<'_>) -> Result<f32, StateError> {
    let value = reader.f32()?;
    sound((0.0..=1e30).contains(&value), "value")?;
    Ok(value)
}
