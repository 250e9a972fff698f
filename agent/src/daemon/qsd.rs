//! Images that only QEMU understands: a `qemu-storage-daemon` reads them, and we are its NBD client.
//!
//! - [`Qsd`]: one process for one disk, started anew when it dies, ended with the disk
//!
//! Encryption, internal snapshots, zstd, extended L2 entries and repairs are QEMU's to do. The process gets the chain of
//! images by name, opens nothing else that an image may name, offers it on a socket in a folder that only its user may enter,
//! and flushes after every write before it answers: our guests outlive it, so what it holds in memory must not be the only
//! copy. It runs as the image's owner, without capabilities and without a way to gain any, and ends with this process.

use crate::config::Config;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use parking_lot::{Condvar, Mutex};
use prestage_cache::backend::{NbdAddress, Need, StoreSpec, needs};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PROGRAM: &str = "qemu-storage-daemon";
const EXPORT: &str = "disk";
/// How long it may take to offer the image: a repair of a large one reads all its tables.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to end before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(100);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// One that has lived as long starts anew without having to wait.
const STEADY: Duration = Duration::from_secs(60);
/// LUKS passphrases are at most 512 bytes; a file of more is something else.
const KEY_MAX_BYTES: u64 = 4096;

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
    disk: String,
    arguments: Vec<String>,
    folder: PathBuf,
    socket: PathBuf,
    owner: Option<(u32, u32)>,
    key: Option<PathBuf>,
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
        let folder = config.daemon.run_dir.join("qemu").join(disk);
        let socket = folder.join("nbd.sock");
        let key = key_file(config, disk, chain)?;
        let owner = match chain {
            StoreSpec::Qcow2 { path, .. } if geteuid().is_root() => {
                let meta = path.metadata().map_err(|error| failed(error.to_string()))?;
                Some((meta.uid(), meta.gid()))
            }
            _ => None,
        };
        let arguments = arguments(chain, &socket, read_only, key.is_some());
        let recipe = Recipe { disk: disk.to_owned(), arguments, folder, socket: socket.clone(), owner, key };
        let shared = Arc::new(Shared::default());
        let supervisor = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("qemu".to_owned()).spawn(move || supervise(&recipe, &shared))
        };
        let supervisor = supervisor.map_err(|error| failed(error.to_string()))?;
        let spec = StoreSpec::Nbd { address: NbdAddress::Unix(socket.clone()), export: EXPORT.to_owned() };
        let files = chain.chain().filter_map(path_of).map(Path::to_owned).collect();
        let qsd = Qsd { spec, files, why: why.clone(), shared, supervisor: Mutex::new(Some(supervisor)) };
        match qsd.wait_for(&socket) {
            Ok(()) => Ok(qsd),
            Err(reason) => Err(failed(reason)),
        }
    }

    /// The files that it shows, by whose times a change while nobody watched is seen.
    pub(super) fn files(&self) -> &[PathBuf] {
        &self.files
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
        while Instant::now() < deadline {
            if UnixStream::connect(socket).is_ok() {
                return Ok(());
            }
            let state = self.shared.state.lock();
            if state.starts > 0 && state.pid.is_none() {
                return Err(if state.words.is_empty() { "it ended at once".to_owned() } else { state.words.clone() });
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(10));
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
    let mut backoff = BACKOFF_MIN;
    loop {
        let begun = Instant::now();
        let words = match recipe.spawn() {
            Ok(mut child) => {
                let told = listen(&mut child, &recipe.disk);
                let mut state = shared.state.lock();
                state.pid = Some(child.id());
                state.starts += 1;
                drop(state);
                let status = attend(&mut child, shared);
                let words = told.and_then(|told| told.join().ok()).filter(|words| !words.is_empty());
                words.unwrap_or(status)
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
        tracing::warn!(disk = recipe.disk, reason = words, "{PROGRAM} has ended; it is started again");
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
        let _ = std::fs::remove_dir(&recipe.folder);
    }
}

/// Waits for the end of the process, and brings it about when asked to. Says how it ended.
fn attend(child: &mut Child, shared: &Shared) -> String {
    let mut asked: Option<Instant> = None;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.to_string(),
            Ok(None) => {}
            Err(error) => return error.to_string(),
        }
        let mut state = shared.state.lock();
        match asked {
            None if state.stopping => {
                drop(state);
                // A child that was not waited for keeps its number.
                let _ = i32::try_from(child.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
                asked = Some(Instant::now());
            }
            Some(when) if when.elapsed() > STOP_LIMIT => {
                drop(state);
                let _ = child.kill();
            }
            Some(_) => {
                drop(state);
                std::thread::sleep(Duration::from_millis(5));
            }
            None => {
                shared.changed.wait_for(&mut state, LOOK);
            }
        }
    }
}

/// Takes what it says to the log; the last of it comes back when it has ended.
fn listen(child: &mut Child, disk: &str) -> Option<JoinHandle<String>> {
    let (errors, disk) = (child.stderr.take()?, disk.to_owned());
    let reading = move || {
        let mut last = String::new();
        for line in BufReader::new(errors).lines().map_while(Result::ok) {
            tracing::warn!(disk, "{line}");
            last = line.chars().take(500).collect();
        }
        last
    };
    std::thread::Builder::new().name("qemu-errors".to_owned()).spawn(reading).ok()
}

impl Recipe {
    fn spawn(&self) -> io::Result<Child> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o711);
        builder.create(self.folder.parent().unwrap_or(Path::new("/")))?;
        match std::fs::DirBuilder::new().mode(0o700).create(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if let Some((user, group)) = self.owner {
            std::os::unix::fs::lchown(&self.folder, Some(user), Some(group))?;
        }
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // Nothing of ours is left to it: no capability, no group, no way to gain one. It ends when we do.
        let mut command = Command::new("setpriv");
        command.args(["--no-new-privs", "--pdeathsig", "TERM"]);
        if let Some((user, group)) = self.owner {
            command.args(["--reuid", &user.to_string(), "--regid", &group.to_string(), "--clear-groups"]);
            command.args(["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]);
        }
        command.arg("--").arg(PROGRAM).args(&self.arguments);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.current_dir("/").stdout(Stdio::null()).stderr(Stdio::piped());
        command.stdin(match &self.key {
            Some(key) => self.pass_on(key)?,
            None => Stdio::null(),
        });
        command.spawn()
    }

    /// The passphrase as the process's standard input: it may not be allowed to read the file, and an argument is for all
    /// to see.
    fn pass_on(&self, key: &Path) -> io::Result<Stdio> {
        let passphrase = std::fs::read(key)?;
        let passphrase = passphrase.strip_suffix(b"\n").unwrap_or(&passphrase);
        let (reader, mut writer) = io::pipe()?;
        if let Some((user, group)) = self.owner {
            fchown(&reader, Some(user), Some(group))?;
        }
        // A pipe holds 64 KiB.
        writer.write_all(passphrase)?;
        Ok(reader.into())
    }
}

/// The file with the passphrase of an encrypted chain.
fn key_file(config: &Config, disk: &str, chain: &StoreSpec) -> Result<Option<PathBuf>, QsdError> {
    if chain.chain().all(|image| encryption(image).is_none()) {
        return Ok(None);
    }
    let folder = config.store.key_folder.clone().unwrap_or_else(|| PathBuf::from("/etc/prestage/keys"));
    let file = folder.join(format!("{disk}.key"));
    let refuse = |reason: String| QsdError::Key { file: file.clone(), reason };
    if config.store.key_folder.is_none() || !file.exists() {
        return Err(QsdError::NoKey { image: chain.to_string(), file });
    }
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&file);
    let meta = opened.and_then(|file| file.metadata()).map_err(|error| refuse(error.to_string()))?;
    if !meta.is_file() || meta.len() == 0 || meta.len() > KEY_MAX_BYTES {
        return Err(refuse(format!("it is not a file of 1 to {KEY_MAX_BYTES} bytes")));
    }
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(refuse("others may read it; `chmod 600` it".to_owned()));
    }
    Ok(Some(file))
}

/// The format of an image's encryption, as QEMU calls it.
fn encryption(image: &StoreSpec) -> Option<&'static str> {
    let StoreSpec::Qcow2 { path, .. } = image else { return None };
    needs(path).iter().find_map(|need| match need {
        Need::Encryption { method: 1 } => Some("aes"),
        Need::Encryption { .. } => Some("luks"),
        _ => None,
    })
}

/// The command line: every image named, nothing followed.
fn arguments(chain: &StoreSpec, socket: &Path, read_only: bool, has_key: bool) -> Vec<String> {
    let images: Vec<&StoreSpec> = chain.chain().collect();
    let mut out = Vec::new();
    let mut add = |name: &str, value: String| out.extend([name.to_owned(), value]);
    if has_key {
        add("--object", json!({"qom-type": "secret", "id": "key", "file": "/dev/stdin"}).to_string());
    }
    for (i, image) in images.iter().enumerate().rev() {
        let read_only = i > 0 || read_only;
        if let Some(path) = path_of(image) {
            add("--blockdev", file_node(path, &format!("file{i}"), read_only).to_string());
        }
        let mut node = match image {
            StoreSpec::Qcow2 { .. } => json!({
                "driver": "qcow2",
                "file": format!("file{i}"),
                // Named or none: never what the image says.
                "backing": (i + 1 < images.len()).then(|| format!("disk{}", i + 1)),
            }),
            StoreSpec::File(_) => json!({"driver": "raw", "file": format!("file{i}")}),
            StoreSpec::Nbd { address, export } => json!({
                "driver": "nbd",
                "server": match address {
                    NbdAddress::Unix(path) => json!({"type": "unix", "path": path}),
                    NbdAddress::Tcp { host, port } => json!({"type": "inet", "host": host, "port": port.to_string()}),
                },
                "export": export,
            }),
        };
        node["node-name"] = json!(format!("disk{i}"));
        node["read-only"] = json!(read_only);
        node["discard"] = json!("unmap");
        if let Some(format) = encryption(image) {
            node["encrypt"] = json!({"format": format, "key-secret": "key"});
        }
        add("--blockdev", node.to_string());
    }
    add("--nbd-server", json!({"addr": {"type": "unix", "path": socket}, "max-connections": 16}).to_string());
    let export = json!({
        "type": "nbd",
        "id": EXPORT,
        "name": EXPORT,
        "node-name": "disk0",
        "writable": !read_only,
        "writethrough": true,
    });
    add("--export", export.to_string());
    out
}

fn path_of(image: &StoreSpec) -> Option<&Path> {
    match image {
        StoreSpec::File(path) | StoreSpec::Qcow2 { path, .. } => Some(path),
        StoreSpec::Nbd { .. } => None,
    }
}

fn file_node(path: &Path, name: &str, read_only: bool) -> Value {
    let is_device = path.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    let direct =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_NONBLOCK).open(path).is_ok();
    json!({
        "driver": if is_device { "host_device" } else { "file" },
        "node-name": name,
        "filename": path,
        "read-only": read_only,
        "discard": "unmap",
        "cache": {"direct": direct, "no-flush": false},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_named_and_nothing_is_followed() {
        let chain: StoreSpec = "qcow2:/img/top?backing=qcow2:/img/middle?backing=/img/base".parse().unwrap();
        let arguments = arguments(&chain, Path::new("/run/s"), false, false);
        let nodes: Vec<Value> = arguments
            .chunks(2)
            .filter(|pair| pair[0] == "--blockdev")
            .map(|pair| serde_json::from_str(&pair[1]).unwrap())
            .collect();
        let of = |name: &str| nodes.iter().find(|node| node["node-name"] == name).unwrap();
        assert_eq!(of("disk0")["backing"], "disk1");
        assert_eq!(of("disk1")["backing"], "disk2");
        assert_eq!((&of("disk2")["driver"], &of("file2")["filename"]), (&json!("raw"), &json!("/img/base")));
        let read_only: Vec<_> = (0..3).map(|i| of(&format!("disk{i}"))["read-only"].clone()).collect();
        assert_eq!(read_only, [false, true, true]);
        let alone: StoreSpec = "qcow2:/img/top".parse().unwrap();
        let text = super::arguments(&alone, Path::new("/run/s"), true, false).join(" ");
        assert!(text.contains(r#""backing":null"#) && text.contains(r#""writable":false"#), "{text}");
    }
}
