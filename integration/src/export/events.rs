//! Event descriptors of a ring: eventfds that the front-end hands over and may exchange while the ring runs.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use parking_lot::Mutex;

/// Takes a descriptor as an event. Only an eventfd is accepted: any other file could be always ready (and spin its
/// runner) or block a write. Made non-blocking; the front-end shares that flag and could clear it again, but an eventfd
/// then only blocks at 2^64 - 1 events.
pub(super) fn checked_eventfd(fd: OwnedFd) -> std::io::Result<OwnedFd> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(std::io::Error::other(format!("{} is not an eventfd", link.display())));
    }
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(fd)
}

/// Adds one event. A full counter already says that there are events.
pub(super) fn notify(fd: &OwnedFd) {
    if let Err(error) = nix::unistd::write(fd.as_fd(), &1_u64.to_ne_bytes()) {
        tracing::debug!(%error, "event not written");
    }
}

/// Takes all events off.
pub(super) fn drain(fd: &OwnedFd) {
    let mut events = [0; 8];
    // An error means that there are none.
    let _ = nix::unistd::read(fd.as_fd(), &mut events);
}

/// An event descriptor that can be exchanged under a running ring.
#[derive(Debug, Default)]
pub(super) struct EventSlot {
    fd: Mutex<Option<Arc<OwnedFd>>>,
    generation: AtomicU32,
}

impl EventSlot {
    pub(super) fn set(&self, fd: Option<OwnedFd>) {
        let mut slot = self.fd.lock();
        *slot = fd.map(Arc::new);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A copy of the descriptor that is there.
    pub(super) fn copy(&self) -> std::io::Result<Option<OwnedFd>> {
        self.fd.lock().as_ref().map(|fd| fd.try_clone()).transpose()
    }

    /// Adds an event to whichever descriptor is there.
    pub(super) fn notify(&self) {
        let fd = self.fd.lock().clone();
        if let Some(fd) = fd {
            notify(&fd);
        }
    }
}

/// A ring's view of a slot: looks into it only when it has changed.
#[derive(Debug)]
pub(super) struct EventSource {
    slot: Arc<EventSlot>,
    seen: u32,
    fd: Option<Arc<OwnedFd>>,
}

impl EventSource {
    pub(super) fn new(slot: Arc<EventSlot>) -> Self {
        let mut source = Self { seen: 0, fd: None, slot };
        source.refresh();
        source
    }

    fn refresh(&mut self) {
        let fd = self.slot.fd.lock();
        self.seen = self.slot.generation.load(Ordering::Acquire);
        self.fd = fd.clone();
    }

    #[inline]
    pub(super) fn notify(&mut self) {
        if self.seen != self.slot.generation.load(Ordering::Acquire) {
            self.refresh();
        }
        if let Some(fd) = &self.fd {
            notify(fd);
        }
    }
}
