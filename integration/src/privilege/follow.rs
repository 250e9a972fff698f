//! Following a path for somebody who may have made some of its links: the daemon's user, were it taken over.
//!
//! Component by component, each from the descriptor of the folder before it, with no link followed by the kernel (openat(2),
//! `O_NOFOLLOW`). A link counts if the daemon cannot have made it: it is not its user's, nor is the folder that it lies in, nor
//! any that led there. What lies in such a folder is still reached by its own name.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::geteuid;

use super::rules::Rules;

/// Links on a path, as the kernel counts them (path_resolution(7)).
const MAX_LINKS: u32 = 40;
/// inode(7)
const STICKY: u32 = 0o1000;
const GROUP_WRITES: u32 = 0o020;
const ANYBODY_WRITES: u32 = 0o002;

/// Whose links do not count.
#[derive(Debug, Clone)]
pub(super) enum Suspect<'a> {
    /// A user and its groups.
    User(u32, &'a [u32]),
    /// Somebody who is this process's own user, and is confined to these folders, which are without links.
    Confined(Vec<PathBuf>),
}

/// What a path leads to.
#[derive(Debug)]
pub(super) struct Found {
    /// Without access (`O_PATH`).
    pub(super) handle: File,
    /// A folder on the way is the suspect's, who may have put there what it likes under this name.
    pub(super) theirs: bool,
}

/// Why a path is not followed.
#[derive(Debug)]
pub(super) enum Astray {
    /// At this link, which the suspect may have made.
    Link(PathBuf),
    Os(io::Error),
}

impl From<io::Error> for Astray {
    fn from(error: io::Error) -> Self {
        Self::Os(error)
    }
}

impl From<Errno> for Astray {
    fn from(error: Errno) -> Self {
        Self::Os(error.into())
    }
}

/// The path of what a descriptor means.
pub(super) fn path_of(handle: &impl AsRawFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

/// Whether what a descriptor means has one name alone, which is that by which it was opened.
pub(super) fn is_only_name(handle: &File) -> io::Result<bool> {
    // In this order: a name that is there now was there then, since one that has gone does not come back.
    if handle.metadata()?.nlink() != 1 {
        return Ok(false);
    }
    Ok(!path_of(handle)?.as_os_str().as_encoded_bytes().ends_with(b" (deleted)"))
}

impl<'a> Suspect<'a> {
    /// The daemon.
    pub(super) fn daemon(rules: &'a Rules) -> Self {
        match rules.user == geteuid().as_raw() {
            true => Self::Confined(rules.written()),
            false => Self::User(rules.user, &rules.groups),
        }
    }

    /// Whether it may put something into a folder.
    fn may_write(&self, folder: &File) -> io::Result<bool> {
        match self {
            Self::User(user, groups) => {
                let meta = folder.metadata()?;
                let group = meta.mode() & GROUP_WRITES != 0 && groups.contains(&meta.gid());
                let shared = group || meta.mode() & ANYBODY_WRITES != 0;
                // In a folder with the sticky bit names are changed by those alone whose file it is.
                Ok(meta.uid() == *user || (shared && meta.mode() & STICKY == 0))
            }
            Self::Confined(folders) => {
                let path = path_of(folder)?;
                Ok(folders.iter().any(|own| path.starts_with(own)))
            }
        }
    }

    /// Whether it may have put something where it is, by its path without links. What cannot be told counts as yes.
    pub(super) fn may_have_put(&self, real: &Path) -> bool {
        let open =
            |folder: &Path| OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(folder);
        let folder = real.parent().map(open);
        folder.is_none_or(|folder| folder.and_then(|folder| self.may_write(&folder)).unwrap_or(true))
    }

    fn has_made(&self, link: &File) -> io::Result<bool> {
        match self {
            Self::User(user, _) => Ok(link.metadata()?.uid() == *user),
            Self::Confined(_) => Ok(false),
        }
    }
}

fn root() -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open("/")
}

/// The components of a path, the last of them `.` if it must be a folder.
fn parts(path: &Path) -> VecDeque<OsString> {
    let slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let named = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    named.chain(slash.then(|| OsString::from("."))).collect()
}

/// A name in a folder, itself and not what a link points to. Where folders are mounted on demand, they are.
fn step(folder: &File, name: &OsStr) -> nix::Result<(File, bool)> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    match openat(folder.as_fd(), name, flags | OFlag::O_DIRECTORY, Mode::empty()) {
        Err(Errno::ENOTDIR) => openat(folder.as_fd(), name, flags, Mode::empty()).map(|handle| (handle.into(), false)),
        other => other.map(|handle| (handle.into(), true)),
    }
}

/// Follows an absolute path.
///
/// # Errors
/// [`Astray`].
pub(super) fn follow(path: &Path, suspect: &Suspect<'_>) -> Result<Found, Astray> {
    let (mut here, mut theirs, mut links) = (root()?, false, 0);
    let mut ahead = parts(path);
    while let Some(name) = ahead.pop_front() {
        theirs = theirs || suspect.may_write(&here)?;
        // Where that leads is the suspect's to say, who may move a folder that is being looked through.
        if theirs && name == ".." {
            return Err(Astray::Link(path_of(&here)?));
        }
        let (next, is_folder) = step(&here, &name)?;
        if is_folder {
            here = next;
            continue;
        }
        if !next.metadata()?.is_symlink() {
            return match ahead.is_empty() {
                true => Ok(Found { handle: next, theirs }),
                false => Err(Errno::ENOTDIR.into()),
            };
        }
        if theirs || suspect.has_made(&next)? {
            return Err(Astray::Link(path_of(&next)?));
        }
        links += 1;
        // Those of processes lead where no name says.
        if links > MAX_LINKS || is_process(&next)? {
            return Err(Errno::ELOOP.into());
        }
        let target = PathBuf::from(readlinkat(next.as_fd(), "")?);
        if target.is_absolute() {
            here = root()?;
        }
        let mut rest = parts(&target);
        rest.append(&mut ahead);
        ahead = rest;
    }
    Ok(Found { handle: here, theirs })
}

fn is_process(link: &File) -> nix::Result<bool> {
    Ok(fstatfs(link)?.filesystem_type() == PROC_SUPER_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    const NOBODY: Suspect<'_> = Suspect::Confined(Vec::new());

    fn place() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::write(path.join("a/b/file"), "file").unwrap();
        (folder, path)
    }

    /// The path, or how the way ended.
    fn leads(path: &Path, suspect: &Suspect<'_>) -> Result<(PathBuf, bool), String> {
        match follow(path, suspect) {
            Ok(Found { handle, theirs }) => Ok((path_of(&handle).unwrap(), theirs)),
            Err(Astray::Link(at)) => Err(format!("link {}", at.file_name().unwrap().display())),
            Err(Astray::Os(error)) => Err(Errno::from_raw(error.raw_os_error().unwrap()).to_string()),
        }
    }

    /// Against the kernel's own way through every kind of link.
    #[test]
    fn without_a_suspect_it_leads_where_the_kernel_leads() {
        let (_folder, path) = place();
        symlink("b/file", path.join("a/near")).unwrap();
        symlink(path.join("a/b"), path.join("far")).unwrap();
        symlink("../../far/../near", path.join("a/b/round")).unwrap();
        symlink("loop", path.join("loop")).unwrap();
        symlink("near/", path.join("a/folder")).unwrap();
        symlink("nowhere", path.join("lost")).unwrap();
        symlink("/../../..", path.join("up")).unwrap();
        fs::set_permissions(path.join("a"), PermissionsExt::from_mode(0o777)).unwrap();
        let ways = [
            "a/b/file",
            "a/near",
            "far/file",
            "a/b/round",
            "far",
            "far/",
            "loop",
            "loop/x",
            "a/folder",
            "lost",
            "up",
            "a/b/../b/./file",
            "a/b/file/x",
            "a/near/",
            "none",
            "up/etc",
            "",
            "a//b",
        ];
        for way in ways {
            let kernel = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path.join(way));
            let kernel = kernel.map(|handle| (path_of(&handle).unwrap(), false));
            let kernel = kernel.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()).to_string());
            assert_eq!(leads(&path.join(way), &NOBODY), kernel, "{way}");
        }
        assert_eq!(leads(Path::new("/proc/self/exe"), &NOBODY), Err(Errno::ELOOP.to_string()));
    }

    #[test]
    fn no_link_counts_in_or_beyond_a_folder_of_the_suspects() {
        let (_folder, path) = place();
        let suspect = &Suspect::Confined(vec![path.join("a")]);
        symlink("file", path.join("a/b/link")).unwrap();
        symlink("b", path.join("a/way")).unwrap();
        symlink("a/b/file", path.join("outside")).unwrap();
        symlink("a/../secret", path.join("back")).unwrap();
        fs::write(path.join("secret"), "secret").unwrap();
        assert_eq!(leads(&path.join("a/b/file"), suspect), Ok((path.join("a/b/file"), true)));
        // The operator's own, to what may be the suspect's.
        assert_eq!(leads(&path.join("outside"), suspect), Ok((path.join("a/b/file"), true)));
        assert_eq!(leads(&path.join("secret"), suspect), Ok((path.join("secret"), false)));
        for (way, at) in [("a/b/link", "link"), ("a/way/file", "way"), ("back", "a")] {
            assert_eq!(leads(&path.join(way), suspect), Err(format!("link {at}")), "{way}");
        }
    }

    #[test]
    fn a_suspect_is_known_by_its_user_too() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: not root, nothing can be given to another user");
            return;
        }
        let (_folder, path) = place();
        let suspect = &Suspect::User(7, &[8]);
        let link = path.join("a/link");
        symlink("b/file", &link).unwrap();
        let file = Ok((path.join("a/b/file"), false));
        let refused = Err("link link".to_owned());
        assert_eq!(leads(&link, suspect), file);
        let a = |owner, group, mode, wanted: &Result<(PathBuf, bool), String>| {
            chown(path.join("a"), Some(owner), Some(group)).unwrap();
            fs::set_permissions(path.join("a"), PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(&leads(&link, suspect), wanted, "{owner} {group} {mode:o}");
        };
        a(7, 0, 0o755, &refused);
        a(7, 0, 0o1755, &refused);
        a(0, 8, 0o775, &refused);
        a(0, 9, 0o775, &file);
        a(0, 8, 0o755, &file);
        a(0, 0, 0o777, &refused);
        a(0, 0, 0o1777, &file);
        std::os::unix::fs::lchown(&link, Some(7), None).unwrap();
        a(0, 0, 0o755, &refused);
    }

    #[test]
    fn a_second_name_is_seen_also_when_the_first_has_gone() {
        let (_folder, path) = place();
        let open = |name: &str| {
            let flags = libc::O_PATH | libc::O_NOFOLLOW;
            OpenOptions::new().read(true).custom_flags(flags).open(path.join(name)).unwrap()
        };
        assert!(is_only_name(&open("a/b/file")).unwrap());
        fs::hard_link(path.join("a/b/file"), path.join("a/second")).unwrap();
        let second = open("a/second");
        assert!(!is_only_name(&second).unwrap());
        fs::remove_file(path.join("a/second")).unwrap();
        assert!(!is_only_name(&second).unwrap(), "it is another's file still");
        assert!(is_only_name(&open("a/b/file")).unwrap());
    }
}
