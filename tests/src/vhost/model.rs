//! What each sector may hold. Every write of a sector has a number, its version; no two writes of a sector are under way at
//! once, so versions have an order. A read may see any version from the last one known to be there when it began to the
//! newest begun when it ended. A write that is lost, or carried out once more after a later one, is seen by that.

use anyhow::{Result, bail};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const WORDS: usize = SECTOR / 8;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The words of a sector at a version: the version, and a check that depends on place and version.
fn word(sector: usize, at: usize, version: u32) -> u64 {
    let mut state = ((sector * WORDS + at) as u64) << 32 | u64::from(version);
    draw(&mut state) << 32 | u64::from(version)
}

/// The contents of a sector at a version.
pub fn fill(sector: usize, version: u32, bytes: &mut [u8]) {
    for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&word(sector, at, version).to_le_bytes());
    }
}

/// What is known of every sector.
#[derive(Debug)]
pub struct Model {
    /// The newest version whose write was begun.
    begun: Vec<u32>,
    /// The newest that is known to be there: acknowledged, or read.
    known: Vec<u32>,
    writing: Vec<bool>,
}

impl Model {
    /// A disk whose sectors are all at version 0.
    #[must_use]
    pub fn new(sectors: usize) -> Self {
        Self { begun: vec![0; sectors], known: vec![0; sectors], writing: vec![false; sectors] }
    }

    /// The disk's contents at version 0.
    #[must_use]
    pub fn blank(sectors: usize) -> Vec<u8> {
        let mut bytes = vec![0; sectors * SECTOR];
        for (sector, chunk) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            fill(sector, 0, chunk);
        }
        bytes
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> usize {
        self.begun.len()
    }

    /// Begins a write and fills in what it writes. False if another write of one of the sectors is under way.
    pub fn begin_write(&mut self, first: usize, bytes: &mut [u8]) -> bool {
        let range = first..first + bytes.len() / SECTOR;
        if self.writing[range.clone()].contains(&true) {
            return false;
        }
        for (sector, chunk) in range.zip(bytes.chunks_exact_mut(SECTOR)) {
            self.writing[sector] = true;
            self.begun[sector] += 1;
            fill(sector, self.begun[sector], chunk);
        }
        true
    }

    /// A write was acknowledged.
    pub fn end_write(&mut self, first: usize, sectors: usize) {
        for sector in first..first + sectors {
            self.writing[sector] = false;
            self.known[sector] = self.begun[sector];
        }
    }

    /// Begins a read: the oldest version that each sector may have.
    #[must_use]
    pub fn begin_read(&self, first: usize, sectors: usize) -> Vec<u32> {
        self.known[first..first + sectors].to_vec()
    }

    /// Checks what a read returned that began when `oldest` held. A read beside a write may see some words of each.
    ///
    /// # Errors
    /// The first word that may not be there.
    pub fn end_read(&mut self, first: usize, oldest: &[u32], bytes: &[u8]) -> Result<()> {
        for ((sector, chunk), oldest) in (first..).zip(bytes.chunks_exact(SECTOR)).zip(oldest) {
            let (newest, mut seen) = (self.begun[sector], u32::MAX);
            for (at, found) in chunk.chunks_exact(8).enumerate() {
                let found = u64::from_le_bytes([
                    found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7],
                ]);
                let version = found as u32;
                if found != word(sector, at, version) {
                    bail!("sector {sector}: word {at} is {found:#x}, which no write wrote there");
                }
                if version < *oldest {
                    bail!("sector {sector}: version {version} is back; {oldest} was there before, {newest} was begun");
                }
                if version > newest {
                    bail!("sector {sector}: version {version}, but only {newest} were written");
                }
                seen = seen.min(version);
            }
            self.known[sector] = self.known[sector].max(seen);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(versions: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; versions.len() * SECTOR];
        for ((sector, version), chunk) in versions.iter().enumerate().zip(bytes.chunks_exact_mut(SECTOR)) {
            fill(sector, *version, chunk);
        }
        bytes
    }

    #[test]
    fn a_lost_write_a_repeated_write_and_foreign_bytes_are_seen() {
        let mut model = Model::new(2);
        let mut data = vec![0; SECTOR];
        assert!(model.begin_write(0, &mut data));
        assert!(!model.begin_write(0, &mut data), "no two writes of a sector at once");
        let oldest = model.begin_read(0, 2);
        model.end_read(0, &oldest, &bytes(&[0, 0])).unwrap();
        model.end_read(0, &oldest, &bytes(&[1, 0])).unwrap();
        // it was seen, and may not go again
        let oldest = model.begin_read(0, 2);
        assert!(model.end_read(0, &oldest, &bytes(&[0, 0])).is_err());
        model.end_write(0, 1);
        assert!(model.begin_write(0, &mut data));
        model.end_write(0, 1);
        let oldest = model.begin_read(0, 2);
        let back = model.end_read(0, &oldest, &bytes(&[1, 0])).unwrap_err();
        assert!(back.to_string().contains("version 1 is back"), "{back}");
        assert!(model.end_read(0, &oldest, &bytes(&[2, 1])).is_err(), "never written");
        let mut torn = bytes(&[2, 0]);
        torn[5] ^= 1;
        assert!(model.end_read(0, &oldest, &torn).is_err());
        model.end_read(0, &oldest, &bytes(&[2, 0])).unwrap();
    }

    #[test]
    fn a_read_beside_a_write_may_see_words_of_both() {
        let mut model = Model::new(1);
        let oldest = model.begin_read(0, 1);
        let mut mixed = bytes(&[0]);
        let mut data = vec![0; SECTOR];
        assert!(model.begin_write(0, &mut data));
        mixed[..64].copy_from_slice(&data[..64]);
        model.end_read(0, &oldest, &mixed).unwrap();
        assert_eq!(model.begin_read(0, 1), [0], "not yet known to be there");
    }
}
