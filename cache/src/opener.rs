//! Who opens stores.
//!
//! - [`Opener`], [`set`]: somebody with more rights than this process, for all stores of the process
//! - [`How`]: what a store is opened for
//! - [`NotAllowed`]: the reason that such an opener gives
//!
//! Without one this process opens them itself.

use std::fs::{File, Metadata, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{fmt, io};

/// What a store is opened for. It is never made and never cut; the SSD tier's file is made, and its folder
/// synced, if it is opened to be written to and missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct How {
    pub write: bool,
    /// `O_DIRECT`.
    pub direct: bool,
    /// `O_EXCL`, of devices: one that the host itself uses is refused.
    pub exclusive: bool,
}

/// Opens stores for this process.
pub trait Opener: fmt::Debug + Send + Sync {
    /// A regular file or block device, and its path without links. Blocks.
    ///
    /// # Errors
    /// What the kernel says (`ENOTBLK`: it is neither), or [`NotAllowed`] in an [`io::Error`].
    fn open(&self, path: &Path, how: How) -> io::Result<(PathBuf, File)>;

    /// A connection to a server's unix socket. Blocks.
    ///
    /// # Errors
    /// As [`Opener::open`].
    fn connect(&self, path: &Path) -> io::Result<OwnedFd>;
}

/// Why an opener does not open a store, and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotAllowed(pub String);

static OPENER: OnceLock<Box<dyn Opener>> = OnceLock::new();

/// Has all stores of this process opened by somebody else. The first call counts; false for all others.
pub fn set(opener: Box<dyn Opener>) -> bool {
    OPENER.set(opener).is_ok()
}

pub(crate) fn opener() -> Option<&'static dyn Opener> {
    OPENER.get().map(Box::as_ref)
}

/// Opens a regular file or block device; see [`Opener::open`].
pub(crate) fn open(path: &Path, how: How) -> io::Result<(PathBuf, File)> {
    if let Some(opener) = opener() {
        return opener.open(path, how);
    }
    let path = path.canonicalize()?;
    // Looked at before opening: opening a pipe would hang, and opening some devices has effects.
    let kind = path.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::from_raw_os_error(libc::ENOTBLK));
    }
    let flag = |set, flag| if set { flag } else { 0 };
    let flags = libc::O_NONBLOCK
        | flag(how.direct, libc::O_DIRECT)
        | flag(how.exclusive && kind.is_block_device(), libc::O_EXCL);
    let file = OpenOptions::new().read(true).write(how.write).custom_flags(flags).open(&path)?;
    Ok((path, file))
}

/// A path without links.
pub(crate) fn canonicalize(path: &Path) -> io::Result<PathBuf> {
    match (path.canonicalize(), opener()) {
        (Err(error), Some(opener)) if error.kind() == io::ErrorKind::PermissionDenied => {
            opener.open(path, How::default()).map(|(path, _)| path)
        }
        (found, _) => found,
    }
}

/// What a file is.
pub(crate) fn metadata(path: &Path) -> io::Result<Metadata> {
    match (path.metadata(), opener()) {
        (Err(error), Some(opener)) if error.kind() == io::ErrorKind::PermissionDenied => {
            opener.open(path, How::default())?.1.metadata()
        }
        (found, _) => found,
    }
}

/// The opener's reason, if that is what the error is.
pub(crate) fn not_allowed(error: &io::Error) -> Option<&NotAllowed> {
    error.get_ref()?.downcast_ref()
}
