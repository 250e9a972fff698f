//! What backs a disk: a raw file, a block device, an NBD export, or a qcow2 image on one of these.
//!
//! libvirt spells an NBD export as `<source protocol='nbd' name=…><host …/></source>`; everything else here uses the URI of
//! the NBD URI specification (NetworkBlockDevice/nbd, `doc/uri.md`): `nbd://host:port/export`,
//! `nbd+unix:///export?socket=/path`.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use roxmltree::Node;

use super::xml::{child, escape_attribute};

/// The port of NBD, left out of URIs.
const NBD_PORT: u16 = 10_809;

/// Images on top of each other that a definition may name.
const CHAIN_MAX: usize = 16;

/// What a disk is stored on. `Display` gives the path, the NBD URI, or `qcow2:/path[?backing=store]` with what of the path
/// could be mistaken percent-encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreSource {
    File(PathBuf),
    Block(PathBuf),
    Nbd(NbdUri),
    /// An image, and what the definition says it stands on. `None`: it says nothing, the image does.
    Qcow2 {
        image: PathBuf,
        backing: Option<Box<StoreSource>>,
    },
}

impl fmt::Display for StoreSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) | Self::Block(path) => write!(f, "{}", path.display()),
            Self::Nbd(uri) => write!(f, "{uri}"),
            Self::Qcow2 { image, backing } => {
                write!(f, "qcow2:{}", percent_encode(&image.to_string_lossy()))?;
                backing.as_ref().map_or(Ok(()), |backing| write!(f, "?backing={backing}"))
            }
        }
    }
}

/// An NBD export without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NbdUri {
    pub endpoint: NbdEndpoint,
    /// The export's name; the empty name is the server's default export.
    pub export: String,
}

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdEndpoint {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Why a source is not a usable NBD export.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreSourceError {
    #[error("`{uri}` is not an NBD URI; write nbd://host:port/export or nbd+unix:///export?socket=/path")]
    NotNbd { uri: String },
    #[error("NBD over TLS is not supported: offer the export on a unix socket or on a trusted network without TLS")]
    Tls,
    #[error("the NBD source names no host and no socket")]
    NoHost,
    #[error("the NBD source names several hosts: give one")]
    SeveralHosts,
    #[error("`{port}` is not a port number")]
    Port { port: String },
    #[error("the NBD transport `{transport}` is not supported: use tcp or unix")]
    Transport { transport: String },
    #[error(
        "a backing store of type {kind} and format {format} is not supported: raw and qcow2 files and devices, and raw NBD exports are"
    )]
    Backing { kind: String, format: String },
    #[error("the backing store names no source")]
    NoBackingSource,
    #[error("more than 16 images stand on each other")]
    Deep,
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = percent_encode(&self.export);
        match &self.endpoint {
            NbdEndpoint::Unix(path) => {
                write!(f, "nbd+unix:///{export}?socket={}", percent_encode(&path.to_string_lossy()))
            }
            NbdEndpoint::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { percent_encode(host) };
                if *port == NBD_PORT {
                    write!(f, "nbd://{host}/{export}")
                } else {
                    write!(f, "nbd://{host}:{port}/{export}")
                }
            }
        }
    }
}

impl FromStr for NbdUri {
    type Err = StoreSourceError;

    fn from_str(uri: &str) -> Result<Self, Self::Err> {
        let not_nbd = || StoreSourceError::NotNbd { uri: uri.to_owned() };
        let (scheme, rest) = uri.split_once("://").ok_or_else(not_nbd)?;
        if matches!(scheme, "nbds" | "nbds+unix") {
            return Err(StoreSourceError::Tls);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = percent_decode(export).ok_or_else(not_nbd)?;
        match scheme {
            "nbd" => {
                let (host, port) = split_authority(authority).ok_or_else(not_nbd)?;
                let port = match port {
                    None => NBD_PORT,
                    Some(port) => port.parse().map_err(|_| StoreSourceError::Port { port: port.to_owned() })?,
                };
                Ok(Self { endpoint: NbdEndpoint::Tcp { host, port }, export })
            }
            "nbd+unix" if authority.is_empty() => {
                let socket = query.split('&').find_map(|p| p.strip_prefix("socket=")).ok_or_else(not_nbd)?;
                let socket = percent_decode(socket).filter(|s| !s.is_empty()).ok_or_else(not_nbd)?;
                Ok(Self { endpoint: NbdEndpoint::Unix(PathBuf::from(socket)), export })
            }
            _ => Err(not_nbd()),
        }
    }
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`, not empty.
fn split_authority(authority: &str) -> Option<(String, Option<&str>)> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, tail) = rest.split_once(']')?;
        host.parse::<Ipv6Addr>().ok()?;
        let port = if tail.is_empty() { None } else { Some(tail.strip_prefix(':')?) };
        return Some((host.to_owned(), port));
    }
    let (host, port) = authority.split_once(':').map_or((authority, None), |(h, p)| (h, Some(p)));
    let host = percent_decode(host).filter(|h| !h.is_empty() && !h.contains(':'))?;
    Some((host, port))
}

impl NbdUri {
    /// From a libvirt `<source protocol='nbd'>` element.
    pub(super) fn from_source(source: Node<'_, '_>) -> Result<Self, StoreSourceError> {
        if source.attribute("tls") == Some("yes") {
            return Err(StoreSourceError::Tls);
        }
        let mut hosts = source.children().filter(|n| super::xml::is(*n, "host"));
        let host = hosts.next().ok_or(StoreSourceError::NoHost)?;
        if hosts.next().is_some() {
            return Err(StoreSourceError::SeveralHosts);
        }
        let endpoint = match host.attribute("transport").unwrap_or("tcp") {
            "unix" => {
                let socket = host.attribute("socket").filter(|s| !s.is_empty()).ok_or(StoreSourceError::NoHost)?;
                NbdEndpoint::Unix(PathBuf::from(socket))
            }
            "tcp" => {
                let name = host.attribute("name").filter(|n| !n.is_empty()).ok_or(StoreSourceError::NoHost)?;
                let port = match host.attribute("port") {
                    None => NBD_PORT,
                    Some(port) => port.parse().map_err(|_| StoreSourceError::Port { port: port.to_owned() })?,
                };
                NbdEndpoint::Tcp { host: name.trim_matches(['[', ']']).to_owned(), port }
            }
            other => return Err(StoreSourceError::Transport { transport: other.to_owned() }),
        };
        Ok(Self { endpoint, export: source.attribute("name").unwrap_or_default().to_owned() })
    }

    /// The libvirt `<source>` element of this export.
    pub fn to_source_xml(&self) -> String {
        let name = match self.export.as_str() {
            "" => String::new(),
            export => format!(" name='{}'", escape_attribute(export)),
        };
        let host = match &self.endpoint {
            NbdEndpoint::Unix(path) => {
                format!("<host transport='unix' socket='{}'/>", escape_attribute(&path.to_string_lossy()))
            }
            NbdEndpoint::Tcp { host, port } => format!("<host name='{}' port='{port}'/>", escape_attribute(host)),
        };
        format!("<source protocol='nbd'{name}>{host}</source>")
    }
}

impl StoreSource {
    /// From a `<disk>` (or volume) of the given libvirt type with the given source path.
    pub(super) fn path(kind: &str, path: &str) -> Option<Self> {
        match kind {
            "file" => Some(Self::File(Path::new(path).to_owned())),
            "block" => Some(Self::Block(Path::new(path).to_owned())),
            _ => None,
        }
    }

    /// An image in `format` on this file or device; `None` where that is not possible.
    pub(super) fn in_format(self, format: &str, backing: Option<Self>) -> Option<Self> {
        match (format, self) {
            ("raw", store) if backing.is_none() => Some(store),
            ("qcow2", Self::File(image) | Self::Block(image)) => {
                Some(Self::Qcow2 { image, backing: backing.map(Box::new) })
            }
            _ => None,
        }
    }

    /// What the `<backingStore>` of a disk or of another one names; `None` if it names nothing. An empty one only says that
    /// the chain ends.
    pub(super) fn backing_of(node: Node<'_, '_>) -> Result<Option<Self>, StoreSourceError> {
        let mut stores = Vec::new();
        let mut next = child(node, "backingStore");
        while let Some(element) = next.filter(|element| element.children().any(|n| n.is_element())) {
            if stores.len() == CHAIN_MAX {
                return Err(StoreSourceError::Deep);
            }
            let kind = element.attribute("type").unwrap_or("file");
            let format = super::xml::child_attribute(element, "format", "type").unwrap_or("raw");
            let source = child(element, "source").ok_or(StoreSourceError::NoBackingSource)?;
            let path = |attribute: &str| source.attribute(attribute).filter(|path| path.starts_with('/'));
            let store = match kind {
                "file" => Self::path(kind, path("file").ok_or(StoreSourceError::NoBackingSource)?),
                "block" => Self::path(kind, path("dev").ok_or(StoreSourceError::NoBackingSource)?),
                "network" if source.attribute("protocol") == Some("nbd") => {
                    Some(Self::Nbd(NbdUri::from_source(source)?))
                }
                _ => None,
            };
            let unfit = || StoreSourceError::Backing { kind: kind.to_owned(), format: format.to_owned() };
            stores.push((store.ok_or_else(unfit)?, kind.to_owned(), format.to_owned()));
            next = child(element, "backingStore");
        }
        stores.into_iter().rev().try_fold(None, |below, (store, kind, format)| {
            let made = store.in_format(&format, below);
            made.map(Some).ok_or(StoreSourceError::Backing { kind, format })
        })
    }

    /// From the `<source>` child of a disk element, where it is a file, a device or a plain NBD export.
    pub(super) fn of_disk(disk: Node<'_, '_>) -> Option<Self> {
        let source = child(disk, "source")?;
        match disk.attribute("type").unwrap_or("file") {
            "file" => Self::path("file", source.attribute("file")?),
            "block" => Self::path("block", source.attribute("dev")?),
            "network" if source.attribute("protocol") == Some("nbd") => NbdUri::from_source(source).ok().map(Self::Nbd),
            _ => None,
        }
    }
}

/// Percent-encodes all but RFC 3986 unreserved characters and `/`.
fn percent_encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn percent_decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use roxmltree::Document;

    #[test]
    fn libvirt_sources_become_nbd_uris() {
        for (xml, uri) in [
            (
                "<source protocol='nbd' name='disk'><host transport='unix' socket='/run/n.sock'/></source>",
                "nbd+unix:///disk?socket=/run/n.sock",
            ),
            (
                "<source protocol='nbd'><host transport='unix' socket='/run/a b'/></source>",
                "nbd+unix:///?socket=/run/a%20b",
            ),
            (
                "<source protocol='nbd' name='a/b?c'><host name='store.example' port='10810'/></source>",
                "nbd://store.example:10810/a/b%3Fc",
            ),
            ("<source protocol='nbd' name='x'><host name='::1' port='10809'/></source>", "nbd://[::1]/x"),
            ("<source protocol='nbd' name='x' tls='no'><host name='h'/></source>", "nbd://h/x"),
        ] {
            let doc = Document::parse(xml).unwrap();
            let parsed = NbdUri::from_source(doc.root_element()).unwrap();
            assert_eq!(parsed.to_string(), uri);
            assert_eq!(uri.parse::<NbdUri>().unwrap(), parsed);
        }
    }

    #[test]
    fn unusable_sources_say_why() {
        for (xml, error) in [
            ("<source protocol='nbd' tls='yes'><host name='h'/></source>", StoreSourceError::Tls),
            ("<source protocol='nbd'/>", StoreSourceError::NoHost),
            ("<source protocol='nbd'><host transport='unix'/></source>", StoreSourceError::NoHost),
            ("<source protocol='nbd'><host name='a'/><host name='b'/></source>", StoreSourceError::SeveralHosts),
            (
                "<source protocol='nbd'><host name='a' port='99999'/></source>",
                StoreSourceError::Port { port: "99999".into() },
            ),
            (
                "<source protocol='nbd'><host name='a' transport='rdma'/></source>",
                StoreSourceError::Transport { transport: "rdma".into() },
            ),
        ] {
            let doc = Document::parse(xml).unwrap();
            assert_eq!(NbdUri::from_source(doc.root_element()).unwrap_err(), error);
        }
        assert_eq!("nbds://h/x".parse::<NbdUri>().unwrap_err(), StoreSourceError::Tls);
        for bad in [
            "",
            "/path",
            "http://h/x",
            "nbd://",
            "nbd:///x",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd://[zz]/x",
            "nbd://h/%zz",
        ] {
            assert!(bad.parse::<NbdUri>().is_err(), "{bad}");
        }
    }

    fn endpoint() -> impl Strategy<Value = NbdEndpoint> {
        prop_oneof![
            "/[ -~]{1,30}".prop_map(|p| NbdEndpoint::Unix(PathBuf::from(p))),
            ("[a-z0-9.-]{1,20}", 1..=u16::MAX).prop_map(|(host, port)| NbdEndpoint::Tcp { host, port }),
            (any::<u128>(), 1..=u16::MAX)
                .prop_map(|(v6, port)| NbdEndpoint::Tcp { host: Ipv6Addr::from(v6).to_string(), port }),
        ]
    }

    proptest! {
        #[test]
        fn uri_and_libvirt_spelling_round_trip(endpoint in endpoint(), export in "[ -~äß]{0,20}") {
            let nbd = NbdUri { endpoint, export };
            prop_assert_eq!(nbd.to_string().parse::<NbdUri>().unwrap(), nbd.clone());
            let xml = nbd.to_source_xml();
            let doc = Document::parse(&xml).unwrap();
            prop_assert_eq!(NbdUri::from_source(doc.root_element()).unwrap(), nbd);
        }

        #[test]
        fn any_text_is_an_uri_or_an_error(text in "\\PC{0,60}") {
            let _ = text.parse::<NbdUri>();
            let _ = format!("nbd+unix:///{text}").parse::<NbdUri>();
        }
    }
}
