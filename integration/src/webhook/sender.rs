//! Sends one message: a POST over a connection of its own, with limits on everything the other side decides.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{self, HeaderMap};
use hyper::{Request, Response, StatusCode, body::Incoming};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{Secret, Target, signatures};

/// Longest answer read; what is in it beyond the status is for the log alone.
const ANSWER_MAX: usize = 64 << 10;
/// Of an answer, so much is shown.
const SHOWN: usize = 200;
/// Longest wait that a receiver may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);
/// All of a try, from the name's look-up to the answer's end: the specification recommends 15 to 30 s.
const LIMIT: Duration = Duration::from_secs(20);

/// What is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The same for each try, so that a receiver knows what it has had already. ASCII without blanks.
    pub id: String,
    pub content_type: &'static str,
    pub body: Vec<u8>,
}

/// Why a message did not arrive, or perhaps not.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("cannot reach {to}: {detail}")]
    Unreachable { to: String, detail: String },
    #[error("{to} gave no answer within {limit:?}")]
    TimedOut { to: String, limit: Duration },
    #[error("{to} answers {status}{detail}")]
    Refused {
        to: String,
        status: u16,
        /// How long it asks to be left alone.
        retry_after: Option<Duration>,
        detail: String,
    },
    #[error("message {id} cannot be sent: {detail}")]
    Message { id: String, detail: String },
}

/// Why nothing can be sent at all.
#[derive(Debug, thiserror::Error)]
pub enum SenderError {
    #[error("certificates in {path} cannot be read: {detail}; it holds those of authorities in PEM", path = path.display())]
    Authorities { path: PathBuf, detail: String },
    #[error(
        "this host knows no certificate authority ({detail}); install the package ca-certificates or set `ca_file`"
    )]
    NoAuthorities { detail: String },
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// Sends messages to one address.
#[derive(Clone)]
pub struct Sender {
    target: Target,
    secrets: Vec<Secret>,
    tls: Option<TlsConnector>,
    limit: Duration,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("target", &self.target).field("secrets", &self.secrets).finish_non_exhaustive()
    }
}

impl Sender {
    /// Messages are signed with each of `secrets`. `authorities`: a PEM file of those that may vouch for the receiver, in place of the
    /// host's. Reads files. Errors: no certificates where TLS needs them.
    pub fn new(target: Target, secrets: Vec<Secret>, authorities: Option<&Path>) -> Result<Self, SenderError> {
        let tls = if target.tls { Some(connector(authorities)?) } else { None };
        Ok(Self { target, secrets, tls, limit: LIMIT })
    }

    /// The same with another limit on a try.
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// What it sends to, as it may be logged.
    #[must_use]
    pub fn origin(&self) -> String {
        self.target.origin()
    }

    /// Sends a message, signed with the time `now`; redirects are not followed.
    ///
    /// # Errors
    /// Anything but a 2xx. The message may have arrived all the same.
    pub async fn send(&self, message: &Message, now: SystemTime) -> Result<(), SendError> {
        match tokio::time::timeout(self.limit, self.exchange(message, now)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(SendError::TimedOut { to: self.origin(), limit: self.limit }),
        }
    }

    async fn exchange(&self, message: &Message, now: SystemTime) -> Result<(), SendError> {
        let request = self.request(message, now)?;
        let address = (self.target.host.as_str(), self.target.port);
        let found = tokio::net::lookup_host(address).await.map_err(|error| self.unreachable(&error))?;
        let (fit, unfit): (Vec<SocketAddr>, Vec<_>) = found.partition(|address| is_fit(address.ip()));
        if let (true, Some(address)) = (fit.is_empty(), unfit.first()) {
            let detail = format!("{} is no receiver's address: it is link-local, multicast or nobody's", address.ip());
            return Err(SendError::Unreachable { to: self.origin(), detail });
        }
        let stream = TcpStream::connect(fit.as_slice()).await.map_err(|error| self.unreachable(&error))?;
        let response = match &self.tls {
            None => self.over(stream, request).await?,
            Some(tls) => {
                let name = ServerName::try_from(self.target.host.clone()).map_err(|error| self.unreachable(&error))?;
                let stream = tls.connect(name, stream).await.map_err(|error| self.unreachable(&error))?;
                self.over(stream, request).await?
            }
        };
        let (head, body) = response.into_parts();
        if head.status.is_success() {
            return Ok(());
        }
        let detail = match Limited::new(body, ANSWER_MAX).collect().await {
            Ok(body) => shown(&body.to_bytes()),
            Err(_) => String::new(),
        };
        let hint = if head.status.is_redirection() { " (redirects are not followed; set its new `url`)" } else { "" };
        Err(SendError::Refused {
            to: self.origin(),
            status: head.status.as_u16(),
            retry_after: retry_after(&head.headers, head.status, now),
            detail: format!("{hint}{detail}"),
        })
    }

    fn request(&self, message: &Message, now: SystemTime) -> Result<Request<Full<Bytes>>, SendError> {
        let at_s = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        Request::post(self.target.path.as_str())
            .header(header::HOST, self.target.authority.as_str())
            .header(header::CONTENT_TYPE, message.content_type)
            .header(header::USER_AGENT, concat!("prestaged/", env!("CARGO_PKG_VERSION")))
            .header("webhook-id", message.id.as_str())
            .header("webhook-timestamp", at_s.to_string())
            .header("webhook-signature", signatures(&self.secrets, &message.id, at_s, &message.body))
            .body(Full::new(Bytes::from(message.body.clone())))
            .map_err(|error| SendError::Message { id: message.id.clone(), detail: error.to_string() })
    }

    async fn over<S>(&self, stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, SendError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(&error))?;
        // Ends with the answer, or with this future, whose end drops the sender.
        tokio::spawn(connection);
        sender.send_request(request).await.map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, error: &(dyn std::error::Error + 'static)) -> SendError {
        let mut detail = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            detail = format!("{detail}: {source}");
            cause = source.source();
        }
        SendError::Unreachable { to: self.origin(), detail }
    }
}

fn connector(authorities: Option<&Path>) -> Result<TlsConnector, SenderError> {
    let mut roots = RootCertStore::empty();
    match authorities {
        Some(path) => {
            let unreadable = |detail: String| SenderError::Authorities { path: path.to_owned(), detail };
            let file = crate::privilege::open_read(path).map_err(|error| unreadable(error.to_string()))?;
            for certificate in CertificateDer::pem_reader_iter(file) {
                let certificate = certificate.map_err(|error| unreadable(error.to_string()))?;
                roots.add(certificate).map_err(|error| unreadable(error.to_string()))?;
            }
            if roots.is_empty() {
                return Err(unreadable("there are none in it".to_owned()));
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                let detail = found.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
                return Err(SenderError::NoAuthorities { detail });
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Not where clouds keep their hosts' secrets (169.254.169.254, fe80::), nor what reaches many or nobody: whoever answers for a name
/// must not send this host's events, or its processes, there.
fn is_fit(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => !(v4.is_link_local() || v4.is_multicast() || v4.is_unspecified() || v4.is_broadcast()),
        IpAddr::V6(v6) => !(v6.is_unicast_link_local() || v6.is_multicast() || v6.is_unspecified()),
    }
}

/// The beginning of an answer, in one line.
fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body.get(..SHOWN).unwrap_or(body));
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

/// How long a receiver asks to be left alone (RFC 9110, 10.2.3): seconds, or a date.
fn retry_after(headers: &HeaderMap, status: StatusCode, now: SystemTime) -> Option<Duration> {
    if !matches!(status.as_u16(), 429 | 503) && !status.is_redirection() {
        return None;
    }
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => http_date(text)?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// An IMF-fixdate such as `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7); older forms are taken for none.
fn http_date(text: &str) -> Option<SystemTime> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_, date) = text.split_once(", ")?;
    let mut parts = date.split(' ');
    let mut next = || parts.next();
    let day: u64 = next()?.parse().ok().filter(|day| (1..=31).contains(day))?;
    let named = next()?;
    let month = MONTHS.iter().position(|month| *month == named)? as u64 + 1;
    let year: u64 = next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut clock = next()?.split(':').map(|part| part.parse::<u64>().ok().filter(|part| *part < 61));
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    (next()? == "GMT").then_some(())?;
    // Days since the epoch of a civil date (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
    let shifted = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (shifted / 400, shifted % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = (era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year).checked_sub(719_468)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(days * 86_400 + hour * 3600 + minute * 60 + second))
}

#[cfg(test)]
mod date_tests {
    use super::*;

    #[test]
    fn a_receiver_may_ask_for_patience_in_seconds_or_by_date() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(at(784_111_777)));
        assert_eq!(http_date("Thu, 29 Feb 2024 00:00:00 GMT"), Some(at(1_709_164_800)));
        for bad in ["", "x", "Sun, 06 Nov 1994", "Sun, 99 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT"] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
        let of = |value: &'static str, status| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static(value));
            retry_after(&headers, StatusCode::from_u16(status).unwrap(), at(784_111_700)).map(|wait| wait.as_secs())
        };
        assert_eq!(of("120", 429), Some(120));
        assert_eq!(of("99999999999", 503), Some(86_400));
        assert_eq!(of("Sun, 06 Nov 1994 08:49:37 GMT", 503), Some(77));
        assert_eq!(of("Sun, 06 Nov 1994 08:00:00 GMT", 503), Some(0));
        assert_eq!((of("-1", 503), of("soon", 503), of("5", 500)), (None, None, None));
    }
}
