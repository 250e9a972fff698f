//! Which of the names in images are followed.
//!
//! An image names the one below it, and whoever made the image chose the name. A tenant who may bring an image could name
//! any file of the host and read it through the disk. So a name is followed only into a folder that the operator has set
//! aside for images, links resolved, and only where the image says the format: guessing it would let a guest turn its raw
//! disk into an image (QEMU, `docs/system/images`, CVE-2008-2004).

use super::header::{HEAD_BYTES, Header, Need};
use crate::backend::spec::CHAIN_MAX;
use crate::backend::{StoreError, StoreSpec};
use crate::opener::{self, How};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Completes a chain by what its lowest image says is below it, if that lies in `folder`. Stores that stand on nothing, or
/// whose chain is named in full, come back as they are; so do images that cannot be read: opening them will tell why.
/// Blocks.
///
/// # Errors
/// `Unsupported` for a name that is not to be followed, a format that is not known, or a chain without end.
pub fn follow(spec: &StoreSpec, folder: Option<&Path>) -> Result<StoreSpec, StoreError> {
    let mut chain: Vec<StoreSpec> = spec.chain().cloned().collect();
    while let Some(StoreSpec::Qcow2 { path, .. }) = chain.last() {
        let Some(below) = below(path, folder)? else { break };
        if chain.len() > CHAIN_MAX {
            let store = spec.to_string();
            let what = format!("more than {CHAIN_MAX} images stand on each other, or one on itself");
            return Err(StoreError::Unsupported { store, what });
        }
        chain.push(below);
    }
    let on = |backing: Option<StoreSpec>, spec: StoreSpec| match spec {
        StoreSpec::Qcow2 { path, .. } => Some(StoreSpec::Qcow2 { path, backing: backing.map(Box::new) }),
        other => Some(other),
    };
    Ok(chain.into_iter().rev().fold(None, on).unwrap_or_else(|| spec.clone()))
}

/// What an image stands on.
fn below(path: &Path, folder: Option<&Path>) -> Result<Option<StoreSpec>, StoreError> {
    let store = format!("qcow2:{}", path.display());
    let refuse = |what: String| StoreError::Unsupported { store: store.clone(), what };
    let Ok(header) = read(path) else { return Ok(None) };
    let Some(says) = header.backing else { return Ok(None) };
    let hint = format!("write {store}?backing=… to name it");
    let Some(folder) = folder else {
        return Err(refuse(format!(
            "it stands on `{says}`, which is not opened unasked; {hint}, or set `store.image_folder`"
        )));
    };
    let plain = says.strip_prefix("file:").unwrap_or(&says);
    if plain.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(refuse(format!("it stands on `{says}`, and only files are followed; {hint}")));
    }
    let here = opener::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let named: PathBuf = here.parent().unwrap_or(Path::new("/")).join(plain);
    // One answer for what lies elsewhere and what is not there: else an image could ask which files the host has.
    let found = opener::canonicalize(&named).ok().zip(folder.canonicalize().ok());
    let Some((found, _)) = found.filter(|(found, folder)| found.starts_with(folder)) else {
        let folder = folder.display();
        return Err(refuse(format!(
            "it stands on `{says}`, which is no image in {folder} (`store.image_folder`); {hint}"
        )));
    };
    match header.backing_format.as_deref() {
        Some("qcow2") => Ok(Some(StoreSpec::Qcow2 { path: found, backing: None })),
        Some("raw") => Ok(Some(StoreSpec::File(found))),
        Some(other) => {
            Err(refuse(format!("it stands on `{says}` of the format `{other}`, which is not known; {hint}")))
        }
        None => Err(refuse(format!(
            "it does not say which format `{says}` has; tell it with `qemu-img rebase -u -F`, or {hint}"
        ))),
    }
}

/// Why an image needs QEMU; empty if it does not, or cannot be read. Blocks.
pub fn needs(path: &Path) -> Vec<Need> {
    read(path).map(|header| header.needs).unwrap_or_default()
}

fn read(path: &Path) -> io::Result<Header> {
    let (_, file) = opener::open(path, How::default())?;
    let mut head = Vec::new();
    file.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
    // The tables are looked at when the image is opened.
    Header::parse(&head, i64::MAX as u64, false).map_err(io::Error::other)
}
