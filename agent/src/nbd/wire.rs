//! A client's socket on a shard, with TLS or without.
//!
//! - [`Wire`]: what its reader and its writer share: the socket, what waits to be sent, when something last moved
//! - [`Inbound`]: the reader's end; [`Parts`]: a connection on its way to another shard
//!
//! Answers wait in pieces: small ones share a piece, so that many go out with one system call; a large one has its own. TLS
//! numbers its records, so they are sent in the order in which they were made: what the session has to say for itself
//! goes out before what is encrypted next.
//!
//! While requests come fast the shard looks for the next one instead of sleeping, as it does for virtqueues: the ring tells
//! of a finished receive without a system call.

use futures_util::future::{Either, select};
use nix::sys::socket::{Shutdown, shutdown};
use prestage_cache::engine::{AlignedBuf, EngineKind, IoBuf, Notify, PollSource, Shard};
use prestage_integration::export::nbd::{HANDSHAKE_BUFFER_BYTES, TlsSession};
use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::time::Instant;

/// One receive brings this much at most: 2,300 requests without payload. What is longer goes past it.
const STAGE_BYTES: usize = 64 << 10;
const _: () = assert!(STAGE_BYTES >= HANDSHAKE_BUFFER_BYTES);
/// Answers are gathered in pieces of this size: two reads of 128 KiB with their heads, or 64 of 4 KiB.
const PIECE_BYTES: usize = (256 << 10) + 4096;
/// Empty pieces a connection keeps: while some are sent as many are filled, and fresh memory costs more than the copy into it.
const SPARE_MAX: usize = 6;
/// Moved with one call at most, so that a slow peer is seen to move at all.
const STEP_BYTES: usize = 1 << 20;

/// A socket and what is to be sent on it.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) shard: Shard,
    fd: Rc<OwnedFd>,
    tls: RefCell<Option<TlsSession>>,
    /// What waits, as the protocol has it.
    waiting: RefCell<Vec<Vec<u8>>>,
    /// What waits, as the network has it.
    raw: RefCell<Vec<u8>>,
    /// Empty pieces, kept for their memory.
    spare: RefCell<Vec<Vec<u8>>>,
    queued: Cell<usize>,
    /// Of these, what the writer has not taken yet.
    gathered: Cell<usize>,
    /// Since when the peer takes nothing of what is being sent.
    sending_since: Cell<Option<Instant>>,
    /// Since when the rest of a request is waited for.
    receiving_since: Cell<Option<Instant>>,
    /// There is something to send, or an end.
    pub(super) work: Notify,
    dead: Cell<bool>,
}

/// A connection between two shards.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) fd: OwnedFd,
    pub(super) tls: Option<TlsSession>,
    /// What TLS has brought and nobody has read yet.
    pub(super) unread: Vec<u8>,
}

impl Wire {
    fn new(shard: &Shard, fd: OwnedFd, tls: Option<TlsSession>) -> Rc<Wire> {
        Rc::new(Wire {
            shard: shard.clone(),
            fd: Rc::new(fd),
            tls: RefCell::new(tls),
            waiting: RefCell::default(),
            raw: RefCell::default(),
            spare: RefCell::default(),
            queued: Cell::new(0),
            gathered: Cell::new(0),
            sending_since: Cell::new(None),
            receiving_since: Cell::new(None),
            work: Notify::new(),
            dead: Cell::new(false),
        })
    }

    /// Bytes that wait or are being sent.
    pub(super) fn queued(&self) -> usize {
        self.queued.get()
    }

    /// Bytes that wait.
    pub(super) fn gathered(&self) -> usize {
        self.gathered.get()
    }

    /// The socket is of no more use.
    pub(super) fn is_dead(&self) -> bool {
        self.dead.get()
    }

    /// Since when the peer has kept this side waiting, in the middle of an answer or of a request.
    pub(super) fn stalled_since(&self) -> (Option<Instant>, Option<Instant>) {
        (self.sending_since.get(), self.receiving_since.get())
    }

    /// Ends both directions; whoever waits for the socket comes back.
    pub(super) fn kill(&self) {
        self.dead.set(true);
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Both);
        self.work.notify_all();
    }

    /// The reader sees an end; answers still go out.
    pub(super) fn end_reading(&self) {
        let _ = shutdown(self.fd.as_raw_fd(), Shutdown::Read);
    }

    /// Appends an answer of about `len` bytes to what waits. Nobody is woken.
    pub(super) fn answer<T>(&self, len: usize, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let mut waiting = self.waiting.borrow_mut();
        let room = waiting.last().is_some_and(|piece| piece.len() + len <= PIECE_BYTES);
        let mut piece = if room { waiting.pop().unwrap_or_default() } else { self.piece(len) };
        let before = piece.len();
        let value = write(&mut piece);
        let grown = piece.len().saturating_sub(before);
        self.queued.set(self.queued.get() + grown);
        self.gathered.set(self.gathered.get() + grown);
        match piece.is_empty() {
            true => self.keep(piece),
            false => waiting.push(piece),
        }
        value
    }

    fn piece(&self, len: usize) -> Vec<u8> {
        let spare = if len > PIECE_BYTES { None } else { self.spare.borrow_mut().pop() };
        let mut piece = spare.unwrap_or_default();
        piece.reserve_exact(len.max(PIECE_BYTES));
        piece
    }

    fn keep(&self, mut piece: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_MAX && (PIECE_BYTES..=2 * PIECE_BYTES).contains(&piece.capacity()) {
            piece.clear();
            spare.push(piece);
        }
    }

    /// Sends what waits, in the order in which it was given. False if nothing did.
    ///
    /// # Errors
    /// The peer has gone.
    pub(super) async fn send(&self) -> io::Result<bool> {
        if self.queued.get() == 0 && self.raw.borrow().is_empty() {
            return Ok(false);
        }
        let batch = std::mem::take(&mut *self.waiting.borrow_mut());
        let bytes = self.gathered.take();
        let has_tls = self.tls.borrow().is_some();
        let result = match has_tls {
            true => self.send_sealed(batch).await,
            false => self.send_list(batch).await,
        };
        self.queued.set(self.queued.get().saturating_sub(bytes));
        result.map(|()| true)
    }

    async fn send_list(&self, batch: Vec<Vec<u8>>) -> io::Result<()> {
        let mut list: Vec<IoBuf> = batch.into_iter().map(IoBuf::Bytes).collect();
        let len: usize = list.iter().map(IoBuf::len).sum();
        let (mut at, mut result) = (0, Ok(()));
        while at < len && result.is_ok() {
            let end = len.min(at + STEP_BYTES);
            self.sending_since.set(Some(Instant::now()));
            (result, list) = self.shard.send_part(&self.fd, list, at..end).await;
            at = end;
        }
        self.sending_since.set(None);
        for buf in list {
            if let IoBuf::Bytes(piece) = buf {
                self.keep(piece);
            }
        }
        result
    }

    /// Encrypts step by step, so that a large answer is not held twice.
    async fn send_sealed(&self, batch: Vec<Vec<u8>>) -> io::Result<()> {
        for piece in batch {
            for part in piece.chunks(STEP_BYTES) {
                let mut sealed = self.raw.take();
                if let Some(tls) = self.tls.borrow_mut().as_mut() {
                    tls.send(part, &mut sealed);
                }
                self.send_list(vec![sealed]).await?;
            }
            self.keep(piece);
        }
        match self.raw.take() {
            last if last.is_empty() => Ok(()),
            last => self.send_list(vec![last]).await,
        }
    }

    /// The last word of TLS, to be sent.
    pub(super) fn say_goodbye(&self) {
        if let Some(tls) = self.tls.borrow_mut().as_mut() {
            tls.close(&mut self.raw.borrow_mut());
        }
    }
}

/// The reading end.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) wire: Rc<Wire>,
    /// One buffer off the network; none only while a receive has it.
    stage: Vec<IoBuf>,
    at: Range<usize>,
    /// What TLS has made of it.
    plain: Vec<u8>,
    plain_at: usize,
    /// Has nothing to say by itself: waiting for it asks the shard to look at its ring before it sleeps. `None` on the
    /// thread pool, which could look at nothing.
    looking: Option<PollSource>,
}

impl Inbound {
    pub(super) fn new(shard: &Shard, parts: Parts) -> Inbound {
        let Parts { fd, tls, unread } = parts;
        let stage = vec![IoBuf::heap(STAGE_BYTES)];
        let looking = (shard.kind() == EngineKind::IoUring).then(|| shard.poll_source(|| false));
        Inbound { wire: Wire::new(shard, fd, tls), stage, at: 0..0, plain: unread, plain_at: 0, looking }
    }

    /// What a connection is made of, for another shard. `None` if the socket is in use.
    pub(super) fn into_parts(self) -> Option<Parts> {
        let unread = self.peek().to_vec();
        let wire = Rc::try_unwrap(self.wire).ok()?;
        Some(Parts { fd: Rc::try_unwrap(wire.fd).ok()?, tls: wire.tls.into_inner(), unread })
    }

    /// Bytes that have come and were not taken.
    pub(super) fn peek(&self) -> &[u8] {
        if self.has_tls() {
            return &self.plain[self.plain_at..];
        }
        self.stage.first().and_then(|buf| buf.as_slice().get(self.at.clone())).unwrap_or_default()
    }

    pub(super) fn consume(&mut self, len: usize) {
        match self.has_tls() {
            true => self.plain_at = (self.plain_at + len).min(self.plain.len()),
            false => self.at.start = (self.at.start + len).min(self.at.end),
        }
    }

    fn has_tls(&self) -> bool {
        self.wire.tls.borrow().is_some()
    }

    /// From here on the bytes of the network are TLS. There must be none that were not taken.
    pub(super) fn start_tls(&mut self, session: TlsSession) {
        *self.wire.tls.borrow_mut() = Some(session);
    }

    /// Receives more behind what there is. With TLS that need not bring bytes of the protocol. `middle`: the peer owes the
    /// rest of something. False at the end.
    ///
    /// # Errors
    /// The socket's, or `InvalidData` when TLS fails; what TLS has to say about it is ready to be sent.
    pub(super) async fn fill(&mut self, middle: bool) -> io::Result<bool> {
        let kept = match self.has_tls() {
            true => 0,
            false => {
                if let Some(buf) = self.stage.first_mut() {
                    buf.as_mut_slice().copy_within(self.at.clone(), 0);
                }
                self.at.len()
            }
        };
        self.wire.receiving_since.set(middle.then(Instant::now));
        let list = std::mem::take(&mut self.stage);
        let mut receive = pin!(self.wire.shard.recv(&self.wire.fd, list, kept..STAGE_BYTES));
        let (result, list) = match &mut self.looking {
            None => receive.await,
            Some(looking) => match select(receive.as_mut(), pin!(looking.wait())).await {
                Either::Left((received, _)) => received,
                Either::Right(_) => receive.await,
            },
        };
        self.stage = list;
        self.wire.receiving_since.set(None);
        let received = match result {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            other => other?,
        };
        match self.has_tls() {
            true => self.unseal(received)?,
            false => self.at = 0..kept + received,
        }
        Ok(received > 0)
    }

    /// Hands the first `received` bytes of the stage to TLS.
    fn unseal(&mut self, received: usize) -> io::Result<()> {
        self.plain.drain(..self.plain_at);
        self.plain_at = 0;
        let stage = self.stage.first().map_or(&[][..], IoBuf::as_slice);
        let (mut session, mut raw) = (self.wire.tls.borrow_mut(), self.wire.raw.borrow_mut());
        let Some(session) = session.as_mut() else { return Ok(()) };
        let result = session.receive(&stage[..received], &mut self.plain, &mut raw);
        if !raw.is_empty() {
            self.wire.work.notify_all();
        }
        result.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Takes exactly `len` bytes: those that are here, the others past the stage.
    ///
    /// # Errors
    /// The socket's; `UnexpectedEof` if the peer ends before.
    pub(super) async fn take(&mut self, len: usize) -> io::Result<AlignedBuf> {
        let mut buf = AlignedBuf::new(len);
        let mut got = 0;
        loop {
            let here = self.peek();
            let part = here.len().min(len - got);
            buf[got..got + part].copy_from_slice(&here[..part]);
            self.consume(part);
            got += part;
            if got == len {
                return Ok(buf);
            }
            if !self.has_tls() {
                return self.take_rest(buf, got).await;
            }
            if !self.fill(true).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Receives the rest of `buf` from byte `got` on, straight into it.
    async fn take_rest(&self, buf: AlignedBuf, mut got: usize) -> io::Result<AlignedBuf> {
        let len = buf.len();
        let mut list = vec![IoBuf::Heap(buf)];
        while got < len {
            let end = len.min(got + STEP_BYTES);
            self.wire.receiving_since.set(Some(Instant::now()));
            let (result, back) = self.wire.shard.recv_exact(&self.wire.fd, list, got..end).await;
            self.wire.receiving_since.set(None);
            result?;
            (list, got) = (back, end);
        }
        match list.pop() {
            Some(IoBuf::Heap(buf)) => Ok(buf),
            _ => Err(io::ErrorKind::Other.into()),
        }
    }
}
