//! Slow remote storage: nbdkit's file plugin behind its delay filter, with a log of every request, and stores of the
//! user's own.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths::Scratch;
use crate::process::{Process, tail, wait_until};

/// Where a disk's bytes live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Store {
    /// A raw file or a block device.
    Path(PathBuf),
    NbdUnix {
        socket: PathBuf,
        export: String,
    },
    NbdTcp {
        host: String,
        port: u16,
        export: String,
    },
}

impl Store {
    /// Reads `/path`, `nbd://HOST[:PORT][/EXPORT]` or `nbd+unix:///[EXPORT]?socket=/path`
    /// (NetworkBlockDevice/nbd doc/uri.md).
    pub fn parse(text: &str) -> Result<Self> {
        if let Some(rest) = text.strip_prefix("nbd+unix:///") {
            let Some((export, socket)) = rest.split_once("?socket=") else {
                bail!("`{text}` names no socket; write nbd+unix:///EXPORT?socket=/path");
            };
            return Ok(Self::NbdUnix { socket: socket.into(), export: export.to_owned() });
        }
        if let Some(rest) = text.strip_prefix("nbd://") {
            let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
            let (host, port) = match host.rsplit_once(':') {
                // the colons of [::1] are not a port's
                Some((name, port)) if !port.ends_with(']') => {
                    (name, port.parse().with_context(|| format!("`{text}`: `{port}` is no port"))?)
                }
                _ => (host, 10809),
            };
            let host = host.trim_start_matches('[').trim_end_matches(']');
            if host.is_empty() {
                bail!("`{text}` names no host; write nbd://HOST:PORT/EXPORT");
            }
            return Ok(Self::NbdTcp { host: host.to_owned(), port, export: export.to_owned() });
        }
        if text.contains("://") {
            bail!("`{text}`: a store is a path, nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=/path");
        }
        let path = Path::new(text).canonicalize().with_context(|| format!("no store at {text}"))?;
        Ok(Self::Path(path))
    }

    /// As `prestagectl disk add` takes it.
    #[must_use]
    pub fn spec(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::NbdUnix { socket, export } => format!("nbd+unix:///{export}?socket={}", socket.display()),
            Self::NbdTcp { host, port, export } if host.contains(':') => format!("nbd://[{host}]:{port}/{export}"),
            Self::NbdTcp { host, port, export } => format!("nbd://{host}:{port}/{export}"),
        }
    }
}

/// How nbdkit serves.
#[derive(Debug, Clone)]
pub struct NbdOptions {
    /// Added to each read.
    pub read_delay: Duration,
    /// Writes go to the file; else to a temporary overlay that nobody else sees.
    pub keep_writes: bool,
}

impl Default for NbdOptions {
    /// 5 ms a read, as of a disk array or an object store's cache in the same building; the file is never written.
    fn default() -> Self {
        Self { read_delay: Duration::from_millis(5), keep_writes: false }
    }
}

/// What a store was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub write_bytes: u64,
    pub flushes: u64,
}

impl Traffic {
    /// What came after `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            reads: self.reads.saturating_sub(earlier.reads),
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            writes: self.writes.saturating_sub(earlier.writes),
            write_bytes: self.write_bytes.saturating_sub(earlier.write_bytes),
            flushes: self.flushes.saturating_sub(earlier.flushes),
        }
    }

    /// Counts one line of nbdkit's log filter (nbdkit-log-filter(1)): a request's first line names it with its size.
    fn count(&mut self, line: &str) {
        let size = || {
            let (_, rest) = line.split_once("count=0x")?;
            u64::from_str_radix(rest.split(' ').next()?, 16).ok()
        };
        if line.contains(" return=") {
            return; // the answer's line
        }
        if line.contains(" Read ") {
            self.reads += 1;
            self.read_bytes += size().unwrap_or(0);
        } else if line.contains(" Write ") {
            self.writes += 1;
            self.write_bytes += size().unwrap_or(0);
        } else if line.contains(" Flush ") {
            self.flushes += 1;
        }
    }
}

/// A running nbdkit on a unix socket. Not for clients that die with requests under way: nbdkit 1.32.5 then ends at an assertion
/// (`raw_send_socket: sock >= 0`), with and without filters; [`Throttled`](crate::throttled::Throttled) goes on.
#[derive(Debug)]
pub struct Nbd {
    socket: PathBuf,
    requests: PathBuf,
    log: PathBuf,
    process: Process,
    counted: Mutex<(u64, Traffic)>,
}

impl Nbd {
    /// Requests nbdkit works on at a time: more than a guest and a prefetcher ever have in flight, so that the delay is
    /// a latency and not a limit of throughput.
    const THREADS: &str = "128";

    /// Serves `disk` from a socket in `scratch`; `name` tells several apart.
    pub fn start(scratch: &Scratch, name: &str, disk: &Path, options: &NbdOptions) -> Result<Self> {
        let [socket, requests, log, pid_file] =
            ["sock", "requests", "log", "pid"].map(|kind| scratch.join(format!("nbd-{name}.{kind}")));
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--threads", Self::THREADS]);
        command.arg("--unix").arg(&socket).arg("--pidfile").arg(&pid_file);
        command.args(["--filter=log", "--filter=delay"]);
        if !options.keep_writes {
            command.arg("--filter=cow");
        }
        command.arg("file").arg(disk);
        command.arg(format!("logfile={}", requests.display()));
        command.arg(format!("rdelay={}ms", options.read_delay.as_millis()));
        // cow keeps its overlay there
        command.env("TMPDIR", scratch.path());
        let process = Process::start("nbdkit", &command, &log, Duration::from_secs(5))?;
        wait_until("nbdkit's start", Duration::from_secs(20), || {
            process.check_alive()?;
            Ok(pid_file.exists())
        })
        .with_context(|| tail(&log, 10))?;
        Ok(Self { socket, requests, log, process, counted: Mutex::default() })
    }

    #[must_use]
    pub fn store(&self) -> Store {
        Store::NbdUnix { socket: self.socket.clone(), export: String::new() }
    }

    /// All requests so far, as the server saw them.
    pub fn traffic(&self) -> Result<Traffic> {
        self.process.check_alive().with_context(|| tail(&self.log, 10))?;
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let (offset, traffic) = &mut *counted;
        let file = match File::open(&self.requests) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(*traffic),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", self.requests.display())),
        };
        let mut reader = BufReader::new(file);
        reader.seek(SeekFrom::Start(*offset))?;
        let mut line = String::new();
        loop {
            line.clear();
            let bytes = reader.read_line(&mut line)?;
            // a line still being written is counted the next time
            if bytes == 0 || !line.ends_with('\n') {
                return Ok(*traffic);
            }
            traffic.count(&line);
            *offset += u64::try_from(bytes).context("line length")?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_read_and_written_back() {
        for text in [
            "nbd+unix:///?socket=/run/a.sock",
            "nbd+unix:///disk?socket=/run/a.sock",
            "nbd://host:1234/x",
            "nbd://[::1]:10809/",
        ] {
            assert_eq!(Store::parse(text).unwrap().spec(), text);
        }
        let defaulted = Store::NbdTcp { host: "h".to_owned(), port: 10809, export: String::new() };
        assert_eq!(Store::parse("nbd://h").unwrap(), defaulted);
        for text in ["nbd+unix:///x", "nbd://", "http://x/", "/nowhere/at/all", "nbd://h:port/"] {
            assert!(Store::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_server_counts_what_a_client_reads() {
        let scratch = Scratch::new().unwrap();
        let disk = scratch.join("disk");
        std::fs::write(&disk, vec![7u8; 1 << 20]).unwrap();
        let options = NbdOptions { read_delay: Duration::ZERO, ..NbdOptions::default() };
        let nbd = Nbd::start(&scratch, "t", &disk, &options).unwrap();
        let before = nbd.traffic().unwrap();
        let mut client = Command::new("qemu-io");
        client
            .args(["-f", "raw", "-c", "read 0 64k", "-c", "read 128k 4k", "-c", "write 8k 4k", "-c", "flush"])
            .arg(nbd.store().spec());
        crate::process::run(&mut client).unwrap();
        let traffic = nbd.traffic().unwrap().since(&before);
        assert_eq!((traffic.reads, traffic.read_bytes), (2, 68 << 10));
        assert_eq!((traffic.writes, traffic.write_bytes), (1, 4 << 10));
        assert!(traffic.flushes >= 1, "{traffic:?}"); // QEMU flushes once more when it closes the disk
        assert_eq!(std::fs::read(&disk).unwrap(), vec![7u8; 1 << 20], "the served file is not written");
    }
}
