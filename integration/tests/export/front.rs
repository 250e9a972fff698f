//! A front-end that sends any message it is told to, and a guest with one split ring in its memory.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::disk::LIMIT;

/// Request codes (QEMU, docs/interop/vhost-user.rst).
pub(crate) mod code {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}

const NEED_REPLY: u32 = 1 << 3;

/// A message's payload from its 64-bit words.
pub(crate) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Index and number of a ring's message.
pub(crate) fn pair(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// One connection.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    stream: UnixStream,
    agreed: bool,
}

impl FrontEnd {
    /// Connects, and says nothing.
    pub(crate) fn mute(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Self { stream, agreed: false }
    }

    /// Connects and agrees on everything offered.
    pub(crate) fn connect(path: &Path) -> Self {
        let mut front = Self::mute(path);
        let features = front.ask(code::GET_FEATURES, &[]).unwrap();
        let protocol = front.ask(code::GET_PROTOCOL_FEATURES, &[]).unwrap();
        front.send(code::SET_PROTOCOL_FEATURES, 0, &protocol, &[]).unwrap();
        front.set(code::SET_OWNER, &[], &[]).unwrap();
        front.set(code::SET_FEATURES, &features, &[]).unwrap();
        front.agreed = true;
        front
    }

    /// Have features been agreed on?
    pub(crate) fn agreed(&self) -> bool {
        self.agreed
    }

    pub(crate) fn send(&mut self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> std::io::Result<()> {
        let mut message = [code, 1 | flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
        message.extend(payload);
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let parts = [IoSlice::new(&message)];
        sendmsg::<()>(self.stream.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// Bytes that need be no message.
    pub(crate) fn send_raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// An answer: code, payload, descriptor.
    pub(crate) fn receive(&mut self) -> std::io::Result<(u32, Vec<u8>, Option<OwnedFd>)> {
        let mut header = [0; 12];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_WAITALL)?;
        let mut fd = None;
        for item in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = item {
                // SAFETY: received just now, owned by nobody else.
                fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
            }
        }
        if message.bytes < 12 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        Ok((word(0), payload, fd))
    }

    /// A message with an answer of its own.
    pub(crate) fn ask(&mut self, code: u32, payload: &[u8]) -> std::io::Result<Vec<u8>> {
        self.ask_for_fd(code, payload).map(|(answer, _)| answer)
    }

    pub(crate) fn ask_for_fd(&mut self, code: u32, payload: &[u8]) -> std::io::Result<(Vec<u8>, Option<OwnedFd>)> {
        self.send(code, 0, payload, &[])?;
        let (answered, answer, fd) = self.receive()?;
        assert_eq!(answered, code);
        Ok((answer, fd))
    }

    /// A message that is acknowledged; an error if it is refused.
    pub(crate) fn set(&mut self, code: u32, payload: &[u8], fds: &[RawFd]) -> std::io::Result<()> {
        self.send(code, NEED_REPLY, payload, fds)?;
        let (answered, answer, _) = self.receive()?;
        assert_eq!(answered, code);
        if answer == 0_u64.to_ne_bytes() { Ok(()) } else { Err(std::io::Error::other("refused")) }
    }

    /// Has the export closed the connection? Waits for it.
    pub(crate) fn is_cut_off(&mut self) -> bool {
        loop {
            match self.stream.read(&mut [0; 4096]) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    /// The disk's size as the configuration space says.
    pub(crate) fn capacity_bytes(&mut self) -> u64 {
        let mut payload = [0, 60, 0_u32].map(u32::to_ne_bytes).concat();
        payload.resize(12 + 60, 0);
        let answer = self.ask(code::GET_CONFIG, &payload).unwrap();
        u64::from_le_bytes(answer[12..20].try_into().unwrap()) * 512
    }
}

pub(crate) const RING: u16 = 16;
pub(crate) const GUEST_BYTES: u64 = 1 << 20;
const GUEST: u64 = 0x100_0000;
const USER: u64 = 0x7f00_0000_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x1_0000;

/// A guest with one ring of 16: four requests at a time, of three descriptors each.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) memory: File,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
    available: u16,
    used: u16,
}

fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap()
}

impl Guest {
    pub(crate) fn new() -> Self {
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(GUEST_BYTES).unwrap();
        Self { memory, kick: event(), call: event(), err: event(), available: 0, used: 0 }
    }

    /// Region of this guest's memory: guest address, size, front-end address, file offset.
    pub(crate) fn region() -> [u64; 4] {
        [GUEST, GUEST_BYTES, USER, 0]
    }

    pub(crate) fn ring_addresses(index: u32) -> Vec<u8> {
        // Index and flags, then descriptors, used, available, log.
        [pair(index, 0), words(&[USER, USER + USED, USER + AVAILABLE, 0])].concat()
    }

    /// Shares the memory and starts ring 0.
    pub(crate) fn start(&self, front: &mut FrontEnd) {
        let [guest, len, user, offset] = Self::region();
        front.set(code::ADD_MEM_REG, &words(&[0, guest, len, user, offset]), &[self.memory.as_raw_fd()]).unwrap();
        self.start_ring(front, self.used);
    }

    /// Starts ring 0 from a base.
    pub(crate) fn start_ring(&self, front: &mut FrontEnd, base: u16) {
        front.set(code::SET_VRING_NUM, &pair(0, u32::from(RING)), &[]).unwrap();
        front.set(code::SET_VRING_BASE, &pair(0, u32::from(base)), &[]).unwrap();
        front.set(code::SET_VRING_ADDR, &Self::ring_addresses(0), &[]).unwrap();
        front.set(code::SET_VRING_KICK, &words(&[0]), &[fd(&self.kick)]).unwrap();
        front.set(code::SET_VRING_CALL, &words(&[0]), &[fd(&self.call)]).unwrap();
        front.set(code::SET_VRING_ERR, &words(&[0]), &[fd(&self.err)]).unwrap();
        front.set(code::SET_VRING_ENABLE, &pair(0, 1), &[]).unwrap();
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    /// Bytes of guest memory.
    pub(crate) fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Makes a request of one sector available (slots 0 to 4) and kicks.
    pub(crate) fn submit(&mut self, slot: u16, kind: u32, sector: u64) {
        let base = BUFFERS + u64::from(slot) * 0x1000;
        self.write(base, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.write(base + 0x800, &[0xFF]);
        let head = slot * 3;
        let data_flags = if kind == 0 { 3 } else { 1 };
        for (turn, (addr, len, flags)) in
            [(base, 16_u32, 1_u16), (base + 0x200, 512, data_flags), (base + 0x800, 1, 2)].into_iter().enumerate()
        {
            let index = head + turn as u16;
            let desc = [
                &(GUEST + addr).to_le_bytes()[..],
                &len.to_le_bytes(),
                &flags.to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ];
            self.write(16 * u64::from(index), &desc.concat());
        }
        self.write(AVAILABLE + 4 + 2 * u64::from(self.available % RING), &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Names a descriptor that does not exist.
    pub(crate) fn misbehave(&mut self) {
        self.write(AVAILABLE + 4 + 2 * u64::from(self.available % RING), &999_u16.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// The data of a slot.
    pub(crate) fn data(&self, slot: u16) -> [u8; 512] {
        self.read(BUFFERS + u64::from(slot) * 0x1000 + 0x200)
    }

    pub(crate) fn set_data(&self, slot: u16, data: &[u8; 512]) {
        self.write(BUFFERS + u64::from(slot) * 0x1000 + 0x200, data);
    }

    /// The slots that have been answered since the last call, with their statuses.
    pub(crate) fn answered(&mut self) -> Vec<(u16, u8)> {
        let index = u16::from_le_bytes(self.read(USED + 2));
        let mut slots = Vec::new();
        while self.used != index {
            let head: [u8; 4] = self.read(USED + 4 + 8 * u64::from(self.used % RING));
            let slot = (u32::from_le_bytes(head) / 3) as u16;
            let [status] = self.read(BUFFERS + u64::from(slot) * 0x1000 + 0x800);
            slots.push((slot, status));
            self.used = self.used.wrapping_add(1);
        }
        slots
    }

    /// Waits for interrupts until so many requests have been answered; returns them by slot.
    pub(crate) fn wait_answered(&mut self, count: usize) -> Vec<(u16, u8)> {
        let mut slots = self.answered();
        while slots.len() < count {
            // Asks for an interrupt at the next answer, then looks once more before it sleeps.
            self.write(AVAILABLE + 4 + 2 * u64::from(RING), &self.used.to_le_bytes());
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            slots.extend(self.answered());
            if slots.len() < count {
                wait_readable(&self.call);
            }
        }
        slots.sort_unstable();
        slots
    }

    /// The ring's used index.
    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le_bytes(self.read(USED + 2))
    }
}

/// Waits for an event and takes it.
pub(crate) fn wait_readable(event: &EventFd) {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(LIMIT).unwrap();
    assert_eq!(poll(&mut fds, limit).unwrap(), 1, "no event within {LIMIT:?}");
    event.read().unwrap();
}

pub(crate) fn fd(event: &EventFd) -> RawFd {
    use std::os::fd::AsFd;
    event.as_fd().as_raw_fd()
}
