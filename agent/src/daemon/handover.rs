//! A new prestaged takes over from the one that runs: connections, listening sockets and locks pass to it, and no guest sees
//! more than a pause (`prestage_integration::handover` has the protocol).
//!
//! - the predecessor: [`Gate`] waits for a successor, [`Estate`] is what it leaves, [`bequeath`] gives it away
//! - the successor: [`claim`] waits for its turn, [`Inheritance`] is what it gets
//!
//! No two own a store at a time: everything is closed before the estate is given, and a successor that fails with it is ended
//! before the next one is asked. That next one is the predecessor's own program, started anew.

use super::end::ReleasedDisk;
use super::run::RunError;
use crate::config::Config;
use prestage_integration::export::ExportState;
use prestage_integration::handover::{
    Door, FORMAT, FromPredecessor, FromSuccessor, HandOverError, OLDEST_FORMAT, Parcel, Peer, Place, common_format,
};
use prestage_integration::privilege::broker;
use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// How long a successor may take to prepare itself; the predecessor serves meanwhile.
const PREPARE: Duration = Duration::from_secs(60);
/// How long it may take until guests are served again, before it is given up. A sick database takes longest.
const TAKE_OVER: Duration = Duration::from_secs(30);
/// How long a successor waits for stores to be opened before it says that it serves: the predecessor, who would take a store that
/// hangs for a failure of ours, then ends.
pub(super) const OPENING: Duration = Duration::from_secs(5);
/// How long requests under way may take to end. Those of a store that takes longer are dropped, and taken again by the
/// successor as after a crash: the in-flight memory names them.
pub(super) const REQUESTS_END: Duration = Duration::from_millis(600);
/// How long what waits for the SSD tier may hold up the hand-over of a disk; the store has it too.
pub(super) const DESTAGE: Duration = Duration::from_millis(50);

const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// Everything that passes on, but for descriptors, which are in a [`Parcel`].
#[derive(Debug, Serialize, Deserialize)]
struct Estate<F> {
    disks: Vec<DiskEstate<F>>,
    api: Option<ApiEstate<F>>,
    state: Option<StateEstate<F>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DiskEstate<F> {
    name: String,
    socket: PathBuf,
    export: ExportState<F>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ApiEstate<F> {
    path: PathBuf,
    listener: F,
    lock: F,
}

/// The lock on the state's folder.
#[derive(Debug, Serialize, Deserialize)]
struct StateEstate<F> {
    folder: PathBuf,
    lock: F,
}

/// Where a predecessor is reached.
pub(crate) fn door_path(config: &Config) -> PathBuf {
    config.daemon.run_dir.join("hand-over.sock")
}

// ---- the predecessor ----

/// A process that is ready to take over.
#[derive(Debug)]
pub(super) struct Successor {
    peer: Peer,
    /// It does not read our format and starts plainly once we are gone.
    pub(super) plain: bool,
}

impl Successor {
    /// Its process number.
    pub(super) fn pid(&self) -> i32 {
        self.peer.pid()
    }
}

/// Where a predecessor waits for its successor.
pub(super) struct Gate {
    door: Option<Door>,
    listener: Option<tokio::net::UnixListener>,
    ready: tokio::sync::mpsc::UnboundedReceiver<Result<Successor, HandOverError>>,
    greeted: tokio::sync::mpsc::UnboundedSender<Result<Successor, HandOverError>>,
}

impl Gate {
    /// Opens the door. Without one guests are served all the same; there is just no hand-over.
    pub(super) fn open(config: &Config) -> Gate {
        let opened = Door::open(&door_path(config)).and_then(|door| {
            let listener = door.listener().and_then(tokio::net::UnixListener::from_std);
            listener
                .map(|listener| (door, listener))
                .map_err(|source| HandOverError::Socket { path: door_path(config), source })
        });
        let (door, listener) = match opened {
            Ok((door, listener)) => (Some(door), Some(listener)),
            Err(error) => {
                tracing::warn!(%error, "no other prestaged can take over from this one");
                (None, None)
            }
        };
        let (greeted, ready) = tokio::sync::mpsc::unbounded_channel();
        Gate { door, listener, ready, greeted }
    }

    /// Waits for a successor that is ready. Those that fail before are mentioned in the log.
    pub(super) async fn admitted(&mut self) -> Successor {
        let Self { listener, ready, greeted, .. } = self;
        loop {
            let accepted = async {
                match &*listener {
                    Some(listener) => listener.accept().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                accepted = accepted => {
                    let stream = accepted.and_then(|(stream, _)| stream.into_std());
                    let greeted = greeted.clone();
                    tokio::task::spawn_blocking(move || {
                        let stream = stream.map_err(HandOverError::Silent);
                        // Nobody listens any more: another one is taking over.
                        let _ = greeted.send(stream.and_then(greet));
                    });
                }
                Some(outcome) = ready.recv() => match outcome {
                    Ok(successor) => return successor,
                    Err(error) => tracing::warn!(%error, "no hand-over; this prestaged goes on serving"),
                },
            }
        }
    }

    /// The next one who comes, waited for without an executor.
    fn wait(&self, limit: Duration) -> Result<Successor, HandOverError> {
        let Some(door) = &self.door else {
            return Err(HandOverError::Words("there is no hand-over socket".to_owned()));
        };
        let listener = door.listener().map_err(HandOverError::Silent)?;
        let until = Instant::now() + limit;
        loop {
            match listener.accept() {
                Ok((stream, _)) => return greet(stream),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(HandOverError::Silent(error)),
            }
        }
    }

    /// Leaves the socket's name to the successor, who has one of its own there by now, or is about to.
    fn leave(self) {
        std::mem::forget(self.door);
    }
}

/// Hears out who has come until it is ready. Blocks.
fn greet(stream: UnixStream) -> Result<Successor, HandOverError> {
    let peer = Door::admit(stream)?;
    peer.set_patience(Some(PREPARE))?;
    let (hello, _) = peer.receive()?;
    let FromSuccessor::Hello { program, oldest_format, format, pid } = hello else {
        return Err(HandOverError::Words("it does not say hello first".to_owned()));
    };
    let common = common_format(oldest_format, format);
    let program_here = PROGRAM.to_owned();
    let answer: FromPredecessor<()> = match common {
        Some(format) => FromPredecessor::Welcome { program: program_here, format },
        None => FromPredecessor::Restart { program: program_here },
    };
    peer.send(&answer, &Parcel::default())?;
    let (FromSuccessor::Ready, _) = peer.receive()? else {
        return Err(HandOverError::Words("it is not ready when it should be".to_owned()));
    };
    if common.is_none() {
        tracing::warn!(
            program,
            pid,
            "prestaged {program} does not read what {PROGRAM} hands over (format {FORMAT}): it starts when this one has \
             ended, and hypervisors connect again"
        );
    }
    Ok(Successor { peer, plain: common.is_none() })
}

/// What a predecessor leaves, with the descriptors.
#[derive(Debug)]
pub(super) struct Legacy {
    estate: Estate<Place>,
    parcel: Parcel,
}

/// The API's listening socket and lock, and the lock on the state's folder.
#[derive(Debug, Default)]
pub(super) struct Locks {
    pub(super) api: Option<(PathBuf, OwnedFd, OwnedFd)>,
    pub(super) state: Option<(PathBuf, OwnedFd)>,
}

impl Legacy {
    pub(super) fn new(disks: Vec<ReleasedDisk>, locks: Locks) -> Legacy {
        let mut parcel = Parcel::default();
        let disks = disks.into_iter().map(|(name, socket, export)| {
            let Ok(export) = export.map(&mut |fd| Ok::<_, std::convert::Infallible>(parcel.put(fd)));
            DiskEstate { name, socket, export }
        });
        let disks = disks.collect();
        let api = locks.api.map(|(path, listener, lock)| ApiEstate {
            path,
            listener: parcel.put(listener),
            lock: parcel.put(lock),
        });
        let state = locks.state.map(|(folder, lock)| StateEstate { folder, lock: parcel.put(lock) });
        Legacy { estate: Estate { disks, api, state }, parcel }
    }

    /// Gives everything to a successor and waits until it serves. Blocks.
    fn give(&self, successor: &Successor) -> Result<(), HandOverError> {
        successor.peer.set_patience(Some(TAKE_OVER))?;
        successor.peer.send(&FromPredecessor::Estate(&self.estate), &self.parcel)?;
        match successor.peer.receive()? {
            (FromSuccessor::Serving, _) => Ok(()),
            _ => Err(HandOverError::Words("it does not serve".to_owned())),
        }
    }
}

/// Gives everything to `successor` or, if that fails, to this program started anew. Blocks. False: nobody serves.
pub(super) fn bequeath(gate: Gate, successor: &Successor, legacy: &Legacy, own: &Invitation) -> bool {
    let given = legacy.give(successor).map(|()| tell_main_pid(successor)).or_else(|error| {
        tracing::error!(%error, pid = successor.pid(), "the successor failed; this prestaged starts itself anew");
        // It may run rings already, and no two may run one.
        if !successor.peer.end() {
            return Err(HandOverError::Words(format!("process {} does not end", successor.pid())));
        }
        own.anew().map_err(HandOverError::Silent)?;
        let successor = gate.wait(PREPARE)?;
        legacy.give(&successor).map(|()| tell_main_pid(&successor))
    });
    match given {
        Ok(()) => {
            gate.leave();
            true
        }
        Err(error) => {
            tracing::error!(%error, "nobody takes over; hypervisors connect again to the next prestaged");
            false
        }
    }
}

/// The service manager supervises the successor from now on.
pub(super) fn tell_main_pid(successor: &Successor) {
    let _ = sd_notify::notify(&[NotifyState::MainPid(successor.pid().unsigned_abs())]);
}

/// How to start another prestaged like this one.
#[derive(Debug)]
pub(crate) struct Invitation {
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Invitation {
    /// To be made at the start: the file may be replaced later, which is what an upgrade does.
    pub(crate) fn new(config: &Path, overrides: &[String]) -> std::io::Result<Invitation> {
        let program = std::env::current_exe()?;
        // One that was started from a file that was replaced meanwhile: the name still stands for the newest.
        let program = match program.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
            Some(path) => path.into(),
            None => program,
        };
        let mut arguments: Vec<OsString> = vec!["--take-over".into(), "--config".into(), config.into()];
        for set in overrides {
            arguments.extend(["--set".into(), set.into()]);
        }
        Ok(Invitation { program, arguments })
    }

    /// Starts the program that is installed now.
    pub(super) fn newest(&self) -> std::io::Result<()> {
        match broker() {
            Some(broker) => broker.start_successor(false).map(|pid| self.tell(pid)),
            None => self.start(&self.program),
        }
    }

    /// Starts the program that runs now, whatever has become of its file.
    fn anew(&self) -> std::io::Result<()> {
        match broker() {
            Some(broker) => broker.start_successor(true).map(|pid| self.tell(pid)),
            None => self.start(Path::new("/proc/self/exe")),
        }
    }

    fn tell(&self, pid: u32) {
        tracing::info!(program = %self.program.display(), pid, "another prestaged started, to take over");
    }

    /// The program that is installed, and its words.
    pub(crate) fn words(&self) -> (PathBuf, Vec<OsString>) {
        (self.program.clone(), self.arguments.clone())
    }

    fn start(&self, program: &Path) -> std::io::Result<()> {
        let child = Command::new(program).args(&self.arguments).spawn()?;
        self.tell(child.id());
        std::thread::Builder::new().name("successor".into()).spawn(move || await_end(child)).map(drop)
    }
}

/// A child that has ended must be collected, and its failure told.
fn await_end(mut child: Child) {
    match child.wait() {
        Ok(status) if !status.success() => tracing::warn!(%status, "the prestaged that was to take over ended"),
        _ => {}
    }
}

// ---- the successor ----

/// What a predecessor has left to us.
#[derive(Debug)]
pub(super) struct Inheritance {
    peer: Peer,
    parcel: Parcel,
    estate: Estate<Place>,
}

/// Reaches the prestaged that runs and waits until it is our turn. Blocks. `None`: it has ended, and this is a plain start.
pub(super) fn claim(config: &Config) -> Result<Option<Inheritance>, RunError> {
    let peer = Peer::connect(&door_path(config))?;
    peer.set_patience(Some(PREPARE))?;
    let hello = FromSuccessor::Hello {
        program: PROGRAM.to_owned(),
        oldest_format: OLDEST_FORMAT,
        format: FORMAT,
        pid: std::process::id(),
    };
    peer.send(&hello, &Parcel::default())?;
    let (welcome, _): (FromPredecessor<()>, _) = peer.receive()?;
    // Whoever gets here has a configuration that holds and a program that runs.
    peer.send(&FromSuccessor::Ready, &Parcel::default())?;
    // It serves until its requests have ended, and then it writes down what it learned.
    peer.set_patience(None)?;
    match welcome {
        FromPredecessor::Welcome { program, format } => {
            tracing::info!(program, format, "taking over");
            match peer.receive()? {
                (FromPredecessor::Estate(estate), parcel) => {
                    peer.set_patience(Some(PREPARE))?;
                    Ok(Some(Inheritance { peer, parcel, estate }))
                }
                _ => Err(HandOverError::Words("no estate where one was due".to_owned()).into()),
            }
        }
        FromPredecessor::Restart { program } => {
            tracing::warn!(
                program,
                "prestaged {program} hands over in a format that {PROGRAM} does not read: waiting for its end; hypervisors \
                 connect again"
            );
            peer.wait_gone();
            Ok(None)
        }
        FromPredecessor::Estate(()) => Err(HandOverError::Words("an estate before its turn".to_owned()).into()),
    }
}

impl Inheritance {
    /// Listening socket and lock of the API, if it is to be at the same path.
    pub(super) fn api(&mut self, path: &Path) -> Option<(OwnedFd, OwnedFd)> {
        let api = self.estate.api.take_if(|api| api.path == path)?;
        Some((self.parcel.take(api.listener).ok()?, self.parcel.take(api.lock).ok()?))
    }

    /// The lock on the state's folder, if it is the same.
    pub(super) fn state(&mut self, folder: &Path) -> Option<OwnedFd> {
        let state = self.estate.state.take_if(|state| state.folder == folder)?;
        self.parcel.take(state.lock).ok()
    }

    /// The exports, by disk.
    pub(super) fn exports(&mut self) -> HashMap<String, (PathBuf, ExportState<OwnedFd>)> {
        let Self { parcel, estate, .. } = self;
        let exports = std::mem::take(&mut estate.disks).into_iter().filter_map(|disk| {
            let DiskEstate { name, socket, export } = disk;
            match export.map(&mut |place| parcel.take(place)) {
                Ok(export) => Some((name, (socket, export))),
                Err(error) => {
                    tracing::error!(disk = name, %error, "disk not taken over; its hypervisor connects again");
                    None
                }
            }
        });
        exports.collect()
    }

    /// Tells the predecessor that guests are served, and waits for its end. Blocks.
    pub(super) fn serving(self) {
        let told = self.peer.send(&FromSuccessor::Serving, &Parcel::default());
        if let Err(error) = told.and_then(|()| self.peer.set_patience(None)) {
            // Whatever has become of it, guests are served here.
            tracing::warn!(%error, "the predecessor cannot be told that guests are served");
            return;
        }
        self.peer.wait_gone();
    }
}
