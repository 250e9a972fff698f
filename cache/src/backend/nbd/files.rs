//! The version of a server's files, where it is known which these are.

use crate::backend::Stamp;
use crate::opener;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// One version for all of the files; `None` for none. Whoever serves them writes when it likes, so that a change is never
/// known to be ours.
pub(super) fn stamp(files: &[PathBuf]) -> io::Result<Option<Stamp>> {
    let mut mixed = 0;
    let mut stamp = Stamp::default();
    for file in files {
        let found = opener::metadata(file)?;
        let ns = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        let one = Stamp {
            size_bytes: found.len(),
            mtime_ns: ns(found.mtime(), found.mtime_nsec()),
            ctime_ns: ns(found.ctime(), found.ctime_nsec()),
            inode: found.ino(),
            device: found.dev(),
            local_clock: false,
        };
        mixed = one.mixed_into(mixed);
        stamp = Stamp {
            size_bytes: stamp.size_bytes.wrapping_add(one.size_bytes),
            mtime_ns: stamp.mtime_ns.max(one.mtime_ns),
            ctime_ns: stamp.ctime_ns.max(one.ctime_ns),
            inode: mixed,
            device: 0,
            local_clock: false,
        };
    }
    Ok((!files.is_empty()).then_some(stamp))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_any_of_them_shows() {
        let dir = tempfile::tempdir().unwrap();
        let files = ["top", "base"].map(|name| dir.path().join(name));
        files.iter().for_each(|file| std::fs::write(file, "1").unwrap());
        assert_eq!(stamp(&[]).unwrap(), None);
        let before = stamp(&files).unwrap();
        assert_eq!(stamp(&files).unwrap(), before);
        assert_ne!(stamp(&files[..1]).unwrap(), before);
        // With its old times: another file in its place.
        let time = std::fs::metadata(&files[1]).unwrap().modified().unwrap();
        std::fs::write(dir.path().join("new"), "2").unwrap();
        std::fs::rename(dir.path().join("new"), &files[1]).unwrap();
        std::fs::File::options().write(true).open(&files[1]).unwrap().set_modified(time).unwrap();
        assert_ne!(stamp(&files).unwrap(), before);
        std::fs::remove_file(&files[0]).unwrap();
        assert!(stamp(&files).is_err());
    }
}
