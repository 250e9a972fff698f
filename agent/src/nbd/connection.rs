//! One client in transmission: requests in, answers out.
//!
//! - [`run`]: serves a client until it goes, is sent away, or breaks the protocol
//!
//! The reader takes requests; what the RAM tier has is answered on the spot, everything else runs as a task of its own and
//! is answered when it is done, in any order. The writer sends what has gathered meanwhile with one call. A third task
//! watches for a client that stops in the middle: of a request, or of reading its answers.
//!
//! **Bounds of a connection.** [`IN_FLIGHT_MAX`] requests and [`BUDGET_BYTES`] of their payloads and answers; beyond that
//! nothing is read from the socket. Requests from memory stop at [`BACKLOG_BYTES`] of answers that are not sent.

use super::export::{Client, NbdExport};
use super::wire::{Inbound, Wire};
use prestage_cache::backend::StoreError;
use prestage_cache::disk::Disk;
use prestage_cache::engine::{AlignedBuf, Notify};
use prestage_integration::export::nbd::{
    Agreement, Command, Event, Extent, NbdError, PAYLOAD_MAX_BYTES, REPLY_HEAD_MAX_BYTES, Replies, Request, Requests,
};
use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Requests under way: twice what the deepest client in use (nbdcopy, QEMU) has on one connection.
const IN_FLIGHT_MAX: u32 = 128;
/// Payloads of requests under way and answers not sent: one request of the greatest length beside small ones, or many of
/// middle size.
const BUDGET_BYTES: usize = PAYLOAD_MAX_BYTES as usize + 2 * BACKLOG_BYTES;
/// Answers that may wait before the next request is looked at: what is sent while more is made, and no larger than
/// the processor's cache.
const BACKLOG_BYTES: usize = 1 << 20;
/// Answers that are worth a call of their own: they are sent from the processor's cache, and the client works on them while
/// the next are made.
const SEND_BYTES: usize = 256 << 10;
/// Requests taken in one go before other tasks of the shard have their turn.
const BATCH: u32 = 64;
/// Reads of at most this much are looked for in the RAM tier first.
const READ_NOW_BYTES: u32 = 128 << 10;
/// A large read is done in pieces of this size, so that its blocks need not all be in the RAM tier at once.
const READ_PIECE_BYTES: u32 = 4 << 20;
/// Extents in one answer; clients ask again from where it ends.
const EXTENTS_MAX: usize = 1024;
/// A client that takes no MiB of its answers, or sends none of its payload, for this long is gone. A paused virtual machine's
/// QEMU is not meant: it stands still between requests.
const STALL_LIMIT: Duration = Duration::from_secs(30);
/// The same once the export is to end.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How often that is looked at.
const WATCH: Duration = Duration::from_secs(1);

struct Connection {
    wire: Rc<Wire>,
    export: Arc<NbdExport>,
    client: Rc<Client>,
    disk: Disk,
    replies: Replies,
    in_flight: Cell<u32>,
    reserved: Cell<usize>,
    /// Something under way has ended, or room was made.
    room: Notify,
    /// No more requests: the writer ends when it has sent everything.
    finishing: Cell<bool>,
}

/// Why no more requests are taken.
enum End {
    /// The client said goodbye, or simply closed.
    Gone,
    /// The export ends.
    Stopped,
    Broken(String),
}

/// Serves a client. Returns when nothing of it is under way.
pub(super) async fn run(
    export: &Arc<NbdExport>,
    client: &Rc<Client>,
    disk: Disk,
    agreement: &Agreement,
    mut inbound: Inbound,
) {
    let connection = Rc::new(Connection {
        wire: Rc::clone(&inbound.wire),
        export: Arc::clone(export),
        client: Rc::clone(client),
        disk,
        replies: Replies::new(agreement),
        in_flight: Cell::new(0),
        reserved: Cell::new(0),
        room: Notify::new(),
        finishing: Cell::new(false),
    });
    let shard = inbound.wire.shard.clone();
    let writer = shard.spawn(send(Rc::clone(&connection)));
    let watchdog = shard.spawn(watch(Rc::clone(&connection)));
    let end = connection.serve(&mut inbound, Requests::new(agreement)).await;
    while connection.in_flight.get() > 0 {
        connection.room.notified().await;
    }
    connection.finishing.set(true);
    connection.wire.work.notify_all();
    let _ = writer.await;
    watchdog.abort();
    connection.wire.kill();
    let (disk, peer) = (export.name(), client.peer());
    match end {
        End::Gone => tracing::info!(disk, peer, "NBD client gone"),
        End::Stopped => tracing::info!(disk, peer, "NBD client sent away"),
        End::Broken(reason) => tracing::warn!(disk, peer, reason, "NBD client cut off"),
    }
}

/// The writer's task.
async fn send(connection: Rc<Connection>) {
    let wire = &connection.wire;
    loop {
        match wire.send().await {
            Ok(true) => connection.room.notify_all(),
            Ok(false) if wire.is_dead() => break,
            Ok(false) if connection.finishing.get() => {
                wire.say_goodbye();
                let _ = wire.send().await;
                break;
            }
            Ok(false) => wire.work.notified().await,
            Err(_) => break,
        }
    }
    // Whatever the reason: nothing can be answered any more.
    if !connection.finishing.get() {
        wire.kill();
        connection.room.notify_all();
    }
}

/// The watchdog's task.
async fn watch(connection: Rc<Connection>) {
    let wire = &connection.wire;
    loop {
        wire.shard.sleep(WATCH).await;
        let limit = if connection.client.is_stopping() { STOP_LIMIT } else { STALL_LIMIT };
        let (sending, receiving) = wire.stalled_since();
        let late = |since: Option<Instant>| since.is_some_and(|since| since.elapsed() >= limit);
        let what = match (late(sending), late(receiving)) {
            (true, _) => "does not read its answers",
            (_, true) => "stopped in the middle of a request",
            _ => continue,
        };
        tracing::warn!(disk = connection.export.name(), peer = connection.client.peer(), "NBD client {what}");
        wire.kill();
        connection.room.notify_all();
        return;
    }
}

/// A request under way; ends when dropped, also with its task.
struct UnderWay {
    connection: Rc<Connection>,
    bytes: usize,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let connection = &self.connection;
        connection.in_flight.set(connection.in_flight.get().saturating_sub(1));
        connection.reserved.set(connection.reserved.get().saturating_sub(self.bytes));
        connection.client.counters().in_flight.fetch_sub(1, Ordering::Relaxed);
        connection.room.notify_all();
    }
}

impl Connection {
    fn ended(&self) -> Option<End> {
        match (self.client.is_stopping(), self.wire.is_dead()) {
            (true, _) => Some(End::Stopped),
            (_, true) => Some(End::Gone),
            _ => None,
        }
    }

    async fn serve(self: &Rc<Self>, inbound: &mut Inbound, mut requests: Requests) -> End {
        let mut taken = 0;
        loop {
            if let Some(end) = self.ended() {
                return end;
            }
            if self.wire.queued() >= BACKLOG_BYTES {
                self.wire.work.notify_all();
                self.room.notified().await;
                continue;
            }
            let (used, event) = match requests.next(inbound.peek()) {
                Ok(next) => next,
                Err(error) => return End::Broken(error.to_string()),
            };
            inbound.consume(used);
            match event {
                None => {
                    self.wire.work.notify_all();
                    let middle = !inbound.peek().is_empty();
                    match inbound.fill(middle).await {
                        Ok(true) => {}
                        Ok(false) => return self.ended().unwrap_or(End::Gone),
                        Err(error) => return self.ended().unwrap_or_else(|| End::Broken(error.to_string())),
                    }
                    taken = 0;
                    continue;
                }
                Some(Event::Disconnect) => return End::Gone,
                Some(Event::Refused { cookie, error, why }) => self.refuse(cookie, error, why),
                Some(Event::Request(request)) => {
                    if let Err(end) = self.take(inbound, request).await {
                        return end;
                    }
                }
            }
            taken += 1;
            if taken % BATCH == 0 || self.wire.gathered() >= SEND_BYTES {
                self.wire.work.notify_all();
                self.wire.shard.yield_now().await;
            }
        }
    }

    fn refuse(&self, cookie: u64, error: NbdError, why: &str) {
        let room = REPLY_HEAD_MAX_BYTES + why.len();
        self.wire.answer(room, |out| self.replies.error(out, cookie, error, why));
    }

    fn done(&self, cookie: u64) {
        self.wire.answer(REPLY_HEAD_MAX_BYTES, |out| self.replies.done(out, cookie));
    }

    /// Answers a read if the RAM tier has all of it.
    fn read_now(&self, request: &Request) -> bool {
        let len = request.len_bytes as usize;
        self.wire.answer(REPLY_HEAD_MAX_BYTES + len, |out| {
            let before = out.len();
            self.replies.data(out, request.cookie, request.offset_bytes, request.len_bytes);
            let hit =
                len == 0 || self.disk.try_read(request.offset_bytes, len, |_, bytes| out.extend_from_slice(bytes));
            if !hit {
                out.truncate(before);
            }
            hit
        })
    }

    /// Answers a request, or starts what it takes.
    async fn take(self: &Rc<Self>, inbound: &mut Inbound, request: Request) -> Result<(), End> {
        self.client.counters().requests.fetch_add(1, Ordering::Relaxed);
        match request.command {
            Command::Read if request.len_bytes <= READ_NOW_BYTES && self.read_now(&request) => return Ok(()),
            Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. } if request.len_bytes == 0 => {
                self.done(request.cookie);
                return Ok(());
            }
            _ => {}
        }
        let bytes = match request.command {
            Command::Read | Command::Write { .. } => request.len_bytes as usize,
            _ => 0,
        };
        let under_way = self.admit(bytes).await?;
        let payload = match request.command {
            Command::Write { .. } => {
                let payload = inbound.take(request.len_bytes as usize).await;
                Some(payload.map_err(|error| self.ended().unwrap_or_else(|| broken(&error)))?)
            }
            _ => None,
        };
        self.wire.shard.spawn(async move {
            let connection = &under_way.connection;
            if let Err(error) = connection.run(&request, payload).await {
                tracing::warn!(disk = connection.export.name(), %error, ?request, "NBD request failed");
                connection.refuse(request.cookie, NbdError::from_errno(error.errno()), why(&error));
            }
            connection.wire.work.notify_all();
        });
        Ok(())
    }

    /// Waits for room for a request with so many bytes.
    async fn admit(self: &Rc<Self>, bytes: usize) -> Result<UnderWay, End> {
        loop {
            let held = self.reserved.get() + self.wire.queued();
            if self.in_flight.get() < IN_FLIGHT_MAX && held + bytes <= BUDGET_BYTES {
                break;
            }
            self.wire.work.notify_all();
            self.room.notified().await;
            if let Some(end) = self.ended() {
                return Err(end);
            }
        }
        self.in_flight.set(self.in_flight.get() + 1);
        self.reserved.set(self.reserved.get() + bytes);
        self.client.counters().in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(UnderWay { connection: Rc::clone(self), bytes })
    }

    /// Carries a request out and answers it, unless it fails.
    async fn run(&self, request: &Request, payload: Option<AlignedBuf>) -> Result<(), StoreError> {
        let Request { cookie, command, offset_bytes: offset, len_bytes } = *request;
        let (disk, len) = (&self.disk, u64::from(len_bytes));
        match command {
            Command::Read => return self.read(request).await,
            Command::BlockStatus { one } => return self.block_status(request, one).await,
            Command::Write { fua } => {
                // It came with the request.
                let payload = payload.unwrap_or_else(|| AlignedBuf::new(0));
                match fua {
                    true => disk.write_durable(offset, payload).await?,
                    false => disk.write(offset, payload).await?,
                }
            }
            Command::Flush => disk.flush().await?,
            Command::Trim { fua } => {
                disk.discard(offset, len).await?;
                if fua {
                    disk.flush().await?;
                }
            }
            Command::WriteZeroes { fua, may_unmap } => {
                disk.write_zeroes(offset, len, may_unmap).await?;
                if fua {
                    disk.flush().await?;
                }
            }
            // A hint: what there is no room for is not missed.
            Command::Cache => self.export.prefetch(disk, offset, len).await?,
        }
        self.done(cookie);
        Ok(())
    }

    async fn read(&self, request: &Request) -> Result<(), StoreError> {
        let Request { cookie, offset_bytes: offset, len_bytes: len, .. } = *request;
        let room = REPLY_HEAD_MAX_BYTES + len as usize;
        let head = |out: &mut Vec<u8>| self.replies.data(out, cookie, offset, len);
        if len <= READ_PIECE_BYTES {
            let data = self.disk.read(offset, len as usize).await?;
            self.wire.answer(room, |out| {
                head(out);
                data.copy_to(|_, bytes| out.extend_from_slice(bytes));
            });
            return Ok(());
        }
        let mut whole = Vec::with_capacity(room);
        head(&mut whole);
        let mut at = 0;
        while at < len {
            let part = READ_PIECE_BYTES.min(len - at);
            let data = self.disk.read(offset + u64::from(at), part as usize).await?;
            data.copy_to(|_, bytes| whole.extend_from_slice(bytes));
            at += part;
        }
        self.wire.answer(room, |out| *out = whole);
        Ok(())
    }

    async fn block_status(&self, request: &Request, one: bool) -> Result<(), StoreError> {
        let most = if one { 1 } else { EXTENTS_MAX };
        let found = self.disk.extents(request.offset_bytes, u64::from(request.len_bytes), most).await?;
        let extents = found.iter().map(|extent| Extent {
            // No longer than the request.
            len_bytes: u32::try_from(extent.len_bytes).unwrap_or(u32::MAX),
            hole: extent.hole,
            zero: extent.zero,
        });
        let extents: Vec<Extent> = extents.collect();
        let room = REPLY_HEAD_MAX_BYTES + 8 * extents.len();
        self.wire.answer(room, |out| self.replies.block_status(out, request.cookie, &extents));
        Ok(())
    }
}

fn broken(error: &io::Error) -> End {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => End::Broken("it closed in the middle of a write".to_owned()),
        _ => End::Broken(error.to_string()),
    }
}

/// What a client is told. Paths and addresses of stores are the host's own business; its log has them.
fn why(error: &StoreError) -> &'static str {
    match error {
        StoreError::NoSpace { .. } => "the store has no space left",
        StoreError::ReadOnly { .. } => "the store is read-only",
        StoreError::Shrunk { .. } => "the store has shrunk",
        StoreError::Disconnected { .. } | StoreError::Timeout { .. } => "the store does not answer",
        StoreError::Closed { .. } => "the store is closed",
        _ => "the store failed; the log of prestaged says how",
    }
}
