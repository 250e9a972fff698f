//! The user that the daemon becomes, and what must be that user's before.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use caps::{CapSet, Capability};
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, User, fchownat, geteuid, initgroups, setresgid, setresuid};

use super::{Layer, Plan};
use crate::privilege::follow::{Astray, Suspect, follow};

/// A user of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub user: u32,
    pub group: u32,
}

impl Account {
    /// The user of this name, if this process may become it.
    ///
    /// # Errors
    /// In words: why not.
    pub fn named(name: &str) -> Result<Self, String> {
        Self::found(&format!("`{name}`"), || User::from_name(name))
    }

    /// The user of this number, if this process may become it.
    ///
    /// # Errors
    /// In words: why not.
    pub fn numbered(user: u32) -> Result<Self, String> {
        Self::found(&user.to_string(), || User::from_uid(Uid::from_raw(user)))
    }

    fn found(name: &str, find: impl FnOnce() -> nix::Result<Option<User>>) -> Result<Self, String> {
        if !geteuid().is_root() {
            return Err("not started as root".to_owned());
        }
        // Root of a container may be less than root.
        let may = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
        if !(may(Capability::CAP_SETUID) && may(Capability::CAP_SETGID) && may(Capability::CAP_CHOWN)) {
            return Err("started without CAP_SETUID, CAP_SETGID or CAP_CHOWN".to_owned());
        }
        match find() {
            Ok(Some(user)) => Ok(Self { name: user.name, user: user.uid.as_raw(), group: user.gid.as_raw() }),
            Ok(None) => Err(format!("there is no user {name}")),
            Err(error) => Err(format!("user {name} cannot be looked up: {error}")),
        }
    }
}

/// Becomes the user, with its groups. Descriptors and locked memory as many as the service manager allows, which takes root to set.
pub(super) fn become_user(plan: &Plan) -> Result<Layer, String> {
    raise_limits();
    let Some(account) = &plan.account else {
        let user = geteuid();
        let detail = match user.is_root() {
            true => format!(
                "root, without capabilities: {}. What root owns and services that trust root are within reach as far as files are not confined",
                plan.no_account
            ),
            false => format!("{user}: {}", plan.no_account),
        };
        return Ok(Layer { name: "user", holds: !user.is_root(), detail });
    };
    let failed = |what: &'static str| move |error: nix::Error| format!("cannot {what}: {error}");
    let name = CString::new(account.name.as_str()).map_err(|_| "a user's name has no zero byte".to_owned())?;
    let (user, group) = (Uid::from_raw(account.user), Gid::from_raw(account.group));
    initgroups(&name, group).map_err(failed("take its user's groups"))?;
    setresgid(group, group, group).map_err(failed("leave root's group"))?;
    setresuid(user, user, user).map_err(failed("give up root"))?;
    Ok(Layer { name: "user", holds: true, detail: account.name.clone() })
}

fn raise_limits() {
    // The RAM tier is registered with io_uring, which counts it where there is no CAP_IPC_LOCK.
    let unlimited = libc::RLIM_INFINITY;
    if setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited).is_err()
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
    {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
    }
}

/// Makes a folder if it is missing, and gives it to the user. What lies in one that was another's goes with it: an earlier version
/// ran as root. Not where a link leads that an earlier daemon of that user may have made; none of them runs meanwhile.
///
/// # Errors
/// What the kernel says.
pub fn own(folder: &Path, mode: u32, account: Option<&Account>) -> io::Result<()> {
    if let Some(account) = account {
        let there = folder.ancestors().find(|part| part.symlink_metadata().is_ok()).unwrap_or(folder);
        no_link_of(there, account)?;
    }
    DirBuilder::new().recursive(true).mode(mode).create(folder)?;
    match account {
        Some(account) if fs::symlink_metadata(folder)?.uid() != account.user => own_tree(folder, account),
        _ => Ok(()),
    }
}

/// Refuses a path with a link that an earlier daemon of that user may have made.
fn no_link_of(path: &Path, account: &Account) -> io::Result<()> {
    if account.user == 0 {
        return Ok(());
    }
    let followed = follow(path, &Suspect::User(account.user, &[account.group]));
    followed.map(drop).map_err(|astray| match astray {
        Astray::Link(link) => {
            io::Error::other(format!("{} may have been made by prestaged's user; remove it", link.display()))
        }
        Astray::Os(error) => error,
    })
}

/// What lies at a path, for [`own_itself`]: not opened for reading, and no link.
///
/// # Errors
/// What the kernel says, and a link on the way that the user may have made.
pub fn meant(path: &Path, account: &Account) -> io::Result<File> {
    path.symlink_metadata()?;
    no_link_of(path.parent().unwrap_or(path), account)?;
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)
}

/// Gives what was opened to the user, and nothing that is in it. Only what is root's is given away; to root comes everything. A file with
/// several names is left alone.
///
/// # Errors
/// What the kernel says.
pub fn own_itself(meant: &File, account: &Account) -> io::Result<()> {
    let meta = meant.metadata()?;
    if !is_given(&meta, account) {
        return Ok(());
    }
    give(meant, &meta, account)
}

/// Gives a file, or a folder with all that is in it, to the user, and to its group what is root's group's. Only what is root's is
/// given away, and a folder that is the user's already is not entered: what lies there may be the user's doing. To root comes
/// everything. Links are not followed, files with several names are left alone; each step goes from a descriptor to the next, so
/// that nothing comes of exchanging a folder meanwhile.
///
/// # Errors
/// What the kernel says.
fn own_tree(path: &Path, account: &Account) -> io::Result<()> {
    own_one(&OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?, account)
}

fn own_one(meant: &File, account: &Account) -> io::Result<()> {
    let meta = meant.metadata()?;
    let to_root = account.user == 0;
    if !is_given(&meta, account) {
        return Ok(());
    }
    let give = || give(meant, &meta, account);
    // To root the folder comes first, from root it goes last: nobody but root can put anything there meanwhile.
    if to_root {
        give()?;
    }
    if meta.is_dir() {
        let through = format!("/proc/self/fd/{}", meant.as_raw_fd());
        for entry in fs::read_dir(through)? {
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let inner = openat(meant, entry?.file_name().as_os_str(), flags, Mode::empty())?;
            own_one(&File::from(inner), account)?;
        }
    }
    if !to_root {
        give()?;
    }
    Ok(())
}

fn is_given(meta: &Metadata, account: &Account) -> bool {
    let movable = meta.is_dir() || meta.nlink() == 1;
    !meta.is_symlink() && movable && (account.user == 0 || meta.uid() == 0)
}

fn give(meant: &File, meta: &Metadata, account: &Account) -> io::Result<()> {
    let group = (meta.gid() == 0).then(|| Gid::from_raw(account.group));
    Ok(fchownat(meant.as_fd(), "", Some(Uid::from_raw(account.user)), group, AtFlags::AT_EMPTY_PATH)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{RenameFlags, renameat2};
    use std::os::unix::fs::{chown, symlink};
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// Any user but root.
    const USER: u32 = 65_534;
    const FILES: u32 = 20;
    const ROUNDS: u32 = 300;

    fn account() -> Option<Account> {
        let account = Account { name: "somebody".to_owned(), user: USER, group: USER };
        geteuid().is_root().then_some(account)
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        (folder, path)
    }

    fn owners(folder: &Path) -> Vec<u32> {
        let inner = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let all = [folder.to_owned()].into_iter().chain(inner);
        all.map(|path| path.symlink_metadata().unwrap().uid()).collect()
    }

    /// A daemon of the same user that lives, or another process of it, puts links to the host's folders in the place of its own
    /// while these are being given to it.
    #[test]
    fn nothing_outside_is_given_away_whatever_is_exchanged_meanwhile() {
        let Some(account) = account() else {
            println!("SKIPPED: not root, nothing can be given to another user");
            return;
        };
        let (_folder, path) = place();
        let (tree, outside) = (path.join("tree"), path.join("outside"));
        for folder in [tree.join("inner/deep"), outside.join("deep")] {
            fs::create_dir_all(&folder).unwrap();
            for number in 0..FILES {
                fs::write(folder.join(number.to_string()), "").unwrap();
                fs::write(folder.with_file_name(number.to_string()), "").unwrap();
            }
        }
        // From the folder itself: by its path an exchange might be one of the host's own files, which no daemon may do.
        let inner = File::open(tree.join("inner")).unwrap();
        let root = File::open(&path).unwrap();
        let pairs = [
            (&root, "tree/inner", "way", outside.clone()),
            (&inner, "deep", "deep way", outside.join("deep")),
            (&inner, "7", "file way", outside.join("7")),
        ];
        for (_, _, link, target) in &pairs {
            symlink(target, path.join(link)).unwrap();
        }
        let (ended, exchanged, mut given) = (AtomicBool::new(false), AtomicU32::new(0), 0);
        let wrong = std::thread::scope(|scope| {
            for (folder, own, link, _) in &pairs {
                let (ended, exchanged, root) = (&ended, &exchanged, &root);
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed) {
                        renameat2(folder, *own, root, *link, RenameFlags::RENAME_EXCHANGE).unwrap();
                        exchanged.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let wrong = (0..ROUNDS).find(|_| {
                // To have everything to give once more; a link is given back itself.
                let _ = chown_all(&inner);
                let _ = std::os::unix::fs::lchown(&tree, Some(0), None);
                own_tree(&tree, &account).unwrap();
                given += u32::from(tree.metadata().unwrap().uid() == USER);
                let mut outside = owners(&outside).into_iter().chain(owners(&outside.join("deep")));
                outside.any(|owner| owner != 0)
            });
            ended.store(true, Ordering::Relaxed);
            wrong
        });
        println!("{} exchanges, {given} times given", exchanged.into_inner());
        assert_eq!(
            (wrong, given),
            (None, ROUNDS),
            "the round in which what lies outside was given away, and all that were given"
        );
    }

    /// Back to root, from the folder itself.
    fn chown_all(folder: &File) -> io::Result<()> {
        let through = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
        for entry in fs::read_dir(&through)? {
            let path = entry?.path();
            std::os::unix::fs::lchown(&path, Some(0), None)?;
            if path.symlink_metadata()?.is_dir() {
                for entry in fs::read_dir(path)? {
                    std::os::unix::fs::lchown(entry?.path(), Some(0), None)?;
                }
            }
        }
        std::os::unix::fs::chown(through, Some(0), None)
    }

    #[test]
    fn no_folder_is_made_or_given_where_a_link_of_that_user_leads() {
        let Some(account) = account() else {
            println!("SKIPPED: not root, nothing can be given to another user");
            return;
        };
        let (_folder, path) = place();
        let (state, outside) = (path.join("state"), path.join("outside"));
        fs::create_dir_all(outside.join("vm")).unwrap();
        own(&state.join("run/vm"), 0o755, None).unwrap();
        own(&state, 0o755, Some(&account)).unwrap();
        assert_eq!(owners(&state.join("run")), [USER, USER]);
        own(&state.join("run/new/deep"), 0o755, Some(&account)).unwrap();
        assert_eq!(state.join("run/new/deep").metadata().unwrap().uid(), USER);
        // What a daemon that was taken over leaves for the next start.
        fs::remove_dir_all(state.join("run")).unwrap();
        symlink(&outside, state.join("run")).unwrap();
        for folder in ["run", "run/vm", "run/new", "run/new/deep"] {
            let said = own(&state.join(folder), 0o755, Some(&account)).unwrap_err().to_string();
            assert!(said.contains("may have been made by prestaged's user"), "{said}");
        }
        assert_eq!(owners(&outside), [0, 0]);
        // A link of the operator's is another matter.
        chown(&outside, Some(USER), None).unwrap();
        symlink(&outside, path.join("way")).unwrap();
        own(&path.join("way/new"), 0o755, Some(&account)).unwrap();
        assert_eq!(outside.join("new").metadata().unwrap().uid(), USER);
    }
}
