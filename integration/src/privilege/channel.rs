//! Packets with at most one descriptor.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair, sockopt,
};

use super::protocol::MAX_MESSAGE;
use crate::rights::{self, Received};

/// Both ends of a new channel.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    for socket in [&ours, &theirs] {
        // the default holds a few packets as well; more keeps a busy start from waiting
        let _ = setsockopt(socket, sockopt::SndBuf, &(16 * MAX_MESSAGE));
    }
    Ok((ours, theirs))
}

/// Sends a packet whole.
pub(super) fn send(socket: impl AsFd, packet: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let parts = [IoSlice::new(packet)];
    let raw = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|raw| [ControlMessage::ScmRights(raw)]);
    let control: &[ControlMessage<'_>] = rights.as_ref().map_or(&[], |rights| rights);
    loop {
        match sendmsg::<()>(socket.as_fd().as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes a packet: its bytes and the descriptor that came with it. No bytes: the other end has hung up.
///
/// # Errors
/// What the kernel says; `EMSGSIZE` for a packet that is larger than the buffer or carries more than one descriptor.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(&[u8], Option<OwnedFd>)> {
    let Received { bytes, mut descriptors, cut } = rights::receive(socket, buffer, MsgFlags::empty())?;
    let descriptor = descriptors.pop();
    if cut || !descriptors.is_empty() {
        // What came is closed here.
        return Err(Errno::EMSGSIZE.into());
    }
    Ok((&buffer[..bytes], descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_packet_brings_its_descriptor_and_one_too_many_is_refused() {
        let (ours, theirs) = pair().unwrap();
        let mut buffer = [0; 64];
        let file = File::open("/dev/null").unwrap();
        send(&ours, b"with", Some(file.as_fd())).unwrap();
        send(&ours, b"without", None).unwrap();
        let (bytes, descriptor) = receive(&theirs, &mut buffer).unwrap();
        assert_eq!(bytes, b"with");
        let inode = |fd: &dyn AsRawFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
        assert_eq!(inode(&descriptor.unwrap()), inode(&file));
        assert!(matches!(receive(&theirs, &mut buffer), Ok((b"without", None))));
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        // Two have room where one has, by the kernel's rounding; of three a part would have come.
        for count in [2, 3, 253] {
            let many = vec![file.as_raw_fd(); count];
            let rights = [ControlMessage::ScmRights(&many)];
            sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(b"many")], &rights, MsgFlags::empty(), None).unwrap();
            assert!(receive(&theirs, &mut buffer).is_err());
            assert_eq!(open(), before, "a descriptor is left open");
        }
        send(&ours, &[0; 65], None).unwrap();
        assert!(receive(&theirs, &mut buffer).is_err());
        drop(ours);
        assert!(matches!(receive(&theirs, &mut buffer), Ok(([], None))));
    }
}
