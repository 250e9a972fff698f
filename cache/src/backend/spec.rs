//! The names of stores.
//!
//! - [`StoreSpec`]: a parsed name; [`NbdAddress`]: where an NBD server listens
//! - [`SpecError`]: what is wrong with a name and what to write instead
//!
//! An image in qcow2 format is named with all images below it: which files are opened is the operator's word, never the
//! image's, which may come from a tenant.
//!
//! NBD names follow the URI format of the NBD project (`doc/uri.md`) and are shared with nbdinfo, qemu-img and nbdkit; the
//! older `nbd:unix:…:exportname=…` is what QEMU itself prints.

use std::ffi::OsStr;
use std::fmt;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The port that IANA gave to NBD.
const NBD_PORT: u16 = 10809;
/// Images on top of each other. Every read that is in none of them asks them all.
pub(super) const CHAIN_MAX: usize = 16;
/// `NBD_MAX_STRING`: the longest export name that a server has to accept.
const EXPORT_MAX_BYTES: usize = 4096;

/// A store as an operator names it. `Display` gives a form that parses to the same store.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum StoreSpec {
    /// A raw file or block device: `/path` or `file:/path`. Absolute; relative names are resolved when parsed.
    File(PathBuf),
    /// An NBD export: `nbd://host[:port]/export`, `nbd+unix:///export?socket=/path`, `nbd:unix:/path[:exportname=x]`.
    Nbd { address: NbdAddress, export: String },
    /// A qcow2 image: `qcow2:/path`, and on another store `qcow2:/path?backing=store`, with `%` and `?` of the path
    /// percent-encoded. The store below is only read.
    Qcow2 { path: PathBuf, backing: Option<Box<StoreSpec>> },
}

impl StoreSpec {
    /// The stores of a chain from the top down; one store for what has none below it.
    pub fn chain(&self) -> impl Iterator<Item = &StoreSpec> {
        std::iter::successors(Some(self), |spec| spec.below())
    }

    /// The store below.
    pub fn below(&self) -> Option<&StoreSpec> {
        match self {
            StoreSpec::Qcow2 { backing, .. } => backing.as_deref(),
            StoreSpec::File(_) | StoreSpec::Nbd { .. } => None,
        }
    }
}

/// Where an NBD server listens.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum NbdAddress {
    Unix(PathBuf),
    /// `host` is a name, an IPv4 address, or an IPv6 address without brackets.
    Tcp {
        host: String,
        port: u16,
    },
}

/// A store's name that cannot be understood.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{name}` does not name a store: {reason}; write {hint}")]
pub struct SpecError {
    pub name: String,
    pub reason: String,
    pub hint: &'static str,
}

const HINT_ANY: &str = "/path/to/disk.img, nbd://host:port/export or nbd+unix:///export?socket=/path";
const HINT_QCOW2: &str = "qcow2:/path/to/image or qcow2:/path/to/image?backing=/path/to/base";
const HINT_TCP: &str = "nbd://host:port/export";
const HINT_UNIX: &str = "nbd+unix:///export?socket=/absolute/path";
const HINT_QEMU: &str = "nbd:unix:/absolute/path:exportname=name or nbd:host:port:exportname=name";

impl FromStr for StoreSpec {
    type Err = SpecError;

    fn from_str(name: &str) -> Result<StoreSpec, SpecError> {
        let fail = |reason: &str, hint| SpecError { name: name.to_owned(), reason: reason.to_owned(), hint };
        if let Some(rest) = name.strip_prefix("nbd+unix://") {
            return unix_uri(rest).map_err(|reason| fail(&reason, HINT_UNIX));
        }
        if let Some(rest) = name.strip_prefix("nbd://") {
            return tcp_uri(rest).map_err(|reason| fail(&reason, HINT_TCP));
        }
        if name.starts_with("nbds://") || name.starts_with("nbds+unix://") {
            return Err(fail("NBD over TLS is not supported", HINT_ANY));
        }
        if let Some(rest) = name.strip_prefix("nbd:") {
            return qemu_name(rest).map_err(|reason| fail(&reason, HINT_QEMU));
        }
        if let Some(rest) = name.strip_prefix("qcow2:") {
            return qcow2_chain(rest).map_err(|reason| fail(&reason, HINT_QCOW2));
        }
        let path = match name.strip_prefix("file:") {
            Some(rest) => match rest.strip_prefix("//") {
                Some(path) if path.starts_with('/') => path,
                Some(_) => return Err(fail("a file URI has no host", HINT_ANY)),
                None => rest,
            },
            None => {
                let scheme =
                    name.split(['/', '.']).next().unwrap_or_default().split_once(':').map(|(scheme, _)| scheme);
                if let Some(scheme) = scheme {
                    return Err(fail(&format!("`{scheme}:` is not known"), HINT_ANY));
                }
                name
            }
        };
        if path.is_empty() {
            return Err(fail("it is empty", HINT_ANY));
        }
        if path.contains('\0') {
            return Err(fail("it contains a zero byte", HINT_ANY));
        }
        let path = std::path::absolute(path).map_err(|error| fail(&error.to_string(), HINT_ANY))?;
        Ok(StoreSpec::File(path))
    }
}

fn unix_uri(rest: &str) -> Result<StoreSpec, String> {
    let (path, query) = rest.split_once('?').ok_or("`?socket=` is missing")?;
    let path = path.strip_prefix('/').ok_or("a unix URI has no host, so it has three slashes")?;
    let mut socket = None;
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some(("socket", value)) if socket.is_none() => socket = Some(decode(value)?),
            _ => return Err(format!("`{pair}` is not known here")),
        }
    }
    let socket = socket.filter(|s| !s.is_empty()).ok_or("`?socket=` is missing")?;
    nbd(NbdAddress::Unix(absolute(&socket)?), decode(path)?)
}

fn tcp_uri(rest: &str) -> Result<StoreSpec, String> {
    if rest.contains('?') {
        return Err("an nbd:// URI takes no parameters here".to_owned());
    }
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.contains('@') {
        return Err("a user name is not supported".to_owned());
    }
    nbd(host_and_port(authority)?, decode(export)?)
}

/// Images from the top down, and what the last of them stands on.
fn qcow2_chain(rest: &str) -> Result<StoreSpec, String> {
    let (mut paths, mut rest, mut bottom) = (Vec::new(), Some(rest), None);
    while let Some(image) = rest.take() {
        if paths.len() == CHAIN_MAX {
            return Err(format!("it has more than {CHAIN_MAX} images on top of each other"));
        }
        let (path, below) = match image.split_once("?backing=") {
            Some((path, below)) => (path, Some(below)),
            None => (image, None),
        };
        if path.contains('?') {
            return Err("only `?backing=` may follow the path; a question mark in it is written %3F".to_owned());
        }
        paths.push(absolute(&decode(path)?)?);
        match below.map(|below| (below, below.strip_prefix("qcow2:"))) {
            Some((_, Some(image))) => rest = Some(image),
            Some((store, None)) => bottom = Some(store.parse::<StoreSpec>().map_err(|error| error.to_string())?),
            None => {}
        }
    }
    let on = |backing: Option<StoreSpec>, path| Some(StoreSpec::Qcow2 { path, backing: backing.map(Box::new) });
    paths.into_iter().rev().fold(bottom, on).ok_or_else(|| "it is empty".to_owned())
}

fn qemu_name(rest: &str) -> Result<StoreSpec, String> {
    let (address, export) = match rest.split_once(":exportname=") {
        Some((address, export)) => (address, export),
        None => (rest, ""),
    };
    let address = match address.strip_prefix("unix:") {
        Some(path) => NbdAddress::Unix(absolute(path.as_bytes())?),
        None => host_and_port(address)?,
    };
    nbd(address, export.as_bytes().to_vec())
}

fn nbd(address: NbdAddress, export: Vec<u8>) -> Result<StoreSpec, String> {
    let export = String::from_utf8(export).map_err(|_| "the export's name is not UTF-8")?;
    if export.len() > EXPORT_MAX_BYTES {
        return Err(format!("the export's name is longer than {EXPORT_MAX_BYTES} bytes"));
    }
    Ok(StoreSpec::Nbd { address, export })
}

fn absolute(path: &[u8]) -> Result<PathBuf, String> {
    if path.is_empty() {
        return Err("the path is empty".to_owned());
    }
    if path.contains(&0) {
        return Err("the path contains a zero byte".to_owned());
    }
    std::path::absolute(Path::new(OsStr::from_bytes(path))).map_err(|error| error.to_string())
}

fn host_and_port(authority: &str) -> Result<NbdAddress, String> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("`]` is missing")?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(format!("`{host}` is not an IPv6 address"));
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return Err(format!("`{rest}` after the address is not a port")),
            }
        }
        None => match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => return Err("an IPv6 address goes into brackets".to_owned()),
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err("the host is missing".to_owned());
    }
    if host.contains(|c: char| c.is_whitespace() || c.is_control() || "/?#%".contains(c)) {
        return Err(format!("`{host}` is not a host name"));
    }
    let port = match port {
        None => NBD_PORT,
        Some(text) => text.parse().ok().filter(|p| *p != 0).ok_or_else(|| format!("`{text}` is not a port"))?,
    };
    Ok(NbdAddress::Tcp { host: host.to_ascii_lowercase(), port })
}

/// Percent-decoding of RFC 3986.
fn decode(text: &str) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => out.push((high << 4 | low) as u8),
            _ => return Err("`%` is not followed by two hexadecimal digits".to_owned()),
        }
    }
    Ok(out)
}

fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' | b'~' | b':' => {
                out.push(char::from(*byte))
            }
            // Writing to a string cannot fail.
            _ => drop(write!(out, "%{byte:02X}")),
        }
    }
    out
}

impl fmt::Display for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreSpec::File(path) => write!(f, "file:{}", path.display()),
            StoreSpec::Qcow2 { path, backing } => {
                write!(f, "qcow2:{}", encode(path.as_os_str().as_bytes()))?;
                backing.as_ref().map_or(Ok(()), |backing| write!(f, "?backing={backing}"))
            }
            StoreSpec::Nbd { address: NbdAddress::Unix(path), export } => {
                let (export, socket) = (encode(export.as_bytes()), encode(path.as_os_str().as_bytes()));
                write!(f, "nbd+unix:///{export}?socket={socket}")
            }
            StoreSpec::Nbd { address: NbdAddress::Tcp { host, port }, export } => {
                let export = encode(export.as_bytes());
                match host.contains(':') {
                    true => write!(f, "nbd://[{host}]:{port}/{export}"),
                    false => write!(f, "nbd://{host}:{port}/{export}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> StoreSpec {
        name.parse().unwrap()
    }

    #[test]
    fn names_parse_and_print_back() {
        let table = [
            ("/srv/a.img", "file:/srv/a.img"),
            ("file:/srv/a b.img", "file:/srv/a b.img"),
            ("file:///srv/a:b.img", "file:/srv/a:b.img"),
            ("nbd://Host.example/", "nbd://host.example:10809/"),
            ("nbd://host:1234/disk%201", "nbd://host:1234/disk%201"),
            ("nbd://[::1]:5/x/y", "nbd://[::1]:5/x/y"),
            ("nbd:host:1234:exportname=x", "nbd://host:1234/x"),
            ("nbd:unix:/run/s.sock", "nbd+unix:///?socket=/run/s.sock"),
            ("nbd:unix:/run/s.sock:exportname=a b", "nbd+unix:///a%20b?socket=/run/s.sock"),
            ("nbd+unix:///e?socket=/run/a%3Fb", "nbd+unix:///e?socket=/run/a%3Fb"),
            ("qcow2:/srv/a b.qcow2", "qcow2:/srv/a%20b.qcow2"),
            ("qcow2:/a%3Fb?backing=/c?backing=d", "qcow2:/a%3Fb?backing=file:/c?backing=d"),
            ("qcow2:/a?backing=qcow2:/b?backing=/c", "qcow2:/a?backing=qcow2:/b?backing=file:/c"),
            ("qcow2:/a?backing=nbd+unix:///e?socket=/s", "qcow2:/a?backing=nbd+unix:///e?socket=/s"),
        ];
        for (name, printed) in table {
            let spec = parse(name);
            assert_eq!(spec.to_string(), printed, "{name}");
            assert_eq!(parse(printed), spec, "{printed}");
        }
    }

    #[test]
    fn relative_paths_become_absolute() {
        let StoreSpec::File(path) = parse("disks/a.img") else { panic!() };
        assert!(path.is_absolute() && path.ends_with("disks/a.img"));
        assert!(matches!(parse("./a:b.img"), StoreSpec::File(_)), "a colon after a slash is part of the name");
    }

    #[test]
    fn wrong_names_say_what_to_write() {
        for name in [
            "",
            "file:",
            "file://host/x",
            "http://x/y",
            "rbd:pool/x",
            "nbds://h/x",
            "nbd://",
            "nbd://h:0/x",
            "nbd://h:x/x",
            "nbd://::1/x",
            "nbd://[::1/x",
            "nbd://[h]/x",
            "nbd://u@h/x",
            "nbd://h/x?socket=/y",
            "nbd://h/%zz",
            "nbd://h/%f",
            "nbd+unix:///x",
            "nbd+unix://h/x?socket=/y",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?sock=/y",
            "nbd:unix:",
            "nbd:x:y:z",
            "nbd://h/%ff",
            "nbd+unix:///x?socket=/a%00b",
            "qcow2:",
            "qcow2:/a?backing=",
            "qcow2:/a?b",
            "qcow2:/a?backing=qcow2:",
            "qcow2:/a?backing=http://x",
            "qcow2:/a%",
        ] {
            let error = name.parse::<StoreSpec>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{name}` ")) && error.contains("; write "), "{error}");
        }
    }

    #[test]
    fn a_chain_is_read_from_the_top_down_and_has_an_end() {
        let spec = parse("qcow2:/a?backing=qcow2:/b?backing=/c");
        let names: Vec<_> = spec.chain().map(ToString::to_string).collect();
        assert_eq!(names[1..], ["qcow2:/b?backing=file:/c", "file:/c"]);
        let long = |images: usize| vec!["qcow2:/a"; images].join("?backing=").parse::<StoreSpec>();
        assert!(long(CHAIN_MAX).is_ok());
        assert!(long(CHAIN_MAX + 1).is_err());
        assert!(long(1_000_000).is_err());
    }
}
