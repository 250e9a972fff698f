//! Whether a store's path still leads to the file that is served.
//!
//! - [`OpenFile`]: a store's file and the path that it was opened by; [`OpenFile::look`], [`OpenFile::room_bytes`]
//! - [`Astray`]: the path leads elsewhere
//! - [`FileId`]: which file it is, for stores that somebody else has open
//!
//! A file that is deleted, or that another one is renamed over, lives on without a name for as long as it is open: its guest goes on
//! writing, and all of it is gone with the last descriptor (unlink(2)). The kernel tells nobody, so it is looked for: by the file's
//! number and that of its file system (`st_dev`, `st_ino`) on both ends, of devices by the device that they stand for (`st_rdev`). Where
//! the path cannot be followed nothing is known by it, and the file's own word counts (`st_nlink`).
//!
//! Everything here waits for as long as the file systems do.

use crate::opener;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where NFS clients and libfuse keep what was deleted while it is open, until it is closed.
const KEPT_UNTIL_CLOSED: [&str; 2] = [".nfs", ".fuse_hidden"];

/// The file of a store that is served.
#[derive(Debug)]
pub struct OpenFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) descriptor: RawFd,
}

/// A store's path no longer leads to the file that is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Astray {
    /// By which it was opened.
    pub path: PathBuf,
    /// Something else is there now.
    pub replaced: bool,
    /// What the file is called now; `None`: nothing is known that leads to it.
    pub now: Option<PathBuf>,
    pub is_device: bool,
    /// Of this process: `/proc/PID/fd/N` still leads to the file. `None` where another process has it open.
    pub descriptor: Option<RawFd>,
}

/// Which file, or which device, a path leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileId {
    File { device: u64, inode: u64 },
    Device { number: u64 },
}

impl FileId {
    /// What the path leads to; `None`: nothing.
    ///
    /// # Errors
    /// It cannot be found out.
    pub fn at(path: &Path) -> io::Result<Option<FileId>> {
        match opener::metadata(path) {
            Ok(meta) => Ok(Some(FileId::of(&meta))),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn of(meta: &Metadata) -> FileId {
        match meta.file_type().is_block_device() {
            true => FileId::Device { number: meta.rdev() },
            false => FileId::File { device: meta.dev(), inode: meta.ino() },
        }
    }
}

/// What has become of a file that is open elsewhere, of which it is known which one it was.
///
/// # Errors
/// It cannot be found out.
pub fn look_for(path: &Path, was: FileId) -> io::Result<Option<Astray>> {
    let found = FileId::at(path)?;
    let is_device = matches!(was, FileId::Device { .. });
    Ok(is_astray(was, found).then(|| Astray {
        path: path.to_owned(),
        replaced: found.is_some(),
        now: None,
        is_device,
        descriptor: None,
    }))
}

/// A device whose node has gone was unplugged: that is told by its errors.
fn is_astray(was: FileId, found: Option<FileId>) -> bool {
    found != Some(was) && (found.is_some() || matches!(was, FileId::File { .. }))
}

impl OpenFile {
    /// `served` is open under the number that an operator sees in `/proc`.
    pub(super) fn new(path: &Path, served: &OwnedFd) -> io::Result<OpenFile> {
        let descriptor = served.as_raw_fd();
        Ok(OpenFile { path: path.to_owned(), file: served.try_clone()?.into(), descriptor })
    }

    /// Whether the path still leads to it; `None`: yes, as far as can be told.
    ///
    /// # Errors
    /// The file itself does not answer; nothing is known then.
    pub fn look(&self) -> io::Result<Option<Astray>> {
        let meta = self.file.metadata()?;
        let ours = FileId::of(&meta);
        let is_device = matches!(ours, FileId::Device { .. });
        let replaced = match FileId::at(&self.path) {
            Ok(found) if is_astray(ours, found) => found.is_some(),
            Ok(_) => return Ok(None),
            // Not to be seen from here: `EACCES`, a folder that is no longer allowed, a server that is away.
            Err(_) if meta.nlink() == 0 && !is_device => false,
            Err(_) => return Ok(None),
        };
        let now = self.name().filter(|name| FileId::at(name).is_ok_and(|found| found == Some(ours)));
        let astray = Astray { path: self.path.clone(), replaced, now, is_device, descriptor: Some(self.descriptor) };
        Ok(Some(astray))
    }

    /// How many bytes of it its file system could hold as it is: what it takes there now, and what is free. `None`: it is a device.
    ///
    /// # Errors
    /// It cannot be found out.
    pub fn room_bytes(&self) -> io::Result<Option<u64>> {
        let meta = self.file.metadata()?;
        if !meta.is_file() {
            return Ok(None);
        }
        let space = nix::sys::statvfs::fstatvfs(&self.file)?;
        let free = space.blocks_available().saturating_mul(space.fragment_size());
        // st_blocks is in units of 512 bytes, whatever those of the file system are (inode(7)).
        Ok(Some(meta.blocks().saturating_mul(512).saturating_add(free)))
    }

    /// What the kernel calls it, if that outlives its closing.
    fn name(&self) -> Option<PathBuf> {
        let name = std::fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd())).ok()?;
        let last = name.file_name()?.to_string_lossy().into_owned();
        (!KEPT_UNTIL_CLOSED.iter().any(|prefix| last.starts_with(prefix))).then_some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Place {
            Place(tempfile::tempdir().unwrap())
        }
        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }
        fn open(&self, name: &str) -> OpenFile {
            if !self.path(name).exists() {
                fs::write(self.path(name), name).unwrap();
            }
            OpenFile::new(&self.path(name), &File::open(self.path(name)).unwrap().into()).unwrap()
        }
    }

    /// Whether something else is there, and what the file is called.
    fn found(file: &OpenFile) -> Option<(bool, Option<PathBuf>)> {
        file.look().unwrap().map(|astray| (astray.replaced, astray.now))
    }

    #[test]
    fn a_file_is_missed_whatever_took_its_name() {
        let place = Place::new();
        let deleted = place.open("deleted");
        assert_eq!(found(&deleted), None);
        fs::remove_file(place.path("deleted")).unwrap();
        assert_eq!(found(&deleted), Some((false, None)));
        fs::write(place.path("deleted"), "another").unwrap();
        assert_eq!(found(&deleted), Some((true, None)));

        let replaced = place.open("replaced");
        fs::write(place.path("new"), "new").unwrap();
        fs::rename(place.path("new"), place.path("replaced")).unwrap();
        assert_eq!(found(&replaced), Some((true, None)));

        let moved = place.open("moved");
        fs::rename(place.path("moved"), place.path("away")).unwrap();
        assert_eq!(found(&moved), Some((false, Some(place.path("away")))));
        fs::write(place.path("moved"), "restored").unwrap();
        assert_eq!(found(&moved), Some((true, Some(place.path("away")))));
        fs::rename(place.path("away"), place.path("moved")).unwrap();
        assert_eq!(found(&moved), None, "it is right again");

        // What is left of it has a name that a network file system's client gives until it is closed.
        let silly = place.open("silly");
        fs::rename(place.path("silly"), place.path(".nfs0001")).unwrap();
        assert_eq!(found(&silly), Some((false, None)));
    }

    #[test]
    fn what_is_not_astray_is_no_alarm() {
        let place = Place::new();
        // By a link, with a second name, and written to in place.
        place.open("file");
        std::os::unix::fs::symlink("file", place.path("link")).unwrap();
        fs::hard_link(place.path("file"), place.path("second")).unwrap();
        let file = place.open("link");
        fs::write(place.path("file"), "changed and longer").unwrap();
        assert_eq!(found(&file), None);
        fs::remove_file(place.path("second")).unwrap();
        assert_eq!(found(&file), None);
        // The link leads elsewhere: that is what a restart would serve.
        fs::remove_file(place.path("link")).unwrap();
        std::os::unix::fs::symlink("other", place.path("link")).unwrap();
        assert_eq!(found(&file), Some((false, Some(place.path("file")))));
        // A name that cannot be followed says nothing; the file does.
        let mut unseen = place.open("unseen");
        unseen.path = place.path("loop");
        std::os::unix::fs::symlink("loop", place.path("loop")).unwrap();
        assert_eq!(found(&unseen), None);
        fs::remove_file(place.path("unseen")).unwrap();
        assert_eq!(found(&unseen), Some((false, None)));
    }

    #[test]
    fn a_device_that_is_unplugged_is_none_of_this_and_another_one_by_its_name_is() {
        let [one, other] = [1, 2].map(|number| FileId::Device { number });
        let file = FileId::File { device: 1, inode: 1 };
        assert!(!is_astray(one, None) && !is_astray(one, Some(one)));
        assert!(is_astray(one, Some(other)) && is_astray(one, Some(file)));
        assert!(is_astray(file, None) && is_astray(file, Some(one)) && !is_astray(file, Some(file)));
    }

    #[test]
    fn a_file_that_another_process_has_open_is_missed_too() {
        let place = Place::new();
        place.open("image");
        let was = FileId::at(&place.path("image")).unwrap().unwrap();
        assert_eq!(look_for(&place.path("image"), was).unwrap(), None);
        fs::rename(place.path("image"), place.path("away")).unwrap();
        assert!(!look_for(&place.path("image"), was).unwrap().unwrap().replaced);
        fs::write(place.path("image"), "").unwrap();
        assert!(look_for(&place.path("image"), was).unwrap().unwrap().replaced);
        assert_eq!(FileId::at(&place.path("none")).unwrap(), None);
    }
}
