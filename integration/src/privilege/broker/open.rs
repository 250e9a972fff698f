//! Opening what the rules allow.
//!
//! A path is resolved once, to a handle that gives no access (`O_PATH`); what it means is looked at there, and the same is then
//! opened through `/proc/self/fd`. Whoever changes the path meanwhile changes nothing (openat2(2), open(2)). Nor does the daemon by
//! links of its own (`follow`).

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::stat::{major, minor};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{Gid, fchownat};

use crate::privilege::follow::{Astray, Found, Suspect, follow, is_only_name, path_of};
use crate::privilege::images::{Handle, check_key};
use crate::privilege::protocol::{Chain, How, Image, Refusal};
use crate::privilege::rules::{Permit, Rules};

/// Where devices are. Links in it are made by root alone (udev).
const DEVICES: &str = "/dev";
/// A folder in it that anybody may write to.
const NO_DEVICES: &str = "/dev/shm";
/// How long a server may leave us waiting for its `accept`.
const CONNECT_S: i64 = 10;
/// Looks at a device before it counts as the host's own, and the time between them.
const BUSY_LOOKS: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Where the operator's word for a path leads, without access to it. No link is followed that the daemon may have made.
fn named(rules: &Rules, path: &Path) -> Result<File, Refusal> {
    match follow(path, &Suspect::daemon(rules)) {
        Ok(Found { handle, theirs }) => {
            match theirs && !is_folder(&handle) && !is_only_name(&handle).unwrap_or(false) {
                true => Err(has_names(path)),
                false => Ok(handle),
            }
        }
        Err(astray) => Err(refusal(path, astray)),
    }
}

/// Where the path of the SSD tier, or of its folder, leads, without access to it: by the operator's links and udev's, as at the start,
/// and by none of the daemon's, who may put into that folder what it likes.
fn tier(rules: &Rules, path: &Path) -> Result<File, Refusal> {
    let suspect = match Suspect::daemon(rules) {
        // The folder itself is known by its path without links.
        Suspect::Confined(folders) => {
            let place = rules.tier.as_deref().filter(|_| !rules.tier_is_device).and_then(Path::parent);
            Suspect::Confined(folders.into_iter().chain(place.and_then(|place| place.canonicalize().ok())).collect())
        }
        user => user,
    };
    let Found { handle, theirs } = follow(path, &suspect).map_err(|astray| refusal(path, astray))?;
    let is_block = handle.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    match theirs && is_block {
        true => Err(has_names(path)),
        false => Ok(handle),
    }
}

fn refusal(path: &Path, astray: Astray) -> Refusal {
    match astray {
        Astray::Link(link) => Refusal::rule(format!(
            "{} on the way to {} is a link in a folder that prestaged writes to, or its own; name what it leads to, or put it elsewhere",
            link.display(),
            path.display()
        )),
        Astray::Os(error) => Refusal::os(&format!("open {}", path.display()), &error),
    }
}

/// By its other name it may be any file of the host.
fn has_names(path: &Path) -> Refusal {
    Refusal::rule(format!(
        "{} lies in a folder that prestaged writes to and has other names; name one that lies elsewhere",
        path.display()
    ))
}

fn is_folder(handle: &File) -> bool {
    handle.metadata().is_ok_and(|meta| meta.is_dir())
}

/// What a path means, without access to it.
fn resolve(rules: &Rules, path: &Path, permit: Permit<'_>) -> Result<File, Refusal> {
    let failed = |error: nix::Error| Refusal::os(&format!("open {}", path.display()), &error.into());
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC);
    let handle = match permit {
        Permit::Named => return named(rules, path),
        Permit::Tier => return tier(rules, path),
        Permit::Below(base) => {
            let rest = path.strip_prefix(base).map_err(|_| Refusal::rule("it is not below its folder"))?;
            let how = how.resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            match openat2(named(rules, base)?, rest, how) {
                Err(nix::Error::EXDEV) => {
                    return Err(Refusal::rule(format!(
                        "a link on the way to {} leads out of {}; name the disk with its own path, or add that folder to `store.allowed`",
                        path.display(),
                        base.display()
                    )));
                }
                other => other,
            }
        }
    };
    handle.map(File::from).map_err(failed)
}

/// inode(7)
const SET_ID: u32 = 0o6000;
const EXECUTABLE: u32 = 0o111;

fn meta(path: &Path, handle: &File) -> Result<Metadata, Refusal> {
    handle.metadata().map_err(|error| Refusal::os(&format!("look at {}", path.display()), &error))
}

fn through(handle: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", handle.as_raw_fd())
}

/// The path without links.
fn real(path: &Path, handle: &impl AsRawFd) -> Result<PathBuf, Refusal> {
    path_of(handle).map_err(|error| Refusal::os(&format!("look at {}", path.display()), &error))
}

/// All names by which an operator may have allowed a device: as asked, as it is, and a device-mapper device's.
fn names(asked: &Path, real: &Path, device: u64) -> Vec<PathBuf> {
    let mapped = format!("/sys/dev/block/{}:{}/dm/name", major(device), minor(device));
    let mapped = std::fs::read_to_string(mapped).ok().map(|name| Path::new("/dev/mapper").join(name.trim_end()));
    [asked.to_owned(), real.to_owned()].into_iter().chain(mapped).collect()
}

/// Whether the host has a device mounted, or as part of an array or volume group: open(2), O_EXCL without O_CREAT.
fn is_busy(handle: &File) -> io::Result<bool> {
    let flags = libc::O_EXCL | libc::O_NONBLOCK;
    for _ in 0..BUSY_LOOKS {
        match OpenOptions::new().read(true).custom_flags(flags).open(through(handle)) {
            // Another look at the same device, for another disk on it, is over in a moment.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(BUSY_PAUSE),
            other => return other.map(|_| false),
        }
    }
    Ok(true)
}

/// A store that the rules allow.
struct Store {
    handle: File,
    /// Its path without links.
    real: PathBuf,
    is_block: bool,
}

/// A store that the rules allow, without access to it.
fn find(rules: &Rules, path: &Path, write: bool) -> Result<Store, Refusal> {
    let permit = rules.store(path, write);
    let named = permit == Ok(Permit::Named);
    let is_device = path.starts_with(DEVICES) && !path.starts_with(NO_DEVICES);
    let handle = match permit {
        // A device has many names that are links to each other; which of them is allowed shows below.
        _ if is_device && !named => resolve(rules, path, Permit::Below(Path::new(DEVICES)))?,
        Ok(permit) => resolve(rules, path, permit)?,
        Err(refusal) => return Err(refusal),
    };
    let (found, real) = (meta(path, &handle)?, real(path, &handle)?);
    let is_block = found.file_type().is_block_device();
    if !is_block && (!found.is_file() || (is_device && !named)) {
        let reason = format!("{} is neither a regular file nor a block device", path.display());
        return Err(Refusal { errno: libc::ENOTBLK, reason });
    }
    let mine = || found.is_file() && [0, rules.user].contains(&found.uid()) && is_only_name(&handle).unwrap_or(false);
    let tier = permit == Ok(Permit::Tier);
    if tier && !is_block && !mine() {
        return Err(Refusal::rule(format!("{} is not a file that prestaged made for its SSD tier", path.display())));
    }
    // An allowed folder may have one of the daemon's own in it.
    if !is_block && !named && !is_only_name(&handle).unwrap_or(false) && Suspect::daemon(rules).may_have_put(&real) {
        return Err(has_names(path));
    }
    let failed = |error: &io::Error| Refusal::os(&format!("open {}", path.display()), error);
    if is_block && !named && !tier {
        if !rules.device(&names(path, &real, found.rdev())) {
            return Err(rules.outside(path));
        }
        if is_busy(&handle).map_err(|error| failed(&error))? {
            return Err(Refusal::rule(format!(
                "{} is in use by the host itself: mounted, or part of an array or volume group; if it is to be served all the same, name it in a `[[disk]]` of the configuration",
                path.display()
            )));
        }
    }
    Ok(Store { handle, real, is_block })
}

/// A store that the rules allow, and its path without links.
pub(super) fn store(rules: &Rules, path: &Path, how: How) -> Result<(PathBuf, OwnedFd), Refusal> {
    let found = match find(rules, path, how.write) {
        // On a cache disk that was put in while the daemon ran, which it has no access to by itself.
        Err(refusal) if refusal.errno == libc::ENOENT && how.write && rules.tier.as_deref() == Some(path) => {
            make_tier(rules, path)?;
            find(rules, path, true)
        }
        other => other,
    };
    let Store { handle, real, is_block } = found?;
    let failed = |error: &io::Error| Refusal::os(&format!("open {}", path.display()), error);
    let flag = |set, flag| if set { flag } else { 0 };
    let flags = libc::O_NONBLOCK
        | libc::O_NOCTTY
        | flag(how.direct, libc::O_DIRECT)
        | flag(how.exclusive && is_block, libc::O_EXCL);
    let opened = OpenOptions::new().read(true).write(how.write).custom_flags(flags).open(through(&handle));
    opened.map(|file| (real, file.into())).map_err(|error| failed(&error))
}

/// Makes the SSD tier's file. Nothing in its place is followed or cut.
fn make_tier(rules: &Rules, path: &Path) -> Result<(), Refusal> {
    let failed = |error: &io::Error| Refusal::os(&format!("create {}", path.display()), error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Refusal::rule(format!("{} names no file", path.display())));
    };
    if path.starts_with(DEVICES) && !path.starts_with(NO_DEVICES) {
        return Err(failed(&io::Error::from_raw_os_error(libc::ENOENT)));
    }
    let parent = resolve(rules, parent, Permit::Tier)?;
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    nix::fcntl::openat(&parent, name, flags, mode).map_err(|error| failed(&error.into()))?;
    File::open(through(&parent)).and_then(|folder| folder.sync_all()).map_err(|error| failed(&error))
}

/// What a `qemu-storage-daemon` is to open of a chain of images, all of which the rules must allow.
pub(super) fn images(rules: &Rules, chain: &Chain) -> Result<Vec<Option<Handle>>, Refusal> {
    let find = |(i, image): (usize, &Image)| match image {
        Image::Qcow2 { path, .. } | Image::Raw { path } => {
            find(rules, &path.path(), i == 0 && !chain.read_only).map(|found| Some(Handle(found.handle)))
        }
        Image::NbdUnix { path, .. } => {
            let path = path.path();
            let handle = resolve(rules, &path, rules.server(&path)?)?;
            match meta(&path, &handle)?.file_type().is_socket() {
                true => Ok(Some(Handle(handle))),
                false => Err(Refusal::rule(format!("{} is no socket", path.display()))),
            }
        }
        Image::NbdTcp { .. } => Ok(None),
    };
    // Its owner is whom the program runs as.
    if !matches!(chain.images.first(), Some(Image::Qcow2 { .. } | Image::Raw { .. })) {
        return Err(Refusal::rule("a chain of images begins with an image"));
    }
    chain.images.iter().enumerate().map(find).collect()
}

/// A connection to an NBD server's socket that the rules allow.
pub(super) fn server(rules: &Rules, path: &Path) -> Result<(PathBuf, OwnedFd), Refusal> {
    let handle = resolve(rules, path, rules.server(path)?)?;
    if !meta(path, &handle)?.file_type().is_socket() {
        return Err(Refusal { errno: libc::ECONNREFUSED, reason: format!("{} is no socket", path.display()) });
    }
    let real = real(path, &handle)?;
    let connected = || -> nix::Result<OwnedFd> {
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // It holds for connect(2) too (unix(7)).
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(CONNECT_S))?;
        connect(fd.as_raw_fd(), &UnixAddr::new(through(&handle).as_str())?)?;
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(0))?;
        Ok(fd)
    };
    let failed = |error: nix::Error| Refusal::os(&format!("connect to {}", path.display()), &error.into());
    connected().map(|fd| (real, fd)).map_err(failed)
}

/// The file with the passphrase of a disk.
pub(super) fn key(rules: &Rules, disk: &str) -> Result<File, Refusal> {
    let path = rules.key(disk)?;
    let handle = named(rules, &path)?;
    // A pipe would hang.
    if !meta(&path, &handle)?.is_file() {
        return Err(Refusal::rule(format!("{} is no regular file", path.display())));
    }
    let opened = File::open(through(&handle));
    check_key(opened.map_err(|error| Refusal::os(&format!("open {}", path.display()), &error))?)
}

/// A file of the configuration, for reading.
pub(super) fn read(rules: &Rules, path: &Path) -> Result<(PathBuf, OwnedFd), Refusal> {
    rules.read(path)?;
    let handle = named(rules, path)?;
    if !meta(path, &handle)?.is_file() {
        return Err(Refusal::rule(format!("{} is no regular file", path.display())));
    }
    let real = real(path, &handle)?;
    let opened = File::open(through(&handle));
    opened.map(|file| (real, file.into())).map_err(|error| Refusal::os(&format!("open {}", path.display()), &error))
}

/// Gives what the descriptor means to a group: a file, folder or socket of the daemon's own, in its own folders.
pub(super) fn set_group(rules: &Rules, meant: &OwnedFd, group: u32) -> Result<(), Refusal> {
    let shown = Path::new("what it has a descriptor of");
    let path = real(shown, meant)?;
    let handle = File::from(meant.try_clone().map_err(|error| Refusal::os("look at a descriptor", &error))?);
    let found = meta(&path, &handle)?;
    let kind = found.file_type();
    let alone = || is_only_name(&handle).unwrap_or(false);
    // A second name may be one outside. A set-group-id bit would make a program of another group's, or of a folder one whose
    // files are another group's whoever makes them.
    let plain = (kind.is_dir() && found.mode() & SET_ID == 0)
        || (kind.is_socket() && alone())
        || (kind.is_file() && alone() && found.mode() & (SET_ID | EXECUTABLE) == 0);
    if !rules.is_own(&path) || found.uid() != rules.user || !plain || group == 0 {
        return Err(Refusal::rule(format!("{} is not the daemon's to give away", path.display())));
    }
    let given = fchownat(meant.as_fd(), "", None, Some(Gid::from_raw(group)), AtFlags::AT_EMPTY_PATH);
    given.map_err(|error| Refusal::os(&format!("give {} to group {group}", path.display()), &error.into()))
}

#[cfg(test)]
#[path = "open_tests.rs"]
mod tests;
