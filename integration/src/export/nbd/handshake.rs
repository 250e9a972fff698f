//! Negotiation: from the greeting to an export.
//!
//! - [`Handshake`]: takes the client's bytes, appends the answers
//! - [`Exports`], [`ExportInfo`]: what there is
//! - [`Agreement`]: what transmission begins with
//!
//! With [`Security::Required`] nothing but `STARTTLS` and `ABORT` is answered in the clear (the protocol's FORCEDTLS), and
//! nothing that was agreed on before TLS counts after it.

use super::wire::{
    ALLOCATION, ALLOCATION_ID, Cursor, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, OPTION_BYTES, OPTION_DATA_MAX_BYTES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX_BYTES, PREFERRED_BLOCK_BYTES, Put, SERVER_MAGIC, STRING_MAX_BYTES,
    can, info, opt, rep,
};

/// Options that one client may send. Every client known manages with a dozen.
const OPTIONS_MAX: u32 = 64;

/// What a client may choose from.
pub trait Exports {
    /// The export of this name. The empty name asks for the default export, if there is one.
    fn find(&self, name: &str) -> Option<ExportInfo>;
    /// All names, for a client that asks.
    fn names(&self) -> Vec<String>;
}

/// What a client is told of an export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// At most 4096 bytes.
    pub name: String,
    /// For people; at most 4096 bytes.
    pub description: String,
    pub size_bytes: u64,
    pub read_only: bool,
    /// The store can let go of what is trimmed.
    pub can_trim: bool,
}

impl ExportInfo {
    fn flags(&self, structured: bool) -> u16 {
        let writable = match (self.read_only, self.can_trim) {
            (true, _) => can::READ_ONLY,
            (false, false) => can::WRITE_ZEROES,
            (false, true) => can::WRITE_ZEROES | can::TRIM,
        };
        let fragments = if structured { can::DF } else { 0 };
        can::HAS_FLAGS | can::FLUSH | can::FUA | can::MULTI_CONN | can::CACHE | writable | fragments
    }
}

/// Whether a client must speak TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Security {
    /// Nobody but the socket's owners can connect: TLS is not offered.
    None,
    Required,
}

/// What was agreed on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreement {
    pub export: ExportInfo,
    /// Reads are answered with structured replies.
    pub structured: bool,
    /// The client may ask which parts are allocated.
    pub allocation: bool,
}

/// What to do once the answers have been sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Come again with more bytes.
    More,
    /// Speak TLS from here on; bytes that have come already are not the client's right to send. Then
    /// [`Handshake::tls_started`].
    StartTls,
    /// The next byte belongs to a request.
    Enter(Agreement),
    /// Close the connection.
    Close,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    ClientFlags,
    Option,
    /// Data of an option that is too long to be looked at.
    Skip(u64),
    Ended,
}

/// One client's negotiation.
#[derive(Debug)]
pub struct Handshake {
    security: Security,
    state: State,
    tls: bool,
    no_zeroes: bool,
    structured: bool,
    /// For which export `base:allocation` was chosen.
    allocation: Option<String>,
    options: u32,
}

/// An option that cannot be granted: its reply's type and a word of why.
type Refusal = (u32, &'static str);

impl Handshake {
    pub fn new(security: Security) -> Handshake {
        Handshake {
            security,
            state: State::ClientFlags,
            tls: false,
            no_zeroes: false,
            structured: false,
            allocation: None,
            options: 0,
        }
    }

    /// The server's first words.
    pub fn greet(&self, out: &mut Vec<u8>) {
        out.put_u64(SERVER_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    }

    /// The client speaks TLS now. What it said in the clear may have been said by anybody.
    pub fn tls_started(&mut self) {
        self.tls = true;
        self.structured = false;
        self.allocation = None;
    }

    /// Takes what it can of `input` and appends answers to `out`. Returns the bytes taken; the rest must come again, with
    /// more behind it. It never wants more than [`HANDSHAKE_BUFFER_BYTES`](super::HANDSHAKE_BUFFER_BYTES) at once.
    pub fn receive(&mut self, input: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> (usize, Step) {
        let mut taken = 0;
        loop {
            let rest = &input[taken..];
            let (used, step) = match self.state {
                State::ClientFlags => self.client_flags(rest),
                State::Option => self.option(rest, exports, out),
                State::Skip(left) => {
                    let used = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    let left = left - used as u64;
                    self.state = if left == 0 { State::Option } else { State::Skip(left) };
                    (used, Step::More)
                }
                State::Ended => (0, Step::Close),
            };
            taken += used;
            match step {
                Step::More if used > 0 && taken < input.len() => {}
                Step::Close | Step::Enter(_) => {
                    self.state = State::Ended;
                    return (taken, step);
                }
                _ => return (taken, step),
            }
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Step) {
        let Some(flags) = Cursor(input).u32() else { return (0, Step::More) };
        if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
            return (4, Step::Close);
        }
        self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
        self.state = State::Option;
        (4, Step::More)
    }

    fn option(&mut self, input: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> (usize, Step) {
        let mut cursor = Cursor(input);
        let (Some(magic), Some(option), Some(len)) = (cursor.u64(), cursor.u32(), cursor.u32()) else {
            return (0, Step::More);
        };
        if magic != OPTION_MAGIC {
            return (OPTION_BYTES, Step::Close);
        }
        if len as usize > OPTION_DATA_MAX_BYTES {
            if option == opt::EXPORT_NAME || !self.count() {
                return (OPTION_BYTES, Step::Close);
            }
            refuse(out, option, (rep::ERR_TOO_BIG, "more data than any option needs"));
            self.state = State::Skip(u64::from(len));
            return (OPTION_BYTES, Step::More);
        }
        let Some(data) = cursor.take(len as usize) else { return (0, Step::More) };
        let step = if self.count() { self.answer(option, data, exports, out) } else { Step::Close };
        (OPTION_BYTES + data.len(), step)
    }

    /// Counts an option; false when there were too many.
    fn count(&mut self) -> bool {
        self.options += 1;
        self.options <= OPTIONS_MAX
    }

    fn answer(&mut self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        let clear = self.security == Security::Required && !self.tls;
        let answered = match option {
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Step::Close;
            }
            opt::STARTTLS => {
                return match self.start_tls(data) {
                    Ok(()) => {
                        reply(out, option, rep::ACK, &[]);
                        Step::StartTls
                    }
                    Err(refusal) => {
                        refuse(out, option, refusal);
                        Step::More
                    }
                };
            }
            // Cannot be refused with words.
            opt::EXPORT_NAME if clear => return Step::Close,
            _ if clear => Err((rep::ERR_TLS_REQD, "this server speaks TLS only")),
            opt::EXPORT_NAME => return self.export_name(data, exports, out),
            opt::LIST => list(data, exports, out),
            opt::INFO | opt::GO => match self.info(option, data, exports, out) {
                Ok(agreement) if option == opt::GO => {
                    reply(out, option, rep::ACK, &[]);
                    return Step::Enter(agreement);
                }
                other => other.map(drop),
            },
            opt::STRUCTURED_REPLY if !data.is_empty() => Err((rep::ERR_INVALID, "this option takes no data")),
            opt::STRUCTURED_REPLY => {
                self.structured = true;
                Ok(())
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, data, exports, out),
            _ => Err((rep::ERR_UNSUP, "unknown option")),
        };
        match answered {
            Ok(()) => reply(out, option, rep::ACK, &[]),
            Err(refusal) => refuse(out, option, refusal),
        }
        Step::More
    }

    fn start_tls(&self, data: &[u8]) -> Result<(), Refusal> {
        match self.security {
            Security::None => Err((rep::ERR_POLICY, "TLS is for TCP; this socket's permissions say who may connect")),
            Security::Required if self.tls => Err((rep::ERR_INVALID, "TLS is on already")),
            Security::Required if !data.is_empty() => Err((rep::ERR_INVALID, "this option takes no data")),
            Security::Required => Ok(()),
        }
    }

    fn export_name(&self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        let name = std::str::from_utf8(data).ok().filter(|name| name.len() <= STRING_MAX_BYTES);
        let Some(export) = name.and_then(|name| exports.find(name)) else { return Step::Close };
        out.put_u64(export.size_bytes);
        out.put_u16(export.flags(self.structured));
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Step::Enter(self.agree(export))
    }

    fn agree(&self, export: ExportInfo) -> Agreement {
        let allocation = self.allocation.as_ref() == Some(&export.name);
        Agreement { structured: self.structured, allocation, export }
    }

    /// `INFO` and `GO`: everything but the final word.
    fn info(&self, option: u32, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Result<Agreement, Refusal> {
        const BROKEN: Refusal = (rep::ERR_INVALID, "name and requests do not fill the option");
        let mut cursor = Cursor(data);
        let name = cursor.string().ok_or(BROKEN)?;
        let count = usize::from(cursor.u16().ok_or(BROKEN)?);
        if cursor.0.len() != count * 2 {
            return Err(BROKEN);
        }
        let mut wanted = Vec::new();
        while let Some(kind) = cursor.u16() {
            wanted.push(kind);
        }
        let export = exports.find(name).ok_or((rep::ERR_UNKNOWN, "there is no such export"))?;
        let mut item = Vec::new();
        item.put_u16(info::EXPORT);
        item.put_u64(export.size_bytes);
        item.put_u16(export.flags(self.structured));
        reply(out, option, rep::INFO, &item);
        // Sent unasked as well: who does not know it ignores it, and any request is taken whatever its alignment.
        item.clear();
        item.put_u16(info::BLOCK_SIZE);
        item.put_u32(1);
        item.put_u32(PREFERRED_BLOCK_BYTES);
        item.put_u32(PAYLOAD_MAX_BYTES);
        reply(out, option, rep::INFO, &item);
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if wanted.contains(&kind) {
                item.clear();
                item.put_u16(kind);
                item.extend_from_slice(text.as_bytes());
                reply(out, option, rep::INFO, &item);
            }
        }
        Ok(self.agree(export))
    }

    fn meta_context(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // Also when this fails, says the protocol.
            self.allocation = None;
        }
        if !self.structured {
            return Err((rep::ERR_INVALID, "structured replies must be agreed on first"));
        }
        const BROKEN: Refusal = (rep::ERR_INVALID, "name and queries do not fill the option");
        let mut cursor = Cursor(data);
        let name = cursor.string().ok_or(BROKEN)?;
        let count = cursor.u32().ok_or(BROKEN)?;
        let mut wanted = !set && count == 0;
        for _ in 0..count {
            let query = cursor.string().ok_or(BROKEN)?;
            wanted |= query == ALLOCATION || (!set && query == "base:");
        }
        if !cursor.0.is_empty() {
            return Err(BROKEN);
        }
        let export = exports.find(name).ok_or((rep::ERR_UNKNOWN, "there is no such export"))?;
        if wanted {
            let mut context = Vec::new();
            context.put_u32(if set { ALLOCATION_ID } else { 0 });
            context.extend_from_slice(ALLOCATION.as_bytes());
            reply(out, option, rep::META_CONTEXT, &context);
            if set {
                self.allocation = Some(export.name);
            }
        }
        Ok(())
    }
}

fn list(data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Result<(), Refusal> {
    if !data.is_empty() {
        return Err((rep::ERR_INVALID, "this option takes no data"));
    }
    for name in exports.names() {
        let mut item = Vec::new();
        item.put_u32(u32::try_from(name.len()).unwrap_or(u32::MAX));
        item.extend_from_slice(name.as_bytes());
        reply(out, opt::LIST, rep::SERVER, &item);
    }
    Ok(())
}

fn refuse(out: &mut Vec<u8>, option: u32, (kind, why): Refusal) {
    reply(out, option, kind, why.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    // Strings of at most 4096 bytes and a few integers.
    out.put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(data);
}

#[cfg(test)]
mod tests;
