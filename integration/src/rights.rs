//! Descriptors that come over a unix socket (unix(7), `SCM_RIGHTS`). Leaf module: what the kernel has just made becomes owned here.
//!
//! All of them: also those of a message that was cut, of which the kernel makes as many as there is room for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

/// Room for this many descriptors: the kernel sends no more at once (`SCM_MAX_FD`).
const MOST: usize = 253;
/// `CMSG_SPACE` of them, in words, which are aligned as a `cmsghdr` is.
const CONTROL_WORDS: usize = size_of::<libc::cmsghdr>() / size_of::<usize>() + MOST.div_ceil(2);

/// A message.
#[derive(Debug)]
pub(crate) struct Received {
    /// Of the buffer.
    pub(crate) bytes: usize,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Bytes or descriptors are missing: they did not fit, or this process has as many open as it may have.
    pub(crate) cut: bool,
}

/// Takes one message, all of whose descriptors are closed by programs that this process becomes. Is tried again when interrupted.
///
/// # Errors
/// What the kernel says.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8], flags: MsgFlags) -> io::Result<Received> {
    let mut control = [0_usize; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zero is a message without address, parts and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    let bytes = loop {
        // SAFETY: the message names one part and control data, both of which are as long as it says and live until this returns.
        match Errno::result(unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags) }) {
            // Nothing was written to then.
            Err(Errno::EINTR) => {}
            other => break other?.unsigned_abs(),
        }
    };
    let cut = MsgFlags::from_bits_retain(message.msg_flags).intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    Ok(Received { bytes, descriptors: descriptors(&message), cut })
}

/// Those of a message that recvmsg(2) has just filled in, to be called once.
fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut owned = Vec::new();
    // SAFETY: the control data is as long as the kernel has noted, and aligned.
    let mut item = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: not null, so a header of the control data.
    while let Some(header) = unsafe { item.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: it is a header.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(item) }.cast();
            // SAFETY: a number alone.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            for index in 0..header.cmsg_len.saturating_sub(head) / size_of::<RawFd>() {
                // SAFETY: within the data of this header, by its length.
                let place = unsafe { data.add(index) };
                // SAFETY: there a descriptor's number is.
                let number = unsafe { ptr::read_unaligned(place) };
                // SAFETY: the kernel has just made this descriptor for us, and nothing else knows it.
                owned.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: the header is one of this message's.
        item = unsafe { libc::CMSG_NXTHDR(message, item) };
    }
    owned
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, SockType, sendmsg, socketpair};
    use std::fs::File;
    use std::io::IoSlice;

    /// Numbers of this process's descriptors of the file.
    fn open(file: &std::path::Path) -> usize {
        let numbers = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        numbers.filter(|number| std::fs::read_link(number.path()).is_ok_and(|meant| meant == file)).count()
    }

    #[test]
    fn what_comes_is_owned_however_much_it_is() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let named = tempfile::NamedTempFile::new().unwrap();
        let file = File::open(named.path()).unwrap();
        let before = open(named.path());
        for count in [0, 1, 2, 3, 100, MOST] {
            let raw = vec![file.as_raw_fd(); count];
            let rights = [ControlMessage::ScmRights(&raw)];
            let control = if count > 0 { &rights[..] } else { &[] };
            sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(b"x")], control, MsgFlags::empty(), None).unwrap();
            let mut buffer = [0; 8];
            let Received { bytes, descriptors, cut } = receive(&theirs, &mut buffer, MsgFlags::empty()).unwrap();
            assert_eq!((bytes, descriptors.len(), cut), (1, count, false));
            assert_eq!(open(named.path()), before + count);
            drop(descriptors);
            assert_eq!(open(named.path()), before, "a descriptor is left open");
        }
    }
}
