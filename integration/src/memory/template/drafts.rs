//! Drafts on record: what a crash leaves of them is found, wherever they are.
//!
//! A draft's folder is called `.NAME.draft`. One that lies in the register (the folder that templates usually are in) is on record by that;
//! for one elsewhere a symbolic link `.PID-N.draft` to it is made there before it, and removed after it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use super::{TemplateError, io as failed};

const SUFFIX: &str = ".draft";
/// Links that are left over and can't be removed, at most.
const MOST_LINKS: u32 = 1000;

/// The folder in which a template for `target` is written.
///
/// # Errors
/// `Io`: `target` is no path to a folder.
pub(super) fn aside(target: &Path) -> Result<PathBuf, TemplateError> {
    let missing = || io::Error::other("it is no path to a folder");
    let name = target.file_name().ok_or_else(missing).map_err(failed("make", target))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(SUFFIX);
    Ok(target.with_file_name(hidden))
}

fn is_draft(name: &OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b".") && name.ends_with(SUFFIX.as_bytes()) && name.len() > SUFFIX.len() + 1
}

/// Makes a folder that others than root can't list, with those above it.
pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o711).create(path)
}

/// Puts a draft's folder on record. Returns what is to be removed after it, if anything.
pub(super) fn note(register: &Path, aside: &Path) -> io::Result<Option<PathBuf>> {
    make_folder(register)?;
    let parent = aside.parent().unwrap_or(Path::new("/"));
    // the parent may be there later only
    if fs::canonicalize(register)? == fs::canonicalize(parent).unwrap_or_else(|_| parent.to_owned()) {
        return Ok(None);
    }
    let target = std::path::absolute(aside)?;
    for n in 0..MOST_LINKS {
        let link = register.join(format!(".{}-{n}{SUFFIX}", std::process::id()));
        match symlink(&target, &link) {
            Ok(()) => return Ok(Some(link)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Removes what drafts on record a crash has left, and returns their folders. To be called while none is being written. What can't be
/// removed is said, and stays on record.
pub fn clear(register: &Path) -> Vec<PathBuf> {
    let mut cleared = Vec::new();
    let entries = fs::read_dir(register).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| is_draft(&entry.file_name())) {
        let path = entry.path();
        let link = fs::read_link(&path).ok();
        let folder = link.as_ref().unwrap_or(&path);
        // a link that somebody else has put here leads nowhere
        if !folder.file_name().is_some_and(is_draft) {
            continue;
        }
        let removed = match fs::remove_dir_all(folder) {
            Ok(()) => {
                cleared.push(folder.clone());
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed.and_then(|()| if link.is_some() { fs::remove_file(&path) } else { Ok(()) }) {
            tracing::warn!(folder = %folder.display(), %error, "an unfinished template can't be removed; remove it by hand");
        }
    }
    cleared
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_record_is_cleared_wherever_it_is_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (register, other) = (folder.path().join("templates"), folder.path().join("other"));
        let drafts = [register.join("near"), other.join("far"), other.join("farther")].map(|t| aside(&t).unwrap());
        let notes: Vec<_> = drafts.iter().map(|draft| note(&register, draft).unwrap()).collect();
        assert!(notes[0].is_none() && notes[1].is_some() && notes[1] != notes[2]);
        // the third was put on record, and then came the crash
        for draft in &drafts[..2] {
            fs::create_dir_all(draft.join("inner")).unwrap();
        }
        let kept = other.join("kept");
        fs::create_dir_all(&kept).unwrap();
        fs::create_dir_all(register.join("whole")).unwrap();
        symlink(&kept, register.join(".evil.draft")).unwrap();
        let mut cleared = clear(&register);
        cleared.sort();
        let mut expected = drafts[..2].to_vec();
        expected.sort();
        assert_eq!(cleared, expected);
        assert!(kept.exists() && register.join("whole").exists());
        let mut left: Vec<_> = fs::read_dir(&register).unwrap().flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, [".evil.draft", "whole"]);
        assert!(clear(&register).is_empty() && clear(&folder.path().join("none")).is_empty());
        assert!(aside(Path::new("/")).is_err());
    }
}
