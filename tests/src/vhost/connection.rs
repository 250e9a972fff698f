//! One connection: the messages that a front-end sends.

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
pub(super) const SET_VRING_ERR: u32 = 14;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
pub(super) const ADD_MEM_REG: u32 = 37;

/// Protocol features that this front-end needs: REPLY_ACK, INFLIGHT_SHMFD, CONFIGURE_MEM_SLOTS.
const NEEDED: u64 = 1 << 3 | 1 << 12 | 1 << 15;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
/// How long the server may take over an answer: it is busy, never silent.
const ANSWER: Duration = Duration::from_secs(60);

/// A message's payload from its 64-bit words.
pub(super) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Index and number of a ring's message.
pub(super) fn pair(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// One connection, with features agreed on.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
}

/// In-flight memory as the server made it: description (mmap size and offset, rings, their size) and file.
#[derive(Debug)]
pub(super) struct Inflight {
    description: Vec<u8>,
    file: OwnedFd,
}

impl Connection {
    /// Connects and agrees on everything offered; returns the virtio features too.
    pub(super) fn open(path: &Path) -> Result<(Self, u64)> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut connection = Self { stream };
        let word = |bytes: &[u8]| -> Result<u64> { Ok(u64::from_ne_bytes(bytes.try_into().context("a word")?)) };
        let features = word(&connection.ask(GET_FEATURES, &[])?.0)?;
        let protocol = word(&connection.ask(GET_PROTOCOL_FEATURES, &[])?.0)?;
        if protocol & NEEDED != NEEDED {
            bail!("the server offers protocol features {protocol:#x}, {NEEDED:#x} are needed");
        }
        connection.send(SET_PROTOCOL_FEATURES, 0, &words(&[protocol]), &[])?;
        connection.set(SET_OWNER, &[], &[])?;
        connection.set(SET_FEATURES, &words(&[features]), &[])?;
        Ok((connection, features))
    }

    /// Hands over the in-flight memory, made by the server when there is none yet.
    pub(super) fn share_inflight(&mut self, inflight: &mut Option<Inflight>, rings: u16, size: u16) -> Result<()> {
        if inflight.is_none() {
            let mut asked = [words(&[0, 0]), [rings.to_ne_bytes(), size.to_ne_bytes()].concat()].concat();
            asked.resize(24, 0);
            let (description, file) = self.ask(GET_INFLIGHT_FD, &asked)?;
            let file = file.context("the server sent no in-flight memory")?;
            *inflight = Some(Inflight { description, file });
        }
        let Some(shared) = inflight else { bail!("no in-flight memory") };
        self.set(SET_INFLIGHT_FD, &shared.description, &[shared.file.as_raw_fd()])
    }

    fn send(&mut self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        let length = u32::try_from(payload.len())?;
        let mut message = [code, VERSION | flags, length].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let parts = [IoSlice::new(&message)];
        sendmsg::<()>(self.stream.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// An answer to `code`: payload and descriptor.
    fn receive(&mut self, code: u32) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut header = [0; 12];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let flags = MsgFlags::MSG_WAITALL | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let mut file = None;
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = item {
                // SAFETY: the kernel has just made these descriptors for us, and nothing else knows them.
                file = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).next();
            }
        }
        if message.bytes < header.len() {
            bail!("the server has closed the connection");
        }
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        if word(0) != code {
            bail!("answer to message {} where one to {code} was due", word(0));
        }
        Ok((payload, file))
    }

    /// A message with an answer of its own.
    fn ask(&mut self, code: u32, payload: &[u8]) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        self.send(code, 0, payload, &[])?;
        self.receive(code)
    }

    /// A message that is acknowledged; an error if it is refused.
    pub(super) fn set(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        self.send(code, NEED_REPLY, payload, fds)?;
        let (answer, _) = self.receive(code)?;
        if answer != 0_u64.to_ne_bytes() {
            bail!("the server refuses message {code}");
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
