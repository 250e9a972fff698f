//! A template's folder.
//!
//! A draft is written in a folder beside, whose name begins with a dot, and renamed when all of it is on the disk: a template is
//! there as a whole or not at all. What a crash leaves is such a folder, which is on record ([`drafts`](super::drafts)), and which the
//! next draft of the same name removes.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::drafts;
use super::manifest::{Manifest, read_sealed, write_sealed};
use super::preload::{self, Ended, Progress};
use super::stream::{self, RamBlock, StreamError};
use super::working_set::WorkingSet;
use super::{TemplateError, io, open_plain, read_plain};
use crate::privilege::set_group;

/// The file that makes a folder a template.
pub const MANIFEST: &str = "manifest.json";
pub(super) const DEFINITION: &str = "domain.xml";
pub(super) const STATE: &str = "state";
pub(super) const WORKING_SET: &str = "working-set.json";
/// A definition has some kilobytes.
const LARGEST_DEFINITION: u64 = 1 << 20;

/// A template that is being written. Dropped before [`finish`](Self::finish), it is gone.
#[derive(Debug)]
pub struct Draft {
    target: PathBuf,
    aside: PathBuf,
    /// QEMU's group, which must read the memory.
    group: Option<u32>,
    /// By what it is on record.
    note: Option<PathBuf>,
    /// The folder, locked: nobody else's draft of this name takes its place.
    _lock: Flock<File>,
    finished: bool,
}

fn lock(folder: &Path) -> std::io::Result<Flock<File>> {
    let file = File::open(folder)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error.into())
}

impl Draft {
    /// Begins a template that will be in `target`, and puts it on record in the folder `register`. Others than root and `group` can't
    /// read it: it holds a machine's memory.
    ///
    /// # Errors
    /// `Exists`, `Io`.
    pub fn begin(target: &Path, group: Option<u32>, register: &Path) -> Result<Self, TemplateError> {
        if fs::symlink_metadata(target).is_ok() {
            return Err(TemplateError::Exists { path: target.to_owned() });
        }
        let aside = drafts::aside(target)?;
        if let Some(parent) = target.parent() {
            drafts::make_folder(parent).map_err(io("make", parent))?;
        }
        // The register may be on a disk that is full, which is why the template is elsewhere.
        let note = drafts::note(register, &aside).unwrap_or_else(|error| {
            tracing::warn!(folder = %aside.display(), %error, "a draft is not on record: a crash would leave it behind");
            None
        });
        // One that a crash has left is nobody's.
        let left = lock(&aside);
        if let Err(error) = &left
            && error.kind() == std::io::ErrorKind::WouldBlock
        {
            return Err(TemplateError::Busy { path: target.to_owned() });
        }
        match fs::remove_dir_all(&aside) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io("remove", &aside)(e)),
            _ => {}
        }
        fs::DirBuilder::new().mode(0o710).create(&aside).map_err(io("make", &aside))?;
        let lock = lock(&aside).map_err(io("lock", &aside))?;
        let draft = Self { target: target.to_owned(), aside, group, note, _lock: lock, finished: false };
        if let Some(group) = group {
            set_group(&draft.aside, group).map_err(io("give QEMU's group", &draft.aside))?;
        }
        Ok(draft)
    }

    /// Where the template will be.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Bytes that the device it is written to still has room for.
    ///
    /// # Errors
    /// `Io`.
    pub fn room(&self) -> Result<u64, TemplateError> {
        let told = nix::sys::statvfs::statvfs(&self.aside).map_err(|e| io("look at", &self.aside)(e.into()))?;
        Ok(told.blocks_available().saturating_mul(told.fragment_size()))
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
        if let Some(group) = self.group {
            set_group(&path, group).map_err(io("give QEMU's group", &path))?;
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
        let (path, definition) = (self.target.clone(), definition.to_owned());
        Ok(Template { path, manifest, definition, working_set, set_trouble: None })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_dir_all(&self.aside)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.aside.display(), %error, "a template that was not finished is left behind");
            return; // and on record
        }
        if let Some(note) = &self.note
            && let Err(error) = fs::remove_file(note)
        {
            tracing::warn!(note = %note.display(), %error, "a draft that is done is still on record");
        }
    }
}

/// A template that can be used.
#[derive(Debug, Clone)]
pub struct Template {
    path: PathBuf,
    pub manifest: Manifest,
    pub definition: String,
    /// Empty where it can't be used.
    pub working_set: WorkingSet,
    /// Why the working set can't be used: a clone starts without it, and teaches another.
    pub set_trouble: Option<String>,
}

impl Template {
    /// Opens a template and checks all of it but the memory's contents. What is wrong with its working set is no error.
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
        let definition = read_plain(&xml, LARGEST_DEFINITION)
            .and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other))
            .map_err(io("read", &xml))?;
        let mut template =
            Self { path: path.to_owned(), working_set: WorkingSet::default(), set_trouble: None, definition, manifest };
        template.check()?;
        match template.read_set() {
            Ok(set) => template.working_set = set,
            Err(error) => template.set_trouble = Some(error.to_string()),
        }
        Ok(template)
    }

    fn read_set(&self) -> Result<WorkingSet, TemplateError> {
        let set: WorkingSet = read_sealed(&self.path.join(WORKING_SET), &self.path)?;
        if set.fits(self.manifest.memory_bytes) {
            return Ok(set);
        }
        self.damaged(format!("{WORKING_SET} names pages beyond the memory"))
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
        open_plain(&path).map_err(io("open", &path))
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
        (self.working_set, self.set_trouble) = (working_set, None);
        Ok(())
    }

    /// What of the state a start needs whatever its guest does, in bytes of the file: headers and devices.
    fn devices(&self) -> Vec<Range<u64>> {
        let ram = self.memory();
        vec![0..ram.pages_at, ram.end()..self.manifest.state_bytes]
    }

    /// Where the working set is in the file, in the order to read it.
    #[must_use]
    pub fn needed(&self) -> Vec<Range<u64>> {
        let at = self.manifest.memory_at;
        self.working_set.plan(super::MERGE_PAGES).into_iter().map(|r| at + r.start..at + r.end).collect()
    }

    /// Asks for what a clone needs first, in its order: headers and devices, then the working set ([`preload::ahead`]).
    ///
    /// # Errors
    /// `Io`.
    pub fn read_ahead(&self, progress: &Progress) -> Result<(), TemplateError> {
        let (state, needed) = (self.open_state()?, self.needed());
        let mut ranges = self.devices();
        ranges.extend_from_slice(&needed);
        preload::ahead(&state, &ranges, progress).map_err(io("read ahead", &self.state()))?;
        progress.expect(&self.rest(&state, &needed)?);
        Ok(())
    }

    /// Reads the rest of what is not zero behind a clone, after a while ([`preload::pause`], [`preload::behind`]), and notes its end.
    /// `asked` was read ahead of it: [`needed`](Self::needed) at that time.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_behind(&self, asked: &[Range<u64>], progress: &Progress) -> Result<(), TemplateError> {
        preload::pause(progress);
        let read = self.open_state().and_then(|state| {
            Ok(preload::behind(&state, &self.rest(&state, asked)?, preload::REST_BYTES_PER_SEC, progress))
        });
        progress.end(*read.as_ref().unwrap_or(&Ended::Unreadable));
        read.map(drop)
    }

    /// What of the memory is not zero and not in `asked`.
    fn rest(&self, state: &File, asked: &[Range<u64>]) -> Result<Vec<Range<u64>>, TemplateError> {
        let ram = self.memory();
        preload::rest(state, ram.pages_at..ram.end(), asked).map_err(io("read", &self.state()))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::memory::template::{Learned, Origin, PAGE_BYTES};
    use std::os::unix::fs::FileExt;

    fn origin() -> Origin {
        let text = |t: &str| t.to_owned();
        Origin { name: text("web"), uuid: text("u"), machine_type: text("pc-q35-10.0"), qemu_version: text("10.0.2") }
    }

    fn parent(target: &Path) -> &Path {
        target.parent().unwrap()
    }

    pub(in super::super) fn made(target: &Path) -> Template {
        let draft = Draft::begin(target, None, parent(target)).unwrap();
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
        assert!(matches!(Draft::begin(&target, None, parent(&target)), Err(TemplateError::Exists { .. })));
    }

    #[test]
    fn a_draft_that_is_not_finished_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("web");
        let draft = Draft::begin(&target, None, parent(&target)).unwrap();
        drop(draft.create_state().unwrap());
        assert!(draft.finish("pc.ram", "", origin(), 1).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let register = folder.path().join("register");
        drop(Draft::begin(&target, None, &register).unwrap());
        assert_eq!(fs::read_dir(&register).unwrap().count(), 0);
        fs::remove_dir(&register).unwrap();
        // nobody takes the place of one that is being written
        let mut draft = Draft::begin(&target, None, parent(&target)).unwrap();
        let other = Draft::begin(&target, None, parent(&target));
        assert!(matches!(other, Err(TemplateError::Busy { .. })), "{other:?}");
        // killed in the middle: the next one clears it away
        draft.finished = true;
        drop(draft);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count(),
            1
        );
        made(&target);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_set_that_can_not_be_used_is_no_reason_not_to_start() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("web");
        drop(made(&target));
        let set = target.join(WORKING_SET);
        let good = fs::read_to_string(&set).unwrap();
        let beyond = WorkingSet::of_touches([64]);
        let edits: [(&str, &dyn Fn()); 6] = [
            ("EOF while parsing", &|| fs::write(&set, &good[..good.len() / 2]).unwrap()),
            ("EOF while parsing", &|| fs::write(&set, "").unwrap()),
            ("checksum of", &|| fs::write(&set, good.replace("[0,10]", "[0,11]")).unwrap()),
            // what a later version may write
            ("unknown field `unit`", &|| {
                fs::write(&set, good.replace("\"learned\"", "\"unit\":2,\"learned\"")).unwrap()
            }),
            ("beyond the memory", &|| write_sealed(&set, &beyond).unwrap()),
            ("No such file", &|| fs::remove_file(&set).unwrap()),
        ];
        for (expected, edit) in edits {
            edit();
            let mut template = Template::open(&target).unwrap();
            let trouble = template.set_trouble.clone().unwrap();
            assert!(trouble.contains(expected), "{trouble}");
            assert_eq!((template.working_set.pages(), template.needed()), (0, Vec::new()));
            let progress = Progress::default();
            template.read_ahead(&progress).unwrap();
            assert!(progress.look().needed >= 1 << 20, "headers and devices all the same");
            template.learn(WorkingSet::of_touches([3])).unwrap();
            assert_eq!(template.set_trouble, None);
            assert_eq!(Template::open(&target).unwrap().working_set, WorkingSet::of_touches([3]));
        }
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
            (
                refused("link", &|t| {
                    fs::rename(t.join(DEFINITION), t.join("elsewhere")).unwrap();
                    std::os::unix::fs::symlink("elsewhere", t.join(DEFINITION)).unwrap();
                }),
                "cannot read",
            ),
            (
                refused("pipe", &|t| {
                    fs::remove_file(t.join(MANIFEST)).unwrap();
                    nix::unistd::mkfifo(&t.join(MANIFEST), nix::sys::stat::Mode::S_IRUSR).unwrap();
                }),
                "no plain file",
            ),
            (
                refused("endless", &|t| {
                    OpenOptions::new().write(true).open(t.join(DEFINITION)).unwrap().set_len(1 << 40).unwrap();
                }),
                "more than",
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
