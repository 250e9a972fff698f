//! Connecting and negotiating: fixed newstyle, structured replies, `base:allocation`, `NBD_OPT_GO` with block sizes.
//!
//! - [`connect`]: a socket in transmission phase, and what it exports

use super::super::error::StoreError;
use super::super::spec::NbdAddress;
use super::wire::{self, Cursor, ExportInfo};
use crate::engine::{IoBuf, Shard, SocketAddress};
use crate::opener;
use std::net::ToSocketAddrs;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

/// From the first packet to the last word of the negotiation. A server that takes longer is as good as gone.
const LIMIT: Duration = Duration::from_secs(10);
/// Replies to one option; a server that keeps talking is not taken for one.
const REPLIES_MAX: usize = 64;
/// What a server that names no maximum has to accept.
const DEFAULT_MAX_PAYLOAD_BYTES: u32 = 32 << 20;
const SECTOR: u32 = super::super::SECTOR_BYTES as u32;

/// Whom to connect to.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) address: NbdAddress,
    pub(super) export: String,
    /// The store's identity, for messages.
    pub(super) store: String,
    pub(super) max_request_bytes: u32,
}

/// Connects and negotiates.
///
/// # Errors
/// `NotFound` (no such export), `Denied`, `Unsupported` (TLS, old style), `BadSize`, `Protocol`, `Timeout`, or
/// `Disconnected` with the reason.
pub(super) async fn connect(shard: &Shard, target: &Target) -> Result<(Rc<OwnedFd>, ExportInfo), StoreError> {
    let store = target.store.clone();
    let task = {
        let (shard, target) = (shard.clone(), target.clone());
        async move {
            let fd = open_socket(&shard, &target).await?;
            let info = Negotiation { shard, fd: Rc::clone(&fd), target }.run().await?;
            Ok((fd, info))
        }
    };
    shard.timeout(LIMIT, task).await.unwrap_or(Err(StoreError::Timeout { store }))
}

fn lost(target: &Target, what: &str, error: &std::io::Error) -> StoreError {
    StoreError::Disconnected { store: target.store.clone(), reason: format!("{what}: {error}") }
}

async fn open_socket(shard: &Shard, target: &Target) -> Result<Rc<OwnedFd>, StoreError> {
    if let (NbdAddress::Unix(path), Some(opener)) = (&target.address, opener::opener()) {
        let name = path.clone();
        let connected = shard.blocking(move || opener.connect(&name)).await.and_then(|connected| connected);
        return connected.map(Rc::new).map_err(|error| match opener::not_allowed(&error) {
            Some(why) => StoreError::NotAllowed { store: target.store.clone(), why: why.to_string() },
            None => lost(target, &format!("connecting to unix socket {}", path.display()), &error),
        });
    }
    let addresses: Vec<SocketAddress> = match &target.address {
        NbdAddress::Unix(path) => vec![SocketAddress::Unix(path.clone())],
        NbdAddress::Tcp { host, port } => {
            let name = (host.clone(), *port);
            let found = shard.blocking(move || name.to_socket_addrs().map(Iterator::collect::<Vec<_>>)).await;
            let found = found.and_then(|found| found).map_err(|error| lost(target, "looking up the host", &error))?;
            found.into_iter().map(SocketAddress::Tcp).collect()
        }
    };
    let mut last = None;
    for address in addresses {
        let connected = async {
            let fd = Rc::new(address.socket()?);
            shard.connect(&fd, &address).await?;
            Ok(fd)
        };
        match connected.await {
            Ok(fd) => return Ok(fd),
            Err(error) => last = Some(lost(target, &format!("connecting to {address}"), &error)),
        }
    }
    let reason = "the host's name has no address".to_owned();
    Err(last.unwrap_or(StoreError::Disconnected { store: target.store.clone(), reason }))
}

struct Negotiation {
    shard: Shard,
    fd: Rc<OwnedFd>,
    target: Target,
}

impl Negotiation {
    fn protocol(&self, what: impl Into<String>) -> StoreError {
        StoreError::Protocol { store: self.target.store.clone(), what: what.into() }
    }

    fn unsupported(&self, what: impl Into<String>) -> StoreError {
        StoreError::Unsupported { store: self.target.store.clone(), what: what.into() }
    }

    async fn send(&self, data: Vec<u8>) -> Result<(), StoreError> {
        let (result, _) = self.shard.send_all(&self.fd, vec![IoBuf::Bytes(data)]).await;
        result.map_err(|error| lost(&self.target, "negotiating", &error))
    }

    /// `len` is bounded by the caller.
    async fn receive(&self, len: usize) -> Result<Vec<u8>, StoreError> {
        let (result, mut bufs) = self.shard.recv_exact(&self.fd, vec![IoBuf::Bytes(vec![0; len])], 0..len).await;
        result.map_err(|error| lost(&self.target, "negotiating", &error))?;
        match bufs.pop() {
            Some(IoBuf::Bytes(data)) => Ok(data),
            _ => Ok(Vec::new()),
        }
    }

    async fn run(&self) -> Result<ExportInfo, StoreError> {
        let hello = self.receive(16).await?;
        let mut cursor = Cursor(&hello);
        if cursor.u64() != Some(wire::SERVER_MAGIC) {
            return Err(self.protocol("its greeting is not NBD's"));
        }
        match cursor.u64() {
            Some(wire::OPTION_MAGIC) => {}
            Some(wire::OLDSTYLE_MAGIC) => return Err(self.unsupported("its server speaks NBD's old style only")),
            _ => return Err(self.protocol("its greeting is not NBD's")),
        }
        let flags = Cursor(&self.receive(2).await?).u16().unwrap_or(0);
        if flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(self.unsupported("its server does not speak fixed newstyle NBD"));
        }
        let no_zeroes = flags & wire::FLAG_NO_ZEROES;
        self.send(u32::from(wire::FLAG_FIXED_NEWSTYLE | no_zeroes).to_be_bytes().to_vec()).await?;
        self.send(wire::option(wire::OPT_STRUCTURED_REPLY, &[])).await?;
        let (kind, data) = self.reply(wire::OPT_STRUCTURED_REPLY).await?;
        if kind == wire::REP_ERR_TLS_REQD {
            return Err(self.refusal(kind, &data));
        }
        let structured = kind == wire::REP_ACK;
        let allocation = if structured { self.allocation().await? } else { None };
        let info = self.go(structured, no_zeroes != 0).await?;
        Ok(ExportInfo { allocation, ..info })
    }

    async fn reply(&self, option: u32) -> Result<(u32, Vec<u8>), StoreError> {
        let head = self.receive(wire::OPTION_REPLY_BYTES).await?;
        let head = wire::option_reply(&head, option).map_err(|what| self.protocol(what))?;
        Ok((head.kind, self.receive(head.len as usize).await?))
    }

    /// Asks to be told what is allocated. A server that does not do so says no, whatever the words.
    async fn allocation(&self) -> Result<Option<u32>, StoreError> {
        let data = wire::context_data(&self.target.export, wire::ALLOCATION);
        self.send(wire::option(wire::OPT_SET_META_CONTEXT, &data)).await?;
        let mut context = None;
        for _ in 0..REPLIES_MAX {
            let (kind, data) = self.reply(wire::OPT_SET_META_CONTEXT).await?;
            match kind {
                wire::REP_META_CONTEXT => {
                    let mut cursor = Cursor(&data);
                    let number = cursor.u32();
                    if cursor.0 == wire::ALLOCATION.as_bytes() {
                        context = number;
                    }
                }
                wire::REP_ACK => return Ok(context),
                kind if kind & wire::REP_ERROR_BIT != 0 => return Ok(None),
                kind => return Err(self.protocol(format!("a reply of type {kind} to the choice of a context"))),
            }
        }
        Err(self.protocol("endless replies to the choice of a context"))
    }

    async fn go(&self, structured: bool, no_zeroes: bool) -> Result<ExportInfo, StoreError> {
        self.send(wire::option(wire::OPT_GO, &wire::go_data(&self.target.export))).await?;
        let (mut export, mut blocks) = (None, None);
        for _ in 0..REPLIES_MAX {
            let (kind, data) = self.reply(wire::OPT_GO).await?;
            match kind {
                wire::REP_INFO => {
                    let mut cursor = Cursor(&data);
                    match cursor.u16() {
                        Some(wire::INFO_EXPORT) => export = cursor.u64().zip(cursor.u16()),
                        Some(wire::INFO_BLOCK_SIZE) => {
                            blocks = Some((cursor.u32(), cursor.u32(), cursor.u32()));
                        }
                        // Names and descriptions.
                        _ => {}
                    }
                }
                wire::REP_ACK => {
                    let (size, flags) = export.ok_or_else(|| self.protocol("an export without a size"))?;
                    return self.info(size, flags, structured, blocks);
                }
                wire::REP_ERR_UNSUP => return self.export_name(structured, no_zeroes).await,
                kind if kind & wire::REP_ERROR_BIT != 0 => return Err(self.refusal(kind, &data)),
                kind => return Err(self.protocol(format!("a reply of type {kind} to the choice of export"))),
            }
        }
        Err(self.protocol("endless replies to the choice of export"))
    }

    /// The way of servers that do not know `NBD_OPT_GO`: on a wrong name they just hang up.
    async fn export_name(&self, structured: bool, no_zeroes: bool) -> Result<ExportInfo, StoreError> {
        self.send(wire::option(wire::OPT_EXPORT_NAME, self.target.export.as_bytes())).await?;
        let data = self.receive(if no_zeroes { 10 } else { 134 }).await?;
        let mut cursor = Cursor(&data);
        let (size, flags) =
            cursor.u64().zip(cursor.u16()).ok_or_else(|| self.protocol("a cut-off description of the export"))?;
        self.info(size, flags, structured, None)
    }

    fn refusal(&self, kind: u32, data: &[u8]) -> StoreError {
        let store = self.target.store.clone();
        match kind {
            wire::REP_ERR_UNKNOWN => StoreError::NotFound { store },
            wire::REP_ERR_POLICY => StoreError::Denied { store },
            wire::REP_ERR_TLS_REQD => self.unsupported("its server requires TLS, which is not supported"),
            _ => {
                let said: String =
                    String::from_utf8_lossy(data).chars().filter(|c| !c.is_control()).take(200).collect();
                let reason = format!("the server refused the export (error {}): {said}", kind & !wire::REP_ERROR_BIT);
                StoreError::Disconnected { store, reason }
            }
        }
    }

    fn info(
        &self,
        size_bytes: u64,
        flags: u16,
        structured: bool,
        blocks: Option<(Option<u32>, Option<u32>, Option<u32>)>,
    ) -> Result<ExportInfo, StoreError> {
        let (min, max) = match blocks {
            None => (1, DEFAULT_MAX_PAYLOAD_BYTES),
            Some((Some(min), Some(_), Some(max))) if min.is_power_of_two() && min <= 1 << 16 && max >= min => {
                (min, max)
            }
            Some(_) => return Err(self.protocol("impossible block sizes")),
        };
        let min = min.max(SECTOR);
        let max = max.min(self.target.max_request_bytes.max(min));
        let max = max - max % min;
        if max == 0 {
            return Err(self.unsupported(format!("its server takes less than {min} bytes in a request")));
        }
        if size_bytes == 0 || !size_bytes.is_multiple_of(u64::from(min)) || i64::try_from(size_bytes).is_err() {
            return Err(StoreError::BadSize { store: self.target.store.clone(), size_bytes });
        }
        Ok(ExportInfo { size_bytes, flags, structured, allocation: None, min_block_bytes: min, max_payload_bytes: max })
    }
}
