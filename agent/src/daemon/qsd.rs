//! Images that only QEMU understands: a `qemu-storage-daemon` reads them, and we are its NBD client.
//!
//! - [`Qsd`]: one process for one disk, started anew when it dies, ended with the disk
//!
//! Encryption, internal snapshots, zstd, extended L2 entries and repairs are QEMU's to do. The process gets the chain of
//! images, opens nothing else that an image may name, offers it on a socket in a folder that only our user may enter,
//! and flushes after every write before it answers: our guests outlive it, so what it holds in memory must not be the only
//! copy. Who starts it, as whom, is `prestage_integration::privilege::images`'.

use crate::config::Config;
use parking_lot::{Condvar, Mutex};
use prestage_cache::Looked;
use prestage_cache::backend::{Astray, FileId, NbdAddress, Need, StoreSpec, look_for, needs};
use prestage_integration::privilege::images::{EXPORT, PROGRAM, Process, find_key, start};
use prestage_integration::privilege::protocol::{Chain, Encryption, Image};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What an NBD server says first.
const GREETING: &[u8; 8] = b"NBDMAGIC";
/// How long it may take to offer the image: a repair of a large one reads all its tables.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to end before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(100);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// One that has lived as long starts anew without having to wait.
const STEADY: Duration = Duration::from_secs(60);

/// Why an image could not be offered.
#[derive(Debug, thiserror::Error)]
pub(super) enum QsdError {
    #[error("{image} can be served only through qemu-storage-daemon ({why}), which could not be started: {reason}")]
    Start { image: String, why: String, reason: String },
    #[error("{image} is encrypted; put its passphrase into {}, or set `store.key_folder`", file.display())]
    NoKey { image: String, file: PathBuf },
    #[error("the passphrase in {} cannot be used: {reason}", file.display())]
    Key { file: PathBuf, reason: String },
}

/// A supervised qemu-storage-daemon.
#[derive(Debug)]
pub(super) struct Qsd {
    spec: StoreSpec,
    files: Vec<PathBuf>,
    why: String,
    shared: Arc<Shared>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
    known: Mutex<Known>,
}

/// Which files it has open, as far as is known.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Of which start this is; the next one opens them anew.
    starts: u32,
    files: Vec<(PathBuf, FileId)>,
    astray: Option<Astray>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pid: Option<u32>,
    starts: u32,
    stopping: bool,
    /// What it said last.
    words: String,
}

/// What it takes to start one.
#[derive(Debug)]
struct Recipe {
    chain: Chain,
    socket: PathBuf,
    key: Option<PathBuf>,
}

/// The folder of the sockets.
pub(crate) fn folder(config: &Config) -> PathBuf {
    config.daemon.run_dir.join("qemu")
}

impl Qsd {
    /// Starts one for a chain of images and waits until it offers it. Blocks.
    ///
    /// # Errors
    /// It cannot be started, or ends at once; the key of an encrypted image is missing.
    pub(super) fn start(
        config: &Config,
        disk: &str,
        chain: &StoreSpec,
        read_only: bool,
        why: String,
    ) -> Result<Qsd, QsdError> {
        let failed = |reason: String| QsdError::Start { image: chain.to_string(), why: why.clone(), reason };
        let socket = folder(config).join(format!("{disk}.sock"));
        let key = key_file(config, disk, chain)?;
        let images = chain.chain().map(image).collect();
        let recipe = Recipe { chain: Chain { disk: disk.to_owned(), images, read_only }, socket: socket.clone(), key };
        let shared = Arc::new(Shared::default());
        let supervisor = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("qemu".to_owned()).spawn(move || supervise(&recipe, &shared))
        };
        let supervisor = supervisor.map_err(|error| failed(error.to_string()))?;
        let spec = StoreSpec::Nbd { address: NbdAddress::Unix(socket.clone()), export: EXPORT.to_owned() };
        let files = chain.chain().filter_map(path_of).map(Path::to_owned).collect();
        let supervisor = Mutex::new(Some(supervisor));
        let qsd = Qsd { spec, files, why: why.clone(), shared, supervisor, known: Mutex::default() };
        match qsd.wait_for(&socket) {
            Ok(()) => {
                qsd.look_for_files();
                Ok(qsd)
            }
            Err(reason) => Err(failed(reason)),
        }
    }

    /// The files that it shows, by whose times a change while nobody watched is seen.
    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Looks whether the images' paths still lead to the files that it has open. Blocks for as long as their file systems do. `None`
    /// where it has just been started: those are the files from then on.
    pub(super) fn look_for_files(&self) -> Option<(Looked, u32)> {
        let (starts, pid) = {
            let state = self.shared.state.lock();
            (state.starts, state.pid?)
        };
        let Known { starts: known, files, astray: before } = self.known.lock().clone();
        if known != starts {
            let found = self.files.iter().filter_map(|file| Some((file.clone(), FileId::at(file).ok()??)));
            *self.known.lock() = Known { starts, files: found.collect(), astray: None };
            return None;
        }
        let now = files.iter().find_map(|(file, was)| look_for(file, *was).ok()?);
        self.known.lock().astray.clone_from(&now);
        Some((Looked { before, now }, pid))
    }

    /// What the last look has found, and the process that has the file open.
    pub(super) fn astray(&self) -> Option<(Astray, u32)> {
        Some((self.known.lock().astray.clone()?, self.shared.state.lock().pid?))
    }

    /// Where it offers the image.
    pub(super) fn spec(&self) -> &StoreSpec {
        &self.spec
    }

    /// For people: the process and why it is there.
    pub(super) fn describe(&self) -> String {
        let state = self.shared.state.lock();
        let process = match state.pid {
            Some(pid) => format!("{PROGRAM} (process {pid})"),
            None => format!("{PROGRAM} (being started again)"),
        };
        let again = match state.starts {
            0 | 1 => String::new(),
            starts => format!(", started {starts} times"),
        };
        format!("{process}{again}: {}; its blocks are not shared with other disks", self.why)
    }

    /// Why it does not serve at the moment.
    pub(super) fn trouble(&self) -> Option<String> {
        let state = self.shared.state.lock();
        state.pid.is_none().then(|| format!("{PROGRAM} has ended and is started again: {}", state.words))
    }

    /// Waits until somebody answers on the socket, or the process has ended.
    fn wait_for(&self, socket: &Path) -> Result<(), String> {
        let deadline = Instant::now() + START_LIMIT;
        let mut connection: Option<UnixStream> = None;
        while Instant::now() < deadline {
            match &mut connection {
                // It is connected as soon as somebody listens, who answers once he has all images.
                None => {
                    connection =
                        UnixStream::connect(socket).ok().filter(|stream| stream.set_read_timeout(Some(LOOK)).is_ok())
                }
                Some(stream) => {
                    let mut greeting = [0; GREETING.len()];
                    match stream.read_exact(&mut greeting) {
                        Ok(()) if &greeting == GREETING => return Ok(()),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        _ => connection = None,
                    }
                }
            }
            let state = self.shared.state.lock();
            if state.starts > 0 && state.pid.is_none() {
                return Err(if state.words.is_empty() { "it ended at once".to_owned() } else { state.words.clone() });
            }
            drop(state);
            if connection.is_none() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Err(format!("it does not answer after {} s", START_LIMIT.as_secs()))
    }

    /// Ends the process, which writes what it holds, and waits for that. Blocks.
    pub(super) fn stop(&self) {
        self.shared.state.lock().stopping = true;
        self.shared.changed.notify_all();
        if let Some(supervisor) = self.supervisor.lock().take()
            && supervisor.join().is_err()
        {
            tracing::error!("the supervisor of {PROGRAM} panicked");
        }
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Keeps the process running. On one thread to the end: the kernel ends the process with the thread that has started it.
fn supervise(recipe: &Recipe, shared: &Shared) {
    let disk = &recipe.chain.disk;
    let mut backoff = BACKOFF_MIN;
    loop {
        let begun = Instant::now();
        let words = match recipe.run() {
            Ok((mut process, told)) => {
                let mut state = shared.state.lock();
                state.pid = Some(process.pid());
                state.starts += 1;
                drop(state);
                attend(&mut process, &told, shared);
                let words = told.join().ok().filter(|words| !words.is_empty());
                // What it said tells more than its number.
                let status = process.status();
                words.or(status).unwrap_or_else(|| "it said nothing".to_owned())
            }
            Err(error) => {
                shared.state.lock().starts += 1;
                format!("{PROGRAM} cannot be started: {error}")
            }
        };
        let mut state = shared.state.lock();
        state.pid = None;
        if state.stopping {
            break;
        }
        tracing::warn!(disk, reason = words, "{PROGRAM} has ended; it is started again");
        state.words = words;
        if begun.elapsed() >= STEADY {
            backoff = BACKOFF_MIN;
        }
        shared.changed.wait_for(&mut state, backoff);
        if state.stopping {
            break;
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
    // Somebody answers: a successor of ours has taken the name already.
    if UnixStream::connect(&recipe.socket).is_err() {
        let _ = std::fs::remove_file(&recipe.socket);
    }
}

/// Waits for the end of the process, which is that of its standard error, and brings it about when asked to.
fn attend(process: &mut Process, told: &JoinHandle<String>, shared: &Shared) {
    let mut asked: Option<Instant> = None;
    while !told.is_finished() {
        let mut state = shared.state.lock();
        match asked {
            None if state.stopping => {
                drop(state);
                process.end(true);
                asked = Some(Instant::now());
            }
            Some(when) => {
                drop(state);
                if when.elapsed() > STOP_LIMIT {
                    process.end(false);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            None => {
                shared.changed.wait_for(&mut state, LOOK);
            }
        }
    }
}

/// Takes what it says to the log, and the last of it back, when it has ended.
fn listen(errors: OwnedFd, disk: String) -> io::Result<JoinHandle<String>> {
    let reading = move || {
        let mut last = String::new();
        for line in BufReader::new(File::from(errors)).lines().map_while(Result::ok) {
            tracing::warn!(disk, "{line}");
            last = line.chars().take(500).collect();
        }
        last
    };
    std::thread::Builder::new().name("qemu-errors".to_owned()).spawn(reading)
}

impl Recipe {
    /// Starts it, listening, with a thread that reads what it says until its end.
    fn run(&self) -> io::Result<(Process, JoinHandle<String>)> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(self.socket.parent().unwrap_or(Path::new("/")))?;
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Ours is closed when the process has its own: once it has ended nobody is left who listens.
        let listener = UnixListener::bind(&self.socket)?;
        let (mut process, errors) = start(&self.chain, listener.into(), self.key.as_deref())?;
        match listen(errors, self.chain.disk.clone()) {
            Ok(told) => Ok((process, told)),
            Err(error) => {
                process.end(false);
                Err(error)
            }
        }
    }
}

/// The file with the passphrase of an encrypted chain.
fn key_file(config: &Config, disk: &str, chain: &StoreSpec) -> Result<Option<PathBuf>, QsdError> {
    if chain.chain().all(|image| encryption(image).is_none()) {
        return Ok(None);
    }
    let folder = config.store.key_folder.clone().unwrap_or_else(|| PathBuf::from("/etc/prestage/keys"));
    let file = folder.join(format!("{disk}.key"));
    if config.store.key_folder.is_none() {
        return Err(QsdError::NoKey { image: chain.to_string(), file });
    }
    match find_key(disk, &file) {
        Ok(()) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(QsdError::NoKey { image: chain.to_string(), file })
        }
        Err(error) => Err(QsdError::Key { file, reason: error.to_string() }),
    }
}

/// How an image is encrypted.
fn encryption(image: &StoreSpec) -> Option<Encryption> {
    let StoreSpec::Qcow2 { path, .. } = image else { return None };
    needs(path).iter().find_map(|need| match need {
        Need::Encryption { method: 1 } => Some(Encryption::Aes),
        Need::Encryption { .. } => Some(Encryption::Luks),
        _ => None,
    })
}

/// An image as whoever starts the process is told of it.
fn image(spec: &StoreSpec) -> Image {
    match spec {
        StoreSpec::Qcow2 { path, .. } => Image::Qcow2 { path: path.as_path().into(), encryption: encryption(spec) },
        StoreSpec::File(path) => Image::Raw { path: path.as_path().into() },
        StoreSpec::Nbd { address: NbdAddress::Unix(path), export } => {
            Image::NbdUnix { path: path.as_path().into(), export: export.clone() }
        }
        StoreSpec::Nbd { address: NbdAddress::Tcp { host, port }, export } => {
            Image::NbdTcp { host: host.clone(), port: *port, export: export.clone() }
        }
    }
}

fn path_of(image: &StoreSpec) -> Option<&Path> {
    match image {
        StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. } => Some(path),
        StoreSpec::Nbd { .. } => None,
    }
}
