//! Socket addresses and the set-up of client sockets.

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, setsockopt, socket, sockopt,
};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where a stream socket connects to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SocketAddress {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SocketAddress::Unix(path) => write!(f, "unix socket {}", path.display()),
            SocketAddress::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// The kernel's form of an address; stays at one place in memory while a connect is in flight.
pub(super) enum RawAddress {
    Unix(UnixAddr),
    Tcp(SockaddrStorage),
}

impl RawAddress {
    pub(super) fn new(address: &SocketAddress) -> io::Result<RawAddress> {
        Ok(match address {
            SocketAddress::Unix(path) => RawAddress::Unix(UnixAddr::new::<Path>(path.as_ref())?),
            SocketAddress::Tcp(address) => RawAddress::Tcp(SockaddrStorage::from(*address)),
        })
    }

    pub(super) fn as_ptr(&self) -> (*const libc::sockaddr, libc::socklen_t) {
        match self {
            RawAddress::Unix(address) => (SockaddrLike::as_ptr(address), address.len()),
            RawAddress::Tcp(address) => (address.as_ptr(), address.len()),
        }
    }
}

impl SocketAddress {
    /// A blocking, close-on-exec stream socket of this address's family. TCP: no Nagle delay (requests are small and
    /// latency counts) and keepalive probes after 10 s, every 5 s, three times, so that a vanished server is noticed
    /// in half a minute even when no request is in flight.
    ///
    /// # Errors
    /// What `socket(2)` or `setsockopt(2)` says.
    pub fn socket(&self) -> io::Result<OwnedFd> {
        let family = match self {
            SocketAddress::Unix(_) => AddressFamily::Unix,
            SocketAddress::Tcp(SocketAddr::V4(_)) => AddressFamily::Inet,
            SocketAddress::Tcp(SocketAddr::V6(_)) => AddressFamily::Inet6,
        };
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        if matches!(self, SocketAddress::Tcp(_)) {
            setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
            setsockopt(&fd, sockopt::KeepAlive, &true)?;
            setsockopt(&fd, sockopt::TcpKeepIdle, &10)?;
            setsockopt(&fd, sockopt::TcpKeepInterval, &5)?;
            setsockopt(&fd, sockopt::TcpKeepCount, &3)?;
        }
        Ok(fd)
    }
}
