//! A message on the socket: magic, its length and its number of descriptors; the bytes; then the descriptors, as many as the
//! kernel takes at once with a byte each time.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::rights::{self, Received};

const MAGIC: [u8; 8] = *b"PSHANDOV";
/// Largest message: thousands of disks.
const BYTES_MAX: u32 = 64 << 20;
const FDS_MAX: u32 = 1 << 20;
/// At most 253 (SCM_MAX_FD of the kernel).
const FDS_AT_ONCE: usize = 200;

pub(super) fn send(mut stream: &UnixStream, body: &[u8], fds: &[&OwnedFd]) -> io::Result<()> {
    let too_large = |_| io::Error::other("the message is too large");
    let (bytes, count) = (u32::try_from(body.len()).map_err(too_large)?, u32::try_from(fds.len()).map_err(too_large)?);
    if bytes > BYTES_MAX || count > FDS_MAX {
        return Err(io::Error::other("the message is too large"));
    }
    stream.write_all(&[&MAGIC[..], &bytes.to_le_bytes(), &count.to_le_bytes()].concat())?;
    stream.write_all(body)?;
    for chunk in fds.chunks(FDS_AT_ONCE) {
        let numbers: Vec<RawFd> = chunk.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    }
    Ok(())
}

pub(super) fn receive(mut stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut head = [0; 16];
    stream.read_exact(&mut head)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (bytes, count) = (word(8), word(12));
    if head[..8] != MAGIC || bytes > BYTES_MAX || count > FDS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no message of a prestaged"));
    }
    let mut body = vec![0; bytes as usize];
    stream.read_exact(&mut body)?;
    let mut fds = Vec::new();
    while fds.len() < count as usize {
        let got = receive_fds(stream)?;
        if got.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "descriptors are missing; is the limit on open files too low?",
            ));
        }
        fds.extend(got);
    }
    Ok((body, fds))
}

fn receive_fds(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let Received { bytes, descriptors, cut } = rights::receive(stream, &mut [0], MsgFlags::empty())?;
    match bytes {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        // What came is closed here.
        _ if cut => Ok(Vec::new()),
        _ => Ok(descriptors),
    }
}
