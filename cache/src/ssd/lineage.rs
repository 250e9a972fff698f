//! The last run: a small file beside the database that says which slab the daemon had in use last, and how far that was.
//!
//! A run without the SSD tier, or with another, marks nothing in this slab. What it wrote to a store shows in the store's
//! [`super::Stamp`]; of a store that has none (NBD, block devices) nobody could tell. So what a slab holds of those counts only
//! if the last run had this very slab, and not an older copy of it: superblocks are numbered, and the file has the number
//! from which on it is the right one. No file: the last run had none.

use super::format::{SlabId, Superblock};
use super::veto;
use std::io;
use std::path::Path;

fn id_text(slab_id: &SlabId) -> String {
    slab_id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Notes durably that this slab is in use, or was when the run ended.
pub(super) fn note(path: &Path, superblock: &Superblock) -> io::Result<()> {
    veto::replace(path, &format!("{} {}\n", id_text(&superblock.slab_id), superblock.generation))
}

/// Whether the last run had this slab. What cannot be read says no.
pub(super) fn had(path: &Path, superblock: &Superblock) -> bool {
    let Ok(text) = std::fs::read_to_string(path) else { return false };
    let Some((id, generation)) = text.strip_suffix('\n').and_then(|line| line.split_once(' ')) else { return false };
    id == id_text(&superblock.slab_id) && generation.parse().is_ok_and(|from: u64| superblock.generation >= from)
}

/// Notes durably that a run begins without an SSD tier, see [`super::SsdOptions::lineage`]. To be called before any store is
/// served.
///
/// # Errors
/// The file cannot be removed: a later run may believe what its slab has of stores that show no changes.
pub fn run_without(path: &Path) -> io::Result<()> {
    veto::lift(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssd::open::new_superblock;

    #[test]
    fn only_the_slab_of_the_last_run_counts_and_no_older_copy_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ssd.last");
        let (a, b) = (new_superblock(8, 5), new_superblock(8, 50));
        assert!(!had(&path, &a));
        note(&path, &a).unwrap();
        assert!(had(&path, &a) && !had(&path, &b));
        let mut other = a.clone();
        other.generation += 1;
        assert!(had(&path, &other));
        other.generation -= 2;
        assert!(!had(&path, &other), "a copy from before");
        note(&path, &b).unwrap();
        assert!(!had(&path, &a) && had(&path, &b));
        let id = id_text(&b.slab_id);
        for rotten in [String::new(), id.clone(), format!("{id} 1"), format!("{id} x\n"), "\u{fffd}\n".to_owned()] {
            std::fs::write(&path, &rotten).unwrap();
            assert!(!had(&path, &b), "{rotten:?}");
        }
        note(&path, &b).unwrap();
        run_without(&path).unwrap();
        run_without(&path).unwrap();
        assert!(!had(&path, &b));
    }
}
