//! What the daemon gives up before it hears anybody: user, capabilities, files, system calls.
//!
//! - [`confine`]: all of it, in the order in which each can still be given up
//! - [`seal`]: what the daemon needs at its start only
//! - [`foresee`]: what this host can
//! - `Bounds`: of programs that the broker starts
//! - [`Layer`]: what holds and what does not, and why
//! - `user`: the user it becomes, and whose folders are
//! - `files`: Landlock, where it may write and read
//! - `syscalls`: seccomp, what it may ask the kernel for
//! - `sys`: the system calls behind it
//!
//! What a kernel does not have is said, not hidden: an old kernel is no reason to leave machines without their disks.

mod files;
mod sys;
mod syscalls;
mod user;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use caps::CapSet;
use seccompiler::BpfProgram;

pub use user::{Account, meant, own, own_itself};

/// What is to be confined, and how.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Whom to become; `None`: stay who we are.
    pub account: Option<Account>,
    /// Why it is nobody else, in words.
    pub no_account: String,
    /// Folders and files that may be written to.
    pub write: Vec<PathBuf>,
    /// Folders and files that may be read, beside those.
    pub read: Vec<PathBuf>,
    /// Where temporary files go (`TMPDIR`): SQLite's, of what does not fit into memory.
    pub temporary: Option<PathBuf>,
    /// Sockets without a path must stay within reach: that of the service manager is one here.
    pub abstract_sockets: bool,
}

/// One kind of confinement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub name: &'static str,
    pub holds: bool,
    /// How far it holds, or why it does not.
    pub detail: String,
}

impl Layer {
    fn of(name: &'static str, result: Result<String, String>) -> Self {
        let (holds, detail) = match result {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        Self { name, holds, detail }
    }
}

/// Gives up everything that is not in the plan, for this process and whatever it may become. To be called while it has one
/// thread: others would keep what they have.
///
/// # Errors
/// In words: what could not be given up although this kernel can do it. The process must not go on then.
pub fn confine(plan: &Plan) -> Result<Vec<Layer>, String> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(format!("there are {threads} threads already, of which each would have to be confined"));
    }
    if let Some(folder) = &plan.temporary {
        sys::set_variable("TMPDIR", folder);
    }
    // Takes a capability, which goes with root.
    let bounding = empty_bounding_set()?;
    let mut layers = vec![user::become_user(plan)?];
    give_up_capabilities()?;
    layers.push(Layer { name: "capabilities", holds: true, detail: format!("none{bounding}") });
    sys::no_new_privileges().map_err(|error| format!("cannot give up new privileges: {error}"))?;
    // Older than Linux 6.3; no memory that was written to becomes a program.
    let executable = match sys::no_new_programs() {
        Ok(()) => "no memory that was written to becomes a program".to_owned(),
        Err(error) => format!("memory may become a program ({error})"),
    };
    layers.push(Layer::of("files", files::confine(plan)));
    let detail = syscalls::confine().map(|count| format!("{count} are allowed; {executable}"));
    layers.push(Layer::of("system calls", detail));
    Ok(layers)
}

/// What this host can confine a daemon with, in words, and whether anything is missing. Nothing is given up.
#[must_use]
pub fn foresee(account: &Result<Account, String>) -> Vec<Layer> {
    let user = match account {
        Ok(account) => Ok(account.name.clone()),
        Err(why) => Err(format!("stays who starts it, without capabilities: {why}")),
    };
    let files = match sys::landlock_version() {
        Some(version) => Ok(format!("Landlock {version}")),
        None => Err("this kernel has no Landlock (Linux 5.13), or it is switched off (lsm= at boot)".to_owned()),
    };
    let seccomp = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    let missing: Vec<_> =
        ["kill_process", "trap", "errno", "allow"].into_iter().filter(|action| !seccomp.contains(action)).collect();
    let calls = match missing.is_empty() {
        true => Ok("seccomp".to_owned()),
        false => Err(format!("this kernel's seccomp (Linux 4.14) lacks {}", missing.join(", "))),
    };
    vec![Layer::of("user", user), Layer::of("files", files), Layer::of("system calls", calls)]
}

/// What a program that the broker starts for guests' data is confined to. It has no capabilities either.
#[derive(Debug)]
pub(super) struct Bounds {
    files: Option<OwnedFd>,
    calls: Vec<BpfProgram>,
}

impl Bounds {
    /// It writes to these files alone, and makes no system call that no program of ours makes.
    ///
    /// # Errors
    /// In words: why it cannot be confined although this kernel can do it.
    pub(super) fn writing_only(files: &[BorrowedFd<'_>]) -> Result<Self, String> {
        Ok(Self { files: files::writing_only(files)?, calls: syscalls::of_programs()? })
    }

    /// Confines this process, for good. It must have given up new privileges. Between fork and exec: system calls alone.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn enter(&self) -> std::io::Result<()> {
        if let Some(files) = &self.files {
            sys::restrict_self(files)?;
        }
        self.calls.iter().try_for_each(|filter| sys::install(filter, false))
    }
}

/// Gives up what only a start needs: from here on no thread makes an io_uring. What a ring does is not seen by seccomp; those
/// that there are do no more than the engine needs.
///
/// # Errors
/// In words.
pub fn seal() -> Result<(), String> {
    syscalls::seal()
}

/// The way back to capabilities. Returns what is to be said of it.
fn empty_bounding_set() -> Result<&'static str, String> {
    // Without CAP_SETPCAP the bounding set stays, which without capabilities, and with `no_new_privs`, is of no use.
    if !caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false) {
        return Ok(", but for a bounding set that cannot be emptied");
    }
    sys::empty_bounding_set().map_err(|error| format!("cannot empty the bounding set: {error}"))?;
    Ok("")
}

/// All capabilities, from every set.
fn give_up_capabilities() -> Result<(), String> {
    // A kernel before 4.3 has no ambient set.
    let _ = caps::clear(None, CapSet::Ambient);
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(|error| format!("cannot give up capabilities: {error}"))?;
    }
    Ok(())
}
