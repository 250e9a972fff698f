//! NBD over TCP, with TLS and client certificates and no other way.
//!
//! - [`NbdServer`]: listens, and hands each client to the export that it chooses
//!
//! It has a thread of its own: until a client has proven who it is, nothing that it does takes time of a shard that
//! serves guests.

use super::NbdExport;
use super::negotiate::negotiate;
use super::wire::{Inbound, Parts};
use nix::sys::socket::{setsockopt, sockopt};
use parking_lot::Mutex;
use prestage_cache::engine::{EngineMode, Shard, ShardConfig, ShardHandle};
use prestage_integration::export::nbd::{ExportInfo, Exports, Security, TlsError, TlsServer};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Clients that have not chosen yet, at a time. Each may take the time limit of a negotiation and some 100 KiB.
const NEGOTIATING_MAX: usize = 64;
/// Pause after an accept that failed, for want of descriptors most likely.
const PAUSE: Duration = Duration::from_millis(100);

/// Why disks are not offered over TCP.
#[derive(Debug, thiserror::Error)]
pub enum NbdServerError {
    #[error("NBD over TCP is off: {0}")]
    Tls(#[from] TlsError),
    #[error("NBD over TCP is off: cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
}

/// Exports by name.
#[derive(Clone, Debug, Default)]
struct Catalogue(Arc<Mutex<BTreeMap<String, Arc<NbdExport>>>>);

impl Catalogue {
    fn get(&self, name: &str) -> Option<Arc<NbdExport>> {
        self.0.lock().get(name).cloned()
    }
}

impl Exports for Catalogue {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.get(name).map(|export| export.info())
    }
    fn names(&self) -> Vec<String> {
        self.0.lock().keys().cloned().collect()
    }
}

/// The listener and its thread.
#[derive(Debug)]
pub struct NbdServer {
    shard: ShardHandle,
    catalogue: Catalogue,
    address: SocketAddr,
}

impl NbdServer {
    /// Listens. Files are PEM.
    ///
    /// # Errors
    /// The certificates are of no use, or the address cannot be had.
    pub fn start(
        address: SocketAddr,
        certificate: &Path,
        key: &Path,
        client_authority: &Path,
        engine: EngineMode,
    ) -> Result<NbdServer, NbdServerError> {
        let tls = TlsServer::load(certificate, key, client_authority)?;
        let failed = |source| NbdServerError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let config = ShardConfig { name: "nbd-tcp".to_owned(), entries: 64, mode: engine, cpu: None };
        let shard = ShardHandle::start(config).map_err(failed)?;
        let catalogue = Catalogue::default();
        let known = catalogue.clone();
        shard.spawn(move |shard| async move { listen(&shard, listener, known, tls).await });
        tracing::info!(%address, "disks are offered over NBD with TLS");
        Ok(NbdServer { shard, catalogue, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Offers a disk.
    pub fn add(&self, export: &Arc<NbdExport>) {
        self.catalogue.0.lock().insert(export.name().to_owned(), Arc::clone(export));
    }

    /// Offers it no more; clients that have it keep it.
    pub fn remove(&self, name: &str) {
        self.catalogue.0.lock().remove(name);
    }

    /// Takes no more clients, and lets go of those that have not chosen yet. Blocks.
    pub fn stop(&self) {
        self.shard.shutdown();
    }
}

/// Counts a client that negotiates.
struct Negotiating(Rc<Cell<usize>>);

impl Negotiating {
    fn new(count: &Rc<Cell<usize>>) -> Option<Negotiating> {
        if count.get() >= NEGOTIATING_MAX {
            return None;
        }
        count.set(count.get() + 1);
        Some(Negotiating(Rc::clone(count)))
    }
}

impl Drop for Negotiating {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

async fn listen(shard: &Shard, listener: TcpListener, catalogue: Catalogue, tls: TlsServer) {
    let fd = match listener.as_fd().try_clone_to_owned() {
        Ok(fd) => Rc::new(fd),
        Err(error) => return tracing::error!(%error, "NBD over TCP is off"),
    };
    let count = Rc::new(Cell::new(0));
    loop {
        if let Err(error) = shard.readable(&fd).await {
            return tracing::error!(%error, "NBD over TCP is off");
        }
        loop {
            match listener.accept() {
                Ok((stream, peer)) => {
                    let Some(counted) = Negotiating::new(&count) else {
                        tracing::warn!(%peer, "NBD client refused: too many have not chosen a disk yet");
                        continue;
                    };
                    let (shard, catalogue, tls) = (shard.clone(), catalogue.clone(), tls.clone());
                    let task = shard.clone();
                    task.spawn(async move {
                        let _counted = counted;
                        admit(&shard, stream.into(), peer, catalogue, tls).await;
                    });
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::error!(%error, "cannot accept an NBD client");
                    shard.sleep(PAUSE).await;
                    break;
                }
            }
        }
    }
}

async fn admit(shard: &Shard, fd: OwnedFd, peer: SocketAddr, catalogue: Catalogue, tls: TlsServer) {
    if let Err(error) = prepare(&fd) {
        return tracing::warn!(%peer, %error, "NBD client not served");
    }
    let inbound = Inbound::new(shard, Parts { fd, tls: None, unread: Vec::new() });
    let exports = Arc::new(catalogue.clone());
    match negotiate(inbound, exports, Security::Required, Some(tls)).await {
        Ok((agreement, inbound)) => {
            let export = catalogue.get(&agreement.export.name);
            if let (Some(export), Some(parts)) = (export, inbound.into_parts()) {
                export.adopt(parts, agreement, peer.to_string());
            }
        }
        // At a level that a port scan does not fill the log with.
        Err(reason) => tracing::debug!(%peer, reason, "NBD client did not enter"),
    }
}

/// No Nagle delay, as the protocol asks for, and an end to peers that have vanished within half a minute.
fn prepare(fd: &OwnedFd) -> nix::Result<()> {
    setsockopt(fd, sockopt::TcpNoDelay, &true)?;
    setsockopt(fd, sockopt::KeepAlive, &true)?;
    setsockopt(fd, sockopt::TcpKeepIdle, &10)?;
    setsockopt(fd, sockopt::TcpKeepInterval, &5)?;
    setsockopt(fd, sockopt::TcpKeepCount, &3)
}
