//! What can go wrong with the SSD tier, and what the operator can do about it.

use std::io;
use std::path::PathBuf;

/// An error of the SSD tier. The tier only ever holds copies: none of these loses data.
#[derive(thiserror::Error, Debug)]
pub enum SsdError {
    #[error("SSD tier: cannot {what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },

    #[error(
        "SSD tier: {} needs {needed_bytes} bytes and only {free_bytes} are free; configure a smaller size, or free space \
         there",
        path.display()
    )]
    NoSpace { path: PathBuf, needed_bytes: u64, free_bytes: u64 },

    #[error(
        "SSD tier: {} holds something else ({found}) and is left alone; configure another path, or, if nothing on it is \
         needed, {remedy}",
        path.display()
    )]
    Foreign { path: PathBuf, found: String, remedy: String },

    #[error(
        "SSD tier: {} has format version {found}, this program writes version {supported}; run the version that wrote it, \
         or, as it is only a cache, delete it and it is built anew ({remedy})",
        path.display()
    )]
    OtherVersion { path: PathBuf, found: u32, supported: u32, remedy: String },

    #[error(
        "SSD tier: {} is in use by another process ({by}); stop it, or give each daemon a path of its own",
        path.display()
    )]
    InUse { path: PathBuf, by: &'static str },

    #[error("SSD tier: {} is neither a regular file nor a block device; configure one of these", path.display())]
    WrongFileType { path: PathBuf },

    #[error(
        "SSD tier: {size_bytes} bytes for {} are out of range; configure from {min_bytes} to {max_bytes} bytes",
        path.display()
    )]
    SizeOutOfRange { path: PathBuf, size_bytes: u64, min_bytes: u64, max_bytes: u64 },

    #[error("SSD tier: storage identity of {len} bytes ({start:?}…); it takes 1 to {max} bytes")]
    IdentityLength { len: usize, max: usize, start: String },

    #[error(
        "SSD tier: {max} storages are in use at a time already; {identity:?} goes without the SSD tier until one is released"
    )]
    TooManyStorages { max: usize, identity: String },

    #[error(
        "SSD tier: {slots} slots beyond the new end of {} are still being read or written after ten seconds; its device \
         does not answer: see `prestagectl status`, and try again",
        path.display()
    )]
    StillInUse { path: PathBuf, slots: u32 },

    #[error("SSD tier: {} does not answer; see `prestagectl status`, and try again when it does", path.display())]
    NotAnswering { path: PathBuf },

    #[error("SSD tier: {} fails and is bypassed; its size can be changed when it is in use again", path.display())]
    Bypassed { path: PathBuf },

    #[error("SSD tier: the index of {} is still being read, {left} records to go; try again when `prestagectl status` says that it is there", path.display())]
    StillReading { path: PathBuf, left: u64 },

    #[error("SSD tier: it is closed; nothing can be registered with it any more")]
    Closed,
}
