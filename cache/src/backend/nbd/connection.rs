//! One connection in transmission phase.
//!
//! - [`run`]: sends waiting requests and matches replies until the connection or the client ends
//!
//! Three tasks share a [`Connection`]: the sender takes requests from the client, the receiver reads replies into the
//! requests' own buffers, the watchdog looks for requests without an answer. Whoever finds that the connection is no
//! good calls [`Connection::fail`]; shutting the socket down makes the other two return, with their buffers. A request's
//! buffers are always at one place: in the request, in the send, or in the receive.

use super::super::error::StoreError;
use super::queue::{Client, Request};
use super::wire::{self, ChunkKind, Command, Coverage, ExportInfo, ReplyHeader};
use crate::engine::{IoBuf, Shard, bufs};
use nix::sys::socket::{Shutdown, shutdown};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

/// Requests in flight on one connection. Servers work on 16 or so at a time; more only lengthens their queue.
const IN_FLIGHT_MAX: usize = 64;
/// Replies are read through a buffer of this size: one receive brings the headers of many small replies. What is longer
/// goes past it, straight into the request's buffers.
const STAGE_BYTES: usize = 8192;

struct InFlight {
    request: Request,
    sent_at: Instant,
    /// The payload is still being sent; the buffers are with the send.
    sending: bool,
    /// Answered before all of its payload was sent.
    answered: Option<Result<(), StoreError>>,
    arrived: Coverage,
    error: Option<u32>,
}

/// A request as bytes to be sent. Only writes have a payload.
struct Piece {
    cookie: u64,
    header: [u8; wire::REQUEST_BYTES],
    payload: Vec<IoBuf>,
    range: Range<usize>,
}

struct Connection {
    client: Rc<Client>,
    fd: Rc<OwnedFd>,
    export: ExportInfo,
    first: bool,
    /// By cookie, which grows: the first is the oldest.
    in_flight: RefCell<BTreeMap<u64, InFlight>>,
    cause: RefCell<Option<StoreError>>,
    answered: Cell<u64>,
}

/// How a connection ended.
pub(super) struct Ended {
    /// `None` when it was ended from here, in peace.
    pub(super) cause: Option<StoreError>,
    /// Requests answered on it.
    pub(super) answered: u64,
}

/// Serves the client on this connection until it breaks, the client closes, or (the `first` one) is to be renewed.
/// Requests without an answer are back with the client when this returns.
pub(super) async fn run(client: &Rc<Client>, fd: Rc<OwnedFd>, export: ExportInfo, first: bool) -> Ended {
    let connection = Rc::new(Connection {
        client: Rc::clone(client),
        fd,
        export,
        first,
        in_flight: RefCell::default(),
        cause: RefCell::default(),
        answered: Cell::new(0),
    });
    let shard = &client.shard;
    let receiver = shard.spawn({
        let connection = Rc::clone(&connection);
        async move {
            if let Err(error) = connection.receive().await {
                connection.fail(error);
            }
        }
    });
    let watchdog = shard.spawn({
        let connection = Rc::clone(&connection);
        async move { connection.watch().await }
    });
    let peaceful = connection.send().await;
    watchdog.abort();
    // Ends the receiver; it must be over before requests are sent again, or it could still write into their buffers.
    let _ = shutdown(connection.fd.as_raw_fd(), Shutdown::Both);
    let _ = receiver.await;
    let cause = if peaceful { None } else { connection.cause.take() };
    let left = std::mem::take(&mut *connection.in_flight.borrow_mut());
    let mut lost = Vec::new();
    for (_, entry) in left {
        match entry.answered {
            Some(result) => entry.request.finish(result),
            None => lost.push(entry.request),
        }
    }
    let unknown = StoreError::Disconnected { store: client.store(), reason: "the connection was closed".to_owned() };
    client.send_again(lost, cause.as_ref().unwrap_or(&unknown));
    Ended { cause, answered: connection.answered.get() }
}

impl Connection {
    fn fail(&self, error: StoreError) {
        if self.cause.borrow().is_none() {
            *self.cause.borrow_mut() = Some(error);
            let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
        }
        self.client.work.notify_all();
    }

    fn is_dead(&self) -> bool {
        self.cause.borrow().is_some()
    }

    fn protocol(&self, what: impl Into<String>) -> StoreError {
        StoreError::Protocol { store: self.client.store(), what: what.into() }
    }

    fn disconnected(&self, error: &io::Error) -> StoreError {
        let reason = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
            _ => error.to_string(),
        };
        StoreError::Disconnected { store: self.client.store(), reason }
    }

    /// Sends what waits; returns whether the connection ended because it was no longer wanted.
    async fn send(&self) -> bool {
        loop {
            if self.is_dead() {
                return false;
            }
            let in_flight = self.in_flight.borrow().len();
            let renewing = self.first && self.client.renew.get();
            let ending = renewing || (self.client.closing.get() && self.client.waiting.borrow().is_empty());
            if ending && in_flight == 0 {
                let bye = wire::request(Command::Disconnect, 0, 0, 0, 0).to_vec();
                let _ = self.client.shard.send_all(&self.fd, vec![IoBuf::Bytes(bye)]).await;
                return true;
            }
            let taken = match renewing {
                true => Vec::new(),
                false => self.client.take(IN_FLIGHT_MAX.saturating_sub(in_flight)),
            };
            if taken.is_empty() {
                self.client.work.notified().await;
                continue;
            }
            if let Err(error) = self.send_all(taken).await {
                self.fail(error);
                return false;
            }
        }
    }

    /// Sends requests: headers and payloads together, except where only part of the buffers is to be sent.
    async fn send_all(&self, mut taken: Vec<Request>) -> Result<(), StoreError> {
        if self.export.allocation.is_none() {
            // This server does not tell, though one of before did: an answer without extents.
            for request in taken.extract_if(.., |request| request.command == Command::BlockStatus) {
                request.finish(Ok(()));
            }
        }
        // All are in flight before the first byte is out: an answer, or the end, may come at any time.
        let pieces: Vec<Piece> = taken.into_iter().map(|request| self.enter(request)).collect();
        let mut together = Vec::new();
        let mut result = Ok(());
        for piece in pieces {
            let whole = bufs::total_len(&piece.payload) == piece.range.len();
            if whole {
                together.push(piece);
                continue;
            }
            let group = std::mem::take(&mut together);
            let Piece { cookie, header, mut payload, range } = piece;
            let header = Piece { cookie, header, payload: Vec::new(), range: 0..0 };
            result = self.send_group(result, group).await;
            result = self.send_group(result, vec![header]).await;
            if result.is_ok() {
                (result, payload) = self.client.shard.send_part(&self.fd, payload, range).await;
            }
            self.sent(cookie, payload);
        }
        result = self.send_group(result, together).await;
        result.map_err(|error| self.disconnected(&error))
    }

    fn enter(&self, mut request: Request) -> Piece {
        let cookie = self.client.cookie();
        let header = wire::request(request.command, request.flags, cookie, request.offset, request.len);
        let sending = request.command == Command::Write;
        let (payload, range) = match sending {
            true => (std::mem::take(&mut request.bufs), request.range.clone()),
            false => (Vec::new(), 0..0),
        };
        let entry = InFlight {
            request,
            sent_at: Instant::now(),
            sending,
            answered: None,
            arrived: Coverage::default(),
            error: None,
        };
        self.in_flight.borrow_mut().insert(cookie, entry);
        Piece { cookie, header, payload, range }
    }

    /// Sends whole pieces with one call unless something has failed before; gives the buffers back in any case.
    async fn send_group(&self, before: io::Result<()>, pieces: Vec<Piece>) -> io::Result<()> {
        if pieces.is_empty() {
            return before;
        }
        let owners: Vec<(u64, usize)> = pieces.iter().map(|piece| (piece.cookie, piece.payload.len())).collect();
        let headers = pieces
            .into_iter()
            .flat_map(|piece| std::iter::once(IoBuf::Bytes(piece.header.to_vec())).chain(piece.payload));
        let list: Vec<IoBuf> = headers.collect();
        let (result, list) = match before {
            Ok(()) => self.client.shard.send_all(&self.fd, list).await,
            Err(error) => (Err(error), list),
        };
        let mut list = list.into_iter();
        for (cookie, count) in owners {
            let payload: Vec<IoBuf> = list.by_ref().take(count + 1).skip(1).collect();
            if count > 0 {
                self.sent(cookie, payload);
            }
        }
        result
    }

    /// A request's payload is out, or will never be.
    fn sent(&self, cookie: u64, payload: Vec<IoBuf>) {
        let answered = {
            let mut in_flight = self.in_flight.borrow_mut();
            let Some(entry) = in_flight.get_mut(&cookie) else { return };
            entry.request.bufs = payload;
            entry.sending = false;
            entry.sent_at = Instant::now();
            entry.answered.take()
        };
        if let Some(result) = answered {
            self.answer(cookie, result);
        }
    }

    /// Gives a request its outcome, once its buffers are back.
    fn answer(&self, cookie: u64, result: Result<(), StoreError>) {
        let entry = {
            let mut in_flight = self.in_flight.borrow_mut();
            match in_flight.get_mut(&cookie) {
                Some(entry) if entry.sending => {
                    entry.answered = Some(result);
                    return;
                }
                _ => in_flight.remove(&cookie),
            }
        };
        if let Some(entry) = entry {
            self.answered.set(self.answered.get() + 1);
            entry.request.finish(result);
            // Room for another, or the last one before the end.
            self.client.work.notify_all();
        }
    }

    async fn watch(&self) {
        let limit = self.client.options.request_timeout;
        loop {
            let oldest = self.in_flight.borrow().first_key_value().map(|(_, entry)| entry.sent_at);
            let now = Instant::now();
            match oldest {
                Some(sent_at) if now.duration_since(sent_at) >= limit => {
                    return self.fail(StoreError::Timeout { store: self.client.store() });
                }
                Some(sent_at) => self.client.shard.sleep_until(sent_at + limit).await,
                // What is sent from now on is not late before then.
                None => self.client.shard.sleep_until(now + limit).await,
            }
        }
    }

    async fn receive(&self) -> Result<(), StoreError> {
        let mut stage = Stage::new(self.client.shard.clone(), Rc::clone(&self.fd));
        let lost = |error: io::Error| self.disconnected(&error);
        loop {
            stage.fill(4).await.map_err(lost)?;
            let len = wire::reply_header_len(stage.peek()).map_err(|what| self.protocol(what))?;
            stage.fill(len).await.map_err(lost)?;
            let header = wire::reply_header(stage.peek()).map_err(|what| self.protocol(what))?;
            stage.consume(len);
            match header {
                ReplyHeader::Simple { cookie, error } => self.simple(&mut stage, cookie, error).await?,
                ReplyHeader::Chunk { cookie, done, kind, len } => {
                    self.chunk(&mut stage, cookie, kind, len as usize).await?;
                    if done {
                        self.done(cookie)?;
                    }
                }
            }
        }
    }

    /// Command and length of a request in flight.
    fn find(&self, cookie: u64) -> Result<(Command, usize), StoreError> {
        let in_flight = self.in_flight.borrow();
        match in_flight.get(&cookie) {
            Some(entry) if entry.answered.is_none() => Ok((entry.request.command, entry.request.len as usize)),
            _ => Err(self.protocol("a reply to a request that was not made")),
        }
    }

    async fn simple(&self, stage: &mut Stage, cookie: u64, error: u32) -> Result<(), StoreError> {
        let (command, len) = self.find(cookie)?;
        if command == Command::Read {
            if self.export.structured {
                return Err(self.protocol("a simple reply to a read after structured replies were agreed on"));
            }
            if error == 0 {
                self.data(stage, cookie, 0..len).await?;
            }
        }
        self.finish(cookie, command, error)
    }

    async fn chunk(&self, stage: &mut Stage, cookie: u64, kind: ChunkKind, len: usize) -> Result<(), StoreError> {
        let lost = |error: io::Error| self.disconnected(&error);
        if !self.export.structured {
            return Err(self.protocol("a structured reply that was not agreed on"));
        }
        let (command, wanted) = self.find(cookie)?;
        match kind {
            ChunkKind::None => Ok(()),
            ChunkKind::OffsetData | ChunkKind::OffsetHole => {
                if command != Command::Read {
                    return Err(self.protocol("data in reply to a request that is not a read"));
                }
                let hole = kind == ChunkKind::OffsetHole;
                let head = if hole { 12 } else { 8 };
                stage.fill(head).await.map_err(lost)?;
                let mut cursor = wire::Cursor(stage.peek());
                let (offset, hole_len) = (cursor.u64().unwrap_or(0), if hole { cursor.u32().unwrap_or(0) } else { 0 });
                stage.consume(head);
                let amount = if hole { hole_len as usize } else { len - head };
                let range = self.part_of(cookie, offset, amount, wanted)?;
                match hole {
                    true => self.hole(cookie, range),
                    false => self.data(stage, cookie, range).await,
                }
            }
            ChunkKind::BlockStatus => {
                if command != Command::BlockStatus {
                    return Err(self.protocol("a block status that was not asked for"));
                }
                // At most 8 MiB. The requests of one connection are answered one at a time.
                let (result, list) = stage.receive(vec![IoBuf::Bytes(vec![0; len])], 0..len).await;
                result.map_err(lost)?;
                if let Some(entry) = self.in_flight.borrow_mut().get_mut(&cookie) {
                    entry.request.bufs = list;
                    entry.sent_at = Instant::now();
                }
                Ok(())
            }
            ChunkKind::Error | ChunkKind::ErrorOffset => {
                // At most a little more than 4 KiB, which the stage holds.
                stage.fill(len).await.map_err(lost)?;
                let error = wire::chunk_error(&stage.peek()[..len]).map_err(|what| self.protocol(what))?;
                stage.consume(len);
                if let Some(entry) = self.in_flight.borrow_mut().get_mut(&cookie) {
                    entry.error.get_or_insert(error);
                }
                Ok(())
            }
        }
    }

    /// Where in the request a piece belongs.
    fn part_of(&self, cookie: u64, offset: u64, amount: usize, wanted: usize) -> Result<Range<usize>, StoreError> {
        let start = self.in_flight.borrow().get(&cookie).map_or(0, |entry| entry.request.offset);
        let at = offset.checked_sub(start).and_then(|at| usize::try_from(at).ok());
        match at.and_then(|at| Some(at..at.checked_add(amount)?)) {
            Some(range) if range.end <= wanted && amount > 0 => Ok(range),
            _ => Err(self.protocol("data outside of what was asked for")),
        }
    }

    fn hole(&self, cookie: u64, range: Range<usize>) -> Result<(), StoreError> {
        let mut in_flight = self.in_flight.borrow_mut();
        let Some(entry) = in_flight.get_mut(&cookie) else { return Ok(()) };
        entry.arrived.add(range.clone()).map_err(|what| self.protocol(what))?;
        entry.sent_at = Instant::now();
        let base = entry.request.range.start;
        bufs::zero(&mut entry.request.bufs, base + range.start..base + range.end);
        Ok(())
    }

    /// Reads payload into a request's own buffers.
    async fn data(&self, stage: &mut Stage, cookie: u64, range: Range<usize>) -> Result<(), StoreError> {
        let (list, base) = {
            let mut in_flight = self.in_flight.borrow_mut();
            let Some(entry) = in_flight.get_mut(&cookie) else { return Ok(()) };
            entry.arrived.add(range.clone()).map_err(|what| self.protocol(what))?;
            (std::mem::take(&mut entry.request.bufs), entry.request.range.start)
        };
        let (result, list) = stage.receive(list, base + range.start..base + range.end).await;
        if let Some(entry) = self.in_flight.borrow_mut().get_mut(&cookie) {
            entry.request.bufs = list;
            entry.sent_at = Instant::now();
        }
        result.map_err(|error| self.disconnected(&error))
    }

    fn done(&self, cookie: u64) -> Result<(), StoreError> {
        let (command, error, complete) = {
            let in_flight = self.in_flight.borrow();
            let Some(entry) = in_flight.get(&cookie) else { return Ok(()) };
            let complete = entry.arrived.is_complete(entry.request.len as usize);
            (entry.request.command, entry.error, complete)
        };
        if error.is_none() && command == Command::Read && !complete {
            return Err(self.protocol("a reply to a read with bytes missing"));
        }
        self.finish(cookie, command, error.unwrap_or(0))
    }

    fn finish(&self, cookie: u64, command: Command, error: u32) -> Result<(), StoreError> {
        let store = self.client.store();
        let what = match command {
            Command::Read => "read",
            Command::Write => "write",
            Command::Flush => "flush",
            Command::Trim => "discard",
            Command::WriteZeroes => "write zeroes",
            Command::BlockStatus => "look for holes",
            Command::Disconnect => "disconnect",
        };
        let result = match (error, wire::errno(error)) {
            (0, _) => Ok(()),
            // The server goes away; the request belongs onto the next connection.
            (_, libc::ESHUTDOWN) => {
                return Err(StoreError::Disconnected { store, reason: "the server is shutting down".to_owned() });
            }
            (_, libc::EPERM) if command != Command::Read => Err(StoreError::ReadOnly { store }),
            (_, errno) => Err(StoreError::from_errno(&store, what, errno)),
        };
        self.answer(cookie, result);
        Ok(())
    }
}

/// Bytes received and not yet looked at.
struct Stage {
    shard: Shard,
    fd: Rc<OwnedFd>,
    /// One buffer; empty only while a receive has it.
    buf: Vec<IoBuf>,
    at: Range<usize>,
}

impl Stage {
    fn new(shard: Shard, fd: Rc<OwnedFd>) -> Stage {
        Stage { shard, fd, buf: vec![IoBuf::heap(STAGE_BYTES)], at: 0..0 }
    }

    fn peek(&self) -> &[u8] {
        self.buf.first().and_then(|buf| buf.as_slice().get(self.at.clone())).unwrap_or_default()
    }

    fn consume(&mut self, len: usize) {
        self.at.start = (self.at.start + len).min(self.at.end);
    }

    /// Receives until at least `len` ≤ [`STAGE_BYTES`] bytes are there.
    async fn fill(&mut self, len: usize) -> io::Result<()> {
        if self.at.len() >= len {
            return Ok(());
        }
        // To the front: what is left is less than `len`, and room for a whole stage is worth the few bytes moved.
        if let Some(buf) = self.buf.first_mut() {
            buf.as_mut_slice().copy_within(self.at.clone(), 0);
            self.at = 0..self.at.len();
        }
        while self.at.len() < len {
            let list = std::mem::take(&mut self.buf);
            let (result, list) = self.shard.recv(&self.fd, list, self.at.end..STAGE_BYTES).await;
            self.buf = list;
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.at.end += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Moves the next bytes into `range` of `list`: from the stage what is there, the rest straight from the socket.
    async fn receive(&mut self, mut list: Vec<IoBuf>, range: Range<usize>) -> (io::Result<()>, Vec<IoBuf>) {
        let staged = self.at.len().min(range.len());
        bufs::copy_in(&mut list, range.start, &self.peek()[..staged]);
        self.consume(staged);
        if staged == range.len() {
            return (Ok(()), list);
        }
        self.shard.recv_exact(&self.fd, list, range.start + staged..range.end).await
    }
}
