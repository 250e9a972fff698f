//! An NBD export as a store.
//!
//! - [`NbdOptions`]: connections and patience
//! - [`NbdBackend`]: the store; splits, widens and retries requests
//!
//! Inside: `wire` (the protocol's bytes), `extents` (what is allocated), `handshake` (negotiation), `queue` (requests waiting for a connection),
//! `connection` (sending, receiving and matching replies).
//!
//! Source: `doc/proto.md` and `doc/uri.md` of the NBD project. Several connections are used where the server advertises
//! `NBD_FLAG_CAN_MULTI_CONN`, which promises that a flush on one covers the writes completed on all. A lost connection is
//! made again with growing pauses and its requests are sent again; after [`NbdOptions::retry_for`] they fail.

mod connection;
mod extents;
mod files;
mod handshake;
mod queue;
mod wire;

use super::error::StoreError;
use super::gate::{Drain, Gate, UnderWay};
use super::spec::NbdAddress;
use super::{Backend, Extent, PAGE, Stamp, StoreInfo, StoreOptions, Transfer, check_range};
use crate::engine::{AlignedBuf, IoBuf, JoinHandle, LocalBoxFuture, Shard, bufs};
use handshake::Target;
use queue::{Client, Outcome};
use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use wire::{Command, ExportInfo};

/// How to use an NBD export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdOptions {
    /// Connections to a server that allows several (`NBD_FLAG_CAN_MULTI_CONN`); 1 to 16. To others there is one.
    pub connections: usize,
    /// How long requests wait for a lost server to come back before they fail.
    pub retry_for: Duration,
    /// A connection on which a request has had no answer for this long is given up and the request sent on another.
    pub request_timeout: Duration,
    /// Largest request sent in one piece. Servers accept 32 MiB unless they say otherwise.
    pub max_request_bytes: u32,
    /// What the server serves, if that is files of this host: a change of theirs is one of the store's. Empty: nobody knows.
    pub files: Vec<PathBuf>,
}

impl Default for NbdOptions {
    fn default() -> NbdOptions {
        NbdOptions {
            connections: 4,
            retry_for: Duration::from_secs(60),
            request_timeout: Duration::from_secs(30),
            max_request_bytes: 32 << 20,
            files: Vec::new(),
        }
    }
}

/// More than this never helped a server and only costs it threads.
const CONNECTIONS_MAX: usize = 16;
/// Pauses between attempts to connect double from the first to the second.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a connection beyond the first waits when the server has stopped to allow several.
const PARKED: Duration = Duration::from_secs(60);
/// How long closing waits for the server to flush, and to take a goodbye.
const GOODBYE: Duration = Duration::from_secs(2);
/// Trims and zeroes carry no data, so only their 32-bit length limits them; a multiple of every block size below that.
const NO_PAYLOAD_MAX_BYTES: u64 = 1 << 30;
/// One request that zeroes a range by writing carries at most this much.
const ZEROES_BYTES: u64 = 1 << 20;

/// An NBD export.
#[derive(Debug)]
pub(super) struct NbdBackend {
    inner: Rc<Inner>,
    tasks: Rc<RefCell<Vec<JoinHandle<()>>>>,
}

#[derive(Debug)]
struct Inner {
    client: Rc<Client>,
    read_only: bool,
    min_block: u64,
    gate: Rc<Gate>,
    drain: Rc<Drain>,
    /// Of the server's files.
    stamp: Cell<Option<Stamp>>,
    /// Something may have been written.
    wrote: Cell<bool>,
}

impl NbdBackend {
    pub(super) async fn open(
        shard: &Shard,
        address: &NbdAddress,
        export: &str,
        options: &StoreOptions,
    ) -> Result<NbdBackend, StoreError> {
        let store = queue::identity(address, export);
        let max_request_bytes = options.nbd.max_request_bytes.max(1 << 16);
        let target = Target { address: address.clone(), export: export.to_owned(), store, max_request_bytes };
        let (fd, info) = handshake::connect(shard, &target).await?;
        if info.has(wire::EXPORT_READ_ONLY) && !options.read_only {
            return Err(StoreError::ReadOnly { store: target.store });
        }
        let client = Client::new(shard.clone(), target, options.nbd.clone(), info);
        let count = match info.has(wire::EXPORT_MULTI_CONN) {
            true => options.nbd.connections.clamp(1, CONNECTIONS_MAX),
            false => 1,
        };
        let mut tasks = vec![shard.spawn(serve(Rc::clone(&client), true, Some((fd, info))))];
        tasks.extend((1..count).map(|_| shard.spawn(serve(Rc::clone(&client), false, None))));
        tasks.push(shard.spawn(expire(Rc::clone(&client))));
        let inner = Inner {
            client,
            read_only: options.read_only,
            min_block: u64::from(info.min_block_bytes),
            gate: Rc::default(),
            drain: Rc::default(),
            stamp: Cell::default(),
            wrote: Cell::new(false),
        };
        inner.look_at_files().await?;
        Ok(NbdBackend { inner: Rc::new(inner), tasks: Rc::new(RefCell::new(tasks)) })
    }
}

impl Drop for NbdBackend {
    fn drop(&mut self) {
        // The connections end when what is under way has been answered.
        self.inner.client.closing.set(true);
        self.inner.client.work.notify_all();
        self.inner.client.state.notify_all();
    }
}

/// Keeps one connection up.
async fn serve(client: Rc<Client>, first: bool, mut ready: Option<(Rc<OwnedFd>, ExportInfo)>) {
    let mut pause = Duration::ZERO;
    while !client.closing.get() {
        let connected = match ready.take() {
            Some(ready) => Ok(ready),
            None => handshake::connect(&client.shard, &client.target).await,
        };
        let adopted = connected.and_then(|(fd, info)| client.adopt(info).map(|()| (fd, info)));
        let cause = match adopted {
            Ok((_, info)) if !first && !info.has(wire::EXPORT_MULTI_CONN) => {
                rest(&client, PARKED).await;
                continue;
            }
            Ok((fd, info)) => {
                client.live.set(client.live.get() + 1);
                if client.live.get() == 1
                    && let Some(was) = client.last_loss.take()
                {
                    tracing::info!("{}: connected again ({was})", client.target.store);
                }
                if first {
                    client.renew.set(false);
                }
                client.work.notify_all();
                client.state.notify_all();
                let ended = connection::run(&client, fd, info, first).await;
                client.live.set(client.live.get() - 1);
                if client.live.get() == 0 {
                    client.went_down();
                }
                if ended.answered > 0 {
                    pause = Duration::ZERO;
                }
                ended.cause
            }
            Err(error) => Some(error),
        };
        if let Some(cause) = cause {
            let mut last = client.last_loss.borrow_mut();
            // One line a loss, not one an attempt.
            if client.live.get() == 0 && last.is_none() {
                tracing::warn!("{cause}; trying to connect again for {:?}", client.options.retry_for);
            }
            *last = Some(cause);
        }
        client.state.notify_all();
        if pause > Duration::ZERO && !client.closing.get() {
            rest(&client, pause).await;
        }
        pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
    }
}

/// Waits, but not beyond the closing.
async fn rest(client: &Rc<Client>, pause: Duration) {
    let until = std::time::Instant::now() + pause;
    while !client.closing.get() && std::time::Instant::now() < until {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let changed = Rc::clone(client);
        let _ = client.shard.timeout(left, async move { changed.state.notified().await }).await;
    }
}

/// Fails requests that have waited for a connection for too long.
async fn expire(client: Rc<Client>) {
    loop {
        let next = client.expire();
        if client.closing.get() && client.waiting.borrow().is_empty() {
            return;
        }
        match next {
            None => client.state.notified().await,
            Some(next) => {
                let left = next.saturating_duration_since(std::time::Instant::now());
                let changed = Rc::clone(&client);
                let _ = client.shard.timeout(left, async move { changed.state.notified().await }).await;
            }
        }
    }
}

impl Inner {
    fn store(&self) -> String {
        self.client.store()
    }

    fn begin(&self, writes: bool, offset: u64, len: u64) -> Result<UnderWay, StoreError> {
        let size = self.client.size_told();
        if writes && self.read_only {
            return Err(StoreError::ReadOnly { store: self.store() });
        }
        check_range(offset, len, if writes { size } else { size.next_multiple_of(PAGE) })?;
        let entered = self.drain.enter().ok_or_else(|| StoreError::Closed { store: self.store() })?;
        if writes {
            self.wrote.set(true);
        }
        Ok(entered)
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.min_block) && len.is_multiple_of(self.min_block)
    }

    /// The whole blocks around a range. The export's size is a multiple of the block, so they lie within it.
    fn blocks_around(&self, offset: u64, len: u64) -> (u64, u64) {
        let start = offset - offset % self.min_block;
        (start, (offset + len).next_multiple_of(self.min_block) - start)
    }

    /// Reads or writes an aligned range in pieces that the server takes.
    async fn transfer(&self, command: Command, flags: u16, offset: u64, mut list: Vec<IoBuf>, len: usize) -> Outcome {
        let mut done = 0usize;
        while done < len {
            let piece = (len - done).min(self.client.export.get().max_payload_bytes as usize);
            let at = offset + done as u64;
            let submitted = self.client.submit(command, flags, at, piece as u32, list, done..done + piece).await;
            list = submitted.1;
            if let Err(error) = submitted.0 {
                return (Err(error), list);
            }
            done += piece;
        }
        (Ok(()), list)
    }

    async fn read(&self, offset: u64, mut list: Vec<IoBuf>) -> Outcome {
        let len = bufs::total_len(&list);
        let _under_way = match self.begin(false, offset, len as u64) {
            Ok(under_way) => under_way,
            Err(error) => return (Err(error), list),
        };
        let present = usize::try_from(self.client.size_told().saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        let result = if self.is_aligned(offset, present as u64) {
            let (result, back) = self.transfer(Command::Read, 0, offset, list, present).await;
            list = back;
            result
        } else {
            let (start, span) = self.blocks_around(offset, present as u64);
            let bounce = vec![IoBuf::heap(span as usize)];
            let (result, bounce) = self.transfer(Command::Read, 0, start, bounce, span as usize).await;
            let skip = (offset - start) as usize;
            if let (Ok(()), Some(bounce)) = (&result, bounce.first()) {
                bufs::copy_in(&mut list, 0, &bounce.as_slice()[skip..skip + present]);
            }
            result
        };
        if result.is_ok() {
            bufs::zero(&mut list, present..len);
        }
        (result, list)
    }

    async fn write(&self, offset: u64, list: Vec<IoBuf>, fua: bool) -> Outcome {
        let len = bufs::total_len(&list);
        let _under_way = match self.begin(true, offset, len as u64) {
            Ok(under_way) => under_way,
            Err(error) => return (Err(error), list),
        };
        let one_step = fua && self.client.export.get().has(wire::EXPORT_FUA);
        let flags = if one_step { wire::CMD_FUA } else { 0 };
        let (result, list) = if self.is_aligned(offset, len as u64) {
            let _shared = self.gate.shared().await;
            self.transfer(Command::Write, flags, offset, list, len).await
        } else {
            (self.write_widened(flags, offset, &list, len).await, list)
        };
        match result {
            Ok(()) if fua && !one_step => (self.flush_now().await, list),
            result => (result, list),
        }
    }

    async fn write_widened(&self, flags: u16, offset: u64, list: &[IoBuf], len: usize) -> Result<(), StoreError> {
        let _alone = self.gate.alone().await;
        let (start, span) = self.blocks_around(offset, len as u64);
        let bounce = vec![IoBuf::heap(span as usize)];
        let (result, mut bounce) = self.transfer(Command::Read, 0, start, bounce, span as usize).await;
        result?;
        if let Some(target) = bounce.first_mut() {
            let skip = (offset - start) as usize;
            bufs::copy_out(list, 0, &mut target.as_mut_slice()[skip..skip + len]);
        }
        self.transfer(Command::Write, flags, start, bounce, span as usize).await.0
    }

    async fn flush_now(&self) -> Result<(), StoreError> {
        // A server without flush has nothing that could be lost, says the protocol.
        if !self.client.export.get().has(wire::EXPORT_FLUSH) {
            return Ok(());
        }
        self.client.submit(Command::Flush, 0, 0, 0, Vec::new(), 0..0).await.0
    }

    async fn flush(&self) -> Result<(), StoreError> {
        let _under_way = self.begin(false, 0, 0)?;
        if self.read_only {
            return Ok(());
        }
        self.flush_now().await
    }

    /// Sends a trim or zeroes for a range of whole blocks.
    async fn without_payload(&self, command: Command, flags: u16, start: u64, end: u64) -> Result<(), StoreError> {
        let mut at = start;
        while at < end {
            let step = (end - at).min(NO_PAYLOAD_MAX_BYTES);
            self.client.submit(command, flags, at, step as u32, Vec::new(), 0..0).await.0?;
            at += step;
        }
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let _under_way = self.begin(true, offset, len)?;
        if !self.client.export.get().has(wire::EXPORT_TRIM) {
            return Ok(());
        }
        // Whole blocks only; it is a hint.
        let (start, end) = (offset.next_multiple_of(self.min_block), (offset + len) / self.min_block * self.min_block);
        self.without_payload(Command::Trim, 0, start, end).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), StoreError> {
        let _under_way = self.begin(true, offset, len)?;
        let (start, end) = (offset.next_multiple_of(self.min_block), (offset + len) / self.min_block * self.min_block);
        if start >= end {
            return self.zero_by_writing(offset, len).await;
        }
        self.zero_by_writing(offset, start - offset).await?;
        self.zero_by_writing(end, offset + len - end).await?;
        if !self.client.export.get().has(wire::EXPORT_WRITE_ZEROES) {
            return self.zero_by_writing(start, end - start).await;
        }
        let _shared = self.gate.shared().await;
        let flags = if may_unmap { 0 } else { wire::CMD_NO_HOLE };
        self.without_payload(Command::WriteZeroes, flags, start, end).await
    }

    async fn zero_by_writing(&self, mut offset: u64, mut len: u64) -> Result<(), StoreError> {
        while len > 0 {
            let step = len.min(ZEROES_BYTES);
            let list = vec![IoBuf::from(AlignedBuf::zeroed(step as usize))];
            if self.is_aligned(offset, step) {
                let _shared = self.gate.shared().await;
                self.transfer(Command::Write, 0, offset, list, step as usize).await.0?;
            } else {
                self.write_widened(0, offset, &list, step as usize).await?;
            }
            (offset, len) = (offset + step, len - step);
        }
        Ok(())
    }

    /// NBD tells the size only in the negotiation, so the first connection finishes its requests and negotiates anew.
    async fn look_at_files(&self) -> Result<(), StoreError> {
        let files = self.client.options.files.clone();
        if files.is_empty() {
            return Ok(());
        }
        let looked = self.client.shard.blocking(move || files::stamp(&files)).await.flatten();
        self.stamp.set(looked.map_err(|error| StoreError::from_io(&self.store(), "stat the files of", &error))?);
        Ok(())
    }

    async fn refresh_size(&self) -> Result<u64, StoreError> {
        let _under_way = self.begin(false, 0, 0)?;
        self.look_at_files().await?;
        let client = Rc::clone(&self.client);
        client.renew.set(true);
        client.work.notify_all();
        let renewed = async move {
            while client.renew.get() && client.broken.borrow().is_none() {
                client.state.notified().await;
            }
        };
        let limit = self.client.options.retry_for;
        let renewed = self.client.shard.timeout(limit, renewed).await;
        if let Some(error) = self.client.broken.borrow().clone() {
            return Err(error);
        }
        if renewed.is_err() {
            return Err(StoreError::Timeout { store: self.store() });
        }
        Ok(self.client.tell_size())
    }
}

impl Backend for NbdBackend {
    fn info(&self) -> StoreInfo {
        let export = self.inner.client.export.get();
        StoreInfo {
            identity: self.inner.store(),
            size_bytes: self.inner.client.size_told(),
            read_only: self.inner.read_only,
            min_io_bytes: self.inner.min_block as u32,
            max_io_bytes: export.max_payload_bytes,
            can_flush: export.has(wire::EXPORT_FLUSH),
            can_fua: export.has(wire::EXPORT_FUA),
            can_discard: !self.inner.read_only && export.has(wire::EXPORT_TRIM),
            can_write_zeroes: !self.inner.read_only && export.has(wire::EXPORT_WRITE_ZEROES),
            version_stamp: self.inner.stamp.get(),
        }
    }

    fn read(&self, offset: u64, bufs: Vec<IoBuf>) -> Transfer {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.read(offset, bufs).await })
    }

    fn write(&self, offset: u64, bufs: Vec<IoBuf>, fua: bool) -> Transfer {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.write(offset, bufs, fua).await })
    }

    fn flush(&self) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.flush().await })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.discard(offset, len).await })
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> LocalBoxFuture<Result<(), StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.write_zeroes(offset, len, may_unmap).await })
    }

    fn extents(&self, offset: u64, len: u64, most: usize) -> LocalBoxFuture<Result<Vec<Extent>, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.extents(offset, len, most).await })
    }

    fn refresh_size(&self) -> LocalBoxFuture<Result<u64, StoreError>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(async move { inner.refresh_size().await })
    }

    fn who_grows(&self) -> &'static str {
        "its server decides how large it is: make it larger there"
    }

    fn close(&self) -> LocalBoxFuture<()> {
        let (inner, tasks) = (Rc::clone(&self.inner), Rc::clone(&self.tasks));
        Box::pin(async move {
            inner.drain.close().await;
            let client = &inner.client;
            if inner.wrote.get() {
                // The guest may yet ask for a flush, of the next one that serves it. On another connection that need not cover what
                // was written on this one.
                let flushed = Rc::clone(&inner);
                match client.shard.timeout(GOODBYE, async move { flushed.flush_now().await }).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(%error, "not flushed at its end"),
                    Err(_) => tracing::warn!("{} does not flush at its end", inner.store()),
                }
            }
            client.closing.set(true);
            client.work.notify_all();
            client.state.notify_all();
            let mut tasks = tasks.take();
            let ended = std::future::poll_fn(move |context| {
                tasks.retain_mut(|task| Pin::new(task).poll(context).is_pending());
                if tasks.is_empty() { Poll::Ready(()) } else { Poll::Pending }
            });
            // A server that hangs keeps its connection until the watchdog's time is up; nobody waits for that.
            let _ = client.shard.timeout(GOODBYE, ended).await;
        })
    }
}
