//! Serves the API on a unix socket.
//!
//! The socket appears under its name complete with mode and group: it is bound under a temporary name and renamed. A lock file beside
//! it (`<socket>.lock`) decides which daemon owns the name, so two that start together cannot take it from each other; what is left of
//! a daemon that died is replaced.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::probe::{Listener, probe};

use super::{Control, Limits, router};

/// `sun_path` holds 108 bytes with the final zero; the temporary name adds `.new`.
const SOCKET_PATH_MAX: usize = 103;

/// Where and for whom the API listens.
#[derive(Debug, Clone)]
pub struct SocketOptions {
    pub path: PathBuf,
    /// Permission bits, such as `0o660`.
    pub mode: u32,
    /// Group that owns the socket; `None`: the daemon's.
    pub group: Option<String>,
}

/// Why the API cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(
        "API socket {path} is {len} bytes long; a socket path holds at most {SOCKET_PATH_MAX} here: set a shorter `api.socket`"
    )]
    PathTooLong { path: PathBuf, len: usize },
    #[error("API socket {path} belongs to a running server; stop that prestaged or set another `api.socket`")]
    InUse { path: PathBuf },
    #[error("API socket {path} exists and is not a socket; move it away or set another `api.socket`")]
    NotASocket { path: PathBuf },
    #[error("group `{group}` of the API socket does not exist; create it or change `api.group`")]
    NoGroup { group: String },
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ServeError {
    let path = path.to_owned();
    move |source| ServeError::Io { action, path, source }
}

/// A bound API socket; removes itself when dropped.
#[derive(Debug)]
pub struct ApiListener {
    listener: StdListener,
    path: PathBuf,
    inode: u64,
    // Held for as long as the name is ours. The lock file stays: removing it would let two daemons lock two different files.
    lock: Option<Flock<File>>,
    left: Arc<AtomicBool>,
}

/// What another process needs to go on listening at the same name.
#[derive(Debug)]
pub struct Heirloom {
    /// The listening socket.
    pub listener: OwnedFd,
    /// The lock on the name.
    pub lock: OwnedFd,
    left: Arc<AtomicBool>,
}

impl Heirloom {
    /// The name is another's from now on: the [`ApiListener`] neither removes it nor gives back its lock.
    pub fn leave(&self) {
        self.left.store(true, Ordering::Release);
    }

    /// The name is ours.
    pub fn keep(&self) {
        self.left.store(false, Ordering::Release);
    }
}

impl Drop for ApiListener {
    fn drop(&mut self) {
        if self.left.load(Ordering::Acquire) {
            // Unlocking would unlock it for the other too: the lock belongs to the file that both have open.
            std::mem::forget(self.lock.take());
            return;
        }
        // Only if it is still ours: an operator may have replaced it.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl ApiListener {
    /// Path it listens on.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Copies for a successor.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn heirloom(&self) -> io::Result<Heirloom> {
        let lock = self.lock.as_ref().ok_or_else(|| io::Error::other("the API socket has no lock"))?;
        let (listener, lock) = (self.listener.try_clone()?.into(), lock.try_clone()?.into());
        Ok(Heirloom { listener, lock, left: Arc::clone(&self.left) })
    }
}

/// Goes on listening where a predecessor did. Mode and group of the socket stay as they are.
///
/// # Errors
/// The lock is another's, or the name is gone.
pub fn adopt(path: &Path, listener: OwnedFd, lock: OwnedFd) -> Result<ApiListener, ServeError> {
    let lock = Flock::lock(File::from(lock), FlockArg::LockExclusiveNonblock)
        .map_err(|_| ServeError::InUse { path: path.to_owned() })?;
    let inode = std::fs::symlink_metadata(path).map_err(io_error("look at", path))?.ino();
    let listener = StdListener::from(listener);
    listener.set_nonblocking(true).map_err(io_error("set up", path))?;
    Ok(ApiListener { listener, path: path.to_owned(), inode, lock: Some(lock), left: Arc::default() })
}

/// Takes the socket path: refuses one that a running server has, replaces what a dead one left.
pub fn bind(options: &SocketOptions) -> Result<ApiListener, ServeError> {
    let path = &options.path;
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        return Err(ServeError::PathTooLong { path: path.clone(), len });
    }
    let group = match &options.group {
        None => None,
        Some(name) => match nix::unistd::Group::from_name(name) {
            Ok(Some(group)) => Some(group.gid.as_raw()),
            Ok(None) => return Err(ServeError::NoGroup { group: name.clone() }),
            Err(errno) => return Err(io_error("look up the group of", path)(errno.into())),
        },
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    }

    let lock_path = suffixed(path, ".lock");
    let lock_file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let lock_file = lock_file.map_err(io_error("open", &lock_path))?;
    let lock = match Flock::lock(lock_file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(ServeError::InUse { path: path.clone() }),
        Err((_, errno)) => return Err(io_error("lock", &lock_path)(errno.into())),
    };

    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error("look at", path)(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(ServeError::NotASocket { path: path.clone() }),
        // Something other than prestaged may listen there, which knows nothing of the lock.
        Ok(_) => match probe(path).map_err(io_error("probe", path))? {
            Listener::Live => return Err(ServeError::InUse { path: path.clone() }),
            Listener::Gone => info!(path = %path.display(), "replacing the socket that a stopped daemon left"),
            Listener::NoPath => {}
        },
    }

    let temporary = suffixed(path, ".new");
    match std::fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &temporary)(error)),
        _ => {}
    }
    let listener = StdListener::bind(&temporary).map_err(io_error("bind", &temporary))?;
    let finish = || -> Result<u64, ServeError> {
        if let Some(group) = group {
            crate::privilege::set_group(&temporary, group).map_err(io_error("set the group of", &temporary))?;
        }
        let permissions = std::fs::Permissions::from_mode(options.mode & 0o777);
        std::fs::set_permissions(&temporary, permissions).map_err(io_error("set the mode of", &temporary))?;
        let inode = std::fs::symlink_metadata(&temporary).map_err(io_error("look at", &temporary))?.ino();
        listener.set_nonblocking(true).map_err(io_error("set up", &temporary))?;
        std::fs::rename(&temporary, path).map_err(io_error("move into place", path))?;
        Ok(inode)
    };
    match finish() {
        Ok(inode) => Ok(ApiListener { listener, path: path.clone(), inode, lock: Some(lock), left: Arc::default() }),
        Err(error) => {
            let _ = std::fs::remove_file(&temporary);
            Err(error)
        }
    }
}

fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Who is at the other end of a connection (`SO_PEERCRED`: as of its `connect`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    /// Absent when it lives in another PID namespace.
    pub pid: Option<i32>,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "uid {} gid {}", self.uid, self.gid)?;
        match self.pid {
            Some(pid) => write!(f, " pid {pid}"),
            None => Ok(()),
        }
    }
}

/// Serves until `shutdown` completes, then lets requests under way finish within `limits.drain`. Must run on a tokio runtime.
pub async fn serve(
    listener: ApiListener,
    control: Arc<dyn Control>,
    limits: Limits,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let accepting = UnixListener::from_std(listener.listener.try_clone()?)?;
    let router = router(control, limits);
    let slots = Arc::new(Semaphore::new(limits.connections));
    let (stop, stopping) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = async {
            // A slot first: what cannot be served stays in the kernel's queue.
            let slot = Arc::clone(&slots).acquire_owned().await;
            (accepting.accept().await, slot)
        };
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            (result, slot) = accepted => match result {
                Ok((stream, _)) => {
                    let connection = connection(stream, router.clone(), limits, stopping.clone());
                    connections.spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    // Out of file descriptors and the like: it may pass, but not by trying at once again.
                    warn!(%error, "API socket cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    // New clients get "connection refused" from here on, not a silent wait.
    drop(accepting);
    drop(listener);
    let _ = stop.send(true);
    let drained = tokio::time::timeout(limits.drain, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        warn!(open = connections.len(), "API connections cut at shutdown");
    }
    Ok(())
}

async fn connection(stream: UnixStream, router: axum::Router, limits: Limits, mut stopping: watch::Receiver<bool>) {
    let peer = match stream.peer_cred() {
        Ok(credentials) => Peer { uid: credentials.uid(), gid: credentials.gid(), pid: credentials.pid() },
        Err(error) => {
            warn!(%error, "API connection without peer credentials refused");
            return;
        }
    };
    let inner = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        inner.call(request)
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    let result = tokio::select! {
        result = &mut served => result,
        () = async { drop(stopping.wait_for(|stop| *stop).await) } => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        debug!(%error, %peer, "API connection ended");
    }
}
