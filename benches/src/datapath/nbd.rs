//! An NBD client that keeps many requests under way on one connection: fixed newstyle negotiation, simple replies in any
//! order (NetworkBlockDevice/nbd, `doc/proto.md`). Requests of one `wait` go out with one system call, and answers come
//! in with as few as the kernel allows.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::load::{Device, Op};

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// FIXED_NEWSTYLE and NO_ZEROES, of the server and of the client.
const FLAGS: u16 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const REQUEST_BYTES: usize = 28;
const REPLY_BYTES: usize = 16;
/// An option's answer is small; more is not the protocol.
const OPTION_REPLY_MAX_BYTES: u32 = 64 << 10;
/// A server that does not answer for so long is broken.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection.
#[derive(Debug)]
pub(super) struct Nbd {
    stream: UnixStream,
    /// Size of the export.
    pub(super) size_bytes: u64,
    buffers: Vec<Vec<u8>>,
    /// By slot: what is under way.
    under_way: Vec<Option<(Op, usize)>>,
    requests: Vec<u8>,
    /// Received and not used: `answers[from..to]`.
    answers: Vec<u8>,
    from: usize,
    to: usize,
}

fn exact<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).context("the NBD server hung up")?;
    Ok(bytes)
}

fn u16_of(stream: &mut impl Read) -> Result<u16> {
    exact(stream).map(u16::from_be_bytes)
}

fn u32_of(stream: &mut impl Read) -> Result<u32> {
    exact(stream).map(u32::from_be_bytes)
}

fn u64_of(stream: &mut impl Read) -> Result<u64> {
    exact(stream).map(u64::from_be_bytes)
}

impl Nbd {
    /// Connects to an export (the default one is ""), with buffers for `depth` requests of `len_bytes`.
    pub(super) fn connect(socket: &Path, export: &str, depth: usize, len_bytes: usize) -> Result<Self> {
        let open = || -> Result<(UnixStream, u64)> {
            let mut stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(LIMIT))?;
            stream.set_write_timeout(Some(LIMIT))?;
            let size_bytes = negotiate(&mut stream, export)?;
            Ok((stream, size_bytes))
        };
        let (stream, size_bytes) = open().with_context(|| format!("cannot connect to {}", socket.display()))?;
        let answer_bytes = (REPLY_BYTES + len_bytes) * depth.clamp(2, 16);
        Ok(Self {
            stream,
            size_bytes,
            buffers: vec![vec![0; len_bytes]; depth],
            under_way: vec![None; depth],
            requests: Vec::with_capacity(depth * (REQUEST_BYTES + len_bytes)),
            answers: vec![0; answer_bytes],
            from: 0,
            to: 0,
        })
    }

    /// Uses the answers that have arrived whole.
    fn settle(&mut self, done: &mut Vec<usize>) -> Result<()> {
        loop {
            let held = &self.answers[self.from..self.to];
            let Some((mut head, body)) = held.split_at_checked(REPLY_BYTES) else { return Ok(()) };
            let (magic, error, cookie) = (u32_of(&mut head)?, u32_of(&mut head)?, u64_of(&mut head)?);
            ensure!(magic == REPLY_MAGIC, "no simple reply: magic {magic:#x}");
            ensure!(error == 0, "request failed: NBD error {error}");
            let slot = usize::try_from(cookie).unwrap_or(usize::MAX);
            let Some((op, len)) = self.under_way.get(slot).copied().flatten() else {
                bail!("an answer to a request that was not made: cookie {cookie:#x}");
            };
            let payload = if op == Op::Read { len } else { 0 };
            let Some(bytes) = body.get(..payload) else { return Ok(()) };
            self.buffers[slot][..payload].copy_from_slice(bytes);
            self.under_way[slot] = None;
            self.from += REPLY_BYTES + payload;
            done.push(slot);
        }
    }
}

/// Negotiates one export; returns its size.
fn negotiate(stream: &mut UnixStream, export: &str) -> Result<u64> {
    ensure!(u64_of(stream)? == MAGIC && u64_of(stream)? == OPTION_MAGIC, "no NBD server");
    let flags = u16_of(stream)?;
    ensure!(flags & FLAGS == FLAGS, "no fixed newstyle NBD server: flags {flags:#x}");
    stream.write_all(&u32::from(FLAGS).to_be_bytes())?;
    let name = export.as_bytes();
    let mut go = Vec::new();
    go.extend(OPTION_MAGIC.to_be_bytes());
    go.extend(OPTION_GO.to_be_bytes());
    go.extend(u32::try_from(name.len() + 6)?.to_be_bytes());
    go.extend(u32::try_from(name.len())?.to_be_bytes());
    go.extend(name);
    go.extend(0u16.to_be_bytes());
    stream.write_all(&go)?;
    let mut size_bytes = None;
    loop {
        ensure!(u64_of(stream)? == OPTION_REPLY_MAGIC, "no answer to an option");
        let (_option, kind, len) = (u32_of(stream)?, u32_of(stream)?, u32_of(stream)?);
        ensure!(len <= OPTION_REPLY_MAX_BYTES, "an option's answer of {len} bytes");
        let mut body = vec![0; len as usize];
        stream.read_exact(&mut body)?;
        let mut body = body.as_slice();
        match kind {
            REPLY_ACK => return size_bytes.context("the server did not tell the export's size"),
            REPLY_INFO if u16_of(&mut body)? == INFO_EXPORT => size_bytes = Some(u64_of(&mut body)?),
            REPLY_INFO => {}
            _ => bail!("the server refuses export `{export}`: answer {kind:#x}"),
        }
    }
}

fn request(out: &mut Vec<u8>, command: u16, cookie: u64, offset: u64, len: u32) {
    out.extend(REQUEST_MAGIC.to_be_bytes());
    out.extend(0u16.to_be_bytes());
    out.extend(command.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(offset.to_be_bytes());
    out.extend(len.to_be_bytes());
}

impl Device for Nbd {
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len: usize) -> Result<()> {
        let command = if op == Op::Read { COMMAND_READ } else { COMMAND_WRITE };
        request(&mut self.requests, command, slot as u64, offset, u32::try_from(len)?);
        if op == Op::Write {
            self.requests.extend_from_slice(&self.buffers[slot][..len]);
        }
        self.under_way[slot] = Some((op, len));
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<usize>) -> Result<()> {
        if !self.requests.is_empty() {
            self.stream.write_all(&self.requests).context("cannot send to the NBD server")?;
            self.requests.clear();
        }
        let before = done.len();
        self.settle(done)?;
        while done.len() == before {
            // What is left of an answer goes to the front, so that the rest of it has room.
            self.answers.copy_within(self.from..self.to, 0);
            (self.to, self.from) = (self.to - self.from, 0);
            let count = self.stream.read(&mut self.answers[self.to..]).context("no answer of the NBD server")?;
            ensure!(count > 0, "the NBD server hung up");
            self.to += count;
            self.settle(done)?;
        }
        Ok(())
    }

    fn buffer(&mut self, slot: usize, len: usize) -> &mut [u8] {
        &mut self.buffers[slot][..len]
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let mut goodbye = Vec::new();
        request(&mut goodbye, COMMAND_DISCONNECT, 0, 0, 0);
        let _ = self.stream.write_all(&goodbye);
    }
}

/// A server that answers reads at once, with bytes that mean nothing: the ceiling of the client. Serves one connection
/// until it ends.
pub(super) fn answer_only(stream: UnixStream, size_bytes: u64) -> Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = std::io::BufReader::with_capacity(1 << 16, stream);
    writer.write_all(&[MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat())?;
    writer.write_all(&FLAGS.to_be_bytes())?;
    let _client_flags = u32_of(&mut reader)?;
    ensure!(
        u64_of(&mut reader)? == OPTION_MAGIC && u32_of(&mut reader)? == OPTION_GO,
        "not the client of this program"
    );
    let len = u32_of(&mut reader)?;
    ensure!(len <= OPTION_REPLY_MAX_BYTES, "an option of {len} bytes");
    reader.read_exact(&mut vec![0; len as usize])?;
    let answer = |kind: u32, body: &[u8]| {
        let len = (body.len() as u32).to_be_bytes();
        [&OPTION_REPLY_MAGIC.to_be_bytes(), &OPTION_GO.to_be_bytes()[..], &kind.to_be_bytes(), &len, body].concat()
    };
    let info = [&INFO_EXPORT.to_be_bytes(), &size_bytes.to_be_bytes()[..], &1u16.to_be_bytes()].concat();
    writer.write_all(&answer(REPLY_INFO, &info))?;
    writer.write_all(&answer(REPLY_ACK, &[]))?;
    let mut out = vec![0; 0];
    loop {
        let (magic, _flags, command) = (u32_of(&mut reader)?, u16_of(&mut reader)?, u16_of(&mut reader)?);
        let (cookie, _offset, len) = (u64_of(&mut reader)?, u64_of(&mut reader)?, u32_of(&mut reader)?);
        ensure!(magic == REQUEST_MAGIC && len <= 64 << 20, "no request");
        if command != COMMAND_READ {
            return Ok(());
        }
        out.extend(REPLY_MAGIC.to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.resize(out.len() + len as usize, 0);
        // Whatever else has arrived is answered with it.
        if reader.buffer().len() < REQUEST_BYTES {
            writer.write_all(&out)?;
            out.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prestage_tests::paths::Scratch;

    #[test]
    fn answers_find_their_requests_however_they_are_cut() {
        let scratch = Scratch::new().unwrap();
        let socket = scratch.join("nbd.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || answer_only(listener.accept().unwrap().0, 1 << 30));
        let mut device = Nbd::connect(&socket, "", 8, 1 << 17).unwrap();
        assert_eq!(device.size_bytes, 1 << 30);
        for round in 0..50usize {
            let mut expected = Vec::new();
            for slot in 0..8 {
                device.buffer(slot, 1 << 17).fill(7);
                let len = 512 * (1 + (round * 8 + slot) % 256);
                device.submit(slot, Op::Read, 0, len).unwrap();
                expected.push(len);
            }
            let mut done = Vec::new();
            while done.len() < 8 {
                device.wait(&mut done).unwrap();
            }
            done.sort_unstable();
            assert_eq!(done, [0, 1, 2, 3, 4, 5, 6, 7]);
            for (slot, len) in expected.into_iter().enumerate() {
                let data = device.buffer(slot, 1 << 17);
                assert!(data[..len].iter().all(|byte| *byte == 0) && data[len..].iter().all(|byte| *byte == 7));
            }
        }
        drop(device);
        server.join().unwrap().unwrap();
    }
}
