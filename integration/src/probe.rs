//! Whether somebody listens on a unix socket, without ever waiting for them.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Who is behind a socket's path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Listener {
    /// A running server; one that is too busy to accept counts.
    Live,
    /// Nobody: the server that made it has gone.
    Gone,
    /// There is no such path (any more).
    NoPath,
}

/// Connects and hangs up. A blocking connect would wait for as long as the listener's queue is full.
pub(crate) fn probe(path: &Path) -> io::Result<Listener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(Errno::EAGAIN | Errno::EINPROGRESS) => Ok(Listener::Live),
        Err(Errno::ECONNREFUSED) => Ok(Listener::Gone),
        Err(Errno::ENOENT) => Ok(Listener::NoPath),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, bind, listen};

    #[test]
    fn a_listener_with_a_full_queue_is_live_and_found_so_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(probe(&path).unwrap(), Listener::NoPath);
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
                let _ = connect(client.as_raw_fd(), &UnixAddr::new(&path).unwrap());
                client
            })
            .collect();
        assert_eq!(probe(&path).unwrap(), Listener::Live);
        drop((waiting, fd));
        assert_eq!(probe(&path).unwrap(), Listener::Gone);
    }
}
