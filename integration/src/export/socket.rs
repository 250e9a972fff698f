//! The export's socket: where it may be put, and what has arrived on it without taking it.
//!
//! One more module with `unsafe`: FIONREAD, and a descriptor in another's place.

use crate::probe::{Listener, probe};
use crate::rights;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, recv, socket};

use super::server::{ExportError, ExportOptions};

/// Longest path of a unix socket: `sockaddr_un` holds 108 bytes with the final zero (unix(7)).
pub const SOCKET_PATH_BYTES: usize = 107;
/// Header of every vhost-user message: request u32, flags u32, payload size u32.
pub(super) const HEADER_BYTES: usize = 12;

/// A bound socket file; removed on drop if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "socket not removed");
        }
    }
}

impl SocketFile {
    /// Takes over the file of a predecessor, as [`SocketFile::release`] described it.
    pub(super) fn adopt(path: &Path, inode: (u64, u64)) -> Self {
        Self { path: path.into(), inode }
    }

    /// Leaves the file to a successor.
    pub(super) fn release(mut self) -> (u64, u64) {
        // No file has this number: dropping removes nothing.
        std::mem::take(&mut self.inode)
    }
}

/// Listens at a path, without blocking. Nobody can connect before mode and owner are as asked: the socket listens last. A
/// socket file left behind by a dead server is replaced.
///
/// # Errors
/// The path is too long, taken, or cannot be bound.
pub fn listen_at(path: &Path, options: &ExportOptions) -> Result<(UnixListener, SocketFile), ExportError> {
    let len = path.as_os_str().as_bytes().len();
    if len > SOCKET_PATH_BYTES {
        return Err(ExportError::PathTooLong { path: path.into(), len, max: SOCKET_PATH_BYTES });
    }
    clear_stale(path)?;
    let bind_error = |source: io::Error| ExportError::Bind { path: path.into(), source };
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
        .map_err(|e| bind_error(e.into()))?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(|e| bind_error(e.into()))?).map_err(|e| match e {
        Errno::EADDRINUSE => ExportError::InUse { path: path.into() },
        e => bind_error(e.into()),
    })?;
    let meta = std::fs::symlink_metadata(path).map_err(bind_error)?;
    let file = SocketFile { path: path.into(), inode: (meta.dev(), meta.ino()) };
    let access_error = |source: io::Error| ExportError::Access { path: path.into(), source };
    if let Some(owner) = options.owner {
        std::os::unix::fs::lchown(path, Some(owner), None).map_err(access_error)?;
    }
    if let Some(group) = options.group {
        crate::privilege::set_group(path, group).map_err(access_error)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(options.mode)).map_err(access_error)?;
    listen(&fd, Backlog::new(8).map_err(|e| bind_error(e.into()))?).map_err(|e| bind_error(e.into()))?;
    Ok((UnixListener::from(fd), file))
}

/// Removes the socket file of a server that is gone.
fn clear_stale(path: &Path) -> Result<(), ExportError> {
    let bind_error = |source: io::Error| ExportError::Bind { path: path.into(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(bind_error(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(ExportError::NotASocket { path: path.into() }),
        Ok(_) => {}
    }
    match probe(path).map_err(bind_error)? {
        Listener::Gone => {
            tracing::info!(socket = %path.display(), "socket of an earlier server replaced");
            std::fs::remove_file(path).map_err(bind_error)
        }
        Listener::NoPath => Ok(()),
        Listener::Live => Err(ExportError::InUse { path: path.into() }),
    }
}

/// What a connection has to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrived {
    Nothing,
    /// Part of a message.
    Part,
    /// All bytes of a message with this request code: reading it cannot block.
    Message(u32),
    /// The peer has closed.
    End,
}

/// Looks at the next message without taking it.
pub(super) fn arrived(stream: &UnixStream) -> io::Result<Arrived> {
    let mut header = [0; HEADER_BYTES];
    match recv(stream.as_raw_fd(), &mut header, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Ok(Arrived::End),
        Ok(HEADER_BYTES) => {
            let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let (code, size) = (word(0), word(8));
            // An oversized message is refused by its header alone.
            let whole = HEADER_BYTES as u64 + u64::from(size);
            let oversized = u64::from(size) > vhost::vhost_user::message::MAX_MSG_SIZE as u64;
            let here = u64::try_from(bytes_queued(stream)?).unwrap_or(0);
            Ok(if oversized || here >= whole { Arrived::Message(code) } else { Arrived::Part })
        }
        Ok(_) => Ok(Arrived::Part),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Arrived::Nothing),
        Err(error) => Err(error.into()),
    }
}

fn bytes_queued(stream: &UnixStream) -> io::Result<libc::c_int> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD stores one int at the address given; the descriptor is open.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    Errno::result(result)?;
    Ok(bytes)
}

/// Makes `number`, a descriptor of a socket, another one of the socket `stream`.
pub(super) fn replace_descriptor(stream: &UnixStream, number: std::os::fd::RawFd) -> io::Result<()> {
    // SAFETY: no memory is touched; the caller's `number` is open, and stays the caller's to close.
    let result = unsafe { libc::dup3(stream.as_raw_fd(), number, libc::O_CLOEXEC) };
    Errno::result(result)?;
    Ok(())
}

/// A copy of the first descriptor that comes with the next message, which stays in place.
pub(super) fn peek_descriptor(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    // Of a message that is cut, too: its header alone is read here.
    let descriptors = rights::receive(stream, &mut [0; HEADER_BYTES], flags)?.descriptors;
    Ok(descriptors.into_iter().next())
}

/// Sends bytes if they fit now; a message of ours is never cut, being far smaller than a socket's buffer.
pub(super) fn send_now(fd: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = nix::sys::socket::send(fd.as_fd().as_raw_fd(), bytes, flags)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
