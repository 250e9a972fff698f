//! Requests of a client: headers taken apart and held to what was agreed on.
//!
//! - [`Requests`]: bytes → [`Event`]s
//! - [`Request`], [`Command`]: one that may be carried out
//!
//! A request that breaks a rule comes out as [`Event::Refused`], with the error that the protocol names for it; the
//! payload of such a write is skipped, whatever its length, and takes no memory.

use super::handshake::Agreement;
use super::wire::{Cursor, NbdError, PAYLOAD_MAX_BYTES, REQUEST_BYTES, REQUEST_MAGIC, cmd};

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    Read,
    /// `len_bytes` of payload follow the header.
    Write {
        /// On stable storage before it is answered.
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    /// Will be read soon.
    Cache,
    WriteZeroes {
        fua: bool,
        /// The store may free the space.
        may_unmap: bool,
    },
    BlockStatus {
        /// One extent is enough, and it must not be longer than the request.
        one: bool,
    },
}

/// A request within the export and the limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The client's own number for it.
    pub cookie: u64,
    pub command: Command,
    pub offset_bytes: u64,
    /// At most [`PAYLOAD_MAX_BYTES`] for reads and writes.
    pub len_bytes: u32,
}

/// What a header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// Carry this out and answer. After a write's header, the caller takes the payload before it asks for the next event.
    Request(Request),
    /// Answer with this error.
    Refused { cookie: u64, error: NbdError, why: &'static str },
    /// The client has gone in peace: answer what is under way, then close.
    Disconnect,
}

/// Something that is no request: where the next one begins is not known, so the connection must be closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a request begins with {0:#010x}, which is not NBD")]
pub struct BadMagic(pub u32);

/// A client's requests, one after the other.
#[derive(Debug)]
pub struct Requests {
    size_bytes: u64,
    read_only: bool,
    can_trim: bool,
    structured: bool,
    allocation: bool,
    /// Payload of a refused write that is still to come, and the refusal that goes out behind it.
    skip: u32,
    refused: Option<Event>,
}

type Refusal = (NbdError, &'static str);

impl Requests {
    pub fn new(agreement: &Agreement) -> Requests {
        Requests {
            size_bytes: agreement.export.size_bytes,
            read_only: agreement.export.read_only,
            can_trim: agreement.export.can_trim,
            structured: agreement.structured,
            allocation: agreement.allocation,
            skip: 0,
            refused: None,
        }
    }

    /// Takes the next header off `input`. Returns the bytes taken, and what they mean once there are enough of them.
    ///
    /// # Errors
    /// [`BadMagic`].
    pub fn next(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), BadMagic> {
        let mut at = 0;
        loop {
            let skipped = (self.skip as usize).min(input.len() - at);
            self.skip -= skipped as u32;
            at += skipped;
            if self.skip > 0 {
                return Ok((at, None));
            }
            if let Some(event) = self.refused.take() {
                return Ok((at, Some(event)));
            }
            let Some(header) = input[at..].first_chunk::<REQUEST_BYTES>() else {
                // Four bytes are enough to see that it is none.
                return match Cursor(&input[at..]).u32() {
                    Some(magic) if magic != REQUEST_MAGIC => Err(BadMagic(magic)),
                    _ => Ok((at, None)),
                };
            };
            let event = self.parse(header)?;
            at += REQUEST_BYTES;
            if self.skip == 0 {
                return Ok((at, Some(event)));
            }
            // Clients (libnbd) do not expect an answer before they have sent all of a write.
            self.refused = Some(event);
        }
    }

    fn parse(&mut self, header: &[u8; REQUEST_BYTES]) -> Result<Event, BadMagic> {
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let double = |at: usize| u64::from(long(at)) << 32 | u64::from(long(at + 4));
        let (magic, flags, kind) = (long(0), word(4), word(6));
        let (cookie, offset_bytes, len_bytes) = (double(8), double(16), long(24));
        if magic != REQUEST_MAGIC {
            return Err(BadMagic(magic));
        }
        if kind == cmd::DISC {
            return Ok(Event::Disconnect);
        }
        Ok(match self.check(kind, flags, offset_bytes, len_bytes) {
            Ok(command) => Event::Request(Request { cookie, command, offset_bytes, len_bytes }),
            Err((error, why)) => {
                if kind == cmd::WRITE {
                    self.skip = len_bytes;
                }
                Event::Refused { cookie, error, why }
            }
        })
    }

    fn check(&self, kind: u16, flags: u16, offset: u64, len: u32) -> Result<Command, Refusal> {
        // FUA is to be put up with everywhere.
        let (fua, more) = (flags & cmd::FLAG_FUA != 0, flags & !cmd::FLAG_FUA);
        let (command, known) = match kind {
            cmd::READ => (Command::Read, if self.structured { cmd::FLAG_DF } else { 0 }),
            cmd::WRITE => (Command::Write { fua }, 0),
            cmd::FLUSH => (Command::Flush, 0),
            cmd::TRIM => (Command::Trim { fua }, 0),
            cmd::CACHE => (Command::Cache, 0),
            cmd::WRITE_ZEROES => {
                (Command::WriteZeroes { fua, may_unmap: flags & cmd::FLAG_NO_HOLE == 0 }, cmd::FLAG_NO_HOLE)
            }
            cmd::BLOCK_STATUS => (Command::BlockStatus { one: flags & cmd::FLAG_REQ_ONE != 0 }, cmd::FLAG_REQ_ONE),
            _ => return Err((NbdError::Inval, "unknown command")),
        };
        if more & !known != 0 {
            return Err((NbdError::Inval, "a flag that this command does not have"));
        }
        let writes = matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. });
        if writes && self.read_only {
            return Err((NbdError::Perm, "the export is read-only"));
        }
        let within = offset.checked_add(u64::from(len)).is_some_and(|end| end <= self.size_bytes);
        match command {
            Command::Flush if (offset, len) != (0, 0) => Err((NbdError::Inval, "a flush has no range")),
            Command::Trim { .. } if !self.can_trim => Err((NbdError::Inval, "the export cannot be trimmed")),
            Command::BlockStatus { .. } if !self.allocation => {
                Err((NbdError::Inval, "base:allocation was not agreed on"))
            }
            Command::BlockStatus { .. } if len == 0 => Err((NbdError::Inval, "nothing has no status")),
            Command::Read if len > PAYLOAD_MAX_BYTES && self.structured => {
                Err((NbdError::Overflow, "more than 32 MiB in one read"))
            }
            Command::Read | Command::Write { .. } if len > PAYLOAD_MAX_BYTES => {
                Err((NbdError::Inval, "more than 32 MiB in one request"))
            }
            Command::Write { .. } | Command::WriteZeroes { .. } if !within => {
                Err((NbdError::NoSpc, "beyond the end of the export"))
            }
            _ if !within => Err((NbdError::Inval, "beyond the end of the export")),
            _ => Ok(command),
        }
    }
}

#[cfg(test)]
mod tests;
