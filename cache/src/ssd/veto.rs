//! The veto: a small file beside the database that says which slab must not be believed after a crash, for when the slab
//! itself takes no more writes. Written by a thread of its own, so that nothing waits for it that need not.

use super::format::SlabId;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

fn text(slab_id: &SlabId) -> String {
    slab_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n"
}

/// Vetoes a slab durably.
pub(super) fn write(path: &Path, slab_id: &SlabId) -> io::Result<()> {
    replace(path, &text(slab_id))
}

/// Replaces a small file durably, whole or not at all.
pub(super) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let draft = path.with_added_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&draft, path)?;
    sync_folder(path)
}

/// Whether a slab is vetoed. What cannot be read vetoes any.
pub(super) fn stands_against(path: &Path, slab_id: &SlabId) -> bool {
    match std::fs::read_to_string(path) {
        Ok(found) if found.len() == 33 && found.bytes().take(32).all(|b| b.is_ascii_hexdigit()) => {
            found == text(slab_id)
        }
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Takes the veto back. To be called when the slab it names is not on the device any more.
pub(super) fn lift(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Err(_) => Ok(()),
        Ok(()) => sync_folder(path),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_veto_names_one_slab_and_a_damaged_one_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ssd.veto");
        let (a, b) = (*b"0123456789abcdef", *b"fedcba9876543210");
        assert!(!stands_against(&path, &a));
        lift(&path).unwrap();
        write(&path, &a).unwrap();
        assert!(stands_against(&path, &a) && !stands_against(&path, &b));
        write(&path, &b).unwrap();
        assert!(!stands_against(&path, &a) && stands_against(&path, &b));
        for rotten in [&b""[..], b"abc\n", &[0xff; 33], &[b'x'; 33]] {
            std::fs::write(&path, rotten).unwrap();
            assert!(stands_against(&path, &a), "{rotten:?}");
        }
        lift(&path).unwrap();
        assert!(!stands_against(&path, &a));
    }
}
