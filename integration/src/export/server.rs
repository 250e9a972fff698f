//! The listening socket and its thread: [`Export`].
//!
//! One thread an export, asleep nearly always: stopping a ring waits for the store, and a store that hangs must hold up
//! the front-ends of no other disk. The thread never blocks in a read or write: messages are handled once they have
//! arrived whole and the answer has room (`socket::arrived`), so a front-end that stalls in the middle of a message
//! cannot keep the export from being stopped; it is cut off after [`STALL_LIMIT`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::QueueRunner;
use super::adopt::{Adopted, adopt};
use super::config::{ConfigError, DiskConfig, check_capacity};
use super::handler::{Device, FrontendChannel};
use super::queue::DiskState;
use super::socket::{Arrived, SocketFile, arrived, listen_at, peek_descriptor};
use super::state::{ConnectionState, ExportState};

/// How long a front-end may take over one message, or to read its answers. They come in one piece; a stopped QEMU
/// (SIGSTOP) between two messages is not affected.
const STALL_LIMIT: Duration = Duration::from_secs(5);
/// How often a message in pieces is looked at again.
const STALL_POLL_MS: u16 = 20;
/// The thread formats log lines and parses 4 KiB messages.
const STACK_BYTES: usize = 256 << 10;

/// Access to the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// Permission bits. Default 0o660.
    pub mode: u32,
    /// User id; default: the agent's own.
    pub owner: Option<u32>,
    /// Group id; default: the agent's own. QEMU under libvirt needs the group `kvm` or `libvirt-qemu` here.
    pub group: Option<u32>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { mode: 0o660, owner: None, group: None }
    }
}

/// A disk that cannot be exported.
#[derive(Debug, Error)]
pub enum ExportError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("socket path {} has {len} bytes, a unix socket takes {max}; use a shorter directory or name", path.display())]
    PathTooLong { path: PathBuf, len: usize, max: usize },
    #[error("socket {} is in use by a running server; choose another path or stop that server", path.display())]
    InUse { path: PathBuf },
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket { path: PathBuf },
    #[error("cannot listen at {}: {source}", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("cannot set mode and owner of socket {}: {source}", path.display())]
    Access { path: PathBuf, source: io::Error },
    #[error("cannot start the thread for socket {}: {source}", path.display())]
    Thread { path: PathBuf, source: io::Error },
}

#[derive(Debug)]
struct Shared {
    disk: Arc<DiskState>,
    channel: Arc<FrontendChannel>,
    wake: EventFd,
    stopping: AtomicBool,
    /// It ends to be gone on with elsewhere.
    releasing: AtomicBool,
    connected: AtomicBool,
}

/// A disk on offer. Dropping it stops it.
pub struct Export {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Option<io::Result<ExportState<OwnedFd>>>>>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("path", &self.path).field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Export {
    /// Listens at `path` and serves one front-end at a time; when it goes, the next. A socket file left behind by a dead
    /// server is replaced.
    ///
    /// # Errors
    /// The configuration is out of range; the path is too long, taken, or cannot be bound.
    pub fn start(
        path: impl AsRef<Path>,
        config: DiskConfig,
        runner: Arc<dyn QueueRunner>,
        options: &ExportOptions,
    ) -> Result<Self, ExportError> {
        config.validate()?;
        let path = path.as_ref().to_path_buf();
        let thread_error = |source: io::Error| ExportError::Thread { path: path.clone(), source };
        let (listener, file) = listen_at(&path, options)?;
        let shared = Shared::new(&path, config).map_err(thread_error)?;
        let server = Server { listener, file, shared: Arc::clone(&shared), runner, connection: None };
        server.spawn(path.clone()).map_err(thread_error)
    }

    /// Goes on with an export that another process has [released](Export::release), at the same path. A connection that
    /// cannot be gone on with (the disk is another now) is closed: its front-end connects again.
    ///
    /// # Errors
    /// The configuration is out of range, or there are no resources.
    pub fn adopt(
        path: impl AsRef<Path>,
        config: DiskConfig,
        runner: Arc<dyn QueueRunner>,
        state: ExportState<OwnedFd>,
    ) -> Result<Self, ExportError> {
        config.validate()?;
        let path = path.as_ref().to_path_buf();
        let thread_error = |source: io::Error| ExportError::Thread { path: path.clone(), source };
        let ExportState { listener, file, capacity_bytes, connection } = state;
        let shared = Shared::new(&path, config).map_err(thread_error)?;
        let mut server = Server {
            listener: listener.into(),
            file: SocketFile::adopt(&path, file),
            shared: Arc::clone(&shared),
            runner,
            connection: None,
        };
        if let Some(connection) = connection {
            server.adopt(connection);
        }
        if capacity_bytes != shared.disk.config.capacity_bytes {
            shared.tell_capacity();
        }
        server.spawn(path.clone()).map_err(thread_error)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }

    /// Changes the disk's size: requests are checked against the new one at once, and a connected front-end is told, so
    /// that the guest sees it. The store must have grown before. Returns whether the front-end was told; one that was
    /// not (none connected, or it cannot be told) sees the size when it connects.
    ///
    /// # Errors
    /// The size is 0 or no multiple of 512.
    pub fn resize(&self, capacity_bytes: u64) -> Result<bool, ConfigError> {
        check_capacity(capacity_bytes)?;
        self.shared.disk.capacity_bytes.store(capacity_bytes, Ordering::Release);
        Ok(self.shared.tell_capacity())
    }

    /// Stops: accepts nobody any more, stops the rings (see [`QueueRunner::stop`], which is called from here to the
    /// export's thread, so not from the thread that runs the rings), closes the connection, removes the socket.
    pub fn stop(mut self) {
        self.shut_down();
    }

    /// Stops the rings as [`Export::stop`] does, and leaves socket and connection as they are for another process to go on
    /// with. Blocks until the requests under way have ended.
    ///
    /// # Errors
    /// The descriptors could not be copied; the export has ended then, and its connection is closed.
    pub fn release(mut self) -> io::Result<ExportState<OwnedFd>> {
        self.shared.releasing.store(true, Ordering::Release);
        self.shut_down().unwrap_or_else(|| Err(io::Error::other("the export had ended")))
    }

    fn shut_down(&mut self) -> Option<io::Result<ExportState<OwnedFd>>> {
        self.shared.stopping.store(true, Ordering::Release);
        if let Err(error) = self.shared.wake.write(1) {
            tracing::error!(socket = %self.path.display(), %error, "export not woken");
        }
        match self.thread.take()?.join() {
            Ok(released) => released,
            Err(_) => {
                tracing::error!(socket = %self.path.display(), "export's thread panicked");
                None
            }
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.shut_down();
        }
    }
}

/// What the thread waits for on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// The next message.
    Message,
    /// The rest of a message, since then.
    Rest(Instant),
    /// The front-end to read its answers, since then.
    Room(Instant),
}

struct Connection {
    stream: UnixStream,
    protocol: BackendReqHandler<Mutex<Device>>,
    device: Arc<Mutex<Device>>,
    waiting: Waiting,
}

struct Server {
    listener: UnixListener,
    file: SocketFile,
    shared: Arc<Shared>,
    runner: Arc<dyn QueueRunner>,
    connection: Option<Connection>,
}

impl Shared {
    fn new(path: &Path, config: DiskConfig) -> io::Result<Arc<Self>> {
        let capacity_bytes = AtomicU64::new(config.capacity_bytes);
        Ok(Arc::new(Self {
            disk: Arc::new(DiskState { name: path.display().to_string(), config, capacity_bytes }),
            channel: Arc::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            stopping: AtomicBool::new(false),
            releasing: AtomicBool::new(false),
            connected: AtomicBool::new(false),
        }))
    }

    /// Tells the front-end that the size has changed. False: it could not be told.
    fn tell_capacity(&self) -> bool {
        self.channel.config_changed().unwrap_or_else(|error| {
            tracing::warn!(socket = %self.disk.name, %error, "front-end not told of the new size");
            false
        })
    }
}

impl Server {
    fn spawn(self, path: PathBuf) -> io::Result<Export> {
        let shared = Arc::clone(&self.shared);
        let thread =
            std::thread::Builder::new().name("vhost-user".into()).stack_size(STACK_BYTES).spawn(move || self.run())?;
        Ok(Export { path, shared, thread: Some(thread) })
    }

    /// Serves until it is stopped; what is left for a successor if it is released.
    fn run(mut self) -> Option<io::Result<ExportState<OwnedFd>>> {
        let _span = tracing::info_span!("export", socket = %self.shared.disk.name).entered();
        loop {
            match self.wait() {
                Ok(acceptable) => {
                    if self.shared.stopping.load(Ordering::Acquire) {
                        break;
                    }
                    // The connection first: its end may be what the newcomer waits for.
                    self.serve();
                    if acceptable {
                        self.accept();
                    }
                }
                Err(error) => {
                    // Only lack of memory or a descriptor that is not one; do not spin on it.
                    tracing::error!(%error, "cannot wait for the front-end");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
        if self.shared.releasing.load(Ordering::Acquire) {
            return Some(self.release());
        }
        self.disconnect("export stopped");
        None
    }

    fn release(mut self) -> io::Result<ExportState<OwnedFd>> {
        let connection = match self.connection.take() {
            Some(connection) => {
                let mut device = connection.device.lock().unwrap_or_else(PoisonError::into_inner);
                device.stop_all();
                // A message that has come in part lies in the socket still, for the successor.
                Some(device.capture(&connection.stream)?)
            }
            None => None,
        };
        tracing::debug!(connected = connection.is_some(), "export released");
        let capacity_bytes = self.shared.disk.capacity_bytes.load(Ordering::Acquire);
        let listener = self.listener.try_clone()?.into();
        Ok(ExportState { listener, file: self.file.release(), capacity_bytes, connection })
    }

    /// Goes on with a predecessor's connection, as if it had been accepted here.
    fn adopt(&mut self, state: ConnectionState<OwnedFd>) {
        let _span = tracing::info_span!("export", socket = %self.shared.disk.name).entered();
        self.shared.connected.store(true, Ordering::Release);
        self.runner.connected();
        let device =
            Device::new(Arc::clone(&self.shared.disk), Arc::clone(&self.runner), Arc::clone(&self.shared.channel));
        match adopt(device, state) {
            Ok(Adopted { stream, protocol, device }) => {
                self.connection = Some(Connection { stream, protocol, device, waiting: Waiting::Message });
                tracing::info!("front-end taken over");
            }
            Err(error) => {
                tracing::warn!(%error, "connection not taken over; its front-end has to connect again");
                self.shared.channel.set(None);
                self.shared.connected.store(false, Ordering::Release);
                self.runner.disconnected();
            }
        }
    }

    /// Sleeps until there is something to do. True: somebody wants to connect.
    fn wait(&self) -> io::Result<bool> {
        let mut fds = vec![
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let mut timeout = PollTimeout::NONE;
        if let Some(connection) = &self.connection {
            let events = match connection.waiting {
                Waiting::Message => PollFlags::POLLIN,
                Waiting::Rest(_) => PollFlags::empty(),
                Waiting::Room(_) => PollFlags::POLLOUT,
            };
            if connection.waiting != Waiting::Message {
                timeout = STALL_POLL_MS.into();
            }
            fds.push(PollFd::new(connection.stream.as_fd(), events));
        }
        match poll(&mut fds, timeout) {
            Ok(_) => Ok(fds[1].any().unwrap_or(true)),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                // Out of descriptors, most likely: the newcomer stays in the queue.
                tracing::error!(%error, "cannot accept a front-end");
                std::thread::sleep(Duration::from_millis(100));
                return;
            }
        };
        if self.connection.is_some() {
            tracing::warn!("second front-end refused: a disk serves one at a time");
            return;
        }
        let copy = match stream.set_nonblocking(false).and_then(|()| stream.try_clone()) {
            Ok(copy) => copy,
            Err(error) => {
                tracing::error!(%error, "cannot serve a front-end");
                return;
            }
        };
        let device =
            Device::new(Arc::clone(&self.shared.disk), Arc::clone(&self.runner), Arc::clone(&self.shared.channel));
        let device = Arc::new(Mutex::new(device));
        let protocol = BackendReqHandler::from_stream(copy, Arc::clone(&device));
        self.connection = Some(Connection { stream, protocol, device, waiting: Waiting::Message });
        self.shared.connected.store(true, Ordering::Release);
        tracing::info!("front-end connected");
        self.runner.connected();
    }

    /// Handles the messages that have arrived.
    fn serve(&mut self) {
        while let Some(connection) = &mut self.connection {
            if self.shared.stopping.load(Ordering::Acquire) {
                return;
            }
            match connection.step() {
                Ok(true) => {}
                Ok(false) => return,
                Err(end) => {
                    self.disconnect(&end);
                    return;
                }
            }
        }
    }

    fn disconnect(&mut self, reason: &str) {
        let Some(connection) = self.connection.take() else { return };
        connection.device.lock().unwrap_or_else(PoisonError::into_inner).stop_all();
        self.shared.channel.set(None);
        self.shared.connected.store(false, Ordering::Release);
        tracing::info!(reason, "front-end disconnected");
        self.runner.disconnected();
    }
}

impl Connection {
    /// Handles one message if it can be done without blocking. False: wait for more. An error says why the connection
    /// has ended.
    fn step(&mut self) -> Result<bool, String> {
        let code = match arrived(&self.stream).map_err(|e| e.to_string())? {
            Arrived::End => return Err("closed by the front-end".into()),
            Arrived::Nothing => {
                self.waiting = Waiting::Message;
                return Ok(false);
            }
            Arrived::Part => {
                let since = match self.waiting {
                    Waiting::Rest(since) => since,
                    _ => Instant::now(),
                };
                self.waiting = Waiting::Rest(since);
                let hung_up = readiness(self.stream.as_fd(), PollFlags::empty()).is_some();
                return if hung_up || since.elapsed() > STALL_LIMIT {
                    Err("the front-end stopped in the middle of a message".into())
                } else {
                    Ok(false)
                };
            }
            Arrived::Message(code) => code,
        };
        if readiness(self.stream.as_fd(), PollFlags::POLLOUT).is_none() {
            let since = match self.waiting {
                Waiting::Room(since) => since,
                _ => Instant::now(),
            };
            self.waiting = Waiting::Room(since);
            return if since.elapsed() > STALL_LIMIT {
                Err("the front-end does not read its answers".into())
            } else {
                Ok(false)
            };
        }
        self.waiting = Waiting::Message;
        if code == FrontendReq::SET_BACKEND_REQ_FD as u32 {
            let fd = peek_descriptor(&self.stream).map_err(|e| e.to_string())?;
            self.device.lock().unwrap_or_else(PoisonError::into_inner).expect_channel(fd);
        }
        match self.protocol.handle_request() {
            Ok(()) => Ok(true),
            Err(VhostError::Disconnected) => Err("closed by the front-end".into()),
            // QEMU passes a guest's writes to the configuration space on. It has been told no; a guest shall not be able
            // to end the connection.
            Err(VhostError::ReqHandlerError(error)) if code == FrontendReq::SET_CONFIG as u32 => {
                tracing::debug!(%error, "guest's write to the configuration space refused");
                Ok(true)
            }
            Err(error) => {
                tracing::warn!(message = code, %error, "front-end message refused, connection closed");
                Err("protocol error".into())
            }
        }
    }
}

/// Which of the events are there now.
fn readiness(fd: BorrowedFd<'_>, events: PollFlags) -> Option<PollFlags> {
    let mut fds = [PollFd::new(fd, events)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(n) if n > 0 => fds[0].revents(),
        _ => None,
    }
}
