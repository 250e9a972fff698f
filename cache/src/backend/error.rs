//! What can go wrong with a store.

use std::io;

/// Why a store cannot be opened or a request failed. Cloneable: many readers may wait for the same fetch.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{store} does not exist; check the path, or the export's name")]
    NotFound { store: String },
    #[error("{store} cannot be opened: permission denied; prestage's user needs access to it")]
    Denied { store: String },
    #[error("{store} is not opened: {why}")]
    NotAllowed { store: String, why: String },
    #[error("{store} is in use by another process{}; stop that process, or open the store read-only on both sides", if *.writer { " that writes to it" } else { "" })]
    Locked { store: String, writer: bool },
    #[error(
        "{store} is a {format} image, not a raw disk; {}",
        if *.format == "qcow2" { "name it as qcow2:/path" } else { "serve it with qemu-nbd or qemu-storage-daemon and give its nbd URI" }
    )]
    NotRaw { store: String, format: &'static str },
    #[error("{store} has a size of {size_bytes} bytes; a disk needs a positive multiple of 512")]
    BadSize { store: String, size_bytes: u64 },
    #[error("{store} is neither a regular file nor a block device")]
    NotADisk { store: String },
    #[error(
        "{store} has shrunk from {was_bytes} to {now_bytes} bytes; take its disks offline and check who resized it"
    )]
    Shrunk { store: String, was_bytes: u64, now_bytes: u64 },
    #[error(
        "{store} has {now_bytes} bytes and is not cut to {asked_bytes}: what lies beyond would be lost, and its guest would not be asked"
    )]
    Smaller { store: String, now_bytes: u64, asked_bytes: u64 },
    #[error(
        "{store} is not made larger to {asked_bytes} bytes: its file system takes files of {most_bytes} bytes at most"
    )]
    TooLarge { store: String, asked_bytes: u64, most_bytes: u64 },
    #[error("{store} is not made larger from here: {why}")]
    NotGrown { store: String, why: &'static str },
    #[error("{store} is read-only")]
    ReadOnly { store: String },
    #[error("{len} bytes at {offset} do not lie within the store of {size_bytes} bytes")]
    OutOfRange { offset: u64, len: u64, size_bytes: u64 },
    #[error("{store} has no space left")]
    NoSpace { store: String },
    #[error("{what} on {store} failed: {}", io::Error::from_raw_os_error(*.errno))]
    Io { store: String, what: &'static str, errno: i32 },
    #[error("{store} is disconnected: {reason}")]
    Disconnected { store: String, reason: String },
    #[error("{store} did not answer in time")]
    Timeout { store: String },
    #[error("{store} broke the NBD protocol: {what}")]
    Protocol { store: String, what: String },
    #[error("{store} cannot be used: {what}")]
    Unsupported { store: String, what: String },
    /// An image whose format QEMU knows and the own engine does not.
    #[error("{store} can be served only through QEMU: {why}")]
    NeedsQemu { store: String, why: String },
    #[error("{store} is closed")]
    Closed { store: String },
}

impl StoreError {
    /// The error of a system call, or of the server, while doing `what`.
    pub(super) fn from_errno(store: &str, what: &'static str, errno: i32) -> StoreError {
        let store = store.to_owned();
        match errno {
            libc::ENOENT | libc::ENOTDIR | libc::ENXIO | libc::ENODEV if what == "open" => {
                StoreError::NotFound { store }
            }
            libc::EACCES | libc::EPERM if what == "open" => StoreError::Denied { store },
            libc::ENOSPC | libc::EDQUOT => StoreError::NoSpace { store },
            libc::EROFS => StoreError::ReadOnly { store },
            _ => StoreError::Io { store, what, errno },
        }
    }

    pub(super) fn from_io(store: &str, what: &'static str, error: &io::Error) -> StoreError {
        if let Some(why) = crate::opener::not_allowed(error) {
            return StoreError::NotAllowed { store: store.to_owned(), why: why.to_string() };
        }
        let errno = error.raw_os_error().unwrap_or(match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => libc::ECONNRESET,
            io::ErrorKind::NotFound => libc::ENOENT,
            io::ErrorKind::PermissionDenied => libc::EACCES,
            _ => libc::EIO,
        });
        StoreError::from_errno(store, what, errno)
    }

    /// Whether a new attempt some time later may succeed without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            StoreError::Disconnected { .. }
                | StoreError::Timeout { .. }
                | StoreError::Protocol { .. }
                | StoreError::Io { .. }
                | StoreError::NoSpace { .. }
        )
    }

    /// The errno to answer a guest's request with.
    pub fn errno(&self) -> i32 {
        match self {
            StoreError::Io { errno, .. } => *errno,
            StoreError::NoSpace { .. } => libc::ENOSPC,
            StoreError::ReadOnly { .. } => libc::EROFS,
            StoreError::OutOfRange { .. } => libc::EINVAL,
            StoreError::Timeout { .. } => libc::ETIMEDOUT,
            _ => libc::EIO,
        }
    }
}
