//! What a template was made of. As JSON, sealed: a checksum stands beside what it covers, so that a file that was cut, mixed up
//! or edited is not used.

use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{TemplateError, io, read_plain};

/// The format of the folder and its files.
pub const FORMAT: u32 = 1;

/// The largest sealed file that is read: a working set of single pages of 64 GiB is below it.
const LARGEST_BYTES: u64 = 512 << 20;

/// The machine that a template was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    pub name: String,
    pub uuid: String,
    /// Such as `pc-q35-10.0`.
    pub machine_type: String,
    /// Such as `10.0.2`.
    pub qemu_version: String,
}

/// What a template is, and by what its files are known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    pub created_unix_ms: u64,
    pub origin: Origin,
    pub memory_bytes: u64,
    /// Where the memory begins in `state`.
    pub memory_at: u64,
    /// The memory's name in `state`, which a clone's memory backend must have.
    pub memory_id: String,
    /// Size of `state`, holes included.
    pub state_bytes: u64,
    /// CRC-32C of `state` but for the memory in it; checked at every start.
    pub state_crc32c: u32,
    /// CRC-32C of the memory in `state`; checked on request, since it reads all of it.
    pub memory_crc32c: u32,
    /// CRC-32C of `domain.xml`.
    pub definition_crc32c: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed<T> {
    /// CRC-32C of `content` as compact JSON.
    crc32c: u32,
    content: T,
}

/// Only the format: it says whether the rest can be read.
#[derive(Deserialize)]
struct Formatted {
    content: Format,
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Writes a file anew: whole or not at all.
pub(super) fn write_sealed<T: Serialize>(path: &Path, content: T) -> Result<(), TemplateError> {
    let failed = |e: serde_json::Error| io("write", path)(e.into());
    let crc32c = crc32c::crc32c(&serde_json::to_vec(&content).map_err(failed)?);
    let mut text = serde_json::to_vec(&Sealed { crc32c, content }).map_err(failed)?;
    text.push(b'\n');
    let aside = path.with_extension("new");
    // left by a crash, or somebody's link
    let _ = fs::remove_file(&aside);
    let written = fs::File::create_new(&aside)
        .and_then(|mut file| {
            std::io::Write::write_all(&mut file, &text)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&aside, path));
    written.map_err(io("write", path))
}

/// Reads a sealed file of a template in `folder`.
pub(super) fn read_sealed<T: Serialize + DeserializeOwned>(path: &Path, folder: &Path) -> Result<T, TemplateError> {
    let foreign = |reason: String| TemplateError::Foreign { path: folder.to_owned(), reason };
    let text = read_plain(path, LARGEST_BYTES).map_err(io("read", path))?;
    if let Ok(Formatted { content: Format { format } }) = serde_json::from_slice(&text)
        && format != FORMAT
    {
        return Err(TemplateError::Version { path: folder.to_owned(), found: format });
    }
    let sealed: Sealed<T> = serde_json::from_slice(&text).map_err(|e| foreign(format!("{}: {e}", path.display())))?;
    let again = serde_json::to_vec(&sealed.content).map_err(|e| foreign(e.to_string()))?;
    if crc32c::crc32c(&again) != sealed.crc32c {
        let reason = format!("the checksum of {} does not fit", path.display());
        return Err(TemplateError::Damaged { path: folder.to_owned(), reason });
    }
    Ok(sealed.content)
}
