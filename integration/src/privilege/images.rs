//! A `qemu-storage-daemon` for a chain of images: by the broker, or by this process if it has none.
//!
//! - [`start`], [`Process`]: one that runs
//! - [`find_key`]: whether an encrypted image can be opened
//! - [`Handle`]: an image that was opened for it without access ([`open_all`] where no rules are to be kept)
//! - [`spawn`]: the process itself
//!
//! It gets each image as a descriptor that leads to that file alone (`O_PATH`, opened anew through `/proc/self/fd` with its own
//! rights), so that nobody changes what a name means between the look at it and its opening; and the socket to listen on. It runs as
//! the owner of the uppermost image, without capabilities and without a way to gain any; started by the broker, it can write to that image
//! and to nothing else that has a name, and is under seccomp.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::{Value, json};

use super::confine::Bounds;
use super::protocol::{Chain, Encryption, Image, Refusal};
use super::{Child as BrokersChild, broker};

/// The program.
pub const PROGRAM: &str = "qemu-storage-daemon";
/// What its export is called.
pub const EXPORT: &str = "disk";
/// LUKS passphrases are at most 512 bytes; a file of more is something else.
const KEY_MAX_BYTES: u64 = 4096;

/// One that was started.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    whose: Whose,
}

#[derive(Debug)]
enum Whose {
    Ours(Child),
    Brokers(BrokersChild),
}

/// Starts one that listens on `listener`. Returns it with its standard error, whose end is that of the process. `key`: the file with
/// the passphrase, for where there is no broker, which knows its folder itself.
///
/// # Errors
/// It cannot be started, or the broker's rules do not allow an image.
pub fn start(chain: &Chain, listener: OwnedFd, key: Option<&Path>) -> io::Result<(Process, OwnedFd)> {
    if let Some(broker) = broker() {
        let (child, errors) = broker.start_images(chain, listener)?;
        return Ok((Process { pid: child.pid(), whose: Whose::Brokers(child) }, errors));
    }
    let handles = open_all(chain)?;
    let key = key.map(open_key).transpose()?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut child = spawn(chain, &handles, &listener, key, None, &path)?;
    let errors = child.stderr.take().ok_or_else(|| io::Error::other("no standard error"))?;
    Ok((Process { pid: child.id(), whose: Whose::Ours(child) }, errors.into()))
}

impl Process {
    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks it to end, or with `gently` false ends it.
    pub fn end(&mut self, gently: bool) {
        match &mut self.whose {
            Whose::Brokers(child) => child.end(gently),
            // A child that was not waited for keeps its number.
            Whose::Ours(child) if gently => {
                let _ = i32::try_from(child.id()).map(|pid| kill(Pid::from_raw(pid), Signal::SIGTERM));
            }
            Whose::Ours(child) => drop(child.kill()),
        }
    }

    /// How it ended, if that is known here. To be asked once its standard error has ended.
    pub fn status(mut self) -> Option<String> {
        match &mut self.whose {
            Whose::Brokers(_) => None,
            Whose::Ours(child) => child.wait().ok().map(|status| status.to_string()),
        }
    }
}

/// Whether there is a passphrase in `file`, or at the broker's for `disk`, that can be used.
///
/// # Errors
/// [`io::ErrorKind::NotFound`], or what is wrong with it.
pub fn find_key(disk: &str, file: &Path) -> io::Result<()> {
    match broker() {
        Some(broker) => broker.find_key(disk),
        None => open_key(file).map(drop).map_err(io::Error::from),
    }
}

/// A file with a passphrase.
fn open_key(path: &Path) -> Result<File, Refusal> {
    let cannot = |error: io::Error| Refusal::os(&format!("open {}", path.display()), &error);
    // A pipe would hang.
    check_key(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(cannot)?)
}

/// The same file, if it can be used.
pub(super) fn check_key(file: File) -> Result<File, Refusal> {
    let meta = file.metadata().map_err(|error| Refusal::os("look at a passphrase's file", &error))?;
    if !meta.is_file() || meta.len() == 0 || meta.len() > KEY_MAX_BYTES {
        return Err(Refusal::rule(format!("it is not a file of 1 to {KEY_MAX_BYTES} bytes")));
    }
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(Refusal::rule("others may read it; `chmod 600` it"));
    }
    Ok(file)
}

/// An image, opened without access.
#[derive(Debug)]
pub(super) struct Handle(pub(super) File);

impl Handle {
    fn path(&self) -> String {
        through(self.0.as_raw_fd())
    }

    /// The block driver's description. Whether direct I/O works is tried, as a device may not.
    fn node(&self, name: &str, read_only: bool) -> Value {
        let is_device = self.0.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
        let flags = libc::O_DIRECT | libc::O_NONBLOCK;
        let direct = OpenOptions::new().read(true).custom_flags(flags).open(self.path()).is_ok();
        json!({
            "driver": if is_device { "host_device" } else { "file" },
            "node-name": name,
            "filename": self.path(),
            "read-only": read_only,
            "discard": "unmap",
            "cache": {"direct": direct, "no-flush": false},
        })
    }
}

fn through(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// All images of a chain, whatever they are: for a process that needs no broker.
fn open_all(chain: &Chain) -> io::Result<Vec<Option<Handle>>> {
    let open = |image: &Image| match image {
        Image::Qcow2 { path, .. } | Image::Raw { path } | Image::NbdUnix { path, .. } => {
            let file = File::options().read(true).custom_flags(libc::O_PATH).open(path.path())?;
            Ok(Some(Handle(file)))
        }
        Image::NbdTcp { .. } => Ok(None),
    };
    chain.images.iter().map(open).collect()
}

/// What the process is confined to: it writes to its uppermost image, if to anything.
pub(super) fn bounds(chain: &Chain, handles: &[Option<Handle>]) -> Result<Bounds, Refusal> {
    let top = handles.first().and_then(Option::as_ref).filter(|_| !chain.read_only);
    let written: Vec<_> = top.iter().map(|handle| handle.0.as_fd()).collect();
    Bounds::writing_only(&written).map_err(|error| Refusal::rule(format!("{PROGRAM} cannot be confined: {error}")))
}

/// Starts the process. `handles`: of the images, in their order. Without `bounds` it is confined by its user alone.
pub(super) fn spawn(
    chain: &Chain,
    handles: &[Option<Handle>],
    listener: &OwnedFd,
    key: Option<File>,
    bounds: Option<Bounds>,
    path: &str,
) -> io::Result<Child> {
    let owner = match handles.first() {
        Some(Some(Handle(top))) if geteuid().is_root() => {
            let meta = top.metadata()?;
            Some((meta.uid(), meta.gid()))
        }
        _ => None,
    };
    // Nothing of ours is left to it: no capability, no group, no way to gain one. It ends when we do.
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--pdeathsig", "TERM"]);
    if let Some((user, group)) = owner {
        command.args(["--reuid", &user.to_string(), "--regid", &group.to_string(), "--clear-groups"]);
        command.args(["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]);
    }
    command.arg("--").arg(PROGRAM).args(arguments(chain, handles, listener.as_raw_fd(), key.is_some()));
    command.env_clear().env("PATH", path);
    command.current_dir("/").stdout(Stdio::null()).stderr(Stdio::piped());
    command.stdin(match key {
        Some(key) => pass_on(key, owner)?,
        None => Stdio::null(),
    });
    let passed: Vec<RawFd> = handles.iter().flatten().map(|handle| handle.0.as_raw_fd()).collect();
    let passed: Vec<RawFd> = passed.into_iter().chain([listener.as_raw_fd()]).collect();
    prepare(&mut command, passed, bounds);
    command.spawn()
}

/// These descriptors stay open in the program, under their numbers, and it is confined from its start.
fn prepare(command: &mut Command, descriptors: Vec<RawFd>, bounds: Option<Bounds>) {
    let prepare = move || {
        for number in &descriptors {
            // SAFETY: the caller of `spawn` has it open until that returns, and the child has a copy of it.
            let descriptor = unsafe { std::os::fd::BorrowedFd::borrow_raw(*number) };
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        bounds.as_ref().map_or(Ok(()), Bounds::enter)
    };
    // SAFETY: between fork and exec it makes plain system calls on numbers that were made before: it takes no lock and allocates
    // nothing.
    unsafe { command.pre_exec(prepare) };
}

/// The passphrase as the process's standard input: it may not be allowed to read the file, and an argument is for all to see.
fn pass_on(key: File, owner: Option<(u32, u32)>) -> io::Result<Stdio> {
    let mut passphrase = Vec::new();
    key.take(KEY_MAX_BYTES).read_to_end(&mut passphrase)?;
    let passphrase = passphrase.strip_suffix(b"\n").unwrap_or(&passphrase);
    let (reader, mut writer) = io::pipe()?;
    if let Some((user, group)) = owner {
        fchown(reader.as_fd(), Some(user), Some(group))?;
    }
    // A pipe holds 64 KiB.
    writer.write_all(passphrase)?;
    Ok(reader.into())
}

/// The command line: every image named, nothing followed.
fn arguments(chain: &Chain, handles: &[Option<Handle>], listener: RawFd, has_key: bool) -> Vec<String> {
    let mut out = Vec::new();
    let mut add = |name: &str, value: String| out.extend([name.to_owned(), value]);
    if has_key {
        add("--object", json!({"qom-type": "secret", "id": "key", "file": "/dev/stdin"}).to_string());
    }
    for (i, (image, handle)) in chain.images.iter().zip(handles).enumerate().rev() {
        let read_only = i > 0 || chain.read_only;
        if let (Some(handle), Image::Qcow2 { .. } | Image::Raw { .. }) = (handle, image) {
            add("--blockdev", handle.node(&format!("file{i}"), read_only).to_string());
        }
        let mut node = match image {
            Image::Qcow2 { .. } => json!({
                "driver": "qcow2",
                "file": format!("file{i}"),
                // Named or none: never what the image says.
                "backing": (i + 1 < chain.images.len()).then(|| format!("disk{}", i + 1)),
            }),
            Image::Raw { .. } => json!({"driver": "raw", "file": format!("file{i}")}),
            Image::NbdUnix { path, export } => {
                let path = handle.as_ref().map_or_else(|| path.path().display().to_string(), Handle::path);
                json!({"driver": "nbd", "server": {"type": "unix", "path": path}, "export": export})
            }
            Image::NbdTcp { host, port, export } => {
                let server = json!({"type": "inet", "host": host, "port": port.to_string()});
                json!({"driver": "nbd", "server": server, "export": export})
            }
        };
        node["node-name"] = json!(format!("disk{i}"));
        node["read-only"] = json!(read_only);
        node["discard"] = json!("unmap");
        if let Image::Qcow2 { encryption: Some(encryption), .. } = image {
            let format = match encryption {
                Encryption::Aes => "aes",
                Encryption::Luks => "luks",
            };
            node["encrypt"] = json!({"format": format, "key-secret": "key"});
        }
        add("--blockdev", node.to_string());
    }
    let address = json!({"type": "fd", "str": listener.to_string()});
    add("--nbd-server", json!({"addr": address, "max-connections": 16}).to_string());
    let export = json!({
        "type": "nbd",
        "id": EXPORT,
        "name": EXPORT,
        "node-name": "disk0",
        "writable": !chain.read_only,
        "writethrough": true,
    });
    add("--export", export.to_string());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(path: &Path) -> Image {
        Image::Qcow2 { path: path.into(), encryption: None }
    }

    #[test]
    fn every_image_is_named_and_nothing_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            std::fs::write(folder.path().join(name), "").unwrap();
            folder.path().join(name)
        };
        let images =
            vec![qcow2(&path("top")), qcow2(&path("middle")), Image::Raw { path: path("base").as_path().into() }];
        let chain = Chain { disk: "d".into(), images, read_only: false };
        let handles = open_all(&chain).unwrap();
        let words = arguments(&chain, &handles, 5, false);
        let nodes: Vec<Value> = words
            .chunks(2)
            .filter(|pair| pair[0] == "--blockdev")
            .map(|pair| serde_json::from_str(&pair[1]).unwrap())
            .collect();
        let of = |name: &str| nodes.iter().find(|node| node["node-name"] == name).unwrap();
        assert_eq!(of("disk0")["backing"], "disk1");
        assert_eq!(of("disk1")["backing"], "disk2");
        let base = handles[2].as_ref().unwrap().path();
        assert_eq!((&of("disk2")["driver"], &of("file2")["filename"]), (&json!("raw"), &json!(base)));
        let read_only: Vec<_> = (0..3).map(|i| of(&format!("disk{i}"))["read-only"].clone()).collect();
        assert_eq!(read_only, [false, true, true]);
        let alone = Chain { images: vec![qcow2(&path("top"))], read_only: true, ..chain };
        let text = arguments(&alone, &open_all(&alone).unwrap(), 5, false).join(" ");
        assert!(text.contains(r#""backing":null"#) && text.contains(r#""writable":false"#), "{text}");
    }

    #[test]
    fn a_program_within_bounds_writes_to_its_image_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            std::fs::write(folder.path().join(name), "before").unwrap();
            folder.path().join(name)
        };
        let (top, base, new) = (path("top"), path("base"), folder.path().join("new"));
        let images = vec![qcow2(&top), qcow2(&base)];
        let chain = Chain { disk: "d".into(), images, read_only: false };
        let run = |chain: &Chain, bounded: bool| {
            let bounds = bounded.then(|| bounds(chain, &open_all(chain).unwrap()).unwrap());
            let script =
                "echo after > \"$0\"; echo after > \"$1\"; echo after > \"$2\"; grep Seccomp: /proc/self/status";
            let mut command = Command::new("sh");
            command.args(["-c", script]).args([&top, &base, &new]).stderr(Stdio::null());
            // SAFETY: a plain system call.
            unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_no_new_privs()?)) };
            prepare(&mut command, Vec::new(), bounds);
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let text = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        assert!(run(&chain, true).contains('2'), "no seccomp");
        if text(&base) != "before" {
            println!("SKIPPED in part: this kernel has no Landlock");
            return;
        }
        assert_eq!((text(&top).as_str(), text(&new).as_str()), ("after\n", ""));
        let read_only = Chain { read_only: true, ..chain };
        std::fs::write(&top, "before").unwrap();
        run(&read_only, true);
        assert_eq!(text(&top), "before");
        run(&read_only, false);
        assert_eq!([&top, &base, &new].map(|path| text(path)), ["after\n"; 3], "it would if it were not bound");
    }
}
