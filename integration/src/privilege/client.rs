//! The daemon's end of the broker.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::channel;
use super::protocol::{Answer, Ask, Chain, How, MAX_MESSAGE, Program, Qdisc, Refusal, Request, Said, VERSION};

static BROKER: OnceLock<Arc<Broker>> = OnceLock::new();

/// The broker of this process; `None`: it has none, and does everything itself.
#[must_use]
pub fn broker() -> Option<&'static Arc<Broker>> {
    BROKER.get()
}

type Reply = (Result<Said, Refusal>, Option<OwnedFd>);

/// A running broker. It ends with this process.
#[derive(Debug)]
pub struct Broker {
    socket: OwnedFd,
    pid: u32,
    notes: Vec<String>,
    next: AtomicU64,
    /// Who waits, by ticket; `None` once the broker has ended.
    waiting: Mutex<Option<HashMap<u64, SyncSender<Reply>>>>,
}

/// A program that the broker has started. It ends with the broker, and with its socket.
#[derive(Debug)]
pub struct Child {
    id: u64,
    pid: u32,
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the broker has ended")
}

fn unexpected(said: &Said) -> io::Error {
    io::Error::other(format!("the broker answers another question: {said:?}"))
}

impl Broker {
    /// Starts the broker: `command` runs [`super::serve`]. To be called before this process gives anything up, and before it has
    /// threads.
    ///
    /// # Errors
    /// It cannot be started, or is of another version.
    pub fn start(mut command: Command) -> io::Result<Self> {
        let (socket, theirs) = channel::pair()?;
        let child = command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).arg0("prestage-broker").spawn()?;
        drop(command); // and with it our copy of its end
        let waiting = Mutex::new(Some(HashMap::new()));
        let mut broker = Self { socket, pid: child.id(), notes: Vec::new(), next: AtomicU64::new(0), waiting };
        let packet = broker.word(0, Ask::Hello { version: VERSION })?;
        channel::send(&broker.socket, &packet, None)?;
        let mut buffer = vec![0; MAX_MESSAGE];
        match understand(channel::receive(&broker.socket, &mut buffer)?.0)?.body {
            Ok(Said::Hello { notes, .. }) => broker.notes = notes,
            Ok(said) => return Err(unexpected(&said)),
            Err(refusal) => return Err(io::Error::other(refusal)),
        }
        Ok(broker)
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it could not give up, or does not have, in words.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Makes it the broker of this process, and hears its answers on a thread of their own. `lost` is called when it ends.
    ///
    /// # Errors
    /// There is no thread to be had, or there is a broker already.
    pub fn install(self, lost: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let broker = Arc::new(self);
        let heard = Arc::clone(&broker);
        BROKER.set(broker).map_err(|_| io::Error::other("this process has a broker already"))?;
        std::thread::Builder::new().name("broker".into()).spawn(move || {
            let error = heard.hear();
            tracing::error!(%error, pid = heard.pid, "the broker has ended");
            // whoever waits finds that nobody will answer
            *heard.waiting.lock() = None;
            lost();
        })?;
        Ok(())
    }

    fn hear(&self) -> io::Error {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (answer, descriptor) = match channel::receive(&self.socket, &mut buffer) {
                Ok(([], _)) => return ended(),
                Ok((packet, descriptor)) => match understand(packet) {
                    Ok(answer) => (answer, descriptor),
                    Err(error) => return error,
                },
                Err(error) => return error,
            };
            let asker = self.waiting.lock().as_mut().and_then(|waiting| waiting.remove(&answer.ticket));
            if let Some(asker) = asker {
                // one that has given up has dropped its end
                let _ = asker.send((answer.body, descriptor));
            }
        }
    }

    fn word(&self, ticket: u64, body: Ask) -> io::Result<Vec<u8>> {
        let packet = postcard::to_allocvec(&Request { ticket, body }).map_err(io::Error::other)?;
        match packet.len() <= MAX_MESSAGE {
            true => Ok(packet),
            false => Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)),
        }
    }

    fn ask(&self, body: Ask, descriptor: Option<BorrowedFd<'_>>) -> io::Result<(Said, Option<OwnedFd>)> {
        let ticket = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let packet = self.word(ticket, body)?;
        let (asker, answer) = sync_channel(1);
        self.waiting.lock().as_mut().ok_or_else(ended)?.insert(ticket, asker);
        channel::send(&self.socket, &packet, descriptor)?;
        // A store may take as long as it likes, as it would without a broker.
        let (body, descriptor) = answer.recv().map_err(|_| ended())?;
        Ok((body?, descriptor))
    }

    fn opened(&self, body: Ask) -> io::Result<(PathBuf, OwnedFd)> {
        match self.ask(body, None)? {
            (Said::Opened { path }, Some(descriptor)) => Ok((path.path(), descriptor)),
            (said, _) => Err(unexpected(&said)),
        }
    }

    fn done(&self, body: Ask, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        match self.ask(body, descriptor)? {
            (Said::Done, _) => Ok(()),
            (said, _) => Err(unexpected(&said)),
        }
    }

    /// Opens a store, and returns its path without links.
    ///
    /// # Errors
    /// What the kernel says, or with [`io::ErrorKind::PermissionDenied`] a [`Refusal`].
    pub fn open(&self, path: &Path, how: How) -> io::Result<(PathBuf, File)> {
        self.opened(Ask::Open { path: path.into(), how }).map(|(path, fd)| (path, fd.into()))
    }

    /// Connects to an NBD server's socket.
    ///
    /// # Errors
    /// As [`Broker::open`].
    pub fn connect(&self, path: &Path) -> io::Result<OwnedFd> {
        self.opened(Ask::Connect { path: path.into() }).map(|(_, fd)| fd)
    }

    pub(super) fn read(&self, path: &Path) -> io::Result<File> {
        self.opened(Ask::Read { path: path.into() }).map(|(_, fd)| fd.into())
    }

    pub(super) fn set_group(&self, path: &Path, group: u32) -> io::Result<()> {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let meant = File::options().read(true).custom_flags(flags).open(path)?;
        self.done(Ask::SetGroup { group }, Some(meant.as_fd()))
    }

    pub(crate) fn qdiscs(&self, device: &str) -> io::Result<String> {
        match self.ask(Ask::Qdiscs { device: device.to_owned() }, None)? {
            (Said::Text(text), _) => Ok(text),
            (said, _) => Err(unexpected(&said)),
        }
    }

    pub(crate) fn remove_qdisc(&self, device: &str, qdisc: Qdisc) -> io::Result<()> {
        self.done(Ask::RemoveQdisc { device: device.to_owned(), qdisc }, None)
    }

    /// Starts a `qemu-storage-daemon`, and returns its standard error.
    pub(super) fn start_images(&self, chain: &Chain, listener: OwnedFd) -> io::Result<(Child, OwnedFd)> {
        match self.ask(Ask::StartImages(chain.clone()), Some(listener.as_fd()))? {
            (Said::Started { child, pid }, Some(errors)) => Ok((Child { id: child, pid }, errors)),
            (said, _) => Err(unexpected(&said)),
        }
    }

    pub(super) fn find_key(&self, disk: &str) -> io::Result<()> {
        self.done(Ask::FindKey { disk: disk.to_owned() }, None)
    }

    /// Starts another prestaged, which is to take over from this one. Returns its number.
    ///
    /// # Errors
    /// As [`Broker::open`].
    pub fn start_successor(&self, anew: bool) -> io::Result<u32> {
        match self.ask(Ask::StartSuccessor { anew }, None)? {
            (Said::Started { pid, .. }, _) => Ok(pid),
            (said, _) => Err(unexpected(&said)),
        }
    }

    /// Has a prestaged killed that [`Broker::start_successor`] has started.
    pub(crate) fn end_successor(&self, pid: u32) -> io::Result<()> {
        self.done(Ask::EndSuccessor { pid }, None)
    }

    /// Starts a program, and returns our end of the socket that it has as standard input.
    pub(crate) fn run(&self, program: Program) -> io::Result<(Child, OwnedFd)> {
        match self.ask(Ask::Start(program), None)? {
            (Said::Started { child, pid }, Some(socket)) => Ok((Child { id: child, pid }, socket)),
            (said, _) => Err(unexpected(&said)),
        }
    }
}

impl Child {
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it killed.
    pub fn kill(&self) {
        self.end(false);
    }

    /// Has it asked to end, or with `gently` false killed.
    pub(super) fn end(&self, gently: bool) {
        // without a broker it has ended
        if let Some(broker) = broker() {
            let _ = broker.done(Ask::End { child: self.id, gently }, None);
        }
    }
}

fn understand(packet: &[u8]) -> io::Result<Answer> {
    if packet.is_empty() {
        return Err(ended());
    }
    postcard::from_bytes(packet).map_err(|error| io::Error::other(format!("the broker cannot be understood: {error}")))
}
