//! What the daemon and its broker say to each other.
//!
//! Packets of a `SOCK_SEQPACKET` pair, a message each, in postcard's encoding (postcard.jamesmunns.com/wire-format), with at most
//! one descriptor beside it (`SCM_RIGHTS`, unix(7)). A request carries a ticket; its answer carries the same. Answers come in any
//! order: a store that does not answer holds up nobody else.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Changes with every message. Both ends are the same program, so they differ only if somebody makes them.
pub const VERSION: u32 = 3;
/// Largest message in bytes: a chain of some images by their paths.
pub const MAX_MESSAGE: usize = 16 << 10;

/// A path as the kernel sees it: bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name(Vec<u8>);

impl From<&Path> for Name {
    fn from(path: &Path) -> Self {
        Self(path.as_os_str().as_bytes().to_vec())
    }
}

impl Name {
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(&self.0))
    }
}

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub ticket: u64,
    pub body: Ask,
}

/// How a store is opened. It is never made and never cut; the SSD tier's file, which no guest sees, is made if it is to be
/// written to and missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct How {
    pub write: bool,
    /// `O_DIRECT`.
    pub direct: bool,
    /// `O_EXCL`: a device that the host itself uses is refused.
    pub exclusive: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// First of all.
    Hello {
        version: u32,
    },
    /// A regular file or block device that the rules allow. Answered with [`Said::Opened`] and the descriptor.
    Open {
        path: Name,
        how: How,
    },
    /// A connection to an NBD server's unix socket that the rules allow. Answered with [`Said::Opened`] and the descriptor.
    Connect {
        path: Name,
    },
    /// A file that the configuration names, for reading. Answered with [`Said::Opened`] and the descriptor.
    Read {
        path: Name,
    },
    /// Gives a group what the descriptor that comes along means, which must lie in the daemon's own folders.
    SetGroup {
        group: u32,
    },
    /// The queueing disciplines of a machine's interface. Answered with [`Said::Text`], as `tc` words it.
    Qdiscs {
        device: String,
    },
    RemoveQdisc {
        device: String,
        qdisc: Qdisc,
    },
    /// Answered with [`Said::Started`] and the socket that the program has as standard input.
    Start(Program),
    /// A `qemu-storage-daemon` that offers a chain of images which the rules allow on the listening socket that comes along.
    /// Answered with [`Said::Started`] and its standard error.
    StartImages(Chain),
    /// Whether there is a passphrase for a disk that can be used.
    FindKey {
        disk: String,
    },
    /// Ends a program that was started: `gently` by SIGTERM, else by SIGKILL.
    End {
        child: u64,
        gently: bool,
    },
    /// Starts another prestaged, which is to take over: the program that is installed, or with `anew` the one that runs. Answered
    /// with [`Said::Started`].
    StartSuccessor {
        anew: bool,
    },
    /// Kills a prestaged that [`Ask::StartSuccessor`] has started.
    EndSuccessor {
        pid: u32,
    },
}

/// Where a queueing discipline that a limit leaves behind is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Qdisc {
    Root,
    Ingress,
}

/// What the broker starts. Where the program is, and its words, are not the daemon's to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    /// `prestage-memory`.
    Memory,
}

/// Images that stand on each other, for a `qemu-storage-daemon` of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Whose passphrase it is that `encryption` asks for.
    pub disk: String,
    /// The uppermost first.
    pub images: Vec<Image>,
    /// Those below are read only in any case.
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Image {
    Qcow2 { path: Name, encryption: Option<Encryption> },
    Raw { path: Name },
    NbdUnix { path: Name, export: String },
    NbdTcp { host: String, port: u16, export: String },
}

/// How a qcow2 image is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encryption {
    Aes,
    Luks,
}

/// To the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub ticket: u64,
    pub body: Result<Said, Refusal>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    Hello {
        pid: u32,
        /// What it could not give up, or does not have, in words.
        notes: Vec<String>,
    },
    Done,
    /// What was opened, without links in its path.
    Opened {
        path: Name,
    },
    Text(String),
    Started {
        child: u64,
        pid: u32,
    },
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Of the kernel; 0: it is against the rules.
    pub errno: i32,
    pub reason: String,
}

impl Refusal {
    /// Against the rules.
    pub(super) fn rule(reason: impl Into<String>) -> Self {
        Self { errno: 0, reason: reason.into() }
    }

    /// The kernel does not do `what`.
    pub(super) fn os(what: &str, error: &io::Error) -> Self {
        Self { errno: error.raw_os_error().unwrap_or(libc::EIO), reason: format!("cannot {what}: {error}") }
    }
}

/// With the kernel's number where there is one, so that callers tell a store that is missing from one that is not allowed; else
/// [`io::ErrorKind::PermissionDenied`] with the reason.
impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        match refusal.errno {
            0 => Self::new(io::ErrorKind::PermissionDenied, refusal),
            errno => Self::from_raw_os_error(errno),
        }
    }
}
