//! What is on the disks: every eight bytes follow from where they lie and from who wrote them, so that an answer that is
//! fast and wrong is found.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Bytes of one word.
const WORD_BYTES: usize = 8;
/// Of a request that is not compared as a whole, one word in each of these is: a page of it that is missing, old or of
/// elsewhere is found, and the client stays fast.
const STRIDE_BYTES: usize = 512;

/// The word at a place, as of a generation of writes (0: as the file was made). A multiplication by an odd number and an
/// exclusive or: no two places of a generation have the same.
#[inline]
fn word(offset: u64, generation: u64) -> u64 {
    (offset / WORD_BYTES as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ generation.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// Fills `data` with what belongs at `offset`, a multiple of 8.
pub(super) fn fill(data: &mut [u8], offset: u64, generation: u64) {
    for (at, bytes) in (offset..).step_by(WORD_BYTES).zip(data.chunks_exact_mut(WORD_BYTES)) {
        bytes.copy_from_slice(&word(at, generation).to_le_bytes());
    }
}

/// Whether all of `data` is what belongs at `offset`.
pub(super) fn is_right(data: &[u8], offset: u64, generation: u64) -> bool {
    let mut places = (offset..).step_by(WORD_BYTES);
    data.chunks_exact(WORD_BYTES)
        .all(|bytes| places.next().is_some_and(|at| bytes == word(at, generation).to_le_bytes()))
}

/// Whether a word in each 512 bytes of `data` is right; which one, `turn` decides.
#[inline]
pub(super) fn looks_right(data: &[u8], offset: u64, generation: u64, turn: u64) -> bool {
    // Below 64, the words in 512 bytes.
    let within = (turn % (STRIDE_BYTES / WORD_BYTES) as u64) as usize * WORD_BYTES;
    (within..data.len()).step_by(STRIDE_BYTES).all(|at| {
        let bytes = data.get(at..at + WORD_BYTES);
        bytes.is_some_and(|bytes| bytes == word(offset + at as u64, generation).to_le_bytes())
    })
}

/// Makes a disk of `len_bytes`, of which `ranges` (offset and length) have their content and the rest is a hole. On disk
/// when this returns, so that nothing is written back while others are measured.
pub(super) fn make(path: &Path, len_bytes: u64, ranges: &[(u64, u64)]) -> Result<()> {
    const STEP: usize = 1 << 20;
    let write = || -> std::io::Result<()> {
        let file = File::create(path)?;
        file.set_len(len_bytes)?;
        let mut buffer = vec![0; STEP];
        for (start, len) in ranges {
            for at in (*start..start + len).step_by(STEP) {
                let bytes = usize::try_from(start + len - at).unwrap_or(STEP).min(STEP);
                fill(&mut buffer[..bytes], at, 0);
                file.write_all_at(&buffer[..bytes], at)?;
            }
        }
        file.sync_all()
    };
    write().with_context(|| format!("cannot make the disk {}", path.display()))
}

/// Reads the whole file once, through the page cache, and checks it.
pub(super) fn read_through(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let len = file.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    for at in (0..len).step_by(buffer.len()) {
        let bytes = usize::try_from(len - at).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..bytes], at)?;
        ensure!(is_right(&buffer[..bytes], at, 0), "{} is not what was written at {at}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_page_is_found_whichever_word_is_looked_at() {
        let mut data = vec![0; 16384];
        fill(&mut data, 1 << 20, 3);
        assert!(is_right(&data, 1 << 20, 3));
        assert!((0..64).all(|turn| looks_right(&data, 1 << 20, 3, turn)));
        assert!(!is_right(&data, 1 << 20, 0) && !is_right(&data, 4096, 3));
        assert!((0..64).all(|turn| !looks_right(&data, 1 << 20, 2, turn)));
        assert!((0..64).all(|turn| !looks_right(&data, (1 << 20) + 4096, 3, turn)));
        data[4096..4608].fill(0);
        assert!((0..64).all(|turn| !looks_right(&data, 1 << 20, 3, turn)), "one sector is missing");
        data.copy_within(8192..8704, 4096);
        assert!((0..64).all(|turn| !looks_right(&data, 1 << 20, 3, turn)), "one sector is of elsewhere");
    }

    #[test]
    fn a_disk_holds_what_belongs_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        make(&path, 3 << 20, &[(0, 3 << 20)]).unwrap();
        read_through(&path).unwrap();
        make(&path, 3 << 20, &[(0, 1 << 20)]).unwrap();
        assert!(read_through(&path).is_err());
    }
}
