//! The user that the daemon becomes, and what must be that user's before.

use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions};
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
/// ran as root.
///
/// # Errors
/// What the kernel says.
pub fn own(folder: &Path, mode: u32, account: Option<&Account>) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(folder)?;
    match account {
        Some(account) if fs::symlink_metadata(folder)?.uid() != account.user => own_tree(folder, account),
        _ => Ok(()),
    }
}

/// Gives a file, or a folder with all that is in it, to the user, and to its group what is root's group's. Only what is root's is
/// given away, and a folder that is the user's already is not entered: what lies there may be the user's doing. To root comes
/// everything. Links are not followed, files with several names are left alone; each step goes from a descriptor to the next, so
/// that nothing comes of exchanging a folder meanwhile.
///
/// # Errors
/// What the kernel says.
pub fn own_tree(path: &Path, account: &Account) -> io::Result<()> {
    own_one(&OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?, account)
}

fn own_one(meant: &File, account: &Account) -> io::Result<()> {
    let meta = meant.metadata()?;
    let to_root = account.user == 0;
    let movable = meta.is_dir() || meta.nlink() == 1;
    if meta.is_symlink() || !movable || (!to_root && meta.uid() != 0) {
        return Ok(());
    }
    let give = || {
        let group = (meta.gid() == 0).then(|| Gid::from_raw(account.group));
        fchownat(meant.as_fd(), "", Some(Uid::from_raw(account.user)), group, AtFlags::AT_EMPTY_PATH)
    };
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
