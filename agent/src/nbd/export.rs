//! A disk on offer over NBD: its unix socket, and its clients wherever they come from.
//!
//! - [`NbdExport`]: starts, stops, counts
//! - [`Client`]: one connection from its first byte on

use super::negotiate::negotiate;
use super::wire::{Inbound, Parts, Wire};
use super::{NbdClient, connection};
use crate::learner::run::unix_ms;
use futures_util::future::select;
use nix::sys::socket::{getsockopt, sockopt};
use parking_lot::Mutex;
use prestage_cache::backend::StoreError;
use prestage_cache::counters::DiskCounters;
use prestage_cache::disk::{Disk, local};
use prestage_cache::engine::{Notify, Shard};
use prestage_cache::policy::PrefetchRequest;
use prestage_cache::{Cache, StorageHandle};
use prestage_integration::export::nbd::{Agreement, ExportInfo, Exports, Security};
use prestage_integration::export::{ExportError, ExportOptions, SocketFile, listen_at};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// How often an export that does not come to an end is mentioned in the log.
const STOP_NOTICE: Duration = Duration::from_secs(10);
/// A prefetch is looked up and queued in steps of this size, so that other tasks have their turn.
const PREFETCH_STEP_BYTES: u64 = 4 << 20;
/// Pause after an accept that failed, for want of descriptors most likely.
const PAUSE: Duration = Duration::from_millis(100);

thread_local! {
    /// Exports whose home is this shard, by disk.
    static HOMES: RefCell<HashMap<u32, Rc<Home>>> = RefCell::default();
}

/// An export on its shard.
#[derive(Default)]
struct Home {
    stopping: Cell<bool>,
    /// The listener should look at `stopping`.
    wake: Notify,
    listening: Cell<bool>,
    clients: RefCell<BTreeMap<u64, Rc<Client>>>,
    /// A client has gone, or the listener has ended.
    changed: Notify,
}

/// One connection.
pub(super) struct Client {
    home: Rc<Home>,
    wire: Rc<Wire>,
    counters: Arc<ClientCounters>,
}

impl Client {
    pub(super) fn is_stopping(&self) -> bool {
        self.home.stopping.get()
    }
    pub(super) fn peer(&self) -> &str {
        &self.counters.peer
    }
    pub(super) fn counters(&self) -> &ClientCounters {
        &self.counters
    }
}

/// What is known of a client, from any thread.
#[derive(Debug)]
pub(super) struct ClientCounters {
    peer: String,
    since_unix_ms: u64,
    pub(super) requests: AtomicU64,
    pub(super) in_flight: AtomicU32,
}

/// What an export serves.
#[derive(Clone, Debug)]
pub struct NbdDisk {
    pub name: String,
    /// Names the disk in accesses and on its shard.
    pub id: u32,
    pub storage: StorageHandle,
    pub counters: Arc<DiskCounters>,
    pub read_only: bool,
    pub cache: Cache,
    /// Marks prefetches that clients ask for.
    pub tag: u8,
    /// Connections at a time.
    pub max_clients: u32,
}

/// A disk on offer over NBD.
#[derive(Debug)]
pub struct NbdExport {
    disk: NbdDisk,
    path: PathBuf,
    file: Mutex<Option<SocketFile>>,
    clients: Mutex<BTreeMap<u64, Arc<ClientCounters>>>,
    next_client: AtomicU64,
}

impl NbdExport {
    /// Listens at `path` and serves whoever may connect there.
    ///
    /// # Errors
    /// The path is too long, taken, or cannot be bound.
    pub fn start(disk: NbdDisk, path: &Path, options: &ExportOptions) -> Result<Arc<NbdExport>, ExportError> {
        let (listener, file) = listen_at(path, options)?;
        let export = Arc::new(NbdExport {
            disk,
            path: path.to_owned(),
            file: Mutex::new(Some(file)),
            clients: Mutex::default(),
            next_client: AtomicU64::new(0),
        });
        let served = Arc::clone(&export);
        export.disk.storage.shard().spawn(move |shard| async move {
            let home = Rc::new(Home::default());
            home.listening.set(true);
            HOMES.with_borrow_mut(|homes| homes.insert(served.disk.id, Rc::clone(&home)));
            served.listen(&shard, &home, listener).await;
            home.listening.set(false);
            home.changed.notify_all();
        });
        Ok(export)
    }

    pub fn name(&self) -> &str {
        &self.disk.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who is connected, the longest first.
    pub fn clients(&self) -> Vec<NbdClient> {
        let clients = self.clients.lock();
        let report = |client: &Arc<ClientCounters>| NbdClient {
            peer: client.peer.clone(),
            since_unix_ms: client.since_unix_ms,
            requests: client.requests.load(Ordering::Relaxed),
            in_flight: client.in_flight.load(Ordering::Relaxed),
        };
        clients.values().map(report).collect()
    }

    /// What a client is told now.
    pub(super) fn info(&self) -> ExportInfo {
        let store = self.disk.storage.info();
        ExportInfo {
            name: self.disk.name.clone(),
            description: format!("disk {} of prestaged", self.disk.name),
            size_bytes: store.size_bytes,
            read_only: self.disk.read_only,
            can_trim: store.can_discard,
        }
    }

    /// Asks the cache to load a range, each part of it where the disk's images have it. What the cache's queue has no room
    /// for is left out.
    ///
    /// # Errors
    /// Where the parts are cannot be found out.
    pub(super) async fn prefetch(&self, disk: &Disk, offset_bytes: u64, len_bytes: u64) -> Result<(), StoreError> {
        let NbdDisk { cache, storage, tag, .. } = &self.disk;
        let (mut at, end) = (offset_bytes, offset_bytes.saturating_add(len_bytes));
        while at < end {
            let len = PREFETCH_STEP_BYTES.min(end - at);
            let mut refused_pages = 0;
            for (of, range) in disk.spread(at, len).await? {
                let request = PrefetchRequest { range, due: cache.now(), probability: 1.0, tag: *tag };
                refused_pages += cache.prefetch(of.as_ref().unwrap_or(storage), &[request]);
            }
            if refused_pages > 0 {
                break;
            }
            at += len;
            disk.storage().shard().yield_now().await;
        }
        Ok(())
    }

    /// Takes no more clients, lets requests under way end, closes all connections and removes the socket. Blocks: not for
    /// shard threads.
    pub fn stop(&self) {
        let id = self.disk.id;
        let mut call = self.disk.storage.shard().call(move |_| async move {
            let Some(home) = HOMES.with_borrow_mut(|homes| homes.remove(&id)) else { return };
            home.stopping.set(true);
            home.wake.notify_all();
            home.clients.borrow().values().for_each(|client| client.wire.end_reading());
            while home.listening.get() || !home.clients.borrow().is_empty() {
                home.changed.notified().await;
            }
        });
        while let Ok(None) = call.wait_timeout(STOP_NOTICE) {
            tracing::warn!(disk = self.disk.name, "NBD requests are still under way; the store does not answer");
        }
        drop(self.file.lock().take());
    }

    async fn listen(self: &Arc<Self>, shard: &Shard, home: &Rc<Home>, listener: UnixListener) {
        let fd = match listener.as_fd().try_clone_to_owned() {
            Ok(fd) => Rc::new(fd),
            Err(error) => return tracing::error!(disk = self.disk.name, %error, "NBD socket not served"),
        };
        while !home.stopping.get() {
            {
                let (readable, wake) = (pin!(shard.readable(&fd)), pin!(home.wake.notified()));
                select(readable, wake).await;
            }
            while !home.stopping.get() {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let peer = peer(&stream);
                        self.serve(shard, home, stream.into(), peer);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        tracing::error!(disk = self.disk.name, %error, "cannot accept an NBD client");
                        shard.sleep(PAUSE).await;
                        break;
                    }
                }
            }
        }
    }

    /// Serves a client of the unix socket from its first byte.
    fn serve(self: &Arc<Self>, shard: &Shard, home: &Rc<Home>, fd: OwnedFd, peer: String) {
        let inbound = Inbound::new(shard, Parts { fd, tls: None, unread: Vec::new() });
        let Some(registered) = self.register(home, &inbound, peer) else { return };
        let export = Arc::clone(self);
        shard.spawn(async move {
            match negotiate(inbound, Arc::clone(&export) as _, Security::None, None).await {
                Ok((agreement, inbound)) => export.transmit(&registered, &agreement, inbound).await,
                Err(reason) => tracing::debug!(disk = export.name(), reason, "NBD client did not enter"),
            }
        });
    }

    /// Takes a client that has chosen this export elsewhere.
    pub(super) fn adopt(self: &Arc<Self>, parts: Parts, agreement: Agreement, peer: String) {
        let export = Arc::clone(self);
        self.disk.storage.shard().spawn(move |shard| async move {
            let Some(home) = HOMES.with_borrow(|homes| homes.get(&export.disk.id).cloned()) else { return };
            let inbound = Inbound::new(&shard, parts);
            let Some(registered) = export.register(&home, &inbound, peer) else { return };
            export.transmit(&registered, &agreement, inbound).await;
        });
    }

    /// Counts a client in; `None` if there are enough already.
    fn register(self: &Arc<Self>, home: &Rc<Home>, inbound: &Inbound, peer: String) -> Option<Registered> {
        let (disk, most) = (&self.disk.name, self.disk.max_clients as usize);
        if home.stopping.get() {
            return None;
        }
        if home.clients.borrow().len() >= most {
            tracing::warn!(disk, peer, most, "NBD client refused: there are enough; see nbd.max_clients");
            return None;
        }
        let counters = Arc::new(ClientCounters {
            peer,
            since_unix_ms: unix_ms(),
            requests: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
        });
        let id = self.next_client.fetch_add(1, Ordering::Relaxed);
        let wire = Rc::clone(&inbound.wire);
        let client = Rc::new(Client { home: Rc::clone(home), wire, counters: Arc::clone(&counters) });
        home.clients.borrow_mut().insert(id, Rc::clone(&client));
        self.clients.lock().insert(id, counters);
        Some(Registered { export: Arc::clone(self), client, id })
    }

    async fn transmit(self: &Arc<Self>, registered: &Registered, agreement: &Agreement, inbound: Inbound) {
        let client = &registered.client;
        let Some(storage) = local(self.disk.storage.id()) else {
            return tracing::error!(disk = self.disk.name, "NBD client of a storage that is closed");
        };
        let disk = Disk::new(storage, self.disk.id, Arc::clone(&self.disk.counters));
        tracing::info!(disk = self.disk.name, peer = client.peer(), "NBD client connected");
        connection::run(self, client, disk, agreement, inbound).await;
    }
}

/// A client that is counted; no more when dropped.
struct Registered {
    export: Arc<NbdExport>,
    client: Rc<Client>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.export.clients.lock().remove(&self.id);
        let home = &self.client.home;
        home.clients.borrow_mut().remove(&self.id);
        home.changed.notify_all();
    }
}

/// On its own socket there is this disk only, which is the default as well.
impl Exports for NbdExport {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name.is_empty() || name == self.disk.name).then(|| self.info())
    }
    fn names(&self) -> Vec<String> {
        vec![self.disk.name.clone()]
    }
}

/// Whoever is at the other end of a unix socket.
fn peer(stream: &impl AsFd) -> String {
    match getsockopt(stream, sockopt::PeerCredentials) {
        Ok(credentials) => format!("process {} of user {}", credentials.pid(), credentials.uid()),
        Err(_) => "unknown process".to_owned(),
    }
}
