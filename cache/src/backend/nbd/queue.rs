//! Requests to an export, from being asked for to being answered.
//!
//! - [`Request`]: one request of at most the server's payload size
//! - [`Client`]: what all connections of an export share: waiting requests, state, reasons of failure

use super::super::error::StoreError;
use super::super::spec::StoreSpec;
use super::handshake::Target;
use super::wire::{Command, ExportInfo};
use super::{NbdOptions, wire};
use crate::engine::{IoBuf, Notify, OneshotSender, Shard, oneshot};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

pub(super) type Outcome = (Result<(), StoreError>, Vec<IoBuf>);

/// One request. `range` is the part of the buffers, seen as one run, that it reads into or writes.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: Command,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) bufs: Vec<IoBuf>,
    pub(super) range: Range<usize>,
    pub(super) reply: OneshotSender<Outcome>,
    /// When a connection was first missing to it; counts against [`NbdOptions::retry_for`].
    pub(super) first_loss: Option<Instant>,
}

impl Request {
    pub(super) fn finish(self, result: Result<(), StoreError>) {
        self.reply.send((result, self.bufs));
    }
}

/// What the connections of an export share.
pub(super) struct Client {
    pub(super) shard: Shard,
    pub(super) target: Target,
    pub(super) options: NbdOptions,
    /// Requests that no connection has taken yet. Those to be sent again are in front.
    pub(super) waiting: RefCell<VecDeque<Request>>,
    /// Something changed that a connection's sender may wait for.
    pub(super) work: Notify,
    /// Something changed that the expiry task or an opener may wait for.
    pub(super) state: Notify,
    /// Connections in transmission phase.
    pub(super) live: Cell<usize>,
    /// As of the last negotiation.
    pub(super) export: Cell<ExportInfo>,
    /// What users of the store have been told, which every negotiation must live up to: as of the opening, with the size
    /// of the last [`super::Backend::refresh_size`]. Requests are held to this size. A new connection changes none of it,
    /// or an export that is larger or laxer for a while could not come back as what it was.
    pub(super) told: Cell<ExportInfo>,
    /// Requests are refused with this until a negotiation finds the export in order again.
    pub(super) broken: RefCell<Option<StoreError>>,
    pub(super) last_loss: RefCell<Option<StoreError>>,
    pub(super) closing: Cell<bool>,
    /// Raised to make the first connection finish its requests and negotiate anew; lowered when it has.
    pub(super) renew: Cell<bool>,
    next_cookie: Cell<u64>,
}

impl Client {
    pub(super) fn new(shard: Shard, target: Target, options: NbdOptions, export: ExportInfo) -> Rc<Client> {
        Rc::new(Client {
            shard,
            target,
            options,
            waiting: RefCell::default(),
            work: Notify::new(),
            state: Notify::new(),
            live: Cell::new(0),
            export: Cell::new(export),
            told: Cell::new(export),
            broken: RefCell::default(),
            last_loss: RefCell::default(),
            closing: Cell::new(false),
            renew: Cell::new(false),
            next_cookie: Cell::new(0),
        })
    }

    pub(super) fn store(&self) -> String {
        self.target.store.clone()
    }

    pub(super) fn cookie(&self) -> u64 {
        let cookie = self.next_cookie.get().wrapping_add(1);
        self.next_cookie.set(cookie);
        cookie
    }

    /// Queues a request and waits for its outcome.
    pub(super) async fn submit(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u32,
        bufs: Vec<IoBuf>,
        range: Range<usize>,
    ) -> Outcome {
        if let Some(error) = self.broken.borrow().clone() {
            return (Err(error), bufs);
        }
        let (reply, outcome) = oneshot();
        let first_loss = (self.live.get() == 0).then(Instant::now);
        self.waiting.borrow_mut().push_back(Request { command, flags, offset, len, bufs, range, reply, first_loss });
        if first_loss.is_some() {
            self.state.notify_all();
        }
        self.work.notify_all();
        // A request is answered or expires; its sender is dropped without a word only when the shard stops.
        outcome.await.unwrap_or_else(|| (Err(StoreError::Closed { store: self.store() }), Vec::new()))
    }

    /// A connection was lost: its requests go back in front of the queue, in the order in which they were taken.
    ///
    /// Sending them again is sound. A request that was not answered may or may not have been executed; reads, writes,
    /// trims, zeroes and flushes have the same effect once or twice, since all name absolute ranges and full contents. Nor
    /// does it change an order that anybody relies on: NBD orders nothing between requests in flight, and a request that
    /// the caller has ordered after this one is not sent before this one is answered. What remains is a server that
    /// executes a request of a dead connection after having answered the same request, sent again, on a new one. It
    /// could then undo a later write to the same place. Servers finish or drop what they have read when they notice the
    /// disconnect, and the socket is shut down here before anything is sent again; every NBD client that reconnects
    /// relies on it.
    pub(super) fn send_again(&self, lost: Vec<Request>, cause: &StoreError) {
        let now = Instant::now();
        let mut expired = Vec::new();
        {
            let mut waiting = self.waiting.borrow_mut();
            for mut request in lost.into_iter().rev() {
                let since = *request.first_loss.get_or_insert(now);
                if request.reply.is_closed() {
                    continue;
                }
                if now.duration_since(since) >= self.options.retry_for {
                    expired.push(request);
                } else {
                    waiting.push_front(request);
                }
            }
        }
        for request in expired {
            request.finish(Err(self.given_up(cause)));
        }
        self.work.notify_all();
        self.state.notify_all();
    }

    /// The last connection went: the time of all waiting requests starts to run.
    pub(super) fn went_down(&self) {
        let now = Instant::now();
        self.waiting.borrow_mut().iter_mut().for_each(|request| {
            request.first_loss.get_or_insert(now);
        });
        self.state.notify_all();
    }

    /// Fails requests that have waited for a connection for too long. Returns when the next one will have.
    pub(super) fn expire(&self) -> Option<Instant> {
        if self.live.get() > 0 {
            return None;
        }
        let now = Instant::now();
        let (mut expired, mut next) = (Vec::new(), None::<Instant>);
        {
            let mut waiting = self.waiting.borrow_mut();
            for mut request in std::mem::take(&mut *waiting) {
                let deadline = *request.first_loss.get_or_insert(now) + self.options.retry_for;
                if deadline <= now {
                    expired.push(request);
                } else {
                    next = Some(next.map_or(deadline, |next| next.min(deadline)));
                    waiting.push_back(request);
                }
            }
        }
        let cause = self.last_loss.borrow().clone();
        let cause = cause.unwrap_or(StoreError::Timeout { store: self.store() });
        for request in expired {
            request.finish(Err(self.given_up(&cause)));
        }
        next
    }

    fn given_up(&self, cause: &StoreError) -> StoreError {
        let reason = match cause {
            StoreError::Disconnected { reason, .. } => reason.clone(),
            StoreError::Protocol { what, .. } => format!("it broke the NBD protocol: {what}"),
            StoreError::Timeout { .. } => "it did not answer in time".to_owned(),
            other => other.to_string(),
        };
        let reason = format!("{reason}; tried for {:?}", self.options.retry_for);
        StoreError::Disconnected { store: self.store(), reason }
    }

    /// The size that users of the store know, in bytes.
    pub(super) fn size_told(&self) -> u64 {
        self.told.get().size_bytes
    }

    /// Tells the size of the last negotiation from now on, and returns it. Since [`Client::adopt`], it has not shrunk.
    pub(super) fn tell_size(&self) -> u64 {
        let size_bytes = self.export.get().size_bytes;
        self.told.set(ExportInfo { size_bytes, ..self.told.get() });
        size_bytes
    }

    /// Takes the result of a negotiation, or says what is wrong with the export now.
    pub(super) fn adopt(&self, now: ExportInfo) -> Result<(), StoreError> {
        let was = self.told.get();
        let wrong = if now.size_bytes < was.size_bytes {
            Some(StoreError::Shrunk { store: self.store(), was_bytes: was.size_bytes, now_bytes: now.size_bytes })
        } else if now.has(wire::EXPORT_READ_ONLY) && !was.has(wire::EXPORT_READ_ONLY) {
            Some(StoreError::ReadOnly { store: self.store() })
        } else if now.min_block_bytes > was.min_block_bytes {
            let what = format!("its smallest block grew to {} bytes while in use", now.min_block_bytes);
            Some(StoreError::Unsupported { store: self.store(), what })
        } else {
            None
        };
        match wrong {
            None => {
                self.export.set(now);
                self.broken.take();
                Ok(())
            }
            Some(error) => {
                *self.broken.borrow_mut() = Some(error.clone());
                let refused = std::mem::take(&mut *self.waiting.borrow_mut());
                refused.into_iter().for_each(|request| request.finish(Err(error.clone())));
                Err(error)
            }
        }
    }

    /// Takes requests for a connection that has room for `room` more: its share of what waits, so that all connections
    /// get some, but several small ones at once, so that they share a system call.
    pub(super) fn take(&self, room: usize) -> Vec<Request> {
        /// Payloads up to this size are worth sending together.
        const SMALL_BYTES: u32 = 64 << 10;
        const TOGETHER_MAX: usize = 16;
        let mut waiting = self.waiting.borrow_mut();
        let share = waiting.len().div_ceil(self.live.get().max(1)).min(room).min(TOGETHER_MAX);
        let mut taken: Vec<Request> = Vec::new();
        while taken.len() < share {
            let Some(request) = waiting.pop_front() else { break };
            if request.reply.is_closed() {
                continue;
            }
            // A limit that a server lowered while away: the part is too large now.
            let fits = !matches!(request.command, Command::Read | Command::Write)
                || request.len <= self.export.get().max_payload_bytes;
            if !fits {
                let what = "it takes smaller requests than before".to_owned();
                request.finish(Err(StoreError::Unsupported { store: self.store(), what }));
                continue;
            }
            let alone = request.command == Command::Write && request.len > SMALL_BYTES;
            if alone && !taken.is_empty() {
                waiting.push_front(request);
                break;
            }
            taken.push(request);
            if alone {
                break;
            }
        }
        taken
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("store", &self.target.store)
            .field("waiting", &self.waiting.borrow().len())
            .field("live", &self.live.get())
            .finish_non_exhaustive()
    }
}

/// The identity of an export.
pub(super) fn identity(address: &super::super::spec::NbdAddress, export: &str) -> String {
    StoreSpec::Nbd { address: address.clone(), export: export.to_owned() }.to_string()
}
