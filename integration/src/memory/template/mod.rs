//! Templates: a machine's memory and devices on disk, from which clones start that share one copy of that memory in the
//! host's page cache.
//!
//! | module | holds |
//! | --- | --- |
//! | [`Template`], [`Draft`] (`folder`) | a template's folder: written aside and renamed, checked before use |
//! | [`list`], [`remove`] (`shelf`) | templates that there are, and taking one away |
//! | [`drafts`] | drafts on record, so that a crash leaves none |
//! | [`Manifest`] (`manifest`) | what it was made of, sealed with checksums |
//! | [`stream`] | QEMU's migration stream: where the machine's memory lies in it |
//! | [`WorkingSet`] (`working_set`) | which pages a clone needs first, in which order |
//! | [`preload`] | reads ahead of the clone, and the rest behind it |
//! | [`record`] | which pages a running clone touches, in which order |
//!
//! ```text
//! <template>/manifest.json     versions, sizes, checksums
//!            domain.xml        the definition that clones are made of
//!            state             devices and memory: QEMU's stream with capability `mapped-ram`
//!            working-set.json  pages to have first
//! ```
//!
//! `mapped-ram` (QEMU ≥ 9.0, docs/devel/migration/mapped-ram.rst) gives every page a fixed place in the file, so the memory in it can
//! be mapped: a clone's `memory-backend-file` is the same file at that offset, private to each clone (QEMU docs/system/vm-templating.rst).
//! The bitmap that says which pages to load is emptied, so that a start reads the devices' state and no memory. `x-ignore-shared`
//! leaves the memory out of the stream too, but only where it is a named file: not with memfd, which shared memory is as a rule
//! (measured, see ARCHITECTURE.md).

pub mod drafts;
mod folder;
mod manifest;
pub mod preload;
pub mod record;
mod shelf;
pub mod stream;
mod working_set;

pub use folder::{Draft, MANIFEST, Template};
pub use manifest::{FORMAT, Manifest, Origin};
pub use shelf::{Found, list, remove};
pub use working_set::{Extent, Learned, MERGE_PAGES, WorkingSet};

use std::path::{Path, PathBuf};

/// Bytes of a page of guest memory.
pub const PAGE_BYTES: u64 = 4096;

/// What is wrong with a template, or why there is none.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("there is no template in {}", path.display())]
    Missing { path: PathBuf },
    #[error("{} exists already; give another name, or remove it", path.display())]
    Exists { path: PathBuf },
    #[error("{} is being saved already; wait for its end, or give another name", path.display())]
    Busy { path: PathBuf },
    #[error("{} is not a template of this project: {reason}", path.display())]
    Foreign { path: PathBuf, reason: String },
    #[error("template {} has format {found}, this version reads {FORMAT}: save it anew", path.display())]
    Version { path: PathBuf, found: u32 },
    #[error("template {} is damaged: {reason}. Remove it and save it anew", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("cannot {what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
}

/// Opens a file of a template to read it: a plain one, no link, and nothing that an open waits for.
fn open_plain(path: &Path) -> std::io::Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = std::fs::File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(std::io::Error::other("it is no plain file")) }
}

/// Reads one of at most `most` bytes.
fn read_plain(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    open_plain(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(std::io::Error::other(format!("it has more than {most} bytes")));
    }
    Ok(bytes)
}

/// For `map_err`: what was done to which path.
fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::Io { what, path, source }
}
