//! Least privilege: a small process that may, and a daemon that may not.
//!
//! - [`protocol`]: what the daemon asks of the broker, one message a packet
//! - [`Broker`]: the daemon's end of it; [`broker()`]: the one of this process
//! - [`rules::Rules`]: what the broker may do for the daemon, by the operator's configuration
//! - [`serve`]: the broker's end
//! - [`images`]: a `qemu-storage-daemon` for images that only QEMU understands
//! - [`confine`]: what the daemon gives up before it hears anybody
//! - [`probe`]: acts that the confinement forbids, to show that it does
//! - `channel`: packets with a descriptor
//! - `follow`: paths of which the daemon may have made a part
//!
//! Privilege separation as OpenSSH has it (Provos, Friedl, Honeyman: *Preventing Privilege Escalation*, USENIX Security 2003): the
//! daemon, which parses what guests, clients and servers say, keeps no capability. What needs one is done by a process that it
//! starts before everything else, over a socket pair that nobody else can connect to. The broker trusts the daemon with nothing:
//! it reads the configuration itself, and what that does not name it refuses.
//!
//! A new helper process is a new [`protocol::Program`]: the broker starts it (`broker::children`), never the daemon.

mod broker;
mod channel;
mod client;
pub mod confine;
mod follow;
pub mod images;
pub mod probe;
pub mod protocol;
pub mod rules;

pub(crate) use broker::tc;
pub use broker::{ReadRules, USER, serve};
pub use client::{Broker, Child, broker};

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Gives a file, folder or socket to a group, itself and not what a link points to. Asks the broker where this process may not.
///
/// # Errors
/// What the kernel says, or why the broker does not.
pub fn set_group(path: &Path, group: u32) -> io::Result<()> {
    match std::os::unix::fs::lchown(path, None, Some(group)) {
        // Root needs no group to read it.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && group == 0 => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => match broker() {
            Some(broker) => broker.set_group(path, group),
            None => Err(error),
        },
        other => other,
    }
}

/// The daemon's own folders among these, without links: those that no link leads to which the daemon may have made. `rules` say who
/// it is.
#[must_use]
pub fn own_folders(rules: &rules::Rules, folders: &[&Path]) -> Vec<PathBuf> {
    // Whatever its links say now counts against it, and not for it.
    let suspected =
        rules::Rules { own: folders.iter().filter_map(|folder| folder.canonicalize().ok()).collect(), ..rules.clone() };
    let suspect = follow::Suspect::daemon(&suspected);
    let own = |folder: &&Path| match follow::follow(folder, &suspect) {
        Ok(found) => {
            found.handle.metadata().is_ok_and(|meta| meta.is_dir()).then(|| follow::path_of(&found.handle).ok())?
        }
        Err(follow::Astray::Link(link)) => {
            tracing::warn!(folder = %folder.display(), link = %link.display(), "not taken for the daemon's own: it may have made the link");
            None
        }
        Err(follow::Astray::Os(_)) => None,
    };
    folders.iter().filter_map(own).collect()
}

/// Opens a file of the configuration for reading. Asks the broker where this process may not.
///
/// # Errors
/// As [`set_group`].
pub fn open_read(path: &Path) -> io::Result<File> {
    // What turns out to be a pipe must not hang.
    match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => match broker() {
            Some(broker) => broker.read(&std::path::absolute(path)?),
            None => Err(error),
        },
        other => other,
    }
}

/// The text of a file of the configuration. Asks the broker where this process may not.
///
/// # Errors
/// As [`set_group`], or it is no UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_read(path)?.read_to_string(&mut text)?;
    Ok(text)
}
