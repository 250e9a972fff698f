//! A template's folder.
//!
//! A draft is written in a folder beside, whose name begins with a dot, and renamed when all of it is on the disk: a template is
//! there as a whole or not at all. What a crash leaves is such a folder, which the next draft of the same name removes.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::manifest::{Manifest, read_sealed, write_sealed};
use super::preload::{self, Progress};
use super::stream::{self, RamBlock, StreamError};
use super::working_set::WorkingSet;
use super::{TemplateError, io};

/// The file that makes a folder a template.
pub const MANIFEST: &str = "manifest.json";
const DEFINITION: &str = "domain.xml";
const STATE: &str = "state";
const WORKING_SET: &str = "working-set.json";

/// A template that is being written. Dropped before [`finish`](Self::finish), it is gone.
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    aside: PathBuf,
    /// QEMU's group, which must read the memory.
    group: Option<u32>,
    finished: bool,
}

impl Draft {
    /// Begins a template that will be in `target`. Others than root and `group` can't read it: it holds a machine's memory.
    ///
    /// # Errors
    /// `Exists`, `Io`.
    pub fn begin(target: &Path, group: Option<u32>) -> Result<Self, TemplateError> {
        if fs::symlink_metadata(target).is_ok() {
            return Err(TemplateError::Exists { path: target.to_owned() });
        }
        let missing = || std::io::Error::other("it is no path to a folder");
        let name = target.file_name().ok_or_else(missing).map_err(io("make", target))?;
        let parent = target.parent().ok_or_else(missing).map_err(io("make", target))?;
        fs::DirBuilder::new().recursive(true).mode(0o711).create(parent).map_err(io("make", parent))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".draft");
        let aside = parent.join(hidden);
        match fs::remove_dir_all(&aside) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("remove", &aside)(e)),
            _ => {}
        }
        fs::DirBuilder::new().mode(0o710).create(&aside).map_err(io("make", &aside))?;
        let draft = Self { target: target.to_owned(), aside, group, finished: false };
        if group.is_some() {
            chown(&draft.aside, None, group).map_err(io("give QEMU's group", &draft.aside))?;
        }
        Ok(draft)
    }

    /// The file for QEMU's state, open for writing alone, as QEMU wants it.
    ///
    /// # Errors
    /// `Io`.
    pub fn create_state(&self) -> Result<File, TemplateError> {
        let path = self.aside.join(STATE);
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(io("make", &path))
    }

    /// Finishes the template: finds the memory called `memory` in the state that QEMU wrote, and seals all files. `definition` is
    /// the XML that clones are made of. Returns the template and how many pages it has that are not zero.
    ///
    /// # Errors
    /// `Damaged` if the state is not as expected, `Io`.
    pub fn finish(
        mut self,
        memory: &str,
        definition: &str,
        origin: super::Origin,
        created_unix_ms: u64,
    ) -> Result<Template, TemplateError> {
        let path = self.aside.join(STATE);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io("open", &path))?;
        let damaged = |e: StreamError| match e {
            StreamError::Io(e) => io("read", &path)(e),
            StreamError::Unexpected(reason) => TemplateError::Damaged { path: self.target.clone(), reason },
        };
        let blocks = stream::blocks(&file).map_err(damaged)?;
        let unknown = || StreamError::Unexpected(format!("it has no memory `{memory}`"));
        let ram = blocks.into_iter().find(|block| block.name == memory).ok_or_else(unknown).map_err(damaged)?;
        let working_set =
            WorkingSet { learned: super::Learned::Residency, extents: stream::present(&file, &ram).map_err(damaged)? };
        let memory_id = stream::other_name(&ram.name);
        stream::detach(&file, &ram, &memory_id).map_err(damaged)?;
        let crc = |e| io("read", &path)(e);
        let manifest = Manifest {
            format: super::FORMAT,
            created_unix_ms,
            origin,
            memory_bytes: ram.bytes,
            memory_at: ram.pages_at,
            memory_id,
            state_bytes: file.metadata().map_err(crc)?.len(),
            state_crc32c: stream::checksum_around(&file, &ram).map_err(crc)?,
            memory_crc32c: stream::checksum(&file, ram.pages_at..ram.end(), 0).map_err(crc)?,
            definition_crc32c: crc32c::crc32c(definition.as_bytes()),
        };
        file.set_permissions(fs::Permissions::from_mode(0o440)).map_err(io("protect", &path))?;
        if self.group.is_some() {
            chown(&path, None, self.group).map_err(io("give QEMU's group", &path))?;
        }
        file.sync_all().map_err(io("write", &path))?;
        let xml = self.aside.join(DEFINITION);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600) // it may hold passwords
            .open(&xml)
            .and_then(|mut file| file.write_all(definition.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(io("write", &xml))?;
        write_sealed(&self.aside.join(WORKING_SET), &working_set)?;
        write_sealed(&self.aside.join(MANIFEST), &manifest)?;
        // an empty folder of that name would be replaced, anything else is an error
        fs::rename(&self.aside, &self.target).map_err(io("make", &self.target))?;
        self.finished = true;
        if let Some(parent) = self.target.parent() {
            File::open(parent).and_then(|folder| folder.sync_all()).map_err(io("write", parent))?;
        }
        Ok(Template { path: self.target.clone(), manifest, definition: definition.to_owned(), working_set })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_dir_all(&self.aside)
        {
            tracing::warn!(folder = %self.aside.display(), %error, "a template that was not finished is left behind");
        }
    }
}

/// A template that can be used.
#[derive(Debug, Clone)]
pub struct Template {
    path: PathBuf,
    pub manifest: Manifest,
    pub definition: String,
    pub working_set: WorkingSet,
}

impl Template {
    /// Opens a template and checks all of it but the memory's contents.
    ///
    /// # Errors
    /// `Missing`, `Foreign`, `Version`, `Damaged`, `Io`.
    pub fn open(path: &Path) -> Result<Self, TemplateError> {
        let manifest_path = path.join(MANIFEST);
        match fs::symlink_metadata(&manifest_path) {
            Ok(_) => {}
            Err(_) if fs::symlink_metadata(path).is_ok() => {
                let reason = format!("it has no {MANIFEST}");
                return Err(TemplateError::Foreign { path: path.to_owned(), reason });
            }
            Err(_) => return Err(TemplateError::Missing { path: path.to_owned() }),
        }
        let manifest: Manifest = read_sealed(&manifest_path, path)?;
        let xml = path.join(DEFINITION);
        let definition = fs::read_to_string(&xml).map_err(io("read", &xml))?;
        let template = Self {
            path: path.to_owned(),
            working_set: read_sealed(&path.join(WORKING_SET), path)?,
            definition,
            manifest,
        };
        template.check()?;
        Ok(template)
    }

    fn damaged<T>(&self, reason: impl Into<String>) -> Result<T, TemplateError> {
        Err(TemplateError::Damaged { path: self.path.clone(), reason: reason.into() })
    }

    fn check(&self) -> Result<(), TemplateError> {
        let known = &self.manifest;
        if crc32c::crc32c(self.definition.as_bytes()) != known.definition_crc32c {
            return self.damaged(format!("the checksum of {DEFINITION} does not fit"));
        }
        let file = self.open_state()?;
        let (path, size) = (self.state(), file.metadata().map_err(io("read", &self.state()))?.len());
        if size != known.state_bytes {
            return self.damaged(format!("{STATE} has {size} bytes, it had {}", known.state_bytes));
        }
        let sum = stream::checksum_around(&file, &self.memory()).map_err(io("read", &path))?;
        if sum != known.state_crc32c {
            return self.damaged(format!("the checksum of {STATE} does not fit"));
        }
        if !self.working_set.fits(known.memory_bytes) {
            return self.damaged(format!("{WORKING_SET} names pages beyond the memory"));
        }
        Ok(())
    }

    /// Checks the memory's contents too, which reads all of it.
    ///
    /// # Errors
    /// `Damaged`, `Io`.
    pub fn verify(&self) -> Result<(), TemplateError> {
        let (file, ram) = (self.open_state()?, self.memory());
        let sum = stream::checksum(&file, ram.pages_at..ram.end(), 0).map_err(io("read", &self.state()))?;
        if sum != self.manifest.memory_crc32c {
            return self.damaged("the checksum of the memory does not fit");
        }
        Ok(())
    }

    fn memory(&self) -> RamBlock {
        let known = &self.manifest;
        RamBlock {
            name: known.memory_id.clone(),
            name_at: 0,
            bytes: known.memory_bytes,
            bitmap_at: 0,
            pages_at: known.memory_at,
        }
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file with devices and memory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    /// # Errors
    /// `Io`.
    pub fn open_state(&self) -> Result<File, TemplateError> {
        let path = self.state();
        File::open(&path).map_err(io("open", &path))
    }

    /// Takes what was learned of a clone for those to come.
    ///
    /// # Errors
    /// `Damaged` if it does not fit the memory, `Io`.
    pub fn learn(&mut self, working_set: WorkingSet) -> Result<(), TemplateError> {
        if !working_set.fits(self.manifest.memory_bytes) {
            return self.damaged("what was learned does not fit its memory");
        }
        write_sealed(&self.path.join(WORKING_SET), &working_set)?;
        self.working_set = working_set;
        Ok(())
    }

    /// What of the state a start needs whatever its guest does, in bytes of the file: headers and devices.
    fn devices(&self) -> Vec<std::ops::Range<u64>> {
        let ram = self.memory();
        vec![0..ram.pages_at, ram.end()..self.manifest.state_bytes]
    }

    /// Where the working set is in the file, in the order to read it.
    #[must_use]
    pub fn needed(&self) -> Vec<std::ops::Range<u64>> {
        let at = self.manifest.memory_at;
        self.working_set.plan(super::MERGE_PAGES).into_iter().map(|r| at + r.start..at + r.end).collect()
    }

    /// Asks for what a clone needs first, in its order: headers and devices, then the working set ([`preload::ahead`]).
    ///
    /// # Errors
    /// `Io`.
    pub fn read_ahead(&self, progress: &Progress) -> Result<(), TemplateError> {
        let mut ranges = self.devices();
        ranges.extend(self.needed());
        preload::ahead(&self.open_state()?, &ranges, progress).map_err(io("read ahead", &self.state()))
    }

    /// Reads the rest of what is not zero behind a clone, after a while ([`preload::pause`], [`preload::behind`]).
    ///
    /// # Errors
    /// `Io`.
    pub fn read_behind(&self, progress: &Progress) -> Result<(), TemplateError> {
        preload::pause(progress);
        let (state, ram) = (self.open_state()?, self.memory());
        preload::rest(&state, ram.pages_at..ram.end(), &self.needed())
            .and_then(|rest| preload::behind(&state, &rest, preload::REST_BYTES_PER_SEC, progress))
            .map_err(io("read", &self.state()))
    }

    /// The state's inode, by which a clone's mapping of it is known.
    ///
    /// # Errors
    /// `Io`.
    pub fn inode(&self) -> Result<u64, TemplateError> {
        let path = self.state();
        fs::metadata(&path).map(|metadata| metadata.ino()).map_err(io("read", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::template::{Learned, Origin, PAGE_BYTES};
    use std::os::unix::fs::FileExt;

    fn origin() -> Origin {
        let text = |t: &str| t.to_owned();
        Origin { name: text("web"), uuid: text("u"), machine_type: text("pc-q35-10.0"), qemu_version: text("10.0.2") }
    }

    fn made(target: &Path) -> Template {
        let draft = Draft::begin(target, None).unwrap();
        let state = draft.create_state().unwrap();
        drop(state);
        let state = OpenOptions::new().read(true).write(true).open(draft.aside.join(STATE)).unwrap();
        stream::tests::write(&state, &[("pc.ram", 64 * PAGE_BYTES)], |page| page < 10, b"devices");
        draft.finish("pc.ram", "<domain/>", origin(), 1).unwrap()
    }

    #[test]
    fn a_template_comes_back_as_it_was_and_learns() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("sub/web");
        let written = made(&target);
        assert_eq!((written.working_set.learned, written.working_set.pages()), (Learned::Residency, 10));
        let mut read = Template::open(&target).unwrap();
        assert_eq!(read.manifest, written.manifest);
        assert_eq!((read.manifest.memory_id.as_str(), read.manifest.memory_at), ("tc.ram", 1 << 20));
        let mut byte = [0];
        read.open_state().unwrap().read_exact_at(&mut byte, (1 << 20) + 2 * PAGE_BYTES).unwrap();
        assert_eq!(byte, [3]);
        read.verify().unwrap();
        read.learn(WorkingSet::of_touches([9, 2, 3])).unwrap();
        let again = Template::open(&target).unwrap();
        let needed = again.needed();
        assert_eq!(needed.len(), 1);
        assert_eq!(needed[0], (1 << 20) + 2 * PAGE_BYTES..(1 << 20) + 10 * PAGE_BYTES);
        assert!(read.learn(WorkingSet::of_touches([64])).is_err());
        assert!(matches!(Draft::begin(&target, None), Err(TemplateError::Exists { .. })));
    }

    #[test]
    fn a_draft_that_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("web");
        let draft = Draft::begin(&target, None).unwrap();
        drop(draft.create_state().unwrap());
        assert!(draft.finish("pc.ram", "", origin(), 1).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // killed in the middle: the next one clears it away
        std::mem::forget(Draft::begin(&target, None).unwrap());
        made(&target);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn damaged_cut_and_foreign_ones_are_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |name: &str, edit: &dyn Fn(&Path)| {
            let target = folder.path().join(name);
            drop(made(&target));
            edit(&target);
            Template::open(&target).map(drop).unwrap_err().to_string()
        };
        let edit = |path: PathBuf, at: u64, bytes: &[u8]| {
            OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
        };
        let told = [
            (
                refused("cut", &|t| {
                    let state = OpenOptions::new().write(true).open(t.join(STATE)).unwrap();
                    state.set_len(1 << 20).unwrap();
                }),
                "has 1048576 bytes",
            ),
            (refused("devices", &|t| edit(t.join(STATE), (1 << 20) + 64 * PAGE_BYTES, b"D")), "checksum of state"),
            (
                refused("xml", &|t| fs::write(t.join(DEFINITION), "<domain></domain>").unwrap()),
                "checksum of domain.xml",
            ),
            (
                refused("manifest", &|t| {
                    let text = fs::read_to_string(t.join(MANIFEST)).unwrap();
                    fs::write(t.join(MANIFEST), text.replace("web", "wob")).unwrap();
                }),
                "checksum",
            ),
            (
                refused("half", &|t| {
                    let text = fs::read_to_string(t.join(MANIFEST)).unwrap();
                    fs::write(t.join(MANIFEST), &text[..text.len() / 2]).unwrap();
                }),
                "not a template",
            ),
            (
                refused("newer", &|t| {
                    let text = fs::read_to_string(t.join(MANIFEST)).unwrap();
                    fs::write(t.join(MANIFEST), text.replace("\"format\":1", "\"format\":2")).unwrap();
                }),
                "format 2",
            ),
            (refused("other", &|t| fs::remove_file(t.join(MANIFEST)).unwrap()), "no manifest.json"),
        ];
        for (said, expected) in told {
            assert!(said.contains(expected), "{said}");
        }
        assert!(matches!(Template::open(&folder.path().join("none")), Err(TemplateError::Missing { .. })));
        let target = folder.path().join("memory");
        let template = made(&target);
        edit(target.join(STATE), (1 << 20) + PAGE_BYTES, b"?");
        Template::open(&target).unwrap(); // its contents are too much to read at every start
        assert!(template.verify().unwrap_err().to_string().contains("memory"));
    }
}
