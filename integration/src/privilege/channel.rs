//! Packets with at most one descriptor. Leaf module: descriptors that the kernel has just made become owned here.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, setsockopt,
    socketpair, sockopt,
};

use super::protocol::MAX_MESSAGE;

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
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let (length, cut, mut owned) = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let mut owned = Vec::new();
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = item {
                // SAFETY: the kernel has just made these descriptors for us, and nothing else knows them.
                owned.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let cut = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        break (message.bytes, cut, owned);
    };
    let descriptor = owned.pop();
    if cut || !owned.is_empty() {
        return Err(Errno::EMSGSIZE.into());
    }
    Ok((&buffer[..length], descriptor))
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
        let two = [file.as_raw_fd(), file.as_raw_fd()];
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        sendmsg::<()>(
            ours.as_raw_fd(),
            &[IoSlice::new(b"two")],
            &[ControlMessage::ScmRights(&two)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        assert!(receive(&theirs, &mut buffer).is_err());
        assert_eq!(open(), before, "a descriptor is left open");
        send(&ours, &[0; 65], None).unwrap();
        assert!(receive(&theirs, &mut buffer).is_err());
        drop(ours);
        assert!(matches!(receive(&theirs, &mut buffer), Ok(([], None))));
    }
}
