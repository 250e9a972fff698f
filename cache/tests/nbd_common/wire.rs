//! What a server in a test's own process says and hears: NBD's fixed newstyle handshake and requests.
//!
//! Source: `doc/proto.md` of the NBD project.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

pub(crate) const FLAG_FUA: u16 = 1 << 3;
pub(crate) const FLAG_FLUSH: u16 = 1 << 2;
pub(crate) const FLAG_MULTI: u16 = 1 << 8;
pub(crate) const FLAG_ZEROES: u16 = 1 << 6;

pub(crate) const DATA: u16 = 1;
pub(crate) const HOLE: u16 = 2;
pub(crate) const NONE: u16 = 0;
pub(crate) const ERROR: u16 = 0x8001;

/// A request as the server got it.
#[derive(Clone, Debug)]
pub(crate) struct Got {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    pub(crate) payload: Vec<u8>,
}

impl Got {
    /// The next request, with what it writes.
    pub(crate) fn take(stream: &mut UnixStream) -> io::Result<Got> {
        let head: [u8; 28] = take(stream)?;
        Got::from_head(head, stream)
    }

    pub(crate) fn from_head(head: [u8; 28], stream: &mut UnixStream) -> io::Result<Got> {
        assert_eq!(head[..4], 0x2560_9513u32.to_be_bytes());
        let mut got = Got {
            flags: u16::from_be_bytes([head[4], head[5]]),
            command: u16::from_be_bytes([head[6], head[7]]),
            cookie: u64::from_be_bytes(head[8..16].try_into().unwrap()),
            offset: u64::from_be_bytes(head[16..24].try_into().unwrap()),
            len: u32::from_be_bytes(head[24..28].try_into().unwrap()),
            payload: Vec::new(),
        };
        if got.command == 1 {
            got.payload = vec![0; got.len as usize];
            stream.read_exact(&mut got.payload)?;
        }
        Ok(got)
    }

    /// Every byte of the export is the low byte of its sector's number.
    pub(crate) fn content(&self) -> Vec<u8> {
        (self.offset..self.offset + u64::from(self.len)).map(|at| (at / 512) as u8).collect()
    }

    pub(crate) fn chunk(&self, done: bool, kind: u16, data: &[u8]) -> Vec<u8> {
        chunk(self.cookie, done, kind, data.len() as u32, data)
    }

    pub(crate) fn data(&self, done: bool, from: usize, to: usize) -> Vec<u8> {
        let mut body = (self.offset + from as u64).to_be_bytes().to_vec();
        body.extend_from_slice(&self.content()[from..to]);
        self.chunk(done, DATA, &body)
    }

    pub(crate) fn hole(&self, done: bool, offset: u64, len: u32) -> Vec<u8> {
        self.chunk(done, HOLE, &[offset.to_be_bytes().as_slice(), &len.to_be_bytes()].concat())
    }

    pub(crate) fn error(&self, error: u32) -> Vec<u8> {
        let body = [error.to_be_bytes().as_slice(), &2u16.to_be_bytes(), b"no"].concat();
        self.chunk(true, ERROR, &body)
    }

    /// What an ordinary server answers.
    pub(crate) fn honest(&self) -> Vec<u8> {
        match self.command {
            0 => self.data(true, 0, self.len as usize),
            _ => self.chunk(true, NONE, &[]),
        }
    }
}

pub(crate) fn chunk(cookie: u64, done: bool, kind: u16, len: u32, data: &[u8]) -> Vec<u8> {
    [
        0x668e_33efu32.to_be_bytes().as_slice(),
        &u16::from(done).to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &len.to_be_bytes(),
        data,
    ]
    .concat()
}

pub(crate) fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    [0x6744_6698u32.to_be_bytes().as_slice(), &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
}

pub(crate) fn take<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    [
        0x0003_e889_0455_65a9u64.to_be_bytes().as_slice(),
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

pub(crate) fn export(size: u64, flags: u16) -> Vec<u8> {
    [0u16.to_be_bytes().as_slice(), &size.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// Fixed newstyle: agrees to every option and serves one export of `size` bytes.
pub(crate) fn handshake(stream: &mut UnixStream, size: u64, flags: u16) -> io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT")?;
    stream.write_all(&3u16.to_be_bytes())?;
    take::<4>(stream)?;
    loop {
        take::<8>(stream)?;
        let option = u32::from_be_bytes(take(stream)?);
        let len = u32::from_be_bytes(take(stream)?);
        stream.read_exact(&mut vec![0; len as usize])?;
        if option == 7 {
            stream.write_all(&option_reply(7, 3, &export(size, flags | 1)))?;
            return stream.write_all(&option_reply(7, 1, &[]));
        }
        stream.write_all(&option_reply(option, 1, &[]))?;
    }
}
