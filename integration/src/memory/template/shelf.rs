//! Templates that there are, and taking one away.
//!
//! - [`list`]: all in a folder, also those that can't be used
//! - [`remove`]: a template's files and its folder, and nothing else

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::folder::{DEFINITION, MANIFEST, STATE, Template, WORKING_SET};
use super::{TemplateError, io};

/// A template's files, in the order in which they go: while the manifest is there it is a template, which can be removed again after a
/// crash.
const FILES: [&str; 4] = [STATE, DEFINITION, WORKING_SET, MANIFEST];
/// What a crash leaves of a file that was written aside.
const ASIDE: &str = "new";

/// A folder with a template, and what is wrong with one that can't be used.
pub type Found = (PathBuf, Result<Template, TemplateError>);

/// The templates in a folder, by name; what is wrong with those that can't be used. Drafts and folders of others are none.
///
/// # Errors
/// The folder can't be read; one that is not there has no templates.
pub fn list(folder: &Path) -> Result<Vec<Found>, TemplateError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(io("read", folder))?,
    };
    let is_draft = |name: &OsStr| name.as_encoded_bytes().starts_with(b".");
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| !is_draft(&entry.file_name()))
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && fs::symlink_metadata(path.join(MANIFEST)).is_ok())
        .collect();
    paths.sort();
    Ok(paths.into_iter().map(|path| (path.clone(), Template::open(&path))).collect())
}

/// Removes a template, whatever its state. Clones that run keep what they have mapped: a file lives for as long as it is open.
///
/// # Errors
/// `Missing`; `Foreign`: the folder has other files too, or is no template's; `Io`, and then it can be removed again.
pub fn remove(path: &Path) -> Result<(), TemplateError> {
    // Without a slash at its end, by which a link would be followed.
    let path: &Path = &path.components().collect::<PathBuf>();
    let foreign = |reason: String| TemplateError::Foreign { path: path.to_owned(), reason };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(TemplateError::Missing { path: path.to_owned() });
        }
        Ok(meta) if !meta.is_dir() => return Err(foreign("it is no folder".to_owned())),
        found => found.map(drop).map_err(io("look at", path))?,
    }
    if fs::symlink_metadata(path.join(MANIFEST)).is_err() {
        return Err(foreign(format!("it has no {MANIFEST}")));
    }
    let mut aside = Vec::new();
    for entry in fs::read_dir(path).map_err(io("read", path))? {
        let entry = entry.map_err(io("read", path))?;
        let (name, is_folder) = (entry.file_name(), entry.file_type().map_err(io("look at", &entry.path()))?.is_dir());
        let of_ours = |name: &OsStr| FILES.iter().any(|file| name == *file);
        let was_aside = FILES.iter().any(|file| Path::new(file).with_extension(ASIDE).as_os_str() == name);
        if !is_folder && was_aside {
            aside.push(path.join(name));
        } else if is_folder || !of_ours(&name) {
            let name = name.to_string_lossy();
            return Err(foreign(format!("`{}` in it is no template's; move it away first", name.escape_debug())));
        }
    }
    for file in FILES.iter().map(|file| path.join(file)).chain(aside) {
        match fs::remove_file(&file) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => other.map_err(io("remove", &file))?,
        }
    }
    fs::remove_dir(path).map_err(io("remove", path))?;
    // Gone for good: a template that comes back after a loss of power would lack its memory.
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(io("sync", parent))
}

#[cfg(test)]
mod tests {
    use super::super::folder::tests::made;
    use super::*;

    #[test]
    fn what_is_saved_is_listed_and_what_is_removed_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(list(&at("nowhere")).unwrap().is_empty());
        drop(made(&at("web")));
        drop(made(&at("db")));
        fs::write(at("db").join(DEFINITION), "<domain></domain>").unwrap();
        fs::create_dir(at("others")).unwrap();
        fs::create_dir(at(".web.draft")).unwrap();
        fs::write(at(".web.draft").join(MANIFEST), "").unwrap();
        let all = list(folder.path()).unwrap();
        let names: Vec<_> = all.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["db", "web"]);
        assert!(matches!(all[0].1, Err(TemplateError::Damaged { .. })) && all[1].1.is_ok());
        // Also one that is damaged, and with what a crash left.
        fs::write(at("db").join("working-set.new"), "").unwrap();
        for name in ["web", "db"] {
            remove(&at(name)).unwrap();
            assert!(!at(name).exists());
            assert!(matches!(remove(&at(name)), Err(TemplateError::Missing { .. })));
        }
        assert!(list(folder.path()).unwrap().is_empty());
    }

    #[test]
    fn what_is_not_a_templates_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        drop(made(&at("web")));
        fs::write(at("web").join("notes.txt"), "mine").unwrap();
        let said = remove(&at("web")).unwrap_err().to_string();
        assert!(said.contains("`notes.txt` in it is no template's; move it away first"), "{said}");
        Template::open(&at("web")).unwrap();
        fs::create_dir(at("others")).unwrap();
        fs::write(at("others").join("state"), "mine").unwrap();
        assert!(matches!(remove(&at("others")), Err(TemplateError::Foreign { .. })));
        // Nor what a link leads to.
        std::os::unix::fs::symlink(at("web"), at("link")).unwrap();
        for link in ["link", "link/", "link/."] {
            assert!(matches!(remove(&at(link)), Err(TemplateError::Foreign { .. })), "{link}");
        }
        // Of what looks as if a crash had left it, only what it can leave.
        fs::remove_file(at("web").join("notes.txt")).unwrap();
        for (name, make) in [("notes.new", false), ("state.new", true), ("notes.txt", false)] {
            let path = at("web").join(name);
            if make {
                fs::create_dir(&path).unwrap()
            } else {
                fs::write(&path, "mine").unwrap()
            }
            assert!(matches!(remove(&at("web")), Err(TemplateError::Foreign { .. })), "{name}");
            assert!(at("web").join(STATE).exists(), "{name}");
            if make {
                fs::remove_dir(&path).unwrap()
            } else if name != "notes.txt" {
                fs::remove_file(&path).unwrap()
            }
        }
        assert!(at("others").join("state").exists() && at("web").join(STATE).exists());
        // One that was half removed by a crash can be removed again.
        fs::remove_file(at("web").join("notes.txt")).unwrap();
        fs::remove_file(at("web").join(STATE)).unwrap();
        remove(&at("web")).unwrap();
        assert!(!at("web").exists());
    }
}
